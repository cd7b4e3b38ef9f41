"""Lines and heat maps: every finite point is drawn where it belongs, gaps stay gaps, and what cannot be drawn is refused."""

import itertools
import math
import re
import sys
import warnings
import xml.etree.ElementTree as ET

import pytest
import torch
from test_views import MATPLOTLIB

from tl_lenses.experiments.common import Cells
from tl_lenses.experiments.grid import Grid
from tl_lenses.views import Heat, Lines, Panels
from tl_lenses.views.lines import GAP

PNG = b"\x89PNG"


def drawn(lines):
    """The one axes of a figure."""
    (axes,) = lines.figure().axes
    return axes


@MATPLOTLIB
def test_lines_are_where_their_values_say():
    axes = drawn(Lines("KL <1>", {"a": [(0, 1.0), (1, 2.0)], "b": [(1, 3.0)]}, up="nats"))
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert axes.lines[0].get_xydata().tolist() == [[0, 1], [1, 2]] and axes.lines[1].get_xydata().tolist() == [[1, 3]]
    assert axes.get_ylabel() == "nats" and axes.get_xlabel() == "layer"
    assert axes.lines[0].get_color() != axes.lines[1].get_color()


ODD = Lines("KL <1>, $a$", {"_a": [(0, 1.0), (1, 2.0)], "$x^2$": [(0, 2.0)]}, up="nats")


@MATPLOTLIB
def test_an_svg_is_text_that_needs_nothing():
    svg = ODD.svg()
    ET.fromstring(svg)
    assert "KL &lt;1&gt;, $a$" in svg and "$x^2$" in svg and "_a" in svg and "<dc:date>" not in svg


@MATPLOTLIB
def test_a_picture_is_the_same_every_time():
    assert ODD.svg() == ODD.svg() and ODD.png() == ODD.png() and ODD.png().startswith(PNG)


@MATPLOTLIB
def test_a_notebook_shows_pictures():
    for picture in (Lines("t", {"a": [(0, 1.0)]}), heat := Heat("t", ["r"], ["a"], [[0.5]]), Panels([heat])):
        assert picture._repr_svg_() == picture.svg()


@MATPLOTLIB
def test_names_stand_beside_the_ends_of_their_lines_and_do_not_overlap():
    ends = {f"layer {i}": 2.0 if i < 5 else float(i) for i in range(8)}
    axes = drawn(Lines("t", {name: [(0, 1.0), (1, y)] for name, y in ends.items()}, up="a long name of an axis " * 4))
    names = [(text.get_position()[1], text.get_text(), text.get_color()) for text in axes.texts]
    heights = [height for height, *_ in names]
    assert [name for _, name, _ in names] == list(ends) and 0 <= heights[0] and heights[-1] <= 1
    assert min(b - a for a, b in itertools.pairwise(heights)) == pytest.approx(GAP)
    assert [color for *_, color in names] == [line.get_color() for line in axes.lines]
    reds = [line.get_color()[1] for line in axes.lines]
    assert reds == sorted(reds) and "\n" in axes.get_ylabel() and axes.get_legend() is None


@MATPLOTLIB
def test_pictures_are_free_of_the_settings_of_the_user():
    import matplotlib

    lines, heat = Lines("t", {"a": [(0, 1.0), (1, 2.0)]}), Heat("t", ["r"], ["a"], [[0.5]])
    plain = lines.svg(), lines.png(), heat.png()
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "text.usetex": False, "savefig.bbox": "tight"}):
        assert (lines.svg(), lines.png(), heat.png()) == plain
        assert matplotlib.rcParams["font.size"] == 30
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


GAP_AT_1 = {"a": [(0, 1.0), (1, math.inf), (2, 2.0)]}


@MATPLOTLIB
def test_a_gap_is_a_gap():
    ((_, y, _),) = [line.get_ydata().tolist() for line in drawn(Lines("t", GAP_AT_1)).lines]
    assert math.isnan(y)


@MATPLOTLIB
@pytest.mark.parametrize("points,style", [(False, "-"), (True, "None")])
def test_points_are_not_joined(points, style):
    assert [line.get_linestyle() for line in drawn(Lines("t", GAP_AT_1, points=points)).lines] == [style]


BAND = {"a": [(0, 0.5, 1.5), (1, 1.5, 2.5)]}


@MATPLOTLIB
def test_the_band_of_a_line_is_an_area():
    (area,) = drawn(Lines("t", {"a": [(0, 1.0), (1, 2.0)]}, bands=BAND)).collections
    corners = area.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.5, 2.5)


