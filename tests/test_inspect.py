"""mmfm inspect: what a corpus holds, whether it is still what was indexed, what a training run would get."""

import html
import io
import json
import random
import re
import shutil
from pathlib import Path

import malformed
import numpy as np
import pytest
import soundfile
import yaml
from conftest import COLORS, jpeg, samples, tiny, tone
from PIL import Image
from test_malformed import MORE_MEMORY, used
from test_report import Reader, _bytes

from multimodal_fm.cli import app
from multimodal_fm.corpus import index, shards
from multimodal_fm.errors import UserError
from multimodal_fm.inspect.page import GALLERY, gallery
from multimodal_fm.inspect.run import load_tokenizers
from multimodal_fm.inspect.samples import MAX_CHARACTERS, describe_samples
from multimodal_fm.inspect.stats import count_corpus
from multimodal_fm.inspect.summary import summarize
from multimodal_fm.inspect.verify import Damage, open_indexes, verify_shard
from multimodal_fm.tokenizers import text

HOSTILE = '<script>alert("1")</script></p>{{ 7 * 7 }} & \u202e\u05e9\u05dc\u05d5\u05dd'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shard(tmp_path):
    """Eight samples of all three modalities, indexed."""
    path = tmp_path / "a.tar"
    shards.write(path, samples(8))
    index.open_index(str(path))
    return path


def run(capsys, *words) -> tuple[int, str, str]:
    """The command's exit code, its output and what it says besides."""
    capsys.readouterr()
    code = app(["inspect", *map(str, words)], result_action="return_value")
    return code, *capsys.readouterr()


def damaged(path, piece=index.PIECE_BYTES) -> list[tuple[str, str, str]]:
    """(key, part, reason) of what `--verify` finds."""
    damage = Damage()
    verify_shard(str(path), piece, damage)
    assert damage.count == len(damage.rows) and all(row["shard"] == str(path) for row in damage.rows)
    return [(row["key"], row["part"], row["reason"]) for row in damage.rows]


def flip(path, place: int, bit: int = 2) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def rows_of(*paths) -> list[dict]:
    return list(describe_samples(open_indexes([str(p) for p in paths], index.PIECE_BYTES), load_tokenizers()))


# --- what it holds ---


@pytest.fixture
def mixed(tmp_path):
    """Samples of several makeups; texts in members, in JSON, in lines and in plain text."""
    made = samples(6)
    del made[0]["flac"], made[1]["flac"], made[2]["jpg"]
    made[3] = {"__key__": "sample0003", "jpg": jpeg("red", (100, 50)), "json": {"number": 3}}
    made[4] = {"__key__": "sample0004", "png": b"no picture", "json": {"captions": {"en": "abcd", "fr": "efghij"}}}
    made[5]["flac"] = tone(300.0, seconds=30.0, rate=8000)
    shards.write(tmp_path / "mixed.tar", made)
    (tmp_path / "lines.jsonl").write_text('{"text": "one line"}\n{"label": 1}\n' + json.dumps({"text": "x" * 4000}))
    (tmp_path / "plain.txt").write_text("words " * 100)
    return [tmp_path / name for name in ("mixed.tar", "lines.jsonl", "plain.txt")]


