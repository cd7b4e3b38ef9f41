"""What the papers claim, how each claim is read from the numbers of a step, and what counts as agreement."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import mean, median
from typing import Any

Numbers = dict[str, Any]
TUNED_LENS, PATCHSCOPES = "Tuned Lens", "Patchscopes"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        paper, where: the paper, and the section and figure or table.
        says: the claim, with the published number or shape.
        step: whose numbers it is read from.
        measure: the number, and the words that show it.
        agrees: whether a number agrees.
        rule: the same in words.
    """

    paper: str
    where: str
    says: str
    step: str
    measure: Callable[[Numbers], tuple[float, str]]
    agrees: Callable[[float], bool]
    rule: str


# --- how numbers are read


def share(flags: Sequence[bool], what: str = "layers") -> tuple[float, str]:
    """How many of them hold.

    >>> share([True, False])
    (0.5, '1 of 2 layers')
    """
    return sum(flags) / len(flags), f"{sum(flags)} of {len(flags)} {what}"


def part(values: Sequence[float], start: float, end: float) -> Sequence[float]:
    """The values from one share of the depth to another."""
    n = len(values)
    return values[round(start * n) : max(round(end * n), round(start * n) + 1)]


def below(a: Sequence[float], b: Sequence[float]) -> list[bool]:
    """Where a is below b."""
    return [x < y for x, y in zip(a, b, strict=True)]


def percent(x: float) -> str:
    """A share as text."""
    return f"{100 * x:.0f} %"


def _bias(x: Numbers, lens: str) -> float:
    """The median of layers; a bias that is not finite was kept as None (all of p falls on tokens that the lens never says)."""
    return median(inf if bias is None else bias for bias in x["bias_bits"][lens])


def _bias_logit(x: Numbers) -> tuple[float, str]:
    value, endless = _bias(x, "logit"), x["bias_bits"]["logit"].count(None)
    return value, f"{value:.1f} bits (median of layers{f'; infinite in {endless}' if endless else ''})"


def _bias_tuned(x: Numbers) -> tuple[float, str]:
    tuned, logit = _bias(x, "tuned"), _bias(x, "logit")
    return tuned / logit, f"{tuned:.2f} bits, {percent(tuned / logit)} of the logit lens'"


def _input_token(x: Numbers) -> tuple[float, str]:
    return share([same > 0.5 for same in x["same"]["logit"]])


def _bits_per_byte(x: Numbers) -> tuple[float, str]:
    value, text = share(below(x["bits_per_byte"]["tuned"], x["bits_per_byte"]["logit"]))
    return value, f"{text}; mean {mean(x['bits_per_byte']['tuned']):.2f} and {mean(x['bits_per_byte']['logit']):.2f}"


def _over_regression(x: Numbers) -> tuple[float, str]:
    value, text = share(below(x["kl"]["tuned"], x["kl"]["regression"]))
    return value, f"{text}; mean KL {mean(x['kl']['tuned']):.2f} and {mean(x['kl']['regression']):.2f}"


def _neighbours(x: Numbers) -> tuple[float, str]:
    return x["near"] / x["far"], f"{x['near']:.2f} nats, {x['far']:.2f} at half the depth or further"


def _covariance(x: Numbers) -> tuple[float, str]:
    return x["spearman"], f"{x['spearman']:.2f} (by chance: {x['chance']:.3f})"


def _asymmetry(x: Numbers) -> tuple[float, str]:
    if x["forth"] is None or x["back"] is None:
        return float("nan"), "all layers are of one kind"
    return x["forth"] - x["back"], f"{x['forth']:.2f} nats, {x['back']:.2f} the other way"


def _fine_tune(x: Numbers) -> tuple[float, str]:
    worst = max(x["cost_kl"])
    return worst, f"at most {worst:.3f} bits per byte"


def _fidelity_last(x: Numbers) -> tuple[float, str]:
    return x["spearman"][-1], f"{x['spearman'][-1]:.2f} in layer {x['layers'][-1]}; by layer " + ", ".join(f"{s:.2f}" for s in x["spearman"])  # fmt: skip


def _fidelity_rises(x: Numbers) -> tuple[float, str]:
    rise = x["spearman"][-1] - x["spearman"][0]
    return rise, f"{x['spearman'][0]:.2f} in layer {x['layers'][0]}, {x['spearman'][-1]:.2f} in layer {x['layers'][-1]}"


def _no_feature(x: Numbers) -> tuple[float, str]:
    least = min(min(effects) for effects in x["model"])
    return least, f"the least of {x['k']} directions a layer: {least:.4f} bits"


