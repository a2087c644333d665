"""What travels with a microbatch: the first pass of gradient caching, and the packed way to a device."""

import dataclasses
import functools

import pytest
import torch
from conftest import dataset_of, tiny
from test_objectives import MODALITIES, make, make_sample, seeded
from test_stream import fitted

from multimodal_fm import transfer
from multimodal_fm.batch import collate, count_targets
from multimodal_fm.config import plugin_class
from multimodal_fm.objectives import OBJECTIVES
from multimodal_fm.stream.prefetch import Prefetcher
from multimodal_fm.tokens import FILLER
from multimodal_fm.train.config import build
from multimodal_fm.train.train_step import TrainStep


def mixed_batch(tasks: dict[str, str], round_to: int = 1, **more):
    """A microbatch of tasks whose objectives are named, three samples each of all modalities or of texts."""
    examples, planners = {}, {}
    for number, (task, name) in enumerate(tasks.items()):
        cls = plugin_class(OBJECTIVES, name)
        lengths = {"text": 3 + number, "image": 4} if name == "contrastive" else {"text": 5, "audio": 2 + number}
        examples[task] = [(i, cls.arrange(cls.Config(), make_sample(i, **lengths), seeded(i))) for i in range(3)]
        planners[task] = functools.partial(cls.plan, cls.Config())
    counts = {task: count_targets([e for _, e in own], MODALITIES) for task, own in examples.items()}
    return collate(examples, MODALITIES, counts, planners, round_to, **more)


@pytest.mark.parametrize("round_to", [1, 64])
def test_the_first_pass_reads_what_is_compared_and_finds_the_same_features(round_to):
    model, objective = make("contrastive", {"experts": True})
    batch = mixed_batch({"words": "masked", "pairs": "contrastive"}, round_to, first_pass=["pairs"])
    first = batch.first_pass
    read, whole = (int((b.tokens.sequence != FILLER).sum()) for b in (first, batch))
    assert read == 3 * (4 + 4) and whole == read + 3 * (5 + 2) and len(first.tokens) % round_to == 0
    assert set(first.content) == {"text", "image"} and list(first.tasks) == ["pairs"] and first.first_pass is None
    with torch.no_grad():
        found = [objective.features(model(b), b.tasks["pairs"]) for b in (batch, first)]
    torch.testing.assert_close(*found)


def test_there_is_no_first_pass_where_all_is_compared_or_nothing_asked():
    assert mixed_batch({"pairs": "contrastive"}, first_pass=["pairs"]).first_pass is None
    assert mixed_batch({"words": "masked", "pairs": "contrastive"}).first_pass is None


def test_a_microbatch_with_nothing_to_compare_has_a_first_pass_of_one_sequence():
    model, _ = make("masked")
    batch = mixed_batch({"words": "masked", "next": "causal"}, first_pass=["pairs"])
    assert batch.first_pass.tasks == {} and 0 < len(batch.first_pass.tokens) <= 5
    assert len(model(batch.first_pass).tokens) == len(batch.first_pass.tokens)


def test_the_stream_makes_a_first_pass_for_several_microbatches_only(tmp_path, corpus):
    for microbatches in (1, 2):
        data = tiny(corpus, run_dir=str(tmp_path / "run"), microbatches=microbatches)
        batches = dataset_of(*fitted(build(data)))[0].batches
        assert len(batches) == microbatches
        for batch in batches:
            assert (batch.first_pass is None) == (microbatches == 1)
            if batch.first_pass is not None:
                assert list(batch.first_pass.tasks) == ["pairs"]


