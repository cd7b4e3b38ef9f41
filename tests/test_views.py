"""Every view on a small fake trajectory: what it says, that odd input breaks nothing, that nothing leaks."""

import ast
import json
import math
import os
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from tl_lenses import views
from tl_lenses.views.cells import color_legend
from tl_lenses.views.glyphs import cell_width, clip, pad, parts, readable
from tl_lenses.views.grid import row_labels
from tl_lenses.views.style import DIVERGING, SEQUENTIAL, STATS, change, ink, number, scale_of, stat_info, versus

VOCAB = {0: "<|end|>", 1: " Paris", 2: "\n", 3: "<0xE2>", 4: " is", 5: "日本", 6: "[red]", 7: "</script>", 8: "."}
NAN = float("nan")


def fake(n_layers=2, batch=1, pos=4, k=3, stats=("kl", "entropy", "rank"), layers=None, name="logit", seed=0):
    """A trajectory of random numbers over VOCAB; the last position has no target."""
    gen = torch.Generator().manual_seed(seed)
    rows = len(layers) if layers else n_layers + 1
    shape = (rows, batch, pos)
    tokens = (torch.arange(batch * pos).view(batch, pos) + 1) % len(VOCAB)
    targets = torch.cat([tokens[:, 1:], torch.full((batch, 1), -1)], dim=1)
    probs = torch.rand(*shape, len(VOCAB), generator=gen).softmax(-1)
    top_probs, top_ids = probs.topk(k, -1)
    values = {}
    for stat in stats:
        x = 5 * torch.rand(shape, generator=gen)
        if stat == "rank":
            x = torch.where(targets >= 0, (x * 10).long() + 1, -1)
        elif stat in ("cross_entropy", "target_logprob", "logprob_diff"):
            x = torch.where(targets >= 0, x if stat == "cross_entropy" else x - 5, NAN)
        values[stat] = x
    return SimpleNamespace(
        layers=tuple(layers or range(rows)),
        n_layers=n_layers,
        name=name,
        model_name="toy",
        tokens=tokens,
        mask=torch.ones(batch, pos, dtype=torch.bool),
        targets=targets,
        anti_targets=None,
        stats=values,
        top_ids=top_ids,
        top_probs=top_probs,
        vocab=dict(VOCAB),
    )


def padded():
    """Two rows, the second with two pads on the left."""
    t = fake(batch=2, pos=5, stats=tuple(STATS))
    t.mask[1, :2] = False
    t.targets[1, :2] = -1
    for x in t.stats.values():
        x[:, 1, :2] = NAN if x.is_floating_point() else -1
    return t


CASES = {
    "plain": fake(),
    "one by one": fake(n_layers=0, pos=1, k=1),
    "pads": padded(),
    "hook names": fake(layers=["blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_z"]),
    "no statistics": fake(stats=()),
    "entropy only": fake(stats=("entropy",)),
    "all statistics": fake(stats=tuple(STATS)),
    "unknown names": SimpleNamespace(**{**vars(fake()), "name": "", "model_name": "", "vocab": {}}),
    "constant": SimpleNamespace(**{**vars(fake()), "stats": {"kl": torch.zeros(3, 1, 4)}}),
    "not finite": SimpleNamespace(
        **{**vars(fake()), "stats": {"kl": torch.tensor([NAN, math.inf, 1.0]).view(3, 1, 1).expand(3, 1, 4)}}
    ),
    "only pads": SimpleNamespace(**{**vars(fake()), "mask": torch.zeros(1, 4, dtype=torch.bool)}),
}
FIGURE = pytest.mark.skipif(find_spec("plotly") is None, reason="needs plotly")
MATPLOTLIB = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


# --- every view on every case


@pytest.mark.parametrize("width", [20, 80])
@pytest.mark.parametrize("color", [True, False])
def test_text_is_as_wide_as_asked(case, width, color):
    text = views.to_text(case, width=width, color=color)
    assert all(cell_len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= width for line in text.splitlines())


def test_html(case):
    page = views.html(case)
    assert page.startswith("<!doctype html>") and well_formed(page)


def test_svg(case):
    root = ET.fromstring(views.svg(case))
    assert root.tag.endswith("svg") and int(root.get("width")) > 0


def test_frame(case):
    frame = views.frame(case)
    assert len(frame) == len(case.layers) * int(case.mask.sum())
    assert set(case.stats) <= set(frame.columns)


def test_json(case):
    assert json.loads(views.to_json(case))["version"] == 1


