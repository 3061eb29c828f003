"""What a run is worth, measured on held-out CVs: results.json, and the table that train.sh ends with.

    python girl.py evaluate --run RUN [--split valid|test]

Nothing here is used in training, and no checkpoint is picked: the last one is what is measured. `market` is the
simulation's module, handed in where the data are simulated, else None: then whatever needs the truth is null.

What is compared gives one JD for each CV. `reward` and `judge` are the two models' own scores, also of a JD that was cut off
(for which PPO would pay its fixed penalty). Generators: `sft` and `ppo` sample at temperature 1, `_greedy` takes the
likeliest token, `sft_best16` is the best of 16 SFT samples by the reward model, `base` is the pretrained model that the run
began with, if it did. Retrieval, from the pairs that stage 1 learned from: `nearest` is the JD that the most similar candidate
was accepted for, `random` any. Rules of the market: `constant`, `echo`; of a third one, `oracle`, only
the true match is given, with the data's figures.

An outside judge (a person, or another language model) can be asked too:

    python girl.py evaluate --run RUN --export-pairs FILE      prompts with two JDs in shuffled order, one JSON line each
    python girl.py evaluate --run RUN --verdicts FILE          reads the answers back, and prints the same table
"""
import hashlib
import json
import math
import random
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import ppo
import reward
from data import load_codec, read_half, read_records
from plumbing.records import json_lines
from model import LanguageModel, RewardModel, generate, logits_size, rows_that_fit
from plumbing.files import BadInput, locked, read_checked, with_checksum, write_bytes, write_json
from plumbing.stage import autocast, generator, peak_rss_mb, read_summary
from sft import mean_nll
from plumbing.weights import load_model

BEST_OF = 16
SAMPLES = 4                 # of each CV, for the accuracy on a policy's own samples
STAGES = ("data", "sft", "reward", "judge", "ppo")
MEASURES = ("evaluate", "recommend")
# Who is compared with whom, CV by CV; GIRL is the generator after PPO.
CONTRASTS = {"girl_vs_sft": ("ppo", "sft"), "girl_vs_nearest": ("ppo", "nearest"), "girl_vs_random": ("ppo", "random"),
             "girl_vs_constant": ("ppo", "constant"), "girl_vs_echo": ("ppo", "echo"), "girl_vs_best16": ("ppo", "sft_best16"),
             "girl_greedy_vs_sft_greedy": ("ppo_greedy", "sft_greedy"), "sft_vs_nearest": ("sft", "nearest"),
             "girl_vs_base": ("ppo", "base"), "girl_greedy_vs_base_greedy": ("ppo_greedy", "base_greedy")}
# Differences below this are a tie: in true match, and in standard deviations of the judge.
TIE = {"true": 0.02, "judge": 0.1}
# The true match is 0.95 times their product: market.skills_factor and so on.
FACTORS = ("skills", "years", "degree", "place", "field")
ANSWERS = ("base", "sft", "ppo", "base_greedy", "sft_greedy", "ppo_greedy", "sft_best16", "nearest", "random", "constant", "echo")


# ------------------------------------------------------------------------------------------------------ measures
def bootstrap_ci95(values, seed, weights=None, resamples=2000):
    """95% interval of the mean over CVs: the 2.5 and 97.5 percentiles of means of resampled CVs (Efron 1979). With weights:
    of the weighted mean, where each value is itself the mean over so many."""
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
    """Share of the JDs' word trigrams that stand in the CV word for word."""
    copied = total = 0
    for cv, text in zip(cvs, texts):
        known, grams = set(ngrams(cv, 3)), ngrams(text, 3)
        copied, total = copied + sum(g in known for g in grams), total + len(grams)
    return copied / max(total, 1)


def distinct_2(texts):
    """Different word bigrams over all texts, as a share of all bigrams (Li et al. 2016, arXiv 1510.03055)."""
    grams = [g for text in texts for g in ngrams(text, 2)]
    return len(set(grams)) / max(len(grams), 1)


