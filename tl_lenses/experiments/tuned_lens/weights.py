"""Which tokens do the weights write and read? Singular vectors and columns of attention and MLP as tokens, through a lens."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_lenses.checks import seed_of, some_of, whole_number
from tl_lenses.deprecation import renamed
from tl_lenses.experiments.grid import Grid, Table, interval
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Lenses, Subject
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, d_model, name_of
from tl_lenses.numerics import gain, mean_interval
from tl_lenses.progress import progress
from tl_lenses.token_text import token_text
from tl_lenses.unembed import Readout
from tl_lenses.views import Picture

# Readers of the stream are decoded at the layer before their block, writers at the layer after it.
READS = ("QK query", "QK key", "OV in", "MLP in, singular", "MLP in, columns")
WRITES = ("OV out", "MLP out, singular", "MLP out, columns")
KINDS = (*READS, *WRITES)
RANDOM = "random vectors"


@dataclass(frozen=True)
class Reading:
    """Vectors of one kind in one block, read through one lens."""

    # lens, kind, block: which; a block of `random vectors` stands for the layer
    lens: str
    kind: str
    block: int
    labels: list[str]  # one per vector, such as `"head 3, singular vector 0 +"`
    ids: Int[Tensor, "n k"]  # top tokens, best first
    coherence: Float[Tensor, " n"]  # mean pairwise cosine of the top tokens' embeddings


@dataclass(frozen=True, repr=False)
class Weights(Report):
    """Readings of all kinds, with random vectors read in the same way.

    The grid has the axes lens and layer (of the block), and the mean coherence of all vectors of a block (`coherence`) and of
    the random ones (`random`), each with its 95% interval over vectors (`coherence_low`, `coherence_high`).

    Attributes:
        readings: one per lens, kind and block.
        words: the tokens that occur in them, by id.
    """

    readings: list[Reading]
    words: dict[int, str] = field(default_factory=dict)

    name = "weights"

    def scores(self, lens: str, kind: str | Sequence[str], block: int | None = None) -> Float[Tensor, " n"]:
        """Coherence of all vectors of a kind or of several, in one block or in all."""
        kinds = [kind] if isinstance(kind, str) else kind
        there = lambda r, kind: (r.lens, r.kind) == (lens, kind) and block in (None, r.block)
        parts = [r.coherence for kind in kinds for r in self.readings if there(r, kind)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def summary(self, lens: str, kind: str) -> tuple[float, float, float, float]:
        """Mean coherence, its 95% interval over vectors, and the share of vectors above 95% of the random ones."""
        x = self.scores(lens, kind).double()
        low, high = mean_interval(x, seed=self.settings.get("seed", 0))
        floor = self.scores(lens, RANDOM).double().quantile(0.95)
        return float(x.mean()), float(low), float(high), float((x > floor).double().mean())

    def tables(self) -> list[Table]:
        """A row per kind and lens, then the most coherent vectors."""
        rows = []
        for kind in (*KINDS, RANDOM):
            if any(r.kind == kind for r in self.readings):
                row = [kind, str(len(self.scores(self.lenses[0], kind)))]
                for lens in self.lenses:
                    *mean, above = self.summary(lens, kind)
                    row += [interval(*mean, digits=3), f"{100 * above:.0f}%"]
                rows.append(row)
        columns = ["vectors of", "n"] + [c for lens in self.lenses for c in (lens, "above")]
        top, among = self.settings.get("k"), self.settings.get("among")
        note = (
            f"mean pairwise cosine of the {top} top tokens' embeddings ({self.settings.get('embeddings')}, centred), with a 95% "
            f"interval over vectors; {'' if among is None else f'of {among} tokens; '}above: the share that exceeds 95% of the random ones"
        )
        tables = [Table(f"coherence of the weights, {self.model}", columns, rows, note, percent=False)]
        for lens in self.lenses:
            rows = [
                [f"{r.kind}, block {r.block}", r.labels[i], float(r.coherence[i]), self.text(r.ids[i])]
                for r, i in self.best(lens, 6)
            ]
            tables.append(Table(f"most coherent, {lens}", ["", "vector", "score", "top tokens"], rows, percent=False))
        return tables

    def best(self, lens: str, n: int) -> list[tuple[Reading, int]]:
        """The most coherent vectors of all blocks, one of each kind at most."""
        score = lambda pair: float(pair[0].coherence[pair[1]])
        of_kind = lambda kind: [r for r in self.readings if (r.lens, r.kind) == (lens, kind)]
        pairs = [[(r, i) for r in of_kind(kind) for i in range(len(r.labels))] for kind in KINDS]
        return sorted((max(of, key=score) for of in pairs if of), key=score, reverse=True)[:n]

    def text(self, ids: Int[Tensor, " k"]) -> str:
        """Tokens as one line."""
        return " ".join(repr(self.words.get(int(i), str(int(i)))) for i in ids[:6])

    def pictures(self) -> dict[str, Picture]:
        """Mean coherence by block, all kinds together, beside the random vectors."""
        named, title = {"coherence": "{}", "random": "{}, random"}, f"Coherence of weight vectors, {self.model}"
        return {"coherence": self.grid.lines(title, named, by="lens", across="block", up="mean cosine")}

    def rows(self) -> list[dict[str, Any]]:
        """A row per vector."""
        return [
            {
                "lens": r.lens, "kind": r.kind, "block": r.block, "vector": label, "coherence": float(score),
                "tokens": self.text(ids),
            }
            for r in self.readings
            for label, score, ids in zip(r.labels, r.coherence, r.ids, strict=True)
        ]  # fmt: skip


@renamed(blocks="layers")
@torch.no_grad()
def weights(
    model: LensModel, lenses: Lenses, *, kinds: Sequence[str] = KINDS,
    layers: Layers = None, k: int = 10, directions: int = 8, columns: int = 64,
    embeddings: str | Float[Tensor, "d_vocab d_embed"] = "W_E", among: Int[Tensor, " some"] | None = None,
    n_random: int = 200, seed: int = 0, show_progress: bool | None = None,
) -> Weights:  # fmt: skip
    """Top tokens and coherence of the vectors that attention and MLP write to the residual stream and read from it.

    `tokens(v) = top-k of W_U^T N'(A_l v)`, N' the final norm without its bias, A_l the lens' weight without its bias; coherence
    is the mean cosine over pairs of the top tokens' centred embeddings. OV = W_V W_O and QK = W_Q W_K^T per head, as
    `U S V^T`: U reads (queries and the source of values), V writes (OV) or reads keys (QK). A singular vector has no sign, so both
    of its signs are read; a column has one.

    The gain of the block's norm is put into the vectors that read. The mean, which LayerNorm removes, is taken off both, so
    that folded and raw weights give the same. Norms after attention or MLP (Gemma) are not put in.

    Args:
        model: its weights are read; it never runs.
        kinds: some of `KINDS`.
        layers: blocks by the layer that enters them, `0..n_layers - 1`; all by default.
        k: top tokens, from 2.
        directions: singular vectors per matrix, largest first, from 1 to the dimensions of a head.
        columns: rows or columns of an MLP per block, drawn at random.
        embeddings: whose cosines count, `"W_E"`, `"W_U"`, or a matrix with a row per token (the paper took BPEmb).
        among: ids that may be top tokens; all by default. Tokens that a model has never seen have embeddings that point one way:
            they fill the lists of many directions, random ones too, and are all alike. Name those that occur in a text.
        n_random: random vectors per layer, read in the same way.
        seed: of the draws.

    Raises:
        ValueError: more directions than a head or the stream has dimensions, a kind or a block that is not there, weights that
            the model does not show, a lens of another model.

    Source: Belrose et al. 2023 (Tuned Lens), appendix on static interpretability (Table 3); Millidge and Black 2022.

    Example:
        >>> result = weights(model, {"tuned": lens}, layers=[6], kinds=["OV out"])      # doctest: +SKIP
        >>> result.summary("tuned", "OV out")      # doctest: +SKIP
    """
    blocks = Subject.of(model, layers=layers, what="weights", final="never").layers
    kinds, seed = some_of("kinds", kinds, KINDS), seed_of(seed)
    k, directions = _check_numbers(model, kinds, k, directions, among)
    columns, n_random = whole_number("columns", columns, least=1), whole_number("n_random", n_random, least=1)
    read = sorted({block + (kind in WRITES) for block in blocks for kind in kinds})
    lenses = Subject.of(model, lenses, read, what="weights").lenses
    table = _table(model, embeddings, among)
    generator = torch.Generator().manual_seed(seed)
    of_columns = blocks if any("columns" in kind for kind in kinds) else []
    pick = {block: torch.randperm(int(model.cfg.d_mlp), generator=generator)[:columns] for block in of_columns}

    readings: list[Reading] = []
    for block in progress(blocks, desc="weights", show=show_progress):
        vectors = _vectors(model, block, kinds, directions, pick.get(block))
        noise = torch.randn(n_random, d_model(model), generator=torch.Generator().manual_seed(seed + block))
        vectors[RANDOM] = [str(i) for i in range(n_random)], noise.to(model.W_U)  # type: ignore[attr-defined]
        for name, lens in lenses.items():
            for kind, (labels, x) in vectors.items():
                layer = block + (kind in WRITES or (kind == RANDOM and block not in read))
                ids = tokens_of(lens, layer, x, k, among)
                readings.append(Reading(name, kind, block, labels, ids, coherence(table, ids)))
    shown = sorted({int(i) for r in readings if r.kind != RANDOM for i in r.ids.flatten().unique()})
    tokenizer = getattr(model, "tokenizer", None)
    words = token_text(tokenizer, shown) if tokenizer is not None else {}
    settings = {
        "data": "the weights alone", "k": k, "directions": directions, "columns": columns, "random": n_random, "seed": seed,
        "embeddings": embeddings if isinstance(embeddings, str) else "given",
        "among": None if among is None else len(among),
    }  # fmt: skip
    report = Weights(name_of(model), readings, words, settings=settings)
    values = {}
    for name, kinds in (("coherence", KINDS), ("random", [RANDOM])):
        of = [report.scores(lens, kinds, block).double() for lens in lenses for block in blocks]
        ends = zip(*(mean_interval(x, seed=seed) for x in of), strict=True)
        for end, x in zip(("", "_low", "_high"), ([x.mean() for x in of], *ends), strict=True):
            values[f"{name}{end}"] = torch.stack(list(x)).view(len(lenses), len(blocks))
    return replace(report, grid=Grid.over({"lens": list(lenses), "layer": blocks}, values))


def _check_numbers(
    model: LensModel, kinds: Sequence[str], k: int, directions: int, among: Int[Tensor, " some"] | None
) -> tuple[int, int]:
    """k and directions, in the range that the model gives them."""
    k, directions = whole_number("k", k), whole_number("directions", directions)
    heads = any(kind.startswith(("QK", "OV")) for kind in kinds)
    most, where = (int(model.cfg.d_head), "a head") if heads else (d_model(model), "the residual stream (d_model)")
    if not 1 <= directions <= most:
        raise ValueError(f"directions is {directions}: {where} has {most} dimensions, so pass 1 to {most}")
    if not 2 <= k <= int(model.cfg.d_vocab):
        raise ValueError(f"k is {k}: a coherence needs 2 tokens or more, at most the vocabulary of {model.cfg.d_vocab}")
    if among is not None and (not isinstance(among, Tensor) or among.ndim != 1 or among.is_floating_point()):
        raise TypeError(f"among must be token ids [n], got {type(among).__name__}")
    if among is not None and not k <= len(among):
        raise ValueError(f"among has {len(among)} tokens: pass {k} or more, as many as are listed")
    return k, directions


def coherence(table: Float[Tensor, "d_vocab d_embed"], ids: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Mean cosine over pairs: `(|sum e|^2 - k) / (k (k - 1))` for unit rows e of a table."""
    k = ids.shape[1]
    total = table[ids.to(table.device)].double().sum(1)
    return ((total**2).sum(-1) - k).cpu() / (k * (k - 1))


