"""The main job on the bundled model, offline: two lenses fitted, measured on other books and drawn, and a first patchscope.

`make demo` and `tl-lenses demo` run this file, and `make demo-real` its second half, on real models: a lens, a famous name described from
its hidden states, and the attributes of countries. It is written to be read: every step is a few lines of the public interface.
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
# Of a real model: about two minutes on two cores for the lens, whose steps score a sample of the vocabulary.
REAL_TOKENS = 2**13
REAL_STEPS, REAL_TOKENS_PER_STEP = 16, 512
REAL_PROMPT = "The Eiffel Tower is a famous landmark in the city of Paris."
NAME = "Diana, Princess of Wales"


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
        steps, tokens_per_step: for the tuned lens.
        heldout_tokens: how much of the books that no lens was fitted on is measured.
        seed: for the order of the text.
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

    size = max(1, tokens_per_step // SEQ_LEN)
    text = lambda split, limit: tll.token_batches(
        tll.lab.text(split), model.tokenizer, seq_len=SEQ_LEN, batch_size=size, shuffle_seed=seed, limit_tokens=limit
    )
    training = text("train", max(steps * tokens_per_step, 2 * SEQ_LEN))

    announce("Fitting the regression lens: the closed-form least-squares map from each layer to the last one")
    regression = tll.fit_regression(model, training, limit_tokens=REGRESSION_TOKENS, show_progress=bar)
    regression.save(folder / "regression", overwrite=True)

    announce(f"Training the tuned lens from it: {steps} steps of {tokens_per_step} tokens that minimise KL(model || lens)")
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
    announce("Decoding hidden states with the token-identity patchscope: a vector from the last token of a question replaces the")
    say(f"          `?` of {scope.prompt!r} at the same layer, and the model continues")
    sources = [tll.Source(question) for question in QUESTIONS]
    decoded = tll.patchscope(model, sources, scope, range(1, depth + 1), max_new_tokens=4, stop=("\n",), show_progress=bar)
    _print_patchscope(decoded, {q: tll.trajectory(model, lenses["logit"], q, top_k=1) for q in QUESTIONS}, say)

    announce("Done. Open the heat map in a browser:")
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        say(f"          {file} ({file.stat().st_size / 1000:,.0f} kB)")
    return folder


def run_real(
    name: str,
    output: str | Path = "demo-real",
    *,
    seed: int = 0,
    show_progress: bool | None = None,
    say: Callable[[str], Any] = print,
) -> Path:
    """A lens of a real model, what its states say of a famous name, and which attributes of countries they hold; some minutes.

    Args:
        name: of `tl_lenses.load_model`: a model that knows names and countries.
        seed: of the order of the text and of the draw of facts.
        output, show_progress, say: as in `run`.

    Raises:
        ValueError: the folder cannot be written; there is no such model, or it knows none of the facts.

    Example:
        >>> run_real("smollm2-135m")      # doctest: +SKIP
    """
    start, folder = time.perf_counter(), _folder(output)
    announce = lambda text: say(f"\n[{time.perf_counter() - start:5.1f} s] {text}")
    announce(f"Loading {name}")
    model = tll.load_model(name)
    _fit_and_draw(model, folder, seed, show_progress, announce, say)
    _describe(model, show_progress, announce, say)
    _ask_for_capitals(model, seed, show_progress, announce, say)
    announce(f"Done. The heat map is {folder / 'heatmap.html'}")
    return folder


def _fit_and_draw(model: Any, folder: Path, seed: int, bar: bool | None, announce: Any, say: Any) -> None:
    """Every third layer's tuned lens, measured beside the logit lens and drawn."""
    layers = list(range(0, model.cfg.n_layers, 3))
    text = lambda split, limit: tll.token_batches(
        tll.lab.text(split), model.tokenizer, seq_len=SEQ_LEN, batch_size=4, shuffle_seed=seed, limit_tokens=limit
    )
    announce(
        f"Fitting the tuned lens of layers {layers}: a regression on {REAL_TOKENS:,} tokens of books, then {REAL_STEPS} steps of {REAL_TOKENS_PER_STEP}"
    )
    tuned = tll.fit_tuned(
        model, text("train", REAL_TOKENS), REAL_STEPS, REAL_TOKENS_PER_STEP, init_tokens=REAL_TOKENS, layers=layers,
        seed=seed, show_progress=bar,
    )  # fmt: skip
    tuned.save(folder / "tuned", overwrite=True)
    lenses = {"logit": tll.Lens(model), "tuned": tll.Lens(model, tuned)}
    announce("Measuring the lenses on held-out books")
    say(f"\n{tll.evaluate(model, lenses, text('heldout', 1024), layers=layers, show_progress=bar)}")
    announce(f"Drawing what the tuned lens says on {REAL_PROMPT!r}")
    trajectory = tll.trajectory(model, lenses["tuned"], REAL_PROMPT, layers=[*layers, model.cfg.n_layers])
    trajectory.save(folder / "heatmap.html")
    trajectory.save(folder / "heatmap.svg")
    say(f"\n{trajectory}")


