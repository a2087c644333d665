"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal


class StopSignal:
    """Remembers the first SIGINT, SIGTERM or SIGHUP in `number`; a second one ends the process at once."""

    def __init__(self):
        self.number = 0
        known = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup: a closed terminal is to be ignored
            known.append(signal.SIGHUP)
        try:
            self._before = {number: signal.signal(number, self._remember) for number in known}
        except ValueError:  # not in the main thread, which alone receives signals
            self._before = {}

    def _remember(self, number, frame) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
