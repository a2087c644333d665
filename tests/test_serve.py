"""The service over an index: what it answers, and what it refuses, on a real server where that matters."""

import asyncio
import contextlib
import io
import json
import os
import re
import resource
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import jpeg, samples, tiny, tone
from PIL import Image

from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Config, Corpus
from multimodal_fm.model import Model
from multimodal_fm.search.base import Item
from multimodal_fm.search.engine import search
from multimodal_fm.search.memory import CorpusIndex
from multimodal_fm.search.query import parse_query
from multimodal_fm.train.config import build

pytest.importorskip("fastapi")
pytest.importorskip("multipart")
pytest.importorskip("prometheus_client")

from starlette.testclient import TestClient

from multimodal_fm.serve import layout, media
from multimodal_fm.serve.batching import Batcher
from multimodal_fm.serve.limits import Guard, Limits, Refused, cookie_value
from multimodal_fm.serve.server import Settings, create_app
from multimodal_fm.serve.start import allowed_hosts, listen, make_server

SERVE = Path(media.__file__).parent
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
FREE = {"rate": 1e6, "burst": 10**6}


@pytest.fixture(scope="module")
def model(tmp_path_factory, corpus):
    torch.manual_seed(0)
    config = build(tiny(corpus, backbone={"width": 32, "depth": 1, "num_heads": 2})).model
    texts = [{"txt": sample["txt"].encode()} for sample in samples(16)]
    config.tokenizers["text"] = config.tokenizers["text"].fit(texts, tmp_path_factory.mktemp("text") / "text")
    return Model(config).eval()


