"""Nothing is lost: a stage that is cut short goes on where it was, and ends bit for bit where it
would have ended."""
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import girl
import plumbing.inputs
import plumbing.stage
from plumbing import files
from conftest import STAGES, argv, refused
from learn.copies import copy_project
from plumbing.files import BadInput, read_json
from plumbing.stage import Stage


def results(folder):
    """Every file of a finished stage, its kept states too; of summary.json what does not depend on
    the clock."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    summary = json.loads(files.pop("summary.json"))
    return files, {k: v for k, v in summary.items()
                   if k not in ("started", "seconds", "peak_rss_mb", "checksum")}


def begin(whole, tmp_path, name):
    """A copy of the run as it was before this stage."""
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    for later in list(STAGES)[list(STAGES).index(name):]:
        shutil.rmtree(run / later)
    return run


class Cut(BaseException):
    """As if the machine went off: nothing catches it."""


def cut_at(monkeypatch, n, where="checkpoint", owner=Stage):
    """The n-th call of a Stage's method, or of another function, is the last."""
    calls, real = [], getattr(owner, where)

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == n:
            raise Cut
        return real(*args, **kwargs)
    monkeypatch.setattr(owner, where, call)
    return calls


@pytest.mark.parametrize("name, n", [(name, n) for name in STAGES for n in (2, 3, 5, 7, 9)
                                     if name != "ppo" or n == 2])
def test_wherever_a_stage_is_cut_its_end_is_the_same(whole, tmp_path, monkeypatch, capsys, name, n):
    """Within an epoch, between two, after an iteration of PPO: a state is saved after every step,
    and at the n-th the process ends."""
    folder = begin(whole, tmp_path, name) / name
    command = argv(name, tmp_path / "run", whole / "data", "--save-seconds", "0")
    with monkeypatch.context() as m, pytest.raises(Cut):
        cut_at(m, n)
        girl.main(command)
    assert not (folder / "summary.json").exists() and (folder / "state.json").exists()
    capsys.readouterr()
    assert girl.main(command) == 0
    assert f"{name}: resumed at step {n - 1} of " in capsys.readouterr().out
    assert results(folder) == results(whole / "run" / name)


def test_an_iteration_of_ppo_that_was_cut_short_is_done_again_from_the_state_before_it(
        whole, tmp_path, monkeypatch):
    """Cut in the rollout and in the update of the second iteration: the weights, the optimizer and
    the critic's sums are those after the first. The sums hold the critic's own rollout, and those
    of the iterations; its fit is saved."""
    folder = begin(whole, tmp_path, "ppo") / "ppo"
    command = argv("ppo", tmp_path / "run", whole / "data")
    real, critics, sums = girl.ppo.train, [], []
    monkeypatch.setattr(girl.ppo, "train", lambda *args: critics.append(real(*args)) or critics[-1])
    fit = girl.ppo.Critic.fit
    monkeypatch.setattr(girl.ppo.Critic, "fit", lambda critic, *args: (
        fit(critic, *args), sums.append({"critic.xx": critic.xx, "critic.xy": critic.xy})))
    # The state of the first iteration is there, whatever --save-seconds says; an update has eight
    # micro-batches.
    for where, n, fits in (("roll_out", 3, 2), ("minibatch_loss", 3, 3), ("roll_out", 1, 3)):
        with monkeypatch.context() as m, pytest.raises(Cut):
            cut_at(m, n, where, girl.ppo)
            girl.main(command)
        state = load_file(folder / read_json(folder / "state.json")["tensors"])
        assert len(sums) == fits and all(torch.equal(state[name], x) for name, x in sums[1].items())
    assert read_json(folder / "state.json")["step"] == 1
    assert girl.main(command) == 0 and len(sums) == 4
    weight, head = critics[0][1].weight(), load_file(folder / "value_head.safetensors")
    assert torch.equal(head["weight"], weight[None, :-1]) and torch.equal(head["bias"], weight[-1:])
    assert weight.abs().min() > 0
    assert results(folder) == results(whole / "run" / "ppo")


def test_ctrl_c_stops_ppo_at_once(whole, tmp_path, monkeypatch, capsys):
    """Not after the iteration: its state is that of the one before."""
    folder = begin(whole, tmp_path, "ppo") / "ppo"
    command = argv("ppo", tmp_path / "run", whole / "data")
    real, calls = girl.ppo.minibatch_loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 9:     # an update has eight micro-batches: this is the second one's first
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    with monkeypatch.context() as m:
        m.setattr(girl.ppo, "minibatch_loss", interrupted)
        assert girl.main(command) == 130
    assert len(calls) == 9
    assert "ppo: stopped; the same command will resume after step 1 of 2" in capsys.readouterr().out
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / "ppo")


def test_a_ppo_state_of_an_earlier_version_is_refused_in_one_line(whole, tmp_path, monkeypatch,
                                                                  capsys):
    """The critic was trained with the policy, by flags that are gone; later its sums had other
    names."""
    folder, command = interrupted(whole, tmp_path, monkeypatch, "ppo")
    state = files.read_checked(folder / "state.json", "")
    state["asked"] |= {"value_clip": 0.2, "value_coef": 0.5}
    files.write_json(folder / "state.json", files.with_checksum(state))
    refused(capsys, command, f"{folder}: was begun by another version of GIRL, "
                             "with --value-clip 0.2; ", "delete this one")
    tensors = folder / state["tensors"]
    files.save_tensors(tensors, {name.replace("critic.", "more.critic."): t
                                 for name, t in load_file(tensors).items()})
    for name in ("value_clip", "value_coef"):
        del state["asked"][name]
    files.write_json(folder / "state.json",
                     files.with_checksum(state | {"sha256": files.sha256(tensors)}))
    refused(capsys, command, f"{tensors}: of another model or version, critic.xx is missing or "
                             f"has another shape; delete {folder} to start")


