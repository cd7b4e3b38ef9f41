"""One affine map of vectors."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Affine:
    """`x -> W x + b`: one row of `Translators`, a frozen value.

    Attributes:
        weight: `[d_out, d_in]`, the full map: the logit lens is `eye`.
        bias: `[d_out]`.
        unit: read `x / |x|` (SelfIE adapters, 2602.10352).

    Example:
        >>> a = Affine(2 * torch.eye(2), torch.ones(2))
        >>> a(torch.tensor([1.0, 2.0]))
        tensor([3., 5.])
        >>> (a @ a)(torch.tensor([1.0, 2.0]))
        tensor([7., 11.])
    """

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"]
    unit: bool = False

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        d_in = self.weight.shape[1]
        if x.shape[-1] != d_in:
            raise ValueError(f"this map reads vectors of width {d_in}, got {list(x.shape)}")
        weight, bias = self.weight.to(x), self.bias.to(x)
        x = nn.functional.normalize(x, dim=-1) if self.unit else x
        return nn.functional.linear(x, weight, bias)

    def __matmul__(self, other: "Affine") -> "Affine":
        """Composition: `(a @ b)(x) = a(b(x))`."""
        if self.weight.shape[1] != other.weight.shape[0]:
            raise ValueError(f"cannot compose maps {list(self.weight.shape)} @ {list(other.weight.shape)}: the inner widths differ")
        if self.unit:
            raise ValueError("a map of unit vectors after another one is not affine: apply one, then the other")
        return Affine(self.weight @ other.weight, self.weight @ other.bias + self.bias, other.unit)

    def pinv(self) -> "Affine":
        """`y -> W^+ (y - b)`: the least-norm x with the least `|W x + b - y|`."""
        if self.unit:
            raise ValueError("a map of unit vectors has no inverse: the length of its input is lost")
        inverse = torch.linalg.pinv(self.weight.double())
        return Affine(inverse.to(self.weight), -(inverse @ self.bias.double()).to(self.bias))


def base(d_out: int, d_in: int, **kwargs: Any) -> Float[Tensor, "d_out d_in"]:
    """The part of W that is not trained: the identity for square maps, zeros otherwise."""
    return torch.eye(d_out, **kwargs) if d_out == d_in else torch.zeros(d_out, d_in, **kwargs)
