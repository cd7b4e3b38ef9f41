"""A forward pass whose backward is linear: what multiplies a state is held at its value, so that gradient times input adds up.

Inside `Linearised(rule)` the numbers of a pass are the same and its gradients are those of another function. Which one, by rule:

| | "detached" | "relevance" |
|---|---|---|
| norms: `x / scale` | scale held | scale held |
| activations: `f(x) = (f(x) / x) x` | ratio held | ratio held |
| gated MLPs: `f(gate) up` | `f(gate)` held | half of the product to each side |
| attention: `pattern v` | pattern held | as it is |

A pass under "detached" is affine in every state. It works on calls of torch, so that no architecture is named. The values of a pass
stay bit for bit what they are, but in float64, where norms that round to float32 on their way are left in float64.

Source: Golden 2025 (2505.24293) for "detached"; "relevance" is the R-lens' rule, after layer-wise relevance propagation for
transformers (Ali et al. 2022, 2202.07304; Achtibat et al. 2024, 2402.05602).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Rule = Literal["detached", "relevance"]
_ACTIVATIONS = {F.gelu, F.silu}
# Coefficients of a state: scales of norms, and the bounded part of an activation that is written out (NewGELU).
_SCALES = {torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt}
_BOUNDED = {torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid}
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply}


class Linearised(TorchFunctionMode):
    """Passes made inside have the numbers that they always have, and the gradients of the rule.

    Args:
        rule: see above.
        strict: refuse an activation in a function with a backward of its own, which no rule reaches; without it, that backward is used.

    Example:
        >>> x = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> with Linearised("detached"):
        ...     y = torch.nn.functional.silu(x)
        >>> (torch.autograd.grad(y.sum(), x)[0] * x).sum().sub(y.sum()).abs().item() < 1e-6
        True
    """

    def __init__(self, rule: Rule, *, strict: bool = True):
        super().__init__()
        self.rule, self.strict = rule, strict
        self._activated: dict[int, Tensor] = {}  # outputs of activations, kept so that no other tensor gets their id

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, detached = kwargs or {}, self.rule == "detached"
        if func is F.layer_norm or func is getattr(F, "rms_norm", None):
            return _normed(func, *args, **kwargs)
        if func is Tensor.float or func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()):
            return args[0] if args[0].dtype == torch.float64 else func(*args, **kwargs)
        if func in _ACTIVATIONS | _BOUNDED and self.strict and not torch.is_grad_enabled():
            raise ValueError(
                f"this model computes {func.__name__} in a function with a backward of its own (BLOOM does), which the rule "
                f"{self.rule!r} cannot reach: only the plain Jacobian is defined for it here"
            )
        if func in _ACTIVATIONS:
            x, y = args[0], func(*args, **kwargs)
            # f(0) = 0 and f'(0) = 1/2 for both
            ratio = torch.where(x == 0, torch.full_like(x, 0.5), y / x).detach()
            y = _same_value(y, ratio * x)
            self._activated[id(y)] = y
            return y
        if func in _SCALES | _BOUNDED:
            y = func(*args, **kwargs)
            scores = self.rule == "relevance" and y.ndim == 4  # a soft cap of attention scores is no activation
            return y if scores else y.detach()
        if detached and func in _SOFTMAX:
            return func(*args, **kwargs).detach()
        if detached and func is F.scaled_dot_product_attention:
            query, key, *rest = args
            return func(query.detach(), key.detach(), *rest, **kwargs)
        if func in _PRODUCTS and len(args) == 2:
            for gate, other in (args, args[::-1]):
                if id(gate) in self._activated and isinstance(other, Tensor) and other.requires_grad:
                    if detached:
                        return func(gate.detach(), other)
                    return _same_value(func(gate, other), (gate * other.detach() + gate.detach() * other) / 2)
        return func(*args, **kwargs)


def _same_value(value: Tensor, linear: Tensor) -> Tensor:
    """The value, with the gradient of the linear form: bit for bit, since the difference that is added is zero."""
    return value.detach() + (linear - linear.detach())


def _normed(func: Callable[..., Tensor], x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: Any = None) -> Tensor:
    """A norm with its scale held: `(x - mean) / scale * weight + bias`."""
    centred = func is F.layer_norm
    if centred:
        y = func(x, shape, weight, bias, 1e-5 if eps is None else eps)
    else:
        y = func(x, shape, weight, bias if eps is None else eps)  # rms_norm has no bias: eps stands there
        eps, bias = bias if eps is None else eps, None
    eps = (1e-5 if centred else torch.finfo(x.dtype).eps) if eps is None else eps
    axes = tuple(range(-len(shape), 0))
    moved = x - x.mean(axes, keepdim=True) if centred else x
    linear = moved * (moved.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    linear = linear if weight is None else linear * weight
    return _same_value(y, linear if bias is None else linear + bias)
