"""Where the simulation takes the place of the world: every name of the product (and of trio) that means something else
in a simulation.

Nothing of the product knows of this: its modules' names for threads, queues, clocks, randomness, sockets and the
device are replaced while a seed runs. A name that is not there any more fails at once, with the name.
"""

from __future__ import annotations

import contextlib
import gc
import random
import types
import uuid
from collections.abc import Iterator
from unittest import mock

import trio
import trio._core._run as trio_run
import trio.testing

import fsd.daemon
import fsd.frontend.kernel_notifier
import metadata.client
import metadata.group_commit
import metadata.reaper
import metadata.server
import wire.clocks
import wire.rpc.client
import wire.rpc.server
from fsd.file_data import DataPath
from tests.sim import nodes
from tests.sim.fibers import Fiber, FiberQueue
from tests.sim.network import SimSocket
from tests.sim.world import PROCESS, Process, World, autojump, reschedule

REAPER_POLL_S = 5.0
"""Ten times the product's: it is no part of any race here, and would be most of what a quiet second costs."""


@contextlib.contextmanager
def installed(world: World) -> Iterator[None]:
    """The world is this one, for the block."""
    chance = random.Random(f"product {world.seed}")
    network = world.network

    def time_ns() -> int:
        process = PROCESS.get()
        return world.wall_ns() + (0 if process is None else process.clock_ahead_ns)

    def uuid4() -> uuid.UUID:
        return uuid.UUID(int=chance.getrandbits(128), version=4)

    sockets = types.SimpleNamespace(socket=lambda fileno: network.find(fileno))
    threads = types.SimpleNamespace(Thread=Fiber)
    queues = types.SimpleNamespace(SimpleQueue=FiberQueue)
    identities = types.SimpleNamespace(uuid4=uuid4)
    clock = types.SimpleNamespace(
        time_ns=time_ns,
        perf_counter=trio.current_time,
        CLOCK_BOOTTIME=0,
        clock_gettime=lambda _: trio.current_time(),
    )
    replaced = [
        (trio_run.Runner, "reschedule", reschedule),
        (trio.testing.MockClock, "_autojump", autojump),
        (trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        (trio.lowlevel, "wait_readable", SimSocket.wait_readable),
        (trio.lowlevel, "wait_writable", SimSocket.wait_writable),
        (trio.lowlevel, "notify_closing", SimSocket.notify_closing),
        (trio.lowlevel, "current_trio_token", _process),
        (trio.to_thread, "run_sync", nodes.run_in_place),
        (trio, "open_tcp_stream", network.connect),
        (wire.rpc.client, "stdlib_socket", sockets),
        (wire.rpc.client, "random", chance),
        (wire.rpc.server, "stdlib_socket", sockets),
        (metadata.server, "open_listener", network.listen),
        (metadata.server, "_locked", lambda directory: contextlib.nullcontext()),
        (metadata.server, "time", clock),
        (metadata.server, "uuid", identities),
        (metadata.group_commit, "threading", threads),
        (metadata.group_commit, "queue", queues),
        (metadata.group_commit, "time", clock),
        (wire.clocks, "time", clock),
        (metadata.reaper, "POLL_S", REAPER_POLL_S),
        (metadata.client, "uuid", identities),
        (fsd.frontend.kernel_notifier, "threading", threads),
        (fsd.frontend.kernel_notifier, "queue", queues),
        (fsd.daemon, "check_mountpoint", lambda mountpoint: None),
        (fsd.daemon, "boot_id", lambda: f"boot of {_process().host}"),
        (fsd.daemon, "tune_kernel", lambda device: None),
        (fsd.daemon, "os", _Os),
        (fsd.daemon, "socket", types.SimpleNamespace(gethostname=lambda: _process().host)),
        (fsd.daemon, "BlockClient", nodes.MemoryBlocks),
        (fsd.daemon, "DirectMount", nodes.mount_in_kernel),
        (fsd.daemon, "DataPath", lambda **arguments: DataPath(**arguments, clock_ns=time_ns)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_seeded_scheduler(world.seed))
        stack.enter_context(_no_collector())
        stack.callback(nodes.KERNELS.clear)
        yield


def _process() -> Process:
    process = PROCESS.get()
    assert process is not None
    return process


class _Os:
    """What fsd.daemon asks of the machine."""

    fspath = staticmethod(str)

    @staticmethod
    def getpid() -> int:
        return 1

    @staticmethod
    def geteuid() -> int:
        return 1000

    @staticmethod
    def fsencode(path: object) -> bytes:
        return str(path).encode()

    @staticmethod
    def stat(path: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(st_dev=0)


@contextlib.contextmanager
def _seeded_scheduler(seed: int) -> Iterator[None]:
    before = trio_run._r.getstate()
    trio_run._r.seed(seed)
    try:
        yield
    finally:
        trio_run._r.setstate(before)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """When garbage is found depends on what ran before; and looking for it is a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
