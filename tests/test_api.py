"""For people who bring their own loop, and for runs that start from another's weights."""

import dataclasses

import pytest
import torch
from conftest import samples, text_only, tiny

import multimodal_fm
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.train import loop
from multimodal_fm.train.config import build


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    """A short run of text alone."""
    run = tmp_path_factory.mktemp("api") / "run"
    loop.pretrain(build(text_only(corpus, run, steps=3)))
    return run


def flatten(value) -> list:
    """All tensors and numbers within a batch, in order."""
    if dataclasses.is_dataclass(value):
        return [leaf for field in dataclasses.fields(value) for leaf in flatten(getattr(value, field.name))]
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *flatten(value[key]))]
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in flatten(one)]
    return [value]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_is_what_the_run_reads(tmp_path, corpus, num_workers):
    """The same microbatches bit by bit, whoever reads them ahead."""
    data = tiny(corpus, run_dir=str(tmp_path / "run"), steps=3, microbatches=2)
    with loop.start(build(data), False, False, False) as run:
        read = [run.next_batch().microbatches for _ in range(3)]
    data |= {"run_dir": str(tmp_path / "own"), "num_workers": num_workers}
    number = 0
    for number, microbatches in enumerate(multimodal_fm.stream(build(data)), 1):
        for ours, theirs in zip(flatten(microbatches), flatten(read[number - 1]), strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert number == 3
    (last,) = multimodal_fm.stream(build(data), start=2)
    assert torch.equal(last[0].tokens.content, read[2][0].tokens.content)


def test_samples_of_a_corpus(corpus):
    found = list(multimodal_fm.samples(f"{corpus}/train-*.tar", {"color": "red"}))
    assert [sample["__key__"] for sample in found] == [f"sample{number:04d}" for number in range(0, 32, 4)]
    assert found[0]["txt"] == b"a red square number 0" and {"jpg", "json", "flac", "cls"} < found[0].keys()
    with pytest.raises(UserError, match="no file matches"):
        next(multimodal_fm.samples(f"{corpus}/none-*.tar"))


def test_features_have_gradients_and_embed_has_none(run):
    model = multimodal_fm.load(run)
    features = model.features(text=["a red square", "a blue one"])["text"]
    assert features.shape == (2, 48)
    features.square().sum().backward()
    assert model.backbone.blocks[0].attention.project_in.weight.grad.abs().sum() > 0
    vectors = model.embed(text=["a red square"])["text"]
    assert vectors.shape == (1, 32) and not vectors.requires_grad and not torch.is_inference(vectors)
    model.train()
    assert model.features(text=["a red square"])["text"].requires_grad and model.training
    with pytest.raises(UserError, match="this model reads text, not image"):
        model.features(image=["a.jpg"])


def test_init_takes_what_fits_by_name_and_says_so(run, tmp_path, corpus, capsys):
    """Other data, tasks and modalities, another width of the head; the tokenizer comes with the weights."""
    written = [{**sample, "txt": f"def f{n}(x): return x[{n}]"} for n, sample in enumerate(samples(16))]
    shards.write(tmp_path / "code.tar", written)
    data = tiny(
        corpus,
        run_dir=str(tmp_path / "new"),
        init=str(run),
        sources={"all": {"shards": f"{tmp_path}/code.tar"}},
        heads={"retrieval": {"embed_dim": 16}},
        steps=1,
        optim={"lr": 0.0},
    )
    old = data["tasks"]["words"]
    data["tasks"] = {"looks": {**old, "modalities": ["image"]}, "words": old}
    data["model"]["tokenizers"] = dict(reversed(data["model"]["tokenizers"].items()))
    folder = loop.pretrain(build(data))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("init: ")]
    before, after = (checkpoint.read_tensors(f, n) for f, n in ((checkpoint.newest(run), "ema"), (folder, "model")))
    taken = [name for name in after if name in before and before[name].shape == after[name].shape]
    assert said[0] == f"init: {len(taken)} of {len(after)} tensors of model taken from {checkpoint.newest(run)}"
    assert said[1] == "init: of another shape, starts anew: heads.retrieval.projection.text"
    assert said[2].startswith("init: new: ") and "embedders.image.project.weight" in said[2]
    assert any(line.endswith("tensors of objectives taken from " + str(checkpoint.newest(run))) for line in said)
    assert {"embedders.text.weight", "modality_vectors.text", "backbone.norm_out.weight"} <= set(taken)
    assert all(torch.equal(before[name], after[name]) for name in taken)
    assert all(torch.equal(checkpoint.read_tensors(folder, "ema")[name], after[name]) for name in after)
    copies = [f / "tokenizer-text.json" for f in (run, folder, tmp_path / "new")]
    assert len({copy.read_bytes() for copy in copies}) == 1
    assert checkpoint.read_data(folder, "model")["tokenizers"]["text"]["file"] == str(copies[-1])
    assert loop.pretrain(build({**data, "steps": 2}), resume=True).name == "step-00000002"


def test_init_from_nowhere_is_refused_before_anything_is_written(tmp_path, corpus):
    with pytest.raises(UserError, match="no such run folder"):
        loop.pretrain(build(text_only(corpus, tmp_path / "run", init=str(tmp_path / "none"))))
