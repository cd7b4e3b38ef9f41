"""Can the numbers on this model be trusted? The library's invariants, run on a prompt."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_lenses import edits
from tl_lenses.fingerprint import basis_of
from tl_lenses.hooks import generate, patch, run
from tl_lenses.lens import Lens
from tl_lenses.model import Batch, LensModel, check_model, device_of, dtype_of, forward, n_layers, name_of
from tl_lenses.sites import layer_site


@dataclass(frozen=True)
class Check:
    """One invariant: what was measured, what is allowed, and whether it holds."""

    name: str
    measured: float
    allowed: str
    passed: bool


@dataclass(frozen=True)
class Report:
    """The invariants of one model. `ok` is whether all hold."""

    model: str
    basis: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """All of them hold."""
        return all(c.passed for c in self.checks)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"{self.model} ({self.basis} basis)", title_justify="left")
        table.add_column("invariant")
        table.add_column("measured", justify="right")
        table.add_column("allowed", justify="right")
        table.add_column("")
        for c in self.checks:
            table.add_row(c.name, f"{c.measured:.2g}", c.allowed, "[green]ok[/]" if c.passed else "[bold red]FAILS[/]")
        return table

    def __str__(self) -> str:
        lines = [f"{self.model} ({self.basis} basis)"]
        lines += [
            f"  {'ok   ' if c.passed else 'FAILS'} {c.name}: {c.measured:.2g} (allowed {c.allowed})"
            for c in self.checks
        ]
        return "\n".join(lines)


@torch.no_grad()
def check(model: LensModel, prompt: Tensor | str | None = None, *, seed: int = 0) -> Report:
    """Prove on a prompt that reading and patching are right on this model, in a few seconds.

    The last row equals the model; a no-op patch is bit-identical; a random patch changes the output; positions
    before a patch do not
    change; batched equals single; cached equals uncached generation; no hook is left behind.

    Args:
        prompt: text or token ids `[1, pos]`; a dozen random ids by default.
        seed: of the random ids and vectors.

    Returns:
        `Report`, which prints as a table; `.ok` says whether everything holds.

    Example:
        >>> print(tll.check(model))      # doctest: +SKIP
    """
    from tl_lenses.model import prepare

    check_model(model, what="a check")
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

    seen: dict[Any, Tensor] = {}
    lens = Lens(model)
    again = run(model, tokens, lens.hooks(seen, layers=[depth]))
    add("the last row is the model (relative)", float((seen[depth] - plain).abs().max()) / scale, 1e-5)
    add("reading changes nothing", float((again - plain).abs().max()), 0.0)

    sites = [layer_site(layer, depth) for layer in range(depth + 1)]
    same = run(
        model,
        tokens,
        [patch(s, lambda x: x.clone()) for s in sites] + [patch(s, lambda x: x.clone(), pos=[0, -1]) for s in sites],
    )
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
    return Report(name_of(model), basis_of(model), checks)


def _hook_count(model: LensModel) -> int:
    points = {id(p): p for p in model.hook_dict.values()}
    return sum(len(p._forward_hooks) for p in points.values())
