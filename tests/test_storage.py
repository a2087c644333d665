"""Bytes by range from a server that fails in every way: the right ones, or a named loss; and a cache never in the way.

The faults are numbered as at the head of test_faults.py.
"""

import errno
import http.server
import os
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import samples, tiny
from test_stream import fitted

from multimodal_fm.config import build
from multimodal_fm.corpus import index, shards, storage
from multimodal_fm.errors import SampleError, UserError
from multimodal_fm.stream.tasks import steps_of
from multimodal_fm.stream.workers import Loader

pytest.importorskip("aiohttp")


class Shelf(http.server.ThreadingHTTPServer):
    """Files by name, given out by range. `trouble(number, method, name, start)` says what goes wrong with a request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.marks: dict[str, dict[str, str]] = {}  # headers by file, such as its ETag
        self.trouble = lambda *_: ""
        self.asked: list[tuple] = []  # method, name, first byte
        self.let_go = threading.Event()
        self.lock = threading.Lock()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        name, shelf = self.path.lstrip("/"), self.server
        span = self.headers.get("Range", "").removeprefix("bytes=")
        start = int(span.partition("-")[0]) if span else 0
        with shelf.lock:
            number = len(shelf.asked)
            shelf.asked.append((self.command, name, start))
        what = shelf.trouble(number, self.command, name, start)
        if what == "drop":
            return self.cut()
        if what.isdigit() or name not in shelf.files:
            return self.send_error(int(what or 404))
        whole = shelf.files[name]
        stop = min(int(span.partition("-")[2] or len(whole)) + 1, len(whole)) if span else len(whole)
        if what == "whole":  # a server that knows no ranges
            span, start, stop = "", 0, len(whole)
        body = b"<html>busy</html>" if what == "page" else whole[start:stop]
        self.send_response(206 if span and what != "page" else 200)
        told = {"fewer": max(0, len(body) - 7), "more": len(body) + 7}.get(what, len(body))
        if what != "no length":
            self.send_header("Content-Length", str(told))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(whole)}")
        for field, value in shelf.marks.get(name, {}).items():
            self.send_header(field, value)
        if what in ("no length", "more"):
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        if what == "stall":
            shelf.let_go.wait(10)
            return self.cut()
        if what in ("reset", "half"):
            self.wfile.write(body[: len(body) // 2])
            return self.cut(reset=what == "reset")
        self.wfile.write(body[:told])

    def cut(self, reset=False):
        """End the connection without another word."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self):
        with suppress(OSError):  # we, or the client, have ended it
            super().handle()

    def finish(self):
        with suppress(OSError, ValueError):
            super().finish()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "PAUSE", 0.001)
    monkeypatch.setattr(storage, "PIECE", 4096)
    monkeypatch.setattr(storage, "_written", 0)
    storage.forget("")
    shelf = Shelf()
    thread = threading.Thread(target=shelf.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield shelf
    shelf.let_go.set()
    shelf.shutdown()
    shelf.server_close()
    storage.forget("")


DATA = np.random.default_rng(0).bytes(20_000)  # five pieces, the last of them short


def put(shelf, name="a.bin", data=DATA, **marks):
    shelf.files[name], shelf.marks[name] = data, marks or {"ETag": '"1"'}
    return shelf.url(name)


def kept() -> list[Path]:
    return sorted(p for p in (storage.cache_folder() / "pieces").rglob("*") if p.is_file())


@contextmanager
def counted(shelf):
    """The requests for bytes that are made inside."""
    before, found = len(shelf.asked), []
    yield found
    found += [row for row in shelf.asked[before:] if row[0] == "GET"]


# --- what a read gives ---


def test_any_range_is_the_one_of_the_file(shelf, tmp_path):
    url, local = put(shelf), tmp_path / "a.bin"
    local.write_bytes(DATA)
    for offset, length in ((0, 1), (0, 20_000), (4095, 2), (4096, 4096), (8191, 8194), (19_999, 9), (20_000, 5),
                           (25_000, 512), (12_288, 0), (5, 0)):  # fmt: skip
        assert storage.read(url, offset, length) == storage.read(str(local), offset, length), (offset, length)
    assert storage.size(url) == 20_000


def test_what_was_read_is_not_asked_for_again(shelf):
    url = put(shelf)
    with counted(shelf) as first:
        storage.read(url, 0, 20_000)
    with counted(shelf) as second:
        assert storage.read(url, 0, 20_000) == DATA
    assert len(first) == 5 and not second


# --- 51: a server that fails ---

SOMETIMES = ["503", "500", "429", "drop", "reset", "half", "fewer", "more", "page", "whole"]


@pytest.mark.parametrize("what", SOMETIMES)
def test_a_server_that_fails_now_and_then_gives_the_exact_bytes(shelf, what):
    """51. Every second request fails, those for the size too (that is believed where one comes)."""
    url = put(shelf)
    lies = what in ("fewer", "more", "page")
    shelf.trouble = lambda number, method, *_: what if number % 2 == 0 and not (lies and method == "HEAD") else ""
    assert storage.stamp(url) == (20_000, '"1"')
    assert storage.read(url, 0, 20_000) == DATA
    assert len(shelf.asked) > 10


@pytest.mark.parametrize("what", [*SOMETIMES, "404"])
def test_a_server_that_always_fails_is_named_after_a_few_attempts(shelf, what):
    """51."""
    url = put(shelf)
    storage.stamp(url), storage._known(url)
    shelf.trouble = lambda *_: what
    with counted(shelf) as asked, pytest.raises(SampleError) as error:
        storage.read(url, 0, 4096)
    assert error.value.reason == "read" and url in error.value.detail
    assert len(asked) in ((1,) if what == "404" else (storage.ATTEMPTS, 2 * storage.ATTEMPTS))  # aiohttp tries twice
    assert not kept()


@pytest.mark.parametrize("what", ["503", "drop"])
def test_a_size_that_cannot_be_had_is_asked_for_again(shelf, what):
    """51. fsspec calls it "not found" when the connection breaks before a size came; that is no answer."""
    url = put(shelf)
    shelf.trouble = lambda number, *_: what if number < 4 else ""
    assert storage.size(url) == 20_000
    shelf.trouble = lambda *_: what
    with pytest.raises(OSError, match="attempts"):
        storage.size(url)
    shelf.trouble = lambda *_: ""
    with counted(shelf) as asked, pytest.raises(OSError, match="not there"):
        storage.size(shelf.url("other.bin"))
    assert len(asked) == 1


def test_a_server_that_stalls_is_given_up(shelf, monkeypatch):
    """51."""
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    url = put(shelf)
    stalled = []
    shelf.trouble = lambda number, method, name, start: stalled.append(1) or "stall" if len(stalled) < 2 else ""
    storage._known(url)
    assert storage.read(url, 0, 4096) == DATA[:4096]
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    shelf.trouble = lambda *_: "stall"
    with pytest.raises(SampleError, match="read: .*2 attempts"):
        storage.read(url, 4096, 4096)


def test_a_server_that_does_not_say_how_long_a_file_is(shelf):
    """51."""
    url = put(shelf, "a.tar")
    shelf.trouble = lambda *_: "no length"
    with pytest.raises(OSError, match="how long it is"):
        storage.size(url)
    with pytest.raises(UserError, match="a.tar: the server does not say how long"):
        shards.Corpus(shards.Config(url))


def test_a_shard_that_the_server_does_not_have_is_named(shelf):
    """8, 51."""
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+/none.tar: .*not there"):
        shards.Corpus(shards.Config(shelf.url("none.tar")))


# --- Must show 7: the same samples as from files on disk ---


def contents(step) -> list:
    return [t for b in step.batches for t in (*(b.content[k] for k in sorted(b.content)), b.tokens.position)]


def shards_in(folder: Path) -> list[Path]:
    folder.mkdir()
    for i in range(3):
        shards.write(folder / f"train-{i}.tar", samples(20, 20 * i))
    return sorted(folder.glob("*.tar"))


def steps_over(places: list, run: Path):
    data = tiny(run, run=str(run))
    data["sources"] = {"all": {"shards": [str(place) for place in places], "group": "color"}}
    config, corpora = fitted(build(data))
    return steps_of(config, corpora), corpora


@pytest.mark.parametrize(("workers", "how"), [(0, "threads"), (2, "threads"), (2, "processes")])
def test_one_dropped_connection_in_ten_changes_no_sample(shelf, tmp_path, workers, how):
    files = shards_in(tmp_path / "files")
    urls = [put(shelf, file.name, file.read_bytes()) for file in files]
    wanted = [steps_over(files, tmp_path / "a")[0][step] for step in range(8)]
    generator = np.random.default_rng(workers)
    fails = generator.random(100_000) < 0.1
    shelf.trouble = lambda number, *_: ("drop", "reset")[number % 2] if fails[number] else ""
    steps, corpora = steps_over(urls, tmp_path / "b")
    for piece in kept():
        piece.unlink()  # what was kept when the index was made; now all is asked for again
    with counted(shelf) as asked:
        found = list(Loader(steps, 0, 8, workers, how))
    assert sum(fails[: len(shelf.asked)]) > 5 and len(asked) > 30
    for one, other in zip(wanted, found, strict=True):
        assert one.keys == other.keys and one.counts == other.counts and not other.lost
        assert all(torch.equal(a, b) for a, b in zip(contents(one), contents(other), strict=True))
    local = shards.Corpus(shards.Config([str(file) for file in files]))
    for sample in range(len(local)):
        assert corpora["all"].read(sample) == local.read(sample)
    assert corpora["all"].fingerprint() == local.fingerprint()


def test_a_range_that_never_comes_costs_its_items_and_no_others(shelf, tmp_path):
    """51. The ledger says "read", another sample stands in, no position shifts."""
    files = shards_in(tmp_path / "files")
    urls = [put(shelf, file.name, file.read_bytes()) for file in files]
    wanted = [steps_over(files, tmp_path / "a")[0][step] for step in range(4)]
    steps, corpora = steps_over(urls, tmp_path / "b")
    for piece in kept():
        piece.unlink()
    shelf.trouble = lambda n, method, name, start: "503" if (name, start) == ("train-1.tar", 8192) else ""
    corpus, hit = corpora["all"], set()
    for i in range(len(corpus)):
        spans = corpus._place(i)[0].spans(corpus._place(i)[1]).values()
        if corpus.shard(i) == urls[1] and any(start < 12_288 and start + length > 8192 for start, length, _ in spans):
            hit.add(corpus.key(i))
    assert 1 <= len(hit) < 10
    found = [steps[step] for step in range(4)]
    lost = [row for step in found for row in step.lost]
    assert lost and {row["key"] for row in lost} <= hit and {row["reason"] for row in lost} == {"read"}
    for one, other in zip(wanted, found, strict=True):
        for (task, place, name), (*there, there_name) in zip(sorted(one.keys), sorted(other.keys), strict=True):
            assert [task, place] == there and (name == there_name or name.partition("/")[2] in hit)


# --- 52 to 56: the cache ---


def test_two_files_of_one_name_are_kept_apart(shelf):
    """52."""
    other = DATA[::-1]
    one, two = put(shelf, "x/a.bin"), put(shelf, "y/a.bin", other)
    for _ in range(2):
        assert storage.read(one, 0, 20_000) == DATA and storage.read(two, 0, 20_000) == other


@pytest.mark.parametrize("harm", ["cut", "cut to nothing", "longer", "flipped", "check flipped", "swapped"])
def test_a_damaged_piece_in_the_cache_is_fetched_again(shelf, harm):
    """53."""
    url = put(shelf)
    storage.read(url, 0, 8192)
    one, two = kept()
    data = one.read_bytes()
    changed = {
        "cut": data[:100],
        "cut to nothing": b"",
        "longer": data + b"more",
        "flipped": data[:50] + bytes([data[50] ^ 1]) + data[51:],
        "check flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "swapped": data[:-4][::-1] + data[-4:],
    }[harm]
    one.write_bytes(changed)
    with counted(shelf) as asked:
        assert storage.read(url, 0, 8192) == DATA[:8192]
    assert len(asked) == 1 and one.read_bytes() == data


@pytest.mark.parametrize("field", ["ETag", "Last-Modified"])
def test_a_file_that_was_replaced_is_not_read_from_the_cache(shelf, field):
    """54. By its tag, or where the server has none by its time; its size is the same."""
    other = DATA[::-1]
    url = put(shelf, **{field: "Wed, 21 Oct 2015 07:28:00 GMT"})
    assert storage.read(url, 0, 20_000) == DATA
    put(shelf, data=other, **{field: "Wed, 21 Oct 2015 07:28:01 GMT"})
    storage.forget(url)  # as in another process
    assert storage.read(url, 0, 20_000) == other


def test_a_file_of_another_size_is_not_read_from_the_cache(shelf):
    """54. A server that marks nothing."""
    url = put(shelf, Server="plain")
    assert storage.read(url, 0, 20_000) == DATA
    put(shelf, data=DATA[::-1] + b"x", Server="plain")
    storage.forget(url)
    assert storage.read(url, 0, 30_000) == DATA[::-1] + b"x"


def test_a_shard_that_is_replaced_behind_the_run_is_never_delivered(shelf, tmp_path):
    """54. The bytes are compared with the index, whatever the cache holds."""
    [file, *_] = shards_in(tmp_path / "files")
    url = put(shelf, file.name, file.read_bytes())
    corpus = shards.Corpus(shards.Config(url))
    before = corpus.raw(0)
    for piece in kept():
        piece.unlink()
    shards.write(tmp_path / "other.tar", samples(20, 500))
    put(shelf, file.name, (tmp_path / "other.tar").read_bytes()[: len(shelf.files[file.name])])
    for sample in range(len(corpus)):
        members, failed = corpus.read(sample)
        same = {ending for ending in members if sample or members[ending] == before[ending]}
        assert {error.reason for _, error in failed} <= {"crc", "read"} and (failed or same)
    assert corpus.read(1)[1]
    with pytest.raises(UserError, match="is not the file"):
        storage.forget(url)
        put(shelf, file.name, (tmp_path / "other.tar").read_bytes(), ETag='"2"')
        shards.Corpus(shards.Config(url))


def test_many_writers_of_one_piece(shelf):
    """55. Each reads the right bytes at every moment, and nothing is left behind but the pieces."""
    url = put(shelf)
    wrong, together = [], threading.Barrier(8)

    def reader(seed):
        generator = np.random.default_rng(seed)
        together.wait()
        for _ in range(30):
            offset, length = int(generator.integers(0, 20_000)), int(generator.integers(0, 20_000))
            if storage.read(url, offset, length) != DATA[offset : offset + length]:
                wrong.append(offset)
            if pieces := kept():
                with suppress(FileNotFoundError):
                    pieces[int(generator.integers(len(pieces)))].unlink()

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert storage.read(url, 0, 20_000) == DATA and len(kept()) == 5


def test_a_half_written_piece_is_never_seen(shelf, monkeypatch):
    """55. Another reader that looks while a piece is written finds none or all of it."""
    url, seen = put(shelf), []
    write = Path.write_bytes

    def slowly(path, data):
        write(path, data[: len(data) // 2])
        seen.append([p.name for p in kept() if p.suffix == ""])
        seen.append(storage._known(url) and not any(p.name.endswith("-0") for p in kept()))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", slowly)
    assert storage.read(url, 0, 4096) == DATA[:4096]
    assert seen == [[], True] and len(kept()) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_disk_is_gone_round(shelf, monkeypatch, code):
    """56. Half of it was written when the disk was full."""
    url, write = put(shelf), Path.write_bytes

    def full(path, data):
        write(path, data[:100])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(2):
        assert storage.read(url, 0, 20_000) == DATA
    assert not kept()


def test_a_cache_that_cannot_be_there_is_gone_round(shelf, tmp_path, monkeypatch):
    """56. A file stands in the folder's place."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "file"))
    assert storage.read(put(shelf), 0, 20_000) == DATA


def test_the_cache_stays_within_its_bound(shelf, monkeypatch):
    """56. What was longest unread goes first."""
    monkeypatch.setattr(storage, "ROOM", 100 * 4100)
    data = DATA * 60
    url = put(shelf, data=data)
    first = data[:4096]
    for start in range(0, len(data), 4096):
        assert storage.read(url, start, 4096) == data[start : start + 4096]
        assert storage.read(url, 0, 4096) == first
        if start % 65_536 == 0:
            assert sum(p.stat().st_size for p in kept()) <= storage.ROOM
    with counted(shelf) as asked:
        storage.read(url, 0, 4096)
        storage.read(url, len(data) - 4096, 4096)
        storage.read(url, 8192, 4096)
    assert [start for _, _, start in asked] == [8192]
    assert sum(row == ("GET", "a.bin", 0) for row in shelf.asked) == 1  # it was read all the time


def test_many_short_runs_stay_within_the_bound_too(shelf, monkeypatch):
    """56. Each keeps only a few pieces; the first of them already looks at what is there."""
    monkeypatch.setattr(storage, "ROOM", 120 * 4100)
    url = put(shelf, data=DATA * 50)
    for start in range(0, 1_000_000, 5 * 4096):
        monkeypatch.setattr(storage, "_written", 0)
        storage.read(url, start, 5 * 4096)
    assert sum(p.stat().st_size for p in kept()) <= storage.ROOM


def test_the_cache_is_not_gone_through_for_every_piece(shelf, monkeypatch):
    looked = []
    real = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, what: looked.append(1) or real(path, what))
    monkeypatch.setattr(storage, "ROOM", 200 * 4100)
    storage.read(put(shelf, data=DATA * 60), 0, len(DATA) * 60)
    assert len(looked) <= 300 // 20 + 1


# --- local files ---


def test_a_file_that_another_thread_lets_go_is_read_to_the_end(tmp_path, monkeypatch):
    """More shards than are kept open at a time: one that is closed while it is read would be another by its number."""
    (tmp_path / "a.bin").write_bytes(DATA)
    real = os.pread

    def later(file, length, offset):
        storage.forget("")  # what another thread does just now
        return real(file, length, offset)

    monkeypatch.setattr(os, "pread", later)
    assert storage.read(str(tmp_path / "a.bin"), 5, 100) == DATA[5:105]


def test_a_read_that_comes_in_pieces_is_whole(tmp_path, monkeypatch):
    """The system gives 2 GiB at a time at most."""
    (tmp_path / "a.bin").write_bytes(DATA)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, offset: real(file, min(length, 700), offset))
    assert storage.read(str(tmp_path / "a.bin"), 5, 19_000) == DATA[5:19_005]


def test_open_files_are_bounded(tmp_path):
    for i in range(400):
        (tmp_path / f"{i}.bin").write_bytes(b"%d" % i)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for i in range(400):
        assert storage.read(str(tmp_path / f"{i}.bin"), 0, 10) == b"%d" % i
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 256
    storage.forget("")


@pytest.mark.parametrize("url", ["pipe:touch here", "pipe:cat a.tar", "exec://touch here", "https:a.tar|x", "zip://a.tar",
                                 "simplecache::http://a/b.tar", "github://a:b@/c.tar", "shell://x"])  # fmt: skip
def test_a_scheme_that_is_not_read_is_refused(url, tmp_path, monkeypatch):
    """18. Chained URLs of fsspec among them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not read|no file matches"):
        shards.Corpus(shards.Config(url))
    assert not list(tmp_path.iterdir())


def test_an_index_of_a_remote_shard_is_kept_and_checked(shelf, tmp_path):
    [file, *_] = shards_in(tmp_path / "files")
    url = put(shelf, file.name, file.read_bytes())
    made = index.opened(url)
    with counted(shelf) as asked:
        again = index.opened(url)
    assert not asked and again.head == made.head and again.whole()
    put(shelf, file.name, file.read_bytes(), ETag='"2"')  # the same bytes put there again
    assert index.opened(url).head == {**made.head, "mark": '"2"'}
