"""The clock that leases are judged by."""

from __future__ import annotations

import time


def boot_time_s() -> float:
    """Seconds since the machine was started, those in which it was suspended included; nobody can set it.

    CLOCK_MONOTONIC, which trio's clock is, stands still while a laptop sleeps, and the wall clock may be set back: with
    either a client could take a lease for running that is long over.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)
