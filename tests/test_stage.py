"""Atomic files, generators, the learning rate schedule, the folder of a stage."""
import csv
import errno
import fcntl
import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import girl
import plumbing.stage
from plumbing import files
from aids import lr_factor
from plumbing.files import BadInput, read_json, save_tensors, write_bytes, write_json
from plumbing.stage import (Stage, code_checksum, finished, generator, peak_rss_mb, pick_device,
                            read_summary)


def test_the_device_is_one_that_is_here(monkeypatch):
    monkeypatch.delenv("GIRL_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device().type == "cuda"
    monkeypatch.setenv("GIRL_DEVICE", "cpu")
    assert pick_device().type == "cpu"
    for other in ("mps", "gpu", ""):
        monkeypatch.setenv("GIRL_DEVICE", other)
        with pytest.raises(BadInput, match=f"GIRL_DEVICE={other}: there is no such device here; "
                                           "choose one of cuda, cpu"):
            pick_device()


@pytest.mark.parametrize("command, seconds", [(["sft"], 60), (["ppo"], 60), (["train"], 60),
                                              (["sft", "--smoke"], 2), (["train", "--smoke"], 2)])
def test_a_state_is_saved_at_the_first_step_after_so_many_seconds(
        tmp_path, monkeypatch, command, seconds):
    clock, save_seconds = [1000.0], girl.parse(command).save_seconds
    monkeypatch.setattr(plumbing.stage, "time",
                        SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    with Stage(tmp_path, "sft", save_seconds) as stage:
        stage.begin({}, {})
        stage.total(100)
        clock[0] += 500  # models are loaded; the time counts from the first step
        stage.resume({}, [])
        saved = []
        for step in range(1, 9):
            clock[0] += seconds / 4 + 0.01
            stage.checkpoint(step)
            saved.append(read_json(tmp_path / "sft" / "state.json")["step"]
                         if (tmp_path / "sft" / "state.json").exists() else None)
    assert saved == [None, None, None, 4, 4, 4, 4, 8]


def test_a_flag_of_another_version_is_a_difference_unless_it_is_off():
    was = {"asked": {"lr": 1.0}, "inputs": {}}
    plumbing.stage.check_same("runs/x/sft", "finished", was, {"lr": 1.0, "reading": 0.0}, {})
    with pytest.raises(BadInput, match="by another version of GIRL, without --reading; choose"):
        plumbing.stage.check_same("runs/x/sft", "finished", was, {"lr": 1.0, "reading": 0.5}, {})
    with pytest.raises(BadInput, match="with --lr 1.0, not 0.0; use the same"):
        plumbing.stage.check_same("runs/x/sft", "finished", was, {"lr": 0.0}, {})


def test_states_that_are_kept_are_those_of_this_attempt(tmp_path):
    """A killed process leaves half of one; an attempt that saved no state, one of another seed."""
    kept, layer = tmp_path / "sft" / plumbing.stage.KEPT, torch.nn.Linear(2, 1)
    for attempt in (1, 2):
        with Stage(tmp_path, "sft", 0) as stage:
            stage.begin({}, {})
            assert not kept.exists()
            stage.resume({"model": layer}, [])
            stage.keep(attempt, beta=0.5)
            (kept / ".9.safetensors.1234.tmp").write_bytes(b"half")
            stage.keep(attempt + 1, beta=0.25)
            names = sorted(path.name for path in kept.iterdir())
            assert names == [f"{k}.{kind}" for k in (attempt, attempt + 1)
                             for kind in ("json", "safetensors")]
    found = files.read_checked(kept / "3.json", "")
    assert found["numbers"] == {"beta": 0.25}
    assert found["sha256"] == files.sha256(kept / "3.safetensors")
    other = torch.nn.Linear(2, 1)
    restore = plumbing.stage.restore
    restore(kept / "3.safetensors", found["sha256"], {"model": other}, [], "")
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)
    with pytest.raises(BadInput, match="3.safetensors: missing or damaged .* run it again"):
        restore(kept / "3.safetensors", "0" * 64, {"model": other}, [], "run it again")
    with pytest.raises(BadInput, match="there is no place for model.bias; run it again"):
        without = torch.nn.Linear(2, 1, bias=False)
        restore(kept / "3.safetensors", found["sha256"], {"model": without}, [], "run it again")


def test_a_state_keeps_the_time_and_refuses_another_model(tmp_path):
    with Stage(tmp_path, "sft", 0) as stage:
        stage.begin({}, {})
        stage.start -= 100                      # 100 seconds at work
        stage.resume({"model": torch.nn.Linear(2, 3)}, [])
        stage.checkpoint(1)
    with Stage(tmp_path, "sft", 0) as stage:
        assert stage.begin({}, {})
        for other in (torch.nn.Linear(2, 4), torch.nn.Bilinear(2, 2, 2)):
            with pytest.raises(BadInput, match="state-1.safetensors: of another model or version, "
                                               "model.weight is missing or has another shape"):
                stage.resume({"model": other}, [])
        stage.resume({"model": torch.nn.Linear(2, 3)}, [])
        assert 100 <= stage.seconds() < 110


# ------------------------------------------------------------------------------------- atomic files
def test_write_bytes_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])      # the disk is full; the folder went away
@pytest.mark.parametrize("error, raised", [(OSError(28, "No space left on device"), BadInput),
                                           (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
        tmp_path, monkeypatch, call, error, raised):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(raised) as caught:
        write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    if raised is BadInput:
        assert "file: cannot be written (No space left on device)" in str(caught.value)


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path, monkeypatch):
    """The new one is synced before it takes the old one's name, and the folder after."""
    path, seen = tmp_path / "file", []
    write_bytes(path, b"old")
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (
        seen.append((path.read_bytes(), os.path.isdir(f"/proc/self/fd/{f}"))), fsync(f)))
    write_bytes(path, b"new")
    save_tensors(path, {"a": torch.zeros(1)})
    assert [(content[:3], folder) for content, folder in seen] == [
        (b"old", False), (b"new", True), (b"new", False), (path.read_bytes()[:3], True)]