@FIGURE
def test_figure(case):
    fig = views.figure(case)
    assert len(fig.data[0].z) == len(case.layers)
    if len(case.layers) > 1:
        assert len(views.figure(case, delta=True).data[0].z) == len(case.layers) - 1


# --- terminal


def golden():
    t = fake(pos=3, k=1, stats=("kl",))
    t.tokens[:] = torch.tensor([1, 5, 2])
    t.targets[:] = torch.tensor([5, 2, -1])
    t.top_ids[..., 0] = torch.tensor([[8, 1, 0], [6, 5, 3], [5, 2, 7]])[:, None]
    t.stats["kl"] = torch.tensor([[12.5, 0.25, 1234.0], [0.5, NAN, 1.0], [0.0, 0.0, 0.0]])[:, None]
    return t


def test_golden_text_without_colour():
    assert views.to_text(golden(), width=60, color=False).splitlines() == [
        "toy, logit lens: 3 layers × 3 tokens",
        "in each cell: the top token and KL(model ‖ lens), nats",
        "",
        "   ·Paris      日本         ↵              ",
        "2  日本   0.00 ↵       0.00 </script>  0.00",
        "1  [red]  0.50 日本       – ⟨0xE2⟩     1.00",
        "0  .      12.5 ·Paris  0.25 <|end|>    1.2k",
    ]


def test_columns_line_up_in_cells():
    lines = views.to_text(golden(), width=60, color=False).splitlines()[3:]
    assert len({cell_len(line) for line in lines}) == 1


def test_colours_only_where_the_console_has_them():
    assert "\x1b[" in views.to_text(golden(), color=True)
    assert "\x1b[" not in views.to_text(golden(), color=False)
    out = StringIO()
    Console(file=out, width=60, color_system=None).print(views.terminal(golden()))
    assert "12.5" in out.getvalue()  # the value stands in for the colour


def test_long_prompts_stack_and_say_what_is_left_out():
    text = views.to_text(fake(pos=60), width=60, color=False)
    blocks = [line for line in text.splitlines() if line.startswith("2 ")]
    left_out = int(re.search(r"first (\d+) of 60 positions are left out", text.replace("\n", " "))[1])
    assert len(blocks) == 4 and 0 < left_out < 60
    assert "left out" not in views.to_text(fake(pos=10), width=60, color=False)


def test_top_tokens_stack_in_the_cell():
    narrow, wide = (views.to_text(fake(), top=n, color=False, width=80) for n in (1, 3))
    assert len(wide.splitlines()) - len(narrow.splitlines()) == 2 * 3


def test_a_row_is_shown_without_its_pads():
    t = padded()
    assert "row 1 of 2: 3 layers × 3 tokens" in views.to_text(t, batch=1, color=False)
    assert views.to_text(t, batch=-1, color=False) == views.to_text(t, batch=1, color=False)


def test_a_row_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"batch=2 is out of range: this trajectory has 2 rows \(0\.\.1\)"):
        views.terminal(padded(), batch=2)


# --- page


class Page(HTMLParser):
    """Balanced tags, the texts of cells, the data, and every reference to something outside."""

    VOID = ("meta", "br", "input")

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.loads, self.data = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href", "action", "poster")]
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "td" in tags or "th" in tags:
            self.rows[-1][-1] += data
        if self.open and self.open[-1][1].get("id") == "data":
            self.data += data


def parsed(page):
    p = Page()
    p.feed(page)
    assert not p.open
    return p


def data_of(page):
    """The data that a page holds for its script."""
    return json.loads(parsed(page).data)


def well_formed(page):
    return bool(parsed(page).rows)


def test_the_table_is_there_without_javascript_last_layer_on_top():
    rows = parsed(views.html(golden())).rows
    assert rows == [
        ["layer", "·Paris", "日本", "↵"],
        ["2", "日本", "↵", "</script>"],
        ["1", "[red]", "日本", "⟨0xE2⟩"],
        ["0", ".", "·Paris", "<|end|>"],
    ]


@pytest.mark.parametrize("view", [views.html, views.html_fragment])
def test_the_page_loads_nothing(view):
    page = view(padded())
    assert not re.search(r"https?://|@import|url\(", page)
    assert not parsed(page).loads


