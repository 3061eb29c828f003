"""Feedback that never shows something: no overqualified candidates in the decisions."""
import random
from dataclasses import replace

import numpy as np
import torch

import market
from data import read_records
from learn.labs.lab import (CPU, CVS, WORTH, command, load_models, stage, take, train_ppo,
                            valid_cvs, worth)
from measure import evaluate
from measure.report import SERIES
from model import LanguageModel, RewardModel
from plumbing.weights import load_model

QUESTION = "Does PPO walk into what the feedback never showed?"
PREDICTION = (
    "Without decisions on the overqualified the reward model does not notice when a job asks for "
    "far too little: it finds such a JD no worse in most cases. PPO finds that out. With all "
    "decisions about 3% of its JDs are for people who are overqualified; without those decisions "
    "at least 15%, and the factor of the years falls, while the reward is the same.")
SAW = (
    "It does. If a job asks for 7 or 8 years less than the person has, the reward model that saw "
    "all decisions scores it lower in {PPO, all decisions[notices]} of the cases, the other in "
    "{PPO, none on the overqualified[notices]}. And PPO goes there: "
    "{PPO, none on the overqualified[overqualified]} of its JDs ask for too little, with all "
    "decisions {PPO, all decisions[overqualified]}. The factor of the years falls to that of the "
    "SFT model, and the greedy JD is worth {PPO, none on the overqualified[greedy]} instead of "
    "{PPO, all decisions[greedy]}: less than before PPO. The judge, which saw all decisions, "
    "notices: {PPO, none on the overqualified[judge]} instead of {PPO, all decisions[judge]}. So "
    "the prediction held, but for two numbers. With all decisions it is not 3% of the JDs: SFT's "
    "ask for too little as often. And its own reward is not the same: it is lower in two seeds.")
TABLE = {"overqualified": "JDs that ask for too little", "notices": "reward model notices",
         "years_factor": "factor of the years", "degree_factor": "of the degree"} | {
             name: WORTH[name] for name in ("true_match", "greedy", "reward", "judge", "kl")} | {
                 "last_reward": "its own reward"}


def asking_too_little(records):
    """(cv, jd, worse jd): accepted JDs of people with at least 8 years, and the same JD when it
    asks for 7 or 8 years less than the person has."""
    changes = []
    for r in records:
        person, job = market.parse_cv(r.cv), market.parse_jd(r.jd)
        if r.accepted and not market.overqualified(person, job) and person.years >= 8:
            rng = random.Random(r.jd)
            years = person.years - rng.randint(7, 8)
            worse = replace(job, years=years,
                            pay=market.draw_pay(rng, market.BY_TITLE[job.title], years))
            layout = next(i for i in range(len(market.JD_LAYOUTS))
                          if market.write_jd(job, i) == r.jd)
            changes.append((r.cv, r.jd, market.write_jd(worse, layout)))
    return changes


@torch.no_grad()
def habits(place, generator, reward_model):
    """How often the generator asks for too little; and how often the reward model scores an
    accepted JD lower if it asks for so few years that the person is overqualified."""
    models, cvs = load_models(place), valid_cvs(place)
    responses = evaluate.write_jds(generator, models.codec, cvs, 1.0, place.seed, "evaluate it",
                                   CPU)
    pairs = [(market.parse_cv(cv), market.parse_jd(models.codec.text(r)))
             for cv, r in zip(cvs, responses)]
    too_little = [market.overqualified(person, job) for person, job in pairs if job]
    changes = asking_too_little(read_records(place.models / "data" / "valid.jsonl"))[:CVS]
    texts = [(cv, jd) for cv, *two in changes for jd in two]
    scores = evaluate.score_texts(reward_model, models.codec, texts).reshape(-1, 2)
    return {"overqualified": float(np.mean(too_little or [0])),
            "notices": float((scores[:, 0] > scores[:, 1]).mean())}


def before(place):
    models = load_models(place)
    found = worth(place, models.sft) | habits(place, models.sft, models.scorers["reward"])
    found.pop("notices")
    return with_factors(found)


def with_factors(found):
    factors = found["factors"]
    return found | {"years_factor": factors["years"], "degree_factor": factors["degree"]}


def trained(place, reward=None):
    found = with_factors(train_ppo(place, reward=reward))
    generator = load_model(place.run / "ppo", LanguageModel, CPU).eval()
    reward_model = load_model(place.run / "reward", RewardModel, CPU).eval()
    return found | habits(place, generator, reward_model)


def without(place):
    """Stage 2 on decisions without the overqualified; stage 1 as it was."""
    data, run = place.run / "data", place.run / "other"
    command("data", place.size, "--out", data, "--seed", place.seed, "--no-overqualified")
    take(place.models, run, "sft")
    stage(place, "reward", data=data, run=run)
    return trained(place, run)


ARMS = {"SFT": before, "PPO, all decisions": trained, "PPO, none on the overqualified": without}
SMOKE = ("PPO, none on the overqualified",)


def draw(found, ax):
    for row in found:
        ax.plot([list(ARMS).index(row["arm"]) + 0.1 * (row["seed"] - 1)], [row["overqualified"]],
                "o", color=SERIES[row["seed"] % len(SERIES)])
    ax.set_xticks(range(len(ARMS)), [arm.replace(", ", ",\n") for arm in ARMS], fontsize=7)
    ax.set_ylabel("share of JDs that ask for too little")
    ax.set_ylim(bottom=0)
