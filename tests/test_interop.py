"""Hidden states of what is imported against those of Hugging Face's and timm's own classes, with random weights."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from multimodal_fm.batch import Example
from multimodal_fm.errors import UserError
from multimodal_fm.interop.hugging_face import MISSING_FOR_T5, from_hugging_face
from multimodal_fm.tokens import make_sequence

LENGTHS = (9, 3, 12, 9, 1)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}
TEXT = {**SMALL, "vocab_size": 300, "max_position_embeddings": 16}
PICTURE = {**SMALL, "image_size": 16, "patch_size": 4}
MEAN, STD = [0.48, 0.45, 0.40], [0.27, 0.26, 0.28]


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def saved(model, folder, seed=0):
    """The model with weights that are all random, none of them at the ones and zeros it starts with, on disk."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name.lower() and name.endswith("weight") else 0.2 * noise)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255})
    )
    return model.eval()


def read(model, sequences):
    """The outputs (length, D) of sequences, each a list of pieces of one modality, in one flat batch."""
    examples = [(i, Example(pieces, [None] * len(pieces))) for i, pieces in enumerate(sequences)]
    batch = model.collate({"all": examples}, {"all": {}})
    with torch.no_grad():
        tokens = model(batch).tokens
    return [tokens.content[tokens.sequence == i] for i in range(len(sequences))]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


def texts(causal=False, low=3, high=300):
    """Ids of sequences of different lengths, padded with their mask as Hugging Face wants them, and as our tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(low, high, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    sequences = []
    for row, length in zip(ids, LENGTHS):
        position = torch.zeros(length, 3)
        position[:, 0] = torch.arange(length)
        tokens = make_sequence(row[:length], position)
        sequences.append([tokens.replace(order=torch.arange(length)) if causal else tokens])
    return ids.masked_fill(~mask, 1), mask.long(), sequences


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "GPT2", "CLIPText"])
def test_text_models(hf, name, head, tmp_path):
    classes = {
        "Bert": (hf.BertModel, hf.BertForMaskedLM, hf.BertConfig, {}),
        "Roberta": (hf.RobertaModel, hf.RobertaForMaskedLM, hf.RobertaConfig, {"layer_norm_eps": 1e-5}),
        "GPT2": (hf.GPT2Model, hf.GPT2LMHeadModel, hf.GPT2Config, {"bos_token_id": 0, "eos_token_id": 0}),
        "CLIPText": (hf.CLIPTextModel, hf.CLIPTextModelWithProjection, hf.CLIPTextConfig, {"eos_token_id": 2}),
    }
    plain, with_head, config, more = classes[name]
    theirs = saved((with_head if head else plain)(config(**TEXT, **more)), tmp_path)
    ours = from_hugging_face(tmp_path)
    ids, mask, sequences = texts(causal=name in ("GPT2", "CLIPText"))
    with torch.no_grad():
        inner = theirs.base_model if head and name != "CLIPText" else theirs
        expected = inner(ids, attention_mask=mask).last_hidden_state
    for out, target, length in zip(read(ours, sequences), expected, LENGTHS):
        close(out, target[:length])
    assert not torch.equal(expected[0, 0], expected[1, 0])


def pictures(count=3, side=16):
    """Random bytes (B, side, side, 3), and what Hugging Face's image processors make of them (B, 3, side, side)."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    values = (torch.from_numpy(pixels).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return pixels, values.permute(0, 3, 1, 2).float()


def patches(model, pixels):
    return [[tokens] for picture in pixels for tokens in model.tokenizers["image"].read(picture)]


