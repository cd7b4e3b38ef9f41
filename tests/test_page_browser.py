"""The pages in Chromium, driven by Playwright: clicks and keys as a reader's, in light and dark, from narrow to wide."""

import os
import re
import shutil

import pytest
import torch
from test_page import said, two
from test_views import fake
from test_views_scope import fake as scope

import tl_lenses as tll
from tl_lenses import views

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which the extra `dev` brings")
BROWSER = os.environ.get("TL_LENSES_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chrome-headless-shell", "chromium", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium-headless-shell")


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens the text of a page in a window of its own. What it throws, and what it asks for, fails the test at its end."""
    windows, faults = [], []

    def open_page(text, width=1000, theme="light"):
        file = tmp_path / f"{len(windows)}.html"
        file.write_text(text, "utf-8")
        window = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme or "null", offline=True)
        windows.append(window)
        page = window.new_page()
        own = (file.as_uri(), "about:srcdoc")
        page.on("request", lambda request: request.url in own or faults.append(f"asks for {request.url}"))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.goto(file.as_uri())
        return page

    yield open_page
    for window in windows:
        window.close()
    assert not faults


def cell(page, row, column, table=0):
    """Row 0 is the top one."""
    return page.locator("#tables table").nth(table).locator("tbody tr").nth(row).locator("td").nth(column)


def value(page, row, column):
    """The statistic of a cell, as its panel has it."""
    cell(page, row, column).click()
    return float(page.locator("#panel dd.now").first.inner_text().removesuffix(" nats").replace("−", "-"))


here = "document.activeElement.cellIndex - 1"  # the column that has the focus


# --- trajectories


def test_side_by_side_and_difference(opened):
    trajs = two()
    page = opened(views.html(trajs, "kl"))
    assert page.locator("#tables table").count() == 1
    page.select_option("#lens", label="side by side")
    assert page.locator("#tables section > p").all_inner_texts() == ["logit", "tuned"]
    cell(page, 1, 2, 1).click()
    assert page.locator("td.pin").count() == page.locator("#panel .facts").count() == 2
    page.keyboard.press("Escape")
    page.select_option("#lens", label="tuned − logit")
    d = views.difference(trajs, ("tuned", "logit")).stats["kl"][1, 0, 2].item()
    assert value(page, 1, 2) == pytest.approx(d, abs=2e-3)
    assert page.locator("#legend b").inner_text() == "KL(model ‖ lens): tuned − logit, nats"


def test_a_difference_has_zero_in_the_middle_of_its_colours(opened):
    trajs = two()
    page = opened(views.html(trajs, "kl", diff=("tuned", "logit")))
    ticks = [t.strip("≤≥ ").replace("−", "-") for t in page.locator("#legend p span").all_inner_texts()]
    assert float(ticks[1]) == 0 and float(ticks[0]) == -float(ticks[2])


def test_a_token_is_followed_by_a_click_or_by_its_text(opened):
    trajs = two()
    page = opened(views.html(trajs, "kl"))
    cell(page, 0, 3).click()
    page.fill("#word", "Paris")
    page.press("#word", "Enter")
    chips, legend = page.locator(".chip"), page.locator("#legend b")
    assert chips.all_inner_texts() == ["·Paris×"] and page.locator("#panel figure").count() == 3
    line = page.locator("#panel dt", has_text="rank of ·Paris").locator("+ dd").inner_text()
    chips.first.locator("button").first.click()
    assert legend.inner_text() == "rank of ·Paris, 1 = top"
    other = page.locator("#panel .word", has_not_text="·Paris").first
    name = other.inner_text()
    other.click()
    assert chips.count() == 2
    chips.first.locator("button").nth(1).click()
    assert chips.all_inner_texts() == [f"{name}×"] and legend.inner_text().startswith("KL")
    t = trajs["tuned"]
    if 1 not in t.top_ids[2, 0, 3].tolist():
        shown = int(line.removeprefix("≈ ").split(", ")[0].replace(",", "").split(" ")[0])
        assert shown == pytest.approx(int(t.tracked.ranks[2, 0, 3, 0]), rel=0.2)


def test_a_token_that_was_not_tracked_cannot_be_followed(opened):
    page = opened(views.html(two(), "kl"))
    page.fill("#word", "Rome")
    page.press("#word", "Enter")
    assert page.locator(".chip").count() == 0
    assert "track=[...]" in page.evaluate("document.getElementById('word').validationMessage")


def test_keys_find_and_the_strip_on_a_long_prompt(opened):
    page = opened(views.html(fake(pos=200)))
    cell(page, 0, 0).focus()
    at = []
    for key in ("End", "Home", "PageDown", "PageUp"):
        page.keyboard.press(key)
        at.append(page.evaluate(here))
    assert at[:2] == [199, 0] and 3 < at[2] < 40 and at[3] == 0
    strip, box = page.locator("#strip"), page.locator(".scroll").first
    assert strip.is_visible()
    strip.click(position={"x": strip.bounding_box()["width"] - 2, "y": 10})
    assert box.evaluate("e => e.scrollLeft + e.clientWidth - e.scrollWidth") == pytest.approx(0, abs=2)
    page.fill("#find", "日")
    page.press("#find", "Enter")
    assert page.locator("td.pin").evaluate_all("all => all.map(e => e.cellIndex - 1)") == [4]


def test_arrows_move_enter_pins_and_escape_lets_go(opened):
    page = opened(views.html(fake(), "kl"))
    cell(page, 2, 0).focus()
    for key in ("ArrowUp", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.locator("td.pin").count() == 1 and cell(page, 1, 1).get_attribute("class").endswith("pin")
    assert page.locator("#panel .where").first.inner_text().startswith("layer 1, position 1:")
    page.keyboard.press("Escape")
    assert page.locator("td.pin").count() == 0 and "Click a token" in page.locator("#panel").inner_text()


def test_zoom_by_keys_and_buttons_and_numbers_beside_colours(opened):
    t = fake(pos=60)
    page = opened(views.html(t, "kl"))
    widths = []
    measure = lambda: widths.append(page.locator("#tables table").evaluate("e => e.offsetWidth"))
    measure()
    cell(page, 0, 3).focus()
    page.keyboard.press("+")
    measure()
    for _ in range(9):
        page.keyboard.press("-")
    measure()
    assert page.evaluate(here) == 3
    page.click("#zoom button >> nth=1")
    measure()
    page.check("#numbers")
    one, more, least, after = widths
    assert more > 1.2 * one and least < 60 * 12 and least < after < one
    assert cell(page, 2, 1).get_attribute("data-v") == f"{t.stats['kl'][0, 0, 1]:.2f}"
    assert cell(page, 2, 1).evaluate("e => getComputedStyle(e).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_the_question_mark_explains(opened):
    page = opened(views.html(fake(), "kl"))
    answer = page.locator("details p")
    assert not answer.is_visible()
    page.click("summary")
    said_there = answer.inner_text()
    assert answer.is_visible() and len(re.findall(r"[.:] [A-Z]|\.$", said_there)) >= 4
    assert all(word in said_there for word in ("A row is a layer", "target", "Nats", "layer 0"))


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("width", [400, 700, 1000, 1400])
def test_everything_is_within_the_window(opened, width, theme):
    page = opened(views.html(two(pos=30), "kl"), width, theme)
    cell(page, 0, 2).hover()
    card = page.locator("#card").bounding_box()
    assert card["x"] >= 0 and card["x"] + card["width"] <= width and card["y"] + card["height"] <= 900
    cell(page, 0, 2).click()
    page.select_option("#lens", label="side by side")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in ("#panel .facts", "#panel figure", "#legend", ".bar"):
        box = page.locator(part).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, part
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shade))) < 200) == (theme == "dark")


def test_the_panel_comes_to_the_pinned_cell(opened):
    page = opened(views.html(fake(n_layers=40), "kl"), 1400)
    cell(page, 0, 1).click()
    map_, panel = page.locator(".scroll").bounding_box(), page.locator("#panel .facts").bounding_box()
    assert panel["x"] >= map_["x"] + map_["width"] and panel["y"] < 900  # beside the map, in sight
    for width, row in ((400, 0), (400, 40), (1000, 20)):
        page = opened(views.html(fake(n_layers=40, pos=20), "kl"), width)
        cell(page, row, 1).click()
        page.wait_for_timeout(800)  # it glides there
        there, panel = cell(page, row, 1).bounding_box(), page.locator("#panel").bounding_box()
        assert 0 <= there["y"] and there["y"] + there["height"] <= panel["y"]  # the panel covers no pinned cell
        assert panel["y"] < 700 and panel["y"] + panel["height"] <= 901
        page.keyboard.press("Escape")
        assert page.locator("#panel.sheet").count() == 0


# --- matrices and patchscopes


def test_the_page_of_a_matrix_works(opened):
    m = views.heat(torch.arange(12.0).view(3, 4), down="layer", across="head", title="drop")
    page = opened(m.html())
    cell(page, 0, 1).click()
    assert page.locator("#panel .where").inner_text() == "layer 0, head 1"
    assert page.locator("#panel dd").first.inner_text() == "1.000"
    assert page.locator("#panel figure svg text").all_text_contents()[-1] == "layer"


def test_the_page_of_a_patchscope_works(opened):
    page = opened(views.patchscope_html(said(fake(), text="made")))
    assert page.locator(".sub mark").all_inner_texts() == ["<3>", "<4>", " x"]
    assert page.locator("tbody th").all_inner_texts() == ["2 → 1", "0 → 1"]
    cell(page, 0, 1).focus()
    for key in ("ArrowDown", "Enter"):
        page.keyboard.press(key)
    panel = page.locator("#panel")
    assert panel.locator(".where").all_inner_texts() == ["l → l*: 0 → 1, source all", "vector of <1><2><3><4>"]
    assert panel.locator(".said").first.inner_text() == '" Tokyo 10↵and"'
    assert panel.locator("mark").all_inner_texts() == ["<4>"] and panel.locator("figure").count() == 1
    assert cell(page, 0, 0).get_attribute("data-v") == "0.80"
    page.uncheck("#numbers")
    assert cell(page, 0, 0).get_attribute("data-v") is None


def test_a_sweep_has_a_matrix_for_each_source(opened):
    result = scope(["a", "b"], pairs=[(a, b) for a in range(3) for b in range(4) if b <= a + 1], text="made")
    page = opened(views.patchscope_html(result))
    assert cell(page, 2, 1).inner_text() == '" Tokyo 01↵and"'
    page.select_option("#row", label="1: b")
    assert cell(page, 2, 1).inner_text() == '" Tokyo 11↵and"'
    cell(page, 2, 3).click()
    assert page.locator("#panel .tok.word").count() == 0  # no such pair
    cell(page, 2, 1).click()
    assert page.locator("#panel .where").first.inner_text() == "source layer l 0, target layer l* 1"


def test_a_click_shows_what_patchscopes_say_of_the_vector(opened):
    t = fake()
    page = opened(tll.page(t, scopes=[said(t, text="made"), said(t)]).text)
    assert page.locator("td.s").count() == 4
    cell(page, 0, 3).click()
    panel = page.locator("#panel")
    assert panel.locator(".facts").count() == 3
    assert panel.locator(".said").all_inner_texts() == ['l* 1 " Tokyo 11↵and" 60.0%', "l* 1 日本 60.0%"]
    assert panel.locator("code").all_inner_texts() == ["What is x?"] * 2
    cell(page, 1, 3).click()
    assert panel.locator(".said").count() == 0


# --- notebooks


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_a_notebook_gives_its_theme_to_the_frame(opened, theme):
    notebook = f"<body data-jp-theme-light={str(theme == 'light').lower()}>{views.html_fragment(fake())}"
    page = opened(notebook, theme=None)  # a scheme of the browser's own would be that of the frame too
    frame = page.frames[1]
    assert frame.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (theme == "dark")
    cell(frame, 0, 1).click()
    assert frame.locator("#panel .facts").count() == 1
