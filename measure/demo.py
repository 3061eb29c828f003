"""PPO in half a minute, from two small models that come with the project, and a verdict: did it do what it does in a healthy run?

    bash train.sh --demo

PPO can be wrong without any error message: a sign, a mask, a position that is off by one. This is for changing `ppo.py` and
seeing what happens. The models lie in `demo/`, and were made by

    python -m measure.demo --run runs/quick

This takes them from a finished `bash train.sh --quick` and runs PPO with ten seeds. It notes in `demo/healthy.json` the range of
each figure, in the first iteration and over the last two.
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
LAST = 2                # iterations over which the last value is a mean: one rollout is few texts

# figure -> its name in the verdict, and where to look if it is too low and if it is too high (None: it cannot be).
FIGURES = {
    "true_match": ("true match", "look at the sign of the advantages, and at which token gets the score", None),
    "reward": ("reward", "look at the sign of the advantages, at the score's position, and at the learning rate",
               "look at the price of the KL: is beta used?"),
    "kl": ("KL, nats per text", "the policy hardly moves: look at the learning rate, at whitening, and at the sign of the KL",
           "look at the sign of the KL in the rewards, and at beta"),
    "approx_kl": ("approximate KL of an update", "the policy hardly moves: look at the learning rate",
                  "the update and the rollout disagree: look at temperature, masks and positions"),
    "clip_frac": ("clipped ratios", "the policy hardly moves: look at the learning rate",
                  "the updates are too large, or the update and the rollout disagree"),
    "ratio_mean": ("mean ratio", "the update and the rollout disagree", "the update and the rollout disagree"),
    "entropy": ("entropy, nats per token", "the policy becomes certain too soon: look at the learning rate",
                "the policy becomes random: look at the sign of the advantages"),
    "explained_variance": ("explained variance", "the critic knows nothing: look at its states, and at what it is fitted to",
                           "a value knows its own return: when is the critic fitted?"),
    "eos_rate": ("JDs that end", "look at the mask: does it hold the end-of-text?", None),
    "length": ("tokens per JD", "look at which token gets the score", "look at the mask, and at which token gets the score"),
}


# ------------------------------------------------------------------------------------------------------- the verdict
def read_rows(run):
    """The rows of PPO's metrics.csv in this run, as texts."""
    with (Path(run) / "ppo" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def figures(rows):
    """Of the rows of metrics.csv: {figure: (its first value, its mean over the last iterations)}."""
    return {name: (float(rows[0][name]), sum(float(row[name]) for row in rows[-LAST:]) / LAST) for name in FIGURES}


def verdict(rows, healthy):
    """(lines, are all of them well?): one line for each figure beside its values in healthy runs."""
    lines = []
    for name, values in figures(rows).items():
        what, if_low, if_high = FIGURES[name]
        remark = ""
        for value, when in zip(values, ("first", "last")):
            low, high = healthy[name][when]
            hint = if_low if value < low else if_high if value > high else None
            if hint and not remark:
                remark = f"; healthy runs {'begin' if when == 'first' else 'end'} with {low:.3f} to {high:.3f}: {hint}"
        lines.append(f"{'LOOK' if remark else 'ok':<6}{what} {values[0]:.3f} -> {values[1]:.3f}{remark}")
    return lines, not any(line.startswith("LOOK") for line in lines)


def ranges(runs):
    """{figure: its ranges} of the figures of several runs: from the lowest to the highest value, and half of that distance more
    on both sides."""
    found = {}
    for name in FIGURES:
        found[name] = {}
        for k, when in enumerate(("first", "last")):
            values = [run[name][k] for run in runs]
            spare = (max(values) - min(values)) / 2 + 1e-3
            low = min(values) - spare
            low = max(low, 0.0) if min(values) >= 0 else low        # a share, or a length
            found[name][when] = [round(low, 4), round(max(values) + spare, 4)]
    return found


def judge(run):
    """Print the verdict on the PPO of this run; returns whether all is well."""
    healthy = read_json(HOME / "healthy.json", "restore it: it came with the project")
    lines, well = verdict(read_rows(run), healthy["figures"])
    print(f"\nThis run, from the first iteration to the last, beside {healthy['seeds']} healthy runs:", *lines, sep="\n")
    return well


# -------------------------------------------------------------------------------------------------------- the models
def put_models(run):
    """Copy the models that come with the project into the run's folder, and remove the PPO of an earlier demonstration. A run of
    other models is not touched."""
    for stage in MODELS:
        if not finished(HOME, stage):
            raise BadInput(f"{HOME / stage}: is not complete; restore it: it came with the project")
        check_folder(HOME / stage)
        if (run / stage).exists() and (not finished(run, stage)
                                       or read_summary(run / stage)["sha256"] != read_summary(HOME / stage)["sha256"]):
            raise BadInput(f"{run / stage}: holds another model than that of the demonstration; choose another --out")
    with locked(run / "ppo"):
        shutil.rmtree(run / "ppo")
    for stage in MODELS:
        shutil.copytree(HOME / stage, run / stage, dirs_exist_ok=True)


def take_models(run):
    """Copy stage 1's model and the reward model of a finished run into demo/."""
    for stage in MODELS:
        if not finished(run, stage):
            raise BadInput(f"{run / stage}: is not finished; run  bash train.sh --quick  first")
    for stage in MODELS:
        shutil.rmtree(HOME / stage, ignore_errors=True)
        shutil.copytree(run / stage, HOME / stage)


def main():
    parser = argparse.ArgumentParser(description="Take the models of the demonstration from a run, and see what healthy runs do.")
    parser.add_argument("--run", default="runs/quick", help="a finished run of bash train.sh --quick (default %(default)s)")
    parser.add_argument("--out", default="runs/demo-seeds", help="folder for the ten runs of PPO (default %(default)s)")
    args = parser.parse_args()
    try:
        if Path(args.out).exists():         # before anything is taken: its runs are of the models of before
            raise BadInput(f"{args.out}: is there already; delete it, or choose another --out")
        take_models(Path(args.run))
    except BadInput as e:
        parser.error(str(e))
    runs = []
    for seed in range(SEEDS):
        out = Path(args.out) / str(seed)
        put_models(out)
        for command in (["data", "--out", out / "data"], ["ppo", "--run", out]):
            subprocess.run([sys.executable, HOME.with_name("girl.py"), *command, "--demo", "--seed", str(seed)], check=True)
        runs.append(figures(read_rows(out)))
    write_json(HOME / "healthy.json", {"seeds": SEEDS, "figures": ranges(runs)})


if __name__ == "__main__":
    main()
