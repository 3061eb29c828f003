"""Check the exercises of a copy of the project.

    bash check.sh                       all of them, in one table
    bash check.sh gae                   one: what is wrong, in a sentence
    bash check.sh gae --hint [2]        one of three hints
    bash check.sh gae --solution        the original

Every function is checked among the originals of all others, so the order does not matter.
"""
import argparse
import ast
import importlib
import sys
import traceback
from pathlib import Path

from learn.copies import SOLUTIONS, find_function
from learn.exercises import EXERCISES, Wrong

DONE, OPEN, WRONG = "done", "open", "wrong"


def module_of(exercise):
    """The original module of an exercise's file."""
    return importlib.import_module(exercise.file.removesuffix(".py").replace("/", "."))


def take(source, exercise, path):
    """Put the exercise's function of this source into the original module, with the helpers that
    the source adds. Returns a function that puts the original back."""
    module = module_of(exercise)
    tree = ast.parse(source, str(path))
    owner, name = module, exercise.function
    if "." in name:
        cls, name = name.split(".")
        owner = getattr(module, cls)
    original = getattr(owner, name)
    helpers = [node for node in tree.body if isinstance(node, ast.FunctionDef)
               and not hasattr(module, node.name)]
    code = ast.Module([*helpers, find_function(tree, exercise.function)], [])
    names = vars(module).copy()             # a helper does not stay in the original module
    exec(compile(code, str(path), "exec"), names)
    setattr(owner, name, names[name])
    return lambda: setattr(owner, name, original)


def check(source, exercise, path="your file"):
    """(DONE, OPEN or WRONG, a sentence) for the exercise's function in this source."""
    try:
        put_back = take(source, exercise, path)
    except SyntaxError as e:
        return WRONG, f"{path}:{e.lineno}: {e.msg}"
    except StopIteration:
        return WRONG, f"{path}: has no {exercise.function} any more"
    try:
        exercise.check()
        return DONE, "right"
    except NotImplementedError:
        return OPEN, "not written yet"
    except Wrong as e:
        return WRONG, str(e)
    except Exception as e:                  # the student's, or of what it returned
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__)
                 if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}: " if lines else ""
        return WRONG, f"{where}{type(e).__name__}: {e}"
    finally:
        put_back()


def show_all(folder):
    """Print a line for each exercise."""
    done = 0
    for e in EXERCISES.values():
        state, sentence = check((folder / e.file).read_text(), e, e.file)
        done += state == DONE
        more = f"  {sentence}" if state == WRONG else ""
        print(f"{state:<6} lesson {e.lesson}  {e.name:<20} {e.file}: {e.function}{more}")
    print(f"{done} of {len(EXERCISES)} done")


def solution(e):
    """The original function, as it stands in the project."""
    source = Path(module_of(e).__file__).read_text()
    return ast.get_source_segment(source, find_function(ast.parse(source), e.function))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bash check.sh", description="Check the exercises.")
    parser.add_argument("exercise", nargs="?", metavar="EXERCISE",
                        help=f"one of {', '.join(EXERCISES)}")
    parser.add_argument("--hint", nargs="?", type=int, const=1, choices=(1, 2, 3), metavar="K",
                        help="print hint K, from 1 to 3")
    parser.add_argument("--solution", action="store_true", help="print the original function")
    args = parser.parse_args(argv)
    folder = Path.cwd().parent              # check.sh works in its .solutions
    if Path.cwd().name != SOLUTIONS:
        parser.error("start it with  bash check.sh  in a folder that  python girl.py exercise DIR  "
                     "made")
    if args.exercise is None:
        if args.hint or args.solution:
            parser.error("name an exercise")
        return show_all(folder)
    if args.exercise not in EXERCISES:
        parser.error(f"there is no exercise {args.exercise}; there are {', '.join(EXERCISES)}")
    e = EXERCISES[args.exercise]
    if args.hint:
        print(e.hints[args.hint - 1])
    elif args.solution:
        print(solution(e))
    else:
        state, sentence = check((folder / e.file).read_text(), e, e.file)
        print(f"{e.name}: {sentence}")
        return state != DONE


if __name__ == "__main__":
    sys.exit(main())