def tokens_of(
    lens: Lens, layer: int, x: Float[Tensor, "n d_model"], k: int, among: Int[Tensor, " some"] | None = None
) -> Int[Tensor, "n k"]:
    """The top tokens of directions at a layer. Length does not count, as the norm divides by it."""
    decode, readout = lens[layer], lens.readout
    y = x if decode.affine is None else x @ decode.affine.weight.to(x).T
    y = (y * (y.shape[-1] ** 0.5 / y.norm(dim=-1, keepdim=True).clamp_min(1e-30))).to(readout.dtype)
    direction = readout.norm(y) - readout.norm(torch.zeros_like(y[:1]))
    w_u, _ = readout.weights()
    w_u = w_u if among is None else w_u[:, among.to(w_u.device)]
    top = torch.cat([(part @ w_u).topk(k).indices.cpu() for part in direction.split(256)])
    return top if among is None else among.cpu()[top]


def _vectors(
    model: LensModel, block: int, kinds: Sequence[str], n: int, pick: Int[Tensor, " columns"] | None
) -> dict[str, tuple[list[str], Float[Tensor, "n d_model"]]]:
    """Directions of one block by kind, with labels, in the coordinates of the residual stream."""
    part = model.blocks[block]  # type: ignore[attr-defined]
    norm = getattr(part, "ln1", None)
    before = {"attn": norm, "mlp": getattr(part, "ln2", None) or norm}  # parallel blocks may share one norm
    readout = Readout(model)
    _, after = gain(readout.norm_module, readout.d_model, model.W_U)  # type: ignore[attr-defined]
    vectors: dict[str, tuple[list[str], Tensor]] = {}

    def reads(where: str, name: str) -> Tensor:
        """`[..., d_model, out]` with the norm before it put in."""
        w = _weight(part, where, name)
        scale, removes = gain(before[where], w.shape[-2], w)
        w = scale[:, None] * w
        return w - w.mean(-2, keepdim=True) if removes else w

    def writes(where: str, name: str) -> Tensor:
        w = _weight(part, where, name)
        return w - w.mean(-1, keepdim=True) if after else w

    if any(kind.startswith("QK") for kind in kinds):
        w_q = reads("attn", "W_Q")
        u, v = _singular(w_q, _heads(reads("attn", "W_K"), len(w_q)), n)
        vectors["QK query"], vectors["QK key"] = _signed(u), _signed(v)
    if any(kind.startswith("OV") for kind in kinds):
        w_o = writes("attn", "W_O")
        u, v = _singular(_heads(reads("attn", "W_V"), len(w_o)), w_o.mT, n)
        vectors["OV in"], vectors["OV out"] = _signed(u), _signed(v)
    for kind, w in (("MLP in", lambda: reads("mlp", "W_in").mT), ("MLP out", lambda: writes("mlp", "W_out"))):
        if f"{kind}, singular" in kinds:
            vectors[f"{kind}, singular"] = _signed(torch.linalg.svd(w().float(), full_matrices=False).Vh[None, :n])
        if f"{kind}, columns" in kinds and pick is not None:
            vectors[f"{kind}, columns"] = ([f"neuron {int(i)}" for i in pick], w()[pick.to(w().device)])
    return {kind: vectors[kind] for kind in kinds if kind in vectors}


