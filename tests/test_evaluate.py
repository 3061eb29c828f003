"""The measures of evaluate.py, against sums by hand."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from data import Record
from model import LanguageModel


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = evaluate.bootstrap_ci95(values, seed=1)
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.03)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.03)
    assert evaluate.bootstrap_ci95(values, seed=1) == [low, high]


def test_bootstrap_interval_of_a_constant_has_no_width():
    assert evaluate.bootstrap_ci95([0.5] * 10, seed=0) == [0.5, 0.5]


def test_distinct_2_by_hand():
    # a b, b c | a b, b d: three different of four bigrams
    assert evaluate.distinct_2(["a b c", "a b d"]) == 3 / 4
    assert evaluate.distinct_2(["one", ""]) == 0


def test_copy_rate_by_hand():
    # Trigrams of the first JD: "b c d" is in its CV, "c d x" is not. The second JD has one, which is in the first CV only.
    assert evaluate.copy_rate(["a b c d", "p q r"], ["b c d x", "a b c"]) == 1 / 3


def test_kl_per_text_is_zero_for_the_same_model_and_the_sum_over_tokens_for_another(reward_model, codec):
    torch.manual_seed(1)
    policy, reference = LanguageModel(reward_model.config), LanguageModel(reward_model.config)
    cvs, responses = ["nurse", "driver cook"], [[5, 6, codec.eos], [7, codec.eos]]
    cpu = torch.device("cpu")
    assert evaluate.kl_per_text(policy, policy, codec, cvs, responses, cpu) == pytest.approx(0, abs=1e-6)
    total = 0.0
    with torch.no_grad():
        for cv, response in zip(cvs, responses):
            prompt = codec.prompt(cv)
            for t, token in enumerate(response):
                row = torch.tensor([prompt + response[:t]])
                logp, ref = (lm(row)[0, -1].log_softmax(-1)[token] for lm in (policy, reference))
                total += float(logp - ref)
    assert evaluate.kl_per_text(policy, reference, codec, cvs, responses, cpu) == pytest.approx(total / 2, abs=1e-4)


def test_sample_accuracy_counts_the_pairs_that_differ_in_truth():
    codec = SimpleNamespace(text=lambda ids: str(ids[0]))
    market = SimpleNamespace(true_match=lambda cv, jd: float(jd))
    samples = [[[1], [2]], [[5], [3]], [[4], [4]], [[7], [9]]]      # the third pair is a tie: not counted
    scores = np.array([[0.1, 0.2], [0.1, 0.2], [0.3, 0.1], [0.5, 0.9]])
    assert evaluate.sample_accuracy(scores, list("abcd"), samples, codec, market) == 2 / 3


def test_data_figures_without_a_market_are_null():
    figures = evaluate.data_figures([], [Record("a", "b", True)], ["a"], None, 0)
    assert set(figures.values()) == {None} and "bayes_pair_accuracy" in figures


def test_time_of_stages_side_by_side_counts_once():
    def stage(start, seconds):
        return {"started": start, "seconds": seconds}
    assert evaluate.covered([stage(100, 5), stage(200, 7)]) == 12                       # a night between them is no work
    assert evaluate.covered([stage(107, 10), stage(100, 5), stage(110, 2), stage(113, 6)]) == 17    # one inside another
    assert evaluate.covered([stage(100, 5), stage(103, 5), stage(108, 1)]) == 9         # overlapping, and touching
