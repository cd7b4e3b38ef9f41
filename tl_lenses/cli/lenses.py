"""The commands for lens files: `tl-lenses convert`, `list`, `push` and `pull`."""

import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

import tl_lenses as tll
from tl_lenses import files
from tl_lenses.checks import one_of
from tl_lenses.cli.messages import ranges, say, stage

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Filename = Annotated[str | None, typer.Option(help="A file of the Hub repository, in any of the formats.")]
NLayers = Annotated[int | None, typer.Option(help="Of the model, where the file does not say it.", min=1)]
TargetLayer = Annotated[int | None, typer.Option(help="Where the maps end, if the file does not say it.", min=0)]
SourceLayer = Annotated[int | None, typer.Option(help="The layer that a SelfIE adapter reads.", min=0)]
Folder = Annotated[Path, typer.Argument(help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


Format = Enum(
    "Format", {"ours": "tl_lenses", "tuned_lens": "tuned-lens", "jacobian_lens": "jacobian-lens", "selfie": "selfie"}, type=str
)


def convert(
    source: Annotated[str, typer.Argument(help="A folder or file of any of the formats, or a name on the Hub.")],
    output: Folder,
    to: Annotated[Format, typer.Option(help="The format to write.")] = Format.ours,
    n_layers: NLayers = None,
    target_layer: TargetLayer = None,
    source_layer: SourceLayer = None,
    filename: Filename = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Read a lens of any format and write it in another one.

    Example: tl-lenses convert EleutherAI/pythia-160m my-lens
    """
    stage(f"reading {source}")
    lens = tll.Translators.load(
        source, filename=filename, n_layers=n_layers, target_layer=target_layer, source_layer=source_layer, revision=revision
    )  # fmt: skip
    stage(f"writing {output}")
    if to is Format.ours:
        lens.save(output, overwrite=overwrite)
    else:
        output = lens.export(to.value, output, overwrite=overwrite)
    kind, model = lens.meta.get("fitter", "affine"), lens.meta.get("model", "an unnamed model")
    say(f"{kind} lens of {model}: layers {ranges(lens.sources)}, width {lens.d_in}\nwritten to {output}")


def offered(
    name: Annotated[str, typer.Argument(help='A repository "owner/name", or tuned-lens for the Space of that package.')],
    revision: Revision = None,
    kind: Annotated[str | None, typer.Option(help="model, space or dataset.")] = None,
) -> None:
    """List the lenses that a repository on the Hub offers.

    Example: tl-lenses list neuronpedia/jacobian-lens
    """
    kind = None if kind is None else one_of("kind", kind, ("model", "space", "dataset"))
    lenses = files.offers(name, files.Access(revision), kind)
    if not lenses:
        raise ValueError(f"{name} has no file that looks like a lens")
    width = max(len(offer.path) for offer in lenses)
    for offer in lenses:
        say(f"{offer.path:{width}}  {offer.kind}, {offer.size / 1e6:,.1f} MB")


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that `fit` or `convert` wrote.")],
    name: Annotated[str, typer.Argument(help='The repository "owner/name", made where it is not there.')],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Revision = None,
) -> None:
    """Put a lens on the Hub, with a card made from its record.

    Example: tl-lenses push my-lens me/gpt2-tuned-lens
    """
    lens = tll.Translators.load(folder)
    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary) / "lens"
        lens.save(prepared)
        config = {name: getattr(lens, name) for name in ("n_layers", "d_in", "d_out", "rows", "meta")}
        (prepared / "README.md").write_text(files.card(config, name), encoding="utf-8")
        stage(f"uploading to {name}")
        say(files.push(prepared, name, access=files.Access(revision), private=private))


def pull(
    name: Annotated[str, typer.Argument(help="A name on the Hub, as for `convert`.")],
    output: Folder,
    filename: Filename = None,
    n_layers: NLayers = None,
    target_layer: TargetLayer = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Fetch a lens from the Hub into a folder of ours.

    Example: tl-lenses pull me/gpt2-tuned-lens my-lens
    """
    convert(name, output, n_layers=n_layers, target_layer=target_layer, filename=filename, revision=revision, overwrite=overwrite)  # fmt: skip
