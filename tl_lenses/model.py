"""What the library asks of a model: a Protocol over TransformerLens' portable surface, and nothing about architectures.

`HookedTransformer` (2.16 to 3.9) and `TransformerBridge` (3.9 to 4.x) both satisfy it. Differences that cannot be avoided
(key-value caches, left padding) are told apart by the signature of `forward` or by a tiny pass, never by class.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.files import readable
from tl_lenses.tokens import (
    Batch,
    as_batch,
    bos_text,
    chat_ids,
    check_mask,
    check_tokens,
    is_conversation,
    padded,
    special_id,
    tokenize,
)


@runtime_checkable
class LensModel(Protocol):
    """The part of a TransformerLens model that we use.

    Children of the module (`ln_final`, `unembed`) are not listed: from Python 3.12 on `isinstance` looks members up
    statically and would not see them (`unembed.Readout` checks for them by name).
    """

    cfg: Any
    hook_dict: Any

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
    def hooks(self, *args: Any, **kwargs: Any) -> Any: ...


_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(model: LensModel) -> Any:
    """The lock that a thread holds while it runs the model or has hooks on it: hooks belong to the model, not to a thread."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


def n_layers(model: LensModel) -> int:
    """Number of blocks; layer `n_layers` is the final residual."""
    return int(model.cfg.n_layers)


def d_model(model: LensModel) -> int:
    """Width of the residual stream."""
    return int(model.cfg.d_model)


def name_of(model: LensModel) -> str:
    """The model's name for people, as every file and terminal can hold it; never used to decide anything."""
    return readable(str(getattr(model.cfg, "model_name", None) or type(model).__name__))


def tokenizer_of(model: LensModel) -> Any:
    """The model's tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so text cannot be read: pass token ids, or set model.tokenizer")
    return tokenizer


def device_of(model: LensModel) -> torch.device:
    """Device of the model's first parameter, where tokens go in."""
    return next(model.parameters()).device  # type: ignore[attr-defined]


def dtype_of(model: LensModel) -> torch.dtype:
    """Floating-point type of the model's parameters."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())  # type: ignore[attr-defined]


def check_kind(model: LensModel) -> None:
    """Refuse what cannot run: no TransformerLens model, weights that are not there, or blocks that are no decoder's."""
    missing = [name for name in ("cfg", "run_with_hooks", "hooks", "unembed") if not hasattr(model, name)]
    if missing and not (missing == ["unembed"] and not hasattr(model, "blocks")):
        raise TypeError(
            f"expected a TransformerLens model (HookedTransformer or TransformerBridge), got {type(model).__name__} "
            f"without {', '.join(missing)}; wrap a Hugging Face model with TransformerBridge.boot_transformers"
        )
    if not hasattr(model, "blocks") and hasattr(model, "named_children"):
        others = [name for name, _ in model.named_children() if name.endswith("blocks")]  # type: ignore[attr-defined]
        raise ValueError(
            f"{name_of(model)!r} has no decoder stack blocks.*{' but ' + ', '.join(others) if others else ''}: layers are read at "
            "blocks.0..n, so encoder-decoders and encoders are not supported; use a decoder-only model"
        )
    if hasattr(model, "parameters") and device_of(model).type == "meta":
        raise ValueError(
            f"the weights of {name_of(model)!r} are on the meta device, so there is nothing to compute with: load them "
            "(without device='meta', init_empty_weights or offloading)"
        )


def check_model(model: LensModel, *, what: str = "this") -> None:
    """Refuse a model that `what` cannot read: as `check_kind`, in train mode, or with quantised weights."""
    check_kind(model)
    if model.training:  # type: ignore[attr-defined]
        raise ValueError(f"the model is in train mode, so {what} would see dropout: call model.eval() first")
    unembedding = getattr(model, "W_U", None)
    if not isinstance(unembedding, Tensor) or not unembedding.is_floating_point():
        got = getattr(unembedding, "dtype", type(unembedding).__name__)
        raise ValueError(
            f"cannot read the unembedding (expected a floating-point W_U, got {got}): load the model without quantised weights"
        )


def eos_ids(model: LensModel) -> list[int]:
    """The ids that end a text: the tokenizer's EOS first, then those of the model's generation settings; may be empty."""
    tokenizer = getattr(model, "tokenizer", None)
    of_tokenizer = None if tokenizer is None else special_id(tokenizer, "eos")
    settings = getattr(getattr(model, "original_model", None), "generation_config", None)
    more = getattr(settings, "eos_token_id", None)
    listed = more if isinstance(more, (list, tuple)) else [more]
    d_vocab = int(model.cfg.d_vocab)
    return [i for i in dict.fromkeys([of_tokenizer, *listed]) if isinstance(i, int) and 0 <= i < d_vocab]


