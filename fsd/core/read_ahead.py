"""Which bytes of a file to fetch before they are asked for.

A *stream* is a place in the file that is being read in sequence; one file has a few (several processes, several
columns).  A read belongs to a stream when it begins near the stream's position: the kernel sends the reads of its own
read-ahead in parallel, so that they arrive slightly out of order.  How far to read ahead grows with what was read in
sequence: a stream that has read n bytes is worth 2 n.  Reads that belong to no stream fetch nothing but themselves.
"""

from __future__ import annotations

from blockstore.protocol import BLOCK_SIZE_MAX

STREAMS_MAX = 8
"""Streams of one file; a ninth replaces the one that was not read for longest."""
WINDOW_MIN = 128 << 10
"""Shortest read-ahead, bytes: the kernel's own first window."""
WINDOW_MAX = 4 * BLOCK_SIZE_MAX
"""Longest, bytes: four blocks in flight hide 16 ms of a disk at 1 GB/s."""
SLACK_MIN = 128 << 10
"""How far from a stream's position a read may begin, bytes, or four times its size if that is more."""


class Stream:
    """One place that is read in sequence."""

    __slots__ = ("ahead", "position", "run")

    def __init__(self, position: int, run: int) -> None:
        self.position = position  # One past the last byte read.
        self.ahead = position  # Fetched, or being fetched, up to here.
        self.run = run  # Bytes read in sequence so far.


class ReadAhead:
    """The streams of one file."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []  # The one read last is the last.

    def observe(self, offset: int, size: int) -> tuple[int, int] | None:
        """A read of [offset, offset + size) came: the range to fetch behind it, or None."""
        stream = self._find(offset, size)
        if stream is None:
            if len(self._streams) == STREAMS_MAX:
                del self._streams[0]
            self._streams.append(Stream(offset + size, size))
            if offset:
                return None  # Reads at the beginning usually go on; others must show it first.
            stream = self._streams[-1]
        return self._advance(stream, offset + size)

    def reset(self) -> None:
        """The bytes changed under the streams (truncate, a remote write)."""
        self._streams.clear()

    def _find(self, offset: int, size: int) -> Stream | None:
        slack = max(4 * size, SLACK_MIN)
        for at in range(len(self._streams) - 1, -1, -1):
            stream = self._streams[at]
            if -slack <= offset - stream.position <= slack:
                if at != len(self._streams) - 1:
                    del self._streams[at]
                    self._streams.append(stream)
                stream.run += size
                return stream
        return None

    def _advance(self, stream: Stream, end: int) -> tuple[int, int] | None:
        stream.position = max(stream.position, end)
        stream.ahead = max(stream.ahead, stream.position)
        window = min(max(2 * stream.run, WINDOW_MIN), WINDOW_MAX)
        target = stream.position + window
        if window >= 2 * BLOCK_SIZE_MAX:
            target -= target % BLOCK_SIZE_MAX  # Whole blocks from now on.
        elif stream.ahead - stream.position > window // 2:
            return None  # Enough is under way; go on in steps worth a request.
        if target <= stream.ahead:
            return None
        start, stream.ahead = stream.ahead, target
        return start, target
