"""Reading in blocks of the vocabulary: what `decode` gives is what whole rows of float64 give, and no more exists at a time than it says."""

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode

import tl_lenses as tll
from tl_lenses import decode, unembed
from tl_lenses import stats as S
from tl_lenses.model import padding_of
from tl_lenses.unembed import Readout

TOKENS = zoo.tokens(2, 10)
# GPT-J has a biased unembedding, Gemma 2 caps its logits.
HEADS = [arch for arch in ("gpt2", "gptj", "gemma2") if zoo.available(arch, zoo.FEW_KINDS[0])]


def _float64(arch):
    return zoo.build(arch, zoo.FEW_KINDS[0], torch.float64)


def _blocks(monkeypatch, model, columns, positions):
    """So many columns in a product, and room for the logits of so many positions of a layer and their teacher."""
    monkeypatch.setitem(unembed.COLUMNS, "cpu", columns)
    monkeypatch.setitem(decode.ROOM, "cpu", 2 * positions * model.cfg.d_vocab * 8)
    monkeypatch.setitem(decode.PIECE, "cpu", positions * model.cfg.d_vocab * 2)


@pytest.mark.parametrize("arch", HEADS)
@pytest.mark.parametrize("columns", [1, 37, 64, 10**6])
@torch.no_grad()
def test_logits_in_blocks_of_columns_are_the_readouts(arch, columns, monkeypatch):
    model = _float64(arch)
    readout, resid = Readout(model), 3 * torch.randn(5, model.cfg.d_model, dtype=torch.float64)
    monkeypatch.setitem(unembed.COLUMNS, "cpu", columns)
    room = torch.full((7, model.cfg.d_vocab), torch.nan, dtype=torch.float64)
    got = readout.logits(readout.hidden(resid), room)
    assert torch.allclose(got, readout(resid), atol=1e-12) and got.data_ptr() == room.data_ptr() and room[5:].isnan().all()
    assert unembed._CUTS[model]


@pytest.mark.parametrize("arch", HEADS)
@pytest.mark.parametrize(("columns", "positions"), [(7, 1), (64, 3), (100, 8), (10**6, 1000)])
@torch.no_grad()
def test_every_number_equals_whole_rows_in_float64(arch, columns, positions, monkeypatch):
    model = _float64(arch)
    lenses = {"logit": tll.Lens(model), "tuned": tll.Lens(model, zoo.random_maps(model))}
    states = {}
    final = tll.run(model, TOKENS, [tll.read(tll.site(model, i), states, key=i) for i in range(model.cfg.n_layers)])
    _blocks(monkeypatch, model, columns, positions)
    both, scores = tll.trajectory(model, lenses, TOKENS, anti_targets=5), tll.evaluate(model, lenses, TOKENS)
    teacher, following = final.log_softmax(-1), TOKENS[:, 1:]
    near = lambda a, b: torch.allclose(a.double(), b, atol=1e-6, rtol=1e-6)
    whole = {name: [*(lens[i](states[i]) for i in states), final] for name, lens in lenses.items()}
    for name, traj in both.items():
        for i, z in enumerate(whole[name]):
            logp = z.log_softmax(-1)
            score = logp[:, :-1].gather(-1, following[..., None])[..., 0]
            assert near(traj.kl[i], (teacher.exp() * (teacher - logp)).sum(-1)) and near(
                traj.entropy[i], -(logp.exp() * logp).sum(-1)
            )
            assert near(traj.target_logprob[i, :, :-1], score) and near(traj.logprob_diff[i, :, :-1], score - logp[:, :-1, 5])
            assert torch.equal(traj.rank[i, :, :-1], S.rank(z[:, :-1], following)) and near(traj.max_prob[i], logp.exp().amax(-1))
            assert torch.equal(traj.top_ids[i], z.topk(10).indices) and near(traj.top_probs[i], logp.exp().topk(10).values)
            p, q = teacher[:, 1:].exp().flatten(0, 1).mean(0), logp[:, 1:].exp().flatten(0, 1).mean(0)
            layer = traj.layers[i]
            assert scores.value(name, layer, "bias") == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
            assert scores.value(name, layer, "kl") == pytest.approx(float(traj.kl[i, :, 1:].mean()), abs=1e-6)
            assert scores.value(name, layer, "top1") == pytest.approx(
                float((z.argmax(-1) == final.argmax(-1))[:, 1:].double().mean())
            )
            assert scores.value(name, layer, "cross_entropy") == pytest.approx(-float(score[:, 1:].mean()), abs=1e-6)
    for i, (a, b) in enumerate(zip(whole["logit"], whole["tuned"], strict=True)):
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        for kind, value in (("kl", S.kl(p, q)), ("js", S.js(p, q)), ("tv", S.tv(p, q))):
            assert near(both.divergence("logit", "tuned", kind)[i], value), kind
        assert near(both.divergence("tuned", "logit", "kl")[i], S.kl(q, p))


