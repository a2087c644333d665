import json
import os
import re
import resource
import tarfile
from pathlib import Path

import pytest
import webdataset
from conftest import samples

from multimodal_fm.corpus import index, storage
from multimodal_fm.corpus.shards import Config, Corpus, find, write
from multimodal_fm.errors import REASONS, UserError


def whole(path):
    made = index.build(str(path))
    spans = {made.key(i): made.spans(i) for i in range(len(made))}
    made.file.unlink()
    return spans


def scan(path):
    """Key and endings of every sample of a shard, and what is refused."""
    made = index.build(str(path))
    return [(made.key(i), list(made.spans(i))) for i in range(len(made))], made.refused


def test_what_is_written_is_read_also_by_webdataset(tmp_path):
    made = samples(6)
    write(tmp_path / "a.tar", made)
    write(tmp_path / "b.tar", made)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    corpus = Corpus(Config(str(tmp_path / "a.tar")))
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [corpus.key(i) for i in range(len(corpus))] == [t["__key__"] for t in theirs] == [m["__key__"] for m in made]
    for i, (mine, other) in enumerate(zip(made, theirs, strict=True)):
        raw = corpus.raw(i)
        assert raw.keys() == {k for k in other if not k.startswith("__")} == mine.keys() - {"__key__"}
        assert all(raw[k] == other[k] for k in raw)
        assert corpus.json(i) == mine["json"]


def test_folders_and_endings_belong_as_webdataset_has_it(tmp_path):
    write(
        tmp_path / "a.tar", [{"__key__": "dir.d/x", "JPG": b"1", "seg.png": b"2"}, {"__key__": "dir.e/x", "txt": b"3"}]
    )
    entries, refused = scan(str(tmp_path / "a.tar"))
    assert entries == [("dir.d/x", ["jpg", "seg.png"]), ("dir.e/x", ["txt"])]
    assert not refused


def cut(path, size):
    data = path.read_bytes()
    path.write_bytes(data[:size])


