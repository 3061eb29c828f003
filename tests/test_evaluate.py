"""The measures of evaluate.py, against sums by hand."""
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from data import Record
from model import LanguageModel
from run import BadInput


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = evaluate.bootstrap_ci95(values, seed=1)
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.03)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.03)
    assert evaluate.bootstrap_ci95(values, seed=1) == [low, high]


def test_bootstrap_interval_of_a_constant_has_no_width():
    assert evaluate.bootstrap_ci95([0.5] * 10, seed=0) == [0.5, 0.5]


def test_bootstrap_interval_of_a_weighted_mean_agrees_with_the_normal_approximation():
    draw = np.random.default_rng(0)
    values = draw.normal(3.0, 2.0, size=400)
    weights = np.where(values > 3, 5.0, 1.0) + draw.random(400)     # the larger ones count more: the plain mean is 3
    mean = (values * weights).sum() / weights.sum()
    error = math.sqrt((weights ** 2 * (values - mean) ** 2).sum()) / weights.sum()      # of a ratio, by the delta method
    low, high = evaluate.bootstrap_ci95(values, 1, weights)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.03) and high == pytest.approx(mean + 1.96 * error, abs=0.03)


def test_easy_pairs_are_ones_own_jd_against_the_jd_of_another(monkeypatch):
    """A model that likes other people's JDs at 0.5, one's own at 1; but at 0 for every fourth CV, and at 0.5 for every fifth
    of the others: 0.6 + 0.15 / 2 right."""
    n, asked = 400, []

    def score(model, codec, pairs):
        asked.append(pairs)
        own = [0.0 if int(cv[2:]) % 4 == 0 else 0.5 if int(cv[2:]) % 5 == 0 else 1.0 for cv, _ in pairs]
        return np.array([mine if jd[2:] == cv[2:] else 0.5 for (cv, jd), mine in zip(pairs, own)])
    monkeypatch.setattr(evaluate.reward, "score_texts", score)
    records = [Record(f"cv{i}", f"jd{i}", True) for i in range(n)] + [Record(f"cv{i}", "rejected", False) for i in range(n)]
    figures = evaluate.reward_figures(SimpleNamespace(center=0.0), None, records, None, 0)
    _, own, others = asked
    assert len(own) > 390 and all(jd[2:] == cv[2:] for cv, jd in own)           # of 400 draws, about one is one's own JD
    assert [cv for cv, _ in own] == [cv for cv, _ in others]
    assert all(jd[2:] not in (cv[2:], "rejected") for cv, jd in others) and len({jd for _, jd in others}) > 200
    assert figures["easy_pair_accuracy"] == pytest.approx(0.6 + 0.15 / 2, abs=0.01)
    low, high = figures["easy_pair_accuracy_ci95"]
    assert 0.61 < low < 0.65 < 0.7 < high < 0.74


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
    figures = evaluate.data_figures([Record("a", "b", True)], {}, ["a"], None)
    assert set(figures.values()) == {None} and "bayes_pair_accuracy" in figures


def test_time_of_stages_side_by_side_counts_once():
    def stage(start, seconds):
        return {"started": start, "seconds": seconds}
    assert evaluate.covered([stage(100, 5), stage(200, 7)]) == 12                       # a night between them is no work
    assert evaluate.covered([stage(107, 10), stage(100, 5), stage(110, 2), stage(113, 6)]) == 17    # one inside another
    assert evaluate.covered([stage(100, 5), stage(103, 5), stage(108, 1)]) == 9         # overlapping, and touching


# ----------------------------------------------------------------------------------------------- answers without generating
def test_alike_is_the_cosine_of_tfidf_vectors():
    draw = np.random.default_rng(0)
    queries, documents = ([draw.integers(0, 12, size=draw.integers(1, 9)).tolist() for _ in range(n)] for n in (5, 30))
    df = Counter(t for row in documents for t in set(row))
    idf = [math.log(30 / max(df[t], 1)) for t in range(12)]

    def vector(row):
        return np.array([row.count(t) * idf[t] for t in range(12)])
    expected = [[vector(q) @ vector(d) / np.linalg.norm(vector(q)) / np.linalg.norm(vector(d)) for d in documents] for q in queries]
    assert evaluate.alike(queries, documents, 12).numpy() == pytest.approx(np.array(expected), abs=1e-5)


def test_nearest_is_the_jd_of_the_most_similar_candidate(codec):
    pairs = [("nurse night", "wanted now"), ("cook part day", "full day"), ("driver full", "night")]
    found = evaluate.retrieved(codec, pairs, ["cook day", "driver full", "nurse"], 0)
    assert found["nearest"] == ["full day", "night", "wanted now"]
    draws = evaluate.retrieved(codec, pairs, ["nurse"] * 60, 0)["random"]
    assert set(draws) == {jd for _, jd in pairs}


