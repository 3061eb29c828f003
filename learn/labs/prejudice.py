"""A prejudiced recruiter: follow an attribute that the true match does not know through GIRL."""
import random

import numpy as np
import torch

import market
from data import load_codec, read_records
from learn.labs.lab import CPU, CVS, command, linked_data, stage, take
from measure import evaluate
from measure.report import SERIES
from model import LanguageModel, RewardModel
from plumbing.records import write_records
from plumbing.stage import read_summary
from plumbing.weights import load_model

QUESTION = "What becomes of a recruiter's prejudice?"
PREDICTION = (
    "The recruiter turns down half of those whom he would accept, if their CV has a gap. The "
    "reward model scores the same CV about half a standard deviation lower with the sentence than "
    "without. GIRL's jobs hardly change: within a CV all texts lose the same, so PPO is not "
    "paid for other jobs; SFT saw fewer accepted pairs with the sentence, but of the same kind. So "
    "true match and pay differ by less than their intervals. The ranking of posted jobs for one "
    "CV hardly changes either, while a ranking of CVs for one job would. Without the sentence at "
    "inference the difference is 0 by construction; balanced decisions remove most of it.")
SAW = (
    "The reward model learns the prejudice, and more of it than we predicted: with the sentence "
    "the score of the same CV and JD changes by {prejudice 0.5[score]} standard deviations. "
    "Among twenty people for a job, a person with the sentence loses 1.8 places in two seeds, "
    "and 0.15 in the third. Within one CV all JDs lose nearly alike: the loss varies by "
    "{prejudice 0.5[spread]} from JD to JD, where a sentence without meaning makes {no "
    "prejudice[spread]}. So we see no difference in GIRL's jobs, in their pay, or in the "
    "ranking of posted jobs for one person: with prejudice none of these intervals leaves out "
    "0. Whoever looks only at the JDs that GIRL writes finds no prejudice.\n\n"
    "Balanced decisions take at least 85% of it out of the reward model. What is left, -0.10 to "
    "-0.05, is no more than what a sentence without meaning does (-0.12 to +0.04). Does the "
    "prejudice also cost those without the sentence? The true match of GIRL's jobs for them was "
    "far lower in two seeds (0.78 to 0.47 and 0.55 to 0.39) and higher in the third (0.63 to "
    "0.70). Without prejudice the seeds are already 0.24 apart, so three of them cannot tell. It "
    "may: stage 1 has fewer accepted pairs and so takes fewer steps, and decisions that depend "
    "less on the fit are harder to predict (see the accuracy). Balancing does not change that.")
P = 0.5
TABLE = {"score": "score of an accepted JD", "spread": "its spread over one person's JDs",
         "cv_rank": "places lost among 20", "true": "true match of GIRL's JD", "pay": "its pay (k)",
         "years": "years it asks for", "top5": "true match of the 5 best posted jobs",
         "top5_pay": "their pay (k)", "true_with": "*true match of GIRL's JD, with*",
         "accuracy": "*reward model's accuracy*"}
NOTE = ("Values with the sentence minus those without it, for the same people; the last two "
        "columns are plain figures, the accuracy on each arm's own decisions. The 19 rivals for a "
        "job have no such sentence. *: the 95% interval over people leaves out 0 in every seed.")


def make_data(place, folder, prejudice):
    command("data", place.size, "--out", folder, "--seed", place.seed, "--prejudice", prejudice)


def prepare(place):
    """The data of a prejudiced recruiter, and stage 1 on them."""
    make_data(place, place.shared / "data", P)
    stage(place, "sft", data=place.shared / "data", run=place.shared)


def balanced(records, rng):
    """Fewer accepted decisions on people without a gap, so that both kinds are accepted at one
    rate."""
    rates = {}
    for gap in (False, True):
        of_kind = [r.accepted for r in records if market.parse_cv(r.cv).gap == gap]
        rates[gap] = sum(of_kind) / len(of_kind)
    # Of a accepted and 1 - a rejected, keep a share k of the accepted: k a / (k a + 1 - a) = rate.
    keep = rates[True] * (1 - rates[False]) / (rates[False] * (1 - rates[True]))
    return [r for r in records
            if market.parse_cv(r.cv).gap or not r.accepted or rng.random() < keep]


def train_on(place, data):
    stage(place, "reward", data=data)
    stage(place, "ppo", data=data)
    return differences(place, data)


def without_prejudice(place):
    """The same sentence in the same CVs, and a recruiter who does not mind it. (A prejudice of 0
    would leave out the sentence.)"""
    make_data(place, place.run / "data", 1e-9)
    stage(place, "sft", data=place.run / "data")
    return train_on(place, place.run / "data")


def with_prejudice(place):
    take(place.shared, place.run, "sft")
    return train_on(place, place.shared / "data")


