"""States of the text that the start reads, kept for the steps on the same text: one forward pass for both.

They are what the pass of a step would give, number for number, so a fit that is resumed, and makes these passes again, ends with the same maps.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.decode import passed
from tl_lenses.fit.step import pieces
from tl_lenses.layers import canonical, layer_site
from tl_lenses.model import LensModel, d_model, device_of, dtype_of, hooked, n_layers, prepared
from tl_lenses.text.stored import StoredBatch
from tl_lenses.tokens import Batch

BYTES = 2**30  # of states that are kept; on a CPU only, whose memory the rest of a fit does not fill


@dataclass(eq=False)
class Passed:
    """The states of a batch, read from the model when they are first asked for. It stands where a batch's stored states do."""

    model: LensModel | None
    batch: Batch
    names: tuple[str, ...]
    states: dict[str, Float[Tensor, "rows pos d"]] = field(default_factory=dict)
    seconds: float = 0.0  # of the pass
    about: None = None  # they are this model's: nothing is to be compared

    @property
    def name(self) -> str:
        """For errors."""
        return "the start's pass"

    def read(self, site: str) -> Float[Tensor, "rows pos d"]:
        """The states at a site, with a component's heads side by side."""
        if self.model is not None:
            began, model = time.perf_counter(), self.model
            with torch.no_grad():
                parts = [
                    passed(model, prepared(model, piece), {name: name for name in self.names}, fn=lambda x: x.flatten(2))[0]
                    for piece in pieces(model, self.batch, [])
                ]
            self.states = {name: torch.cat([part[name] for part in parts]) for name in self.names}
            self.model, self.seconds = None, time.perf_counter() - began
        return self.states[site]

    def take(self, rows: slice | Int[Tensor, " rows"]) -> "Passed":
        """Some of the rows."""
        self.read(self.names[0])
        return Passed(None, self.batch.take(rows), self.names, {name: x[rows] for name, x in self.states.items()})


class Keeper:
    """Gives batches their states, as long as there is room and a process is alone with a model that nobody hooks."""

    def __init__(self, model: LensModel, sites: Iterable[str], alone: bool):
        depth = n_layers(model)
        self.model, self.names = model, tuple(dict.fromkeys(canonical(site, depth) for site in (*sites, layer_site(depth, depth))))
        possible = alone and device_of(model).type == "cpu" and not hooked(model)
        self.room = BYTES if possible else 0
        d, d_mlp = d_model(model), getattr(model.cfg, "d_mlp", None) or 0
        # Any other activation counts as wide as the MLP's.
        self.width = sum(d if "resid" in name or name.endswith("_out") else max(4 * d, d_mlp) for name in self.names)

    def __call__(self, batch: Batch) -> Batch:
        """The batch, with states or as it is."""
        size = batch.tokens.numel() * self.width * dtype_of(self.model).itemsize
        if batch.states is not None or size > self.room:
            self.room = 0  # what comes later is not kept either: steps are alike from there on
            return batch
        self.room -= size
        return StoredBatch.having(batch, Passed(self.model, batch, self.names))


def seconds_of(batches: Iterable[Batch]) -> float:
    """What the passes took that steps on these batches need not make."""
    return sum(batch.states.seconds for batch in batches if isinstance(batch.states, Passed))


def bytes_kept(n_tokens: int, n_sites: int, width: int, element: int, device: str) -> int:
    """How much is kept at most of so many tokens, for a plan."""
    return min(BYTES, n_tokens * n_sites * width * element) if device == "cpu" else 0
