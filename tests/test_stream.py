"""The stream as a run uses it: the same for any number of readers and ranks, exact, and honest about what is bad."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import samples, tiny

from multimodal_fm.config import build
from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.run_dir.records import Skipped
from multimodal_fm.stream import shared_memory as mod
from multimodal_fm.stream.crash_log import Journal
from multimodal_fm.stream.dataset import Steps
from multimodal_fm.stream.quarantine import Bad
from multimodal_fm.stream.shared_memory import Shelves
from multimodal_fm.stream.tasks import fit, steps_of, tasks_of
from multimodal_fm.stream.token_counts import Ruler
from multimodal_fm.stream.workers import Loader
from multimodal_fm.train import loop


def rows(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]


def fitted(config):
    """The config with its tokenizers, and its corpora."""
    Path(config.run).mkdir(parents=True, exist_ok=True)
    corpora = {name: shards.Corpus(source, name) for name, source in config.sources.items()}
    config.tokenizers = fit(config, corpora, Path(config.run))
    return config, corpora


def two_sources(folder, **changes) -> dict:
    """A large and a small source of text and pictures."""
    shards.write(folder / "large-0.tar", samples(40))
    shards.write(folder / "small-0.tar", samples(3, 100))
    data = tiny(folder, **{"steps": 12, "trace": True, "run": str(folder / "run"), **changes})
    data["sources"] = {name: {"shards": f"{folder}/{name}-*.tar", "group": "color"} for name in ("large", "small")}
    task = {"objective": "masked", "modalities": ["text"], "batch_size": 8, "sources": {"large": 0.75, "small": 0.25}}
    pairs = {"objective": "contrastive", "modalities": ["text", "image"], "batch_size": 8, "sources": ["large"]}
    data["tasks"] = {"words": task, "pairs": pairs}
    return data


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_readers_change_nothing(tmp_path, how):
    config, corpora = fitted(build(two_sources(tmp_path)))
    wanted = list(Loader(steps_of(config, corpora), 0, 6, 0))
    for workers in (1, 3):
        found = list(Loader(steps_of(config, corpora), 0, 6, workers, how))
        for one, other in zip(wanted, found, strict=True):
            assert one.keys == other.keys and one.counts == other.counts
            for left, right in zip(one.batches, other.batches, strict=True):
                assert all(torch.equal(left.content[modality], right.content[modality]) for modality in left.content)
                assert torch.equal(left.tokens.position, right.tokens.position)
    ahead = list(Loader(steps_of(config, corpora), 4, 6, 2, how))
    assert [step.keys for step in ahead] == [step.keys for step in wanted[4:]]


def torchrun(ranks, *arguments, timeout=240):
    """`mmfm` by so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "multimodal_fm", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(loop.__file__).parents[2])}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def test_ranks_may_change_between_resumes(tmp_path, corpus):
    """1, then 2, then 1 process: the samples of every step are the same, the losses to rounding."""
    optim = {"lr": 3e-3, "warmup": 3, "decay": 0.0}  # a rate that does not hang on the number of steps
    data = tiny(corpus, steps=9, save_every=3, microbatches=4, trace=True, optim=optim)
    plain = build({**data, "run": str(tmp_path / "plain")})
    loop.pretrain(plain)
    path = tmp_path / "changing.yaml"
    changing = {**data, "run": str(tmp_path / "changing")}
    loop.pretrain(build({**changing, "steps": 3}))
    path.write_text(json.dumps({**changing, "steps": 6}))
    done = torchrun(2, "pretrain", path, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    loop.pretrain(build(changing), resume=True)
    assert rows(tmp_path / "plain", "samples.jsonl") == rows(tmp_path / "changing", "samples.jsonl")
    for one, other in zip(rows(tmp_path / "plain"), rows(tmp_path / "changing"), strict=True):
        assert one["tokens"] == other["tokens"]
        for name in one:
            if name.startswith("loss"):
                assert abs(one[name] - other[name]) < 2e-3 * max(1, abs(one[name])), name


def test_ranks_must_share_the_microbatches_out(tmp_path, corpus):
    config, corpora = fitted(build(tiny(corpus, run=str(tmp_path / "run"), microbatches=3)))
    with pytest.raises(UserError, match="cannot be shared out among 2 ranks"):
        Steps(tasks_of(config, corpora), config.tokenizers, 0, 3, ranks=2)


def test_every_rank_has_its_share_and_no_item_is_read_twice(tmp_path, corpus):
    config, corpora = fitted(build(tiny(corpus, run=str(tmp_path / "run"), microbatches=4)))
    tasks = tasks_of(config, corpora)
    whole = Steps(tasks, config.tokenizers, 0, 4)
    for ranks in (2, 4):
        parts = [Steps(tasks, config.tokenizers, 0, 4, rank=r, ranks=ranks) for r in range(ranks)]
        for step in range(3):
            dealt = [part[step] for part in parts]
            assert sorted(key for one in dealt for key in one.keys) == sorted(whole[step].keys)
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
    data = tiny(tmp_path, run=str(tmp_path / "run"), microbatches=4)
    data["sources"] = {"all": {"shards": f"{tmp_path}/a.tar"}}
    data["tokenizers"] = {"text": {"vocab_size": 300, "max_tokens": 256}, "image": {"patch": 8, "max_tokens": 24}}
    task = {"objective": "contrastive", "modalities": ["text", "image"], "batch_size": 128, "sources": {"all": 1}}
    data["tasks"] = {"pairs": task}
    config, corpora = fitted(build(data))
    steps = steps_of(config, corpora)
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
        "words": {"objective": "causal", "modalities": ["text"], "batch_size": 16, "by": "token", "sources": weights}
    }
    config, corpora = fitted(build(data))
    mixture = steps_of(config, corpora).mixtures[0]
    draws = mixture.draws(0, 10_000 * 16)
    lengths = [[Ruler(corpora[n], ["text"], config.tokenizers).of(i) for i in range(30)] for n in weights]
    tokens = [np.array(lengths[s])[draws.sample[draws.source == s]].sum() for s in range(2)]
    assert abs(tokens[0] / sum(tokens) - 0.37) < 0.002
    assert (draws.source == 0).mean() > 0.6