@pytest.mark.parametrize("name", ["ViT", "CLIPVision"])
def test_picture_models(hf, name, tmp_path):
    theirs = saved(getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**PICTURE)), tmp_path)
    ours, (pixels, values) = from_hugging_face(tmp_path), pictures()
    with torch.no_grad():
        output = theirs(values)
        expected = output.last_hidden_state
        if name == "CLIPVision":  # which normalizes the class token alone
            expected = theirs.post_layernorm(expected)
            close(expected[:, 0], output.pooler_output)
    close(torch.stack(read(ours, patches(ours, pixels))), expected)
    rows = ours.features(image=list(pixels))["image"]
    close(rows, expected.mean(1))


@pytest.mark.parametrize("head", [False, True])
def test_mae_with_dropped_patches(hf, head, tmp_path):
    config = hf.ViTMAEConfig(
        **PICTURE,
        mask_ratio=0.75,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    theirs = saved((hf.ViTMAEForPreTraining if head else hf.ViTMAEModel)(config), tmp_path)
    ours, (pixels, values) = from_hugging_face(tmp_path), pictures()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = (theirs.vit if head else theirs)(values, noise=noise).last_hidden_state
    kept = noise.argsort(1)[:, :4]
    assert expected.shape[1] == 5
    sequences = [[tokens.select(rows)] for (tokens,), rows in zip(patches(ours, pixels), kept)]
    close(torch.stack(read(ours, sequences)), expected)


def test_the_towers_of_clip(hf, tmp_path):
    config = hf.CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=PICTURE, projection_dim=8)
    theirs = saved(hf.CLIPModel(config), tmp_path)
    ids, mask, sequences = texts(causal=True)
    pixels, values = pictures()
    with pytest.raises(UserError, match="two towers"):
        from_hugging_face(tmp_path)
    with torch.no_grad():
        expected = theirs.text_model(ids, attention_mask=mask).last_hidden_state
        pooled = theirs.vision_model(values).pooler_output
    for out, target, length in zip(read(from_hugging_face(tmp_path, "text"), sequences), expected, LENGTHS):
        close(out, target[:length])
    ours = from_hugging_face(tmp_path, "image")
    close(torch.stack([rows[0] for rows in read(ours, patches(ours, pixels))]), pooled)


WORDS = "the quick brown fox jumps over the lazy dog, the dogs' foxes aren't quick; naïve café, 3.14 and 2026!"


