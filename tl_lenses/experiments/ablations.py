"""What is a part of the model worth? Blocks, heads, subspaces and directions ablated; blocks deleted, swapped and doubled."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_lenses import edits
from tl_lenses import stats as S
from tl_lenses.data import Batch
from tl_lenses.evaluation import used_positions
from tl_lenses.experiments.picture import Heat, Lines, Picture
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.experiments.states import Texts, check_covered, states_of, texts_of, wanted_layers
from tl_lenses.hooks import Hook, patch, read, residual_reads, run
from tl_lenses.model import LensModel, check_model, d_model, n_layers
from tl_lenses.progress import progress
from tl_lenses.sites import site
from tl_lenses.trajectory import next_tokens

KINDS = ("zero", "mean", "resample")
ORDERS = ("delete", "swap", "duplicate")
Edit = Callable[[Tensor], Tensor]
Key = tuple[str, str]  # what was ablated, how


@dataclass(frozen=True)
class Ablations(Report):
    """Loss of the model with a part of it ablated, less its loss as it is.

    Attributes:
        blocks: which ones.
        loss: per part and ablation, `[block]`: how much cross entropy with the next token rises, nats. Parts are "block",
            "order" (delete, swap with the next one, duplicate), "head 0" and so on, and the names of the subspaces.
        kl: the same as KL from the model to the ablated model, nats.
        clean: loss without ablation, nats per token.
        positions: what the means are over.
    """

    blocks: list[int]
    loss: dict[Key, Float[Tensor, " block"]]
    kl: dict[Key, Float[Tensor, " block"]]
    clean: float
    positions: int

    name = "ablations"

    @property
    def heads(self) -> list[str]:
        """The heads that were ablated."""
        return list(dict.fromkeys(part for part, _ in self.loss if part.startswith("head ")))

    def tables(self) -> list[Table]:
        """Blocks and their order, subspaces, heads: a row per block."""
        title = f"ablations, {self.model}: loss {self.clean:.3f} nats, {self.positions} positions"
        blocks = [key for key in self.loss if key[0] in ("block", "order")]
        spaces = [key for key in self.loss if key not in blocks and key[0] not in self.heads]
        found = []
        if blocks:
            found.append(self._table(title, blocks, [how for _, how in blocks], "rise of the loss, nats"))
        if spaces:
            names = [f"{part}, {how}" for part, how in spaces]
            found.append(self._table("subspaces of a block's input", spaces, names, "rise of the loss, nats"))
        if self.heads:
            how = self._head_kind()
            keys = [(part, how) for part in self.heads]
            found.append(self._table("heads", keys, self.heads, f"rise of the loss, nats, {how} ablation"))
        return found

    def _table(self, title: str, keys: Sequence[Key], names: list[str], note: str) -> Table:
        rows = [[str(block), *(float(self.loss[key][i]) for key in keys)] for i, block in enumerate(self.blocks)]
        return Table(title, ["block", *names], rows, note, percent=False)

    def _head_kind(self) -> str:
        kinds = [how for part, how in self.loss if part == self.heads[0]]
        return "mean" if "mean" in kinds else kinds[0]

    def pictures(self) -> dict[str, Picture]:
        """Loss per block, a line per ablation of blocks, then of subspaces; heads as a matrix."""
        lines: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}, "subspaces": {}}
        for (part, how), values in self.loss.items():
            if part not in self.heads:
                whole = part in ("block", "order")
                points = list(zip(map(float, self.blocks), values.tolist(), strict=True))
                lines["loss" if whole else "subspaces"][how if whole else f"{part}, {how}"] = points
        title = f"ablations, {self.model}"
        found: dict[str, Picture] = {
            name: Lines(title, series, "block", "rise of the loss, nats") for name, series in lines.items() if series
        }
        if self.heads:
            how = self._head_kind()
            values = [[float(self.loss[part, how][i]) for part in self.heads] for i in range(len(self.blocks))]
            high = max(max(row) for row in values)
            found["heads"] = Heat(
                f"heads, {how} ablation, rise of the loss in nats", [str(b) for b in self.blocks],
                [part.removeprefix("head ") for part in self.heads], values, "block", "head", high=high or 1.0,
            )  # fmt: skip
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row per block, part and ablation, nats."""
        return [
            {"block": block, "part": part, "ablation": how, "loss": float(x[i]), "kl": float(self.kl[part, how][i])}
            for (part, how), x in self.loss.items()
            for i, block in enumerate(self.blocks)
        ]


