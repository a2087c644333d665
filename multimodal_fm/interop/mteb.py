"""A checkpoint as an encoder of MTEB 2, so that its tasks run on it (`pip install 'multimodal_fm[mteb]'`).

    import mteb
    from multimodal_fm.interop.mteb import Encoder

    encoder = Encoder("runs/mine")
    tasks = mteb.get_tasks(tasks=["STSBenchmark", "Flickr30kT2IRetrieval", "BeijingOpera"])
    results = mteb.evaluate(encoder, tasks)  # downloads the tasks' data

`mteb.mock_run(encoder)` tries all kinds of tasks on made-up data, without a network. (Muennighoff et al. 2023, MTEB;
Enevoldsen et al. 2025, MMTEB; https://embeddings-benchmark.github.io/mteb/.)
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mteb.models import ModelMeta
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from torch import Tensor, nn

from ..errors import SampleError
from ..model import load
from ..run_dir import checkpoint

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import Array, BatchedInput, PromptType
    from torch.utils.data import DataLoader


class Encoder:
    """`mteb.EncoderProtocol` over a model: vectors of the `retrieval` head, compared by their cosine.

    model_name: a run's folder or that of one checkpoint. An input of several modalities gets the normalized sum of the
    unit vectors of those that the model reads; one of which nothing can be read (a blank text) gets a vector of zeros,
    which is alike to nothing, and a warning. Prompts and instructions of tasks are not used. Raises UserError.
    """

    def __init__(
        self, model_name: str | Path, revision: str | None = None, *, device: str | None = None, **kwargs: Any
    ) -> None:
        folder = checkpoint.newest(model_name)
        self.model = load(folder, device=device or "auto", plugins=kwargs.get("plugins", False))
        run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        text: Any = self.model.tokenizers.get("text")
        head: Any = self.model.config.heads["retrieval"].config
        self.embed_dim: int = head.embed_dim
        described = {
            "loader": type(self),
            "name": f"multimodal_fm/{run.resolve().name}",
            "revision": revision or folder.name,
            "n_parameters": sum(p.numel() for p in self.model.parameters()),
            "max_tokens": text.config.max_tokens if text else None,
            "embed_dim": self.embed_dim,
            "framework": ["PyTorch"],
            "similarity_fn_name": "cosine",
            "use_instructions": False,
            "modalities": [m for m in self.model.modalities if m in ("text", "image", "audio")],
        }
        unknown = dict.fromkeys(
            (
                *("release_date", "languages", "memory_usage_mb", "license", "open_weights", "public_training_code"),
                *("public_training_data", "training_datasets"),
            )
        )
        self.mteb_model_meta = ModelMeta(**described, **unknown)

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Array:
        """Vectors (N, E) of the inputs that the batches hold together, float32, of length one or zero."""
        rows = [self._encode(batch) for batch in inputs]
        vectors = torch.cat(rows) if rows else torch.zeros(0, self.embed_dim)
        if blank := int((vectors.norm(dim=1) == 0).sum()):
            warnings.warn(f"{task_metadata.name}: {blank} of {len(vectors)} inputs cannot be read", stacklevel=2)
        return vectors.numpy()

    def _encode(self, batch: Any) -> Tensor:
        given = {m: batch[m] for m in self.mteb_model_meta.modalities if m in batch}
        total = torch.zeros(len(next(iter(given.values()), [])), self.embed_dim)
        for modality, values in given.items():
            numbers, sequences = [], []
            for number, value in enumerate(values):
                try:
                    read = self.model.tokenizers[modality].read(_raw(modality, value)) if value is not None else []
                except SampleError:
                    read = []
                if read:
                    numbers.append(number)
                    sequences.append(read)
            if numbers:
                total[numbers] += self.model.embed_sequences(modality, sequences)[0].float().cpu()
        return nn.functional.normalize(total, dim=1)

    def similarity(self, embeddings1: Array, embeddings2: Array) -> Array:
        """Cosines (N, M)."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Array, embeddings2: Array) -> Array:
        """Cosines (N,) of rows of the same number."""
        return pairwise_cos_sim(embeddings1, embeddings2)


def _raw(modality: str, value: Any) -> Any:
    """An input of MTEB's as our tokenizers read it."""
    return (value["array"], value["sampling_rate"]) if modality == "audio" else value
