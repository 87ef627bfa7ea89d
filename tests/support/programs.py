"""Running real programs, and what they work on: source trees, digests of trees."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAM_TIMEOUT_S = 240
"""No program of these tests takes a tenth of this on a machine that works; a hanging one must not hang the run."""

NEEDLE = "needle_in_the_haystack"


def run(
    *argv: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = PROGRAM_TIMEOUT_S,
    status: Sequence[int] = (0,),
    stdin: str | None = None,
) -> str:
    """Run a program to its end and return what it printed; a status not in `status` fails the test with its output."""
    command = [str(part) for part in argv]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="surrogateescape",
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode in status, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def need(program: str) -> str:
    """The program's path; a machine without it was not set up by scripts/test, and the test fails."""
    found = shutil.which(program)
    assert found is not None, f"{program} is missing: see scripts/system-packages-test.txt"
    return found


def source_tree(directory: Path, *, file_count: int, seed: int = 1) -> Path:
    """A tar file shaped like a source repository, made once in `directory`.

    Sizes are as those of source files (most below 16 KiB, some of some hundred), with symlinks, hard links, modes,
    times, empty files and directories, and names of any bytes; one file in 50 contains NEEDLE.
    """
    path = directory / f"tree-{file_count}-{seed}.tar"
    if path.exists():
        return path
    rnd = random.Random(seed)
    words = ["".join(rnd.choices("etaoinshrdlu_", k=rnd.randint(2, 9))) for _ in range(2000)]
    text = " ".join(rnd.choices(words, k=200_000)).encode()
    folders = ["src"]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for number in range(file_count // 12):
            base = rnd.choice(folders[-40:])
            folders.append(f"{base if base.count('/') < 6 else 'src'}/{rnd.choice(words)}{number}")
        for folder in folders:
            add(tar, folder, kind=tarfile.DIRTYPE, mode=0o755, mtime=1_600_000_000)
        names: list[str] = []
        for number in range(file_count):
            name = f"{rnd.choice(folders)}/{rnd.choice(words)}{number}{rnd.choice(['.c', '.h', '.py', '', ' ü.txt'])}"
            add_file(tar, name, number, names, text, rnd)
            names.append(name)
        add(tar, "src/empty directory", kind=tarfile.DIRTYPE, mode=0o700, mtime=1)
        add(tar, "src/" + "n" * 255, data=b"long name")
        add(tar, "src/\udcff\udcfe", data=b"not UTF-8")
    return path


def add_file(tar: tarfile.TarFile, name: str, number: int, names: list[str], text: bytes, rnd: random.Random) -> None:
    """The tree's file `number`: one in 40 a symlink, one in 60 a hard link, the rest regular files."""
    if number % 40 == 39:
        add(tar, name, kind=tarfile.SYMTYPE, link=os.path.basename(names[-1]))
    elif number % 60 == 59:
        add(tar, name, kind=tarfile.LNKTYPE, link=names[-2])
    else:
        size = min(int(rnd.lognormvariate(8.0, 1.4)), 600_000) if number % 30 else 0
        start = rnd.randrange(len(text) - size)
        data = text[start : start + size] + (NEEDLE.encode() + b"\n" if number % 50 == 0 else b"")
        add(tar, name, data=data, mode=rnd.choice([0o644, 0o600, 0o755, 0o444]), mtime=1_600_000_000 + number)


def add(
    tar: tarfile.TarFile,
    name: str,
    *,
    data: bytes = b"",
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    mtime: int = 1_500_000_000,
    link: str = "",
) -> None:
    """One member."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime, info.size, info.linkname = kind, mode, mtime, len(data), link
    tar.addfile(info, io.BytesIO(data))


Digest = dict[bytes, tuple[object, ...]]


def tree_digest(top: Path) -> Digest:
    """Type, mode, owner, time, and content of everything below `top`, by path relative to it."""
    found: Digest = {}
    root = os.fsencode(top)
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            found[path[len(root) + 1 :]] = entry_digest(path)
    return found


def entry_digest(path: bytes) -> tuple[object, ...]:
    """What cp -a and rsync -a promise to carry over."""
    status = os.lstat(path)
    common = (stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
    if stat.S_ISLNK(status.st_mode):
        return (*common, os.readlink(path))
    if stat.S_ISREG(status.st_mode):
        return (*common, status.st_nlink, status.st_size, file_digest(path))
    return common


def file_digest(path: bytes | Path) -> str:
    """SHA-256 of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def assert_same_tree(found: Digest, expected: Digest) -> None:
    """Fail with the first few differences."""
    different = [path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)]
    assert not different, "\n".join(
        f"{path!r}: {expected.get(path)} became {found.get(path)}" for path in sorted(different)[:5]
    )


def memory_peak(pid: int) -> int:
    """The most bytes of memory the process ever had resident (VmHWM)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10
