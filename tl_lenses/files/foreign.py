"""Lenses of other packages as maps of ours. Each is told by what is in the file, not by its name.

| written by | matrix | is our row |
|---|---|---|
| tuned-lens (`config.json`, `params.pt`) | `i.weight` = D, residual before block i | i -> n_layers, W = I + D |
| jacobian-lens, TransformerLens, R-lens, J++ (`torch.save`) | `J[k]`, output of block k | k + 1 -> target block + 1 |
| a stack in safetensors (`[target + 1, d, d]`, or a tensor per block) | slot k, output of block k | k + 1 -> target block + 1 |
| linear shortcuts (`i_j.pickle`) | A, before block i to before block j | i -> j |
| selfie-adapters (`log_scale`, `bias`, ...) | `f(h) = e^s h / |h| + b` | source layer -> 0, of unit vectors |

Source: the packages' own code; Belrose et al. 2023, Gurnee et al. 2026 (Jacobian lens), Yom Din et al. 2023, 2602.10352 (SelfIE adapters).
"""

import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tl_lenses.files.maps import CONFIG, FORMAT, PARAMS, sha256
from tl_lenses.files.states import Notice

Matrices = dict[Any, Tensor]


@runtime_checkable
class HasJacobians(Protocol):
    """A live `JacobianLens`, of TransformerLens or of the jacobian-lens package."""

    jacobians: Mapping[int, Tensor]


@dataclass
class Maps:
    """Maps as they were found.

    Attributes:
        kind: the format, such as "tuned-lens".
        weights: the full maps W by `(source, target)`, in our layers; None as a target stands for the final residual
            of a model whose depth is not known yet.
        minus_identity: `weights` are W - I.
        biases: the same of b; a map that is not in it has none.
        n_layers: of the model, where it is known.
        meta: what the file says of itself.
        unknown: what it does not say, in words.
    """

    kind: str
    weights: Matrices
    biases: Matrices = field(default_factory=dict)
    n_layers: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    minus_identity: bool = False


@dataclass(frozen=True)
class Given:
    """What the caller says where a file does not: `n_layers`, and layers in our count."""

    n_layers: int | None = None
    target_layer: int | None = None
    source_layer: int | None = None


def read_foreign(place: Any, given: Given = Given()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config, as `load_maps` gives them, of a file, a folder, or a live `JacobianLens` of TransformerLens.

    Raises:
        ValueError: a format that is not known, or one that says something else than `given`; matrices that are missing,
            not square, of another width or not finite; a file that holds more than plain tensors. Says which file.

    Warns:
        UserWarning: names all that the file does not say.
    """
    live = not isinstance(place, (str, Path))
    name = f"this {type(place).__name__}" if live else str(place)
    try:
        if live:
            maps = _jacobians(_live(place), given)
        else:
            maps = _folder(Path(place), given) if Path(place).is_dir() else _file(Path(place), given)
        read = _checked(maps, given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if maps.unknown:
        warnings.warn(f"{name} ({maps.kind}) does not say {'; '.join(maps.unknown)}", Notice, stacklevel=4)
    return read


def _checked(maps: Maps, given: Given) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The maps as one tensor: square, of one width, finite, between layers that the model has."""
    if not maps.weights:
        raise ValueError("holds no matrix")
    n_layers = maps.n_layers
    if n_layers is None or given.n_layers is not None and given.n_layers != n_layers:
        raise ValueError(f"is of a model with {n_layers} layers, and n_layers={given.n_layers} was asked for")
    d = next(iter(maps.weights.values())).shape[-1]
    weights, biases, rows = [], [], []
    for (source, target), w in maps.weights.items():
        b = maps.biases.get((source, target), torch.zeros(d))
        target = n_layers if target is None else target
        for name, x, shape in (("matrix", w, [d, d]), ("bias", b, [d])):
            if list(x.shape) != shape:
                raise ValueError(f"the {name} of layer {source} should have shape {shape}, got {list(x.shape)}")
            if not x.is_floating_point():
                raise ValueError(f"the {name} of layer {source} should hold floating point numbers, got {x.dtype}")
            if not x.isfinite().all():
                half = " (float16 holds numbers to 65,504: look for a copy in float32)" if x.dtype == torch.float16 else ""
                raise ValueError(f"the {name} of layer {source} has numbers that are not finite{half}")
        if not 0 <= source <= n_layers or not 0 <= target <= n_layers:
            raise ValueError(f"has a map from layer {source} to {target}, and its model has layers 0..{n_layers}")
        if source == target and maps.kind != "selfie_adapter_v1":  # a target's own slot, which is not stored
            if not torch.allclose(w.float(), torch.zeros(d, d) if maps.minus_identity else torch.eye(d), atol=1e-2):
                raise ValueError(f"the matrix of layer {source} leads to that layer itself and is not the identity")
            continue
        rows.append([source, target])
        weights.append(w.float())
        biases.append(b.float())
    if not rows:
        raise ValueError("holds no matrix but the identity of its target")
    delta = torch.stack(weights) - (0 if maps.minus_identity else torch.eye(d))
    meta = {"basis": "raw", "d_model": d, "format": maps.kind, **maps.meta}
    plain_meta = json.loads(json.dumps(meta, default=str))
    config = {"n_layers": n_layers, "d_in": d, "d_out": d, "rows": rows, "meta": plain_meta}
    return {"delta": delta, "biases": torch.stack(biases)}, config


# --- places


def _folder(path: Path, given: Given) -> Maps:
    names = sorted(entry.name for entry in path.iterdir())
    if CONFIG in names and PARAMS in names:
        return _tuned_lens(path, given)
    if shortcuts := [path / name for name in names if re.fullmatch(r"\d+_\d+\.(pickle|pkl|pt)", name)]:
        return _shortcuts(shortcuts, given)
    lenses = [name for name in names if name.endswith((".pt", ".safetensors"))]
    if len(lenses) == 1:
        return _file(path / lenses[0], given)
    raise ValueError(
        f"is not a lens: expected a folder of tl_lenses ({FORMAT}), of tuned-lens ({CONFIG} and {PARAMS}), of linear shortcuts "
        f"(0_12.pickle, ...) or with one .pt or .safetensors file, got {names[:6] or 'an empty folder'}"
    )


def _file(path: Path, given: Given) -> Maps:
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}")
    maps = _safetensors(path, given) if _is_safetensors(path) else _pickled(path, given)
    maps.meta["converted_from"] = {"file": path.name, "sha256": sha256(path)}
    return maps


