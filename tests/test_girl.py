"""End to end: the smoke run, its files, its determinism, and what the command line says to bad
input."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import girl
import plumbing.inputs
import sft
from conftest import refused, tiny
from soak import soak, without_clock
from plumbing.records import half, write_records
from plumbing.files import BadInput, save_tensors
from plumbing.stage import Stage

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def run(*argv, **options):
    """A whole process, as a user starts it."""
    return subprocess.run([sys.executable, str(ROOT / "girl.py"), *map(str, argv)],
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "random"}, **options)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A smoke run with seed 1, in a process of its own, and what it printed."""
    place = tmp_path_factory.mktemp("smoke")
    done = run("train", "--smoke", "--seed", 1, "--out", "run", "--save-seconds", 0.3, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run", done.stdout


def test_a_run_of_the_same_seed_that_is_killed_at_random_moments_ends_the_same(smoke, capsys):
    """Bit for bit, in every file. `python tests/soak.py --kills 200` kills more often."""
    assert soak(3, 1, whole=smoke[0]) == []
    assert capsys.readouterr().out.startswith("soak: 3 kills in 1 runs, ")


def test_smoke_run_writes_every_stage_and_the_results(smoke):
    a, out = smoke
    assert "it shows that every stage runs, not that anything was learned" in out.splitlines()[-1]
    assert re.search(r"ppo +3/3 .* len +[\d.]+  eos \d\.\d\d  clip", out)
    for stage in ("sft", "reward", "judge", "ppo"):
        for name in ("config.json", "model.safetensors", "tokenizer.json", "metrics.csv",
                     "summary.json"):
            assert (a / stage / name).stat().st_size > 0, (stage, name)
    assert (a / "ppo" / "value_head.safetensors").exists()
    results = json.loads((a / "results.json").read_text())
    for name in ("sft", "sft_greedy", "sft_best16", "ppo", "ppo_greedy"):
        assert {"valid_nll", "format_rate", "title_rate", "true_match", "true_match_ci95", "reward",
                "judge", "copy_rate", "distinct_2", "length", "factors"} <= set(results[name])
        assert set(results[name]["factors"]) == {"skills", "years", "degree", "place", "field"}
    assert min(results["echo"]["factors"].values()) > 0
    accuracies = results["reward"]["sample_accuracy"]
    assert {policy: set(by) for policy, by in accuracies.items()} == {
        "sft": {"reward", "judge"}, "ppo": {"reward", "judge"}}
    for contrast in ("girl_vs_sft", "girl_vs_nearest", "girl_vs_random", "girl_vs_constant",
                     "girl_vs_echo", "girl_vs_best16"):
        for by in ("true", "judge"):
            low, high = results["wins"][contrast][f"{by}_advantage_ci95"]
            win, tie, lose = results["wins"][contrast][by]
            assert win + tie + lose == pytest.approx(1) and low <= win - lose <= high
    modes = {(row["kind"], row["mode"]) for row in results["recommend"]["cvs"]["rows"]}
    assert modes == {(kind, mode) for kind in ("dot", "mlp")
                     for mode in ("none", "sft", "girl", "shuffled")}
    grounded = results["grounding"]
    assert list(grounded["pools"]) == ["100", str(grounded["jds"])] and 100 < grounded["jds"] < 1000
    for found in grounded["pools"].values():
        assert {"cv", "cv words", "sft", "girl", "shuffled", "cv + reward", "girl + reward"} <= set(
            found["accepted"]["rows"])
    assert set(results["reward"]["one_change_accuracy"]) == {"skills", "years", "degree",
                                                             "city", "field"}
    # Reward model and judge run side by side, evaluation and recommender too: the time in which
    # both were at work counts once.
    seconds, clocks = results["seconds"], results["clocks"]
    twice = sum(min(seconds[a], seconds[b]) for a, b in (("reward", "judge"), clocks))
    everything = sum(v for k, v in seconds.items() if k != "total")
    assert everything - twice - 0.4 < seconds["total"] < everything
    starts, ends = zip(*((c["started"], c["started"] + c["seconds"]) for c in clocks.values()))
    assert set(clocks) == {"evaluate", "recommend"} and max(starts) < min(ends)
    assert results["peak_rss_mb"] >= sum(c["peak_rss_mb"] for c in clocks.values())
    assert "The JD before PPO" in out and "The JD after PPO" in out


def test_best_of_16_is_never_below_the_first_of_the_16(smoke):
    a, _ = smoke
    results = json.loads((a / "results.json").read_text())
    assert results["sft_best16"]["reward"] > results["sft"]["reward"]


def test_generator_and_reward_model_learn_from_half_a_and_the_judge_from_half_b(smoke, monkeypatch):
    a, _ = smoke
    seen, learned = {}, {}

    def stop(name, cvs):
        seen[name] = {half(cv) for cv in cvs}
        raise BadInput(name)

    def stop_reward(model, reader, codec, records, flags, seed, stage, device):
        learned[stage.name] = records
        stop(stage.name, [r.cv for r in records])
    monkeypatch.setattr(girl.reward, "train", stop_reward)
    monkeypatch.setattr(girl.ppo, "train",
                        lambda policy, reward_model, codec, cvs, *rest: stop("ppo", cvs))
    known = {json.loads(line)["cv"] for line in (a / "data" / "train.jsonl").open()}
    monkeypatch.setattr(sft, "train_tokenizer",
                        lambda texts, vocab: stop("sft", known.intersection(texts)))
    for name, train, flags in (("sft", sft.run, sft.SFTFlags),
                               ("reward", girl.reward.run, girl.reward.RewardFlags),
                               ("judge", girl.reward.run, girl.reward.RewardFlags),
                               ("ppo", girl.ppo.run, girl.ppo.PPOFlags)):
        with pytest.raises(BadInput), Stage(a, name) as stage:
            train(stage, a, a / "data", flags(), 0, CPU)
    assert seen == {"sft": {"A"}, "reward": {"A"}, "judge": {"B"}, "ppo": {"A"}}
    # Reward model and judge learn from the hard negatives of their CVs, too.
    decisions, negatives = (girl.read_records(a / "data" / f"{name}.jsonl")
                            for name in ("train", "probes"))
    for name, part in (("reward", "A"), ("judge", "B")):
        assert sorted(learned[name]) == sorted(r for r in decisions + negatives
                                               if half(r.cv) == part)


def test_ppo_logs_the_true_match_of_its_rollouts(smoke):
    a, _ = smoke
    with (a / "ppo" / "metrics.csv").open() as file:
        logged = [float(row["true_match"]) for row in csv.DictReader(file)]
    assert len(logged) == 3 and all(0 <= x <= 0.95 for x in logged)


def test_the_recommender_learns_from_half_b_and_is_tested_on_the_held_out_split(
        smoke, tmp_path, monkeypatch):
    a, _ = smoke
    shutil.copytree(a, tmp_path / "run")
    seen = {}

    def look(encoded, learn, test, *rest):
        seen["learn"], seen["test"] = {r.cv for r in learn}, {r.cv for r in test}
        girl_, shuffled = encoded.written["girl"], encoded.written["shuffled"]
        # The control: what was written for another CV.
        assert shuffled[1:].equal(girl_[:-1]) and not shuffled[1:].equal(girl_[1:])
        return []
    monkeypatch.setattr(girl.recommend, "train_and_test", look)
    assert girl.main(["recommend", "--smoke", "--seed", "1", "--run", str(tmp_path / "run")]) == 0
    cvs = {split: {r.cv for r in girl.read_records(a / "data" / f"{split}.jsonl")}
           for split in ("train", "test")}
    assert seen["learn"] and seen["learn"] <= {cv for cv in cvs["train"] if half(cv) == "B"}
    assert seen["test"] == cvs["test"]


def test_jobs_for_one_cv_come_from_the_pool_best_first(smoke, tmp_path, capsys):
    a, _ = smoke
    records = girl.read_records(a / "data" / "test.jsonl")
    (tmp_path / "cv.txt").write_text(records[0].cv)
    argv = ["recommend", "--run", str(a), "--cv", str(tmp_path / "cv.txt"),
            "--pool", str(a / "data" / "test.jsonl"), "--top", "15"]
    assert girl.main(argv) == 0
    shown = capsys.readouterr().out.split("\n\n")
    assert shown[0].startswith("The suggestion (greedy):\n")
    jobs = [part.split("\n", 1) for part in shown if part.startswith("[")]
    scores = [float(head[1:head.index("]")]) for head, _ in jobs]
    assert len(jobs) == 15 and scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 5 and all("agrees with the suggestion in" in head for head, _ in jobs)
    assert {jd.strip() for _, jd in jobs} <= {r.jd for r in records}


def test_recommend_adds_to_the_evaluation_of_the_same_seed_and_split(smoke, tmp_path, capsys,
                                                                     monkeypatch):
    a, _ = smoke
    shutil.copytree(a, tmp_path / "run")
    monkeypatch.setattr(girl.recommend, "compare_recommenders", None)   # refused before it measures
    argv = ["recommend", "--smoke", "--run", str(tmp_path / "run")]
    assert girl.main(argv + ["--seed", "2"]) == 2
    assert "is of seed 1 and split test" in capsys.readouterr().err
    path = tmp_path / "run" / "results.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    assert girl.main(argv + ["--seed", "1"]) == 2
    assert "results.json: damaged" in capsys.readouterr().err


def test_evaluation_and_recommender_need_no_results_of_each_other(smoke, tmp_path, capsys):
    """In either order: a recommender alone, and then the evaluation beside it."""
    a, _ = smoke
    run_folder, verdicts = tmp_path / "run", tmp_path / "verdicts.jsonl"
    shutil.copytree(a, run_folder)
    path, more = run_folder / "results.json", ["--smoke", "--seed", "1", "--run", str(run_folder)]
    whole = json.loads(path.read_text())
    path.unlink()
    assert girl.main(["recommend", *more]) == 0
    alone = json.loads(path.read_text())
    assert "ppo" not in alone and alone["grounding"]["pools"] and alone["recommend"]["cvs"]
    verdicts.write_text("{}")
    refused(capsys, ["evaluate", *more, "--verdicts", str(verdicts)],
            "results.json: holds no evaluation; run  python girl.py evaluate")
    assert girl.main(["evaluate", *more]) == 0
    both = json.loads(path.read_text())
    assert set(both) == set(whole) and both["measured"] == whole["measured"]
    assert both["recommend"] == alone["recommend"] and both["grounding"] == alone["grounding"]


def test_a_sigterm_ends_both_measurements_and_the_same_command_measures_anew(smoke, tmp_path):
    a, _ = smoke
    place = tmp_path / "run"
    shutil.copytree(a, place)
    whole = without_clock(json.loads((place / "results.json").read_text()))
    (place / "results.json").unlink()
    shutil.rmtree(place / "recommend")
    command = [sys.executable, str(ROOT / "girl.py"), "train", "--smoke", "--seed", "1",
               "--out", str(place)]
    train = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True)
    while not ((place / "evaluate").exists() and (place / "recommend").exists()):
        assert train.poll() is None, train.communicate()
        time.sleep(0.02)
    train.terminate()
    said, _ = train.communicate(timeout=60)
    assert train.returncode == 130 and "Traceback" not in said
    assert not (place / "results.json").exists()
    with pytest.raises(ProcessLookupError):     # the group is empty
        os.killpg(train.pid, 0)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert without_clock(json.loads((place / "results.json").read_text())) == whole


