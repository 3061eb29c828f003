"""The demonstration: its verdict, its models, and that it notices what is wrong."""
import shutil

import pytest

from measure import demo
import girl
import ppo
from plumbing.files import BadInput, locked
from plumbing.stage import read_summary

ROWS = [dict.fromkeys(demo.FIGURES, str(value)) for value in (1.0, 50.0, 4.0, 6.0)]
WELL = {name: {"first": [0.5, 1.5], "last": [4.5, 5.5]} for name in demo.FIGURES}


def test_a_figure_is_its_first_value_and_the_mean_of_its_last_two():
    assert demo.figures(ROWS) == dict.fromkeys(demo.FIGURES, (1.0, 5.0))


def test_the_verdict_says_where_to_look_for_each_figure_that_no_healthy_run_has():
    lines, well = demo.verdict(ROWS, WELL)
    assert well
    assert len(lines) == len(demo.FIGURES) and all(line.startswith("ok ") for line in lines)
    for when, (low, high), side in (("last", (5.5, 7), 1), ("last", (3, 4.5), 2),
                                    ("first", (1.5, 2), 1), ("first", (0, 0.5), 2)):
        lines, well = demo.verdict(ROWS, WELL | {"kl": WELL["kl"] | {when: [low, high]}})
        said = [line for line in lines if line.startswith("LOOK")]
        assert not well and len(said) == 1
        assert said[0] == ("LOOK  KL, nats per text 1.000 -> 5.000; healthy runs "
                           f"{'begin' if when == 'first' else 'end'} with "
                           f"{low:.3f} to {high:.3f}: {demo.FIGURES['kl'][side]}")


def test_a_true_match_above_that_of_healthy_runs_is_no_fault():
    assert demo.verdict(ROWS, WELL | {"true_match": {"first": [0, 0.5], "last": [0, 0.5]}})[1]
    assert not demo.verdict(ROWS, WELL | {"true_match": {"first": [0, 2], "last": [6, 7]}})[1]


def test_healthy_ranges_hold_every_run_and_leave_half_their_width_to_spare():
    runs = [dict.fromkeys(demo.FIGURES, pair) for pair in ((1.0, 5.0), (2.0, 3.0), (1.5, 4.0))]
    assert demo.ranges(runs)["kl"] == {"first": [0.499, 2.501], "last": [1.999, 6.001]}
    near_0 = [dict.fromkeys(demo.FIGURES, pair) for pair in ((0.0, -1.0), (1.0, 1.0))]
    # What is never below 0 stays there.
    assert demo.ranges(near_0)["clip_frac"] == {"first": [0.0, 1.501], "last": [-2.001, 2.001]}


def test_a_run_of_other_models_is_not_touched(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "ppo").mkdir()
    with pytest.raises(BadInput, match="holds another model"):
        demo.put_models(tmp_path)
    assert (tmp_path / "sft" / "model.safetensors").read_bytes() == b"mine"
    assert (tmp_path / "ppo").exists()


def test_a_damaged_model_of_the_project_is_refused_in_one_line(tmp_path, monkeypatch):
    shutil.copytree(demo.HOME, tmp_path / "demo")
    monkeypatch.setattr(demo, "HOME", tmp_path / "demo")
    weights = tmp_path / "demo" / "sft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(BadInput, match="model.safetensors"):
        demo.put_models(tmp_path / "run")


def test_the_models_are_small_whole_and_of_the_quick_market():
    files = [path for path in demo.HOME.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    for stage in demo.MODELS:
        asked = read_summary(demo.HOME / stage)["asked"]
        assert all(asked[name] == value for name, value in girl.SIZES["quick"][stage].items()
                   if name not in ("epochs", "steps"))      # those of an earlier version
    assert girl.SIZES["demo"]["data"]["fields"] == girl.SIZES["quick"]["data"]["fields"]


def test_a_healthy_run_is_well_and_the_same_command_with_turned_advantages_is_not(
        tmp_path, monkeypatch, capsys):
    """It begins anew: the second demonstration in the folder is of the code as it is by then."""
    command, whiten = ["train", "--demo", "--seed", "3", "--out", str(tmp_path / "run")], ppo.whiten
    for turned in (False, True):
        if turned:
            monkeypatch.setattr(ppo, "whiten", lambda x, mask: -whiten(x, mask))
        assert girl.main(command) == int(turned)
        said = capsys.readouterr().out
        assert ("LOOK  true match" in said) == (
            "look at the sign of the advantages" in said) == turned
        assert said.count("\nok ") + said.count("\nLOOK ") == len(demo.FIGURES)


def test_a_demonstration_at_work_is_not_removed_by_another(tmp_path):
    with locked(tmp_path / "ppo"), pytest.raises(BadInput,
                                                 match="another process is at work on it"):
        demo.put_models(tmp_path)


def test_the_demonstration_takes_no_data_and_no_model_of_others(tmp_path, capsys):
    for more in (["--data", str(tmp_path)], ["--init", str(tmp_path)]):
        assert girl.main(["train", "--demo", "--out", str(tmp_path / "run"), *more]) == 2
        assert "leave out --data and --init" in capsys.readouterr().err


def test_the_models_are_not_taken_while_runs_of_other_models_lie_in_the_way(tmp_path, monkeypatch,
                                                                            capsys):
    monkeypatch.setattr(demo, "HOME", tmp_path / "home")
    monkeypatch.setattr("sys.argv",
                        ["demo.py", "--run", str(tmp_path / "none"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert (f"{tmp_path}: exists already; delete it, or choose another --out"
            in capsys.readouterr().err)
    assert not (tmp_path / "home").exists()


def test_a_run_that_is_not_finished_gives_no_models_and_a_line_that_says_so(tmp_path, monkeypatch,
                                                                            capsys):
    monkeypatch.setattr(demo, "HOME", tmp_path / "home")
    monkeypatch.setattr("sys.argv",
                        ["demo.py", "--run", str(tmp_path), "--out", str(tmp_path / "seeds")])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert (f"{tmp_path / 'sft'}: is not finished; run  bash train.sh --quick  first"
            in capsys.readouterr().err)
