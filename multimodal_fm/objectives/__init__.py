"""One file an objective; `base.py` says what it offers. `load` reads those of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from .. import config
from ..config import Folder, Plugin
from ..errors import UserError

OBJECTIVES = Folder("objectives", "Objective")


@dataclass
class _Task:
    """What `load` needs to know of a task."""

    objectives: dict[str, Annotated[Plugin, OBJECTIVES]]
    modalities: list[str]
    batch_size: Any = None
    sources: Any = None
    weigh_by: Any = None
    temperature: Any = None
    weight: Any = None


@dataclass
class _Tasks:
    tasks: dict[str, _Task]


def build(objectives: dict[str, dict[str, Plugin]], modalities: dict[str, list[str]], model):
    """The modules of all tasks' objectives, named `task/objective`. Both maps are by task."""
    from torch import nn

    return nn.ModuleDict(
        {
            f"{task}/{name}": plugin.cls(plugin.config, model, modalities[task])
            for task, own in objectives.items()
            for name, plugin in own.items()
        }
    )


def load(run: str | Path, model, ema: bool = True, plugins: bool = False) -> dict:
    """The trained objectives of a run's newest whole checkpoint by name, as in `task/objective`, on the model's device.

    Raises UserError. See `multimodal_fm.model.load`.
    """
    from ..model import load_weights
    from ..run_dir import checkpoint

    folder = checkpoint.newest(run)
    data = {"tasks": checkpoint.read_data(folder, "config").get("tasks")}
    tasks = config.build(_Tasks, data, str(folder / "config.json"), plugins).tasks
    try:
        modules = build({n: t.objectives for n, t in tasks.items()}, {n: t.modalities for n, t in tasks.items()}, model)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder}: its objectives do not fit the model: {error}") from None
    load_weights(modules, checkpoint.read_tensors(folder, "ema_objectives" if ema else "objectives"), folder)
    return dict(modules.to(model.device).eval().items())
