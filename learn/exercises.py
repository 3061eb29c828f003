"""The exercises: functions of GIRL to write anew, each with hand-made cases that say what is wrong.

In the modules everything is the original, but for the one function that is checked (see
learn/checker.py). So no exercise depends on another.
"""
import math
from typing import NamedTuple

import torch

import model
import ppo
import reward
import sft
from data import pad_right
from measure import recommend

EXERCISES = {}


class Wrong(Exception):
    """What is wrong, in a sentence."""


class Exercise(NamedTuple):
    name: str
    file: str
    function: str           # NAME, or CLASS.NAME
    lesson: int
    hints: tuple
    check: object           # check() raises Wrong


def exercise(name, file, function, lesson, *hints):
    """Add a check to the exercises."""
    def add(check):
        EXERCISES[name] = Exercise(name, file, function, lesson, hints, check)
        return check
    return add


def expect(found, wanted, sentence, tolerance=1e-4):
    """Raise Wrong with this sentence unless `found` is `wanted`; in the sentence, {found} and
    {wanted} are the first numbers that differ, and {at} says where: "row 2, token 5"."""
    found = torch.as_tensor(found, dtype=torch.float64)
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    if found.shape != wanted.shape:
        raise Wrong(f"the result has the shape {list(found.shape)}; it should have "
                    f"{list(wanted.shape)}")
    differ = ~((found - wanted).abs() <= tolerance)
    if differ.any():
        index = differ.nonzero()[0].tolist()
        at = ", ".join(f"{name} {i}" for name, i in zip(("row", "token", "number"), index))
        raise Wrong(sentence.format(at=at or "here", found=f"{found[tuple(index)]:.4g}",
                                    wanted=f"{wanted[tuple(index)]:.4g}"))


def tensor(*rows):
    return torch.tensor(rows)


# ------------------------------------------------------------------- lesson 1: the transformer
@exercise("rmsnorm", "model.py", "RMSNorm.forward", 1,
          "Divide x by its root mean square over the last dimension.",
          "The mean of the squares is x.pow(2).mean(-1, keepdim=True). Add self.eps before the "
          "root.",
          "Multiply by self.weight at the end. torch.rsqrt(y) is 1 / sqrt(y).")
def check_rmsnorm():
    norm = model.RMSNorm(2, 1e-5)
    rms = math.sqrt(12.5 + 1e-5)
    expect(norm(tensor([3.0, 4.0])), tensor([3 / rms, 4 / rms]),
           "[3, 4] has the root mean square sqrt((9 + 16) / 2) = 3.54, so {wanted} should come out "
           "at {at}, not {found}: RMSNorm divides by it, and subtracts no mean")
    norm.weight.data = tensor(1.0, 2.0)
    expect(norm(tensor([3.0, 4.0])), tensor([3 / rms, 8 / rms]),
           "with the gain [1, 2], {at} should be {wanted}, not {found}: multiply by self.weight")
    expect(norm(torch.zeros(1, 2)), torch.zeros(1, 2),
           "zeros should stay zeros; {found} came out: add self.eps under the root")


@exercise("rotate", "model.py", "rotate", 1,
          "Coordinate i is paired with coordinate i + D/2: x.chunk(2, dim=-1) gives both halves.",
          "A pair (a, b) turned by an angle is (a cos - b sin, b cos + a sin).",
          "cos and sin have D entries, the same in both halves: x * cos + (-b, a) * sin.")
def check_rotate():
    x = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])                                # [1, 1, 1, 4]
    cos, sin = torch.zeros(1, 4), torch.ones(1, 4)          # both pairs turn by 90 degrees
    found = model.rotate(x, cos, sin)[0, 0]
    if float(found[0, 1]) != 0:
        raise Wrong("coordinate 0 was paired with its neighbour 1; here it is paired with "
                    "coordinate D/2, in the Hugging Face order")
    expect(found, tensor([0.0, 0.0, 1.0, 0.0]),
           "(1, 0) turned by 90 degrees is (0, 1), so {wanted} should stand at {at}, not {found}: "
           "look at the sign of the sine")
    cos, sin = model.rotary_table(torch.tensor([5]), 4, 10000.0)
    x = torch.arange(4.0).view(1, 1, 1, 4)
    wanted = [-2 * math.sin(5), math.cos(0.05) - 3 * math.sin(0.05), 2 * math.cos(5),
              3 * math.cos(0.05) + math.sin(0.05)]
    expect(model.rotate(x, cos, sin)[0, 0, 0], wanted,
           "at position 5, [0, 1, 2, 3] should have {wanted} at {at}, not {found}")


