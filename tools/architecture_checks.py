"""What is asked of the library on one model: each check compares with the plain model and gives a number and its limit.

results = run_checks(pair, CHECKS)      # {name: Result}, one entry for every check, whatever happens in it
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from families import BOS, D_MODEL, PAD, Pair, build, quiet
from torch import Tensor

import tl_lenses as tll

N, NEW, AT = 12, 5, 4  # tokens of a prompt, tokens generated, and the position that is patched
SAME = 2e-4  # nats: what two ways to the same float32 log-probabilities may differ by
HALF = 0.5  # nats: the same for bfloat16


class Wrong(Exception):
    """A check that failed otherwise than by its number: the message is the reason in a few words."""


@dataclass(frozen=True)
class Result:
    """Whether a check holds, its number, and where it does not hold the reason in four words or so and the whole error."""

    ok: bool
    value: float | None = None
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Check:
    """A column of the table: its heading, the function that measures, the limit, and the words for a number beyond it."""

    name: str
    measure: Callable[[Pair], float]
    limit: float
    words: str


# --- the plain model


def reference_logits(pair: Pair, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-probabilities of the plain model; its own cache is off."""
    kwargs = {} if mask is None else {"attention_mask": mask}
    if "use_cache" in getattr(pair.reference.config if hasattr(pair.reference, "config") else None, "__dict__", {}):
        kwargs["use_cache"] = False
    output = pair.reference(input_ids=tokens, **kwargs)
    return getattr(output, "logits", output).float().log_softmax(-1)