def _alignment_tuned(x: Numbers) -> tuple[float, str]:
    value, text = share(below(x["similarity"]["logit"], x["similarity"]["tuned"]))
    shown = ", ".join(f"{t:.2f} ({g:.2f})" for t, g in zip(x["similarity"]["tuned"], x["similarity"]["logit"], strict=True))
    return value, f"{text}: {shown}"


def _alignment_rises(x: Numbers) -> tuple[float, str]:
    tuned = x["similarity"]["tuned"]
    return tuned[-1] - tuned[0], f"{tuned[0]:.2f} in layer {x['layers'][0]}, {tuned[-1]:.2f} in layer {x['layers'][-1]}"


def _auroc(x: Numbers, task: int, method: str, attack: str = "ignore") -> float:
    return x["auroc"][task][x["methods"].index(method)][x["attacks"].index(attack)]


def _detected(x: Numbers) -> tuple[float, str]:
    lof, forest = _auroc(x, 0, "tuned, LOF"), _auroc(x, 0, "tuned, iForest")
    return max(lof, forest), f"LOF {lof:.2f}, iForest {forest:.2f} ({x['tasks'][0].replace('_', ' ')})"


def _detected_differing(x: Numbers) -> tuple[float, str]:
    lof, forest = _auroc(x, 1, "tuned, LOF"), _auroc(x, 1, "tuned, iForest")
    return max(lof, forest), f"LOF {lof:.2f}, iForest {forest:.2f} ({x['tasks'][1].replace('_', ' ')})"


def _detected_tuned(x: Numbers) -> tuple[float, str]:
    pairs = [
        (_auroc(x, task, f"tuned, {how}"), _auroc(x, task, f"logit, {how}"))
        for task in range(len(x["tasks"]))
        for how in ("LOF", "iForest")
    ]
    gap = mean(a - b for a, b in pairs)
    return gap, f"{gap:+.2f} (" + ", ".join(f"{a:.2f}/{b:.2f}" for a, b in pairs) + ")"


def _detected_harmless(x: Numbers) -> tuple[float, str]:
    ignore, harmless = (_auroc(x, 0, "tuned, LOF", attack) for attack in ("ignore", "harmless"))
    return ignore - harmless, f"{ignore:.2f}, a harmless sentence {harmless:.2f}"


def _obeyed(x: Numbers) -> tuple[float, str]:
    normal, ignore = (mean(row[i] for row in x["accuracy"]) for i in (0, 1))
    return ignore / normal, f"{percent(normal)} to {percent(ignore)}"


def _difficulty(x: Numbers) -> tuple[float, str]:
    fitted = x["spearman"]["regression"]
    return fitted, f"{fitted:.2f} (lab-neox, {x['n']} tokens)"


def _difficulty_logit(x: Numbers) -> tuple[float, str]:
    gap = x["spearman"]["regression"] - x["spearman"]["logit"]
    return gap, f"{x['spearman']['regression']:.2f} and {x['spearman']['logit']:.2f}"


def _gradients(x: Numbers) -> tuple[float, str]:
    least = min(x["negative"])
    text = f"{percent(mean(x['negative']))} of sequences, {percent(least)} at the least layer"
    return least, f"{text}; mean cosine {mean(x['cosine']):.4f}"


def _deleted(x: Numbers) -> tuple[float, str]:
    rise = x["rise"]["order, delete"]
    first, others = rise[0], median(rise[1:])
    return others / first, f"the first {first:.2f} nats, the others {others:.2f} (median), at most {max(rise[1:]):.2f}"


def _weights(x: Numbers) -> tuple[float, str]:
    kinds = [kind for kind in x["kinds"] if kind != "random vectors"]
    over = {lens: [c[kind] - c["random vectors"] for kind in kinds] for lens, c in x["coherence"].items()}
    value, text = share(below(over["logit"], over["tuned"]), "kinds")
    return value, f"{text}; over random {mean(over['tuned']):+.3f} and {mean(over['logit']):+.3f}"


def _identity(x: Numbers) -> tuple[float, str]:
    ours, logit = (part(x["precision"][name], 0.25, 1) for name in ("token identity", "logit lens"))
    value, text = share(below(logit, ours))
    return value, f"{text} from a quarter of the depth on"


def _identity_middle(x: Numbers) -> tuple[float, str]:
    i = round(18 / 40 * len(x["layers"]))
    ours, logit = x["precision"]["token identity"][i], x["precision"]["logit lens"][i]
    return ours - logit, f"{ours:.2f} and {logit:.2f} in layer {x['layers'][i]}"


