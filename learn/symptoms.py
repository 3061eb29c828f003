"""Make learn/SYMPTOMS.md: PPO of the quick run with each fault of the bug hunt, and with wrong
settings, beside healthy runs.

    python -m learn.symptoms --run runs/quick       about 40 minutes on two cores

It takes the models of a finished `bash train.sh --quick`, and runs PPO in copies of the project.
What one sees is found by comparing the first iteration, and the mean of the last two, with six
healthy runs, as in the verdict of `bash train.sh --demo`.
"""
import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from learn.bughunt import CASES
from learn.copies import HOME
from learn.runs import Change, Failed, girl, side_by_side, take, with_changes
from measure import demo
from measure.report import SERIES, read_metrics, write_svg
from plumbing.files import write_bytes

SIZE, SEEDS, HEALTHY = "--quick", range(2), range(6)
SHOWN = {"reward": "reward", "true_match": "true match", "kl": "KL", "clip_frac": "clipped",
         "entropy": "entropy", "explained_variance": "expl. variance", "length": "length"}
# Wrong settings: name -> (stage, flags, what it is, how to tell, the mend).
SETTINGS = {
    "a learning rate 25 times too high": (
        "ppo", ["--lr", "0.02"], "The steps are too large.",
        "The clipped share of the first iteration is far above 0.2.", "lower --lr"),
    "a learning rate 80 times too low": (
        "ppo", ["--lr", "1e-5"], "The policy hardly moves.",
        "The clipped share is 0 and the KL stays near 0.", "raise --lr"),
    "beta 0": (
        "ppo", ["--kl-coef", "0"], "Nothing holds the policy near the SFT model.",
        "Draw reward and truth over KL: they part.", "raise --kl-coef"),
    "beta 40 times too large": (
        "ppo", ["--kl-coef", "2"], "Each nat costs more than it can bring.",
        "The total (score minus price of the KL) rises, the reward does not.",
        "lower --kl-coef"),
    "8 episodes in a rollout": (
        "ppo", ["--episodes", "8", "--minibatch", "8"], "Advantages of eight texts are noise.",
        "The curves of two seeds differ, and each jumps.", "raise --episodes"),
    "a discount of 0.5": (
        "ppo", ["--gamma", "0.5"], "The score reaches only the last few tokens.",
        "In the trace the advantages of early tokens know nothing of the score.", "--gamma 1"),
    "a reward model of 100 steps": (
        "reward", ["--steps", "100"], "The reward model knows too little.",
        "Its accuracy on the valid split; a judge that disagrees with it.", "train it longer"),
    "a reward model that learned nothing": (
        "reward", ["--steps", "1"], "The score is a random function of the text.",
        "Its accuracy on the valid split is near 0.5.", "train it"),
}
CONSTANT = Change("ppo.py", "scores = reward_model.head(", "scores = 0 * reward_model.head(")


def run_ppo(code, models, run, seed, stage="ppo", flags=()):
    """PPO of the quick run, and before it the stages from `stage` on, if they differ from the
    finished run's. Returns its metrics."""
    common = [SIZE, "--run", run, "--data", models / "data"]
    if stage == "sft":
        girl(code, "sft", *common, "--seed", seed)
    else:
        take(models, run, "sft")
    if stage == "ppo":
        take(models, run, "reward")
    else:
        girl(code, "reward", *common, "--seed", seed, *flags)
        flags = []
    girl(code, "ppo", *common, "--seed", seed, "--keep", "0", *flags)
    return read_metrics(run / "ppo" / "metrics.csv")


def figures(metrics):
    """{figure: (first, last)}, as in the demonstration's verdict."""
    return demo.figures([dict(zip(demo.FIGURES, row))
                         for row in zip(*map(metrics.get, demo.FIGURES))])


def seen(healthy, sick):
    """{figure: "begins too high" and the like}, where it holds for every sick run."""
    ranges, found = demo.ranges([figures(metrics) for metrics in healthy]), {}
    for name in demo.FIGURES:
        for k, verb in enumerate(("begins", "ends")):
            low, high = ranges[name][("first", "last")[k]]
            values = [figures(metrics)[name][k] for metrics in sick]
            if max(values) < low:
                found[name] = f"{verb} too low"
            elif min(values) > high:
                found[name] = f"{verb} too high"
    return found


def symptom(found, sick):
    """The heading under which a person looks for it: what the eye meets first."""
    if found.get("eos_rate", "").endswith("low"):
        return "Nothing ends"
    if found.get("length") == "ends too low" and max(m["length"][-1] for m in sick) < 10:
        return "Every text is a few tokens long"
    if max(m["kl"][-1] for m in sick) < 0:
        return "The KL is negative"
    if max(m["kl"].max() for m in sick) == 0:
        return "The KL is 0"
    if found.get("true_match") == "ends too low":
        if found.get("reward") == "ends too low":
            return "The reward does not rise, or falls"
        return "The reward rises, the truth does not"
    if found.get("reward") == "ends too low":
        return "The reward rises too little, and the truth is not hurt"
    return "Only other figures tell" if found else "No figure tells: only a test does"


