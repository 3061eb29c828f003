# Sourced by train.sh and test.sh:  . ./setup.sh requirements.txt
# Uses the active virtual environment, or makes .venv; installs only where the pinned versions are not there yet.
new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "GIRL needs Python 3.10 or newer: PYTHON=python3.12 bash $0" >&2; exit 2; }
}
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || { new_enough "${PYTHON:-python3}"; "${PYTHON:-python3}" -m venv .venv; }
  . .venv/bin/activate
fi
new_enough python
python - "$1" <<'CHECK' || python -m pip install --quiet --disable-pip-version-check -r "$1"
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement

def satisfied(path):
    for line in open(path):
        if line.startswith("-r "):
            if not satisfied(line[3:].strip()):
                return False
        elif line.strip():
            need = Requirement(line)
            try:
                have = importlib.metadata.version(need.name)
            except importlib.metadata.PackageNotFoundError:
                have = "0"
            if (need.marker is None or need.marker.evaluate()) and not need.specifier.contains(have):
                return False
    return True

sys.exit(not satisfied(sys.argv[1]))
CHECK
