"""The experiments of the Patchscopes and Tuned Lens papers, each a function that takes a model and returns a result that prints and saves.

| I want to know | Call |
|---|---|
| how early the next token can be read | `next_token(model, tokens, lenses)` |
| which attributes of a subject a vector has | `attributes(model, facts)` |
| when a name becomes an entity | `entities(model, descriptions)` |
| whether a larger model can read a smaller one | `cross_model(model, to, maps, tokens)` |
| whether a patch makes two hops out of one | `multihop(model, facts)` |
| how good and how biased lenses are | `quality(model, lenses, tokens)` |
| whether the lens of one layer reads another | `transfer(model, lens, tokens)` |
| whether a lens still reads a fine-tune | `fine_tune(model, base, own, tokens)` |
| whether blocks go down the loss' gradient | `gradients(model, tokens)` |
| what the model would write from layer l | `sampling(model, lenses, prompts)`, `sample_from(model, lens, layer, prompt)` |

Sources: Ghandeharioun et al. 2024 (Patchscopes), sections 4 and 5; Belrose et al. 2023 (Tuned Lens), sections 3 to 5.
"""

from tl_lenses.experiments.attributes import Attributes, attributes
from tl_lenses.experiments.common import Result
from tl_lenses.experiments.cross_model import CrossModel, cross_model
from tl_lenses.experiments.entities import Entities, entities
from tl_lenses.experiments.facts import Fact, read_facts
from tl_lenses.experiments.fine_tune import FineTune, fine_tune
from tl_lenses.experiments.gradients import Gradients, gradients
from tl_lenses.experiments.multihop import Multihop, multihop
from tl_lenses.experiments.next_token import NextToken, next_token
from tl_lenses.experiments.quality import Quality, quality
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.sampling import Sampling, sample_from, sampling
from tl_lenses.experiments.transfer import Transfer, transfer

__all__ = [
    "Attributes",
    "CrossModel",
    "Entities",
    "Fact",
    "FineTune",
    "Gradients",
    "Multihop",
    "NextToken",
    "Quality",
    "Report",
    "Result",
    "Sampling",
    "Transfer",
    "attributes",
    "cross_model",
    "entities",
    "fine_tune",
    "gradients",
    "multihop",
    "next_token",
    "quality",
    "read_facts",
    "sample_from",
    "sampling",
    "transfer",
]
