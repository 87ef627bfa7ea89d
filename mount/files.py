"""Small files of the commands: JSON replaced atomically, and locks that end with their process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import msgspec

from mount.outcome import CommandError

T = Any


def write_json(path: Path, value: msgspec.Struct) -> None:
    """Replace `path` by the value, whole or not at all; the directory is flushed, so that it survives a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(msgspec.to_builtins(value), indent=1) + "\n"
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


S = msgspec.Struct


def read_json(path: Path, kind: type[Any]) -> Any:  # noqa: ANN401 - an instance of `kind`
    """The value in `path`; None when there is no such file.

    Raises:
        CommandError: it is there and is not what we wrote.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise CommandError(f"{path} is damaged ({error}); if nothing of it runs any more, remove it") from error


class FileLock:
    """An exclusive lock on a file, held until it is closed or the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1

    def acquire_nowait(self) -> bool:
        """True: it is ours now.  False: another process has it."""
        return self._acquire(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def acquire(self) -> None:
        """Wait until it is ours."""
        self._acquire(fcntl.LOCK_EX)

    def close(self) -> None:
        """Give it back; harmless when it is not held."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def held_by_another(self) -> bool:
        """True when a process has it; takes it for a moment to find out."""
        if not self._path.exists():
            return False
        free = self.acquire_nowait()
        self.close()
        return not free

    def _acquire(self, how: int) -> bool:
        assert self._file < 0, f"{self._path} is locked by this object already"
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, how)
        except OSError as error:
            os.close(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        self._file = file
        return True


def make_directory(path: Path, purpose: str) -> None:
    """Make a private directory with its parents; harmless when it is there.

    Raises:
        CommandError: it cannot be made, or this user may not write there.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make {path} for {purpose}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise CommandError(f"{path} ({purpose}) may not be written by this user; use another one or its owner")