# Text, several texts, token ids, what a tokenizer returns (`input_ids`, `attention_mask`), or the messages of a conversation.
Prompt = str | list[Any] | tuple[Any, ...] | Mapping[str, Any] | Int[Tensor, "batch pos"] | Int[Tensor, " pos"]


def prepare(
    model: LensModel,
    prompt: Any,
    attention_mask: Int[Tensor, "batch pos"] | Int[Tensor, " pos"] | None = None,
    *,
    prepend_bos: bool = True,
) -> Batch:
    """Text, messages or token ids as the batch that will run: checked, on the model's device, BOS prepended to text.

    Args:
        prompt: a text or several; token ids `[pos]` or `[batch, pos]`; a mapping with `input_ids` and perhaps
            `attention_mask`, as a tokenizer returns it; a list of messages, or several, where the tokenizer has a template.
        attention_mask: with token ids only.
        prepend_bos: of text. Ids and messages are taken as they are.

    Raises:
        ValueError, TypeError: empty, too long for the context, ids out of range, wrong dtype or shape, a mask of another
            shape, with other values than 0 and 1 or with a row of pads only; a model that cannot run.
    """
    check_kind(model)
    if not isinstance(prompt, Tensor) and attention_mask is not None:
        raise ValueError("attention_mask goes with token ids; text makes its own mask, and what a tokenizer returns has one")
    if isinstance(prompt, Tensor):
        tokens = prompt
    elif isinstance(prompt, Mapping):
        tokens, attention_mask, _ = as_batch(prompt, "the prompt")
    elif _is_text(prompt):
        texts = prompt if isinstance(prompt, str) else list(prompt)
        tokens, attention_mask, _ = tokenize(tokenizer_of(model), texts, prepend_bos=prepend_bos)
    elif is_conversation(prompt) or (isinstance(prompt, (list, tuple)) and all(is_conversation(p) for p in prompt)):
        several = [prompt] if is_conversation(prompt) else prompt
        rows = [chat_ids(tokenizer_of(model), messages) for messages in several]
        tokens, attention_mask, _ = padded(tokenizer_of(model), rows)
    else:
        raise TypeError(
            "expected text, a list of texts, a LongTensor [batch, pos], what a tokenizer returns, or a list of messages, "
            f"got {type(prompt).__name__}"
        )
    tokens = check_tokens(tokens, int(model.cfg.d_vocab), getattr(model.cfg, "n_ctx", None)).to(device_of(model))
    return Batch(tokens, None if attention_mask is None else check_mask(attention_mask, tokens))


def prepared(model: LensModel, batch: Batch) -> Batch:
    """A batch as it will run: `prepare`, with the states that it may bring along."""
    ids, mask, _ = prepare(model, batch.tokens, batch.attention_mask)
    return batch.with_ids(ids, mask)


def bos_before(model: LensModel, prompt: Any, prepend_bos: bool = True) -> str | None:
    """The text of the BOS that `prepare` puts before a prompt; None before ids and messages, and where there is none."""
    return bos_text(getattr(model, "tokenizer", None), prepend_bos) if _is_text(prompt) else None


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) or (isinstance(prompt, (list, tuple)) and all(isinstance(p, str) for p in prompt))


def forward(model: LensModel, batch: Batch, return_type: str | None = "logits", **kwargs: Any) -> Any:
    """One plain forward pass. The mask is always passed where there is one, since a bridge does not infer it."""
    tokens, mask, _ = batch
    with lock_of(model):
        if mask is None:
            return model(tokens, return_type=return_type, **kwargs)  # type: ignore[operator]
        if has_left_pads(mask):
            way = padding_of(model)
            if way == "rows":
                return _row_by_row(model, batch, return_type)
            if way == "positions":
                kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return model(tokens, return_type=return_type, attention_mask=mask, **kwargs)  # type: ignore[operator]


# --- pads on the left

# How a model takes left-padded rows; found once per model.
_PADDING: WeakKeyDictionary[Any, Literal["mask", "positions", "rows"]] = WeakKeyDictionary()


