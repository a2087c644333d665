"""What ends a process that would otherwise hang: a step that takes too long, and a launcher that has died."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

SECONDS_BETWEEN_LOOKS = 1.0


class Watchdog:
    """Prints the stacks of all threads to stderr and ends the process with exit code 1 where nothing calls `feed` for
    `seconds`; 0 is for ever. A thread of the interpreter's own watches, which needs no lock that a hang may hold."""

    def __init__(self, seconds: int):
        self.seconds = seconds
        self.feed()

    def feed(self) -> None:
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=_stderr())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While other things than a step go on, of which nobody knows how long they take."""
        self.close()
        yield
        self.feed()

    def close(self) -> None:
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()


def _stderr() -> int:
    """The file descriptor of stderr, whatever stands in its place."""
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return 2


def leave_with_launcher() -> None:
    """Under torchrun: end this process within seconds when its launcher dies, however it does.

    An orphan would go on training, and write beside the run that is started in its place.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.write(2, b"the launcher of this rank has died: the rank leaves\n")
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
