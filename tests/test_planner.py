"""The planner against the naive procedure: whole prompts, one cell at a time, no cache. And that it saves what it says."""

import random

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.decoding import Decoder
from tl_lenses.effects import leads_to_logits
from tl_lenses.patchscopes import joining
from tl_lenses.patchscopes.attention import hide_keys
from tl_lenses.patchscopes.continuation import Continuation
from tl_lenses.patchscopes.joining import joinable

WORDS = "the cat sat on mat a bird sang in tree dog ran far away under old stone bridge".split()
NO_CACHE = "whole prompts (the cache of this model cannot be shared)"
GAP = 1e-3  # a smaller lead of the likeliest token over the second may flip by rounding


def naive_run(monkeypatch, *args, **kwargs):
    """The naive result, and by how much the likeliest token led at every step of every cell."""
    leads = []
    choose = Continuation.choose

    def watched(self, logits, draw):
        top = logits.float().topk(2).values
        leads.append(float(top[0, 0] - top[0, 1]))
        return choose(self, logits, draw)

    with monkeypatch.context() as patched:
        patched.setattr(Continuation, "choose", watched)
        result = tll.patchscope(*args, **kwargs, share=False)
    steps = (result.tokens >= 0).sum(-1).flatten().tolist()
    starts = [sum(steps[:i]) for i in range(len(steps))]
    return result, [leads[a : a + n] for a, n in zip(starts, steps, strict=True)]


@pytest.mark.parametrize("arch,kind", zoo.cases())
@pytest.mark.parametrize("seed", range(2))
def test_shared_equals_naive(arch, kind, seed, monkeypatch):
    model = zoo.build(arch, kind)
    rng = random.Random(f"{arch}{kind}{seed}")
    depth = model.cfg.n_layers
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(3, 8)))
    sources = [tll.Source(text(), pos=rng.randint(-3, 2)) for _ in range(rng.randint(1, 2))]
    prompt = text()
    n = model.to_tokens(prompt, prepend_bos=True).shape[1]
    place = sorted(rng.sample(range(n), rng.choice((1, 1, 2))))
    target = tll.Target(prompt, pos=place if len(place) > 1 else place[0] - rng.choice((0, n)))
    pairs = [(rng.randint(0, depth), rng.randint(0, depth)) for _ in range(rng.randint(2, 4))]
    pairs.append((1, tuple(rng.sample(range(depth + 1), 2))))
    options = dict(
        mode=rng.choice(("replace", "add", "interpolate", "norm_add")),
        norm=rng.choice((None, "replaced", "mean", 3.0)),
        scale=rng.choice((1.0, 0.5, [1.0, -2.0])),
        isolate=rng.random() < 0.4 and patterns_work(model),
        when="prompt" if len(place) > 1 else rng.choice(("prompt", "every_step")),
        read=rng.choice((-1, -1, place[0])),
        max_new_tokens=5,
        batch_size=rng.choice((None, 1, 3, 100)),
    )
    shared = tll.patchscope(model, sources, target, pairs=pairs, **options)
    naive, leads = naive_run(monkeypatch, model, sources, target, pairs=pairs, **options)
    assert shared.pairs == naive.pairs and shared.sources == naive.sources and naive.plan == "whole prompts (share=False)"
    assert shared.plan.startswith("prefix") == (place[0] > 0 and shared.plan != NO_CACHE), shared.plan
    assert (shared.logits - naive.logits).abs().max() < 1e-4
    compared = 0
    for a, b, lead in zip(shared.tokens.flatten(0, 1).tolist(), naive.tokens.flatten(0, 1).tolist(), leads, strict=True):
        sure = next((i for i, gap in enumerate(lead) if gap < GAP), len(lead))
        assert a[:sure] == b[:sure]
        compared += sure
    assert compared > len(leads)  # most steps are sure


def patterns_work(model):
    return leads_to_logits(model, "blocks.0.attn.hook_pattern")


