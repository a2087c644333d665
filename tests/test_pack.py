import collections
import contextlib
import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib

import malformed
import numpy as np
import pytest
import soundfile
import test_malformed
import webdataset
from conftest import jpeg, output, samples, tone
from PIL import Image

from multimodal_fm.corpus import shards
from multimodal_fm.errors import SampleError, UserError
from multimodal_fm.inspect.run import inspect
from multimodal_fm.pack import dedup, fetch, run, sources, state, summary, tables, validate
from multimodal_fm.pack import samples as sample
from multimodal_fm.pack.settings import Settings, parse_split

BAD = b"<html><body>404 Not Found</body></html>"


def picture(seed: int, size=(96, 80), kind="JPEG") -> bytes:
    """A picture whose perceptual hash is its own."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(data, kind)
    return data.getvalue()


def pack(given, to, workers=0, **settings):
    given = given if isinstance(given, list) else [given]
    return run.pack(Settings([str(s) for s in given], **settings), to, workers)


def packed(folder, pattern="*.tar") -> dict[str, dict]:
    """The members of every sample by its key, as the webdataset library reads them."""
    made = {}
    for path in sorted(folder.glob(pattern)):
        for one in webdataset.WebDataset(str(path), shardshuffle=False):
            assert one["__key__"] not in made
            made[one["__key__"]] = {k: v for k, v in one.items() if not k.startswith("__")}
    return made


def quarantined(folder) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert all(set(r) == {"source", "shard", "key", "part", "reason", "detail", "step"} for r in rows)
    return [(r["key"], r["part"], r["reason"]) for r in rows]


def bytes_of(folder) -> dict[str, bytes]:
    """All files but the indexes, which hold the shards' times."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.suffix != ".mmidx"}


