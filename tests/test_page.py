"""What the page does: side by side, differences, tokens that are followed, faded positions, matrices. `test_page_browser` drives it."""

import json
import math
import re
import struct
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
import torch
from test_views import data_of, fake, parsed
from test_views_scope import fake as scope

import tl_lenses as tll
from tl_lenses import views
from tl_lenses.views.document import CODES, rank_steps
from tl_lenses.views.grid import base_name, heading
from tl_lenses.views.style import DIVERGING


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
def test_rank_steps_fit_the_characters_and_are_exact_first(worst):
    steps = rank_steps(worst)
    assert steps[0] == 1 and steps[-1] == worst and len(steps) <= len(CODES) and steps == sorted(set(steps))
    assert steps[:9] == list(range(1, 10))[: len(steps)] and (worst > len(CODES)) == (steps != list(range(1, worst + 1)))


def test_left_out_positions_are_faded_and_leave_the_scale():
    trajs = two()
    for t in trajs.values():
        t.stats["kl"] = t.stats["kl"].clamp(0, 5)
        t.stats["kl"][:, :, 0] = 1000.0
    page = views.html(trajs, "kl")
    data = data_of(page)
    assert data["rows"][0]["faded"] == [0] and data["stats"]["kl"]["high"] <= 5 and "position 0, which the fit left out" in page
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
    assert [lower.color(v) for v in (-9.0, 9.0)] == [DIVERGING[-1], DIVERGING[0]] and lower.stat.bright == "tuned better"
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


SVG = "{http://www.w3.org/2000/svg}"


def test_several_lenses_are_small_multiples_on_one_scale():
    root = ET.fromstring(views.svg(two(pos=30), "kl"))
    texts = ["".join(e.itertext()) for e in root.iter(f"{SVG}text")]
    assert texts.count("toy, logit lens") == texts.count("toy, tuned lens") == texts.count("KL(model ‖ lens), nats") == 1


def test_long_prompts_wrap():
    t = two(pos=30)["logit"]
    one, wrapped = (ET.fromstring(views.svg(t, "kl", width=w)) for w in (None, 700))
    size = lambda e: (int(e.get("width")), int(e.get("height")))
    assert size(one)[0] > 1400 and size(wrapped)[0] <= 700 and size(wrapped)[1] > 2 * size(one)[1] - 100
    assert len(list(one.iter(f"{SVG}title"))) == len(list(wrapped.iter(f"{SVG}title")))


def slide(trajs):
    return views.slide(trajs, "kl", answer=" Paris", tokens=3)


def test_a_slide_has_lenses_side_by_side():
    root = ET.fromstring(slide(two(n_layers=30, pos=9)).svg())
    texts = ["".join(e.itertext()) for e in root.iter(f"{SVG}text")]
    assert (root.get("width"), root.get("height")) == ("1920", "1080")
    assert texts.count("logit lens") == texts.count("tuned lens") == texts.count("KL(model ‖ lens), nats") == 1


def test_a_slide_has_the_answer_beside_the_layers():
    trajs = two(n_layers=30, pos=9)
    for heat, t in zip(slide(trajs).heats, trajs.values(), strict=True):
        assert len(heat.columns) == 3 and [int(row) for row in heat.rows] == list(range(30, -1, -3))
        assert heat.bars == pytest.approx(t.tracked.probs[:, 0, -1, 0].flip(0)[::3].tolist())
        assert heat.beside[0].endswith(f"#{int(t.tracked.ranks[-1, 0, -1, 0]):,}")


def test_an_answer_that_was_not_tracked_is_refused():
    with pytest.raises(ValueError, match=r"the answer ' Rome' was not tracked, only \[' Paris', ' is'\]: pass track=\[' Rome'\]"):
        views.slide(two(), answer=" Rome")


def test_a_slide_is_saved_by_its_answer(tmp_path):
    assert 'width="1920"' in views.save(two(), tmp_path / "x.svg", answer=" Paris").read_text("utf-8")
    with pytest.raises(ValueError, match="no difference"):
        views.save(two(), tmp_path / "x.svg", answer=" Paris", diff=("tuned", "logit"))


def test_the_picture_of_a_slide_is_16_to_9():
    pytest.importorskip("matplotlib")
    png = views.slide(two(), answer=" Paris").png()
    assert struct.unpack(">II", png[16:24]) == (1920, 1080)


# --- matrices


MATRIX = views.heat([[0.0, 1.5], [math.nan, -2.0]], rows=["a", "b"], title="drop", unit="nats", down="layer", across="head")


