"""Over-optimisation: PPO against a weak reward model, at several prices of the KL."""
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn

import market
import ppo
from learn.labs.lab import (CPU, WORTH, changed, linked_data, load_models, stage, take, train_ppo,
                            worth)
from measure.report import SERIES, look_again
from measure.trace import Replay

QUESTION = "How far can PPO go before the reward stops meaning anything?"
PREDICTION = (
    "With a weak reward model (150 steps, no hard negatives) and no price of the KL the reward "
    "rises to the end, while the true match peaks within 10 nats and then falls below that of the "
    "SFT model. A price of 0.1 or more keeps the truth near its peak. The full reward model is "
    "not fooled at any of these prices. The mean of two weak models helps a little, their minimum "
    "more. The judge turns later than the truth, since it shares the reward model's blind spots.")
SAW = (
    "Without a price of the KL the weak model's reward rises, and the truth peaks at a KL of "
    "{weak, β 0[peak_kl]}, hardly above SFT, and then falls to {weak, β 0[end]}: "
    "as predicted, but earlier. With β 0.05 or more the truth ends near its peak. Wrong about the "
    "full reward model: without a price it is fooled, too. Its score is then the highest of all "
    "({full, β 0[reward]}), and the true match {full, β 0[true_match]}, half of SFT's. The mean "
    "of two weak models ends at {mean of two weak, β 0[end]}, their minimum at "
    "{minimum of two weak, β 0[end]}: no clear help in three seeds. And the judge does not see it "
    "in time, or at all: it gives the fooled policy {full, β 0[judge]}, more than the good one "
    "({full, β 0.05[judge]}). It learned from other people's decisions, but starts from the same "
    "weights; perhaps it has the same blind spots. What does tell, without a truth, is the KL, and "
    "a look at the texts: half of them no longer parse.")
WEAK, FULL = (0, 0.02, 0.05, 0.1, 0.2), (0, 0.05, 0.2)
TABLE = {name: WORTH[name] for name in ("true_match", "greedy", "reward", "judge", "kl",
                                        "format_rate")}
TABLE |= {"last_reward": "its own reward", "peak": "in training: best truth", "peak_kl": "at KL",
          "end": "truth at the end"}
AXES = 3
STEPS = {"--quick": 150, "--smoke": 4}


def prepare(place):
    """Two weak reward models. Their data have no hard negatives."""
    data = linked_data(place.models / "data", place.shared / "data", "train.jsonl")
    for k in range(2):
        run = place.shared / f"weak{k}"
        take(place.models, run, "sft")
        stage(place, "reward", "--steps", STEPS[place.size], data=data, run=run,
              seed=place.seed + 100 * (k + 1))


def measured(place, beta, reward=None):
    """PPO at this price; with the judge's view of eight of its iterations."""
    take(place.models, place.run, "judge")
    found = train_ppo(place, "--kl-coef", beta, "--keep", 8, reward=reward)
    replay = Replay(place.run, place.models / "data", CPU, market.true_match)
    judged, _ = look_again(place.run, replay, with_judge=True)
    truth = np.convolve(found["curve"]["true_match"], np.ones(3) / 3, mode="valid")
    at = int(truth.argmax()) + 1 if len(truth) > 1 else 0
    return found | {"judged": judged, "peak": float(truth.max()), "end": float(truth[-1]),
                    "peak_kl": found["curve"]["kl"][at]}


def before(place):
    return worth(place, load_models(place).sft)


class Ensemble(nn.Module):
    """Several reward models as one: their states side by side, the mean or the minimum of their
    scores (Coste et al. 2023, arXiv 2310.02743)."""

    def __init__(self, models, combine):
        super().__init__()
        self.models, self.combine = nn.ModuleList(models), combine
        self.sizes = [m.config.hidden_size for m in models]
        self.config = replace(models[0].config, hidden_size=sum(self.sizes))

    def model(self, ids):
        return torch.cat([m.model(ids) for m in self.models], -1)       # [B, T, sum of sizes]

    def head(self, states):
        parts = states.split(self.sizes, -1)
        scores = torch.stack([m.head(x) for m, x in zip(self.models, parts)])   # [models, ...]
        return scores.amin(0) if self.combine == "minimum" else scores.mean(0)


def with_ensemble(place, combine, beta):
    original = ppo.load

    def load(folder, data, device):
        policy, first, *rest = original(folder, data, device)
        _, second, *_ = original(place.shared / "weak1", data, device)
        return policy, Ensemble([first, second], combine), *rest
    with changed(ppo, load=load):
        return measured(place, beta, place.shared / "weak0")


def arms():
    found = {"SFT": before}
    for beta in WEAK:
        found[f"weak, β {beta:g}"] = (
            lambda place, beta=beta: measured(place, beta, place.shared / "weak0"))
    found["another weak one, β 0"] = (
        lambda place: measured(place, 0, place.shared / "weak1"))
    for beta in FULL:
        found[f"full, β {beta:g}"] = lambda place, beta=beta: measured(place, beta)
    for combine in ("mean", "minimum"):
        found[f"{combine} of two weak, β 0"] = (
            lambda place, combine=combine: with_ensemble(place, combine, 0))
    return found


ARMS = arms()
SMOKE = ("weak, β 0", "full, β 0", "minimum of two weak, β 0")


def draw(found, axes):
    """Truth over KL, reward over KL, judge over KL; seed 0."""
    shown = {"weak, β 0": SERIES[1], "weak, β 0.05": SERIES[3], "weak, β 0.2": SERIES[4],
             "full, β 0": SERIES[0], "full, β 0.05": SERIES[2],
             "minimum of two weak, β 0": SERIES[5]}
    for row in found:
        if row["seed"] == 0 and row["arm"] in shown:
            kl, colour = row["curve"]["kl"], shown[row["arm"]]
            axes[0].plot(kl, row["curve"]["true_match"], color=colour, lw=1.2, label=row["arm"])
            axes[1].plot(kl, row["curve"]["reward"], color=colour, lw=1.2)
            axes[2].plot([kl[i - 1] for i, _ in row["judged"]], [j for _, j in row["judged"]], "o-",
                         color=colour, lw=1.2, ms=3)
    for ax, name in zip(axes, ("true match", "reward that PPO saw", "judge")):
        ax.set_xlabel("KL, nats per text")
        ax.set_ylabel(name)
    axes[0].figure.legend(loc="outside upper center", ncols=3)
