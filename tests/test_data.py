"""Text to rows of tokens against a naive reference, and one test for each kind of bad input."""

import doctest
import json
import logging
import re
import sys
from functools import cache
from itertools import count, islice

import datasets
import pandas
import pytest
import torch
import zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast

import tl_lenses.text.batches
import tl_lenses.text.sources
from tl_lenses.text.batches import TokenBatches, as_batches, token_batches
from tl_lenses.tokens import Batch, check_tokens, special_id, tokenize

TEXTS = [
    f"Document {n}: the {animal} sat on the {place}, naïve café № {n * n}.\nIt was 日本 {'again ' * (n % 5)}🙂"
    for n, (animal, place) in enumerate(zip(["cat", "dog", "owl", "fox"] * 10, ["mat", "roof", "hill"] * 14, strict=False))
]


@cache
def trained():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>", "<pad>"]
    tok.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special))
    return tok.to_str()


def make_tokenizer(**special):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained()), model_max_length=8, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def bare_tokenizer():
    return make_tokenizer()


def encode(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def packed(texts, tokenizer, seq_len, prepend_bos=True):
    """The naive reference: all documents in one list, then cut."""
    bos = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream = []
    for n, text in enumerate(texts):
        stream += (eos if n else []) + encode(tokenizer, text)
    width = seq_len - len(bos)
    return [bos + stream[at : at + width] for at in range(0, len(stream) - width + 1, width)]


def rows(batches):
    return [row for batch in batches for row in batch.tokens.tolist()]


def texts_of(batches, tokenizer, drop):
    """The documents back from the rows: BOS out, cut at EOS."""
    stream = [token for row in rows(batches) for token in row if token != tokenizer.bos_token_id]
    texts = tokenizer.decode(stream).split(tokenizer.eos_token)
    return texts[: len(texts) - drop]


# --- packing


@pytest.mark.parametrize("seq_len", [2, 3, 7, 64])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("special", [{}, {"eos_token": "<eos>"}, {"bos_token": "<bos>"}, {"both": "<bos>"}])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_rows_are_cut_from_the_concatenated_documents(seq_len, batch_size, special, prepend_bos):
    both = {"bos_token": special["both"], "eos_token": special["both"]} if "both" in special else special
    tokenizer = make_tokenizer(**both)
    got = list(token_batches(TEXTS, tokenizer, seq_len=seq_len, batch_size=batch_size, prepend_bos=prepend_bos))
    expected = packed(TEXTS, tokenizer, seq_len, prepend_bos)
    assert rows(got) == expected
    sizes = [len(batch.tokens) for batch in got]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1) and 1 <= sizes[-1] <= batch_size
    assert all(batch.tokens.dtype == torch.long and batch.attention_mask is None for batch in got)


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_bos_is_at_the_start_of_every_row_or_nowhere(tokenizer, prepend_bos):
    got = torch.tensor(rows(token_batches(TEXTS, tokenizer, seq_len=10, batch_size=4, prepend_bos=prepend_bos)))
    where = torch.zeros_like(got, dtype=torch.bool)
    where[:, 0] = prepend_bos
    assert torch.equal(got == tokenizer.bos_token_id, where)


def test_documents_are_separated_by_eos(tokenizer):
    kept = texts_of(token_batches(TEXTS, tokenizer, seq_len=10, batch_size=4), tokenizer, drop=1)
    assert kept == TEXTS[: len(kept)] and len(kept) >= len(TEXTS) - 1


def test_bos_is_not_doubled_by_a_tokenizer_that_adds_it_itself(tokenizer):
    from tokenizers.processors import TemplateProcessing

    eager = make_tokenizer(bos_token="<bos>", eos_token="<eos>")
    eager.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    assert eager("the cat")["input_ids"][0] == eager.bos_token_id  # it would have
    kwargs = {"seq_len": 9, "batch_size": 2}
    assert rows(token_batches(TEXTS, eager, **kwargs)) == rows(token_batches(TEXTS, tokenizer, **kwargs))
    assert tokenize(eager, "the cat").tokens.tolist() == tokenize(tokenizer, "the cat").tokens.tolist()


def test_empty_documents_leave_no_trace(tokenizer):
    kwargs = {"seq_len": 9, "batch_size": 2}
    sparse = ["", *(text for pair in zip(TEXTS, [""] * len(TEXTS), strict=True) for text in pair)]
    assert rows(token_batches(sparse, tokenizer, **kwargs)) == rows(token_batches(TEXTS, tokenizer, **kwargs))


