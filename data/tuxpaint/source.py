"""Finds the unpacked stamps: in a given folder or package file, in the cache, or by downloading them."""

import shutil
import subprocess
import sys
import time
from contextlib import suppress

from data.writing import BAD_ARGUMENT, NO_SOURCE, Progress, RecipeError

PACKAGE = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps"
BYTES = 161_000_000  # of the package, about
PATIENCE_SECONDS = 300  # a download that stands still for so long is given up
MEND = "get the Debian package tuxpaint-stamps-default yourself and name it with --from"

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


def find_stamps(given, cache):
    """The folder of stamps in `given` (--from; None: the cache or a download).

    Raises RecipeError: code 2 where `given` has no stamps, code 3 where the package can't be had.
    """
    if given is None:
        return unpack(cached_package(cache) or download(cache), cache, NO_SOURCE)
    if not given.exists():
        raise RecipeError(f"--from {given}: no such file or folder")
    packages = [given] if given.is_file() else sorted(given.glob(f"{PACKAGE}*.deb"))
    if given.is_dir() and (given / STAMPS).is_dir():
        return given / STAMPS
    return unpack(packages[-1], cache) if packages else given


def cached_package(cache):
    """The package that an earlier run downloaded, or None."""
    return next(iter(sorted(cache.glob(f"{PACKAGE}*.deb"))), None)


def unpack(package, cache, code=BAD_ARGUMENT):
    """Unpack a .deb into the cache, once, and return its folder of stamps."""
    folder = cache / f"{package.stem}-{package.stat().st_size}"
    if not folder.is_dir():
        if not shutil.which("dpkg-deb"):
            raise RecipeError(f"dpkg-deb, to unpack {package}, is missing; {MEND} (unpacked)", NO_SOURCE)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        done = subprocess.run(["dpkg-deb", "-x", package, part], check=False, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(part)
            raise RecipeError(f"{package} can't be unpacked ({error_line(done.stderr)}); {MEND}", code)
        part.replace(folder)
    if not (folder / STAMPS).is_dir():
        raise RecipeError(f"{package} holds no {STAMPS}; {MEND}", code)
    return folder / STAMPS


def download(cache):
    """Fetch the package with apt-get, with lists and caches of its own: no root, no trace on the system.

    The file enters the cache under its name only when it is whole.
    """
    if not shutil.which("apt-get"):
        raise RecipeError(f"apt-get, which downloads {PACKAGE}, is missing; {MEND}", NO_SOURCE)
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
    progress = Progress(f"downloading {PACKAGE}", BYTES)
    trouble = watched([*apt, "download", PACKAGE], target, target, progress)
    packages = sorted(target.glob(f"{PACKAGE}*.deb"))
    if trouble or not packages:
        reason = stale or trouble or "no file came"
        raise RecipeError(f"{PACKAGE} can't be downloaded: {reason}; {MEND}", NO_SOURCE)
    return packages[0].replace(cache / packages[0].name)


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
