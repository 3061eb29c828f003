"""The recommender and grounding: metrics by hand, sides without leaks, and constructed cases whose
answer is known."""
import copy
import math
import random
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import market
from measure import recommend
import reward
from data import Record, read_records
from model import Transformer
from plumbing.files import BadInput

CPU = torch.device("cpu")


def test_encode_is_the_mean_of_a_rows_own_states(config):
    torch.manual_seed(0)
    body = Transformer(config)
    rows = [[5, 6, 7], [8], [9, 10, 11, 5, 6], [7, 7]]
    found = recommend.encode(body, rows, CPU, batch_size=3)
    with torch.no_grad():
        everything = copy.deepcopy(body)
        body.layers = body.layers[:1]       # the first block says which words there are
        expected = torch.stack([body(torch.tensor([row]))[0].mean(0) for row in rows])
    assert len(everything.layers) > 1
    assert torch.equal(found, recommend.encode(everything, rows, CPU, batch_size=3))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_vectors_are_whitened_and_of_one_length():
    torch.manual_seed(0)
    states = torch.randn(5000, 6) @ torch.randn(6, 6) + torch.randn(6)
    white = (states - states.mean(0)) @ recommend.whitening(states)
    covariance = white.T @ white / len(white)
    torch.testing.assert_close(covariance - covariance.diag().diag(), torch.zeros(6, 6), atol=1e-3,
                               rtol=0)
    # The largest direction: 1 / 1.05 squared.
    assert covariance.diag().max() < 1 and covariance.diag().max() > 0.9
    encoder = recommend.Encoder(torch.zeros(6), states.mean(0), recommend.whitening(states))
    found = encoder.of_jd(states)
    torch.testing.assert_close((found * found).mean(1), torch.ones(5000))
    torch.testing.assert_close((found[:9] * found[9:18]).mean(1),
                               torch.cosine_similarity(white[:9], white[9:18]))
    torch.testing.assert_close(encoder.of_cv(states - states.mean(0)), found)


# ---------------------------------------------------------------------------------- the recommender
def test_the_two_predictors_are_their_formulas():
    torch.manual_seed(0)
    c, j = torch.randn(2, 4, 6).unbind(0)
    dot, mlp = (recommend.Recommender(kind, 6, recommend.RecommendFlags(hidden=5)).eval()
                for kind in ("dot", "mlp"))
    # Before any label: cosines.
    torch.testing.assert_close(dot(c, j), math.e * (c * j).mean(1) + dot.bias)
    for p in (*dot.parameters(), *mlp.parameters()):
        torch.nn.init.normal_(p)
    scale = float(dot.log_scale.detach().exp())
    expected = scale * ((c + dot.seeker(c)) * (j + dot.job(j))).sum(1) / 6 + dot.bias
    torch.testing.assert_close(dot(c, j), expected)
    torch.testing.assert_close(mlp(c, j), mlp.both(torch.cat((c, j), 1))[:, 0] + mlp.bias)


def test_training_stops_where_the_labels_kept_apart_say_so(monkeypatch):
    """Labels of pure chance: the longer it trains the worse it does on the labels kept apart, so
    the first weights stay."""
    torch.manual_seed(0)
    x, labels = torch.randn(60, 8), torch.tensor([0.0, 1.0, 0.0] * 20)
    flags = recommend.RecommendFlags(steps=400, lr=1e-2, dropout=0.0, prior=0.0)
    c, j = x, torch.randn(60, 8)
    looks = []
    predict = recommend.predict
    monkeypatch.setattr(recommend, "predict", lambda *a: looks.append(predict(*a)) or looks[-1])
    model, kept = recommend.fit(recommend.Recommender("mlp", 8, flags), (c, j), labels, flags,
                                torch.Generator().manual_seed(1))
    assert all(len(look) == 12 for look in looks)                               # a fifth
    assert kept.equal(torch.randperm(60, generator=torch.Generator().manual_seed(1))[:12])
    losses = [recommend.log_loss(look, labels[kept]) for look in looks]
    best = losses.index(min(losses))
    assert len(looks) == best + 11 < 41  # ten looks after the best one
    torch.testing.assert_close(predict(model, [v[kept] for v in (c, j)]), looks[best])


