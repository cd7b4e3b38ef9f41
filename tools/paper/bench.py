"""What every step is given: a model, its lenses, its text and its data, each made when it is first asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import tl_lenses as tll
from tl_lenses import lab

MODELS = ("smollm2-135m", "gemma3-270m", "lab-gpt2")
SCALES = ("small", "night")
TUNED = "smollm2-135m-tuned"
# Every step counts layers as the package does: l is the input of block l.
LAYERS: Mapping[str, list[int]] = {
    "smollm2-135m": list(range(0, 30, 4)), TUNED: list(range(0, 30, 4)), "gemma3-270m": [*range(0, 18, 3), 17],
    "lab-gpt2": list(range(8)),
}  # fmt: skip
# For what costs a search or many passes a layer.
FEW: Mapping[str, list[int]] = {
    "smollm2-135m": [4, 12, 20, 28], "gemma3-270m": [3, 9, 15, 17], "lab-gpt2": [1, 3, 5, 7],
}  # fmt: skip


def load(name: str, work: Path) -> Any:
    """A model in eval mode and float32: a lab model, one of `real_models.py`, or the fine-tune in the work folder.

    Raises:
        ValueError: its folder is not there; says how to make it.
    """
    return tll.load_model(str(work / TUNED) if name == TUNED else name, device="cpu")


@dataclass(frozen=True)
class Bench:
    """One model at one scale.

    Attributes:
        name: of the model.
        scale: "small", what an hour on one core carries, or "night".
        data: the folder with `text/` and `tasks/`.
        work: where results, lenses and the fine-tune are kept.
    """

    name: str
    scale: str
    data: Path
    work: Path

    @cached_property
    def model(self) -> Any:
        """The model, loaded."""
        return load(self.name, self.work)

    @property
    def is_lab(self) -> bool:
        """A lab model: its facts and its text are the bundled ones."""
        return self.name.startswith("lab-")

    @property
    def layers(self) -> list[int]:
        """Layers that have a fitted lens."""
        if self.scale == "night":
            return list(range(self.model.cfg.n_layers))
        return LAYERS[self.name]

    @property
    def few(self) -> list[int]:
        """Four of them, for what costs a search or many passes a layer."""
        return FEW[self.name.removesuffix("-tuned")]

    def size(self, small: int, night: int, *, lab: int | None = None, gemma: int | None = None) -> int:
        """How many items: by scale; at the small one more for a lab model and fewer for the vocabulary of 262,144."""
        if self.scale == "night":
            return night
        return (lab if self.is_lab else gemma if self.name.startswith("gemma") else None) or small

    def text(self, tokens: int, *, fit: bool = False, seq_len: int = 128, batch_size: int = 8) -> Any:
        """Text to fit on (wikitext-2 valid, the lab's training books) or to measure on (wikitext-2 test, held-out books)."""
        if self.is_lab:
            source: Any = lab.text("train" if fit else "heldout")
        else:
            source = str(self.data / "text" / "wikitext-2" / ("valid.txt" if fit else "test.txt"))
        return tll.token_batches(source, self.model.tokenizer, seq_len=seq_len, batch_size=batch_size, limit_tokens=tokens)

    def maps(self, name: str) -> Any:
        """Translators that the step "lenses" has fitted: "regression" or "tuned"."""
        folder = self.work / self.scale / self.name / name
        if not folder.is_dir():
            raise ValueError(f"no lens in {folder}: run the step lenses of {self.name} first")
        return tll.Translators.load(folder)

    def lenses(self, *names: str) -> dict[str, Any]:
        """Lenses by name: "logit", "regression", "tuned"."""
        return {name: tll.Lens(self.model) if name == "logit" else tll.Lens(self.model, self.maps(name)) for name in names}

    def facts(self, *relations: str, lre: bool = False) -> Any:
        """Facts of some relations: the Patchscopes authors' files, or LRE's; of a lab model the bundled ones."""
        from tl_lenses.experiments import read_facts

        if self.is_lab:
            return read_facts()
        folder = self.data / "tasks" / ("lre-relations" if lre else "patchscopes-preprocessed")
        return [fact for fact in read_facts(folder) if not relations or fact.relation in relations]

    def tokens_seen(self, tokens: int, seq_len: int = 128) -> Iterator[torch.Tensor]:
        """Ids of the text to fit on, batch by batch."""
        for batch in self.text(tokens, fit=True, seq_len=seq_len):
            yield batch.tokens
