"""One run read at many layers: what lenses say at its positions, some of them at a time, never `[layers, positions, d_vocab]`.

The logits of `ROOM` bytes exist at a time, of the teacher and of several layers and lenses at the same positions. One product makes
them all, since a product reads and rearranges all of `W_U` however few rows it has, and it is made a block of columns at a time
(`Readout.logits`). Statistics then look at `PIECE` bytes, which stay in the processor's cache between their passes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.hooks import Hook, read, run
from tl_lenses.identity import described, described_model, difference
from tl_lenses.layers import LayerOrSite, as_layer, canonical, layer_site, resolve_layer, site_layer
from tl_lenses.model import LensModel, device_of, dtype_of, hooked, n_layers, prepared
from tl_lenses.progress import progress
from tl_lenses.sites import site
from tl_lenses.tokens import Batch, used_positions
from tl_lenses.unembed import Readout

# Bytes of logits that exist at a time: 128 rows of 262,144 in fp32.
ROOM = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}
# Bytes of a distribution that statistics are computed of at a time.
PIECE = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
# Rows of one position in a product: more would leave fewer positions, and each position's teacher is worked on once for them.
ROWS = 6


@runtime_checkable
class Decoder(Protocol):
    """A lens at one layer, up to the unembedding."""

    def hidden(self, resid: Tensor) -> Tensor:
        """What the unembedding reads, `[n, ...] -> [n, width]`."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """Scores of tokens beside what a lens says on average, as `tll.marginals` gives them."""

    def score(self, name: str, layer: int | str, logp: Float[Tensor, "*pos d_vocab"]) -> Float[Tensor, "*pos d_vocab"]:
        """Of a lens' log-probabilities at a layer."""
        ...


@dataclass(frozen=True)
class Output:
    """What a run gave: its unembedding's input, or its logits where a hook may change them."""

    x: Float[Tensor, "batch pos _"]  # `[batch, pos, width]`, or `[batch, pos, d_vocab]`
    hidden: bool  # whether `x` is the unembedding's input

    def logits(self, model: LensModel) -> Float[Tensor, "batch pos d_vocab"]:
        """All of them."""
        return Readout(model).whole(self.x) if self.hidden else self.x


def passed(
    model: LensModel,
    batch: Batch,
    sites: Mapping[Any, str],
    hooks: Iterable[Hook] = (),
    *,
    fn: Callable[[Tensor], Tensor] | None = None,
    readout: Readout | None = None,
) -> tuple[dict[Any, Tensor], Output]:
    """Activations and output of one forward pass, or of none where the batch brings stored states.

    Fits and evaluations read a model nowhere else.

    Args:
        batch: of `prepared`.
        sites: hook names by the keys of the result.
        hooks: run before the reads.
        fn: applied to each activation; stored ones have their heads flattened already.
        readout: of the model, where one is at hand.

    Raises:
        ValueError: hooks on stored states; states of another model; a site that was not stored.
    """
    readout = Readout(model) if readout is None else readout
    if batch.states is not None:
        return _stored(model, batch, sites, hooks, readout)
    seen: dict[Any, Tensor] = {}
    hidden: list[Tensor] = []
    hooks = [*hooks, *[read(name, seen, key, fn) for key, name in sites.items()]]
    with readout.without_logits(hidden, hooks):
        logits = run(model, batch.tokens, hooks, attention_mask=batch.attention_mask)
    return seen, Output(hidden[0], True) if hidden else Output(logits, False)


def _stored(
    model: LensModel, batch: Batch, sites: Mapping[Any, str], hooks: Iterable[Hook], readout: Readout
) -> tuple[dict[Any, Tensor], Output]:
    states, depth = batch.states, n_layers(model)
    if list(hooks) or hooked(model):
        raise ValueError(
            f"hooks do not reach the states of {states.name}, whose run is over: pass text, or tll.capture(..., hooks=hooks)"
        )
    _check_stored(model, states)
    device = device_of(model)
    seen = {key: states.read(canonical(name, depth)).to(device) for key, name in sites.items()}
    return seen, Output(readout.hidden(states.read(layer_site(depth, depth)).to(device)), True)


# The folders whose states were compared with a model.
_COMPARED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def _check_stored(model: LensModel, states: Any) -> None:
    """Refuse states of another model: by what their folder says, and by a pass over their first row, once.

    Raises:
        ValueError: says what differs.
    """
    compared, about = _COMPARED.setdefault(model, set()), states.about
    if states.about is None or states.name in compared:
        return
    if wrong := difference(about, model):
        raise ValueError(
            f"the states of {states.name} are of {described(about)}; this model is {described_model(model)}, {wrong}: capture them with it"
        )
    # Another pass would have the other processes of a sharded model wait, and hooks may be different ones in each run.
    if not about.get("hooks") and not any(hasattr(p, "full_tensor") for p in model.parameters()):  # type: ignore[attr-defined]
        row = states.first_row()
        here, _ = passed(model, prepared(model, Batch(*row)), {site: site for site in about["sites"]})
        half = "float32" not in about["dtype"] or dtype_of(model).itemsize < 4
        for site, live in here.items():
            live, kept = live.flatten(2).double().cpu(), row.states.read(site).double()
            off = float(((live - kept).norm(dim=-1) / live.norm(dim=-1).clamp_min(1e-9)).median())
            if not off < (0.1 if half else 0.01):
                raise ValueError(
                    f"the states of {states.name} at {site!r} differ from this model's by {off:.0%} of their length, on the first row: "
                    "expected the residual before each block, and the last one before the final norm; see docs/states.md"
                )
    compared.add(states.name)


