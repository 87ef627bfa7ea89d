# Sourced by scripts/up and scripts/test: system packages, a Python, and .venv with fsd in it.
#
#   fsd_setup run     what `fsd` needs
#   fsd_setup test    and what its tests need
#
# A second call finds a stamp in .venv and does nothing.  No terminal and no environment are needed.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
export PATH=${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}
export HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}

fsd_say() { echo "$(basename "$0"): $*" >&2; }

# A Python of at least 3.11 with its headers (pyfuse3 may have to be compiled) and venv.
fsd_python_fits() {
    "$1" - >/dev/null 2>&1 <<'PROBE'
import ensurepip, os, sys, sysconfig, venv
assert sys.version_info >= (3, 11)
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
PROBE
}

# The system's own first: it gets security updates and its headers come from a package.
fsd_find_python() {
    local candidate
    for candidate in /usr/bin/python3 /usr/local/bin/python3 python3 python3.11 python3.12 python3.13 python3.14; do
        if command -v "$candidate" >/dev/null 2>&1 && fsd_python_fits "$candidate"; then
            "$candidate" -c 'import os, sys; print(os.path.realpath(sys.executable))'
            return 0
        fi
    done
    return 1
}

fsd_package_missing() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" != installed ]
}

# Install the packages named, or say how.
fsd_install() {
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        if command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
            as_root=(sudo -n)
        else
            fsd_say "these system packages are missing; run this, then try again:"
            fsd_say "    sudo apt-get install --no-install-recommends $*"
            return 1
        fi
    fi
    fsd_say "installing system packages: $*"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q >&2 </dev/null || return 1
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@" >&2 </dev/null
}

fsd_system() {
    local kind=$1 package missing=() files=("$ROOT/scripts/system-packages.txt")
    [ "$kind" = test ] && files+=("$ROOT/scripts/system-packages-test.txt")
    if ! command -v dpkg-query >/dev/null 2>&1; then
        # Not Debian: look for what the packages bring.
        for package in fusermount3 pkg-config gcc; do command -v "$package" >/dev/null 2>&1 || missing+=("$package"); done
        pkg-config --exists fuse3 2>/dev/null || missing+=("the headers of libfuse3")
        fsd_find_python >/dev/null || missing+=("Python 3.11 or newer with venv and headers")
        [ ${#missing[@]} = 0 ] && return 0
        fsd_say "this is no Debian, so please install yourself: $(printf '%s; ' "${missing[@]}")"
        return 1
    fi
    for package in $(grep -hv '^#' "${files[@]}"); do
        fsd_package_missing "$package" && missing+=("$package")
    done
    fsd_find_python >/dev/null || missing+=(python3 python3-venv python3-dev)
    [ ${#missing[@]} = 0 ] || fsd_install "${missing[@]}"
}

fsd_venv() {
    local python=$1 what=$2
    if ! [ -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        fsd_say "making $VENV with $python"
        "$python" -m venv --clear "$VENV" || return 1
    fi
    fsd_say "installing fsd and the packages it needs into $VENV (a minute or two)"
    # Editable: after a change of the sources, or a pull, nothing has to be installed again.
    "$VENV/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --root-user-action=ignore \
        --editable "$ROOT$what" </dev/null >&2
}

fsd_stamp() {
    { cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" "$ROOT"/scripts/system-packages*.txt; echo "$ROOT"; } | sha256sum
}

fsd_setup() {
    local kind=$1 wanted stamps=("$VENV/.fsd-test")
    [ "$kind" = run ] && stamps+=("$VENV/.fsd-run")
    wanted=$(fsd_stamp)
    local stamp
    for stamp in "${stamps[@]}"; do
        if [ -x "$VENV/bin/fsd" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return 0; fi
    done
    exec 9>"$ROOT/.venv.lock"
    flock 9 # Two at the same time would write the same files.
    fsd_system "$kind" || return 1
    local python what=
    python=$(fsd_find_python) || { fsd_say "no Python 3.11 or newer with venv and headers was found"; return 1; }
    [ "$kind" = test ] && what='[test]'
    fsd_venv "$python" "$what" || { fsd_say "the installation failed; the lines above say why"; return 1; }
    echo "$wanted" >"$VENV/.fsd-$kind"
    exec 9>&-
}
