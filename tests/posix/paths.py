"""What every call that takes a path has in common: how the path is walked, and who may.

Each call is told once (PATH_CALLS); the tables are those calls times the ways in which a path can be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.posix.table import Row, Table

paths = Table("paths")

FILE, DIRECTORY, NOTHING, LINK = "file", "directory", "nothing", "link"


@dataclass(frozen=True)
class PathCall:
    """A call and the path in it, `{}`."""

    name: str
    call: str
    on: str  # What has to be at the path for the call to succeed.
    follows: bool = True  # A symlink at the end of the path.
    alters: bool = False  # The directory that the path is in.
    more: str = ""  # What else has to be there.
    searches_only: bool = False  # Anybody may do it who can reach the path.


def maker(name: str, call: str, **more: str) -> PathCall:
    """A call that makes a name."""
    return PathCall(name, call, NOTHING, follows=False, alters=True, **more)  # type: ignore[arg-type]


PATH_CALLS = (
    PathCall("open for reading", "open %s r", FILE),
    PathCall("open for writing", "open %s w", FILE),
    PathCall("open with O_TRUNC", "open %s w,trunc", FILE),
    PathCall("open with O_PATH", "open %s path", FILE, searches_only=True),
    PathCall("open of a directory", "open %s r,dir", DIRECTORY),
    PathCall("O_TMPFILE", "open %s rw,tmpfile 0600", DIRECTORY),
    maker("creat", "open %s w,creat,trunc 0644"),
    maker("open with O_CREAT|O_EXCL", "open %s w,creat,excl 0644"),
    maker("mkdir", "mkdir %s 0755"),
    maker("mkfifo", "mkfifo %s 0644"),
    maker("mknod of a file", "mknod %s file 0644"),
    maker("mknod of a socket", "mknod %s socket 0644"),
    maker("mknod of a device", "mknod %s char 0644"),
    maker("symlink", "symlink target %s"),
    maker("link to", "link other %s", more="file other 0666 1001 1001"),
    maker("rename to", "rename other %s", more="file other 0644 1001 1001"),
    PathCall("link from", "link %s new", FILE, follows=False),
    PathCall("rename from", "rename %s new", FILE, follows=False, alters=True),
    PathCall("rename from, of a directory", "rename %s new", DIRECTORY, follows=False, alters=True),
    PathCall("unlink", "unlink %s", FILE, follows=False, alters=True),
    PathCall("rmdir", "rmdir %s", DIRECTORY, follows=False, alters=True),
    PathCall("truncate", "truncate %s 10", FILE),
    PathCall("chmod", "chmod %s 0666", FILE),
    PathCall("chown", "chown %s -1 1001", FILE),
    PathCall("lchown", "lchown %s -1 1001", FILE, follows=False),
    PathCall("utimensat", "utimens %s 1 2", FILE),
    PathCall("utimensat, AT_SYMLINK_NOFOLLOW", "lutimens %s 1 2", FILE, follows=False),
    PathCall("stat", "stat %s", FILE, searches_only=True),
    PathCall("lstat", "lstat %s", FILE, follows=False, searches_only=True),
    PathCall("access", "access %s r", FILE),
    PathCall("readlink", "readlink %s", LINK, follows=False, searches_only=True),
    PathCall("statfs", "statvfs %s", FILE, searches_only=True),
    PathCall("chdir", "chdir %s", DIRECTORY),
    PathCall("getxattr", "getxattr %s user.a", FILE),
    PathCall("setxattr", "setxattr %s user.b b", FILE),
    PathCall("listxattr", "listxattr %s", FILE, searches_only=True),
    PathCall("removexattr", "removexattr %s user.a", FILE),
)

NOT_DIRECTORIES = ("file", "fifo", "socket", "char", "block")
ROOT_ONLY = ("mknod of a device",)
RESULTS = {"readlink": "t", "getxattr": "1", "listxattr": ["user.a"]}
"""What those return that return something."""


def put(call: PathCall, path: str) -> str:
    """The steps that put at `path` what the call needs, owned by alice."""
    made = {
        FILE: f"file {path} 0644 1001 1001",
        DIRECTORY: f"dir {path} 0755 1001 1001",
        LINK: f"symlink t {path}",
        NOTHING: "",
    }[call.on]
    if call.on == FILE:
        made += f";setxattr {path} user.a 1"
    return f"{call.more};{made}"


def result(call: PathCall) -> object:
    """What it returns when it succeeds."""
    return RESULTS.get(call.name, "ok")


def needs(call: PathCall) -> tuple[str, ...]:
    """Features that the call needs."""
    return ("tmpfile",) if call.name == "O_TMPFILE" else ()


def row(call: PathCall, what: str, setup: str, path: str, expect: object, user: str = "root") -> Row:
    """The call on `path`."""
    return Row(f"{call.name}: {what}", setup, call.call % path, expect, user=user, needs=needs(call))


@paths.rows
def a_component_that_is_no_directory() -> Iterator[Row]:
    for call in PATH_CALLS:
        for kind in NOT_DIRECTORIES:
            yield row(call, f"a component is a {kind}", f"{call.more};{kind} x", "x/y", "ENOTDIR")
        yield row(call, "a component is a symlink to a file", f"{call.more};file f;symlink f x", "x/y", "ENOTDIR")


@paths.rows
def names_that_are_not_there() -> Iterator[Row]:
    for call in PATH_CALLS:
        yield row(call, "a component is not there", call.more, "x/y", "ENOENT")
        yield row(call, "a component is a symlink to nothing", f"{call.more};symlink nothing x", "x/y", "ENOENT")
        if call.on != NOTHING:
            yield row(call, "the name is not there", call.more, "x", "ENOENT")
        if call.follows:
            yield row(call, "a symlink to nothing", f"{call.more};symlink nothing x", "x", "ENOENT")


@paths.rows
def symlinks_in_a_circle() -> Iterator[Row]:
    circle = "symlink b a;symlink a b"
    for call in PATH_CALLS:
        yield row(call, "symlinks in a circle on the way", f"{call.more};{circle}", "a/x", "ELOOP")
        yield row(call, "a symlink to itself on the way", f"{call.more};symlink a a", "a/x", "ELOOP")
        if call.follows and call.on != LINK:
            yield row(call, "symlinks in a circle", f"{call.more};{circle}", "a", "ELOOP")


@paths.rows
def names_that_are_too_long() -> Iterator[Row]:
    for call in PATH_CALLS:
        yield row(call, "a name of 255 bytes", put(call, "{n255}"), "{n255}", result(call))
        yield row(call, "a name of 256 bytes", call.more, "{n256}", "ENAMETOOLONG")
        yield row(call, "a component of 256 bytes", call.more, "{n256}/x", "ENAMETOOLONG")
        yield row(call, "a path of 4095 bytes", put(call, "x"), "{p4095}", result(call))
        yield row(call, "a path of 4096 bytes", put(call, "x"), "{p4096}", "ENAMETOOLONG")


@paths.rows
def the_empty_path() -> Iterator[Row]:
    yield Row("stat of the empty path", "", "stat %", "ENOENT")


@paths.rows
def search_permission_on_the_way() -> Iterator[Row]:
    """The directory is alice's; 0644 & co lack the search bit of whoever asks."""
    for call in PATH_CALLS:
        if call.name in ROOT_ONLY:
            continue
        setup = f"dir d 0777 1001 1001;dir d/e 0755 1001 1001;{put(call, 'd/e/x')};chmod d/e %s"
        setup = f"chmod . 0777;{setup}"
        for mode, user, right in (
            ("0644", "alice", "search permission of the owner"),
            ("0745", "carol", "search permission of a supplementary group"),
            ("0774", "bob", "search permission of others"),
        ):
            yield row(call, f"no {right}", setup % mode, "d/e/x", "EACCES", user)
        yield row(call, "root searches everything", setup % "0000", "d/e/x", result(call), "root")


