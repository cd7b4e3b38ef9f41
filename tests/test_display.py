"""Every public result shows itself the same way: one line, a table, the same in a notebook, a frame, files by suffix, a figure."""

import dataclasses
import io
import re
import xml.etree.ElementTree
from importlib.util import find_spec

import pytest
import rich.console
import torch
import zoo
from test_exp_which_lens import ITEMS

import tl_lenses as tll

TOKENS = zoo.tokens(2, 10)


def model():
    return zoo.build("gpt2", zoo.KINDS[0])


def translators():
    return tll.fit_regression(model(), zoo.tokens(16, 20), held_out=0.25)


def trajectories():
    return tll.trajectory(m := model(), {"a": tll.Lens(m), "b": tll.Lens(m)}, TOKENS)


# What makes a result, the files that it writes (None: a folder of its own), and whether it has a figure.
MAKERS = {
    "Trajectory": (lambda: tll.trajectory(m := model(), tll.Lens(m), TOKENS), "csv json html svg png", True),
    "Trajectories": (trajectories, "csv json html svg png", True),
    "Matrix": (lambda: tll.views.heat(torch.arange(12.0).view(3, 4), good="low"), "csv html svg png", True),
    "Scores": (lambda: tll.evaluate(m := model(), {"a": tll.Lens(m)}, TOKENS), "csv json html svg png", True),
    "PatchscopeResult": (
        lambda: tll.patchscope(model(), "the cat", tll.Target("the cat x", tll.at("x")), layers=[0, 1], target_layers=[0, 1]),
        "csv json html svg png", True,
    ),
    "Faithfulness": (
        lambda: tll.faithfulness(tll.patchscope(model(), ["the cat", "a dog"], tll.Target("the cat x", tll.at("x")), layers=[0, 1])),
        None, True,
    ),
    "Intermediates": (lambda: tll.experiments.intermediates(m := model(), {"a": tll.Lens(m)}, ITEMS, said=0, show_progress=False), None, True),
    "Comparison": (lambda: tll.compare(m := model(), {"a": tll.Lens(m)}, TOKENS, items=ITEMS, said=0, show_progress=False), None, True),
    "Calibration": (lambda: tll.calibration([1, 0, 1, 1], [1.0, 0.6, 0.3, 0.9]), None, True),
    "Shares": (lambda: tll.components(m := model(), tll.Lens(m), TOKENS[:1]), "csv json html svg png", True),
    "CheckReport": (lambda: tll.check(model()), "csv json html", False),
    "Translators": (translators, None, False),
}  # fmt: skip
MATPLOTLIB = find_spec("matplotlib") is not None and find_spec("plotly") is not None


@pytest.fixture(scope="module", params=MAKERS)
def case(request):
    make, kinds, figure = MAKERS[request.param]
    return request.param, make(), kinds, figure


def test_the_repr_is_one_line(case):
    name, result, _, _ = case
    assert repr(result).startswith(f"{name}(") and "\n" not in repr(result) and len(repr(result)) < 250
    assert "tensor(" not in repr(result)


def test_the_text_of_a_result_is_a_table(case):
    assert len(str(case[1]).splitlines()) > 2


def test_a_notebook_shows_a_result(case):
    page = case[1]._repr_html_()
    assert "<table" in page or "<iframe" in page or "<div" in page


def test_the_frame_has_a_row_per_number(case):
    _, result, _, _ = case
    assert len(result.to_frame()) > 1 and len(result.to_frame().columns) > 2


def test_it_saves_what_the_suffix_says(case, tmp_path):
    _, result, kinds, _ = case
    if kinds is None:
        result.save(tmp_path / "folder")
        assert (tmp_path / "folder").is_dir()
        return
    for kind in kinds.split():
        if kind == "png" and not MATPLOTLIB:
            continue
        path = tmp_path / "new" / f"x.{kind}"
        assert result.save(path) == path and path.stat().st_size > 50
    with pytest.raises(ValueError, match=r"cannot tell how to save .*: use one of \."):
        result.save(tmp_path / "x.pdf")


