"""The order table of a task: for one sample, what the model reads, who reads whom, and which row answers what.

A token reads the tokens of its own sequence whose order is not later than its own; so the column `order` says it all.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..batch import Example, Sample, add_prompt
from ..corpus.index import Index
from ..corpus.shards import Config as Source
from ..errors import SampleError, UserError
from ..stream.tasks import TaskConfig
from ..tokenizers import text
from ..tokenizers.base import find_prompt
from ..tokens import Tokens, constant

MAX_LEARNED = 2000  # samples of a shard that merges are learned from, where no run has learned them yet
SHOWN = 12  # tokens at each end of a longer piece
HEADER = ("sequence", "order", "time row column", "modality", "reads", "predicts")


def order_tables(
    tasks: dict[str, TaskConfig], tokenizers: dict, heads: dict, indexes: list[Index], seed: int = 0
) -> Iterator[str]:
    """Yields a line with the task's name and the lines of its table, for the first sample that the task can read.

    Raises UserError where a task can read none of the samples.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = fit_tokenizers(tokenizers, indexes, Path(folder))
        for name, task in tasks.items():
            raws = (raw for index in indexes for raw in _members(index))
            example = next(filter(None, (arrange(task, tokenizers, heads, raw, seed) for raw in raws)), None)
            if example is None:
                raise UserError(f"task {name}: none of the samples has what it reads: {', '.join(task.modalities)}")
            yield f"{name}: {', '.join(task.objectives)} of {', '.join(task.modalities)}"
            prompt = find_prompt(tokenizers)
            yield from format_table(example if prompt is None else add_prompt(example, prompt), tokenizers)


def fit_tokenizers(tokenizers: dict, indexes: list[Index], folder: Path) -> dict:
    """The tokenizers, of which those that have yet to learn learn a little from these samples."""
    fitted = {}
    for name, tokenizer in tokenizers.items():
        if tokenizer.learns:
            raws = (raw for index in indexes for raw in itertools.islice(_members(index), MAX_LEARNED))
            tokenizer = tokenizer.fit(raws, folder / name)
        fitted[name] = tokenizer
    return fitted


def arrange(task: TaskConfig, tokenizers: dict, heads: dict, raw: dict[str, bytes], seed: int = 0) -> Example | None:
    """What the first objective of a task makes of a sample's members; None where it cannot read them."""
    plugin = next(iter(task.objectives.values()))
    bound = plugin.cls.bind(plugin.config, heads, tokenizers)
    tokens: dict[str, Tokens] = {}
    try:
        for modality in task.modalities:
            tokenizer, generator = tokenizers[modality], random.Random(seed)
            fixed = not plugin.cls.draws_views(plugin.config, modality)
            own = {extension: raw[extension] for extension in tokenizer.extensions if extension in raw}
            for sequence in tokenizer.read(own, None if fixed else generator)[:1] if own else ():
                number = list(tokenizers).index(modality)
                tokens[modality] = sequence.replace(modality=constant(number, len(sequence)))
        if len(tokens) < plugin.cls.min_modalities(plugin.config, task.modalities):
            return None
        label = plugin.cls.read_label(bound, raw, tokens, tokenizers)
    except SampleError:
        return None
    return plugin.cls.arrange(bound, Sample(tokens, label=label), torch.Generator().manual_seed(seed))


def _members(index: Index):
    """The members of each sample of a shard."""
    for sample in range(len(index)):
        yield index.read(sample, (), Source.max_bytes)[0]


def format_table(example: Example, tokenizers: dict) -> list[str]:
    """A row for each token that is read, in columns: `HEADER`; of a long piece the first and the last tokens."""
    answers: dict[int, list[str]] = {}
    for piece, rows in zip(example.targets, example.rows, strict=True):
        for row, what in zip(rows.tolist(), _contents(piece, None, tokenizers), strict=True):
            answers.setdefault(row, []).append(what)
    table: list[tuple[str, ...]] = [HEADER]
    number = 0
    for piece, hidden in zip(example.inputs, example.hidden, strict=True):
        contents, modality = _contents(piece, hidden, tokenizers), list(tokenizers)[int(piece.modality[0])]
        for i in range(len(piece)):
            if not SHOWN <= i < len(piece) - SHOWN:
                place = " ".join(f"{value:g}" for value in piece.position[i].tolist())
                columns = (piece.sequence[i], piece.order[i], place, modality, contents[i])
                table.append((*map(_cell, columns), ", ".join(answers.get(number + i, []))))
            elif i == SHOWN:
                table.append((f"... {len(piece) - 2 * SHOWN} more", "", "", "", "", ""))
        number += len(piece)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    if -1 in answers:
        lines.append(f"a decoder of the objective's own answers {len(answers[-1])} more")
    return lines


def _cell(value: Tensor | str) -> str:
    return value if isinstance(value, str) else str(int(value))


def _contents(piece: Tokens, hidden: Tensor | None, tokenizers: dict) -> list[str]:
    """What stands in each token: text as it is spelled, ids as numbers, `mask` where it is hidden."""
    tokenizer = list(tokenizers.values())[int(piece.modality[0])] if len(piece) else None
    shown = ["patch"] * len(piece)
    if piece.content.ndim == 1 and not piece.content.is_floating_point():
        shown = [f"<{value}>" for value in piece.content.tolist()]
        if isinstance(tokenizer, text.Tokenizer):
            spelled = [tokenizer.decode([value]) for value in piece.content.tolist()]
            shown = [repr(word) if word else value for word, value in zip(spelled, shown, strict=True)]
    return ["mask" if hidden is not None and hidden[i] else what for i, what in enumerate(shown)]