@MATPLOTLIB
def test_the_band_of_bars_is_error_bars():
    (whiskers,) = drawn(Lines("t", {"a": [(0, 1.0), (1, 2.0)]}, bands=BAND, bars=True)).collections
    assert [segment[:, 1].tolist() for segment in whiskers.get_segments()] == [[0.5, 1.5], [1.5, 2.5]]


@MATPLOTLIB
def test_a_band_of_no_series_is_refused():
    with pytest.raises(ValueError, match=r"'t' has a band for 'b': no series of that name, only \['a'\]"):
        Lines("t", {"a": [(0, 1.0)]}, bands={"b": [(0, 0.0, 1.0)]}).svg()


def test_the_interval_of_a_value_is_drawn_as_its_band():
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    grid = Grid.over({"lens": ["a", "b"], "layer": [0, 5]}, {"kl": one, "kl_low": one - 0.5, "kl_high": one + 1, "top1": one})
    lines = grid.lines("t", "kl", by="lens")
    assert lines.bands == {"a": [(0, 0.5, 2.0), (5, 1.5, 3.0)], "b": [(0, 2.5, 4.0), (5, 3.5, 5.0)]}
    assert grid.lines("t", "top1", by="lens").bands == {}
    named = grid.at(lens="a").lines("t", {"top1": "mean"}, ends={"top1": ("kl_low", "kl_high")})
    assert named.bands == {"mean": [(0, 0.5, 2.0), (5, 1.5, 3.0)]}


def test_means_come_with_the_interval_of_the_draws():
    draws = torch.arange(40.0).view(20, 2)
    grid = Grid.over({"item": range(20), "layer": [0, 1]}, {"x": draws}).spread("item")
    assert grid["x"].tolist() == draws.mean(0).tolist() and list(grid.axes) == ["layer"]
    wide = 1.96 * draws.std(0, unbiased=False) / 20**0.5
    for end, sign in (("low", -1), ("high", 1)):
        assert torch.allclose(grid[f"x_{end}"].float(), draws.mean(0) + sign * wide, rtol=0.1)
    alone = Grid.over({"item": [0], "layer": [0, 1]}, {"x": draws[:1]}).spread("item")
    assert alone["x"].tolist() == draws[0].tolist() and alone["x_low"].isnan().all() and alone["x_high"].isnan().all()


def test_pictures_of_layers_have_the_last_one_on_top():
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    heat = Grid({"layer": [0, 4], "task": ["a", "b"]}, {"x": (("layer", "task"), x)}).heat("t", "x", down="layer", across="task")
    assert (heat.rows, heat.values) == (["4", "0"], [[2.0, 3.0], [0.0, 1.0]])
    tasks = Grid({"layer": [0, 4], "task": ["a", "b"]}, {"x": (("layer", "task"), x)}).heat("t", "x", down="task", across="layer")
    assert (tasks.rows, tasks.values) == (["a", "b"], [[0.0, 2.0], [1.0, 3.0]])
    cells = Cells([(0, 1), (0, 2), (4, 1)], {"patched": torch.tensor([[0.0, 1.0, 0.5]])}, ["item"]).heat("t")
    assert cells.rows == ["4", "0"] and cells.values[1] == [0.0, 1.0] and cells.values[0][0] == 0.5


@MATPLOTLIB
def test_scores_of_cells_have_lines_with_their_intervals():
    scores = {"patched": torch.rand(30, 4).round(), "unpatched": torch.zeros(30, 1)}
    lines = Cells([(0, 1), (0, 2), (4, 1), (4, 2)], scores, list(range(30))).lines("t", "hits")
    best = scores["patched"].view(30, 2, 2).amax(2).mean(0)
    assert [y for _, y in lines.series["patched"]] == pytest.approx(best.tolist()) and "unpatched" not in lines.series
    assert all(low < y < high for (_, low, high), y in zip(lines.bands["patched"], best.tolist(), strict=True))


@MATPLOTLIB
def test_many_layers_have_a_bar_of_their_colours_and_no_list():
    series = {f"layer {i}": [(1.0, i + 1.0), (2.0, i + 2.0)] for i in range(31)}
    for points in (True, False):
        figure = Lines("t", series, points=points).figure()
        axes, bar = figure.axes
        assert axes.get_legend() is None and not figure.legends and bar.get_ylabel() == "layer"
        assert [label.get_text() for label in bar.get_yticklabels()] == [str(i) for i in range(0, 31, 3)]
    assert len(Lines("t", {f"lens {i}": [(0, 1.0)] for i in range(13)}).figure().axes) == 1


