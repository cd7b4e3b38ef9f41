"""The experiments of the Patchscopes and Tuned Lens papers, and three that ask which lens to believe.

Each is a function that takes a model and returns a report, which prints, draws and saves. `docs/experiments.md` and
`docs/which-lens.md` say which question each of them answers.

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