@pytest.fixture(scope="module")
def index(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    shards.write(folder / "a-0.tar", samples(16))
    index = CorpusIndex(model, Corpus(Config(str(folder / "*.tar")), "in"))
    draw = np.random.default_rng(0)
    odd = {
        "bmp": ("image", "picture.bmp", jpeg((9, 9, 9), kind="BMP")),
        "html": ("image", "page.jpg", HOSTILE.encode()),
        "sound": ("audio", "sound.wav", b"\0" * 100),
        "gone": ("image", "gone.jpg", None),
    }
    for name, (modality, file, data) in odd.items():
        if data is not None:
            (folder / file).write_bytes(data)
        add(index, Item(name, modality, str(folder / file), text=name), draw)
    add(index, Item("url", "image", "http://127.0.0.1:9/x.jpg"), draw)
    add(index, Item("words", "text", str(folder / "words.txt"), text=HOSTILE, fields={"note": HOSTILE}), draw)
    add(index, Item("long", "text", str(folder / "long.txt"), text="x" * 30_000_000), draw)
    return index


def add(index, item: Item, draw) -> None:
    vector = draw.standard_normal((1, index.dim))
    index.add([item], (vector / np.linalg.norm(vector)).astype(np.float32))


@pytest.fixture(scope="module")
def client(index, model):
    with client_of(index, model, **FREE) as client:
        yield client


def client_of(index, model, token: str = "", **limits):
    nowhere = Path(os.devnull) / "none"
    app = create_app(index, model, Settings(Limits(**limits), token=token, name="things", map_file=nowhere))
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


@contextlib.contextmanager
def served(index, model, token: str = "", **limits):
    """A real server in a thread; yields its port and the service."""
    settings = Settings(Limits(**{**FREE, **limits}), token=token, name="things", map_file=Path(os.devnull) / "none")
    app = create_app(index, model, settings)
    with listen("127.0.0.1", 0) as listening:
        server = make_server(app, settings.limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            until = time.monotonic() + 30
            while not server.started and time.monotonic() < until:
                time.sleep(0.01)
            yield listening.getsockname()[1], app.state.service
        finally:
            server.should_exit = True
            thread.join(20)


def ask(*parts: dict, **more) -> dict:
    return {"parts": list(parts), **more}


def ids(answer) -> dict[str, list[str]]:
    return {modality: [one["id"] for one in own] for modality, own in answer.json()["results"].items()}


def expected(index, model, parts: list[dict], top: int = 12, **options) -> dict[str, list[str]]:
    found = search(index, model, parse_query(parts), top, **options)
    return {modality: [one.item.id for one in own] for modality, own in found.hits.items()}


def one_line(answer, status: int) -> str:
    """The detail of an answer, which is one line, never a traceback."""
    assert answer.status_code == status, (answer.status_code, answer.text[:300])
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and detail and "\n" not in detail and len(detail) < 600
    assert "Traceback" not in answer.text
    return detail


# ---- what it answers


def test_a_search_finds_what_the_engine_finds(client, index, model):
    parts = [{"text": "a red square"}, {"text": "number", "weight": -0.5}]
    answer = client.post("/search", json=ask(*parts, top=3, where={"color": "red"}))
    assert answer.status_code == 200
    assert ids(answer) == expected(index, model, parts, 3, where={"color": "red"})
    first = answer.json()["results"]["image"][0]
    assert first["fields"]["color"] == "red" and 0 <= first["standing"] <= 100
    assert first["source"] == "a-0.tar" and str(SERVE.anchor) not in first["source"]
    only = client.post("/search", json=ask(*parts, to="audio", top=2))
    assert list(ids(only)) == ["audio"] and len(ids(only)["audio"]) == 2


def test_pictures_sounds_and_items_are_parts_of_a_query(client, index, model):
    picture, sound = jpeg((200, 20, 20)), tone(440)
    item = ids(client.post("/search", json=ask({"text": "blue"}, top=1)))["image"][0]
    request = ask({"image": 0, "weight": 2.0}, {"id": item, "weight": -0.5}, top=4)
    files = [("image", ("x.jpg", picture)), ("audio", ("y.flac", sound))]
    answer = client.post("/search", data={"request": json.dumps(request)}, files=files)
    parts = [{"image": picture, "weight": 2.0}, {"id": item, "weight": -0.5}, {"audio": sound}]
    assert ids(answer) == expected(index, model, parts, 4)
    assert item not in ids(answer)["image"]


def test_vectors_are_those_of_the_model(client, model):
    answer = client.post("/embed", json={"text": ["a red square", "blue"]}).json()
    assert torch.allclose(torch.tensor(answer["vectors"]["text"]), model.embed(text=["a red square", "blue"])["text"])
    picture, sound = jpeg((1, 2, 200)), tone(300)
    answer = client.post("/embed", files=[("image", picture), ("audio", sound)]).json()["vectors"]
    own = model.embed(image=[picture], audio=[sound])
    assert all(torch.allclose(torch.tensor(answer[name]), own[name], atol=1e-6) for name in own)


def test_queries_at_the_same_time_are_one_batch_and_find_the_same(index, model):
    parts = [{"text": f"a {color} square number {n}"} for n in range(6) for color in ("red", "blue")]
    queries = [ask(part, top=1 + n % 2) for n, part in enumerate(parts)]
    queries[5] = ask({"text": "x"}, {"text": "x", "weight": -1})  # cancels out: wrong by itself only
    with client_of(index, model, **FREE) as client:
        service = client.app.state.service
        alone = [client.post("/search", json=query) for query in queries]
        sizes: list[int] = []
        service.batch.wait, service.batch.observe = 1.0, lambda size, seconds: sizes.append(size)
        service.batch.max_batch = len(queries)
        with ThreadPoolExecutor(len(queries)) as pool:
            together = list(pool.map(lambda query: client.post("/search", json=query), queries))
    assert sizes == [len(queries)]
    for query, one, other in zip(queries, alone, together, strict=True):
        assert one.status_code == other.status_code == (422 if query is queries[5] else 200)
        if one.status_code == 200:
            assert ids(one) == ids(other)
            scores = [[hit["score"] for hits in a.json()["results"].values() for hit in hits] for a in (one, other)]
            assert np.allclose(*scores, atol=2e-4)


def test_a_batch_that_fails_tells_each_and_the_next_is_done():
    def work(jobs):
        if "bad" in jobs:
            raise RuntimeError("a defect")
        return [ValueError("its own") if job == "wrong" else job * 2 for job in jobs]

    async def run():
        batch = Batcher(work, wait=0.05)
        first = await asyncio.gather(batch("a"), batch("wrong"), return_exceptions=True)
        second = await asyncio.gather(batch("bad"), batch("b"), return_exceptions=True)
        third = await batch("c")
        assert batch.alive
        batch.close()
        return first, second, third

    first, second, third = asyncio.run(run())
    assert first[0] == "aa" and isinstance(first[1], ValueError)
    assert all(isinstance(one, RuntimeError) for one in second) and third == "cc"


def test_media_come_by_id_and_are_what_the_shard_holds(client, index):
    raw = {sample["__key__"]: sample for sample in samples(16)}
    for modality, member, kind in (("image", "jpg", "image/jpeg"), ("audio", "flac", "audio/flac")):
        item = next(i for i, _ in index.get(list(index._items)) if i.modality == modality and i.key)
        answer = client.get(f"/media/{item.id}")
        assert answer.content == raw[item.key][member] and answer.headers["content-type"] == kind
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
        assert answer.headers["content-disposition"].startswith('inline; filename="sample')
        part = client.get(f"/media/{item.id}", headers={"Range": "bytes=5-9"})
        assert part.status_code == 206 and part.content == raw[item.key][member][5:10]
        assert part.headers["content-range"] == f"bytes 5-9/{len(answer.content)}"
        assert client.get(f"/media/{item.id}", headers={"Range": "bytes=-3"}).content == answer.content[-3:]
        assert one_line(client.get(f"/media/{item.id}", headers={"Range": "bytes=99999999-"}), 416)
        assert client.get(f"/item/{item.id}").json()["key"] == item.key
    small = client.get(f"/media/{item.id if item.modality == 'image' else first(index, 'image')}?thumbnail=true")
    assert small.headers["content-type"] == "image/webp"
    assert max(Image.open(io.BytesIO(small.content)).size) <= media.THUMBNAIL


def first(index, modality: str) -> str:
    return next(i.id for i, _ in index.get(list(index._items)) if i.modality == modality and i.key)


def test_what_is_neither_a_picture_nor_a_sound_is_not_sent(client):
    again = client.get("/media/bmp")
    assert again.headers["content-type"] == "image/png" and Image.open(io.BytesIO(again.content)).size == (40, 30)
    for name in ("html", "sound"):
        assert HOSTILE not in one_line(client.get(f"/media/{name}"), 404)
    assert "/" not in one_line(client.get("/media/gone"), 404)  # no path of this machine
    assert "URL" in one_line(client.get("/media/url"), 404)  # and nothing was fetched from port 9
    text = client.get("/media/words")
    assert text.headers["content-type"].startswith("text/plain") and text.text == HOSTILE


@pytest.mark.parametrize(
    "path",
    ["/media/../../etc/passwd", "/media/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/media/..%5c..%5cx", "/media/%00",
     "/media//etc/passwd", "/media/file:%2F%2F%2Fetc%2Fpasswd", "/media/a-0.tar", "/page.py",
     "/server.py", "/../server.py"],
)  # fmt: skip
def test_a_path_is_no_id(client, path):
    answer = client.get(path)
    assert answer.status_code == 404 and "root:" not in answer.text


def test_a_long_text_is_told_in_part(client):
    assert len(client.get("/item/long").json()["text"]) == 5000
    assert len(client.post("/search", json=ask({"id": "words"}, top=100)).content) < 200_000


def test_something_to_begin_with(client, index):
    items = client.get("/sample?count=9").json()["items"]
    assert {item["modality"] for item in items} == {"text", "image", "audio"} and len(items) <= 9
    assert client.get("/about").json()["counts"] == index.counts()
    assert client.get("/health").json() == {"status": "ok"}


def test_what_is_counted(index, model):
    with client_of(index, model, **FREE) as client:
        client.post("/search", json=ask({"text": "red"}))
        client.post("/search", json=ask({"text": "red"}))
        client.get("/media/nothing/of/that")
        client.get("/search", headers={"Host": "evil.example"})
        said = client.get("/metrics")
    assert said.headers["content-type"].startswith("text/plain")
    assert 'mmfm_requests_total{method="POST",path="/search",status="200"} 2.0' in said.text
    assert 'mmfm_refused_total{reason="host"} 1.0' in said.text
    assert f'mmfm_index_items{{modality="audio"}} {float(index.counts()["audio"])}' in said.text
    assert "mmfm_batch_size_sum 2.0" in said.text and "mmfm_in_flight 1.0" in said.text
    assert "nothing" not in said.text  # paths of clients make no counters


# ---- what it refuses


def bomb(side: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes that announces side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_uploads_that_decode_to_too_much(client):
    for side in (7_000, 50_000):
        assert "pixel-limit" in one_line(client.post("/search", files={"image": bomb(side)}), 413)
    long = io.BytesIO()
    import soundfile

    soundfile.write(long, np.zeros(8000 * 130, np.float32), 8000, format="FLAC")
    assert len(long.getvalue()) < 100_000
    assert "duration-limit" in one_line(client.post("/search", files={"audio": long.getvalue()}), 413)
    assert "duration-limit" in one_line(client.post("/embed", files={"audio": long.getvalue()}), 413)


def test_wrong_content_types(client):
    body = json.dumps(ask({"text": "red"}))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/xml", ""):
        one_line(client.post("/search", content=body, headers={"Content-Type": kind}), 415)
    one_line(client.post("/search", files={"image": ("x.jpg", b"<html>", "image/jpeg")}), 415)
    one_line(client.post("/search", files={"image": ("x.jpg", tone(300), "image/jpeg")}), 415)
    one_line(client.post("/search", files={"audio": ("x.wav", jpeg((1, 1, 1)), "audio/wav")}), 415)
    one_line(client.post("/login", content="token", headers={"Content-Type": "text/plain"}), 415)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "json"), ("{", "json"), ("[]", ""), ("null", ""), ('{"parts": []}', "parts"), ('{"parts": 1}', "parts"),
        ('{"parts": [{"text": ""}]}', "parts[0].text"), ('{"parts": [{"text": "x", "weight": 0}]}', "weight"),
        ('{"parts": [{"text": "x", "weight": 1e999}]}', "weight"), ('{"parts": [{"text": "x", "weight": NaN}]}', ""),
        ('{"parts": [{"text": "x"}], "top": 0}', "top"), ('{"parts": [{"text": "x"}], "top": 1e9}', "top"),
        ('{"parts": [{"text": "x"}], "to": "smell"}', "to"), ('{"parts": [{"text": "x"}], "odd": 1}', "odd"),
        ('{"parts": [{"image": "/etc/passwd"}]}', "parts[0]"), ('{"parts": [{"image": 0}]}', "parts[0]"),
        ('{"parts": [{"text": "x", "id": "y"}]}', "parts[0]"), ('{"parts": [{"text": "\\ud800"}]}', ""),
        ('{"parts": [{"text": "x"}], "where": {"a": 1}}', "where.a"), ('{"parts":' + "[" * 5000, ""),
        ('{"parts": [{"text": "' + "x" * 2001 + '"}]}', "2,000"),
    ],
)  # fmt: skip
def test_bodies_that_cannot_be_understood(client, body, says):
    answer = client.post("/search", content=body.encode(), headers={"Content-Type": "application/json"})
    assert says in one_line(answer, 422).lower()