def batches_to_read(
    model: LensModel, text: Iterable[Batch], skip_first: bool, desc: str, show: bool | None, size: Any = None
) -> Iterator[tuple[Batch, Bool[Tensor, "batch pos"]]]:
    """Batches with a position that counts, as they will run, and which positions count; `size`, a `BytesPerToken`, sees all of them."""
    for batch in progress(text, desc=desc, show=show):
        ready = prepared(model, batch)
        used = used_positions(ready, skip_first)
        if size is not None:
            size.add(batch.bytes_per_token, ready, used)
        if used.any():
            yield ready, used


@dataclass(frozen=True)
class Reading:
    """Residuals and output of one run at the positions that are used."""

    rows: Sequence[int | str]  # layers `0..n_layers` and sites
    states: Mapping[Any, Tensor]  # residual of each row, `[batch, pos, ...]`
    where: Int[Tensor, " n"]  # the used positions, as indices into `batch * pos`
    depth: int
    output: Output  # the run's output
    teacher: Output  # output of the run to compare with; usually `output`

    def is_model(self, row: int | str) -> bool:
        """Whether a row is the model's own output, interventions on the final norm included."""
        return row == self.depth or (isinstance(row, str) and site_layer(row) == self.depth)


@dataclass(frozen=True)
class Chunk:
    """Some rows of a reading at some of its positions."""

    part: slice  # which of the used positions
    at: Int[Tensor, " chunk"]  # the same as indices into `batch * pos`
    logits: Mapping[int, Mapping[str, Float[Tensor, "chunk d_vocab"]]]  # `[row][lens name]`, each `[chunk, d_vocab]`
    # logp, p: the teacher's log-probabilities and probabilities
    logp: Float[Tensor, "chunk d_vocab"]
    p: Float[Tensor, "chunk d_vocab"]
    first: bool  # whether these positions were not in a chunk before
    rooms: S.Rooms  # for what is computed of it

    def distribution(
        self, logits: Float[Tensor, "chunk d_vocab"], name: str = ""
    ) -> tuple[Float[Tensor, "chunk d_vocab"], Float[Tensor, "chunk d_vocab"]]:
        """Log-probabilities and probabilities of some of `logits`; the next call with this name overwrites them."""
        return S.distribution(logits, (self.rooms.like(f"logp {name}", logits), self.rooms.like(f"p {name}", logits)))


def read_run(
    model: LensModel, batch: Batch, rows: Sequence[int | str], hooks: Iterable[Hook], used: Bool[Tensor, "batch pos"],
    *, clean_teacher: bool = False,
) -> Reading:  # fmt: skip
    """One forward pass with these hooks; with `clean_teacher` one more without them, to compare with."""
    depth = n_layers(model)
    keys = [row if isinstance(row, str) else resolve_layer(as_layer(row), depth) for row in rows]
    states, output = passed(model, batch, {key: site(model, key) for key in keys}, hooks)
    teacher = passed(model, batch, {})[1] if clean_teacher else output
    return _checked(model, Reading(rows, states, _places(used), depth, output, teacher), used)


def read_cache(model: LensModel, batch: Batch, rows: Sequence[int | str], cache: Any, used: Bool[Tensor, "batch pos"]) -> Reading:
    """The residuals of an `ActivationCache` instead of a run."""
    depth = n_layers(model)
    if not (hasattr(cache, "keys") and hasattr(cache, "__getitem__")):
        raise TypeError(f"cache must be an ActivationCache, of model.run_with_cache(tokens), got {type(cache).__name__}")
    states = {row: _cached(model, cache, row, batch) for row in rows}
    output = Output(Readout(model).hidden(_cached(model, cache, depth, batch)), True)
    return _checked(model, Reading(rows, states, _places(used), depth, output, output), used)


def _places(used: Tensor) -> Tensor:
    return used.flatten().nonzero()[:, 0]


def _checked(model: LensModel, reading: Reading, used: Tensor) -> Reading:
    for row in reading.rows:
        if not reading.states[row][used].isfinite().all():
            raise ValueError(
                f"the residual at {site(model, row)!r} has values that are not finite: the model overflows there "
                "(try float32 or bfloat16)"
            )
    return reading


