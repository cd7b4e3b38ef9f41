"""What a patchscope found: one cell per source and pair (l, l*)."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.token_text import token_text

# A layer or site, or several at once.
Layers = int | str | tuple[int | str, ...]
Pair = tuple[Layers | None, Layers]


class TopK(NamedTuple):
    """Likeliest next tokens at the read position, best first: ids and probabilities `[source, pair, k]`, and the
    tokens as text."""

    ids: Int[Tensor, "source pair k"]
    probs: Float[Tensor, "source pair k"]
    tokens: list[list[list[str]]]


@dataclass(frozen=True)
class PatchscopeResult:
    """What the target prompt says with each source vector patched in.

    Attributes:
        sources: a label per source.
        pairs: `(l, l*)`: source layer (None for vectors without one) and target layer.
        vocab: the text of every id in `top_ids`.
        text: `text[source][pair]`, the generated continuation; None without generation.
        tokens: generated ids `[source, pair, new]`, None without generation.
        scales: the factors of a sweep of scales: source row `n * len(scales) + i` has the i-th of them. None without.
        plan: what was shared between the cells, and why nothing was where nothing was.
        settings: mode, seed, decoding, target prompt and the like.
    """

    sources: list[str]
    pairs: list[Pair]
    top_ids: Int[Tensor, "source pair k"]
    top_probs: Float[Tensor, "source pair k"]
    vocab: dict[int, str] = field(repr=False)
    kept: Float[Tensor, "source pair d_vocab"] | None = field(default=None, repr=False)
    text: list[list[str]] | None = None
    tokens: Int[Tensor, "source pair new"] | None = field(default=None, repr=False)
    scales: list[float] | None = None
    plan: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = field(default=None, repr=False, compare=False)

    def _names(self, ids: Tensor) -> dict[int, str]:
        wanted = [int(i) for i in ids.unique()]
        new = [i for i in wanted if i not in self.vocab]
        more = {i: f"<{i}>" for i in new} if self.tokenizer is None else token_text(self.tokenizer, new)
        return {i: self.vocab.get(i) or more[i] for i in wanted}

    @property
    def logits(self) -> Float[Tensor, "source pair d_vocab"]:
        """Logits at the read position.

        Raises:
            ValueError: they were too large to keep; `keep="logits"` keeps them all the same.
        """
        if self.kept is None:
            raise ValueError(
                "the logits of this sweep were not kept (keep='auto' keeps up to 256 MB): use top_k, or patchscope(..., keep='logits')"
            )
        return self.kept

    def top_k(self, k: int = 5) -> TopK:
        """The k likeliest next tokens of every cell."""
        if self.kept is not None:
            top = self.kept.float().softmax(-1).topk(min(k, self.kept.shape[-1]), dim=-1)
            ids, probs = top.indices, top.values
        elif k <= self.top_ids.shape[-1]:
            ids, probs = self.top_ids[..., :k], self.top_probs[..., :k]
        else:
            raise ValueError(
                f"only the top {self.top_ids.shape[-1]} tokens were kept: ask for fewer, or patchscope(..., keep='logits')"
            )
        names = self._names(ids)
        return TopK(ids, probs, [[[names[int(i)] for i in cell] for cell in row] for row in ids])

    def probability(self, token: int | str) -> Float[Tensor, "source pair"]:
        """Probability of a token (an id, or a text of one token) in every cell (needs the logits)."""
        return self.logits.float().softmax(-1)[..., self._id(token)]

    def rank(self, token: int | str) -> Int[Tensor, "source pair"]:
        """Rank of a token in every cell: 1 is the likeliest, ties count strictly larger logits (needs the logits)."""
        logits = self.logits
        return (logits > logits[..., self._id(token), None]).sum(-1) + 1

    def _id(self, token: int | str) -> int:
        if isinstance(token, int):
            if not 0 <= token < self.logits.shape[-1]:
                raise ValueError(f"expected a token id 0..{self.logits.shape[-1] - 1}, got {token}")
            return token
        if self.tokenizer is None:
            raise ValueError("the target model has no tokenizer: give a token id")
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            pieces = [self.tokenizer.decode([i]) for i in ids]
            raise ValueError(f"{token!r} is {len(ids)} tokens ({pieces}), expected one: mind the leading space")
        return ids[0]

    def to_frame(self) -> Any:
        """A pandas data frame, one row per source and pair: source, layer, target_layer, token, prob, text."""
        import pandas

        top = self.top_k(1)
        return pandas.DataFrame(
            {
                "source": source, "layer": layer, "target_layer": target_layer, "token": top.tokens[s][p][0],
                "prob": float(top.probs[s, p, 0]), "text": None if self.text is None else self.text[s][p],
            }
            for s, source in enumerate(self.sources) for p, (layer, target_layer) in enumerate(self.pairs)
        )  # fmt: skip

    def __str__(self) -> str:
        from tl_lenses import views

        return views.to_text(views.patchscope_table(self))

    def __rich__(self) -> Any:
        from tl_lenses import views

        return views.patchscope_table(self)

    def _repr_html_(self) -> str:
        from tl_lenses import views

        return views.patchscope_html(self)

    def figure(self, source: int = 0) -> Any:
        """A plotly heat map over (l, l*) of one source: top token and its probability (extra `plot`)."""
        from tl_lenses import views

        return views.patchscope_figure(self, source)


def top_of(logits: Float[Tensor, "*cells d_vocab"], k: int = 10) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the k likeliest tokens."""
    top = logits.float().softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return top.indices.cpu(), top.values.cpu()
