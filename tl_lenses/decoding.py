"""One forward pass at a time, with a key-value cache that rows of a batch can share.

Caches differ between versions of TransformerLens and transformers. They are told apart by the signature of `forward` and
by what they do on a few tokens, never by class.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_lenses.model import LensModel, device_of, forward, has_left_pads, lock_of, near, probe_tokens, without_hooks
from tl_lenses.tokens import Batch


@dataclass(frozen=True)
class Abilities:
    """What a model's key-value cache can do: `steps` continues a prompt, `padded` one with pads on the left, `drops` loses rows."""

    steps: bool
    padded: bool
    drops: bool


# Found once per model, see `abilities_of`.
_ABILITIES: WeakKeyDictionary[Any, Abilities] = WeakKeyDictionary()


class Readout(Protocol):
    """What a decoder asks of `unembed.Readout`."""

    def without_logits(self, into: list[Tensor], *, rows: int | None) -> contextlib.AbstractContextManager[None]:
        """Store the unembedding's input of passes made inside the block."""
        ...

    def logits(self, hidden: Float[Tensor, "n width"]) -> Float[Tensor, "n d_vocab"]:
        """What the unembedding gives of it."""
        ...


class Decoder:
    """Decoding one forward pass at a time, with or without a key-value cache that rows of a batch can share.

    `logits = decoder.start(batch)` runs the prompt; `logits = decoder.step(next_tokens)` adds one column. Both return the
    logits `[batch, d_vocab]` of the last column. `feed` adds several columns and returns the logits of each, or of the last
    ones only. `repeated(n)` continues n copies of a single row, `select(rows)` some of the rows, `cut(row, n)` the first n
    columns of one row.

    A model whose cache does not give what a whole pass gives runs whole sequences, with one warning. With a readout (of
    `unembed.faster_readout`) logits of few rows take less time.
    """

    def __init__(self, model: LensModel, *, use_cache: bool = True, readout: Readout | None = None):
        self.model = model
        self.batch: Batch | None = None
        self.cache: Any = None
        # HookedTransformer takes `past_kv_cache`; a bridge swallows that name in **kwargs and runs uncached, so the
        # signature decides.
        self.takes_own_cache = "past_kv_cache" in _parameters(type(model).forward)  # type: ignore[attr-defined]
        self.abilities = abilities_of(model) if use_cache else Abilities(False, False, False)
        self.use_cache = use_cache and self.abilities.steps
        if use_cache and not self.use_cache:
            _warn_uncached(model, "does not give what a whole pass gives")
        self.handed = None if not self.use_cache or self.takes_own_cache else _Handed.of(model)
        self.readout = readout

    def start(self, batch: Batch) -> Float[Tensor, "batch d_vocab"]:
        """Run a prompt, padded or not."""
        self.batch = batch
        mask = batch.attention_mask
        if self.use_cache and not self.abilities.padded and mask is not None and has_left_pads(mask):
            self.use_cache = False
            _warn_uncached(self.model, "is wrong for rows with pads on the left")
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
        count = lambda block: n if isinstance(n, int) else 1 if block is None else n[block]
        expand = lambda x, block: x.expand(count(block), *x.shape[1:])
        return self._copy(self.batch.tokens.expand(count(None), -1), expand)

    def _copy(self, tokens: Int[Tensor, "batch pos"], reshape: Callable[[Tensor, int | None], Tensor]) -> "Decoder":
        """A decoder after other columns, its cache reshaped; this one stays as it is."""
        other = copy.copy(self)
        other.batch = Batch(tokens, None)
        other.cache = None if self.cache is None else _shaped(self.cache, self.takes_own_cache, reshape)
        return other

    def spread(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows. Blocks that never ran a row use row 0 (the unpatched one) for it."""
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

        It continues as if that row had run alone: no column depends on later ones.
        """
        assert self.batch is not None and self.batch.attention_mask is None
        if not self.shareable():
            return None
        kinds = {type(layer).__name__ for layer in getattr(self.cache, "layers", [])}
        if not self.takes_own_cache and kinds != {"DynamicLayer"}:
            return None  # a sliding window may have dropped what belongs to the first n
        axis = 1 if self.takes_own_cache else -2
        first = lambda x, block: x[row : row + 1].narrow(axis if block is not None else 1, 0, n)
        return self._copy(self.batch.tokens[row : row + 1, :n], first)

    def of_rows(self, rows: Int[Tensor, " taken"]) -> "Decoder":
        """A decoder of these rows, some of them several times; this one stays. Whole sequences follow where the cache cannot be shared."""
        assert self.batch is not None and self.batch.attention_mask is None
        if self.shareable():
            return self._copy(self.batch.tokens[rows], lambda x, _: x[rows.to(x.device)])
        other = copy.copy(self)
        other.batch, other.use_cache, other.cache = Batch(self.batch.tokens[rows], None), False, None
        return other

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows only; whole sequences follow where the cache cannot lose any."""
        assert self.batch is not None
        tokens, mask, _ = self.batch
        self.batch = Batch(tokens[rows], None if mask is None else mask[rows])
        if self.cache is None:
            return
        if self.takes_own_cache:
            self.cache = _shaped(self.cache, True, lambda x, _: x[rows])
        elif self.abilities.drops:
            # Every kind of layer has this one; `batch_select_indices` leaves the state of hybrid layers as it is.
            self.cache.reorder_cache(rows)
        else:
            self.use_cache, self.cache = False, None
            _warn_uncached(self.model, "cannot lose rows that have finished")

    def _run(self, tokens: Int[Tensor, "batch new"], last: int | None = None) -> Float[Tensor, "rows returned d_vocab"]:
        """A pass; its logits are the model's own, or made of its unembedding's input by the readout."""
        hidden: list[Tensor] = []
        assert self.batch is not None
        # A padded batch may run row by row, a pass each; a gradient goes through the model's own unembedding.
        if last == 0 or self.readout is None or self.batch.attention_mask is not None or torch.is_grad_enabled():
            return self._passed(tokens, last)
        with self.readout.without_logits(hidden, rows=1):
            logits = self._passed(tokens, last)
        return self.readout.logits(hidden[0].flatten(0, 1)).unflatten(0, hidden[0].shape[:2]) if hidden else logits

    def _passed(self, tokens: Int[Tensor, "batch new"], last: int | None) -> Float[Tensor, "rows returned d_vocab"]:
        assert self.batch is not None
        mask = self.batch.attention_mask
        kwargs = {} if last is None or last >= tokens.shape[1] else _fewer_logits(self.model, last)
        if self.use_cache and not self.takes_own_cache:
            return self._run_with_cache(tokens, mask, kwargs)
        if self.use_cache:
            # The cache keeps the mask of earlier columns itself and refuses to guess one without a tokenizer.
            new = torch.ones_like(tokens) if mask is None else mask[:, -tokens.shape[1] :]
            logits = self.model(tokens, attention_mask=new, past_kv_cache=self.cache, **kwargs)  # type: ignore[operator]
        else:
            logits = forward(self.model, Batch(tokens, mask), kwargs.pop("return_type", "logits"), **kwargs)
        return tokens.new_empty(len(tokens), 0, 0, dtype=torch.float32) if logits is None else logits

    def _run_with_cache(
        self, tokens: Int[Tensor, "batch new"], mask: Int[Tensor, "batch pos"] | None, kwargs: dict[str, Any]
    ) -> Float[Tensor, "rows returned d_vocab"]:
        """A pass of a bridge with the cache of the model that it wraps."""
        assert self.batch is not None and self.handed is not None
        if mask is not None:
            # With a cache a bridge numbers columns from the cache's length, pads included: say the real positions.
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
            kwargs |= {"attention_mask": mask, "position_ids": positions}
        if self.cache is not None:
            kwargs[self.handed.name] = self.cache
        with self.handed.over() as returned:
            logits = self.model(tokens, return_type="logits", use_cache=True, **kwargs)  # type: ignore[operator]
        self.cache = returned[-1] if returned else None
        if not _filled(self.cache, self.batch.tokens.shape[1]):
            if len(self.batch.tokens[0]) > tokens.shape[1]:
                raise RuntimeError("the key-value cache lost columns between two passes: pass use_cache=False")
            self.use_cache, self.cache = False, None  # what follows runs whole sequences
            _warn_uncached(self.model, "stays empty")
        return logits


# --- what a cache is worth


def abilities_of(model: LensModel) -> Abilities:
    """What the model's key-value cache can do; tried once on two rows of six tokens.

    Told by behaviour: a step with the cache must give the logits of a whole pass, alone, with pads on the left, and after
    a row has left. Hooks of others do not see these passes. A `HookedTransformer` has a cache of its own, which is taken at
    its word.
    """
    with lock_of(model):  # while it is tried, other threads wait
        if model not in _ABILITIES:
            if "past_kv_cache" in _parameters(type(model).forward):  # type: ignore[attr-defined]
                _ABILITIES[model] = Abilities(True, True, True)
            elif _Handed.of(model) is None:
                _ABILITIES[model] = Abilities(False, False, False)
            else:
                _ABILITIES[model] = Abilities(True, True, True)  # while it is tried
                with torch.no_grad(), without_hooks(model), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tried = _tried(model)
                _ABILITIES[model] = tried
        return _ABILITIES[model]


def _tried(model: LensModel) -> Abilities:
    ids = probe_tokens(model, 2, 6)
    whole = forward(model, Batch(ids, None))
    steps = padded = drops = False
    # Whatever a model does with a cache that it was not made for, it is not used then.
    with contextlib.suppress(Exception):
        decoder = Decoder(model)
        first, then = decoder.start(Batch(ids[:, :4], None)), decoder.step(ids[:, 4])
        steps = decoder.use_cache and near(first, whole[:, 3]) and near(then, whole[:, 4])
        if steps:
            decoder.select(torch.tensor([1], device=ids.device))
            drops = near(decoder.step(ids[1:, 5]), whole[1:, 5])
    with contextlib.suppress(Exception):
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        alone = forward(model, Batch(ids[:1, 2:], None))
        decoder = Decoder(model)
        first, then = decoder.start(Batch(ids[:, :5], mask[:, :5])), decoder.step(ids[:, 5])
        rows = [(first[0], alone[0, 2]), (then[0], alone[0, 3]), (first[1], whole[1, 4]), (then[1], whole[1, 5])]
        padded = steps and decoder.use_cache and all(near(got, expected) for got, expected in rows)
    return Abilities(steps, padded, drops)


def _filled(cache: Any, n: int) -> bool:
    """Whether a cache holds n columns; one that cannot count them (state space) holds something at least."""
    if cache is None:
        return False
    try:
        return int(cache.get_seq_length()) == n
    except (AttributeError, ValueError, TypeError, NotImplementedError):
        return not hasattr(cache, "__len__") or len(cache) > 0


_WARNED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def _warn_uncached(model: LensModel, why: str) -> None:
    """Say it once per model."""
    told = _WARNED.setdefault(model, set())
    if why not in told:
        told.add(why)
        warnings.warn(f"the key-value cache of this model {why}: whole sequences run at every step, right but slow", stacklevel=5)


# --- handing a cache over


@dataclass(frozen=True)
class _Handed:
    """How a bridge's cache goes in and out: its name, the model that takes it, and attentions that know an older name.

    From transformers 5.24 on a block hands its attention `cache=`, while a bridge's attention (TransformerLens 4.3) reads
    `past_key_values` from its keywords: it gets the same object under both names. The module that it wraps gets one name
    again, since transformers warns where it sees two.
    """

    name: str
    wrapped: nn.Module
    attentions: tuple[Any, ...] = ()

    @classmethod
    def of(cls, model: LensModel) -> "_Handed | None":
        """None where the model takes no cache."""
        wrapped = getattr(model, "original_model", None)
        if not isinstance(wrapped, nn.Module):
            return None
        taken = _parameters(type(wrapped).forward)
        name = next((name for name in ("cache", "past_key_values", "cache_params") if name in taken), None)
        if name is None:
            return None
        modules = model.modules() if name == "cache" else ()  # type: ignore[attr-defined]
        return cls(name, wrapped, tuple(module for module in modules if hasattr(module, "_update_kv_cache")))

    @contextlib.contextmanager
    def over(self) -> Iterator[list[Any]]:
        """While one pass runs: a list that receives the cache that the wrapped model returns."""
        returned: list[Any] = []
        take = lambda module, args, output: returned.append(getattr(output, self.name, None))
        handles = [self.wrapped.register_forward_hook(take)]
        try:
            for attention in self.attentions:
                handles.append(attention.register_forward_pre_hook(_add_old_name, with_kwargs=True))
                inner = getattr(attention, "original_component", None)
                if inner is not None:
                    handles.append(inner.register_forward_pre_hook(_drop_old_name, with_kwargs=True))
            yield returned
        finally:
            for handle in handles:
                handle.remove()


def _add_old_name(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return (args, kwargs | {"past_key_values": kwargs["cache"]}) if kwargs.get("cache") is not None else None


def _drop_old_name(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if "cache" not in kwargs or "past_key_values" not in kwargs:
        return None
    return args, {key: value for key, value in kwargs.items() if key != "past_key_values"}


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


def _shaped(cache: Any, hooked: bool, reshape: Callable[[Tensor, int | None], Tensor]) -> Any:
    """A cache whose keys and values by block are other views of this one's, which stays as it is: caches grow by concatenation.

    The mask that HookedTransformer's keeps belongs to no block (None).
    """
    other = copy.copy(cache)
    if not hooked:
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