def test_long_documents_give_no_warning(tokenizer, caplog):
    logger = logging.getLogger("transformers")
    before = logger.propagate
    logger.propagate = True
    caplog.set_level(logging.WARNING, logger="transformers")  # another library may have turned it down
    try:
        list(token_batches(["the cat " * 50], tokenizer, seq_len=5, batch_size=2))
        tokenize(tokenizer, "the cat " * 50)
        assert not caplog.records
        tokenizer("the cat " * 50)  # and without care there is one
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.propagate = before


def test_drop_last_leaves_out_only_the_partial_batch(tokenizer):
    kept = list(token_batches(TEXTS, tokenizer, seq_len=16, batch_size=7))
    assert len(kept[-1].tokens) < 7
    dropped = list(token_batches(TEXTS, tokenizer, seq_len=16, batch_size=7, drop_last=True))
    assert rows(dropped) == rows(kept[:-1])


# --- passes


def test_every_iteration_starts_again(tokenizer):
    batches = token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4)
    first = rows(batches)
    assert rows(islice(batches, 2)) == first[:8]
    assert rows(batches) == first
    assert not hasattr(batches, "__len__")


def test_two_passes_at_a_time_do_not_disturb_each_other(tokenizer):
    batches = token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4, shuffle_seed=0)
    pairs = list(zip(batches, batches, strict=True))
    assert len(pairs) > 3 and all(torch.equal(a.tokens, b.tokens) for a, b in pairs)


def order(tokenizer, buffer, seed, epoch=0):
    """Documents as they come; rows of BOS and one token lose nothing at the end."""
    batches = token_batches(TEXTS, tokenizer, seq_len=2, batch_size=50, shuffle_seed=seed, shuffle_buffer=buffer)
    return texts_of(batches.epoch(epoch), tokenizer, drop=0)


def test_without_a_seed_the_order_is_that_of_the_source(tokenizer):
    assert order(tokenizer, 1000, None) == order(tokenizer, 1000, None, epoch=1) == TEXTS


@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_shuffled_text_has_every_document_once(tokenizer, buffer):
    assert sorted(order(tokenizer, buffer, 0)) == sorted(TEXTS)


@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_a_seed_is_an_order_of_each_epoch(tokenizer, buffer):
    assert order(tokenizer, buffer, 0) == order(tokenizer, buffer, 0)
    assert order(tokenizer, buffer, 3, epoch=2) == order(tokenizer, buffer, 3, epoch=2)


@pytest.mark.parametrize("buffer", [7, 1000])
def test_other_seeds_and_epochs_are_other_orders(tokenizer, buffer):
    orders = [order(tokenizer, buffer, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert TEXTS not in orders and len({tuple(each) for each in orders}) == 9


def test_iter_is_epoch_zero(tokenizer):
    shuffled = token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4, shuffle_seed=5)
    assert rows(shuffled) == rows(shuffled.epoch(0)) != rows(shuffled.epoch(1))


def test_limit_tokens_stops_at_whole_rows(tokenizer):
    everything = rows(token_batches(TEXTS, tokenizer, seq_len=8, batch_size=3))
    assert rows(token_batches(TEXTS, tokenizer, seq_len=8, batch_size=3, limit_tokens=87)) == everything[:10]


def test_behind_limit_tokens_nothing_is_read(tokenizer):
    read = []

    def endless():
        for n in count():
            read.append(n)
            yield f"the cat number {n}"

    batches = token_batches(endless, tokenizer, seq_len=8, batch_size=3, limit_tokens=8 * 10 + 7)
    assert sum(batch.tokens.numel() for batch in batches) == batches.n_tokens == 80
    assert len(read) < 100


def test_the_source_is_read_as_a_stream(tokenizer):
    read = []

    def source():
        for text in TEXTS * 10:
            read.append(text)
            yield text

    next(iter(token_batches(source, tokenizer, seq_len=8, batch_size=1)))
    assert 0 < len(read) < 2 * len(TEXTS)


def test_n_tokens_is_that_of_the_last_pass(tokenizer):
    batches = token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4)
    assert batches.n_tokens == 0
    total = 8 * len(rows(batches))
    assert batches.n_tokens == total
    next(iter(batches))
    assert batches.n_tokens == 32 < total


# --- bytes per token


