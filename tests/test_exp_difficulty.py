"""Prediction depth and iteration learned where they are known: a linear model with exact maps, and checkpoints made for the purpose."""

from types import SimpleNamespace

import pytest
import torch
import zoo

import tl_lenses as tll
import tl_lenses.experiments.tuned_lens.difficulty as module
from tl_lenses.experiments import difficulty
from tl_lenses.experiments.choices import Question, scored
from tl_lenses.experiments.tuned_lens.difficulty import ENTROPY, TOKENS, Difficulty, Settled, settled


def exact_from(linear, layer):
    """A lens that is exact from a layer on, and before it says the same of every state."""
    maps, d = zoo.truth(linear), linear.cfg.d_model
    constant = (torch.zeros(d, d), torch.randn(d, generator=torch.Generator().manual_seed(3)))
    pairs = [maps[row] if row >= layer else constant for row in range(linear.cfg.n_layers)]
    rows = [(f"blocks.{i}.hook_resid_pre", f"blocks.{linear.cfg.n_layers - 1}.hook_resid_post") for i in range(len(pairs))]
    weights, biases = (torch.stack([pair[i].float() for pair in pairs]) for i in (0, 1))
    return tll.Lens(linear, tll.Translators(rows, weights, biases, n_layers=linear.cfg.n_layers))


def test_settled_is_the_start_of_the_last_run():
    top = torch.tensor([[1, 1, 5, 7], [2, 1, 5, 7], [1, 3, 5, 8], [1, 1, 5, 9]])
    assert settled(top).tolist() == [2, 3, 0, 3]


def test_the_depth_of_a_linear_model_is_known(monkeypatch):
    linear = zoo.affine_model()
    ids = torch.arange(4, 84)[:, None]
    lenses = {"from 0": exact_from(linear, 0), "from 2": exact_from(linear, 2)}
    run = lambda: difficulty(
        linear, lenses, ids, [(0, linear), (1, linear), (2, linear)], skip_first=False, n=80, show_progress=False
    )
    items = run().sets[TOKENS]
    constant = lenses["from 2"][0](torch.zeros(1, 16)).argmax(-1)
    other = tll.run(linear, ids)[:, -1].argmax(-1) != constant
    assert other.sum() > 70 and (items.depth["from 0"] == 0).all() and (items.learned == 0).all()
    assert (items.depth["from 2"][other] == 2).all()
    # broken: the end of the first run rather than the start of the last
    monkeypatch.setattr(module, "settled", lambda top: (top == top[0]).long().cumprod(0).sum(0) - 1)
    assert not (run().sets[TOKENS].depth["from 2"][other] == 2).all()


def test_iteration_learned_against_the_checkpoints_themselves(model):
    """Three models: what the first two say is compared by hand, and one that is loaded here is loaded once."""
    first, tokens, loaded = zoo.build("neox", zoo.FEW_KINDS[0]), zoo.tokens(6, 12), []
    asked = [Question("the cat", (" dog", " king"), 0, "one", i) for i in range(3)] + [
        Question("a bird sang", (" in", " to"), 1, "two", i) for i in range(3)
    ]
    load = lambda: loaded.append(1) or first
    report = difficulty(
        model, {"logit": tll.Lens(model)}, tokens, [(0, load), (8, model), (16, first), (32, model)], questions=asked, n=30
    )  # fmt: skip
    assert loaded == [1] and list(report.sets) == [TOKENS, "one", "two"]
    learned = report.sets[TOKENS].learned
    agree = tll.run(model, tokens)[:, 1:].argmax(-1) == tll.run(first, tokens)[:, 1:].argmax(-1)
    assert len(learned) == 30 and set(learned.tolist()) <= {0, 32}
    assert abs(float((learned == 0).float().mean()) - float(agree.float().mean())) < 0.2
    for task, questions in (("one", asked[:3]), ("two", asked[3:])):
        by_hand, its = (
            scored(m, {"x": tll.Lens(m)}, questions).logprobs["x"].argmax(-1) for m in (model, first)
        )  # [question, layer]
        assert report.sets[task].learned.tolist() == [0 if a == b else 32 for a, b in zip(by_hand[:, -1], its[:, -1], strict=True)]
        assert report.sets[task].depth["logit"].tolist() == settled(by_hand.T).tolist()


