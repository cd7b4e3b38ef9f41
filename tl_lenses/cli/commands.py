"""The command `tl-lenses`: its subcommands, each in its own file, and how errors are printed for all of them."""

import contextlib
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tl_lenses.cli import lens_experiments, patchscope_experiments  # noqa: F401  they register their commands
from tl_lenses.cli.capture import capture
from tl_lenses.cli.check import check
from tl_lenses.cli.demo import demo
from tl_lenses.cli.evaluate import evaluate
from tl_lenses.cli.experiment import experiments
from tl_lenses.cli.fit import fit
from tl_lenses.cli.fit_scope import fit_scope
from tl_lenses.cli.lenses import convert, offered, pull, push
from tl_lenses.cli.messages import fail, joined, one_line, quiet
from tl_lenses.cli.parts import noted, parts_of
from tl_lenses.cli.patchscope import patchscope
from tl_lenses.cli.show import show
from tl_lenses.cli.version import version
from tl_lenses.patchscopes.parts import merging


def merge(output: Annotated[str, typer.Argument(help="What --output or --save of the shared command said.")]) -> None:
    """Put the parts of a shared sweep together (`experiment` or `patchscope` with --shard): the result of one run, exactly.

    Example: tl-lenses merge experiments/next-token
    """
    with merging(parts_of(output)) as command:
        if code := app(command, standalone_mode=False):
            raise typer.Exit(code)


class Commands(TyperGroup):
    """Errors are one line on stderr, and libraries keep quiet, unless --debug is given."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run; usage errors leave with 2, others with 1, Ctrl-C with 130."""
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except Exception as error:
            if not hasattr(error, "format_message"):  # a usage error, whichever click typer comes with
                raise
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            fail(f"{joined(error.format_message())}{hint}")  # type: ignore[attr-defined]
            code = getattr(error, "exit_code", 2)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Without arguments, show the help."""
        noted(args)
        return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error becomes one line on stderr."""
        debug = bool(ctx.params.get("debug"))
        try:
            with contextlib.nullcontext() if debug else quiet():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if hasattr(error, "format_message"):
                raise
            if debug:
                traceback.print_exc()
            fail(one_line(error))
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """The entry point."""
    app()


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error, and what libraries say.")] = False,
) -> None:
    """Tuned lenses and patchscopes for the models that TransformerLens loads.

    Start with: tl-lenses demo
    """


app.command()(demo)
app.command()(capture)
app.command()(fit)
app.command("eval")(evaluate)
app.command()(show)
app.command()(patchscope)
app.command()(fit_scope)
app.add_typer(experiments, name="experiment")
app.command("recommend")(next(c.callback for c in experiments.registered_commands if c.name == "compare"))  # type: ignore[type-var]
app.command()(convert)
app.command("list")(offered)
app.command()(push)
app.command()(pull)
app.command()(merge)
app.command()(check)
app.command()(version)
