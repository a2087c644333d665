"""The model card: RUN/README.md in Hugging Face's format, and RUN/card.json, which says where its numbers come from.

Every number of a table is read from a file of the run at a field, through `look_up`, and card.json holds for each place
of the page (`SECTION | ROW | COLUMN`) its value, the file (relative to the run's folder) and the field. What is not
known is "not measured: reason" or "not declared: where". (Mitchell et al. 2019, Model Cards for Model Reporting;
https://huggingface.co/docs/hub/model-cards.)
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import shlex
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import config as configuration
from ..corpus.storage import is_remote, write_atomic
from ..errors import UserError, printable
from ..run_dir import checkpoint, evaluations, trust
from ..run_dir.records import read_jsonl
from .page import format_number

GROUPS = ("subgroups", "robustness", "leakage")  # first words of figures that have a section of their own
CLEAN = "/without_leaks"  # ends the name of a figure that was measured again without near copies of training data
SETTINGS = ("vocab_size", "sample_rate", "n_mels", "hop_length", "patch", "patch_frames", "patch_mels", "max_tokens")
TRAINING = (
    *("steps", "seed", "microbatches", "optim.lr", "optim.muon_lr", "optim.weight_decay", "optim.warmup_steps"),
    *("optim.decay_fraction", "ema_decay"),
)
COMPUTE = ("steps", "tokens", "wall_seconds", "measured_seconds", "energy_kwh", "co2e_kg", "carbon_intensity_g_per_kwh")
LICENSE_FILES = ("card.json", "croissant.json")
NO_EVALUATION = "the run has no evaluation (evaluations.json is missing): `mmfm evaluate RUN` measures it"


@dataclass
class Config:
    """What the model card says that a run cannot know, and what its release needs: `mmfm card RUN --check`."""

    license: str = ""  # of the weights, as Hugging Face names it: apache-2.0, cc-by-4.0, gpl-2.0, other
    data_licenses: dict[str, str] = field(default_factory=dict)  # by source, where no data card beside its shards says
    language: list[str] = field(default_factory=list)  # of the texts, as in en, de
    authors: str = ""  # who made the model, and how to reach them
    uses: str = ""  # what the model is for, in a sentence or two
    out_of_scope: str = ""  # what it must not be used for
    require: dict[str, float] = field(default_factory=dict)
    """The least value of figures, as in `{stamps/retrieval/text_to_image/r@10: 0.3}`."""
    at_most: dict[str, float] = field(default_factory=dict)  # the largest value of figures where less is better


def look_up(file: Path, path: Sequence) -> Any:
    """What a file of a run says at a field of card.json. Raises KeyError, OSError or ValueError where it says nothing.

    .json: the keys and list positions from the outermost on. .jsonl: `["rows", N, key, ...]`; `["sum", key, step]` over
    the rows up to a step; `["distinct", reason]` for the number of different parts left out, for a reason or (empty)
    all. .safetensors: `["elements"]`, the number of numbers in it.
    """
    if file.suffix == ".safetensors":
        files = [file] if file.exists() else sorted(file.parent.glob(f"{file.stem}-*.safetensors"))  # a large one
        return sum(map(_count_elements, files))
    if file.suffix == ".jsonl":
        what, *path = path
        if what == "sum":
            return sum(row[path[0]] for row in read_jsonl(file) if path[0] in row and row["step"] <= path[1])
        if what == "distinct":
            return _left_out(file)[path[0]] if path[0] else _left_out(file).total()
        value = list(read_jsonl(file))
    else:
        value = json.loads(file.read_text(encoding="utf-8"))
    for key in path:
        value = value[key]
    return value


def _bases(base: dict, of: str = "") -> list[str]:
    """A line for each base that base.json names, nearest first; of: the part of the model that it is a base of."""
    lines = []
    while base:
        for part, own in base.get("parts", {}).items():
            lines += _bases(own, f" of {escape(part)}")
        if "manifest_sha256" in base:
            place = f"`{escape(base['init'])}`, `{escape(base['checkpoint'])}`"
            lines.append(f"Base{of}: {place}, manifest SHA-256 `{escape(base['manifest_sha256'])}` (base.json).")
        base = base.get("base", {})
    return lines


def _left_out(file: Path) -> Counter[str]:
    """How many different parts were left out, by reason."""
    names = ("source", "shard", "key", "part", "reason")
    return Counter(row[-1] for row in {tuple(one[name] for name in names) for one in read_jsonl(file)})


def _count_elements(file: Path) -> int:
    with open(file, "rb") as opened:
        header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")


class Table:
    """Rows of one section. `row` reads each number where it comes from and notes its place."""

    def __init__(self, card: Card, section: str, columns: Sequence[str]):
        self.card, self.section, self.columns, self.rows = card, section, columns, []

    def row(self, label: str, cells: Mapping[str, tuple | str], source: str = "") -> None:
        """cells: by column a text, or (file, field) with an optional function that formats the value."""
        label = escape(label)
        shown = [label]
        for column in self.columns:
            cell = cells.get(column, "")
            if isinstance(cell, tuple):
                file, path, *form = cell
                value = look_up(self.card.run / file, path)
                source = source or f"{Path(file).name}: {'.'.join(map(str, path))}"
                cell = (form[0] if form else count)(value)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    place = f"{self.section} | {label} | {column}"
                    self.card.places[place] = {"value": value, "text": cell, "file": str(file), "field": list(path)}
            shown.append(escape(cell))
        self.rows.append([*shown, f"`{escape(source)}`" if source else ""])

    def __str__(self) -> str:
        heads = ["", *self.columns, "from"]
        lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])

    def __bool__(self) -> bool:
        return bool(self.rows)


def escape(text: str) -> str:
    """Text that stays within its cell and is shown, not obeyed."""
    text = printable(" ".join(str(text).split()))
    for character in "|<>":
        text = text.replace(character, {"|": "\\|", "<": "&lt;", ">": "&gt;"}[character])
    return text


def count(value: Any) -> str:
    """Whole numbers with commas, others as short as they are exact; texts and switches as they are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def rate(value: float | None) -> str:
    """A figure of an evaluation."""
    return "has none" if value is None else f"{value:.3f}" if math.isfinite(value) else "not a number"


