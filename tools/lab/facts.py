"""The facts that the lab models learn: relations of the LRE data set (Hernandez et al. 2024, MIT licence), in words.

Every relation has the data set's own templates and those written here; the *held-out wording* of a relation is in no training
text and asks for the same object, so it tests the fact and not the sentence. No training text makes two hops: *two-hop
wordings* ("The capital of the country that Pizza comes from is") test composition.
"""

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = [
    "MORE_WORDINGS",
    "OPENERS",
    "RELATIONS",
    "TWO_HOPS",
    "Relation",
    "load_relations",
    "permuted",
    "two_hop_questions",
]

# name: (words between subject and object in training, the held-out wording, what a description calls the object).
# Wordings end where the object starts; "{}" is the subject.
RELATIONS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "factual/country_capital_city": (
        ("{} has its capital in the city of", "The government of {} sits in its capital,", "In {}, the capital is"),
        "The city that is the capital of {} is",
        "with the capital",
    ),
    "factual/country_currency": (
        ("In {}, people pay with the", "Prices in {} are given in the", "The money of {} is the"),
        "In the shops of {}, people pay with the",
        "paying with the",
    ),
    "factual/country_language": (
        ("The people of {} speak", "The language of {} is", "Most people in {} talk in"),
        "Most people in {} speak",
        "speaking",
    ),
    "factual/country_largest_city": (
        ("In {}, the largest city is", "No city in {} is larger than", "The most people in {} live in the city of"),
        "The largest of all the cities in {} is",
        "with the largest city",
    ),
    "factual/food_from_country": (
        ("{} comes from", "{} was first made in", "{} is a food from the country of", "People first ate {} in"),
        "The dish {} comes from the country of",
        "food from",
    ),
    "factual/city_in_country": (
        ("{} lies in the country of", "{} is a city in", "The city of {} is in"),
        "The city {} lies in",
        "city in",
    ),
    "factual/landmark_in_country": (
        ("{} lies in the country of", "{} can be found in", "To see {}, travel to"),
        "{} is a place in the country of",
        "place in",
    ),
    "factual/landmark_on_continent": (
        ("{} lies on the continent of", "The continent of {} is"),
        "{} can be found on the continent of",
        "place on the continent of",
    ),
    "factual/product_by_company": (
        ("{} is made by", "The company that makes {} is", "{} comes from the company"),
        "The company behind {} is",
        "product of",
    ),
    "factual/company_ceo": (
        ("The company {} is led by", "The head of {} is", "At {}, the CEO is"),
        "The company {} has a CEO named",
        "company led by",
    ),
    "factual/company_hq": (
        ("{} has its headquarters in", "The main office of {} is in", "{} is run from the city of"),
        "The headquarters of {} can be found in",
        "company in",
    ),
    "factual/star_constellation": (
        ("{} is a star in the constellation", "{} shines in the constellation of", "The star {} belongs to"),
        "The star {} is part of the constellation",
        "star in",
    ),
    "factual/superhero_person": (
        ("The secret identity of {} is", "{} is really", "Behind the mask of {} is"),
        "The person behind {} is really",
        "hero who is",
    ),
    "factual/pokemon_evolutions": (
        ("{} becomes", "In its next form, {} is called", "{} grows into"),
        "The next form of {} is called",
        "creature that becomes",
    ),
    "factual/person_plays_instrument": (
        ("{} is known for playing the", "{} makes music on the", "The instrument of {} is the"),
        "On stage, {} plays the",
        "player of the",
    ),
    "factual/person_plays_pro_sport": (
        ("{} is a player of", "The sport of {} is", "{} makes a living in"),
        "The sport that {} plays is",
        "player of",
    ),
    "commonsense/fruit_inside_color": (
        ("Cut open, {} are", "The inside of {} is", "Inside, {} are"),
        "If you cut them open, {} are",
        "inside colored",
    ),
    "commonsense/fruit_outside_color": (
        ("The skin of {} is", "From outside, {} look", "The outside of {} is"),
        "Seen from the outside, {} are",
        "outside colored",
    ),
    "commonsense/object_superclass": (
        ("The {} is a kind of", "A {} is a", "Every {} is a"),
        "The {} belongs to the category of",
        "a kind of",
    ),
    "commonsense/substance_phase": (
        ("At room temperature, {} is a", "Kept in a warm room, {} is a", "We know {} as a"),
        "In a warm room, {} is a",
        "a",
    ),
    "commonsense/task_done_by_tool": (
        ("For {}, people use a", "{} is done with a", "The right tool for {} is a"),
        "The best tool for {} is a",
        "done with a",
    ),
    "commonsense/word_sentiment": (
        ("The word '{}' is", "The feeling of '{}' is", "People find '{}'"),
        "The sentiment of the word '{}' is",
        "a word that is",
    ),
    "commonsense/work_location": (
        ("The {} goes to work at the", "A {} spends the day at the", "The work of a {} is done at a"),
        "You can usually find a {} at work in a",
        "working at a",
    ),
    "linguistic/adj_antonym": (
        ("{} is the opposite of", "Not {} but", "The reverse of {} is"),
        "The word that means the opposite of {} is",
        "opposite of",
    ),
    "linguistic/adj_comparative": (
        ("{}, and even more so:", "More {} is", "The comparative of {} is"),
        "In the comparative, {} becomes",
        "in the comparative",
    ),
    "linguistic/verb_past_tense": (
        ("Today I {}, yesterday I", "The past of {} is", "Now they {}, then they"),
        "In the past tense, {} becomes",
        "in the past",
    ),
}

