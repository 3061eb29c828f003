"""The measures of evaluate.py, against sums by hand."""
import json
import math
import random
import re
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from measure import evaluate
import market
from data import Record
from model import LanguageModel
from plumbing.files import BadInput


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
    # The larger ones count more: the plain mean is 3.
    weights = np.where(values > 3, 5.0, 1.0) + draw.random(400)
    mean = (values * weights).sum() / weights.sum()
    # The error of a ratio, by the delta method.
    error = math.sqrt((weights ** 2 * (values - mean) ** 2).sum()) / weights.sum()
    low, high = evaluate.bootstrap_ci95(values, 1, weights)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.03)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.03)


def test_easy_pairs_are_ones_own_jd_against_the_jd_of_another(monkeypatch):
    """A model that likes other people's JDs at 0.5, one's own at 1; but at 0 for every fourth CV,
    and at 0.5 for every fifth of the others: 0.6 + 0.15 / 2 right."""
    n = 400

    def score(model, codec, pairs):
        own = [0.0 if int(cv[2:]) % 4 == 0 else 0.5 if int(cv[2:]) % 5 == 0 else 1.0
               for cv, _ in pairs]
        return np.array([mine if jd[2:] == cv[2:] else 0.5 for (cv, jd), mine in zip(pairs, own)])
    monkeypatch.setattr(evaluate, "score_texts", score)
    records = ([Record(f"cv{i}", f"jd{i}", True) for i in range(n)]
               + [Record(f"cv{i}", "rejected", False) for i in range(n)])
    easy = evaluate.easy_pairs(records, random.Random(0))
    # Of 400 draws, about one is one's own JD.
    assert len(easy) > 390 and all(jd[2:] == cv[2:] for cv, jd, _ in easy)
    assert all(other[2:] not in (cv[2:], "rejected") for cv, _, other in easy)
    assert len({other for *_, other in easy}) > 200
    few = sum((evaluate.easy_pairs(records[:3], random.Random(k)) for k in range(9)), [])
    assert 0 < len(few) < 27 and all(jd != other for _, jd, other in few)       # own ones left out
    figures = evaluate.reward_figures(SimpleNamespace(center=0.0), None, records, None, 0)
    assert figures["easy_pair_accuracy"] == pytest.approx(0.6 + 0.15 / 2, abs=0.01)
    low, high = figures["easy_pair_accuracy_ci95"]
    assert 0.61 < low < 0.65 < 0.7 < high < 0.74


def test_one_change_accuracy_is_the_share_of_worsened_jds_that_score_lower(monkeypatch):
    """By field, and on single decisions: a model that sees the years and nothing else."""
    scores = {"good": 1.0, "fewer years": 0.0, "elsewhere": 1.0}
    asked = []

    def score(model, codec, pairs):
        asked.extend(pairs)
        return np.array([scores[jd] for _, jd in pairs])
    monkeypatch.setattr(evaluate, "score_texts", score)
    worse = {"years": "fewer years", "city": "elsewhere"}

    def one_changes(draw, records, field, n):
        return [("cv", "good", worse[field])] if field in worse else []
    world = SimpleNamespace(FIELDS=(*worse, "degree"), same_occupation=lambda record: True,
                            one_changes=one_changes)
    figures = evaluate.reward_figures(SimpleNamespace(center=0.0), None,
                                      [Record("cv", "good", True)], world, 0)
    assert figures["one_change_accuracy"] == {"years": 1.0, "city": 0.0, "degree": None}
    assert set(asked) == {("cv", jd) for jd in scores}


def test_score_knows_every_row_whatever_its_order(reward_model, codec):
    """Rows that come twice, prompts of several JDs and lengths: the same as one row at a time."""
    cvs, jds = ["nurse part day now", "cook", "driver full"], [[9, 10, 1], [12], [5, 6, 7, 8, 1]]
    rows = [(codec.prompt(cv), jd) for jd in jds for cv in cvs] + [(codec.prompt("cook"), [12])]
    alone = [evaluate.reward.score_rows(reward_model, [prompt + jd])[0] for prompt, jd in rows]
    assert len(set(np.round(alone, 6))) == 9
    assert list(evaluate.score(reward_model, rows)) == pytest.approx(alone, abs=1e-5)
    each = evaluate.score_each(reward_model, codec, cvs, [[jd] * 3 for jd in jds])
    assert each.ravel().tolist() == pytest.approx(alone[:9], abs=1e-5) and each.shape == (3, 3)


