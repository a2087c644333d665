"""Losses and evaluations during a run, with the averaged weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..batch import with_counts
from ..corpus.shards import Corpus
from ..stream.tasks import build_stream, loss_weights
from .config import TrainConfig
from .learner import read_teacher, score, task_of_objective
from .train_step import TrainStep


class Validation:
    """Measures every task's loss on its sources' held-out shards: the same samples each time, without augmentation.

    Opening it raises UserError where there are none that a task can read.
    """

    def __init__(self, config: TrainConfig, train_step: TrainStep):
        self.train_step, self.num_steps = train_step, config.validation_steps
        self.weights = loss_weights(config.tasks)  # the configured ones, whatever monitors have made of them
        self.errors: list[dict] = []
        tokenizers = config.model.tokenizers
        held_out = {
            name: Corpus(
                dataclasses.replace(source, shards=source.validation, validation=""), name, tokenizers.values()
            )
            for name, source in config.sources.items()
            if source.validation
        }
        tasks = {}
        for name, task in config.tasks.items():
            weights = {source: task.phases()[-1][1][source] for source in task.sources if source in held_out}
            if total := sum(weights.values()):
                largest = [len(held_out[s]) * total / weight for s, weight in weights.items() if weight]
                batch_size = max(1, min(task.batch_size, int(min(largest))))  # no sample twice in a step
                tasks[name] = dataclasses.replace(task, sources=weights, batch_size=batch_size)
        self.stream = build_stream(tasks, held_out, tokenizers, config.seed, augment=False, heads=config.model.heads)

    @torch.no_grad()
    def __call__(self, averaged: nn.ModuleDict | None = None) -> dict[str, float]:
        """`validation/loss`, the weighted sum as in training, and each objective's `validation/loss/task/objective`.

        Each is a mean over the steps that had something of its task; `errors` names what could not be read. averaged:
        what `TrainStep.averaged` returned, where the train step is sharded.
        """
        step, losses = self.train_step, {}
        averaged = step.ema if averaged is None else averaged
        self.errors = []
        model: Any = averaged["model"]
        objectives: Any = averaged["objectives"]
        for number in range(self.num_steps):
            data = self.stream[number]
            self.errors += data.errors
            if not data.batches:  # none of the samples could be read
                continue
            batch = with_counts(data.batches[0], data.counts).to(step.device)
            output = model(batch)
            output.teacher = read_teacher(model, batch, objectives)
            for name in self.weights:
                if (targets := batch.tasks.get(task_of_objective(name))) is not None:
                    loss, _ = score(objectives[name], output, targets, model)
                    losses.setdefault(name, []).append(float(loss))
        means = {name: sum(own) / len(own) for name, own in losses.items()}
        if not means:
            return {}
        total = sum(self.weights[name] * mean for name, mean in means.items())
        return {"validation/loss": total, **{f"validation/loss/{name}": mean for name, mean in means.items()}}


def run_evaluations(config: TrainConfig, averaged: nn.ModuleDict) -> dict[str, float]:
    """The figures of the config's `evaluate`, named `evaluate/NAME/FIGURE`."""
    from ..evals.run import evaluate

    figures = {}
    model: Any = averaged["model"].eval()
    objectives: Any = averaged["objectives"]
    for name, evaluation in config.evaluate.items():
        measured, _ = evaluate(model, dict(objectives.items()), evaluation)
        figures |= {f"evaluate/{name}/{key}": figure["value"] for key, figure in measured.items()}
    return figures
