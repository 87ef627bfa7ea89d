"""git: clone, commit, merge, gc and fsck of a repository on the mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.support.programs import need, run, source_tree

pytestmark = pytest.mark.mounted

SETTINGS = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    "GIT_CONFIG_KEY_1": "core.fsync",
    "GIT_CONFIG_VALUE_1": "all",
}


def git(cwd: Path, *arguments: str | Path) -> str:
    return run(need("git"), *arguments, cwd=cwd, env=SETTINGS).strip()


def make_origin(directory: Path) -> Path:
    """A repository of some hundred files and three commits on the local disk."""
    origin = directory / "origin"
    origin.mkdir()
    git(origin, "init", "-q", "-b", "main")
    run("tar", "xf", source_tree(directory, file_count=600), "-C", origin)
    for number in range(3):
        (origin / f"version{number}").write_text(f"{number}\n" * 1000)
        git(origin, "add", "-A")
        git(origin, "commit", "-q", "-m", f"change {number}")
    return origin


def test_git_clone_commit_merge_gc_and_fsck(place: Place, tmp_path: Path) -> None:
    origin = make_origin(tmp_path)
    clone = place.directory / "clone"
    git(place.directory, "clone", "-q", f"file://{origin}", clone)
    assert git(clone, "rev-parse", "HEAD^{tree}") == git(origin, "rev-parse", "HEAD^{tree}")
    assert git(clone, "status", "--porcelain") == ""

    git(clone, "checkout", "-q", "-b", "work")
    for path in sorted((clone / "src").iterdir())[:10]:
        if path.is_file():
            path.chmod(0o644)
            path.write_text(path.read_text(errors="replace") + "changed\n")
    git(clone, "mv", "version0", "renamed")
    git(clone, "rm", "-q", "version1")
    git(clone, "commit", "-q", "-a", "-m", "work")
    git(clone, "checkout", "-q", "main")
    (clone / "other").write_text("other\n")
    git(clone, "add", "other")
    git(clone, "commit", "-q", "-m", "other")
    git(clone, "merge", "-q", "--no-edit", "work")

    before = git(clone, "rev-parse", "HEAD^{tree}")
    git(clone, "gc", "-q", "--prune=now")
    git(clone, "fsck", "--full", "--strict")
    git(clone, "push", "-q", "origin", "work")
    assert git(origin, "rev-parse", "work") == git(clone, "rev-parse", "work")

    place.remount()
    assert git(clone, "rev-parse", "HEAD^{tree}") == before
    assert git(clone, "status", "--porcelain") == ""
    git(clone, "fsck", "--full", "--strict")
    second = place.directory / "second"
    git(place.directory, "clone", "-q", clone, second)  # Local clones make hard links.
    git(second, "fsck", "--full")
    assert git(second, "rev-parse", "HEAD^{tree}") == before