def test_forms_that_cannot_be_understood(client):
    picture = ("x.jpg", jpeg((1, 2, 3)))
    one_line(client.post("/search", files={"image": picture}, data={"request": "{"}), 422)
    one_line(client.post("/search", files={"other": picture}), 422)
    one_line(client.post("/search", files={"image": picture}, data={"request": '{"parts": [{"image": 1}]}'}), 422)
    one_line(client.post("/search", files=[("image", picture)] * 17), 422)
    head = {"Content-Type": "multipart/form-data"}
    one_line(client.post("/search", content=b"--x", headers=head), 422)
    head["Content-Type"] += "; boundary=x"
    one_line(client.post("/search", content=b"--x\r\n\r\n", headers=head), 422)
    half = jpeg((3, 4, 5), (400, 300))[:900]
    one_line(client.post("/search", files={"image": half}), 422)  # its header is whole


def test_a_text_of_a_megabyte(client):
    assert one_line(client.post("/search", json=ask({"text": "x" * 1_000_000})), 413)


def test_unknown_ids(client):
    assert one_line(client.get("/item/nothing"), 404) and one_line(client.get("/media/nothing"), 404)
    assert one_line(client.post("/search", json=ask({"id": "nothing"})), 404)


def test_other_names_and_other_origins_are_refused(client):
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "10.0.0.1", ""):
        status = 421 if host else 400
        one_line(client.post("/search", json=ask({"text": "x"}), headers={"Host": host}), status)
    for host in ("localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:81"},
                    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
                    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}):  # fmt: skip
        one_line(client.post("/search", json=ask({"text": "x"}), headers=headers), 403)
        one_line(client.get("/media/words", headers=headers), 403)
    assert client.post("/search", json=ask({"text": "x"}), headers={"Origin": "http://localhost"}).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200  # a link to the page is no harm
    assert "access-control-allow-origin" not in client.options("/search").headers


