"""Writing token by token with a cache: sampling, greedy decoding and beam search.

R sequences, V ids, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import Cache
from ..batch import Batch, Example, collate, route
from ..model import Model, autocast
from ..objectives.base import Objective, Prefix
from ..tokenizers.base import Generation, find_prompt
from ..tokens import Tokens, constant, make_sequence
from .logits import choose, forbid, guide, penalize
from .settings import Settings
from .text import TextStream


@dataclass
class Sequence:
    """A sequence that is being written."""

    prefix: Prefix  # what was read before
    ids: list[int]  # of the target: those that were given and those that were written
    given: int  # how many were given
    unguided: Prefix | None = None  # with guidance: the prefix of the second reading
    log_likelihood: float = 0.0  # of what was written, before temperature and truncation
    stopped: str = ""  # end, length, or stop string; empty while it goes on
    generator: torch.Generator = field(default_factory=torch.Generator)
    text: TextStream | None = None  # what the ids spell, where they spell text that is looked at on the way

    @property
    def written(self) -> list[int]:
        return self.ids[self.given :]

    def extend(self, token: int, log_likelihood: float) -> Sequence:
        """A copy with one more token, and this log-likelihood in all."""
        return dataclasses.replace(self, ids=[*self.ids, token], log_likelihood=log_likelihood)


class Reader:
    """Sequences that are read with a cache and go on one token at a time; `logits` (R, V) are those of the next."""

    def __init__(self, model: Model, objective: Objective, target: str, prompts: list[tuple[Prefix, list[int]]]):
        """prompts: for each sequence what is read before, and the ids that the target begins with."""
        self.model, self.target, self.generation = model, target, get_generation(model, target)
        self.number = model.modalities.index(target)
        self.to_logits: Any = objective.predictors[target].logits
        self.counts = torch.tensor([len(ids) for _, ids in prompts])  # tokens of the target that were read
        self.times = torch.tensor([prefix.time for prefix, _ in prompts])
        examples = [(i, self._example(*prompt)) for i, prompt in enumerate(prompts)]
        batch = collate({"write": examples}, model.modalities, {"write": {}})
        self.cache = Cache(batch.tokens, model.device)
        self.rows = batch.tokens.sequence.unique_consecutive()  # of the cache's sequences: which of ours each one is
        last = (batch.tokens.sequence.diff(append=torch.tensor([-1])) != 0).nonzero()[:, 0]
        batch = dataclasses.replace(batch.to(model.device), attention=self.cache.plan)
        self._read(batch, last.to(model.device))

    def _example(self, prefix: Prefix, ids: list[int]) -> Example:
        position = self.generation.positions[: len(ids)] + torch.tensor([prefix.time, 0.0, 0.0])
        start = make_sequence(torch.tensor(ids, dtype=torch.long), position, self.number)
        start = start.replace(order=torch.arange(len(ids)) + prefix.order)
        inputs = [piece for piece in (*prefix.inputs, start) if len(piece)]
        hidden = [*(prefix.hidden or [None] * len(prefix.inputs)), None][: len(inputs)]
        if (prompt := find_prompt(self.model.tokenizers)) is not None:  # learned tokens, before all others
            order = torch.arange(-len(prompt), 0) + int(inputs[0].order[0])
            inputs, hidden = [prompt.replace(order=order), *inputs], [None, *hidden]
        return Example(inputs, hidden)

    @torch.no_grad()
    def _read(self, batch: Batch, last: Tensor | None = None) -> None:
        """last: the last row of each of the cache's sequences; None: each has one row."""
        with autocast(self.model.device, self.model.device.type == "cuda"):
            vectors = self.model(batch, cache=self.cache).tokens.content
            vectors = vectors if last is None else vectors.index_select(0, last)
            logits = self.to_logits(vectors).float()
        self.logits = logits.index_select(0, torch.argsort(self.rows).to(logits.device))

    def append(self, ids: Tensor) -> None:
        """One more token for each sequence (R,)."""
        rows, device = self.rows, self.model.device
        self.cache.step()
        position = self.generation.positions[self.counts[rows]].clone()
        position[:, 0] += self.times[rows]
        numbers = torch.arange(len(rows))
        tokens = Tokens(numbers, position, numbers, numbers, constant(self.number, len(rows))).to(device)
        routing = route(constant(self.number, len(rows)), len(self.model.modalities)).to(device)
        content = {self.target: ids.to(device).index_select(0, rows.to(device))}
        hidden = {self.target: torch.zeros(len(rows), device=device)}
        self._read(Batch(content, hidden, tokens, len(rows), self.cache.plan, routing, {}))
        self.counts = self.counts + 1

    def keep(self, which: list[int]) -> None:
        """Go on with these sequences, in this order; one that is named twice becomes two."""
        if which == list(range(len(self.rows))):
            return
        chosen = torch.tensor(which, dtype=torch.long)
        slots = torch.argsort(self.rows)[chosen]
        self.rows = torch.argsort(slots, stable=True)  # sequences of one length stay side by side
        self.cache.keep(slots[self.rows].tolist())
        self.counts, self.times = self.counts[chosen], self.times[chosen]
        self.logits = self.logits.index_select(0, chosen.to(self.logits.device))