def test_code_that_changed_anywhere_but_in_a_later_stage_is_noted():
    """Of a stage every file that it can depend on is noted."""
    noted = {file for name in ("ppo", "dpo", "recommend") for file in plumbing.inputs.code_of(name)}
    root = plumbing.inputs.HOME
    files = {str(path.relative_to(root)) for folder in (root, root / "plumbing", root / "measure")
             for path in folder.glob("*.py")}
    others = {"market.py", "measure/demo.py", "measure/report.py", "measure/trace.py",
              "plumbing/table.py", "plumbing/plan.py",
              "measure/__init__.py", "plumbing/__init__.py"}
    assert noted == files - others


def test_code_that_is_edited_while_it_runs_is_noted_as_it_runs(tmp_path):
    copy = copy_project(tmp_path / "copy", ".solutions")
    code = """
import girl
from plumbing import inputs
for name in ("ppo.py", "market.py"):
    open(name, "a").write("x = 1")
print(inputs.code_of("ppo")["ppo.py"], inputs.code_checksum(inputs.MARKET))
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    expected = [plumbing.inputs.code_checksum(plumbing.inputs.HOME / name)
                for name in ("ppo.py", "market.py")]
    assert said.stdout.split() == expected, said.stderr


def test_a_stage_cut_while_it_saves_goes_on_from_the_state_before(whole, tmp_path, monkeypatch):
    """The tensors of the fourth state are written, its state.json is not: the third one still names
    its own."""
    folder = begin(whole, tmp_path, "reward") / "reward"
    command = argv("reward", tmp_path / "run", whole / "data", "--save-seconds", "0")
    real, calls = files.write_json, []

    def write(path, value):
        calls.extend([path] * (path.name == "state.json"))
        if len(calls) == 4:
            raise Cut
        real(path, value)
    with monkeypatch.context() as m, pytest.raises(Cut):
        m.setattr(plumbing.stage, "write_json", write)
        girl.main(command)
    assert read_json(folder / "state.json")["step"] == 3 and len(list(folder.glob("state-*"))) == 2
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / "reward")


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_stage_cut_at_its_end_goes_on_to_its_end(whole, tmp_path, monkeypatch, name):
    folder = begin(whole, tmp_path, name) / name
    command = argv(name, tmp_path / "run", whole / "data", "--save-seconds", "0")
    with monkeypatch.context() as m, pytest.raises(Cut):
        cut_at(m, 1, "finish")
        girl.main(command)
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / name)


def test_what_a_killed_process_left_is_cleared_away(whole, tmp_path, monkeypatch):
    """Killed while it wrote a file, and between the last file and the end."""
    folder = begin(whole, tmp_path, "reward") / "reward"
    command = argv("reward", tmp_path / "run", whole / "data", "--save-seconds", "0")
    with monkeypatch.context() as m, pytest.raises(Cut):
        cut_at(m, 4)
        girl.main(command)
    state = {p: p.read_bytes() for p in folder.glob("state*")}
    left = [folder / ".state-1.safetensors.4711.tmp", folder.parent / ".config.json.4711.tmp"]
    for path in left:
        path.write_bytes(b"half")
    assert girl.main(command) == 0 and not any(path.exists() for path in left)
    for path, content in state.items():
        path.write_bytes(content)
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / "reward")


def test_without_a_state_a_stage_begins_anew(whole, tmp_path, monkeypatch):
    """Cut before the first state was due."""
    folder = begin(whole, tmp_path, "sft") / "sft"
    command = argv("sft", tmp_path / "run", whole / "data", "--save-seconds", "60")
    with monkeypatch.context() as m, pytest.raises(Cut):
        cut_at(m, 3)
        girl.main(command)
    assert list(folder.iterdir()) == []
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / "sft")


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_stage_at_its_next_safe_point_with_a_state(whole, tmp_path, monkeypatch,
                                                                     capsys, number):
    folder = begin(whole, tmp_path, "sft") / "sft"
    command = argv("sft", tmp_path / "run", whole / "data", "--save-seconds", "60")
    real = Stage.log

    def log(self, **row):                       # the signal comes within a step
        real(self, **row)
        if row["step"] == 4:
            os.kill(os.getpid(), number)
    with monkeypatch.context() as m:
        m.setattr(Stage, "log", log)
        assert girl.main(command) == 130
    assert read_json(folder / "state.json")["step"] == 4
    steps = [row["step"] for row in csv.DictReader((folder / "metrics.csv").open())]
    assert steps == ["1", "2", "3", "4"]                    # to be looked at meanwhile
    said = capsys.readouterr()
    assert "sft: stopped; the same command will resume after step 4 of " in said.out
    assert "interrupted" in said.err and "Traceback" not in said.err
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / "sft")


def test_an_epoch_whose_last_step_is_interrupted_is_validated_before_the_stage_stops(
        whole, tmp_path, monkeypatch, capsys):
    """Each epoch once: not left out, because the resumed run begins after it, and not twice."""
    folder = begin(whole, tmp_path, "sft") / "sft"
    command = argv("sft", tmp_path / "run", whole / "data", "--save-seconds", "60")
    # Of one epoch: there are four.
    real, steps = Stage.log, read_json(whole / "run" / "sft" / "summary.json")["steps"] // 4

    def log(self, **row):
        real(self, **row)
        if row["step"] == steps:
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as m:
        m.setattr(Stage, "log", log)
        assert girl.main(command) == 130
    assert re.findall(r"sft epoch (\d)", capsys.readouterr().out) == ["1"]
    assert read_json(folder / "state.json")["step"] == steps
    assert girl.main(command) == 0
    assert re.findall(r"sft epoch (\d)", capsys.readouterr().out) == ["2", "3", "4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_step_ends_the_stage_at_once(whole, tmp_path, monkeypatch, capsys,
                                                             number):
    """The last step is saved always: nothing is lost, and `train` does not begin the next stage."""
    folder = begin(whole, tmp_path, "reward") / "reward"
    command = argv("reward", tmp_path / "run", whole / "data", "--save-seconds", "60")
    with monkeypatch.context() as m:
        m.setattr(girl.reward, "sample_rows",
                  lambda *args: os.kill(os.getpid(), number) or time.sleep(5))
        assert girl.main(command) == 130
    assert read_json(folder / "state.json")["step"] == 10 and not (folder / "summary.json").exists()
    assert "resume after step 10 of 10" in capsys.readouterr().out
    monkeypatch.setattr(girl.reward, "reward_step", None)        # no step is done twice
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / "reward")


def test_the_second_ctrl_c_ends_a_stage_at_once_and_a_second_sigterm_does_not(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Stage(tmp_path, "sft") as stage:
        stage.checkpoint(1)             # not saved yet
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stage.stopped
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_train_hands_a_sigterm_on_to_its_stages(whole, tmp_path):
    """None of them is left behind at work, and none has come to its end."""
    command = [sys.executable, girl.__file__, "train", "--smoke", "--run", str(tmp_path / "run"),
               "--data", str(whole / "data")]
    train = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True)
    while not (tmp_path / "run" / "judge").exists():
        assert train.poll() is None, train.communicate()
        time.sleep(0.05)
    train.send_signal(signal.SIGTERM)
    said, _ = train.communicate(timeout=60)
    assert train.returncode == 130 and "Traceback" not in said
    assert not (tmp_path / "run" / "judge" / "summary.json").exists()
    with pytest.raises(ProcessLookupError):     # the group is empty: the child has ended too
        os.killpg(train.pid, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_waits_for_its_stages_also_where_it_is_told_to_stop_again(whole, tmp_path,
                                                                        monkeypatch, number):
    """While they save."""
    said = []

    class Child:
        def __init__(self, command, env):
            self.name = "judge" if "--judge" in command else command[2]
            assert girl.parse(command[2:]).save_seconds == 7

        def terminate(self):
            said.append(f"stop {self.name}")

        def wait(self):
            os.kill(os.getpid(), number)
            said.append(f"{self.name} ended")
    begin(whole, tmp_path, "reward")
    monkeypatch.setattr(girl.subprocess, "Popen", Child)
    monkeypatch.setattr(girl, "run_stage", lambda args, device: None)
    assert girl.main(["train", "--smoke", "--save-seconds", "7", "--run", str(tmp_path / "run"),
                      "--data", str(whole / "data")]) == 130
    assert said == ["stop reward", "stop judge", "reward ended", "judge ended"]


# ------------------------------------------------------------------------- what is not gone on with
def interrupted(whole, tmp_path, monkeypatch, name="reward"):
    folder = begin(whole, tmp_path, name) / name
    command = argv(name, tmp_path / "run", whole / "data", "--save-seconds", "0")
    with monkeypatch.context() as m, pytest.raises(Cut):
        cut_at(m, 2 if name == "ppo" else 4)
        girl.main(command)
    return folder, command


def test_other_flags_or_another_seed_are_refused_and_named(whole, tmp_path, monkeypatch, capsys):
    folder, command = interrupted(whole, tmp_path, monkeypatch)
    before = ({p.name: p.read_bytes() for p in folder.iterdir()},
              (tmp_path / "run" / "config.json").read_bytes())
    refused(capsys, command + ["--lr", "0.5"], str(folder), "--lr 0.001, not 0.5")
    refused(capsys, command + ["--seed", "3"], "--seed 0, not 3")
    assert before == ({p.name: p.read_bytes() for p in folder.iterdir()},
                      (tmp_path / "run" / "config.json").read_bytes())
    # How often it saves is not what it learns.
    assert girl.main(command + ["--save-seconds", "5"]) == 0
    assert results(folder) == results(whole / "run" / "reward")
    refused(capsys, command + ["--lr", "0.5"], "finished with --lr 0.001, not 0.5")
    (tmp_path / "run" / "config.json").unlink()     # what it was finished with is in its summary
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / "reward")


def test_train_does_not_mix_stages_that_were_finished_with_other_flags(whole, tmp_path, capsys):
    command = ["train", "--smoke", "--run", str(tmp_path / "run")]
    begin(whole, tmp_path, "ppo")
    refused(capsys, [*command, "--data", str(whole / "data")],
            "run/sft: was finished with --epochs 4.0, not 1")
    shutil.copytree(whole / "data", tmp_path / "run" / "data")
    refused(capsys, command, "run/data: was made with --people 90, not 300")
    assert girl.main(["data", "--smoke", "--out", str(tmp_path / "run" / "data")]) == 0
    refused(capsys, [*command, "--seed", "3"], "run/data: was made with --seed 0, not 3")
    assert not (tmp_path / "run" / "ppo").exists()


def test_a_finished_stage_of_other_data_is_refused(whole, tmp_path, capsys):
    shutil.copytree(whole / "data", tmp_path / "data")
    (tmp_path / "data" / "summary.json").unlink()       # they are no longer what `data` made
    run = begin(whole, tmp_path, "ppo")
    assert girl.main(argv("sft", run, tmp_path / "data")) == 0
    (tmp_path / "data" / "valid.jsonl").write_bytes(
        (tmp_path / "data" / "valid.jsonl").read_bytes() + b"\n")
    refused(capsys, argv("sft", run, tmp_path / "data"),
            "run/sft: was finished with another valid.jsonl")
    refused(capsys, argv("reward", run, tmp_path / "data"),
            "run/reward: was finished with another valid.jsonl")


def test_another_number_of_threads_is_named(whole, tmp_path, monkeypatch, capsys):
    """Sums may be rounded otherwise; whoever moves a run to another machine is told so, and not
    refused."""
    folder, command = interrupted(whole, tmp_path, monkeypatch)
    threads = plumbing.stage.torch.get_num_threads()
    monkeypatch.setattr(plumbing.stage.torch, "get_num_threads", lambda: threads + 3)
    capsys.readouterr()
    assert girl.main(command) == 0
    assert (f"reward: began with threads {threads}, resumes with {threads + 3}"
            in capsys.readouterr().out)


def changed_code(monkeypatch, **changes):
    """As if these files held other code."""
    real = plumbing.inputs.code_checksum
    monkeypatch.setattr(plumbing.inputs, "code_checksum",
                        lambda path: changes.get(Path(path).stem) or real(path))


def test_code_that_changed_since_a_stage_was_stopped_is_named(whole, tmp_path, monkeypatch, capsys):
    """A student mends a line and goes on: allowed, but the steps before came from the old code."""
    folder, command = interrupted(whole, tmp_path, monkeypatch, "ppo")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        changed_code(patch, ppo="other", model="other", sft="not asked for")
        assert girl.main(command) == 0
        says = ("ppo: model.py, ppo.py changed since this stage began; to start it over with the "
                f"present code, delete {folder}")
        assert says in capsys.readouterr().out
        # Finished, and still said: its first steps came from other code.
        assert girl.main(command) == 0
        assert ("ppo: model.py, ppo.py changed since this stage began; to run it with the present "
                f"code, delete {folder}" in capsys.readouterr().out)
    assert girl.main(command) == 0              # back to the code that began it
    assert "changed since" not in capsys.readouterr().out


def test_states_and_summaries_of_an_earlier_version_name_no_code(tmp_path, capsys):
    for finish in (False, True):
        with Stage(tmp_path, "sft", 0) as stage:
            assert stage.begin({}, {}, {})
            stage.total(2)
            stage.resume({}, [])
            stage.log(step=1)
            stage.finish() if finish else stage.checkpoint(1)
        for name in ("state.json", "summary.json"):
            if (path := tmp_path / "sft" / name).exists():
                raw = files.read_checked(path, "")
                del raw["code"]
                files.write_json(path, files.with_checksum(raw))
        with Stage(tmp_path, "sft") as stage:
            assert stage.begin({}, {}, {"sft.py": "x"}) != finish
            if not finish:
                stage.total(2)
                stage.resume({}, [])
    said = capsys.readouterr().out
    assert "resumed at step 1" in said and "finished already" in said
    for remedy in ("to start it over", "to run it"):
        assert ("sft: the code, which was not recorded, may have changed since this stage began; "
                f"{remedy} with the present code, delete" in said)


@pytest.mark.parametrize("old, new", [("0.95 *", "0.9 *"), ("** -spare", "** (-2 * spare)"),
                                      ('"Exeter": 1', '"Exeter": 2'),
                                      ("You bring: {degree}", "You bring {degree}")])
def test_data_of_other_rules_are_refused_by_whatever_uses_them(whole, tmp_path, monkeypatch, capsys,
                                                               old, new):
    rules = Path(girl.market.__file__).read_text()
    assert rules.count(old) == 1
    (tmp_path / "market.py").write_text(rules.replace(old, new))
    monkeypatch.setattr(plumbing.inputs, "MARKET", tmp_path / "market.py")
    more = ["--smoke", "--run", str(whole / "run"), "--data", str(whole / "data")]
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    for command in (["sft"], ["reward"], ["reward", "--judge"], ["ppo"], ["evaluate"],
                    ["recommend"], ["train"]):
        refused(capsys, command + more, "market.json: market.py changed since these data were made",
                "make new data in a new run")
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    refused(capsys, ["train", "--smoke", "--run", str(tmp_path / "new"),
                     "--data", str(whole / "data")], "market.py changed since")
    (tmp_path / "market.py").write_text("# what a comment says is no rule\n" + rules)
    for remembered in (plumbing.inputs.code_checksum, plumbing.inputs.source_of):
        remembered.cache_clear()
    assert girl.main(argv("sft", whole / "run", whole / "data")) == 0


def test_a_market_of_an_earlier_version_which_noted_no_rules_is_used(whole, tmp_path):
    shutil.copytree(whole / "data", tmp_path / "data")
    path = tmp_path / "data" / "market.json"
    path.write_text(json.dumps({k: v for k, v in read_json(path).items() if k != "rules"}))
    girl.check_rules(tmp_path / "data")


@pytest.mark.parametrize("before", [
    "755458b125a4043b878ffb992f5b054cae3dd0aa1b6d76614f924f3ac18e8698",
    "cdc44ef5767a507a4ff985cbc15f64c9121e2b05a6dd5b5d9690d3cb6a1b9759",
    "6e0ff1db6bc481c52fdec62f56aa79cbf4559ac9763fb0229aee7b5d6d80235b"])
def test_a_market_of_versions_before_this_one_is_used_while_the_rules_are_the_same(
        whole, tmp_path, monkeypatch, before):
    shutil.copytree(whole / "data", tmp_path / "data")
    path = tmp_path / "data" / "market.json"
    path.write_text(json.dumps(read_json(path) | {"rules": before}))
    girl.check_rules(tmp_path / "data")
    (tmp_path / "market.py").write_text(
        plumbing.inputs.MARKET.read_text().replace("0.95 *", "0.9 *"))
    monkeypatch.setattr(plumbing.inputs, "MARKET", tmp_path / "market.py")
    with pytest.raises(BadInput, match="market.py changed since"):
        girl.check_rules(tmp_path / "data")


def test_other_data_and_another_model_before_it_are_refused_and_named(whole, tmp_path, monkeypatch,
                                                                      capsys):
    shutil.copytree(whole / "data", tmp_path / "data")
    (tmp_path / "data" / "summary.json").unlink()       # they are no longer what `data` made
    folder, command = interrupted(whole, tmp_path, monkeypatch)
    command[command.index("--data") + 1] = str(tmp_path / "data")
    for file in ("train.jsonl", "valid.jsonl", "probes.jsonl", "market.json"):
        path = tmp_path / "data" / file
        path.write_bytes(path.read_bytes() + b"\n")
        refused(capsys, command, f"begun with another {file}")
        shutil.copy(whole / "data" / file, path)
    shutil.copytree(tmp_path / "run" / "sft", tmp_path / "sft")
    shutil.rmtree(tmp_path / "run" / "sft")
    assert girl.main(argv("sft", tmp_path / "run", whole / "data", "--seed", "7")) == 0
    refused(capsys, command, "begun with another sft/model.safetensors")
    shutil.rmtree(tmp_path / "run" / "sft")
    shutil.copytree(tmp_path / "sft", tmp_path / "run" / "sft")
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / "reward")


def test_two_processes_do_not_measure_one_run(whole, tmp_path, capsys):
    """In the same way: an evaluation and a recommender may, see test_evaluate.py."""
    shutil.copytree(whole / "run", tmp_path / "run")
    more = ["--smoke", "--run", str(tmp_path / "run"), "--data", str(whole / "data")]
    for name in ("evaluate", "recommend"):
        with files.locked(tmp_path / "run" / name):
            refused(capsys, [name, *more], f"run/{name}: another process is at work on it")
        assert not (tmp_path / "run" / name).exists()
        assert not (tmp_path / "run" / "results.json").exists()


def test_models_that_do_not_belong_together_are_not_used_together(whole, tmp_path, capsys):
    """Stage 1 was run again with another seed; the later stages come from the model before."""
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "sft")
    assert girl.main(argv("sft", tmp_path / "run", whole / "data", "--seed", "7")) == 0
    more = ["--smoke", "--run", str(tmp_path / "run"), "--data", str(whole / "data")]
    for command in (argv("ppo", tmp_path / "run", whole / "data"),
                    ["evaluate", *more], ["recommend", *more]):
        refused(capsys, command, "run/reward: was trained with a different sft/model.safetensors")
    shutil.rmtree(tmp_path / "run" / "sft")
    shutil.copytree(whole / "run" / "sft", tmp_path / "run" / "sft")
    shutil.rmtree(tmp_path / "run" / "reward")
    assert girl.main(argv("reward", tmp_path / "run", whole / "data", "--seed", "7")) == 0
    refused(capsys, ["recommend", *command[1:]], "run/ppo: was trained with a different reward/")


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(whole, tmp_path, capsys):
    folder = begin(whole, tmp_path, "reward") / "reward"
    command = argv("reward", tmp_path / "run", whole / "data")
    folder.mkdir()
    hold = ("import sys, time; from plumbing import files; held = files.lock(sys.argv[1]); "
            "print('held', flush=True); time.sleep(600)")
    other = subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE,
                             text=True, cwd=Path(girl.__file__).parent)
    assert other.stdout.readline() == "held\n"
    before = (tmp_path / "run" / "config.json").read_bytes()
    refused(capsys, command, str(folder), "another process is at work on it")
    with files.locked(tmp_path / "data"):
        refused(capsys, ["data", "--smoke", "--out", str(tmp_path / "data")],
                "/data: another process is at work on it")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    other.kill()
    other.wait()
    assert girl.main(command) == 0


# ------------------------------------------------------------------------------------------- damage
def flip(path):
    """One bit; in summary.json one of a checksum, so that it stays JSON."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(b'"sha256"') + 60 if path.name == "summary.json" else len(raw) * 2 // 3] ^= 1
    path.write_bytes(raw)


