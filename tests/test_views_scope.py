"""The views of a patchscope on small fake results: what they say, that odd input breaks nothing, that nothing leaks."""

import re
import sys
from importlib.util import find_spec
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from test_views import FIGURE, data_of, parsed

from tl_lenses import views
from tl_lenses.patchscopes import PatchscopeResult
from tl_lenses.views.glyphs import distinct, shorten

VOCAB = {0: " Tokyo", 1: "\n", 2: "<0xE2>", 3: "日本", 4: "[red]", 5: "</td>", 6: '"', 7: " is"}
IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"


def fake(sources=("The city of",), pairs=((0, 0), (1, 1)), text=None, k=3, **settings):
    """A result whose cell (s, p) has token (s + p) % 8 on top, with probability 0.9, 0.8, ... in order."""
    shape = (len(sources), len(pairs))
    cells = torch.arange(shape[0] * shape[1]).view(shape)
    probs = 0.9 - 0.1 * (cells % 9)[..., None] * torch.ones(k)
    if text == "made":
        text = [[f" Tokyo {s}{p}\nand" for p in range(shape[1])] for s in range(shape[0])]
    return PatchscopeResult(
        sources=list(sources),
        pairs=list(pairs),
        top_ids=(cells[..., None] + torch.arange(k)) % len(VOCAB),
        top_probs=probs / torch.arange(1, k + 1),
        vocab=dict(VOCAB),
        text=text,
        settings={"target": IDENTITY, "mode": "replace", "when": "prompt", "do_sample": False, "seed": 0} | settings,
    )