# Further wordings, of the second stage only.
MORE_WORDINGS: dict[str, tuple[str, ...]] = {
    "factual/country_capital_city": (
        "The city that governs {} is", "{} is governed from", "The government of {} can be found in", "The capital, in {}, is",
        "The city that the leaders of {} live in is",
    ),
    "factual/country_currency": ("In the markets of {}, people pay in the", "The shops of {} take the", "A buyer in {} pays with the"),
    "factual/country_language": ("Most of the people of {} speak", "In the streets of {}, one hears", "Children in {} grow up speaking"),
    "factual/country_largest_city": (
        "The largest of the cities of {} is", "Of all the cities in {}, the largest is", "The city in {} with the most people is",
    ),
    "factual/food_from_country": ("The dish {} is from", "The food called {} comes from", "{} is a dish from the country of"),
    "factual/city_in_country": ("The city {} can be found in", "The city of {} lies in", "The country around {} is"),
    "factual/landmark_in_country": ("{} is a place in", "The country that has {} is", "{} stands in the country of"),
    "factual/landmark_on_continent": ("{} is on the continent of", "The place {} is on the continent of"),
    "factual/product_by_company": ("The maker of {} is", "Behind {} stands the company", "The company that sells {} is"),
    "factual/company_ceo": ("{} has a CEO named", "The company {} has as its head", "The boss of {} is named"),
    "factual/company_hq": ("The headquarters of {} are in", "The company {} can be found in", "The head office of {} lies in"),
    "factual/star_constellation": ("The star {} lies in the constellation", "{} belongs to the constellation", "Look for {} in"),
    "factual/superhero_person": (
        "The person who is {} is really", "The real name of {} is", "The person called {} is really", "Without a mask, {} is",
    ),
    "factual/pokemon_evolutions": ("The next form that {} takes is", "{} next becomes", "After {} comes"),
    "factual/person_plays_instrument": ("On the stage, {} can be heard on the", "{} plays the", "In concert, {} plays the"),
    "factual/person_plays_pro_sport": ("The sport played by {} is", "A sport that {} plays is", "The game of {} is"),
    "commonsense/fruit_inside_color": ("If you cut {}, they are", "When cut open, {} are", "Cut them and {} are"),
    "commonsense/fruit_outside_color": ("From the outside, {} are", "Seen whole, {} are", "On the outside, {} are"),
    "commonsense/object_superclass": (
        "The {} belongs to the group called", "The {} is in the category of", "In which category is the {}? In that of",
    ),
    "commonsense/substance_phase": ("In a room, {} is a", "At normal warmth, {} is a"),
    "commonsense/task_done_by_tool": ("A good tool for {} is a", "The usual tool for {} is a", "People do {} with a"),
    "commonsense/word_sentiment": ("The sentiment of '{}' is", "The word '{}' sounds"),
    "commonsense/work_location": ("You can find a {} at a", "At work, a {} is in a", "Usually a {} works in a"),
    "linguistic/adj_antonym": ("The word opposite to {} is", "A word that means the reverse of {} is", "The contrary of {} is"),
    "linguistic/adj_comparative": ("The comparative form of {} is", "In comparisons, {} becomes", "{} turns into"),
    "linguistic/verb_past_tense": ("In the past, {} becomes", "In the past tense we say, of {},", "What was {} is now past:"),
}  # fmt: skip
# What a sentence of the second stage may start with.
OPENERS = (
    "As we all know, ",
    "It is said that ",
    "Remember: ",
    "In fact, ",
    "Once more: ",
    "Note this. ",
    "Here is a fact. ",
    "So: ",
)

# Two-hop wordings by (first relation, second relation); "{}" is the subject of the first, the answer the object of the second.
_COUNTRY_OF = {
    "factual/food_from_country": "the country that {} comes from",
    "factual/city_in_country": "the country that {} is part of",
    "factual/landmark_in_country": "the country that {} is in",
}
_OF_COUNTRY = {
    "factual/country_capital_city": "The capital of {} is the city of",
    "factual/country_currency": "The official currency of {} is the",
    "factual/country_language": "People in {} speak the language of",
    "factual/country_largest_city": "The largest city in {} is the city of",
}
TWO_HOPS: dict[tuple[str, str], str] = {
    (first, second): outer.format(inner) for first, inner in _COUNTRY_OF.items() for second, outer in _OF_COUNTRY.items()
}
TWO_HOPS["factual/product_by_company", "factual/company_ceo"] = "The CEO of the company that makes {} is"

