"""A store in memory with a file system in it, and requests in one line."""

from __future__ import annotations

from typing import TypeVar, cast

from metadata import protocol
from metadata.core.dispatch import answer, apply
from metadata.core.format import format_store
from metadata.core.schema import ROOT_INO, Inode
from metadata.engine.memory import MemoryEngine
from metadata.engine.ports import Engine
from metadata.protocol import Caller
from wire.errors import QuotaExceeded, StoreError
from wire.message import Message, Request

R = TypeVar("R", bound=Message)
SESSION = 7
EVERYTHING = (b"\0", b"\xff" * 9)


class Store:
    """Runs each request in a transaction of its own, on a clock that goes on by a second each time."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.engine: Engine = MemoryEngine() if engine is None else engine
        self.now_ns = 1_000_000_000
        with self.engine.write() as txn:
            format_store(txn, now_ns=self.now_ns)
            txn.commit()

    def pairs(self) -> list[tuple[bytes, bytes]]:
        with self.engine.read() as txn:
            return txn.scan(*EVERYTHING, 1 << 40)

    def change(self, request: protocol.Mutation[R]) -> R:
        """Apply a mutation and commit.  A refusal must have written nothing, and is raised.

        QuotaExceeded may come after writes, which the savepoint undoes, as in the service.
        """
        self.now_ns += 1_000_000_000
        with self.engine.write() as txn:
            before = txn.scan(*EVERYTHING, 1 << 40)
            savepoint = txn.savepoint()
            try:
                reply = apply(txn, cast("protocol.Mutation[Message]", request), now_ns=self.now_ns)
            except StoreError as error:
                if isinstance(error, QuotaExceeded):
                    txn.rollback_to(savepoint)
                assert txn.scan(*EVERYTHING, 1 << 40) == before, f"{request} was refused and left a trace"
                raise
            txn.release(savepoint)
            txn.commit()
        assert isinstance(reply, request.REPLY)
        return cast("R", reply)

    def ask(self, request: Request[R]) -> R:
        """Answer a read."""
        with self.engine.read() as txn:
            reply = answer(txn, cast("Request[Message]", request))
        assert isinstance(reply, request.REPLY)
        return cast("R", reply)

    # --- requests in one line ----------------------------------------------------------------------------------------

    def create(
        self,
        name: bytes,
        *,
        parent: int = ROOT_INO,
        mode: int = 0o644,
        caller: Caller = protocol.Caller(),  # noqa: B008
    ) -> int:
        return self.change(protocol.Create(SESSION, 1, parent, name, mode, True, caller)).ino

    def mkdir(
        self,
        name: bytes,
        *,
        parent: int = ROOT_INO,
        mode: int = 0o755,
        caller: Caller = protocol.Caller(),  # noqa: B008
    ) -> int:
        return self.change(protocol.MakeDirectory(SESSION, 1, parent, name, mode, caller)).ino

    def link(self, ino: int, name: bytes, *, parent: int = ROOT_INO) -> Inode:
        return self.change(protocol.Link(SESSION, 1, ino, parent, name)).inode

    def unlink(self, name: bytes, *, parent: int = ROOT_INO, closed_ino: int = 0) -> protocol.Removed:
        return self.change(protocol.Unlink(SESSION, 1, parent, name, closed_ino))

    def rmdir(self, name: bytes, *, parent: int = ROOT_INO) -> protocol.Removed:
        return self.change(protocol.RemoveDirectory(SESSION, 1, parent, name))

    def rename(
        self, name: bytes, new_name: bytes, *, parent: int = ROOT_INO, new_parent: int = ROOT_INO, flags: int = 0
    ) -> protocol.RenameDone:
        return self.change(protocol.Rename(SESSION, 1, parent, name, new_parent, new_name, flags))

    def lookup(self, name: bytes, *, parent: int = ROOT_INO) -> int:
        return self.ask(protocol.Lookup(SESSION, parent, name)).ino

    def inode(self, ino: int) -> Inode:
        return self.ask(protocol.GetAttr(SESSION, ino)).inode

    def names(self, ino: int = ROOT_INO) -> set[bytes]:
        page = self.ask(protocol.ReadDir(SESSION, ino, 0, protocol.ENTRIES_PER_PAGE_MAX))
        assert page.end
        return {entry.name for entry in page.entries}

    def truncate(self, ino: int, size: int) -> Inode:
        return self.change(protocol.SetAttr(SESSION, 1, ino, protocol.SetAttrMask.SIZE, size=size)).inode