def amount(value: Any) -> str:
    """A measured quantity; a text where it was not measured."""
    return value if isinstance(value, str) else format_number(value)


class Card:
    """The card of a run's newest whole checkpoint. Raises UserError where there is none."""

    def __init__(self, run: str | Path, overrides: Sequence[str] = (), trusted: bool = False):
        self.run = Path(run)
        self.folder = checkpoint.newest(run)
        if self.folder == self.run:
            raise UserError(f"{run}: is one checkpoint; a card is made of the run's folder, which holds its records")
        self.checkpoint = self.folder.relative_to(self.run)
        self.config = checkpoint.read_data(self.folder, "config")
        self.model = checkpoint.read_data(self.folder, "model")
        self.state = checkpoint.read_data(self.folder, "state")
        said = configuration.apply_overrides(dict(self.config.get("card") or {}), overrides)
        self.settings: Config = configuration.build(Config, said, "card")
        self.trusted = trusted or trust.is_own(self.folder, checkpoint.MANIFEST)
        self.places: dict[str, dict] = {}
        self.evaluations = evaluations.read(self.run)
        self.compute = self._json("compute.json")
        self.licenses = {name: self._license(name, source) for name, source in self.config["sources"].items()}

    def _json(self, name: str) -> dict:
        with contextlib.suppress(OSError, ValueError):
            data = json.loads((self.run / name).read_text(encoding="utf-8"))
            return data if isinstance(data, dict) else {}
        return {}

    @property
    def name(self) -> str:
        return self.run.resolve().name

    @property
    def step(self) -> int:
        return self.state["step"]

    # ------------------------------------------------------------------------------------------------------------ data

    def _license(self, name: str, source: dict) -> tuple[str, str]:
        """The license of a source's data and where that is said; "" and where it was looked for, without one."""
        if declared := self.settings.data_licenses.get(name):
            return declared, f"config: card.data_licenses.{name}"
        if not self.trusted:
            return "", "not looked for, since the run was not trained here by you (--trust)"
        looked = []
        patterns = [source["shards"]] if isinstance(source["shards"], str) else source["shards"]
        for pattern in patterns:
            if is_remote(pattern):
                looked.append("no data card is looked for on servers")
                continue
            shard = Path(next(iter(sorted(glob.glob(pattern))), pattern))
            for file in (folder / name for folder in (shard.parent, shard.parent.parent) for name in LICENSE_FILES):
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    card = json.loads(file.read_text(encoding="utf-8"))
                    names = [*card.get("shards", []), *(one["name"] for one in card.get("distribution", []))]
                    if str(shard.relative_to(file.parent)) not in names:
                        continue
                    if license := card.get("license"):
                        return (license if isinstance(license, str) else ", ".join(license)), f"{file}: license"
                    looked.append(f"{file} has no license")
        return "", "; ".join(dict.fromkeys(looked)) or "there is no data card beside its shards"

    def data(self) -> tuple[Table, Table]:
        """What each source is, and how many of its samples each task read."""
        sources = Table(self, "Training data", ["license", "shards", "fingerprint"])
        for name, source in self.config["sources"].items():
            license, where = self.licenses[name]
            shards = source["shards"] if isinstance(source["shards"], str) else ", ".join(source["shards"])
            mark = self.state["data"].get(name, "")[:12] or "not recorded: the source was added later"
            cells = {"license": license or f"not declared: {where}", "shards": shards, "fingerprint": mark}
            sources.row(name, cells, where if license else f"config.json: sources.{name}")
        read = Table(self, "Samples read", list(self.config["tasks"]))
        file, drawn = self.checkpoint / "state.json", self.state["drawn"]
        for name in self.config["sources"]:
            cells = {t: (file, ["drawn", t, name]) for t in self.config["tasks"] if name in drawn.get(t, {})}
            if cells:
                read.row(name, cells, f"state.json: drawn.TASK.{name}")
        return sources, read

    # ----------------------------------------------------------------------------------------------- model, training

    def details(self) -> Table:
        table = Table(self, "Model details", ["value"])
        table.row("parameters", {"value": (self.checkpoint / "model.safetensors", ["elements"])})
        file = self.checkpoint / "model.json"
        for name in self.model["backbone"]:
            table.row(f"backbone: {name}", {"value": (file, ["backbone", name])})
        if self.model.get("lora", {}).get("rank"):
            table.row("lora: rank", {"value": (file, ["lora", "rank"])})
        for name, head in self.model["heads"].items():
            for key in head:
                if key != "head":
                    table.row(f"head {name}: {key}", {"value": (file, ["heads", name, key])})
        for modality, settings in self.model["tokenizers"].items():
            for key in (key for key in SETTINGS if key in settings):
                table.row(f"{modality} tokenizer: {key}", {"value": (file, ["tokenizers", modality, key])})
        return table

    def procedure(self) -> tuple[Table, Table, Table]:
        """The tasks, the settings of training, and what was changed on --resume."""
        tasks = Table(self, "Tasks", ["objectives", "modalities", "batch size", "weight"])
        file = self.checkpoint / "config.json"
        for name, task in self.config["tasks"].items():
            cells = {"objectives": ", ".join(task["objectives"]), "modalities": ", ".join(task["modalities"])}
            numbers = {"batch size": (file, ["tasks", name, "batch_size"]), "weight": (file, ["tasks", name, "weight"])}
            tasks.row(name, cells | numbers, f"config.json: tasks.{name}")
        settings = Table(self, "Settings", ["value"])
        settings.row("steps done", {"value": (self.checkpoint / "state.json", ["step"])})
        for key in (*TRAINING, "optim.name", "optim.schedule", "precision"):
            path = key.split(".")
            with contextlib.suppress(KeyError):
                settings.row(key, {"value": (file, path)})
        changes = Table(self, "Changes on resume", ["from step", "was", "is"])
        for number, row in enumerate(read_jsonl(self.run / "changes.jsonl")):
            cells = {name: ("changes.jsonl", ["rows", number, key]) for name, key in
                     (("from step", "step"), ("was", "before"), ("is", "after"))}  # fmt: skip
            changes.row(f"{number + 1}: {row['key']}", cells, f"changes.jsonl: rows.{number}")
        return tasks, settings, changes

    def spent(self) -> Table:
        """Compute, energy and CO2e: of compute.json, else what metrics.jsonl tells."""
        table = Table(self, "Compute and emissions", ["value"])
        if not self.compute:
            for label, key in (("tokens", "tokens"), ("wall_seconds", "seconds")):
                told = ("metrics.jsonl", ["sum", key, self.step], amount)
                there = (self.run / "metrics.jsonl").exists()
                table.row(label, {"value": told if there else "not measured: the run has no metrics.jsonl"})
            for label in ("energy_kwh", "co2e_kg"):
                table.row(label, {"value": "not measured: the run has no compute.json"})
            return table
        for key in (key for key in COMPUTE if key in self.compute["total"]):
            table.row(key, {"value": ("compute.json", ["total", key], amount)})
        for number, segment in enumerate(self.compute["segments"]):
            label = f"part {number + 1}"
            for key in ("from_step", "to_step", "tokens", "wall_seconds", "cores", "threads", "ranks"):
                table.row(f"{label}: {key}", {"value": ("compute.json", ["segments", number, key], amount)})
            table.row(f"{label}: device", {"value": f"{segment['device']}: {segment['device_name']}"},
                      f"compute.json: segments.{number}.device_name")  # fmt: skip
        return table

    def energy_note(self) -> str:
        total = self.compute.get("total", {})
        if not total.get("estimated"):
            return ""
        said = f"**Energy and CO2e are estimates**: {total['why']}. Carbon intensity: {total['carbon_intensity_from']}."
        whole = total["measured_seconds"] >= 0.95 * total["wall_seconds"]
        return said if whole else f"{said} They cover `measured_seconds` of the `wall_seconds`."

    # --------------------------------------------------------------------------------------------------- evaluations

    def figures(self) -> list[tuple[str, str, dict]]:
        """(evaluation, figure's name, figure) of all that was measured."""
        return [(e, n, f) for e, entry in self.evaluations.items() for n, f in entry["figures"].items()]

    @staticmethod
    def group(name: str) -> str:
        """The section of a figure; "" for the main one."""
        first = "leakage" if name.endswith(CLEAN) else name.partition("/")[0]
        return first if first in GROUPS else ""

    def results(self, group: str = "") -> Table:
        """The figures of a group, or those of none. Figures measured again without leaks stand in `leakage`."""
        names = {"": "Evaluation", "subgroups": "Subgroups", "robustness": "Robustness", "leakage": "Leakage"}
        table = Table(self, names[group], ["value", "low", "high", "chance", "n"])
        for evaluation, name, figure in self.figures():
            if self.group(name) == group:
                path = [evaluation, "figures", name]
                cells = {c: ("evaluations.json", [*path, c], rate) for c in ("value", "low", "high", "chance")}
                cells["n"] = ("evaluations.json", [*path, "n"], count)
                mark = " (on training data)" if figure.get("trained_on") else ""
                table.row(f"{evaluation}: {name}{mark}", cells, f"evaluations.json: {'.'.join(path)}")
        return table

    def measured_on(self) -> list[str]:
        lines = []
        for name, entry in self.evaluations.items():
            on = entry["on"] if isinstance(entry["on"], str) else ", ".join(entry["on"])
            old = "" if entry["step"] == self.step else f" — **not of this checkpoint, which is of step {self.step}**"
            lines.append(f"{escape(name)}: measured on {escape(on)}, step {entry['step']}, seed {entry['seed']}{old}")
            lines += [f"{escape(name)}: {escape(note)}" for note in entry.get("notes", [])]
        return lines

    def at_chance(self) -> list[str]:
        """The figures whose interval holds what a guess would get."""
        return [
            f"{evaluation}: {name}"
            for evaluation, name, f in self.figures()
            if not self.group(name) and f["chance"] is not None and f["low"] <= f["chance"] <= f["high"]
        ]

    def limits(self) -> list[str]:
        """What is known to be wrong or missing, told by the run's own records."""
        lines = []
        if self.step < self.config["steps"]:
            lines.append("Training ended before its last step: see `steps done` and `steps` under Settings.")
        if not self.evaluations:
            lines.append("Nothing is known of its quality: it was not evaluated.")
        if at_chance := self.at_chance():
            more = f", and {len(at_chance) - 8} more" if len(at_chance) > 8 else ""
            lines.append(f"No better than a guess, as far as the interval tells: {', '.join(at_chance[:8])}{more}.")
        if seen := {evaluation for evaluation, _, f in self.figures() if f.get("trained_on")}:
            lines.append(
                f"Measured on data it was trained on, which shows nothing of new data: {', '.join(sorted(seen))}."
            )
        for group, what in (("subgroups", "languages or groups"), ("robustness", "damaged or noisy input")):
            if not any(name.startswith(f"{group}/") for _, name, _ in self.figures()):
                lines.append(f"How its quality differs over {what} was not measured.")
        if not any(name.startswith("leakage/") or name.endswith(CLEAN) for _, name, _ in self.figures()):
            lines.append("Whether near copies of the test data are in the training data was not audited.")
        if undeclared := [name for name, (license, _) in self.licenses.items() if not license]:
            lines.append(f"The license of training data is not declared: {', '.join(undeclared)}.")
        lines.append("What the training data say and show was not filtered by content: expect its biases.")
        lines.append("One run from one seed: how much another start would differ was not measured.")
        return [escape(line) for line in lines]

    def left_out(self) -> Table:
        table = Table(self, "Quarantine", ["parts"])
        file = self.run / "quarantine.jsonl"
        for reason in sorted(_left_out(file)):
            table.row(reason, {"parts": ("quarantine.jsonl", ["distinct", reason])})
        if table:
            table.row("all", {"parts": ("quarantine.jsonl", ["distinct", ""])})
        return table

    def inheritance(self) -> list[str]:
        """The bases, nearest first, and what a flaw in them would reach."""
        base, lines = self._json("base.json"), []
        if not base and (init := self.config.get("init")):
            init = ", ".join(init.values()) if isinstance(init, dict) else init
            lines.append(f"Weights start from `{escape(init)}`; its hash was not recorded: the run has no base.json.")
        lines += _bases(base)
        if tune := self._json("tune.json"):
            said = f"Tuned for {escape(tune['task'])} by `{escape(tune['how'])}`, from `{escape(tune['base'])}`"
            lines.append(f"{said}, whose weights have the hash `{escape(tune['base_hash'] or 'none')}` (tune.json).")
        if adapter := self._json("adapter/adapter.json"):
            lines.append(
                f"Adapter: `adapter/`, for a base whose weights have the hash `{escape(adapter['base'])}` alone "
                "(adapter/adapter.json)."
            )
        if lines:
            lines.append(
                "A flaw in a base (its data, a backdoor, a bias) reaches this model and what is tuned from it."
            )
        else:
            lines.append("Base: none, all weights start at random, so that no flaw of another model is inherited.")
            lines.append("A flaw in the training data above reaches this model and all that is tuned from it.")
        return lines

    # ---------------------------------------------------------------------------------------------------------- page

    def metadata(self) -> dict:
        """The YAML block at the head, as Hugging Face reads it."""
        modalities = list(self.model["tokenizers"])
        data: dict[str, Any] = {"library_name": "multimodal_fm", "pipeline_tag": "feature-extraction"}
        data |= {"license": self.settings.license} if self.settings.license else {}
        data |= {"language": self.settings.language} if self.settings.language else {}
        data["tags"] = ["multimodal", *modalities]
        total = self.compute.get("total", {})
        if isinstance(total.get("co2e_kg"), float):
            self.places["metadata | co2_eq_emissions | emissions"] = {
                "value": total["co2e_kg"], "text": "grams", "file": "compute.json", "field": ["total", "co2e_kg"],
            }  # fmt: skip
            data["co2_eq_emissions"] = {
                "emissions": 1000 * total["co2e_kg"],  # in grams
                "source": f"estimated by {total['carbon_intensity_from']}",
                "training_type": "fine-tuning" if self.config.get("init") else "pre-training",
                "hardware_used": self.compute["segments"][-1]["device_name"],
            }
        results = []
        for evaluation, name, figure in self.figures():
            value = figure["value"]
            if math.isfinite(value) and not figure.get("trained_on") and not self.group(name):
                metric = {"type": name.rpartition("/")[2], "name": name, "value": value}
                dataset = {"type": evaluation or "shards", "name": evaluation or "shards"}
                results.append({"task": {"type": name.partition("/")[0]}, "dataset": dataset, "metrics": [metric]})
        if results:
            data["model-index"] = [{"name": self.name, "results": results}]
        return data

    def render(self) -> str:
        """README.md; fills `places`."""
        import jinja2

        self.places.clear()
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        template = environment.from_string(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
        sources, read = self.data()
        tasks, settings, changes = self.procedure()
        return template.render(
            metadata=yaml.safe_dump(self.metadata(), sort_keys=False, allow_unicode=True, width=100).strip(),
            card=self, said={key: escape(value) for key, value in vars(self.settings).items()},
            modalities=list(self.model["tokenizers"]), heads=list(self.model["heads"]),
            details=self.details(), sources=sources, read=read, tasks=tasks, settings=settings, changes=changes,
            spent=self.spent(), results={group: self.results(group) for group in ("", *GROUPS)},
            left_out=self.left_out(), no_evaluation=NO_EVALUATION, versions=self.versions(),
            command=f"mmfm pretrain config.yaml {shlex.quote(f'run_dir={self.name}-again')}",
        )  # fmt: skip

    def versions(self) -> str:
        segments = self.compute.get("segments")
        if not segments:
            return "versions not recorded: the run has no compute.json"
        return escape(", ".join(f"{name} {version}" for name, version in segments[-1]["versions"].items()))

    def write(self) -> Path:
        """Write RUN/README.md, RUN/card.json and RUN/config.yaml, from which the run can be done again."""
        from .run import config_yaml  # which imports the evaluations

        path, text = self.run / "README.md", self.render()
        write_atomic(path, text.encode("utf-8", "replace"))
        write_atomic(self.run / "card.json", json.dumps(self.places, indent=1).encode())
        write_atomic(self.run / "config.yaml", config_yaml(self.run, self.folder).encode())
        return path

    def problems(self) -> list[str]:
        """What a release lacks, one line each; empty where nothing."""
        lines = []
        if not self.evaluations:
            lines.append(NO_EVALUATION.replace("RUN", str(self.run)))
        lines += [
            f"evaluation {name} is of step {entry['step']}, the checkpoint of step {self.step}: measure it again"
            for name, entry in self.evaluations.items()
            if entry["step"] != self.step
        ]
        wanted = self.config.get("evaluate") or {}
        lines += [
            f"evaluation {n} of the config was not measured"
            for n in wanted
            if self.evaluations and n not in self.evaluations
        ]
        values = {f"{evaluation}/{name}": figure["value"] for evaluation, name, figure in self.figures()}
        for limits, sign, what in ((self.settings.require, 1, "at least"), (self.settings.at_most, -1, "at most")):
            for name, limit in limits.items():
                if name not in values:
                    lines.append(f"{name} is required to be {what} {limit:g} and was not measured")
                elif not sign * values[name] >= sign * limit:  # nor is what is not a number
                    lines.append(f"{name} is {values[name]:.4g}, required is {what} {limit:g}")
        if not self.settings.license:
            lines.append("the license of the weights is not declared: card.license in the config, or license=NAME here")
        unknown: dict[str, list[str]] = {}
        for name, (license, where) in self.licenses.items():
            if not license:
                unknown.setdefault(where, []).append(name)
        lines += [
            f"the license of the data of {', '.join(names)} is not declared: {where}; card.data_licenses.{names[0]} in "
            "the config declares it"
            for where, names in unknown.items()
        ]
        try:
            current = (self.run / "README.md").read_text(encoding="utf-8")
        except OSError:
            lines.append(f"{self.run}/README.md is missing: `mmfm card {self.run}` writes it")
        else:
            if current != self.render():
                lines.append(
                    f"{self.run}/README.md is not of the run as it stands: `mmfm card {self.run}` writes it anew"
                )
        return [printable(line) for line in lines]