def test_user_text_is_harmless():
    t = fake()
    evil = "</script><img src=x onerror=alert(1)>&amp;\u2028'\""
    t.vocab = dict.fromkeys(t.vocab, evil)
    t.model_name = t.name = evil
    t.layers = ("<b>", "a&b", 2)
    page = views.html(t, title=evil)
    p = parsed(page)
    assert not p.loads and page.count("</script>") == 2 and "<img" not in page and "<b>," not in page
    assert "</script>" in json.loads(p.data)["vocab"][0]
    assert ET.fromstring(views.svg(t)) is not None and "<img" not in views.svg(t)
    fragment = views.html_fragment(t)
    assert fragment.count("<") == 4  # the frame and its style


def test_the_fragment_is_a_frame_with_its_own_id():
    a, b = views.html_fragment(fake()), views.html_fragment(fake())
    assert "<iframe" in a and 'sandbox="allow-scripts"' in a
    assert re.search(' id="([^"]+)"', a)[1] != re.search(' id="([^"]+)"', b)[1]


def test_the_fragment_of_a_large_batch_stays_small():
    t = fake(batch=40, pos=500, k=1)
    assert len(views.html_fragment(t)) < 12e6 and "33 of 40 rows" in views.html_fragment(t)


@pytest.fixture(scope="module")
def of_two():
    """A batch of two rows, and the data of its page under two lenses."""
    t = padded()
    return t, data_of(views.html({"a": t, "b": t}, "entropy"))


def test_a_page_has_every_lens_with_their_difference(of_two):
    data = of_two[1]
    assert [x["name"] for x in data["lenses"]] == ["a", "b", "b − a"]
    assert data["lenses"][2]["minus"] == [1, 0] and data["lenses"][2]["scales"]["kl"]["diverging"]


def test_a_page_has_every_statistic(of_two):
    t, data = of_two
    assert set(data["stats"]) == set(STATS) and data["stat"] == "entropy"
    cells = data["lenses"][1]["rows"][1]
    assert cells["stats"]["kl"] == pytest.approx(t.stats["kl"][:, 1, 2:].flatten().tolist(), rel=1e-3)
    assert cells["stats"]["rank"] == [None if v < 0 else v for v in t.stats["rank"][:, 1, 2:].flatten().tolist()]
    assert len(cells["top"]) == len(cells["probs"]) == 3 * 3 * 3


def test_a_page_has_every_row_or_the_one_that_was_asked_for(of_two):
    t, data = of_two
    assert [r["positions"] for r in data["rows"]] == [[0, 1, 2, 3, 4], [2, 3, 4]]
    assert len(data_of(views.html(t, batch=1))["rows"]) == 1


def test_the_script_is_small():
    assert len((Path(views.__file__).parent / "page.js").read_bytes()) < 60_000


def test_lenses_of_one_page_must_match():
    with pytest.raises(ValueError, match="'a' and 'b' have different layers"):
        views.html({"a": fake(), "b": fake(n_layers=3)})
    with pytest.raises(ValueError, match="'a' and 'b' were read on different tokens"):
        views.html({"a": fake(), "b": fake(pos=5)})
    with pytest.raises(ValueError, match="empty mapping"):
        views.html({})


# --- picture and figure


def test_the_picture_grows_with_the_tokens():
    widths = [int(ET.fromstring(views.svg(fake(pos=n))).get("width")) for n in (10, 40)]
    assert widths[1] > 3 * widths[0]


@FIGURE
def test_equal_tokens_stay_apart_in_the_figure():
    t = golden()
    t.tokens[:] = 1
    fig = views.figure(t)
    assert fig.data[0].x == (0, 1, 2) and fig.layout.xaxis.ticktext == ("·Paris",) * 3
    assert fig.layout.yaxis.ticktext == ("2", "1", "0") and fig.data[0].text[0][1] == "<b>↵</b>"
    assert "·Paris" in fig.data[0].customdata[0][1] and "%" in fig.data[0].customdata[0][1]


@FIGURE
def test_a_figure_has_the_values():
    heat = views.figure(golden(), "kl").data[0]
    assert list(heat.z[2]) == [12.5, 0.25, 1234.0] and heat.z[1][1] is None  # layer 0 is the last row
    assert heat.colorscale[0][1] == SEQUENTIAL[-1]  # no KL: bright


@FIGURE
def test_a_figure_shows_the_change():
    assert views.figure(golden(), "kl", delta=True).data[0].z[0][0] == -0.5


def test_figure_without_plotly(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"^figures need plotly: pip install tl-lenses\[plot\]$"):
        views.figure(fake())


# --- data