def test_a_temperature_makes_weights_from_sizes(tmp_path):
    data = two_sources(tmp_path)
    data["tasks"]["words"] |= {"sources": ["large", "small"], "temperature": 0.5}
    config, corpora = fitted(build(data))
    shares = steps_of(config, corpora).mixtures[0].shares[0]
    assert abs(shares[0] / shares[1] - (40 / 3) ** 0.5) < 0.05


def test_weights_change_at_the_step_that_the_schedule_names(tmp_path):
    data = two_sources(tmp_path)
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
        with pytest.raises(UserError, match=r"source large: \d+ of 100 samples bad, more than max_bad=0.05") as error:
            loop.pretrain(build(data))
        assert Path(str(error.value).split("checkpoint: ")[1]).is_dir()
        data["max_bad"] = 0.1
        assert loop.pretrain(build(data), resume=True).name == "step-00000030"
    else:
        loop.pretrain(build(data))
    found = rows(tmp_path / "run", "quarantine.jsonl")
    assert len({row["key"] for row in found}) == bad and {row["reason"] for row in found} == {"text-decode"}


def test_ranks_end_together_where_a_source_turns_out_too_bad_after_a_resume(tmp_path):
    """What was bad before the resume is in the ledger, which the first rank alone reads."""
    data = two_sources(tmp_path, save_every=100, microbatches=2)
    data["tasks"] = {"words": {**data["tasks"]["words"], "sources": {"large": 1}}}
    spoil(tmp_path, 8)
    loop.pretrain(build({**data, "steps": 6}))
    assert 3 <= len({row["key"] for row in rows(tmp_path / "run", "quarantine.jsonl")}) <= 5
    path = tmp_path / "on.yaml"
    path.write_text(json.dumps({**data, "steps": 60}))
    done = torchrun(2, "pretrain", path, "--resume", timeout=90)
    told = [line for line in done.stderr.splitlines() if "samples bad, more than max_bad=0.05 allows" in line]
    assert done.returncode and len(set(told)) == 1, done.stderr[-3000:]  # the second may be ended before it speaks


