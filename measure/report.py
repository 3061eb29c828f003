"""RUN/report.html: what a run did, to look at.

    python girl.py report --run RUN [RUN ...]

One file that needs no network, for wide and narrow screens, light and dark. Several runs are drawn
over one another; texts, tables and the trace are then those of the first. What a run does not have
is left out: the truth on real data, the recommender in a quick run. Only this file imports
matplotlib.
"""
import csv
import html
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from measure import evaluate
from measure.trace import TITLES, Replay, same_as_logged
from model import RewardModel
from plumbing.files import BadInput, write_bytes
from plumbing.inputs import need
from plumbing.stage import check_folder, finished, progress, read_summary
from plumbing.weights import load_model

# Colours that the browser replaces: the page's style sheet has a light and a dark set of them.
INK, FAINT, SERIES = "#000001", "#000002", [f"#00001{k}" for k in range(6)]
plt.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "girl", "font.size": 9, "axes.titlesize": 9,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT,
    "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES), "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8,
    "figure.constrained_layout.use": True})


# ----------------------------------------------------------------------------------- what there is
class Run(NamedTuple):
    """What is known of a run. An empty dictionary, or None, where there is nothing."""
    path: Path
    label: str              # in what it differs from the other runs; "" for one alone
    colour: str
    metrics: dict           # {stage: {column: numbers}}, of metrics.csv
    summaries: dict         # {stage: summary.json}
    results: dict
    answers: list           # answers.jsonl


