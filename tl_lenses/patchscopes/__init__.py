"""Patchscopes: what does the model itself say that a vector means?"""

from tl_lenses.patchscopes import scopes
from tl_lenses.patchscopes.core import Source, Target, patchscope
from tl_lenses.patchscopes.result import PatchscopeResult, TopK

__all__ = ["PatchscopeResult", "Source", "Target", "TopK", "patchscope", "scopes"]
