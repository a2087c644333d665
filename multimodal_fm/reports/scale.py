"""The page of a scaling law: what it says, what was measured, and how the two agree on runs that it has not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..corpus.storage import write_atomic
from . import page
from .page import LINES, format_number, plot


def write(folder: str | Path, result: dict) -> Path:
    """Write FOLDER/scale.html of what `train.scale.scale` returned."""
    path = Path(folder) / "scale.html"
    header = ["", "parameters", "loss", "predicted", "95 % interval", "inside", "part"]
    rows = [header, *(_row(run) for run in result["runs"])]
    values = {
        "name": Path(folder).name,
        "result": result,
        "law": sentence(result),
        "rows": rows,
        "figure": _figure(result),
    }
    write_atomic(path, page.template("scale.html").render(**values).encode())
    return path


def sentence(result: dict) -> str:
    law = {
        name: f"{_short(one['value'])} ({_short(one['low'])} to {_short(one['high'])})"
        for name, one in result["law"].items()
    }
    return f"L(N) = E + A / N^alpha with E {law['E']}, A {law['A']}, alpha {law['alpha']}"


def _short(value: float) -> str:
    return f"{value if abs(value) > 1e-6 else 0.0:.3g}"  # a loss that may as well end at nothing is fitted as 1e-15


def _row(run: dict) -> list[str]:
    predicted = run["predicted"]
    return [
        f"{run['size']}, seed {run['seed']}",
        f"{run['parameters']:,}",
        f"{run['loss']:.4f}",
        f"{predicted['value']:.4f}",
        f"{predicted['low']:.4f} – {predicted['high']:.4f}",
        "yes" if run["inside"] else "no",
        "held out" if run["held_out"] else "fitted",
    ]


def _figure(result: dict):
    N = np.array([point["parameters"] for point in result["curve"]])
    line, low, high = (np.array([point[name] for point in result["curve"]]) for name in ("value", "low", "high"))

    def paint(axes) -> None:
        axes.set_xscale("log")
        axes.plot(N, line, color=LINES[0], linewidth=1.4)
        axes.fill_between(N, low, high, color=LINES[0], alpha=0.15, linewidth=0)
        for held_out, marker, label in ((False, "o", "fitted"), (True, "s", "held out")):
            runs = [run for run in result["runs"] if run["held_out"] == held_out]
            points = [run["parameters"] for run in runs], [run["loss"] for run in runs]
            axes.plot(*points, marker, color=LINES[held_out], markersize=4, label=label)
        axes.set_xlabel("parameters of the backbone")
        axes.set_ylabel(result["figure"])
        axes.legend(frameon=False, fontsize=7)

    held = ", ".join(f"{r['size']} {format_number(r['loss'])}" for r in result["runs"] if r["held_out"]) or "none"
    return plot("law", f"{result['figure']} over parameters; {sentence(result)}; held out: {held}", paint, (6.4, 3.4))
