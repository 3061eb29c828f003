"""What a correct PPO satisfies, statement by statement (04 to 08, on the reward model, are in
test_reward.py).

Each piece of mathematics is tested against another way to its answer: a loop over single tokens, an
exact sum, a model that sees one row at a time without padding or cache."""
import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
import ppo
from conftest import CVS, NotedCritic
from data import pad_right
from model import LanguageModel, RewardModel, generate
from ppo import PPOFlags
from plumbing.files import BadInput
from plumbing.stage import generator

CPU = torch.device("cpu")
EOS = 1


# ------------------------------------------------------------------------------------------ helpers
def equal(a, b, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=tolerance,
                               rtol=tolerance)


def roll(policy, reference, reward_model, prompts, codec, beta=0.05, critic=None, draw=0, **flags):
    """A rollout, its responses, and its log."""
    critic = critic or ppo.Critic(reward_model.config.hidden_size)
    e, log = ppo.roll_out(policy, reference, reward_model, critic, prompts, codec,
                          PPOFlags(**flags), beta, generator(draw), CPU)
    return e, [tokens[mask].tolist() for tokens, mask in zip(e.tokens, e.mask)], log


def drift(e):
    """Pretend that the policy has moved since the rollout: other log-probabilities and
    advantages."""
    torch.manual_seed(4)
    logp, advantages = (x + 0.3 * torch.randn_like(x) for x in (e.logp, e.advantages))
    return e._replace(logp=logp, advantages=advantages)


def mean(xs):
    return sum(xs) / len(xs)


def real_tokens(e):
    """(row, step) of every real response token."""
    return [(b, t) for b in range(len(e.mask)) for t in range(e.mask.shape[1]) if e.mask[b, t]]


def snapshot(module):
    return {name: p.clone() for name, p in module.state_dict().items()}


def train(policy, reward_model, codec, stage, cvs=CVS, seed=0, true_match=None, **flags):
    """All of stage 3."""
    flags = PPOFlags(**flags)
    return ppo.train(policy, reward_model, codec, cvs, flags, seed, stage, CPU, true_match)


def ref_log_probs(reference, e):
    with torch.no_grad():
        return ppo.evaluate_policy(reference, e, 1.0)[0]


def scores_by_hand(reward_model, prompts, responses, cut_off=PPOFlags().cut_off_score):
    """Each text alone: its score, or the penalty where it did not end."""
    def score(row):
        return reward_model(torch.tensor([row]), torch.tensor([len(row)])).item()
    return [score(p + r) if r[-1] == EOS else cut_off for p, r in zip(prompts, responses)]


def sgd(policy, lr=0.0):
    """Plain steps: what the parameters move by is the gradient."""
    return torch.optim.SGD(policy.parameters(), lr=lr)