def _is_safetensors(path: Path) -> bool:
    """Told by the beginning, a length and a JSON object; a file of the name that does not begin so is damaged."""
    with path.open("rb") as file:
        head = file.read(9)
    is_one = head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    return is_one or path.suffix == ".safetensors" and head[:2] != b"PK"  # torch.save writes a zip file


def _pickled(path: Path, given: Given) -> Maps:
    """What `torch.save` or `pickle` wrote."""
    content = plain(path)
    if isinstance(content, Tensor) and (pair := re.fullmatch(r"(\d+)_(\d+)", path.stem)):
        return _shortcuts([path], given, {(int(pair[1]), int(pair[2])): content})
    if isinstance(content, Mapping):
        keys = set(content)
        if keys & {"J", "jacobian_sum"} or isinstance(content.get("parameters"), Mapping):
            return _jacobians(content, given)
        if "projection_state" in keys:
            config = content.get("config")
            record = {**content, **(config if isinstance(config, Mapping) else {})}
            return _selfie(dict(content["projection_state"]), record, given)
        if keys & {"lens", "optim"} and isinstance(content.get("lens"), Mapping):
            raise ValueError(
                f"is a training snapshot of tuned-lens: use the folder that it saved at the end ({CONFIG} and {PARAMS})"
            )
        if any(str(key).startswith(("input_adapter.", "layer_adapters.", "probe.")) for key in keys):
            raise ValueError("is in the format of tuned-lens 0.0.5 and older: save it again with a newer one")
        if any(re.fullmatch(r"\d+\.weight", str(key)) for key in keys):
            raise ValueError(f"holds the maps of a tuned lens: give its folder, which has {CONFIG} too")
    kind = f"a dict with {sorted(map(str, content))[:6]}" if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(
        f"holds no lens that we know: expected 'J' or 'jacobian_sum' (Jacobian lenses), 'parameters' (J++), 'projection_state' "
        f"(SelfIE adapters) or a tensor named like 0_12.pickle (linear shortcuts), got {kind}"
    )


# --- formats


