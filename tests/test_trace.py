"""A kept iteration gives the same figures again, and what is shown of a text adds up; what a run
wrote is shown again."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

import girl
import market
import ppo
from conftest import argv, refused
from data import Codec, load_codec, train_tokenizer
from measure import evaluate, trace
from plumbing.stage import KEPT

CPU = torch.device("cpu")


@pytest.mark.parametrize("iteration", [1, 2])
def test_a_kept_iteration_equals_its_row_of_metrics_bit_for_bit(whole, iteration):
    run, data = whole / "run", whole / "data"
    t = trace.Replay(run, data, CPU, market.true_match).trace(iteration, 3)
    assert t.differences() == [] and len(t.log) > 14 and t.log["true_match"] is not None
    assert t.log["reward"] == trace.read_row(run, iteration)["reward"]
    assert "bit for bit" in trace.same_as_logged(t)


def test_a_figure_that_is_not_the_logged_one_is_named(whole):
    t = trace.Replay(whole / "run", whole / "data", CPU).trace(1, 0)
    other = t._replace(log=t.log | {"kl": 9.0})
    assert [name for name, *_ in other.differences()] == ["kl", "true_match"]
    assert "differs from metrics.csv: kl 9.0 instead of" in trace.same_as_logged(other)
    other = other._replace(machine=[("threads", 2, 1)])
    assert "It was kept with threads 2; now it is 1." in trace.same_as_logged(other)


def test_without_a_market_there_is_no_true_match_to_compare(whole):
    t = trace.Replay(whole / "run", whole / "data", CPU).trace(1)
    assert t.log["true_match"] is None
    t = t._replace(row=t.row | {"true_match": None})            # as on real data
    assert t.differences() == [] and "bit for bit" in trace.same_as_logged(t)


def test_what_is_shown_of_a_text_adds_up(whole):
    replay = trace.Replay(whole / "run", whole / "data", CPU, market.true_match)
    t = replay.trace(2, 5)
    c, n = t.columns, len(t.tokens)
    assert n > 3 and all(len(column) == n for column in [*c.values(), *t.ratios])
    assert sum(c["reward"]) == pytest.approx(t.score - t.beta * sum(c["kl"]), abs=1e-4)
    assert [a + v for a, v in zip(c["advantage"], c["value"])] == pytest.approx(c["lambda_return"],
                                                                                abs=1e-5)
    assert c["return"] == pytest.approx([sum(c["reward"][r:]) for r in range(n)], abs=1e-4)
    assert [p - q for p, q in zip(c["log_pi"], c["log_pi_ref"])] == pytest.approx(c["kl"], abs=1e-6)
    # delta = r + V' - V, and A = delta + lambda A', with gamma 1; after the end both are 0.
    values, advantages, lam = c["value"] + [0.0], c["advantage"] + [0.0], ppo.PPOFlags.lam
    for r in range(n):
        delta = c["reward"][r] + values[r + 1] - values[r]
        assert c["delta"][r] == pytest.approx(delta, abs=1e-5)
        assert advantages[r] == pytest.approx(delta + lam * advantages[r + 1], abs=1e-5)
    # Whitened over the whole rollout: mean 0 and variance 1 over all its tokens.
    whole_rollout = replay.roll_out(2).rollout
    everything = ppo.gae(whole_rollout.rewards, whole_rollout.values, whole_rollout.mask, 1.0, lam)
    everything = everything[whole_rollout.mask]
    mean, std = float(everything.mean()), float(everything.std(correction=0))
    assert abs(std - 1) > 0.05              # or the plain advantages would pass, too
    assert [(a - mean) / std for a in c["advantage"]] == pytest.approx(c["whitened"], abs=1e-3)


def test_the_ratio_is_1_before_the_update_and_moves_with_each_step(whole):
    t = trace.Replay(whole / "run", whole / "data", CPU).trace(2, 1)
    assert t.ratios[0] == pytest.approx([1.0] * len(t.tokens), abs=1e-5)
    assert len(t.ratios) == 1 + 2 * 2                   # two epochs of two minibatches
    assert len({str(column) for column in t.ratios}) == len(t.ratios)


def test_the_score_comes_with_the_last_token(whole):
    t = trace.Replay(whole / "run", whole / "data", CPU).trace(1, 2)
    assert t.columns["reward"][-1] == pytest.approx(t.score, abs=1e-4)      # the KL is 0 so far
    assert t.columns["reward"][:-1] == pytest.approx([0.0] * (len(t.tokens) - 1), abs=1e-4)


def test_trace_prints_the_table_the_sums_and_the_comparison(whole, capsys):
    where = ["--run", str(whole / "run"), "--data", str(whole / "data")]
    assert girl.main(["trace", *where, "--iteration", "2", "--episode", "1"]) == 0
    out = capsys.readouterr().out
    t = trace.Replay(whole / "run", whole / "data", CPU, market.true_match).trace(2, 1)
    assert all(line in out for line in trace.table(t)) and "The rewards add up to" in out
    assert t.cv in out and f"true match {t.true_match:.3f}" in out
    assert "Iteration 2 of 2, done again, has the figures of metrics.csv, bit for bit" in out


def test_a_ratio_outside_the_clip_range_is_marked(whole):
    t = trace.Replay(whole / "run", whole / "data", CPU).trace(1, 0)._replace(
        ratios=[[1.0, 1.3, 0.79]])
    t = t._replace(tokens=t.tokens[:3])
    assert [line.split()[-1] for line in trace.table(t)[1:]] == ["1.00", "1.30*", "0.79*"]


def test_the_cv_of_a_file_takes_the_place_of_the_episode_s(whole, tmp_path, capsys):
    lines = (whole / "data" / "test.jsonl").read_text().splitlines()
    cv = json.loads(lines[0])["cv"]
    (tmp_path / "cv.txt").write_text(cv)
    where = ["--run", str(whole / "run"), "--data", str(whole / "data")]
    assert girl.main(["trace", *where, "--cv", str(tmp_path / "cv.txt")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(cv) and "true match" in out
    assert "with your CV in place of episode 0's" in out and "bit for bit" not in out


def test_a_cv_that_is_not_of_the_market_has_no_true_match(whole, tmp_path, capsys):
    (tmp_path / "cv.txt").write_text("I cook.")
    where = ["--run", str(whole / "run"), "--data", str(whole / "data")]
    assert girl.main(["trace", *where, "--cv", str(tmp_path / "cv.txt")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("I cook.\n->") and "true match" not in out


def test_the_pieces_of_a_text_are_the_text():
    """A token of half a character shows nothing, the one that completes it the character. Decoded
    alone, a token of this second tokenizer would lose its space."""
    codec = Codec(train_tokenizer(["a cook"], 300), 32, 32)
    ids = codec.jd("Köln, a cook")
    pieces = trace.Replay.pieces(SimpleNamespace(codec=codec), ids)
    assert len(pieces) == len(ids) and pieces[-1] == trace.END
    assert "".join(pieces[:-1]).strip() == "Köln, a cook"
    assert "ö" in pieces and "\ufffd" not in "".join(pieces)
    words = Tokenizer(models.WordLevel({"▁a": 0, "▁cook": 1, "[EOS]": 2}))
    words.decoder = decoders.Metaspace()                    # strips the space of the first token
    other = SimpleNamespace(codec=SimpleNamespace(tokenizer=words, eos=2))
    assert trace.Replay.pieces(other, [0, 1, 2]) == ["a", " cook", trace.END]


@pytest.mark.parametrize("how", ["rloo", "grpo"])
def test_a_run_without_a_critic_is_traced_with_the_advantages_that_it_used(how, whole, tmp_path,
                                                                           capsys):
    run, data = tmp_path / "run", whole / "data"
    shutil.copytree(whole / "run", run)
    shutil.rmtree(run / "ppo")
    assert girl.main(argv("ppo", run, data, "--advantages", how, "--group", "4", "--kl-target",
                          "0")) == 0
    t = trace.Replay(run, data, CPU, market.true_match).trace(2, 5)
    assert t.differences() == [] and len(set(t.columns["whitened"])) == 1
    # GRPO's rewards hold no price of the KL.
    assert t.beta == (0 if how == "grpo" else ppo.PPOFlags.kl_coef)
    assert sum(t.columns["reward"]) == pytest.approx(t.score - t.beta * sum(t.columns["kl"]),
                                                     abs=1e-4)
    (tmp_path / "cv.txt").write_text(t.cv)
    refused(capsys, ["trace", "--run", str(run), "--data", str(data), "--cv",
                     str(tmp_path / "cv.txt")], "--cv needs a run with --advantages gae")


def test_what_cannot_be_traced_is_refused(whole, tmp_path, capsys):
    run, data = tmp_path / "run", str(whole / "data")
    shutil.copytree(whole / "run", run)
    command = ["trace", "--run", str(run), "--data", data]
    refused(capsys, [*command, "--iteration", "3"],
            "iteration 3 was not kept; the kept ones are 1, 2")
    refused(capsys, [*command, "--episode", "8"], "--episode 8 must be at most 7")
    path = run / "ppo" / KEPT / "2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    refused(capsys, [*command, "--iteration", "2"], "2.safetensors", "damaged",
            f"delete {run / 'ppo'}")
    shutil.rmtree(run / "ppo" / KEPT)
    refused(capsys, command, "no iteration was kept", f"delete {run / 'ppo'}")
    (run / "ppo" / "summary.json").unlink()
    refused(capsys, command, "stage ppo is not finished")


@pytest.mark.parametrize("keep, iterations, expected",
                         [(0, 9, []), (1, 9, [0]), (2, 9, [0, 8]), (3, 9, [0, 4, 8]),
                          (5, 24, [0, 6, 12, 17, 23]), (5, 3, [0, 1, 2]), (3, 1, [0])])
def test_kept_iterations_are_spread_over_the_run(keep, iterations, expected):
    assert sorted(ppo.kept_iterations(ppo.PPOFlags(keep=keep, iterations=iterations))) == expected


def test_keep_changes_no_result_and_may_change_when_a_stage_resumes(whole, tmp_path):
    run, data = tmp_path / "run", whole / "data"
    shutil.copytree(whole / "run", run)
    shutil.rmtree(run / "ppo")
    assert girl.main(argv("ppo", run, data, "--keep", "1")) == 0
    assert [p.stem for p in (run / "ppo" / KEPT).glob("*.json")] == ["1"]
    files = ["model.safetensors", "metrics.csv", "value_head.safetensors"]
    assert all((run / "ppo" / f).read_bytes() == (whole / "run/ppo" / f).read_bytes()
               for f in files)
    assert girl.main(argv("ppo", run, data, "--keep", "3")) == 0            # finished already
    t = trace.Replay(run, data, CPU, market.true_match).trace(1, 0)
    assert t.differences() == []


# ------------------------------------------------------------------------------------ answers.jsonl
def test_answers_hold_what_the_results_were_made_of(evaluated):
    results, lines = evaluate.read_results(evaluated), evaluate.read_answers(evaluated)
    assert len(lines) == results["cvs"] == 5
    for name, how in (("ppo", "sampled"), ("sft_greedy", "greedy"), ("sft_best16", "best of 16"),
                      ("nearest", "retrieved"), ("echo", "by rule")):
        rows = [line["answers"][name] for line in lines]
        assert {row["how"] for row in rows} == {how}
        for figure in ("true_match", "reward", "judge"):
            mean = sum(row[figure] for row in rows) / 5
            assert mean == pytest.approx(results[name][figure], abs=1e-6)
        for line in lines:
            row = line["answers"][name]
            assert row["true_match"] == market.true_match(line["cv"], row["jd"])


def test_show_prints_a_cv_with_all_its_answers(evaluated, capsys):
    assert girl.main(["show", "--run", str(evaluated), "--cv", "3"]) == 0
    out, line = capsys.readouterr().out, evaluate.read_answers(evaluated)[3]
    assert out.startswith(f"CV 3:\n{line['cv']}\n")
    for name, row in line["answers"].items():
        assert (f"\n{name} ({row['how']}): true match {row['true_match']:.3f}, reward "
                f"{row['reward']:+.3f}, judge {row['judge']:+.3f}\n{row['jd']}\n") in out


def test_show_refuses_what_is_not_there_or_not_of_these_results(whole, evaluated, tmp_path,
                                                                capsys):
    refused(capsys, ["show", "--run", str(evaluated), "--cv", "5"], "--cv 5 must be at most 4")
    shutil.copytree(evaluated, tmp_path / "run")
    path = tmp_path / "run" / "answers.jsonl"
    path.write_bytes(path.read_bytes().replace(b"Profile", b"profile", 1))
    refused(capsys, ["show", "--run", str(tmp_path / "run")], "answers.jsonl", "evaluate --run")
    path.unlink()
    refused(capsys, ["show", "--run", str(tmp_path / "run")], "answers.jsonl", "missing")
    shutil.rmtree(tmp_path / "run" / "ppo")                 # and PPO again, with another beta
    again = argv("ppo", tmp_path / "run", whole / "data", "--kl-coef", "0.3")
    assert girl.main(again) == 0
    refused(capsys, ["show", "--run", str(tmp_path / "run")], "results.json: is of other models",
            "evaluate --run")
    refused(capsys, ["show", "--run", str(tmp_path)], "results.json: no such file")


def test_generate_and_score_say_what_a_jd_of_the_market_is_truly_worth(whole, tmp_path, capsys):
    records = map(json.loads, (whole / "data" / "test.jsonl").open())
    record = next(r for r in records if market.true_match(r["cv"], r["jd"]) > 0.01)
    (tmp_path / "cv.txt").write_text(record["cv"])
    (tmp_path / "jd.txt").write_text(record["jd"])
    (tmp_path / "other.txt").write_text("I cook.")
    capsys.readouterr()
    score = ["score", "--reward", str(whole / "run/reward"), "--jd", str(tmp_path / "jd.txt")]
    assert girl.main([*score, "--cv", str(tmp_path / "cv.txt")]) == 0
    out, err = capsys.readouterr()
    truth = market.true_match(record["cv"], record["jd"])
    assert f"true match: {truth:.3f}\n" in err and float(out)          # the score alone
    assert girl.main([*score, "--cv", str(tmp_path / "other.txt")]) == 0
    assert "true match" not in capsys.readouterr().err                  # not of the market
    generate = ["generate", "--model", str(whole / "run/sft"), "--number", "3", "--reward",
                str(whole / "run/reward"), "--cv", str(tmp_path / "cv.txt")]
    assert girl.main(generate) == 0
    assert "true match: 0.000, 0.000, 0.000\n" in capsys.readouterr().err


def test_true_matches_are_in_the_order_of_the_jds(whole, tmp_path, monkeypatch, capsys):
    """The best score comes first; here it is that of the JD that was written last."""
    records = [json.loads(line) for line in (whole / "data" / "test.jsonl").open()]
    good = max(records, key=lambda r: market.true_match(r["cv"], r["jd"]))
    jds = ["We need a cook.", good["jd"]]
    (tmp_path / "cv.txt").write_text(good["cv"])
    codec = load_codec(whole / "run/sft", girl.load_model(whole / "run/sft").config)
    monkeypatch.setattr(girl, "generate", lambda *rest: [codec.jd(jd) for jd in jds])
    monkeypatch.setattr(girl.reward, "score_texts", lambda model, codec, pairs: [0.5, 1.5])
    command = ["generate", "--model", str(whole / "run/sft"), "--number", "2", "--reward",
               str(whole / "run/reward"), "--cv", str(tmp_path / "cv.txt")]
    assert girl.main(command) == 0
    out, err = capsys.readouterr()
    truth = market.true_match(good["cv"], good["jd"])
    assert out.index("[+1.500]") < out.index("[+0.500]")
    assert truth > 0.3 and f"true match: {truth:.3f}, 0.000\n" in err