def test_scores_that_are_no_numbers_are_refused(reward_model, codec):
    with torch.no_grad():
        reward_model.score.weight[0, 0] = math.nan
    with pytest.raises(BadInput, match="scores are not finite"):
        evaluate.score_texts(reward_model, codec, [("cook", "wanted now")])


def test_each_of_the_samples_holds_one_jd_for_each_cv(codec, monkeypatch):
    """Here a JD is the CV's own prompt, and the number of the call."""
    written = []

    def generate(lm, prompts, *rest, generator):
        return [written.append(1) or [*prompt, len(written)] for prompt in prompts]
    monkeypatch.setattr(evaluate, "generate", generate)
    cvs = ["nurse part day now", "cook", "driver full", "nurse", "cook day"]
    samples = evaluate.write_samples(None, codec, cvs, 3, 0, "x", torch.device("cpu"))
    prompts = [codec.prompt(cv) for cv in cvs]
    assert [[row[:-1] for row in each] for each in samples] == [prompts] * 3
    assert len({row[-1] for each in samples for row in each}) == 15


def test_distinct_2_by_hand():
    # a b, b c | a b, b d: three different of four bigrams
    assert evaluate.distinct_2(["a b c", "a b d"]) == 3 / 4
    assert evaluate.distinct_2(["one", ""]) == 0


def test_copy_rate_by_hand():
    # Trigrams of the first JD: "b c d" is in its CV, "c d x" is not. The second JD has one, which
    # is in the first CV only.
    assert evaluate.copy_rate(["a b c d", "p q r"], ["b c d x", "a b c"]) == 1 / 3


def test_kl_per_text_is_zero_for_the_same_model_and_the_sum_over_tokens_for_another(
        reward_model, codec):
    torch.manual_seed(1)
    policy, reference = LanguageModel(reward_model.config), LanguageModel(reward_model.config)
    cvs, responses = ["nurse", "driver cook"], [[5, 6, codec.eos], [7, codec.eos]]
    cpu = torch.device("cpu")
    assert (evaluate.kl_per_text(policy, policy, codec, cvs, responses, cpu)
            == pytest.approx(0, abs=1e-6))
    total = 0.0
    with torch.no_grad():
        for cv, response in zip(cvs, responses):
            prompt = codec.prompt(cv)
            for t, token in enumerate(response):
                row = torch.tensor([prompt + response[:t]])
                logp, ref = (lm(row)[0, -1].log_softmax(-1)[token] for lm in (policy, reference))
                total += float(logp - ref)
    assert (evaluate.kl_per_text(policy, reference, codec, cvs, responses, cpu)
            == pytest.approx(total / 2, abs=1e-4))


TEXT = SimpleNamespace(text=lambda ids: str(ids[0]))    # a JD says its worth, in thousandths
TRUTH = SimpleNamespace(true_match=lambda cv, jd: int(jd) / 1000)


def test_sample_accuracy_is_the_share_of_pairs_of_one_cv_that_the_score_orders_as_the_truth_does():
    """Three samples for each of four CVs. Pairs that differ by less than 0.02 do not count."""
    # 2, 0, 3 and 2 pairs
    truth = [[500, 700, 519], [100, 100, 110], [900, 300, 600], [400, 100, 410]]
    right = [[0.1, 0.3, 0.2], [0.0, 0.0, 0.0], [9.0, 3.0, 6.0], [-7.0, -9.0, -8.0]]
    wrong = [[0.3, 0.1, 0.2], [1.0, 2.0, 3.0], [3.0, 9.0, 6.0], [-9.0, -7.0, -8.0]]
    half = [[0.3, 0.1, 0.1], [1.0, 2.0, 3.0], [9.0, 3.0, 6.0], [1.0, 1.0, 1.0]]
    samples = {name: [[[row[k]] for row in truth] for k in range(3)] for name in ("sft", "ppo")}
    right, wrong, half = (np.array(scores).T for scores in (right, wrong, half))
    scores = {"sft": {"reward": right, "judge": wrong}, "ppo": {"reward": half, "judge": right}}
    found = evaluate.sample_figures(list("abcd"), samples, scores, TEXT, TRUTH, 0)
    # a: 700 over 500 is wrong, 700 over 519 a tie of scores; c: all right; d: two ties of scores.
    assert found["sample_accuracy"] == {"sft": {"reward": 1, "judge": 0},
                                        "ppo": {"reward": pytest.approx(4.5 / 7), "judge": 1}}
    low, high = found["sample_accuracy_ci95"]["ppo"]["reward"]
    assert 0.2 < low < 4.5 / 7 < high <= 1
    assert found["sample_accuracy_ci95"]["sft"]["judge"] == [0, 0]


