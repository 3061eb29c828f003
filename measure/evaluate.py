"""Measure a run on held-out CVs: results.json, the table at the end of train.sh, and answers.jsonl
with all that was written for each CV.

    python girl.py evaluate --run RUN [--split valid|test]

Training uses nothing from here, and no checkpoint is picked: the last one is measured. `market` is
the simulation's module if the data are simulated, else None: then figures that need the true match
are null.

The compared answers give one JD for each CV. `reward` and `judge` are the plain scores of the two
models, also for truncated JDs (PPO would give those its fixed penalty).

- Generators: `sft` and `ppo` sample at temperature 1, `_greedy` takes the likeliest token,
  `sft_best16` is the best of 16 SFT samples by the reward model, `base` is the pretrained model
  that the run started from, if any.
- Retrieval, from the pairs that stage 1 learned from: `nearest` is the JD that the most similar
  candidate was accepted for, `random` is any JD.
- Rules of the market: `constant`, `echo`. Of a third rule, `oracle`, the data figures give the true
  match alone.

You can also ask an outside judge (a person, or another language model):

    python girl.py evaluate --run RUN --export-pairs FILE    write prompts, one JSON line each, with
                                                             two JDs in shuffled order
    python girl.py evaluate --run RUN --verdicts FILE        read the answers, print the same table
"""
import hashlib
import json
import math
import random
import sys
import time
from typing import NamedTuple

import numpy as np
import torch

import ppo
import reward
from data import Codec, load_codec, read_half, read_records
from plumbing.records import json_lines
from model import LanguageModel, RewardModel, generate, logits_size, rows_that_fit
from plumbing.files import (BadInput, checksum, locked, read_checked, sha256, with_checksum,
                            write_bytes, write_json)
from plumbing.inputs import models_before
from plumbing.stage import autocast, generator, peak_rss_mb, progress, read_summary
from sft import mean_nll
from plumbing.weights import load_model

BEST_OF = 16
SAMPLES = 4                 # for each CV, to measure accuracy on a policy's own samples
STAGES = ("data", "sft", "reward", "judge", "ppo")
MEASURES = ("evaluate", "recommend")
# The answers that are compared with each other, CV by CV. GIRL is the generator after PPO.
CONTRASTS = {
    "girl_vs_sft": ("ppo", "sft"),
    "girl_vs_nearest": ("ppo", "nearest"),
    "girl_vs_random": ("ppo", "random"),
    "girl_vs_constant": ("ppo", "constant"),
    "girl_vs_echo": ("ppo", "echo"),
    "girl_vs_best16": ("ppo", "sft_best16"),
    "girl_greedy_vs_sft_greedy": ("ppo_greedy", "sft_greedy"),
    "sft_vs_nearest": ("sft", "nearest"),
    "girl_vs_base": ("ppo", "base"),
    "girl_greedy_vs_base_greedy": ("ppo_greedy", "base_greedy")}
# Smaller differences are ties: in true match, and in standard deviations of the judge.
TIE = {"true": 0.02, "judge": 0.1}
# The true match is 0.95 times the product of these: market.skills_factor and so on.
FACTORS = ("skills", "years", "degree", "place", "field")
ANSWERS = ("base", "sft", "ppo", "base_greedy", "sft_greedy", "ppo_greedy", "sft_best16",
           "nearest", "random", "constant", "echo")


# --------------------------------------------------------------------------------------- measures
def bootstrap_ci95(values, seed, weights=None, resamples=2000):
    """95% interval of the mean over CVs: the 2.5 and 97.5 percentiles of the means of resampled CVs
    (Efron 1979). With weights it is that of the weighted mean: each value is then itself the mean
    of so many items."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    if weights is None:
        means = values[picks].mean(1)
    else:
        weights = np.asarray(weights, dtype=float)
        means = (values * weights)[picks].sum(1) / weights[picks].sum(1)
    return [float(x) for x in np.percentile(means, (2.5, 97.5))]


def ngrams(text, n):
    words = text.split()
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def copy_rate(cvs, texts):
    """Share of the JDs' word trigrams that occur in the CV word for word."""
    copied = total = 0
    for cv, text in zip(cvs, texts):
        in_cv, in_jd = set(ngrams(cv, 3)), ngrams(text, 3)
        copied += sum(gram in in_cv for gram in in_jd)
        total += len(in_jd)
    return copied / max(total, 1)


def distinct_2(texts):
    """Unique word bigrams over all texts / all word bigrams (Li et al. 2016, arXiv 1510.03055)."""
    bigrams = [bigram for text in texts for bigram in ngrams(text, 2)]
    return len(set(bigrams)) / max(len(bigrams), 1)