def direct_ratio(texts, tokenizer):
    return sum(len(text.encode()) for text in texts) / sum(len(encode(tokenizer, text)) for text in texts)


@pytest.mark.parametrize("kwargs", [{}, {"shuffle_seed": 0}, {"prepend_bos": False}])
def test_bytes_per_token_is_the_tokenizers_own_ratio(tokenizer, kwargs):
    expected = direct_ratio(TEXTS, tokenizer)
    asked_before = token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4, **kwargs)
    assert abs(asked_before.bytes_per_token - expected) < 1e-9
    asked_after = token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4, **kwargs)
    *_, last = asked_after
    assert abs(asked_after.bytes_per_token - expected) < 1e-9
    assert abs(last.bytes_per_token - expected) < 1e-9
    next(iter(asked_after))
    assert abs(asked_after.bytes_per_token - expected) < 1e-9  # a shorter pass does not replace the longer


def test_the_last_batch_knows_the_bytes_of_text_that_filled_no_row(tokenizer):
    texts = [*TEXTS[:16], "é"]  # sixteen documents are tokenised in one call, the last one in the next
    fitting = [width for width in range(20, 60) if packed(texts, tokenizer, width) == packed(texts[:16], tokenizer, width)]
    *_, last = token_batches(texts, tokenizer, seq_len=fitting[0], batch_size=1)
    assert abs(last.bytes_per_token - direct_ratio(texts, tokenizer)) < 1e-9
    assert abs(last.bytes_per_token - direct_ratio(texts[:16], tokenizer)) > 1e-6


def test_bytes_per_token_of_an_endless_source_is_measured_on_its_beginning(tokenizer, monkeypatch):
    monkeypatch.setattr(tl_lenses.text.stream, "MEASURED", 1000)
    batches = token_batches(lambda: (TEXTS[n % 40] for n in count()), tokenizer, seq_len=8, batch_size=4)
    assert abs(batches.bytes_per_token - direct_ratio(TEXTS, tokenizer)) < 0.1


# --- sources


def write(path, texts=TEXTS, column="text"):
    table = pandas.DataFrame({"id": range(len(texts)), column: texts})
    if path.suffix == ".txt":
        path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = (json.dumps({"id": n, column: text}) for n, text in enumerate(texts))
        path.write_text("\n".join(lines), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(texts, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


DATASETS = {
    "Dataset": lambda: datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS}),
    "IterableDataset": lambda: DATASETS["Dataset"]().to_iterable_dataset(),
    "IterableDataset of unknown columns": lambda: DATASETS["IterableDataset"]().map(lambda row: row),
    "DatasetDict": lambda: datasets.DatasetDict(train=DATASETS["Dataset"](), test=DATASETS["Dataset"]().select([0])),
    "rows": lambda: [{"id": n, "text": text} for n, text in enumerate(TEXTS)],
    "tuple": lambda: tuple(TEXTS),
    "function": lambda: lambda: iter(TEXTS),
    "function of rows": lambda: lambda: ({"text": text} for text in TEXTS),
    "generator": lambda: (text for text in TEXTS),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_every_kind_of_source_gives_what_the_list_gives(tokenizer, kind):
    expected = rows(token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4))
    batches = token_batches(DATASETS[kind](), tokenizer, seq_len=8, batch_size=4)
    assert rows(batches) == expected
    if kind != "generator":
        assert rows(batches) == expected


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv", ".TXT"])
@pytest.mark.parametrize("form", [str, lambda path: path])
def test_every_kind_of_file_gives_what_the_list_gives(tokenizer, tmp_path, suffix, form):
    written = write(tmp_path / f"texts{suffix.lower()}")
    path = written.rename(written.with_suffix(suffix))
    batches = token_batches(form(path), tokenizer, seq_len=8, batch_size=4)
    assert rows(batches) == rows(token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4)) == rows(batches)


def test_json_holds_rows_or_texts_as_a_list_or_one_per_line(tokenizer, tmp_path):
    expected = rows(token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4))
    for name, content in {
        "list.jsonl": json.dumps([{"text": text} for text in TEXTS]),
        "lines.json": "\n" + "\n\n".join(json.dumps(text) for text in TEXTS) + "\n",
    }.items():
        (tmp_path / name).write_text(content)
        assert rows(token_batches(tmp_path / name, tokenizer, seq_len=8, batch_size=4)) == expected


