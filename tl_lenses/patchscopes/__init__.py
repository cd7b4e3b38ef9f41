"""Patchscopes: what does the model itself say that a vector means?"""

from tl_lenses.patchscopes import scopes
from tl_lenses.patchscopes.result import PatchscopeResult, TopK
from tl_lenses.patchscopes.run import patchscope
from tl_lenses.patchscopes.sources import Source
from tl_lenses.patchscopes.targets import Target

__all__ = ["PatchscopeResult", "Source", "Target", "TopK", "patchscope", "scopes"]
