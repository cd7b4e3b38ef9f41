"""States of a text kept on disk: what a fit needs of a model, once, for as many fits and passes as are wanted."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tl_lenses import files
from tl_lenses.checks import one_of, several, whole_number
from tl_lenses.decode import passed
from tl_lenses.hooks import Hook, checked_hooks
from tl_lenses.identity import identity_of
from tl_lenses.layers import LayerOrSite, canonical
from tl_lenses.model import LensModel, check_model, n_layers, name_of, prepared
from tl_lenses.progress import progress
from tl_lenses.sites import site
from tl_lenses.text.batches import Text
from tl_lenses.tokens import Batch, used_positions

SHARD = 2**28  # bytes of a shard, about
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@torch.no_grad()
def capture(
    model: LensModel,
    tokens: Any,
    layers: Iterable[LayerOrSite] | None = None,
    to: str | Path = "states",
    *,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    shard: tuple[int, int] = (0, 1),
    shard_tokens: int | None = None,
    hooks: Iterable[Hook] = (),
    show_progress: bool | None = None,
) -> Path:
    """Store the states of a text, for `fit_regression`, `fit_tuned` and `evaluate`, which take the folder in place of text.

    A tuned lens is trained on pairs (h_l, h_L) with the model's norm and W_U: with these on disk a pass over the text costs no
    forward pass. Stored as they are computed, they give the maps of a fit on the text itself, bit for bit where that fit's
    forward passes have the same rows.

    Args:
        tokens: as of a fit: `[n, seq]`, `token_batches(...)`, or an iterable of batches.
        layers: layers or sites, `0..n_layers-1` by default; the final residual is always stored.
        to: the folder. Shards that are there stay, so that the same call again makes the missing ones.
        dtype: of the stored states; the model's own by default.
        shard: `(i, n)`: make every n-th shard from the i-th on, 0 <= i < n. Each of n processes or machines reads the text and runs
            the model on its own shards, without a word to the others.
        shard_tokens: tokens of a shard, cut at batches; by default about 256 MB.
        hooks: interventions under which to run.

    Returns:
        The folder. `docs/states.md` has its format, which other engines can write.

    Raises:
        ValueError: the folder holds states of another model, text or settings; states that are not finite, also in the type in which
            they are stored; an unknown layer.
        TypeError: a setting of the wrong type.

    Example:
        >>> tll.capture(model, text, layers=[4, 8], to="states")                           # doctest: +SKIP
        >>> tll.fit_tuned(model, "states", steps=1000, layers=[4, 8])                    # doctest: +SKIP
    """
    check_model(model, what="a capture")
    folder, depth = files.as_path(to), n_layers(model)
    number, of = _share(shard)
    asked = range(depth) if layers is None else several("layers", layers)
    sites = list(dict.fromkeys(canonical(site(model, layer), depth) for layer in (*asked, depth)))
    hooks, text = checked_hooks(model, hooks), Text.of(tokens).to_run("capture")
    stored = None if dtype is None else TYPES[one_of("dtype", dtype, tuple(TYPES))]
    identity = identity_of(model)
    about = {
        **identity, "n_layers": depth, "sites": sites, "hooks": len(hooks), "bos": text.bos,
        "dtype": identity["model_dtype"] if dtype is None else dtype,
    }  # fmt: skip
    if shard_tokens is not None:
        shard_tokens = whole_number("shard_tokens", shard_tokens, least=1)
    else:
        size = (stored or torch.float32).itemsize
        shard_tokens = max(1, SHARD // (size * len(sites) * int(model.cfg.d_model)))
    _is_there(folder, about)
    hashes, ratio, n_tokens = [], None, 0
    with progress(total=text.n_batches, desc="capturing", show=show_progress) as bar:
        for i, batches in enumerate(_groups(text, shard_tokens)):
            flat = [_flat(batch) for batch in batches]
            ids, positions = (torch.cat(parts).to(torch.int32) for parts in zip(*flat, strict=True))
            hashes.append(files.text_hash(ids, positions))
            ratio, n_tokens = batches[-1].bytes_per_token, n_tokens + len(ids)
            of_shard = {
                **about, "text": hashes[-1], "bytes_per_token": ratio,
                "batches": None if text.ids is not None else [len(batch.tokens) for batch in batches],
            }  # fmt: skip
            file = files.shard_file(folder, i)
            if i % of == number and not _is_there(file, of_shard):
                parts = [_states(model, batch, sites, hooks, stored) for batch in batches]
                states = {name: torch.cat([part[name] for part in parts]) for name in sites}
                files.write_shard(file, {"tokens": ids, "positions": positions, **states}, of_shard)
            bar.update(len(batches))
    whole = {
        **about, "text": files.hash_of_shards(hashes), "bytes_per_token": ratio, "batches": text.ids is None,
        "shards": len(hashes), "tokens": n_tokens,
    }  # fmt: skip
    _is_there(folder, whole)
    files.write_index(folder, whole)
    return folder


def _share(shard: Any) -> tuple[int, int]:
    """`(i, n)`, checked."""
    if not (isinstance(shard, (tuple, list)) and len(shard) == 2):
        raise TypeError(f"shard must be (i, n), the i-th of n shares counted from 0, got {shard!r:.80}")
    of = whole_number("n of shard=(i, n)", shard[1], least=1)
    return whole_number("i of shard=(i, n)", shard[0], least=0, most=of - 1), of


def _groups(text: Text, n_tokens: int) -> Iterator[list[Batch]]:
    """The batches of each shard."""
    group: list[Batch] = []
    for batch in text:
        group.append(batch)
        if sum(int(used_positions(b, False).sum()) for b in group) >= n_tokens:
            yield group
            group = []
    if group:
        yield group


def _flat(batch: Batch) -> tuple[Tensor, Tensor]:
    """Ids and positions of the real tokens, row after row."""
    real = used_positions(batch, False)
    return batch.tokens[real].cpu(), (real.cumsum(1) - 1)[real].cpu()


def _states(model: LensModel, batch: Batch, sites: list[str], hooks: list[Hook], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """States of the real tokens by site `[n, d]`, on the CPU."""
    batch = prepared(model, batch)
    seen, _ = passed(model, batch, {name: name for name in sites}, hooks, fn=lambda x: x.flatten(2))
    real, states = used_positions(batch, False), {}
    for name, x in seen.items():
        own = x[real.to(x.device)]
        states[name] = own.to(own.dtype if dtype is None else dtype).cpu()
        if not states[name].isfinite().all():
            where = f"{name_of(model)!r} overflows there" if not own.isfinite().all() else f"{dtype} does not hold them"
            raise ValueError(f"states at {name!r} are not finite, {where}: store bfloat16 or float32")
    return states


def _is_there(place: Path, about: dict[str, Any]) -> bool:
    """Whether a shard or folder is there, whole; refuses one of another capture, whose states would be mixed with these."""
    there = files.about_states(place)
    if there is None:
        return False
    for key, value in about.items():
        if there.get(key) != value and key not in ("fingerprint", "bytes_per_token"):
            differs = f"{key} {there.get(key)!s:.60} and not {value!s:.60}"
            other = "another text or shard_tokens" if key == "text" else differs
            raise ValueError(f"{place} is of another capture, with {other}: choose another folder, or remove it")
    return True