def decode(
    reading: Reading,
    decoders: Mapping[str, Sequence[Decoder]],
    readout: Readout,
    chunk_size: int | None = None,
    rooms: S.Rooms | None = None,
) -> Iterator[Chunk]:
    """Every row at every used position, in chunks that are looked at before the next is asked for.

    Args:
        chunk_size: positions whose logits exist at a time; by default as many as fit `ROOM` with a few rows of each.
        rooms: of a loop over several readings, so that all of them write into the same memory.
    """
    w_u, _ = readout.weights()
    d_vocab = w_u.shape[1]
    outputs = {"teacher": reading.teacher, "run": reading.output}
    if reading.output is reading.teacher:
        del outputs["run"]
    of_model = [i for i, row in enumerate(reading.rows) if reading.is_model(row)]
    lensed = [i for i in range(len(reading.rows)) if i not in of_model]
    size, together = _tile(len(reading.where), len(lensed), len(decoders), len(outputs), w_u, chunk_size)
    groups = [lensed[group] for group in S.evenly(len(lensed), together)] or [[]]
    rooms = S.Rooms() if rooms is None else rooms
    most = (len(outputs) + len(groups[0]) * len(decoders)) * size
    room = rooms.rows("logits", most, d_vocab, w_u.dtype, w_u.device)
    pieces = lambda n: S.evenly(n, max(1, PIECE.get(w_u.device.type, PIECE["cuda"]) // (4 * d_vocab)))
    for part in S.evenly(len(reading.where), size):
        at = reading.where[part]
        fixed: dict[str, Tensor] = {key: _at(output.x, at) for key, output in outputs.items() if not output.hidden}
        for number, group in enumerate(groups):
            new = [key for key, output in outputs.items() if output.hidden and key not in fixed]
            cells = [(i, name) for i in group for name in decoders]
            hidden = [_at(outputs[key].x, at) for key in new]
            hidden += [decoders[name][i].hidden(_at(reading.states[reading.rows[i]], at)) for i, name in cells]
            kept = 0 if new else len(at) * sum(output.hidden for output in outputs.values())
            made = _logits(readout, hidden, room[kept:])
            fixed |= dict(zip(new, made, strict=False))
            logits_of = dict(zip(cells, made[len(new) :], strict=True))
            for piece in pieces(len(at)):
                logits = {i: {name: logits_of[i, name][piece] for name in decoders} for i in group}
                if number == 0:
                    final = fixed.get("run", fixed["teacher"])[piece]
                    logits |= {i: dict.fromkeys(decoders, final) for i in of_model}
                teacher = fixed["teacher"][piece]
                logp, p = S.distribution(teacher, (rooms.like("teacher", teacher), rooms.like("teacher's p", teacher)))
                whole = slice(part.start + piece.start, part.start + piece.stop)
                yield Chunk(whole, at[piece], logits, logp, p, number == 0, rooms)


def _tile(n: int, rows: int, lenses: int, outputs: int, w_u: Tensor, chunk_size: int | None) -> tuple[int, int]:
    """How many positions, and how many rows of them, have their logits at a time."""
    most = most_rows(w_u)
    size = min(n, chunk_size or max(1, most // (outputs + min(rows, max(1, ROWS // lenses)) * lenses)))
    return size, max(1, (most // size - outputs) // lenses)


def most_rows(w_u: Tensor) -> int:
    """How many rows of logits there is room for."""
    return max(1, ROOM.get(w_u.device.type, ROOM["cuda"]) // (w_u.dtype.itemsize * w_u.shape[1]))


def _logits(readout: Readout, hidden: Sequence[Tensor], room: Tensor) -> Sequence[Float[Tensor, "n d_vocab"]]:
    """Of several tensors `[n, width]`, in one product."""
    return readout.logits(torch.cat([x.to(room) for x in hidden]), room).split(len(hidden[0])) if hidden else ()


def _at(x: Tensor, at: Tensor) -> Tensor:
    return x.flatten(0, 1)[at.to(x.device)]


def _cached(model: LensModel, cache: Any, layer: LayerOrSite, batch: Batch) -> Tensor:
    name = site(model, layer)
    depth = n_layers(model)
    aliases: Sequence[str] = [name]
    if (resolved := site_layer(name)) is not None:  # the same activation under its other name
        after = [f"blocks.{resolved - 1}.hook_resid_post"] if resolved else []
        aliases = [name, *after, *([f"blocks.{resolved}.hook_resid_pre"] if resolved < depth else [])]
    key = next((alias for alias in aliases if alias in cache.keys()), None)
    if key is None:
        raise ValueError(
            f"the cache does not hold {name!r}: run_with_cache with a names_filter that keeps it (the final residual is needed as teacher)"
        )
    x = cache[key]
    if x.ndim == 2:
        x = x[None]
    if x.shape[:2] != batch.tokens.shape:
        raise ValueError(
            f"the cache holds {list(x.shape[:2])} positions at {name!r}, the tokens are {list(batch.tokens.shape)}: pass the tokens of that run"
        )
    return x