def test_the_fewer_the_labels_the_more_the_similarity_is_kept():
    """Weight decay is prior / labels: with few of them the towers' own part stays small, scale and
    bias are learned."""
    torch.manual_seed(0)
    c, j = torch.randn(2, 2000, 8).unbind(0)
    labels = ((c * j).mean(1) > 0.3).float()
    sizes = []
    for n in (60, 2000):
        flags = recommend.RecommendFlags(steps=100)
        model, _ = recommend.fit(recommend.Recommender("dot", 8, flags), [x[:n] for x in (c, j)],
                                 labels[:n], flags, torch.Generator().manual_seed(0))
        sizes.append(float(model.seeker[-1].weight.detach().abs().mean()))
        assert model.log_scale > 1.2 and model.bias < 0
    assert 0 < 3 * sizes[0] < sizes[1]


def test_the_reward_model_alone_is_calibrated_on_some_labels_and_ranked_by_its_own_scores():
    records = [Record(f"cv {i}", "jd 0", i % 4 == 0 or i % 5 == 0) for i in range(400)]
    encoded = recommend.Encoded({r.cv: i for i, r in enumerate(records)}, {"jd 0": 0}, {}, {}, {})
    scores = {(i, 0): 100.0 * (r.accepted - 0.5) + i % 7 for i, r in enumerate(records)}
    found = recommend.reward_alone(encoded, records[:200], records[200:], lambda pairs: scores, 1.0,
                                   0)
    assert found["reward_auc"] == 1 and found["reward_log_loss"] < 0.01
    upside_down = {pair: -score for pair, score in scores.items()}
    assert recommend.reward_alone(encoded, records[:200], records[200:], lambda pairs: upside_down,
                                  1.0, 0)["reward_auc"] == 0


def test_paired_interval_by_hand():
    # differences 1, 2, 3: mean 2, standard deviation 1, t(2) = 4.303
    mean, low, high = recommend.paired([2, 3, 4], [1, 1, 1])
    assert mean == 2 and high - 2 == 2 - low == pytest.approx(4.303 / math.sqrt(3))


def test_log_loss_by_hand():
    logits, labels = torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 0.0])
    assert (recommend.log_loss(logits, labels)
            == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2))


def constructed(n_cvs=120, n_jds=80, C=8):
    """A world in which a CV is accepted where its written JD (`girl`) points the way of the JD; c
    and `sft` are noise."""
    torch.manual_seed(0)
    girl, j = torch.randn(n_cvs, 2, C), torch.randn(n_jds, C)
    girl[:, 1] = girl[:, 0]
    written = {"girl": girl, "sft": torch.randn(n_cvs, 2, C), "shuffled": girl.roll(1, 0)}
    encoded = recommend.Encoded({f"cv {i}": i for i in range(n_cvs)},
                                {f"jd {i}": i for i in range(n_jds)},
                                dict.fromkeys(recommend.KINDS, torch.randn(n_cvs, C)),
                                dict.fromkeys(recommend.KINDS, j), written)
    draw = random.Random(0)
    records = [Record(f"cv {q}", f"jd {d}", bool(girl[q, 0] @ j[d] > 0))
               for q, d in ((draw.randrange(n_cvs), draw.randrange(n_jds)) for _ in range(3000))]
    return (encoded, [r for r in records if int(r.cv[3:]) < 90],
            [r for r in records if int(r.cv[3:]) >= 90])


def test_a_jd_is_compared_with_the_mean_of_the_first_k_written_jds_or_with_nothing():
    written, c, j = torch.randn(2, 4, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    encoded = recommend.Encoded({"a": 0, "b": 1}, {"x": 0, "y": 1}, dict(zip(recommend.KINDS, c)),
                                dict(zip(recommend.KINDS, j)), {"girl": written})
    records = [Record("b", "x", True), Record("a", "y", False)]
    expected = [written[1, :3].mean(0) @ j[0, 0] / 3, written[0, :3].mean(0) @ j[0, 1] / 3]
    torch.testing.assert_close(recommend.similarity(encoded, records, "girl", 3),
                               torch.stack(expected))
    assert recommend.similarity(encoded, records, "none", 3).equal(torch.zeros(2))
    for kind, its_c, its_j in zip(recommend.KINDS, c, j):
        found = recommend.features(encoded, records, kind)
        assert found[0].equal(its_c[[1, 0]]) and found[1].equal(its_j)


def decisions(n, gates):
    """Scores of n decisions: of what a recommender says, and of similarities; and labels that
    depend on their sum, each times its gate."""
    scores = torch.randn(n, len(gates), generator=torch.Generator().manual_seed(n))
    draw = torch.rand(n, generator=torch.Generator().manual_seed(n + 1))
    return scores, (draw < (scores @ torch.tensor(gates) - 1).sigmoid()).float()


def test_logistic_regression_finds_its_minimum_and_is_held_by_few_labels():
    scores, labels = decisions(400, (1.5, -0.5))
    start, hold = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.1, 3.0, 30.0])
    found = recommend.logistic(scores, labels, start.tolist(), hold.tolist())
    x = torch.cat((torch.ones(400, 1), scores), 1)
    slope = x.T @ ((x @ found).sigmoid() - labels) + hold * (found - start)      # of the objective
    assert slope.abs().max() < 1e-2
    torch.testing.assert_close(recommend.logistic(*decisions(20000, (1.5, -0.5)), (0, 0, 0),
                                                  (0.1, 3, 3)),
                               torch.tensor([-1.0, 1.5, -0.5]), atol=0.1, rtol=0)
    # One label, and labels that a score tells apart: all numbers stay finite.
    for y in (labels[:1], (scores[:1, 0] > 0).float()):
        assert recommend.logistic(scores[:1] * 1000, y, (0, 1, 0), (0.1, 3, 3)).isfinite().all()