def test_json_round_trip():
    t = padded()
    t.anti_targets = torch.zeros_like(t.targets)
    t.layers = (0, "blocks.0.hook_resid_mid", 2)
    back = json.loads(views.to_json(t))
    assert back["schema"] == "tl_lenses.trajectories"
    (back,) = back["trajectories"]
    assert tuple(back["layers"]) == t.layers and back["name"] == "logit" and back["n_layers"] == 2
    for key in ("tokens", "mask", "targets", "anti_targets", "top_ids"):
        assert back[key] == getattr(t, key).tolist(), key
    assert {int(i): text for i, text in back["vocab"].items()} == t.vocab
    for name, x in {**t.stats, "top_probs": t.top_probs}.items():
        y = back[name] if name == "top_probs" else back["stats"][name]
        y = torch.tensor([NAN if v is None else v for v in flat(y)], dtype=x.dtype).view(x.shape)
        assert torch.equal(torch.nan_to_num(y, 7.0), torch.nan_to_num(x, 7.0)), name


def flat(x):
    return [v for y in x for v in flat(y)] if isinstance(x, list) else [x]


def test_frame_says_what_the_tensors_say():
    t = padded()
    frame = views.frame(t)
    assert not ((frame["batch"] == 1) & (frame["pos"] < 2)).any()
    row = frame[(frame["layer"] == 1) & (frame["batch"] == 1) & (frame["pos"] == 3)].iloc[0]
    assert row["kl"] == t.stats["kl"][1, 1, 3].item() and row["top_prob"] == pytest.approx(t.top_probs[1, 1, 3, 0].item())
    assert row["token"] == VOCAB[t.tokens[1, 3].item()] and row["target"] == VOCAB[t.targets[1, 3].item()]
    last = frame[frame["pos"] == 4].iloc[0]
    assert last["target"] is None or last["target"] != last["target"]
    assert last[["rank", "target_id"]].isna().all() and frame["rank"].dtype == "Int64"
    both = views.frame({"a": t, "b": t})
    assert both.columns[0] == "lens" and len(both) == 2 * len(frame)


def test_without_top_tokens_there_are_still_numbers(tmp_path):
    t = fake()
    t.top_ids, t.top_probs = t.top_ids[..., :0], t.top_probs[..., :0]
    assert "top" not in views.frame(t) and "kl" in views.frame(t)
    assert json.loads(views.to_json(t))["trajectories"][0]["top_ids"][0][0][0] == []
    for view in (views.to_text, views.html, views.svg):
        with pytest.raises(ValueError, match="no top tokens to show: make it with top_k=1"):
            view(t)


# --- errors and files


@pytest.mark.parametrize("view", [views.terminal, views.to_text, views.html, views.html_fragment, views.svg, views.figure])
def test_an_unknown_statistic_lists_the_others(view):
    if view is views.figure:
        pytest.importorskip("plotly")
    with pytest.raises(ValueError, match=r"no statistic 'kll' in this trajectory: it has kl, entropy, rank, max_prob"):
        view(fake(), "kll")


@pytest.mark.parametrize("suffix", [".html", ".svg", ".csv", ".json"])
def test_save(tmp_path, suffix):
    path = tmp_path / "new" / f"heat{suffix}"
    assert views.save(fake(), path) == path and path.stat().st_size > 100
    first = path.read_text("utf-8")
    views.save(fake(seed=1), str(path))
    assert path.read_text("utf-8") != first
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays
    with pytest.raises(FileExistsError, match="overwrite=True"):
        views.save(fake(), path, overwrite=False)


