"""A trigram model by counting: what a lab model has to beat."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["Trigram"]

Ids = NDArray[np.int64]


class Trigram:
    """Interpolated Kneser-Ney with one discount: p(c | a b) backs off to p(c | b), to p(c), to 1/V (Ney et al. 1994, sec. 3).

    Example:
        >>> model = Trigram(np.array([1, 2, 3] * 50), n_vocab=8)
        >>> bool(model.nats(np.array([1, 2, 3, 1, 2, 3]))[2:].max() < 0.1)
        True
    """

    def __init__(self, tokens: Ids, n_vocab: int, discount: float = 0.75):
        self.n_vocab, self.discount = n_vocab, discount
        a, b, c = (tokens[i : len(tokens) - 2 + i].astype(np.int64) for i in range(3))
        triples, counts = np.unique((a * n_vocab + b) * n_vocab + c, return_counts=True)
        self.orders = [self._order(triples, counts)]
        # Lower orders count in how many contexts a continuation comes, not how often (Kneser-Ney).
        pairs, kinds = np.unique(triples % n_vocab**2, return_counts=True)
        self.orders.append(self._order(pairs, kinds))
        singles, kinds = np.unique(pairs % n_vocab, return_counts=True)
        self.orders.append(self._order(singles, kinds))

    def _order(self, grams: Ids, counts: Ids) -> tuple[Ids, Ids, Ids, Ids, Ids]:
        """Grams with counts, and per context (the gram without its last token) the total and the number of kinds."""
        contexts, inverse = np.unique(grams // self.n_vocab, return_inverse=True)
        totals = np.bincount(inverse, weights=counts).astype(np.int64)
        return grams, counts, contexts, totals, np.bincount(inverse)

    def nats(self, tokens: Ids) -> NDArray[np.float64]:
        """Surprise in nats of every token but the first two, given the two before it.

        Args:
            tokens: [n] ids.
        """
        a, b, c = (tokens[i : len(tokens) - 2 + i].astype(np.int64) for i in range(3))
        p = np.full(len(c), 1 / self.n_vocab)
        contexts = (a * self.n_vocab + b, b, np.zeros_like(b))
        for (grams, counts, known, totals, kinds), context in list(zip(self.orders, contexts, strict=True))[::-1]:
            gram = context * self.n_vocab + c
            at = np.minimum(np.searchsorted(grams, gram), len(grams) - 1)
            count = np.where(grams[at] == gram, counts[at], 0)
            at = np.minimum(np.searchsorted(known, context), len(known) - 1)
            seen = known[at] == context
            total, kind = np.where(seen, totals[at], 1), np.where(seen, kinds[at], 0)
            own = np.maximum(count - self.discount, 0) / total
            p = np.where(seen, own + self.discount * kind / total * p, p)
        return -np.log(p)