# --- the interventions, as hooks


def block_edit(model: LensModel, block: int, edit: Edit) -> list[Hook]:
    """`h_{l+1} <- h_l + edit(h_{l+1} - h_l)`: another contribution of a block. `edits.zero` deletes the block.

    Example:
        >>> tll.run(model, tokens, block_edit(model, 3, tll.edits.zero))      # doctest: +SKIP
    """
    seen: dict[str, Tensor] = {}

    def changed(after: Tensor) -> Tensor:
        return seen["before"] + edit(after - seen["before"])

    return [read(site(model, block), seen, "before", detach=False), patch(site(model, block + 1), changed)]


def duplicated(model: LensModel, block: int, after: Float[Tensor, "batch pos d"]) -> list[Hook]:
    """Block l twice: it reads its own output `after` of a plain pass. Two passes in all."""
    return [patch(site(model, block), edits.replace(after))]


def swapped(model: LensModel, block: int, skipped: Float[Tensor, "batch pos d"]) -> list[Hook]:
    """Block l behind block l + 1. Two passes in all.

    Args:
        skipped: output of block l + 1 in a pass without block l, which is `read` at `site(model, l + 2)` there.
    """
    seen: dict[str, Tensor] = {}
    return [
        patch(site(model, block), edits.replace(skipped)),
        read(site(model, block + 1), seen, "out", detach=False),
        # Block l + 1 has run already: it is passed over.
        patch(site(model, block + 2), lambda x: seen["out"]),
    ]


def head_edit(model: LensModel, block: int, head: int, edit: Edit) -> list[Hook]:
    """`z[head] <- edit(z[head])`, z what the heads of a block write before the output matrix, `[batch, pos, d_head]` each."""
    heads = int(model.cfg.n_heads)

    def changed(x: Tensor) -> Tensor:
        out = x.reshape(*x.shape[:2], heads, -1).clone()
        out[:, :, head] = edit(out[:, :, head])
        return out.reshape(x.shape)

    return [patch(f"blocks.{block}.attn.hook_z", changed)]


# --- the experiment


