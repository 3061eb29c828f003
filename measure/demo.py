"""PPO in half a minute, on two small models, and a verdict: does it behave as in healthy runs?

    bash train.sh --demo

PPO can be wrong without any error message: a sign, a mask, a position that is off by one. Change
`ppo.py` and see what happens. The models come with the project, in `demo/`.
This command made them:

    python -m measure.demo --run runs/quick

It takes them from a finished `bash train.sh --quick` and runs PPO with ten seeds. It writes the
range of each figure, in the first iteration and over the last two, to `demo/healthy.json`.
"""
import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

from plumbing.files import BadInput, locked, read_json, write_json
from plumbing.stage import check_folder, finished, read_summary

HOME = Path(__file__).parents[1] / "demo"
MODELS = ("sft", "reward")
SEEDS = 10
LAST = 2                # the last value is a mean over 2 iterations: one rollout has few texts

# figure -> its name in the verdict, where to look if it is too low, and where to look if it is too
# high (None: it cannot be).
FIGURES = {
    "true_match": (
        "true match",
        "look at the sign of the advantages, and at which token gets the score",
        None),
    "reward": (
        "reward",
        "look at the sign of the advantages, at the score's position, at the learning rate, and at "
        "the critic's states",
        "look at the price of the KL: is beta used?"),
    "kl": (
        "KL, nats per text",
        "the policy hardly moves: look at the learning rate, at whitening, "
        "and at the sign of the KL",
        "look at the sign of the KL in the rewards, and at beta"),
    "approx_kl": (
        "approximate KL of an update",
        "the policy hardly moves: look at the learning rate",
        "the update and the rollout disagree: look at temperature, masks and positions"),
    "clip_frac": (
        "clipped ratios",
        "the policy hardly moves: look at the learning rate",
        "the updates are too large, or the update and the rollout disagree"),
    "ratio_mean": (
        "mean ratio",
        "the update and the rollout disagree",
        "the update and the rollout disagree"),
    "entropy": (
        "entropy, nats per token",
        "the policy becomes certain too soon: look at the learning rate",
        "the policy learns too little, or follows noise: look at the advantages, and at the "
        "critic's states"),
    "explained_variance": (
        "explained variance",
        "the critic knows nothing: look at its states, and at its targets",
        "a value knows its own return, or the token that it values: when is the critic fitted, and "
        "which states does it read?"),
    "eos_rate": (
        "JDs that end",
        "look at the mask: does it include the end-of-text?",
        None),
    "length": (
        "tokens per JD",
        "look at which token gets the score",
        "look at the mask, and at which token gets the score"),
}


# ------------------------------------------------------------------------------------ the verdict
def read_rows(run):
    """The rows of PPO's metrics.csv in this run, as strings."""
    with (Path(run) / "ppo" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def figures(rows):
    """{figure: (first value, mean over the last LAST iterations)} from rows of metrics.csv."""
    values = {}
    for name in FIGURES:
        last = sum(float(row[name]) for row in rows[-LAST:]) / LAST
        values[name] = (float(rows[0][name]), last)
    return values


def verdict(rows, healthy):
    """(lines, is every figure healthy?): a line for each figure, with the range of healthy runs if
    the figure is outside it."""
    lines = []
    for name, values in figures(rows).items():
        title, if_low, if_high = FIGURES[name]
        remark = ""
        for value, when in zip(values, ("first", "last")):
            low, high = healthy[name][when]
            hint = if_low if value < low else if_high if value > high else None
            if hint and not remark:
                verb = "begin" if when == "first" else "end"
                remark = f"; healthy runs {verb} with {low:.3f} to {high:.3f}: {hint}"
        status = "LOOK" if remark else "ok"
        lines.append(f"{status:<6}{title} {values[0]:.3f} -> {values[1]:.3f}{remark}")
    return lines, not any(line.startswith("LOOK") for line in lines)


def ranges(runs):
    """{figure: {"first": [low, high], "last": [low, high]}} over the figures of several runs: from
    the lowest to the highest value, and on both sides half of that distance more."""
    found = {}
    for name in FIGURES:
        found[name] = {}
        for k, when in enumerate(("first", "last")):
            values = [run[name][k] for run in runs]
            margin = (max(values) - min(values)) / 2 + 1e-3
            low = min(values) - margin
            low = max(low, 0.0) if min(values) >= 0 else low        # a share, or a length
            found[name][when] = [round(low, 4), round(max(values) + margin, 4)]
    return found


def judge(run):
    """Print the verdict on this run's PPO; return whether every figure is healthy."""
    healthy = read_json(HOME / "healthy.json", "restore it: it came with the project")
    lines, well = verdict(read_rows(run), healthy["figures"])
    print("\nThis run, from the first iteration to the last, beside "
          f"{healthy['seeds']} healthy runs:", *lines, sep="\n")
    return well


# ------------------------------------------------------------------------------------- the models
def put_models(run):
    """Copy the demonstration's models into the run's folder, and remove the PPO of an earlier
    demonstration. Refuse a run that holds other models, and leave it as it is."""
    for stage in MODELS:
        if not finished(HOME, stage):
            raise BadInput(f"{HOME / stage}: is not complete; restore it: it came with the project")
        check_folder(HOME / stage)
        if (run / stage).exists() and not same_model(run, stage):
            raise BadInput(f"{run / stage}: holds another model than that of the demonstration; "
                           "choose another --out")
    with locked(run / "ppo"):
        shutil.rmtree(run / "ppo")
    for stage in MODELS:
        shutil.copytree(HOME / stage, run / stage, dirs_exist_ok=True)


def same_model(run, stage):
    """Does the run hold the demonstration's model of this stage?"""
    return (finished(run, stage)
            and read_summary(run / stage)["sha256"] == read_summary(HOME / stage)["sha256"])


def take_models(run):
    """Copy stage 1's model and the reward model of a finished run into demo/."""
    for stage in MODELS:
        if not finished(run, stage):
            raise BadInput(f"{run / stage}: is not finished; run  bash train.sh --quick  first")
    for stage in MODELS:
        shutil.rmtree(HOME / stage, ignore_errors=True)
        shutil.copytree(run / stage, HOME / stage)


def main():
    parser = argparse.ArgumentParser(
        description="Take the demonstration's models from a run, and measure what healthy runs do.")
    parser.add_argument("--run", default="runs/quick",
                        help="a finished run of bash train.sh --quick (default %(default)s)")
    parser.add_argument("--out", default="runs/demo-seeds",
                        help="folder for the ten runs of PPO (default %(default)s)")
    args = parser.parse_args()
    try:
        # Check this before taking the models: old runs in --out are of the old models.
        if Path(args.out).exists():
            raise BadInput(f"{args.out}: exists already; delete it, or choose another --out")
        take_models(Path(args.run))
    except BadInput as e:
        parser.error(str(e))
    runs = []
    for seed in range(SEEDS):
        out = Path(args.out) / str(seed)
        put_models(out)
        for command in (["data", "--out", out / "data"], ["ppo", "--run", out]):
            subprocess.run([sys.executable, HOME.with_name("girl.py"), *command,
                            "--demo", "--seed", str(seed)], check=True)
        runs.append(figures(read_rows(out)))
    write_json(HOME / "healthy.json", {"seeds": SEEDS, "figures": ranges(runs)})


if __name__ == "__main__":
    main()
