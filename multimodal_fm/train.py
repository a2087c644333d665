"""The loop. Pretraining and tuning are the same loop with other objectives."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import checkpoint, distributed, optim
from .batch import Batch, table_of, with_counts
from .config import Config, Plugin, to_data
from .distributed import ALONE, Ranks
from .errors import BadInput
from .mixture import mix, permute
from .model import Model, pick_device
from .monitor import Monitor, Silent, summary
from .shards import Corpus, find
from .stream import Bad, Journal, Loader, Section, Step, Steps
from .tokens import FILLER

MAY_CHANGE = (  # between a run and its resume
    *("run", "steps", "workers", "readers", "keep", "save_every", "evaluate", "device", "trace", "strict", "max_bad"),
)
MIXTURE = ("sources", "by", "temperature")  # of a section: a change begins a new phase of its stream
PATIENCE = 10  # steps in a row without a finite gradient, after which a run gives up


def pretrain(config: Config, resume: bool = False, allow_data_change: bool = False) -> Path:
    """Train as `config` says and return the last checkpoint's folder.

    Same config, data, machine and number of threads: the same losses, bit for bit, interrupted or not. The first SIGINT
    or SIGTERM saves and raises SystemExit(130 or 143), a second leaves at once. Under `torchrun` each process takes
    some of every step's microbatches; the items and their order stay the same. Raises BadInput.
    """
    run = Path(config.run)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    ranks = distributed.join(device)
    try:
        return _pretrain(config, run, device, ranks, resume, allow_data_change)
    finally:
        distributed.leave()


def _pretrain(config: Config, run: Path, device, ranks: Ranks, resume: bool, allow_data_change: bool) -> Path:
    folder = ranks.share(lambda: _start(run, resume))
    corpora = ranks.in_turn(lambda: {name: Corpus(source, name) for name, source in config.sources.items()})
    for name, evaluation in config.evaluate.items():
        find(evaluation.on, f"evaluate.{name}")
    if config.strict:
        for name, corpus in corpora.items():
            for refused in corpus.refused[:1]:
                raise BadInput(_strict(_refused_row(name, refused)))
    _steps(config, corpora, tokenizers=False)  # before anything is written: a source may offer a section nothing
    start, origin = 0, Origin()
    if folder:
        config, origin = _resumed(config, folder, corpora, allow_data_change)
        start = checkpoint.read_data(folder, "state")["step"]
    else:
        run.mkdir(parents=True, exist_ok=True)
        fitted = ranks.in_turn(lambda: _fit(config, corpora, run))
        config = dataclasses.replace(config, tokenizers=fitted)
    for tokenizer in config.tokenizers.values():
        if hasattr(tokenizer.module, "check"):
            tokenizer.module.check(tokenizer.settings)
    torch.manual_seed(config.seed)
    try:
        model = Model(config).to(device)
        ema = Model(config).to(device).requires_grad_(False)
        optimisers = optim.build(config.optim, model)
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise BadInput(f"{run}: no model can be built of this config: {str(error).splitlines()[0]}") from None
    ema.load_state_dict(model.state_dict())
    if folder:
        model.load_state_dict(checkpoint.read_tensors(folder, "model"))
        ema.load_state_dict(checkpoint.read_tensors(folder, "ema"))
        checkpoint.restore_optimisers(optimisers, checkpoint.read_tensors(folder, "optimiser"))
    leaving = _Leaving()
    journal = Journal(run / f"reading-{ranks.rank}", config.workers)
    if config.readers == "threads":
        journal.watch()
    steps = _steps(config, corpora, ranks, origin, journal)
    loader = Loader(steps, start, config.steps, config.workers, config.readers)
    monitor = Monitor(run, start, config.steps) if ranks.first else Silent()
    if not folder and not monitor.lost:  # else a start that never reached a checkpoint has said it
        monitor.quarantine([_refused_row(c.name, r) for c in corpora.values() for r in c.refused])
    for line in (*_headline(config, model, corpora, start, device), *journal.told):
        monitor.say(line)
    weights = _weights(config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for weight in parameters:
        weight.grad = torch.zeros_like(weight)  # what a step does not touch has a zero gradient, not none
    if config.compile:
        model.backbone.compile(dynamic=True)
    failed, done, saved, bad = 0, start, folder, Bad(config.max_bad, corpora, monitor.lost)

    def save() -> Path:
        if ranks.first:
            _save(run, done, config, model, ema, optimisers, corpora, steps, origin)
            checkpoint.retain(run, config.keep)
        ranks.wait()
        return checkpoint.folder_of(run, done)

    def stop_if_bad() -> None:
        if line := ranks.share(lambda: bad.line(steps.drawn(done))):  # the first alone has read the ledger
            raise BadInput(f"{line} See {run}/quarantine.jsonl; checkpoint: {save() if done != start else saved}")

    try:
        stop_if_bad()
        stream = iter(loader)
        for step in range(start, config.steps):
            began = time.monotonic()
            data: Step | None = None if leaving.signal else next(stream)
            told = ranks.tell((leaving.signal, *((data.lost, data.counts, data.keys, _tokens(data)) if data else ())))
            if any(signal for signal, *_ in told):
                leaving.signal = max(signal for signal, *_ in told)
                break
            _, lost, counts, keys, tokens = zip(*told, strict=True)
            lost = [row for rows in lost for row in rows]
            monitor.quarantine(lost)
            if lost and config.strict:
                raise BadInput(_strict(lost[0]))
            if not sum(map(len, keys)):
                raise BadInput(f"{run}: not one item of step {step + 1} could be read; see {run}/quarantine.jsonl")
            rate = optim.factor(config.optim, step, config.steps)
            optim.set_rates(optimisers, rate)
            torch.manual_seed(mix(config.seed, step))
            for optimiser in optimisers:
                optimiser.zero_grad(set_to_none=False)
            batches = [with_counts(batch, _sum_counts(counts)).to(device) for batch in data.batches]
            report = forward_backward(model, weights, batches, config.precision, ranks)
            ranks.add([weight.grad for weight in parameters])
            report = _sum_reports(ranks.tell({name: float(value) for name, value in report.items()}))
            norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip or float("inf"))
            finite = bool(torch.isfinite(norm)) and math.isfinite(report["loss"])
            if finite:
                for optimiser in optimisers:
                    optimiser.step()
                share = 1 - min(config.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), share)
            failed = 0 if finite else failed + 1
            seconds = time.monotonic() - began
            every = [count for own in tokens for count in own]
            monitor.log(
                {
                    "step": step + 1,
                    **report,
                    "tokens": sum(read for read, _ in every),
                    "filler": sum(filler for _, filler in every),
                    "norm": float(norm),
                    "lr": config.optim.lr * rate,
                    "skipped": int(not finite),
                    "seconds": seconds,
                    "tokens_per_second": sum(read for read, _ in every) / seconds,
                }
            )
            if config.trace:
                monitor.trace({"step": step + 1, "items": _items(steps, keys)})
            if failed >= PATIENCE:
                raise BadInput(
                    f"{run}: {PATIENCE} steps in a row without a finite gradient (the last is {step + 1}); "
                    "lower optim.lr, or look into the data"
                )
            done = step + 1
            if lost:
                bad.add(lost)
                stop_if_bad()
            if done % config.save_every == 0:
                saved = save()
        if saved != checkpoint.folder_of(run, done):
            saved = save()
    finally:
        loader.close()
        journal.close()
        monitor.close()
        leaving.restore()
    for line in (*summary(monitor.lost), f"checkpoint: {saved}"):
        monitor.say(line)
    if leaving.signal:
        monitor.say("interrupted: the same command with --resume goes on from there")
        raise SystemExit(128 + leaving.signal)
    return saved


def _strict(row: dict) -> str:
    name = " ".join(filter(None, (row["shard"], row["key"], row["part"])))
    return f"strict: {row['source']}: {name}: {row['reason']} ({row['detail']}); mend it, or train without strict"


def _tokens(data: Step) -> list[tuple[int, int]]:
    """Tokens and filler of each microbatch."""
    fillers = [int((batch.tokens.sequence == FILLER).sum()) for batch in data.batches]
    return [(len(batch.tokens) - filler, filler) for batch, filler in zip(data.batches, fillers, strict=True)]


def _items(steps: Steps, keys) -> list[str]:
    """The step's items in the stream's order, whoever read them."""
    order = {section.name: number for number, section in enumerate(steps.sections)}
    rows = sorted((order[section], place, name) for own in keys for section, place, name in own)
    return [name for _, _, name in rows]


def _sum_counts(told) -> dict[str, dict[str, int]]:
    """Asked tokens by section and kind, over all ranks."""
    total: dict[str, dict[str, int]] = {}
    for counts in told:
        for name, own in counts.items():
            kinds = total.setdefault(name, {})
            for kind, count in own.items():
                kinds[kind] = kinds.get(kind, 0) + count
    return total


def _sum_reports(told: list[dict]) -> dict:
    total: dict[str, float] = {}
    for report in told:
        for name, value in report.items():
            total[name] = total.get(name, 0.0) + value
    return total


def forward_backward(
    model: Model,
    weights: dict[str, float],
    batches: list[Batch],
    precision: str = "float32",
    ranks: Ranks = ALONE,
) -> dict:
    """One step's gradients, added up over this rank's microbatches, and this rank's share of its losses by name.

    An objective that compares sequences over the whole step does so over all microbatches: with several, their features
    are made without gradients first, compared, and the features' gradients sent back through each microbatch in turn
    (gradient caching, Gao et al. 2021): the same gradients as in one batch, in a microbatch's memory.
    """
    device = next(model.parameters()).device.type
    cast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    whole = [name for name in weights if getattr(model.objectives[name], "whole_step", False)]
    report: dict = {"loss": 0.0}

    def add(name: str, loss, numbers: dict) -> None:
        report[f"loss/{name}"] = report.get(f"loss/{name}", 0.0) + loss.detach()
        report["loss"] = report["loss"] + weights[name] * loss.detach()
        for key, value in numbers.items():
            report[f"loss/{name}/{key}"] = report.get(f"loss/{name}/{key}", 0.0) + value

    returned: dict[str, list] = {}
    if whole and (len(batches) > 1 or ranks.size > 1):
        features: dict[str, list] = {name: [] for name in whole}
        with torch.no_grad(), cast:
            for batch in batches:
                output = model(batch)
                for name in whole:
                    if asked := batch.sections.get(name.split("+")[0]):
                        features[name].append((model.objectives[name].features(output, asked), asked))
        for name, pairs in features.items():
            own = [asked for _, asked in pairs]
            tables = ranks.tell([asked.table() for asked in own])
            tables = [table for rank in tables for table in rank]
            if not tables:
                continue
            width = max(ranks.tell(pairs[0][0].shape[1] if pairs else 0))
            here = torch.cat([f for f, _ in pairs]) if pairs else torch.zeros(0, width, device=device)
            every = ranks.gather(here)
            leaf = torch.cat(every).detach().requires_grad_()
            with cast:
                loss, numbers = model.objectives[name].compare(leaf, table_of(tables, device))
            loss = loss / ranks.size  # every rank compares all, and their gradients are added up
            (weights[name] * loss).backward()
            add(name, loss, {key: value / ranks.size for key, value in numbers.items()})
            gradients = leaf.grad.split([len(one) for one in every])[ranks.rank] * ranks.size
            returned[name] = list(gradients.split([len(f) for f, _ in pairs]))
    for batch in batches:
        with cast:
            output, total = model(batch), 0.0
            for name, weight in weights.items():
                objective, asked = model.objectives[name], batch.sections.get(name.split("+")[0])
                if asked is None:
                    continue
                if name in returned:
                    total = total + (objective.features(output, asked) * returned[name].pop(0)).sum()
                    continue
                if name in whole:
                    loss, numbers = objective.compare(objective.features(output, asked), asked)
                else:
                    loss, numbers = objective.loss(output, asked)
                add(name, loss, numbers)
                total = total + weight * loss
        total.backward()
    return report


def _weights(config: Config) -> dict[str, float]:
    """The weight of each objective, by the name it has in the model and the metrics."""
    weights = {}
    for name, section in config.sections.items():
        weights[name] = section.weight
        weights |= {f"{name}+{other}": also.weight for other, also in section.also.items()}
    return weights


@dataclass(frozen=True)
class Origin:
    """Where the stream's weights were last changed: at which step, and how much of each source was read by then."""

    step: int = 0
    drawn: dict[str, dict[str, int]] = field(default_factory=dict)


