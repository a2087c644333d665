"""The page of a survey: its lines, figures and a gallery."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from ..corpus.index import Index
from ..corpus.shards import Config as Source
from ..errors import REASONS, SampleError, UserError
from ..tokenizers import audio, image
from .lines import damage_found, facts, in_bytes, losses, many, settings_of
from .samples import described
from .stats import Survey, evenly, quantiles

SHOW = 24  # samples in the gallery
PICTURE, SOUND = 30_000, 60_000  # bytes, of what is put into the page as it is


def write(path: str | Path, patterns: list[str], indexes: list[Index], tokenizers: dict, found: Survey) -> None:
    """Write the page. Raises UserError where it cannot be written."""
    from ..reports import page

    data = found.data
    text_ = page.template("inspect.html").render(
        patterns=patterns,
        data=data,
        said=[f"{many(data['shards'], 'shard')}", many(data["samples"], "sample"), in_bytes(data["bytes"])],
        settings=settings_of(data),
        facts={modality: facts(modality, one) for modality, one in data["modalities"].items()},
        losses=losses(data["modalities"]),
        damaged=damage_found(data["damage"]) if "damage" in data else "",
        figures=figures(found.spreads),
        gallery=gallery(indexes, tokenizers),
        reasons=REASONS,
    )
    try:
        Path(path).write_bytes(text_.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def gallery(indexes: list[Index], tokenizers: dict) -> list[dict]:
    """A couple of dozen samples, of each makeup as many, evenly spread: their parts, with what the page shows of them."""
    from ..reports.page import Media

    groups: dict[tuple, list] = {}
    for one in indexes:
        for which, endings in enumerate(one.makeups):
            has = tuple(k for k, plugin in tokenizers.items() if not set(endings).isdisjoint(plugin.extensions))
            groups.setdefault(has, []).append((one, np.flatnonzero(one.makeup == which)))
    media, shown = Media(PICTURE, SOUND), []
    for one, sample in [pick for held in groups.values() for pick in evenly(held, max(SHOW // len(groups), 2))]:
        parts, lost = [], {}
        for modality, plugin in tokenizers.items():
            found, reason = described(one, sample, plugin)
            if reason is not None:
                lost[modality] = reason.reason
            if found is not None:
                parts.append({"modality": modality, "found": found, "source": _source(media, one, sample, plugin)})
        shown.append({"key": one.key(sample), "shard": os.path.basename(one.shard), "modalities": parts, "lost": lost})
    return shown


def _source(media, one: Index, sample: int, plugin) -> str:
    """A picture or a sound as a data URI; empty for all else, and where it cannot be made."""
    if not isinstance(plugin, (image.Tokenizer, audio.Tokenizer)):
        return ""
    modality = "image" if isinstance(plugin, image.Tokenizer) else "audio"
    members, _ = one.read(sample, plugin.extensions, Source.bytes)
    try:
        return media.uri(modality, plugin.extensions, members)
    except (SampleError, OSError, RuntimeError, ValueError):  # what a player would not take either
        return ""


def figures(spreads: dict[str, tuple]) -> list[dict]:
    """A histogram of each spread that has anything in it: a title and an SVG."""
    titles = {
        "text": ("length of a text", "bytes"),
        "resolution": ("resolution", "pixels a side, √(width × height)"),
        "aspect": ("aspect ratio", "width / height"),
        "duration": ("duration", "seconds"),
    }
    return [
        _histogram(number, *titles[name], *spreads[name])
        for number, name in enumerate(titles)
        if name in spreads and len(spreads[name][0])
    ]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _histogram(number: int, title: str, label: str, values: np.ndarray, weights: np.ndarray) -> dict:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    from ..reports.page import LINES, STYLE, inline

    values = np.maximum(values, 1e-3)
    low, high = float(values.min()), float(values.max())
    low, high = (low / 1.5, high * 1.5) if high < low * 1.5 else (low, high)
    bins = np.geomspace(low * 0.999, high * 1.001, 31)
    with matplotlib.rc_context(STYLE):
        figure = Figure((3.7, 2.1), layout="constrained")
        axes = figure.subplots()
        axes.hist(values, bins, weights=weights, color=LINES[0])
        axes.set_xscale("log")
        axes.set_xlim(bins[0], bins[-1])
        axes.set_xlabel(label)
        axes.set_ylabel("samples")
        axes.spines[["top", "right"]].set_visible(False)
        subs = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    middle = values[quantiles(values, weights)["median"]]
    said = f"{title}: from {values.min():.3g} to {values.max():.3g} {label}, median {middle:.3g}"
    return {"title": title, "said": f"median {middle:,.3g}", "svg": inline(out.getvalue(), f"figure{number}", said)}
