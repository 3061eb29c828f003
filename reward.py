"""Stage 2, the reward model U: learns from recruiters' decisions how well a JD fits a CV.

    python girl.py reward --run RUN           (--judge: the independent judge, from the other half
                                              of the CVs)

    L = -log sigmoid(U(C, J+) - U(C, J-))     over an accepted and a rejected JD of one CV, and
                                              over an accepted and a rejected CV of one JD

Algorithm:
1. Take stage 1's body (or that of `--init`) and a new scalar head, read at the last token of
   prompt(C) + J + end-of-text. A small model also gets one more block, which starts as an average
   over all tokens.
2. Gather the decisions into groups: all decisions on one CV, all decisions on one JD. Each text of
   a group is scored once, and each (accepted, rejected) pair in the group is a comparison (as in
   Ouyang et al. 2022, arXiv 2203.02155, section 3.5, all comparisons of one prompt belong in one
   batch; there each prompt counts the same, here each comparison does). Hard negatives may join
   the decisions: JDs that nobody would post, all rejected (`probes.jsonl`). If there are more
   groups than the steps can show, a random part is used. Of a large group each step draws
   `--max-group` decisions.
3. Add the pooled loss: L again, on the mean state of each JD. See aids.py.
4. Add `--reading` times the reading loss of stage 1, so that the model does not forget what it
   learned there.
5. Fold the scale into the head: the scores of the generator's own samples get mean 0 and standard
   deviation 1.

The learning rates are low because a comparison teaches only one bit: with `--matrix-lr` 0.02 the
model had forgotten after 150 steps how to compare two texts.

Left out: a margin in the loss, a loss on the absolute score, ensembles.

Shapes: B rows (a prompt and a JD each), R tokens of the longest JD, M comparisons, C hidden size.
"""
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from aids import Optimizer, add_averaging_block, jd_states, mean_states, reading_loss
from data import Codec, bucketed, load_codec, pad_right, read_half, read_records
from model import LanguageModel, RewardModel, copy_trainable, generate, rows_that_fit
from plumbing.files import BadInput, load_tensors
from plumbing.inputs import init_of, need
from plumbing.records import keeps_contacts
from plumbing.stage import autocast, flag, generator, read_summary
from plumbing.tokenizer import load_tokenizer, same_tokenizer, save_tokenizer
from plumbing.weights import (StartFlags, load_checked, load_model, load_pretrained,
                              save_model)


@dataclass
class RewardFlags(StartFlags):
    steps: int = flag(1200, "optimizer steps")
    groups: int = flag(4, "groups of decisions in a step; a group is all decisions on one CV or on "
                          "one JD")
    max_group: int = flag(8, "decisions of a group used in a step", least=2)
    accumulate: int = flag(1, "micro-batches that a step is split into, to save memory")
    lr: float = flag(1e-3, "peak learning rate of AdamW, for embeddings, norms and head (cosine to "
                           "0)")
    matrix_lr: float = flag(0.0015, "peak learning rate of Muon, for the matrices of the blocks; "
                                    "0: AdamW for these, too")
    warmup: int = flag(50, "steps of linear warm-up", least=0)
    max_grad_norm: float = flag(1.0, "largest norm of the gradient")
    reading: float = flag(0.5, "weight of the reading loss: does the CV hold this token of the JD?")
    samples: int = flag(256, "samples of the SFT model, on which the score gets mean 0 and "
                             "standard deviation 1", least=2)


