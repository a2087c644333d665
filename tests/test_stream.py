"""The stream as a run uses it: the same for any number of workers and ranks, exact, and honest about what is bad."""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dataset_of, jpeg, samples, tiny
from ranks import run_ranks

from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.run_dir.records import Skipped
from multimodal_fm.stream import shared_memory, worker_pool
from multimodal_fm.stream.crash_log import CrashLog
from multimodal_fm.stream.dataset import StepDataset
from multimodal_fm.stream.loader import Loader
from multimodal_fm.stream.quarantine import BadFraction
from multimodal_fm.stream.tasks import build_tasks, fit_tokenizers
from multimodal_fm.stream.token_counts import TokenCounter
from multimodal_fm.tokenizers import audio
from multimodal_fm.train import loop
from multimodal_fm.train.config import build


def rows(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]


def fitted(config):
    """The config with its tokenizers, and its corpora."""
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    corpora = {name: shards.Corpus(source, name) for name, source in config.sources.items()}
    config.model.tokenizers = fit_tokenizers(
        config.tasks, corpora, config.model.tokenizers, config.seed, Path(config.run_dir)
    )
    return config, corpora


def two_sources(folder, **changes) -> dict:
    """A large and a small source of text and pictures."""
    shards.write(folder / "large-0.tar", samples(40))
    shards.write(folder / "small-0.tar", samples(3, 100))
    data = tiny(folder, **{"steps": 12, "log_samples": True, "run_dir": str(folder / "run"), **changes})
    data["sources"] = {name: {"shards": f"{folder}/{name}-*.tar", "group": "color"} for name in ("large", "small")}
    task = {
        "objectives": {"masked": {}},
        "modalities": ["text"],
        "batch_size": 8,
        "sources": {"large": 0.75, "small": 0.25},
    }
    pairs = {"objectives": {"contrastive": {}}, "modalities": ["text", "image"], "batch_size": 8, "sources": ["large"]}
    data["tasks"] = {"words": task, "pairs": pairs}
    return data


def test_a_source_has_augmentation_settings_of_its_own(tmp_path):
    """A black picture that is turned gets white corners."""
    made = [{"__key__": str(i), "png": jpeg("black", kind="PNG"), "txt": f"number {i}"} for i in range(8)]
    pairs = {"objectives": {"contrastive": {}}, "modalities": ["text", "image"], "batch_size": 8}
    brightest = {}
    for name, augment in (("turned", {}), ("upright", {"image": {"rotation_degrees": 0}})):
        shards.write(tmp_path / f"{name}.tar", made)
        data = tiny(tmp_path, run_dir=str(tmp_path / "run"), tasks={name: pairs | {"sources": [name]}})
        data["sources"] = {name: {"shards": str(tmp_path / f"{name}.tar"), "augment": augment}}
        data["model"]["tokenizers"] = {"text": {"vocab_size": 300}, "image": {"rotation_degrees": 45}}
        (batch,) = dataset_of(*fitted(build(data)))[0].batches
        brightest[name] = int(batch.content["image"].max())
    assert brightest["turned"] > 200 and brightest["upright"] == 0


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_readers_change_nothing(tmp_path, how):
    config, corpora = fitted(build(two_sources(tmp_path)))
    wanted = list(Loader(dataset_of(config, corpora), 0, 6, 0))
    for workers in (1, 3):
        found = list(Loader(dataset_of(config, corpora), 0, 6, workers))
        for one, other in zip(wanted, found, strict=True):
            assert one.samples == other.samples and one.counts == other.counts
            for left, right in zip(one.batches, other.batches, strict=True):
                assert all(torch.equal(left.content[modality], right.content[modality]) for modality in left.content)
                assert torch.equal(left.tokens.position, right.tokens.position)
    ahead = list(Loader(dataset_of(config, corpora), 4, 6, 2))
    assert [step.samples for step in ahead] == [step.samples for step in wanted[4:]]


