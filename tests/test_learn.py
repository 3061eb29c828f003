"""The exercises (each function taken out, two typical wrong solutions, and the original), the bug
hunt, the symptoms, the lessons."""
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import girl
import market
from conftest import refused
from learn import bughunt, checker, copies, symptoms
from learn.exercises import EXERCISES
from measure import demo

# For each exercise two wrong solutions: this text of the original, what stands there instead, and
# a part of the sentence that the student gets.
WRONG = {
    "rmsnorm": [("F.rms_norm(x, self.weight.shape, self.weight, self.eps)",
                 "F.layer_norm(x, self.weight.shape, self.weight, None, self.eps)",
                 "subtracts no mean"),
                ("F.rms_norm(x, self.weight.shape, self.weight, self.eps)",
                 "F.rms_norm(x, self.weight.shape, None, self.eps)", "multiply by self.weight")],
    "rotate": [("torch.cat((-b, a), dim=-1)", "torch.cat((b, -a), dim=-1)", "sign of the sine"),
               ("torch.cat((-b, a), dim=-1)",
                "torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)",
                "paired with its neighbour")],
    "attention": [("is_causal=visible is None", "is_causal=False",
                   "changing the last token changed the output of an earlier one"),
                  ("k = rotate(k.transpose(1, 2), cos, sin)", "k = k.transpose(1, 2)",
                   "with queries and keys rotated")],
    "top_p": [("ranked.cumsum(-1) - ranked >= top_p", "ranked.cumsum(-1) > top_p",
               "together they reach it"),
              ("logits.float() / temperature", "logits.float() * temperature",
               "divide the logits by it")],
    "nll": [("hidden[before_target[asked]]", "hidden[in_jd[asked]]", "the state *before* a token"),
            ("(at >= starts[:, None])", "(at >= 1)", "the tokens of the prompt, too")],
    "ranking_loss": [("chosen - rejected", "rejected - chosen", "when the *rejected* text"),
                     ("-F.logsigmoid(chosen - rejected)", "-(chosen - rejected).sigmoid().log()",
                      "the logarithm of the sigmoid in one step")],
    "comparisons": [("[(i, j) for", "[(j, i) for", "the accepted one comes first"),
                    ("[(i, j) for i in chosen for j in rejected]", "list(zip(chosen, rejected))",
                     "each with each; 2 came out")],
    "last_token": [("at == lengths[:, None] - 1", "(at == ids.shape[1] - 1).expand(ids.shape)",
                    "read it at lengths - 1"),
                   ("self.head(self.model(ids, asked=at == lengths[:, None] - 1))",
                    "self.score(self.model(ids, asked=at == lengths[:, None] - 1)).squeeze(-1)",
                    "which is self.center")],
    "auc": [("counts.cumsum() - (counts - 1) / 2", "counts.cumsum() - 0", "a tie counts half"),
            ("        return None", "        return 0.5", "return None")],
    "k3": [("torch.exp(-d) - 1 + d", "torch.exp(d) - 1 - d", "that is exp(d) - 1 - d"),
           ("torch.exp(-d) - 1 + d", "0.5 * d ** 2", "for d = 1 and d = -1, 0.3679 should")],
    "token_rewards": [("-beta * kl", "beta * kl", "with the wrong sign"),
                      ("last = mask.sum(1) - 1", "last = torch.full((len(mask),), 2)",
                       "belongs to token 1, not to the pad")],
    "gae": [("values = values * mask", "values = values + 0", "row 0, token 1 is a pad"),
            ("gamma * lam * next_advantage", "gamma * next_advantage", "with lambda 0")],
    "critic": [("ridge[-1] = 0", "ridge[-1] += 0", "the bias was shrunk, too"),
               ("(ridge + 1e-9)", "(0 * ridge + 1e-9)", "least squares without a ridge")],
    "whiten": [("mean = masked_mean(x, mask)", "mean = x.mean()", "the 50 at a pad must not count"),
               ("* torch.rsqrt(variance + 1e-8) * mask",
                "* torch.rsqrt(variance + 1e-8) * mask + mean * mask", "the mean was added back")],
    "policy_loss": [("torch.max(", "torch.min(", "it pays to leave the clip range"),
                    ("torch.max(-advantages * ratio, -advantages * clipped)",
                     "-advantages * clipped", "the ratio is always clipped")],
    "kl_controller": [("min(max(kl / self.target - 1, -0.2), 0.2)", "kl / self.target - 1",
                       "the error is clipped at 0.2"),
                      ("1 + error", "1 - error", "10% above its target")],
    "explained_variance": [("(x - masked_mean(x, mask)) ** 2", "x ** 2",
                            "a critic that says 9 everywhere explains nothing"),
                           ("masked_mean((x - masked_mean(x, mask)) ** 2, mask)",
                            "((x - x.mean()) ** 2).mean()", "pads do not count")],
    "lora": [("self.scale * ", "", "multiply it by alpha / r, here 4"),
             ("self.base_layer(x) + ", "", "the layer starts as its base")],
    "ndcg": [("gains[:relevant.sum()]", "gains", "ranks 2 and 4 give a DCG"),
             ("np.arange(2, 12)", "np.arange(3, 13)", "ranks 2 and 4 give a DCG")],
}


