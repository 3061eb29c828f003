"""Stage 3, PPO: train the generator G to write JDs that the reward model U scores highly.

    python girl.py ppo --run RUN

One iteration (Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler et al. 2019,
arXiv 1909.08593, and Stiennon et al. 2020, arXiv 2009.01325):
1. Rollout: the policy writes a JD for each of some CVs, sampled from its full distribution.
2. Score: U scores each finished JD; a truncated one gets a fixed penalty. Each token costs
   beta * (log pi - log pi_ref), where pi is the policy G and pi_ref the SFT model G_SFT. So a
   text's rewards add up, on average, to score - beta * KL(G || G_SFT).
3. Advantages: GAE (Schulman et al. 2015, arXiv 1506.02438) from the critic's values, whitened over
   the rollout. Or, with `--advantages rloo` or `grpo`, without a critic: the policy writes several
   JDs for each CV, and each is compared with the others (see group_advantages).
4. Update: a few epochs over the rollout in minibatches, with the clipped ratio.

The critic is a linear head on the sum of the frozen reward model's states so far, from the prompt's
last token on. The pass that scores a text computes them anyway, and the model is causal: a state
knows only the text so far. (Stiennon et al. 2020 and Ouyang et al. 2022 start their critic from the
reward model, too.) The sum holds more than the last state: the contribution of each token stays in
it. The table shows which share of the variance of the returns a head explains, fitted to 2,048
samples and measured on 1,024 others. In brackets: the share for advantages + values, which the log
shows. One run, seed 0, CVs of half A:

    value from                              SFT's samples   PPO's samples
    the policy's last state                  0.05 (0.06)     0.18 (0.22)
    the sum of the policy's states           0.19 (0.42)     0.39 (0.64)
    the reward model's last state            0.34 (0.47)     0.48 (0.61)
    the sum of the reward model's states     0.46 (0.68)     0.56 (0.75)

Least squares fits the head: the solution is exact, and there is no learning rate to choose. Before
iteration 1 the SFT model writes one rollout that only the critic sees. After that the critic learns
from each rollout only when its values for that rollout have been used: no value knows the returns
that it is compared with.

Left out: reward whitening (it did harm: each rollout's own spread would set the scale of the score,
and beta would mean something else every time), a critic trained by gradients, an entropy bonus,
early stopping by KL within an iteration.

On CUDA (bf16 autocast) the logits are rounded to bf16 before the log-softmax in float32, so the
first ratio is 1 only to that precision.

Shapes: B episodes, R response tokens (padded), T prompt + response (padded), "tokens" the real
response tokens of all rows, C hidden size, V vocabulary.
"""
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import load_codec, pad_right, read_half
from model import LanguageModel, RewardModel, copy_trainable, generate
from plumbing.files import BadInput, NotFinite, save_tensors
from plumbing.inputs import need
from plumbing.records import keeps_contacts
from plumbing.stage import autocast, flag, generator
from plumbing.tokenizer import save_tokenizer
from plumbing.weights import load_model, save_model


@dataclass
class PPOFlags:
    iterations: int = flag(24, "iterations, each one rollout and its update")
    episodes: int = flag(256, "JDs written in a rollout")
    ppo_epochs: int = flag(2, "passes over a rollout")
    minibatch: int = flag(64, "episodes in an optimizer step")
    accumulate: int = flag(1, "micro-batches that a minibatch is split into, to save memory")
    lr: float = flag(4e-4, "learning rate; falls linearly to 0")
    clip: float = flag(0.2, "epsilon of the clipped ratio")
    kl_coef: float = flag(0.08, "beta, the price of a nat of KL to the SFT model, in standard "
                                "deviations of the score")
    kl_target: float = flag(0.0, "nats per text that the adaptive controller steers to; 0 keeps "
                                 "beta fixed")
    kl_horizon: int = flag(2000, "episodes over which the adaptive controller corrects an error")
    gamma: float = flag(1.0, "discount", most=1)
    lam: float = flag(0.95, "lambda of GAE", most=1)
    advantages: str = flag("gae", "gae: from the critic; rloo or grpo: from other JDs for the same "
                                  "CV", choices=("gae", "rloo", "grpo"))
    group: int = flag(8, "JDs for each CV of a rollout, for rloo and grpo", least=2)
    temperature: float = flag(1.0, "divides the logits in rollout, reference and update",
                              least=0.01)
    cut_off_score: float = flag(-3.0, "score of a JD that was truncated before its end-of-text",
                                least=-1e9)
    max_grad_norm: float = flag(1.0, "largest norm of the gradient")
    keep: int = flag(5, "how many iterations, spread over the run, `trace` can do again: the state "
                        "before each is kept in RUN/ppo/kept", least=0)
    checkpointing: bool = flag(False, "gradient checkpointing: keep the inputs of each block and "
                                      "recompute the rest; less memory, more time")


