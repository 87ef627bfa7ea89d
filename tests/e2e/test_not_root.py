"""A user who is not root: fusermount3 mounts, data and records lie in the home directory.

Run by root the test becomes `nobody` in a mount namespace of its own, in which /dev/fuse is open to all, as udev makes
it.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mount.processes import fsd_command, fsd_environment
from tests.support.cluster import fail_without_fuse

pytestmark = pytest.mark.mounted

NOBODY = 65534
SCRIPT = """
set -e
cd /
fsd up "$HOME/mnt"
echo hello > "$HOME/mnt/file"
fsd status "$HOME/mnt" | grep healthy
kill -9 "$(grep -h -A1 '"process"' "$HOME"/.local/state/fsd/*/mounts/*.json | grep -o '[0-9]*$\\|[0-9]*,$' | tr -d ,)"
fsd up "$HOME/mnt"
cat "$HOME/mnt/file"
stat -c owner=%u "$HOME/mnt" "$HOME/mnt/file"
fsd down "$HOME/mnt"
ls "$HOME/.local/share/fsd"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test shows this when the tests are not run by root")
def test_a_user_needs_nothing_but_fusermount3(tmp_path: Path) -> None:
    fail_without_fuse()
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    probe = subprocess.run([*become, *fsd_command("version")], env=fsd_environment(), cwd="/", capture_output=True)
    if probe.returncode != 0:
        pytest.skip(f"{sys.executable} or these sources may not be read by other users")
    home = Path("/tmp") / f"fsd-test-home-{os.getpid()}"
    (home / "mnt").mkdir(parents=True)
    device = tmp_path / "fuse"
    os.mknod(device, stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
    device.chmod(0o666)
    for path in (home, home / "mnt"):
        os.chown(path, NOBODY, NOBODY)
    words = " ".join(fsd_command())
    environment = {**fsd_environment(), "HOME": str(home)}
    for name in ("FSD_RUNTIME_DIR", "XDG_RUNTIME_DIR", "XDG_DATA_HOME"):
        environment.pop(name, None)
    as_nobody = " ".join(become)
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f'mount --bind {device} /dev/fuse; exec {as_nobody} bash -c "$0"',
             f'fsd() {{ {words} "$@"; }}; {SCRIPT}'],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "healthy" in done.stdout
        assert "hello\n" in done.stdout
        assert done.stdout.count(f"owner={NOBODY}") == 2
        assert "is gone" in done.stderr
        assert "stopped" in done.stdout
        assert "cluster.json" in done.stdout
    finally:
        subprocess.run([*become, *fsd_command("down", "--data", str(home / ".local/share/fsd"), "--lazy")],
                       env=environment, cwd="/", capture_output=True, check=False)  # fmt: skip
        subprocess.run(["rm", "-rf", "--one-file-system", str(home)], check=True)