def test_counts_are_those_of_the_samples(mixed):
    found = count_corpus(open_indexes(list(map(str, mixed)), 64), load_tokenizers()).data
    pieces = -(-600 // 60)  # ten words to a piece of 64 bytes
    assert (found["shards"], found["samples"]) == (3, 6 + 3 + pieces)
    assert found["bytes"] == sum(path.stat().st_size for path in mixed)
    assert found["combinations"] == {
        "text": 2 + pieces, "text + image": 3, "text + audio": 1, "image": 1, "text + image + audio": 1, "nothing": 1
    }  # fmt: skip
    assert found["together"] == {"text + image": 4, "text + audio": 2, "image + audio": 1, "text + image + audio": 1}
    words, pictures, sounds = (found["modalities"][modality] for modality in ("text", "image", "audio"))
    lengths = [len(f"a {c} square number {i}") for i, c in ((0, "red"), (1, "green"), (2, "blue"), (5, "green"))]
    assert words["samples"] == 4 + 1 + 2 + pieces and words["texts"] == words["samples"] + 1 and words["exact"]
    assert words["bytes"] == sum(lengths) + 10 + 8 + 4000 + 600
    assert words["length"]["min"] == 5 and words["length"]["max"] == 4000
    assert words["cropped_samples"] == 1 and words["cropped_tokens"] == 1000 + 2 - 256
    assert words["tokens_by"] == "bytes / 4"
    assert pictures["samples"] == 5 and pictures["unknown"] == 1 and pictures["pixels"] == 3 * 40 * 30 + 100 * 50
    assert pictures["resolution"]["min"] == [40, 30] and pictures["resolution"]["max"] == [100, 50]
    assert sounds["rates"] == {"16000": 1, "8000": 1} and sounds["hours"] == round(30.5 / 3600, 4)
    assert sounds["cropped_samples"] == 1 and sounds["cropped_seconds"] == round(30 - sounds["window"], 1)
    assert found["tokens"] == sum(one["tokens"] for one in (words, pictures, sounds))


def test_of_many_items_an_even_sample_tells_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr("multimodal_fm.inspect.stats.TEXT_SAMPLES", 100)
    rows = [json.dumps({"text": "x" * 40} if i % 2 else {"label": i}) for i in range(1001)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = count_corpus(open_indexes([str(tmp_path / "a.jsonl")], 2000), load_tokenizers()).data
    words = found["modalities"]["text"]
    assert not words["exact"] and abs(words["samples"] - 500) < 150
    assert abs(words["bytes"] - words["samples"] * 40) <= 20  # both are rounded
    assert sum(found["combinations"].values()) == 1001
    assert any("about" in line for line in summarize(found))


def test_tokens_are_those_of_the_config(tmp_path, corpus, shard):
    settings = (
        text.Tokenizer(text.Config(vocab_size=300))
        .fit([{"txt": b"a red square number"}] * 9, tmp_path / "words")
        .config
    )
    data = tiny(corpus)
    data["model"]["tokenizers"]["text"] |= {"max_tokens": 6, "file": settings.file}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(data))
    tokenizers = load_tokenizers(str(path))
    found = count_corpus(open_indexes([str(shard)], 2000), tokenizers, str(path)).data
    words = found["modalities"]["text"]
    assert words["tokens_by"] == "the trained tokenizer" and words["tokens"] == 8 * 6 and words["cropped_samples"] == 8
    texts = [f"a {color} square number {i}" for i, color in enumerate([*COLORS, *COLORS])]
    exact = sum(len(text.Tokenizer(settings).encode(one)) + 2 for one in texts)
    assert abs(words["tokens"] + words["cropped_tokens"] - exact) <= 8
    assert found["modalities"]["image"]["tokens"] == 8 * 12 and str(path) in "\n".join(summarize(found))
    data["model"]["tokenizers"]["text"]["file"] = str(tmp_path / "none.json")
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match="none.json"):
        load_tokenizers(str(path))


def test_what_is_refused_is_counted_and_named(tmp_path, capsys):
    case = malformed.RECIPES["flip-three"](tmp_path)
    code, out, _ = run(capsys, case.path)
    assert code == 0 and "3: 3 shard" in out and all(f"{case.path} {key}: shard" in out for key in ("a0", "hurt", "b0"))
    refused = json.loads(run(capsys, case.path, "--json")[1])["refused"]
    assert refused["count"] == 3 and refused["reasons"] == {"shard": 3}
    assert [row["key"] for row in refused["first"]] == ["a0", "hurt", "b0"]


# --- the page ---


@pytest.fixture
def page(tmp_path, capsys):
    made = samples(12)
    for sample in made:
        sample["txt"] = HOSTILE
    made[0]["jpg"], made[3]["flac"] = b"no picture", b"no sound"
    shards.write(tmp_path / "<b>.tar", made)
    path = tmp_path / "page.html"
    code, out, _ = run(capsys, tmp_path / "<b>.tar", "--html", path, "--verify")
    assert code == 0 and str(path) in out
    return path.read_text()


