"""Shares: import, export and push."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from ..errors import printable
from .app import app


@app.command(name="import")
def import_(
    source: str, /, *, to: str, tower: Annotated[Literal["", "text", "image"], Parameter(show_default=False)] = ""
) -> None:
    """Make the weights of another library a run: `mmfm import hf:bert-base-uncased --to runs/bert`.

    Parameters
    ----------
    source
        hf:NAME, timm:NAME or open_clip:NAME/TAG, which are downloaded, or a folder with config.json and
        model.safetensors.
    to
        The folder of the new run; import.json in it says what was taken and how exactly.
    tower
        Of CLIP: text or image.
    """
    from ..interop.run import import_run

    found = import_run(source, to, tower)
    measured = found["hidden_states"]
    print(printable(f"{to}: {found['architecture']} of {found['library']}, {len(found['tensors'])} tensors"))
    if measured["compared_with"] is None:
        print(printable(f"hidden states were not compared: {measured['why']}"), file=sys.stderr)
    else:
        difference, largest = measured["largest_difference"], measured["largest_value"]
        print(f"hidden states differ from {measured['compared_with']} by {difference:.1e} (of up to {largest:.1f})")
        if not measured["agrees"]:
            print("warning: that is more than rounding: do not rely on this import", file=sys.stderr)
    if found["tokenizer"].get("taken") is False:
        print(printable(f"strings cannot be read: {found['tokenizer']['why']}"), file=sys.stderr)
    for line in found["differences"]:
        print(printable(f"- {line}"))
    if left := found["not_taken"]:
        print(printable(f"- {len(left)} tensors were not taken: {', '.join(one['theirs'] for one in left)}"[:300]))


@app.command
def export(
    run: str,
    /,
    *,
    to: Literal["hf", "onnx", "torch-export", "timm", "open_clip"],
    out: str,
    modalities: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
) -> None:
    """Write a run's weights for another library: `mmfm export runs/demo --to onnx --out exported`.

    What the other library makes of them is compared with the original first; export.json says how far they differ.

    Parameters
    ----------
    run
        A run folder, the folder of one checkpoint, or hf:user/name.
    to
        hf: a folder of transformers and sentence-transformers. onnx, torch-export: a file for each modality. timm,
        open_clip: a model that has the shape of one of theirs.
    out
        The folder to be made.
    modalities
        Those to be exported; without it, all that can be.
    """
    from ..interop.export_base import export

    about = export(run, to, out, modalities or ())
    for modality, found in about["difference"].items():
        shown = ", ".join(f"{name} {value:.1e}" for name, value in found.items() if name != "inputs")
        print(f"{modality}: differs from the original by at most {shown} (of its largest value)")
    for line in [*about["notes"], *(f"left out: {one}" for one in about["left_out"])]:
        print(f"- {printable(line)}")
    print(printable(f"{out}: written"))


@app.command
def push(
    run: str, name: str, /, *, private: Annotated[bool, Parameter(negative=())] = False, revision: str = ""
) -> None:
    """Publish a run on the Hugging Face Hub: `mmfm push runs/demo user/name`; `hf:user/name` then reads it anywhere.

    The averaged weights go, the settings with the data's paths in them, the tokenizers' files and README.md, which
    `mmfm card` writes. Log in before, with `hf auth login`.

    Parameters
    ----------
    run
        A run folder, the folder of one checkpoint, or one that `mmfm export` wrote.
    name
        USER/NAME on the Hub; it is made where it is not there.
    private
        Make it so that only its owner sees it.
    revision
        The branch to publish on.
    """
    from ..run_dir.hub import push

    print(printable(push(run, name, private, revision or None)))