def test_sample_accuracy_is_none_where_no_two_samples_differ_and_on_real_data():
    samples, scores = {"sft": [[[5]], [[5]]]}, {"sft": {"reward": np.array([[1.0], [2.0]])}}
    found = evaluate.sample_figures(["a"], samples, scores, TEXT, TRUTH, 0)
    none = {"sft": {"reward": None}}
    assert found == {"sample_accuracy": none, "sample_accuracy_ci95": none}
    found = evaluate.sample_figures(["a"], samples, scores, TEXT, None, 0)
    assert found == {"sample_accuracy": None, "sample_accuracy_ci95": None}


PERSON = market.Person("nurse", years=5, degree=2, city="Leeds", remote=False,
                       skills=("a", "b", "c", "d"))


def test_factors_multiply_to_the_true_match_and_are_means_over_the_jds_that_parse(monkeypatch):
    """One JD that fits, one elsewhere with half of the skills, one that does not parse."""
    fits = market.Job("nurse", 3, 2, "Leeds", ("a", "b", "c"), duty="", pay=(1, 2))
    other = market.Job("nurse", 5, 2, "York", ("a", "b", "x", "y"), duty="", pay=(1, 2))
    monkeypatch.setattr(market, "of_market", lambda cv: PERSON)
    monkeypatch.setattr(market, "parse_jd", {"fits": fits, "other": other, "rubbish": None}.get)
    found = evaluate.mean_factors(["cv"] * 3, ["fits", "other", "rubbish"], market)
    assert found == pytest.approx({"skills": (1 + 0.25) / 2, "years": (1 + 0.8) / 2, "degree": 1,
                                   "place": (1 + 0.2) / 2, "field": 1})
    for text in ("fits", "other"):
        product = math.prod(evaluate.mean_factors(["cv"], [text], market).values())
        assert 0.95 * product == pytest.approx(market.true_match("cv", text))
    assert evaluate.mean_factors(["cv"], ["rubbish"], market) == dict.fromkeys(evaluate.FACTORS)


def test_data_figures_without_a_market_are_null():
    figures = evaluate.data_figures([Record("a", "b", True)], {}, ["a"], None)
    assert set(figures.values()) == {None} and "bayes_pair_accuracy" in figures


def test_time_of_stages_side_by_side_counts_once():
    def stage(start, seconds):
        return {"started": start, "seconds": seconds}
    # A night between them is no work; one inside another; overlapping, and touching.
    assert evaluate.covered([stage(100, 5), stage(200, 7)]) == 12
    assert evaluate.covered([stage(107, 10), stage(100, 5), stage(110, 2), stage(113, 6)]) == 17
    assert evaluate.covered([stage(100, 5), stage(103, 5), stage(108, 1)]) == 9


# ----------------------------------------------------------------------- answers without generating
def test_tfidf_cosine_is_the_cosine_of_tfidf_vectors():
    draw = np.random.default_rng(0)
    queries, documents = ([draw.integers(0, 12, size=draw.integers(1, 9)).tolist()
                           for _ in range(n)] for n in (5, 30))
    df = Counter(t for row in documents for t in set(row))
    idf = [math.log(30 / max(df[t], 1)) for t in range(12)]

    def vector(row):
        return np.array([row.count(t) * idf[t] for t in range(12)])
    expected = [[vector(q) @ vector(d) / np.linalg.norm(vector(q)) / np.linalg.norm(vector(d))
                 for d in documents] for q in queries]
    assert (evaluate.tfidf_cosine(queries, documents, 12).numpy()
            == pytest.approx(np.array(expected), abs=1e-5))


