"""The experiments on cases whose answer is known: planted scores, tiny models whose words are known, and the published protocol.

The models here are random, so what an experiment finds on them is checked against a computation by hand and not against the
paper; what must hold on any model (the identity patch is the model, a shuffled source is another item's) is checked as such.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import experiments as E
from tl_lenses.experiments import Fact, attributes, common, cross_model, entities, facts, multihop, next_token, read_facts
from tl_lenses.experiments.common import MEAN, PATCHED, RANDOM, SHUFFLED, UNPATCHED, Cells, Result, others, random_like
from tl_lenses.experiments.patchscopes.attributes import probe
from tl_lenses.experiments.patchscopes.entities import clipped, read_descriptions


@pytest.fixture(scope="module")
def lab():
    return tll.lab.load()


def continued(model, target, new, vectors=None, pair=(0, 0)):
    """What a patched prompt says: one cell, by the patching primitive."""
    tokens = model.to_tokens(target.prompt, prepend_bos=True)
    edit = [] if vectors is None else [tll.patch(tll.site(model, pair[1]), tll.edits.replace(vectors), pos=target.pos)]
    ids = tll.generate(model, tokens, edit, new, stop_at_eos=False)[0, tokens.shape[1] :]
    return model.tokenizer.decode(ids.tolist()).split(model.tokenizer.eos_token)[0].split("\n")[0]


# --- scores of cells


def planted(n=40, cells=12, best=5, seed=0):
    """Noise everywhere at 0.3, one cell at 0.9."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, cells, generator=generator) < 0.3).float()
    x[:, best] = (torch.rand(n, generator=generator) < 0.9).float()
    pairs = [(i // 4, i % 4) for i in range(cells)]
    return Cells(pairs, {PATCHED: x, UNPATCHED: torch.zeros(n, 1)}, list(range(n)))


def test_the_three_numbers_of_planted_scores():
    cells = planted()
    x, summary = cells.scores[PATCHED], cells.summary()
    assert summary.oracle == pytest.approx(float(x.any(1).float().mean())) and summary.best_cell == (1, 1)
    assert summary.best == pytest.approx(float(x[:, 5].mean())) and summary.held_out == pytest.approx(summary.best)
    assert cells.summary(UNPATCHED) == common.Summary(0.0, 0.0, None, 0.0)


def test_the_held_out_cell_does_not_profit_from_noise():
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(60, 400, generator=generator) < 0.2).float()
    summary = Cells([(i, 0) for i in range(400)], {PATCHED: x}, list(range(60))).summary()
    assert summary.oracle == 1.0 and summary.best > 0.33  # of nothing but noise
    assert abs(summary.held_out - 0.2) < 0.1


def test_items_of_one_group_stay_in_one_half():
    # Each subject's prompts have a cell of their own: what is chosen on other subjects is never right.
    x = torch.eye(4).repeat_interleave(10, 0)
    pairs, subjects = [(i, i) for i in range(4)], [i // 10 for i in range(40)]
    assert Cells(pairs, {PATCHED: x}, subjects).summary().held_out == 0.0
    assert Cells(pairs, {PATCHED: x}, list(range(40))).summary().held_out > 0  # a subject in both halves gives it away


def test_a_single_group_has_no_held_out_cell():
    assert math.isnan(Cells([(0, 0)], {PATCHED: torch.ones(3, 1)}, [0, 0, 0]).summary().held_out)


def test_no_items_have_no_numbers():
    assert math.isnan(Cells([(0, 0)], {PATCHED: torch.ones(0, 1)}, []).summary().oracle)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"are \[2, 3\]: expected \[2, 2\] or one column"):
        Cells([(0, 0), (1, 1)], {PATCHED: torch.ones(2, 3)}, [0, 1])


def test_chosen_cells_limit_the_best_one():
    assert replace(planted(), chosen=[0, 1, 2]).summary().best_cell in [(0, 0), (0, 1), (0, 2)]


def test_a_layer_is_right_where_any_target_layer_is():
    cells = planted()
    by_layer = cells.by_source_layer()
    assert list(by_layer) == [0, 1, 2]
    assert by_layer[1] == pytest.approx(float(cells.scores[PATCHED][:, 4:8].any(1).float().mean()))


def test_random_vectors_have_the_norms_and_no_more():
    x = torch.randn(5, 4, 16)
    y = random_like(x)
    assert torch.allclose(x.norm(dim=-1), y.norm(dim=-1), rtol=1e-5)
    assert (torch.cosine_similarity(x, y, dim=-1).abs() < 0.95).all() and torch.equal(y, random_like(x))


def test_a_shuffled_source_has_another_answer():
    answers = list("aabbbc")
    assert all(answers[i] != answers[j] for i, j in enumerate(others(answers)))
    with pytest.raises(ValueError, match="two different answers"):
        others(["a", "a"])


def test_controls_of_some_items_are_those_of_all_items():
    vectors = common.Controlled.of(torch.randn(4, 3, 8), list("aabc"))
    continued = lambda source: list(source.prompt)  # the vectors themselves
    together = vectors.ask(continued)
    assert list(together) == [PATCHED, SHUFFLED, RANDOM, MEAN] and all(len(rows) == 4 for rows in together.values())
    for i in range(4):
        assert torch.equal(together[PATCHED][i], vectors.vectors[i])
        assert torch.equal(together[SHUFFLED][i], vectors.vectors[vectors.shuffled[i]])
        for name, (row,) in vectors.ask(continued, [i]).items():
            assert torch.equal(row, together[name][i]), (name, i)
    part = vectors.ask(continued, [3, 1])
    assert all(torch.equal(part[name][k], together[name][i]) for name in part for k, i in enumerate((3, 1)))


@pytest.mark.parametrize("experiment", [attributes, entities, multihop])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": [20]}, ValueError, "no layer 20: this model has layers 0..3"),
        ({"n": 1}, ValueError, "n must be at least 2, got 1"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be a whole number, got True"),
    ],
)
def test_settings_are_checked_before_anything_runs(model, experiment, settings, error, message):
    with pytest.raises(error, match=message):
        experiment(model, **settings)


