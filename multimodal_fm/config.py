"""Configuration: YAML <-> the dataclasses that stand beside what they set.

A plug-in is named by its file (`masked` is `objectives/masked.py`) or, from elsewhere, by its import path
(`my_package.my_objective`). All that is wrong with a configuration comes in one message.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
import pkgutil
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from .errors import UserError
from .tokenizers.base import Tokenizer

Override = str  # `key=value`; dots in the key go deeper, the value is YAML

SYNONYMS = {  # what other programs call a key, for the hints of error messages
    **dict.fromkeys(("learning_rate", "base_lr", "peak_lr"), "lr"),
    **dict.fromkeys(("batch", "bs", "batchsize", "per_device_train_batch_size", "global_batch_size"), "batch_size"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_epochs", "max_steps", "num_steps"), "steps"),
    **dict.fromkeys(("iterations", "max_iters", "train_steps"), "steps"),
    **dict.fromkeys(("hidden_size", "hidden_dim", "dim", "d_model", "n_embd"), "width"),
    **dict.fromkeys(("layers", "n_layers", "num_layers", "n_layer", "num_hidden_layers", "num_blocks"), "depth"),
    **dict.fromkeys(("heads", "n_heads", "n_head", "num_attention_heads", "nhead"), "num_heads"),
    **dict.fromkeys(("mlp", "mlp_expansion", "ffn_ratio"), "mlp_ratio"),
    **dict.fromkeys(("projection_dim", "embedding_dim", "embedding_size"), "embed_dim"),
    **dict.fromkeys(("workers", "n_workers", "num_proc", "dataloader_num_workers"), "num_workers"),
    **dict.fromkeys(("output_dir", "out_dir", "output", "out", "log_dir", "save_dir", "run"), "run_dir"),
    **dict.fromkeys(("patch_size",), "patch"),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), "max_positions"),
    **dict.fromkeys(("hidden_act", "act_layer", "activation_function"), "activation"),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon"), "norm_eps"),
    **dict.fromkeys(("vocab", "vocabulary", "vocabulary_size"), "vocab_size"),
    **dict.fromkeys(("max_length", "max_len", "seq_len", "context_length", "block_size"), "max_tokens"),
    **dict.fromkeys(("warmup", "num_warmup_steps", "warmup_iters"), "warmup_steps"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("clip", "clip_grad", "grad_norm", "max_grad_norm", "gradient_clip_val"), "grad_clip"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "schedule"),
    **dict.fromkeys(("accum_freq", "grad_accum", "gradient_accumulation_steps", "num_microbatches"), "microbatches"),
    **dict.fromkeys(("amp", "bf16", "dtype", "mixed_precision"), "precision"),
    **dict.fromkeys(("ema", "model_ema_decay"), "ema_decay"),
    **dict.fromkeys(("random_seed",), "seed"),
    **dict.fromkeys(("save_steps", "save_freq", "checkpoint_every", "save_interval"), "save_every"),
    **dict.fromkeys(("save_total_limit",), "keep"),
    **dict.fromkeys(("eval_steps", "eval_every", "val_every", "val_interval"), "validate_every"),
    **dict.fromkeys(("report_to", "logger", "log_with"), "track"),
    **dict.fromkeys(("data", "datasets", "train_data"), "sources"),
    **dict.fromkeys(("val", "val_data", "valid"), "validation"),
    **dict.fromkeys(("mask_prob", "mlm_probability", "masking_ratio"), "mask_ratio"),
    **dict.fromkeys(("logit_scale", "init_scale"), "scale"),
    **dict.fromkeys(("init_from", "pretrained", "checkpoint", "load_from"), "init"),
}


@dataclass(frozen=True)
class Folder:
    """Where the plug-ins of a field come from: `dict[str, Annotated[Plugin, Folder("heads", "Head")]]`."""

    name: str  # of the folder in this package
    cls: str  # the class that each of its files defines
    instantiate: bool = False  # whether the field holds `cls(config)` rather than a `Plugin`

    @property
    def key(self) -> str:
        """The key that names the plug-in where it is not the name of its entry."""
        return self.cls.lower()


@dataclass(frozen=True)
class Plugin:
    """A plug-in as a configuration names it: its class, and an instance of `cls.Config`."""

    folder: Folder
    name: str
    cls: Any
    config: Any


class _YAML(yaml.SafeLoader):
    """YAML 1.2's plain words: `on`, `off`, `yes` and `no` are text, 1e-3 is a number. A key may stand only once."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, str) and name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands twice", key.start_mark)
            seen.add(name if isinstance(name, str) else repr(name))
        return super().construct_mapping(node, deep)


