"""Lenses on the Hub, against a local fake of its endpoint: what is there, what is not, what is gated, and no network."""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_foreign import D, N, quietly, random, write_jacobians, write_tuned_lens
from typer.testing import CliRunner

import tl_lenses as tll
from tl_lenses import files
from tl_lenses.cli import app

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPACE = "spaces/AlignmentResearch/tuned-lens"


class _Hub(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks for: resolve, tree, create, preupload, commit."""

    repositories: dict
    tokens: list
    cut: int | None = None  # where the files of owner/broken break off

    def log_message(self, *args):
        pass

    def _answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code, name):
        self._answer(code, b"{}", X_Error_Code=name, X_Error_Message=name)

    def _file(self):
        repository, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        self.tokens.append(self.headers.get("authorization"))
        if repository == "owner/gated":
            return self._refuse(403, "GatedRepo")
        if repository not in self.repositories:
            return self._refuse(401, "RepoNotFound")
        if revision not in ("main", COMMIT, "v1"):
            return self._refuse(404, "RevisionNotFound")
        content = self.repositories[repository].get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if self.command == "HEAD":
            return self._answer(200, content, **headers)
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers |= {"Content_Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if first else {}
        part, length = content[first:], str(len(content) - first)
        sent = part[: max(self.cut - first, 0)] if repository == "owner/broken" and self.cut is not None else part
        self._answer(206 if first else 200, sent, Content_Length=length, **headers)
        if len(sent) < len(part):
            self.close_connection = True

    do_HEAD = _file

    def do_GET(self):
        if "/resolve/" in self.path:
            return self._file()
        repository = self.path.split("?")[0].removeprefix("/api/").removeprefix("models/").split("/tree/")[0]
        if repository not in self.repositories:
            return self._refuse(401, "RepoNotFound")
        tree = [
            {"type": "file", "path": name, "size": len(content), "oid": "0"}
            for name, content in self.repositories[repository].items()
        ]
        return self._answer(200, json.dumps(tree).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            name = "/".join(filter(None, (json.loads(body).get("organization"), json.loads(body)["name"])))
            self.repositories.setdefault(name, {})
            return self._answer(
                200, json.dumps({"url": f"http://{self.headers['Host']}/{name}"}).encode(), Content_Type="application/json"
            )
        if self.path == "/api/validate-yaml":
            return self._answer(200, b'{"errors": [], "warnings": []}', Content_Type="application/json")
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            told = {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for file in asked]
            }
            return self._answer(200, json.dumps(told).encode(), Content_Type="application/json")
        repository = self.path.removeprefix("/api/models/").split("/commit/")[0]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        told = {"success": True, "commitOid": COMMIT, "commitUrl": f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"}
        return self._answer(200, json.dumps(told).encode(), Content_Type="application/json")


def offline(monkeypatch, yes):
    import huggingface_hub
    from huggingface_hub.utils import _http

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", yes)
    getattr(_http, "reset_sessions", getattr(_http, "close_session", None))()  # sessions remember it


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the Hub's package

    handler = type("Hub", (_Hub,), {"repositories": {}, "tokens": [], "cut": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    offline(monkeypatch, False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("TUNED_LENS_REPO_ID", "TUNED_LENS_REPO_TYPE"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()


def folder(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def a_lens():
    meta = {"fitter": "tuned", "model": "openai-community/gpt2", "basis": "raw", "tokens_seen": 1024}
    return tll.Translators([(i, N) for i in range(N)], torch.eye(D) + random(N, D, D), random(N, D), n_layers=N, meta=meta)


@pytest.fixture
def pushed(hub, tmp_path, monkeypatch):
    """A lens that was pushed to owner/name by the command."""
    import huggingface_hub

    a_lens().save(tmp_path / "lens")
    with monkeypatch.context() as old:  # of the Hub's package, which reads the address that it made up against this
        old.setattr(huggingface_hub.constants, "ENDPOINT", os.environ["HF_ENDPOINT"])
        done = CliRunner().invoke(app, ["push", str(tmp_path / "lens"), "owner/name"])
    assert done.exit_code == 0 and done.stdout.endswith("/owner/name\n"), done.stderr
    return a_lens()


def test_a_pushed_lens_has_a_card(hub, pushed):
    card = hub.repositories["owner/name"]["README.md"].decode()
    for line in ("base_model: openai-community/gpt2", "# tuned lens of openai-community/gpt2", "| tokens_seen | `1024` |"):
        assert line in card


def test_a_pushed_lens_is_loaded_as_asked(hub, pushed, tmp_path):
    back = tll.Translators.load("owner/name", cache_dir=tmp_path / "elsewhere", token="hf_mine", revision="v1")
    assert torch.equal(back.delta, pushed.delta) and (tmp_path / "elsewhere").is_dir() and hub.tokens[-1] == "Bearer hf_mine"


def test_a_pushed_lens_is_pulled(hub, pushed, tmp_path):
    pulled = CliRunner().invoke(app, ["pull", "owner/name", str(tmp_path / "pulled")])
    assert pulled.exit_code == 0 and torch.equal(tll.Translators.load(tmp_path / "pulled").delta, pushed.delta), pulled.stderr


def test_a_model_of_the_tuned_lens_space(hub, tmp_path, monkeypatch):
    state = write_tuned_lens(tmp_path / "lens")
    for owner in ("", "EleutherAI/"):
        hub.repositories[SPACE] = {f"lens/{owner}tiny/{name}": content for name, content in folder(tmp_path / "lens").items()}
        lens = quietly(tll.Translators.load, f"{owner}tiny")
        assert torch.equal(lens.delta[1], state["1.weight"]) and lens.meta["format"] == "tuned-lens"
    listed = CliRunner().invoke(app, ["list", "tuned-lens"])
    assert listed.stdout.startswith("lens/EleutherAI/tiny  tuned-lens, "), listed.stderr
    monkeypatch.setenv("TUNED_LENS_REPO_ID", "me/copies")
    monkeypatch.setenv("TUNED_LENS_REPO_TYPE", "model")
    with pytest.raises(FileNotFoundError, match=r"lens/tiny/config.json of me/copies: no such repository"):
        tll.Translators.load("tiny")
    hub.repositories["me/copies"] = {f"lens/tiny/{name}": content for name, content in folder(tmp_path / "lens").items()}
    assert torch.equal(quietly(tll.Translators.load, "tiny").delta[1], state["1.weight"])


def test_a_file_of_another_package_by_its_name(hub, tmp_path):
    matrices = write_jacobians(tmp_path / "lens.pt")
    hub.repositories["neuronpedia/jacobian-lens"] = {"tiny/jlens/tiny_jacobian_lens.pt": (tmp_path / "lens.pt").read_bytes()}
    lens = quietly(tll.Translators.load, "neuronpedia/jacobian-lens", filename="tiny/jlens/tiny_jacobian_lens.pt", n_layers=N)
    assert torch.allclose(lens[1].weight, matrices[0], atol=1e-6)
    listed = CliRunner().invoke(app, ["list", "neuronpedia/jacobian-lens"])
    assert listed.stdout.startswith("tiny/jlens/tiny_jacobian_lens.pt  a lens file, ")
    converted = CliRunner().invoke(app, ["convert", "neuronpedia/jacobian-lens", str(tmp_path / "out"), "--filename", "tiny/jlens/tiny_jacobian_lens.pt", "--n-layers", "3", "--to", "jacobian-lens"])  # fmt: skip
    assert converted.exit_code == 0 and "does not say which layer its maps end in" in converted.stderr, converted.stderr
    assert converted.stdout.splitlines()[-1] == f"written to {tmp_path / 'out' / 'lens.pt'}"


@pytest.mark.parametrize(
    "name, how, message",
    [
        ("owner/nothing", {}, "no such repository, or a private one"),
        ("owner/gated", {}, "is gated: ask for access on its page"),
        ("owner/gated", {"filename": "lens.pt"}, "is gated: ask for access on its page"),
        ("owner/empty", {}, "config.json of owner/empty: the repository has no such file; lens/owner/empty/config.json of"),
        ("owner/empty", {"filename": "lens.pt"}, "lens.pt of owner/empty: the repository has no such file"),
        ("owner/empty", {"revision": "v9"}, "at v9: no such revision"),
        ("owner/broken", {"filename": "lens.pt"}, "was not read whole|cannot be reached"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_one_clear_line(hub, tmp_path, name, how, message):
    hub.repositories |= {"owner/empty": {"README.md": b"hello"}, "owner/broken": {"lens.pt": b"half of it"}, SPACE: {}}
    hub.cut = 4
    with pytest.raises(FileNotFoundError, match=message) as error:
        tll.Translators.load(name, **how)
    assert "\n" not in str(error.value)
    told = CliRunner().invoke(app, ["pull", name, str(tmp_path / "out"), *(x for k, v in how.items() for x in (f"--{k}", v))])
    assert told.exit_code == 1 and told.stderr.startswith("error: ") and told.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_download_that_broke_off_goes_on(hub, tmp_path):
    """Nothing that is half there is taken for a lens, and the next call makes it whole."""
    matrices = write_jacobians(tmp_path / "lens.pt")
    content = (tmp_path / "lens.pt").read_bytes()
    hub.repositories["owner/broken"] = {"lens.pt": content}
    hub.cut = len(content) // 2
    load = lambda: quietly(tll.Translators.load, "owner/broken", filename="lens.pt", n_layers=N)
    with pytest.raises(FileNotFoundError, match="lens.pt of owner/broken was not read whole|cannot be reached"):
        load()
    hub.cut = None
    assert torch.allclose(load()[1].weight, matrices[0], atol=1e-6)


@pytest.mark.parametrize("load", [tll.Translators.load, files.offers])
def test_offline_says_so(hub, monkeypatch, load):
    offline(monkeypatch, True)
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        load("owner/name")


@pytest.mark.parametrize("load", [tll.Translators.load, files.offers])
def test_no_network_says_so(hub, monkeypatch, load):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        load("owner/name")


def test_offline_says_what_to_do(hub, monkeypatch):
    offline(monkeypatch, True)
    with pytest.raises(FileNotFoundError, match="not in the cache and the Hub cannot be reached: connect, or give a folder"):
        tll.Translators.load("owner/name")


def test_a_repository_without_a_lens(hub):
    hub.repositories["owner/empty"] = {"README.md": b"hello"}
    told = CliRunner().invoke(app, ["list", "owner/empty"])
    assert told.exit_code == 1 and told.stderr == "error: owner/empty has no file that looks like a lens\n"
