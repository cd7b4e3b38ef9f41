"""The one module: `x -> W x + b` per residual-stream site.

The logit lens, the tuned lens, linear shortcuts, the Jacobian lens and maps between models are these with other
numbers in
them. What is stored and trained is `D = W - I`, so that decay pulls to the identity (Belrose et al. 2023, section 3).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Row = tuple[str, str]  # (source site, target site)


@dataclass(frozen=True)
class Affine:
    """`x -> W x + b`: one row of `Translators`, a frozen value.

    Attributes:
        weight: `[d_out, d_in]`, the full map: the logit lens is `eye`.
        bias: `[d_out]`.

    Example:
        >>> a = Affine(2 * torch.eye(2), torch.ones(2))
        >>> a(torch.tensor([1.0, 2.0]))
        tensor([3., 5.])
        >>> (a @ a)(torch.tensor([1.0, 2.0]))
        tensor([7., 11.])
    """

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"]

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        d_in = self.weight.shape[1]
        if x.shape[-1] != d_in:
            raise ValueError(f"this map reads vectors of width {d_in}, got {list(x.shape)}")
        weight, bias = self.weight.to(x), self.bias.to(x)
        return nn.functional.linear(x, weight, bias)

    def __matmul__(self, other: "Affine") -> "Affine":
        """Composition: `(a @ b)(x) = a(b(x))`."""
        if self.weight.shape[1] != other.weight.shape[0]:
            raise ValueError(
                f"cannot compose maps {list(self.weight.shape)} @ {list(other.weight.shape)}: the inner widths differ"
            )
        return Affine(self.weight @ other.weight, self.weight @ other.bias + self.bias)

    def pinv(self) -> "Affine":
        """`y -> W^+ (y - b)`: the least-norm x with the least `|W x + b - y|`."""
        inverse = torch.linalg.pinv(self.weight.double())
        return Affine(inverse.to(self.weight), -(inverse @ self.bias.double()).to(self.bias))


def identity(d: int) -> Affine:
    """`x -> x`."""
    return Affine(torch.eye(d), torch.zeros(d))


def base(d_out: int, d_in: int, **kwargs: Any) -> Float[Tensor, "d_out d_in"]:
    """What `D` is added to: the identity, or zero between spaces of different width, where there is none."""
    return torch.eye(d_out, **kwargs) if d_out == d_in else torch.zeros(d_out, d_in, **kwargs)


def _short(name: str, n_layers: int) -> int | str:
    """A hook name as the layer that it is, if it is one."""
    parts = name.split(".")
    if name == f"blocks.{n_layers - 1}.hook_resid_post":
        return n_layers
    return int(parts[1]) if len(parts) == 3 and parts[2] == "hook_resid_pre" else name


def _long(key: int | str, n_layers: int, what: str = "these translators are for") -> str:
    """A layer or site as `Translators` name it: `blocks.2.hook_resid_post` is `blocks.3.hook_resid_pre`."""
    if isinstance(key, bool) or not isinstance(key, (int, str)):
        raise TypeError(f"expected a layer (int) or a hook name (str), got {key!r}")
    if isinstance(key, str):
        parts = key.split(".")
        if len(parts) == 3 and parts[2] == "hook_resid_post" and int(parts[1]) + 1 < n_layers:
            return f"blocks.{int(parts[1]) + 1}.hook_resid_pre"
        return key
    layer = key + n_layers + 1 if key < 0 else key
    if not 0 <= layer <= n_layers:
        raise KeyError(f"no layer {key}: {what} layers 0..{n_layers}")
    return f"blocks.{layer}.hook_resid_pre" if layer < n_layers else f"blocks.{n_layers - 1}.hook_resid_post"


def _meta_of(meta: dict[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """The record of some rows: what it has per row, for these only."""
    pick = lambda part: {**part, "r_squared": [part["r_squared"][i] for i in chosen]} if "r_squared" in part else part
    return {**pick(meta), **({"held_out": pick(meta["held_out"])} if "held_out" in meta else {})}


class Translators(nn.Module):
    """Affine maps between residual sites, one per row, with where they come from.

    Args:
        rows: `(source site, target site)` hook names, one per map. Layer `n_layers` is never stored: it is the
            identity.
        weights: `[n_rows, d_out, d_in]`, the full maps.
        biases: `[n_rows, d_out]`.
        n_layers: of the source model, so that layers can be used as keys.
        meta: fitter, settings, tokens seen, versions, basis ("raw" or "centered"), fingerprint, model name. Of maps
            into another model, `meta["to"]` says the same of that one, and its `n_layers`.

    Raises:
        ValueError: shapes that do not agree, a row twice, numbers that are not finite.
    """

    delta: Float[Tensor, "n_rows d_out d_in"]
    biases: Float[Tensor, "n_rows d_out"]

    def __init__(
        self,
        rows: Iterable[Row],
        weights: Float[Tensor, "n_rows d_out d_in"],
        biases: Float[Tensor, "n_rows d_out"],
        *,
        n_layers: int,
        meta: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.rows: tuple[Row, ...] = tuple((str(s), str(t)) for s, t in rows)
        self.n_layers = n_layers
        self.meta: dict[str, Any] = dict(meta or {})
        if not len(self.rows) == len(weights) == len(biases):
            raise ValueError(
                f"{len(self.rows)} rows need as many weights and biases, got {len(weights)} and {len(biases)}"
            )
        if weights.shape[1] != biases.shape[1]:
            raise ValueError(f"weights {list(weights.shape)} and biases {list(biases.shape)} differ in d_out")
        if len(set(self.rows)) != len(self.rows):
            raise ValueError("a row (source, target) is given twice")
        for row, w, b in zip(self.rows, weights, biases, strict=True):
            if not (w.isfinite().all() and b.isfinite().all()):
                raise ValueError(f"the map of {row[0]!r} has values that are not finite")
        # Frozen: a lens is read far more often than trained. `requires_grad_()` thaws it.
        self.delta = nn.Parameter(
            weights.detach() - base(*weights.shape[1:], dtype=weights.dtype, device=weights.device), requires_grad=False
        )
        self.biases = nn.Parameter(biases.detach().clone(), requires_grad=False)

    @property
    def weights(self) -> Float[Tensor, "n_rows d_out d_in"]:
        """The full maps `W = I + D`."""
        return self.delta + base(*self.delta.shape[1:], dtype=self.delta.dtype, device=self.delta.device)

    @property
    def d_in(self) -> int:
        """Width of what the maps read."""
        return self.delta.shape[2]

    @property
    def d_out(self) -> int:
        """Width of what they give."""
        return self.delta.shape[1]

    @property
    def basis(self) -> str:
        """ "raw" or "centered": whether the model's residuals have their mean removed (see `fingerprint.basis_of`)."""
        return self.meta.get("basis", "raw")

    @property
    def target_layers(self) -> int:
        """`n_layers` of the model that the maps lead into: another one's, or the source's own."""
        return self.meta.get("to", {}).get("n_layers", self.n_layers)

    @property
    def sources(self) -> tuple[int | str, ...]:
        """Source of each row, as a layer where it is one."""
        return tuple(source for source, _ in self.pairs)

    @property
    def pairs(self) -> tuple[tuple[int | str, int | str], ...]:
        """Source and target of each row, as layers where they are."""
        return tuple((_short(s, self.n_layers), _short(t, self.target_layers)) for s, t in self.rows)

    def index(self, source: int | str, target: int | str | None = None) -> int:
        """Row number of a source (and a target where there are several).

        Raises:
            KeyError: not fitted; the fitted ones are listed.
        """
        long = _long(source, self.n_layers)
        goal = None if target is None else _long(target, self.target_layers, "targets of these translators are")
        found = [i for i, (s, t) in enumerate(self.rows) if s == long and goal in (None, t)]
        if not found:
            asked = source if target is None else (source, target)
            fitted = list(self.sources) if target is None else list(self.pairs)
            raise KeyError(f"layer {asked!r} was not fitted; fitted are {fitted}")
        if len(found) > 1:
            raise KeyError(
                f"layer {source!r} has several targets: use translators[{source!r}, target] with one of {[self.pairs[i][1] for i in found]}"
            )
        return found[0]

    def _is_identity(self, source: int | str, target: int | str | None) -> bool:
        """Whether a key asks for the map of a place to itself, which is never stored. Between models there is none."""
        if "to" in self.meta or self.d_in != self.d_out:
            return False
        long = _long(source, self.n_layers)
        if target is None:
            return long == _long(self.n_layers, self.n_layers) and all(s != long for s, _ in self.rows)
        return long == _long(target, self.n_layers)

    def __getitem__(self, key: int | str | tuple[int | str, int | str]) -> Affine:
        """The map of a layer or site; `translators[l, l_target]` where one source has several targets.

        Within one model `n_layers` and `[l, l]` are the identity.
        """
        source, target = key if isinstance(key, tuple) else (key, None)
        if self._is_identity(source, target):
            return Affine(torch.eye(self.d_in).to(self.delta), torch.zeros(self.d_in).to(self.delta))
        i = self.index(source, target)
        return Affine(
            self.delta[i] + base(self.d_out, self.d_in, dtype=self.delta.dtype, device=self.delta.device),
            self.biases[i],
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Affine]:
        return (self[row] for row in self.rows)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except (KeyError, TypeError):
            return False
        return True

    def forward(self, x: Float[Tensor, "n_rows *batch d_in"]) -> Float[Tensor, "n_rows *batch d_out"]:
        """Every row applied to its own input: `y_i = x_i + D_i x_i + b_i`."""
        n = x.shape[0]
        flat = x.reshape(n, -1, x.shape[-1])
        y = torch.baddbmm(self.biases[:, None], flat, self.delta.mT)
        if self.d_in == self.d_out:
            y = y + flat
        return y.reshape(*x.shape[:-1], self.d_out)

    def select(self, layers: Sequence[int | str | tuple[int | str, int | str]]) -> "Translators":
        """The maps of some source layers (or pairs `(l, l_target)`) only."""
        chosen = [self.index(*layer) if isinstance(layer, tuple) else self.index(layer) for layer in layers]
        return Translators(
            [self.rows[i] for i in chosen],
            self.weights[chosen],
            self.biases[chosen],
            n_layers=self.n_layers,
            meta=_meta_of(self.meta, chosen),
        )

    def to_raw(self) -> "Translators":
        """Maps fitted on mean-removed residuals, for the same model unprocessed: `W -> W (I - 1 1^T / d)`, exactly.

        Source: the centred stream is `h - mean(h)`, so `W (h - mean(h)) + b = W (I - 1 1^T / d) h + b`.
        """
        if self.basis == "raw":
            return self
        w = self.weights
        return Translators(
            self.rows,
            w - w.mean(-1, keepdim=True),
            self.biases,
            n_layers=self.n_layers,
            meta={**self.meta, "basis": "raw"},
        )

    def to_centered(self) -> "Translators":
        """Maps fitted on raw residuals, for the model with centred writing weights. Exact where `W 1 = 0`, refused
        elsewhere.

        Raises:
            ValueError: the maps read the mean, which a centred stream does not have.
        """
        if self.basis == "centered":
            return self
        w = self.weights
        read = w.double().sum(-1).abs().amax() / w.double().abs().sum(-1).amax().clamp_min(1e-30)
        if read > 1e-5:
            raise ValueError(
                f"these translators read the mean of the residual (|W 1| is {read:.1e} of |W|), which a model with centred writing weights "
                "has lost: load the model with center_writing_weights=False (HookedTransformer) or without "
                "enable_compatibility_mode() (TransformerBridge), or fit on this model"
            )
        return Translators(self.rows, w, self.biases, n_layers=self.n_layers, meta={**self.meta, "basis": "centered"})

    def extra_repr(self) -> str:
        to, held_out = self.meta.get("to"), self.meta.get("held_out")
        parts = [f"{len(self)} maps {self.d_in} -> {self.d_out}"]
        if held_out is None:
            several = to is not None or len(set(self.sources)) < len(self)
            parts.append(f"pairs {list(self.pairs)}" if several else f"layers {list(self.sources)}")
        parts += [f"{k}={self.meta[k]!r}" for k in ("fitter", "model", "tokens_seen", "basis") if k in self.meta]
        if to is not None:
            parts.append(f"to={to.get('model')!r}")
        if held_out is None:
            return ", ".join(parts)
        lines = [f"on {held_out['tokens']} held-out tokens:"]
        if "agreement" in held_out:
            lines[0] += f" the two models' next tokens agree, unpatched, at {held_out['agreement']:.1%}"
        lines += [f"{s!r} -> {t!r}: R^2 {r:.3f}" for (s, t), r in zip(self.pairs, held_out["r_squared"], strict=True)]
        return "\n".join([", ".join(parts), *lines])

    def save(self, path: Any, *, overwrite: bool = False) -> None:
        """Write `translators.safetensors` and `config.json` into a folder, atomically. See `checkpoint.save`."""
        from tl_lenses import checkpoint

        checkpoint.save(self, path, overwrite=overwrite)

    @staticmethod
    def load(path_or_hub_id: Any, *, device: str | torch.device = "cpu") -> "Translators":
        """Read a folder written by `save`, or one of the Hugging Face Hub. See `checkpoint.load`."""
        from tl_lenses import checkpoint

        return checkpoint.load(path_or_hub_id, device=device)
