"""A virtual environment on the mount, into which pip installs, without a network."""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.support.programs import run

pytestmark = pytest.mark.mounted

MODULE_COUNT = 150

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}


def make_wheel(directory: Path, name: str, *, requires: str | None, modules: dict[str, str]) -> None:
    """A wheel as PEP 427 has it, with a console script `name` that calls `name.main()`."""
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    files = {f"{name}/{path}": text for path, text in modules.items()}
    files[f"{info}/METADATA"] = metadata + (f"Requires-Dist: {requires}\n" if requires else "")
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{name} = {name}:main\n"
    record = "".join(f"{path},sha256={digest(text)},{len(text.encode())}\n" for path, text in files.items())
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def test_pip_installs_into_a_virtual_environment_and_what_it_installed_runs(place: Place, tmp_path: Path) -> None:
    modules = {f"m{n}.py": f"VALUE = {n}\n" + "# filler\n" * n * 5 for n in range(MODULE_COUNT)}
    modules["__init__.py"] = (
        f"from importlib import import_module\n\n\ndef total():\n"
        f"    return sum(import_module(f'lower.m{{n}}').VALUE for n in range({MODULE_COUNT}))\n\n\n"
        f"def main():\n    print(total())\n"
    )
    make_wheel(tmp_path, "lower", requires=None, modules=modules)
    upper = "import lower\n\n\ndef main():\n    print('upper', lower.total())\n"
    make_wheel(tmp_path, "upper", requires="lower>=1", modules={"__init__.py": upper})

    environment = place.directory / "environment"
    run(sys.executable, "-m", "venv", environment)  # Installs pip itself, a thousand files, from its own wheel.
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--find-links", tmp_path, "upper", env=OFFLINE)
    answer = f"upper {sum(range(MODULE_COUNT))}"
    assert run(environment / "bin" / "upper").strip() == answer
    run(python, "-m", "pip", "check", env=OFFLINE)
    assert run(python, "-m", "compileall", "-q", environment / "lib") == ""

    place.remount()
    assert run(environment / "bin" / "upper").strip() == answer
    run(python, "-m", "pip", "uninstall", "-q", "-y", "upper", "lower", env=OFFLINE)
    assert not list((environment / "lib").glob("*/site-packages/lower*"))
