"""What the library asks of a model: a Protocol over TransformerLens' portable surface, and nothing about architectures.

`HookedTransformer` (2.16 to 3.9) and `TransformerBridge` (3.9 to 4.x) both satisfy it. Differences between versions
that
cannot be avoided (key-value caches, see `Decoder`) are told apart by the signature of `forward`, never by class.
"""

import copy
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.data import Batch, check_tokens, tokenize


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
    def to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...


def n_layers(model: LensModel) -> int:
    """Number of blocks; layer `n_layers` is the final residual."""
    return int(model.cfg.n_layers)


def d_model(model: LensModel) -> int:
    """Width of the residual stream."""
    return int(model.cfg.d_model)


def name_of(model: LensModel) -> str:
    """The model's name for people; never used to decide anything."""
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def tokenizer_of(model: LensModel) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: the model was loaded without one.
    """
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


def check_model(model: LensModel, *, what: str = "this") -> None:
    """Refuse a model that `what` cannot read: not TransformerLens, in train mode, or with quantised weights.

    Raises:
        TypeError: not a TransformerLens model.
        ValueError: train mode (dropout would make every number random), or an unembedding that is not floating point.
    """
    missing = [m for m in ("cfg", "hook_dict", "run_with_hooks", "hooks", "unembed") if not hasattr(model, m)]
    if missing:
        raise TypeError(
            f"expected a TransformerLens model (HookedTransformer or TransformerBridge), got {type(model).__name__} "
            f"without {', '.join(missing)}; wrap a Hugging Face model with TransformerBridge.boot_transformers"
        )
    if model.training:  # type: ignore[attr-defined]
        raise ValueError(f"the model is in train mode, so {what} would see dropout: call model.eval() first")
    unembedding = getattr(model, "W_U", None)
    if not isinstance(unembedding, Tensor) or not unembedding.is_floating_point():
        got = getattr(unembedding, "dtype", type(unembedding).__name__)
        raise ValueError(
            f"cannot read the unembedding (expected a floating-point W_U, got {got}): load the model without quantised weights"
        )


def prepare(
    model: LensModel,
    prompt: str | list[str] | Tensor,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    *,
    prepend_bos: bool = True,
) -> Batch:
    """Text or token ids as the batch that will run: checked, on the model's device, BOS prepended to text.

    Raises:
        ValueError, TypeError: empty, too long for the context, ids out of range, wrong dtype or shape, a mask of
        another
            shape or with a row of pads only.
    """
    if isinstance(prompt, Tensor):
        tokens = prompt
    elif isinstance(prompt, (str, list, tuple)) and attention_mask is not None:
        raise ValueError("attention_mask goes with token ids; text makes its own mask")
    elif isinstance(prompt, str) or (isinstance(prompt, (list, tuple)) and all(isinstance(p, str) for p in prompt)):
        texts = prompt if isinstance(prompt, str) else list(prompt)
        tokens, attention_mask, _ = tokenize(tokenizer_of(model), texts, prepend_bos=prepend_bos)
    else:
        raise TypeError(f"expected text, a list of texts or a LongTensor [batch, pos], got {type(prompt).__name__}")
    tokens = check_tokens(tokens, int(model.cfg.d_vocab), getattr(model.cfg, "n_ctx", None)).to(device_of(model))
    if attention_mask is not None:
        if attention_mask.ndim == 1:
            attention_mask = attention_mask[None]
        if attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, the tokens {list(tokens.shape)}: they must agree"
            )
        if not attention_mask.bool().any(1).all():
            raise ValueError("attention_mask hides every token of a row: drop that row")
        attention_mask = attention_mask.to(tokens)
    return Batch(tokens, attention_mask)


def forward(model: LensModel, batch: Batch, return_type: str | None = "logits") -> Any:
    """One plain forward pass. The mask is always passed where there is one, since a bridge does not infer it."""
    kwargs = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
    return model(batch.tokens, return_type=return_type, **kwargs)  # type: ignore[operator]


@functools.cache
def _parameters(forward_method: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward_method).parameters)


def _fewer_logits(model: LensModel, last: int) -> dict[str, Any]:
    """What makes a forward pass unembed its last columns only (0: as few as it can); empty where it unembeds all.

    Hugging Face models take `logits_to_keep`, which a bridge hands on (0 would mean all there); HookedTransformer leaves
    the unembedding out with `return_type=None`.
    """
    wrapped = getattr(model, "original_model", None)
    if wrapped is None:
        return {"return_type": None} if last == 0 else {}
    return {"logits_to_keep": max(last, 1)} if "logits_to_keep" in _parameters(type(wrapped).forward) else {}


class Decoder:
    """Decoding one forward pass at a time, with or without a key-value cache that rows of a batch can share.

    `logits = decoder.start(batch)` runs the prompt; `logits = decoder.step(next_tokens)` adds one column. Both
    return the
    logits `[batch, d_vocab]` of the last column. `feed` adds several columns and returns the logits of each, or of the
    last ones only; `repeated(n)` goes on with n copies of a single row, `select(rows)` with some of the rows,
    `cut(row, n)` with the first n columns of one row.
    """

    def __init__(self, model: LensModel, *, use_cache: bool = True):
        self.model, self.use_cache = model, use_cache
        self.batch: Batch | None = None
        self.cache: Any = None
        # HookedTransformer takes `past_kv_cache`; a bridge swallows that name in **kwargs and runs uncached, so the
        # signature decides.
        self.takes_own_cache = "past_kv_cache" in _parameters(type(model).forward)  # type: ignore[attr-defined]

    def start(self, batch: Batch) -> Float[Tensor, "batch d_vocab"]:
        """Run a prompt, padded or not."""
        self.batch = batch
        if self.use_cache and self.takes_own_cache:
            self.cache = _hooked_cache(self.model, batch.tokens.shape[0])
        return self._run(batch.tokens)[:, -1]

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_vocab"]:
        """Add one column."""
        return self.feed(tokens[:, None])[:, -1]

    def feed(self, tokens: Int[Tensor, "batch new"], last: int | None = None) -> Float[Tensor, "rows returned d_vocab"]:
        """Add columns (the first ones too, where there was no `start`) and return the logits of each.

        With `last` only those of as many last columns, and the others are not computed where the model can leave them
        out: hooks at the unembedding then see fewer columns.
        """
        last = tokens.shape[1] if last is None else last
        if self.batch is None:
            self.batch = Batch(tokens, None)
            if self.use_cache and self.takes_own_cache:
                self.cache = _hooked_cache(self.model, tokens.shape[0])
        else:
            seen, mask, _ = self.batch
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            self.batch = Batch(torch.cat([seen, tokens], 1), mask)
            tokens = tokens if self.use_cache else self.batch.tokens
        logits = self._run(tokens, last)
        return logits[:, max(logits.shape[1] - last, 0) :]

    def shareable(self) -> bool:
        """Whether the cache holds the keys and values of every column and nothing else, so that rows can share it."""
        if self.cache is None or self.batch is None:
            return False
        if self.takes_own_cache:
            return True
        # State-space and hybrid models keep states that cannot be repeated, sliding windows drop columns.
        has_methods = all(hasattr(self.cache, name) for name in ("batch_repeat_interleave", "batch_select_indices"))
        kinds = {type(layer).__name__ for layer in getattr(self.cache, "layers", [])}
        return (
            has_methods
            and kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"}
            and self.cache.get_seq_length() == self.batch.tokens.shape[1]
        )

    def repeated(self, n: int | list[int]) -> "Decoder":
        """A decoder of n rows that all continue this one's single row; this one stays as it is.

        A list has a number per block, for a pass that begins with one row and is joined by others: `spread` then makes
        the rows of all blocks equal again.
        """
        assert self.batch is not None and len(self.batch.tokens) == 1 and self.batch.attention_mask is None
        other = Decoder(self.model, use_cache=self.use_cache)
        count = lambda block: n if isinstance(n, int) else 1 if block is None else n[block]
        other.batch = Batch(self.batch.tokens.expand(count(None), -1), None)
        if self.cache is not None:
            expand = lambda x, block: x.expand(count(block), *x.shape[1:])
            other.cache = _shaped(self.cache, self.takes_own_cache, expand)
        return other

    def spread(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows; a block that has not run one of them takes its row 0 for it."""
        assert self.batch is not None and len(self.batch.tokens) == 1

        def take(x: Tensor, block: int | None) -> Tensor:
            if block is None:
                return x.expand(len(rows), *x.shape[1:])
            index = rows.to(x.device)
            return x[torch.where(index < len(x), index, torch.zeros_like(index))]

        self.cache = _shaped(self.cache, self.takes_own_cache, take)
        self.batch = Batch(self.batch.tokens.expand(len(rows), -1), None)

    def cut(self, row: int, n: int) -> "Decoder | None":
        """A decoder of the first n columns of one row, or None where the cache does not allow it.

        It continues as if that row had run alone: no column depends on those behind it.
        """
        assert self.batch is not None and self.batch.attention_mask is None
        if not self.shareable():
            return None
        kinds = {type(layer).__name__ for layer in getattr(self.cache, "layers", [])}
        if not self.takes_own_cache and kinds != {"DynamicLayer"}:
            return None  # a sliding window may have dropped what belongs to the first n
        other = Decoder(self.model)
        other.batch = Batch(self.batch.tokens[row : row + 1, :n], None)
        axis = 1 if self.takes_own_cache else -2
        other.cache = _shaped(
            self.cache,
            self.takes_own_cache,
            lambda x, block: x[row : row + 1].narrow(axis if block is not None else 1, 0, n),
        )
        return other

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows only."""
        assert self.batch is not None
        tokens, mask, _ = self.batch
        self.batch = Batch(tokens[rows], None if mask is None else mask[rows])
        if self.cache is None:
            return
        if not self.takes_own_cache:
            self.cache.batch_select_indices(rows)
            return
        for entry in self.cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]
        self.cache.previous_attention_mask = self.cache.previous_attention_mask[rows]

    def _run(self, tokens: Int[Tensor, "batch new"], last: int | None = None) -> Float[Tensor, "rows returned d_vocab"]:
        assert self.batch is not None
        mask = self.batch.attention_mask
        kwargs: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if last is not None and last < tokens.shape[1]:
            kwargs |= _fewer_logits(self.model, last)
        if not self.use_cache or self.takes_own_cache:
            if self.use_cache:
                # The cache keeps the mask of earlier columns itself and refuses to guess one without a tokenizer.
                new = torch.ones_like(tokens) if mask is None else mask[:, -tokens.shape[1] :]
                kwargs |= {"attention_mask": new, "past_kv_cache": self.cache}
            logits = self.model(tokens, **kwargs)  # type: ignore[operator]
            return tokens.new_empty(len(tokens), 0, 0, dtype=torch.float32) if logits is None else logits
        if mask is not None:
            # With a cache a bridge numbers columns from the cache's length, pads included: say the real positions.
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        logits, self.cache = self.model(  # type: ignore[operator]
            tokens,
            return_type="logits_and_cache",
            use_past_kv_cache=True,
            use_cache=True,
            past_key_values=self.cache,
            **kwargs,
        )
        if not _filled(self.cache, self.batch.tokens.shape[1]):
            if len(self.batch.tokens[0]) > tokens.shape[1]:
                raise RuntimeError("the key-value cache lost columns between two passes: pass use_cache=False")
            self.use_cache, self.cache = False, None  # what follows runs whole sequences
            _warn_unfilled()
        return logits


def _filled(cache: Any, n: int) -> bool:
    """Whether a cache holds n columns; one that cannot be asked is taken at its word.

    transformers 5.24 renamed what its layers are handed, so that many attentions of a bridge (TransformerLens 3.9 to 4.3) never see
    the cache: it stays empty, and every later column would attend to itself alone.
    """
    layers = getattr(cache, "layers", None)
    return not layers or not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) == n


@functools.cache
def _warn_unfilled() -> None:
    """Say it once."""
    import transformers

    warnings.warn(
        f"transformers {transformers.__version__} leaves the key-value cache of a TransformerLens bridge empty: whole sequences run "
        "at every step, right but slow. Install transformers<5.24 to have the cache",
        stacklevel=5,
    )


def _shaped(cache: Any, own: bool, reshape: Callable[[Tensor, int | None], Tensor]) -> Any:
    """A cache whose keys and values by block are other views of this one's, which stays as it is: caches grow by
    concatenation. The mask that HookedTransformer's keeps belongs to no block (None)."""
    other = copy.copy(cache)
    if not own:
        other.layers = [copy.copy(layer) for layer in cache.layers]
        for i, layer in enumerate(other.layers):
            layer.keys, layer.values = reshape(layer.keys, i), reshape(layer.values, i)
        return other
    other.entries = [copy.copy(entry) for entry in cache.entries]
    for i, entry in enumerate(other.entries):
        entry.past_keys, entry.past_values = reshape(entry.past_keys, i), reshape(entry.past_values, i)
    other.previous_attention_mask = reshape(cache.previous_attention_mask, None)
    return other


def _hooked_cache(model: LensModel, batch_size: int) -> Any:
    """An empty HookedTransformer key-value cache; the class moved and was renamed in 3.0."""
    for module, name in (
        ("transformer_lens.cache.key_value_cache", "TransformerLensKeyValueCache"),
        ("transformer_lens.past_key_value_caching", "HookedTransformerKeyValueCache"),
    ):
        try:
            cache_class = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        return cache_class.init_cache(model.cfg, device_of(model), batch_size)
    raise RuntimeError("this TransformerLens has no key-value cache that we know: pass use_cache=False")