# ------------------------------------------------------------------------------ the mathematics
def ranking_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected): scores [M], [M] -> a number; ln 2 if they are equal. The
    model of Bradley and Terry (1952), as used by Stiennon et al. 2020, arXiv 2009.01325, section
    3.4."""
    return -F.logsigmoid(chosen - rejected).mean()


def auc(scores, labels):
    """Probability that a random accepted decision scores above a random rejected one; ties count
    half (the Mann-Whitney statistic, from average ranks). None if there is only one kind."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    n1, n0 = labels.sum(), (~labels).sum()
    if not n1 or not n0:
        return None
    return float((ranks[labels].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


# --------------------------------------------------------------------------------------- groups
class Group(NamedTuple):
    """Decisions on one CV or on one JD."""
    rows: list          # (prompt, JD + end-of-text), token ids both
    accepted: list      # a bool for each row


def decision_groups(records):
    """For each CV, and for each JD, with an accepted and a rejected decision: the indices of its
    records."""
    by_text = defaultdict(list)
    for i, r in enumerate(records):
        by_text["cv", r.cv].append(i)
        by_text["jd", r.jd].append(i)
    return [g for g in by_text.values() if 0 < sum(records[i].accepted for i in g) < len(g)]


def comparisons(accepted):
    """All (accepted, rejected) index pairs of a group: [True, False, False] -> [(0, 1), (0, 2)]."""
    chosen = [i for i, yes in enumerate(accepted) if yes]
    rejected = [i for i, yes in enumerate(accepted) if not yes]
    return [(i, j) for i in chosen for j in rejected]


def make_groups(records, index_groups, codec):
    """Token rows of these groups (lists of indices of records), and how many rejected rows were
    dropped: after truncation they equal an accepted row of their group, and a comparison of equals
    teaches nothing."""
    groups, dropped = [], 0
    for indices in index_groups:
        rows = [(codec.prompt(records[i].cv), codec.jd(records[i].jd)) for i in indices]
        accepted = [records[i].accepted for i in indices]
        chosen = [row for row, yes in zip(rows, accepted) if yes]
        keep = [k for k, row in enumerate(rows) if accepted[k] or row not in chosen]
        dropped += len(rows) - len(keep)
        if len(keep) > len(chosen):
            groups.append(Group([rows[k] for k in keep], [accepted[k] for k in keep]))
    return groups, dropped


def subsample(group, n, generator):
    """At most n rows of a group, always with an accepted and a rejected one."""
    if len(group.rows) <= n:
        return group
    order = torch.randperm(len(group.rows), generator=generator).tolist()
    pair = [next(i for i in order if group.accepted[i]),
            next(i for i in order if not group.accepted[i])]
    keep = pair + [i for i in order if i not in pair][:n - 2]
    return Group([group.rows[i] for i in keep], [group.accepted[i] for i in keep])


# ------------------------------------------------------------------------------------- training
def batch_loss(model, reader, groups, device):
    """Over all comparisons of these groups: the sum of -log sigmoid, the same sum for the mean
    states, and how many comparisons came out right. Also the mean reading loss of the rows."""
    rows, pairs = [], []
    for group in groups:
        pairs += [(len(rows) + i, len(rows) + j) for i, j in comparisons(group.accepted)]
        rows += group.rows
    # Not scores[better]: on a CPU its gradients add up in no fixed order if they are many.
    better, worse = torch.tensor(pairs, device=device).unbind(1)                    # [M], [M]
    with autocast(device):
        last, inputs, in_jd = jd_states(model.model, rows, device)      # [B, C], [B, R, C], [B, R]
        scores = model.head(last)                                                   # [B]
        pooled = model.head(mean_states(inputs, in_jd))                             # [B]
        reading = reading_loss(reader, inputs[in_jd], rows)
    chosen, rejected = (scores.index_select(0, i) for i in (better, worse))         # [M], [M]
    loss = ranking_loss(chosen, rejected) * len(pairs)
    chosen_mean, rejected_mean = (pooled.index_select(0, i) for i in (better, worse))
    pooled_loss = ranking_loss(chosen_mean, rejected_mean) * len(pairs)
    return loss, pooled_loss, int((chosen > rejected).sum()), reading


def reward_step(model, reader, groups, flags, device):
    """Gradients of the objective over these groups. Returns L per comparison, the share of
    comparisons that came out right, and the reading loss."""
    reader = reader if flags.reading else None
    n = sum(len(comparisons(g.accepted)) for g in groups)
    n_rows = sum(len(g.rows) for g in groups)
    total, correct, total_reading = 0.0, 0, 0.0
    for k in range(min(flags.accumulate, len(groups))):
        part = groups[k::flags.accumulate]
        share = sum(len(g.rows) for g in part) / n_rows
        loss, pooled_loss, right, reading = batch_loss(model, reader, part, device)
        # Divided by all comparisons, and by all rows: micro-batches add up to the gradient of the
        # batch.
        ((loss + pooled_loss) / n + flags.reading * share * reading).backward()
        total, correct = total + float(loss.detach()), correct + right
        total_reading += share * float(reading.detach())
    return total / n, correct / n, total_reading


def schedule(lengths, size, steps, seed, name):
    """The groups of each step, as lists of indices: one epoch after the other, each in an order of
    its own."""
    batches, epoch = [], 0
    while len(batches) < steps:
        # In reverse, as the first version took them: a seed keeps its result.
        batches += reversed(bucketed(lengths, size, generator(seed, name, "epoch", epoch)))
        epoch += 1
    return batches[:steps]


def train(model, reader, codec, records, flags, seed, stage, device):
    """Stage 2 on these decisions. `reader`: the head of the reading loss."""
    # Tokenize only as many groups as the steps can use, each once.
    all_groups = decision_groups(records)
    order = torch.randperm(len(all_groups), generator=generator(seed, stage.name, "groups"))
    used = [all_groups[i] for i in order[:flags.steps * flags.groups].tolist()]
    groups, dropped = make_groups(records, used, codec)
    if not groups:
        raise BadInput(f"{stage.name}: no CV and no JD with both an accepted and a rejected "
                       f"decision, {dropped} rejected ones dropped: nothing to compare; give more "
                       "decisions, or raise --max-cv and --max-jd of stage 1")
    stage.say(f"{stage.name}: {len(records)} decisions in {len(all_groups)} groups, "
              f"{len(groups)} of them used; {dropped} rejected ones dropped, identical to an "
              f"accepted one after truncation; truncated: {len(codec.cut_cvs)} CVs, "
              f"{len(codec.cut_jds)} JDs")
    model.model.checkpointing = flags.checkpointing
    optimizer = Optimizer(nn.ModuleList([model, reader]), flags, stage.total(flags.steps))
    stage.resume({"model": model, "reader": reader}, optimizer.optimizers)
    lengths = [max(len(prompt) + len(jd) for prompt, jd in group.rows) for group in groups]
    batches = schedule(lengths, flags.groups, flags.steps, seed, stage.name)
    for step in range(stage.step, flags.steps):
        rng = generator(seed, stage.name, step)
        batch = [subsample(groups[i], flags.max_group, rng) for i in batches[step]]
        loss, accuracy, reading = reward_step(model, reader, batch, flags, device)
        norm = optimizer.clip()
        if not np.isfinite(loss + reading + norm):
            cvs = [codec.cv(group.rows[0][0]) for group in batch]
            stage.not_finite(step + 1, cvs, "lower --lr and --matrix-lr")
        optimizer.step(step)
        stage.log(step=step + 1, loss=loss, accuracy=accuracy, reading=reading)
        if (step + 1) % 100 == 0:
            stage.say(f"{stage.name} {step + 1:4d}/{flags.steps}  "
                      f"loss {stage.mean('loss', 100):.4f}  "
                      f"accuracy {stage.mean('accuracy', 100):.3f}  "
                      f"reading loss {stage.mean('reading', 100):.4f}")
        stage.checkpoint(step + 1)


# -------------------------------------------------------------------------------------- scoring
def rows_for_scores(model, most):
    """How many rows are scored at once. The MLP of one block takes the most memory."""
    c = model.config
    return rows_that_fit(most, 4 * c.intermediate_size * (c.max_cv_tokens + c.max_jd_tokens))


@torch.no_grad()
def score_rows(model, rows, batch_size=128):
    """Scores of token rows, as an array in their order. Rows of similar length are computed
    together."""
    device, scores = model.score.weight.device, np.zeros(len(rows))
    batch_size = rows_for_scores(model, batch_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), batch_size):
        part = order[start:start + batch_size]
        ids, lengths = pad_right([rows[i] for i in part])
        with autocast(device):
            scores[part] = model(ids.to(device), lengths.to(device)).cpu().numpy()  # [part]
    check_finite(scores)
    return scores


def check_finite(scores):
    if not np.isfinite(scores).all():
        raise BadInput("the reward model's scores are not finite: its training diverged (lower its "
                       "--lr), or its weights are damaged")


@torch.no_grad()
def score_pairs(model, prompts, jds, pairs, batch_size=128):
    """Scores of (prompt, JD) pairs, given as indices: {pair: score}. Fast if each prompt has many
    JDs: a batch reads each of its prompts once. The JDs of four prompts at a time are sorted by
    length, so that few pads are computed."""
    device, scores = model.score.weight.device, {}
    batch_size = rows_for_scores(model, batch_size)
    pairs = sorted(pairs, key=lambda pair: (pair[0] // 4, len(jds[pair[1]]), pair))
    for start in range(0, len(pairs), batch_size):
        part = pairs[start:start + batch_size]
        rows = [(prompts[q], jds[d]) for q, d in part]
        with autocast(device):
            last, _, _ = jd_states(model.model, rows, device)                       # [part, C]
            scores |= dict(zip(part, model.head(last).tolist()))
    check_finite(list(scores.values()))
    return scores


def score_texts(model, codec, pairs):
    """Scores of (cv, jd) texts."""
    return score_rows(model, [codec.prompt(cv) + codec.jd(jd) for cv, jd in pairs])


def pair_margins(records, scores):
    """For each group of decisions the margins score(accepted) - score(rejected) of its
    comparisons."""
    margins = []
    for group in decision_groups(records):
        pairs = comparisons([records[k].accepted for k in group])
        margins.append(np.array([scores[group[i]] - scores[group[j]] for i, j in pairs]))
    return margins


def pair_metrics(records, scores):
    """Accuracy and mean margin over all comparisons (ties count half); AUC over all decisions."""
    margins = np.concatenate([np.empty(0), *pair_margins(records, scores)])
    metrics = {"pair_accuracy": None, "auc": auc(scores, [r.accepted for r in records]),
               "margin": None, "pairs": len(margins)}
    if len(margins):
        right = (margins > 0).mean() + (margins == 0).mean() / 2
        metrics |= {"pair_accuracy": float(right), "margin": float(margins.mean())}
    return metrics


def standardize(model, scores):
    """Scale and shift the model so that these scores of its own would have mean 0 and standard
    deviation 1. The scale goes into the head, the shift is kept as `center`: PPO's beta then means
    the same for every reward model. (Ziegler et al. 2019, arXiv 1909.08593, section 2.)"""
    raw = torch.as_tensor(scores, dtype=torch.float64) + model.center
    std = float(raw.std())
    if not std > 1e-6:
        raise BadInput("the reward model gives every sample the same score: its decisions were too "
                       "few, or its --lr too high; delete its folder and train it with others")
    with torch.no_grad():
        model.score.weight /= std
    model.center = float(raw.mean()) / std


def sample_rows(lm, codec, cvs, n, seed, stage, device, batch_size=128):
    """Token rows prompt + JD of one sample for each of n random CVs."""
    order = torch.randperm(len(cvs), generator=generator(seed, stage.name, "cvs"))[:n].tolist()
    prompts, rows = [codec.prompt(cvs[i]) for i in order], []
    for k in range(0, len(prompts), batch_size):
        part = prompts[k:k + batch_size]
        rng = generator(seed, stage.name, "samples", k, device=device)
        with autocast(device):
            responses = generate(lm, part, codec.max_jd, generator=rng)
        rows += [prompt + response for prompt, response in zip(part, responses)]
    return rows


# ------------------------------------------------------------------------------ the whole stage
def new_reward_model(lm, pretrained, seed):
    """A reward model with the body of a language model and a random head."""
    torch.manual_seed(seed)
    if pretrained:
        # Its end-of-text state summarizes the text already: no averaging block. With adapters the
        # two models share the frozen base.
        return RewardModel(lm.config, body=copy_trainable(lm.model))
    model = RewardModel(lm.config)
    model.model.load_state_dict(lm.model.state_dict())
    add_averaging_block(model)
    with torch.no_grad():
        # The logits of stage 1 need large final states; the new head expects states of size 1.
        model.model.norm.weight /= model.model.norm.weight.mean()
    return model


def new_reader(folder, lm, pretrained, flags):
    """The head of the reading loss. A small model continues with that of stage 1."""
    reader, path = nn.Linear(lm.config.hidden_size, 1), folder / "sft" / "reader.safetensors"
    if flags.reading and not pretrained and read_summary(folder / "sft")["asked"]["reading"]:
        if not path.exists():
            raise BadInput(f"{path}: no such file, stage 1 was run by another version; delete "
                           f"{path.parent} and run it again, or give --reading 0")
        load_checked(reader, load_tensors(path), reader.state_dict(), path, "cpu")
        with torch.no_grad():
            # new_reward_model made the states smaller by this factor.
            reader.weight *= lm.model.norm.weight.mean().cpu()
    return reader


def run(stage, folder, data, flags, seed, device):
    """Stage 2: load the decisions on half A and stage 1's model, train, standardize, save. The
    judge is trained in the same way, with another seed, on half B. (Both start from stage 1's
    weights, and the jobs are the same.)"""
    name, half = stage.name, "B" if stage.name == "judge" else "A"
    lm = load_model(need(folder, "sft"), LanguageModel, device)
    codec = load_codec(folder / "sft", lm.config)
    files = [f for f in ("train.jsonl", "probes.jsonl") if (data / f).exists()]
    records, init_seed = read_half(data, half, *files), generator(seed, name, "init").initial_seed()
    start = lm
    if flags.init:
        other = Codec(load_tokenizer(flags.init), codec.max_cv, codec.max_jd, codec.eos)
        if not same_tokenizer(codec, other):
            raise BadInput(f"{flags.init}: its tokenizer is not the one of {folder / 'sft'}; the "
                           "reward model must read what that model writes")
        start = load_pretrained(flags, codec, init_seed, device)
    start.config.keep_contacts = keeps_contacts(data)   # an earlier version did not save it
    pretrained = bool(flags.init or init_of(folder))
    model = new_reward_model(start, pretrained, init_seed).to(device)
    reader = new_reader(folder, start, pretrained, flags).to(device)
    train(model, reader, codec, records, flags, seed, stage, device)

    cvs = sorted({r.cv for r in records})
    samples = sample_rows(lm, codec, cvs, flags.samples, seed, stage, device)
    if not any(row[-1] == codec.eos for row in samples):
        stage.say(f"{name}: none of {len(samples)} samples of stage 1 ended within {codec.max_jd} "
                  "tokens, so the score is standardized on truncated JDs; train stage 1 longer, or "
                  "raise its --max-jd")
    standardize(model, score_rows(model, samples))
    valid = read_records(data / "valid.jsonl")
    metrics = pair_metrics(valid, score_texts(model, codec, [(r.cv, r.jd) for r in valid]))
    shown = [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()]
    stage.say(f"{name}: valid " + ", ".join(shown))
    stage.check_lock()
    save_model(stage.folder, model)
    save_tokenizer(stage.folder, codec)
    stage.finish(**metrics, center=model.center, cut_cvs=len(codec.cut_cvs),
                 cut_jds=len(codec.cut_jds))