def source_of(e):
    return (copies.HOME / e.file).read_text()


def test_there_are_enough_exercises_and_each_has_hints_and_wrong_solutions():
    assert len(EXERCISES) >= 16 and set(WRONG) == set(EXERCISES)
    assert all(len(e.hints) == 3 and len(WRONG[name]) == 2 for name, e in EXERCISES.items())
    assert {e.lesson for e in EXERCISES.values()} == set(range(1, 8))


@pytest.mark.parametrize("name", EXERCISES)
def test_without_the_function_exactly_its_check_fails(name):
    e = EXERCISES[name]
    blanked = copies.blank(source_of(e), [e])
    for other in EXERCISES.values():
        source = blanked if other.file == e.file else source_of(other)
        expected = (checker.OPEN, "not written yet") if other == e else (checker.DONE, "right")
        assert checker.check(source, other) == expected


@pytest.mark.parametrize("name, k", [(name, k) for name in EXERCISES for k in (0, 1)])
def test_a_typical_wrong_solution_gets_the_sentence_that_was_written_for_it(name, k):
    e, (old, new, says) = EXERCISES[name], WRONG[name][k]
    source = source_of(e)
    original = checker.solution(e)
    assert old in original
    state, sentence = checker.check(source.replace(original, original.replace(old, new)), e)
    assert state == checker.WRONG and says in sentence, sentence
    assert "{" not in sentence
    assert checker.check(source, e) == (checker.DONE, "right")          # the original is back


def test_a_fault_of_python_is_named_with_its_line():
    e = EXERCISES["k3"]
    source = source_of(e)
    line = next(i for i, text in enumerate(source.splitlines(), 1) if "torch.exp(-d)" in text)
    broken = source.replace("torch.exp(-d) - 1 + d", "torch.exp(-dd) - 1 + d")
    state, sentence = checker.check(broken, e, "ppo.py")
    assert state == checker.WRONG
    assert sentence == f"ppo.py:{line}: NameError: name 'dd' is not defined"
    broken = source.replace("torch.exp(-d) - 1 + d", "torch.exp(-d - 1 + d")
    assert checker.check(broken, e, "ppo.py")[1].startswith(f"ppo.py:{line}: ")
    assert checker.check("", e, "ppo.py") == (checker.WRONG, "ppo.py: has no k3 any more")


