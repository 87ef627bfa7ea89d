"""The data path with small constants: blocks of 4 KiB, slices of 8 parts and so on, so that short random runs meet
every border that files of many GiB meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from fsd import data_services, file_data, flush, range_changes, read_path
from fsd.core import block_cache, budget, dirty_map, extent_map, read_ahead, upload_queue
from metadata.core.namespace import ranges

BLOCK = 4096
SMALL = [
    (dirty_map, "BLOCK_SIZE_MAX", BLOCK),
    (dirty_map, "OWN_SIZE_MIN", 512),
    (dirty_map, "GATHER_SIZE_MAX", 2048),
    (dirty_map, "PARTS_PER_SLICE_MAX", 8),
    (dirty_map, "PARTS_JOINED_MIN", 3),
    (dirty_map, "PART_SIZE_SMALL", 1024),
    (upload_queue, "BLOCK_SIZE_MAX", BLOCK),
    (upload_queue, "BLOCKS_PER_SLICE", 4),
    (upload_queue, "PARTS_PER_SLICE_MAX", 8),
    (upload_queue, "EXTENTS_PER_MESSAGE_MAX", 16),
    (extent_map, "EXTENTS_MAX", 40),
    (read_ahead, "BLOCK_SIZE_MAX", BLOCK),
    (read_ahead, "WINDOW_MIN", 1024),
    (read_ahead, "WINDOW_MAX", 4 * BLOCK),
    (read_ahead, "SLACK_MIN", 1024),
    (block_cache, "CHECKSUM_UNIT", 256),
    (read_path, "CHECKSUM_UNIT", 256),
    (read_path, "SPAN_GAP_MAX", 512),
    (budget, "LIMIT_MIN", 1),
    (data_services, "EXTENTS_CACHED_MAX", 60),
    (flush, "UPLOAD_SMALL", 1024),
    (flush, "INLINE_SIZE_MAX", 3000),  # The service takes more; below a block, as in the large world.
    (range_changes, "INLINE_SIZE_MAX", 3000),
    (ranges, "INLINE_SIZE_MAX", 3000),
    (file_data, "BLOCK_SIZE_MAX", BLOCK),
    (file_data, "WRITE_STEP", 2 * BLOCK),
    (file_data, "READ_STEP", 4 * BLOCK),
]


@contextmanager
def small_world() -> Iterator[None]:
    """Within it, the constants are small; the code and the services are the real ones."""
    patches = [mock.patch.object(module, name, value) for module, name, value in SMALL]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
