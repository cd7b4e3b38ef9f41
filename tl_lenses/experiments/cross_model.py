"""Can another model go on from a state of this one? Patches through fitted maps, beside how often the two agree anyway."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.data import as_batches
from tl_lenses.evaluation import used_positions
from tl_lenses.experiments.common import (
    MEAN,
    PATCHED,
    RANDOM,
    SHUFFLED,
    UNPATCHED,
    Cells,
    Result,
    Table,
    named,
    others,
    random_like,
    vectors_of,
)
from tl_lenses.experiments.picture import Picture
from tl_lenses.hooks import run
from tl_lenses.model import LensModel, check_model, n_layers, prepare
from tl_lenses.patchscopes import Source, Target, patchscope, scopes
from tl_lenses.progress import progress
from tl_lenses.sites import site_layer
from tl_lenses.translators import Translators

SAME, SCOPE = "same prompt", "token identity"


@dataclass(frozen=True)
class CrossModel(Result):
    """P@1 of the other model, patched, against the source model's next token, in every cell.

    `cells` is the same prompt patched at the same place; `scope` the token-identity prompt.

    Attributes:
        to: name of the target model.
        scope: as `cells`, with the token-identity prompt as target.
        own: as `cells`, against the target model's own next token: what the patch leaves of it.
    """

    to: str = ""
    scope: Cells | None = None
    own: Cells | None = None

    name = "cross-model"

    def tables(self) -> list[Table]:
        """Three numbers for both targets; `unpatched` is how often the two models agree."""
        n = len(self.cells.groups)
        assert self.scope is not None and self.own is not None
        return [
            self.cells.table(f"{self.model} into {self.to}, {n} positions: P@1, same prompt, same place"),
            self.scope.table("P@1, token-identity prompt"),
            self.own.table("same prompt, against the target model's own next token"),
        ]

    def pictures(self) -> dict[str, Picture]:
        """P@1 by (l, l*), for both targets."""
        assert self.scope is not None
        return {
            "heat": self.cells.heat(f"P@1, {self.model} into {self.to}, same prompt"),
            "heat-scope": self.scope.heat(f"P@1, {self.model} into {self.to}, token identity"),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row per target, condition and cell."""
        assert self.scope is not None and self.own is not None
        return [
            *self.cells.rows(target=SAME),
            *self.scope.rows(target=SCOPE),
            *self.own.rows(target=f"{SAME}, the target's own token"),
        ]


@torch.no_grad()
def cross_model(
    model: LensModel,
    to: LensModel,
    maps: Translators,
    tokens: Any,
    *,
    pairs: Iterable[tuple[int, int]] | None = None,
    n: int = 60,
    seed: int = 0,
    show_progress: bool | None = None,
) -> CrossModel:
    """Patch states of one model into another one through fitted maps, and compare its next token with the first model's.

    The last token of a random prefix is patched, in the same prompt and in the token-identity prompt.

    Args:
        model: the source.
        to: the target, with the same tokenizer.
        maps: `tll.fit_regression(model, tokens, to=to, pairs=...)`.
        tokens: other text than the maps were fitted on; one position of each row.
        pairs: cells `(l, l*)`; all that the maps have by default.
        n: positions.
        seed: of the draw and the controls.

    Returns:
        `CrossModel`. Its *unpatched* row is the control that matters: in the same prompt the target model has read the
        whole text, and how often it then agrees with the source model is what a patch is to be compared with. The
        other controls are mapped like the vectors.

    Raises:
        ValueError: no text, or maps of other models.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.4 and appendix E.

    Example:
        >>> print(cross_model(small, big, maps, tokens))      # doctest: +SKIP
    """
    check_model(model, what="an experiment")
    check_model(to, what="an experiment")
    cells = _pairs(maps, n_layers(model), n_layers(to)) if pairs is None else list(pairs)
    prefixes = _prefixes(model, tokens, n, seed)
    if len(prefixes) < 2:
        raise ValueError("the text gives fewer than two prompts: pass more of it, or longer rows")
    vectors = vectors_of(model, [Source(ids) for ids in prefixes])
    truth, natural = _next(model, prefixes), _next(to, prefixes)
    shuffled = others(truth.tolist(), seed)
    noise, mean = random_like(vectors, seed), vectors.mean(0)

    said: dict[str, list[Tensor]] = {PATCHED: [], SHUFFLED: [], RANDOM: [], MEAN: []}
    for i, ids in enumerate(progress(prefixes, desc="cross-model", show=show_progress)):
        rows = torch.stack([vectors[i], vectors[shuffled[i]], noise[i], mean])
        found = patchscope(
            model, Source(rows), Target(ids), pairs=cells, map=maps, to=to, keep="top_k", show_progress=False
        )
        for name, row in zip(said, found.top_ids[..., 0], strict=True):
            said[name].append(row)
    answers = {name: torch.stack(rows) for name, rows in said.items()}
    answers[UNPATCHED] = natural[:, None]

    identity = scopes.token_identity()
    found = patchscope(
        model, Source(torch.cat([vectors, noise, mean[None]])), identity, pairs=cells, map=maps, to=to, keep="top_k",
        show_progress=show_progress,
    ).top_ids[..., 0]  # fmt: skip
    k = len(prefixes)
    read = {PATCHED: found[:k], SHUFFLED: found[shuffled], RANDOM: found[k : 2 * k], MEAN: found[-1:].expand(k, -1)}
    read[UNPATCHED] = run(to, identity.prompt)[0, -1].argmax(-1).cpu().expand(k, 1)  # type: ignore[arg-type]

    scored = lambda said, goal: Cells(
        cells, {name: (x == goal[:, None]).float() for name, x in said.items()}, list(range(k)), seed=seed
    )
    return CrossModel(
        named(model), scored(answers, truth), named(to), scored(read, truth), scored(answers, natural),
        settings={"to": named(to), "pairs": cells, "n": k, "seed": seed, "maps": maps.meta.get("settings", {})},
    )  # fmt: skip


def _pairs(maps: Translators, depth: int, goal: int) -> list[tuple[int, int]]:
    """The layers of the maps' rows."""
    found = [(site_layer(a, depth), site_layer(b, goal)) for a, b in maps.rows]
    return [(a, b) for a, b in found if a is not None and b is not None]


def _prefixes(model: LensModel, tokens: Any, n: int, seed: int) -> list[Tensor]:
    """One row each, cut behind a random position that is not the first."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for batch in as_batches(tokens):
        batch = prepare(model, batch.tokens, batch.attention_mask)
        for row, real in zip(batch.tokens.cpu(), used_positions(batch, True).cpu(), strict=True):
            columns = real.nonzero()[:, 0]
            if len(columns) and len(found) < n:
                end = int(columns[torch.randint(len(columns), (1,), generator=generator)])
                start = int(columns[0]) - 1
                found.append(row[start : end + 1])
        if len(found) >= n:
            break
    return found


def _next(model: LensModel, prefixes: list[Tensor]) -> Int[Tensor, " n"]:
    return torch.stack([run(model, ids)[0, -1].argmax(-1).cpu() for ids in prefixes])
