"""DPO, direct preference optimisation: instead of stages 2 and 3, the generator G learns from the
recruiters' decisions themselves. There is no reward model, and nothing is sampled.

    python girl.py dpo --run RUN              (after stage 1; not part of `train`)

    L = -log sigmoid(beta log(pi(J+|C) / pi_ref(J+|C)) - beta log(pi(J-|C) / pi_ref(J-|C)))

over an accepted JD J+ and a rejected JD J- of one CV C (Rafailov et al. 2023, arXiv 2305.18290,
equation 7). pi is the policy G, pi_ref the model of stage 1, pi(J|C) the probability of a whole JD.
Why: PPO maximises score - beta KL. For the best policy, beta log(pi / pi_ref) is the score minus a
number that depends on C alone (equation 5). So this implicit reward takes the place of the score in
stage 2's ranking loss, where the number cancels.

Algorithm:
1. Policy and reference start as the model of stage 1.
2. Gather the decisions on half A by CV, with the hard negatives of `probes.jsonl`. A CV needs an
   accepted and a rejected JD. Two CVs of one JD make no pair here: the number differs between
   CVs, so it would not cancel.
3. Each step draws some CVs, and of each an accepted and a rejected JD. log pi of a JD is the sum
   over its tokens and its end-of-text.
4. Adam on L; the learning rate falls linearly to 0.

L asks only for a margin. Mostly both JDs get less likely, the rejected one more so (Pal et al.
2024, arXiv 2402.13228), and what gets likelier may be no JD at all. A larger `--beta` helps.

Left out: pairs of the policy's own JDs (no recruiter judges them), an SFT loss on accepted JDs.

Shapes: M rows (a prompt and a JD each) or pairs, R tokens of the longest JD.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from data import load_codec, read_half
from model import LanguageModel, copy_trainable
from plumbing.files import BadInput
from plumbing.inputs import need
from plumbing.records import keeps_contacts
from plumbing.stage import autocast, flag, generator
from plumbing.tokenizer import save_tokenizer
from plumbing.weights import load_model, save_model
from ppo import evaluate_policy, make_rollout
from reward import comparisons, decision_groups, make_groups, ranking_loss, schedule


@dataclass
class DPOFlags:
    steps: int = flag(350, "optimizer steps")
    pairs: int = flag(16, "pairs of an accepted and a rejected JD in a step, each of another CV")
    lr: float = flag(2e-4, "learning rate; falls linearly to 0")
    beta: float = flag(0.5, "the price of a nat of KL to the model of stage 1: the larger, the "
                            "nearer the policy stays to it")
    max_grad_norm: float = flag(1.0, "largest norm of the gradient")


# ------------------------------------------------------------------------------ the mathematics
def implicit_reward(logp, ref_logp, beta):
    """beta log(pi / pi_ref), from log-probabilities of whole JDs: [M], [M] -> [M]."""
    return beta * (logp - ref_logp)


def dpo_loss(logp_chosen, logp_rejected, ref_chosen, ref_rejected, beta):
    """-log sigmoid(implicit reward of the accepted JD - that of the rejected one), from
    log-probabilities of whole JDs: four times [M] -> a number; ln 2 if policy and reference are
    equal. Rafailov et al. 2023, arXiv 2305.18290, equation 7."""
    return ranking_loss(implicit_reward(logp_chosen, ref_chosen, beta),
                        implicit_reward(logp_rejected, ref_rejected, beta))


def jd_log_probs(lm, prompts, jds, device):
    """log pi of whole JDs after their prompts: token lists -> [M]."""
    with autocast(device):
        logp, _ = evaluate_policy(lm, make_rollout(prompts, jds, device), 1.0)      # [M, R]
    return logp.sum(1)                      # pads are 0


# ------------------------------------------------------------------------------------- training
def draw_pair(group, generator):
    """A random comparison of a group: prompt, accepted JD, rejected JD."""
    pairs = comparisons(group.accepted)
    i, j = pairs[int(torch.randint(len(pairs), (), generator=generator))]
    (prompt, chosen), (_, rejected) = group.rows[i], group.rows[j]
    return prompt, chosen, rejected


def dpo_step(policy, reference, batch, beta, device):
    """Gradients of L over these (prompt, accepted JD, rejected JD). Returns the log: L, the share
    of margins above 0, the mean margin, and the mean implicit reward of the accepted JDs."""
    prompts, chosen, rejected = zip(*batch)
    rows = prompts + prompts, chosen + rejected     # one pass for both halves of the pairs
    logp = jd_log_probs(policy, *rows, device)                                      # [2 M]
    with torch.no_grad():
        ref_logp = jd_log_probs(reference, *rows, device)                           # [2 M]
    loss = dpo_loss(*logp.chunk(2), *ref_logp.chunk(2), beta)
    loss.backward()
    better, worse = implicit_reward(logp.detach(), ref_logp, beta).chunk(2)         # [M], [M]
    log = {"loss": loss.detach(), "accuracy": (better > worse).float().mean(),
           "margin": (better - worse).mean(), "chosen": better.mean()}
    return {name: float(x) for name, x in log.items()}


def train(policy, codec, records, flags, seed, stage, device):
    """DPO on these decisions."""
    of_one_cv = [g for g in decision_groups(records) if len({records[i].cv for i in g}) == 1]
    order = torch.randperm(len(of_one_cv), generator=generator(seed, stage.name, "groups"))
    # Tokenize only as many groups as the steps can use.
    used = [of_one_cv[i] for i in order[:flags.steps * flags.pairs].tolist()]
    groups, dropped = make_groups(records, used, codec)
    if not groups:
        raise BadInput(f"{stage.name}: no CV with both an accepted and a rejected JD, {dropped} "
                       "rejected ones dropped: nothing to compare; give more decisions on the same "
                       "CVs, or raise --max-cv and --max-jd of stage 1")
    stage.say(f"{stage.name}: {len(of_one_cv)} CVs have an accepted and a rejected JD; "
              f"{len(groups)} are used, without {dropped} rejected JDs equal to an accepted one")
    reference = copy_trainable(policy)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=flags.lr)
    stage.total(flags.steps)
    stage.resume({"policy": policy}, [optimizer])
    lengths = [max(len(prompt) + len(jd) for prompt, jd in group.rows) for group in groups]
    batches = schedule(lengths, flags.pairs, flags.steps, seed, stage.name)
    for step in range(stage.step, flags.steps):
        rng = generator(seed, stage.name, step)
        batch = [draw_pair(groups[i], rng) for i in batches[step]]
        log = dpo_step(policy, reference, batch, flags.beta, device)
        norm = float(nn.utils.clip_grad_norm_(trained, flags.max_grad_norm))
        if not math.isfinite(sum(log.values()) + norm):
            stage.not_finite(step + 1, [codec.cv(prompt) for prompt, _, _ in batch], "lower --lr")
        optimizer.param_groups[0]["lr"] = flags.lr * (1 - step / flags.steps)
        optimizer.step()
        optimizer.zero_grad()
        stage.log(step=step + 1, **log)
        if (step + 1) % 100 == 0:
            means = "  ".join(f"{name} {stage.mean(name, 100):.3f}" for name in log)
            stage.say(f"{stage.name} {step + 1:4d}/{flags.steps}  {means}")
        stage.checkpoint(step + 1)


def run(stage, folder, data, flags, seed, device):
    """Load stage 1's model and the decisions on half A, train, save."""
    policy = load_model(need(folder, "sft"), LanguageModel, device)
    policy.config.keep_contacts = keeps_contacts(data)
    codec = load_codec(folder / "sft", policy.config)
    files = [f for f in ("train.jsonl", "probes.jsonl") if (data / f).exists()]
    train(policy, codec, read_half(data, "A", *files), flags, seed, stage, device)
    stage.check_lock()
    save_model(stage.folder, policy)
    save_tokenizer(stage.folder, codec)
    stage.finish(**stage.rows[-1])