def tiny_config(**more):
    return model.Config(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, **more)


@exercise("attention", "model.py", "Attention.forward", 1,
          "Queries [B, H, T, D]; keys and values [B, K, T, D]; each group of H/K query heads "
          "shares one key head. Turn queries and keys with `rotate`, not the values.",
          "With a cache: k, v = cache.append(k, v) after rotating; attention then sees all S "
          "tokens.",
          "The weights are softmax(q k' / sqrt(D)), with -inf where a token may not look; "
          "F.scaled_dot_product_attention does it. If `visible` is None, a token sees itself and "
          "all before it. Then join the heads and apply o_proj; with `asked`, only there.")
def check_attention():
    torch.manual_seed(0)
    c = tiny_config()
    layer, x = model.Attention(c), torch.randn(1, 4, 8)
    cos, sin = model.rotary_table(torch.arange(4), 4, 10000.0)
    with torch.no_grad():
        whole = layer(x, cos, sin, None, None)
        changed = layer(torch.cat((x[:, :3], -x[:, 3:]), 1), cos, sin, None, None)
        expect(changed[0, :3], whole[0, :3], "changing the last token changed the output of an "
               "earlier one ({at}): without `visible`, a token sees itself and those before it")
        expect(whole[0], attention_by_hand(layer, x[0], cos, sin),
               "{at} should be {wanted}, not {found}: compare softmax(q k' / sqrt(D)) v, "
               "with queries and keys rotated, head by head")
        cache = model.Cache(1, c, 4, "cpu", torch.float32)
        visible = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
        first = layer(x[:, :3], cos[:3], sin[:3], visible[..., :3, :3], cache)
        last = layer(x[:, 3:], cos[3:], sin[3:], visible[..., 3:, :], cache)
        expect(torch.cat((first, last), 1)[0], whole[0],
               "with a cache, {at} is {found}; read at once it is {wanted}: the new token must see "
               "the keys and values of all tokens so far, which cache.append returns")
        asked = tensor([False, True, False, True])
        expect(layer(x, cos, sin, None, None, asked), whole[asked],
               "with `asked`, the states of the asked tokens alone should come, [N, C]")


def attention_by_hand(layer, x, cos, sin):
    """One row, with loops: [T, C]."""
    def turn(y, t):
        a, b = y[:2], y[2:]
        c, s = cos[t, :2], sin[t, :2]
        return torch.cat((a * c - b * s, b * c + a * s))
    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(2):
            q = turn(layer.q_proj(x[t])[4 * h:4 * h + 4], t)
            scores = torch.stack([q @ turn(layer.k_proj(x[s]), s) / 2 for s in range(t + 1)])
            values = torch.stack([layer.v_proj(x[s]) for s in range(t + 1)])
            heads.append(scores.softmax(0) @ values)
        rows.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(rows)


@exercise("top_p", "model.py", "sample", 1,
          "Temperature 0 is argmax. Otherwise divide the logits by the temperature, then softmax.",
          "Sort the probabilities. A token stays if the sum of those *before* it is below top_p.",
          "Set the others to 0, undo the sorting, and draw from what is left, with the given "
          "generator; it need not be normalized for torch.multinomial.")
