"""How long a first step should be, what a rate gives, and what a sample of the vocabulary costs in digits, on stored states.

    python benchmarks/first_step.py                                                        # lab-gpt2 and its text
    python benchmarks/first_step.py --model smollm2-135m --layers 0,6,15,24,28 --text valid.txt --held-out test.txt
    python benchmarks/first_step.py --only sample                                          # or lengths, rates

The states of the text are read once, the start is a regression on all of them. "lengths": each layer's loss on the next batch where the
first step is as long as a share of what the rate says. "rates": held-out KL after whole fits at multiples of the rate, gradients exact and
on a sample of the vocabulary, with processor seconds. "sample": estimate less exact loss, its deviation and the cosine of gradients over
seeds. Nothing passes or fails.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fit_quality import PER_STEP, SEQ_LEN

SHARES = (0.0, 0.03, 0.1, 0.3, 0.6, 1.0)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab-gpt2")
    parser.add_argument("--layers", default="0,2,4,6,7")
    parser.add_argument("--text", help="a file; the bundled text by default")
    parser.add_argument("--held-out", help="a file; the bundled held-out text by default")
    parser.add_argument("--tokens", type=int, default=20 * PER_STEP)
    parser.add_argument("--held-out-tokens", type=int, default=2 * PER_STEP)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rates", default="0.15,0.3,0.5,1")
    parser.add_argument("--only", choices=("lengths", "rates", "sample"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    states = States(args)
    print(f"{args.model}, layers {args.layers}; start, held out: {row(states.held_out(states.delta, states.biases))}")
    for name, table in (("lengths", lengths), ("rates", rates), ("sample", sample)):
        if args.only in (None, name):
            print(f"\n{name}")
            table(states, args)
    return 0


def row(values: Any) -> str:
    """Numbers of a row."""
    return "  ".join(f"{float(value):8.4f}" for value in values)


class States:
    """Residual states of a text and of held-out text, and the regression on the first that fits start from."""

    def __init__(self, args: argparse.Namespace):
        import torch

        import tl_lenses as tll
        from tl_lenses.fit.common import rows_for
        from tl_lenses.fit.regression import Evidence, maps_of
        from tl_lenses.fit.step import head_of
        from tl_lenses.fit.whiten import roots
        from tl_lenses.unembed import Readout

        torch.set_num_threads(args.threads)
        self.model = tll.load_model(args.model, device="cpu")
        self.rows, self.readout = (
            rows_for(self.model, [int(layer) for layer in args.layers.split(",")]),
            Readout(self.model),
        )
        self.head, self.moments = head_of(self.readout, "auto"), [None] * len(self.rows)
        self.train = self._read(args.text or tll.lab.text("train"), args.tokens, moments_too=True)
        self.held = self._read(args.held_out or tll.lab.text("heldout"), args.held_out_tokens)
        maps = maps_of(self.model, Evidence(tuple(self.rows), tuple(self.moments)))  # type: ignore[arg-type]
        self.delta, self.biases, self.white = maps.delta.data.float(), maps.biases.data.float(), roots(self.moments)  # type: ignore[arg-type]

    def _read(self, source: Any, n: int, *, moments_too: bool = False) -> list[Any]:
        import torch

        import tl_lenses as tll
        from tl_lenses.fit import common
        from tl_lenses.fit.step import Pairs
        from tl_lenses.moments import moments

        batches = tll.token_batches(
            source, self.model.tokenizer, seq_len=SEQ_LEN, batch_size=PER_STEP // SEQ_LEN, shuffle_seed=0, drop_last=True, limit_tokens=n
        )  # fmt: skip
        found = []
        for batch in batches:
            final: list[Any] = []
            with self.readout.without_logits(final, [(name, None) for pair in self.rows for name in pair]):
                names = [name for row in self.rows for name in row]
                _, seen, used, _ = common.states(self.model, batch, names, [], True)
            at = used.flatten().nonzero()[:, 0]
            states = [seen[source].flatten(0, 1)[at].float() for source, _ in self.rows]
            every = torch.arange(len(at))
            found.append(Pairs(states, every, final[0].flatten(0, 1)[at].float(), every, True))
            if moments_too:
                y = seen[self.rows[0][1]].flatten(0, 1)[at].double()
                new = [moments(x.double()[None], y[None]) for x in states]
                self.moments = [b if a is None else a + b for a, b in zip(self.moments, new, strict=True)]  # type: ignore[operator]
        return found

    def held_out(self, delta: Any, biases: Any) -> Any:
        """Mean loss of each layer."""
        from tl_lenses.fit.step import summed_losses

        return sum(summed_losses(pairs, delta, biases, self.head) for pairs in self.held) / sum(map(len, self.held))

    def learner(self, factor: float, *, sampled: bool = False) -> tuple[Any, float]:
        """A learner at the start after its first gradients, with the rate of a fit times `factor`."""
        from tl_lenses.fit.learner import Learner
        from tl_lenses.fit.optim import map_sizes, rate_scales, set_scales
        from tl_lenses.fit.settings import LR_POWER, Settings

        settings = Settings().at_width(self.delta.shape[-1])
        learner = Learner(self.delta.clone(), self.biases.clone(), settings, self.white)
        learner.samples = sampled
        self.gradients(learner, 0, exact=True)
        sizes = map_sizes(self.delta)
        scales = rate_scales(learner.losses.tolist(), LR_POWER["muon"], sizes)
        set_scales(learner.optimizers, [factor * scale for scale in scales], sizes, settings.weight_decay or 0.0)
        return learner, float(settings.lr or 0.0)

    def gradients(self, learner: Any, step: int, *, exact: bool = False) -> None:
        """Those of a step, ready for the optimisers."""
        learner.clear()
        learner.add(self.train[step % len(self.train)], self.head, seed=step, exact=exact)
        learner.average()
        learner.prepare_gradients()


def lengths(states: States, args: argparse.Namespace) -> None:
    """Loss on the second batch at shares of the first step."""
    from tl_lenses.fit.step import summed_losses

    learner, rate = states.learner(1.0)
    learner.hand_over()
    learner.update(rate)
    step = learner.delta - states.delta, learner.biases - states.biases
    for share in SHARES:
        maps = states.delta + share * step[0], states.biases + share * step[1]
        print(f"{share:5}  {row(summed_losses(states.train[1], *maps, states.head) / len(states.train[1]))}", flush=True)


def rates(states: States, args: argparse.Namespace) -> None:
    """Held-out KL after whole fits."""
    for factor in map(float, args.rates.split(",")):
        for sampled in (True, False):
            began = time.process_time()
            learner, rate = states.learner(factor, sampled=sampled)
            for step in range(args.steps):
                if step:
                    states.gradients(learner, step)
                learner.hand_over()
                learner.update(rate * (1 - step / args.steps))
            seconds = time.process_time() - began
            losses = states.held_out(learner.delta, learner.biases)
            print(f"{factor:5}  {'sampled' if sampled else 'exact':7}  {row(losses)}  {seconds:7.1f} s", flush=True)


def sample(states: States, args: argparse.Namespace) -> None:
    """Of one batch from the start: bias, deviation over seeds and cosine of gradients, by number of draws."""
    import torch

    from tl_lenses.fit import sampled
    from tl_lenses.fit.step import loss_and_gradient

    pairs = states.train[1]

    def answer(seed: int | None) -> tuple[Any, Any, float, int]:
        gradient, began = [torch.zeros_like(states.delta), torch.zeros_like(states.biases)], time.process_time()
        some, head = (pairs, states.head) if seed is None else sampled.on_sample(pairs, states.head, seed)
        losses = loss_and_gradient(some, states.delta, states.biases, head, *gradient, exact=True)
        return losses / len(pairs), gradient[0].flatten(1), time.process_time() - began, head.w_u.shape[1]

    exact, true, seconds, _ = answer(None)
    print(f"exact           {row(exact)}  {seconds:7.1f} s", flush=True)
    for draws in (512, 1024, 2048):
        sampled.DRAWS = draws
        answers = [answer(seed) for seed in range(3)]
        apart = torch.stack([losses - exact for losses, *_ in answers])
        cosine = torch.stack([torch.cosine_similarity(gradient, true) for _, gradient, *_ in answers])
        seconds = sum(s for _, _, s, _ in answers) / len(answers)
        for name, values in (("bias", apart.mean(0)), ("deviation", apart.std(0)), ("cosine", cosine.mean(0))):
            print(f"{draws:5} {name:9} {row(values)}  {seconds:7.1f} s, {answers[0][-1]:,} tokens", flush=True)


if __name__ == "__main__":
    sys.exit(main())
