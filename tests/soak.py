"""Kills a run again and again, and compares what comes of it with a run that was left alone.

    python tests/soak.py --kills 200

Smoke runs (`train --smoke`) are killed with SIGKILL at random moments, with all their processes,
and begun again until they are done; then the next, until there were so many kills. Prints one line:
kills, how many of them fell inside a stage that went on from its middle, steps done twice,
differences.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import girl
from plumbing.stage import Stage

CLOCK = {"started", "seconds", "peak_rss_mb", "peak_gpu_mb", "candidates_per_second", "checksum"}


def noted(log):
    """girl.py, which notes each step and each resumption in a file; in the processes that it
    starts, too."""
    def note(*words):
        with open(log, "a") as f:
            f.write(" ".join(map(str, words)) + "\n")
    log_row, resume, checkpoint = Stage.log, Stage.resume, Stage.checkpoint

    def log_and_note(self, **row):
        log_row(self, **row)
        note("step", self.name, len(self.rows))

    def resume_and_note(self, modules, optimizers):
        numbers = resume(self, modules, optimizers)
        if self.modules and (self.rows or numbers):
            note("resumed", self.name, len(self.rows))
        return numbers

    # The steps of a smoke run are over before a kill finds them.
    def checkpoint_and_slow(self, *args, **kwargs):
        checkpoint(self, *args, **kwargs)
        time.sleep(0.15)
    Stage.log, Stage.resume, Stage.checkpoint, girl.__file__ = (log_and_note, resume_and_note,
                                                                checkpoint_and_slow, __file__)
    return girl.main(sys.argv[1:])


def start(place, log, seed):
    """A run in the folder `run` of this place: from there all runs have the same paths, also in
    config.json."""
    place.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "train", "--smoke",
               "--seed", str(seed), "--run", "run", "--save-seconds", "0.3"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, cwd=place,
                            env=os.environ | {"SOAK_LOG": str(log)})


def kill(process, after, log=None):
    """SIGKILL to all processes of a run after so many seconds; with a log, after so many since the
    first step. Was it still at work?"""
    try:
        lines = log and len(log.read_text().splitlines())
        while log and process.poll() is None and len(log.read_text().splitlines()) == lines:
            time.sleep(0.02)
        said, _ = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode:
        sys.exit(f"a run failed after an interruption:\n{said}")
    return False


def without_clock(value):
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCK}
    return value


def differences(run, whole):
    """Files that one run has and the other has not, or that are not the same, the clock's fields
    aside. (The report shows the clock.)"""
    def content(path):
        raw = path.read_bytes()
        if path.name in ("summary.json", "results.json"):
            return without_clock(json.loads(raw))
        return b"" if path.name == "report.html" else raw
    found = ({p.relative_to(run) for p in run.rglob("*") if p.is_file()}
             | {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()})
    return sorted(str(name) for name in found
                  if not (run / name).exists() or not (whole / name).exists()
                  or content(run / name) != content(whole / name))


def soak(kills, seed, whole=None):
    """`whole`: a run of this seed that was left alone, in a folder `run`; without it, one is
    made."""
    draw, count, different = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if whole is None:
            whole = folder / "whole" / "run"
            assert not kill(start(whole.parent, folder / "whole.log", seed), None)
        while count["kills"] < kills:
            place, log = folder / f"{count['runs']}", folder / f"{count['runs']}.log"
            log.touch()
            while True:
                before = len(log.read_text().splitlines())
                last = (count["kills"] == kills or (place / "run" / "ppo" / "summary.json").exists()
                        and draw.random() < 0.5)
                process, at_work = start(place, log, seed), draw.random() < 0.8
                killed = kill(process, None if last else draw.uniform(0, 3 if at_work else 14),
                              log if at_work else None)
                lines = log.read_text().splitlines()
                # A kill that this process had to make good: it went on from the middle of one
                # stage, or of two side by side.
                count["inside"] += any(line.startswith("resumed") for line in lines[before:])
                count["kills"] += killed
                if not killed:
                    break
            steps = Counter(line for line in lines if line.startswith("step"))
            count["runs"] += 1
            count["steps"] += len(steps)
            count["twice"] += sum(n - 1 for n in steps.values())
            different += differences(place / "run", whole)
            print(f"run {count['runs']}: {count['kills']} kills and {len(different)} differences "
                  "so far", file=sys.stderr, flush=True)
    print(f"soak: {count['kills']} kills in {count['runs']} runs, {count['inside']} of them inside "
          f"a stage and resumed from its middle; {count['twice']} of {count['steps']} steps done "
          f"twice; {len(different)} differences {different or ''}")
    return different


if __name__ == "__main__":
    if "SOAK_LOG" in os.environ:
        sys.exit(noted(os.environ["SOAK_LOG"]))
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(bool(soak(arguments.kills, arguments.seed)))