# -------------------------------------------------------------------------- generating and scoring
def write_jds(lm, codec, cvs, temperature, seed, name, device, batch_size=256):
    """One response (a token list) for each CV. `name` labels the progress bar; it starts with the
    command."""
    responses = []
    for k in progress(range(0, len(cvs), batch_size), name, "batch"):
        prompts = [codec.prompt(cv) for cv in cvs[k:k + batch_size]]
        draw = generator(seed, name, k, device=device)
        with autocast(device):
            responses += generate(lm, prompts, codec.max_jd, temperature, generator=draw)
    return responses


def write_samples(lm, codec, cvs, n, seed, name, device):
    """n responses for each CV at temperature 1: [n][CVs]."""
    repeated = [cv for cv in cvs for _ in range(n)]
    responses = write_jds(lm, codec, repeated, 1.0, seed, name, device)
    return [responses[k::n] for k in range(n)]


def score(model, rows):
    """Scores of (prompt, JD) token rows, an array in their order. Here a CV comes with many JDs,
    and some rows come twice: each row is scored once, and a prompt is read once for all JDs of a
    batch. (On some hundred decisions this took 0.58 of the time of reward.score_rows, in one
    measurement.)"""
    prompts = sorted(dict.fromkeys(tuple(prompt) for prompt, _ in rows), key=len)
    jds = list(dict.fromkeys(tuple(jd) for _, jd in rows))
    prompt_at = {prompt: i for i, prompt in enumerate(prompts)}
    jd_at = {jd: i for i, jd in enumerate(jds)}
    pairs = [(prompt_at[tuple(prompt)], jd_at[tuple(jd)]) for prompt, jd in rows]
    score_of = reward.score_pairs(model, prompts, jds, set(pairs))
    return np.array([score_of[pair] for pair in pairs])


def score_texts(model, codec, pairs):
    """`score` of (cv, jd) texts."""
    return score(model, [(codec.prompt(cv), codec.jd(jd)) for cv, jd in pairs])


def score_each(model, codec, cvs, answers):
    """Scores [answers, CVs] of several answers. Each answer is one response for each CV."""
    rows = [(codec.prompt(cv), r) for responses in answers for cv, r in zip(cvs, responses)]
    return score(model, rows).reshape(len(answers), len(cvs))


@torch.no_grad()
def kl_per_text(policy, reference, codec, cvs, responses, device):
    """Sum of log(pi / pi_ref) over a text's tokens, averaged over the policy's samples; in nats."""
    total, batch_size = 0.0, rows_that_fit(64, logits_size(policy.config))
    for k in range(0, len(cvs), batch_size):
        prompts = [codec.prompt(cv) for cv in cvs[k:k + batch_size]]
        rollout = ppo.make_rollout(prompts, responses[k:k + batch_size], device)
        with autocast(device):
            logp, _ = ppo.evaluate_policy(policy, rollout, 1.0)                 # [B, R]
            ref_logp, _ = ppo.evaluate_policy(reference, rollout, 1.0)          # [B, R]
            kl = ppo.k1(logp, ref_logp)
        total += float((kl * rollout.mask).sum())
    return total / len(cvs)


def true_matches(cvs, texts, market):
    return np.array([market.true_match(cv, text) for cv, text in zip(cvs, texts)])


def score_all(cvs, responses, codec, models, market):
    """{answer: {"texts", "true", and a key for each model}}: the texts of its JDs, their true match
    and the models' scores, in the order of the CVs. `models`: {"reward": ..., "judge": ...}."""
    answers, scored = list(responses.values()), {}
    scores = {by: score_each(model, codec, cvs, answers) for by, model in models.items()}
    for i, name in enumerate(responses):
        texts = [codec.text(r) for r in answers[i]]
        truth = true_matches(cvs, texts, market) if market else None
        scored[name] = {"texts": texts, "true": truth}
        scored[name] |= {by: of_answers[i] for by, of_answers in scores.items()}
    return scored


def mean_factors(cvs, texts, market):
    """The factors of the true match, {factor: mean}, over the JDs that parse: the others have no
    factors, and `format_rate` counts those. Each factor is None if no JD parses."""
    pairs = [(market.of_market(cv), market.parse_jd(text)) for cv, text in zip(cvs, texts)]
    parsed = [(person, job) for person, job in pairs if job]
    if not parsed:
        return dict.fromkeys(FACTORS)
    factors = {name: getattr(market, f"{name}_factor") for name in FACTORS}
    return {name: float(np.mean([f(*pair) for pair in parsed])) for name, f in factors.items()}


