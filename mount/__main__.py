"""`python -m mount` is the `fsd` command; daemons are started this way, with the interpreter that started them."""

from __future__ import annotations

import sys

from mount.cli import main

sys.exit(main())
