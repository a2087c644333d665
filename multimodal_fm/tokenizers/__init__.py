"""One file a kind of input; a file defines all that is special about its modality.

`Config`; `extensions`, the member endings that it reads; `read(config, raw, generator=None) -> list[Tokens]`, where
`raw` maps the sample's endings to bytes (or holds what a user passed), with a `random.Random` the one random view that
training wants, without one the fixed sequences that cover all of it; `Embed(config, width)`, a module from content to
(N, width); `Predict(config, width)`, a module that scores vectors (M, width) against raw content (M, ...) and gives one
loss a token (M,).

Optional: `fit(config, raws, stem) -> Config` learns what is to be learned before the first step, and keeps it in one
file, `STEM` and an ending, which its `file` names; `check(config)`
raises UserError where what was learned is missing; `things(config, raw)` lists what evaluation takes one by one;
`measure(data, length) -> (int, int)` says how large a member is without decoding it, for the index (`data` is its first
megabytes); `count(config, length, a, b)`, given arrays (N,) of members' bytes and measures, says how many tokens a
training view of each has, at most: (N,); `describe(config, raw)` reads the whole part as strictly as a training run
would and says in plain data what it is, None where the sample has none; it raises SampleError.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil


@functools.cache
def modules() -> tuple:
    """The files of this folder."""
    names = (found.name for found in pkgutil.iter_modules(__path__) if found.name != "base")
    return tuple(importlib.import_module(f"{__name__}.{name}").Tokenizer() for name in names)
