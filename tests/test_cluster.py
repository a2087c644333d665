"""Work that several machines share: the same bytes, however many do it and whichever of them is lost."""

import contextlib
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import jpeg, samples, tone

from multimodal_fm.corpus import shards
from multimodal_fm.errors import UserError
from multimodal_fm.pack.run import pack
from multimodal_fm.pack.settings import Settings
from multimodal_fm.stream import cluster
from multimodal_fm.stream.worker_pool import Job

ROOT = Path(__file__).parent.parent
SETTINGS = ("split", (0.7, 0.2, 0.1)), ("shard_size", 200_000)


def square(number: int) -> int:
    if number == 13:
        raise UserError("thirteen")
    if number == 14:
        open("/no/such/file")
    return number * number


def die_once(path: str) -> str:
    """Ends its process at the first call."""
    if not Path(path).exists():
        Path(path).write_text("died")
        os.kill(os.getpid(), 9)
    return "done"


class Write:
    """An `on_death` that says what it has seen."""

    def __init__(self, path):
        self.path = path

    def __call__(self, job: Job, worker: int, exit_code: int) -> None:
        Path(self.path).write_text(f"{job.argument} {job.deaths} {exit_code}")


@contextlib.contextmanager
def ranks(count: int, own_process: bool = False):
    """The first rank's executor, and threads that do its jobs as the ranks' threads do."""
    store = dist.HashStore()
    store.add("processes", count)
    threads = [threading.Thread(target=cluster._serve, args=(store, own_process)) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield cluster.Ranks(store)
    finally:
        store.set("end", "")
        for thread in threads:
            thread.join()


def test_ranks_do_each_job_once_in_any_order():
    with ranks(3) as executor:
        for _ in range(2):
            found = list(executor.run(square, range(10)))
            assert sorted(found) == [(number, number * number) for number in range(10)]


def test_what_a_rank_raises_reaches_the_first():
    with ranks(2) as executor:
        with pytest.raises(UserError, match="thirteen"):
            list(executor.run(square, [1, 13]))
        with pytest.raises(UserError, match="/no/such/file: not there on .*: every machine needs the sources"):
            list(executor.run(square, [14]))


def test_a_process_of_a_rank_that_dies_is_replaced(tmp_path):
    with ranks(1, own_process=True) as executor:
        [(_, result)] = executor.run(die_once, [str(tmp_path / "one")], Write(str(tmp_path / "seen")))
    assert result == "done" and (tmp_path / "seen").read_text() == f"{tmp_path / 'one'} 1 -9"


def test_a_job_can_be_pickled_for_its_process():
    told = cluster._Told((square, 3), Write("x"))
    assert pickle.loads(pickle.dumps(told)) == (square, 3)


def test_without_ray_or_its_cluster_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = r"--cluster needs Ray: pip install 'multimodal_fm\[cluster\]'"
    with pytest.raises(UserError, match=message), cluster.open_executor("auto", 1):
        pass


def hashes(folder: Path) -> dict[str, str]:
    """Of all that a pack leaves but the shards' indexes, which hold when each was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".pack" not in path.parts)
    files = [path for path in files if path.suffix != ".mmidx"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_sources(folder: Path, count: int) -> list[str]:
    """Two shards with copies and damage in them, and a table."""
    made = samples(count)
    for number, sample in enumerate(made):
        if number % 7 == 3:
            sample["jpg"] = sample["jpg"][:100]  # cut
        elif number % 4:
            sample["jpg"] = jpeg((number % 251, number // 251 % 251, 7), (96, 80))
        sample["flac"] = tone(200.0 + number % 400, 0.2)
    shards.write(folder / "a.tar", made[: count // 2])
    shards.write(folder / "b.tar", made[count // 2 :] + [{**made[0], "__key__": "copy"}])
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": f"note {n} " * 40}) + "\n" for n in range(count)))
    return [str(folder / name) for name in ("a.tar", "b.tar", "notes.jsonl")]


def start(*command, **environment) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, stderr=subprocess.PIPE, text=True)


def start_nodes(cluster_class, tries: int = 5):
    """A Ray cluster with a head; on a busy machine a node does not always start in Ray's 30 seconds."""
    for left in reversed(range(tries)):
        try:
            return cluster_class(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        except Exception:
            if not left:
                raise


def options(to: Path) -> list[str]:
    return ["--to", str(to), "--split", "0.7,0.2,0.1", "--shard-size", "200kB"]


@pytest.mark.slow
def test_pack_and_inspect_under_torchrun_make_the_bytes_of_one_process(tmp_path):
    sources = make_sources(tmp_path, 800)
    pack(Settings(sources, split=(0.7, 0.2, 0.1), shard_size=200_000), tmp_path / "one/corpus", 0)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "multimodal_fm"]
    done = start(*torchrun, "pack", *sources, *options(tmp_path / "many/corpus"), "--workers", "1")
    assert done.wait(280) == 0, done.stderr.read()
    assert hashes(tmp_path / "many/corpus") == hashes(tmp_path / "one/corpus")
    said = subprocess.run(
        [sys.executable, *torchrun, "inspect", tmp_path / "one/corpus" / "train-*.tar", "--verify", "--json"],
        capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert said.returncode == 0 and json.loads(said.stdout)["damage"]["count"] == 0, said.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_that_is_lost_changes_no_byte(tmp_path):
    """Ray with three nodes, one of which is killed while it reads."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    sources = make_sources(tmp_path, 2000)
    began = time.monotonic()
    pack(Settings(sources, split=(0.7, 0.2, 0.1), shard_size=200_000), tmp_path / "one/corpus", 1)
    alone = time.monotonic() - began
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    nodes = start_nodes(Cluster)
    try:
        lost, _ = (nodes.add_node(num_cpus=1) for _ in range(2))
        nodes.wait_for_nodes()
        begun = time.monotonic()
        running = start(
            "-m", "multimodal_fm", "pack", *sources, *options(tmp_path / "many/corpus"), "--cluster", nodes.address
        )  # fmt: skip
        chunks = tmp_path / "many/corpus" / ".pack" / "chunks"
        while len(list(chunks.glob("*.jsonl"))) < 3 and running.poll() is None:
            time.sleep(0.05)
        under_way = len(list(chunks.glob("*.current")))
        nodes.remove_node(lost, allow_graceful=False)
        assert running.poll() is None and under_way, "it had ended before the node was lost"
        assert running.wait(600) == 0, running.stderr.read()
        print(f"one process {alone:.0f} s, three nodes of which one was lost {time.monotonic() - begun:.0f} s")
        assert hashes(tmp_path / "many/corpus") == hashes(tmp_path / "one/corpus")
    finally:
        nodes.shutdown()
