"""The one primitive: read or replace part of one activation. Hooks are plain `(name, fn)` pairs; lists compose with `+`.

`activation[pos] = edit(activation[pos])`: activation patching, ablation, steering and every patchscope are this hook with
another `edit`. Nothing is written in place: a cached `resid_pre[l]` shares its storage with `resid_post[l-1]`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.checks import finite_number, one_of, whole_number
from tl_lenses.decoding import Decoder
from tl_lenses.effects import check_edits
from tl_lenses.layers import LayerOrSite, as_layer, resolved
from tl_lenses.model import LensModel, Prompt, eos_ids, forward, lock_of, n_layers, prepare
from tl_lenses.sites import check_names, per_row, site
from tl_lenses.unembed import faster_readout

Hook = tuple[Any, Callable[..., Any]]
Edit = Callable[[Tensor], Tensor]
Pos = int | slice | Sequence[int] | Tensor | None

# The running forward pass: (index of its first column, columns of the prompt). `run` and `generate` set it. None means that
# other code runs the model; then every forward pass is a prompt.
_MARK: ContextVar[tuple[int, int] | None] = ContextVar("tl_lenses_mark", default=None)

# Hook points that TransformerLens computes only when asked: suffix -> (flag in cfg, setter).
_GATED = {
    "attn.hook_result": ("use_attn_result", "set_use_attn_result"),
    "hook_attn_in": ("use_attn_in", "set_use_attn_in"),
    "hook_q_input": ("use_split_qkv_input", "set_use_split_qkv_input"),
    "hook_k_input": ("use_split_qkv_input", "set_use_split_qkv_input"),
    "hook_v_input": ("use_split_qkv_input", "set_use_split_qkv_input"),
    "hook_mlp_in": ("use_hook_mlp_in", "set_use_hook_mlp_in"),
}


def _hook_name(site: LayerOrSite) -> str:
    if isinstance(site, str):
        return site
    site = as_layer(site)
    if site < 0:
        raise ValueError(f"layer {site} needs a model to count from: use tll.site(model, {site})")
    return f"blocks.{site}.hook_resid_pre"


def _columns(pos: Pos, n_pos: int, batch: int, name: str) -> Int[Tensor, "batch k"] | None:
    """Positions as `[batch, k]` column indices, or None for all."""
    if pos is None:
        return None
    if name.endswith(("hook_pattern", "hook_attn_scores")):
        raise ValueError(f"pos does not fit {name!r} [batch, head, query, key]: use pos=None and index inside the edit")
    if isinstance(pos, slice):
        index = torch.arange(n_pos)[pos]
        if not len(index):
            raise ValueError(f"{pos} selects nothing at {name!r}, which has {n_pos} positions here")
        return index.expand(batch, -1)
    if isinstance(pos, Tensor):
        index = per_row(pos.expand(batch) if pos.ndim == 0 else pos, batch, f" at {name!r}").cpu()
    else:
        given_positions = [pos] if not hasattr(pos, "__iter__") else list(pos)  # type: ignore[arg-type]
        index = torch.tensor([whole_number("pos", position) for position in given_positions], dtype=torch.long).expand(batch, -1)
    if not index.numel():
        raise ValueError(f"an empty list of positions selects nothing at {name!r}")
    if index.min() < -n_pos or index.max() >= n_pos:
        bad = next(int(i) for i in index.flatten() if not -n_pos <= i < n_pos)
        raise ValueError(
            f"position {bad} is not there: {name!r} has {n_pos} positions in this pass, so -{n_pos}..{n_pos - 1} "
            "(inside model.generate each step is a pass of its own: use tll.generate)"
        )
    index = index % n_pos
    if index.shape[1] > 1 and (index.sort(1).values.diff(dim=1) == 0).any():
        raise ValueError(f"the same position is given twice at {name!r}: {index.tolist()}")
    return index


def _select(x: Tensor, columns: Int[Tensor, "batch k"] | None) -> Tensor:
    return x if columns is None else x[torch.arange(len(columns), device=x.device)[:, None], columns.to(x.device)]


def _spread(x: Tensor, columns: Int[Tensor, "batch k"] | None, new: Tensor) -> Tensor:
    """A copy of x with the selected part replaced."""
    if columns is None:
        return new
    out = x.clone()
    out[torch.arange(len(columns), device=x.device)[:, None], columns.to(x.device)] = new
    return out


def _position_axis(name: str) -> int:
    """1, but for attention patterns `[batch, head, query, key]`, which count queries."""
    return 2 if name.endswith(("hook_pattern", "hook_attn_scores")) else 1


def _prompt_part(x: Tensor, axis: int) -> int:
    """The number of positions of this pass that belong to the prompt."""
    mark = _MARK.get()
    return x.shape[axis] if mark is None else max(min(mark[1] - mark[0], x.shape[axis]), 0)


def _prompt(x: Tensor, axis: int, n: int) -> Tensor:
    """The first n positions; for a pattern the first n keys too, since these queries see no later ones."""
    if n == x.shape[axis]:
        return x
    return x[:, :n] if axis == 1 else x[:, :, :n, :n]


def read(
    site: LayerOrSite,
    into: MutableMapping[Any, Any],
    key: Any = None,
    fn: Callable[[Tensor], Any] | None = None,
    pos: Pos = None,
    *,
    detach: bool = True,
) -> Hook:
    """One hook that stores `fn(activation[pos])` and changes nothing.

    In generation only the prompt's pass is read.

    Args:
        site: hook name, or a layer `0 <= l < n_layers` (`blocks.l.hook_resid_pre`).
        into: mapping that receives `into[key]`; `key` defaults to `site` as given.
        fn: applied inside the hook, so that only its result is kept.
        pos: int, slice, list (the same in each row), LongTensor `[batch]` or `[batch, k]` (per row), or None for all.
            With `pos` the value is `[batch, k, ...]`.
        detach: store without the graph; False keeps gradients: the stored tensor lies on the path to the logits.

    Raises:
        RuntimeError (when it runs, with `detach=False`): a site whose values do not lead to the logits.

    Example:
        >>> seen = {}
        >>> tll.run(model, "Hello", [tll.read(3, seen, pos=-1)])      # doctest: +SKIP
        >>> seen[3].shape                                            # doctest: +SKIP
        torch.Size([1, 1, 768])
    """
    name = _hook_name(site)
    key = site if key is None else key

    def hook_fn(x: Tensor, hook: Any = None) -> Tensor | None:
        axis = _position_axis(name)
        n = _prompt_part(x, axis)
        if n == 0:  # a generated step
            return None
        value: Any = _select(_prompt(x, axis, n), _columns(pos, n, x.shape[0], name))
        if detach:
            value = value.detach()
        value = value if fn is None else fn(value)
        into[key] = value.detach() if detach and isinstance(value, Tensor) else value
        # A bridge shows some sites in another shape than it computes with. It uses the tensor that a hook returns, so that
        # the stored tensor lies on the path to the logits.
        return None if detach else x

    hook_fn.keeps = not detach  # type: ignore[attr-defined]
    return (name, hook_fn)


def patch(site: LayerOrSite, edit: Edit, pos: Pos = None, when: Literal["prompt", "every_step"] = "prompt") -> Hook:
    """One hook that replaces part of an activation: `activation[pos] = edit(activation[pos])`.

    Args:
        site: hook name, or a layer `0 <= l < n_layers` (`blocks.l.hook_resid_pre`); for the final residual
            `tll.site(model, -1)`.
        edit: gets the selected `[batch, k, ...]` (everything for `pos=None`) and returns that shape; see `tll.edits`.
        pos: int, slice, list (the same in each row), LongTensor `[batch]` or `[batch, k]` (per row), or None for all. Counted
            in the prompt's columns as it runs, pads included; `tll.positions` gives them for substrings and padded batches.
        when: "prompt" patches the prompt's forward pass only; "every_step" also edits each generated position, one by one.

    Raises:
        ValueError (when it runs): a position that is not there, an edit that returns another shape.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 3.1.

    Example:
        >>> tll.run(model, "Hello", [tll.patch(3, tll.edits.zero, pos=-1)])      # doctest: +SKIP
    """
    name = _hook_name(site)
    one_of("when", when, ("prompt", "every_step"))
    if not callable(edit):
        raise TypeError(
            f"edit must be a function of the selected activation, got {type(edit).__name__}; for a tensor use tll.edits.replace(tensor)"
        )

    def apply(part: Tensor) -> Tensor:
        new = edit(part)
        if not isinstance(new, Tensor):
            forgot = "did you forget to call the factory, as in edits.scale(2.0)?"
            hint = forgot if callable(new) else "it must return the new value"
            raise ValueError(f"the edit at {name!r} returned {type(new).__name__}: {hint}")
        if new.shape != part.shape:
            raise ValueError(f"the edit at {name!r} returned shape {list(new.shape)}, expected {list(part.shape)}")
        return new.to(part)  # a bridge refuses another dtype, HookedTransformer would spread it

    def hook_fn(x: Tensor, hook: Any = None) -> Tensor | None:
        axis = _position_axis(name)
        n, length = _prompt_part(x, axis), x.shape[axis]
        if n == 0 and when == "prompt":  # a generated step
            return None
        columns = _columns(pos, n, x.shape[0], name) if n else None
        if n == length:
            return _spread(x, columns, apply(_select(x, columns)))
        # The pass holds generated positions: alone (with a cache) or after the prompt (without).
        out = x.clone()
        if n:
            prompt = _prompt(x, axis, n)
            _prompt(out, axis, n).copy_(_spread(prompt, columns, apply(_select(prompt, columns))))
        if when == "every_step":
            for i in range(n, length):
                if axis == 1:
                    out[:, i : i + 1] = apply(x[:, i : i + 1])
                else:  # query i sees the keys up to itself
                    keys = x.shape[-1] - length + i + 1
                    out[:, :, i : i + 1, :keys] = apply(x[:, :, i : i + 1, :keys])
        return out

    hook_fn.edits = True  # type: ignore[attr-defined]
    return (name, hook_fn)


@contextmanager
def installed(model: LensModel, hooks: Iterable[Hook]) -> Iterator[None]:
    """Add hooks to the model, check that each fired, and always remove them.

    Hooks that are already on the model stay and run first. Other threads wait for the model until the block ends.

    Raises:
        ValueError: a hook name that the model does not have.
        RuntimeError: hooks that are switched off, or that never fired.
    """
    with lock_of(model):
        pairs = checked_hooks(model, hooks)
        check_edits(model, pairs)
        setters = [(name, _switched_off(model, name)) for name, _ in pairs]
        off = [f"{name!r} is switched off; call model.{setter}(True)." for name, setter in setters if setter]
        if off:
            raise RuntimeError(f"{len(off)} of {len(pairs)} hooks never fired: {' '.join(off)}")
        if not pairs:
            yield
            return
        fired = [False] * len(pairs)

        def counted(i: int, fn: Callable[..., Any]) -> Callable[..., Any]:
            def hook_fn(x: Tensor, hook: Any) -> Any:
                fired[i] = True
                return fn(x, hook=hook)

            return hook_fn

        with model.hooks(fwd_hooks=[(name, counted(i, fn)) for i, (name, fn) in enumerate(pairs)]):
            yield
        silent = sorted({repr(name) for (name, _), hit in zip(pairs, fired, strict=True) if not hit})
        if silent:
            raise RuntimeError(
                f"{fired.count(False)} of {len(pairs)} hooks never fired: {', '.join(silent)}. The model has the name but did not "
                "pass through it (rotary models have no hook_pos_embed, parallel blocks no hook_resid_mid)."
            )


def checked_hooks(model: LensModel, hooks: Iterable[Hook]) -> list[Hook]:
    """Hooks as pairs of a name and a function, filters of names resolved."""
    if hooks is None or isinstance(hooks, (str, Mapping)) or not hasattr(hooks, "__iter__"):
        raise TypeError(
            f"hooks must be a list of pairs (name, function), got {type(hooks).__name__}: leave it out for none, and put a single "
            "pair in a list"
        )
    pairs: list[Hook] = []
    for hook in hooks:
        if not (isinstance(hook, (tuple, list)) and len(hook) == 2 and callable(hook[1])):
            raise TypeError(
                f"a hook is a pair (name, function), got {hook!r}: tll.read and tll.patch make them, lists of them add with +"
            )
        name, fn = hook
        if callable(name):  # TransformerLens takes a filter of names too
            names = [n for n in model.hook_dict if name(n)]
            if not names:
                raise ValueError("a hook's name filter matches no hook of this model")
            # a bridge has aliases: one name per point
            points: dict[int, str] = {id(model.hook_dict[n]): n for n in reversed(names)}
            pairs += [(n, fn) for n in names if points[id(model.hook_dict[n])] == n and not _switched_off(model, n)]
        else:
            pairs.append((name, fn))
    check_names(model, [name for name, _ in pairs])
    return pairs


def _switched_off(model: LensModel, name: str) -> str | None:
    """The setter that switches a gated hook point on, when it is off."""
    for suffix, (flag, setter) in _GATED.items():
        if name.endswith("." + suffix) and not getattr(model.cfg, flag, True):
            return setter
    return None


@contextmanager
def marked(start: int, prompt: int) -> Iterator[None]:
    """Inside, passes begin at column `start`, and the prompt has `prompt` columns."""
    token = _MARK.set((start, prompt))
    try:
        yield
    finally:
        _MARK.reset(token)


def pass_start() -> int:
    """Index of the running pass's first column; 0 for a prompt, and where other code runs the model."""
    mark = _MARK.get()
    return 0 if mark is None else mark[0]


