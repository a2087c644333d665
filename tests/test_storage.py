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

from multimodal_fm.corpus import index, shards, storage
from multimodal_fm.errors import SampleError, UserError
from multimodal_fm.stream.loader import Loader
from multimodal_fm.stream.tasks import build_stream, fit_tokenizers
from multimodal_fm.train.config import build

pytest.importorskip("aiohttp")


class Server(http.server.ThreadingHTTPServer):
    """Files by name, given out by range. `trouble(number, method, name, start)` says what goes wrong with a request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.marks: dict[str, dict[str, str]] = {}  # headers by file, such as its ETag
        self.trouble = lambda *_: ""
        self.asked: list[tuple] = []  # method, name, first byte
        self.let_go = threading.Event()
        self.lock = threading.Lock()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def respond(self):
        name, server = self.path.lstrip("/"), self.server
        span = self.headers.get("Range", "").removeprefix("bytes=")
        start = int(span.partition("-")[0]) if span else 0
        with server.lock:
            number = len(server.asked)
            server.asked.append((self.command, name, start))
        what = server.trouble(number, self.command, name, start)
        if what == "drop":
            return self.cut()
        if what.isdigit() or name not in server.files:
            return self.send_error(int(what or 404))
        whole = server.files[name]
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
        for field, value in server.marks.get(name, {}).items():
            self.send_header(field, value)
        if what in ("no length", "more"):
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        if what == "stall":
            server.let_go.wait(10)
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
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "BACKOFF", 0.001)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(storage, "_blocks_written", 0)
    storage.reopen_files()
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.let_go.set()
    server.shutdown()
    server.server_close()
    storage.reopen_files()


DATA = np.random.default_rng(0).bytes(20_000)  # five blocks, the last of them short


def put(server, name="a.bin", data=DATA, **marks):
    server.files[name], server.marks[name] = data, marks or {"ETag": '"1"'}
    return server.url(name)


def cached_blocks() -> list[Path]:
    return sorted(p for p in (storage.cache_folder() / "blocks").rglob("*") if p.is_file())


@contextmanager
def counted(server):
    """The requests for bytes that are made inside."""
    before, found = len(server.asked), []
    yield found
    found += [row for row in server.asked[before:] if row[0] == "GET"]


# --- what a read gives ---


def test_any_range_is_the_one_of_the_file(server, tmp_path):
    url, local = put(server), tmp_path / "a.bin"
    local.write_bytes(DATA)
    for offset, length in ((0, 1), (0, 20_000), (4095, 2), (4096, 4096), (8191, 8194), (19_999, 9), (20_000, 5),
                           (25_000, 512), (12_288, 0), (5, 0)):  # fmt: skip
        assert storage.read(url, offset, length) == storage.read(str(local), offset, length), (offset, length)
    assert storage.stat(url)[0] == 20_000


def test_what_was_read_is_not_asked_for_again(server):
    url = put(server)
    with counted(server) as first:
        storage.read(url, 0, 20_000)
    with counted(server) as second:
        assert storage.read(url, 0, 20_000) == DATA
    assert len(first) == 5 and not second


# --- 51: a server that fails ---

SOMETIMES = ["503", "500", "429", "drop", "reset", "half", "fewer", "more", "page", "whole"]


@pytest.mark.parametrize("what", SOMETIMES)
def test_a_server_that_fails_now_and_then_gives_the_exact_bytes(server, what):
    """51. Every second request fails, those for the size too (that is believed where one comes)."""
    url = put(server)
    lies = what in ("fewer", "more", "page")
    server.trouble = lambda number, method, *_: what if number % 2 == 0 and not (lies and method == "HEAD") else ""
    assert storage.stat(url) == (20_000, '"1"')
    assert storage.read(url, 0, 20_000) == DATA
    assert len(server.asked) > 10


@pytest.mark.parametrize("what", [*SOMETIMES, "404"])
def test_a_server_that_always_fails_is_named_after_a_few_attempts(server, what):
    """51."""
    url = put(server)
    storage.stat(url), storage._cached_stat(url)
    server.trouble = lambda *_: what
    with counted(server) as asked, pytest.raises(SampleError) as error:
        storage.read(url, 0, 4096)
    assert error.value.reason == "read" and url in error.value.detail
    assert len(asked) in ((1,) if what == "404" else (storage.ATTEMPTS, 2 * storage.ATTEMPTS))  # aiohttp tries twice
    assert not cached_blocks()


@pytest.mark.parametrize("what", ["503", "drop"])
def test_a_size_that_cannot_be_had_is_asked_for_again(server, what):
    """51. fsspec calls it "not found" when the connection breaks before a size came; that is no answer."""
    url = put(server)
    server.trouble = lambda number, *_: what if number < 4 else ""
    assert storage.stat(url)[0] == 20_000
    server.trouble = lambda *_: what
    with pytest.raises(OSError, match="attempts"):
        storage.stat(url)[0]
    server.trouble = lambda *_: ""
    with counted(server) as asked, pytest.raises(OSError, match="not there"):
        storage.stat(server.url("other.bin"))[0]
    assert len(asked) == 1


def test_a_server_that_stalls_is_given_up(server, monkeypatch):
    """51."""
    monkeypatch.setattr(storage, "TIMEOUT", 0.2)
    url = put(server)
    stalled = []
    server.trouble = lambda number, method, name, start: stalled.append(1) or "stall" if len(stalled) < 2 else ""
    storage._cached_stat(url)
    assert storage.read(url, 0, 4096) == DATA[:4096]
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    server.trouble = lambda *_: "stall"
    with pytest.raises(SampleError, match="read: .*2 attempts"):
        storage.read(url, 4096, 4096)


def test_a_server_that_does_not_say_how_long_a_file_is(server):
    """51."""
    url = put(server, "a.tar")
    server.trouble = lambda *_: "no length"
    with pytest.raises(OSError, match="how long it is"):
        storage.stat(url)[0]
    with pytest.raises(UserError, match="a.tar: the server does not say how long"):
        shards.Corpus(shards.Config(url))


def test_a_shard_that_the_server_does_not_have_is_named(server):
    """8, 51."""
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+/none.tar: .*not there"):
        shards.Corpus(shards.Config(server.url("none.tar")))


# --- Must show 7: the same samples as from files on disk ---


def contents(step) -> list:
    return [t for b in step.batches for t in (*(b.content[k] for k in sorted(b.content)), b.tokens.position)]


def shards_in(folder: Path) -> list[Path]:
    folder.mkdir()
    for i in range(3):
        shards.write(folder / f"train-{i}.tar", samples(20, 20 * i))
    return sorted(folder.glob("*.tar"))


def steps_over(places: list, run: Path):
    run.mkdir(exist_ok=True)
    sources = {"all": {"shards": [str(place) for place in places], "group": "color"}}
    config = build(tiny(run, run_dir=str(run), sources=sources))
    corpora = {"all": shards.Corpus(config.sources["all"], "all")}
    tokenizers = fit_tokenizers(config.tasks, corpora, config.model.tokenizers, config.seed, run)
    return build_stream(config.tasks, corpora, tokenizers, config.seed), corpora


@pytest.mark.parametrize("workers", [0, 2])
def test_one_dropped_connection_in_ten_changes_no_sample(server, tmp_path, workers):
    files = shards_in(tmp_path / "files")
    urls = [put(server, file.name, file.read_bytes()) for file in files]
    wanted = [steps_over(files, tmp_path / "a")[0][step] for step in range(8)]
    generator = np.random.default_rng(workers)
    fails = generator.random(100_000) < 0.1
    server.trouble = lambda number, *_: ("drop", "reset")[number % 2] if fails[number] else ""
    steps, corpora = steps_over(urls, tmp_path / "b")
    for block in cached_blocks():
        block.unlink()  # what was kept when the index was made; now all is asked for again
    with counted(server) as asked:
        found = list(Loader(steps, 0, 8, workers))
    assert sum(fails[: len(server.asked)]) > 5 and len(asked) > 30
    for one, other in zip(wanted, found, strict=True):
        assert one.samples == other.samples and one.counts == other.counts and not other.errors
        assert all(torch.equal(a, b) for a, b in zip(contents(one), contents(other), strict=True))
    local = shards.Corpus(shards.Config([str(file) for file in files]))
    for sample in range(len(local)):
        assert corpora["all"].read(sample) == local.read(sample)
    assert corpora["all"].fingerprint() == local.fingerprint()


def test_a_range_that_never_comes_costs_its_samples_and_no_others(server, tmp_path):
    """51. The quarantine says "read", another sample stands in, no position shifts."""
    files = shards_in(tmp_path / "files")
    urls = [put(server, file.name, file.read_bytes()) for file in files]
    wanted = [steps_over(files, tmp_path / "a")[0][step] for step in range(4)]
    steps, corpora = steps_over(urls, tmp_path / "b")
    for block in cached_blocks():
        block.unlink()
    server.trouble = lambda n, method, name, start: "503" if (name, start) == ("train-1.tar", 8192) else ""
    corpus, hit = corpora["all"], set()
    for i in range(len(corpus)):
        spans = corpus._locate(i)[0].spans(corpus._locate(i)[1]).values()
        if corpus.shard(i) == urls[1] and any(start < 12_288 and start + length > 8192 for start, length, _ in spans):
            hit.add(corpus.key(i))
    assert 1 <= len(hit) < 10
    found = [steps[step] for step in range(4)]
    lost = [row for step in found for row in step.errors]
    assert lost and {row["key"] for row in lost} <= hit and {row["reason"] for row in lost} == {"read"}
    for one, other in zip(wanted, found, strict=True):
        for (task, place, name), (*there, there_name) in zip(sorted(one.samples), sorted(other.samples), strict=True):
            assert [task, place] == there and (name == there_name or name.partition("/")[2] in hit)


# --- 52 to 56: the cache ---


def test_two_files_of_one_name_are_kept_apart(server):
    """52."""
    other = DATA[::-1]
    one, two = put(server, "x/a.bin"), put(server, "y/a.bin", other)
    for _ in range(2):
        assert storage.read(one, 0, 20_000) == DATA and storage.read(two, 0, 20_000) == other


@pytest.mark.parametrize("harm", ["cut", "cut to nothing", "longer", "flipped", "check flipped", "swapped"])
def test_a_damaged_block_in_the_cache_is_fetched_again(server, harm):
    """53."""
    url = put(server)
    storage.read(url, 0, 8192)
    one, two = cached_blocks()
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
    with counted(server) as asked:
        assert storage.read(url, 0, 8192) == DATA[:8192]
    assert len(asked) == 1 and one.read_bytes() == data


@pytest.mark.parametrize("field", ["ETag", "Last-Modified"])
def test_a_file_that_was_replaced_is_not_read_from_the_cache(server, field):
    """54. By its tag, or where the server has none by its time; its size is the same."""
    other = DATA[::-1]
    url = put(server, **{field: "Wed, 21 Oct 2015 07:28:00 GMT"})
    assert storage.read(url, 0, 20_000) == DATA
    put(server, data=other, **{field: "Wed, 21 Oct 2015 07:28:01 GMT"})
    storage.reopen_files()  # as in another process
    assert storage.read(url, 0, 20_000) == other


def test_a_file_of_another_size_is_not_read_from_the_cache(server):
    """54. A server that marks nothing."""
    url = put(server, Server="plain")
    assert storage.read(url, 0, 20_000) == DATA
    put(server, data=DATA[::-1] + b"x", Server="plain")
    storage.reopen_files()
    assert storage.read(url, 0, 30_000) == DATA[::-1] + b"x"


def test_a_shard_that_is_replaced_behind_the_run_is_never_delivered(server, tmp_path):
    """54. The bytes are compared with the index, whatever the cache holds."""
    [file, *_] = shards_in(tmp_path / "files")
    url = put(server, file.name, file.read_bytes())
    corpus = shards.Corpus(shards.Config(url))
    before = corpus.raw(0)
    for block in cached_blocks():
        block.unlink()
    shards.write(tmp_path / "other.tar", samples(20, 500))
    put(server, file.name, (tmp_path / "other.tar").read_bytes()[: len(server.files[file.name])])
    for sample in range(len(corpus)):
        members, failed = corpus.read(sample)
        same = {ending for ending in members if sample or members[ending] == before[ending]}
        assert {error.reason for _, error in failed} <= {"crc", "read"} and (failed or same)
    assert corpus.read(1)[1]
    with pytest.raises(UserError, match="is not the file"):
        storage.reopen_files()
        put(server, file.name, (tmp_path / "other.tar").read_bytes(), ETag='"2"')
        shards.Corpus(shards.Config(url))


def test_many_writers_of_one_block(server):
    """55. Each reads the right bytes at every moment, and nothing is left behind but the blocks."""
    url = put(server)
    wrong, together = [], threading.Barrier(8)

    def reader(seed):
        generator = np.random.default_rng(seed)
        together.wait()
        for _ in range(30):
            offset, length = int(generator.integers(0, 20_000)), int(generator.integers(0, 20_000))
            if storage.read(url, offset, length) != DATA[offset : offset + length]:
                wrong.append(offset)
            if blocks := cached_blocks():
                with suppress(FileNotFoundError):
                    blocks[int(generator.integers(len(blocks)))].unlink()

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert storage.read(url, 0, 20_000) == DATA and len(cached_blocks()) == 5


def test_a_half_written_block_is_never_seen(server, monkeypatch):
    """55. Another reader that looks while a block is written finds none or all of it."""
    url, seen, replace = put(server), [], os.replace

    def look(old, new):
        seen.append(any(path.name.endswith("-0") for path in cached_blocks()))
        replace(old, new)

    monkeypatch.setattr(os, "replace", look)
    assert storage.read(url, 0, 4096) == DATA[:4096]
    assert seen == [False] and len(cached_blocks()) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_disk_is_no_failure(server, monkeypatch, code):
    """56. Half of it was written when the disk was full."""
    url = put(server)

    def full(path, mode="r", **how):
        if mode == "xb":
            Path(path).write_bytes(DATA[:100])
            raise OSError(code, os.strerror(code))
        return open(path, mode, **how)

    monkeypatch.setattr(storage, "open", full, raising=False)
    for _ in range(2):
        assert storage.read(url, 0, 20_000) == DATA
    assert not cached_blocks()


def test_a_cache_folder_that_cannot_be_made_is_no_failure(server, tmp_path, monkeypatch):
    """56. A file stands in the folder's place."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "file"))
    assert storage.read(put(server), 0, 20_000) == DATA


