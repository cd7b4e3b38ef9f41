"""Which lens to believe: ranks of unspoken intermediates against a naive loop, and swaps and angles of known directions."""

import functools
import math

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses.experiments import Item, comparison, intermediates, lens_directions, read_items, readout_angle, usage
from tl_lenses.experiments.comparison import Comparison
from tl_lenses.experiments.grid import Grid
from tl_lenses.experiments.which_lens.intermediates import RANDOM, forms_of
from tl_lenses.linearised import Linearised

ITEMS = [
    Item("a", "the cat sat on the mat. the dog ran to the ", ("capital",), "bird"),
    Item("a", "a bird sang in the big green ", ("mat", "cat"), "tree"),
    Item("a", "the dog ran to the mat and the ", ("mat",), "cat"),
    Item("poetry", "the cat sat\nthe dog ran to ", ("his",)),
    Item("typo", "the capital of France is Pris", ("in", "nonsensical")),
]


@functools.cache
def model():
    return zoo.build("gpt2", zoo.FEW_KINDS[0])


@functools.cache
def found():
    lenses = {"logit": tll.Lens(model()), "random fit": tll.Lens(model(), zoo.random_maps(model()))}
    return intermediates(model(), lenses, ITEMS, said=0, k_max=50, show_progress=False)


def test_items_that_prove_nothing_are_left_out():
    assert found().left_out == {"in the prompt": 1, "no single token": 1, "said by the model": 0}
    assert [item.intermediates[0] for item in found().items] == ["capital", "mat", "cat", "his", "in"]
    with pytest.raises(ValueError, match="said=0 keeps what the model says"):
        intermediates(model(), tll.Lens(model()), ITEMS, said=zoo.D_VOCAB, show_progress=False)


def test_ranks_are_those_of_a_naive_loop():
    lens = tll.Lens(model())
    for i, item in enumerate(found().items):
        whole, seen = model().to_tokens(item.prompt + item.target), {}
        pieces = [model().tokenizer.decode(ids) for ids in whole[0].tolist()]
        if item.target:
            column = len(pieces) - 1
            while not "".join(pieces[column:]).startswith((item.target, " " + item.target)):
                column -= 1
            column -= 1
        else:
            column = pieces.index("\n") if item.kind == "poetry" else len(pieces) - 1
        tll.run(model(), whole, [tll.read(layer, seen) for layer in range(3)])
        forms = forms_of(item.intermediates[0], model().tokenizer)
        for layer in range(3):
            logits = lens[layer](seen[layer][0, column])
            best = min(int((logits > logits[form]).sum()) + 1 for form in forms)
            assert int(found().ranks[0, layer, i, 0]) == best


def test_the_score_is_the_closed_form():
    best = found().ranks[..., 0].amin(1)
    expected = (1 - best.double().log() / math.log(50)).clamp_min(0).mean(1)
    assert torch.allclose(found().grid["score"][0], expected)
    assert (found().grid["low"] <= found().grid["score"] + 1e-9).all()


def test_pass_at_k_counts_items():
    best = found().ranks[0, ..., 0].amin(0)
    assert found().pass_at(10)["logit"] == float((best <= 10).double().mean())


def test_random_labels_stand_beside_the_lenses():
    assert RANDOM in found().lenses and found().kinds[0] == "all"
    assert torch.equal(found().grid["above"][:, 0], torch.zeros(4, dtype=torch.float64))


def test_surface_forms_are_single_tokens():
    tokenizer = model().tokenizer
    said = {tokenizer.decode([i]) for i in forms_of("cat", tokenizer)}
    assert " cat" in said and said <= {"cat", " cat", "Cat", " Cat"}
    assert {tokenizer.decode([i]) for i in forms_of("2", tokenizer)} >= {"2"}


def test_items_are_read_from_the_published_files(tmp_path):
    file = tmp_path / "lens-eval-multihop.json"
    file.write_text('{"items": [{"name": "x", "prompt": "p ", "target": "t", "intermediates": ["i"]}]}')
    assert read_items(tmp_path) == [Item("multihop", "p ", ("i",), "t")]
    file.write_text('{"items": [{"name": "x"}]}')
    with pytest.raises(ValueError, match="is no evaluation set"):
        read_items(file)
    assert all(item.target for item in read_items())