def run(
    model: LensModel,
    tokens: Prompt,
    hooks: Iterable[Hook] = (),
    return_type: str | None = "logits",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    *,
    prepend_bos: bool = True,
) -> Any:
    """One forward pass with hooks; unknown names and hooks that never fired are errors.

    Differentiable; grad mode is left alone, the hooks are always removed, hooks already on the model stay.

    Args:
        tokens: text (BOS is prepended); token ids, a tokenizer's output or messages, which are never changed (see `prepare`).
        hooks: `(name, fn)` pairs; at one site they run in the order of the list.
        return_type: of TransformerLens: "logits", "loss", "both" or None.
        attention_mask: 0/1 `[batch, pos]` for padded token ids.
        prepend_bos: for text; ids are never changed.

    Returns:
        What the model returns, logits `[batch, pos, d_vocab]` by default.

    Raises:
        ValueError: unknown hook, position that is not there, unusable tokens.
        RuntimeError: a hook that is switched off or never fired.

    Example:
        >>> logits = tll.run(model, "Hello", [tll.patch(3, tll.edits.scale(0.5))])      # doctest: +SKIP
    """
    if return_type is not None:
        one_of("return_type", return_type, ("logits", "loss", "both", "predictions"))
    batch = prepare(model, tokens, attention_mask, prepend_bos=prepend_bos)
    with installed(model, hooks), marked(0, batch.tokens.shape[1]):
        return forward(model, batch, return_type)


