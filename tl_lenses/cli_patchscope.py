"""The command `tl-lenses patchscope`: one vector, one prompt that says what it means."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_lenses.cli_inputs import Device, DType, Dtype, Model, check_file, load_model, parse_layers, say

FILES = (".json", ".csv", ".svg", ".html")


def patchscope(
    prompt: Annotated[str, typer.Argument(help="The source: the text that a vector is taken from.")],
    model: Model = "lab-gpt2",
    position: Annotated[
        str,
        typer.Option(help="Where the vector is taken: a number (-1 is the last token, 0 BOS) or a part of the text."),
    ] = "-1",
    scope: Annotated[
        str,
        typer.Option(
            help="The target: token-identity or another of tll.scopes, a relation (country_capital_city), or a prompt of "
            "your own with the placeholder in it (its last occurrence receives the vector)."
        ),
    ] = "token-identity",
    placeholder: Annotated[str, typer.Option(help="The word of an own prompt that receives the vector.")] = "x",
    layers: Annotated[str | None, typer.Option(help="Source layers, such as 0,4,8 or ::2; all by default.")] = None,
    target_layers: Annotated[
        str | None, typer.Option(help="Each source layer into each of these; by default into the same layer only.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Go on for so many tokens; 0 shows the next token only.")] = 0,
    norm: Annotated[str | None, typer.Option(help="replaced, mean, or a number: the vector's length.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write .json, .csv, .svg (heat map) or .html.")] = None,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """Put a vector of one prompt into another prompt, and show what the model then says, by layer.

    Example: tl-lenses patchscope "Pizza originates from the country of" --scope "The capital of x is the city of"
    """
    check_file(save, FILES)
    target = target_named(scope, placeholder)

    import tl_lenses as tll

    loaded = load_model(model, device, dtype.value)
    depth = loaded.cfg.n_layers + 1
    place: int | str = int(position) if position.strip().lstrip("-").isdigit() else position
    result = tll.patchscope(
        loaded,
        tll.Source(prompt, place),
        target,
        None if layers is None else parse_layers(layers, depth),
        None if target_layers is None else parse_layers(target_layers, depth),
        max_new_tokens=max_new_tokens,
        norm=_norm(norm),
    )
    say(str(result))
    if save is not None:
        write(result, save, {"model": model, "source": prompt, "position": place})
        say(f"saved in {save}")


def target_named(scope: str, placeholder: str = "x") -> Any:
    """A ready scope by its name, a relation, or a prompt with a placeholder.

    Raises:
        ValueError: neither; the names are listed.
    """
    from tl_lenses.patchscopes import Target, scopes
    from tl_lenses.sites import at

    ready: dict[str, Callable[[], Any]] = {
        name.replace("_", "-"): getattr(scopes, name)
        for name in ("token_identity", "next_token", "entity_description", "selfie", "future_lens")
    }
    if scope in ready:
        return ready[scope]()
    if scope in scopes.relations():
        return scopes.attribute(scope)
    if placeholder and placeholder in scope.split():
        return Target(scope, at(placeholder, occurrence="last"))
    raise ValueError(
        f"no scope {scope!r}: choose from {', '.join(ready)}, a relation such as {scopes.relations()[0]}, or give a prompt "
        f"with the word {placeholder!r} in it (--placeholder says which)"
    )


def _norm(text: str | None) -> Any:
    if text is None or text in ("replaced", "mean"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--norm is replaced, mean or a number, got {text!r}") from None


def write(result: Any, path: Path, made: dict[str, Any]) -> None:
    """A patchscope's result as a file of any kind of `FILES`."""
    from tl_lenses.checkpoint import versions, write_bytes
    from tl_lenses.experiments.picture import heat_svg

    kind = path.suffix.lower()
    if kind == ".csv":
        content = result.to_frame().to_csv(index=False)
    elif kind == ".html":
        content = f"<!doctype html>\n<meta charset=utf-8>\n<title>patchscope</title>\n{result._repr_html_()}\n"
    elif kind == ".svg":
        content = heat_svg(picture(result))
    else:
        top = result.top_k(5)
        cells = [
            {
                "layer": layer, "target_layer": target_layer,
                "top": [[t, float(w)] for t, w in zip(top.tokens[0][p], top.probs[0, p], strict=True)],
                "text": None if result.text is None else result.text[0][p],
            }
            for p, (layer, target_layer) in enumerate(result.pairs)
        ]  # fmt: skip
        content = json.dumps({**made, **result.settings, "versions": versions(), "cells": cells}, indent=1) + "\n"
    write_bytes(path, content.encode())


def picture(result: Any) -> Any:
    """The first source's top tokens as a heat map of their probabilities: l down, l* across, or one column of layers."""
    from tl_lenses.experiments.picture import Heat

    top = result.top_k(1)
    cells = {p: (float(top.probs[0, i, 0]), top.tokens[0][i][0].strip()[:10]) for i, p in enumerate(result.pairs)}
    title = f"{result.sources[0]!r}: likeliest next token"
    down = list(dict.fromkeys(a for a, _ in result.pairs))
    if all(a == b for a, b in result.pairs):
        across, key, names = [""], lambda a, _: (a, a), ("layer", "")
    else:
        across, key, names = list(dict.fromkeys(b for _, b in result.pairs)), lambda a, b: (a, b), ("l", "l*")
    at = lambda i, none: [[cells[key(a, b)][i] if key(a, b) in cells else none for b in across] for a in down]
    return Heat(title, list(map(str, down)), list(map(str, across)), at(0, float("nan")), *names, at(1, ""))
