"""What a run is worth, measured on held-out CVs: results.json, and the table that train.sh ends with.

    python girl.py evaluate --run RUN [--split valid|test]

Nothing here is used in training, and no checkpoint is picked: the last one is what is measured. `market` is the
simulation's module, handed in where the data are simulated, else None: then whatever needs the truth is null.

The generators that are compared write one JD for each CV: `sft` and `ppo` sample at temperature 1, `_greedy` takes the
likeliest token, `sft_best16` is the best of 16 SFT samples by the reward model.
"""
import math
import random
import time

import numpy as np
import torch

import ppo
import reward
from data import half, load_codec, read_records
from model import LanguageModel, RewardModel, generate, load_model
from run import autocast, generator, peak_rss_mb, read_json, write_json

BEST_OF = 16
STAGES = ("data", "sft", "reward", "judge", "ppo")


# ------------------------------------------------------------------------------------------------------ measures
def bootstrap_ci95(values, seed, resamples=2000):
    """95% interval of the mean over CVs: the 2.5 and 97.5 percentiles of means of resampled CVs (Efron 1979)."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return [float(x) for x in np.percentile(values[picks].mean(1), (2.5, 97.5))]


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
def write_jds(lm, codec, cvs, temperature, seed, name, device, batch_size=128):
    """One response (token list) for each CV."""
    out = []
    for k in range(0, len(cvs), batch_size):
        with autocast(device):
            out += generate(lm, [codec.prompt(cv) for cv in cvs[k:k + batch_size]], codec.max_jd, temperature,
                            generator=generator(seed, "evaluate", name, k, device=device))
    return out


def best_of(lm, reward_model, codec, cvs, seed, device):
    """BEST_OF samples for each CV and their scores: responses [CV][16], scores [CVs, 16]."""
    out = write_jds(lm, codec, [cv for cv in cvs for _ in range(BEST_OF)], 1.0, seed, "best", device)
    rows = [codec.prompt(cvs[i // BEST_OF]) + r for i, r in enumerate(out)]
    return ([out[i:i + BEST_OF] for i in range(0, len(out), BEST_OF)],
            reward.score_rows(reward_model, rows).reshape(-1, BEST_OF))


@torch.no_grad()
def kl_per_text(policy, reference, codec, cvs, responses, device, batch_size=64):
    """Mean over the policy's samples of sum log(pi / pi_ref), in nats per text."""
    total = 0.0
    for k in range(0, len(cvs), batch_size):
        e = ppo.make_episodes([codec.prompt(cv) for cv in cvs[k:k + batch_size]], responses[k:k + batch_size], device)
        kl = ppo.k1(*(ppo.evaluate_reference(lm, e, 1.0) for lm in (policy, reference)))
        total += float((kl * e.mask).sum())
    return total / len(cvs)


def describe(cvs, responses, codec, scores, judge_scores, market, seed):
    """The figures of one generator: one response for each CV."""
    texts = [codec.text(r) for r in responses]
    result = {"format_rate": None, "title_rate": None, "true_match": None, "true_match_ci95": None,
              "reward": float(scores.mean()), "reward_ci95": bootstrap_ci95(scores, seed),
              "judge": float(judge_scores.mean()), "judge_ci95": bootstrap_ci95(judge_scores, seed),
              "copy_rate": copy_rate(cvs, texts), "distinct_2": distinct_2(texts),
              "length": float(np.mean([len(r) for r in responses])),
              "eos_rate": float(np.mean([r[-1] == codec.eos for r in responses]))}
    if market:
        matches = [market.true_match(cv, t) for cv, t in zip(cvs, texts)]
        result |= {"format_rate": float(np.mean([market.parse_jd(t) is not None for t in texts])),
                   "title_rate": float(np.mean([market.fits_title(cv, t) for cv, t in zip(cvs, texts)])),
                   "true_match": float(np.mean(matches)), "true_match_ci95": bootstrap_ci95(matches, seed)}
    return result


