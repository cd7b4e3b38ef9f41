"""Options that several commands share."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

SEQ_LEN = 128
Dtype = Enum("Dtype", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "float64": "float64"}, type=str)

# --- models and lenses
Model = Annotated[
    str, typer.Option(help="A Hugging Face name, a local directory, lab-gpt2 (bundled), smollm2-135m or gemma3-270m (make real).")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...; cuda if there is one.")]
DType = Annotated[Dtype, typer.Option("--dtype", help="Type of the model's weights.")]
Layers = Annotated[str | None, typer.Option(help="Such as 0,4,8 or ::2 or a hook name; all by default.")]
Lenses = Annotated[
    list[str] | None,
    typer.Option("--lens", help="A folder that `fit` wrote (or a lens of another package), or NAME=FOLDER; repeatable."),
]

# --- text
Data = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .jsonl, .json, .parquet or .csv file, a directory of them, a `datasets` name (org/name or "
        "org/name:config), a folder that `capture` wrote, or lab (bundled text; the default for lab-gpt2)."
    ),
]
TextColumn = Annotated[str, typer.Option(help="The column of a table that has the text.")]
Split = Annotated[str, typer.Option(help="Split of a data set.")]
SeqLen = Annotated[int | None, typer.Option(help=f"Tokens per row; {SEQ_LEN}, or the context if it is shorter.")]
BatchSize = Annotated[int, typer.Option(help="Rows per batch.")]
LimitTokens = Annotated[int, typer.Option(help="Tokens of text to use.")]
TextSeed = Annotated[int, typer.Option("--seed", help="Of the order of the text.")]

# --- prompts, and pages of what is said about them
Prompts = Annotated[list[str] | None, typer.Argument(help="The text to read; several; - is standard input.")]
File = Annotated[Path | None, typer.Option(help="A file whose text is read as well.")]
Chat = Annotated[bool, typer.Option("--chat", help="Each text is a user's message in the model's chat template.")]
Open = Annotated[bool, typer.Option("--open", help="Open the page in a browser (without --save in a temporary file).")]
Numbers = Annotated[bool, typer.Option("--numbers", help="Write the value into each coloured cell.")]

# --- patchscopes
Placeholder = Annotated[str, typer.Option(help="The word of an own prompt that receives the vector.")]
SourceLayers = Annotated[str | None, typer.Option("--layers", help="Source layers, such as 0,4,8 or ::2; all by default.")]
TargetLayers = Annotated[
    str | None, typer.Option(help="Each source layer into each of these; by default into the same layer only.")
]

# --- results
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")]
