"""Our models as encoders of MTEB."""

import io

import numpy as np
import pytest
import soundfile
import yaml
from conftest import jpeg, tiny, tone
from PIL import Image

from multimodal_fm.train import loop
from multimodal_fm.train.config import load as load_config

mteb = pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, corpus):
    from multimodal_fm.interop.mteb import Encoder

    folder = tmp_path_factory.mktemp("mteb")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny(corpus, steps=2, run_dir=str(folder / "run"))))
    loop.pretrain(load_config(folder / "tiny.yaml"))
    return Encoder(folder / "run", device="cpu")


class Task:
    name = "some task"


def encode(encoder, *batches) -> np.ndarray:
    return encoder.encode(batches, task_metadata=Task, hf_split="test", hf_subset="default", batch_size=2)


def test_it_is_an_encoder(encoder):
    from mteb.models import EncoderProtocol

    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert meta.name == "multimodal_fm/run" and meta.revision == "step-00000002"
    assert set(meta.modalities) == {"text", "image", "audio"} and meta.embed_dim == 32
    assert meta.n_parameters == sum(p.numel() for p in encoder.model.parameters())


def test_vectors_are_those_of_embed(encoder):
    texts, pictures = ["a red square", "le bleu", "green"], [Image.open(io.BytesIO(jpeg(c))) for c in ("red", "blue")]
    wave, rate = soundfile.read(io.BytesIO(tone(440.0)), dtype="float32")
    own = encoder.model.embed(text=texts, image=pictures, audio=[(wave, rate)])
    assert np.allclose(encode(encoder, {"text": texts[:2]}, {"text": texts[2:]}), own["text"], atol=1e-6)
    assert np.allclose(encode(encoder, {"image": pictures}), own["image"], atol=1e-6)
    audio = {"audio": [{"array": wave, "sampling_rate": rate}]}
    assert np.allclose(encode(encoder, audio), own["audio"], atol=1e-6)
    both = encode(encoder, {"text": texts[:2], "image": pictures})
    fused = own["text"][:2] + own["image"]
    assert np.allclose(both, fused / fused.norm(dim=1, keepdim=True), atol=1e-6)
    cosines = encoder.similarity(own["text"].numpy(), own["image"].numpy())
    assert np.allclose(cosines, own["text"] @ own["image"].T, atol=1e-6)
    pairs = encoder.similarity_pairwise(own["text"][:2].numpy(), own["image"].numpy())
    assert np.allclose(pairs, np.diag(cosines[:2]), atol=1e-6)


def test_what_cannot_be_read_is_alike_to_nothing(encoder):
    with pytest.warns(UserWarning, match="some task: 1 of 2 inputs cannot be read"):
        vectors = encode(encoder, {"text": ["  ", "green"]})
    assert not vectors[0].any() and np.linalg.norm(vectors[1]) == pytest.approx(1, abs=1e-6)
    assert encode(encoder).shape == (0, 32)


@pytest.mark.slow
def test_all_kinds_of_tasks_run(encoder):
    """Tasks of audio need torchcodec and FFmpeg, and are passed over without them."""
    results = mteb.mock_run(encoder)
    assert results.all_passed, results.to_markdown()
    ran = [name for name, status in results.items() if hasattr(status, "scores")]
    assert len(ran) >= 40
