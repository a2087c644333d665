"""What a person reads of a survey."""

from __future__ import annotations

import numpy as np

SAID = 5  # refused things that the lines name


def lines(data: dict) -> list[str]:
    """What `survey` found, and the damage if it was looked for, in a few lines."""
    modalities, label = data["modalities"], "{:10} ".format
    said = [f"{many(data['shards'], 'shard')}, {many(data['samples'], 'sample')}, {in_bytes(data['bytes'])}"]
    said += [label("holds" * (not n)) + f"{count:,} {has}" for n, (has, count) in enumerate(data["makeup"].items())]
    together = {has: count for has, count in data["together"].items() if data["makeup"].get(has) != count}
    if together:
        said.append(label("together") + ", ".join(f"{count:,} {has}" for has, count in together.items()))
    said += [label(modality) + "; ".join(facts(modality, found)) for modality, found in modalities.items()]
    if modalities:
        parts = ", ".join(f"{modality} {one['tokens']:,}" for modality, one in modalities.items() if "tokens" in one)
        said.append(label("tokens") + f"{data['tokens']:,} a pass under {settings_of(data)}: {parts}")
        said += [label("lost" * (not n)) + one for n, one in enumerate(losses(modalities))]
    refused = data["refused"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused["reasons"].items())
    said.append(label("refused") + (f"{refused['count']:,}: {reasons}" if refused["count"] else "nothing"))
    said += _first(refused)
    if "damage" in data:
        said.append(label("damage") + damage_found(data["damage"]))
        said += _first(data["damage"], 20)
    return said


def damage_found(damage: dict) -> str:
    new = f"; {many(damage['new_shards'], 'shard')} indexed only now, with nothing to compare with"
    found = many(damage["count"], "part") if damage["count"] else "none, every byte was read"
    return found + (new if damage["new_shards"] else "")


def _first(found: dict, most: int = SAID) -> list[str]:
    said = [f"  {said_of(row)}" for row in found["first"][:most]]
    more = found["count"] - len(said)
    return said + ([f"  and {more:,} more, see --json"] if more else [])


def said_of(row: dict) -> str:
    name = " ".join(filter(None, (row["shard"], row["key"], row["part"])))
    return f"{name}: {row['reason']} ({row['detail']})"


def settings_of(data: dict) -> str:
    return "the default settings" if data["config"] == "defaults" else data["config"]


def facts(modality: str, found: dict) -> list[str]:
    """What is said of one modality."""
    about = "" if found.get("exact", True) else "about "
    said = [f"{about}{many(found['samples'], 'sample')}"]
    if "texts" in found:
        said[0] += f", {many(found['texts'], 'text')}"
    said[0] += f", {in_bytes(found['bytes'])}"
    if found.get("length"):
        said.append(f"a text has {_range(found['length'], '{:,}'.format)} bytes")
    if found.get("resolution"):
        said[0] += f", {found['pixels'] / 1e6:,.1f} megapixels"
        said.append(_range(found["resolution"], "{0[0]} x {0[1]}".format) + " pixels")
    if "hours" in found:
        said[0] += f", {_clock(found['hours'] * 3600)}"
    if found.get("seconds"):
        said.append(_range(found["seconds"], "{:.3g}".format) + " s")
        rates = sorted(found["rates"].items(), key=lambda one: -one[1])
        said.append(", ".join(f"{int(rate):,} Hz {count:,}" for rate, count in rates[:4]) + ", …" * (len(rates) > 4))
    if found.get("unknown"):
        said.append(f"{found['unknown']:,} whose header cannot be read")
    return said


def _range(found: dict, show) -> str:
    """Least, median and most."""
    return " – ".join(dict.fromkeys(show(found[name]) for name in ("min", "median", "max")))


def losses(modalities: dict) -> list[str]:
    """What a training run leaves out of each modality, and how text was counted."""
    said = []
    for found in modalities.values():
        if "tokens_by" in found:
            by = f"counted as {found['tokens_by']}" if "/" in found["tokens_by"] else f"by {found['tokens_by']}"
            share = found["cropped_tokens"] / max(found["cropped_tokens"] + found["tokens"], 1)
            said.append(
                f"text beyond {found['max_tokens']} tokens: {found['cropped_tokens']:,} tokens ({_share(share)}) "
                f"of {many(found['cropped_samples'], 'sample')}; {by}"
            )
        if "cropped_seconds" in found:
            whole = max(found["hours"] * 3600, 1e-9)
            said.append(
                f"sound beyond {found['window']:g} s: {_clock(found['cropped_seconds'])} "
                f"({_share(found['cropped_seconds'] / whole)}) of {many(found['cropped_samples'], 'sample')}"
            )
        if "lost_pixels" in found:
            share = found["lost_pixels"] / max(found["pixels"], 1)
            said.append(
                f"pictures made smaller, to {found['max_tokens']} patches: {found['lost_pixels'] / 1e6:,.1f} megapixels "
                f"({_share(share)}) of {many(found['scaled_samples'], 'sample')}"
            )
    return said


def many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def in_bytes(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(np.log10(count) / 3), 4)
    return f"{count / 1000**power:,.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