_YAML.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YAML.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_YAML.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path, overrides: Sequence[Override] = ()) -> dict:
    """The plain data of a YAML file with the overrides applied. Raises UserError."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _YAML) or {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: not YAML{where}: {str(getattr(error, 'problem', error)).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is a map of keys, not {type(data).__name__}")
    return apply_overrides(data, overrides)


def apply_overrides(data: dict, overrides: Sequence[Override]) -> dict:
    """The plain data with the overrides set in it. Raises UserError."""
    for given in overrides:
        key, equals, value = given.partition("=")
        if not equals or not key:
            raise UserError(f"{given!r} is not key=value")
        try:
            _set(data, key.split("."), given, yaml.load(value, _YAML))
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"{given!r}: the value is not YAML") from None
    return data


def _set(data: dict, keys: list[str], override: Override, value) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise UserError(f"{override!r}: {key} holds a value, not keys")
    data[keys[-1]] = value


def build(cls: type, data: dict, where: str = "config", plugins: bool = True) -> Any:
    """An instance of the dataclass `cls` from plain data. Raises UserError with all that is wrong in one message.

    plugins: whether a dotted name may import a plug-in from outside this package. False for what a stranger wrote.
    A dataclass that has a method `problems()` yields (key, what is wrong) for what concerns several of its fields.
    """
    problems = Problems(plugins)
    config = _build(cls, dict(data), "", problems)
    if len(problems):
        raise UserError(f"{where}: " + problems.message())
    return config


class Problems:
    """Collects what is wrong, and the names that would have been right."""

    def __init__(self, plugins: bool = True):
        self.plugins = plugins
        self.messages: list[str] = []
        self.unknown: list[str] = []
        self.known: list[str] = []
        self.unset: list[tuple[str, Any]] = []  # keys that were left out, and the type of each

    def __len__(self) -> int:
        return len(self.messages) + len(self.unknown)

    def add(self, path: str, what: str) -> None:
        self.messages.append(f"{path} {what}".strip())

    def message(self) -> str:
        lines = []
        if self.unknown:
            known = [*self.known, *(key for path, hint in self.unset for key in _keys(path, hint))]
            for path in dict.fromkeys(self.unknown):
                near = nearest_keys(path, list(dict.fromkeys(known)))
                lines.append(f"unknown key {path}" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
        return "; ".join([*lines, *dict.fromkeys(self.messages)])


def nearest_keys(path: str, known: list[str]) -> list[str]:
    """The known keys that an unknown one may have meant: at most three, of equal merit; empty where none is near.

    Those of the name that it is a synonym of, and those of its own last name, each at the nearest place; else the
    nearest in spelling.
    """
    parts, last = path.split("."), path.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for key in known:
        by_last.setdefault(key.rpartition(".")[2], []).append(key)

    def nearest(name: str) -> list[str]:
        """The keys of this last name that share the most of the path's beginning, the shortest of them."""
        ranks = {}
        for key in by_last.get(name, []):
            shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(key.split("."), parts, strict=False))
            ranks[key] = (-len(list(shared)), key.count("."))
        return [key for key, rank in ranks.items() if rank == min(ranks.values())]

    meant = dict.fromkeys((SYNONYMS.get(last.lower().replace("-", "_"), last), last))
    if near := [key for name in meant for key in nearest(name)]:
        return near[:3]
    alike = difflib.get_close_matches(last, by_last, len(by_last), 0.6)
    spelled = difflib.get_close_matches(path, [key for name in alike for key in by_last[name]], 1, 0.6)
    return spelled or [key for name in alike[:1] for key in nearest(name)][:3]


def name_problem(used, defined, what: str) -> str:
    """What is wrong with the first of the names `used` that is not among the `defined`; empty where all are."""
    for name in used:
        if name not in defined:
            near = difflib.get_close_matches(name, list(defined), 1, 0.5)
            hint = f" (did you mean {near[0]}?)" if near else f" (there are: {', '.join(defined)})"
            return f"names no {what}: {name!r}{hint}"
    return ""


