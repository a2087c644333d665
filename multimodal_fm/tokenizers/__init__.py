"""One file a kind of input; a file defines all that is special about its kind.

`Config`; `extensions`, the member endings that it reads; `read(config, raw, generator=None) -> list[Tokens]`, where
`raw` maps the item's endings to bytes (or holds what a user passed), with a generator the one random view that
training wants, without one the fixed sequences that cover all of it; `Embed(config, width)`, a module from content to
(N, width); `Predict(config, width)`, a module that scores vectors (M, width) against raw content (M, ...) and gives one
loss a token (M,).

Optional: `fit(config, raws, folder) -> Config` learns what is to be learned before the first step; `check(config)`
raises BadInput where what was learned is missing; `things(config, raw)` lists what evaluation takes one by one.
"""