DAMAGE = {"flipped": flip, "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
          "missing": lambda path: path.unlink()}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "metrics.csv",
                                  "tokenizer.json", "tokenizer_config.json", "summary.json"])
def test_a_damaged_file_of_a_finished_stage_is_refused_and_named(whole, tmp_path, capsys, file,
                                                                 how):
    run = begin(whole, tmp_path, "ppo")
    DAMAGE[how](run / "reward" / file)
    # Then it is a stage that did not come to its end.
    if (file, how) == ("summary.json", "missing"):
        refused(capsys, argv("ppo", run, whole / "data"), "reward: stage reward is not finished")
        return
    truncated = "cannot be read as JSON" if file == "summary.json" else "checksum"
    says = {"missing": "missing", "truncated": truncated, "flipped": "checksum"}
    refused(capsys, argv("ppo", run, whole / "data"), f"reward/{file}: ", says[how])
    (tmp_path / "cv.txt").write_text("A cook")
    (tmp_path / "jd.txt").write_text("A kitchen")
    refused(capsys, ["score", "--reward", str(run / "reward"), "--cv", str(tmp_path / "cv.txt"),
                     "--jd", str(tmp_path / "jd.txt")], file)
    before = {p.name: p.read_bytes() for p in (run / "reward").iterdir()}
    # Nor does the stage say that it is finished.
    refused(capsys, argv("reward", run, whole / "data"), f"reward/{file}: ")
    assert before == {p.name: p.read_bytes() for p in (run / "reward").iterdir()}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", ["train.jsonl", "test.jsonl", "probes.jsonl", "market.json"])