KEPT = torch.arange(0, 4000, 5)             # of 4,000 labels a fifth is kept apart


def test_the_gate_is_learned_from_labels_kept_apart():
    """A recommender that knows by heart the labels that it learned from, and nothing else, is not
    believed."""
    scores, labels = decisions(4000, (0.0, 2.0))
    by_heart = torch.where(torch.isin(torch.arange(4000), KEPT), 3 * scores[:, 0],
                           6 * (labels - 0.5))
    b, a, g = recommend.fit_gate(by_heart, scores[:, 1], labels, KEPT)
    assert abs(a) < 0.1 and abs(g - 2) < 0.3


def test_the_gate_follows_what_the_written_jd_is_worth():
    for worth in (0.0, 2.0):
        scores, labels = decisions(4000, (1.0, worth))
        b, a, g = recommend.fit_gate(scores[:, 0], scores[:, 1], labels, KEPT)
        assert abs(b + 1) < 0.3 and abs(a - 1) < 0.3 and abs(g - worth) < 0.3


def test_the_gate_of_few_labels_kept_apart_is_near_what_all_labels_say():
    scores, labels = decisions(200, (0.0, 2.0))
    rejected = torch.arange(200)[labels == 0][:10]  # they alone say nothing good
    assert recommend.fit_gate(scores[:, 0], scores[:, 1], labels, rejected)[2] > 0.7


def test_features_that_carry_the_label_help_and_noise_does_not(stage):
    encoded, learn, test = constructed()
    flags = recommend.RecommendFlags(seeds=2, steps=150, lr=5e-3, prior=100)
    rows = recommend.train_and_test(encoded, learn, test, [("none", 1), ("girl", 1), ("girl", 2),
                                                           ("sft", 1), ("shuffled", 1)],
                                    (1.0,), flags, 0, stage)
    auc = {(r["kind"], r["mode"], r["k"]): r["auc"][0] for r in rows}
    for kind in recommend.KINDS:
        assert auc[kind, "girl", 1] > 0.85
        assert all(abs(auc[kind, mode, 1] - 0.5) < 0.08 for mode in ("none", "sft", "shuffled"))
        # Both written JDs are equal here: two are worth as much as one, and the comparison is with
        # their own controls.
        row = next(r for r in rows if (r["kind"], r["mode"], r["k"]) == (kind, "girl", 1))
        assert row["auc_over_none"][1] > 0.2
        assert row["auc_over_shuffled"][1] > 0.2 and row["auc"][1] < 0.1
        assert auc[kind, "girl", 2] == auc[kind, "girl", 1]
    # Before any label only the written JDs that carry it rank the decisions.
    found = recommend.untrained(encoded, test, [("none", 1), ("girl", 1), ("shuffled", 1)])
    assert found["girl k=1"] > 0.8
    assert abs(found["none k=1"] - 0.5) < 0.08 and abs(found["shuffled k=1"] - 0.5) < 0.08