def describe(cvs, responses, scored, codec, known_jds, market, seed):
    """The figures of one answer, one response for each CV. `scored`: its entry in `score_all`;
    `known_jds`: the JDs of half A, and `seen_rate` is the share of the answer's JDs that repeat
    one of them word for word."""
    texts = scored["texts"]
    result = {
        "format_rate": None, "title_rate": None, "factors": None,
        "true_match": None, "true_match_ci95": None,
        "reward": float(scored["reward"].mean()),
        "reward_ci95": bootstrap_ci95(scored["reward"], seed),
        "judge": float(scored["judge"].mean()),
        "judge_ci95": bootstrap_ci95(scored["judge"], seed),
        "copy_rate": copy_rate(cvs, texts), "distinct_2": distinct_2(texts),
        "seen_rate": float(np.mean([text in known_jds for text in texts])),
        "length": float(np.mean([len(r) for r in responses])),
        "eos_rate": float(np.mean([r[-1] == codec.eos for r in responses]))}
    if market:
        parses = [market.parse_jd(text) is not None for text in texts]
        fits = [market.fits_title(cv, text) for cv, text in zip(cvs, texts)]
        result |= {
            "format_rate": float(np.mean(parses)),
            "title_rate": float(np.mean(fits)),
            "true_match": float(scored["true"].mean()),
            "true_match_ci95": bootstrap_ci95(scored["true"], seed)}
        result["factors"] = mean_factors(cvs, texts, market)
    return result


# --------------------------------------------------------------------- answers without generating
def tfidf(rows, idf):
    """Token rows as sparse vectors of length 1, [N, V]: each token is weighted by its rarity
    `idf` [V]."""
    at = torch.tensor([i for i, row in enumerate(rows) for _ in row], dtype=torch.long)
    ids = torch.tensor([t for row in rows for t in row], dtype=torch.long)
    vectors = torch.sparse_coo_tensor(torch.stack((at, ids)), idf[ids], (len(rows), len(idf)),
                                      check_invariants=False).coalesce()
    at, values = vectors.indices()[0], vectors.values()
    norms = torch.zeros(len(rows)).index_add(0, at, values ** 2).sqrt().clamp(min=1e-9)      # [N]
    return torch.sparse_coo_tensor(vectors.indices(), values / norms[at], vectors.shape,
                                   is_coalesced=True, check_invariants=False)


def tfidf_cosine(queries, documents, vocab_size):
    """Cosines of token rows as TF-IDF vectors (Sparck Jones 1972): [queries, documents]."""
    tokens = torch.tensor([t for row in documents for t in set(row)], dtype=torch.long)
    df = torch.bincount(tokens, minlength=vocab_size)                           # [V]
    idf = (len(documents) / df.clamp(min=1)).log()                              # [V]
    return (tfidf(documents, idf) @ tfidf(queries, idf).to_dense().T).T


def retrieved(codec, pairs, cvs, seed):
    """A JD for each CV from accepted (cv, jd) pairs: of the most similar candidate, or of any."""
    draw = random.Random(seed)
    candidates = [codec.encode(cv) for cv, _ in pairs]
    queries = [codec.encode(cv) for cv in cvs]
    closest = tfidf_cosine(queries, candidates, codec.tokenizer.get_vocab_size()).argmax(1)
    return {"nearest": [pairs[i][1] for i in closest.tolist()],
            "random": [draw.choice(pairs)[1] for _ in cvs]}


# --------------------------------------------------------------------------------- win, tie, lose
def win_tie_lose(wins, losses, seed):
    """Shares of CVs won, tied and lost, and the 95% interval of win - lose over CVs. `wins` and
    `losses` hold one bool for each CV."""
    wins, losses = np.asarray(wins, dtype=float), np.asarray(losses, dtype=float)
    return ([float(wins.mean()), float((1 - wins - losses).mean()), float(losses.mean())],
            bootstrap_ci95(wins - losses, seed))


def compare(a, b, seed):
    """How often is answer `a` better than `b` for the same CV, by the true match and by the judge?
    Both are entries of `score_all`."""
    result = {}
    for by, tie in TIE.items():
        shares = interval = None
        if a[by] is not None:
            shares, interval = win_tie_lose(a[by] - b[by] >= tie, b[by] - a[by] >= tie, seed)
        result |= {by: shares, f"{by}_advantage_ci95": interval}
    return result


# ------------------------------------------------------------------------------- an outside judge
ASPECTS = ("detail", "relevance", "conciseness")
QUESTION = (
    "Below are the CV of a job seeker and two job descriptions, A and B, "
    "that were suggested to this person.\n"
    "Which one is better in its level of detail, in its relevance to this CV, "
    "and in its conciseness?\n"
    'Answer with one line of JSON, "A", "B" or "tie" for each: '
    '{{"detail": "...", "relevance": "...", "conciseness": "..."}}\n'
    "\nCV:\n{cv}\n"
    "\nA:\n{a}\n"
    "\nB:\n{b}\n")