def failing_fsync(monkeypatch, number, of_folders):
    """Let fsync of folders, or of files, end in this error."""
    fsync = os.fsync

    def fail(f):
        if stat.S_ISDIR(os.fstat(f).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(f)
    monkeypatch.setattr(os, "fsync", fail)


CANNOT_SYNC = ["EINVAL", "EBADF", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EISDIR", "EACCES"]


@pytest.mark.parametrize("name", CANNOT_SYNC)
def test_a_file_system_that_cannot_sync_a_folder_will_do(tmp_path, monkeypatch, name):
    failing_fsync(monkeypatch, getattr(errno, name), True)
    write_bytes(tmp_path / "a" / "file", b"new")
    assert os.listdir(tmp_path / "a") == ["file"]


@pytest.mark.parametrize("name, of_folders, remedy", [
    ("EIO", True, "; choose another folder"),
    ("ENOSPC", True, "; free some space or choose another"),
    ("EDQUOT", True, "; free some space or choose another"),
    ("EIO", False, "; choose another folder"), ("EROFS", False, "; choose another folder"),
    *((name, False, "; choose another folder") for name in CANNOT_SYNC)])
def test_what_is_not_on_the_disk_is_refused(tmp_path, monkeypatch, name, of_folders, remedy):
    """A fault when a folder is synced, and any error when a file is."""
    failing_fsync(monkeypatch, getattr(errno, name), of_folders)
    says = f"file: cannot be written ({os.strerror(getattr(errno, name))}){remedy}"
    with pytest.raises(BadInput) as caught:
        write_bytes(tmp_path / "file", b"new")
    assert says in str(caught.value)


def test_only_files_are_written_over(tmp_path):
    """os.replace would put a file in the place of a device, or of what feeds another process."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(BadInput, match=f"{name}: exists, and is not a file; choose another"):
            write_bytes(tmp_path / name, b"x")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    """So long that only the name of what is written beside it is too long."""
    with pytest.raises(BadInput, match=r"cannot be written \(File name too long\); choose another"):
        write_bytes(tmp_path / ("x" * 250), b"x")


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_folder_that_cannot_be_locked_is_refused(tmp_path, monkeypatch, number):
    """Two processes at once would write over each other's files."""
    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(BadInput) as caught:
        Stage(tmp_path / "run", "sft")
    assert str(caught.value) == (
        f"{tmp_path / 'run' / 'sft'}: cannot be locked, as on NFS and some other shared file "
        f"systems ({os.strerror(number)}); choose a folder on a disk of this machine")
    assert len(os.listdir("/dev/fd")) == before


def test_a_folder_in_which_nothing_can_be_deleted_is_named_so(tmp_path, monkeypatch):
    (tmp_path / ".file.1.tmp").write_text("half")

    def unlink(self):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(type(tmp_path), "unlink", unlink)
    with pytest.raises(BadInput, match=r"cannot be written to \(Read-only file system\); choose"):
        files.lock(tmp_path)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "plain").write_text("not a folder")
    with pytest.raises(BadInput, match="cannot be written"):
        write_bytes(tmp_path / "plain" / "file", b"x")


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "plain").write_text("not a folder")
    with pytest.raises(BadInput, match="plain"):
        Stage(tmp_path / "plain", "sft")


