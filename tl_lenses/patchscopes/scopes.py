"""Ready scopes: targets with the published prompts, and published methods as patches (from `methods`)."""

import difflib
from collections.abc import Mapping, Sequence

from torch import Tensor

from tl_lenses.patchscopes.methods import (
    activation_patching,
    attention_knockout,
    causal_tracing,
    logit_lens_as_patchscope,
    multihop,
    tuned_lens_as_patchscope,
)
from tl_lenses.patchscopes.targets import Target
from tl_lenses.sites import at

__all__ = [
    "activation_patching",
    "attention_knockout",
    "attribute",
    "causal_tracing",
    "entity_description",
    "future_lens",
    "logit_lens_as_patchscope",
    "multihop",
    "next_token",
    "relations",
    "selfie",
    "token_identity",
    "tuned_lens_as_patchscope",
]

# The target prompts of the authors' data set, word for word. "{}" is the placeholder, an `x` there.
_RELATIONS = {
    "company_ceo": "The name of the CEO of {}",
    "country_capital_city": "The capital city of {}",
    "country_currency": "The official currency of {}",
    "country_largest_city": "The largest city in {}",
    "food_from_country": "The country of origin for {}",
    "fruit_inside_color": "On the inside, the color of {}",
    "fruit_outside_color": "On the outside, the color of {}",
    "object_superclass": "Among the superclasses of animal, bird, fish, vegetable, flower, fruit, the superclass of {}",
    "person_father": "Name of father of {}",
    "person_mother": "Name of mother of {}",
    "person_plays_position_in_sport": "In their sport, the position played by {}",
    "person_plays_pro_sport": "The professional sport played by {}",
    "pokemon_evolutions": "The evolved form of {}",
    "product_by_company": "The company which developed {}",
    "star_constellation": "The name of the constellation including {}",
    "substance_phase": "At room temperature, the phase of matter of {}",
    "superhero_archnemesis": "The name of the superhero archnemesis of {}",
    "superhero_person": "Secret identity of {}",
    "task_done_by_person": "The professional role most suited to handle {}",
    "task_done_by_tool": "The tool that is used for {}",
    "word_sentiment": "Among positive, negative, neutral, the sentiment of {}",
    "work_location": "The place of work where you can usually find a {}",
}

_ENTITIES = {
    "Syria": "Country in the Middle East",
    "Leonardo DiCaprio": "American actor",
    "Samsung": "South Korean multinational major appliance and consumer electronics corporation",
}


def token_identity(placeholder: str = "?", *, words: Sequence[str] = ("cat", "1135", "hello")) -> Target:
    """The few-shot token-identity prompt: the model is shown `x -> x` and asked to go on after the patched `?`.

    Used with `target_layers=None` (l* = l). What it predicts next is compared with what the source prompt predicts
    next.

    Args:
        placeholder: the word that receives the vector; one token.
        words: what is shown; other words give other prompts for an ensemble.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.1; this is the prompt of the authors' code.

    >>> token_identity().prompt
    'cat -> cat\\n1135 -> 1135\\nhello -> hello\\n?'
    """
    return _target("".join(f"{word} -> {word}\n" for word in words) + placeholder, placeholder)


def next_token(placeholder: str = "?") -> Target:
    """Nothing but a placeholder after BOS: the vector alone says what comes next.

    With one word as source, this is the model's own prediction after that word, at every `l* = l`.

    Args:
        placeholder: the word that receives the vector; one token.

    Source: Ghandeharioun et al. 2024 (Patchscopes), appendix B, the single-token prompt (padded there, to keep the
    source's position).

    >>> next_token().prompt
    '?'
    """
    return _target(placeholder, placeholder)


def entity_description(placeholder: str = "x", *, shots: Mapping[str, str] | None = None) -> Target:
    """The three-shot description prompt, `entity: description, ..., x`: who or what is it?

    Used with `target_layers=None` (l* = l), the last token of a bare name as source, and `max_new_tokens=50`.

    Args:
        placeholder: the word that receives the vector; one token.
        shots: entities and their descriptions, in order; the paper's three by default.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.3.

    >>> entity_description(shots={"Pizza": "food from Italy"}).prompt
    'Pizza: food from Italy, x'
    """
    shown = _ENTITIES if shots is None else shots
    return _target("".join(f"{name}: {what}, " for name, what in shown.items()) + placeholder, placeholder)


def relations() -> list[str]:
    """The 22 relations that `attribute` knows, by the names of the authors' files.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.2 and appendix C.

    >>> len(relations()), relations()[:2]
    (22, ['company_ceo', 'country_capital_city'])
    """
    return list(_RELATIONS)


