"""Facts to ask a model for: built in, from the files of the Patchscopes paper, or from the LRE data set; and whether a text has one.

A fact is a subject, an object, and a template that asks for it; where the data has one, also a sentence that the subject was
met in. Positions and knowledge depend on the model, so neither is taken from a file.
"""

import ast
import csv
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tl_lenses.checks import several
from tl_lenses.files import as_path
from tl_lenses.hooks import generate
from tl_lenses.model import LensModel, eos_ids, prepare, tokenizer_of
from tl_lenses.patchscopes import Source, Target
from tl_lenses.sites import at, positions
from tl_lenses.token_text import normalised
from tl_lenses.tokens import up_to

BUILT_IN = Path(__file__).parent / "data" / "facts.json"
PLACEHOLDER = "x"
_BATCH = 32
# Noun phrases for the object of LRE relations, which a second question can be asked about.
_PHRASES = {
    "food_from_country": "the country that {} comes from",
    "city_in_country": "the country that {} is part of",
    "landmark_in_country": "the country that {} is in",
    "product_by_company": "the company that makes {}",
}


@dataclass(frozen=True)
class Fact:
    """A subject, its object, and how to ask.

    Attributes:
        relation: name of the relation.
        subject, object: the pair.
        template: the question, "{}" for the subject; the object follows, or is in it.
        text: where the subject is read; the subject alone by default.
        occurrence: which occurrence of the subject in `text`.
        phrase: a noun phrase for the object with "{}" for the subject ("the country that {} comes from"), for two hops.
        description: words for the subject, "" where there are none.

    Raises:
        ValueError: an object without words, which every text would have.
    """

    relation: str
    subject: str
    object: str
    template: str
    text: str = ""
    occurrence: int = 0
    phrase: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if not normalised(self.object):  # every text has it
            raise ValueError(
                f"the fact of {self.subject!r} has the object {self.object!r}: expected words that can be looked for, leave it out"
            )

    @property
    def question(self) -> str:
        """The template with the subject."""
        return self.template.format(self.subject)

    @property
    def noun_phrase(self) -> str:
        """The phrase with the subject."""
        return self.phrase.format(self.subject)


Facts = Sequence[Fact] | str | Path | None  # as they are, from a path for `read_facts`, or the bundled ones


def facts_of(facts: Facts) -> tuple[list[Fact], str]:
    """Facts as an experiment takes them (a list, a path for `read_facts`, None for the bundled ones), and their name.

    >>> facts_of(None)[1]
    'bundled facts'
    """
    if facts is None or isinstance(facts, (str, Path)):
        return read_facts(facts), "bundled facts" if facts is None else Path(facts).name
    given = several("facts", facts, "facts")
    if wrong := [fact for fact in given if not isinstance(fact, Fact)]:
        raise TypeError(f"expected an experiments.Fact, got {type(wrong[0]).__name__}")
    return given, f"{len(given)} facts"


def read_facts(path: str | Path | None = None) -> list[Fact]:
    """Facts of a file or a folder with its subfolders; the built-in ones where none is given.

    Args:
        path: `.tsv` files of the Patchscopes paper (`patchscopes/code/preprocessed_data`) or `.json` files of the LRE
            data set.

    Raises:
        ValueError: nothing there, or files of another kind.
    """
    if path is None:
        return _built_in()
    path = as_path(path)
    if not path.exists():
        raise ValueError(f"no file or folder {str(path)!r}: expected .tsv files of the paper or .json files of LRE")
    files = [path] if path.is_file() else sorted(path.rglob("*.tsv")) or sorted(path.rglob("*.json"))
    readers = {".tsv": _tsv, ".json": _lre}
    facts = [fact for file in files if file.suffix in readers for fact in readers[file.suffix](file)]
    if not facts:
        raise ValueError(f"no facts in {str(path)!r}: expected .tsv files of the paper or .json files of LRE")
    return facts


def _built_in() -> list[Fact]:
    return [
        Fact(
            relation["name"], subject, answer, relation["template"], phrase=relation.get("phrase", ""),
            description=relation["description"].format(answer),
        )
        for relation in json.loads(BUILT_IN.read_text(encoding="utf-8"))["relations"]
        for subject, answer in relation["pairs"].items()
    ]  # fmt: skip


def _tsv(file: Path) -> list[Fact]:
    """Rows of the paper's file. Its positions, and the facts it calls known, are GPT-J's, so they are made anew here."""
    csv.field_size_limit(10**7)
    need = {"subject", "object", "prompt_target", "prompt_source"}
    facts: dict[Fact, None] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t")
        if not need <= set(reader.fieldnames or ()):
            raise ValueError(f"{file} has no columns {sorted(need)}: expected a file of the Patchscopes paper")
        for row in reader:
            text, subject, prompt = row["prompt_source"].strip(), row["subject"].strip(), row["prompt_target"].strip()
            if not text or "\n" in text or subject not in text or not prompt.endswith(f" {PLACEHOLDER}"):
                continue
            template = prompt.removesuffix(PLACEHOLDER) + "{}"
            seen = _joined(row.get("source_cropped_toks") or "").count(subject)
            facts[Fact(file.stem, subject, row["object"].strip(), template, text, max(seen - 1, 0))] = None
    return list(facts)


