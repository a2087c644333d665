"""`mmfm pack`: from what a user has to shards that train, with a data card.

settings   what is asked for
samples      a sample as its source has it: members, JSON, texts, pieces
tables     rows whose columns hold pictures, sounds, text and labels
sources    whatever holds samples: what there is, how many, and each one's members as bytes
check      what cannot be read is left out; pictures and sounds are made smaller where that is asked for
copies     exact and near copies, and which samples share something
split      which samples go together to train, validation or test
card       card.md and croissant.json
state      what is on the disk while it works
settle     copies, splits, keys, shards: decided over all samples
pool       work in other processes; one that dies takes nothing with it
write      the whole, in stages that go on after a kill
"""

from __future__ import annotations


def summary(facts: dict, to: str) -> str:
    """What was packed, in a few lines."""
    splits = ", ".join(f"{name} {counts['samples']:,}" for name, counts in facts["splits"].items())
    lines = [f"{to}: {splits} samples, {facts['bytes'] / 1e6:,.1f} MB"]
    if facts["refused"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in facts["refused"].items())
        lines.append(f"left out: {reasons} (each in {to}/quarantine.jsonl)")
    return "\n".join([*lines, f"read {to}/card.md"])