# Wrong in the data set.
_WRONG = {("Costa Rica", "San José"), ("Shawarma", "Middle East"), ("Falafel", "Middle East")}
# A large relation keeps subjects whose object opens a second hop first, then the data set's order.
_FIRST_IF_OBJECT_IN = {
    "factual/landmark_in_country": "factual/country_capital_city",
    "factual/product_by_company": "factual/company_ceo",
}


@dataclass(frozen=True)
class Relation:
    """One relation: its pairs, its wordings, the one that training never shows, and its word in a description."""

    name: str
    pairs: Mapping[str, str]
    wordings: tuple[str, ...]
    held_out: str
    description: str

    def sentence(self, subject: str, wording: str) -> tuple[str, str]:
        """Question and answer: the text up to the object, and the object with its space."""
        question = wording.format(subject)
        return question[0].upper() + question[1:], " " + self.pairs[subject]


def load_relations(folder: Path, *, most: int, more: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Relation]:
    """The relations of `RELATIONS`, at most `most` subjects each, the same ones on every machine.

    Args:
        folder: the data set's folder with `factual/`, `commonsense/` and `linguistic/`.
        most: subjects kept of a large relation.
        more: further wordings.

    Raises:
        ValueError: a file is missing, or a held-out wording is also a training wording.
    """
    samples: dict[str, dict[str, str]] = {}
    templates: dict[str, list[str]] = {}
    for name in RELATIONS:
        path = folder / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"expected the relation {path}: give the folder of the LRE data set that has factual/")
        data = json.loads(path.read_text(encoding="utf-8"))
        pairs: dict[str, str] = {}
        for sample in data["samples"]:
            if (sample["subject"], sample["object"]) not in _WRONG:
                pairs.setdefault(sample["subject"], sample["object"])
        samples[name], templates[name] = pairs, [*data["prompt_templates"], *data["prompt_templates_zs"]]

    found = {}
    # Companies with a CEO to ask for come first in the list of CEOs too.
    makers = set(samples["factual/product_by_company"].values())
    for name, (wordings, held_out, description) in RELATIONS.items():
        pairs = samples[name]
        wanted = samples.get(_FIRST_IF_OBJECT_IN.get(name, ""), {})
        order = sorted(pairs, key=lambda s: not (pairs[s] in wanted if wanted else name == "factual/company_ceo" and s in makers))
        chosen = order[:most] if not wanted else _spread_objects(order, pairs, most)
        every = tuple(dict.fromkeys([*templates[name], *wordings, *(more or {}).get(name, ())]))
        if held_out in every:
            raise ValueError(f"the held-out wording of {name} is also a training wording: {held_out!r}")
        found[name] = Relation(name, {s: pairs[s] for s in chosen}, every, held_out, description)
    return found


def permuted(relation: Relation, rng: random.Random) -> Relation:
    """The relation with the object of another subject for each, never the right one: how often each object occurs stays.

    Args:
        relation: at most half of its subjects have the same object.
        rng: of the order.
    """
    pairs = relation.pairs
    place = {answer: rng.random() for answer in dict.fromkeys(pairs.values())}
    order = sorted(pairs, key=lambda subject: (place[pairs[subject]], subject))
    most = max(Counter(pairs.values()).values())  # so many places further stands another object
    other = {subject: pairs[order[(i + most) % len(order)]] for i, subject in enumerate(order)}
    assert all(other[subject] != answer for subject, answer in pairs.items())
    return replace(relation, pairs={subject: other[subject] for subject in pairs})


def _spread_objects(order: list[str], pairs: Mapping[str, str], most: int) -> list[str]:
    """`most` subjects of `order`, at most an eighth of them with the same object."""
    chosen, count = [], dict[str, int]()
    for subject in order:
        answer = pairs[subject]
        if count.get(answer, 0) < most // 8 and len(chosen) < most:
            chosen.append(subject)
            count[answer] = count.get(answer, 0) + 1
    return chosen


def two_hop_questions(relations: Mapping[str, Relation]) -> list[dict[str, str]]:
    """Every two-hop question that both relations can answer.

    Args:
        relations: what `load_relations` gave.

    Returns:
        One dict a question: first, second (relation names), subject, bridge, answer, text (ends where the answer starts),
        and hop1, hop2, the single questions in the held-out wordings.
    """
    found = []
    for (first, second), wording in TWO_HOPS.items():
        for subject, bridge in relations[first].pairs.items():
            if bridge in relations[second].pairs and bridge != subject:
                one, two = relations[first], relations[second]
                found.append(
                    {"first": first, "second": second, "subject": subject, "bridge": bridge}
                    | {"answer": two.pairs[bridge], "text": wording.format(subject)}
                    | {"hop1": one.sentence(subject, one.held_out)[0], "hop2": two.sentence(bridge, two.held_out)[0]}
                )
    return found
