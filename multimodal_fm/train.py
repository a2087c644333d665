"""The loop. Pretraining and tuning are the same loop with other objectives."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch
from torch import nn

from . import checkpoint, optim
from .batch import Batch, table_of
from .config import Config, Plugin, to_data
from .errors import BadInput
from .mixture import Section, Step, Steps, mix, permute
from .model import Model, pick_device
from .monitor import Monitor, summary
from .shards import Corpus

MAY_CHANGE = ("run", "steps", "workers", "keep", "save_every", "evaluate", "device")  # between a run and its resume
PATIENCE = 10  # steps in a row without a finite gradient, after which a run gives up


def pretrain(config: Config, resume: bool = False) -> Path:
    """Train as `config` says and return the last checkpoint's folder.

    Same config, data, machine and number of threads: the same losses, bit for bit, interrupted or not. The first SIGINT
    or SIGTERM saves and raises SystemExit(130 or 143), a second leaves at once. Raises BadInput.
    """
    run = Path(config.run)
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = _start(run, resume)
    device = pick_device(config.device)
    corpora = {name: Corpus(source, name) for name, source in config.sources.items()}
    _steps(config, corpora)  # refuses sources that offer a section nothing, before anything is written
    if folder:
        config = _resumed(config, folder, corpora)
    else:
        run.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(config, tokenizers=_fit(config, corpora, run))
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
    start = 0
    if folder:
        model.load_state_dict(checkpoint.read_tensors(folder, "model"))
        ema.load_state_dict(checkpoint.read_tensors(folder, "ema"))
        checkpoint.restore_optimisers(optimisers, checkpoint.read_tensors(folder, "optimiser"))
        start = checkpoint.read_data(folder, "state")["step"]
    leaving = _Leaving()
    loader = iter(_loader(_steps(config, corpora), start, config))
    monitor = Monitor(run, start, config.steps)
    if not folder and not monitor.lost:  # else a start that never reached a checkpoint has said it
        monitor.quarantine([_refused_row(c.name, r) for c in corpora.values() for r in c.refused])
    for line in _headline(config, model, corpora, start, device):
        monitor.say(line)
    weights = _weights(config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for weight in parameters:
        weight.grad = torch.zeros_like(weight)  # what a step does not touch has a zero gradient, not none
    if config.compile:
        model.backbone.compile(dynamic=True)
    failed, done, saved = 0, start, folder

    def save() -> Path:
        published = _save(run, done, config, model, ema, optimisers, corpora)
        checkpoint.retain(run, config.keep)
        return published

    try:
        for step in range(start, config.steps):
            began = time.monotonic()
            if not leaving.signal:
                data: Step = next(loader)
            if leaving.signal:
                break
            monitor.quarantine(data.lost)
            if not data.batches:
                raise BadInput(f"{run}: not one item of step {step + 1} could be read; see {run}/quarantine.jsonl")
            rate = optim.factor(config.optim, step, config.steps)
            optim.set_rates(optimisers, rate)
            torch.manual_seed(mix(config.seed, step))
            for optimiser in optimisers:
                optimiser.zero_grad(set_to_none=False)
            batches = [batch.to(device) for batch in data.batches]
            report = forward_backward(model, weights, batches, config.precision)
            norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip or float("inf"))
            finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(report["loss"]))
            if finite:
                for optimiser in optimisers:
                    optimiser.step()
                share = 1 - min(config.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), share)
            failed = 0 if finite else failed + 1
            tokens = sum(len(batch.tokens) for batch in data.batches)
            seconds = time.monotonic() - began
            monitor.log(
                {
                    "step": step + 1,
                    **{name: float(value) for name, value in report.items()},
                    "tokens": tokens,
                    "norm": float(norm),
                    "lr": config.optim.lr * rate,
                    "skipped": int(not finite),
                    "seconds": seconds,
                    "tokens_per_second": tokens / seconds,
                }
            )
            if failed >= PATIENCE:
                raise BadInput(
                    f"{run}: {PATIENCE} steps in a row without a finite gradient (the last is {step + 1}); "
                    "lower optim.lr, or look into the data"
                )
            done = step + 1
            if done % config.save_every == 0:
                saved = save()
        if saved != checkpoint.folder_of(run, done):
            saved = save()
    finally:
        if hasattr(loader, "_shutdown_workers"):
            loader._shutdown_workers()  # they ignore signals, so that nobody else can end them
        monitor.close()
        leaving.restore()
    for line in (*summary(monitor.lost), f"checkpoint: {saved}"):
        monitor.say(line)
    if leaving.signal:
        monitor.say("interrupted: the same command with --resume goes on from there")
        raise SystemExit(128 + leaving.signal)
    return saved


def forward_backward(model: Model, weights: dict[str, float], batches: list[Batch], precision: str = "float32") -> dict:
    """One step's gradients, added up over its microbatches, and its losses by name.

    An objective that compares sequences over the whole step does so over all microbatches: with several, their features
    are made without gradients first, compared, and the features' gradients sent back through each microbatch in turn
    (gradient caching, Gao et al. 2021): the same gradients as in one batch, in a microbatch's memory.
    """
    device = batches[0].tokens.sequence.device.type
    cast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    whole = [name for name in weights if getattr(model.objectives[name], "whole_step", False)]
    report: dict = {"loss": 0.0}

    def add(name: str, loss, numbers: dict) -> None:
        report[f"loss/{name}"] = report.get(f"loss/{name}", 0.0) + loss.detach()
        report["loss"] = report["loss"] + weights[name] * loss.detach()
        for key, value in numbers.items():
            report[f"loss/{name}/{key}"] = report.get(f"loss/{name}/{key}", 0.0) + value

    returned: dict[str, list] = {}
    if len(batches) > 1 and whole:
        features: dict[str, list] = {name: [] for name in whole}
        with torch.no_grad(), cast:
            for batch in batches:
                output = model(batch)
                for name in whole:
                    if asked := batch.sections.get(name.split("+")[0]):
                        features[name].append((model.objectives[name].features(output, asked), asked))
        for name, pairs in features.items():
            if not pairs:
                continue
            leaf = torch.cat([f for f, _ in pairs]).requires_grad_()
            with cast:
                loss, numbers = model.objectives[name].compare(leaf, table_of([asked for _, asked in pairs]))
            (weights[name] * loss).backward()
            add(name, loss, numbers)
            returned[name] = list(leaf.grad.split([len(f) for f, _ in pairs]))
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


def _steps(config: Config, corpora: dict[str, Corpus]) -> Steps:
    return Steps(_sections(config, corpora), config.tokenizers, config.seed, config.microbatches, config.round_to)


def _sections(config: Config, corpora: dict[str, Corpus]) -> list[Section]:
    return [
        Section(
            name,
            section.take,
            section.parts,
            [corpora[source] for source in section.sources],
            list(section.sources.values()),
            _Arrange(section.objective),
        )
        for name, section in config.sections.items()
    ]


class _Arrange:
    """An objective's `arrange` with its settings."""

    def __init__(self, objective: Plugin):
        self.objective = objective

    def __call__(self, item, generator):
        return self.objective.module.arrange(self.objective.settings, item, generator)


