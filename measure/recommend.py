"""Measure what generated JDs are worth to others: to a classical recommender that reads them, and
as queries for posted jobs.

    python girl.py recommend --run RUN [--full]     measure both, with controls; into results.json
    python girl.py recommend --run RUN --cv FILE --pool FILE.jsonl      jobs of your pool for one CV

The recommender (Zheng et al. 2023, arXiv 2307.02157) predicts whether the recruiter accepts a CV
for a JD. Its inputs are vectors of a frozen encoder: c of the CV, j' of JDs generated for it, and j
of the JD. The logit is

    a r(c, j) + g j' . j + b        r is  dot  (c + MLP(c)) . (j + MLP(j))   or  mlp  MLP([c; j])

r learns without j' (binary cross-entropy). Then the gate g, with a and b, is learned from labels
that r did not learn from: if j' is worth nothing, g falls to 0.

The paper's `dot` is MLP([c; j']) . MLP(j). From 192 labels it learned nothing here (AUC 0.51 to
0.54 in all modes, valid, three trainings of one run). So the MLPs of our `dot` start at 0: before
any label it is a similarity, which labels can improve. And j' stays out of the MLPs: inside them
it cannot be turned down. A single g, learned together with the MLPs, turns the JD of another CV
down, but the JDs of SFT and GIRL still cost: the MLPs learn worse beside them. AUC less that of
`none`, dot (valid, seed 0, all labels; five trainings, two of "learned together"):

    j' in the MLPs, no gate                     SFT -0.027    GIRL -0.010    shuffled -0.080
    g j' in them, g learned together                -0.026         -0.011             -0.001
    g j' . j beside them, g learned together        -0.012         -0.008             +0.001
    g j' . j beside them, g learned after           +0.005         +0.011              0.000

The labels are decisions on half B of the train CVs. Neither the generators nor the reward model
learned from these (the judge did; it has no part here). Three controls: `none` (j' is 0),
`shuffled` (generated for another CV: the same width, no content), and `sft` (generated before PPO).

Grounding: generated JDs are queries for posted ones. Each CV gets a pool of the split's JDs. Half
of a pool are of the CV's own occupation, or as many as there are (with 1,000 test CVs about 250, a
quarter of a pool of 1,000). The JDs that the CV was accepted for should rank high.

Left out: fine-tuning the encoder, user and item ids, learning to rank.

Shapes: N texts or decisions, C hidden size, k generated JDs for each CV.
"""
import copy
import hashlib
import itertools
import math
import random
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import reward
from data import Codec, load_codec, pad_right
from plumbing.records import json_lines, text_of
from measure.evaluate import (add_results, bootstrap_ci95, check_recommend, tfidf_cosine,
                              write_jds)
from model import LanguageModel, RewardModel
from plumbing.files import BadInput, locked
from plumbing.stage import Stage, autocast, flag, generator
from plumbing.texts import normalize
from plumbing.weights import load_model

KINDS = ("dot", "mlp")
# False: by default; True: with --full.
SHARES = {False: (0.01, 0.1, 1.0), True: (0.01, 0.03, 0.1, 0.3, 1.0)}           # of the labels
KS = {False: (1,), True: (1, 2, 4, 8)}      # generated JDs for each CV, for the recommender
SETTINGS = {False: ("cvs",), True: ("cvs", "jds", "occupations")}       # see train_test_split()
UNSEEN = {
    "cvs": "CVs and JDs",
    "jds": "JDs, for known CVs (new to the recommender alone)",
    "occupations": "CVs, JDs and occupations (the occupations new to the recommender alone)"}
POOLS = (100, 1000)
QUERIES = 8                 # generated JDs for each CV, for grounding
SHORTLIST = 20              # JDs that the reward model re-ranks, in the rankings of RERANKED
RERANKED = ("cv", "cv words", "girl")
GOOD = 0.5                  # a true match of at least this is relevant
DIFFERENCES = (
    ("girl", "cv"), ("girl", "cv words"), ("girl", "sft"), ("girl", "shuffled"),
    ("girl + reward", "cv + reward"), ("girl + reward", "cv words + reward"),
    ("girl + reward", "reward"))


@dataclass
class RecommendFlags:
    people: int = flag(3000, "CVs of half B; the decisions on them are the labels")
    seeds: int = flag(
        5, "trainings of each recommender; each draws its labels and its initial weights", least=2)
    hidden: int = flag(64, "width of the recommender's hidden layers")
    steps: int = flag(
        400, "max optimizer steps; early stopping on a held-out fifth of the recommender's labels")
    batch: int = flag(256, "decisions in an optimizer step")
    lr: float = flag(1e-3, "learning rate of AdamW")
    dropout: float = flag(0.5, "dropout of the recommender's hidden layers", most=0.99)
    prior: float = flag(15000, "weight decay of its matrices, divided by the number of labels")
    cvs: int = flag(200, "held-out CVs for which to find posted jobs")


