"""Run many cells of a patchscope on one target prompt, computing only once what no patch can change.

A cell is one run of the target prompt with its own vectors at its own sites. Before the first patched position all cells are
the same, so that prefix runs once and its keys and values are shared. Only the suffix runs per cell, many cells in a batch,
each row with its own layer. Texts are continued in a batch, and rows leave it when they are finished. With `share=False`, one
cell a batch and no cache the same code is the naive procedure that the tests compare with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_lenses import edits
from tl_lenses.decoding import Decoder
from tl_lenses.hooks import Hook, installed, marked, patch
from tl_lenses.layers import site_layer
from tl_lenses.model import LensModel, d_model, device_of, hooked, n_layers
from tl_lenses.patchscopes.attention import blocks_before, hide_keys
from tl_lenses.patchscopes.continuation import Continuation
from tl_lenses.patchscopes.joining import joinable, run_joining
from tl_lenses.patchscopes.targets import Prompt
from tl_lenses.stats import log_probs
from tl_lenses.unembed import faster_readout

# Memory of one batch of cells, and the number of rows beyond which a batch gets no faster.
_BATCH_BYTES, _MOST_ROWS = 256 * 2**20, 512

# (replaced [rows, k, ...], vectors [rows, k, ...]) -> [rows, k, ...]
Combine = Callable[[Tensor, Tensor], Tensor]
# The vectors that one cell puts into the target run, by hook name.
VectorsBySite = dict[str, Float[Tensor, "_places _d"]]


@dataclass(frozen=True)
class TargetRun:
    """The settings that all cells of one target prompt share."""

    model: LensModel  # the target model
    prompt: Prompt  # the target
    combine: Combine  # (replaced activation, vector) -> the new activation
    # continuation, when, isolate: as `patchscope` takes them
    continuation: Continuation
    start: Decoder | None = None  # the shared prefix, or None to run whole prompts
    hooks: Sequence[Hook] = ()  # the user's hooks on the target run; they come before ours
    when: Literal["prompt", "every_step"] = "prompt"
    isolate: bool = False
    use_cache: bool = True  # False recomputes the whole sequence at every step

    @property
    def n_shared(self) -> int:
        """How many columns of the prompt are not run again."""
        return 0 if self.start is None else min(self.prompt.place)

    @property
    def suffix(self) -> Int[Tensor, "1 pos"]:
        """The columns that run per cell."""
        return self.prompt.tokens[:, self.n_shared :]

    @property
    def place(self) -> list[int]:
        """The columns of the suffix that receive vectors."""
        return [column - self.n_shared for column in self.prompt.place]

    @property
    def read_from_the_end(self) -> int:
        """The column that is read, counted from the end: a pass may return the last columns only."""
        return self.prompt.read - self.prompt.tokens.shape[1]

    def n_logits(self, sites: Sequence[str]) -> int:
        """How many last columns need logits: all where a hook may count columns at the unembedding."""
        length = self.suffix.shape[1]
        if self.start is None or any(name.startswith("unembed") for name in sites):
            return length
        return length - (self.prompt.read - self.n_shared)


@dataclass
class _Rows:
    """The cells of a running batch, for hooks that must keep up when rows leave."""

    active: Int[Tensor, " rows"]  # which cell each row of the batch is
    # hook name -> (which cells patch there [cells], their vectors [cells, k, d])
    sites: dict[str, tuple[Bool[Tensor, " cells"], Float[Tensor, "cells k d"]]] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Sequence[VectorsBySite], device: torch.device) -> "_Rows":
        rows = cls(torch.arange(len(cells)))
        for name in dict.fromkeys(name for cell in cells for name in cell):
            mask = torch.tensor([name in cell for cell in cells])
            vectors = torch.stack([cell[name] for cell in cells if name in cell]).to(device)
            values = vectors.new_zeros(len(cells), *vectors.shape[1:])
            values[mask.to(device)] = vectors
            rows.sites[name] = (mask, values)
        return rows


def why_not_shared(model: LensModel, prompt: Prompt, target_hooks: Sequence[Hook]) -> str:
    """Why the prefix of a prompt cannot be computed once; "" where it can.

    The positions of the user's `target_hooks` count from the start of the whole prompt.
    """
    if min(prompt.place) == 0:
        return "the first position is patched"
    if prompt.read < min(prompt.place):
        return "the position that is read comes before the patch"
    if target_hooks:
        return "target_hooks see the whole prompt"
    if hooked(model):
        return "hooks on the model see the whole prompt"
    return ""


def prefix(model: LensModel, prompt: Prompt) -> Decoder | None:
    """The keys and values before the first patched position, or None where the model's cache cannot be shared."""
    decoder, n = Decoder(model, readout=faster_readout(model)), min(prompt.place)
    with installed(model, _soft(prompt, 0, n)), marked(0, n):
        decoder.feed(prompt.tokens[:, :n], last=0)
    return decoder if decoder.shareable() else None