def check_top_p():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(20000, 1)

    def shares(*settings):
        drawn = model.sample(logits, *settings, torch.Generator().manual_seed(0))
        return torch.bincount(drawn, minlength=3) / len(drawn)
    expect(shares(0.0, 1.0), [1.0, 0.0, 0.0],
           "temperature 0 should always give the likeliest token")
    expect(shares(1.0, 1.0), [0.5, 0.3, 0.2],
           "drawn from (0.5, 0.3, 0.2), the share of a token is {found} instead of {wanted}", 0.02)
    expect(shares(0.5, 1.0), [0.658, 0.237, 0.105],
           "temperature 0.5 should make likely tokens likelier: a share is {found} instead of "
           "{wanted}; divide the logits by it", 0.02)
    expect(shares(1.0, 0.6), [0.625, 0.375, 0.0],
           "with top_p 0.6 the tokens of 0.5 and 0.3 stay: together they reach it, the first alone "
           "does not; a share is {found} instead of {wanted}", 0.02)
    expect(shares(1.0, 0.1), [1.0, 0.0, 0.0], "with a small top_p the likeliest token always stays")


# ---------------------------------------------------------------------------- lesson 2: SFT
@exercise("nll", "sft.py", "sft_loss", 2,
          "Pad the rows prompt + jd on the right. The state before a token predicts it.",
          "Only JD tokens count, the end-of-text included: those at positions from len(prompt) to "
          "the row's length.",
          "F.cross_entropy(logits, targets, reduction='sum'), and the number of targets. The "
          "reading loss needs the states *at* the JD tokens.")
def check_nll():
    torch.manual_seed(0)
    lm = model.LanguageModel(tiny_config()).eval()
    examples = [sft.Example([4, 5, 6], [7, 8, 1]), sft.Example([5], [9, 1])]
    with torch.no_grad():
        loss, n, reading = sft.sft_loss(lm, None, examples, torch.device("cpu"))
        wanted = prompts = shifted = 0.0
        for e in examples:
            logp = lm(torch.tensor([e.prompt + e.jd]))[0].log_softmax(-1)
            row = e.prompt + e.jd
            for t in range(1, len(row)):
                prompts -= float(logp[t - 1, row[t]])
            for t in range(len(e.prompt), len(row)):
                wanted -= float(logp[t - 1, row[t]])
                shifted -= float(logp[t, row[t]])
    if abs(float(loss) - shifted) < 1e-3:
        raise Wrong("the logits at a token were compared with the token itself; the state *before* "
                    "a token predicts it")
    if abs(float(loss) - prompts) < 1e-3:
        raise Wrong("the loss counts the tokens of the prompt, too; only the JD is learned")
    expect(n, 5, "the JDs have {wanted} tokens with their end-of-text, not {found}")
    expect(loss, wanted, "the sum of -log P over both JDs is {wanted}, not {found}", 1e-3)
    expect(reading, 0.0, "without a reader the reading loss is 0, not {found}")
    reader = torch.nn.Linear(8, 1)
    with torch.no_grad():
        _, _, reading = sft.sft_loss(lm, reader, examples, torch.device("cpu"))
        states = [lm.model(torch.tensor([e.prompt + e.jd]))[0, len(e.prompt):] for e in examples]
        by_hand = sft.reading_loss(reader, torch.cat(states), examples)
    expect(reading, by_hand, "the reading loss is {wanted}, not {found}: it needs the states at "
           "the JD's own tokens, row after row")


# ------------------------------------------------------------------- lesson 3: the reward model
@exercise("ranking_loss", "reward.py", "ranking_loss", 3,
          "It is small if the chosen score is well above the rejected one.",
          "-log sigmoid(chosen - rejected), averaged.",
          "F.logsigmoid does not overflow; log(sigmoid(x)) does.")
def check_ranking_loss():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0])
    wanted = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    reversed_loss = (math.log(1 + math.exp(2)) + math.log(2)) / 2
    found = reward.ranking_loss(chosen, rejected)
    if found.shape == () and abs(float(found) - reversed_loss) < 1e-4:
        raise Wrong("the loss falls when the *rejected* text scores higher: take chosen - rejected")
    expect(found, wanted, "scores (2, 0) against (0, 0) cost {wanted} on average, not {found}")
    huge = reward.ranking_loss(torch.tensor([-1000.0]), torch.tensor([0.0]))
    expect(huge, 1000.0, "a difference of -1000 costs 1000; {found} came out: take the logarithm "
           "of the sigmoid in one step")