def _tuned_lens(path: Path, given: Given) -> Maps:
    """`config.json` and `params.pt` (tuned-lens 0.1 and newer). The maps are of raw Hugging Face weights."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        d, n_layers = int(config["d_model"]), int(config["num_hidden_layers"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / CONFIG} is not of tuned-lens: {type(error).__name__} {error}") from None
    state = plain(path / PARAMS)
    expected = {f"{i}.{part}" for i in range(n_layers) for part in ("weight", "bias")}
    if not config.get("bias", True):
        expected = {name for name in expected if name.endswith("weight")}
    if not isinstance(state, Mapping) or set(state) != expected:
        got = set(state) if isinstance(state, Mapping) else set()
        missing, more = sorted(expected - got)[:3], sorted(map(str, got - expected))[:3]
        raise ValueError(
            f"{path / PARAMS} should hold the {n_layers} maps that {CONFIG} names: missing are {missing}, and {more} are too many"
        )
    wrong = [name for name, x in state.items() if list(x.shape) != [d] * x.ndim]
    if wrong:
        raise ValueError(f"{path / PARAMS}: {wrong[0]} has shape {list(state[wrong[0]].shape)}, and {CONFIG} says width {d}")
    names = {"base_model_name_or_path": "model", "base_model_revision": "revision", "unembed_hash": "unembed_hash"}
    meta = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    rows = {(i, n_layers): i for i in range(n_layers)}
    return Maps(
        "tuned-lens",
        {row: state[f"{i}.weight"] for row, i in rows.items()},
        {row: state[f"{i}.bias"] for row, i in rows.items() if f"{i}.bias" in state},
        n_layers,
        {"fitter": "tuned", **meta, "converted_from": {"file": PARAMS, "sha256": sha256(path / PARAMS)}},
        ["on which text it was trained"] + ["of which model it is"] * ("model" not in meta),
        minus_identity=True,
    )  # fmt: skip


def _live(lens: Any) -> dict[str, Any]:
    """A `JacobianLens` in memory as its file would be."""
    if not isinstance(getattr(lens, "jacobians", None), Mapping):
        raise TypeError(f"expected a path, a Hub name or a JacobianLens, got a {type(lens).__name__}")
    metadata = {"estimator": getattr(lens, "estimator", None), **dict(getattr(lens, "metadata", None) or {})}
    return {"J": lens.jacobians, "n_prompts": getattr(lens, "n_prompts", None), "metadata": metadata}


def _jacobians(content: Mapping[str, Any], given: Given) -> Maps:
    """A Jacobian lens in one of its forms. J[k] maps the output of block k to the output of the target block."""
    sums, record = content.get("jacobian_sum"), _record(content)
    if sums is not None:
        n = content.get("n_done", content.get("n_prompts", 0))
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"a checkpoint of a fit over {n!r} prompts has no mean yet")
        matrices = {k: J.float() / n for k, J in sums.items()}
        record["n_prompts"] = n
    else:
        parameters = content.get("parameters")
        matrices = content["J"] if "J" in content else parameters.get("jacobians")  # type: ignore[union-attr]
    if not isinstance(matrices, Mapping) or not all(isinstance(J, Tensor) for J in matrices.values()):
        raise ValueError(f"expected a matrix per block, got {type(matrices).__name__}")
    matrices = {int(k): J for k, J in matrices.items()}
    layers = content.get("source_layers")
    if layers is not None and sorted(map(int, layers)) != sorted(matrices):
        raise ValueError(f"says source_layers {sorted(layers)} and has matrices of {sorted(matrices)}: copy it again")
    width = content.get("d_model")
    if width is not None and any(list(J.shape) != [width, width] for J in matrices.values()):
        raise ValueError(f"says d_model {width} and has matrices of {sorted({tuple(J.shape) for J in matrices.values()})}")
    return _blocks(matrices, record, given)


def _record(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its fit, from the places where the packages put it, under one name each."""
    record: dict[str, Any] = {}
    for part in ("config", "provenance", "metadata"):
        more = content.get(part)
        more = dict(more) if isinstance(more, Mapping) else {}
        if isinstance(more.get("config_json"), str):
            try:
                more = {**json.loads(more["config_json"]), **more}
            except ValueError:
                pass
        record |= more
    record |= {k: v for k, v in content.items() if isinstance(v, (str, int, float)) and not isinstance(v, bool)}
    if "target_layer" in content:
        record["target_layer"] = content["target_layer"]
    names = {
        "model": ("model_name", "model_id", "model"), "revision": ("model_revision", "revision"), "n_layers": ("n_layers", "num_layers"),
        "corpus": ("corpus", "dataset_id", "dataset"), "n_prompts": ("n_prompts", "n_done"), "estimator": ("estimator", "method", "lens_type"),
        "skip_first": ("skip_first", "skip_first_positions"), "target_layer": ("target_layer",),
    }  # fmt: skip
    first = lambda keys: next(((True, record[key]) for key in keys if key in record), (False, None))
    return {name: value for name, (there, value) in ((n, first(keys)) for n, keys in names.items()) if there}


