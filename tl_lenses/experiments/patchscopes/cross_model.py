"""Can another model go on from a state of this one? Patches through fitted maps, beside how often the two agree anyway."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_lenses.checks import seed_of, whole_number
from tl_lenses.experiments.common import UNPATCHED, Cells, Controlled, Result, vectors_of
from tl_lenses.experiments.grid import Table
from tl_lenses.experiments.subject import Subject, text_settings
from tl_lenses.hooks import run
from tl_lenses.layers import as_layer, resolve_layer, site_layer
from tl_lenses.model import LensModel, prepare
from tl_lenses.patchscopes import Source, Target, patchscope, scopes
from tl_lenses.patchscopes.pairs import listed_pairs
from tl_lenses.progress import progress
from tl_lenses.text.batches import Text
from tl_lenses.tokens import used_positions
from tl_lenses.translators import Translators
from tl_lenses.views import Picture

SAME, SCOPE = "same prompt", "token identity"


@dataclass(frozen=True, repr=False)
class CrossModel(Result):
    """P@1 of the other model, patched, against the source model's next token, in every cell.

    `cells` is the same prompt patched at the same place; `scope` the token-identity prompt.

    Attributes:
        to: name of the target model.
        scope: as `cells`, with the token-identity prompt as target.
        kept: as `cells`, against the target model's own next token: how much of it a patch leaves.
    """

    to: str
    scope: Cells
    kept: Cells

    name = "cross-model"

    def tables(self) -> list[Table]:
        """Three numbers for both targets; `unpatched` is how often the two models agree."""
        n = len(self.cells.groups)
        return [
            self.cells.table(f"{self.model} into {self.to}, {n} positions: P@1, same prompt, same place"),
            self.scope.table("P@1, token-identity prompt"),
            self.kept.table("same prompt, against the target model's own next token"),
        ]

    def pictures(self) -> dict[str, Picture]:
        """P@1 by (l, l*), for both targets; then by source layer with its interval."""
        title = f"P@1, {self.model} into {self.to}"
        same, scope = f"{title}, same prompt", f"{title}, token identity"
        return {
            "heat": self.cells.heat(same), "heat-scope": self.scope.heat(scope),
            "layers": self.cells.lines(same, "P@1"), "layers-scope": self.scope.lines(scope, "P@1"),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """A row per target, condition and cell."""
        return [
            *self.cells.rows(target=SAME),
            *self.scope.rows(target=SCOPE),
            *self.kept.rows(target=f"{SAME}, the target's own token"),
        ]


@torch.no_grad()
def cross_model(
    model: LensModel, to: LensModel, maps: Translators, tokens: Any, *, pairs: Iterable[tuple[int, int]] | None = None,
    n: int = 60, seed: int = 0, show_progress: bool | None = None,
) -> CrossModel:  # fmt: skip
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
        whole text, and a patch has to beat its agreement with the source model. The other controls are mapped like the
        vectors.

    Raises:
        ValueError: no text, maps of other models, or a layer that is not there.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.4 and appendix E.

    Example:
        >>> print(cross_model(small, big, maps, tokens))      # doctest: +SKIP
    """
    source, goal = Subject.of(model, what="cross-model"), Subject.of(to, what="cross-model")
    if not isinstance(maps, Translators):
        raise TypeError(f"maps must be Translators, of fit_regression(model, tokens, to=...), got {type(maps).__name__}")
    seed = seed_of(seed)
    if pairs is None:
        sites = [(site_layer(a), site_layer(b)) for a, b in maps.rows]
        cells = [(a, b) for a, b in sites if a is not None and b is not None]
    else:
        resolved = lambda layer, subject: resolve_layer(as_layer(layer), subject.depth)
        cells = [(resolved(a, source), resolved(b, goal)) for a, b in listed_pairs(pairs)]
    prefixes = _prefixes(model, tokens, whole_number("n", n, least=2), seed)
    if len(prefixes) < 2:
        raise ValueError("the text gives fewer than two prompts: pass more of it, or longer rows")
    truth, natural = _next(model, prefixes), _next(to, prefixes)
    vectors = Controlled.of(vectors_of(model, [Source(ids) for ids in prefixes]), truth.tolist(), seed)

    def likeliest(source: Source, target: Target, show: bool | None) -> list[Int[Tensor, " cell"]]:
        result = patchscope(model, source, target, pairs=cells, map=maps, to=to, keep="top_k", show_progress=show)
        return list(result.top_ids[..., 0])

    same: dict[str, list[Tensor]] = {}
    for i, ids in enumerate(progress(prefixes, desc="cross-model", show=show_progress)):
        for name, rows in vectors.ask(lambda source, ids=ids: likeliest(source, Target(ids), False), [i]).items():
            same.setdefault(name, []).extend(rows)
    same[UNPATCHED] = list(natural[:, None])
    identity = scopes.token_identity()
    scope = vectors.ask(lambda source: likeliest(source, identity, show_progress))
    scope[UNPATCHED] = [run(to, identity.prompt)[0, -1:].argmax(-1).cpu()] * len(prefixes)  # type: ignore[arg-type]

    def scored(predicted: dict[str, list[Tensor]], answers: Int[Tensor, " n"]) -> Cells:
        right = {name: (torch.stack(rows) == answers[:, None]).float() for name, rows in predicted.items()}
        return Cells(cells, right, list(range(len(prefixes))), seed=seed)

    settings = {
        **text_settings(tokens), "to": goal.name, "pairs": cells, "n": len(prefixes), "seed": seed,
        "maps": maps.meta.get("settings", {}),
    }  # fmt: skip
    return CrossModel(source.name, scored(same, truth), goal.name, scored(scope, truth), scored(same, natural), settings=settings)


def _prefixes(model: LensModel, tokens: Any, n: int, seed: int) -> list[Tensor]:
    """One row each, cut after a random position that is not the first."""
    generator = torch.Generator().manual_seed(seed)
    prefixes: list[Tensor] = []
    for batch in Text.of(tokens).to_run("cross-model"):
        batch = prepare(model, batch.tokens, batch.attention_mask)
        for row, real in zip(batch.tokens.cpu(), used_positions(batch, True).cpu(), strict=True):
            columns = real.nonzero()[:, 0]
            if len(columns) and len(prefixes) < n:
                end = int(columns[torch.randint(len(columns), (1,), generator=generator)])
                start = int(columns[0]) - 1
                prefixes.append(row[start : end + 1])
        if len(prefixes) >= n:
            break
    return prefixes


def _next(model: LensModel, prefixes: list[Tensor]) -> Int[Tensor, " n"]:
    return torch.stack([run(model, ids)[0, -1].argmax(-1).cpu() for ids in prefixes])
