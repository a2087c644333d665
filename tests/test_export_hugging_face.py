"""Runs as folders of Hugging Face and sentence-transformers: the same outputs there, and the way back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_export import MODERN, make, run_of
from test_interop import PICTURE, SMALL, TEXT, WORDS, byte_level, close, pictures, saved, texts

from multimodal_fm.config import build, to_data
from multimodal_fm.interop.base import save
from multimodal_fm.interop.export_base import export
from multimodal_fm.interop.exported.processing_multimodal_fm import MultimodalFMProcessor
from multimodal_fm.interop.hugging_face import from_hugging_face
from multimodal_fm.model import Model, ModelConfig
from multimodal_fm.tokenizers import image, text


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


@pytest.fixture(scope="module")
def exported(hf, tmp_path_factory):
    """A model of three modalities with a class token that reads strings, and its folder."""
    folder = tmp_path_factory.mktemp("exported")
    learned = text.Tokenizer(text.Config(vocab_size=300, max_tokens=24)).fit([{"txt": WORDS.encode()}], folder / "t")
    backbone = {**MODERN, "experts": True}
    model = make(backbone, ["text", "image", "audio", "prompt"], prompt={"count": 1}, text={"file": learned.file})
    about = export(run_of(model, folder / "run"), "hf", folder / "out")
    return model, folder / "out", about


PHRASES = ["the quick fox", "a <|end|> b<|begin|>", "naïve 🙂"]  # that spell no special token
PIXELS = [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate([(20, 30), (9, 50)])]
WAVES = [np.random.default_rng(i).standard_normal(length).astype(np.float32) for i, length in enumerate([900, 2400])]


def expected(model):
    return model.embed(text=PHRASES, image=PIXELS, audio=[(wave, 8000) for wave in WAVES])


def test_a_folder_with_code_of_its_own(hf, exported):
    model, folder, about = exported
    theirs = hf.AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = hf.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    given = {"text": processor(text=PHRASES), "image": processor(images=PIXELS)}
    given["audio"] = processor(audio=WAVES, sampling_rate=8000)
    for modality, wanted in expected(model).items():
        with torch.no_grad():
            found = getattr(theirs, f"get_{modality}_features")(**given[modality])
            same = theirs(**given[modality])
        torch.testing.assert_close(found.pooler_output, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(same.pooler_output, wanted, rtol=0, atol=1e-5)
        assert about["difference"][modality]["embeddings"] < 1e-5
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(PHRASES[1])["input_ids"] == model.tokenizers["text"].read(PHRASES[1])[0].content.tolist()
    assert len(tokenizer(WORDS * 9, truncation=True)["input_ids"]) == 24
    with pytest.raises(ValueError, match="8000 samples a second, not 44100"):
        processor(audio=WAVES, sampling_rate=44100)


def test_the_code_needs_nothing_of_this_package(exported):
    code = [file.read_text() for file in Path(exported[1]).glob("*.py")]
    assert len(code) == 4 and not any("import multimodal_fm" in one or "from .." in one for one in code)


@pytest.mark.slow
def test_sentence_transformers_read_all_modalities(hf, exported):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, folder, _ = exported
    theirs = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    wanted = expected(model)
    np.testing.assert_allclose(theirs.encode(PHRASES), wanted["text"], atol=1e-5)
    np.testing.assert_allclose(theirs.encode([Image.fromarray(one) for one in PIXELS]), wanted["image"], atol=1e-5)
    sounds = [{"array": wave, "sampling_rate": 8000} for wave in WAVES]
    np.testing.assert_allclose(theirs.encode(sounds), wanted["audio"], atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"enlarge": True}, {"square": True}, {"square": True, "enlarge": True}])
def test_pictures_are_cut_as_here(hf, settings):
    ours = image.Tokenizer(image.Config(patch=4, max_tokens=30, **settings))
    of = {"patch": 4, "max_tokens": 30, "enlarge": False, "square": False, **settings}
    processor = MultimodalFMProcessor(modalities={"image": of})
    draw = np.random.default_rng(0)
    for height, width in draw.integers(1, 90, (12, 2)):
        pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
        (tokens,) = ours.read(pixels)
        content, position = processor.read_picture(pixels)
        assert torch.equal(content, tokens.content) and torch.equal(position.float(), tokens.position)
    clear = Image.fromarray(draw.integers(0, 256, (9, 14, 4), np.uint8), "RGBA")
    assert torch.equal(processor.read_picture(clear)[0], ours.read(clear)[0].content)


def round_trip(ours, folder, **how):
    """The run of a model, its export, and what is imported from that."""
    save(ours, folder / "run")
    about = export(folder / "run", "hf", folder / "out")
    again = from_hugging_face(folder / "out", **how)
    return about, again


def assert_equal(ours, again):
    own, others = ours.state_dict(), again.state_dict()
    assert own.keys() == others.keys()
    assert [name for name, value in own.items() if not torch.equal(value, others[name])] == []


@pytest.mark.parametrize("name", ["Bert", "GPT2", "CLIPText"])
def test_texts_there_and_back(hf, name, tmp_path):
    more = {"Bert": {}, "GPT2": {"bos_token_id": 0, "eos_token_id": 0}, "CLIPText": {"eos_token_id": 2}}[name]
    theirs = saved(getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**TEXT, **more)), tmp_path)
    ours = from_hugging_face(tmp_path)
    about, again = round_trip(ours, tmp_path)
    assert_equal(ours, again)
    assert about["difference"]["text"]["hidden"] < 1e-5 and "texts are given as ids" in about["notes"][0]
    ids, mask, _ = texts()
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask).last_hidden_state[mask != 0]
        found = hf.AutoModel.from_pretrained(tmp_path / "out").eval()(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask != 0], wanted, rtol=0, atol=1e-5)
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_strings_there_and_back(hf, kind, tmp_path):
    vocab, tokenizer = byte_level(hf, kind, tmp_path)
    settings = {**SMALL, "vocab_size": len(vocab), "max_position_embeddings": 60}
    if kind == "gpt2":
        end = vocab["<|endoftext|>"]
        theirs = hf.GPT2Model(hf.GPT2Config(**settings, bos_token_id=end, eos_token_id=end))
    else:
        theirs = hf.RobertaModel(hf.RobertaConfig(**settings))
    saved(theirs, tmp_path)
    ours = from_hugging_face(tmp_path, tokenizer_file=tmp_path / "ours.json")
    about, again = round_trip(ours, tmp_path, tokenizer_file=tmp_path / "again.json")
    assert_equal(ours, again)
    assert about["difference"]["text"]["hidden"] < 1e-5
    words = [WORDS[:60], "a 🙂 fox</s>"]
    read_there = hf.AutoTokenizer.from_pretrained(tmp_path / "out")(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = hf.AutoModel.from_pretrained(tmp_path / "out").eval()(**read_there).last_hidden_state
    mask = read_there["attention_mask"][..., None]
    close((hidden * mask).sum(1) / mask.sum(1), ours.features(text=words)["text"].detach())


@pytest.mark.slow
@pytest.mark.parametrize("projected", [False, True])
def test_sentence_transformers_pool_and_project(hf, projected, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    vocab, _ = byte_level(hf, "roberta", tmp_path)
    settings = {**SMALL, "vocab_size": len(vocab), "max_position_embeddings": 60}
    saved(hf.RobertaModel(hf.RobertaConfig(**settings)), tmp_path)
    ours = from_hugging_face(tmp_path, tokenizer_file=tmp_path / "ours.json")
    if projected:
        heads = {"retrieval": {"embed_dim": 16}}
        whole = Model(build(ModelConfig, {**to_data(ours.config), "heads": heads})).eval()
        whole.load_state_dict(ours.state_dict(), strict=False)
        ours = whole
    save(ours, tmp_path / "run")
    export(tmp_path / "run", "hf", tmp_path / "out")
    words = [WORDS[:60], "a 🙂 fox</s>"]
    wanted = ours.embed(text=words)["text"] if projected else ours.features(text=words)["text"].detach()
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(words)
    np.testing.assert_allclose(theirs, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["ViT", "CLIPVision"])
def test_pictures_there_and_back(hf, name, tmp_path):
    saved(getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**PICTURE)), tmp_path)
    ours, (pixels, _) = from_hugging_face(tmp_path), pictures()
    about, again = round_trip(ours, tmp_path)
    if name == "ViT":
        assert_equal(ours, again)
    else:  # whose patches have no bias: what our normalization of pixels needs of it is in the positions
        assert "added to the positions" in about["notes"][0]
    close(again.features(image=list(pixels))["image"], ours.features(image=list(pixels))["image"].detach())
    assert about["difference"]["image"]["hidden"] < 1e-5
    kept = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert kept["image_mean"] == [0.5] * 3
