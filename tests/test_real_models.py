"""Real pretrained models (`tools/real_models.py`), against plain Hugging Face. Skipped where they were not made."""

import os
import sys
from pathlib import Path

import pytest
import torch
import zoo

import tl_lenses as tll

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import real_models

PROMPT = "The Eiffel Tower is a famous landmark in the city of"

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module", params=list(real_models.SOURCES))
def folder(request):
    if zoo.TL_VERSION < (4, 0):
        pytest.skip("on the newest TransformerLens: what differs between versions does not depend on the weights")
    folder = real_models.folder_of(request.param)
    if not (folder / "checksums.json").is_file():
        pytest.skip(f"python tools/real_models.py {request.param} makes it")
    if request.param != "smollm2-135m" and not os.environ.get("TL_LENSES_ALL_REAL"):
        pytest.skip("the larger one runs with TL_LENSES_ALL_REAL=1")
    return folder


@pytest.fixture(scope="module")
def hf(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def model(folder):
    model = tll.load_model(folder.name, device="cpu")
    assert model.cfg.model_name == folder.name
    return model


@pytest.fixture(scope="module")
def tokens(model):
    return tll.token_batches(tll.lab.text("train"), model.tokenizer, seq_len=64, batch_size=8, limit_tokens=8192)


def test_check_holds(model):
    report = tll.check(model, PROMPT)
    assert report.ok, str(report)


def test_in_half_precision_its_stream_is_as_raw_as_it_is(model, folder):
    """Beside its largest entry the mean of SmolLM2's states is small, and bfloat16 states were taken for centred ones."""
    from tl_lenses.identity import basis_of

    half = tll.load_model(folder.name, device="cpu", dtype=torch.bfloat16)
    assert basis_of(model) == basis_of(half) == "raw"


def test_every_row_is_the_head_of_the_hugging_face_model(model, hf):
    ids = model.to_tokens(PROMPT)
    lens, seen = tll.Lens(model), {}
    tll.run(model, ids, [tll.read(layer, seen) for layer in range(model.cfg.n_layers)])
    with torch.no_grad():
        states = hf(ids, output_hidden_states=True).hidden_states
        for layer in range(model.cfg.n_layers):
            logits = hf.lm_head(hf.model.norm(states[layer]))
            torch.testing.assert_close(lens[layer](seen[layer]), logits, atol=2e-3, rtol=1e-3)
            assert torch.equal(lens[layer](seen[layer]).argmax(-1), logits.argmax(-1))


@torch.no_grad()
def last_logits(hf, ids, layer, column, vector):
    """Last logits of a plain pass over whole sequences, with one column of one block's input replaced."""

    def replace(module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[:, column] = vector
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    handle = hf.model.layers[layer].register_forward_pre_hook(replace, with_kwargs=True)
    try:
        return hf(ids, use_cache=False).logits[:, -1]
    finally:
        handle.remove()


def test_a_patch_is_a_plain_pre_hook_and_generation_goes_on_from_it(model, hf):
    layer, target_layer, n_new = 12, 6, 5
    source, target = model.to_tokens("The capital of Japan is Tokyo"), model.to_tokens(PROMPT)
    n = target.shape[1]
    with torch.no_grad():
        vector = hf(source, output_hidden_states=True).hidden_states[layer][:, -1]
    ids = target
    for _ in range(n_new):
        ids = torch.cat([ids, last_logits(hf, ids, target_layer, n - 1, vector).argmax(-1)[:, None]], 1)
    expected = last_logits(hf, target, target_layer, n - 1, vector)
    assert not torch.allclose(expected, hf(target).logits[:, -1], atol=0.1)
    hooks = [tll.patch(target_layer, tll.edits.replace(vector), pos=-1)]
    torch.testing.assert_close(tll.run(model, target, hooks)[:, -1], expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(tll.generate(model, target, hooks, n_new, stop_at_eos=False), ids)
    result = tll.patchscope(model, tll.Source(source), tll.Target(target), pairs=[(layer, target_layer)], max_new_tokens=n_new)
    torch.testing.assert_close(result.logits[0, 0], expected[0], atol=2e-3, rtol=1e-3)


def test_twenty_steps_improve_on_the_regression_and_that_on_the_logit_lens(model, tokens):
    layer = model.cfg.n_layers - 6
    held_out = tll.token_batches(tll.lab.text("heldout"), model.tokenizer, seq_len=64, batch_size=8, limit_tokens=1024)
    regression = tll.fit_regression(model, tokens, layers=[layer])
    tuned = tll.fit_tuned(model, tokens, 20, layers=[layer], tokens_per_step=512, init=regression)
    lenses = {"logit": tll.Lens(model), "regression": tll.Lens(model, regression), "tuned": tll.Lens(model, tuned)}
    scores = tll.evaluate(model, lenses, held_out, layers=[layer])
    logit, start, fitted = (scores.value(name, layer) for name in lenses)
    assert fitted < start < logit, (logit, start, fitted)


def test_attributes_are_read_early_and_not_from_shuffled_vectors(model):
    from tl_lenses.experiments import attributes, read_facts
    from tl_lenses.experiments.common import PATCHED, SHUFFLED

    facts = [fact for fact in read_facts() if fact.relation == "country_capital_city"]
    result = attributes(model, facts, layers=[1, 2, 28], target_layers=[1, 2, 3], max_new_tokens=6)
    patched, shuffled = (result.cells.by_source_layer(condition) for condition in (PATCHED, SHUFFLED))
    assert max(patched[1], patched[2]) >= 0.5 > patched[28], patched
    assert max(shuffled.values()) <= 0.25, shuffled
