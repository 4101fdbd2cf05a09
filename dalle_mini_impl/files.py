"""Files that are whole or not there, and errors that say which file they are about."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_UNTOUCHED = "what was there before is untouched"
_NEXT_TO_NOTHING_BYTES = 1 << 20


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives errors of the disk the name of the file that they are about: write() on a full disk knows none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _OF_THE_DISK:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, flushes it to the disk and renames it.

    Raises OSError that names `path` where the disk is full or can't be written to; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, f".{glob.escape(path.name)}.*.tmp")
        write(temporary)
        temporary.chmod(0o644)  # safetensors lets nobody but its owner read what it writes
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, f"{error.strerror or error}; {_UNTOUCHED}", str(path)) from error
    except (RuntimeError, SafetensorError) as error:  # what torch.save and safetensors make of a full disk
        is_full = shutil.disk_usage(path.parent).free < _NEXT_TO_NOTHING_BYTES
        number, text = (errno.ENOSPC, os.strerror(errno.ENOSPC)) if is_full else (errno.EIO, str(error))
        raise OSError(number, f"{text}; {_UNTOUCHED}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes what killed processes have left: files and folders .NAME.PID.ENDING whose process is no more."""
    for path in folder.glob(pattern):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not _is_alive(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def flush(path: Path) -> None:
    """Makes what was written to a file survive a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def check_writable(folder: Path) -> None:
    """Makes a folder and tries whether files can be written there; raises OSError that names it where they can't.

    Raises ValueError for a name that is no text: safetensors takes no other.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{folder} has bytes in its name that are no UTF-8: choose another name") from None
    probe = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        name = str(folder) if error.filename == str(probe) else error.filename
        raise OSError(error.errno, f"{error.strerror}; nothing has been done yet", name) from error


class FolderLock:
    """Keeps a folder to one process, by the system's own lock of it (flock), which ends with the process in any case.

    Where folders can't be locked (Windows, some network disks) every process gets it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def take(self, wait_sec: float = 0.0) -> bool:
        """Whether it is this lock's now, or could never be anyone's; waits so long for another to let go.

        Raises OSError where there is no such folder.
        """
        if fcntl is None or self._descriptor is not None:
            return True
        descriptor = os.open(self.folder, os.O_RDONLY)
        until = time.monotonic() + wait_sec
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                os.close(descriptor)
                return False
            except OSError:
                os.close(descriptor)
                return True
            self._descriptor = descriptor
            return True

    def close(self) -> None:
        """Lets go, if it is this lock's."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_json(path: Path, remedy: str) -> Any:
    """Reads JSON; raises ValueError that names the file, and the remedy, where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from None


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 atomically.

    Bytes of file names that are no UTF-8, which Python reads as lone surrogates, become escapes that JSON reads back.
    """
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically, indented, keys in their own order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, values: Iterable[object]) -> None:
    """Writes JSON atomically, a line a value."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def reserve(path: Path) -> None:
    """Takes the disk space of a file that is about to be written through memory, where a full disk would kill.

    Raises OSError that names `path` where there isn't enough.
    """
    if hasattr(os, "posix_fallocate"):
        with naming(path), path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system can flush a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
