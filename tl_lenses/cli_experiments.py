"""The command `tl-lenses experiment`: the experiments of the Patchscopes and Tuned Lens papers on a model of choice."""

import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_lenses.cli_inputs import (
    SEQ_LEN,
    Device,
    DType,
    Dtype,
    Lenses,
    data_source,
    lens_names,
    load_model,
    parse_layers,
    read_batches,
    say,
)
from tl_lenses.cli_lens_experiments import RUNNERS, Wanted

FIT_TOKENS = 2**14
# Options that only some experiments have.
_ONLY = {
    "to": ("cross-model",), "lens": ("next-token",), "no_guard": ("attributes", "multihop"),
    "target_layers": ("attributes", "multihop", "cross-model"),
    "max_new_tokens": ("attributes", "entities", "multihop"),
}  # fmt: skip
_LIMITS = {"next-token": 400, "attributes": 60, "entities": 60, "cross-model": 60, "multihop": 12}
# Whose default is not lab-gpt2: it has no checkpoints.
_MODELS = {"difficulty": "lab-neox"}
# Those of the Tuned Lens paper say which options they take.
_ONLY = {
    option: (*_ONLY.get(option, ()), *(name for name, (_, options, _) in RUNNERS.items() if option in options))
    for option in ("to", "lens", "no_guard", "target_layers", "max_new_tokens", "k", "checkpoint")
}

Name = Enum("Name", {name.replace("-", "_"): name for name in (*_LIMITS, *RUNNERS)}, type=str)


