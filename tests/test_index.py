"""The index in a folder: it finds what exact search finds, survives kills, and refuses whatever is damaged."""

import dataclasses
import json
import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from kills import killed, killed_after, seconds_of

pytest.importorskip("pyarrow")

from multimodal_fm.errors import UserError
from multimodal_fm.search import collection as collections
from multimodal_fm.search import graph, segment
from multimodal_fm.search.base import Item
from multimodal_fm.search.collection import Collection
from multimodal_fm.search.graph import Settings
from multimodal_fm.search.index import LocalIndex, build_index, check_model, open_index
from multimodal_fm.search.segment import Segment

DIM, MODEL = 32, "m" * 64
MODALITIES = ("text", "image", "audio")
GRAPHS = Settings(exact_below=100)  # a graph for each modality


def make_items(start: int, stop: int) -> list[Item]:
    return [
        Item(f"id{i}", MODALITIES[i % 3], "shard.tar", f"key{i}", "jpg", f"thing {i}",
             {"color": ["red", "green"][i % 2], "n": i % 5, "in": {"a": f"é{i % 4}"}, "even": i % 2 == 0})
        for i in range(start, stop)
    ]  # fmt: skip


def make_vectors(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around 20 centers."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(9).standard_normal((20, DIM))
    vectors = centers[generator.integers(0, 20, count)] + 0.4 * generator.standard_normal((count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def fill(folder: Path, count: int, seed: int = 0, dtype: str = "float32") -> tuple[list[Item], np.ndarray]:
    own = Collection(folder)
    own.create(MODEL, "runs/x", DIM, dtype)
    items, vectors = make_items(0, count), make_vectors(count, seed)
    half = count // 2
    own.append(items[:half], vectors[:half])
    own.append(items[half:], vectors[half:])
    return items, vectors


def nearest(items, vectors, query, top, fits=lambda item: True) -> list[str]:
    """By brute force in float64."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    return [items[i].id for i in np.argsort(-scores, kind="stable") if fits(items[i])][:top]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A collection with graphs, to copy."""
    folder = tmp_path_factory.mktemp("built") / "c"
    items, vectors = fill(folder, 1200)
    build_index(folder, GRAPHS)
    return folder, items, vectors


@pytest.fixture
def copied(built, tmp_path):
    return Path(shutil.copytree(built[0], tmp_path / "c")), *built[1:]


FILTERS = [
    ("", None, lambda item: True),
    ("image", None, lambda item: item.modality == "image"),
    ("", {"color": "red"}, lambda item: item.fields["color"] == "red"),
    ("text", {"n": "3", "in.a": "é1"}, lambda item: item.modality == "text" and item.fields["n"] == 3
        and item.fields["in"]["a"] == "é1"),
    ("audio", {"even": "True"}, lambda item: item.modality == "audio" and item.fields["even"]),
    ("", {"n": "7"}, lambda item: False),
    ("", {"missing": "None"}, lambda item: True),
]  # fmt: skip


@pytest.mark.parametrize("built_first", [False, True])
def test_agrees_with_brute_force(tmp_path, built_first):
    items, vectors = fill(tmp_path, 900)
    if built_first:
        build_index(tmp_path)
    index, queries = LocalIndex(tmp_path), make_vectors(40, 1)
    assert len(index) == 900 and index.counts() == dict.fromkeys(sorted(MODALITIES), 300)
    for modality, where, fits in FILTERS:
        for hits, query in zip(index.search(queries, 7, modality, where), queries, strict=True):
            assert [hit.item.id for hit in hits] == nearest(items, vectors, query, 7, fits)
            for hit in hits:
                own = int(hit.item.id[2:])
                assert hit.item == items[own] and abs(hit.score - vectors[own] @ query) < 1e-5


@pytest.mark.parametrize("dtype", ["i8", "f16"])
def test_graphs_have_the_recall_that_is_printed_and_exact_filters(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(segment, "FEW_ROWS", 10)  # so that filters go through the graphs too
    items, vectors = fill(tmp_path, 1200, dtype="float16")
    lines: list[str] = []
    about = build_index(tmp_path, Settings(exact_below=100, dtype=dtype), lines.append)
    assert len(lines) == 3 and all(f"recall@10 {graph['recall']:.4f}" in "\n".join(lines)
                                   for graph in about["graphs"].values())  # fmt: skip
    assert all(graph["recall"] >= 0.98 for graph in about["graphs"].values())
    index, queries = LocalIndex(tmp_path), make_vectors(40, 1)
    for modality, where, fits in FILTERS:
        found = []
        for hits, query in zip(index.search(queries, 10, modality, where), queries, strict=True):
            wanted = nearest(items, vectors, query, 10, fits)
            assert len(hits) == len(wanted) and all(fits(hit.item) for hit in hits)
            found += [len({hit.item.id for hit in hits} & set(wanted)) / len(wanted)] if wanted else []
        assert not found or np.mean(found) >= 0.97, (modality, where)


def test_add_and_delete_without_a_rebuild(copied):
    folder, items, vectors = copied
    index, other = LocalIndex(folder), LocalIndex(folder)
    segments = list((folder / "index").iterdir())
    more = make_vectors(30, 5)
    index.add(make_items(1200, 1230), more)
    moved = Item("id7", "image", "new.jpg", text="moved")
    index.add([moved], -vectors[7:8])
    assert index.delete(["id3", "id1201", "nothing", "id3"]) == 2
    assert index.delete(["id3"]) == 0
    for one in (index, other, LocalIndex(folder)):  # also one that was open before
        assert len(one) == 1228
        assert one.search(more[4:5], 1)[0][0].item.id == "id1204"
        assert one.search(-vectors[7:8], 1)[0][0].item == moved
        assert "id3" not in [hit.item.id for hit in one.search(vectors[3:4], 5)[0]]
        assert [item.id for item, _ in one.get(["id1202", "id3", "id7", "id0"])] == ["id1202", "id7", "id0"]
        assert np.allclose(one.get(["id1202"])[0][1], more[2], atol=1e-5)
    assert list((folder / "index").iterdir()) == segments
    build_index(folder, GRAPHS)
    assert list((folder / "index").iterdir()) != segments
    for one in (index, LocalIndex(folder)):
        assert len(one) == 1228 and one.search(-vectors[7:8], 1)[0][0].item == moved
        assert "id3" not in [hit.item.id for hit in one.search(vectors[3:4], 5)[0]]
    index.add(make_items(3, 4), vectors[3:4])  # what was deleted may come back
    assert index.search(vectors[3:4], 1)[0][0].item.id == "id3"


def test_an_index_that_is_whole_is_not_made_again(copied):
    folder = copied[0]
    before = (folder / "index/manifest.json").read_bytes()
    build_index(folder, GRAPHS)
    assert (folder / "index/manifest.json").read_bytes() == before


def damage(file: Path, generator: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    file.write_bytes(data)


def check_refused_or_right(folder: Path, queries: np.ndarray, wanted: list) -> bool:
    """Whether it is refused; where it is not, each neighbor must be right."""
    try:
        index = LocalIndex(folder)
        found = [[(h.item.id, round(h.score, 4)) for h in hits] for hits in index.search(queries, 3)]
    except UserError as error:
        assert "mmfm" in str(error) or "embed" in str(error)
        return True
    assert found == wanted
    return False


def test_200_bit_flips_are_refused(copied):
    """Fault 83."""
    folder, _, _ = copied
    queries, generator = make_vectors(4, 1), random.Random(0)
    index = LocalIndex(folder)
    wanted = [[(h.item.id, round(h.score, 4)) for h in hits] for hits in index.search(queries, 3)]
    index.close()
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.parent.name != "embeddings" and f.name[0] != "."]
    assert len(files) == 10  # two manifests, five tables, three graphs
    refused = 0
    for number in range(200):
        file = files[number % len(files)]
        before = file.read_bytes()
        damage(file, generator)
        refused += check_refused_or_right(folder, queries, wanted)
        file.write_bytes(before)
    assert refused >= 198  # a change of white space in a manifest is none
    assert not check_refused_or_right(folder, queries, wanted)


def test_damaged_files_are_made_anew_of_the_embeddings(copied):
    """Fault 84, and what mends it."""
    folder, items, vectors = copied
    for name in ("items.bin", "offsets.bin", "vectors.bin", "lookup.bin", "parts.bin", "graph-1.bin", "manifest.json"):
        file = next((folder / "index").rglob(name))
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(UserError, match=f"{name}.*damaged.*mmfm index {folder}"):
            LocalIndex(folder)
        build_index(folder, GRAPHS)
        assert LocalIndex(folder).search(vectors[5:6], 1)[0][0].item == items[5]
    next((folder / "index").rglob("vectors.bin")).unlink()
    with pytest.raises(UserError, match="missing"):
        LocalIndex(folder)


def test_damaged_embeddings_are_refused(tmp_path):
    fill(tmp_path, 60)
    for file in (tmp_path / "embeddings").iterdir():
        before = file.read_bytes()
        damage(file, random.Random(1))
        for work in (lambda: LocalIndex(tmp_path), lambda: build_index(tmp_path)):
            with pytest.raises(UserError, match=f"{file.name} is damaged"):
                work()
        file.write_bytes(before[:-100])
        with pytest.raises(UserError, match=f"{file.name} is damaged"):
            LocalIndex(tmp_path)
        file.write_bytes(before)
    LocalIndex(tmp_path)


def reseal(file: Path, change) -> None:
    """Change a manifest, and give it the right hash."""
    data = json.loads(file.read_bytes())
    del data["sha256"]
    change(data)
    file.write_bytes(collections.seal(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.__setitem__("count", data["count"] - 1),
        lambda data: data["spans"].__setitem__("audio", [0, 399]),
        lambda data: data.__setitem__("dim", 16),
        lambda data: data.__setitem__("model", "n" * 64),
        lambda data: data.pop("files"),
        lambda data: data.__setitem__("segment", "../../elsewhere"),
    ],
)
def test_ids_and_vectors_out_of_step(copied, change):
    """Fault 85: a manifest that is whole, but of other files."""
    reseal(copied[0] / "index/manifest.json", change)
    with pytest.raises(UserError, match="mmfm index"):
        LocalIndex(copied[0])


def test_parts_out_of_step(tmp_path):
    """Fault 85, in the embeddings; and a name that leads out of the folder is not followed."""
    fill(tmp_path, 60)
    before = (tmp_path / "collection.json").read_bytes()
    for key, value in (("rows", 29), ("name", "../part-000001.parquet")):
        reseal(tmp_path / "collection.json", lambda data: data["parts"][0].__setitem__(key, value))  # noqa: B023
        with pytest.raises(UserError, match="rows|names what"):
            LocalIndex(tmp_path)
        (tmp_path / "collection.json").write_bytes(before)


def test_wrong_vectors_are_refused(tmp_path):
    """Faults 87 and 88, of what is added, what is asked for and what lies on the disk."""
    items, vectors = fill(tmp_path, 30)
    index = LocalIndex(tmp_path)
    bad = vectors[:2].copy()
    bad[1, 3] = np.nan
    for given, match in (
        (bad, "not finite"), (0 * bad, "zero"), (np.full_like(bad, np.inf), "not finite"),
        (vectors[:2, :8], "8 dimensions"), (vectors[:3], "one vector for each"), (vectors[0], "one vector"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            index.add(items[:2], given)
    for given, match in ((bad, "not finite"), (vectors[:2, :8], "8 dimensions")):
        with pytest.raises(UserError, match=match):
            index.search(given, 1)
    with pytest.raises(UserError, match="top"):
        index.search(vectors[:1], 0)
    with pytest.raises(UserError, match="no 'video'"):
        index.search(vectors[:1], 1, "video")
    with pytest.raises(UserError, match="no id"):
        index.add([Item("", "text", "s")], vectors[:1])
    with pytest.raises(UserError, match="no JSON"):
        index.add([Item("x", "text", "s", fields={"a": object()})], vectors[:1])
    assert len(LocalIndex(tmp_path)) == 30
    data = collections.encode(items[:2], bad)
    with pytest.raises(UserError, match="vector 1 is not of length one"):
        collections.decode(data, DIM, ["id"], "file")
    with pytest.raises(UserError, match="16 dimensions"):
        collections.decode(data, 16, ["id"], "file")


def test_another_model_is_refused(tmp_path):
    """Fault 86."""
    fill(tmp_path, 30)
    index = open_index(tmp_path)
    check_model(index, MODEL)
    with pytest.raises(UserError, match="another model"):
        check_model(index, "n" * 64)
    with pytest.raises(UserError, match="another model"):
        Collection(tmp_path).create("n" * 64, "runs/y", DIM, "float32")
    with pytest.raises(UserError, match="float16 of 32"):
        Collection(tmp_path).create(MODEL, "runs/x", DIM, "float16")


def test_empty_and_absent(tmp_path):
    """Fault 89."""
    with pytest.raises(UserError, match="no collection in it.*mmfm embed"):
        open_index(tmp_path)
    with pytest.raises(UserError, match="ftp"):
        open_index("ftp://host/index")
    Collection(tmp_path).create(MODEL, "runs/x", DIM, "float32")
    index = LocalIndex(tmp_path)
    assert len(index) == 0 and index.counts() == {} and index.get(["a"]) == [] and index.delete(["a"]) == 0
    with pytest.raises(UserError, match="is empty: mmfm embed"):
        index.search(make_vectors(1), 1)
    with pytest.raises(UserError, match="holds no items"):
        build_index(tmp_path)
    index.add(make_items(0, 2), make_vectors(2))
    assert len(index.search(make_vectors(1), 5)[0]) == 2
    index.delete(["id0", "id1"])
    with pytest.raises(UserError, match="is empty"):
        index.search(make_vectors(1), 1)


def test_one_writer_at_a_time(tmp_path):
    fill(tmp_path, 30)
    own = Collection(tmp_path)
    with own.locked(".writer"), pytest.raises(UserError, match=f"process {os.getpid()} is writing there"):
        build_index(tmp_path)
    index, failed = LocalIndex(tmp_path), []

    def write(number: int) -> None:
        try:
            for i in range(5):
                index.add(make_items(100 * number + i, 100 * number + i + 1), make_vectors(1, number))
                index.search(make_vectors(2), 3)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(LocalIndex(tmp_path)) == 50


def test_a_graph_in_large_pages_finds_what_a_mapped_one_finds(copied, monkeypatch):
    def graphs(index):
        return list(index._current().pieces[0][0].graphs.values())

    mapped, queries = LocalIndex(copied[0]), make_vectors(20, 1)
    monkeypatch.setattr(graph, "LARGE_PAGE", 4096)
    large = LocalIndex(copied[0])
    assert all(one.memory is None for one in graphs(mapped)) and all(one.memory for one in graphs(large))
    monkeypatch.setattr(segment, "FEW_ROWS", 10)
    assert large.search(queries, 10, "image") == mapped.search(queries, 10, "image")


def test_an_open_index_of_a_folder_that_is_made_anew(tmp_path):
    """The names of its files come again, with other items in them."""
    folder = tmp_path / "c"
    fill(folder, 30)
    index = LocalIndex(folder)
    before = {hit.item.id for hit in index.search(make_vectors(1, 1), 30, "text")[0]}
    shutil.rmtree(folder)
    own = Collection(folder)
    own.create(MODEL, "runs/x", DIM, "float32")
    items, vectors = [dataclasses.replace(item, id=f"new{item.id}") for item in make_items(0, 30)], make_vectors(30, 5)
    own.append(items[:15], vectors[:15])
    own.append(items[15:], vectors[15:])
    found = {hit.item.id for hit in index.search(make_vectors(1, 1), 30, "text")[0]}
    assert found == {f"new{one}" for one in before}


def test_a_reader_goes_on_while_the_index_is_replaced(copied, monkeypatch):
    """What another process removes while it is being opened is not damage."""
    folder, items, vectors = copied
    index, real = LocalIndex(folder), Segment._verify
    index.add(make_items(1200, 1201), make_vectors(1, 7))

    def replaced_first(segment, here, files):
        monkeypatch.setattr(Segment, "_verify", real)
        LocalIndex(folder).add(make_items(1201, 1202), make_vectors(1, 8))
        build_index(folder, GRAPHS)
        real(segment, here, files)

    monkeypatch.setattr(Segment, "_verify", replaced_first)
    assert len(LocalIndex(folder)) == 1202 and index.search(vectors[5:6], 1)[0][0].item == items[5]


def check_kill(folder: Path, instant: int) -> bool:
    """Kill one who adds, deletes, and makes the index; what was acknowledged must be there, and the same again ends."""
    said = folder.with_name("said")
    said.write_bytes(b"")

    def acknowledge(step: int) -> None:
        with open(said, "ab", buffering=0) as file:
            file.write(bytes([step]))

    def work() -> None:
        index = LocalIndex(folder)
        index.add(make_items(300, 340), make_vectors(40, 3))
        acknowledge(1)
        index.delete([f"id{i}" for i in range(10)])
        acknowledge(2)
        build_index(folder)
        acknowledge(3)
        index.add(make_items(340, 341), make_vectors(1, 4))
        acknowledge(4)

    died = killed(work, instant)
    steps = len(said.read_bytes())
    index = LocalIndex(folder)
    ids = [item.id for item, _ in index.get([f"id{i}" for i in range(400)])]
    wanted = {f"id{i}" for i in range(300)}
    for step, change in ((1, {f"id{i}" for i in range(300, 340)}), (2, {f"id{i}" for i in range(10)}), (4, {"id340"})):
        if steps >= step or change <= set(ids) - wanted or (step == 2 and not change & set(ids)):
            wanted ^= change  # acknowledged, or done just before it could be
    assert set(ids) == wanted and len(ids) == len(index)
    work()
    assert len(LocalIndex(folder)) == 331
    assert LocalIndex(folder).search(make_vectors(40, 3)[7:8], 1)[0][0].item.id == "id307"
    return died


def test_kill_while_adding_deleting_and_indexing(tmp_path):
    """Fault 82, at some of the instants."""
    for instant in (5, 12, 19):
        folder = tmp_path / str(instant) / "c"
        fill(folder, 300)
        assert check_kill(folder, instant)


@pytest.mark.slow
def test_kill_at_every_instant(tmp_path):
    """Fault 82, at all of them."""
    instant, died = 0, True
    while died:
        instant += 1
        folder = tmp_path / str(instant) / "c"
        fill(folder, 300)
        died = check_kill(folder, instant)
    assert instant > 20


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_50_kills_of_one_who_adds_deletes_and_indexes(tmp_path):
    """Fault 82, at random instants, one after the other in the same collection."""
    folder, said = tmp_path / "c", tmp_path / "said"
    fill(folder, 600)
    generator, there, first = np.random.default_rng(0), {f"id{i}" for i in range(600)}, 600

    def work() -> None:
        index = LocalIndex(folder)
        with open(said, "wb", buffering=0) as file:
            for step in range(6):
                start = first + 20 * step
                index.add(make_items(start, start + 20), make_vectors(20, start))
                file.write(b"a")
                index.delete([f"id{start}"])
                file.write(b"d")
                if step % 2:
                    build_index(folder, GRAPHS)

    took, kills, indexed = seconds_of(work), 0, 0
    while kills < 50:
        steps, index = said.read_bytes(), LocalIndex(folder)
        held = {item.id for item, _ in index.get([f"id{i}" for i in range(first + 200)])}
        for step in range(6):
            ids = [f"id{i}" for i in range(first + 20 * step, first + 20 * step + 20)]
            allowed = [set(ids), set(ids[1:])] if steps.count(b"a") > step else [set(), set(ids)]
            assert held & set(ids) in (allowed[1:] if steps.count(b"d") > step else allowed)
            there |= held & set(ids)
        assert held == there and len(index) == len(there)
        indexed += (folder / "index/manifest.json").exists()
        newest = max(int(one[2:]) for one in there)
        own = make_vectors(20, newest // 20 * 20)[newest % 20] if newest >= 600 else make_vectors(600)[newest]
        assert index.search(own[None], 1)[0][0].item.id == f"id{newest}"
        first += 200
        said.write_bytes(b"")
        kills += killed_after(work, generator.uniform(0, took))
    build_index(folder, GRAPHS)
    assert indexed > 25 and LocalIndex(folder).counts().keys() == set(MODALITIES)
    assert {file.name[:8] for file in (folder / "index").iterdir()} == {"manifest", "segment-"}
    assert len(list((folder / "index").iterdir())) == 2
