"""Which model a file is for: a behaviour of its readout, and the basis of its residual stream.

The same for folded, centred, HookedTransformer or bridge forms of one model: log-softmax is blind to centred
unembeddings,
and mean-removed residuals to centred writing weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses.hooks import installed, read
from tl_lenses.model import Batch, LensModel, d_model, device_of, dtype_of, forward, n_layers, name_of
from tl_lenses.sites import LayerOrSite
from tl_lenses.token_text import token_text
from tl_lenses.translators import Translators
from tl_lenses.unembed import Readout

_PROBES, _PROJECTIONS = 8, 4
_SAMPLE = "The capital of France is Paris."

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
        made = f"these translators stay within {_described(source)}"
        target = source if alone or "fingerprint" in source else {}
        fit = f"fit_regression({'model, tokens, pairs=...' if alone else 'source, tokens, to=target'})"
    else:
        made = f"these translators lead from {_described(source)} to {_described(to)}"
        target, fit = to, "fit_regression(source, tokens, to=target)"
        if alone:
            raise ValueError(
                f"{made}; expected these two models, got {_named(source_model)} alone: pass the other one as to=, "
                "or fit maps within it with fit_regression(model, tokens, pairs=...)"
            )
        if not _difference(source, target_model) and not _difference(to, source_model):
            if _difference(source, source_model):
                raise ValueError(
                    f"{made}; the models came the other way round, from {_named(source_model)} to "
                    f"{_named(target_model)}: swap them, or fit the other direction with {fit}"
                )
    for side, meta, model in (("source", source, source_model), ("target", target, target_model)):
        wrong = _difference(meta, model)
        if not wrong:
            continue
        if "basis" not in wrong:
            way = f"fit maps for these models with {fit}"
        elif side == "source" and meta["basis"] == "centered":
            way = "convert the maps with translators.to_raw() (exact)"
        else:
            way = f"load it as the one fitted (center_writing_weights says which), or use {fit}"
        raise ValueError(f"{made}; the {side} model here is {_named(model)}, {wrong}: {way}")
    for pair in pairs:
        if pair not in translators:
            raise ValueError(
                f"{made}; fitted are the pairs {list(translators.pairs)}, and {pair} is asked for: use one of these, "
                f"or add pairs=[..., {pair}] to fit_regression"
            )


def _described(meta: Mapping[str, Any]) -> str:
    width = f"d_model {meta['d_model']}, " if "d_model" in meta else ""
    return f"{meta.get('model', 'an unnamed model')!r} ({width}{meta['n_layers']} layers)"


def _named(model: LensModel) -> str:
    return _described({"model": name_of(model), "d_model": d_model(model), "n_layers": n_layers(model)})


def _difference(meta: Mapping[str, Any], model: LensModel) -> str | None:
    """Why a model is not the one of a record, or None; what the record leaves out is not compared."""
    for key, got in (("d_model", d_model(model)), ("n_layers", n_layers(model))):
        if meta.get(key, got) != got:
            return f"which has {key} {got}"
    if "basis" in meta and (got := basis_of(model)) != meta["basis"]:
        return f"whose residual basis is {got} and not {meta['basis']}"
    if "fingerprint" in meta:
        half = any(
            str(t).removeprefix("torch.") in ("float16", "bfloat16")
            for t in (dtype_of(model), meta.get("model_dtype", ""))
        )
        if not same_model(meta["fingerprint"], fingerprint(model), torch.float16 if half else torch.float32):
            return "whose readout behaves differently (another fingerprint)"
    return None


def check_tokenizers(a: LensModel, b: LensModel) -> bool:
    """Refuse two models that read the same token ids as different text. False where one has no tokenizer to compare.

    Special tokens that only one vocabulary has are no difference.

    Raises:
        ValueError: shows both tokenisations of a short text; or vocabularies of different size, without tokenizers.
    """
    names = f"{name_of(a)!r} and {name_of(b)!r}"
    one, other = getattr(a, "tokenizer", None), getattr(b, "tokenizer", None)
    if one is None or other is None:
        sizes = [int(model.cfg.d_vocab) for model in (a, b)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{names} have vocabularies of {sizes[0]} and {sizes[1]} ids and not both a tokenizer to compare, so the "
                "same ids may mean different text: set model.tokenizer on both, or use models that share one"
            )
        return False
    ids = [tokenizer.encode(_SAMPLE, add_special_tokens=False) for tokenizer in (one, other)]
    words = [{i: piece for piece, i in tokenizer.get_vocab().items()} for tokenizer in (one, other)]
    differ = [i for i in words[0].keys() & words[1].keys() if words[0][i] != words[1][i]]
    for mine, others, tokenizer in ((words[0], words[1], one), (words[1], words[0], other)):
        added = set(tokenizer.get_added_vocab().values())
        differ += [i for i in mine.keys() - others.keys() if i not in added]
    if not differ and ids[0] == ids[1]:
        return True
    shown = [[text[i] for i in found] for found, text in zip(ids, map(token_text, (one, other), ids), strict=True)]
    example = ""
    if differ:
        text = [words[k].get(min(differ)) for k in (0, 1)]
        example = f"; of the ids, {len(differ)} differ, the first is {min(differ)}: {text[0]!r} and {text[1]!r}"
    raise ValueError(
        f"{names} have different tokenizers, so the same ids are different text: {_SAMPLE!r} is {shown[0]} {ids[0]} for "
        f"the first and {shown[1]} {ids[1]} for the second{example}. A map pairs states of the same token: use two "
        "models that share a tokenizer"
    )
