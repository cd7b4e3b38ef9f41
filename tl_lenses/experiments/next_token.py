"""How early can the model's next token be read from a hidden state? Token identity beside the logit lens and fitted ones."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.data import as_batches
from tl_lenses.evaluation import used_positions
from tl_lenses.experiments.common import (
    MEAN,
    RANDOM,
    SHUFFLED,
    UNPATCHED,
    Cells,
    Result,
    Table,
    named,
    others,
    random_like,
)
from tl_lenses.experiments.picture import Picture
from tl_lenses.hooks import residual_reads, run
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, check_model, n_layers, prepare
from tl_lenses.patchscopes import Source, Target, patchscope, scopes

SCOPE = "token identity"
CONTROLS = (SHUFFLED, RANDOM, MEAN, UNPATCHED)


@dataclass(frozen=True)
class NextToken(Result):
    """Precision@1 (`cells`) and surprisal of every method at every layer.

    `cells.scores[method]` is `[position, layer]`: whether the method's likeliest token is the model's own.
    `surprisal[method]` is `[position, layer]`: `-log p(t)` in nats, p the model's own distribution and t the method's
    likeliest token. The last layer is the model itself and never chosen as the best one.
    """

    surprisal: dict[str, Float[Tensor, "item layer"]] = field(default_factory=dict)

    name = "next-token"

    @property
    def layers(self) -> list[int]:
        """Source layers."""
        return [a for a, _ in self.cells.pairs]

    @property
    def methods(self) -> list[str]:
        """What was compared, the controls left out."""
        return [name for name in self.cells.scores if name not in CONTROLS]

    def tables(self) -> list[Table]:
        """Per layer precision and surprisal, then every method and control in three numbers."""
        title = f"next-token prediction, {self.model}: {len(self.cells.groups)} positions"
        precision = {m: self.cells.mean(m).tolist() for m in self.methods}
        surprise = {m: self.surprisal[m].double().mean(0).tolist() for m in self.methods}
        by_layer = lambda x: [[str(layer), *(x[m][i] for m in self.methods)] for i, layer in enumerate(self.layers)]
        return [
            Table(f"{title}, P@1", ["layer", *self.methods], by_layer(precision), "agreement with the model"),
            Table(
                "surprisal", ["layer", *self.methods], by_layer(surprise),
                "-log p(the method's token), nats, p the model's own", percent=False,
            ),
            self.cells.table("P@1 over the layers; the last one is the model itself and is left out"),
        ]  # fmt: skip

    def pictures(self) -> dict[str, Picture]:
        """P@1 by method and layer."""
        return {"heat": self.cells.heat(f"P@1, {self.model}")}

    def rows(self) -> list[dict[str, Any]]:
        """A row per method and layer: precision (`score`) and surprisal."""
        found = self.cells.rows()
        for row in found:
            x = self.surprisal[row["condition"]].double().mean(0)
            at = 0 if row["layer"] is None else self.layers.index(row["layer"])
            row["surprisal"] = float(x[at])
        return found


@torch.no_grad()
def next_token(
    model: LensModel,
    tokens: Any,
    lenses: Mapping[str, Lens] | None = None,
    *,
    layers: Iterable[int] | None = None,
    target: Target | None = None,
    n: int = 500,
    per_row: int = 4,
    seed: int = 0,
    show_progress: bool | None = None,
) -> NextToken:
    """Precision@1 and surprisal per layer of the token-identity patchscope, the logit lens and fitted lenses.

    Args:
        model: of both runs.
        tokens: text to read, `token_batches(...)` or what `evaluate` takes. A row's first position is never drawn.
        lenses: fitted lenses to compare with, by name; the logit lens is always there.
        layers: `0..n_layers` by default; l* = l.
        target: another prompt than `tll.scopes.token_identity()`.
        n: positions, drawn at random.
        per_row: positions of one row, at most.
        seed: of the draw and the controls.

    Returns:
        `NextToken`. The controls go through the same prompt: the vector of another position, a random one of the same
        length, the mean of all, and the prompt unpatched.

    Raises:
        ValueError: no text, a layer that is not there, a lens without one of the layers.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.1; surprisal in the paper's direction, in float32.

    Example:
        >>> print(next_token(model, tokens, {"tuned": lens}))      # doctest: +SKIP
    """
    check_model(model, what="an experiment")
    depth = n_layers(model)
    wanted = list(range(depth + 1)) if layers is None else [range(depth + 1)[layer] for layer in layers]
    lenses = {"logit lens": Lens(model), **(lenses or {})}
    if taken := set(lenses) & {SCOPE, *CONTROLS}:
        raise ValueError(f"a lens may not be called {sorted(taken)[0]!r}: that is another row of the table")
    decoders = {name: [lens[layer] for layer in wanted] for name, lens in lenses.items()}
    vectors, own, groups = _drawn(model, tokens, n, per_row, seed)
    truth = own.argmax(-1)
    scope = scopes.token_identity() if target is None else target

    said = lambda x: _said(model, x, scope, wanted, show_progress)
    answers = {SCOPE: said(vectors)}
    for name, maps in decoders.items():
        found = [_in_parts(decode, vectors[:, layer]) for layer, decode in zip(wanted, maps, strict=True)]
        answers[name] = torch.stack(found, 1)
    answers[SHUFFLED] = answers[SCOPE][others(truth.tolist(), seed)]
    answers[RANDOM] = said(random_like(vectors, seed))
    answers[MEAN] = said(vectors.mean(0, keepdim=True)).expand(len(vectors), -1)
    unpatched = run(model, scope.prompt, ())[0, -1].argmax(-1).cpu()  # type: ignore[arg-type]
    answers[UNPATCHED] = unpatched.expand(len(vectors), 1)

    return NextToken(
        named(model),
        Cells(
            [(layer, layer) for layer in wanted],
            {name: (x == truth[:, None]).float() for name, x in answers.items()},
            groups,
            [i for i, layer in enumerate(wanted) if layer < depth] or None,
            seed,
        ),
        {name: -own.gather(1, x) for name, x in answers.items()},
        settings={"n": len(vectors), "target": scope.prompt, "lenses": list(lenses), "seed": seed},
    )


def _drawn(
    model: LensModel, tokens: Any, n: int, per_row: int, seed: int
) -> tuple[Float[Tensor, "n layer d"], Float[Tensor, "n d_vocab"], list[int]]:
    """Residuals of random positions, the model's log-probabilities there, and the row that each comes from."""
    generator = torch.Generator().manual_seed(seed)
    layers = list(range(n_layers(model) + 1))
    vectors, own, groups, row = [], [], [], 0
    for batch in as_batches(tokens):
        batch = prepare(model, batch.tokens, batch.attention_mask)
        seen: dict[Any, Tensor] = {}
        logits = run(model, batch.tokens, residual_reads(model, layers, seen), attention_mask=batch.attention_mask)
        for b, real in enumerate(used_positions(batch, True).cpu()):
            columns = real.nonzero()[:, 0]
            picked = columns[torch.randperm(len(columns), generator=generator)[: min(per_row, n - len(groups))]]
            for column in picked.tolist():
                vectors.append(torch.stack([seen[layer][b, column] for layer in layers]))
                own.append(S.log_probs(logits[b, column]).cpu())
                groups.append(row)
            row += 1
        if len(groups) >= n:
            break
    if len(groups) < 2:
        raise ValueError("the text gives fewer than two positions: pass more of it, or longer rows")
    return torch.stack(vectors), torch.stack(own), groups


def _said(
    model: LensModel, vectors: Tensor, scope: Target, layers: list[int], show_progress: bool | None
) -> Int[Tensor, "n layer"]:
    """The likeliest token after the patched prompt."""
    result = patchscope(model, Source(vectors), scope, layers, keep="top_k", show_progress=show_progress)
    return result.top_ids[..., 0]


def _in_parts(decode: Callable[[Tensor], Tensor], x: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    return torch.cat([decode(part).argmax(-1).cpu() for part in x.split(64)])
