"""`mmfm import`: the weights of another library as a run, and `import.json`, which certifies what was taken."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Example
from ..config import to_data
from ..corpus.storage import write_atomic
from ..errors import UserError
from ..model import Model
from ..tokens import Tokens, make_sequence
from .base import Imported, read_json, refuse_pickle, save, weight_files

CERTIFICATE = "import.json"
PACKAGES = {"transformers": "transformers", "timm": "timm", "open_clip": "open_clip_torch"}
AGREES = 1e-4  # of the largest value: hidden states that differ by less are the same to rounding
FILES = (
    *("config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    *("open_clip_config.json", "open_clip_model.safetensors"),
)


def import_run(source: str, run_dir: str | Path, tower: str = "") -> dict[str, Any]:
    """Write the model of a source as a run, with its certificate, which is returned.

    source: `hf:NAME`, `timm:NAME`, `open_clip:NAME[/TAG]`, which are downloaded, or a folder of any of these on disk.
    Raises UserError.
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"{run_dir}: is there already; import into a new folder")
    folder, revision = find(source)
    with tempfile.TemporaryDirectory() as work:
        imported = read_folder(folder, tower, f"{work}/tokenizer.json")
        certificate = certify(imported, source, revision, folder, tower)
        save(imported.model, run_dir, imported.objectives)
    write_atomic(run_dir / CERTIFICATE, json.dumps(certificate, indent=1, ensure_ascii=False).encode())
    return certificate


def read_folder(folder: Path, tower: str = "", tokenizer_file: str = "") -> Imported:
    """The model of a folder on disk, whichever library wrote it. Raises UserError."""
    if (folder / "open_clip_config.json").exists():
        from . import open_clip

        return open_clip.import_folder(folder, tower, tokenizer_file)
    deeper = folder / "0_Transformer" / "config.json"
    settings = read_json(deeper if deeper.exists() else folder / "config.json")
    if "model_type" in settings:
        from . import hugging_face

        return hugging_face.import_folder(folder, tower, tokenizer_file, optional=True)
    if "architecture" in settings:
        if tower:
            raise UserError(f"{folder}: is one model of pictures; only CLIP has towers")
        from . import timm

        return timm.import_folder(folder)
    raise UserError(f"{folder / 'config.json'}: names neither a model_type (Hugging Face) nor an architecture (timm)")


def certify(imported: Imported, source: str, revision: str, folder: Path, tower: str = "") -> dict[str, Any]:
    """What was taken from where, what was not and why, and how far the hidden states are from the original's."""
    own, model = imported.tensors, imported.model
    names = ("open_clip_model",) if (folder / "open_clip_config.json").exists() else ("model",)
    inner = folder if (folder / "config.json").exists() or names[0] != "model" else folder / "0_Transformer"
    return {
        "source": source,
        "revision": revision,
        "tower": tower,
        "library": imported.library,
        "architecture": imported.architecture,
        "files": {file.name: _hash(file) for name in names for file in weight_files(inner, name)},
        "hidden_states": measure(imported),
        "differences": imported.differences,
        "tokenizer": imported.tokenizer,
        "model": to_data(model.config) | {"tokenizers": _without_files(to_data(model.config)["tokenizers"])},
        "not_taken": own.not_taken,
        "tensors": own.mapping,
    }


def _without_files(tokenizers: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in one.items() if k != "file"} for name, one in tokenizers.items()}


def _hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@torch.no_grad()
def measure(imported: Imported) -> dict[str, Any]:
    """The largest difference between the hidden states of both on random inputs; why not, where it is not known."""
    package = PACKAGES[imported.library]
    try:
        assert imported.reference is not None
        original = imported.reference()
        pairs = [(read(imported.model, tokens), original(theirs)) for tokens, theirs in _inputs(imported)]
    except ImportError:
        return {"compared_with": None, "why": f"{package} is not installed: pip install 'multimodal_fm[interop]'"}
    except Exception as error:  # another library's: it may raise anything, and the import does not depend on it
        return {"compared_with": None, "why": f"{package} failed: {type(error).__name__}: {str(error)[:200]}"}
    differences = [float((ours - theirs).abs().max()) for ours, theirs in pairs]
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    return {
        "compared_with": f"{package} {importlib.metadata.version(package)}",
        "inputs": f"{len(pairs)} random inputs of {', '.join(str(len(ours)) for ours, _ in pairs)} tokens",
        "largest_difference": max(differences),
        "largest_value": largest,
        "agrees": max(differences) <= AGREES * max(1.0, largest),
    }


