"""Tux Paint's stamps: pictures with captions in 78 languages, spoken descriptions and sound effects."""