# -------------------------------------------------------------------------------------------- data and reward model
def data_figures(train, records, cvs, market, seed):
    """What the data say of themselves: how good accepted decisions are, and what trivial answers reach."""
    keys = ("accepted_true_match", "best_constant_match", "echo_match", "oracle_match", "bayes_pair_accuracy")
    if not market:
        return dict.fromkeys(keys)
    same = [r for r in records if market.same_occupation(r)]
    truth = np.array([market.true_match(r.cv, r.jd) for r in same])
    return {"accepted_true_match": float(np.mean([market.true_match(r.cv, r.jd) for r in records if r.accepted])),
            **market.yardsticks(random.Random(seed), sorted({r.cv for r in train}), sorted({r.jd for r in train}), cvs),
            "bayes_pair_accuracy": reward.pair_metrics(same, truth)["pair_accuracy"]}


def reward_figures(model, codec, records, market, seed):
    """Pair accuracy on real decisions (within one occupation, where there are occupations), and on single changes."""
    def score(pairs):
        return reward.score_texts(model, codec, pairs)
    same = [r for r in records if market.same_occupation(r)] if market else records
    figures = reward.pair_metrics(same, score([(r.cv, r.jd) for r in same])) | {"center": model.center, "one_change_accuracy": None}
    if market:
        figures["one_change_accuracy"] = {}
        for field in market.FIELDS:
            triples = market.one_changes(random.Random(f"{seed} {field}"), same, field, 400)
            good, worse = score([(cv, jd) for cv, jd, _ in triples]), score([(cv, jd) for cv, _, jd in triples])
            figures["one_change_accuracy"][field] = float((good > worse).mean()) if triples else None
    return figures


def sample_accuracy(scores, cvs, samples, codec, market):
    """Of the first two SFT samples for each CV, does the reward model prefer the one with the higher true match?"""
    right = []
    for i, cv in enumerate(cvs):
        a, b = (market.true_match(cv, codec.text(samples[i][k])) for k in (0, 1))
        if a != b:
            right.append((scores[i, 0] > scores[i, 1]) == (a > b))
    return float(np.mean(right)) if right else None


# -------------------------------------------------------------------------------------------------------- the whole
def covered(stages):
    """Seconds in which at least one stage was at work: stages that ran side by side count once."""
    total, until = 0.0, -math.inf
    for start, end in sorted((s["started"], s["started"] + s["seconds"]) for s in stages):
        total, until = total + max(end - max(start, until), 0.0), max(until, end)
    return total


