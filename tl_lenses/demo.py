"""The main job on the bundled model, offline: two lenses fitted, measured on other books and drawn, and a first patchscope.

`make demo` and `tl-lenses demo` run this file. It is written to be read: every step is a few lines of the public interface.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tl_lenses as tll

MODEL = "lab-gpt2"
SEQ_LEN = 128
REGRESSION_TOKENS = 2**14  # 64 per dimension
# A fact that the model learned, with its answer, so that the position before the answer has it as target.
PROMPT = "The capital of Japan is the city of Tokyo."
# Unfinished facts: what does the vector at their last token say, layer by layer?
QUESTIONS = ("The capital of Japan is the city of", "Pizza originates from the country of")


def run(
    output: str | Path = "demo",
    *,
    steps: int = 48,
    tokens_per_step: int = 512,
    heldout_tokens: int = 4096,
    seed: int = 0,
    show_progress: bool | None = None,
    say: Callable[[str], Any] = print,
) -> Path:
    """Fit, measure, draw and decode on the bundled model; about two minutes on two cores.

    Args:
        output: folder for the lenses and the heat map; files of an earlier run are replaced.
        steps, tokens_per_step: of the tuned lens.
        heldout_tokens: how much of the books that no lens was fitted on is measured.
        seed: of the order of the text.
        show_progress: progress bars; None decides by where the output goes.
        say: takes each line that is announced.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is a file or cannot be written.

    Example:
        >>> run("demo")      # doctest: +SKIP
    """
    start = time.perf_counter()
    folder = _folder(output)
    bar = sys.stderr.isatty() if show_progress is None else show_progress

    def announce(text: str) -> None:
        say(f"\n[{time.perf_counter() - start:5.1f} s] {text}")

    about = next(model for model in tll.lab.available() if model.name == MODEL)
    announce(f"Loading {MODEL} ({about.n_bytes / 1e6:.0f} MB, bundled): {about.description}")
    model = tll.lab.load(MODEL)
    depth = model.cfg.n_layers

    def text(split: str, limit: int) -> Any:
        return tll.token_batches(
            tll.lab.text(split),
            model.tokenizer,
            seq_len=SEQ_LEN,
            batch_size=max(1, tokens_per_step // SEQ_LEN),
            shuffle_seed=seed,
            limit_tokens=limit,
        )

    training = text("train", max(steps * tokens_per_step, 2 * SEQ_LEN))

    announce("Fitting the regression lens: the closed-form least-squares map from each layer to the last one")
    regression = tll.fit_regression(model, training, limit_tokens=REGRESSION_TOKENS, show_progress=bar)
    regression.save(folder / "regression", overwrite=True)

    announce(
        f"Training the tuned lens from it: {steps} steps of {tokens_per_step} tokens that minimise KL(model || lens)"
    )
    tuned = tll.fit_tuned(model, training, steps, tokens_per_step, init=regression, seed=seed, show_progress=bar)
    tuned.save(folder / "tuned", overwrite=True)

    lenses = {"logit": tll.Lens(model), "regression": tll.Lens(model, regression), "tuned": tll.Lens(model, tuned)}
    heldout = text("heldout", max(heldout_tokens, 2 * SEQ_LEN))
    announce("Measuring the logit lens and both fitted ones on held-out books (the last row is the model itself)")
    scores = tll.evaluate(model, lenses, heldout, show_progress=bar)
    say(f"\n{scores}")

    announce(f"Drawing what the lenses say on {PROMPT!r}")
    trajectories = tll.trajectory(model, lenses, PROMPT)
    trajectories.save(folder / "heatmap.html")
    trajectories["tuned"].save(folder / "heatmap.svg")
    say(f"\n{trajectories['tuned']}")

    scope = tll.scopes.token_identity()
    announce(
        "Decoding hidden states with the token-identity patchscope: a vector from the last token of a question replaces the"
    )
    say(f"          `?` of {scope.prompt!r} at the same layer, and the model goes on")
    decoded = tll.patchscope(
        model,
        [tll.Source(question) for question in QUESTIONS],
        scope,
        layers=range(1, depth + 1),
        max_new_tokens=4,
        stop=("\n",),
        show_progress=bar,
    )
    _print_patchscope(decoded, {q: tll.trajectory(model, lenses["logit"], q, top_k=1) for q in QUESTIONS}, say)

    announce("Done. Open the heat map in a browser:")
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        say(f"          {file} ({file.stat().st_size / 1000:,.0f} kB)")
    return folder


def _folder(output: str | Path) -> Path:
    """The folder, made now: not after a minute of training."""
    from tl_lenses.checkpoint import check_output

    folder = check_output(output, overwrite=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _print_patchscope(decoded: Any, logit: dict[str, Any], say: Callable[[str], Any]) -> None:
    """One block per question: layer, what the logit lens says there, what the patched prompt says next, and its text."""
    top = decoded.top_k(3)
    for s, question in enumerate(decoded.sources):
        said = logit[question]
        say(f"\n  {question!r}")
        say(f"  {'layer':>5}  {'logit lens':<14}{'token identity: top tokens':<46}text")
        for p, (layer, _) in enumerate(decoded.pairs):
            lens_token = said.vocab[int(said.top_ids[said.layers.index(layer), 0, -1, 0])]
            tokens = "  ".join(f"{t!r} {float(w):.2f}" for t, w in zip(top.tokens[s][p], top.probs[s, p], strict=True))
            say(f"  {layer:>5}  {lens_token!r:<14}{tokens:<46}{decoded.text[s][p]!r}")