def _build(cls, data, path: str, problems: Problems) -> Any:
    """An instance of dataclass `cls`, or None with problems added."""
    if isinstance(data, cls):
        return data
    if not isinstance(data, dict):
        return problems.add(path, f"holds keys, not {data!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values, before = {}, len(problems)
    for name, field in fields.items():
        here = f"{path}.{name}" if path else name
        problems.known.append(here)
        if name in data:
            values[name] = _value(hints[name], data[name], here, problems)
            continue
        problems.unset.append((here, hints[name]))
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.add(here, "is missing")
    for name in (name for name in data if name not in fields):
        here = f"{path}.{name}" if path else str(name)
        problems.unknown += sorted(f"{here}.{leaf}" for leaf in _names(data[name])) or [here]
    if len(problems) > before:
        return None
    try:
        config = cls(**values)
    except (ValueError, TypeError, ArithmeticError) as error:
        return problems.add(f"{path}:" if path else "config:", str(error))
    if "problems" in vars(cls):
        for key, what in config.problems():
            problems.add(f"{path}.{key}" if path else key, what)
    return config if len(problems) == before else None


def _keys(path: str, hint) -> list[str]:
    """The keys below one that was left out: a dataclass's, and those of each built-in plug-in that may stand there."""
    if dataclasses.is_dataclass(hint):
        fields = typing.get_type_hints(hint, include_extras=True).items()
        return [key for name, of in fields for key in (f"{path}.{name}", *_keys(f"{path}.{name}", of))]
    args = typing.get_args(hint)
    if typing.get_origin(hint) is dict and typing.get_origin(args[1]) is Annotated:
        folder = typing.get_args(args[1])[1]
        names = plugin_names(folder.name)
        return [key for name in names for key in _keys(f"{path}.{name}", plugin_class(folder, name).Config)]
    return []


def _names(data) -> list[str]:
    if not isinstance(data, dict):
        return []
    return [f"{k}.{leaf}" if leaf else str(k) for k, v in data.items() for leaf in (_names(v) or [""])]


def _value(hint, data, path: str, problems: Problems):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, data, path, problems)
    if origin is dict:
        if not isinstance(data, dict):
            return problems.add(path, f"holds keys, not {data!r}")
        if typing.get_origin(args[1]) is Annotated:
            folder = typing.get_args(args[1])[1]
            return {str(k): _plugin(folder, str(k), v, f"{path}.{k}", problems) for k, v in data.items()}
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
            trial = Problems(problems.plugins)
            value = _value(option, data, path, trial)
            if not len(trial):
                return value
        return problems.add(path, f"is {' or '.join(_describe(a) for a in args)}, not {data!r}")
    if hint is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if hint is str and isinstance(data, (int, float)) and not isinstance(data, bool):
        return str(data)
    if hint is not Any and (not isinstance(data, hint) or (hint is int and isinstance(data, bool))):
        if hint is str and data is None:
            return problems.add(path, "is text, not null: '' is an empty one")
        return problems.add(path, f"is {_describe(hint)}, not {data!r}")
    return data


def _describe(hint) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint) or {list: "a list", dict: "a map"}.get(typing.get_origin(hint), str(hint))


def _plugin(folder: Folder, key: str, data, path: str, problems: Problems):
    """The plug-in that an entry of a map names: by its key or by `data[folder.key]`; the other data set it up."""
    data = {} if data is None else data
    if isinstance(data, (Plugin, Tokenizer)):
        return data
    if not isinstance(data, dict):
        return problems.add(path, f"holds keys, not {data!r}")
    if "." in key:
        return problems.add(path, f"cannot be a name: write {{NAME: {{{folder.key}: {key}}}}}")
    name = str(data.get(folder.key, key))
    here = f"{path}.{folder.key}"
    problems.known.append(here)
    try:
        cls = plugin_class(folder, name, problems.plugins)
    except UserError as error:
        return problems.add(here, str(error))
    settings = {key: value for key, value in data.items() if key != folder.key}
    config = _build(cls.Config, settings, path, problems)
    if config is None:
        return None
    return cls(config) if folder.instantiate else Plugin(folder, name, cls, config)


def plugin_names(folder: str) -> list[str]:
    """The files of a plug-in folder that define a plug-in."""
    package = importlib.import_module(f"{__package__}.{folder}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")


def plugin_class(folder: Folder, name: str, plugins: bool = True):
    """The class of a plug-in: of a file of the folder, or, where `plugins` allows it, of a module by its import path.

    Raises UserError.
    """
    names = plugin_names(folder.name)
    if "." not in name and name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.5)
        raise UserError(f"is none of {', '.join(names)}: {name!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    if "." in name and not plugins:
        raise UserError(
            f"names code from outside this package: {name!r}; read it, then allow it with plugins=True, or --trust"
        )
    try:
        module = importlib.import_module(name if "." in name else f"{__package__}.{folder.name}.{name}")
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"cannot be imported: {error}") from None
    cls = vars(module).get(folder.cls)
    if not isinstance(cls, type):
        raise UserError(f"is no plug-in, it defines no class {folder.cls}: {name!r}")
    return cls


def to_data(config) -> Any:
    """Plain data that `build` turns into the same configuration."""
    if isinstance(config, Plugin):
        return {config.folder.key: config.name, **to_data(config.config)}
    if isinstance(config, Tokenizer):
        return {"tokenizer": config.name, **to_data(config.config)}
    if dataclasses.is_dataclass(config):
        return {field.name: to_data(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_data(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_data(value) for value in config]
    return config
