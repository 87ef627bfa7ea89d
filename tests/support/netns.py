"""Machines for tests: network namespaces with links between them that can be cut, one way or both.

    with network(2) as net:                 the service's machine, and two clients'
        net.service.command("...")          a command line that runs there
        net.clients[0].cut(to_service=True, to_client=False)
        net.clients[0].heal()

Each namespace is that of a process which waits for its standard input to end, so the last trace of it goes when the
test's process does, however it ends.  A link is a pair of veths with fixed neighbours; it is cut by telling one side a
hardware address that nobody has: what is sent is lost silently, as behind a broken switch, and the other direction goes
on.  (netem and firewalls would do that too, where the kernel has them.)
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

SERVICE_ADDRESS = "10.77.0.1"
"""Of the service's machine, for every client."""
NOBODY = "02:00:00:00:00:fe"
DEVICE_TO_SERVICE = "service0"


class Machine:
    """One network namespace; processes in it see the files, mounts and processes of all the others."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(b"\n")
        self._holder.stdin.flush()
        assert self._holder.stdout.readline() == b"\n"  # It is where it shall be.
        self.run("ip", "link", "set", "lo", "up")

    @property
    def pid(self) -> int:
        """Of the process that holds it."""
        return self._holder.pid

    def command(self, *argv: str) -> list[str]:
        """A command line that runs `argv` on this machine, in the same process."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *argv]

    def run(self, *argv: str) -> str:
        """What a short command prints here; raises CalledProcessError."""
        return subprocess.run(self.command(*argv), check=True, capture_output=True, text=True, timeout=30).stdout

    def close(self) -> None:
        """Let go of it; it is gone when nothing runs in it."""
        self._holder.communicate(timeout=30)


@dataclass(frozen=True)
class End:
    """One end of a link."""

    machine: Machine
    device: str
    peer_address: str
    peer_hardware: str

    def know_peer(self, hardware: str) -> None:
        """Send what is for the peer to `hardware`."""
        self.machine.run(
            *("ip", "neigh", "replace", self.peer_address, "lladdr", hardware, "dev", self.device, "nud", "permanent")
        )


@dataclass(frozen=True)
class Client:
    """A client's machine, and its link to the service's."""

    machine: Machine
    here: End
    there: End

    def cut(self, *, to_service: bool = True, to_client: bool = True) -> None:
        """From now on nothing arrives, in these directions."""
        if to_service:
            self.here.know_peer(NOBODY)
        if to_client:
            self.there.know_peer(NOBODY)

    def heal(self) -> None:
        """Everything arrives again."""
        self.here.know_peer(self.here.peer_hardware)
        self.there.know_peer(self.there.peer_hardware)


@dataclass(frozen=True)
class Network:
    """The service's machine at SERVICE_ADDRESS, and clients' machines, each with a link of its own."""

    service: Machine
    clients: list[Client]


def connect(service: Machine, client: Machine, number: int) -> Client:
    """A link between the two."""
    there, here = f"10.77.{number}.1", f"10.77.{number}.2"
    device = f"client{number}"
    service.run(
        *("ip", "link", "add", device, "type", "veth"),
        *("peer", "name", DEVICE_TO_SERVICE, "netns", str(client.pid)),
    )
    for machine, name, address in ((service, device, there), (client, DEVICE_TO_SERVICE, here)):
        machine.run("ip", "address", "add", f"{address}/30", "dev", name)
        machine.run("ip", "link", "set", name, "up")
    client.run("ip", "route", "add", SERVICE_ADDRESS, "via", there)
    made = Client(
        client,
        End(client, DEVICE_TO_SERVICE, there, hardware(service, device)),
        End(service, device, here, hardware(client, DEVICE_TO_SERVICE)),
    )
    made.heal()
    return made


def hardware(machine: Machine, device: str) -> str:
    """The hardware address of a device."""
    words = machine.run("ip", "-brief", "link", "show", device).split()
    return words[2]


@contextmanager
def network(clients: int) -> Iterator[Network]:
    """A network of its own for one test."""
    with ExitStack() as stack:

        def machine() -> Machine:
            made = Machine()
            stack.callback(made.close)
            return made

        service = machine()
        service.run("ip", "address", "add", f"{SERVICE_ADDRESS}/32", "dev", "lo")
        yield Network(service, [connect(service, machine(), number) for number in range(1, clients + 1)])
