"""Make learn/SYMPTOMS.md: PPO of the quick run with each fault of the bug hunt, and with wrong
settings, beside healthy runs.

    python -m learn.symptoms --run runs/quick       (took 70 minutes, beside other work)

It takes the models of a finished `bash train.sh --quick`, and runs PPO in copies of the project.
What one sees is found by comparing the first iteration, and the mean of the last two, with six
healthy runs, as in the verdict of `bash train.sh --demo`.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from learn.bughunt import CASES, HIDDEN, Case, plant
from learn.copies import HOME, copy_project, take
from measure import demo
from measure.report import SERIES, read_metrics, write_svg
from plumbing.files import write_bytes

SIZE, SEEDS, HEALTHY = "--quick", range(2), range(6)
SHOWN = {"reward": "reward", "true_match": "true match", "kl": "KL", "clip_frac": "clipped",
         "entropy": "entropy", "explained_variance": "expl. variance", "length": "length"}


class Patient(NamedTuple):
    """One thing that is wrong: how it runs, and what is said of it."""
    name: str
    may_be: str
    tell: str
    mend: str
    flags: tuple = ()
    stage: str = "ppo"      # the first stage that differs from the finished run's; has the flags
    fault: object = None    # a Case of the bug hunt, or None


SETTINGS = [
    Patient("a learning rate 25 times too high", "The steps are too large.",
            "The clipped share of the first iteration is far above 0.2.", "lower --lr",
            ("--lr", "0.02")),
    Patient("a learning rate 80 times too low", "The policy hardly moves.",
            "The clipped share is 0 and the KL stays near 0.", "raise --lr", ("--lr", "1e-5")),
    Patient("beta 0", "Nothing holds the policy near the SFT model. (Case 8 is the same run, but "
            "for the KL that it logs.)", "Draw reward and truth over KL: they part.",
            "raise --kl-coef", ("--kl-coef", "0")),
    Patient("beta far too large", "Each nat costs more than it can bring.",
            "The total (score minus price of the KL) falls at once, and the KL ends near 0.",
            "lower --kl-coef", ("--kl-coef", "2")),
    Patient("8 episodes in a rollout",
            "Advantages of eight texts are noise, and the run sees a sixteenth of the texts.",
            "The curves of two seeds differ, and each jumps.", "raise --episodes",
            ("--episodes", "8", "--minibatch", "8")),
    Patient("a discount of 0.5", "The score reaches only the last few tokens.",
            "In the trace the advantages of early tokens know nothing of the score.", "--gamma 1",
            ("--gamma", "0.5")),
    Patient("a reward model of 100 steps", "The reward model knows too little.",
            "Its accuracy on the valid split: 0.81 and 0.72, not 0.87.", "train it longer",
            ("--steps", "100"), "reward"),
    Patient("a reward model that learned nothing", "The score is a random function of the text.",
            "Its accuracy on the valid split: 0.60 and 0.47.", "train it", ("--steps", "1"),
            "reward"),
    Patient("a constant reward", "All texts of a rollout get the same score.",
            "The message says so.", "train the reward model on more decisions",
            fault=Case("ppo.py", "scores = reward_model.head(", "scores = 0 * reward_model.head(",
                       (), "", "", ""))]


def one_line(code):
    return " … ".join(map(str.strip, code.strip().splitlines()))


def patients():
    """The faults of the bug hunt, and the wrong settings."""
    return [Patient(f"bug hunt, case {number}", case.does, f"`tests/{case.tests[0]}` fails.",
                    f"`{one_line(case.wrong)}` should be `{one_line(case.right)}`",
                    ("--accumulate", "8") if "--accumulate" in case.command else (),
                    "sft" if case.file == "sft.py" else "ppo", case)
            for number, case in enumerate(CASES, 1)] + SETTINGS


# ----------------------------------------------------------------------------------------- the runs
class Failed(Exception):
    """A command ended with an error; holds its last line."""


def girl(code, *words):
    """Run a command of girl.py, with one thread. `code`: the folder of the project, or of a
    copy."""
    command = [sys.executable, "girl.py", *map(str, words)]
    found = subprocess.run(command, cwd=code, capture_output=True, text=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    if found.returncode:
        raise Failed(found.stderr.strip().splitlines()[-1].removeprefix("girl.py: "))


def run_ppo(code, models, run, seed, stage="ppo", flags=()):
    """PPO of the quick run, and before it the stages from `stage` on, which gets the flags. Returns
    its metrics."""
    common = [SIZE, "--run", run, "--data", models / "data"]
    if stage == "sft":
        girl(code, "sft", *common, "--seed", seed)
    else:
        take(models, run, "sft")
    if stage == "ppo":
        take(models, run, "reward")
    else:
        girl(code, "reward", *common, "--seed", seed, *flags)
        flags = ()
    girl(code, "ppo", *common, "--seed", seed, "--keep", "0", *flags)
    return read_metrics(run / "ppo" / "metrics.csv")


def folder_of(patient):
    return patient.name.replace(" ", "-").replace(",", "")


def examine(patient, models, work):
    """The runs of one patient: (metrics of each seed, None) or ([], the error)."""
    folder, code = work / folder_of(patient), HOME
    if patient.fault:
        code = copy_project(folder / "code", HIDDEN)
        path = code / patient.fault.file
        path.write_text(plant(path.read_text(), patient.fault))
    try:
        return [run_ppo(code, models, folder / str(seed), seed, patient.stage, patient.flags)
                for seed in SEEDS], None
    except Failed as e:
        return [], str(e)


# ------------------------------------------------------------------------------------- what is seen
def figures(metrics):
    """{figure: (first, last)}, as in the demonstration's verdict."""
    return demo.figures([dict(zip(demo.FIGURES, row))
                         for row in zip(*map(metrics.get, demo.FIGURES))])


