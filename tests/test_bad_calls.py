"""Every public function, with every wrong kind of value for each of its arguments: what it raises is the library's own.

An error is our own if it is of a kind that says "the caller's mistake" and if a `raise` in this package made it: not an
AttributeError somewhere inside, and nothing out of torch. A value that happens to be taken is fine here. A new public function has to
be put into `CALLS`: `test_every_public_function_is_called` sees to that.
"""

import ast
import contextlib
import functools
import inspect
import math
import signal
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo

import tl_lenses as tll
from tl_lenses import files
from tl_lenses.experiments.choices import Question
from tl_lenses.experiments.injections import Task
from tl_lenses.fit.plan import plan
from tl_lenses.fit.settings import Settings
from tl_lenses.text.batches import as_batches

PACKAGE = Path(tll.__file__).resolve().parent
OURS = (ValueError, TypeError, KeyError, FileNotFoundError, FileExistsError, IsADirectoryError, ImportError)

WRONG = {
    "None": None, "True": True, "-1": -1, "0": 0, "1.5": 1.5, "nan": math.nan, "text": "nonsense", "bytes": b"x",
    "empty list": [], "list of None": [None], "mapping": {"x": 1}, "object": object(), "array": np.zeros((2, 3)),
    "whole tensor": torch.full((2, 3), -7),
}  # fmt: skip
SECONDS = 20  # a call that takes longer hangs

TOKENS = torch.arange(4, 4 + 96).reshape(8, 12)
PROMPT = "the cat sat on the mat"


@functools.cache
def model():
    return zoo.build("gpt2", zoo.FEW_KINDS[0])


@functools.cache
def maps():
    return tll.fit_regression(model(), TOKENS)


@functools.cache
def lab():
    return tll.lab.load("lab-gpt2")


@functools.cache
def lens():
    return tll.Lens(model())


@functools.cache
def traj():
    return tll.trajectory(model(), {"a": lens(), "b": tll.Lens(model(), maps())}, TOKENS)


@functools.cache
def scores():
    return tll.evaluate(model(), {"a": lens()}, TOKENS)


@functools.cache
def result():
    return tll.patchscope(model(), tll.Source(PROMPT), max_new_tokens=1)


@functools.cache
def two_texts():
    return tll.patchscope(model(), ["the cat", "a dog"], tll.Target("the cat x", tll.at("x")), layers=[1])


def moments():
    from tl_lenses.moments import moments

    return moments(torch.randn(1, 20, 3), torch.randn(1, 20, 3))


@functools.cache
def report():
    return tll.check(model())


@functools.cache
def quality():
    return tll.experiments.quality(model(), {"a": lens()}, TOKENS, layers=[1])


def two_lenses():
    return {"a": lens(), "b": tll.Lens(model(), maps())}


def facts():
    pairs = (("cat", "mat"), ("dog", "cat"), ("mat", "dog"))
    return [tll.experiments.Fact("r", subject, answer, "the {} of", phrase="the pet of {}") for subject, answer in pairs]


def task():
    words = ("cat", "dog", "mat", "king", "man", "bird", "tree", "sun")
    ask = lambda verb: tuple(Question(f"the {word} {verb}", (" dog", " king"), 0, "one", i) for i, word in enumerate(words))
    return Task("t", ask("sat"), {"ignore": ask("ran")})


