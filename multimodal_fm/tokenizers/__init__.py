"""One file a modality; its `Tokenizer` (see `base.py`) is all that is special about that modality."""

from __future__ import annotations

import functools
import importlib
import pkgutil


@functools.cache
def builtin() -> tuple:
    """A tokenizer with default settings of each file of this folder."""
    names = (module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    return tuple(importlib.import_module(f"{__name__}.{name}").Tokenizer() for name in names)
