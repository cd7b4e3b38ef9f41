"""What the page does: side by side, differences, tokens that are followed, faded positions, matrices; in a browser where there is one."""

import html
import json
import math
import os
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
import torch
import zoo
from test_views import fake, parsed
from test_views_scope import fake as scope

import tl_lenses as tll
from tl_lenses import views
from tl_lenses.views.document import CODES, rank_steps
from tl_lenses.views.grid import base_name, heading
from tl_lenses.views.style import DIVERGING

BROWSER = os.environ.get("TL_LENSES_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chrome-headless-shell", "chromium", "google-chrome"))),
    None,
)
driven = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium-headless-shell")


def tracked(t, ids, seed=3):
    """With ranks and probabilities of these tokens."""
    gen = torch.Generator().manual_seed(seed)
    shape = (*t.top_ids.shape[:3], len(ids))
    t.tracked = SimpleNamespace(
        ids=torch.tensor([ids] * shape[1]), ranks=torch.randint(1, 40_000, shape, generator=gen, dtype=torch.int32),
        probs=torch.rand(shape, generator=gen) ** 8,
    )  # fmt: skip
    return t


def two(**how):
    """The logit lens and a fitted one, whose fit left out position 0."""
    a, b = fake(stats=("kl", "rank"), **how), fake(stats=("kl", "rank"), seed=1, name="tuned", **how)
    a.settings, b.settings = {"lens": "logit"}, {"lens": "tuned"}
    b.left_out = torch.zeros_like(b.mask)
    b.left_out[:, 0] = True
    return {"logit": tracked(a, [1, 4]), "tuned": tracked(b, [1, 4], 4)}


def data_of(page):
    return json.loads(parsed(page).data)


# --- what the page is given


def test_it_opens_on_the_fitted_lens_or_on_the_difference_asked_for():
    trajs = two()
    data = data_of(views.html(trajs))
    assert data["start"] == 1 and [x["name"] for x in data["lenses"]] == ["logit", "tuned", "tuned − logit"]
    data = data_of(views.html(trajs, diff=("logit", "tuned")))
    assert data["lenses"][data["start"]]["name"] == "logit − tuned" and len(data["lenses"]) == 4
    assert [row[0] for row in parsed(views.html(trajs, diff=("logit", "tuned"))).rows] == ["layer", "2", "1", "0"]


def test_ranks_are_a_character_each_and_read_back_to_a_few_percent():
    t = tracked(fake(n_layers=30, pos=300), list(range(9)) + list(range(11)))
    page = views.html(t)
    cells = data_of(page)["lenses"][0]["rows"][0]
    assert sum(map(len, cells["ranks"])) == 31 * 300 * 20
    stored = len(json.dumps(cells["ranks"]).encode())
    assert stored < 300_000 and json.dumps(cells["ranks"][0]) in page  # nothing is escaped on the way
    steps = data_of(page)["ranks"]
    back = torch.tensor([[steps[CODES.index(c)] for c in line] for line in cells["ranks"]])
    true = t.tracked.ranks[:, 0].flatten(0, 1).T
    assert (back <= true).all() and (true <= back * 1.2 + 1).all()


@pytest.mark.parametrize("worst", [1, 2, 60, 89, 90, 91, 50_257, 262_144])
def testrank_steps_fit_the_characters_and_are_exact_first(worst):
    steps = rank_steps(worst)
    assert steps[0] == 1 and steps[-1] == worst and len(steps) <= len(CODES) and steps == sorted(set(steps))
    assert steps[:9] == list(range(1, 10))[: len(steps)] and (worst > len(CODES)) == (
        steps != list(range(1, worst + 1))
    )


def test_left_out_positions_are_faded_and_leave_the_scale():
    trajs = two()
    for t in trajs.values():
        t.stats["kl"] = t.stats["kl"].clamp(0, 5)
        t.stats["kl"][:, :, 0] = 1000.0
    page = views.html(trajs, "kl")
    data = data_of(page)
    assert (
        data["rows"][0]["faded"] == [0]
        and data["stats"]["kl"]["high"] <= 5
        and "position 0, which the fit left out" in page
    )
    assert len(re.findall(r'<td class="[cdn][^"]* o"', page)) == 3
    assert data_of(views.html(trajs["logit"], "kl"))["rows"][0]["faded"] == []  # nothing was fitted
    both = views.svg(trajs, "kl")
    assert both.count('opacity="0.3"') == 6 and "position 0, which the fit left out" in both
    for color in (True, False):
        text = views.to_text(trajs["tuned"], "kl", color=color, width=90)
        assert "position 0, which the fit left out" in text and ("1.0k" in text or color)


