"""Several ranks in forks of this process, which has imported everything already: a test pays for no start."""

import os
import socket
import sys
import traceback
from collections.abc import Callable


def start_ranks(size: int, work: Callable[[], object]) -> list[int]:
    """`work()` in so many forks, each with the environment that torchrun would give it; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                work()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def wait_for(pids: list[int]) -> list[int]:
    """Their exit codes; that of a signal is negative."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def run_ranks(size: int, work: Callable[[], object]) -> None:
    """`work()` by so many ranks, none of which may fail. One is this process."""
    if size == 1:
        work()
    else:
        codes = wait_for(start_ranks(size, work))
        assert codes == [0] * size, f"exit codes of the ranks: {codes}"