# ---------------------------------------------------------------------------------------------- writing and scoring
def write_jds(lm, codec, cvs, temperature, seed, name, device, batch_size=256):
    """One response (token list) for each CV. `name` begins with the command, whose bar it names."""
    out = []
    for k in tqdm(range(0, len(cvs), batch_size), desc=name, unit="batch",
                  mininterval=1 if sys.stderr.isatty() else 20, dynamic_ncols=True):
        with autocast(device):
            out += generate(lm, [codec.prompt(cv) for cv in cvs[k:k + batch_size]], codec.max_jd, temperature,
                            generator=generator(seed, name, k, device=device))
    return out


def write_samples(lm, codec, cvs, n, seed, name, device):
    """n times one response for each CV, [n][CVs], at temperature 1."""
    out = write_jds(lm, codec, [cv for cv in cvs for _ in range(n)], 1.0, seed, name, device)
    return [out[k::n] for k in range(n)]


def score(model, rows):
    """Scores of (prompt, JD) token rows, an array in their order. Here a CV comes with many JDs,
    and some come twice: a row is scored once, and a prompt is read once for all JDs of a batch. (Of
    some hundred decisions that took 0.58 of the time of reward.score_rows; one measurement.)"""
    prompts = sorted(dict.fromkeys(tuple(prompt) for prompt, _ in rows), key=len)
    jds = list(dict.fromkeys(tuple(jd) for _, jd in rows))
    of_prompt, of_jd = ({row: i for i, row in enumerate(some)} for some in (prompts, jds))
    pairs = [(of_prompt[tuple(prompt)], of_jd[tuple(jd)]) for prompt, jd in rows]
    found = reward.score_pairs(model, prompts, jds, set(pairs))
    return np.array([found[pair] for pair in pairs])


def score_texts(model, codec, pairs):
    """`score` of (cv, jd) texts."""
    return score(model, [(codec.prompt(cv), codec.jd(jd)) for cv, jd in pairs])


def score_each(model, codec, cvs, answers):
    """Scores [answers, CVs] of several answers, each of which is one response for each CV."""
    rows = [(codec.prompt(cv), r) for responses in answers for cv, r in zip(cvs, responses)]
    return score(model, rows).reshape(len(answers), len(cvs))


@torch.no_grad()
def kl_per_text(policy, reference, codec, cvs, responses, device):
    """Mean over the policy's samples of sum log(pi / pi_ref), in nats per text."""
    total, batch_size = 0.0, rows_that_fit(64, logits_size(policy.config))
    for k in range(0, len(cvs), batch_size):
        rollout = ppo.make_rollout([codec.prompt(cv) for cv in cvs[k:k + batch_size]], responses[k:k + batch_size], device)
        with autocast(device):
            kl = ppo.k1(*(ppo.evaluate_policy(lm, rollout, 1.0)[0] for lm in (policy, reference)))
        total += float((kl * rollout.mask).sum())
    return total / len(cvs)


def true_matches(cvs, texts, market):
    return np.array([market.true_match(cv, text) for cv, text in zip(cvs, texts)])


def judge_all(cvs, responses, codec, models, market):
    """{answer: what is known of each of its JDs, in the order of the CVs}: the texts, the true
    match, and the scores by two models. `models`: {"reward": ..., "judge": ...}."""
    answers, known = list(responses.values()), {}
    scores = {by: score_each(model, codec, cvs, answers) for by, model in models.items()}
    for i, name in enumerate(responses):
        texts = [codec.text(r) for r in answers[i]]
        known[name] = {"texts": texts, "true": true_matches(cvs, texts, market) if market else None}
        known[name] |= {by: found[i] for by, found in scores.items()}
    return known


def mean_factors(cvs, texts, market):
    """What the true match is made of, {factor: mean}, over the JDs that parse: the others have no
    factors, and `format_rate` says how many those are. Each is None where no JD parses."""
    pairs = [(market.of_market(cv), market.parse_jd(text)) for cv, text in zip(cvs, texts)]
    parsed = [(person, job) for person, job in pairs if job]
    if not parsed:
        return dict.fromkeys(FACTORS)
    factors = {name: getattr(market, f"{name}_factor") for name in FACTORS}
    return {name: float(np.mean([f(*pair) for pair in parsed])) for name, f in factors.items()}