def test_hosts_by_the_address_that_is_listened_at():
    assert allowed_hosts("127.0.0.1") == (["localhost", "127.0.0.1", "::1", "127.0.0.1"], False)
    hosts, any_address = allowed_hosts("0.0.0.0", ["photos.example"])
    assert any_address and {"photos.example", socket.gethostname()} <= set(hosts)


def test_a_token_is_asked_for(index, model):
    with client_of(index, model, token="sesame", **FREE) as client:
        for path in ("/about", "/media/words", "/metrics", "/map", "/openapi.json"):
            answer = client.get(path)
            one_line(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer sesam", "Bearer", "Basic sesame", "Bearer sésame"):
            one_line(client.post("/search", json=ask({"text": "x"}), headers={"Authorization": wrong.encode()}), 401)
        right = {"Authorization": "Bearer sesame"}
        assert client.post("/search", json=ask({"text": "x"}), headers=right).status_code == 200
        assert client.get("/").status_code == client.get("/health").status_code == 200
        one_line(client.post("/login", json={"token": "sesam"}), 401)
        answer = client.post("/login", json={"token": "sesame"})
        cookie = answer.headers["set-cookie"]
        assert answer.status_code == 204 and "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert "sesame" not in cookie and cookie_value("sesame") in cookie
        assert client.get("/media/words").status_code == 200  # by the cookie
        client.cookies.clear()
        one_line(client.get("/media/words", headers={"Cookie": "mmfm=sesame"}), 401)


def test_a_client_that_asks_too_often(index, model, monkeypatch):
    with client_of(index, model, rate=0.05, burst=3) as client:
        statuses = [client.post("/search", json=ask({"text": "x"})).status_code for _ in range(5)]
        refused = client.post("/search", json=ask({"text": "x"}))
        assert statuses[:3] == [200] * 3 and refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert client.get("/about").status_code == 200
    now = [0.0]
    monkeypatch.setattr("multimodal_fm.serve.limits.time.monotonic", lambda: now[0])
    guard = Guard(None, Limits(rate=2.0, burst=3), (), False, "", lambda *_: None)

    def passes(client: str) -> bool:
        try:
            guard.check_rate(client)
        except Refused as error:
            assert error.status_code == 429
            return False
        return True

    assert [passes("a") for _ in range(4)] == [True] * 3 + [False]
    assert passes("b")
    now[0] = 0.4
    assert not passes("a")
    now[0] = 1.0
    assert passes("a") and passes("a") and not passes("a")


def test_a_browser_is_told_to_load_nothing_from_elsewhere(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert page.headers["referrer-policy"] == "no-referrer" and page.headers["x-content-type-options"] == "nosniff"
    for name in ("page.html", "page.css", "page.js"):
        text = (SERVE / name).read_text(encoding="utf-8")
        assert client.get("/" if name == "page.html" else f"/{name}").text == text
        assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.-]+\.\w+", re.sub(r"(?m)^\s*//.*", "", text))
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    html = page.text
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! src=\"/page\.js\")", html)
    again = client.get("/page.js", headers={"If-None-Match": client.get("/page.js").headers["etag"]})
    assert again.status_code == 304


