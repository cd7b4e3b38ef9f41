"""Stored states as text: batches of the ids that were read, each with the states that a model had there (`tll.capture`)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.files import INDEX, about_states, hash_of_shards, shard_file, text_hash
from tl_lenses.layers import label
from tl_lenses.tokens import Batch

ROWS = 8  # rows of a batch where the text was no batches


@dataclass(frozen=True, eq=False)
class StoredText:
    """Stored states, opened. Rows are read when a batch's states are asked for.

    Attributes:
        name: the folder or file.
        about: what it says of the model, the text and itself.
        files: the shards.
        ids: of each shard, all rows one after the other.
        rows: for every row its shard, its first token there and its length.
        sizes: rows of each batch.
        shuffles: whether a fit draws an order of the rows for each pass, as of a tensor.

    Example:
        >>> text = open_states("states/")                       # doctest: +SKIP
        >>> [batch.states.read("blocks.3.hook_resid_pre").shape for batch in text]      # doctest: +SKIP
    """

    name: str
    about: dict[str, Any]
    files: tuple[Path, ...]
    ids: tuple[Int[Tensor, " _"], ...]
    rows: Int[Tensor, "rows 3"]
    sizes: tuple[int, ...]
    shuffles: bool

    def __iter__(self) -> Iterator["StoredBatch"]:
        return (self.batch(rows) for rows in self.rows.split(list(self.sizes)))

    @property
    def n_batches(self) -> int:
        """Of a pass."""
        return len(self.sizes)

    @property
    def layers(self) -> list[int | str]:
        """The layers and sites that are stored, but for the final residual."""
        depth = self.about["n_layers"]
        return [at for site in self.about["sites"] if (at := label(site)) != depth]

    @property
    def seq_len(self) -> int:
        """Tokens of the longest row."""
        return int(self.rows[:, 2].max())

    @property
    def batch_size(self) -> int:
        """Rows of the largest batch."""
        return max(self.sizes)

    @property
    def limit_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.rows[:, 2].sum())

    def first(self, n_tokens: int) -> "StoredText":
        """The first rows, of at most so many tokens together; at least one."""
        kept = int((self.rows[:, 2].cumsum(0) <= n_tokens).sum())
        if not kept:
            raise ValueError(f"the first row of {self.name} has {int(self.rows[0, 2])} tokens, more than {n_tokens}: allow more")
        ends = [min(end, kept) for end in (0, *accumulate(self.sizes))]
        sizes = tuple(b - a for a, b in pairwise(ends) if b > a)
        return replace(self, rows=self.rows[:kept], sizes=sizes)

    def take(self, rows: slice | Int[Tensor, " rows"]) -> "StoredText":
        """Some of the rows, in that order, in batches of `ROWS`."""
        chosen = self.rows[rows]
        return replace(self, rows=chosen, sizes=tuple(len(part) for part in chosen.split(ROWS)))

    def batch(self, rows: Int[Tensor, "rows 3"]) -> "StoredBatch":
        """Rows as a batch, the shorter ones padded on the right."""
        width, ratio = int(rows[:, 2].max()), self.about.get("bytes_per_token")
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for row, (file, first, n) in zip(tokens, rows.tolist(), strict=True):
            row[:n] = self.ids[file][first : first + n]
        real = (torch.arange(width) < rows[:, 2:]).long()
        batch = StoredBatch(tokens, None if bool(real.all()) else real, ratio)
        batch.stored = StoredRows(self, rows, width)
        return batch

    def all_ids(self) -> Int[Tensor, "n pos"] | None:
        """The rows as one tensor; None where they differ in length."""
        if (self.rows[:, 2] != self.rows[0, 2]).any():
            return None
        return torch.stack([self.ids[file][first : first + n] for file, first, n in self.rows.tolist()]).long()


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Where the states of a batch lie."""

    text: StoredText
    rows: Int[Tensor, "rows 3"]
    width: int

    @property
    def name(self) -> str:
        """Of the folder, for errors."""
        return self.text.name

    @property
    def about(self) -> dict[str, Any]:
        """What the folder says."""
        return self.text.about

    def take(self, rows: Any) -> "StoredRows":
        """Some of the rows."""
        return replace(self, rows=self.rows[rows.cpu() if isinstance(rows, Tensor) else rows])

    def first_row(self) -> "StoredBatch":
        """The first row of the folder."""
        return self.text.batch(self.text.rows[:1])

    def read(self, site: str) -> Float[Tensor, "rows width d"]:
        """The states at a site, zeros at pads."""
        if site not in self.about["sites"]:
            stored = self.about["sites"]
            raise ValueError(
                f"{self.name} holds no states at {site!r}, only at {', '.join(stored)}: pass layers=[...] of these, or capture that one too"
            )
        out = None
        for i, (file, first, n) in enumerate(self.rows.tolist()):
            part = _opened(self.text.files[file]).get_slice(site)[first : first + n]
            if out is None:
                out = part.new_zeros(len(self.rows), self.width, part.shape[-1])
            out[i, :n] = part
        assert out is not None  # a batch has rows
        return out


