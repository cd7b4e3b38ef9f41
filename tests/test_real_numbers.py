"""The page about real models says what its results say, and the tools that make both do what they say."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import fine_tune
import real_models
import real_numbers
from paper import page, pairs
from paper.bench import MODELS
from paper.claims import CLAIMS, PATCHSCOPES, TUNED_LENS

import tl_lenses as tll


def test_the_page_is_made_from_the_results():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.read()) == text


def test_every_claim_has_a_step():
    assert {claim.step for claim in CLAIMS} <= set(pairs.STEPS)
    assert {claim.paper for claim in CLAIMS} == {TUNED_LENS, PATCHSCOPES}


def test_every_result_has_a_verdict():
    results = page.read()
    for claim in CLAIMS:
        for model in MODELS:
            text, agrees = page.cell(claim, model, results)
            assert text
            assert (agrees is None) != ("**" in text)


def test_a_number_on_the_other_side_of_its_bound_differs():
    claim = next(claim for claim in CLAIMS if claim.step == "gradients")
    numbers = {"negative": [1.0, 0.96], "cosine": [-0.01, -0.02]}
    result = {"lab-gpt2": {"gradients": {"numbers": numbers}}}
    assert page.cell(claim, "lab-gpt2", result)[1] is True
    numbers["negative"] = [1.0, 0.94]
    assert page.cell(claim, "lab-gpt2", result)[1] is False
    assert page.cell(claim, "gemma3-270m", result) == (page.NOT_RUN, None)


def test_of_two_scales_the_results_of_the_larger_count(tmp_path):
    for scale, value in (("small", 1.0), ("night", 2.0)):
        for model in ("lab-gpt2", "gemma3-270m"):
            file = tmp_path / scale / model / "quality.json"
            file.parent.mkdir(parents=True)
            result = {"step": "quality", "model": model, "scale": scale, "numbers": value}
            file.write_text(json.dumps(result))
    (tmp_path / "night" / "gemma3-270m" / "quality.json").unlink()
    by_model = real_numbers.collected(tmp_path)
    numbers = {model: steps["quality"]["numbers"] for model, steps in by_model.items()}
    assert numbers == {"lab-gpt2": 2.0, "gemma3-270m": 1.0}


def test_a_smaller_scale_does_not_replace_a_larger_one(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "DATA", tmp_path / "data" / "results.json")
    result = lambda scale, value: {"lab-gpt2": {"quality": {"scale": scale, "numbers": {"layers": [value, value]}}}}
    page.keep(result("small", 1))
    page.keep(result("small", 2))
    assert page.read() == result("small", 2)
    page.keep(result("night", 3))
    page.keep(result("small", 4))
    assert page.read() == result("night", 3)
    assert "[3, 3]" in page.DATA.read_text()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A small Llama, its fine-tune, and what was said of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("fine_tune")
    base, text, target = folder / "base", folder / "text.txt", folder / "tuned"
    torch.manual_seed(0)
    tll.lab.load("lab-gpt2").tokenizer.save_pretrained(base)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )
    ).save_pretrained(base)  # fmt: skip
    text.write_text("The king said to his daughter that the winter would be long. " * 200)
    return base, text, target, fine_tune.fine_tune(base, text, target, steps=12, rows=2, seq_len=32, lr=1e-2)


def test_a_fine_tune_learns_its_text(tuned):
    *_, card = tuned
    assert card["loss_after"] < card["loss_before"] - 0.1


def test_a_fine_tune_changes_the_last_layers_alone(tuned):
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tuned[0], tuned[2]))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("layers.1." in name or name == "model.norm.weight" for name in changed)


def test_a_fine_tune_is_whole_with_its_card(tuned):
    *_, target, card = tuned
    assert real_models.is_whole(target)
    assert f"{card['trained']:,} parameters" in (target / "README.md").read_text()


def test_a_fine_tune_that_is_there_is_kept(tuned):
    *given, card = tuned
    assert fine_tune.fine_tune(*given, steps=99) == card


def test_too_little_text_for_a_fine_tune_is_refused(tuned, tmp_path):
    (tmp_path / "text.txt").write_text("The king")
    with pytest.raises(ValueError, match="at least ten rows"):
        fine_tune.fine_tune(tuned[0], tmp_path / "text.txt", tmp_path / "other")


# --- states between two models: the step itself needs two models of the package index, here are its parts


def test_maps_between_tokenizers_meet_at_the_ends_of_words():
    model = tll.lab.load("lab-gpt2")
    text = "The king said to his daughter that winter is long"
    columns = pairs._columns(model, text)
    ids = tll.model.prepare(model, text).tokens[0].tolist()
    for end, column in columns.items():
        assert text[:end].endswith(model.tokenizer.decode([ids[column]]).strip())
    assert len(columns) == len(model.tokenizer(text, add_special_tokens=False)["input_ids"])


PREFIXES = ["The king said to his daughter", "It was the best of the"]


@torch.no_grad()
def test_the_end_of_a_prefix_is_its_last_state_with_the_next_word():
    model = tll.lab.load("lab-gpt2")
    states, words = pairs._ends(model, PREFIXES, [2])
    for i, prefix in enumerate(PREFIXES):
        seen = {}
        logits = tll.run(model, prefix, [tll.read(2, seen)])
        assert torch.equal(states[2][i], seen[2][0, -1])
        assert words[i] == model.tokenizer.decode([int(logits[0, -1].argmax())]).strip()


@torch.no_grad()
def test_a_map_from_a_model_to_itself_keeps_a_state(monkeypatch):
    model = tll.lab.load("lab-gpt2")
    for name in ("SOURCE_LAYERS", "TARGET_LAYERS"):
        monkeypatch.setattr(pairs, name, [2])
    text = " ".join(["The king said to his daughter that the winter would be long and the bread was fresh"] * 4)
    maps = pairs._maps(model, model, [text, text.lower(), text[20:]])
    state = pairs._ends(model, PREFIXES[:1], [2])[0][2][0]
    assert torch.cosine_similarity(pairs._mapped(maps[2, 2], state), state, 0) > 0.5


def test_a_map_is_affine():
    x, mean_x, mean_y, w = (torch.randn(shape, dtype=torch.float64) for shape in ((64, 5), (5,), (3,), (5, 3)))
    assert torch.allclose(pairs._mapped((mean_x, mean_y, w), x), (x - mean_x) @ w + mean_y)


def test_the_held_out_cell_is_chosen_on_the_other_half():
    right = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert pairs._three(right, [(1, 1), (4, 1)]) == {
        "oracle": 1.0, "best": pytest.approx(4 / 6), "held_out": pytest.approx((1 / 3 + 0) / 2), "cell": [4, 1],
    }  # fmt: skip
