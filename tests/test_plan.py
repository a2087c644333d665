"""A plan: what it says of a step is what a step does."""

import dataclasses
import json

import pytest
import torch
from conftest import text_only, tiny
from test_train import fit, make_stream
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from multimodal_fm import cli
from multimodal_fm.batch import with_counts
from multimodal_fm.errors import UserError
from multimodal_fm.reports.plan import render
from multimodal_fm.run_dir import checkpoint
from multimodal_fm.stream.tasks import build_stream
from multimodal_fm.train import calibrate, loop
from multimodal_fm.train.config import build
from multimodal_fm.train.plan import plan
from multimodal_fm.train.trace import _Watch, held_bytes, trace
from multimodal_fm.train.train_step import TrainStep

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def step(corpus, tmp_path_factory):
    """A configuration of all kinds of objectives, and the microbatches of a step."""
    folder = tmp_path_factory.mktemp("plan")
    config, corpora = fit(tiny(corpus, run_dir=str(folder), optim={"name": "muon"}), folder)
    data = build_stream(config.tasks, corpora, config.model.tokenizers, heads=config.model.heads)[0]
    return config, [with_counts(batch, data.counts) for batch in data.batches]


def test_parameters_and_bytes_are_those_of_the_built_model(step):
    config, batches = step
    traced, built = trace(config, batches), TrainStep(config, CPU)
    built(0, batches)
    assert sum(traced.parameters.values()) == sum(weight.numel() for weight in built.trained.parameters())
    assert traced.parameters["backbone"] == sum(weight.numel() for weight in built.model.backbone.parameters())
    assert traced.trainable == sum(weight.numel() for weight in built.parameters)
    held = held_bytes(built)
    assert traced.update["gradients"] == held.pop("gradients") and traced.held == held
    tensors = built.tensors()
    assert traced.files == {
        name: sum(one.numel() * one.element_size() for one in own.values()) for name, own in tensors.items()
    }


def test_flops_are_those_that_torch_counts_in_a_real_step(corpus, tmp_path):
    """Attention aside, whose kernel on a CPU has no formula: two products forward and four backward."""
    config, corpora = fit(text_only(corpus, tmp_path, optim={"name": "muon"}), tmp_path)
    [batch] = make_stream(config, corpora)[0].batches
    batch = with_counts(batch, {"words": {"text": 10}})
    traced, built = trace(config, [batch]), TrainStep(config, CPU)
    with FlopCounterMode(display=False) as counter:
        built(0, [batch])
    pairs = sum(group.count * group.num_queries * group.num_keys for group in batch.attention.groups)
    backbone = config.model.backbone
    attention = 6 * 2 * pairs * backbone.width * backbone.depth
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if "scaled_dot_product" not in name)
    # a sum over columns is a product in some of the CPU's own functions, and not on the meta device
    assert traced.flops + traced.update_flops == pytest.approx(products + attention, rel=1e-3)
    assert 0 < traced.update_flops < products  # Muon's


@pytest.mark.parametrize("microbatches, keep", [(1, "none"), (2, "none"), (1, "full")])
def test_the_peak_is_that_of_the_allocator(corpus, tmp_path, microbatches, keep):
    changes = {"microbatches": microbatches, "activation_checkpointing": keep, "run_dir": str(tmp_path)}
    config, corpora = fit(tiny(corpus, backbone={"width": 48, "depth": 4, "num_heads": 2}, **changes), tmp_path)
    data = make_stream(config, corpora)[0]
    batches = [with_counts(batch, data.counts) for batch in data.batches]
    built = TrainStep(config, CPU)
    built(0, batches)
    gradients = held_bytes(built)["gradients"]
    built.trained.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        built(1, batches)
    file = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    allocated = [event["args"]["Total Allocated"] for event in events]
    traced = trace(config, batches)
    content = sum(one.numel() * one.element_size() for batch in batches for one in batch.content.values())
    peak = sum(traced.peak.values()) - content  # a CPU's batch is not moved
    assert gradients > 0 and peak == pytest.approx(max(allocated) - allocated[0], rel=0.1)


def test_what_is_freed_is_no_longer_counted():
    watch = _Watch(half=False)
    with watch:
        kept = torch.empty(10, device="meta")
        for _ in range(3):
            gone = torch.empty(100, device="meta") + 1
        del gone
    assert sum(watch.live.values()) == kept.numel() * 4
    assert watch.most == (10 + 2 * 100 + 100) * 4  # the one before lives until its name is taken


