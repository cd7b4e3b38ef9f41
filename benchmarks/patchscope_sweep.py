"""L x L patchscope sweeps against the procedure of the Patchscopes authors, one cell at a time and in batches.

    python benchmarks/patchscope_sweep.py --json patchscope_sweep.json
    python benchmarks/patchscope_sweep.py --sizes lab --repeats 1        # a look

Three ways to the same answer, on the same weights:

- `cell`: a source pass and a target pass per cell, a batch of one (the authors' `evaluate_patch_next_token_prediction` and
  `inspect`), on the Hugging Face model, with a forward hook on the block that is patched;
- `batch`: rows of one batch are cells, the source prompt runs once per row, one hook per row (their `..._batch` functions);
- `ours`: `tll.patchscope`.

The prompt is the token-identity prompt, its last token is patched, l and l* run over the outputs of all blocks. The answer is
checked first: logits equal within 1e-3, texts equal up to the first step whose lead is below 1e-3. Times are medians of paired
rounds (cell, batch, ours, again); peak memory is that of a process of its own above the loaded model. Linux only.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from trajectory import child, machine, reset_peak, resident, trim

# (size, new tokens) -> how many times faster ours must be than (cell, batch)
REQUIRED = {"next": (25.0, 5.0), "text": (5.0, 1.5)}
SIZES = {"lab": "lab-gpt2", "gpt2-small": "random weights, 12 layers, width 768, vocabulary 50,257"}
SOURCE = "The city of Paris lies on a river. People come from all over the world to see the city of"

NAMES = ("new_tokens", "repeats", "threads")  # the options that a case is run with


def main() -> int:
    """Check, time and weigh every way; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write raw figures here")
    parser.add_argument("--sizes", default="lab,gpt2-small", help="lab, gpt2-small")
    parser.add_argument("--kinds", default="next,text", help="next (one token), text (--new-tokens tokens)")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--profile", action="store_true", help="only show where the time of ours goes, per call")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(job(*args.case.split(":"), args)))
        return 0
    if args.profile:
        for size in args.sizes.split(","):
            for kind in args.kinds.split(","):
                print(child(f"{size}:{kind}:profile", args, NAMES)["profile"])
        return 0
    rows, passed = [], True
    for size in args.sizes.split(","):
        for kind in args.kinds.split(","):
            times = child(f"{size}:{kind}:times", args, NAMES)
            memory = {way: child(f"{size}:{kind}:{way}", args, NAMES)["mb"] for way in ("cell", "batch", "ours")}
            row = {"size": size, "kind": kind, **times, "mb": memory}
            row["over_cell"], row["over_batch"] = (
                median(a / b for a, b in zip(times["seconds"][way], times["seconds"]["ours"], strict=True))
                for way in ("cell", "batch")
            )
            rows.append(row)
            enough = all(got >= want for got, want in zip((row["over_cell"], row["over_batch"]), REQUIRED[kind], strict=True))
            passed &= enough
            print(f"\n{SIZES[size]}: {'next token' if kind == 'next' else f'{args.new_tokens} tokens'}, {row['cells']} cells "
                  f"({'ok' if enough else 'TOO SLOW'}: at least {REQUIRED[kind][0]:g} and {REQUIRED[kind][1]:g} times)")  # fmt: skip
            print(f"answer: logits differ by at most {row['logits']:.1e}; {row['tokens']} tokens compared, all equal")
            print(f"{'':<8}{'seconds':>10}{'ours is faster by':>20}{'peak MB':>10}")
            for way, ratio in (("cell", row["over_cell"]), ("batch", row["over_batch"]), ("ours", None)):
                shown = "" if ratio is None else f"{ratio:.1f}x"
                print(f"{way:<8}{median(times['seconds'][way]):>10.2f}{shown:>20}{memory[way]:>10.0f}")
    if args.json:
        result = {"required": REQUIRED, "passed": passed, "threads": args.threads, "rows": rows, **machine()}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


def job(size: str, kind: str, what: str, args: argparse.Namespace) -> dict[str, Any]:
    """The answer and the times of one size and kind, or the peak memory of one way."""
    import torch

    torch.set_num_threads(args.threads)
    hf_model, model, tokenizer = build(size)
    n_new = args.new_tokens if kind == "text" else 0
    # Paper layer k is the output of block k, our layer k + 1. The last output of a Hugging Face model is normed already, so the
    # authors' procedure reads the others only.
    depth = model.cfg.n_layers
    cells = [(a, b) for a in range(1, depth) for b in range(1, depth)]
    source = model.to_tokens(SOURCE, prepend_bos=True)
    target = model.to_tokens(IDENTITY, prepend_bos=True)
    ways = {
        "cell": lambda: one_by_one(hf_model, source, target, cells, n_new, tokenizer.eos_token_id),
        "batch": lambda: in_batches(hf_model, source, target, cells, n_new, tokenizer.eos_token_id),
        "ours": lambda: ours(model, source, target, cells, n_new),
    }
    if what == "profile":
        return {"profile": profile(ways["ours"])}
    if what in ways:
        ways["ours"]()  # one-time work is not counted
        trim()
        before = resident()
        reset_peak()
        ways[what]()
        return {"mb": resident("VmHWM") - before}
    answers = {way: run() for way, run in ways.items()}
    worst = max(float((answers["cell"][0] - answers[way][0]).abs().max()) for way in ("batch", "ours"))
    if worst > 1e-3:
        sys.exit(f"the answers differ by {worst:.1e}: nothing is measured")
    compared = sum(same_texts(answers["cell"][1], answers["cell"][2], answers[way][1]) for way in ("batch", "ours") if n_new)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - started)
    return {"cells": len(cells), "logits": worst, "tokens": compared, "seconds": seconds}