def test_nearest_is_the_jd_of_the_most_similar_candidate(codec):
    pairs = [("nurse night", "wanted now"), ("cook part day", "full day"), ("driver full", "night")]
    found = evaluate.retrieved(codec, pairs, ["cook day", "driver full", "nurse"], 0)
    assert found["nearest"] == ["full day", "night", "wanted now"]
    draws = evaluate.retrieved(codec, pairs, ["nurse"] * 60, 0)["random"]
    assert set(draws) == {jd for _, jd in pairs}


# ----------------------------------------------------------------------------------- win, tie, lose
def test_win_tie_lose_by_hand():
    shares, (low, high) = evaluate.win_tie_lose([True, True, False, False],
                                                [False, False, True, False], 0)
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
    found = {"texts": ["wanted now", "full day", "full day"], "reward": np.zeros(3),
             "judge": np.zeros(3), "true": None}
    figures = evaluate.describe(["nurse"] * 3, [[10, 11, 1], [12, 9, 1], [12, 9, 1]], found, codec,
                                {"full day"}, None, 0)
    assert figures["seen_rate"] == 2 / 3 and figures["true_match"] is None


# --------------------------------------------------------------------------------- an outside judge
N = 200


def exported(tmp_path):
    """Pairs of N CVs in which the answer of `ppo` is always "good" and that of `sft` always
    "bad"."""
    judged = {"ppo": {"texts": [f"good {i}" for i in range(N)]},
              "sft": {"texts": [f"bad {i}" for i in range(N)]}}
    evaluate.export_pairs(tmp_path / "pairs.jsonl", [f"cv {i}" for i in range(N)], judged, 5)
    return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]


def answers(tmp_path, pairs, verdict):
    (tmp_path / "verdicts.jsonl").write_text("\n".join(json.dumps(
        {"id": p["id"]} | {aspect: verdict(p["prompt"], aspect) for aspect in evaluate.ASPECTS})
        for p in pairs))
    return evaluate.read_verdicts(tmp_path / "verdicts.jsonl", {"seed": 5, "cvs": N})


def test_verdicts_are_read_back_through_the_shuffled_order(tmp_path):
    """A judge that knows what is good, one that always says A, and ties."""
    pairs = exported(tmp_path)
    assert [p["id"] for p in pairs] == [f"girl_vs_sft/{i}" for i in range(N)]

    def verdict(prompt, aspect):
        good = re.search(r"([AB]):\ngood", prompt)[1]
        return {"detail": good, "relevance": "BA"["AB".index(good)], "conciseness": "tie"}[aspect]
    row = answers(tmp_path, pairs, verdict)["girl_vs_sft"]
    assert row["answers"] == N and row["detail"] == [1, 0, 0]
    assert row["relevance"] == [0, 0, 1] and row["conciseness"] == [0, 1, 0]
    win, _, lose = answers(tmp_path, pairs, lambda *_: "A")["girl_vs_sft"]["detail"]
    assert abs(win - lose) < 0.2                # who always says A favours nobody


@pytest.mark.parametrize("line, message", [
    ("{", "not JSON"), ("[]", "expected the keys"),
    ('{"id": "girl_vs_sft/0"}', "expected the keys"),
    ('{"id": "girl_vs_sft/200", "detail": "A", "relevance": "A", "conciseness": "A"}',
     "no pair 'girl_vs_sft/200'"),
    ('{"id": "girl_vs_me/0", "detail": "A", "relevance": "A", "conciseness": "A"}', "no pair"),
    ('{"id": "girl_vs_sft/0", "detail": "A", "relevance": "C", "conciseness": "A"}', "found 'C'"),
    ('{"id": "girl_vs_sft/1", "detail": "A", "relevance": "A", "conciseness": "A"}',
     "a second answer"), ("", "no answers")])
def test_bad_verdicts_are_named(tmp_path, line, message):
    good = json.dumps({"id": "girl_vs_sft/1", "detail": "A", "relevance": "B",
                       "conciseness": "tie"}) + "\n"
    (tmp_path / "v.jsonl").write_text((good if line else "") + line)
    with pytest.raises(BadInput, match=re.escape(f"v.jsonl{':2' if line else ''}: ") + ".*"
                       + re.escape(message)):
        evaluate.read_verdicts(tmp_path / "v.jsonl", {"seed": 5, "cvs": N})