class Models(NamedTuple):
    """A finished run, loaded."""
    sft: LanguageModel
    girl: LanguageModel
    reward: RewardModel
    codec: Codec
    device: torch.device
    seed: int


def load_run(run, device, seed):
    sft, policy = (load_model(run / s, LanguageModel, device).eval() for s in ("sft", "ppo"))
    reward_model = load_model(run / "reward", RewardModel, device).eval()
    return Models(sft, policy, reward_model, load_codec(run / "sft", sft.config), device, seed)


# ------------------------------------------------------------------------------------ the encoder
@torch.no_grad()
def encode(body, rows, device, batch_size=128):
    """Mean-pooled states of token rows: [N, C]. Rows of similar length share a batch."""
    body = first_block(body)
    states = torch.zeros(len(rows), body.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), batch_size):
        part = order[start:start + batch_size]
        ids, lengths = pad_right([rows[i] for i in part])
        real = torch.arange(ids.shape[1]) < lengths[:, None]                    # [B, T]
        with autocast(device):
            hidden = body(ids.to(device)).float().cpu()                         # [B, T, C]
        states[part] = (hidden * real[..., None]).sum(1) / lengths[:, None]     # [B, C]
    return states


def first_block(body):
    """A body that shares the weights, but has the first block alone: early states still tell which
    words there are."""
    body = copy.deepcopy(body, {id(p): p for p in body.parameters()})
    del body.layers[1:]
    return body


def zscore(x, like):
    """Each of the C features with mean 0 and standard deviation 1, as measured on `like` [N, C]."""
    return (x - like.mean(0)) / (like.std(0, correction=0) + 1e-6)


def whitening(states):
    """The matrix [C, C] that turns (states - mean) [N, C] into uncorrelated features of variance
    about 1 (Su et al. 2021, arXiv 2103.15316). Mean states differ most in a few directions, which
    then dominate a cosine: without whitening, NDCG@10 of the CV as a query in pools of 100 was 0.34
    instead of 0.46 (valid, one run). Directions that hardly vary stay small."""
    _, S, Vh = torch.linalg.svd(states - states.mean(0), full_matrices=False)   # [C], [C, C]
    std = S / math.sqrt(len(states))
    return Vh.T / (std + 0.05 * std[0])


class Encoder(NamedTuple):
    """Turns mean states [..., C] of CVs and JDs into vectors that can be compared: whitened and of
    length sqrt(C), so their products are C times a cosine."""
    cv_mean: torch.Tensor   # [C]
    jd_mean: torch.Tensor   # [C]
    matrix: torch.Tensor    # [C, C]

    def of_cv(self, states):
        return self.directions(states - self.cv_mean)

    def of_jd(self, states):
        return self.directions(states - self.jd_mean)

    def directions(self, centered):
        return F.normalize(centered @ self.matrix, dim=-1) * math.sqrt(self.matrix.shape[1])


def make_encoder(models, train):
    """The encoder's means and whitening matrix, from up to 4,000 CVs and 4,000 JDs of the train
    split."""
    draw = random.Random(models.seed)

    def encode_some(texts, to_tokens):
        sample = draw.sample(sorted(texts), min(4000, len(texts)))
        rows = [to_tokens(text) for text in sample]
        return encode(models.sft.model, rows, models.device)
    c = encode_some({r.cv for r in train}, models.codec.prompt)                 # [4000, C]
    j = encode_some({r.jd for r in train}, models.codec.jd)                     # [4000, C]
    return Encoder(c.mean(0), j.mean(0), whitening(j))


def write_and_encode(models, cvs, k, name):
    """k JDs for each CV, sampled from the generator `name` and encoded: [CVs, k, C]."""
    repeated = [cv for cv in cvs for _ in range(k)]
    jds = write_jds(getattr(models, name), models.codec, repeated, 1.0, models.seed,
                    f"recommend: {name} {k}", models.device)
    return encode(models.sft.model, jds, models.device).view(len(cvs), k, -1)


# -------------------------------------------------------------------------------- the recommender
class Recommender(nn.Module):
    """`dot` or `mlp`: features of N decisions, c of the CV and j of the JD, [N, C] each, to logits
    [N]."""

    def __init__(self, kind, C, flags):
        super().__init__()

        def mlp(inputs, outputs):
            return nn.Sequential(nn.Linear(inputs, flags.hidden), nn.ReLU(),
                                 nn.Dropout(flags.dropout), nn.Linear(flags.hidden, outputs))
        self.kind = kind
        self.bias, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))
        if kind == "dot":
            self.seeker, self.job = mlp(C, C), mlp(C, C)
            for last in (self.seeker[-1], self.job[-1]):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        else:
            self.both = mlp(2 * C, 1)

    def forward(self, c, j):
        if self.kind == "mlp":
            return self.both(torch.cat((c, j), 1)).squeeze(1) + self.bias       # [N]
        u, v = c + self.seeker(c), j + self.job(j)                              # [N, C] each
        return self.log_scale.exp() * (u * v).mean(1) + self.bias


