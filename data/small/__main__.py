"""Build the shards of configs/small.yaml from copies of public sets: python -m data.small FOLDER [--to FOLDER]."""

import hashlib
import itertools
import json
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

from data import writing
from data.writing import RecipeError, digest, dump

LICENSE = "those of the sets, of which several allow research only; see data/small/README.md"
VERSION = 2  # raise it when the samples change, so that an older build is replaced
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LEFT_OUT_SPEAKER = "theo"  # no sound of his is among those that are trained on
AS_THEY_ARE = {  # file -> folder here: sets that come with a split of their own
    "image_text/flickr8k1k": "flickr8k",
    "image_text/openclipart": "openclipart",
    "image_text/openmoji": "openmoji",
    "image_text/tuxpaint": "tuxpaint",
    "trimodal/tuxtri": "tuxtri",
    "trimodal/tuxsfx": "tuxsfx",
    "audio_text/asterisk-en": "asterisk",
}


def main(argv=None):
    """Build the shards, unless they are there."""
    start = time.monotonic()
    options = parse(argv)
    if not options.folder.is_dir():
        raise RecipeError(f"{options.folder} is no folder; see data/small/README.md for the sets it has to hold")
    recipe = {"name": "small", "version": VERSION, "seed": 0}
    if writing.is_complete(options.to, recipe):
        return writing.already_there(options.to)
    with writing.building(options.to) as part:
        splits = {}
        for name, samples in {"cifar10": cifar10, "esc10": esc10, "digits": digits}.items():
            splits |= write_tars(part, name, samples(options.folder))
        for source, name in AS_THEY_ARE.items():
            splits |= write_tars(part, name, with_split_of_their_own(options.folder, source))
        for name, rows in {"sst2": sst2, "trec": trec, "texts": texts}.items():
            splits |= write_rows(part, name, rows(options.folder))
        splits |= write_shakespeare(part, options.folder)
        shards = {str(p.relative_to(part)): p.stat().st_size for p in sorted(part.rglob("*-*.*")) if p.is_file()}
        card = {"recipe": recipe, "license": LICENSE, "splits": splits, "shards": shards}
        (part / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    for name, count in splits.items():
        print(f"{name}: {count:,}")
    print(f"{options.to}: {len(shards)} shards, {sum(shards.values()) / 1e6:.1f} MB, {time.monotonic() - start:.1f} s")


def parse(argv):
    """The command's options."""
    parser = writing.Parser(prog="python -m data.small", description=sys.modules["data.small"].__doc__)
    parser.add_argument("folder", type=Path, help="where the sets lie, as data/small/README.md lists them")
    to = writing.default_folder(__file__, "shards")
    parser.add_argument("--to", type=Path, default=to, help=f"the folder to write (default {to})")
    return parser.parse_args(argv)


def read_tars(folder, name):
    """The samples of all shards NAME-*.tar or .tar.gz below the folder: dicts of members by extension, with `key`."""
    paths = sorted(path for ending in ("tar", "tar.gz") for path in folder.glob(f"{name}-*.{ending}"))
    if not paths:
        raise RecipeError(f"{folder / name}-*.tar: there are none; see data/small/README.md")
    for path in paths:
        with tarfile.open(path, "r|*") as tar:
            members = ((*m.name.partition("."), tar.extractfile(m).read()) for m in tar if m.isfile())
            for key, own in itertools.groupby(members, lambda member: member[0]):
                yield {"key": key, **{ending: data for _, _, ending, data in own}}


def fraction(*parts):
    """A number in [0, 1) that these texts always give."""
    return int(digest(*parts)[:12], 16) / 16**12


def cifar10(folder):
    """The official training part, of which a tenth is for tests here and a fiftieth for validation."""
    for sample in read_tars(folder, "image_class/cifar10-train"):
        place = fraction("cifar10", hashlib.sha256(sample["jpg"]).hexdigest())  # equal pictures stay together
        split = "test" if place < 0.1 else "validation" if place < 0.12 else "train"
        yield split, {**sample, "json": dump({"label": CIFAR10[int(sample["cls"])]})}


def esc10(folder):
    """Folds 1 to 3 to train, fold 4 for tests."""
    for sample in read_tars(folder, "audio_class/esc10-folds1234"):
        about = json.loads(sample["json"])["original_data"]
        split = "test" if about["fold"] == 4 else "train"
        about = {"label": about["label"], "fold": about["fold"], "clip": about["freesound_id"]}
        yield split, {**sample, "json": dump(about)}


def digits(folder):
    """Takes 5 to 9 of five speakers are for tests, and so is all of the sixth."""
    for sample in read_tars(folder, "audio_class/fsdd-train"):
        about = json.loads(sample["json"])["original_data"]
        split = "test" if about["index"] < 10 else "train"
        split = "speaker" if about["speaker"] == LEFT_OUT_SPEAKER else split
        about = {"label": DIGITS[about["digit"]], "speaker": about["speaker"], "take": about["index"]}
        yield split, {**sample, "json": dump(about)}


def with_split_of_their_own(folder, name):
    for split, found in (("train", "train"), ("validation", "val")):
        if found == "train" or list(folder.glob(f"{name}-{found}-*")):
            for sample in read_tars(folder, f"{name}-{found}"):
                yield split, sample


def write_tars(part, name, samples):
    """Write pairs of a split and a sample to NAME/SPLIT-000000.tar; the counts by `NAME/SPLIT`."""
    import webdataset

    fixed = {"mtime": 0, "user": "data", "group": "data", "mode": 0o644, "encoder": False}
    (part / name).mkdir()
    writers, count = {}, Counter()
    for split, sample in writing_progress(name, samples):
        if split not in writers:
            pattern = str((part / name).resolve()).replace("%", "%%") + f"/{split}-%06d.tar"
            writers[split] = webdataset.ShardWriter(pattern, maxsize=writing.SHARD_BYTES, verbose=0, **fixed)
        writers[split].write({"__key__": sample.pop("key"), **sample})
        count[f"{name}/{split}"] += 1
    for writer in writers.values():
        writer.close()
    return dict(count)


def writing_progress(name, samples):
    print(f"{name} ...", file=sys.stderr, flush=True)
    return samples


def read_rows(folder, name):
    try:
        with open(folder / "text" / name, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise RecipeError(f"{folder / 'text' / name}: {error.strerror}; see data/small/README.md") from None


def sst2(folder):
    """Whole sentences; the official development part is for tests here."""
    for split, name in (("train", "sst2_train.jsonl"), ("test", "sst2_dev.jsonl")):
        for row in read_rows(folder, name):
            yield split, {"text": row["text"], "label": ("negative", "positive")[row["label"]]}


def trec(folder):
    """The official training part, of which a tenth is for tests here."""
    for row in read_rows(folder, "trec_train.jsonl"):
        split = "test" if fraction("trec", row["text"]) < 0.1 else "train"
        yield split, {"text": row["text"], "label": row["coarse"]}


def texts(folder):
    """All texts without their labels, none of them from the test parts above; a hundredth for validation."""
    held_out = {row["text"] for rows in (sst2, trec) for split, row in rows(folder) if split == "test"}
    for name, text in all_texts(folder):
        text = " ".join(text.split())
        if text and text not in held_out:
            split = "validation" if fraction("texts", text) < 0.01 else "train"
            yield split, {"text": text, "set": name}


def all_texts(folder):
    labeled = ("agnews5600_train", "cola_train", "debian_sections_train", "sst2_train", "trec_train")
    for name in (*labeled, "audiocaps_captions_train", "clotho_captions_dev"):
        for row in read_rows(folder, f"{name}.jsonl"):
            given = row["text"]
            yield from ((name, text) for text in (given if isinstance(given, list) else [given]))
    for row in read_rows(folder, "multi30k_train.jsonl"):
        yield from (("multi30k", row[language]) for language in ("en", "de", "fr", "cs"))
    for name, separator in (("wordnet_glosses", "\n"), ("wikitext2_valid", "\n"), ("tinyshakespeare", "\n\n")):
        yield from ((name, text) for text in read_text(folder, name).split(separator))


def read_text(folder, name):
    try:
        return (folder / "text" / f"{name}.txt").read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{folder / 'text' / name}.txt: {error.strerror}; see data/small/README.md") from None


def write_shakespeare(part, folder):
    """Write the first nine tenths of the characters and the rest, as nanoGPT splits them; the characters of each."""
    text = writing_progress("shakespeare", read_text(folder, "tinyshakespeare"))
    (part / "shakespeare").mkdir()
    cut, splits = int(0.9 * len(text)), {}
    for split, own in (("train", text[:cut]), ("validation", text[cut:])):
        (part / "shakespeare" / f"{split}-000000.txt").write_bytes(own.encode())
        splits[f"shakespeare/{split}"] = len(own)
    return splits


def write_rows(part, name, rows):
    """Write pairs of a split and a row to NAME/SPLIT-000000.jsonl; the counts by `NAME/SPLIT`."""
    (part / name).mkdir()
    lines, count = {}, Counter()
    for split, row in writing_progress(name, rows):
        lines.setdefault(split, []).append(dump(row) + b"\n")
        count[f"{name}/{split}"] += 1
    for split, own in lines.items():
        own.sort(key=lambda line: hashlib.sha256(line).digest())
        (part / name / f"{split}-000000.jsonl").write_bytes(b"".join(own))
    return dict(count)


if __name__ == "__main__":
    sys.exit(writing.run("data.small", main))
