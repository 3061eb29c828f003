"""Tiny models and a codec of fourteen words, small enough that a whole PPO training takes a second;
and a whole tiny run."""
import copy
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import girl
from data import Codec, train_tokenizer
from plumbing.tokenizer import EOS, PAD
from model import Config, LanguageModel, RewardModel
from plumbing.stage import Stage
from ppo import Critic

torch.set_num_threads(1)        # models this small are done sooner by one thread
# What is bit for bit the same on a CPU need not be so elsewhere. To try it, set GIRL_DEVICE.
os.environ.setdefault("GIRL_DEVICE", "cpu")

WORDS = [PAD, EOS, "CV", ":", "JD", "nurse", "driver", "cook", "night", "day", "wanted", "now",
         "full", "part"]
CVS = ["nurse", "driver", "cook", "nurse night", "driver day", "cook full night",
       "nurse part day now", "driver full",
       "cook part night", "nurse full day", "driver part now night", "cook day"]


@pytest.fixture
def codec():
    """One word is one token: the ids of a text can be read off WORDS. At most 4 tokens of CV and 8
    of JD."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="")
    return Codec(tokenizer, max_cv=4, max_jd=8)


def tiny():
    """A codec of 300 byte-level tokens and a small language model."""
    torch.manual_seed(0)
    codec = Codec(train_tokenizer(["a cook with knife skills", "a job for a cook"], 300), 32, 32)
    return codec, LanguageModel(Config(codec.tokenizer.get_vocab_size(), 32, 64, 2, 2, 2))


@pytest.fixture
def config():
    # The large initializer_range makes attention and logits far from uniform: a wrong mask or
    # position shows.
    return Config(vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)


@pytest.fixture
def policy(config):
    torch.manual_seed(0)
    return LanguageModel(config)


@pytest.fixture
def reference(policy):
    """Near the policy, but not equal: the KL is not 0."""
    torch.manual_seed(1)
    lm = copy.deepcopy(policy)
    with torch.no_grad():
        for p in lm.parameters():
            p += 0.05 * torch.randn_like(p)
    return lm


@pytest.fixture
def reward_model(config):
    torch.manual_seed(2)
    return RewardModel(config)


class NotedCritic(Critic):
    """Keeps what it said of the last rollout, and what it was fitted to."""

    def values(self, states):
        self.said = super().values(states)
        return self.said

    def fit(self, states, returns, mask):
        self.states, self.returns = states, returns
        super().fit(states, returns, mask)


@pytest.fixture
def critic(config):
    """One that says something: a fresh one says 0. Its weights are xy, but for the ridge."""
    torch.manual_seed(3)
    c = NotedCritic(config.hidden_size)
    c.xx, c.xy = torch.eye(len(c.xx)).double(), 0.3 * torch.randn(len(c.xy)).double()
    return c


@pytest.fixture
def prompts(codec):
    return [codec.prompt(cv) for cv in CVS]


@pytest.fixture
def stage():
    return FakeStage()


class FakeStage:
    """What a training loop needs of a run.Stage, kept in lists."""

    name, step, mean = "test", 0, Stage.mean

    def __init__(self):
        self.rows, self.lines = [], []

    def resume(self, modules, optimizers):
        return {}

    def checkpoint(self, step, **numbers):
        pass

    def keep(self, step, **numbers):
        pass

    def not_finite(self, step, cvs, remedy):
        raise AssertionError(f"not finite at step {step}")

    def total(self, steps):
        return steps

    def log(self, **row):
        self.rows.append(row)

    def say(self, line):
        self.lines.append(line)


# --------------------------------------------------------------------------------- a whole tiny run
TINY = {"sft": ["--epochs", "4", "--batch", "8"], "reward": ["--steps", "10", "--samples", "16"],
        "ppo": ["--iterations", "2", "--episodes", "8", "--minibatch", "4", "--accumulate", "2",
                "--kl-target", "0.5"],
        "dpo": ["--steps", "10", "--pairs", "8"]}
STAGES = {"sft": ["sft"], "reward": ["reward"], "judge": ["reward", "--judge"], "ppo": ["ppo"],
          "dpo": ["dpo"]}


def argv(name, run, data, *more):
    """The command of a stage, at the smallest size."""
    command = STAGES[name]
    return [*command, "--smoke", "--run", str(run), "--data", str(data), *TINY[command[0]], *more]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Data and a run, that nothing interrupts. To be read only."""
    folder = tmp_path_factory.mktemp("whole")
    assert girl.main(["data", "--smoke", "--people", "90", "--held-out", "20",
                      "--out", str(folder / "data")]) == 0
    for name in STAGES:
        assert girl.main(argv(name, folder / "run", folder / "data")) == 0
    return folder


@pytest.fixture(scope="session")
def evaluated(whole, tmp_path_factory):
    """A copy of this run, measured on five CVs. To be read only."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(whole / "run", run)
    command = ["evaluate", "--smoke", "--run", str(run), "--data", str(whole / "data")]
    assert girl.main([*command, "--cvs", "5"]) == 0
    return run


def refused(capsys, command, *says):
    """Exit code 2 and one line that says all of this; before it only the progress bar."""
    capsys.readouterr()
    assert girl.main(command) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("girl.py: ") and all(text in line for text in says), line
    bar = r"(sft|reward|judge|ppo|dpo|data|report|recommend\b.*|evaluate\b.*): "
    assert not any(text.strip() and not re.match(bar, text) for text in before), before
    return line
