"""A lens: translators into the final residual basis, then the model's own readout. The logit lens has none."""

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.checks import one_of, several
from tl_lenses.files import HasJacobians, readable
from tl_lenses.hooks import Hook, read
from tl_lenses.identity import basis_of, described, described_model, difference
from tl_lenses.layers import LayerOrSite, layer_site, resolved, site_layer
from tl_lenses.model import LensModel, check_model, n_layers, name_of
from tl_lenses.numerics import gain
from tl_lenses.sites import site
from tl_lenses.translators import Affine, Translators
from tl_lenses.unembed import Readout


@dataclass(frozen=True)
class LayerLens:
    """`resid [..., d_model] -> logits [..., d_vocab]` of one layer: `readout(W x + b)`. Differentiable."""

    readout: Readout
    affine: Affine | None

    def __repr__(self) -> str:
        way = "logit lens" if self.affine is None else "W x + b, {1} -> {0}".format(*self.affine.weight.shape)
        return f"LayerLens({way})"

    def translate(self, resid: Float[Tensor, "*any"]) -> Float[Tensor, "*batch d_model"]:
        """Into the basis of the final residual; the identity for the logit lens and for layer `n_layers`."""
        if self.affine is None:
            return resid
        d_in = self.affine.weight.shape[1]
        if resid.shape[-1] != d_in and resid.ndim > 1 and resid.shape[-2] * resid.shape[-1] == d_in:
            resid = einops.rearrange(resid, "... head d_head -> ... (head d_head)")  # hook_z: heads are flattened
        # Half-precision residuals are translated in fp32: the maps are fp32, and W - I is small beside I.
        return self.affine(resid if resid.dtype == torch.float64 else resid.float())

    def hidden(self, resid: Float[Tensor, "*any"]) -> Float[Tensor, "*batch width"]:
        """What the unembedding reads: `readout.logits` of it are the lens' logits, some columns at a time."""
        return self.readout.hidden(self.translate(resid))

    def __call__(self, resid: Float[Tensor, "*any"]) -> Float[Tensor, "*batch d_vocab"]:
        return self.readout(self.translate(resid))


