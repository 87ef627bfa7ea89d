"""Where daemons' events go: stderr in the foreground, else a file whose size is bounded."""

from __future__ import annotations

import logging
import logging.handlers
import os
from pathlib import Path

from mount.config import LogSettings
from mount.files import make_directory
from mount.outcome import CommandError
from wire import log

OLD_LOGS_COUNT = 3


def configure(settings: LogSettings) -> None:
    """Send this process's events where the settings say.

    Raises:
        CommandError: the file cannot be opened.
    """
    log.configure(level=settings.level, file=None)
    if settings.file is None:
        return
    make_directory(settings.file.parent, "logs")
    try:
        handler = logging.handlers.RotatingFileHandler(
            settings.file,
            maxBytes=settings.size_mib << 20,
            backupCount=OLD_LOGS_COUNT,
            encoding="utf-8",
            errors="backslashreplace",
        )
    except OSError as error:
        raise CommandError(f"cannot write the log {settings.file}: {error.strerror}") from error
    root = logging.getLogger()
    handler.setFormatter(root.handlers[0].formatter)
    root.addHandler(handler)
    root.removeHandler(root.handlers[0])


def open_output(path: Path) -> int:
    """A descriptor for a daemon's stdout and stderr: what its log does not catch, such as a crash of the interpreter.

    Emptied when a former life left more than 1 MiB in it.

    Raises:
        CommandError: it cannot be opened.
    """
    make_directory(path.parent, "logs")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if os.fstat(descriptor).st_size > 1 << 20:
            os.ftruncate(descriptor, 0)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    return descriptor


def last_lines(path: Path, count: int = 5) -> str:
    """The end of a log, for an error message; "" when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-count:])
