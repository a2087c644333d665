"""The data of a tune: whatever is given becomes shards with parts and classes; what cannot be learned is one line."""

import csv
import json

import numpy as np
import pytest
from conftest import jpeg, tone

from multimodal_fm.corpus import shards
from multimodal_fm.corpus.shards import Config, Corpus
from multimodal_fm.errors import UserError
from multimodal_fm.tune import data
from multimodal_fm.tune.data import TASKS, Prepared, prepare

PARTS = ("train", "validation", "test")


def contents(prepared: Prepared) -> dict[str, list[dict]]:
    """Each part's samples as members by extension, JSON parsed."""
    read = {}
    for part in PARTS:
        corpus = Corpus(Config(getattr(prepared, part)))
        assert len(corpus) == prepared.counts[part]
        read[part] = [corpus.raw(number) for number in range(len(corpus))]
        for raw in read[part]:
            raw["json"] = json.loads(raw.get("json", b"{}"))
    return read


def values(prepared: Prepared, field: str) -> dict[str, list]:
    return {part: [raw["json"][field] for raw in own] for part, own in contents(prepared).items()}


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_table(path, rows, delimiter=",", **options) -> str:
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, **options)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def reviews(count=60) -> list[dict]:
    return [
        {"text": f"{'fine' if i % 2 else 'poor'} thing, number {i}", "label": "good" if i % 2 else "bad"}
        for i in range(count)
    ]


def pictures(folder, names=("cats", "dogs"), count=20):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.jpg").write_bytes(jpeg((200 * number, 3 * i, 5 * i + 20)))
    return folder


def refused(task, data, folder, **settings) -> str:
    with pytest.raises(UserError) as caught:
        prepare(task, data if isinstance(data, list) else [str(data)], folder / "run", **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- what can be given


def test_forty_pictures_in_two_folders(tmp_path):
    found = prepare("image-classification", [str(pictures(tmp_path / "pets"))], tmp_path / "run")
    assert found.modalities == ["image"] and found.head == {"classes": ["cats", "dogs"], "multi_label": False}
    assert found.counts == {"train": 28, "validation": 4, "test": 8} and not found.fuse
    labels = values(found, found.label)
    assert [labels[part].count("cats") for part in PARTS] == [14, 2, 4]
    assert all("jpg" in raw and raw["json"].keys() == {"label"} for own in contents(found).values() for raw in own)
    assert not list((tmp_path / "run/data").glob("*/packs")), "the working files are removed"


def test_a_folder_of_sounds(tmp_path):
    for number, name in enumerate(("bell", "horn")):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "sounds" / name / f"{i}.wav").write_bytes(tone(200 + 100 * number + i, 0.1, kind="WAV"))
    found = prepare("audio-classification", [str(tmp_path / "sounds")], tmp_path / "run")
    assert found.modalities == ["audio"] and found.head["classes"] == ["bell", "horn"]
    assert found.counts == {"train": 14, "validation": 2, "test": 4}


def test_texts_and_labels_of_a_csv(tmp_path):
    found = prepare("text-classification", [write_table(tmp_path / "a.csv", reviews())], tmp_path / "run")
    assert found.modalities == ["text"] and found.head["classes"] == ["bad", "good"] and found.label == "label"
    assert found.counts == {"train": 42, "validation": 6, "test": 12}
    rows = [raw["json"] for own in contents(found).values() for raw in own]
    assert sorted(map(str, rows)) == sorted(map(str, reviews()))


@pytest.mark.parametrize("words, tags", [("words", "tags"), ("tokens", "ner_tags"), ("tokens", "labels")])
def test_tagged_words(tmp_path, words, tags):
    rows = [{words: ["in", f"Town{i}", "now"], tags: ["O", "PLACE", "O"]} for i in range(20)]
    found = prepare("token-tagging", [write_lines(tmp_path / "a.jsonl", rows)], tmp_path / "run")
    assert found.head == {"classes": ["O", "PLACE"]} and found.label == "tags"
    for own in contents(found).values():
        for row in (raw["json"] for raw in own):
            assert row["text"] == " ".join(row["words"]) and row["tags"] == ["O", "PLACE", "O"]


