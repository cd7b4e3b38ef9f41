"""A progress bar where somebody looks: a terminal or a notebook, and only for work of over two seconds."""

import sys
from typing import Any


def progress(
    iterable: Any = None, *, total: int | None = None, desc: str = "", initial: int = 0, show: bool | None = None
) -> Any:
    """A tqdm bar over `iterable`, or one to `update` by hand. `show=None` decides by where the output goes."""
    from tqdm.auto import tqdm

    if show is None:
        show = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(iterable, total=total, desc=desc, initial=initial, disable=not show, delay=2, dynamic_ncols=True)
