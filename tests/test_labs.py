"""The labs at toy size, and what is written of their results."""
import importlib
import random
import shutil
import statistics
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import girl
import market
import sft
from data import Record, read_half, read_records
from learn.labs import gap, growth, lab, prejudice, run
from learn.labs.decisions import best_samples
from learn.labs.hacking import Ensemble
from model import Config, LanguageModel, RewardModel
from measure.report import read_metrics
from plumbing.files import read_json

LEARN = Path(run.HOME) / "learn"


class Inline:
    """In the place of a pool of processes: does the work at once."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        future = Future()
        future.set_result(work(*args))
        return future


@pytest.fixture(scope="module")
def base(whole, evaluated, tmp_path_factory):
    """A finished run with its data inside, as train leaves it."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(evaluated, folder / "0")
    shutil.copytree(whole / "data", folder / "0" / "data")
    return folder


@pytest.mark.parametrize("name", run.LABS)
def test_every_lab_runs_at_toy_size_and_is_written_up(name, base, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(lab, "CVS", 4)
    sizes = girl.SIZES["smoke"] | {
        "data": {"people": 60, "held_out": 20, "jobs": 400},
        "ppo": {"iterations": 2, "episodes": 8, "minibatch": 8}}
    monkeypatch.setitem(girl.SIZES, "smoke", sizes)
    monkeypatch.setattr(growth, "STEPS", 10)
    monkeypatch.setattr(growth, "TIMED", 8)
    the_lab = importlib.import_module(f"learn.labs.{name}")
    monkeypatch.setattr(the_lab, "SAW", "nothing")
    assert run.main([name, "--smoke", "--seeds", "1", "--base", str(base), "--scratch",
                     str(tmp_path / "work"), "--out", str(tmp_path)]) == 0
    found = read_json(tmp_path / "labs" / f"{name}.json")["found"]
    check_parts(name, {row["arm"]: row for row in found}, tmp_path / "work" / name / "0")
    arms = run.arms_of(the_lab, "--smoke")
    assert [row["arm"] for row in found] == arms and set(arms) <= set(the_lab.ARMS)
    page = (tmp_path / "EXPERIMENTS.md").read_text()
    assert the_lab.QUESTION in page and the_lab.PREDICTION in page
    assert all(f"\n| {arm} | " in page for arm in arms)
    assert (tmp_path / "labs" / f"{name}.svg").read_text().startswith("<svg")


def check_parts(name, rows, work):
    """What is changed in an arm has an effect."""
    if name == "parts":
        curves = [row["curve"] for row in rows.values()]
        assert all(curve != other for k, curve in enumerate(curves) for other in curves[:k])
        assert not any(rows["no critic"]["curve"]["explained_variance"])
    if name == "hacking":
        assert rows["weak, β 0"]["curve"] != rows["minimum of two weak, β 0"]["curve"]
        assert len(rows["full, β 0"]["judged"]) == 2
    if name == "again":         # goes on from the first round's policy, with SFT as its reference
        assert abs(rows["PPO goes on"]["curve"]["kl"][0]) > 1e-4
        # New decisions and old ones: JDs of a toy policy do not parse, those of the market do.
        for arm, only_old in (("more old decisions", True), ("1,000 new decisions", False)):
            data = work / str(list(rows).index(arm)) / "data"
            parses = [market.parse_jd(r.jd) is not None for r in read_records(data / "train.jsonl")]
            assert any(parses) and all(parses) == only_old
            assert read_records(data / "probes.jsonl")
    if name == "decisions":
        assert rows["best of 4"]["reward"] > rows["SFT"]["reward"] + 0.1
        assert rows["RLOO"]["scored"] == 2 * 8
    if name == "parts":
        metrics = read_metrics(work / "0" / "ppo" / "metrics.csv")
        assert rows["as it is"]["clipped"] == pytest.approx(metrics["clip_frac"].mean(), rel=1e-5)
    if name == "growth":        # a token of a longer row costs more attention
        short, long = (row["flops"] for row in rows.values())
        assert long > 1.02 * short


@pytest.fixture
def place(base, tmp_path):
    """An arm whose run is the finished run itself."""
    return lab.Place(0, base / "0", tmp_path / "shared", base / "0", "--smoke")


def by_truth(model, codec, pairs):
    """Scores of a reward model that knows the truth."""
    return np.array([market.true_match(cv, jd) for cv, jd in pairs])


def test_a_generator_is_measured_by_its_samples_and_its_greedy_jds_apart(place, monkeypatch):
    records = [r for r in read_records(place.models / "data" / "valid.jsonl") if r.accepted]
    monkeypatch.setattr(lab, "valid_cvs", lambda _: [r.cv for r in records])
    monkeypatch.setattr(lab.evaluate, "write_jds", lambda lm, codec, cvs, temperature, *_: [
        codec.jd(r.jd) if temperature else codec.jd("") for r in records])
    found = lab.worth(place, "ppo")
    truth = [market.true_match(r.cv, r.jd) for r in records]
    assert found["true_match"] == pytest.approx(statistics.mean(truth)) and min(truth) > 0
    assert found["greedy"] == 0 and found["format_rate"] == 1
    monkeypatch.undo()
    assert lab.worth(place, lab.load_models(place).sft)["kl"] == pytest.approx(0, abs=1e-5)


def test_a_reward_model_that_knows_the_truth_notices_what_asks_for_too_little(place, monkeypatch):
    generator = lab.load_models(place).sft
    monkeypatch.setattr(lab.evaluate, "score_texts", by_truth)
    assert gap.habits(place, generator, None)["notices"] == 1
    monkeypatch.setattr(lab.evaluate, "score_texts", lambda *args: -by_truth(*args))
    assert gap.habits(place, generator, None)["notices"] == 0


def test_a_difference_is_with_the_sentence_less_without(place, monkeypatch):
    """With a score that falls for a gap: by 2, or by 4 for every other JD."""
    def falls(loss):
        def score(model, codec, pairs):
            return by_truth(model, codec, pairs) - np.array(
                [(cv != market.without_gap(cv)) * loss(jd) for cv, jd in pairs])
        monkeypatch.setattr(lab.evaluate, "score_texts", score)
    falls(lambda jd: 4 * (len(jd) % 2))
    assert 1 < prejudice.differences(place, place.models / "data")["spread"] <= 2
    falls(lambda jd: 2)
    found = prejudice.differences(place, place.models / "data")
    assert found["score"] == pytest.approx(-2) and found["score_differs"]
    assert found["cv_rank"] > 1                 # more rivals, who have no gap, stand above
    assert found["top5"] == 0 and not found["top5_differs"]     # for one CV all jobs lose the same
    assert found["spread"] == pytest.approx(0)


def test_nobody_is_a_rival_of_himself():
    people = [f"person {k}" for k in range(21)]
    for k in range(20):
        drawn = prejudice.draw_rivals(people, people[k], random.Random(k))
        assert len(set(drawn)) == 19 and people[k] not in drawn


def test_speed_is_what_the_timed_steps_read_in_their_time(place, monkeypatch):
    clock = iter((100.0, 110.0))
    monkeypatch.setattr(growth, "time", SimpleNamespace(time=lambda: next(clock)))
    flags = girl.from_args(girl.STAGES["sft"], girl.parse(["sft", "--smoke", "--batch", "2"]))
    found = growth.speed(place, flags)
    records = [r for r in read_half(place.models / "data", "A") if r.accepted]
    codec = sft.new_codec(records, flags)
    lengths = [len(codec.prompt(r.cv)) + len(codec.jd(r.jd)) for r in records[:2 * growth.STEPS]]
    timed = sft.schedule(lengths, 2, growth.STEPS, place.seed)[-growth.TIMED:]
    assert found["step"] == 10 / growth.TIMED
    assert found["tokens_per_s"] * 10 == sum(lengths[k] for batch in timed for k in batch)


def test_training_is_timed_without_its_validation(tmp_path, monkeypatch):
    clock = iter((0.0, 10.0, 14.0, 30.0))       # training begins, validation begins and ends
    monkeypatch.setattr(growth, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(sft, "validate", lambda: None)
    monkeypatch.setattr(sft, "train", lambda: sft.validate())
    monkeypatch.setattr(growth, "command", lambda *words: sft.train())
    seconds, peak = growth.trained([], tmp_path / "log.txt")
    assert seconds == 26 and peak > 10


def test_flops_are_those_that_pytorch_counts():
    model = LanguageModel(Config(vocab_size=500, hidden_size=64, num_hidden_layers=2))
    with FlopCounterMode(display=False) as counted:         # it leaves out attention on the CPU
        hidden = model.model(torch.ones(1, 120, dtype=torch.long))
        model.lm_head(hidden[:, 40:])
    attention = 4 * 2 * model.config.hidden_size * sum(range(1, 121))
    forward = (counted.get_total_flops() + attention) / 120
    found = growth.flops_per_token(model, [sft.Example([1] * 40, [1] * 80)])
    assert found == pytest.approx(3 * forward, rel=0.01)


def test_longer_rows_hold_the_prompts_and_then_the_jds():
    pairs = [sft.Example([k, k], [10 + k]) for k in range(3)]
    assert growth.joined(pairs, 2) == [([0, 0, 1, 1], [10, 11]), ([2, 2], [12])]


def test_the_page_is_what_the_committed_results_give(tmp_path):
    shutil.copytree(LEARN / "labs", tmp_path / "labs")
    assert run.main(["none", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "EXPERIMENTS.md").read_text() == (LEARN / "EXPERIMENTS.md").read_text()


def test_the_readme_s_table_is_of_these_results():
    found = read_json(LEARN / "labs" / "decisions.json")["found"]
    readme = (LEARN.parent / "README.md").read_text()
    table = readme[readme.index("What else could be done"):].split("\n\n")[1].splitlines()[2:]
    figures = ("true_match", "greedy", "reward", "judge", "kl", "format_rate", "distinct_2",
               "seconds")
    for line in table:
        arm, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for figure, cell in zip(figures, cells, strict=True):
            values = run.of_arm(found, arm, figure)
            digits = 0 if figure == "seconds" else 2
            shown = f"{statistics.median(values):.{digits}f}" if values else "–"
            assert cell == shown, (arm, figure)
    assert len(table) == 8


def test_a_cell_is_the_median_with_its_range_and_a_star_if_every_seed_differs():
    found = [{"arm": "a b, β 0.5", "seed": seed, "x": x, "y": 200.4 + seed, "x_differs": x > 0.1}
             for seed, x in enumerate((0.5, 0.111, -0.2))]
    assert run.filled("with {a b, β 0.5[x]} of {a b, β 0.5[y]}", found) == (
        "with 0.11 (-0.20 to 0.50) of 201 (200 to 202)")
    assert run.shown([0.5], "x") == "0.50" and run.shown([], "x") == "–"
    assert run.shown([12.2, 14.4], "seconds") == "13"
    with pytest.raises(KeyError):
        run.filled("{a b, β 0.5[z]}", found)
    assert run.star(found, "a b, β 0.5", "x") == "" == run.star(found, "a b, β 0.5", "y")
    assert run.star(found[:2], "a b, β 0.5", "x") == "*"


def test_the_best_sample_of_each_cv_is_the_one_with_the_highest_score(monkeypatch):
    samples = [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]
    scores = np.array([[0.1, 3.0], [2.0, 1.0], [0.3, 2.0]])
    monkeypatch.setattr(lab.evaluate, "write_samples", lambda *_: samples)
    monkeypatch.setattr(lab.evaluate, "score_each", lambda *_: scores)
    models = lab.Models(None, {"reward": None}, None)
    assert best_samples(models, None, ["a", "b"], 3, 0, "") == ["a1", "b0"]


def test_a_jd_that_asks_for_too_little_is_worse_and_overqualifies(whole):
    changes = gap.asking_too_little(read_records(whole / "data" / "train.jsonl"))
    assert changes
    for cv, jd, worse in changes:
        person, job = market.parse_cv(cv), market.parse_jd(worse)
        assert market.overqualified(person, job)
        assert not market.overqualified(person, market.parse_jd(jd))
        assert market.years_factor(person, job) < 0.85 ** 2


def test_other_parts_are_taken_back():
    was = market.spoil
    with pytest.raises(ZeroDivisionError), lab.changed(market, spoil=None):
        assert market.spoil is None
        1 / 0
    assert market.spoil is was


def test_an_ensemble_is_the_mean_or_the_minimum_of_its_models(config):
    models = [RewardModel(config), RewardModel(config)]
    models[1].center = 0.5
    ids, lengths = torch.tensor([[2, 5, 1], [3, 6, 1]]), torch.tensor([3, 3])
    alone = torch.stack([m(ids, lengths) for m in models])                      # [models, B]
    for combine, expected in (("mean", alone.mean(0)), ("minimum", alone.min(0).values)):
        both = Ensemble(models, combine)
        torch.testing.assert_close(both.head(both.model(ids)[:, -1]), expected)


def test_balanced_decisions_accept_both_kinds_at_one_rate(whole):
    records = read_records(whole / "data" / "train.jsonl")
    cvs = sorted({r.cv for r in records})
    has_gap = {cv: k % 2 for k, cv in enumerate(cvs)}
    records = [Record(market.with_gap(r.cv) if has_gap[r.cv] else r.cv, r.jd,
                      r.accepted and not (has_gap[r.cv] and k % 2)) for k, r in enumerate(records)]
    kept = prejudice.balanced(records * 20, random.Random(0))

    def rate(of, kind):
        mine = [r.accepted for r in of if market.parse_cv(r.cv).gap == kind]
        return sum(mine) / len(mine)
    assert rate(records, False) > 1.5 * rate(records, True)
    assert rate(kept, False) == pytest.approx(rate(kept, True), rel=0.1)
    assert rate(kept, True) == pytest.approx(rate(records, True))
