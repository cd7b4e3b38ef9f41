"""The experiments of the Patchscopes and Tuned Lens papers, each a function that takes a model and returns a result that prints and saves.

| I want to know | Call |
|---|---|
| how early the next token can be read | `next_token(model, tokens, lenses)` |
| which attributes of a subject a vector has | `attributes(model, facts)` |
| when a name becomes an entity | `entities(model, descriptions)` |
| whether a larger model can read a smaller one | `cross_model(model, to, maps, tokens)` |
| whether a patch makes two hops out of one | `multihop(model, facts)` |
| who speaks, the vector or the model that reads it | `conflict(model, to, *conflicting())` |

and the experiments of the Tuned Lens paper:

| I want to know | Call |
|---|---|
| how good and how biased lenses are | `quality(model, lenses, tokens)` |
| whether the lens of one layer reads another | `transfer(model, lens, tokens)` |
| whether a lens still reads a fine-tune | `fine_tune(model, base, own, tokens)` |
| whether blocks go down the loss' gradient | `gradients(model, tokens)` |
| which text the model would write from layer l | `sampling(model, lenses, prompts)`, `sample_from(model, lens, layer, prompt)` |
| which directions matter to a lens, and to the model as well | `causal_basis(model, lens, tokens)` |
| whether a lens responds to an intervention as the model does | `alignment(model, lenses, tokens)` |
| how much the loss rises without a block, a head, a subspace, or in another order of blocks | `ablations(model, tokens)` |
| whether a trajectory gives an injected prompt away | `detection(model, lenses, tasks)` |
| whether predictions that settle late in the layers are learned late | `difficulty(model, lenses, tokens, checkpoints)` |
| which tokens the weights write and read | `weights(model, lenses)` |
| which state would say this | `inversion(model, lenses, tokens)`, `invert(lens[l], logp)` |

and which lens to believe (`docs/which-lens.md`):

| I want to know | Call |
|---|---|
| all of this at once, with a sentence per band of layers | `compare(model, lenses, tokens)` |
| whether a lens reads what is thought of and not said | `intermediates(model, lenses, items)` |
| whether the model uses what a lens reads | `usage(model, lenses, facts)`, `readout_angle(directions, subspace)` |

Sources: Ghandeharioun et al. 2024 (Patchscopes), sections 4 and 5; Belrose et al. 2023 (Tuned Lens), sections 3 to 5.
"""

from tl_lenses.experiments.common import Result
from tl_lenses.experiments.comparison import Comparison, compare
from tl_lenses.experiments.facts import Fact, read_facts
from tl_lenses.experiments.patchscopes.attributes import Attributes, attributes
from tl_lenses.experiments.patchscopes.conflict import Conflict, conflict, conflicting
from tl_lenses.experiments.patchscopes.cross_model import CrossModel, cross_model
from tl_lenses.experiments.patchscopes.entities import Entities, entities
from tl_lenses.experiments.patchscopes.multihop import Multihop, multihop
from tl_lenses.experiments.patchscopes.next_token import NextToken, next_token
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.tuned_lens.ablations import Ablations, ablations
from tl_lenses.experiments.tuned_lens.alignment import Alignment, alignment
from tl_lenses.experiments.tuned_lens.causal_basis import CausalBasis, causal_basis
from tl_lenses.experiments.tuned_lens.detection import Detection, detection
from tl_lenses.experiments.tuned_lens.difficulty import Difficulty, difficulty
from tl_lenses.experiments.tuned_lens.fine_tune import FineTune, fine_tune
from tl_lenses.experiments.tuned_lens.gradients import Gradients, gradients
from tl_lenses.experiments.tuned_lens.inversion import Gaussian, Inversion, inversion, invert
from tl_lenses.experiments.tuned_lens.quality import Quality, quality
from tl_lenses.experiments.tuned_lens.sampling import Sampling, sample_from, sampling
from tl_lenses.experiments.tuned_lens.transfer import Transfer, transfer
from tl_lenses.experiments.tuned_lens.weights import Weights, weights
from tl_lenses.experiments.which_lens.intermediates import Intermediates, Item, intermediates, read_items
from tl_lenses.experiments.which_lens.usage import Angle, Usage, lens_directions, readout_angle, usage

__all__ = [
    "Ablations", "Alignment", "Angle", "Attributes", "CausalBasis", "Comparison", "Conflict", "CrossModel", "Detection", "Difficulty", "Entities",
    "Fact", "FineTune", "Gaussian", "Gradients", "Intermediates", "Inversion", "Item", "Multihop", "NextToken", "Quality", "Report",
    "Result", "Sampling", "Transfer", "Usage", "Weights", "ablations", "alignment", "attributes", "causal_basis", "compare", "conflict", "conflicting",
    "cross_model", "detection", "difficulty", "entities", "fine_tune", "gradients", "intermediates", "inversion", "invert", "lens_directions",
    "multihop", "next_token", "quality", "read_facts", "read_items", "readout_angle", "sample_from", "sampling", "transfer", "usage", "weights",
]  # fmt: skip
