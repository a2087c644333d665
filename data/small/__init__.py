"""Shards of configs/small.yaml from copies of public sets of pictures, sounds and texts."""