@contextmanager
def edited_input(pair: Pair, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The plain model while the residual that enters block `layer` (`n_layers`: leaves the last) is edited."""
    if layer == len(pair.blocks):

        def after(module: Any, args: Any, output: Any) -> Any:
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        handle = pair.blocks[layer - 1].register_forward_hook(after)
    else:

        def before(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

        handle = pair.blocks[layer].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def reference_rows(pair: Pair, tokens: Tensor) -> dict[int, Tensor]:
    """Log-probabilities of every layer, by the plain model: its last block replaced by the residual of the layer."""
    depth = len(pair.blocks)
    states: dict[int, Tensor] = {}
    for layer in range(depth + 1):
        with edited_input(pair, layer, lambda x, layer=layer: states.setdefault(layer, x.clone())):
            reference_logits(pair, tokens)
    rows = {}
    for layer, state in states.items():
        with edited_input(pair, depth, lambda x, state=state: state):
            rows[layer] = reference_logits(pair, tokens)
    return rows


def adding(pair: Pair, layer: int, vector: Tensor, at: int) -> Any:
    """The plain model while `vector` is added at one position of the residual that enters block `layer`."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, at] += vector
        return x

    return edited_input(pair, layer, edit)


# --- inputs


def prompts(rows: int = 2, n: int = N, seed: int = 1) -> Tensor:
    """Random tokens `[rows, n]` after BOS; no other special token among them."""
    generator = torch.Generator().manual_seed(seed)
    # A multimodal model takes the ids from 300 on for images.
    tokens = torch.randint(PAD + 1, 290, (rows, n), generator=generator)
    tokens[:, 0] = BOS
    return tokens


def vector() -> Tensor:
    """A random direction, long enough to change what is predicted."""
    return 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference of log-probabilities; infinite where one is not finite."""
    difference = (a.float().log_softmax(-1) - b.float().log_softmax(-1)).abs().max()
    return float(difference) if difference.isfinite() else float("inf")


# --- the checks


def last_row(pair: Pair) -> float:
    """The last row of a trajectory's lens, and the model's own logits, against the plain model."""
    tokens, seen = prompts(), {}
    logits = tll.run(pair.model, tokens, tll.Lens(pair.model).hooks(seen, layers=[-1]))
    expected = reference_logits(pair, tokens)
    return max(gap(row, expected) for row in (logits, *seen.values()))


def every_row(pair: Pair) -> float:
    """The logit lens of every layer against the plain model's own head on the plain model's states."""
    tokens, seen = prompts(), {}
    tll.run(pair.model, tokens, tll.Lens(pair.model).hooks(seen))
    expected = reference_rows(pair, tokens)
    if len(seen) != len(expected):
        raise Wrong(f"{len(seen)} rows, expected {len(expected)}")
    return max(gap(row, expected[layer]) for layer, row in seen.items())


def patched(pair: Pair) -> float:
    """A vector added at one position of one layer, for every layer, against a hook on the plain model."""
    tokens, worst = prompts(), 0.0
    plain = reference_logits(pair, tokens)
    for layer in range(len(pair.blocks) + 1):
        got = tll.run(pair.model, tokens, [tll.patch(tll.site(pair.model, layer), tll.edits.add(vector()), pos=AT)])
        with adding(pair, layer, vector(), AT):
            expected = reference_logits(pair, tokens)
        if gap(expected, plain) < 10 * SAME:
            raise Wrong("a patch changes nothing")
        worst = max(worst, gap(got, expected))
    return worst


def left_padding(pair: Pair) -> float:
    """A row padded on the left, next to a whole one, against the plain model on the row alone."""
    tokens = prompts()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    tokens = tokens.masked_fill(mask == 0, PAD)
    got = tll.run(pair.model, tokens, attention_mask=mask)
    return max(gap(got[:1, 3:], reference_logits(pair, tokens[:1, 3:])), gap(got[1:], reference_logits(pair, tokens[1:])))


def batched(pair: Pair) -> float:
    """Two rows at once against each alone, and two padded texts continued at once against each alone."""
    tokens = prompts(3)
    together = tll.run(pair.model, tokens)
    worst = max(gap(together[i : i + 1], tll.run(pair.model, tokens[i : i + 1])) for i in range(len(tokens)))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    both = tll.generate(pair.model, tokens.masked_fill(mask == 0, PAD), (), NEW, attention_mask=mask, stop_at_eos=False)
    for i, start in enumerate((3, 0, 0)):
        alone = tll.generate(pair.model, tokens[i : i + 1, start:], (), NEW, stop_at_eos=False, use_cache=False)
        if not torch.equal(both[i, start:], alone[0]):
            raise Wrong("padded generation differs")
    return worst


def cached(pair: Pair) -> float:
    """Tokens that differ between the plain model's greedy choice under a patch and ours, without and with the cache."""
    tokens, layer = prompts(), len(pair.blocks) // 2
    expected = tokens
    with adding(pair, layer, vector(), AT):
        for _ in range(NEW):
            expected = torch.cat([expected, reference_logits(pair, expected)[:, -1:].argmax(-1)], 1)
    hooks = [tll.patch(layer, tll.edits.add(vector()), pos=AT)]
    for use_cache in (False, True):
        got = tll.generate(pair.model, tokens, hooks, NEW, stop_at_eos=False, use_cache=use_cache)
        if not torch.equal(got, expected):
            raise Wrong(f"{'cached' if use_cache else 'uncached'} tokens differ")
    return 0.0


def sweep(pair: Pair) -> float:
    """A patchscope whose cells share what they can, against one cell at a time; also where some texts end early."""
    depth = len(pair.blocks)
    source = tll.Source(prompts(1, seed=3)[0], pos=-1)
    target = tll.Target(prompts(1, seed=4)[0], pos=5)
    tokenizer, worst = pair.model.tokenizer, 0.0
    eos, tokenizer.eos_token_id = tokenizer.eos_token_id, None
    try:
        for end_early in (False, True):
            shared, single = (
                tll.patchscope(
                    pair.model,
                    source,
                    target,
                    layers=[0, depth],
                    target_layers=[0, depth - 1],
                    max_new_tokens=NEW,
                    share=share,
                    show_progress=False,
                )
                for share in (True, False)
            )
            worst = max(worst, gap(shared.logits, single.logits))
            if not torch.equal(shared.tokens, single.tokens):
                raise Wrong("shared texts differ" + (" once some end" if end_early else ""))
            if not end_early:  # the second token of the first cell, where it has one, ends its text the next time
                tokenizer.eos_token_id = [int(token) for token in shared.tokens[0, 0, :2] if token >= 0][-1]
    finally:
        tokenizer.eos_token_id = eos
    return worst


def _kl(pair: Pair, lens: tll.Lens, tokens: Tensor) -> float:
    scores = tll.evaluate(pair.model, lens, tokens, layers=range(len(pair.blocks)), show_progress=False)
    return float(scores.to_frame()["kl"].mean())


def _improvement(pair: Pair, translators: tll.Translators) -> float:
    """KL of the fitted lens on other text as a part of the logit lens' own, over all layers."""
    other = prompts(6, 24, seed=6)
    return _kl(pair, tll.Lens(pair.model, translators), other) / _kl(pair, tll.Lens(pair.model), other)


def regression(pair: Pair) -> float:
    """A regression lens on random text: does it improve on the logit lens on other text?"""
    return _improvement(pair, tll.fit_regression(pair.model, prompts(64, 24, seed=5), show_progress=False))


def tuned(pair: Pair) -> float:
    """A tuned lens from the identity on: does it improve?"""
    batches = prompts(16, 24, seed=5).split(4)
    with torch.enable_grad():
        fitted = tll.fit_tuned(pair.model, list(batches), steps=20, init="identity", optimizer="adam", lr=0.02, show_progress=False)
    return _improvement(pair, fitted)


def saved(pair: Pair) -> float:
    """A lens written, read and checked against the model: the same logits?"""
    tokens, seen = prompts(), {}
    fitted = tll.fit_regression(pair.model, prompts(64, 24, seed=5), show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        fitted.save(Path(folder) / "lens")
        loaded = tll.Translators.load(Path(folder) / "lens")
    for name, translators in (("fitted", fitted), ("loaded", loaded)):
        into: dict[Any, Tensor] = {}
        tll.run(pair.model, tokens, tll.Lens(pair.model, translators, check="strict").hooks(into))
        seen[name] = torch.stack([into[layer] for layer in sorted(into)])
    return float((seen["fitted"] - seen["loaded"]).abs().max())


def bfloat16(pair: Pair) -> float:
    """The same model in bfloat16: last row, patch, cached generation and a fit."""
    half = build(pair.family, torch.bfloat16)
    tokens, seen, depth = prompts(), {}, len(half.blocks)
    tll.run(half.model, tokens, tll.Lens(half.model).hooks(seen, layers=[depth]))
    worst = gap(seen[depth], reference_logits(half, tokens))
    got = tll.run(half.model, tokens, [tll.patch(depth - 1, tll.edits.add(vector()), pos=AT)])
    with adding(half, depth - 1, vector().bfloat16(), AT):
        worst = max(worst, gap(got, reference_logits(half, tokens)))
    tll.generate(half.model, tokens, (), NEW, stop_at_eos=False)
    if regression(half) >= 1:
        raise Wrong("no improvement by regression")
    return worst


def library_check(pair: Pair) -> float:
    """How many of the library's own invariants fail (`tll.check`)."""
    report = tll.check(pair.model, prompts(1))
    if not report.ok:
        raise Wrong("check: " + ", ".join(c.name.split(" (")[0] for c in report.checks if not c.passed))
    return 0.0


CHECKS = (
    Check("last row", last_row, SAME, "last row differs"),
    Check("every row", every_row, SAME, "rows differ"),
    Check("patch", patched, SAME, "patched logits differ"),
    Check("left padding", left_padding, SAME, "padded logits differ"),
    Check("batch", batched, SAME, "batched logits differ"),
    Check("cache", cached, 0, "tokens differ"),
    Check("sweep", sweep, SAME, "shared logits differ"),
    Check("regression", regression, 0.9999, "no improvement"),
    Check("tuned", tuned, 0.9999, "no improvement"),
    Check("save, load", saved, 0, "loaded lens differs"),
    Check("bfloat16", bfloat16, HALF, "bfloat16 logits differ"),
    Check("`check`", library_check, 0, "an invariant fails"),
)

AGAINST_PLAIN = ("last row", "every row", "patch", "left padding", "cache", "bfloat16")

# What an error means, in four words or so: a pattern of its text, and the words.
WORDS = (
    ("are not what its final norm and unembedding give", "refused: another readout"),
    ("never passes through .*its final residual cannot", "a residual never fires"),
    ("batch_select_indices", "cache cannot drop rows"),
    ("does not support compatibility mode", "TransformerLens has none"),
    ("hooks never fired", "a residual never fires"),
    ("mat1 and mat2 shapes cannot", "readout of another width"),
    ("no hook 'blocks", "no residual stream there"),
    ("Original component not set", "TransformerLens' forward pass fails"),
    ("Sizes of tensors must match", "cache of another shape"),
    ("Expected size for first two dim", "mask and keys differ"),
    ("The size of tensor a", "folding weights fails"),
    ("W_in not found", "folding weights fails"),
)


def bridge_gap(pair: Pair) -> float:
    """How far TransformerLens' own log-probabilities are from the plain model's, without any of this library."""
    with quiet(), torch.no_grad():
        return gap(pair.model(prompts()), reference_logits(pair, prompts()))


def run_checks(pair: Pair, checks: Iterable[Check] = CHECKS) -> dict[str, dict[str, Any]]:
    """The result of every check as plain values; an error in one is its reason and stops no other."""
    bridge = bridge_gap(pair)
    return {check.name: asdict(_result(pair, check, bridge)) for check in checks}


def _result(pair: Pair, check: Check, bridge: float) -> Result:
    try:
        with quiet(), torch.no_grad():
            torch.manual_seed(0)
            value = check.measure(pair)
    except Wrong as wrong:
        if bridge > SAME and check.name in AGAINST_PLAIN:
            return Result(False, reason="TransformerLens itself differs", detail=f"by {bridge:.3g}; {wrong}")
        return Result(False, reason=str(wrong), detail=str(wrong))
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return Result(False, reason=in_few_words(detail), detail=detail[:600])
    if value <= check.limit:
        return Result(True, value)
    if bridge > SAME and check.name in AGAINST_PLAIN:
        return Result(False, value, "TransformerLens itself differs", f"by {bridge:.3g}; {check.name} by {value:.3g}")
    return Result(False, value, check.words, f"{value:.3g}, allowed {check.limit:g}")


def in_few_words(error: str) -> str:
    """The reason that stands in the table for an error."""
    for pattern, words in WORDS:
        if re.search(pattern, error):
            return words
    kind, _, text = error.partition(": ")
    return " ".join([kind, *text.split()[:4]])
