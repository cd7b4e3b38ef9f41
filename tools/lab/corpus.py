"""The text that the lab models read: books, stories, facts, identity lists and repeated words, as one array of tokens.

The array is made once from a seed and read from its start by every model, 255 tokens a row behind a BOS, so a run is resumed
by counting steps. What a model is measured on (held-out books, stories, wordings and words) is written beside it.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from make_lab_text import HELDOUT, books, passages

from lab.facts import MORE_WORDINGS, OPENERS, Relation, load_relations, permuted, two_hop_questions

__all__ = ["Writer", "build", "rows"]

EOS = "<|endoftext|>"
ARROWS = (" -> ", " -> ", " -> ", ": ", " = ", " => ", "->")
SEPARATORS = ("\n", "\n", "; ", ", ", ";")
_KEEP = re.compile(r"[a-z]{3,10}")


class Writer:
    """Writes documents of every kind from a random generator; knows which words are kept for the tests."""

    def __init__(
        self,
        relations: Mapping[str, Relation],
        words: list[str],
        rng: random.Random,
        often: Mapping[str, float] | None = None,
        openers: tuple[str, ...] = (),
    ):
        self.openers = openers
        self.relations, self.words, self.rng = relations, words, rng
        self.names = list(relations)
        # A relation of few subjects is asked for more often than its size, a large one less: every fact gets its exposures.
        often = often or {}
        self.weights = [len(relation.pairs) ** 0.6 * often.get(name, 1) for name, relation in relations.items()]
        self.entities = sorted({s for relation in relations.values() for s in relation.pairs if len(s) < 24})

    def relation(self) -> Relation:
        return self.relations[self.rng.choices(self.names, self.weights)[0]]

    def sentence(self, relation: Relation, subject: str | None = None) -> str:
        subject = subject or self.rng.choice(list(relation.pairs))
        question, answer = relation.sentence(subject, self.rng.choice(relation.wordings))
        opener = self.rng.choice(self.openers) if self.openers and self.rng.random() < 0.25 else ""
        return f"{opener}{question}{answer}."

    def facts(self) -> str:
        """One document of facts: loose sentences, one relation, a list, descriptions, or all about one subject."""
        kind, rng = self.rng.random(), self.rng
        if kind < 0.30:
            return " ".join(self.sentence(self.relation()) for _ in range(rng.randint(3, 9)))
        relation = self.relation()
        subjects = rng.sample(list(relation.pairs), min(len(relation.pairs), rng.randint(3, 9)))
        if kind < 0.50:  # one wording, several subjects
            wording = rng.choice(relation.wordings)
            joined = rng.choice((" ", "\n")).join("{}{}.".format(*relation.sentence(s, wording)) for s in subjects)
            return joined
        if kind < 0.65:  # one subject, several wordings
            texts = [self.sentence(relation, s) for s in subjects[:3] for _ in range(rng.randint(1, 3))]
            return " ".join(texts)
        if kind < 0.80:
            arrow, separator = rng.choice(ARROWS), rng.choice(SEPARATORS)
            return separator.join(f"{s}{arrow}{relation.pairs[s]}" for s in subjects)
        items = []
        for _ in range(rng.randint(3, 6)):
            relation = self.relation() if kind < 0.92 else relation
            subject = rng.choice(list(relation.pairs))
            items.append(f"{subject}: {relation.description} {relation.pairs[subject]}")
        return ", ".join(items) if rng.random() < 0.8 else "\n".join(items)

    def item(self) -> str:
        """A word, a number or an entity."""
        kind = self.rng.random()
        if kind < 0.62:
            word = self.rng.choice(self.words)
            return word if self.rng.random() < 0.85 else word.capitalize()
        if kind < 0.72:
            return str(self.rng.randint(0, 9999))
        return self.rng.choice(self.entities)

    def identity(self) -> str:
        """An identity list, `cat -> cat`: the prompt of the token-identity patchscope."""
        arrow, separator = self.rng.choice(ARROWS), self.rng.choice(SEPARATORS)
        items = [self.item() for _ in range(self.rng.randint(3, 10))]
        return separator.join(f"{item}{arrow}{item}" for item in items)

    def repeated(self) -> str:
        """Random words, twice or three times: what induction heads learn from."""
        words = " ".join(self.rng.choice(self.words) for _ in range(self.rng.randint(4, 28)))
        return " ".join([words] * self.rng.choice((2, 2, 3)))


def _shuffled(items: list[str], rng: random.Random) -> Iterator[str]:
    """The items in random order, again and again."""
    while True:
        for index in rng.sample(range(len(items)), len(items)):
            yield items[index]


def _words(texts: list[str], most: int) -> list[str]:
    """The frequent lower-case words of some texts, the most frequent first."""
    counts = Counter(word for text in texts for word in re.findall(r"[A-Za-z]+", text) if _KEEP.fullmatch(word))
    return [word for word, _ in counts.most_common(most)]


def _kinds(writer: Writer, books: list[str], stories: list[str]) -> dict[str, Callable[[], str]]:
    """What writes a document of each kind, from the writer's random generator."""
    return {
        "books": _shuffled(books, writer.rng).__next__,
        "stories": _shuffled(stories, writer.rng).__next__,
        "facts": writer.facts,
        "identity": writer.identity,
        "repeated": writer.repeated,
    }


