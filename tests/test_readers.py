"""Published readers against their own injection, written out as Hugging Face hooks; with random adapters where peft is installed."""

import copy

import pytest
import torch
import transformers
import zoo

import tl_lenses as tll
from tl_lenses.patchscopes.targets import ready_target

pytestmark = pytest.mark.skipif(not zoo.HAS_BRIDGE, reason="adapters are loaded by boot_transformers")
# The marker stands in the template too, before, between and behind the messages; content is trimmed, as by Llama's.
TEMPLATE = (
    "{{ bos_token }}{% if enable_thinking is defined and not enable_thinking %}no ? {% endif %}"
    "{% for m in messages %}<{{ m.role }}> ?\n{{ m.content | trim }} ?\n{% endfor %}{% if add_generation_prompt %}<assistant> ?\n{% endif %}"
)
DEPTH, WIDTH = 4, 32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tll.lab.path("lab-gpt2"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens([" ?"])  # one token, as in the published readers' models
    folder = tmp_path_factory.mktemp("tokenizer")  # a bridge loads it again from where it came from
    tokenizer.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def plain(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    model.config.architectures = ["LlamaForCausalLM"]
    return model.eval()


def booted(hf_model, tokenizer):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers("tiny", hf_model=hf_model, tokenizer=tokenizer, device="cpu").eval()


@pytest.fixture(scope="module", params=["plain", "adapters"])
def models(request, tokenizer):
    """The model that is read, the reader, and the reader in plain transformers."""
    reader = plain(tokenizer)
    if request.param == "adapters":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        with_adapters = peft.get_peft_model(reader, config).eval()
        reader = with_adapters.get_base_model()
        assert any("lora" in name for name, _ in reader.named_modules())
    else:
        reader = plain(tokenizer, seed=1)  # other weights than those of the model that is read
    return booted(plain(tokenizer), tokenizer), booted(copy.deepcopy(reader), tokenizer), reader


def rendered(tokenizer, messages, **template):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def states(model, text, layer, pos):
    seen = {}
    tll.run(model, text, [tll.read(layer, seen, key="h", pos=pos)])
    return seen["h"][0].detach()


@torch.no_grad()
def with_hook(reader, ids, block, hook):
    handle = reader.model.layers[block].register_forward_hook(hook)
    try:
        return reader(ids).logits[0, -1]
    finally:
        handle.remove()


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_an_activation_oracle(models, tokenizer):
    model, to, reader = models
    asked = tll.scopes.activation_oracle("Is this ? a name ?", 3, 2)
    said = tll.patchscope(model, tll.Source("Japan is a country", [1, 3]), **asked, to=to)
    assert said.pairs == [(3, 2)]
    ids = rendered(tokenizer, [{"role": "user", "content": "Layer: 2\n ? ? \nIs this ? a name ?"}], enable_thinking=False)
    marker = tokenizer(" ?", add_special_tokens=False)["input_ids"]
    assert len(marker) == 1
    places = [i for i, token in enumerate(ids[0].tolist()) if token == marker[0]]
    text = [tokenizer.decode(ids[0, : i + 1]) for i in places]
    places = [i for i, before in zip(places, text, strict=True) if before.endswith(("2\n ?", "2\n ? ?"))]
    v = states(model, "Japan is a country", 3, [1, 3])

    def hook(module, args, output):
        resid = first(output).clone()
        orig = resid[0, places]
        resid[0, places] = torch.nn.functional.normalize(v, dim=-1) * orig.norm(dim=-1, keepdim=True) + orig
        return (resid, *output[1:]) if isinstance(output, tuple) else resid

    assert len(places) == 2
    assert torch.allclose(said.logits[0, 0], with_hook(reader, ids, 1, hook), atol=1e-4)
    assert not torch.allclose(said.logits[0, 0], reader(ids).logits[0, -1], atol=1e-3)


def test_a_latent_qa_decoder(models, tokenizer):
    model, to, reader = models
    asked = tll.scopes.latent_qa("Who? speaks", 3, layer=2)
    said = tll.patchscope(model, tll.Source("Japan is a country", slice(1, 4)), **asked, to=to)
    messages = [{"role": "user", "content": "? ? ? "}, {"role": "assistant", "content": "Sure, I've analyzed the assistant."}, {"role": "user", "content": "Who? speaks"}]  # fmt: skip
    ids = rendered(tokenizer, messages)
    pieces = [tokenizer.decode([i]) for i in ids[0].tolist()]
    start = pieces.index("?")  # the template writes " ?"
    assert pieces[start : start + 3] == ["?", " ?", " ?"] and pieces[start - 1] == "\n"
    v = states(model, "Japan is a country", 2, [1, 2, 3])

    def hook(module, args, output):
        resid = first(output).clone()
        resid[0, start : start + 3] = v
        return (resid, *output[1:]) if isinstance(output, tuple) else resid

    assert torch.allclose(said.logits[0, 0], with_hook(reader, ids, 0, hook), atol=1e-4)
    own = tll.scopes.latent_qa(
        "Who?", 1, chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}reflect:"
    )
    tokens = ready_target(to, own["target"], -1, 0).tokens[0]
    assert tokenizer.decode(tokens[1:]) == "? |Sure, I've analyzed the assistant.|Who?|reflect:"


def meta_of(tokenizer, scale, **change):
    content = "Explain <concept> x</concept>: <explanation>"
    ids = rendered(tokenizer, [{"role": "user", "content": content}])[0].tolist()
    marker = tokenizer(" x", add_special_tokens=False)["input_ids"][0]
    p = ids.index(marker)
    tokens = {"injection_char": " x", "injection_token_id": marker, "injection_left_neighbor_id": ids[p - 1], "injection_right_neighbor_id": ids[p + 1]}  # fmt: skip
    templates = {"av": "Explain <concept>{injection_char}</concept>: <explanation>"}
    return {"kind": "nla_model", "d_model": WIDTH, "tokens": tokens | change, "extraction": {"injection_scale": scale}, "prompt_templates": templates}, ids, p  # fmt: skip


@pytest.mark.parametrize("scale", [7.5, "sqrt_d_model", None])
def test_a_natural_language_autoencoder(models, tokenizer, scale):
    model, to, reader = models
    meta, ids, p = meta_of(tokenizer, scale)
    v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    said = tll.patchscope(model, tll.Source(v), **tll.scopes.nla(meta), to=to)
    length = {None: v.norm(), "sqrt_d_model": WIDTH**0.5}.get(scale, scale)
    embeds = reader.get_input_embeddings()(torch.tensor([ids])).detach().clone()
    embeds[0, p] = v / v.norm() * length
    with torch.no_grad():
        assert torch.allclose(said.logits[0, 0], reader(inputs_embeds=embeds).logits[0, -1], atol=1e-4)


def test_another_tokenizer_or_template_is_refused(models, tokenizer, unchecked):
    model = models[0]
    for change in ("injection_token_id", "injection_left_neighbor_id", "injection_right_neighbor_id"):
        meta, _, _ = meta_of(tokenizer, 1.0, **{change: 5})
        with pytest.raises(ValueError, match="not the tokenizer or chat template that the reader was trained with"):
            tll.patchscope(model, tll.Source(torch.ones(WIDTH)), **tll.scopes.nla(meta))
    with pytest.raises(ValueError, match="expected the content of nla_meta.yaml"):
        tll.scopes.nla({"tokens": {}})


def test_a_marker_is_what_the_messages_say(models, tokenizer, unchecked):
    model = models[0]
    place = lambda *args, **kwargs: ready_target(model, tll.Target.chat(*args, **kwargs), -1, 0)
    messages = [{"role": "user", "content": "What is ? and ?"}, {"role": "assistant", "content": "It is ?"}]
    every = place(messages, " ?")
    pieces = [tokenizer.decode([i]) for i in every.tokens[0].tolist()]
    assert [pieces[i] for i in every.place] == [" ?"] * 3 and pieces.count(" ?") == 3 + 5
    assert "".join(pieces[: every.place[0]]).endswith("What is") and "".join(pieces[: every.place[2]]).endswith("It is")
    assert place(messages, " ?", n=2).place == every.place[:2]
    later = place(messages, " ?", enable_thinking=False)
    moved = later.place[0] - every.place[0]
    assert moved > 0 and later.place == tuple(i + moved for i in every.place)
    for call, message in (
        (lambda: tll.Target.chat(messages, "x"), "marker 'x' 0 times"),
        (lambda: tll.Target.chat(messages, " ?", n=4), "3 times, expected 4"),
        (lambda: tll.Target.chat("What?", "?"), "expected messages"),
        (lambda: place([{"role": "user", "content": "What is qzj"}], "qzj"), "tokens here"),
        (
            lambda: place(messages, " ?", chat_template="{% for m in messages %}{{ m.content | upper }}{% endfor %}"),
            "does not write the message",
        ),
        (lambda: tll.scopes.activation_oracle("a", 0), "layer must be at least 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
