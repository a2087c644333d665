"""What this package does on a GPU: python benchmarks/gpu.py attention|step|peers|pretrain|all --out DIR [--small].

`--small` takes shapes that a CPU finishes in about a minute. The exit code is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import attention
import gpu_step
import pretrain

STAGES = {"attention": attention.run, "step": gpu_step.run, "peers": gpu_step.run_peers, "pretrain": pretrain.run}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=int, default=240, help="pretrain: for training and evaluation together")
    options = parser.parse_args()
    failed = []
    for name in STAGES if options.stage == "all" else [options.stage]:
        more = {"seconds": options.seconds} if name == "pretrain" else {}
        try:
            right = STAGES[name](options.out, options.small, **more)
        except Exception:
            traceback.print_exc()
            right = False
        if not right:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