ORDER = ("PPO stops with an error", "The reward does not rise, or falls",
         "The reward rises, the truth does not", "Every text is a few tokens long", "Nothing ends",
         "The KL is negative", "The KL is 0",
         "The reward rises too little, and the truth is not hurt", "Only other figures tell",
         "No figure tells: only a test does")


def picture(path, healthy, sick):
    """Seven small figures: healthy runs thin, the sick ones thick."""
    drawn, axes = plt.subplots(1, len(SHOWN), figsize=(11, 1.7))
    for ax, (column, title) in zip(axes, SHOWN.items()):
        for metrics in healthy:
            ax.plot(metrics["iteration"], metrics[column], color=SERIES[2], lw=0.8)
        for metrics in sick:
            ax.plot(metrics["iteration"], metrics[column], color=SERIES[1], lw=1.6)
        ax.set_title(title)
        ax.locator_params(nbins=3)
        ax.tick_params(labelsize=7)
    write_svg(path, drawn)


class Patient:
    """One thing that is wrong: how it runs, and what is said of it."""

    def __init__(self, name, changes, stage, flags, may_be, tell, mend):
        self.name, self.changes, self.stage, self.flags = name, changes, stage, flags
        self.may_be, self.tell, self.mend = may_be, tell, mend


def patients():
    found = []
    for number, case in enumerate(CASES, 1):
        flags = ["--accumulate", "8"] if "--accumulate" in case.command else []
        stage = "sft" if case.file == "sft.py" else "ppo"
        found.append(Patient(
            f"bug hunt, case {number}", [Change(case.file, case.right, case.wrong)], stage, flags,
            case.does, f"`tests/{case.tests[0]}` fails.",
            f"`{case.wrong.strip()}` should be `{case.right.strip()}`"))
    for name, (stage, flags, may_be, tell, mend) in SETTINGS.items():
        found.append(Patient(name, [], stage, flags, may_be, tell, mend))
    found.append(Patient("a constant reward", [CONSTANT], "ppo", [],
                         "All texts of a rollout get the same score.",
                         "The message says so.", "train the reward model on more decisions"))
    return found


def examine(patient, models, work):
    """The runs of one patient: (metrics of each seed, None) or ([], the error)."""
    folder = work / patient.name.replace(" ", "-").replace(",", "")
    code = with_changes(folder / "code", patient.changes)
    try:
        return [run_ppo(code, models, folder / str(seed), seed, patient.stage, patient.flags)
                for seed in SEEDS], None
    except Failed as e:
        return [], str(e)


def entry(patient, sick, error, healthy, pictures):
    """(heading, the text under it) of one patient."""
    if error:
        heading, what, shown = ORDER[0], error, ""
    else:
        found = seen(healthy, sick)
        heading = symptom(found, sick)
        what = ", ".join(f"{demo.FIGURES[name][0]} {how}" for name, how in found.items())
        what = what or "every figure stays in the healthy range in one seed at least"
        file = pictures / f"{patient.name.replace(' ', '-').replace(',', '')}.svg"
        picture(file, healthy, sick)
        shown = f"\n![{patient.name}]({pictures.name}/{file.name})\n"
    return heading, (f"**{what[0].upper()}{what[1:]}.** *{patient.name}.* {patient.may_be} "
                     f"*How to tell:* {patient.tell} *Mend:* {patient.mend}.\n{shown}")


HEAD = """# My run is sick

Find what you see first. Below each heading are the faults and the wrong settings that look like
this, with what other figures say, what it may be, how to tell, and the mend. `python -m
learn.symptoms` made this page from real runs: PPO of the quick run, seeds 0 and 1 (thick, orange),
beside six healthy runs (thin, green). A figure counts as too high or too low if *both* seeds leave
the range of the healthy runs, widened by half on either side. Faults that show in no figure are at
the end: only a test finds those.

If you still want to hunt (`python girl.py bughunt`), read the headings and pictures only.
"""


def main():
    parser = argparse.ArgumentParser(description="Make learn/SYMPTOMS.md.")
    parser.add_argument("--run", default="runs/quick", help="a finished bash train.sh --quick")
    parser.add_argument("--work", default="runs/symptoms", help="folder for the copies and runs")
    args = parser.parse_args()
    models, work = Path(args.run).resolve(), Path(args.work).resolve()
    healthy = list(side_by_side(
        lambda seed: run_ppo(HOME, models, work / "healthy" / str(seed), seed), HEALTHY).values())
    everyone = {patient.name: patient for patient in patients()}
    examined = side_by_side(lambda name: examine(everyone[name], models, work), everyone)
    pictures = HOME / "learn" / "symptoms"
    pictures.mkdir(exist_ok=True)
    entries = [entry(everyone[name], *found, healthy, pictures) for name, found in examined.items()]
    lines = [HEAD]
    for heading in ORDER:
        texts = [text for its, text in entries if its == heading]
        lines += [f"## {heading}\n", *texts] if texts else []
    write_bytes(HOME / "learn" / "SYMPTOMS.md", "\n".join(lines).encode())


if __name__ == "__main__":
    main()