def torchrun(ranks, *arguments, timeout=240):
    """`mmfm` by so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "multimodal_fm", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(loop.__file__).parents[2])}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def test_ranks_may_change_between_resumes(tmp_path, corpus):
    """1, then 2, then 1 process: the samples of every step are the same, the losses to rounding."""
    optim = {"lr": 3e-3, "warmup_steps": 3, "decay_fraction": 0.0}  # a rate that does not hang on the number of steps
    data = tiny(corpus, steps=9, save_every=3, microbatches=4, log_samples=True, optim=optim)
    plain = build({**data, "run_dir": str(tmp_path / "plain")})
    loop.pretrain(plain)
    changing = {**data, "run_dir": str(tmp_path / "changing")}
    loop.pretrain(build({**changing, "steps": 3}))
    run_ranks(2, lambda: loop.pretrain(build({**changing, "steps": 6}), resume=True))
    loop.pretrain(build(changing), resume=True)
    assert rows(tmp_path / "plain", "samples.jsonl") == rows(tmp_path / "changing", "samples.jsonl")
    for one, other in zip(rows(tmp_path / "plain"), rows(tmp_path / "changing"), strict=True):
        assert one["tokens"] == other["tokens"]
        for name in one:
            if name.startswith("loss"):
                assert abs(one[name] - other[name]) < 2e-3 * max(1, abs(one[name])), name


def test_what_ranks_tell_each_other_is_small(tmp_path, corpus):
    """A step from a worker lies in a buffer of a gigabyte, which its tables must not take along."""
    loader = Loader(dataset_of(*fitted(build(tiny(corpus, run_dir=str(tmp_path / "run"))))), 0, 1, 1)
    (batch,) = next(iter(loader)).batches
    assert len(pickle.dumps(batch.tasks["pairs"].table.clone())) < 10_000
    loader.close()


def test_ranks_must_share_the_microbatches_out(tmp_path, corpus):
    config, corpora = fitted(build(tiny(corpus, run_dir=str(tmp_path / "run"), microbatches=3)))
    tasks = build_tasks(config.tasks, corpora)
    with pytest.raises(UserError, match="cannot be shared out among 4 ranks"):
        StepDataset(tasks, config.model.tokenizers, 0, 3, ranks=4)
    parts = [StepDataset(tasks, config.model.tokenizers, 0, 3, rank=rank, ranks=2) for rank in range(2)]
    assert [len(part[0].batches) for part in parts] == [1, 2]


def test_every_rank_has_its_share_and_no_sample_is_read_twice(tmp_path, corpus):
    config, corpora = fitted(build(tiny(corpus, run_dir=str(tmp_path / "run"), microbatches=4)))
    tasks = build_tasks(config.tasks, corpora)
    whole = StepDataset(tasks, config.model.tokenizers, 0, 4)
    for ranks in (2, 4):
        parts = [StepDataset(tasks, config.model.tokenizers, 0, 4, rank=r, ranks=ranks) for r in range(ranks)]
        for step in range(3):
            dealt = [part[step] for part in parts]
            assert sorted(key for one in dealt for key in one.samples) == sorted(whole[step].samples)
            assert sum(len(one.batches) for one in dealt) == 4
            for one, other in zip((b for d in dealt for b in d.batches), whole[step].batches, strict=True):
                assert torch.equal(one.tokens.position, other.tokens.position)
            assert loop._sum_counts([one.counts for one in dealt]) == whole[step].counts


def test_microbatches_have_about_equal_tokens(tmp_path):
    """Texts of 1 to 200 words and pictures of any shape: the microbatches of a step differ by less than 5 %."""
    generator = np.random.default_rng(0)
    made = samples(200)
    for sample in made:
        sample["txt"] = " ".join(["word"] * int(generator.integers(1, 200)))
    shards.write(tmp_path / "a.tar", made)
    data = tiny(tmp_path, run_dir=str(tmp_path / "run"), microbatches=4)
    data["sources"] = {"all": {"shards": f"{tmp_path}/a.tar"}}
    data["model"]["tokenizers"] = {
        "text": {"vocab_size": 300, "max_tokens": 256},
        "image": {"patch": 8, "max_tokens": 24},
    }
    task = {
        "objectives": {"contrastive": {}},
        "modalities": ["text", "image"],
        "batch_size": 128,
        "sources": {"all": 1},
    }
    data["tasks"] = {"pairs": task}
    config, corpora = fitted(build(data))
    steps = dataset_of(config, corpora)
    for step in range(5):
        tokens = [len(batch.tokens) for batch in steps[step].batches]
        assert (max(tokens) - min(tokens)) / np.mean(tokens) < 0.05


def test_weights_by_token_share_out_tokens(tmp_path):
    """Short and long texts: under `by: token` each source gives its share of the tokens, and not of the samples."""
    for name, words in (("short", 4), ("long", 40)):
        made = [{"__key__": f"{name}{i}", "txt": " ".join(["word"] * (words + i % 3))} for i in range(30)]
        shards.write(tmp_path / f"{name}-0.tar", made)
    data = two_sources(tmp_path)
    data["sources"] = {name: {"shards": f"{tmp_path}/{name}-*.tar"} for name in ("short", "long")}
    weights = {"short": 0.37, "long": 0.63}
    data["tasks"] = {
        "words": {
            "objectives": {"causal": {}},
            "modalities": ["text"],
            "batch_size": 16,
            "weigh_by": "token",
            "sources": weights,
        }
    }
    config, corpora = fitted(build(data))
    mixture = dataset_of(config, corpora).mixtures[0]
    draws = mixture.draws(0, 10_000 * 16)
    lengths = [
        [TokenCounter(corpora[n], ["text"], config.model.tokenizers).count(i) for i in range(30)]
        for n in sorted(weights)
    ]
    tokens = [np.array(lengths[s])[draws.sample[draws.source == s]].sum() for s in range(2)]
    assert abs(tokens[1] / sum(tokens) - 0.37) < 0.002
    assert (draws.source == 1).mean() > 0.6


def test_a_temperature_makes_weights_from_sizes(tmp_path):
    data = two_sources(tmp_path)
    data["tasks"]["words"] |= {"sources": ["large", "small"], "temperature": 0.5}
    config, corpora = fitted(build(data))
    shares = dataset_of(config, corpora).mixtures[0].quotas[0]
    assert abs(shares[0] / shares[1] - (40 / 3) ** 0.5) < 0.05


def test_weights_change_at_the_step_that_the_schedule_names(tmp_path):
    data = two_sources(tmp_path)
    shards.write(tmp_path / "small-0.tar", samples(6, 100))
    data["tasks"]["words"]["sources"] = {"large": 1.0, "small": {"5": 3}}
    loop.pretrain(build(data))
    small = [
        sum(name.startswith("small/") for name in row["samples"]) for row in rows(tmp_path / "run", "samples.jsonl")
    ]
    assert not any(small[:5]) and sum(small[5:]) > 20


def test_a_mixture_changed_on_resume_begins_a_new_phase(tmp_path):
    """The steps before stay; afterwards each source goes on where it was, a new one among them."""
    data = two_sources(tmp_path, steps=6, save_every=3)
    loop.pretrain(build(data))
    shards.write(tmp_path / "third-0.tar", samples(10, 200))
    data["sources"]["third"] = {"shards": f"{tmp_path}/third-*.tar", "group": "color"}
    data["tasks"]["words"]["sources"] = {"large": 0.5, "third": 0.5}
    data["steps"] = 12
    loop.pretrain(build(data), resume=True)
    words = [row["samples"][:8] for row in rows(tmp_path / "run", "samples.jsonl")]
    assert len(words) == 12 and not any(name.startswith("third/") for step in words[:6] for name in step)
    later = Counter(name.partition("/")[0] for step in words[6:] for name in step)
    assert set(later) == {"large", "third"} and abs(later["third"] - 24) <= 8
    large = [name for step in words for name in step if name.startswith("large/")]
    assert max(Counter(large[:40]).values()) == 1  # one epoch, across the phases
    loop.pretrain(build({**data, "steps": 14}), resume=True)  # the phase is kept
    assert len(rows(tmp_path / "run", "samples.jsonl")) == 14


def spoil(folder, bad, count=100):
    made = samples(count)
    for sample in made[:: count // bad][:bad]:
        sample["txt"] = b"\xff\xfe\xfa"
    shards.write(folder / "large-0.tar", made)


@pytest.mark.parametrize(("bad", "ends"), [(8, True), (2, False)])
def test_a_source_with_too_much_bad_in_it_ends_the_run(tmp_path, bad, ends):
    data = two_sources(tmp_path, steps=30, save_every=100)
    data["tasks"] = {"words": {**data["tasks"]["words"], "sources": {"large": 1}}}
    spoil(tmp_path, bad)
    if ends:
        with pytest.raises(
            UserError, match=r"source large: \d+ of 100 samples bad, more than max_bad_fraction=0.05"
        ) as error:
            loop.pretrain(build(data))
        assert Path(str(error.value).split("checkpoint: ")[1]).is_dir()
        data["max_bad_fraction"] = 0.1
        assert loop.pretrain(build(data), resume=True).name == "step-00000030"
    else:
        loop.pretrain(build(data))
    found = rows(tmp_path / "run", "quarantine.jsonl")
    assert len({row["key"] for row in found}) == bad and {row["reason"] for row in found} == {"text-decode"}


def test_ranks_end_together_where_a_source_turns_out_too_bad_after_a_resume(tmp_path):
    """What was bad before the resume is in quarantine.jsonl, which the first rank alone reads."""
    data = two_sources(tmp_path, save_every=100, microbatches=2)
    data["tasks"] = {"words": {**data["tasks"]["words"], "sources": {"large": 1}}}
    spoil(tmp_path, 8)
    loop.pretrain(build({**data, "steps": 6}))
    assert 3 <= len({row["key"] for row in rows(tmp_path / "run", "quarantine.jsonl")}) <= 5
    path = tmp_path / "on.yaml"
    path.write_text(json.dumps({**data, "steps": 60}))
    done = torchrun(2, "pretrain", path, "--resume", timeout=90)
    lines = [line.partition("mmfm: ")[2] for line in done.stderr.splitlines()]
    told = [line for line in lines if "samples bad, more than max_bad_fraction=0.05 allows" in line]
    assert done.returncode and len(set(told)) == 1, done.stderr[-3000:]  # the second may be ended before it speaks


def test_much_bad_in_a_part_of_a_source_needs_to_be_sure():
    class Corpus:
        indexes = ()

        def __len__(self):
            return 1_000_000

    def lost(count):
        return [{"source": "a", "shard": "s", "key": str(i), "step": 1} for i in range(count)]

    assert not BadFraction(0.05, {"a": Corpus()}, lost(4)).message({"a": 4})
    assert not BadFraction(0.05, {"a": Corpus()}, lost(60)).message({"a": 1000})
    assert BadFraction(0.05, {"a": Corpus()}, lost(100)).message({"a": 1000})


def test_strict_names_the_first_bad_one(tmp_path):
    data = two_sources(tmp_path, strict=True)
    spoil(tmp_path, 4, 40)
    with pytest.raises(UserError, match=r"strict: large: .*large-0.tar sample00\d\d text: text-decode"):
        loop.pretrain(build(data))


def test_strict_refuses_a_damaged_shard(tmp_path):
    data = two_sources(tmp_path, strict=True)
    path = tmp_path / "large-0.tar"
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(UserError, match="strict: large: .*large-0.tar.*shard"):
        loop.pretrain(build(data))


DYING = """
import os
from multimodal_fm.tokenizers import text
from multimodal_fm.tokenizers.text import Config

