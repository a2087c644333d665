"""Checkpoints on a Hub that speaks the few routes that are needed, on the loopback; nothing of it is executed."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import samples
from test_export import MODERN, make

import multimodal_fm
from multimodal_fm.cli import app
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.interop.base import save
from multimodal_fm.run_dir import checkpoint, hub


class Handler(BaseHTTPRequestHandler):
    """server.repos: by name and revision the files; server.commits: what was sent."""

    def log_message(self, *args):
        pass

    def answer(self, data, status=200, **headers):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, _, _ = self.path.partition("?")
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        versions = self.server.repos.get(f"{owner}/{name}")
        revision = rest[1] if len(rest) > 1 else "main"
        if versions is None:
            return self.answer({}, 404, X_Error_Code="RepoNotFound")
        files = next((f for v, f in versions.items() if revision in (v, self.server.sha(f))), None)
        if files is None:
            return self.answer({}, 404, X_Error_Code="RevisionNotFound")
        sha = self.server.sha(files)
        if api and rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": n, "size": len(f), "oid": hashlib.sha1(f).hexdigest()}
                for n, f in files.items()
            ]
            return self.answer(listed)
        if api:
            return self.answer({"id": f"{owner}/{name}", "sha": sha, "siblings": [{"rfilename": n} for n in files]})
        data = files["/".join(rest[2:])]
        etag = hashlib.sha256(data).hexdigest()
        return self.answer(data, ETag=f'"{etag}"', X_Repo_Commit=sha)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path, _, _ = self.path.partition("?")
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'user'}/{given['name']}"
            self.server.private[name] = given.get("private") or given.get("visibility") == "private"
            self.server.repos.setdefault(name, {"main": {}})
            return self.answer({"url": f"{self.server.url}/{name}", "name": name})
        if "/preupload/" in path:
            given = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in given]}
            )
        if "/commit/" in path:
            name, revision = path.split("/api/models/")[1].split("/commit/")
            files = self.server.repos[name].setdefault(revision, {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            sha = self.server.sha(files)
            return self.answer(
                {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
            )
        if "/branch/" in path:
            return self.answer({})
        return self.answer({}, 404)


@pytest.fixture
def server(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{made.server_port}"
    made.repos, made.private, made.asked = {}, {}, []
    made.sha = lambda files: hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield made
    made.shutdown()
    made.server_close()


def test_there_and_back(server, tmp_path):
    model = make({**MODERN, "depth": 1}, ["text", "image"])
    save(model, tmp_path / "run")
    address = multimodal_fm.push_to_hub(tmp_path / "run", "user/stamps", private=True)
    assert address.startswith(f"{server.url}/user/stamps/commit/") and server.private == {"user/stamps": True}
    files = server.repos["user/stamps"]["main"]
    assert (
        "optimizer.safetensors" not in files
        and "SIGNATURE" not in files
        and b"multimodal_fm.load" in files["README.md"]
    )
    server.repos["user/stamps"]["main"] |= {"evil.py": b"raise SystemExit", "pytorch_model.bin": b"\x80\x04."}
    again = multimodal_fm.load("hf:user/stamps", device="cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    folder = checkpoint.newest("hf:user/stamps")
    assert not {p.suffix for p in folder.iterdir()} - {".json", ".safetensors"}
    assert not [path for path in server.asked if path.endswith((".py", ".bin"))]


def test_a_version_is_pinned(server, tmp_path):
    models = [make({**MODERN, "depth": 1}, ["text"], seed=seed) for seed in (0, 1)]
    for number, model in enumerate(models):
        save(model, tmp_path / f"run{number}")
        multimodal_fm.push_to_hub(tmp_path / f"run{number}", "user/words", revision=f"v{number}")
    for number, model in enumerate(models):
        again = multimodal_fm.load(f"hf:user/words@v{number}", device="cpu")
        assert torch.equal(again.embedders["text"].weight, model.embedders["text"].weight)
    with pytest.raises(UserError, match="hf:user/words@v7: cannot be fetched: .*404"):
        multimodal_fm.load("hf:user/words@v7")


def test_what_is_on_the_hub_is_evaluated_and_embeds(server, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    from test_embed import make_model

    save(make_model(tmp_path), tmp_path / "run")
    multimodal_fm.push_to_hub(tmp_path / "run", "user/stamps")
    shards.write(tmp_path / "x.tar", samples(8))

    def call(*words) -> tuple[str, str]:
        app([*map(str, words)], exit_on_error=False, result_action="return_value")
        return capsys.readouterr()

    figures = json.loads(call("evaluate", "hf:user/stamps", "--on", tmp_path / "x.tar", "--json", "--device", "cpu")[0])
    assert "retrieval/text_to_image/r@1" in figures
    words = ["embed", "hf:user/stamps", tmp_path / "x.tar", "--out", tmp_path / "c", "--workers", 0, "--device", "cpu"]
    assert "24 items (8 audio, 8 image, 8 text)" in call(*words)[0]
    words = ["search", tmp_path / "c", "a yellow square number 3", "--to", "text"]
    with pytest.raises(UserError, match="--run"):  # a collection is data: it opens no hub
        call(*words)
    assert "square number 3" in call(*words, "--run", "hf:user/stamps", "--device", "cpu")[0]


def test_what_is_no_checkpoint_is_said(server, tmp_path):
    server.repos["user/pickled"] = {"main": {"pytorch_model.bin": b"\x80\x04.", "config.json": b"{}"}}
    server.repos["user/bert"] = {"main": {"model.safetensors": b"x", "config.json": b"{}"}}
    server.repos["user/damaged"] = {"main": {"model.json": b"{}"}}
    listing = {"model.json": {"bytes": 2, "sha256": "0" * 64}}
    server.repos["user/damaged"]["main"]["MANIFEST.json"] = json.dumps(listing).encode()
    for name, said in {
        "hf:user/pickled": r"has pickles .pytorch_model.bin., which can run code .* refused",
        "hf:user/bert": "MANIFEST.json is missing.*mmfm import",
        "hf:user/damaged": "no whole checkpoint",
        "hf:user/nobody": "cannot be fetched: .*404",
        "hf:nobody": "is hf:user/name",
        "hf:user/../../x": "is hf:user/name",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            multimodal_fm.load(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="a name on the Hub is user/name"):
        hub.push(tmp_path, "stamps")


def test_pickles_on_disk_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(UserError, match="pytorch_model.bin: is a pickle, which can run code"):
            multimodal_fm.load(path)
    with pytest.raises(UserError, match="no such run folder"):
        multimodal_fm.load(Path(tmp_path / "none.pt"))


def test_without_the_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'pip install "multimodal_fm\[hub\]"'):
        multimodal_fm.load("hf:user/name")