@exercise("comparisons", "reward.py", "comparisons", 3,
          "Every accepted text of the group is compared with every rejected one.",
          "Two loops: over the accepted ones, and inside over the rejected ones.",
          "[(i, j) for i in chosen for j in rejected]")
def check_comparisons():
    found = [tuple(pair) for pair in reward.comparisons([True, False, True, False])]
    if sorted((j, i) for i, j in found) == [(0, 1), (0, 3), (2, 1), (2, 3)]:
        raise Wrong("the pairs are (rejected, accepted); the accepted one comes first")
    if len(found) != 4:
        raise Wrong(f"two accepted and two rejected texts make 4 comparisons, each with each; "
                    f"{len(found)} came out")
    if found != [(0, 1), (0, 3), (2, 1), (2, 3)]:
        raise Wrong(f"[True, False, True, False] should give (0, 1), (0, 3), (2, 1), (2, 3), not "
                    f"{found}")
    if list(reward.comparisons([True, True])):
        raise Wrong("without a rejected text there is no comparison")


@exercise("last_token", "model.py", "RewardModel.forward", 3,
          "Rows are padded on the right: the last real token is at lengths - 1.",
          "self.model(ids, asked=mask) gives the states at the True places of a mask [B, T].",
          "Then self.head gives the scores, already centred.")
def check_last_token():
    torch.manual_seed(0)
    scorer = model.RewardModel(tiny_config(), center=0.5).eval()
    rows = [[4, 5, 6, 7], [8, 9]]
    ids, lengths = pad_right(rows)
    with torch.no_grad():
        alone = [float(scorer.head(scorer.model(torch.tensor([row]))[0, -1])) for row in rows]
        found = scorer(ids, lengths)
        at_pad = [float(x) for x in scorer.head(scorer.model(ids)[:, -1])]
    if found.shape == (2,) and torch.allclose(found, torch.tensor(at_pad), atol=1e-5):
        raise Wrong("the score is read at the last column; row 1 ends in pads there: read it at "
                    "lengths - 1")
    if found.shape == (2,) and torch.allclose(found, torch.tensor(alone) + 0.5, atol=1e-5):
        raise Wrong("the scores are 0.5 too high, which is self.center: use self.head")
    expect(found, alone, "{at} alone, without pads, has the score {wanted}, not {found}")


@exercise("auc", "reward.py", "auc", 3,
          "Over all pairs of an accepted and a rejected decision: how often is the accepted one "
          "higher?",
          "Equal scores count half.",
          "None if there is no accepted, or no rejected decision. With numpy arrays (labels of "
          "type bool), all pairs at once: scores[labels][:, None] - scores[~labels].")
def check_auc():
    expect(reward.auc([3.0, 1.0, 2.0], [True, False, False]), 1.0,
           "the accepted one is above both others, so the AUC is 1, not {found}")
    expect(reward.auc([2.0, 3.0, 1.0, 0.0], [True, False, True, False]), 0.5,
           "(2, 1) accepted against (3, 0) rejected: two of four pairs are right, {wanted}, not "
           "{found}")
    expect(reward.auc([1.0, 1.0, 0.0], [True, False, False]), 0.75,
           "a tie counts half: one right and one tie of two pairs make {wanted}, not {found}")
    if reward.auc([1.0, 2.0], [True, True]) is not None:
        raise Wrong("without a rejected decision there is nothing to compare: return None")


# ---------------------------------------------------------- lesson 4: rollout, rewards, critic
MASK = torch.tensor([[True, True, True], [True, True, False]])


@exercise("k3", "ppo.py", "k3", 4,
          "With d = log pi - log pi_ref: exp(-d) - 1 + d.",
          "exp(-d) is pi_ref / pi, whose mean over samples of pi is 1.",
          "Its mean is then that of d, and it is never negative, because e^x >= 1 + x.")