# --- differences and panels


def test_a_difference_is_a_minus_b_with_a_better_at_the_bright_end():
    trajs = two()
    d = views.difference(trajs, ("tuned", "logit"))
    assert torch.allclose(d.stats["kl"], (trajs["tuned"].stats["kl"] - trajs["logit"].stats["kl"]).double(), atol=1e-6)
    ranks = [trajs[name].stats["rank"].double() for name in ("tuned", "logit")]
    there = ranks[0] > 0
    assert torch.allclose(d.stats["rank"][there], (ranks[0].log10() - ranks[1].log10())[there])
    lower = views.heat_map(d, "kl").scale
    assert [lower.color(v) for v in (-9.0, 9.0)] == [
        DIVERGING[-1],
        DIVERGING[0],
    ] and lower.stat.bright == "tuned better"
    assert "tuned − logit" in views.to_text(d, color=False, width=90)
    with pytest.raises(ValueError, match="a difference needs two of the lenses"):
        views.difference(trajs, ("tuned", "tuned"))


def test_divergences_are_drawn():
    class Pair(dict):
        def divergence(self, a, b, kind):
            return torch.full((3, 1, 4), {"kl": 1.0, "js": 0.5, "tv": 0.25}[kind])

    trajs = Pair(two())
    data = data_of(views.html(trajs, diff=("tuned", "logit")))
    kept = data["lenses"][data["start"]]
    assert (
        kept["rows"][0]["stats"]["between_js"] == [0.5] * 12
        and kept["scales"]["between_tv"]["label"] == "total variation(tuned, logit)"
    )
    assert "KL(tuned ‖ logit)" in views.svg(trajs, "between_kl", diff=("tuned", "logit"))


def test_several_lenses_are_small_multiples_on_one_scale_and_long_prompts_wrap():
    trajs = two(pos=30)
    root = ET.fromstring(views.svg(trajs, "kl"))
    texts = ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert (
        texts.count("toy, logit lens") == texts.count("toy, tuned lens") == texts.count("KL(model ‖ lens), nats") == 1
    )
    one, wrapped = (ET.fromstring(views.svg(trajs["logit"], "kl", width=w)) for w in (None, 700))
    size = lambda e: (int(e.get("width")), int(e.get("height")))
    assert size(one)[0] > 1400 and size(wrapped)[0] <= 700 and size(wrapped)[1] > 2 * size(one)[1] - 100
    assert len(list(one.iter("{http://www.w3.org/2000/svg}title"))) == len(
        list(wrapped.iter("{http://www.w3.org/2000/svg}title"))
    )


def test_a_slide_has_lenses_side_by_side_and_the_answer_beside_their_layers(tmp_path):
    trajs = two(n_layers=30, pos=9)
    one = views.slide(trajs, "kl", answer=" Paris", tokens=3)
    root = ET.fromstring(one.svg())
    texts = ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert (root.get("width"), root.get("height")) == ("1920", "1080")
    assert texts.count("logit lens") == texts.count("tuned lens") == texts.count("KL(model ‖ lens), nats") == 1
    for heat, t in zip(one.heats, trajs.values(), strict=True):
        assert len(heat.columns) == 3 and [int(row) for row in heat.rows] == list(range(30, -1, -3))
        assert heat.bars == pytest.approx(t.tracked.probs[:, 0, -1, 0].flip(0)[::3].tolist())
        assert heat.beside[0].endswith(f"#{int(t.tracked.ranks[-1, 0, -1, 0]):,}")
    with pytest.raises(
        ValueError, match=r"the answer ' Rome' was not tracked, only \[' Paris', ' is'\]: pass track=\[' Rome'\]"
    ):
        views.slide(trajs, answer=" Rome")
    assert 'width="1920"' in views.save(trajs, tmp_path / "x.svg", answer=" Paris").read_text("utf-8")
    with pytest.raises(ValueError, match="no difference"):
        views.save(trajs, tmp_path / "x.svg", answer=" Paris", diff=("tuned", "logit"))


