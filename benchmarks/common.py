"""What the stages share: fair timing, and the files they write."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable) -> float:
    """Wall time of one call, the device's work included."""
    return timed(call)[0]


def timed(call: Callable) -> tuple[float, float]:
    """Wall time of one call, the device's work included, and the CPU time that this process's threads had meanwhile."""
    synchronise()
    start, cpu = time.perf_counter(), time.process_time()
    call()
    synchronise()
    return time.perf_counter() - start, time.process_time() - cpu


def alternate(calls: dict[str, Callable], repeats: int, warm: int = 3) -> dict[str, dict]:
    """Seconds of each call: median, least and most of `repeats` turns, in which all take part one after the other.

    A call that fails (out of memory, say) leaves the comparison with its error.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    for turn in range(warm + repeats):
        for name, call in calls.items():
            if name in errors:
                continue
            try:
                took = seconds(call)
            except Exception as error:
                errors[name] = first_line(error)
                torch.cuda.empty_cache()
                continue
            if turn >= warm:
                times[name].append(took)
    return {name: {"error": errors[name]} if name in errors else summary(taken) for name, taken in times.items()}


def summary(taken: list[float]) -> dict:
    return {"median": statistics.median(taken), "least": min(taken), "most": max(taken), "n": len(taken)}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def save(out: Path, name: str, results: dict, tables: dict[str, list[list]]) -> None:
    """Write NAME.json and add the tables (title -> rows, the header first) to report.md; print them too."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1))
    text = "".join(f"### {title}\n\n{markdown(rows)}\n\n" for title, rows in tables.items())
    with open(out / "report.md", "a") as file:
        file.write(f"## {name}\n\n{text}")
    print(text, flush=True)


def markdown(rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def write_results(folder: Path, name: str, title: str, where: dict, rows: list[dict], text: str) -> None:
    """NAME.json and NAME.md: the rows, the text about them, and the machine, versions and commit of `about`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"about": where, "rows": rows}, indent=1) + "\n")
    lines = "".join(f"- {key}: {value}\n" for key, value in where.items())
    (folder / f"{name}.md").write_text(f"# {title}\n\n{text}\n\n{lines}")


def about(*packages: str) -> dict[str, str]:
    """The machine, the versions of torch, Python and these packages, and the commit, for a file of results."""
    from importlib.metadata import PackageNotFoundError, version

    from multimodal_fm.train.compute import cpu_name

    found = {"machine": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores", "python": platform.python_version()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["load"] = f"{os.getloadavg()[0]:.1f} at the end, as Linux counts it"
    found |= {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    git = ["git", "-C", str(RESULTS.parent.parent)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        changed = [*git, "diff", "--quiet", "HEAD", "--", ":!benchmarks/results"]
        found["commit"] = commit.stdout.strip() + "-dirty" * bool(subprocess.run(changed).returncode)
    return found