def test_a_csv_cell_that_reads_like_a_missing_value_is_text(tokenizer, tmp_path):
    words = ["null", "NA", "1.50", "nan"] * 5
    path = write(tmp_path / "words.csv", words)
    assert rows(token_batches(path, tokenizer, seq_len=4, batch_size=4)) == packed(words, tokenizer, 4)


def test_a_directory_is_read_in_the_order_of_its_names_at_every_depth(tokenizer, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "c.jsonl", TEXTS[20:])
    write(tmp_path / "b" / "z.txt", TEXTS[10:20])
    write(tmp_path / "a.parquet", TEXTS[:10])
    write(tmp_path / ".hidden" / "a.txt", ["not this"])
    (tmp_path / "README.md").write_text("nor this")
    (tmp_path / "empty.txt").touch()
    batches = token_batches(tmp_path, tokenizer, seq_len=8, batch_size=4)
    assert rows(batches) == rows(token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4))


def test_another_text_column(tokenizer, tmp_path):
    path = write(tmp_path / "texts.parquet", column="story")
    batches = token_batches(path, tokenizer, seq_len=8, batch_size=4, text_column="story")
    assert rows(batches) == packed(TEXTS, tokenizer, 8)


def test_the_split_that_was_asked_for(tokenizer):
    batches = token_batches(DATASETS["DatasetDict"](), tokenizer, seq_len=8, batch_size=4, split="test")
    assert rows(batches) == packed(TEXTS[:1], tokenizer, 8)


@pytest.mark.parametrize(("name", "arguments"), [("org/name", ("org/name",)), ("o/n-1.0:c", ("o/n-1.0", "c"))])
def test_a_dataset_name_is_streamed(tokenizer, monkeypatch, name, arguments):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return DATASETS["IterableDataset"]()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    batches = token_batches(name, tokenizer, seq_len=8, batch_size=4, split="validation")
    assert calls == [(arguments, {"split": "validation", "streaming": True})]
    assert rows(batches) == rows(batches) == packed(TEXTS, tokenizer, 8)


def documents(path):
    return [text for text, _ in tl_lenses.text.sources.reader(path, "text", "train")[0](None)]


def test_text_without_separators_is_cut_at_blank_lines_into_passages(tmp_path):
    paragraphs = [f"Paragraph {n}. " + "word " * (n % 7 * 30) for n in range(100)]
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff".encode() + "\r\n \r\n".join(paragraphs).encode())
    got = documents(path)
    assert " ".join(got).split() == " ".join(paragraphs).split()  # nothing lost, no byte-order mark
    assert all(4096 <= len(text) < 4096 + 1100 for text in got[:-1]) and len(got) > 5
    assert all(text.startswith("Paragraph") and "\r" not in text for text in got)
    path.write_text("\n\n".join(paragraphs[:3]))
    assert documents(path) == ["\n\n".join(paragraphs[:3]).strip()]


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path):
    (tmp_path / "lines.txt").write_text("one more line\n" * 20_000)
    got = documents(tmp_path / "lines.txt")
    assert "\n".join(got) + "\n" == "one more line\n" * 20_000 and len(got) == 5


def test_separators_win_over_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\n" * 2000 + "<|endoftext|>\nTwo <|endoftext|> two.\n <|endoftext|> \nThree.")
    assert documents(tmp_path / "a.txt") == [("One.\n\n" * 2000).strip(), "Two <|endoftext|> two.", "Three."]


# --- errors of token_batches


def refused(message, source, tokenizer, error=ValueError, **kwargs):
    with pytest.raises(error, match=message):
        list(token_batches(source, tokenizer, **({"seq_len": 8, "batch_size": 4} | kwargs)))


@pytest.mark.parametrize("path", ["no/such.txt", "such.jsonl", "./no/such", "/no/such/directory"])
def test_missing_file(tokenizer, path):
    refused(f"there is no file or directory '{re.escape(path)}' .the working directory is ", path, tokenizer)


def test_missing_path(tokenizer, tmp_path):
    refused("there is no file or directory '.*nowhere'", tmp_path / "nowhere", tokenizer)


def test_directory_without_text(tokenizer, tmp_path):
    (tmp_path / "model.bin").write_text("x")
    (tmp_path / "empty.txt").touch()
    refused(r"the directory '.*' has no \.txt, \.jsonl, \.json, \.parquet, \.csv file with anything", tmp_path, tokenizer)


def test_empty_file(tokenizer, tmp_path):
    (tmp_path / "empty.txt").touch()
    refused(r"empty\.txt' is empty\. Pass a file with text", tmp_path / "empty.txt", tokenizer)


