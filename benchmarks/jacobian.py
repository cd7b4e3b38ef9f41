"""The Jacobian lens against TransformerLens' own fitter: rows and passes, seconds, the difference; and what fewer rows would lose.

    python benchmarks/jacobian.py --prompts 8 --length 64             # lab-gpt2-small, 32 rows a pass, as TransformerLens 8
    python benchmarks/jacobian.py --prompts 40 --dispersion           # how far sampling output dimensions could go

A backward row is one prompt with one cotangent, all its positions: what a backward pass costs counts in them, whoever fits. Passes and
forward rows are overhead. `--dispersion`: if dimension i has variance s_i^2 over prompts, n_i prompts for it give an error of
sum s_i^2 / n_i, least for n_i ~ s_i: a fit with as many rows of each needs mean(s^2) / mean(s)^2 times the rows, in the best basis.
"""

import argparse
import time
from contextlib import contextmanager
from typing import Any

import torch

import tl_lenses as tll
from tl_lenses.fit.common import rows_for
from tl_lenses.fit.jacobian import Averaging, sum_of_jacobians


@contextmanager
def counted() -> Any:
    """`{"passes", "rows"}` of the backward passes made inside."""
    counts, grad = {"passes": 0, "rows": 0}, torch.autograd.grad

    def counting(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        counts["passes"] += 1
        counts["rows"] += int(grad_outputs.flatten(1).any(1).sum())
        return grad(outputs, inputs, grad_outputs, *args, **kwargs)

    torch.autograd.grad = counting
    try:
        yield counts
    finally:
        torch.autograd.grad = grad


def compare(model: Any, ids: torch.Tensor, rows: int) -> None:
    """Both fitters on the same prompts."""
    from transformer_lens.tools.analysis import JacobianLens

    texts, layers = [model.tokenizer.decode(row[1:]) for row in ids], range(1, model.cfg.n_layers)
    same = [model.to_tokens(text)[:, : ids.shape[1]] for text in texts]
    by_length: dict[int, list[torch.Tensor]] = {}
    for row in same:
        by_length.setdefault(row.shape[1], []).append(row)
    batches = [torch.cat(group) for group in by_length.values()]
    fits = {
        "TransformerLens": lambda: JacobianLens.fit(
            model, texts, corpus="lab", max_seq_len=ids.shape[1], show_progress=False
        ),
        "tl_lenses": lambda: tll.fit_jacobian(model, batches, layers, rows_per_pass=rows, show_progress=False),
    }
    made, measured = {}, {}
    for name, fit in fits.items():
        with counted() as counts:
            began = time.perf_counter()
            made[name] = fit()
            measured[name] = {**counts, "seconds": time.perf_counter() - began}
            print(
                f"{name:>16}: {counts['rows']:,} backward rows in {counts['passes']:,} passes, {measured[name]['seconds']:.1f} s"
            )
    theirs, ours = measured.values()
    apart = max(
        float((made["tl_lenses"][k].weight - made["TransformerLens"].jacobians[k - 1]).abs().max()) for k in layers
    )
    print(f"largest difference {apart:.1e}; ratio of " + ", ".join(f"{k} {theirs[k] / ours[k]:.2f}" for k in theirs))


def dispersion(model: Any, ids: torch.Tensor) -> None:
    """How many times fewer rows the best allocation to output dimensions needs, at equal error."""
    averaging = Averaging(tuple(rows_for(model, None)))
    each = torch.stack([sum_of_jacobians(model, tll.Batch(row[None]), averaging) for row in ids])
    apart = each - each.mean(0)
    apart = apart / apart.pow(2).sum((0, 2, 3), keepdim=True).sqrt()
    flat = apart.flatten(2).transpose(0, 1)  # [layer, prompt, d d]
    shares = torch.linalg.eigvalsh(flat @ flat.mT).flip(-1).cumsum(-1)
    print("variance of 1 and of 10 principal components over prompts, by layer:")
    print("\n".join(f"  {layer}: {float(s[0]):.0%}, {float(s[9]):.0%}" for layer, s in enumerate(shares)))
    first, second = apart.tensor_split(2)
    bases = {
        "output dimensions": torch.eye(apart.shape[2]),
        "principal axes of the other half": torch.linalg.eigh(torch.einsum("plij,plkj->ik", first, first))[1],
    }
    for name, basis in bases.items():
        variance = torch.einsum("ik,plij->plkj", basis, second).pow(2).sum((0, 1, 3))
        print(f"{name}: {float(variance.mean() / variance.sqrt().mean() ** 2):.2f} times fewer rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab-gpt2-small")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="of a backward pass of ours")
    parser.add_argument("--dispersion", action="store_true")
    args = parser.parse_args()
    lab = tll.load_model(args.model)
    text = tll.token_batches(
        tll.lab.text("train"), lab.tokenizer, seq_len=args.length, batch_size=args.prompts, limit_tokens=args.prompts * args.length
    )  # fmt: skip
    prompts = next(iter(text)).tokens
    dispersion(lab, prompts) if args.dispersion else compare(lab, prompts, args.rows)
