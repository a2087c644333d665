import hashlib
import json
import os
import resource
import socket
import tarfile

import numpy as np
import pytest
import webdataset
from conftest import jpeg, samples

from multimodal_fm.corpus import index, storage
from multimodal_fm.corpus.shards import Config, Corpus, list_shards, write
from multimodal_fm.errors import UserError
from multimodal_fm.tokenizers import base, image


def whole(path):
    made = index.build(str(path))
    spans = {made.key(i): made.spans(i) for i in range(len(made))}
    made.file.unlink()
    return spans


def scan(path):
    """Key and extensions of every sample of a shard, and what is refused."""
    made = index.build(str(path))
    return [(made.key(i), list(made.spans(i))) for i in range(len(made))], made.rejections


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


def test_folders_and_extensions_belong_as_webdataset_has_it(tmp_path):
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
    assert all("jpg" not in extensions for key, extensions in entries if key == "sample0003")
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
    assert [extensions for key, extensions in entries if key == "sample0002"] == [["cls", "flac", "json", "txt"]]
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
        special = {"link.txt": tarfile.SYMTYPE, "pipe.txt": tarfile.FIFOTYPE}
        for name in ("../up.txt", "/abs.txt", *special, "good.txt"):
            member = tarfile.TarInfo(name)
            member.type = special.get(name, tarfile.REGTYPE)
            archive.addfile(member)
    entries, refused = scan(str(path))
    assert [key for key, _ in entries] == ["good"] and len(refused) == 4 and {r.reason for r in refused} == {"name"}


def test_keys_that_come_again(tmp_path):
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
    corpus = Corpus(Config(str(tmp_path / "b.txt"), piece_bytes=256))
    pieces = [corpus.raw(i)["txt"] for i in range(len(corpus))]
    assert all(len(p) <= 256 for p in pieces) and len(pieces) < 40
    assert "".join(p.decode() for p in pieces) == text  # no piece ends inside a character, nothing is lost


def test_a_copied_shard_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write(path, samples(3))
    made = index.build(str(path))
    os.utime(path, ns=(0, 12345))
    assert index.open_index(str(path)).head["tables"] == made.head["tables"]
    monkeypatch.setattr(index, "hash_shard", lambda *_: pytest.fail("hashed again"))
    assert index.open_index(str(path)).head["version"] == "12345"


class Series(base.Tokenizer):
    """A tokenizer from elsewhere: a number in each byte."""

    extensions = ("series",)

    class Config:
        pass

    def measure(self, data, length):
        return length, data[0]


class Thumbnails(Series):
    extensions = ("jpg",)


def test_an_index_takes_the_measures_of_any_tokenizer(tmp_path):
    """One that was built without the run's tokenizer has 0, 0 for its extension, and is built again."""
    made = [{"__key__": f"k{i}", "series": bytes([7 + i, 1, 2]), "jpg": jpeg((9, 9, 9))} for i in range(3)]
    write(tmp_path / "a.tar", made)
    config = Config(str(tmp_path / "a.tar"))
    plain = Corpus(config)
    assert plain.measures(1)["series"] == (3, 0, 0) and plain.measures(1)["jpg"][1:] == (40, 30)
    own = Corpus(config, tokenizers=[Series(), image.Tokenizer()])
    assert own.measures(1)["series"] == (3, 3, 8) and own.measures(1)["jpg"][1:] == (40, 30)
    stamp = os.stat(own.indexes[0].file).st_mtime_ns
    for tokenizers in ([Series()], [image.Tokenizer()], []):  # whoever asks for no other measures takes what is there
        again = Corpus(config, tokenizers=tokenizers)
        assert again.measures(1)["series"] == (3, 3, 8) and os.stat(again.indexes[0].file).st_mtime_ns == stamp
    other = Corpus(config, tokenizers=[Thumbnails(), image.Tokenizer()])
    assert other.measures(1)["jpg"][2] == 255  # the first of the two that read it
    assert Corpus(config, tokenizers=[image.Tokenizer()]).measures(1)["jpg"][1:] == (40, 30)
    assert plain.fingerprint() == own.fingerprint() == other.fingerprint()


def _forge(file, head=None, tables=None):
    """Writes another head, or other tables, with the right checksums."""
    data = file.read_bytes()
    length = int.from_bytes(data[12:16], "little")
    old = json.loads(data[32 : 32 + length])
    tables = data[32 + length :] if tables is None else tables(bytearray(data[32 + length :]))
    new = old | {"tables": hashlib.sha256(tables).hexdigest()}
    text = json.dumps(new if head is None else head(new)).encode()
    file.write_bytes(index._preamble(text) + text + tables)


HEADS = [
    *({}, {"samples": -1}, {"samples": 1e9}, {"samples": 2**70}, {"size": None}, {"measured_by": []}),
    *({"extensions": [1]}, {"extension_sets": [["exe"]]}, {"extension_sets": [[[]]]}),
    *({"rejections": [["a"]]}, {"rejections": 5}),
]