def seen(healthy, sick):
    """What every sick run shows: {(figure, "begins" or "ends"): (their values, low, high)}, if all
    are below or all above the healthy range from low to high."""
    ranges, found = demo.ranges([figures(metrics) for metrics in healthy]), {}
    for name in demo.FIGURES:
        for k, (verb, when) in enumerate({"begins": "first", "ends": "last"}.items()):
            low, high = ranges[name][when]
            if name == "eos_rate":          # one text of a rollout is no symptom
                low -= 0.01
            values = [figures(metrics)[name][k] for metrics in sick]
            if max(values) < low or min(values) > high:
                found[name, verb] = values, low, high
    return found


ORDER = ("PPO stops with an error", "The KL explodes", "Nothing ends", "The KL is negative",
         "The KL is 0", "The reward rises; the truth too little, or it falls",
         "Reward and truth rise too little, or not at all", "Only other figures tell",
         "No figure of PPO in the quick run tells")


def symptom(found, sick):
    """The heading under which a person looks for it: what the eye meets first."""
    kl = [metrics["kl"][-1] for metrics in sick]
    too_low = {name for (name, verb), (values, low, _) in found.items()
               if verb == "ends" and max(values) < low}
    if min(kl) > 100:
        return "The KL explodes"
    if "eos_rate" in too_low and max(metrics["eos_rate"][-1] for metrics in sick) < 0.5:
        return "Nothing ends"
    if max(kl) < 0:
        return "The KL is negative"
    if max(metrics["kl"].max() for metrics in sick) == 0:
        return "The KL is 0"
    if "reward" in too_low:
        return "Reward and truth rise too little, or not at all"
    if "true_match" in too_low:
        return "The reward rises; the truth too little, or it falls"
    return "Only other figures tell" if found else "No figure of PPO in the quick run tells"


