"""What else could be done with the same decisions: PPO beside six other ways."""
import time

import torch

import sft
from learn.labs.lab import (CPU, WORTH, load_models, stage, take, train_ppo, training_cvs,
                            valid_cvs, worth, worth_of)
from measure import evaluate
from measure.report import INK, SERIES
from plumbing.stage import generator, read_summary
from ppo import PPOFlags, draw_cvs

QUESTION = "What else could be done with the same decisions?"
PREDICTION = (
    "At the same number of scored samples PPO with the critic is best, RLOO next, GRPO close to "
    "RLOO; SFT on the best of 8 gets about half of the gain, and at the same seconds two thirds. "
    "DPO, which needs no samples, gains some, and less than RLOO: recruiters' decisions are noisy, "
    "and it sees each CV's few. Best of 16 costs no training and comes near PPO, at 16 times the "
    "cost of a JD. GRPO copies more from the CV than RLOO does, and in all the training reward "
    "gains more than the judge.")
SAW = (
    "For one sample at temperature 1, PPO with the critic is best of those that train: its true "
    "match is {PPO[true_match]}, with RLOO {RLOO[true_match]}, with GRPO {GRPO[true_match]}. "
    "RLOO comes next, as predicted, and gains little in 36 iterations. GRPO stays further "
    "behind, and loses format ({GRPO[format_rate]}). SFT on the best of 8, with as many samples "
    "as PPO, gets a fifth to a half of PPO's gain. With twice as many, in half of PPO's seconds, "
    "it gets a fifth to three quarters, and in two seeds its greedy JDs get worse. With five "
    "times as many, in at least a third more seconds than PPO, it is ruined: the judge is higher "
    "than PPO's, the KL is {SFT on the best of 8, five times as many[kl]}, the truth is {SFT on "
    "the best of 8, five times as many[true_match]}, and about half of the JDs or more no longer "
    "parse. (It pays no price for the KL.) No arm takes exactly PPO's seconds. DPO does as well "
    "as SFT on the best of 8 or better, at a KL of {DPO[kl]}, and needs neither a sample nor "
    "stage 2. For samples RLOO is above it, as predicted.\n\n"
    "For greedy JDs the order is another: DPO {DPO[greedy]}, RLOO {RLOO[greedy]}, GRPO "
    "{GRPO[greedy]}, where SFT has {SFT[greedy]}. RLOO and GRPO are not above SFT in every seed: "
    "much of what they gain is sharpening. A sample of PPO is worth less than SFT's greedy JD, "
    "too. The best of 16 samples is above one of PPO in two seeds and trains nothing, but each "
    "JD costs sixteen; PPO's greedy JD is above it in every seed.\n\n"
    "GRPO does not copy more than RLOO ({GRPO[copy_rate]} and {RLOO[copy_rate]}). In most arms "
    "the training reward gains more than the judge, as claimed, but not in all.")
TABLE = WORTH | {"copy_rate": "copied trigrams", "scored": "samples scored"}
N = 8                   # samples for each CV, of which the best is learned
SAMPLES = {"--quick": 29 * 128, "--smoke": 32}          # what PPO of the quick run scores
NOTE = ("Samples and seconds of \"best of\" are those of writing for 200 CVs: it trains nothing. "
        "RLOO and GRPO write no rollout for the critic. Seconds leave out stages 1 and 2. β and "
        "the rates were chosen for PPO and for DPO only.")
RATE = 5e-4


def with_ppo(place, how, *flags):
    found = train_ppo(place, "--advantages", how, *flags)
    asked = read_summary(place.run / "ppo")["asked"]
    rollouts = asked["iterations"] + (how == "gae")         # one more for the critic
    return found | {"scored": asked["episodes"] * rollouts}


def before(place):
    return worth(place, load_models(place).sft) | {"scored": 0, "seconds": 0.0}