@paths.rows
def write_permission_of_the_directory() -> Iterator[Row]:
    """What makes or removes a name needs it; what does not does not."""
    for call in PATH_CALLS:
        if call.name in ROOT_ONLY:
            continue
        setup = f"chmod . 0777;dir d 0777 1001 1001;{put(call, 'd/x')};chmod d %s"
        for mode, user in (("0577", "alice"), ("0757", "carol"), ("0757", "dave"), ("0775", "bob")):
            if call.alters:
                yield row(call, f"{user} may not write the directory", setup % mode, "d/x", "EACCES", user)
        yield row(call, "the owner with all rights", setup % "0700", "d/x", result(call), "alice")
        if not call.alters and call.name != "O_TMPFILE":
            yield row(call, "the directory cannot be written", setup % "0500", "d/x", result(call), "alice")


@paths.rows
def names_that_are_taken() -> Iterator[Row]:
    """Nothing that makes a name replaces one; rename and plain O_CREAT are told elsewhere."""
    kinds = ("file", "dir", "fifo", "socket", "char", "block", "link-to-nowhere")
    for call in PATH_CALLS:
        if call.on != NOTHING or call.name in ("rename to", "creat"):
            continue
        for kind in kinds:
            yield row(call, f"the name is that of a {kind}", f"{call.more};{kind} x", "x", "EEXIST")