# function -> the arguments of a call that works
CALLS = {
    "Lens": lambda: (tll.Lens, dict(model=model(), translators=maps(), check="strict")),
    "Translators": lambda: (
        tll.Translators, dict(rows=[(0, 3)], weights=torch.eye(4)[None], biases=torch.zeros(1, 4), n_layers=3, meta={}),
    ),
    "Translators.load": lambda: (tll.Translators.load, dict(path_or_hub_id="nowhere", device="cpu")),
    "Translators.load of other packages": lambda: (
        tll.Translators.load, dict(path_or_hub_id="nowhere", n_layers=3, target_layer=3, source_layer=0, filename=None, revision=None, token=None),
    ),
    "Translators.export": lambda: (maps().export, dict(kind="tuned-lens", path="out", overwrite=True)),
    "Lens.read": lambda: (lens().read, dict(direction=torch.zeros(32), layer=0)),
    "Translators.save": lambda: (maps().save, dict(path="lens", overwrite=True)),
    "Translators.select": lambda: (maps().select, dict(layers=[0])),
    "Translators.__getitem__": lambda: (maps().__getitem__, dict(key=0)),
    "Affine": lambda: (tll.Affine, dict(weight=torch.eye(3), bias=torch.zeros(3))),
    "Moments": lambda: (tll.Moments, vars(moments())),
    "capture": lambda: (tll.capture, dict(model=model(), tokens=TOKENS, layers=[1], to="states", shard=(0, 2))),
    "fit_jacobian": lambda: (tll.fit_jacobian, dict(model=model(), tokens=TOKENS, skip_first=1)),
    "fit_regression": lambda: (tll.fit_regression, dict(model=model(), tokens=TOKENS)),
    "fit_scope": lambda: (tll.fit_scope, dict(model=model(), source=TOKENS, target=tll.Target(PROMPT), steps=2, pairs=[(1, 1)], vectors_per_step=2, held_out=1)),
    "fit_tuned": lambda: (tll.fit_tuned, dict(model=model(), tokens=TOKENS, steps=1, init="identity")),
    "token_batches": lambda: (
        tll.token_batches, dict(source=[PROMPT * 9] * 3, tokenizer=model().tokenizer, seq_len=8, batch_size=2),
    ),
    "trajectory": lambda: (tll.trajectory, dict(model=model(), lens=lens(), tokens=TOKENS)),
    "marginals": lambda: (tll.marginals, dict(model=model(), lens=lens(), tokens=TOKENS)),
    "Trajectory.delta": lambda: (traj()["a"].delta, dict(stat="kl")),
    "Trajectory.figure": lambda: (traj()["a"].figure, dict(stat="kl")),
    "Trajectory.save": lambda: (traj()["a"].save, dict(path="a.svg", stat="kl")),
    "Trajectories.divergence": lambda: (traj().divergence, dict(a="a", b="b", kind="kl")),
    "evaluate": lambda: (tll.evaluate, dict(model=model(), lens=lens(), tokens=TOKENS)),
    "Scores.value": lambda: (scores().value, dict(lens="a", layer=0, name="kl")),
    "Scores.figure": lambda: (scores().figure, dict(value="kl")),
    "compare": lambda: (tll.compare, dict(model=model(), lenses=lens(), tokens=TOKENS, layers=[1])),
    "components": lambda: (tll.components, dict(model=model(), lens=lens(), tokens=PROMPT, layer=2, targets=5, heads=False)),
    "detached": lambda: (tll.detached, dict(model=model(), tokens=PROMPT, target=5, pos=-1, layers=[0])),
    "Shares": lambda: (tll.Shares, vars(tll.detached(model(), PROMPT))),
    "check": lambda: (tll.check, dict(model=model(), prompt=PROMPT, seed=0)),
    "read": lambda: (tll.read, dict(site=0, into={})),
    "patch": lambda: (tll.patch, dict(site=0, edit=tll.edits.zero)),
    "run": lambda: (tll.run, dict(model=model(), tokens=TOKENS)),
    "generate": lambda: (tll.generate, dict(model=model(), tokens=TOKENS, max_new_tokens=1)),
    "site": lambda: (tll.site, dict(model=model(), layer_or_site=0)),
    "positions": lambda: (tll.positions, dict(model=model(), tokens=TOKENS, pos=0)),
    "at": lambda: (tll.at, dict(text="cat")),
    "patchscope": lambda: (tll.patchscope, dict(model=model(), source=tll.Source(PROMPT), layers=[1], n_samples=1)),
    "Source": lambda: (tll.Source, dict(prompt=PROMPT, pos=-1)),
    "Target": lambda: (tll.Target, dict(prompt=PROMPT, pos=-1)),
    "PatchscopeResult.top_k": lambda: (result().top_k, dict(k=2)),
    "PatchscopeResult.probability": lambda: (result().probability, dict(token=5)),
    "PatchscopeResult.rank": lambda: (result().rank, dict(token=5)),
    "PatchscopeResult.figure": lambda: (result().figure, dict(source=0)),
    "PatchscopeResult.save": lambda: (result().save, dict(path="a.json")),
    "edits.replace": lambda: (tll.edits.replace, dict(value=torch.zeros(3))),
    "edits.add": lambda: (tll.edits.add, dict(value=torch.zeros(3), scale=1.0)),
    "edits.scale": lambda: (tll.edits.scale, dict(factor=1.0)),
    "edits.mean": lambda: (tll.edits.mean, dict(value=None, over="batch")),
    "edits.resample": lambda: (tll.edits.resample, dict(seed=0, source=None)),
    "edits.noise": lambda: (tll.edits.noise, dict(std=1.0, seed=0)),
    "edits.interpolate": lambda: (tll.edits.interpolate, dict(value=torch.zeros(3), alpha=0.5)),
    "edits.project": lambda: (tll.edits.project, dict(directions=torch.eye(3)[:1])),
    "edits.where": lambda: (tll.edits.where, dict(mask=torch.tensor([True]), edit=tll.edits.zero)),
    "edits.norm_match": lambda: (tll.edits.norm_match, dict(edit=tll.edits.zero)),
    "edits.affine": lambda: (tll.edits.affine, dict(map=tll.Affine(torch.eye(3), torch.zeros(3)))),
    "solve.ridge": lambda: (tll.solve.ridge, dict(m=moments())),
    "solve.ridge_path": lambda: (tll.solve.ridge_path, dict(m=moments(), strengths=[0.1])),
    "solve.procrustes": lambda: (tll.solve.procrustes, dict(m=moments())),
    "solve.shift": lambda: (tll.solve.shift, dict(m=moments())),
    "solve.r_squared": lambda: (
        tll.solve.r_squared, dict(m=moments(), weight=torch.eye(3)[None], bias=torch.zeros(1, 3)),
    ),
    "scopes.token_identity": lambda: (tll.scopes.token_identity, {}),
    "scopes.next_token": lambda: (tll.scopes.next_token, {}),
    "scopes.entity_description": lambda: (tll.scopes.entity_description, {}),
    "scopes.reverse_dictionary": lambda: (tll.scopes.reverse_dictionary, {}),
    "scopes.attribute": lambda: (tll.scopes.attribute, dict(relation="country_capital_city")),
    "Target.chat": lambda: (tll.Target.chat, dict(messages=[{"role": "user", "content": "a x"}], marker="x")),
    "scopes.activation_oracle": lambda: (tll.scopes.activation_oracle, dict(question="who?", layer=2)),
    "scopes.latent_qa": lambda: (tll.scopes.latent_qa, dict(question="who?", n_vectors=2)),
    "scopes.nla": lambda: (tll.scopes.nla, dict(meta={})),
    "scopes.repeat": lambda: (tll.scopes.repeat, {}),
    "scopes.selfie": lambda: (tll.scopes.selfie, {}),
    "scopes.future_lens": lambda: (tll.scopes.future_lens, {}),
    "methods.logit_lens": lambda: (tll.methods.logit_lens, dict(model=model(), tokens=TOKENS, layer=1)),
    "methods.tuned_lens": lambda: (
        tll.methods.tuned_lens, dict(model=model(), tokens=TOKENS, translators=maps(), layer=1),
    ),
    "methods.activation_patching": lambda: (
        tll.methods.activation_patching, dict(model=model(), clean=TOKENS, corrupted=TOKENS, layers=[1]),
    ),
    "methods.causal_tracing": lambda: (tll.methods.causal_tracing, dict(model=model(), prompt=PROMPT, subject="cat")),
    "methods.attention_knockout": lambda: (
        tll.methods.attention_knockout, dict(model=model(), tokens=TOKENS, queries=-1, keys=1),
    ),
    "methods.multihop": lambda: (tll.methods.multihop, dict(model=model(), first=PROMPT, second="the dog ran")),
    "load_model": lambda: (tll.load_model, dict(name="lab-none")),
    "lab.load": lambda: (tll.lab.load, dict(name="lab-none")),
    "lab.path": lambda: (tll.lab.path, dict(name="lab-gpt2")),
    "lab.steps": lambda: (tll.lab.steps, dict(name="lab-gpt2")),
    "lab.text": lambda: (tll.lab.text, dict(split="heldout")),
    "experiments.ablations": lambda: (tll.experiments.ablations, dict(model=model(), tokens=TOKENS, kinds=["zero"], orders=["swap"], layers=[1], n=64)),
    "experiments.alignment": lambda: (tll.experiments.alignment, dict(model=model(), lenses=two_lenses(), tokens=TOKENS, k=2, layers=[1], n=16)),
    "experiments.attributes": lambda: (tll.experiments.attributes, dict(model=model(), facts=facts(), layers=[1], target_layers=[1], max_new_tokens=1, n=2)),
    "experiments.causal_basis": lambda: (tll.experiments.causal_basis, dict(model=model(), lens=lens(), tokens=TOKENS, k=2, layers=[1], n=32)),
    "experiments.cross_model": lambda: (tll.experiments.cross_model, dict(model=model(), to=model(), maps=maps(), tokens=TOKENS, n=4)),
    "experiments.entities": lambda: (tll.experiments.entities, dict(model=model(), descriptions={"cat":"a cat","dog":"a dog","mat":"a mat"}, layers=[1], max_new_tokens=1, n=2)),
    "experiments.difficulty": lambda: (tll.experiments.difficulty, dict(model=model(), lenses={"a": lens()}, tokens=TOKENS, checkpoints=[(i, model()) for i in range(3)], n=64)),
    "experiments.intermediates": lambda: (
        tll.experiments.intermediates,
        dict(model=model(), lenses={"a": lens()}, items=[tll.experiments.Item("a", PROMPT, ("dog",))] * 2, layers=[1], said=0, n=2),
    ),
    "experiments.lens_directions": lambda: (tll.experiments.lens_directions, dict(lens=lens(), layer=1, ids=torch.tensor([5]))),
    "experiments.read_items": lambda: (tll.experiments.read_items, dict(path="nowhere")),
    "experiments.readout_angle": lambda: (tll.experiments.readout_angle, dict(directions=torch.eye(4)[:1], subspace=torch.eye(4)[:, :2], draws=4)),
    "experiments.usage": lambda: (tll.experiments.usage, dict(model=lab(), lenses=tll.Lens(lab()), layers=[6], n=2)),
    "experiments.inversion": lambda: (tll.experiments.inversion, dict(model=model(), lenses={"a": lens()}, tokens=TOKENS, layers=[1], n=1, steps=2)),
    "experiments.fine_tune": lambda: (tll.experiments.fine_tune, dict(model=model(), base=maps(), own=maps(), tokens=TOKENS, layers=[1])),
    "experiments.gradients": lambda: (tll.experiments.gradients, dict(model=model(), tokens=TOKENS, layers=[1], draws=2)),
    "experiments.conflict": lambda: (
        tll.experiments.conflict,
        dict(model=model(), to=model(), facts=facts(), others=["a"] * 3, layers=[1], target_layers=[0], of="subject", n=1, text="{}", seed=0),
    ),
    "experiments.conflicting": lambda: (tll.experiments.conflicting, dict(relations=["company_hq"])),
    "experiments.multihop": lambda: (tll.experiments.multihop, dict(model=model(), facts=facts(), layers=[1], target_layers=[0], max_new_tokens=1, n=2)),
    "experiments.next_token": lambda: (tll.experiments.next_token, dict(model=model(), tokens=TOKENS, layers=[1], n=8)),
    "experiments.detection": lambda: (tll.experiments.detection, dict(model=model(), lenses={"a": lens()}, tasks=[task()], splits=2, neighbors=3, draws=5)),
    "experiments.invert": lambda: (tll.experiments.invert, dict(lens=lens()[1], logp=torch.randn(2, model().cfg.d_vocab).log_softmax(-1), steps=2)),
    "views.figure": lambda: (tll.views.figure, dict(traj=traj()["a"])),
    "views.frame": lambda: (tll.views.frame, dict(traj=traj())),
    "views.difference": lambda: (tll.views.difference, dict(trajs=traj(), pair=("a", "b"))),
    "views.heat": lambda: (tll.views.heat, dict(values=[[0.5]], rows=["a"], columns=["b"], title="t", unit="u", good="low", down="d", across="a")),
    "views.panels": lambda: (tll.views.panels, dict(traj=traj(), diff=("a", "b"), width=500)),
    "views.slide": lambda: (tll.views.slide, dict(traj=traj(), tokens=2, rows=2)),
    "views.heat_map": lambda: (tll.views.heat_map, dict(traj=traj()["a"])),
    "views.html": lambda: (tll.views.html, dict(traj=traj())),
    "views.html_fragment": lambda: (tll.views.html_fragment, dict(traj=traj())),
    "views.means_lines": lambda: (tll.views.means_lines, dict(trajs=traj())),
    "page": lambda: (tll.page, dict(shown=traj(), stat="kl", title="t", diff=("a", "b"))),
    "calibration": lambda: (tll.calibration, dict(hits=[1, 0], confidence=[0.5, 0.5], bins=2)),
    "faithfulness": lambda: (
        tll.faithfulness, dict(result=two_texts(), controls=["mean vector"], repeat=tll.Target("the cat"), among=2, draws=2, seed=0),
    ),
    "views.patchscope_figure": lambda: (tll.views.patchscope_figure, dict(result=result())),
    "views.patchscope_heat": lambda: (tll.views.patchscope_heat, dict(result=result())),
    "views.patchscope_fragment": lambda: (tll.views.patchscope_fragment, dict(result=result())),
    "views.patchscope_html": lambda: (tll.views.patchscope_html, dict(result=result())),
    "views.patchscope_table": lambda: (tll.views.patchscope_table, dict(result=result())),
    "views.rows_frame": lambda: (tll.views.rows_frame, dict(records=[{"a": 1}])),
    "views.rows_html": lambda: (tll.views.rows_html, dict(title="t", columns=["a"], rows=[[1]])),
    "views.rows_table": lambda: (tll.views.rows_table, dict(title="t", columns=["a"], rows=[[1]])),
    "views.page_of": lambda: (tll.views.page_of, dict(title="t", body="b")),
    "views.save": lambda: (tll.views.save, dict(traj=traj(), path="a.json")),
    "views.save_as": lambda: (tll.views.save_as, dict(path="a.json", writers={".json": lambda: "1"}, example="a.json")),
    "views.scores_figure": lambda: (tll.views.scores_figure, dict(rows=scores().rows)),
    "views.scores_html": lambda: (tll.views.scores_html, dict(rows=scores().rows)),
    "views.scores_lines": lambda: (tll.views.scores_lines, dict(rows=scores().rows)),
    "views.scores_table": lambda: (tll.views.scores_table, dict(rows=scores().rows)),
    "views.svg": lambda: (tll.views.svg, dict(traj=traj()["a"])),
    "views.terminal": lambda: (tll.views.terminal, dict(traj=traj()["a"])),
    "views.to_json": lambda: (tll.views.to_json, dict(traj=traj())),
    "views.to_text": lambda: (tll.views.to_text, dict(traj=traj()["a"])),
    "views.Heat": lambda: (tll.views.Heat, dict(title="t", rows=["a"], columns=["b"], values=[[0.5]])),
    "views.Lines": lambda: (tll.views.Lines, dict(title="t", series={"a": [(0, 1.0)]})),
    "files.check_folder": lambda: (files.check_folder, dict(path="x")),
    "files.check_output": lambda: (files.check_output, dict(path="x")),
    "files.csv_text": lambda: (files.csv_text, dict(rows=[{"a": 1}])),
    "files.is_state": lambda: (files.is_state, dict(path="x")),
    "files.json_text": lambda: (files.json_text, dict(content=[1])),
    "files.load_maps": lambda: (files.load_maps, dict(path="x")),
    "files.load_state": lambda: (files.load_state, dict(path="x")),
    "files.locked": lambda: (lambda path: files.locked(path).__enter__(), dict(path="x")),
    "files.previous_of": lambda: (files.previous_of, dict(path="x")),
    "files.readable": lambda: (files.readable, dict(text="x", keep="")),
    "files.remove_state": lambda: (files.remove_state, dict(path="x")),
    "files.save_state": lambda: (files.save_state, dict(path="x", tree={"a": 1})),
    "files.state_exists": lambda: (files.state_exists, dict(path="x")),
    "files.states_of": lambda: (files.states_of, dict(path="x")),
    "files.write_bytes": lambda: (files.write_bytes, dict(path="x", content=b"")),
    "text.as_batches": lambda: (as_batches, dict(tokens=TOKENS, batch_size=2)),
    "fit.plan": lambda: (plan, dict(settings=Settings(), d_model=64, n_layers=4, d_vocab=100)),
    "experiments.Report.save": lambda: (quality().save, dict(path="out")),
    "Scores.save": lambda: (scores().save, dict(path="a.json")),
    "CheckReport.save": lambda: (report().save, dict(path="a.json")),
    "Trajectories.figure": lambda: (traj().figure, dict(stat="kl")),
    "Trajectories.save": lambda: (traj().save, dict(path="a.json")),
    "Trajectories.__getitem__": lambda: (traj().__getitem__, dict(name="a")),
    "Trajectory.__getitem__": lambda: (traj()["a"].__getitem__, dict(key=0)),
    "Lens.hooks": lambda: (lens().hooks, dict(into={}, layers=[1])),
    "Lens.__getitem__": lambda: (lens().__getitem__, dict(layer=1)),
    "experiments.quality": lambda: (tll.experiments.quality, dict(model=model(), lenses={"a": lens()}, tokens=TOKENS, layers=[1])),
    "experiments.read_facts": lambda: (tll.experiments.read_facts, dict(path="nowhere")),
    "experiments.weights": lambda: (tll.experiments.weights, dict(model=model(), lenses={"a": lens()}, kinds=["OV out"], layers=[1], directions=2, columns=2, n_random=8)),
    "experiments.sample_from": lambda: (tll.experiments.sample_from, dict(model=model(), lens=lens(), layer=1, prompt=PROMPT, max_new_tokens=1)),
    "experiments.sampling": lambda: (tll.experiments.sampling, dict(model=model(), lenses={"a": lens()}, prompts=[PROMPT], layers=[1], max_new_tokens=1)),
    "experiments.transfer": lambda: (tll.experiments.transfer, dict(model=model(), lens=tll.Lens(model(), maps()), tokens=TOKENS, layers=[0,1])),
}  # fmt: skip


