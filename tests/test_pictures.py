"""Lines and heat maps: every finite point is drawn where it belongs, gaps stay gaps, and what cannot be drawn is refused."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from tl_lenses.experiments.picture import Heat, Lines, figure_of, svg_of


def circles(svg):
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_lines_are_where_their_values_say():
    svg = svg_of(Lines("KL <1>", {"a": [(0, 1.0), (1, 2.0), (2, 3.0)]}, up="nats"))
    ET.fromstring(svg)
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1 > y2
    assert svg.count("<polyline") == 1 and "KL &lt;1&gt;" in svg


def test_a_gap_is_a_gap_and_points_are_not_joined():
    gap = {"a": [(0, 1.0), (1, 1.0), (2, math.nan), (3, 1.0), (4, 2.0)]}
    assert svg_of(Lines("t", gap)).count("<polyline") == 2 and len(circles(svg_of(Lines("t", gap)))) == 4
    assert "<polyline" not in svg_of(Lines("t", gap, points=True))


def test_logarithmic_axes():
    svg = svg_of(Lines("t", {"a": [(1, 0.1), (2, 1.0), (3, 10.0)]}, log_y=True))
    (_, y0), (_, y1), (_, y2) = circles(svg)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    with pytest.raises(ValueError, match=r"'t' has the value 0\.0, which a logarithmic axis cannot have"):
        svg_of(Lines("t", {"a": [(1, 0.0)]}, log_y=True))


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="'t' has no finite point"):
        svg_of(Lines("t", {"a": [(0, math.nan)]}))


def test_a_diverging_heat_map_is_neutral_at_zero():
    heat = Heat("t", ["r"], ["a", "b", "c"], [[-1.0, 0.0, 1.0]], diverging=True)
    assert [heat.shade(v) for v in (-1.0, 0.0, 1.0)] == [0.0, 0.5, 1.0]
    colors = re.findall(r'fill="(#\w{6})"><title>', svg_of(heat))
    assert colors == ["#b35806", "#f7f7f7", "#542788"]


def test_figures():
    plotly = pytest.importorskip("plotly.graph_objects")
    figure = figure_of(Lines("t", {"a": [(0, 1.0), (1, math.nan)], "b": [(0, 2.0)]}))
    assert isinstance(figure, plotly.Figure) and [trace.name for trace in figure.data] == ["a", "b"]
    assert list(figure.data[0].y) == [1.0, None]
    assert figure_of(Heat("t", ["r"], ["a"], [[0.5]], low=0.25)).data[0].zmin == 0.25


def test_a_wide_table_prints_every_number_whole():
    from tl_lenses.experiments.report import Report, Table

    names = [f"{a}, {b}" for a in ("KL", "bits/byte", "bias") for b in ("logit", "regression", "tuned")]
    rows = [["lab-gpt2-small", "0", *(15.394 + i for i in range(9))]]

    class Wide(Report):
        def tables(self):
            return [Table("wide", ["model", "layer", *names], rows, percent=False)]

    lines = str(Wide("m")).splitlines()
    assert all(f"{15.394 + i:.3f}" in lines[-1] for i in range(9)) and "…" not in "".join(lines)
