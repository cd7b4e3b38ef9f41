"""What would the model write from layer l? Generation where each token is drawn from a lens."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.checks import finite_number
from tl_lenses.experiments.grid import Grid, Table
from tl_lenses.experiments.report import Report
from tl_lenses.experiments.subject import Layers, Lenses, Subject, data_of, lenses_of
from tl_lenses.hooks import Hook, checked_hooks, generate, run
from tl_lenses.layers import LayerOrSite, site_layer
from tl_lenses.lens import Lens, one_lens
from tl_lenses.model import LensModel, bos_before, n_layers, prepare
from tl_lenses.progress import progress
from tl_lenses.sites import site
from tl_lenses.views import Picture


def sample_from(
    model: LensModel, lens: Lens, layer: LayerOrSite,
    prompt: str | list[str] | Int[Tensor, "batch pos"] | Int[Tensor, " pos"], max_new_tokens: int = 20,
    do_sample: bool = True, temperature: float = 1.0, seed: int = 0, *, use_cache: bool = True,
    attention_mask: Int[Tensor, "batch pos"] | None = None, stop_at_eos: bool = True, prepend_bos: bool = True,
    hooks: Iterable[Hook] = (),
) -> Int[Tensor, "batch pos_plus_new"]:  # fmt: skip
    """Continue prompts with tokens drawn from a lens at one layer; at layer `n_layers` this is `tll.generate`.

    `x_(t+1) ~ softmax(Lens_l(h_l,t) / temperature)`. The translated residual of layer l replaces the final one, so the model's
    own final norm and unembedding decode it, and keys and values are cached as in any generation. (The blocks after l run in
    vain.)

    Args:
        layer: whose residual is read, or a site of a residual's width.
        prompt: text (BOS is prepended; several prompts are padded on the left), or token ids.
        max_new_tokens: how many tokens to add.
        do_sample: False takes the likeliest token.
        temperature: divides the lens' logits.
        seed: of the draws. The rows of a batch share one stream of random numbers, so a row that is sampled alone gets other ones.
        use_cache: keep keys and values; the tokens are the same without.
        attention_mask: for padded token ids.
        stop_at_eos: a row that has met EOS repeats EOS.
        prepend_bos: for text; ids are never changed.
        hooks: your interventions; they run first.

    Returns:
        Prompt and continuation, `[batch, pos + new]`.

    Raises:
        ValueError: a lens of another model object; a layer that it does not have; a temperature that is not positive;
            as `tll.generate`.

    Source: Belrose et al. 2023 (Tuned Lens), section 1 (a lens is the model with the later blocks left out).

    Example:
        >>> ids = sample_from(model, lens, 6, "Once upon a time", 20, seed=1)      # doctest: +SKIP
    """
    one_lens(model, lens, "sample_from")
    if do_sample and finite_number("temperature", temperature) <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}: for the likeliest token pass do_sample=False")
    try:
        speaking = _speaking(model, lens, layer)
    except KeyError as error:
        raise ValueError(str(error.args[0])) from None
    return generate(
        model, prompt, [*checked_hooks(model, hooks), *speaking], max_new_tokens, attention_mask=attention_mask, do_sample=do_sample,
        temperature=temperature, seed=seed, stop_at_eos=stop_at_eos, use_cache=use_cache, prepend_bos=prepend_bos,
    )  # fmt: skip


def _speaking(model: LensModel, lens: Lens, layer: LayerOrSite) -> list[Hook]:
    """Hooks that put the translated residual of a layer in place of the final one, at every column of every pass."""
    name, final = site(model, layer), site(model, n_layers(model))
    decode, seen = lens[layer], {}
    if site_layer(name) == n_layers(model):
        return []  # the model itself

    # Not `read` and `patch`: they treat generated columns differently from the prompt's.
    def keep(x: Tensor, hook: Any = None) -> None:
        seen["x"] = x

    def say(x: Tensor, hook: Any = None) -> Tensor:
        return decode.translate(seen.pop("x")).to(x)

    return [(name, keep), (final, say)]


@dataclass(frozen=True, repr=False)
class Sampling(Report):
    """Texts of every lens at every layer, and how likely the model finds them.

    The grid has the axes lens, layer, prompt and step (of the text), and the values

    - `nats` `[lens, layer, prompt]`: the model's mean cross entropy of the text, nats per token;
    - `distinct`, the same: share of different tokens, low where a text repeats itself;
    - `agreement` `[lens, layer, prompt, step]`: whether the token is that of the model's own text at this step;
    - `would`, the same: whether it is the model's likeliest token after the text so far.

    The last layer usually is the model itself.

    Attributes:
        texts: per lens `[layer][prompt]`.
    """

    texts: dict[str, list[list[str]]]

    name = "sampling"

    def perplexity(self, lens: str) -> Float[Tensor, " layer"]:
        """`exp` of the mean cross entropy under the model itself, over all texts of a layer."""
        return self.grid.at(lens=lens)["nats"].mean(1).exp()

    def summary(self) -> Grid:
        """Perplexity and shares by layer and lens, over all prompts and steps."""
        values = {
            "perplexity": torch.stack([self.perplexity(lens) for lens in self.lenses]),
            "agreement": self.agreement.double().mean((2, 3)), "would": self.would.double().mean((2, 3)),
            "distinct": self.distinct.double().mean(2),
        }  # fmt: skip
        axes = {"layer": self.layers, "lens": self.lenses}
        return Grid(axes, {name: (("lens", "layer"), x) for name, x in values.items()})

    def tables(self) -> list[Table]:
        """Per layer and lens: perplexity under the model, agreement, repetition; and one text of each."""
        named = {
            "perplexity": "perplexity", "agreement": "the model's own token", "would": "its likeliest",
            "distinct": "distinct",
        }  # fmt: skip
        texts = [
            [str(layer), lens, " ".join(self.texts[lens][i][0].split())]
            for i, layer in enumerate(self.layers)
            for lens in self.lenses
        ]
        return [
            self.summary().table(
                f"texts from a lens, {self.model}: {len(self.prompts)} prompts", named, down=["layer", "lens"],
                percent=["agreement", "would", "distinct"],
                note="perplexity under the model itself; own: the token of the model's text with the same random numbers; likeliest: after the "
                "text so far; distinct: different tokens in a text (a text that repeats itself may have a low perplexity)",
            ),
            Table(f"after {' '.join(self.prompts[0].split())!r}", ["layer", "lens", "text"], texts, percent=False),
        ]  # fmt: skip

    def pictures(self) -> dict[str, Picture]:
        """Perplexity, and agreement with the model's own text, by layer, with intervals over prompts."""
        by_prompt, title = self.grid.mean("step").spread("prompt"), f"texts from a lens, {self.model}"
        perplexity, agreement = by_prompt.map(torch.exp), "share of tokens of the model's own text"
        return {
            "perplexity": perplexity.lines(title, "nats", by="lens", up="perplexity under the model", log_y=True),
            "agreement": by_prompt.lines(title, "agreement", by="lens", up=agreement),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row per lens, layer and prompt, with the text."""
        rows = self.grid.mean("step").rows("nats", "agreement", "would", "distinct")
        texts = [text for lens in self.lenses for by_prompt in self.texts[lens] for text in by_prompt]
        return [
            {
                "lens": row["lens"], "layer": row["layer"], "prompt": row["prompt"], "text": text, "nats": row["nats"],
                "agreement": row["agreement"], "likeliest": row["would"], "distinct": row["distinct"],
            }
            for row, text in zip(rows, texts, strict=True)
        ]  # fmt: skip


@torch.no_grad()
def sampling(
    model: LensModel, lenses: Lenses, prompts: str | Sequence[str] | Int[Tensor, "batch pos"], *,
    layers: Layers = None, max_new_tokens: int = 32, do_sample: bool = True,
    temperature: float = 1.0, seed: int = 0, hooks: Iterable[Hook] = (), show_progress: bool | None = None,
) -> Sampling:  # fmt: skip
    """Texts from every layer of every lens, their perplexity under the model, and agreement with its own text.

    Args:
        prompts: text or texts (padded on the left), or token ids.
        layers: all that every lens has, by default.
        max_new_tokens: length of the texts; EOS does not end one.
        do_sample: False takes the likeliest token at every step.
        temperature: of the draws; perplexity is that of the unscaled model.
        seed: of the draws, the same for every text, so that equal distributions give equal texts.
        hooks: your interventions, in generation and in the model that judges.

    Raises:
        ValueError: as `sample_from`; a layer that a lens does not have.

    Example:
        >>> print(sampling(model, {"logit": tll.Lens(model), "tuned": lens}, ["Once upon a time"]))      # doctest: +SKIP
    """
    subject = Subject.of(model, lenses_of(model, lenses, "sampling"), layers, what="sampling")
    hooks = checked_hooks(model, hooks)
    batch = prepare(model, prompts)
    start, mask = batch.tokens.shape[1], batch.attention_mask
    how: dict[str, Any] = {
        "do_sample": do_sample, "temperature": temperature, "seed": seed, "stop_at_eos": False, "hooks": hooks,
        "attention_mask": mask,
    }  # fmt: skip
    model_ids = sample_from(model, Lens(model), subject.depth, batch.tokens, max_new_tokens, **how)[:, start:]
    padded = None if mask is None else torch.cat([mask, torch.ones_like(model_ids)], 1)
    tokenizer = getattr(model, "tokenizer", None)
    decode = lambda ids: str((tokenizer.decode(ids) if tokenizer is not None else "") or ids)
    texts: dict[str, list[list[str]]] = {name: [] for name in subject.lenses}
    numbers: dict[str, list[Tensor]] = {"nats": [], "distinct": [], "agreement": [], "would": []}
    cells = [(name, layer) for name in subject.lenses for layer in subject.layers]
    for name, layer in progress(cells, desc="sampling", show=show_progress):
        ids = sample_from(model, subject.lenses[name], layer, batch.tokens, max_new_tokens, **how)
        new = ids[:, start:]
        logits = run(model, ids, hooks, attention_mask=padded)[:, start - 1 : -1]
        texts[name].append([decode(row) for row in new.tolist()])
        numbers["nats"].append(-S.target_logprob(S.log_probs(logits), new).mean(1).cpu())
        numbers["agreement"].append((new == model_ids).cpu())
        numbers["would"].append((logits.argmax(-1) == new).cpu())
        numbers["distinct"].append(torch.tensor([len(set(row)) / len(row) for row in new.tolist()]))
    real = torch.ones_like(batch.tokens) if mask is None else mask
    shown = [decode(row[keep.bool()].tolist()) for row, keep in zip(batch.tokens, real, strict=True)]
    axes = {"lens": list(subject.lenses), "layer": subject.layers, "prompt": shown, "step": range(model_ids.shape[1])}
    shape = (len(subject.lenses), len(subject.layers))
    grid = Grid.over(axes, {name: torch.stack(x).unflatten(0, shape) for name, x in numbers.items()})
    at_end = subject.depth in subject.layers  # there every lens is the model
    natural = float(grid["nats"][0, subject.layers.index(subject.depth)].mean()) if at_end else math.nan
    settings = {
        "data": data_of(prompts), "bos": bos_before(model, prompts), "prompts": len(shown),
        "max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature, "seed": seed,
        "lenses": list(subject.lenses), "perplexity of the model": math.exp(natural),
    }  # fmt: skip
    return Sampling(subject.name, texts, grid=grid, settings=settings)
