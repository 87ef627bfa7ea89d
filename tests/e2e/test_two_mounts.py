"""Programs on two mounts of one cluster that rely on what a shared directory promises: names made, replaced and removed
exactly once, and locks that others keep to (HDF5, filelock).

Each test runs four programs, two on each mount, which begin at the same moment and print what they have seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import new_cluster

pytestmark = pytest.mark.mounted

NAME_COUNT = 60
PROGRAM_TIMEOUT_S = 180

PRELUDE = """
import errno, json, os, sys, time
place, me, everybody, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
os.chdir(place)

def won(call, *arguments):
    try:
        result = call(*arguments)
    except OSError as error:
        assert error.errno in (errno.EEXIST, errno.ENOENT, errno.ENOTEMPTY, errno.EINVAL), error
        return False
    if isinstance(result, int) and result > 2:
        os.close(result)
    return True

os.mkdir(f"ready-{me}")
while len([name for name in os.listdir(".") if name.startswith("ready-")]) < everybody:
    time.sleep(0.001)
"""


@pytest.fixture(scope="module")
def mounts() -> Iterator[tuple[Path, Path]]:
    """The two mount points."""
    with new_cluster() as cluster:
        cluster.up()
        second = cluster.directory / "mnt2"
        second.mkdir()
        cluster.fsd("mount", cluster.address, second, "--data", cluster.data)
        yield cluster.mountpoint, second
        cluster.fsd("umount", second)
        cluster.down()


@pytest.fixture
def places(mounts: tuple[Path, Path], request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """An empty directory, by both."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    (mounts[0] / name).mkdir()
    return mounts[0] / name, mounts[1] / name


