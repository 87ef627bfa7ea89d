"""A C program of some dozen files, built with make -j on the mount."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.support.programs import need, run

pytestmark = pytest.mark.mounted

UNIT_COUNT = 30

MAKEFILE = """\
CFLAGS = -O1 -Wall -Werror -MMD
OBJECTS = $(patsubst %.c,build/%.o,$(sort $(wildcard *.c)))
program: build/libunits.a build/main.o
\t$(CC) -o $@ build/main.o -Lbuild -lunits
build/libunits.a: $(filter-out build/main.o,$(OBJECTS))
\trm -f $@
\tar rc $@ $^
build/%.o: %.c | build
\t$(CC) $(CFLAGS) -c -o $@ $<
build:
\tmkdir -p build
-include $(wildcard build/*.d)
"""


def write_sources(directory: Path) -> None:
    directory.mkdir()
    numbers = range(UNIT_COUNT)
    (directory / "Makefile").write_text(MAKEFILE)
    (directory / "units.h").write_text("".join(f"int unit{n}(int);\n" for n in numbers))
    (directory / "seven.h").write_text("#define SEVEN 7\n")
    for n in numbers:
        include = '#include "seven.h"\n' if n == 7 else "#define SEVEN 7\n"
        body = "\n".join(f"    x = x * {k} + SEVEN % {k + n + 1};" for k in range(1, 40))
        source = f'#include "units.h"\n{include}int unit{n}(int start)\n{{\n    unsigned x = start;\n{body}\n'
        (directory / f"unit{n}.c").write_text(source + "    return x % 1000;\n}\n")
    calls = " + ".join(f"unit{n}({n})" for n in numbers)
    (directory / "main.c").write_text(
        f'#include <stdio.h>\n#include "units.h"\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )


def test_make_builds_what_a_local_disk_builds_and_only_what_has_changed(place: Place, tmp_path: Path) -> None:
    answers = []
    for directory in (tmp_path / "program", place.directory / "program"):
        write_sources(directory)
        run(need("make"), "-j4", cwd=directory)
        answers.append(run(directory / "program"))
    assert answers[0] == answers[1]

    run("make", "-q", cwd=directory)  # Up to date: the times are in the order of the steps.
    os.utime(directory / "seven.h")
    rebuilt = run("make", "-j4", cwd=directory)
    assert rebuilt.count("-c -o") == 1
    assert "build/unit7.o" in rebuilt
    run("make", "-q", cwd=directory)

    place.remount()
    run("make", "-q", cwd=directory)
    assert run(directory / "program") == answers[0]
