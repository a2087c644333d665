"""Latent targets: the formula, who the teacher is, masks, and runs that have one."""

import functools
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import dataset_of, losses, records, text_only, tiny
from test_stream import torchrun
from test_train import fit

from multimodal_fm import config
from multimodal_fm.backbone import Config as BackboneConfig
from multimodal_fm.batch import Example, Sample, collate, count_targets, with_counts
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.model import Model, ModelConfig
from multimodal_fm.objectives import latent
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.tokenizers.base import find_prompt
from multimodal_fm.tokens import make_sequence
from multimodal_fm.train import loop
from multimodal_fm.train.config import build
from multimodal_fm.train.guards import matches
from multimodal_fm.train.learner import read_teacher
from multimodal_fm.train.train_step import TrainStep

MODALITIES = ["text", "audio", "start"]
CPU, DECODER = torch.device("cpu"), BackboneConfig(width=24, depth=1, num_heads=2)


def make_sample(**lengths) -> Sample:
    tokens = {}
    for modality, n in lengths.items():
        position = torch.zeros(n, 3)
        position[:, 0 if modality == "text" else 1] = torch.arange(n)
        content = torch.randint(2, 300, (n,)) if modality == "text" else torch.randn(n, 32).double()
        tokens[modality] = make_sequence(content, position, MODALITIES.index(modality))
    return Sample(tokens)


def make_model(seed: int) -> Model:
    torch.manual_seed(seed)
    tokenizers = {
        "text": {"vocab_size": 300},
        "audio": {"patch_frames": 4, "n_mels": 8, "patch_mels": 8},
        "start": {"tokenizer": "prompt"},
    }
    backbone = {"width": 24, "depth": 3, "num_heads": 2}
    return Model(config.build(ModelConfig, {"tokenizers": tokenizers, "backbone": backbone})).double()


def collate_with(model, objective, samples, prompt: bool):
    examples = [objective.arrange(objective.config, s, torch.Generator().manual_seed(i)) for i, s in enumerate(samples)]
    plan = {"task": functools.partial(objective.plan, objective.config)}
    counts = {"task": count_targets(examples, MODALITIES)}
    first = find_prompt(model.tokenizers) if prompt else None
    return examples, collate({"task": list(enumerate(examples))}, MODALITIES, counts, plan, 16, prompt=first)


def normalized(state: torch.Tensor, norm: str) -> torch.Tensor:
    """State (N, D) of one sequence in plain terms."""
    if norm == "none":
        return state
    axis = 0 if norm == "instance" else 1
    return (state - state.mean(axis, keepdim=True)) / (state.var(axis, correction=0, keepdim=True) + 1e-5).sqrt()


def slow_targets(teacher, sample, layers: int, norms: dict, prompt: bool) -> dict[str, torch.Tensor]:
    """What is to be predicted at each token (N, D), by modality, each sequence read alone, states by hooks."""
    found = {}
    for modality, tokens in sample.tokens.items():
        states: list[torch.Tensor] = []
        hooks = [
            b.register_forward_hook(lambda *call, states=states: states.append(call[2]))
            for b in teacher.backbone.blocks
        ]
        first = find_prompt(teacher.tokenizers) if prompt else None
        examples = {"alone": [(0, Example([tokens], [None]))]}
        teacher(collate(examples, MODALITIES, {"alone": {}}, prompt=first))
        for hook in hooks:
            hook.remove()
        whole = torch.stack([normalized(state, norms[modality]) for state in states[-layers:]]).mean(0)
        found[modality] = whole[1:] if prompt else whole
    return found


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"hide": "replace", "target_norm": "layer", "average_layers": 2, "loss_beta": 0.5},
        {"num_masks": 3, "target_norm": {"text": "layer"}, "decoder": DECODER},
        {"num_masks": 2, "hide": "replace", "target_norm": "none", "average_layers": 1},
    ],
    ids=["replace", "drop", "plain"],
)
def test_the_loss_is_the_formula_over_a_teacher_that_reads_each_sequence_alone(settings, prompt):
    model, teacher = make_model(0), make_model(1)
    objective = latent.Objective(latent.Config(**settings), model, ["text", "audio"]).double()
    samples = [make_sample(text=9, audio=6), make_sample(audio=12), make_sample(text=5)]
    examples, batch = collate_with(model, objective, samples, prompt)
    output, targets = model(batch), batch.tasks["task"]
    output.teacher = read_teacher(teacher, batch, torch.nn.ModuleDict({"own": objective}))
    loss, figures = objective.loss(output, targets)

    drop, beta = objective.config.hide == "drop", objective.config.loss_beta
    decoded = objective.decode(output, targets) if drop else None
    norm = objective.config.target_norm
    norms = {m: norm.get(m, "instance") if isinstance(norm, dict) else norm for m in ("text", "audio")}
    wanted = [slow_targets(teacher, s, objective.teacher_layers, norms, prompt) for s in samples]
    expected = []
    for modality in ("text", "audio"):
        answers = decoded[modality] if drop else output.tokens.content[targets.rows[modality]]
        predicted, errors, rows = objective.predictors[modality](answers), [], []
        for sample, example, own in zip(samples, examples, wanted, strict=True):
            for piece in example.targets:
                if MODALITIES[int(piece.modality[0])] == modality:
                    places = sample.tokens[modality].position
                    rows += [own[modality][(places == at).all(1).nonzero()[0, 0]] for at in piece.position]
        assert len(rows) == len(predicted) == targets.counts[modality]
        for one, right in zip(predicted, rows, strict=True):
            gap = (one - right).abs()
            errors.append((torch.where(gap < beta, gap**2 / (2 * beta), gap - beta / 2) if beta else gap**2).mean())
        expected.append(torch.stack(errors).mean())
        std = torch.stack(rows).std(0, correction=0).mean().detach()
        assert float(figures[f"{modality}_target_std"]) == pytest.approx(float(std), abs=1e-9)
    assert float(loss.detach()) == pytest.approx(float(sum(expected).detach() / 2), abs=1e-9)
    loss.backward()
    assert all(weight.grad is None for weight in teacher.parameters())