def _joined(tokens: str) -> str:
    """The text of a list of tokens that was printed; numpy prints lists without commas, which read the same."""
    try:
        return "".join(ast.literal_eval(tokens))
    except (ValueError, SyntaxError, TypeError):
        return ""


def _lre(file: Path) -> list[Fact]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, Mapping) or not {"prompt_templates", "samples"} <= set(data):
        raise ValueError(f"{file} has no prompt_templates and samples: expected a relation of the LRE data set")
    # The subject inside the sentence where a wording has it there: the placeholder is then no capital letter.
    template = min(data["prompt_templates"], key=lambda words: words.startswith("{}"))
    pairs: dict[str, str] = {}
    for sample in data["samples"]:
        pairs.setdefault(_unescaped(sample["subject"]), _unescaped(sample["object"]))
    phrase = _PHRASES.get(file.stem, "")
    return [Fact(file.stem, subject, answer, template, phrase=phrase) for subject, answer in pairs.items()]


def _unescaped(text: str) -> str:
    r"""`Bogot\u00e1` in a file, as the word that is meant."""
    return re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text)


# --- does a text have the answer?


def contains(text: str, answer: str) -> bool:
    """Whether the answer is in the text, from the start of a word on: "Oman" is not in "a woman".

    >>> contains("the city of BOGOTA.", "Bogotá"), contains("a woman", "Oman")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(normalised(answer))}", normalised(text)) is not None


def contaminated(fact: Fact, prompt: str, unpatched: str) -> str:
    """Why a hit would prove nothing; "" where it would."""
    if contains(unpatched, fact.object):
        return "in the unpatched text"
    if contains(prompt, fact.object):
        return "in the target prompt"
    return "in the subject" if contains(fact.subject, fact.object) else ""


# --- on a model


def source_of(model: LensModel, fact: Fact, text: str = "{}") -> Source:
    """The fact's subject in its sentence, at its last token."""
    sentence = fact.text or text.format(fact.subject)
    starts = [m.start() for m in re.finditer(f"(?={re.escape(fact.subject)})", sentence)]
    if not starts:
        raise ValueError(f"{fact.subject!r} is not in {sentence!r}")
    return Source(sentence, position(model, sentence, starts[min(fact.occurrence, len(starts) - 1)], fact.subject))


def target_of(model: LensModel, template: str) -> Target:
    """A template with the placeholder `x` for the subject, at the placeholder's own token."""
    start = template.find("{}")
    if start < 0:
        raise ValueError(f"expected a template with {{}} for the subject, got {template!r}")
    text = template.format(PLACEHOLDER)
    return Target(text, position(model, text, start, PLACEHOLDER))


def position(model: LensModel, text: str, start: int, part: str) -> int:
    """The column of the last token of `part`, which starts at a character of `text` (BOS is prepended)."""
    ids = prepare(model, text).tokens
    # Counted from the end: the text of BOS may have the part in it as well.
    after = len(re.findall(f"(?={re.escape(part)})", text[start + 1 :]))
    return int(positions(model, ids, at(part, -1 - after))[0, 0])


def texts_of(model: LensModel, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The model's greedy continuation of each prompt, up to the first newline."""
    tokenizer, ends, texts = tokenizer_of(model), eos_ids(model), [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        batch = prepare(model, [prompts[i] for i in part])
        ids = generate(model, batch.tokens, (), max_new_tokens, attention_mask=batch.attention_mask)
        for i, row in zip(part, ids[:, batch.tokens.shape[1] :].tolist(), strict=True):
            texts[i] = tokenizer.decode(up_to(row, ends)).split("\n")[0]
    return texts


def known(model: LensModel, facts: Sequence[Fact], max_new_tokens: int) -> list[bool]:
    """Which facts the model knows: asked with the real subject, its text has the object."""
    questions = list(dict.fromkeys(fact.question for fact in facts))
    texts = dict(zip(questions, texts_of(model, questions, max_new_tokens), strict=True))
    return [contains(texts[fact.question], fact.object) for fact in facts]


def drawn(facts: Iterable[Fact], n: int | None, seed: int) -> dict[str, list[Fact]]:
    """Facts by relation, in random order, at most n of each (None: all)."""
    relations: dict[str, list[Fact]] = {}
    for fact in facts:
        relations.setdefault(fact.relation, []).append(fact)
    for name, members in relations.items():
        random.Random(f"{seed} {name}").shuffle(members)
    return {name: members[:n] for name, members in relations.items()}


def two_hops(facts: Sequence[Fact]) -> list[tuple[Fact, Fact]]:
    """Pairs of facts whose first object is the second's subject, where the first has a phrase."""
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    return [(first, second) for first in facts if first.phrase for second in by_subject.get(first.object, ()) if second != first]