def arguments_of(name):
    """The arguments of a function but its flags, for which anything is true or false."""
    parameters = inspect.signature(CALLS[name]()[0]).parameters.values()
    return [
        p.name
        for p in parameters
        if not isinstance(p.default, bool) and p.kind is not p.VAR_KEYWORD and p.name not in ("show_progress", "color")
    ]


CASES = [(name, argument) for name in CALLS for argument in arguments_of(name)]


def is_ours(error):
    """Whether a `raise` of this package made an error, of a kind that tells the caller about a mistake."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, OURS) or not Path(frame.filename).is_relative_to(PACKAGE):
        return False
    tree = ast.parse(Path(frame.filename).read_text(encoding="utf-8"))
    return any(n.lineno <= frame.lineno <= n.end_lineno for n in ast.walk(tree) if isinstance(n, ast.Raise))


@contextlib.contextmanager
def at_most(seconds):
    """A TimeoutError after so many seconds, where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*args):
        raise TimeoutError(f"not through after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def foreign(name, argument):
    """The wrong values that end in an error of somebody else."""
    ours = {}
    several = {"lenses": {"a": lens()}} if argument == "lens" else {}  # some functions take several, some one
    for kind, value in {**WRONG, **several}.items():
        function, arguments = CALLS[name]()
        try:
            with warnings.catch_warnings(), at_most(SECONDS):
                warnings.simplefilter("ignore")
                function(**{**arguments, argument: value})
        except Exception as error:
            if not is_ours(error):
                ours[kind] = f"{type(error).__name__}: {str(error)[:90]}"
    return ours


@pytest.mark.parametrize(("name", "argument"), CASES, ids=[f"{name}.{argument}" for name, argument in CASES])
def test_wrong_values_are_refused_in_our_words(name, argument, unchecked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not foreign(name, argument)


def test_every_public_function_is_called():
    public = {name for name in tll.__all__ if callable(getattr(tll, name))}
    for room in ("edits", "solve", "scopes", "methods", "lab"):
        module = getattr(tll, room)
        public |= {
            f"{room}.{n}" for n, f in vars(module).items()
            if inspect.isfunction(f) and n[0] != "_" and f.__module__ == module.__name__
        }  # fmt: skip
    for room in ("views", "experiments"):
        public |= {f"{room}.{n}" for n in getattr(tll, room).__all__ if inspect.isfunction(getattr(getattr(tll, room), n))}
    results = {"Batch", "Marginals", "Trajectory", "Trajectories", "Scores", "PatchscopeResult"}  # made by the library
    # an edit itself; no arguments; a tool's; a block that prints whatever name it gets
    rest = {"edits.zero", "lab.available", "lab.verify", "lab.exercise"}
    rest |= {f"experiments.{n}" for n in tll.__all__}  # the same functions
    assert public - results - rest - CALLS.keys() == set()


def test_this_test_can_fail(unchecked):
    with pytest.raises(AttributeError) as caught:
        tll.edits.scale(2.0)(None)
    assert not is_ours(caught.value)
    with pytest.raises(ValueError, match="seq_len") as caught:
        tll.token_batches(["a"], model().tokenizer, seq_len=1, batch_size=1)
    assert is_ours(caught.value)