def test_the_picture_of_a_slide_is_16_to_9():
    pytest.importorskip("matplotlib")
    png = views.slide(two(), answer=" Paris").png()
    assert struct.unpack(">II", png[16:24]) == (1920, 1080)


# --- matrices


def test_a_matrix_has_a_page_a_picture_a_text_and_a_frame():
    m = views.heat(
        [[0.0, 1.5], [math.nan, -2.0]], rows=["a", "b"], title="drop", unit="nats", down="layer", across="head"
    )
    assert repr(m) == "Matrix('drop', 2 x 2)" and "1.50" in str(m) and "–" in str(m)
    assert [row[1:] for row in parsed(m.html()).rows] == [["0", "1"], ["0.00", "1.50"], ["", "−2.00"]]
    data = data_of(m.html())
    assert data["lenses"][0]["rows"][0]["stats"]["value"] == [None, -2, 0, 1.5] and data["layers"] == ["b", "a"]
    assert "drop, nats" in m.svg() and m.to_frame()["value"].tolist()[1] == 1.5
    assert not re.search(r"https?://(?!www.w3.org)|@import", m.html())


def test_bright_is_good():
    high, low = (views.heat([[0.0, 1.0]], good=good).picture.scale for good in ("high", "low"))
    assert [high.position(v) for v in (0.0, 1.0)] == [low.position(v) for v in (1.0, 0.0)] == [0.0, 1.0]
    assert views.heat([[-3.0, 1.0]], good=None).picture.scale.position(0.0) == 0.5
    # nearly all at 0: the one that is not is in the scale
    rare = views.heat([[0.0] * 20, [0.01] * 19 + [1.0]]).picture.scale
    assert (rare.low, rare.high, rare.clipped) == (0.0, 1.0, (False, False))


@pytest.mark.parametrize(
    ("values", "match"),
    [([], "a matrix"), ([[]], "a matrix"), ([[1.0], [1.0, 2.0]], "a matrix"), (torch.zeros(2, 2, 2), "values")],
)
def test_no_matrix_is_refused(values, match):
    with pytest.raises((TypeError, ValueError), match=match):
        views.heat(values)


# --- patchscopes of a trajectory's vectors


def said(traj, **how):
    """A result of patchscopes of the last two tokens of a fake trajectory's prompt, at layers 0 and 2."""
    made, ids = (
        scope(["all but one", "all"], pairs=[(0, 1), (2, 1)], model=traj.model_name, **how),
        traj.tokens[0].tolist(),
    )
    prompt = lambda n: SimpleNamespace(ids=ids[:n], texts=[f"<{i}>" for i in ids[:n]], at=(n - 1,))
    into = SimpleNamespace(ids=[1, 2, 3], texts=["What is", " x", "?"], at=(1,))
    return SimpleNamespace(**vars(made), source_prompts=[prompt(len(ids) - 1), prompt(len(ids))], target_prompts=[into])


def test_a_vector_is_that_of_a_cell_if_all_up_to_its_token_is_the_same():
    t = fake()
    (found,) = data_of(tll.page(t, scopes=[said(t, text="made")]).text)["readings"]
    assert found["into"] == ["What is", " x", "?"]
    (cells,) = found["cells"]
    assert sorted(cells) == ["0,2", "0,3", "2,2", "2,3"]
    into, text, tops, probs, scores = cells["2,3"][0]
    vocab = data_of(tll.page(t, scopes=[said(t, text="made")]).text)["vocab"]
    assert (into, vocab[text], len(tops), probs[0], scores) == ("1", '" Tokyo 11↵and"', 3, 6000, "")
    other = said(t)
    other.source_prompts = [SimpleNamespace(ids=[7, 7], texts=["a", "b"], at=(1,)), None]
    with pytest.raises(ValueError, match="no vector of the patchscope of 'all but one' is a cell of this trajectory"):
        tll.page(t, scopes=[other])
    with pytest.raises(ValueError, match="vectors are of 'another', the trajectory is of 'toy'"):
        tll.page(
            SimpleNamespace(**{**vars(t), "model_name": "toy"}),
            scopes=[said(SimpleNamespace(**{**vars(t), "model_name": "another"}))],
        )
    with pytest.raises(ValueError, match="are of the page of a trajectory"):
        tll.page(scope(), scopes=[other])