@pytest.mark.parametrize("experiment", [attributes, entities, multihop])
def test_the_old_name_of_n_is_n(model, experiment):
    with (
        pytest.warns(DeprecationWarning, match="is called n now"),
        pytest.raises(ValueError, match="at least 2, got 0"),
    ):
        experiment(model, limit=0)


def test_the_name_of_the_facts(tmp_path):
    content = {"prompt_templates": ["{} has"], "samples": [{"subject": "Peru", "object": "Lima"}]}
    (tmp_path / "capital.json").write_text(json.dumps(content))
    assert facts.facts_of(tmp_path / "capital.json") == ([Fact("capital", "Peru", "Lima", "{} has")], "capital.json")
    bundled = read_facts()
    assert facts.facts_of(None) == (bundled, "bundled facts") and facts.facts_of(bundled) == (bundled, "39 facts")


# --- texts and facts


@pytest.mark.parametrize(
    ("text", "word", "there"),
    [
        ("the city of  SAO\n Paulo.", "São Paulo", True),
        ("ﬁsh", "Fish", True),
        ("bananas", "banana", True),
        ("a woman", "Oman", False),
        ("Romania", "mania", False),
        ("", "a", False),
    ],
)
def test_an_answer_is_a_normalised_beginning_of_words(text, word, there):
    assert facts.contains(text, word) is there


def test_the_guard_names_the_reason():
    fact = Fact("r", "Mexico", "Mexico City", "The capital of {} is")
    assert facts.contaminated(fact, "The capital of x is", "Mexico City, of course") == "in the unpatched text"
    assert facts.contaminated(fact, "Of Mexico City and Rome, x has", "no") == "in the target prompt"
    assert facts.contaminated(replace(fact, object="Mexico"), "x", "no") == "in the subject"
    assert facts.contaminated(fact, "The capital of x is", "no") == ""