# -------------------------------------------------------------------- the mathematics, on masks
# A mask is [B, R] and True at real response tokens, the end-of-text included. It is made from
# lengths, never from ids.
def masked_mean(x, mask):
    """[B, R] -> a number."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and variance 1 over the real tokens; pads are 0. [B, R] -> [B, R]."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def k1(logp, ref_logp):
    """log(pi / pi_ref). Its mean over samples of pi is KL(pi || pi_ref); single values may be
    negative."""
    return logp - ref_logp


def k3(logp, ref_logp):
    """exp(-k1) - 1 + k1: the same mean as k1, never negative, and less variance while pi is near
    pi_ref (Schulman 2020, joschu.net/blog/kl-approx)."""
    d = k1(logp, ref_logp)
    return torch.exp(-d) - 1 + d


def token_rewards(scores, kl, mask, beta):
    """-beta * KL at every token, plus the text's score at its last real token (Ziegler et al. 2019,
    section 2). scores [B], kl [B, R] -> [B, R]."""
    rewards = -beta * kl * mask
    last = mask.sum(1) - 1                                                          # [B]
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2015, equation 16), backwards in time. The
    value after the end is 0.

    A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t.
    [B, R] each -> unwhitened advantages [B, R], 0 at pads."""
    values = values * mask
    advantages, next_advantage, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                   # [B]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]        # [B], 0 at pads
        advantages[:, t] = next_advantage
        next_value = values[:, t]                                                   # [B]
    return advantages


def returns_to_go(rewards, mask, gamma):
    """The rewards from each token on: the sum of gamma^l r_{t+l}, which is A + V if lambda is 1.
    [B, R] -> [B, R]."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def group_advantages(totals, group, how):
    """Advantages without a critic, one for each text: all its tokens get the same. Each `group`
    texts in a row are for one CV.
    rloo: the total minus the mean total of the others (Ahmadian et al. 2024, arXiv 2402.14740).
    grpo: the score minus the mean of all, in their standard deviations (Shao et al. 2024, arXiv
    2402.03300, section 4.1.2). So beta is then a price in these, not in units of the score.
    [B] -> [B]."""
    x = totals.view(-1, group)                                                      # [CVs, group]
    centred = x - x.mean(1, keepdim=True)                                           # [CVs, group]
    if how == "rloo":                       # x - mean of the others = centred * n / (n - 1)
        return (centred * group / (group - 1)).flatten()
    return (centred / (x.std(1, keepdim=True) + 1e-6)).flatten()


def policy_loss(log_ratio, advantages, clip):
    """Per token: max(-A r, -A clip(r, 1 - eps, 1 + eps)), equation 7 of the PPO paper with the sign
    flipped."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.max(-advantages * ratio, -advantages * clipped)


def explained_variance(values, targets, mask):
    """1 - var(targets - values) / var(targets): 1 for a perfect critic, 0 for one that knows only
    the mean. As usual, `targets` are GAE's advantages + values: they contain later values, so they
    are less noisy than the returns."""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return 1 - variance(targets - values) / variance(targets).clamp(min=1e-8)


