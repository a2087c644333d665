"""Two runs side by side: is the difference of their figures more than chance?

Where both runs kept what they said of each sample (`predictions-NAME.jsonl`), the samples are compared pair by pair: a
paired bootstrap and, for right and wrong answers, McNemar's exact test (McNemar 1947; Dietterich 1998). The figures of
`evaluations.json` are compared by name, from their two intervals alone (MOVER: Zou and Donner 2008), which finds less.
"""

from __future__ import annotations

import collections
import math
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..run_dir import checkpoint, evaluations, predictions
from .metrics import estimate_difference

LOWER_IS_BETTER = (
    "median_rank",
    "bits_per_byte",
    "bits_per_token",
    "aurc",
    "perplexity",
    "ece",
    "drop",
    "loss",
    "mae",
    "rmse",
    "mse",
    "wer",
    "cer",
)
DERIVED = ("robustness", "leakage", "subgroups")  # figures about other figures
DETAILS = ("r@1", "r@5", "median_rank", "mrr")  # of a direction of retrieval, beside r@10


def compare(run_a: str | Path, run_b: str | Path) -> dict:
    """Every test set and every figure that two runs share; B minus A throughout.

    {"a", "b": the runs, "paired": {NAME: comparison}, "figures": {NAME/FIGURE: comparison}, "notes"}. Each comparison
    has "a", "b", "difference", "low" and "high" (95 %) and "verdict": "a higher", "b higher" or "no difference". Paired
    ones have "p", "n" and "detectable" too, and "mcnemar": {"only_a", "only_b", "p"} where all scores are 0 or 1.
    Raises UserError where the runs share nothing, or disagree about a sample's label.
    """
    a, b = _run_folder(run_a), _run_folder(run_b)
    notes: list[str] = []
    said_a, said_b = predictions.read(a), predictions.read(b)
    paired = {}
    for name in [name for name in said_a if name in said_b]:
        paired[name] = _compare_samples(name, said_a[name], said_b[name], (a, b), notes)
    figures = _compare_figures(evaluations.read(a), evaluations.read(b), notes)
    if not paired and not figures:
        raise UserError(
            f"{a} and {b} have nothing in common to compare: {_holdings(a, said_a)}; {_holdings(b, said_b)}; "
            "evaluate both on the same shards (mmfm evaluate RUN --on SHARDS)"
        )
    count = len(paired) + len(figures)
    if count > 1:
        notes.append(f"{count} comparisons at 95 %: of differences that are none, about one in twenty shows as one")
    return {"a": str(a), "b": str(b), "paired": paired, "figures": figures, "notes": notes}


def _run_folder(run: str | Path) -> Path:
    """The run's folder, also where the folder of one of its checkpoints is given. Raises UserError."""
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    return folder.resolve().parent.parent if (folder / checkpoint.MANIFEST).exists() else folder


def _holdings(run: Path, said: dict) -> str:
    names = [*(f"predictions {name!r}" for name in said), *(f"evaluation {name!r}" for name in evaluations.read(run))]
    return f"{run} has {', '.join(names) or 'neither predictions nor evaluations'}"


def _by_key(rows: list[dict]) -> dict[tuple[str, int], dict]:
    """The rows by key and, as keys of several shards may be equal, by how often the key came before."""
    seen: collections.Counter[str] = collections.Counter()
    found = {}
    for row in rows:
        found[row["key"], seen[row["key"]]] = row
        seen[row["key"]] += 1
    return found


def _compare_samples(name: str, rows_a: list[dict], rows_b: list[dict], runs: tuple, notes: list[str]) -> dict:
    said_a, said_b = _by_key(rows_a), _by_key(rows_b)
    keys = [key for key in said_a if key in said_b]
    files = " and ".join(str(predictions.file_of(run, name)) for run in runs)
    if not keys:
        raise UserError(f"{files} have no sample in common; tune and test both runs on the same --test shards")
    for key in keys:
        labels = [said[key].get("label") for said in (said_a, said_b)]
        if labels[0] != labels[1]:
            said = f"{labels[0]!r} and {labels[1]!r}"
            raise UserError(f"{files}: the sample {key[0]} has two labels, {said}: these are not the same test set")
    left_out = len(said_a) + len(said_b) - 2 * len(keys)
    if left_out:
        notes.append(f"{name}: {left_out} samples that only one of the runs has are left out")
    scores = np.array([[said[key]["score"] for key in keys] for said in (said_a, said_b)])
    found = estimate_difference(*scores)
    result = {"a": float(scores[0].mean()), "b": float(scores[1].mean()), "difference": found.pop("value"), **found}
    if np.isin(scores, (0, 1)).all():
        result["mcnemar"] = test_mcnemar(*scores)
    return result | {"verdict": _verdict(result)}


