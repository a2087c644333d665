"""`mmfm scale`: one configuration at a ladder of sizes, the scaling law of their losses, and held-out larger runs.

L(N) = E + A / N^alpha (Kaplan et al. 2020, Hoffmann et al. 2022) with N the parameters of the backbone, all runs on the
same data for the same steps. The law is fitted to the smaller runs alone; the larger ones say whether it holds.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..config import to_data
from ..corpus.storage import write_atomic
from ..errors import UserError
from ..run_dir import checkpoint
from ..run_dir.records import read_jsonl
from .config import TrainConfig
from .loop import pretrain
from .train_step import TrainStep

PARAMETERS = 3  # of the law, so that a fit needs more runs than these
DRAWS = 400  # of the bootstrap
ALPHA = (0.01, 3.0)  # between which the exponent is looked for
LEAST_NOISE = 1e-4  # of a loss's logarithm between runs that differ in nothing but their size
LAST = 0.1  # of the steps, whose mean is a run's loss where there is no validation


@dataclass(frozen=True)
class Size:
    """A rung: the backbone's width and depth."""

    width: int
    depth: int

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}"


@dataclass
class Law:
    """E + A / N^alpha, with draws (B, 4) of E, log A, alpha and the noise of a loss's logarithm."""

    E: float
    A: float
    alpha: float
    noise: float
    draws: np.ndarray

    def predict(self, parameters: float) -> dict[str, float]:
        """The loss that a run of so many parameters is expected to have, and the 95 % interval of a single run."""
        E, log_a, alpha, noise = self.draws.T
        losses = E + np.exp(log_a - alpha * np.log(parameters))
        losses = losses * np.exp(noise * np.random.default_rng(1).standard_normal(len(losses)))
        low, high = np.percentile(losses, [2.5, 97.5])
        return {"value": self.E + self.A * parameters**-self.alpha, "low": float(low), "high": float(high)}

    def to_data(self) -> dict[str, dict[str, float]]:
        E, log_a, alpha, _ = self.draws.T
        columns = {"E": (self.E, E), "A": (self.A, np.exp(log_a)), "alpha": (self.alpha, alpha)}
        ends = {name: np.percentile(column, [2.5, 97.5]) for name, (_, column) in columns.items()}
        return {n: {"value": v, "low": float(ends[n][0]), "high": float(ends[n][1])} for n, (v, _) in columns.items()}


def fit(parameters: Sequence[float], losses: Sequence[float], seed: int = 0) -> Law:
    """The law of runs of N parameters each and their losses, by least squares of the losses' logarithms.

    Its intervals come of a parametric bootstrap (Efron and Tibshirani 1993): losses are drawn around the fit with noise
    whose size is itself drawn, as few runs hardly tell it, and fitted again. Raises UserError for fewer than four runs.
    """
    N, L = np.asarray(parameters, float), np.asarray(losses, float)
    if len(N) <= PARAMETERS or len(np.unique(N)) < PARAMETERS:
        raise UserError(f"a scaling law needs at least {PARAMETERS + 1} runs of {PARAMETERS} sizes, not {len(N)}")
    if not (np.isfinite(L).all() and (L > 0).all()):
        raise UserError(f"a scaling law is of losses above 0, not {', '.join(f'{loss:.3g}' for loss in L)}")
    middle = np.exp(np.log(N).mean())  # the parameters are less entangled around it
    best = _solve(N / middle, L)
    freedom = len(N) - PARAMETERS
    residuals = np.log(L) - np.log(_law(best, N / middle))
    noise = max(float(np.sqrt((residuals**2).sum() / freedom)), LEAST_NOISE)
    generator, rows = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        sigma = noise * np.sqrt(freedom / generator.chisquare(freedom))
        drawn = _law(best, N / middle) * np.exp(sigma * generator.standard_normal(len(N)))
        E, log_b, alpha = _solve(N / middle, drawn, best)
        rows.append([E, log_b + alpha * np.log(middle), alpha, sigma])
    E, log_b, alpha = best
    return Law(float(E), float(np.exp(log_b + alpha * np.log(middle))), float(alpha), noise, np.array(rows))


def _law(x: np.ndarray, N: np.ndarray) -> np.ndarray:
    E, log_b, alpha = x
    return E + np.exp(log_b - alpha * np.log(N))