def test_numbers_as_tags_stay_in_the_order_of_their_values(tmp_path):
    rows = [{"tokens": ["a", f"b{i}"], "ner_tags": [i % 12, 0]} for i in range(40)]
    found = prepare("token-tagging", [write_lines(tmp_path / "a.jsonl", rows)], tmp_path / "run")
    assert found.head["classes"] == [str(i) for i in range(12)]


def questions(kind: str) -> list[dict]:
    rows = []
    for i in range(20):
        context, answer = f"The house of person {i} is painted in shade {i * 7}.", f"shade {i * 7}"
        start = context.index(answer)
        row = {"question": f"Which shade?{' Say it.' * (i % 2)}", "context": context}
        rows.append(
            row
            | {
                "squad": {"answers": {"text": [answer, answer], "answer_start": [start, start]}},
                "list": {"answers": [{"text": answer, "answer_start": start}]},
                "flat": {"answer": answer, "answer_start": start},
                "plain": {"answer": answer},
            }[kind]
        )
    return rows


@pytest.mark.parametrize("kind", ["squad", "list", "flat", "plain"])
def test_questions(tmp_path, kind):
    rows = questions(kind)
    rows[3] |= {"answers": {"text": [], "answer_start": []}} if kind == "squad" else {}
    found = prepare("question-answering", [write_lines(tmp_path / "a.jsonl", rows)], tmp_path / "run")
    assert found.label == "answer" and found.head == {}
    read = [raw["json"] for own in contents(found).values() for raw in own]
    assert sum(row["answer"] is None for row in read) == (kind == "squad")
    for row in read:
        if row["answer"]:
            answer = row["text"][row["answer"]["start"] : row["answer"]["end"]]
            assert answer.startswith("shade ") and row["answers"] == [answer] and row["text"].endswith(f"{answer}.")


def test_questions_over_one_context_stay_together_and_the_nested_file_of_squad_is_read(tmp_path):
    paragraphs = [
        {
            "context": f"Number {i} stands here.",
            "qas": [
                {"id": f"{i}-{k}", "question": f"Which {k}?", "answers": [{"text": f"{i}", "answer_start": 7}]}
                for k in range(4)
            ],
        }
        for i in range(20)
    ]
    (tmp_path / "a.json").write_text(json.dumps({"version": "2", "data": [{"paragraphs": paragraphs}]}))
    found = prepare("question-answering", [str(tmp_path / "a.json")], tmp_path / "run")
    contexts = {part: {t.partition("\n")[2] for t in own} for part, own in values(found, "text").items()}
    assert found.counts == {"train": 56, "validation": 8, "test": 16}
    assert sum(map(len, contexts.values())) == 20 == len(set().union(*contexts.values()))


def test_image_and_text_pairs(tmp_path):
    made = [
        {
            "__key__": f"s{i}",
            "jpg": jpeg((i, 50, 90)),
            "txt": f"a thing {i}",
            "json": {"match": "yes" if i % 3 else "no"},
        }
        for i in range(30)
    ]
    shards.write(tmp_path / "a.tar", made)
    found = prepare("pair-classification", [str(tmp_path / "a.tar")], tmp_path / "run", label="match")
    assert found.modalities == ["image", "text"] and found.fuse and found.label == "match"
    assert found.head["classes"] == ["no", "yes"] and sum(found.counts.values()) == 30
    assert all({"jpg", "txt"} <= raw.keys() for own in contents(found).values() for raw in own)


@pytest.mark.parametrize("first, second", [("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis")])
def test_pairs_of_texts(tmp_path, first, second):
    rows = [{first: f"a {i}", second: f"b {i}", "label": i % 2} for i in range(30)]
    found = prepare("pair-classification", [write_lines(tmp_path / "a.jsonl", rows)], tmp_path / "run")
    assert found.modalities == ["text"] and found.head["classes"] == ["0", "1"]
    assert {tuple(t.split("\n")) for own in values(found, "text").values() for t in own} == {
        (f"a {i}", f"b {i}") for i in range(30)
    }


@pytest.mark.parametrize("labels", [lambda i: ["x", "y"] if i % 2 else ["y", "z"], lambda i: "x|y" if i % 2 else "y|z"])
def test_several_labels(tmp_path, labels):
    rows = [{"text": f"thing {i}", "labels": labels(i)} for i in range(40)]
    found = prepare("text-classification", [write_lines(tmp_path / "a.jsonl", rows)], tmp_path / "run")
    assert found.head == {"classes": ["x", "y", "z"], "multi_label": True}
    assert all(one in (["x", "y"], ["y", "z"]) for own in values(found, found.label).values() for one in own)


