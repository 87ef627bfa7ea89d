"""Our own rules, each with the replacement in its message; they hold for every source file of the five floors."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("wire", "blockstore", "metadata", "fsd", "mount")
FUNCTION_LINES_MAX = 70
"""A page: a longer function has a part with a name of its own."""

CATCH_ALL_ALLOWED: dict[str, str] = {
    "metadata/group_commit.py": "a bug in one change is logged and answered with EIO; the writer lives on",
    "metadata/session_keeper.py": "a bug in one opening is logged and answered with EIO; the service lives on",
    "wire/rpc/server.py": "a handler's bug is logged and answered with EIO; the service lives on",
    "fsd/frontend/direct/loop.py": "a handler's bug is logged and answered with EIO; the mount lives on",
    "fsd/frontend/pyfuse3_frontend.py": "a handler's bug is logged and answered with EIO; the mount lives on",
}
"""File -> why it may catch every exception.  Anything else catches the narrowest class around the fewest lines."""

BLOCKING_IN_CORES = {
    ("time", "*"): "take `now_ns: int` or `now_s: float` as an argument",
    ("random", "*"): "take a `random.Random`-like argument made by the shell",
    ("uuid", "uuid4"): "take the id as an argument",
    ("secrets", "*"): "take the value as an argument",
}


def sources() -> list[Path]:
    return [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def in_core(path: Path) -> bool:
    return "core" in path.relative_to(ROOT).parts


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    if ast.get_docstring(node) is None:
        return 0
    return (first.end_lineno or first.lineno) - first.lineno + 1


def no_module_docstring(path: Path, tree: ast.Module, text: str) -> Iterator[str]:
    if text.strip() and not ast.get_docstring(tree):
        yield "1: begin with a docstring that says what the module is for"


def no_long_function(path: Path, tree: ast.Module, text: str) -> Iterator[str]:
    for node in functions(tree):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
        if lines > FUNCTION_LINES_MAX:
            yield f"{node.lineno}: {node.name} has {lines} lines of {FUNCTION_LINES_MAX}; give a part of it a name"


def no_catch_all(path: Path, tree: ast.Module, text: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = [kind.id for kind in kinds if isinstance(kind, ast.Name)]
        raises_again = isinstance(node.body[-1], ast.Raise)
        broad = node.type is None or "Exception" in names or "BaseException" in names
        if broad and not raises_again and str(path.relative_to(ROOT)) not in CATCH_ALL_ALLOWED:
            yield (
                f"{node.lineno}: catch the narrowest class (OSError, StoreError ...), end the handler with a raise,"
                " or add the file with its reason to CATCH_ALL_ALLOWED"
            )


def no_marks(path: Path, tree: ast.Module, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        for mark in ("FIX" + "ME", "XX" + "X", "TO" + "DO", "HA" + "CK"):
            if mark in line.split("#", 1)[-1].split() or f"{mark}:" in line:
                yield f"{number}: finish it, or open an issue and name it instead of {mark}"


def no_clock_or_chance_in_cores(path: Path, tree: ast.Module, text: str) -> Iterator[str]:
    if not in_core(path):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            for (module, name), instead in BLOCKING_IN_CORES.items():
                if node.value.id == module and name in ("*", node.attr):
                    yield f"{node.lineno}: {module}.{node.attr} in a core; {instead}"


def no_wall_clock_for_waiting(path: Path, tree: ast.Module, text: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
            if node.attr == "sleep":
                yield f"{node.lineno}: wait for a condition (trio.Event, a poll with a deadline), not for time.sleep"
            if node.attr == "time":
                yield f"{node.lineno}: time.time_ns() for timestamps, time.monotonic() for waiting"


def no_empty_handler(path: Path, tree: ast.Module, text: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body):
            yield f"{node.lineno}: say `with contextlib.suppress(X):` and why it may be lost, or deal with it"


Rule = Callable[[Path, ast.Module, str], Iterator[str]]
RULES: list[Rule] = [
    no_module_docstring,
    no_long_function,
    no_catch_all,
    no_marks,
    no_clock_or_chance_in_cores,
    no_wall_clock_for_waiting,
    no_empty_handler,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_source_file_keeps_the_rule(rule: Rule) -> None:
    found = []
    for path in sources():
        text = path.read_text()
        found += [f"{path.relative_to(ROOT)}:{complaint}" for complaint in rule(path, ast.parse(text), text)]
    assert not found, "\n" + "\n".join(found)


PLANTED: dict[Rule, str] = {
    no_module_docstring: "x = 1\n",
    no_long_function: "def f():\n" + "    x = 1\n" * (FUNCTION_LINES_MAX + 1),
    no_catch_all: "try:\n    f()\nexcept Exception:\n    g()\n",
    no_marks: "x = 1  # FIX" + "ME later\n",
    no_clock_or_chance_in_cores: "import time\ny = time.monotonic()\n",
    no_wall_clock_for_waiting: "import time\ntime.sleep(1)\n",
    no_empty_handler: "try:\n    f()\nexcept OSError:\n    pass\n",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_planted_breach_is_found(rule: Rule) -> None:
    text = PLANTED[rule]
    assert list(rule(ROOT / "fsd" / "core" / "planted.py", ast.parse(text), text))


def test_a_handler_that_ends_with_a_raise_may_catch_all() -> None:
    for last in ("raise", "raise Other from error"):
        text = f"try:\n    f()\nexcept BaseException as error:\n    g()\n    {last}\n"
        assert not list(no_catch_all(ROOT / "fsd" / "planted.py", ast.parse(text), text))


def test_allowed_catch_alls_name_a_reason() -> None:
    assert all(reason for reason in CATCH_ALL_ALLOWED.values())