@pytest.mark.parametrize("change", HEADS)
def test_a_head_that_somebody_made_up_is_built_again(tmp_path, change):
    write(tmp_path / "a.tar", samples(3))
    before = Corpus(Config(str(tmp_path / "a.tar"))).indexes[0]
    content = before.file.read_bytes()
    _forge(before.file, lambda head: head | change if change else [head])
    with pytest.raises(index.Damaged):
        index.Index(before.shard, before.file)
    assert len(Corpus(Config(str(tmp_path / "a.tar")))) == 3 and before.file.read_bytes() == content


@pytest.mark.parametrize("table", ["extension", "extension_set_ids", "member_starts", "key_starts"])
def test_tables_that_somebody_made_up_are_refused_in_one_line(tmp_path, table):
    write(tmp_path / "a.tar", samples(3))
    made = index.build(str(tmp_path / "a.tar"))
    starts = np.cumsum([0, *(len(t.tobytes()) for t in made._tables)])
    at = {"extension": starts[0] + 24, "member_starts": starts[1] + 4, "extension_set_ids": starts[2],
          "key_starts": starts[3] + 4}[table]  # fmt: skip

    def change(tables):
        tables[at : at + 2] = b"\xff\xff"
        return tables

    _forge(made.file, tables=change)
    with pytest.raises(UserError, match="a.tar: its index .*a.tar.mmidx is damaged; .*--rebuild"):
        Corpus(Config(str(tmp_path / "a.tar"))).raw(0)


@pytest.mark.parametrize("given", [(-1, 2**40), ("wide", 0), None])
def test_a_measure_that_no_index_can_hold_costs_nothing(tmp_path, monkeypatch, given):
    monkeypatch.setattr(Series, "measure", lambda *_: given)
    write(tmp_path / "a.tar", [{"__key__": "k", "series": b"12"}])
    [length, a, b] = Corpus(Config(str(tmp_path / "a.tar")), tokenizers=[Series()]).measures(0)["series"]
    assert (length, a) == (2, 0) and b in (0, 2**32 - 1)


@pytest.mark.parametrize("before", ["none", "damaged", "of another version"])
def test_nothing_is_written_beside_the_shards_of_somebody_else(tmp_path, monkeypatch, before):
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "a.tar", samples(3))
    if before != "none":
        index.build(str(tmp_path / "a.tar"))
        file = tmp_path / "a.tar.mmidx"
        data = file.read_bytes()
        file.write_bytes(data[:200] if before == "damaged" else data[:8] + b"\1" + data[9:])
    here = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for _ in range(2):
        corpus = Corpus(Config(str(tmp_path / "a.tar")), write_index=False)
        assert len(corpus) == 3 and corpus.indexes[0].file.is_relative_to(tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == here


def test_a_group_that_no_sample_has_is_refused(tmp_path):
    write(tmp_path / "a.tar", samples(8))
    write(tmp_path / "late.tar", [{"__key__": f"k{i}", "json": {"n": i} | ({"late": 1} if i > 3000 else {})}
                                  for i in range(4000)])  # fmt: skip
    (tmp_path / "b.txt").write_text("words")
    for group in ("color", "captions.en"):
        Corpus(Config(str(tmp_path / "a.tar"), group=group))
    Corpus(Config(str(tmp_path / "late.tar"), group="late"))
    for group in ("colour", "captions.de", "color.name"):
        with pytest.raises(UserError, match=f"source pets: no sample .* group={group} .*has color, language, captions"):
            Corpus(Config(str(tmp_path / "a.tar"), group=group), "pets")
    with pytest.raises(UserError, match="group=color names; they have no JSON"):
        Corpus(Config(str(tmp_path / "b.txt"), group="color"))


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


def test_samples_are_kept_by_their_json(tmp_path):
    write(tmp_path / "a.tar", samples(8))
    corpus = Corpus(Config(str(tmp_path / "a.tar"), where={"color": "red", "captions.en": "red"}))
    assert [corpus.key(i) for i in range(len(corpus))] == ["sample0000", "sample0004"]
    with pytest.raises(UserError, match="color=pink"):
        Corpus(Config(str(tmp_path / "a.tar"), where={"color": "pink"}))


def test_files_that_cannot_be_sources(tmp_path, monkeypatch):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="mmfm pack"):
        list_shards(str(tmp_path / "*.gz"))
    with pytest.raises(UserError, match="no file matches"):
        list_shards(str(tmp_path / "*.tar"))
    with pytest.raises(UserError, match=r"shards: no file matches data/fotos$"):
        monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("the network was asked"))
        list_shards("data/fotos")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"is a folder; name shards, '.*/\*\.tar'"):
        list_shards(str(tmp_path))
    (tmp_path / "broken.jsonl").write_text("{\n[]\n")
    corpus = Corpus(Config(str(tmp_path / "broken.jsonl")))
    assert [corpus.json(i) for i in range(2)] == [{}, {}]
    assert json.loads(corpus.raw(1)["json"]) == []