def test_a_packed_batch_is_the_same_tensors(tmp_path, corpus):
    """All that would go to a GPU, in one piece of memory: the same values, types and shapes; equal views lie once."""
    data = tiny(corpus, run_dir=str(tmp_path / "run"), microbatches=2)
    batch = dataset_of(*fitted(build(data)))[0].batches[0]
    tensors = transfer.list_tensors(batch)
    packed = transfer.Packed(tensors)
    moved = packed.unpack(packed.memory.clone())
    assert len(moved) == len(tensors) > 40
    assert all(one.dtype == own.dtype and torch.equal(one, own) for one, own in zip(moved, tensors, strict=True))
    alone = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    assert len(packed.memory) < alone + transfer.ALIGNMENT * len(tensors)
    places = dict(zip(map(id, tensors), packed.places))
    assert places[id(batch.attention.query[0])] == places[id(batch.attention.key[0])]
    rebuilt = transfer.rebuild(batch, lambda tensor: moved[[t is tensor for t in tensors].index(True)], None)
    model = TrainStep(build(data), torch.device("cpu")).model
    with torch.no_grad():
        assert torch.equal(model(rebuilt).tokens.content, model(batch).tokens.content)


def test_a_clone_lies_in_memory_of_its_own(tmp_path, corpus):
    """What was read ahead are views of a large buffer, which a deep copy would take along."""
    data = tiny(corpus, run_dir=str(tmp_path / "run"), microbatches=2)
    batch = dataset_of(*fitted(build(data)))[0].batches[0]
    buffer = torch.zeros(1 << 20, dtype=torch.uint8)

    def lay(tensor):
        place = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor) if tensor.numel() else tensor

    own = dataclasses.replace(batch, tokens=transfer.rebuild(batch.tokens, lay, None)).clone()
    sizes = [tensor.untyped_storage().nbytes() for tensor in transfer.list_tensors(own)]
    assert max(sizes) < 1 << 20
    others = [(own.tasks[name].table, batch.tasks[name].table) for name in batch.tasks]
    assert all(torch.equal(one.sample, other.sample) and one.sample is not other.sample for one, other in others)
    assert batch.first_pass is not None and own.first_pass is not batch.first_pass
    model = TrainStep(build(data), torch.device("cpu")).model
    with torch.no_grad():
        assert torch.equal(model(batch.clone()).tokens.content, model(batch).tokens.content)


def test_figures_are_read_when_they_are_asked_for():
    figures = {"loss": torch.tensor(2.5), "skipped": torch.tensor(0.0, dtype=torch.float64)}
    assert transfer.read_later(figures)() == {"loss": 2.5, "skipped": 0.0}


def test_sound_goes_in_half_precision_and_nothing_else(tmp_path, corpus):
    data = tiny(corpus, run_dir=str(tmp_path / "run"), microbatches=2)
    batch = dataset_of(*fitted(build(data)))[0].batches[0]
    halved = batch._halved()
    tensors = transfer.list_tensors(batch)
    packed = transfer.Packed(tensors, halved)
    half = [place[1] == torch.float16 for place in packed.places]
    assert sum(half) >= 2 and all(is_half == (id(t) in halved) for is_half, t in zip(half, tensors, strict=True))
    for tensor, moved in zip(tensors, packed.unpack(packed.memory), strict=True):
        assert moved.dtype == tensor.dtype
        torch.testing.assert_close(moved, tensor, rtol=1e-3, atol=1e-6)


def test_what_is_there_already_is_not_copied(tmp_path, corpus):
    batch = mixed_batch({"words": "masked", "pairs": "contrastive"}, first_pass=["pairs"])
    assert batch.to("cpu") is batch
    away = batch.to("meta")
    assert all(t.is_meta for t in transfer.list_tensors(away)) and away.first_pass.tokens.sequence.is_meta
    assert away.tasks["pairs"].table is batch.tasks["pairs"].table


@pytest.mark.gpu
def test_steps_reach_a_gpu_one_ahead(tmp_path, corpus):
    data = tiny(corpus, run_dir=str(tmp_path / "run"), microbatches=2)
    dataset = dataset_of(*fitted(build(data)))
    steps = [dataset[number] for number in range(3)]
    for step, own in zip(Prefetcher(steps, torch.device("cuda")), steps, strict=True):
        for moved, batch in zip(step.batches, own.batches, strict=True):
            for one, other in zip(transfer.list_tensors(moved), transfer.list_tensors(batch), strict=True):
                assert one.is_cuda
                torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-6)
