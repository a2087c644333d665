"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import os
import signal


class StopSignal:
    """Remembers the first SIGTERM or SIGHUP in `number`, and from `catch_interrupts` on the first SIGINT; a second one
    ends the process at once."""

    def __init__(self):
        self.number, self._before = 0, {}
        known = [signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup: a closed terminal is to be ignored
            known.append(signal.SIGHUP)
        self._catch(known)

    def catch_interrupts(self) -> None:
        self._catch([signal.SIGINT])

    def _catch(self, numbers: list) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread, which alone receives signals
            for number in numbers:
                self._before[number] = signal.signal(number, self._remember)

    def _remember(self, number, frame) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
