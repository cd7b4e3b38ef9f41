"""What a text says about some maps, as moments; it adds up over batches, shards and processes."""

from dataclasses import dataclass, fields
from typing import Any

from tl_lenses.fit.distributed import Processes, gathered, merged
from tl_lenses.moments import Moments
from tl_lenses.translators import Row


@dataclass(frozen=True)
class Evidence:
    """What a text says about some maps: moments of three disjoint sets of its rows. Shards add up (`a + b`).

    Attributes:
        rows: `(source site, target site)` of each map.
        fit, choose, held_out: one `Moments` per distinct source, in order, with its targets in order; empty where no
            row of the text went there.
        agreed: held-out positions at which both models have the same argmax; None within one model.
    """

    rows: tuple[Row, ...]
    fit: tuple[Moments, ...] = ()
    choose: tuple[Moments, ...] = ()
    held_out: tuple[Moments, ...] = ()
    agreed: int | None = None

    def __add__(self, other: "Evidence") -> "Evidence":
        if self.rows != other.rows:
            raise ValueError(
                f"evidence of different maps does not add up: {list(self.rows)} and {list(other.rows)}; collect shards with the same rows"
            )
        agreed = None if self.agreed is None or other.agreed is None else self.agreed + other.agreed
        return Evidence(
            self.rows,
            _sum(self.fit, other.fit),
            _sum(self.choose, other.choose),
            _sum(self.held_out, other.held_out),
            agreed,
        )

    def __radd__(self, other: object) -> "Evidence":
        """So that `sum(shards)` works."""
        return self if other == 0 else NotImplemented  # type: ignore[return-value]


def _sum(a: tuple[Moments, ...], b: tuple[Moments, ...]) -> tuple[Moments, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b


def count(part: tuple[Moments, ...]) -> int:
    return part[0].n if part else 0


def merged_evidence(total: Evidence, who: Processes) -> Evidence:
    """The evidence of all processes, in all of them."""
    if who.world == 1:
        return total
    parts = merged([total.fit, total.choose, total.held_out], who)
    agreed = gathered(total.agreed, who)
    return Evidence(total.rows, *parts, agreed=None if total.agreed is None else sum(agreed))


def on_device(evidence: Evidence, device: str) -> Evidence:
    move = lambda m: Moments(m.n, *(getattr(m, f.name).to(device) for f in fields(m) if f.name != "n"))
    parts = ([move(m) for m in part] for part in (evidence.fit, evidence.choose, evidence.held_out))
    return Evidence(evidence.rows, *map(tuple, parts), agreed=evidence.agreed)


def evidence_tree(evidence: Evidence) -> dict[str, Any]:
    """For `checkpoint.save_state`."""
    one = lambda m: {f.name: getattr(m, f.name) for f in fields(m)}
    parts = {name: [one(m) for m in getattr(evidence, name)] for name in ("fit", "choose", "held_out")}
    return {**parts, "agreed": evidence.agreed}


def evidence_of(tree: dict[str, Any], rows: tuple[Row, ...]) -> Evidence:
    """What `evidence_tree` gave."""
    parts = (tuple(Moments(**m) for m in tree[name]) for name in ("fit", "choose", "held_out"))
    return Evidence(rows, *parts, agreed=tree["agreed"])