def _identity_regression(x: Numbers) -> tuple[float, str]:
    ours, fitted = (part(x["precision"][name], 0.25, 1) for name in ("token identity", "regression"))
    value, text = share(below(fitted, ours))
    return value, f"{text}; mean {mean(ours):.2f} and {mean(fitted):.2f}"


def _identity_surprisal(x: Numbers) -> tuple[float, str]:
    ours, logit = (part(x["surprisal"][name], 0.25, 1) for name in ("token identity", "logit lens"))
    value, text = share(below(ours, logit))
    return value, f"{text}; mean {mean(ours):.1f} and {mean(logit):.1f} nats"


def _identity_control(x: Numbers) -> tuple[float, str]:
    ours, shuffled = x["cells"]["token identity"]["held_out"], x["cells"]["shuffled sources"]["oracle"]
    return ours - shuffled, f"held-out layer {percent(ours)}, shuffled sources at best {percent(shuffled)}"


def _attributes_probe(x: Numbers) -> tuple[float, str]:
    pairs = [(mean(r["patched"]), mean(r["probe"])) for r in x["relations"].values() if r["probe"]]
    value, text = share([a > b for a, b in pairs], "relations")
    return value, f"{text}; mean {percent(mean(a for a, _ in pairs))} and {percent(mean(b for _, b in pairs))}"


def _attributes_early(x: Numbers) -> tuple[float, str]:
    patched = x["profile"]["patched"]
    early, late = mean(part(patched, 0, 0.5)), patched[-1]
    best = x["layers"][max(range(len(patched)), key=lambda i: patched[i])]
    return early - late, f"first half {percent(early)}, last layer {percent(late)}; best is {best}"


def _attributes_control(x: Numbers) -> tuple[float, str]:
    ours, control = x["cells"]["patched"]["held_out"], x["cells"]["shuffled sources"]["held_out"]
    return ours - control, f"held-out cell {percent(ours)}, shuffled {percent(control)}; any cell {percent(x['cells']['patched']['oracle'])}"  # fmt: skip


def _entities_early(x: Numbers) -> tuple[float, str]:
    patched, depth = x["profile"]["patched"], x["layers"][-1] + 1
    at = max(range(len(patched)), key=lambda i: patched[i])
    return x["layers"][at] / depth, f"best is layer {x['layers'][at]}: {patched[at]:.2f}; last {patched[-1]:.2f}"


def _entities_control(x: Numbers) -> tuple[float, str]:
    ours, control = x["cells"]["patched"]["held_out"], x["cells"]["shuffled sources"]["held_out"]
    return ours - control, f"held-out layer {ours:.2f}, another entity's vector {control:.2f}"


def _hops_patched(x: Numbers) -> tuple[float, str]:
    plain = x["plain"]["two hops at once"]
    best = max(form["patched"]["oracle"] for form in x["forms"].values())
    return (
        best - plain,
        f"{percent(plain)} plain, {percent(x['plain']['step by step'])} step by step, any cell {percent(best)}",
    )


def _hops_held_out(x: Numbers) -> tuple[float, str]:
    form = max(x["forms"], key=lambda name: x["forms"][name]["patched"]["held_out"])
    cells, plain = x["forms"][form], x["plain"]["two hops at once"]
    ours, control = cells["patched"]["held_out"], cells["shuffled sources"]["held_out"]
    return ours - max(plain, control), f"{form}: held-out cell {percent(ours)}, shuffled {percent(control)}, plain {percent(plain)}"  # fmt: skip


def _cross(x: Numbers) -> tuple[float, str]:
    best, cell = x["cells"]["patched"]["best"], x["cells"]["patched"]["cell"]
    return best, f"{percent(best)} in the best cell ({cell[0]}, {cell[1]}), held-out {percent(x['cells']['patched']['held_out'])}"  # fmt: skip


def _cross_control(x: Numbers) -> tuple[float, str]:
    ours, natural = x["cells"]["patched"]["held_out"], x["cells"]["unpatched"]["oracle"]
    return ours - natural, f"held-out cell {percent(ours)}, unpatched {percent(natural)}"


def _cross_early(x: Numbers) -> tuple[float, str]:
    early, late = x["early"], x["late"]
    return early - late, f"first target layers {percent(early)}, last {percent(late)}"