def test_a_helper_function_may_be_added():
    e = EXERCISES["k3"]
    source = source_of(e).replace("torch.exp(-d) - 1 + d", "mine(d)")
    source += "\n\ndef mine(d):\n    return torch.exp(-d) - 1 + d\n"
    assert checker.check(source, e) == (checker.DONE, "right")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learn") / "mine"
    assert girl.main(["exercise", str(folder)]) == 0
    return folder


def ask(folder, *words):
    """What check.sh prints, without a package that is not the project's."""
    found = subprocess.run(["bash", str(folder / "check.sh"), *words], text=True,
                           capture_output=True, env=os.environ | {"PYTHONPATH": ""})
    return found.returncode, found.stdout + found.stderr


def test_a_student_sees_where_they_stand(folder, monkeypatch, capsys):
    """Before, halfway and after, in a copy; and the project itself is as it was."""
    code, out = ask(folder)                 # by check.sh; from here on without a process for each
    monkeypatch.chdir(folder / copies.SOLUTIONS)

    def ask_here(*words):
        code = checker.main(list(words))
        return int(code or 0), capsys.readouterr().out
    assert code == 0 and out.endswith(f"0 of {len(EXERCISES)} done\n")
    assert out.count("\n") == len(EXERCISES) + 1 and out.count("open ") == len(EXERCISES)
    path, e = folder / "ppo.py", EXERCISES["gae"]
    blanked = path.read_text()
    assert "# Lesson 4: bash check.sh gae\n    raise NotImplementedError\n" in blanked
    assert "Generalised advantage estimation" in blanked            # its docstring stayed
    assert "gamma * lam" not in blanked
    assert ask_here("gae") == (1, "gae: not written yet\n")
    assert ask_here("gae", "--hint", "2") == (0, e.hints[1] + "\n")
    code, solution = ask_here("gae", "--solution")
    assert code == 0 and solution.strip() == checker.solution(e)
    body = solution.strip().splitlines()
    body = "\n".join(body[next(i for i, text in enumerate(body) if text.endswith('"""')) + 1:])
    todo = "    # Lesson 4: bash check.sh gae\n    raise NotImplementedError"
    if '"""' in body:           # the docstring has several lines
        body = body[body.index('"""') + 4:]
    path.write_text(blanked.replace(todo, body))
    assert ask_here("gae") == (0, "gae: right\n")
    assert ask_here()[1].endswith(f"1 of {len(EXERCISES)} done\n")
    path.write_text(path.read_text().replace("values = values * mask", "values = values + 0"))
    code, out = ask_here("gae")
    assert code == 1 and "row 0, token 1 is a pad" in out
    for e in EXERCISES.values():
        (folder / e.file).write_text(source_of(e))
    assert ask_here()[1].endswith(f"{len(EXERCISES)} of {len(EXERCISES)} done\n")


def test_the_copy_compiles_and_has_no_tests(folder):
    files = sorted(str(path.relative_to(folder)) for path in folder.glob("**/*.py"))
    assert {"girl.py", "ppo.py", "plumbing/stage.py", ".solutions/ppo.py"} <= set(files)
    assert not any(file.startswith("tests") for file in files)
    for file in ("demo/sft/model.safetensors", "learn/LESSONS.md", "learn/cv.txt", "learn/jd.txt"):
        assert (folder / file).exists()
    for file in files:
        compile((folder / file).read_text(), file, "exec")


def test_what_is_not_understood_is_refused(folder, tmp_path, capsys, monkeypatch):
    refused(capsys, ["exercise", str(folder)], f"{folder}: exists already")
    (tmp_path / "file").write_text("")
    refused(capsys, ["exercise", str(tmp_path / "file")], "exists already")
    code, out = ask(folder, "gea")
    assert code == 2 and "there is no exercise gea" in out and "Traceback" not in out
    monkeypatch.chdir(folder / copies.SOLUTIONS)
    for words, says in ((["--hint"], "name an exercise"), (["gae", "--hint", "4"], "--hint")):
        with pytest.raises(SystemExit, match="2"):
            checker.main(words)
        assert says in capsys.readouterr().err
    found = subprocess.run([sys.executable, "-m", "learn.checker"], cwd=copies.HOME, text=True,
                           capture_output=True)
    assert found.returncode == 2 and "start it with  bash check.sh" in found.stderr


