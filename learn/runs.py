"""Runs of the project with other flags, and with changed lines of code, two at a time. (The labs
use `take`, learn/symptoms.py all of it.)"""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from learn.copies import HOME, copy_project
from plumbing.files import BadInput

PROCESSES = 2           # at once, with a thread each: so two cores do the most work


class Change(NamedTuple):
    """One place of the code, as it is and as it should be for a run."""
    file: str
    right: str
    wrong: str


class Failed(Exception):
    """A command of a run ended with an error; holds its last line."""


def with_changes(folder, changes):
    """The folder of a new copy of the project with these changes; the project itself if there are
    none."""
    if not changes:
        return HOME
    copy_project(folder, ".check")
    for change in changes:
        path = folder / change.file
        source = path.read_text()
        if source.count(change.right) != 1:
            raise BadInput(f"{HOME / change.file}: was edited; {change.right!r} is not in it once")
        path.write_text(source.replace(change.right, change.wrong))
    return folder


def girl(code, *words):
    """Run a command of girl.py, with one thread. `code`: the folder of the project, or of a copy.
    Returns what it printed."""
    command = [sys.executable, "girl.py", *map(str, words)]
    found = subprocess.run(command, cwd=code, capture_output=True, text=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    if found.returncode:
        raise Failed((found.stderr.strip().splitlines() or ["no message"])[-1])
    return found.stdout


def take(models, run, *stages):
    """Copy finished stages of another run; those that are there already stay."""
    for stage in stages:
        if not (run / stage).exists():
            shutil.copytree(Path(models) / stage, run / stage)


def side_by_side(work, names):
    """{name: work(name)}, two at a time."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        return dict(zip(names, pool.map(work, names)))
