"""Who a block server is: the file `identity` of its directory, and the lock against a second server.

The file is JSON, written whole under another name, synced and renamed, so that it is never half there.  With it a
server needs nothing but its directory to start again, on this host or another.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from blockstore.files import sync_directory
from wire.errors import StoreError, WrongVersion

FORMAT_VERSION = 1
"""Of the whole directory."""


class Identity(msgspec.Struct, frozen=True):
    """What a server keeps of itself."""

    format: int
    uuid: str
    cluster_id: str = ""  # "" until it has registered for the first time.
    server_id: int = 0


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory against a second server.  The kernel lets go of it when the process ends, however it ends.

    Raises:
        StoreError: another server has it.
    """
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"another block server is running on {directory}") from None
        yield
    finally:
        os.close(fd)


def load_identity(directory: Path) -> Identity:
    """The identity of the directory; a new one, saved, if it has none.

    Raises:
        WrongVersion: a newer version of fsd wrote the directory.
        StoreError: the file is damaged; nothing was changed.
    """
    path = directory / "identity"
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if any((directory / "segments").glob("*.seg")):
            raise StoreError(
                f"{directory} has blocks but no identity file; it must not join a cluster as new"
            ) from None
        identity = Identity(FORMAT_VERSION, str(uuid.uuid4()))
        save_identity(directory, identity)
        return identity
    try:
        identity = msgspec.json.decode(raw, type=Identity)
    except msgspec.DecodeError as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if identity.format > FORMAT_VERSION:
        raise WrongVersion(f"{directory} has format {identity.format}; this version of fsd reads {FORMAT_VERSION}")
    return identity


def save_identity(directory: Path, identity: Identity) -> None:
    """Replace the identity file; after a crash it is the old or the new one."""
    path = directory / "identity"
    new = directory / "identity.new"
    with open(new, "wb") as file:
        file.write(msgspec.json.encode(identity) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    sync_directory(directory)