def spy(monkeypatch, owner, name, look):
    """Let `look(result, *args)` see every call of owner.name."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        look(result, *args)
        return result
    monkeypatch.setattr(owner, name, wrapped)


# ------------------------------------------------------------------------- tokens: masks, positions
def test_01_masks_come_from_lengths_not_ids():
    """A pad id, or an end-of-text, that a text really contains is a real token."""
    e = ppo.make_rollout([[2, 5, 4], [2, 4]], [[7, 0, EOS], [0, 0, 8, 0, 0]], CPU)
    assert e.mask.tolist() == [[True, True, True, False, False], [True, True, True, True, True]]


def test_01_generate_hides_no_end_of_text_where_pad_is_end_of_text(config, monkeypatch):
    torch.manual_seed(0)
    lm = LanguageModel(replace(config, pad_token_id=EOS))
    # The first is padded with three end-of-text on the left.
    prompts = [[EOS, 5, EOS, 6], [2, 5, 6, 7, 8, 9, 4]]
    seen = []
    spy(monkeypatch, model, "sample", lambda token, logits, *rest: seen.append(logits))
    generate(lm, prompts, max_new=1)
    for b, prompt in enumerate(prompts):
        equal(seen[0][b], lm(torch.tensor([prompt]))[0, -1].detach())


def test_02_prompts_are_left_padded_and_positions_are_the_same_in_rollout_and_update(
        config, monkeypatch):
    lm = LanguageModel(replace(config, eos_token_id=99))    # never ends: all rows stay in the batch
    prompts = [[5, 6], [5, 6, 7, 8, 9]]
    positions, inputs = [], []
    spy(monkeypatch, model, "rotary_table", lambda table, at, *rest: positions.append(at))
    lm.model.embed_tokens.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    responses = generate(lm, prompts, max_new=3, generator=generator(0))
    in_rollout = torch.cat([p.squeeze(1) for p in positions], dim=1)        # [B, P + max_new - 1]
    assert inputs[0].tolist() == [[0, 0, 0, 5, 6], [5, 6, 7, 8, 9]]
    assert in_rollout.tolist() == [[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]

    positions.clear(), inputs.clear()
    ppo.response_states(lm.model, ppo.make_rollout(prompts, responses, CPU))
    in_update = positions[0].expand_as(inputs[0])
    assert inputs[0].tolist() == [prompts[0] + responses[0] + [0, 0, 0], prompts[1] + responses[1]]
    # The same tokens: two of the prompt, and the answer but its last token.
    assert in_update[0, :4].tolist() == in_rollout[0, 3:].tolist()
    assert in_update[1, :7].tolist() == in_rollout[1].tolist()


def test_03_more_padding_on_either_side_changes_no_logits(policy):
    row, n = [2, 3, 5, 9, 4, 3, 8], 7
    with torch.no_grad():
        alone = policy(torch.tensor([row]))[0]                                            # [n, V]
        for pads in (1, 6):
            mask = torch.tensor([[False] * pads + [True] * n])
            equal(policy(torch.tensor([[0] * pads + row]), mask)[0, pads:], alone)
            equal(policy(torch.tensor([row + [0] * pads]))[0, :n], alone)
            equal(policy(torch.tensor([row + [0] * pads]), mask.flip(1))[0, :n], alone)


# ------------------------------------------------------------------------------------------ rollout
def test_09_no_dropout_anywhere(policy, reward_model, prompts):
    e = ppo.make_rollout(prompts, [[8, 9, EOS]] * len(prompts), CPU)
    ids, lengths = pad_right(prompts)
    for m in (policy.train(), reward_model.train()):    # reference and policy are the same class
        assert not any("dropout" in type(part).__name__.lower() for part in m.modules())
    for a, b in zip(ppo.evaluate_policy(policy, e, 1.0), ppo.evaluate_policy(policy, e, 1.0)):
        assert torch.equal(a, b)
    assert torch.equal(reward_model(ids, lengths), reward_model(ids, lengths))


def test_10_rollout_samples_the_full_distribution(policy, reference, reward_model, prompts, codec):
    """Some tokens lie outside the nucleus that holds 80 % of the probability; about one in five
    should."""
    e, _, _ = roll(policy, reference, reward_model, prompts * 4, codec)
    with torch.no_grad():
        logits = policy.lm_head(ppo.response_states(policy.model, e))               # [tokens, V]
        probs = ppo.to_rows(logits.softmax(-1), e)                                  # [B, R, V]
    own = probs.gather(-1, e.tokens[..., None])                                     # [B, R, 1]
    more_likely = (probs * (probs > own)).sum(-1)       # probability of all tokens before this one
    outside = float(((more_likely >= 0.8) & e.mask).sum() / e.mask.sum())
    assert 0.05 < outside < 0.3


def test_10_rollout_asks_for_the_full_distribution_at_its_temperature(
        policy, reference, reward_model, prompts, codec, monkeypatch):
    asked = set()
    spy(monkeypatch, model, "sample",
        lambda token, logits, temperature, top_p, draw: asked.add((temperature, top_p)))
    roll(policy, reference, reward_model, prompts, codec, temperature=0.7)
    assert asked == {(0.7, 1.0)}


def test_11_temperature_divides_the_logits_of_rollout_reference_and_update(
        policy, reference, reward_model, prompts, codec):
    T = 0.6
    e, responses, log = roll(policy, reference, reward_model, prompts, codec, temperature=T)

    def by_hand(lm, b):
        logits = lm(torch.tensor([prompts[b] + responses[b]]))[0, len(prompts[b]) - 1:-1]   # [R, V]
        return (logits / T).log_softmax(-1)[torch.arange(len(responses[b])), responses[b]].detach()
    kl = [by_hand(policy, b).sum() - by_hand(reference, b).sum() for b in range(len(prompts))]
    for b, response in enumerate(responses):
        equal(e.logp[b, :len(response)], by_hand(policy, b))
    assert log["kl"] == pytest.approx(float(sum(kl)) / len(kl), abs=1e-4)
    _, sums = ppo.minibatch_loss(policy, e, PPOFlags(temperature=T), 1)
    assert sums["approx_kl"] == pytest.approx(0, abs=1e-8)


def test_11_temperature_divides_the_logits_that_are_sampled(policy, reference, reward_model,
                                                            prompts, codec):
    """Nearly 0, the rollout is the greedy answer, which takes the most likely token."""
    _, responses, _ = roll(policy, reference, reward_model, prompts, codec, temperature=1e-4)
    assert responses == generate(policy, prompts, codec.max_jd, temperature=0)


def test_12_logits_and_values_stand_one_position_before_each_response_token(
        policy, reference, reward_model, critic, prompts, codec):
    weight = critic.weight()
    e, responses, _ = roll(policy, reference, reward_model, prompts, codec, critic=critic)
    for b, t in real_tokens(e):
        so_far = torch.tensor([prompts[b] + responses[b][:t]])      # no model sees the token itself
        logp = policy.lm_head(policy.model(so_far)[0, -1]).log_softmax(-1)
        equal(e.logp[b, t], logp[responses[b][t]])
        total = reward_model.model(so_far)[0, len(prompts[b]) - 1:].sum(0)                   # [C]
        equal(critic.states[b, t], total)
        equal(critic.said[b, t], total @ weight[:-1] + weight[-1])


def test_12_a_value_depends_on_no_later_token(reward_model, critic):
    """Three tokens are alike, then the texts differ; one is longer, and one of them ends."""
    prompts = [[2, 5, 4]] * 3
    e = ppo.make_rollout(prompts, [[8, 9, 8, 9, EOS], [8, 9, 8, 6, 7, 6, 7], [8, 9, 8, EOS]], CPU)
    _, _, states = ppo.score_responses(reward_model, e, EOS, -3.0)
    values = critic.values(states)
    for other in (1, 2):
        equal(values[0, :4], values[other, :4])    # the fourth stands before the token that differs
    assert abs(values[0, 4] - values[1, 4]) > 1e-3
    assert len(set(values[0, :4].tolist())) == 4


def test_13_after_the_first_end_of_text_all_is_pad_and_masked(policy, reference, reward_model,
                                                              prompts, codec):
    e, responses, _ = roll(policy, reference, reward_model, prompts, codec)
    ended = [r for r in responses if EOS in r]
    assert 0 < len(ended) < len(responses)                  # both kinds are in this rollout
    assert all(r.index(EOS) == len(r) - 1 for r in ended)
    for b, (prompt, response) in enumerate(zip(prompts, responses)):
        n, R = len(response), e.mask.shape[1]
        assert e.mask[b].tolist() == [True] * n + [False] * (R - n)
        assert e.tokens[b].tolist() == response + [0] * (R - n)
        assert e.ids[b, len(prompt) + n:].eq(0).all()


def test_13_what_stands_in_pads_changes_no_loss_and_no_mean(policy, reference, reward_model,
                                                            prompts, codec):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    e = drift(e)
    loss, sums = ppo.minibatch_loss(policy, e, PPOFlags(), 10)
    other = e._replace(tokens=e.tokens.where(e.mask, torch.tensor(9)),
                       logp=e.logp.where(e.mask, torch.tensor(7.0)),
                       advantages=e.advantages.where(e.mask, torch.tensor(7.0)))
    again, sums_again = ppo.minibatch_loss(policy, other, PPOFlags(), 10)
    equal(loss.detach(), again.detach())
    assert sums == pytest.approx(sums_again)
    x = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    assert ppo.masked_mean(x, x < 50) == 3.0


def test_14_a_cut_off_response_gets_the_penalty_instead_of_its_score(reward_model):
    prompts, responses = [[2, 5, 4]] * 3, [[8, 9, EOS], [8, 9, 8, 9], [EOS]]
    e = ppo.make_rollout(prompts, responses, CPU)
    scores, ended, _ = ppo.score_responses(reward_model, e, EOS, cut_off_score=-3.0)
    assert ended.tolist() == [True, False, True] and scores[1] == -3.0
    for b in (0, 2):
        row = prompts[b] + responses[b]
        equal(scores[b], reward_model(torch.tensor([row]), torch.tensor([len(row)]))[0])


def test_14_the_penalty_is_the_one_that_the_flags_name(
        policy, reference, reward_model, prompts, codec):
    _, responses, log = roll(policy, reference, reward_model, prompts, codec, cut_off_score=-7.0)
    by_hand = scores_by_hand(reward_model, prompts, responses, -7.0)
    assert log["reward"] == pytest.approx(mean(by_hand), abs=1e-5)
    assert 0 < by_hand.count(-7.0) < len(by_hand)


def test_15_reference_and_reward_model_are_bit_identical_before_and_after(
        policy, reward_model, codec, stage, monkeypatch):
    references = []
    spy(monkeypatch, ppo, "roll_out",
        lambda result, policy, reference, *rest: references.append(reference))
    start, reward_start = snapshot(policy), snapshot(reward_model)
    ppo.train(policy, reward_model, codec, CVS, PPOFlags(iterations=3, episodes=8, minibatch=4),
              0, stage, CPU)

    assert len(references) == 4 and all(r is references[0] for r in references)
    assert all(torch.equal(p, start[name]) for name, p in references[0].state_dict().items())
    assert all(torch.equal(p, reward_start[name]) for name, p in reward_model.state_dict().items())
    # The policy did learn.
    assert all(not torch.equal(p, start[name]) for name, p in policy.state_dict().items())


# --------------------------------------------------------------------------- rewards and advantages
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()                      # [B, R]


def random_rows(*names):
    """One [B, R] tensor per name, with garbage in the pads."""
    draw = generator(0, *names)
    return [torch.randn(MASK.shape, generator=draw) + 50 * ~MASK for _ in names]


def test_16_token_reward_by_hand():
    kl = torch.tensor([[0.5, -1.0, 2.0], [3.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = ppo.token_rewards(torch.tensor([10.0, 20.0]), kl, mask, beta=0.1)
    equal(rewards, [[-0.05, 0.1, -0.2 + 10], [-0.3 + 20, 0, 0]])


def test_16_token_rewards_add_up_to_score_minus_beta_kl():
    scores, (kl,) = torch.tensor([1.0, -2.0, 0.5]), random_rows("kl")
    rewards = ppo.token_rewards(scores, kl, MASK, beta=0.3)
    equal(rewards.sum(1), [scores[b] - 0.3 * kl[b][MASK[b]].sum() for b in range(3)])


def test_17_the_score_lies_inside_the_masks_of_value_return_and_advantage(policy):
    prompts, responses = [[2, 5, 4], [2, 4]], [[8, EOS], [8, 9, 8, EOS]]
    e = ppo.make_rollout(prompts, responses, CPU)
    zeros = torch.zeros(e.mask.shape)
    rewards = ppo.token_rewards(torch.tensor([1.0, 1.0]), zeros, e.mask, beta=0.0)
    advantages = ppo.gae(rewards, zeros, e.mask, 1.0, 0.95)
    returns = ppo.returns_to_go(rewards, e.mask, 1.0)
    only_last = zeros.clone()
    for b, t in [(0, 1), (1, 3)]:                           # where end-of-text stands
        assert e.tokens[b, t] == EOS and e.mask[b, t]
        assert rewards[b, t] == advantages[b, t] == returns[b, t] == 1
        only_last[b, t] = 1.0
    # A value there is what the advantage is measured from.
    equal(ppo.gae(rewards, 0.25 * only_last, e.mask, 1.0, 0.0)[only_last > 0], [0.75, 0.75])

    # The update learns from it: a change of only that position's advantage changes the loss.
    e = e._replace(logp=ppo.evaluate_policy(policy, e, 1.0)[0].detach())
    for advantages, loss in ((zeros, 0), (only_last, -2 / 6)):
        found, _ = ppo.minibatch_loss(policy, e._replace(advantages=advantages), PPOFlags(), 6)
        assert found.item() == pytest.approx(loss)


def test_17_the_critic_is_fitted_also_where_the_score_stands():
    """Only the state before end-of-text tells a good text from a bad one."""
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, False]])
    states, returns = torch.zeros(4, 2, 1), torch.zeros(4, 2)
    for b, t, score in ((0, 1, 2.0), (1, 1, -2.0), (2, 0, 2.0), (3, 0, -2.0)):
        states[b, t], returns[b, t] = score, score
    critic = ppo.Critic(1)
    critic.fit(states, returns, mask)
    equal(critic.values(states), returns, 1e-2)


def test_18_k1_and_k3_average_to_the_exact_kl():
    """On a distribution over six tokens the mean over samples is a sum of six terms."""
    torch.manual_seed(0)
    p, q = torch.randn(6).softmax(0), torch.randn(6).softmax(0)
    exact = sum(float(a) * math.log(a / b) for a, b in zip(p, q))
    k1, k3 = ppo.k1(p.log(), q.log()), ppo.k3(p.log(), q.log())
    assert float((p * k1).sum()) == pytest.approx(exact, abs=1e-6)
    assert float((p * k3).sum()) == pytest.approx(exact, abs=1e-6)
    assert (k3 >= 0).all() and (k1 < 0).any()
    equal(k3, [math.exp(-d) - 1 + d for d in k1.tolist()])


def test_19_kl_is_zero_at_the_first_step(policy, reward_model, codec, stage):
    ppo.train(policy, reward_model, codec, CVS, PPOFlags(iterations=3, episodes=8, minibatch=4),
              0, stage, CPU)
    assert stage.rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert stage.rows[0]["kl_k3"] == pytest.approx(0, abs=1e-5)
    assert stage.rows[2]["kl_k3"] > 1e-3                    # later it is not


@pytest.mark.parametrize("kls, faults", [
    ([-0.15] * 7, [5, 6, 7]),               # small and steady: each within 2 errors, their mean not
    ([-1.0] * 4 + [5.0] + [-1.0] * 5, [10]),        # four bad, one good that outweighs them
    ([-1.0] * 4 + [0.1], [5]),                      # and one that does not
    ([0.1, -0.15, 0.05, -0.1, 0.08, -0.12, 0.02], []),      # noise around 0
    ([-0.08] * 7, []),                      # the mean of five is 1.8 of its standard errors below 0
    ([-9.0] * 4, [])])                      # fewer than five tell nothing yet
def test_19_a_persistently_negative_kl_is_a_fault(kls, faults):
    """Each KL has a standard error of 0.1, so that the mean of five has 0.1 / sqrt(5) = 0.045."""
    rows = [{"kl": kl, "kl_error": 0.1} for kl in kls]
    assert [n for n in range(1, len(rows) + 1) if ppo.kl_is_negative(rows[:n])] == faults


def test_19_the_fault_is_logged_and_reported(policy, reward_model, codec, stage, monkeypatch):
    """From the fifth iteration on, until one outweighs the others."""
    kls = iter([9.0] + [-0.15] * 6 + [5.0])             # the first is of the critic's own rollout
    spy(monkeypatch, ppo, "roll_out",
        lambda result, *args: result[1].update(kl=next(kls), kl_error=0.1))
    train(policy, reward_model, codec, stage, CVS[:2], iterations=7, ppo_epochs=1)
    assert [row["kl_fault"] for row in stage.rows] == [False] * 4 + [True] * 2 + [False]
    assert sum("FAULT" in line for line in stage.lines) == 2


def test_19_the_error_of_five_kls_is_that_of_their_mean():
    """Five independent errors: sqrt(e1^2 + ... + e5^2) / 5. What was before is forgotten."""
    errors = [0.1, 0.2, 0.3, 0.4, 0.5]
    limit = -2 * math.sqrt(sum(e ** 2 for e in errors)) / 5
    for kl, fault in ((1.01 * limit, True), (0.99 * limit, False)):
        rows = [{"kl": 100.0, "kl_error": 100.0}] + [{"kl": kl, "kl_error": e} for e in errors]
        assert ppo.kl_is_negative(rows) == fault


def test_19_kl_error_is_the_standard_error_of_the_mean_of_the_texts(
        policy, reference, reward_model, prompts, codec):
    e, responses, log = roll(policy, reference, reward_model, prompts, codec)
    difference = e.logp - ref_log_probs(reference, e)
    texts = [float(row[:len(response)].sum()) for row, response in zip(difference, responses)]
    variance = mean([(x - mean(texts)) ** 2 for x in texts])
    assert log["kl_error"] == pytest.approx(math.sqrt(variance / 12), rel=1e-4)


def double_sum(rewards, values, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, for the real tokens of one text."""
    n, v = len(rewards), [*values, 0.0]                     # the value after the end is 0
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(n)]
    return [sum((gamma * lam) ** l * delta[t + l] for l in range(n - t)) for t in range(n)]


