"""The command `tl-lenses version`."""

from tl_lenses.cli.messages import say


def version() -> None:
    """Versions to put in a bug report.

    Example: tl-lenses version
    """
    import platform

    import tl_lenses
    from tl_lenses.files import versions

    for name, number in {**versions(), "tl-lenses": tl_lenses.__version__, "python": platform.python_version()}.items():
        say(f"{name} {number}")
