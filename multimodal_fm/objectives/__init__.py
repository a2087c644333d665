"""One file an objective: it arranges an item, then scores the answer.

`Config`; `arrange(config, item, generator) -> Arranged`, a pure function that runs in the loader; `Objective(config,
model)`, a module whose `loss(output, asked)` returns the loss, a scalar that adds up over the microbatches of a step,
and a report, numbers that add up likewise. An objective that compares sequences over the whole step (contrastive) says
`whole_step = True`, and defines `features(output, asked)` and `compare(features, table)` in place of `loss`.
"""