def test_20_gae_equals_brute_force_double_sum():
    rewards, values = random_rows("rewards", "values")
    rewards = rewards * MASK
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)):
        advantages = ppo.gae(rewards, values, MASK, gamma, lam)
        for b, n in enumerate(MASK.sum(1).tolist()):
            brute = double_sum(rewards[b, :n].tolist(), values[b, :n].tolist(), gamma, lam)
            assert advantages[b, :n].tolist() == pytest.approx(brute, abs=1e-4)
            assert (advantages[b, n:] == 0).all()


def test_20_the_rollout_discounts_as_the_flags_say(
        policy, reference, reward_model, critic, prompts, codec):
    """Each text by hand; gamma and lambda differ from each other and from their defaults."""
    e, responses, _ = roll(policy, reference, reward_model, prompts, codec, beta=0.3,
                                critic=critic, gamma=0.9, lam=0.5)
    scores = scores_by_hand(reward_model, prompts, responses)
    kl, advantages = e.logp - ref_log_probs(reference, e), torch.zeros(e.mask.shape)
    for b, n in enumerate(map(len, responses)):
        rewards = [-0.3 * x for x in kl[b, :n].tolist()]
        rewards[-1] += scores[b]
        advantages[b, :n] = torch.tensor(double_sum(rewards, critic.said[b, :n].tolist(), 0.9, 0.5))
        to_come = double_sum(rewards, [0.0] * n, 0.9, 1.0)
        assert critic.returns[b, :n].tolist() == pytest.approx(to_come, abs=1e-4)
    equal(e.advantages, ppo.whiten(advantages, e.mask), 1e-4)


def test_20_gamma_is_1_and_lambda_0_95():
    assert (PPOFlags().gamma, PPOFlags().lam) == (1.0, 0.95)


def test_21_returns_are_the_discounted_sums_of_the_rewards_to_come():
    rewards, values = random_rows("rewards", "values")
    for gamma in (1.0, 0.9):
        returns = ppo.returns_to_go(rewards * MASK, MASK, gamma)
        for b, t in [(b, t) for b in range(3) for t in range(4)]:
            to_come = [gamma ** (i - t) * float(rewards[b, i])
                       for i in range(t, 4) if MASK[b, i]]
            assert float(returns[b, t]) == pytest.approx(sum(to_come), abs=1e-5)
        # With lambda 1, they are the unwhitened advantages + values, whatever the values are.
        equal(returns, (ppo.gae(rewards * MASK, values, MASK, gamma, 1.0) + values) * MASK, 1e-4)


def test_21_the_critic_is_fitted_to_returns_that_are_not_whitened_and_know_no_value(
        policy, reference, reward_model, critic, prompts, codec):
    """The first return of a text is all that it earned, also where lambda is not 1."""
    e, responses, log = roll(policy, reference, reward_model, prompts, codec, beta=0.3,
                                  critic=critic, lam=0.3)
    kl = (e.logp - ref_log_probs(reference, e)) * e.mask
    scores = scores_by_hand(reward_model, prompts, responses)
    equal(critic.returns[:, 0], torch.tensor(scores) - 0.3 * kl.sum(1))
    for b, response in enumerate(responses):
        n = len(response)
        equal(critic.returns[b, n - 1], scores[b] - 0.3 * kl[b, n - 1])
        assert (critic.returns[b, n:] == 0).all()
    assert float(critic.returns[:, 0].mean()) == pytest.approx(log["total"], abs=1e-5)


def test_22_whitened_advantages_have_masked_mean_0_and_variance_1():
    x, = random_rows("advantages")
    white = ppo.whiten(3 * x + 5, MASK)
    real = white[MASK]
    assert float(real.mean()) == pytest.approx(0, abs=1e-6)
    assert float((real ** 2).mean()) == pytest.approx(1, abs=1e-5)
    assert (white[~MASK] == 0).all()


