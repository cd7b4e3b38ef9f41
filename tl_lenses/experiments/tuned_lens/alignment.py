"""Does a lens respond to an intervention as the model does? Stimulus and response, compared in Aitchison's geometry."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import aitchison, edits
from tl_lenses import stats as S
from tl_lenses.checks import one_of, seed_of
from tl_lenses.experiments.basis import bases_of, check_k, check_subspaces
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Lenses, Subject, Texts, lenses_of, logits_of, text_settings
from tl_lenses.hooks import patch, read
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, d_model
from tl_lenses.progress import progress
from tl_lenses.sites import site
from tl_lenses.views import Picture

WEIGHTS = ("both", "model")
NUMBERS = ("similarity", "shuffled", "stimulus", "response")


@dataclass(frozen=True, repr=False)
class Alignment(Report):
    """How much alike the changes in a lens and in the model are, by lens and layer (of the subspace and the lens).

    The grid has the axes lens and layer, and the values

    - `similarity`: of stimulus and response, a cosine from -1 to 1;
    - `shuffled`: the same with the response of another position;
    - `stimulus`, `response`: their lengths, nats.

    All are means over the positions, of which `settings["n"]` is the number.
    """

    name = "alignment"

    def tables(self) -> list[Table]:
        """Similarity and control per lens, then the lengths of both changes."""
        title = f"stimulus-response alignment, {self.model}: {self.settings['n']} positions"
        cosines = {"similarity": "{}", "shuffled": "{}, shuffled"}
        lengths = {"stimulus": "{}, stimulus", "response": "{}, response"}
        table = functools.partial(self.grid.table, across="lens", by_label=True)
        return [
            table(title, cosines, note="cosine; shuffled: another position's response"),
            table("length", lengths, note="weighted Aitchison norm, nats"),
        ]

    def pictures(self) -> dict[str, Picture]:
        """Similarity over layers, a line per lens."""
        title = f"stimulus-response alignment, {self.model}"
        return {"similarity": self.grid.lines(title, "similarity", by="lens", up="Aitchison similarity")}


def alignment(
    model: LensModel, lenses: Lenses, tokens: Any, *, k: int = 8,
    layers: Layers = None, n: int = 512,
    subspaces: Mapping[str, Mapping[int, Float[Tensor, "k d"]]] | None = None, weights: str = "both", seed: int = 0,
    skip_first: bool = True, show_progress: bool | None = None,
) -> Alignment:  # fmt: skip
    """Resample the principal subspace of a layer, and compare the changes in the lens with those in the model.

        h' = h + P (h_other - h),    stimulus = lens(h') - lens(h),    response = M(h') - M(h)      (Aitchison differences)
        similarity = <stimulus, response>_w / (|stimulus|_w |response|_w),    w = (M(h) + M(h')) / 2

    P projects on the first k causal directions of that lens at that layer, and h_other is the state of another position (a
    derangement of all positions of a batch).

    Args:
        lenses: a lens or `{name: lens}`; each gets its own subspaces.
        tokens: text, as `evaluate` takes it.
        k: directions of the subspace.
        layers: `0..n_layers-1` by default.
        n: positions; rows are taken until there are so many.
        subspaces: by lens and layer, orthonormal rows `[k, d_model]`, rather than extracted here: `bases[l].vectors` of
            `causal_basis`.
        weights: of tokens: "both" is the mean of the model's two distributions, "model" the one without intervention.
        seed: of the derangement.
        skip_first: leave out each row's first position.

    Raises:
        ValueError: k larger than d_model; a lens of another model; subspaces that are not orthonormal, or of other layers.

    Source: Belrose et al. 2023 (Tuned Lens), section 4.2; its published code for the weights.

    Example:
        >>> print(alignment(model, {"logit": tll.Lens(model), "tuned": lens}, tokens))      # doctest: +SKIP
    """
    given = lenses_of(model, lenses, "alignment")
    subject = Subject.of(model, given, layers, what="alignment", final="asked", every=True)
    lenses, width = subject.lenses, d_model(model)
    check_k(k, width)
    one_of("weights", weights, WEIGHTS)
    seed = seed_of(seed)
    if subspaces is not None:
        subspaces = check_subspaces(subspaces, subject.layers, width, of="lens", names=list(lenses))
    texts = subject.texts(tokens, n=n, skip_first=skip_first, resampled=True)
    if subspaces is None:
        states = subject.states(texts)
        bases = {name: bases_of(lens, states, k, show_progress=show_progress) for name, lens in lenses.items()}
        subspaces = {name: {at: basis.vectors for at, basis in by_layer.items()} for name, by_layer in bases.items()}
    cells = [(name, layer) for name in lenses for layer in subject.layers]
    scores = [
        _aligned(model, lenses[name], texts, layer, subspaces[name][layer], weights, seed)
        for name, layer in progress(cells, desc="resampling", show=show_progress)
    ]
    measured = torch.stack(scores).unflatten(0, (len(lenses), len(subject.layers)))
    axes = {"lens": list(lenses), "layer": subject.layers}
    grid = Grid.over(axes, dict(zip(NUMBERS, measured.unbind(-1), strict=True)))
    settings = {
        **text_settings(tokens), "k": k, "n": texts.n, "weights": weights, "seed": seed, "skip_first": skip_first,
    }  # fmt: skip
    return Alignment(subject.name, grid=grid, settings=settings)


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
        clean = logits_of(model, batch, [read(name, states, "clean")])[used]
        treated = logits_of(model, batch, [patch(name, edit), read(name, states, "treated")])[used]
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
