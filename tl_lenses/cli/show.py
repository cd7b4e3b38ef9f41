"""The command `tl-lenses show`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import tl_lenses as tll
from tl_lenses.cli import inputs, options
from tl_lenses.cli.messages import say

PICTURES = (".html", ".svg", ".png", ".csv", ".json")


def show(
    prompt: options.Prompts = None,
    model: options.Model = "lab-gpt2",
    lens: options.Lenses = None,
    stat: Annotated[
        str | None, typer.Option(help="kl, entropy, cross_entropy, rank, max_prob, target_logprob or logprob_diff.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Also write .html, .svg, .png, .csv or .json.")] = None,
    layers: options.Layers = None,
    target: Annotated[str | None, typer.Option(help="One token to score everywhere; by default the next one.")] = None,
    anti_target: Annotated[str | None, typer.Option(help="One token for logprob_diff.")] = None,
    file: options.File = None,
    chat: options.Chat = False,
    last: Annotated[int | None, typer.Option(min=1, help="Show the last so many tokens only.")] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="A token to follow in the page; repeatable. By default the model's own.")
    ] = None,
    diff: Annotated[str | None, typer.Option(help="Two lenses, such as tuned,logit: the first minus the second.")] = None,
    answer: Annotated[
        str | None, typer.Option(help="A token: --save writes a 16:9 figure for a talk, with its probability and rank by layer.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of an .svg or .png, pixels: tokens beyond it go on below.")] = None,
    numbers: options.Numbers = False,
    opened: options.Open = False,
    device: options.Device = None,
    dtype: options.DType = options.Dtype.float32,
) -> None:
    """What lenses (the logit lens by default) say at every layer and token of a prompt.

    Example: tl-lenses show "The capital of France is" --lens my-lens --save heat.html
    """
    if stat is not None and stat not in tll.views.STATS:
        raise ValueError(f"no statistic {stat!r}: choose from {', '.join(tll.views.STATS)}")
    if stat == "logprob_diff" and anti_target is None:
        raise ValueError("logprob_diff needs --anti-target, the token that the target is compared with")
    folders = inputs.lens_names(lens)
    pair = None if diff is None else tuple(diff.split(","))
    if pair is not None and (len(pair) != 2 or not {*pair} <= {*folders, "logit"}):
        raise ValueError(f"--diff {diff!r} must be two of the lenses {', '.join([*folders, 'logit'])}, such as tuned,logit")
    save = inputs.page_to_open(save, opened)
    inputs.check_file(save, PICTURES if answer is None and width is None else (".svg", ".png"))
    if width is not None and (save is None or answer is not None):
        raise ValueError("--width is of a picture of all tokens: give --save heat.svg, and no --answer")
    prompts = inputs.read_prompts(prompt, file)
    fitted = inputs.saved_lenses(folders)
    loaded = inputs.load_model(model, device, dtype.value)
    lenses = {name: tll.Lens(loaded, maps) for name, maps in fitted.items()}
    if not lenses or (pair is not None and "logit" in pair):
        lenses.setdefault("logit", tll.Lens(loaded))
    tracked = [*(track or ()), *([] if answer is None else [answer])]
    chosen = inputs.parse_layers(layers, loaded.cfg.n_layers + 1)
    trajectories = tll.trajectory(
        loaded, lenses, inputs.as_chat(prompts, chat), chosen, target, anti_targets=anti_target, track=tracked or None
    )
    if last is not None:
        by_name = {name: _last(trajectory, last) for name, trajectory in trajectories.items()}
        trajectories = replace(trajectories, by_name=by_name)
    drawn = list(trajectories.values()) if pair is None else [tll.views.difference(trajectories, pair)]
    for row in range(len(prompts)):
        for trajectory in drawn:
            say(tll.views.to_text(trajectory, stat, batch=row, numbers=numbers))
    if save is not None:
        shown = next(iter(trajectories.values())) if len(trajectories) == 1 else trajectories
        shown.save(save, stat=stat, diff=pair, width=width, answer=answer)
        say(f"saved in {save}")
        if opened:
            inputs.open_page(save)


def _last(trajectory: Any, n: int) -> Any:
    """The last n tokens of every row, under their own positions: the others count as pads."""
    mask = trajectory.mask
    return replace(trajectory, mask=mask & (mask.flip(1).cumsum(1).flip(1) <= n))