def test_23_rewards_are_not_whitened(policy, reference, reward_model, critic, prompts, codec,
                                     monkeypatch):
    given = []
    spy(monkeypatch, ppo, "gae", lambda advantages, rewards, *rest: given.append(rewards))
    e, responses, log = roll(policy, reference, reward_model, prompts, codec, beta=0.2,
                                  critic=critic)
    scores = torch.tensor(scores_by_hand(reward_model, prompts, responses))
    kl = (e.logp - ref_log_probs(reference, e)) * e.mask
    total = scores - 0.2 * kl.sum(1)
    assert len(given) == 2                              # for the advantages, and for the returns
    for rewards in given:
        equal(rewards.sum(1), total)
    assert log["total"] == pytest.approx(float(total.mean()), abs=1e-5)
    assert log["total"] == pytest.approx(log["reward"] - 0.2 * log["kl"], abs=1e-5)
    assert "reward whitening" in ppo.__doc__                # the code says so


def test_23_advantages_are_whitened_over_the_rollout_not_the_minibatch(
        policy, reference, reward_model, prompts, codec, monkeypatch):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    real = e.advantages[e.mask]
    assert float(real.mean()) == pytest.approx(0, abs=1e-5)
    assert float((real ** 2).mean()) == pytest.approx(1, abs=1e-4)

    used = []
    monkeypatch.setattr(ppo, "policy_loss",
                        lambda log_ratio, advantages, clip: used.append(advantages) or log_ratio)
    ppo.minibatch_loss(policy, e.rows(slice(0, 3)), PPOFlags(), 1)
    assert torch.equal(used[0], e.advantages[:3])      # a minibatch takes them as they are
    assert abs(float(used[0][e.mask[:3]].mean())) > 0.01    # and its own mean is not 0


# --------------------------------------------------------------- advantages without a critic
def test_group_advantages_by_hand():
    """Scores 1, 2, 6 for one CV, and 0, 0, 3 for another."""
    totals = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    equal(ppo.group_advantages(totals, 3, "rloo"),
          [1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2, -1.5, -1.5, 3.0])
    std = math.sqrt((4 + 1 + 9) / 2)                # of 1, 2, 6; its mean is 3
    equal(ppo.group_advantages(totals, 3, "grpo")[:3], [-2 / std, -1 / std, 3 / std])
    equal(ppo.group_advantages(torch.ones(4), 2, "grpo"), torch.zeros(4))      # all equal: nothing


