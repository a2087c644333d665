"""Checkpoints on the Hugging Face Hub: `hf:user/name` wherever a run is read, `hf:user/name@v1` for one version of it.

`fetch` brings the files of a checkpoint into huggingface_hub's own cache: weights as safetensors and settings as JSON,
nothing else, so that there is neither code nor a pickle among them. Its manifest is checked as that of any checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..errors import UserError

PREFIX = "hf:"
NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
WANTED = ("*.json", "*.safetensors")
UNWANTED = ("*/*", "optimizer.safetensors")  # what lies deeper, and what only a training goes on from
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5")
AVERAGED = {"model": "ema", "ema": "ema", "objectives": "ema_objectives", "ema_objectives": "ema_objectives"}
"""The files of weights of a published checkpoint, and those of the run's that they are: equal files are stored once."""


def is_hub(run: Any) -> bool:
    return isinstance(run, (str, Path)) and str(run).startswith(PREFIX)


def fetch(name: str) -> Path:
    """The folder of the checkpoint that `hf:user/name` names, fetched where the cache has it not. Raises UserError."""
    found = NAME.fullmatch(name)
    if not found:
        raise UserError(f"{name[:80]}: a model on the Hub is hf:user/name, or hf:user/name@revision")
    repository, revision = found[1], found[2]
    hub = _library()
    try:
        folder = hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except Exception as error:  # each way of failing has an exception of its own
        raise UserError(f"{name}: cannot be fetched: {_first_line(error)}") from None
    folder = Path(folder)
    if not (folder / "MANIFEST.json").exists():
        raise UserError(f"{name}: holds no checkpoint of multimodal_fm{_why(hub, repository, revision)}")
    return folder


def _why(hub: Any, repository: str, revision: str | None) -> str:
    """What it holds instead, where that can be learned."""
    try:
        names = hub.HfApi().list_repo_files(repository, revision=revision)
    except Exception:  # the cache was enough so far
        names = []
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f": it has pickles ({pickles[0]}), which can run code when they are read and are refused"
    return " (MANIFEST.json is missing); weights of other libraries become a run with `mmfm import`"


def refuse_pickle(run: Path) -> None:
    """Raises UserError where a path is a pickle, or a folder of nothing but pickles."""
    found = [run] if run.suffix in PICKLES else sorted(p for p in run.glob("*") if p.suffix in PICKLES)
    if found and (run.is_file() or run.is_dir()):
        raise UserError(
            f"{found[0]}: is a pickle, which can run code when it is read, and is refused: give safetensors"
        )


def push(run: str | Path, name: str, private: bool = False, revision: str | None = None) -> str:
    """Publish a run's newest checkpoint, or a folder that `mmfm export` wrote, as user/name; returns its address.

    Of a checkpoint go the averaged weights, the settings (with the paths of the data that are in them), the tokenizers'
    files and the model card; not the state of the optimizer. Raises UserError.
    """
    import tempfile

    from . import checkpoint

    name = name.removeprefix(PREFIX)
    if not NAME.fullmatch(f"{PREFIX}{name}") or "@" in name:
        raise UserError(f"{name[:80]}: a name on the Hub is user/name")
    run, hub = Path(run), _library()
    with tempfile.TemporaryDirectory() as work:
        folder = run
        if not (run / "export.json").exists():
            folder = _release(run, checkpoint.newest(run), Path(work) / "release")
        try:
            api = hub.HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            if revision:
                api.create_branch(name, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=name, folder_path=folder, revision=revision, commit_message="Weights of multimodal_fm"
            )
        except Exception as error:  # each way of failing has an exception of its own
            raise UserError(f"{name}: cannot be published: {_first_line(error)}") from None
    return str(done.commit_url)


def _release(run: Path, folder: Path, work: Path) -> Path:
    """The files of a checkpoint that are published, with a manifest of their own, in the new folder `work`."""
    from . import checkpoint

    work.mkdir()
    for name in ("model.json", "config.json", "state.json"):
        shutil.copyfile(folder / name, work / name)
    for target, source in AVERAGED.items():
        index = folder / f"{source}.safetensors.index.json"
        if index.exists():  # a large one lies in several files
            data = json.loads(index.read_text(encoding="utf-8"))
            names = {name: Path(name).name.replace(source, target, 1) for name in set(data["weight_map"].values())}
            for old, new in names.items():
                shutil.copyfile(folder / Path(old).name, work / new)
            data["weight_map"] = {key: names[name] for key, name in data["weight_map"].items()}
            (work / f"{target}.safetensors.index.json").write_text(json.dumps(data), encoding="utf-8")
        elif (folder / f"{source}.safetensors").exists():
            shutil.copyfile(folder / f"{source}.safetensors", work / f"{target}.safetensors")
        elif source in ("model", "ema"):
            raise UserError(f"{folder}: has no {source}.safetensors")
    for file in folder.glob("tokenizer-*"):
        shutil.copyfile(file, work / file.name)
    checkpoint.write_manifest(work)
    card = run / "README.md"
    (work / "README.md").write_bytes(card.read_bytes() if card.exists() else _card(run, folder))
    return work


def _card(run: Path, folder: Path) -> bytes:
    """A page that says how the model is read, where `mmfm card` has not written a better one."""
    head = "---\nlibrary_name: multimodal_fm\npipeline_tag: feature-extraction\n---\n\n"
    body = (
        f"# {run.resolve().name}\n\nTrained with multimodal_fm ({folder.name}).\n\n```python\nimport multimodal_fm\n\n"
    )
    return f'{head}{body}model = multimodal_fm.load("hf:USER/NAME")\n```\n'.encode()


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError('the Hub needs huggingface_hub: pip install "multimodal_fm[hub]"') from None
    return huggingface_hub


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:200]