@pytest.mark.parametrize("change", ["hook", "head", "clean"])
def test_runs_whose_logits_are_given_or_whose_head_is_whole_read_the_same(change, monkeypatch):
    model = _float64("gpt2")
    lens, double = tll.Lens(model, zoo.random_maps(model)), ("unembed.hook_out", lambda x, hook: 2 * x)
    _blocks(monkeypatch, model, 50, 3)
    if change == "hook" and double[0] not in model.hook_dict:
        pytest.skip("HookedTransformer has no hook after its unembedding")
    if change == "head":
        expected = tll.trajectory(model, lens, TOKENS)
        monkeypatch.setitem(unembed._CUTS, model, False)
        got = tll.trajectory(model, lens, TOKENS)
    elif change == "hook":  # the pass' own logits are changed, so the last row is, and the teacher
        got = tll.trajectory(model, lens, TOKENS, hooks=[double])
        p = (2 * tll.run(model, TOKENS)).softmax(-1)
        assert torch.allclose(got.entropy[-1].double(), -(p * p.log()).sum(-1), atol=1e-6) and (got.kl[-1] == 0).all()
        return
    else:
        hooks = [tll.patch(1, tll.edits.scale(1.5))]
        expected, got = (
            tll.trajectory(model, lens, TOKENS, hooks=hooks),
            tll.trajectory(model, lens, TOKENS, hooks=hooks, teacher="clean"),
        )
        clean = tll.run(model, TOKENS).log_softmax(-1)
        other = tll.run(model, TOKENS, hooks).log_softmax(-1)
        assert torch.allclose(got.kl[-1].double(), S.kl(clean, other), atol=1e-6) and (got.kl[-1] > 1e-4).any()
    for name in set(got.stats) - ({"kl"} if change == "clean" else set()):
        assert torch.allclose(got.stats[name].double(), expected.stats[name].double(), atol=1e-6, equal_nan=True), name
    assert torch.equal(got.top_ids, expected.top_ids)


@pytest.mark.parametrize("d_vocab", [1, 63, 64, 1279, 1280, 1281, 5000, 5056])
@pytest.mark.parametrize("k", [0, 1, 10])
def test_the_largest_are_those_of_topk_over_borders_of_groups_and_with_ties(d_vocab, k):
    generator = torch.Generator().manual_seed(d_vocab)
    k = min(k, d_vocab)
    for x in (torch.randn(6, d_vocab, generator=generator), torch.randint(4, (6, d_vocab), generator=generator).double(), torch.arange(d_vocab).float().expand(2, -1), -torch.arange(d_vocab).float().expand(2, -1)):  # fmt: skip
        ids, values = S.largest(x, k)
        assert torch.equal(values, x.topk(k).values) and torch.equal(x.gather(-1, ids), values)
        assert all(len(set(row.tolist())) == k for row in ids)
        if k:
            assert torch.equal(x.gather(-1, S.likeliest(x)[:, None])[:, 0], x.amax(-1))


def test_tokens_outside_a_padded_vocabulary_have_no_probability():
    z = torch.cat([torch.randn(2, 9, generator=torch.Generator().manual_seed(0)), torch.full((2, 5), -torch.inf)], 1)
    logp, p = S.distribution(z)
    assert (p[:, 9:] == 0).all() and torch.allclose(S.entropy(logp, p), S.entropy(z[:, :9].log_softmax(-1)))