def rows_per_batch(target: TargetRun) -> int:
    """How many cells run together: as many as fit in a quarter of a gigabyte of logits, keys, values and activations."""
    total = target.prompt.tokens.shape[1] + target.continuation.max_new_tokens
    fit = _rows_that_fit(target.model, target.suffix.shape[1], total)
    return max(1, fit // target.continuation.n_samples)


def _rows_that_fit(model: LensModel, columns: int, total: int) -> int:
    """Rows whose pass over so many columns, of a text of `total`, fits."""
    width = d_model(model)
    per_row = 4 * (3 * columns * int(model.cfg.d_vocab) + 2 * n_layers(model) * total * width + 16 * columns * width)
    return int(min(max(_BATCH_BYTES // per_row, 1), _MOST_ROWS))


def batches(n: int, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size` that cover `range(n)`."""
    return (range(i, min(i + size, n)) for i in range(0, n, size))


def run_cells(
    target: TargetRun, cells: Sequence[VectorsBySite], draws: Float[Tensor, "texts new"] | None = None
) -> tuple[Float[Tensor, "cells d_vocab"], list[list[int]]]:
    """Logits at the read position of every cell of a batch, and the ids generated after it: `n_samples` texts per cell.

    `draws` are uniform numbers per text and step, for sampling. A cell without vectors is the prompt as it is.
    """
    rows = _Rows.of(cells, device_of(target.model))
    with _prompts_run(target, cells, rows) as (logits, decoder):
        return logits[:, target.read_from_the_end], _continued(target, logits[:, -1], decoder, rows, draws)


def score_cells(
    target: TargetRun, cells: Sequence[VectorsBySite], texts: Sequence[Sequence[tuple[int, ...]]]
) -> list[Float[Tensor, " texts"]]:
    """`log p(text | cell) = sum_t log p(y_t | prompt with the cell's vectors, y_<t)` of several texts per cell, in nats.

    The prompt runs once per cell; its texts share the keys and values. Where nothing is generated, texts are one token at
    the read position.
    """
    longest = max(len(text) for row in texts for text in row)
    column = -1 if target.continuation.max_new_tokens else target.read_from_the_end
    target = replace(target, continuation=replace(target.continuation, max_new_tokens=longest))
    rows = _Rows.of(cells, device_of(target.model))
    with _prompts_run(target, cells, rows) as (logits, decoder):
        return _scored(target, logits[:, column], decoder, rows, texts)


@contextmanager
def _prompts_run(
    target: TargetRun, cells: Sequence[VectorsBySite], rows: _Rows
) -> Iterator[tuple[Float[Tensor, "cells returned d_vocab"], Decoder]]:
    """While it is open, patches that also act later stay: the logits of the last columns, and what continues every cell."""
    if not _may_join(target, cells):
        with _rows_from_the_start(target, rows) as run:
            yield run
        return
    # Rows are equal below their patch: a single row runs there, and each cell's row joins at its layer.
    assert target.start is not None
    entries = {name: (mask.nonzero()[:, 0].tolist(), values[mask.to(values.device)]) for name, (mask, values) in rows.sites.items()}
    yield run_joining(
        target.model, target.start, target.suffix, entries, target.place, target.combine,
        hooks=_soft(target.prompt, target.n_shared, target.prompt.tokens.shape[1]),
        last=target.n_logits(list(rows.sites)), continues=target.continuation.max_new_tokens > 1,
    )  # fmt: skip


def _may_join(target: TargetRun, cells: Sequence[VectorsBySite]) -> bool:
    """Whether rows can skip the blocks below their patch: each patches one residual layer, once, and hides no keys."""
    if target.start is None or target.when != "prompt":
        return False
    if any(len(cell) != 1 or site_layer(name) is None for cell in cells for name in cell or ("",)):
        return False
    hides = target.isolate and any(blocks_before(name) for cell in cells for name in cell)
    return not hides and joinable(target.model)


@contextmanager
def _rows_from_the_start(target: TargetRun, rows: _Rows) -> Iterator[tuple[Tensor, Decoder]]:
    """Every row runs all blocks, on the suffix or on the whole prompt."""
    model, n_rows, length = target.model, len(rows.active), target.suffix.shape[1]
    hooks = [*target.hooks, *_soft(target.prompt, target.n_shared, target.prompt.tokens.shape[1])]
    hooks += [patch(name, _edit(rows, name, target.combine), pos=target.place, when=target.when) for name in rows.sites]
    if target.isolate:
        hooks += _isolated(rows, target.prompt.place, target.n_shared)
    if target.start is None:
        use_cache = target.use_cache and target.continuation.max_new_tokens > 1
        decoder = Decoder(model, use_cache=use_cache, readout=faster_readout(model))
    else:
        decoder = target.start.repeated(n_rows)
    with installed(model, hooks):
        with marked(0, length):
            logits = decoder.feed(target.suffix.expand(n_rows, -1), last=target.n_logits(list(rows.sites)))
        yield logits, decoder


def _scored(
    target: TargetRun, logits: Float[Tensor, "cells d_vocab"], decoder: Decoder, rows: _Rows,
    texts: Sequence[Sequence[tuple[int, ...]]],
) -> list[Float[Tensor, " texts"]]:  # fmt: skip
    """The first token of every text from the cell's own logits, the others in one pass of the cell's row, once per text."""
    logp = log_probs(logits)
    scores = [logp[cell, [text[0] for text in row]].double().cpu() for cell, row in enumerate(texts)]
    longer = [(cell, k) for cell, row in enumerate(texts) for k, text in enumerate(row) if len(text) > 1]
    longer.sort(key=lambda at: len(texts[at[0]][at[1]]))
    model, total = target.model, target.prompt.tokens.shape[1] + target.continuation.max_new_tokens
    for part in batches(len(longer), _rows_that_fit(model, target.continuation.max_new_tokens, total)):
        some = [longer[i] for i in part]
        ids = [texts[cell][k] for cell, k in some]
        width = max(map(len, ids))
        column = torch.tensor([[*y, *[-1] * (width - len(y))] for y in ids], device=device_of(model))
        rows.active = torch.tensor([cell for cell, _ in some])
        continued = decoder.of_rows(rows.active.to(device_of(model)))
        start = target.suffix.shape[1] if continued.use_cache else 0
        with marked(start, target.suffix.shape[1]):
            logits = continued.feed(column[:, :-1].clamp_min(0))  # pads stand on the right, where nothing attends to them
        following = column[:, 1:].to(logits.device)
        each = log_probs(logits).gather(-1, following.clamp_min(0)[..., None])[..., 0].double()
        for (cell, k), value in zip(some, each.masked_fill(following < 0, 0.0).sum(-1).tolist(), strict=True):
            scores[cell][k] += value
    return scores


def _continued(
    target: TargetRun, logits: Float[Tensor, "rows d_vocab"], decoder: Decoder, rows: _Rows, draws: Tensor | None
) -> list[list[int]]:
    """The ids generated for every cell, sample by sample; a row leaves the batch when its text is finished."""
    continuation, length, device = target.continuation, target.suffix.shape[1], device_of(target.model)
    if continuation.n_samples > 1:  # the samples of a cell go on from its one pass over the prompt
        again = torch.arange(len(rows.active)).repeat_interleave(continuation.n_samples)
        logits, rows.active = logits[again.to(logits.device)], rows.active[again]
        decoder = decoder.of_rows(again.to(device)) if continuation.max_new_tokens > 1 else decoder
    texts = torch.arange(len(rows.active))
    ids: list[list[int]] = [[] for _ in texts]
    for step in range(continuation.max_new_tokens):
        chosen = continuation.choose(logits, None if draws is None else draws[texts, step])
        for text, token in zip(texts.tolist(), chosen.tolist(), strict=True):
            ids[text].append(token)
        alive = torch.tensor([not continuation.finished(ids[text]) for text in texts.tolist()])
        if step + 1 == continuation.max_new_tokens or not alive.any():
            break
        if not alive.all():
            kept = alive.nonzero()[:, 0]
            decoder.select(kept.to(device))
            rows.active, texts, chosen = rows.active[kept], texts[kept], chosen[kept.to(chosen.device)]
        with marked(length + step if decoder.use_cache else 0, length):
            logits = decoder.step(chosen.to(device))
    return ids


def _edit(rows: _Rows, name: str, combine: Combine) -> edits.Edit:
    """The patch of one site for a whole batch: rows that patch elsewhere keep what they have."""

    def edit(x: Tensor) -> Tensor:
        mask, values = rows.sites[name]
        mask, value = mask[rows.active].to(x.device), values[rows.active.to(values.device)].to(x)
        if value[0, 0].numel() != x[0, 0].numel():
            raise ValueError(
                f"a vector of width {value[0, 0].numel()} does not fit {name!r}, which has {x[0, 0].numel()}: pass map="
            )
        new = combine(x, value.reshape(x.shape))
        return new if bool(mask.all()) else torch.where(mask.view(-1, *[1] * (x.ndim - 1)), new, x)

    return edit


def _isolated(rows: _Rows, place: tuple[int, ...], offset: int) -> list[Hook]:
    """Per block, the hook that hides the placeholders from later positions in the rows that are patched after that block."""
    hidden: dict[int, Tensor] = {}  # block -> rows [cells]
    for name, (mask, _) in rows.sites.items():
        for block in range(blocks_before(name)):
            hidden[block] = mask | hidden.get(block, False)
    edit_of = lambda mask: hide_keys(place, lambda: mask[rows.active], offset=offset)
    return [patch(f"blocks.{block}.attn.hook_pattern", edit_of(mask), when="every_step") for block, mask in hidden.items()]


def _soft(prompt: Prompt, start: int, stop: int) -> list[Hook]:
    """The hook that writes the columns `start..stop` of a soft prompt; none for token prompts."""
    if prompt.soft is None:
        return []
    return [patch("hook_embed", edits.replace(prompt.soft[start:stop]))]
