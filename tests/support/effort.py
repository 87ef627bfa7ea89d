"""How much of a random test to run: see tests/conftest.py."""

from __future__ import annotations

import os

EFFORT = int(os.environ.get("FSD_TEST_EFFORT", "1"))
"""Times the usual number of examples."""
