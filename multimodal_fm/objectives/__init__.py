"""One file an objective: it arranges a sample, then scores the answer.

`Config`; `arrange(config, sample, generator) -> Example`, a pure function that runs in the loader; `Objective(config,
model)`, a module whose `loss(output, targets)` returns the loss, a scalar that adds up over the microbatches of a step,
and a report, numbers that add up likewise. An objective that compares sequences over the whole step (contrastive) says
`whole_step = True`, and defines `features(output, targets)` and `compare(features, table)` in place of `loss`.
"""
