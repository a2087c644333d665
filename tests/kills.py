"""Kills a process: just before the n-th time that it forces something to the disk or names it, or after some time.

The process is a fork of this one, so that it does not import everything anew for each kill.
"""

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable

CALLS = ("fsync", "replace", "unlink", "rmdir")


def killed(work: Callable, instant: int) -> bool:
    """Call `work` in a fork of this process, which SIGKILL ends at that instant; false where it ended before."""
    return _ended_by_kill(_fork(work, instant))


def killed_after(work: Callable, seconds: float) -> bool:
    """Call `work` in a fork of this process, which SIGKILL ends after so long; false where it ended before."""
    pid = _fork(work)
    ended = os.pidfd_open(pid)
    if not select.select([ended], [], [], seconds)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(ended)
    return _ended_by_kill(pid)


def seconds_of(work: Callable) -> float:
    """How long `work` takes in a fork of this process."""
    began = time.monotonic()
    assert not killed_after(work, 600)
    return time.monotonic() - began


def _fork(work: Callable, instant: int = 0) -> int:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            if instant:
                _arm(instant)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def _ended_by_kill(pid: int) -> bool:
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed"
    return False


def _arm(instant: int) -> None:
    left = instant

    def kill_before(call):
        def wrapped(*given, **named):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        return wrapped

    for name in CALLS:
        setattr(os, name, kill_before(getattr(os, name)))
