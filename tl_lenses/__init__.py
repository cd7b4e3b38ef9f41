"""Tuned lenses and patchscopes as TransformerLens hook functions.

Two ideas: one affine-translator module (`x -> W x + b` per residual-stream site), and one patching primitive
(replace part
of one activation by a function of it), both over TransformerLens' standard hook names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tl_lenses import edits, solve
from tl_lenses.data import Batch, token_batches
from tl_lenses.evaluation import Scores, evaluate
from tl_lenses.fit.regression import fit_regression
from tl_lenses.fit.tuned import fit_tuned
from tl_lenses.hooks import generate, patch, read, run
from tl_lenses.invariants import check
from tl_lenses.lens import Lens
from tl_lenses.moments import Moments
from tl_lenses.patchscopes import PatchscopeResult, Source, Target, patchscope, scopes
from tl_lenses.sites import at, positions, site
from tl_lenses.trajectory import Trajectories, Trajectory, trajectory
from tl_lenses.translators import Affine, Translators

if TYPE_CHECKING:
    from tl_lenses import lab, views

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Batch",
    "Lens",
    "Moments",
    "PatchscopeResult",
    "Scores",
    "Source",
    "Target",
    "Trajectories",
    "Trajectory",
    "Translators",
    "at",
    "check",
    "edits",
    "evaluate",
    "fit_regression",
    "fit_tuned",
    "generate",
    "lab",
    "patch",
    "patchscope",
    "positions",
    "read",
    "run",
    "scopes",
    "site",
    "solve",
    "token_batches",
    "trajectory",
    "views",
]


def __getattr__(name: str) -> Any:
    """`tll.lab` and `tll.views` when they are used: they bring model files and drawing."""
    if name in ("lab", "views"):
        return import_module(f"tl_lenses.{name}")
    raise AttributeError(f"module 'tl_lenses' has no attribute {name!r}")
