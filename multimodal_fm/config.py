"""A run's configuration: YAML <-> the dataclasses that stand beside what they set.

A plug-in's name is the file of that name (`objective: masked` is `objectives/masked.py`), a dotted name an import path.
All that is wrong with a configuration comes in one message.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from . import backbone
from .corpus import shards
from .errors import UserError
from .tokenizers.base import Tokenizer
from .train import optim


@dataclass(frozen=True)
class Plugin:
    """A file of a plug-in folder with its settings."""

    name: str
    module: Any = field(compare=False, repr=False)
    settings: Any


@dataclass
class Task:
    """A share of every step: `batch_size` samples from weighted sources, arranged and scored by an objective.

    The objective's own settings stand beside these keys. `also` names further objectives that score the same reading.
    """

    objective: Plugin
    modalities: list[str]
    batch_size: int
    sources: dict[str, float | dict[str, float]] | list[str]
    """The weight of each source, or weights by the step from which they hold, {0: 2, 10000: 1}; a list: all weigh 1."""
    by: Literal["sample", "token"] = "sample"  # what the weights share out
    temperature: float | None = None  # weights times the source's size, in what `by` names, to this power
    weight: float = 1.0
    also: dict[str, Also] = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.sources, list):
            self.sources = dict.fromkeys(self.sources, 1.0)
        self.phases()

    def phases(self) -> list[tuple[int, dict[str, float]]]:
        """The weights and the step from which they hold, in order, the first at step 0. Raises ValueError."""
        tables = {n: w if isinstance(w, dict) else {"0": w} for n, w in self.sources.items()}
        if not all(step.isdigit() for table in tables.values() for step in table):
            raise ValueError("sources: weights by step are written {0: 2, 10000: 1}")
        steps = sorted({0, *(int(step) for table in tables.values() for step in table)})
        found = []
        for step in steps:
            past = {
                n: [w for s, w in sorted(table.items(), key=lambda o: int(o[0])) if int(s) <= step]
                for n, table in tables.items()
            }
            found.append((step, {n: float(weights[-1]) if weights else 0.0 for n, weights in past.items()}))
        return found


@dataclass
class Also:
    objective: Plugin
    weight: float = 1.0


@dataclass
class Evaluation:
    """What `mmfm evaluate` and the report measure; the command's flags of the same names."""

    on: str | list[str]
    where: dict[str, str] = field(default_factory=dict)
    group: str = ""
    within: str = ""
    labels: str = ""
    modalities: list[str] = field(default_factory=list)  # empty: all that the data has


