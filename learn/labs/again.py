"""A second round of feedback: the recruiter decides on what the policy wrote."""
import random

import numpy as np
import torch

import market
import ppo
import reward
from data import Record, load_codec, read_half
from learn.labs.lab import (CPU, WORTH, changed, linked_data, stage, take, train_ppo,
                            training_cvs, valid_cvs, worth)
from measure import evaluate
from measure.report import SERIES
from model import LanguageModel, RewardModel
from plumbing.records import write_records
from plumbing.weights import load_model

QUESTION = "What does a second round of feedback bring?"
PREDICTION = (
    "After the first round the reward model orders two samples of the policy right in 0.75 of the "
    "cases, the judge in 0.85. With 10,000 new decisions, on what the policy wrote, the reward "
    "model comes to 0.85 itself, with 1,000 to 0.80. PPO that goes on with it gains 0.05 in true "
    "match, with a tenth 0.02; PPO that goes on with the old reward model gains nothing, however "
    "long, and neither does PPO with a reward model that only saw more old decisions.")
SAW = (
    "The reward model learns what it was asked: with 10,000 new decisions it orders the policy's "
    "samples right in {10,000 new decisions[accuracy]} of the cases instead of "
    "{first round[accuracy]}, nearly as predicted. (The judge is right in {the judge, to "
    "compare[accuracy]}, less often than we thought.) But as much training on old decisions alone "
    "brings {more old decisions[accuracy]}, and 1,000 new ones bring nothing. The truth did not "
    "follow: PPO that goes on ends at {10,000 new decisions[true_match]} with the new reward "
    "model, at {PPO goes on[true_match]} with the old one. We had predicted that PPO with the old "
    "reward model gains nothing. Three times as long, it gained most: it ends at {PPO goes on, "
    "three times as long[true_match]}. (The ranges of three seeds overlap.) So here PPO was the "
    "limit, rather than its reward model: the 28 iterations of the quick run do not use it up. "
    "(Those of the default run do, see RESULTS.md.) A second round may pay after that; this lab "
    "did not try it.")
TABLE = {"accuracy": "reward model on the policy's samples"} | {
    name: WORTH[name] for name in ("true_match", "greedy", "reward", "judge", "kl", "format_rate",
                                   "distinct_2", "seconds")}
# Four JDs each. Of 2,500 people come about as many groups of decisions as stage 2 has steps for.
PEOPLE = {"--quick": 2500, "--smoke": 30}
LONGER = {"--quick": 84, "--smoke": 4}              # iterations


@torch.no_grad()
def decide(place, n):
    """A recruiter's decisions on four JDs that the first round's policy wrote for each of n
    people: accepted with the probability that the true match gives."""
    generator = load_model(place.models / "ppo", LanguageModel, CPU).eval()
    codec, rng = load_codec(place.models / "ppo", generator.config), random.Random(place.seed)
    cvs = training_cvs(place)
    cvs = rng.sample(cvs, min(n, len(cvs)))
    samples = evaluate.write_samples(generator, codec, cvs, 4, place.seed, "evaluate 4", CPU)
    texts = [(cv, codec.text(r)) for responses in samples for cv, r in zip(cvs, responses)]
    return [Record(cv, jd, rng.random() < market.true_match(cv, jd))
            for cv, jd in dict.fromkeys(texts)]


def second_round(place, people, new=True):
    """The reward model goes on for one epoch over the new decisions and those on as many other
    people, with their hard negatives; then PPO goes on. Without `new` it goes on for as many old
    ones."""
    data, run = linked_data(place.models / "data", place.run / "data"), place.run / "other"
    cvs, rng = training_cvs(place), random.Random(f"{place.seed} old")
    chosen = set(rng.sample(cvs, min(people if new else 2 * people, len(cvs))))
    decisions = decide(place, people) if new else []
    for file, more in (("train.jsonl", decisions), ("probes.jsonl", [])):
        old = read_half(place.models / "data", "A", file)
        write_records(data / file, more + [r for r in old if r.cv in chosen])
    groups = reward.decision_groups(read_half(data, "A", "train.jsonl", "probes.jsonl"))
    take(place.models, run, "sft")
    first = load_model(place.models / "reward", RewardModel, CPU)
    with changed(reward, new_reward_model=lambda *_: first):
        stage(place, "reward", "--steps", max(1, len(groups) // 4), data=data, run=run)
    return go_on(place, run)


def go_on(place, scorer=None, *flags):
    """PPO goes on from the first round's policy; the reference is still the SFT model."""
    prepare = ppo.prepare

    def prepare_from_first_round(policy, *rest):
        prepared = prepare(policy, *rest)
        first = load_model(place.models / "ppo", LanguageModel, CPU)
        policy.load_state_dict(first.state_dict())
        return prepared
    with changed(ppo, prepare=prepare_from_first_round):
        found = train_ppo(place, *flags, reward=scorer)
    return found | {"accuracy": accuracy(place, (scorer or place.models) / "reward")}


@torch.no_grad()
def accuracy(place, folder):
    """How well a reward model orders the samples of the first round's policy."""
    generator = load_model(place.models / "ppo", LanguageModel, CPU).eval()
    model = load_model(folder, RewardModel, CPU).eval()
    codec, cvs = load_codec(place.models / "ppo", generator.config), valid_cvs(place)
    samples = evaluate.write_samples(generator, codec, cvs, evaluate.SAMPLES, place.seed,
                                     "evaluate accuracy", CPU)
    scores = evaluate.score_each(model, codec, cvs, samples)
    truth = np.array([evaluate.true_matches(cvs, map(codec.text, responses), market)
                      for responses in samples])
    return evaluate.accuracy(evaluate.sample_margins(truth, scores), place.seed)[0]


def first_round(place):
    take(place.models, place.run, "ppo")
    found = worth(place, "ppo") | {"accuracy": accuracy(place, place.models / "reward")}
    found.pop("seconds")                # of a run with two threads
    return found


def judge(place):
    """The judge in the reward model's place, to compare: only its accuracy."""
    return {"accuracy": accuracy(place, place.models / "judge")}


ARMS = {
    "first round": first_round,
    "the judge, to compare": judge,
    "PPO goes on": go_on,
    "PPO goes on, three times as long":
        lambda place: go_on(place, None, "--iterations", LONGER[place.size]),
    "more old decisions": lambda place: second_round(place, PEOPLE[place.size], new=False),
    "1,000 new decisions": lambda place: second_round(place, PEOPLE[place.size] // 10),
    "10,000 new decisions": lambda place: second_round(place, PEOPLE[place.size]),
}
SMOKE = ("the judge, to compare", "PPO goes on", "more old decisions", "1,000 new decisions")


def draw(found, ax):
    for row in found:
        if "true_match" in row:
            ax.plot([row["accuracy"]], [row["true_match"]], "osD^vPX"[list(ARMS).index(row["arm"])],
                    color=SERIES[list(ARMS).index(row["arm"]) % len(SERIES)], ms=5,
                    label=row["arm"] if row["seed"] == 0 else None)
    ax.set_xlabel("reward model's accuracy on the policy's samples")
    ax.set_ylabel("true match")
    ax.figure.legend(loc="outside right upper", fontsize=7)
