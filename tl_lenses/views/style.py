"""Statistics and their colours: one table of the statistics, one colour map, and how values become colours and labels.

All views share one convention: **bright is good**. Where low values are good (KL, rank, ...) the colour map runs
backwards, so a picture keeps its shape when another statistic is chosen.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Stat:
    """The name of a statistic, and how it is drawn.

    `low` and `high` fix an end of the colour range, None takes the data's. `curve` bends the colours: "sqrt" (from
    zero, either sign) suits a statistic that falls from tens of nats at the first layers to hundredths at the last.
    """

    name: str
    label: str
    unit: str
    better: Literal["low", "high"] | None = None
    curve: Literal["linear", "sqrt", "log"] = "linear"
    diverging: bool = False
    low: float | None = None
    high: float | None = None
    dark: str = ""  # the meaning of the two ends of the colour map, for the legend
    bright: str = ""

    @property
    def title(self) -> str:
        """Label and unit: `KL(model ‖ lens), nats`."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


_UNSURE, _SURE, _MISS, _HIT = "uncertain", "certain", "misses the target", "predicts the target"
_SIDES, _USUAL = ("anti-target", "target"), ("less than usual", "more than usual")
STATS: dict[str, Stat] = {
    s.name: s
    for s in (
        Stat("kl", "KL(model ‖ lens)", "nats", "low", "sqrt", low=0.0, dark="differs", bright="agrees with the model"),
        Stat("entropy", "entropy", "nats", "low", low=0.0, dark=_UNSURE, bright=_SURE),
        Stat("cross_entropy", "cross entropy of the target", "nats", "low", "sqrt", low=0.0, dark=_MISS, bright=_HIT),
        Stat("rank", "rank of the target", "1 = top", "low", "log", low=1.0, dark=_MISS, bright=_HIT),
        Stat("max_prob", "probability of the top token", "", "high", low=0.0, high=1.0, dark=_UNSURE, bright=_SURE),
        Stat("target_logprob", "log-probability of the target", "nats", "high", "sqrt", False, None, 0.0, _MISS, _HIT),
        Stat("score", "calibrated score of the target", "", "high", "linear", True, None, None, *_USUAL),
        Stat("logprob_diff", "log p(target) − log p(anti-target)", "nats", "high", "linear", True, None, None, *_SIDES),
    )
}

# ColorBrewer's YlGnBu from dark to bright: ordered by lightness, readable with every colour vision, and calmer under
# text than viridis. PuOr for values on both sides of zero.
SEQUENTIAL = ("#081d58", "#253494", "#225ea8", "#1d91c0", "#41b6c4", "#7fcdbb", "#c7e9b4", "#edf8b1", "#ffffd9")
DIVERGING = ("#b35806", "#e08214", "#fdb863", "#fee0b6", "#f7f7f7", "#d8daeb", "#b2abd2", "#8073ac", "#542788")
LINES = ("#3b6fd4", "#d1741f", "#2a9d6f", "#a64ca6", "#b3423e", "#6b6b6b", "#8a7a1f", "#2c9fb3")  # one per lens

LEVELS = 64  # colours per map in the page: the eye does not tell neighbours apart
FENCE = 1.5  # values further than this many quartile ranges outside the quartiles do not stretch the colour range


@dataclass(frozen=True)
class Scale:
    """The colour range of a statistic over some data; `clipped` tells whether values lie beyond the low and the high end."""

    stat: Stat
    low: float
    high: float
    clipped: tuple[bool, bool] = (False, False)

    def position(self, value: float) -> float | None:
        """The place on the colour map, 0..1 with 1 the bright end; None for NaN."""
        if math.isnan(value):
            return None
        value, low, high = (self._bend(v) for v in (value, self.low, self.high))
        t = min(max((value - low) / (high - low), 0.0), 1.0)
        return 1 - t if self.flipped else t

    def color(self, value: float) -> str | None:
        """`#rrggbb`, or None for NaN.

        >>> Scale(STATS["kl"], 0.0, 10.0).color(10.0)
        '#081d58'
        """
        t = self.position(value)
        return None if t is None else ramp(t, self.stat.diverging)

    def _bend(self, value: float) -> float:
        if self.stat.curve == "log":
            return math.log(max(value, 1e-12))
        return math.copysign(math.sqrt(abs(value)), value) if self.stat.curve == "sqrt" else value

    @property
    def flipped(self) -> bool:
        """Whether the colour map runs backwards: low values are good, and good is bright."""
        return self.stat.better == "low"

    def ticks(self) -> list[float]:
        """The values at the dark end, in the middle and at the bright end of the colour map."""
        middle = {
            "linear": (self.low + self.high) / 2,
            "sqrt": (self.low + self.high) / 4,  # one end of a sqrt range is zero
            "log": math.sqrt(max(self.low * self.high, 0)),
        }[self.stat.curve]
        ticks = [self.low, middle, self.high]
        return ticks[::-1] if self.flipped else ticks

    def labels(self) -> list[str]:
        """`ticks` as text, `≥ 7.2` at an end that values lie beyond."""
        below, above = ("≤ " if self.clipped[0] else ""), ("≥ " if self.clipped[1] else "")
        dark, middle, bright = (number(self.stat, v) for v in self.ticks())
        return [above + dark, middle, below + bright] if self.flipped else [below + dark, middle, above + bright]