def check_k3():
    found = ppo.k3(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]))
    expect(ppo.k3(torch.tensor(-2.0), torch.tensor(-2.0)), 0.0,
           "equal probabilities have no KL, not {found}")
    if torch.allclose(found, torch.tensor([math.e - 2, 1 / math.e]), atol=1e-4):
        raise Wrong("that is exp(d) - 1 - d: its mean under pi is not the KL; the ratio must be "
                    "pi_ref / pi = exp(-d)")
    expect(found, [math.exp(-1), math.exp(1) - 2],
           "for d = 1 and d = -1, {wanted} should come out at {at}, not {found}")


@exercise("token_rewards", "ppo.py", "token_rewards", 4,
          "Every real token costs beta * KL; the score is paid once, at the last real token.",
          "The last real token of a row is at mask.sum(1) - 1.",
          "rewards = -beta * kl * mask; then rewards[rows, last] += scores.")
def check_token_rewards():
    kl = torch.tensor([[0.5, -0.5, 1.0], [2.0, 1.0, 9.0]])
    found = ppo.token_rewards(torch.tensor([1.0, -2.0]), kl, MASK, 0.1)
    wanted = torch.tensor([[-0.05, 0.05, 0.9], [-0.2, -2.1, 0.0]])
    if found.shape == wanted.shape:
        if torch.allclose(found[0], torch.tensor([0.05, -0.05, 1.1]), atol=1e-5):
            raise Wrong("the KL is paid with the wrong sign: a token that the policy likes more "
                        "than the reference must get -beta * KL, which is below 0")
        if abs(float(found[1, 2]) + 2) < 1 or abs(float(found[1, 1]) + 0.1) < 1e-5:
            raise Wrong("row 1 has two real tokens, so its score belongs to token 1, not to the "
                        "pad at the end")
    expect(found, wanted, "{at} should get {wanted}, not {found}")


@exercise("gae", "ppo.py", "gae", 4,
          "Go backwards: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}.",
          "After the last real token, V and A are 0.",
          "Rows have different lengths: values at pads must not count, nor advantages there; "
          "multiply both by the mask.")
def check_gae():
    zeros = torch.zeros(1, 2)
    alone = ppo.gae(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.7]]),
                      torch.tensor([[True, False]]), 1.0, 0.95)
    if alone.shape == (1, 2) and abs(float(alone[0, 0]) - 1.45) < 1e-5:
        raise Wrong("the value after the end must be 0: row 0, token 1 is a pad, and its value of "
                    "0.7 was counted")
    expect(alone, [[0.75, 0.0]], "a single token with reward 1 and value 0.25 has the advantage "
           "0.75, and the pad after it 0; {at} is {found}")
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    values = torch.tensor([[0.5, 0.25, 0.5], [0.5, 0.5, 0.0]])
    found = ppo.gae(rewards, values, MASK, 1.0, 0.0)
    expect(found, [[-0.25, 0.25, 0.5], [0.0, 0.5, 0.0]],
           "with lambda 0 an advantage is delta = r + gamma V' - V: {at} is {wanted}, not {found}")
    expect(ppo.gae(rewards, values, MASK, 1.0, 1.0), [[0.5, 0.75, 0.5], [0.5, 0.5, 0.0]],
           "with lambda 1 and gamma 1 it is the return minus the value: {at} is {wanted}, not "
           "{found}")
    expect(ppo.gae(rewards, values, MASK, 0.5, 0.8)[0], [-0.295, 0.2, 0.5],
           "with gamma 0.5 and lambda 0.8, {at} is {wanted}, not {found}: A_t = delta_t + "
           "gamma lam A_t+1")
    expect(ppo.gae(zeros, zeros, torch.ones(1, 2) > 0, 1.0, 1.0), zeros, "nothing gives nothing")


@exercise("critic", "ppo.py", "Critic.weight", 4,
          "self.xx is X'X and self.xy is X'y; the last feature is the 1 of the bias.",
          "Ridge regression: solve (X'X + ridge on the diagonal) w = X'y. The ridge is self.RIDGE "
          "times the mean diagonal entry of X'X, without that of the bias.",
          "torch.linalg.solve; the bias is not shrunk; add a tiny number, so that an empty X'X can "
          "be solved; return float32.")
