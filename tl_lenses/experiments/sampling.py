"""What would the model write if it had to speak from layer l? Generation where each token is drawn from a lens."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_lenses import stats as S
from tl_lenses.experiments.picture import Lines, Picture
from tl_lenses.experiments.report import Report, Table, named
from tl_lenses.experiments.streams import check_lenses, common_layers
from tl_lenses.hooks import Hook, generate, run
from tl_lenses.lens import Lens
from tl_lenses.model import LensModel, n_layers, prepare
from tl_lenses.progress import progress
from tl_lenses.sites import LayerOrSite, site, site_layer


def sample_from(
    model: LensModel,
    lens: Lens,
    layer: LayerOrSite,
    prompt: str | list[str] | Int[Tensor, "batch pos"] | Int[Tensor, " pos"],
    max_new_tokens: int = 20,
    do_sample: bool = True,
    temperature: float = 1.0,
    seed: int = 0,
    *,
    use_cache: bool = True,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    stop_at_eos: bool = True,
    prepend_bos: bool = True,
    hooks: Iterable[Hook] = (),
) -> Int[Tensor, "batch pos_plus_new"]:
    """Continue prompts with tokens drawn from what a lens says at one layer; at layer `n_layers` this is `tll.generate`.

    `x_(t+1) ~ softmax(Lens_l(h_l,t) / temperature)`. The final residual is replaced by the translated one of layer l, so
    the model's own final norm and unembedding say it, and keys and values are cached as in any generation. (The blocks
    behind l run in vain.)

    Args:
        model: the model that the lens is of.
        lens: the logit lens or a fitted one.
        layer: whose residual is read, or a site of a residual's width.
        prompt: text (BOS is prepended; several prompts are padded on the left), or token ids.
        max_new_tokens: how many tokens to add.
        do_sample: False takes the likeliest token.
        temperature: what the lens' logits are divided by.
        seed: of the draws. The rows of a batch share one stream of random numbers, so a row that is sampled alone gets other ones.
        use_cache: keep keys and values; the tokens are the same without.
        attention_mask: for padded token ids.
        stop_at_eos: a row that has met EOS goes on with EOS.
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
    check_lenses(model, lens, "sampling")
    if do_sample and not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}: for the likeliest token pass do_sample=False"
        )
    try:
        speaking = _speaking(model, lens, layer)
    except KeyError as error:
        raise ValueError(str(error.args[0])) from None
    return generate(
        model, prompt, [*hooks, *speaking], max_new_tokens, attention_mask=attention_mask, do_sample=do_sample,
        temperature=temperature, seed=seed, stop_at_eos=stop_at_eos, use_cache=use_cache, prepend_bos=prepend_bos,
    )  # fmt: skip


def _speaking(model: LensModel, lens: Lens, layer: LayerOrSite) -> list[Hook]:
    """Hooks that put the translated residual of a layer in place of the final one, at every column of every pass."""
    name, final = site(model, layer), site(model, n_layers(model))
    decode, seen = lens[layer], {}
    if site_layer(name, n_layers(model)) == n_layers(model):
        return []  # the model itself

    # Not `read` and `patch`, which tell the prompt's columns from generated ones: here all are the same.
    def keep(x: Tensor, hook: Any = None) -> None:
        seen["x"] = x

    def say(x: Tensor, hook: Any = None) -> Tensor:
        return decode.translate(seen.pop("x")).to(x)

    return [(name, keep), (final, say)]


