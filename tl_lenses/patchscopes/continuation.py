"""Continuing texts after a target prompt: the next token of each row, the end of a text, and decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses.checks import finite_number, several, whole_number
from tl_lenses.model import LensModel, eos_ids, tokenizer_of
from tl_lenses.tokens import encode, up_to


@dataclass(frozen=True)
class Continuation:
    """How the texts of a patchscope are continued."""

    max_new_tokens: int = 0  # at most so many tokens; 0 for none
    do_sample: bool = False  # draw from `softmax(logits / temperature)`; False takes the likeliest token
    # temperature, seed: for the draws
    temperature: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # strings that end a text
    tokenizer: Any = None  # the target model's; None where nothing is generated
    ends: tuple[int, ...] = ()  # the ids that end a text (`eos_ids` of the target model)
    n_samples: int = 1  # texts per cell and target

    @classmethod
    def of(
        cls, model: LensModel, max_new_tokens: Any, do_sample: bool, temperature: Any, seed: Any, stop: Sequence[str],
        n_samples: Any = 1,
    ) -> "Continuation":  # fmt: skip
        """The user's arguments, checked."""
        n_new = whole_number("max_new_tokens", max_new_tokens, least=0)
        temperature = finite_number("temperature", temperature, above=0)
        seed = whole_number("seed", seed, least=-(2**63), most=2**63 - 1)
        n_samples = whole_number("n_samples", n_samples, least=1)
        if n_samples > 1 and not (do_sample and n_new):
            raise ValueError(f"{n_samples} samples of a cell would be equal: pass do_sample=True and max_new_tokens of 1 or more")
        stop = tuple(several("stop", stop, "strings"))
        if stop and not n_new:
            raise ValueError("stop strings can never match: nothing is generated with max_new_tokens=0")
        tokenizer = tokenizer_of(model) if n_new else None
        for text in stop:
            _check_stop(tokenizer, text)
        return cls(n_new, do_sample, temperature, seed, stop, tokenizer, tuple(eos_ids(model)), n_samples)

    def draws(self, n_cells: int, n_targets: int = 1) -> Float[Tensor, "cells targets samples new"] | None:
        """A uniform number per text and step; None where nothing is drawn.

        One generator per batch would make a text depend on the other texts of its batch.
        """
        if not self.do_sample:
            return None
        shape = (n_cells, n_targets, self.n_samples, max(self.max_new_tokens, 1))
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    def choose(self, logits: Float[Tensor, "rows d_vocab"], draw: Float[Tensor, " rows"] | None) -> Int[Tensor, " rows"]:
        """The next token of every row: the likeliest one, or the one that the row's random number falls on."""
        if draw is None:
            return logits.argmax(-1)
        cumulative = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        chosen = torch.searchsorted(cumulative, draw.to(cumulative)[:, None])
        return chosen.clamp_max(logits.shape[-1] - 1)[:, 0]

    def finished(self, ids: list[int]) -> bool:
        """Whether a text ends with its last token: EOS, or the end of a stop string."""
        if ids[-1] in self.ends:
            return True
        if not self.stop:
            return False
        text = self.tokenizer.decode(ids)
        return any(end in text for end in self.stop)

    def text(self, ids: list[int]) -> str:
        """The text of generated ids, cut off at EOS and at the first stop string."""
        text = self.tokenizer.decode(up_to(ids, self.ends))
        ends = [text.find(end) for end in self.stop if end in text]
        return text[: min(ends)] if ends else text


def _check_stop(tokenizer: Any, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"stop must be a list of strings, got {text!r} in it")
    if not text:
        raise ValueError("an empty stop string would end every text before it starts")
    again = tokenizer.decode(encode(tokenizer, [text])[0], clean_up_tokenization_spaces=False)
    if text not in again:
        raise ValueError(f"the stop string {text!r} can never match: this tokenizer writes it as {again!r}")
