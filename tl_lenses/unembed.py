"""The model's own readout, `logits = transform(unembed(ln_final(resid)))`, by reference and without firing anybody's hooks."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_lenses import stats as S
from tl_lenses.layers import layer_site
from tl_lenses.model import LensModel, check_model, d_model, forward, lock_of, n_layers, name_of, probe_tokens, without_hooks
from tl_lenses.tokens import Batch

# Names of the modules between the final residual and the unembedding, found once per model by `_head_of`.
_HEADS: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()
# Whether `hidden W_U + b_U`, transformed a block of columns at a time, is what the head gives; found once per model by `_cuts`.
_CUTS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
# Columns of the vocabulary in one product: 1,024 of width 640 are in the third-level cache with their logits of 128 positions. Products of 128 rows
# take 16 ns per logit and core in such blocks and 20 in one (d 640, V 262,144, AVX-512).
COLUMNS = {"cpu": 1024, "cuda": 16384}
# Rows up to which `_turned` products are faster.
TURNED = 512


class Readout:
    """Final norm, unembedding, and soft cap or scale of a model, called as a function of residuals `[..., d_model]`.

    Nothing is copied. The model's modules are called, whatever weight processing they went through, so the last residual
    gives the model's own logits bit for bit. That is compared once per model, on four tokens; a model with other modules
    before its unembedding (a projection, a dense head) has them found, or is refused. Hook points inside them are silenced
    for the call: a user's hook at `ln_final.hook_scale` must see the model's pass, not the lens'.

    Raises:
        ValueError: a model whose logits are not what its final norm and unembedding give; the modules that it runs
            instead are named.

    Example:
        >>> readout = Readout(model)            # doctest: +SKIP
        >>> logits = readout(resid)             # doctest: +SKIP
    """

    def __init__(self, model: LensModel):
        check_model(model, what="a lens")
        self.model = model
        self.d_model = d_model(model)
        parts = [_module(model, name) for name in _head_of(model)]
        # A model without normalization has no ln_final at all.
        self.norm_module: nn.Module | None = nn.Sequential(*parts) if len(parts) > 1 else parts[0] if parts else None
        self.unembed_module: nn.Module = model.unembed  # type: ignore[attr-defined]
        modules = [m for part in (self.norm_module, self.unembed_module) if part is not None for m in part.modules()]
        self._points = [m for m in modules if hasattr(m, "fwd_hooks") and hasattr(m, "remove_hooks")]

    @contextmanager
    def _silent(self) -> Iterator[None]:
        with lock_of(self.model):
            hooked = [(p, p._forward_hooks) for p in self._points if p._forward_hooks]
            try:
                for point, hooks in hooked:
                    point._forward_hooks = type(hooks)()
                yield
            finally:
                for point, hooks in hooked:
                    point._forward_hooks = hooks

    @contextmanager
    def without_logits(
        self, into: list[Tensor], hooks: Iterable[tuple[Any, Any]] = (), *, rows: int | None = None
    ) -> Iterator[None]:
        """Skip the unembedding of passes made inside the block: store its input in `into`, so that the caller can make logits.

        `logits = transform(into[0] W_U + b_U)`, with `into[0]` `[batch, pos, d_model]`, chunk by chunk. The pass itself makes those
        of one position (of the first `rows` rows). Does nothing where a hook, among `hooks` or already on the model, would see or change the logits: the list stays empty.
        """
        with lock_of(self.model):  # the passes of other threads would lose their logits too
            outside = (self.model, getattr(self.model, "original_model", None))  # what a torch hook on these sees is logits, too
            watched = [m for m in (*outside, *self.unembed_module.modules()) if getattr(m, "_forward_hooks", None)]
            if watched or any(not isinstance(name, str) or name.startswith("unembed") for name, _ in hooks):
                yield
                return

            def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                into[:] = [args[0].detach()]  # of the last pass: `hooks.check_edits` makes some of its own before
                return (args[0][:rows, -1:], *args[1:])

            handle = self.unembed_module.register_forward_pre_hook(keep)
            try:
                yield
            finally:
                handle.remove()

    def norm(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch width"]:
        """The final norm (and other modules before the unembedding), in the wider of the residuals' and the weights' types."""
        if resid.shape[-1] != self.d_model:
            raise ValueError(f"expected residuals of width {self.d_model} (d_model), got {list(resid.shape)}")
        if self.norm_module is None:
            return resid
        with self._silent():
            return _in_its_type(self.norm_module, resid)

    def transform(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
        """The operation on logits after the unembedding: soft cap (Gemma 2), scale (Cohere, Granite) or nothing."""
        return transformed(self.model, logits)

    def transforms(self) -> bool:
        """Whether `transform` is not the identity."""
        probe = torch.tensor([-200.0, -1.0, 0.5, 300.0])
        return not torch.equal(self.transform(probe), probe)

    def __call__(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return self.whole(self.hidden(resid))

    def hidden(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch width"]:
        """The unembedding's input: the normed residual in the type of its weights."""
        return self.norm(_wider(resid, self.dtype)).to(self.dtype)

    def whole(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_vocab"]:
        """The logits of the unembedding's input, by the model's own module."""
        with self._silent():
            return self.transform(self.unembed_module(hidden))

    def logits(
        self, hidden: Float[Tensor, "n width"], room: Float[Tensor, "n_room d_vocab"] | None = None
    ) -> Float[Tensor, "n d_vocab"]:
        """`transform(hidden W_U + b_U)`, `COLUMNS` of the vocabulary at a time: nothing but the result is as wide.

        Args:
            hidden: of `hidden`, or what a pass gave its unembedding.
            room: where the result may be written, with n rows or more. A head whose weights do not give its logits is
                called as a whole, and its result is a tensor of its own.
        """
        if not _cuts(self):
            return self.whole(hidden.to(self.dtype))
        w_u, b_u = self.weights()
        hidden = hidden.to(w_u)
        out = hidden.new_empty(len(hidden), w_u.shape[1]) if room is None else room[: len(hidden)]
        return by_columns(hidden, w_u, b_u, out, self.transform)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the unembedding's weights, to which normed residuals are cast."""
        return self.model.W_U.dtype  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        """Device of the unembedding: of a model spread over several, the one with the most work for a lens."""
        return self.model.W_U.device  # type: ignore[attr-defined]

    def weights(self) -> tuple[Float[Tensor, "width d_vocab"], Float[Tensor, " d_vocab"] | None]:
        """`W_U` and `b_U` (None where it is zero), for the fused losses."""
        w: Tensor = self.model.W_U.detach()  # type: ignore[attr-defined]
        b = getattr(self.model, "b_U", None)
        return w, None if b is None or not bool(b.any()) else b.detach()


def faster_readout(model: LensModel) -> Readout | None:
    """A readout whose logits of few rows take less time than the model's; None where there is none."""
    try:
        readout = Readout(model)
    except ValueError:  # the model's logits are not what its unembedding gives
        return None
    return readout if _turned(readout.weights()[0]) and _cuts(readout) else None


def by_columns(
    hidden: Float[Tensor, "n width"], w_u: Float[Tensor, "width d_vocab"], b_u: Float[Tensor, " d_vocab"] | None,
    out: Float[Tensor, "n d_vocab"], transform: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "n d_vocab"]:  # fmt: skip
    """`transform(hidden W_U + b_U)`, written into `out`, `COLUMNS` of the vocabulary at a time."""
    n, turned = len(hidden), len(hidden) <= TURNED and _turned(w_u)
    if turned:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, -n % (16 if n > 16 else 4)))
    for part in S.evenly(w_u.shape[1], COLUMNS.get(w_u.device.type, COLUMNS["cuda"])):
        # In half precision a bias that is added afterwards rounds twice, and the module does not.
        if turned:
            z = w_u.T[part] @ hidden.T if b_u is None else torch.addmm(b_u[part, None], w_u.T[part], hidden.T)
            z = z[:, :n].T
        else:
            z = hidden @ w_u[:, part] if b_u is None else torch.addmm(b_u[part], hidden, w_u[:, part])
        out[:, part] = z if transform is None else transform(z)
    return out