def _solve(N: np.ndarray, L: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """E, log B and alpha of E + B / N^alpha with the least squares of log L, from several starts or from the given."""
    from scipy.optimize import least_squares

    lowest = L.min()
    bounds = ([0.0, -30.0, ALPHA[0]], [lowest, 30.0, ALPHA[1]])
    shares, alphas = ((0.0, 0.5, 0.9), (0.1, 0.5, 1.0))
    starts = [(share * lowest, np.log(np.median(L) - share * lowest + 1e-9), a) for share in shares for a in alphas]
    found = []
    for x0 in starts if start is None else [start]:
        x0 = np.clip(x0, np.array(bounds[0]) + 1e-9, np.array(bounds[1]) - 1e-9)
        found.append(least_squares(lambda x: np.log(_law(x, N) / L), x0, bounds=bounds, x_scale=(lowest, 1, 1)))
    return min(found, key=lambda one: one.cost).x


def parse_sizes(text: str, depth: int) -> list[Size]:
    """`32,48,64x3`: widths, each with a depth of its own or `depth`. Raises UserError."""
    sizes = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", part)):
            raise UserError(f"--sizes {text}: {part!r} is no WIDTH or WIDTHxDEPTH")
        sizes.append(Size(int(match[1]), int(match[2] or depth)))
    if len(set(sizes)) < len(sizes):
        raise UserError(f"--sizes {text}: names a size twice")
    return sizes


def resize(config: TrainConfig, size: Size, run_dir: Path, seed: int) -> TrainConfig:
    """The same run at another size; its heads of attention are about as wide as those of the configuration."""
    before = config.model.backbone
    wide = before.width // before.num_heads
    fitting = [h for h in range(1, size.width + 1) if size.width % h == 0 and size.width // h >= min(wide, size.width)]
    try:
        backbone = dataclasses.replace(before, width=size.width, depth=size.depth, num_heads=max(fitting, default=1))
    except ValueError as error:
        raise UserError(f"size {size}: {error}") from None
    model = dataclasses.replace(config.model, backbone=backbone)
    return dataclasses.replace(config, model=model, run_dir=str(run_dir), seed=seed)


def _check_same(config: TrainConfig, folder: Path) -> None:
    """Raises UserError where a run that is there was trained by another configuration."""
    there, own = checkpoint.read_data(folder, "config"), json.loads(json.dumps(to_data(config)))
    for key in ("steps", "seed", "sources", "tasks", "optim", "microbatches"):
        if there.get(key) != own[key]:
            raise UserError(f"{config.run_dir}: was trained with another {key}; give another --to")


def count_parameters(config: TrainConfig) -> dict[str, int]:
    """Those of the backbone, which the law counts, and of all that learns."""
    step = TrainStep(config, torch.device("meta"))
    total = sum(weight.numel() for weight in step.parameters)
    return {"parameters": sum(w.numel() for w in step.model.backbone.parameters()), "total": total}


def read_loss(run_dir: Path, figure: str) -> float:
    """A run's figure: of validation the last, of training the mean of the last tenth of the steps. Raises UserError."""
    values = [row[figure] for row in read_jsonl(run_dir / "metrics.jsonl") if figure in row]
    if not values:
        raise UserError(f"{run_dir}: no figure is called {figure!r}")
    count = 1 if figure.startswith(("validation/", "evaluate/")) else max(1, int(LAST * len(values)))
    return float(np.mean(values[-count:]))


def scale(
    config: TrainConfig,
    sizes: list[Size],
    held_out: list[Size],
    folder: str | Path,
    seeds: int = 1,
    figure: str = "",
    say: Callable[[str], None] = print,
) -> dict:
    """Train the configuration at each size and seed, fit the law to `sizes`, compare it with `held_out`.

    Runs lie in FOLDER/WIDTHxDEPTH-SEED; those that are there already are taken or gone on with. Writes
    FOLDER/scale.json and returns what it holds. Raises UserError.
    """
    folder = Path(folder)
    if len(sizes) * seeds <= PARAMETERS or len(sizes) < PARAMETERS:
        raise UserError(f"--sizes: a scaling law needs at least {PARAMETERS + 1} runs of {PARAMETERS} sizes")
    if both := set(sizes) & set(held_out):
        raise UserError(f"--held-out {both.pop()}: is among the sizes that the law is fitted to")
    figure = figure or ("validation/loss" if config.validate_every else "loss")
    runs = []
    for size in (*sizes, *held_out):
        for seed in range(config.seed, config.seed + seeds):
            own = resize(config, size, folder / f"{size}-{seed}", seed)
            newest = checkpoint.steps(own.run_dir)[-1:]
            if not newest or newest[0] < checkpoint.folder_of(own.run_dir, own.steps):
                pretrain(own, resume="auto")
            else:
                _check_same(own, newest[0])
            counts = count_parameters(own)
            loss = read_loss(Path(own.run_dir), figure)
            say(f"{size}, seed {seed}: {counts['parameters']:,} parameters in the backbone, {figure} {loss:.4f}")
            row = {"size": str(size), "seed": seed, **counts, "loss": loss, "held_out": size in held_out}
            runs.append(row)
    fitted = [run for run in runs if not run["held_out"]]
    law = fit([run["parameters"] for run in fitted], [run["loss"] for run in fitted])
    for run in runs:
        run["predicted"] = law.predict(run["parameters"])
        run["inside"] = run["predicted"]["low"] <= run["loss"] <= run["predicted"]["high"]
    ends = [run["parameters"] for run in runs]
    grid = np.geomspace(0.8 * min(ends), 1.25 * max(ends), 50)
    curve = [{"parameters": float(n), **law.predict(float(n))} for n in grid]
    result = {"figure": figure, "steps": config.steps, "law": law.to_data(), "runs": runs, "curve": curve}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "scale.json", json.dumps(result, indent=1).encode())
    return result