def test_the_page_needs_nothing_but_itself(page):
    read = Reader(page)
    links = [v for _, attrs in read.tags for name, v in attrs.items() if name in ("src", "href", "data", "srcset")]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not {"link", "script", "iframe", "object", "base"} & {tag for tag, _ in read.tags}
    assert "@import" not in page and "url(http" not in page
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)
    assert sum(tag == "svg" for tag, _ in read.tags) == 4


def test_hostile_captions_are_text(page):
    assert "<script" not in page and "</p>{{" not in page and "<b>.tar" not in page and "&lt;b&gt;.tar" in page
    assert html.escape(HOSTILE, quote=False).replace('"', "&#34;") in page


def test_the_gallery_shows_and_plays(page):
    read = Reader(page)
    pictures = [attrs for tag, attrs in read.tags if tag == "img"]
    sounds = [attrs for tag, attrs in read.tags if tag == "audio"]
    assert len(pictures) == 11 and len(sounds) == 11  # those that cannot be read are named instead
    assert page.count("image: decode") == 1 and page.count("audio: decode") == 1
    for one in pictures:
        Image.open(io.BytesIO(_bytes(one["src"], "image/jpeg"))).load()
    for one in sounds:
        assert soundfile.info(io.BytesIO(_bytes(one["src"], "audio/flac"))).duration == 0.5


def test_the_gallery_has_something_of_each_makeup(tmp_path):
    shards.write(tmp_path / "a.tar", [{"__key__": f"w{i}", "txt": "words"} for i in range(500)] + samples(2))
    shown = gallery(open_indexes([str(tmp_path / "a.tar")], 2000), load_tokenizers())
    assert 12 <= len(shown) <= GALLERY and {"sample0000", "sample0001", "w0", "w499"} <= {one["key"] for one in shown}


def test_a_page_of_nothing(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"")
    assert run(capsys, tmp_path / "a.tar", "--html", tmp_path / "p.html")[0] == 0
    with pytest.raises(UserError, match="No such file"):
        run(capsys, tmp_path / "a.tar", "--html", tmp_path / "none" / "p.html")


# --- whether it is what was indexed ---


def owner(spans: list, place: int) -> tuple[str, str, str]:
    """Whose byte it is, by the archive's own rules: a header's or padding's is its member's."""
    for key, ending, offset, length in spans:
        if place < offset + -(-length // 512) * 512:
            return key, ending, "crc" if offset <= place < offset + length else "shard"
    return spans[-1][0], "", "shard"


@pytest.mark.parametrize("modality", ["webdataset", "with notes"])
def test_300_flipped_bits_are_all_found_each_in_its_sample(tmp_path, modality):
    path = tmp_path / "a.tar"
    if modality == "webdataset":
        shards.write(path, samples(4))
    else:  # a pax header before each member, and no rule by which its time could be told to be wrong
        members = [
            (f"{key}.{e}", data) for key in ("k1", "k2", "k3") for e, data in malformed.sound_sample(key).items()
        ]
        pieces = (malformed.pax(("mtime", b"1700000000.25")) + malformed.member(*one) for one in members)
        path.write_bytes(b"".join(pieces) + malformed.END)
    one = index.open_index(str(path))
    spans = sorted(
        ((one.key(i), e, offset, length) for i in range(len(one)) for e, (offset, length, _) in one.spans(i).items()),
        key=lambda span: span[2],
    )
    size, draws = path.stat().st_size, random.Random(5)
    for _ in range(300):
        place, bit = draws.randrange(size), draws.randrange(8)
        flip(path, place, bit)
        assert damaged(path) == [owner(spans, place)], place
        flip(path, place, bit)
    assert damaged(path) == []


def test_a_flipped_bit_in_a_text_is_one_row(shard, capsys):
    offset, length, _ = index.open_index(str(shard)).spans(3)["txt"]
    flip(shard, offset + 1)
    assert damaged(shard) == [("sample0003", "txt", "crc")]
    code, out, _ = run(capsys, shard, "--verify")
    assert code == 1 and f"{shard} sample0003 txt: crc" in out
    code, out, _ = run(capsys, shard, "--verify", "--json")
    found = json.loads(out)["damage"]
    assert code == 1 and found["count"] == 1 and found["first"][0]["part"] == "txt"
    code, out, said = run(capsys, shard, "--verify", "--samples", "--json")
    rows = {row["key"]: row for row in map(json.loads, out.splitlines())}
    assert code == 1 and "sample0003 txt: crc" in said
    assert rows["sample0003"]["outcome"] == "partial" and rows["sample0003"]["lost"] == {"text": "crc"}
    assert sum(row["outcome"] == "ok" for row in rows.values()) == 7


def test_permuted_captions_are_found(tmp_path, shard):
    made = samples(8)
    texts = [sample["txt"].ljust(40) for sample in made]
    for turn in (0, 3):
        for i, sample in enumerate(made):
            sample["txt"] = texts[(i + turn) % 8]
        shards.write(tmp_path / "b.tar", made)
        found = damaged(tmp_path / "b.tar")
        assert found == ([(f"sample{i:04d}", "txt", "crc") for i in range(8)] if turn else [])


def test_lines_and_plain_text_are_verified_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "a.txt").write_text("some words\n\n" * 40)
    for name, place, whose in (("a.jsonl", 3, ("0", "json", "crc")), ("a.jsonl", 16, ("2", "json", "shard")),
                               ("a.txt", 200, ("180", "txt", "crc"))):  # fmt: skip
        path = tmp_path / name
        assert damaged(path, 64) == []
        flip(path, place)
        assert damaged(path, 64) == [whose]
        flip(path, place)