def test_a_page_of_real_results(tmp_path):
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    prompt = "the cat sat on the mat"
    result = tll.patchscope(
        model, [tll.Source(prompt, 2), tll.Source(prompt, "mat")], tll.Target("the sat is cat", 3), [0, 2]
    )
    (taken, _), (put,) = result.source_prompts, result.target_prompts
    assert (
        taken.at == (2,) and taken.ids == model.to_tokens(prompt)[0].tolist() and put.at == (3,) and len(put.texts) > 3
    )
    found = tll.faithfulness(result, draws=2)
    linked = tll.page(tll.trajectory(model, tll.Lens(model), prompt), scopes=[found])
    cells = data_of(linked.text)["readings"][0]["cells"][0]
    assert sorted(cells) == ["0,2", f"0,{len(taken.ids) - 1}", "2,2", f"2,{len(taken.ids) - 1}"]
    assert "specificity" in cells["0,2"][0][4] and "rank of its own vector" in cells["0,2"][0][4]
    stats = data_of(tll.page(found).text)["lenses"][0]["rows"][0]["stats"]
    assert stats["specificity"][0] == pytest.approx(float(found.of_texts()["specificity"][0, 0]), rel=1e-3)
    assert linked.save(tmp_path / "x.html").read_text("utf-8") == linked.text and "<iframe" in linked._repr_html_()


# --- names, and few colours


def test_models_by_their_base_name_and_lenses_by_their_kind():
    assert [base_name(x) for x in ("HuggingFaceTB/SmolLM2-135M", "C:\\models\\my-model", "/tmp/run/7/", "gpt2")] == [
        "SmolLM2-135M",
        "my-model",
        "7",
        "gpt2",
    ]
    t = fake(name="")
    t.settings = {"lens": "tuned"}
    assert heading(t) == "toy, tuned lens"


@pytest.mark.parametrize(
    ("system", "numbers", "colored", "written"),
    [("standard", False, False, True), ("256", False, True, False), ("256", True, True, True)],
)
def test_few_colours_are_numbers(system, numbers, colored, written):
    from io import StringIO

    from rich.console import Console

    t, out = fake(stats=("kl",)), StringIO()
    Console(file=out, width=90, color_system=system, force_terminal=True, legacy_windows=False).print(
        views.terminal(t, numbers=numbers)
    )
    assert ("\x1b[38;5" in out.getvalue()) == colored
    assert (f"{t.stats['kl'][0, 0, 0]:.2f}" in out.getvalue()) == written


# --- in a browser


def drive(page, tmp_path, script, width=1000):
    """Runs a script at the end of the page, and gives what it puts into `out`."""
    path = tmp_path / "page.html"
    tail = f"const out={{}};window.onerror=(m)=>{{out.error=m}};try{{{script}}}catch(e){{out.error=String(e)}}"
    path.write_text(
        page
        + f"<pre id=out></pre><script>{tail};document.getElementById('out').textContent=JSON.stringify(out)</script>",
        "utf-8",
    )
    command = [
        BROWSER,
        "--no-sandbox",
        "--headless",
        "--disable-gpu",
        f"--window-size={width},900",
        "--virtual-time-budget=2000",
        "--dump-dom",
    ]
    dom = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search('<pre id="out">(.*?)</pre>', dom, re.S)
    assert found is not None, dom[-500:]
    out = json.loads(html.unescape(found[1]))
    assert "error" not in out, out
    return out


TOOLS = """
const $$ = (q) => [...document.querySelectorAll(q)], key = (k) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true}));
const cell = (r, c, t = 0) => $$("#tables table")[t].tBodies[0].rows[r].cells[c + 1];
const choose = (id, text) => { const e = document.getElementById(id); e.selectedIndex = [...e.options].findIndex((o) => o.text === text); e.dispatchEvent(new Event("change")); };
"""