def test_the_cache_stays_within_its_bound(server, monkeypatch):
    """56. What was longest unread goes first."""
    monkeypatch.setattr(storage, "cache_limit", lambda: 100 * 4100)
    data = DATA * 60
    url = put(server, data=data)
    first = data[:4096]
    for start in range(0, len(data), 4096):
        assert storage.read(url, start, 4096) == data[start : start + 4096]
        assert storage.read(url, 0, 4096) == first
        if start % 65_536 == 0:
            assert sum(p.stat().st_size for p in cached_blocks()) <= storage.cache_limit()
    with counted(server) as asked:
        storage.read(url, 0, 4096)
        storage.read(url, len(data) - 4096, 4096)
        storage.read(url, 8192, 4096)
    assert [start for _, _, start in asked] == [8192]
    assert sum(row == ("GET", "a.bin", 0) for row in server.asked) == 1  # it was read all the time


def test_many_short_runs_stay_within_the_bound_too(server, monkeypatch):
    """56. Each keeps only a few blocks; the first of them already looks at what is there."""
    monkeypatch.setattr(storage, "cache_limit", lambda: 120 * 4100)
    url = put(server, data=DATA * 50)
    for start in range(0, 1_000_000, 5 * 4096):
        monkeypatch.setattr(storage, "_blocks_written", 0)
        storage.read(url, start, 5 * 4096)
    assert sum(p.stat().st_size for p in cached_blocks()) <= storage.cache_limit()


