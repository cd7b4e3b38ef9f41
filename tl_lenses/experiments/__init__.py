"""The experiments of the Patchscopes and Tuned Lens papers, each a function that takes a model and returns a result that prints and saves.

| I want to know | Call |
|---|---|
| how early the next token can be read | `next_token(model, tokens, lenses)` |
| which attributes of a subject a vector has | `attributes(model, facts)` |
| when a name becomes an entity | `entities(model, descriptions)` |
| whether a larger model can read a smaller one | `cross_model(model, to, maps, tokens)` |
| whether a patch makes two hops out of one | `multihop(model, facts)` |

and those of the Tuned Lens paper:

| I want to know | Call |
|---|---|
| how good and how biased lenses are | `quality(model, lenses, tokens)` |
| whether the lens of one layer reads another | `transfer(model, lens, tokens)` |
| whether a lens still reads a fine-tune | `fine_tune(model, base, own, tokens)` |
| whether blocks go down the loss' gradient | `gradients(model, tokens)` |
| what the model would write from layer l | `sampling(model, lenses, prompts)`, `sample_from(model, lens, layer, prompt)` |
| which directions matter to a lens, and to the model as well | `causal_basis(model, lens, tokens)` |
| whether a lens responds to an intervention as the model does | `alignment(model, lenses, tokens)` |
| what a block, a head, a subspace or the order of blocks is worth | `ablations(model, tokens)` |
| whether a trajectory gives an injected prompt away | `detection(model, lenses, tasks)` |
| whether what settles late in the layers is learned late | `difficulty(model, lenses, tokens, checkpoints)` |
| what weights write and read | `weights(model, lenses)` |
| which state would say this | `inversion(model, lenses, tokens)`, `invert(lens[l], logp)` |

Sources: Ghandeharioun et al. 2024 (Patchscopes), sections 4 and 5; Belrose et al. 2023 (Tuned Lens), sections 3 to 5.
"""

from tl_lenses.experiments.ablations import Ablations, ablations
from tl_lenses.experiments.alignment import Alignment, alignment
from tl_lenses.experiments.attributes import Attributes, attributes
from tl_lenses.experiments.causal_basis import CausalBasis, causal_basis
from tl_lenses.experiments.common import Result
from tl_lenses.experiments.cross_model import CrossModel, cross_model
from tl_lenses.experiments.detection import Detection, detection
from tl_lenses.experiments.difficulty import Difficulty, difficulty
from tl_lenses.experiments.entities import Entities, entities
from tl_lenses.experiments.facts import Fact, read_facts
from tl_lenses.experiments.fine_tune import FineTune, fine_tune
from tl_lenses.experiments.gradients import Gradients, gradients
from tl_lenses.experiments.inversion import Gaussian, Inversion, inversion, invert
from tl_lenses.experiments.multihop import Multihop, multihop
from tl_lenses.experiments.next_token import NextToken, next_token
from tl_lenses.experiments.quality import Quality, quality
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.sampling import Sampling, sample_from, sampling
from tl_lenses.experiments.transfer import Transfer, transfer
from tl_lenses.experiments.weights import Weights, weights

__all__ = [
    "Ablations",
    "Alignment",
    "Attributes",
    "CausalBasis",
    "CrossModel",
    "Detection",
    "Difficulty",
    "Entities",
    "Fact",
    "Gaussian",
    "Inversion",
    "FineTune",
    "Gradients",
    "Multihop",
    "NextToken",
    "Quality",
    "Report",
    "Result",
    "Weights",
    "ablations",
    "alignment",
    "Sampling",
    "Transfer",
    "attributes",
    "causal_basis",
    "cross_model",
    "detection",
    "difficulty",
    "entities",
    "inversion",
    "invert",
    "fine_tune",
    "gradients",
    "multihop",
    "next_token",
    "quality",
    "read_facts",
    "weights",
    "sample_from",
    "sampling",
    "transfer",
]