@paths.rows
def trailing_slashes() -> Iterator[Row]:
    """A path that ends with a slash is that of a directory."""
    for call in PATH_CALLS:
        if call.on == FILE:
            yield row(call, "of a file with a slash", put(call, "x"), "x/", "ENOTDIR")
        if call.on == DIRECTORY:
            yield row(call, "of a directory with a slash", put(call, "x"), "x/", result(call))
    yield Row("mkdir with a slash", "", "mkdir x/ 0755", "ok", "x dir")
    yield Row("creat with a slash", "", "open x/ w,creat", "EISDIR", "x absent")
    yield Row("mkfifo with a slash", "", "mkfifo x/", "ENOENT", "x absent")
    yield Row("symlink with a slash", "", "symlink t x/", "ENOENT", "x absent")
    yield Row("rmdir of a symlink to a directory with a slash", "dir d;symlink d l", "rmdir l/", "ENOTDIR", "d dir")
    yield Row("lstat of a symlink to a directory with a slash follows", "dir d;symlink d l", "readlink l/", "EINVAL")
    yield Row("unlink of a directory with a slash", "dir d", "unlink d/", "EISDIR", "d dir")


@paths.rows
def chains_of_symlinks() -> Iterator[Row]:
    """40 are followed, 41 are not (MAXSYMLINKS)."""
    chain = "file l0;" + ";".join(f"symlink l{index} l{index + 1}" for index in range(41))
    yield Row("40 symlinks after one another", chain, "open l40 r", "ok")
    yield Row("41 symlinks after one another", chain, "open l41 r", "ELOOP")
    yield Row("readlink of the last of 41", chain, "readlink l41", "l40")


@paths.rows
def names_of_any_bytes() -> Iterator[Row]:
    for name in ("%ff%fe", "%01%0a%7f", "%c3%28", "%e2%82%ac", "%2e%2e%2e", "%5c%2a%3f"):
        yield Row(f"a name of the bytes {name}", f"file {name}", f"stat {name}", "ok", f"{name} file")
        yield Row(f"a directory called {name}", f"dir {name};file {name}/x", f"listdir {name}", [b"x"])
        yield Row(f"a symlink to {name}", f"file {name};symlink {name} l", "stat l", "ok", f"l target={name}")
        yield Row(f"rename to {name}", "file x", f"rename x {name}", "ok", f"{name} file; x absent")
    yield Row("upper and lower case are two names", "file a", "file A", "ok", "a file; A file nlink=1")
    yield Row("composed and decomposed letters are two names", "file %c3%a4", "file a%cc%88", "ok")


@paths.rows
def dot_and_dot_dot() -> Iterator[Row]:
    for name, expect in ((".", "EINVAL"), ("..", "ENOTEMPTY"), ("d/.", "EINVAL"), ("d/..", "ENOTEMPTY")):
        yield Row(f"rmdir {name}", "dir d", f"rmdir {name}", expect, "d dir")
    for name in (".", "..", "d/.", "d/.."):
        yield Row(f"unlink {name}", "dir d", f"unlink {name}", "EISDIR")
        yield Row(f"rename from {name}", "dir d", f"rename {name} x", "EBUSY")
        yield Row(f"rename to {name}", "dir d;dir x", f"rename x {name}", "EBUSY")
        yield Row(f"mkdir {name}", "dir d", f"mkdir {name}", "EEXIST")
        yield Row(f"link to {name}", "dir d;file x", f"link x {name}", "EEXIST")
        yield Row(f"symlink {name}", "dir d", f"symlink t {name}", "EEXIST")
        yield Row(f"stat {name}", "dir d", f"stat {name}", "ok")
