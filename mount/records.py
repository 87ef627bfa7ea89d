"""What is known of the mounts that were made on this machine by this user: one JSON file per mount point.

A record names the daemon behind a mount, so that `umount` and `down` can wait for its end, and the data directory of
the local cluster that it shows, so that `down` finds it.  Written by the daemon once it serves, removed when it ends;
one whose process has gone says that the daemon was killed.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from mount.cluster_state import runtime_directory
from mount.files import make_directory, read_json, write_json
from mount.processes import ProcessId


class MountRecord(msgspec.Struct):
    """One mount."""

    mountpoint: str  # Canonical.
    target: str  # As in /proc/mounts.
    process: ProcessId
    data: str = ""  # Of the local cluster it shows; "": none of ours.
    log: str = ""

    def alive(self) -> bool:
        """Its daemon runs."""
        return self.process.alive()


def _path(mountpoint: str) -> Path:
    name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:24]
    return runtime_directory() / "mounts" / f"{name}.json"


def save(record: MountRecord) -> None:
    """Write the record of a mount."""
    path = _path(record.mountpoint)
    make_directory(path.parent, "records of mounts")
    write_json(path, record)


def load(mountpoint: str) -> MountRecord | None:
    """The record for a (canonical) mount point; it may be of a dead daemon."""
    found: MountRecord | None = read_json(_path(mountpoint), MountRecord)
    return found


def remove(mountpoint: str) -> None:
    """Forget a mount; harmless when it is not known."""
    _path(mountpoint).unlink(missing_ok=True)


def all_records() -> list[MountRecord]:
    """Every record there is, of live and dead daemons."""
    directory = runtime_directory() / "mounts"
    if not directory.is_dir():
        return []
    found = (read_json(path, MountRecord) for path in sorted(directory.glob("*.json")))
    return [record for record in found if record is not None]
