"""Old names of arguments and functions, which keep working for one version and say the new one."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def renamed(**new_names: str) -> Callable[[F], F]:
    """A decorator: keywords that were called otherwise, `renamed(old="new")`.

    >>> @renamed(prompt="tokens")
    ... def length(tokens):
    ...     return len(tokens)
    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     length(prompt="abc"), str(caught[0].message)
    (3, 'length(prompt=...) is called tokens now: length(tokens=...)')
    """

    def decorate(function: F) -> F:
        name = function.__name__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                if new in kwargs:
                    raise TypeError(f"{name}() got both {old}= and {new}=, which are the same: pass {new}= alone")
                say(f"{name}({old}=...) is called {new} now: {name}({new}=...)")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def say(message: str) -> None:
    """A `DeprecationWarning` at the line that called the caller of the library."""
    warnings.warn(message, DeprecationWarning, stacklevel=3)