def _describe(model: Any, bar: bool | None, announce: Any, say: Any) -> None:
    """Ghandeharioun et al. 2024 (Patchscopes), section 4.3: a name's last vector in a prompt that asks for descriptions."""
    announce(f"Describing {NAME!r} from the state of its last token: it replaces the `x` that a description follows")
    say(f"          in {tll.scopes.entity_description().prompt!r}\n")
    layers = range(0, model.cfg.n_layers, 3)
    scope = tll.scopes.entity_description()
    result = tll.patchscope(model, tll.Source(NAME), scope, layers, max_new_tokens=14, stop=("\n",), show_progress=bar)
    assert result.text is not None  # tokens were asked for
    for (layer, _), text in zip(result.pairs, result.text[0], strict=True):
        say(f"  from layer {layer:>2}  {text.strip(' :,')}")


def _ask_for_capitals(model: Any, seed: int, bar: bool | None, announce: Any, say: Any) -> None:
    """Section 4.2 of the same paper: the capital, asked of a country's vector, and of that of another country as a control."""
    facts = [fact for fact in tll.experiments.read_facts() if fact.relation == "country_capital_city"]
    depth = model.cfg.n_layers
    layers = sorted({1, 2, *range(depth // 6, depth, depth // 6)})
    announce("Asking for the capital of countries by their vectors alone, and by those of other countries (shuffled)")
    result = tll.experiments.attributes(
        model, facts, layers=layers, target_layers=[1, 2, 3], max_new_tokens=6, n=12, seed=seed, show_progress=bar
    )
    patched, shuffled = (result.cells.by_source_layer(condition) for condition in ("patched", "shuffled sources"))
    say(
        f"\n  {len(result.facts)} capitals that the model knows: share that is named, in percent\n\n  from layer  patched  shuffled"
    )
    for layer in layers:
        say(f"  {layer:>10}  {100 * patched[layer]:>7.0f}  {100 * shuffled[layer]:>8.0f}")


def _folder(output: str | Path) -> Path:
    """The folder, made now: not after a minute of training."""
    from tl_lenses.files import check_output

    folder = check_output(output, overwrite=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _print_patchscope(decoded: Any, logit: dict[str, Any], say: Callable[[str], Any]) -> None:
    """One block per question: layer, what the logit lens says there, what the patched prompt says next, and its text."""
    top = decoded.top_k(3)
    for s, question in enumerate(decoded.sources):
        trajectory = logit[question]
        say(f"\n  {question!r}")
        say(f"  {'layer':>5}  {'logit lens':<14}{'token identity: top tokens':<46}text")
        for p, (layer, _) in enumerate(decoded.pairs):
            lens_token = trajectory.vocab[int(trajectory.top_ids[trajectory.layers.index(layer), 0, -1, 0])]
            tokens = "  ".join(f"{t!r} {float(w):.2f}" for t, w in zip(top.tokens[s][p], top.probs[s, p], strict=True))
            say(f"  {layer:>5}  {lens_token!r:<14}{tokens:<46}{decoded.text[s][p]!r}")
