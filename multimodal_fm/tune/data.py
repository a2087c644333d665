"""The data of a tune: whatever a user has becomes shards of training, validation and test, with the classes counted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import name_problem
from ..corpus import index, shards, storage
from ..errors import SampleError, UserError
from ..pack import dedup
from ..pack.samples import encode_json, modality_of, safe_key
from ..pack.sources import COMPRESSED
from . import samples, sources, split
from .sources import PARTS, Source

TASKS = {
    "image-classification": "classify",
    "audio-classification": "classify",
    "text-classification": "classify",
    "pair-classification": "classify",
    "token-tagging": "tag",
    "question-answering": "span",
    "regression": "regress",
    "captioning": "",
    "retrieval": "",
}
"""The tasks, and the head of each: `captioning` and `retrieval` have objectives of their own."""
TEXT_TASKS = ("text-classification", "token-tagging", "question-answering")
MODALITIES = ("image", "audio", "text")
SHARES = {"test": 0.2, "validation": 0.1}  # of all samples, where a part is split off
MAX_BAD = 0.05  # of a source's samples that may be left out
SHARD_BYTES = 256_000_000
VERSION = 1  # of the files that are written
Bad = tuple[str, SampleError]


@dataclass(frozen=True)
class Prepared:
    """What a tune needs to know of its data."""

    task: str
    modalities: list[str]  # what is read of a sample, in order
    head: dict[str, Any]  # settings of the head: `classes`, and `multi_label` of `classify`
    label: str  # `.cls`, or the JSON field with the label, tags, answer or score; empty: the task has none
    fuse: bool  # the modalities of a sample are read as one sequence
    train: list[str]  # shards
    validation: list[str]
    test: list[str]
    where: dict[str, dict[str, str]] = field(default_factory=dict)  # by part, the samples that count; empty: all
    counts: dict[str, int] = field(default_factory=dict)  # samples by part
    notes: list[str] = field(default_factory=list)  # what was found and how it was split, in sentences


@dataclass
class Sample:
    """A sample that can be used: where it stands, what it holds, and what of it is compared, counted and written."""

    source: Source
    place: str
    has: set[str]  # modalities
    read: samples.Read
    media: list[str]  # digests
    changed: bool  # what is written differs from what was read
    shard: index.Index | None = None
    number: int = 0  # in the shard

    @property
    def classes(self) -> list[str]:
        label = self.read.label
        return label if isinstance(label, list) else [label] if isinstance(label, str) else []


def prepare(
    task: str,
    data: Sequence[str],
    folder: str | Path,
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
    label: str = "",
    image_column: str = "",
    audio_column: str = "",
    text_column: str = "",
    pair_column: str = "",
    seed: int = 0,
) -> Prepared:
    """Find, check and split the data of a task. A second call with the same data and settings finds it done.

    Args:
        task: one of `TASKS`.
        data: shards, folders, tables or data sets of the hub (`hf:OWNER/NAME`). Folders, files and splits in them that
            are called train, validation or test are these parts.
        folder: of the run; what has to be written goes to `folder/data`.
        validation, test: the same; what is not given is split off `data`, see `split.split`.
        label: the column or field with the label, or `.cls`; empty: it is found.
        image_column, audio_column, text_column: the columns of a table; empty: they are found.
        pair_column: the second text of a pair, or the context of a question.

    Raises UserError for data that the task cannot be learned from.
    """
    if problem := name_problem([task], TASKS, "task"):
        raise UserError(f"--task {problem}; the tasks are {', '.join(TASKS)}")
    if not data:
        raise UserError("--data is missing: name shards, a folder, a table or hf:OWNER/NAME")
    given = {"train": list(data), "validation": list(validation), "test": list(test)}
    named = {"label": label, "image": image_column, "audio": audio_column, "text": text_column, "pair": pair_column}
    stamps = {name: sources.stamp(name) for names in given.values() for name in names}
    settings = json.dumps([VERSION, task, given, named, seed, stamps, os.getcwd()], sort_keys=True)
    work = Path(folder) / "data" / dedup.short_digest(settings.encode("utf-8", "replace"))[:10]
    if (done := work / "prepared.json").exists():
        prepared = Prepared(**json.loads(done.read_bytes()))
        if all(storage.is_remote(f) or os.path.exists(f) for f in prepared.train + prepared.validation + prepared.test):
            return prepared
    work.mkdir(parents=True, exist_ok=True)
    prepared = _Preparation(task, given, named, work, seed).run()
    storage.write_atomic(done, json.dumps(dataclasses.asdict(prepared), indent=1).encode())
    shutil.rmtree(work / "packs", ignore_errors=True)
    return prepared


class _Preparation:
    """The stages of `prepare`, in order."""

    def __init__(self, task: str, given: dict[str, list[str]], named: dict[str, str], work: Path, seed: int):
        self.task, self.given, self.named, self.work, self.seed = task, given, named, work, seed
        self.head = TASKS[task]
        self.reads_media = task not in TEXT_TASKS
        self.notes: list[str] = []
        self.labels: list[str] = []  # the columns or fields that hold labels
        self.bad: dict[int, list[Bad]] = {}  # by id of the source
        self.sizes: dict[int, int] = {}  # samples that can be used, likewise

    def run(self) -> Prepared:
        found = [self._open(number, source) for number, source in enumerate(self._find())]
        columns = [samples.choose_columns(self.task, source, self.named) for source in found]
        native = self.reads_media and all(source.shards and not source.packed for source in found)
        label = self._label_field(columns, native)
        read = [self._read(source, own, "" if native else label) for source, own in zip(found, columns)]
        modalities = self._choose_modalities([sample for own in read for sample in own])
        read = [self._check_source(source, own, modalities) for source, own in zip(found, read)]
        self._report_bad()
        every = [sample for own in read for sample in own]
        head = self._count_classes(every, label, native)
        self.notes += dict.fromkeys(note for one in columns for note in one.notes)
        parts = self._split(every, modalities)
        train, validation, test = (self._write(name, parts[name], modalities) for name in PARTS)
        fuse = self.task != "retrieval" and (len(modalities) > 1 or self.task == "pair-classification")
        counts = {name: len(own) for name, own in parts.items()}
        settings = (self.task, modalities, head, label, fuse)
        return Prepared(*settings, train, validation, test, counts=counts, notes=self.notes)

    def _find(self) -> list[Source]:
        """The sources of all parts. Those that `data` itself names as a part give way to what was given for it."""
        found: list[Source] = []
        for part, names in self.given.items():
            for number, name in enumerate(names):
                own = sources.find(name, self.work / "packs" / f"{part}-{number}", self.named)
                several = len({source.part for source in own}) > 1
                if part == "train":
                    own = [one for one in own if not several or one.part in ("", "train") or not self.given[one.part]]
                    own = own if several else [dataclasses.replace(one, part="") for one in own]
                else:
                    own = [dataclasses.replace(one, part=part) for one in own if not several or one.part == part]
                found += own
                if not own:
                    raise UserError(f"{name}: its parts have other names; there is none for {part}")
        if not any(source.part in ("", "train") for source in found):
            named = " and ".join(sorted({source.part for source in found}))
            raise UserError(
                f"{', '.join(self.given['train'])}: holds only {named}, nothing to train on; name more in --data"
            )
        return found

    def _open(self, number: int, source: Source) -> Source:
        """The source as shards, where the task reads media or the samples can be read only so."""
        if source.file.lower().endswith(COMPRESSED) or (self.reads_media and source.media and not source.shards):
            return sources.pack_media(source, self.work / "packs" / str(number))
        return source

    def _label_field(self, columns: list[samples.Columns], native: bool) -> str:
        """Where the shards will have the label. Shards of media are used as they are, with the label where it is."""
        if self.task in ("captioning", "retrieval"):
            return ""
        names = self.labels = sorted({one.label for one in columns})
        if native and len(names) > 1:
            raise UserError(f"the shards have labels in several fields, {', '.join(names)}: name one with --label")
        fixed = {"tag": "tags", "span": "answer", "regress": "score", "classify": "label"}
        return names[0] if native else fixed[self.head]

    def _read(self, source: Source, columns: samples.Columns, label: str) -> list[Sample]:
        """The samples of a source that have what the task needs but for their modalities."""
        read: list[Sample] = []
        bad = self.bad[id(source)] = []
        for place, row, shard, number in _rows(source):
            try:
                if isinstance(row, SampleError):
                    raise row
                one = samples.read_row(self.task, row, columns, source, label)
            except SampleError as error:
                bad.append((place, error))
                continue
            has = {"text"} if one.text else set()
            has |= {modality for modality, column in source.media.items() if row.get(column) and shard is None}
            media = []
            for extension, (_, length, crc) in shard.spans(number).items() if shard else ():
                if (modality := modality_of(extension)) in ("image", "audio"):
                    has.add(modality)
                    media.append(f"{modality} {length} {crc}")
            written = one.row if self.reads_media else {**one.row, "text": one.text}
            read.append(Sample(source, place, has, one, media, written != row, shard, number))
        return read

    def _choose_modalities(self, every: list[Sample]) -> list[str]:
        """What the task reads of a sample, in the order of `MODALITIES`. Raises UserError where there is no such."""
        kinds = Counter(frozenset(sample.has) for sample in every)
        have = {modality for kind in kinds for modality in kind}
        wanted = {
            "image-classification": ["image"],
            "audio-classification": ["audio"],
            **{task: ["text"] for task in TEXT_TASKS},
        }
        if self.task in wanted:
            options = [frozenset(wanted[self.task])]
        elif self.task == "captioning":
            options = [frozenset(("image", "text")), frozenset(("audio", "text"))]
        elif self.task == "regression":
            options = [kind for kind in kinds if kind]
        else:
            options = [kind for kind in kinds if len(kind) > 1]
            if self.task == "pair-classification" and any(sample.read.weak for sample in every):
                options.append(frozenset(("text",)))
        fits = {option: sum(count for kind, count in kinds.items() if option <= kind) for option in options}
        best = max(fits, key=lambda option: (fits[option], len(option), sorted(option)), default=frozenset())
        if every and not fits.get(best):
            needs = {"captioning": "images or sounds with text", "retrieval": "two modalities"}.get(
                self.task, " and ".join(wanted.get(self.task, ["two modalities, or two texts (text_a and text_b)"]))
            )
            near = [task for task, (what, *_) in wanted.items() if what in have]
            hint = f"; --task {near[0]} reads what they hold" if near else ""
            held = " and ".join(sorted(have)) or "none"
            raise UserError(f"{self._name()}: --task {self.task} reads {needs}, but the samples hold {held}{hint}")
        return [modality for modality in MODALITIES if modality in best]

    def _name(self, part: str = "train") -> str:
        return ", ".join(self.given[part] or self.given["train"])

    def _check_source(self, source: Source, read: list[Sample], modalities: list[str]) -> list[Sample]:
        """The samples that have the modalities; the others and what `pack` refused are bad."""
        bad = self.bad[id(source)]
        refused = [row for row in source.lost if row["part"] in ("", *modalities)]
        bad += {
            row["key"]: (f"{source.given} {row['key']}", SampleError(row["reason"], row["detail"])) for row in refused
        }.values()
        usable = []
        for sample in read:
            if missing := [modality for modality in modalities if modality not in sample.has]:
                if not refused:  # else it is among them
                    bad.append((sample.place, SampleError("empty", f"no {' and no '.join(missing)} in it")))
            else:
                usable.append(sample)
        for name in source.folders if self.head == "classify" and not self.named["label"] else ():
            if not any(name in sample.classes for sample in usable):
                why = next((f" ({e.detail or e.reason})" for place, e in bad if f" {name}{os.sep}" in place), "")
                raise UserError(
                    f"{source.given}: the class folder {name!r} has no sample that can be read{why}: add some, "
                    "or remove it"
                )
        self.sizes[id(source)], total = len(usable), len(bad) + len(usable)
        place, error = bad[0] if bad else ("", SampleError("empty"))
        if not usable or (len(bad) > 1 and len(bad) > MAX_BAD * total):
            self._report_bad()
            raise UserError(
                f"{source.given}: {len(bad)} of {total} samples cannot be used, and at most {MAX_BAD:.0%} may be left "
                f"out; the first is {place}: {error.detail or error.reason}; mend them: "
                f"{self.work / 'quarantine.jsonl'} names all"
            )
        if bad:
            others = f"; {self.work / 'quarantine.jsonl'} names all" if len(bad) > 1 else ""
            why = f"{place}: {error.detail or error.reason}{others}"
            self.notes.append(f"{source.given}: left out {len(bad)} of {total} samples: {why}.")
        return usable

    def _report_bad(self) -> None:
        """Write what was left out, in the rows of a run's `quarantine.jsonl`."""
        rows = [
            {
                "source": "data",
                "shard": "",
                "key": place,
                "part": "",
                "reason": e.reason,
                "detail": e.detail,
                "step": None,
            }
            for own in self.bad.values()
            for place, e in own
        ]
        if rows:
            storage.write_atomic(self.work / "quarantine.jsonl", [encode_json(row) + b"\n" for row in rows])

    def _count_classes(self, every: list[Sample], label: str, native: bool) -> dict[str, Any]:
        """The settings of the head: the classes, sorted. Raises UserError where there are none to tell apart."""
        if self.head not in ("classify", "tag"):
            return {}
        multi = False
        if self.head == "classify":
            multi = self._split_labels(every, label, native)
        counts = Counter(one for sample in every for one in set(sample.classes))
        what = "tag" if self.head == "tag" else "class"
        classes = sort_classes(counts)
        if len(classes) < 2:
            only = f"only the {what} {classes[0]!r}" if classes else f"no {what}"
            raise UserError(f"{self._name()}: {only} in {len(every)} samples; two are the least to tell apart")
        if self.head == "classify" and len(every) > 10 and 2 * len(classes) > len(every):
            raise UserError(
                f"{self._name()}: {', '.join(self.labels)} has {len(classes)} different values in {len(every)} samples "
                f"({classes[0]!r}, {classes[1]!r}, ...), which are no classes: name another column with --label, "
                "or take --task regression"
            )
        shown = ", ".join(f"{one} {counts[one]:,}" for one in classes[:12])
        more = f", and {len(classes) - 12} more" if len(classes) > 12 else ""
        plural = "tags (sentences with each)" if what == "tag" else f"classes{', several may hold at once' * multi}"
        self.notes.append(f"{len(classes)} {plural}: {shown}{more}.")
        return {"classes": classes, "multi_label": multi} if self.head == "classify" else {"classes": classes}

    def _split_labels(self, every: list[Sample], label: str, native: bool) -> bool:
        """Whether samples have several labels: as lists or, in tables, as words joined by `|` or `;`."""
        if not native:
            for mark in "|;":
                joined = [
                    sample for sample in every if isinstance(sample.read.label, str) and mark in sample.read.label
                ]
                if joined and not any(isinstance(sample.read.label, list) for sample in every):
                    for sample in every:
                        sample.read.label = [one.strip() for one in sample.read.label.split(mark) if one.strip()]
        multi = any(isinstance(sample.read.label, list) for sample in every)
        for sample in every if multi and not native else ():
            sample.read.label = sample.classes
            sample.read.row[label], sample.changed = sample.classes, True
        return multi

    def _split(self, every: list[Sample], modalities: list[str]) -> dict[str, list[Sample]]:
        """The samples of each part; what is not given is split off. Raises UserError where that cannot be, and for a
        class that only another part than training has."""
        parts: dict[str, list[Sample]] = {part: [s for s in every if s.source.part == part] for part in PARTS}
        pool = parts["train"] + [sample for sample in every if not sample.source.part]
        shares = {part: share for part, share in SHARES.items() if not parts[part]}
        media = any(modality != "text" for modality in modalities)
        strong = [s.media if media else _digests(s.read.strong) for s in pool]
        weak = [_digests([*s.read.strong * media, *s.read.weak]) for s in pool]
        if media and self.head == "classify" and len(modalities) == 1:
            weak = [[] for _ in pool]
        strata = [s.classes if self.head != "span" else [str(s.read.label is None)] for s in pool]
        if shares:
            clusters, tied = split.cluster(strong, weak)
            digests = [own[0] if own else sample.place for own, sample in zip(strong, pool)]
            chosen = split.split(clusters, digests, strata, shares, self.seed, self._name())
            for part in ("train", *shares):
                parts[part] = [sample for sample, own in zip(pool, chosen) if own == part]
            kept = "" if tied else "; texts that many samples share are in several parts"
            what = " and ".join(f"{len(parts[part]):,} for {part}" for part in shares)
            self.notes.append(f"Split off {what} by hash (seed {self.seed}), equal samples in one part{kept}.")
        else:
            parts["train"] = pool
        self._check_classes(parts)
        self.notes.append("Samples: " + ", ".join(f"{part} {len(own):,}" for part, own in parts.items()) + ".")
        if given := [part for part in ("validation", "test") if part not in shares]:
            trained = {one for s in parts["train"] for one in (s.media if media else _digests(s.read.strong))}
            for part in given:
                own = [s.media if media else _digests(s.read.strong) for s in parts[part]]
                if copies := sum(not trained.isdisjoint(one) for one in own):
                    self.notes.append(f"{copies:,} of the {len(own):,} samples of {part} are in training too.")
        return parts

    def _check_classes(self, parts: dict[str, list[Sample]]) -> None:
        trained = {one for sample in parts["train"] for one in sample.classes}
        for part in ("validation", "test"):
            for sample in parts[part]:
                if unknown := [one for one in sample.classes if one not in trained]:
                    what = "tag" if self.head == "tag" else "class"
                    raise UserError(
                        f"the {what} {unknown[0]!r} is only in {part} ({sample.place}), not in training "
                        f"({self._name()}): add samples of it to --data, or leave it out of --{part}"
                    )
        if self.head == "classify":
            lacking = sorted(trained - {one for sample in parts["test"] for one in sample.classes})
            if lacking:
                self.notes.append(f"No test sample of {len(lacking)} classes: {', '.join(lacking[:5])}.")

    def _write(self, part: str, own: list[Sample], modalities: list[str]) -> list[str]:
        """The shards of a part: those that were given, where they hold just its samples as they are; else new ones."""
        given = {id(sample.source): sample.source for sample in own}
        whole = all(source.part == part or not source.part for source in given.values())
        files = [file for source in given.values() for file in source.shards or [source.file]]
        if (
            whole
            and not any(sample.changed or sample.source.packed or self.bad[id(sample.source)] for sample in own)
            and all(file.endswith((".tar", ".jsonl")) for file in files)
            and len(own) == sum(self.sizes[one] for one in given)
        ):
            return files
        text_only = modalities == ["text"]
        seen: Counter[str] = Counter()
        names = []
        for number, chunk in enumerate(_chunks(own)):
            path = self.work / f"{part}-{number:06d}.{'jsonl' if text_only else 'tar'}"
            if text_only:
                rows = ({"text": sample.read.text, **sample.read.row} for sample in chunk)
                storage.write_atomic(path, (encode_json(row) + b"\n" for row in rows))
            else:
                shards.write(path, (_members(sample, modalities, seen) for sample in chunk))
            names.append(str(path))
        return names