class Lens:
    """What would the model say from here? Any hidden state as logits.

    `lens[l](x) = readout(W_l x + b_l)`, where readout is the model's final norm and unembedding (with soft cap or scale).
    They are taken by reference; nothing is copied. `lens[n_layers]` is the model itself.

    Args:
        model: a TransformerLens model in eval mode.
        translators: the affine maps, or where they were saved (`Translators.load`: other packages' files too, and a
            live `JacobianLens`); None is the logit lens. Of another basis they are converted, where that is exact.
        check: "strict" refuses translators of another model; "warn" lets another fingerprint pass with a warning,
            never another width or basis.

    Raises:
        ValueError: translators of another model, width or depth, or of a basis that cannot be converted.

    Source: nostalgebraist 2020 (logit lens); Belrose et al. 2023 (tuned lens), section 3.

    Example:
        >>> lens = tll.Lens(model)                                       # doctest: +SKIP
        >>> lens[6](cache["blocks.6.hook_resid_pre"]).argmax(-1)         # doctest: +SKIP
    """

    def __init__(
        self,
        model: LensModel,
        translators: Translators | HasJacobians | str | Path | None = None,
        *,
        check: Literal["strict", "warn"] = "strict",
    ):
        one_of("check", check, ("strict", "warn"))
        check_model(model, what="a lens")
        if isinstance(translators, (str, Path, HasJacobians)):
            translators = Translators.load(translators, n_layers=_depth_unless_ours(translators, n_layers(model)))
        if translators is not None and not isinstance(translators, Translators):
            raise TypeError(
                f"expected Translators, the path of saved ones or None (the logit lens), got {_kind(translators)}: "
                "fit some with tll.fit_tuned(model, tokens) or tll.fit_regression(model, tokens)"
            )
        self.model, self.readout, self.n_layers = model, Readout(model), n_layers(model)
        self.translators = None if translators is None else _for_model(model, translators, check)

    @property
    def layers(self) -> list[int | str]:
        """Layers that can be read: 0..n_layers for the logit lens; the fitted ones and n_layers otherwise."""
        if self.translators is None:
            return list(range(self.n_layers + 1))
        return [*dict.fromkeys(s for s in self.translators.sources if s != self.n_layers), self.n_layers]

    def __getitem__(self, layer: LayerOrSite) -> LayerLens:
        name = site(self.model, layer)
        resid_layer = site_layer(name)
        if resid_layer == self.n_layers or self.translators is None:
            return LayerLens(self.readout, None)
        key = name if resid_layer is None else resid_layer  # one activation may have several names
        try:
            return LayerLens(self.readout, self.translators[key, self.n_layers])
        except KeyError:
            raise KeyError(f"layer {layer!r} was not fitted; fitted are {list(self.translators.sources)}") from None

    def read(self, direction: Float[Tensor, "*batch d_in"], layer: LayerOrSite) -> Float[Tensor, "*batch d_vocab"]:
        """What a direction at a layer adds to the logits, per unit: `W_U^T diag(gain) C W_l v`, no bias anywhere.

        C removes the mean where the final norm does. A direction (a decoder row of a sparse autoencoder, a probe, a
        steering vector) is no state: a bias, or the scale of a norm that belongs to a state, would be read into it.

        Args:
            direction: v, at that layer.
            layer: whose map is used.

        Raises:
            KeyError: a layer that was not fitted.
            ValueError: a soft cap or a head of several modules, which no direction passes through by itself.

        Example:
            >>> lens.read(sae.W_dec[123], 6).topk(5).indices      # doctest: +SKIP
        """
        if not isinstance(direction, Tensor) or not direction.is_floating_point():
            raise TypeError(f"direction must be a tensor of floating point numbers [..., d_in], got {direction!r:.80}")
        affine = self[layer].affine
        d_in = self.readout.d_model if affine is None else affine.weight.shape[1]
        if direction.shape[-1:] != (d_in,):
            raise ValueError(f"direction must be [..., {d_in}] at layer {layer!r}, got {list(direction.shape)}")
        if not direction.isfinite().all():
            raise ValueError("direction has numbers that are not finite")
        v = direction.float()
        if affine is not None:
            v = replace(affine, bias=torch.zeros_like(affine.bias), unit=False)(v)
        norm = self.readout.norm_module
        if isinstance(norm, torch.nn.Sequential) or self.readout.transforms():
            raise ValueError(
                f"{name_of(self.model)} has more than a norm before its logits, or a soft cap after them: a direction has no logits of its own"
            )
        scale, removes_mean = gain(norm, self.readout.d_model, v.new_zeros(()))
        v = (v - v.mean(-1, keepdim=True) if removes_mean else v) * scale.to(v)
        return v @ self.readout.weights()[0].to(v)

    def hooks(
        self,
        into: MutableMapping[Any, Any],
        layers: Iterable[LayerOrSite] | None = None,
        then: Callable[[Float[Tensor, "batch pos d_vocab"]], Any] | None = None,
        *,
        detach: bool = True,
    ) -> list[Hook]:
        """One reading hook per layer: `into[l] = then(logits)`, inside the model's pass, with your own hooks beside
        them.

        Args:
            into: mapping that receives the results; layers are resolved to `0..n_layers`.
            layers: which ones; all that the lens has by default.
            then: applied to each layer's logits, so that only its result is kept. Without it `[batch, pos, d_vocab]`
                is kept per layer.
            detach: store without the graph.

        Example:
            >>> top = {}
            >>> tll.run(model, "Hello", lens.hooks(top, then=lambda logits: logits.argmax(-1)))      # doctest: +SKIP
        """
        pairs = []
        for layer in self.layers if layers is None else several("layers", layers):
            key = resolved(layer, self.n_layers)
            decode = self[key]
            fn = decode if then is None else lambda x, decode=decode: then(decode(x))
            pairs.append(read(site(self.model, key), into, key=key, fn=fn, detach=detach))
        return pairs

    def __repr__(self) -> str:
        kind = "logit lens" if self.translators is None else f"{self.translators.meta.get('fitter', 'fitted')} lens"
        return f"Lens({kind} of {name_of(self.model)!r}, layers {self.layers})"


def _depth_unless_ours(place: Any, depth: int) -> int | None:
    """The depth that a foreign file may not say; what a file of ours says is compared later, with a better error."""
    from tl_lenses import files

    path = files.place_of(place) if isinstance(place, (str, Path)) else None
    return None if path is not None and (files.is_ours(path) or (path / "params.pt").is_file()) else depth


