"""Processes by identity, files replaced atomically, locks: on real processes and files."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mount.files import FileLock, make_directory, read_json, write_json
from mount.outcome import CommandError
from mount.processes import ProcessId, end, identify, users_of

SLEEPER = "import time; print('on', flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPER}"


def start(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    return process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    with start(SLEEPER) as process:
        yield process
        process.kill()


def identity(process: subprocess.Popen[str]) -> ProcessId:
    found = identify(process.pid)
    assert found is not None
    return found


def test_a_process_lives_until_it_ends(sleeper: subprocess.Popen[str]) -> None:
    process = identity(sleeper)
    assert process.alive()
    assert not process.wait_end(0.01)
    assert process.signal(signal.SIGKILL)
    assert process.wait_end(10)
    assert not process.alive(), "a zombie that nobody has waited for does not live"
    sleeper.wait()
    assert identify(sleeper.pid) is None
    assert process.signal(signal.SIGTERM) is False


def test_another_process_under_the_same_pid_is_left_alone(sleeper: subprocess.Popen[str]) -> None:
    process = identity(sleeper)
    for stranger in (
        dataclasses.replace(process, start_ticks=process.start_ticks - 1),
        dataclasses.replace(process, boot_id="another"),
    ):
        assert not stranger.alive()
        assert stranger.signal(signal.SIGKILL) is False
        assert end(stranger, grace_s=0)
    assert process.alive()


def test_a_process_deaf_to_sigterm_is_killed() -> None:
    with start(DEAF) as deaf:
        assert end(identity(deaf), grace_s=0.05)
        assert deaf.wait() == -signal.SIGKILL


def test_who_uses_a_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    code = f"import os; os.chdir({str(tmp_path / 'in')!r}); {SLEEPER}"
    with start(code) as process:
        assert process.pid in [pid for pid, _ in users_of(str(tmp_path))]
        assert process.pid not in [pid for pid, _ in users_of(str(tmp_path / "i"))]
        process.kill()


class Example(msgspec.Struct):
    number: int
    process: ProcessId | None = None


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    value = Example(3, identify(os.getpid()))
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", Example) == value
    assert os.listdir(tmp_path) == ["x.json"]


def test_no_file_is_none_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    assert read_json(tmp_path / "x.json", Example) is None
    for text in ('{"number": "three"}', '{"num', ""):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CommandError, match="damaged"):
            read_json(tmp_path / "x.json", Example)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x.json", Example(1))

    def fail(descriptor: int) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_json(tmp_path / "x.json", Example(2))
    assert read_json(tmp_path / "x.json", Example) == Example(1)


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = f"import fcntl; f = open({str(path)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); {SLEEPER}"
    lock = FileLock(path)
    assert not lock.held_by_another()
    with start(holder) as process:
        assert lock.held_by_another()
        assert not lock.acquire_nowait()
        process.kill()
        process.wait()
    assert not lock.held_by_another()
    assert lock.acquire_nowait()
    lock.close()


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="Not a directory"):
        make_directory(tmp_path / "file" / "x", "a test")
