"""Which hidden state would say this? The state whose decoding is closest to a distribution, with and without a prior."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import finite_number, whole_number
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Drawn, Layers, Lenses, Subject, text_settings
from tl_lenses.lens import LayerLens
from tl_lenses.model import LensModel, d_model
from tl_lenses.moments import Moments, moments
from tl_lenses.numerics import Gaussian, gain, minimise
from tl_lenses.progress import progress
from tl_lenses.views import Lines, Picture

TRUE, START, FREE, PRIOR = "true state", "least squares", "no prior", "prior"
WEIGHT = 1e-4  # of the prior: -log p of a natural state is about d_model / 2, and of KL a hundredth of a nat matters


@dataclass(frozen=True)
class Inverted:
    """States found for distributions."""

    state: Float[Tensor, "n d"]  # before the lens and the norm, `[n, d_model]`
    kl: Float[Tensor, " n"]  # KL(p || lens(state)), nats
    grad_norm: Float[Tensor, " n"]  # of the minimised function, at the end
    evaluations: int  # of lens and gradient, for the batch


@dataclass(frozen=True, repr=False)
class Inversion(Report):
    """How well the model's distributions are inverted, and how far the inverted states are from the true ones.

    The grid has the axes lens, layer, condition (the true state, the start, the minimum without and with the prior) and item,
    and the values

    - `kl`: KL(p || lens(h)), nats;
    - `cosine`: of `h - mean` with the true one;
    - `typical`: `|L^-1 (h - mean)|^2 / d_model`, about 1 for natural states;
    - `grad_norm`: where the minimum was left; NaN where nothing was minimised;
    - `evaluations` `[lens, layer, condition]`, the same.
    """

    name = "inversion"

    def tables(self) -> list[Table]:
        """KL, cosine and typicality by lens and layer."""
        means, title = self.grid.mean("item"), f"{self.model}: {len(self.items)} distributions"
        how: dict[str, Any] = {"down": ["lens", "layer"], "across": "condition"}
        away, note = means.at(condition=self.conditions[1:]), "mean; about 1 is natural"
        return [
            means.table(f"KL(model || lens(h)), {title}", "kl", note="nats, mean", **how),
            away.table("cosine with the true state, mean removed", "cosine", note="mean", **how),
            means.table("squared Mahalanobis distance / d_model", "typical", note=note, **how),
        ]

    def pictures(self) -> dict[str, Picture]:
        """Cosine with the true state by layer, with its interval over the distributions."""
        means, drawn = self.grid.at(condition=[FREE, PRIOR]).spread("item"), Lines(f"Inverted states, {self.model}", {})
        for lens in self.lenses:
            of = means.at(lens=lens).lines("", {"cosine": f"{lens}, {{}}"}, by="condition")
            drawn = replace(drawn, series={**drawn.series, **of.series}, bands={**drawn.bands, **of.bands})
        return {"cosine": replace(drawn, up="cosine with the true state")}

    def rows(self) -> list[dict[str, Any]]:
        """A row per lens, layer and condition."""
        return self.grid.mean("item").rows()


def inversion(
    model: LensModel, lenses: Lenses, tokens: Any, *, layers: Layers = None,
    n: int = 24, weight: float = WEIGHT, steps: int = 60, seed: int = 0, show_progress: bool | None = None,
) -> Inversion:  # fmt: skip
    """Inverts the model's own next-token distributions at every layer and through every lens, and compares with the true states.

    Args:
        tokens: text; the first rows are inverted, the prior comes from the rest.
        layers: `0..n_layers` by default.
        n: distributions, from 2.
        weight: lambda of the prior, from 0.
        steps: of L-BFGS, at most.
        seed: of the draw of positions.

    Raises:
        ValueError: too little text, a lens of another model or without a layer, a number out of its range.

    Source: Belrose et al. 2023 (Tuned Lens), appendix on inverting the unembedding (logit inversion as an intervention).

    Example:
        >>> print(inversion(model, {"tuned": lens}, heldout, layers=[2, 4, 6]))      # doctest: +SKIP
    """
    subject = Subject.of(model, lenses, layers, what="inversion", every=True)
    n, steps = whole_number("n", n, least=2), whole_number("steps", steps, least=1)
    weight, layers = finite_number("weight", weight, least=0), subject.layers
    drawn, sums = _gathered(subject, tokens, n, seed)
    logp, states = drawn.logp, {layer: x.float() for layer, x in drawn.states.items()}
    length = float(states[layers[-1]].norm(dim=-1).mean()) if layers[-1] == subject.depth else d_model(model) ** 0.5
    conditions, shape = [TRUE, START, FREE, PRIOR], (len(subject.lenses), len(layers), 4)
    kl, cosine, typical, grad_norm = (torch.full((*shape, len(logp)), torch.nan) for _ in range(4))
    evaluations = torch.full(shape, torch.nan, dtype=torch.float64)
    cells = [(i, j, lens) for i, lens in enumerate(subject.lenses.values()) for j in range(len(layers))]
    for i, j, lens in progress(cells, desc="inverting", show=show_progress):
        decode, true, prior = lens[layers[j]], states[layers[j]], Gaussian.of(sums, j)
        begin = least_squares(decode, logp, length=length)
        free = invert(decode, logp, start=begin, steps=steps)
        held = invert(decode, logp, start=begin, prior=prior, weight=weight, steps=steps)
        for c, h in enumerate((true, begin, free.state, held.state)):
            kl[i, j, c] = divergence(decode, h, logp).detach().clamp_min(0).cpu()  # not -1e-8
            cosine[i, j, c] = torch.cosine_similarity(h - prior.mean, true - prior.mean, dim=-1).cpu()
            typical[i, j, c] = prior.whiten(h).square().mean(-1).cpu()
        for c, inverted in ((2, free), (3, held)):
            grad_norm[i, j, c], evaluations[i, j, c] = inverted.grad_norm.cpu(), inverted.evaluations
    settings = {
        **text_settings(tokens), "n": len(logp), "weight": weight, "steps": steps, "prior_positions": sums.n, "seed": seed,
    }  # fmt: skip
    axes = {"lens": list(subject.lenses), "layer": layers, "condition": conditions, "item": list(range(len(logp)))}
    values = {"kl": kl, "cosine": cosine, "typical": typical, "grad_norm": grad_norm, "evaluations": evaluations}
    return Inversion(subject.name, grid=Grid.over(axes, values), settings=settings)


def divergence(lens: LayerLens, h: Float[Tensor, "n d"], logp: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """KL(p || softmax(lens(h))), nats."""
    return S.kl(logp, S.log_probs(lens(h)))


def invert(
    lens: LayerLens, logp: Float[Tensor, "n d_vocab"], *, prior: Gaussian | None = None, weight: float = 0.0,
    start: Float[Tensor, "n d"] | None = None, steps: int = 100, tol: float = 1e-5,
) -> Inverted:  # fmt: skip
    """The state whose decoding is closest to a distribution, a batch of them at once.

    `h* = argmin_h KL(p || softmax(lens_l(h))) + weight * (-log prior(h))`

    Without a prior the minimum is no point: the norm takes out length (and mean), so KL says nothing about them. With one the
    minimisation runs in its whitened coordinates.

    Args:
        lens: `lens[l]`.
        logp: log-probabilities, such as `logits.log_softmax(-1)`; each row must sum to 1.
        prior: over states of that layer.
        weight: lambda; with 0 the prior only shapes the steps.
        start: where to begin; the least-squares solution by default.
        steps: of L-BFGS, at most.
        tol: the norm of the gradient that ends it.

    Returns:
        The state before the norm, its KL, the gradient's norm, and how often the lens was evaluated.

    Raises:
        ValueError: rows that are no log-probabilities, a weight without a prior, a start of another shape.

    Source: Belrose et al. 2023, library `Unembed.invert` (which starts from zero and returns the normed state).

    Example:
        >>> inverted = invert(lens[6], logits[0].log_softmax(-1), prior=prior, weight=1e-4)      # doctest: +SKIP
    """
    if not isinstance(lens, LayerLens):
        raise TypeError(f"expected a lens at one layer, such as lens[3], got {type(lens).__name__}")
    if not isinstance(logp, Tensor) or logp.ndim != 2 or not logp.is_floating_point():
        raise TypeError(f"logp must be log-probabilities [n, d_vocab], got {type(logp).__name__}")
    if prior is not None and not isinstance(prior, Gaussian):
        raise TypeError(f"prior must be a Gaussian, got {type(prior).__name__}: Gaussian.of(moments)")
    if start is not None and not isinstance(start, Tensor):
        raise TypeError(f"start must be a tensor, got {type(start).__name__}")
    steps, tol = whole_number("steps", steps, least=1), finite_number("tol", tol, least=0)
    weight = finite_number("weight", weight, least=0)
    total = logp.exp().sum(-1)
    if not torch.allclose(total, torch.ones_like(total), atol=1e-3):
        raise ValueError(
            f"expected log-probabilities, whose exponentials sum to 1, got sums from {total.min():.3g} to {total.max():.3g}"
        )
    if weight and prior is None:
        raise ValueError(f"a weight of {weight} needs a prior: pass prior=Gaussian.of(moments)")
    h0 = least_squares(lens, logp) if start is None else start
    if h0.shape != (len(logp), lens.readout.d_model):
        raise ValueError(f"start must be [{len(logp)}, {lens.readout.d_model}], got {list(h0.shape)}")
    to_state = (lambda z: z) if prior is None else prior.colour
    p = logp.exp()

    def loss(z: Float[Tensor, "m d"], rows: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        kl = S.kl(logp[rows], S.log_probs(lens(to_state(z))), p[rows])
        return kl + weight / 2 * z.square().sum(-1) if weight else kl

    z, grad_norm, evaluations = minimise(loss, h0 if prior is None else prior.whiten(h0), steps=steps, tol=tol)
    state = to_state(z)
    with torch.no_grad():
        return Inverted(state, divergence(lens, state, logp), grad_norm, evaluations)


@torch.no_grad()
def least_squares(
    lens: LayerLens, logp: Float[Tensor, "n d_vocab"], *, length: float | None = None, floor: float = -30.0
) -> Float[Tensor, "n d"]:
    """The state whose logits are nearest to `logp` up to a constant: pseudo-inverses of unembedding, norm and translator.

    A norm cannot give every vector its length, so only the direction is matched; `length` is that of the state before the norm.
    """
    w_u, b_u = lens.readout.weights()
    d = lens.readout.d_model
    goal = logp.clamp_min(floor) - (0 if b_u is None else b_u)
    w = (w_u - w_u.mean(-1, keepdim=True)).double()
    gram = w @ w.T
    gram = gram + 1e-8 * gram.diagonal().mean() * torch.eye(d).to(gram)
    normed = torch.linalg.solve(gram, w @ (goal - goal.mean(-1, keepdim=True)).double().T).T
    scale, _ = gain(lens.readout.norm_module, d, w_u)
    zero = lens.readout.norm(torch.zeros(1, d).to(w_u)).double()
    x = (normed - zero) / scale.double().where(scale.abs() > 1e-6, torch.ones_like(scale).double())
    if lens.readout.norm_module is not None:
        x = x * ((length or d**0.5) / x.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    x = x.float()
    return x if lens.affine is None else lens.affine.pinv()(x)


def _gathered(subject: Subject, tokens: Any, n: int, seed: int) -> tuple[Drawn, Moments]:
    """States and log-probabilities of n positions, and the moments of the states of all other batches."""
    batches, sums = subject.batches(tokens), None
    drawn = subject.draw(batches, n, seed=seed)
    for batch, used in batches:
        states, _ = subject.read(batch, used, logits=False)
        x = torch.stack(list(states.values()))
        part = moments(x, x[..., :1])
        sums = part if sums is None else sums + part
    if sums is None or sums.n < 2:
        raise ValueError(
            f"the text gives {len(drawn.logp)} positions to invert and none for the prior: pass more rows, or fewer items"
        )
    return drawn, sums
