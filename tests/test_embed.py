"""Embedding: all that the sources hold, once, whoever is killed and however many share the work."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLORS, jpeg, samples, tone
from kills import killed, killed_after, seconds_of

pytest.importorskip("pyarrow")

import multimodal_fm as mmfm
from multimodal_fm.cli import app
from multimodal_fm.config import to_data
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.heads import retrieval
from multimodal_fm.model import HEADS, Model, ModelConfig, Plugin, load
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.search import embed as embedding
from multimodal_fm.search.collection import Collection, model_hash
from multimodal_fm.search.index import LocalIndex, build_index, check_model
from multimodal_fm.tokenizers import audio, image, text


def make_model(folder: Path, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    words = text.Tokenizer(text.Config(vocab_size=300, max_tokens=24))
    words = words.fit(["a red green blue yellow square"], folder / "tokenizer")
    config = ModelConfig(
        tokenizers={
            "text": words,
            "image": image.Tokenizer(image.Config(patch=8, max_tokens=12)),
            "audio": audio.Tokenizer(audio.Config(patch_frames=8, n_mels=32, patch_mels=32, max_tokens=8)),
        },
        heads={"retrieval": Plugin(HEADS, "retrieval", retrieval.Head, retrieval.Config(16))},
    )
    config.backbone.width, config.backbone.depth, config.backbone.num_heads = 16, 1, 2
    return Model(config).eval()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def run(model, tmp_path_factory):
    """The folder of a run with one checkpoint of it."""
    folder = tmp_path_factory.mktemp("run")
    files = {"text": model.tokenizers["text"].file}
    state = model.state_dict()
    checkpoint.save(checkpoint.folder_of(folder, 1), {"model": state, "ema": state},
                    {"model": to_data(model.config)}, files)  # fmt: skip
    return folder


@pytest.fixture
def media(tmp_path):
    """A shard of tuples, a folder of loose media and a table."""
    shards.write(tmp_path / "tuples.tar", samples(6))
    folder = tmp_path / "media"
    (folder / "deep").mkdir(parents=True)
    (folder / "red.jpg").write_bytes(jpeg(COLORS["red"]))
    (folder / "red.txt").write_text("a red square, said beside it")
    (folder / "red.json").write_text('{"place": "home"}')
    (folder / "deep/beep.wav").write_bytes(tone(440, kind="WAV"))
    (folder / "deep/blue.GIF").write_bytes(jpeg(COLORS["blue"], kind="GIF", mode="P"))
    (folder / "note.txt").write_text("a note")
    (tmp_path / "table.csv").write_text("image,caption,kind\nmedia/red.jpg,from a table,stamp\n")
    return [str(tmp_path / "tuples.tar"), str(folder), str(tmp_path / "table.csv")]


def contents(folder) -> dict:
    """All items of a collection by id, with their vectors."""
    index, own = LocalIndex(folder), Collection(folder)
    tables = [own.read(part, own.manifest().dim)[0] for part in own.manifest().visible() if not part.deletes]
    ids = [one for table in tables for one in table["id"].to_pylist()]
    assert len(ids) == len(set(ids)) == len(index)
    return {item.id: (item, vector) for item, vector in index.get(ids)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k][0] == b[k][0] and np.allclose(a[k][1], b[k][1], atol=2e-3) for k in a)


def test_what_the_sources_hold(model, media, tmp_path):
    result = mmfm.embed(model, media, tmp_path / "c", workers=0)
    found = [item for item, _ in contents(tmp_path / "c").values()]
    assert result["counts"] == {"audio": 7, "image": 9, "text": 9} and result["items"] == result["added"] == 25
    assert not result["skipped"]
    tuples = [item for item in found if item.source == media[0]]
    assert {(i.modality, i.member) for i in tuples} == {("text", "txt"), ("image", "jpg"), ("audio", "flac")}
    picture = next(i for i in tuples if i.key == "sample0001" and i.modality == "image")
    assert picture.text == "a green square number 1"
    assert picture.fields == {"color": "green", "language": "en", "cls": "1"}
    loose = {os.path.relpath(i.source, media[1]): i for i in found if i.source.startswith(media[1])}
    assert set(loose) == {"red.jpg", "red.txt", "deep/beep.wav", "deep/blue.GIF", "note.txt"}
    assert all(os.path.isfile(i.source) and not i.key and not i.member for i in loose.values())
    assert loose["red.jpg"].text == "a red square, said beside it" and loose["red.jpg"].fields == {"place": "home"}
    assert loose["note.txt"].text == "a note" and loose["note.txt"].modality == "text"
    row = next(i for i in found if i.source == media[2] and i.modality == "image")
    assert row.text == "from a table" and row.fields["kind"] == "stamp" and row.key == "table-0"


@pytest.mark.parametrize("dtype, error", [("float16", 2e-3), ("float32", 1e-5)])
def test_vectors_are_those_of_the_model(model, media, tmp_path, dtype, error):
    mmfm.embed(model, media[1], tmp_path / "c", dtype=dtype, workers=0, batch_tokens=20)
    for item, vector in contents(tmp_path / "c").values():
        given = item.text if item.modality == "text" else Path(item.source)
        wanted = model.embed(**{item.modality: [given]})[item.modality][0].detach().numpy()
        assert np.abs(vector - wanted).max() < error
    index = LocalIndex(tmp_path / "c")
    check_model(index, model)
    hit = index.search(model.embed(text=["a note"])["text"].detach().numpy(), 1, "text")[0][0]
    assert hit.item.text == "a note" and hit.score > 0.999


def test_again_and_more(model, media, tmp_path):
    first = mmfm.embed(model, media[0], tmp_path / "c", workers=0)
    parts = sorted((tmp_path / "c/embeddings").iterdir())
    assert first["added"] == 18
    again = mmfm.embed(model, [media[0], media[0]], tmp_path / "c", workers=0)
    assert again["added"] == 0 and again["items"] == 18 and sorted((tmp_path / "c/embeddings").iterdir()) == parts
    assert mmfm.embed(model, media[1:], tmp_path / "c", workers=0)["items"] == 25
    mmfm.embed(model, media, tmp_path / "once", workers=0)
    assert same(contents(tmp_path / "c"), contents(tmp_path / "once"))


def test_a_source_that_changed_takes_its_own_place(model, media, tmp_path, monkeypatch):
    folder = Path(media[1])
    mmfm.embed(model, media[1], tmp_path / "c", workers=0)
    build_index(tmp_path / "c")  # whose rows of the earlier version must not be found any more
    before = contents(tmp_path / "c")
    (folder / "note.txt").write_text("another note")
    (folder / "deep/beep.wav").unlink()
    shutil.copy(folder / "red.jpg", folder / "more.jpg")
    with monkeypatch.context() as half:
        half.setattr(embedding, "UNIT", 2)
        half.setenv("RANK", "0")
        half.setenv("WORLD_SIZE", "2")
        early = mmfm.embed(model, media[1], tmp_path / "c", workers=0)["added"]
        assert len(Collection(tmp_path / "c").manifest().parts) == 2 and same(before, contents(tmp_path / "c"))
    result = mmfm.embed(model, media[1], tmp_path / "c", workers=0)
    assert early + result["added"] == 2 and result["items"] == 5  # the rest was not embedded again
    after = contents(tmp_path / "c")
    assert sum(one in before for one in after) == 3
    assert "part-000001.parquet" not in {file.name for file in (tmp_path / "c/embeddings").iterdir()}
    mmfm.embed(model, media[1], tmp_path / "fresh", workers=0)
    assert same(after, contents(tmp_path / "fresh"))


def test_where(model, media, tmp_path):
    result = mmfm.embed(model, media[0], tmp_path / "c", where={"language": "en"}, workers=0)
    assert result["counts"] == {"audio": 3, "image": 3, "text": 3}
    assert {i.fields["language"] for i, _ in contents(tmp_path / "c").values()} == {"en"}


@pytest.fixture
def broken(tmp_path):
    """Sources of which a part cannot be read, each in another way."""
    made = samples(4)
    made[0]["jpg"] = b"\xff\xd8\xff no picture"
    made[1]["flac"] = tone(300)[:60]
    made[2]["txt"] = b"\xff\xfe\xff"
    shards.write(tmp_path / "some.tar", made)
    (tmp_path / "none.tar").write_bytes(b"<html>404</html>" * 100)
    folder = tmp_path / "loose"
    folder.mkdir()
    (folder / "empty.png").write_bytes(b"")
    (folder / "sheet.xls").write_bytes(b"?")
    (folder / "outside.jpg").symlink_to(tmp_path / "some.tar")
    (folder / "good.jpg").write_bytes(jpeg((1, 2, 3)))
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    return [str(tmp_path / name) for name in ("some.tar", "none.tar", "loose", "rows.jsonl")]


def test_broken_files_are_named_and_stop_nothing(model, broken, tmp_path):
    result = mmfm.embed(model, broken, tmp_path / "c", workers=0)
    assert result["counts"] == {"audio": 3, "image": 4, "text": 4}
    rows = [json.loads(line) for line in (tmp_path / "c/quarantine.jsonl").read_text().splitlines()]
    found = {(Path(row["shard"]).name, row["key"], row["part"], row["reason"]) for row in rows}
    assert found == {
        ("some.tar", "sample0000", "jpg", "decode"), ("some.tar", "sample0001", "flac", "decode"),
        ("some.tar", "sample0002", "text", "text-decode"), ("none.tar", "", "", "shard"),
        ("loose", "empty", "png", "decode"), ("loose", "sheet", "", "name"), ("loose", "outside", "", "name"),
        ("rows.jsonl", "rows-1", "text", "json"),
    }  # fmt: skip
    key = lambda row: json.dumps(row, sort_keys=True)  # noqa: E731
    assert sorted(result["skipped"], key=key) == sorted(rows, key=key)
    again = mmfm.embed(model, broken, tmp_path / "c", workers=0)
    assert again["added"] == 0 and len((tmp_path / "c/quarantine.jsonl").read_text().splitlines()) == len(rows)


def test_a_model_that_gives_no_vectors_for_some(model, media, tmp_path, monkeypatch):
    """Fault 87: what the model makes NaN of is named, not indexed."""
    real = model.embed_sequences

    def spoiled(modality, inputs, *rest):
        vectors, features = real(modality, inputs, *rest)
        if modality == "audio":
            vectors[0, 0] = torch.nan
        return vectors, features

    monkeypatch.setattr(model, "embed_sequences", spoiled)
    result = mmfm.embed(model, media[0], tmp_path / "c", workers=0)
    assert result["counts"]["audio"] == 5 and [row["reason"] for row in result["skipped"]] == ["not-finite"]


def test_workers_and_ranks_make_the_same(model, media, broken, tmp_path, monkeypatch):
    """With two workers; and three ranks one after the other, the second of which is another process count's."""
    monkeypatch.setattr(embedding, "UNIT", 2)
    sources = [*media, *broken]
    mmfm.embed(model, sources, tmp_path / "one", workers=0)
    wanted = contents(tmp_path / "one")
    mmfm.embed(model, sources, tmp_path / "two", workers=2)
    assert same(wanted, contents(tmp_path / "two"))
    added = []
    for rank, ranks in ((1, 3), (0, 3), (1, 2), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        added.append(mmfm.embed(model, sources, tmp_path / "shared", workers=0)["added"])
    assert min(added[:2]) > 0 and sum(added) == len(wanted) and same(wanted, contents(tmp_path / "shared"))


def test_another_model_is_refused(model, media, tmp_path):
    """Fault 86: also one that differs in its head alone, which `lora.base_hash` does not look at."""
    mmfm.embed(model, media[1], tmp_path / "c", workers=0)
    other = make_model(tmp_path)
    assert model_hash(other) == model_hash(model)  # the same seed, another folder
    with torch.no_grad():
        other.heads["retrieval"].projection["text"][0, 0] += 0.1
    with pytest.raises(UserError, match="another model"):
        mmfm.embed(other, media[0], tmp_path / "c", workers=0)
    with pytest.raises(UserError, match="another model"):
        check_model(LocalIndex(tmp_path / "c"), other)
    other.heads = torch.nn.ModuleDict()
    with pytest.raises(UserError, match="no retrieval head"):
        mmfm.embed(other, media[0], tmp_path / "d", workers=0)


def test_wrong_input(model, media, tmp_path):
    for sources, out, settings, match in (
        ([], "c", {}, "at least one SOURCE"),
        (["nowhere"], "c", {}, "no such file"),
        (media[1], Path(media[1]) / "c", {}, "lies inside"),
        (media, "c", {"dtype": "int8"}, "float16, float32"),
        (media, "c", {"workers": -1}, "--workers"),
        (media[2], "c", {"image_column": "picture"}, "no column 'picture'"),
    ):
        with pytest.raises(UserError, match=match):
            mmfm.embed(model, sources, tmp_path / out, **settings)


def test_damaged_parts_are_embedded_again(model, media, tmp_path):
    mmfm.embed(model, media, tmp_path / "c", workers=0)
    before = contents(tmp_path / "c")
    part = sorted((tmp_path / "c/embeddings").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{part.name} is damaged: mmfm embed with {media[0]}"):
        LocalIndex(tmp_path / "c")
    assert mmfm.embed(model, media, tmp_path / "c", workers=0)["added"] == 18
    assert same(before, contents(tmp_path / "c"))


def kill_and_finish(model, media, folder, wanted, instant: int) -> bool:
    """Kill an embedding; then an index of whole items opens, and the same command does the rest."""
    died = killed(lambda: mmfm.embed(model, media, folder, workers=0), instant)
    if (folder / "collection.json").exists():
        held = contents(folder)
        assert held.keys() <= wanted.keys() and same(held, {one: wanted[one] for one in held})
    mmfm.embed(model, media, folder, workers=0)
    assert same(wanted, contents(folder))
    names = {file.name for file in (folder / "embeddings").iterdir()}
    assert names == {part.name for part in Collection(folder).manifest().parts}
    return died


def test_kill_while_embedding(model, media, tmp_path):
    """Fault 82, at some of the instants."""
    mmfm.embed(model, media, tmp_path / "whole", workers=0)
    wanted = contents(tmp_path / "whole")
    for instant in (3, 14, 25):
        assert kill_and_finish(model, media, tmp_path / str(instant), wanted, instant)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kill_while_embedding_at_every_instant(model, media, broken, tmp_path):
    """Fault 82, at all of them."""
    mmfm.embed(model, [*media, *broken], tmp_path / "whole", workers=0)
    wanted, instant, died = contents(tmp_path / "whole"), 0, True
    while died:
        instant += 1
        died = kill_and_finish(model, [*media, *broken], tmp_path / str(instant), wanted, instant)
    assert instant > 40


def test_the_command_line(run, broken, tmp_path, capsys):
    """embed, index and deletions as one would type them."""

    def call(*words) -> tuple[str, str]:
        app([*map(str, words)], exit_on_error=False, result_action="return_value")
        return capsys.readouterr()

    folder = tmp_path / "c"
    out, error = call("embed", run, *broken, "--out", folder, "--workers", 0, "--device", "cpu")
    assert out == f"{folder}: 11 items (3 audio, 4 image, 4 text), 11 of them new\n"
    assert "skipped 8 parts" in error and "sample0000 jpg: decode" in error
    check_model(LocalIndex(folder), load(run, device="cpu"))
    assert call("index", folder)[0].splitlines()[0] == "audio: 3 items, searched exactly (at most 20000 items)"
    one, other, *_ = contents(folder)
    assert call("index", folder, "--delete", one, other, "no")[0] == f"{folder}: 2 of 3 deleted, 9 items are left\n"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_50_kills_of_the_command(run, media, broken, tmp_path, monkeypatch):
    """Fault 82, at random instants of the command with its worker: what was published stays, the same again ends."""
    for name, small in (("PART_ROWS", 4), ("JOB", 2)):  # so that there is much to be published
        monkeypatch.setattr(embedding, name, small)
    generator, sources = np.random.default_rng(0), [*media, *broken]

    def work(folder: Path) -> None:
        words = ["embed", run, *sources, "--out", folder, "--workers", 1, "--device", "cpu"]
        app([*map(str, words)], exit_on_error=False, result_action="return_value")

    took = seconds_of(lambda: work(tmp_path / "whole"))
    wanted, kills, number, some = contents(tmp_path / "whole"), 0, 0, 0
    while kills < 50 or (some < 6 and kills < 300):
        number += 1
        folder, held, died = tmp_path / str(number), {}, True
        while died and len(held) < len(wanted):
            began = time.monotonic()
            died = killed_after(functools.partial(work, folder), generator.uniform(0, took))
            took = took if died else time.monotonic() - began  # the machine may be less busy than it was
            kills += died
            now = contents(folder) if (folder / "collection.json").exists() else {}
            assert held.keys() <= now.keys() and same(now, {one: wanted[one] for one in now})
            some += held.keys() < now.keys() < wanted.keys()
            held = now
        work(folder)
        assert same(wanted, contents(folder))
    assert some > 5, "they hit something"


@pytest.mark.slow
def test_torchrun(run, media, broken, tmp_path):
    """Two processes at once make what one makes."""
    mmfm.embed(run, [*media, *broken], tmp_path / "one", device="cpu", workers=0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "multimodal_fm"]
    words = ["embed", str(run), *media, *broken, "--out", str(tmp_path / "two"), "--workers", "1"]
    subprocess.run([*torchrun, *words], check=True, capture_output=True)
    assert same(contents(tmp_path / "one"), contents(tmp_path / "two"))
