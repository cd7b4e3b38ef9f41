"""Which hidden state would say this? The state whose decoding is closest to a distribution, with and without a prior."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.data import as_batches
from tl_lenses.evaluation import used_positions
from tl_lenses.experiments.choices import check_lenses, layers_asked
from tl_lenses.experiments.norms import gain
from tl_lenses.experiments.picture import Lines, Picture
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.hooks import residual_reads, run
from tl_lenses.lens import LayerLens, Lens
from tl_lenses.model import LensModel, check_model, d_model, n_layers, prepare
from tl_lenses.moments import Moments, moments
from tl_lenses.progress import progress

TRUE, START, FREE, PRIOR = "true state", "least squares", "no prior", "prior"
WEIGHT = 1e-4  # of the prior: -log p of a natural state is about d_model / 2, and of KL a hundredth of a nat matters


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution over states: `-log p(h) = |L^-1 (h - mean)|^2 / 2 + const`, covariance `L L^T`."""

    mean: Float[Tensor, " d"]
    factor: Float[Tensor, "d d"]

    @staticmethod
    def of(one: Moments, row: int = 0, ridge: float = 1e-3) -> "Gaussian":
        """From moments of states, the covariance with `ridge` times its mean variance added on the diagonal.

        Raises:
            ValueError: fewer than two samples.
        """
        if one.n < 2:
            raise ValueError(f"a prior needs two states at least, the moments hold {one.n}")
        covariance = one.xx[row] / one.n
        level = covariance.diagonal().mean().clamp_min(1e-12)
        covariance = covariance + ridge * level * torch.eye(len(covariance)).to(covariance)
        return Gaussian(one.mean_x[row].float(), torch.linalg.cholesky(covariance).float())

    def whiten(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """`L^-1 (h - mean)`: a natural state has about d_model as its square."""
        return torch.linalg.solve_triangular(self.factor, (h - self.mean).T, upper=False).T

    def colour(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """`mean + L z`."""
        return self.mean + z @ self.factor.T


@dataclass(frozen=True)
class Inverted:
    """States found for distributions.

    Attributes:
        state: before the lens and the norm, `[n, d_model]`.
        kl: KL(p || lens(state)), nats.
        grad_norm: of what was minimised, where it stopped.
        evaluations: of lens and gradient, for the batch.
    """

    state: Float[Tensor, "n d"]
    kl: Float[Tensor, " n"]
    grad_norm: Float[Tensor, " n"]
    evaluations: int


@dataclass(frozen=True)
class Inversion(Report):
    """How well the model's distributions are inverted, and how far what is found is from the state that was there.

    Attributes:
        lenses, layers: names along the axes.
        conditions: the true state, the start, the minimum without and with the prior.
        kl: KL(p || lens(h)), nats, `[lens, layer, condition, item]`.
        cosine: of `h - mean` with the true one.
        typical: `|L^-1 (h - mean)|^2 / d_model`, about 1 for natural states.
        grad_norm: where the minimum was left, `[lens, layer, 2, item]`.
        evaluations: `[lens, layer, 2]`.
    """

    lenses: list[str]
    layers: list[int]
    conditions: list[str]
    kl: Float[Tensor, "lens layer condition item"]
    cosine: Float[Tensor, "lens layer condition item"]
    typical: Float[Tensor, "lens layer condition item"]
    grad_norm: Float[Tensor, "lens layer 2 item"]
    evaluations: Int[Tensor, "lens layer 2"]

    name = "inversion"

    def tables(self) -> list[Table]:
        """KL, cosine and typicality by lens and layer."""
        n = self.kl.shape[-1]
        title = f"{self.model}: {n} distributions"
        found = []
        for what, x, conditions, note in (
            (f"KL(model || lens(h)), {title}", self.kl, self.conditions, "nats, mean"),
            ("cosine with the true state, mean removed", self.cosine, self.conditions[1:], "mean"),
            ("squared Mahalanobis distance / d_model", self.typical, self.conditions, "mean; about 1 is natural"),
        ):
            rows = [
                [name, str(layer), *(float(x[i, j, self.conditions.index(c)].mean()) for c in conditions)]
                for i, name in enumerate(self.lenses)
                for j, layer in enumerate(self.layers)
            ]
            found.append(Table(what, ["lens", "layer", *conditions], rows, note, percent=False))
        return found

    def pictures(self) -> dict[str, Picture]:
        """Cosine with the true state by layer."""
        series = {
            f"{name}, {c}": [
                (float(layer), float(self.cosine[i, j, self.conditions.index(c)].mean()))
                for j, layer in enumerate(self.layers)
            ]
            for i, name in enumerate(self.lenses)
            for c in (FREE, PRIOR)
        }
        return {"cosine": Lines(f"Inverted states, {self.model}", series, "layer", "cosine with the true state")}

    def rows(self) -> list[dict[str, Any]]:
        """A row per lens, layer and condition."""
        found = []
        for i, name in enumerate(self.lenses):
            for j, layer in enumerate(self.layers):
                for c, condition in enumerate(self.conditions):
                    end = c - 2  # the first two are not minimised
                    found.append({
                        "lens": name, "layer": layer, "condition": condition, "kl": float(self.kl[i, j, c].mean()),
                        "cosine": float(self.cosine[i, j, c].mean()), "typical": float(self.typical[i, j, c].mean()),
                        "grad_norm": float(self.grad_norm[i, j, end].mean()) if end >= 0 else None,
                        "evaluations": int(self.evaluations[i, j, end]) if end >= 0 else None,
                    })  # fmt: skip
        return found


def inversion(
    model: LensModel,
    lenses: Mapping[str, Lens],
    tokens: Any,
    *,
    layers: Sequence[int] | None = None,
    n: int = 24,
    weight: float = WEIGHT,
    steps: int = 60,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Inversion:
    """Inverts the model's own next-token distributions at every layer and through every lens, and compares with the true states.

    Args:
        lenses: by name.
        tokens: text; the first rows are inverted, the prior comes from the rest.
        layers: `0..n_layers` by default.
        n: distributions.
        weight: lambda of the prior.
        steps: of L-BFGS, at most.
        seed: of the draw of positions.

    Raises:
        ValueError: too little text, a lens of another model or without a layer, a negative weight.

    Source: Belrose et al. 2023 (Tuned Lens), appendix on inverting the unembedding (logit inversion as an intervention).
    """
    check_model(model, what="an experiment")
    rows = layers_asked(model, layers)
    check_lenses(model, lenses, rows)
    if not lenses or weight < 0 or n < 1 or steps < 1:
        raise ValueError(
            f"expected lenses, n and steps from 1 and a weight from 0, got n={n}, steps={steps}, weight={weight}"
        )
    states, logp, gathered = _gathered(model, tokens, rows, n, seed)
    length = float(states[rows[-1]].norm(dim=-1).mean()) if rows[-1] == n_layers(model) else d_model(model) ** 0.5
    conditions, shape = [TRUE, START, FREE, PRIOR], (len(lenses), len(rows))
    kl, cosine, typical = (torch.zeros(*shape, 4, len(logp)) for _ in range(3))
    grad_norm, evaluations = torch.zeros(*shape, 2, len(logp)), torch.zeros(*shape, 2, dtype=torch.long)
    todo = [(i, j) for i in range(len(lenses)) for j in range(len(rows))]
    for i, j in progress(todo, desc="inverting", show=show_progress):
        one, true = list(lenses.values())[i][rows[j]], states[rows[j]]
        prior = Gaussian.of(gathered, j)
        begin = least_squares(one, logp, length=length)
        free = invert(one, logp, start=begin, steps=steps)
        with_prior = invert(one, logp, start=begin, prior=prior, weight=weight, steps=steps)
        for c, h in enumerate((true, begin, free.state, with_prior.state)):
            kl[i, j, c] = divergence(one, h, logp).detach().clamp_min(0).cpu()  # not -1e-8
            cosine[i, j, c] = torch.cosine_similarity(h - prior.mean, true - prior.mean, dim=-1).cpu()
            typical[i, j, c] = prior.whiten(h).square().mean(-1).cpu()
        for c, found in enumerate((free, with_prior)):
            grad_norm[i, j, c], evaluations[i, j, c] = found.grad_norm.cpu(), found.evaluations
    settings = {"n": len(logp), "weight": weight, "steps": steps, "prior_positions": gathered.n, "seed": seed}
    return Inversion(
        named(model), list(lenses), rows, conditions, kl, cosine, typical, grad_norm, evaluations, settings=settings
    )


def divergence(lens: LayerLens, h: Float[Tensor, "n d"], logp: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """KL(p || softmax(lens(h))), nats."""
    return S.kl(logp, S.log_probs(lens(h)))


def invert(
    lens: LayerLens,
    logp: Float[Tensor, "n d_vocab"],
    *,
    prior: Gaussian | None = None,
    weight: float = 0.0,
    start: Float[Tensor, "n d"] | None = None,
    steps: int = 100,
    tol: float = 1e-5,
) -> Inverted:
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
        >>> found = invert(lens[6], logits[0].log_softmax(-1), prior=prior, weight=1e-4)      # doctest: +SKIP
    """
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


def minimise(
    f: Callable[[Float[Tensor, "m d"], Int[Tensor, " m"]], Float[Tensor, " m"]],
    x: Float[Tensor, "n d"],
    *,
    steps: int = 100,
    memory: int = 10,
    tol: float = 1e-5,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"], int]:
    """L-BFGS of every row by itself, in one batch: own curvature, own step, own end.

    Args:
        f: `(x[rows], rows) -> value` per row; differentiable.
        x: where to start.
        steps: at most.
        memory: pairs of curvature.
        tol: norm of the gradient at which a row ends.

    Returns:
        The minima, the norms of their gradients, and how often f was evaluated.

    Source: Nocedal and Wright 2006, algorithm 7.4; backtracking to Armijo's condition, pairs without curvature left out.
    """
    count = 0

    def evaluate(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            value = f(y, rows)
            (gradient,) = torch.autograd.grad(value.sum(), y)
        return value.detach(), gradient

    dot = lambda a, b: (a * b).sum(-1)
    x = x.detach().clone()
    active = torch.arange(len(x), device=x.device)
    value, gradient = evaluate(x, active)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    scale = 1 / gradient.norm(dim=-1).clamp_min(1.0)
    for _ in range(steps):
        active = active[gradient[active].norm(dim=-1) > tol]
        if not len(active):
            break
        direction, alphas = gradient.clone(), []
        for s, y, rho in reversed(pairs):
            alphas.append(rho * dot(s, direction))
            direction = direction - alphas[-1][:, None] * y
        direction = scale[:, None] * direction
        for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            direction = direction + (alpha - rho * dot(y, direction))[:, None] * s
        uphill = dot(direction, gradient) <= 0
        direction = -torch.where(
            uphill[:, None], gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1.0), direction
        )
        new, new_value, new_gradient = x.clone(), value.clone(), gradient.clone()
        step, trying = torch.ones_like(value), active
        for _ in range(20):
            at = x[trying] + step[trying, None] * direction[trying]
            v, g = evaluate(at, trying)
            enough = v <= value[trying] + 1e-4 * step[trying] * dot(direction[trying], gradient[trying])
            good = trying[enough]
            new[good], new_value[good], new_gradient[good] = at[enough], v[enough], g[enough]
            trying = trying[~enough]
            if not len(trying):
                break
            step[trying] = step[trying] / 2
        s, y = new - x, new_gradient - gradient
        curvature = dot(s, y)
        has = curvature > 1e-8 * s.norm(dim=-1) * y.norm(dim=-1)
        pairs = [
            *pairs[1 - memory :],
            (s, y, torch.where(has, 1 / curvature.where(has, torch.ones_like(curvature)), 0.0)),
        ]
        scale = torch.where(has, curvature / dot(y, y).clamp_min(1e-30), scale)
        x, value, gradient = new, new_value, new_gradient
        stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        stuck[trying] = True  # no step goes down: round-off
        active = active[~stuck[active]]
    return x, gradient.norm(dim=-1), count


def _gathered(
    model: LensModel, tokens: Any, rows: list[int], n: int, seed: int
) -> tuple[dict[int, Float[Tensor, "n d"]], Float[Tensor, "n d_vocab"], Moments]:
    """States and log-probabilities of n positions, and the moments of the states of all other batches."""
    generator = torch.Generator().manual_seed(seed)
    states: dict[int, list[Tensor]] = {row: [] for row in rows}
    logps: list[Tensor] = []
    rest: Any = 0
    for batch in as_batches(tokens):
        batch = prepare(model, batch.tokens, batch.attention_mask)
        seen: dict[Any, Tensor] = {}
        with torch.no_grad():
            logits = run(model, batch.tokens, residual_reads(model, rows, seen), attention_mask=batch.attention_mask)
        used = used_positions(batch, True).nonzero()
        need = n - sum(map(len, logps))
        if need:
            used = used[torch.randperm(len(used), generator=generator)[:need].to(used.device)]
            logps.append(S.log_probs(logits[used[:, 0], used[:, 1]]))
            for row in rows:
                states[row].append(seen[row][used[:, 0], used[:, 1]].float())
            continue
        x = torch.stack([seen[row][used[:, 0], used[:, 1]] for row in rows])
        rest = rest + moments(x, x[..., :1])
    if not isinstance(rest, Moments) or rest.n < 2:
        raise ValueError(
            f"the text gives {sum(map(len, logps))} positions to invert and none for the prior: pass more rows, or fewer items"
        )
    return {row: torch.cat(those) for row, those in states.items()}, torch.cat(logps), rest