class StoredBatch(Batch):
    """A batch that brings its states along: `StoredRows`, or `fit.kept.Passed`."""

    stored: Any

    @property
    def states(self) -> Any:
        """Where they lie."""
        return self.stored

    def take(self, rows: slice | Int[Tensor, " rows"]) -> "StoredBatch":
        """Some of the rows."""
        return self.having(super().take(rows), self.stored.take(rows))

    def with_ids(self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None) -> "StoredBatch":
        """The same rows, their ids and mask checked or on another device."""
        return self.having(super().with_ids(tokens, attention_mask), self.stored)

    @staticmethod
    def having(batch: Batch, stored: Any) -> "StoredBatch":
        """The batch with these states."""
        made = StoredBatch(*batch)
        made.stored = stored
        return made


@lru_cache(maxsize=32)
def _opened(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, "pt").__enter__()


def is_stored(path: str | Path) -> bool:
    """Whether a folder holds stored states, finished or not, or a file is a shard of them."""
    path = Path(path)
    return path.is_dir() and (path / INDEX).is_file() or any(path.glob("states-*.safetensors")) or about_states(path) is not None


def open_states(path: str | Path) -> StoredText:
    """A folder of states, or one shard of it.

    Raises:
        ValueError: shards that are missing or damaged, or rows whose positions do not count from 0; names the file.
    """
    path = Path(path)
    about = about_states(path)
    if about is None:
        raise ValueError(f"{path} has shards and no whole {INDEX}: its capture has not ended; run it again, or pass one shard")
    _opened.cache_clear()  # shards may have been made again
    files = [shard_file(path, i) for i in range(about["shards"])] if path.is_dir() else [path]
    ids, rows, sizes, hashes = [], [], [], []
    for number, file in enumerate(files):
        head = about_states(file)
        if head is None:
            state = "damaged" if file.exists() else "missing"
            raise ValueError(f"{file} is {state}: run its capture again, which makes the shards that are not there")
        if head["sites"] != about["sites"]:
            raise ValueError(f"{file} holds states at {head['sites']}, the folder at {about['sites']}: it is of another capture")
        tokens, positions = (_opened(file).get_tensor(name) for name in ("tokens", "positions"))
        starts = (positions == 0).nonzero()[:, 0]
        lengths = torch.cat([starts[1:], starts.new_tensor([len(tokens)])]) - starts
        counted = torch.arange(len(tokens)) - starts.repeat_interleave(lengths) if len(starts) else tokens.new_tensor([1])
        if not torch.equal(counted, positions.long()):
            raise ValueError(f"the positions in {file} do not count from 0 in each row: expected 0, 1, ... , 0, 1, ...")
        hashes.append(head["text"])
        if text_hash(tokens, positions) != head["text"]:
            raise ValueError(f"{file} is damaged: its ids are not those that it was written with")
        ids.append(tokens)
        rows.append(torch.stack([torch.full_like(starts, number), starts, lengths], 1))
        sizes += head.get("batches") or [len(part) for part in starts.split(ROWS)]
    if path.is_dir() and hash_of_shards(hashes) != about["text"]:
        raise ValueError(f"the shards in {path} are not those of its {INDEX}: capture into another folder")
    shuffles = not about.get("batches")
    text = StoredText(str(path), about, tuple(files), tuple(ids), torch.cat(rows), tuple(sizes), shuffles)
    return text.take(slice(None)) if shuffles else text
