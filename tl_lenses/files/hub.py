"""Lenses on the Hugging Face Hub: fetch one, list what a repository offers, put one there. Every failure is one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tl_lenses.files.maps import CONFIG, PARAMS, WEIGHTS


@dataclass(frozen=True)
class Access:
    """How the Hub is asked."""

    revision: str | None = None  # a branch, tag or commit; the default branch by default
    token: str | None = None  # of an account, for repositories that are gated or private; the one logged in by default
    cache_dir: str | Path | None = None  # where downloads are kept; the Hub's own cache by default


def tuned_lens_repository() -> tuple[str, str]:
    """Name and type of the repository where the tuned-lens package looks, which two environment variables change."""
    name = os.environ.get("TUNED_LENS_REPO_ID") or "AlignmentResearch/tuned-lens"
    return name, os.environ.get("TUNED_LENS_REPO_TYPE") or "space"


def fetch(name: str, filename: str | None = None, access: Access = Access()) -> Path:
    """A lens from the Hub, in the cache.

    Args:
        name: a repository "owner/name" with a lens of ours, or with `filename`; or a model that has a lens in the Space of
            the tuned-lens package.

    Raises:
        FileNotFoundError: the Hub did not give it; says what was tried and why it failed.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FileNotFoundError(f"no folder {name!r}, and it is not a Hub name (owner/name)")
    if filename is not None:
        return _download(name, filename, "model", access)
    space, kind = tuned_lens_repository()
    places = [(name, "", "model", (CONFIG, WEIGHTS))] * ("/" in name) + [(space, f"lens/{name}/", kind, (CONFIG, PARAMS))]
    tried = []
    for repository, folder, kind, files in places:
        try:
            return [_download(repository, folder + file, kind, access) for file in files][0].parent
        except NotThere as error:
            tried.append(str(error))
        except FileNotFoundError as error:  # no network, no permission: the other place would fail as well
            tried.append(str(error))
            break
    raise FileNotFoundError(
        f"no folder {name!r}, and the Hub did not give it: {'; '.join(tried)}. filename= names a file of another format; tl-lenses list "
        "OWNER/NAME shows what a repository offers"
    )


class NotThere(FileNotFoundError):
    """The Hub answered that it has no such thing."""


