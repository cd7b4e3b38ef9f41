"""How much a lens' output changes when one direction of its input is ablated, and the gradient of that, fast.

    sigma(v) = E_h KL( f(h) || f(r(h, v)) ),      r(h, v) = h - v v^T (h - mu),      |v| = 1

f is a lens at one layer, mu the mean state: the ablation replaces the part along a direction by its mean. A state moves along one
line per direction, and the norms in use (LayerNorm, RMSNorm, none) send a line into a plane: `norm(x - a u) - norm(0)` is a
combination of `norm(x) - norm(0)` and `norm(u) - norm(0)`. So are the logits, and the product with `W_U` (d_model multiplications
per logit) becomes two multiplications per logit, forwards and backwards. Whether a model's norm does so is measured, not looked
up; where it does not, or where a soft cap follows, the same number comes from the whole product.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.divergence import fused_kl
from tl_lenses.lens import LayerLens
from tl_lenses.unembed import Readout

CHUNK = 2**18  # logits at a time and thread: four such buffers stay in a core's cache
PLANE = 1e-3  # how far from its plane, relative to its length, a state may lie


def ablate(
    states: Float[Tensor, "n d"],
    v: Float[Tensor, " d"],
    mean: Float[Tensor, " d"],
    images: tuple[Float[Tensor, "n d"], Float[Tensor, " d"]] | None = None,
) -> Float[Tensor, "n d"]:
    """`r(h, v) = h - v v^T (h - mu)`, v of length 1.

    Args:
        images: `W h + b` and `W v`; with them the result is `W r(h, v) + b`, without a product by W.

    >>> ablate(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    tensor([[1., 4.]])
    """
    moved, along = (states, v) if images is None else images
    return moved - ((states - mean) @ v)[:, None] * along


@dataclass(frozen=True)
class Energy:
    """`sigma(v)` of a lens at one layer on given states; call it with a unit vector. Differentiable. Nats."""

    decode: LayerLens  # `lens[l]`
    states: Float[Tensor, "n d"]  # `[n, d_model]`, float32
    mean: Float[Tensor, " d"]  # mu
    translated: Float[Tensor, "n d"]  # the states in the basis of the final residual
    teacher: Float[Tensor, "n d_vocab"]  # logits of the states as they are, `[n, d_vocab]`
    plane: "Plane | None"  # products that the fast path keeps, or None

    def __call__(self, v: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        u = _translated(self.decode, v)
        normed = _normed(self.decode.readout, ablate(self.states, v, self.mean, (self.translated, u)))
        if self.plane is not None:
            return self.plane(normed, _normed(self.decode.readout, u[None])[0])
        w_u, b_u = self.decode.readout.weights()
        return fused_kl(normed[None], self.teacher, w_u.float(), None if b_u is None else b_u.float(), transform=self._transform())[
            0
        ]

    def _transform(self) -> Any:
        readout = self.decode.readout
        return readout.transform if readout.transforms() else None

    def exact(self, v: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        """The same, from the lens' own logits. It is reported, and the published procedure follows it."""
        logp = S.log_probs(self.teacher)
        return S.kl(logp, S.log_probs(self.decode(ablate(self.states, v, self.mean)))).mean()


@torch.no_grad()
def energy_of(decode: LayerLens, states: Float[Tensor, "n d"], *, fast: bool = True) -> Energy:
    """The energy function of a lens at one layer."""
    if len(states) < 2:
        raise ValueError(f"mean ablation needs at least 2 states, got {len(states)}: pass more text")
    if not states.isfinite().all():
        raise ValueError("the states have values that are not finite: try float32 or bfloat16")
    states = states.detach().float()
    teacher, mean = decode(states).float(), states.mean(0)
    translated = decode.translate(states)
    energy = Energy(decode, states, mean, translated, teacher, None)
    if not fast or energy._transform() is not None:
        return energy
    normed = _normed(decode.readout, translated)
    at_zero = _normed(decode.readout, torch.zeros_like(normed[:1]))[0]
    w_u, b_u = decode.readout.weights()
    w_u = w_u.float()
    base = at_zero @ w_u + (0 if b_u is None else b_u.float())
    # KL = sum p z - logsumexp z - (sum p z' - logsumexp z'), and sum p z' = y' (W_U p) + b p costs no product with W_U.
    p, moved = teacher.softmax(-1), normed - at_zero
    toward = p @ w_u.T
    constant = (moved * toward).sum(-1) - teacher.logsumexp(-1)
    plane = Plane(moved, at_zero, w_u, base, moved @ w_u, toward, constant, teacher.argmax(-1))
    generator = torch.Generator().manual_seed(0)
    for length in (1.0, 30.0):  # an ordinary ablation and a violent one
        v = torch.randn(states.shape[1], generator=generator).to(states)
        v = v / v.norm()
        shifted = states - length * ((states - mean) @ v)[:, None] * v
        y = _normed(decode.readout, decode.translate(shifted))
        if plane.error(y, _normed(decode.readout, _translated(decode, v)[None])[0]) > PLANE:
            return energy
    return Energy(decode, states, mean, translated, teacher, plane)


@dataclass(frozen=True)
class Plane:
    """The readout on planes: `y' - y0 = A (y - y0) + G g`, so `z' = A (y - y0) W_U + G (g W_U) + z0`."""

    moved: Float[Tensor, "n d"]
    at_zero: Float[Tensor, " d"]
    w_u: Float[Tensor, "d d_vocab"]
    base: Float[Tensor, " d_vocab"]
    logits: Float[Tensor, "n d_vocab"]
    toward: Float[Tensor, "n d"]
    constant: Float[Tensor, " n"]
    lead: Int[Tensor, " n"]

    def __call__(self, normed: Float[Tensor, "n d"], turned: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        """Mean KL of the ablated states `normed`, moved along W v; `turned` is its norm(W v)."""
        direction, ablated = turned - self.at_zero, normed - self.at_zero
        along, across = self.coordinates(ablated, direction)
        partition = _Partition.apply(along.float(), across.float(), direction @ self.w_u, self.logits, self.base, self.lead)
        return (self.constant - (ablated * self.toward).sum(-1)).mean() + partition  # type: ignore[operator]

    def coordinates(
        self, ablated: Float[Tensor, "n d"], direction: Float[Tensor, " d"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """A and G by least squares, in float64."""
        x, g, y = self.moved.double(), direction.double(), ablated.double()
        xx, xg, gg, yx, yg = (x * x).sum(-1), x @ g, g @ g, (y * x).sum(-1), y @ g
        # A state on the direction itself has many coordinates; any of them will do.
        det = (xx * gg - xg * xg).clamp_min(1e-12 * xx.mean() * gg)
        return (yx * gg - yg * xg) / det, (yg * xx - yx * xg) / det

    def error(self, normed: Float[Tensor, "n d"], turned: Float[Tensor, " d"]) -> float:
        """How far the states lie from their planes: the largest distance over length."""
        direction, ablated = turned - self.at_zero, normed - self.at_zero
        along, across = self.coordinates(ablated, direction)
        gap = ablated - along[:, None] * self.moved - across[:, None] * direction
        return float((gap.norm(dim=-1) / ablated.norm(dim=-1).clamp_min(1e-12)).max())


class _Partition(torch.autograd.Function):
    """Mean over n of `logsumexp(A_n x_n + G_n g + b)`; the gradient is ready with the value."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, along: Tensor, across: Tensor, g: Tensor, x: Tensor, b: Tensor, lead: Tensor
    ) -> Tensor:
        n, total = len(x), torch.zeros((), dtype=torch.float64, device=x.device)
        d_along, d_across, d_g = torch.empty_like(along), torch.empty_like(across), torch.zeros_like(g)
        sides = torch.stack([g, b, torch.ones_like(g)])
        # Before the exponential each row is lowered by its logit of the token that led before the ablation: one product.
        shift = along * x.gather(-1, lead[:, None])[:, 0] + across * g[lead] + b[lead]
        weights = torch.stack([across, torch.ones_like(across), -shift], 1)
        size = max(1, CHUNK * torch.get_num_threads() // x.shape[1])
        buffer = torch.empty(size, x.shape[1], dtype=x.dtype, device=x.device)
        for part in S.chunks(n, x.shape[1], len(buffer)):
            z = buffer[: part.stop - part.start]
            torch.mul(x[part], along[part, None], out=z).addmm_(weights[part], sides).exp_()
            mass, above = z.sum(-1), torch.zeros_like(shift[part])
            if not float(mass.max()) < 1e30:  # another token leads by far
                torch.mul(x[part], along[part, None], out=z).addmm_(weights[part], sides)
                above = z.amax(-1)
                mass = z.sub_(above[:, None]).exp_().sum(-1)
            total += (mass.log() + shift[part] + above).sum(dtype=torch.float64)
            d_along[part] = torch.linalg.vecdot(z, x[part]) / mass
            d_across[part] = z @ g / mass
            d_g += (across[part] / mass) @ z
        ctx.save_for_backward(d_along / n, d_across / n, d_g / n)
        return (total / n).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:  # type: ignore[override]
        return *(grad * part for part in ctx.saved_tensors), None, None, None  # type: ignore[return-value]


def _normed(readout: Readout, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return readout.norm(x.to(readout.dtype)).float()


def _translated(decode: LayerLens, v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """`W v`: a direction, so without the translator's bias."""
    return v if decode.affine is None else decode.affine.weight.to(v) @ v