class KLController:
    """beta. Fixed if target is 0; otherwise Ziegler et al. 2019, section 2.2: with e = clip(KL /
    target - 1, -0.2, 0.2), each iteration multiplies beta by 1 + e * episodes / horizon."""

    def __init__(self, beta, target, horizon):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl, episodes):
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * episodes / self.horizon


# ------------------------------------------------------------------------ critic, policy, scores
class Critic(nn.Module):
    """V, the value of a text so far: linear in the sum of the reward model's states. Ridge
    regression fits it to the returns of all rollouts so far.

    KEPT: each rollout counts 0.7 of the next one, because the policy moves.
    RIDGE: relative to the mean diagonal entry of X'X. It shrinks the weights, because the texts of
    a small rollout have fewer independent returns than the head has weights."""

    KEPT, RIDGE = 0.7, 1e-2

    def __init__(self, C):
        super().__init__()
        self.register_buffer("xx", torch.zeros(C + 1, C + 1, dtype=torch.float64))
        self.register_buffer("xy", torch.zeros(C + 1, dtype=torch.float64))

    def weight(self):
        """The solution w of (X'X + ridge) w = X'y [C + 1]. The last number is the bias, which is
        not shrunk."""
        strength = self.RIDGE * self.xx.diagonal()[:-1].mean()
        ridge = strength * torch.ones(len(self.xx), dtype=torch.float64)                # [C + 1]
        ridge[-1] = 0
        return torch.linalg.solve(self.xx + (ridge + 1e-9).diag(), self.xy).float()

    def values(self, sums):
        """Sums of the states before each token [B, R, C] -> values [B, R]."""
        weight = self.weight().to(sums.device)
        return sums @ weight[:-1] + weight[-1]

    def fit(self, sums, returns, mask):
        """Take in a rollout: sums of states [B, R, C], returns [B, R]."""
        x = F.pad(sums[mask], (0, 1), value=1.0).cpu().double()                     # [tokens, C+1]
        y = returns[mask].cpu().double()                                            # [tokens]
        self.xx = self.KEPT * self.xx + x.T @ x
        self.xy = self.KEPT * self.xy + x.T @ y


class Rollout(NamedTuple):
    """The episodes: JDs that the policy wrote for some CVs, and what is known of each token. (The
    update needs log pi and the advantages, for GRPO also log pi_ref; measure/trace.py shows all.)

    Rows are prompt + response, padded on the right. The responses are also kept apart, [B, R]."""
    ids: torch.Tensor                           # [B, T]
    prompt_lengths: torch.Tensor                # [B]
    tokens: torch.Tensor                        # [B, R] the response tokens
    mask: torch.Tensor                          # [B, R] True at real response tokens
    scores: torch.Tensor | None = None          # [B]
    logp: torch.Tensor | None = None            # [B, R] log pi, by the policy that wrote them
    ref_logp: torch.Tensor | None = None        # [B, R] log pi_ref
    rewards: torch.Tensor | None = None         # [B, R]
    values: torch.Tensor | None = None          # [B, R]
    advantages: torch.Tensor | None = None      # [B, R] as the update uses them: GAE's whitened

    def rows(self, keep):
        """These episodes alone."""
        return Rollout(*(x if x is None else x[keep] for x in self))

    def responses(self):
        """The token ids of each response, without pads."""
        return [row[real].tolist() for row, real in zip(self.tokens, self.mask)]


def make_rollout(prompts, responses, device):
    ids, _ = pad_right([p + r for p, r in zip(prompts, responses)])                 # [B, T]
    tokens, lengths = pad_right(responses)                                          # [B, R], [B]
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]                         # [B, R]
    prompt_lengths = torch.tensor([len(p) for p in prompts])                        # [B]
    return Rollout(*(x.to(device) for x in (ids, prompt_lengths, tokens, mask)))


def before_each_token(rollout):
    """[B, T], True one position before each response token: the state there predicts the token, and
    knows only the text before it."""
    positions = torch.arange(rollout.ids.shape[1], device=rollout.ids.device)       # [T]
    at = positions - rollout.prompt_lengths[:, None] + 1                            # [B, T]
    return (at >= 0) & (at < rollout.mask.sum(1)[:, None])