def test_a_cut_shard_is_damaged_however_it_was_indexed(tmp_path):
    path = tmp_path / "a.tar"
    shards.write(path, samples(5))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert [reason for _, _, reason in damaged(path)] == ["shard"]  # now indexed as it is
    assert [reason for _, _, reason in damaged(path)] == ["shard"]
    path.write_bytes(data)
    index.build(str(path))
    path.write_bytes(data[: len(data) // 2])
    found = damaged(path)
    assert ("", "", "shard") in found and ("sample0004", "flac", "crc") in found
    assert not any(key in ("sample0000", "sample0001") for key, _, _ in found)


def test_a_damaged_index_is_found(tmp_path, shard, capsys):
    file, draws = index.open_index(str(shard)).file, random.Random(6)
    for place in [9, 20, 40, *(draws.randrange(32, file.stat().st_size) for _ in range(60))]:
        flip(file, place)
        found = damaged(shard)
        assert found == [("", "index", "crc")] or (place < 12 and found == []), place  # another version is made anew
        flip(file, place)
        if place < 12:
            index.build(str(shard))
    flip(file, file.stat().st_size - 100)  # in the tables, which nobody hashes when a run starts
    with pytest.raises(UserError, match=f"{re.escape(str(file))} is damaged.*--rebuild"):
        run(capsys, shard)
    code, out, _ = run(capsys, shard, "--verify")
    assert code == 1 and "index: crc" in out
    assert run(capsys, "--rebuild", shard)[0] == 0 and damaged(shard) == []


def test_a_replaced_shard(shard, capsys):
    shards.write(shard, samples(8, 50))
    with pytest.raises(UserError, match="mmfm inspect --rebuild"):
        run(capsys, shard)
    assert run(capsys, shard, "--verify")[0] == 1
    code, out, _ = run(capsys, "--rebuild", shard)
    assert code == 0 and "8 samples" in out
    assert run(capsys, shard, "--verify")[0] == 0


def test_a_shard_that_cannot_be_read_to_its_end(shard, monkeypatch):
    from multimodal_fm.corpus import storage

    whole = storage.read
    monkeypatch.setattr(storage, "read", lambda *a: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert damaged(shard) == [("", "", "read")]
    monkeypatch.setattr(storage, "read", whole)


# --- what a training run would get ---


def test_each_part_is_described(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = malformed.picture(exif=exif)
    shards.write(
        tmp_path / "a.tar",
        [
            {"__key__": "whole", "jpg": jpeg("red"), "txt": "a text", "ogg": tone(300, 0.5, 22_050, "OGG", 2)},
            {
                "__key__": "cmyk",
                "jpg": jpeg((0, 0, 0, 0), mode="CMYK"),
                "json": {"captions": {"en": "one", "fr": "two"}},
            },
            {"__key__": "turned", "jpg": turned, "txt": "x" * 20_000},
            {"__key__": "grey", "png": jpeg(7, kind="PNG", mode="L"), "json": {"number": 1}},
            {"__key__": "neither", "cls": "1"},
        ],
    )
    found = {row.pop("key"): row for row in rows_of(tmp_path / "a.tar")}
    common = {"shard": str(tmp_path / "a.tar"), "outcome": "ok", "lost": {}}
    assert found["whole"] == common | {
        "text": "a text",
        "image": {"width": 40, "height": 30, "mode": "RGB"},
        "audio": {"channels": 2, "seconds": 0.5, "rate": 22_050},
    }
    assert found["cmyk"] == common | {"text": "one", "image": {"width": 40, "height": 30, "mode": "CMYK"}}
    assert found["turned"]["image"] == {"width": 36, "height": 48, "mode": "RGB"}  # as a run gets it: upright
    assert len(found["turned"]["text"]) == MAX_CHARACTERS
    assert found["grey"] == common | {"image": {"width": 40, "height": 30, "mode": "L"}}
    assert found["neither"] == common | {"outcome": "skip", "lost": {"sample": "empty"}}


def test_all_of_a_long_sound_is_read(tmp_path):
    """Also what lies beyond the windows that evaluation takes, and the rest that is shorter than a patch."""
    from multimodal_fm.tokenizers import audio

    made = []
    for key, place in (("whole", None), ("middle", 300_000), ("last", -1)):
        wave = np.sin(np.arange(11 * 40_960 + 50) / 9)  # the last 50 are less than a patch
        wave = (wave / 2).astype(np.float32)
        if place is not None:
            wave[place] = np.nan
        data = io.BytesIO()
        soundfile.write(data, wave, 16_000, format="WAV", subtype="FLOAT")
        made.append({"__key__": key, "wav": data.getvalue()})
    shards.write(tmp_path / "a.tar", made)
    tokenizers = {"audio": audio.Tokenizer(audio.Config(max_tokens=16, max_windows=2))}
    rows = describe_samples(open_indexes([str(tmp_path / "a.tar")], 2000), tokenizers)
    assert [(row["outcome"], row["lost"]) for row in rows] == [
        ("ok", {}), ("skip", {"audio": "not-finite"}), ("skip", {"audio": "not-finite"})
    ]  # fmt: skip


def test_another_kind_is_counted_in_tokens(tmp_path):
    from multimodal_fm.tokenizers import base

    class Series(base.Tokenizer):
        Config, extensions = dict, ("series",)

        def read(self, raw, generator=None):
            return [list(raw["series"])]

        def measure(self, data, length):
            return data.count(b","), 0

        def count_tokens(self, length, a, b):
            return a + 1

    shards.write(tmp_path / "a.tar", [{"__key__": "k", "series": b"1,2,3"}])
    tokenizers = {"series": Series()}
    indexes = open_indexes([str(tmp_path / "a.tar")], 2000, tokenizers=tokenizers.values())
    assert next(describe_samples(indexes, tokenizers))["series"] == {"tokens": 5}
    found = count_corpus(indexes, tokenizers).data
    assert found["modalities"] == {"series": {"samples": 1, "bytes": 5, "tokens": 3}} and summarize(found)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    return {case.name: case for case in malformed.make(folder)}


@pytest.mark.parametrize("name", malformed.RECIPES)
def test_a_malformed_shard_gives_the_outcomes_that_it_should(cases, name):
    case = cases[name]
    if not Path(case.path).exists() or case.path.endswith(".gz"):
        with pytest.raises(UserError, match=re.escape(case.path)):
            shards.list_shards([case.path])
        return
    before = used()
    rows = rows_of(case.path)
    assert used() - before <= MORE_MEMORY
    assert all(json.loads(json.dumps(row)) == row for row in rows)
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["key"], []).append(row["outcome"])
        assert (row["outcome"] == "ok") == (not row["lost"])
        assert any(modality in row for modality in ("text", "image", "audio")) == (row["outcome"] != "skip")
    expected = {key: outcome.split("|") for key, outcome in case.outcome.items()}
    if not case.path.endswith(".txt"):
        expected = {key: ["ok"] for key in case.healthy} | expected
    assert all(found.get(key) in [[one] for one in allowed] for key, allowed in expected.items()), found
    for key, part, reason in case.refused:
        told = [lost for row in rows if not key or row["key"] == key for lost in row["lost"].items()]
        assert any((not part or lost[0] == part) and lost[1] in reason.split("|") for lost in told), (key, part, reason)
    if not case.opens:
        assert [row["outcome"] for row in rows] in ([], ["skip"])


# --- the command ---


@pytest.mark.parametrize("name", ["cut-inside-content", "shard-html", "shard-zero-bytes", "plain-empty", "part-twice"])
def test_it_exits_with_0_whatever_it_finds(cases, name, capsys):
    path = cases[name].path
    code, out, _ = run(capsys, path)
    assert code == 0 and "refused    nothing" not in out
    code, out, _ = run(capsys, path, "--samples", "--json")
    assert code == 0 and all(json.loads(line)["shard"] == path for line in out.splitlines())
    assert any(json.loads(line)["lost"] for line in out.splitlines())


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "at least one shard"),
        (["none.tar"], "none.tar"),
        (["compressed.tar.gz"], "mmfm pack .*compressed.tar.gz"),
        (["picture.jpg"], "picture.jpg"),
        (["folder.tar"], "folder.tar"),
        (["pipe:touch x"], "pipe"),
        (["a.tar", "--config", "none.yaml"], "none.yaml"),
        (["a.tar", "--verify", "--rebuild"], "--rebuild"),
        (["a.tar", "--samples", "--html", "x.html"], "--samples"),
        (["a.tar", "--piece", "3"], "--piece"),
    ],
)
def test_where_it_cannot_start_it_says_so(shard, monkeypatch, capsys, words, says):
    monkeypatch.chdir(shard.parent)
    for name in ("compressed.tar.gz", "picture.jpg"):
        Path(name).write_bytes(b"")
    Path("folder.tar").mkdir()
    with pytest.raises(UserError, match=says) as raised:
        run(capsys, *words)
    assert "\n" not in str(raised.value)


