"""Pickles that hold tensors and nothing else: reading any other pickle runs what its writer put into it."""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

_HARMLESS = {
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}  # fmt: skip


class _Plain(pickle.Unpickler):
    """A pickle of tensors and numbers: any other name in it is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def plain(path: Path) -> Any:
    """The content of a file of `torch.save` or `pickle`, where it is tensors, numbers, text, lists and dicts alone."""
    try:
        with warnings.catch_warnings(), path.open("rb") as file:  # of a path torch would look at the suffix
            warnings.simplefilter("ignore")  # that it may not know a pickle's protocol, before it fails or does not
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        try:
            with path.open("rb") as file:
                content = _Plain(file).load()
        except Exception as second:
            reason = str(second if "names" in str(second) else error).splitlines()
            raise ValueError(
                f"{path} is damaged, or holds more than plain tensors, which reading it would run "
                f"({reason[0] if reason else type(error).__name__}): ask for a copy in safetensors, or with tensors alone"
            ) from None
    return torch.as_tensor(content) if type(content).__module__ == "numpy" else content