def _weight(block: Any, where: str, name: str) -> Float[Tensor, "*head d_in d_out"]:
    try:
        w = getattr(getattr(block, where), name)
        return w.detach()
    except (AttributeError, TypeError, NotImplementedError):
        raise ValueError(
            f"this model shows no {name} in {where} (a mixture of experts, or no such part): choose other kinds"
        ) from None


def _heads(w: Float[Tensor, "kv d d_head"], n: int) -> Float[Tensor, "head d d_head"]:
    """Keys and values that several heads share, for each head (grouped-query attention)."""
    return w.repeat_interleave(n // len(w), 0)


def _singular(
    a: Float[Tensor, "head d r"], b: Float[Tensor, "head d r"], n: int
) -> tuple[Float[Tensor, "head n d"], Float[Tensor, "head n d"]]:
    """Left and right singular vectors of `a b^T` per head, without building it: `a = Q_a R_a`, `b = Q_b R_b`, SVD of `R_a R_b^T`."""
    (qa, ra), (qb, rb) = (torch.linalg.qr(x.float()) for x in (a, b))
    u, _, vh = torch.linalg.svd(ra @ rb.mT)
    return (qa @ u)[..., :n].mT, (qb @ vh.mT)[..., :n].mT


def _signed(x: Float[Tensor, "head n d"]) -> tuple[list[str], Float[Tensor, "m d"]]:
    single = len(x) == 1
    labels = [f"{'' if single else f'head {h}, '}{i}{sign}" for h in range(x.shape[0]) for i in range(x.shape[1]) for sign in "+-"]
    return labels, torch.stack([x, -x], 2).flatten(0, 2)


def _table(model: LensModel, embeddings: str | Tensor, among: Tensor | None) -> Float[Tensor, "d_vocab d_embed"]:
    if isinstance(embeddings, str):
        if embeddings not in ("W_E", "W_U"):
            raise ValueError(f"embeddings must be 'W_E', 'W_U' or a matrix, got {embeddings!r}")
        w = getattr(model, embeddings).detach()
        w = w.T if embeddings == "W_U" else w
    else:
        w = embeddings
        if not isinstance(w, Tensor) or w.ndim != 2:
            raise TypeError(f"embeddings must be 'W_E', 'W_U' or a matrix, got {type(w).__name__}")
        if w.shape[0] != int(model.cfg.d_vocab):
            raise ValueError(f"embeddings have {w.shape[0]} rows: expected one per token, {model.cfg.d_vocab}")
    w = w[: int(model.cfg.d_vocab)].float()
    return nn.functional.normalize(w - (w if among is None else w[among.to(w.device)]).mean(0), dim=-1)
