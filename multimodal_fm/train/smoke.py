"""Any run at toy size."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from ..config import Config


def toy(config: Config) -> Config:
    """The same run at toy size: ten steps in seconds, to see it work before paying for it."""
    tokenizers = {modality: tokenizer.toy() for modality, tokenizer in config.tokenizers.items()}
    tasks = {n: dataclasses.replace(s, batch_size=min(s.batch_size, 8)) for n, s in config.tasks.items()}
    run = Path(f"{config.run}-smoke")
    shutil.rmtree(run, ignore_errors=True)
    return dataclasses.replace(
        config,
        run=str(run),
        steps=10,
        tokenizers=tokenizers,
        tasks=tasks,
        model=dataclasses.replace(config.model, width=64, depth=2, heads=2),
        microbatches=min(config.microbatches, 2),
        save_every=10,
        compile=False,
        workers=0,
        optim=dataclasses.replace(config.optim, warmup=2),
    )