def profile(run: Any, calls: int = 20) -> str:
    """What a call of ours spends its time in, as cProfile sees it, and the milliseconds of a call without the profiler."""
    import cProfile
    import io
    import pstats

    run()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    milliseconds = 1000 * (time.perf_counter() - started) / calls
    seen = cProfile.Profile()
    seen.enable()
    for _ in range(calls):
        run()
    seen.disable()
    text = io.StringIO()
    pstats.Stats(seen, stream=text).sort_stats("cumulative").print_stats("tl_lenses|transformer_bridge", 30)
    return f"{milliseconds:.1f} ms a call; below, {calls} calls under the profiler\n{text.getvalue()}"


IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"


def same_texts(texts: list[list[int]], leads: list[list[float]], other: list[list[int]]) -> int:
    """How many tokens were compared; leaves where they differ before a step that is too close to call."""
    n = 0
    for a, lead, b in zip(texts, leads, other, strict=True):
        sure = next((i for i, gap in enumerate(lead) if gap < 1e-3), len(lead))
        if a[:sure] != b[:sure]:
            sys.exit(f"the texts differ: {a[:sure]} and {b[:sure]}")
        n += sure
    return n


def ours(model: Any, source: Any, target: Any, cells: list[tuple[int, int]], n_new: int) -> tuple[Any, Any, Any]:
    """The same cells as one call."""
    import tl_lenses as tll

    result = tll.patchscope(
        model, tll.Source(source[0]), tll.Target(target[0]), pairs=cells, max_new_tokens=n_new, show_progress=False
    )
    texts = None if result.tokens is None else [[t for t in row if t >= 0] for row in result.tokens[0].tolist()]
    return result.logits[0], texts, None


def one_by_one(hf_model: Any, source: Any, target: Any, cells: list[tuple[int, int]], n_new: int, eos: int) -> Any:
    """The authors' procedure: both prompts run for every cell, batch of one."""
    import torch

    blocks, found, texts, leads = hf_model.transformer.h, [], [], []
    with torch.no_grad():
        for a, b in cells:
            vector = hf_model(source, output_hidden_states=True).hidden_states[a][0, -1]
            handle = blocks[b - 1].register_forward_hook(_overwrite([(0, vector)]))
            try:
                if n_new:
                    out = hf_model.generate(
                        target, attention_mask=torch.ones_like(target), max_new_tokens=n_new, do_sample=False,
                        pad_token_id=eos, output_logits=True, return_dict_in_generate=True,
                    )  # fmt: skip
                    found.append(out.logits[0][0])
                    texts.append(out.sequences[0, target.shape[1] :].tolist())
                    tops = [step[0].topk(2).values for step in out.logits]
                    leads.append([float(top[0] - top[1]) for top in tops])
                else:
                    found.append(hf_model(target).logits[0, -1])
            finally:
                handle.remove()
    return torch.stack(found), texts, leads


def in_batches(hf_model: Any, source: Any, target: Any, cells: list[tuple[int, int]], n_new: int, eos: int, size: int = 512) -> Any:
    """The authors' batched variant: rows are cells, the source runs once per row, one hook per row."""
    import torch

    blocks, found, texts = hf_model.transformer.h, [], []
    with torch.no_grad():
        for start in range(0, len(cells), size):
            part = cells[start : start + size]
            hidden = hf_model(source.expand(len(part), -1), output_hidden_states=True).hidden_states
            handles = [
                blocks[b - 1].register_forward_hook(_overwrite([(row, hidden[a][row, -1])])) for row, (a, b) in enumerate(part)
            ]
            try:
                tokens = target.expand(len(part), -1)
                if n_new:
                    out = hf_model.generate(
                        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_new, do_sample=False,
                        pad_token_id=eos, output_logits=True, return_dict_in_generate=True,
                    )  # fmt: skip
                    found.append(out.logits[0])
                    for row in out.sequences[:, target.shape[1] :].tolist():
                        texts.append(row[: row.index(eos) + 1] if eos in row else row)
                else:
                    found.append(hf_model(tokens).logits[:, -1])
            finally:
                for handle in handles:
                    handle.remove()
    return torch.cat(found), texts, None


def _overwrite(rows: list[tuple[int, Any]]) -> Any:
    """The authors' hook: the last position of the prompt's pass is overwritten, generated steps are left alone."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] == 1:
            return None
        for row, vector in rows:
            hidden[row, -1] = vector
        return output

    return hook


def build(size: str) -> tuple[Any, Any, Any]:
    """The Hugging Face model, the same weights in TransformerLens, and the tokenizer."""
    import contextlib

    import torch
    import transformers

    from tl_lenses import lab

    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(lab.path())
    if size == "lab":
        config = transformers.GPT2Config.from_pretrained(lab.path())
        hf_model: Any = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        hf_model.load_state_dict(lab._tensors(lab.path()), strict=False)
        hf_model.tie_weights()
        model = lab.load()
    else:
        from trajectory import _hooked

        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, bos_token_id=0, eos_token_id=0
        )
        config.architectures = ["GPT2LMHeadModel"]
        hf_model = transformers.GPT2LMHeadModel(config).eval()
        with contextlib.redirect_stdout(sys.stderr):
            twin: Any = transformers.GPT2LMHeadModel(config).eval()
            twin.load_state_dict(hf_model.state_dict())
            try:
                from transformer_lens.model_bridge import TransformerBridge
            except ImportError:
                model = _hooked(config, twin)
                model.set_tokenizer(tokenizer)
            else:
                model = TransformerBridge.boot_transformers(
                    "random-gpt2", hf_model=twin, tokenizer=tokenizer, device="cpu", dtype=torch.float32
                ).eval()
    return hf_model, model, tokenizer


if __name__ == "__main__":
    sys.exit(main())
