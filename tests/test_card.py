"""The model card: every number of it is followed to its file, Hugging Face reads it, the gate says what is missing."""

import hashlib
import json
import math
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
import yaml
from conftest import losses, samples, text_only, tiny

from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.reports.model_card import Card
from multimodal_fm.run_dir import evaluations
from multimodal_fm.train import compute, energy, loop
from multimodal_fm.train.config import load as load_config

HOSTILE = "<script>|alert(1)</script>\n## Evaluation"
FIGURE = {"value": 0.51234, "low": 0.4, "high": 0.6, "chance": 0.25, "n": 40}
FIGURES = {
    "retrieval/text_to_image/r@10": FIGURE,
    "retrieval/text_to_image/r@10/without_leaks": {**FIGURE, "value": 0.4, "n": 31},
    "knn/image/accuracy": {**FIGURE, "value": 0.26, "low": 0.2, "high": 0.31},
    "text/bits_per_byte": {**FIGURE, "value": 3.25, "low": 3.1, "high": 3.4, "chance": None},
    "subgroups/language/fr/r@10": FIGURE,
    "robustness/image/blur/drop": FIGURE,
    "leakage/image/near_copies": {**FIGURE, "value": math.nan},
}


def train(folder: Path, data: dict, name: str = "run", resume=False) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**data, "run_dir": str(folder / name)}, sort_keys=False))
    loop.pretrain(load_config(path), resume)
    return folder / name


def measure(run: Path, step: int, name: str = "held", **figures) -> None:
    entry = {"on": ["a.tar"], "step": step, "seed": 0, "figures": figures or FIGURES, "notes": [HOSTILE]}
    evaluations.write(run, name, entry)