def test_a_damaged_data_set_is_refused_and_named(whole, tmp_path, capsys, file, how):
    shutil.copytree(whole / "data", tmp_path / "data")
    DAMAGE[how](tmp_path / "data" / file)
    missing = "is missing" if file in ("probes.jsonl", "market.json") else "no such file"
    says = {"missing": missing}.get(how, "it does not match its checksum")
    refused(capsys, argv("sft", tmp_path / "run", tmp_path / "data"), f"data/{file}: ", says)
    if says != "no such file":
        refused(capsys, ["evaluate", "--smoke", "--run", str(whole / "run"),
                         "--data", str(tmp_path / "data")], f"data/{file}: ", says)


def test_notes_beside_a_model_are_nobodys_business(whole, tmp_path):
    run = begin(whole, tmp_path, "reward")
    (run / "sft" / "notes.txt").write_text("mine")
    assert girl.main(argv("reward", run, whole / "data")) == 0
    (run / "sft" / "notes.txt").unlink()
    assert girl.main(argv("ppo", run, whole / "data")) == 0


def test_a_stage_whose_folder_was_taken_away_does_not_write_into_another(whole, tmp_path,
                                                                         monkeypatch, capsys):
    """Deleted, and made anew by another process, while the stage was at work."""
    folder = begin(whole, tmp_path, "reward") / "reward"
    command = argv("reward", tmp_path / "run", whole / "data", "--save-seconds", "0")
    real = Stage.log

    def log(self, **row):
        real(self, **row)
        if row["step"] == 3:
            shutil.rmtree(folder)
            folder.mkdir()
    with monkeypatch.context() as m:
        m.setattr(Stage, "log", log)
        refused(capsys, command, "run/reward: was deleted or moved while reward was running")
    assert not list(folder.iterdir())
    with monkeypatch.context() as m:            # also after the last step, while samples are scored
        m.setattr(girl.reward, "sample_rows",
                  lambda *args: shutil.rmtree(folder) or folder.mkdir() or [])
        m.setattr(girl.reward, "standardize", lambda *args: None)
        refused(capsys, command, "run/reward: was deleted or moved while reward was running")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("file", ["sft/reader.safetensors", "ppo/value_head.safetensors"])
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_heads_are_refused_and_named(whole, tmp_path, capsys, file, how):
    shutil.copytree(whole / "run", tmp_path / "run")
    DAMAGE[how](tmp_path / "run" / file)
    refused(capsys, ["evaluate", "--smoke", "--run", str(tmp_path / "run"),
                     "--data", str(whole / "data")], f"{file}: ")


