"""Copies of the project to work in.

    python girl.py exercise DIR         without the bodies of the functions of learn/exercises.py
    python girl.py bughunt DIR          with a planted fault, see learn/bughunt.py

In a copy for exercises `bash check.sh` says where one stands; learn/checker.py is what it runs. The
originals are in DIR/.solutions.
"""
import ast
import shutil
import sys
from pathlib import Path

from learn.exercises import EXERCISES
from plumbing.files import BadInput

HOME = Path(__file__).parents[1]
CODE = ("*.py", "plumbing/*.py", "measure/*.py", "learn/*", "learn/symptoms/*", "learn/labs/*",
        "*.sh", "*.md", "requirements*.txt", "demo/**/*")
SOLUTIONS = ".solutions"
CHECK = """#!/usr/bin/env bash
# Where do you stand?   bash check.sh [EXERCISE] [--hint [K] | --solution]
cd "$(dirname "$0")/.solutions"         # the originals are imported; your files are read
exec "{python}" -m learn.checker "$@"
"""


def find_function(tree, name):
    """The definition of NAME or CLASS.NAME in a syntax tree."""
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


def body_lines(function):
    """The lines of a function's body, without its docstring: the first and the last, from 1."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return body[0].lineno, body[-1].end_lineno


def blank(source, exercises):
    """The source without the bodies of these exercises' functions."""
    lines, tree = source.splitlines(), ast.parse(source)
    cuts = [(*body_lines(find_function(tree, e.function)), e) for e in exercises]
    for first, last, e in sorted(cuts, reverse=True, key=lambda cut: cut[0]):
        indent = " " * (len(lines[first - 1]) - len(lines[first - 1].lstrip()))
        lines[first - 1:last] = [f"{indent}# Lesson {e.lesson}: bash check.sh {e.name}",
                                 f"{indent}raise NotImplementedError"]
    return "\n".join(lines) + "\n"


def copy_project(folder, hidden):
    """Copy the code into a new folder, and once more into its folder `hidden`. Returns the new
    folder."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: exists already; choose another folder, or delete it")
    for pattern in CODE:
        for path in HOME.glob(pattern):
            if path.is_file():
                for root in (folder, folder / hidden):
                    if root == folder or path.suffix == ".py":
                        (root / path.relative_to(HOME)).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy(path, root / path.relative_to(HOME))
    return folder


def take(models, run, *stages):
    """Copy finished stages of another run; those that are there already stay."""
    for stage in stages:
        if not (Path(run) / stage).exists():
            shutil.copytree(Path(models) / stage, Path(run) / stage)


def make_exercises(folder):
    """`exercise`: a copy of the project whose functions are to be written."""
    folder = copy_project(folder, SOLUTIONS)
    for file in sorted({e.file for e in EXERCISES.values()}):
        of_file = [e for e in EXERCISES.values() if e.file == file]
        (folder / file).write_text(blank((folder / file).read_text(), of_file))
    (folder / "check.sh").write_text(CHECK.format(python=sys.executable))
    print(f"{folder}: {len(EXERCISES)} functions are yours to write. Read "
          f"{folder / 'learn/LESSONS.md'}; then  bash {folder / 'check.sh'}")
