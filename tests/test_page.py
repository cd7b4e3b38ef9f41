"""What the page does: side by side, differences, tokens that are followed, faded positions, matrices; in a browser where there is one."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
import torch
from test_views import fake, parsed

from tl_lenses import views
from tl_lenses.views.grid import base_name, heading
from tl_lenses.views.page import _CODES, _rank_steps
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
    back = torch.tensor([[steps[_CODES.index(c)] for c in line] for line in cells["ranks"]])
    true = t.tracked.ranks[:, 0].flatten(0, 1).T
    assert (back <= true).all() and (true <= back * 1.2 + 1).all()


@pytest.mark.parametrize("worst", [1, 2, 60, 89, 90, 91, 50_257, 262_144])
def test_rank_steps_fit_the_characters_and_are_exact_first(worst):
    steps = _rank_steps(worst)
    assert steps[0] == 1 and steps[-1] == worst and len(steps) <= len(_CODES) and steps == sorted(set(steps))
    assert steps[:9] == list(range(1, 10))[: len(steps)] and (worst > len(_CODES)) == (
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