@dataclass(frozen=True)
class Sampling(Report):
    """What every lens writes from every layer, and what the model makes of it.

    Attributes:
        layers: the layer axis; the last one usually is the model itself.
        prompts: as text.
        texts: per lens `[layer][prompt]`.
        nats: per lens `[layer, prompt]`, the model's mean cross entropy of the text, nats per token.
        agreement: per lens `[layer, prompt, step]`, whether the token is that of the model's own text at this step.
        would: per lens `[layer, prompt, step]`, whether it is the model's likeliest token after the text so far.
        distinct: per lens `[layer, prompt]`, share of different tokens: low where a text repeats itself.
    """

    layers: list[int]
    prompts: list[str]
    texts: dict[str, list[list[str]]]
    nats: dict[str, Float[Tensor, "layer prompt"]]
    agreement: dict[str, Bool[Tensor, "layer prompt step"]]
    would: dict[str, Bool[Tensor, "layer prompt step"]]
    distinct: dict[str, Float[Tensor, "layer prompt"]]

    name = "sampling"

    def perplexity(self, lens: str) -> Float[Tensor, " layer"]:
        """`exp` of the mean cross entropy under the model itself, over all texts of a layer."""
        return self.nats[lens].mean(1).exp()

    def tables(self) -> list[Table]:
        """Per layer and lens: perplexity under the model, agreement, repetition; and one text of each."""
        rows, texts = [], []
        for i, layer in enumerate(self.layers):
            for lens in self.texts:
                share = lambda x, i=i, lens=lens: f"{100 * float(x[lens][i].double().mean()):.1f} %"
                numbers = (share(self.agreement), share(self.would), share(self.distinct))
                rows.append([str(layer), lens, float(self.perplexity(lens)[i]), *numbers])
                texts.append([str(layer), lens, " ".join(self.texts[lens][i][0].split())])
        title = f"texts from a lens, {self.model}: {len(self.prompts)} prompts"
        return [
            Table(
                title, ["layer", "lens", "perplexity", "the model's own token", "its likeliest", "distinct"], rows,
                "perplexity under the model itself; own: the token of the model's text with the same random numbers; likeliest: after the "
                "text so far; distinct: different tokens in a text (a text that repeats itself may have a low perplexity)",
                percent=False,
            ),
            Table(f"after {' '.join(self.prompts[0].split())!r}", ["layer", "lens", "text"], texts, percent=False),
        ]  # fmt: skip

    def pictures(self) -> dict[str, Picture]:
        """Perplexity, and agreement with the model's own text, by layer."""
        lines = lambda of: {lens: list(zip(self.layers, of(lens).tolist(), strict=True)) for lens in self.texts}
        return {
            "perplexity": Lines(
                f"texts from a lens, {self.model}", lines(self.perplexity), up="perplexity under the model", log_y=True
            ),
            "agreement": Lines(
                f"texts from a lens, {self.model}", lines(lambda lens: self.agreement[lens].double().mean((1, 2))),
                up="share of tokens of the model's own text",
            ),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """A row per lens, layer and prompt, with the text."""
        return [
            {
                "lens": lens, "layer": layer, "prompt": prompt, "text": self.texts[lens][i][j],
                "nats": float(self.nats[lens][i, j]), "agreement": float(self.agreement[lens][i, j].double().mean()),
                "likeliest": float(self.would[lens][i, j].double().mean()), "distinct": float(self.distinct[lens][i, j]),
            }
            for lens in self.texts
            for i, layer in enumerate(self.layers)
            for j, prompt in enumerate(self.prompts)
        ]  # fmt: skip


@torch.no_grad()
def sampling(
    model: LensModel,
    lenses: Lens | Mapping[str, Lens],
    prompts: str | Sequence[str] | Int[Tensor, "batch pos"],
    *,
    layers: Iterable[int] | None = None,
    max_new_tokens: int = 32,
    do_sample: bool = True,
    temperature: float = 1.0,
    seed: int = 0,
    hooks: Iterable[Hook] = (),
    show_progress: bool | None = None,
) -> Sampling:
    """Texts from every layer of every lens, their perplexity under the model, and agreement with its own text.

    Args:
        model: the model that the lenses are of.
        lenses: a lens or `{name: lens}`.
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
    found = check_lenses(model, lenses, "sampling")
    rows, hooks = common_layers(found, layers, n_layers(model)), list(hooks)
    batch = prepare(model, prompts if isinstance(prompts, (str, Tensor)) else list(prompts))
    start = batch.tokens.shape[1]
    mask = torch.ones_like(batch.tokens) if batch.attention_mask is None else batch.attention_mask
    given = {"attention_mask": None if batch.attention_mask is None else mask}
    how: dict[str, Any] = {
        "do_sample": do_sample, "temperature": temperature, "seed": seed, "stop_at_eos": False, "hooks": hooks, **given,
    }  # fmt: skip
    own = sample_from(model, Lens(model), n_layers(model), batch.tokens, max_new_tokens, **how)[:, start:]
    padded = None if batch.attention_mask is None else torch.cat([mask, torch.ones_like(own)], 1)
    decode = lambda ids: getattr(model, "tokenizer", None) and model.tokenizer.decode(ids)  # type: ignore[attr-defined]
    texts: dict[str, list[list[str]]] = {name: [] for name in found}
    numbers: dict[str, dict[str, list[Tensor]]] = {
        key: {name: [] for name in found} for key in ("nats", "agreement", "would", "distinct")
    }
    for name, layer in progress([(n, r) for n in found for r in rows], desc="sampling", show=show_progress):
        ids = sample_from(model, found[name], layer, batch.tokens, max_new_tokens, **how)
        new = ids[:, start:]
        logits = run(model, ids, hooks, attention_mask=padded)[:, start - 1 : -1]
        texts[name].append([str(decode(row) or row) for row in new.tolist()])
        numbers["nats"][name].append(-S.target_logprob(S.log_probs(logits), new).mean(1).cpu())
        numbers["agreement"][name].append((new == own).cpu())
        numbers["would"][name].append((logits.argmax(-1) == new).cpu())
        numbers["distinct"][name].append(torch.tensor([len(set(row)) / len(row) for row in new.tolist()]))
    stacked = {key: {name: torch.stack(x) for name, x in of.items()} for key, of in numbers.items()}
    shown = [
        str(decode(row[keep.bool()].tolist()) or row.tolist()) for row, keep in zip(batch.tokens, mask, strict=True)
    ]
    settings = {
        "prompts": len(shown), "max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature,
        "seed": seed, "lenses": list(found), "perplexity of the model": math.exp(_mean(stacked["nats"], rows, model)),
    }  # fmt: skip
    return Sampling(named(model), rows, shown, texts, **stacked, settings=settings)


def _mean(nats: Mapping[str, Tensor], rows: list[int], model: LensModel) -> float:
    """Mean nats of the model's own texts, NaN where the last layer was not asked for."""
    first = next(iter(nats.values()))
    return float(first[rows.index(n_layers(model))].mean()) if n_layers(model) in rows else math.nan