def test_few_labels_are_few(stage):
    """The share of the labels is what the recommender sees: 1% of them do not teach the constructed
    case to an `mlp`."""
    encoded, learn, test = constructed()
    told = encoded.c["dot"] - encoded.written["girl"][:, 0]  # by the CV, but not by its similarity
    encoded = encoded._replace(c=dict.fromkeys(recommend.KINDS, told))
    rows = recommend.train_and_test(encoded, learn, test, [("none", 1)], (0.01, 1.0),
                                    recommend.RecommendFlags(seeds=2, steps=150, lr=5e-3,
                                                             prior=100), 0, stage)
    labels = {r["share"]: r["labels"] for r in rows}
    assert labels == {0.01: round(0.01 * len(learn)), 1.0: len(learn)}
    auc = {(r["kind"], r["share"]): r["auc"][0] for r in rows}
    assert auc["mlp", 1.0] > auc["mlp", 0.01] + 0.1 and auc["dot", 1.0] > auc["dot", 0.01]


@pytest.mark.parametrize("setting", ["cvs", "jds", "occupations"])
def test_no_cv_jd_or_occupation_is_on_both_sides(setting, tmp_path):
    market.write_market(tmp_path, 300, 150, 800, 6, 0)
    labels, held_out = (read_records(tmp_path / f"{s}.jsonl") for s in ("train", "test"))
    learn, test = recommend.train_test_split(labels, held_out, setting, market.titles)
    assert len(learn) > 500 and len(test) > 50

    def column(records, key):
        return {x for r in records
                for x in (market.titles(r) if key == "titles" else [getattr(r, key)])}
    apart = {"cvs": ["cv", "jd"], "jds": ["jd"], "occupations": ["titles", "cv", "jd"]}[setting]
    for key in apart:
        assert not column(learn, key) & column(test, key), key


@pytest.mark.parametrize("setting", ["cvs", "jds"])
def test_no_text_of_the_test_has_a_part_in_what_features_are_scaled_by(monkeypatch, stage, setting):
    """When the vectors of the test's texts are moved far away, what is learned from stays."""
    def records(cvs, jds):
        return [Record(cv, jd, zlib.crc32((cv + jd).encode()) % 2 == 0) for cv in cvs for jd in jds]
    train = records([f"cv {i}" for i in range(12)], [f"jd {i}" for i in range(12)])
    held_out = records(["cv 12", "cv 13"], ["jd 12", "jd 13"])
    tested = recommend.train_test_split(train, held_out, setting, None)[1]
    moved = {r.jd for r in tested} | ({r.cv for r in tested} if setting == "cvs" else set())
    assert moved and len(tested) < len(train) / 2

    models, _ = stand_ins(monkeypatch, lambda cv, name: cv + name)
    encode, far, seen = recommend.encode, set(), []
    monkeypatch.setattr(recommend, "encode", lambda body, rows, device: encode(body, rows, device)
                        + torch.tensor([[100.0 if row[0] in far else 0.0] for row in rows]))

    def note(encoded, learn, test, *_):
        assert test == tested
        seen.append([recommend.features(encoded, learn, kind) for kind in recommend.KINDS]
                    + [[recommend.similarity(encoded, learn, mode, 1)] for mode in ("girl", "sft")])
        return []
    monkeypatch.setattr(recommend, "train_and_test", note)
    monkeypatch.setattr(recommend, "SETTINGS", {False: (setting,)})
    for far in (set(), moved):
        encoder = recommend.make_encoder(models, train)
        recommend.compare_recommenders(models, train, train, held_out, encoder,
                                       recommend.RecommendFlags(), False, None, stage)
    for before, after in zip(*seen, strict=True):
        torch.testing.assert_close(after, before)
    assert all(float(x[0].std()) > 0.1 for x in seen[0])            # they are not all the same


# ---------------------------------------------------------------------------------------- grounding
def test_ranking_figures_by_hand():
    found = recommend.ranking_figures([False, True, False, True] + [False] * 20)
    dcg = 1 / math.log2(3) + 1 / math.log2(5)
    assert found == {"hr_1": 0, "hr_5": 1, "hr_10": 1, "hr_20": 1, "mrr": 0.5,
                     "ndcg_10": pytest.approx(dcg / (1 + 1 / math.log2(3)))}
    assert (recommend.ranking_figures([False] * 14 + [True])
            == {"hr_1": 0, "hr_5": 0, "hr_10": 0, "hr_20": 1, "mrr": 1 / 15, "ndcg_10": 0})
    assert recommend.ranking_figures([True] * 12)["ndcg_10"] == 1


