"""Make learn/SYMPTOMS.md: PPO with each fault of the bug hunt, and with wrong settings, beside
healthy runs.

    python -m learn.symptoms --run runs/demo        about half an hour on two cores

It runs PPO on the demonstration's models with seeds 0 and 1, in copies of the project, and draws
seven figures of each. What you see is found by comparing the last two iterations with ten healthy
runs, as in the verdict of `bash train.sh --demo`.
"""
import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt

from learn.bughunt import CASES
from learn.copies import HOME, copy_project
from measure import demo
from measure.report import SERIES, read_metrics, write_svg
from plumbing.files import read_json, write_bytes

SEEDS = (0, 1)
SHOWN = {"reward": "reward", "true_match": "true match", "kl": "KL", "clip_frac": "clipped",
         "entropy": "entropy", "explained_variance": "expl. variance", "length": "length"}
# Wrong settings: name -> (flags, what it is, the mend).
SETTINGS = {
    "a rate 25 times too high": (["--lr", "0.01"], "the steps are too large", "lower --lr"),
    "a rate 40 times too low": (["--lr", "1e-5"], "the policy hardly moves", "raise --lr"),
    "no price of the KL": (["--kl-coef", "0"], "nothing holds the policy near the SFT model",
                           "raise --kl-coef"),
    "a price of the KL 20 times too high": (["--kl-coef", "1"], "the policy may not move",
                                            "lower --kl-coef"),
    "too few episodes": (["--episodes", "8", "--minibatch", "8"], "a rollout of 8 texts is noise",
                         "raise --episodes"),
    "a discount of 0.5": (["--gamma", "0.5"], "the score hardly reaches the first tokens",
                          "--gamma 1: within a text nothing is discounted"),
}


def run_ppo(work, models, seed, flags, change=None):
    """PPO in a copy of the project, with one line of it changed. Returns its metrics, or None if it
    refused to go on."""
    if not work.exists():
        copy_project(work, ".check")
        if change:
            path = work / change.file
            path.write_text(path.read_text().replace(change.right, change.wrong))
    run = work / "runs" / str(seed)
    for stage in demo.MODELS:
        shutil.copytree(models / stage, run / stage)
    command = [sys.executable, "girl.py", "ppo", "--demo", "--run", str(run), "--data",
               str(models / "data"), "--seed", str(seed), "--keep", "0", *flags]
    found = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if found.returncode:
        print(found.stderr.splitlines()[-1])
        return None
    return read_metrics(run / "ppo" / "metrics.csv")


def picture(path, healthy, sick):
    """Seven small figures: healthy runs in green, the sick ones in orange."""
    drawn, axes = plt.subplots(1, len(SHOWN), figsize=(11, 1.7))
    for ax, (column, title) in zip(axes, SHOWN.items()):
        for metrics in healthy:
            ax.plot(metrics["iteration"], metrics[column], color=SERIES[2], lw=1)
        for metrics in sick:
            ax.plot(metrics["iteration"], metrics[column], color=SERIES[1], lw=1.4)
        ax.set_title(title)
        ax.locator_params(nbins=3)
        ax.tick_params(labelsize=7)
    write_svg(path, drawn)


def seen(sick):
    """What differs from healthy runs, in words: {figure: "high" or "low"}, in both seeds."""
    ranges = read_json(demo.HOME / "healthy.json")["figures"]
    found = None
    for metrics in sick:
        rows = [dict(zip(demo.FIGURES, row)) for row in zip(*map(metrics.get, demo.FIGURES))]
        differs = {}
        for name, (_, last) in demo.figures(rows).items():
            low, high = ranges[name]["last"]
            if not low <= last <= high:
                differs[name] = "low" if last < low else "high"
        found = differs if found is None else {n: d for n, d in found.items()
                                               if differs.get(n) == d}
    return found


def main():
    parser = argparse.ArgumentParser(description="Make learn/SYMPTOMS.md.")
    parser.add_argument("--run", default="runs/demo", help="a run of bash train.sh --demo")
    parser.add_argument("--work", default="runs/symptoms", help="folder for the copies")
    args = parser.parse_args()
    models, work = Path(args.run).resolve(), Path(args.work).resolve()
    todo = {"healthy": ([], None, "", "")}
    for number, case in enumerate(CASES, 1):
        if case.command == "bash train.sh --quick":         # of stage 1
            continue
        flags = ["--accumulate", "8"] if "--accumulate" in case.command else []
        todo[f"case {number}"] = (flags, case, case.does, "mend the line")
    for name, (flags, what, mend) in SETTINGS.items():
        todo[name] = (flags, None, what, mend)

    def run_all(name):
        flags, change, _, _ = todo[name]
        folder = work / name.replace(" ", "-")
        return name, [run_ppo(folder, models, seed, flags, change) for seed in SEEDS]
    with ThreadPoolExecutor(2) as pool:
        runs = dict(pool.map(run_all, todo))
    pictures = HOME / "learn" / "symptoms"
    pictures.mkdir(exist_ok=True)
    entries = []
    for name, sick in runs.items():
        if name == "healthy":
            continue
        file = pictures / f"{name.replace(' ', '-')}.svg"
        sick = [metrics for metrics in sick if metrics]
        if sick:
            picture(file, runs["healthy"], sick)
        entries.append((name, sick, file))
    write_bytes(HOME / "learn" / "SYMPTOMS.md", text(entries, todo).encode())


def text(entries, todo):
    """SYMPTOMS.md: sorted by the first figure that one sees."""
    order = list(demo.FIGURES)
    found = []
    for name, sick, file in entries:
        differs = seen(sick) if sick else None
        first = min(map(order.index, differs), default=len(order)) if differs is not None else -1
        found.append((first, name, differs, file))
    lines = [HEAD]
    for _, name, differs, file in sorted(found, key=lambda entry: entry[0]):
        _, change, does, mend = todo[name]
        if differs is None:
            what = "PPO stops with an error"
        elif differs:
            what = ", ".join(f"{demo.FIGURES[n][0]} too {d}" for n, d in differs.items())
        else:
            what = "**nothing: no figure leaves the healthy range in both seeds**"
        title = f"bug hunt, {name}" if change else name
        lines.append(f"## {what[0].upper() + what[1:] if differs else what}\n\n"
                     f"*{title}.* {does} *Mend:* {mend}.\n")
        if differs is not None:
            lines.append(f"![]({file.parent.name}/{file.name})\n")
    return "\n".join(lines)


HEAD = """# My run is sick

Made by `python -m learn.symptoms` from real runs: PPO of the demonstration with each fault of the
bug hunt, and with wrong settings. Seeds 0 and 1 in orange, two healthy runs in green. A heading
says which figures, over the last two iterations, leave the range of ten healthy runs in *both*
seeds. (If you still want to hunt, do not read the lines under the headings.) Faults that show in no
figure are at the end: only a test finds those.
"""


if __name__ == "__main__":
    main()