def describe(cvs, responses, found, codec, known, market, seed):
    """The figures of one kind of answer: one response for each CV, and what `judge_all` found. `known`: the JDs of half A;
    `seen_rate` is the share that is one of them word for word."""
    texts = found["texts"]
    result = {"format_rate": None, "title_rate": None, "factors": None,
              "true_match": None, "true_match_ci95": None,
              "reward": float(found["reward"].mean()), "reward_ci95": bootstrap_ci95(found["reward"], seed),
              "judge": float(found["judge"].mean()), "judge_ci95": bootstrap_ci95(found["judge"], seed),
              "copy_rate": copy_rate(cvs, texts), "distinct_2": distinct_2(texts),
              "seen_rate": float(np.mean([t in known for t in texts])),
              "length": float(np.mean([len(r) for r in responses])),
              "eos_rate": float(np.mean([r[-1] == codec.eos for r in responses]))}
    if market:
        result |= {"format_rate": float(np.mean([market.parse_jd(t) is not None for t in texts])),
                   "title_rate": float(np.mean([market.fits_title(cv, t) for cv, t in zip(cvs, texts)])),
                   "true_match": float(found["true"].mean()), "true_match_ci95": bootstrap_ci95(found["true"], seed)}
        result["factors"] = mean_factors(cvs, texts, market)
    return result


# ----------------------------------------------------------------------------------------- answers without generating
def tfidf(rows, idf):
    """Token rows as sparse vectors of length 1, [N, V]: each token counts by its rarity `idf` [V]."""
    at = torch.tensor([i for i, row in enumerate(rows) for _ in row], dtype=torch.long)
    ids = torch.tensor([t for row in rows for t in row], dtype=torch.long)
    m = torch.sparse_coo_tensor(torch.stack((at, ids)), idf[ids], (len(rows), len(idf)),
                                check_invariants=False).coalesce()
    at, values = m.indices()[0], m.values()
    norms = torch.zeros(len(rows)).index_add(0, at, values ** 2).sqrt().clamp(min=1e-9)      # [N]
    return torch.sparse_coo_tensor(m.indices(), values / norms[at], m.shape, is_coalesced=True, check_invariants=False)


def alike(queries, documents, vocab_size):
    """Cosine similarity of TF-IDF vectors (Sparck Jones 1972) of token rows: [queries, documents]."""
    df = torch.bincount(torch.tensor([t for row in documents for t in set(row)], dtype=torch.long), minlength=vocab_size)
    idf = (len(documents) / df.clamp(min=1)).log()                                           # [V]
    return (tfidf(documents, idf) @ tfidf(queries, idf).to_dense().T).T


def retrieved(codec, pairs, cvs, seed):
    """JDs taken from accepted (cv, jd) pairs: of the most similar candidate, and of any."""
    draw, known = random.Random(seed), [codec.encode(cv) for cv, _ in pairs]
    closest = alike([codec.encode(cv) for cv in cvs], known, codec.tokenizer.get_vocab_size()).argmax(1)
    return {"nearest": [pairs[i][1] for i in closest.tolist()], "random": [draw.choice(pairs)[1] for _ in cvs]}


# ------------------------------------------------------------------------------------------------- win, tie, lose
def win_tie_lose(wins, losses, seed):
    """Shares of CVs won, tied, lost, and the 95% interval of win - lose over CVs; from two arrays of bools."""
    wins, losses = np.asarray(wins, dtype=float), np.asarray(losses, dtype=float)
    return ([float(wins.mean()), float((1 - wins - losses).mean()), float(losses.mean())],
            bootstrap_ci95(wins - losses, seed))


def compare(a, b, seed):
    """How often is answer `a` (of judge_all) better than `b` for the same CV, by the truth and by the judge?"""
    result = {}
    for by, tie in TIE.items():
        if a[by] is None:
            result |= {by: None, f"{by}_advantage_ci95": None}
        else:
            result[by], result[f"{by}_advantage_ci95"] = win_tie_lose(a[by] - b[by] >= tie, b[by] - a[by] >= tie, seed)
    return result


