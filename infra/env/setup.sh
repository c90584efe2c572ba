#!/usr/bin/env bash
# Makes a virtual environment with the pinned packages, on a machine that has Python 3.11 or newer.
# Usage: infra/env/setup.sh VENV        PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
venv=$1

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Installs Debian packages, or says what to run where that is not possible.
system_packages() {
  local why=$1; shift
  local as=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null && sudo -n true 2>/dev/null && as=(sudo -n) ||
      fail "$why Run: sudo apt-get install -y $*   then the same command again."
  fi
  command -v apt-get >/dev/null || fail "$why Install what Debian calls: $*"
  echo "setup: $why Installing $*"
  # Unprivileged sudo drops the environment, so `env` passes the setting through.
  { "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" ||
    { "${as[@]}" apt-get update -qq &&
      "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; }
  } >"$log" 2>&1 || { tail -n 5 "$log" >&2; fail "$why apt-get could not install: $*"; }
}

log=$(mktemp); trap 'rm -f "$log"' EXIT

python=
for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
    "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate; break
  fi
done
[ -n "$python" ] || fail "Python 3.11 or newer is needed and none was found. Run: sudo apt-get install -y python3.11 python3.11-venv"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

if [ ! -x "$venv/bin/pip" ]; then
  "$python" -c 'import ensurepip' 2>/dev/null ||
    system_packages "This Python cannot make virtual environments." "python$version-venv"
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi

echo "setup: installing the pinned packages into $venv (a few minutes the first time)"
# pip notes every link that it passes over; only its errors are worth reading. Python compiles what
# it imports; all else of a hundred packages need not be.
DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install -q --no-compile \
  --constraint constraints.txt --editable '.[dev]' >"$log" 2>&1 ||
  { grep -v 'is ignored' "$log" | tail -n 30 >&2; fail "pip could not install the packages (above)."; }

# opencv-python loads libGL and GLib, which a bare Debian image lacks.
if ! "$venv/bin/python" -c 'import cv2' 2>/dev/null; then
  glib=libglib2.0-0
  command -v apt-cache >/dev/null && apt-cache show libglib2.0-0t64 >/dev/null 2>&1 && glib=libglib2.0-0t64
  system_packages "OpenCV needs two system libraries." libgl1 "$glib"
  "$venv/bin/python" -c 'import cv2' || fail "OpenCV still cannot be imported (above)."
fi
echo "setup: ready. Start with $venv/bin/animator --help"
