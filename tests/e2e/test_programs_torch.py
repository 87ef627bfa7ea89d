"""PyTorch as a training job uses a file system: samples as files, samples in tar shards, checkpoints, mapped weights.

PyTorch is large and not a dependency: these run where it is installed.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.places import Place

torch = pytest.importorskip("torch")
Dataset: Any = torch.utils.data.Dataset
IterableDataset: Any = torch.utils.data.IterableDataset

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # Four workers on two cores.
]

IMAGE_COUNT = 2_000
SHARD_COUNT = 8
WORKER_COUNT = 4
BATCH = 32


def image(number: int) -> bytes:
    """Some 4 to 60 KiB of bytes that only this number gives."""
    rnd = random.Random(number)
    return rnd.randbytes(rnd.randint(4_000, 60_000))


class Files(Dataset):  # type: ignore[misc]
    """One sample per file, as ImageFolder reads them."""

    def __init__(self, directory: Path) -> None:
        self.paths = sorted(directory.rglob("*.img"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        path = self.paths[index]
        return int(path.stem), torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


class Shards(IterableDataset):  # type: ignore[misc]
    """Samples streamed from tar files, each shard by one worker."""

    def __init__(self, directory: Path) -> None:
        self.paths = sorted(directory.glob("*.tar"))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        worker = torch.utils.data.get_worker_info()
        for path in self.paths[worker.id :: worker.num_workers]:
            with tarfile.open(path, "r|") as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    yield int(Path(member.name).stem), torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)


def keep_list(samples: list[Any]) -> list[Any]:
    """Collate: samples differ in size, so a batch is a list."""
    return samples


def check_epoch(dataset: Files | Shards, *, shuffle: bool) -> None:
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, num_workers=WORKER_COUNT, shuffle=shuffle, collate_fn=keep_list
    )
    seen = set()
    for batch in loader:
        for number, data in batch:
            assert data.numpy().tobytes() == image(number)
            seen.add(number)
    assert seen == set(range(IMAGE_COUNT))


def test_a_data_loader_reads_every_image_in_every_epoch(place: Place) -> None:
    for number in range(IMAGE_COUNT):
        path = place.directory / f"class{number % 10}" / f"{number}.img"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image(number))
    check_epoch(Files(place.directory), shuffle=True)
    place.remount()
    check_epoch(Files(place.directory), shuffle=True)


def test_a_data_loader_streams_every_sample_of_tar_shards(place: Place) -> None:
    for shard in range(SHARD_COUNT):
        with tarfile.open(place.directory / f"{shard}.tar", "w") as tar:
            for number in range(shard, IMAGE_COUNT, SHARD_COUNT):
                info = tarfile.TarInfo(f"{number}.img")
                info.size = len(image(number))
                tar.addfile(info, io.BytesIO(image(number)))
    place.remount()
    check_epoch(Shards(place.directory), shuffle=False)


def test_checkpoints_are_saved_over_each_other_and_loaded_whole_and_mapped(place: Place) -> None:
    path = place.directory / "checkpoint.pt"
    for step in range(3):
        torch.manual_seed(step)
        state = {f"layer{n}": torch.randn(512, 1024) for n in range(24)} | {"step": step}
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        for options in ({}, {"mmap": True}):
            loaded = torch.load(path, **options)
            assert loaded["step"] == step
            assert all(torch.equal(loaded[name], state[name]) for name in state if name != "step")
            del loaded  # A mapped one keeps the file in use, and the mount with it.
    place.remount()
    mapped = torch.load(path, mmap=True)
    assert all(torch.equal(mapped[name], state[name]) for name in state if name != "step")
