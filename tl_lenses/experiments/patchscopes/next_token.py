"""How early can the model's next token be read from a hidden state? Token identity beside the logit lens and fitted ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.checks import whole_number
from tl_lenses.experiments.common import MEAN, PATCHED, RANDOM, SHUFFLED, UNPATCHED, Cells, Controlled, Result
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.subject import Layers, Subject, lenses_of, text_settings
from tl_lenses.hooks import run
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel
from tl_lenses.patchscopes import Source, Target, patchscope, scopes

SCOPE = "token identity"
CONTROLS = (SHUFFLED, RANDOM, MEAN, UNPATCHED)


@dataclass(frozen=True, repr=False)
class NextToken(Result):
    """Precision@1 (`cells`) and surprisal of every method at every layer.

    `cells.scores[method]` is `[position, layer]`: whether the method's likeliest token is the model's own.
    `surprisal[method]` is `[position, layer]`: `-log p(t)` in nats, p the model's own distribution and t the method's
    likeliest token. The last layer is the model itself and never chosen as the best one.
    """

    surprisal: dict[str, Float[Tensor, "item layer"]] = field(default_factory=dict)

    name = "next-token"

    @property
    def methods(self) -> list[str]:
        """Names of the methods, without the controls."""
        return [name for name in self.cells.scores if name not in CONTROLS]

    def summary(self) -> Grid:
        """Mean precision and surprisal by method and layer."""
        precision = torch.stack([self.cells.mean(name) for name in self.methods])
        surprisal = torch.stack([self.surprisal[name].double().mean(0) for name in self.methods])
        axes = {"method": self.methods, "layer": self.layers}
        return Grid.over(axes, {"precision": precision, "surprisal": surprisal})

    def tables(self) -> list[Table]:
        """Per layer precision and surprisal, then every method and control in three numbers."""
        title = f"next-token prediction, {self.model}: {len(self.cells.groups)} positions"
        summary = self.summary()
        nats = "-log p(the method's token), nats, p the model's own"
        return [
            summary.table(f"{title}, P@1", "precision", across="method", note="agreement with the model", percent=True),
            summary.table("surprisal", "surprisal", across="method", note=nats),
            self.cells.table("P@1 over the layers; the last one is the model itself and is left out"),
        ]

    def rows(self) -> list[dict[str, Any]]:
        """A row per method and layer: precision (`score`) and surprisal."""
        rows = self.cells.rows()
        for row in rows:
            at = 0 if row["layer"] is None else self.layers.index(row["layer"])
            row["surprisal"] = float(self.surprisal[row["condition"]].double().mean(0)[at])
        return rows


@torch.no_grad()
def next_token(
    model: LensModel, tokens: Any, lenses: Mapping[str, Lens] | None = None, *,
    layers: Layers = None, target: Target | None = None, n: int = 500, per_row: int = 4,
    seed: int = 0, show_progress: bool | None = None,
) -> NextToken:  # fmt: skip
    """Precision@1 and surprisal per layer of the token-identity patchscope, the logit lens and fitted lenses.

    Args:
        tokens: text, as `evaluate` takes it. A row's first position is never drawn.
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
        ValueError: no text; a layer that is not there; a lens of another model object or without one of the layers.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.1; surprisal in the paper's direction, in float32.

    Example:
        >>> print(next_token(model, tokens, {"tuned": lens}))      # doctest: +SKIP
    """
    given = {} if lenses is None else lenses_of(model, lenses, "next-token")
    subject = Subject.of(model, {"logit lens": Lens(model), **given}, layers, what="next-token")
    if taken := set(subject.lenses) & {SCOPE, *CONTROLS}:
        raise ValueError(f"a lens may not be called {sorted(taken)[0]!r}: that is another row of the table")
    everywhere = range(subject.depth + 1)
    n = whole_number("n", n, least=2)
    drawn = subject.draw(subject.batches(tokens), n, seed=seed, per_row=per_row, layers=everywhere)
    vectors = torch.stack([drawn.states[layer] for layer in everywhere], 1)
    logp = drawn.logp.cpu()
    truth = logp.argmax(-1)
    scope = scopes.token_identity() if target is None else target

    def likeliest(source: Source) -> list[Int[Tensor, " layer"]]:
        result = patchscope(model, source, scope, subject.layers, keep="top_k", show_progress=show_progress)
        return list(result.top_ids[..., 0])

    by_condition = {name: torch.stack(rows) for name, rows in Controlled.of(vectors, truth.tolist(), seed).ask(likeliest).items()}
    answers = {SCOPE: by_condition.pop(PATCHED)}
    for name, lens in subject.lenses.items():
        top = [[lens[layer](part).argmax(-1).cpu() for part in vectors[:, layer].split(64)] for layer in subject.layers]
        answers[name] = torch.stack([torch.cat(parts) for parts in top], 1)
    unpatched = run(model, scope.prompt, ())[0, -1].argmax(-1).cpu()  # type: ignore[arg-type]
    answers |= {**by_condition, UNPATCHED: unpatched.expand(len(vectors), 1)}

    cells = Cells(
        [(layer, layer) for layer in subject.layers],
        {name: (x == truth[:, None]).float() for name, x in answers.items()},
        drawn.rows,
        [i for i, layer in enumerate(subject.layers) if layer < subject.depth] or None,
        seed,
    )
    settings = {
        **text_settings(tokens), "n": len(vectors), "target": scope.prompt, "lenses": list(subject.lenses), "seed": seed,
    }  # fmt: skip
    surprisal = {name: -logp.gather(1, x) for name, x in answers.items()}
    return NextToken(subject.name, cells, surprisal, settings=settings)