@dataclass
class Config:
    """One run. `mmfm pretrain CONFIG.yaml [key=value ...]` reads it."""

    sources: dict[str, shards.Config]
    tasks: dict[str, Task]
    tokenizers: dict[str, Tokenizer] = field(default_factory=dict)  # empty: text, image and audio as they come
    model: backbone.Config = field(default_factory=backbone.Config)
    embedding: int = 256  # the dimension of the vectors that search compares
    optim: optim.Config = field(default_factory=optim.Config)
    run: str = ""  # the run folder; empty: runs/NAME for NAME.yaml
    steps: int = 1000
    microbatches: int = 1  # each step's samples are dealt into so many; memory falls, results stay
    seed: int = 0
    strict: bool = False  # the first thing that cannot be read ends the run, and is named
    max_bad: float = 0.05  # the share of a source's samples that may be bad before the run ends
    ema: float = 0.999  # the decay of the averaged weights, reached gradually
    workers: int = 1  # how many read ahead; results do not depend on it
    readers: Literal["processes", "threads"] = "processes"  # processes are faster and survive a crashing decoder
    trace: bool = False  # write the samples of every step to RUN/samples.jsonl
    threads: int = 0  # 0: as many as torch chooses
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    round_to: int = 1  # tokens of a microbatch are rounded up to a multiple with filler, where a GPU wants it
    save_every: int = 200
    keep: int = 2  # checkpoints
    evaluate: dict[str, Evaluation] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain words: `on`, `off`, `yes` and `no` are text, 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides (dots go deeper, values are YAML). Raises UserError."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"{path}: not YAML{line}: {str(getattr(error, 'problem', error)).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is a map of keys, not {type(data).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not key=value")
        try:
            _set(data, key.split("."), override, yaml.load(value, _Loader))
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"{override!r}: the value is not YAML") from None
    data.setdefault("run", f"runs/{path.stem}")
    return build(data, str(path))


def _set(data: dict, keys: list[str], override: str, value) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise UserError(f"{override!r}: {key} holds a value, not keys")
    data[keys[-1]] = value


def build(data: dict, where: str = "config") -> Config:
    """Dataclasses from plain data. Raises UserError with all that is wrong in one message."""
    problems = Problems()
    data = dict(data)
    if isinstance(data.get("tokenizers", {}), dict) and not data.get("tokenizers"):
        data["tokenizers"] = {"text": {}, "image": {}, "audio": {}}
    config = _build(Config, data, "", problems)
    if not len(problems):
        _cross_check(config, problems)
    if len(problems):
        raise UserError(f"{where}: " + problems.message())
    return config


class Problems:
    """Collects what is wrong, and the names that would have been right."""

    def __init__(self):
        self.found: list[str] = []
        self.unknown: list[str] = []
        self.known: list[str] = []

    def __len__(self) -> int:
        return len(self.found) + len(self.unknown)

    def add(self, path: str, what: str) -> None:
        self.found.append(f"{path} {what}")

    def message(self) -> str:
        lines = []
        for path in dict.fromkeys(self.unknown):
            near = difflib.get_close_matches(path, self.known, 1, 0.6)
            lines.append(f"unknown key {path}" + (f" (did you mean {near[0]}?)" if near else ""))
        return "; ".join([*lines, *dict.fromkeys(self.found)])


def _build(cls, data, path: str, problems: Problems):
    """An instance of dataclass `cls`, or None with problems added."""
    if not isinstance(data, dict):
        problems.add(path, f"holds keys, not {data!r}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values, before = {}, len(problems)
    for name, one in fields.items():
        here = f"{path}.{name}" if path else name
        problems.known.append(here)
        problems.known += [f"{here}.{leaf}" for leaf in _leaves(hints[name])]
        if name in data:
            values[name] = _value(hints[name], data[name], here, problems)
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            problems.add(here, "is missing")
    for name in data.keys() - fields.keys():
        here = f"{path}.{name}" if path else str(name)
        problems.unknown += sorted(f"{here}.{leaf}" for leaf in _names(data[name])) or [here]
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except (ValueError, TypeError, ArithmeticError) as error:
        problems.add(f"{path}:" if path else "config:", str(error))


def _leaves(hint) -> list[str]:
    if not dataclasses.is_dataclass(hint):
        return []
    return [f.name for f in dataclasses.fields(hint)]


def _names(data) -> list[str]:
    if not isinstance(data, dict):
        return []
    return [f"{k}.{leaf}" if leaf else str(k) for k, v in data.items() for leaf in (_names(v) or [""])]


def _value(hint, data, path: str, problems: Problems):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Plugin:
        return data
    if hint is Tokenizer:
        plugin = _plugin("tokenizers", "tokenizer", data, path, problems, default=path.rpartition(".")[2])
        return plugin and plugin.module.Tokenizer(plugin.settings)
    if hint is Task:
        return _task(data, path, problems)
    if hint is Also:
        return _also(data, path, problems)
    if dataclasses.is_dataclass(hint):
        return _build(hint, data, path, problems)
    if origin is dict:
        if not isinstance(data, dict):
            return problems.add(path, f"holds keys, not {data!r}")
        return {str(k): _value(args[1], v, f"{path}.{k}", problems) for k, v in data.items()}
    if origin is list:
        if not isinstance(data, list):
            return problems.add(path, f"is a list, not {data!r}")
        return [_value(args[0], v, f"{path}[{i}]", problems) for i, v in enumerate(data)]
    if origin is Literal:
        if data not in args:
            near = difflib.get_close_matches(str(data), [str(a) for a in args], 1, 0.5)
            hint_ = f" (did you mean {near[0]}?)" if near else ""
            return problems.add(path, f"is one of {', '.join(map(str, args))}, not {data!r}{hint_}")
        return data
    if origin in (typing.Union, types.UnionType):
        for option in args:
            trial = Problems()
            value = _value(option, data, path, trial)
            if not len(trial):
                return value
        return problems.add(path, f"is {' or '.join(_call(a) for a in args)}, not {data!r}")
    if hint is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if hint is str and isinstance(data, (int, float)) and not isinstance(data, bool):
        return str(data)
    if hint is not Any and (not isinstance(data, hint) or (hint is int and isinstance(data, bool))):
        return problems.add(path, f"is {_call(hint)}, not {data!r}")
    return data


def _call(hint) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint) or {list: "a list", dict: "a map"}.get(typing.get_origin(hint), str(hint))


def _task(data, path: str, problems: Problems):
    if not isinstance(data, dict):
        return problems.add(path, f"holds keys, not {data!r}")
    own = {f.name for f in dataclasses.fields(Task)} - {"objective"}
    settings = {k: v for k, v in data.items() if k not in own}
    if "objective" not in settings:
        return problems.add(f"{path}.objective", "is missing")
    problems.known += [f"{path}.{name}" for name in own]
    objective = _plugin("objectives", "objective", settings, path, problems)
    if objective is None:
        return None
    return _build(Task, {**{k: v for k, v in data.items() if k in own}, "objective": objective}, path, problems)


def _also(data, path: str, problems: Problems):
    data = {} if data is None else data
    if not isinstance(data, dict):
        return problems.add(path, f"holds keys, not {data!r}")
    settings = {k: v for k, v in data.items() if k != "weight"}
    problems.known.append(f"{path}.weight")
    objective = _plugin("objectives", "objective", settings, path, problems, default=path.rpartition(".")[2])
    own = {"weight": data["weight"]} if "weight" in data else {}
    return _build(Also, {**own, "objective": objective}, path, problems)


def _plugin(folder: str, key: str, data, path: str, problems: Problems, default: str = "") -> Plugin | None:
    """The plug-in that `data[key]` names, with the rest of `data` as its settings."""
    if isinstance(data, Plugin) or (data is None and not default):
        return data
    data = {} if data is None else data
    if not isinstance(data, dict):
        return problems.add(path, f"holds keys, not {data!r}")
    name = data.get(key, default)
    here = f"{path}.{key}"
    problems.known.append(here)
    try:
        module = plugin_module(folder, str(name))
    except UserError as error:
        return problems.add(here, str(error))
    if not hasattr(module, "Config"):
        return problems.add(here, f"is no plug-in, it has no Config: {name!r}")
    settings = _build(module.Config, {k: v for k, v in data.items() if k != key}, path, problems)
    return Plugin(str(name), module, settings)


def plugin_module(folder: str, name: str):
    """The module of a plug-in: a file of the folder, or whatever a dotted name imports. Raises UserError."""
    package = importlib.import_module(f"{__package__}.{folder}")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base")
    if "." not in name and name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.5)
        raise UserError(f"is none of {', '.join(names)}: {name!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    try:
        return importlib.import_module(name if "." in name else f"{package.__name__}.{name}")
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"cannot be imported: {error}") from None


