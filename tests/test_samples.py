"""Samples of a patchscope: drawn from the exact distribution, independent of the batch; and what they agree on."""

import math

import pytest
import torch
import zoo

import tl_lenses as tll

TARGET = tll.Target("the cat -> the cat sat ; mat ->", pos="mat")
DRAW = {"do_sample": True, "max_new_tokens": 3, "layers": [0, 2]}


@pytest.fixture(params=zoo.FEW_KINDS)
def model(request):
    return zoo.build("gpt2", request.param)


def test_first_tokens_are_drawn_from_the_exact_distribution(model):
    n, temperature = 4000, 0.5
    result = tll.patchscope(
        model, "the cat", TARGET, layers=[1], n_samples=n, do_sample=True, max_new_tokens=1, temperature=temperature
    )
    p = (result.logits[0, 0].double() / temperature).softmax(-1)
    counts = torch.bincount(result.drawn.tokens[0, 0, :, 0], minlength=len(p)).double()
    often = p * n >= 5
    observed, expected = [torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, n * p)]
    freedom = len(expected) - 1
    chi = float(((observed - expected) ** 2 / expected).sum())
    assert freedom > 5 and abs(chi - freedom) < 4 * math.sqrt(2 * freedom), (chi, freedom)
    wrong = n * (result.logits[0, 0].double() / 0.6).softmax(-1)  # another temperature is told apart
    wrong = torch.cat([wrong[often], wrong[~often].sum()[None]])
    assert float(((observed - wrong) ** 2 / wrong).sum()) - freedom > 4 * math.sqrt(2 * freedom)


def test_samples_of_a_cell_do_not_depend_on_its_batch(model):
    # a draw of seed 0 is 3e-9 from the boundary of two tokens, which is less than the round-off of a batch
    of = lambda seed=2, **how: tll.patchscope(model, ["the cat", "a dog"], TARGET, n_samples=6, seed=seed, **DRAW, **how)
    together, alone, naive = of(), of(batch_size=1), of(share=False)
    assert together.samples == alone.samples == naive.samples
    assert len(together.samples) == 2 and len(together.samples[0]) == 2 and len(together.samples[0][0]) == 6
    assert len(set(together.samples[0][0])) > 1 and together.samples != of(seed=1).samples
    assert together.drawn.tokens.shape == (2, 2, 6, 3)


def test_every_sample_is_continued_from_its_own_cell(model):
    result = tll.patchscope(model, ["the cat", "a dog"], TARGET, n_samples=3, temperature=1e-4, **DRAW)
    greedy = tll.patchscope(model, ["the cat", "a dog"], TARGET, **DRAW | {"do_sample": False})
    assert result.samples == [[[text] * 3 for text in row] for row in greedy.text] and result.text == greedy.text
    answers = result.answers()
    assert answers.frequency.tolist() == [[1.0, 1.0]] * 2 and answers.entropy.abs().max() < 1e-9
    every = tll.patchscope(model, "the cat", TARGET, n_samples=2, temperature=1e-4, when="every_step", **DRAW)
    assert (
        every.samples[0][1] == [tll.patchscope(model, "the cat", TARGET, [2], max_new_tokens=3, when="every_step").text[0][0]] * 2
    )


def test_answers_in_closed_form(model):
    texts = [[["Paris.", " paris", "Rome", "Paris, "]]]
    result = tll.patchscope(model, "the cat", TARGET, layers=[1], n_samples=4, do_sample=True, max_new_tokens=1)
    object.__setattr__(result, "drawn", result.drawn._replace(texts=texts))
    answers = result.answers()
    assert answers.mode == [["paris"]] and answers.frequency.item() == 0.75
    assert answers.entropy.item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert result.answers(str).frequency.item() == 0.25
    assert result.to_frame()["frequency"].tolist() == [0.75]


def test_an_ensemble_of_prompts_gives_the_samples_of_each(model):
    targets = [TARGET, tll.Target("a bird sang in the", pos=-2)]
    both = tll.patchscope(model, "the cat", targets, n_samples=1, max_new_tokens=2, layers=[1])
    each = [tll.patchscope(model, "the cat", target, max_new_tokens=2, layers=[1]).text[0][0] for target in targets]
    assert both.samples[0][0] == each
    drawn = tll.patchscope(model, "the cat", targets, n_samples=5, **DRAW)
    assert len(drawn.samples[0][1]) == 10 and drawn.text[0][1] in drawn.samples[0][1]


def test_a_text_that_is_the_mode_is_the_one_that_is_scored(model):
    result = tll.patchscope(model, ["the cat", "a dog"], TARGET, n_samples=3, **DRAW)
    assert tll.faithfulness(result, controls=["mean vector"]).texts == result.text


def test_samples_that_would_be_equal_are_refused(model, unchecked):
    for how in ({"max_new_tokens": 2}, {"do_sample": True}):
        with pytest.raises(ValueError, match="4 samples of a cell would be equal"):
            tll.patchscope(model, "the cat", TARGET, n_samples=4, **how)
    with pytest.raises(ValueError, match="one text per cell"):
        _ = tll.patchscope(model, "the cat", TARGET, layers=[1]).samples
    with pytest.raises(ValueError, match=r"texts of several targets .* or n_samples="):
        tll.patchscope(model, "the cat", [TARGET, tll.Target("a dog")], max_new_tokens=1)


def test_calibration_in_closed_form(unchecked):
    sure = torch.tensor([0.0, 0.1, 0.55, 0.6, 0.9, 1.0])
    hits = torch.tensor([0, 1, 1, 0, 1, 1])
    found = tll.calibration(hits, sure, bins=2)
    # bins (0, .5] and (.5, 1]: 2 answers, confidence .05, hits .5; 4 answers, confidence .7625, hits .75
    assert found.ece == pytest.approx(2 / 6 * 0.45 + 4 / 6 * 0.0125)
    assert found.brier == pytest.approx(float((sure - hits).square().mean()))
    assert found.grid["n"].tolist() == [2, 4] and "ECE 0.158" in " ".join(str(found).split())
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(20000, generator=generator)
    right = torch.rand(20000, generator=generator)
    assert tll.calibration(right < sure, sure).ece < 0.015 < 0.2 < tll.calibration(right < 0.5, sure).ece
    for wrong in ({"hits": [1, 2], "confidence": [1, 1]}, {"hits": [1], "confidence": [1.5]}, {"hits": [], "confidence": []}):
        with pytest.raises(ValueError):
            tll.calibration(**wrong)