# ----------------------------------------------------------------------------------- the bug hunt
def test_each_case_is_one_line_of_the_code_as_it_is():
    assert len(bughunt.CASES) >= 16
    for case in bughunt.CASES:
        source = (copies.HOME / case.file).read_text()
        assert source.count(case.right) == 1 and case.right != case.wrong
        broken = bughunt.plant(source, case)
        assert max(map(len, broken.splitlines())) <= 100
        compile(broken, case.file, "exec")
        pairs = zip(source.splitlines(), broken.splitlines(), strict=True)
        (right, wrong), = [(a, b) for a, b in pairs if a != b]
        assert abs(right.find("  # ") - wrong.find("  # ")) <= 1    # no layout gives it away
        assert case.file in ("model.py", "sft.py", "ppo.py")    # as the task says
        for name in case.tests:
            file, test = name.split("::")
            assert f"def {test}(" in (copies.HOME / "tests" / file).read_text()


def test_a_bug_hunt_is_over_when_the_fault_is_mended(tmp_path):
    """`python tests/mutants.py 34` tries every case; here is one."""
    number = 5
    folder, case = tmp_path / "hunt", bughunt.CASES[number - 1]
    assert girl.main(["bughunt", str(folder), "--case", str(number)]) == 0
    task = (folder / "TASK.md").read_text()
    assert case.command in task and case.does not in task
    assert not (folder / "tests").exists() and not (folder / "learn").exists()
    code, out = ask(folder)
    assert code == 1 and out == "not mended yet: a test that finds the fault still fails\n"
    path = folder / case.file
    path.write_text(path.read_text().replace(case.wrong, case.right))
    code, out = ask(folder)
    assert code == 0 and out.startswith(f"mended (case {number}).") and case.does in out


def test_a_random_case_is_one_of_them_and_another_number_is_refused(tmp_path, capsys):
    assert girl.main(["bughunt", str(tmp_path / "hunt")]) == 0
    number = int((tmp_path / "hunt" / bughunt.HIDDEN / "case").read_text())
    assert 1 <= number <= len(bughunt.CASES)
    refused(capsys, ["bughunt", str(tmp_path / "x"), "--case", "99"], "--case 99 must be from 1 to")


# ------------------------------------------------------------------------------------- the symptoms
def test_the_page_of_symptoms_has_every_fault_and_setting_and_its_pictures():
    page = (copies.HOME / "learn" / "SYMPTOMS.md").read_text()
    for patient in symptoms.patients():
        assert f"\n### {patient.name}\n" in page
        assert (f"\n{patient.may_be} *How to tell:* {patient.tell} *Mend:* {patient.mend}.\n"
                in page)
    shown = re.findall(r"\]\((symptoms/[\w-]+\.svg)\)", page)
    assert len(shown) == len(set(shown)) >= 20
    assert all((copies.HOME / "learn" / file).exists() for file in shown)
    assert set(re.findall(r"^## (.*)", page, re.M)) <= set(symptoms.ORDER)


def metrics_of(**last):
    """Five iterations: all figures 1 at first, and from the fourth on these."""
    return {name: np.array([1.0, 1, 1] + [last.get(name, 1.0)] * 2)
            for name in ("iteration", *demo.FIGURES)}


@pytest.mark.parametrize("last, heading", [
    ({"eos_rate": 0.2, "true_match": 0.1}, "Nothing ends"),
    ({"kl": 500.0, "eos_rate": 0.2}, "The KL explodes"),
    ({"reward": 0.2, "true_match": 0.1}, "Reward and truth rise too little, or not at all"),
    ({"reward": 3.0, "true_match": 0.1}, "The reward rises; the truth too little, or it falls"),
    ({"kl": -2.0}, "The KL is negative"),
    ({"eos_rate": 0.995}, "No figure of PPO in the quick run tells"),
    ({"clip_frac": 7.0}, "Only other figures tell"),
    ({"length": 1.3}, "No figure of PPO in the quick run tells")])