def test_ranks_of_several_tokens_are_those_of_each():
    logits = torch.randint(9, (7, 50), generator=torch.Generator().manual_seed(1)).float()  # many ties
    targets = torch.randint(-1, 50, (7, 3), generator=torch.Generator().manual_seed(2))
    larger = (logits[:, None] > logits.gather(1, targets.clamp_min(0))[..., None]).sum(-1)
    each = torch.where(targets >= 0, larger + 1, -1)
    assert torch.equal(S.ranks(logits, targets, S.Rooms()), each)
    assert torch.equal(S.ranks(logits.double(), targets, S.Rooms()), each)
    assert S.ranks(logits, targets[:, :0], S.Rooms()).shape == (7, 0)


def test_a_room_is_one_memory_until_a_larger_one_is_asked_for():
    rooms, x = S.Rooms(), torch.zeros(4, 5)
    first = rooms.like("a", x)
    assert rooms.like("a", x[:2]).data_ptr() == first.data_ptr() != rooms.like("b", x).data_ptr()
    assert rooms.like("a", x.half()).dtype == torch.float32 and rooms.like("a", x.double()).dtype == torch.float64
    assert rooms.like("b", torch.zeros(9, 5)).shape == (9, 5) and rooms.like("a", torch.zeros(2, 3)).shape == (2, 3)


def test_pairs_of_distributions_at_once_are_those_one_by_one():
    generator = torch.Generator().manual_seed(0)
    logp, logq = (torch.randn(4, 90, generator=generator, dtype=torch.float64).mul(6).log_softmax(-1) for _ in range(2))
    padded = torch.cat([logp[:, :80], torch.full((4, 10), -torch.inf)], 1).log_softmax(-1)
    for a, b in ((logp, logq), (logp, logp + 1e-9), (padded, padded), (padded, logq)):
        got = S.pairwise(a.exp(), b.exp(), a, b)
        for kind, value in (("kl", S.kl(a, b)), ("reverse", S.kl(b, a)), ("js", S.js(a, b)), ("tv", S.tv(a, b))):
            assert torch.allclose(got[kind], value, atol=1e-12), kind


class _Widest(TorchDispatchMode):
    """The most rows of logits that an operation makes or looks at; views of the weights are none."""

    def __init__(self, model):
        super().__init__()
        self.most, self.d_vocab = 0, model.cfg.d_vocab
        self.weights = {w.untyped_storage().data_ptr() for w in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.d_vocab,):
                if x.untyped_storage().data_ptr() not in self.weights:
                    self.most = max(self.most, x.numel() // self.d_vocab)
        return out


@pytest.mark.parametrize("positions", [20, 60])
def test_no_more_logits_exist_than_there_is_room_for(model, positions, monkeypatch):
    lens = {"a": tll.Lens(model), "b": tll.Lens(model, zoo.random_maps(model))}
    d_vocab, tokens = model.cfg.d_vocab, zoo.tokens(4, positions)
    tll.evaluate(model, lens, tokens)  # what is done once per model
    monkeypatch.setitem(decode.ROOM, "cpu", 24 * d_vocab * 4)
    monkeypatch.setitem(decode.PIECE, "cpu", 2 * d_vocab * 4)
    for read in (tll.evaluate, tll.trajectory):
        with _Widest(model) as seen:
            read(model, lens, tokens)
        assert 12 <= seen.most <= 24, (read, seen.most)
        monkeypatch.setitem(decode.ROOM, "cpu", 6 * d_vocab * 4)
        with _Widest(model) as seen:
            read(model, lens, tokens)
        assert seen.most <= 7, (read, seen.most)  # a position with its teacher needs as many
        monkeypatch.setitem(decode.ROOM, "cpu", 24 * d_vocab * 4)


def test_a_model_is_tried_out_as_always_where_its_logits_are_left_out(model):
    from tl_lenses.model import _PADDING

    expected = padding_of(model)
    del _PADDING[model]
    with Readout(model).without_logits([]):
        assert padding_of(model) == expected