def test_file_with_nothing_but_white_space(tokenizer, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    refused(r"blank\.txt' holds 0 tokens", tmp_path / "blank.txt", tokenizer)
    with pytest.raises(ValueError, match=r"blank\.txt' holds no text, so bytes_per_token is not known"):
        _ = token_batches(tmp_path / "blank.txt", tokenizer, seq_len=8, batch_size=4).bytes_per_token


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_not_utf8_names_the_byte(tokenizer, tmp_path, suffix):
    good = "text,other\n" + "façade\n" * 5000
    path = tmp_path / f"latin{suffix}"
    path.write_bytes(("[\n" if "json" in suffix else "").encode() + good.encode() + "façade".encode("latin-1"))
    at = path.read_bytes().index(b"a\xe7ade") + 1
    refused(rf"latin{suffix}' is not UTF-8 at byte {at}\. Convert it", path, tokenizer)


def test_unknown_suffix(tokenizer, tmp_path):
    (tmp_path / "text.docx").write_text("x")
    refused(r"docx' ends in '\.docx'; expected one of \.txt, \.jsonl", tmp_path / "text.docx", tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_file_without_the_column_lists_its_columns(tokenizer, tmp_path, suffix):
    path = write(tmp_path / f"stories{suffix}", column="story")
    refused(r"stories.* has no column 'text', only \['id', 'story'\]\. Pass text_column", path, tokenizer)


@pytest.mark.parametrize("kind", ["Dataset", "IterableDataset", "IterableDataset of unknown columns", "rows"])
def test_dataset_without_the_column_lists_its_columns(tokenizer, kind):
    message = r"the source has no column 'story', only \['id', 'text'\]\. Pass text_column"
    refused(message, DATASETS[kind](), tokenizer, text_column="story")


def test_dataset_without_the_split_lists_its_splits(tokenizer):
    message = r"the source has no split 'validation', only \['train', 'test'\]\. Pass split"
    refused(message, DATASETS["DatasetDict"](), tokenizer, split="validation")


def test_row_whose_text_is_not_a_string(tokenizer, tmp_path):
    refused("the text of row 2 of the source is a int; expected a str", ["a", "b", 3], tokenizer)
    refused("row 1 of the source is a NoneType", [{"text": "a"}, {"text": None}], tokenizer)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}')
    refused(r"row 1 of '.*a\.jsonl' is a list", tmp_path / "a.jsonl", tokenizer)


def test_broken_json(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"')
    refused(r"a\.jsonl' is not JSON at line 2: .*Expected a list", tmp_path / "a.jsonl", tokenizer)


@pytest.mark.parametrize(
    ("message", "kwargs"),
    [
        ("seq_len must be at least 2, got 1", {"seq_len": 1}),
        ("batch_size must be at least 1, got 0", {"batch_size": 0}),
        ("shuffle_buffer must be at least 1, got 0", {"shuffle_buffer": 0}),
        ("limit_tokens is 7: expected at least 8, which is one row of seq_len 8", {"limit_tokens": 7}),
    ],
)
def test_numbers_out_of_range(tokenizer, message, kwargs):
    refused(message, TEXTS, tokenizer, **kwargs)


def test_too_little_text_for_one_row(tokenizer):
    n = len(encode(tokenizer, "the cat"))
    refused(f"the source holds {n} tokens: too few for 1 row of seq_len 50. Pass more text", ["the cat"], tokenizer, seq_len=50)
    refused("the source holds 0 tokens", [], tokenizer)


def test_too_little_text_for_one_full_batch(tokenizer):
    message = "tokens: too few for 1000 rows of seq_len 8. Pass more text or a smaller seq_len or batch_size"
    refused(message, TEXTS, tokenizer, batch_size=1000, drop_last=True)


@pytest.mark.parametrize("text", ["Once upon a time.", "word", "Once upon a time " * 500])
def test_text_in_place_of_a_path(tokenizer, text):
    refused(rf"'{text[:10]}.*is no file, directory or dataset name .*\[text\]", text, tokenizer)


def test_a_dataset_that_does_not_load(tokenizer, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("the Hub is out of reach")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refused("'org/name' is no file here, and as a dataset it did not load: the Hub is out of reach", "org/name", tokenizer)


def test_something_that_holds_no_text(tokenizer):
    refused("source should be texts, a path, a dataset or a function; got int", 5, tokenizer, error=TypeError)


def test_a_model_without_a_tokenizer():
    refused("the tokenizer is None: text needs one", TEXTS, None)


def test_a_generator_gives_one_pass(tokenizer):
    batches = token_batches((text for text in TEXTS), tokenizer, seq_len=8, batch_size=4)
    with pytest.raises(ValueError, match="can be read only once: ask for bytes_per_token after"):
        _ = batches.bytes_per_token
    assert rows(batches) == packed(TEXTS, tokenizer, 8)
    assert abs(batches.bytes_per_token - direct_ratio(TEXTS, tokenizer)) < 1e-9
    with pytest.raises(ValueError, match="the source is a generator, which gives one pass.*Pass a list, or .* a function"):
        iter(batches)


# --- tokenize


def test_one_prompt(tokenizer):
    batch = tokenize(tokenizer, "the cat")
    assert batch == (batch.tokens, None, None) and batch.tokens.dtype == torch.long
    assert batch.tokens.tolist() == [[tokenizer.bos_token_id, *encode(tokenizer, "the cat")]]
    assert tokenize(tokenizer, "the cat", prepend_bos=False).tokens.tolist() == [encode(tokenizer, "the cat")]
    assert torch.equal(tokenize(tokenizer, "<bos>the cat").tokens, batch.tokens)  # BOS was there already


def test_bos_alone_is_a_prompt(tokenizer):
    assert tokenize(tokenizer, "").tokens.tolist() == tokenize(tokenizer, "<bos>").tokens.tolist() == [[0]]


def test_no_bos_where_the_tokenizer_has_none(bare_tokenizer):
    assert tokenize(bare_tokenizer, "the cat").tokens.tolist() == [encode(bare_tokenizer, "the cat")]


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}, 2),
        ({"bos_token": "<bos>", "eos_token": "<eos>"}, 1),
        ({"bos_token": "<bos>"}, 0),
        ({}, 0),
    ],
)
def test_padding(special, pad):
    tokenizer = make_tokenizer(**special)
    prompts = ["the cat sat on the mat", "the", "the dog sat"]
    batch = tokenize(tokenizer, prompts)
    longest = max(tokenize(tokenizer, prompt).tokens.shape[1] for prompt in prompts)
    assert batch.tokens.shape == batch.attention_mask.shape == (3, longest)
    assert batch.tokens.dtype == batch.attention_mask.dtype == torch.long
    for row, mask, prompt in zip(batch.tokens, batch.attention_mask, prompts, strict=True):
        alone = tokenize(tokenizer, prompt).tokens[0]
        assert torch.equal(row[mask == 1], alone) and (row[mask == 0] == pad).all()
        n_pads = longest - len(alone)
        assert mask.tolist() == [0] * n_pads + [1] * len(alone)


