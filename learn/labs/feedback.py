"""How much feedback: the reward model on a part of the decisions."""
import random

from data import read_records
from learn.labs.lab import WORTH, linked_data, stage, take, train_ppo
from measure.report import SERIES
from plumbing.records import write_records
from plumbing.stage import read_summary

QUESTION = "How many decisions does it take?"
PREDICTION = (
    "From 100% to 30% of the decisions nothing is lost: the 850 steps of stage 2 do not even see "
    "them all. At 10% the reward model loses 0.01 of accuracy and PPO little; at 3% it learns its "
    "decisions by heart, loses 0.05, and PPO's true match falls by 0.1 while its own reward rises "
    "as always.")
SAW = (
    "With 3% of the people more is lost than predicted: the accuracy is {3% of the "
    "people[pair_accuracy]}, and PPO's true match {3% of the people[true_match]}. With 10% the "
    "accuracy is {10% of the people[pair_accuracy]}, and no more from there on. The truth "
    "seems to gain more: from 30% to 100% PPO goes from {30% of the people[true_match]} to "
    "{100% of the people[true_match]}, and its greedy JDs from {30% of the people[greedy]} to "
    "{100% of the people[greedy]}; but in three seeds these ranges touch. If it is so, an accuracy "
    "on pairs from the market does not say all that PPO needs. (Fewer people also mean fewer hard "
    "negatives.) The reward that PPO reports tells nothing: it rises with 3% of the people, too.")
SHARES = (0.03, 0.1, 0.3, 1.0)
TABLE = {"pair_accuracy": "accuracy on valid pairs", "last_reward": "its own reward"} | {
    name: WORTH[name] for name in ("true_match", "greedy", "judge", "kl", "format_rate")}


def part(place, share):
    """Stage 2 on all decisions of a part of the people; stage 1 as it was."""
    if share == 1:
        accuracy = read_summary(place.models / "reward")["pair_accuracy"]
        return train_ppo(place) | {"pair_accuracy": accuracy}
    if place.size == "--smoke":         # has too few people for a small share
        share = max(share, 0.5)
    data, run = linked_data(place.models / "data", place.run / "data"), place.run / "other"
    for file in ("train.jsonl", "probes.jsonl"):
        records = read_records(place.models / "data" / file)
        write_records(data / file, [r for r in records
                                    if random.Random(f"{place.seed} {r.cv}").random() < share])
    take(place.models, run, "sft")
    stage(place, "reward", data=data, run=run)
    accuracy = read_summary(run / "reward")["pair_accuracy"]
    return train_ppo(place, reward=run) | {"pair_accuracy": accuracy}


ARMS = {f"{100 * share:g}% of the people": lambda place, share=share: part(place, share)
        for share in SHARES}
SMOKE = ("3% of the people",)


def draw(found, ax):
    for seed in sorted({row["seed"] for row in found}):
        mine = sorted((list(ARMS).index(row["arm"]), row) for row in found if row["seed"] == seed)
        for name, style in (("true_match", "o-"), ("pair_accuracy", "s--")):
            ax.plot([100 * SHARES[k] for k, _ in mine], [row[name] for _, row in mine], style,
                    color=SERIES[seed % len(SERIES)], lw=1, ms=4,
                    label=name.replace("_", " ") if seed == 0 else None)
    ax.set_xscale("log")
    ax.set_xlabel("% of the people whose decisions stage 2 sees")
    ax.legend(fontsize=7)