def sort_classes(classes: Iterable[str]) -> list[str]:
    """The classes in the order of their numbers, where all are numbers; else of their names."""
    try:
        return sorted(classes, key=lambda one: (float(one), one))
    except ValueError:
        return sorted(classes)


def _rows(source: Source) -> Iterator[tuple[str, dict | SampleError, index.Index | None, int]]:
    """Place and row of each sample of a source; of one in a shard the shard and its number there."""
    if not source.shards:
        for number, (place, row) in enumerate(source.rows()):
            yield place, row, None, number
        return
    for shard, number, row in sources.read_shards(source.shards):
        yield f"{source.given if source.packed else shard.shard} {shard.key(number)}", row, shard, number


def _digests(texts: Iterable[str]) -> list[str]:
    return [dedup.digest(dedup.normalize(text).encode("utf-8", "replace")) for text in texts]


def _chunks(own: list[Sample]) -> Iterator[list[Sample]]:
    """The samples in runs of about `SHARD_BYTES`."""
    chunk, size = [], 0
    for sample in own:
        chunk.append(sample)
        size += sum(length for _, length, _ in sample.shard.spans(sample.number).values()) if sample.shard else 0
        if size >= SHARD_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _members(sample: Sample, modalities: list[str], seen: Counter[str]) -> dict:
    """A sample's members to write. Raises UserError where its shard cannot be read any more."""
    assert sample.shard
    raw, failed = sample.shard.read(sample.number)
    if failed:
        raise UserError(f"{sample.place}: {failed[0][1]}")
    members = {e: data for e, data in raw.items() if e in ("json", "cls") or modality_of(e) in modalities}
    if sample.changed:
        members["json"] = encode_json(sample.read.row)
        members.pop("cls", None)
        if "text" in modalities and sample.read.text:
            members["txt"] = sample.read.text.encode()
    key = safe_key(sample.shard.key(sample.number))
    seen[key] += 1
    return {"__key__": key if seen[key] == 1 else f"{key}~{seen[key]}", **members}
