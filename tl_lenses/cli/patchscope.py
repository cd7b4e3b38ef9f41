"""The command `tl-lenses patchscope`: decode vectors with a prompt."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import tl_lenses as tll
from tl_lenses.cli import inputs, options
from tl_lenses.cli.messages import say
from tl_lenses.cli.parts import Shard, parse_shard, sharing
from tl_lenses.patchscopes import Source, Target, scopes
from tl_lenses.sites import at

FILES = (".json", ".csv", ".svg", ".png", ".html")


def patchscope(
    prompt: options.Prompts = None,
    model: options.Model = "lab-gpt2",
    position: Annotated[
        str, typer.Option(help="Where the vector is taken: a number (-1 is the last token, 0 BOS) or a part of the text.")
    ] = "-1",
    scope: Annotated[
        str,
        typer.Option(
            help="The target: token-identity or another of tll.scopes, a relation (country_capital_city), or a prompt of "
            "your own with the placeholder in it (its last occurrence receives the vector)."
        ),
    ] = "token-identity",
    placeholder: options.Placeholder = "x",
    layers: options.SourceLayers = None,
    target_layers: options.TargetLayers = None,
    max_new_tokens: Annotated[int, typer.Option(help="Continue for so many tokens; 0 shows the next token only.")] = 0,
    norm: Annotated[str | None, typer.Option(help="replaced, mean, or a number: the vector's length.")] = None,
    faithful: Annotated[
        bool, typer.Option(help="Also ask whether the text says what the vector holds, beside controls (tll.faithfulness).")
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="A text whose vector the reading is told from; repeatable. By default ten subjects of the bundled facts."
        ),
    ] = None,
    maps: Annotated[
        str | None, typer.Option("--map", help="A map that fit-scope wrote (--scope is then its target): by default its pairs.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Also write .json, .csv, .svg or .png (heat maps) or .html.")] = None,
    file: options.File = None,
    chat: options.Chat = False,
    numbers: options.Numbers = False,
    opened: options.Open = False,
    shard: Shard = None,
    device: options.Device = None,
    dtype: options.DType = options.Dtype.float32,
) -> None:
    """Put a vector of each text into another prompt, and show what the model then says, by layer.

    Example: tl-lenses patchscope "Pizza originates from the country of" --scope "The capital of x is the city of"
    """
    save = inputs.page_to_open(save, opened)
    inputs.check_file(save, FILES)
    prompts = inputs.read_prompts(prompt, file)
    if shard is not None and save is None:
        raise ValueError("--shard needs --save: its parts lie beside that file")
    parse_shard(shard)
    target = target_named(scope, placeholder)
    fitted = None if maps is None else tll.Translators.load(maps)
    loaded = inputs.load_model(model, device, dtype.value)
    depth = loaded.cfg.n_layers + 1
    place: int | str = int(position) if position.strip().lstrip("-").isdigit() else position
    rows, into = inputs.parse_layers(layers, depth), inputs.parse_layers(target_layers, depth)
    pairs = fitted.pairs if fitted is not None and rows is None and into is None else None
    ask = lambda sources: tll.patchscope(
        loaded, sources, target, rows, into, pairs=pairs, map=None if fitted is None else fitted.to(loaded.cfg.device),
        max_new_tokens=max_new_tokens, norm=_norm(norm),
    )  # fmt: skip
    own = [tll.Source(text, place) for text in inputs.as_chat(prompts, chat)]
    others = _others(prompts, place, against) if faithful or against else []
    with sharing(shard, save):
        asked = ask([*own, *others])
    result = _of_first(asked, len(own)) if others else asked
    say(tll.views.to_text(tll.views.patchscope_table(result, numbers=numbers)))
    found = tll.faithfulness(asked) if faithful or against else None
    if found is not None:
        say(str(found))
    if save is not None:
        (tll.page(found) if found is not None and save.suffix.lower() == ".html" else result).save(save)
        say(f"saved in {save}")
        if opened:
            inputs.open_page(save)


def _of_first(result: Any, n: int) -> Any:
    """The readings of the first n sources alone, as a call with these sources would have given them."""
    request = replace(result.request, sources=result.request.sources[:n], targets=result.request.targets[:n])
    rows = ("sources", "top_ids", "top_probs", "kept_logits", "text", "tokens")
    cut = {name: value[:n] for name in rows if (value := getattr(result, name)) is not None}
    return replace(result, **cut, request=request, settings=request.settings())


def _others(prompts: list[str], place: int | str, against: list[str] | None) -> list[Any]:
    """The sources that readings are told from, where they are not told from each other."""
    if len(prompts) > 1 and not against:
        return []
    others = (
        against or list(dict.fromkeys(fact.subject for fact in tll.experiments.read_facts() if fact.subject not in prompts))[:10]
    )
    return [Source(text, place if isinstance(place, int) else -1) for text in others]


def target_named(scope: str, placeholder: str = "x") -> Any:
    """A ready scope by its name, a relation, or a prompt with a placeholder."""
    functions = (
        scopes.token_identity, scopes.repeat, scopes.next_token, scopes.entity_description, scopes.reverse_dictionary,
        scopes.selfie, scopes.future_lens,
    )  # fmt: skip
    ready = {function.__name__.replace("_", "-"): function for function in functions}
    if scope in ready:
        return ready[scope]()
    if scope in scopes.RELATIONS:
        return scopes.attribute(scope)
    if placeholder and placeholder in scope.split():
        return Target(scope, at(placeholder, occurrence="last"))
    raise ValueError(
        f"no scope {scope!r}: choose from {', '.join(ready)}, a relation such as {next(iter(scopes.RELATIONS))}, or give a prompt "
        f"with the word {placeholder!r} in it (--placeholder says which)"
    )


def _norm(text: str | None) -> Any:
    if text is None or text in ("replaced", "mean"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--norm is replaced, mean or a number, got {text!r}") from None