class Tokenizer(text.Tokenizer):
    def read(self, raw, generator=None):
        if generator is not None and raw.get("txt", b"").startswith(b"die"):
            os.abort()
        return super().read(raw, generator)
"""


def dying(tmp_path, deadly=(7,), **changes):
    """A config whose text decoder ends its process at some samples."""
    (tmp_path / "dying_text.py").write_text(DYING)
    data = two_sources(tmp_path, **changes)
    made = samples(40)
    for number in deadly:
        made[number]["txt"] = "die, program"
    shards.write(tmp_path / "large-0.tar", made)
    data["model"]["tokenizers"] = {
        "text": {"tokenizer": "modalities.dying", "vocab_size": 300, "max_tokens": 24},
        "image": {},
    }
    (tmp_path / "modalities").mkdir()
    (tmp_path / "modalities" / "__init__.py").write_text("")
    (tmp_path / "dying_text.py").rename(tmp_path / "modalities" / "dying.py")
    data["tasks"] = {"words": {**data["tasks"]["words"], "sources": {"large": 1}}}
    path = tmp_path / "dying.yaml"
    path.write_text(json.dumps(data))
    env = {**os.environ, "PYTHONPATH": f"{Path(loop.__file__).parents[2]}:{tmp_path}", "OMP_NUM_THREADS": "1"}

    def mmfm(*more):
        command = [sys.executable, "-m", "multimodal_fm", "pretrain", str(path), *more]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    return mmfm


def test_a_decoder_that_ends_a_worker_process_costs_its_samples(tmp_path):
    """Also where several of them are in one step."""
    mmfm = dying(tmp_path, range(7, 12), num_workers=2, max_bad_fraction=0.5)
    done = mmfm()
    assert done.returncode == 0, done.stderr[-2000:]
    lost = rows(tmp_path / "run", "quarantine.jsonl")
    assert {(row["key"], row["reason"]) for row in lost} == {(f"sample{n:04d}", "crash") for n in range(7, 12)}
    assert "exit code -6) while it decoded large" in done.stdout and "sample0007" in done.stdout


def test_a_decoder_that_ends_the_program_is_left_out_the_third_time(tmp_path):
    mmfm = dying(tmp_path, num_workers=0, save_every=1)
    codes = [mmfm().returncode, mmfm("--resume").returncode]
    assert codes == [-signal.SIGABRT] * 2
    done = mmfm("--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sample0007" in done.stderr
    lost = rows(tmp_path / "run", "quarantine.jsonl")
    assert {(row["key"], row["reason"]) for row in lost} == {("sample0007", "crash")}


def test_a_run_that_was_killed_blames_nobody(tmp_path):
    """Only a crash counts against the sample that was being decoded."""
    corpus = shards.Corpus(shards.Config(str(_one(tmp_path))), "all")
    for _ in range(3):
        log = CrashLog(tmp_path / "reading-0", 2)
        log.begin(corpus, 0)  # and the process is gone
    assert not CrashLog(tmp_path / "reading-0", 2).excludes(corpus, 0)
    for _ in range(2):
        CrashLog(tmp_path / "reading-0", 2).begin(corpus, 0)
        (tmp_path / "reading-0.fault").write_text("Fatal Python error: Segmentation fault")
        log = CrashLog(tmp_path / "reading-0", 2)
        (tmp_path / "reading-0.fault").unlink()
    assert log.excludes(corpus, 0) and not log.excludes(corpus, 1)
    with open(tmp_path / "crashes.jsonl", "a") as file:
        file.write('{"sample": "a')  # the machine went down
    log = CrashLog(tmp_path / "reading-0", 2)
    log.begin(corpus, 1)
    log.record_crash(0)
    log = CrashLog(tmp_path / "reading-0", 2)
    assert log.excludes(corpus, 0) and sorted(log.crash_counts.values()) == [1, 2]


def _one(folder):
    shards.write(folder / "a.tar", samples(3))
    return folder / "a.tar"


@pytest.mark.parametrize("pause", [0, 0.5])
def test_a_killed_worker_process_is_replaced(tmp_path, pause):
    """Whether it dies while its step is waited for or while the run is busy with another one."""
    config, corpora = fitted(build(two_sources(tmp_path)))
    wanted = [step.samples for step in Loader(dataset_of(config, corpora), 0, 10, 0)]
    others, found = set(multiprocessing.active_children()), []
    for step in Loader(dataset_of(config, corpora), 0, 10, 2):
        found.append(step.samples)
        if len(found) == 3:
            os.kill((set(multiprocessing.active_children()) - others).pop().pid, signal.SIGKILL)
            time.sleep(pause)
    assert found == wanted and set(multiprocessing.active_children()) == others


def contents(step) -> list:
    return [batch.content[modality].tolist() for batch in step.batches for modality in sorted(batch.content)]


class Sent:
    """Steps that go through shared buffers, in this process, which plays the worker's part too."""

    def __init__(self, tmp_path):
        self.steps = dataset_of(*fitted(build(two_sources(tmp_path))))
        self.buffers = shared_memory.SharedBuffers(5)

    def __getitem__(self, step):
        number = self.buffers.acquire()
        return self.buffers.load(number, self.buffers.write(number, lambda empty: self.steps.read(step, empty)))

    def used(self) -> set[int]:
        return set(range(5)) - set(self.buffers.free)