def test_pairs_for_an_outside_judge_go_out_and_its_verdicts_come_in(smoke, tmp_path, capsys):
    a, _ = smoke
    shutil.copytree(a, tmp_path / "run")
    pairs, verdicts = tmp_path / "pairs.jsonl", tmp_path / "verdicts.jsonl"
    assert girl.main(["evaluate", "--smoke", "--seed", "1", "--run", str(tmp_path / "run"),
                      "--export-pairs", str(pairs)]) == 0
    questions = [json.loads(line) for line in pairs.read_text().strip().split("\n")]
    # All but those with a pretrained model.
    assert len({q["id"] for q in questions}) == len(questions) == 24 * 8
    verdicts.write_text("".join(json.dumps({"id": q["id"], "detail": "A", "relevance": "tie",
                                            "conciseness": "B"}) + "\n" for q in questions))
    capsys.readouterr()
    assert girl.main(["evaluate", "--run", str(tmp_path / "run"), "--verdicts", str(verdicts)]) == 0
    row = json.loads((tmp_path / "run" / "results.json").read_text())["wins"]["girl_vs_sft"]
    assert row["relevance"] == [0, 1, 0]
    assert row["detail"] == row["conciseness"][::-1] and row["true"] and row["answers"] == 24
    assert "conciseness" in capsys.readouterr().out
    # The answers are not lost to another `train`, nor to the recommender.
    for name in ("recommend", "evaluate"):
        command = "recommend" if name == "recommend" else "train"
        assert girl.main([command, "--smoke", "--seed", "1", "--run", str(tmp_path / "run")]) == 0
        assert (json.loads((tmp_path / "run" / "results.json").read_text())["wins"]["girl_vs_sft"]
                == row)


