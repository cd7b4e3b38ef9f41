"""What is a part of the model worth? Blocks, heads, subspaces and directions ablated; blocks deleted, swapped and doubled."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_lenses import edits
from tl_lenses import stats as S
from tl_lenses.checks import seed_of, some_of
from tl_lenses.experiments.basis import check_subspaces
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Subject, Texts, logits_of, text_settings
from tl_lenses.hooks import Hook, patch, read, residual_reads
from tl_lenses.model import LensModel, d_model, n_layers
from tl_lenses.progress import progress
from tl_lenses.sites import site
from tl_lenses.tokens import Batch, next_tokens, used_positions
from tl_lenses.views import Picture

KINDS = ("zero", "mean", "resample")
ORDERS = ("delete", "swap", "duplicate")
Edit = Callable[[Tensor], Tensor]
Key = tuple[str, str]  # the ablated part, how
WHOLE = ("block", "order")  # parts that are whole blocks


@dataclass(frozen=True, repr=False)
class Ablations(Report):
    """Loss of the model with a part of it ablated, less its loss as it is.

    The grid has the axes ablation (of a part, and how: `("block", "mean")`) and block, and the values

    - `loss`: how much the cross entropy with the next token rises, nats;
    - `kl`: KL from the model to the ablated model, nats.

    Parts are "block", "order" (delete, swap with the next one, duplicate), "head 0" and so on, and the names of the subspaces.
    All are means over the positions, of which `settings["n"]` is the number.

    Attributes:
        clean: loss without ablation, nats per token.
    """

    clean: float

    name = "ablations"

    @property
    def heads(self) -> list[str]:
        """The heads that were ablated."""
        return list(dict.fromkeys(part for part, _ in self.ablations if part.startswith("head ")))

    def _named(self, names: Mapping[Key, str]) -> Grid:
        """Some of the ablations, by the names that they have in a table or a picture."""
        part = self.grid.at(ablation=list(names))
        return Grid({**part.axes, "ablation": list(names.values())}, part.values)

    def _whole(self) -> dict[Key, str]:
        """Ablations of whole blocks, with their names."""
        return {(part, how): how for part, how in self.ablations if part in WHOLE}

    def _subspaces(self) -> dict[Key, str]:
        heads = self.heads
        return {(part, how): f"{part}, {how}" for part, how in self.ablations if part not in (*WHOLE, *heads)}

    def _heads(self) -> tuple[str, dict[Key, str]]:
        """The ablation of heads that is shown, and the heads."""
        kinds = [how for part, how in self.ablations if part in self.heads[:1]]
        shown = "mean" if "mean" in kinds else kinds[0] if kinds else ""
        return shown, {(head, shown): head for head in self.heads}

    def tables(self) -> list[Table]:
        """Blocks and their order, subspaces, heads: a row per block."""
        how, heads = self._heads()
        n, note = self.settings["n"], "rise of the loss, nats"
        shown = [
            (f"ablations, {self.model}: loss {self.clean:.3f} nats, {n} positions", self._whole(), note),
            ("subspaces of a block's input", self._subspaces(), note),
            ("heads", heads, f"{note}, {how} ablation"),
        ]
        return [
            self._named(names).table(title, "loss", down="block", across="ablation", note=below)
            for title, names, below in shown
            if names
        ]

    def pictures(self) -> dict[str, Picture]:
        """Loss per block, a line per ablation of blocks, then of subspaces; heads as a matrix."""
        title, up = f"ablations, {self.model}", "rise of the loss, nats"
        lines = {"loss": self._whole(), "subspaces": self._subspaces()}
        pictures: dict[str, Picture] = {
            name: self._named(names).lines(title, "loss", x="block", by="ablation", up=up) for name, names in lines.items() if names
        }
        how, heads = self._heads()
        if heads:
            grid = self._named({key: head.removeprefix("head ") for key, head in heads.items()})
            pictures["heads"] = grid.heat(
                f"heads, {how} ablation, rise of the loss in nats", "loss", down="block", across="ablation",
                labels=("block", "head"), high=float(grid["loss"].max()) or 1.0,
            )  # fmt: skip
        return pictures

    def rows(self) -> list[dict[str, Any]]:
        """A row per block, part and ablation, nats."""
        return [
            {"block": row["block"], "part": part, "ablation": how, "loss": row["loss"], "kl": row["kl"]}
            for row in self.grid.rows()
            for part, how in [row["ablation"]]
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
    """Block l after block l + 1. Two passes in all.

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
    """`z[head] <- edit(z[head])`, z the outputs of a block's heads before the output matrix, `[batch, pos, d_head]` each."""
    heads = int(model.cfg.n_heads)

    def changed(x: Tensor) -> Tensor:
        out = x.reshape(*x.shape[:2], heads, -1).clone()
        out[:, :, head] = edit(out[:, :, head])
        return out.reshape(x.shape)

    return [patch(f"blocks.{block}.attn.hook_z", changed)]