def to_rows(x, rollout):
    """Put numbers of the real response tokens, [tokens, ...], into the rows of the responses,
    [B, R, ...]; pads are 0."""
    rows = x.new_zeros(*rollout.mask.shape, *x.shape[1:])                           # [B, R, ...]
    rows[rollout.mask] = x
    return rows


def response_states(body, rollout):
    """Hidden states one position before each response token, [tokens, C], row after row."""
    return body(rollout.ids, asked=before_each_token(rollout))


def log_probs(lm, states, tokens, temperature):
    """log pi of the response tokens and the entropy of each prediction, both [tokens] and float32,
    from the states before the tokens [tokens, C]. Pads are left out: the logits cost the most."""
    logp = (lm.lm_head(states).float() / temperature).log_softmax(-1)               # [tokens, V]
    with torch.no_grad():       # it is only logged: a gradient would keep another [tokens, V]
        entropy = -(logp.exp() * logp).sum(-1)                                      # [tokens]
    return logp.gather(-1, tokens[:, None]).squeeze(-1), entropy


def evaluate_policy(lm, rollout, temperature):
    """log pi and entropy of each response token: [B, R] both."""
    states, tokens = response_states(lm.model, rollout), rollout.tokens[rollout.mask]
    logp, entropy = log_probs(lm, states, tokens, temperature)                      # [tokens] both
    return to_rows(logp, rollout), to_rows(entropy, rollout)


@torch.no_grad()
def score_responses(reward_model, rollout, eos, cut_off_score):
    """Scores [B]: U of each finished JD, the fixed penalty for one without end-of-text.
    Finished [B]: which JDs have their end-of-text.
    Sums [B, R, C], for the critic: of the states from the prompt's last token to the one before
    each response token."""
    rows = torch.arange(len(rollout.ids), device=rollout.ids.device)                # [B]
    lengths = rollout.mask.sum(1)                                                   # [B]
    hidden = reward_model.model(rollout.ids)                                        # [B, T, C]
    scores = reward_model.head(hidden[rows, rollout.prompt_lengths + lengths - 1])  # [B]
    if not scores.isfinite().all():
        raise BadInput("the reward model's scores are not finite: its training diverged (lower its "
                       "--lr), or its weights are damaged")
    finished = rollout.tokens[rows, lengths - 1] == eos                             # [B]
    scores = torch.where(finished, scores, torch.full_like(scores, cut_off_score))  # [B]
    states = hidden[before_each_token(rollout)].float()                             # [tokens, C]
    return scores, finished, to_rows(states, rollout).cumsum(1)


