"""Tables: rows whose columns hold images, audio, text and labels (CSV, Parquet, JSON lines, Hugging Face data sets)."""

from __future__ import annotations

import array
import csv
import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..corpus.fields import parse
from ..errors import SampleError, UserError
from .fetch import fetch, sniff_extension
from .samples import MAX_BYTES, TEXT_COLUMNS, RawSample, encode_json
from .settings import Settings

USUAL_COLUMNS = {
    "image": ("image", "img", "picture", "photo", "image_path", "image_url", "image_file", "img_path"),
    "audio": ("audio", "sound", "audio_path", "audio_url", "audio_file", "sound_path"),
    "text": TEXT_COLUMNS,
}
"""The columns that are read where none is named, by modality."""
MAX_LABELS = 100_000
PROBED = 100  # rows of JSON lines that are looked at to tell which columns there are


class RowFile:
    """JSON rows in a file and their offsets in another: written once, then read at random with `read_row`."""

    def __init__(self, base: str):
        self.base, self.offsets, self.end = base, array.array("Q"), 0
        self.file = open(f"{base}.rows", "wb")

    def __len__(self) -> int:
        return len(self.offsets)

    def add(self, row) -> None:
        self.offsets.append(self.end)
        self.end += self.file.write(json.dumps(row, ensure_ascii=True).encode() + b"\n")

    def close(self) -> int:
        """Force all of it to the disk; returns the number of rows."""
        with open(f"{self.base}.offsets", "wb") as file:
            self.offsets.tofile(file)
            for one in (file, self.file):
                one.flush()
                os.fsync(one.fileno())
        self.file.close()
        return len(self)


def read_row(base: str, number: int):
    offsets = _map_offsets(base, os.stat(f"{base}.offsets").st_mtime_ns)
    with open(f"{base}.rows", "rb") as file:
        file.seek(int(offsets[number]))
        return json.loads(file.readline())


@functools.lru_cache(maxsize=64)
def _map_offsets(base: str, mtime: int) -> np.ndarray:
    return np.memmap(f"{base}.offsets", "<u8", "r")


def choose_columns(path: str, settings: Settings, names: list[str], typed: dict | None = None) -> dict[str, str]:
    """Columns by their role: the named ones, then those of a known type, then those with a usual name.

    Raises UserError where a named column is missing or there is nothing to read.
    """
    shown = ", ".join(map(str, names[:20]))
    for role, name in settings.columns.items():
        if name not in names:
            raise UserError(f"{path}: no column {name!r} (--{role}-column); there are: {shown}")
    columns = (typed or {}) | settings.columns
    for role, usual in USUAL_COLUMNS.items():
        if role not in columns and (name := next((n for n in usual if n in names and n not in columns.values()), None)):
            columns[role] = name
    if not columns.keys() & USUAL_COLUMNS.keys():
        raise UserError(
            f"{path}: name what its columns hold with --image-column, --audio-column, --text-column; there are: {shown}"
        )
    return columns


def add_labels(labels: set[str], values: Iterable) -> None:
    """Add what is not empty to the labels. Raises UserError where there are too many."""
    labels.update(str(value) for value in values if value is not None and value != "")
    if len(labels) > MAX_LABELS:
        raise UserError(f"--label-column has more than {MAX_LABELS} different values: these are not classes")


def is_whole(word: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", word) is not None


def read_rows(path: str) -> Iterator[tuple[str, dict | SampleError]]:
    """Name and row of each line of a .csv, .tsv or .jsonl file, or why the line cannot be used."""
    return _json_rows(path) if path.lower().endswith(".jsonl") else _csv_rows(path)


def _json_rows(path: str) -> Iterator[tuple[str, dict | SampleError]]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(functools.partial(file.readline, MAX_BYTES), b"")):
            if line.strip():
                try:
                    row = parse(line)
                    yield str(number), row if isinstance(row, dict) else SampleError("json", "not a JSON object")
                except SampleError as error:
                    yield str(number), error


def _csv_rows(path: str) -> Iterator[tuple[str, dict | SampleError]]:
    """The delimiter is a tab, a semicolon or a comma, whichever the first line has most of."""
    csv.field_size_limit(MAX_BYTES)
    header, number = None, -1
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline(1 << 20)
        file.seek(0)
        lines = (line.replace("\0", "") for line in file)
        try:
            for row in filter(None, csv.reader(lines, delimiter=max("\t;,", key=first.count))):
                if header is None:
                    header = [name.strip() for name in row]
                    if twice := [name for name in header if header.count(name) > 1]:
                        raise UserError(f"{path}: two columns are called {twice[0]!r}; rename one of them")
                    continue
                number += 1
                if len(row) == len(header):
                    yield str(number), dict(zip(header, row))
                else:
                    yield str(number), SampleError("decode", f"{len(row)} values, the header has {len(header)}")
        except csv.Error as error:
            yield "", SampleError("decode", f"after row {number}: {error}"[:200])