# --- the experiment


@torch.no_grad()
def ablations(
    model: LensModel, tokens: Any, *, kinds: Sequence[str] = KINDS, orders: Sequence[str] = ORDERS, heads: bool = True,
    subspaces: Mapping[str, Mapping[int, Float[Tensor, "k d"]]] | None = None,
    layers: Layers = None, n: int = 512, seed: int = 0, skip_first: bool = True,
    show_progress: bool | None = None,
) -> Ablations:  # fmt: skip
    """How much the loss rises without a part of the model, block by block.

    A block's contribution `r = h_{l+1} - h_l`, a head's output z, or the part of a block's input in a subspace becomes 0
    (`"zero"`), its mean over the text (`"mean"`), or that of another position (`"resample"`, a derangement of all positions of a
    batch). `"delete"`, `"swap"` (with the next block) and `"duplicate"` change the order of whole blocks, at every position. They are
    hooks and nothing else: a block runs on another input where its input is patched, and is passed over where its output is
    replaced. Deletion costs a pass per block, duplication one, a swap one on top of the deletion's.

    Args:
        tokens: text, as `evaluate` takes it.
        kinds: of "zero", "mean", "resample".
        orders: of "delete", "swap", "duplicate".
        heads: ablate every head as well; that is most of the passes.
        subspaces: by name and layer, orthonormal rows `[k, d_model]` (or one direction `[d_model]`): `bases[l].vectors` of
            `causal_basis`, say. Ablated in the input of block l.
        layers: blocks, all by default.
        n: positions; rows are taken until there are so many.
        seed: of the derangements.
        skip_first: leave each row's first position out of the loss and of the ablation ("zero" then differs from "delete").

    Returns:
        `Ablations`. The last block cannot be swapped: NaN there.

    Raises:
        ValueError: an unknown kind; a subspace that is not orthonormal, of another width, or of a layer that `layers` leaves
            out; too little text.
        RuntimeError: a model whose attention ignores edits of its heads.

    Source: Belrose et al. 2023 (Tuned Lens), sections 4.1 and 4.2 and the appendix on ablations.

    Example:
        >>> print(ablations(model, tokens, heads=False))      # doctest: +SKIP
    """
    subject = Subject.of(model, layers=layers, what="ablations", final="never")
    depth, blocks = subject.depth, subject.layers
    kinds, orders, seed = some_of("kinds", kinds, KINDS), some_of("orders", orders, ORDERS), seed_of(seed)
    spaces = check_subspaces({} if subspaces is None else subspaces, blocks, d_model(model))
    if taken := [name for name in spaces if name in WHOLE or name.startswith("head ")]:
        raise ValueError(f"a subspace may not be called {taken[0]!r}: that is another part of the table")
    texts = subject.texts(tokens, n=n, skip_first=skip_first, resampled="resample" in kinds)
    if heads:
        _check_heads(model, texts.batches[0], blocks[0])
    means = _means(model, texts, blocks, heads) if "mean" in kinds else {}
    plan = _Plan(model, kinds, orders, spaces, int(model.cfg.n_heads) if heads else 0, means, seed)

    bar = progress(total=len(texts.batches) * len(blocks) * plan.passes, desc="ablating", show=show_progress)
    sums = defaultdict[Key, Tensor](lambda: torch.zeros(2, len(blocks), dtype=torch.float64))  # of loss and KL
    clean_loss, targets = 0.0, 0
    for batch, used in texts:
        seen: dict[Any, Tensor] = {}
        clean = S.log_probs(logits_of(model, batch, residual_reads(model, range(depth + 1), seen))[used])
        goal = next_tokens(batch.tokens, used_positions(batch, False))[used]
        p, plain = clean.exp(), _loss(clean, goal)
        clean_loss, targets = clean_loss + plain, targets + int((goal >= 0).sum())
        for i, block in enumerate(blocks):
            for key, hooks in plan.interventions(batch, used, block, seen):
                logq = S.log_probs(logits_of(model, batch, hooks)[used])
                change = [_loss(logq, goal) - plain, float(S.kl(clean, logq, p).double().sum())]
                sums[key][:, i] += torch.tensor(change, dtype=torch.float64)
                bar.update()
    bar.close()
    if "swap" in orders and depth - 1 in blocks:
        sums["order", "swap"][:, blocks.index(depth - 1)] = torch.nan
    keys = sorted(sums, key=lambda key: key[0] not in WHOLE)
    loss, kl = torch.stack([sums[key] for key in keys], 1) if keys else torch.zeros(2, 0, len(blocks))
    targets = max(targets, 1)
    settings = {
        **text_settings(tokens), "n": texts.n, "seed": seed, "skip_first": skip_first, "kinds": list(kinds),
        "orders": list(orders),
    }  # fmt: skip
    values = {"loss": (loss / targets).float(), "kl": (kl / texts.n).float()}
    grid = Grid.over({"ablation": keys, "block": blocks}, values)
    return Ablations(subject.name, clean_loss / targets, grid=grid, settings=settings)