def test_scores(tmp_path):
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": f"{i / 7:.2f}"} for i in range(30)]
    found = prepare("regression", [write_table(tmp_path / "a.csv", rows)], tmp_path / "run")
    assert found.label == "score" and found.head == {} and found.modalities == ["text"]
    assert all(isinstance(one, float) for own in values(found, "score").values() for one in own)


@pytest.mark.parametrize("task, modalities", [("captioning", ["image", "text"]), ("retrieval", ["image", "text"])])
def test_pictures_with_captions(tmp_path, task, modalities):
    (tmp_path / "a").mkdir()
    for i in range(20):
        (tmp_path / f"a/{i}.jpg").write_bytes(jpeg((i, 9, 99)))
        (tmp_path / f"a/{i}.txt").write_text(f"the picture {i}")
    found = prepare(task, [str(tmp_path / "a")], tmp_path / "run")
    assert found.modalities == modalities and found.fuse == (task == "captioning") and found.label == ""
    assert sum(found.counts.values()) == 20
    assert all(raw["txt"].startswith(b"the picture") for own in contents(found).values() for raw in own)


def test_a_table_of_pictures(tmp_path):
    pictures(tmp_path / "media", count=10)
    rows = [{"file": f"media/{c}/{i}.jpg", "kind": c, "when": i} for c in ("cats", "dogs") for i in range(10)]
    found = prepare("image-classification", [write_table(tmp_path / "a.csv", rows)], tmp_path / "run", label="kind")
    assert found.head["classes"] == ["cats", "dogs"] and sum(found.counts.values()) == 20


def test_shards_with_parts_are_used_as_they_are(tmp_path):
    for name, start in (("train", 0), ("validation", 30), ("test", 40)):
        made = [
            {"__key__": f"{i}", "jpg": jpeg((i, 1, 1)), "cls": str(i % 2), "json": {"label": "ab"[i % 2]}}
            for i in range(start, start + 10)
        ]
        shards.write(tmp_path / f"{name}-0.tar", made)
    own = {part: [str(tmp_path / f"{part}-*.tar")] for part in ("validation", "test")}
    found = prepare("image-classification", [str(tmp_path / "train-*.tar")], tmp_path / "run", **own)
    assert found.train == [str(tmp_path / "train-0.tar")] and found.test == [str(tmp_path / "test-0.tar")]
    assert found.label == "label" and found.head["classes"] == ["a", "b"], "the word rather than its number"
    found = prepare("image-classification", [str(tmp_path)], tmp_path / "run")
    assert found.validation == [str(tmp_path / "validation-0.tar")], "files of a folder say by name which part they are"
    found = prepare("image-classification", [str(tmp_path)], tmp_path / "run", label=".cls")
    assert found.label == ".cls" and found.head["classes"] == ["0", "1"]


def test_folders_named_after_parts(tmp_path):
    for part, count in (("train", 12), ("val", 4), ("test", 6)):
        pictures(tmp_path / "a" / part, count=count)
    found = prepare("image-classification", [str(tmp_path / "a")], tmp_path / "run")
    assert found.counts == {"train": 24, "validation": 8, "test": 12} and found.head["classes"] == ["cats", "dogs"]


def test_texts_of_a_hub_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"thing {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(tmp_path / "a")
    found = prepare("text-classification", [str(tmp_path / "a")], tmp_path / "run")
    assert found.head["classes"] == ["no", "yes"] and sum(found.counts.values()) == 40