def swapped(seed, name):
    """Show the first answer of this pair as B? A hash decides: hidden from the judge,
    recomputable."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()[0] % 2 == 1


def export_pairs(path, cvs, scored, seed):
    """Write one JSON line {"id", "prompt"} for each CV of each contrast: questions for an outside
    judge."""
    lines = []
    for contrast, (first, second) in CONTRASTS.items():
        if not (first in scored and second in scored):
            continue
        for i, cv in enumerate(cvs):
            name = f"{contrast}/{i}"
            a, b = scored[first]["texts"][i], scored[second]["texts"][i]
            if swapped(seed, name):
                a, b = b, a
            line = {"id": name, "prompt": QUESTION.format(cv=cv, a=a, b=b)}
            lines.append(json.dumps(line, ensure_ascii=False))
    write_bytes(path, "\n".join(lines).encode() + b"\n")
    print(f"{len(lines)} pairs in {path}: answer each with a line  "
          '{"id": "...", "detail": "A", "relevance": "B", "conciseness": "tie"}  '
          "and read them with --verdicts")


def read_verdicts(path, results):
    """The answers of an outside judge: {contrast: {"answers": their number, and for each aspect
    aspect: [win, tie, lose], aspect_advantage_ci95: [low, high]}}."""
    answers = {}
    for where, raw in json_lines(path, "give the file with the answers to --export-pairs"):
        name = check_verdict(raw, where, results["cvs"])
        if name in answers:
            raise BadInput(f"{where}: a second answer for {name}; keep one")
        answers[name] = raw
    if not answers:
        raise BadInput(f"{path}: no answers; expected lines like "
                       '{"id": "girl_vs_sft/0", "detail": "A", ...}')
    table = {}
    for contrast in CONTRASTS:
        verdicts = {name: v for name, v in answers.items() if name.split("/")[0] == contrast}
        if not verdicts:
            continue
        table[contrast] = {"answers": len(verdicts)}
        # The letter of the contrast's first answer in each pair.
        first = {name: "AB"[swapped(results["seed"], name)] for name in verdicts}
        for aspect in ASPECTS:
            wins = [v[aspect] == first[name] for name, v in verdicts.items()]
            losses = [v[aspect] not in (first[name], "tie") for name, v in verdicts.items()]
            shares, interval = win_tie_lose(wins, losses, results["seed"])
            table[contrast] |= {aspect: shares, f"{aspect}_advantage_ci95": interval}
    return table


def add_verdicts(run, path):
    """Read the answers to `export_pairs` into results.json, and print them."""
    with locked(run, wait=True):             # the recommender may be about to write results.json
        results = read_results(run)
        if "wins" not in results:
            raise BadInput(f"{run / 'results.json'}: holds no evaluation; run  "
                           f"python girl.py evaluate --run {run}  first")
        table = read_verdicts(path, results)
        for contrast, row in table.items():
            results["wins"][contrast] = results["wins"].get(contrast, {}) | row
        write_results(run, results)
    print_wins(table)


def check_verdict(raw, where, n_cvs):
    """The id of the pair that this line's object answers."""
    if not isinstance(raw, dict) or not {"id", *ASPECTS} <= set(raw):
        raise BadInput(f"{where}: expected the keys id, {', '.join(ASPECTS)}")
    contrast, _, number = str(raw["id"]).partition("/")
    is_index = number.isdecimal() and len(number) < 10 and str(int(number)) == number
    if contrast not in CONTRASTS or not is_index or int(number) >= n_cvs:
        raise BadInput(f"{where}: this run has no pair {str(raw['id'])[:80]!r}")
    if bad := [raw[aspect] for aspect in ASPECTS if raw[aspect] not in ("A", "B", "tie")]:
        raise BadInput(f"{where}: an answer is \"A\", \"B\" or \"tie\", found {repr(bad[0])[:80]}")
    return raw["id"]


# -------------------------------------------------------------------------- data and reward model
def accepted_pairs(records):
    """The accepted (cv, jd) pairs."""
    return [(r.cv, r.jd) for r in records if r.accepted]


def data_figures(records, rules, cvs, market):
    """Figures of the data alone: the true match of accepted decisions and of the rules' answers."""
    if not market:
        return dict.fromkeys(("accepted_true_match", "best_constant_match", "echo_match",
                              "oracle_match", "bayes_pair_accuracy"))

    def mean_match(pairs):
        return float(np.mean([market.true_match(cv, jd) for cv, jd in pairs]))
    same = [r for r in records if market.same_occupation(r)]
    truth = np.array([market.true_match(r.cv, r.jd) for r in same])
    return {"accepted_true_match": mean_match(accepted_pairs(records)),
            "best_constant_match": mean_match(zip(cvs, rules["constant"])),
            "echo_match": mean_match(zip(cvs, rules["echo"])),
            "oracle_match": mean_match(zip(cvs, rules["oracle"])),
            "bayes_pair_accuracy": reward.pair_metrics(same, truth)["pair_accuracy"]}


def accuracy(margins, seed):
    """The share of positive margins in groups of margins (ties count half), and its interval over
    groups."""
    if not margins:
        return None, None
    right = [((group > 0) + 0.5 * (group == 0)).mean() for group in margins]
    sizes = [len(group) for group in margins]
    return float(np.average(right, weights=sizes)), bootstrap_ci95(right, seed, sizes)


