"""What leaves the package: the same outputs in another library, and the way back."""

import json

import numpy as np
import pytest
import torch
from conftest import output

from multimodal_fm.config import build
from multimodal_fm.errors import UserError
from multimodal_fm.interop import export_base
from multimodal_fm.interop.base import save
from multimodal_fm.model import Model, ModelConfig

TOKENIZERS = {
    "text": {"vocab_size": 300, "max_tokens": 24},
    "image": {"patch": 4, "max_tokens": 12},
    "audio": {"patch_frames": 4, "n_mels": 8, "patch_mels": 4, "max_tokens": 8, "sample_rate": 8000},
}
MODERN = {"width": 24, "depth": 2, "num_heads": 2}
CLASSIC = {**MODERN, "block": "classic", "max_positions": 24, "grid": [12, 12]}


def make(backbone=MODERN, modalities=("text", "image", "audio"), seed=0, **more):
    """A model whose weights are all random, none of them at the ones and zeros it starts with."""
    tokenizers = {name: {**TOKENIZERS.get(name, {}), **more.pop(name, {})} for name in modalities}
    config = {"tokenizers": tokenizers, "backbone": backbone, "heads": {"retrieval": {"embed_dim": 16}}}
    model = Model(build(ModelConfig, {**config, **more}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def compare(model, modality):
    """The largest difference of the padded model from the model itself, read by `embed_sequences`."""
    padded = export_base.padded_model(export_base.open_model(model))
    sequences = export_base.examples(model, modality)
    content, mask, position = export_base.pad(sequences)
    vectors, features = model.embed_sequences(modality, [[one] for one in sequences])
    flipped = [one.flip(1) for one in (content, mask, position)]  # on the left is padding too
    for given in ((content, mask, position), (content, mask, None) if modality == "text" else flipped):
        with torch.no_grad():
            reading = padded(modality, *given)
        if not given[1][0, 0] and model.config.backbone.block == "classic":
            continue  # what is learned for a position is not the same the other way around
        torch.testing.assert_close(reading.features, features, rtol=0, atol=2e-5)
        torch.testing.assert_close(reading.embedding, vectors, rtol=0, atol=2e-5)
    assert float((features[0] - features[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone": {**MODERN, "experts": True}, "prompt": {"count": 2}},
        {"backbone": CLASSIC, "prompt": {"count": 1}},
        {"backbone": {**CLASSIC, "norm": "post", "norm_in": True, "activation": "gelu_tanh"}, "text": {"causal": True}},
        {"prompt": {"count": 2}, "text": {"causal": True}},
    ],
    ids=["modern", "experts", "classic", "post", "causal"],
)
def test_a_padded_batch_reads_as_the_flat_one(changes, modality):
    modalities = ["text", "image", "audio", *(["prompt"] if "prompt" in changes else [])]
    compare(make(modalities=modalities, **changes), modality)


@pytest.mark.parametrize("pool", ["mean", "attention", "first"])
def test_a_classifier_of_padded_batches(pool):
    model = make(heads={"classify": {"classes": ["a", "b", "c"], "pool": pool}}, modalities=["text"])
    source = export_base.open_model(model)
    sequences = export_base.examples(model, "text")
    content, mask, _ = export_base.pad(sequences)
    logits = export_base.padded_model(source)("text", content, mask).logits
    assert logits is not None
    torch.testing.assert_close(logits, export_base.read(model, "text", sequences)["logits"], rtol=0, atol=2e-5)


def test_adapters_are_worked_into_the_weights():
    pytest.importorskip("peft")
    model = make(lora={"rank": 2}, modalities=["text"])
    compare(model, "text")


def test_a_sequence_behind_learned_tokens_is_of_its_own_modality():
    """Its projection of the retrieval head is that of its modality, and it is paired with other modalities."""
    model = make(modalities=["prompt", "text", "image"], prompt={"count": 2})
    picture = np.full((8, 8, 3), 7, np.uint8)
    features, embedded = model.features(image=[picture])["image"], model.embed(image=[picture])["image"]
    expected = features @ model.heads["retrieval"].projection["image"]
    torch.testing.assert_close(embedded, torch.nn.functional.normalize(expected, dim=-1))


def run_of(model, folder):
    save(model, folder)
    return folder


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make({**MODERN, "depth": 1}, modalities=["text", "image"])
    about = export_base.export(run_of(model, tmp_path / "run"), "onnx", tmp_path / "out", ["text"])
    assert about["difference"]["text"]["embeddings"] < 1e-3 and about["left_out"][0] == "modality image"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["export.json", "inputs.json", "text.onnx"]
    inputs = json.loads((tmp_path / "out/inputs.json").read_text())["text"]
    session = onnxruntime.InferenceSession(tmp_path / "out/text.onnx")
    assert [one.name for one in session.get_inputs()] == [*inputs["inputs"]]
    sequence = torch.randint(300, (1, 19))
    sizes = {}
    for batch in (1, 3):
        ids = sequence.expand(batch, -1).numpy()
        mask = np.ones_like(ids)
        embeddings, _ = session.run(None, {"input_ids": ids, "attention_mask": mask})
        sizes[batch] = embeddings
    expected = export_base.padded_model(export_base.open_model(model))("text", sequence).embedding.detach().numpy()
    np.testing.assert_allclose(sizes[1], expected, atol=1e-4)
    np.testing.assert_allclose(sizes[3], np.repeat(expected, 3, 0), atol=1e-4)
    manifest = tmp_path / "run/checkpoints/step-00000000/MANIFEST.json"
    assert about["manifest_sha256"] == export_base.hash_file(manifest)


def test_torch_export_by_the_command(mmfm, tmp_path):
    model = make({**MODERN, "depth": 1}, ["image"])
    run = run_of(model, tmp_path / "run")
    first, *others = (mmfm("export", run, "--to", "torch-export", "--out", tmp_path / o) for o in ("out", "out", "run"))
    assert "image: differs from the original by at most embeddings" in output(first)
    for done in others:
        assert done.returncode == 2 and "is there already and not empty" in done.stderr
    tower = torch.export.load(tmp_path / "out/image.pt2").module()
    sequences = export_base.examples(model, "image", seed=5)[:1]
    content, mask, position = export_base.pad(sequences)
    embeddings, features = tower(content, mask, position)
    expected = model.embed_sequences("image", [sequences])
    torch.testing.assert_close(embeddings, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(features, expected[1], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
@pytest.mark.parametrize("backbone", [{**MODERN, "experts": True}, CLASSIC], ids=["modern", "classic"])
def test_all_modalities_leave(backbone, to, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    model = make(backbone, ["text", "image", "audio", "prompt"], text={"causal": True}, prompt={"count": 2})
    about = export_base.export(run_of(model, tmp_path / "run"), to, tmp_path / "out")
    assert [*about["difference"]] == ["text", "image", "audio"]


def test_what_cannot_be_done_is_said(tmp_path):
    run = run_of(make({**MODERN, "depth": 1}, ["text", "numbers"], numbers={"dims": 3}), tmp_path / "run")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="'tflite' is none of hf, onnx"):
        export_base.export(run, "tflite", out)
    with pytest.raises(UserError, match="no modality 'image' .it has: text, numbers"):
        export_base.export(run, "onnx", out, ["image"])
    with pytest.raises(UserError, match="`numbers` has no form outside"):
        export_base.export(run, "onnx", out, ["numbers"])
    with pytest.raises(UserError, match="no such run folder"):
        export_base.export(tmp_path / "none", "onnx", out)
    assert not list(tmp_path.glob("out*"))
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(UserError, match="not empty"):
        export_base.export(run, "torch-export", out)
    assert [one.name for one in out.iterdir()] == ["mine"]


def test_a_difference_is_not_published(tmp_path, monkeypatch):
    from multimodal_fm.interop import export_torch

    def wrong(source, work):
        (work / "text.pt2").write_text("")
        return export_base.Written({"text": {"inputs": 3, "features": 0.1}}, {})

    monkeypatch.setattr(export_torch, "write", wrong)
    run = run_of(make({**MODERN, "depth": 1}, ["text"]), tmp_path / "run")
    with pytest.raises(UserError, match="differs from the original by 0.1 .* nothing was written"):
        export_base.export(run, "torch-export", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run = run_of(make({**MODERN, "depth": 1}, ["text"]), tmp_path / "run")
    with pytest.raises(UserError, match=r'multimodal_fm\[onnx\]"'):
        export_base.export(run, "onnx", tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_classes": 5},
        {"num_classes": 5, "class_token": False, "global_pool": "avg", "fc_norm": False},
        {"num_classes": 0, "reg_tokens": 2, "no_embed_class": True, "init_values": 0.3, "qkv_bias": False},
        {
            "num_classes": 5,
            "pre_norm": True,
            "act_layer": "quick_gelu",
            "mlp_ratio": 2.3,
            "norm_layer": torch.nn.LayerNorm,
        },
    ],
    ids=["ViT", "no class token", "registers", "CLIP"],
)
def test_timm_there_and_back(settings, tmp_path):
    import timm
    from test_interop import close, pictures, timm_vit

    from multimodal_fm.interop.timm import from_timm

    vit, (pixels, values) = timm_vit(**settings), pictures()
    classes = [*"abcde"][: settings["num_classes"]]
    ours = from_timm(vit, classes=classes)
    about = export_base.export(run_of(ours, tmp_path / "run"), "timm", tmp_path / "out")
    assert about["difference"]["image"]["hidden"] < 1e-5
    there = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(there)
    scaled = (torch.from_numpy(pixels).double() / 255 - torch.tensor(config["mean"]).double()).permute(0, 3, 1, 2)
    scaled = (scaled / torch.tensor(config["std"]).double()[:, None, None]).float()
    with torch.no_grad():
        close(there.forward_features(scaled), vit.forward_features(values))
        if classes:
            close(there(scaled).softmax(1), vit(values).softmax(1))
    if settings.get("pre_norm"):  # whose patches have no bias
        assert about["notes"] == ["the bias of the patches was added to the positions"]
        return
    again = from_timm(there, classes=classes).state_dict()
    assert [name for name, value in ours.state_dict().items() if not torch.equal(value, again[name])] == []


def test_what_timm_and_open_clip_have_not(tmp_path):
    run = run_of(make({**MODERN, "depth": 1}, ["text", "image"]), tmp_path / "run")
    with pytest.raises(UserError, match="the model reads text, image, not pictures alone; its blocks are of this pack"):
        export_base.export(run, "timm", tmp_path / "out")
    with pytest.raises(UserError, match="two towers"):
        export_base.export(run, "open_clip", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
