"""The tests on the oldest, the last and the newest TransformerLens that we support: `make test-all`."""

import ast
import subprocess
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True

# 2.x caps numpy below 2, which newer pyarrow refuses at import, and does not know transformers 5; without a floor on
# datasets a resolver may go back to one that newer pyarrow breaks. transformers 5.24 leaves the key-value caches of bridges
# empty (docs/compatibility.md), and the tests count what a cache saves.
VERSIONS = {
    "2.18": ["transformer-lens==2.18.0", "transformers<5", "pyarrow<26", "datasets>=3"],
    "3.9": ["transformer-lens==3.9.0", "transformers<5.24"],
    "4.3": ["transformer-lens==4.3.0", "transformers<5.24"],
}
# The other pins of constraints.txt are for the newest TransformerLens.
TOOLS = ("torch", "jaxtyping", "plotly", "kaleido", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis")


def pinned(names: tuple[str, ...]) -> list[str]:
    """The lines of constraints.txt for these packages."""
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.split("==")[0] in names]


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
        session.run("python", "-m", "pytest", *session.posargs)


for _name, _requirements in VERSIONS.items():
    add_session(_name, _requirements)