@driven
def test_side_by_side_and_difference(tmp_path):
    trajs = two()
    out = drive(views.html(trajs, "kl"), tmp_path, TOOLS + """
        out.first = $$("#tables table").length;
        choose("lens", "side by side");
        out.tables = $$("#tables table").length; out.names = $$("#tables section > p").map((e) => e.textContent);
        cell(1, 2, 1).click();
        out.pins = $$("td.pin").length; out.facts = $$("#panel .facts").length;
        choose("lens", "tuned − logit");
        out.value = $$("#panel dd.now")[0].textContent; out.legend = document.querySelector("#legend b").textContent;
    """)  # fmt: skip
    assert (out["first"], out["tables"], out["names"]) == (1, 2, ["logit", "tuned"])
    assert (out["pins"], out["facts"]) == (2, 2)
    d = views.difference(trajs, ("tuned", "logit")).stats["kl"][1, 0, 2].item()
    assert float(out["value"].removesuffix(" nats").replace("−", "-")) == pytest.approx(d, abs=2e-3)
    assert out["legend"] == "KL(model ‖ lens): tuned − logit, nats"


@driven
def test_a_token_is_followed_by_a_click_or_by_its_text(tmp_path):
    trajs = two()
    out = drive(views.html(trajs, "kl"), tmp_path, TOOLS + """
        cell(0, 3).click();
        const typed = document.getElementById("word"); typed.value = "Paris"; typed.dispatchEvent(new Event("change"));
        out.chips = $$(".chip").map((e) => e.textContent); out.figures = $$("#panel figure").length;
        out.line = $$("#panel dt").filter((e) => e.textContent === "rank of ·Paris")[0].nextSibling.textContent;
        $$(".chip button")[0].click();
        out.legend = document.querySelector("#legend b").textContent;
        const other = $$("#panel .word").filter((e) => e.textContent !== "·Paris")[0]; out.other = other.textContent; other.click();
        out.two = $$(".chip").length;
        $$(".chip button")[1].click(); out.one = $$(".chip").map((e) => e.textContent);
        out.back = document.querySelector("#legend b").textContent;
    """)  # fmt: skip
    assert out["chips"] == ["·Paris×"] and out["figures"] == 3 and out["legend"] == "rank of ·Paris, 1 = top"
    t = trajs["tuned"]
    if 1 not in t.top_ids[2, 0, 3].tolist():
        said = int(out["line"].removeprefix("≈ ").split(", ")[0].replace(",", "").split(" ")[0])
        assert said == pytest.approx(int(t.tracked.ranks[2, 0, 3, 0]), rel=0.2)
    assert out["two"] == 2 and out["one"] == [out["other"] + "×"] and out["back"].startswith("KL")


@driven
def test_keys_find_and_the_strip_on_a_long_prompt(tmp_path):
    out = drive(views.html(fake(pos=200)), tmp_path, TOOLS + """
        const here = () => document.activeElement.cellIndex - 1;
        cell(0, 0).focus(); key("End"); out.end = here(); key("Home"); out.home = here();
        key("PageDown"); out.page = here(); key("PageUp"); out.back = here();
        out.strip = !document.getElementById("strip").hidden;
        const find = document.getElementById("find"); find.value = "日"; find.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
        out.found = $$("td.pin").map((e) => e.cellIndex - 1);
    """)  # fmt: skip
    assert (out["end"], out["home"], out["back"], out["strip"]) == (199, 0, 0, True)
    assert 3 < out["page"] < 40 and out["found"] == [4]


@driven
def test_the_page_of_a_matrix_works(tmp_path):
    m = views.heat(torch.arange(12.0).view(3, 4), down="layer", across="head", title="drop")
    out = drive(m.html(), tmp_path, TOOLS + """
        cell(0, 1).click(); out.where = document.querySelector("#panel .where").textContent;
        out.value = $$("#panel dd")[0].textContent; out.ticks = $$("#panel figure svg text").map((e) => e.textContent);
    """)  # fmt: skip
    assert out["where"] == "layer 0, head 1" and out["value"] == "1.000" and out["ticks"][-1] == "layer"


