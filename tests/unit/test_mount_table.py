"""Reading mountinfo."""

from __future__ import annotations

import os
from pathlib import Path

from mount import mount_table

TEXT = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
90 22 0:41 / /mnt/with\\040space\\134 rw,nosuid,nodev - fuse.fsd 127.0.0.1:7400:/a\\040b rw,user_id=0
91 22 0:42 / /mnt/x rw shared:7 master:1 - fuse.sshfs host: rw
92 22 0:43 / /mnt/x rw - fuse.fsd [::1]:7400:/ rw
"""


def test_entries_are_unescaped_and_ordered() -> None:
    entries = list(mount_table.parse_mountinfo(TEXT))
    assert [one.mountpoint for one in entries] == ["/", "/mnt/with space\\", "/mnt/x", "/mnt/x"]
    assert entries[1].source == "127.0.0.1:7400:/a b"
    assert [one.is_fsd for one in entries] == [False, True, False, True]


def test_the_root_is_mounted_and_a_new_directory_is_not(tmp_path: Path) -> None:
    assert mount_table.find("/") is not None
    assert mount_table.find(str(tmp_path)) is None


def test_a_canonical_path_has_no_symlinks(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert mount_table.canonical(f"{tmp_path}/link/../link/") == os.path.realpath(tmp_path / "real")
    assert mount_table.canonical("/") == "/"
    assert mount_table.canonical("//") == "/"


def test_a_directory_answers(tmp_path: Path) -> None:
    assert mount_table.answers(str(tmp_path)) is True