@torch.no_grad()
def ablations(
    model: LensModel,
    tokens: Any,
    *,
    kinds: Sequence[str] = KINDS,
    orders: Sequence[str] = ORDERS,
    heads: bool = True,
    subspaces: Mapping[str, Mapping[int, Float[Tensor, "k d"]]] | None = None,
    layers: Iterable[int] | None = None,
    n: int = 512,
    seed: int = 0,
    skip_first: bool = True,
    show_progress: bool | None = None,
) -> Ablations:
    """How much the loss rises without a part of the model, block by block.

    A block's contribution `r = h_{l+1} - h_l`, a head's output z, or the part of a block's input in a subspace becomes 0
    (`"zero"`), its mean over the text (`"mean"`), or that of another position (`"resample"`, a derangement of all positions of a
    batch). `"delete"`, `"swap"` (with the next block) and `"duplicate"` change the order of whole blocks, at every position. They are
    hooks and nothing else: a block runs on another input where its input is patched, and is passed over where its output is
    replaced. Deletion costs a pass per block, duplication one, a swap one on top of the deletion's.

    Args:
        model: what is ablated.
        tokens: text, `token_batches(...)` or what `evaluate` takes.
        kinds: of "zero", "mean", "resample".
        orders: of "delete", "swap", "duplicate".
        heads: ablate every head as well; that is most of the passes.
        subspaces: by name and layer, orthonormal rows `[k, d_model]` (or one direction `[d_model]`): `bases[l].vectors` of
            `causal_basis`, say. Ablated in the input of block l.
        layers: blocks, all by default.
        n: positions; rows are taken until there are so many.
        seed: of the derangements.
        skip_first: leave each row's first position out of the loss and out of what is ablated ("zero" then differs from "delete").

    Returns:
        `Ablations`. The last block cannot be swapped: NaN there.

    Raises:
        ValueError: an unknown kind; a subspace that is not orthonormal, of another width, or of a layer that `layers` leaves
            out; too little text.
        RuntimeError: a model whose attention does not use what a hook does to its heads.

    Source: Belrose et al. 2023 (Tuned Lens), sections 4.1 and 4.2 and the appendix on ablations.

    Example:
        >>> print(ablations(model, tokens, heads=False))      # doctest: +SKIP
    """
    check_model(model, what="an experiment")
    depth = n_layers(model)
    blocks = wanted_layers(model, layers)
    if depth in blocks:
        raise ValueError(f"there is no block {depth}: layer {depth} is the final state, blocks are 0..{depth - 1}")
    for given, known, what in ((kinds, KINDS, "kinds"), (orders, ORDERS, "orders")):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{what} must be of {', '.join(known)}, got {unknown[0]!r}")
    spaces = _checked(subspaces or {}, blocks, d_model(model))
    texts = texts_of(model, tokens, n=n, skip_first=skip_first)
    if "resample" in kinds and any(int(used.sum()) < 2 for used in texts.used):
        raise ValueError("resampling needs two positions in every batch: pass larger batches or longer rows")
    if heads:
        _check_heads(model, texts.batches[0], blocks[0])
    means = _means(model, texts, blocks, heads) if "mean" in kinds else {}

    n_heads = int(model.cfg.n_heads) if heads else 0
    per_block = len(kinds) * (1 + len(spaces) + n_heads) + len(orders) + ("swap" in orders and "delete" not in orders)
    bar = progress(total=len(texts.batches) * len(blocks) * per_block, desc="ablating", show=show_progress)
    loss: dict[Key, Tensor] = {}
    kl: dict[Key, Tensor] = {}
    clean_loss, targets = 0.0, 0
    for batch, used in texts:
        seen: dict[Any, Tensor] = {}
        reads = residual_reads(model, range(depth + 1), seen)
        clean = S.log_probs(_logits(model, batch, reads)[used])
        goal = next_tokens(batch.tokens, used_positions(batch, False))[used]
        own = S.target_logprob(clean, goal).double()
        p, plain = clean.exp(), -float(own.nansum())
        clean_loss, targets = clean_loss + plain, targets + int((goal >= 0).sum())

        def note(key: Key, i: int, hooks: list[Hook]) -> None:
            logq = S.log_probs(_logits(model, batch, hooks)[used])  # noqa: B023
            rise = -float(S.target_logprob(logq, goal).double().nansum()) - plain  # noqa: B023
            for sums, value in ((loss, rise), (kl, float(S.kl(clean, logq, p).double().sum()))):  # noqa: B023
                sums.setdefault(key, torch.zeros(len(blocks), dtype=torch.float64))[i] += value
            bar.update()

        for i, block in enumerate(blocks):
            for how in kinds:
                edit = lambda mean, how=how: edits.where(used, _edit(how, mean, seed))  # noqa: B023
                note(("block", how), i, block_edit(model, block, edit(means.get(("block", block)))))
                for name, rows in spaces.items():
                    inside = edits.project(rows[block], toward=_edit(how, means.get(("state", block)), seed))
                    note((name, how), i, [patch(site(model, block), edits.where(used, inside))])
                for head in range(n_heads):
                    mean = means.get(("heads", block))
                    hooks = head_edit(model, block, head, edit(None if mean is None else mean[head]))
                    note((f"head {head}", how), i, hooks)
            for key, hooks in _orders(model, batch, block, orders, seen):
                note(key, i, hooks)
    bar.close()
    positions = texts.n
    if "swap" in orders and depth - 1 in blocks:
        for sums in (loss, kl):
            sums.setdefault(("order", "swap"), torch.zeros(len(blocks), dtype=torch.float64))
            sums["order", "swap"][blocks.index(depth - 1)] = torch.nan
    order = sorted(loss, key=lambda key: key[0] not in ("block", "order"))
    settings = {"n": positions, "seed": seed, "skip_first": skip_first, "kinds": list(kinds), "orders": list(orders)}
    return Ablations(
        named(model), blocks, {key: (loss[key] / max(targets, 1)).float() for key in order},
        {key: (kl[key] / positions).float() for key in order}, clean_loss / max(targets, 1), positions, settings=settings,
    )  # fmt: skip


