"""A modality as an ONNX file: MODALITY.onnx, with a batch and a length of any size, checked with onnxruntime.

session = onnxruntime.InferenceSession("out/text.onnx")
embeddings, features = session.run(None, {"input_ids": ids, "attention_mask": mask})
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .export_base import Source, Written, examples, need, padded_model
from .export_towers import check, describe_tower, inputs_of, make_tower, write_towers
from .exported.padded_multimodal_fm import Tower

OPSET = 18
LIMIT = 1e-3  # another runtime adds up in another order


def write(source: Source, work: Path) -> Written:
    """See the top of the file. Raises UserError without the packages."""
    need("onnx", "onnxscript", "onnxruntime", extra="onnx")
    import onnxruntime

    model = padded_model(source)
    differences, about = {}, {}
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    for modality in source.modalities:
        about[modality] = of = describe_tower(model.config, modality, f"{modality}.onnx")
        given = inputs_of(of["tokenizer"]["kind"], examples(source.model, modality))
        _write(make_tower(model, modality), given, list(of["inputs"]), list(of["outputs"]), work / of["file"])
        session = onnxruntime.InferenceSession(work / of["file"], options, ["CPUExecutionProvider"])

        def run(*inputs: Tensor, session=session, names=tuple(of["inputs"])) -> list[Tensor]:
            fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
            return [torch.from_numpy(found) for found in session.run(None, fed)]

        differences[modality] = check(run, of, source, modality)
    write_towers(work, about)
    return Written(differences, {name: f"model.{name}" for name in model.state_dict()}, limit=LIMIT)


def _write(tower: Tower, given: tuple[Tensor, ...], inputs: list[str], outputs: list[str], file: Path) -> None:
    """One file; weights beyond the 2 GB of a file's format lie beside it."""
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    size = sum(parameter.nbytes for parameter in tower.parameters())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tower,
            given,
            file,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=tuple(shape for _ in given),
            opset_version=OPSET,
            dynamo=True,
            external_data=size > 1_800_000_000,
            verbose=False,
        )