def easy_pairs(records, draw):
    """(cv, jd, other jd): up to 400 accepted decisions, each with a JD that another CV was accepted
    for."""
    pairs = accepted_pairs(records)
    accepted, easy = set(pairs), []
    for cv, jd in draw.sample(pairs, min(400, len(pairs))):
        other = draw.choice(pairs)[1]
        if (cv, other) not in accepted:
            easy.append((cv, jd, other))
    return easy


def reward_figures(model, codec, records, market, seed):
    """Pair accuracy on the split's decisions (within one occupation, if there are occupations), on
    easy pairs (an accepted JD against one that another CV was accepted for), and on single changes
    of a JD."""
    same = [r for r in records if market.same_occupation(r)] if market else records
    decided, changes = [(r.cv, r.jd) for r in same], {}
    easy = easy_pairs(records, random.Random(f"{seed} easy"))
    for field in market.FIELDS if market else ():
        draw = random.Random(f"{seed} {field}")
        changes[field] = market.one_changes(draw, same, field, 400)
    all_triples = easy + [triple for triples in changes.values() for triple in triples]
    pairs = decided + [(cv, jd) for cv, *two_jds in all_triples for jd in two_jds]
    score_of = dict(zip(pairs, score_texts(model, codec, pairs)))
    scores = np.array([score_of[pair] for pair in decided])

    def margins(triples):
        """Score of the first JD less that of the second."""
        return np.array([score_of[cv, jd] - score_of[cv, other] for cv, jd, other in triples])
    share, interval = accuracy(list(margins(easy)[:, None]), seed)
    noticed = {field: float((margins(triples) > 0).mean()) if triples else None
               for field, triples in changes.items()}
    return reward.pair_metrics(same, scores) | {
        "pair_accuracy_ci95": accuracy(reward.pair_margins(same, scores), seed)[1],
        "easy_pair_accuracy": share, "easy_pair_accuracy_ci95": interval, "center": model.center,
        "one_change_accuracy": noticed if market else None}


def sample_margins(truth, scores):
    """For each CV the margins score(better) - score(worse) over pairs of its samples, ordered by
    the true match. Pairs that differ by less than a tie are left out, and so are CVs without pairs.
    truth, scores: [samples, CVs]."""
    margins = []
    for matches, given in zip(truth.T, scores.T):                               # [samples] each
        better, worse = np.nonzero(matches[:, None] - matches >= TIE["true"])
        margins.append(given[better] - given[worse])
    return [group for group in margins if len(group)]


def sample_figures(cvs, samples, scores, codec, market, seed):
    """How well does a score order a policy's own samples? PPO needs it there.

    `sample_accuracy` is {policy: {score: share}}: the share of pairs, among SAMPLES samples for one
    CV, that the score orders as the true match does. Pairs whose true matches differ by less than a
    tie do not count; equal scores count half. The intervals are over CVs.

    samples: {policy: [samples][CVs] responses}, scores: {policy: {score: [samples, CVs]}}."""
    if not market:
        return {"sample_accuracy": None, "sample_accuracy_ci95": None}
    shares, intervals = {}, {}
    for policy, rows in samples.items():
        truth = np.array([true_matches(cvs, map(codec.text, responses), market)
                          for responses in rows])                               # [samples, CVs]
        shares[policy], intervals[policy] = {}, {}
        for by, given in scores[policy].items():
            margins = sample_margins(truth, given)
            shares[policy][by], intervals[policy][by] = accuracy(margins, seed)
    return {"sample_accuracy": shares, "sample_accuracy_ci95": intervals}


# ----------------------------------------------------------------------------------- results.json
def covered(stages):
    """Seconds in which at least one stage was running: stages that ran side by side count once."""
    total, until = 0.0, -math.inf
    for start, end in sorted((s["started"], s["started"] + s["seconds"]) for s in stages):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


# In `train`, evaluate and recommend write results.json side by side. These keys are recommend's.
OF_RECOMMEND = ("recommend", "grounding")


def read_results(run):
    """results.json, as `write_results` left it."""
    path, command = run / "results.json", f"python girl.py evaluate --run {run}"
    if not path.exists():
        raise BadInput(f"{path}: no such file; run  {command}  first")
    return read_checked(path, f"run  {command}  again")


def check_models(run, results):
    """Refuse results of other models than those that the run has now."""
    if results.get("measured", {}).get("models") != checksum(models_before(run, "evaluate")):
        raise BadInput(f"{run / 'results.json'}: is of other models than {run} has now; run  "
                       f"python girl.py evaluate --run {run}  again")


def write_results(run, results):
    write_json(run / "results.json", with_checksum(results))


def of_others(saved, new):
    """The seed and split, or the models or data, by which the saved results differ from the new
    ones, in words; None if they agree."""
    old_inputs, new_inputs = saved["measured"], new["measured"]
    if (saved["seed"], saved["split"]) != (new["seed"], new["split"]):
        return f"seed {saved['seed']} and split {saved['split']}"
    for key in ("models", "data"):
        # An earlier version noted no data.
        if old_inputs.get(key, new_inputs[key]) != new_inputs[key]:
            return f"other {key}"
    return None


