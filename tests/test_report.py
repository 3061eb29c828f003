"""The report: one file with what a run has, in order, and nothing that it does not have."""
import json
import re
import shutil

import numpy as np
import pytest
import torch

import girl
import market
from conftest import argv, refused
from measure import evaluate, report
from measure.trace import Replay, Trace
from plumbing.stage import KEPT

CPU = torch.device("cpu")
SECTIONS = ["What a job seeker gets", "The story", "Each stage", "Before and after",
            "What it is worth", "PPO, token by token", "What was run"]


def make(runs, whole, path, capsys=None):
    command = ["report", "--data", str(whole / "data"), "--file", str(path), "--run"]
    assert girl.main([*command, *map(str, runs)]) == 0
    return path.read_text()


@pytest.fixture(scope="module")
def page(whole, evaluated, tmp_path_factory):
    return make([evaluated], whole, tmp_path_factory.mktemp("report") / "page.html")


def test_the_page_has_its_sections_in_order_and_a_sentence_for_each_figure(page):
    assert re.findall("<h2>(.*?)</h2>", page) == SECTIONS
    figures = re.findall("<figure>.*?</figure>", page, re.S)
    assert len(figures) >= 18
    for drawn in figures:
        assert "<svg" in drawn and re.search("<figcaption>[A-Z].*[.?]</figcaption>", drawn, re.S)


def test_the_page_needs_no_other_file_and_no_network(page):
    assert len(page) < 3e6
    assert not re.search(r"<(link|img|iframe|script)[^>]*(src|href)=", page)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert {a.split("/")[2] for a in addresses} <= {"www.w3.org"}   # names of XML, not fetched
    assert "@import" not in page and "url(http" not in page


def test_every_colour_is_the_pages(page):
    """matplotlib's would not be seen in the dark."""
    assert not re.search("#0000[0-9a-f]{2}", page)
    used = set(re.findall(r"var\(--(\w+)\)", page))
    for theme in re.findall(r":root {(.*?)}", page, re.S):
        assert used <= set(re.findall(r"--(\w+):", theme))


def test_texts_and_numbers_are_those_of_the_answers(page, evaluated):
    for line in evaluate.read_answers(evaluated)[:3]:
        for name in ("sft", "ppo"):
            answer = line["answers"][name]
            assert report.mark_common(answer["jd"], line["cv"]) in page
            assert report.scores_of(answer) in page
    assert "after PPO (sampled)" in page and "(greedy)" in page
    results = evaluate.read_results(evaluated)
    assert f"<td>{results['ppo']['true_match']:.3f}" in page


def test_a_recommender_is_drawn_with_its_paired_intervals(evaluated):
    """From results like those of `recommend`."""
    rows = [{"kind": kind, "mode": mode, "k": 1, "labels": labels, "auc": [0.7, 0.01]}
            | ({} if mode == "none" else {"auc_over_none": [0.05, 0.02, 0.08]})
            for kind in ("dot", "mlp") for labels in (10, 100)
            for mode in ("none", "sft", "girl", "shuffled")]
    found = {"cv": {"ndcg_10": 0.2, "ndcg_10_ci95": [0.1, 0.3]}}
    run = report.load_run(evaluated)
    results = run.results | {"recommend": {"cvs": {"rows": rows}},
                             "grounding": {"pools": {"100": {"accepted": {"rows": found}}}}}
    page = report.tables(run._replace(results=results))
    for title in ("with generated JDs (dot product)", "with generated JDs (network)",
                  "Finding posted jobs, of 100"):
        assert title in page
    del results["wins"]                     # the recommender alone
    page = report.tables(run._replace(results={k: results[k] for k in evaluate.OF_RECOMMEND}))
    assert "(network)" in page and "GIRL against" not in page


def test_words_of_the_cv_are_marked_and_nothing_is_html():
    marked = report.mark_common("Cook: <b>Pastry</b> & knives, at C++ a", "cook, pastry, C++ & b a")
    assert marked == ("<mark>Cook</mark>: &lt;b&gt;<mark>Pastry</mark>&lt;/b&gt; &amp; knives, at "
                      "<mark>C++</mark> a")


