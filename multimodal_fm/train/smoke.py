"""Any run at toy size."""

from __future__ import annotations

import dataclasses
import tempfile

from .config import TrainConfig


def toy(config: TrainConfig) -> TrainConfig:
    """The same run at toy size, ten steps in seconds, to see it work before paying for it; in a temporary folder."""
    model = dataclasses.replace(
        config.model,
        tokenizers={modality: tokenizer.toy() for modality, tokenizer in config.model.tokenizers.items()},
        backbone=dataclasses.replace(config.model.backbone, width=64, depth=2, num_heads=2),
    )
    tasks = {name: dataclasses.replace(task, batch_size=min(task.batch_size, 8)) for name, task in config.tasks.items()}
    return dataclasses.replace(
        config,
        run_dir=tempfile.mkdtemp(prefix="multimodal_fm-smoke-"),
        steps=10,
        model=model,
        tasks=tasks,
        microbatches=min(config.microbatches, 2),
        save_every=10,
        validate_every=min(config.validate_every, 5),
        evaluate_every=0,
        best="",
        monitors={},  # their bounds are those of the whole run
        compile=False,
        num_workers=0,
        track=[],
        init="",
        optim=dataclasses.replace(config.optim, warmup_steps=2),
    )