def get_generation(model: Model, target: str) -> Generation:
    generation = model.tokenizers[target].generation()
    assert generation is not None, target
    return generation


class Writer:
    """The sequences of a batch that are not finished yet, and a reader of them."""

    def __init__(self, model: Model, objective: Objective, target: str, sequences: list[Sequence], settings: Settings):
        self.model, self.objective, self.target, self.settings = model, objective, target, settings
        self.generation = get_generation(model, target)
        self.sequences, self.guided = sequences, settings.guidance_scale != 1
        self._read_anew()

    def _read_anew(self) -> None:
        """Read each different beginning once, and go on from as many copies of it as there are sequences."""
        pairs: list[tuple[Prefix, list[int]]] = [(s.prefix, self._window(s.ids)) for s in self.sequences]
        if self.guided:
            pairs += [(s.unguided or s.prefix, ids) for s, (_, ids) in zip(self.sequences, pairs, strict=True)]
        keys = [(id(prefix), *ids) for prefix, ids in pairs]
        different = dict(zip(keys, pairs, strict=True))
        places = {key: place for place, key in enumerate(different)}
        self.reader = Reader(self.model, self.objective, self.target, list(different.values()))
        self.reader.keep([places[key] for key in keys])

    def _window(self, ids: list[int]) -> list[int]:
        """What is read again of a text that is longer than what the model was trained on: from half of that to all."""
        length, first = self.generation.length, self.generation.first
        if len(ids) <= length:
            return ids
        step = max(length // 2, 1)
        size = length - step + 1 + (len(ids) - length - 1) % step
        return [*first, *ids[len(first) + len(ids) - size :]]

    def logits(self) -> Tensor:
        """Of the next token of each sequence (R, V): guided, penalized, with -inf for what must not come next."""
        logits = self.reader.logits.clone()
        if self.guided:
            with_prefix, without = logits.chunk(2)
            logits = guide(with_prefix, without, self.settings.guidance_scale)
        if self.settings.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, sequence in enumerate(self.sequences):
                seen[row, [i for i in sequence.ids if i < logits.shape[1]]] = True
            logits = penalize(logits, seen, self.settings.repetition_penalty)
        logits = forbid(logits, list(self.generation.first))  # what begins sequences stands nowhere else
        early = [i for i, s in enumerate(self.sequences) if len(s.written) < self.settings.min_new_tokens]
        if self.generation.end is not None and early:
            logits[early, self.generation.end] = -torch.inf
        return logits

    def limit(self, sequence: Sequence) -> int:
        """The tokens that a sequence may get."""
        return self.settings.max_new_tokens or self.generation.length - sequence.given

    def advance(self, sequences: list[Sequence], parents: list[int]) -> None:
        """Go on with `sequences`, each of which has one token more than the sequence in the row that it comes from."""
        old, self.sequences = len(self.sequences), sequences
        if not sequences:
            return
        self.reader.keep(parents + [row + old for row in parents] if self.guided else parents)
        if int(self.reader.counts.max()) == self.generation.length:
            self._read_anew()
        else:
            self.reader.append(torch.tensor([s.ids[-1] for s in sequences] * (1 + self.guided)))

    def step(self) -> None:
        """Draw the next token of each sequence; those that are finished leave."""
        logits = self.logits()
        chosen = choose(logits, self.settings, [s.generator for s in self.sequences])
        likelihoods = logits.log_softmax(1).gather(1, chosen[:, None])[:, 0].tolist()
        for sequence, token, likelihood in zip(self.sequences, chosen.tolist(), likelihoods, strict=True):
            sequence.ids.append(token)
            sequence.log_likelihood += likelihood
            if sequence.text is not None and token != self.generation.end:
                sequence.text.push(token)
            if token == self.generation.end:
                sequence.stopped = "end"
            elif sequence.text is not None and sequence.text.stopped:
                sequence.stopped = "stop string"
            elif len(sequence.written) >= self.limit(sequence):
                sequence.stopped = "length"
            if sequence.stopped and sequence.text is not None:
                sequence.text.finish()
        going = [row for row, sequence in enumerate(self.sequences) if not sequence.stopped]
        self.advance([self.sequences[row] for row in going], going)


def write(
    model: Model, objective: Objective, target: str, sequences: list[Sequence], settings: Settings
) -> Iterator[None]:
    """Write the sequences, in place, until each is finished; yields after each token."""
    writer = Writer(model, objective, target, sequences, settings)
    while writer.sequences:
        writer.step()
        yield


def beam_search(
    model: Model, objective: Objective, target: str, prompts: list[Sequence], settings: Settings
) -> Iterator[list[list[Sequence]]]:
    """For each prompt at most `num_beams` finished sequences, the best first; yields after each token.

    A sequence's score is its log-likelihood divided by its length to the power `length_penalty` (Wu et al. 2016,
    without their constant). A prompt is done when none of its beams can still come to a better score.
    """
    writer = Writer(model, objective, target, prompts, settings)
    owners, done = list(range(len(prompts))), [[] for _ in prompts]
    while writer.sequences:
        log_softmax = writer.logits().log_softmax(1).cpu()
        going: list[tuple[Sequence, int, int]] = []  # what goes on, the row that it comes from, its prompt
        for prompt in dict.fromkeys(owners):
            rows = [row for row, owner in enumerate(owners) if owner == prompt]
            beams = []
            for row, extended in _best(writer.sequences, rows, log_softmax, 2 * settings.num_beams):
                if extended.ids[-1] == writer.generation.end:
                    done[prompt].append(dataclasses.replace(extended, stopped="end"))
                elif len(extended.written) >= writer.limit(extended):
                    done[prompt].append(dataclasses.replace(extended, stopped="length"))
                elif len(beams) < settings.num_beams:
                    beams.append((extended, row, prompt))
            done[prompt] = sorted(done[prompt], key=lambda s: -score(s, settings))[: settings.num_beams]
            if not _is_done(done[prompt], [beam for beam, _, _ in beams], writer, settings):
                going += beams
        owners = [prompt for _, _, prompt in going]
        writer.advance([sequence for sequence, _, _ in going], [row for _, row, _ in going])
        yield done


def score(sequence: Sequence, settings: Settings) -> float:
    return sequence.log_likelihood / max(len(sequence.written), 1) ** settings.length_penalty


def _best(
    sequences: list[Sequence], rows: list[int], log_softmax: Tensor, count: int
) -> Iterator[tuple[int, Sequence]]:
    """The likeliest continuations of the sequences in `rows` by one token, and the rows that they come from."""
    before = torch.tensor([sequences[row].log_likelihood for row in rows], dtype=torch.double)
    total = (before[:, None] + log_softmax[rows].double()).flatten()
    values, places = total.topk(min(count, len(total)))
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value > -torch.inf:
            row = rows[place // log_softmax.shape[1]]
            yield row, sequences[row].extend(place % log_softmax.shape[1], value)


def _is_done(done: list[Sequence], beams: list[Sequence], writer: Writer, settings: Settings) -> bool:
    if len(done) < settings.num_beams or not beams:
        return not beams
    # log-likelihoods only fall: at best one stays what it is while the length, which it is divided by, grows
    lengths = [writer.limit(b) if settings.length_penalty > 0 else len(b.written) + 1 for b in beams]
    best = max(b.log_likelihood / n**settings.length_penalty for b, n in zip(beams, lengths, strict=True))
    return best <= score(done[-1], settings)