def generate(
    model: LensModel,
    tokens: Prompt,
    hooks: Iterable[Hook] = (),
    max_new_tokens: int = 20,
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    use_cache: bool = True,
    prepend_bos: bool = True,
    first_logits: list[Tensor] | None = None,
) -> Int[Tensor, "batch pos_plus_new"]:
    """Continue prompts under hooks, greedily by default. The tokens are the same with and without a key-value cache.

    Args:
        tokens: text (BOS is prepended; several prompts are padded on the left); token ids, a tokenizer's output or messages.
        max_new_tokens: how many tokens to add, at least 1; a row that has met EOS continues with EOS.
        do_sample: draw from `softmax(logits / temperature)`, temperature > 0, with a generator seeded by `seed`.
        stop_at_eos: at the tokenizer's EOS and those of the model's generation settings.
        use_cache: keep keys and values rather than run the whole sequence each step.
        prepend_bos: for text; ids are never changed.
        first_logits: a list that receives the logits `[batch, d_vocab]` after the prompt.

    Returns:
        Prompt and continuation, `[batch, pos + new]` (fewer where every row has met EOS).

    Raises:
        ValueError: as `run`; a continuation longer than the context.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    temperature = finite_number("temperature", temperature, above=0)
    seed = whole_number("seed", seed)
    if first_logits is not None and not isinstance(first_logits, list):
        raise TypeError(f"first_logits must be a list that receives them, got {type(first_logits).__name__}")
    batch = prepare(model, tokens, attention_mask, prepend_bos=prepend_bos)
    n_prompt = batch.tokens.shape[1]
    context = getattr(model.cfg, "n_ctx", None)
    if context and n_prompt + max_new_tokens > context:
        raise ValueError(
            f"{n_prompt} prompt tokens and {max_new_tokens} new ones are more than the context of {context}: shorten one of them"
        )
    ends = torch.tensor(eos_ids(model) if stop_at_eos else [], dtype=torch.long, device=batch.tokens.device)
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(model, use_cache=use_cache, readout=faster_readout(model))
    sequence = batch.tokens
    done = torch.zeros(len(sequence), dtype=torch.bool, device=sequence.device)
    with torch.no_grad(), installed(model, hooks):
        for step in range(max_new_tokens):
            with marked(n_prompt + step - 1 if step and decoder.use_cache else 0, n_prompt):
                logits = decoder.start(batch) if step == 0 else decoder.step(sequence[:, -1])
            if step == 0 and first_logits is not None:
                first_logits.append(logits)
            if do_sample:
                probs = (logits.float() / temperature).softmax(-1).cpu()
                chosen = torch.multinomial(probs, 1, generator=generator)[:, 0].to(sequence)
            else:
                chosen = logits.argmax(-1)
            if len(ends):
                chosen = torch.where(done, ends[0], chosen)
                done = done | torch.isin(chosen, ends)
            sequence = torch.cat([sequence, chosen[:, None]], 1)
            if bool(done.all()):
                break
    return sequence


def residual_reads(model: LensModel, layers: Iterable[LayerOrSite], into: MutableMapping[Any, Any]) -> list[Hook]:
    """Reads of layers `0..n_layers` (negative ones resolved) and sites, under those keys."""
    keys = [resolved(layer, n_layers(model)) for layer in layers]
    return [read(site(model, key), into, key=key) for key in keys]
