"""What a lens says anyway: mean and spread of every token's log-probability over a text, by lens and layer, to read a trajectory against."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import one_of
from tl_lenses.decode import batches_to_read, decode, read_run
from tl_lenses.layers import LayerOrSite
from tl_lenses.lens import Lens, common_layers, decoders_of, named_lenses
from tl_lenses.model import LensModel, check_model, n_layers
from tl_lenses.text.batches import Text

Kind = Literal["z", "marginal"]


@dataclass(frozen=True, repr=False)
class Marginals:
    """Of every lens, layer and token v over a text: mean and standard deviation of `log q(v)`, and log of the mean of `q(v)`.

    Attributes:
        mean, sd, log_marginal: `[d_vocab]` by name of the lens ("" for one by itself) and layer, nats.
        n: positions.
        kind: what `score` gives, "z" or "marginal"; `by` makes the other.
    """

    mean: Mapping[tuple[str, int | str], Float[Tensor, " d_vocab"]]
    sd: Mapping[tuple[str, int | str], Float[Tensor, " d_vocab"]]
    log_marginal: Mapping[tuple[str, int | str], Float[Tensor, " d_vocab"]]
    n: int
    kind: Kind = "z"

    def by(self, kind: Kind) -> "Marginals":
        """The same numbers with another score: "z", or "marginal", log-probabilities minus the marginal's."""
        return replace(self, kind=one_of("kind", kind, ("z", "marginal")))

    def score(self, name: str, layer: int | str, logp: Float[Tensor, "*pos d_vocab"]) -> Float[Tensor, "*pos d_vocab"]:
        """`(log q - mean) / sd`, or `log q - log mean q`; -inf for a token whose probability never changes, or is always 0.

        Raises:
            ValueError: a lens or a layer that was not gathered.
        """
        if (name, layer) not in self.mean:
            there = sorted({f"{n!r} at {at}" if n else str(at) for n, at in self.mean})
            raise ValueError(
                f"these marginals have no lens {name!r} at layer {layer}: they have {', '.join(there)}. Gather them with tll.marginals(model, lens, text)"
            )
        of = lambda values: values[name, layer].to(logp)
        if self.kind == "marginal":
            return (logp - of(self.log_marginal)).nan_to_num(-torch.inf, neginf=-torch.inf)
        sd = of(self.sd)
        return torch.where(sd > 0, (logp - of(self.mean)) / sd, -torch.inf)

    def __repr__(self) -> str:
        layers = len({layer for _, layer in self.mean})
        names = ", ".join(dict.fromkeys(repr(name) for name, _ in self.mean if name))
        return f"Marginals({names + ', ' if names else ''}{layers} layers, {self.n} positions, {self.kind!r})"


@torch.no_grad()
def marginals(
    model: LensModel,
    lens: Lens | Mapping[str, Lens],
    tokens: Any,
    *,
    layers: Iterable[LayerOrSite] | None = None,
    skip_first: bool = True,
    show_progress: bool | None = None,
) -> Marginals:
    """What a lens says on average, by layer and token: early layers mostly say frequent tokens, and `trajectory(..., calibrated=)` takes this away.

    Args:
        lens: a `Lens`, or `{name: Lens}`, as the trajectory will take it.
        tokens: a text, as `evaluate` takes it.
        layers: all that the lenses have but the last, which is the model itself, by default.
        skip_first: leave out real position 0 of each row.

    Raises:
        ValueError: fewer than two positions; what `evaluate` refuses.

    Source: 2510.18871 for frequent tokens in early layers; Church and Hanks 1990 for `log q - log mean q`, pointwise mutual information.

    Example:
        >>> usual = tll.marginals(model, lens, text)                                # doctest: +SKIP
        >>> print(tll.trajectory(model, lens, "The capital of Japan is", calibrated=usual))      # doctest: +SKIP
    """
    check_model(model, what="marginals")
    lenses, depth = named_lenses(model, lens), n_layers(model)
    rows = common_layers(lenses, layers, depth)
    rows = [row for row in rows if row != depth] if layers is None else rows
    decoders, readout = decoders_of(lenses, rows), next(iter(lenses.values())).readout
    sums: dict[tuple[str, int | str], Float[Tensor, "3 d_vocab"]] = {}
    n = 0
    for batch, used in batches_to_read(model, Text.of(tokens), skip_first, "marginals", show_progress):
        n += int(used.sum())
        for chunk in decode(read_run(model, batch, rows, (), used), decoders, readout):
            for i, by_name in chunk.logits.items():
                for name, logits in by_name.items():
                    logp, p = chunk.distribution(logits)
                    parts = torch.stack([logp.sum(0), logp.square().sum(0), p.sum(0)]).double()
                    sums[name, rows[i]] = parts + sums.get((name, rows[i]), 0.0)
    if n < 2:
        raise ValueError(f"a spread is over positions of the text, and there are {n}: give two at least")
    mean, sd, marginal = {}, {}, {}
    for key, total in sums.items():
        first, second, q = total / n
        mean[key], sd[key] = first.float(), (second - first.square()).clamp_min(0).sqrt().nan_to_num(0.0).float()
        marginal[key] = q.log().float()
    return Marginals(mean, sd, marginal, n)
