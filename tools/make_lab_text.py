"""Make the bundled text (`tl_lenses/lab/text/*.txt`) from a folder of public-domain books in Markdown.

    python tools/make_lab_text.py write BOOKS          # writes train.txt and heldout.txt
    python tools/make_lab_text.py rank BOOKS           # how well the bundled model knows each book's own words
    python tools/make_lab_text.py loss                 # the bundled model's loss on both files

BOOKS is a checkout of https://github.com/mlschmitt/classic-books-markdown (`Author/Title.md`).
"""

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TypeVar

T = TypeVar("T")

SEPARATOR = "<|endoftext|>"
TEXT_DIR = Path(__file__).resolve().parent.parent / "tl_lenses" / "lab" / "text"

# Held out are the six books that `rank` finds least known to the model; no author is on both lists.
HELDOUT = (
    "Franz Kafka/The Trial",
    "Herman Melville/Moby-Dick",
    "Homer/The Iliad",
    "Jonathan Swift/Gulliver's Travels",
    "Joseph Conrad/Lord Jim",
    "Jules Verne/Twenty Thousand Leagues Under the Sea",
)
TRAIN = (
    "Arthur Conan Doyle/The Lost World",
    "Booker T. Washington/Up from Slavery",
    "Bram Stoker/Dracula",
    "Charles Darwin/On the Origin of Species",
    "Charles Dickens/A Tale of Two Cities",
    "Charlotte Bronte/Jane Eyre",
    "Daniel Defoe/Robinson Crusoe",
    "Emily Bronte/Wuthering Heights",
    "Fyodor Dostoyevsky/Crime and Punishment",
    "Jane Austen/Emma",
    "Louisa May Alcott/Little Women",
    "Mark Twain/Life on the Mississippi",
    "Mary Wollstonecraft Shelley/Frankenstein",
    "Oscar Wilde/The Picture of Dorian Gray",
    "Rudyard Kipling/Kim",
)
TRAIN_BYTES, HELDOUT_BYTES = 450_000, 120_000

# A passage ends at the first paragraph that takes it past SOFT; one that would take it past HARD starts the next.
SOFT, HARD, SMALLEST = 3_000, 6_000, 1_500

_PLAIN = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u00ab": '"', "\u00bb": '"', "\u2018": "'", "\u2019": "'", "\u2032": "'"}
    | {"\u2014": "--", "\u2013": "-", "\u2026": "...", "\u00a0": " ", "_": "", "*": "", "\\": "", "`": ""}
)
# What is left of a wrong decoding ("Ã©") or of a table is not prose: such a paragraph is dropped.
_BROKEN = re.compile("[\u00c2\u00c3\u00a6\u00a9\u0080-\u009f|<>{}=#]")


def paragraphs(markdown: str) -> Iterator[str]:
    """Plain paragraphs of one book, one line each, without headings, rules, marks and footnotes.

    Args:
        markdown: the text of one book.

    Example:
        >>> list(paragraphs("# Title\\n\\n## Chapter 1\\n\\nIt was _not_\\na \u201clarge\u201d house.\\n\\n-----"))
        ['It was not a "large" house.']
    """
    for block in re.split(r"\n\s*\n", markdown.replace("\r", "")):
        lines = [line.strip() for line in block.split("\n")]
        lines = [line for line in lines if line and not re.match(r"#|[-=*_]{3,}$|!\[|\[\w+\]", line)]
        text = re.sub(r"\s+", " ", " ".join(line.removeprefix("> ") for line in lines).translate(_PLAIN)).strip()
        text = re.sub(r"\[\w{1,3}\]", "", text)
        # Lines in capitals are headings that the Markdown does not mark.
        if text and not _BROKEN.search(text) and text != text.upper():
            yield text


def passages(markdown: str) -> list[str]:
    """Consecutive passages of one book, 1.5 to 6 kB each, one paragraph a line.

    Args:
        markdown: the text of one book.
    """
    found: list[str] = []
    passage: list[str] = []
    for paragraph in paragraphs(markdown):
        size = sum(map(len, passage))
        if passage and (size > SOFT or size + len(paragraph) > HARD):
            found.append("\n".join(passage))
            passage = []
        passage.append(paragraph)
    found.append("\n".join(passage))
    return [text for text in found if SMALLEST <= len(text.encode()) <= HARD]


def books(folder: Path) -> dict[str, Path]:
    """Every book of the folder by its name, `Author/Title`.

    Args:
        folder: where `Author/Title.md` lie.

    Raises:
        ValueError: the folder has no such file.
    """
    found = {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob("*/*.md"))}
    if not found:
        raise ValueError(f"expected books as {folder}/Author/Title.md, found none: give the folder of the collection")
    return found


def spread(items: Sequence[T], wanted: int) -> list[T]:
    """`wanted` items (or all of them) at even distances, in order."""
    wanted = min(len(items), max(1, wanted))
    return [items[int((i + 0.5) * len(items) / wanted)] for i in range(wanted)]