def test_equal_lengths_need_no_mask(tokenizer):
    batch = tokenize(tokenizer, ["the cat", "the cat"])
    assert batch.attention_mask is None and batch.tokens.shape[0] == 2


@pytest.mark.parametrize(
    ("message", "prompts", "kwargs"),
    [
        ("prompts is an empty list; pass at least one string", [], {}),
        ("prompt 1 has no tokens and no BOS is put before it. Pass some text", ["a", ""], {"prepend_bos": False}),
    ],
)
def test_prompts_refused(tokenizer, message, prompts, kwargs):
    with pytest.raises(ValueError, match=message):
        tokenize(tokenizer, prompts, **kwargs)


def test_empty_prompt_without_a_bos(bare_tokenizer):
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        tokenize(bare_tokenizer, "")


def test_a_prompt_without_a_tokenizer():
    with pytest.raises(ValueError, match="the tokenizer is None"):
        tokenize(None, "the cat")


def test_prompts_that_are_not_strings(tokenizer):
    with pytest.raises(TypeError, match="prompts"):
        tokenize(tokenizer, [torch.tensor([1, 2])])


# --- check_tokens


def test_good_tokens_pass_unchanged():
    tokens = torch.tensor([[3, 0, 9], [1, 2, 5]])
    assert check_tokens(tokens, 10, 3).data_ptr() == tokens.data_ptr()
    assert torch.equal(check_tokens(tokens, 10, None), tokens)
    assert check_tokens(tokens[0], 10, 3).tolist() == [[3, 0, 9]]
    for dtype in (torch.int32, torch.int16, torch.uint8):
        got = check_tokens(tokens.to(dtype), 10, 3)
        assert got.dtype == torch.long and torch.equal(got, tokens)