@pytest.mark.parametrize("how", ["rloo", "grpo"])
def test_each_text_is_compared_with_the_others_for_its_cv(how, policy, reference, reward_model,
                                                          codec):
    prompts = [codec.prompt(cv) for cv in CVS[:3] for _ in range(4)]
    with torch.no_grad():                           # the policy has moved: there is a KL
        policy.lm_head.weight += 0.1 * torch.randn(policy.lm_head.weight.shape,
                                                   generator=generator(5))
    e, responses, log = roll(policy, reference, reward_model, prompts, codec, beta=0.5,
                             advantages=how, group=4)
    kl = ((e.logp - e.ref_logp) * e.mask).sum(1)                                # [B]
    totals = torch.tensor(scores_by_hand(reward_model, prompts, responses))
    if how == "rloo":                               # GRPO's KL is in the loss
        totals = totals - 0.5 * kl
    for b in range(12):
        others = [float(totals[k]) for k in range(b // 4 * 4, b // 4 * 4 + 4) if k != b]
        if how == "rloo":
            expected = float(totals[b]) - mean(others)
        else:
            everyone = torch.tensor(others + [float(totals[b])])
            expected = float((totals[b] - everyone.mean()) / (everyone.std() + 1e-6))
        equal(e.advantages[b][e.mask[b]], torch.full((int(e.mask[b].sum()),), expected), 1e-3)
        assert not e.advantages[b][~e.mask[b]].any()
    assert log["total"] == pytest.approx(float(totals.mean()), abs=1e-4)


def test_grpo_pays_the_kl_in_the_loss(policy, reference, reward_model, prompts, codec):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    e = drift(e)._replace(ref_logp=drift(e).ref_logp - 0.3)
    logp = ppo.evaluate_policy(policy, e, 1.0)[0].detach()
    d = [float(logp[b, t] - e.ref_logp[b, t]) for b, t in real_tokens(e)]
    price = 0.2 * mean([math.exp(-x) - 1 + x for x in d])
    tokens = float(e.mask.sum())
    with_gae, _ = ppo.minibatch_loss(policy, e, PPOFlags(kl_coef=0.2), tokens)
    with_grpo, _ = ppo.minibatch_loss(policy, e, PPOFlags(kl_coef=0.2, advantages="grpo"), tokens)
    assert price > 0.001
    assert (with_grpo - with_gae).item() == pytest.approx(price, rel=1e-3)


@pytest.mark.parametrize("how, copies", [("gae", 1), ("rloo", 3), ("grpo", 3)])
def test_each_cv_of_a_rollout_comes_as_often_as_the_group_is_large(how, copies):
    drawn = ppo.draw_cvs(list("abcdefgh"), PPOFlags(episodes=6, advantages=how, group=3),
                         generator(0))
    assert len(drawn) == 6 and len(set(drawn)) == 6 / copies
    assert all(len(set(drawn[k:k + copies])) == 1 for k in range(0, 6, copies))


@pytest.mark.parametrize("flags, says", [
    ({"episodes": 12, "group": 8}, "--episodes 12 must be a multiple of --group 8"),
    ({"gamma": 0.9}, "--gamma 0.9 needs"), ({"kl_target": 3.0}, "--kl-target")])
def test_what_does_not_fit_the_groups_is_refused(flags, says, tmp_path):
    with pytest.raises(BadInput, match=says):
        ppo.run(None, tmp_path, tmp_path, PPOFlags(advantages="grpo", **flags), 0, CPU)


# ------------------------------------------------------------------------------------------- update
def test_24_cached_rollout_and_uncached_update_give_the_same_log_probabilities(
        policy, reference, reward_model, prompts, codec, monkeypatch):
    sampled_from = []                               # logits [alive, V] at each step of the rollout
    spy(monkeypatch, model, "sample",
        lambda token, logits, *rest: sampled_from.append(logits.log_softmax(-1)))
    e, responses, _ = roll(policy, reference, reward_model, prompts, codec)
    for t, logp in enumerate(sampled_from):
        # Finished rows have left the batch.
        alive = [b for b, r in enumerate(responses) if len(r) > t]
        for i, b in enumerate(alive):
            equal(e.logp[b, t], logp[i, responses[b][t]])


@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_24_first_minibatch_has_ratio_1_with_learning_rate_0_every_one(
        lr, policy, reference, reward_model, prompts, codec, monkeypatch):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    seen = []
    spy(monkeypatch, ppo, "minibatch_loss", lambda result, policy, e, *rest: seen.append(
        {name: x / float(e.mask.sum()) for name, x in result[1].items()}))
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    ppo.update(policy, optimizer, e, PPOFlags(minibatch=4, ppo_epochs=2), generator(0), CPU)
    assert len(seen) == 6                                   # 12 episodes, twice, by 4
    for means in seen if lr == 0 else seen[:1]:
        assert means["ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert means["approx_kl"] == pytest.approx(0, abs=1e-9)
        assert means["clip_frac"] == 0
    if lr > 0:
        assert seen[-1]["approx_kl"] > 1e-4


def test_25_policy_loss_is_the_masked_mean_of_the_clipped_objective(policy, reference, reward_model,
                                                                    prompts, codec):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    e, logp = drift(e), ppo.evaluate_policy(policy, e, 1.0)[0].detach()
    losses, clipped = [], 0
    for b, t in real_tokens(e):
        r, A = math.exp(logp[b, t] - e.logp[b, t]), float(e.advantages[b, t])
        losses.append(max(-A * r, -A * min(max(r, 0.9), 1.1)))
        clipped += losses[-1] != -A * r
    flags = PPOFlags(clip=0.1)
    loss, _ = ppo.minibatch_loss(policy, e, flags, float(e.mask.sum()))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert 0 < clipped < len(losses)


def test_25_outside_of_the_clip_there_is_no_gradient_where_the_step_would_go_further():
    """Ratios 1.5, 1.5, 0.5, 0.5 with advantages of both signs; only where the loss pulls back does
    it pull."""
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    ppo.policy_loss(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), clip=0.2).sum().backward()
    equal(log_ratio.grad, [0.0, 1.5, -0.5, 0.0])


def least_squares(states, returns, weights):
    """What torch's own solver finds: states [N, C], returns [N], and a weight for each token
    -> [C + 1]."""
    root = weights.double().sqrt()[:, None]
    x = torch.cat((states, torch.ones(len(states), 1)), dim=1).double()
    return torch.linalg.lstsq(root * x, root * returns.double()[:, None]).solution[:, 0].float()


def random_rollout(*name, C=3, B=6, R=7):
    """States and returns that go with them, and masks of several lengths: [B, R, C], [B, R]
    twice."""
    draw = generator(0, *name)
    states = torch.randn(B, R, C, generator=draw)
    returns = (states @ torch.tensor([1.0, -2.0, 0.5]) + 0.7
               + 0.3 * torch.randn(B, R, generator=draw))
    return states, returns, torch.arange(R) < torch.tensor([7, 1, 3, 5, 7, 2])[:, None]


def test_26_the_critic_is_the_least_squares_fit_over_the_real_tokens(monkeypatch):
    monkeypatch.setattr(ppo.Critic, "RIDGE", 0.0)
    states, returns, mask = random_rollout("a")
    critic = ppo.Critic(3)
    critic.fit(states, returns, mask)
    weight = least_squares(states[mask], returns[mask], torch.ones(25))
    equal(critic.weight(), weight)
    equal(critic.values(states), states @ weight[:3] + weight[3])

    def squares(w):
        return (states @ w[:3] + w[3] - returns)[mask].square().sum()
    for away in 0.01 * torch.eye(4):                    # a minimum: each step away from it costs
        assert squares(critic.weight()) < min(squares(weight + away), squares(weight - away))


def test_26_what_stands_in_pads_changes_nothing_in_the_fit():
    states, returns, mask = random_rollout("a")
    one, other = ppo.Critic(3), ppo.Critic(3)
    one.fit(states, returns, mask)
    garbage = mask.float().masked_fill(~mask, math.nan)
    other.fit(states * garbage[..., None], returns * garbage, mask)
    assert torch.equal(one.weight(), other.weight())


def test_26_a_rollout_counts_0_7_of_the_one_after_it(monkeypatch):
    monkeypatch.setattr(ppo.Critic, "RIDGE", 0.0)
    critic, found = ppo.Critic(3), []
    for name, turned in (("a", 1), ("b", -1), ("c", 3)):    # what states are worth changes
        states, returns, mask = random_rollout(name)
        returns = turned * returns
        critic.fit(states, returns, mask)
        found.append((states[mask], returns[mask]))
    weights = torch.tensor([0.49, 0.7, 1.0]).repeat_interleave(25)
    equal(critic.weight(), least_squares(*map(torch.cat, zip(*found)), weights))


def test_26_the_ridge_keeps_the_solution_finite_and_is_small():
    """Two numbers that are always alike share a weight; without a ridge there is no one
    solution."""
    states, returns, mask = random_rollout("a")
    states[..., 1] = states[..., 0]
    critic = ppo.Critic(3)
    critic.fit(states, returns, mask)
    weight, x = critic.weight(), F.pad(states[mask], (0, 1), value=1.0).double()
    # The bias stays free.
    ridge = 1e-2 * (x[:, :3] ** 2).sum() / 3 * torch.tensor([1.0, 1, 1, 0]).double().diag()
    equal(weight, (torch.linalg.inv(x.T @ x + ridge) @ x.T @ returns[mask].double()).float(), 1e-4)
    assert float(weight[0]) == pytest.approx(float(weight[1]), abs=1e-4)
    best = least_squares(states[mask][:, [0, 2]], returns[mask], torch.ones(25))
    equal(critic.values(states), states[..., [0, 2]] @ best[:2] + best[2], 0.02)


def test_26_a_state_that_knows_the_score_explains_a_new_rollout(
        policy, reward_model, prompts, codec, monkeypatch):
    """At beta 0 each return is the score of its text. One number of the state holds it; 31 are
    noise."""
    real, draw = ppo.score_responses, generator(0, "noise")

    def known(*args):
        scores, ended, states = real(*args)
        states = torch.randn(states.shape, generator=draw)
        states[..., 5] = 2 - scores[:, None]
        return scores, ended, states
    monkeypatch.setattr(ppo, "score_responses", known)
    critic, found = ppo.Critic(32), []
    for draw_of in (0, 1):
        *_, log = roll(policy, policy, reward_model, prompts, codec, beta=0.0, critic=critic,
                       draw=draw_of)
        found.append(log["explained_variance"])
    assert found[0] == pytest.approx(0, abs=1e-6) and found[1] > 0.99


def test_27_the_code_says_how_the_critic_starts_how_it_is_fitted_and_why():
    said = " ".join(ppo.__doc__.split())
    for statement in (
            "The critic is a linear head on the sum of the frozen reward model's states so far,",
            "The sum holds more than the last state: the contribution of each token stays in it.",
            "Least squares fits the head: the solution is exact, and there is no "
            "learning rate to choose.",
            "Before iteration 1 the SFT model writes one rollout that only the critic sees.",
            "no value knows the returns that it is compared with."):
        assert statement in said


def lambda_returns(earned, values, lam=0.95):
    """What GAE's advantages + values are, from what was earned at gamma 1, backwards:
    G_t = r_t + (1 - lam) V_{t+1} + lam G_{t+1}. [B, R] each, 0 at pads."""
    found, following, later, next_value = torch.zeros_like(earned), 0.0, 0.0, 0.0
    for t in reversed(range(earned.shape[1])):
        reward = earned[:, t] - later
        found[:, t] = following = reward + (1 - lam) * next_value + lam * following
        later, next_value = earned[:, t], values[:, t]
    return found


def test_27_the_values_of_a_rollout_come_from_the_fit_before_it(
        policy, reference, reward_model, critic, prompts, codec):
    """The first values of a fresh critic are 0; its second come from the first rollout alone."""
    before = critic.weight()
    e, _, log = roll(policy, reference, reward_model, prompts, codec, critic=critic)
    equal(critic.said, critic.states @ before[:-1] + before[-1])
    # By now it has learned from them.
    assert not torch.allclose(critic.said, critic.values(critic.states))

    fresh, by_hand = NotedCritic(32), ppo.Critic(32)
    _, _, log = roll(policy, reference, reward_model, prompts, codec, critic=fresh)
    assert (fresh.said == 0).all() and log["explained_variance"] == 0
    by_hand.fit(fresh.states, fresh.returns, e.mask)
    e, _, log = roll(policy, reference, reward_model, prompts, codec, critic=fresh, draw=1)
    assert torch.equal(fresh.said, by_hand.values(fresh.states))
    values = by_hand.values(fresh.states) * e.mask
    ev = ppo.explained_variance(values, lambda_returns(fresh.returns, values), e.mask)
    assert log["explained_variance"] == pytest.approx(float(ev), abs=1e-6)


def test_27_before_iteration_1_the_critic_reads_a_rollout_of_the_sft_model_that_is_not_trained_on(
        policy, reward_model, codec, stage, monkeypatch):
    """And in all later ones it knows the rollouts before, and no other."""
    start, rolled, updated, policies = snapshot(policy), [], [], []
    monkeypatch.setattr(ppo, "Critic", NotedCritic)
    spy(monkeypatch, ppo, "generate", lambda responses, lm, *rest: policies.append(snapshot(lm)))
    spy(monkeypatch, ppo, "roll_out", lambda result, policy, reference, reward_model, critic, *rest:
        rolled.append((result[0], critic.said, critic.states, critic.returns)))
    spy(monkeypatch, ppo, "update", lambda result, policy, optimizer, e, *rest: updated.append(e))
    _, critic = train(policy, reward_model, codec, stage, iterations=3, episodes=8, lr=3e-3)

    assert len(rolled) == 4 and all(torch.equal(x, start[name]) for name, x in policies[0].items())
    assert [id(e) for e in updated] == [id(e) for e, *_ in rolled[1:]]
    by_hand = ppo.Critic(32)
    for k, (e, said, states, returns) in enumerate(rolled):
        assert torch.equal(said, by_hand.values(states)) and (said == 0).all() == (k == 0)
        by_hand.fit(states, returns, e.mask)
    assert torch.equal(critic.weight(), by_hand.weight())
    assert [row["iteration"] for row in stage.rows] == [1, 2, 3]


def test_27_the_critic_moves_no_state_and_no_weight_of_the_reward_model(
        policy, reward_model, codec, stage, monkeypatch):
    before, sums = snapshot(reward_model), []
    prompts = [codec.prompt(cv) for cv in CVS]
    e = ppo.make_rollout(prompts, [[8, 9, EOS]] * len(CVS), CPU)
    states = ppo.score_responses(reward_model, e, EOS, -3.0)[2]
    spy(monkeypatch, ppo, "roll_out", lambda result, policy, reference, reward_model, critic, *rest:
        sums.append((critic.xx, critic.xy)))
    _, critic = train(policy, reward_model, codec, stage, iterations=3, episodes=8, lr=3e-3)
    assert all(torch.equal(x, before[name]) for name, x in reward_model.state_dict().items())
    assert torch.equal(ppo.score_responses(reward_model, e, EOS, -3.0)[2], states)
    # Gradients are the policy's alone; an update leaves the critic as it is.
    assert all(p.grad is None and not p.requires_grad for p in reward_model.parameters())
    assert not states.requires_grad and not critic.weight().requires_grad
    assert critic.xx is sums[-1][0] and critic.xy is sums[-1][1]


def test_27_the_reward_model_may_be_of_another_size(config, policy, codec, stage):
    """The critic is as wide as its states."""
    reward_model = RewardModel(replace(config, hidden_size=48))
    _, critic = train(policy, reward_model, codec, stage, iterations=1, episodes=6)
    assert critic.weight().shape == (49,)


def test_27_the_optimizer_moves_the_policy_and_the_loss_knows_no_value(
        policy, reference, reward_model, critic, prompts, codec):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec, critic=critic)
    assert not e.logp.requires_grad and not e.advantages.requires_grad
    loss, _ = ppo.minibatch_loss(policy, e, PPOFlags(), 10)
    loss.backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for m in (reference, reward_model) for p in m.parameters())