def forget_others(run, new):
    """Remove results.json if it is damaged, or of another seed, split, models or data than the new
    results."""
    try:
        stale = of_others(read_results(run), new)
    except BadInput:                        # missing, or damaged
        stale = True
    if stale:
        (run / "results.json").unlink(missing_ok=True)


def check_recommend(run, new):
    """Refuse to add a recommender to an evaluation of another seed, split, models or data. Without
    an evaluation it can stand alone."""
    path = run / "results.json"
    if path.exists() and (others := of_others(read_results(run), new)):
        raise BadInput(f"{path}: is of {others}; run  python girl.py evaluate --run {run} "
                       f"--seed {new['seed']} --split {new['split']}  first")


def add_results(run, folder, name, start, new, answers=None):
    """Write new results of `evaluate` or `recommend` (the name) into results.json. The other
    command's part stays if it is of the same seed, split, models and data. `start`: the time at
    which the command began to measure; `answers`: the content of answers.jsonl, of `evaluate`."""
    with locked(run, wait=True):
        if answers:
            write_bytes(run / "answers.jsonl", answers)
        if name == "recommend":
            check_recommend(run, new)
        else:
            forget_others(run, new)
        saved = read_results(run) if (run / "results.json").exists() else {}
        others_part = {key: saved[key] for key in saved
                       if (key in OF_RECOMMEND) == (name == "evaluate")}
        measured = saved.get("measured", {}) | new["measured"]
        results = others_part | new | {"measured": measured}
        clock = {"started": round(start, 1), "seconds": round(time.time() - start, 1),
                 "peak_rss_mb": peak_rss_mb()}
        results["clocks"] = saved.get("clocks", {}) | {name: clock}
        results |= time_and_memory(run, folder, results["clocks"], saved.get("seconds", {}))
        write_results(run, results)
    return results


def time_and_memory(run, folder, clocks, old_seconds):
    """Seconds of each stage and of all, and the peak memory. Stages side by side count once in time
    and add up in memory. `clocks`: those of evaluate and recommend; `old_seconds`: the seconds that
    results.json held so far."""
    stages = {s: read_summary(folder if s == "data" else run / s)
              for s in STAGES if s != "data" or (folder / "summary.json").exists()}
    # An earlier version did not note when it measured: certainly not side by side.
    stages |= {name: {"started": 0, "seconds": old_seconds[name]}
               for name in MEASURES if name in old_seconds}
    stages |= clocks
    memory = {s: summary.get("peak_rss_mb", 0) for s, summary in stages.items()}
    side_by_side = (("reward", "judge"), MEASURES)
    pair_memory = [sum(memory.pop(s, 0) for s in pair) for pair in side_by_side]
    seconds = {s: summary["seconds"] for s, summary in stages.items()}
    return {"seconds": seconds | {"total": round(covered(stages.values()), 1)},
            "peak_rss_mb": max(*pair_memory, *memory.values())}


# ---------------------------------------------------------------------------------- answers.jsonl
def how_written(name):
    """How an answer comes about, in words."""
    if name.endswith("_greedy"):
        return "greedy"
    return {"sft": "sampled", "ppo": "sampled", "base": "sampled", "sft_best16": "best of 16",
            "nearest": "retrieved", "random": "retrieved"}.get(name, "by rule")