def _inputs(imported: Imported) -> list[tuple[Tokens, Tensor]]:
    """Random inputs as our tokens, without learned ones, and as the original wants them, a batch of one."""
    model, generator = imported.model, torch.Generator().manual_seed(0)
    found: list[tuple[Tokens, Tensor]] = []
    if "text" in model.modalities:
        config: Any = model.tokenizers["text"].config
        for length in sorted({1, 3, 8, min(32, config.max_tokens)}):
            ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
            position = torch.nn.functional.pad(torch.arange(length, dtype=torch.float32)[:, None], (0, 2))
            tokens = make_sequence(ids, position)
            tokens = tokens.replace(order=torch.arange(length)) if config.causal else tokens
            theirs = ids if imported.ids is None else torch.tensor(imported.ids)[ids]
            found.append((tokens, theirs[None]))
    elif "image" in model.modalities:
        config = model.tokenizers["image"].config
        side = int(config.max_tokens**0.5) * config.patch
        for seed in range(2):
            pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
            found.append((model.tokenizers["image"].read(pixels)[0], torch.from_numpy(pixels)[None]))
    else:
        config = model.tokenizers["audio"].config
        for count in (config.window_samples // 3, config.window_samples):
            wave = 0.1 * torch.randn(count, generator=generator)
            found.append((model.tokenizers["audio"].read((wave, config.sample_rate))[0], wave[None]))
    return found


@torch.no_grad()
def read(model: Model, tokens: Tokens) -> Tensor:
    """The hidden states (L, D) of one sequence, learned tokens before it among them."""
    modality = next(name for name in ("text", "image", "audio") if name in model.modalities)
    tokens = tokens.replace(modality=torch.full((len(tokens),), model.modalities.index(modality)))
    batch = model.collate({"all": [(0, Example([tokens], [None]))]}, {"all": {}})
    return model(batch).tokens.content


def find(source: str) -> tuple[Path, str]:
    """The folder of a source on this machine, downloaded where it is a name, and its revision. Raises UserError."""
    library, colon, name = source.partition(":")
    known = colon and library in ("hf", "timm", "open_clip")
    local = Path(name if known else source)
    if local.is_file():
        if local.suffix != ".safetensors":
            raise refuse_pickle(local)
        if local.name not in ("model.safetensors", "open_clip_model.safetensors"):
            raise UserError(f"{local}: name the folder with config.json and model.safetensors")
        local = local.parent
    if local.is_dir():
        return local, ""
    if not known or not name:
        raise UserError(
            f"{source}: no such folder; names to be downloaded are hf:NAME, timm:NAME or open_clip:NAME/TAG"
        )
    names: dict[str, Callable[[str], str]] = {"hf": str, "timm": _timm_name, "open_clip": _open_clip_name}
    return download(names[library](name), source)


def download(name: str, source: str) -> tuple[Path, str]:
    """The files of a repository on the Hub that an import may read, none of them a pickle. Raises UserError."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{source}: needs huggingface_hub: pip install 'multimodal_fm[interop]'") from None
    name, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(FILES))
    except Exception as error:  # of the client, of HTTP and of the network, which share no class
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{source}: cannot be downloaded: {said[0][:160]}; a folder with config.json and model.safetensors that is "
            "on disk needs no network"
        ) from None
    return Path(folder), Path(folder).name


def _timm_name(name: str) -> str:
    """Where timm keeps the weights of an architecture, or of ARCHITECTURE.TAG."""
    import timm

    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if config is None or not config.hf_hub_id:
        raise UserError(f"timm:{name}: timm has no pretrained weights of that name")
    return config.hf_hub_id


def _open_clip_name(name: str) -> str:
    """Where OpenCLIP keeps the weights of NAME/TAG; without a tag the first that there is."""
    try:
        import open_clip
    except ImportError:
        raise UserError(f"open_clip:{name}: needs open_clip_torch: pip install 'multimodal_fm[interop]'") from None
    model, _, tag = name.partition("/")
    tags = open_clip.list_pretrained_tags_by_model(model)
    configs = {one: open_clip.get_pretrained_cfg(model, one).get("hf_hub", "") for one in tags}
    there = [one for one in tags if configs[one]]
    tag = tag or (there[0] if there else "")
    if tag not in there:
        raise UserError(f"open_clip:{name}: OpenCLIP has weights on the Hub of: {', '.join(there) or 'no such model'}")
    return configs[tag].rstrip("/")