# ---- on a real server


def talk(port: int, data: bytes = b"", timeout: float = 20.0) -> bytes:
    """What is answered to bytes, to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(1 << 16):
                answer += more
    return answer


def post(body: bytes, kind: str = "application/json", path: str = "/search", more: str = "", length: int | None = None):
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n{more}"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


GOOD = json.dumps(ask({"text": "red"}, top=1)).encode()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def upload(port: int, total: int) -> tuple[int, int]:
    """Streams a body of unknown length until an answer comes; returns its status and the bytes that were sent."""
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x.jpg"\r\n\r\n'
    block, sent = b"\xff" * (1 << 20), 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(start), start))
        connection.setblocking(False)
        answer = b""
        pending = b""
        until = time.monotonic() + 60
        while b"\r\n\r\n" not in answer and time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                answer += connection.recv(1 << 16)
            if not pending and sent < total:
                pending, sent = b"%x\r\n%b\r\n" % (len(block), block), sent + len(block)
            with contextlib.suppress(BlockingIOError):
                pending = pending[connection.send(pending) :]
    return status(answer), sent


def test_an_upload_of_a_gigabyte(index, model):
    with served(index, model, max_upload=4_000_000) as (port, service):
        assert status(talk(port, post(GOOD))) == 200
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        announced = talk(port, post(b"", "multipart/form-data; boundary=x", length=10**9))
        assert status(announced) == 413 and b"4,000,000" in announced
        code, sent = upload(port, 10**9)
        assert code == 413 and 4_000_000 < sent < 200_000_000  # it is refused long before it has come
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
        assert status(talk(port, post(GOOD))) == 200
    guard = service.metrics.text().decode()
    assert 'mmfm_refused_total{reason="length"} 2.0' in guard


def test_a_thousand_requests_at_a_time(index, model):
    limits = {"max_queries": 16, "timeout": 60.0}
    with served(index, model, **limits) as (port, service):
        go, work = threading.Event(), service.batch.work
        service.batch.work = lambda jobs: (go.wait(60), work(jobs))[1]
        body = post(GOOD)

        async def one() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(body)
            answer = await reader.read()
            writer.close()
            return answer

        async def all_of_them() -> list[bytes]:
            waiting = [asyncio.ensure_future(one()) for _ in range(1000)]
            until = time.monotonic() + 50
            while sum(task.done() for task in waiting) < 1000 - 16 and time.monotonic() < until:
                await asyncio.sleep(0.02)
            go.set()
            return await asyncio.gather(*waiting)

        answers = asyncio.run(all_of_them())
        statuses = [status(answer) for answer in answers]
        assert (statuses.count(200), statuses.count(429)) == (16, 984)
        assert all(b"retry-after: 1" in answer for answer in answers if status(answer) == 429)
        assert status(talk(port, post(GOOD))) == 200


def take(port: int, path: str, wait: float = 0.0) -> int:
    """The bytes of an answer that come to a client that begins to read it after so many seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        time.sleep(wait)
        taken, room = 0, bytearray(1 << 20)
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv_into(room):
                taken += more
    return taken


