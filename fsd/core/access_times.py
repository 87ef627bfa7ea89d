"""When a read changes the access time: the rules of relatime, noatime and strictatime."""

from __future__ import annotations

import enum
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from metadata.core.schema import Inode

DAY_NS = 24 * 3600 * 1_000_000_000
"""With relatime, an access time of this age is renewed (Linux relatime_need_update)."""

UNKNOWN_TO_LIBFUSE = frozenset({"relatime", "norelatime", "strictatime", "diratime", "nodiratime"})
"""Options that libfuse and fusermount3 (3.14) refuse.  Nothing is lost without them: the rule is ours to keep."""


class AccessTimeMode(enum.Enum):
    """Which reads count, as the options of mount(8) say."""

    NEVER = "noatime"
    RELATIVE = "relatime"
    ALWAYS = "strictatime"


@dataclass(frozen=True)
class AccessTimeRule:
    """What one mount was told."""

    mode: AccessTimeMode = AccessTimeMode.RELATIVE
    directories: bool = True  # False: nodiratime.

    def is_due(self, inode: Inode, now_ns: int) -> bool:
        """Whether a read of the inode at `now_ns` changes its access time.

        Source: Linux atime_needs_update, relatime_need_update.
        """
        mode = self.mode
        if mode is AccessTimeMode.NEVER or (not self.directories and stat.S_ISDIR(inode.mode)):
            return False
        atime_ns = inode.atime_ns
        if mode is AccessTimeMode.ALWAYS:
            return now_ns > atime_ns
        return atime_ns <= inode.mtime_ns or atime_ns <= inode.ctime_ns or now_ns - atime_ns >= DAY_NS


def rule_of_options(options: Iterable[str], *, read_only: bool) -> AccessTimeRule:
    """The rule that options of mount(8) ask for; the last of several counts, and relatime is the default."""
    mode, directories = AccessTimeMode.RELATIVE, True
    for option in options:
        if option in ("relatime", "atime", "nostrictatime"):
            mode = AccessTimeMode.RELATIVE
        elif option == "noatime":
            mode = AccessTimeMode.NEVER
        elif option in ("strictatime", "norelatime"):
            mode = AccessTimeMode.ALWAYS
        elif option in ("diratime", "nodiratime"):
            directories = option == "diratime"
    return AccessTimeRule(AccessTimeMode.NEVER if read_only else mode, directories)


def time_of_access(inode: Inode, now_ns: int) -> int:
    """The access time of a read now: after the last change, though its time came from another machine's clock."""
    return max(now_ns, inode.ctime_ns + 1)