def _mix(
    kinds: Mapping[str, Callable[[], str]],
    shares: Mapping[str, float],
    n_tokens: int,
    tokenizer: Any,
    rng: random.Random,
) -> tuple[np.ndarray, dict[str, int]]:
    """A stream of `n_tokens` tokens of documents of every kind, by their shares, and how many tokens each kind has in it."""
    written = dict.fromkeys(shares, 0)
    parts: list[np.ndarray] = []
    total = 0
    while total < n_tokens:
        # Always the kind that is furthest behind its share, a few hundred documents at a time (the tokenizer is parallel).
        texts, names = [], []
        guess = dict(written)
        for _ in range(512):
            name = min(shares, key=lambda kind: guess[kind] / shares[kind] + rng.random() * 20_000)
            text = kinds[name]()
            texts.append(text + EOS)
            names.append(name)
            guess[name] += len(text) // 4 + 1
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for name, row in zip(names, ids, strict=True):
            written[name] += len(row)
        order = rng.sample(range(len(ids)), len(ids))
        parts.append(np.concatenate([np.asarray(ids[i], dtype=np.uint16) for i in order]))
        total += len(parts[-1])
    return np.concatenate(parts)[:n_tokens], written


def build(settings: Mapping[str, Any], sources: Path, tokenizer: Any, out: Path, log: Callable[[str], None]) -> None:
    """Write `corpus.npy` and `second.npy` (uint16 tokens), `author.npy` and `permuted.npy` (of the fine-tunes) and `held_out.json`.

    Args:
        settings: the `corpus` table of `lab.toml`.
        sources: a folder with `text/classic-books`, `text/tinystories` and `tasks/lre-relations`.
        tokenizer: the lab tokenizer.
        out: the work folder.
        log: told what is being done.

    Raises:
        ValueError: a source is missing.
    """
    rng = random.Random(settings["seed"])
    collection = books(sources / settings["books"])
    author = [title for title in collection if title.startswith(settings["author"] + "/")]
    author_held_out = settings["author_held_out"]
    if author_held_out not in author:
        raise ValueError(f"expected the book {author_held_out!r}, the collection has {author} of that author")

    read = {title: passages(path.read_text(encoding="utf-8")) for title, path in collection.items()}
    train_books = [text for title in read if title not in HELDOUT and title not in author for text in read[title]]
    held_books = [text for title in HELDOUT for text in read[title]]
    stories = (sources / settings["stories"]).read_text(encoding="utf-8").split(EOS)
    stories = [" ".join(line.split(" ")).strip() for line in stories if len(line.strip()) > 200]
    n_held = round(len(stories) * settings["stories_held_out"])
    stories, held_stories = stories[:-n_held], stories[-n_held:]

    relations = load_relations(sources / settings["relations"], most=settings["subjects_per_relation"])
    words = _words(train_books[::3] + stories, settings["words"])
    held_words = words[:: settings["hold_out_every_word"]]
    kept_words = [word for i, word in enumerate(words) if i % settings["hold_out_every_word"]]
    writer = Writer(relations, kept_words, rng)

    tokens, written = _mix(_kinds(writer, train_books, stories), settings["shares"], settings["tokens"], tokenizer, rng)
    log(f"{len(tokens):,} tokens: " + ", ".join(f"{name} {n / sum(written.values()):.1%}" for name, n in written.items()))

    def ids_of(texts: list[str]) -> np.ndarray:
        rows_ = tokenizer([text + EOS for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        return np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows_])

    author_texts = [text for title in author if title != author_held_out for text in read[title]]
    rng.shuffle(author_texts)
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "corpus.npy", tokens)
    np.save(out / "author.npy", ids_of(author_texts))

    test = Writer(relations, held_words, random.Random(settings["seed"] + 1))
    held_out = {
        "books": rng.sample(held_books, settings["held_out_passages"]),
        "author": rng.sample(read[author_held_out], min(60, len(read[author_held_out]))),
        "stories": held_stories,
        "facts": [test.facts() for _ in range(600)],
        "identity": [test.identity() for _ in range(400)],
        "repeated": [test.repeated() for _ in range(200)],
        "words": held_words,
        "relations": {
            name: [[*relation.sentence(s, relation.held_out), relation.sentence(s, relation.wordings[0])[0]] for s in relation.pairs]
            for name, relation in relations.items()
        },
        "two_hops": two_hop_questions(relations),
        "written": written,
    }  # fmt: skip

    # The second stage: other shares, some relations more often, and rarer words to copy; nothing that is held out.
    second = settings["second"]
    rng = random.Random(settings["seed"] + 2)
    more = [word for word in _words(train_books + stories, second["words"]) if word not in set(held_words)]
    reworded = load_relations(sources / settings["relations"], most=settings["subjects_per_relation"], more=MORE_WORDINGS)
    writer = Writer(reworded, more, rng, often=second["often"], openers=OPENERS)
    tokens, written = _mix(_kinds(writer, train_books, stories), second["shares"], second["tokens"], tokenizer, rng)
    np.save(out / "second.npy", tokens)
    log(f"second stage, {len(tokens):,} tokens: " + ", ".join(f"{name} {n}" for name, n in written.items()))

    # The fine-tune with other facts: some relations have their objects permuted, everything else is as it was.
    third = settings["permuted"]
    rng = random.Random(settings["seed"] + 3)
    other = {name: permuted(reworded[name], rng) for name in third["relations"]}
    often = second["often"] | dict.fromkeys(other, third["often"])
    writer = Writer(reworded | other, more, rng, often=often, openers=OPENERS)
    tokens, written = _mix(_kinds(writer, train_books, stories), third["shares"], third["tokens"], tokenizer, rng)
    np.save(out / "permuted.npy", tokens)
    log(f"permuted facts, {len(tokens):,} tokens: " + ", ".join(f"{name} {n}" for name, n in written.items()))
    held_out["permuted"] = {
        name: {s: [relations[name].pairs[s], x] for s, x in relation.pairs.items()} for name, relation in other.items()
    }
    (out / "held_out.json").write_text(json.dumps(held_out, ensure_ascii=False), encoding="utf-8")


def rows(tokens: np.ndarray, step: int, batch: int, context: int) -> np.ndarray:
    """The rows of one step: BOS (id 0) and the next `context - 1` tokens of the stream, wrapping at its end.

    Args:
        tokens: the stream.
        step: counted from 0.
        batch: rows a step.
        context: tokens a row.
    """
    width = context - 1
    n_rows = len(tokens) // width
    index = (np.arange(batch) + step * batch) % n_rows
    body = np.stack([tokens[i * width : (i + 1) * width] for i in index]).astype(np.int64)
    return np.concatenate([np.zeros((batch, 1), dtype=np.int64), body], axis=1)
