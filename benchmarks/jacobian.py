"""The Jacobian lens against TransformerLens' own fitter: rows and passes, seconds, the difference; and what fewer rows would lose.

    python benchmarks/jacobian.py --prompts 8 --length 64             # lab-gpt2-small, 32 rows a pass, as TransformerLens 8
    python benchmarks/jacobian.py --prompts 40 --dispersion           # how far sampling output dimensions could go
    python benchmarks/jacobian.py --prompts 140 --bounds              # the same of other estimators, and in the lens' own logits

A backward row is one prompt with one cotangent, all its positions: what a backward pass costs counts in them, whoever fits. Passes and
forward rows are overhead. `--dispersion`: if dimension i has variance s_i^2 over prompts, n_i prompts for it give an error of
sum s_i^2 / n_i, least for n_i ~ s_i: a fit with as many rows of each needs mean(s^2) / mean(s)^2 times the rows, in the best basis.

`--bounds` gives each estimator for nothing what it would have to guess, and the passes that this takes. "entries": the error
|J_n - J|^2. "logits": the error of what the lens says, the mean of |W_U' (J_n - J) h|^2 over states h.

- rows: as above, basis and s from one half of the prompts, the error on the other; columns: the same with forward passes, which serve
  one layer each and cost two.
- prompt and row: pairs are drawn as their own deviation is large, mean(s^2) / mean(s)^2 over pairs.
- low rank: of each prompt's deviation r directions are measured exactly, with r forward and r backward passes, and the rest, a share t of
  its square, by random rows: d / (sqrt(2 r) + sqrt(d t))^2, at the best r.
"""

import argparse
import time
from contextlib import contextmanager
from typing import Any

import torch

import tl_lenses as tll
from tl_lenses.experiments import lens_directions
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
        "TransformerLens": lambda: JacobianLens.fit(model, texts, corpus="lab", max_seq_len=ids.shape[1], show_progress=False),
        "tl_lenses": lambda: tll.fit_jacobian(model, batches, layers, rows_per_pass=rows, show_progress=False),
    }
    made, measured = {}, {}
    for name, fit in fits.items():
        with counted() as counts:
            began = time.perf_counter()
            made[name] = fit()
            measured[name] = {**counts, "seconds": time.perf_counter() - began}
            print(f"{name:>16}: {counts['rows']:,} backward rows in {counts['passes']:,} passes, {measured[name]['seconds']:.1f} s")
    theirs, ours = measured.values()
    apart = max(float((made["tl_lenses"][k].weight - made["TransformerLens"].jacobians[k - 1]).abs().max()) for k in layers)
    print(f"largest difference {apart:.1e}; ratio of " + ", ".join(f"{k} {theirs[k] / ours[k]:.2f}" for k in theirs))


def by_prompt(model: Any, ids: torch.Tensor, layers: list[int] | None) -> torch.Tensor:
    """`[prompt, layer, d, d]`"""
    averaging = Averaging(tuple(rows_for(model, layers)), rows_per_pass=128)
    return torch.stack([sum_of_jacobians(model, tll.Batch(row[None]), averaging) for row in ids])


def root(square: torch.Tensor) -> torch.Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(square.double())
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.T).float()


def fewer(known: torch.Tensor, there: torch.Tensor) -> float:
    """Times fewer rows where n ~ s instead of n equal: mean(s^2) / mean(s)^2, if s is known from other prompts."""
    s = known.clamp_min(1e-6 * known.mean()).sqrt()
    return float(there.mean() / (s.mean() * (there / s).mean()))


def gains(apart: torch.Tensor) -> dict[str, float]:
    """By estimator, how many times fewer rows at equal error, from each prompt's deviation `[prompt, d, d]`."""
    d, found = apart.shape[1], {}
    for name, x in (("rows", apart), ("columns", apart.mT)):
        first, second = x.tensor_split(2)
        known, basis = torch.linalg.eigh(torch.einsum("pij,pkj->ik", first, first) / len(first))
        squares = (basis.T @ second).square().sum(2)
        found[name] = fewer(known, squares.mean(0))
        if name == "rows":
            found["prompt and row"] = fewer(squares, squares)
    spectra = torch.linalg.svdvals(apart).square().sum(0)
    left = 1 - spectra.cumsum(0) / spectra.sum()
    found["low rank"] = max(d / ((2 * r) ** 0.5 + float(d * left[r - 1].clamp_min(0)) ** 0.5) ** 2 for r in range(1, d // 2))
    return found


def bounds(model: Any, ids: torch.Tensor, layers: list[int] | None) -> None:
    """What estimators with fewer rows could win, per layer, for the error of the map's entries and for that of its logits."""
    each, seen = by_prompt(model, ids, layers), {}
    sites = layers or list(range(model.cfg.n_layers))
    with torch.no_grad():
        tll.run(model, ids, [tll.read(layer, seen) for layer in sites], None)
        v = lens_directions(tll.Lens(model), sites[0], range(model.cfg.d_vocab))
        read = root(v.T @ v / len(v))
    print(f"{len(ids)} prompts of {ids.shape[1]} tokens; times fewer rows at equal error, at most")
    for i, layer in enumerate(sites):
        states = seen[layer][:, 16:-1].flatten(0, 1)
        same = torch.eye(len(read))
        for name, out, into in (("entries", same, same), ("logits", read, root(states.T @ states / len(states)))):
            maps = out @ each[:, i] @ into
            apart = maps - maps.mean(0)
            size = float(apart.square().sum() / (len(ids) - 1) / maps.mean(0).square().sum())
            found = ", ".join(f"{key} {value:.2f}" for key, value in gains(apart).items())
            print(f"  layer {layer}, {name}: |J_p - J|^2 is {size:.3f} of |J|^2; {found}")


def dispersion(model: Any, ids: torch.Tensor) -> None:
    """How many times fewer rows the best allocation to output dimensions needs, at equal error."""
    each = by_prompt(model, ids, None)
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
    parser.add_argument("--bounds", action="store_true")
    parser.add_argument("--layers", type=int, nargs="+", help="of --bounds; all by default")
    args = parser.parse_args()
    lab = tll.load_model(args.model)
    text = tll.token_batches(
        tll.lab.text("train"), lab.tokenizer, seq_len=args.length, batch_size=args.prompts, limit_tokens=args.prompts * args.length
    )  # fmt: skip
    prompts = next(iter(text)).tokens
    if args.bounds:
        bounds(lab, prompts, args.layers)
    else:
        dispersion(lab, prompts) if args.dispersion else compare(lab, prompts, args.rows)