# ------------------------------------------------------------------------------- steps 1 to 3
def roll_out(policy, reference, reward_model, critic, prompts, codec, flags, beta, generator,
             device):
    """Write, score, and value; then the critic learns from the returns. Returns the Rollout and a
    log."""
    micro_batch = math.ceil(flags.minibatch / flags.accumulate)
    with autocast(device):
        responses = generate(policy, prompts, codec.max_jd, flags.temperature, generator=generator)
    rollout = make_rollout(prompts, responses, device)
    mask, parts = rollout.mask, []
    # Without the cache, exactly as the update computes it: so the first ratio is 1. In parts as
    # large as the update's micro-batches: these fit into memory, and take two thirds of the time
    # that one large part takes.
    for part in map(rollout.rows, torch.arange(len(prompts)).split(micro_batch)):
        with torch.no_grad(), autocast(device):
            logp, _ = evaluate_policy(policy, part, flags.temperature)
            ref_logp, _ = evaluate_policy(reference, part, flags.temperature)
            scored = score_responses(reward_model, part, codec.eos, flags.cut_off_score)
        parts.append((logp, ref_logp, *scored))
    logp, ref_logp, scores, finished, sums = map(torch.cat, zip(*parts))
    if finished.sum() > 1 and not scores[finished].std() > 1e-6:
        raise BadInput(f"ppo: the reward model gives all {int(finished.sum())} finished JDs of a "
                       f"rollout the same score, {scores[finished][0]:.3f}: nothing can be learned "
                       "from it; train it longer or on more decisions")

    kl = k1(logp, ref_logp) * mask                                                  # [B, R]
    # GRPO's price of the KL is in the loss, see minibatch_loss.
    price = 0.0 if flags.advantages == "grpo" else beta
    rewards = token_rewards(scores, kl, mask, price)                                # [B, R]
    values = critic.values(sums) * mask                                             # [B, R]
    advantages = gae(rewards, values, mask, flags.gamma, flags.lam)                 # [B, R]
    returns = returns_to_go(rewards, mask, flags.gamma)                             # [B, R]
    critic.fit(sums, returns, mask)     # for the next rollout: the values came from those before

    kl_per_text = kl.sum(1)                                                         # [B]
    log = {
        "reward": scores.mean(),
        "kl": kl_per_text.mean(),
        "total": rewards.sum(1).mean(),
        "kl_k3": (k3(logp, ref_logp) * mask).sum(1).mean(),
        "beta": beta,
        "kl_error": kl_per_text.std(unbiased=False) / math.sqrt(len(prompts)),
        "length": mask.sum(1).float().mean(),
        "eos_rate": finished.float().mean(),
        "explained_variance": explained_variance(values, advantages + values, mask)}
    log = {name: float(x) for name, x in log.items()}
    if not math.isfinite(sum(log.values())):
        raise NotFinite("the policy's log-probabilities or values are not finite")
    if flags.advantages == "gae":
        # Whitened over the rollout, not per minibatch: a minibatch's own mean would shift its
        # advantages.
        used = whiten(advantages, mask)                                             # [B, R]
    else:                                   # the critic only looks on, for the log
        totals = group_advantages(rewards.sum(1), flags.group, flags.advantages)    # [B]
        used = totals[:, None] * mask                                               # [B, R]
    return rollout._replace(scores=scores, logp=logp, ref_logp=ref_logp, rewards=rewards,
                            values=values, advantages=used), log


# ------------------------------------------------------------------------------------- step 4
def minibatches(n, size, generator):
    """One PPO epoch: the n episodes in random order, split into minibatches."""
    return torch.randperm(n, generator=generator).split(size)


def minibatch_loss(policy, part, flags, tokens_in_step):
    """The loss of some episodes of a rollout, and sums over their tokens for the log. The loss is
    divided by the tokens of the whole optimizer step, so that micro-batches add up to the gradient
    of the minibatch."""
    logp, entropy = evaluate_policy(policy, part, flags.temperature)                # [B, R] both
    # Clamped, so that exp cannot overflow.
    log_ratio = ((logp - part.logp) * part.mask).clamp(-20, 20)                     # [B, R]
    loss = policy_loss(log_ratio, part.advantages, flags.clip) * part.mask          # [B, R]
    if flags.advantages == "grpo":
        # Equation 3 of the GRPO paper; but here all tokens count the same, there all texts.
        loss = loss + flags.kl_coef * k3(logp, part.ref_logp) * part.mask           # [B, R]
    with torch.no_grad():
        ratio = log_ratio.exp()                                                     # [B, R]
        logged = {
            "approx_kl": 0.5 * log_ratio ** 2,
            "clip_frac": (ratio - 1).abs() > flags.clip,
            "entropy": entropy,
            "ratio_mean": ratio,
            "ratio_var": (ratio - 1) ** 2,
            "policy_loss": loss}
        sums = {name: float((x * part.mask).sum()) for name, x in logged.items()}
    return loss.sum() / tokens_in_step, sums


