"""Files and folders that appear whole or not at all. Standard library alone."""

import errno
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


_LFS_HEADER = b"version https://git-lfs"


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is what git-lfs leaves in a clone in the place of a large one."""
    with open(path, "rb") as file:
        return file.read(len(_LFS_HEADER)) == _LFS_HEADER


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place."""
    temporary = _beside(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 so that it is there whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; what is left of it afterwards is removed, with parents made for it."""
    staging = _beside(target)
    missing = [folder for folder in staging.parents if not folder.exists()]
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # it holds what was moved out of the staging folder
                folder.rmdir()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`, which becomes `target` on success and vanishes on failure.

    Raises:
        ValueError: `target` exists and is not an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: choose another output folder, or remove it.")
    with staging_folder(target) as staging:
        yield staging
        os.replace(staging, target)


def lock_until_the_end(path: Path) -> None:
    """Hold a file for this process alone. The system lets it go when the process ends, however it ends.

    A lock of POSIX, since it is not inherited by workers, which can outlive a killed run by seconds. File systems
    without locks are passed by with a note.

    Raises:
        ValueError: another process holds it.
        OSError: the file can't be written.
    """
    if not hasattr(os, "fork"):
        print(f"{path} can't be locked on {platform.system()}: let no other run write there.", file=sys.stderr)
        return
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # never closed: that would let the lock go
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"{path} can't be locked here ({error.strerror}): let no other run write there.", file=sys.stderr)
            return
        holder = os.read(descriptor, 200).decode() or "another process"
        os.close(descriptor)
        raise ValueError(
            f"{path.parent} is in use by a run ({holder}): let it end, or choose another `output_dir`."
        ) from error
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())


def is_locked(path: Path) -> bool:
    """Whether a process of this machine that lives has written into a file of [`lock_until_the_end`].

    The lock itself is left alone: to try it would be to hold it, and a run that starts just then would be refused.
    """
    try:
        _, process, _, node = path.read_text(encoding="utf-8").split(maxsplit=3)
        if node != platform.node():
            return False
        os.kill(int(process), 0)
    except PermissionError:  # of another user, and alive
        return True
    except (OSError, ValueError):
        return False
    return True


def _beside(path: Path) -> Path:
    """On the same file system, so that it can be moved into place; this process's own."""
    return path.absolute().with_name(f".{path.name}.incomplete-{os.getpid()}")