def _loader(steps: Steps, start: int, config: Config):
    return torch.utils.data.DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, config.steps),
        num_workers=config.workers,
        prefetch_factor=2 if config.workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),  # a private one: the loader must not draw from the run's
        multiprocessing_context="fork" if config.workers else None,
    )


def _as_it_is(step: Step) -> Step:
    return step


def _quiet_worker(_: int) -> None:
    """Workers leave interrupts to the main process, which saves first, and the processor too, where it is short."""
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
    bounds = [len(corpus) for corpus in corpora]
    for place in range(sum(bounds)):
        index, which = permute(place, sum(bounds), seed), 0
        while index >= bounds[which]:
            index, which = index - bounds[which], which + 1
        yield corpora[which].raw(index, endings)


def _fingerprint(corpora: dict[str, Corpus]) -> str:
    """A hash of what the sources hold: shard names, keys and where the members lie."""
    digest = hashlib.sha256()
    for name, corpus in corpora.items():
        for entry in corpus.entries:
            digest.update(f"{name} {Path(entry.shard).name} {entry.key} {sorted(entry.members.items())}\n".encode())
    return digest.hexdigest()


def _resumed(config: Config, folder: Path, corpora: dict[str, Corpus]) -> Config:
    """The given config with the checkpoint's tokenizers. Raises BadInput where config or data have changed."""
    before, now = checkpoint.read_data(folder, "config"), to_data(config)
    changed = [k for k in now if k not in MAY_CHANGE and _unfitted(before.get(k)) != _unfitted(now[k])]
    if changed:
        raise BadInput(f"{folder}: the run was made with other {', '.join(changed)}; resume it with the same config")
    if checkpoint.read_data(folder, "state")["data"] != _fingerprint(corpora):
        raise BadInput(f"{folder}: the sources' shards have changed since; restore them, or start a new run")
    tokenizers = {}
    for kind, tokenizer in config.tokenizers.items():
        file = before["tokenizers"][kind].get("file")
        if file:
            kept = shutil.copyfile(folder / Path(file).name, Path(config.run) / Path(file).name)
            tokenizer = dataclasses.replace(tokenizer, settings=dataclasses.replace(tokenizer.settings, file=str(kept)))
        tokenizers[kind] = tokenizer
    return dataclasses.replace(config, tokenizers=tokenizers)


def _unfitted(data):
    """Settings without the files that fitting wrote, as JSON gives them back."""
    data = json.loads(json.dumps(data))
    if isinstance(data, dict):
        return {k: {n: v for n, v in s.items() if n != "file"} if isinstance(s, dict) else s for k, s in data.items()}
    return data


def _save(run, step, config, model, ema, optimisers, corpora) -> Path:
    files = [Path(t.settings.file) for t in config.tokenizers.values() if getattr(t.settings, "file", "")]
    return checkpoint.save(
        checkpoint.folder_of(run, step),
        {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimiser": checkpoint.optimiser_tensors(optimisers),
        },
        {"config": to_data(config), "state": {"step": step, "seed": config.seed, "data": _fingerprint(corpora)}},
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
