"""The text of vocabulary entries, read from the tokenizer's own decoder and never guessed from the characters.

"Ġ" is a space in GPT-2's vocabulary and a letter in a SentencePiece one, so which alphabet a vocabulary is written in
comes from the tokenizer's decoder. Decoding ids one by one is not enough: decoders drop the leading space of the first
token and turn half a character into "\\ufffd".
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, SupportsInt

# One step of a piece's way to text. It gets the piece as text or, once its bytes are known, as bytes.
Step = Callable[[str | bytes], str | bytes]


def token_text(tokenizer: Any, ids: Iterable[SupportsInt]) -> dict[int, str]:
    """The text of each vocabulary entry: leading space kept, bytes that are no UTF-8 on their own as `<0xE2><0x80>`.

    `tokenizer` is a Hugging Face tokenizer (fast or slow) or a `tokenizers.Tokenizer`. Special tokens come as they are
    written; ids that the vocabulary does not have (padded rows of an embedding) come as `<123>`. Of WordPiece entries
    "##ing" is "ing" and "walk" is " walk", what its decoder writes after another word.

    >>> token_text(gpt2_tokenizer, [262, 198, 50256, 50300])
    {262: ' the', 198: '\\n', 50256: '<|endoftext|>', 50300: '<50300>'}
    """
    needed_ids = sorted({int(i) for i in ids})
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    text_of = _fast(backend) if hasattr(backend, "id_to_token") else _slow(tokenizer)
    # A negative id is no token, and the Rust side overflows on it.
    texts = ((i, text_of(i) if i >= 0 else None) for i in needed_ids)
    return {i: f"<{i}>" if text is None else text for i, text in texts}


def _fast(backend: Any) -> Callable[[int], str | None]:
    """One id to text for a `tokenizers.Tokenizer`; None where the vocabulary has no such id."""
    added = backend.get_added_tokens_decoder()
    steps, byte_level = _steps(backend)

    def one(i: int) -> str | None:
        if i in added and (added[i].special or byte_level):
            return added[i].content  # added tokens are written as text, never in the byte alphabet
        piece: str | bytes | None = backend.id_to_token(i)
        if piece is None:
            return None
        for step in steps:
            piece = step(piece)
        return _utf8(piece) if isinstance(piece, bytes) else piece

    return one


def _steps(backend: Any) -> tuple[list[Step], bool]:
    """The decoder of a tokenizer as steps that act on one piece out of context, and whether it is a byte-level one.

    Without a decoder the pre-tokenizer says the alphabet; without both, pieces are plain text.
    """
    parts = _flat(backend.decoder) or [part for part in _flat(backend.pre_tokenizer) if part["type"] in ("ByteLevel", "Metaspace")]
    steps: list[Step] = []
    suffix = getattr(backend.model, "end_of_word_suffix", None)
    if suffix:
        steps.append(_on_text(lambda s: s[: -len(suffix)] + " " if s.endswith(suffix) else s))
    for part in parts:
        kind = part["type"]
        if kind == "ByteLevel":
            steps.append(_byte_level)
        elif kind == "ByteFallback":
            steps.append(_byte_fallback)
        elif kind == "Metaspace":
            steps.append(_replace(part.get("replacement", "▁"), " "))
        elif kind == "Replace":
            pattern = part["pattern"]
            steps.append(_replace(pattern.get("String") or re.compile(pattern["Regex"]), part["content"]))
        elif kind == "BPEDecoder":
            steps.append(_replace(part["suffix"], " "))
        elif kind == "WordPiece":
            steps.append(_after_a_word(backend.decoder))
        # Fuse joins pieces and Strip trims the ends of a whole text (the leading space we keep): nothing to do for one.
    return steps, any(part["type"] == "ByteLevel" for part in parts)


def _flat(component: Any) -> list[dict[str, Any]]:
    """A decoder's or pre-tokenizer's own JSON (the part of tokenizer.json), sequences opened."""
    if component is None:
        return []

    def walk(part: dict[str, Any]) -> list[dict[str, Any]]:
        children = part.get("decoders") or part.get("pretokenizers")
        return [leaf for child in children for leaf in walk(child)] if children else [part]

    # The pickled state of one component: `Tokenizer.to_str()` would write the whole vocabulary as well (megabytes).
    return walk(json.loads(component.__getstate__()))


def _on_text(fn: Callable[[str], str]) -> Step:
    return lambda piece: piece if isinstance(piece, bytes) else fn(piece)


def _replace(old: str | re.Pattern[str], new: str) -> Step:
    return _on_text(lambda s: s.replace(old, new) if isinstance(old, str) else old.sub(new, s))


def _after_a_word(decoder: Any) -> Step:
    """The decoder's text for a piece after the word "a": "##ing" -> "ing", "walk" -> " walk", "," -> ","."""
    return _on_text(lambda s: decoder.decode(["a", s]).removeprefix("a"))


def _byte_fallback(piece: str | bytes) -> str | bytes:
    hexa = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece) if isinstance(piece, str) else None
    return bytes([int(hexa[1], 16)]) if hexa else piece


def _byte_level(piece: str | bytes) -> str | bytes:
    if isinstance(piece, bytes) or any(c not in _BYTE_OF for c in piece):
        return piece  # a character outside the alphabet: it was never written in bytes
    return bytes(_BYTE_OF[c] for c in piece)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100, U+0101, ... in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _utf8(data: bytes) -> str:
    """Bytes as text; each byte that is no UTF-8 on its own as `<0xE2>`, so that half a character stays visible."""
    text = data.decode("utf-8", errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda m: f"<0x{ord(m[0]) - 0xDC00:02X}>", text)


def _slow(tokenizer: Any) -> Callable[[int], str | None]:
    """One id to text for a tokenizer in Python: by its own alphabet where it has one, else by decoding twice."""
    sentencepiece, byte_level = hasattr(tokenizer, "sp_model"), hasattr(tokenizer, "byte_decoder")
    special = set(getattr(tokenizer, "all_special_ids", ()))
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None

    def one(i: int) -> str | None:
        if size is not None and i >= size:
            return None
        piece = tokenizer.convert_ids_to_tokens(i) if hasattr(tokenizer, "convert_ids_to_tokens") else None
        if isinstance(piece, bytes):
            return _utf8(piece)
        if piece is not None and i in special:
            return piece
        if piece is not None and (sentencepiece or byte_level):
            out = _byte_fallback(piece.replace("▁", " ")) if sentencepiece else _byte_level(piece)
            return _utf8(out) if isinstance(out, bytes) else out
        # The second copy of a token keeps the leading space that decoders drop at the start of a text.
        once, twice = tokenizer.decode([i]), tokenizer.decode([i, i])
        return twice[len(once) :] if twice.startswith(once) else once

    return one


def normalised(text: str) -> str:
    """A text as an answer: without case, accents, runs of spaces, and punctuation around it.

    >>> normalised("  São\\n Paulo. ")
    'sao paulo'
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(plain.casefold().split()).strip(" .,;:!?\"'()[]")