def _orders(
    model: LensModel, batch: Batch, block: int, orders: Sequence[str], plain: Mapping[int, Tensor]
) -> Iterator[tuple[Key, list[Hook]]]:
    """Hooks that delete, swap and duplicate a block; the pass of a deletion gives the swap its first half."""
    last = block + 1 == n_layers(model)
    seen: dict[str, Tensor] = {}
    gone = block_edit(model, block, edits.zero)
    if not last:
        gone.append(read(site(model, block + 2), seen, "skipped"))
    if "delete" in orders:
        yield ("order", "delete"), gone
    if "swap" in orders and not last:
        if "delete" not in orders:
            _logits(model, batch, gone)
        yield ("order", "swap"), swapped(model, block, seen["skipped"])
    if "duplicate" in orders:
        yield ("order", "duplicate"), duplicated(model, block, plain[block + 1])


def _edit(how: str, mean: Tensor | None, seed: int) -> Edit:
    return edits.zero if how == "zero" else edits.resample(seed) if how == "resample" else edits.mean(mean)


def _logits(model: LensModel, batch: Batch, hooks: Iterable[Hook]) -> Float[Tensor, "batch pos d_vocab"]:
    return run(model, batch.tokens, hooks, attention_mask=batch.attention_mask)


def _means(
    model: LensModel, texts: Texts, blocks: Sequence[int], heads: bool
) -> dict[tuple[str, int], Float[Tensor, "..."]]:
    """Mean contribution and input of every block, and mean output `[head, d_head]` of its heads, over the positions that count."""
    states = states_of(model, texts, sorted({at for block in blocks for at in (block, block + 1)}))
    found = {("block", b): (states[b + 1] - states[b]).mean(0) for b in blocks}
    found |= {("state", b): states[b].mean(0) for b in blocks}
    if not heads:
        return found
    total: dict[int, Tensor] = {}
    for batch, used in texts:
        seen: dict[int, Tensor] = {}
        _logits(model, batch, [read(f"blocks.{b}.attn.hook_z", seen, b) for b in blocks])
        for b, z in seen.items():
            total[b] = total.get(b, 0) + z[used].reshape(int(used.sum()), int(model.cfg.n_heads), -1).sum(0)
    return found | {("heads", b): x / texts.n for b, x in total.items()}


def _check_heads(model: LensModel, batch: Batch, block: int) -> None:
    """Refuse a model whose attention output does not depend on the hook point that is edited."""
    hook = patch(f"blocks.{block}.attn.hook_z", edits.zero)
    if torch.equal(_logits(model, batch, []), _logits(model, batch, [hook])):
        raise RuntimeError(
            "this model's attention ignores edits of hook_z, so ablated heads would change nothing: pass heads=False"
        )


def _checked(
    subspaces: Mapping[str, Mapping[int, Tensor]], blocks: Sequence[int], width: int
) -> dict[str, dict[int, Float[Tensor, "k d"]]]:
    """Subspaces as `[k, d_model]`, orthonormal; of these blocks."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, given in subspaces.items():
        if name in ("block", "order") or name.startswith("head "):
            raise ValueError(f"a subspace may not be called {name!r}: that is another part of the table")
        check_covered(given, blocks, f"{name!r} is given")
        found[name] = {}
        for layer, rows in given.items():
            rows = rows[None] if rows.ndim == 1 else rows
            if rows.shape[-1] != width or rows.ndim != 2:
                raise ValueError(f"{name!r} of layer {layer} has shape {list(rows.shape)}, expected [k, {width}]")
            edits.project(rows, orthonormal=True)
            found[name][layer] = rows
    return found