def test_much_bad_in_a_part_of_a_source_needs_to_be_sure():
    class Corpus:
        indexes = ()

        def __len__(self):
            return 1_000_000

    def lost(count):
        return [{"source": "a", "shard": "s", "key": str(i), "step": 1} for i in range(count)]

    assert not Bad(0.05, {"a": Corpus()}, lost(4)).line({"a": 4})
    assert not Bad(0.05, {"a": Corpus()}, lost(60)).line({"a": 1000})
    assert Bad(0.05, {"a": Corpus()}, lost(100)).line({"a": 1000})


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


def dying(tmp_path, monkeypatch, **changes):
    """A config whose text decoder ends its process at one sample."""
    (tmp_path / "dying_text.py").write_text(DYING)
    data = two_sources(tmp_path, **changes)
    made = samples(40)
    made[7]["txt"] = "die, program"
    shards.write(tmp_path / "large-0.tar", made)
    data["tokenizers"] = {"text": {"tokenizer": "modalities.dying", "vocab_size": 300, "max_tokens": 24}, "image": {}}
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


def test_a_decoder_that_ends_a_worker_process_costs_its_sample(tmp_path, monkeypatch):
    mmfm = dying(tmp_path, monkeypatch, readers="processes", workers=1)
    done = mmfm()
    assert done.returncode == 0, done.stderr[-2000:]
    lost = rows(tmp_path / "run", "quarantine.jsonl")
    assert {(row["key"], row["reason"]) for row in lost} == {("sample0007", "crash")}
    assert "sample0007" in done.stdout + done.stderr


def test_a_decoder_that_ends_the_program_is_left_out_the_third_time(tmp_path, monkeypatch):
    mmfm = dying(tmp_path, monkeypatch, readers="threads", workers=1, save_every=1)
    codes = [mmfm().returncode, mmfm("--resume").returncode]
    assert codes == [-signal.SIGABRT] * 2
    done = mmfm("--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sample0007" in done.stderr
    lost = rows(tmp_path / "run", "quarantine.jsonl")
    assert {(row["key"], row["reason"]) for row in lost} == {("sample0007", "crash")}


def test_a_run_that_was_killed_blames_nobody(tmp_path):
    """Only a fault of the program's own counts against what was being read."""
    corpus = shards.Corpus(shards.Config(str(_one(tmp_path))), "all")
    for _ in range(3):
        journal = Journal(tmp_path / "reading-0", 2)
        journal.note(corpus, 0)  # and the process is gone
    assert not Journal(tmp_path / "reading-0", 2).blocks(corpus, 0)
    for _ in range(2):
        Journal(tmp_path / "reading-0", 2).note(corpus, 0)
        (tmp_path / "reading-0.fault").write_text("Fatal Python error: Segmentation fault")
        journal = Journal(tmp_path / "reading-0", 2)
        (tmp_path / "reading-0.fault").unlink()
    assert journal.blocks(corpus, 0) and not journal.blocks(corpus, 1)


def _one(folder):
    shards.write(folder / "a.tar", samples(3))
    return folder / "a.tar"


@pytest.mark.parametrize("pause", [0, 0.5])
def test_a_killed_worker_process_is_replaced(tmp_path, pause):
    """Whether it dies while its step is waited for or while the run is busy with another one."""
    config, corpora = fitted(build(two_sources(tmp_path)))
    wanted = [step.keys for step in Loader(steps_of(config, corpora), 0, 10, 0)]
    loader = Loader(steps_of(config, corpora), 0, 10, 2, "processes")
    found = []
    for step in loader:
        found.append(step.keys)
        if len(found) == 3:
            os.kill(loader._near._workers[0].pid, signal.SIGKILL)
            time.sleep(pause)
    assert found == wanted


@pytest.fixture
def shelves(tmp_path, monkeypatch):
    """Makes shelves of one worker, whose part this process plays too."""
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0))
    config, corpora = fitted(build(two_sources(tmp_path)))
    return lambda: Shelves(steps_of(config, corpora), 1)


