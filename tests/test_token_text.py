"""token_text against tokenizers of every alphabet: trained here, and the real ones where they are at hand."""

import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tl_lenses.token_text import token_text

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
LINES = ["the cat sat on the mat\n", "the café — naïve 日本語 \n\n", "  two  spaces 🙂", "Ġ and ▁ and ## are letters here"]


def text_of(tokenizer, piece):
    i = tokenizer.token_to_id(piece)
    assert i is not None, piece
    return token_text(tokenizer, [i])[i]


def byte_level(with_decoder=True):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if with_decoder:
        tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>"]))
    tok.add_tokens([AddedToken("é\t", normalized=False)])  # é is in the byte alphabet, yet this token is plain text
    return tok


def sentencepiece():
    vocab = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁", "cat", "Ġ", "##s", "▁▁▁"]
    tok = Tokenizer(models.BPE({v: i for i, v in enumerate(vocab)}, [], byte_fallback=True, unk_token="<unk>"))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.add_special_tokens(["<s>", "<▁mask>"])
    return tok


@pytest.mark.parametrize("with_decoder", [True, False])
def test_byte_level(with_decoder):
    tok = byte_level(with_decoder)
    assert text_of(tok, "Ġthe") == " the"
    assert text_of(tok, "Ċ") == "\n"
    assert text_of(tok, "t") == "t"
    assert text_of(tok, "â") == "<0xE2>"  # the byte that begins an em dash, and no letter
    assert text_of(tok, "<|end|>") == "<|end|>"
    assert text_of(tok, "é\t") == "é\t"


def test_byte_level_keeps_what_is_readable_of_a_broken_piece():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: i for i, c in enumerate(sorted(alphabet))}
    vocab |= {"Ġâ": 256, "Ġâ\u0122": 257}  # " " + E2, then " " + E2 80
    tok = Tokenizer(models.BPE(vocab, [("Ġ", "â"), ("Ġâ", "\u0122")]))
    tok.decoder = decoders.ByteLevel()
    assert token_text(tok, [256, 257]) == {256: " <0xE2>", 257: " <0xE2><0x80>"}


def test_every_text_of_a_byte_level_tokenizer_joins_to_the_input():
    tok = byte_level()
    for line in LINES:
        ids = tok.encode(line).ids
        text = token_text(tok, ids)
        joined = "".join(text[i] for i in ids).encode()
        assert re.sub(rb"<0x(..)>", lambda m: bytes.fromhex(m[1].decode()), joined).decode() == line


def test_sentencepiece_with_byte_fallback():
    tok = sentencepiece()
    assert text_of(tok, "▁the") == " the"
    assert text_of(tok, "▁") == " "
    assert text_of(tok, "▁▁▁") == "   "
    assert text_of(tok, "<0x0A>") == "\n"
    assert text_of(tok, "<0x41>") == "A"
    assert text_of(tok, "<0xE2>") == "<0xE2>"
    assert text_of(tok, "<s>") == "<s>"
    assert text_of(tok, "<▁mask>") == "<▁mask>"


def test_letters_of_another_alphabet_are_not_taken_for_spaces():
    tok = sentencepiece()
    assert text_of(tok, "Ġ") == "Ġ"
    assert text_of(tok, "##s") == "##s"
    byte = byte_level()
    i = byte.token_to_id("#")
    assert token_text(byte, [i]) == {i: "#"}


@pytest.mark.parametrize("part", ["decoder", "pre_tokenizer"])
def test_metaspace(part):
    tok = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("cat", -2.0)], 0, False))
    setattr(tok, part, {"decoder": decoders, "pre_tokenizer": pre_tokenizers}[part].Metaspace())
    assert token_text(tok, [1, 2]) == {1: " the", 2: "cat"}


def test_wordpiece():
    vocab = {w: i for i, w in enumerate(["[UNK]", "[CLS]", "walk", "##ing", ",", "▁x", "##"])}
    tok = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tok.decoder = decoders.WordPiece()
    tok.add_special_tokens(["[UNK]", "[CLS]"])
    assert [text_of(tok, p) for p in ("[CLS]", "walk", "##ing", ",")] == ["[CLS]", " walk", "ing", ","]
    assert text_of(tok, "▁x") == " ▁x"


def test_word_level_without_decoder_is_as_it_is():
    tok = Tokenizer(models.WordLevel({"[UNK]": 0, "▁cat": 1, "Ġdog": 2}, unk_token="[UNK]"))
    assert token_text(tok, [1, 2]) == {1: "▁cat", 2: "Ġdog"}


def test_end_of_word_suffix():
    tok = Tokenizer(models.BPE({"a": 0, "ing</w>": 1}, []))
    tok.decoder = decoders.BPEDecoder()
    assert token_text(tok, [0, 1]) == {0: "a", 1: "ing "}


def test_ids_outside_the_vocabulary():
    tok = byte_level()
    beyond = tok.get_vocab_size() + 7
    assert token_text(tok, [beyond, -1]) == {beyond: f"<{beyond}>", -1: "<-1>"}
    assert token_text(tok, []) == {}


def test_a_hugging_face_tokenizer_and_tensor_ids():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    raw = byte_level()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = torch.tensor(raw.encode("the cat").ids)
    assert token_text(wrapped, ids) == token_text(raw, ids.tolist())


class Slow:
    """A tokenizer in Python that only decodes, and drops the leading space as most do."""

    words = ("the", " cat", "�")

    def __len__(self):
        return len(self.words)

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def test_a_slow_tokenizer_falls_back_to_decoding():
    assert token_text(Slow(), [0, 1, 3]) == {0: "the", 1: " cat", 3: "<3>"}


def real(name):
    path = MODELS / name / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"needs {path.parent.name} of ../shared")
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))


@pytest.mark.parametrize("name", ["lab-gpt2", "stories260K"])
def test_real_tokenizers_join_to_the_input(name):
    tok = real(name)
    prompt = "Once upon a time, there was\na girl.  Her name: Lily"
    ids = tok.encode(prompt, add_special_tokens=False)
    text = token_text(tok, ids)
    assert "".join(text[i] for i in ids).removeprefix(" ") == prompt


@pytest.mark.parametrize("name", ["lab-gpt2", "stories260K"])
def test_every_entry_of_a_real_vocabulary_agrees_with_its_decoder(name):
    """Decoding a token after an ordinary word adds its text, wherever that text is whole characters."""
    tok = real(name)
    anchor = tok.encode("the", add_special_tokens=False)
    base = tok.decode(anchor)
    text = token_text(tok, range(len(tok)))
    assert len(text) == len(tok) and all(text.values())
    for i, t in text.items():
        decoded = tok.decode([*anchor, i], clean_up_tokenization_spaces=False).removeprefix(base)
        assert t == decoded or "\ufffd" in decoded, (i, t, decoded)