def run_four(places: tuple[Path, Path], program: str, count: int = NAME_COUNT) -> list[Any]:
    """What the four programs printed, as JSON."""
    running = []
    for me in range(4):
        argv = [sys.executable, "-c", PRELUDE + program, str(places[me % 2]), str(me), "4", str(count)]
        running.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
    try:
        told = [one.communicate(timeout=PROGRAM_TIMEOUT_S)[0] for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [0] * 4, told
    return [json.loads(one) for one in told]


MAKING = {
    "O_CREAT|O_EXCL": "os.open(f'name-{n}', os.O_CREAT | os.O_EXCL | os.O_WRONLY)",
    "mkdir": "os.mkdir(f'name-{n}')",
    "symlink": "os.symlink(str(me), f'name-{n}')",
    "mkfifo": "os.mkfifo(f'name-{n}')",
    "link": "os.link(f'ready-{me}/own', f'name-{n}')",
}


@pytest.mark.parametrize("how", MAKING)
def test_a_name_is_made_by_exactly_one(how: str, places: tuple[Path, Path]) -> None:
    program = "open(f'ready-{me}/own', 'w').close()\n"
    program += f"print(json.dumps([n for n in range(count) if won(lambda: {MAKING[how]})]))"
    made = Counter(number for told in run_four(places, program) for number in told)
    assert made == dict.fromkeys(range(NAME_COUNT), 1)
    for place in places:
        assert sum(path.name.startswith("name-") for path in place.iterdir()) == NAME_COUNT


TAKING = {
    "rename": "os.rename(f'name-{n}', f'ready-{me}/{n}')",
    "unlink": "os.unlink(f'name-{n}')",
    "rmdir": "os.rmdir(f'name-{n}')",
}


@pytest.mark.parametrize("how", TAKING)
def test_a_name_is_taken_by_exactly_one(how: str, places: tuple[Path, Path]) -> None:
    for number in range(NAME_COUNT):
        path = places[0] / f"name-{number}"
        path.mkdir() if how == "rmdir" else path.touch()
    program = f"print(json.dumps([n for n in range(count) if won(lambda: {TAKING[how]})]))"
    taken = Counter(number for told in run_four(places, program) for number in told)
    assert taken == dict.fromkeys(range(NAME_COUNT), 1)
    for place in places:
        assert not [path for path in place.iterdir() if path.name.startswith("name-")]


REPLACING = """
def read_target():
    # Linux looks a stale name up once more by itself; replaced again in between it says ESTALE, as on NFS.
    while True:
        try:
            with open("target") as file:
                return file.read()
        except OSError as error:
            assert error.errno == errno.ESTALE, error

seen = []
for number in range(count):
    with open(f"own-{me}", "w") as file:
        file.write(f"{me} {number} " + "x" * (number * 700))
    os.rename(f"own-{me}", "target")
    text = read_target()
    writer, written, filling = text.split(" ")
    assert filling == "x" * (int(written) * 700), (writer, written, len(filling))
    seen.append((int(writer), int(written)))
print(json.dumps(seen))
"""


def test_a_file_that_is_replaced_is_always_there_and_whole(places: tuple[Path, Path]) -> None:
    """Four writers rename over one name; each reader finds one of the files, never an older one of the same writer."""
    for seen in run_four(places, REPLACING):
        latest: dict[int, int] = {}
        for writer, number in seen:
            assert number >= latest.get(writer, 0)
            latest[writer] = number
    assert {path.name for path in places[1].iterdir() if not path.name.startswith("ready-")} == {"target"}


EMPTYING = """
made = removed = 0
for number in range(count):
    if me % 2:
        removed += won(os.rmdir, "directory")
        won(os.mkdir, "directory")
    else:
        made += won(os.mkdir, f"directory/{me}-{number}")
print(json.dumps([made, removed]))
"""


def test_a_directory_with_entries_is_never_removed(places: tuple[Path, Path]) -> None:
    (places[0] / "directory").mkdir()
    told = run_four(places, EMPTYING)
    made = sum(one[0] for one in told)
    assert len(list((places[1] / "directory").iterdir())) == made  # None went with a directory that was removed.


RENAMED_ROUND = """
for number in range(count):
    won(os.rename, f"d{me}", f"d{(me + 1) % everybody}/inner")
    won(os.rename, f"d{(me + 1) % everybody}/inner", f"d{me}")
print(json.dumps(sorted(os.listdir("."))))
"""


def test_directories_renamed_into_each_other_make_no_circle(places: tuple[Path, Path]) -> None:
    for number in range(4):
        (places[0] / f"d{number}").mkdir()
    run_four(places, RENAMED_ROUND)
    found = [path for path in places[1].rglob("*") if path.is_dir() and not path.name.startswith("ready-")]
    assert len(found) == 4  # Each is reached from the top.


COUNTING = """
import filelock
lock = filelock.FileLock("counter.lock")
for _ in range(count):
    with lock:
        with open("counter") as file:
            value = int(file.read())
        with open("counter", "w") as file:
            file.write(str(value + 1))
print("null")
"""


def test_filelock_keeps_a_counter(places: tuple[Path, Path]) -> None:
    (places[0] / "counter").write_text("0")
    run_four(places, COUNTING, count=25)
    assert [(place / "counter").read_text() for place in places] == ["100", "100"]


STANDING = """
import fcntl, threading
here = os.getcwd()
over = threading.Event()
def walk():
    while not over.is_set():
        os.stat(here)
walker = threading.Thread(target=walk)
walker.start()
lost = 0
while os.path.exists("go-on"):
    if me % 2:  # What a lock shows is another content each time.
        with open("locked", "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            file.write(str(me) * 10)
    try:
        assert os.getcwd() == here
    except FileNotFoundError:
        lost += 1
over.set()
walker.join()
print(lost)
"""


def test_a_program_never_loses_its_working_directory(places: tuple[Path, Path]) -> None:
    """Locks that show a changed content make the kernel drop pages, and nothing else."""
    (places[0] / "go-on").touch()
    (places[0] / "locked").touch()
    timer = threading.Timer(3.0, (places[0] / "go-on").unlink)
    timer.start()
    assert run_four(places, STANDING) == [0, 0, 0, 0]
    timer.join()


def test_a_program_keeps_its_working_directory_while_another_mount_comes_and_goes() -> None:
    with new_cluster() as cluster:
        cluster.up()
        second = cluster.directory / "mnt2"
        second.mkdir()
        place = cluster.mountpoint / "a" / "b"
        place.mkdir(parents=True)
        (place / "go-on").touch()
        argv = [sys.executable, "-c", PRELUDE + STANDING, str(place), "0", "1", "0"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as standing:
            for _ in range(3):
                cluster.fsd("mount", cluster.address, second, "--data", cluster.data)
                cluster.fsd("umount", second)
            assert standing.poll() is None
            (place / "go-on").unlink()
            assert standing.communicate(timeout=PROGRAM_TIMEOUT_S)[0] == "0\n"
        cluster.down()


HDF5_READER = """
import h5py, sys
try:
    with h5py.File(sys.argv[1], "r") as file:
        print(file["squares"][:].sum())
except BlockingIOError:
    print("locked")
"""


def test_hdf5_keeps_readers_out_while_a_writer_has_the_file(places: tuple[Path, Path]) -> None:
    import h5py
    import numpy as np

    def read(place: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", HDF5_READER, place / "data.h5"], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    squares = np.arange(50_000, dtype=np.int64) ** 2
    with h5py.File(places[0] / "data.h5", "w") as file:
        file.create_dataset("squares", data=squares[:100], maxshape=(None,), chunks=(1000,))
        assert [read(place) for place in places] == ["locked", "locked"]
    assert [read(place) for place in places] == [str(squares[:100].sum())] * 2
    with h5py.File(places[1] / "data.h5", "a") as file:
        file["squares"].resize((50_000,))
        file["squares"][100:] = squares[100:]
        assert read(places[0]) == "locked"
    assert [read(place) for place in places] == [str(squares.sum())] * 2