START = Origin()


def _steps(
    config: Config,
    corpora: dict[str, Corpus],
    ranks: Ranks = ALONE,
    origin: Origin = START,
    journal: Journal | None = None,
    tokenizers: bool = True,
) -> Steps:
    """The config's stream. tokenizers False: they are not there yet, and only the sources are looked at."""
    sections = _sections(config, corpora, origin)
    if not tokenizers:
        sections = [dataclasses.replace(section, by="item") for section in sections]
    return Steps(
        sections,
        config.tokenizers,
        config.seed,
        config.microbatches,
        config.round_to,
        ranks.rank,
        ranks.size,
        journal,
    )


def _sections(config: Config, corpora: dict[str, Corpus], origin: Origin = START) -> list[Section]:
    found = []
    for name, section in config.sections.items():
        phases = section.phases()
        now = [weights for step, weights in phases if step <= origin.step][-1]
        later = [(step, weights) for step, weights in phases if step > origin.step]
        found.append(
            Section(
                name,
                section.take,
                section.parts,
                [corpora[source] for source in section.sources],
                [(step, list(weights.values())) for step, weights in ((origin.step, now), *later)],
                _Arrange(section.objective),
                section.by,
                section.temperature,
                any(getattr(o.module.Objective, "whole_step", False) for o in _objectives(section)),
                [origin.drawn.get(name, {}).get(source, 0) for source in section.sources],
            )
        )
    return found