def test_28_adam_eps_is_1e_5_and_the_learning_rate_falls_linearly_to_0(policy, reward_model, codec,
                                                                       stage, monkeypatch):
    rates = []
    spy(monkeypatch, ppo, "update", lambda result, policy, optimizer, *rest: rates.append(
        optimizer.param_groups[0]["lr"]))
    flags = PPOFlags(iterations=4, episodes=4, lr=1e-3)
    optimizer, _ = ppo.train(policy, reward_model, codec, CVS, flags, 0, stage, CPU)
    assert type(optimizer) is torch.optim.Adam      # AdamW, a subclass, pulls the weights toward 0
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    assert [group["eps"] for group in optimizer.param_groups] == [1e-5]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in policy.parameters()}
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])     # the next would be 0


def test_28_adam_remembers_its_moments_over_all_iterations(policy, reward_model, codec, stage):
    flags = dict(iterations=3, episodes=6, minibatch=4, ppo_epochs=2)
    optimizer, _ = train(policy, reward_model, codec, stage, **flags)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3 * 2 * 2}


def test_29_every_epoch_is_a_fresh_permutation_with_each_episode_once(
        policy, reference, reward_model, prompts, codec, monkeypatch):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    # A number that travels with its episode.
    e, seen = e._replace(prompt_lengths=torch.arange(12)), []
    monkeypatch.setattr(ppo, "minibatch_loss", lambda policy, e, *rest: (
        seen.append(e.prompt_lengths.tolist()),
        (policy.lm_head.weight.sum() * 0, {"ratio_mean": 1.0, "ratio_var": 0.0}))[1])
    flags = PPOFlags(minibatch=5, ppo_epochs=3)
    ppo.update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), e, flags, generator(0), CPU)

    assert [len(batch) for batch in seen] == [5, 5, 2] * 3  # the rest is not dropped
    epochs = [sum(seen[i:i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(12))}) == 4


def test_checkpointing_is_on_where_the_flags_ask_for_it(policy, reward_model, codec, stage):
    """That it changes no gradient is shown in test_weights.py."""
    for asked in (True, False):
        train(policy, reward_model, codec, stage, CVS[:2], iterations=1, checkpointing=asked)
        assert policy.model.checkpointing == asked


def test_29_every_iteration_draws_anew(policy, reward_model, codec, stage, monkeypatch):
    """At rate 0 the policy stays as it is: only the draws can make iterations differ. Six equal
    prompts show the draws of tokens apart from those of CVs. Before the three iterations there is
    the critic's rollout."""
    asked, written, orders = [], [], []
    spy(monkeypatch, ppo, "generate",
        lambda responses, lm, prompts, *rest: (asked.append(prompts), written.append(responses)))
    spy(monkeypatch, ppo, "minibatches",
        lambda batches, *rest: orders.append(torch.cat(batches).tolist()))
    train(policy, reward_model, codec, stage, iterations=3, episodes=6, ppo_epochs=1, lr=0.0)
    train(policy, reward_model, codec, stage, CVS[:1] * 6, iterations=3, ppo_epochs=1, lr=0.0)

    def different(xs):
        return len({str(x) for x in xs})
    assert [len(prompts) for prompts in asked] == [6] * 8 and different(asked[4:]) == 1
    assert different(sorted(prompts) for prompts in asked[:4]) == 4         # other CVs
    assert all(different(prompts) == 6 for prompts in asked[:4])            # no CV twice at once
    assert different(written[4:]) == 4                      # other JDs for the same CVs
    assert different(orders[:3]) == 3                       # another permutation


def test_29_another_seed_is_another_run_and_the_same_seed_the_same(
        policy, reward_model, codec, stage, monkeypatch):
    asked, written = [], []
    spy(monkeypatch, ppo, "generate",
        lambda responses, lm, prompts, *rest: (asked.append(prompts), written.append(responses)))
    for cvs in (CVS, CVS[:1] * 6):          # other CVs; other JDs for the same CVs
        for seed in (0, 0, 1):
            train(policy, reward_model, codec, stage, cvs, seed, iterations=1, episodes=6, lr=0.0)
    for k in (0, 1):                        # in the critic's rollout, and in that of the iteration
        assert asked[k] == asked[2 + k] != asked[4 + k]
        assert written[6 + k] == written[8 + k] != written[10 + k]


def step_taken(policy, e, **flags):
    """By how much one SGD step with learning rate 1 moves the parameters: the gradient with the
    sign turned."""
    policy = copy.deepcopy(policy)
    before = nn.utils.parameters_to_vector(policy.parameters()).detach()
    flags = PPOFlags(minibatch=len(e.ids), ppo_epochs=1, **flags)
    ppo.update(policy, torch.optim.SGD(policy.parameters(), lr=1.0), e, flags, generator(0), CPU)
    return nn.utils.parameters_to_vector(policy.parameters()).detach() - before


def test_30_gradient_accumulation_equals_the_big_batch(policy, reference, reward_model, prompts,
                                                       codec):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    # Lengths differ: a mean of means would be another gradient.
    assert len(set(e.mask.sum(1).tolist())) > 2
    whole = step_taken(policy, drift(e), accumulate=1, max_grad_norm=math.inf)
    assert float(whole.norm()) > 0.01
    for pieces in (4, 5, 12):
        equal(step_taken(policy, drift(e), accumulate=pieces, max_grad_norm=math.inf), whole, 1e-5)


def test_30_a_step_is_the_gradient_of_the_mean_over_its_real_tokens(
        policy, reference, reward_model, prompts, codec):
    """Each text alone, without pads, its loss written out; then one mean over the tokens of all."""
    e, responses, _ = roll(policy, reference, reward_model, prompts, codec)
    e, terms = drift(e), []
    for b, response in enumerate(responses):
        n, states = len(response), policy.model(torch.tensor([prompts[b] + response]))[0]
        states = states[len(prompts[b]) - 1:-1]                                             # [R, C]
        logp = policy.lm_head(states).log_softmax(-1)[torch.arange(n), response]          # [R]
        A, r = e.advantages[b, :n], (logp - e.logp[b, :n]).exp()
        terms += [torch.max(-A * r, -A * r.clamp(0.9, 1.1))]
    torch.cat(terms).mean().backward()
    by_hand = -torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    for pieces in (1, 5):
        step = step_taken(policy, e, accumulate=pieces, clip=0.1, max_grad_norm=math.inf)
        equal(step, by_hand, 1e-4)