@MATPLOTLIB
def test_bars_stand_side_by_side_at_their_names():
    axes = drawn(Lines("t", {"a": [("x", 1.0), ("y", 2.0)], "b": [("x", 3.0), ("y", 4.0)]}, bars=True))
    assert [bar.get_height() for bar in axes.patches] == [1, 2, 3, 4]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert ends[0][1] == pytest.approx(ends[2][0]) and ends[2][1] < ends[1][0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y"]


@MATPLOTLIB
def test_logarithmic_axes():
    axes = drawn(Lines("t", {"a": [(1, 0.1), (2, 1.0), (3, 10.0)]}, log_y=True))
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    axes.figure.canvas.draw()
    assert "0.5" in [label.get_text() for label in axes.get_yticklabels()]
    with pytest.raises(ValueError, match=r"'t' has the value 0\.0, which a logarithmic axis cannot have"):
        Lines("t", {"a": [(1, 0.0), (2, 1.0)]}, log_y=True).svg()


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="'t' has no finite point"):
        Lines("t", {"a": [(0, math.nan)]}).svg()


@pytest.mark.parametrize("call", [Lines("t", {"a": [(0, 1.0)]}).figure, Heat("t", ["r"], ["a"], [[0.5]]).png])
def test_without_matplotlib_one_line_says_what_to_install(call, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^figures need matplotlib: pip install tl-lenses\[plot\]$"):
        call()


def cells(svg):
    """Colour of each cell of a heat map by what is shown over it."""
    return {about: color for color, about in re.findall(r'<rect fill="(#\w{6})"[^>]*><title>(.*?)</title>', svg)}


def test_a_diverging_heat_map_is_neutral_at_zero():
    svg = Heat("t", ["r"], ["a", "b", "c"], [[-1.0, 0.0, 1.0]], "", "", diverging=True).svg()
    assert list(cells(svg).items()) == [("r, a: -1.000", "#b35806"), ("r, b: 0.000", "#f7f7f7"), ("r, c: 1.000", "#542788")]


def test_a_heat_map_says_what_its_colours_mean_and_what_lies_beyond():
    svg = Heat("t", ["r"], ["a", "b"], [[0.5, 3.0]], low=0.5, high=2.0).svg()
    assert ">0.50</text>" in svg and ">≥ 2.00</text>" in svg and ">3.00</text>" in svg
    assert set(cells(svg)) == {"l = r, l* = a: 0.500", "l = r, l* = b: 3.000"}


def test_heat_maps_escape():
    svg = Heat("a < b", ["<r>"], ["\x00"], [[0.5]], texts=[[" x<"]], beside=["<&"]).svg()
    ET.fromstring(svg)
    assert all(escaped in svg for escaped in ("a &lt; b", "&lt;r&gt;", "x&lt;", "&lt;&amp;"))


def test_heat_maps_leave_holes():
    assert [Heat("t", ["r"], ["c"], [[x]]).svg().count('class="none"') for x in (math.nan, 0.5)] == [1, 0]


def test_labels_are_whole_unless_they_are_to_be_cut():
    name = "a task with a long name"
    whole, cut = (Heat("t", ["r"], [name], [[0.5]], widest=widest).svg() for widest in (None, 8))
    assert f">{name}</text>" in whole and ">a task…</text>" in cut
    assert int(ET.fromstring(whole).get("width")) >= int(ET.fromstring(cut).get("width"))


@MATPLOTLIB
def test_the_png_of_a_heat_map_takes_any_text():
    heat = Heat("$t$", ["$r"], ["a", "b"], [[0.5, math.nan]], texts=[["$\\frac", " $"]], bold=[[True, False]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert heat.png().startswith(PNG) and heat.png() == heat.png()


def test_plotly_figures():
    plotly = pytest.importorskip("plotly.graph_objects")
    figure = Heat("t", ["r"], ["a"], [[0.5]], low=0.25).figure()
    assert isinstance(figure, plotly.Figure) and figure.data[0].zmin == 0.25 and figure.data[0].text[0][0] == "0.50"
    assert figure.data[0].customdata[0][0] == "l = r, l* = a: 0.500"


def test_a_wide_table_prints_every_number_whole():
    from tl_lenses.experiments.report import Report, Table

    names = [f"{a}, {b}" for a in ("KL", "bits/byte", "bias") for b in ("logit", "regression", "tuned")]
    rows = [["lab-gpt2-small", "0", *(15.394 + i for i in range(9))]]

    class Wide(Report):
        def tables(self):
            return [Table("wide", ["model", "layer", *names], rows, percent=False)]

    lines = str(Wide("m")).splitlines()
    assert all(f"{15.394 + i:.3f}" in lines[-1] for i in range(9)) and "…" not in "".join(lines)