def has_media_columns(path: str) -> bool:
    """Whether the first rows of a .jsonl file name images or audio under a usual name."""
    usual = {*USUAL_COLUMNS["image"], *USUAL_COLUMNS["audio"]}
    rows = (row for _, row in itertools.islice(_json_rows(path), PROBED) if isinstance(row, dict))
    return any(isinstance(row[name], str) and row[name] for row in rows for name in usual & row.keys())


@functools.lru_cache(maxsize=8)
def open_parquet(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs `pip install multimodal_fm[pack]`") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError):
        return None


_batch: tuple = (None, 0, ())  # path, first row, rows


def read_parquet_row(path: str, number: int) -> dict:
    """A row of a Parquet file. The batch around it is kept, since rows are read one after the other."""
    global _batch
    if _batch[0] != path or not 0 <= number - _batch[1] < len(_batch[2]):
        file, group, start = open_parquet(path), 0, 0
        while start + (rows := file.metadata.row_group(group).num_rows) <= number:
            start, group = start + rows, group + 1
        for batch in file.iter_batches(batch_size=64, row_groups=[group]):
            if number < start + len(batch):
                _batch = (path, start, batch)
                break
            start += len(batch)
    return _batch[2].slice(number - _batch[1], 1).to_pylist()[0]


@functools.lru_cache(maxsize=4)
def load_dataset(path: str):
    """A Hugging Face data set: a folder of `save_to_disk`, or `owner/name` on the hub. Raises UserError."""
    local = os.path.isdir(path)
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: Hugging Face data sets need `pip install multimodal_fm[hub]`") from None
    try:
        return datasets.load_from_disk(path) if local else datasets.load_dataset(path)
    except Exception as error:  # whatever the library, the network and the builder raise
        first = str(error).strip().partition("\n")[0][:200]
        name = path if local else f"hf:{path}"
        raise UserError(f"{name}: cannot be loaded: {type(error).__name__}: {first}") from None


@functools.lru_cache(maxsize=8)
def load_split(path: str, split: str) -> Any:
    """One split of a data set, with images and audio as the bytes that are stored."""
    dataset: Any = load_dataset(path)
    dataset = dataset[split] if split else dataset
    for name, feature in dataset.features.items():
        if type(feature).__name__ in ("Image", "Audio"):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def dataset_roots(path: str) -> tuple[str, ...]:
    """The folders below which a data set's media may lie."""
    if os.path.isdir(path):
        return (path,)
    from datasets import config
    from huggingface_hub import constants

    return str(config.HF_DATASETS_CACHE), str(constants.HF_HUB_CACHE)


def sample_from_row(
    row: dict,
    key: str,
    columns: dict[str, str],
    roots: tuple[str, ...],
    settings: Settings,
    names: list[str],
    classes: dict[str, int],
) -> RawSample:
    """The sample of a row: media by path, URL or as bytes, the text, the label; its JSON holds all other columns.

    names: of the labels that are whole numbers, where the data set has them; classes: the number of each label that is
    a word.
    """
    sample = RawSample(str(row.get(columns["key"], key)) if "key" in columns else key, {})
    rest = {name: value for name, value in row.items() if not isinstance(value, (bytes, bytearray))}
    for modality in ("image", "audio"):
        if modality not in columns:
            continue
        value = row.get(columns[modality])
        if isinstance(value, dict):
            rest[columns[modality]] = value.get("path")
            value = value.get("bytes") or value.get("path")
        try:
            if value in (None, "", b""):
                raise SampleError("empty", f"nothing in column {columns[modality]}")
            binary = isinstance(value, (bytes, bytearray))
            data = bytes(value) if binary else fetch(str(value), roots, settings.allow_outside)
            sample.members[sniff_extension(data, modality, "" if binary else str(value))] = data
        except SampleError as error:
            sample.failed.append((modality, error))
    if isinstance(text := rest.get(columns.get("text")), str):
        del rest[columns["text"]]
        sample.members["txt"] = _encode_text(text)
    if "label" in columns and (label := row.get(columns["label"])) not in (None, ""):
        word = str(label)
        if names:
            word = names[int(word)] if is_whole(word) and 0 <= int(word) < len(names) else ""  # -1: not labelled
        if word in classes:
            rest["label"], word = word, str(classes[word])
        if is_whole(word):
            sample.members["cls"] = word.encode()
    rest = {name: value for name, value in rest.items() if value is not None and value != ""}
    if rest:
        sample.members["json"] = encode_json(rest)
    return sample


def _encode_text(text: str) -> bytes:
    """UTF-8; what was no UTF-8 in a CSV is restored, for the check of texts to refuse."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