def _blocks(matrices: dict[int, Tensor], record: dict[str, Any], given: Given) -> Maps:
    """Matrices by block as rows between our layers; decides what the depth and the target are, or refuses to."""
    if not matrices:
        raise ValueError("holds no matrix")
    last = max(matrices)
    depth, unknown = record.pop("n_layers", None), []
    depth = given.n_layers if depth is None else int(depth)
    says_target, block = "target_layer" in record, record.pop("target_layer", None)
    if given.target_layer is not None:
        target = given.target_layer
        if block is not None and block >= 0 and block + 1 != target:
            raise ValueError(
                f"maps to the output of block {block}, which is layer {block + 1}, and target_layer={target} was asked for"
            )
    elif block is not None and block < 0:
        target = None if depth is None else depth + 1 + int(block)
    elif block is not None:
        target = int(block) + 1
    else:
        target = depth
        if not says_target:
            unknown.append("which layer its maps end in: taken for the final residual, the default of those who write this format")
            if depth is not None and last + 2 != depth:
                raise ValueError(
                    f"has matrices up to block {last}, does not say where they end, and the model has {depth} layers: a lens of all "
                    f"blocks that ends in the final residual would have them up to {depth - 2}. Pass target_layer={depth} (the final residual) or {depth - 1} (before the last block)"
                )
    if depth is None:
        if target is not None or block is not None:
            raise ValueError(
                f"ends at the output of block {block if block is not None else target - 1}, and does not say how many layers the model has: pass n_layers="  # type: ignore[operator]
            )
        depth = last + 2
        unknown.append(f"how many layers its model has: taken for {depth}, one more than its blocks (n_layers= says otherwise)")
    for name, words in (("model", "of which model it is"), ("corpus", "on which text it was fitted")):
        unknown += [words] * (record.get(name) is None)
    estimator = str(record.get("estimator") or "jacobian_lens").lower()
    fitter = "relevance" if re.match(r"relevance|r[-_ ]?lens", estimator) else "jacobian"
    rows = {(k + 1, target): J for k, J in matrices.items()}
    return Maps("jacobian-lens", rows, n_layers=depth, meta={"fitter": fitter, **record}, unknown=unknown)


def _safetensors(path: Path, given: Given) -> Maps:
    """A SelfIE adapter, or a stack of Jacobians; a JSON file of the same name beside it may say more."""
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except Exception as error:  # safetensors has its own errors
        raise ValueError(f"is damaged or no safetensors file ({str(error).splitlines()[0]}): copy it again") from None
    record: dict[str, Any] = dict(header)
    beside = path.with_suffix(".json")
    for text in (header.get("config_json"), beside.read_text(encoding="utf-8") if beside.is_file() else None):
        try:
            more = json.loads(text or "{}")
        except ValueError as error:
            raise ValueError(f"{beside if beside.is_file() else path}: its JSON is damaged: {error}") from None
        record |= more if isinstance(more, dict) else {}
    if "projection" in record or "projection_type" in record or {"log_scale", "U"} & set(tensors):
        return _selfie(tensors, record, given)
    if len(tensors) == 1 and (stack := next(iter(tensors.values()))).ndim == 3:
        return _stack(stack, _record({"metadata": record}), given)
    numbers = {name: re.findall(r"\d+", name) for name in tensors}
    if not tensors or any(len(n) != 1 for n in numbers.values()) or any(x.ndim != 2 for x in tensors.values()):
        raise ValueError(
            f"expected one tensor [n, d, d] or a matrix per block with its number in its name, got {sorted(tensors)[:6]}"
        )
    return _blocks({int(numbers[name][0]): x for name, x in tensors.items()}, _record({"metadata": record}), given)