def fit(model, features, labels, flags, draw):
    """Train on features (each [N, ...]) and labels [N] of 0.0 and 1.0, with early stopping on a
    held-out fifth of the labels: the loss there is measured every 10 steps, 10 measurements without
    a better one end the training, and the best weights are kept. Returns the model, and the indices
    of the held-out labels."""
    order, fifth = torch.randperm(len(labels), generator=draw), max(len(labels) // 5, 1)
    val, rest = order[:fifth], order[fifth:]
    share = float(labels.mean().clamp(0.01, 0.99))
    nn.init.constant_(model.bias, math.log(share / (1 - share)))
    optimizer = make_optimizer(model, len(labels), flags)
    best, best_step, weights = math.inf, 0, None
    for step in range(flags.steps + 1):
        if step % 10 == 0:
            loss = log_loss(predict(model, [x[val] for x in features]), labels[val])
            if loss < best:
                best, best_step = loss, step
                weights = {k: v.clone() for k, v in model.state_dict().items()}
            elif step - best_step >= 100:
                break
        batch = rest[torch.randint(len(rest), (min(flags.batch, len(rest)),), generator=draw)]
        logits = model(*(x[batch] for x in features))
        F.binary_cross_entropy_with_logits(logits, labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.load_state_dict(weights)
    return model, val


def make_optimizer(model, n_labels, flags):
    """AdamW with two groups. Scale and bias are scalars: few labels suffice, so they may move fast.
    The matrices get a weight decay that weakens with the number of labels, as a prior does; at most
    half of a matrix decays in a step."""
    scalars = [p for p in model.parameters() if p.dim() == 0]
    matrices = [p for p in model.parameters() if p.dim() > 0]
    decay = min(flags.prior / n_labels, 0.5 / flags.lr)
    return torch.optim.AdamW([{"params": matrices, "weight_decay": decay},
                              {"params": scalars, "weight_decay": 0.0, "lr": 30 * flags.lr}],
                             lr=flags.lr, fused=True)


@torch.no_grad()
def predict(model, features):
    model.eval()
    logits = model(*features)
    model.train()
    return logits


def log_loss(logits, labels):
    """Mean binary cross-entropy."""
    return float(F.binary_cross_entropy_with_logits(logits, labels))


def logistic(scores, labels, start, hold):
    """Logistic regression of labels [N] on scores [N, F]: the bias and F weights. A quadratic
    penalty of strength `hold` pulls them to `start`, as earlier labels would; the more labels there
    are, the less it counts."""
    x = F.pad(scores.double(), (1, 0), value=1.0)                               # [N, 1 + F]
    start, hold = torch.tensor(start).double(), torch.tensor(hold).double()
    weights = start.clone().requires_grad_()
    search = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        misfit = F.binary_cross_entropy_with_logits(x @ weights, labels.double(), reduction="sum")
        total = misfit + (hold * (weights - start) ** 2).sum() / 2
        total.backward()
        return total
    search.step(loss)
    return weights.detach().float()


def fit_gate(logits, similar, labels, val):
    """(b, a, g): the bias, and the weights of a recommender's logits [N] and of the similarity [N]
    of j' and j. Learned from the held-out labels (indices `val`): r was fitted to the others, so
    they would overrate its logits. Of 192 labels only 38 are held out. These alone lost half of the
    gain of GIRL's JDs (valid), so a is pulled to 1, and g to the weight that all labels give to the
    similarity alone."""
    alone = logistic(similar[:, None], labels, (0.0, 0.0), (0.1, 0.1))
    both = torch.stack((logits, similar), 1)
    return logistic(both[val], labels[val], (0.0, 1.0, float(alone[1])), (0.1, 3.0, 3.0))


def train_test_split(labels, held_out, setting, titles):
    """(learn, test) decisions that share no CV and no JD, no JD, or no occupation.

    cvs: the test is the held-out split (its JDs are new too: no text is in two splits).
    jds: the test is a fifth of the labels' JDs, for known CVs. They are new to the recommender
    alone: generators and reward model have seen most of them, with CVs of half A.
    occupations: the test is a fifth of the titles, of both CV and JD, in the held-out split. The
    generators have seen these occupations, the recommender has not."""
    def in_test(text):
        return text is not None and hashlib.sha256(text.encode()).digest()[0] < 51
    if setting == "cvs":
        return labels, held_out
    if setting == "jds":
        return [r for r in labels if not in_test(r.jd)], [r for r in labels if in_test(r.jd)]
    return ([r for r in labels if not any(in_test(title) for title in titles(r))],
            [r for r in held_out if all(in_test(title) for title in titles(r))])


# Student's t for a 95% interval, by degrees of freedom. Beyond these, `paired` takes the last one,
# which is a little too wide.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def paired(a, b):
    """Mean of a - b over seeds, and its 95% interval: [mean, low, high]."""
    d = np.asarray(a) - np.asarray(b)
    half_width = T_95[min(len(d) - 1, len(T_95)) - 1] * d.std(ddof=1) / math.sqrt(len(d))
    return [float(d.mean()), float(d.mean() - half_width), float(d.mean() + half_width)]


class Encoded(NamedTuple):
    """All texts of a comparison, as features."""
    cv: dict                # text -> row of `c` and of `written`
    jd: dict                # text -> row of `j`
    c: dict                 # kind of recommender -> [CVs, C]
    j: dict                 # kind of recommender -> [JDs, C]
    written: dict           # mode -> JDs generated for each CV, encoded as for `dot`, [CVs, k, C]

    def rows(self, records):
        cv = torch.tensor([self.cv[r.cv] for r in records])
        jd = torch.tensor([self.jd[r.jd] for r in records])
        return cv, jd


def features(encoded, records, kind):
    """(c, j) of decisions, [N, C] each."""
    cv, jd = encoded.rows(records)
    return encoded.c[kind][cv], encoded.j[kind][jd]


def similarity(encoded, records, mode, k):
    """Similarity [N] of the JD and the mean of the first k JDs generated for the CV; 0 without
    them."""
    if mode == "none":
        return torch.zeros(len(records))
    cv, jd = encoded.rows(records)
    return (encoded.written[mode][:, :k].mean(1)[cv] * encoded.j["dot"][jd]).mean(1)


def labels_of(records):
    return torch.tensor([float(r.accepted) for r in records])


def some_labels(learn, share, seed, n):
    """A random share of the decisions, at least two."""
    draw = random.Random(f"{seed} labels {share} {n}")
    return draw.sample(learn, max(2, round(share * len(learn))))


def train_and_test(encoded, learn, test, modes, shares, flags, seed, stage):
    """Train and test every recommender on every share of the labels: the rows of `table_rows`.
    `modes`: (mode, k) pairs."""
    similar = {mode: similarity(encoded, test, *mode) for mode in modes}
    truth, figures = labels_of(test), defaultdict(list)
    for kind, share, n in itertools.product(KINDS, shares, range(flags.seeds)):
        sample = some_labels(learn, share, seed, n)
        labels, inputs = labels_of(sample), features(encoded, sample, kind)
        torch.manual_seed(n)                # for the initial weights and dropout
        model = Recommender(kind, inputs[0].shape[1], flags)
        draw = generator(seed, "recommend", kind, share, n)
        model, val = fit(model, inputs, labels, flags, draw)
        learned, on_test = predict(model, inputs), predict(model, features(encoded, test, kind))
        for mode in modes:
            b, a, g = fit_gate(learned, similarity(encoded, sample, *mode), labels, val)
            logits = a * on_test + g * similar[mode] + b
            auc, loss = reward.auc(logits.numpy(), truth.numpy()), log_loss(logits, truth)
            figures[kind, share, mode].append((auc, loss, float(g), len(sample)))
            stage.log(kind=kind, mode=mode[0], k=mode[1], labels=len(sample), seed=n,
                      gate=float(g), auc=auc, log_loss=loss)
    return table_rows(figures)


def table_rows(figures):
    """A row for each kind of recommender, share of the labels and mode: AUC, LogLoss and gate (mean
    and standard deviation over seeds), and differences in AUC against `none` and `shuffled`, paired
    by seed. figures: {(kind, share, (mode, k)): [(AUC, LogLoss, gate, number of labels)]}, one
    tuple for each seed."""
    def mean_and_std(values):
        return [float(np.mean(values)), float(np.std(values, ddof=1))]
    rows = []
    for (kind, share, (mode, k)), by_seed in figures.items():
        aucs, losses, gates, n_labels = zip(*by_seed)
        row = {"kind": kind, "share": share, "labels": n_labels[0], "mode": mode, "k": k,
               "auc": mean_and_std(aucs), "log_loss": mean_and_std(losses),
               "gate": mean_and_std(gates)}
        for control, control_k in (("none", 1), ("shuffled", k)):
            key = kind, share, (control, control_k)
            if mode not in ("none", control) and key in figures:
                row[f"auc_over_{control}"] = paired(aucs, [auc for auc, *_ in figures[key]])
        rows.append(row)
    return rows


def untrained(encoded, test, modes):
    """AUC of `dot` before any label: its score is then a sum of cosines."""
    c, j = features(encoded, test, "dot")                                       # [N, C] each
    plain, truth = (c * j).mean(1), labels_of(test).numpy()                     # [N] each
    aucs = {}
    for mode, k in modes:
        scores = plain + similarity(encoded, test, mode, k)
        aucs[f"{mode} k={k}"] = reward.auc(scores.numpy(), truth)
    return aucs


def reward_alone(encoded, learn, test, rewards, share, seed):
    """The reward model as the recommender: AUC of its scores, and LogLoss after a logistic
    regression on them from this share of the labels."""
    def scores(records):
        pairs = [(encoded.cv[r.cv], encoded.jd[r.jd]) for r in records]
        score_of = rewards(set(pairs))
        return torch.tensor([score_of[pair] for pair in pairs])                 # [N]
    sample = some_labels(learn, share, seed, 0)
    bias, slope = logistic(scores(sample)[:, None], labels_of(sample), (0.0, 0.0), (0.1, 0.1))
    on_test, truth = scores(test), labels_of(test)
    return {"reward_auc": reward.auc(on_test.numpy(), truth.numpy()),
            "reward_log_loss": log_loss(slope * on_test + bias, truth)}


def compare_recommenders(models, train, labels, held_out, encoder, flags, full, market, stage):
    """All recommenders in all settings, trained on these labels: {setting: figures}. `train`: the
    records from whose texts `encoder` was made."""
    people = sorted({r.cv for r in labels})
    people = set(random.Random(models.seed).sample(people, min(flags.people, len(people))))
    labels = [r for r in labels if r.cv in people]
    cvs = list(dict.fromkeys(r.cv for r in labels + held_out))
    jds = sorted({r.jd for r in labels + held_out})
    prompts = [models.codec.prompt(cv) for cv in cvs]
    jd_rows = [models.codec.jd(jd) for jd in jds]

    # 1. Generate for every CV, and encode all texts.
    c, j = (encode(models.sft.model, rows, models.device) for rows in (prompts, jd_rows))
    written = {name: write_and_encode(models, cvs, max(KS[full]), name) for name in ("sft", "girl")}
    written["shuffled"] = written["girl"].roll(1, 0)                # those of another CV
    cv_at = {cv: i for i, cv in enumerate(cvs)}
    jd_at = {jd: i for i, jd in enumerate(jds)}

    def encoded(learn, test):
        """All texts as features, scaled by texts outside the test: for `dot` texts of the train
        split (the setting `jds` tests on some of its JDs), for `mlp` the texts of `learn`."""
        tested = {r.jd for r in test}
        others = [r for r in train if r.jd not in tested]
        scaler = encoder if len(others) == len(train) else make_encoder(models, others)
        like_cv = c[sorted({cv_at[r.cv] for r in learn})]                   # [CVs of learn, C]
        like_jd = j[sorted({jd_at[r.jd] for r in learn})]                   # [JDs of learn, C]
        return Encoded(cv_at, jd_at,
                       {"dot": scaler.of_cv(c), "mlp": zscore(c, like_cv)},
                       {"dot": scaler.of_jd(j), "mlp": zscore(j, like_jd)},
                       {name: scaler.of_jd(states) for name, states in written.items()})

    def rewards(pairs):
        return reward.score_pairs(models.reward, prompts, jd_rows, pairs)

    # 2. Train and test, beside the reward model alone.
    modes = [("none", 1)] + [(mode, k) for mode in written for k in KS[full]]
    settings = [s for s in SETTINGS[full] if market or s != "occupations"]
    stage.total(len(settings) * len(SHARES[full]) * flags.seeds * len(KINDS) * len(modes))
    table = {}
    for setting in settings:
        learn, test = train_test_split(labels, held_out, setting, market and market.titles)
        if len({r.accepted for r in learn}) < 2 or len({r.accepted for r in test}) < 2:
            stage.say(f"recommend: unseen {UNSEEN[setting]}: "
                      "too few decisions to learn from and to test on")
            continue
        accepted, best = [r.accepted for r in test], None
        if market:
            best = reward.auc([market.true_match(r.cv, r.jd) for r in test], accepted)
        texts = encoded(learn, test)
        table[setting] = {"learn": len(learn), "test": len(test), "best_auc": best,
                          "untrained_auc": untrained(texts, test, modes)}
        table[setting] |= reward_alone(texts, learn, test, rewards, min(SHARES[full]), models.seed)
        table[setting]["rows"] = train_and_test(texts, learn, test, modes, SHARES[full], flags,
                                                models.seed, stage)
    return table


# -------------------------------------------------------------------------------------- grounding
def ranking_figures(relevant):
    """Figures of one ranked list (bools, best rank first, at least one True): HR@1, 5, 10, 20 (is a
    relevant one among the first k?), NDCG@10 (Jarvelin and Kekalainen 2002, binary gains) and the
    reciprocal rank of the first relevant one."""
    relevant = np.asarray(relevant, dtype=bool)
    first = int(relevant.argmax()) + 1
    gains = 1 / np.log2(np.arange(2, 12))                                       # of ranks 1 to 10
    dcg = gains[:len(relevant)][relevant[:10]].sum()
    ideal = gains[:relevant.sum()].sum()
    hits = {f"hr_{k}": float(first <= k) for k in (1, 5, 10, 20)}
    return hits | {"ndcg_10": float(dcg / ideal), "mrr": 1 / first}


def draw_pool(draw, own, hard, n_jds, size):
    """Indices of `size` of n_jds JDs: `own`, then `hard` ones up to half of the pool (or as many as
    there are), then others, then more `hard` ones if the others do not suffice. Shuffled, so ties
    do not favour accepted JDs."""
    pool, taken = own[:size], set(own)
    hard = [d for d in hard if d not in taken]
    others = sorted(set(range(n_jds)) - taken - set(hard))

    def add(candidates, up_to):
        n = min(len(candidates), max(up_to - len(pool), 0))
        pool.extend(draw.sample(candidates, n))
    add(hard, size // 2)
    add(others, size)
    add(sorted(set(hard) - set(pool)), size)
    draw.shuffle(pool)
    return np.array(pool)


def ranked(pool, scores):
    """A pool by descending score."""
    return pool[np.argsort(-np.asarray(scores), kind="stable")]


def rank_pools(pools, similar, rewards, all_rewarded):
    """Each pool (one per CV: indices of JDs) in the order of each method: {method: [order per CV]}.

    similar: {query: cosines [CVs, JDs]}; rewards(pairs): the reward model's scores of (CV, JD)
    pairs. It re-ranks the first SHORTLIST JDs in the rankings of RERANKED; if `all_rewarded`, it
    ranks whole pools too."""
    orders = {name: [ranked(pool, cosines[q, pool]) for q, pool in enumerate(pools)]
              for name, cosines in similar.items()}
    needed = set()
    for name in RERANKED:
        for q, order in enumerate(orders[name]):
            needed |= {(q, int(d)) for d in order[:SHORTLIST]}
    if all_rewarded:
        for q, pool in enumerate(pools):
            needed |= {(q, int(d)) for d in pool}
    scores = rewards(needed)

    def by_reward(q, jds):
        return ranked(jds, [scores[q, int(d)] for d in jds])
    for name in RERANKED:
        orders[f"{name} + reward"] = [
            np.concatenate((by_reward(q, order[:SHORTLIST]), order[SHORTLIST:]))
            for q, order in enumerate(orders[name])]
    if all_rewarded:
        orders["reward"] = [by_reward(q, pool) for q, pool in enumerate(pools)]
    return orders


def rank_rows(orders, relevant, seed):
    """The figures of each method, with intervals over CVs, and differences in NDCG@10 between
    methods, paired by CV. relevant [CVs, JDs]: bools. CVs with nothing relevant in their pool are
    left out."""
    rows, ndcg = {}, {}
    for name, lists in orders.items():
        figures = [ranking_figures(relevant[q, order]) for q, order in enumerate(lists)
                   if relevant[q, order].any()]
        rows[name], ndcg[name] = {"cvs": len(figures)}, np.array([f["ndcg_10"] for f in figures])
        for key in figures[0]:
            values = [f[key] for f in figures]
            rows[name] |= {key: float(np.mean(values)),
                           f"{key}_ci95": bootstrap_ci95(values, seed)}
    differences = {}
    for a, b in DIFFERENCES:
        if a in ndcg and b in ndcg:
            gain = ndcg[a] - ndcg[b]
            differences[f"{a} - {b}"] = [float(gain.mean()), *bootstrap_ci95(gain, seed)]
    return {"rows": rows, "differences": differences}


def similarities(models, cvs, prompts, jds, jd_rows, encoder):
    """The similarity of every JD to each CV's query, {query: [CVs, JDs]}, and the number of
    candidates compared per second (after all texts were generated and encoded). For `cv words`, the
    rarity of a word is counted over the JDs that are searched."""
    queries = {name: encoder.of_jd(write_and_encode(models, cvs, QUERIES, name)).mean(1)
               for name in ("sft", "girl")}                                     # [CVs, C] each
    queries["shuffled"] = queries["girl"].roll(1, 0)            # those of another CV
    queries["cv"] = encoder.of_cv(encode(models.sft.model, prompts, models.device))  # [CVs, C]
    J = encoder.of_jd(encode(models.sft.model, jd_rows, models.device))         # [JDs, C]
    start = time.time()
    similar = {name: (q @ J.T).numpy() for name, q in queries.items()}
    speed = round(len(similar) * len(cvs) * len(jds) / (time.time() - start))
    codec = models.codec
    cv_words, jd_words = ([codec.encode(text) for text in texts] for texts in (cvs, jds))
    similar["cv words"] = tfidf_cosine(cv_words, jd_words,
                                       codec.tokenizer.get_vocab_size()).numpy()
    return similar, speed


def ground(models, held_out, encoder, flags, full, market):
    """Find posted jobs for some held-out CVs, in pools of the split's JDs, by every method. The
    keys of `pools` are the real sizes: a split may have fewer JDs than POOLS asks for. None if
    nobody was accepted."""
    accepted = defaultdict(list)
    for r in held_out:
        if r.accepted:
            accepted[r.cv].append(r.jd)
    cvs, jds = list(accepted)[:flags.cvs], sorted({r.jd for r in held_out})
    if not cvs:
        return None
    at = {jd: d for d, jd in enumerate(jds)}
    own = [[at[jd] for jd in dict.fromkeys(accepted[cv])] for cv in cvs]
    prompts = [models.codec.prompt(cv) for cv in cvs]
    jd_rows = [models.codec.jd(jd) for jd in jds]
    similar, speed = similarities(models, cvs, prompts, jds, jd_rows, encoder)
    scores, seconds = {}, 0.0

    def rewards(pairs):
        nonlocal seconds
        start = time.time()
        scores.update(reward.score_pairs(models.reward, prompts, jd_rows, pairs - set(scores)))
        seconds += time.time() - start
        return scores

    hard = hard_ones(cvs, jds, own, models.codec, market)
    result = {"cvs": len(cvs), "jds": len(jds), "pools": {}}
    sizes = sorted({min(size, len(jds)) for size in POOLS})
    for size in sizes:
        draw = random.Random(f"{models.seed} pools {size}")
        pools = [draw_pool(draw, own[q], hard[q], len(jds), size) for q in range(len(cvs))]
        orders = rank_pools(pools, similar, rewards, full or size == sizes[0])
        result["pools"][str(size)] = {
            by: rank_rows(orders, relevant, models.seed)
            for by, relevant in relevance(cvs, jds, own, pools, market).items() if relevant.any()}
    speeds = {"similarity": speed, "reward": round(len(scores) / seconds)}
    return result | {"candidates_per_second": speeds}


def relevance(cvs, jds, own, pools, market):
    """Which JDs are relevant to which CV? {"accepted": bools [CVs, JDs]}, and with a market also
    "true match", for the JDs of a CV's pool."""
    relevant = {"accepted": np.zeros((len(cvs), len(jds)), dtype=bool)}
    for q, accepted in enumerate(own):
        relevant["accepted"][q, accepted] = True
    if market:
        relevant["true match"] = np.zeros((len(cvs), len(jds)), dtype=bool)
        for q, pool in enumerate(pools):
            good = [market.true_match(cvs[q], jds[d]) >= GOOD for d in pool]
            relevant["true match"][q, pool] = good
    return relevant


def hard_ones(cvs, jds, own, codec, market):
    """For each CV the indices of JDs that are easily mistaken for a fitting one: of its occupation,
    at any level and in any city; without a market, those whose words are most like an accepted
    JD's."""
    if market:
        by_title = defaultdict(list)
        for d, jd in enumerate(jds):
            if job := market.parse_jd(jd):
                by_title[job.title].append(d)
        return [by_title[market.of_market(cv).title] for cv in cvs]
    rows = [codec.encode(jd) for jd in jds]
    queries = [rows[accepted[0]] for accepted in own]
    similar = tfidf_cosine(queries, rows, codec.tokenizer.get_vocab_size())     # [CVs, JDs]
    return similar.argsort(1, descending=True)[:, :max(POOLS) // 2].tolist()


# -------------------------------------------------------------------------------- jobs for one CV
def read_pool(path, hide=True):
    """The distinct JDs of a .jsonl file. Each line is an object with a text "jd"; other keys are
    ignored. With `hide`, contacts in the JDs become placeholders."""
    example, jds = '{"jd": "..."}', {}
    for where, raw in json_lines(path, f"give a file of lines like {example}"):
        if not isinstance(raw, dict) or "jd" not in raw:
            raise BadInput(f"{where}: expected a line like {example}")
        jds[normalize(text_of(raw, "jd", where), hide)] = True
    jds = [jd for jd in jds if jd]
    if not jds:
        raise BadInput(f"{path}: no JDs; expected lines like {example}")
    return jds


def find_jobs(models, cv, pool, top, train, market):
    """Print the `top` jobs of a pool (texts) for one CV: GIRL generates QUERIES JDs, the jobs most
    like them form a shortlist, and the reward model ranks it. Each job is shown with its score, and
    with the fields that agree with one more JD, generated greedily and shown too."""
    encoder = make_encoder(models, train)
    [suggested] = write_jds(models.girl, models.codec, [cv], 0.0, models.seed,
                            "recommend: suggestion", models.device)
    suggestion = models.codec.text(suggested)
    jd_rows = [models.codec.jd(jd) for jd in pool]
    [queries] = encoder.of_jd(write_and_encode(models, [cv], QUERIES, "girl"))  # [QUERIES, C]
    J = encoder.of_jd(encode(models.sft.model, jd_rows, models.device))         # [JDs, C]
    shortlist = ranked(np.arange(len(pool)), J @ queries.mean(0))[:max(top, SHORTLIST)]
    pairs = [(0, int(d)) for d in shortlist]
    score_of = reward.score_pairs(models.reward, [models.codec.prompt(cv)], jd_rows, pairs)
    print(f"The suggestion (greedy):\n{suggestion or '(empty: end-of-text came first)'}\n")
    for d in ranked(shortlist, [score_of[pair] for pair in pairs])[:top]:
        print(f"[{score_of[0, int(d)]:+.3f}] agrees with the suggestion in: "
              f"{agreement(suggestion, pool[d], market)}")
        print(f"{pool[d]}\n")


def agreement(a, b, market):
    """The market's fields in which two JDs agree, or else the longest words that both have, as one
    line."""
    if market and market.parse_jd(a) and market.parse_jd(b):
        shared = market.agreement(market.parse_jd(a), market.parse_jd(b))
    else:
        words = [set(re.findall(r"\w{4,}", text.lower())) for text in (a, b)]
        shared = sorted(words[0] & words[1], key=lambda word: (-len(word), word))[:8]
    return ", ".join(shared) or "nothing"


# ------------------------------------------------------------------------- measuring and printing
def measure(run, folder, models, train, labels, held_out, split, flags, full, market, measured):
    """Write the recommender's and grounding's figures into results.json, and print their tables.
    `market`: the simulation's module, or None; `measured`: checksums of everything that the results
    depend on."""
    start, results = time.time(), {"seed": models.seed, "split": split, "measured": measured}
    check_recommend(run, results)
    with Stage(run, "recommend") as stage:
        encoder = make_encoder(models, train)
        table = compare_recommenders(models, train, labels, held_out, encoder, flags, full, market,
                                     stage)
        grounded = ground(models, held_out, encoder, flags, full, market)
        if stage.rows:                  # at least one setting had enough decisions
            stage.finish()
    results |= {"recommend": table, "grounding": grounded}
    results = add_results(run, folder, "recommend", start, results)
    with locked(run, wait=True):         # evaluate may print at the same moment
        print_recommend(table)
        print_grounding(grounded)
        sys.stdout.flush()
    return results


def print_recommend(table):
    """One line for each recommender and share of the labels: AUC of each mode, and its gain by
    generated JDs. The gate is that of a cosine, from -1 to 1."""
    for setting, figures in table.items():
        best = "" if figures["best_auc"] is None else f", the true match {figures['best_auc']:.3f}"
        print(f"\nrecommender, unseen {UNSEEN[setting]}: AUC on {figures['test']} decisions; "
              f"the reward model alone {figures['reward_auc']:.3f}{best}")
        print("dot before any label: "
              + ", ".join(f"{name} {auc:.3f}" for name, auc in figures["untrained_auc"].items()))
        for row in figures["rows"]:
            name = f"{row['mode']} k={row['k']}"
            more = "" if row["mode"] == "none" else f"  gate {row['gate'][0]:+.1f}"
            for control in ("none", "shuffled"):
                if difference := row.get(f"auc_over_{control}"):
                    mean, low, high = difference
                    more += f"  over {control} {mean:+.3f} ({low:+.3f} to {high:+.3f})"
            print(f"{row['kind']:<4}{row['labels']:>7} labels  {name:<13} "
                  f"AUC {row['auc'][0]:.3f} +- {row['auc'][1]:.3f}  "
                  f"LogLoss {row['log_loss'][0]:.3f} +- {row['log_loss'][1]:.3f}{more}")


def print_grounding(grounded):
    if not grounded:
        return
    for size, by_criterion in grounded["pools"].items():
        for criterion, figures in by_criterion.items():
            columns = ("hr_1", "hr_5", "hr_10", "hr_20", "ndcg_10", "mrr")
            print(f"\ngrounding in pools of {size} posted JDs, relevant by {criterion}")
            print(f"{'':<20}" + "".join(f"{c:>9}" for c in columns))
            for name, row in figures["rows"].items():
                print(f"{name:<20}" + "".join(f"{row[c]:>9.3f}" for c in columns))
            for name, (mean, low, high) in figures["differences"].items():
                print(f"NDCG@10, {name:<36}{mean:+.3f} ({low:+.3f} to {high:+.3f})")
    print(f"candidates scored per second: {grounded['candidates_per_second']}")
