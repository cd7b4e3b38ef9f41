"""Published methods as plain hooks, for `tll.run`, `tll.generate` or TransformerLens.

They are the rows of the Patchscopes paper's table of methods (Ghandeharioun et al. 2024, appendix A): a vector of one
run goes into another run, or an edge of its attention is cut. `multihop` returns the arguments of one `patchscope`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_lenses import edits
from tl_lenses.checks import finite_number, plain_text, whole_number
from tl_lenses.hooks import Hook, patch, read, run
from tl_lenses.layers import LayerOrSite
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, n_layers, prepare, tokenizer_of
from tl_lenses.patchscopes.attention import without_edges
from tl_lenses.patchscopes.sources import Source
from tl_lenses.patchscopes.targets import Target
from tl_lenses.sites import Position, at, positions, site
from tl_lenses.tokens import special_id
from tl_lenses.translators import Translators

__all__ = ["activation_patching", "attention_knockout", "causal_tracing", "logit_lens", "multihop", "tuned_lens"]

Tokens = str | Int[Tensor, "batch pos"] | Int[Tensor, " pos"]


def logit_lens(model: LensModel, tokens: Tokens, layer: LayerOrSite, pos: Position = -1) -> list[Hook]:
    """The logit lens as a patch: `h[i, n_layers] <- h[i, l]`, and the model itself reads it out.

    S = T, i* = i, l* = n_layers, f = identity. The logits at `pos` are `tll.Lens(model)[layer](h)`.

    Args:
        tokens: the prompt that the hooks will run on, to find `pos` in.
        layer: l.
        pos: i; None for every position.

    Returns:
        Two hooks: a read at l and a patch of the last residual.

    Raises:
        ValueError: a layer or position that is not there.

    Source: nostalgebraist 2020 (logit lens); Ghandeharioun et al. 2024 (Patchscopes), table 4.

    Example:
        >>> hooks = tll.methods.logit_lens(model, prompt, 6)      # doctest: +SKIP
        >>> tll.run(model, prompt, hooks)[0, -1]                               # doctest: +SKIP
    """
    return _into_last(model, tokens, layer, pos, Lens(model))


def tuned_lens(model: LensModel, tokens: Tokens, translators: Translators, layer: LayerOrSite, pos: Position = -1) -> list[Hook]:
    """The tuned lens as a patch: `h[i, n_layers] <- W_l h[i, l] + b_l`, and the model itself reads it out.

    S = T, i* = i, l* = n_layers, f affine. The maps end *before* the final norm. (The paper's baseline was fitted to the
    normed state and normed again.) With least-squares maps these are the linear shortcuts of Yom Din et al. 2023.

    Args:
        tokens: the prompt that the hooks will run on, to find `pos` in.
        translators: the maps, of `fit_tuned`, `fit_regression` or another fitter.
        layer: l.
        pos: i; None for every position.

    Returns:
        Two hooks: a read at l and a patch of the last residual.

    Raises:
        ValueError: a layer or position that is not there, translators of another model.
        KeyError: a layer that was not fitted.

    Source: Belrose et al. 2023 (Tuned Lens), section 3; Ghandeharioun et al. 2024 (Patchscopes), table 4.

    Example:
        >>> hooks = tll.methods.tuned_lens(model, prompt, translators, 6)      # doctest: +SKIP
    """
    return _into_last(model, tokens, layer, pos, Lens(model, translators))


def _into_last(model: LensModel, tokens: Tokens, layer: LayerOrSite, pos: Position, lens: Lens) -> list[Hook]:
    f = lens[layer].translate
    columns, _ = _columns(model, tokens, pos)
    seen: dict[str, Tensor] = {}
    # The patch takes the vectors that the read stored earlier in the same pass.
    return [
        read(site(model, layer), seen, key="h", pos=columns, detach=False),
        patch(site(model, -1), lambda _: f(seen.pop("h")), pos=columns),
    ]


def activation_patching(
    model: LensModel,
    clean: Tokens,
    corrupted: str | Int[Tensor, "batch other"] | Int[Tensor, " other"],
    layers: LayerOrSite | Iterable[LayerOrSite],
    pos: Position = None,
    *,
    corrupted_pos: Position = None,
) -> list[Hook]:
    """Put states of a clean run into a corrupted run: `hbar[i*, l] <- h[i, l]`.

    S = clean, T = corrupted, l* = l, f = identity. Runs the clean prompt once, now.

    Args:
        clean: the prompt that the states come from.
        corrupted: the prompt that the hooks will run on.
        layers: a layer or site, or several that are patched together (heads: "blocks.3.attn.hook_z"). For a sweep,
            call once per layer.
        pos: positions in the clean prompt; None for all of them.
        corrupted_pos: positions in the corrupted prompt, where they are not the same.

    Returns:
        One hook per layer, for the corrupted prompt.

    Raises:
        ValueError: a layer or position that is not there, prompts or positions that do not match.

    Source: Vig et al. 2020 (Causal mediation analysis); Meng et al. 2022 (ROME), section 2; Ghandeharioun et al. 2024
    (Patchscopes), appendix A.

    Example:
        >>> hooks = tll.methods.activation_patching(model, clean, corrupted, 6, "Paris", corrupted_pos="Rome")      # doctest: +SKIP
        >>> tll.run(model, corrupted, hooks)                                                                       # doctest: +SKIP
    """
    where, n_from = _columns(model, clean, pos)
    into, n_into = _columns(model, corrupted, pos if corrupted_pos is None else corrupted_pos)
    if n_from != n_into:
        raise ValueError(
            f"{n_from} positions of the clean prompt and {n_into} of the corrupted one: expected as many; "
            "give pos, and corrupted_pos where the prompts differ"
        )
    names = [site(model, layer) for layer in _several(layers)]
    if not names:
        raise ValueError("an empty list of layers patches nothing")
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        run(model, clean, [read(name, seen, pos=where) for name in names])
    return [patch(name, edits.replace(seen[name]), pos=into) for name in names]


def causal_tracing(
    model: LensModel,
    prompt: Tokens,
    subject: Position,
    layers: LayerOrSite | Iterable[LayerOrSite] = (),
    pos: Position = None,
    *,
    noise: float | None = None,
    seed: int = 0,
) -> list[Hook]:
    """Add noise to the subject's embeddings and restore clean states at a few places: which of them restore the answer?

    `e[subject] <- e[subject] + noise * N(0, 1)`, then `hbar[i, l] <- h[i, l]`: S = the prompt, T = the prompt with
    noise, i* = i, l* = l. The effect is the probability of the answer with `layers`, less that without.

    Args:
        model: the model; its embeddings are read at `hook_embed`, without positions.
        prompt: the prompt that the hooks will run on. Each row of a batch gets its own noise.
        subject: the corrupted positions; a text means all its tokens.
        layers: the layers to restore: none by default (the corrupted baseline), one, or a window of sites such as
            "blocks.3.hook_mlp_out".
        pos: the positions to restore; the subject's last token by default.
        noise: standard deviation, larger than 0; None takes three times that of the model's token embeddings. (The authors take three
            times that of the subjects of their data set.)
        seed: for the noise.

    Returns:
        The noise, then one hook per layer.

    Raises:
        ValueError: a subject, layer or position that is not there, noise that is not positive.

    Source: Meng et al. 2022 (ROME), section 2.1; Ghandeharioun et al. 2024 (Patchscopes), table 4.

    Example:
        >>> hooks = tll.methods.causal_tracing(model, "The capital of Japan is the city of", "Japan", 3)      # doctest: +SKIP
    """
    if noise is None:
        noise = 3 * _embedding_std(model, prompt)
    noise = finite_number("noise", noise, above=0)
    span = at(subject, span=True) if isinstance(subject, str) else subject
    corrupted, _ = _columns(model, prompt, span)
    hooks = [patch(site(model, "hook_embed"), edits.noise(noise, whole_number("seed", seed)), pos=corrupted)]
    restored = _several(layers)
    if not restored:
        return hooks
    last = positions(model, prompt, span)[:, -1] if pos is None else pos
    return hooks + activation_patching(model, prompt, prompt, restored, last)


def _embedding_std(model: LensModel, prompt: Tokens) -> float:
    """Standard deviation of the token embeddings, as `hook_embed` gives them (some models scale them on the way)."""
    tokens = prepare(model, prompt).tokens
    seen: dict[str, Tensor] = {}
    table: Tensor = model.W_E  # type: ignore[attr-defined]
    with torch.no_grad():
        run(model, tokens, [read("hook_embed", seen)])
        return float(table.float().std() * seen["hook_embed"].float().norm() / table[tokens].float().norm())


def attention_knockout(
    model: LensModel, tokens: Tokens, queries: Position, keys: Position, blocks: int | Iterable[int] | None = None
) -> list[Hook]:
    """Cut edges of the attention: in these blocks no query attends to any of the keys.

    `p'[q, k] = p[q, k] [not cut] / sum over k`, which is the softmax of scores with -inf at the cut edges. (The paper's
    table writes it as zero vectors at several layers; the method itself cuts edges.)

    Args:
        tokens: the prompt that the hooks will run on. Generated tokens attend to everything.
        queries: positions whose attention is cut; a text means its last token (`tll.at(text, span=True)` for all). None:
            every one.
        keys: positions that they no longer attend to. Keys after a query are hidden from it anyway.
        blocks: the window: a block, several, or None for all of them. Block `b` reads layer `b`.

    Returns:
        One hook per block, on `blocks.{b}.attn.hook_pattern`.

    Raises:
        ValueError: no edge to cut, a query that would see nothing, a block or position that is not there; when it runs,
            a prompt of another length.

    Source: Geva et al. 2023 (Dissecting recall of factual associations); Ghandeharioun et al. 2024 (Patchscopes), table 4.

    Example:
        >>> hooks = tll.methods.attention_knockout(model, prompt, -1, "Japan", blocks=range(2, 6))      # doctest: +SKIP
    """
    n = prepare(model, tokens).tokens.shape[1]
    q, k = positions(model, tokens, queries).cpu(), positions(model, tokens, keys).cpu()
    cut = torch.zeros(len(q), n, n, dtype=torch.bool)
    cut[torch.arange(len(q))[:, None, None], q[:, :, None], k[:, None, :]] = True
    causal = torch.ones(n, n).tril().bool()
    cut &= causal
    if not cut.any():
        raise ValueError(
            f"no edge to cut: the queries {q.tolist()} come before the keys {k.tolist()}, and see only what precedes them"
        )
    blind = (cut == causal).all(-1).nonzero()
    if len(blind):
        raise ValueError(f"position {int(blind[0, 1])} would see no key at all: leave it one, such as BOS or itself")
    depth = n_layers(model)
    window = range(depth) if blocks is None else list(blocks) if isinstance(blocks, Iterable) else [blocks]
    if not window:
        raise ValueError("an empty list of blocks cuts nothing")
    names = [site(model, f"blocks.{whole_number('a block', b)}.attn.hook_pattern") for b in window]
    return [patch(name, _without(cut)) for name in names]


def _without(cut: Bool[Tensor, "batch query key"]) -> edits.Edit:
    """An edit of a pattern `[batch, head, query, key]`: these edges gone, the rest of each row scaled up to 1."""

    def edit(pattern: Tensor) -> Tensor:
        if pattern.shape[-2:] != cut.shape[-2:] or len(cut) not in (1, len(pattern)):
            raise ValueError(
                f"these edges are of {list(cut.shape)} [batch, query, key], this pass has {list(pattern.shape)}: "
                "make the hooks for the prompt that runs"
            )
        return without_edges(pattern, cut[:, None].to(pattern.device))

    return edit


def multihop(model: LensModel, first: str, second: str, *, masked: bool = False, prepend_bos: bool = True) -> dict[str, Any]:
    """Chain of thought by patching: the answer to the first question is put where the second one needs it.

    The query is `[second][first]`, "The current CEO of" + "the company that created Visual Basic": `first` ends with
    its answer at its last token i, and the token i* before it asks the second question. `hbar[i*, l*] <- h[i, l]`.

    The paper gives two statements and calls them equivalent. They are not, unless attention is masked:

    - whole query (`masked=False`): S = T = `[second][first]`. In the source, `first` attends to `second`. In the target,
      the tokens of `first` still follow i*, and the answer follows them.
    - masked (`masked=True`): no token of S attends to `second`, no token of T to `first`. In S the edges from `first` to
      `second` are cut in every block, at unchanged positions; BOS stays visible. T ends with `second`, and the answer is
      generated there.

    Args:
        first: the inner question, such as "the company that created Visual Basic".
        second: the outer question, such as "The current CEO of".
        masked: which of the two.
        prepend_bos: begin the query with BOS.

    Returns:
        Arguments for `patchscope`: source, target, source_hooks. Choose layers and target_layers.

    Raises:
        ValueError: an empty part, or a tokenizer that joins the end of one part and the start of the other into a token.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 5 and appendix F.

    Example:
        >>> hops = tll.methods.multihop(model, "the company that created Visual Basic", "The current CEO of")      # doctest: +SKIP
        >>> tll.patchscope(model, **hops, layers=range(6, 12), target_layers=range(6), max_new_tokens=20)      # doctest: +SKIP
    """
    first, second = plain_text("first", first).strip(), plain_text("second", second).strip()
    if not first or not second:
        raise ValueError(f"multihop needs two questions, got first={first!r} and second={second!r}")
    whole = prepare(model, f"{second} {first}", prepend_bos=prepend_bos).tokens
    head = prepare(model, second, prepend_bos=prepend_bos).tokens
    n, m = whole.shape[1], head.shape[1]
    if n <= m or not torch.equal(whole[:, :m], head):
        pieces = [[tokenizer_of(model).decode([i]) for i in ids[0].tolist()] for ids in (head, whole)]
        raise ValueError(
            f"the second question's tokens {pieces[0]} are not the query's first ones {pieces[1]}: "
            "word it so that it ends with a token"
        )
    source_hooks = []
    if masked:
        start = int(prepend_bos and whole[0, 0] == special_id(tokenizer_of(model), "bos"))
        source_hooks = attention_knockout(model, whole, slice(m, n), slice(start, m))
    return {
        "source": Source(whole[0], pos=n - 1),
        "target": Target(whole[0, :m] if masked else whole[0], pos=m - 1),
        "source_hooks": source_hooks,
    }


def _several(layers: LayerOrSite | Iterable[LayerOrSite]) -> list[LayerOrSite]:
    return list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]


def _columns(model: LensModel, tokens: Tokens, pos: Position) -> tuple[Any, int]:
    """Columns and their number: a list for one prompt (its hooks then fit any number of copies of it), `[batch, k]` for
    several, None for all."""
    columns = positions(model, tokens, pos)
    return None if pos is None else columns[0].tolist() if len(columns) == 1 else columns, columns.shape[1]