def test_mcnemar(a: np.ndarray, b: np.ndarray) -> dict:
    """McNemar's exact test of two sets of right (1) and wrong (0) answers (Q,) to the same questions."""
    from scipy.stats import binomtest

    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": p}


def _compare_figures(entries_a: dict, entries_b: dict, notes: list[str]) -> dict[str, dict]:
    found = {}
    for name in [name for name in entries_a if name in entries_b]:
        one, other = entries_a[name], entries_b[name]
        shared = [figure for figure in one["figures"] if figure in other["figures"]]
        if shared and one.get("on") != other.get("on"):
            said = f"{_names(one.get('on'))} and {_names(other.get('on'))}"
            notes.append(f"{name}: measured on {said}: where these are other samples, the two do not compare")
        for figure in shared:
            a, b = one["figures"][figure], other["figures"][figure]
            result = difference_of_figures(a, b) | {"chance": b.get("chance")}
            if a.get("trained_on") or b.get("trained_on"):
                result["trained_on"] = True
            found[f"{name}/{figure}" if name else figure] = result
    return found


def difference_of_figures(a: dict, b: dict) -> dict:
    """b - a with the 95 % interval that their own intervals give, as if they came from different samples.

    MOVER (method of variance estimates recovery; Zou and Donner 2008), which keeps the intervals' asymmetry.
    """
    difference = b["value"] - a["value"]
    low = difference - math.hypot(b["value"] - b["low"], a["high"] - a["value"])
    high = difference + math.hypot(b["high"] - b["value"], a["value"] - a["low"])
    result = {"a": a["value"], "b": b["value"], "difference": difference, "low": low, "high": high}
    return result | {"verdict": _verdict(result)}


def _verdict(result: dict) -> str:
    if not (result["low"] > 0 or result["high"] < 0):  # a figure that is not a number differs from nothing
        return "no difference"
    return "b higher" if result["difference"] > 0 else "a higher"


def _names(on) -> str:
    return on if isinstance(on, str) else ", ".join(map(str, on or ["unnamed shards"]))


def render_comparison(result: dict) -> list[str]:
    """The comparison as lines for a person; JSON has the details of retrieval and of each corruption besides."""
    from .run import render

    lines = [f"A: {result['a']}", f"B: {result['b']}"]
    if result["paired"]:
        rows = [["the same samples, paired", "A", "B", "B - A", "95 % interval", "p", "n", ""]]
        for name, one in result["paired"].items():
            verdict = one["verdict"]
            if verdict == "no difference":
                verdict += f" (one of {one['detectable']:.3f} would show)"
            rows.append([name, *_cells(one), f"{one['p']:.4f}", str(one["n"]), verdict])
            if test := one.get("mcnemar"):
                said = f"only A right: {test['only_a']}, only B right: {test['only_b']}"
                rows.append(["  McNemar's exact test", "", "", "", "", f"{test['p']:.4f}", "", said])
        lines += ["", render(rows)]
    figures = {name: one for name, one in result["figures"].items() if _is_headline(name)}
    if figures:
        rows = [["figures of that name, unpaired", "A", "B", "B - A", "95 % interval", "chance", ""]]
        for name, one in figures.items():
            chance = "" if one["chance"] is None else f"{one['chance']:.3f}"
            rows.append([name, *_cells(one), chance, one["verdict"]])
        lines += ["", render(rows)]
    return lines + [f"note: {note}" for note in result["notes"]]


def _cells(one: dict) -> list[str]:
    values = [f"{one['a']:.3f}", f"{one['b']:.3f}", f"{one['difference']:+.3f}"]
    return [*values, f"{one['low']:+.3f} – {one['high']:+.3f}"]


def _is_headline(name: str) -> bool:
    parts = name.split("/")
    return parts[-1] not in DETAILS and (parts[-1] == "drop" or not set(parts) & {*DERIVED, "without_leaks"})