def test_a_symptom_is_what_both_seeds_show(last, heading):
    healthy = [metrics_of(length=0.8), metrics_of(length=1.2)]
    sick = [metrics_of(**last), metrics_of(**last)]
    assert symptoms.symptom(symptoms.seen(healthy, sick), sick) == heading
    one_is_well = [metrics_of(**last), metrics_of()]
    assert symptoms.seen(healthy, one_is_well) == {}


def test_a_patient_is_examined_in_a_copy_with_its_fault(whole, tmp_path, monkeypatch):
    """At toy size. What PPO refuses is what is seen."""
    monkeypatch.setattr(symptoms, "SIZE", "--smoke")
    monkeypatch.setattr(symptoms, "SEEDS", range(1))
    models = tmp_path / "models"
    shutil.copytree(whole / "run", models)
    shutil.copytree(whole / "data", models / "data")
    by_name = {patient.name: patient for patient in symptoms.patients()}
    sick, error = symptoms.examine(by_name["a constant reward"], models, tmp_path)
    assert sick == [] and "the same score" in error
    (metrics,), error = symptoms.examine(by_name["bug hunt, case 8"], models, tmp_path)
    assert error is None and not metrics["kl"].any()            # the reference is the policy
    heading, text = symptoms.entry(by_name["bug hunt, case 8"], [metrics], None, [metrics],
                                   tmp_path)
    assert heading == "The KL is 0" and "(" + tmp_path.name + "/bug-hunt-case-8.svg)" in text


# -------------------------------------------------------------------------------------- the lessons
LESSONS = (copies.HOME / "learn" / "LESSONS.md").read_text()
STOPS = re.findall(r"```pdb\n(.*?)```\n\nYou should see `(.*?)`:", LESSONS, re.S)


@pytest.fixture(scope="module")
def lesson_runs(whole, tmp_path_factory):
    """What bash train.sh --smoke and --demo leave, as far as the lessons need it."""
    folder = tmp_path_factory.mktemp("lessons")
    shutil.copytree(whole / "run", folder / "runs/smoke")
    shutil.copytree(whole / "data", folder / "runs/smoke/data")
    for stage in demo.MODELS:
        shutil.copytree(demo.HOME / stage, folder / "runs/demo" / stage)
    assert girl.main(["data", "--demo", "--out", str(folder / "runs/demo/data")]) == 0
    return folder


def test_each_of_the_first_five_lessons_stops_somewhere():
    assert len(STOPS) == LESSONS.count("```pdb") == 5
    assert re.findall(r"^## (\d)\.", LESSONS, re.M) == list("1234567")


@pytest.mark.parametrize("k", range(len(STOPS)))
def test_a_lesson_s_breakpoint_shows_what_the_lesson_says(lesson_runs, tmp_path, k):
    block, says = STOPS[k]
    runs = tmp_path / "runs"
    shutil.copytree(lesson_runs / "runs", runs)
    remove, command, *typed = block.strip().splitlines()
    shutil.rmtree(tmp_path / remove.removeprefix("rm -rf "), ignore_errors=True)
    words = command.replace("python", sys.executable, 1).replace("runs/", f"{runs}/").split()
    found = subprocess.run(words, cwd=copies.HOME, input="\n".join(typed) + "\n", text=True,
                           capture_output=True, timeout=300)
    assert says in found.stdout, found.stdout[-2000:] + found.stderr[-2000:]