@pytest.mark.parametrize("file", ["summary.json", "../config.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", '"text"', "{", '{"reward": 3}',
                                     '{"sha256": [], "asked": 3}'])
def test_summary_and_config_of_another_kind_are_refused(whole, tmp_path, capsys, file, content):
    run = begin(whole, tmp_path, "ppo")
    (run / "reward" / file).write_text(content)
    # An object: it is only noted in, and never relied upon.
    if file == "../config.json" and content[1:2] == '"':
        assert girl.main(argv("ppo", run, whole / "data")) == 0
    else:
        refused(capsys, argv("ppo", run, whole / "data"), Path(file).name)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_state_is_refused_and_named(whole, tmp_path, monkeypatch, capsys, how):
    folder, command = interrupted(whole, tmp_path, monkeypatch)
    DAMAGE[how](next(folder.glob("state-*")))
    refused(capsys, command, "state-", "missing or damaged")


@pytest.mark.parametrize(
    "change", [lambda text: "", lambda text: "{", lambda text: "[]", lambda text: '{"step": 3}',
               lambda text: text.replace('"step": 3', '"step": 2', 1)])
def test_a_damaged_state_json_is_refused(whole, tmp_path, monkeypatch, capsys, change):
    folder, command = interrupted(whole, tmp_path, monkeypatch)
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(change(text))
    assert change(text) != text
    refused(capsys, command, "state.json")


