"""Do logits depend on the value that a hook returns? Some bridges compute values that the wrapped code never reads."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tl_lenses.layers import site_layer
from tl_lenses.model import LensModel, forward, probe_tokens, without_hooks
from tl_lenses.tokens import Batch

# Whether a site leads to the logits, by model; see `leads_to_logits`.
_LEADS: WeakKeyDictionary[Any, dict[tuple[str, bool], bool]] = WeakKeyDictionary()
# Sites that some bridges compute beside the code that they wrap, which does not read them.
_SHOWN = ("hook_pattern", "hook_attn_scores", "hook_normalized", "hook_scale")


def leads_to_logits(model: LensModel, name: str, *, edited: bool = True) -> bool:
    """Whether the logits depend on the value that a hook returns at a site; tried once per site, on four tokens.

    Some bridges compute a value beside the Hugging Face code that they wrap, such as attention patterns (GPT-Neo, GPT-J and
    OPT in TransformerLens 3.9 to 4.3): an edit there changes nothing, and a read has no gradient. Told by behaviour.

    Args:
        edited: of a hook that returns another tensor; False: of one that returns what it was given.
    """
    tried = _LEADS.setdefault(model, {})
    if name.endswith("hook_pattern"):
        name = "blocks.0.attn.hook_pattern"  # the blocks of a model do it alike
    if (name, edited) not in tried:
        given: list[Tensor] = []

        def give_back(x: Tensor, hook: Any) -> Tensor | None:
            if not x.is_floating_point():
                return None
            given.append(x.detach().clone().requires_grad_() if edited or not x.requires_grad else x)
            return given[-1]

        with torch.inference_mode(False), torch.enable_grad(), without_hooks(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with model.hooks(fwd_hooks=[(name, give_back)]):
                logits = forward(model, Batch(probe_tokens(model, 1, 4), None))
            leads = lambda x: torch.autograd.grad(logits.float().square().sum(), x, allow_unused=True)[0] is not None
            # A site that did not fire is `installed`'s to refuse.
            tried[name, edited] = not given or (logits.requires_grad and leads(given[-1]))
    return tried[name, edited]


def check_edits(model: LensModel, hooks: Iterable[tuple[Any, Callable[..., Any]]]) -> None:
    """Refuse edits that would change nothing, and reads with a gradient that would have none.

    It makes passes of its own, once per model and site, where the site is one that bridges may compute for show.
    """
    for name, fn in hooks:
        edits, keeps = getattr(fn, "edits", False), getattr(fn, "keeps", False)
        if not (edits and name.endswith(_SHOWN)) and not (keeps and site_layer(name) is None):
            continue
        if leads_to_logits(model, name, edited=edits):
            continue
        if name.endswith("hook_pattern"):
            raise RuntimeError(
                "this model's attention ignores edits of hook_pattern (a bridge that delegates attention to Hugging Face code): "
                "the patch would change nothing. Patch hook_z or hook_attn_out instead, or load a HookedTransformer"
            )
        raise RuntimeError(
            f"what stands at {name!r} does not lead to this model's logits (a bridge computes it beside the code that it wraps): "
            f"{'the patch would change nothing' if edits else 'a read with detach=False would have no gradient'}. Use the "
            "site before or after it"
        )