def test_pools_hold_the_accepted_jds_and_half_hard_ones_in_random_order():
    first = 0
    for seed in range(200):
        pool = recommend.draw_pool(random.Random(seed), [3, 4], [3, *range(10, 60)], 200, 40)
        assert len(set(pool.tolist())) == 40 and {3, 4} <= set(pool.tolist())
        assert sum(10 <= d < 60 for d in pool) == 18
        first += pool[0] in (3, 4)
    assert first < 30                       # two of forty: 10 expected
    # All there are.
    assert sorted(recommend.draw_pool(random.Random(0), [1], [2], 5, 100)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("own, hard, n_jds, size", [
    ([3], [*range(150)], 150, 100),             # without a market all of few JDs are hard
    ([3], [*range(140)], 150, 100), ([3], [], 150, 100), ([3], [*range(150)], 150, 150),
    ([*range(70)], [*range(60, 150)], 200, 100), ([*range(120)], [*range(120)], 150, 100)])
def test_a_pool_has_the_size_that_is_asked_for(own, hard, n_jds, size):
    pool = recommend.draw_pool(random.Random(0), own, hard, n_jds, size).tolist()
    assert len(pool) == len(set(pool)) == size and set(pool) <= set(range(n_jds))
    assert set(own) <= set(pool) or set(pool) <= set(own)


def test_pools_are_ranked_by_each_query_and_shortlists_by_the_reward(monkeypatch):
    monkeypatch.setattr(recommend, "SHORTLIST", 3)
    monkeypatch.setattr(recommend, "RERANKED", ("girl",))
    draw = np.random.default_rng(0)
    pools = [draw.permutation(12)[:8] for _ in range(5)]
    S, scores = draw.normal(size=(5, 12)), draw.normal(size=(5, 12))
    asked = set()

    def rewards(pairs):
        asked.update(pairs)
        return {(q, d): scores[q, d] for q, d in pairs}
    orders = recommend.rank_pools(pools, {"girl": S}, rewards, False)
    assert set(orders) == {"girl", "girl + reward"} and len(asked) == 5 * 3
    for q, pool in enumerate(pools):
        by_query = sorted(pool, key=lambda d: -S[q, d])
        assert orders["girl"][q].tolist() == by_query
        assert (orders["girl + reward"][q].tolist()
                == sorted(by_query[:3], key=lambda d: -scores[q, d]) + by_query[3:])
    orders = recommend.rank_pools(pools, {"girl": S}, rewards, True)
    assert all(order.tolist() == sorted(pool, key=lambda d: -scores[q, d])
               for q, (order, pool) in enumerate(zip(orders["reward"], pools)))


def test_rank_rows_compare_the_methods_cv_by_cv():
    relevant = np.zeros((3, 20), dtype=bool)
    relevant[0, 4] = relevant[1, 5] = True  # CV 2 has nothing relevant: left out
    best, worst = np.arange(20), np.arange(20)[::-1]
    orders = {"girl": [np.roll(best, -4), np.roll(best, -5), best], "cv": [worst, worst, worst]}
    rows, differences = recommend.rank_rows(orders, relevant, 0).values()
    assert rows["girl"]["ndcg_10"] == rows["girl"]["mrr"] == 1
    assert rows["girl"]["cvs"] == 2 and rows["cv"]["ndcg_10"] == 0
    assert differences == {"girl - cv": [1.0, 1.0, 1.0]}


def stand_ins(monkeypatch, writes):
    """Models whose encoder gives each text a vector of its own, and that write
    `writes(cv, generator)` for a CV; and an encoder that changes nothing."""
    codec = SimpleNamespace(prompt=lambda cv: [cv], jd=lambda jd: [jd], encode=lambda text: [1],
                            tokenizer=SimpleNamespace(get_vocab_size=lambda: 2))

    def vector(text):
        return torch.randn(16, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))

    def write_and_encode(models, cvs, k, name):
        return torch.stack([vector(writes(cv, name)) for cv in cvs])[:, None].expand(-1, k, -1)
    monkeypatch.setattr(recommend, "encode", lambda body, rows, device: torch.stack(
        [vector(row[0]) for row in rows]))
    monkeypatch.setattr(recommend, "write_and_encode", write_and_encode)
    monkeypatch.setattr(reward, "score_pairs",
                        lambda model, prompts, jds, pairs: dict.fromkeys(pairs, 0.0))
    return (recommend.Models(SimpleNamespace(model=None), None, None, codec, CPU, 0),
            recommend.Encoder(torch.zeros(16), torch.zeros(16), torch.eye(16)))


@pytest.mark.parametrize("n_jds, sizes", [(40, ["40"]), (100, ["100"]), (150, ["100", "150"]),
                                          (1000, ["100", "1000"]), (1200, ["100", "1000"])])
