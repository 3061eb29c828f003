"""Stage 2, the reward model U: learns from the recruiter's decisions how well a JD fits a CV.

    python girl.py reward --run RUN           (--judge: the independent judge, from the other half of the CVs)

    L = -log sigmoid(U(C, J+) - U(C, J-))     over an accepted and a rejected JD of one CV, and over an accepted and a
                                              rejected CV of one JD

Algorithm:
1. Take stage 1's body with a fresh scalar head, read at the last token of  prompt(C) + J + end-of-text.
2. Learn to read. A comparison teaches one bit; on bits alone a small model finds out late, or never, that the answer lies
   in comparing two texts. So at first another head says for each token of the JD whether the CV holds it too. This needs
   no decision, and the head is thrown away.
3. Learn to judge. Gather the decisions into groups: all decisions on one CV, all decisions on one JD. Every text of a
   group is scored once, and every (accepted, rejected) pair inside the group is a comparison (as in Ouyang et al. 2022,
   arXiv 2203.02155, section 3.5: all comparisons of one prompt belong into one batch). The same loss on the mean state
   of the JD's tokens stands beside it: it reaches each token directly, where the last token must first learn to look.
4. Fold the scale into the head: scores of the generator's own samples get mean 0 and standard deviation 1.

Left out: a margin in the loss, a loss on the absolute score, ensembles.
"""
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import bucketed, pad_right
from model import generate
from run import BadInput, Optimizer, autocast, flag, generator


@dataclass
class RewardFlags:
    read_steps: int = flag(500, "optimizer steps of learning to read (point 2 above)")
    read_batch: int = flag(32, "decisions in such a step")
    steps: int = flag(1000, "optimizer steps of learning to judge")
    groups: int = flag(8, "groups of decisions in a step; a group is all decisions on one CV or on one JD")
    max_group: int = flag(8, "decisions of a group used in a step")
    accumulate: int = flag(1, "micro-batches that a step is cut into, to save memory")
    lr: float = flag(4e-3, "peak learning rate of AdamW, for all but the matrices (cosine to 0)")
    matrix_lr: float = flag(0.02, "peak learning rate of Muon, for the layers' matrices")
    warmup: int = flag(50, "steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "largest norm of the gradient")
    pooled: float = flag(1.0, "weight of the loss on the mean state of the JD's tokens")
    samples: int = flag(256, "samples of the generator that fix the score's mean 0 and standard deviation 1")


class Group(NamedTuple):
    rows: list          # (prompt, JD + end-of-text), token ids both
    accepted: list      # a bool for each row


# ------------------------------------------------------------------------------------------------ the mathematics
def ranking_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), the Bradley-Terry likelihood: scores [P], [P] -> a number; ln 2 where equal."""
    return -F.logsigmoid(chosen - rejected).mean()


def auc(scores, labels):
    """Probability that a random accepted decision scores above a random rejected one; ties count half (the
    Mann-Whitney statistic, from average ranks); None where there is only one kind."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    n1, n0 = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)) if n1 and n0 else None


# ------------------------------------------------------------------------------------------------------ the data
def decision_groups(records):
    """Indices of the records of each CV and of each JD, where at least one was accepted and one rejected."""
    by_text = defaultdict(list)
    for i, r in enumerate(records):
        by_text["cv", r.cv].append(i)
        by_text["jd", r.jd].append(i)
    return [g for g in by_text.values() if 0 < sum(records[i].accepted for i in g) < len(g)]


def comparisons(accepted):
    """All (accepted, rejected) index pairs of one group: [True, False, False] -> [(0, 1), (0, 2)]."""
    return [(i, j) for i, yes in enumerate(accepted) if yes for j, no in enumerate(accepted) if not no]


def make_groups(records, codec):
    """Token rows of all groups, and how many rejected rows were dropped from them: after truncation they are identical to
    an accepted one of their group, and a comparison of equals teaches nothing."""
    rows = [(codec.prompt(r.cv), codec.jd(r.jd)) for r in records]
    groups, dropped = [], 0
    for g in decision_groups(records):
        accepted = [rows[i] for i in g if records[i].accepted]
        keep = [i for i in g if records[i].accepted or rows[i] not in accepted]
        dropped += len(g) - len(keep)
        if len(keep) > len(accepted):
            groups.append(Group([rows[i] for i in keep], [records[i].accepted for i in keep]))
    return groups, dropped


