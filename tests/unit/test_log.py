from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.log import configure, format_event, format_value, get_logger


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for handler in handlers:
        root.removeHandler(handler)
    yield root
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def test_events_go_to_the_file_one_line_each(tmp_path: Path, root_logger: logging.Logger) -> None:
    file = tmp_path / "log"
    configure(level="info", file=str(file))
    logger = get_logger("part.of.it")
    logger.debug("unseen")
    logger.info("started", port=7, path=b"/a b", error=ValueError("x\ny"), took_s=0.12345678)
    try:
        raise KeyError("planted")
    except KeyError:
        logger.exception("failed", ino=3)
    lines = file.read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(stamp + r' INFO part\.of\.it started port=7 path="/a b" .*took_s=0\.123457', lines[0])
    assert r"ValueError: x\ny" in lines[0]
    assert re.fullmatch(stamp + r" ERROR part\.of\.it failed ino=3", lines[1])
    assert "KeyError: 'planted'" in lines[-1]


def test_an_unknown_level_is_refused(root_logger: logging.Logger) -> None:
    with pytest.raises(ValueError, match="no log level 'loud'"):
        configure(level="loud", file=None)


@given(st.one_of(st.text(), st.binary(), st.integers(), st.none(), st.floats()))
def test_a_value_never_breaks_its_line(value: object) -> None:
    text = format_value(value)
    assert text.isprintable()
    assert len(shlex.split(format_event("event", {"key": value}).replace("'", ""))) == 2