@pytest.fixture(scope="module", params=zoo.FEW_KINDS)
def model(request):
    return zoo.build("gpt2", request.param)


SOURCE, TARGET = tll.Source("the cat sat on the mat"), tll.Target("a bird sang in the tree", pos=-2)


@pytest.fixture
def passes(model):
    """Rows and tokens that pass through block 0, by forward pass."""
    passes = []
    Decoder(model)  # what the cache can do is tried once, before passes are counted
    # On a module that is no hook point: a hook on the model would change the plan.
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda module, x: passes.append(tuple(x[0].shape[:2])))
    yield passes
    handle.remove()


def joins(model):
    """Whether rows join halfway: in a bridge; a HookedTransformer wants as many rows in its cache as in its input."""
    assert joinable(model) == (not Decoder(model).takes_own_cache)
    return joinable(model)


def test_nothing_runs_twice(model, passes):
    rows = 1 + 8 if joins(model) else 32  # tried before it is counted
    del passes[:]
    tll.patchscope(model, [SOURCE, tll.Source(SOURCE.prompt, pos=2)], TARGET, target_layers=range(4))
    n = model.to_tokens(TARGET.prompt, prepend_bos=True).shape[1]
    m = model.to_tokens(SOURCE.prompt, prepend_bos=True).shape[1]
    # One pass for both positions and all layers of the source and for the target's prefix, and one batch of 32 suffixes:
    # an unpatched one and those patched at layer 0, the others join at their layers.
    assert passes == [(2, max(m, n - 2)), (rows, 2)]


def test_rows_leave_when_they_have_finished(model, passes):
    sources = [tll.Source(text) for text in ("the cat sat", "old stone bridge", "a dog ran far away")]
    last = tll.Target(TARGET.prompt, pos=-1)  # the patched vector itself says what comes next
    sweep = dict(target_layers=range(4), max_new_tokens=6)
    plain = tll.patchscope(model, sources, last, **sweep)
    texts = [text for row in plain.text for text in row]
    del passes[:]
    # A piece of some texts and not of all, so that some rows stop before others.
    pieces = {model.tokenizer.decode([t]) for t in plain.tokens[:, :, :3].flatten().tolist() if t >= 0}
    stop = next(p for p in sorted(pieces) if p.strip() and 0 < sum(p in t for t in texts) < len(texts))
    stopped = tll.patchscope(model, sources, last, **sweep, stop=[stop])
    rows = [batch for batch, width in passes if width == 1]
    # Every step runs the rows that it gives a token to, and no other; in the first pass most rows join behind block 0.
    assert (
        rows[0] == (1 + 3 * 4 if joins(model) else len(texts))
        and rows[1:] == (stopped.tokens >= 0).flatten(0, 1).sum(0).tolist()[1:]
    )
    assert rows[-1] < len(texts) and (stopped.tokens >= 0).sum() < (plain.tokens >= 0).sum()
    for cut, whole in zip([t for row in stopped.text for t in row], texts, strict=True):
        assert cut == whole.split(stop)[0]


def test_sampling_does_not_depend_on_the_batch(model):
    options = dict(target_layers=[0, 2], max_new_tokens=4, do_sample=True, temperature=1.5)
    a = tll.patchscope(model, SOURCE, TARGET, **options, seed=3)
    assert torch.equal(a.tokens, tll.patchscope(model, SOURCE, TARGET, **options, seed=3, batch_size=3).tokens)
    assert torch.equal(a.tokens, tll.patchscope(model, SOURCE, TARGET, **options, seed=3, share=False).tokens)
    assert not torch.equal(a.tokens, tll.patchscope(model, SOURCE, TARGET, **options, seed=4).tokens)
    assert not torch.equal(a.tokens, tll.patchscope(model, SOURCE, TARGET, target_layers=[0, 2], max_new_tokens=4).tokens)