def test_half_precision_takes_half_of_what_products_make(step):
    config, batches = step
    full, half = (trace(dataclasses.replace(config, precision=p), batches) for p in ("float32", "bfloat16"))
    assert half.held == full.held and half.flops == full.flops
    assert 0.4 < half.peak["activations"] / full.peak["activations"] < 0.95


def test_a_named_accelerator_is_planned_from_any_machine(corpus, tmp_path, write_plan_config):
    made = plan(write_plan_config(precision="bfloat16", microbatches=2), gpus=2, kind="h100")
    assert json.loads(json.dumps(made)) == made
    assert sum(made["memory"]["parts"].values()) == made["memory"]["total"] and made["memory"]["fits"]
    assert sum(made["parameters"]["by_part"].values()) == made["parameters"]["total"]
    assert made["time"]["step"] == max(made["time"]["parts"].values())
    assert made["time"]["hours"] == pytest.approx(made["time"]["step"] * 12 / 3600)
    assert made["device"]["tflops"] == 989 and any("assumed" in line for line in made["assumptions"])
    assert made["step"]["samples"] == 4 and made["corpus"]["sources"][0]["samples"] == 32
    row = made["corpus"]["sources"][0]
    assert row["visits"] == 48 and made["corpus"]["run_tokens"] == pytest.approx(made["step"]["tokens"] * 12, abs=12)
    faster = plan(write_plan_config(precision="bfloat16", microbatches=2), gpus=2, kind="h100", utilization=0.8)
    assert faster["time"]["parts"]["compute"] < made["time"]["parts"]["compute"]
    text = render(made)
    assert "2 x H100 SXM" in text and "it fits" in text and "the bottleneck" in text


@pytest.fixture
def write_plan_config(corpus, tmp_path):
    """Writes the text-only configuration with changes; returns the file's name."""
    import yaml

    def write(**changes) -> str:
        path = tmp_path / "planned.yaml"
        path.write_text(yaml.safe_dump(text_only(corpus, tmp_path / "run", **changes)))
        return str(path)

    return write


@pytest.mark.parametrize(
    "options, said",
    [
        ({"kind": "h10"}, "--kind 'h10' is not known: did you mean h100?"),
        ({"kind": "tpu"}, "there are auto, cpu, b200"),
        ({"gpus": 0}, "--gpus 0: is at least 1"),
        ({"gpus": 8}, "--gpus 8: one device of this machine is measured; say which they are, as in --kind h100"),
        ({"utilization": 2.0, "kind": "h100"}, "is a share from 0 to 1"),
    ],
)
def test_what_cannot_be_planned_is_a_line(write_plan_config, options, said):
    with pytest.raises(UserError) as caught:
        plan(write_plan_config(), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_shards_that_do_not_divide_the_devices_are_refused_before_anything_is_read(write_plan_config):
    path = write_plan_config(parallel={"kind": "hsdp", "shard_size": 8}, sources={"all": {"shards": "none-*.tar"}})
    with pytest.raises(UserError, match="shard_size=8 does not divide the 12 ranks"):
        plan(str(path), gpus=12, kind="h100")


def test_a_plan_writes_nothing(write_plan_config, tmp_path):
    path = write_plan_config()
    plan(path, kind="l4")
    assert [one.name for one in tmp_path.iterdir()] == ["planned.yaml"]


@pytest.mark.slow
def test_this_machine_is_measured_and_a_run_is_compared(write_plan_config, tmp_path, capsys):
    config = build(text_only(tmp_path, tmp_path / "run"))
    assert calibrate.with_depth(config, 1).model.backbone.depth == 1
    from multimodal_fm.train.config import load

    path = write_plan_config()
    made = plan(path, kind="cpu")
    assert made["memory"]["parts"]["framework"] > 1e8 and made["time"]["step"] > 0
    loop.pretrain(load(path))
    compared = plan(str(tmp_path / "run"), kind="cpu")
    assert compared["measured"]["steps"] == 12 and compared["steps"] == 12
    assert compared["memory"]["total"] == pytest.approx(compared["measured"]["memory"], rel=0.1)
    assert compared["step"]["tokens"] == pytest.approx(compared["measured"]["tokens"], rel=0.3)
    assert "measured in 12 steps" in render(compared)
    assert checkpoint.newest(tmp_path / "run")
    with pytest.raises(UserError, match="is a run, whose settings stand"):
        plan(str(tmp_path / "run"), ["steps=3"])
    cli.app(["plan", path, "--kind", "l4", "--json"], result_action="return_value")
    assert json.loads(capsys.readouterr().out)["device"]["name"] == "L4"
