"""Can the numbers on this model be trusted? The library's invariants, run on a prompt."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_lenses import edits
from tl_lenses.checks import whole_number
from tl_lenses.decoding import abilities_of
from tl_lenses.files import csv_text, json_text, versions
from tl_lenses.hooks import generate, patch, run
from tl_lenses.identity import basis_of
from tl_lenses.layers import layer_site
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, check_model, device_of, dtype_of, forward, lock_of, n_layers, name_of, padding_of, prepare
from tl_lenses.shown import Tabled
from tl_lenses.tokens import Batch, special_id


@dataclass(frozen=True)
class Check:
    """One invariant: what was measured, what is allowed, and whether it holds."""

    name: str
    measured: float
    allowed: str
    passed: bool


@dataclass(frozen=True, repr=False)
class CheckReport(Tabled):
    """The invariants of one model. `print` it, or take `to_frame()`, `save(path)`."""

    model: str
    basis: str
    checks: list[Check]
    notes: tuple[str, ...] = ()  # how text and batches are read on this model, where it is not as everywhere

    @property
    def ok(self) -> bool:
        """All of them hold."""
        return all(c.passed for c in self.checks)

    def to_frame(self) -> Any:
        """A pandas data frame, a row per invariant: name, measured, allowed, passed."""
        import pandas

        return pandas.DataFrame(map(asdict, self.checks), columns=["name", "measured", "allowed", "passed"])

    def __repr__(self) -> str:
        passed = sum(c.passed for c in self.checks)
        return f"CheckReport({self.model!r}, {self.basis} basis, {passed} of {len(self.checks)} invariants hold)"

    def _table(self) -> tuple[str, list[str], list[list[Any]], str]:
        rows = [[c.name, float(c.measured), c.allowed, "ok" if c.passed else "FAILS"] for c in self.checks]
        columns = ["invariant", "measured", "allowed", ""]
        return f"{self.model} ({self.basis} basis)", columns, rows, "\n".join(self.notes)

    def save(self, path: str | Path, *, overwrite: bool = True) -> Path:
        """Write `.csv`, `.json` or `.html`, replacing an existing file unless `overwrite=False`; returns the path.

        Raises:
            ValueError: another suffix.
        """
        content = {"model": self.model, "basis": self.basis, "ok": self.ok, "notes": list(self.notes)}
        writers: dict[str, Callable[[], str | bytes]] = {
            ".csv": lambda: csv_text(self.to_frame()),
            ".json": lambda: json_text(content | {"versions": versions(), "checks": [*map(asdict, self.checks)]}) + "\n",
            ".html": lambda: self._views.page_of("check", self._repr_html_()),
        }
        return self._views.save_as(path, writers, example="check.csv", overwrite=overwrite)


@torch.no_grad()
def check(model: LensModel, prompt: Tensor | str | None = None, *, seed: int = 0, reference: Any = None) -> CheckReport:
    """Prove on a prompt that reading and patching are right on this model, in a few seconds.

    The last row equals the model; a no-op patch is bit-identical; a random patch changes the output; positions before
    a patch do not change; batched equals single; cached equals uncached generation; no hook is left behind.

    Args:
        prompt: text or token ids `[1, pos]`; a dozen random ids by default.
        seed: for the random ids and vectors.
        reference: the plain Hugging Face model, loaded again: the model's logits are compared with its own. A bridge changes
            the one that it wraps in place, weight processing included, so `model.original_model` cannot tell.

    Returns:
        `CheckReport`, which prints as a table; `.ok` says whether everything holds.

    Example:
        >>> print(tll.check(model))      # doctest: +SKIP
    """
    check_model(model, what="a check")
    if reference is not None:
        _check_reference(model, reference)
    seed = whole_number("seed", seed)
    depth, d_vocab = n_layers(model), int(model.cfg.d_vocab)
    generator = torch.Generator().manual_seed(seed)
    if prompt is None:
        prompt = torch.randint(min(3, d_vocab - 1), d_vocab, (1, 12), generator=generator)
    tokens = prepare(model, prompt).tokens
    n = tokens.shape[1]
    if len(tokens) != 1 or n < 4:
        raise ValueError(f"a check needs one prompt of at least 4 tokens, got {list(tokens.shape)}")
    half = dtype_of(model) in (torch.float16, torch.bfloat16)
    before = _hook_count(model)
    plain: Tensor = forward(model, Batch(tokens, None))
    scale = float(plain.abs().max())
    checks = []

    def add(name: str, measured: float, limit: float, *, above: bool = False) -> None:
        passed = measured > limit if above else measured <= limit
        checks.append(Check(name, measured, f"{'>' if above else '<='} {limit:g}", passed))

    if reference is not None:
        expected = reference(tokens.to(next(reference.parameters()).device)).logits.to(plain.device)
        gap = (plain.float().log_softmax(-1) - expected.float().log_softmax(-1)).abs().max()
        add("the model is the plain Hugging Face model (log-probabilities)", float(gap), 0.5 if half else 1e-3)
    seen: dict[Any, Tensor] = {}
    lens = Lens(model)
    again = run(model, tokens, lens.hooks(seen, layers=[depth]))
    add("the last row is the model (relative)", float((seen[depth] - plain).abs().max()) / scale, 1e-5)
    add("reading changes nothing", float((again - plain).abs().max()), 0.0)

    sites = [layer_site(layer, depth) for layer in range(depth + 1)]
    no_ops = [patch(s, lambda x: x.clone(), pos=pos) for pos in (None, [0, -1]) for s in sites]
    same = run(model, tokens, no_ops)
    add("no-op patches at every layer", float((same - plain).abs().max()), 0.0)

    middle = n // 2
    changes, leaks = [], []
    for s in sites:
        vector = torch.randn(int(model.cfg.d_model), generator=generator) * 3
        patched = run(model, tokens, [patch(s, edits.norm_match(vector), pos=middle)])
        changes.append(float((patched[:, middle:] - plain[:, middle:]).abs().max()) / scale)
        leaks.append(float((patched[:, :middle] - plain[:, :middle]).abs().max()) / scale)
    add("a random patch changes the output, at every layer", min(changes), 1e-3, above=True)
    add("positions before a patch do not change (relative)", max(leaks), 1e-2 if half else 1e-6)

    pads = torch.full((1, 3), int(tokens[0, 0]), device=tokens.device)
    other = torch.cat([pads, tokens], 1)
    longer = torch.randint(min(3, d_vocab - 1), d_vocab, (1, n + 3), generator=generator).to(tokens)
    mask = torch.ones(2, n + 3, dtype=torch.long, device=tokens.device)
    mask[0, :3] = 0
    batched = run(model, torch.cat([other, longer]), attention_mask=mask)
    gap = (batched[0, 3:].float().log_softmax(-1) - plain[0].float().log_softmax(-1)).abs().max()
    add("batched and left-padded equals single (log-probabilities)", float(gap), 0.5 if half else 1e-4)

    new = min(4, int(getattr(model.cfg, "n_ctx", None) or 10**6) - n)
    if new > 0:
        hooks = [patch(layer_site(depth // 2, depth), edits.scale(1.5), pos=-1)]
        cached = generate(model, tokens, hooks, new, stop_at_eos=False)
        uncached = generate(model, tokens, hooks, new, stop_at_eos=False, use_cache=False)
        add("cached generation equals uncached (tokens that differ)", float((cached != uncached).sum()), 0.0)
    add("hooks left behind", float(_hook_count(model) - before), 0.0)
    assert device_of(model) == tokens.device
    return CheckReport(name_of(model), basis_of(model), checks, _notes(model, reference))


def _check_reference(model: LensModel, reference: Any) -> None:
    """Refuse what cannot be compared with."""
    if not isinstance(reference, torch.nn.Module) or not hasattr(reference, "get_input_embeddings"):
        raise TypeError(
            f"reference must be the plain Hugging Face model, got {type(reference).__name__}: load it with from_pretrained"
        )
    if reference.training:
        raise ValueError("the reference is in train mode, so it would drop out at random: call reference.eval() first")
    n_ids, d_vocab = reference.get_input_embeddings().weight.shape[0], int(model.cfg.d_vocab)  # type: ignore[operator]
    if n_ids != d_vocab:
        raise ValueError(
            f"the reference has a vocabulary of {n_ids} ids and {name_of(model)!r} one of {d_vocab}: load the model that was wrapped"
        )


def _notes(model: LensModel, reference: Any) -> tuple[str, ...]:
    """How text and batches are read on this model, where it is not as everywhere."""
    notes = []
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        bos = special_id(tokenizer, "bos")
        if bos is not None:
            notes.append(f"text starts with BOS {tokenizer.decode([bos])!r} (id {bos})")
        else:
            filled = f" ({tokenizer.bos_token!r} was put in its place)" if tokenizer.bos_token is not None else ""
            notes.append(f"text starts without BOS: this tokenizer has none of its own{filled}")
    notes += {
        "mask": [],
        "positions": ["left-padded batches run with explicit positions"],
        "rows": ["left-padded batches run row by row, and are refused under hooks"],
    }[padding_of(model)]
    if not abilities_of(model).steps:
        notes.append("generation runs whole sequences: the key-value cache gives other logits than a whole pass")
    if reference is None:
        notes.append("not compared with the plain Hugging Face model: check(model, reference=...) does")
    return tuple(notes)


def _hook_count(model: LensModel) -> int:
    points = {id(p): p for p in model.hook_dict.values()}
    with lock_of(model):  # those of other threads are no leftovers
        return sum(len(p._forward_hooks) for p in points.values())