def test_the_plan_says_why_nothing_is_shared(model):
    tokens = model.to_tokens(TARGET.prompt, prepend_bos=True).shape[1]
    assert tll.patchscope(model, SOURCE, TARGET).plan == f"prefix of {tokens - 2} tokens shared"
    hook = tll.patch(0, tll.edits.scale(0.5), pos=1)
    assert "target_hooks" in tll.patchscope(model, SOURCE, TARGET, target_hooks=[hook]).plan
    assert "first position" in tll.patchscope(model, SOURCE, tll.Target("a bird", pos=0)).plan
    assert "before the patch" in tll.patchscope(model, SOURCE, TARGET, read=1).plan
    with model.hooks(fwd_hooks=[hook]):
        inside = tll.patchscope(model, SOURCE, TARGET)
    assert "hooks on the model" in inside.plan
    # What sees the whole prompt is right either way.
    outside = tll.patchscope(model, SOURCE, TARGET, target_hooks=[hook], source_hooks=[hook])
    assert torch.allclose(inside.logits, outside.logits, atol=1e-5)


def test_a_model_whose_cache_cannot_be_shared_runs_whole_prompts(model, monkeypatch):
    want = tll.patchscope(model, SOURCE, TARGET, max_new_tokens=3)
    monkeypatch.setattr(Decoder, "shareable", lambda self: False)
    got = tll.patchscope(model, SOURCE, TARGET, max_new_tokens=3)
    assert got.plan == "whole prompts (the cache of this model cannot be shared)"
    assert torch.equal(got.tokens, want.tokens) and torch.allclose(got.logits, want.logits, atol=1e-4)


@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
def test_a_cache_that_stays_empty_is_noticed(kind, monkeypatch):
    """Without the check every generated token would attend to itself alone."""
    model = fresh(kind)
    if Decoder(model).takes_own_cache:
        pytest.skip("a HookedTransformer fills its own cache")
    from transformers.cache_utils import DynamicCache

    edit = [tll.patch(1, tll.edits.scale(3.0), pos=2, when="every_step")]
    expected = tll.generate(model, "the cat sat", edit, 5, stop_at_eos=False)
    want = tll.patchscope(model, SOURCE, TARGET, max_new_tokens=3)
    monkeypatch.setattr(DynamicCache, "update", lambda self, keys, values, *args, **kwargs: (keys, values))
    with pytest.warns(UserWarning, match=r"the key-value cache of this model stays empty: whole sequences run"):
        assert torch.equal(tll.generate(model, "the cat sat", edit, 5, stop_at_eos=False), expected)
    got = tll.patchscope(model, SOURCE, TARGET, max_new_tokens=3)
    assert got.plan == "whole prompts (the cache of this model cannot be shared)"
    assert torch.equal(got.tokens, want.tokens) and torch.allclose(got.logits, want.logits, atol=1e-4)


def test_isolation_hides_the_placeholder_below_the_patch(model):
    """With isolation a later token cannot tell which placeholder stood there, if the patch replaces it at every layer it sees."""
    ids = [model.to_tokens("the cat sat on the mat", prepend_bos=True)[0] for _ in range(2)]
    ids[1][2] += 1
    prompts = [tll.Target(prompt, pos=2) for prompt in ids]
    last = dict(layers=[3], target_layers=[2])
    plain = [tll.patchscope(model, SOURCE, t, **last).logits for t in prompts]
    hidden = [tll.patchscope(model, SOURCE, t, **last, isolate=True).logits for t in prompts]
    assert (plain[0] - plain[1]).abs().max() > 1e-3  # contamination: the two placeholders differ
    assert (hidden[0] - hidden[1]).abs().max() < 1e-5  # and cannot be told apart once hidden
    # A patch at layer 0 leaves nothing below it to hide.
    at_zero = dict(layers=[3], target_layers=[0])
    plain, isolated = (tll.patchscope(model, SOURCE, prompts[0], **at_zero, isolate=on).logits for on in (False, True))
    assert torch.equal(plain, isolated)


