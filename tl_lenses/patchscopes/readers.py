"""Readers that others trained: each function returns the target and the injection that its weights were trained with, for `patchscope`.

The reader is the target model, `to=`: a Hugging Face model with its adapters, as `TransformerBridge.boot_transformers(hf_model=...)` loads it.
"""

import math
from collections.abc import Mapping
from typing import Any

from tl_lenses.checks import plain_text, whole_number
from tl_lenses.patchscopes.targets import Target

__all__ = ["activation_oracle", "latent_qa", "nla"]


def activation_oracle(question: str, layer: int, n_vectors: int = 1) -> dict[str, Any]:
    """An Activation Oracle's prompt: ` ?` per vector, then the question; `h + |h| v / |v|` after the second block.

    The message is "Layer: l", a line of placeholders and the question, in the model's template without thinking. Their layers
    are blocks, from 0: l = layer - 1.

    Args:
        question: in words, such as "What is this text about?".
        layer: our layer that the vectors come from, at least 1 (their block is one less).
        n_vectors: placeholders; a source with as many positions gives one vector each.

    Returns:
        Arguments for `patchscope`: target, layers, target_layers, mode. Of vectors without a layer leave out `layers`.

    Raises:
        ValueError: layer 0, the embeddings, which no block gives.

    Source: Karvonen et al. 2025 (Activation Oracles, 2512.15674), appendix; the authors' code.

    Example:
        >>> activation_oracle("Is this a name?", 5, 2)["target"].prompt[0]["content"]
        'Layer: 4\\n ? ? \\nIs this a name?'
    """
    block = whole_number("layer", layer, least=1) - 1
    n_vectors = whole_number("n_vectors", n_vectors, least=1)
    content = f"Layer: {block}\n{' ?' * n_vectors} \n{plain_text('question', question)}"
    target = Target.chat([{"role": "user", "content": content}], " ?", n=n_vectors, enable_thinking=False)
    return {"target": target, "layers": [block + 1], "target_layers": [2], "mode": "norm_add"}


def latent_qa(question: str, n_vectors: int, *, layer: int = 16, chat_template: str | None = None) -> dict[str, Any]:
    """A LatentQA decoder's dialogue: a message of `? ` per vector, "Sure, I've analyzed the assistant.", then the question.

    The vectors replace what the first block gives at the placeholders.

    Args:
        question: in words.
        n_vectors: placeholders; a source with as many positions gives one vector each.
        layer: our layer that the vectors come from: the output of block 15 in the published decoders.
        chat_template: the decoder's own, in which the assistant's role is called "reflect"; the tokenizer's if None.

    Returns:
        Arguments for `patchscope`: target, layers, target_layers.

    Source: Pan et al. 2024 (LatentQA, 2412.08686); the authors' code.

    Example:
        >>> [message["content"] for message in latent_qa("Who speaks?", 2)["target"].prompt]
        ['? ? ', "Sure, I've analyzed the assistant.", 'Who speaks?']
    """
    n_vectors, layer = whole_number("n_vectors", n_vectors, least=1), whole_number("layer", layer, least=0)
    messages = [
        {"role": "user", "content": "? " * n_vectors},
        {"role": "assistant", "content": "Sure, I've analyzed the assistant."},
        {"role": "user", "content": plain_text("question", question)},
    ]
    template: dict[str, Any] = {} if chat_template is None else {"chat_template": plain_text("chat_template", chat_template)}
    return {"target": Target.chat(messages, "?", n=n_vectors, **template), "layers": [layer], "target_layers": [1]}


def nla(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of a natural language autoencoder's verbalizer: the vector, at its trained length, replaces one embedding.

    The marker's token and the tokens beside it must be those of `meta`: with another tokenizer or template it is an error.
    Replaced is layer 0, the embeddings, in models without learned positions.

    Args:
        meta: the content of the checkpoint's `nla_meta.yaml`: its tokens, its prompt template, its injection scale.

    Returns:
        Arguments for `patchscope`: target, target_layers, norm.

    Raises:
        ValueError: an entry that is missing.

    Source: the authors' code (natural_language_autoencoders, `nla/schema.py`, `nla_inference.py`).

    Example:
        >>> import yaml      # doctest: +SKIP
        >>> reader = tll.scopes.nla(yaml.safe_load(open("nla_meta.yaml")))      # doctest: +SKIP
        >>> tll.patchscope(model, tll.Source(vector), **reader, to=verbalizer, max_new_tokens=200).text      # doctest: +SKIP
    """
    try:
        tokens, extraction, prompts = meta["tokens"], meta["extraction"], meta["prompt_templates"]
        template = prompts["av"] if prompts.get("av") else prompts["actor"]
        marker, scale = tokens["injection_char"], extraction.get("injection_scale", "sqrt_d_model")
        expected = tuple(tokens[f"injection_{which}_id"] for which in ("left_neighbor", "token", "right_neighbor"))
        width = meta.get("d_model") or extraction.get("d_model")
        content = template.format(injection_char=marker)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"expected the content of nla_meta.yaml, with tokens, extraction and prompt_templates: {type(error).__name__} {error}"
        ) from None
    if scale == "sqrt_d_model":
        scale = math.sqrt(whole_number("d_model of nla_meta.yaml", width, least=1))
    norm = None if scale in (None, "raw", "none") else float(scale)
    target = Target.chat([{"role": "user", "content": content}], marker, expected=expected)
    return {"target": target, "target_layers": [0], "norm": norm}
