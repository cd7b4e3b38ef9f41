"""What a stranger passes to `patchscope`: refused in one sentence before any forward pass, or understood."""

import math

import numpy as np
import pytest
import torch
import zoo
from test_cross_model import big, small

import tl_lenses as tll
from tl_lenses.patchscopes import continuation
from tl_lenses.translators import Affine

SOURCE, TARGET = "the cat sat on the mat", "a bird sang in the tree"
S, T = tll.Source, tll.Target
ONE = dict(source=S(SOURCE), target=T(TARGET))


@pytest.fixture(scope="module", params=zoo.FEW_KINDS)
def model(request):
    return zoo.build("gpt2", request.param)


def vector(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


REFUSED = {
    # the list of the issue
    "placeholder missing": (lambda: dict(ONE, target=T(TARGET, pos="zebra")), "'zebra' is not in the prompt; its tokens are"),
    "placeholder of several tokens": (lambda: dict(ONE, target=T("sing qwzxqy", pos="qwzxqy")), r"is \d+ tokens here"),
    "position outside": (lambda: dict(ONE, target=T(TARGET, pos=77)), "position 77 is not there"),
    "source position outside": (lambda: dict(ONE, source=S(SOURCE, pos=-77)), "position -77 is not there"),
    "ambiguous substring": (lambda: dict(ONE, target=T("the a the", pos="the")), "occurs 2 times"),
    "width": (lambda: dict(ONE, source=S(vector(31))), r"width 31 does not fit the target model \(d_model 32\): pass map="),
    "layer pair": (lambda: dict(ONE, pairs=[(0, 9)]), "no layer 9: this model has layers 0..3"),
    "negative layer": (lambda: dict(ONE, layers=[-9]), "no layer -9"),
    "soft prompt width": (lambda: dict(ONE, target=T(vector(4, 31))), r"expected a soft prompt \[pos, d_model=32\], got \[4, 31\]"),
    "soft prompt axes": (lambda: dict(ONE, target=T(vector(2, 4, 32))), r"expected a soft prompt .* got \[2, 4, 32\]"),
    "soft prompt without positions": (lambda: dict(ONE, target=T(torch.zeros(0, 32))), "expected a soft prompt"),
    "soft prompt not finite": (lambda: dict(ONE, target=T(vector(4, 32) * math.nan)), "the soft prompt is not finite"),
    "no sources": (lambda: dict(ONE, source=[]), "an empty list of sources"),
    "no targets": (lambda: dict(ONE, target=[]), "an empty list of targets"),
    "context": (lambda: dict(ONE, max_new_tokens=60), "more than the context of 64"),
    "devices": (
        lambda: dict(ONE, map=Affine(torch.eye(32, device="meta"), torch.zeros(32, device="meta"))),
        r"the map is on meta and the vectors are on cpu: move one of them with \.to",
    ),
    "not finite": (lambda: dict(ONE, source=S(vector(32) * math.inf)), "are not finite"),
    "stop empty": (lambda: dict(ONE, max_new_tokens=2, stop=[""]), "empty stop string"),
    "stop without text": (lambda: dict(ONE, stop=["a"]), "can never match: nothing is generated"),
    # lists
    "layers not a list": (lambda: dict(ONE, layers=3), r"layers must be a list of layers and sites, got 3: pass layers=\[3\]"),
    "a site for a list": (lambda: dict(ONE, target_layers="hook_embed"), r"target_layers must be a list .* got 'hook_embed'"),
    "pair not a list": (lambda: dict(ONE, pairs=(1, 2)), r"pairs must be a list of \(l, l\*\)"),
    "triple": (lambda: dict(ONE, pairs=[(1, 2, 3)]), r"pairs must be a list of \(l, l\*\)"),
    "no pairs": (lambda: dict(ONE, pairs=[]), "no pair of layers to patch"),
    "pair without a layer": (lambda: dict(ONE, pairs=[(None, 2)]), "is None for vectors without a layer"),
    # kinds
    "layer bool": (lambda: dict(ONE, layers=[True]), "expected a layer .* got True"),
    "layer float": (lambda: dict(ONE, layers=[1.0]), "expected a layer .* got 1.0"),
    "position float": (lambda: dict(ONE, source=S(SOURCE, pos=1.0)), "expected a position"),
    "target text": (lambda: dict(ONE, target=TARGET), r"target must be a Target or a list of them, got str: write tll.Target"),
    "source number": (lambda: dict(ONE, source=3), "source must be a Source or a list of them, got int"),
    "source nothing": (lambda: dict(ONE, source=None), "source must be a Source or a list of them, got NoneType"),
    "source bare tensor": (lambda: dict(ONE, source=vector(32)), r"got Tensor: write tll.Source\(...\)"),
    "numpy vectors": (lambda: dict(ONE, source=S(np.ones(32, dtype=np.float32))), r"torch.as_tensor\(...\) makes one"),
    "map text": (lambda: dict(ONE, map="identity"), "map must be a function of vectors"),
    "map matrix": (lambda: dict(ONE, map=torch.eye(32)), "map must be a function of vectors"),
    "stop number": (lambda: dict(ONE, max_new_tokens=2, stop=[3]), "stop must be a list of strings, got 3 in it"),
    "stop text": (lambda: dict(ONE, max_new_tokens=2, stop="abc"), r"pass stop=\['abc'\]"),
    "new tokens float": (lambda: dict(ONE, max_new_tokens=2.5), "max_new_tokens must be a whole number, got 2.5"),
    "new tokens bool": (lambda: dict(ONE, max_new_tokens=True), "max_new_tokens must be a whole number, got True"),
    "new tokens negative": (lambda: dict(ONE, max_new_tokens=-1), "max_new_tokens must be at least 0"),
    "batch float": (lambda: dict(ONE, batch_size=2.5), "batch_size must be a whole number"),
    "batch none": (lambda: dict(ONE, batch_size=0), "batch_size must be at least 1"),
    "norm bool": (lambda: dict(ONE, norm=True), "norm must be None, 'replaced'"),
    "seed": (lambda: dict(ONE, seed=1.5), "seed must be a whole number"),
    # numbers
    "scale nan": (lambda: dict(ONE, scale=math.nan), "scale must be a finite number"),
    "scale infinite": (lambda: dict(ONE, scale=[1.0, math.inf]), "scale must be a finite number"),
    "no scales": (lambda: dict(ONE, scale=[]), "scale must be a finite number"),
    "norm nan": (lambda: dict(ONE, norm=math.nan), "norm must be a positive finite length"),
    "norm negative": (lambda: dict(ONE, norm=-1.0), "norm must be a positive finite length"),
    "norm short": (lambda: dict(ONE, norm=vector(2)), r"a length per residual layer \[4\], got \[2\]"),
    "alpha": (lambda: dict(ONE, mode="interpolate", alpha=math.nan), "alpha must be a finite number"),
    "alpha bool": (lambda: dict(ONE, mode="interpolate", alpha=True), "alpha must be a finite number, got True"),
    "alpha text": (lambda: dict(ONE, alpha="0.5"), "alpha must be a finite number, got '0.5'"),
    "temperature": (lambda: dict(ONE, max_new_tokens=1, temperature=math.nan), "temperature must be positive and finite"),
    "temperature zero": (lambda: dict(ONE, max_new_tokens=1, do_sample=True, temperature=0), "temperature must be positive"),
    "temperature negative": (lambda: dict(ONE, max_new_tokens=1, do_sample=True, temperature=-1.0), "must be positive and finite, got -1"),
    "scale bool": (lambda: dict(ONE, scale=True), "scale must be a finite number, got True"),
    "scale text": (lambda: dict(ONE, scale="2"), "scale must be a finite number, got '2'"),
    "norm text": (lambda: dict(ONE, norm="median"), "norm must be None, 'replaced', 'mean', a number"),
    "norm list of text": (lambda: dict(ONE, norm=["a"]), "norm must be None, .* got list"),
    "read bool": (lambda: dict(ONE, read=True), "read must be a whole number, got True"),
    "read float": (lambda: dict(ONE, read=1.0), "read must be a whole number, got 1.0"),
    "seed bool": (lambda: dict(ONE, seed=True), "seed must be a whole number, got True"),
    "seed too large": (lambda: dict(ONE, max_new_tokens=1, do_sample=True, seed=2**64), "seed must be at most"),
    "ensemble float": (lambda: dict(ONE, ensemble_k=1.5), "ensemble_k must be a whole number, got 1.5"),
    "a place under two names": (
        lambda: dict(ONE, pairs=[(1, (2, "blocks.1.hook_resid_post"))]), "the target layer 2 is given twice in the pair"
    ),
    "ensemble": (lambda: dict(ONE, ensemble="intersect", ensemble_k=0), "ensemble_k must be at least 1"),
    # shapes
    "no ids": (lambda: dict(ONE, source=S([])), "empty"),
    "ids of another vocabulary": (lambda: dict(ONE, source=S([1, 2, 99999])), "99999"),
    "no vectors": (lambda: dict(ONE, source=S(torch.zeros(0, 32))), r"there are no vectors in a tensor of shape \[0, 32\]"),
    "position in vectors": (lambda: dict(ONE, source=S(vector(32), pos=2)), "vectors have no positions to choose from, got pos=2"),
    "vector without axes": (lambda: dict(ONE, source=S(torch.zeros(()))), r"expected vectors \[d_model\]"),
    "hook without a place": (lambda: dict(ONE, target_hooks=[("nope", lambda x, hook: x)]), "no hook 'nope'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_forward_pass(model, case, unchecked, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a forward pass ran")

    kwargs, message = REFUSED[case]
    with monkeypatch.context() as patched, pytest.raises((ValueError, TypeError), match=message):
        patched.setattr(type(model), "forward", never)
        tll.patchscope(model, **kwargs())


def test_a_model_of_another_width_needs_a_map(unchecked, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a forward pass ran")

    source, to = small(), big()
    monkeypatch.setattr(type(to), "forward", never)
    with pytest.raises(ValueError, match=rf"width {source.cfg.d_model} does not fit the target model .*: pass map="):
        tll.patchscope(source, S(SOURCE), T(TARGET), to=to)


def test_a_stop_string_that_the_tokenizer_cannot_write(model, monkeypatch):
    # Lower case only, as an uncased vocabulary writes.
    cased = continuation.encode
    monkeypatch.setattr(continuation, "encode", lambda tokenizer, texts: cased(tokenizer, [t.lower() for t in texts]))
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match="'END' can never match: this tokenizer writes it as 'end'"):
        tll.patchscope(model, **ONE, max_new_tokens=2, stop=["END"])


def test_integers_of_numpy_and_torch_are_layers(model, unchecked):
    plain = tll.patchscope(model, **ONE, layers=[0, 2], target_layers=[1])
    for layers in ([np.int64(0), np.int64(2)], np.arange(0, 3, 2), torch.tensor([0, 2])):
        got = tll.patchscope(model, **ONE, layers=layers, target_layers=np.array([1]))
        assert got.pairs == [(0, 1), (2, 1)] and torch.equal(got.logits, plain.logits)
    at = dict(source=S(SOURCE, pos=np.int64(-1)), target=T(TARGET, pos=np.array([10])[0]))
    assert torch.equal(tll.patchscope(model, **at, layers=[0, 2], target_layers=[1]).logits, plain.logits)
    ids = model.to_tokens(SOURCE, prepend_bos=True)[0]
    got = tll.patchscope(model, S(ids.numpy()), T(TARGET), layers=[0, 2], target_layers=[1])
    assert torch.equal(got.logits, plain.logits)


def test_numbers_of_numpy_and_torch_are_numbers(model, unchecked):
    options = dict(layers=[0, 2], mode="interpolate", max_new_tokens=2, do_sample=True)
    plain = tll.patchscope(model, **ONE, **options, read=-1, alpha=0.25, scale=2.0, norm=3.0, temperature=2.0, seed=3, batch_size=1)
    for whole, number in ((np.int64, np.float64), (torch.tensor, torch.tensor)):
        got = tll.patchscope(
            model, **ONE, **options | dict(max_new_tokens=whole(2)), read=whole(-1), alpha=number(0.25), scale=number(2.0),
            norm=number(3.0), temperature=number(2.0), seed=whole(3), batch_size=whole(1), ensemble_k=whole(5),
        )  # fmt: skip
        assert torch.equal(got.logits, plain.logits) and torch.equal(got.tokens, plain.tokens)
    sweep = tll.patchscope(model, **ONE, layers=[1], scale=torch.tensor([1.0, 2.0]))
    assert sweep.scales == [1.0, 2.0]


def test_layers_given_twice_are_cells_of_their_own(model):
    twice = tll.patchscope(model, **ONE, layers=[2, -1, 2])
    assert twice.pairs == [(2, 2), (3, 3), (2, 2)]
    torch.testing.assert_close(twice.logits[0, 0], twice.logits[0, 2], atol=1e-5, rtol=0)


def test_a_huge_batch_is_one_batch(model):
    a, b = (tll.patchscope(model, **ONE, batch_size=size) for size in (10**12, 1))
    torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=0)


def test_vectors_of_other_kinds_are_understood(model):
    """Half precision and tensors that want gradients: as their values in fp32."""
    v = torch.linspace(-1, 1, 32)
    plain = tll.patchscope(model, S(v), T(TARGET), target_layers=[1]).logits
    for other in (v.double(), v.clone().requires_grad_(True)):
        got = tll.patchscope(model, S(other), T(TARGET), target_layers=[1])
        torch.testing.assert_close(got.logits, plain, atol=1e-5, rtol=0)
        assert not got.logits.requires_grad