@pytest.mark.parametrize(
    ("error", "message", "tokens"),
    [
        (TypeError, r"an integer dtype, got torch\.float32\. Convert with \.long", torch.zeros(1, 3)),
        (TypeError, r"an integer dtype, got torch\.bool", torch.zeros(1, 3, dtype=torch.bool)),
        (TypeError, r"a tensor of ids, got list\. Use torch\.tensor", [[1, 2]]),
        (TypeError, r"tokens is text, not token ids\. Use tokenize", "the cat"),
        (ValueError, r"shape \[pos\] or \[batch, pos\], got \(1, 2, 3\)", torch.zeros(1, 2, 3, dtype=torch.long)),
        (ValueError, r"shape \[pos\] or \[batch, pos\], got \(\)", torch.tensor(3)),
        (ValueError, r"tokens is empty: its shape is \(2, 0\)", torch.zeros(2, 0, dtype=torch.long)),
        (ValueError, r"tokens is empty: its shape is \(0,\)", torch.zeros(0, dtype=torch.long)),
        (ValueError, r"5 positions; the model's context is 4\. Pass shorter", torch.zeros(1, 5, dtype=torch.long)),
        (ValueError, r"id 10 at row 1, position 2 .* of 10 \(ids 0\.\.9\)", torch.tensor([[1, 2, 3], [4, 5, 10]])),
        (ValueError, r"id -1 at row 0, position 1 is not in the model's vocabulary", torch.tensor([[1, -1, -1]])),
    ],
)
def test_bad_tokens_are_refused(error, message, tokens):
    with pytest.raises(error, match=message):
        check_tokens(tokens, 10, 4)


# --- as_batches

IDS = torch.arange(30).reshape(10, 3)
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)


def shapes(batches):
    return [tuple(batch.tokens.shape) for batch in batches]


def test_bare_tensors_are_cut_into_rows():
    assert shapes(as_batches(IDS[0])) == [(1, 3)]
    assert shapes(as_batches(IDS)) == [(8, 3), (2, 3)]
    batches = as_batches(IDS.int(), batch_size=4)
    assert shapes(batches) == [(4, 3), (4, 3), (2, 3)] == shapes(batches)
    assert rows(batches) == IDS.tolist() and all(batch.tokens.dtype == torch.long for batch in batches)


def test_batches_stay_as_they_are_unless_a_size_is_given():
    (only,) = as_batches(Batch(IDS, MASK, 4.5))
    assert torch.equal(only.tokens, IDS) and torch.equal(only.attention_mask, MASK) and only.bytes_per_token == 4.5
    cut = list(as_batches(Batch(IDS, MASK, 4.5), batch_size=6))
    assert shapes(cut) == [(6, 3), (4, 3)] and torch.equal(torch.cat([b.attention_mask for b in cut]), MASK)
    assert [batch.bytes_per_token for batch in cut] == [4.5, 4.5]


def test_lists_keep_their_elements_apart():
    assert shapes(as_batches([IDS[0], torch.arange(7), IDS])) == [(1, 3), (1, 7), (10, 3)]
    assert shapes(as_batches([Batch(IDS), {"input_ids": IDS[:2]}], batch_size=6)) == [(6, 3), (4, 3), (2, 3)]


def test_what_collators_yield():
    item = {"input_ids": IDS, "attention_mask": MASK.bool(), "labels": IDS}
    for (only,) in (as_batches(item), as_batches([item])):
        assert torch.equal(only.tokens, IDS) and torch.equal(only.attention_mask, MASK)
        assert only.attention_mask.dtype == torch.long
    row = {"input_ids": IDS[0], "attention_mask": MASK[0]}
    (only,) = as_batches([row])
    assert only.tokens.shape == only.attention_mask.shape == (1, 3)


LOADED = {
    "tensor": lambda: IDS,
    "tensors": lambda: TensorDataset(IDS),
    "dataset": lambda: datasets.Dataset.from_dict({"input_ids": IDS.tolist()}).with_format("torch"),
}


@pytest.mark.parametrize("kind", LOADED)
def test_what_loaders_yield(kind):
    batches = as_batches(DataLoader(LOADED[kind](), batch_size=4))
    assert shapes(batches) == [(4, 3), (4, 3), (2, 3)] == shapes(batches) and rows(batches) == IDS.tolist()


