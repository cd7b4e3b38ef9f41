"""The tests on the oldest, the last and the newest TransformerLens that we support, and on the newest of everything: `make test-all`."""

import ast
import subprocess
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True

# The other pins of constraints.txt are for the newest TransformerLens.
TOOLS = ("torch", "jaxtyping", "matplotlib", "plotly", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
# What the newest transformers and torch have changed before: caches, masks and the hooks of bridges.
NEWEST = ["-m", "not slow", *(f"tests/test_{name}.py" for name in ("zoo", "hooks", "decoding", "scopes", "planner"))]


def pinned(names: tuple[str, ...]) -> list[str]:
    """The lines of constraints.txt for these packages."""
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.split("==")[0] in names]


# 2.x caps numpy below 2, which newer pyarrow refuses at import, and does not know transformers 5; without a floor on
# datasets a resolver may go back to one that newer pyarrow breaks.
VERSIONS = {
    "2.18": ["transformer-lens==2.18.0", "transformers<5", "pyarrow<26", "datasets>=3"],
    "3.9": ["transformer-lens==3.9.0", *pinned(("transformers",))],
    "4.3": ["transformer-lens==4.3.0", *pinned(("transformers",))],
}


def find_links() -> list[str]:
    """Where pip looks for wheels besides its index, by configuration or environment: uv reads neither."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = [line.partition(".find-links=")[2] for line in listing.splitlines() if ".find-links=" in line]
    places = [place for setting in settings for place in ast.literal_eval(setting).split()]
    return [argument for place in dict.fromkeys(places) for argument in ("--find-links", place)]


def add_session(name: str, requirements: list[str]) -> None:
    """One session, `tests-<version>`."""

    @nox.session(name=f"tests-{name}")
    def tests(session: nox.Session) -> None:
        # uv leaves compiling to the first import, of which every worker and subprocess would do its own.
        session.env["UV_COMPILE_BYTECODE"] = "1"
        tools = pinned(TOOLS)
        session.install(*find_links(), *(tool for tool in tools if tool.startswith("torch==")))
        session.install(*find_links(), *tools, *requirements, "beartype", "-e", ".[plot,detect,experiments]")
        # The last that the tuned-lens package works beside; wandb and torchdata it needs for training alone.
        if name == "2.18":
            session.install("--no-deps", "tuned-lens==0.2.0")
        session.run("python", "-m", "pytest", *session.posargs)


@nox.session(name="tests-newest")
def newest(session: nox.Session) -> None:
    """What a fresh `pip install` gives today, without a pin."""
    session.env["UV_COMPILE_BYTECODE"] = "1"
    session.install("--upgrade", *find_links(), "torch")
    tools = ("beartype", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist")
    session.install("--upgrade", *find_links(), *tools, "transformers", "transformer-lens", "-e", ".[plot]")
    session.run("python", "-m", "pytest", *NEWEST, *session.posargs)


for _name, _requirements in VERSIONS.items():
    add_session(_name, _requirements)
