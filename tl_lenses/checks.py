"""Checks of the numbers and words that a user passes: any integer or float type is accepted, and errors give the range."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Entry = TypeVar("Entry")


def whole_number(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """An integer of any type (Python's, numpy's, torch's) as an `int`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or _is_bool(value):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return number


def finite_number(name: str, value: Any, *, above: int | float | None = None, least: int | float | None = None) -> float:
    """A finite number of any type as a `float`."""
    kind = "positive and finite" if above == 0 else "a finite number"
    try:
        number = float(value) if hasattr(value, "__float__") else None
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = None
    if number is None or _is_bool(value):
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be {kind}, got {number}")
    if above is not None and not number > above:
        raise ValueError(f"{name} must be {kind if above == 0 else f'larger than {above:g}'}, got {number:g}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least:g}, got {number:g}")
    return number


def one_of(name: str, value: Any, words: Sequence[str]) -> Any:
    """A word that an argument takes."""
    if not isinstance(value, str) or value not in words:
        listed = [repr(word) for word in words]
        expected = f"{', '.join(listed[:-1])} or {listed[-1]}" if len(listed) > 1 else listed[0]
        raise ValueError(f"{name} must be {expected}, got {_shown(value)}")
    return value


def some_of(name: str, value: Any, words: Sequence[str]) -> list[str]:
    """A list of words that an argument takes."""
    return [one_of(name, word, words) for word in several(name, value, "words")]


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")
    return value


def device_named(name: Any) -> torch.device:
    """A device of torch."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"expected a device such as 'cpu' or 'cuda:0', got {_shown(name)}") from None


def seed_of(seed: Any) -> int:
    """A seed that a generator takes."""
    return whole_number("seed", seed, least=-(2**63), most=2**63 - 1)


def plain_text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {_shown(value)}")
    return value


def several(name: str, value: Any, of: str = "layers and sites") -> list[Any]:
    """The entries of a list or of another iterable. A text is none, though Python goes through its letters."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of {of}, got {_shown(value)}: pass {name}=[{_shown(value)}]")
    return list(value)


def entry(mapping: Mapping[Any, Entry], what: str, key: Any) -> Entry:
    """The entry of a mapping that a user asks for by name."""
    try:
        return mapping[key]
    except (KeyError, TypeError):  # a list has no hash
        raise KeyError(f"no {what} {_shown(key)}; there are {', '.join(map(str, mapping))}") from None


def index(name: str, value: Any, n: int, what: str) -> int:
    """A place among `n` things, negative ones from the end, counted from the front."""
    number = whole_number(name, value)
    if not -n <= number < n:
        raise ValueError(f"{name}={number} is out of range: {what} (0..{n - 1})")
    return number % n


def _shown(value: Any) -> str:
    """A value in an error, cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).rpartition(".")[2] == "bool"