def check_critic():
    critic = ppo.Critic(1)
    expect(critic.weight(), [0.0, 0.0], "a critic that has seen nothing says 0, not {found}")
    states = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])
    returns = torch.tensor([[5.0, 7.0, 9.0, 11.0]])        # 2 x + 5
    critic.fit(states, returns, torch.ones(1, 4) > 0)
    exact = 10 / (5 + 0.14)                                # centred: X'y 10, X'X 5, ridge 0.14
    found = critic.weight()
    if found.shape == (2,) and abs(float(found[0]) - 2) < 1e-4:
        raise Wrong("that is least squares without a ridge: add self.RIDGE * the mean diagonal of "
                    "X'X, here 0.14, to the diagonal")
    if found.shape == (2,) and abs(float(found[0]) - 48.12 / 22.5396) < 1e-3:
        raise Wrong("the bias was shrunk, too: the ridge belongs to the weights alone")
    expect(found[:1], [exact], "for the returns 2x + 5 at x = 0, 1, 2, 3 the slope is {wanted}, a "
           "little below 2, not {found}")
    expect(found[1:], [8 - 1.5 * exact], "the bias is {wanted}, not {found}")


# ------------------------------------------------------------------ lesson 5: the update of PPO
@exercise("whiten", "ppo.py", "whiten", 5,
          "Subtract the mean and divide by the standard deviation, both over the real tokens.",
          "masked_mean(x, mask) is the mean over real tokens.",
          "Pads are 0 afterwards: multiply by the mask at the end.")
def check_whiten():
    x = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 50.0]])
    found = ppo.whiten(x, MASK)
    std = math.sqrt(0.4)
    wanted = torch.tensor([[-1 / std, 0.0, 1 / std], [0.0, 0.0, 0.0]])
    if found.shape == wanted.shape:
        if abs(float(found[1, 2])) > 1e-6:
            raise Wrong("the pad at row 1, token 2 should be 0 afterwards")
        if torch.allclose(found, wanted + 2 * MASK, atol=1e-3):
            raise Wrong("the mean was added back: advantages must be above and below 0")
        if abs(float(found[0, 1])) > 1e-3:
            raise Wrong("the mean of the real tokens (1, 2, 3, 2, 2) is 2, so row 0, token 1 "
                        f"becomes 0, not {float(found[0, 1]):.3f}: the 50 at a pad must not count")
    expect(found, wanted, "{at} should be {wanted}, not {found}: the variance of the real tokens "
           "is 0.4", 1e-3)


@exercise("policy_loss", "ppo.py", "policy_loss", 5,
          "The ratio is exp(log_ratio). PPO maximizes min(A r, A clip(r)); a loss is minimized.",
          "So the loss is max(-A r, -A clip(r, 1 - eps, 1 + eps)), for each token.",
          "torch.max of two tensors takes the larger one at each place.")
def check_policy_loss():
    log_ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log()
    found = ppo.policy_loss(log_ratio, torch.tensor([[1.0, 1.0, -1.0, -1.0]]), 0.2)
    if found.shape == (1, 4):
        if torch.allclose(found, torch.tensor([[-1.2, -0.8, 1.2, 0.8]]), atol=1e-5):
            raise Wrong("the ratio is always clipped: then a bad token that became likelier (A "
                        "-1, ratio 1.5) gets no gradient; take the larger of the two losses")
        if torch.allclose(found, torch.tensor([[-1.5, -0.8, 1.2, 0.5]]), atol=1e-5):
            raise Wrong("that is the smaller of the two losses: it pays to leave the clip range; "
                        "take the larger one")
    expect(found, [[-1.2, -0.5, 1.5, 0.8]],
           "ratios 1.5, 0.5, 1.5, 0.5 with advantages 1, 1, -1, -1: {at} costs {wanted}, not "
           "{found}")


@exercise("kl_controller", "ppo.py", "KLController.update", 5,
          "beta rises when the KL is above its target, and falls when it is below.",
          "The relative error kl / target - 1 is clipped to -0.2 .. 0.2.",
          "beta *= 1 + error * episodes / horizon; with target 0, beta stays.")
