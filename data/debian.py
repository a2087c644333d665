"""Debian packages: unpacked from a given folder or file or from the cache, or downloaded without being root."""

import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from data.writing import BAD_ARGUMENT, NO_SOURCE, Progress, RecipeError

PATIENCE_SECONDS = 300  # a download that stands still for so long is given up


@dataclass(frozen=True)
class Package:
    """What a recipe wants of a package."""

    name: str
    inside: str  # the folder that is wanted
    bytes: int  # of the package, about

    @property
    def mend(self):
        return f"get the Debian package {self.name} yourself and name it with --from"


# Lists and archives of its own, no hooks of the system's, and no change of user: apt's download user may
# not enter a private folder.
APT_SETTINGS = """\
Dir::State::Lists "{work}/lists";
Dir::Cache "{work}";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
quiet "1";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


def find(package, given, cache):
    """The folder that is wanted, in `given` (--from; None: the cache or a download).

    Raises RecipeError: code 2 where `given` has no such folder, code 3 where the package can't be had.
    """
    if given is None:
        return unpack(package, cached(package, cache) or download(package, cache), cache, NO_SOURCE)
    if not given.exists():
        raise RecipeError(f"--from {given}: no such file or folder")
    files = [given] if given.is_file() else sorted(given.glob(f"{package.name}_*.deb"))
    if given.is_dir() and (given / package.inside).is_dir():
        return given / package.inside
    return unpack(package, files[-1], cache) if files else given


def cached(package, cache):
    """The file that an earlier run downloaded, or None."""
    return next(iter(sorted(cache.glob(f"{package.name}_*.deb"))), None)


def unpack(package, file, cache, code=BAD_ARGUMENT):
    """Unpack a .deb into the cache, once, and return the folder that is wanted."""
    folder = cache / f"{file.stem}-{file.stat().st_size}"
    if not folder.is_dir():
        if not shutil.which("dpkg-deb"):
            raise RecipeError(f"dpkg-deb, to unpack {file}, is missing; {package.mend} (unpacked)", NO_SOURCE)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        done = subprocess.run(["dpkg-deb", "-x", file, part], check=False, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(part)
            raise RecipeError(f"{file} can't be unpacked ({error_line(done.stderr)}); {package.mend}", code)
        part.replace(folder)
    if not (folder / package.inside).is_dir():
        raise RecipeError(f"{file} holds no {package.inside}; {package.mend}", code)
    return folder / package.inside


def download(package, cache):
    """Fetch the package with apt-get, with lists and caches of its own: no root, no trace on the system.

    The file enters the cache under its name only when it is whole.
    """
    if not shutil.which("apt-get"):
        raise RecipeError(f"apt-get, which downloads {package.name}, is missing; {package.mend}", NO_SOURCE)
    work = (cache / "apt").resolve()
    target = work / "download"
    shutil.rmtree(target, ignore_errors=True)
    for folder in (target, work / "lists" / "partial", work / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    settings = work / "apt.conf"
    settings.write_text(APT_SETTINGS.format(work=work))
    apt = ["apt-get", "-c", str(settings)]
    # An update may fail over a mirror of no interest here; whether the package comes is what counts.
    print("updating the package lists", file=sys.stderr)
    stale = watched([*apt, "update"], target, work)
    progress = Progress(f"downloading {package.name}", package.bytes)
    trouble = watched([*apt, "download", package.name], target, target, progress)
    files = sorted(target.glob(f"{package.name}_*.deb"))
    if trouble or not files:
        reason = stale or trouble or "no file came"
        raise RecipeError(f"{package.name} can't be downloaded: {reason}; {package.mend}", NO_SOURCE)
    return files[0].replace(cache / files[0].name)


def watched(command, here, grows, progress=None):
    """Run a command in the folder `here` until it ends, or the folder `grows` stands still for too long.

    Returns "" on success, else the line that says why.
    """
    log = here.with_name("log.txt")
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=here, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        size, since = 0, time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.2)
                now = folder_size(grows)
                if now != size:
                    if progress:
                        progress.reach(now)
                    size, since = now, time.monotonic()
                elif time.monotonic() - since > PATIENCE_SECONDS:
                    return f"no progress for {PATIENCE_SECONDS} s"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if progress and process.returncode == 0:
        progress.reach(progress.total)
    return "" if process.returncode == 0 else error_line(log.read_text(errors="replace"))


def folder_size(folder):
    """Bytes of the files in a folder that may change meanwhile."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def error_line(text):
    """The line of a tool's output that says what went wrong: the first error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "dpkg-deb: error"))]
    return (errors or lines[-1:] or ["no reason given"])[0]
