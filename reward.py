"""Stage 2, the reward model U: learns from the recruiter's decisions how well a JD fits a CV.

    python girl.py reward --run RUN           (--judge: the independent judge, from the other half of the CVs)

    L = -log sigmoid(U(C, J+) - U(C, J-))     over an accepted and a rejected JD of one CV, and over an accepted and a
                                              rejected CV of one JD

Algorithm:
1. Take stage 1's body with a fresh scalar head, read at the last token of  prompt(C) + J + end-of-text.
2. Gather the decisions into groups: all decisions on one CV, all decisions on one JD. Every text of a group is scored
   once, and every (accepted, rejected) pair inside the group is a comparison (as in Ouyang et al. 2022,
   arXiv 2203.02155, section 3.5: all comparisons of one prompt belong into one batch).
3. Fold the scale into the head: scores of the generator's own samples get mean 0 and standard deviation 1.

Left out: a margin in the loss, a loss on the absolute score, ensembles.
"""
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import bucketed, half, pad_right
from model import generate
from run import BadInput, Optimizer, autocast, flag, generator


@dataclass
class RewardFlags:
    steps: int = flag(900, "optimizer steps")
    groups: int = flag(10, "groups of decisions in a step; a group is all decisions on one CV or on one JD")
    max_group: int = flag(8, "decisions of a group used in a step")
    accumulate: int = flag(1, "micro-batches that a step is cut into, to save memory")
    lr: float = flag(2e-3, "peak learning rate of AdamW, for all but the matrices (cosine to 0)")
    matrix_lr: float = flag(0.01, "peak learning rate of Muon, for the layers' matrices")
    warmup: int = flag(50, "steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "largest norm of the gradient")
    samples: int = flag(256, "samples of the generator that fix the score's mean 0 and standard deviation 1")


class Group(NamedTuple):
    rows: list          # token ids of prompt + JD + end-of-text
    accepted: list      # a bool for each row


# ------------------------------------------------------------------------------------------------ the mathematics
def ranking_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), the Bradley-Terry likelihood: scores [P], [P] -> a number; ln 2 where equal."""
    return -F.logsigmoid(chosen - rejected).mean()


def auc(scores, labels):
    """Probability that a random accepted decision scores above a random rejected one; ties count half (the
    Mann-Whitney statistic, from average ranks)."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    n1, n0 = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)) if n1 and n0 else float("nan")


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
    rows = {(r.cv, r.jd): codec.prompt(r.cv) + codec.jd(r.jd) for r in records}
    groups, dropped = [], 0
    for g in decision_groups(records):
        accepted = {tuple(rows[records[i].cv, records[i].jd]) for i in g if records[i].accepted}
        keep = [i for i in g if records[i].accepted or tuple(rows[records[i].cv, records[i].jd]) not in accepted]
        dropped += len(g) - len(keep)
        if len(keep) > sum(records[i].accepted for i in keep):
            groups.append(Group([rows[records[i].cv, records[i].jd] for i in keep], [records[i].accepted for i in keep]))
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
    return {"pair_accuracy": float((margins > 0).mean() + (margins == 0).mean() / 2) if len(margins) else float("nan"),
            "auc": auc(scores, [r.accepted for r in records]), "margin": float(margins.mean()) if len(margins) else float("nan"), "pairs": len(margins)}


# ------------------------------------------------------------------------------------------------------ training
def batch_loss(model, groups, device):
    """Sum of -log sigmoid over all comparisons of these groups, how many there are, and how many came out right."""
    rows = [row for g in groups for row in g.rows]
    pairs, start = [], 0
    for g in groups:
        pairs += [(start + i, start + j) for i, j in comparisons(g.accepted)]
        start += len(g.rows)
    ids, lengths = pad_right(rows)
    with autocast(device):
        scores = model(ids.to(device), lengths.to(device))                                   # [rows]
    chosen, rejected = scores[torch.tensor(pairs, device=device)].unbind(1)                  # [P], [P]
    return ranking_loss(chosen, rejected) * len(pairs), len(pairs), (chosen > rejected).sum()


def train(model, codec, records, flags, seed, stage, device):
    """Stage 2 on these decisions."""
    groups, dropped = make_groups(records, codec)
    if not groups:
        raise BadInput(f"{stage.name}: no CV and no JD with both an accepted and a rejected decision: nothing to compare")
    stage.say(f"{stage.name}: {len(records)} decisions in {len(groups)} groups; {dropped} rejected ones dropped, "
              f"identical to an accepted one after truncation; cut: {codec.cut_cvs} CVs, {codec.cut_jds} JDs")
    optimizer = Optimizer(model, flags, flags.steps)
    longest, epoch, batches = [max(map(len, g.rows)) for g in groups], 0, []
    for step in range(stage.total(flags.steps)):
        draw = generator(seed, stage.name, step)
        if not batches:
            batches = bucketed(longest, flags.groups, generator(seed, stage.name, "epoch", epoch))
            epoch += 1
        batch = [subsample(groups[i], flags.max_group, draw) for i in batches.pop()]
        pairs = sum(len(comparisons(g.accepted)) for g in batch)
        loss = correct = 0.0
        for k in range(flags.accumulate):
            if part := batch[k::flags.accumulate]:
                part_loss, _, right = batch_loss(model, part, device)
                (part_loss / pairs).backward()          # by pair: micro-batches add up to the gradient of the batch
                loss, correct = loss + float(part_loss.detach()), correct + int(right)
        if not np.isfinite(loss):
            raise BadInput(f"{stage.name}: the loss is not finite; lower --lr")
        optimizer.step(step)
        stage.log(step=step + 1, loss=loss / pairs, accuracy=correct / pairs)
        if (step + 1) % 100 == 0:
            stage.say(f"{stage.name} {step + 1:4d}/{flags.steps}  loss {stage.mean('loss', 100):.4f}  "
                      f"accuracy {stage.mean('accuracy', 100):.3f}")


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
