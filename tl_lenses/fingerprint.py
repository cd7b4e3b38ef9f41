"""Which model a file is for: a behaviour of its readout, and the basis of its residual stream.

The same for folded, centred, HookedTransformer or bridge forms of one model: log-softmax is blind to centred
unembeddings,
and mean-removed residuals to centred writing weights.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.hooks import installed, read
from tl_lenses.model import Batch, LensModel, device_of, forward, n_layers
from tl_lenses.unembed import Readout

_PROBES, _PROJECTIONS = 8, 4

# Largest difference of one number, relative to their spread, between forms of one model. Measured in
# tests/test_fingerprint.py:
# below 1e-5 in fp32 and below 0.02 in half precision over the tested architectures; two random models differ by 0.5
# or more.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}


def _noise(rows: int, columns: int, salt: float) -> Float[Tensor, "rows columns"]:
    """Fixed numbers in [-1, 1) from a formula, so that no random generator's version matters."""
    index = torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns)
    return ((index * 0.7548776662466927 + salt) ** 2 * 0.5698402909980532 % 1.0) * 2 - 1


@torch.no_grad()
def fingerprint(model: LensModel) -> list[list[float]]:
    """Random projections of the readout's log-probabilities on a few fixed residuals.

    `log_softmax(readout(r_i)) . s_j / sqrt(d_vocab)`, with fixed mean-removed residuals r_i of norm sqrt(d_model)
    and fixed signs s_j.
    """
    readout = Readout(model)
    device = device_of(model)
    probes = _noise(_PROBES, readout.d_model, 0.5)
    probes = probes - probes.mean(-1, keepdim=True)
    probes = probes / probes.norm(dim=-1, keepdim=True) * readout.d_model**0.5
    logp = readout(probes.to(device, readout.dtype)).double().log_softmax(-1).cpu()
    signs = _noise(_PROJECTIONS, logp.shape[-1], 0.25).sign()
    # A projection on signs that sum to zero does not see a constant, so the normaliser does not drown the differences.
    signs = signs - signs.mean(-1, keepdim=True)
    return (logp @ signs.T / logp.shape[-1] ** 0.5).tolist()


def same_model(a: list[list[float]], b: list[list[float]], dtype: torch.dtype = torch.float32) -> bool:
    """Whether two fingerprints are of one model, within the tolerance of `dtype`."""
    x, y = torch.tensor(a), torch.tensor(b)
    if x.shape != y.shape:
        return False
    return bool((x - y).abs().max() <= _TOLERANCE.get(dtype, 0.05) * max(float(x.std()), 1e-6))


@torch.no_grad()
def basis_of(model: LensModel) -> str:
    """ "centered" if every residual of a short run has mean zero (centred writing weights of a LayerNorm model),
    else "raw".

    Only `center_writing_weights` changes the residual stream, by exactly the mean of each token's residual.
    """
    seen: dict[Any, Tensor] = {}
    depth = n_layers(model)
    tokens = torch.arange(1, min(9, int(model.cfg.d_vocab)), device=device_of(model))[None]
    with installed(model, [read(f"blocks.{depth - 1}.hook_resid_post", seen), read(0, seen)]):
        forward(model, Batch(tokens, None), None)
    return "centered" if all(is_centered(x) for x in seen.values()) else "raw"


def is_centered(resid: Float[Tensor, "*batch d_model"]) -> bool:
    """Whether the mean over d_model vanishes at every token, relative to the largest entry."""
    # Rounding leaves 2e-7 in fp32; sums of half-precision writes leave more.
    tolerance = 1e-4 if resid.dtype in (torch.float32, torch.float64) else 5e-3
    resid = resid.double()
    return bool((resid.mean(-1).abs() < tolerance * resid.abs().amax(-1).clamp_min(1e-6)).all())
