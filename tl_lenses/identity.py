"""The identity of a model, for files: numbers that its readout gives, and the basis of its residual stream.

The same for folded, centred, HookedTransformer or bridge forms of one model: log-softmax is blind to centred unembeddings,
and mean-removed residuals to centred writing weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.layers import LayerOrSite, layer_site
from tl_lenses.model import LensModel, d_model, device_of, dtype_of, forward, lock_of, n_layers, name_of
from tl_lenses.numerics import gain
from tl_lenses.token_text import token_text
from tl_lenses.tokens import Batch
from tl_lenses.translators import Translators
from tl_lenses.unembed import Readout

_PROBES, _PROJECTIONS = 8, 4
_SAMPLE = "The capital of France is Paris."


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


def same_model(a: list[list[float]], b: list[list[float]], *dtypes: torch.dtype | str | None) -> bool:
    """Whether two fingerprints are of one model, within the tolerance of the coarsest of the types that they were computed in."""
    x, y = torch.tensor(a), torch.tensor(b)
    half = any(str(dtype).removeprefix("torch.") in ("float16", "bfloat16") for dtype in dtypes)
    # Largest difference of one number, relative to their spread, between forms of one model. Measured in tests/test_lens.py:
    # below 1e-5 in fp32 and below 0.02 in half precision over the tested architectures; two random models differ by 0.5 or more.
    tolerance = (0.05 if half else 1e-3) * max(float(x.std()), 1e-6)
    return x.shape == y.shape and bool((x - y).abs().max() <= tolerance)


@torch.no_grad()
def basis_of(model: LensModel) -> str:
    """ "centered" if the residuals of a short run have mean zero (centred writing weights of a LayerNorm model), "mixed" if
    only what the blocks write has, else "raw".

    Only `center_writing_weights` changes the residual stream, by exactly the mean of each token's residual. "mixed" is what it
    makes of BLOOM: a norm with a bias stands between the embedding and the stream, and keeps the embedding's mean.
    """
    residuals: list[Tensor] = []
    depth = n_layers(model)
    tokens = torch.arange(1, min(9, int(model.cfg.d_vocab)), device=device_of(model))[None]
    keep = lambda x, hook: residuals.append(x.cpu())
    with lock_of(model), model.hooks(fwd_hooks=[(layer_site(layer, depth), keep) for layer in range(depth + 1)]):
        forward(model, Batch(tokens, None), None)
    first, *later = residuals
    dtype = min(first.dtype, dtype_of(model), key=lambda dtype: dtype.itemsize)
    # At every layer: what the blocks of a trained model have written by its end may have a mean of a few percent.
    if not all(is_centered(state.double() - first.double(), dtype, state) for state in later):
        return "raw"
    return "centered" if is_centered(first, dtype) else "mixed"


# Rounding leaves a mean in a centred stream, and training leaves a small one in what is raw: between the two for the tested architectures and the lab models.
_CENTERED = {torch.float16: 0.02, torch.bfloat16: 0.05}


def is_centered(
    resid: Float[Tensor, "*batch d_model"], dtype: torch.dtype | None = None, beside: Float[Tensor, "*batch d_model"] | None = None
) -> bool:
    """Whether the mean over d_model vanishes at every token: `|x . 1| / |x|`, which is about |N(0, 1)| in a raw stream of any width.

    The largest entry is no measure of it: entries of some directions are a hundred times the others, and a mean is small beside them.
    `dtype` is the one that the residuals were computed in, by default their own; `beside`, by default they themselves, has the length that they were rounded at.
    """
    tolerance = _CENTERED.get(dtype or resid.dtype, 0.02)
    length = (resid if beside is None else beside).double().norm(dim=-1)
    return bool((resid.double().sum(-1).abs() <= tolerance * length).all())


# --- two models


def check_pair(
    translators: Translators,
    source_model: LensModel,
    target_model: LensModel | None = None,
    pairs: Iterable[tuple[LayerOrSite, LayerOrSite]] = (),
) -> None:
    """Refuse maps that were fitted on other models, in another basis or between other layers.

    What a file does not say (maps made by hand have no fingerprint) is not compared.

    Args:
        translators: maps within one model, or from one into another (`fit_regression(..., to=big)`).
        source_model: whose states they will read.
        target_model: whose states they will give; None is the source model.
        pairs: the `(l, l*)` that will be used, where they are known.

    Raises:
        ValueError: a model that is not the one fitted, by width, depth, basis or fingerprint; a pair that was not
            fitted. Says what was expected, what came and what to do.

    Example:
        >>> check_pair(maps, small, big, pairs=[(6, 8)])      # doctest: +SKIP
    """
    target_model = source_model if target_model is None else target_model
    alone = target_model is source_model
    source = {"n_layers": translators.n_layers, **translators.meta}
    to: dict[str, Any] | None = source.get("to")
    if to is None:
        made = f"these translators stay within {described(source)}"
        target = source if alone or "fingerprint" in source else {}
        fit = f"fit_regression({'model, tokens, pairs=...' if alone else 'source, tokens, to=target'})"
    else:
        made = f"these translators lead from {described(source)} to {described(to)}"
        target, fit = to, "fit_regression(source, tokens, to=target)"
        if alone:
            raise ValueError(
                f"{made}; expected these two models, got {described_model(source_model)} alone: pass the other one as to=, "
                "or fit maps within it with fit_regression(model, tokens, pairs=...)"
            )
        if not difference(source, target_model) and not difference(to, source_model):
            if difference(source, source_model):
                raise ValueError(
                    f"{made}; the models came the other way round, from {described_model(source_model)} to "
                    f"{described_model(target_model)}: swap them, or fit the other direction with {fit}"
                )
    for side, meta, model in (("source", source, source_model), ("target", target, target_model)):
        wrong = difference(meta, model)
        if not wrong:
            continue
        if "basis" not in wrong:
            way = f"fit maps for these models with {fit}"
        elif side == "source" and meta["basis"] == "centered" and basis_of(model) == "raw":
            way = "convert the maps with translators.to_raw() (exact)"
        else:
            way = f"load it as the one fitted (center_writing_weights says which), or use {fit}"
        raise ValueError(f"{made}; the {side} model here is {described_model(model)}, {wrong}: {way}")
    for pair in pairs:
        if pair not in translators:
            raise ValueError(
                f"{made}; fitted are the pairs {list(translators.pairs)}, and {pair} is asked for: use one of these, "
                f"or add pairs=[..., {pair}] to fit_regression"
            )


def described(meta: Mapping[str, Any]) -> str:
    """A model of a record, for an error: name, width, depth."""
    width = f"d_model {meta['d_model']}, " if "d_model" in meta else ""
    return f"{meta.get('model', 'an unnamed model')!r} ({width}{meta['n_layers']} layers)"


def described_model(model: LensModel) -> str:
    """The same for a loaded model."""
    return described({"model": name_of(model), "d_model": d_model(model), "n_layers": n_layers(model)})


def difference(meta: Mapping[str, Any], model: LensModel) -> str | None:
    """Why a model is not the one of a record, or None; entries that the record lacks are not compared."""
    for key, got in (("d_model", d_model(model)), ("n_layers", n_layers(model))):
        if meta.get(key, got) != got:
            return f"which has {key} {got}"
    if "basis" in meta and (got := basis_of(model)) != meta["basis"]:
        return f"whose residual basis is {got} and not {meta['basis']}"
    if "fingerprint" in meta:
        if not same_model(meta["fingerprint"], fingerprint(model), dtype_of(model), meta.get("model_dtype")):
            return "whose readout behaves differently (another fingerprint)"
    elif "unembed_hash" in meta and unembedding_hash(model) != meta["unembed_hash"]:
        norm = Readout(model).norm_module
        scale, _ = gain(norm, d_model(model), torch.zeros((), dtype=dtype_of(model), device=device_of(model)))
        if bool((scale.float() - 1).abs().max() < 1e-3):  # a norm of ones may have been folded into W_U
            return "whose unembedding cannot be compared with the one of the file (its norm may be folded into it)"
        return "which has another unembedding (tuned-lens' hash of W_U)"
    return None


def unembedding_hash(model: LensModel) -> str:
    """The hash by which the tuned-lens package knows a model: of W_U printed to one decimal, all but its corners left out."""
    import hashlib

    import numpy

    w_u = model.W_U.detach().float().cpu().T  # type: ignore[attr-defined]
    return hashlib.sha256(numpy.array_str(w_u.numpy(), precision=1).encode()).hexdigest()


def check_tokenizers(a: LensModel, b: LensModel) -> bool:
    """Refuse two models that read the same token ids as different text. False where one has no tokenizer to compare.

    Special tokens that only one vocabulary has are no difference.
    """
    names = f"{name_of(a)!r} and {name_of(b)!r}"
    first, second = getattr(a, "tokenizer", None), getattr(b, "tokenizer", None)
    if first is None or second is None:
        sizes = [int(model.cfg.d_vocab) for model in (a, b)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{names} have vocabularies of {sizes[0]} and {sizes[1]} ids and not both a tokenizer to compare, so the "
                "same ids may mean different text: set model.tokenizer on both, or use models that share one"
            )
        return False
    ids = [tokenizer.encode(_SAMPLE, add_special_tokens=False) for tokenizer in (first, second)]
    words = [{i: piece for piece, i in tokenizer.get_vocab().items()} for tokenizer in (first, second)]
    differ = [i for i in words[0].keys() & words[1].keys() if words[0][i] != words[1][i]]
    for pieces, others, tokenizer in ((words[0], words[1], first), (words[1], words[0], second)):
        added = set(tokenizer.get_added_vocab().values())
        differ += [i for i in pieces.keys() - others.keys() if i not in added]
    if not differ and ids[0] == ids[1]:
        return True
    shown = [[text[i] for i in row] for row, text in zip(ids, map(token_text, (first, second), ids), strict=True)]
    example = ""
    if differ:
        text = [words[k].get(min(differ)) for k in (0, 1)]
        example = f"; of the ids, {len(differ)} differ, the first is {min(differ)}: {text[0]!r} and {text[1]!r}"
    raise ValueError(
        f"{names} have different tokenizers, so the same ids are different text: {_SAMPLE!r} is {shown[0]} {ids[0]} for "
        f"the first and {shown[1]} {ids[1]} for the second{example}. A map pairs states of the same token: use two "
        "models that share a tokenizer"
    )


def identity_of(model: LensModel) -> dict[str, Any]:
    """The entries of a file about a model, which `check_pair` compares."""
    about = {"model": name_of(model), "d_model": d_model(model)}
    dtype = str(dtype_of(model)).removeprefix("torch.")
    return about | {"model_dtype": dtype, "basis": basis_of(model), "fingerprint": fingerprint(model)}
