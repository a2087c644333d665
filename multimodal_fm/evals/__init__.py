"""One file a measurement: `Config` and `run(encoded, config, model) -> dict` of figures.

A figure is {"value", "low", "high", "chance", "n"}: the bootstrap's 95 % interval, what a guess would get (None where
there is no such thing), and the number of queries or samples. Figures are named `eval/what/measure`.
"""