def scale_of(stat: Stat, values: Iterable[float]) -> Scale:
    """The colour range for these values: the statistic's fixed ends, else the data's, without far outliers.

    >>> scale_of(STATS["kl"], [0.0, 1.0, 4.0])
    Scale(stat=..., low=0.0, high=4.0, clipped=(False, False))
    """
    finite = sorted(v for v in values if math.isfinite(v)) or [0.0]
    fenced = stat.curve != "log"  # a log scale has room for outliers
    low, clipped_low = _end([-v for v in reversed(finite)], fenced and stat.low is None)
    high, clipped_high = _end(finite, fenced and stat.high is None)
    low = -low if stat.low is None else stat.low
    high = high if stat.high is None else stat.high
    if stat.diverging:
        high = max(abs(low), abs(high))
        low, clipped_low, clipped_high = -high, finite[0] < -high, finite[-1] > high
    if not high > low:  # one value only: any range of positive width will do
        low, high = (-1.0, 1.0) if stat.diverging else (low, low + 1) if stat.high is None else (high - 1, high)
    return Scale(stat, low, high, (clipped_low, clipped_high))


def _end(ascending: Sequence[float], free: bool) -> tuple[float, bool]:
    """The upper end of a range and whether values lie beyond it: the maximum, or where `free` at most Tukey's fence.

    The first layers are often so far off (tens of nats) that everything else would have one colour.
    """
    lower, upper = (ascending[round(q * (len(ascending) - 1))] for q in (0.25, 0.75))
    fence = upper + FENCE * (upper - lower)
    return (fence, True) if free and ascending[-1] > fence > lower else (ascending[-1], False)


def change(stat: Stat) -> Stat:
    """The statistic of the change per layer: a diverging one around zero, its colours in the good direction."""
    label, unit = (f"log₁₀ {stat.label}", "") if stat.curve == "log" else (stat.label, stat.unit)
    label = f"Δ {label} per layer"
    return replace(stat, label=label, unit=unit, curve="linear", diverging=True, low=None, high=None, dark="down", bright="up")


def versus(stat: Stat, a: str, b: str) -> Stat:
    """The statistic of the difference a - b of two lenses, around zero: the bright end is where a is better."""
    label, unit = (f"log₁₀ {stat.label}", "") if stat.curve == "log" else (stat.label, stat.unit)
    dark, bright = (f"{b} better", f"{a} better") if stat.better else (f"{b} higher", f"{a} higher")
    curve = "linear" if stat.curve == "log" else stat.curve
    return replace(
        stat, label=f"{label}: {a} − {b}", unit=unit, curve=curve, diverging=True, low=None, high=None, dark=dark,
        bright=bright,
    )  # fmt: skip


def between(a: str, b: str) -> dict[str, Stat]:
    """The statistics of `Trajectories.divergence`, by the names that views give them."""
    labels = {"kl": f"KL({a} ‖ {b})", "js": f"Jensen-Shannon({a}, {b})", "tv": f"total variation({a}, {b})"}
    named = lambda kind: Stat(
        f"between_{kind}", labels[kind], "" if kind == "tv" else "nats", "low", "sqrt", low=0.0, dark="differ", bright="agree"
    )
    return {kind: named(kind) for kind in labels}


def ramp(t: float, diverging: bool = False) -> str:
    """The colour map at 0 <= t <= 1, linear between the stops in sRGB."""
    stops = DIVERGING if diverging else SEQUENTIAL
    x = min(max(t, 0.0), 1.0) * (len(stops) - 1)
    k = min(int(x), len(stops) - 2)
    mix = (round(a + (x - k) * (b - a)) for a, b in zip(_rgb(stops[k]), _rgb(stops[k + 1]), strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mix)


def ink(background: str) -> str:
    """Black or white text, by luminance; white a little before WCAG's even point: black on mid-blue reads badly."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _rgb(background))]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.25 else "#ffffff"


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def stat_info(name: str) -> Stat:
    """The entry in `STATS`; a plain one for other names."""
    return STATS.get(name) or Stat(name, name.replace("_", " "), "")


def number(stat: Stat, value: float) -> str:
    """A value in at most five characters, "–" where undefined.

    >>> [number(STATS["rank"], v) for v in (1.0, 1234.0, 50257.0)], number(STATS["kl"], 0.51234)
    (['1', '1.2k', '50k'], '0.51')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 999.5:
        text = f"{size / 1000:.1f}k" if size < 9950 else f"{size / 1000:.0f}k"
    elif stat.curve == "log" or size >= 99.5:
        text = f"{size:.0f}"
    else:
        text = f"{size:.1f}" if size >= 9.995 else f"{size:.2f}"
    return ("−" if value < 0 and text.strip("0.") else "") + text
