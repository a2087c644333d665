"""Any run at toy size."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from ..config import Config


def toy(config: Config) -> Config:
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
