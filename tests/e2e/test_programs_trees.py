"""tar, cp, rsync, find, grep and rm on a tree of 5,000 files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.support.programs import NEEDLE, Digest, assert_same_tree, need, run, source_tree, tree_digest

pytestmark = pytest.mark.mounted

FILE_COUNT = 5_000


@dataclass(frozen=True)
class Tree:
    """The tree as tar laid it on the file system under test, and as it did on the local one."""

    directory: Path
    local: Path
    expected: Digest


@pytest.fixture(scope="module")
def tree(module_place: Place, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    local = tmp_path_factory.mktemp("tree")
    archive = source_tree(local, file_count=FILE_COUNT)
    directory = module_place.directory / "tree"
    for target in (local / "tree", directory):
        target.mkdir()
        run("tar", "xf", archive, "--delay-directory-restore", "-C", target)
    return Tree(directory, local / "tree", tree_digest(local / "tree"))


def test_untar_gives_every_name_attribute_and_byte(tree: Tree) -> None:
    assert len(tree.expected) > FILE_COUNT
    assert_same_tree(tree_digest(tree.directory), tree.expected)


def test_find_and_grep_answer_as_on_a_local_disk(tree: Tree) -> None:
    for search in (
        ["find", ".", "-type", "f", "-size", "+8k"],
        ["find", ".", "-type", "l"],
        ["find", ".", "-perm", "444"],
        ["find", ".", "-links", "2", "-newermt", "2020-09-13 12:40:00"],
        ["grep", "-rl", NEEDLE, "."],
    ):
        expected = sorted(run(*search, cwd=tree.local).splitlines())
        assert expected
        assert sorted(run(*search, cwd=tree.directory).splitlines()) == expected


def test_cp_rsync_and_diff_keep_everything_and_rm_removes_it(tree: Tree) -> None:
    copy, synced = tree.directory.parent / "copy", tree.directory.parent / "synced"
    run("cp", "-a", tree.directory, copy)
    assert_same_tree(tree_digest(copy), tree.expected)
    run("diff", "-r", "--no-dereference", tree.local, copy)

    sync = (need("rsync"), "-aH", "--checksum", "--itemize-changes", f"{tree.local}/")
    run(*sync, f"{synced}/")
    assert_same_tree(tree_digest(synced), tree.expected)
    assert run(*sync, f"{synced}/") == ""  # A second time there is nothing to do.

    for directory in (copy, synced):
        run("rm", "-rf", directory)
        assert not directory.exists()
    assert sorted(path.name for path in tree.directory.parent.iterdir()) == ["tree"]


def test_the_tree_is_the_same_after_a_remount(tree: Tree, module_place: Place) -> None:
    module_place.remount()
    assert_same_tree(tree_digest(tree.directory), tree.expected)
