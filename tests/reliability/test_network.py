"""Nothing asks the network unless it is named, and a hub that lies is refused (row 49 of the page)."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from faults import VERBS, begin, command, inside

from seriatim.checkpoints import location as hub
from seriatim.checkpoints.native import PARTS, load_bundle
from seriatim.core.errors import CheckpointError, UsageError
from seriatim.pipeline.loading import load

ROOT = Path(__file__).resolve().parents[2]
ASKING = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
_asked: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _asked is not None and event in ASKING:
        _asked.append(f"{event} {arguments}")


sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    begin(folder)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_asks_the_network(
    verb: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    global _asked
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    shutil.copytree(source, tmp_path / "work")
    _asked = []
    try:
        with inside(tmp_path / "work"):
            code, lines = command(VERBS[verb], capsys)
        assert code == 0 and not _asked, (lines, _asked)
    finally:
        _asked = None


EVERY_MODULE = """
import sys
asked = []
def hook(event, given):
    if event.startswith(("socket.connect", "socket.get")):
        asked.append(event)
sys.addaudithook(hook)
import importlib, pathlib
root = pathlib.Path("seriatim")
for path in sorted(root.rglob("*.py")):
    if path.name not in ("__main__.py", "__init__.py"):
        importlib.import_module(".".join(path.with_suffix("").parts))
print([event for event in asked if event != "socket.gethostname"])
"""


def test_no_module_asks_the_network_when_it_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", EVERY_MODULE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


# --- a hub on this machine --------------------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub:
    """A repository of the hub, `some/model`, with two commits; `lies` change what it says of its files."""

    def __init__(self, folder: Path) -> None:
        self.commits = {commit: dict[str, bytes]() for commit in COMMITS.values()}
        for path in sorted(folder.iterdir()):
            for files in self.commits.values():
                files[path.name] = path.read_bytes()
        self.sizes: dict[str, Any] = {}  # told instead of the true ones
        self.elsewhere: str | None = None  # another host, to which downloads are redirected
        self.redirected: list[str | None] = []  # the token that came with each request that was redirected
        self.fetched: list[str] = []

    def listing(self, revision: str) -> dict[str, Any] | None:
        commit = COMMITS.get(revision, revision)
        if commit not in self.commits:
            return None
        siblings = [{"rfilename": n, "size": self.sizes.get(n, len(b))} for n, b in self.commits[commit].items()]
        return {"id": "some/model", "modelId": "some/model", "sha": commit, "siblings": siblings, "tags": []}


@pytest.fixture
def server(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants
    from huggingface_hub import file_download

    served = Hub(source / "model")

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            data, headers = b"", dict[str, str]()
            if parts[:4] == ["api", "models", "some", "model"]:
                said = served.listing(parts[5] if len(parts) > 5 else "main")
                told: Any = said
                if said is not None and parts[4:5] == ["tree"]:
                    told = [
                        {"type": "file", "path": s["rfilename"], "size": s["size"] or 0, "oid": "0"}
                        for s in said["siblings"]
                    ]
                code, data = (404, b"{}") if said is None else (200, json.dumps(told).encode())
                headers["Content-Type"] = "application/json"
            elif parts[:3] == ["some", "model", "resolve"] and len(parts) == 5:
                files = served.commits.get(COMMITS.get(parts[3], parts[3]), {})
                code, data = (200, files[parts[4]]) if parts[4] in files else (404, b"")
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": parts[3]}
                if body:
                    served.fetched.append(parts[4])
                if served.elsewhere is not None and code == 200:
                    served.redirected.append(self.headers["Authorization"])
                    headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
                    headers["Location"] = f"{served.elsewhere}/{parts[4]}"
                    code, data = 302, b""
            else:
                code = 404
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    template = f"http://127.0.0.1:{listener.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield served
    listener.shutdown()
    listener.server_close()


def test_a_model_of_the_hub_is_one_commit(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """Its parts and nothing else, and the commit is told; a name with a commit gets that one."""
    for files in server.commits.values():
        files["unpickle.json"] = files["evil.safetensors"] = b"not a part of a model folder"
    bundle = load_bundle(hub.located("some/model"))
    assert len(bundle.class_names) == 10 and set(server.fetched) <= set(PARTS)
    assert f"downloaded hf://some/model@{COMMITS['main']}" in capsys.readouterr().err
    server.fetched.clear()
    old = hub.located(f"hf://some/model@{COMMITS['old']}")
    assert old.name == COMMITS["old"] and hub.located("hf://some/model@old") == old


@pytest.mark.usefixtures("server")
def test_a_branch_that_moves_while_it_is_fetched_gives_the_commit_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = huggingface_hub.HfApi.model_info

    def moves(self: Any, *names: str, **how: Any) -> Any:
        info = true(self, *names, **how)
        monkeypatch.setitem(COMMITS, "main", COMMITS["old"])
        return info

    before = COMMITS["main"]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", moves)
    assert hub.located("some/model").name == before


def test_what_was_fetched_is_used_when_the_hub_is_away(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.located("some/model")

    def away(*_: object, **__: object) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", away)
    assert hub.located(f"hf://some/model@{COMMITS['main']}") == first
    assert server.fetched


def test_load_takes_the_hubs_own_arguments(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit, a token, a folder for what is fetched, and asking nobody, as in diffusers."""
    asked: list[dict[str, Any]] = []
    true = huggingface_hub.HfApi.model_info

    def seen(self: Any, *names: str, **how: Any) -> Any:
        asked.append(how)
        return true(self, *names, **how)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", seen)
    elsewhere = tmp_path / "elsewhere"
    pipe = load("some/model", revision="old", token="hf_secret", cache_dir=elsewhere)
    assert len(pipe.class_names) == 10 and asked[0]["token"] == "hf_secret" and asked[0]["revision"] == "old"
    assert list(elsewhere.glob(f"models--some--model/snapshots/{COMMITS['old']}/*.json"))
    before = len(asked), len(server.fetched)
    load("some/model", revision=COMMITS["old"], cache_dir=elsewhere, local_files_only=True)
    assert (len(asked), len(server.fetched)) == before, "nobody is asked"
    with pytest.raises(CheckpointError, match="could not be fetched"):
        load("some/model", revision=COMMITS["main"], cache_dir=elsewhere, local_files_only=True)
    with pytest.raises(UsageError, match=r"^revision: 'main' is given, and the name says old; give one$"):
        load("hf://some/model@old", revision="main")