def check_kl_controller():
    def after(kl, target=2.0):
        controller = ppo.KLController(0.1, target, 100)
        controller.update(kl, 50)
        return controller.beta
    expect(after(2.2), 0.1 * 1.05, "a KL of 2.2, 10% above its target, with 50 of 100 episodes: "
           "beta becomes {wanted}, not {found}", 1e-6)
    expect(after(20.0), 0.1 * 1.1, "the error is clipped at 0.2: beta becomes {wanted}, not "
           "{found}", 1e-6)
    expect(after(1.0), 0.1 * 0.9, "below the target beta falls to {wanted}; it is {found}", 1e-6)
    expect(after(20.0, target=0.0), 0.1, "with target 0 beta stays fixed; it is {found}", 1e-6)


@exercise("explained_variance", "ppo.py", "explained_variance", 5,
          "1 - variance of the errors / variance of the targets, over real tokens.",
          "A variance is the masked mean of (x - masked mean)^2.",
          "Keep the denominator from being 0: .clamp(min=1e-8).")
def check_explained_variance():
    targets = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 70.0]])
    ev = ppo.explained_variance
    expect(ev(targets, targets, MASK), 1.0, "a perfect critic explains all, 1, not {found}")
    expect(ev(torch.full_like(targets, 9.0), targets, MASK), 0.0,
           "a critic that says 9 everywhere explains nothing, 0, not {found}: its mean error does "
           "not count, the variance does")
    halved = torch.tensor([[1.5, 2.0, 2.5], [2.0, 2.0, 0.0]])
    expect(ev(halved, targets, MASK), 0.75, "half of each deviation explains {wanted}, not "
           "{found}; pads do not count")


# ----------------------------------------------- lesson 6: adapters; lesson 7: what it is worth
@exercise("lora", "model.py", "LoRALinear.forward", 6,
          "W x + alpha / r * B A x: the frozen layer plus the product of rank r.",
          "self.scale is alpha / r; lora_A goes from x to r numbers, lora_B back.",
          "self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))")
def check_lora():
    base = torch.nn.Linear(2, 2, bias=False)
    base.weight.data = torch.eye(2)
    layer = model.LoRALinear(base, 1, 4.0)
    layer.lora_A.weight.data = torch.tensor([[1.0, 1.0]])
    x = torch.tensor([[1.0, 2.0]])
    with torch.no_grad():
        expect(layer(x), x, "B starts at 0, so the layer starts as its base: {at} should be "
               "{wanted}, not {found}")
        layer.lora_B.weight.data = torch.tensor([[1.0], [0.0]])
        found = layer(x)
    if found.shape == (1, 2) and abs(float(found[0, 0]) - 4) < 1e-5:
        raise Wrong("the adapter's part is not scaled: multiply it by alpha / r, here 4")
    expect(found, [[13.0, 2.0]], "{at} should be {wanted}, not {found}")


@exercise("ndcg", "measure/recommend.py", "ranking_figures", 7,
          "HR@k (hit rate): 1 if a relevant one is among the first k, else 0. The reciprocal rank: "
          "1 / rank of the first.",
          "DCG@10: the sum of 1 / log2(rank + 1) over relevant ones among the first ten.",
          "NDCG divides it by the DCG of the best order: all relevant ones first, at most ten.")
def check_ndcg():
    found = recommend.ranking_figures([False, True, False, True] + [False] * 8)
    expect(found["mrr"], 0.5, "the first relevant one has rank 2, so the reciprocal rank is 0.5, "
           "not {found}")
    expect([found["hr_1"], found["hr_5"]], [0.0, 1.0],
           "there is none at rank 1, and one among the first five: {at} is {found}")
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    expect(found["ndcg_10"], gain / (1 + 1 / math.log2(3)),
           "ranks 2 and 4 give a DCG of 1/log2(3) + 1/log2(5), the best order 1 + 1/log2(3): NDCG "
           "is {wanted}, not {found}")
    perfect = recommend.ranking_figures([True] * 3 + [False] * 9)
    expect(perfect["ndcg_10"], 1.0, "the best order has NDCG 1, not {found}")
