"""The command `tl-lenses version`."""

import platform

import tl_lenses as tll
from tl_lenses.cli.messages import say
from tl_lenses.files import versions


def version() -> None:
    """Versions to put in a bug report.

    Example: tl-lenses version
    """
    for name, number in {**versions(), "tl-lenses": tll.__version__, "python": platform.python_version()}.items():
        say(f"{name} {number}")
