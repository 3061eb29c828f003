"""Run a lab, and write it up.

    python learn/labs/run.py NAME [--seeds N]

A lab starts from finished runs of `bash train.sh --quick`, one for each seed. It makes those that
are missing (four minutes each). Its arms run two at a time, with one thread each. The results go to
learn/labs/NAME.json, its picture to learn/labs/NAME.svg, and learn/EXPERIMENTS.md is written anew
from all results.
"""
import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HOME))
if __name__ == "__main__":              # before torch is imported, here and in the arms' processes
    os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.pyplot as plt
import torch

from learn.labs.lab import CVS, WORTH, Place
from measure.report import write_svg
from plumbing.files import BadInput, read_json, write_bytes

LABS = ("hacking", "parts", "decisions", "prejudice", "gap", "feedback", "again", "growth")


def load(name):
    return importlib.import_module(f"learn.labs.{name}")


# ----------------------------------------------------------------------------------- running a lab
def base_run(folder, seed, size):
    """The finished run of this seed; made if it is not there."""
    run = folder / str(seed)
    if not (run / "results.json").exists():
        subprocess.run([sys.executable, "girl.py", "train", size, "--seed", str(seed), "--run",
                        str(run)], cwd=HOME, check=True,
                       env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"})
    return run


def work(name, arm, place):
    """Run one arm, or what all share if there is no arm; what it prints goes to a log. Returns its
    figures."""
    torch.set_num_threads(1)
    lab, folder = load(name), place.run if arm else place.shared
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            if arm:
                return lab.ARMS[arm](place)
            lab.prepare(place)


def arms_of(lab, size):
    """The names of its arms: all, or those of a toy run."""
    return list(getattr(lab, "SMOKE", lab.ARMS) if size == "--smoke" else lab.ARMS)


def run_lab(name, seeds, size, base, scratch):
    """All arms for all seeds. Returns [{"arm", "seed", and figures}], and the minutes of a seed."""
    lab = load(name)
    arms = arms_of(lab, size)
    shutil.rmtree(scratch, ignore_errors=True)
    places = {(seed, k): Place(seed, base_run(base, seed, size).resolve(),
                               scratch / str(seed) / "shared", scratch / str(seed) / str(k), size)
              for seed in range(seeds) for k in range(len(arms))}
    start, context = time.time(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        if hasattr(lab, "prepare"):
            for done in [pool.submit(work, name, None, places[seed, 0]) for seed in range(seeds)]:
                done.result()
        jobs = {at: pool.submit(work, name, arms[at[1]], place) for at, place in places.items()}
        found = []
        for (seed, k), job in jobs.items():
            found.append({"arm": arms[k], "seed": seed, **job.result()})
            print(f"{name}: seed {seed}, {arms[k]}: done", flush=True)
    return found, (time.time() - start) / 60 / seeds


# ------------------------------------------------------------------------------------ writing it up
def of_arm(found, arm, figure):
    """The values of a figure, a seed each; those without it left out."""
    values = [row.get(figure) for row in found if row["arm"] == arm]
    return [value for value in values if value is not None]


def shown(values, figure):
    """The median, and the range if there are several seeds."""
    if not values:
        return "–"
    digits = 2 if max(map(abs, values)) < 20 and figure not in ("seconds", "scored") else 0
    median, low, high = (f"{value:.{digits}f}" for value in (
        statistics.median(values), min(values), max(values)))
    return median if figure == "seconds" or low == high else f"{median} ({low} to {high})"


def star(found, arm, figure):
    """A star if this difference is one in every seed."""
    return "*" if all(of_arm(found, arm, f"{figure}_differs") or [False]) else ""


def filled(text, found):
    """The text with figures in place of {arm[figure]}, as in the table."""
    def figure(m):
        values = of_arm(found, m[1], m[2])
        if not values:
            raise KeyError(m[0])            # the text names what the results do not have
        return shown(values, m[2])
    return re.sub(r"\{([^{}\[\]]+)\[(\w+)\]\}", figure, text)


def chapter(name, results, pictures):
    """What EXPERIMENTS.md says of a lab."""
    lab, found = load(name), results["found"]
    table = getattr(lab, "TABLE", WORTH)
    lines = [f"## {lab.QUESTION}", "", f"**Predicted, before the run.** {lab.PREDICTION}", "",
             f"**Run it.** `python learn/labs/run.py {name}` ({results['minutes']:.0f} minutes a "
             "seed on two cores).", "",
             "| | " + " | ".join(table.values()) + " |", "|---" * (len(table) + 1) + "|"]
    for arm in arms_of(lab, "--" + results["size"]):
        cells = [shown(of_arm(found, arm, figure), figure) + star(found, arm, figure)
                 for figure in table]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", *([lab.NOTE, ""] if hasattr(lab, "NOTE") else []),
              f"![{lab.QUESTION}]({pictures}/{name}.svg)", "",
              f"**What we saw.** {filled(lab.SAW, found)}", ""]
    return "\n".join(lines)


HEAD = """# Experiments

On real data nobody knows what a suggestion is truly worth. In the simulated market it is known, so
these labs can show what usually stays hidden. Each starts from a finished run of `bash train.sh
--quick` for each seed. The prejudiced recruiter needs new data, and trains all stages on them; the
gap in the decisions needs new data for stage 2; the lab on size trains models of its own. (All this
was an earlier version of the project: Muon computed in bf16, and β was 0.05, now 0.1.)
A cell gives the median of the seeds and their range, on {cvs} CVs of the valid split. Reward and
judge are those of the quick run, in standard deviations of the SFT model's samples; KL is in nats
per text; seconds are those of one thread, with another process beside it.
`python learn/labs/run.py NAME` wrote this page from the results in `learn/labs/`.
"""


def write_up(out):
    """EXPERIMENTS.md and the pictures, from all results in `out`/labs."""
    chapters = [HEAD.format(cvs=CVS)]
    for name in LABS:
        path = out / "labs" / f"{name}.json"
        if path.exists():
            results = read_json(path)
            chapters.append(chapter(name, results, "labs"))
            lab = load(name)
            n = getattr(lab, "AXES", 1)
            figure, axes = plt.subplots(1, n, figsize=(3.5 * n if n > 1 else 5.5, 3.2))
            lab.draw(results["found"], axes)
            write_svg(out / "labs" / f"{name}.svg", figure)
    write_bytes(out / "EXPERIMENTS.md", "\n".join(chapters).encode())


def write_results(path, results):
    """As JSON, with a line for each arm and seed."""
    head = json.dumps({name: x for name, x in results.items() if name != "found"})
    rows = ",\n".join(json.dumps(rounded(row), ensure_ascii=False) for row in results["found"])
    write_bytes(path, f'{head[:-1]}, "found": [\n{rows}\n]}}\n'.encode())


def rounded(x):
    """Numbers with six digits at most: the results are committed."""
    if isinstance(x, dict):
        return {name: rounded(y) for name, y in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(y) for y in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def main(argv=None):
    parser = argparse.ArgumentParser(description="Run a lab, and write it up.")
    parser.add_argument("name", choices=(*LABS, "none"),
                        help="the lab; none: only write EXPERIMENTS.md anew")
    parser.add_argument("--seeds", type=int, default=3, metavar="N",
                        help="seeds 0 to N - 1 (default 3)")
    parser.add_argument("--base", default="runs/labs/base", metavar="DIR",
                        help="the quick runs, DIR/SEED (default %(default)s)")
    parser.add_argument("--scratch", default="runs/labs", metavar="DIR",
                        help="where the arms run (default %(default)s)")
    parser.add_argument("--out", default=str(HOME / "learn"), metavar="DIR",
                        help="where EXPERIMENTS.md and labs/ are written (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="toy size: shows that it runs")
    args = parser.parse_args(argv)
    out, size = Path(args.out), "--smoke" if args.smoke else "--quick"
    if args.name != "none":
        scratch = Path(args.scratch).resolve() / args.name
        base = Path(args.base).resolve()
        found, minutes = run_lab(args.name, args.seeds, size, base, scratch)
        (out / "labs").mkdir(parents=True, exist_ok=True)
        write_results(out / "labs" / f"{args.name}.json",
                      {"seeds": args.seeds, "size": size[2:], "minutes": round(minutes, 1),
                       "found": found})
    write_up(out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BadInput as e:
        print(f"run.py: {e}", file=sys.stderr)
        sys.exit(2)