# fmt: off
CLAIMS = (
    Claim(TUNED_LENS, "§3, Fig. 3", "The logit lens is biased: 4 to 5 bits in most layers (GPT-Neo-2.7B).", "quality",
          _bias_logit, lambda x: x >= 1, "1 bit or more"),
    Claim(TUNED_LENS, "§3, Fig. 3", "The tuned lens is not: near 0 bits.", "quality",
          _bias_tuned, lambda x: x <= 0.1, "a tenth of the logit lens' or less"),
    Claim(TUNED_LENS, "§2, Fig. 4, 17", "In some families (BLOOM, OPT-125M, GPT-Neo) the logit lens' top token is the input token in over half of the layers.",
          "input-token", _input_token, lambda x: x > 0.5, "over half of the layers have it for over half of the positions"),
    Claim(TUNED_LENS, "§3, Fig. 5, 14", "In bits per byte the tuned lens is below the logit lens at every layer and size.", "quality",
          _bits_per_byte, lambda x: x == 1, "every layer"),
    Claim(TUNED_LENS, "not compared", "(Ours.) The tuned lens is below the regression lens in KL.", "quality",
          _over_regression, lambda x: x == 1, "every layer"),
    Claim(TUNED_LENS, "§3.3, Fig. 6", "Transfer between neighbouring layers costs little.", "transfer",
          _neighbours, lambda x: x <= 0.5, "half of the penalty of far layers or less"),
    Claim(TUNED_LENS, "§3.3, Fig. 7", "Penalty and covariance similarity: Spearman −0.78.", "transfer",
          _covariance, lambda x: x <= -0.5, "−0.5 or below"),
    Claim(TUNED_LENS, "§3.3", "Translators of layers with outlier dimensions do worse on layers without than the other way round.", "transfer",
          _asymmetry, lambda x: x > 0, "a larger penalty that way"),
    Claim(TUNED_LENS, "§3.4, Fig. 13", "A base's lens on its fine-tune costs at most 0.3 bits per byte of KL (LLaMA-13B, Vicuna-13B).", "fine-tune",
          _fine_tune, lambda x: x <= 0.3, "0.3 or less"),
    Claim(TUNED_LENS, "§4.1, Fig. 8, 20", "Directions matter to the lens and to the model alike: rank correlation 0.98 in the last layer, 0.89 in layer 18 of 24 (Pythia-410M).",
          "causal-basis", _fidelity_last, lambda x: x >= 0.8, "0.8 or more in the last layer measured"),
    Claim(TUNED_LENS, "§4.1, Fig. 20", "That correlation rises with depth: 0.25 at the embedding, 0.98 at the end.", "causal-basis",
          _fidelity_rises, lambda x: x > 0, "the last layer measured above the first"),
    Claim(TUNED_LENS, "§4.1, Fig. 8", "No direction matters to the lens and not to the model: 0.002 bits at least.", "causal-basis",
          _no_feature, lambda x: x >= 0.002, "0.002 bits or more on the model"),
    Claim(TUNED_LENS, "§4.2, Fig. 9", "The tuned lens responds to interventions more like the model than the logit lens, at every layer (Pythia-160M).",
          "alignment", _alignment_tuned, lambda x: x == 1, "every layer; in brackets the logit lens"),
    Claim(TUNED_LENS, "§4.2, Fig. 9", "That similarity rises with depth.", "alignment",
          _alignment_rises, lambda x: x > 0, "the last layer measured above the first"),
    Claim(TUNED_LENS, "§5.2, Tab. 1", "Injected prompts are told by their trajectory: AUROC .98 to 1.00 where all questions have the same answers (Pythia-12B).",
          "detection", _detected, lambda x: x >= 0.95, "the better detector .95 or more"),
    Claim(TUNED_LENS, "§5.2, Tab. 1", "AUROC .59 to .81 where answers differ by question (ARC, SciQ).", "detection",
          _detected_differing, lambda x: 0.55 <= x, "the better detector .55 or more"),
    Claim(TUNED_LENS, "§5.2, Tab. 1", "The tuned lens' trajectory tells them better than the logit lens' on most tasks.", "detection",
          _detected_tuned, lambda x: x > 0.02, "more than .02 higher in the mean (tuned/logit: LOF, iForest by task)"),
    Claim(TUNED_LENS, "no control", "(Ours.) What is told is the instruction, not that something was inserted.", "detection",
          _detected_harmless, lambda x: x > 0.1, "an attack is told better than a harmless sentence, by .1"),
    Claim(TUNED_LENS, "§5.2, Tab. 1", "Injections are obeyed: accuracy falls, on four of nine tasks to 0 %.", "detection",
          _obeyed, lambda x: x < 0.8, "by a fifth or more"),
    Claim(TUNED_LENS, "§5.3, Tab. 2", "Prediction depth goes with the iteration learned: .16 to .66, positive on 11 of 11 tasks.", "difficulty",
          _difficulty, lambda x: x > 0.1, "above .1"),
    Claim(TUNED_LENS, "§5.3, Tab. 2", "More so than with the logit lens, on 8 of 11 tasks.", "difficulty",
          _difficulty_logit, lambda x: x > 0, "higher (a regression lens here)"),
    Claim(TUNED_LENS, "App. C, Fig. 19", "Blocks go down the gradient of the loss: negative cosine at least 95 % of the time at every layer (Pythia-6.9B).",
          "gradients", _gradients, lambda x: x >= 0.95, "95 % of sequences at every layer"),
    Claim(TUNED_LENS, "App. C", "Deleting one block hardly hurts, but for the first.", "ablations",
          _deleted, lambda x: x <= 0.2, "the median of the others a fifth of the first or less"),
    Claim(TUNED_LENS, "App., Tab. 3", "What weights write and read is more coherent through the tuned lens (Pythia-125M).", "weights",
          _weights, lambda x: x > 0.5, "over half of the kinds of vectors, over random ones"),
    Claim(PATCHSCOPES, "§4.1, Fig. 2", "Token identity reads the next token better than the logit lens from about layer 10 of 40 on.", "next-token",
          _identity, lambda x: x == 1, "every layer from a quarter of the depth on"),
    Claim(PATCHSCOPES, "§4.1, Fig. 2", "P@1 in layer 18 of 40: .65 to .66, the logit lens .12 to .17 (LLaMA2-13B, Vicuna-13B).", "next-token",
          _identity_middle, lambda x: x >= 0.1, ".1 or more above the logit lens at the same share of the depth"),
    Claim(PATCHSCOPES, "§4.1, Fig. 2", "Token identity is above a fitted affine map as well.", "next-token",
          _identity_regression, lambda x: x == 1, "every layer from a quarter of the depth on; ours is fitted before the norm, a stronger rival"),
    Claim(PATCHSCOPES, "§4.1, Fig. 2", "Its surprisal is lower than the logit lens'.", "next-token",
          _identity_surprisal, lambda x: x == 1, "every layer from a quarter of the depth on"),
    Claim(PATCHSCOPES, "no control", "(Ours.) It is the vector that is read, not the prompt.", "next-token",
          _identity_control, lambda x: x > 0.2, "held-out layer over .2 above the best of shuffled sources"),
    Claim(PATCHSCOPES, "§4.2, Tab. 2", "Attributes are read better than by a probe: in 9 of the 12 relations.", "attributes",
          _attributes_probe, lambda x: x > 0.5, "over half of the relations that the model knows; any l*, mean over l, as in the paper"),
    Claim(PATCHSCOPES, "§4.2, Fig. 6, 7", "Best from early and middle source layers, worse from late ones.", "attributes",
          _attributes_early, lambda x: x > 0.1, "the first half .1 above the last source layer"),
    Claim(PATCHSCOPES, "no control", "(Ours.) One cell that was chosen on other facts beats another subject's vector.", "attributes",
          _attributes_control, lambda x: x > 0.1, "by .1"),
    Claim(PATCHSCOPES, "§4.3, Fig. 3", "Descriptions of an entity are best in the first layers (layer 2 of 40: ROUGE-L .37), then decay.", "entities",
          _entities_early, lambda x: x <= 0.35, "the best layer in the first third"),
    Claim(PATCHSCOPES, "no control", "(Ours.) A description fits its entity better than another one.", "entities",
          _entities_control, lambda x: x > 0.05, "held-out layer .05 above shuffled sources"),
    Claim(PATCHSCOPES, "§4.4, Fig. 10", "Another model goes on from a mapped state: P@1 up to .7 (Vicuna) and .8 (Pythia).", "cross-model",
          _cross, lambda x: x >= 0.6, ".6 or more in the best cell"),
    Claim(PATCHSCOPES, "§4.4, Fig. 10", "Best for early target layers.", "cross-model",
          _cross_early, lambda x: x > 0, "first above last, mean over source layers"),
    Claim(PATCHSCOPES, "no control", "(Ours.) The patch adds to how often the two models agree anyway.", "cross-model",
          _cross_control, lambda x: x > 0, "held-out cell above unpatched"),
    Claim(PATCHSCOPES, "§5, Fig. 12", "A patch mends two hops: 19.6 % plain, 35.7 % step by step, 50 % with any of 1,600 cells (Vicuna-13B).", "multihop",
          _hops_patched, lambda x: x >= 0.1, "any cell .1 above plain"),
    Claim(PATCHSCOPES, "no control", "(Ours.) So does one cell that was chosen on other queries.", "multihop",
          _hops_held_out, lambda x: x >= 0.1, ".1 above plain and above shuffled sources"),
)
# fmt: on
