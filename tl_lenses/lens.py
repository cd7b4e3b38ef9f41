"""A lens: translators into the final residual basis, then the model's own readout. The logit lens has none."""

import warnings
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.fingerprint import basis_of, fingerprint, same_model
from tl_lenses.hooks import Hook, read
from tl_lenses.model import LensModel, d_model, dtype_of, n_layers, name_of
from tl_lenses.sites import LayerOrSite, layer_site, resolve_layer, site, site_layer
from tl_lenses.translators import Affine, Translators
from tl_lenses.unembed import Readout


@dataclass(frozen=True)
class LayerLens:
    """`resid [..., d_model] -> logits [..., d_vocab]` of one layer: `readout(W x + b)`. Differentiable."""

    readout: Readout
    affine: Affine | None

    def translate(self, resid: Float[Tensor, "*any"]) -> Float[Tensor, "*batch d_model"]:
        """Into the basis of the final residual; the identity for the logit lens and for layer `n_layers`."""
        if self.affine is None:
            return resid
        d_in = self.affine.weight.shape[1]
        if resid.shape[-1] != d_in and resid.ndim > 1 and resid.shape[-2] * resid.shape[-1] == d_in:
            resid = einops.rearrange(resid, "... head d_head -> ... (head d_head)")  # hook_z: heads are flattened
        # Half-precision residuals are translated in fp32: the maps are fp32, and W - I is small beside I.
        return self.affine(resid if resid.dtype == torch.float64 else resid.float())

    def __call__(self, resid: Float[Tensor, "*any"]) -> Float[Tensor, "*batch d_vocab"]:
        return self.readout(self.translate(resid))


class Lens:
    """What would the model say from here? Any hidden state as logits.

    `lens[l](x) = readout(W_l x + b_l)`, where readout is the model's final norm and unembedding (with soft cap or
    scale). Takes
    them by reference and copies nothing. `lens[n_layers]` is the model itself.

    Args:
        model: a TransformerLens model in eval mode.
        translators: the affine maps; None is the logit lens.
        check: "strict" refuses translators of another model; "warn" lets another fingerprint pass with a warning,
            never another
            width or basis.

    Raises:
        ValueError: translators of another model, width, depth or basis.

    Source: nostalgebraist 2020 (logit lens); Belrose et al. 2023 (tuned lens), section 3.

    Example:
        >>> lens = tll.Lens(model)                                       # doctest: +SKIP
        >>> lens[6](cache["blocks.6.hook_resid_pre"]).argmax(-1)         # doctest: +SKIP
    """

    def __init__(
        self, model: LensModel, translators: Translators | None = None, *, check: Literal["strict", "warn"] = "strict"
    ):
        if check not in ("strict", "warn"):
            raise ValueError(f"check must be 'strict' or 'warn', got {check!r}")
        self.model = model
        self.readout = Readout(model)
        self.n_layers = n_layers(model)
        self.translators = translators
        if translators is not None:
            _check_translators(model, translators, check)

    @property
    def layers(self) -> list[int | str]:
        """Layers that can be read: 0..n_layers for the logit lens; the fitted ones and n_layers otherwise."""
        if self.translators is None:
            return list(range(self.n_layers + 1))
        return [*dict.fromkeys(s for s in self.translators.sources if s != self.n_layers), self.n_layers]

    def __getitem__(self, layer: LayerOrSite) -> LayerLens:
        name = site(self.model, layer)
        resid_layer = site_layer(name, self.n_layers)
        if resid_layer == self.n_layers or self.translators is None:
            return LayerLens(self.readout, None)
        key = name if resid_layer is None else resid_layer  # one activation may have several names
        try:
            return LayerLens(self.readout, self.translators[key, self.n_layers])
        except KeyError:
            raise KeyError(f"layer {layer!r} was not fitted; fitted are {list(self.translators.sources)}") from None

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
        for layer in self.layers if layers is None else layers:
            key = resolve_layer(layer, self.n_layers) if isinstance(layer, int) else layer
            decode = self[key]
            fn = decode if then is None else lambda x, decode=decode: then(decode(x))
            pairs.append(read(site(self.model, key), into, key=key, fn=fn, detach=detach))
        return pairs

    def __repr__(self) -> str:
        kind = "logit lens" if self.translators is None else f"{self.translators.meta.get('fitter', 'fitted')} lens"
        return f"Lens({kind} of {name_of(self.model)!r}, layers {self.layers})"


def _check_translators(model: LensModel, translators: Translators, check: str) -> None:
    meta = translators.meta
    theirs = f"these translators were fitted for {meta.get('model', 'an unnamed model')!r} (d_model {translators.d_out}, {translators.n_layers} layers)"
    ours = f"this model is {name_of(model)!r} (d_model {d_model(model)}, {n_layers(model)} layers)"
    if "to" in meta:
        raise ValueError(
            f"a lens needs maps within one model; these lead into {meta['to'].get('model')!r}: use them with patchscope(map=..., to=...)"
        )
    if translators.d_out != d_model(model) or translators.n_layers != n_layers(model):
        raise ValueError(f"{theirs}; {ours}")
    final = layer_site(n_layers(model), n_layers(model))
    others = sorted({target for _, target in translators.rows if target != final})
    if others:
        raise ValueError(
            f"a lens needs maps into the final residual; these end at {others}: use them with tll.edits.affine or patchscope(map=...)"
        )
    if "basis" in meta and (ours_basis := basis_of(model)) != translators.basis:
        way = (
            "convert them with translators.to_raw() (exact)"
            if translators.basis == "centered"
            else "load the model with center_writing_weights=False (HookedTransformer) or without "
            "enable_compatibility_mode() (TransformerBridge), or fit on this model"
        )
        raise ValueError(
            f"these translators are for the {translators.basis} residual basis, this model's is {ours_basis}: {way}"
        )
    if "fingerprint" in meta:
        half = any(
            str(t).removeprefix("torch.") in ("float16", "bfloat16")
            for t in (dtype_of(model), meta.get("model_dtype", ""))
        )
        if not same_model(meta["fingerprint"], fingerprint(model), torch.float16 if half else torch.float32):
            message = f"{theirs}; {ours}, whose readout behaves differently (another fingerprint)"
            if check == "strict":
                raise ValueError(f"{message}: fit on this model, or pass check='warn' to use them all the same")
            warnings.warn(message, stacklevel=3)
