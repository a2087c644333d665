"""Every malformed file of `malformed.py` through the scanner and the tokenizers, in a process of its own.

`python tests/test_malformed.py FOLDER` reads pickled cases and prints a JSON line each.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import malformed
import pytest
import torch

from multimodal_fm.corpus import index, shards
from multimodal_fm.errors import SampleError, UserError
from multimodal_fm.tokenizers import audio, base, image, text

SECONDS = 10
MORE_MEMORY = 256  # MB above what the process had before the first case
KINDS = ["text", "image", "audio"]


class TooLong(BaseException):
    """Raised in the middle of a case; no `except Exception` holds it up."""


def ring(*_):
    raise TooLong


def tokenizers(folder: Path) -> dict[str, base.Tokenizer]:
    """The default tokenizers, the merges learned from the sound samples."""
    raws = [malformed.sound_sample(key) for key in (*malformed.BEFORE, *malformed.AFTER)]
    words = text.Tokenizer().fit(raws, folder / "words")
    return {"text": words, "image": image.Tokenizer(), "audio": audio.Tokenizer()}


def read(raw: dict, plugins: dict) -> tuple[set[str], list[tuple[str, str]]]:
    """The parts that a training run gets, and (part, reason) of those that it does not."""
    parts, lost = set(), []
    for kind, plugin in plugins.items():
        members = {ending: data for ending, data in raw.items() if ending in plugin.extensions}
        try:
            views = plugin.read(members, random.Random(0)) if members else []
        except SampleError as error:
            lost.append((kind, error.reason))
        else:
            parts |= {kind} if views and len(views[0]) else set()
    return parts, lost if parts or lost else [("", "empty")]


def refused_in(path: str) -> list[tuple[str, str, str]]:
    return [(r.key, r.member, r.reason) for r in index.open_index(path, 2000).rejections]


def observe(path: str, plugins: dict) -> tuple[list, dict, dict]:
    """Of a file: (key, part, reason) of what is refused, the samples' members and their parts, both by key."""
    corpus = shards.Corpus(shards.Config([path]))
    refused = [(r.key, r.member, r.reason) for r in corpus.rejections]
    keys = [corpus.key(i) for i in range(len(corpus))]
    assert len(set(keys)) == len(keys), f"keys twice: {[k for k, n in Counter(keys).items() if n > 1]}"
    members = {key: corpus.raw(i) for i, key in enumerate(keys)}
    parts = {}
    for key, raw in members.items():
        parts[key], lost = read(raw, plugins)
        refused += [(key, kind, reason) for kind, reason in lost]
    return refused, members, parts


def covers(expected: tuple, found: tuple) -> bool:
    key, part, reason = expected
    return key in ("", found[0]) and part in ("", found[1]) and found[2] in reason.split("|")


def compare_refused(case: malformed.Case, refused: list) -> list[str]:
    left, missing, allowed = list(refused), [], case.may
    for expected in sorted(case.refused, key=lambda row: -sum(map(bool, row))):  # those that say most choose first
        found = next((row for row in left if covers(expected, row)), None)
        left.remove(found) if found else missing.append(expected)
    if case.path.endswith(".txt"):  # how many pieces there are is the cutter's affair
        allowed += case.refused
    left = [row for row in left if not any(covers(one, row) for one in allowed)]
    return [f"not refused: {row}" for row in missing] + [f"refused without need: {row}" for row in left]


def compare_stretches(case: malformed.Case, members: dict) -> list[str]:
    """Of plain text: what is sound comes whole, in whatever pieces."""
    together = b"".join(members[key]["txt"] for key in sorted(members, key=int))
    return [f"lost: text at byte {at}" for at, own in case.healthy.items() if own["txt"] not in together]


def compare_members(case: malformed.Case, members: dict) -> list[str]:
    wrong = []
    for key in {**members, **case.healthy}:
        found, due = members.get(key, {}), case.healthy.get(key, {})
        if case.path.endswith(".jsonl"):
            found = {ending: data.rstrip(b"\r\n") for ending, data in found.items()}
        wrong += [f"lost: {key}.{e}" for e in due if e not in found]
        wrong += [f"changed: {key}.{e}" for e in due if e in found and found[e] != due[e]]
        if key not in case.loose:
            wrong += [
                f"delivered without right: {key[:80]}.{e}"
                for e in found.keys() - due - case.damaged.get(key, {}).keys()
            ]
    return wrong


def compare_outcome(case: malformed.Case, refused: list, parts: dict) -> list[str]:
    wrong = []
    for key, outcome in case.outcome.items():
        if not parts.get(key):
            found = "skip"
        else:
            found = "partial" if any(row[0] == key for row in refused) else "ok"
        nameless = found == "ok" and any(not row[0] for row in refused)  # the archive may not say whose header it was
        if found not in outcome.split("|") and not (nameless and "partial" in outcome):
            wrong.append(f"{key[:80]} is {found}, not {outcome}")
    for key in {*malformed.BEFORE, *malformed.AFTER} & case.healthy.keys() - case.outcome.keys():
        if parts.get(key) != set(KINDS):
            wrong.append(f"of {key} only {parts.get(key)} can be read")
    return wrong


