"""The README's commands, run as they stand, with its paths, hosts and ports replaced by the test's own."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mount import mount_table
from mount.cluster_state import choose_port
from mount.config import SECTIONS, Settings
from mount.processes import fsd_command
from tests.support.cluster import LocalCluster, wait_until

pytestmark = pytest.mark.mounted

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMAND_TIMEOUT_S = 120


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def shell(command: str, cluster: LocalCluster) -> str:
    fsd = " ".join(shlex.quote(word) for word in fsd_command())
    done = subprocess.run(
        ["bash", "-c", f'fsd() {{ {fsd} "$@"; }}; python3() {{ {sys.executable} "$@"; }}; {command}'],
        env=cluster.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_readme_leads_with_the_two_commands() -> None:
    first = README.split("```")[1].split("\n", 1)[1]
    assert [shlex.split(line)[0] for line in first.splitlines()] == ["scripts/up", "scripts/test"]
    for line in first.splitlines():
        assert (ROOT / shlex.split(line)[0]).stat().st_mode & 0o111


def test_the_quick_start_works(own_cluster: LocalCluster) -> None:
    own_cluster.up()  # What scripts/up ends with.
    printed = "".join(
        shell(line.replace("/mnt/fsd", str(own_cluster.mountpoint)), own_cluster) for line in commands(blocks("sh")[0])
    )
    assert "hello\n" in printed
    assert "healthy" in printed
    assert "the data stay" in printed
    assert mount_table.find(str(own_cluster.mountpoint)) is None


def test_the_commands_for_several_machines_work(own_cluster: LocalCluster) -> None:
    metadata_port = choose_port(set())
    block_port = choose_port({metadata_port})
    text = blocks("sh")[1]
    for written, ours in {
        "/srv/fsd": str(own_cluster.directory / "srv"),
        "/mnt/fsd": str(own_cluster.mountpoint),
        "7400": str(metadata_port),
        "7401": str(block_port),
        "0.0.0.0": "127.0.0.1",
        "meta1:": "127.0.0.1:",
        " store1\n": " 127.0.0.1\n",
    }.items():
        assert written in text
        text = text.replace(written, ours)
    metadata, block, *client = commands(text)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons += [start(command, own_cluster) for command in (metadata, block)]
        status = next(line for line in client if line.startswith("fsd status"))
        wait_until(lambda: answers(status, own_cluster), "the block server has registered")
        for command in client:
            printed = shell(
                command.replace("fsd mount ", "fsd mount --data " + str(own_cluster.data) + " "), own_cluster
            )
            if command == status:
                assert "healthy" in printed
                (own_cluster.mountpoint / "file").write_text("on several machines")
        assert mount_table.find(str(own_cluster.mountpoint)) is None
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            assert daemon.wait(60) == 0


def start(command: str, cluster: LocalCluster) -> subprocess.Popen[bytes]:
    word, *arguments = shlex.split(command)
    assert word == "fsd"
    return subprocess.Popen(
        fsd_command(*arguments), env=cluster.environment(), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def answers(status: str, cluster: LocalCluster) -> bool:
    return cluster.fsd(*shlex.split(status)[1:], status=(0, 1, 3)).returncode == 0


def test_the_readmes_settings_are_valid(tmp_path: Path) -> None:
    for example in [*blocks("toml"), *toml_of(ROOT / "docs" / "how-to" / "several-machines.md")]:
        file = tmp_path / "fsd.toml"
        file.write_text(example)
        settings = Settings(argparse.Namespace(config=file))
        for kind in SECTIONS.values():
            settings.take(kind)


def toml_of(document: Path) -> list[str]:
    found = re.findall(r"^```toml\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert found
    return found
