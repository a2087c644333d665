"""How tokens are chosen: one by one with a cache, by beams, or all at once. `generate.py` is what a user calls."""