def attribute(relation: str, placeholder: str = "x") -> Target:
    """A relation in words, ending in the patched `x`: the attribute of a subject, from its vector alone.

    Used with every l and every l*, the last token of the subject as source, and `max_new_tokens=20`.

    Args:
        relation: a name of `relations()`, or a prompt of your own that contains the placeholder as a word.
        placeholder: the word that receives the vector (its last occurrence); one token.

    Raises:
        ValueError: neither a known name nor a prompt with the placeholder.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.2; the prompts of the authors' data set.

    >>> attribute("country_capital_city").prompt, attribute("The mayor of x").prompt
    ('The capital city of x', 'The mayor of x')
    """
    if relation in _RELATIONS:
        return _target(_RELATIONS[relation].format(placeholder), placeholder)
    if " " in relation:
        return _target(relation, placeholder)
    near = difflib.get_close_matches(relation, _RELATIONS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"tll.scopes.relations() are {relations()}."
    raise ValueError(f"no relation {relation!r}: {hint} Or give a prompt with the placeholder {placeholder!r} in it")


def selfie(
    n_placeholders: int = 5,
    question: str = "Sure, I will summarize the message:",
    *,
    placeholder: str = "_",
    chat: tuple[str, str] = ("[INST]", "[/INST]"),
) -> Target:
    """A message of placeholders that all receive the vector, and an answer that begins to summarise it.

    Used with `target_layers=[1]`. Wants a model that follows instructions.

    Args:
        n_placeholders: how many.
        question: what follows the message.
        placeholder: one token, written with spaces around it.
        chat: the marks around the user's message: Llama 2's by default; `("", "")` for none.

    Raises:
        ValueError: no placeholders.

    Source: Chen, Vondrick, Mao 2024 (SelfIE); the prompt of the authors' code, with a space before the
    first placeholder so that it does not grow together with the bracket.

    >>> selfie(3).prompt
    '[INST] _ _ _ [/INST] Sure, I will summarize the message:'
    """
    if n_placeholders < 1:
        raise ValueError(f"selfie needs at least one placeholder, got n_placeholders={n_placeholders}")
    _check_placeholder(placeholder)
    prompt = " ".join(part for part in (chat[0], *[placeholder] * n_placeholders, chat[1], question) if part)
    # Counted from the end: the text of BOS may hold the placeholder too ("<|begin_of_text|>").
    after = chat[1].count(placeholder) + question.count(placeholder)
    return Target(prompt, [at(placeholder, occurrence=i - n_placeholders - after) for i in range(n_placeholders)])


def future_lens(
    prompt: str | Tensor = 'Hello! Could you please tell me more about "', placeholder: str | None = None
) -> Target:
    """A prompt whose last token receives the vector and which then tells the tokens that the source was about to say.

    Used with `target_layers=None` (l* = l), or a linear `map`; the first new token is what follows the source's token
    at once, the second what follows that.

    Args:
        prompt: text, or a learned soft prompt `[pos, d_model]` (of 10 vectors in the paper). The other texts of the
            authors are 'The multi-tokens present here are "', 'The concepts in this hidden state listed are: (' and
            'This state is describing about the following concept:'.
        placeholder: a word of the text that receives the vector instead of the last token.

    Raises:
        ValueError: a placeholder that is not in the prompt, or one for a soft prompt.

    Source: Pal et al. 2023 (Future Lens), causal intervention with fixed and learned prompts; Ghandeharioun et al. 2024
    (Patchscopes), table 4.

    >>> future_lens().pos
    -1
    """
    if placeholder is None:
        return Target(prompt, pos=-1)
    if isinstance(prompt, Tensor):
        raise ValueError(
            "a soft prompt has no text to find a placeholder in: leave placeholder=None, the last position"
        )
    return _target(prompt, placeholder)


def _target(prompt: str, placeholder: str) -> Target:
    """The last occurrence of the placeholder: the text of BOS may hold an "x" too, and so may words before it."""
    _check_placeholder(placeholder)
    if placeholder not in prompt:
        raise ValueError(
            f"the placeholder {placeholder!r} is not in the prompt {prompt!r}: put it where the vector goes"
        )
    return Target(prompt, pos=at(placeholder, occurrence="last"))


def _check_placeholder(placeholder: str) -> None:
    if not placeholder.strip():
        raise ValueError(f"expected a placeholder of one token, such as 'x', got {placeholder!r}")