def test_30_each_step_counts_its_own_real_tokens(policy, reference, reward_model, prompts, codec,
                                                 monkeypatch):
    """Minibatches of 5 episodes, each in two pieces; the last has 2. Each piece is divided by the
    tokens of its minibatch."""
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    pieces = []                             # (episodes, real tokens, what it is divided by)
    spy(monkeypatch, ppo, "minibatch_loss", lambda result, policy, e, flags, in_step:
        pieces.append((len(e.ids), int(e.mask.sum()), in_step)))
    flags = PPOFlags(minibatch=5, accumulate=2, ppo_epochs=1)
    ppo.update(policy, sgd(policy), e, flags, generator(0), CPU)
    assert [n for n, _, _ in pieces] == [3, 2, 3, 2, 1, 1]
    for first, second in zip(pieces[::2], pieces[1::2]):
        assert first[2] == second[2] == first[1] + second[1]
    assert sum(tokens for _, tokens, _ in pieces) == int(e.mask.sum())


def test_30_no_gradient_is_left_from_the_step_before(
        policy, reference, reward_model, prompts, codec, monkeypatch):
    """At rate 0, with the whole rollout in one minibatch, every epoch has the same gradient."""
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    norms, flags = [], PPOFlags(ppo_epochs=3, max_grad_norm=0.1)
    spy(monkeypatch, nn.utils, "clip_grad_norm_", lambda norm, *args: norms.append(float(norm)))
    ppo.update(policy, sgd(policy), drift(e), flags, generator(0), CPU)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4) and norms[0] > 0.1


def test_31_adaptive_kl_controller_by_hand():
    c = ppo.KLController(beta=0.1, target=2.0, horizon=1000)
    c.update(kl=2.2, episodes=100)                          # error 0.1
    assert c.beta == pytest.approx(0.1 * 1.01)
    # Errors 0.2, -0.2, -0.2, 0.
    for kl, factor in ((50.0, 1.02), (-3.0, 0.98), (0.0, 0.98), (2.0, 1.0)):
        before = c.beta
        c.update(kl, 100)
        assert c.beta == pytest.approx(before * factor)


def test_31_beta_is_fixed_without_a_target():
    c = ppo.KLController(beta=0.1, target=0.0, horizon=1000)
    c.update(kl=50.0, episodes=100)
    assert c.beta == 0.1


@pytest.mark.parametrize("target, betas", [
    (0.0, [0.07, 0.07, 0.07]), (1e6, [0.07, 0.07 * 0.92, 0.07 * 0.92 ** 2])])
def test_31_training_uses_the_controller(target, betas, policy, reward_model, codec, stage):
    """A KL far below its target: the error is -0.2, and 4 episodes are 0.4 of the horizon."""
    train(policy, reward_model, codec, stage, iterations=3, episodes=4, ppo_epochs=1, kl_coef=0.07,
          kl_target=target, kl_horizon=10)
    assert [row["beta"] for row in stage.rows] == pytest.approx(betas)


def test_31_the_controller_is_told_the_kl_of_a_text_and_the_number_of_texts(
        policy, reward_model, codec, stage, monkeypatch):
    """KL 2.2 at a target of 2: the error is 0.1. The KL of a token, or of the update, would be far
    below the target. There are 12 CVs, fewer than the 256 episodes that the flags ask for."""
    spy(monkeypatch, ppo, "roll_out", lambda result, *args: result[1].update(kl=2.2))
    train(policy, reward_model, codec, stage, iterations=2, ppo_epochs=1, kl_coef=0.07,
          kl_target=2.0, kl_horizon=100)
    assert [row["beta"] for row in stage.rows] == pytest.approx([0.07, 0.07 * (1 + 0.1 * 12 / 100)])


def test_32_log_softmax_is_in_float32(config):
    """The head's logits are bfloat16 under autocast; their log-softmax would be off by 1 %."""
    torch.manual_seed(0)
    lm = LanguageModel(config).bfloat16()
    # One state, asked for each token in turn.
    states = torch.randn(1, 32, dtype=torch.bfloat16).expand(config.vocab_size, 32)
    logp, entropy = ppo.log_probs(lm, states, torch.arange(config.vocab_size), 1.0)
    assert logp.dtype == entropy.dtype == torch.float32
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    equal(entropy[0], -(logp.exp() * logp).sum())


def test_32_log_ratio_is_bounded(policy, reference, reward_model, prompts, codec):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    for far in (-1000.0, 1000.0):
        loss, sums = ppo.minibatch_loss(policy, e._replace(logp=e.logp + far), PPOFlags(),
                                        float(e.mask.sum()))
        assert torch.isfinite(loss) and all(math.isfinite(x) for x in sums.values())


def test_32_gradients_are_clipped(policy, reference, reward_model, prompts, codec):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    free = step_taken(policy, drift(e), max_grad_norm=math.inf)
    short = step_taken(policy, drift(e), max_grad_norm=0.01)
    assert float(free.norm()) > 0.02
    equal(short, free * 0.01 / free.norm(), 1e-6)           # shorter, in the same direction


def test_32_a_gradient_that_is_not_finite_is_not_silently_skipped(policy, reference, reward_model,
                                                                  prompts, codec):
    e, _, _ = roll(policy, reference, reward_model, prompts, codec)
    e.advantages[0, 0] = math.nan
    with pytest.raises(ppo.NotFinite):
        step_taken(policy, e)


# ------------------------------------------------------------------------------------------ the log
def test_33_means_of_the_update_are_those_of_the_real_tokens(policy, reference, reward_model,
                                                             prompts, codec):
    e, responses, _ = roll(policy, reference, reward_model, prompts, codec)
    e = drift(e)
    e.logp.sub_(0.2)                        # the ratio's mean is not 1
    flags = PPOFlags(minibatch=5, accumulate=2, ppo_epochs=2, clip=0.1)
    means = ppo.update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), e, flags,
                       generator(0), CPU)

    with torch.no_grad():
        logp, _ = ppo.evaluate_policy(policy, e, 1.0)
    delta = [float(logp[b, t] - e.logp[b, t]) for b, t in real_tokens(e)]
    ratio, entropy = [math.exp(d) for d in delta], []
    A = [float(e.advantages[b, t]) for b, t in real_tokens(e)]
    for b, t in real_tokens(e):
        p = policy(torch.tensor([prompts[b] + responses[b][:t]]))[0, -1].softmax(-1).tolist()
        entropy.append(-sum(x * math.log(x) for x in p))

    assert means["approx_kl"] == pytest.approx(0.5 * mean([d ** 2 for d in delta]), rel=1e-3)
    assert means["clip_frac"] == pytest.approx(mean([abs(r - 1) > 0.1 for r in ratio]))
    assert means["entropy"] == pytest.approx(mean(entropy), rel=1e-3)
    assert means["ratio_mean"] == pytest.approx(mean(ratio), rel=1e-3)
    assert means["ratio_var"] == pytest.approx(
        mean([(r - mean(ratio)) ** 2 for r in ratio]), rel=1e-3)
    assert abs(mean(ratio) - 1) > 0.1
    assert means["policy_loss"] == pytest.approx(
        mean([max(-a * r, -a * min(max(r, 0.9), 1.1)) for a, r in zip(A, ratio)]), rel=1e-3)
    assert 0 < means["clip_frac"] < 1


def test_33_means_of_the_rollout_are_those_of_the_texts(policy, reference, reward_model, critic,
                                                        prompts, codec):
    e, responses, log = roll(policy, reference, reward_model, prompts, codec, critic=critic)
    n = len(responses)
    scores = scores_by_hand(reward_model, prompts, responses)
    ref_logp = ref_log_probs(reference, e)
    d = (e.logp - ref_logp)
    assert log["reward"] == pytest.approx(mean(scores), abs=1e-5)
    assert log["kl"] == pytest.approx(sum(float(d[b, t]) for b, t in real_tokens(e)) / n, abs=1e-5)
    assert log["kl_k3"] == pytest.approx(sum(math.exp(-d[b, t]) - 1 + float(d[b, t])
                                             for b, t in real_tokens(e)) / n, abs=1e-4)
    assert log["length"] == pytest.approx(sum(map(len, responses)) / n)
    assert log["eos_rate"] == pytest.approx(sum(r[-1] == EOS for r in responses) / n)

    real = e.mask
    returns = lambda_returns(critic.returns, critic.said * real)
    error = (returns - critic.said)[real]
    by_hand = 1 - error.var(unbiased=False) / returns[real].var(unbiased=False)
    assert log["explained_variance"] == pytest.approx(float(by_hand), abs=1e-5)