def test_json_round_trip(tmp_path):
    value = {"text": "Łódź 🙂", "number": 1.5, "nothing": None, "list": [1, 2]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "Łódź" in (tmp_path / "x.json").read_text(encoding="utf-8")       # a person can read it


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"])
def test_what_is_not_json_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BadInput, match="x.json"):
        read_json(tmp_path / "x.json")


def test_tensors_round_trip(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([float("inf"), -0.0])}
    save_tensors(tmp_path / "x.safetensors", tensors)
    again = load_file(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[n], tensors[n]) for n in tensors)


# --------------------------------------------------------------------------------------------- code
CODE = '''"""A module."""
TABLE = {"a": 1.5}

def rule(x):
    """Twice and one more."""
    return f"{2 * x + 1}"
'''


@pytest.mark.parametrize("old, new, same", [
    ("A module", "Another word", True), ("Twice", "Thrice", True),
    ("1.5}", "1.5}      # a comment", True), ("\n\ndef", "\n\n\n\ndef", True),
    ('{"a": 1.5}', "{\n    'a': 1.50,\n}", True), ("2 * x", "(2) * x", True),
    ("1.5", "1.6", False), ("2 *", "3 *", False), ("+ 1", "- 1", False),
    ("rule(x)", "rule(x, y=0)", False), ('"a"', '"b"', False), ("f\"{2", "f\" {2", False),
    ("    return", "    x += 1\n    return", False), ("def rule", "def role", False)])
def test_the_checksum_of_code_sees_what_runs_and_nothing_else(old, new, same, tmp_path):
    (tmp_path / "a.py").write_text(CODE)
    assert old in CODE
    (tmp_path / "b.py").write_text(CODE.replace(old, new, 1))
    assert (code_checksum(tmp_path / "a.py") == code_checksum(tmp_path / "b.py")) == same


# --------------------------------------------------------------------------------------- randomness
def draw(*where):
    return torch.rand(8, generator=generator(*where)).tolist()


def test_a_generator_depends_on_its_arguments_alone():
    first = draw(1, "sft", 7)
    torch.manual_seed(99), torch.rand(5), random.random(), draw(1, "sft", 8)
    assert draw(1, "sft", 7) == first
    for other in ((2, "sft", 7), (1, "ppo", 7), (1, "sft", 8), (1, "sft"), (1, "sft", 7, 0),
                  (1, "sft", "7")):
        assert draw(*other) != first