def byte_level(hf, kind, folder):
    """A tokenizer of `tokenizers` with few merges, as files of GPT-2 or RoBERTa; its ids are in no order of ours."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    special = ["<|endoftext|>"] if kind == "gpt2" else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([WORDS] * 3, vocab_size=320, min_frequency=1, special_tokens=special)
    trained.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    others = np.random.default_rng(0).permutation(len(vocab) - 4) + 4 if kind == "roberta" else range(len(vocab))
    if kind == "roberta":  # whose ids are by frequency; the last one is <mask>
        names = [name for name in vocab if name not in special[:4]]
        vocab = {name: number for number, name in enumerate(special[:4])} | dict(zip(names, map(int, others)))
        (folder / "vocab.json").write_text(json.dumps(vocab))
    cls = hf.GPT2Tokenizer if kind == "gpt2" else hf.RobertaTokenizer
    return vocab, cls(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.mark.parametrize("files", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_strings_are_read_as_by_the_original(hf, kind, files, tmp_path):
    vocab, tokenizer = byte_level(hf, kind, tmp_path)
    if files == "tokenizer.json":
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "vocab.json").unlink(missing_ok=True)
        assert (tmp_path / "tokenizer.json").exists()
    settings = {**SMALL, "vocab_size": len(vocab), "max_position_embeddings": 200}
    if kind == "gpt2":
        end = vocab["<|endoftext|>"]
        theirs = saved(hf.GPT2Model(hf.GPT2Config(**settings, bos_token_id=end, eos_token_id=end)), tmp_path)
    else:
        theirs = saved(hf.RobertaModel(hf.RobertaConfig(**settings)), tmp_path)
    ours = from_hugging_face(tmp_path, tokenizer_file=tmp_path / "ours.json")
    words = [WORDS, " two  spaces\n\nand 🙂 unseen bytes", "a"]
    read_by_us = [ours.tokenizers["text"].read(one) for one in words]
    if kind == "gpt2":
        ids = [[end, *tokenizer(one)["input_ids"], end] for one in words]
        assert "mask_tokens.text" in ours.state_dict() and not ours.mask_tokens["text"].any()
    else:
        ids = [tokenizer(one)["input_ids"] for one in words]
        torch.testing.assert_close(
            ours.mask_tokens["text"], theirs.embeddings.word_embeddings.weight[vocab["<mask>"]], rtol=0, atol=0
        )
    with torch.no_grad():
        expected = [theirs(torch.tensor([one])).last_hidden_state[0] for one in ids]
    for out, target in zip(read(ours, read_by_us), expected):
        close(out, target)
    close(ours.features(text=words)["text"], torch.stack([target.mean(0) for target in expected]))
    assert ours.tokenizers["text"].decode(read_by_us[0][0].content.tolist()) == WORDS


def test_gpt2_scores_texts_as_the_original_and_is_a_run_like_any_other(hf, tmp_path):
    from multimodal_fm import objectives
    from multimodal_fm.evals.bits_per_byte import measure_bits
    from multimodal_fm.interop.base import save
    from multimodal_fm.interop.hugging_face import causal_objective
    from multimodal_fm.model import load

    vocab, tokenizer = byte_level(hf, "gpt2", tmp_path)
    end = vocab["<|endoftext|>"]
    settings = {**SMALL, "vocab_size": len(vocab), "max_position_embeddings": 200}
    theirs = saved(hf.GPT2LMHeadModel(hf.GPT2Config(**settings, bos_token_id=end, eos_token_id=end)), tmp_path)
    ours = from_hugging_face(tmp_path, tokenizer_file=tmp_path / "ours.json")
    words = [WORDS, "the dog", "🙂"]
    expected = []
    for one in words:
        ids = torch.tensor([end, *tokenizer(one)["input_ids"], end])
        with torch.no_grad():
            expected.append(nn.functional.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:], reduction="sum"))
    bits, _ = measure_bits(ours, causal_objective(ours)["text/causal"], words)
    np.testing.assert_allclose(bits * np.log(2), torch.stack(expected).numpy(), rtol=1e-5)

    save(ours, tmp_path / "run", causal_objective(ours))
    (tmp_path / "ours.json").unlink()  # the run has a copy
    again = load(tmp_path / "run", device="cpu")
    trained = objectives.load(tmp_path / "run", again)["text/causal"]
    np.testing.assert_array_equal(measure_bits(again, trained, words)[0], bits)


def test_what_cannot_be_expressed_is_refused_by_name(hf, tmp_path):
    def folder(model, name, **changed):
        (tmp_path / name).mkdir()
        saved(model, tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
        return tmp_path / name

    bert = hf.BertConfig(**TEXT)
    with pytest.raises(UserError, match="config.json cannot be read"):
        from_hugging_face(tmp_path)
    with pytest.raises(UserError, match="'nothing' is none of bert, roberta"):
        from_hugging_face(folder(hf.BertModel(bert), "kind", model_type="nothing"))
    with pytest.raises(UserError, match="activation 'silu'"):
        from_hugging_face(folder(hf.BertModel(bert), "activation", hidden_act="silu"))
    with pytest.raises(UserError, match="num_hidden_layers is a whole number from 1 to 16777216, not 'two'"):
        settings = json.loads((tmp_path / "kind/config.json").read_text()) | {"model_type": "bert"}
        (tmp_path / "kind/config.json").write_text(json.dumps({**settings, "num_hidden_layers": "two"}))
        from_hugging_face(tmp_path / "kind")
    with pytest.raises(UserError, match="no place for encoder.layer.1.attention.output.LayerNorm.bias"):
        (tmp_path / "kind/config.json").write_text(json.dumps({**settings, "num_hidden_layers": 1}))
        from_hugging_face(tmp_path / "kind")
    with pytest.raises(UserError, match="is_decoder is True, which cannot be expressed"):
        decoder = hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
        from_hugging_face(folder(hf.BertModel(decoder), "decoder"))
    with pytest.raises(UserError, match="has no tokenizer.json"):
        from_hugging_face(folder(hf.BertModel(bert), "bert"), tokenizer_file=tmp_path / "x.json")
    gpt2 = hf.GPT2Config(**TEXT, bos_token_id=0, eos_token_id=0, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx is True"):
        from_hugging_face(folder(hf.GPT2Model(gpt2), "scaled"))
    vit = folder(hf.ViTModel(hf.ViTConfig(**PICTURE)), "vit")
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="no preprocessor_config.json"):
        from_hugging_face(vit)
    (vit / "model.safetensors").unlink()
    torch.save({}, vit / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
        from_hugging_face(vit)


def test_files_as_old_programs_wrote_them(hf, tmp_path):
    """In several files, in half precision, with the names of TensorFlow's norms and with buffers."""
    from safetensors.torch import load_file, save_file

    theirs = saved(hf.BertForPreTraining(hf.BertConfig(**TEXT)), tmp_path)
    theirs.half().float()
    plain = {name: value.half() for name, value in load_file(tmp_path / "model.safetensors").items()}
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): plain[n]
        for n in plain
    }
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    (tmp_path / "model.safetensors").unlink()
    names = sorted(old)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: old[name] for name in own}, tmp_path / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(296))]))
    ours = from_hugging_face(tmp_path)
    ids, mask, sequences = texts()
    with torch.no_grad():
        expected = theirs.bert(ids, attention_mask=mask).last_hidden_state
        words = theirs.bert.embeddings.word_embeddings.weight
        hidden = theirs.bert(ids[:1].masked_fill(torch.arange(12) == 4, 3), attention_mask=mask[:1]).last_hidden_state
    for out, target, length in zip(read(ours, sequences), expected, LENGTHS):
        close(out, target[:length])
    torch.testing.assert_close(ours.mask_tokens["text"], words[3], rtol=0, atol=0)
    tokens, hide = sequences[0][0], torch.arange(9) == 4
    batch = ours.collate({"all": [(0, Example([tokens], [hide]))]}, {"all": {}})
    with torch.no_grad():
        close(ours(batch).tokens.content, hidden[0, :9])