def read_metrics(path):
    """{column: numbers} of a metrics.csv; a cell without a number is NaN."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != "kl_fault"]
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def load_run(path):
    """The Run in a folder. Results of other models than it has now are left out."""
    stages = [stage for stage in evaluate.STAGES if finished(path, stage)]
    for stage in stages:
        check_folder(path / stage)
    metrics = {stage: read_metrics(path / stage / "metrics.csv") for stage in stages
               if (path / stage / "metrics.csv").exists()}
    if not metrics:
        raise BadInput(f"{path}: no stage is finished; give the folder of a run")
    results, answers = {}, []
    try:
        if (path / "results.json").exists():
            results = evaluate.read_results(path)
            evaluate.check_models(path, results)
        if "answers" in results:
            answers = evaluate.read_answers(path)
    except BadInput as e:
        print(f"report: without the results: {e}")
        results = {}
    if "wins" not in results:               # the recommender's alone
        results = {name: results[name] for name in evaluate.OF_RECOMMEND if name in results}
    summaries = {stage: read_summary(path / stage) for stage in stages}
    return Run(path, "", SERIES[0], metrics, summaries, results, answers)


def label_runs(runs):
    """Give each of several runs a colour, and name it by the flags in which it differs from others;
    by its folder if by none."""
    if len(runs) == 1:
        return runs

    def flags(run):
        return {name if name == "seed" else f"{stage} --{name.replace('_', '-')}": value
                for stage, summary in run.summaries.items()
                for name, value in summary["asked"].items()}
    all_flags = [flags(run) for run in runs]
    differ = [name for name in dict.fromkeys(name for f in all_flags for name in f)
              if len({str(f.get(name)) for f in all_flags}) > 1]
    labels = [", ".join(f"{name} {f.get(name)}" for name in differ[:3]) for f in all_flags]
    if len(set(labels)) < len(runs):
        labels = [f"run {run.path}" for run in runs]
    # A dollar would begin a formula.
    return [run._replace(label=label.replace("$", r"\$"), colour=SERIES[k % len(SERIES)])
            for k, (run, label) in enumerate(zip(runs, labels))]


# ---------------------------------------------------------------------------------------- drawing
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)"} | {
    colour: f"var(--c{k})" for k, colour in enumerate(SERIES)}


def svg(figure, colours=VARIABLES):
    """A figure as inline SVG, in these colours: {ours: the page's}."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg"):]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.S)
    drawing = re.sub(r'<g id="[^"]*">', "<g>", drawing)
    drawing = re.sub(r"font-family: [^;\"]*;? ?", "", drawing)          # the page's
    drawing = re.sub(r"(\.\d\d)\d+", r"\1", drawing)         # hundredths of a point are enough
    for ours, colour in colours.items():
        drawing = drawing.replace(ours, colour)
    return re.sub(r'width="[^"]*" height="[^"]*"', 'role="img"', drawing, count=1)


def figure(title, sentence, draw, height=2.7, rows=1):
    """A titled figure with one sentence that says what to see. `draw` gets the axes: one, or a list
    of them from top to bottom."""
    drawn, axes = plt.subplots(rows, 1, sharex=rows > 1, figsize=(4.4, height))
    draw(axes)
    return (f"<figure><h3>{html.escape(title)}</h3>{svg(drawn)}"
            f"<figcaption>{sentence}</figcaption></figure>")


def smooth(y):
    """The mean over a window of a fiftieth of the steps."""
    n = max(1, len(y) // 50)
    return np.convolve(y, np.ones(n) / n, mode="valid")


def curves(runs, stage, column, ylabel):
    """A function that draws a column of metrics.csv for each run; smoothed, but for PPO."""
    def draw(ax):
        for run in runs:
            y = run.metrics[stage][column]
            drawn = y if stage == "ppo" else smooth(y)
            x = np.arange(len(y) - len(drawn), len(y)) + 1
            ax.plot(x, drawn, color=run.colour, lw=1.4, label=run.label or None)
        ax.set_xlabel("iteration" if stage == "ppo" else "step")
        ax.set_ylabel(ylabel)
        if runs[0].label:
            legend(ax)
    return draw


def legend(ax):
    """Above the axes, where it hides no curve."""
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def having(runs, stage, column):
    """The runs whose metrics.csv has numbers in this column."""
    return [run for run in runs if column in run.metrics.get(stage, {})
            and not np.isnan(run.metrics[stage][column]).all()]


def level(ax, value, label, style, colour=INK):
    ax.axhline(value, color=colour, lw=1, ls=style, label=label)


# ------------------------------------------------------------------------------ 1. what one gets
def mark_common(text, cv):
    """The text as HTML, with the words of the CV marked. Words of one or two letters are not."""
    words = set(re.findall(r"\w[\w'+#/-]{2,}", cv.lower()))
    pieces = re.split(r"(\w[\w'+#/-]{2,})", text)
    return "".join(f"<mark>{html.escape(piece)}</mark>" if piece.lower() in words
                   else html.escape(piece) for piece in pieces)


def suggestions(run):
    """Three held-out CVs with what SFT and PPO wrote for them."""
    if not run.answers:
        return ""
    cards = []
    for line in run.answers[:3]:
        columns = [f"<div><h3>CV</h3><p class=text>{html.escape(line['cv'])}</p></div>"]
        for name, title in (("base", "before training"), ("sft", "after SFT"),
                            ("ppo", "after PPO")):
            if name in line["answers"]:
                answer = line["answers"][name]
                columns.append(
                    f"<div><h3>{title} ({answer['how']})</h3>"
                    f"<p class=text>{mark_common(answer['jd'], line['cv'])}</p>"
                    f"<p class=scores>{scores_of(answer)}</p></div>")
        cards.append(f"<div class=card>{''.join(columns)}</div>")
    return section("What a job seeker gets", "The first three CVs of the "
                   f"{run.results['split']} split, one sample each at temperature 1{of_run(run)}. "
                   "<mark>Marked</mark> words occur in the CV.", cards, "")


def of_run(run):
    """Which of several runs is shown."""
    return f" ({html.escape(run.label)})" if run.label else ""


def scores_of(answer):
    truth = answer["true_match"]
    shown = "" if truth is None else f"true match <b>{truth:.2f}</b>, "
    return f"{shown}reward {answer['reward']:+.2f}, judge {answer['judge']:+.2f}"


# ------------------------------------------------------------------------------------ 2. the story
def story(runs, judged):
    """True match, reward and judge over iterations and over KL."""
    runs = having(runs, "ppo", "reward")
    if not runs:
        return ""
    with_truth, parts = having(runs, "ppo", "true_match"), []
    levels = runs[0].results if not runs[0].label and "ppo" in runs[0].results else {}
    if with_truth:
        def truth(ax):
            curves(with_truth, "ppo", "true_match", "true match")(ax)
            if levels:
                level(ax, levels["ppo"]["true_match"], "PPO, held-out CVs", "-")
                level(ax, levels["sft_best16"]["true_match"], "best of 16 SFT samples", "--")
                level(ax, levels["data"]["accepted_true_match"], "accepted jobs", ":")
                level(ax, levels["sft"]["true_match"], "SFT, held-out CVs", "-.")
                legend(ax)
        parts.append(figure("The truth", "The probability that the recruiter accepts what the "
                            "policy writes for training CVs. PPO never sees it; it should rise all "
                            "the same.", truth, 3.0))

    def scores(ax):
        curves(runs, "ppo", "reward", "score (std of SFT's samples)")(ax)
        if not runs[0].label:
            ax.lines[0].set_label("reward")
            if judged:
                ax.plot(*zip(*judged), "o", color=SERIES[1], ms=4, label="judge")
            if levels:
                level(ax, levels["sft_best16"]["reward"], "reward, best of 16", "--")
                level(ax, levels["sft"]["reward"], "reward, SFT", "-.")
            legend(ax)
    parts.append(figure("Reward and judge", "PPO learns from the reward, so it should rise. The "
                        "judge learned from other people: if it stays behind, the policy pleases "
                        "the reward model alone.", scores, 3.0))
    over = [("reward", "reward")] + ([("true_match", "true match")] if with_truth else [])

    def over_kl(axes):
        axes = np.atleast_1d(axes)
        for ax, (column, name) in zip(axes, over):
            for run in having(runs, "ppo", column):
                ax.plot(run.metrics["ppo"]["kl"], run.metrics["ppo"][column], ".-",
                        color=run.colour, lw=1, ms=4, label=run.label or None)
            ax.set_ylabel(name)
        axes[-1].set_xlabel("KL to the SFT model, nats per text")
        if runs[0].label:
            legend(axes[0])
    sentence = "How far the policy went, and what that brought."
    if with_truth:
        sentence += (" Where reward rises and truth does not, the policy pleases the model, not "
                     "the recruiter.")
    parts.append(figure("Over KL", sentence, over_kl, 3.6 if with_truth else 2.7, len(over)))
    return section("The story", "Each point is an iteration of PPO.", parts)


def look_again(run, replay, with_judge):
    """Do the kept iterations again. Returns [(iteration, mean judge of its rollout)], empty without
    a judge, and the Traces of the first and the last."""
    judge, judged, traced = None, [], []
    if with_judge and finished(run, "judge"):
        judge = load_model(need(run, "judge"), RewardModel, replay.device,
                           share_base_with=replay.reference).eval()
    ends = {replay.kept[0], replay.kept[-1]}
    for iteration in progress(replay.kept if judge else sorted(ends), "report", "iteration"):
        rolled_out = replay.roll_out(iteration)
        if judge:
            rows = zip(map(replay.codec.prompt, rolled_out.cvs), rolled_out.rollout.responses())
            judged.append((iteration, float(evaluate.score(judge, list(rows)).mean())))
        if iteration in ends:
            traced.append(replay.update(rolled_out))
    return judged, traced


# ------------------------------------------------------------------------------------ 3. the stages
STAGE_FIGURES = [
    ("sft", "loss", "SFT: loss", "NLL of a JD token, nats", "Falls fast, then slowly; the dot is "
     "the valid split at the end. A dot far above the curve: the model learned its texts by "
     "heart."),
    ("sft", "reading", "SFT: reading loss", "loss", "A plateau, then a fall: the moment at which "
     "the model learns to compare two texts."),
    ("reward", "loss", "Reward model: ranking loss", "loss", "Starts at ln 2 = 0.69, where it "
     "knows nothing."),
    ("reward", "reading", "Reward model: reading loss", "loss", "Stage 1's reading loss, kept up. "
     "If it rises, the model forgets how to compare two texts."),
    ("reward", "accuracy", "Reward model: accuracy", "share of pairs", "The share of comparisons "
     "in which the accepted text scores higher; the dot is the valid split."),
    ("ppo", "kl", "PPO: KL to the SFT model", "nats per text", "Grows and levels off. Far above "
     "10: beta is too small, or its sign is wrong."),
    ("ppo", "entropy", "PPO: entropy", "nats per token", "Falls as the policy makes up its mind. "
     "Near 0 it has collapsed: for one CV it always writes the same text."),
    ("ppo", "clip_frac", "PPO: clipped ratios", "share", "Below 0.2 is usual. Above 0.3 the steps "
     "are too large."),
    ("ppo", "explained_variance", "PPO: explained variance", "share", "How much of the "
     "variance of advantages + values the critic explains. Near 0 it reads the wrong states."),
    ("ppo", "length", "PPO: length", "tokens per JD", "Should stay near that of real JDs. A drift "
     "says that the reward model likes long or short texts."),
    ("ppo", "eos_rate", "PPO: JDs that end", "share", "Near 1. If it falls, texts are cut off at "
     "the limit, and get the penalty.")]


def stages(runs):
    parts = []
    for stage, column, title, ylabel, sentence in STAGE_FIGURES:
        found = having(runs, stage, column)
        if not found or not any(run.metrics[stage][column].any() for run in found):
            continue                        # no run has it, or it is switched off
        at_end = {"loss": "valid_nll", "accuracy": "pair_accuracy"}.get(column)

        def draw(ax):
            curves(found, stage, column, ylabel)(ax)
            ends = [(run, run.summaries[stage].get(at_end)) for run in found]
            ends = [(run, value) for run, value in ends if value is not None]
            for run, value in ends:
                ax.plot(len(run.metrics[stage][column]), value, "o", color=run.colour, ms=5)
            if ends and column == "loss":           # the first steps would flatten the rest
                ax.set_ylim(0, 3 * max(value for _, value in ends))
        parts.append(figure(title, sentence, draw))
        if (stage, column) == ("reward", "accuracy"):
            parts.append(reliability(runs[0]))
    return section("Each stage", "Curves of stages 1 and 2 are means over a fiftieth of the steps.",
                   parts)


def reliability(run):
    """Score against true match, in deciles of the score."""
    if not run.answers or run.answers[0]["answers"]["sft"]["true_match"] is None:
        return ""

    def draw(ax):
        for k, name in enumerate(("sft", "ppo")):
            rows = sorted((line["answers"][name]["reward"], line["answers"][name]["true_match"])
                          for line in run.answers)
            tenths = np.array_split(np.array(rows), min(10, len(rows)))
            x, y = zip(*(part.mean(0) for part in tenths))
            ax.plot(x, y, "o-", color=SERIES[k], lw=1.2, ms=4, label=f"{name.upper()}'s samples")
        ax.set_xlabel("reward, mean of a tenth of the samples")
        ax.set_ylabel("true match")
        legend(ax)
    return figure("Can you trust the score?", "If PPO's points lie below SFT's, the same score "
                  "is worth less there: the policy found what the model overrates.", draw)


# ------------------------------------------------------------------------------- 4. distributions
def distributions(run):
    if not run.answers:
        return ""
    parts = []
    names = {"true_match": ("true match", "PPO should empty the left side."),
             "reward": ("reward", "The whole distribution should move, not only its mean."),
             "words": ("words per JD", "Should be about the same before and after.")}
    for key, (title, sentence) in names.items():
        values = {}
        for name in ("sft", "ppo"):
            answers = [line["answers"][name] for line in run.answers]
            values[name] = [len(a["jd"].split()) if key == "words" else a[key] for a in answers]
        if None in values["sft"]:
            continue

        def draw(ax):
            bins = np.histogram_bin_edges(values["sft"] + values["ppo"], 20)
            for k, (name, numbers) in enumerate(values.items()):
                ax.hist(numbers, bins, color=SERIES[k], alpha=0.5, label=name.upper())
            ax.set_xlabel(title)
            ax.set_ylabel("CVs")
            legend(ax)
        parts.append(figure(title[0].upper() + title[1:], sentence, draw))
    return section("Before and after", f"One sample for each of {len(run.answers)} held-out CVs"
                   f"{of_run(run)}.", parts)


# ------------------------------------------------------------------------------------- 5. tables
def tables(run):
    results, parts, lead = run.results, [], ""
    if wins := results.get("wins"):
        lead = table_of_answers(run)
        parts = [figure_of_wins(wins, by, title) for by, title in
                 (("true", "true match"), ("judge", "judge"))
                 if any(row.get(by) for row in wins.values())]
    if recommend := results.get("recommend"):
        parts += [figure_of_recommender(recommend["cvs"]["rows"], kind) for kind in ("dot", "mlp")]
    if grounding := results.get("grounding"):
        parts.append(figure_of_grounding(grounding))
    return section("What it is worth", lead, parts)


def table_of_answers(run):
    """The compared answers as an HTML table."""
    results = run.results
    columns = {"true_match": "true match", "judge": "judge", "reward": "reward",
               "format_rate": "format", "distinct_2": "distinct-2", "copy_rate": "copied",
               "length": "tokens"}
    columns = {key: title for key, title in columns.items() if results["ppo"][key] is not None}
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    body = ""
    for name in (name for name in evaluate.ANSWERS if name in results):
        cells = "".join(f"<td>{cell_of(results[name], key)}</td>" for key in columns)
        body += f"<tr><th>{name} <small>({evaluate.how_written(name)})</small></th>{cells}</tr>"
    return (f"{results['cvs']} CVs of the {results['split']} split{of_run(run)}, 95% intervals "
            "over CVs. Format: the share of JDs that parse; distinct-2: different word pairs / "
            "all; copied: the share of a JD's word triples that stand in the CV."
            f"<div class=scroll><table><tr><th></th>{head}</tr>{body}</table></div>")


def cell_of(row, key):
    shown = f"{row[key]:.3f}" if row[key] is not None else "-"
    if interval := row.get(f"{key}_ci95"):
        shown += f"<br><small>{interval[0]:.2f} to {interval[1]:.2f}</small>"
    return shown


CONTRAST_NAMES = {
    "girl_vs_sft": "SFT", "girl_vs_nearest": "nearest JD", "girl_vs_random": "random JD",
    "girl_vs_constant": "best single JD", "girl_vs_echo": "echo of the CV",
    "girl_vs_best16": "best of 16 of SFT", "girl_greedy_vs_sft_greedy": "SFT, both greedy",
    "girl_vs_base": "untrained", "girl_greedy_vs_base_greedy": "untrained, both greedy"}


def figure_of_wins(wins, by, title):
    """Win, tie and lose against each answer, as bars."""
    rows = {CONTRAST_NAMES[name]: row[by] for name, row in wins.items()
            if name in CONTRAST_NAMES and row.get(by)}

    def draw(ax):
        left = np.zeros(len(rows))
        for part, name, colour in zip(zip(*rows.values()), ("win", "tie", "lose"),
                                      (SERIES[0], FAINT, SERIES[1])):
            ax.barh(list(rows), part, left=left, color=colour, label=name, alpha=0.8)
            left += part
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.set_xlabel("share of CVs")
        ax.figure.legend(loc="outside upper center", ncols=3)
    return figure(f"GIRL against other answers, by {title}", "Where blue is longer than orange, "
                  "PPO's JD is better for more CVs.", draw, 0.7 + 0.32 * len(rows) + 0.6)


def figure_of_recommender(rows, kind):
    """What each kind of generated JD adds to a recommender, by the share of labels."""
    def draw(ax):
        for k, (mode, name) in enumerate((("girl", "GIRL"), ("sft", "SFT"),
                                          ("shuffled", "of another CV"))):
            points = [(row["labels"], *row["auc_over_none"]) for row in rows
                      if (row["kind"], row["mode"], row["k"]) == (kind, mode, 1)]
            x, mean, low, high = map(np.array, zip(*points))
            ax.errorbar(x, mean, (mean - low, high - mean), fmt="o-", color=SERIES[k], ms=4, lw=1.2,
                        label=name)
        level(ax, 0, None, "-", FAINT)
        ax.set_xscale("log")
        ax.set_xlabel("labels")
        ax.set_ylabel("gain in AUC over no generated JD")
        legend(ax)
    title = {"dot": "dot product", "mlp": "network"}[kind]
    return figure(f"A recommender with generated JDs ({title})", "Generated JDs should help most "
                  "where labels are few, and JDs of another CV not at all. Bars: 95% intervals "
                  "over trainings.", draw)


def figure_of_grounding(grounding):
    """NDCG@10 of finding posted jobs, with intervals."""
    pool = list(grounding["pools"])[-1]
    rows = grounding["pools"][pool]["accepted"]["rows"]

    def draw(ax):
        for i, (name, row) in enumerate(rows.items()):
            low, high = row["ndcg_10_ci95"]
            ax.plot((low, high), (i, i), color=SERIES[0], lw=2)
            ax.plot(row["ndcg_10"], i, "o", color=SERIES[0], ms=5)
        ax.set_yticks(range(len(rows)), list(rows))
        ax.invert_yaxis()
        ax.set_xlabel("NDCG@10")
    return figure(f"Finding posted jobs, of {pool}", "Which query finds the jobs that the person "
                  "was accepted for? Lines are 95% intervals over CVs.", draw,
                  0.9 + 0.26 * len(rows))


# ------------------------------------------------------------------------------------ 6. the trace
def traces(traced):
    """Some iterations, one text of each token by token."""
    shown, data = [], []
    for t in traced:
        spans = "".join(f"<span>{html.escape(token)}</span>" for token in t.tokens)
        truth = "" if t.true_match is None else f", true match {t.true_match:.2f}"
        shown.append(
            f"<div class=trace><h3>Iteration {t.iteration} of {t.iterations}</h3>"
            f"<p class=scores>{html.escape(t.cv)}</p>"
            f"<p class=text tabindex=0 role=application aria-label='the text, token by token: "
            f"left and right arrow'>{spans}</p><p class=numbers aria-live=polite></p>"
            f"<p class=scores>score {t.score:+.2f}{truth}. {html.escape(same_as_logged(t))}</p>"
            "</div>")
        columns = t.columns | {"ratio": t.ratios[-1]}
        data.append({"tokens": t.tokens, "columns": columns, "ratios": t.ratios, "clip": t.clip})
    choices = {"kl": "KL", "value": "value", "whitened": "advantage", "ratio": "ratio"}
    buttons = "".join(f"<label><input type=radio name=colour value={key}"
                      f"{' checked' if key == 'whitened' else ''}> {name}</label> "
                      for key, name in choices.items())
    titles = TITLES | {"ratio": "ratio after the update"}
    numbers = json.dumps({"traces": data, "titles": titles}).replace("<", "\\u003c")
    return section(
        "PPO, token by token", "One text of a rollout. Blue is above 0, orange below (a ratio: "
        "above or below 1). Choose what colours it; point at a token, tap it, or use the arrow "
        f"keys. <p class=choice>{buttons}</p>", shown, "",
        f"<script type=application/json id=traces>{numbers}</script>")


# ----------------------------------------------------------------------------------- 7. the record
def record(run):
    """Flags, seconds, memory, versions."""
    parts = []
    if seconds := run.results.get("seconds"):
        cells = ", ".join(f"{name} {value:g}" for name, value in seconds.items())
        parts.append(f"<p>Seconds: {cells}. Peak memory {run.results['peak_rss_mb']} MB.</p>")
    for stage, summary in run.summaries.items():
        flags = ", ".join(f"--{name.replace('_', '-')} {value}"
                          for name, value in summary["asked"].items())
        where = ", ".join(f"{k} {v}" for k, v in summary.get("machine", {}).items())
        parts.append(f"<details><summary>{stage}: {summary.get('seconds', 0):g} seconds, "
                     f"{summary.get('peak_rss_mb', 0)} MB</summary><p class=text>"
                     f"{html.escape(flags)}</p><p>{html.escape(where)}</p></details>")
    return section("What was run", html.escape(str(run.path)), parts, "")


# ---------------------------------------------------------------------------------------- the page
def section(title, lead, parts, kind=" class=figures", more=""):
    parts = [part for part in parts if part]
    if not parts:
        return ""
    return (f"<section><h2>{title}</h2><div class=lead>{lead}</div>"
            f"<div{kind}>{''.join(parts)}</div>{more}</section>")


STYLE = """
:root { --ink: #1d2430; --faint: #8a93a0; --paper: #ffffff; --card: #f3f5f8; --mark: #ffe9a8;
  --c0: #1f6fb8; --c1: #c75b12; --c2: #2f8f4e; --c3: #8552b8; --c4: #b8324a; --c5: #5d6b78; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --faint: #7f8996; --paper: #14181e;
  --card: #1e242d; --mark: #5c4a10; --c0: #6fb3f2; --c1: #f0975a; --c2: #6fcf8e; --c3: #c19af0;
  --c4: #f08098; --c5: #a7b3c0; } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; } h3 { font-size: 1rem; margin: .3rem 0; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--faint); padding-top: 1rem; }
svg { width: 100%; height: auto; } svg text { font-family: inherit; }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: .5rem; }
.lead { margin-bottom: .8rem; } figcaption, .lead, .scores, small { font-size: .9rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.card { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr));
  background: var(--card); border-radius: .5rem; padding: .8rem; margin-top: 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; } mark { background: var(--mark);
  color: inherit; border-radius: .2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; vertical-align: top; }
th:first-child { text-align: left; } tr + tr { border-top: 1px solid var(--faint); }
.trace { background: var(--card); border-radius: .5rem; padding: .8rem; margin-top: 1rem; }
.trace .text span { border-radius: .2rem; padding: .1rem 0; cursor: pointer; }
.trace .text span.on { outline: 2px solid var(--ink); }
.numbers { min-height: 4.5rem; font-variant-numeric: tabular-nums; font-size: .9rem; }
.choice label { margin-right: 1rem; } summary { cursor: pointer; }
"""

SCRIPT = """
const { traces, titles } = JSON.parse(document.getElementById("traces").textContent);
const boxes = [...document.querySelectorAll(".trace")];
const chosen = () => document.querySelector("input[name=colour]:checked").value;
function paint() {
  boxes.forEach((box, k) => {
    const column = traces[k].columns[chosen()].map(x => chosen() == "ratio" ? Math.log(x) : x);
    const most = Math.max(1e-9, ...column.map(Math.abs));
    box.querySelectorAll("span").forEach((span, i) => {
      const part = Math.round(70 * Math.abs(column[i]) / most);
      const colour = column[i] >= 0 ? "--c0" : "--c1";
      span.style.background = `color-mix(in srgb, var(${colour}) ${part}%, transparent)`;
    });
  });
}
function show(box, k, i) {
  box.querySelectorAll("span").forEach((span, j) => span.classList.toggle("on", i == j));
  const { tokens, columns, ratios, clip } = traces[k];
  const numbers = Object.keys(columns).filter(name => name != "ratio")
    .map(name => `${titles[name]} ${columns[name][i].toFixed(3)}`).join(", ");
  const mark = x => x.toFixed(2) + (Math.abs(x - 1) > clip ? " (outside the clip range)" : "");
  box.querySelector(".numbers").textContent = `${JSON.stringify(tokens[i])}: ${numbers}; ratio ` +
    `before the update and after each step: ${ratios.map(r => mark(r[i])).join(", ")}`;
  box.dataset.at = i;
}
boxes.forEach((box, k) => {
  box.querySelectorAll("span").forEach((span, i) => {
    for (const event of ["mouseenter", "click"])
      span.addEventListener(event, () => show(box, k, i));
  });
  box.querySelector(".text").addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const n = traces[k].tokens.length, at = box.dataset.at;
    show(box, k, at == undefined ? 0 : Math.min(n - 1, Math.max(0, +at + step)));
  });
  show(box, k, 0);
});
document.querySelectorAll("input[name=colour]").forEach(x => x.addEventListener("change", paint));
paint();
"""


LIGHT = {INK: "#1d2430", FAINT: "#8a93a0"} | dict(zip(
    SERIES, ("#1f6fb8", "#c75b12", "#2f8f4e", "#8552b8", "#b8324a", "#5d6b78")))


def write_svg(path, figure):
    """A figure as a file by itself, dark on white."""
    width = f"width='{96 * figure.get_figwidth():.0f}'"         # CSS has 96 pixels in an inch
    head, rest = svg(figure, LIGHT).split(">", 1)
    background = '<rect width="100%" height="100%" fill="white"/>'
    write_bytes(path, f"{head} {width} font-family='sans-serif'>{background}{rest}".encode())


def write_picture(run, path):
    """One picture of a run, as an SVG file by itself: what PPO is paid, and what that is worth."""
    run = load_run(run)
    if not having([run], "ppo", "true_match") or "ppo" not in run.results:
        raise BadInput(f"{run.path}: the picture needs a finished PPO on the simulated market, and "
                       "its evaluation")
    ppo, results = run.metrics["ppo"], run.results
    drawn, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    left.plot(ppo["iteration"], ppo["true_match"], color=SERIES[0], lw=1.8)
    for name, title, style in (("sft_best16", "best of 16 samples of SFT", "--"),
                               ("sft", "one sample of SFT", "-.")):
        level(left, results[name]["true_match"], title, style)
    level(left, results["data"]["accepted_true_match"], "jobs that people were accepted for", ":")
    left.set(xlabel="iteration of PPO", ylabel="true match", ylim=(0, 1),
             title="True match of what the policy writes")
    left.legend(loc="lower right")
    right.plot(ppo["kl"], ppo["reward"], "o", color=SERIES[1], ms=4)
    right.set(xlabel="KL to the SFT model, nats per text", ylabel="reward",
              title="Reward, over the distance from the SFT model")
    write_svg(path, drawn)
    print(f"report: {path}")


def write_report(paths, folder, path, device, true_match):
    """Write the report of these runs to `path`. `folder`: the data of the first run, to do its
    iterations again."""
    runs = label_runs([load_run(run) for run in paths])
    first, judged, traced = runs[0], [], []
    try:
        replay = Replay(paths[0], folder, device, true_match)
        judged, traced = look_again(paths[0], replay, with_judge=len(runs) == 1)
    except BadInput as e:                   # nothing was kept, or the data are gone
        print(f"report: without the trace: {e}")
    if any(t.differences() for t in traced):
        judged = []                         # of other texts than those of training
    sections = [suggestions(first), story(runs, judged), stages(runs), distributions(first),
                tables(first), traces(traced) if traced else "", *map(record, runs)]
    title = html.escape("GIRL: " + ", ".join(str(run.path) for run in runs))
    page = (f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
            f"content='width=device-width, initial-scale=1'><title>{title}</title>"
            f"<style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(sections)}"
            f"{f'<script>{SCRIPT}</script>' if traced else ''}</body></html>\n")
    content = page.encode("utf-8", "backslashreplace")
    write_bytes(path, content)
    print(f"report: {path} ({len(content) // 1000} kB)")