def _cross_check(config: Config, problems: Problems) -> None:
    """Names that one part of the configuration uses and another defines."""
    for name, task in config.tasks.items():
        here = f"tasks.{name}"
        _known(task.modalities, config.tokenizers, f"{here}.modalities", "tokenizer", problems)
        _known(task.sources, config.sources, f"{here}.sources", "source", problems)
        if task.batch_size < 1:
            problems.add(f"{here}.batch_size", "is at least 1")
        if not task.modalities or not task.sources:
            problems.add(here, "needs at least one part and one source")
        for step, weights in task.phases():
            if not all(0 <= w < float("inf") for w in weights.values()) or sum(weights.values()) <= 0:
                when = f" (at step {step})" if step else ""
                problems.add(f"{here}.sources", f"are weights, none below 0 and not all 0{when}")
        for setting in ("share", "prefix"):
            modalities = getattr(task.objective.settings, setting, ())
            if isinstance(modalities, (dict, list)):
                _known(modalities, config.tokenizers, f"{here}.{setting}", "tokenizer", problems)
        for other, also in task.also.items():
            if not getattr(also.objective.module.Objective, "whole_step", False):
                problems.add(
                    f"{here}.also", f"names objectives that compare whole sequences, as contrastive does: {other!r}"
                )
            if getattr(task.objective.settings, "fuse", False):
                problems.add(f"{here}.also", "needs a sequence a part, and fuse makes one of them all")
    for name in (*config.tasks, *config.tokenizers):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or hasattr(nn.ModuleDict, name):
            problems.add(name or "''", "cannot be a name: letters, digits, - and _, and no word of Python's own")
    if not config.tasks:
        problems.add("tasks", "names at least one task")
    for name in ("steps", "microbatches", "round_to", "save_every", "keep", "embedding"):
        if getattr(config, name) < 1:
            problems.add(name, "is at least 1")
    for name, most in (("workers", 256), ("threads", 4096), ("ema", 1), ("seed", 2**62), ("max_bad", 1)):
        if not 0 <= getattr(config, name) <= most:
            problems.add(name, f"is from 0 to {most}")
    for name, evaluation in config.evaluate.items():
        _known(evaluation.modalities, config.tokenizers, f"evaluate.{name}.modalities", "tokenizer", problems)


def _known(used, defined, path: str, what: str, problems: Problems) -> None:
    for name in used:
        if name not in defined:
            near = difflib.get_close_matches(name, list(defined), 1, 0.5)
            hint = f" (did you mean {near[0]}?)" if near else f" (there are: {', '.join(defined)})"
            problems.add(path, f"names no {what}: {name!r}{hint}")


def to_data(config) -> Any:
    """Plain data that `build` turns into the same configuration."""
    if isinstance(config, (Task, Also)):
        own = {f.name: to_data(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name != "objective"}
        return {"objective": config.objective.name, **to_data(config.objective.settings), **own}
    if isinstance(config, Tokenizer):
        return {"tokenizer": config.name, **to_data(config.config)}
    if dataclasses.is_dataclass(config):
        return {f.name: to_data(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {k: to_data(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_data(v) for v in config]
    return config