def write(folder: Path, out: Path) -> None:
    """Write `train.txt` and `heldout.txt`: the same share of every book, passages taken at even distances.

    Args:
        folder: the collection.
        out: the folder to write to.

    Raises:
        ValueError: a book of the lists is not in the collection.
    """
    collection = books(folder)
    for name, titles, size in (("train", TRAIN, TRAIN_BYTES), ("heldout", HELDOUT, HELDOUT_BYTES)):
        missing = [title for title in titles if title not in collection]
        if missing:
            raise ValueError(f"expected {missing} in {folder}, which has {len(collection)} other books")
        texts: list[str] = []
        for title in titles:
            all_texts = passages(collection[title].read_text(encoding="utf-8"))
            mean = sum(len(text.encode()) for text in all_texts) / len(all_texts)
            texts += spread(all_texts, round(size / len(titles) / mean))
        data = f"\n{SEPARATOR}\n".join(texts) + "\n"
        (out / f"{name}.txt").write_text(data, encoding="utf-8", newline="\n")
        print(f"{name}: {len(texts)} passages of {len(titles)} books, {len(data.encode()):,} bytes")


def rank(folder: Path, windows_per_book: int = 60) -> None:
    """Print how well the bundled model knows every book's own words, the least known book first.

    A book's own words are token pairs that are frequent in it (15 times and more) and almost absent elsewhere (3 % of
    that): names, mostly. The score is the model's surprise at the second token where it comes for the first time in a
    window, so that it cannot be copied: the median in nats. A model that has never read the book is at or above
    log(vocabulary), one that has read a part of it far below.

    Args:
        folder: the collection.
        windows_per_book: how many windows, at even distances, are scored.
    """
    import torch

    from tl_lenses import lab

    model = lab.load()
    tokenizer, context, bos = model.tokenizer, model.cfg.n_ctx - 1, model.tokenizer.bos_token_id
    ids = {}
    for title, path in books(folder).items():
        texts = passages(path.read_text(encoding="utf-8"))
        ids[title] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    pairs = {title: Counter(pair for row in rows for pair in pairwise(row)) for title, rows in ids.items()}
    everywhere: Counter[tuple[int, int]] = sum(pairs.values(), Counter())
    # " word" after anything is no own word of two pieces; what continues a word, or opens a line, can be.
    starts_word = [tokenizer.decode([i]).startswith(" ") for i in range(model.cfg.d_vocab)]

    rows_out = []
    for title, rows in ids.items():
        own = {
            pair for pair, n in pairs[title].items() if n >= 15 and everywhere[pair] - n <= 0.03 * n and not starts_word[pair[1]]
        }
        windows = [row[i : i + context] for row in rows for i in range(0, len(row) - context + 1, context)]
        windows = spread(windows, windows_per_book)
        tokens = torch.tensor([[bos, *window] for window in windows])
        with torch.no_grad():
            surprise = torch.cat(
                [-model(part)[:, :-1].log_softmax(-1).gather(-1, part[:, 1:, None])[..., 0] for part in tokens.split(8)]
            )
        first = [
            surprise[w, i].item()
            for w, window in enumerate(windows)
            for i in range(1, context)
            if (window[i - 1], window[i]) in own and window[i] not in window[:i]
        ]
        n_bytes = sum(len(tokenizer.decode(window).encode()) for window in windows)
        bits = surprise.sum().item() / math.log(2) / n_bytes
        rows_out.append((median(first) if first else math.nan, len(first), surprise.mean().item(), bits, title))

    print(f"own words  occurrences  all words  bits/byte  book    (log vocabulary: {math.log(model.cfg.d_vocab):.2f})")
    for own_loss, n, loss, bits, title in sorted(rows_out, key=lambda row: -row[0]):
        print(f"{own_loss:9.2f}  {n:11d}  {loss:9.2f}  {bits:9.2f}  {title}")


def loss() -> None:
    """Print the bundled model's loss on the bundled texts: BOS and 255 tokens a window, what is left over not counted."""
    import torch

    from tl_lenses import lab

    model = lab.load()
    tokenizer, context = model.tokenizer, model.cfg.n_ctx - 1
    for split in ("heldout", "train"):
        ids = tokenizer(lab.text(split), add_special_tokens=False, verbose=False)["input_ids"]
        windows = [row[i : i + context] for row in ids for i in range(0, len(row) - context + 1, context)]
        tokens = torch.tensor([[tokenizer.bos_token_id, *window] for window in windows])
        with torch.no_grad():
            nats = sum(model(part, return_type="loss").item() * len(part) for part in tokens.split(8)) / len(tokens)
        n_bytes = sum(len(tokenizer.decode(window).encode()) for window in windows)
        bits = nats / math.log(2) * len(windows) * context / n_bytes
        print(f"{split}: {nats:.3f} nats per token, {bits:.3f} bits per byte, {len(windows)} windows")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "rank", "loss"))
    parser.add_argument("books", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=TEXT_DIR)
    args = parser.parse_args()
    if args.what != "loss" and args.books is None:
        parser.error(f"{args.what} needs the folder of the books")
    try:
        if args.what == "write":
            write(args.books, args.out)
        elif args.what == "rank":
            rank(args.books)
        else:
            loss()
    except ValueError as error:
        sys.exit(f"make_lab_text: {error}")


if __name__ == "__main__":
    main()