@pytest.mark.skipif(not MATPLOTLIB, reason="needs the extra plot")
def test_there_is_a_figure_where_there_is_a_picture(case):
    _, result, _, figure = case
    assert hasattr(result, "figure") == figure
    if figure:
        assert re.match("plotly|matplotlib", type(result.figure()).__module__)


def test_the_table_of_translators_has_their_norms():
    maps = translators()
    frame = maps.to_frame()
    assert list(frame.columns) == ["source", "target", "delta", "bias", "r_squared"]
    assert frame["bias"][1] == pytest.approx(float(maps.biases[1].norm()), rel=1e-5)
    assert frame["delta"][1] == pytest.approx(float((maps.weights[1] - torch.eye(32)).norm()), rel=1e-4)


def test_the_text_of_translators_has_their_r_squared():
    assert "R^2" in str(translators()) and "held-out tokens" in str(translators())


def test_a_statistic_that_is_asked_for_like_a_lens_is_refused():
    with pytest.raises(TypeError, match=r"a statistic is an attribute: traj\.kl"):
        MAKERS["Trajectory"][0]()["kl"]


def test_lines_of_lenses_are_means_over_tokens():
    both = trajectories()
    lines = tll.views.means_lines(both, "kl")
    assert [y for _, y in lines.series["a"]] == pytest.approx(both["a"].kl.nanmean((1, 2)).tolist(), abs=1e-6)
    assert tll.views.means_lines(both, "rank").log_y


def test_names_with_control_characters_and_half_characters_print_and_save(tmp_path):
    """Names of models, lenses and rows: in terminals, notebooks and every file, escape codes are text and nothing crashes."""
    evil = "a\x1b[31m\x07\r\ud800b $x^$ <i>&"
    control = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
    model = zoo.build("gpt2", zoo.FEW_KINDS[0])
    before, model.cfg.model_name = model.cfg.model_name, evil
    try:
        lens, tokens = tll.Lens(model), zoo.tokens(4, 12)
        trajectory = tll.trajectory(model, {evil: lens, "b": lens}, "the cat sat")
        scores = tll.evaluate(model, {evil: lens, "b": lens}, tokens)
        assert trajectory[evil].name == "a<0x1B>[31m<0x07><0x0D><U+D800>b $x^$ <i>&" and scores.value(evil, 0) > 0
        assert trajectory.divergence(evil, "b").nansum() == 0
        results = {
            "all": trajectory,
            "one": dataclasses.replace(trajectory["b"], layers=(evil, *trajectory["b"].layers[1:])),
            "scores": scores,
            "check": tll.check(model),
            "scope": tll.patchscope(model, [tll.Source("the cat\x1b[31m\r"), tll.Source("dog")], max_new_tokens=2),
            "report": tll.experiments.quality(model, {evil: lens}, tokens, layers=[1]),
        }
        maps = str(tll.fit_regression(model, tokens))
    finally:
        model.cfg.model_name = before
    shown = {"maps": maps.encode()}
    for name, result in results.items():
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
        rich.console.Console(file=terminal, width=200).print(result)
        terminal.flush()
        shown |= {f"{name} str": str(result).encode(), f"{name} rich": terminal.buffer.getvalue()}
        shown[f"{name} notebook"] = result._repr_html_().encode()
        for suffix in ("csv", "json", "html", "svg", "png", "md"):
            try:
                path = result.save(tmp_path / f"{name}.{suffix}")
            except ValueError as error:
                assert "one of" in str(error) or "shows one lens" in str(error)
                continue
            if path.is_dir():
                shown |= {f"{name} {suffix} {file.name}": file.read_bytes() for file in path.iterdir()}
            else:
                shown[f"{name}.{suffix}"] = path.read_bytes()
    results["report"].save(tmp_path / "folder")
    shown |= {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()}
    assert len(shown) > 35
    for name, content in shown.items():
        if not content.startswith(b"\x89PNG"):
            assert not control.search(content.decode()), name
        if name.endswith("svg"):
            xml.etree.ElementTree.fromstring(content.decode())
