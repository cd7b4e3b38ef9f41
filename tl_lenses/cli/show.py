"""The command `tl-lenses show`."""

from pathlib import Path
from typing import Annotated

import typer

from tl_lenses.cli.inputs import (
    Device,
    DType,
    Dtype,
    Lenses,
    Model,
    check_file,
    lens_names,
    load_model,
    parse_layers,
    read_prompts,
    saved_lenses,
)
from tl_lenses.cli.messages import say

PICTURES = (".html", ".svg", ".png", ".csv", ".json")


def show(
    prompt: Annotated[list[str] | None, typer.Argument(help="The text to read; several; - is standard input.")] = None,
    model: Model = "lab-gpt2",
    lens: Lenses = None,
    stat: Annotated[
        str | None, typer.Option(help="kl, entropy, cross_entropy, rank, max_prob, target_logprob or logprob_diff.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Also write .html, .svg, .png, .csv or .json.")] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4,8 or ::2 or a hook name; all by default.")] = None,
    target: Annotated[str | None, typer.Option(help="One token to score everywhere; by default the next one.")] = None,
    anti_target: Annotated[str | None, typer.Option(help="One token for logprob_diff.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file whose text is read as well.")] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="A token to follow in the page; repeatable. By default the model's own.")
    ] = None,
    diff: Annotated[
        str | None, typer.Option(help="Two lenses, such as tuned,logit: the first minus the second.")
    ] = None,
    numbers: Annotated[bool, typer.Option(help="Write the value into each coloured cell.")] = False,
    device: Device = None,
    dtype: DType = Dtype.float32,
) -> None:
    """What lenses (the logit lens by default) say at every layer and token of a prompt.

    Example: tl-lenses show "The capital of France is" --lens my-lens --save heat.html
    """
    from tl_lenses.views import STATS, difference, to_text

    if stat is not None and stat not in STATS:
        raise ValueError(f"no statistic {stat!r}: choose from {', '.join(STATS)}")
    if stat == "logprob_diff" and anti_target is None:
        raise ValueError("logprob_diff needs --anti-target, the token that the target is compared with")
    folders = lens_names(lens)
    pair = None if diff is None else tuple(diff.split(","))
    if pair is not None and (len(pair) != 2 or not {*pair} <= {*folders, "logit"}):
        raise ValueError(
            f"--diff {diff!r} must be two of the lenses {', '.join([*folders, 'logit'])}, such as tuned,logit"
        )
    check_file(save, PICTURES)
    prompts = read_prompts(prompt, file)

    import tl_lenses as tll

    fitted = saved_lenses(folders)
    loaded = load_model(model, device, dtype.value)
    lenses = {name: tll.Lens(loaded, maps) for name, maps in fitted.items()}
    if not lenses or (pair is not None and "logit" in pair):
        lenses.setdefault("logit", tll.Lens(loaded))
    chosen = None if layers is None else parse_layers(layers, loaded.cfg.n_layers + 1)
    trajectories = tll.trajectory(
        loaded, lenses, prompts, chosen, target, anti_targets=anti_target, track=track or None
    )
    drawn = list(trajectories.values()) if pair is None else [difference(trajectories, pair)]
    for row in range(len(prompts)):
        for trajectory in drawn:
            say(to_text(trajectory, stat, batch=row, numbers=numbers))
    if save is not None:
        shown = next(iter(trajectories.values())) if len(trajectories) == 1 else trajectories
        shown.save(save, stat=stat, **({} if pair is None else {"diff": pair}))
        say(f"saved in {save}")