def test_isolation_is_the_softmax_without_those_keys(model):
    """Against scores of minus infinity, computed by hand from the pattern of block 0."""
    seen = {}
    tokens = model.to_tokens("the cat sat on the mat", prepend_bos=True)
    name = "blocks.0.attn.hook_pattern"
    tll.run(model, tokens, [tll.read(name, seen)])
    new, old = hide_keys([2])(seen[name]), seen[name]
    score = old.clamp_min(1e-30).log()
    score[:, :, 3:, 2] = float("-inf")
    score = score.masked_fill(old == 0, float("-inf"))
    torch.testing.assert_close(new, score.softmax(-1), atol=1e-5, rtol=0)
    assert torch.equal(new[:, :, :3], old[:, :, :3])


@pytest.mark.parametrize("arch,kind", zoo.cases(("gptneo", "gptj", "opt", "llama")))
def test_a_pattern_that_cannot_be_edited_is_refused(arch, kind):
    model = zoo.build(arch, kind)
    target = dict(layers=[3], target_layers=[2], isolate=True)
    if patterns_work(model):
        assert arch == "llama" or kind.startswith("ht")
        tll.patchscope(model, SOURCE, TARGET, **target)
        return
    with pytest.raises(RuntimeError, match="ignores edits of hook_pattern"):
        tll.patchscope(model, SOURCE, TARGET, **target)
    with pytest.raises(RuntimeError, match="ignores edits of hook_pattern"):
        tll.run(model, "the cat", [tll.patch("blocks.1.attn.hook_pattern", tll.edits.zero)])
    tll.run(model, "the cat", [tll.read("blocks.1.attn.hook_pattern", {})])  # reading is fine


def test_rows_join_where_they_are_patched(model):
    """A block runs the unpatched row and the rows that are patched before it; nothing changes but that."""
    if not joins(model):
        pytest.skip("a HookedTransformer wants as many rows in its cache as in its input: every cell runs all blocks")
    seen = []
    count = lambda module, x: seen.append(tuple(x[0].shape[:2]))
    handles = [model.blocks[i].mlp.register_forward_pre_hook(count) for i in range(3)]
    options = dict(pairs=[(1, 3), (2, 0), (0, 1), (1, 1), (3, 0), (3, "blocks.1.hook_resid_post")], max_new_tokens=3)
    got = tll.patchscope(model, SOURCE, TARGET, **options)
    for handle in handles:
        handle.remove()
    suffix = 2  # columns from the patched one on: the source's pass is longer, generated steps are shorter
    assert [rows for rows, width in seen if width == suffix] == [1 + 2, 1 + 4, 1 + 5]
    naive = tll.patchscope(model, SOURCE, TARGET, **options, share=False)
    assert torch.equal(got.tokens, naive.tokens)
    torch.testing.assert_close(got.logits, naive.logits, atol=1e-4, rtol=0)


def fresh(kind):
    """A model of which nothing is known yet."""
    return zoo.build.__wrapped__("gpt2", kind)


@pytest.mark.parametrize("kind", zoo.FEW_KINDS)
def test_rows_do_not_join_a_model_that_cannot_have_them(kind, monkeypatch):
    """Told by what comes out: a block that refuses more rows than the pass began with, and one that answers wrong."""
    plain = joining.run_joining

    def refusing(*args, **kwargs):
        raise RuntimeError("expected a batch of 1")

    def wrong(*args, **kwargs):
        logits, decoder = plain(*args, **kwargs)
        return logits.roll(1, 0), decoder

    for broken in (refusing, wrong):
        model = fresh(kind)
        monkeypatch.setattr(joining, "run_joining", broken)
        assert not joinable(model)
    monkeypatch.setattr(joining, "run_joining", plain)
    assert not joinable(model)  # found once
