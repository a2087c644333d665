"""`mmfm inspect`: what a corpus holds, whether it is still what was indexed, and what a training run gets of it.

run      the command
verify   compares every byte of the shards with their indexes
samples  decodes every sample and reports on each
stats    counts a corpus from its indexes, decoding nothing
summary  those counts as lines of text
page     the same as an HTML page, with figures and a gallery
"""