def contents(step) -> list:
    return [batch.content[modality].tolist() for batch in step.batches for modality in sorted(batch.content)]


def test_a_shelf_is_free_once_nothing_on_it_is_held(shelves):
    shelves = shelves()
    first, second = (shelves.taken(shelves[step]) for step in range(2))
    assert list(shelves.used[:]) == [1, 1, 0, 0, 0]
    tensor = next(iter(first.batches[0].content.values()))
    told = tensor.tolist()
    del first
    assert list(shelves.used[:]) == [1, 1, 0, 0, 0] and tensor.tolist() == told
    del tensor
    assert list(shelves.used[:]) == [0, 1, 0, 0, 0]
    third = shelves.taken(shelves[2])
    assert list(shelves.used[:]) == [1, 1, 0, 0, 0]
    assert contents(second) == contents(shelves.steps[1]) and contents(third) == contents(shelves.steps[2])


def test_a_process_forked_while_a_step_is_held_frees_nothing(shelves):
    shelves = shelves()
    held = [shelves.taken(shelves[0])]
    child = os.fork()
    if not child:
        held.clear()
        os._exit(shelves.used[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1 and shelves.used[0] == 1
    held.clear()
    assert shelves.used[0] == 0


def test_a_step_that_cannot_be_read_leaves_its_shelf(shelves, monkeypatch):
    shelves = shelves()
    monkeypatch.setattr(shelves.steps, "_read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shelves[0]
    assert not any(shelves.used[:])


@pytest.mark.parametrize("room", ["as ever", "little", "none", "refused", "limited"])
def test_steps_arrive_whatever_memory_there_is(shelves, monkeypatch, room):
    """On shelves; on shelves that are too small, all or in part; by the pipe, since there are none or all are held."""

    def refused(file, size):
        if size > 100:
            raise OSError(12, "Cannot allocate memory")
        return mmap(file, size)

    mmap = mod.mmap.mmap
    if room == "refused":
        monkeypatch.setattr(mod.mmap, "mmap", refused)
    if room == "limited":
        monkeypatch.setattr(mod.resource, "getrlimit", lambda _: (1 << 33, 1 << 33))
    monkeypatch.setattr(mod, "ROOM", {"little": 2048, "none": 1}.get(room, mod.ROOM))
    shelves = shelves()
    found = [shelves.taken(shelves[step]) for step in range(8)]
    assert sum(shelves.used[:]) == (0 if room in ("none", "refused", "limited") else mod.EACH)
    for number, step in enumerate(found):
        assert step.keys == shelves.steps[number].keys and contents(step) == contents(shelves.steps[number])


LEFT = """
import os, sys, time
from multimodal_fm.stream import workers
def get(self, step):
    if step and sys.argv[1] == "stuck":
        time.sleep(3600)
    return bytes(1 << 20)  # more than a pipe holds
workers.Shelves.__getitem__, workers.Shelves.taken = get, lambda self, parcel: parcel
reading = workers.Loader(None, 0, 100, 2)
steps = iter(reading)
next(steps)
print(*(worker.pid for worker in reading._near._workers), flush=True)
if sys.argv[1] == "gone":
    time.sleep(0.5)
    os._exit(1)
"""


@pytest.mark.parametrize("how", ["gone", "idle", pytest.param("stuck", marks=pytest.mark.slow)])
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


def test_a_worker_that_ends_in_peace_is_a_death_too(tmp_path, monkeypatch):
    config, corpora = fitted(build(two_sources(tmp_path)))
    steps = steps_of(config, corpora)
    monkeypatch.setattr(steps, "_read", lambda *_: os._exit(0))
    monkeypatch.setattr("multimodal_fm.stream.workers.RESTARTS", 0)
    with pytest.raises(UserError, match=r"ended 1 times \(exit 0\)"):
        next(iter(Loader(steps, 0, 10, 1, "processes")))


def test_an_exception_in_a_reader_thread_comes_out(tmp_path, monkeypatch):
    config, corpora = fitted(build(two_sources(tmp_path)))
    steps = steps_of(config, corpora)
    monkeypatch.setattr(steps, "_read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(Loader(steps, 0, 10, 2, "threads")))


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