def test_the_trace_holds_the_numbers_of_training(page, whole, evaluated):
    found = json.loads(re.search("id=traces>(.*?)</script>", page, re.S)[1])
    replay = Replay(evaluated, whole / "data", CPU, market.true_match)
    assert len(found["traces"]) == 2
    for shown, iteration in zip(found["traces"], (1, 2)):
        t = replay.trace(iteration)
        assert shown["tokens"] == t.tokens and shown["ratios"] == t.ratios
        assert shown["columns"] == t.columns | {"ratio": t.ratios[-1]}
        assert set(shown["columns"]) == set(found["titles"])


def test_the_judge_is_asked_about_the_rollouts_of_kept_iterations(whole, evaluated):
    replay = Replay(evaluated, whole / "data", CPU)
    judged, traced = report.look_again(evaluated, replay, with_judge=True)
    assert [t.iteration for t in traced] == [1, 2]
    assert report.look_again(evaluated, replay, with_judge=False)[0] == []
    assert [iteration for iteration, _ in judged] == [1, 2]
    judge = report.load_model(evaluated / "judge", report.RewardModel, CPU).eval()
    rolled_out = replay.roll_out(2)
    rows = list(zip(map(replay.codec.prompt, rolled_out.cvs), rolled_out.rollout.responses()))
    assert judged[1][1] == pytest.approx(evaluate.score(judge, rows).mean(), abs=1e-6)


def test_the_judge_is_not_shown_for_texts_that_are_not_those_of_training(
        whole, evaluated, tmp_path, monkeypatch):
    """As on another machine: the rollouts that are done again are others."""
    def story(page):
        return page[page.index("The story"):page.index("Each stage")]
    assert ">judge<" in story(make([evaluated], whole, tmp_path / "page.html"))
    monkeypatch.setattr(Trace, "differences", lambda self: [("kl", 1.0, 2.0)])
    page = make([evaluated], whole, tmp_path / "page.html")
    assert ">judge<" not in story(page) and "differs from metrics.csv: kl 1.0 instead" in page


