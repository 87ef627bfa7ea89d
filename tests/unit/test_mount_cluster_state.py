"""What a local cluster is, from one start to the next."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mount.cluster_state import FORMAT, HOST, ClusterDirectory, ClusterIdentity, choose_port, port_is_free
from mount.config import UpSettings
from mount.outcome import CommandError
from mount.supervisor import plan


@pytest.fixture
def directory(tmp_path: Path) -> ClusterDirectory:
    made = ClusterDirectory(tmp_path / "data")
    made.make()
    return made


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HOST, choose_port(set()))) as server:
        yield server


def test_a_new_cluster_gets_different_free_ports(directory: ClusterDirectory) -> None:
    identity = plan(directory, UpSettings(servers=5, replicas=3))
    ports = [identity.metadata_port, *identity.block_ports]
    assert len(set(ports)) == 6
    assert all(port_is_free(port) for port in ports)
    assert identity.replicas == 3


def test_ports_are_kept_and_more_servers_are_added(directory: ClusterDirectory) -> None:
    first = plan(directory, UpSettings(servers=2))
    directory.save_identity(first)
    assert plan(directory, UpSettings(servers=2)) == first
    more = plan(directory, UpSettings(servers=4))
    assert more.metadata_port == first.metadata_port
    assert more.block_ports[:2] == first.block_ports
    assert len(set(more.block_ports)) == 4


def test_a_port_that_is_taken_is_replaced_and_the_others_stay(
    directory: ClusterDirectory, listener: socket.socket
) -> None:
    first = plan(directory, UpSettings(servers=2))
    taken = listener.getsockname()[1]
    directory.save_identity(ClusterIdentity(FORMAT, "0", 2, taken, first.block_ports))
    again = plan(directory, UpSettings(servers=2))
    assert again.metadata_port not in (taken, *first.block_ports)
    assert again.block_ports == first.block_ports


def test_fewer_servers_are_refused_as_they_hold_data(directory: ClusterDirectory) -> None:
    directory.save_identity(plan(directory, UpSettings(servers=3)))
    with pytest.raises(CommandError, match="3 block servers with data"):
        plan(directory, UpSettings(servers=2))


def test_replicas_are_those_the_cluster_was_made_with(directory: ClusterDirectory) -> None:
    directory.save_identity(plan(directory, UpSettings(replicas=1)))
    assert plan(directory, UpSettings(replicas=3)).replicas == 1


def test_a_newer_format_is_refused_with_the_version(directory: ClusterDirectory) -> None:
    directory.save_identity(ClusterIdentity(FORMAT + 1, "9.9", 2, 1, [2]))
    with pytest.raises(CommandError, match=r"written by fsd 9\.9"):
        directory.identity()


def test_a_listening_port_is_not_free(listener: socket.socket) -> None:
    assert not port_is_free(listener.getsockname()[1])
