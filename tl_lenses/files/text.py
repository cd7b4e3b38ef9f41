"""Text that every file and every terminal can hold."""

import re


def readable(text: str, *, keep: str = "") -> str:
    """Text with its control characters and lone surrogates written out.

    A control character or an escaped byte is `<0x1B>`, another surrogate `<U+D800>`; the characters in `keep` stay.

    >>> readable("lens\\x1b[31m"), readable("a\\tb", keep="\\t")
    ('lens<0x1B>[31m', 'a\\tb')
    """

    if not isinstance(text, str):
        raise TypeError(f"expected text, got {type(text).__name__}")

    def written(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] in keep:
            return match[0]
        return f"<0x{code & 0xFF:02X}>" if code < 0xA0 or 0xDC80 <= code <= 0xDCFF else f"<U+{code:04X}>"

    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", written, text)