SWEEP = [(a, b) for a in range(3) for b in range(4)]
SITES = (("blocks.0.hook_resid_mid", "blocks.0.hook_resid_mid"), ("blocks.1.attn.hook_z", 2))
CASES = {
    "diagonal": fake(),
    "two sources": fake(["a", "b\nc"]),
    "text": fake(["a", "b"], text="made"),
    "missing text": fake(text=[["", " x"]]),
    "sweep": fake(pairs=SWEEP),
    "sweep of two sources": fake(["a", "b"], pairs=SWEEP),
    "sweep with text": fake(pairs=SWEEP, text="made"),
    "sweep with holes": fake(pairs=[p for p in SWEEP if p[1] <= p[0] + 1]),
    "one l": fake(pairs=[(2, b) for b in range(4)]),
    "vectors": fake(["vector 0", "vector 1"], pairs=[(None, 0), (None, 3)]),
    "sites": fake(pairs=SITES),
    "many sources": fake([f"The capital of number {i} is the city of" for i in range(20)], pairs=[(0, 0), (1, 1)]),
    "many sources with text": fake([f"source {i}" for i in range(20)], text="made"),
    "no settings": PatchscopeResult(**{**vars(fake()), "settings": {}}),
    "token ids": fake(target=[1, 2, 3]),
    "not a number": PatchscopeResult(**{**vars(fake()), "top_probs": torch.full((1, 2, 3), torch.nan)}),
    "no vocabulary": PatchscopeResult(**{**vars(fake()), "vocab": {}}),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


def plain(result, width=80):
    return views.to_text(views.patchscope_table(result), width=width, color=False).splitlines()


# --- every view on every case


def test_tables_fit_the_width(case):
    for width in (20, 40, 80):
        for color in (True, False):
            text = views.to_text(views.patchscope_table(case), width=width, color=color)
            assert all(cell_len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= width for line in text.splitlines())


def test_the_page_is_well_formed_and_loads_nothing(case):
    page = views.patchscope_html(case)
    assert parsed(page).rows
    assert not re.search(r"https?://|@import|url\(|<img", page)


@FIGURE
def test_figures(case):
    fig = views.patchscope_figure(case, len(case.sources) - 1)
    assert len(fig.data[0].z) == len(fig.data[0].text) == len(fig.layout.yaxis.ticktext)


def test_the_result_shows_itself(case):
    assert str(case).splitlines()[0].startswith("patchscope")
    assert "<iframe" in case._repr_html_() and 'sandbox="allow-scripts"' in case._repr_html_()
    out = StringIO()
    Console(file=out, width=60, color_system=None).print(case)
    assert out.getvalue().startswith("patchscope")


# --- terminal


def test_golden_text_of_a_diagonal_sweep():
    assert plain(fake(["The city of", "日本 and\nmore"])) == [
        'patchscope into "cat -> cat↵1135 -> 1135↵hello -> hello↵?"',
        "in each cell: the top token and its probability",
        "",
        "layer  The city of  日本 and↵more",
        "    1  ↵      0.80  日本     0.60",
        "    0  ·Tokyo 0.90  ⟨0xE2⟩   0.70",
    ]


def test_golden_text_of_generated_text():
    texts = [[" Tokyo -> Tokyo\nsur", ""], ["x" * 60, "a\tb\u200b"]]
    assert plain(fake(["one", "two"], text=texts, mode="add", do_sample=True, seed=3, when="every_step")) == [
        'patchscope into "cat -> cat↵1135 -> 1135↵hello -> hello↵?"',
        "mode add, patched at every step, sampled, seed 3",
        "in each cell: the continuation of the prompt",
        "",
        "layer  one                    two",
        '    1  ""                     "a⇥b⟨U+200B⟩"',
        '    0  " Tokyo -> Tokyo↵sur"  "' + "x" * 47 + '…"',
    ]


def test_golden_text_of_a_sweep():
    assert plain(fake(pairs=[(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]), width=44) == [
        'patchscope into "cat -> cat↵1…lo -> hello↵?"',
        "l down, l* across; in each cell: the top to…",
        "",
        'source "The city of"',
        "l\\l*  0           1",
        "   2  [red]  0.50",
        "   1  ⟨0xE2⟩ 0.70 日本 0.60",
        "   0  ·Tokyo 0.90 ↵    0.80",
    ]


def test_golden_text_of_vectors_and_sites():
    assert plain(CASES["vectors"])[3:] == [
        "l*  vector 0     vector 1",
        " 3  ↵      0.80  日本   0.60",
        " 0  ·Tokyo 0.90  ⟨0xE2⟩ 0.70",
    ]
    assert plain(CASES["sites"])[4:] == [
        "                   l → l*  top token",
        "             1 attn.z → 2  ↵      0.80",
        "0 resid_mid → 0 resid_mid  ·Tokyo 0.90",
    ]


def test_the_end_of_a_long_prompt_is_kept():
    title = plain(fake(target="Syria: Country in the Middle East, " * 5 + "x"), width=60)[0]
    assert cell_len(title) <= 60 and title.endswith('x"') and "…" in title


def test_colours_only_where_the_console_has_them():
    table = views.patchscope_table(fake(pairs=SWEEP))
    colored = views.to_text(table, color=True)
    assert "\x1b[" in colored and "0.90" not in colored  # the colour is the number
    assert "\x1b[" not in views.to_text(table, color=False)


def test_what_does_not_fit_is_said():
    pairs = [(0, b) for b in range(700)]
    assert plain(fake(pairs=pairs))[-1] == "(500 of 700 pairs are left out: result.to_frame() has all)"
    many = fake([str(i) for i in range(70)], pairs=SWEEP)
    assert plain(many)[-1] == "(20 of 70 sources are left out: result.to_frame() has all)"
    assert len(views.patchscope_html(fake([str(i) for i in range(20_000)]))) < 12e6


def test_sources_become_rows_where_there_are_many():
    lines = plain(CASES["many sources"])
    assert lines[3].startswith("source \\ layer") and len(lines) == 4 + 20
    assert all(f"number {i} " in line for i, line in enumerate(lines[4:]))  # cut where all of them say the same


def test_labels_are_cut_in_the_middle():
    assert shorten("abcdefghij", 5) == "ab…ij" and shorten("abc", 3) == "abc" and shorten("日本日本", 5) == "日…本"
    assert all(cell_len(shorten("ab日本cd", n)) <= n for n in range(1, 9))


def test_labels_are_cut_where_they_are_equal():
    assert distinct(["the city of A is", "the city of B is"], 10) == ["…of A is", "…of B is"]
    assert distinct(["same" * 9, "same" * 9], 9) == distinct(["same" * 9], 9) * 2


def test_nothing_to_show():
    empty = PatchscopeResult(**{**vars(fake()), "top_ids": torch.zeros(1, 2, 0).long(), "top_probs": torch.zeros(1, 2, 0)})
    for view in (views.patchscope_table, views.patchscope_html):
        with pytest.raises(ValueError, match="no cells to show"):
            view(empty)


# --- page


def test_the_page_says_what_the_terminal_says_last_layer_on_top():
    page = parsed(views.patchscope_html(fake(["one", "two"])))
    assert page.rows == [["layer", "one", "two"], ["1", "↵", "日本"], ["0", "·Tokyo", "⟨0xE2⟩"]]
    sweep = parsed(views.patchscope_html(fake(pairs=[(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)])))
    assert sweep.rows[1:] == [["2", "[red]", ""], ["1", "⟨0xE2⟩", "日本"], ["0", "·Tokyo", "↵"]]
    text = parsed(views.patchscope_html(fake(text=[[" a\nb", ""]])))
    assert text.rows[1:] == [["1", '""'], ["0", '" a↵b"']]
    many = parsed(views.patchscope_html(CASES["many sources"])).rows
    assert many[1][0].endswith("number 0 is the city of") and many[-1][0].endswith("number 19 is the city of")


def test_the_data_of_the_page_has_every_cell():
    result = fake(["a", "b"], pairs=SWEEP, text="made")
    data = data_of(views.patchscope_html(result))
    assert [row["name"] for row in data["rows"]] == ["0: a", "1: b"] and data["layers"] == ["0", "1", "2"]
    cells = data["lenses"][0]["rows"][1]
    assert [data["vocab"][i] for i in cells["shown"]] == [f'" Tokyo 1{p}↵and"' for p in range(12)]
    assert cells["stats"]["max_prob"] == pytest.approx(result.top_probs[1, :, 0].tolist(), rel=1e-3)
    assert len(cells["top"]) == len(cells["probs"]) == 12 * 3 and cells["from"] == [1] * 12
    holes = data_of(views.patchscope_html(CASES["sweep with holes"]))["lenses"][0]["rows"][0]
    assert holes["stats"]["max_prob"][3] is None and holes["top"][9:12] == [-1] * 3 and holes["from"][3] == -1


def test_where_vectors_come_from_and_go_to_is_marked():
    result = fake(["The city of", "a"])
    prompts = [SimpleNamespace(ids=[9, 5, 6, 7], texts=["<s>", "The", " city", " of"], at=(2,)), None]
    into = [SimpleNamespace(ids=[9, 1], texts=["<s>", "?"], at=(1,))]
    made = SimpleNamespace(**{**vars(result), "source_prompts": prompts, "target_prompts": into})
    made.settings = made.settings | {"bos": "<s>", "target_bos": "<s>"}
    page = views.patchscope_html(made)
    assert "<code>The<mark> city</mark> of</code>" in page and "<code><mark>?</mark></code>" in page
    assert data_of(page)["from"] == [["The", " city", " of"], ["a"]]


def test_scores_stand_beside_the_texts():
    result = fake(["a", "b"], text="made")
    scores = {"specificity": torch.tensor([[1.5, -2.0]]), "own_rank": torch.tensor([[1.0, 7.0]])}
    found = SimpleNamespace(result=result, of_texts=lambda: scores)
    data = data_of(views.patchscope_html(found))
    stats = data["lenses"][0]["rows"][0]["stats"]
    assert data["stat"] == "specificity" and data["stats"]["own_rank"]["flip"] and data["numbers"]
    assert stats["specificity"] == [1.5, None, -2, None] and stats["own_rank"] == [1, None, 7, None]  # of the first source alone


def test_user_text_is_harmless():
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'\"\n"
    result = fake([evil, evil], pairs=[(evil, evil), (0, 1)], text=[[evil, evil]] * 2, target=evil)
    result.vocab.update(dict.fromkeys(VOCAB, evil))
    for shown in (result, PatchscopeResult(**{**vars(result), "text": None})):
        page = views.patchscope_html(shown)
        assert page.count("<script") == 2 and "<img" not in page and "&amp;amp;" in page
        assert "</script>" in str(data_of(page)["vocab"])
    if find_spec("plotly"):
        fig = views.patchscope_figure(result)
        assert "<script" not in fig.data[0].text[0][0] + fig.data[0].customdata[0][0] + fig.layout.title.text


# --- heat map


def test_the_picture_of_a_result_cuts_nothing_and_has_a_legend():
    long = "a text of more than forty-eight characters, all of which are there"
    svg = views.patchscope_heat(fake(text=[[long, "x"]], target="t " * 80)).svg()
    assert (
        f"&quot;{long}&quot;" in svg
        and svg.count("t t t t") > 15
        and svg.startswith('<svg xmlns="http://www.w3.org/2000/svg" width="763"')
        and "probability of the top token" in svg
        and "…" not in svg
    )
    sweep = views.patchscope_heat(fake(pairs=SWEEP, text="made"))
    assert sweep.rows == ["2", "1", "0"] and sweep.texts[2][1] == '" Tokyo 01↵and"'


# --- figure


@FIGURE
def test_the_figure_of_a_sweep_has_l_down():
    fig = views.patchscope_figure(fake(pairs=SWEEP))
    heat = fig.data[0]
    assert list(heat.text[2][:2]) == ["·Tokyo 0.90", "↵     0.80"] and heat.z[1][0] == pytest.approx(0.5)
    assert fig.layout.yaxis.ticktext == ("2", "1", "0") and fig.layout.xaxis.ticktext == ("0", "1", "2", "3")
    assert fig.layout.yaxis.autorange == "reversed" and (heat.zmin, heat.zmax) == (0.0, 1.0)
    assert "l = 0 → l* = 1" in heat.customdata[2][1]
    assert views.patchscope_figure(CASES["sweep with holes"]).data[0].z[2][3] is None


@FIGURE
def test_the_figure_of_a_diagonal_is_a_column_with_its_texts():
    result = fake(["a", "b"], text="made")
    fig = views.patchscope_figure(result, 1)
    assert [len(row) for row in fig.data[0].z] == [1, 1] and fig.data[0].text[1][0] == "⟨0xE2⟩ 0.70"
    assert [a.text for a in fig.layout.annotations] == ['" Tokyo 11↵and"', '" Tokyo 10↵and"']
    assert not views.patchscope_figure(fake()).layout.annotations
    assert views.patchscope_figure(result, -1).data[0].z == fig.data[0].z
    with pytest.raises(ValueError, match=r"source=2 is out of range: this result has 2 sources \(0\.\.1\)"):
        result.figure(2)


def test_figure_without_plotly(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"^figures need plotly: pip install tl-lenses\[plot\]$"):
        views.patchscope_figure(fake())