def test_the_cache_is_not_listed_for_every_block(server, monkeypatch):
    looked = []
    real = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, what: looked.append(1) or real(path, what))
    monkeypatch.setattr(storage, "cache_limit", lambda: 200 * 4100)
    storage.read(put(server, data=DATA * 60), 0, len(DATA) * 60)
    assert len(looked) <= 300 // 20 + 1


@pytest.mark.parametrize(("text", "size"), [("10GB", 10**10), ("1.5 GiB", 3 << 29), ("4096", 4096), ("2tb", 2 * 10**12),
                                            ("", 10 << 30), (" 1K ", 1000)])  # fmt: skip
def test_the_bound_of_the_cache_is_given_in_any_unit(monkeypatch, text, size):
    monkeypatch.setenv("MMFM_CACHE_BYTES", text)
    assert storage.cache_limit() == size


@pytest.mark.parametrize("text", ["plenty", "-1", "10XB", "1e9", "٣GB"])
def test_a_bound_that_is_no_size_is_one_line_before_anything_is_read(server, monkeypatch, text):
    monkeypatch.setenv("MMFM_CACHE_BYTES", text)
    with pytest.raises(UserError, match="^MMFM_CACHE_BYTES is bytes as in 256MB or 1GiB, not "):
        shards.Corpus(shards.Config(put(server, "a.tar")))
    assert not server.asked


