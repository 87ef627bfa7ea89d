"""Logs: one event per line, `time LEVEL logger event key=value ...`, on top of the standard library's logging.

An event has a fixed name (it can be searched for) and fields; values that contain spaces, quotes, "=" or control
characters are quoted as in JSON, so that a line is always one line and can be cut apart again.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from enum import Enum

VALUE_SIZE_MAX = 2048
"""Characters of one field; longer ones are cut, as a peer may have chosen them."""


def format_value(value: object) -> str:
    """One field's value as text without a line break."""
    if isinstance(value, bytes | bytearray | memoryview):
        text = bytes(value[:VALUE_SIZE_MAX]).decode("utf-8", "backslashreplace")
    elif isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, Enum):
        text = value.name
    elif isinstance(value, BaseException):
        text = f"{type(value).__name__}: {value}"
    else:
        text = str(value)
    if len(text) > VALUE_SIZE_MAX:
        text = text[:VALUE_SIZE_MAX] + "..."
    if text == "" or any(c in ' "=\\' or not c.isprintable() for c in text):
        return json.dumps(text, ensure_ascii=not text.isprintable())
    return text


def format_event(event: str, fields: dict[str, object]) -> str:
    """`event key=value key=value`."""
    return " ".join([event, *(f"{key}={format_value(value)}" for key, value in fields.items())])


class EventLogger:
    """Writes events of one part of the program."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: object) -> None:
        """For whoever looks for a fault; off by default."""
        if self._logger.isEnabledFor(logging.DEBUG):
            self._logger.debug("%s", format_event(event, fields))

    def info(self, event: str, **fields: object) -> None:
        """Something that happens seldom and is as it should be."""
        if self._logger.isEnabledFor(logging.INFO):
            self._logger.info("%s", format_event(event, fields))

    def warning(self, event: str, **fields: object) -> None:
        """Something an operator should look at; the program goes on."""
        self._logger.warning("%s", format_event(event, fields))

    def error(self, event: str, **fields: object) -> None:
        """Something was lost or could not be done."""
        self._logger.error("%s", format_event(event, fields))

    def exception(self, event: str, **fields: object) -> None:
        """An error with the traceback of the exception being handled."""
        self._logger.exception("%s", format_event(event, fields))


class _LineFormatter(logging.Formatter):
    """`2025-01-31T12:00:00.123Z LEVEL logger event key=value`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{seconds}.{int(record.msecs):03d}Z {record.levelname} {record.name} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def get_logger(name: str) -> EventLogger:
    """The logger of one part; `name` is dotted, as in "wire.rpc"."""
    return EventLogger(logging.getLogger(name))


def configure(*, level: str, file: str | None) -> None:
    """Send the events of this process from `level` (debug, info, warning, error) up to `file`, or to stderr.

    Raises:
        ValueError: there is no such level; nothing was changed.
        OSError: the file cannot be opened; nothing was changed.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"no log level {level!r}: debug, info, warning or error")
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if file is not None:
        handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_LineFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(number)