def test_fused_modalities_are_read_as_one_sequence_by_both():
    settings = latent.Config(fuse=True, hide="replace", num_masks=2)
    example = latent.Objective.arrange(settings, make_sample(audio=4, text=5), torch.Generator().manual_seed(0))
    assert [int(p.sequence[0]) for p in example.inputs] == [0, 0, 1, 1]
    assert [int(p.sequence[0]) for p in example.teacher] == [0, 0]
    assert example.teacher[1].position[0, 0] > example.teacher[0].position[:, 0].max()
    whole = torch.cat([p.position for p in example.teacher])
    for piece, rows in zip(example.targets, example.teacher_rows, strict=True):
        assert torch.equal(whole[rows], piece.position)


@pytest.mark.parametrize("hide", ["drop", "replace"])
def test_masks_of_a_sample_differ_and_hide_the_ratio(hide):
    settings = latent.Config(hide=hide, mask_ratio={"text": 0.4}, num_masks=4)
    example = latent.Objective.arrange(settings, make_sample(text=50), torch.Generator().manual_seed(0))
    rows = [tuple(rows.tolist()) for rows in example.teacher_rows]
    assert len(set(rows)) == 4 and all(len(own) == 20 for own in rows) and len(example.teacher) == 1
    assert [int(piece.sequence[0]) for piece in example.inputs] == [0, 1, 2, 3]
    if hide == "replace":
        assert all(sorted(hidden.nonzero()[:, 0].tolist()) == list(own) for hidden, own in zip(example.hidden, rows))


@pytest.mark.parametrize("key", ["mask_block", "keep_block"])
def test_blocks_hide_neighbors_together_in_exactly_the_ratio(key):
    grid = torch.tensor([[0.0, r, c] for r, c in itertools.product(range(8), range(8))])
    sample = Sample({"audio": make_sequence(torch.zeros(64, 32), grid, 1)})

    def neighbors(**settings) -> float:
        """How many of the four neighbors of a hidden (or with keep_block of a visible) patch are hidden (visible)."""
        total = 0.0
        for seed in range(20):
            made = latent.Config(mask_ratio=0.5, **settings)
            example = latent.Objective.arrange(made, sample, torch.Generator().manual_seed(seed))
            assert len(example.targets[0]) == 32
            places = (example.inputs if key == "keep_block" else example.targets)[0].position
            total += float((torch.cdist(places, places, p=1) == 1).sum()) / len(places) / 20
        return total

    assert neighbors(**{key: 3}) > neighbors() + 0.4


