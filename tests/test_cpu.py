"""What a training asks of its process; that steps are the same with it stands in the tests of resuming."""

import subprocess
import sys
from pathlib import Path

import pytest

GROWTH = """
import sys, torch
from multimodal_fm.train.cpu import keep_freed_memory

def faults():
    return int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[7])  # minflt

def step():
    blocks = [torch.ones(12 << 20) for _ in range(4)]  # 48 MiB each, which glibc maps anew by default

keep = sys.argv[1] == "keep"
if keep and not keep_freed_memory():
    sys.exit("skip")
for _ in range(8):  # until the heap has the shape that a step needs
    step()
before = faults()
step()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_a_step_that_asks_for_as_much_again_gets_the_same_pages():
    def count(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", GROWTH, how], capture_output=True, text=True)
        if done.stderr.strip() == "skip":
            pytest.skip("this C library has no mallopt")
        assert not done.returncode, done.stderr
        return int(done.stdout)

    assert count("keep") < count("default") / 10


SUBNORMAL = """
import torch
from multimodal_fm.train.cpu import without_subnormals

def kept(count):
    return int((torch.full((count,), 1e-30) * 1e-10).count_nonzero())

torch.set_num_threads(2)
with without_subnormals():
    with without_subnormals():
        inside = kept(1 << 22)
    between = kept(1)
print(inside, between, kept(1))
"""


def test_what_is_too_small_is_zero_in_every_thread_while_a_run_goes_on():
    done = subprocess.run([sys.executable, "-c", SUBNORMAL], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "0", "1"], done.stderr


RUN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from conftest import samples, text_only
from multimodal_fm.corpus import shards
from multimodal_fm.train import loop
from multimodal_fm.train.config import build

update, kept = loop.Run.update, []

def counted(self, microbatches):
    kept.append(int((torch.full((1 << 22,), 1e-30) * 1e-10).count_nonzero()))
    return update(self, microbatches)

loop.Run.update = counted
shards.write("train-0.tar", samples(16))
loop.pretrain(build(text_only(Path.cwd(), "run", steps=2, save_every=2, threads=2)))
print(kept, file=sys.stderr)
"""


def test_a_run_counts_them_as_zero(tmp_path):
    """In a process whose threads torch starts in the run."""
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert not done.returncode and done.stderr.splitlines()[-1] == "[0, 0]", done.stderr
