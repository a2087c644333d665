"""Recipes that make a corpus as webdataset shards: `python -m data.tuxpaint`, `python -m data.scenes`."""
