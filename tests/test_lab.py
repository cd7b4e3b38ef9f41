"""The bundled model and text: complete, undamaged, quiet, and as good as the model card says."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tl_lenses import lab


@pytest.fixture(scope="module")
def model():
    return lab.load("lab-gpt2")


def card() -> str:
    return (lab.path("lab-gpt2") / "README.md").read_text(encoding="utf-8")


def windows(model, texts):
    ids = model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [row[i : i + 255] for row in ids for i in range(0, len(row) - 254, 255)]
    return torch.tensor([[model.tokenizer.bos_token_id, *row] for row in rows])


def test_available_names_what_load_takes():
    (bundled,) = lab.available()
    assert bundled.name == "lab-gpt2" and "8 layers" in bundled.description
    assert 15e6 < bundled.n_bytes < 20e6


def test_the_model_is_ready_to_use(model):
    cfg = model.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_vocab, cfg.n_ctx) == (8, 256, 8, 8192, 256)
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    # The label is a name, not where this machine keeps it: it goes into saved files.
    assert cfg.model_name == "lab-gpt2"


def test_it_knows_a_fact(model):
    tokens = model.to_tokens("The capital of France is the city of", prepend_bos=True)
    with torch.no_grad():
        assert model.tokenizer.decode(model(tokens)[0, -1].argmax()) == " Paris"


def test_it_is_in_the_raw_basis(model):
    name = "blocks.4.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(windows(model, lab.text("heldout")[:1])[:1], names_filter=[name])
    # Centred weights would make this zero.
    assert cache[name].mean(-1).abs().max() > 0.01


def test_heldout_loss_is_the_cards(model):
    tokens = windows(model, lab.text("heldout"))[::3]
    with torch.no_grad():
        loss = torch.stack([model(part, return_type="loss") for part in tokens.split(12)]).mean().item()
    stated = re.search(r"heldout\.txt`.*\| ([\d.]+) \| [\d.]+ \|", card())
    assert stated is not None
    # Measured here: 4.735 on every third window, 4.770 on all (the card's figure). Standard deviation between windows 0.29,
    # so 0.05 for the mean of 36; random weights would give 9.
    assert loss == pytest.approx(4.735, abs=2e-3)
    assert abs(loss - float(stated[1])) < 0.1


def test_other_dtypes():
    model = lab.load(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    lab.load()
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_is_silent_and_needs_no_network():
    code = """if 1:
        import socket, sys
        def refuse(*args, **kwargs): raise OSError("network")
        socket.socket.connect = refuse
        from tl_lenses import lab
        assert not {"transformer_lens", "transformers"} & set(sys.modules)
        lab.load(); lab.text("train")
        assert {"transformer_lens", "transformers"} <= set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("split,n_bytes,n_documents", [("train", 464_096, 133), ("heldout", 121_406, 34)])
def test_text(split, n_bytes, n_documents):
    documents = lab.text(split)
    assert len(documents) == n_documents
    assert len(f"\n{'<|endoftext|>'}\n".join(documents).encode()) + 1 == n_bytes
    for document in documents:
        assert 1_500 <= len(document.encode()) <= 6_000
        assert "<|" not in document and not re.search("[\u201c\u201d\u2018\u2019\u2014_*#\\\\]", document)
        assert all(paragraph == paragraph.strip() != "" for paragraph in document.split("\n"))


def test_no_passage_is_in_both_splits():
    paragraphs = [{p for d in lab.text(split) for p in d.split("\n") if len(p) > 60} for split in ("train", "heldout")]
    assert min(map(len, paragraphs)) > 100 and not paragraphs[0] & paragraphs[1]


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    for bundled in lab.available():
        shutil.copytree(lab.path(bundled.name), tmp_path / bundled.name)
    monkeypatch.setattr(lab, "_HERE", tmp_path)
    lab.load()
    weights = tmp_path / "lab-gpt2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    expected = json.loads((tmp_path / "lab-gpt2" / "checksums.json").read_text())["model.safetensors"]
    with pytest.raises(
        ValueError, match=rf"model\.safetensors is damaged: expected SHA-256 {expected}, got [0-9a-f]{{64}}"
    ):
        lab.load()
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .* got no file; reinstall"):
        lab.load()


def test_every_file_of_the_model_has_a_checksum():
    files = {file.name for file in lab.path("lab-gpt2").iterdir()} - {"README.md", "checksums.json"}
    assert files == set(json.loads((lab.path("lab-gpt2") / "checksums.json").read_text()))


def test_unknown_names_are_refused():
    for call in (lab.load, lab.path):
        with pytest.raises(ValueError, match=r"one of \['lab-gpt2'\], got 'gpt2'"):
            call("gpt2")
    with pytest.raises(ValueError, match=r"one of \['train', 'heldout'\], got 'test'"):
        lab.text("test")