@pytest.fixture
def papers(tmp_path):
    """Facts as the paper's files have them: quoted, with newlines, twice, and one whose subject is not in its text."""
    file = tmp_path / "factual" / "food_from_country.tsv"
    file.parent.mkdir()
    columns = "prompt_target object subject generations_baseline prompt_source position_source source_cropped_toks"
    rows = [
        ["The country of origin for x", "Italy", "cat", '"said\n""this"""', "the cat and the cat sat", "9", '"[\' the\', \' cat\', \' and\', \' the\', \' cat\']"'],
        ["The country of origin for x", "Italy", "cat", "a", "the cat sat", "9", "\"[' the'\n ' cat']\""],
        ["The country of origin for x", "Italy", "cat", "a", "the cat sat", "9", "\"[' the'\n ' cat']\""],
        ["The country of origin for x", "Italy", "cat", "a", "no such word", "9", "[]"],
    ]  # fmt: skip
    file.write_text("\n".join("\t".join(row) for row in [columns.split(), *rows]))
    return read_facts(tmp_path)


def test_facts_of_the_paper_are_read_once_each(papers):
    assert [(f.relation, f.template, f.text, f.occurrence) for f in papers] == [
        ("food_from_country", "The country of origin for {}", "the cat and the cat sat", 1),
        ("food_from_country", "The country of origin for {}", "the cat sat", 0),
    ]


def test_the_position_of_a_fact_is_where_its_subject_ends(model, papers):
    for fact, end in zip(papers, ("the cat and the cat", "the cat"), strict=True):
        assert facts.source_of(model, fact).pos == model.to_tokens(end, prepend_bos=True).shape[1] - 1


def test_facts_of_lre_are_read(tmp_path):
    content = {"prompt_templates": ["{} has", "The capital of {} is"], "samples": [
        {"subject": "Brazil", "object": r"Bras\u00edlia"}, {"subject": "Brazil", "object": "Rio"}]}  # fmt: skip
    (tmp_path / "capital.json").write_text(json.dumps(content))
    assert read_facts(tmp_path) == [Fact("capital", "Brazil", "Brasília", "The capital of {} is")]


@pytest.mark.parametrize("answer", ["", " ", "?", "\u0301"])
def test_a_fact_whose_answer_every_text_has_is_refused(answer, unchecked):
    with pytest.raises(ValueError, match="the fact of 'Peru' has the object"):
        E.Fact("capital", "Peru", answer, "{} has")