# --- decodable against used


@pytest.mark.parametrize("arch,kind", zoo.cases(("gpt2", "llama", "gemma3", "neox"), zoo.FEW_KINDS))
def test_directions_are_the_gradients_of_a_lens(arch, kind):
    """At a held scale: of a logit beside the mean over the vocabulary, up to that scale."""
    small = zoo.build(arch, kind)
    lens, x = tll.Lens(small, zoo.random_maps(small)), torch.randn(small.cfg.d_model).requires_grad_()
    ids = torch.tensor([5, 9])
    with Linearised("detached"):
        hidden = lens[1].hidden(x)
        logits = hidden @ small.W_U
        grads = [torch.autograd.grad(logits[i] - logits.mean(), x, retain_graph=True)[0] for i in ids]
    cosine = torch.nn.functional.cosine_similarity(torch.stack(grads), lens_directions(lens, 1, ids), dim=-1)
    assert torch.allclose(cosine, torch.ones(2), atol=1e-4)


@pytest.mark.parametrize("kind", zoo.AFFINE_KINDS)
def test_a_planted_mediator_has_angle_zero(kind):
    """On a linear model a difference of logits depends on one direction of the state, the exact lens' own."""
    affine, token, seen = zoo.affine_model(kind, torch.float64), torch.tensor([[9]]), {}
    lens = tll.Lens(affine, zoo.exact_maps(affine))
    root = tll.patch(1, lambda x: x.detach().requires_grad_())
    logits = tll.run(affine, token, [root, tll.read(1, seen, detach=False)])[0, -1]
    (mediator,) = torch.autograd.grad(logits[5] - logits[7], seen[1])
    v = lens_directions(lens, 1, torch.tensor([5, 7]))
    angle = readout_angle(v[:1] - v[1:], mediator[0].mT)
    assert angle.degrees < 1e-3 and angle.null[0] > 20 and abs(angle.overlap - 1) < 1e-9
    wrong = readout_angle(lens_directions(tll.Lens(affine), 1, torch.tensor([5])), mediator[0].mT)
    assert wrong.degrees > 20


@pytest.mark.skipif(zoo.TL_VERSION < (4, 3), reason="TransformerLens has this tool from 4.3 on")
def test_a_subspace_that_das_finds_is_near_the_lens_that_is_exact():
    """Which of two tokens is likelier depends on one direction of a linear model's state: DAS is trained to find it."""
    from transformer_lens.tools.analysis import fit_das

    affine = zoo.affine_model("bridge")
    lens = tll.Lens(affine, zoo.exact_maps(affine))
    base, source = torch.randint(zoo.D_VOCAB, (2, 256, 1), generator=torch.Generator().manual_seed(0))
    answer = lambda tokens: affine(tokens)[:, -1, [5, 7]]
    with torch.no_grad():
        targets = answer(source).argmax(-1)
    last = torch.zeros(256, dtype=torch.long)
    das = fit_das(affine, tll.site(affine, 1), base, source, targets, answer, rank=1, base_positions=last, source_positions=last, epochs=15, lr=0.05)  # fmt: skip
    v = lens_directions(lens, 1, torch.tensor([5, 7]))
    angle = readout_angle(v[:1] - v[1:], das)
    assert angle == readout_angle(v[:1] - v[1:], das.basis) == readout_angle(v[:1] - v[1:], das.subspace)
    assert angle.degrees < 25 < angle.null[0]
    assert readout_angle(lens_directions(lens, 1, torch.tensor([9])), das).degrees > 45


def test_the_null_of_an_angle_is_haar():
    drawn = torch.randn(200, 1, 12, generator=torch.Generator().manual_seed(1))
    subspace = torch.eye(12)[:, :3]
    found = [readout_angle(v, subspace, draws=200) for v in drawn]
    inside = sum(angle.null[0] <= angle.degrees <= angle.null[1] for angle in found)
    assert found[0].overlap_null == 3 / 12 and 175 <= inside <= 200
    assert abs(sum(angle.overlap for angle in found) / 200 - 3 / 12) < 0.04