def latent_config(corpus, tmp_path, **changes) -> dict:
    """A run of all that reads a sample more than once: a teacher, views, and second samples."""
    source = {"sources": {"all": 1}}
    decoder = {"width": 24, "depth": 1, "num_heads": 2}
    tasks = {
        "latent": {
            "objectives": {"latent": {"num_masks": 2, "decoder": decoder}},
            "modalities": ["text", "image", "audio"], "batch_size": 4, **source,
        },
        "words": {
            "objectives": {"latent": {"hide": "replace", "target_norm": "layer"}},
            "modalities": ["text"], "batch_size": 4, **source,
        },
        "views": {
            "objectives": {"contrastive": {"views": 2, "drop_ratio": {"text": 0.2}}},
            "modalities": ["text", "image"], "batch_size": 6, **source,
        },
        "bert": {"objectives": {"masked": {}, "pair": {}}, "modalities": ["text"], "batch_size": 4, **source},
        "match": {
            "objectives": {"masked": {"fuse": True}, "pair": {"kind": "matching", "pool": "mean"}},
            "modalities": ["image", "text"], "batch_size": 4, **source,
        },
    }  # fmt: skip
    sources = {"all": {"shards": f"{corpus}/train-*.tar", "validation": f"{corpus}/validation-*.tar"}}
    backbone = {"width": 24, "depth": 2, "num_heads": 2}
    data = tiny(corpus, run_dir=str(tmp_path / "run"), tasks=tasks, sources=sources, backbone=backbone, steps=4)
    return {**data, "save_every": 2, **changes}


def test_a_run_goes_on_bit_for_bit_with_a_teacher_views_and_second_samples(tmp_path, corpus):
    data = latent_config(corpus, tmp_path, validate_every=4, validation_steps=1)
    loop.pretrain(build(data))
    run = tmp_path / "run"
    before, newest = losses(run), checkpoint.newest(run)
    held_out = next(row for row in records(run) if "validation/loss" in row)
    weights = checkpoint.read_tensors(newest, "ema")
    shutil.rmtree(newest)
    loop.pretrain(build({**data, "num_workers": 1}), resume=True)
    assert losses(run) == before and len(before) == 4
    assert next(row for row in records(run) if "validation/loss" in row) == held_out
    again = checkpoint.read_tensors(checkpoint.newest(run), "ema")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    figures = set(before[4])
    assert {"loss/latent/latent/audio_target_std", "loss/bert/pair/accuracy", "loss/bert/masked/text"} <= figures
    assert {"loss/views/contrastive/image_image_accuracy", "loss/match/pair/accuracy"} <= figures
    page = (Path(__file__).parent.parent / "docs" / "runs.md").read_text()
    watched = [one for one in re.findall(r"figure: (loss/[^,]+),", page) if "codebook" not in one]
    assert len(watched) == 4 and all(any(matches(figure, one) for figure in figures) for one in watched), watched
    assert {f"validation/loss/{name}" for name in ("latent/latent", "match/pair", "views/contrastive")} <= set(held_out)


@pytest.fixture
def make_step(tmp_path, corpus):
    """Makes train steps over the tasks named, and a step's microbatches."""

    def make(*names, device=CPU, **changes):
        data = latent_config(corpus, tmp_path, **changes)
        data["tasks"] = {name: data["tasks"][name] for name in names or data["tasks"]}
        made, corpora = fit(data, tmp_path)
        step = dataset_of(made, corpora)[0]
        return TrainStep(made, device), [with_counts(batch, step.counts) for batch in step.batches]

    return make


def test_the_teacher_is_the_averaged_model_and_does_not_learn(make_step):
    step, batches = make_step("latent", ema_decay=0.5)
    report = []
    for change in (False, True):
        if change:
            with torch.no_grad():
                step.ema["model"].embedders["text"].weight.normal_()
        output = step.model(batches[0])
        output.teacher = read_teacher(step.ema["model"], batches[0], step.objectives)
        report.append(step.objectives["latent/latent"].loss(output, batches[0].tasks["latent"])[0])
    assert abs(report[0] - report[1]) > 1e-6
    before = {name: tensor.clone() for name, tensor in step.ema.state_dict().items()}
    assert float(step(100, batches)["loss"]) == pytest.approx(float(report[1].detach()), rel=1e-6)
    for name, now in step.ema.state_dict().items():
        torch.testing.assert_close(now, (before[name] + step.trained.state_dict()[name]) / 2)
    assert all(weight.grad is None and not weight.requires_grad for weight in step.ema.parameters())