def test_pictures_of_a_hub_data_set_keep_their_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    splits = {}
    for start, (name, count) in enumerate((("train", 20), ("validation", 6), ("test", 8))):
        rows = {
            "img": [{"bytes": jpeg((10 * start, i, i)), "path": None} for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        splits[name] = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "a")
    found = prepare("image-classification", [str(tmp_path / "a")], tmp_path / "run")
    assert found.head["classes"] == ["no", "yes"] and found.counts == {"train": 20, "validation": 6, "test": 8}


# -------------------------------------------------------------------------------------------------------- the split


def test_the_split_is_the_same_for_any_order_and_another_for_another_seed(tmp_path):
    rows = reviews(100)
    ways = {"a": rows, "b": rows[::-1]}
    tests = {}
    for name, own in ways.items():
        for seed in (0, 1):
            data = write_lines(tmp_path / f"{name}.jsonl", own)
            found = prepare("text-classification", [data], tmp_path / "run", seed=seed)
            tests[name, seed] = {part: set(texts) for part, texts in values(found, "text").items()}
    assert tests["a", 0] == tests["b", 0] and tests["a", 1] == tests["b", 1] and tests["a", 0] != tests["a", 1]


def test_a_second_call_finds_it_done(tmp_path):
    data = [write_table(tmp_path / "a.csv", reviews())]
    first = prepare("text-classification", data, tmp_path / "run")
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.jsonl")}
    assert prepare("text-classification", data, tmp_path / "run") == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.jsonl")} == stamps
    write_table(tmp_path / "a.csv", reviews(80))
    assert sum(prepare("text-classification", data, tmp_path / "run").counts.values()) == 80


def test_equal_texts_and_equal_pictures_stay_in_one_part(tmp_path):
    rows = [{"text": f"thing {i // 4}{' ' * (i % 2)}", "label": "ab"[i // 4 % 2]} for i in range(120)]
    found = prepare("text-classification", [write_lines(tmp_path / "a.jsonl", rows)], tmp_path / "run")
    parts = [{text.strip() for text in own} for own in values(found, "text").values()]
    assert sum(map(len, parts)) == 30 and sum(found.counts.values()) == 120
    folder = pictures(tmp_path / "pets")
    for name in ("cats", "dogs"):
        for i in range(20):
            (folder / name / f"copy{i}.jpg").write_bytes((folder / name / f"{i}.jpg").read_bytes())
    found = prepare("image-classification", [str(folder)], tmp_path / "run")
    parts = [{raw["jpg"] for raw in own} for own in contents(found).values()]
    assert sum(map(len, parts)) == len(set().union(*parts)) and sum(found.counts.values()) == 80


def test_every_class_is_in_training(tmp_path):
    generator = np.random.default_rng(0)
    rows = [{"text": f"thing {i}", "label": [*{f"c{generator.zipf(1.5) % 30}" for _ in range(2)}]} for i in range(200)]
    found = prepare("text-classification", [write_lines(tmp_path / "a.jsonl", rows)], tmp_path / "run")
    labels = {part: {one for own in lists for one in own} for part, lists in values(found, "label").items()}
    assert labels["train"] == set(found.head["classes"]) and found.counts["test"] > 20


def test_one_text_that_all_share_does_not_tie_pairs_together(tmp_path):
    made = [
        {
            "__key__": f"s{i}",
            "jpg": jpeg((i, 50, 90)),
            "txt": "Is it red?",
            "json": {"answer": "yes" if i % 3 else "no"},
        }
        for i in range(30)
    ]
    shards.write(tmp_path / "a.tar", made)
    found = prepare("pair-classification", [str(tmp_path / "a.tar")], tmp_path / "run", label="answer")
    assert found.counts["test"] == 6 and any("many samples share" in note for note in found.notes)


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_class_that_is_only_in_the_test_part(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", reviews())
    other = write_lines(tmp_path / "b.jsonl", [*reviews(4), {"text": "who knows", "label": "strange"}])
    for part in ("test", "validation"):
        message = refused("text-classification", data, tmp_path, **{part: [other]})
        assert "'strange' is only in" in message and part in message and "line 5" in message


def test_an_empty_class(tmp_path):
    folder = pictures(tmp_path / "pets")
    (folder / "birds").mkdir()
    assert "'birds' has no sample" in refused("image-classification", folder, tmp_path)
    (folder / "birds/0.jpg").write_bytes(b"no picture")
    assert "'birds' has no sample" in refused("image-classification", folder, tmp_path)


def test_fewer_than_two_classes_or_samples(tmp_path):
    assert "only the class 'cats'" in refused("image-classification", pictures(tmp_path / "a", ["cats"]), tmp_path)
    one = write_lines(tmp_path / "a.jsonl", [{"text": "a thing", "score": 3}])
    assert "1 sample (1 different) are too few" in refused("regression", one, tmp_path)
    two = write_lines(tmp_path / "b.jsonl", reviews(2))
    assert "2 samples (2 different) are too few" in refused("text-classification", two, tmp_path)
    assert "no samples" in refused("text-classification", write_lines(tmp_path / "c.jsonl", []), tmp_path)


def test_labels_that_are_no_numbers(tmp_path):
    rows = [{"text": f"thing {i}", "score": "much"} for i in range(20)]
    message = refused("regression", write_table(tmp_path / "a.csv", rows), tmp_path)
    assert "20 of 20 samples" in message and "row 1" in message and "'much' in 'score' is no number" in message


def test_numbers_that_are_no_classes(tmp_path):
    rows = [{"text": f"thing {i}", "label": i / 7} for i in range(40)]
    assert "--task regression" in refused("text-classification", write_lines(tmp_path / "a.jsonl", rows), tmp_path)


def test_tags_of_another_length_than_the_words(tmp_path):
    rows = [{"words": ["a", f"b{i}"], "tags": ["O", "X"]} for i in range(40)]
    rows[6]["tags"] = ["O"]
    found = prepare("token-tagging", [write_lines(tmp_path / "a.jsonl", rows)], tmp_path / "run")
    assert sum(found.counts.values()) == 39
    assert any("line 7: 2 words, but 1 tags" in note and "1 of 40" in note for note in found.notes)
    (file,) = (tmp_path / "run/data").glob("*/quarantine.jsonl")
    assert json.loads(file.read_text())["key"].endswith("line 7")
    for row in rows[10:14]:
        row["tags"] = []
    message = refused("token-tagging", write_lines(tmp_path / "b.jsonl", rows), tmp_path)
    assert "5 of 40 samples" in message and "line 7: 2 words, but 1 tags" in message


def test_an_answer_that_is_not_in_its_context(tmp_path):
    rows = questions("squad")
    rows[4]["answers"]["answer_start"] = [2, 2]
    found = prepare("question-answering", [write_lines(tmp_path / "a.jsonl", rows)], tmp_path / "run")
    assert sum(found.counts.values()) == 19 and any(
        "line 5: the answer 'shade 28' is not at 2" in n for n in found.notes
    )
    rows = questions("plain")
    for row in rows[2:5]:
        row["answer"] = "elsewhere"
    message = refused("question-answering", write_lines(tmp_path / "b.jsonl", rows), tmp_path)
    assert "3 of 20 samples" in message and "line 3: the answer 'elsewhere' is not in its context" in message


def test_a_task_that_there_is_not(tmp_path):
    message = refused("image-clasification", "nothing", tmp_path)
    assert "did you mean image-classification?" in message and all(task in message for task in TASKS)


def test_data_of_other_modalities(tmp_path):
    folder, table = pictures(tmp_path / "pets"), write_table(tmp_path / "a.csv", reviews())
    for task in ("audio-classification", "text-classification"):
        assert "--task image-classification reads what they hold" in refused(task, folder, tmp_path)
    assert "--task text-classification reads what they hold" in refused("image-classification", table, tmp_path)
    assert "reads two modalities" in refused("retrieval", table, tmp_path)
    assert "images or sounds with text" in refused("captioning", folder, tmp_path)
    assert "words, but 1 tags" in refused("token-tagging", table, tmp_path)
    assert "no column of answers" in refused("question-answering", table, tmp_path)


def test_what_is_not_there(tmp_path):
    table = write_table(tmp_path / "a.csv", reviews())
    assert "nowhere.csv: no such file" in refused("text-classification", tmp_path / "nowhere.csv", tmp_path)
    message = refused("text-classification", table, tmp_path, label="mood")
    assert "'mood'" in message and "text, label" in message
    assert "--text-column" in refused("text-classification", table, tmp_path, text_column="words")
    shards.write(tmp_path / "a.tar", [{"__key__": f"{i}", "jpg": jpeg((i, 0, 0))} for i in range(9)])
    assert "no labels found" in refused("image-classification", tmp_path / "a.tar", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused("image-classification", tmp_path / "empty", tmp_path)


# ------------------------------------------------------------------------------------------------------ messy input


def test_a_messy_table(tmp_path):
    rows = [
        {" Text ": f"Größe {i}; sehr, sehr", "SENTIMENT": f" {'sehr gut' if i % 2 else 'ñandú'} "} for i in range(40)
    ]
    data = write_table(tmp_path / "a.csv", rows, ";", encoding="utf-8-sig", lineterminator="\r\n")
    found = prepare("text-classification", [data], tmp_path / "run")
    assert found.head["classes"] == ["sehr gut", "ñandú"] and sum(found.counts.values()) == 40
    assert all(text.startswith("Größe") for own in values(found, "text").values() for text in own)


def test_messy_folders(tmp_path):
    folder = pictures(tmp_path / "outer" / "Tiere & Pflanzen", ["Bäume (groß)", "кошки", "a.b"], 10)
    for name in ("Bäume (groß)", "кошки"):
        (folder / name / "more" / "deep").mkdir(parents=True)
        (folder / name / "more" / "deep" / "0.JPG").write_bytes(jpeg((1, 2, len(name))))
    (folder / ".hidden").mkdir()
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "кошки" / "Thumbs.db").write_bytes(b"\0")
    found = prepare("image-classification", [str(tmp_path / "outer")], tmp_path / "run")
    assert found.head["classes"] == ["Bäume (groß)", "a.b", "кошки"] and sum(found.counts.values()) == 32


def test_texts_in_class_folders(tmp_path):
    for name in ("pos", "neg"):
        (tmp_path / "imdb" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "imdb" / name / f"{i}.txt").write_text(f"A film that is {name}, number {i}.\n")
    found = prepare("text-classification", [str(tmp_path / "imdb")], tmp_path / "run")
    assert found.head["classes"] == ["neg", "pos"] and sum(found.counts.values()) == 20


def test_tables_named_after_parts_in_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name, rows in (("train.csv", reviews(40)), ("dev.csv", reviews(50)[40:]), ("test.csv", reviews(70)[50:])):
        write_table(tmp_path / "a" / name, rows)
    found = prepare("text-classification", [str(tmp_path / "a")], tmp_path / "run")
    assert found.counts == {"train": 40, "validation": 10, "test": 20}


def test_unusual_names_of_columns(tmp_path):
    rows = [{"id": i, "Tweet body": f"it is {i} of them", "mood": "ab"[i % 2]} for i in range(30)]
    found = prepare("text-classification", [write_table(tmp_path / "a.csv", rows)], tmp_path / "run")
    assert found.head["classes"] == ["a", "b"] and any("'mood'" in note for note in found.notes)
    assert any("'Tweet body'" in note for note in found.notes)


def test_pictures_that_cannot_be_read(tmp_path):
    folder = pictures(tmp_path / "pets")
    (folder / "cats/3.jpg").write_bytes(b"no picture")
    found = prepare("image-classification", [str(folder)], tmp_path / "run")
    assert sum(found.counts.values()) == 39 and any("cats/3: no known picture format" in note for note in found.notes)
    for file in folder.rglob("*.jpg"):
        file.write_bytes(b"no picture")
    assert "pets: nothing in it can be read; the first is cats/0" in refused("image-classification", folder, tmp_path)


def test_a_table_that_is_not_utf8(tmp_path):
    rows = [{"text": f"naïve {i}", "label": i % 2} for i in range(20)]
    data = write_table(tmp_path / "a.csv", rows, encoding="latin-1")
    assert "save the file as UTF-8" in refused("text-classification", data, tmp_path)


def test_labels_beside_pictures(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(20):
        (tmp_path / f"a/{i}.png").write_bytes(jpeg((9 * i, 5, 5), kind="PNG"))
        (tmp_path / f"a/{i}.json").write_text(json.dumps({"score": i / 3, "mood": "ab"[i % 2]}))
    found = prepare("image-classification", [str(tmp_path / "a")], tmp_path / "run", label="mood")
    assert found.head["classes"] == ["a", "b"]
    assert prepare("regression", [str(tmp_path / "a")], tmp_path / "run").modalities == ["image"]
    for i in range(20):
        (tmp_path / f"a/{i}.json").unlink()
        (tmp_path / f"a/{i}.cls").write_text(f"{i % 3}\n")
    assert prepare("image-classification", [str(tmp_path / "a")], tmp_path / "run").head["classes"] == ["0", "1", "2"]


def test_a_pack_that_was_stopped_is_gone_on_with(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pets")
    monkeypatch.setattr(data.split, "split", lambda *settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare("image-classification", [str(folder)], tmp_path / "run")
    monkeypatch.undo()
    assert sum(prepare("image-classification", [str(folder)], tmp_path / "run").counts.values()) == 40
