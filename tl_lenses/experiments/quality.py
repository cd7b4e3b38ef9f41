"""How good are the lenses, and how biased? KL, bits per byte and marginal bias per layer, for one model or several."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from tl_lenses.evaluation import Scores, evaluate
from tl_lenses.experiments.picture import Lines, Picture
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.experiments.streams import check_lenses, common_layers
from tl_lenses.hooks import Hook
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, n_layers

# What is shown: key of a row, heading, title of the picture.
_SHOWN = {
    "kl": ("KL", "KL(model || lens), nats"),
    "bits_per_byte": ("bits/byte", "cross entropy of the next token, bits per byte"),
    "bias_bits": ("bias", "marginal bias, bits"),
}


@dataclass(frozen=True)
class Quality(Report):
    """Scores of lenses per layer, by model. `first + second` puts several models into one table and one figure.

    Attributes:
        scores: `evaluate`'s rows by model name; the last layer of each is the model itself.
        depths: `n_layers` of each model.
    """

    scores: dict[str, Scores]
    depths: dict[str, int]

    name = "quality"

    def __add__(self, other: "Quality") -> "Quality":
        """Both reports' models in one.

        Raises:
            ValueError: a model that is in both.
        """
        if twice := [one for one in self.scores if one in other.scores]:
            raise ValueError(f"{twice[0]!r} is in both reports: give quality(..., name=...) another name")
        settings = {**self.settings, "tokens": self.settings["tokens"] | other.settings["tokens"]}
        return Quality(
            f"{self.model}, {other.model}", self.scores | other.scores, self.depths | other.depths, settings=settings
        )

    @property
    def lenses(self) -> list[str]:
        """Names of the lenses, over all models."""
        return list(dict.fromkeys(row["lens"] for one in self.scores.values() for row in one.rows))

    def rows(self) -> list[dict[str, Any]]:
        """A row per model, lens and layer: what `evaluate` gives, the share of the depth, and the bias in bits."""
        return [
            {"model": model, **row, "depth": row["layer"] / self.depths[model], "bias_bits": row["bias"] / log(2)}
            for model, scores in self.scores.items()
            for row in scores.rows
        ]

    def _by_place(self) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
        found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
        for row in self.rows():
            found.setdefault((row["model"], row["layer"]), {})[row["lens"]] = row
        return found

    def better(self, lens: str, than: str, value: str = "kl") -> dict[str, tuple[int, int]]:
        """For each model at how many of its layers (the last one left out) a lens has the lower value, and of how many.

        Args:
            lens, than: names of lenses.
            value: "kl", "bits_per_byte", "bias_bits", or another column of `rows()` where low is good.
        """
        found = {}
        for model in self.scores:
            pairs = [
                (at[lens][value], at[than][value])
                for (one, layer), at in self._by_place().items()
                if one == model and layer < self.depths[model] and lens in at and than in at
            ]
            found[model] = (sum(a < b for a, b in pairs), len(pairs))
        return found

    def tables(self) -> list[Table]:
        """Every layer of every model, then at how many layers each lens is better than the first one."""
        lenses = self.lenses
        columns = [f"{heading}, {lens}" for heading, _ in _SHOWN.values() for lens in lenses]
        rows = [
            [model, str(layer), *(at.get(lens, {}).get(key) for key in _SHOWN for lens in lenses)]
            for (model, layer), at in self._by_place().items()
        ]
        note = "KL(model || lens) in nats, the next token's cross entropy in bits per byte, bias in bits; the last layer is the model"
        if self.settings.get("left_out"):
            note += f"; left out, not at hand: {', '.join(self.settings['left_out'])}"
        found = [Table("quality and bias per layer", ["model", "layer", *columns], rows, note, percent=False)]
        if len(lenses) > 1:
            count = lambda pair: f"{pair[0]} of {pair[1]}"
            wins = {(lens, key): self.better(lens, lenses[0], key) for lens in lenses[1:] for key in _SHOWN}
            table = [
                [model, lens, *(count(wins[lens, key][model]) for key in _SHOWN)]
                for model in self.scores
                for lens in lenses[1:]
            ]
            title = f"at how many layers a lens is better than {lenses[0]!r}"
            found.append(Table(title, ["model", "lens", "KL", "bits/byte", "bias"], table, percent=False))
        return found

    def pictures(self) -> dict[str, Picture]:
        """Bits per byte, KL and bias against the share of the depth: first lens and last lens of every model."""
        found: dict[str, Picture] = {}
        for key, (_, title) in _SHOWN.items():
            series: dict[str, list[tuple[float, float]]] = {}
            for model, scores in self.scores.items():
                lenses = list(dict.fromkeys(row["lens"] for row in scores.rows))
                # Of several models no more than two lines each, or nobody can read them.
                for lens in dict.fromkeys([lenses[0], lenses[-1]]) if len(self.scores) > 1 else lenses:
                    mine = [r for r in self.rows() if (r["model"], r["lens"]) == (model, lens)]
                    series[f"{model}, {lens}"] = [(r["depth"], r[key]) for r in mine]
            across = "layer / number of layers"
            found[key] = Lines(f"{title.split(',')[0]} by layer", series, across, title)
        return {"bits_per_byte": found.pop("bits_per_byte"), **found}


def quality(
    model: LensModel,
    lenses: Lens | Mapping[str, Lens],
    tokens: Any,
    *,
    layers: Iterable[int] | None = None,
    skip_first: bool = True,
    hooks: Iterable[Hook] = (),
    bytes_per_token: float | None = None,
    name: str | None = None,
    chunk_size: int | None = None,
    show_progress: bool | None = None,
) -> Quality:
    """KL to the model, bits per byte and marginal bias of lenses, layer by layer.

    `bias_l = KL(p || q_l)`, p and q_l the means over positions of the model's and the lens' distributions.

    Args:
        model: the model that the lenses are of.
        lenses: a lens or `{name: lens}`; the first one is what the others are compared with.
        tokens: held-out text, as `evaluate` takes it.
        layers: all that every lens has, by default.
        skip_first: leave out real position 0 of each row.
        hooks: your interventions; the model that the lenses are compared with is the same hooked run.
        bytes_per_token: for plain ids; batches know their own, a tokenizer can decode the rest.
        name: what the model is called in tables, if not by its own name.
        chunk_size: positions decoded at a time.

    Returns:
        `Quality`; reports of several models add with `+`.

    Raises:
        ValueError: a lens of another model object, or none; a layer that a lens does not have; text without a position to score.

    Source: Belrose et al. 2023 (Tuned Lens), section 3 and Figures 3 to 5.

    Example:
        >>> both = quality(small, lenses_a, text_a) + quality(big, lenses_b, text_b)      # doctest: +SKIP
        >>> print(both); both.save("quality")      # doctest: +SKIP
    """
    found = check_lenses(model, lenses, "quality")
    called, depth = name or named(model), n_layers(model)
    scores = evaluate(
        model, found, tokens, layers=common_layers(found, layers, depth), skip_first=skip_first, hooks=hooks, bytes_per_token=bytes_per_token,
        chunk_size=chunk_size, show_progress=show_progress,
    )  # fmt: skip
    settings = {"tokens": {called: scores.tokens}, "lenses": list(found), "skip_first": skip_first}
    return Quality(called, {called: scores}, {called: depth}, settings=settings)
