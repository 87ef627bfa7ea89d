"""`mount.fsd`: what mount(8) runs for `mount -t fsd HOST:PORT:/SUBDIR DIR -o ...` and for fstab's lines.

mount(8) calls `mount.fsd SPEC DIR [-sfnv] [-N namespace] [-o options] [-t type.subtype]`, as root and often without a
terminal.  Exit codes are those of mount(8).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mount.cli import COMMANDS, run_guarded
from mount.mounting import add_mount
from mount.outcome import CommandError, Exit

MOUNT_USAGE, MOUNT_FAILURE = 1, 32
"""mount(8): incorrect invocation or permissions; mount failure."""


def build_parser() -> argparse.ArgumentParser:
    """What mount(8) may pass to a helper."""
    parser = argparse.ArgumentParser(prog="mount.fsd", description="Helper of mount(8) for fsd.")
    parser.add_argument("spec", metavar="HOST:PORT[:/SUBDIR]")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS")
    parser.add_argument("-s", action="store_true", help="tolerate options that nobody knows")
    parser.add_argument("-f", action="store_true", help="do everything but mount")
    parser.add_argument("-n", action="store_true", help="ignored")
    parser.add_argument("-v", action="store_true", help="ignored")
    parser.add_argument("-t", dest="type", help="ignored")
    parser.add_argument("-N", dest="namespace", help="refused")
    return parser


def mount_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, bool]:
    """The flags of `fsd mount` that mean the same, and whether to mount at all.

    Raises:
        CommandError: another mount namespace was asked for.
    """
    given = build_parser().parse_args(arguments)
    if given.namespace:
        raise CommandError("mount.fsd does not mount into other namespaces (-N); use nsenter", Exit.USAGE)
    parser = argparse.ArgumentParser()
    add_mount(parser)
    options = [option for text in given.options for option in ("-o", text)]
    return parser.parse_args([given.spec, given.directory, *options]), not given.f


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount; an exit code of mount(8)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # mount(8) clears PATH in some cases; umount and fusermount3 are looked for in it.
    os.environ.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    try:
        flags, wanted = mount_flags(words)
    except CommandError as error:
        print(f"mount.fsd: {error.sentence}", file=sys.stderr)
        return MOUNT_USAGE
    except SystemExit as usage:
        return MOUNT_USAGE if usage.code else 0
    if not wanted:
        return 0
    command = next(one for one in COMMANDS if one.name == "mount")
    code = run_guarded("mount.fsd", command, flags)
    codes: dict[int, int] = {Exit.OK: 0, Exit.USAGE: MOUNT_USAGE}
    return codes.get(code, MOUNT_FAILURE)


if __name__ == "__main__":
    sys.exit(main())