@pytest.mark.parametrize("given", [{"revision": "main"}, {"token": "x"}, {"local_files_only": True}])
def test_arguments_of_the_hub_mean_nothing_for_a_folder(model_folder: Path, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(given))}: only valid for a hub repository"):
        load(model_folder, **given)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("huge", "would take 1,000,0"),
        ("silent", "does not tell the size of 'model.safetensors'"),
        ("incomplete", "config.json"),
        ("other weights", "its sha256 is not the one in manifest.json"),
        ("cut", "bytes, "),
        ("larger", "but the hub announced 10"),
        ("nowhere", "could not be fetched as a hub repository"),
    ],
)
def test_a_hub_that_lies_is_refused(server: Hub, lie: str, words: str) -> None:
    name = "some/model"
    for files in server.commits.values():
        if lie == "incomplete":
            del files["config.json"]
        elif lie == "other weights":
            changed = bytearray(files["model.safetensors"])
            changed[-1] ^= 1
            files["model.safetensors"] = bytes(changed)
        elif lie == "cut":
            files["model.safetensors"] = files["model.safetensors"][:-10]
    if lie == "huge":
        server.sizes["model.safetensors"] = 10**12
    elif lie == "larger":
        server.sizes["model.safetensors"] = 10
    elif lie == "silent":
        server.sizes["model.safetensors"] = None
    elif lie == "nowhere":
        name = "hf://some/model@nosuch"
    with pytest.raises(CheckpointError) as caught:
        load_bundle(hub.located(name))
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    if lie in ("huge", "silent", "nowhere"):
        assert not server.fetched, "nothing was fetched"


class Elsewhere:
    """Another host, to which a hub redirects downloads. `changes` maps names of files to what it gives instead."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.asked: list[tuple[str, str | None]] = []  # the file, and the token that was sent along
        self.changes: dict[str, bytes] = {}
        other = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/")
                other.asked.append((name, self.headers["Authorization"]))
                data = other.changes.get(name, files[name])
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://localhost:{self.listener.server_port}"
        threading.Thread(target=self.listener.serve_forever, daemon=True).start()


@pytest.fixture
def elsewhere(server: Hub) -> Iterator[Elsewhere]:
    other = Elsewhere(server.commits[COMMITS["main"]])
    server.elsewhere = other.address
    yield other
    other.listener.shutdown()
    other.listener.server_close()


def test_a_redirected_download_takes_no_token_along(server: Hub, elsewhere: Elsewhere, tmp_path: Path) -> None:
    pipe = load("some/model", token="hf_secret", cache_dir=tmp_path / "fetched")
    assert len(pipe.class_names) == 10
    assert {name for name, _ in elsewhere.asked} == set(server.commits[COMMITS["main"]])
    assert all(token is None for _, token in elsewhere.asked), "the other host must not learn the token"
    assert server.redirected and set(server.redirected) == {"Bearer hf_secret"}, "the hub itself is shown the token"


@pytest.mark.parametrize("lie", ["other weights", "cut", "longer", "a page"])
def test_what_a_redirected_download_gives_is_checked(server: Hub, elsewhere: Elsewhere, lie: str) -> None:
    weights = server.commits[COMMITS["main"]]["model.safetensors"]
    elsewhere.changes["model.safetensors"] = {
        "other weights": weights[:-1] + bytes([weights[-1] ^ 1]),
        "cut": weights[:-10],
        "longer": weights + b"more",
        "a page": b"<html>log in first</html>",
    }[lie]
    with pytest.raises(CheckpointError) as caught:
        load_bundle(hub.located("some/model"))
    assert "\n" not in str(caught.value) and elsewhere.asked