def test_there_are_bundled_facts():
    bundled = read_facts()
    assert {fact.relation for fact in bundled} == {"country_capital_city", "food_from_country"} and len(bundled) == 39
    assert len(facts.two_hops(bundled)) > 10


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "expected .tsv files of the paper or .json files of LRE"),
        ("", "", "expected .tsv files of the paper or .json files of LRE"),
        ("a.json", "{}", "no prompt_templates and samples"),
        ("a.tsv", "a\tb\n1\t2\n", "has no columns"),
    ],
    ids=["no folder", "empty", "json", "tsv"],
)
def test_a_folder_without_facts_is_refused(tmp_path, file, content, message):
    if file is not None:
        (tmp_path / "facts").mkdir()
    if file:
        (tmp_path / "facts" / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_facts(tmp_path / "facts")


def facts_beside(shared, name):
    if not (shared / "tasks" / name).is_dir():
        pytest.skip("no data sets beside the checkout")
    return read_facts(shared / "tasks" / name)


def test_every_file_of_the_paper_is_read(shared):
    listed = facts_beside(shared, "patchscopes-preprocessed")
    assert len({fact.relation for fact in listed}) == 22 and len(listed) == 13_800
    assert sum(fact.relation == "person_mother" for fact in listed) > 3500


def test_every_file_of_lre_is_read(shared):
    relations = {fact.relation for fact in facts_beside(shared, "lre-relations")}
    assert relations >= {"country_capital_city", "word_first_letter"} and len(relations) == 47


def test_the_placeholder_is_found_behind_a_bos_that_spells_it(lab):
    target = facts.target_of(lab, "{} originates from the country of")  # "<|endoftext|>" has an x
    assert target.pos == 1 and lab.tokenizer.decode(lab.to_tokens(target.prompt, prepend_bos=True)[0, 1:2].tolist()) == "x"
    target = facts.target_of(lab, "The exact text of {} is")
    assert lab.tokenizer.decode(lab.to_tokens(target.prompt, prepend_bos=True)[0, target.pos :].tolist()) == " x is"
    with pytest.raises(ValueError, match="expected a template"):
        facts.target_of(lab, "no subject")


# --- next-token prediction


def test_next_token_against_the_computation_by_hand(model):
    tokens = zoo.tokens(6, 10)
    report = next_token(model, tokens, n=12, per_row=2, layers=[1, 3])
    assert report.layers == [1, 3] and len(report.cells.groups) == 12
    # The last layer is the model: always right, and its surprisal is the model's own.
    assert report.cells.scores["token identity"][:, -1].all() and report.cells.scores["logit lens"][:, -1].all()
    logits = tll.run(model, tokens).detach()
    scope = tll.scopes.token_identity()
    generator = torch.Generator().manual_seed(0)
    at = 0
    for row in range(6):
        for column in (torch.randperm(9, generator=generator)[:2] + 1).tolist():
            seen = {}
            tll.run(model, tokens[row], [tll.read(1, seen, pos=column)])
            patched = tll.run(model, scope.prompt, [tll.patch(1, tll.edits.replace(seen[1][0, 0]), pos=-1)])[0, -1]
            of_model, answer = logits[row, column].log_softmax(-1), int(patched.argmax())
            assert report.cells.scores["token identity"][at, 0] == float(answer == int(of_model.argmax()))
            # The paper's direction: the model's surprise at the patched answer.
            assert float(report.surprisal["token identity"][at, 0]) == pytest.approx(-float(of_model[answer]), abs=1e-4)
            lens = tll.Lens(model)[1](seen[1][0, 0]).argmax()
            assert report.cells.scores["logit lens"][at, 0] == float(int(lens) == int(of_model.argmax()))
            at += 1


def test_controls_of_next_token(model):
    report = next_token(model, zoo.tokens(20, 12), n=60, layers=[1, 2, 3])
    assert list(report.cells.scores)[-4:] == [SHUFFLED, RANDOM, MEAN, UNPATCHED]
    # Another position has another answer: in the last layer the control is the truth of that one, never this one's.
    assert not report.cells.scores[SHUFFLED][:, -1].any()
    assert report.cells.scores["token identity"][:, -1].all()
    assert report.cells.scores[UNPATCHED].shape == (60, 1) and float(report.cells.scores[UNPATCHED].mean()) < 0.2
    assert 3 not in [report.cells.summary(name).best_cell[0] for name in ("token identity", "logit lens")]


def test_a_fitted_lens_stands_beside_it(model, maps):
    report = next_token(model, zoo.tokens(6, 10), {"regression": tll.Lens(model, maps)}, n=10)
    assert report.methods == ["token identity", "logit lens", "regression"]
    assert report.cells.scores["regression"].shape == (10, 4)


def test_a_lens_cannot_take_the_name_of_a_control(model):
    with pytest.raises(ValueError, match="may not be called 'unpatched'"):
        next_token(model, zoo.tokens(), {"unpatched": tll.Lens(model)})


def test_one_position_is_too_few(model):
    with pytest.raises(ValueError, match="fewer than two positions"):
        next_token(model, zoo.tokens(1, 2), n=5)


# --- attribute extraction


@pytest.fixture(scope="module")
def asked(lab):
    some = [fact for fact in read_facts() if fact.relation == "country_capital_city"][:8]
    return attributes(lab, some, layers=[0, 3], target_layers=[0, 1], max_new_tokens=5, n=None)


def test_attributes_against_the_computation_by_hand(lab, asked):
    assert asked.cells.pairs == [(0, 0), (0, 1), (3, 0), (3, 1)] and len(asked.facts) >= 4
    vectors = common.vectors_of(lab, [facts.source_of(lab, fact) for fact in asked.facts])
    target = facts.target_of(lab, asked.facts[0].template)
    for i, fact in enumerate(asked.facts[:3]):
        ids = lab.to_tokens(fact.subject, prepend_bos=True)
        for c, (a, b) in enumerate(asked.cells.pairs):
            seen = {}
            tll.run(lab, ids, [tll.read(a, seen, pos=-1)])
            assert torch.allclose(vectors[i, a], seen[a][0, 0], atol=1e-4)
            text = continued(lab, target, 5, seen[a][0, 0], (a, b))
            assert asked.cells.scores[PATCHED][i, c] == float(facts.contains(text, fact.object)), (fact, a, b, text)


def test_controls_of_attributes_are_worse_than_the_real_vector(lab, asked):
    summary = asked.cells.summary()
    assert summary.best > 0.7
    for control in (SHUFFLED, RANDOM, MEAN, UNPATCHED):
        assert asked.cells.summary(control).best < summary.best - 0.3
    # A shuffled source is another item of the same run: what it says is right for that one.
    rows = others([fact.object for fact in asked.facts])
    vectors = common.vectors_of(lab, [facts.source_of(lab, fact) for fact in asked.facts])
    target = facts.target_of(lab, asked.facts[0].template)
    text = continued(lab, target, 5, vectors[rows[0], 0], (0, 0))
    assert asked.cells.scores[SHUFFLED][0, 0] == float(facts.contains(text, asked.facts[0].object))


CAPITAL = "The capital of {} is the city of"
WRONG = Fact("country_capital_city", "Peru", "Zzyzx", CAPITAL)


@pytest.fixture(scope="module")
def guarded(lab):
    """Facts that the model knows, one that it does not, and some whose answer stands in the target prompt."""
    right = [fact for fact in read_facts() if fact.relation == "country_capital_city"][:6]
    listed = [replace(fact, relation="listed", template=f"Of Paris, Ottawa and Rome, {CAPITAL}") for fact in right]
    return attributes(lab, [*right, WRONG, *listed], layers=[0], target_layers=[0], max_new_tokens=5, n=None)


def test_only_what_the_model_knows_is_asked(guarded):
    assert "Zzyzx" not in [fact.object for fact in guarded.facts]
    assert guarded.left_out["country_capital_city"]["that the model does not know"] >= 1


def test_an_answer_in_the_target_prompt_is_not_asked(guarded):
    assert any("target prompt" in reason for reason in guarded.left_out["listed"])
    assert not {fact.object for fact in guarded.facts if fact.relation == "listed"} & {"Paris", "Ottawa", "Rome"}


def test_facts_that_the_model_does_not_know_are_refused(lab):
    with pytest.raises(ValueError, match="does not know them"):
        attributes(lab, [WRONG], layers=[0], max_new_tokens=2)


@pytest.mark.parametrize("folder,relations,asked_of", [("patchscopes-preprocessed", 22, 5), ("lre-relations", 47, 8)])
def test_attributes_of_every_relation_beside_the_checkout(lab, shared, folder, relations, asked_of):
    """Every relation is asked for, or says why it is not. Of the present lab-gpt2 11 and 17 are; half of that is room."""
    listed = facts_beside(shared, folder)
    names = {fact.relation for fact in listed}
    assert len(names) == relations
    result = attributes(lab, listed, layers=[0], target_layers=[0], n=relations, max_new_tokens=4, show_progress=False)
    assert set(result.left_out) == names and len(result.relations) >= asked_of
    assert all(name in result.relations or sum(result.left_out[name].values()) for name in names)


def test_the_probe_finds_a_planted_direction_and_nothing_in_noise():
    x = torch.randn(60, 2, 32, generator=torch.Generator().manual_seed(0))
    x[:, 1, :3] += 6 * torch.nn.functional.one_hot(torch.arange(60) % 3, 3)  # layer 1 has it
    right = probe(x, [str(i % 3) for i in range(60)])
    assert right[:, 1].mean() > 0.95 and right[:, 0].mean() < 0.6


def test_an_answer_that_no_other_fold_has_cannot_be_named():
    assert not probe(torch.randn(6, 2, 32), list("abcdef")).any()


# --- entity resolution


def test_entities_against_the_computation_by_hand(lab):
    descriptions = {k: v for k, v in read_descriptions().items() if v.startswith("food")}
    target = tll.Target("Kimchi: food from South Korea, Sushi: food from Japan, x")
    kept = {k: v for k, v in list(descriptions.items())[:6] if k not in ("Kimchi", "Sushi")}
    report = entities(lab, kept, target=target, layers=[0, 1, 4], max_new_tokens=8)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for i, name in enumerate(report.names):
        for c, layer in enumerate(report.layers):
            seen = {}
            tll.run(lab, name, [tll.read(tll.site(lab, layer), seen, key=0, pos=-1)])
            text = clipped(continued(lab, target, 8, seen[0][0, 0], (layer, layer)))
            want = scorer.score(kept[name], text)["rougeL"].fmeasure
            assert report.texts[i][c] == text and float(report.cells.scores[PATCHED][i, c]) == pytest.approx(want)
    assert report.cells.summary().best > report.cells.summary(RANDOM).best
    assert report.cells.summary(UNPATCHED).best_cell is None
    result = tll.patchscope(lab, list(report.names), target, [0, 1, 4], max_new_tokens=8)
    by_hand = tll.faithfulness(result, controls=[], among=10).grid.at(condition="vector")["identified"]
    assert report.identified.mean(0).tolist() == pytest.approx(by_hand.tolist()) and by_hand[0] > by_hand[2]
    assert [row["score"] for row in report.rows() if row["condition"] == "identified"] == pytest.approx(by_hand.tolist())
    assert "identified" in str(report)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (": food from Italy, Sushi: food from Japan", "food from Italy"),
        ("y: a type of pasta\nmore", "a type of pasta"),
        ("no colon", "no colon"),
    ],
)
def test_a_description_ends_before_the_next_one(text, kept):
    assert clipped(text) == kept


