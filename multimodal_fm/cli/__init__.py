"""The command line: it parses, calls and prints. Bad input is one line and exit code 2."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from json import dumps
from pathlib import Path
from typing import NoReturn

from cyclopts import CycloptsError, MissingArgumentError, UnknownOptionError

from ..errors import UserError, printable
from . import corpora, evaluation, generation, searching, serving, sharing, training  # noqa: F401  for their commands
from .app import app

SECONDS_FOR_THE_FIRST = 10  # that a process waits for the first to fail, before it prints why it failed itself


def arguments(words: list[str]) -> list[str]:
    """`pretrain --resume` alone is `pretrain --resume yes`."""
    if words[:1] == ["pretrain"] and "--resume" in words and words[words.index("--resume") + 1 :][:1] != ["auto"]:
        words = [word for given in words for word in ((given, "yes") if given == "--resume" else (given,))]
    return words


def _usage(error: CycloptsError) -> str:
    """What is wrong with the words of a command line."""
    command = " ".join(error.command_chain or ())
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[-1].removesuffix(".")
    if isinstance(error, MissingArgumentError) and error.argument:
        name = error.argument.name
        text = f"{command}: {name} {'needs a value' if name in sys.argv else 'is missing'}"
    elif isinstance(error, UnknownOptionError) and command == "pretrain":
        text += "; settings of the configuration are written without dashes, as in steps=50"
    return f"{text} (see mmfm {command + ' ' if command else ''}--help)"


def fail(what: str) -> NoReturn:
    """Print one line on standard error and exit with 2.

    Of several processes the first prints it. torchrun ends the others when the first has failed; one that is still
    there some seconds later has failed alone, and says so.
    """
    line = f"mmfm: {printable(what)}"
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun repeats what stands there below its own traceback
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(dumps({"message": message}))
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_THE_FIRST)
    print(line, file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 2."""
    # Waiting threads sleep rather than spin: on a busy machine a step takes two thirds of the time (benchmarks/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever began us
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a corpus may hold what a terminal cannot show
    try:
        app(arguments(sys.argv[1:]), exit_on_error=False, print_error=False)
    except UserError as error:
        fail(" ".join(str(error).splitlines()) or type(error).__name__)
    except CycloptsError as error:
        fail(_usage(error))
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if error.errno is None:
            raise
        fail(f"{error.filename or 'reading or writing'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