@pytest.fixture(scope="module")
def swapped():
    """What is used of lab-gpt2 at layer 6, by the logit lens and by one that differs in its biases alone."""
    lab = tll.lab.load("lab-gpt2")
    maps = tll.Translators([(6, 8)], torch.eye(256)[None], torch.ones(1, 256), n_layers=8)
    return usage(lab, {"same": tll.Lens(lab, maps, check="warn")}, layers=[6], n=6, show_progress=False).grid


@pytest.mark.slow
def test_a_swap_moves_answers_and_a_random_one_does_not(swapped):
    assert swapped["flips"].tolist() == [[1.0], [1.0]] and swapped["flips_random"].tolist() == [[0.0], [0.0]]
    assert float(swapped["swap"][0]) > 4 * float(swapped["swap_random"][0].abs())


@pytest.mark.slow
def test_an_answer_without_its_direction_is_unlikely(swapped):
    assert float(swapped["ablate"][0]) < -4


@pytest.mark.slow
def test_a_bias_is_in_no_direction(swapped):
    assert torch.allclose(swapped["swap"][0], swapped["swap"][1])


@pytest.mark.slow
@pytest.mark.parametrize("key", ["swap", "flips", "ablate", "swap_random", "flips_random", "ablate_random"])
def test_an_interval_of_swaps_holds_its_mean(swapped, key):
    low, of, high = (swapped[key + end] for end in ("_low", "", "_high"))
    assert bool((low <= of).all() and (of <= high).all())


# --- the comparison


@functools.cache
def compared():
    """Two lenses on a text, all layers, with the unigram guess."""
    lenses = {"logit": tll.Lens(model()), "fit": tll.Lens(model(), zoo.random_maps(model()))}
    return lenses, zoo.tokens(6, 12), tll.compare(model(), lenses, zoo.tokens(6, 12), show_progress=False).rows()


def test_the_comparison_has_the_numbers_of_evaluate():
    lenses, tokens, rows = compared()
    scores = tll.evaluate(model(), lenses, tokens, layers=range(3), show_progress=False)
    for row in rows:
        for key in ("kl", "top1", "cross_entropy", "bias"):
            if row["lens"] != "unigram":
                assert row[key] == pytest.approx(scores.value(row["lens"], row["layer"], key), rel=1e-4, abs=1e-6)


def test_the_comparison_is_within_its_bounds():
    assert all(row["kl_low"] <= row["kl"] <= row["kl_high"] and 0 <= row["ece"] <= 1 for row in compared()[2])


def test_the_unigram_guess_is_the_mean_of_what_the_model_says():
    _, tokens, rows = compared()
    with torch.no_grad():
        logp = tll.run(model(), tokens)[:, 1:].double().log_softmax(-1)
    p, mean = logp.exp(), logp.exp().mean((0, 1))
    unigram = next(row for row in rows if row["lens"] == "unigram")
    assert unigram["kl"] == pytest.approx(float((p * (logp - mean.log())).sum(-1).mean()), rel=1e-5)
    assert unigram["top1"] == pytest.approx(float((logp.argmax(-1) == mean.argmax()).double().mean()))
    assert unigram["cross_entropy"] == pytest.approx(float(-mean.log()[tokens[:, 2:]].mean()), rel=1e-5)


@functools.cache
def one_layer():
    """A lens at layer 1 on twenty rows: its numbers, those of the unigram guess, and all log-probabilities of model and lens."""
    tokens, lens, seen = zoo.tokens(20, 12), tll.Lens(model(), zoo.random_maps(model())), {}
    row, unigram = tll.compare(model(), lens, tokens, layers=[1], seed=3, show_progress=False).rows()
    with torch.no_grad():
        logits = tll.run(model(), tokens, [tll.read(1, seen)])[:, 1:]
        p, q = logits.double().log_softmax(-1), lens[1](seen[1][:, 1:]).double().log_softmax(-1)
    return tokens, row, unigram, p, q


