"""Ready scopes: targets with the published prompts."""

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

from tl_lenses.checks import plain_text, several, whole_number
from tl_lenses.deprecation import say
from tl_lenses.patchscopes.readers import activation_oracle, latent_qa, nla
from tl_lenses.patchscopes.targets import Target
from tl_lenses.sites import at

__all__ = [
    "RELATIONS", "activation_oracle", "attribute", "entity_description", "future_lens", "latent_qa", "next_token", "nla", "repeat",
    "reverse_dictionary", "selfie", "token_identity",
]  # fmt: skip

# The relations that `attribute` knows, by the names of the authors' files, with the target prompts of their data set, word
# for word; "{}" is the placeholder, an `x` there. Ghandeharioun et al. 2024 (Patchscopes), section 4.2 and appendix C.
RELATIONS = {
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
    """The few-shot token-identity prompt: lines `x -> x`, then the patched `?`, whose continuation is read.

    Used with `target_layers=None` (l* = l). What it predicts next is compared with what the source prompt predicts
    next.

    Args:
        placeholder: the word that receives the vector; one token.
        words: the repeated words; other words give other prompts for an ensemble.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.1; this is the prompt of the authors' code.

    >>> token_identity().prompt
    'cat -> cat\\n1135 -> 1135\\nhello -> hello\\n?'
    """
    return _target(_repeated(words), placeholder, ends_with_it=True)


def repeat(placeholder: str = "?", *, words: Sequence[str] = ("cat", "1135", "hello")) -> Target:
    """The token-identity prompt with the arrow behind the placeholder: what comes next is the word itself.

    What `fit_scope` trains for by default: which token was here?

    Args:
        placeholder: the word that receives the vector; one token.
        words: the repeated words.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.1, with ` ->` at its end.

    >>> repeat().prompt
    'cat -> cat\\n1135 -> 1135\\nhello -> hello\\n? ->'
    """
    return _target(f"{_repeated(words)}{placeholder} ->", placeholder)


def _repeated(words: Sequence[str]) -> str:
    texts = [plain_text("a repeated word", word) for word in several("words", words, "texts")]
    return "".join(f"{word} -> {word}\n" for word in texts)


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
    return _target("", placeholder, ends_with_it=True)


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
    return _target(_shown("{}: {}, ", shots, _ENTITIES), placeholder, ends_with_it=True)


_DESCRIBED = {
    "a small animal that people keep and that catches mice": "cat",
    "water that is frozen": "ice",
    "a place where books are kept and lent": "library",
    "the meal that is eaten in the morning": "breakfast",
}


def reverse_dictionary(placeholder: str = "x", *, shots: Mapping[str, str] | None = None) -> Target:
    """Descriptions and their words, `description ⇒ word`, then `x ⇒`: which word does the vector of a description stand for?

    Used with the last token of a description as source. The score is the word's: `result.rank(" word")`, `result.probability(" word")`, or the share of
    texts that are the word (the paper's accuracy, of descriptions in words: pass them as the prompt, or see `faithfulness`, "source as text").

    Args:
        placeholder: the word that receives the vector; one token.
        shots: descriptions and their words, in order; the paper has up to 48, of THINGS.

    Source: Xu et al. 2024 (On the Tip of the Tongue, 2402.14404), the reverse-dictionary probe; the examples are ours.

    >>> reverse_dictionary(shots={"water that is frozen": "ice"}).prompt
    'water that is frozen ⇒ ice\\nx ⇒'
    """
    shown = _shown("{} ⇒ {}\n", shots, _DESCRIBED)
    return _target(f"{shown}{placeholder} ⇒", placeholder)


def _shown(form: str, shots: Mapping[str, str] | None, usual: Mapping[str, str]) -> str:
    """Examples as a prompt shows them."""
    if shots is not None and not isinstance(shots, Mapping):
        raise TypeError(f"shots must be a mapping of texts to texts, got {type(shots).__name__}")
    return "".join(form.format(*shot) for shot in (usual if shots is None else shots).items())


def attribute(relation: str, placeholder: str = "x") -> Target:
    """A relation in words, ending in the patched `x`: the attribute of a subject, from its vector alone.

    Used with every l and every l*, the last token of the subject as source, and `max_new_tokens=20`.

    Args:
        relation: a name in `RELATIONS`, or a prompt of your own that contains the placeholder as a word.
        placeholder: the word that receives the vector (its last occurrence); one token.

    Raises:
        ValueError: neither a known name nor a prompt with the placeholder.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.2; the prompts of the authors' data set.

    >>> attribute("country_capital_city").prompt, attribute("The mayor of x").prompt
    ('The capital city of x', 'The mayor of x')
    """
    _check_placeholder(placeholder)
    if plain_text("relation", relation) in RELATIONS:
        return _target(RELATIONS[relation].format(placeholder), placeholder)
    if " " in relation:
        return _target(relation, placeholder)
    near = difflib.get_close_matches(relation, RELATIONS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"tll.scopes.RELATIONS has {list(RELATIONS)}."
    raise ValueError(f"no relation {relation!r}: {hint} Or give a prompt with the placeholder {placeholder!r} in it")


def selfie(
    n_placeholders: int = 5,
    question: str = "Sure, I will summarize the message:",
    *,
    placeholder: str = "_",
    chat: tuple[str, str] = ("[INST]", "[/INST]"),
) -> Target:
    """A message of placeholders that all receive the vector, and the beginning of its summary.

    Used with `target_layers=[1]`, on a model that follows instructions.

    Args:
        n_placeholders: how many, at least 1.
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
    n_placeholders = whole_number("n_placeholders", n_placeholders, least=1)
    _check_placeholder(placeholder)
    question = plain_text("question", question)
    marks = [plain_text("a mark of chat", mark) for mark in several("chat", chat, "two texts")]
    if len(marks) != 2:
        raise ValueError(f"chat must be two texts, the marks before and after the message, got {chat!r}")
    prompt = " ".join(part for part in (marks[0], *[placeholder] * n_placeholders, marks[1], question) if part)
    # Counted from the end: the text of BOS may hold the placeholder too ("<|begin_of_text|>").
    after = marks[1].count(placeholder) + question.count(placeholder)
    return Target(prompt, [at(placeholder, occurrence=i - n_placeholders - after) for i in range(n_placeholders)])


def future_lens(prompt: str | Tensor = 'Hello! Could you please tell me more about "', placeholder: str | None = None) -> Target:
    """A prompt whose last token receives the vector; its continuation predicts the source's next tokens.

    Used with `target_layers=None` (l* = l), or a linear `map`. The first new token predicts the source's next token, the
    second the one after it.

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
        raise ValueError("a soft prompt has no text to find a placeholder in: leave placeholder=None, the last position")
    return _target(plain_text("prompt", prompt), placeholder)


def _target(prompt: str, placeholder: str, *, ends_with_it: bool = False) -> Target:
    """The last occurrence of the placeholder: the text of BOS may hold an "x" too, and so may words before it."""
    _check_placeholder(placeholder)
    if ends_with_it:
        prompt += placeholder
    if placeholder not in prompt:
        raise ValueError(f"the placeholder {placeholder!r} is not in the prompt {prompt!r}: put it where the vector goes")
    return Target(prompt, pos=at(placeholder, occurrence="last"))


def _check_placeholder(placeholder: str) -> None:
    if not plain_text("placeholder", placeholder).strip():
        raise ValueError(f"expected a placeholder of one token, such as 'x', got {placeholder!r}")


_MOVED = {
    "activation_patching": "activation_patching", "attention_knockout": "attention_knockout",
    "causal_tracing": "causal_tracing", "logit_lens_as_patchscope": "logit_lens", "multihop": "multihop",
    "tuned_lens_as_patchscope": "tuned_lens",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Old names, for one version: the methods are `tll.methods`, and `relations()` is the list of `RELATIONS`."""
    if name == "relations":
        say("tll.scopes.relations() is tll.scopes.RELATIONS now, a dictionary of prompts by name: list(tll.scopes.RELATIONS)")
        return lambda: list(RELATIONS)
    if name in _MOVED:
        say(f"tll.scopes.{name} is tll.methods.{_MOVED[name]} now")
        return getattr(import_module("tl_lenses.methods"), _MOVED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