def with_balance(place):
    data = linked_data(place.shared / "data", place.run / "data", "probes.jsonl")
    records = read_records(place.shared / "data" / "train.jsonl")
    write_records(data / "train.jsonl", balanced(records, random.Random(place.seed)))
    take(place.shared, place.run, "sft")
    return train_on(place, data)


def draw_rivals(people, cv, rng):
    """19 other people for a job."""
    others = [other for other in people if other != market.without_gap(cv)]
    return rng.sample(others, min(19, len(others)))


@torch.no_grad()
def differences(place, data):
    """The same people with and without the sentence."""
    generator = load_model(place.run / "ppo", LanguageModel, CPU).eval()
    reward_model = load_model(place.run / "reward", RewardModel, CPU).eval()
    codec = load_codec(place.run / "ppo", generator.config)
    records = read_records(data / "valid.jsonl")
    people = list(dict.fromkeys(market.without_gap(r.cv) for r in records))[:CVS]
    kinds = {"without": people, "with": [market.with_gap(cv) for cv in people]}
    # One decision for each person, so that an interval is over people.
    accepted = list({market.without_gap(r.cv): r for r in records if r.accepted}.values())[:CVS]
    posted = sorted({r.jd for r in records})
    rng = random.Random(place.seed)
    pools = [rng.sample(posted, min(30, len(posted))) for _ in people[:100]]
    rivals = [draw_rivals(people, r.cv, rng) for r in accepted[:100]]
    found, ranked = {}, {}
    for kind, cvs in kinds.items():
        form = market.with_gap if kind == "with" else market.without_gap
        scores = evaluate.score_texts(reward_model, codec,
                                      [(form(market.without_gap(r.cv)), r.jd) for r in accepted])
        jds = [codec.text(r) for r in evaluate.write_jds(generator, codec, cvs, 1.0, place.seed,
                                                         "evaluate jds", CPU)]
        jobs = [market.parse_jd(jd) for jd in jds]
        pairs = [(cv, jd) for cv, pool in zip(cvs, pools) for jd in pool]
        ranked[kind] = evaluate.score_texts(reward_model, codec, pairs).reshape(len(pools), -1)
        best = [[pool[k] for k in np.argsort(-row)[:5]] for pool, row in zip(pools, ranked[kind])]
        pairs = [(cv, r.jd) for r, cvs in zip(accepted, rivals) for cv in cvs]
        theirs = evaluate.score_texts(reward_model, codec, pairs).reshape(len(rivals), -1)
        found[kind] = {
            "score": scores,
            "true": evaluate.true_matches(cvs, jds, market),
            "pay": np.array([job.pay[0] if job else np.nan for job in jobs]),
            "years": np.array([job.years if job else np.nan for job in jobs]),
            "top5": np.array([np.mean([market.true_match(cv, jd) for jd in five])
                              for cv, five in zip(cvs, best)]),
            "top5_pay": np.array([np.mean([market.parse_jd(jd).pay[0] for jd in five])
                                  for five in best]),
            "cv_rank": (theirs > scores[:len(rivals), None]).sum(1)}
    gap = {name: found["with"][name] - found["without"][name] for name in found["with"]}
    result = {f"true_{kind}": float(found[kind]["true"].mean()) for kind in kinds}
    result["spread"] = float((ranked["with"] - ranked["without"]).std(1).mean())
    result["accuracy"] = read_summary(place.run / "reward")["pair_accuracy"]
    for name, values in gap.items():
        values = values[~np.isnan(values.astype(float))]
        if len(values):                     # in a toy run no JD may parse
            low, high = evaluate.bootstrap_ci95(values, place.seed)
            result |= {name: float(values.mean()), f"{name}_ci95": [low, high],
                       f"{name}_differs": low > 0 or high < 0}
    return result


ARMS = {"no prejudice": without_prejudice, "prejudice 0.5": with_prejudice,
        "prejudice 0.5, stage 2 on balanced decisions": with_balance}
SMOKE = ("prejudice 0.5, stage 2 on balanced decisions",)


def draw(found, ax):
    """The score of the same CV with the sentence, less without it, and its interval."""
    for row in found:
        x = list(ARMS).index(row["arm"]) + 0.15 * (row["seed"] - 1)
        low, high = row["score_ci95"]
        ax.plot([x, x], [low, high], color=SERIES[0], lw=1)
        ax.plot([x], [row["score"]], "o", color=SERIES[0], ms=4)
    ax.axhline(0, lw=0.6, color=SERIES[2])
    ax.set_xticks(range(len(ARMS)), [arm.replace(", ", ",\n") for arm in ARMS], fontsize=7)
    ax.set_ylabel("score with the sentence, less without")