def _turned(w_u: Tensor) -> bool:
    """Whether `(W_U^T hidden^T)^T` is the faster way to the same product of few rows: in fp32 on a CPU, where W_U is kept `[d_vocab, width]`.

    Rows of W_U^T are then read as they lie. Products of 4, 64 and 128 rows take 0.44, 0.64 and 0.74 of the time of the model's own, if they are
    filled up to a multiple of 16 rows (of 4 up to 16): `benchmarks/reading.py --products`, width 576, 49,152 tokens.
    """
    return w_u.device.type == "cpu" and w_u.dtype == torch.float32 and w_u.stride(0) == 1


def _cuts(readout: Readout) -> bool:
    """Whether the head's logits are its weights' product, transformed a column at a time."""
    if readout.model not in _CUTS:
        _CUTS[readout.model] = True
        w_u, b_u = readout.weights()
        hidden = torch.randn(2, w_u.shape[0], generator=torch.Generator().manual_seed(0)).to(w_u)
        with torch.no_grad():
            try:
                whole, cut = readout.whole(hidden), readout.logits(hidden)
                share = 0.03 if w_u.dtype.itemsize < 4 else 1e-4
                same = whole.dtype == cut.dtype and bool((whole - cut).abs().max() <= share * whole.abs().max())
            except RuntimeError:  # a transform that needs the whole vocabulary
                same = False
        _CUTS[readout.model] = same
    return _CUTS[readout.model]


