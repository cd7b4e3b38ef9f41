"""The model's own readout, `logits = transform(unembed(ln_final(resid)))`, by reference and without firing anybody's
hooks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_lenses.model import LensModel, check_model, d_model


class Readout:
    """Final norm, unembedding, and soft cap or scale of a model, called as a function of residuals `[..., d_model]`.

    Nothing is copied. The model's modules are called, whatever weight processing they went through, so the last
    residual
    gives the model's own logits bit for bit. Hook points inside them are silenced for the call: a user's hook at
    `ln_final.hook_scale` must see the model's pass, not the lens'.

    Example:
        >>> readout = Readout(model)            # doctest: +SKIP
        >>> logits = readout(resid)             # doctest: +SKIP
    """

    def __init__(self, model: LensModel):
        check_model(model, what="a lens")
        self.model = model
        self.d_model = d_model(model)
        # A model without normalization has no ln_final at all.
        self.norm_module: nn.Module | None = getattr(model, "ln_final", None)
        self.unembed_module: nn.Module = model.unembed  # type: ignore[attr-defined]
        modules = [m for part in (self.norm_module, self.unembed_module) if part is not None for m in part.modules()]
        self._points = [m for m in modules if hasattr(m, "fwd_hooks") and hasattr(m, "remove_hooks")]

    @contextmanager
    def _silent(self) -> Iterator[None]:
        hooked = [(p, p._forward_hooks) for p in self._points if p._forward_hooks]
        try:
            for point, hooks in hooked:
                point._forward_hooks = type(hooks)()
            yield
        finally:
            for point, hooks in hooked:
                point._forward_hooks = hooks

    @contextmanager
    def without_logits(self, into: list[Tensor], hooks: Iterable[tuple[Any, Any]] = ()) -> Iterator[None]:
        """In a forward pass inside, put what the unembedding reads, `[batch, pos, d_model]`, into the list, and let it make one
        position's logits: the whole product is the caller's, chunk by chunk. `logits = transform(into[0] W_U + b_U)`.

        Does nothing where a hook, among `hooks` or already on the model, would see or change the logits: the list stays empty.
        """
        inside = [m for m in self.unembed_module.modules() if getattr(m, "_forward_hooks", None)]
        if inside or any(not isinstance(name, str) or name.startswith("unembed") for name, _ in hooks):
            yield
            return

        def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            into[:] = [args[0].detach()]  # of the last pass: `hooks.check_patterns` makes some of its own before
            return (args[0][:, -1:], *args[1:])

        handle = self.unembed_module.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def norm(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The final norm alone."""
        if resid.shape[-1] != self.d_model:
            raise ValueError(f"expected residuals of width {self.d_model} (d_model), got {list(resid.shape)}")
        if self.norm_module is None:
            return resid
        with self._silent():
            return self.norm_module(resid)

    def transform(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
        """What the model does to logits after the unembedding: soft cap (Gemma 2), scale (Cohere, Granite) or
        nothing."""
        f = getattr(getattr(self.model, "adapter", None), "apply_output_logits_transform", None)
        if callable(f):
            return f(logits)  # type: ignore[return-value]
        cap = getattr(self.model.cfg, "output_logits_soft_cap", None) or 0.0  # HookedTransformer: -1 means off
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def transforms(self) -> bool:
        """Whether `transform` does anything."""
        probe = torch.tensor([-200.0, -1.0, 0.5, 300.0])
        return not torch.equal(self.transform(probe), probe)

    def __call__(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        normed = self.norm(resid.to(self.dtype))
        with self._silent():
            return self.transform(self.unembed_module(normed))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the unembedding's weights, to which residuals are cast."""
        return self.model.W_U.dtype  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        """Device of the unembedding: of a model spread over several, the one with the most work for a lens."""
        return self.model.W_U.device  # type: ignore[attr-defined]

    def weights(self) -> tuple[Float[Tensor, "d_model d_vocab"], Float[Tensor, " d_vocab"] | None]:
        """`W_U` and `b_U` (None where it is zero), for the fused losses."""
        w: Tensor = self.model.W_U.detach()  # type: ignore[attr-defined]
        b = getattr(self.model, "b_U", None)
        return w, None if b is None or not bool(b.any()) else b.detach()