def test_a_cut_shard_gives_what_is_whole(tmp_path):
    path = tmp_path / "a.tar"
    write(path, samples(5))
    entry = whole(path)["sample0003"]
    offset, length, _ = entry["jpg"]
    cut(path, offset + length // 2)
    entries, refused = scan(str(path))
    assert [key for key, _ in entries][:3] == ["sample0000", "sample0001", "sample0002"]
    assert all("jpg" not in endings for key, endings in entries if key == "sample0003")
    assert any(r.reason == "shard" and "byte" in r.detail for r in refused)


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = tmp_path / "a.tar"
    write(path, samples(5))
    data = bytearray(path.read_bytes())
    offset, _, _ = whole(path)["sample0002"]["jpg"]
    data[offset - 512 + 3] ^= 4  # the name, in the header
    path.write_bytes(data)
    entries, refused = scan(str(path))
    assert [key for key, _ in entries] == [f"sample{i:04d}" for i in range(5)]
    assert [endings for key, endings in entries if key == "sample0002"] == [["cls", "flac", "json", "txt"]]
    assert any(r.reason == "shard" and f"byte {offset - 512}" in r.detail for r in refused)


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>" * 100, b"\0" * 10])
def test_what_is_no_archive_is_refused_by_name(tmp_path, data):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    entries, refused = scan(str(path))
    assert not entries and all(r.shard == str(path) for r in refused)
    with pytest.raises(UserError, match="no samples"):
        Corpus(Config(str(path)))


def test_names_that_no_sample_has(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, modality in (("../up.txt", tarfile.REGTYPE), ("/abs.txt", tarfile.REGTYPE), ("link.txt", tarfile.SYMTYPE),
                           ("pipe.txt", tarfile.FIFOTYPE), ("good.txt", tarfile.REGTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type = modality
            archive.addfile(member)
    entries, refused = scan(str(path))
    assert [key for key, _ in entries] == ["good"] and len(refused) == 4 and {r.reason for r in refused} == {"name"}


def test_keys_and_parts_that_come_again(tmp_path):
    path = tmp_path / "a.tar"
    write(path, [{"__key__": "a", "txt": "1"}, {"__key__": "b", "txt": "2"}, {"__key__": "a", "jpg": b"3"}])
    entries, refused = scan(str(path))
    assert entries == [("a", ["txt"]), ("b", ["txt"])]
    assert [(r.key, r.reason) for r in refused] == [("a", "duplicate")]


def test_jsonl_rows_and_paragraphs_are_samples(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "label": 1}\n')
    corpus = Corpus(Config(str(tmp_path / "a.jsonl")))
    assert [corpus.json(i)["text"] for i in range(len(corpus))] == ["one", "two"]
    text = "\n\n".join(["short"] * 30 + ["länger " * 200, "日本語" * 300])
    (tmp_path / "b.txt").write_text(text)
    corpus = Corpus(Config(str(tmp_path / "b.txt"), piece=256))
    pieces = [corpus.raw(i)["txt"] for i in range(len(corpus))]
    assert all(len(p) <= 256 for p in pieces) and len(pieces) < 40
    assert "".join(p.decode() for p in pieces) == text  # no piece ends inside a character, nothing is lost


def test_a_copied_shard_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write(path, samples(3))
    made = index.build(str(path))
    os.utime(path, ns=(0, 12345))
    assert index.opened(str(path)).head["tables"] == made.head["tables"]
    monkeypatch.setattr(index, "digest_of", lambda *_: pytest.fail("hashed again"))
    assert index.opened(str(path)).head["mark"] == "12345"


def test_a_file_stays_open_while_it_is_read(tmp_path, monkeypatch):
    """Two threads may open a shard at once, and the cache keeps one of the two: the other must not close too early."""
    path = tmp_path / "a.tar"
    write(path, samples(3))
    corpus = Corpus(Config(str(path)))
    monkeypatch.setattr(storage, "_open", lambda path, process: open(path, "rb", buffering=0))
    assert corpus.read(1)[1] == []


def test_there_may_be_more_shards_than_open_files(tmp_path):
    """Sixty shards where twenty more files may be opened: indexed first, then opened with their indexes, then read."""
    for number in range(60):
        write(tmp_path / f"{number:02d}.tar", [{"__key__": "k", "txt": f"text {number}"}])
    storage._open.cache_clear()
    opened = [int(name) for name in os.listdir("/proc/self/fd")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened) + 21, hard))
    try:
        for _ in range(2):
            corpus = Corpus(Config(f"{tmp_path}/*.tar"))
            storage._open.cache_clear()
        assert [corpus.raw(sample)["txt"] for sample in range(15)] == [
            f"text {number}".encode() for number in range(15)
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_items_are_kept_by_their_json(tmp_path):
    write(tmp_path / "a.tar", samples(8))
    corpus = Corpus(Config(str(tmp_path / "a.tar"), where={"color": "red", "captions.en": "red"}))
    assert [corpus.key(i) for i in range(len(corpus))] == ["sample0000", "sample0004"]
    with pytest.raises(UserError, match="color=pink"):
        Corpus(Config(str(tmp_path / "a.tar"), where={"color": "pink"}))


def test_files_that_cannot_be_sources(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="mmfm pack"):
        find(str(tmp_path / "*.gz"))
    with pytest.raises(UserError, match="no file matches"):
        find(str(tmp_path / "*.tar"))
    with pytest.raises(UserError, match=r"is a folder; name shards, '.*/\*\.tar'"):
        find(str(tmp_path))
    (tmp_path / "broken.jsonl").write_text("{\n[]\n")
    corpus = Corpus(Config(str(tmp_path / "broken.jsonl")))
    assert [corpus.json(i) for i in range(2)] == [{}, {}]
    assert json.loads(corpus.raw(1)["json"]) == []


def test_the_readme_lists_every_reason():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", text, re.M))
    assert {name: listed.get(name) for name in REASONS} == REASONS
