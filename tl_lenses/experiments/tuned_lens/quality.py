"""How good are the lenses, and how biased? KL, bits per byte and marginal bias per layer, for one model or several."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, log, nan
from typing import Any

from tl_lenses.checks import plain_text
from tl_lenses.evaluation import Scores, evaluate
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Lenses, Subject, text_settings
from tl_lenses.hooks import Hook
from tl_lenses.model import LensModel
from tl_lenses.views import Lines, Picture

# The values that are shown: name, heading, title of the picture.
_SHOWN = {
    "kl": ("KL", "KL(model || lens), nats"),
    "bits_per_byte": ("bits/byte", "cross entropy of the next token, bits per byte"),
    "bias_bits": ("bias", "marginal bias, bits"),
}


@dataclass(frozen=True, repr=False)
class Quality(Report):
    """Scores of lenses per layer, by model. `first + second` puts several models into one table and one figure.

    The grid has the axes model, lens and layer, and `evaluate`'s values, with the layer's share of the depth (`depth`) and
    the bias in bits (`bias_bits`); the last layer of each model is the model itself.

    Attributes:
        scores: the results of `evaluate` by model name.
        depths: `n_layers` of each model.
    """

    scores: dict[str, Scores]
    depths: dict[str, int]

    name = "quality"

    @staticmethod
    def of(model: str, scores: dict[str, Scores], depths: dict[str, int], settings: dict[str, Any]) -> "Quality":
        """Scores of one or several models as a report."""
        rows = [
            {"model": name, **row, "depth": row["layer"] / depths[name], "bias_bits": row["bias"] / log(2)}
            for name, by_layer in scores.items()
            for row in by_layer.rows
        ]
        return Quality(model, scores, depths, grid=Grid.of_rows(rows, ["model", "lens", "layer"]), settings=settings)

    def __add__(self, other: "Quality") -> "Quality":
        """The models of both reports in one.

        Raises:
            ValueError: a model that is in both.
        """
        if twice := [name for name in self.scores if name in other.scores]:
            raise ValueError(f"{twice[0]!r} is in both reports: give quality(..., name=...) another name")
        settings = {**self.settings, "tokens": self.settings["tokens"] | other.settings["tokens"]}
        name = f"{self.model}, {other.model}"
        return Quality.of(name, self.scores | other.scores, self.depths | other.depths, settings)

    def better(self, lens: str, than: str, value: str = "kl") -> dict[str, tuple[int, int]]:
        """For each model at how many of its layers (the last one left out) a lens has the lower value, and of how many.

        Args:
            lens, than: names of lenses.
            value: "kl", "bits_per_byte", "bias_bits", or another column of `rows()` where low is good.
        """
        counts = {}
        for model, depth in self.depths.items():
            ours, theirs = (self._by_layer(model, name, value) for name in (lens, than))
            pairs = [(x, theirs[layer]) for layer, x in ours.items() if layer < depth and layer in theirs]
            counts[model] = (sum(a < b for a, b in pairs), len(pairs))
        return counts

    def _by_layer(self, model: str, lens: str, value: str) -> dict[int, float]:
        if value not in self.grid:
            raise ValueError(f"no {value!r}: there are {', '.join(self.grid)}")
        return {row["layer"]: row[value] for row in self.grid.at(model=model, lens=lens).rows(value)}

    def tables(self) -> list[Table]:
        """Every layer of every model, then at how many layers each lens is better than the first one."""
        first, *others = self.lenses
        note = (
            "KL(model || lens) in nats, the next token's cross entropy in bits per byte, bias in bits; the last layer is the model"
        )
        if self.settings.get("left_out"):
            note += f"; left out, not at hand: {', '.join(self.settings['left_out'])}"
        headings = {name: f"{heading}, {{}}" for name, (heading, _) in _SHOWN.items()}
        tables = [self.grid.table("quality and bias per layer", headings, down=["model", "layer"], across="lens", note=note)]
        if others:
            count = lambda pair: f"{pair[0]} of {pair[1]}"
            wins = {(lens, key): self.better(lens, first, key) for lens in others for key in _SHOWN}
            rows = [[model, lens, *(count(wins[lens, key][model]) for key in _SHOWN)] for model in self.scores for lens in others]
            title = f"at how many layers a lens is better than {first!r}"
            tables.append(Table(title, ["model", "lens", "KL", "bits/byte", "bias"], rows, percent=False))
        return tables

    def pictures(self) -> dict[str, Picture]:
        """Bits per byte over the model's own, KL and bias, against the share of the depth, on logarithmic axes.

        Of several models the first and the last lens, or nobody can read the lines. The last layer, where all are 0, is left out.
        """
        pictures: dict[str, Picture] = {}
        for key in ("bits_per_byte", "kl", "bias_bits"):
            series: dict[str, list[tuple[float, float]]] = {}
            for model, scores in self.scores.items():
                lenses = list(dict.fromkeys(row["lens"] for row in scores.rows))
                for lens in dict.fromkeys([lenses[0], lenses[-1]]) if len(self.scores) > 1 else lenses:
                    by_layer = self._by_layer(model, lens, key)
                    final = by_layer.pop(max(by_layer))  # of the model itself: 0 for KL and bias
                    over = [(layer / self.depths[model], x - final) for layer, x in by_layer.items()]
                    series[f"{model}, {lens}"] = [(x, y if y > 0 else nan) for x, y in over]
            if any(isfinite(y) for points in series.values() for _, y in points):
                title = _SHOWN[key][1]
                up = f"{title}, over the model's own" if key == "bits_per_byte" else title
                name = f"{title.split(',')[0]} by layer"
                pictures[key] = Lines(name, series, "layer / number of layers", up, log_y=True)
        return pictures


def quality(
    model: LensModel, lenses: Lenses, tokens: Any, *, layers: Layers = None,
    skip_first: bool = True, hooks: Iterable[Hook] = (), bytes_per_token: float | None = None, name: str | None = None,
    chunk_size: int | None = None, show_progress: bool | None = None,
) -> Quality:  # fmt: skip
    """KL to the model, bits per byte and marginal bias of lenses, layer by layer.

    `bias_l = KL(p || q_l)`, p and q_l the means over positions of the model's and the lens' distributions.

    Args:
        lenses: a lens or `{name: lens}`; the others are compared with the first one.
        tokens: held-out text, as `evaluate` takes it.
        layers: all that every lens has, by default; the last one, which is the model itself, is always there.
        skip_first: leave out real position 0 of each row.
        hooks: your interventions; the model that the lenses are compared with is the same hooked run.
        bytes_per_token: for plain ids; batches know their own, a tokenizer can decode the rest.
        name: of the model in tables; its own by default.
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
    subject = Subject.of(model, lenses, layers, what="quality")
    called, depth = subject.name if name is None else plain_text("name", name), subject.depth
    scores = evaluate(
        model, subject.lenses, tokens, layers=sorted({*subject.layers, depth}), skip_first=skip_first, hooks=hooks,
        bytes_per_token=bytes_per_token, chunk_size=chunk_size, show_progress=show_progress,
    )  # fmt: skip
    settings = {
        **text_settings(tokens), "tokens": {called: scores.tokens}, "lenses": list(subject.lenses), "skip_first": skip_first,
    }  # fmt: skip
    return Quality.of(called, {called: scores}, {called: depth}, settings)
