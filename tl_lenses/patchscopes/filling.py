"""From a source's vector v to an activation of the target run: `f(v)`, scaled to a length, written over h or added to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import finite_number, one_of
from tl_lenses.hooks import read, run
from tl_lenses.identity import check_pair
from tl_lenses.layers import LayerOrSite, site_layer
from tl_lenses.model import LensModel, d_model, device_of, n_layers
from tl_lenses.patchscopes.pairs import moves_of
from tl_lenses.patchscopes.result import Pair
from tl_lenses.patchscopes.sources import Source, VectorsByLayer
from tl_lenses.patchscopes.targets import Prompt
from tl_lenses.sites import site
from tl_lenses.translators import Translators

Map = Callable[[Tensor], Tensor] | Translators
Norm = Literal["replaced", "mean"] | float | Float[Tensor, " layers"]


@dataclass(frozen=True)
class Filling:
    """How a source's vector v is mapped, scaled and written into the target run."""

    to: LensModel  # the target model
    # f, a function of vectors `[k, d]`, or `Translators` whose row (l, l*) is used; None for the identity
    map: Map | None = None
    mode: str = "replace"  # how v meets the activation h: "replace", "add", "interpolate" or "norm_add"
    # the length of v: that of h ("replaced"), the mean length in the target prompt ("mean"), a number, or a number per
    # residual layer; None keeps the length of v
    norm: Norm | None = None
    alpha: float = 0.5  # of "interpolate"

    @classmethod
    def of(cls, to: LensModel, map: Any, mode: Any, norm: Any, alpha: Any) -> "Filling":
        """The user's arguments, checked."""
        if not (map is None or callable(map) or isinstance(map, Translators)):
            raise TypeError(f"map must be a function of vectors [k, d], an Affine or Translators, got {type(map).__name__}")
        mode = one_of("mode", mode, ("replace", "add", "interpolate", "norm_add"))
        return cls(to, map, mode, _checked_norm(norm, n_layers(to)), finite_number("alpha", alpha))  # pyright: ignore[reportArgumentType]

    @property
    def relative(self) -> bool:
        """Whether v has length 1 and is counted in lengths of the activation that it meets."""
        return self.mode == "norm_add" or isinstance(self.norm, str) and self.norm == "replaced"

    def mean_norms(self, prompt: Prompt, layers: Sequence[LayerOrSite]) -> dict[LayerOrSite, float]:
        """Mean length of the target prompt's own vectors at some layers, BOS left out; nothing where `norm` is no "mean"."""
        if not (isinstance(self.norm, str) and self.norm == "mean"):
            return {}
        seen: dict[LayerOrSite, Tensor] = {}
        run(self.to, prompt.tokens, [read(site(self.to, layer), seen, key=layer) for layer in layers])
        skip = min(1, prompt.tokens.shape[1] - 1)
        return {layer: float(x[0, skip:].flatten(1).float().norm(dim=-1).mean()) for layer, x in seen.items()}

    def combine(self, h: Float[Tensor, "*batch d"], v: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The activation that stands in place of h."""
        if self.relative:
            v = v * h.norm(dim=-1, keepdim=True)
        if self.mode == "replace":
            return v
        return torch.lerp(h, v, self.alpha) if self.mode == "interpolate" else h + v

    def check(self, model: LensModel, sources: Sequence[Source], pairs: Sequence[Pair]) -> None:
        """Refuse maps, and vectors of the source model, that cannot fit, as far as that is known before anything runs."""
        moves = [move for pair in pairs for move in moves_of(*pair)]
        if isinstance(self.map, Translators):
            if any(layer is None for layer, _ in moves):
                raise ValueError("vectors without a layer have no row in Translators: pass one map, as translators[l, l_target]")
            check_pair(self.map, model, self.to, moves)  # type: ignore[arg-type]
        elif self.map is None:
            self._check_widths(model, sources, moves)
        self._check_device(model, sources)

    def vectors(
        self, label: str, by_layer: VectorsByLayer, pair: Pair, n_places: int, mean_norms: dict[LayerOrSite, float]
    ) -> dict[LayerOrSite, Float[Tensor, "_k _d"]]:
        """The vectors of one cell by target layer: mapped, and of the length asked for."""
        filled: dict[LayerOrSite, Tensor] = {}
        for layer, target_layer in moves_of(*pair):
            v = self._mapped(by_layer[layer], layer, target_layer)
            if len(v) not in (1, n_places):
                raise ValueError(
                    f"the source gives {len(v)} positions and the target takes {n_places}: expected one for all, or as many"
                )
            length = 1.0 if self.relative else self._length(target_layer, mean_norms)
            if length is not None:
                if not bool(v.norm(dim=-1).all()):
                    raise ValueError(f"source {label!r} has a vector of length 0, which cannot be given a norm")
                v = v * (length / v.norm(dim=-1, keepdim=True))
            # Vectors without a map and a norm were checked where they were read.
            if (self.map is not None or length is not None) and not bool(v.isfinite().all()):
                raise ValueError(f"the mapped vector of source {label!r} for {pair} is not finite")
            filled[target_layer] = v
        return filled

    def _mapped(self, v: Tensor, layer: LayerOrSite | None, target_layer: LayerOrSite) -> Float[Tensor, "k d"]:
        if isinstance(self.map, Translators):
            assert layer is not None  # `check` refuses it
            v = self.map[layer, target_layer](v)
        elif self.map is not None:
            v = self.map(v)
        if not isinstance(v, Tensor) or v.ndim != 2:
            raise ValueError(f"map must return vectors [k, d], got {list(getattr(v, 'shape', [])) or type(v).__name__}")
        if isinstance(target_layer, int) or site_layer(target_layer) is not None:
            self._check_width(v.shape[-1])
        return v

    def _length(self, layer: LayerOrSite, mean_norms: dict[LayerOrSite, float]) -> float | None:
        if self.norm is None or isinstance(self.norm, (int, float)):
            return self.norm
        if isinstance(self.norm, str):
            return mean_norms[layer]
        resolved = layer if isinstance(layer, int) else site_layer(layer)
        if resolved is None:
            raise ValueError(f"norm as a tensor has one length per residual layer, and {layer!r} is none: give a number")
        return float(self.norm[resolved])

    def _check_widths(self, model: LensModel, sources: Sequence[Source], moves: Sequence[tuple[Any, Any]]) -> None:
        """Widths of the residual layers; those of other sites are known when they run."""
        if not any(isinstance(b, int) and (a is None or isinstance(a, int)) for a, b in moves):
            return
        for source in sources:
            if not source.has_vectors:
                self._check_width(d_model(model))
            elif source.prompt.ndim:  # type: ignore[union-attr]
                self._check_width(source.prompt.shape[-1])  # type: ignore[union-attr]

    def _check_width(self, width: int) -> None:
        if width != d_model(self.to):
            raise ValueError(
                f"a vector of width {width} does not fit the target model (d_model {d_model(self.to)}): pass map=, an "
                "affine map between them"
            )

    def _check_device(self, model: LensModel, sources: Sequence[Source]) -> None:
        is_module = isinstance(self.map, torch.nn.Module)
        weights = self.map.parameters() if is_module else [getattr(self.map, "weight", None)]  # type: ignore[union-attr]
        for weight in (w for w in weights if isinstance(w, Tensor)):
            for source in sources:
                device = source.prompt.device if source.has_vectors else device_of(model)  # type: ignore[union-attr]
                if weight.device != device:
                    raise ValueError(
                        f"the map is on {weight.device} and the vectors are on {device}: move one of them with .to(...)"
                    )


def _checked_norm(norm: Any, depth: int) -> Any:
    """A length in one of its forms: None, a word, a float, or a tensor `[n_layers + 1]`."""
    expected = f"norm must be None, 'replaced', 'mean', a number or a tensor [n_layers + 1 = {depth + 1}]"
    if norm is None or isinstance(norm, str) and norm in ("replaced", "mean"):
        return norm
    if isinstance(norm, (str, bool)):
        raise (ValueError if isinstance(norm, str) else TypeError)(f"{expected}, got {norm!r}")
    try:
        lengths = torch.as_tensor(norm, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected}, got {type(norm).__name__}") from None
    if lengths.ndim and lengths.shape != (depth + 1,):
        raise ValueError(f"norm as a tensor has a length per residual layer [{depth + 1}], got {list(lengths.shape)}")
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError(f"norm must be a positive finite length, got {norm}: None keeps the vector's own")
    return lengths if lengths.ndim else float(lengths)