def test_what_a_tokenizer_returns(tokenizer):
    encoding = tokenizer(["the cat", "the"], padding=True, return_tensors="pt")
    (only,) = as_batches(encoding)
    assert torch.equal(only.tokens, encoding["input_ids"]) and only.attention_mask.tolist()[1][-1] == 0


def test_token_batches_pass_through(tokenizer):
    batches = token_batches(TEXTS, tokenizer, seq_len=8, batch_size=4)
    assert as_batches(batches) is batches and isinstance(batches, TokenBatches)


def test_an_iterator_gives_one_pass():
    batches = as_batches(iter([IDS, IDS]))
    assert shapes(batches) == [(10, 3), (10, 3)]
    with pytest.raises(ValueError, match="tokens is a list_iterator, which gives one pass, and that was made. Pass a list"):
        iter(batches)


@pytest.mark.parametrize(
    ("error", "message", "tokens"),
    [
        (TypeError, "tokens is text, not token ids.*token_batches", "the cat"),
        (TypeError, "tokens should be a tensor of ids, got int", 7),
        (TypeError, "item 1 of tokens is text", [IDS, "the cat"]),
        (TypeError, "item 0 of tokens should be a tensor of ids, got list", [[1, 2]]),
        (TypeError, "item 1 of tokens .* got torch.float32", [IDS, IDS.float()]),
        (TypeError, "tokens should be a tensor of ids, got list", {"input_ids": [[1, 2]]}),
        (ValueError, "tokens has no 'input_ids', only \\['ids'\\]", {"ids": IDS}),
        (ValueError, "tokens is empty: there was no batch", []),
        (ValueError, "tokens should have shape .* got \\(1, 10, 3\\)", IDS[None]),
        (ValueError, "attention_mask of tokens should be a tensor of shape \\(10, 3\\), got \\(3,\\)", Batch(IDS, MASK[0])),
        (ValueError, "shape \\(10, 3\\), got list", Batch(IDS, MASK.tolist())),
        (ValueError, "1 at real tokens and 0 at pads; got other values", Batch(IDS, IDS)),
    ],
)
def test_what_is_no_tokens(error, message, tokens):
    with pytest.raises(error, match=message):
        list(as_batches(tokens))


def test_batch_size_of_as_batches():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        as_batches(IDS, batch_size=0)


def test_examples_run():
    results = [doctest.testmod(sys.modules[f"tl_lenses.{name}"]) for name in ("tokens", "text.batches")]
    failed, tried = (sum(counts) for counts in zip(*results, strict=True))
    assert tried >= 7 and not failed


def fast(**tokens):
    return PreTrainedTokenizerFast(tokenizer_object=zoo.tokenizer().backend_tokenizer, **tokens)


CAT = zoo.tokenizer()("the cat")["input_ids"]
MATS = ["the cat sat on the mat"] * 4


def test_a_bos_that_was_put_in_place_is_none_of_the_tokenizers_own():
    """TransformerLens sets BOS and PAD to EOS where there is none (Qwen2), in place: text would start with `<|endoftext|>`."""
    plain = fast(eos_token="</s>")
    plain.bos_token = plain.pad_token = plain.eos_token
    assert plain.bos_token_id == zoo.EOS and special_id(plain, "bos") is special_id(plain, "pad") is None
    assert special_id(plain, "eos") == zoo.EOS
    assert tokenize(plain, "the cat").tokens.tolist() == [CAT]
    assert rows(token_batches(MATS, plain, seq_len=4, batch_size=2))[0][0] != zoo.EOS


def test_an_eos_that_was_put_in_place_separates_no_documents():
    bare = fast(unk_token="<unk>")
    before = rows(token_batches(MATS, bare, seq_len=4, batch_size=2))
    bare.eos_token = "<|endoftext|>"
    assert bare.eos_token_id is not None and rows(token_batches(MATS, bare, seq_len=4, batch_size=2)) == before


def test_a_bos_that_is_the_eos_from_the_start_is_the_tokenizers_own():
    assert tokenize(fast(eos_token="</s>", bos_token="</s>"), "the cat").tokens.tolist() == [[zoo.EOS, *CAT]]  # GPT-2


def test_a_bos_that_somebody_gave_is_the_tokenizers_own():
    given = fast(eos_token="</s>")
    given.bos_token = "<s>"
    assert tokenize(given, "the cat").tokens.tolist() == [[zoo.BOS, *CAT]]