# ------------------------------------------------------------------------------------- other faults
@pytest.mark.parametrize("name, where, step",
                         [("sft", "sft_step", "step 3"), ("reward", "reward_step", "step 3"),
                          ("ppo", "minibatch_loss", "step 2")])
def test_a_loss_that_is_no_number_names_stage_step_and_records_and_saves_nothing_more(
        whole, tmp_path, monkeypatch, capsys, name, where, step):
    folder = begin(whole, tmp_path, name) / name
    command = argv(name, tmp_path / "run", whole / "data", "--save-seconds", "0")
    module, calls, states, good = getattr(girl, name), [], [], 10 if name == "ppo" else 2
    real = getattr(module, where)

    def spoiled(*args):
        loss, *rest = real(*args)
        calls.append(1)
        states.append((folder / "state.json").exists() and (folder / "state.json").read_bytes())
        # A loss that is a number, and a gradient that is none.
        if len(calls) > good and name != "ppo":
            next(p for p in args[0].parameters() if p.grad is not None).grad[0] = float("inf")
        return loss * (float("nan") if len(calls) > good and name == "ppo" else 1), *rest
    monkeypatch.setattr(module, where, spoiled)
    cvs = {json.loads(line)["cv"] for line in (whole / "data" / "train.jsonl").open()}
    line = refused(capsys, command, f"{name}: the loss or its gradient is not finite at {step}, "
                                    "on the records ", "; lower --lr")
    assert any(repr(cv[:40]) in line for cv in cvs)
    assert (folder / "state.json").read_bytes() == states[good]
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("nll", [float("nan"), float("inf"), 5000.0])
def test_a_validation_that_is_no_number_is_refused(whole, tmp_path, monkeypatch, capsys, nll):
    """Or one of which e^x is none."""
    begin(whole, tmp_path, "sft")
    monkeypatch.setattr(girl.sft, "mean_nll", lambda *args: nll)
    valid = [r.cv for r in girl.read_records(whole / "data" / "valid.jsonl") if r.accepted]
    refused(capsys, argv("sft", tmp_path / "run", whole / "data"),
            "sft: the loss or its gradient is not finite at step ", "lower --lr and --matrix-lr",
            repr(valid[0][:40]))
    assert not (tmp_path / "run" / "sft" / "model.safetensors").exists()