@pytest.mark.parametrize("suffix", [".html", ".csv", ".json", ".svg"])
def test_save_several_lenses(tmp_path, suffix):
    views.save({"a": fake(), "b": fake(seed=1)}, tmp_path / f"x{suffix}")


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"'\.pdf'\): use one of \.html, \.svg, \.png, \.csv, \.json"):
        views.save(fake(), tmp_path / "x.pdf")
    with pytest.raises(ValueError, match="no suffix"):
        views.save(fake(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"a difference needs two of the lenses a, b, got \('a', 'c'\)"):
        views.save({"a": fake(), "b": fake()}, tmp_path / "x.svg", diff=("a", "c"))
    with pytest.raises(ValueError, match="no statistic"):
        views.save(fake(), tmp_path / "sub" / "x.html", stat="nope")
    (tmp_path / "d.html").mkdir()
    with pytest.raises(IsADirectoryError, match="give a file in it"):
        views.save(fake(), tmp_path / "d.html")
    assert [p.name for p in tmp_path.iterdir()] == ["d.html"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = views.save(fake(), tmp_path / "x.json")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        views.save(fake(seed=1), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@MATPLOTLIB
def test_png_needs_no_browser(tmp_path):
    assert views.save(fake(), tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# --- scores

ROWS = [
    {"lens": "logit", "layer": 0, "kl": 2.0, "bits_per_byte": 1.5, "top1": 0.25, "entropy": 1.0, "bias": 0.1},
    {"lens": "tuned", "layer": 0, "kl": 1.0, "bits_per_byte": 1.25, "top1": 0.5, "entropy": 1.0, "bias": 0.1},
    {"lens": "tuned", "layer": 1, "kl": 0.5, "bits_per_byte": None, "top1": NAN, "entropy": 1.0, "bias": 0.1},
]


def test_scores_table():
    out = StringIO()
    Console(file=out, width=80, color_system=None).print(views.scores_table(ROWS))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[0] == ["logit", "tuned"]
    assert lines[1] == ["layer", "KL", "bits/B", "top-1", "KL", "bits/B", "top-1"]
    assert lines[3] == ["0", "2.000", "1.500", "25.0%", "1.000", "1.250", "50.0%"]
    assert views.to_text(views.scores_table(ROWS), width=80, color=False) == out.getvalue().rstrip("\n")
    assert lines[4] == ["1", "–", "–", "–", "0.500", "–", "–"]


def test_the_best_lens_is_bold():
    page = views.scores_html(ROWS)
    assert re.findall(r"<b>(.*?)</b>", page) == ["1.000", "1.250", "50.0%"]
    tied = [{**ROWS[0], "kl": 1.0002}, {**ROWS[1], "kl": 1.0}]
    assert "<b>1.000</b>" not in views.scores_html(tied)  # equal as printed
    assert "<i>" not in views.scores_html([{**ROWS[0], "lens": "<i>"}])


def test_scores_refuse():
    with pytest.raises(ValueError, match="no scores"):
        views.scores_table([])
    with pytest.raises(ValueError, match="keys lens and layer"):
        views.scores_html([{"kl": 1.0}])
    with pytest.raises(ValueError, match="choose from kl, bits_per_byte"):
        views.scores_figure(ROWS, "loss")


@MATPLOTLIB
def test_scores_figure():
    (axes,) = views.scores_figure(ROWS, "kl").axes
    assert [line.get_label() for line in axes.lines] == ["logit", "tuned"]
    assert axes.lines[1].get_xydata().tolist() == [[0, 1.0], [1, 0.5]] and axes.get_ylabel() == "KL, nats"
    assert math.isnan(axes.lines[0].get_ydata()[1])
    hooks = [{**ROWS[0], "layer": "blocks.0.hook_resid_mid"}, {**ROWS[0], "layer": 1}]
    assert views.scores_lines(hooks).ticks == {0: "blocks.0.hook_resid_mid", 1: "1"}


# --- glyphs and style


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Paris", "·Paris"),
        ("  a b ", "··a b·"),
        ("   ", "···"),
        ("\n\t", "↵⇥"),
        ("", "∅"),
        (" <0xE2><0x80>", "·⟨0xE2⟩⟨0x80⟩"),
        ("\u200b\x00", "⟨U+200B⟩⟨U+0000⟩"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_readable(text, shown):
    assert readable(text) == shown == "".join(piece for piece, _ in parts(text))


def test_cutting_counts_cells():
    assert clip("日本語", 4) == "日…" and cell_width(pad("日本語", 4)) == 4
    assert pad("ab", 4) == "ab  " and clip("abcd", 4) == "abcd" and clip("abcde", 4) == "abc…"


def test_row_labels_are_short_and_unambiguous():
    names = ("blocks.3.hook_resid_mid", "blocks.3.attn.hook_z", 4, "ln_final.hook_normalized")
    assert row_labels(names) == ["3 resid_mid", "3 attn.z", "4", "ln_final.normalized"]
    assert row_labels((3, "3")) == ["3", "3"] and row_labels(("hook_embed", "embed")) == ["hook_embed", "embed"]


def test_scales_bright_is_good():
    assert scale_of(STATS["kl"], [0.0, 4.0]).color(0.0) == SEQUENTIAL[-1]
    assert scale_of(STATS["max_prob"], [0.2]).color(1.0) == SEQUENTIAL[-1]
    assert scale_of(STATS["rank"], [1.0, 100.0]).position(10.0) == pytest.approx(0.5)
    s = scale_of(STATS["logprob_diff"], [-1.0, 3.0])
    assert (s.low, s.high) == (-3.0, 3.0) and s.color(0.0) == DIVERGING[4] and s.color(NAN) is None
    s = scale_of(change(STATS["kl"]), [-2.0, 1.0])
    assert s.color(-2.0) == DIVERGING[-1]  # KL going down is good


def test_a_difference_has_zero_in_the_middle_and_says_what_is_cut():
    """In the page, in pictures, in the terminal and in plotly, whichever side the outliers are on."""
    for stat in (change(STATS["kl"]), versus(STATS["kl"], "a", "b"), versus(STATS["max_prob"], "a", "b")):
        for values in ([0.0], [0.0, 0.0], [-1.0, 3.0], [*map(float, range(10)), -500.0], [*map(float, range(-9, 1)), 500.0]):
            s = scale_of(stat, values)
            assert s.low == -s.high < 0 and s.position(0.0) == 0.5 and s.color(0.0) == DIVERGING[4], (stat.name, values)
            dark, middle, bright = s.labels()
            beyond = [max(values) > s.high, min(values) < s.low]
            assert middle == "0.00" and [f"{dark}{bright}".count(mark) for mark in "≥≤"] == beyond
            assert beyond == [500.0 in values, -500.0 in values]
            assert dark in color_legend(s).plain and bright in color_legend(s).plain
    colors = scale_of(versus(STATS["kl"], "a", "b"), [*map(float, range(10)), -500.0])
    drawn = views.Heat("t", ["0"], ["0"], [[-500.0]], colors=colors)
    assert "≤ −" in drawn.svg()
    flat = views.Heat("t", ["0"], ["0"], [[0.0]], diverging=True, high=0.0).scale
    assert flat.position(0.0) == 0.5


@FIGURE
def test_the_bar_of_a_figure_is_the_legend():
    t = fake(stats=("kl", "rank"), pos=12)
    t.stats["kl"][0, 0, 0] = 1e4
    for stat in ("kl", "rank"):
        heat = views.heat_map(t, stat)
        bar = heat.figure().data[0].colorbar
        assert list(bar.ticktext) == heat.scale.labels()
    assert any("≥" in text for text in views.heat_map(t, "kl").figure().data[0].colorbar.ticktext)


@MATPLOTLIB
def test_means_have_the_middle_half_of_the_tokens_as_a_band():
    t = fake(pos=9)
    drawn = views.means_lines({"a": t, "b": t}, "kl")
    x = t.stats["kl"][1, 0].sort().values.double()
    assert drawn.bands["b"][1] == (1, pytest.approx(float(x[2])), pytest.approx(float(x[6])))
    assert drawn.svg().count("<svg") == 1


def test_outliers_do_not_take_all_colours_and_the_legend_says_so():
    s = scale_of(STATS["kl"], [*map(float, range(10)), 1000.0])
    assert s.high < 30 and s.labels()[0].startswith("≥ ") and s.position(1000.0) == 0
    assert not scale_of(STATS["kl"], [1.0, 1.0, 2.0]).labels()[0].startswith("≥")


def test_ink_reads_on_every_colour():
    def luminance(c):
        v = [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        v = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in v]
        return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]

    for color in (*SEQUENTIAL, *DIVERGING):
        a, b = sorted((luminance(color), luminance(ink(color))))
        assert (b + 0.05) / (a + 0.05) > 3.4, color


def test_numbers_are_short():
    kl = STATS["kl"]
    shown = [number(kl, v) for v in (0.0, 0.004, 9.996, 99.6, 999.7, 12345.0, -0.5, -0.001, NAN, math.inf)]
    assert shown == ["0.00", "0.00", "10.0", "100", "1.0k", "12k", "−0.50", "0.00", "–", "∞"]
    assert stat_info("my_stat").title == "my stat"


# --- the design's rules


def test_views_know_nothing_and_do_not_import_each_other():
    shared = {"canvas", "cells", "document", "glyphs", "grid", "heatmap", "lines", "rows", "saving", "style"}
    above = {"matrix": {"term"}, "reading": {"scope"}, "page": {"reading"}, "pages": {"page", "reading"}}
    for path in Path(views.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name == "tl_lenses.views" or not name.startswith("tl_lenses") or path.name == "__init__.py":
                    continue
                if name in ("tl_lenses.files", "tl_lenses.checks"):  # how bytes get to a disk, what a number is
                    continue
                allowed = shared | above.get(path.stem, set())
                assert name.startswith("tl_lenses.views.") and name.rpartition(".")[2] in allowed, (path.name, name)