# ----------------------------------------------------------------------------------------------------------- forgetting


def measure_forgetting(base: str | Path, tuned: str | Path) -> dict:
    """What tuning made of the base's figures: {"base", "tuned", "rows", "modalities", "notes"}.

    A row is a figure that both runs' `evaluations.json` has: "name", "modalities" (one, or two in a direction of
    retrieval), "a" (base), "b" (tuned), "difference", "low", "high", "chance", "lost" and "verdict": "forgot", "gained"
    or "no difference". "lost" is the share of the base's distance from chance (from 0 where there is no chance) that is
    gone, negative where the tuned run is better; None where the base itself was not above chance. "modalities" has, by
    modality, how many figures there are, how many of them were forgotten and gained, and their mean "lost". Raises
    UserError where the two have no figure in common.
    """
    a, b = _run_folder(base), _run_folder(tuned)
    notes: list[str] = []
    found = _compare_figures(evaluations.read(a), evaluations.read(b), notes)
    measured = [name for name in found if _is_headline(name) and _sign(name) and not name.endswith("/drop")]
    rows = [_forgetting_row(name, found[name]) for name in measured]
    if not rows:
        raise UserError(
            f"{a} and {b} have no figure in common: {_holdings(a, {})}; {_holdings(b, {})}; "
            "run the same suite on both (mmfm evaluate RUN --suite quick)"
        )
    by_modality = {}
    for modality in dict.fromkeys(modality for row in rows for modality in row["modalities"]):
        own = [row for row in rows if modality in row["modalities"]]
        lost = [row["lost"] for row in own if row["lost"] is not None]
        by_modality[modality] = {
            "figures": len(own),
            "forgot": sum(row["verdict"] == "forgot" for row in own),
            "gained": sum(row["verdict"] == "gained" for row in own),
            "lost": float(np.mean(lost)) if lost else None,
        }
    notes.append("the intervals are those of unpaired figures, wider than they need be: both runs saw the same samples")
    return {"base": str(a), "tuned": str(b), "rows": rows, "modalities": by_modality, "notes": notes}


def _sign(name: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither is."""
    *of, measure = name.split("/")
    if measure == "perplexity" and "reconstruction" in of:  # of a codebook, not of a text
        return 1
    if any(measure == known or measure.endswith(f"_{known}") for known in LOWER_IS_BETTER):
        return -1
    return 0 if measure in ("alignment", "uniformity", "modality_gap", "effective_rank") else 1


def _modalities(name: str) -> list[str]:
    """The modalities of a figure, named `EVALUATION/WHAT/OF/MEASURE` or `EVALUATION/OF/MEASURE`."""
    of = name.split("/")[-2] if "/" in name else name
    return of.replace("+", "_to_").split("_to_")


def _forgetting_row(name: str, one: dict) -> dict:
    sign, chance = _sign(name), one["chance"]
    reach = sign * (one["a"] - chance) if chance is not None else abs(one["a"])
    lost = -sign * one["difference"] / reach if reach > 1e-9 else None
    verdict = one["verdict"]
    if verdict != "no difference":
        verdict = "gained" if sign * one["difference"] > 0 else "forgot"
    return {"name": name, "modalities": _modalities(name), **one, "lost": lost, "verdict": verdict}


def render_forgetting(result: dict) -> list[str]:
    """The matrix as lines for a person: a row a figure, then a row a modality."""
    from .run import render

    rows = [["", "base", "tuned", "tuned - base", "95 % interval", "chance", "lost", ""]]
    for row in sorted(result["rows"], key=lambda row: row["modalities"]):
        chance = "" if row["chance"] is None else f"{row['chance']:.3f}"
        rows.append([row["name"], *_cells(row), chance, _share(row["lost"]), row["verdict"]])
    summary = [["by modality", "figures", "forgot", "gained", "lost, on average"]]
    for modality, own in result["modalities"].items():
        summary.append([modality, *(str(own[n]) for n in ("figures", "forgot", "gained")), _share(own["lost"])])
    heads = [f"base:  {result['base']}", f"tuned: {result['tuned']}", ""]
    return [*heads, render(rows), "", render(summary), *(f"note: {note}" for note in result["notes"])]


def _share(lost: float | None) -> str:
    return "–" if lost is None else f"{lost:+.0%}"
