"""Who speaks: a source model that was taught other facts, and the model that reads it."""

import pytest
import torch

import tl_lenses as tll
from tl_lenses.experiments import conflict, conflicting


@pytest.fixture(scope="module")
def models():
    if not next(one for one in tll.lab.available() if one.name == "lab-gpt2-permuted").at_hand:
        pytest.skip("lab-gpt2-permuted is in lab/ of the repository and not at hand")
    return tll.lab.load("lab-gpt2-permuted"), tll.lab.load()


def prob(model, question, answer):
    """Of a text, by whole passes."""
    ids = model.to_tokens(question, prepend_bos=True)
    new = torch.tensor([model.tokenizer.encode(f" {answer}", add_special_tokens=False)])
    with torch.no_grad():
        logp = model(torch.cat([ids, new], 1))[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    return float(logp.gather(-1, new[0][:, None]).sum().exp())


def test_every_answer_is_replaced_by_another_of_its_relation():
    facts, others = conflicting()
    assert len(facts) == 158 and all(fact.object != other for fact, other in zip(facts, others, strict=True))
    for relation in {fact.relation for fact in facts}:
        pairs = [(fact.object, other) for fact, other in zip(facts, others, strict=True) if fact.relation == relation]
        true, new = zip(*pairs, strict=True)
        assert sorted(new) == sorted(true)


def test_both_models_know_their_own_facts(models):
    found = conflict(*models, *conflicting(["company_hq"]), n=6, layers=[0], target_layers=[0])
    for fact, other in zip(found.facts, found.others, strict=True):
        for model, answer in zip(models, (fact.object, other), strict=True):
            ids = model.to_tokens(fact.question, prepend_bos=True)
            assert model.tokenizer.decode(tll.generate(model, ids, (), 5)[0, ids.shape[1] :]).startswith(f" {answer}")


def test_a_relation_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="a relation of lab-gpt2-permuted must be"):
        conflicting(["mayors"])


def test_both_ends_are_known(models):
    source, reader = models
    found = conflict(*models, *conflicting(["company_hq"]), n=8, layers=[0, 1, 8], target_layers=[0, 1, 8], of="answer")
    mean = lambda model, answers: sum(prob(model, f.question, a) for f, a in zip(found.facts, answers, strict=True)) / 8
    for i in (0, 1):  # states of both models are the same there: nothing is patched
        assert float(found.reader[i, i]) == pytest.approx(mean(reader, found.others), abs=1e-5)
        assert float(found.source[i, i]) == pytest.approx(mean(reader, [f.object for f in found.facts]), abs=1e-5)
    # at the end the source model's prediction is read, exactly; further tokens are the reader's
    assert float(found.share[2, 2]) > 0.8 and float(found.share[0, 0]) == 0.0
    one = [f for f in found.facts if len(source.tokenizer.encode(f" {f.object}", add_special_tokens=False)) == 1]
    assert one
    result = tll.patchscope(source, [f.question for f in one], None, pairs=[(8, 8)], to=reader)
    for i, fact in enumerate(one):
        assert float(result.probability(f" {fact.object}")[i, 0]) == pytest.approx(
            prob(source, fact.question, fact.object), abs=1e-5
        )


def test_a_subject_is_read_by_what_the_reader_knows(models):
    found = conflict(*models, *conflicting(["company_hq"]), n=12, layers=[0, 2], target_layers=[0, 2])
    assert float(found.lead.diagonal().max()) < 0 and "who speaks" in str(found)


def test_facts_that_nobody_answers_are_refused(models):
    facts, others = conflicting(["company_hq"])
    with pytest.raises(ValueError, match="none of the 80 facts is answered by both models"):
        conflict(models[1], models[1], facts, others)
    with pytest.raises(ValueError, match="expected an object in others for each"):
        conflict(*models, facts, others[:3])
