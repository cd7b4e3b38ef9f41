"""Where Muon takes its steps: in coordinates in which a layer's states are more alike in all directions.

Muon's step has the same size in every direction of its input, and residual streams have not: their mean can be longer than their
deviations (Ethayarajh 2019), and a few directions hold most of the variance (Sun et al. 2024, Massive Activations). With `h' = P h` the same map is `W h = W' h'`, `W' = W P^-1`, so a step

    dL/dW' = dL/dW P,    dW = dW' P

needs P and not W'. `P = S^(-1/4)`, of the second moment `S = E[h h^T]`, halves the spread of the directions on a log scale. Full whitening
(`S^(-1/2)`) would amplify noise in small directions to the size of the signal in large ones. Shampoo (Gupta, Koren & Singer 2018) has that
exponent for each side of a matrix, of gradients; K-FAC (Martens & Grosse 2015) the second moment of inputs. Measured in docs/log.md.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.moments import Moments

# Relative to the mean eigenvalue of S, as the regression's is to the covariance's.
RIDGE = 1e-3


def roots(sources: Sequence[Moments], power: float = 0.5) -> Float[Tensor, "rows d_in d_in"]:
    """`P = S^(-power / 2)` of each row's source, with determinant 1, so that a map keeps its size (`optim.map_sizes`).

    A power of 1 makes the states white, 0 leaves them.
    """
    result = []
    for source in sources:
        xx, mean = source.xx[0], source.mean_x[0]
        s = (xx / source.n + torch.outer(mean, mean)).float()  # float32 loses far less than the ridge adds
        values, vectors = torch.linalg.eigh(s if s.is_cuda else s.cpu())
        logs = -power / 2 * (values.clamp(min=0) + RIDGE * values.mean()).log()
        result.append((vectors * (logs - logs.mean()).exp() @ vectors.mT).to(xx.device))
    return torch.stack(result)


def whiten(grads: Float[Tensor, "rows d_out d_in"], p: Float[Tensor, "rows d_in d_in"]) -> None:
    """`dL/dW' = dL/dW P` of each row, in place."""
    for grad, root in zip(grads, p, strict=True):
        grad.copy_(grad @ root.to(grad.device))


@torch.no_grad()
def whitened_step(muon: torch.optim.Optimizer, root: Float[Tensor, "d_in d_in"]) -> None:
    """Muon's step of one W by the gradient of W'; decay is the same for both."""
    (group,) = muon.param_groups
    (matrix,) = group["params"]
    held = matrix.data
    matrix.data = torch.zeros_like(held)  # run Muon on a zero matrix: what it adds is its step
    try:
        muon.step()
        step = matrix.data @ root.to(held.device)
    finally:
        matrix.data = held
    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(step)
