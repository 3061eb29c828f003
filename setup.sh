# Sourced by train.sh and test.sh:  . ./setup.sh requirements.txt
# Uses the active virtual environment, or else .venv, which it makes; then pip installs what is
# missing.
stop() { echo "$0: $1" >&2; exit 2; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
has_pip() { python -m pip --version >/dev/null 2>&1; }

# Two runs at once would spoil each other's .venv. The lock is on a descriptor of this shell, so it
# goes when the shell goes. Without a Python, or on a file system without locks, there is none.
one_at_a_time() {
  exec 9<setup.sh
  "$1" - <<'LOCK' 2>/dev/null || true
import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("waiting for another train.sh or test.sh, which is installing", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
LOCK
}

make_venv() {
  local base=${PYTHON:-python3} package
  new_enough "$base" ||
    stop "$base is no Python 3.10 or newer; name one that is:  PYTHON=python3.12 bash $0"
  package=$("$base" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  "$base" -c 'from ensurepip import bootstrap' 2>/dev/null ||
    stop "$base cannot make an environment with pip; on Debian or Ubuntu:  apt install $package"
  [ -w . ] || stop "$PWD: cannot be written to, so there is no .venv; activate another environment"
  if [ -e .venv ] || [ -L .venv ]; then
    was_made_here ||
      stop "$PWD/.venv: does not work, and was not made here; move it away, or activate another"
    echo "$0: .venv is incomplete, or its Python is gone; making it anew" >&2
    rm -rf .venv/bin .venv/include .venv/lib* .venv/share .venv         # pyvenv.cfg last, see below
  fi
  "$base" -m venv .venv || stop "$PWD/.venv: could not be made, see above"
}

# A folder with a pyvenv.cfg, or one that was cut short before there was any file of use in it.
was_made_here() {
  [ ! -L .venv ] || return 1
  [ -f .venv/pyvenv.cfg ] || [ -z "$(find .venv ! -type d ! -name lib64 ! -name .gitignore)" ]
}

# Where there is no pip to ask: has each pinned package one of the versions that it is pinned to?
pins_are_met() {
  python - requirements.txt "$1" <<'CHECK'
import re, sys
from importlib.metadata import distributions
have = {(d.metadata["Name"].lower(), d.version.split("+")[0]) for d in distributions()}
lines = "\n".join(open(path).read() for path in sys.argv[1:])
pins = set(re.findall(r"^([\w-]+)==([\w.]+)", lines, re.M))
sys.exit({name for name, _ in pins} != {name for name, _ in pins & have})
CHECK
}

if [ -n "${VIRTUAL_ENV:-}" ]; then
  new_enough "$VIRTUAL_ENV/bin/python" ||
    stop "the active environment $VIRTUAL_ENV has no Python 3.10 or newer; run  deactivate  first"
  one_at_a_time "$VIRTUAL_ENV/bin/python"
  PATH=$VIRTUAL_ENV/bin:$PATH
else
  one_at_a_time "${PYTHON:-python3}"
  # `activate` is the last thing that venv writes.
  { [ -s .venv/bin/activate ] && .venv/bin/python -c ''; } 2>/dev/null || make_venv
  new_enough .venv/bin/python ||
    stop "$PWD/.venv: its Python is older than 3.10; delete .venv, and run this again"
  export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
  has_pip || pins_are_met "$1" || python -m ensurepip >/dev/null 2>&1 || true
fi
if has_pip; then
  # --no-user: or whoever has set PIP_USER could install into no environment.
  python -m pip install --no-user --quiet --disable-pip-version-check -r "$1" ||
    stop "pip could not install all of $1, see above"
else
  pins_are_met "$1" ||
    stop "$VIRTUAL_ENV has no pip that works; \
run  $VIRTUAL_ENV/bin/python -m ensurepip  or  uv pip install -r $PWD/$1"
fi
exec 9<&-
