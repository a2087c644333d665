"""The counts of a corpus as lines of text."""

from __future__ import annotations

import numpy as np

ROWS_SHOWN = 5  # of what was refused
DAMAGE_SHOWN = 20


def summarize(data: dict) -> list[str]:
    """The data of `Stats`, with the damage where it was looked for, in a few lines."""
    modalities, heading = data["modalities"], "{:10} ".format
    lines = [", ".join(totals(data))]
    for number, (has, count) in enumerate(data["combinations"].items()):
        lines.append(heading("" if number else "holds") + f"{count:,} {has}")
    together = {has: count for has, count in data["together"].items() if data["combinations"].get(has) != count}
    if together:
        lines.append(heading("together") + ", ".join(f"{count:,} {has}" for has, count in together.items()))
    lines += [heading(modality) + "; ".join(describe_modality(counts)) for modality, counts in modalities.items()]
    if modalities:
        parts = ", ".join(f"{name} {counts['tokens']:,}" for name, counts in modalities.items() if "tokens" in counts)
        lines.append(heading("tokens") + f"{data['tokens']:,} an epoch under {settings_name(data)}: {parts}")
        for number, line in enumerate(losses(modalities)):
            lines.append(heading("" if number else "lost") + line)
    refused = data["refused"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused["reasons"].items())
    lines.append(heading("refused") + (f"{refused['count']:,}: {reasons}" if refused["count"] else "nothing"))
    lines += _first_rows(refused, ROWS_SHOWN)
    if "damage" in data:
        lines.append(heading("damage") + describe_damage(data["damage"]))
        lines += _first_rows(data["damage"], DAMAGE_SHOWN)
    return lines


def totals(data: dict) -> list[str]:
    return [plural(data["shards"], "shard"), plural(data["samples"], "sample"), format_bytes(data["bytes"])]


def describe_damage(damage: dict) -> str:
    new = f"; {plural(damage['new_shards'], 'shard')} indexed only now, with nothing to compare with"
    found = plural(damage["count"], "part") if damage["count"] else "none, every byte was read"
    return found + (new if damage["new_shards"] else "")


def _first_rows(rows: dict, most: int) -> list[str]:
    lines = [f"  {format_row(row)}" for row in rows["first"][:most]]
    more = rows["count"] - len(lines)
    return lines + ([f"  and {more:,} more, see --json"] if more else [])


def format_row(row: dict) -> str:
    name = " ".join(filter(None, (row["shard"], row["key"], row["part"])))
    return f"{name}: {row['reason']} ({row['detail']})"


def settings_name(data: dict) -> str:
    return "the default settings" if data["config"] == "defaults" else data["config"]


def describe_modality(counts: dict) -> list[str]:
    """The phrases that describe one modality; the first says how much there is."""
    amounts = [("" if counts.get("exact", True) else "about ") + plural(counts["samples"], "sample")]
    if "texts" in counts:
        amounts.append(plural(counts["texts"], "text"))
    amounts.append(format_bytes(counts["bytes"]))
    phrases = []
    if counts.get("length"):
        phrases.append("texts of " + _range(counts["length"], "{:,}", "bytes"))
    if counts.get("resolution"):
        amounts.append(f"{counts['pixels'] / 1e6:,.1f} megapixels")
        phrases.append(_range(counts["resolution"], "{0[0]} x {0[1]}", "pixels"))
    if "hours" in counts:
        amounts.append(format_seconds(counts["hours"] * 3600))
    if counts.get("seconds"):
        phrases.append(_range(counts["seconds"], "{:.3g}", "s"))
        rates = sorted(counts["rates"].items(), key=lambda item: -item[1])
        phrases.append(
            ", ".join(f"{int(rate):,} Hz ({count:,})" for rate, count in rates[:4]) + ", …" * (len(rates) > 4)
        )
    if counts.get("unknown"):
        phrases.append(f"{counts['unknown']:,} with a header that cannot be read")
    return [", ".join(amounts), *phrases]


def _range(quantiles: dict, form: str, unit: str) -> str:
    least, median, most = (form.format(quantiles[name]) for name in ("min", "median", "max"))
    return f"{least} {unit}" if least == most else f"{least} to {most} {unit} (median {median})"


def losses(modalities: dict) -> list[str]:
    """What a training run leaves out of each modality, and how the tokens of text were counted."""
    lines = []
    for counts in modalities.values():
        if "tokens_by" in counts:
            by = f"counted as {counts['tokens_by']}" if "/" in counts["tokens_by"] else f"by {counts['tokens_by']}"
            share = _percent(counts["cropped_tokens"], counts["cropped_tokens"] + counts["tokens"])
            lines.append(
                f"text beyond {counts['max_tokens']} tokens: {counts['cropped_tokens']:,} tokens ({share}) "
                f"of {plural(counts['cropped_samples'], 'sample')}; {by}"
            )
        if "cropped_seconds" in counts:
            share = _percent(counts["cropped_seconds"], counts["hours"] * 3600)
            lines.append(
                f"sound beyond {counts['window']:g} s: {format_seconds(counts['cropped_seconds'])} ({share}) "
                f"of {plural(counts['cropped_samples'], 'sample')}"
            )
        if "lost_pixels" in counts:
            share = _percent(counts["lost_pixels"], counts["pixels"])
            lines.append(
                f"pictures beyond {counts['max_tokens']} patches: {counts['lost_pixels'] / 1e6:,.1f} megapixels "
                f"({share}) of {plural(counts['scaled_samples'], 'sample')}"
            )
    return lines


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / max(whole, 1e-9):.1f} %"


def format_bytes(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(np.log10(count) / 3), 4)
    return f"{count / 1000**power:,.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def format_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
