"""What the labs share: where an arm runs, the stages with other flags or other parts, and what a
generator is worth.

A lab is a file of this folder with

    QUESTION, PREDICTION    texts; the prediction was written before the first run
    SAW                     what we saw: a text with {arm[figure]}, filled in from the results
    ARMS                    {name: function of a Place that returns figures}
    SMOKE                   the arms of a toy run (if missing: all)
    TABLE                   {figure: heading} of its table; NOTE: a sentence below it
    prepare(place)          what all arms of a seed share (may be missing)
    draw(found, axes)       its picture; AXES: how many axes it has
"""
import contextlib
from pathlib import Path
from typing import NamedTuple

import torch

import girl
import market
from data import load_codec, read_half, read_records
from learn.copies import take
from measure import evaluate
from measure.report import read_metrics
from model import LanguageModel, RewardModel
from plumbing.files import BadInput
from plumbing.stage import read_summary
from plumbing.weights import load_model

CPU = torch.device("cpu")
CVS = 200               # of the valid split, on which a generator is measured
WORTH = {"true_match": "true match", "greedy": "greedy", "reward": "reward", "judge": "judge",
         "kl": "KL", "format_rate": "format", "distinct_2": "distinct-2", "seconds": "seconds"}


class Place(NamedTuple):
    """Where an arm of a lab runs."""
    seed: int
    models: Path        # the finished run of this seed that the lab starts from
    shared: Path        # what all arms of this seed share
    run: Path           # the arm's own run
    size: str           # --quick; --smoke in the tests


def command(*words):
    """A command of girl.py."""
    if girl.main([str(word) for word in words]):
        raise BadInput(f"girl.py {words[0]} failed; see the error above")


def stage(place, name, *flags, data=None, run=None, seed=None):
    """Run a stage in the arm's folder, or in another."""
    seed = place.seed if seed is None else seed
    keep = [] if name != "ppo" or "--keep" in flags else ["--keep", 0]
    command(name, place.size, "--run", run or place.run, "--data", data or place.models / "data",
            "--seed", seed, *flags, *keep)


def linked_data(source, folder, *files):
    """A new data folder with another's held-out splits, and with these files, as links. The caller
    writes the others into it."""
    folder.mkdir()
    for file in ("valid.jsonl", "test.jsonl", "market.json", *files):
        (folder / file).symlink_to(source / file)
    return folder


def train_ppo(place, *flags, reward=None):
    """PPO with these flags, from the finished run's SFT model and its reward model, or that of
    another run. Returns what its generator is worth."""
    take(place.models, place.run, "sft")
    take(reward or place.models, place.run, "reward")
    stage(place, "ppo", *flags)
    return worth(place, "ppo") | curve(place.run)


def curve(run):
    """PPO's figures over its iterations."""
    metrics = read_metrics(run / "ppo" / "metrics.csv")
    names = ("kl", "reward", "true_match", "explained_variance")
    return {"curve": {name: [round(float(x), 4) for x in metrics[name]] for name in names},
            "last_reward": float(metrics["reward"][-1])}


def valid_cvs(place):
    """The first CVs of the valid split."""
    records = read_records(place.models / "data" / "valid.jsonl")
    return list(dict.fromkeys(r.cv for r in records))[:CVS]


def training_cvs(place):
    """The CVs that PPO writes for."""
    return sorted({r.cv for r in read_half(place.models / "data", "A")})


class Models(NamedTuple):
    """Of the finished run: the SFT model, and who scores (reward model and judge)."""
    sft: LanguageModel
    scorers: dict
    codec: object


def load_models(place):
    sft = load_model(place.models / "sft", LanguageModel, CPU).eval()
    scorers = {name: load_model(place.models / name, RewardModel, CPU).eval()
               for name in ("reward", "judge")}
    return Models(sft, scorers, load_codec(place.models / "sft", sft.config))


@torch.no_grad()
def worth(place, generator):
    """What a generator is worth: one sample and one greedy JD for each of some valid CVs.
    `generator`: a LanguageModel, or the name of the arm's stage that trained it."""
    models, cvs, found = load_models(place), valid_cvs(place), {}
    if isinstance(generator, str):
        found["seconds"] = read_summary(place.run / generator)["seconds"]
        generator = load_model(place.run / generator, LanguageModel, CPU).eval()
    sample, greedy = (evaluate.write_jds(generator, models.codec, cvs, temperature, place.seed,
                                         f"evaluate {temperature:g}", CPU)
                      for temperature in (1.0, 0.0))
    greedy_texts = [models.codec.text(r) for r in greedy]
    return found | worth_of(place, models, cvs, sample) | {
        "greedy": float(evaluate.true_matches(cvs, greedy_texts, market).mean()),
        "kl": evaluate.kl_per_text(generator, models.sft, models.codec, cvs, sample, CPU)}


def worth_of(place, models, cvs, responses):
    """The figures of one response for each CV, as `evaluate` has them."""
    scored = evaluate.score_all(cvs, {"it": responses}, models.codec, models.scorers, market)["it"]
    found = evaluate.describe(cvs, responses, scored, models.codec, set(), market, place.seed)
    names = ("true_match", "true_match_ci95", "reward", "judge", "format_rate", "distinct_2",
             "copy_rate", "length", "factors")
    return {name: found[name] for name in names}


@contextlib.contextmanager
def changed(owner, **parts):
    """With other parts in a module or a class: changed(ppo, whiten=...)."""
    was = {name: getattr(owner, name) for name in parts}
    for name, part in parts.items():
        setattr(owner, name, part)
    try:
        yield
    finally:
        for name, part in was.items():
            setattr(owner, name, part)