def test_each_pool_is_printed_once_with_its_real_size(monkeypatch, capsys, n_jds, sizes):
    models, encoder = stand_ins(monkeypatch, lambda cv, name: cv + name)
    held_out = [Record(f"cv {i % 7}", f"jd {i}", i % 10 == 0) for i in range(n_jds)]
    drawn, rank = [], recommend.rank_pools
    monkeypatch.setattr(recommend, "rank_pools",
                        lambda pools, *more: drawn.append(pools) or rank(pools, *more))
    found = recommend.ground(models, held_out, encoder, recommend.RecommendFlags(), False, None)
    assert list(found["pools"]) == sizes
    for size, pools in zip(sizes, drawn, strict=True):
        assert all(len(set(pool)) == int(size) for pool in pools)
    # The reward model scores all pairs of the smallest pools alone.
    rows = [by["accepted"]["rows"] for by in found["pools"].values()]
    assert "reward" in rows[0] and not any("reward" in more for more in rows[1:])
    recommend.print_grounding(found)
    out = capsys.readouterr().out
    assert out.count("grounding in pools") == len(sizes)
    assert all(f"grounding in pools of {size} posted JDs, relevant by accepted" in out
               for size in sizes)


def test_grounding_finds_the_jobs_whose_text_was_written(monkeypatch, tmp_path):
    """A constructed case: GIRL writes the accepted JD itself, SFT and the CV are noise, and the
    reward model knows nothing."""
    market.write_market(tmp_path, 10, 60, 800, 6, 0)
    held_out = read_records(tmp_path / "test.jsonl")
    accepted = {r.cv: r.jd for r in reversed(held_out) if r.accepted}  # the first one of each CV
    models, encoder = stand_ins(
        monkeypatch, lambda cv, name: accepted[cv] if name == "girl" else cv + name)
    found = recommend.ground(models, held_out, encoder, recommend.RecommendFlags(cvs=1000), False,
                             market)
    assert found["cvs"] == len(accepted)
    figures = found["pools"]["100"]["accepted"]
    assert figures["rows"]["girl"]["hr_1"] == 1 and figures["differences"]["girl - cv"][1] > 0.3
    for name in ("sft", "cv", "shuffled", "cv words"):
        assert figures["rows"][name]["hr_1"] < 0.15, name
    # Hard are the JDs of the CV's occupation.
    hard = recommend.hard_ones(list(accepted)[:5], sorted({r.jd for r in held_out}), None,
                               models.codec, market)
    for cv, mine in zip(accepted, hard):
        titles = [market.parse_jd(jd).title == market.parse_cv(cv).title
                  for jd in sorted({r.jd for r in held_out})]
        assert mine == [d for d, same in enumerate(titles) if same]


@pytest.mark.parametrize("content, says", [
    (b'{"jd": "a"}\n{"jd": 3}\n', "pool.jsonl:2: jd must be a text, found int"),
    (b"[1]\n", "pool.jsonl:1: expected"), (b'{"cv": "a"}\n', "pool.jsonl:1: expected"),
    (b'{"jd": "\xff"}\n', "pool.jsonl:1: not UTF-8"), (b"{\n", "pool.jsonl:1: not JSON"),
    (b'{"jd": "\\ud800"}\n', "pool.jsonl:1: jd holds half of a surrogate pair"), (b"\n", "no JDs"),
    (b'{"jd": " "}\n', "no JDs"), (None, "No such file")])
def test_a_bad_pool_is_named(tmp_path, content, says):
    if content is not None:
        (tmp_path / "pool.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=says):
        recommend.read_pool(tmp_path / "pool.jsonl")


def test_a_pool_is_read_without_repetitions(tmp_path):
    (tmp_path / "pool.jsonl").write_text('{"jd": "b", "id": 1}\n\n{"jd": "a"}\n'
                                         '{"cv": "x", "jd": "b", "accepted": true}\n')
    assert recommend.read_pool(tmp_path / "pool.jsonl") == ["b", "a"]


def test_agreement_names_the_fields_or_the_words():
    job = market.draw_job(random.Random(0), "chef")
    elsewhere = replace(job, place="Exeter" if job.place != "Exeter" else "Leeds")
    text, other = market.write_jd(job, 0), market.write_jd(elsewhere, 1)
    found = recommend.agreement(text, other, market)
    assert "occupation (chef)" in found
    assert "place" not in found and all(skill in found for skill in job.skills)
    assert (recommend.agreement("We seek a careful welder", "a WELDER, careful", None)
            == "careful, welder")
    assert recommend.agreement("cook", "sailor", None) == "nothing"