def _wider(resid: Tensor, dtype: torch.dtype) -> Tensor:
    """Residuals in the wider of their own type and that of the weights."""
    return resid.to(torch.promote_types(resid.dtype, dtype))


def _in_its_type(module: nn.Module, x: Tensor) -> Tensor:
    """A module's output for an input that may have a wider type than its weights: they are widened for the call.

    A norm refuses weights of a narrower type, and its input in that type would lose what a lens has added.
    """
    widened = {
        name: p.to(x.dtype)
        for name, p in module.named_parameters()
        if p.is_floating_point() and p.dtype.itemsize < x.dtype.itemsize
    }
    return torch.func.functional_call(module, widened, (x,)) if widened else module(x)


def transformed(model: LensModel, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """See `Readout.transform`."""
    f = getattr(getattr(model, "adapter", None), "apply_output_logits_transform", None)
    if callable(f):
        return f(logits)  # type: ignore[return-value]
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0  # HookedTransformer: -1 means off
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


# --- the modules between the final residual and the unembedding


def _head_of(model: LensModel) -> tuple[str, ...]:
    """Names of the modules that lead from the final residual to the unembedding; compared with the model once."""
    if model not in _HEADS:
        plain = ("ln_final",) if getattr(model, "ln_final", None) is not None else ()
        with torch.no_grad(), lock_of(model), without_hooks(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls, resid, logits = _traced(model)
            if not (resid.isfinite().all() and logits.isfinite().all()):
                return plain  # the model overflows; an error says so where its numbers are used
            for names in (plain, _chain(model, calls, resid)):
                if names is not None and _gives(model, names, resid, logits):
                    _HEADS[model] = names
                    break
            else:
                blocks = n_layers(model)
                later = [name for name, _, _ in calls if "_original_component" not in name and not name.startswith("blocks.")]
                raise ValueError(
                    f"the logits of {name_of(model)!r} are not what its final norm and unembedding give of layer {blocks}, so a lens "
                    f"would show other numbers. After its blocks the model runs {', '.join(later[-6:]) or 'no module'}: no readout "
                    "is made for it"
                )
    return _HEADS[model]


def _modules(model: LensModel) -> dict[str, nn.Module]:
    """Every module by name: the model's, and those of the model that it wraps which it does not list itself."""
    modules = dict(nn.Module.named_modules(model))  # type: ignore[arg-type]
    listed = {id(module) for module in modules.values()}
    wrapped = getattr(model, "original_model", None)
    inner = nn.Module.named_modules(wrapped, prefix="original_model") if isinstance(wrapped, nn.Module) else ()
    return modules | {name: module for name, module in inner if id(module) not in listed}


def _module(model: LensModel, name: str) -> nn.Module:
    """One of `_modules`, without a walk over all of them, which takes as long as two blocks of a small model."""
    return functools.reduce(getattr, name.split("."), model)  # type: ignore[arg-type,return-value]


def _traced(model: LensModel) -> tuple[list[tuple[str, Tensor, Tensor]], Tensor, Tensor]:
    """`(name, input, output)` of every module that is called after the last block, the final residual, and the logits."""
    residuals: list[Tensor] = []
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        y = output[0] if isinstance(output, tuple) and output else output
        if residuals and inputs and isinstance(y, Tensor):
            calls.append((name, inputs[0], y))

    with ExitStack() as stack:
        for name, module in _modules(model).items():
            if not hasattr(module, "fwd_hooks") and module is not model:  # a hook point passes on what it gets
                take = lambda module, args, kwargs, output, name=name: record(name, args, kwargs, output)
                stack.callback(module.register_forward_hook(take, with_kwargs=True).remove)
        last = layer_site(-1, n_layers(model))
        if last not in model.hook_dict:
            raise ValueError(f"{name_of(model)!r} has no hook {last!r}, where its final residual would be read")
        stack.enter_context(model.hooks(fwd_hooks=[(last, lambda x, hook: residuals.append(x))]))
        logits = forward(model, Batch(probe_tokens(model, 1, 4), None))
    if not residuals:
        raise ValueError(f"{name_of(model)!r} never passes through {last!r}, so its final residual cannot be read")
    return calls, residuals[-1], logits


def _chain(model: LensModel, calls: list[tuple[str, Tensor, Tensor]], resid: Tensor) -> tuple[str, ...] | None:
    """The modules, each called on the last one's output, that lead from the residual to the unembedding; None if there are no such."""
    same = lambda a, b: a.data_ptr() == b.data_ptr() and a.shape == b.shape
    unembedding = {name for name, module in _modules(model).items() if module is model.unembed}  # type: ignore[attr-defined]
    names: list[str] = []
    while len(names) < 8:
        following = [(name, y) for name, x, y in calls if same(x, resid) and not same(y, resid)]
        if any(name in unembedding for name, _ in following):
            return tuple(names)
        if not following:
            return None
        name, resid = following[-1]  # a module is done after those inside it: the last one is the outermost
        names.append(name)
    return None


def _gives(model: LensModel, names: tuple[str, ...], resid: Tensor, logits: Tensor) -> bool:
    """Whether modules, unembedding and transform give the model's logits of a residual."""
    modules = _modules(model)
    try:
        dtype = model.W_U.dtype  # type: ignore[attr-defined]
        hidden = _wider(resid, dtype)
        for name in names:
            hidden = _in_its_type(modules[name], hidden)
        computed = transformed(model, model.unembed(hidden.to(dtype)))  # type: ignore[attr-defined]
    except RuntimeError:  # widths that do not fit
        return False
    half = (torch.float16, torch.bfloat16)
    share = 0.03 if logits.dtype in half or model.W_U.dtype in half else 1e-3  # type: ignore[attr-defined]
    return computed.shape == logits.shape and bool((computed - logits).abs().max() <= share * logits.abs().max())