def _for_model(model: LensModel, translators: Translators, check: str) -> Translators:
    """Maps for this model: in its basis, where the conversion is exact; refused where they are of another model."""
    if "to" in translators.meta:
        raise ValueError(
            f"a lens needs maps within one model; these lead into {translators.meta['to'].get('model')!r}: use them with patchscope(map=..., to=...)"
        )
    if translators.unit:
        raise ValueError("a lens needs maps of hidden states, and these read unit vectors: use them with patchscope(map=...)")
    wrong = _wrong(model, translators)
    if wrong is not None and "basis" in wrong:
        try:
            converted = translators._in_basis(basis_of(model))
        except ValueError:  # they read the mean, which this model does not have: refused below
            converted = translators
        translators, wrong = converted, _wrong(model, converted)
    behaves = wrong is not None and ("fingerprint" in wrong or "unembedding" in wrong)  # width, depth and basis agree
    if wrong is None or behaves:
        final = layer_site(n_layers(model), n_layers(model))
        if others := sorted({target for _, target in translators.rows if target != final}):
            raise ValueError(
                f"a lens needs maps into the final residual; these end at {others}: use them with tll.edits.affine or patchscope(map=...)"
            )
    if wrong is None:
        return translators
    meta = {**translators.meta, "d_model": translators.d_out, "n_layers": translators.n_layers}
    message = f"these translators were fitted for {described(meta)}; this model is {described_model(model)}, {wrong}"
    if behaves and (check == "warn" or "cannot be compared" in wrong):
        warnings.warn(message, stacklevel=3)
        return translators
    if "basis" in wrong:
        way = (
            "load the model with center_writing_weights=False (HookedTransformer) or without "
            "enable_compatibility_mode() (TransformerBridge), or fit on this model"
        )
    else:
        way = "fit on this model" + ", or pass check='warn' to use them all the same" * behaves
    raise ValueError(f"{message}: {way}")


def _wrong(model: LensModel, translators: Translators) -> str | None:
    """Why a model is not the one of the maps, or None."""
    meta = {**translators.meta, "d_model": translators.d_out, "n_layers": translators.n_layers}
    if "basis" in meta:
        meta["basis"] = translators.basis
    return difference(meta, model)


def printable(name: Any) -> Any:
    """A lens' name as every file and terminal can hold it: without control characters and lone surrogates."""
    return readable(name) if isinstance(name, str) else name


def named_lenses(model: LensModel, lens: Any, alone: str = "") -> dict[str, Lens]:
    """A lens, or a mapping of them, by name; `alone` is the name of one by itself. Names are made `printable`."""
    given = dict(lens) if isinstance(lens, Mapping) else {alone: lens}
    if not given:
        raise ValueError("an empty mapping of lenses has nothing to show: pass tll.Lens(model) or {name: lens}")
    lenses = {printable(name): lens_of_name for name, lens_of_name in given.items()}
    if len(lenses) < len(given):
        raise ValueError(f"two lens names print the same: {list(given)!r}")
    for name, lens_of_name in lenses.items():
        if not isinstance(lens_of_name, Lens):
            at = f" at {name!r}" if isinstance(lens, Mapping) else ""
            raise TypeError(
                f"expected a Lens or a mapping {{name: Lens}}, got {_kind(lens_of_name)}{at}: make one with "
                "tll.Lens(model) or tll.Lens(model, translators)"
            )
        if lens_of_name.model is not model:
            raise ValueError(f"lens {name!r} was made for another model object: use Lens(model, ...) with this one")
    return lenses


def one_lens(model: LensModel, lens: Any, what: str) -> dict[str, Lens]:
    """A lens by itself, as `named_lenses` gives it; refuses several in a mapping."""
    if isinstance(lens, Mapping):
        raise TypeError(f"{what} reads through one lens, got a mapping of {len(lens)}: pass one of them")
    return named_lenses(model, lens, alone="lens")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def decoders_of(lenses: Mapping[str, Lens], rows: Iterable[LayerOrSite]) -> dict[str, list[LayerLens]]:
    """Each lens at each row. A layer that was not fitted raises here, before any run."""
    rows = list(rows)
    return {name: [lens[row] for row in rows] for name, lens in lenses.items()}


def common_layers(lenses: Mapping[str, Lens], layers: Iterable[LayerOrSite] | slice | None, depth: int) -> list[int | str]:
    """The rows to compute: layers resolved to `0..n_layers`, and sites."""
    if layers is None or isinstance(layers, slice):
        first, *others = ([x for x in lens.layers] for lens in lenses.values())
        common: list[int | str] = [x for x in first if all(x in other for other in others)]
        fitted = {name: lens.layers for name, lens in lenses.items() if lens.translators is not None}
        if len({tuple(f) for f in fitted.values()}) > 1:
            raise ValueError(f"the lenses have different layers ({fitted}): pass layers=[...] that all of them have")
        # a stride keeps the last row, which is the model
        return [*(x for x in common[layers] if x != depth), depth] if isinstance(layers, slice) else common
    if isinstance(layers, (int, str)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list of layers and sites or a slice, got {layers!r}: pass layers=[{layers!r}]")
    chosen = [resolved(x, depth) for x in layers]
    if not chosen:
        raise ValueError("an empty list of layers has nothing to read")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"a layer is given twice: {chosen}")
    return chosen