def update(policy, optimizer, rollout, flags, generator, device):
    """All PPO epochs over one rollout. Returns means over its tokens for the log."""
    totals = defaultdict(float)
    for _ in range(flags.ppo_epochs):
        for minibatch in minibatches(len(rollout.ids), flags.minibatch, generator):
            tokens_in_step = float(rollout.mask[minibatch].sum())
            for micro_batch in minibatch.chunk(flags.accumulate):
                part = rollout.rows(micro_batch)
                with autocast(device):
                    loss, sums = minibatch_loss(policy, part, flags, tokens_in_step)
                loss.backward()
                for name, value in sums.items():
                    totals[name] += value
            norm = nn.utils.clip_grad_norm_(policy.parameters(), flags.max_grad_norm)
            if not norm.isfinite():
                raise NotFinite("the gradient is not finite")
            optimizer.step()
            optimizer.zero_grad()
    tokens = flags.ppo_epochs * float(rollout.mask.sum())
    means = {name: total / tokens for name, total in totals.items()}
    # Var[r] = E[(r - 1)^2] - (E[r] - 1)^2: centring at 1 keeps the precision.
    means["ratio_var"] -= (means["ratio_mean"] - 1) ** 2
    return means


# ------------------------------------------------------------------------------------ the log
def kl_is_negative(rows):
    """Is the mean KL of the last five iterations more than 2 standard errors below 0? The KL of one
    rollout may be negative by chance, but a mean that low says that log-probabilities or masks are
    wrong. (While the policy hardly moves and its KL is near 0, one window in forty is that low by
    chance; more with groups of JDs for one CV, which are alike.)"""
    last = rows[-5:]
    mean = sum(row["kl"] for row in last) / 5
    error = math.sqrt(sum(row["kl_error"] ** 2 for row in last)) / 5
    return len(last) == 5 and mean < -2 * error


def report(stage, i, flags, log, cvs, texts):
    """One line per iteration, warnings; and a sample every 20 iterations and after the last."""
    truth = "" if log["true_match"] is None else f"  true {log['true_match']:.3f}"
    stage.say(f"ppo {i + 1:3d}/{flags.iterations}  reward {log['reward']:+.3f}  "
              f"kl {log['kl']:6.3f}{truth}  len {log['length']:5.1f}  eos {log['eos_rate']:.2f}  "
              f"clip {log['clip_frac']:.3f}  ent {log['entropy']:.3f}  "
              f"ev {log['explained_variance']:+.2f}  beta {log['beta']:.3f}")
    if log["length"] == 1:
        stage.say("ppo: every JD of this rollout is empty: end-of-text came first")
    if log["eos_rate"] == 0:
        stage.say("ppo: no JD in this rollout ended, so all got the same penalty and PPO learns "
                  "nothing; train stage 1 longer, raise its --max-jd, or begin with a model that "
                  "ends its texts")
    if log["kl_fault"]:
        stage.say("ppo: FAULT: the mean KL of the last 5 iterations is negative; "
                  "log-probabilities or masks disagree")
    if i % 20 == 0 or i + 1 == flags.iterations:
        stage.say(f"--- a sample\n{cvs[0]}\n->\n{texts[0]}\n---")


# ---------------------------------------------------------------------------- the whole stage
def prepare(policy, reward_model, flags):
    """The reference, the optimizer, and a critic that has seen nothing yet."""
    reference = copy_trainable(policy).eval().requires_grad_(False)
    reward_model.eval().requires_grad_(False)
    policy.model.checkpointing = flags.checkpointing
    trained = [p for p in policy.parameters() if p.requires_grad]
    # eps 1e-5 as in the original PPO code: with the default 1e-8, tiny second moments make the
    # first steps too large.
    optimizer = torch.optim.Adam(trained, lr=flags.lr, eps=1e-5)
    return reference, optimizer, Critic(reward_model.config.hidden_size)


