"""How likely texts are under a patchscope's vectors, and under the same question asked in words."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_lenses.patchscopes.planner import batches, run_cells, score_cells
from tl_lenses.patchscopes.request import Request
from tl_lenses.patchscopes.run import by_target, insertion, planned, sources_read
from tl_lenses.patchscopes.targets import Prompt, Target, ready_target
from tl_lenses.progress import progress

Ids = tuple[int, ...]


def text_scores(
    request: Request, texts: Sequence[Sequence[Ids]], compared: Bool[Tensor, "text source"], prompts: Sequence[Prompt], *,
    show_progress: bool | None = None,
) -> Float[Tensor, "pair text source"]:  # fmt: skip
    """`A[p, i, j] = log p(y_i | T_i with h_j at the pair p)` in nats; NaN where i and j are not compared.

    The vectors are read once, the prompt runs once per vector and pair, and equal texts are scored once.

    Args:
        texts: `[text][pair]`, ids.
        compared: which texts are scored with which sources.
        prompts: the target prompt of every text.
    """
    vectors, prefixes = sources_read(request)
    n_pairs, n_sources = len(request.pairs), len(request.sources)
    scores = torch.full((n_pairs, len(texts), n_sources), torch.nan, dtype=torch.float64)
    of_texts = replace(request, targets=[[prompt] for prompt in prompts])
    groups = by_target(of_texts, [(i, 1.0, None) for i in range(len(texts))])
    cells = [
        [(j, p) for p in range(n_pairs) for j in range(n_sources) if bool(compared[members, j].any())] for _, members in groups
    ]
    with progress(total=sum(map(len, cells)), desc="scoring texts", show=show_progress) as bar:
        for ((prompt,), members), members_cells in zip(groups, cells, strict=True):
            (target,), size = planned(request, [prompt], prefixes, {})
            inserted = insertion(request, vectors, prompt)
            for part in batches(len(members_cells), size):
                some = [members_cells[c] for c in part]
                rows = [inserted(j, request.scales[0], request.pairs[p]) for j, p in some]
                wanted = [[i for i in members if compared[i, j]] for j, _ in some]
                distinct = [list(dict.fromkeys(texts[i][p] for i in of)) for of, (_, p) in zip(wanted, some, strict=True)]
                for of, (j, p), ids, x in zip(wanted, some, distinct, score_cells(target, rows, distinct), strict=True):
                    for i in of:
                        scores[p, i, j] = x[ids.index(texts[i][p])]
                bar.update(len(some))
    return scores


def asked(request: Request, prompt: Prompt, texts: Sequence[Ids]) -> tuple[list[float], list[int]]:
    """`log p(text | prompt)` of texts after a prompt that nothing is put into, and the ids that it is continued by."""
    greedy = replace(request.continuation, do_sample=False, n_samples=1)
    (target,), _ = planned(replace(request, continuation=greedy), [prompt], {}, {})
    logits, ids = run_cells(target, [{}])
    said = ids[0] if target.continuation.max_new_tokens else [int(logits[0].argmax())]
    return (score_cells(target, [{}], [texts])[0].tolist() if texts else []), said


def in_words(request: Request, prompt: Prompt, words: str) -> Prompt | None:
    """The target prompt with words where its placeholders are (from the first to the last); None where it has no text.

    Spaces in front of the placeholder stay.
    """
    tokenizer: Any = getattr(request.to, "tokenizer", None)
    if tokenizer is None or prompt.soft is not None:
        return None
    ids = prompt.tokens[0].tolist()
    text = lambda n: tokenizer.decode(ids[:n], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    bos = len(text(1)) if ids[0] == tokenizer.bos_token_id else 0
    before, through, whole = text(min(prompt.place)), text(max(prompt.place) + 1), text(len(ids))
    held = through[len(before) :]
    spaces = held[: len(held) - len(held.lstrip())]
    written = before[bos:] + spaces + words.strip() + whole[len(through) :]
    n_new, read = request.continuation.max_new_tokens, prompt.read - len(ids)  # what follows the placeholder stays
    return ready_target(request.to, Target(written or " ", read), read, n_new, prepend_bos=bos > 0)