def t5(hf, **more):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 72, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
    return hf.T5EncoderModel(hf.T5Config(**sizes, feed_forward_proj="relu", **more))


def test_t5_is_refused_and_lacks_what_is_said(hf, tmp_path):
    """Its encoder is ours once LayerNorm is exchanged for RMSNorm and the bias by relative position is taken out: these
    two, and cross attention, are what is missing."""
    from multimodal_fm.backbone import Backbone, Config

    theirs = saved(t5(hf), tmp_path)
    with pytest.raises(UserError, match="relative position; RMSNorm .* cross attention"):
        from_hugging_face(tmp_path)
    assert len(MISSING_FOR_T5) == 3
    ours = Backbone(
        Config(32, 2, 4, mlp_ratio=72 / 32, block="classic", activation="relu", norm_eps=1e-6, max_positions=16)
    )
    ours.positions.time.weight.data.zero_()  # it has no other positions than the bias
    for block, layer in zip(ours.blocks, theirs.encoder.block):
        attention, feed = layer.layer[0].SelfAttention, layer.layer[1].DenseReluDense
        q, k, v = attention.q.weight, attention.k.weight, attention.v.weight
        block.attention.project_in.weight.data = torch.cat([q * 8**0.5, k, v])  # it does not scale its scores
        block.attention.project_out.weight.data = attention.o.weight
        block.feed_forward.project_in.weight.data = feed.wi.weight
        block.feed_forward.project_out.weight.data = feed.wo.weight
        for name, norm in (("norm_1", layer.layer[0].layer_norm), ("norm_2", layer.layer[1].layer_norm)):
            setattr(block, name, nn.RMSNorm(32, eps=1e-6))
            getattr(block, name).weight.data = norm.weight
    ours.norm_out = nn.RMSNorm(32, eps=1e-6)
    ours.norm_out.weight.data = theirs.encoder.final_layer_norm.weight

    from multimodal_fm.attention import plan_attention

    ids = torch.randint(2, 300, (11,), generator=torch.Generator().manual_seed(1))
    position = torch.zeros(11, 3)
    position[:, 0] = torch.arange(11)
    tokens = make_sequence(theirs.shared.weight[ids], position)
    with torch.no_grad():
        out = ours(tokens, plan_attention(tokens)).content
        biased = theirs(ids[None]).last_hidden_state[0]
        theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
        close(out, theirs(ids[None]).last_hidden_state[0])
    assert float((out - biased).abs().max()) > 1e-2


VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}


def timm_vit(**settings):
    timm_models = pytest.importorskip("timm.models.vision_transformer")
    vit = timm_models.VisionTransformer(**VIT, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in vit.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    vit.pretrained_cfg = {"input_size": (3, 16, 16), "mean": tuple(MEAN), "std": tuple(STD)}
    return vit.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_classes": 5},
        {"num_classes": 5, "class_token": False, "global_pool": "avg", "fc_norm": False},
        {"num_classes": 5, "reg_tokens": 2, "no_embed_class": True, "init_values": 0.3, "qkv_bias": False},
        {"num_classes": 5, "pre_norm": True, "act_layer": "quick_gelu", "mlp_ratio": 2.3},
        {"num_classes": 5, "reg_tokens": 1, "proj_bias": False, "act_layer": "gelu_tanh", "dynamic_img_size": True},
    ],
    ids=["ViT", "no class token", "DeiT III", "CLIP", "registers"],
)
def test_timm(settings):
    from multimodal_fm.interop.timm import from_timm

    vit, (pixels, values) = timm_vit(**settings), pictures()
    ours = from_timm(vit, classes=[*"abcde"])
    with torch.no_grad():
        features = vit.forward_features(values)
        close(torch.stack(read(ours, patches(ours, pixels))), features)
        expected = vit(values).softmax(1)
    answers = ours.classify(list(pixels))
    found = torch.tensor([[one["probabilities"][name] for name in "abcde"] for one in answers])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert from_timm(vit).config.heads == {}
    wide = np.zeros((10, 40, 3), np.uint8)  # squeezed into the original's square
    assert [len(one) for one in ours.tokenizers["image"].read(wide)] == [16]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"qk_norm": True}, "no place for blocks.0.attn.k_norm"),
        ({"global_pool": "avg"}, "normalizes after pooling"),
        ({"norm_layer": "rmsnorm"}, "norms are not all LayerNorm"),
        ({"act_layer": "silu"}, "activation SiLU is none of"),
        ({"block_fn": "ResPostBlock"}, "block 0 is a ResPostBlock"),
    ],
)
def test_what_timm_has_beside(settings, said):
    from timm.models import vision_transformer

    from multimodal_fm.interop.timm import from_timm

    if "block_fn" in settings:
        settings = {"block_fn": getattr(vision_transformer, settings["block_fn"])}
    with pytest.raises(UserError, match=said):
        from_timm(timm_vit(**settings))


def test_a_classifier_of_another_kind_is_refused():
    from multimodal_fm.interop.timm import from_timm

    with pytest.raises(UserError, match="has 5 classes"):
        from_timm(timm_vit(num_classes=5), classes=["a", "b"])
    with pytest.raises(UserError, match="global_pool='map'"):
        from_timm(timm_vit(num_classes=2, global_pool="map"), classes=["a", "b"])
