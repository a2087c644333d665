"""The HTML page of a corpus: its counts, figures and a gallery."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from ..corpus.index import Index
from ..errors import REASONS, SampleError, UserError
from ..tokenizers import audio, image
from .samples import describe_part, read_members
from .stats import Stats, quantiles, spread
from .summary import describe_damage, describe_modality, losses, settings_name, totals

GALLERY = 24  # samples
MAX_IMAGE, MAX_AUDIO = 30_000, 60_000  # bytes that are put into the page as they are; longer media are reduced
FIGURES = {
    "text": ("length of a text", "bytes"),
    "resolution": ("resolution", "pixels a side, √(width × height)"),
    "aspect": ("aspect ratio", "width / height"),
    "duration": ("duration", "seconds"),
}


def write_page(path: str | Path, patterns: list[str], indexes: list[Index], tokenizers: dict, stats: Stats) -> None:
    """Raises UserError where the page cannot be written."""
    from ..reports import page

    data, histograms = stats.data, stats.histograms
    html = page.template("inspect.html").render(
        patterns=patterns,
        data=data,
        totals=totals(data),
        settings=settings_name(data),
        modalities={modality: describe_modality(counts) for modality, counts in data["modalities"].items()},
        losses=losses(data["modalities"]),
        damage=describe_damage(data["damage"]) if "damage" in data else "",
        figures=[_histogram(n, *FIGURES[n], *histograms[n]) for n in FIGURES if len(histograms.get(n, ((),))[0])],
        gallery=gallery(indexes, tokenizers),
        reasons=REASONS,
    )
    try:
        Path(path).write_bytes(html.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def gallery(indexes: list[Index], tokenizers: dict) -> list[dict]:
    """What the page shows of about `GALLERY` samples, evenly spaced, as many of each combination of modalities."""
    from ..reports.page import Media

    groups: dict[tuple, list] = {}
    for index in indexes:
        for number, extensions in enumerate(index.extension_sets):
            has = tuple(k for k, one in tokenizers.items() if not set(extensions).isdisjoint(one.extensions))
            groups.setdefault(has, []).append((index, np.flatnonzero(index.extension_set_ids == number)))
    media, shown, each = Media(MAX_IMAGE, MAX_AUDIO), [], max(GALLERY // max(len(groups), 1), 2)
    for index, sample in [chosen for samples in groups.values() for chosen in spread(samples, each)]:
        parts, lost = [], {}
        for modality, tokenizer in tokenizers.items():
            about, error = describe_part(index, sample, tokenizer)
            if error is not None:
                lost[modality] = error.reason
            if about is not None:
                parts.append({"modality": modality, "about": about, "uri": _uri(media, index, sample, tokenizer)})
        shard = os.path.basename(index.shard)
        shown.append({"key": index.key(sample), "shard": shard, "parts": parts, "lost": lost})
    return shown


def _uri(media, index: Index, sample: int, tokenizer) -> str:
    """A picture or a sound as a data URI; empty for other modalities, and where it cannot be made."""
    if not isinstance(tokenizer, (image.Tokenizer, audio.Tokenizer)):
        return ""
    modality = "image" if isinstance(tokenizer, image.Tokenizer) else "audio"
    try:
        return media.uri(modality, tokenizer.extensions, read_members(index, sample, tokenizer)[0])
    except (SampleError, OSError, RuntimeError, ValueError):  # no player would accept it either
        return ""


def _tick(value: float, _=None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _histogram(name: str, title: str, unit: str, values: np.ndarray, weights: np.ndarray) -> dict:
    """A title, the median, and an SVG on a logarithmic axis."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    from ..reports.page import LINES, STYLE, inline

    values = np.maximum(values, 1e-3)
    low, high = float(values.min()), float(values.max())
    median = values[quantiles(values, weights)["median"]]
    label = f"{title}: from {low:.3g} to {high:.3g} {unit}, median {median:.3g}"
    low, high = (low / 1.5, high * 1.5) if high < low * 1.5 else (low, high)
    bins = np.geomspace(low * 0.999, high * 1.001, 31)
    with matplotlib.rc_context(STYLE):
        figure = Figure((3.7, 2.1), layout="constrained")
        axes = figure.subplots()
        axes.hist(values, bins.tolist(), weights=weights, color=LINES[0])
        axes.set(xscale="log", xlim=(bins[0], bins[-1]), xlabel=unit, ylabel="samples")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,), numticks=8))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_tick))
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True)
    return {"title": title, "median": f"median {median:,.3g}", "svg": inline(svg.getvalue(), f"figure-{name}", label)}
