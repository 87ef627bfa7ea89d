"""How hard hypothesis tries.

By default every run tries the same examples, so that a change is judged by what it changes.  FSD_TEST_EFFORT=20 tries
twenty times as many, other ones in each run; a failure prints the example.
"""

from __future__ import annotations

from hypothesis import settings

from tests.support.effort import EFFORT

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("more", deadline=None, max_examples=100 * EFFORT)
settings.load_profile("same" if EFFORT == 1 else "more")
