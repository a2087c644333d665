"""Kills a process at a chosen instant: just before the n-th time that it forces something to the disk or names it."""

import os
import signal

CALLS = ("fsync", "replace", "unlink", "rmdir")


def killed(work, instant: int) -> bool:
    """Call `work` in a fork of this process, which SIGKILL ends at that instant; false where it ended before."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            _arm(instant)
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
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