def complaints(case: malformed.Case, plugins: dict) -> list[str]:
    """What came of a case that should not have."""
    if not case.opens:
        try:
            shards.Corpus(shards.Config([case.path]))
        except UserError as error:
            wrong = [] if "\n" not in str(error) else ["the complaint has more than one line"]
            wrong += [] if case.path in str(error) else [f"the complaint does not name it: {error}"]
        else:
            wrong = ["opened, though nothing is in it"]
        return wrong + compare_refused(case, refused_in(case.path) if case.refused else [])
    refused, members, parts = observe(case.path, plugins)
    compare = compare_stretches if case.path.endswith(".txt") else compare_members
    return compare_refused(case, refused) + compare(case, members) + compare_outcome(case, refused, parts)


def used() -> int:
    """MB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def examine(folder: Path):
    """Prints a JSON line for each of `folder/cases.pickle`: its name, its complaints, seconds and MB."""
    torch.set_num_threads(1)
    plugins = tokenizers(folder)
    first, cases = pickle.loads((folder / "cases.pickle").read_bytes())
    assert not [complaint for case in first for complaint in complaints(case, plugins)]  # imports, tables
    at_first = used()
    signal.signal(signal.SIGALRM, ring)
    for case in cases:
        before, start = used(), time.monotonic()
        signal.alarm(SECONDS)
        try:
            wrong = complaints(case, plugins)
        except TooLong:
            wrong = [f"more than {SECONDS} s"]
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"[:300]]
        signal.alarm(0)
        seconds, after = time.monotonic() - start, used()
        if after > before and after - at_first > MORE_MEMORY:
            wrong.append(f"{after - at_first} MB more")
        row = {"name": case.name, "wrong": wrong, "seconds": round(seconds, 2), "grown": after - before}
        print(json.dumps(row), flush=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with `cases`, where everything may be written, and `elsewhere`, where nothing may."""
    base = tmp_path_factory.mktemp("base")
    (base / "cases").mkdir()
    (base / "elsewhere").mkdir()
    return base


@pytest.fixture(scope="module")
def found(base) -> dict[str, dict]:
    """What the process found out, by case. Where a case ends the process, another one goes on behind it."""
    folder, rows = base / "cases", {}
    left = malformed.make(folder)
    first = [case for case in left if case.name in ("sound", "sound-wave")]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "MMFM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    while left:
        (folder / "cases.pickle").write_bytes(pickle.dumps((first, left)))
        with (folder / "log").open("w+") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, folder],
                cwd=base / "elsewhere",
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )
            new = {row["name"]: row for row in map(json.loads, process.stdout)}
            code = process.wait()
            log.seek(0)
            said = log.read()[-2000:]
        assert new or rows or code != 1, said  # it did not get as far as the first case
        rows |= new
        left = [case for case in left if case.name not in rows]
        if left:
            rows[left[0].name] = {"wrong": [f"the process ended with {code}: {said[-500:]}"]}
            left = left[1:]
    return rows


@pytest.mark.parametrize("name", malformed.RECIPES)
def test_a_malformed_file_gives_what_is_whole_and_names_what_is_not(found, name):
    wrong = found[name]["wrong"]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_written_elsewhere_and_nothing_is_run(found, base):
    assert sorted(p.name for p in base.iterdir()) == ["cases", "elsewhere"]
    assert not list((base / "elsewhere").iterdir())
    assert not list(base.rglob(malformed.SENTINEL)) and not list(base.rglob(f"*{malformed.ESCAPE}*"))
    assert not list(base.parent.glob(f"*{malformed.ESCAPE}*")) and not list(Path("/tmp").glob(f"{malformed.ESCAPE}*"))


def test_there_are_many():
    assert len(malformed.RECIPES) >= 200


def test_the_files_are_the_same_every_time(found, base, tmp_path):
    for name, recipe in malformed.RECIPES.items():
        if not name.endswith("bomb") and (path := Path(recipe(tmp_path).path)).is_file():
            both = [hashlib.sha256(p.read_bytes()).digest() for p in (path, base / "cases" / path.name)]
            assert both[0] == both[1], name


def test_the_comparison_sees_what_is_wrong(tmp_path):
    """The other tests are worth something only if this one is."""
    plugins = tokenizers(tmp_path)
    case = malformed.RECIPES["part-twice"](tmp_path)
    sound = malformed.RECIPES["sound"](tmp_path)
    changed = {**case.healthy, "a0": {**case.healthy["a0"], "txt": b"other"}}
    fewer = {key: members for key, members in case.healthy.items() if key != "b1"}
    assert complaints(case, plugins) == []
    for other, complaint in (
        (dataclasses.replace(case, refused=()), "refused without need: ('hurt', 'jpg', 'duplicate')"),
        (dataclasses.replace(case, refused=case.refused * 2), "not refused: ('hurt', 'jpg', 'duplicate')"),
        (dataclasses.replace(case, healthy=changed), "changed: a0.txt"),
        (dataclasses.replace(case, healthy=fewer), "delivered without right: b1.jpg"),
        (dataclasses.replace(case, healthy={**case.healthy, "c": {"txt": b""}}), "lost: c.txt"),
        (dataclasses.replace(case, outcome={"hurt": "skip"}), "hurt is partial, not skip"),
        (dataclasses.replace(sound, opens=False), "opened, though nothing is in it"),
    ):
        assert complaint in complaints(other, plugins), complaint


if __name__ == "__main__":
    examine(Path(sys.argv[1]))