def evaluate(run, folder, split, n_cvs, seed, device, market, mean_nll):
    """Write results.json of a run and print its table. `mean_nll(model, pairs, codec, device)` is stage 1's."""
    start = time.time()
    sft, policy = (load_model(run / s, LanguageModel, device).eval() for s in ("sft", "ppo"))
    reward_model, judge = (load_model(run / s, RewardModel, device).eval() for s in ("reward", "judge"))
    codec = load_codec(run / "sft", sft.config)
    train = [r for r in read_records(folder / "train.jsonl") if half(r.cv) == "A"]
    records = read_records(folder / f"{split}.jsonl")
    cvs = list(dict.fromkeys(r.cv for r in records))[:n_cvs]
    valid = [(r.cv, r.jd) for r in read_records(folder / "valid.jsonl") if r.accepted]

    # 1. Every generator writes for every CV.
    samples, sample_scores = best_of(sft, reward_model, codec, cvs, seed, device)
    written = {"sft": [s[0] for s in samples], "sft_greedy": write_jds(sft, codec, cvs, 0.0, seed, "greedy", device),
               "sft_best16": [s[k] for s, k in zip(samples, sample_scores.argmax(1))],
               "ppo": write_jds(policy, codec, cvs, 1.0, seed, "ppo", device),
               "ppo_greedy": write_jds(policy, codec, cvs, 0.0, seed, "greedy", device)}

    # 2. Each is described by the same figures.
    results = {"seed": seed, "split": split, "cvs": len(cvs), "device": str(device), "torch": torch.__version__,
               "parameters": sum(p.numel() for p in sft.parameters()),
               "data": data_figures(train, records, cvs, market, seed),
               "reward": reward_figures(reward_model, codec, records, market, seed)}
    results["reward"]["sample_accuracy"] = sample_accuracy(sample_scores, cvs, samples, codec, market) if market else None
    nll = {"sft": mean_nll(sft, valid, codec, device), "ppo": mean_nll(policy, valid, codec, device)}
    for name, responses in written.items():
        rows = [codec.prompt(cv) + r for cv, r in zip(cvs, responses)]
        results[name] = {"valid_nll": nll[name[:3]]} | describe(
            cvs, responses, codec, reward.score_rows(reward_model, rows), reward.score_rows(judge, rows), market, seed)
    results["ppo_kl_per_text"] = kl_per_text(policy, sft, codec, cvs, written["ppo"], device)

    # 3. Time and memory: what each stage noted when it ran. Reward model and judge count as running at the same time.
    noted = {s: read_json((folder if s == "data" else run / s) / "summary.json")
             for s in STAGES if s != "data" or (folder / "summary.json").exists()}
    noted["evaluate"] = {"started": start, "seconds": round(time.time() - start, 1)}
    results["seconds"] = {s: n["seconds"] for s, n in noted.items()} | {"total": round(covered(noted.values()), 1)}
    memory = {s: n["peak_rss_mb"] for s, n in noted.items() if "peak_rss_mb" in n}
    results["peak_rss_mb"] = max(peak_rss_mb(), memory.pop("reward") + memory.pop("judge"), *memory.values())
    write_json(run / "results.json", results)
    print_table(results)
    show_one(cvs[0], codec.text(written["sft_greedy"][0]), codec.text(written["ppo_greedy"][0]), market)
    return results


def cell(value):
    return "-" if value is None else f"{value:.3f}"


def print_table(results):
    columns = ("true_match", "judge", "reward", "format_rate", "title_rate", "distinct_2", "copy_rate", "length")
    print(f"\n{results['cvs']} CVs of the {results['split']} split" + "".join(f"{c:>13}" for c in columns))
    for name in ("sft", "ppo", "sft_greedy", "ppo_greedy", "sft_best16"):
        row = results[name]
        print(f"{name:<26}" + "".join(f"{cell(row[c]):>13}" for c in columns))
        if row["true_match_ci95"]:
            print(f"{'':<26}" + f"{row['true_match_ci95'][0]:>7.3f}-{row['true_match_ci95'][1]:.3f}")
    data, judged = results["data"], results["reward"]
    print("true match of other answers: " + ", ".join(f"{k.removesuffix('_match')} {cell(v)}" for k, v in data.items() if "match" in k))
    print(f"reward model: pair accuracy {cell(judged['pair_accuracy'])} (best possible {cell(data['bayes_pair_accuracy'])}), "
          f"AUC {cell(judged['auc'])}")
    if judged["one_change_accuracy"]:
        print("one field made worse is noticed: " + ", ".join(f"{k} {cell(v)}" for k, v in judged["one_change_accuracy"].items()))
    print(f"KL of PPO from SFT: {results['ppo_kl_per_text']:.2f} nats per text; "
          f"seconds: {results['seconds']}; peak memory {results['peak_rss_mb']} MB")


def show_one(cv, before, after, market):
    def truth(jd):
        return f" (true match {market.true_match(cv, jd):.2f})" if market else ""
    print(f"\nA CV of the held-out split:\n{cv}\n\nThe JD before PPO{truth(before)}:\n{before}\n\n"
          f"The JD after PPO{truth(after)}:\n{after}")