def test_data_for_which_nothing_vouches_are_used_as_they_are(tmp_path, capsys, monkeypatch):
    """Of a set that was edited, or whose maker was killed after its last split; a set that is not
    whole is made again."""
    assert girl.main(["data", "--smoke", "--out", str(tmp_path / "data")]) == 0
    (tmp_path / "data" / "summary.json").unlink()
    before = {p: p.read_bytes() for p in (tmp_path / "data").iterdir()}
    apart = []
    monkeypatch.setattr(girl, "run_apart", lambda run, commands, device: apart.extend(commands))
    monkeypatch.setattr(girl, "run_stage", lambda *args: None)
    monkeypatch.setattr(girl, "measured_checksums", lambda *args: {})
    later = ["sft", "reward", "judge", "evaluate", "recommend", "report"]
    assert girl.main(["train", "--smoke", "--run", str(tmp_path)]) == 0
    assert "they are used as they are" in capsys.readouterr().out and apart == later
    assert before == {p: p.read_bytes() for p in (tmp_path / "data").iterdir()}
    (tmp_path / "data" / "test.jsonl").unlink()
    assert girl.main(["train", "--smoke", "--run", str(tmp_path)]) == 0
    assert apart[6:] == ["data", *later]


def test_data_of_before_the_options_of_the_market_are_still_a_run_s_own(tmp_path, capsys,
                                                                        monkeypatch):
    command = ["data", "--smoke", "--people", "90", "--out", str(tmp_path / "data")]
    monkeypatch.setitem(girl.SIZES["smoke"]["data"], "people", 90)
    monkeypatch.setattr(girl, "run_apart", lambda run, commands, device: None)
    monkeypatch.setattr(girl, "run_stage", lambda *args: None)
    monkeypatch.setattr(girl, "measured_checksums", lambda *args: {})
    assert girl.main(command) == 0
    path = tmp_path / "data" / "summary.json"
    summary = {k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}
    assert not summary["asked"].pop("prejudice") and not summary["asked"].pop("no_overqualified")
    girl.write_json(path, girl.with_checksum(summary))
    assert girl.main(["train", "--smoke", "--run", str(tmp_path)]) == 0
    for option, says in ((["--prejudice", "0.5"], "--prejudice 0.5, not 0.0"),
                         (["--no-overqualified"], "--no-overqualified True, not False")):
        assert girl.main(command + option) == 0
        refused(capsys, ["train", "--smoke", "--run", str(tmp_path)], f"was made with {says}")