def subsample(group, n, generator):
    """At most n rows of a group, always with an accepted and a rejected one."""
    if len(group.rows) <= n:
        return group
    order = torch.randperm(len(group.rows), generator=generator).tolist()
    first = [next(i for i in order if group.accepted[i]), next(i for i in order if not group.accepted[i])]
    keep = first + [i for i in order if i not in first][:n - 2]
    return Group([group.rows[i] for i in keep], [group.accepted[i] for i in keep])


# ------------------------------------------------------------------------------------------------------ scoring
@torch.no_grad()
def score_rows(model, rows, batch_size=128):
    """Scores of token rows, as an array in their order. Rows of similar length are computed together."""
    device, scores = model.score.weight.device, np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), batch_size):
        part = order[start:start + batch_size]
        ids, lengths = pad_right([rows[i] for i in part])
        with autocast(device):
            scores[part] = model(ids.to(device), lengths.to(device)).cpu().numpy()
    return scores


def score_texts(model, codec, pairs):
    """Scores of (cv, jd) texts."""
    return score_rows(model, [codec.prompt(cv) + codec.jd(jd) for cv, jd in pairs])


def pair_metrics(records, scores):
    """Accuracy and mean margin over all comparisons (ties count half), and AUC over all decisions."""
    margins = [scores[g[i]] - scores[g[j]] for g in decision_groups(records)
               for i, j in comparisons([records[k].accepted for k in g])]
    margins = np.array(margins)
    some = len(margins) > 0
    return {"pair_accuracy": float((margins > 0).mean() + (margins == 0).mean() / 2) if some else None,
            "auc": auc(scores, [r.accepted for r in records]), "margin": float(margins.mean()) if some else None,
            "pairs": len(margins)}


# ------------------------------------------------------------------------------------------------------ training
def pad_pairs(rows, device):
    """(prompt, JD) rows -> ids [B, T], lengths [B], and in_jd [B, T], True at the JD's tokens and its end-of-text."""
    ids, lengths = pad_right([prompt + jd for prompt, jd in rows])
    at, starts = torch.arange(ids.shape[1])[None, :], torch.tensor([len(prompt) for prompt, _ in rows])[:, None]
    in_jd = (at >= starts) & (at < lengths[:, None])                                         # [B, T]
    return ids.to(device), lengths.to(device), in_jd.to(device)


def reading_loss(model, reader, rows, device):
    """Cross-entropy of "the CV holds this token too", mean over the tokens of these JDs, and how often it was right."""
    ids, _, in_jd = pad_pairs(rows, device)
    held = torch.cat([torch.isin(torch.tensor(jd), torch.tensor(prompt)) for prompt, jd in rows]).float().to(device)
    with autocast(device):
        logits = reader(model.model(ids)[in_jd]).squeeze(-1).float()                         # [tokens]
    return F.binary_cross_entropy_with_logits(logits, held), int(((logits > 0) == (held > 0.5)).sum()) / len(held)


def batch_loss(model, groups, pooled, device):
    """Sums over all comparisons of these groups: of -log sigmoid, of the same plus `pooled` times that of the mean
    states (what is minimised), their number, and how many came out right."""
    ids, lengths, in_jd = pad_pairs([row for g in groups for row in g.rows], device)
    pairs, start = [], 0
    for g in groups:
        pairs += [(start + i, start + j) for i, j in comparisons(g.accepted)]
        start += len(g.rows)
    better, worse = torch.tensor(pairs, device=device).unbind(1)                             # [P], [P]
    with autocast(device):
        hidden = model.model(ids)                                                            # [B, T, C]
        scores = model.head(hidden[torch.arange(len(ids), device=device), lengths - 1])      # [B]
        mean = (hidden * in_jd[..., None]).sum(1) / in_jd.sum(1, keepdim=True)               # [B, C]
        means = model.head(mean)                                                             # [B]
    loss = ranking_loss(scores[better], scores[worse]) * len(pairs)
    beside = ranking_loss(means[better], means[worse]) * len(pairs)
    return loss, loss + pooled * beside, len(pairs), (scores[better] > scores[worse]).sum()