def in_words(found):
    """What is seen, with the values of the sick runs and the healthy range."""
    def short(x):
        return f"{x:.2f}" if abs(x) < 100 else f"{x:.0f}"
    sentences = []
    for verb in ("begins", "ends"):
        parts = [f"{SHOWN.get(name, demo.FIGURES[name][0])} {' and '.join(map(short, values))} "
                 f"({short(low)} to {short(high)})"
                 for (name, its), (values, low, high) in found.items() if its == verb]
        sentences += [f"It {verb} with {'; '.join(parts)}."] if parts else []
    return " ".join(sentences)


def picture(path, healthy, sick):
    """Seven small figures: the range of the healthy runs as a band, the sick runs as lines."""
    drawn, axes = plt.subplots(1, len(SHOWN), figsize=(11, 1.7))
    for ax, (column, title) in zip(axes, SHOWN.items()):
        values = np.array([metrics[column] for metrics in healthy])     # [runs, iterations]
        ax.fill_between(healthy[0]["iteration"], values.min(0), values.max(0), color=SERIES[2],
                        alpha=0.35, lw=0)
        for metrics in sick:
            ax.plot(metrics["iteration"], metrics[column], color=SERIES[1], lw=1.4)
        ax.set_title(title)
        ax.locator_params(nbins=3)
        ax.tick_params(labelsize=7)
    write_svg(path, drawn)


def entry(patient, sick, error, healthy, pictures):
    """(heading, the text under it) of one patient."""
    if error:
        heading, what, shown = ORDER[0], f"`{error}`.", ""
    else:
        found = seen(healthy, sick)
        heading = symptom(found, sick)
        what = in_words(found) or "In each figure, one seed at least is in the healthy range."
        file = pictures / f"{folder_of(patient)}.svg"
        picture(file, healthy, sick)
        shown = f"\n![{patient.name}]({pictures.name}/{file.name})\n"
    return heading, (f"### {patient.name}\n\n{what}\n{shown}\n"
                     f"{patient.may_be} *How to tell:* {patient.tell} *Mend:* {patient.mend}.\n")


HEAD = """# My run is sick

Find what you see first. Below each heading are the faults and the wrong settings that look like
this, with what other figures say, what it may be, how to tell, and the mend. `python -m
learn.symptoms` made this page from real runs: PPO of the quick run, seeds 0 and 1 (lines), beside
six healthy runs (the band). A figure is named if *both* seeds leave the range of the healthy runs
on the same side (in brackets, widened by half on either side): at the first iteration, or over the
last two. One text that does not end is not counted. Faults that show in no figure are at the end:
most of them only a test finds. (The two faults of stage 1, cases 13 and 14, have SFT and reward
models of their own, so they differ a little anyway.) All runs were of an earlier
version, with a β of 0.05.

If you still want to hunt (`python girl.py bughunt`), read the headings and pictures only.
"""


def write_page(entries):
    lines = [HEAD]
    for heading in ORDER:
        texts = [text for its, text in entries if its == heading]
        lines += [f"## {heading}\n", *texts] if texts else []
    write_bytes(HOME / "learn" / "SYMPTOMS.md", "\n".join(lines).encode())


def main():
    parser = argparse.ArgumentParser(description="Make learn/SYMPTOMS.md.")
    parser.add_argument("--run", default="runs/quick", help="a finished bash train.sh --quick")
    parser.add_argument("--work", default="runs/symptoms", help="folder for the copies and runs")
    args = parser.parse_args()
    models, work = Path(args.run).resolve(), Path(args.work).resolve()
    with ThreadPoolExecutor(2) as pool:     # with a thread each: so two cores do the most work
        healthy = list(pool.map(
            lambda seed: run_ppo(HOME, models, work / "healthy" / str(seed), seed), HEALTHY))
        examined = list(pool.map(lambda patient: examine(patient, models, work), patients()))
    pictures = HOME / "learn" / "symptoms"
    pictures.mkdir(exist_ok=True)
    write_page([entry(patient, *found, healthy, pictures)
                for patient, found in zip(patients(), examined)])


if __name__ == "__main__":
    main()