def test_results_of_other_models_are_left_out(whole, evaluated, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    shutil.rmtree(run / "ppo")
    assert girl.main(argv("ppo", run, whole / "data", "--kl-coef", "0.3")) == 0
    page = make([run], whole, tmp_path / "page.html")
    assert "report: without the results: " in capsys.readouterr().out
    assert re.findall("<h2>(.*?)</h2>", page) == ["The story", "Each stage",
                                                  "PPO, token by token", "What was run"]


def without_truth(run):
    """The run as it would be on real data."""
    metrics = {stage: columns.copy() for stage, columns in run.metrics.items()}
    metrics["ppo"]["true_match"] = np.full(len(metrics["ppo"]["kl"]), np.nan)
    results, answers = json.loads(json.dumps([run.results, run.answers]))
    for row in [results[name] for name in evaluate.ANSWERS if name in results]:
        row |= dict.fromkeys(("true_match", "true_match_ci95", "format_rate"))
    results["data"] = dict.fromkeys(results["data"])
    for row in results["wins"].values():
        row["true"] = None
    for line in answers:
        for answer in line["answers"].values():
            answer["true_match"] = None
    return run._replace(metrics=metrics, results=results, answers=answers)


def test_without_a_market_the_truth_is_absent(whole, evaluated, tmp_path, monkeypatch):
    load_run = report.load_run
    monkeypatch.setattr(report, "load_run", lambda path: without_truth(load_run(path)))
    report.write_report([evaluated], whole / "data", tmp_path / "page.html", CPU, None)
    page = (tmp_path / "page.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == SECTIONS
    assert "true match" not in page.lower() and "recruiter" not in page
    assert not re.search(r"\bnan\b", page.lower())


def test_what_a_run_does_not_have_is_left_out(whole, evaluated, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    shutil.rmtree(run / "ppo" / KEPT)
    page = make([run], whole, tmp_path / "page.html")
    assert "report: without the trace: " in capsys.readouterr().out
    assert re.findall("<h2>(.*?)</h2>", page) == [s for s in SECTIONS if "token" not in s]
    (run / "results.json").unlink()
    page = make([run], whole, tmp_path / "page.html")
    assert re.findall("<h2>(.*?)</h2>", page) == ["The story", "Each stage", "What was run"]
    for stage in ("reward", "judge", "ppo"):
        shutil.rmtree(run / stage)
    page = make([run], whole, tmp_path / "page.html")
    assert re.findall("<h2>(.*?)</h2>", page) == ["Each stage", "What was run"]
    (run / "sft" / "summary.json").unlink()
    refused(capsys, ["report", "--run", str(run)], f"{run}: no stage is finished")


def test_runs_are_named_by_what_differs(whole, evaluated, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(evaluated, other)
    shutil.rmtree(other / "ppo")
    assert girl.main(argv("ppo", other, whole / "data", "--kl-coef", "0.1")) == 0
    runs = report.label_runs([report.load_run(run) for run in (evaluated, other)])
    assert len({run.colour for run in runs}) == 2
    assert [run.label for run in runs] == ["ppo --kl-coef 0.08", "ppo --kl-coef 0.1"]
    same = report.label_runs([report.load_run(evaluated)] * 2)
    assert [run.label for run in same] == [f"run {evaluated}"] * 2
    page = make([evaluated, other], whole, tmp_path / "page.html")
    assert page.count(">ppo --kl-coef 0.1<") >= 8 and page.count("<h2>What was run</h2>") == 2
    assert ">judge<" not in page[page.index("The story"):page.index("Each stage")]


def test_curves_are_means_over_a_fiftieth_of_the_steps():
    assert report.smooth(np.arange(49.0)).tolist() == list(range(49))
    assert report.smooth(np.arange(100.0)).tolist() == [k + 0.5 for k in range(99)]


def test_a_cell_without_a_number_is_nan(tmp_path):
    (tmp_path / "metrics.csv").write_text("iteration,true_match,kl_fault\n1,,False\n2,0.5,True\n")
    found = report.read_metrics(tmp_path / "metrics.csv")
    assert set(found) == {"iteration", "true_match"}
    assert np.isnan(found["true_match"][0]) and found["true_match"][1] == 0.5


def test_the_picture_stands_alone(whole, evaluated, tmp_path, capsys):
    run, path = tmp_path / "run", tmp_path / "run.svg"
    shutil.copytree(evaluated, run)
    command = ["report", "--run", str(run), "--data", str(whole / "data"), "--picture", str(path)]
    assert girl.main(command) == 0
    text = path.read_text()
    assert text.startswith("<svg") and len(text) < 2e5
    assert "var(" not in text and not re.search("#0000[0-9a-f]{2}", text)
    (run / "results.json").unlink()
    refused(capsys, command, "the picture needs a finished PPO")


# ---------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: "
                                     "the page was not tried in a browser")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
    if not path:
        pytest.skip("no Chromium is installed: the page was not tried in a browser")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_in_a_browser_a_click_shows_the_numbers_of_a_token(browser, page, tmp_path):
    (tmp_path / "page.html").write_text(page)
    traces = json.loads(re.search("id=traces>(.*?)</script>", page, re.S)[1])["traces"]
    tab, faults = browser.new_page(viewport={"width": 390, "height": 800}), []
    tab.on("pageerror", lambda e: faults.append(str(e)))
    tab.on("request", lambda r: r.url.startswith("file:") or faults.append(r.url))
    tab.goto(f"file://{tmp_path / 'page.html'}")
    box = tab.locator(".trace").nth(1)
    tokens, numbers = box.locator(".text span"), box.locator(".numbers")
    assert tokens.count() == len(traces[1]["tokens"])
    tokens.nth(2).click()
    assert f"KL {traces[1]['columns']['kl'][2]:.3f}" in numbers.text_content()
    box.locator(".text").press("ArrowRight")
    assert f"value {traces[1]['columns']['value'][3]:.3f}" in numbers.text_content()
    before = tokens.nth(3).get_attribute("style")
    tab.get_by_label("KL").check()
    assert tokens.nth(3).get_attribute("style") != before
    for width in 390, 320:                                                     # nothing sticks out
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert faults == []
    tab.close()