@contextmanager
def said_in_one_line(what: str) -> Iterator[None]:
    """Turn every failure of the Hub and the network into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise FileNotFoundError(
            f"{what} is gated: ask for access on its page, then log in (hf auth login) or pass token="
        ) from None
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise FileNotFoundError(
                f"{what} is not in the cache and the Hub cannot be reached: connect, or give a folder ({_line(error.__cause__ or error)})"
            ) from None
        raise NotThere(f"{what}: the repository has no such file") from None
    except errors.RevisionNotFoundError:
        raise NotThere(f"{what}: no such revision") from None
    except errors.RepositoryNotFoundError:
        raise NotThere(f"{what}: no such repository, or a private one (log in with hf auth login, or pass token=)") from None
    except (errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise FileNotFoundError(f"{what}: the Hub cannot be reached ({_line(error)})") from None
    except errors.HfHubHTTPError as error:
        raise FileNotFoundError(f"{what}: the Hub refused ({_line(error)})") from None
    except Exception as error:
        # Which library speaks to the network differs by version: requests, httpx, httpx2. Some of their errors are OSErrors.
        if type(error).__module__.startswith(("requests", "urllib3", "httpx", "httpcore", "h11", "huggingface_hub")):
            raise FileNotFoundError(f"{what}: the Hub cannot be reached ({_line(error)})") from None
        if isinstance(error, OSError):  # a download that broke off, a full disk
            raise FileNotFoundError(f"{what} was not read whole ({_line(error)}): try again, it goes on where it stopped") from None
        raise


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]:.200}"


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _download(name: str, filename: str, kind: str, access: Access) -> Path:
    from huggingface_hub import hf_hub_download

    with said_in_one_line(f"{filename} of {name}" + f" at {access.revision}" * (access.revision is not None)):
        return Path(hf_hub_download(name, filename, repo_type=kind, endpoint=_endpoint(), **vars(access)))


# --- what there is


@dataclass(frozen=True)
class Offer:
    """A lens in a repository."""

    path: str  # the folder or file in the repository; "." is the repository itself
    kind: str  # its format, as far as names tell
    size: int  # bytes


def offers(name: str, access: Access = Access(), kind: str | None = None) -> list[Offer]:
    """The lenses that a repository of the Hub holds, told by the names of its files.

    Args:
        name: "owner/name", or "tuned-lens" for the Space of that package.
        kind: "model", "space" or "dataset"; a model repository by default.

    Raises:
        FileNotFoundError: the Hub did not answer; says why.
    """
    from huggingface_hub import HfApi

    if name == "tuned-lens":
        name, default = tuned_lens_repository()
        kind = kind or default
    with said_in_one_line(name):
        tree = HfApi(endpoint=_endpoint(), token=access.token).list_repo_tree(
            name, recursive=True, revision=access.revision, repo_type=kind or "model"
        )
        sizes = {item.path: int(getattr(item, "size", 0) or 0) for item in tree if hasattr(item, "size")}
    return grouped(sizes)


def grouped(sizes: dict[str, int]) -> list[Offer]:
    """Files of a repository, by name and size, as the lenses that they make."""
    folders: dict[str, set[str]] = {}
    for path in sizes:
        folders.setdefault(str(PurePosixPath(path).parent), set()).add(PurePosixPath(path).name)
    lenses = []
    for folder, names in folders.items():
        full = lambda file, folder=folder: str(PurePosixPath(folder) / file)
        total = lambda files, full=full: sum(sizes[full(file)] for file in files)
        pairs = sorted(file for file in names if re.fullmatch(r"\d+_\d+\.(pickle|pkl|pt)", file))
        if {CONFIG, WEIGHTS} <= names:
            lenses.append(Offer(folder, "tl_lenses", total((CONFIG, WEIGHTS))))
        elif {CONFIG, PARAMS} <= names:
            lenses.append(Offer(folder, "tuned-lens", total((CONFIG, PARAMS))))
        if pairs:
            lenses.append(Offer(folder, f"linear-shortcut ({len(pairs)} maps)", total(pairs)))
        lenses += [
            Offer(full(file), "a lens file", sizes[full(file)])
            for file in sorted(names - set(pairs))
            if re.search(r"(lens|adapter|affine)[^/]*\.(pt|safetensors)$", file) and file not in (WEIGHTS, PARAMS)
        ]
    return sorted(lenses, key=lambda offer: offer.path)


# --- putting one there


def push(folder: str | Path, name: str, *, access: Access = Access(), private: bool = False) -> str:
    """Upload a folder that `Translators.save` and `write_card` made; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint(), token=access.token)
    with said_in_one_line(name):
        api.create_repo(name, exist_ok=True, private=private)
        api.upload_folder(
            repo_id=name, folder_path=str(folder), revision=access.revision, commit_message="A lens of tl_lenses", allow_patterns=[CONFIG, WEIGHTS, "README.md"],
        )  # fmt: skip
    return f"{(_endpoint() or 'https://huggingface.co').rstrip('/')}/{name}"


def card(config: dict[str, Any], name: str) -> str:
    """Model-card text of a lens, made from its record alone."""
    meta = config["meta"]
    model = meta.get("model", "a model that its file does not name")
    lines = ["---", "library_name: tl-lenses", *([f"base_model: {model}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) else []), "tags: [interpretability, lens]", "---"]  # fmt: skip
    lines += ["", f"# {meta.get('fitter', 'affine')} lens of {model}", ""]
    lines += [f"{len(config['rows'])} affine maps {config['d_in']} -> {config['d_out']} between residual sites of a model with {config['n_layers']} layers.", ""]  # fmt: skip
    lines += [
        "```python", "import tl_lenses as tll", f'lens = tll.Lens(model, "{name}")', "```", "", "| | |", "|---|---|",
    ]  # fmt: skip
    keys = "fitter basis tokens_seen n_prompts corpus settings held_out format converted_from versions"
    for key in keys.split():
        if key in meta:
            lines.append(f"| {key} | `{str(meta[key])[:300]}` |".replace("\n", " "))
    return "\n".join(lines) + "\n"
