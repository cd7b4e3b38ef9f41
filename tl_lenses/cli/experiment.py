"""The group `tl-lenses experiment`: what every experiment is run with, and what becomes of its report.

An experiment is a function of a `Run` with options of its own, registered by `@command(...)`. The options that all of them have
stand here, once.
"""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tl_lenses.cli.inputs import data_source, lens_names, load_model, parse_layers, read_batches, saved_lenses
from tl_lenses.cli.messages import say
from tl_lenses.cli.options import Device, DType, Dtype
from tl_lenses.cli.parts import Shard, parse_shard, sharing
from tl_lenses.files import check_output


class Experiments(TyperGroup):
    """No name is a question."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """List the experiments where none is named."""
        return super().parse_args(ctx, args or ["--help"])


experiments = typer.Typer(
    cls=Experiments,
    help="Run an experiment of the Patchscopes or the Tuned Lens paper: tables, and files with every number and picture.\n\n"
    "Example: tl-lenses experiment next-token --output next-token",
)

Data = Annotated[str | None, typer.Option(help="Text, as for `fit`; by default the bundled books.")]
Lenses = Annotated[
    list[str] | None,
    typer.Option("--lens", help="A folder that `fit` wrote, or NAME=FOLDER; repeatable. By default lenses are fitted first."),
]
TargetLayers = Annotated[str | None, typer.Option(help="Target layers; all but the last by default.")]
NewTokens = Annotated[int | None, typer.Option(help="Of generated texts.")]
K = Annotated[int | None, typer.Option("--k", help="Directions of a basis; 16 for causal-basis, 8 for the others.")]


@dataclass(frozen=True)
class Run:
    """What every experiment is run with."""

    model: Any  # loaded
    is_lab: bool = True  # it is one of the lab models, whose defaults are small
    layers: list[int] | None = None  # `0..n_layers`, as asked for, or None for all
    n: Any = None  # how many items; None for all
    seed: int = 0  # of every draw
    # device, dtype: where further models go
    device: str | None = None
    dtype: str = "float32"
    data: str = "lab"  # the source of text, "lab" for the bundled books
    lenses: Mapping[str, Any] = field(default_factory=dict)  # translators by name, as given with `--lens`

    def load(self, name: str) -> Any:
        """A further model, of the same type and on the same device."""
        return load_model(name, self.device, self.dtype)

    def target_layers(self, text: str | None, model: Any = None) -> list[int | str] | None:
        """The layers of `--target-layers`."""
        return parse_layers(text, (model or self.model).cfg.n_layers + 1)

    def new_tokens(self, asked: int | None, usual: int) -> int:
        """`--max-new-tokens`: by default the paper's number, and fewer for the lab models, whose texts are short."""
        return asked if asked is not None else min(usual, 16 if usual == 50 else 8) if self.is_lab else usual

    def directions(self, asked: int | None, usual: int) -> int:
        """`--k`: by default so many directions as usual, at most d_model."""
        return min(usual, self.model.cfg.d_model) if asked is None else asked

    def text(self, *, fit: bool = False, tokens: int = 4096, seq_len: int | None = None, model: Any = None) -> Any:
        """Text to fit on or to measure on: of the bundled text other books, of a data set another split."""
        if self.data == "lab":
            split = "train" if fit else "heldout"
        else:  # files have one split
            split = "train" if fit or Path(self.data).exists() else "validation"
        batches = read_batches(model or self.model, self.data, "text", split, seq_len, 8, tokens, self.seed)
        if self.data == "lab":
            batches.name = f"the bundled text, {split}"
        return batches


def read_text(
    data: str | None = None, lens: Any = None, *, taken: Sequence[str] = ("regression", "logit"), **_: Any
) -> dict[str, Any]:
    """Where text comes from, and the lenses that were given, whose names are not taken by others."""
    loaded = saved_lenses(lens_names(lens, taken=taken))
    return {"data": data_source(data or "lab", "", "text"), "lenses": loaded}


def command(
    name: str,
    *,
    n: str,
    usual: int | None,
    model: str = "lab-gpt2",
    read: Callable[..., dict[str, Any]] = read_text,
    sweeps: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of a `Run` and its own options as `tl-lenses experiment NAME`.

    Args:
        n: of what `--n` are so many; `usual` by default, all of them if that is None.
        read: gets the options of the function by name before a model is loaded, and returns `data` and `lenses` of the `Run`:
            a file that is not there is refused at once.
        sweeps: it runs a patchscope of many cells, and takes --shard.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(
            model: str, output: Path | None, layers: str | None, n: int | None, limit: int | None, seed: int,
            markdown: bool, device: str | None, dtype: Dtype, shard: str | None = None, **options: Any,
        ) -> None:  # fmt: skip
            start = time.perf_counter()
            if limit is not None:
                typer.echo("note: --limit is called --n now", err=True)
                n = limit if n is None else n
            if n is not None and n < 2:
                raise ValueError(f"--n {n} is too few: an experiment needs two items at least")
            parse_shard(shard)
            folder = check_output(Path("experiments") / name if output is None else output, overwrite=True)
            given = read(**options)
            loaded = load_model(model, device, dtype.value)
            asked = parse_layers(layers, loaded.cfg.n_layers + 1)
            if asked is not None:  # before anything is fitted
                from tl_lenses.experiments.subject import layers_of

                asked = layers_of(asked, loaded.cfg.n_layers)
            how_many = usual if n is None else n
            made = Run(loaded, model.startswith("lab-"), asked, how_many, seed, device, dtype.value, **given)
            with sharing(shard, folder):
                report = function(made, **options)
            say(report.markdown() if markdown else str(report))
            report.save(folder)
            say(f"\n{time.perf_counter() - start:.0f} s; saved in {folder}")

        run.__doc__ = function.__doc__
        run.__signature__ = _signature(function, n, usual, model, sweeps)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
        experiments.command(name)(run)
        return function

    return register


def _signature(function: Callable[..., Any], n: str, usual: int | None, model: str, sweeps: bool) -> inspect.Signature:
    """The options of every experiment, and those of this one after the model."""
    counted = f"How many {n}; {'all' if usual is None else usual} by default."
    shared: Mapping[str, tuple[Any, Any]] = {
        "model": (Annotated[str, typer.Option(help="A Hugging Face name, a local directory, or a lab model.")], model),
        "output": (Annotated[Path | None, typer.Option(help="Folder for result.json, result.csv and pictures; experiments/NAME by default.")], None),
        "layers": (Annotated[str | None, typer.Option(help="Layers, such as 0,4,-1 or ::2; all by default.")], None),
        "n": (Annotated[int | None, typer.Option("--n", help=counted)], None),
        "limit": (Annotated[int | None, typer.Option("--limit", hidden=True)], None),
        "seed": (Annotated[int, typer.Option(help="Of every draw.")], 0),
        "markdown": (Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")], False),
        "device": (Device, None),
        "dtype": (DType, Dtype.float32), **({"shard": (Shard, None)} if sweeps else {}),
    }  # fmt: skip
    keyword = inspect.Parameter.KEYWORD_ONLY
    made = [inspect.Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in shared.items()]
    options = [p.replace(kind=keyword) for p in list(inspect.signature(function).parameters.values())[1:]]
    return inspect.Signature([made[0], *options, *made[1:]])
