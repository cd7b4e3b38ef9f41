"""Does a lens respond to an intervention as the model does? Stimulus and response, compared in Aitchison's geometry."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import aitchison, edits
from tl_lenses import stats as S
from tl_lenses.experiments.basis import bases_of, check_k
from tl_lenses.experiments.picture import Lines, Picture
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.experiments.states import Texts, check_covered, check_lens, states_of, texts_of, wanted_layers
from tl_lenses.hooks import patch, read, run
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, check_model, d_model
from tl_lenses.progress import progress
from tl_lenses.sites import site

WEIGHTS = ("both", "model")
NUMBERS = ("similarity", "shuffled", "stimulus", "response")


@dataclass(frozen=True)
class Alignment(Report):
    """Per lens and layer, how much alike the lens' and the model's changes are.

    Attributes:
        layers: where the subspace was resampled and the lens read.
        scores: per lens `[layer, 4]`: mean similarity of stimulus and response (a cosine, -1 to 1); the same with the
            response of another position; mean lengths of stimulus and response, nats.
        positions: what the means are over.
    """

    layers: list[int]
    scores: dict[str, Float[Tensor, "layer 4"]]
    positions: int

    name = "alignment"

    def similarity(self, lens: str) -> Float[Tensor, " layer"]:
        """Mean similarity per layer."""
        return self.scores[lens][:, 0]

    def tables(self) -> list[Table]:
        """Similarity and control per lens, then the lengths of both changes."""
        title = f"stimulus-response alignment, {self.model}: {self.positions} positions"
        cut = lambda names: [
            [str(layer), *(float(x[i, NUMBERS.index(name)]) for x in self.scores.values() for name in names)]
            for i, layer in enumerate(self.layers)
        ]
        heads = lambda names: ["layer", *(f"{lens}{name}" for lens in self.scores for name in names)]
        return [
            Table(title, heads(["", ", shuffled"]), cut(NUMBERS[:2]), "cosine; shuffled: another position's response", percent=False),
            Table("length", heads([", stimulus", ", response"]), cut(NUMBERS[2:]), "weighted Aitchison norm, nats", percent=False),
        ]  # fmt: skip

    def pictures(self) -> dict[str, Picture]:
        """Similarity over layers, a line per lens."""
        lines = {
            name: list(zip(map(float, self.layers), self.similarity(name).tolist(), strict=True))
            for name in self.scores
        }
        return {"similarity": Lines(f"stimulus-response alignment, {self.model}", lines, up="Aitchison similarity")}

    def rows(self) -> list[dict[str, Any]]:
        """A row per lens and layer."""
        return [
            {"lens": name, "layer": layer, **dict(zip(NUMBERS, x[i].tolist(), strict=True))}
            for name, x in self.scores.items()
            for i, layer in enumerate(self.layers)
        ]


def alignment(
    model: LensModel,
    lenses: Mapping[str, Lens],
    tokens: Any,
    *,
    k: int = 8,
    layers: Iterable[int] | None = None,
    n: int = 512,
    subspaces: Mapping[str, Mapping[int, Float[Tensor, "k d"]]] | None = None,
    weights: str = "both",
    seed: int = 0,
    skip_first: bool = True,
    show_progress: bool | None = None,
) -> Alignment:
    """Resample the principal subspace of a layer, and compare what changes in the lens with what changes in the model.

        h' = h + P (h_other - h),    stimulus = lens(h') - lens(h),    response = M(h') - M(h)      (Aitchison differences)
        similarity = <stimulus, response>_w / (|stimulus|_w |response|_w),    w = (M(h) + M(h')) / 2

    P projects on the first k causal directions of that lens at that layer, and h_other is the state of another position (a
    derangement of all positions of a batch).

    Args:
        model: whose response is measured.
        lenses: by name; each gets its own subspaces.
        tokens: text, `token_batches(...)` or what `evaluate` takes.
        k: directions of the subspace.
        layers: `0..n_layers-1` by default.
        n: positions; rows are taken until there are so many.
        subspaces: by lens and layer, orthonormal rows `[k, d_model]`, rather than extracted here: `bases[l].vectors` of
            `causal_basis`.
        weights: of tokens: "both" is the mean of the model's two distributions, "model" the one without intervention.
        seed: of the derangement.
        skip_first: leave out each row's first position.

    Raises:
        ValueError: k larger than d_model; a lens of another model; subspaces that are not orthonormal, or not those of the
            layers asked for.

    Source: Belrose et al. 2023 (Tuned Lens), section 4.2; its published code for the weights.

    Example:
        >>> print(alignment(model, {"logit": tll.Lens(model), "tuned": lens}, tokens))      # doctest: +SKIP
    """
    check_model(model, what="an experiment")
    width = d_model(model)
    check_k(k, width)
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be 'both' or 'model', got {weights!r}")
    if not lenses:
        raise ValueError("no lens to compare: pass {'logit': Lens(model), ...}")
    wanted = wanted_layers(model, layers)
    for name, lens in lenses.items():
        check_lens(model, lens, wanted, f"lens {name!r}")
    if subspaces is not None:
        if missing := [name for name in lenses if name not in subspaces]:
            raise ValueError(f"subspaces are given for {sorted(subspaces)} and not for lens {missing[0]!r}")
        for name in lenses:
            check_covered(subspaces[name], wanted, f"subspaces of {name!r} are given")
            for layer, rows in subspaces[name].items():
                if rows.shape[-1] != width:
                    raise ValueError(f"the subspace of layer {layer} has width {rows.shape[-1]}, d_model is {width}")
                edits.project(rows, orthonormal=True)
    texts = texts_of(model, tokens, n=n, skip_first=skip_first)
    if any(int(used.sum()) < 2 for used in texts.used):
        raise ValueError("resampling needs two positions in every batch: pass larger batches or longer rows")
    if subspaces is None:
        states = states_of(model, texts, wanted)
        subspaces = {
            name: {at: basis.vectors for at, basis in bases_of(one, states, k, show_progress=show_progress).items()}
            for name, one in lenses.items()
        }
    bar = progress(total=len(lenses) * len(wanted), desc="resampling", show=show_progress)
    scores = {}
    for name, lens in lenses.items():
        rows = []
        for layer in wanted:
            rows.append(_aligned(model, lens, texts, layer, subspaces[name][layer], weights, seed))
            bar.update()
        scores[name] = torch.stack(rows)
    bar.close()
    settings = {"k": k, "n": texts.n, "weights": weights, "seed": seed, "skip_first": skip_first}
    return Alignment(named(model), wanted, scores, texts.n, settings=settings)


@torch.no_grad()
def _aligned(
    model: LensModel, lens: Lens, texts: Texts, layer: int, rows: Float[Tensor, "k d"], weights: str, seed: int
) -> Float[Tensor, "4"]:
    """The four numbers of one lens at one layer."""
    total = torch.zeros(4, dtype=torch.float64)
    name, decode = site(model, layer), lens[layer]
    for batch, used in texts:
        edit = edits.where(used, edits.project(rows, toward=edits.resample(seed), orthonormal=True))
        states: dict[str, Tensor] = {}
        step = lambda hooks, batch=batch: run(model, batch.tokens, hooks, attention_mask=batch.attention_mask)
        clean = step([read(name, states, "clean")])[used]
        treated = step([patch(name, edit), read(name, states, "treated")])[used]
        before, after = states["clean"][used], states["treated"][used]
        # The control: the response of another position, drawn like the states, with its own weights.
        other = edits.resample(seed + 1)(torch.arange(len(clean))[:, None, None])[:, 0, 0]
        for part in S.chunks(len(clean), clean.shape[-1]):
            stimulus = S.log_probs(decode(after[part])) - S.log_probs(decode(before[part]))
            for at, column in ((torch.arange(len(clean))[part], 0), (other[part], 1)):
                p, q = S.log_probs(clean[at]), S.log_probs(treated[at])
                w = (p.exp() + q.exp()) / 2 if weights == "both" else p.exp()
                response = q - p
                total[column] += float(aitchison.similarity(stimulus, response, w).double().sum())
                if column == 0:
                    total[2] += float(aitchison.norm(stimulus, w).double().sum())
                    total[3] += float(aitchison.norm(response, w).double().sum())
    return (total / texts.n).float()