@pytest.mark.parametrize("key", ["kl", "top1", "cross_entropy"])
def test_a_mean_over_positions_has_the_interval_of_resampled_rows(key):
    tokens, row, _, p, q = one_layer()
    by_row = {
        "kl": (p.exp() * (p - q)).sum(-1),
        "top1": (p.argmax(-1) == q.argmax(-1)).double(),
        "cross_entropy": -q[:, :-1].gather(-1, tokens[:, 2:, None])[..., 0],
    }[key].mean(1)
    draws = by_row[torch.randint(20, (1000, 20), generator=torch.Generator().manual_seed(3))].mean(1)
    assert row[key] == pytest.approx(float(by_row.mean()), rel=1e-4)
    assert row[f"{key}_low"] == pytest.approx(float(draws.quantile(0.025)), rel=1e-4, abs=1e-6)
    assert row[f"{key}_high"] == pytest.approx(float(draws.quantile(0.975)), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("key", ["bias", "ece"])
def test_what_is_no_mean_has_the_interval_of_a_jackknife_over_groups_of_rows(key):
    tokens, row, _, p, q = one_layer()

    def bias(rows):
        a, b = (x[rows].exp().mean((0, 1)) for x in (p, q))
        return float((a * (a / b).log()).sum())

    def ece(rows):
        sure, best = q[rows, :-1].exp().max(-1)
        return tll.calibration((best == tokens[rows, 2:]).double(), sure).ece

    of, group = {"bias": bias, "ece": ece}[key], torch.arange(20) % 8
    without = torch.tensor([of(group != g) for g in range(8)])
    wide = 2.365 * float(7 / 8 * (without - without.mean()).square().sum()) ** 0.5
    assert row[key] == pytest.approx(of(group >= 0), rel=1e-4)
    assert row[f"{key}_high"] - row[key] == pytest.approx(wide, rel=1e-2)


def test_bits_per_byte_are_the_cross_entropy_of_a_byte():
    tokens, row, *_ = one_layer()
    ratio = sum(len(model().tokenizer.decode(ids).encode()) for ids in tokens[:, 1:]) / tokens[:, 1:].numel()
    for end in ("", "_low", "_high"):
        assert row[f"bits_per_byte{end}"] == pytest.approx(row[f"cross_entropy{end}"] / math.log(2) / ratio)


def test_the_cost_of_a_lens_is_that_of_its_map_with_the_unembedding():
    _, row, unigram, *_ = one_layer()
    d, vocab = 32, zoo.D_VOCAB
    assert (row["multiply_adds"], row["bytes"]) == (d * d + d * vocab, 4 * (d * d + d))
    assert (unigram["multiply_adds"], unigram["bytes"]) == (0, 4 * vocab)


def test_the_unigram_guess_has_no_bias_but_an_interval():
    unigram = one_layer()[2]
    assert unigram["bias"] == pytest.approx(0, abs=1e-9)
    assert unigram["top1_low"] <= unigram["top1"] <= unigram["top1_high"]


def test_what_a_comparison_keeps_does_not_grow_with_the_text(monkeypatch):
    made = []
    monkeypatch.setattr(comparison, "_grid", lambda *args, real=comparison._grid: made.append(args[:2]) or real(*args))
    for rows in (10, 40):
        tll.compare(model(), tll.Lens(model()), zoo.tokens(rows, 12), layers=[0, 1], show_progress=False)
    wide = [[x.shape for sums in pair for x in sums.marginals.values()] for pair in made]
    assert wide[0] == wide[1] == [(comparison.GROUPS, zoo.D_VOCAB)] * (2 + 1 + 1)
    assert all(x.shape[1] < zoo.D_VOCAB for pair in made for sums in pair for xs in sums.by_row.values() for x in xs)


def test_a_comparison_does_not_depend_on_how_its_text_comes(tmp_path):
    """In batches, once only, or as states that were stored."""
    tokens, lens = zoo.tokens(9, 12), tll.Lens(model(), zoo.random_maps(model()))
    asked = lambda text: tll.compare(model(), lens, text, layers=[1], show_progress=False).rows()
    whole = asked(tokens)
    tll.capture(model(), tokens, [1], tmp_path / "states", dtype="float32", show_progress=False)
    for text in (tokens.split(4), (part for part in tokens.split(2)), tmp_path / "states"):
        for a, b in zip(asked(text), whole, strict=True):
            assert a.pop("lens") == b["lens"]
            assert a == pytest.approx({key: b[key] for key in a}, rel=1e-4, abs=1e-5)


def test_the_calibration_error_is_that_of_a_naive_loop():
    tokens, states = zoo.tokens(6, 12), {}
    row = tll.compare(model(), tll.Lens(model()), tokens, layers=[2], show_progress=False).rows()[0]
    tll.run(model(), tokens, [tll.read(2, states)])
    with torch.no_grad():
        p = tll.Lens(model())[2](states[2][:, 1:-1]).double().softmax(-1)  # the last token has no next one
    sure, best = p.max(-1)
    hits = (best == tokens[:, 2:]).double()
    assert row["ece"] == pytest.approx(tll.calibration(hits, sure).ece, rel=1e-4)


def test_sentences_name_a_lens_only_where_it_beats_its_control():
    tokens, good = zoo.tokens(20, 16), tll.fit_regression(model(), zoo.tokens(60, 16, seed=5))
    far = zoo.random_maps(model())
    far.biases.data *= 1000  # says the same token everywhere
    bad = tll.compare(model(), {"far": tll.Lens(model(), far)}, tokens, layers=[0], show_progress=False)
    assert all("none beats the unigram guess" in text for text in bad.sentences())
    lenses = {"far": tll.Lens(model(), far), "regression": tll.Lens(model(), good)}
    text = tll.compare(model(), lenses, tokens, layers=[2], show_progress=False).sentences()[0]
    assert "regression, KL" in text and "below far in 100% of resampled texts" in text
    both = tll.compare(model(), lenses, tokens, items=ITEMS, said=0, layers=[1, 2], show_progress=False)
    assert any("unspoken" in text for text in both.sentences()) and both.unspoken is not None
    with pytest.raises(ValueError, match="two rows at least"):
        tll.compare(model(), lenses, tokens[:1], show_progress=False)


def _of(kl, bias, ece, adds, rows=20, spread=0.1):
    """A comparison of one layer with these numbers by lens, the unigram guess last; bias and ece as `(value, low, high)`."""
    names = ["logit", "good", "near"][: len(kl) - 1] + ["unigram"]
    made = []
    for i, name in enumerate(names):
        row = {"lens": name, "layer": 4, "kl": kl[i], "multiply_adds": adds[i], "bytes": 2e6 * (i > 0)}
        for key, ends in (("bias", bias[i]), ("ece", ece[i])):
            row |= {f"{key}{end}": x for end, x in zip(("", "_low", "_high"), ends, strict=True)}
        made.append(row)
    noise = torch.linspace(-spread, spread, rows, dtype=torch.float64)
    sums = torch.tensor(kl, dtype=torch.float64)[:, None, None] * 10 + 10 * noise
    counts = torch.full((rows,), 10.0, dtype=torch.float64)
    return Comparison("toy", sums, counts, grid=Grid.of_rows(made, ["lens", "layer"]))


ZERO = (0.0, 0.0, 0.01)


def said_of(adds=(1e6, 9e6, 3e6, 0.0), bias=(ZERO,) * 4, ece=(ZERO,) * 4, **of):
    """Sentences by what they are about."""
    report = _of(bias=bias, ece=ece, adds=adds, **of)
    return dict(text.removeprefix("early, layer 4, ").split(": ", 1) for text in report.sentences())


def test_there_is_a_sentence_of_everything():
    assert list(said_of(kl=[2.0, 0.50, 0.52, 3.0])) == ["next token", "bias", "calibration", "cost"]


def test_the_sentence_of_bias_names_the_smallest():
    said = said_of(kl=[2.0, 0.50, 0.52, 3.0], bias=[(0.9, 0.8, 1.0), (0.2, 0.1, 0.3), (0.25, 0.2, 0.3), ZERO])
    assert said["bias"] == "good, 0.20 (0.10, 0.30) nats, unigram 0.00; near 0.25 (0.20, 0.30), overlapping"


def test_the_sentence_of_calibration_names_the_smallest():
    said = said_of(kl=[2.0, 0.50, 0.52, 3.0], ece=[(0.1, 0.05, 0.15), (0.30, 0.29, 0.31), (0.40, 0.39, 0.41), ZERO])
    assert said["calibration"] == "logit, 0.10 (0.05, 0.15), unigram 0.00; good 0.30 (0.29, 0.31), apart"


@pytest.mark.parametrize(
    ("of", "begins", "ends"),
    [
        ({"kl": [2.0, 0.50, 0.52, 3.0]}, "near, 3.0 M multiply-adds, 2.00 MB; its KL 0.52 is within the interval of good, 0.50 (", ""),
        # nearly the same, but certainly farther: the dear one is the cheapest that is as near
        ({"kl": [2.0, 0.5, 0.52, 3.0], "spread": 1e-3}, "good, 9.0 M multiply-adds, 2.00 MB", "none cheaper is within its interval"),
        ({"kl": [0.4, 0.5, 0.6, 3.0], "spread": 1e-3}, "logit, 1.0 M multiply-adds, 0.00 MB", "none is cheaper"),
        # texts that are all alike: an interval of no width
        ({"kl": [2.0, 0.1, 0.52, 3.0], "rows": 7, "spread": 0.0}, "good, ", ""),
    ],
    ids=["as near", "certainly farther", "nearest", "no width"],
)  # fmt: skip
def test_the_sentence_of_cost_names_the_cheapest_that_is_as_near(of, begins, ends):
    cost = said_of(**of)["cost"]
    assert cost.startswith(begins) and cost.endswith(ends)


def test_the_sentence_of_the_next_token_says_how_sure_its_order_is():
    assert said_of(kl=[0.4, 0.5, 0.6, 3.0], spread=1e-3)["next token"].endswith("below good in 100% of resampled texts")


def test_a_lens_that_says_less_than_the_guess_is_praised_for_nothing():
    zero, some = (0.0, 0.0, 0.01), (0.5, 0.4, 0.6)
    report = _of(kl=[4.0, 5.0, 3.0], bias=[zero, some, zero], ece=[zero, some, zero], adds=[1e6, 2e6, 0.0])
    assert len(report.sentences()) == 4
    assert all("none beats the unigram guess" in text for text in report.sentences())
    report = _of(kl=[4.0, 2.0, 3.0], bias=[zero, some, zero], ece=[zero, some, zero], adds=[1e6, 2e6, 0.0])
    assert [text.split(": ")[1].split(",")[0] for text in report.sentences()] == ["good"] * 4  # logit's 0 is the guess' own


@pytest.mark.parametrize("layer", range(3))
def test_each_layer_has_its_score_beside_that_of_other_labels(layer):
    grid, items = found().grid.at(kind="all"), len(found().items)
    index = torch.randint(items, (1000, items), generator=torch.Generator().manual_seed(0))
    for i, name in enumerate(found().lenses):
        own, other = (1 - found().ranks[i, layer].double().log() / math.log(50)).clamp_min(0).unbind(-1)
        row = next(r for r in grid.rows() if r["lens"] == name and r["layer"] == layer)
        assert row["by_layer"] == pytest.approx(float(own.mean()))
        assert row["by_layer_shuffled"] == pytest.approx(float(other.mean()))
        draws = own[index].mean(1)
        assert row["by_layer_low"] == pytest.approx(float(draws.quantile(0.025)))
        assert row["by_layer_high"] == pytest.approx(float(draws.quantile(0.975)))


def test_the_table_of_layers_ends_on_other_labels():
    table = found().tables()[1]
    assert len(table.rows) == 3 * len(found().lenses) and table.columns[-1] == "shuffled labels"