def test_a_policy_that_went_astray_is_named_in_its_next_rollout(whole, tmp_path, monkeypatch,
                                                                capsys):
    begin(whole, tmp_path, "ppo")
    cvs = {json.loads(line)["cv"] for line in (whole / "data" / "train.jsonl").open()}
    command = argv("ppo", tmp_path / "run", whole / "data", "--save-seconds", "0")
    real, calls = girl.ppo.log_probs, []

    def astray(lm, *args):
        logp, entropy = real(lm, *args)
        calls.append(lm)
        return logp * (float("nan") if len(calls) > bad else 1), entropy
    monkeypatch.setattr(girl.ppo, "log_probs", astray)
    bad = 0                     # before any update: it is not PPO's fault, and no rate would help
    refused(capsys, command, "the policy's log-probabilities or values are not finite")
    calls.clear()
    # A rollout has two passes over four parts; an update two epochs of two minibatches of two
    # micro-batches. Then the next rollout.
    bad = 8 + 8 + 2 * 2 * 2
    line = refused(capsys, command, "ppo: the loss or its gradient is not finite at step 2, "
                                    "on the records ", "; lower --lr or raise --kl-coef")
    assert any(repr(cv[:40]) in line for cv in cvs)
    assert read_json(tmp_path / "run" / "ppo" / "state.json")["step"] == 1


def test_a_persistently_negative_kl_is_counted_on_after_an_interruption(whole, tmp_path,
                                                                        monkeypatch):
    folder = begin(whole, tmp_path, "ppo") / "ppo"
    command = argv("ppo", tmp_path / "run", whole / "data", "--save-seconds", "0",
                   "--iterations", "7")
    real = girl.ppo.roll_out

    def negative(*args):
        rollout, log = real(*args)
        return rollout, log | {"kl": -1.0, "kl_error": 0.1}
    monkeypatch.setattr(girl.ppo, "roll_out", negative)
    with monkeypatch.context() as m, pytest.raises(Cut):
        cut_at(m, 4)                            # after the third iteration
        girl.main(command)
    assert girl.main(command) == 0
    faults = [row["kl_fault"] for row in csv.DictReader((folder / "metrics.csv").open())]
    assert faults == ["False"] * 4 + ["True"] * 3