def test_patterns_pieces_and_urls(shard, capsys, tmp_path):
    import fsspec

    shutil.copy(shard, tmp_path / "b.tar")
    assert json.loads(run(capsys, tmp_path / "[ab].tar", shard, "--json")[1])["samples"] == 16  # each shard once
    (tmp_path / "c.txt").write_text("words " * 100)
    assert json.loads(run(capsys, tmp_path / "c.txt", "--piece", "64", "--json")[1])["samples"] == 10
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(shard.read_bytes())
    code, out, _ = run(capsys, "memory://bucket/a.tar", "--samples")
    assert code == 0 and [json.loads(line)["outcome"] for line in out.splitlines()] == ["ok"] * 8
    assert run(capsys, "memory://bucket/a.tar", "--verify")[0] == 0


def test_its_exit_codes_are_those_of_the_program(shard, mmfm):
    def code(*words) -> tuple[int, str]:
        done = mmfm("inspect", *words)
        return done.returncode, done.stderr

    assert code(shard, "--json") == (0, "")
    assert code(shard.parent / "none.tar") == (2, f"mmfm: shards: no file matches {shard.parent / 'none.tar'}\n")
    flip(shard, shard.stat().st_size // 2)
    stale = code(shard)
    assert stale[0] == 2 and "mmfm inspect --rebuild" in stale[1] and stale[1].count("\n") == 1
    assert code(shard, "--verify")[0] == 1