def _objectives(section) -> list[Plugin]:
    return [section.objective, *(also.objective for also in section.also.values())]


class _Arrange:
    """An objective's `arrange` with its settings."""

    def __init__(self, objective: Plugin):
        self.objective = objective

    def __call__(self, item, generator):
        return self.objective.module.arrange(self.objective.settings, item, generator)


class _Leaving:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self):
        self.signal = 0
        try:
            self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: nobody sends it signals
            self.before = {}

    def _note(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _start(run: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, None for a new run. Raises BadInput."""
    try:
        if resume and not (run.is_dir() and not checkpoint.steps(run)):
            whole = checkpoint.newest(run)
            for folder in checkpoint.steps(run):
                if folder > whole:  # damaged, and made again by the run that goes on
                    shutil.rmtree(folder)
            return whole
        if not resume and run.exists() and any(run.iterdir()):
            raise BadInput(f"{run} already holds a run: go on with --resume, or name another folder with run=FOLDER")
        return None  # a run that was stopped before its first checkpoint begins again
    except OSError as error:
        raise BadInput(f"run={str(run)[:80]}: {error.strerror}") from None


def _fit(config: Config, corpora: dict[str, Corpus], run: Path) -> dict[str, Plugin]:
    """Let the tokenizers that learn (BPE) learn from the training data of the sections that read them."""
    fitted = {}
    for kind, tokenizer in config.tokenizers.items():
        readers = [s for s in config.sections.values() if kind in s.parts]
        if hasattr(tokenizer.module, "fit") and not tokenizer.settings.file and readers:
            names = dict.fromkeys(name for section in readers for name in section.sources)
            raws = _shuffled([corpora[name] for name in names], config.seed, tokenizer.module.extensions)
            settings = tokenizer.module.fit(tokenizer.settings, raws, run)
            tokenizer = dataclasses.replace(tokenizer, settings=settings)
        fitted[kind] = tokenizer
    return fitted


def _shuffled(corpora: list[Corpus], seed: int, endings: tuple):
    """The wanted members of all items, in an order that mixes the corpora."""
    bounds = np.cumsum([0, *map(len, corpora)])
    for start in range(0, int(bounds[-1]), 4096):
        for place in permute(np.arange(start, min(start + 4096, bounds[-1])), int(bounds[-1]), seed):
            which = int(np.searchsorted(bounds, place, "right")) - 1
            yield corpora[which].raw(int(place - bounds[which]), endings)


def _resumed(config: Config, folder: Path, corpora: dict[str, Corpus], allow: bool) -> tuple[Config, Origin]:
    """The given config with the checkpoint's tokenizers, and since when its mixture holds.

    Raises BadInput where config or data have changed; the mixture may change: a new phase begins.
    """
    before, now = checkpoint.read_data(folder, "config"), to_data(config)
    state = checkpoint.read_data(folder, "state")
    old, new = json.loads(json.dumps([before, now]))
    changed = [
        k for k in new if k not in (*MAY_CHANGE, "sections", "sources") and _unfitted(old.get(k)) != _unfitted(new[k])
    ]
    mixtures = []
    for data in (old, new):
        mixtures.append({n: {k: s.pop(k, None) for k in MIXTURE} for n, s in data["sections"].items()})
    if old["sections"] != new["sections"]:
        changed.append("sections")
    if any(name in old["sources"] and old["sources"][name] != source for name, source in new["sources"].items()):
        changed.append("sources")
    if changed:
        raise BadInput(f"{folder}: the run was made with other {', '.join(changed)}; resume it with the same config")
    other = [name for name, corpus in corpora.items() if state["data"].get(name, "") not in ("", corpus.fingerprint())]
    if other and not allow:
        raise BadInput(
            f"{folder}: the shards of {', '.join(other)} have changed since; restore them, start a new run, "
            "or go on with --allow-data-change"
        )
    origin = Origin(**state["origin"])
    if mixtures[0] != mixtures[1] or other:
        origin = Origin(state["step"], state["drawn"])
        why = f"the shards of {', '.join(other)} have changed" if other else "the mixture has changed"
        print(f"from step {state['step']} on another phase: {why}", file=sys.stderr)
    tokenizers = {}
    for kind, tokenizer in config.tokenizers.items():
        file = before["tokenizers"][kind].get("file")
        if file:
            kept = Path(config.run) / Path(file).name
            own = shutil.copyfile(folder / kept.name, f"{kept}.{os.getpid()}")
            os.replace(own, kept)  # at once: another rank may be reading it
            tokenizer = dataclasses.replace(tokenizer, settings=dataclasses.replace(tokenizer.settings, file=str(kept)))
        tokenizers[kind] = tokenizer
    return dataclasses.replace(config, tokenizers=tokenizers), origin


def _unfitted(data):
    """Settings without the files that fitting wrote, as JSON gives them back."""
    data = json.loads(json.dumps(data))
    if isinstance(data, dict):
        return {k: {n: v for n, v in s.items() if n != "file"} if isinstance(s, dict) else s for k, s in data.items()}
    return data


def _save(run, step, config, model, ema, optimisers, corpora, steps, origin) -> Path:
    files = [Path(t.settings.file) for t in config.tokenizers.values() if getattr(t.settings, "file", "")]
    return checkpoint.save(
        checkpoint.folder_of(run, step),
        {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimiser": checkpoint.optimiser_tensors(optimisers),
        },
        {
            "config": to_data(config),
            "state": {
                "step": step,
                "seed": config.seed,
                "data": {name: corpus.fingerprint() for name, corpus in corpora.items()},
                "origin": dataclasses.asdict(origin),
                "drawn": steps.drawn_by_section(step),
            },
        },
        files,
    )


def _refused_row(source: str, refused) -> dict:
    return {"source": source, **dataclasses.asdict(refused), "step": None}


def _headline(config: Config, model: Model, corpora, start: int, device) -> list[str]:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    items = ", ".join(f"{name} {len(corpus):,}" for name, corpus in corpora.items())
    go_on = f", going on from step {start}" if start else ""
    return [
        f"{config.run}: {millions:.1f} M parameters on {device}, {config.steps} steps{go_on}",
        f"items: {items}",
    ]


def smoke(config: Config) -> Config:
    """The same run at toy size: ten steps in seconds, to see it work before paying for it."""
    shrink = {"limit": 32, "vocabulary": 512, "fit_bytes": 200_000}
    tokenizers = {}
    for kind, tokenizer in config.tokenizers.items():
        own = {n: min(v, getattr(tokenizer.settings, n)) for n, v in shrink.items() if hasattr(tokenizer.settings, n)}
        if getattr(tokenizer.settings, "file", ""):
            own.pop("vocabulary", None)
        tokenizers[kind] = dataclasses.replace(tokenizer, settings=dataclasses.replace(tokenizer.settings, **own))
    sections = {n: dataclasses.replace(s, take=min(s.take, 8)) for n, s in config.sections.items()}
    run = Path(f"{config.run}-smoke")
    shutil.rmtree(run, ignore_errors=True)
    return dataclasses.replace(
        config,
        run=str(run),
        steps=10,
        tokenizers=tokenizers,
        sections=sections,
        model=dataclasses.replace(config.model, width=64, depth=2, heads=2),
        microbatches=min(config.microbatches, 2),
        save_every=10,
        compile=False,
        workers=0,
        optim=dataclasses.replace(config.optim, warmup=2),
    )
