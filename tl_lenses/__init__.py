"""Tuned lenses and patchscopes as TransformerLens hook functions.

Two ideas: one affine-translator module (`x -> W x + b` per residual-stream site), and one patching primitive (replace
part of one activation by a function of it), both over TransformerLens' standard hook names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tl_lenses import edits, solve
from tl_lenses.calibrating import Marginals, marginals
from tl_lenses.capturing import capture
from tl_lenses.evaluation import Scores, evaluate
from tl_lenses.fit.jacobian import fit_jacobian
from tl_lenses.fit.regression import fit_regression
from tl_lenses.fit.scope import fit_scope
from tl_lenses.fit.tuned import fit_tuned
from tl_lenses.hooks import generate, patch, read, run
from tl_lenses.invariants import check
from tl_lenses.lens import Lens
from tl_lenses.moments import Moments
from tl_lenses.patchscopes import PatchscopeResult, Source, Target, patchscope, scopes
from tl_lenses.shares import Shares, components, detached
from tl_lenses.sites import at, positions, site
from tl_lenses.text.batches import token_batches
from tl_lenses.tokens import Batch
from tl_lenses.trajectories import Trajectories, Trajectory, trajectory
from tl_lenses.translators import Affine, Translators

if TYPE_CHECKING:
    from tl_lenses import experiments, lab, methods, views
    from tl_lenses.experiments import compare
    from tl_lenses.experiments.calibration import calibration
    from tl_lenses.experiments.faithful import faithfulness
    from tl_lenses.loading import load_model
    from tl_lenses.views.pages import page

__version__ = "0.1.0"

__all__ = [
    "Affine", "Batch", "Lens", "Marginals", "Moments", "PatchscopeResult", "Scores", "Shares", "Source", "Target",
    "Trajectories", "Trajectory", "Translators", "at", "calibration", "capture", "check", "compare", "components", "detached",
    "edits", "evaluate", "experiments", "faithfulness", "fit_jacobian", "fit_regression", "fit_scope", "fit_tuned", "generate",
    "lab", "load_model", "marginals", "methods", "page", "patch", "patchscope", "positions", "read", "run", "scopes", "site",
    "solve", "token_batches", "trajectory", "views",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What brings more files is imported when it is used."""
    late = {
        "compare": "tl_lenses.experiments.comparison",
        "calibration": "tl_lenses.experiments.calibration",
        "faithfulness": "tl_lenses.experiments.faithful",
        "load_model": "tl_lenses.loading",
        "page": "tl_lenses.views.pages",
    }
    if name in late:
        return getattr(import_module(late[name]), name)
    if name in ("experiments", "lab", "methods", "views"):
        return import_module(f"tl_lenses.{name}")
    raise AttributeError(f"module 'tl_lenses' has no attribute {name!r}")