def _loss(logp: Float[Tensor, "n d_vocab"], goal: Int[Tensor, " n"]) -> float:
    """Summed cross entropy with the next tokens, nats; positions without one are left out."""
    return -float(S.target_logprob(logp, goal).double().nansum())


@dataclass(frozen=True)
class _Plan:
    """Which parts are ablated, and how."""

    model: LensModel
    kinds: Sequence[str]
    orders: Sequence[str]
    spaces: Mapping[str, Mapping[int, Float[Tensor, "k d"]]]
    n_heads: int
    means: Mapping[tuple[str, int], Float[Tensor, "..."]]  # by kind ("block", "state", "heads") and block
    seed: int

    @property
    def passes(self) -> int:
        """Forward passes per block and batch."""
        first_half = "swap" in self.orders and "delete" not in self.orders
        return len(self.kinds) * (1 + len(self.spaces) + self.n_heads) + len(self.orders) + first_half

    def interventions(
        self, batch: Batch, used: Bool[Tensor, "batch pos"], block: int, plain: Mapping[int, Tensor]
    ) -> Iterator[tuple[Key, list[Hook]]]:
        """The hooks of every ablation of a block; each is to be run before the next one is asked for."""
        model, means = self.model, self.means
        for how in self.kinds:
            whole = edits.where(used, self._edit(how, means.get(("block", block))))
            yield ("block", how), block_edit(model, block, whole)
            for name, rows in self.spaces.items():
                inside = edits.project(rows[block], toward=self._edit(how, means.get(("state", block))))
                yield (name, how), [patch(site(model, block), edits.where(used, inside))]
            for head, mean in enumerate(means.get(("heads", block), [None] * self.n_heads)):
                yield (f"head {head}", how), head_edit(model, block, head, edits.where(used, self._edit(how, mean)))
        yield from _orders(model, batch, block, self.orders, plain)

    def _edit(self, how: str, mean: Tensor | None) -> Edit:
        return edits.zero if how == "zero" else edits.resample(self.seed) if how == "resample" else edits.mean(mean)


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
            logits_of(model, batch, gone)
        yield ("order", "swap"), swapped(model, block, seen["skipped"])
    if "duplicate" in orders:
        yield ("order", "duplicate"), duplicated(model, block, plain[block + 1])


def _means(model: LensModel, texts: Texts, blocks: Sequence[int], heads: bool) -> dict[tuple[str, int], Float[Tensor, "..."]]:
    """Mean contribution and input of every block, and mean output `[head, d_head]` of its heads, over the positions that count."""
    states = Subject(model).states(texts, sorted({at for block in blocks for at in (block, block + 1)}))
    means = {("block", b): (states[b + 1] - states[b]).mean(0) for b in blocks}
    means |= {("state", b): states[b].mean(0) for b in blocks}
    if not heads:
        return means
    total: dict[int, Tensor] = {}
    for batch, used in texts:
        seen: dict[int, Tensor] = {}
        logits_of(model, batch, [read(f"blocks.{b}.attn.hook_z", seen, b) for b in blocks])
        for b, z in seen.items():
            total[b] = total.get(b, 0) + z[used].reshape(int(used.sum()), int(model.cfg.n_heads), -1).sum(0)
    return means | {("heads", b): x / texts.n for b, x in total.items()}


def _check_heads(model: LensModel, batch: Batch, block: int) -> None:
    """Refuse a model whose attention output does not depend on the hook point that is edited."""
    hook = patch(f"blocks.{block}.attn.hook_z", edits.zero)
    if torch.equal(logits_of(model, batch), logits_of(model, batch, [hook])):
        raise RuntimeError(
            "this model's attention ignores edits of hook_z, so ablated heads would change nothing: pass heads=False"
        )
