"""Searching a collection: queries, ranking, folding, standings and the command line, against brute force in float64."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg, output, samples, tiny, tone
from PIL import Image
from test_evaluate import ESCAPE

import multimodal_fm
from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Config, Corpus
from multimodal_fm.errors import UserError
from multimodal_fm.search import engine
from multimodal_fm.search.base import Item
from multimodal_fm.search.collection import Collection, model_hash
from multimodal_fm.search.engine import attempt_many, render, search, search_many
from multimodal_fm.search.index import check_model
from multimodal_fm.search.memory import CorpusIndex, MemoryIndex
from multimodal_fm.search.query import Part, Query, load_model, parse_query, split_query
from multimodal_fm.train import loop
from multimodal_fm.train.config import build

MODALITIES = ("text", "image", "audio")
DIM = 16


def make_items(count: int = 300, dim: int = DIM, seed: int = 0) -> tuple[list[Item], np.ndarray]:
    """Items of three modalities in three regions of the space, their vectors (N, E) float32."""
    draw = np.random.default_rng(seed)
    modalities = [MODALITIES[i % 3] for i in range(count)]
    items = [
        Item(f"{i:04x}", name, f"shard-{i % 2}.tar", f"key{i}", "", f"{name} number {i}",
             {"color": ("red", "blue")[i // 3 % 2], "size": i % 5, "more": {"odd": bool(i % 2)}})
        for i, name in enumerate(modalities)
    ]  # fmt: skip
    gap = {name: 2 * np.eye(dim)[place] for place, name in enumerate(MODALITIES)}
    vectors = draw.standard_normal((count, dim)) + np.stack([gap[name] for name in modalities])
    return items, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_index(items, vectors, model: str = "hash", run: str = "") -> MemoryIndex:
    index = MemoryIndex(model, run, vectors.shape[1])
    index.add(items, vectors)
    return index


def brute_force(items, vectors, query, top, modality="", fits=lambda item: True) -> list[tuple[str, float]]:
    """Ids and cosines of the nearest, in float64."""
    exact = vectors.astype(np.float64)
    cosines = exact @ query / np.linalg.norm(exact, axis=1) / np.linalg.norm(query)
    kept = [(item.id, float(cosine)) for item, cosine in zip(items, cosines, strict=True)
            if modality in ("", item.modality) and fits(item)]  # fmt: skip
    return sorted(kept, key=lambda pair: -pair[1])[:top]


def near(one: str, weight: float = 1.0) -> dict:
    return {"id": one, "weight": weight}


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("run") / "run"
    small = {"backbone": {"width": 32, "depth": 1, "num_heads": 2}}
    loop.pretrain(build({**tiny(corpus, steps=10, save_every=10, **small), "run_dir": str(folder)}))
    return folder


@pytest.fixture(scope="module")
def model(run):
    return multimodal_fm.load(run)


# queries


@pytest.mark.parametrize(
    "parts, said",
    [
        ([], "1 to 32 parts"),
        ([{"text": "a"}] * 33, "1 to 32 parts, not 33"),
        ([{"text": "a"}, {"text": "b", "image": b"x"}], "query part 2 is one of text, image, audio and id"),
        ([{"weight": 1}], "query part 1 is one of text, image, audio and id, not nothing"),
        ([{"text": " \n"}], "query part 1: the text is empty"),
        ([{"text": b"a"}], "query part 1: the text is no string"),
        ([{"id": 7}], "query part 1: the id is no string"),
        ([{"image": "/etc/passwd"}], "the image is a string; give its bytes or a pathlib.Path"),
        ([{"audio": "https://example.org/a.wav"}], "the audio is a string"),
        ([{"text": "a", "weight": 0}], "its weight is 0"),
        ([{"text": "a", "weight": math.nan}], "its weight is nan"),
        ([{"text": "a", "weight": "2"}], "its weight is '2'"),
        ([{"text": "a", "weight": True}], "its weight is True"),
    ],
)
def test_a_query_that_cannot_be_understood_is_one_line(parts, said):
    with pytest.raises(UserError) as caught:
        parse_query(parts)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_vector_of_a_query_is_the_weighted_sum_of_unit_vectors(model, tmp_path):
    """Text, a picture as bytes, as a file and in memory, a sound, an item; added and subtracted."""
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    (tmp_path / "a.flac").write_bytes(tone(440))
    items, vectors = make_items(dim=32)
    index = make_index(items, vectors, model_hash(model))
    query = parse_query([
        {"text": "a red square"}, {"image": tmp_path / "a.jpg", "weight": 2}, {"audio": tone(440), "weight": 0.5},
        {"text": "a blue square", "weight": -1.5}, near(items[7].id, -0.25), {"image": Image.open(tmp_path / "a.jpg")},
    ])  # fmt: skip
    red, blue, picture, sound = (
        model.embed(**{modality: [given]})[modality][0].double().numpy()
        for modality, given in (("text", "a red square"), ("text", "a blue square"), ("image", tmp_path / "a.jpg"),
                                ("audio", tmp_path / "a.flac"))
    )  # fmt: skip
    item = vectors[7].astype(np.float64) / np.linalg.norm(vectors[7].astype(np.float64))
    sums = red + 2 * picture + 0.5 * sound - 1.5 * blue - 0.25 * item + picture
    results = search(index, model, query, top=5, fold=False)
    np.testing.assert_allclose(results.vector, sums / np.linalg.norm(sums), atol=2e-6)
    for modality in MODALITIES:
        expected = brute_force(items, vectors, sums, 6, modality)
        expected = [pair for pair in expected if pair[0] != items[7].id][:5]
        assert [one.item.id for one in results[modality]] == [one for one, _ in expected]
        np.testing.assert_allclose([one.score for one in results[modality]], [s for _, s in expected], atol=1e-5)
    assert [part for part in results.to_data()["query"] if "audio" in part] == [
        {"audio": f"{len(tone(440))} bytes", "weight": 0.5}
    ]


def test_parts_that_cancel_out_are_refused(model):
    index = make_index(*make_items(dim=32), model_hash(model))
    query = parse_query([{"text": "a red square", "weight": 0.3}, {"text": "a red square", "weight": -0.3}])
    with pytest.raises(UserError, match="the parts of the query cancel out"):
        search(index, model, query)


def test_a_bad_query_spoils_no_other_and_a_batch_is_as_one_by_one(model):
    items, vectors = make_items(dim=32)
    index = make_index(items, vectors, model_hash(model))
    good = [[{"text": f"a {color} square number {n}"}] for n, color in enumerate(("red", "green", "blue", "yellow"))]
    good += [[{"image": jpeg((40 * n, 9, 9))}, {"text": "at night" * n, "weight": 0.5}] for n in range(1, 4)]
    good += [[{"audio": tone(200 + 90 * n, 0.2 * n)}] for n in range(1, 4)] + [[near(items[5].id)]]
    bad = [[{"image": b"no picture"}], [{"text": "a"}, near("none")], [{"smell": b"x"}], [{"audio": Path("none.wav")}]]
    queries = [parse_query(parts) for parts in [*good[:5], *bad, *good[5:]]]
    answers = attempt_many(index, model, queries, top=7)
    wrong = [str(one) for one in answers if isinstance(one, UserError)]
    assert len(wrong) == 4 and all(isinstance(one, UserError) for one in answers[5:9])
    for said, expected in zip(wrong, ("part 1 (image 10 bytes): decode", "part 2 (id none): the collection has no such",
                                      "part 1 (smell 1 bytes): the model reads text, image, audio",
                                      "part 1 (audio none.wav): ")):  # fmt: skip
        assert expected in said and "\n" not in said
    with pytest.raises(UserError, match="10 bytes"):
        search_many(index, model, queries)
    together = [one for one in answers if not isinstance(one, UserError)]
    for parts, batched in zip(good, together, strict=True):
        single = search(index, model, parse_query(parts), top=7)
        np.testing.assert_allclose(single.vector, batched.vector, atol=1e-6)
        for modality in MODALITIES:
            pairs = list(zip(single[modality], batched[modality], strict=True))
            assert len(pairs) == 7 and all(a.item is b.item and a.copies == b.copies for a, b in pairs)
            np.testing.assert_allclose([a.score for a, _ in pairs], [b.score for _, b in pairs], atol=1e-6)


def test_a_collection_of_another_model_is_refused(model, run):
    items, vectors = make_items(dim=32)
    other = multimodal_fm.load(run)
    torch.nn.init.normal_(other.heads["retrieval"].projection["text"])  # which `lora.base_hash` does not see
    index = make_index(items, vectors, model_hash(other), "runs/other")
    with pytest.raises(UserError, match=r"the index was made by another model \(runs/other, "):
        search(index, model, parse_query([{"text": "a"}]))
    check_model(index, other)
    for gone in ("runs/nowhere", "hf:somebody/something", "https://example.org/run", ""):
        with pytest.raises(UserError, match="the model that made the collection is not there"):
            load_model(make_index(items, vectors, model_hash(model), gone))
    assert model_hash(load_model(make_index(items, vectors, model_hash(model), "runs/nowhere"), run)) == model_hash(
        model
    )


# ranking


def test_ranking_and_standings_against_brute_force():
    items, vectors = make_items()
    index = make_index(items, vectors)
    vectors = np.stack([vector for _, vector in index.get([item.id for item in items])])  # as it holds them
    for number in (0, 1, 2, 77):
        query = parse_query([near(items[number].id), near(items[number + 9].id, -0.4)])
        own = vectors.astype(np.float64)
        own /= np.linalg.norm(own, axis=1, keepdims=True)
        vector = own[number] - 0.4 * own[number + 9]
        results = search(index, None, query, top=12, fold=False)
        assert set(results.hits) == set(MODALITIES)
        for modality in MODALITIES:
            every = brute_force(items, vectors, vector, 300, modality)
            expected = [pair for pair in every if pair[0] not in query.ids][:12]
            found = results[modality]
            assert [one.item.id for one in found] == [one for one, _ in expected]
            np.testing.assert_allclose([one.score for one in found], [score for _, score in expected], atol=1e-12)
            farther = [100 * sum(score < one.score - 1e-6 for _, score in every) / 100 for one in found]
            np.testing.assert_allclose([one.standing for one in found], farther)  # all 100 are the background
            assert results.background[modality].count == 100
            assert results.background[modality].highest == pytest.approx(every[0][1])
            assert results.background[modality].median == pytest.approx(np.median([score for _, score in every]))


def test_standings_of_a_large_collection_are_those_of_a_sample(monkeypatch):
    monkeypatch.setattr(engine, "BACKGROUND", 400)
    items, vectors = make_items(6000)
    index = make_index(items, vectors)
    (found,) = search(index, None, parse_query([near(items[1].id), near(items[4].id)]), 1, "image").hits["image"]
    every = brute_force(items, vectors, vectors[1].astype(np.float64) + vectors[4], 6000, "image")
    lower = search(index, None, parse_query([near(items[1].id), near(items[4].id)]), 1000, "image", fold=False)
    assert lower.background["image"].count == 400 and found.standing > 99
    for rank in (200, 500, 900):
        exact = 100 * (len(every) - rank) / len(every)
        assert abs(lower["image"][rank].standing - exact) < 8, "a sample of 400 has a standard error of 2.5"
    assert lower["image"][500].score == pytest.approx(every[502][1]), "the two that are named are left out"


def test_filters_options_and_targets():
    items, vectors = make_items()
    index = make_index(items, vectors)
    query = parse_query([near(items[3].id)])
    for where, fits in (
        ({"color": "red"}, lambda item: item.fields["color"] == "red"),
        ({"color": "red", "size": "3"}, lambda item: item.fields["color"] == "red" and item.fields["size"] == 3),
        ({"more.odd": "True"}, lambda item: item.fields["more"]["odd"]),
        ({"color": "green"}, lambda item: False),
    ):
        found = search(index, None, query, 9, "image", where=where, fold=False)
        expected = brute_force(items, vectors, vectors[3].astype(np.float64), 9, "image", fits)
        assert [one.item.id for one in found["image"]] == [one for one, _ in expected]
        assert list(found.hits) == ["image"], "what was asked for is told, empty too"
    scores = [one.score for one in search(index, None, query, 50, fold=False)["text"]]
    kept = search(index, None, query, 50, fold=False, min_score=scores[9] - 1e-9)
    assert [one.score for one in kept["text"]] == scores[:10]
    for options, said in (({"top": 0}, "top is 1 to"), ({"to": "smell"}, "--to smell: the collection has")):
        with pytest.raises(UserError, match=said):
            search(index, None, query, **options)
    with pytest.raises(UserError, match="there is no model to read it"):
        search(index, None, parse_query([{"text": "a"}]))


def test_a_collection_in_a_folder_answers_as_one_in_memory(tmp_path):
    pytest.importorskip("pyarrow")
    items, vectors = make_items(240)
    Collection(tmp_path / "own").create("hash", "", DIM, "float32")
    index, memory = multimodal_fm.open_index(tmp_path / "own"), make_index(items[:200], vectors[:200])
    with pytest.raises(UserError, match="the collection is empty"):
        search(index, None, Query((Part("image", b""),)))
    index.add(items[:150], vectors[:150])
    index.add(items[150:], vectors[150:])
    index.delete([item.id for item in items[200:]])
    for number in (0, 5, 91):
        query = parse_query([near(items[number].id), near(items[number + 8].id, -0.5)])
        for options in ({"top": 7}, {"top": 9, "to": "audio", "where": {"color": "red"}}, {"fold": False}):
            one, other = (search(where, None, query, **options).to_data() for where in (index, memory))
            assert one.pop("background") == {
                modality: {name: pytest.approx(value, abs=1e-6) for name, value in own.items()}
                for modality, own in other.pop("background").items()
            }
            assert json.loads(json.dumps(one), parse_float=lambda x: round(float(x), 5)) == json.loads(
                json.dumps(other), parse_float=lambda x: round(float(x), 5))  # fmt: skip
    drawn = index.sample("image", 30)
    own = vectors[[item.modality == "image" for item in items[:200]] + [False] * 40]
    assert drawn.shape == (30, DIM) and np.abs((drawn @ own.T).max(1) - 1).max() < 1e-6
    assert len(np.unique(drawn, axis=0)) == 30 and index.sample("smell", 5).shape == (0, DIM)
    with pytest.raises(UserError, match="--to smell: the collection has audio, image, text"):
        multimodal_fm.search(tmp_path / "own", {"id": items[0].id}, to="smell")


# near copies


def fold_by_hand(items, vectors, query, modality, limit=0.98):
    """Greedy groups over all items of a modality by their rank, in float64."""
    own = {item.id: vector / np.linalg.norm(vector) for item, vector in zip(items, vectors.astype(np.float64))}
    texts = {item.id: item.text.strip() for item in items if item.modality == "text"}
    groups: list[list[str]] = []
    for one, _ in brute_force(items, vectors, query, len(items), modality):
        for group in groups:
            if own[one] @ own[group[0]] >= limit or (one in texts and texts[one] == texts[group[0]]):
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


@pytest.mark.parametrize("modality", MODALITIES)
def test_near_copies_are_folded_into_the_best(modality):
    """Planted copies, some beyond the limit, and for texts equal words with other vectors."""
    items, vectors = make_items(240)
    draw = np.random.default_rng(1)
    for number in range(60):
        original = draw.integers(240)
        noise = draw.standard_normal(DIM) * draw.choice([0.02, 0.04, 0.06, 0.1])
        item = Item(f"copy{number}", items[original].modality, "copies.tar", text=items[original].text
                    if number % 3 else "said anew", fields={})  # fmt: skip
        vector = vectors[original] + noise
        items, vectors = [*items, item], np.vstack([vectors, vector / np.linalg.norm(vector)]).astype(np.float32)
    index = make_index(items, vectors)
    for seed in range(5):
        named = items[random.Random(seed).randrange(240)]
        query = vectors[[item.id for item in items].index(named.id)].astype(np.float64)
        others = [n for n, item in enumerate(items) if item.id != named.id]
        expected = fold_by_hand([items[n] for n in others], vectors[others], query, modality)
        found = search(index, None, parse_query([near(named.id)]), 100, modality)[modality]
        assert [[one.item.id, *(copy.id for copy in one.copies)] for one in found] == expected[:100]
        assert any(len(group) > 1 for group in expected)
        plain = search(index, None, parse_query([near(named.id)]), 300, modality, fold=False)[modality]
        assert len(plain) == sum(map(len, expected)) and not any(one.copies for one in plain)


def test_where_copies_crowd_the_front_more_is_looked_at():
    items, vectors = make_items(60)
    draw = np.random.default_rng(2)
    crowd = vectors[1] + 0.01 * draw.standard_normal((700, DIM))
    crowd = (crowd / np.linalg.norm(crowd, axis=1, keepdims=True)).astype(np.float32)
    items += [Item(f"crowd{n:03d}", "image", "crowd.tar") for n in range(700)]
    index = make_index(items, np.vstack([vectors, crowd]))
    found = search(index, None, parse_query([near(items[1].id)]), 5, "image")["image"]
    assert len(found) == 5 and len(found[0].copies) == 699 and not found[0].item.id.startswith("0")
    expected = fold_by_hand(items[:1] + items[2:], np.vstack([vectors[:1], vectors[2:], crowd]), vectors[1], "image")
    assert [one.item.id for one in found[1:]] == [group[0] for group in expected[1:5]]


def test_equal_scores_are_told_apart_by_the_id():
    vector = np.eye(DIM, dtype=np.float32)[:1]
    names = [f"{n:02d}" for n in range(20)]
    answers = []
    for seed in range(3):
        order = random.Random(seed).sample(names, len(names))
        items = [Item(name, "image", "a.tar") for name in order] + [Item("asked", "image", "a.tar")]
        index = make_index(items, np.repeat(vector, 21, 0))
        answers.append(
            [one.item.id for one in search(index, None, parse_query([near("asked")]), 20, fold=False)["image"]]
        )
    assert answers == [names] * 3


def test_results_are_plain_json_whatever_a_sample_says():
    deep: dict = {}
    for _ in range(3000):
        deep = {"in": deep}
    fields = {"nan": math.nan, "inf": [math.inf], "half": "\ud800", "deep": deep, 3: b"bytes", "label": "<b>"}
    index = make_index(
        [Item("a", "text", "s\udcff", "k", "txt", "t\ud800" + ESCAPE, fields)], np.eye(4, dtype=np.float32)[:1]
    )
    index.add([Item("b", "text", "s", "k")], np.eye(4, dtype=np.float32)[:1])
    results = search(index, None, parse_query([near("b")]))
    data = json.loads(json.dumps(results.to_data(), allow_nan=False, ensure_ascii=False).encode())
    (hit,) = data["hits"]["text"]
    assert hit["fields"]["nan"] is None and hit["fields"]["inf"] == [None] and hit["fields"]["half"] == "?"
    assert (hit["id"], hit["score"], hit["copies"], hit["text"][:2]) == ("a", 1.0, [], "t?")
    assert "\x1b" not in render(results) and "\\x1b[31mred" in render(results) and "[<b>]" in render(results)


# shards that are embedded on the fly


def test_a_corpus_says_where_what_and_which_part(model, tmp_path):
    """The shard, the key, the label and the text of each hit; of several captions and windows the one that matched."""
    made = samples(8)
    made[2] |= {"txt": ESCAPE + " " + "and a very long story " * 20}
    made[5] = {"__key__": "two", "json": {"captions": ["a green square", "a yellow square"], "label": "named"}}
    shards.write(tmp_path / "a.tar", made)
    index = CorpusIndex(model, Corpus(Config([str(tmp_path / "a.tar")]), "in"))
    results = search(index, model, parse_query([{"text": "a yellow square"}]), top=8, fold=False)
    assert not index.skipped and list(results.hits) == ["text", "image", "audio"]
    assert {modality: len(own) for modality, own in results.hits.items()} == {"text": 8, "image": 7, "audio": 4}
    (best,) = [hit for hit in results["text"] if hit.item.text == "a yellow square"]
    assert best is results["text"][0] and best.score == pytest.approx(1, abs=1e-4)
    assert (best.item.key, best.item.fields["label"], best.item.member) == ("two", "named", "json")
    said = render(results, lambda found: index.notes(found.item, results.vector))
    (line,) = [line for line in said.splitlines() if "a yellow square" in line and "two.json" in line]
    assert f"{tmp_path / 'a.tar'} two.json  [named]  a yellow square  (text 2 of 2)" in line
    (line,) = [line for line in said.splitlines() if "\\x1b[31mred" in line and "(window " in line]
    assert "\x1b" not in said
    (long,) = [hit for hit in results["text"] if "story" in hit.item.text]
    tokenizer = model.tokenizers["text"]
    windows = model.embed_sequences("text", [[one] for one in tokenizer.read(long.item.text)])[0].numpy()
    nearest = int((windows @ results.vector).argmax()) + 1
    assert index.notes(long.item, results.vector) == [f"window {nearest} of {len(windows)}"] and len(windows) > 1
    image = results["image"][0].item
    assert image.member == "jpg" and image.fields["cls"] in "0123" and image.text.startswith("a ")
    more = [index.notes(hit.item, results.vector) for hit in results["audio"]]
    assert sorted(more) == [[], ["and 1 more samples"], ["and 1 more samples"], ["and 1 more samples"]]


def test_the_command_line(mmfm, run, corpus, tmp_path):
    shard = corpus / "validation-0.tar"
    (tmp_path / "red.jpg").write_bytes(jpeg("red"))
    for words in (
        ["a red square", "--in", shard],
        ["--image", tmp_path / "red.jpg", "--minus", "blue", "--weight", "minus=0.5", "--in", shard, "a red square"],
    ):
        said = output(mmfm("search", run, *words, "--top", 3, "--no-fold"))
        assert all(f"\n{modality}\n" in said for modality in MODALITIES) and said.count("sample01") == 9
    words = ("search", run, "a red square", "--in", shard, "--to", "image", "--json", "--where", "color=red")
    said = output(mmfm(*words))
    rows = [json.loads(line) for line in said.splitlines()]
    assert rows and all(row["modality"] == "image" and row["fields"]["color"] == "red" for row in rows)
    assert {"id", "source", "key", "member", "score", "standing", "copies", "notes"} <= rows[0].keys()


def test_wrong_words_on_the_command_line(mmfm, run, corpus, tmp_path):
    shard = str(corpus / "validation-0.tar")
    for words, said in (
        ([str(run), "--in", shard], "name what to search for: a text, --image FILE, --audio FILE or --like ID"),
        ([str(run), "a", "--in", str(tmp_path / "nothing.tar")], "no file matches"),
        ([str(run), "a"], "is a run: name shards to search with --in, or embed them"),
        ([str(run), "a", "--in", shard, "--weight", "text"], "--weight 'text' is not NAME=NUMBER"),
        ([str(run), "a", "--in", shard, "--weight", "txt=2"], "the names are text, image, audio, like, minus"),
        ([str(run), "a", "--in", shard, "--minus", "a"], "the parts of the query cancel out"),
        ([str(run), "a", "--in", shard, "--to", "smell"], "--to smell: the collection has"),
        ([str(run), "--image", "none.jpg", "--in", shard], "query part 1 (image none.jpg): "),
        ([str(run), "--in", str(tmp_path), "dog"], f"{tmp_path} is a folder"),
        ([str(run), "--in", str(tmp_path / "none"), "dog"], f"no file matches {tmp_path / 'none'}"),
    ):
        done = mmfm("search", *words)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_query_may_stand_behind_the_shards(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert split_query(["a.tar", "b.jsonl", "a", "dog"]) == (["a.tar", "b.jsonl"], "a dog")
    assert split_query([str(folder), "dog"]) == ([str(folder)], "dog")
    assert split_query(["no/such/folder", "dog"]) == (["no/such/folder"], "dog")
    assert split_query(["s3://bucket/x-*", "dog"]) == (["s3://bucket/x-*"], "dog")
    assert split_query(["a.tar"]) == (["a.tar"], "") and split_query([]) == ([], "")


def test_in_python(model, run, corpus, tmp_path):
    (tmp_path / "a.JPG").write_bytes(jpeg("red"))
    index = CorpusIndex(model, Corpus(Config([str(corpus / "validation-0.tar")]), "in"))
    results = multimodal_fm.search(index, tmp_path / "a.JPG", {"text": "blue", "weight": -0.5}, to="image", top=3)
    vectors = {m: v[0].double().numpy() for m, v in model.embed(text=["blue"], image=[tmp_path / "a.JPG"]).items()}
    expected = vectors["image"] - 0.5 * vectors["text"]
    np.testing.assert_allclose(results.vector, expected / np.linalg.norm(expected), atol=1e-6)
    assert len(results["image"]) and results["audio"] == [] and "image" in str(results)
    for part, said in (
        (tmp_path / "a.xyz", "its ending does not tell"),
        (7, "a text, a pathlib.Path or a dict, not int"),
    ):
        with pytest.raises(UserError, match=said):
            multimodal_fm.search(index, part)