@pytest.fixture
def media(tmp_path):
    """A folder of pictures, sounds and captions, sound ones and broken ones."""
    folder = tmp_path / "media"
    (folder / "deep").mkdir(parents=True)
    files = {
        "bus.jpg": picture(1),
        "bus.txt": b"a red bus",
        "bus.json": b'{"license": "CC0", "source": "me", "url": "https://example.org/bus", "language": "en"}',
        "horn.flac": tone(300),
        "horn.txt": "ein Horn, grün".encode(),
        "deep/cat.png": picture(2, kind="PNG"),
        "deep/my.first.photo.jpg": picture(3),
        "deep/my.first.photo.txt": b"the first photo",
        "moving.gif": picture(4, kind="GIF"),
        "note.txt": b"".join(b"Sentence number %d. " % i for i in range(400)),
        "page.jpg": BAD,
        "page.txt": b"a page that is no picture",
        "none.jpg": b"",
        "half.jpg": picture(5)[:900],
        "half.flac": tone(200, 2.0)[:4000],
        "latin.txt": "grün".encode("latin-1"),
        "broken.json": b"{",
        "broken.png": picture(6, kind="PNG"),
        "alone.json": b"{}",
        "Thumbs.db": b"what is this",
        ".DS_Store": b"hidden",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_folder_of_media(media, tmp_path):
    facts = pack(media, tmp_path / "out")
    made = packed(tmp_path / "out")
    assert made["bus"] == {e: (media / f"bus.{e}").read_bytes() for e in ("jpg", "txt", "json")}
    assert made["horn"] == {e: (media / f"horn.{e}").read_bytes() for e in ("flac", "txt")}
    assert made["deep_cat"] == {"png": (media / "deep/cat.png").read_bytes()}
    assert set(made["deep_my_first_photo"]) == {"jpg", "txt"}
    assert set(made["moving"]) == {"png"}  # training reads no GIF
    assert set(made["page"]) == {"txt"} and set(made["broken"]) == {"png"}
    pieces = [made[key]["txt"] for key in sorted(made) if key.startswith("note-")]
    assert b"".join(pieces) == (media / "note.txt").read_bytes() and max(map(len, pieces)) <= 2000
    assert not {"half", "none", "latin", "Thumbs", "alone"} & set(made)
    assert sorted(quarantined(tmp_path / "out")) == sorted(
        [
            ("page", "image", "decode"),
            ("none", "image", "empty"),
            ("half", "image", "decode"),
            ("half", "audio", "decode"),
            ("latin", "text", "text-decode"),
            ("broken", "text", "json"),
            ("Thumbs", "", "name"),
            ("alone", "", "name"),
        ]
    )
    card = (tmp_path / "out" / "card.md").read_text()
    assert "CC0 (1)" in card and "en (1)" in card and "| decode | 3 |" in card
    assert facts["splits"]["train"]["samples"] == len(made)
    corpus = shards.Corpus(shards.Config(str(tmp_path / "out" / "*.tar")))
    assert not corpus.rejections and len(corpus) == len(made)


def test_links_are_not_followed(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s.txt").write_text("not yours")
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a.txt").write_text("mine")
    (folder / "link.txt").symlink_to(tmp_path / "secret" / "s.txt")
    (folder / "all").symlink_to(tmp_path / "secret")
    shards.write(tmp_path / "secret" / "s.tar", samples(2))
    (folder / "shard.tar").symlink_to(tmp_path / "secret" / "s.tar")
    pack(folder, tmp_path / "out")
    assert packed(tmp_path / "out") == {"a": {"txt": b"mine"}}
    assert quarantined(tmp_path / "out") == [("link", "", "name"), ("shard", "", "name")]


def test_the_output_does_not_lie_inside_a_source(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.txt").write_text("mine")
    for to in ("media", "media/deep/out"):
        with pytest.raises(UserError, match="--to .* lies inside the source"):
            pack(tmp_path / "media", tmp_path / to)
    assert os.listdir(tmp_path / "media") == ["a.txt"]


def test_what_is_no_regular_file_is_left_out(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a.txt").write_text("mine")
    (folder / "t.csv").write_text("image,text\npipe.jpg,words\n")
    for name in ("pipe.jpg", "pipe.tar", "pipe.jsonl"):
        os.mkfifo(folder / name)
    (folder / "null.png").symlink_to("/dev/null")
    pack(folder, tmp_path / "out")
    assert sorted(packed(tmp_path / "out")) == ["a", "t-0"]
    assert collections.Counter(quarantined(tmp_path / "out")) == {
        ("pipe", "", "name"): 3,
        ("null", "", "name"): 1,
        ("t-0", "image", "name"): 1,
    }


def test_names_and_values_that_are_no_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    (folder / os.fsdecode(b"\xff")).mkdir(parents=True)
    (folder / os.fsdecode(b"\xff") / "x.txt").write_text("in a folder whose name is not UTF-8")
    values = {"text": "words \ud800 and more", "label": "\ud800", "source": "\udfff", "captions": {"\ud800": "a"}}
    (folder / "rows.jsonl").write_text(json.dumps(values) + "\n")
    (folder / "table.csv").write_bytes(b"text,label\na text here,caf\xe9\n")
    facts = pack(folder, tmp_path / os.fsdecode(b"out\xe9"), label_column="label")
    assert facts["total"]["samples"] == 3 and facts["refused"] == {"text-decode": 1}
    assert pack(folder / "rows.jsonl", tmp_path / "rows", split=[1.0])["total"]["samples"] == 1
    assert "\\udce9" in (tmp_path / os.fsdecode(b"out\xe9") / "card.md").read_text()


def test_folders_are_labels(tmp_path):
    for i, name in enumerate(["cat", "dog", "cat"]):
        path = tmp_path / "classes" / name / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    pack(tmp_path / "classes", tmp_path / "out")
    found = {k: (m["cls"], json.loads(m["json"])) for k, m in packed(tmp_path / "out").items()}
    assert found == {
        "cat_0": (b"0", {"label": "cat"}),
        "cat_2": (b"0", {"label": "cat"}),
        "dog_1": (b"1", {"label": "dog"}),
    }


COLUMNS = {
    "image_column": "file",
    "audio_column": "sound",
    "text_column": "words",
    "label_column": "modality",
    "key_column": "id",
}


@pytest.mark.parametrize("modality", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(tmp_path, modality):
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "horn.wav").write_bytes(tone(440, kind="WAV"))
    names = ["zebra", "apple", "zebra", "apple", "apple"]
    files = [f"pictures/{i}.jpg" for i in range(4)] + ["pictures/none.jpg"]
    table = [
        {
            "file": f,
            "sound": "horn.wav",
            "words": f'words, "{i}"\nmore',
            "modality": n,
            "id": f"row.{i}",
            "license": "CC0",
        }
        for i, (f, n) in enumerate(zip(files, names))
    ]
    path = tmp_path / f"table.{modality}"
    if modality == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        inside = [row | {"file": {"bytes": None, "path": row["file"]}} for row in table]
        inside[0]["file"] = {"bytes": picture(0), "path": "other-name.jpg"}
        parquet.write_table(pyarrow.Table.from_pylist(inside), path, row_group_size=2)
    elif modality == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table) + "[1]\nnot json\n")
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), delimiter="\t" if modality == "tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
            file.write("too,few\n" if modality == "csv" else "")
    pack(path, tmp_path / "out", **COLUMNS)
    made = packed(tmp_path / "out")
    assert list(made) == [f"row_{i}" for i in range(5)]
    for i in range(4):
        one = made[f"row_{i}"]
        assert one["jpg"] == picture(i) and one["wav"] == tone(440, kind="WAV")
        assert one["txt"] == f'words, "{i}"\nmore'.encode() and one["cls"] == (b"1" if i in (0, 2) else b"0")
        assert json.loads(one["json"])["license"] == "CC0" and json.loads(one["json"])["label"] == table[i]["modality"]
    assert "jpg" not in made["row_4"] and "txt" in made["row_4"]
    lost = {("row.4", "image", "missing")}
    lost |= {("table-5", "text", "json"), ("table-6", "text", "json")} if modality == "jsonl" else set()
    lost |= {("table-5", "", "decode")} if modality == "csv" else set()
    assert set(quarantined(tmp_path / "out")) == lost


def test_columns_that_are_not_there(tmp_path):
    (tmp_path / "a.csv").write_text("shot,words\nx.jpg,hello\n")
    with pytest.raises(UserError, match="no column 'image'.*there are: shot, words"):
        pack(tmp_path / "a.csv", tmp_path / "out", image_column="image")
    (tmp_path / "x.jpg").write_bytes(picture(1))
    pack(tmp_path / "a.csv", tmp_path / "out", image_column="shot")  # the same folder, the right name
    assert packed(tmp_path / "out")["a-0"]["jpg"] == picture(1)
    with pytest.raises(UserError, match="name what its columns hold"):
        pack(tmp_path / "a.csv", tmp_path / "out2")
    with pytest.raises(UserError, match="no such file"):
        pack(tmp_path / "b.csv", tmp_path / "out3")


def test_usual_columns_of_all_modalities_are_found(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "a.wav").write_bytes(tone(440, kind="WAV"))
    (tmp_path / "t.csv").write_text("image,audio,caption,license,number\na.jpg,a.wav,a red bus,CC0,7\n")
    row = {"img": "a.jpg", "sound": "a.wav", "text": "another bus", "city": "Rome"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": "no media here", "image": 3}) + "\n")
    facts = pack([tmp_path / "t.csv", tmp_path / "r.jsonl", tmp_path / "plain.jsonl"], tmp_path / "out")
    made = packed(tmp_path / "out")
    assert [set(made[key]) for key in ("t-0", "r-0", "plain-0")] == [{"jpg", "wav", "txt", "json"}] * 2 + [{"json"}]
    lines = summary(facts, "out").splitlines()
    assert "train 3 samples (text 3, image 2, audio 2)" in lines[0]
    assert lines[1].endswith("t.csv: image from column image, audio from column audio, text from column caption; "
                             "in the JSON only: license, number")  # fmt: skip
    assert "in the JSON only: city" in lines[2] and "r.jsonl: image from column img" in lines[2]


def classes(folder) -> dict[str, tuple]:
    return {k: (m["cls"].decode(), json.loads(m["json"]).get("label")) for k, m in packed(folder).items()}


def test_numbers_and_words_are_no_classes_of_one_pack(tmp_path):
    for i, name in enumerate(["clock_tick", "dog", "rain"]):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        (tmp_path / "sounds" / name / f"{i}.wav").write_bytes(tone(200 + 50 * i, kind="WAV"))
    (tmp_path / "news.jsonl").write_text(
        "".join(json.dumps({"text": f"news {i}", "label": i}) + "\n" for i in range(3))
    )
    shards.write(tmp_path / "old.tar", [{"__key__": "a", "txt": "a text", "cls": "1"}])
    for other in ("news.jsonl", "old.tar"):
        with pytest.raises(UserError, match=f"the classes of .*{other} are whole numbers, those of .*sounds are words"):
            pack([tmp_path / other, tmp_path / "sounds"], tmp_path / f"no-{other}", label_column="label")
    pack(tmp_path / "news.jsonl", tmp_path / "news", label_column="label")
    assert classes(tmp_path / "news") == {f"news-{i}": (f"{i}", i) for i in range(3)}
    (tmp_path / "more.csv").write_text("text,label\na dog barks,dog\na cat purrs,cat\na number,1\n")
    pack([tmp_path / "sounds", tmp_path / "more.csv"], tmp_path / "both", label_column="label")
    assert classes(tmp_path / "both") == {
        "clock_tick_0": ("0", "clock_tick"),
        "dog_1": ("1", "dog"),
        "rain_2": ("2", "rain"),
        "more-0": ("1", "dog"),
        "more-1": ("4", "cat"),
        "more-2": ("3", "1"),
    }


def test_a_wrong_path_fails_at_once_and_the_hub_is_asked_for_by_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name):
        asked.append(name)
        return datasets.Dataset.from_dict({"text": ["one text", "another"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    tables.load_dataset.cache_clear()
    with pytest.raises(UserError, match="data/fotos: no such file or folder .*written hf:data/fotos"):
        pack("data/fotos", tmp_path / "no")
    assert not asked
    pack("hf:owner/name", tmp_path / "out")
    assert asked == ["owner/name"] and len(packed(tmp_path / "out")) == 2


def test_a_dataset_of_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    pictures = [{"bytes": picture(i), "path": None} for i in range(3)]
    table = {"image": pictures, "caption": list("abc"), "label": [1, 0, 1]}
    datasets.Dataset.from_dict(table, features).save_to_disk(str(tmp_path / "hub"))
    pack(tmp_path / "hub", tmp_path / "out")
    made = packed(tmp_path / "out")
    assert [m["jpg"] for m in made.values()] == [picture(i) for i in range(3)]
    assert [m["cls"] for m in made.values()] == [b"1", b"0", b"1"]
    assert [json.loads(m["json"])["label"] for m in made.values()] == ["dog", "cat", "dog"]


def test_datasets_is_an_extra(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    tables.load_dataset.cache_clear()
    with pytest.raises(UserError, match="pip install"):
        pack(tmp_path / "hub", tmp_path / "out")


@pytest.mark.parametrize("modality", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_shards(tmp_path, modality):
    given = [
        *samples(6),
        {"__key__": "x/y", "seg.png": b"any", "txt": b"kept whole", "npz": b"PK", "txt.gz": b"\x1f", "pyd": b"\x80"},
    ]
    shards.write(tmp_path / "a.tar", given)
    if modality != "tar":
        mode = {"tgz": "gz"}.get(modality, modality[4:])
        with tarfile.open(tmp_path / f"a.{modality}", f"w:{mode}") as to, tarfile.open(tmp_path / "a.tar") as source:
            for member in source:
                to.addfile(member, source.extractfile(member))
    pack(tmp_path / f"a.{modality}", tmp_path / "out")
    with tarfile.open(tmp_path / "a.tar") as source:
        want = {m.name.replace("/", "_"): source.extractfile(m).read() for m in source}
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as made:
        assert {m.name: made.extractfile(m).read() for m in made} == want
    assert not quarantined(tmp_path / "out")


def test_damaged_shards_give_what_is_whole(tmp_path):
    shards.write(tmp_path / "a.tar", samples(6))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(data, mtime=0)[:-3000])
    (tmp_path / "page.tar").write_bytes(BAD)
    (tmp_path / "page.tgz").write_bytes(BAD)
    (tmp_path / "empty.tar").write_bytes(b"")
    names = ["cut.tar", "cut.tar.gz", "page.tar", "page.tgz", "empty.tar"]
    pack([tmp_path / n for n in names], tmp_path / "out", dedup="none")
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert {os.path.basename(json.loads(line)["shard"]) for line in lines} == set(names)
    made = packed(tmp_path / "out")
    assert {"sample0000", "sample0001", "sample0002", "sample0000~2"} <= set(made)
    whole = packed(tmp_path, "a.tar")
    for key, members in made.items():
        assert all(value == whole[key.partition("~")[0]][ending] for ending, value in members.items())


def test_a_gzip_bomb_stops_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FREE_BYTES", 1 << 20)
    shards.write(tmp_path / "a.tar", samples(2))
    bomb = gzip.compress((tmp_path / "a.tar").read_bytes() + bytes(30 << 20))
    (tmp_path / "bomb.tar.gz").write_bytes(bomb)
    pack([tmp_path / "a.tar", tmp_path / "bomb.tar.gz"], tmp_path / "out")
    assert ("", "", "byte-limit") in quarantined(tmp_path / "out") and "sample0001" in packed(tmp_path / "out")


def test_names_in_shards_are_no_paths(tmp_path):
    names = ("../up.txt", "/abs.txt", "a/../../b.txt", "good.txt", "ünï cödé $(touch x).txt", "k" * 200 + ".txt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name.encode())
            archive.addfile(member, io.BytesIO(name.encode()))
            if name == "good.txt":
                archive.addfile(tarfile.TarInfo("good." + "e" * 80))
    before = set(tmp_path.iterdir())
    pack(tmp_path / "a.tar", tmp_path / "out")
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}
    made = packed(tmp_path / "out")
    assert len(made) == 3 and "good" in made
    assert all(set(key.lower()) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for key in made)
    assert [row[2] for row in quarantined(tmp_path / "out")] == ["name"] * 4


def test_member_names_that_webdataset_keeps_to_itself(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("x.txt", "y.txt", "y.__key__", "z.txt", "z._note"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    pack(tmp_path / "a.tar", tmp_path / "out")
    assert packed(tmp_path / "out") == {key: {"txt": f"{key}.txt".encode()} for key in "xyz"}
    assert quarantined(tmp_path / "out") == [("y", "", "name"), ("z", "", "name")]


def test_long_text_is_cut_and_its_row_kept(tmp_path):
    text = "Zwölf Boxkämpfer jagen Viktor. " * 100 + "日本語" * 500
    row = json.dumps({"text": text, "license": "MIT", "label": 3}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(row + '\n{"text": "short"}\n{"n": 1}\n')
    (tmp_path / "b.txt").write_text(text)
    pack([tmp_path / "a.jsonl", tmp_path / "b.txt"], tmp_path / "out", piece_bytes=256, dedup="none")
    made = packed(tmp_path / "out")
    cut = [json.loads(m["json"]) for k, m in made.items() if k.startswith("a-0-")]
    assert "".join(row["text"] for row in cut) == text and all(len(row["text"].encode()) <= 256 for row in cut)
    assert all((row["license"], row["label"]) == ("MIT", 3) for row in cut)
    assert json.loads(made["a-1"]["json"]) == {"text": "short"}
    assert "".join(m["txt"].decode() for k, m in made.items() if k.startswith("b-")) == text
    assert quarantined(tmp_path / "out") == [("a-2", "", "empty")]


@pytest.mark.parametrize("most", [16, 17, 40, 300])
def test_pieces_join_to_the_text(most):
    text = ("eins zwei drei. vier\nfünf\n\n" * 5 + "日本語" * 40 + "x" * 100).encode()
    pieces = sample.cut_text(text, most)
    assert b"".join(pieces) == text and max(map(len, pieces)) <= most and all(p.decode() for p in pieces)


def test_pictures_and_sounds_are_made_smaller_where_asked(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "large.png").write_bytes(picture(1, (640, 300), "PNG"))
    (folder / "small.jpg").write_bytes(picture(2, (96, 64)))
    wave = np.stack([np.sin(np.arange(44_100) * 0.05), np.zeros(44_100)], 1) * 0.5
    soundfile.write(folder / "stereo.wav", wave, 44_100)
    (folder / "right.flac").write_bytes(tone(220))
    pack(folder, tmp_path / "out", longest_side=128, rate=16_000)
    made = packed(tmp_path / "out")
    assert Image.open(io.BytesIO(made["large"]["jpg"])).size == (128, 60)
    assert made["small"]["jpg"] == picture(2, (96, 64)) and made["right"]["flac"] == tone(220)
    assert soundfile.info(io.BytesIO(made["stereo"]["flac"])).subtype == "PCM_16"
    sound, rate = soundfile.read(io.BytesIO(made["stereo"]["flac"]))
    assert rate == 16_000 and sound.shape == (16_000,)
    want = 0.25 * np.sin(np.arange(16_000) * 0.05 * 44_100 / 16_000)
    assert np.abs(sound - want)[100:-100].max() < 2e-3


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000, 11_025])
def test_resampling_in_blocks_is_resampling_at_once(rate):
    import torch
    import torchaudio

    wave = np.random.default_rng(0).normal(size=(50_011, 1)).astype(np.float32)
    blocks = [wave[i : i + 7001] for i in range(0, len(wave), 7001)]
    made = np.concatenate(list(validate.resample_blocks(iter(blocks), rate, 16_000)))[:, 0]
    whole = torchaudio.transforms.Resample(rate, 16_000)(torch.from_numpy(wave[:, 0])).numpy()
    assert made.shape == whole.shape and np.abs(made - whole).max() < 1e-5


def wav(values) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.asarray(values, np.float32), 16_000, format="WAV", subtype="FLOAT")
    return data.getvalue()


def huge_png() -> bytes:
    data = bytearray(picture(0, kind="PNG"))
    data[16:24] = (30_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


@pytest.mark.parametrize(
    "ending, data, reason",
    [
        ("jpg", BAD, "decode"),
        ("jpg", b"", "empty"),
        ("png", huge_png(), "pixel-limit"),
        ("wav", BAD, "decode"),
        ("wav", wav([]), "empty"),
        ("wav", wav([0.1] * 300_000 + [float("nan")]), "not-finite"),
        ("wav", wav([0.1, float("inf")]), "not-finite"),
        ("wav", wav([0.1, 1e30]), "not-finite"),
        ("flac", tone(440, 5.0)[:20_000], "decode"),
        ("txt", b"\xff\xfe\x00", "text-decode"),
        ("txt", b" \n", "empty"),
        ("json", b"[" * 100_000, "json"),
    ],
)
def test_parts_that_are_left_out(ending, data, reason):
    kept, record = validate.check_sample(Settings(["x"]), {ending: data, "cls": b"1"})
    assert kept == {"cls": b"1"} and [error.reason for _, error in record["failed"]] == [reason]


def test_audio_beyond_the_limits(tmp_path, monkeypatch):
    data = io.BytesIO()
    soundfile.write(data, np.zeros(3601 * 1000, np.int16), 1000, format="FLAC")  # an hour is the limit
    with pytest.raises(SampleError, match="duration-limit"):
        validate.convert_audio(Settings(["x"]), "flac", data.getvalue())
    (tmp_path / "long.wav").write_bytes(wav([0.1] * 1000))
    monkeypatch.setattr(fetch, "MAX_BYTES", 100)
    with pytest.raises(SampleError, match="byte-limit"):
        fetch.read_file(str(tmp_path / "long.wav"))


def test_a_table_reads_below_its_folder(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "own.jpg").write_bytes(picture(2))
    (tmp_path / "here" / "link.jpg").symlink_to("../secret.jpg")
    names = ["own.jpg", "../secret.jpg", f"{tmp_path}/secret.jpg", "link.jpg", f"file://{tmp_path}/secret.jpg"]
    (tmp_path / "here" / "t.csv").write_text("image,text\n" + "".join(f"{name},words {name}\n" for name in names))
    pack(tmp_path / "here" / "t.csv", tmp_path / "out")
    assert ["jpg" in members for members in packed(tmp_path / "out").values()] == [True] + [False] * 4
    assert quarantined(tmp_path / "out") == [(f"t-{i}", "image", "name") for i in range(1, 5)]
    pack(tmp_path / "here" / "t.csv", tmp_path / "all", allow_outside=True)
    assert ["jpg" in members for members in packed(tmp_path / "all").values()] == [True] * 4 + [False]


def test_hosts_on_private_networks_are_not_asked(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    inside = ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "::1", "fe80::1%eth0", "fd00::1", "0.0.0.0"]
    assert not any(map(fetch.is_public, [*inside, "::ffff:127.0.0.1", "224.0.0.1"]))
    assert fetch.is_public("93.184.215.14") and fetch.is_public("2606:4700::1111")
    with server({"/a": [picture(1)], "/b": [picture(2)]}) as url:
        for name in (f"{url}/a", f"{url}/a".replace("127.0.0.1", "localhost")):
            with pytest.raises(SampleError, match="not a public address"):
                fetch.fetch(name, (str(tmp_path),))
        assert fetch.fetch(f"{url}/a", (str(tmp_path),), allow_outside=True) == picture(1)
        with server({"/": [f"{url}/b".replace("127.0.0.1", "127.0.0.2")], "/b": [f"{url}/b"]}) as outside:
            monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
            assert fetch.fetch(f"{outside}/b", (str(tmp_path),)) == picture(2)
            with pytest.raises(SampleError, match="127.0.0.2 is not a public address"):
                fetch.fetch(f"{outside}/", (str(tmp_path),))


URLS = ["pipe:touch sentinel", "ftp://example.org/a", "simplecache::file:///etc/passwd", "zip://a::b.zip"]


@pytest.mark.parametrize("url", URLS)
def test_urls_that_are_not_fetched(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SampleError, match="name"):
        fetch.fetch(url, (str(tmp_path),))
    with pytest.raises(UserError):
        pack([url], tmp_path / "out")
    assert not (tmp_path / "sentinel").exists()


@contextlib.contextmanager
def server(answers: dict[str, list]):
    """Answers for each path in turn, the last again and again: a status, bytes, or where else to look."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            left = answers[self.path]
            answer = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(answer if isinstance(answer, int) else 302 if isinstance(answer, str) else 200)
            if isinstance(answer, str):
                self.send_header("Location", answer)
            body = answer if isinstance(answer, bytes) else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


def test_urls_in_tables(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    answers = {"/a.jpg": [picture(1)], "/b": [503, 503, picture(2)], "/c": [404], "/d": [500], "/e": [BAD]}
    with server(answers) as url:
        rows = "".join(f"{url}{name},words {name}\n" for name in answers)
        (tmp_path / "t.csv").write_text(f"url,text\n{rows}")
        pack(tmp_path / "t.csv", tmp_path / "out", image_column="url", allow_outside=True)
    made = packed(tmp_path / "out")
    assert [m.get("jpg") for m in made.values()] == [picture(1), picture(2), None, None, None]
    assert json.loads(made["t-0"]["json"]) == {"url": f"{url}/a.jpg"}
    assert [row[2] for row in quarantined(tmp_path / "out")] == ["missing", "read", "decode"]


CHANGED = {  # what packing does on purpose, or need not keep
    "archive-inside": "a sample without text, picture or sound is left out",
    "png-ztxt-bomb": "either way",
    "png-iccp-bomb": "either way",
    "ogg-half": "a sound that ends early is left out",
    "mp3-half": "a sound that ends early is left out",
    "lines-5-MB": "long text is cut",
}


def misread(case, folder) -> list[str]:
    """What packing a malformed file did that it should not."""
    try:
        pack(case.path, folder, dedup="none")
    except UserError as error:
        return [f"{error}"] if case.healthy else []
    made = {key: members for tar in sorted(folder.glob("*.tar")) for key, members in members_of(tar).items()}
    prefix = os.path.basename(case.path).partition(".")[0] + "-" if case.path.endswith(".jsonl") else ""
    rows = [(key.removeprefix(prefix), part, reason) for key, part, reason in quarantined(folder)]
    wrong = test_malformed.compare_refused(case, rows) if case.opens else []
    if case.path.endswith(".txt"):
        together = b"".join(members["txt"] for members in made.values())
        return wrong + [f"lost: byte {at}" for at, own in case.healthy.items() if own["txt"] not in together]
    for key, due in case.healthy.items():
        found = made.get(sample.safe_key(prefix + key), {})
        wrong += [f"{key}.{e}" for e, data in due.items() if found.get(e, b"").rstrip(b"\r\n") != data.rstrip(b"\r\n")]
    return wrong


def members_of(path) -> dict[str, dict]:
    made = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, ending = member.name.partition(".")
            made.setdefault(key, {})[ending] = archive.extractfile(member).read()
    return made


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 16))])
def test_malformed_files_are_packed_without_harm(tmp_path, monkeypatch, part):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cases = malformed.make(tmp_path / "in", slice(part, None, 16))
    wrong = {case.name: misread(case, tmp_path / "out" / str(i)) for i, case in enumerate(cases)}
    assert {name: what for name, what in wrong.items() if what and name not in CHANGED} == {}
    assert not list((tmp_path / "here").iterdir()) and {p.name for p in tmp_path.iterdir()} == {"here", "in", "out"}


# ------------------------------------------------------------------------------------------------- copies and the split


def test_exact_copies(tmp_path):
    same = {"jpg": picture(1), "txt": "a caption"}
    made = [
        {"__key__": "a", **same},
        {"__key__": "b", **same, "json": {"id": 1, "url": "https://example.org/b", "meta": {"imageId": 7}}},
        {"__key__": "c", "jpg": picture(1), "txt": "another"},
        {"__key__": "d", "txt": "a caption"},
    ]
    shards.write(tmp_path / "a.tar", made)
    facts = pack(tmp_path / "a.tar", tmp_path / "out")
    assert list(packed(tmp_path / "out")) == ["a", "c", "d"] and facts["refused"] == {"copy": 1}
    row = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert (row["key"], row["reason"]) == ("b", "copy") and row["detail"] == f"of a in {tmp_path}/a.tar"
    pack(tmp_path / "a.tar", tmp_path / "all", dedup="none")
    assert len(packed(tmp_path / "all")) == 4


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_rows_that_differ_in_a_field_are_no_copies(tmp_path, dedup):
    (tmp_path / "bus.jpg").write_bytes(picture(1))
    asked = [{"question": f"What is number {i}?", "answer": "a bus"} for i in range(5)]
    rows = [{"image": "bus.jpg", "question_id": i, **row} for i, row in enumerate([*asked, asked[0]])]
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(tmp_path / "vqa.jsonl", tmp_path / "out", dedup=dedup)
    kept = [json.loads(members["json"])["question"] for members in packed(tmp_path / "out").values()]
    assert kept == [row["question"] for row in asked]
    assert quarantined(tmp_path / "out") == [("vqa-5", "", "copy")]
    labelled = [{"__key__": f"{i}", "jpg": picture(1), "cls": str(i % 2)} for i in range(3)]
    shards.write(tmp_path / "a.tar", labelled)
    pack(tmp_path / "a.tar", tmp_path / "out2", dedup=dedup)
    assert list(packed(tmp_path / "out2")) == ["0", "1"]


def again(data: bytes, quality: int = 60) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "JPEG", quality=quality)
    return out.getvalue()


STORY = "Once upon a time there was a man who lived by the sea and mended nets for all the fishermen of the village. "


def test_near_copies(tmp_path):
    made = [
        {"__key__": "a", "jpg": picture(1)},
        {"__key__": "b", "jpg": again(picture(1))},
        {"__key__": "c", "jpg": again(picture(1)), "txt": "with words"},  # other parts: no copy
        {"__key__": "d", "txt": STORY + "He was old."},
        {"__key__": "e", "txt": STORY + "He was so old."},
        {"__key__": "f", "txt": "something else altogether, about mountains and the people who climb them"},
        {"__key__": "g", "jpg": picture(9), "txt": "nine"},
        {"__key__": "h", "jpg": again(picture(9)), "txt": "a wholly different caption"},
        {"__key__": "i", "jpg": picture(7, (40, 40))},
        {"__key__": "j", "jpg": again(picture(7, (40, 40)))},  # too small to tell
        {"__key__": "k", "flac": tone(300), "txt": STORY + "He sang."},
        {"__key__": "l", "flac": tone(400), "txt": STORY + "He sang."},
    ]
    shards.write(tmp_path / "a.tar", made)
    facts = pack(tmp_path / "a.tar", tmp_path / "out", dedup="near")
    assert list(packed(tmp_path / "out")) == list("acdfghijkl") and facts["refused"] == {"near-copy": 2}
    assert ("b", "", "near-copy") in quarantined(tmp_path / "out")


def test_a_picture_in_other_colors_is_no_copy_and_stays_on_its_side(tmp_path):
    grey = Image.open(io.BytesIO(picture(1))).convert("L")
    zero = Image.new("L", grey.size)
    made = []
    for i in range(12):
        blue = grey.point(lambda v, i=i: min(255, v + i))
        for name, bands in (("red", (grey, zero, zero)), ("blue", (zero, zero, blue))):
            data = io.BytesIO()
            Image.merge("RGB", bands).save(data, "PNG")
            made.append({"__key__": f"{name}{i}", "png": data.getvalue(), "txt": f"{'caption' * i} {name} {i * i}"})
    made += [{"__key__": f"other{i}", "jpg": picture(i + 2)} for i in range(40)]
    shards.write(tmp_path / "a.tar", made)
    pack(tmp_path / "a.tar", tmp_path / "out", dedup="near", split=[0.5, 0.5])
    kept = set(packed(tmp_path / "out"))
    assert any(key.startswith("red") for key in kept) and any(key.startswith("blue") for key in kept)
    assert len({side for key, side in sides(tmp_path / "out").items() if not key.startswith("other")}) == 1


def sides(folder) -> dict[str, str]:
    return {key: split for split in ("train", "validation", "test") for key in packed(folder, f"{split}-*.tar")}


def test_nothing_that_is_shared_straddles_the_split(tmp_path):
    rng = np.random.default_rng(0)
    made, count = [], 60
    for i in range(count):
        text, english, french = ("".join(rng.choice(list("abcdefghijklmnop "), n)) for n in (90, 20, 20))
        translated = {"captions": {"en": f"{english.upper()}  {i}", "fr": f"{french} {i}"}}
        made += [
            {"__key__": f"a{i}", "txt": text, "jpg": picture(i)},
            {"__key__": f"b{i}", "txt": f"{text} more", "jpg": picture(1000 + i)},  # a near text
            {"__key__": f"c{i}", "txt": f"{english} {i}", "jpg": again(picture(i), 70)},  # a near picture
            {"__key__": f"d{i}", "json": translated, "flac": tone(100 + i, 0.1)},
            {"__key__": f"e{i}", "txt": f"{french} {i}", "flac": tone(2000 + 2 * i, 0.1)},
        ]
    shards.write(tmp_path / "a.tar", [made[i] for i in rng.permutation(len(made))])
    pack(tmp_path / "a.tar", tmp_path / "out", dedup="near", split=[0.6, 0.2, 0.2])
    side, found = sides(tmp_path / "out"), packed(tmp_path / "out")
    assert len(side) == 5 * count
    counts = collections.Counter(side.values())
    assert len(counts) == 3 and min(counts.values()) > 20
    for i in range(count):
        assert len({side[f"{name}{i}"] for name in "abcde"}) == 1
    hashes = {k: dedup.perceptual_hash(Image.open(io.BytesIO(m["jpg"]))) for k, m in found.items() if "jpg" in m}
    texts = {k: set(dedup.shingles(m["txt"].decode()).tolist()) for k, m in found.items() if "txt" in m}
    for a in side:
        for b in side:
            if side[a] < side[b]:
                if a in hashes and b in hashes:
                    assert (int(hashes[a], 16) ^ int(hashes[b], 16)).bit_count() > dedup.MAX_BITS
                if a in texts and b in texts:
                    assert len(texts[a] & texts[b]) < dedup.NEAR_TEXT * len(texts[a] | texts[b])


def test_translations_and_equal_media_stay_together_without_near(tmp_path):
    made = []
    for i in range(60):
        translated = {"captions": {"en": f"A sample, number {i}", "fr": f"Une chose, la {i}"}}
        made += [
            {"__key__": f"a{i}", "json": translated, "jpg": picture(i)},
            {"__key__": f"b{i}", "txt": f"une  chose, la {i}", "flac": tone(100 + i, 0.1)},
            {"__key__": f"c{i}", "txt": f"other words {i}", "flac": tone(100 + i, 0.1)},
        ]
    shards.write(tmp_path / "a.tar", made)
    pack(tmp_path / "a.tar", tmp_path / "out", split=[0.5, 0.5])
    side = sides(tmp_path / "out")
    assert all(side[f"a{i}"] == side[f"b{i}"] == side[f"c{i}"] for i in range(60))
    assert min(collections.Counter(side.values()).values()) > 30


def test_groups_stay_together_and_few_texts_are_labels(tmp_path):
    made = [
        {"__key__": f"{i}", "flac": tone(100 + i, 0.1), "json": {"text": ["one", "two"][i % 2], "by": {"who": i // 4}}}
        for i in range(120)
    ]
    shards.write(tmp_path / "a.tar", made)
    pack(tmp_path / "a.tar", tmp_path / "out", split=[0.5, 0.5], group="by.who")
    side = sides(tmp_path / "out")
    assert all(side[f"{i}"] == side[f"{i // 4 * 4}"] for i in range(120)) and len(set(side.values())) == 2
    assert "They tie no samples together" in (tmp_path / "out" / "card.md").read_text()


def test_bands_find_every_near_pair():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    for i in range(0, 300, 2):
        flips = rng.choice(64, i % 6, replace=False)
        hashes[i + 1] = hashes[i] ^ np.uint64(sum(1 << int(b) for b in flips))

    def near(a, b):
        return dedup.hamming(hashes[a], hashes[b]) <= dedup.MAX_BITS

    found = {tuple(sorted(map(int, pair))) for pair in dedup.near_pairs(dedup.image_bands(hashes), near)}
    assert found == {(a, b) for a in range(300) for b in range(a + 1, 300) if near(a, b)} and len(found) > 100


def test_a_crowded_band_goes_together(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "WINDOW", 1)
    rng = np.random.default_rng(0)
    made = [{"__key__": f"{i}", "txt": STORY + "".join(rng.choice(list("abcdefgh"), 20))} for i in range(40)]
    made += [{"__key__": f"other{i}", "txt": "".join(rng.choice(list("ijklmnopqrstuvwxyz "), 90))} for i in range(40)]
    shards.write(tmp_path / "a.tar", made)
    pack(tmp_path / "a.tar", tmp_path / "out", dedup="near", split=[0.5, 0.5])
    assert len({side for key, side in sides(tmp_path / "out").items() if not key.startswith("other")}) == 1


def test_pieces_of_a_document_stay_in_one_split(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijklmnop \n"), 600)) for _ in range(60)]
    (tmp_path / "folder").mkdir()
    for i in range(20):
        (tmp_path / "folder" / f"f{i}.txt").write_text(texts[i])
        (tmp_path / f"t{i}.txt").write_text(texts[20 + i])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[40:]))
    given = [tmp_path / "folder", tmp_path / "rows.jsonl", *sorted(tmp_path.glob("t*.txt"))]
    pack(given, tmp_path / "out", split=[0.5, 0.5], piece_bytes=100)
    documents = {}
    for key, side in sides(tmp_path / "out").items():
        documents.setdefault(key.rpartition("-")[0], []).append(side)
    assert len(documents) == 60 and all(len(found) > 5 and len(set(found)) == 1 for found in documents.values())
    assert len({found[0] for found in documents.values()}) == 2


def test_a_split_that_stays_empty_stops_and_other_shares_are_taken(tmp_path):
    rows = [{"text": f"{word} words", "by": word} for word in ("one", "two", "three", "four") for _ in range(2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="--split leaves validation empty: .*4 samples"):
        pack(tmp_path / "a.jsonl", tmp_path / "out", split=[0.98, 0.02])
    assert pack(tmp_path / "a.jsonl", tmp_path / "out")["total"]["samples"] == 4


def test_the_signature_estimates_the_similarity():
    a, b = dedup.shingles(STORY), dedup.shingles(STORY + " and his cat, the grey one")
    true = len(np.intersect1d(a, b)) / len(np.union1d(a, b))
    assert abs((dedup.signature(a) == dedup.signature(b)).mean() - true) < 0.12
    assert np.array_equal(dedup.shingles("ＡＢＣ  déf ghi"), dedup.shingles("abc déf GHI"))


def test_keys_are_unique(tmp_path):
    for name in ("a", "b"):
        given = [{"__key__": "same", "txt": name}, {"__key__": f"x{name}", "txt": f"x {name}"}]
        shards.write(tmp_path / f"{name}.tar", given)
    pack([tmp_path / "a.tar", tmp_path / "b.tar"], tmp_path / "out")
    assert set(packed(tmp_path / "out")) == {"same", "same~2", "xa", "xb"}


# ------------------------------------------------------------------------------------------------- kills, workers, card


@pytest.fixture
def several(media, tmp_path):
    """Sources of several modalities."""
    shards.write(tmp_path / "a.tar", samples(30))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50)))
    shards.write(tmp_path / "b.tar", samples(20, 25))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "b.tar").read_bytes(), mtime=0))
    return [tmp_path / "a.tar", media, tmp_path / "rows.jsonl", tmp_path / "b.tar.gz"]


SETTINGS = {"split": [0.7, 0.3], "shard_size": 60_000, "dedup": "near"}
FLAGS = ["--split", "0.7,0.3", "--shard-size", "60KB", "--dedup", "near"]


def test_killed_at_any_file_and_resumed_gives_the_same_bytes(several, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "CHUNK", 16)
    count, rename = [0], os.replace

    def counted(temporary, path):
        count[0] += 1
        rename(temporary, path)

    monkeypatch.setattr(os, "replace", counted)
    pack(several, tmp_path / "0" / "out", **SETTINGS)
    want, files = bytes_of(tmp_path / "0" / "out"), count[0]
    assert files > 30
    for fatal in sorted({1, 4, *range(9, files, 9), files - 2, files}):
        child = os.fork()
        if not child:

            def dies(temporary, path, fatal=fatal):
                count[0] += 1
                if fatal % 2 or count[0] != fatal:  # after the file has its name, or before
                    rename(temporary, path)
                if count[0] == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

            count[0], os.replace = 0, dies
            try:
                pack(several, tmp_path / f"{fatal}" / "out", **SETTINGS)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        pack(several, tmp_path / f"{fatal}" / "out", **SETTINGS)
        assert bytes_of(tmp_path / f"{fatal}" / "out") == want


def command(given, to, *more) -> list[str]:
    return [sys.executable, "-m", "multimodal_fm", "pack", *map(str, given), "--to", str(to), *more]


def test_kill_9_with_workers_then_the_same_command(several, tmp_path, mmfm):
    pack(several, tmp_path / "0" / "out", **SETTINGS)
    out = tmp_path / "1" / "out"
    running = subprocess.Popen(command(several, out, *FLAGS, "--workers", "2"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((out / ".pack").glob("chunks/*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.005)
    running.kill()
    running.wait()
    assert not (out / "card.md").exists()
    said = output(mmfm("pack", *several, "--to", out, *FLAGS, "--workers", "1"))
    assert "samples" in said and "quarantine.jsonl" in said
    assert bytes_of(tmp_path / "0" / "out") == bytes_of(out)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.5, 2, 3, 4, 4.5, 5, 5.5, 6, 7, 8])
def test_kill_9_at_any_time(several, tmp_path, delay):
    pack(several, tmp_path / "0" / "out", **SETTINGS)
    out = tmp_path / "1" / "out"
    for _ in range(2):
        running = subprocess.Popen(command(several, out, *FLAGS), stderr=subprocess.DEVNULL)
        time.sleep(delay)
        running.kill()
        running.wait()
    assert subprocess.run(command(several, out, *FLAGS)).returncode == 0
    assert bytes_of(tmp_path / "0" / "out") == bytes_of(out)


def test_as_many_workers_as_you_like(several, tmp_path, monkeypatch):
    for workers in (0, 1, 2):
        pack(several, tmp_path / f"{workers}" / "out", workers, **SETTINGS)
    zero, one, two = (bytes_of(tmp_path / f"{workers}" / "out") for workers in (0, 1, 2))
    assert zero == one == two


def deadly(task):
    """`_read_chunk` in a process whose image decoder aborts over one image."""
    real, bad = validate.IMAGE.describe, picture(7)
    validate.IMAGE.describe = lambda raw: os.abort() if raw["jpg"] == bad else real(raw)
    READ_CHUNK(task)


READ_CHUNK = run._read_chunk


def test_a_decoder_that_ends_its_process(tmp_path, monkeypatch):
    folder = tmp_path / "media"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(picture(i))
    (folder / "deadly.jpg").write_bytes(picture(7))
    monkeypatch.setattr(run, "_read_chunk", deadly)
    pack(folder, tmp_path / "out", 2)
    assert len(packed(tmp_path / "out")) == 6
    assert [row[2] for row in quarantined(tmp_path / "out")] == ["crash"]


def test_a_finished_folder_and_others(media, tmp_path, capsys):
    pack(media, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    pack(media, tmp_path / "out", 1)
    assert "already there" in capsys.readouterr().err and bytes_of(tmp_path / "out") == before
    with pytest.raises(UserError, match="other settings .dedup"):
        pack(media, tmp_path / "out", dedup="none")
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="train-000000.tar is missing or changed"):
        pack(media, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        pack(media, tmp_path / "mine")
    with state.State(tmp_path / "mine").lock(), pytest.raises(UserError, match="another mmfm pack"):
        pack(media, tmp_path / "mine")


def test_a_source_that_changes_meanwhile(tmp_path, monkeypatch):
    shards.write(tmp_path / "a.tar", samples(4))
    monkeypatch.setattr(run, "_read_chunks", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        pack(tmp_path / "a.tar", tmp_path / "out")
    monkeypatch.undo()
    shards.write(tmp_path / "a.tar", samples(5))
    with pytest.raises(UserError, match="changed since"):
        pack(tmp_path / "a.tar", tmp_path / "out")


def test_nothing_to_pack(tmp_path):
    (tmp_path / "a.tar").write_bytes(BAD)
    with pytest.raises(UserError, match="nothing in the sources can be read"):
        pack(tmp_path / "a.tar", tmp_path / "out")
    assert quarantined(tmp_path / "out") == [("", "", "shard")]


def test_shards_are_bounded_and_alike(tmp_path):
    shards.write(tmp_path / "a.tar", samples(40))
    pack(tmp_path / "a.tar", tmp_path / "out", shard_size=100_000)
    paths = sorted((tmp_path / "out").glob("*.tar"))
    assert len(paths) > 2 and all(path.stat().st_size <= 100_000 for path in paths)
    with tarfile.open(paths[0]) as archive:
        assert {(m.mtime, m.uname, m.mode) for m in archive.getmembers()} == {(0, "user", 0o644)}
    assert not list((tmp_path / "out" / ".pack").rglob("*.members"))


def test_the_card_counts_as_inspect_does(several, tmp_path, capsys):
    facts = pack(several, tmp_path / "out", **SETTINGS)
    for split, counted in [*facts["splits"].items(), ("*", facts["total"])]:
        inspect([str(tmp_path / "out" / f"{split}-*.tar")], json=True)
        found = json.loads(capsys.readouterr().out)
        assert counted == {name: found[name] for name in counted} and {"samples", "tokens", "modalities"} <= set(
            counted
        )


def test_croissant_is_valid_and_reads_the_shards(several, tmp_path, monkeypatch):
    monkeypatch.setenv("CROISSANT_CACHE", str(tmp_path / "cache"))  # it knows shards by their names alone
    mlcroissant = pytest.importorskip("mlcroissant")
    pack(several, tmp_path / "out", **SETTINGS)
    dataset = mlcroissant.Dataset(jsonld=str(tmp_path / "out" / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    sums = {one.name: one.sha256 for one in dataset.metadata.file_objects}
    assert sums == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "out").glob("*.tar")}
    made = packed(tmp_path / "out")
    found = {r["txt/key"].decode(): r["txt/content"] for r in dataset.records("txt")}
    assert found == {key: members["txt"] for key, members in made.items() if "txt" in members}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"split": [0.5, 0.6]}, "add up to 1"),
        ({"split": [0.5, 0.2, 0.2, 0.1]}, "up to three"),
        ({"dedup": "fuzzy"}, "none, exact, near"),
        ({"shard_size": 5}, "10KB"),
        ({"rate": 3}, "1000"),
        ({"longest_side": 3}, "16"),
        ({"piece_bytes": 3}, "16"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        Settings(["x"], **settings)


def test_shares():
    assert parse_split("0.9,0.05,0.05") == [0.9, 0.05, 0.05]
    with pytest.raises(UserError):
        parse_split("a,b")


def test_half_a_picture_of_either_modality():
    assert jpeg((1, 2, 3))[:2] == b"\xff\xd8"
    for kind in ("JPEG", "PNG", "WEBP"):
        data = picture(3, kind=kind)
        with pytest.raises(SampleError, match="decode"):
            validate.convert_image(Settings(["x"]), "jpg", data[: len(data) // 2], {})