def test_a_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw(5, "anything")
    assert torch.equal(torch.rand(3), expected)


def test_generators_of_many_steps_differ():
    assert len({generator(0, "ppo", i).initial_seed() for i in range(1000)}) == 1000


# ------------------------------------------------------------------------------------ learning rate
def test_cosine_schedule_by_hand():
    # 4 steps of warm-up, then 8 down: half-way at step 8.
    factors = [lr_factor(step, 12, 4) for step in range(13)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[6] == pytest.approx((1 + 0.5 ** 0.5) / 2)
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0)
    assert all(a > b for a, b in zip(factors[4:], factors[5:]))


def test_cosine_schedule_at_its_edges():
    assert lr_factor(0, 10, 0) == 1                        # no warm-up
    assert lr_factor(10, 10, 0) == pytest.approx(0)
    assert lr_factor(2, 3, 5) == pytest.approx(0.6)        # a run shorter than its warm-up
    assert lr_factor(3, 3, 3) == 1
    assert all(0 <= lr_factor(step, 7, 2) <= 1 for step in range(8))


# ------------------------------------------------------------------------------------------ a stage
def test_a_stage_leaves_metrics_and_a_summary(tmp_path):
    with Stage(tmp_path / "run", "sft") as stage:
        for step in range(1, stage.total(3) + 1):
            stage.log(step=step, loss=4 / step, note='with, comma and "quotes"')
        assert not finished(tmp_path / "run", "sft")
        summary = stage.finish(valid_nll=1.25)

    with open(tmp_path / "run" / "sft" / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["step", "loss", "note"]
    assert [int(r["step"]) for r in rows] == [1, 2, 3]
    assert [float(r["loss"]) for r in rows] == [4.0, 2.0, 4 / 3]
    assert rows[0]["note"] == 'with, comma and "quotes"'

    assert finished(tmp_path / "run", "sft") and not finished(tmp_path / "run", "ppo")
    assert read_summary(tmp_path / "run" / "sft") == summary
    assert summary["valid_nll"] == 1.25 and summary["seconds"] >= 0 and summary["peak_rss_mb"] > 10


def test_the_peak_memory_is_not_that_of_the_process_that_started_this_one():
    held = b"x" * (400 * 2 ** 20)
    started = subprocess.run(
        [sys.executable, "-c", "from plumbing.stage import peak_rss_mb; print(peak_rss_mb())"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert len(held) and int(started.stdout) < peak_rss_mb() - 200


def test_on_cuda_a_stage_notes_the_memory_of_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * 2 ** 20)
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
        with Stage(tmp_path / f"{used}", "sft") as stage:
            assert stage.begin({}, {})
            assert stage.finish().get("peak_gpu_mb") == (7 if used else None)


def test_metrics_can_be_written_while_the_stage_runs(tmp_path):
    with Stage(tmp_path, "ppo") as stage:
        for step in (1, 2):
            stage.log(step=step)
            stage.write_metrics()
            text = (tmp_path / "ppo" / "metrics.csv").read_text()
            assert text == "step\n1\n" + "2\n" * (step == 2)
    assert not finished(tmp_path, "ppo")


def test_mean_of_the_last_rows(tmp_path):
    with Stage(tmp_path, "sft") as stage:
        for loss in (10.0, 1.0, 3.0):
            stage.log(loss=loss)
        assert stage.mean("loss", 2) == 2.0
        assert stage.mean("loss", 100) == pytest.approx(14 / 3)


def test_an_interrupted_stage_is_not_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with Stage(tmp_path, "sft") as stage:
            stage.log(step=1)
            raise KeyboardInterrupt
    assert not finished(tmp_path, "sft")


def test_what_a_stage_says_goes_to_standard_output(tmp_path, capsys):
    with Stage(tmp_path, "sft") as stage:
        stage.say("step 1  loss 2.0")
    assert "step 1  loss 2.0\n" in capsys.readouterr().out