def has_left_pads(mask: Int[Tensor, "batch pos"]) -> bool:
    """Whether a pad comes before a real token in some row."""
    return bool((mask[:, :-1] < mask[:, 1:]).any())


def padding_of(model: LensModel) -> Literal["mask", "positions", "rows"]:
    """What makes a left-padded batch right: the mask alone, the mask with explicit positions, or a pass per row.

    Tried once on two rows of seven tokens: some models do not derive positions from the mask (OpenAI GPT), and recurrent
    ones read pads as text (RWKV). Hooks of others do not see these passes.
    """
    if model not in _PADDING:
        ids = probe_tokens(model, 2, 7)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        extra: dict[str, Any] = {"mask": {}, "positions": {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}}
        with torch.no_grad(), without_hooks(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = model(ids[:1, 3:], return_type="logits")[0], model(ids[1:], return_type="logits")[0]  # type: ignore[operator]
            for way in ("mask", "positions"):
                try:
                    got = model(ids, return_type="logits", attention_mask=mask, **extra[way])  # type: ignore[operator]
                except Exception:  # whatever a model does with an argument that it does not know
                    continue
                # Inside `Readout.without_logits` each pass has logits of its last position only.
                if all(near(row[-len(logits) :], logits) for row, logits in zip(got, alone, strict=True)):
                    _PADDING[model] = way
                    break
            else:
                _PADDING[model] = "rows"
    return _PADDING[model]


def _row_by_row(model: LensModel, batch: Batch, return_type: str | None) -> Tensor:
    """Logits of left-padded rows, each run alone without its pads; pads get zeros."""
    tokens, mask, _ = batch
    assert mask is not None
    if hooked(model) or return_type != "logits":
        raise RuntimeError(
            f"{name_of(model)!r} reads pads on the left as text, or overflows beside them, so padded rows run one by one, which hooks and return_type="
            f"{return_type!r} do not allow: pass one prompt at a time, or prompts of the same length"
        )
    rows = [model(ids[real][None], return_type=return_type)[0] for ids, real in zip(tokens, mask.bool(), strict=True)]  # type: ignore[operator]
    logits = rows[0].new_zeros(*tokens.shape, rows[0].shape[-1])
    for i, row in enumerate(rows):
        logits[i, mask[i].bool()] = row
    return logits


# --- trying a model out


def probe_tokens(model: LensModel, rows: int, n: int) -> Int[Tensor, "rows n"]:
    """A few different ids `[rows, n]` to try a model out on, the first row from BOS on."""
    first = getattr(getattr(model, "tokenizer", None), "bos_token_id", None) or 0
    ids = torch.arange(rows * n, device=device_of(model)) * 7 + first
    return (ids % int(model.cfg.d_vocab)).reshape(rows, n)


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two ways to the same logits agree: their root mean square difference is rounding beside the spread.

    Rounding is 1e-6 of the spread in fp32, 0.02 in bf16; what reads other tokens or positions is off by the order of the
    spread, and a cached state that was rounded (Zamba 2) by 1e-3.
    """
    half = a.dtype in (torch.float16, torch.bfloat16)
    share = 0.1 if half else 1e-4 if torch.get_float32_matmul_precision() == "highest" else 0.01
    difference = (a.float() - b.float()).square().mean().sqrt()
    return bool(difference <= share * b.float().std() + 1e-6)


@contextmanager
def without_hooks(model: LensModel) -> Iterator[None]:
    """In the block nobody's hooks on the model's hook points fire, but those that TransformerLens put there itself.

    Other threads wait: they would run without their hooks.
    """
    with lock_of(model):
        points = [(point, point._forward_hooks) for point in _points(model) if point._forward_hooks]
        try:
            for point, hooks in points:
                kept = {handle.hook.id for handle in point.fwd_hooks if _is_own(handle)}
                point._forward_hooks = type(hooks)((key, hook) for key, hook in hooks.items() if key in kept)
            yield
        finally:
            for point, hooks in points:
                point._forward_hooks = hooks


def hooked(model: LensModel) -> bool:
    """Whether somebody's hooks are on the model already (bridges put some of their own on, OPT's for one)."""
    return not all(_is_own(handle) for point in _points(model) for handle in getattr(point, "fwd_hooks", []))


def _points(model: LensModel) -> list[Any]:
    return list({id(point): point for point in model.hook_dict.values()}.values())


def _is_own(handle: Any) -> bool:
    module = str(getattr(getattr(handle, "user_hook", None), "__module__", ""))
    return module.startswith("transformer_lens")