def _stack(stack: Tensor, record: dict[str, Any], given: Given) -> Maps:
    """`[target + 1, d, d]`: slot k is block k's Jacobian, and the last is the target's own, the identity."""
    last = len(stack) - 1
    if stack.shape[1] != stack.shape[2] or not torch.allclose(stack[last].float(), torch.eye(stack.shape[1]), atol=1e-3):
        raise ValueError(
            f"a stack {list(stack.shape)} should end in the identity, the target's own slot; which blocks it holds is not known"
        )
    if record.setdefault("target_layer", last) is None:
        record["target_layer"] = last
    return _blocks({k: stack[k] for k in range(last)}, record, given)


def _selfie(tensors: dict[str, Tensor], record: Mapping[str, Any], given: Given) -> Maps:
    """`f(h) = e^s u + V U^T u + b` with u = h / |h| (or h, where it was trained so), put at the embeddings of the target."""
    if missing := [f"{name}=" for name in ("source_layer", "n_layers") if getattr(given, name) is None]:
        raise ValueError(f"a SelfIE adapter does not say which layer's vectors it reads: pass {' and '.join(missing)}")
    if unknown := sorted(set(tensors) - {"log_scale", "weight", "U", "V", "bias"}):
        raise ValueError(f"a SelfIE adapter with {unknown} is of a projection that we do not know")
    tensors = {name: x.float() for name, x in tensors.items()}
    widths = [x.shape[0] for name, x in tensors.items() if name in ("bias", "U", "weight")]
    d = widths[0] if widths else int(record.get("model_dim") or 0)
    if not d:
        raise ValueError("the SelfIE adapter does not say its width (model_dim)")
    weight = tensors["weight"] if "weight" in tensors else torch.zeros(d, d)
    if "log_scale" in tensors:
        weight = weight + torch.eye(d) * tensors["log_scale"].exp()
    if "U" in tensors:
        weight = weight + tensors["V"] @ tensors["U"].T
    unit: Any = str(record.get("normalize_input", "true")).lower() == "true"
    if isinstance(projection := record.get("projection"), Mapping):
        unit = projection.get("normalize_input", True)
    row = (given.source_layer, 0)
    meta = {"fitter": "selfie", "unit": bool(unit), **{k: record[k] for k in ("model_name", "global_step") if k in record}}
    biases = {row: tensors["bias"]} if "bias" in tensors else {}
    unknown = ["which layer's vectors it reads, nor the depth of its model: as you record"]
    return Maps("selfie_adapter_v1", {row: weight}, biases, given.n_layers, meta, unknown)


def _shortcuts(paths: list[Path], given: Given, read: Matrices | None = None) -> Maps:
    """`i_j.pickle`: A with `h_j ~ A h_i`, no bias; the last j is the final residual, before the norm."""
    rows = {tuple(map(int, path.stem.split("_"))): path for path in paths}
    maps = dict(read or {row: plain(path) for row, path in rows.items()})
    for row, matrix in maps.items():
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            raise ValueError(f"{rows[row]} should hold one matrix [d, d], got {type(matrix).__name__}")
    depth, unknown = given.n_layers, ["of which model they are", "on which text they were fitted"]
    if depth is None:
        depth = max(j for _, j in maps)
        unknown.insert(0, f"how many layers the model has: taken for {depth}, where the longest ends (n_layers= says otherwise)")
    return Maps("linear-shortcut", maps, n_layers=depth, meta={"fitter": "shortcut"}, unknown=unknown)


# --- pickles of tensors and nothing else: reading any other one runs what its writer put into it

_HARMLESS = {
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}  # fmt: skip


class _Plain(pickle.Unpickler):
    """A pickle of tensors and numbers: any other name in it is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def plain(path: Path) -> Any:
    """The content of a file of `torch.save` or `pickle`, where it is tensors, numbers, text, lists and dicts alone."""
    try:
        with warnings.catch_warnings(), path.open("rb") as file:  # of a path torch would look at the suffix
            warnings.simplefilter("ignore")  # that it may not know a pickle's protocol, before it fails or does not
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        try:
            with path.open("rb") as file:
                content = _Plain(file).load()
        except Exception as second:
            reason = str(second if "names" in str(second) else error).splitlines()
            raise ValueError(
                f"{path} is damaged, or holds more than plain tensors, which reading it would run "
                f"({reason[0] if reason else type(error).__name__}): ask for a copy in safetensors, or with tensors alone"
            ) from None
    return torch.as_tensor(content) if type(content).__module__ == "numpy" else content