@pytest.mark.parametrize("name,content", [("a.csv", "subject,description\nPizza,food\n"), ("b.json", '{"Pizza": "food"}')])
def test_descriptions_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_descriptions(tmp_path / name) == {"Pizza": "food"}


@pytest.mark.parametrize(
    ("name", "message"), [("c.csv", "no columns subject and description"), ("none.csv", "expected a .json or .csv")]
)
def test_a_file_without_descriptions_is_refused(tmp_path, name, message):
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=message):
        read_descriptions(tmp_path / name)


def test_few_entities_are_refused(model):
    with pytest.raises(ValueError, match="too few to score"):
        entities(model, {"a": "b", "c": "d", "e": "f", "g": "h"})


# --- between models


def test_a_model_into_itself_through_identity_maps(model):
    """Patching a prompt's own vector changes nothing: P@1 is 1 in the diagonal cells, and another vector breaks it."""
    depth, d = 3, 32
    rows = [(f"blocks.{i}.hook_resid_pre", f"blocks.{i}.hook_resid_pre") for i in range(1, depth)]
    rows.append((f"blocks.{depth - 1}.hook_resid_post",) * 2)
    eye = torch.eye(d).expand(len(rows), d, d).clone()
    identity = tll.Translators(rows, eye, torch.zeros(len(rows), d), n_layers=depth)
    report = cross_model(model, model, identity, zoo.tokens(10, 12), n=10)
    assert report.cells.pairs == [(1, 1), (2, 2), (3, 3)]
    assert report.cells.scores[PATCHED].all() and report.kept.scores[PATCHED].all()
    assert report.cells.scores[UNPATCHED].all()  # the two models agree everywhere
    assert report.cells.mean(SHUFFLED)[-1] == 0 and report.cells.mean(RANDOM)[-1] < 0.5
    assert report.scope.mean(PATCHED)[-1] == 1 and report.scope.summary(UNPATCHED).best < 0.5
    drawn = {row["target"] for row in report.rows()}
    assert len(drawn) == 3 and "P@1, same prompt, same place" in " ".join(str(report).split())