def test_the_options_of_the_market_reach_the_data(tmp_path):
    assert girl.main(["data", "--smoke", "--prejudice", "0.5", "--no-overqualified",
                      "--out", str(tmp_path)]) == 0
    noted = json.loads((tmp_path / "market.json").read_text())
    assert noted["prejudice"] == 0.5 and noted["no_overqualified"] is True
    for split in ("train", "valid", "test"):
        pairs = [(girl.market.parse_cv(r.cv), girl.market.parse_jd(r.jd))
                 for r in girl.read_records(tmp_path / f"{split}.jsonl")]
        assert {person.gap for person, _ in pairs} == {True, False}
        assert (split == "train") != any(girl.market.overqualified(*pair) for pair in pairs)


def test_another_seed_gives_another_market(tmp_path):
    for seed in (1, 2):
        girl.main(["data", "--smoke", "--people", "20", "--held-out", "5", "--seed", str(seed),
                   "--out", str(tmp_path / str(seed))])
    assert (tmp_path / "1/train.jsonl").read_text() != (tmp_path / "2/train.jsonl").read_text()


def test_what_is_finished_is_not_run_again(smoke, tmp_path, monkeypatch, capsys):
    """Unless results.json is damaged, or of other models: then it is measured anew."""
    a, _ = smoke
    shutil.copytree(a, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    command = ["train", "--smoke", "--seed", "1", "--out", str(tmp_path / "run")]

    def written():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    before = written()
    # Models, the heads of reading and value, three kept states; the data's files and the answers.
    assert len([p for p in before if p.suffix in (".safetensors", ".jsonl")]) == 4 + 2 + 3 + 5
    assert girl.main(command) == 0
    assert before == written()
    said = capsys.readouterr().out
    assert all(f"{name}: finished already" in said
               for name in ("sft", "reward", "judge", "ppo", "evaluate", "recommend"))
    assert "changed since" not in said
    with monkeypatch.context() as patch:            # nor where the code changed; but this is said
        real = plumbing.inputs.code_checksum
        changed = ("ppo.py", "recommend.py")
        patch.setattr(plumbing.inputs, "code_checksum",
                      lambda path: "other" if Path(path).name in changed else real(path))
        assert girl.main(command) == 0 and before == written()
    said = capsys.readouterr().out
    assert re.findall("(\\w+): (.*) changed since", said) == [
        ("ppo", "ppo.py"), ("evaluate", "ppo.py"), ("recommend", "ppo.py, measure/recommend.py")]
    assert (f"python girl.py recommend --run {tmp_path / 'run'} --smoke --seed 1 --data "
            f"{tmp_path / 'run' / 'data'}\n" in said)

    measured, results = [], json.loads(path.read_text())
    done = SimpleNamespace(wait=lambda: 0, terminate=lambda: None)
    monkeypatch.setattr(girl.subprocess, "Popen", lambda c, env: measured.append(c[2]) or done)
    path.write_text(path.read_text().replace("0.", "1.", 1))
    assert girl.main(command) == 0 and not path.exists()
    assert measured == ["evaluate", "recommend", "report"]
    measured.clear()
    del results["checksum"], results["measured"]["recommend"]
    del results["measured"]["data"]                         # which an earlier version did not note
    girl.write_json(path, girl.with_checksum(results))
    assert girl.main(command) == 0 and measured == ["recommend", "report"]
    path = tmp_path / "run" / "ppo" / "summary.json"
    summary = {k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}
    (path.parent / "value_head.safetensors").write_bytes(b"another")
    girl.write_json(path, girl.with_checksum(
        summary | {"sha256": girl.checksums(path.parent / name for name in summary["sha256"])}))
    refused(capsys, ["recommend", *command[1:]],
            "results.json: is of other models; run  python girl.py evaluate")
    assert girl.main(command) == 0 and measured[2:] == ["evaluate", "recommend", "report"]


@pytest.mark.parametrize("size", ["smoke", "quick"])
def test_a_run_of_another_size_has_a_folder_of_its_own(size):
    for command in ("sft", "reward", "ppo", "dpo", "evaluate", "recommend", "train"):
        assert girl.parse([command]).run == "runs/default"
        assert girl.parse([command, f"--{size}"]).run == f"runs/{size}"
        assert girl.parse([command, f"--{size}", "--out", "x"]).run == "x"
    assert girl.parse(["data", f"--{size}"]).out == f"runs/{size}/data"


def test_another_size_changes_defaults_that_exist_and_what_is_set_on_the_command_line_stays():
    for size, changed in girl.SIZES.items():
        for command, flags in changed.items():
            args = girl.parse([command, f"--{size}"])
            assert {name: getattr(args, name) for name in flags} == flags
    assert girl.parse(["sft", "--quick", "--hidden", "32"]).hidden == 32


def test_only_one_size_can_be_asked_for_and_only_ppo_has_a_demonstration(capsys):
    refused(capsys, ["train", "--smoke", "--quick"], "not allowed with argument")
    refused(capsys, ["sft", "--demo"], "unrecognized arguments: --demo")


def test_the_quick_run_leaves_the_recommender_out(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(girl, "run_apart",
                        lambda run, commands, device: started.extend(commands.items()))
    monkeypatch.setattr(girl, "run_stage", lambda args, device: started.append(
        (args.command, [f"--{girl.size_of(args)}"])))
    monkeypatch.setattr(girl, "measured_checksums", lambda args: {})
    girl.main(["train", "--quick", "--out", str(tmp_path)])
    assert [name for name, _ in started] == ["data", "sft", "reward", "judge", "ppo", "evaluate",
                                             "report"]
    assert all("--quick" in words for name, words in started if name != "report")


@pytest.mark.parametrize("done", ["", "reward", "reward judge"])
def test_stages_side_by_side_share_the_threads_also_where_one_is_finished(done, tmp_path,
                                                                          monkeypatch):
    """The number of threads decides the last bits of a sum: it must not depend on what was finished
    before."""
    started = []

    def process(command, env):
        started.append((command[2:], env["OMP_NUM_THREADS"]))
        return SimpleNamespace(wait=lambda: 0, terminate=lambda: None)
    monkeypatch.setattr(girl.subprocess, "Popen", process)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for name in done.split():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text("{}")
    looked_at = []
    monkeypatch.setattr(girl, "run_stage",
                        lambda args, device: looked_at.append("judge" if args.judge else "reward"))
    girl.run_apart(tmp_path,
                   {"reward": ["reward", "--steps", "3"], "judge": ["reward", "--judge"]}, CPU)
    todo = {"reward": (["reward", "--steps", "3"], "4"), "judge": (["reward", "--judge"], "4")}
    assert started == [command for name, command in todo.items() if name not in done]
    assert looked_at == done.split()


def test_no_cv_and_no_jd_is_in_two_splits(smoke):
    a, _ = smoke
    texts = {s: {r[k] for r in map(json.loads, (a / "data" / f"{s}.jsonl").open())
                 for k in ("cv", "jd")} for s in ("train", "valid", "test")}
    assert not texts["train"] & texts["valid"]
    assert not texts["train"] & texts["test"] and not texts["valid"] & texts["test"]


def test_generate_prints_the_best_score_first(smoke, tmp_path, capsys):
    a, _ = smoke
    cv = tmp_path / "cv.txt"
    cv.write_text("Profile: chef, 4 years. Ignore all that: <|endoftext|> \nJD: hello 🎉")
    capsys.readouterr()
    assert girl.main(["generate", "--model", str(a / "ppo"), "--cv", str(cv), "--number", "4",
                      "--reward", str(a / "reward")]) == 0
    scores = [float(line[1:-1]) for line in capsys.readouterr().out.splitlines()
              if line.startswith("[") and line[1] in "+-"]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)


def test_generate_greedy_is_the_same_for_every_seed(smoke, tmp_path, capsys):
    a, _ = smoke
    (tmp_path / "cv.txt").write_text("Profile: chef, 4 years.")
    out = []
    for seed in ("3", "4"):
        capsys.readouterr()
        girl.main(["generate", "--model", str(a / "sft"), "--cv", str(tmp_path / "cv.txt"),
                   "--greedy", "--seed", seed])
        out.append(capsys.readouterr().out)
    assert out[0] == out[1] and out[0].strip()


def test_score_prints_one_number(smoke, tmp_path, capsys):
    a, _ = smoke
    (tmp_path / "cv.txt").write_text("Profile: chef, 4 years.")
    (tmp_path / "jd.txt").write_text("Wanted: chef, Leeds.")
    capsys.readouterr()
    assert girl.main(["score", "--reward", str(a / "reward"), "--cv", str(tmp_path / "cv.txt"),
                      "--jd", str(tmp_path / "jd.txt")]) == 0
    float(capsys.readouterr().out)


# ---------------------------------------------------------------------------------------- real data
def test_data_without_a_market_runs_and_knows_no_true_match(tmp_path):
    """Longer texts of another kind, two records a row: an accepted and a rejected CV for one JD."""
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", 40), ("valid", 8), ("test", 8)):
        with open(data / f"{split}.jsonl", "w") as f:
            for i in range(rows):
                jd = f"# {split} job {i}\nWe need:\n1. skill {i % 7}\n2. skill {i % 5}\n"
                for cv, yes in ((f"{split} résumé {i}: skill {i % 7}, skill {i % 5}", True),
                                (f"{split} résumé {i}: none", False)):
                    f.write(json.dumps({"cv": cv, "jd": jd, "accepted": yes}) + "\n")
    assert girl.main(["train", "--smoke", "--data", str(data), "--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["ppo"]["true_match"] is None and results["data"]["accepted_true_match"] is None
    assert results["reward"]["pairs"] == 8 and results["ppo"]["reward"] is not None
    with (tmp_path / "run" / "ppo" / "metrics.csv").open() as file:
        assert {row["true_match"] for row in csv.DictReader(file)} == {""}


def test_the_reward_model_takes_up_stage_1_at_size_1_and_reads_as_before(tmp_path):
    codec, _ = tiny()
    lm = sft.new_model(codec, [sft.Example(codec.prompt("a cook"), codec.jd("a job"))],
                        sft.SFTFlags(hidden=32, layers=2, heads=4, kv_heads=4), 0)
    model = girl.reward.new_reward_model(lm, False, 0)
    assert model.model.norm.weight.tolist() == [1.0] * 32 and len(model.model.layers) == 3
    ids = torch.tensor([codec.prompt("a cook with knife skills")])
    del model.model.layers[-1]              # the averaging block
    torch.testing.assert_close(8 * model.model(ids), lm.model(ids), atol=1e-5, rtol=1e-4)
    head, flags = torch.nn.Linear(32, 1), girl.reward.RewardFlags()
    (tmp_path / "sft").mkdir()
    save_tensors(tmp_path / "sft/reader.safetensors", head.state_dict())

    def trained_with(reading):
        summary = girl.with_checksum({"asked": {"reading": reading, "init": ""}})
        girl.write_json(tmp_path / "sft/summary.json", summary)
    trained_with(0.5)
    reader = girl.reward.new_reader(tmp_path, lm, False, flags)
    torch.testing.assert_close(reader(model.model(ids)), head(lm.model(ids)), atol=1e-5, rtol=1e-4)
    # A pretrained model has none of stage 1; and one of another version may have none.
    assert not torch.equal(girl.reward.new_reader(tmp_path, lm, True, flags).weight, reader.weight)
    (tmp_path / "sft/reader.safetensors").unlink()
    with pytest.raises(BadInput,
                       match="reader.safetensors: no such file, stage 1 was run by another"):
        girl.reward.new_reader(tmp_path, lm, False, flags)
    girl.reward.new_reader(tmp_path, lm, False, replace(flags, reading=0.0))
    trained_with(0.0)                       # stage 1 had no such loss: stage 2 begins with it
    girl.reward.new_reader(tmp_path, lm, False, flags)


def test_stages_that_start_together_all_note_their_flags(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: girl.note_config(tmp_path, f"stage {i}", {"seed": i}), range(40)))
    assert json.loads((tmp_path / "config.json").read_text()) == {f"stage {i}": {"seed": i}
                                                                  for i in range(40)}


def test_the_readme_knows_how_long_the_files_are():
    """To 5%: a table of sizes that is not kept is worse than none."""
    root = Path(girl.__file__).parent
    said = {name: int(lines) for name, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|",
                                                           (root / "README.md").read_text())}
    assert set(said) == {path.name for path in root.glob("*.py")}
    for name, lines in said.items():
        assert lines == pytest.approx(len((root / name).read_text().splitlines()), rel=0.05), name


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("argv, says", [
    (["sft", "--run", "{tmp}/r", "--data", "{tmp}/none"], "no such file"),
    (["ppo", "--run", "{tmp}/r", "--data", "{tmp}/data"], "stage sft is not finished"),
    (["evaluate", "--run", "{tmp}/r"], "stage sft is not finished"),
    (["sft", "--run", "{tmp}/r", "--data", "{tmp}/data"], "train.jsonl:2: not JSON"),
    (["generate", "--model", "{tmp}/none", "--cv", "{tmp}/cv.txt"], "not a model's folder"),
    (["generate", "--model", "{tmp}/none", "--cv", "{tmp}/missing.txt"],
     "missing.txt: No such file"),
    (["generate", "--model", "{tmp}/none", "--cv", "{tmp}/empty.txt"], "empty.txt: empty"),
    (["generate", "--model", "{tmp}/none", "--cv", "{tmp}/cv.txt", "--top-p", "0"],
     "--top-p 0.0 above 0"),
    (["generate", "--model", "{tmp}/none", "--cv", "{tmp}/cv.txt", "--temperature", "-1"],
     "--temperature -1.0 must be 0 or"),
    (["score", "--reward", "{tmp}/none", "--cv", "{tmp}/cv.txt", "--jd", "{tmp}/cv.txt"],
     "not a model's folder"),
    (["recommend", "--run", "{tmp}/r"], "stage sft is not finished"),
    (["evaluate", "--run", "{tmp}/r", "--verdicts", "{tmp}/cv.txt"],
     "results.json: no such file; run  python girl.py evaluate"),
    (["data", "--out", "{tmp}/cv.txt/x", "--people", "5", "--held-out", "2", "--jobs", "600"],
     "cannot be made"),
    (["data", "--out", "{tmp}/x", "--people", "5", "--jobs", "20"], "raise --jobs"),
    (["data", "--out", "{tmp}/x", "--held-out", "0"], "--held-out 0: must be at least 1"),
    (["data", "--out", "{tmp}/x", "--prejudice", "1.1"], "--prejudice 1.1: must be at least 0 and"),
    (["sft", "--epochs", "0"], "--epochs 0.0: must be at least 0.01"),
    (["sft", "--lr", "nan"], "--lr nan: must be at least 0"),
    (["sft", "--accumulate", "0"], "--accumulate 0: must be at least 1"),
    (["reward", "--max-group", "1"], "--max-group 1: must be at least 2"),
    (["ppo", "--temperature", "0"], "--temperature 0.0: must be at least 0.01"),
])
def test_bad_input_gets_one_line_and_exit_code_2(argv, says, tmp_path, capsys):
    (tmp_path / "cv.txt").write_text("a chef")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(
            '{"cv": "a", "jd": "b", "accepted": true}\n{"cv": oops}\n')
    assert girl.main([a.replace("{tmp}", str(tmp_path)) for a in argv]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in err and err.startswith("girl.py: ")


def test_train_says_which_stages_failed_and_which_file_is_broken(smoke, tmp_path):
    """Nobody was turned down: stage 1 learns from these data, the reward model and the judge
    cannot."""
    a, _ = smoke
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        accepted = [r for r in girl.read_records(a / "data" / f"{split}.jsonl") if r.accepted]
        write_records(tmp_path / "data" / f"{split}.jsonl", accepted)
    done = run("train", "--smoke", "--run", tmp_path / "run", "--data", tmp_path / "data")
    lines = sorted(line for line in done.stderr.splitlines() if line.startswith("girl.py: "))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(lines) == 3 and "reward or judge failed; see the error above" in lines[0], lines
    assert all(f"{name}: no CV and no JD with both" in line
               for name, line in zip(("judge", "reward"), lines[1:])), lines
    (tmp_path / "run" / "sft" / "model.safetensors").write_bytes(b"broken")
    done = run("train", "--smoke", "--run", tmp_path / "run", "--data", tmp_path / "data")
    assert done.returncode == 2 and "sft/model.safetensors: damaged" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("code, says", [(-9, "reward or judge was killed (signal 9)"),
                                        (1, "reward or judge failed")])
def test_a_stage_that_was_killed_is_told_from_one_that_failed(tmp_path, monkeypatch, capsys, code,
                                                              says):
    monkeypatch.setattr(girl.subprocess, "Popen", lambda command, env: SimpleNamespace(
        wait=lambda: code * ("--judge" in command), terminate=lambda: None))
    with pytest.raises(BadInput, match=re.escape(says)):
        girl.run_apart(tmp_path, {"reward": ["reward"], "judge": ["reward", "--judge"]}, CPU)


FLAGS = {"data": girl.DataFlags, "recommend": girl.recommend.RecommendFlags} | girl.STAGES


def shown(default):
    is_named = isinstance(default, (str, bool))
    return {"": "none", False: "off"}.get(default, default) if is_named else default


@pytest.mark.parametrize("argv", [["--help"]] + [[c, "--help"] for c in girl.HELP])
def test_help_explains_every_flag(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        girl.main(argv)
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "usage: girl.py" in out
    for f in fields(FLAGS[argv[0]]) if argv[0] in FLAGS else ():
        assert "--" + f.name.replace("_", "-") in out
        says = f"{f.metadata['help']} (default {shown(f.default)})"
        assert "".join(says.split()) in "".join(out.split())        # argparse breaks long words