def test_a_matrix_is_text():
    assert repr(MATRIX) == "Matrix('drop', 2 x 2)" and "1.50" in str(MATRIX) and "–" in str(MATRIX)


def test_a_matrix_is_a_page():
    page = MATRIX.html()
    assert [row[1:] for row in parsed(page).rows] == [["0", "1"], ["0.00", "1.50"], ["", "−2.00"]]
    data = data_of(page)
    assert data["lenses"][0]["rows"][0]["stats"]["value"] == [None, -2, 0, 1.5] and data["layers"] == ["b", "a"]
    assert not re.search(r"https?://(?!www.w3.org)|@import", page)


def test_a_matrix_is_a_picture():
    assert "drop, nats" in MATRIX.svg()


def test_a_matrix_is_a_frame():
    assert MATRIX.to_frame()["value"].tolist()[1] == 1.5


def test_bright_is_good():
    high, low = (views.heat([[0.0, 1.0]], good=good).picture.scale for good in ("high", "low"))
    assert [high.position(v) for v in (0.0, 1.0)] == [low.position(v) for v in (1.0, 0.0)] == [0.0, 1.0]
    assert views.heat([[-3.0, 1.0]], good=None).picture.scale.position(0.0) == 0.5
    # nearly all at 0: the one that is not is in the scale
    rare = views.heat([[0.0] * 20, [0.01] * 19 + [1.0]]).picture.scale
    assert (rare.low, rare.high, rare.clipped) == (0.0, 1.0, (False, False))


@pytest.mark.parametrize(
    ("values", "match"), [([], "a matrix"), ([[]], "a matrix"), ([[1.0], [1.0, 2.0]], "a matrix"), (torch.zeros(2, 2, 2), "values")]
)
def test_no_matrix_is_refused(values, match):
    with pytest.raises((TypeError, ValueError), match=match):
        views.heat(values)


# --- patchscopes of a trajectory's vectors


def said(traj, **how):
    """A result of patchscopes of the last two tokens of a fake trajectory's prompt, at layers 0 and 2."""
    made, ids = (scope(["all but one", "all"], pairs=[(0, 1), (2, 1)], model=traj.model_name, **how), traj.tokens[0].tolist())
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


def test_a_page_of_real_results(model, tmp_path):
    prompt = "the cat sat on the mat"
    result = tll.patchscope(model, [tll.Source(prompt, 2), tll.Source(prompt, "mat")], tll.Target("the sat is cat", 3), [0, 2])
    (taken, _), (put,) = result.source_prompts, result.target_prompts
    assert taken.at == (2,) and taken.ids == model.to_tokens(prompt)[0].tolist() and put.at == (3,) and len(put.texts) > 3
    found = tll.faithfulness(result, draws=2)
    linked = tll.page(tll.trajectory(model, tll.Lens(model), prompt), scopes=[found])
    cells = data_of(linked.text)["readings"][0]["cells"][0]
    assert sorted(cells) == ["0,2", f"0,{len(taken.ids) - 1}", "2,2", f"2,{len(taken.ids) - 1}"]
    assert "specificity" in cells["0,2"][0][4] and "rank of its own vector" in cells["0,2"][0][4]
    stats = data_of(tll.page(found).text)["lenses"][0]["rows"][0]["stats"]
    assert stats["specificity"][0] == pytest.approx(float(found.of_texts()["specificity"][0, 0]), rel=1e-3)
    assert linked.save(tmp_path / "x.html").read_text("utf-8") == linked.text and "<iframe" in linked._repr_html_()


# --- names, and few colours


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("C:\\models\\my-model", "my-model"),
        ("runs/of-today/7/", "7"),
        ("gpt2", "gpt2"),
    ],
)
def test_a_model_is_called_by_its_base_name(name, base):
    assert base_name(name) == base


def test_a_lens_without_a_name_is_called_by_its_kind():
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
    from rich.style import Style

    Style._add.cache_clear()  # rich keeps a sum of styles with the codes of the first terminal that it was printed on
    t, out = fake(stats=("kl",)), StringIO()
    t.stats["kl"] = t.stats["kl"] ** 0.7  # colours that no other test has: rich keeps how it wrote one first
    Console(file=out, width=90, color_system=system, force_terminal=True, legacy_windows=False).print(
        views.terminal(t, numbers=numbers)
    )
    assert ("\x1b[38;5" in out.getvalue()) == colored
    assert (f"{t.stats['kl'][0, 0, 0]:.2f}" in out.getvalue()) == written