# --- two hops


def test_multihop_against_the_computation_by_hand(lab):
    report = multihop(lab, read_facts(), layers=[0, 4], target_layers=[0, 1], max_new_tokens=5, n=4)
    assert list(report.forms) == ["placeholder", "same prompt", "masked"] and len(report.queries) >= 2
    assert report.plain["first hop"].all() and report.plain["second hop"].all()  # or they would not be here
    first, second = report.queries[0]
    assert first.object == second.subject
    target = facts.target_of(lab, second.template)
    for c, (a, b) in enumerate(report.cells.pairs):
        seen = {}
        tll.run(lab, first.template.format(first.subject), [tll.read(a, seen, pos=-1)])
        text = continued(lab, target, 5, seen[a][0, 0], (a, b))
        assert report.cells.scores[PATCHED][0, c] == float(facts.contains(text, second.object))
    hops = tll.methods.multihop(lab, first.phrase.format(first.subject), second.template.split("{}")[0], masked=True)
    masked = tll.patchscope(lab, **hops, layers=[0, 4], target_layers=[0, 1], max_new_tokens=5)
    want = [float(facts.contains(text.split("\n")[0], second.object)) for text in masked.text[0]]
    assert report.forms["masked"].scores[PATCHED][0].tolist() == want


def test_a_patch_that_must_make_two_hops(lab):
    """The first question is the bare name of the country, so the early cells have its capital, and shuffled ones have not."""
    from tl_lenses.experiments.patchscopes.multihop import into_placeholder

    capitals = [fact for fact in read_facts() if fact.object in ("Paris", "Rome", "Tokyo", "Madrid")]
    queries = [(Fact("name", second.subject, "nothing", "{}", phrase="{}"), second) for second in capitals]
    scores = into_placeholder(lab, queries, [(0, 0), (1, 0)], 5, 0)
    assert scores[PATCHED][:, 0].mean() >= 0.75
    assert scores[SHUFFLED][:, 0].mean() <= 0.25 and not scores[UNPATCHED].any()