def test_33_explained_variance_of_a_perfect_and_an_ignorant_critic():
    returns, = random_rows("returns")
    # A shift is free.
    assert float(ppo.explained_variance(returns + 3 * MASK, returns, MASK)) == pytest.approx(1)
    assert (float(ppo.explained_variance(torch.full_like(returns, 7.0), returns, MASK))
            == pytest.approx(0, abs=1e-6))


def test_33_every_iteration_logs_all_of_it(policy, reward_model, codec, stage):
    flags = PPOFlags(iterations=2, episodes=8, minibatch=4)
    ppo.train(policy, reward_model, codec, CVS, flags, 0, stage, CPU,
              true_match=lambda cv, jd: len(jd) > 0)
    names = {"iteration", "kl", "kl_k3", "reward", "total", "approx_kl", "clip_frac", "entropy",
             "ratio_mean", "ratio_var", "explained_variance", "eos_rate", "length", "policy_loss",
             "beta", "true_match", "kl_fault", "kl_error"}
    assert [row["iteration"] for row in stage.rows] == [1, 2]
    for row in stage.rows:
        assert names == set(row) and all(math.isfinite(row[name]) for name in names)
    assert sum(line.startswith("ppo ") for line in stage.lines) == 2    # a line for each iteration


def test_33_the_true_match_is_that_of_each_cv_and_its_own_jd(policy, reward_model, codec, stage,
                                                             monkeypatch):
    asked, written, cv_of = [], [], {str(codec.prompt(cv)): cv for cv in CVS}
    spy(monkeypatch, ppo, "generate", lambda responses, lm, prompts, *rest: written.extend(
        (cv_of[str(p)], codec.text(r)) for p, r in zip(prompts, responses)))
    train(policy, reward_model, codec, stage, iterations=2, episodes=5, ppo_epochs=1,
          true_match=lambda cv, jd: asked.append((cv, jd)) or len(asked))
    # The critic's own rollout is not asked about.
    assert asked == written[5:] and len(set(asked)) > 5
    assert [row["true_match"] for row in stage.rows] == [mean(range(1, 6)), mean(range(6, 11))]


# --------------------------------------------------------------------- the direction of learning
def scores_of(monkeypatch, score, cut_off=0.0):
    """Let this function, of a text's tokens, stand for the reward model's head; a text that was cut
    off gets this share of it. No two scores are quite the same: a constant would be refused."""
    real = ppo.score_responses

    def scored(reward_model, e, eos, cut_off_score):
        _, ended, states = real(reward_model, e, eos, cut_off_score)
        texts = [row[:n].tolist() for row, n in zip(e.ids, e.prompt_lengths + e.mask.sum(1))]
        scores = torch.tensor([score(text) + 1e-4 * i for i, text in enumerate(texts)])
        return torch.where(ended, scores, cut_off * scores), ended, states
    monkeypatch.setattr(ppo, "score_responses", scored)


def log_probs_of_texts(policy, e):
    with torch.no_grad():
        return (ppo.evaluate_policy(policy, e, 1.0)[0] * e.mask).sum(1)                      # [B]


def test_25_the_best_text_becomes_likelier_and_the_worst_less_likely(
        policy, reward_model, prompts, codec, monkeypatch):
    """Through rollout and update: a sign turned anywhere from score to step turns this round."""
    same = prompts[:1] * 24                 # one CV: what one JD gains, others lose
    responses = generate(policy, same, codec.max_jd, generator=generator(0))
    best, worst = [r for r in responses if r[-1] == EOS and responses.count(r) == 1][:2]
    paid = {str(same[0] + best): 1.0, str(same[0] + worst): -1.0}
    scores_of(monkeypatch, lambda row: paid.get(str(row), 0.0))
    e, responses, _ = roll(policy, policy, reward_model, same, codec, beta=0.0)
    before = log_probs_of_texts(policy, e)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    ppo.update(policy, optimizer, e, PPOFlags(ppo_epochs=4), generator(0), CPU)
    change = log_probs_of_texts(policy, e) - before
    assert change[responses.index(best)] > 0.5 and change[responses.index(worst)] < -0.5
    assert change[responses.index(best)] == change.max()


def test_25_training_makes_what_is_paid_for_more_frequent(policy, reward_model, codec, stage,
                                                          monkeypatch):
    """Paid for each word "night" (token 8), the policy writes more of them."""
    scores_of(monkeypatch, lambda row: row.count(8))
    train(policy, reward_model, codec, stage, CVS * 2, seed=1, iterations=6, minibatch=12, lr=3e-3)
    assert stage.rows[-1]["reward"] > stage.rows[0]["reward"] + 0.2


def exact_kl(policy, reference, e):
    """KL(pi || pi_ref) of the next token, summed over the vocabulary; its mean over these texts."""
    with torch.no_grad():
        p, q = (lm.lm_head(ppo.response_states(lm.model, e)).log_softmax(-1)        # [tokens, V]
                for lm in (policy, reference))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_16_a_higher_beta_pulls_the_policy_nearer_to_the_reference(
        policy, reference, reward_model, prompts, codec, monkeypatch):
    scores_of(monkeypatch, lambda row: 0.5 * row.count(8))
    flags, kls, start = PPOFlags(minibatch=8), [], copy.deepcopy(policy)
    e, *_ = roll(policy, reference, reward_model, prompts, codec)
    for beta in (0.0, 3.0):
        policy, critic = copy.deepcopy(start), ppo.Critic(32)
        optimizer = torch.optim.Adam(policy.parameters(), lr=5e-4)
        for i in range(4):
            written, _ = ppo.roll_out(policy, reference, reward_model, critic, prompts * 4,
                                      codec, flags, beta, generator(i), CPU)
            ppo.update(policy, optimizer, written, flags, generator(i), CPU)
        kls.append(exact_kl(policy, reference, e))
    assert kls[1] < 0.95 * exact_kl(start, reference, e) and kls[1] < 0.9 * kls[0]


def test_26_the_critic_predicts_the_returns_of_new_rollouts_better_than_their_mean(
        policy, reward_model, prompts, codec, monkeypatch):
    """Than the mean of the returns so far. Paid for is each "night", in the CV or in the JD."""
    scores_of(monkeypatch, lambda row: row.count(8), cut_off=1.0)
    critic, errors, of_mean, returns = NotedCritic(32), [], [], []
    for k in range(6):
        e, *_ = roll(policy, policy, reward_model, prompts * 8, codec, critic=critic, draw=k)
        if k > 0:
            errors.append((critic.said - critic.returns)[e.mask].square().mean())
            of_mean.append((torch.cat(returns).mean() - critic.returns[e.mask]).square().mean())
        returns.append(critic.returns[e.mask])
    assert all(error < other for error, other in zip(errors, of_mean))
    assert mean(errors) < 0.85 * mean(of_mean)


def test_a_rollout_that_is_computed_in_parts_is_the_same_rollout(
        policy, reference, reward_model, prompts, codec):
    found = []
    for minibatch, accumulate in ((12, 1), (10, 2), (1, 1)):
        critic = NotedCritic(32)
        e, _, log = roll(policy, reference, reward_model, prompts, codec, critic=critic,
                         minibatch=minibatch, accumulate=accumulate)
        found.append((e.logp * e.mask, e.advantages, critic.states[e.mask], critic.returns,
                      torch.tensor([*log.values()])))
    for other in found[1:]:
        for x, y in zip(found[0], other):
            equal(x, y, 1e-4)


def test_equal_scores_within_a_part_of_a_rollout_are_no_constant_reward_model(
        policy, reward_model, prompts, codec, monkeypatch):
    """Each part holds the same text twice, as it may happen; the scores of the whole rollout
    differ."""
    monkeypatch.setattr(ppo, "generate",
                        lambda lm, prompts, *rest, **more: [[8, EOS]] * len(prompts))
    twice = [p for p in prompts for _ in range(2)]
    assert roll(policy, policy, reward_model, twice, codec, minibatch=2)[2]["eos_rate"] == 1
    with pytest.raises(BadInput, match="gives all 24 finished JDs of a rollout the same score"):
        roll(policy, policy, reward_model, prompts[:1] * 24, codec, minibatch=2)