# ------------------------------------------------------------------------------------------------------- win, tie, lose
def test_win_tie_lose_by_hand():
    shares, (low, high) = evaluate.win_tie_lose([True, True, False, False], [False, False, True, False], 0)
    assert shares == [0.5, 0.25, 0.25] and low < 0.25 < high
    assert evaluate.win_tie_lose([True] * 9, [False] * 9, 0) == ([1.0, 0.0, 0.0], [1.0, 1.0])
    assert evaluate.win_tie_lose([False] * 9, [True] * 9, 0) == ([0.0, 0.0, 1.0], [-1.0, -1.0])


def test_small_differences_are_ties():
    a = {"true": np.array([0.5, 0.5, 0.5, 0.5]), "judge": np.array([0.0, 0.0, 0.0, 0.0])}
    b = {"true": np.array([0.481, 0.519, 0.4, 0.6]), "judge": np.array([0.09, -0.09, 0.11, -0.5])}
    found = evaluate.compare(a, b, 0)
    assert found["true"] == [0.25, 0.5, 0.25] and found["judge"] == [0.25, 0.5, 0.25]
    assert evaluate.compare(a | {"true": None}, b | {"true": None}, 0)["true"] is None


def test_seen_rate_counts_jds_of_the_train_split(codec):
    found = {"texts": ["wanted now", "full day", "full day"], "reward": np.zeros(3), "judge": np.zeros(3), "true": None}
    figures = evaluate.describe(["nurse"] * 3, [[10, 11, 1], [12, 9, 1], [12, 9, 1]], found, codec, {"full day"}, None, 0)
    assert figures["seen_rate"] == 2 / 3 and figures["true_match"] is None


# ---------------------------------------------------------------------------------------------------- an outside judge
N = 200


def exported(tmp_path):
    """Pairs of N CVs in which the answer of `ppo` is always "good" and that of `sft` always "bad"."""
    judged = {"ppo": {"texts": [f"good {i}" for i in range(N)]}, "sft": {"texts": [f"bad {i}" for i in range(N)]}}
    evaluate.export_pairs(tmp_path / "pairs.jsonl", [f"cv {i}" for i in range(N)], judged, 5)
    return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]


def answers(tmp_path, pairs, verdict):
    (tmp_path / "verdicts.jsonl").write_text("\n".join(json.dumps(
        {"id": p["id"]} | {aspect: verdict(p["prompt"], aspect) for aspect in evaluate.ASPECTS}) for p in pairs))
    return evaluate.read_verdicts(tmp_path / "verdicts.jsonl", {"seed": 5, "cvs": N})


def test_verdicts_are_read_back_through_the_shuffled_order(tmp_path):
    """A judge that knows what is good, one that always says A, and ties."""
    pairs = exported(tmp_path)
    assert [p["id"] for p in pairs] == [f"girl_vs_sft/{i}" for i in range(N)]

    def verdict(prompt, aspect):
        good = re.search(r"([AB]):\ngood", prompt)[1]
        return {"detail": good, "relevance": "BA"["AB".index(good)], "conciseness": "tie"}[aspect]
    row = answers(tmp_path, pairs, verdict)["girl_vs_sft"]
    assert row["answers"] == N and row["detail"] == [1, 0, 0] and row["relevance"] == [0, 0, 1] and row["conciseness"] == [0, 1, 0]
    win, _, lose = answers(tmp_path, pairs, lambda *_: "A")["girl_vs_sft"]["detail"]
    assert abs(win - lose) < 0.2                # who always says A favours nobody


@pytest.mark.parametrize("line, message", [
    ("{", "not JSON"), ("[]", "expected the keys"), ('{"id": "girl_vs_sft/0"}', "expected the keys"),
    ('{"id": "girl_vs_sft/200", "detail": "A", "relevance": "A", "conciseness": "A"}', "no pair 'girl_vs_sft/200'"),
    ('{"id": "girl_vs_me/0", "detail": "A", "relevance": "A", "conciseness": "A"}', "no pair"),
    ('{"id": "girl_vs_sft/0", "detail": "A", "relevance": "C", "conciseness": "A"}', "found 'C'"),
    ('{"id": "girl_vs_sft/1", "detail": "A", "relevance": "A", "conciseness": "A"}', "a second answer"), ("", "no answers")])
def test_bad_verdicts_are_named(tmp_path, line, message):
    good = json.dumps({"id": "girl_vs_sft/1", "detail": "A", "relevance": "B", "conciseness": "tie"}) + "\n"
    (tmp_path / "v.jsonl").write_text((good if line else "") + line)
    with pytest.raises(BadInput, match=re.escape(f"v.jsonl{':2' if line else ''}: ") + ".*" + re.escape(message)):
        evaluate.read_verdicts(tmp_path / "v.jsonl", {"seed": 5, "cvs": N})