@driven
def test_the_page_of_a_patchscope_works(tmp_path):
    result = said(fake(), text="made")
    out = drive(views.patchscope_html(result), tmp_path, TOOLS + """
        out.asked = $$(".sub mark").map((e) => e.textContent); out.rows = $$("tbody th").map((e) => e.textContent);
        cell(0, 1).focus(); key("ArrowDown"); key("Enter");
        out.where = $$("#panel .where").map((e) => e.textContent); out.text = $$("#panel .said")[0].textContent;
        out.mark = $$("#panel mark").map((e) => e.textContent); out.numbers = cell(0, 0).dataset.v;
        document.getElementById("numbers").click(); out.plain = cell(0, 0).dataset.v ?? "none"; out.charts = $$("#panel figure").length;
    """)  # fmt: skip
    assert out["asked"] == ["<3>", "<4>", " x"] and out["rows"] == ["2 → 1", "0 → 1"]
    assert out["where"] == ["l → l*: 0 → 1, source all", "vector of <1><2><3><4>"] and out["mark"] == ["<4>"]
    assert out["text"] == '" Tokyo 10↵and"' and (out["numbers"], out["plain"], out["charts"]) == ("0.80", "none", 1)


@driven
def test_a_sweep_has_a_matrix_for_each_source(tmp_path):
    result = scope(["a", "b"], pairs=[(a, b) for a in range(3) for b in range(4) if b <= a + 1], text="made")
    out = drive(views.patchscope_html(result), tmp_path, TOOLS + """
        out.first = cell(2, 1).textContent; choose("row", "1: b"); out.second = cell(2, 1).textContent;
        cell(2, 3).click(); out.hole = $$("#panel .tok.word").length; cell(2, 1).click();
        out.where = document.querySelector("#panel .where").textContent;
    """)  # fmt: skip
    assert out["first"] == '" Tokyo 01↵and"' and out["second"] == '" Tokyo 11↵and"' and out["hole"] == 0
    assert out["where"] == "source layer l 0, target layer l* 1"


@driven
def test_a_click_shows_what_patchscopes_say_of_the_vector(tmp_path):
    t = fake()
    out = drive(tll.page(t, scopes=[said(t, text="made"), said(t)]).text, tmp_path, TOOLS + """
        out.marked = $$("td.s").length; cell(0, 3).click(); out.facts = $$("#panel .facts").length;
        out.lines = $$("#panel .said").map((e) => e.textContent); out.into = $$("#panel code").map((e) => e.textContent);
        cell(1, 3).click(); out.none = $$("#panel .said").length;
    """)  # fmt: skip
    assert out["marked"] == 4 and out["facts"] == 3 and out["none"] == 0
    assert out["lines"] == ['l* 1 " Tokyo 11↵and" 60.0%', "l* 1 日本 60.0%"] and out["into"] == ["What is x?"] * 2


@driven
def test_zoom_by_keys_and_buttons_and_numbers_beside_colours(tmp_path):
    t = fake(pos=60)
    out = drive(views.html(t, "kl"), tmp_path, TOOLS + """
        const width = () => document.querySelector("#tables table").offsetWidth;
        out.widths = [width()]; cell(0, 3).focus();
        key("+"); out.widths.push(width()); for (let i = 0; i < 9; i++) key("-"); out.widths.push(width());
        out.here = document.activeElement.cellIndex; $$("#zoom button")[1].click(); out.widths.push(width());
        document.getElementById("numbers").click(); out.v = cell(2, 1).dataset.v; out.shade = getComputedStyle(cell(2, 1)).backgroundColor;
    """)  # fmt: skip
    one, more, least, next_ = out["widths"]
    assert more > 1.2 * one and least < 60 * 12 and least < next_ < one and out["here"] == 4
    assert out["v"] == f"{t.stats['kl'][0, 0, 1]:.2f}" and out["shade"] != "rgba(0, 0, 0, 0)"


@driven
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_a_notebook_gives_its_theme_to_the_frame(tmp_path, theme):
    fragment = views.html_fragment(fake()).replace(
        "&lt;/body&gt;",
        "&lt;script&gt;parent.postMessage(matchMedia(&#x27;(prefers-color-scheme: dark)&#x27;).matches, &#x27;*&#x27;)&lt;/script&gt;&lt;/body&gt;",
    )
    page = f"<body data-jp-theme-light={str(theme == 'light').lower()}>{fragment}"
    out = drive(page, tmp_path, """
        addEventListener("message", (e) => { out.dark = e.data; document.getElementById("out").textContent = JSON.stringify(out); });
    """)  # fmt: skip
    assert out["dark"] == (theme == "dark")