def test_clients_that_stall(index, model):
    with served(index, model, timeout=0.6) as (port, _):
        began = time.monotonic()
        assert status(talk(port, post(GOOD[:10], length=len(GOOD)))) == 408  # half of a body
        assert talk(port, b"POST /search HTTP/1.1\r\nHost: local") == b""  # half of a head
        assert talk(port) == b""  # nothing
        slow = socket.create_connection(("127.0.0.1", port), timeout=20)  # drops of a head
        with slow, pytest.raises(OSError):
            for _ in range(100):
                slow.sendall(b"X")
                time.sleep(0.05)
        assert time.monotonic() - began < 12
        assert take(port, "/media/long", wait=4.0) < 30_000_000  # an answer is not taken
        assert take(port, "/media/long") > 30_000_000
        assert status(talk(port, post(GOOD))) == 200


def test_bodies_are_not_held_without_end(index, model):
    """Many that begin an upload and do not end it: the bytes of all together are bounded."""
    with served(index, model, max_memory=3_000_000, max_upload=2_000_000, timeout=5.0) as (port, _):
        kind = "multipart/form-data; boundary=x"
        start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + b"x" * 1_400_000
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(2)]
            for connection in held:
                connection.sendall(post(start, kind, length=1_900_000))
            time.sleep(0.5)
            assert status(talk(port, post(start, kind, length=1_900_000))) == 429
        time.sleep(0.2)
        assert status(talk(port, post(GOOD))) == 200


# ---- the map