def test_a_buffer_is_free_once_nothing_in_it_is_held(tmp_path):
    sent = Sent(tmp_path)
    first, second = sent[0], sent[1]
    assert sent.used() == {0, 1}
    tensor = next(iter(first.batches[0].content.values()))
    before = tensor.tolist()
    del first
    assert sent.used() == {0, 1} and tensor.tolist() == before
    del tensor
    assert sent.used() == {1}
    third = sent[2]
    assert sent.used() == {0, 1}  # the one that was used before, whose memory exists
    assert contents(second) == contents(sent.steps[1]) and contents(third) == contents(sent.steps[2])


def test_a_process_forked_while_a_step_is_held_frees_nothing(tmp_path):
    sent = Sent(tmp_path)
    held = [sent[0]]
    child = os.fork()
    if not child:
        held.clear()
        os._exit(len(sent.used()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1 and sent.used() == {0}
    held.clear()
    assert not sent.used()


@pytest.mark.parametrize("room", ["as ever", "little", "none", "refused", "limited"])
def test_steps_arrive_whatever_memory_there_is(tmp_path, monkeypatch, room):
    """In buffers; in buffers that are too small, all or in part; through the pipe, without buffers or with all held."""

    def refused(file, size):
        if size > 100:
            raise OSError(12, "Cannot allocate memory")
        return mmap(file, size)

    mmap = shared_memory.mmap.mmap
    if room == "refused":
        monkeypatch.setattr(shared_memory.mmap, "mmap", refused)
    if room == "limited":
        monkeypatch.setattr(shared_memory.resource, "getrlimit", lambda _: (1 << 33, 1 << 33))
    monkeypatch.setattr(shared_memory, "BUFFER_BYTES", {"little": 2048, "none": 1}.get(room, 1 << 30))
    sent = Sent(tmp_path)
    assert len(sent.buffers.buffers) == (0 if room in ("refused", "limited") else 5)
    found = [sent[step] for step in range(8)]
    assert room == "none" or not sent.buffers.free
    for number, step in enumerate(found):
        assert step.samples == sent.steps[number].samples and contents(step) == contents(sent.steps[number])


LEFT = """
import multiprocessing, os, sys, time
from multimodal_fm.stream import worker_pool
def read(step):
    if step and sys.argv[1] == "stuck":
        time.sleep(3600)
    return bytes(1 << 20)  # more than a pipe holds
pool = worker_pool.WorkerPool(read, 2)
results = pool.imap(range(100))
next(results)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
if sys.argv[1] == "gone":
    time.sleep(0.5)
    os._exit(1)
"""


@pytest.mark.parametrize("how", ["gone", "idle", "stuck"])
def test_worker_processes_end_with_the_program(how):
    """Which ends without a word while they have much to send, forgets them, or forgets them in the middle of a read."""
    script = [sys.executable, "-W", "ignore", "-c", LEFT, how]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == (how == "gone") and not done.stderr

    def alive(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    until = time.monotonic() + 20
    while any(map(alive, done.stdout.split())):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert len(done.stdout.split()) == 2


def test_a_worker_that_exits_with_0_is_a_death_too(tmp_path, monkeypatch):
    steps = dataset_of(*fitted(build(two_sources(tmp_path))))
    monkeypatch.setattr(steps, "_read_task", lambda *_: os._exit(0))
    with pytest.raises(UserError, match=r"step 1: its worker ended 4 times \(exit code 0\)"):
        next(iter(Loader(steps, 0, 10, 1)))


def test_an_exception_in_a_worker_is_raised_where_its_step_is_due(tmp_path, monkeypatch):
    steps = dataset_of(*fitted(build(two_sources(tmp_path))))
    real = steps._read_task

    def read(number, draws, own, step, *more):
        return real(number, draws, own, step, *more) if step < 2 else 1 / 0

    monkeypatch.setattr(steps, "_read_task", read)
    for workers in (0, 2):
        stream = iter(Loader(steps, 0, 10, workers))
        assert [next(stream).samples for _ in range(2)]
        with pytest.raises(ZeroDivisionError):
            next(stream)


class Odd(Exception):
    """Cannot be pickled and made again."""

    def __init__(self, one, other):
        super().__init__(one)


def job(number: int) -> int:
    """What the workers of the tests below do with a job."""
    if number == 7:
        raise Odd(number, number)
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_jobs_are_done_by_any_number_of_processes():
    for workers in (0, 2):
        found = list(worker_pool.run_jobs(job, range(7), workers))
        assert sorted(found) == [(number, number * number) for number in range(7)]
    assert not multiprocessing.active_children()


def test_an_exception_that_cannot_be_pickled_comes_as_its_traceback():
    with pytest.raises(RuntimeError, match="Odd: 7"):
        pooled(7)


def pooled(*jobs: int, **settings) -> list[tuple[int, int]]:
    with contextlib.closing(worker_pool.WorkerPool(job, 2, **settings)) as pool:
        return list(pool.imap(jobs, ordered=False))


def test_a_job_over_which_workers_die_is_given_up_or_done_again():
    with pytest.raises(UserError, match=r"ended 3 times \(exit code -9\) over the same job"):
        pooled(1, -1, 2)
    deaths = []

    def mend(job, worker, exit_code):
        deaths.append((job.argument, job.deaths, exit_code))
        job.argument = abs(job.argument)

    assert sorted(pooled(1, -3, 2, -5, on_death=mend)) == [(1, 1), (2, 4), (3, 9), (5, 25)]
    assert sorted(deaths) == [(-5, 1, -9), (-3, 1, -9)] and not multiprocessing.active_children()


def test_jobs_are_taken_no_further_ahead_than_the_workers_need():
    taken = []
    pool = worker_pool.WorkerPool(job, 2)
    results = pool.imap(taken.append(n) or n for n in range(9, 99))
    assert next(results) == (9, 81) and len(taken) <= 5
    pool.close()


def test_workers_ignore_signals_and_give_way(tmp_path):
    def look(_):
        ignored = [signal.getsignal(one) == signal.SIG_IGN for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        return all(ignored), os.getpriority(os.PRIO_PROCESS, 0), torch.get_num_threads()

    pool = worker_pool.WorkerPool(look, 1)
    [(_, found)] = pool.imap([0])
    pool.close()
    assert found == (True, min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19), 1)


def test_what_was_skipped_is_told_once_and_the_first_by_name():
    row = {"source": "all", "shard": "a.tar", "part": "text", "reason": "json", "detail": "cut"}
    skipped = Skipped({**row, "key": f"sample{number:02d}"} for number in (*range(25), 3, 24, 24))
    skipped.add([{**row, "key": "sample03"}, {**row, "key": "sample03", "part": "image", "reason": "decode"}])
    lines = skipped.lines()
    assert lines[0] == "skipped 26 parts: 25 json, 1 decode"
    assert (
        lines[1] == "  all: a.tar sample00 text: json (cut)"
        and lines[4] == "  all: a.tar sample03 text: json (cut; 3 times)"
    )
    assert len(lines) == 22 and lines[-1] == "  and 6 more, see quarantine.jsonl"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_torchaudio_that_does_not_fit_is_a_line(tmp_path, corpus, monkeypatch, workers):
    """Its releases do not say which of torch they fit; where one does not, no sound is blamed for it."""
    audio._transforms.cache_clear()
    audio._torchaudio.cache_clear()
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(UserError, match="torchaudio does not work beside torch .*; install releases that fit"):
        loop.pretrain(build(tiny(corpus, run_dir=str(tmp_path / "run"), num_workers=workers)))
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
