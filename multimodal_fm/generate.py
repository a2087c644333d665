"""Generation: a prefix of any modalities in, a modality of discrete tokens out. `Model.generate` is what a user calls.

Captions of pictures and sounds, pictures of texts, texts that go on, holes that are filled in are one function: which
of them a run can do is what its objectives were trained for (`Objective.writes`, `Objective.fills`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import MAX_TOKENS
from .decoding.logits import make_generator
from .decoding.parallel import Canvas, fill
from .decoding.settings import Settings
from .decoding.text import TextStream
from .decoding.writer import Sequence, beam_search, get_generation, score, write
from .errors import SampleError, UserError
from .model import Model
from .objectives.base import Objective
from .objectives.contrastive import Objective as Contrastive
from .tokens import Tokens, constant, make_sequence

HOLE = "[MASK]"  # stands for one token that is to be filled in
STEPS = 8  # readings of parallel decoding, as in MaskGIT

Progress = Callable[[int, int], None]  # how much is done, and of how much


@dataclass
class Request:
    """What is to be generated."""

    to: str = "text"  # a modality of the model, or `image`, `audio` for the one that is named so with an ending
    objective: str = ""  # of the run, by name, as in `caption/causal` or `caption`; empty: the first that fits
    fill: list[str] | None = None  # texts with holes
    candidates: int = 1  # of each prompt
    rerank: bool = False  # the candidates by their likeness to the prompt, the nearest first

    def __post_init__(self):
        if self.candidates < 1:
            raise ValueError("candidates is at least 1")
        if isinstance(self.fill, str):
            raise ValueError("fill is a list of texts")


@dataclass
class Generated:
    """One result, and the other candidates for the same prompt."""

    value: Any  # what the tokenizer's `decode` makes of the ids: a text, a picture, a sound
    modality: str
    ids: list[int]
    log_likelihood: float  # in nats, of the tokens that were written, before temperature and truncation
    stopped: str  # end, length, stop string; filled
    similarity: float | None = None  # of `rerank`: the cosine with the prompt
    others: list[Generated] = field(default_factory=list)


@dataclass(frozen=True)
class Fit:
    """An objective that can do what is asked for, and how."""

    name: str
    objective: Objective
    parallel: bool
    continues: bool = False  # what was given of the target's own modality is its beginning
    unused: int = 0  # modalities that it could read before, and which were not given


def parse(given: dict[str, Any], modalities: list[str]) -> tuple[dict[str, Any], Request, Settings]:
    """The inputs by modality, the request and the settings among the keywords of `Model.generate`. Raises UserError."""
    parts = []
    for kind in (Request, Settings):
        names = {f.name for f in dataclasses.fields(kind)}
        try:
            parts.append(kind(**{name: value for name, value in given.items() if name in names}))
        except (TypeError, ValueError) as error:
            raise UserError(f"generate: {error}") from None
        given = {name: value for name, value in given.items() if name not in names}
    if unknown := [name for name in given if name not in modalities]:
        raise UserError(
            f"generate: {unknown[0]!r} is neither a setting nor a modality of this model ({', '.join(modalities)})"
        )
    return {name: value for name, value in given.items() if value is not None}, *parts


def find_target(model: Model, to: str) -> str:
    """The modality of a name: itself, or the only one of discrete tokens that is named so with `_` and an ending."""
    discrete = [m for m in model.modalities if model.tokenizers[m].generation() is not None]
    named = [to] if to in discrete else [m for m in discrete if m.startswith(f"{to}_")]
    if len(named) == 1:
        return named[0]
    if named:
        raise UserError(f"generate: {to!r} may be {' or '.join(named)}: name one")
    have = ", ".join(discrete) or "none"
    raise UserError(f"generate: this model cannot write {to!r}: its modalities of discrete tokens are {have}")


def find_objective(
    model: Model, objectives: dict[str, Any], target: str, given: list[str], request: Request, settings: Settings
) -> Fit:
    """The objective that writes `target` after the modalities given: token by token rather than in parallel, then the
    one that lacks the least of what it was trained to read before, then the first of the run. Raises UserError."""
    named = {n: o for n, o in objectives.items() if request.objective in ("", n, n.partition("/")[0])}
    if not named:
        raise UserError(f"generate: the run has no objective {request.objective!r} ({', '.join(objectives) or 'none'})")
    fits, wanted = [], set(given)
    for name, objective in named.items():
        before = objective.writes().get(target)
        if before is not None and request.fill is not None:
            others = set(before) - {target}
            if target in objective.restores() and wanted <= others:
                fits.append(Fit(name, objective, False, unused=len(others - wanted)))
        elif before is not None and not settings.steps:
            continues = not wanted <= set(before)
            if wanted - ({target} if continues else set()) <= set(before):
                fits.append(Fit(name, objective, False, continues, len(set(before) - wanted)))
        before = objective.fills().get(target)
        if before is not None and wanted <= set(before):
            fits.append(Fit(name, objective, True, False, len(set(before) - wanted)))
    if not fits:
        what = f"fill holes in {target}" if request.fill is not None else f"write {target}"
        raise UserError(
            f"generate: no objective of this run can {what}{f' after {chr(32).join(given)}' if given else ''}"
            f"{' in parallel' if settings.steps and request.fill is None else ''}; it can {abilities(model, named)}"
        )
    return min(fits, key=lambda fit: (fit.parallel, fit.unused))


def abilities(model: Model, objectives: dict[str, Any]) -> str:
    """What the objectives can generate, in words."""
    found = {}
    for objective in objectives.values():
        for verb, able in (("write", objective.writes()), ("fill in", objective.fills())):
            for target, before in able.items():
                if model.tokenizers[target].generation() is not None:
                    found[f"{verb} {target}{f' after {chr(32).join(before)}' if before else ''}"] = None
    return ", ".join(found) or "generate nothing"


@dataclass
class Prompt:
    """What one result is made of: the modalities that are read before, and the ids that the target begins with."""

    prefix: dict[str, Tokens]
    start: list[int]
    hidden: list[bool] | None = None  # which of the ids are holes
    holes: Tensor | None = None  # which of the prefix's tokens of the target's own modality are


def make_prompts(
    model: Model, fit: Fit, target: str, read: dict[str, list[list[Tokens]]], request: Request, settings: Settings
) -> list[Prompt]:
    """A prompt for each input. Raises UserError where their numbers differ, or one is too long."""
    counts = {modality: len(inputs) for modality, inputs in read.items()}
    if request.fill is not None:
        counts["fill"] = len(request.fill)
    if len(set(counts.values())) > 1:
        raise UserError(f"generate: as many inputs of each modality, not {counts}")
    generation, prompts = get_generation(model, target), []
    for i in range(next(iter(counts.values()), 1)):
        prefix = {m: _only(model, m, i, inputs[i]) for m, inputs in read.items()}
        start, hidden = list(generation.first), None
        if fit.continues:
            start = prefix.pop(target).content.tolist()
            start = start[:-1] if start[-1:] == [generation.end] else start
        if request.fill is not None:
            start, hidden = read_holes(model, target, request.fill[i])
            if not fit.parallel:  # the text with its holes is read, and written anew
                number, positions = model.modalities.index(target), generation.positions[: len(start)]
                prefix[target] = make_sequence(torch.tensor(start), positions, number)
                prompts.append(Prompt(prefix, list(generation.first), holes=torch.tensor(hidden)))
                continue
        elif fit.parallel:
            start, hidden = _all_hidden(model, target, settings)
        if hidden is None and len(start) >= generation.length and not settings.max_new_tokens:
            raise UserError(f"{target}[{i}]: has {len(start)} tokens, and a sequence at most {generation.length}: "
                            "shorten it, or name max_new_tokens")  # fmt: skip
        prompts.append(Prompt(prefix, start, hidden))
    return prompts


def _only(model: Model, modality: str, number: int, sequences: list[Tokens]) -> Tokens:
    """The sequence that is read of an input: of a long sound the first window; a text must be of one."""
    if not sequences:
        raise UserError(f"{modality}[{number}]: there is nothing in it")
    if len(sequences) > 1 and model.tokenizers[modality].generation() is not None:
        raise UserError(f"{modality}[{number}]: is too long: it has {sum(map(len, sequences))} tokens, and the model "
                        f"reads {max(map(len, sequences))} at a time")  # fmt: skip
    return sequences[0].replace(modality=constant(model.modalities.index(modality), len(sequences[0])))


def read_holes(model: Model, target: str, text: str) -> tuple[list[int], list[bool]]:
    """The ids of a text with holes, and which are holes. A hole is a token with the space before it, as in RoBERTa."""
    if not isinstance(text, str) or HOLE not in text:
        raise UserError(f"fill: {text!r} has no hole; write {HOLE} for each token that is to be filled in")
    generation, tokenizer = get_generation(model, target), model.tokenizers[target]
    ids, hidden, parts = list(generation.first), [False] * len(generation.first), text.split(HOLE)
    for number, part in enumerate(parts):
        if number:
            ids.append(0)
            hidden.append(True)
        part = part.rstrip() if number < len(parts) - 1 else part
        if part.strip():
            content = tokenizer.read(part)[0].content.tolist()
            inner = content[len(generation.first) : len(content) - (content[-1] == generation.end)]
            ids += inner
            hidden += [False] * len(inner)
    if generation.end is not None:
        ids.append(generation.end)
        hidden.append(False)
    if len(ids) > generation.length:
        raise UserError(f"fill: the text has {len(ids)} tokens, and a sequence at most {generation.length}")
    return ids, hidden


def _all_hidden(model: Model, target: str, settings: Settings) -> tuple[list[int], list[bool]]:
    """A sequence that is written in parallel: all hidden but its first ids, and its end where it has one."""
    generation = get_generation(model, target)
    ending = [] if generation.end is None else [generation.end]
    most = generation.length - len(generation.first) - len(ending)
    count = settings.max_new_tokens or most
    if (ending and not settings.max_new_tokens) or count > most:
        raise UserError(f"generate: {target} is written in parallel here: say how many tokens by max_new_tokens "
                        f"(at most {most})")  # fmt: skip
    hidden = [*[False] * len(generation.first), *[True] * count, *[False] * len(ending)]
    return [*generation.first, *[0] * count, *ending], hidden


def check(model: Model, fit: Fit, target: str, request: Request, settings: Settings) -> None:
    """Raises UserError where settings do not go together."""
    generation = get_generation(model, target)
    problems = {
        "num_beams is for writing token by token": settings.num_beams > 1 and fit.parallel,
        "with num_beams there are at most as many candidates": 1 < settings.num_beams < request.candidates,
        "stop_strings need num_beams=1": settings.num_beams > 1 and settings.stop_strings,
        f"stop_strings are for text, not for {target}": settings.stop_strings and generation.end is None,
        "stop_strings are for writing token by token": settings.stop_strings and fit.parallel,
        f"guidance_scale: {fit.name} was never trained without a source": (
            settings.guidance_scale != 1 and not fit.parallel and target in fit.objective.writes()[target]
        ),
        f"a sequence of {target} has {generation.length} tokens: leave out max_new_tokens and min_new_tokens": (
            generation.end is None and (settings.max_new_tokens or settings.min_new_tokens)
        ),
        "equal candidates at temperature 0: raise it, or use num_beams": (
            request.candidates > 1 and settings.temperature == 0 and settings.num_beams == 1
        ),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise UserError(f"generate: {problem}")


def _check_reading(fit: Fit, prompts: list[Prompt], settings: Settings) -> None:
    """Raises UserError where a reading would begin with nothing, which no output answers."""
    if any(not prompt.start and (not prompt.prefix or settings.guidance_scale != 1) for prompt in prompts):
        raise UserError(f"generate: {fit.name} writes only after a prefix: give one, without guidance_scale")


@torch.no_grad()
def generate(
    model: Model,
    objectives: dict[str, Any],
    read: dict[str, list[list[Tokens]]],
    request: Request,
    settings: Settings,
    progress: Progress | None = None,
) -> list[Generated]:
    """See `Model.generate`; read: what the tokenizers made of the inputs, by modality. Raises UserError."""
    target = find_target(model, request.to)
    fit = find_objective(model, objectives, target, list(read), request, settings)
    check(model, fit, target, request, settings)
    judge = find_judge(model, objectives, list(read), target) if request.rerank else None
    prompts = make_prompts(model, fit, target, read, request, settings)
    if fit.parallel and not settings.steps and request.fill is None:  # all prompts have the same holes then
        holes = max(sum(prompt.hidden or []) for prompt in prompts)
        settings = dataclasses.replace(settings, steps=min(STEPS, holes))
    fit.objective.to(model.device)
    results = write_prompts(model, fit, target, prompts, request.candidates, settings, progress)
    if judge is not None:
        rate(model, judge, read, [one for own in results for one in own], request.candidates)
        results = [sorted(own, key=lambda one: -(one.similarity or 0.0)) for own in results]
    return [dataclasses.replace(own[0], others=own[1:]) for own in results]


def write_prompts(
    model: Model,
    fit: Fit,
    target: str,
    prompts: list[Prompt],
    candidates: int,
    settings: Settings,
    progress: Progress | None = None,
) -> list[list[Generated]]:
    """The candidates for each prompt; about `MAX_TOKENS` tokens of them are written at a time."""
    training, lists = model.training, [[] for _ in prompts]
    model.eval()
    try:
        copies = 1 if settings.num_beams > 1 and not fit.parallel else candidates
        jobs = [(i, c) for i in range(len(prompts)) for c in range(copies)]
        width = (1 + (settings.guidance_scale != 1)) * settings.num_beams
        sizes = [width * _size(model, target, prompts[i]) for i, _ in jobs]
        run = _fill if fit.parallel else _beams if settings.num_beams > 1 else _write
        for rows in slices(sizes, MAX_TOKENS):
            tell = functools.partial(_tell, progress, rows, len(jobs))
            own = [prompts[i] for i, _ in jobs[rows]]
            made = run(model, fit, target, own, [c for _, c in jobs[rows]], settings, tell)
            for (i, _), generated in zip(jobs[rows], made, strict=True):
                lists[i] += generated[:candidates]
    finally:
        model.train(training)
    return lists


def _tell(progress: Progress | None, rows: slice, count: int, share: float) -> None:
    """How many per cent of all is done when a share of these rows is."""
    if progress is not None:
        progress(round(100 * (rows.start + share * (rows.stop - rows.start)) / count), 100)


def _size(model: Model, target: str, prompt: Prompt) -> int:
    return sum(map(len, prompt.prefix.values())) + max(get_generation(model, target).length, len(prompt.start))


def slices(sizes: list[int], limit: int) -> Iterator[slice]:
    """Successive slices whose sizes add up to at most `limit`, of at least one each."""
    start, size = 0, 0
    for number, own in enumerate(sizes):
        if size and size + own > limit:
            yield slice(start, number)
            start, size = number, 0
        size += own
    if sizes:
        yield slice(start, len(sizes))


def start_sequences(
    model: Model, fit: Fit, target: str, prompts: list[Prompt], candidates: list[int], settings: Settings, text: bool
) -> list[Sequence]:
    """text: whether the ids are decoded on the way."""
    _check_reading(fit, prompts, settings)
    arranged = {id(p): fit.objective.arrange_prefix(p.prefix, target, p.holes) for p in prompts}
    alone = fit.objective.arrange_prefix({}, target) if settings.guidance_scale != 1 else None
    decode = model.tokenizers[target].decode
    return [
        Sequence(
            arranged[id(prompt)],
            list(prompt.start),
            len(prompt.start),
            alone,
            generator=_generator(prompt, candidate, settings),
            text=TextStream(decode, settings.stop_strings) if text else None,
        )
        for prompt, candidate in zip(prompts, candidates, strict=True)
    ]


def _generator(prompt: Prompt, candidate: int, settings: Settings) -> torch.Generator:
    contents = [tokens.content for tokens in prompt.prefix.values()]
    return make_generator(settings.seed, *contents, str(prompt.start), candidate)


def _write(model, fit: Fit, target, prompts, candidates, settings: Settings, tell) -> list[list[Generated]]:
    sequences = start_sequences(model, fit, target, prompts, candidates, settings, bool(settings.stop_strings))
    _run_steps(write(model, fit.objective, target, sequences, settings), model, target, sequences, settings, tell)
    return [[_finish(model, target, sequence)] for sequence in sequences]


def _beams(model, fit: Fit, target, prompts, candidates, settings: Settings, tell) -> list[list[Generated]]:
    longest = get_generation(model, target).length - min(len(prompt.start) for prompt in prompts)
    if settings.max_new_tokens > longest:
        raise UserError(f"generate: beams write at most {longest} tokens here (max_new_tokens)")
    sequences = start_sequences(model, fit, target, prompts, candidates, settings, False)
    steps = beam_search(model, fit.objective, target, sequences, settings)
    done = _run_steps(steps, model, target, sequences, settings, tell) or []
    return [[_finish(model, target, s) for s in sorted(own, key=lambda s: -score(s, settings))] for own in done]


def _run_steps(steps: Iterator, model, target, sequences: list[Sequence], settings: Settings, tell) -> Any:
    """Go through the steps and say how far they are; the last thing that they yield."""
    most, result = settings.max_new_tokens or get_generation(model, target).length - sequences[0].given, None
    for number, result in enumerate(steps, 1):  # noqa: B007
        tell(min(number / max(most, 1), 1.0))
    tell(1.0)
    return result


def _finish(model: Model, target: str, sequence: Sequence) -> Generated:
    decode = model.tokenizers[target].decode
    text = sequence.text
    value = decode(sequence.ids) if text is None else decode(sequence.ids[: sequence.given]) + text.text
    return Generated(value, target, sequence.ids, sequence.log_likelihood, sequence.stopped)


def _fill(model, fit: Fit, target, prompts, candidates, settings: Settings, tell) -> list[list[Generated]]:
    generation, number, canvases = get_generation(model, target), model.modalities.index(target), []
    frozen = [*generation.first, *([] if generation.end is None else [generation.end])]
    for prompt, candidate in zip(prompts, candidates, strict=True):
        tokens = make_sequence(torch.tensor(prompt.start), generation.positions[: len(prompt.start)], number)
        generator = _generator(prompt, candidate, settings)
        canvases.append(Canvas(prompt.prefix, tokens, torch.tensor(prompt.hidden), frozen, generator=generator))
    for share in fill(model, fit.objective, target, canvases, settings):
        tell(share)
    decode = model.tokenizers[target].decode
    ids = [canvas.tokens.content.tolist() for canvas in canvases]
    return [
        [Generated(decode(own), target, own, canvas.log_likelihood, "filled")]
        for own, canvas in zip(ids, canvases, strict=True)
    ]


@torch.no_grad()
def stream(
    model: Model, objectives: dict[str, Any], read: dict[str, list[list[Tokens]]], request: Request, settings: Settings
) -> Iterator[str]:
    """See `Model.stream_text`. Raises UserError."""
    target = find_target(model, request.to)
    fit = find_objective(model, objectives, target, list(read), request, settings)
    check(model, fit, target, request, settings)
    prompts = make_prompts(model, fit, target, read, request, settings)
    if len(prompts) > 1 or request.candidates > 1:
        raise UserError("generate: one text is streamed: give one prompt, without candidates")
    if get_generation(model, target).end is None:
        raise UserError(f"generate: text is streamed, not {target}")
    if fit.parallel or settings.num_beams > 1:  # known at the end
        yield generate(model, objectives, read, request, settings)[0].value
        return
    fit.objective.to(model.device)
    training = model.training
    model.eval()
    try:
        (sequence,) = start_sequences(model, fit, target, prompts, [0], settings, True)
        text, sent = sequence.text, 0
        assert text is not None
        if given := model.tokenizers[target].decode(sequence.ids):
            yield given
        for _ in write(model, fit.objective, target, [sequence], settings):
            if len(text.text) > sent:
                yield text.text[sent:]
                sent = len(text.text)
    finally:
        model.train(training)


@dataclass(frozen=True)
class Judge:
    """What candidates are compared with the prompt by."""

    head: str
    modality: str  # as which a candidate is embedded
    given: list[str]  # the modalities of the prompt that are compared with it


def find_judge(model: Model, objectives: dict[str, Any], given: list[str], target: str) -> Judge:
    """A contrastive objective of the run over the prompt's modalities and the target's: as its own tokens, or for
    `image_codes` as the decoded `image`. Raises UserError."""
    for modality in dict.fromkeys((target.partition("_")[0], target)):
        for objective in objectives.values():
            if isinstance(objective, Contrastive) and modality in objective.modalities:
                known = [m for m in given if m in objective.modalities and m != modality]
                if known:
                    return Judge(objective.config.head, modality, known)
    raise UserError(f"generate: nothing to rerank by: this run has no contrastive objective over {target} and "
                    f"{' or '.join(given) or 'a prompt'}")  # fmt: skip


def rate(
    model: Model, judge: Judge, read: dict[str, list[list[Tokens]]], generated: list[Generated], candidates: int
) -> None:
    """Set the similarity of each result: the mean cosine of its vector with those of its prompt; -1 where there is
    nothing to embed. `candidates` neighbors are of one prompt."""
    sequences, rows = [], []
    for row, one in enumerate(generated):
        one.similarity = -1.0
        try:
            own = _sequences(model, judge.modality, one)
        except SampleError:
            continue
        if own:
            sequences.append(own)
            rows.append(row)
    if not rows:
        return
    vectors = model.embed_sequences(judge.modality, sequences, head=judge.head)[0].float()
    cosines = torch.zeros(len(rows))
    for modality in judge.given:
        prompt = model.embed_sequences(modality, read[modality], head=judge.head)[0].float()
        owner = torch.tensor([row // candidates for row in rows], device=prompt.device)
        cosines += (vectors * prompt.index_select(0, owner)).sum(1).cpu() / len(judge.given)
    for row, cosine in zip(rows, cosines.tolist(), strict=True):
        generated[row].similarity = cosine


def _sequences(model: Model, modality: str, one: Generated) -> list[Tokens]:
    if modality != one.modality or isinstance(one.value, str):
        return model.tokenizers[modality].read(one.value)
    positions = get_generation(model, modality).positions[: len(one.ids)]
    return [make_sequence(torch.tensor(one.ids), positions, model.modalities.index(modality))]


def save(value: Any, path: str | Path) -> None:
    """Write a text, a picture (PIL, an array (H, W, 3), a tensor (3, H, W)) or a sound (waveform, rate) to a file.

    Raises UserError where the file's ending does not suit it.
    """
    path = Path(path)
    try:
        if isinstance(value, str):
            path.write_text(value, encoding="utf-8")
        elif isinstance(value, tuple):
            import soundfile

            wave, rate = value
            wave = np.asarray(wave.cpu() if isinstance(wave, Tensor) else wave, np.float32)
            soundfile.write(str(path), wave.T if wave.ndim > 1 else wave, int(rate))
        else:
            picture(value).save(path)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


def picture(value: Any):
    """A PIL picture of what a tokenizer decoded: uint8, or floats in [0, 1]."""
    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    pixels = value.detach().cpu().movedim(0, -1).numpy() if isinstance(value, Tensor) else np.asarray(value)
    if pixels.dtype != np.uint8:
        pixels = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels)