def test_depths_are_those_of_the_trajectory(model):
    tokens = zoo.tokens(3, 10)
    report = difficulty(model, {"logit": tll.Lens(model)}, tokens, [(i, model) for i in range(3)], n=1000)
    top = tll.trajectory(model, tll.Lens(model), tokens).top_ids[..., 0][:, :, 1:].flatten(1)
    assert report.sets[TOKENS].depth["logit"].tolist() == settled(top).tolist()
    entropy = tll.trajectory(model, tll.Lens(model), tokens).entropy[-1, :, 1:].flatten()
    assert torch.allclose(report.sets[TOKENS].entropy.float(), entropy, atol=1e-4)


def test_correlations_of_planted_depths(tmp_path):
    generator = torch.Generator().manual_seed(0)
    learned = torch.tensor([0, 8, 64])[torch.randint(3, (200,), generator=generator)]
    noise = torch.randint(9, (200,), generator=generator)
    same = torch.searchsorted(torch.tensor([0, 8, 64]), learned)
    items = Settled({"a": noise, "b": same}, learned, noise.double())
    report = Difficulty.of("m", [0, 8, 64], {TOKENS: items}, {})
    assert report.correlation(TOKENS, "b") == pytest.approx((1.0, 1.0, 1.0))
    assert abs(report.correlation(TOKENS, "a")[0]) < 0.2 and report.correlation(TOKENS, ENTROPY) == report.correlation(TOKENS, "a")
    mean, low, high = report.difference(TOKENS, "b", "a")
    assert low < mean < high and low > 0.5
    text = report.markdown()
    assert "b - a" in text and "1.00 (1.00, 1.00)" in text and "mean depth by step learned" in text
    folder = report.save(tmp_path / "a")
    assert (folder / "depth.svg").exists() and len(report.to_frame()) == 200


def test_bad_input_is_refused_before_a_pass(model, monkeypatch):
    lenses, tokens, good = {"logit": tll.Lens(model)}, zoo.tokens(4, 10), [(i, model) for i in range(3)]
    small, far = (SimpleNamespace(hook_dict={}, cfg=SimpleNamespace(d_vocab=7)), tll.Lens(zoo.build("gpt2", zoo.FEW_KINDS[1])))
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    for kwargs, message in (
        ({"checkpoints": [(0, small), *good[1:]]}, r"checkpoint 0 has another vocabulary \(7 tokens, the finished model 320\)"),
        ({"checkpoints": good[:2]}, "2 checkpoints are too few"),
        ({"checkpoints": [good[1], good[0], good[2]]}, "must increase"),
        ({"checkpoints": [*good[:2], (5, lambda: model)]}, "must be the finished model itself"),
        ({"lenses": {"far": far}}, "lens 'far' was made for another model object"),
        ({"layers": [4]}, r"no layer 4: this model has layers 0\.\.3"),
        ({"tokens": zoo.tokens(1, 4)}, "gives 3 positions, too few"),
    ):
        with pytest.raises(ValueError, match=message):
            difficulty(model, **{"lenses": lenses, "tokens": tokens, "checkpoints": good, **kwargs})
    with pytest.raises(TypeError, match="expected a model or a function"):
        difficulty(model, lenses, tokens, [(0, "name"), *good[1:]])


def test_a_loaded_checkpoint_of_another_vocabulary_is_refused(model):
    small = SimpleNamespace(hook_dict={}, cfg=SimpleNamespace(d_vocab=7))
    with pytest.raises(ValueError, match="checkpoint 0 has another vocabulary"):
        difficulty(model, {"logit": tll.Lens(model)}, zoo.tokens(4, 10), [(0, lambda: small), (1, model), (2, model)])


def test_the_command_needs_checkpoints(model, monkeypatch):
    from tl_lenses.cli import experiment
    from tl_lenses.cli.lens_experiments import difficulty as command

    maps = tll.fit_regression(model, zoo.tokens(20, 12))
    run = experiment.Run(model, n=40, is_lab=False, lenses={"maps": maps})
    with pytest.raises(ValueError, match="name them with --checkpoint STEP=MODEL"):
        command(run)
    monkeypatch.setattr(experiment, "load_model", lambda name, device, dtype: zoo.build(name, zoo.FEW_KINDS[0]))
    report = command(run, checkpoint=["1=neox", "2=gpt2"])
    assert report.steps == [1, 2, 3] and len(report.sets) > 1 and report.lenses == ["logit", "maps"]
    assert report.settings["questions"] == "bundled facts"