# --- what is written ---


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, sync):
    path, synced, fsync = tmp_path / ("n" * 255), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file) or fsync(file))
    storage.write_atomic(path, b"one", sync)
    assert path.read_bytes() == b"one" and bool(synced) == sync

    def parts():
        yield b"two"
        assert path.read_bytes() == b"one"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: '.*nnn'$"):
        storage.write_atomic(path, parts(), sync)
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
    storage.write_atomic(str(path), [b"two", b"three"], sync)
    assert path.read_bytes() == b"twothree"


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    storage.write_atomic(tmp_path / "link", b"ours")
    assert (tmp_path / "theirs").read_bytes() == b"theirs" and not (tmp_path / "link").is_symlink()


# --- local files ---


def test_a_file_that_another_thread_lets_go_is_read_to_the_end(tmp_path, monkeypatch):
    """More shards than are kept open at a time: one that is closed while it is read would be another by its number."""
    (tmp_path / "a.bin").write_bytes(DATA)
    real = os.pread

    def later(file, length, offset):
        storage.reopen_files()  # what another thread does just now
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
    storage.reopen_files()


@pytest.mark.parametrize("url", ["pipe:touch here", "pipe:cat a.tar", "exec://touch here", "https:a.tar|x", "zip://a.tar",
                                 "simplecache::http://a/b.tar", "github://a:b@/c.tar", "shell://x"])  # fmt: skip
def test_a_scheme_that_is_not_read_is_refused(url, tmp_path, monkeypatch):
    """18. Chained URLs of fsspec among them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not read|no file matches"):
        shards.Corpus(shards.Config(url))
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_a_store_cannot_list_is_one_line(monkeypatch):
    class Store:
        def glob(self, pattern):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(storage, "BACKOFF", 0.001)
    monkeypatch.setattr(storage, "_filesystem", lambda scheme: Store())
    with pytest.raises(UserError, match=r"^s3://bucket/\*.tar: ConnectionError: no route to host \(5 attempts\)$"):
        shards.list_shards("s3://bucket/*.tar")


def test_an_index_of_a_remote_shard_is_kept_and_checked(server, tmp_path):
    [file, *_] = shards_in(tmp_path / "files")
    url = put(server, file.name, file.read_bytes())
    made = index.open_index(url)
    with counted(server) as asked:
        again = index.open_index(url)
    assert not asked and again.head == made.head and again.is_intact()
    put(server, file.name, file.read_bytes(), ETag='"2"')  # the same bytes put there again
    assert index.open_index(url).head == {**made.head, "version": '"2"'}