ASPECTS = ("detail", "relevance", "conciseness")
QUESTION = """Below are the CV of a job seeker and two job descriptions, A and B, that were suggested to this person.
Which one is better in its level of detail, in its relevance to this CV, and in its conciseness?
Answer with one line of JSON, "A", "B" or "tie" for each: {{"detail": "...", "relevance": "...", "conciseness": "..."}}

CV:
{cv}

A:
{a}

B:
{b}
"""


def swapped(seed, name):
    """Does the first answer of this pair stand under B? By a hash, so that a judge cannot know, and we need not note it."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()[0] % 2 == 1


def export_pairs(path, cvs, judged, seed):
    """One JSON line {"id", "prompt"} for each CV of each contrast, to be answered by an outside judge."""
    lines = []
    for contrast, (first, second) in CONTRASTS.items():
        if first in judged and second in judged:
            for i, cv in enumerate(cvs):
                name = f"{contrast}/{i}"
                a, b = (judged[answer]["texts"][i] for answer in ((second, first) if swapped(seed, name) else (first, second)))
                lines.append(json.dumps({"id": name, "prompt": QUESTION.format(cv=cv, a=a, b=b)}, ensure_ascii=False))
    write_bytes(path, "\n".join(lines).encode() + b"\n")
    print(f"{len(lines)} pairs in {path}: answer each with a line  "
          '{"id": "...", "detail": "A", "relevance": "B", "conciseness": "tie"}  and read them with --verdicts')


def read_verdicts(path, results):
    """The answers of an outside judge: {contrast: {aspect: [win, tie, lose], aspect_advantage_ci95: [low, high]}}."""
    found = {}
    for where, raw in json_lines(path, "give the file of answers to what --export-pairs wrote"):
        name = check_verdict(raw, where, results["cvs"])
        if name in found:
            raise BadInput(f"{where}: a second answer for {name}; keep one")
        found[name] = raw
    if not found:
        raise BadInput(f"{path}: no answers; expected lines like " + '{"id": "girl_vs_sft/0", "detail": "A", ...}')
    table = {}
    for contrast in CONTRASTS:
        mine = {name: v for name, v in found.items() if name.split("/")[0] == contrast}
        for aspect in ASPECTS if mine else ():
            # what the first answer of the contrast is called in each pair
            first = {name: "AB"[swapped(results["seed"], name)] for name in mine}
            shares, interval = win_tie_lose([mine[n][aspect] == first[n] for n in mine],
                                            [mine[n][aspect] not in (first[n], "tie") for n in mine], results["seed"])
            table.setdefault(contrast, {"answers": len(mine)}).update({aspect: shares, f"{aspect}_advantage_ci95": interval})
    return table


def add_verdicts(run, path):
    """Read the answers to `export_pairs` into results.json, and print them."""
    with locked(run, wait=True):             # the recommender may be about to write it
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
    """The name of the pair that the object of one line answers."""
    if not isinstance(raw, dict) or not {"id", *ASPECTS} <= set(raw):
        raise BadInput(f"{where}: expected the keys id, {', '.join(ASPECTS)}")
    contrast, _, number = str(raw["id"]).partition("/")
    if contrast not in CONTRASTS or not number.isdecimal() or str(int(number)) != number or int(number) >= n_cvs:
        raise BadInput(f"{where}: there is no pair {str(raw['id'])[:80]!r} in this run")
    if bad := [raw[a] for a in ASPECTS if raw[a] not in ("A", "B", "tie")]:
        raise BadInput(f"{where}: an answer is \"A\", \"B\" or \"tie\", found {repr(bad[0])[:80]}")
    return raw["id"]


# -------------------------------------------------------------------------------------------- data and reward model
def data_figures(records, rules, cvs, market):
    """What the data say of themselves: how good accepted decisions are, and what answers by rule reach."""
    if not market:
        return dict.fromkeys(("accepted_true_match", "best_constant_match", "echo_match", "oracle_match", "bayes_pair_accuracy"))

    def mean_match(pairs):
        return float(np.mean([market.true_match(cv, jd) for cv, jd in pairs]))
    same = [r for r in records if market.same_occupation(r)]
    truth = np.array([market.true_match(r.cv, r.jd) for r in same])
    return {"accepted_true_match": mean_match([(r.cv, r.jd) for r in records if r.accepted]),
            "best_constant_match": mean_match(zip(cvs, rules["constant"])), "echo_match": mean_match(zip(cvs, rules["echo"])),
            "oracle_match": mean_match(zip(cvs, rules["oracle"])),
            "bayes_pair_accuracy": reward.pair_metrics(same, truth)["pair_accuracy"]}


def accuracy(margins, seed):
    """The share of positive margins in groups (ties count half), and its interval over groups."""
    if not margins:
        return None, None
    right, sizes = [((m > 0) + 0.5 * (m == 0)).mean() for m in margins], [len(m) for m in margins]
    return float(np.average(right, weights=sizes)), bootstrap_ci95(right, seed, sizes)


def easy_pairs(records, draw):
    """(cv, jd, other jd): up to 400 accepted decisions, and a JD that another CV got accepted."""
    pairs = [(r.cv, r.jd) for r in records if r.accepted]
    mine, easy = set(pairs), []
    for cv, jd in draw.sample(pairs, min(400, len(pairs))):
        other = draw.choice(pairs)[1]
        if (cv, other) not in mine:
            easy.append((cv, jd, other))
    return easy


def reward_figures(model, codec, records, market, seed):
    """Pair accuracy on the split's decisions (within one occupation, where there are occupations),
    on easy ones (an accepted JD against the JD that another CV was accepted for), and on single
    changes."""
    same = [r for r in records if market.same_occupation(r)] if market else records
    decided, changes = [(r.cv, r.jd) for r in same], {}
    easy = easy_pairs(records, random.Random(f"{seed} easy"))
    for field in market.FIELDS if market else ():
        changes[field] = market.one_changes(random.Random(f"{seed} {field}"), same, field, 400)
    triples = easy + [triple for some in changes.values() for triple in some]
    pairs = decided + [(cv, jd) for cv, *both in triples for jd in both]
    found = dict(zip(pairs, score_texts(model, codec, pairs)))
    scores = np.array([found[pair] for pair in decided])

    def margins(some):
        """Of the first JD over the second one."""
        return np.array([found[cv, jd] - found[cv, other] for cv, jd, other in some])
    share, interval = accuracy(list(margins(easy)[:, None]), seed)
    noticed = {field: float((margins(some) > 0).mean()) if some else None
               for field, some in changes.items()}
    return reward.pair_metrics(same, scores) | {
        "pair_accuracy_ci95": accuracy(reward.pair_margins(same, scores), seed)[1],
        "easy_pair_accuracy": share, "easy_pair_accuracy_ci95": interval, "center": model.center,
        "one_change_accuracy": noticed if market else None}


def sample_margins(truth, scores):
    """For each CV the margins score(better) - score(worse) of the pairs of its samples, ordered by
    the true match; without pairs that differ by less than a tie. truth, scores: [samples, CVs]."""
    margins = []
    for true, given in zip(truth.T, scores.T):
        better, worse = np.nonzero(true[:, None] - true >= TIE["true"])
        margins.append(given[better] - given[worse])
    return [m for m in margins if len(m)]


def sample_figures(cvs, samples, scores, codec, market, seed):
    """How well does a score order a policy's own samples? It is there that PPO needs it.

    `sample_accuracy` is {policy: {score: share}}: of all pairs among SAMPLES samples for one CV,
    the share that the score orders as the true match does. Pairs that differ in truth by less than
    a tie do not count, equal scores count half. The intervals are over CVs.

    samples: {policy: [samples][CVs] responses}, scores: {policy: {score: [samples, CVs]}}."""
    if not market:
        return {"sample_accuracy": None, "sample_accuracy_ci95": None}
    shares, intervals = {}, {}
    for policy, drawn in samples.items():
        truth = np.array([true_matches(cvs, map(codec.text, some), market) for some in drawn])
        found = {by: accuracy(sample_margins(truth, given), seed)
                 for by, given in scores[policy].items()}
        shares[policy] = {by: share for by, (share, _) in found.items()}
        intervals[policy] = {by: interval for by, (_, interval) in found.items()}
    return {"sample_accuracy": shares, "sample_accuracy_ci95": intervals}


# -------------------------------------------------------------------------------------------------------- the whole
def covered(stages):
    """Seconds in which at least one stage was at work: stages that ran side by side count once."""
    total, until = 0.0, -math.inf
    for start, end in sorted((s["started"], s["started"] + s["seconds"]) for s in stages):
        total, until = total + max(end - max(start, until), 0.0), max(until, end)
    return total


# results.json has two writers, side by side in `train`: evaluate, and recommend, whose these are.
OF_RECOMMEND = ("recommend", "grounding")


def read_results(run):
    """results.json, as `write_results` left it."""
    path, command = run / "results.json", f"python girl.py evaluate --run {run}"
    if not path.exists():
        raise BadInput(f"{path}: no such file; run  {command}  first")
    return read_checked(path, f"run  {command}  again")


def write_results(run, results):
    write_json(run / "results.json", with_checksum(results))


def of_others(results, found):
    """Is what stands in results.json of another seed, split, models or data than what was found?
    Says of which."""
    noted, now = results["measured"], found["measured"]
    if (results["seed"], results["split"]) != (found["seed"], found["split"]):
        return f"seed {results['seed']} and split {results['split']}"
    for what in ("models", "data"):
        if noted.get(what, now[what]) != now[what]:     # an earlier version noted no data
            return f"other {what}"
    return None


def forget_others(run, found):
    """Remove a results.json that is damaged, or of others: what was found now takes its place."""
    try:
        stale = of_others(read_results(run), found)
    except BadInput:                        # not there, or damaged
        stale = True
    if stale:
        (run / "results.json").unlink(missing_ok=True)


def check_recommend(run, found):
    """Refuse to add a recommender to an evaluation of others. Without one it stands alone."""
    path = run / "results.json"
    if path.exists() and (others := of_others(read_results(run), found)):
        raise BadInput(f"{path}: is of {others}; run  python girl.py evaluate --run {run} "
                       f"--seed {found['seed']} --split {found['split']}  first")


def add_results(run, folder, name, start, found):
    """Write what `evaluate` or `recommend` (the name) found into results.json. What the other one
    wrote stays, if it is of the same seed, split, models and data. `start`: when it began to
    measure."""
    with locked(run, wait=True):
        if name == "recommend":
            check_recommend(run, found)
        else:
            forget_others(run, found)
        old = read_results(run) if (run / "results.json").exists() else {}
        theirs = {key: old[key] for key in old if (key in OF_RECOMMEND) == (name == "evaluate")}
        results = theirs | found | {"measured": old.get("measured", {}) | found["measured"]}
        results["clocks"] = old.get("clocks", {}) | {name: {
            "started": round(start, 1), "seconds": round(time.time() - start, 1),
            "peak_rss_mb": peak_rss_mb()}}
        results |= time_and_memory(run, folder, results["clocks"], old.get("seconds", {}))
        write_results(run, results)
    return results


def time_and_memory(run, folder, clocks, before):
    """Seconds of each stage, and of all of them; and the most memory: what ran side by side counts
    once in time, and together in memory. `clocks`: those of evaluate and recommend; `before`: the
    seconds that results.json gave until now."""
    noted = {s: read_summary(folder if s == "data" else run / s)
             for s in STAGES if s != "data" or (folder / "summary.json").exists()}
    # An earlier version did not note when it measured: certainly not side by side.
    noted |= {name: {"started": 0, "seconds": before[name]} for name in MEASURES if name in before}
    noted |= clocks
    memory = {s: n.get("peak_rss_mb", 0) for s, n in noted.items()}
    beside = [sum(memory.pop(s, 0) for s in pair) for pair in (("reward", "judge"), MEASURES)]
    seconds = {s: n["seconds"] for s, n in noted.items()}
    return {"seconds": seconds | {"total": round(covered(noted.values()), 1)},
            "peak_rss_mb": max(*beside, *memory.values())}


def evaluate(run, folder, split, n_cvs, seed, device, market, init, export, measured):
    """Write results.json of a run and print its tables. `init`: the folder of the pretrained model that the run began with, or
    nothing; `export`: a file for pairs, or None; `measured`: checksums of what all this depends on."""
    start = time.time()
    sft = load_model(run / "sft", LanguageModel, device).eval()
    policy = load_model(run / "ppo", LanguageModel, device, beside=sft).eval()
    reward_model, judge = (load_model(run / s, RewardModel, device, beside=sft).eval() for s in ("reward", "judge"))
    codec, generators = load_codec(run / "sft", sft.config), {"sft": sft, "ppo": policy}
    if init:
        generators["base"] = load_model(init, LanguageModel, device).eval()
        generators["base"].config = sft.config      # the budgets, and what ends a JD
    train = read_half(folder, "A")
    records = read_records(folder / f"{split}.jsonl")
    cvs = list(dict.fromkeys(r.cv for r in records))[:n_cvs]
    valid = [(r.cv, r.jd) for r in read_records(folder / "valid.jsonl") if r.accepted]
    if not valid or not any(r.accepted for r in train):
        raise BadInput(f"{folder}: nothing to measure on without an accepted decision in valid.jsonl, and one in half A of "
                       "train.jsonl")
    known_cvs, known_jds = {r.cv for r in train}, {r.jd for r in train}
    rules = market.rules(random.Random(seed), sorted(known_cvs), sorted(known_jds), cvs) if market else {}

    # 1. One JD for each CV: written by every generator, retrieved, and by rule.
    samples = {"sft": write_samples(sft, codec, cvs, BEST_OF, seed, "evaluate: sft", device),
               "ppo": write_samples(policy, codec, cvs, SAMPLES, seed, "evaluate: ppo", device)}
    by_reward = {name: score_each(reward_model, codec, cvs, each) for name, each in samples.items()}
    best = by_reward["sft"].argmax(0)
    responses = {name: each[0] for name, each in samples.items()}
    responses["sft_best16"] = [samples["sft"][k][i] for i, k in enumerate(best)]
    for name, lm in generators.items():
        if name not in samples:
            responses[name] = write_jds(lm, codec, cvs, 1.0, seed, f"evaluate: {name}", device)
        responses[name + "_greedy"] = write_jds(lm, codec, cvs, 0.0, seed,
                                                f"evaluate: {name}, greedy", device)
    others = retrieved(codec, [(r.cv, r.jd) for r in train if r.accepted], cvs, seed) | rules
    responses |= {name: [codec.jd(jd) for jd in others[name]] for name in others if name != "oracle"}

    # 2. All are described by the same figures, and compared CV by CV.
    results = {"seed": seed, "split": split, "cvs": len(cvs), "measured": measured, "device": str(device),
               "torch": torch.__version__,
               "parameters": sum(p.numel() for p in sft.parameters()),
               "data": data_figures(records, rules, cvs, market),
               "reward": reward_figures(reward_model, codec, records, market, seed)}
    judged = judge_all(cvs, responses, codec, {"reward": reward_model, "judge": judge}, market)
    drawn = {name: each[:SAMPLES] for name, each in samples.items()}
    scores = {name: {"reward": by_reward[name][:SAMPLES],
                     "judge": score_each(judge, codec, cvs, each)} for name, each in drawn.items()}
    results["reward"] |= sample_figures(cvs, drawn, scores, codec, market, seed)
    nll = {name: mean_nll(lm, valid, codec, device) for name, lm in generators.items()}
    for name, found in judged.items():
        results[name] = describe(cvs, responses[name], found, codec, known_jds, market, seed)
        results[name]["valid_nll"] = nll.get(name.split("_")[0])
    results["ppo_kl_per_text"] = kl_per_text(policy, sft, codec, cvs, responses["ppo"], device)
    results["wins"] = {name: compare(judged[a], judged[b], seed) for name, (a, b) in CONTRASTS.items() if {a, b} <= set(judged)}

    # 3. The tables are printed alone: recommend may end at the same moment.
    results = add_results(run, folder, "evaluate", start, results)
    with locked(run, wait=True):
        print_table(results)
        print_wins(results["wins"])
        stages = {"before any training": "base_greedy", "before PPO": "sft_greedy",
                  "after PPO": "ppo_greedy"}
        shown = {name: judged[key]["texts"][0] for name, key in stages.items() if key in judged}
        show_one(cvs[0], shown, market)
        if export:
            export_pairs(export, cvs, judged, seed)
        sys.stdout.flush()
    return results


def cell(value):
    return "-" if value is None else f"{value:.3f}"


def print_table(results):
    columns = ("true_match", "judge", "reward", "format_rate", "title_rate", "distinct_2", "copy_rate", "seen_rate", "length")
    print(f"\n{results['cvs']} CVs of the {results['split']} split" + "".join(f"{c:>13}" for c in columns))
    for name, row in ((n, results[n]) for n in ANSWERS if n in results):
        print(f"{name:<26}" + "".join(f"{cell(row[c]):>13}" for c in columns))
        if row["true_match_ci95"]:
            print(f"{'':<26}" + f"{row['true_match_ci95'][0]:>7.3f}-{row['true_match_ci95'][1]:.3f}")
    data, judged = results["data"], results["reward"]
    others = {k.removesuffix("_match"): v for k, v in data.items() if "match" in k}
    print_factors({name: results[name]["factors"] for name in ANSWERS if name in results})
    print("true match of other answers: " + ", ".join(f"{k} {cell(v)}" for k, v in others.items()))
    print(f"reward model: pair accuracy {cell(judged['pair_accuracy'])} (best possible {cell(data['bayes_pair_accuracy'])}), "
          f"AUC {cell(judged['auc'])}; JDs of others {cell(judged['easy_pair_accuracy'])}")
    if judged["one_change_accuracy"]:
        print("one field made worse is noticed: " + ", ".join(f"{k} {cell(v)}" for k, v in judged["one_change_accuracy"].items()))
    if judged["sample_accuracy"]:
        for policy, row in judged["sample_accuracy"].items():
            shares = ", ".join(f"{by} {cell(share)}" for by, share in row.items())
            print(f"of two samples of {policy.upper()} for one CV, the truly better one scores "
                  f"higher: {shares}")
    print(f"KL of PPO from SFT: {results['ppo_kl_per_text']:.2f} nats per text; "
          f"seconds: {results['seconds']}; peak memory {results['peak_rss_mb']} MB")


def print_factors(rows):
    """What the true match of each answer is made of; nothing on real data."""
    if any(rows.values()):
        print(f"\n{'factors of the true match':<26}" + "".join(f"{name:>13}" for name in FACTORS)
              + "   (means over the JDs that parse)")
        for name, row in rows.items():
            print(f"{name:<26}" + "".join(f"{cell(row[factor]):>13}" for factor in FACTORS))
        print()


def print_wins(wins):
    """Win / tie / lose of each contrast, and the interval of win - lose, for each judge that there was."""
    for name, row in wins.items():
        for by in (key for key in row if row[key] is not None and f"{key}_advantage_ci95" in row):
            win, tie, lose = row[by]
            low, high = row[f"{by}_advantage_ci95"]
            print(f"{name:<28}{by:<12} win {win:.2f}  tie {tie:.2f}  lose {lose:.2f}   "
                  f"advantage {win - lose:+.2f} ({low:+.2f} to {high:+.2f})")


def show_one(cv, jds, market):
    print(f"\nA CV of the held-out split:\n{cv}")
    for name, jd in jds.items():
        truth = f" (true match {market.true_match(cv, jd):.2f})" if market else ""
        print(f"\nThe JD {name}{truth}:\n{jd}")