def clusters(count: int = 60, dim: int = 24) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Unit vectors of three groups in two modalities that lie apart, as those of a contrastive model do."""
    draw = np.random.default_rng(0)
    groups, modalities = np.arange(count) % 3, [("text", "image")[n // 3 % 2] for n in range(count)]
    centers = np.eye(dim)[:3]
    gap = np.array([5 * np.eye(dim)[3] if one == "text" else 5 * np.eye(dim)[4] for one in modalities])
    vectors = centers[groups] + gap + 0.05 * draw.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), modalities, groups


def test_what_is_alike_lies_together_whatever_modality_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    vectors, modalities, groups = clusters()
    places, method = layout.arrange(vectors, modalities)
    assert method == "t-SNE" and places.shape == (60, 2) and places.min() >= 0 and places.max() <= 1
    distances = np.linalg.norm(places[:, None] - places, axis=-1) + 9 * np.eye(60)
    near = distances.argsort(1)[:, :5]
    assert (groups[near] == groups[:, None]).mean() > 0.9
    others = np.array(modalities)[near] != np.array(modalities)[:, None]
    assert others.mean() > 0.25  # without centering it is 0
    for few in range(1, 4):
        assert np.isfinite(layout.arrange(vectors[:few], modalities[:few])[0]).all()


def test_the_map_is_made_once_and_kept(index, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with ThreadPoolExecutor(1) as pool:
        first = layout.Map(index, tmp_path / "map.json", pool=pool)
        until = time.monotonic() + 60
        while (data := first.get()) is None and time.monotonic() < until:
            time.sleep(0.02)
        assert data and sorted(data["ids"]) == sorted(index._items) and len(data["x"]) == len(index)
        monkeypatch.setattr(layout, "arrange", None)
        assert layout.Map(index, tmp_path / "map.json", pool=pool).get() == data
        (tmp_path / "map.json").write_text('{"of": "another", "map": {}}')
        monkeypatch.setattr(layout, "arrange", lambda vectors, modalities: 1 / 0)
        broken = layout.Map(index, tmp_path / "map.json", pool=pool)
        with pytest.raises(ZeroDivisionError):
            while broken.get() is None:
                time.sleep(0.02)


def test_a_map_whose_process_was_killed_is_made_by_another(index, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    broken = Future()
    broken.set_exception(BrokenExecutor("killed"))
    with ThreadPoolExecutor(1) as pool:
        made = layout.Map(index, tmp_path / "map.json", pool=SimpleNamespace(submit=lambda *_: broken))
        monkeypatch.setattr(layout, "ProcessPoolExecutor", lambda *_, **__: pool)
        with pytest.raises(BrokenExecutor):
            made.get()
        until = time.monotonic() + 60
        while (data := made.get()) is None and time.monotonic() < until:
            time.sleep(0.02)
    assert data and len(data["x"]) == len(index)


def test_a_sample_for_the_map_has_each_modality(index):
    drawn = [item for item, _ in layout.draw(index, 12)]
    assert {item.modality for item in drawn} == {"text", "image", "audio"} and len(drawn) <= 16
    assert drawn == [item for item, _ in layout.draw(index, 12)]


# ---- the description


def check_description(index, model, tmp_path, monkeypatch, examples: int) -> None:
    """What the OpenAPI description allows, and what it forbids, gets answers that it describes."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import positive_data_acceptance

    monkeypatch.setattr(layout, "arrange", lambda vectors, modalities: (np.zeros((len(vectors), 2)), "none"))
    app = create_app(index, model, Settings(Limits(**FREE), ["localhost", "testserver"]))
    with ThreadPoolExecutor(1) as pool:
        app.state.service.map = layout.Map(index, tmp_path / "map.json", pool=pool)
        while app.state.service.map.get() is None:
            time.sleep(0.02)
        description = schemathesis.openapi.from_asgi("/openapi.json", app)
        for result in description.get_all_operations():
            operation = result.ok()
            # That bytes are a picture, that an id is known, or that words do not cancel out no schema can say.
            skipped = [positive_data_acceptance] if operation.path in ("/search", "/embed") else []
            for mode in schemathesis.GenerationMode:
                check_operation(operation.as_strategy(generation_mode=mode), skipped, examples)


def check_operation(strategy, skipped: list, examples: int) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=strategy)
    def check(case):
        case.call_and_validate(excluded_checks=skipped)

    with contextlib.suppress(Unsatisfiable):  # where there are no parameters, nothing about them can be wrong
        check()


def test_the_description_is_true(index, model, tmp_path, monkeypatch):
    check_description(index, model, tmp_path, monkeypatch, 6)


@pytest.mark.slow
def test_the_description_is_true_for_many_requests(index, model, tmp_path, monkeypatch):
    check_description(index, model, tmp_path, monkeypatch, 300)


# ---- the command line


def test_the_command_line_says_what_is_wrong(mmfm, monkeypatch, tmp_path):
    def refused(*words) -> str:
        done = mmfm("serve", tmp_path, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        return done.stderr

    assert "mmfm embed" in refused("--port", 0)
    with listen("127.0.0.1", 0) as taken:
        said = refused("--port", taken.getsockname()[1])
        assert "--port" in said and "in use" in said
    assert "--rate" in refused("--rate", 0)
    monkeypatch.setitem(sys.modules, "multimodal_fm.serve.limits", None)
    assert "multimodal_fm[serve]" in refused()