def train(model, codec, records, flags, seed, stage, device):
    """Stage 2 on these decisions."""
    groups, dropped = make_groups(records, codec)
    if not groups:
        raise BadInput(f"{stage.name}: no CV and no JD with both an accepted and a rejected decision: nothing to compare")
    stage.say(f"{stage.name}: {len(records)} decisions in {len(groups)} groups; {dropped} rejected ones dropped, "
              f"identical to an accepted one after truncation; cut: {codec.cut_cvs} CVs, {codec.cut_jds} JDs")
    reader = nn.Linear(model.config.hidden_size, 1).to(device)
    steps = stage.total(flags.read_steps + flags.steps)
    optimizer = Optimizer(nn.ModuleList([model, reader]), flags, steps)
    longest, epoch, batches = [max(len(p) + len(j) for p, j in g.rows) for g in groups], 0, []
    for step in range(steps):
        draw = generator(seed, stage.name, step)
        if step < flags.read_steps:
            picks = torch.randint(len(records), (flags.read_batch,), generator=draw).tolist()
            rows = [(codec.prompt(records[i].cv), codec.jd(records[i].jd)) for i in picks]
            loss, accuracy = read_step(model, reader, rows, flags, device)
        else:
            if not batches:
                batches = bucketed(longest, flags.groups, generator(seed, stage.name, "epoch", epoch))
                epoch += 1
            batch = [subsample(groups[i], flags.max_group, draw) for i in batches.pop()]
            loss, accuracy = judge_step(model, batch, flags, device)
        if not np.isfinite(loss):
            raise BadInput(f"{stage.name}: the loss is not finite; lower --lr and --matrix-lr")
        optimizer.step(step)
        phase = "read" if step < flags.read_steps else "judge"
        stage.log(step=step + 1, phase=phase, loss=loss, accuracy=accuracy)
        if (step + 1) % 100 == 0:
            stage.say(f"{stage.name} {step + 1:4d}/{steps}  {phase}  loss {stage.mean('loss', 100):.4f}  "
                      f"accuracy {stage.mean('accuracy', 100):.3f}")


def read_step(model, reader, rows, flags, device):
    """Gradients of the reading loss; returns its value and the share of tokens that were right."""
    total = right = 0.0
    for k in range(flags.accumulate):
        if part := rows[k::flags.accumulate]:
            loss, accuracy = reading_loss(model, reader, part, device)
            (loss * len(part) / len(rows)).backward()
            total, right = total + float(loss.detach()) * len(part), right + accuracy * len(part)
    return total / len(rows), right / len(rows)


def judge_step(model, groups, flags, device):
    """Gradients of the ranking loss; returns its value per comparison and the share that was right."""
    pairs, total, correct = sum(len(comparisons(g.accepted)) for g in groups), 0.0, 0
    for k in range(flags.accumulate):
        if part := groups[k::flags.accumulate]:
            loss, objective, _, right = batch_loss(model, part, flags.pooled, device)
            (objective / pairs).backward()              # by pair: micro-batches add up to the gradient of the batch
            total, correct = total + float(loss.detach()), correct + int(right)
    return total / pairs, correct / pairs


def standardize(model, scores):
    """Scale and shift the model so that these raw scores of its own would be of mean 0 and standard deviation 1. The
    scale goes into the head, the shift is kept as `center`: PPO's beta then means the same for every reward model."""
    raw = torch.as_tensor(scores, dtype=torch.float64) + model.center
    std = float(raw.std())
    if not std > 1e-6:
        raise BadInput("the reward model gives every sample the same score; train it longer or on more decisions")
    with torch.no_grad():
        model.score.weight /= std
    model.center = float(raw.mean()) / std


def sample_texts(lm, codec, cvs, n, seed, stage, device, batch_size=128):
    """Token rows prompt + JD of one sample for each of n random CVs."""
    order = torch.randperm(len(cvs), generator=generator(seed, stage.name, "cvs"))[:n].tolist()
    prompts, rows = [codec.prompt(cvs[i]) for i in order], []
    for k in range(0, len(prompts), batch_size):
        part = prompts[k:k + batch_size]
        with autocast(device):
            out = generate(lm, part, codec.max_jd, generator=generator(seed, stage.name, "samples", k, device=device))
        rows += [p + o for p, o in zip(part, out)]
    return rows