def test_the_reward_model_notices_what_lesson_3_says(tmp_path, capsys):
    cv, jd = (copies.HOME / "learn" / name for name in ("cv.txt", "jd.txt"))
    text = jd.read_text()
    plumber = text.replace("carpenter", "plumber")
    for duty in market.BY_TITLE["carpenter"].duties:
        plumber = plumber.replace(duty, market.BY_TITLE["plumber"].duties[0])
    changed = [text, text.replace("stair building", "wood finishing"),
               re.sub("|".join(market.CITIES), "Leeds", text),
               re.sub(r"\w+, \d+\+ years?", "senior, 9+ years", text), plumber]
    assert len(set(changed)) == 5
    seen = []
    for k, other in enumerate(changed):
        path = tmp_path / f"{k}.txt"
        path.write_text(other)
        assert girl.main(["score", "--reward", str(demo.HOME / "reward"), "--cv", str(cv), "--jd",
                          str(path)]) == 0
        out, err = capsys.readouterr()
        seen.append((f"{float(out):.2f}", f"{float(err.split(':')[1]) + 1e-9:.2f}"))
    scores, truths = zip(*seen)
    says, listed = " ".join(LESSONS.split()), "from {} to {}, {}, {} and {}".format
    assert f"The score fell {listed(*scores)}, the true match {listed(*truths)}." in says, seen


def test_every_command_of_the_lessons_runs(lesson_runs, tmp_path, monkeypatch):
    """At toy size. (What train.sh does is in lesson_runs; the debugger has tests of its own.)"""
    shutil.copytree(lesson_runs / "runs", tmp_path / "runs")
    monkeypatch.setitem(girl.SIZES, "demo", girl.SIZES["demo"] | {
        "ppo": {"iterations": 2, "episodes": 8, "minibatch": 8, "keep": 1}})
    monkeypatch.setitem(girl.SIZES, "quick", girl.SIZES["smoke"])
    demo_run = tmp_path / "runs/demo"
    assert girl.main(["ppo", "--demo", "--run", str(demo_run)]) == 0
    kinds, ran = LESSONS.split("```"), 0                # text, block, text, block, ...
    blocks = [block[1:] for block in kinds[1::2] if block.startswith("\n")]
    for line in "".join(blocks).splitlines():
        line = line.split("  #")[0].strip()
        here = line.replace("runs/", f"{tmp_path}/runs/").replace("~", str(tmp_path))
        if line.startswith("python girl.py "):
            assert girl.main(here.split()[2:]) == 0, line
        elif line.startswith(("cp ", "mkdir ", "bash ~/")):
            subprocess.run(here, shell=True, cwd=copies.HOME, check=True, capture_output=True)
        else:
            assert line.startswith(("bash train.sh ", ". .venv/", "git clone . ")), line
            continue
        ran += 1
    assert ran >= 15
    assert (tmp_path / "runs/lesson6.html").exists()


def test_what_the_lessons_name_is_there():
    """Functions, files, exercises, and the flags of their commands."""
    for name in re.findall(r"`([\w/]+\.(?:py|txt|md|csv))`", LESSONS):
        assert list(copies.HOME.glob(f"**/{name}")) or name == "metrics.csv", name
    everything = "".join(path.read_text() for pattern in ("*.py", "measure/*.py")
                         for path in copies.HOME.glob(pattern))
    for paragraph in re.findall(r"\*\*Read\.\*\*(.*?)\n\n", LESSONS, re.S):
        for name in re.findall(r"`(\w+)`", paragraph):
            assert re.search(rf"(def|class) {name}\b|^{name} = ", everything, re.M), name
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"\*\*Exercises\.\*\*(.*)", LESSONS)))
    assert named == [e.name for e in sorted(EXERCISES.values(), key=lambda e: e.lesson)]
    for command in re.findall(r"^(?:python girl.py|bash train.sh) (.*?)(?: #.*)?$", LESSONS, re.M):
        words = command.split()
        girl.parse(words if words[0] in girl.HELP else ["train", *words])