def experiment(
    name: Annotated[Name, typer.Argument(help="Which one.")],  # type: ignore[valid-type]
    model: Annotated[
        str | None,
        typer.Option(
            help="A Hugging Face name, a local directory, or a lab model; lab-gpt2 by default, lab-neox for difficulty."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for result.json, result.csv and heat maps; experiments/NAME by default.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="attributes, multihop: .tsv files of the paper or .json files of LRE; entities: .json or .csv with subject and "
            "description; next-token, cross-model: text as for `fit`. What is bundled by default."
        ),
    ] = None,
    to: Annotated[str | None, typer.Option(help="cross-model: the target model, with the same tokenizer.")] = None,
    lens: Lenses = None,
    layers: Annotated[str | None, typer.Option(help="Source layers, such as 0,4,8 or ::2; all by default.")] = None,
    target_layers: Annotated[str | None, typer.Option(help="Target layers; all but the last by default.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items (positions, facts, entities, queries, tokens, examples).")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Directions of a basis.")] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="difficulty: STEP=MODEL, an earlier checkpoint; repeatable. A lab model's own by default."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of generated texts; 8 for the lab models, else the paper's 20 (entities: 50).")
    ] = None,
    no_guard: Annotated[
        bool, typer.Option("--no-guard", help="Keep items whose answer is in the prompt or comes without a patch.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the draw, the halves and the controls.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """Run an experiment of the Patchscopes or the Tuned Lens paper: tables, and files with every number and picture.

    Example: tl-lenses experiment next-token --output next-token
    """
    from tl_lenses.checkpoint import check_output

    given = {
        "to": to is not None, "lens": bool(lens), "no_guard": no_guard, "target_layers": target_layers is not None,
        "max_new_tokens": max_new_tokens is not None, "k": k is not None,
        "checkpoint": bool(checkpoint),
    }  # fmt: skip
    for option, those in _ONLY.items():
        if given[option] and name.value not in those:
            raise ValueError(f"--{option.replace('_', '-')} is for {', '.join(those)}, not for {name.value}")
    if limit is not None and limit < 2:
        raise ValueError(f"--limit {limit} is too few: an experiment needs two items at least")
    if wrong := [one for one in checkpoint or () if not one.partition("=")[0].isdigit() or not one.partition("=")[2]]:
        raise ValueError(f"--checkpoint {wrong[0]!r}: expected STEP=MODEL, such as 1000=folder")
    model = model or _MODELS.get(name.value, "lab-gpt2")
    if name.value == "cross-model" and to is None:
        to = "lab-gpt2"
        model = "lab-gpt2-small" if model == "lab-gpt2" else model
    folder = check_output(Path("experiments") / name.value if output is None else output, overwrite=True)
    inputs = _inputs(name.value, data, lens)

    start = time.perf_counter()
    loaded = load_model(model, device, dtype.value)
    depth = loaded.cfg.n_layers
    settings: dict[str, Any] = {"seed": seed}
    if layers is not None:
        settings["layers"] = [at % (depth + 1) if isinstance(at, int) else at for at in parse_layers(layers, depth + 1)]
        if sites := [at for at in settings["layers"] if isinstance(at, str)]:
            raise ValueError(f"experiments take layers by number, got {sites[0]!r}")
    goal = loaded if to is None else load_model(to, device, dtype.value)
    if target_layers is not None:
        settings["target_layers"] = parse_layers(target_layers, goal.cfg.n_layers + 1)
    lab = model.startswith("lab-")
    if name.value in RUNNERS:
        wanted = Wanted(
            inputs[0],
            None if to is None else goal,
            inputs[1],
            settings.get("layers"),
            limit,
            k,
            seed,
            lab,
            tuple(checkpoint or ()),
        )
        result = RUNNERS[name.value][0](loaded, wanted)
    else:
        options = _Options(limit or _LIMITS[name.value], max_new_tokens, lab, not no_guard)
        result = _RUN[name.value](loaded, goal, inputs, settings, options)
    say(result.markdown() if markdown else str(result))
    result.save(folder)
    say(f"\n{time.perf_counter() - start:.0f} s; saved in {folder}")


class _Options:
    """What is left of the command line."""

    def __init__(self, limit: int, new: int | None, lab: bool, guard: bool) -> None:
        self.limit, self.guard = limit, guard
        self.new = lambda usual: new if new is not None else min(usual, 16 if usual == 50 else 8) if lab else usual


def _inputs(name: str, data: str | None, lens: Any) -> Any:
    """Facts, descriptions, or where text comes from and lenses: read before a model is loaded."""
    from tl_lenses.experiments.entities import read_descriptions
    from tl_lenses.experiments.facts import read_facts

    if name in ("attributes", "multihop"):
        return read_facts(data)
    if name == "entities":
        return read_descriptions(data)
    from tl_lenses.translators import Translators

    if (
        name == "detection"
    ):  # instructions and relations rather than text; the folder beside the checkout where there is one
        from tl_lenses.experiments.injections import beside, read_instructions

        folder = data or beside()
        read_instructions(folder)
        data_read = "lab" if folder is None else str(folder)
    else:
        data_read = data_source(data or "lab", "", "text")
    folders = lens_names(lens, taken=("token identity", "logit lens", "regression", "logit"))
    found = {one: Translators.load(folder) for one, folder in folders.items()}
    return data_read, found


def _text(model: Any, data: str, fit: bool, seed: int, rows: int = 0) -> Any:
    """Text to fit on or to measure on; of the bundled text other books, of files (which have one split) the same."""
    split = (
        ("train" if fit else "heldout") if data == "lab" else "train" if fit or Path(data).exists() else "validation"
    )
    limit = FIT_TOKENS if fit else None
    return read_batches(model, data, "text", split, None, 8, limit or max(rows * SEQ_LEN, 2 * SEQ_LEN), seed)


def _next_token(model: Any, _: Any, inputs: Any, settings: dict[str, Any], options: _Options) -> Any:
    import tl_lenses as tll
    from tl_lenses.experiments.next_token import next_token

    data, found = inputs
    if not found and data == "lab":
        text = _text(model, data, True, settings["seed"])
        found = {
            "regression": tll.fit_regression(model, text, settings.get("layers", None) and _below(model, settings))
        }
    lenses = {name: tll.Lens(model, maps) for name, maps in found.items()}
    text = _text(model, data, False, settings["seed"], -(-options.limit // 4) + 8)
    return next_token(model, text, lenses, n=options.limit, **settings)


def _below(model: Any, settings: dict[str, Any]) -> list[int] | None:
    """The layers that a lens is fitted at."""
    return [layer for layer in settings["layers"] if layer < model.cfg.n_layers] or None


def _attributes(model: Any, _: Any, facts: Any, settings: dict[str, Any], options: _Options) -> Any:
    from tl_lenses.experiments.attributes import attributes

    return attributes(
        model, facts, limit=options.limit, max_new_tokens=options.new(20), guard=options.guard, **settings
    )


def _entities(model: Any, _: Any, descriptions: Any, settings: dict[str, Any], options: _Options) -> Any:
    from tl_lenses.experiments.entities import entities

    return entities(model, descriptions, limit=options.limit, max_new_tokens=options.new(50), **settings)


def _multihop(model: Any, _: Any, facts: Any, settings: dict[str, Any], options: _Options) -> Any:
    from tl_lenses.experiments.multihop import multihop

    return multihop(model, facts, limit=options.limit, max_new_tokens=options.new(20), guard=options.guard, **settings)


def _cross_model(model: Any, to: Any, inputs: Any, settings: dict[str, Any], options: _Options) -> Any:
    import tl_lenses as tll
    from tl_lenses.experiments.cross_model import cross_model

    seed, data = settings["seed"], inputs[0]
    rows = settings.get("layers") or range(model.cfg.n_layers + 1)
    columns = settings.get("target_layers") or range(to.cfg.n_layers + 1)
    pairs = [(a, b) for a in rows for b in columns]
    maps = tll.fit_regression(model, _text(model, data, True, seed), to=to, pairs=pairs)
    text = _text(model, data, False, seed, options.limit + 8)
    return cross_model(model, to, maps, text, n=options.limit, seed=seed)


_RUN = {
    "next-token": _next_token, "attributes": _attributes, "entities": _entities, "multihop": _multihop,
    "cross-model": _cross_model,
}  # fmt: skip
