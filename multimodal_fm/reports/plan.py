"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .page import format_number

NAMES = 30  # columns

Row = tuple[str, str, str]  # a name, a figure, a note
Section = tuple[str, list[Row]]


def render(plan: dict) -> str:
    """The plan that `train.plan.plan` made, as lines."""
    lines = []
    for title, rows in _sections(plan):
        lines += [title, *(f"  {name:<{NAMES}}{figure:>16}  {note}".rstrip() for name, figure, note in rows), ""]
    return "\n".join([*lines, *(f"note: {one}" for one in plan["assumptions"])])


def _sections(plan: dict) -> Iterator[Section]:
    device, energy = plan["device"], plan["energy"]
    count = f"{device['count']} x " if device["count"] > 1 else ""
    products = ("products", f"{format_number(device['tflops'])} TFLOP/s", device["from"])
    yield f"{plan['target']} on {count}{device['name']}", [products]
    yield "parameters", _parameters(plan["parameters"])
    yield "a step", _step(plan)
    yield "memory of a device, at most", _memory(plan["memory"])
    yield "time of a step, what goes on at the same time", _time(plan)
    kwh = "not known" if energy["kwh"] is None else f"{format_number(energy['kwh'])} kWh"
    disk = plan["disk"]
    yield (
        "energy and disk",
        [
            ("energy", kwh, energy["from"]),
            ("a checkpoint", _bytes(disk["checkpoint"]), ""),
            ("checkpoints, at most", _bytes(disk["most"]), f"{disk['kept']} kept, and the one being written"),
        ],
    )
    yield "corpus", _corpus(plan["corpus"])
    if plan["measured"]:
        yield f"measured in {plan['measured']['steps']:,} steps", _compare(plan, plan["measured"])


def _parameters(parameters: dict) -> list[Row]:
    total, learns = parameters["total"], parameters["trainable"]
    largest = sorted(parameters["by_part"].items(), key=lambda row: -row[1])
    rows = [(name, f"{size:,}", f"{size / total:.0%}") for name, size in largest if size >= total / 1000]
    return [*rows, ("all", f"{total:,}", "" if learns == total else f"{learns:,} of them learn")]


def _step(plan: dict) -> list[Row]:
    step, device = plan["step"], plan["device"]
    useful = step["flops"] / plan["time"]["step"] / device["count"] / (device["tflops"] * 1e12)
    dealt = f"in {step['microbatches']} microbatches" if step["microbatches"] > 1 else ""
    return [
        ("samples", f"{step['samples']:,}", dealt),
        ("tokens", f"{step['tokens']:,}", f"and {step['filler']:.1%} filler" if step["filler"] else ""),
        ("forward and backward", _flops(step["flops"]), f"{step['flops_a_token'] / 1e9:.3g} GFLOP a token"),
        ("update", _flops(step["update_flops"]), "of the optimizers' products"),
        ("share of the products' rate", f"{useful:.1%}", "by forward and backward, the wait for data counted"),
    ]


def _memory(memory: dict) -> list[Row]:
    mend = "more microbatches, activation_checkpointing: full, or parallel: {kind: fsdp}"
    fits = "it fits" if memory["fits"] else f"IT DOES NOT FIT: {mend}"
    halves = "; ".join(f"{name} {_bytes(size)}" for name, size in memory["halves"].items())
    return [
        *((name, _bytes(size), "") for name, size in memory["parts"].items()),
        ("all", _bytes(memory["total"]), f"of {_bytes(memory['room'])}: {fits}"),
        ("of which for a while", _bytes(max(memory["halves"].values())), halves),
    ]


def _time(plan: dict) -> list[Row]:
    time = plan["time"]
    slowest = time["bottleneck"]
    return [
        *((name, f"{s:.4g} s", "the bottleneck" * (name == slowest)) for name, s in time["parts"].items()),
        ("a step", f"{time['step']:.4g} s", f"{time['tokens_a_second']:,.0f} tokens a second"),
        (f"all {plan['steps']:,} steps", _duration(time["hours"]), "without validation, evaluation and saving"),
    ]


def _corpus(corpus: dict) -> list[Row]:
    rows = []
    for row in corpus["sources"]:
        note = f"tokens of {row['samples']:,} samples, read {format_number(row['passes'])} times"
        rows.append((row["source"], f"{row['tokens']:,}", note))
    return [
        *rows,
        ("all", f"{corpus['tokens']:,}", "tokens"),
        ("the run reads", f"{corpus['run_tokens']:,}", f"tokens: {format_number(corpus['passes'])} passes"),
        ("a model of this size wants", f"{corpus['wanted']:,}", corpus["hint"]),
    ]


def _compare(plan: dict, measured: dict) -> list[Row]:
    """Predicted beside measured."""
    step = plan["time"]["step"]
    rows = [
        _pair("tokens a step", plan["step"]["tokens"], measured["tokens"], lambda n: f"{n:,.0f}"),
        _pair("peak memory", plan["memory"]["total"], measured["memory"], _bytes),
        _pair("a step, the median", step, measured["step"], lambda s: f"{s:.4g} s"),
        _pair("a step, the fastest", step, measured["fastest"], lambda s: f"{s:.4g} s"),
        _pair("a checkpoint", plan["disk"]["checkpoint"], measured["checkpoint"], _bytes),
    ]
    return [*rows, ("waiting for data", f"{measured['data_wait']:.1%}", "of the time")]


def _pair(name: str, predicted: float, measured: float, form: Callable[[float], str]) -> Row:
    return name, form(measured), f"predicted {form(predicted)} ({predicted / measured - 1:+.1%})"


def _bytes(number: float) -> str:
    if number < 1e8:
        return f"{number / 1e6:.1f} MB"
    return f"{number / 1e9:.2f} GB"


def _flops(number: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if number >= size:
            return f"{format_number(number / size)} {unit}"
    return f"{format_number(number / 1e6)} MFLOP"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
