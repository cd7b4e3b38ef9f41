"""What a trained map of a scope is worth: P@1 of the word under the source position, at each layer, on held-out words.

    python benchmarks/fit_scope.py                                       # lab-gpt2, layers 2, 4 and 6 into layer 1, 100 steps
    python benchmarks/fit_scope.py --lr 0.01,0.03,0.1 --layers 4
    python benchmarks/fit_scope.py --model smollm2-135m --layers 8,16 --text valid.txt --held-out test.txt

The target is `scopes.repeat()` (`cat -> cat ... ? ->`); the words are distinct tokens that begin with a space, each in its own context. Beside
the fitted map: the vector as it is, the best of six lengths, chosen on these words ("norm" counts what it replaces as 1), another word's
vector through the map, and what the fit says of its own controls on running text. Nothing passes or fails.
"""

import argparse
import sys
import time
from typing import Any

NORMS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def main() -> int:
    """Print a table per rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab-gpt2")
    parser.add_argument("--layers", default="2,4,6")
    parser.add_argument("--target-layer", type=int, default=1)
    parser.add_argument("--text", help="a file; the bundled text by default")
    parser.add_argument("--held-out", help="a file; the bundled held-out text by default")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", default="0.1")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import torch

    import tl_lenses as tll

    torch.set_num_threads(args.threads)
    model = tll.load_model(args.model, device="cpu")
    layers = [int(layer) for layer in args.layers.split(",")]
    pairs, target = [(layer, args.target_layer) for layer in layers], tll.scopes.repeat()
    vectors, words = held_out_words(model, args.held_out or tll.lab.text("heldout"), args.words)

    def right(source: Any, **settings: Any) -> list[float]:
        """P@1 of each pair."""
        said = tll.patchscope(model, tll.Source(source), target, pairs=pairs, **settings).top_ids[..., 0]
        return (said == words[:, None]).double().mean(0).tolist()

    rows = {"as it is": right(vectors)}
    scaled = [right(vectors, norm="replaced", scale=norm) for norm in NORMS]
    rows["norm 1, unfitted"] = scaled[NORMS.index(1.0)]
    rows["best of six norms"] = [max(column) for column in zip(*scaled, strict=True)]
    for lr in map(float, args.lr.split(",")):
        text = tll.token_batches(args.text or tll.lab.text("train"), model.tokenizer, seq_len=64, batch_size=8)
        began = time.perf_counter()
        maps = tll.fit_scope(model, text, target, steps=args.steps, pairs=pairs, rank=args.rank, lr=lr)
        seconds = time.perf_counter() - began
        rows[f"fitted, lr {lr:g}"] = right(vectors, map=maps)
        rows["  another word's vector"] = right(vectors.roll(1, 0), map=maps)
        print(f"lr {lr:g}: {args.steps} steps, {seconds:.0f} s\n{maps}\n", flush=True)
    print(f"{args.model}, {len(words)} held-out words\n{'layer':28}" + "".join(f"{layer:8}" for layer in layers))
    for name, values in rows.items():
        print(f"{name:28}" + "".join(f"{value:8.3f}" for value in values))
    return 0


def held_out_words(model: Any, text: Any, n: int) -> tuple[Any, Any]:
    """Residuals of all layers `[n, n_layers + 1, d_model]` at n distinct words of a text, and their ids."""
    import torch

    import tl_lenses as tll

    ids: list[int] = []
    vectors = []
    for batch in tll.token_batches(text, model.tokenizer, seq_len=64, batch_size=8):
        seen: dict[int, Any] = {}
        layers = range(model.cfg.n_layers + 1)
        tll.run(model, batch.tokens, [tll.read(tll.site(model, layer), seen, key=layer) for layer in layers])
        for row, column in torch.ones_like(batch.tokens[:, 8:]).nonzero().tolist():
            word = int(batch.tokens[row, column + 8])
            piece = model.tokenizer.decode([word])
            if piece[:1] == " " and piece[1:].isalpha() and len(piece) > 3 and word not in ids:
                ids.append(word)
                vectors.append(torch.stack([seen[layer][row, column + 8] for layer in layers]).detach())
            if len(ids) == n:
                return torch.stack(vectors), torch.tensor(ids)
    raise ValueError(f"the text has only {len(ids)} distinct words: give more text, or --words {len(ids)}")


if __name__ == "__main__":
    sys.exit(main())
