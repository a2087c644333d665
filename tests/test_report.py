"""The report: one file that needs no network, with every figure, and nothing in the data can break it."""

import base64
import html
import io
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import yaml
from conftest import jpeg, samples, tiny
from PIL import Image

from multimodal_fm.cli import app, arguments
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.evals.run import table
from multimodal_fm.reports import run
from multimodal_fm.reports.page import format_number
from multimodal_fm.run_dir import evaluations
from multimodal_fm.train import loop
from multimodal_fm.train.config import load as load_config

HOSTILE = '<script>alert("1")</script> & </textarea> \u05e9\u05dc\u05d5\u05dd \x1b[31m'


@pytest.fixture(scope="module")
def page(tmp_path_factory, corpus):
    """A tiny run with two evaluations, one of them over hostile captions and a broken picture; its report."""
    folder = tmp_path_factory.mktemp("report")
    bad = [{**sample, "txt": f"{HOSTILE} {i % 3}"} for i, sample in enumerate(samples(12, 200))]
    bad[0]["jpg"] = b"no picture"
    shards.write(folder / "bad.tar", bad)
    shards.write(folder / "held.tar", [{k: v for k, v in sample.items() if k != "cls"} for sample in samples(16, 100)])
    evaluations = {
        "held": {"on": f"{folder}/held*.tar", "group": "color", "within": "language"},
        "bad <b>\x1b[31m": {
            "on": [str(folder / "bad.tar")],
            "where": {"color": "red"},
            "modalities": ["text", "image"],
        },
    }
    monitors = {"loud <b>": {"figure": "loss/*/*", "above": 1.0, "patience": 2}}
    data = tiny(corpus, evaluate=evaluations, run_dir=str(folder / "run"), steps=4, monitors=monitors)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    loop.pretrain(load_config(path))
    return run.write(folder / "run", "cpu")


class Reader(HTMLParser):
    """All tags with their attributes, and the text of each cell."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.cells, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self.inside = False


def test_what_monitors_did_stands_in_the_page(page):
    cells = Reader(page.read_text()).cells
    at = cells.index("loss/words/masked")
    assert cells[at - 2 : at] == ["2", "loud <b>"] and cells[at + 2 : at + 4] == ["above 1", "warn"]


def test_needs_nothing_but_itself(page):
    text = page.read_text()
    read = Reader(text)
    links = [
        value for _, attrs in read.tags for name, value in attrs.items() if name in ("src", "href", "data", "srcset")
    ]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not {"link", "script", "iframe", "object", "base"} & {tag for tag, _ in read.tags}
    assert "@import" not in text and "url(http" not in text and len(text) < run.MAX_BYTES
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^")]+)', text)
    assert set(used) <= set(ids)


def test_every_figure_is_there(page):
    cells = Reader(page.read_text()).cells
    measured = evaluations.read(page.parent)
    assert list(measured) == ["held", "bad <b>\x1b[31m"]
    for figures in (entry["figures"] for entry in measured.values()):
        for row in table(figures)[1:]:
            row = [cell.replace("_", " ") for cell in row if cell]
            start = next(i for i, cell in enumerate(cells) if cell == row[0] and cells[i + 1] == row[1])
            assert cells[start : start + len(row)] == row
    assert sum(tag == "svg" for tag, _ in Reader(page.read_text()).tags) >= 8
    assert "loss/pairs/contrastive" in page.read_text() and "pairs/contrastive: accuracy" in page.read_text()


def test_pictures_and_sounds_decode(page):
    read = Reader(page.read_text())
    pictures = [attrs for tag, attrs in read.tags if tag == "img"]
    sounds = [attrs for tag, attrs in read.tags if tag == "audio"]
    assert len(pictures) > 30 and len(sounds) > 10
    for one in pictures:
        assert one["alt"]
        Image.open(io.BytesIO(_bytes(one["src"], "image/jpeg"))).load()
    for one in sounds:
        assert "controls" in one and soundfile.info(io.BytesIO(_bytes(one["src"], "audio/flac"))).duration == 0.5


def _bytes(uri: str, mime: str) -> bytes:
    head, _, data = uri.partition(",")
    assert head == f"data:{mime};base64"
    return base64.b64decode(data, validate=True)


def test_hostile_captions_are_text(page):
    text = page.read_text()
    assert "<script" not in text and "</textarea>" not in text and "bad <b>" not in text
    assert html.escape(HOSTILE, quote=False).replace('"', "&#34;") in text
    assert "bad.tar" in text and "1 decode" in text  # what was skipped has its name


def test_marks_what_the_eval_calls_right(page):
    """Each query's five nearest: marked exactly where the group is the same, and the rank is that of the first mark."""
    text = page.read_text()
    held = text[text.index("<h3>held") : text.index("<h3>bad")]
    queries = held.split('<div class="query">')[1:]
    assert len(queries) == 6 + 6 + 6 + 4  # there are four sounds
    color = re.compile("a (red|green|blue|yellow) square")
    for query in queries:
        asked, *answers = query.split("<li")
        wanted, marks = color.search(asked)[1], ['class="right"' in answer for answer in answers]
        assert marks == [color.search(answer)[1] == wanted for answer in answers]
        rank, size = map(int, re.search(r"first right answer: (\d+) of (\d+)", asked).groups())
        assert size == (2 if "<audio" in answers[0] else 8)  # half of all: the gallery is kept to the query's language
        assert (marks.index(True) + 1 == rank) if any(marks) else rank > 5


def test_large_media_are_made_small():
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    media, out = run.Media(30_000, 300_000), io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    mime, data = media._image(out.getvalue())
    assert mime == "image/jpeg" and max(Image.open(io.BytesIO(data)).size) == 256 and len(data) < 60_000
    assert media._image(jpeg("red"))[1] == jpeg("red")
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(44_100 * 20) / 20)[:, None].repeat(2, 1), 44_100, format="WAV")
    mime, data = media._audio(out.getvalue())
    assert mime == "audio/ogg" and soundfile.info(io.BytesIO(data)).duration == 5 and len(data) < 300_000


def test_smooth_is_a_mean_of_what_is_finite():
    values = np.array([1.0, np.nan, 3.0] * 20)
    line = run.smooth(values)
    assert len(line) == 60 and np.allclose(line[1:-1], 2.0)


def test_command_line(page, capsys):
    """It ends with three commands, and each works when copied; the last trains the same run on."""
    app(["report", str(page.parent), "--device", "cpu"], result_action="return_value")
    before, tries = capsys.readouterr().out.split("Try next:")
    assert str(page) in before and "text → image" in before and "\x1b" not in before
    tries = [shlex.split(line) for line in tries.strip().splitlines()]
    starts = [
        next(i for i, word in enumerate(words) if word.endswith(("mmfm", "multimodal_fm"))) + 1 for words in tries
    ]
    tries = [words[start:] for words, start in zip(tries, starts, strict=True)]
    assert [words[0] for words in tries] == ["search", "evaluate", "pretrain"]
    for words in tries:
        app(arguments(words), result_action="return_value")
    assert "sample0" in capsys.readouterr().out
    assert (page.parent / "checkpoints" / "step-00000008").is_dir()


def test_without_evaluate(write_config):
    loop.pretrain(load_config(write_config(steps=1)))
    folder = write_config().parent / "run"
    with pytest.raises(UserError, match="evaluate"):
        run.write(folder, "cpu")
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "value, said", [(0.01234, "0.0123"), (12.34, "12.3"), (999.7, "1,000"), (-11_216.4, "-11,216")]
)
def test_numbers_have_three_digits_or_all_before_the_point(value, said):
    assert format_number(value) == said