def test_microbatches_give_the_same_step(make_step):
    reports, gradients = [], []
    for microbatches in (1, 3):
        step, batches = make_step(microbatches=microbatches, optim={"lr": 0.0, "grad_clip": 0.0})
        assert len(batches) == microbatches
        reports.append({name: float(value) for name, value in step(0, batches).items() if "_std" not in name})
        gradients.append([weight.grad.clone() for weight in step.parameters])
    assert reports[1] == pytest.approx(reports[0], rel=1e-4, abs=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_runs_on_the_meta_device(make_step, microbatches):
    step, batches = make_step(device=torch.device("meta"), microbatches=microbatches, round_to=64)
    assert all(len(batch.teacher.tokens) % 64 == 0 for batch in batches if batch.teacher)
    report = step(0, batches)
    assert {"loss/latent/latent/image_prediction_std", "loss/match/pair"} <= report.keys()
    assert all(value.is_meta for value in report.values())


def test_a_representation_without_its_guard_collapses_and_the_figure_shows_it(tmp_path, corpus):
    """A teacher that is the model itself, and targets normalized token by token, are soon the same for every token;
    normalized over the tokens of each sequence they cannot be."""
    last = {}
    for norm in ("layer", "instance"):
        decoder = {"width": 16, "depth": 1, "num_heads": 2}
        objectives = {"latent": {"mask_ratio": 0.5, "target_norm": norm, "decoder": decoder}}
        task = {"objectives": objectives, "modalities": ["text"], "batch_size": 8, "sources": ["all"]}
        data = text_only(
            corpus, tmp_path / norm, tasks={"t": task}, backbone={"width": 16, "depth": 2, "num_heads": 2},
            steps=50, save_every=50, ema_decay=0.0, optim={"lr": 0.01, "warmup_steps": 3},
        )  # fmt: skip
        loop.pretrain(build(data))
        if norm == "layer":  # a monitor ends the same run while its targets still differ
            monitor = {"figure": "loss/*/latent/*_target_std", "below": 0.3, "patience": 2, "action": "stop"}
            with pytest.raises(UserError, match=r"monitor collapse: .*text_target_std .* is below 0.3.*checkpoint: "):
                loop.pretrain(build({**data, "run_dir": str(tmp_path / "watched"), "monitors": {"collapse": monitor}}))
            assert len(losses(tmp_path / "watched")) < 45
        rows = losses(tmp_path / norm)
        last[norm] = [rows[step]["loss/t/latent/text_target_std"] for step in (1, 50)]
    assert last["layer"][0] > 0.5 and last["layer"][1] < 0.2 < 0.8 < min(last["instance"])


def test_more_blocks_than_there_are_cannot_be_averaged(tmp_path, corpus):
    task = {
        "objectives": {"latent": {"average_layers": 3}},
        "modalities": ["text"],
        "batch_size": 4,
        "sources": ["all"],
    }
    backbone = {"width": 16, "depth": 2, "num_heads": 2}
    with pytest.raises(UserError, match="average_layers=3 of a backbone of 2 blocks"):
        loop.pretrain(build(text_only(corpus, tmp_path, tasks={"t": task}, backbone=backbone)))


@pytest.mark.slow
def test_two_ranks_give_the_same_losses(tmp_path, corpus):
    data = latent_config(corpus, tmp_path, microbatches=2, log_samples=True)
    loop.pretrain(build(data))
    (tmp_path / "two.yaml").write_text(json.dumps({**data, "run_dir": str(tmp_path / "two")}))
    done = torchrun(2, "pretrain", tmp_path / "two.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert records(tmp_path / "two", "samples") == records(tmp_path / "run", "samples")
    one, two = losses(tmp_path / "run"), losses(tmp_path / "two")
    for step, row in one.items():
        for name, value in row.items():
            abs = 0.17 if name.endswith("accuracy") else 2e-3  # a tie may turn, of which there are six pairs
            assert two[step][name] == pytest.approx(value, rel=2e-3, abs=abs), (step, name)


@pytest.mark.parametrize("augment", [True, False])
def test_views_of_a_sample_are_drawn_apart_and_are_the_same_each_time(tmp_path, corpus, augment):
    """Windows of long texts. Without augmentation the first view is the text's beginning, the second still random."""
    made = [{"__key__": f"s{i}", "txt": " ".join(str(number) for number in range(i, 400))} for i in range(12)]
    shards.write(tmp_path / "long.tar", made)
    task = {"objectives": {"contrastive": {"views": 2}}, "modalities": ["text"], "batch_size": 6, "sources": ["all"]}
    data = text_only(corpus, tmp_path, sources={"all": {"shards": f"{tmp_path}/long.tar"}}, tasks={"views": task})
    stream = dataset_of(*fit(data, tmp_path), augment=augment)
    met = set()
    for step in range(3):
        [batch], [again] = stream[step].batches, stream[step].batches
        assert torch.equal(batch.content["text"], again.content["text"])
        content = batch.content["text"][batch.tokens.content]
        rows = [tuple(content[batch.tokens.sequence == n].tolist()) for n in batch.tasks["views"].sequence]
        assert len(rows) == 12 and batch.tasks["views"].table.sample.tolist() == [i for i in range(6) for _ in "ab"]
        assert all(first != second for first, second in zip(rows[::2], rows[1::2], strict=True))
        met.update(rows[1::2])
    assert len(met) > 15  # each sample and epoch draws its own
