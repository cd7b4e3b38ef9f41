"""Ready targets, with the published prompts."""

from tl_lenses.patchscopes.targets import Target


def token_identity() -> Target:
    """The few-shot token-identity prompt: the model is shown `x -> x` and asked to go on after the patched `?`.

    Used with `target_layers=None` (l* = l). What it predicts next is compared with what the source prompt predicts
    next.

    Source: Ghandeharioun et al. 2024 (Patchscopes), section 4.1; this is the prompt of the authors' code.

    >>> token_identity().prompt
    'cat -> cat\\n1135 -> 1135\\nhello -> hello\\n?'
    """
    return Target("cat -> cat\n1135 -> 1135\nhello -> hello\n?", pos=-1)
