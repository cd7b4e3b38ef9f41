"""What a patchscope found: one cell per source and pair (l, l*)."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

Pair = tuple[int | str | None, int | str]


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
        text: `text[source][pair]`, the generated continuation; None without generation.
        tokens: generated ids `[source, pair, new]`, None without generation.
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
    settings: dict[str, Any] = field(default_factory=dict)

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
        return TopK(
            ids, probs, [[[self.vocab.get(int(i), f"<{int(i)}>") for i in cell] for cell in row] for row in ids]
        )

    def probability(self, token: int) -> Float[Tensor, "source pair"]:
        """Probability of a token id in every cell (needs the logits)."""
        return self.logits.float().softmax(-1)[..., token]

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
