"""Adapting a checkpoint to a task: `tune` in Python, `mmfm tune` on the command line."""
