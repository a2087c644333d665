"""`mmfm pack`: from what a user has to shards that train, with a data card.

settings   what to pack and how
sources    folders, shards, tables and data sets: what there is, how many samples, one sample at random
tables     rows whose columns hold images, audio, text and labels
fetch      the files and URLs that a table names
samples    a sample as read from its source, its texts, and the pieces of a long text
codes      what a codec makes of pictures or sounds
validate   what cannot be read is left out; images and audio are converted where asked
dedup      copies, near copies and clusters of samples that share something
assign     over all samples: copies, splits, keys, and what each shard holds
state      the working files, through which a stopped pack is resumed
run        the stages in order
"""

from __future__ import annotations


def summary(facts: dict, to: str) -> str:
    """What was packed, in a few lines."""
    from ..reports.data_card import describe_columns

    total = facts["total"]
    splits = ", ".join(f"{name} {one['samples']:,}" for name, one in facts["splits"].items())
    held = [f"{name} {total['modalities'].get(name, {}).get('samples', 0):,}" for name in ("text", "image", "audio")]
    lines = [f"{to}: {splits} samples ({', '.join(held)}), {total['bytes'] / 1e6:,.1f} MB"]
    if facts["refused"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in facts["refused"].items())
        lines.append(f"left out: {reasons} (each in {to}/quarantine.jsonl)")
    return "\n".join([*lines, *describe_columns(facts), f"read {to}/card.md"])