def answer_lines(cvs, scored):
    """The content of answers.jsonl: a line for each CV, with the JD of each answer, its true match
    (null for real data), reward and judge."""
    lines = []
    for i, cv in enumerate(cvs):
        answers = {}
        for name, row in scored.items():
            truth = None if row["true"] is None else float(row["true"][i])
            answers[name] = {"how": how_written(name), "jd": row["texts"][i], "true_match": truth,
                             "reward": float(row["reward"][i]), "judge": float(row["judge"][i])}
        lines.append(json.dumps({"cv": cv, "answers": answers}, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8", "backslashreplace")


def read_answers(run):
    """The lines of answers.jsonl. Refuses a file that is not the one of results.json."""
    path, results = run / "answers.jsonl", read_results(run)
    check_models(run, results)
    if "answers" not in results or not path.is_file() or sha256(path) != results["answers"]:
        raise BadInput(f"{path}: missing, damaged, or of another evaluation; run  python girl.py "
                       f"evaluate --run {run}  again")
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def show_answers(run, number):
    """Print a CV of answers.jsonl with everything that was written for it. CVs are counted
    from 0."""
    lines = read_answers(run)
    if number >= len(lines):
        raise BadInput(f"show: --cv {number} must be at most {len(lines) - 1}; there are "
                       f"{len(lines)} CVs, counted from 0")
    print(f"CV {number}:\n{lines[number]['cv']}")
    for name, answer in lines[number]["answers"].items():
        truth = ("" if answer["true_match"] is None
                 else f"true match {answer['true_match']:.3f}, ")
        print(f"\n{name} ({answer['how']}): {truth}reward {answer['reward']:+.3f}, "
              f"judge {answer['judge']:+.3f}\n{answer['jd']}")


# --------------------------------------------------------------------------------- the evaluation
class Models(NamedTuple):
    """The models of a finished run."""
    generators: dict        # "sft", "ppo", and "base" if the run started from a pretrained model
    reward: RewardModel
    judge: RewardModel
    codec: Codec
    device: torch.device


def load_models(run, init, device):
    sft = load_model(run / "sft", LanguageModel, device).eval()
    policy = load_model(run / "ppo", LanguageModel, device, share_base_with=sft).eval()
    reward_model, judge = (load_model(run / stage, RewardModel, device, share_base_with=sft).eval()
                           for stage in ("reward", "judge"))
    codec, generators = load_codec(run / "sft", sft.config), {"sft": sft, "ppo": policy}
    if init:
        generators["base"] = load_model(init, LanguageModel, device).eval()
        generators["base"].config = sft.config      # the token limits, and the end of a JD
    return Models(generators, reward_model, judge, codec, device)


def answer_all(models, cvs, accepted, rules, seed):
    """One JD for each CV from every generator, by retrieval from accepted (cv, jd) pairs, and by
    rule. Returns the responses {answer: [CVs]}; and for "sft" and "ppo" all their samples
    {name: [samples][CVs]}, with the scores of these by the reward model {name: [samples, CVs]}."""
    codec, device = models.codec, models.device
    samples, rewards = {}, {}
    for name, n in (("sft", BEST_OF), ("ppo", SAMPLES)):
        lm, bar = models.generators[name], f"evaluate: {name}"
        samples[name] = write_samples(lm, codec, cvs, n, seed, bar, device)
    for name, drawn in samples.items():
        rewards[name] = score_each(models.reward, codec, cvs, drawn)
    responses = {name: drawn[0] for name, drawn in samples.items()}
    best = rewards["sft"].argmax(0)                                             # [CVs]
    responses["sft_best16"] = [samples["sft"][k][i] for i, k in enumerate(best)]
    for name, lm in models.generators.items():
        bar = f"evaluate: {name}"
        if name not in samples:
            responses[name] = write_jds(lm, codec, cvs, 1.0, seed, bar, device)
        responses[name + "_greedy"] = write_jds(lm, codec, cvs, 0.0, seed, bar + ", greedy", device)
    others = retrieved(codec, accepted, cvs, seed) | rules
    for name, jds in others.items():
        if name != "oracle":
            responses[name] = [codec.jd(jd) for jd in jds]
    return responses, samples, rewards


def accuracy_on_samples(models, cvs, samples, rewards, market, seed):
    """`sample_figures` of the reward model and of the judge, on the first SAMPLES samples."""
    first, scores = {}, {}
    for name, drawn in samples.items():
        first[name] = drawn[:SAMPLES]
        scores[name] = {"reward": rewards[name][:SAMPLES],
                        "judge": score_each(models.judge, models.codec, cvs, first[name])}
    return sample_figures(cvs, first, scores, models.codec, market, seed)


def evaluate(run, folder, split, n_cvs, seed, device, market, init, export, measured):
    """Write results.json of a run and print its tables. `init`: the folder of the pretrained model
    that the run started from, or nothing; `export`: a file for pairs, or None; `measured`:
    checksums of everything that the results depend on."""
    start = time.time()
    models = load_models(run, init, device)
    codec, generators = models.codec, models.generators
    train, records = read_half(folder, "A"), read_records(folder / f"{split}.jsonl")
    cvs = list(dict.fromkeys(r.cv for r in records))[:n_cvs]
    valid = accepted_pairs(read_records(folder / "valid.jsonl"))
    accepted = accepted_pairs(train)
    if not valid or not accepted:
        raise BadInput(f"{folder}: no accepted decision to measure on; valid.jsonl needs one, "
                       "and so does half A of train.jsonl")
    known_cvs, known_jds = {r.cv for r in train}, {r.jd for r in train}
    rules = {}
    if market:
        rules = market.rules(random.Random(seed), sorted(known_cvs), sorted(known_jds), cvs)
    responses, samples, rewards = answer_all(models, cvs, accepted, rules, seed)

    # The same figures for all answers, and comparisons CV by CV.
    results = {"seed": seed, "split": split, "cvs": len(cvs), "measured": measured,
               "device": str(device), "torch": torch.__version__,
               "parameters": sum(p.numel() for p in generators["sft"].parameters()),
               "data": data_figures(records, rules, cvs, market),
               "reward": reward_figures(models.reward, codec, records, market, seed)}
    scorers = {"reward": models.reward, "judge": models.judge}
    scored = score_all(cvs, responses, codec, scorers, market)
    results["reward"] |= accuracy_on_samples(models, cvs, samples, rewards, market, seed)
    nll = {name: mean_nll(lm, valid, codec, device) for name, lm in generators.items()}
    for name in scored:
        results[name] = describe(cvs, responses[name], scored[name], codec, known_jds, market, seed)
        results[name]["valid_nll"] = nll.get(name.split("_")[0])
    results["ppo_kl_per_text"] = kl_per_text(generators["ppo"], generators["sft"], codec, cvs,
                                             responses["ppo"], device)
    results["wins"] = {name: compare(scored[a], scored[b], seed)
                       for name, (a, b) in CONTRASTS.items() if {a, b} <= set(scored)}

    answers = answer_lines(cvs, scored)
    results["answers"] = hashlib.sha256(answers).hexdigest()
    results = add_results(run, folder, "evaluate", start, results, answers)
    with locked(run, wait=True):        # recommend may print at the same moment
        print_results(results, cvs[0], scored, market)
        if export:
            export_pairs(export, cvs, scored, seed)
        sys.stdout.flush()
    return results


# --------------------------------------------------------------------------------------- printing
def print_results(results, cv, scored, market):
    """The tables, and the greedy JDs for the first CV."""
    print_table(results)
    print_wins(results["wins"])
    stages = {"before any training": "base_greedy", "before PPO": "sft_greedy",
              "after PPO": "ppo_greedy"}
    shown = {name: scored[key]["texts"][0] for name, key in stages.items() if key in scored}
    show_one(cv, shown, market)


def cell(value):
    return "-" if value is None else f"{value:.3f}"


def print_table(results):
    columns = ("true_match", "judge", "reward", "format_rate", "title_rate", "distinct_2",
               "copy_rate", "seen_rate", "length")
    print(f"\n{results['cvs']} CVs of the {results['split']} split"
          + "".join(f"{c:>13}" for c in columns))
    for name, row in ((name, results[name]) for name in ANSWERS if name in results):
        print(f"{name:<26}" + "".join(f"{cell(row[c]):>13}" for c in columns))
        if row["true_match_ci95"]:
            low, high = row["true_match_ci95"]
            print(f"{'':<26}" + f"{low:>7.3f}-{high:.3f}")
    print_factors({name: results[name]["factors"] for name in ANSWERS if name in results})
    data = results["data"]
    matches = {k.removesuffix("_match"): v for k, v in data.items() if "match" in k}
    print("true match of other answers: "
          + ", ".join(f"{k} {cell(v)}" for k, v in matches.items()))
    print_accuracies(results["reward"], data["bayes_pair_accuracy"])
    print(f"KL of PPO from SFT: {results['ppo_kl_per_text']:.2f} nats per text; "
          f"seconds: {results['seconds']}; peak memory {results['peak_rss_mb']} MB")


def print_accuracies(figures, best):
    """How well the scores order JDs. `best`: the best possible pair accuracy."""
    print(f"reward model: pair accuracy {cell(figures['pair_accuracy'])} "
          f"(best possible {cell(best)}), AUC {cell(figures['auc'])}; "
          f"JDs of others {cell(figures['easy_pair_accuracy'])}")
    if noticed := figures["one_change_accuracy"]:
        print("one field made worse is noticed: "
              + ", ".join(f"{field} {cell(share)}" for field, share in noticed.items()))
    if figures["sample_accuracy"]:
        for policy, row in figures["sample_accuracy"].items():
            shares = ", ".join(f"{by} {cell(share)}" for by, share in row.items())
            print(f"of two samples of {policy.upper()} for one CV, the truly better one scores "
                  f"higher: {shares}")


def print_factors(rows):
    """The factors of each answer's true match; nothing on real data."""
    if not any(rows.values()):
        return
    print(f"\n{'factors of the true match':<26}" + "".join(f"{name:>13}" for name in FACTORS)
          + "   (means over the JDs that parse)")
    for name, row in rows.items():
        print(f"{name:<26}" + "".join(f"{cell(row[factor]):>13}" for factor in FACTORS))
    print()


def print_wins(wins):
    """Win / tie / lose of each contrast by each judge that answered, with the interval of
    win - lose."""
    for name, row in wins.items():
        for by in row:
            if row[by] is None or f"{by}_advantage_ci95" not in row:
                continue
            win, tie, lose = row[by]
            low, high = row[f"{by}_advantage_ci95"]
            print(f"{name:<28}{by:<12} win {win:.2f}  tie {tie:.2f}  lose {lose:.2f}   "
                  f"advantage {win - lose:+.2f} ({low:+.2f} to {high:+.2f})")


def show_one(cv, jds, market):
    print(f"\nA CV of the held-out split:\n{cv}")
    for name, jd in jds.items():
        truth = f", true match {market.true_match(cv, jd):.2f}" if market else ""
        print(f"\nThe JD {name} (greedy{truth}):\n{jd}")