def draw_cvs(cvs, flags, generator):
    """Random CVs for a rollout, one for each episode. For RLOO and GRPO each comes `group` times in
    a row."""
    copies = 1 if flags.advantages == "gae" else flags.group
    drawn = torch.randperm(len(cvs), generator=generator)[:flags.episodes // copies]
    return [cvs[k] for k in drawn for _ in range(copies)]


def learning_rate(i, flags):
    """The learning rate of iteration i, counted from 0."""
    return flags.lr * (1 - i / flags.iterations)


def kept_iterations(flags):
    """The iterations, counted from 0, before which the state is kept: the first and the last among
    them."""
    n = min(flags.keep, flags.iterations)
    return {round(k * (flags.iterations - 1) / max(n - 1, 1)) for k in range(n)}


def train(policy, reward_model, codec, cvs, flags, seed, stage, device, true_match=None):
    """Stage 3. `cvs`: the texts to write for. `true_match(cv, jd)`: a number that is logged and
    never used, or None. Returns the optimizer and the critic."""
    reference, optimizer, critic = prepare(policy, reward_model, flags)
    stage.total(flags.iterations)
    saved = stage.resume({"policy": policy, "critic": critic}, [optimizer])
    controller = KLController(saved.get("beta", flags.kl_coef), flags.kl_target, flags.kl_horizon)

    def new_rollout(chosen, when):
        prompts = [codec.prompt(cv) for cv in chosen]
        rng = generator(seed, "ppo-sample", when, device=device)
        return roll_out(policy, reference, reward_model, critic, prompts, codec, flags,
                        controller.beta, rng, device)
    if not saved and flags.advantages == "gae":     # samples of the SFT model, for the critic alone
        new_rollout(draw_cvs(cvs, flags, generator(seed, "ppo", "critic")), "critic")

    for i in range(stage.step, flags.iterations):
        if i in kept_iterations(flags):
            stage.keep(i + 1, beta=controller.beta)
        rng = generator(seed, "ppo", i)
        chosen = draw_cvs(cvs, flags, rng)
        optimizer.param_groups[0]["lr"] = learning_rate(i, flags)
        try:
            rollout, log = new_rollout(chosen, i)
            log |= update(policy, optimizer, rollout, flags, rng, device)
        except NotFinite:
            stage.not_finite(i + 1, chosen, "lower --lr or raise --kl-coef")
        controller.update(log["kl"], len(chosen))

        texts = [codec.text(response) for response in rollout.responses()]
        log["true_match"] = sum(map(true_match, chosen, texts)) / len(texts) if true_match else None
        log["kl_fault"] = kl_is_negative([*stage.rows, log])
        stage.log(iteration=i + 1, **log)
        report(stage, i, flags, log, chosen, texts)
        stage.checkpoint(i + 1, beta=controller.beta)
    return optimizer, critic


def load(folder, data, device):
    """The policy as it begins, the reward model, the codec, and the CVs to write for."""
    policy = load_model(need(folder, "sft"), LanguageModel, device)
    policy.config.keep_contacts = keeps_contacts(data)
    codec = load_codec(folder / "sft", policy.config)
    reward_model = load_model(need(folder, "reward"), RewardModel, device, share_base_with=policy)
    cvs = sorted({r.cv for r in read_half(data, "A")})
    if not cvs:
        raise BadInput("ppo: there is no CV to write for in half A of train.jsonl; give more "
                       "decisions")
    return policy, reward_model, codec, cvs


def run(stage, folder, data, flags, seed, device, true_match=None):
    """Load the models of stages 1 and 2, train, save. See train for `true_match`."""
    if flags.advantages != "gae" and flags.episodes % flags.group:
        raise BadInput(f"ppo: --episodes {flags.episodes} must be a multiple of --group "
                       f"{flags.group}: each CV of a rollout gets as many JDs")
    if flags.advantages != "gae" and flags.gamma != 1:
        raise BadInput(f"ppo: --gamma {flags.gamma:g} needs --advantages gae; rloo and grpo "
                       "compare whole texts, without a discount")
    if flags.advantages == "grpo" and flags.kl_target:
        raise BadInput("ppo: --kl-target steers a price that GRPO does not pay token by token; "
                       "leave it out, or choose other --advantages")
    policy, reward_model, codec, cvs = load(folder, data, device)
    _, critic = train(policy, reward_model, codec, cvs, flags, seed, stage, device, true_match)
    stage.check_lock()
    save_model(stage.folder, policy)
    save_tokenizer(stage.folder, codec)
    weight = critic.weight()                                                        # [C + 1]
    save_tensors(stage.folder / "value_head.safetensors",
                 {"weight": weight[None, :-1].contiguous(), "bias": weight[-1:].contiguous()})
    stage.finish(**stage.rows[-1])