def test_multihop_refuses_what_it_cannot_ask(lab):
    with pytest.raises(ValueError, match="forms must be"):
        multihop(lab, read_facts(), forms=["both"])
    with pytest.raises(ValueError, match="0 of 0 two-hop queries are left"):
        multihop(lab, [fact for fact in read_facts() if not fact.phrase])


# --- results


@pytest.fixture(scope="module", params=["next-token", "attributes"])
def report(request, model, asked):
    return asked if request.param == "attributes" else next_token(model, zoo.tokens(6, 10), n=8)


@pytest.mark.parametrize("control", [SHUFFLED, RANDOM, MEAN, UNPATCHED])
def test_every_control_is_in_text_and_frame(report, control):
    assert control in str(report) and control in set(report.to_frame()["condition"])


def test_a_result_has_its_three_numbers(report):
    text = str(report)
    assert "oracle" in text and "best fixed" in text and "held-out" in text and "| oracle |" in report.markdown()


def test_a_result_has_a_row_per_cell(report):
    assert {"condition", "layer", "target_layer", "score", "items"} <= set(report.to_frame().columns)


def test_a_result_saves_its_numbers_with_a_picture(report, tmp_path):
    for _ in range(2):  # over its own files too
        folder = report.save(tmp_path / report.name)
    content = json.loads((folder / "result.json").read_text())
    assert content["experiment"] == report.name and content["rows"] and content["versions"]["torch"]
    assert (folder / "result.csv").read_text().count("\n") == len(report.to_frame()) + 1
    assert (folder / "heat.svg").read_text().startswith("<svg")


def test_a_result_stays_as_it_is(report):
    assert isinstance(report, Result)
    with pytest.raises((AttributeError, TypeError)):
        report.cells = None


def test_a_result_is_drawn_by_plotly(report, tmp_path):
    pytest.importorskip("plotly")
    assert report.figure().data[0].z and (report.save(tmp_path / "a") / "heat.html").exists()


