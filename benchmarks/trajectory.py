"""Peak memory and time of `trajectory` at GPT-2-small size, above the model's own plain forward on the same input.

    python benchmarks/trajectory.py --json trajectory.json

12 layers, width 768, vocabulary 50,257, 1,024 positions, batch 1, fp32, random weights. Each measurement runs in a process of
its own. The answer is checked first. Leaves with 1 if any lens needs more than LIMIT_MB above the plain forward. Linux only
(peak memory is read from /proc).
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

LIMIT_MB = 200
CASES = {
    "plain": "the model's own forward pass",
    "logit": "trajectory, logit lens",
    "random": "trajectory, random translators",
}

NAMES = ("positions", "layers", "width", "vocabulary", "top_k", "threads")  # the options that a case is run with


def main() -> int:
    """Run every case in its own process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write raw figures here")
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case; medians count")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--case", choices=[*CASES, "answer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(answer(args) if args.case == "answer" else measure(args)))
        return 0

    shape = {name: getattr(args, name) for name in ("positions", "layers", "width", "vocabulary")}
    checked = child("answer", args)
    print(
        f"answer: the last row's KL is at most {checked['last_row_kl']:.1e}, chunked against unchunked differs by at most {checked['chunked']:.1e}"
    )
    if checked["last_row_kl"] > 1e-6 or checked["chunked"] > 1e-4:
        print("the answer is wrong: nothing is measured", file=sys.stderr)
        return 1
    # The allocator does not give the same peak twice, so medians are compared.
    runs = {case: [child(case, args) for _ in range(max(1, args.repeats))] for case in CASES}
    found = {case: {key: median(one[key] for one in several) for key in several[0]} for case, several in runs.items()}
    print(f"\n{'':<34}{'peak MB':>9}{'above plain':>13}{'maps MB':>9}{'seconds':>9}")
    for case, text in CASES.items():
        one = found[case]
        one["extra_mb"] = one["peak_mb"] - found["plain"]["peak_mb"]
        print(f"{text:<34}{one['peak_mb']:>9.0f}{one['extra_mb']:>13.0f}{one['maps_mb']:>9.0f}{one['seconds']:>9.1f}")
    full = 4 * (args.layers + 1) * args.positions * args.vocabulary / 1e6
    worst = max(found[case]["extra_mb"] for case in CASES)
    passed = worst <= LIMIT_MB
    print(
        f"\n[layers, batch, pos, d_vocab] in full would be {full:,.0f} MB; the limit is {LIMIT_MB} MB above plain: {'ok' if passed else 'TOO MUCH'}"
    )
    if args.json:
        result = {
            "shape": shape, "top_k": args.top_k, "threads": args.threads, "full_tensor_mb": full, "limit_mb": LIMIT_MB,
            "passed": passed, "answer": checked, "medians": found, "runs": runs, **machine(),
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


def child(case: str, args: argparse.Namespace, names: tuple[str, ...] = NAMES, **environment: str) -> dict[str, Any]:
    """One case of the benchmark that runs, in a fresh process, so that no allocator remembers another one."""
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    done = subprocess.run(
        [sys.executable, str(Path(sys.argv[0]).resolve()), f"--case={case}", *options],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads), **environment},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"the case {case!r} left with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def build(args: argparse.Namespace) -> Any:
    """A random GPT-2 of the asked size on whatever TransformerLens is installed; what loading prints goes to stderr."""
    import contextlib

    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=args.vocabulary, n_positions=args.positions, n_ctx=args.positions, n_embd=args.width,
        n_layer=args.layers, n_head=max(1, args.width // 64), bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config.architectures = ["GPT2LMHeadModel"]
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        hf_model = transformers.GPT2LMHeadModel(config).eval()
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError:  # TransformerLens 2.x
            model = _hooked(config, hf_model)
        else:
            model = TransformerBridge.boot_transformers(
                "random-gpt2", hf_model=hf_model, tokenizer=_tokenizer(), device="cpu", dtype=torch.float32
            ).eval()
    model.tokenizer = None  # its vocabulary is another one
    return model


def _tokenizer() -> Any:
    """Loading wants one; nothing here reads text."""
    import transformers

    from tl_lenses import lab

    return transformers.PreTrainedTokenizerFast.from_pretrained(lab.path())


def _hooked(config: Any, hf_model: Any) -> Any:
    import tempfile

    import torch
    import transformer_lens.loading_from_pretrained as loading
    from transformer_lens import HookedTransformer

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        settings = loading.get_pretrained_model_config(folder, fold_ln=False, device="cpu", dtype=torch.float32)
        state = loading.get_pretrained_state_dict(folder, settings, hf_model=hf_model, dtype=torch.float32)
        settings.tokenizer_name = None
        model = HookedTransformer(settings, _tokenizer(), move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


def tokens_of(args: argparse.Namespace) -> Any:
    import torch

    return torch.randint(0, args.vocabulary, (1, args.positions), generator=torch.Generator().manual_seed(1))


def random_translators(model: Any) -> Any:
    """Maps near the identity for every layer: as large as fitted ones."""
    import torch

    import tl_lenses as tll

    depth, d = int(model.cfg.n_layers), int(model.cfg.d_model)
    generator = torch.Generator().manual_seed(2)
    weights = torch.eye(d) + torch.randn(depth, d, d, generator=generator) * 0.1 / d**0.5
    rows = [(tll.site(model, layer), tll.site(model, -1)) for layer in range(depth)]
    return tll.Translators(rows, weights, torch.randn(depth, d, generator=generator), n_layers=depth)


def answer(args: argparse.Namespace) -> dict[str, Any]:
    """The last row is the model, and chunks change nothing (on the first 64 positions)."""
    import tl_lenses as tll

    model = build(args)
    lens = tll.Lens(model, random_translators(model))
    tokens = tokens_of(args)[:, :64]
    n = tokens.shape[1]
    whole = tll.trajectory(model, lens, tokens, top_k=args.top_k, chunk_size=n)
    chunked = tll.trajectory(model, lens, tokens, top_k=args.top_k, chunk_size=7)
    gap = max(
        float((whole.stats[name].double() - chunked.stats[name].double()).nan_to_num().abs().max())
        for name in ("kl", "entropy", "cross_entropy")
    )
    return {"last_row_kl": float(whole.kl[-1].abs().max()), "chunked": gap}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory while the case runs, its rise above what was there before, and its time."""
    import torch

    import tl_lenses as tll

    model = build(args)
    tokens = tokens_of(args)
    maps = random_translators(model) if args.case == "random" else None
    lens = tll.Lens(model, maps)
    maps_mb = 0.0 if maps is None else sum(p.numel() * p.element_size() for p in maps.parameters()) / 1e6
    with torch.no_grad():
        model(tokens[:, :8])  # what is allocated once: thread pools, lazy buffers
    trim()
    before = resident()
    reset_peak()
    start = time.perf_counter()
    with torch.no_grad():
        if args.case == "plain":
            out = model(tokens, return_type="logits")
        else:
            out = tll.trajectory(model, lens, tokens, top_k=args.top_k)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    del out
    return {
        "peak_mb": peak, "before_mb": before, "rise_mb": peak - before, "maps_mb": maps_mb, "seconds": seconds,
        "maxrss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,  # includes building the model
    }  # fmt: skip


def resident(field: str = "VmRSS") -> float:
    """Memory of this process in MB (10^6 bytes); `VmHWM` is the peak since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def trim() -> None:
    """Give back what building the model and the maps has left in the allocator, where libc can."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def reset_peak() -> None:
    """Start VmHWM again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import platform

    from tl_lenses.files import versions

    return {
        "versions": {**versions(), "python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg(), "processor": platform.machine()},
    }


if __name__ == "__main__":
    sys.exit(main())
