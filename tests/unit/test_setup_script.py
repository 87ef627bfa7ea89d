"""scripts/setup.sh on machines that lack something: the package manager is a recorder, everything else is real."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def packages(name: str) -> set[str]:
    lines = (ROOT / "scripts" / name).read_text().splitlines()
    return {line for line in lines if not line.startswith("#")}


PACKAGES = packages("system-packages.txt")
TEST_PACKAGES = packages("system-packages-test.txt")


class Machine:
    """A PATH whose first directory holds programs that pretend to be another machine's."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.log = directory / "apt.log"
        self.program("apt-get", f'echo "$@" >>{self.log}')

    def program(self, name: str, body: str) -> None:
        file = self.bin / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    def setup(self, kind: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f'. "{ROOT}/scripts/setup.sh"; fsd_system {kind}'],
            env={"PATH": f"{self.bin}{os.pathsep}/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def installed(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.program("id", "echo 0")
    made.program("dpkg-query", "exit 1")
    return made


def test_root_installs_what_is_missing(machine: Machine) -> None:
    assert machine.setup("run").returncode == 0
    update, install = machine.installed()
    assert update.split()[0] == "update"
    assert install.split()[0] == "install"
    assert "-y" in install.split()
    assert set(install.split()) >= PACKAGES
    assert not set(install.split()) & (TEST_PACKAGES - PACKAGES)


def test_the_tests_need_more(machine: Machine) -> None:
    assert machine.setup("test").returncode == 0
    assert set(machine.installed()[-1].split()) >= PACKAGES | TEST_PACKAGES


def test_a_user_without_sudo_is_told_the_command(machine: Machine) -> None:
    machine.program("id", "echo 1000")
    machine.program("sudo", "exit 1")
    done = machine.setup("run")
    assert done.returncode != 0
    assert "sudo apt-get install --no-install-recommends fuse3 libfuse3-dev" in done.stderr
    assert machine.installed() == []


def test_a_user_with_sudo_installs_through_it(machine: Machine) -> None:
    machine.program("id", "echo 1000")
    machine.program("sudo", '[ "$1" = -n ] && shift; exec "$@"')
    assert machine.setup("run").returncode == 0
    assert len(machine.installed()) == 2


def test_nothing_missing_installs_nothing(machine: Machine) -> None:
    machine.program("dpkg-query", "echo installed")
    assert machine.setup("test").returncode == 0
    assert machine.installed() == []


def test_a_failing_installation_is_a_failure(machine: Machine) -> None:
    machine.program("apt-get", "exit 100")
    assert machine.setup("run").returncode != 0