def test_a_result_is_not_saved_over_a_file(asked, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        asked.save(tmp_path / "file")


def commands():
    """The names of `tl-lenses experiment`."""
    from tl_lenses.cli import app  # noqa: F401  registers them
    from tl_lenses.cli.experiment import experiments

    return [command.name for command in experiments.registered_commands]


def test_every_experiment_has_a_command():
    from tl_lenses.experiments import Report

    def below(cls):
        return {cls, *(deeper for sub in cls.__subclasses__() for deeper in below(sub))}

    names = {cls.name for cls in below(Report) if cls.__module__.startswith("tl_lenses.")} - {
        Report.name,
        Result.name,
        "faithfulness",
        "calibration",
    }
    assert set(commands()) == names


CALLS = {
    "next-token": lambda model, lens, **how: E.next_token(model, zoo.tokens(4, 12), {"a": lens}, **how),
    "attributes": lambda model, lens, **how: E.attributes(model, E.read_facts(), **how),
    "entities": lambda model, lens, **how: E.entities(model, {"Paris": "a city", "Rome": "a city"}, **how),
    "multihop": lambda model, lens, **how: E.multihop(model, E.read_facts(), **how),
    "cross-model": lambda model, lens, layers: E.cross_model(
        model, model, fitted(model).translators, zoo.tokens(4, 12), n=4, pairs=[(layer, 1) for layer in layers]
    ),
    "conflict": lambda model, lens, **how: E.conflict(model, model, E.read_facts()[:2], ["a", "b"], **how),
    "quality": lambda model, lens, **how: E.quality(model, {"a": lens}, zoo.tokens(4, 12), **how),
    "transfer": lambda model, lens, **how: E.transfer(model, fitted(model), zoo.tokens(4, 12), **how),
    "fine-tune": lambda model, lens, **how: E.fine_tune(
        model, fitted(model).translators, fitted(model).translators, zoo.tokens(4, 12), **how
    ),
    "gradients": lambda model, lens, **how: E.gradients(model, zoo.tokens(4, 12), **how),
    "sampling": lambda model, lens, **how: E.sampling(model, {"a": lens}, zoo.tokens(2, 6), **how),
    "causal-basis": lambda model, lens, **how: E.causal_basis(model, lens, zoo.tokens(4, 12), k=2, **how),
    "alignment": lambda model, lens, **how: E.alignment(model, {"a": lens}, zoo.tokens(4, 12), k=2, **how),
    "ablations": lambda model, lens, **how: E.ablations(model, zoo.tokens(4, 12), **how),
    "detection": lambda model, lens, **how: E.detection(model, {"a": lens}, [], **how),
    "difficulty": lambda model, lens, **how: E.difficulty(model, {"a": lens}, zoo.tokens(4, 12), [], **how),
    "weights": lambda model, lens, **how: E.weights(model, {"a": lens}, **how),
    "intermediates": lambda model, lens, **how: E.intermediates(model, {"a": lens}, **how),
    "usage": lambda model, lens, **how: E.usage(model, {"a": lens}, **how),
    "compare": lambda model, lens, **how: tll.compare(model, {"a": lens}, zoo.tokens(4, 12), **how),
    "inversion": lambda model, lens, **how: E.inversion(model, {"a": lens}, zoo.tokens(4, 12), n=4, **how),
}


def fitted(model):
    return tll.Lens(model, tll.fit_regression(model, zoo.tokens(20, 12)))


@pytest.mark.parametrize("layer", [20, -20])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_layer_out_of_range_is_the_same_error_in_every_experiment(model, name, layer):
    assert set(CALLS) == set(commands())
    with pytest.raises(ValueError, match=rf"no layer {layer}: this model has layers 0\.\.3"):
        CALLS[name](model, tll.Lens(model), layers=[layer])


@pytest.mark.usefixtures("models_once")
@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_layer_out_of_range_is_the_same_error_in_every_command(name, tmp_path):
    from typer.testing import CliRunner

    from tl_lenses.cli import app

    done = CliRunner().invoke(app, ["experiment", name, "--layers", "20", "--output", str(tmp_path / "out")])
    depth = 8
    assert done.exit_code == 1 and f"no layer 20: this model has layers 0..{6 if name == 'cross-model' else depth}" in done.stderr
    assert not (tmp_path / "out").exists()