@torch.no_grad()
def best_samples(models, generator, cvs, n, seed, name):
    """The best of n samples for each CV, by the reward model."""
    samples = evaluate.write_samples(generator, models.codec, cvs, n, seed, name, CPU)  # [n][CVs]
    scores = evaluate.score_each(models.scorers["reward"], models.codec, cvs, samples)  # [n, CVs]
    return [samples[k][i] for i, k in enumerate(scores.argmax(0))]


def best_of(place, n):
    """No training: the best of n samples, for each CV."""
    models, cvs, start = load_models(place), valid_cvs(place), time.time()
    best = best_samples(models, models.sft, cvs, n, place.seed, "evaluate best")
    took = time.time() - start
    return worth_of(place, models, cvs, best) | {"scored": n * len(cvs), "seconds": took}


def learn_best(place, rounds):
    """Rejection sampling: in each round the policy writes N JDs for each of some CVs, and learns
    the best by the reward model, as in SFT (Touvron et al. 2023, arXiv 2307.09288, section 3.2.3).
    Four rounds score as many samples as PPO does."""
    models, cvs, start = load_models(place), training_cvs(place), time.time()
    codec, policy = models.codec, models.sft
    optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5)
    flags = PPOFlags(episodes=SAMPLES[place.size] // 4 // N)
    for i in range(rounds):
        rng = generator(place.seed, "best", i)
        chosen = draw_cvs(cvs, flags, rng)
        best = best_samples(models, policy, chosen, N, place.seed, f"evaluate {i}")
        pairs = [sft.Example(codec.prompt(cv), jd) for cv, jd in zip(chosen, best)]
        optimizer.param_groups[0]["lr"] = RATE * (1 - i / rounds)       # falls to 0, as PPO's
        for part in torch.randperm(len(pairs), generator=rng).split(16):
            loss, tokens, _ = sft.sft_loss(policy, None, [pairs[k] for k in part.tolist()], CPU)
            (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    took = time.time() - start
    return worth(place, policy) | {"scored": rounds * flags.episodes * N, "seconds": took}


def with_dpo(place):
    take(place.models, place.run, "sft")
    stage(place, "dpo")
    return worth(place, "dpo") | {"scored": 0}


ARMS = {
    "SFT": before,
    "best of 4": lambda place: best_of(place, 4),
    "best of 16": lambda place: best_of(place, 16),
    "SFT on the best of 8": lambda place: learn_best(place, 4),
    "SFT on the best of 8, twice as many": lambda place: learn_best(place, 8),
    "SFT on the best of 8, five times as many": lambda place: learn_best(place, 20),
    "DPO": with_dpo,
    "RLOO": lambda place: with_ppo(place, "rloo"),
    "RLOO, 36 iterations": lambda place: with_ppo(place, "rloo", "--iterations", 36),
    "GRPO": lambda place: with_ppo(place, "grpo"),
    "PPO": lambda place: with_ppo(place, "gae"),
}
SMOKE = ("SFT", "best of 4", "SFT on the best of 8", "DPO", "RLOO")


def draw(found, ax):
    """The frontier: truth over KL, a point for each seed; ways of one kind in one colour."""
    arms = [arm for arm in ARMS if any("kl" in row for row in found if row["arm"] == arm)]
    kinds = list(dict.fromkeys(arm.split(",")[0] for arm in arms))
    for arm, mark in zip(arms, "osD^vPX*<"):
        mine = [row for row in found if row["arm"] == arm]
        ax.plot([row["kl"] for row in mine], [row["true_match"] for row in mine], mark,
                color=[INK, *SERIES][kinds.index(arm.split(",")[0])], ms=5, label=arm)
    ax.set_xscale("symlog", linthresh=2)            # SFT's KL is 0
    ax.set_xticks([0, 1, 2, 5, 10, 20, 50], [0, 1, 2, 5, 10, 20, 50])
    ax.set_xlabel("KL, nats per text")
    ax.set_ylabel("true match of a sample")
    ax.figure.legend(loc="outside right upper", fontsize=7)
