"""Decodes every sample as a training run would."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ..corpus.index import Index
from ..corpus.shards import Config as Source
from ..errors import SampleError
from .verify import refused_rows

MAX_CHARACTERS = 10_000  # of a text in a row


def describe_samples(indexes: list[Index], tokenizers: dict) -> Iterator[dict]:
    """A row for each sample, after decoding all of it, and one for everything refused of which no sample is left."""
    for index in indexes:
        refused: dict[str, dict[str, str]] = {}
        unknown = []
        for row in refused_rows(index):
            if row["key"]:
                refused.setdefault(row["key"], {})[row["part"] or "sample"] = row["reason"]
            else:
                unknown.append(("", {"shard": row["reason"]}))
        for sample in range(len(index)):
            yield _describe_sample(index, sample, tokenizers, refused.pop(index.key(sample), {}))
        for key, lost in [*refused.items(), *unknown]:
            yield {"shard": index.shard, "key": key, "outcome": "skip", "lost": lost}
        if (more := index.head["rejection_count"] - len(index.rejections)) > 0:
            print(f"{index.shard}: {more} more were refused, which the index does not name", file=sys.stderr)


def _describe_sample(index: Index, sample: int, tokenizers: dict, refused: dict[str, str]) -> dict:
    """The outcome (ok, partial or skip), what is lost of the sample and why, and what each modality has."""
    parts, lost = {}, dict(refused)
    for modality, tokenizer in tokenizers.items():
        about, error = describe_part(index, sample, tokenizer)
        if about is not None:
            parts[modality] = about[:MAX_CHARACTERS] if isinstance(about, str) else about
        if error is not None:
            lost[modality] = error.reason
    if not parts and not lost:
        lost["sample"] = "empty"
    outcome = "skip" if not parts else "partial" if lost else "ok"
    return {"shard": index.shard, "key": index.key(sample), "outcome": outcome, "lost": lost, **parts}


def describe_part(index: Index, sample: int, tokenizer) -> tuple[object, SampleError | None]:
    """What a tokenizer says of a sample, None where there is nothing it can read; and what could not be read."""
    if set(index.extension_sets[index.extension_set_ids[sample]]).isdisjoint(tokenizer.extensions):
        return None, None
    members, failed = read_members(index, sample, tokenizer)
    error = failed[0][1] if failed else None
    if not members:
        return None, error
    try:
        return tokenizer.describe(members), error
    except SampleError as error:
        return None, error


def read_members(index: Index, sample: int, tokenizer) -> tuple[dict[str, bytes], list[tuple[str, SampleError]]]:
    """A sample's members that a tokenizer reads, by extension, and those that cannot be had."""
    return index.read(sample, tokenizer.extensions, Source.max_bytes)