@pytest.fixture(scope="module")
def corpus_with_card(tmp_path_factory):
    """Shards with one part that cannot be read, and a data card beside them."""
    folder = tmp_path_factory.mktemp("data")
    bad = [{**sample, "jpg": b"no picture"} if i == 3 else sample for i, sample in enumerate(samples(32))]
    shards.write(folder / "train-0.tar", bad)
    (folder / "card.json").write_text(json.dumps({"license": "GPL-2", "shards": {"train-0.tar": 1}}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus_with_card):
    """A run that starts from another's weights, reads something broken, goes on with another rate, and is measured."""
    folder = tmp_path_factory.mktemp("card")
    base = train(folder, text_only(corpus_with_card, "", steps=1), "base")
    data = tiny(corpus_with_card, steps=2, init=str(base), country="DEU", card={"license": "gpl-2.0"})
    train(folder, data)
    data |= {"steps": 4, "optim": {"lr": 1e-3, "warmup_steps": 3}}
    made = train(folder, data, resume=True)
    measure(made, 4)
    return made


@pytest.fixture(scope="module")
def card(run):
    Card(run).write()
    return (run / "README.md").read_text()


def tables(card: str):
    """(section, row, column, cell) of each cell of a card's tables but the first and the last of its row."""
    section, heads = "", []
    for line in card.splitlines():
        if line.startswith("#"):
            section, heads = line.lstrip("# "), []
        elif line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if heads and not set(line) <= set("|-"):
                yield from ((section, cells[0], column, cell) for column, cell in zip(heads[1:-1], cells[1:-1]))
            heads = heads or cells


def follow(run: Path, place: dict):
    """What the file says at the field, read without the card's own code."""
    file, field = run / place["file"], place["field"]
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if field[0] == "sum":
            return sum(row[field[1]] for row in rows if field[1] in row and row["step"] <= field[2])
        if field[0] == "distinct":
            parts = {(r["shard"], r["key"], r["part"]) for r in rows if r["reason"] == field[1] or not field[1]}
            return len(parts)
        value, field = rows, field[1:]
    else:
        value = json.loads(file.read_text())
    for key in field:
        value = value[key]
    return value


def test_every_number_is_found_in_its_file(run, card):
    places, followed = json.loads((run / "card.json").read_text()), 0
    for section, row, column, cell in tables(card):
        if re.fullmatch(r"[-\d.,e+]+|not a number", cell):
            place = places[f"{section} | {row} | {column}"]
            value = follow(run, place)
            assert cell == place["text"], place
            assert value == place["value"] or math.isnan(value), place
            if cell != "not a number":
                assert float(cell.replace(",", "")) == pytest.approx(value, rel=6e-3, abs=6e-4), place
            followed += 1
    assert followed > 80
    assert followed == len([place for place in places if not place.startswith("metadata")])
    sections = {place.partition(" | ")[0] for place in places}
    assert sections >= {
        "Evaluation",
        "Subgroups",
        "Robustness",
        "Leakage",
        "Quarantine",
        "Changes on resume",
        "Settings",
    }


def test_without_compute_json_the_metrics_tell(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/compute.json").unlink()
    card = Card(tmp_path / "run")
    assert "| energy_kwh | not measured: the run has no compute.json |" in card.write().read_text()
    for name in ("tokens", "wall_seconds"):
        place = card.places[f"Compute and emissions | {name} | value"]
        assert follow(tmp_path / "run", place) == place["value"] > 0


def test_hugging_face_reads_it(card):
    from huggingface_hub import ModelCard

    read = ModelCard(card)
    assert read.data.license == "gpl-2.0" and read.data.library_name == "multimodal_fm"
    by_name = {result.metric_name: result.metric_value for result in read.data.eval_results}
    assert by_name == {name: FIGURES[name]["value"] for name in list(FIGURES)[:4] if not name.endswith("leaks")}
    assert ModelCard(str(read)).data.to_dict() == read.data.to_dict()


def test_it_says_where_it_comes_from_and_what_it_lacks(run, card, corpus_with_card):
    manifest = run.parent / "base/checkpoints/step-00000001/MANIFEST.json"
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() in card
    assert f"GPL-2 | {corpus_with_card}/train-*.tar" in card and f"{corpus_with_card}/card.json: license" in card
    assert "held: knn/image/accuracy" in card.partition("No better than a guess")[2].splitlines()[0]
    assert "not declared: card.uses in the config" in card.lower()
    for placeholder in ("More Information", "TODO", "None", "nan", "{{", "{%"):
        assert placeholder not in card
    assert "<script>" not in card and card.count("\n## Evaluation") == 1


def test_a_run_that_was_not_measured_says_so(tmp_path, corpus):
    run = train(tmp_path, text_only(corpus, tmp_path / "run", steps=2))
    card = Card(run).write().read_text()
    assert "Not measured: the run has no evaluation" in card
    assert card.count("Not measured: no figure of `evaluations.json`") == 3
    assert "energy_kwh | not measured: " in card
    assert "is not declared: there is no data card beside its shards" in " ".join(Card(run).problems())


def test_the_gate(mmfm, run, card, tmp_path, corpus):
    def gate(run, *words) -> tuple[int, str]:
        done = mmfm("card", run, "--check", *words)
        return done.returncode, done.stdout

    assert gate(run) == (0, "")
    name = "held/retrieval/text_to_image/r@10"
    for words, said in (
        ((f"require={{{name}: 0.6}}",), f"{name} is 0.5123, required is at least 0.6"),
        (("at_most={held/text/bits_per_byte: 3}",), "held/text/bits_per_byte is 3.25, required is at most 3"),
        (("require={held/leakage/image/near_copies: 0}",), "is nan, required"),
        (("require={held/absent: 0}",), "held/absent is required to be at least 0 and was not measured"),
        (('license=""',), "the license of the weights is not declared"),
    ):
        code, out = gate(run, *words)
        assert code == 1 and said in out
    measure(run, 3, "old")
    code, out = gate(run)
    assert code == 1 and "evaluation old is of step 3, the checkpoint of step 4" in out
    assert "README.md is not of the run as it stands" in out
    bare = train(tmp_path, text_only(corpus, tmp_path / "run", steps=1))
    code, out = gate(bare)
    assert code == 1 and "the run has no evaluation" in out and "README.md is missing" in out


def test_wrong_settings_of_the_card(mmfm, run):
    done = mmfm("card", run, "licence=mit")
    assert done.returncode == 2 and "did you mean license" in done.stderr
    with pytest.raises(UserError, match="is one checkpoint"):
        Card(run / "checkpoints/step-00000004")


def test_a_strangers_data_cards_are_not_read(run, monkeypatch):
    from multimodal_fm.run_dir import trust

    monkeypatch.setattr(trust, "is_own", lambda *_: False)
    assert "not looked for" in Card(run).licenses["all"][1]
    assert Card(run, trusted=True).licenses["all"][0] == "GPL-2"


# Energy


def test_compute_is_summed_over_resumes(run):
    data = json.loads((run / "compute.json").read_text())
    assert [(s["from_step"], s["to_step"]) for s in data["segments"]] == [(0, 2), (2, 4)]
    tokens = [row["tokens"] for row in losses(run).values()]
    assert [s["tokens"] for s in data["segments"]] == [sum(tokens[:2]), sum(tokens[2:])]
    assert data["total"]["tokens"] == sum(tokens) and data["total"]["steps"] == 4
    assert data["total"]["energy_kwh"].startswith("not measured: ")  # too short
    segment = data["segments"][0]
    assert segment["device"] == "cpu" and segment["cpu"] and segment["threads"] == 1
    assert set(segment["versions"]) == {"multimodal_fm", "torch", "python"}


def test_energy_is_measured_and_its_origin_said():
    pytest.importorskip("codecarbon")
    meter, end = energy.Meter("DEU", grace=0), time.monotonic() + 120
    while "energy_kwh" not in meter.read() and time.monotonic() < end:
        time.sleep(0.2)
    meter.close()
    read = meter.read()
    assert read["energy_kwh"] == pytest.approx(read["cpu_kwh"] + read["gpu_kwh"] + read["memory_kwh"])
    assert read["energy_kwh"] > 0 and read["estimated"] and "Germany" in read["carbon_intensity_from"]
    assert read["co2e_kg"] == pytest.approx(read["energy_kwh"] * read["carbon_intensity_g_per_kwh"] / 1000)
    parts = [{"from_step": 0, "to_step": 5, "tokens": 7, "wall_seconds": 9.0, "energy": e}
             for e in (read, {"not_measured": "why"}, read)]  # fmt: skip
    total = compute.total(parts)
    assert total["energy_kwh"] == 2 * read["energy_kwh"] and total["measured_seconds"] == 2 * read["seconds"]
    assert (total["steps"], total["tokens"], total["wall_seconds"]) == (15, 21, 27.0)


@pytest.mark.parametrize("broken", ["missing", "cannot start", "raises"])
def test_a_run_does_not_need_the_meter(broken, tmp_path, corpus, monkeypatch):
    """Whatever becomes of codecarbon, the losses are the same and compute.json says why there is no energy."""
    plain = train(tmp_path, text_only(corpus, tmp_path / "plain", steps=2), "plain")
    if broken == "missing":
        monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: None)
    elif broken == "cannot start":
        monkeypatch.setattr(energy.sys, "executable", str(tmp_path / "absent"))
    else:
        (tmp_path / "codecarbon").mkdir()
        (tmp_path / "codecarbon/__init__.py").write_text("raise RuntimeError('no sensor')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(energy, "GRACE", 0)
        meter = energy.Meter(grace=0)
        meter.process.wait(60)
        assert meter.read() == {"not_measured": "codecarbon failed: RuntimeError: no sensor"}
        meter.close()
    run = train(tmp_path, text_only(corpus, tmp_path / "run", steps=2))
    assert losses(run) == losses(plain)
    said = json.loads((run / "compute.json").read_text())["total"]["energy_kwh"]
    assert (
        said.startswith("not measured: ")
        and {"missing": "not installed", "cannot start": "No such file"}.get(broken, "") in said
    )


def test_the_meter_ends_with_the_run():
    """Its standard input closes where the run is killed."""
    pytest.importorskip("codecarbon")
    meter = energy.Meter(grace=60)
    meter.process.stdin.close()
    assert meter.process.wait(60) == 0
