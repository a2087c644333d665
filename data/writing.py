"""What the data recipes share: webdataset shards with reproducible bytes, their card, progress, errors.

A build lies in one folder (SHARDS/SEED) that appears only when it is complete: it is written under a
temporary name beside and renamed at the end, and `card.json` in it lists every shard with its size.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16_000
SHARD_BYTES = 64_000_000
SPLITS = ("train", "validation")
ROLES = ("picture", "spoken", "effect")
BAD_ARGUMENT, NO_SOURCE = 2, 3


class RecipeError(Exception):
    """A failure that the person at the keyboard can mend: one line of text and an exit code."""

    def __init__(self, message, code=BAD_ARGUMENT):
        super().__init__(" ".join(str(message).split()))
        self.code = code


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, raised as RecipeError."""

    def error(self, message):
        raise RecipeError(f"{message} (see --help)")


def number(least):
    """An argparse type: a whole number of `least` or more."""

    def parse(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return parse


def run(name, recipe, argv=None):
    """Call `recipe(argv)`; every foreseeable failure becomes one line on stderr and an exit code."""
    try:
        recipe(argv)
        return 0
    except RecipeError as error:
        message, code = error, error.code
    except BrokenProcessPool:
        message, code = "a worker process was killed (out of memory?); try again with --workers 1", 1
    except OSError as error:
        message, code = error, 1
    except KeyboardInterrupt:
        message, code = "interrupted; run it again to go on", 130
    print(f"{name}: {message}", file=sys.stderr)
    return code


class Progress:
    """One line on stderr that counts up to `total`; a line per quarter where stderr is no terminal."""

    def __init__(self, label, total):
        self.label, self.total, self.done, self.shown = label, total, 0, -1

    def step(self):
        self.reach(self.done + 1)

    def reach(self, done):
        self.done = min(done, self.total)
        percent = 100 * self.done // max(self.total, 1)
        terminal = sys.stderr.isatty()
        if percent // (1 if terminal else 25) != self.shown // (1 if terminal else 25):
            self.shown = percent
            end = "\n" if not terminal or self.done >= self.total else "\r"
            print(f"{self.label} {percent:3d}%", end=end, file=sys.stderr, flush=True)


def parallel(function, jobs, workers, label):
    """Yield `function(job)` in the order of `jobs`, computed by `workers` processes."""
    progress = Progress(label, len(jobs))
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        try:
            for result in pool.map(function, jobs, chunksize=16):
                progress.step()
                yield result
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def start_worker():
    """Leave Ctrl-C to the parent, and end with the parent even where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def digest(*parts):
    """Hex SHA-256 of the parts' text, for choices that must be equal on every machine."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def write_file(path, content):
    """Write bytes so that `path` is either absent or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def jpeg_bytes(image):
    """A Pillow image as JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def flac_bytes(samples):
    """Mono samples in [-1, 1] at SAMPLE_RATE as 16-bit FLAC."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def is_complete(folder, recipe):
    """Whether `folder` holds a whole build of this recipe (a dict: name, version, seed, sizes)."""
    try:
        card = json.loads((folder / "card.json").read_bytes())
        shards = {name: (folder / name).stat().st_size for name in card["shards"]}
        return card["recipe"] == recipe and card["shards"] == shards
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def building(folder):
    """Give a temporary folder that takes the place of `folder` when the block ends well.

    Raises RecipeError where `folder` holds something that is not a build, rather than replace it.
    """
    if folder.exists() and not (folder / "card.json").exists():
        raise RecipeError(f"{folder} exists and is not a build; move it away or choose another --to")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def write_split(folder, split, items, shard_bytes=SHARD_BYTES):
    """Write items to SPLIT-000000.tar, ... and return their counts.

    An item is a dict: `key` (unique, no dot), `json` (a dict), and by extension `txt` (a string) and
    `jpg`, `flac` (bytes). Equal items give equal bytes.
    """
    import webdataset  # takes seconds: not for a run that finds its work done

    count, languages, seconds = Counter(), Counter(), 0.0
    keys, captions, stamps = set(), set(), set()
    pattern = str(folder.resolve()).replace("%", "%%") + f"/{split}-%06d.tar"
    fixed = {"mtime": 0, "user": "data", "group": "data", "mode": 0o644, "encoder": False}
    with webdataset.ShardWriter(pattern, maxsize=shard_bytes, verbose=0, **fixed) as writer:
        for item in items:
            if item["key"] in keys or "." in item["key"]:
                raise ValueError(f"key {item['key']!r} is not unique or has a dot")
            keys.add(item["key"])
            about = item["json"]
            writer.write(
                {"__key__": item["key"]}
                | {kind: item[kind] for kind in ("jpg", "flac") if kind in item}
                | {"txt": item["txt"].encode(), "json": dump(about)}
            )
            count[about["role"]] += 1
            captions.add(about["caption"])
            stamps.add(about["stamp"])
            if "flac" in item:
                languages[about["language"]] += 1
                seconds += soundfile.info(io.BytesIO(item["flac"])).duration
    return {
        "items": {role: count[role] for role in ROLES if count[role]},
        "stamps": len(stamps),
        "captions": len(captions),
        "hours_of_sound": round(seconds / 3600, 3),
        "sounds_by_language": dict(sorted(languages.items())),
    }


def dump(value):
    """JSON bytes, the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def write_card(folder, recipe, about, splits):
    """Write card.json and card.md beside the shards; `about` maps headings to text or counts."""
    shards = {path.name: path.stat().st_size for path in sorted(folder.glob("*.tar"))}
    card = {"recipe": recipe, **about, "splits": splits, "shards": shards}
    lines = [f"# {recipe['name']}, seed {recipe['seed']}", ""]
    for heading, value in about.items():
        lines += [f"- {heading.replace('_', ' ')}: {plain(value)}"]
    for split, counts in splits.items():
        lines += ["", f"## {split}", ""]
        lines += [f"- {heading.replace('_', ' ')}: {plain(value)}" for heading, value in counts.items()]
    lines += ["", f"{len(shards)} shards, {sum(shards.values()) / 1e6:.1f} MB", ""]
    (folder / "card.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "card.json").write_text(json.dumps(card, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return card


def plain(value):
    """A card's value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(entry)}" for name, entry in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def summary(folder, card, seconds):
    """Print what was built, where, and how long it took."""
    for split, counts in card["splits"].items():
        languages = counts["sounds_by_language"]
        print(
            f"{split}: {plain(counts['items'])}; {counts['stamps']} stamps, {counts['captions']} captions, "
            f"{counts['hours_of_sound']:.2f} h of sound in {len(languages)} languages ({' '.join(languages)})"
        )
    if "left_out" in card:
        print(f"left out: {plain(card['left_out'])}")
    size = sum(card["shards"].values()) / 1e6
    print(f"{folder}: {len(card['shards'])} shards, {size:.1f} MB, in {seconds:.1f} s")


def already_there(folder):
    """Print that there is nothing to do."""
    print(f"already there: {folder} (remove it to build it again)")


def default_folder(file, name):
    """The folder `name` beside a recipe's file, relative to the current folder where that is shorter."""
    path = Path(file).resolve().parent / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