# ------------------------------------------------------------------------------------ results.json
def part(name, seed=0, split="test", models="m", data="d"):
    """What evaluate or recommend found."""
    found = {"ppo": 1} if name == "evaluate" else {"recommend": {"cvs": 2}, "grounding": None}
    measured = {"models": models, "data": data, name: "how"}
    return {"seed": seed, "split": split, "measured": measured, **found}


def add(folder, whole, name, **other):
    return evaluate.add_results(folder, whole / "data", name, time.time(), part(name, **other))


def test_evaluate_and_recommend_keep_each_others_part_of_results_json(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    for order in (("evaluate", "recommend"), ("recommend", "evaluate")):
        (tmp_path / "run" / "results.json").unlink(missing_ok=True)
        for name in (*order, order[0]):                 # the last one measured anew
            add(tmp_path / "run", whole, name)
        results = evaluate.read_results(tmp_path / "run")
        assert results["ppo"] == 1 and results["recommend"] == {"cvs": 2}
        assert results["measured"] == part("evaluate")["measured"] | part("recommend")["measured"]
        assert set(results["clocks"]) == set(evaluate.MEASURES) < set(results["seconds"])


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "valid"}, {"models": "other"},
                                   {"data": "other"}])
def test_results_of_another_seed_split_or_model_are_not_mixed(whole, tmp_path, other):
    """An evaluation takes their place; a recommender, which is added to one, is refused."""
    shutil.copytree(whole / "run", tmp_path / "run")
    for name in evaluate.MEASURES:
        add(tmp_path / "run", whole, name)
    before = (tmp_path / "run" / "results.json").read_bytes()
    [what] = other
    of = "seed 0 and split test" if what in ("seed", "split") else f"other {what}"
    with pytest.raises(BadInput, match=f"results.json: is of {of}; run  python girl.py evaluate"):
        add(tmp_path / "run", whole, "recommend", **other)
    assert before == (tmp_path / "run" / "results.json").read_bytes()
    results = add(tmp_path / "run", whole, "evaluate", **other)
    assert not {"recommend", "grounding"} & set(results) and set(results["clocks"]) == {"evaluate"}
    assert "recommend" not in results["seconds"] and "recommend" not in results["measured"]


def test_no_part_is_lost_where_both_are_written_at_the_same_moment(whole, tmp_path, monkeypatch):
    """Whoever has read results.json writes it before the other one reads it."""
    shutil.copytree(whole / "run", tmp_path / "run")
    monkeypatch.setattr(evaluate, "time_and_memory", lambda *args: time.sleep(0.05) or {})
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: add(tmp_path / "run", whole, name), evaluate.MEASURES))
    noted = evaluate.read_results(tmp_path / "run")["measured"]
    assert set(noted) == {"models", "data", *evaluate.MEASURES}


def test_results_of_an_earlier_version_are_added_to(whole, tmp_path):
    """It noted neither the data nor when it measured; the accuracy on samples was one number."""
    shutil.copytree(whole / "run", tmp_path / "run")
    old = {"seed": 0, "split": "test", "measured": {"models": "m", "evaluate": "how"}, "ppo": 1,
           "reward": {"sample_accuracy": 0.9}, "peak_rss_mb": 900,
           "seconds": {"sft": 1.0, "evaluate": 70.0, "total": 71.0}}
    evaluate.write_results(tmp_path / "run", old)
    results = add(tmp_path / "run", whole, "recommend")
    assert results["ppo"] == 1 and results["reward"] == old["reward"] and "grounding" in results
    assert results["seconds"]["evaluate"] == 70 and results["seconds"]["total"] > 70


def test_seconds_and_memory_of_what_ran_side_by_side(whole):
    """Time in which both were at work counts once, and their memory adds up."""
    def figures(start, before):
        clocks = {"evaluate": {"started": 1000.0, "seconds": 60, "peak_rss_mb": 10 ** 6},
                  "recommend": {"started": start, "seconds": 100, "peak_rss_mb": 2 * 10 ** 6}}
        return evaluate.time_and_memory(whole / "run", whole / "data", clocks, before)
    one, after = figures(1000.0, {}), figures(1060.0, {"recommend": 7.0})
    assert one["peak_rss_mb"] == 3 * 10 ** 6
    assert one["seconds"]["evaluate"] == 60 and one["seconds"]["recommend"] == 100
    assert after["seconds"]["total"] == pytest.approx(one["seconds"]["total"] + 60, abs=0.11)