@pytest.mark.parametrize("failure", ["disk", "folder"])
def test_a_full_disk_or_a_read_only_folder_leaves_the_last_state(whole, tmp_path, monkeypatch,
                                                                 capsys, failure):
    """A file-size limit stands for the full disk; the fourth state is the first that does not
    fit."""
    folder, command = interrupted(whole, tmp_path, monkeypatch)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    limit = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 14, 2 ** 14)); "
             "sys.argv = sys.argv[1:]\n"
             "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
             "import girl; sys.exit(girl.main(sys.argv))")
    if failure == "disk":
        done = subprocess.run([sys.executable, "-c", limit, *command], capture_output=True,
                              text=True, cwd=str(Path(girl.__file__).parent))
        code, said = done.returncode, done.stderr.splitlines()[-1]
    else:
        real = os.replace

        # Root may write anywhere: a folder that it may not write is hard to come by.
        def replace(a, b):
            if Path(b).parent == folder:
                raise PermissionError(13, "Permission denied")
            real(a, b)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace)
            code, said = girl.main(command), capsys.readouterr().err.splitlines()[-1]
    remedy = {"disk": "; free some space or choose another folder",
              "folder": "(Permission denied); choose another folder"}[failure]
    assert code == 2 and "reward/state-" in said and "cannot be written" in said and remedy in said
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert girl.main(command) == 0
    assert results(folder) == results(whole / "run" / "reward")


def test_a_reward_model_that_returns_a_constant_is_refused(whole, tmp_path, monkeypatch, capsys):
    """Where it was trained to be one, and where PPO is to learn from it; what was learned so far
    stays."""
    folder = begin(whole, tmp_path, "reward") / "reward"
    command = argv("reward", tmp_path / "run", whole / "data")
    with monkeypatch.context() as m:
        m.setattr(girl.reward, "score_rows", lambda model, rows: np.full(len(rows), 0.7))
        refused(capsys, command, "the reward model gives every sample the same score: "
                                 "its decisions were too few, or its --lr too high")
    assert read_json(folder / "state.json")["step"] == 10 and not (folder / "summary.json").exists()
    assert girl.main(command) == 0
    command = argv("ppo", tmp_path / "run", whole / "data", "--save-seconds", "0")
    with monkeypatch.context() as m:
        # The critic's own rollout, the first iteration, the second; each in four parts of two JDs.
        scores = iter([*torch.arange(16.0).split(2), *torch.full((8,), 0.7).split(2)])
        real = girl.ppo.score_responses
        m.setattr(girl.ppo, "score_responses", lambda *args: (next(scores), *real(*args)[1:]))
        m.setattr(girl.ppo, "generate",
                  lambda lm, prompts, *args, **more: [[lm.config.eos_token_id]] * len(prompts))
        refused(capsys, command, "the reward model gives all 8 finished JDs of a rollout the same "
                                 "score, 0.700: nothing can be learned")
    assert read_json(tmp_path / "run" / "ppo" / "state.json")["step"] == 1


def test_an_empty_rollout_is_named_and_gone_on_with(whole, tmp_path, monkeypatch, capsys):
    """End-of-text came first in every JD: each is one token long, and is scored as it is."""
    begin(whole, tmp_path, "ppo")
    monkeypatch.setattr(
        girl.ppo, "generate",
        lambda lm, prompts, *args, **more: [[lm.config.eos_token_id]] * len(prompts))
    assert girl.main(argv("ppo", tmp_path / "run", whole / "data")) == 0
    assert capsys.readouterr().out.count(
        "ppo: every JD of this rollout is empty: end-of-text came first") == 2
    rows = list(csv.DictReader((tmp_path / "run" / "ppo" / "metrics.csv").open()))
    assert [float(row["length"]) for row in rows] == [1, 1]
    assert all(math.isfinite(float(row[k])) for row in rows
               for k in ("reward", "kl", "explained_variance"))


def test_long_texts_are_cut_and_counted_and_nothing_left_to_compare_is_named(whole, tmp_path,
                                                                             capsys):
    """Cut to two tokens each, an accepted row and a rejected one are the same. A text that comes
    twice is counted once."""
    run, data = tmp_path / "run", whole / "data"
    assert girl.main(argv("sft", run, data, "--max-cv", "2", "--max-jd", "2")) == 0
    said = re.search(r"(\d+) accepted pairs.* truncated: (\d+) CVs at 2 tokens, (\d+) JDs at 2",
                     capsys.readouterr().out)
    pairs = [r for r in girl.read_half(data, "A") if r.accepted]
    counts = [len(pairs), len({r.cv for r in pairs}), len({r.jd for r in pairs})]
    assert [int(n) for n in said.groups()] == counts and len(pairs) > 10
    (data_2 := tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        records = [json.loads(line) for line in (data / f"{split}.jsonl").open()]
        (data_2 / f"{split}.jsonl").write_text("".join(json.dumps(
            r | {"cv": "Profile: " + r["cv"], "jd": "Wanted: " + r["jd"]}) + "\n" for r in records))
    said = refused(capsys, argv("reward", run, data_2),
                   "reward: no CV and no JD with both an accepted and a rejected decision, ",
                   "raise --max-cv and --max-jd")
    assert int(re.search(r"(\d+) rejected ones dropped", said)[1]) > 50


def test_a_reward_model_of_another_vocabulary_is_refused(whole, tmp_path, capsys):
    other, folder = tmp_path / "other", begin(whole, tmp_path, "ppo")
    assert girl.main(argv("sft", other, whole / "data", "--vocab", "500")) == 0
    assert girl.main(argv("reward", other, whole / "data")) == 0
    shutil.rmtree(folder / "reward")
    shutil.copytree(other / "reward", folder / "reward")
    refused(capsys, argv("ppo", folder, whole / "data"),
            f"{folder}/reward: was trained with a different sft/config.json; ")
