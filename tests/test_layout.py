"""The rooms of the package: which may import which."""

import ast
from pathlib import Path

import multimodal_fm

ROOT = Path(multimodal_fm.__file__).parent
PLUGINS = ("tokenizers", "objectives", "heads", "evals")


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file, as `room.module` from the root."""
    here = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) + 1 - node.level], *(node.module or "").split(".")]
            found |= {".".join(filter(None, [*base, name.name])) for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("multimodal_fm"):
            found |= {f"{node.module}.{name.name}".removeprefix("multimodal_fm.") for name in node.names}
    return found


def test_the_root_is_small():
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_nothing_imports_the_training_but_the_command_line():
    for file in ROOT.rglob("*.py"):
        room = file.relative_to(ROOT).parts[0]
        if room not in ("train", "cli", "tune", "__init__.py"):
            assert not [name for name in imports(file) if name.startswith("train")], file


def test_tokens_imports_nothing_of_ours():
    assert not imports(ROOT / "tokens.py")


def test_files_of_one_plugin_folder_do_not_import_each_other():
    """But for `base` and, among the evaluations, what they share."""
    shared = {"base", "embed_corpus", "likelihood", "metrics", "task_metrics"}
    for room in PLUGINS:
        others = {file.stem for file in (ROOT / room).glob("*.py")} - shared - {"__init__", "run"}
        for name in others:
            parts = [module.split(".") for module in imports(ROOT / room / f"{name}.py")]
            assert not {part[1] for part in parts if part[0] == room and part[1:]} & others, (room, name)
