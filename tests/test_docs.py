"""What the documents say is so: the reference is up to date, links lead somewhere, examples in them run."""

import io
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLORS, jpeg, output, tone

import multimodal_fm
from multimodal_fm.config import read_yaml
from multimodal_fm.corpus import shards
from multimodal_fm.errors import REASONS
from multimodal_fm.train.config import build

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*/README.md"), ROOT / "benchmarks/README.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """`tmp_path` is the folder of the command line, which finds modules there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_reference_of_the_configuration_is_up_to_date():
    reference = runpy.run_path(str(ROOT / "docs/make_config.py"))["reference"]
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_all_reasons_are_listed():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert all(f"| `{reason}` | {meaning} |" in text for reason, meaning in REASONS.items())


@pytest.mark.parametrize("name", ["README.md", "docs/data.md", "docs/runs.md", "docs/interop.md", "docs/in_context.md"])
def test_configurations_in_the_documents_have_no_wrong_key(name, tmp_path):
    """Excerpts are put together with what they leave out."""
    for block in blocks(ROOT / name, "yaml"):
        (tmp_path / "block.yaml").write_text(block)
        data = read_yaml(tmp_path / "block.yaml")
        tasks = data.setdefault("tasks", {})
        for task in tasks.values():
            for source in task["sources"]:
                data.setdefault("sources", {}).setdefault(source, {"shards": "x.tar"})
        if not tasks:
            source = next(iter(data.setdefault("sources", {"x": {"shards": "x.tar"}})))
            read = [m for m in data.get("model", {}).get("tokenizers", ("text", "image")) if m != "prompt"]
            task = {"objectives": {"masked": {}}, "modalities": read, "batch_size": 1}
            tasks["words"] = {**task, "sources": [source]}
        build(data, name)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub makes links of them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_files_of_extending_work_together(mmfm, here, tmp_path):
    """A modality, an objective, a head and an evaluation, one file each: trained, loaded, embedded, evaluated."""
    for language in ("python", "yaml"):
        for block in blocks(ROOT / "docs/extending.md", language):
            file = tmp_path / block.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(block)
    samples, draw = [], np.random.default_rng(0)
    for number in range(24):
        data = io.BytesIO()
        np.save(data, np.sin(np.arange(200) * 0.1 * (1 + number % 3)) + 0.1 * draw.standard_normal(200))
        word = ("slow", "middling", "fast")[number % 3]
        member = {"npy": data.getvalue(), "txt": f"a {word} machine, {number}", "json": {"label": word}}
        samples.append({"__key__": f"{number:03d}", **member})
    (tmp_path / "shards").mkdir()
    shards.write(tmp_path / "shards/machines-0.tar", samples)
    output(mmfm("pretrain", "mine.yaml", "num_workers=0", "threads=1"))
    said = output(mmfm("evaluate", "runs/mine", "--trust"))
    assert "series → text" in said and "uniformity series" in said
    model = multimodal_fm.load("runs/mine", plugins=True)
    assert model.embed(series=[np.zeros(100), np.ones(600)])["series"].shape == (2, 256)


def test_the_first_run_of_the_readme(mmfm, here, tmp_path):
    """From an empty folder with media to a report, and the Python that follows, as they stand there but for sizes."""
    (tmp_path / "media").mkdir()
    for number in range(48):
        name, color = list(COLORS.items())[number % 4]
        (tmp_path / f"media/{number}.jpg").write_bytes(jpeg(tuple(max(0, c - number) for c in color)))
        (tmp_path / f"media/{number}.txt").write_text(f"a {name} square, number {number}")
        (tmp_path / f"media/{number}.flac").write_bytes(tone(220 + 10 * number))
    (tmp_path / "bus.jpg").write_bytes(jpeg((200, 20, 20)))
    (tmp_path / "horn.flac").write_bytes(tone(300))
    page = ROOT / "README.md"
    mine = next(block for block in blocks(page, "yaml") if block.startswith("# mine.yaml"))
    smaller = {"batch_size: 32": "batch_size: 8", "batch_size: 64": "batch_size: 8", "steps: 500": "steps: 4"}
    smaller |= {"width: 192, depth: 4, num_heads: 4": "width: 32, depth: 1, num_heads: 2", "every: 100": "every: 2"}
    for old, new in smaller.items():
        assert old in mine
        mine = mine.replace(old, new)
    (tmp_path / "mine.yaml").write_text(f"{mine}threads: 1\nnum_workers: 0\n")
    commands = next(block for block in blocks(page, "sh") if block.startswith("mmfm pack"))
    said = {}
    for command in commands.splitlines():
        program, name, *words = shlex.split(command, comments=True)
        assert program == "mmfm"
        said[name] = output(mmfm(name, *words))
    assert "train" in said["pack"] and "48 samples" not in said["inspect"]
    assert all(direction in said["evaluate"] for direction in ("text → image", "audio → text"))
    assert "square" in said["search"] and (tmp_path / "runs/mine/report.html").exists()
    assert (tmp_path / "mine.html").exists() and (tmp_path / "runs/mine/best.json").exists()
    names = {"waveform": torch.sin(torch.arange(8000) / 10)}
    (python,) = blocks(page, "python")
    exec(python, names)
    assert {name: tuple(v.shape) for name, v in names["vectors"].items()} == {
        "text": (2, 256), "image": (1, 256), "audio": (2, 256)
    }  # fmt: skip
    assert names["features"].shape == (1, 32) and names["features"].requires_grad
    assert names["output"].num_sequences and {"__key__", "jpg", "txt"} <= names["sample"].keys()
