"""What holds for all tests: no network, one thread, and shapes checked by beartype where this can be done."""

import functools
import os

# Before any import of a library that reads them.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

from pathlib import Path

import jaxtyping
import pytest
import shapes
import torch

shapes.check()

# The models are tiny: a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout, with models and texts that are not bundled; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name!r} beside the checkout")
    return folder


@pytest.fixture
def unchecked():
    """As a user runs it: without the shape checks, which would refuse bad input before our own messages do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def _loaded(load, name, **how):
    return load(name, **how)


@pytest.fixture
def models_once(monkeypatch):
    """Commands that name a model share it: none of them changes it, and loading is most of the time of a small one."""
    from tl_lenses import loading

    monkeypatch.setattr(loading, "load_model", functools.partial(_loaded, loading.load_model))


@pytest.fixture(scope="module")
def model():
    """The tiny GPT-2 that most tests take; a file that wants another model, or several, has its own."""
    import zoo

    return zoo.build("gpt2", zoo.FEW_KINDS[0])


@pytest.fixture(scope="module")
def maps(model):
    """A regression lens of it, fitted once a file."""
    import zoo

    import tl_lenses as tll

    return tll.fit_regression(model, zoo.tokens(60, 12))
