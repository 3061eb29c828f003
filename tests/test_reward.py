"""Reward model: statements 3 to 8 of what a correct PPO satisfies (01, 02 and 09 to 33 are in
test_ppo.py), and the parts beneath them: AUC, groups, comparisons."""
import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

import aids
import model
import reward
from conftest import CVS
from data import Record, pad_right
from model import RewardModel
from aids import Muon, Optimizer, add_averaging_block, lr_factor
from plumbing.stage import generator
from plumbing.weights import load_model, save_model

CPU = torch.device("cpu")
EOS = 1
ROWS = [[2, 3, 5, 4, 3, 8, EOS], [2, 3, 6, 9, 4, 3, 5, 8, 10, EOS], [2, 3, 7, 4, 3, EOS],
        [2, 3, 5, 9, 4, 3, 0, 0]]


def make_groups(records, codec):
    return reward.make_groups(records, reward.decision_groups(records), codec)


def score_alone(model, row):
    """The score of one row with no padding at all, by hand: head times the hidden state at the end,
    minus centre."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([row]))[0, -1]
        return float(hidden @ model.score.weight[0]) - model.center


# ---------------------------------------------------------------------------------------- the score
def test_03_more_padding_changes_no_reward_score(reward_model):
    ids, lengths = pad_right(ROWS)
    with torch.no_grad():
        scores = reward_model(ids, lengths)
        for pad in (0, EOS, 5):                     # what stands in the pads does not matter either
            wider = torch.cat((ids, torch.full((len(ROWS), 9), pad)), dim=1)
            torch.testing.assert_close(reward_model(wider, lengths), scores, atol=1e-5, rtol=0)


def test_04_score_is_read_at_the_last_real_token(reward_model):
    """Among the rows: the longest, which has no pad, and one that ends in real tokens with the id
    of the pad."""
    ids, lengths = pad_right(ROWS)
    assert lengths.max() == ids.shape[1]
    with torch.no_grad():
        scores = reward_model(ids, lengths)
    assert scores.tolist() == pytest.approx([score_alone(reward_model, row) for row in ROWS],
                                            abs=1e-5)


def test_04_scores_come_back_in_the_order_of_the_rows(reward_model):
    """score_rows sorts by length inside, in batches; no one outside sees that."""
    alone = [score_alone(reward_model, row) for row in ROWS]
    assert list(reward.score_rows(reward_model, ROWS, batch_size=2)) == pytest.approx(alone,
                                                                                      abs=1e-5)


def test_score_pairs_are_the_reward_models_scores(reward_model, codec):
    prompts = [codec.prompt(cv) for cv in ("nurse", "driver night", "cook part day")]
    jds = [codec.jd(jd) for jd in ("wanted now", "full", "night part day")]
    pairs = list(itertools.product(range(3), range(3)))
    found = reward.score_pairs(reward_model.eval(), prompts, jds, pairs[::-1], batch_size=4)
    assert [found[p] for p in pairs] == pytest.approx(
        reward.score_rows(reward_model, [prompts[q] + jds[d] for q, d in pairs]), abs=1e-4)


# --------------------------------------------------------------------------------- loss and metrics
def test_05_ranking_loss_is_minus_log_sigmoid_of_the_difference():
    chosen, rejected = [2.0, -1.0, 0.5], [0.5, 1.0, 0.5]
    by_hand = [-math.log(1 / (1 + math.exp(r - c))) for c, r in zip(chosen, rejected)]
    assert float(reward.ranking_loss(torch.tensor(chosen),
                                     torch.tensor(rejected))) == pytest.approx(sum(by_hand) / 3)


def test_05_equal_scores_give_ln_2():
    scores = torch.tensor([3.0, -7.0])
    assert float(reward.ranking_loss(scores, scores)) == pytest.approx(math.log(2))


def test_05_ranking_loss_of_a_huge_difference_is_finite():
    chosen = torch.tensor([-1000.0], requires_grad=True)
    loss = reward.ranking_loss(chosen, torch.tensor([1000.0]))
    loss.backward()
    assert loss.item() == pytest.approx(2000) and chosen.grad.item() == pytest.approx(-1)


def test_05_batch_loss_is_the_sum_over_all_comparisons(reward_model):
    rows = [(row[:2], row[2:]) for row in ROWS]
    groups = [reward.Group(rows[:3], [True, False, False]),
              reward.Group([rows[3], rows[0]], [False, True])]
    reader = torch.nn.Linear(32, 1)
    loss, pooled_loss, right, reading = reward.batch_loss(reward_model, reader, groups, CPU)

    def by_hand(s):
        return [s[0] - s[1], s[0] - s[2], s[0] - s[3]]

    def loss_by_hand(s):
        return sum(math.log(1 + math.exp(-d)) for d in by_hand(s))

    last = [score_alone(reward_model, row) for row in ROWS]
    # The mean states are those before the last block, here one row at a time and without pads.
    shorter = copy.deepcopy(reward_model.model)
    del shorter.layers[-1]
    states = [shorter(torch.tensor([row]))[0, 2:] for row in ROWS]
    means = [reward_model.head(x.mean(0)).item() for x in states]
    assert pooled_loss.item() == pytest.approx(loss_by_hand(means), abs=1e-5)
    assert loss.item() == pytest.approx(loss_by_hand(last), abs=1e-5)
    assert right == sum(d > 0 for d in by_hand(last))
    five = [0, 1, 2, 3, 0]                  # row 0 is in both groups
    by_hand = aids.reading_loss(reader, torch.cat([states[i] for i in five]),
                                [rows[i] for i in five])
    assert reading.item() == pytest.approx(by_hand.item(), abs=1e-5)


def test_05_equal_scores_are_not_right(reward_model):
    """A head of zeros knows nothing: it must not look as if it were right everywhere."""
    torch.nn.init.zeros_(reward_model.score.weight)
    groups = [reward.Group([(row[:2], row[2:]) for row in ROWS], [True, False, True, False])]
    loss, _, right, _ = reward.batch_loss(reward_model, None, groups, CPU)
    assert right == 0 and loss.item() == pytest.approx(4 * math.log(2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_05_the_gradient_is_that_of_the_objective_by_hand(reward_model, accumulate):
    """The mean over 3 comparisons of the ranking by the last states and by the mean ones, and
    `reading` times the mean reading loss of 5 rows; each row alone, without pads or shared
    prompts."""
    rows = [(row[:2], row[2:]) for row in ROWS]
    groups = [reward.Group(rows[:3], [True, False, False]),
              reward.Group([rows[3], rows[0]], [False, True])]
    body, shorter = reward_model.model, copy.copy(reward_model.model)       # the same parameters,
    shorter._modules = {**body._modules, "layers": body.layers[:-1]}        # one block less
    last = [reward_model.score(body(torch.tensor([row]))[0, -1]) for row in ROWS]
    states = [shorter(torch.tensor([row]))[0, 2:] for row in ROWS]
    mean = [reward_model.score(x.mean(0)) for x in states]
    reader, five = torch.nn.Linear(32, 1), [0, 1, 2, 3, 0]                 # row 0 is in both groups
    reading = aids.reading_loss(reader, torch.cat([states[i] for i in five]),
                                [rows[i] for i in five])

    def ranking(s):
        return sum(torch.log1p(torch.exp(s[no] - s[0])) for no in (1, 2, 3)) / 3
    (ranking(last) + ranking(mean) + 0.3 * reading).backward()
    parameters = [*reward_model.parameters(), *reader.parameters()]
    by_hand = [p.grad.clone() for p in parameters]
    reward_model.zero_grad(), reader.zero_grad()

    flags = reward.RewardFlags(reading=0.3, accumulate=accumulate)
    loss, right, read = reward.reward_step(reward_model, reader, groups, flags, CPU)
    for p, gradient in zip(parameters, by_hand):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)
    assert loss == pytest.approx(ranking(last).item(), abs=1e-5)
    assert read == pytest.approx(reading.item(), abs=1e-5)
    assert right == pytest.approx(sum(last[0].item() > last[no].item() for no in (1, 2, 3)) / 3)


def test_a_prompt_is_read_once_and_its_jds_get_the_states_of_whole_rows(reward_model):
    """Among the rows: one prompt with two JDs, not side by side, and prompts and JDs of several
    lengths."""
    rows = [([2, 3, 5], [4, 3, 8, EOS]), ([6, 9], [7, EOS]), ([2, 3, 5], [9, EOS]),
            ([5, 5, 6, 7, 8], [3, 4, 3, 3, EOS])]
    read = []
    body = reward_model.model
    last, earlier, in_jd = aids.jd_states(noting(body, read), rows, CPU)
    shorter = copy.deepcopy(body)
    del shorter.layers[-1]
    assert read == [3, 4]                                       # three prompts, then four JDs
    for b, (prompt, jd) in enumerate(rows):
        row, n = torch.tensor([prompt + jd]), len(jd)
        assert in_jd[b].tolist() == [True] * n + [False] * (in_jd.shape[1] - n)
        torch.testing.assert_close(last[b], body(row)[0, -1], atol=1e-5, rtol=0)
        torch.testing.assert_close(earlier[b, :n], shorter(row)[0, len(prompt):], atol=1e-5, rtol=0)


def test_gradients_pass_through_a_shared_prompt(reward_model):
    rows = [([2, 3, 5], [4, 3, 8, EOS]), ([6, 9], [7, EOS]), ([2, 3, 5], [9, EOS])]
    body, gradients = reward_model.model, []

    def alone():
        for p, jd in rows:
            inputs = []
            hook = body.layers[-1].register_forward_pre_hook(
                lambda block, args: inputs.append(body.norm(args[0])))
            yield (body(torch.tensor([p + jd]))[0, -1].square()
                   + inputs[0][0, len(p):].square().sum(0))
            hook.remove()

    def together():
        last, earlier, in_jd = aids.jd_states(body, rows, CPU)
        yield last.square().sum(0) + earlier[in_jd].square().sum(0)
    for states in (alone, together):
        body.zero_grad()
        (sum(states()) * torch.linspace(-1, 1, body.config.hidden_size)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in body.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)
    assert gradients[0].abs().max() > 0.1


def noting(body, read):
    """`body`, with a list in which each of its calls notes how many rows it had."""
    def call(ids, *rest, **named):
        read.append(len(ids))
        return body(ids, *rest, **named)
    call.layers, call.norm = body.layers, body.norm
    return call


def test_gradients_of_a_shared_prompt_are_the_same_bit_for_bit_with_several_threads(config):
    """Many rows share few prompts, so that threads that added as they come would meet."""
    torch.manual_seed(0)
    body, threads = RewardModel(replace(config, hidden_size=64)).model, torch.get_num_threads()
    rows = [(torch.randint(2, 14, (128,)).tolist(), torch.randint(2, 14, (4,)).tolist())
            for _ in range(3)]
    rows = [(rows[i % 3][0], rows[i % 2][1]) for i in range(64)]

    def gradient():
        body.zero_grad()
        sum(x.square().sum() for x in aids.jd_states(body, rows, CPU)[:2]).backward()
        return torch.cat([p.grad.flatten() for p in body.parameters()])
    try:
        torch.set_num_threads(4)
        first = gradient()
        assert all(torch.equal(first, gradient()) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


def test_reading_loss_asks_of_each_jd_token_whether_the_cv_holds_it(reward_model):
    rows = [([3, 4, 5], [4, 9, EOS]), ([6, 7], [7, 7, 6, 8, EOS])]
    # The end answers for the others: the share that is held.
    labels = [[1, 0, 1 / 2], [1, 1, 1, 0, 3 / 4]]
    reader = torch.nn.Linear(reward_model.config.hidden_size, 1)
    states = [reward_model.model(torch.tensor([prompt + jd]))[0, len(prompt):]
              for prompt, jd in rows]
    losses = []
    for h, row in zip(states, labels):
        p = torch.sigmoid(reader(h)[:, 0]).tolist()
        losses.append([-(y * math.log(q) + (1 - y) * math.log(1 - q)) for q, y in zip(p, row)])
    by_hand = sum(sum(row) / len(row) + row[-1] for row in losses) / 2
    assert aids.reading_loss(reader, torch.cat(states), rows).item() == pytest.approx(by_hand,
                                                                                      abs=1e-5)


def test_reading_loss_of_a_jd_that_is_nothing_but_its_end(reward_model):
    reader = torch.nn.Linear(2, 1)
    assert math.isfinite(aids.reading_loss(reader, torch.ones(1, 2), [([3], [EOS])]).item())


def test_05_accuracy_and_margin_by_hand():
    records = [Record("a", "1", True), Record("a", "2", False), Record("a", "3", False),
               Record("b", "4", True)]
    metrics = reward.pair_metrics(records, torch.tensor([1.0, 1.0, 4.0, 9.0]).numpy())
    # Pairs: 1 over 2 is a tie, half right, margin 0; 1 over 3 is wrong, margin -3. CV b has no
    # rejected decision.
    assert metrics["pairs"] == 2
    assert metrics["pair_accuracy"] == 0.25
    assert metrics["margin"] == -1.5


RECORDS = [Record(cv, jd, cv == jd.split()[0]) for cv in ("nurse", "driver", "cook")
           for jd in ("nurse wanted", "driver wanted now", "cook night wanted full")]


def test_05_training_logs_loss_and_accuracy_and_learns(reward_model, codec, stage):
    before = copy.deepcopy(reward_model)
    flags = reward.RewardFlags(steps=30, groups=6, warmup=2, lr=3e-3, matrix_lr=0.02)
    reward.train(reward_model, torch.nn.Linear(32, 1), codec, RECORDS, flags, 0, stage, CPU)

    # The first row is that of the untrained model: all six groups, of three CVs and three JDs, in
    # one step.
    groups = make_groups(RECORDS, codec)[0]
    loss, _, right, _ = reward.batch_loss(before, None, groups, CPU)
    assert sum(len(reward.comparisons(g.accepted)) for g in groups) == 12
    assert stage.rows[0]["loss"] == pytest.approx(loss.item() / 12, abs=1e-5)
    assert stage.rows[0]["accuracy"] == pytest.approx(right / 12)
    assert stage.rows[-1]["loss"] < 0.1 and stage.rows[-1]["accuracy"] == 1

    # And each row alone: what was accepted scores above what was rejected, which was not so before.
    pairs = [(r.cv, r.jd) for r in RECORDS]
    was, now = (reward.pair_metrics(RECORDS, reward.score_texts(m, codec, pairs))
                for m in (before, reward_model))
    assert now["pair_accuracy"] == 1 > was["pair_accuracy"] and now["margin"] > was["margin"] + 1


def seen_by_steps(monkeypatch):
    """The groups of each step of a training that goes nowhere."""
    seen = []

    def step(model, reader, groups, *rest):
        seen.append(groups)
        return 0.0, 0.0, 0.0
    monkeypatch.setattr(reward, "reward_step", step)
    return seen


def test_every_epoch_has_each_group_once_in_an_order_of_its_own(reward_model, codec, stage,
                                                                monkeypatch):
    seen, flags = seen_by_steps(monkeypatch), reward.RewardFlags(steps=9, groups=2)
    reward.train(reward_model, torch.nn.Linear(32, 1), codec, RECORDS, flags, 0, stage, CPU)
    assert [len(groups) for groups in seen] == [2] * 9
    epochs = [[str(g) for groups in seen[k:k + 3] for g in groups] for k in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 6 for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3


def test_a_large_group_shows_other_rows_in_every_step(reward_model, codec, stage, monkeypatch):
    jds = itertools.product(["cook", "night", "day"], ["now", "full", "part"])
    records = [Record("nurse", " ".join(jd), k < 4) for k, jd in enumerate(jds)]
    seen, flags = seen_by_steps(monkeypatch), reward.RewardFlags(steps=6, groups=1, max_group=3)
    reward.train(reward_model, torch.nn.Linear(32, 1), codec, records, flags, 0, stage, CPU)
    assert [len(g.rows) for [g] in seen] == [3] * 6 and len({str(g) for [g] in seen}) > 3


def test_flags_that_save_memory_are_obeyed(reward_model, codec, stage, monkeypatch):
    parts, batch_loss = [], reward.batch_loss

    def noted(model, reader, groups, *rest):
        parts.append(len(groups))
        return batch_loss(model, reader, groups, *rest)
    monkeypatch.setattr(reward, "batch_loss", noted)
    flags = reward.RewardFlags(steps=1, groups=6, accumulate=4, checkpointing=True)
    reward.train(reward_model, torch.nn.Linear(32, 1), codec, RECORDS, flags, 0, stage, CPU)
    assert parts == [2, 2, 1, 1] and reward_model.model.checkpointing


def test_many_comparisons_give_the_same_gradients_every_time(reward_model):
    """On two threads: 160,000 comparisons of 800 rows."""
    rows = [([2, 5 + i % 3], [5 + i % 7, 1]) for i in range(800)]
    group, gradients = reward.Group(rows, [i % 2 == 0 for i in range(800)]), []
    torch.set_num_threads(2)
    try:
        for _ in range(4):
            reward_model.zero_grad()
            reward.batch_loss(reward_model, None, [group], CPU)[0].backward()
            gradients.append(reward_model.score.weight.grad.clone())
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# --------------------------------------------------------------- the optimizer of stages 1 and 2
def test_matrices_of_layers_have_their_own_rate_and_all_rates_follow_the_schedule(reward_model):
    flags = reward.RewardFlags(lr=0.5, matrix_lr=0.03, warmup=4)
    both = torch.nn.ModuleList([reward_model, torch.nn.Linear(32, 1)])
    optimizer, rates = Optimizer(both, flags, 10), []
    for step in range(10):
        optimizer.step(step)
        rates.append([part.param_groups[0]["lr"] for part in optimizer.optimizers])
    factors = [lr_factor(step, 10, 4) for step in range(10)]
    assert rates == [pytest.approx([0.03 * factor, 0.5 * factor]) for factor in factors]

    def parameters(part):
        return {id(p) for p in part.param_groups[0]["params"]}
    assert optimizer.optimizers[1].param_groups[0]["weight_decay"] == 0          # Muon has none
    matrices, rest = map(parameters, optimizer.optimizers)
    assert matrices == {id(p) for n, p in both.named_parameters() if n.endswith("proj.weight")}
    assert matrices | rest == {id(p) for p in both.parameters()} and not matrices & rest
    [alone] = Optimizer(both, replace(flags, matrix_lr=0.0), 10).optimizers     # AdamW for all
    assert parameters(alone) == matrices | rest


@pytest.mark.parametrize("rows, columns", [(8, 20), (20, 8), (12, 12)])
def test_muon_moves_as_torch_s_own_does_in_bf16(rows, columns):
    """And its state is the same: a stage that an earlier version began goes on."""
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(torch.zeros(rows, columns)) for _ in range(2))
    ours = Muon([mine], 0.1)
    other = torch.optim.Muon([theirs], 0.1, weight_decay=0.0, ns_steps=3)
    for _ in range(4):
        mine.grad = torch.randn(rows, columns)
        theirs.grad = mine.grad.clone()
        before = mine.detach().clone(), theirs.detach().clone()
        ours.step(), other.step()
        moved, expected = mine - before[0], theirs - before[1]
        assert (moved - expected).norm() < 0.02 * expected.norm()
    state, others = ours.state_dict()["state"], other.state_dict()["state"]
    assert torch.equal(state[0].pop("momentum_buffer"), others[0].pop("momentum_buffer"))
    assert state == others


def test_muon_makes_the_singular_values_of_an_update_alike():
    torch.manual_seed(0)
    matrix = torch.randn(6, 4) @ torch.diag(torch.tensor([1.0, 0.7, 0.5, 0.3])) @ torch.randn(4, 4)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ aids.orthogonal(matrix, 5) @ v.T
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-4       # the same directions
    assert 0.6 < inside.diagonal().min() and inside.diagonal().max() < 1.3


def test_gradients_are_shortened_to_the_largest_norm_and_cleared_after_the_step(reward_model):
    optimizer = Optimizer(reward_model, reward.RewardFlags(max_grad_norm=0.25), 10)
    for p in reward_model.parameters():
        p.grad = torch.ones_like(p)
    n = sum(p.numel() for p in reward_model.parameters())
    assert optimizer.clip() == pytest.approx(math.sqrt(n), rel=1e-4)
    norm = math.sqrt(sum(float((p.grad ** 2).sum()) for p in reward_model.parameters()))
    assert norm == pytest.approx(0.25, rel=1e-3)
    optimizer.step(0)
    assert all(p.grad is None or not p.grad.any() for p in reward_model.parameters())


def test_no_more_groups_are_made_than_are_seen(reward_model, codec, stage, monkeypatch):
    made, make_groups = [], reward.make_groups
    monkeypatch.setattr(reward, "make_groups", lambda records, found, codec: (
        made.append(found) or make_groups(records, found, codec)))
    for seed in (0, 0, 1, 2, 3):
        reward.train(reward_model, torch.nn.Linear(32, 1), codec, RECORDS,
                     reward.RewardFlags(steps=1, groups=2), seed, stage, CPU)
    assert [len(found) for found in made] == [2] * 5 and made[0] == made[1]
    assert len({str(found) for found in made}) > 1              # another seed, other groups


def test_05_gradient_accumulation_equals_the_big_batch(reward_model, codec, stage, monkeypatch):
    gradients = []          # Adam's first step hides their scale: look where they are clipped
    reader = torch.nn.Linear(32, 1)
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, clip: gradients.append(
            [p.grad.clone() for p in parameters if p.grad is not None]) or 0.0)
    for accumulate in (1, 4):
        flags = reward.RewardFlags(steps=1, groups=6, accumulate=accumulate, lr=1e-9,
                                   matrix_lr=1e-9)
        model, head = copy.deepcopy((reward_model, reader))
        reward.train(model, head, codec, RECORDS[:-1], flags, 0, stage, CPU)
    assert stage.rows[0] == pytest.approx(stage.rows[1], abs=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_auc_equals_the_share_of_right_pairs():
    draw = generator(0, "auc")
    scores = torch.randint(0, 6, (40,), generator=draw).tolist()       # few values, hence many ties
    labels = (torch.rand(40, generator=draw) < 0.4).tolist()
    right = [1.0 if a > b else 0.5 if a == b else 0.0
             for a, yes in zip(scores, labels) if yes for b, no in zip(scores, labels) if not no]
    assert reward.auc(scores, labels) == pytest.approx(sum(right) / len(right))


def test_auc_of_a_perfect_a_reversed_and_a_missing_order():
    assert reward.auc([1, 2, 3], [False, True, True]) == 1
    assert reward.auc([3, 2, 1], [False, True, True]) == 0
    assert reward.auc([5, 5, 5], [False, True, True]) == 0.5
    assert reward.auc([1, 2], [True, True]) is None


# ----------------------------------------------------------------------------------------- the head
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_added_block_starts_as_an_average_over_all_tokens(config, kv_heads):
    """By hand: what the last token brings, plus gain times the mean of all tokens' normed states
    (with fewer key-value heads than heads, of what of them fits through the values)."""
    model = RewardModel(replace(config, num_key_value_heads=kv_heads))
    x = []
    model.model.norm.register_forward_pre_hook(lambda _, states: x.append(states[0]))
    ids, lengths = pad_right([ROWS[0]])
    model.model(ids)
    add_averaging_block(model, gain=7.0)
    score = model(ids, lengths).item()
    assert model.config.num_hidden_layers == config.num_hidden_layers + 1 == len(model.model.layers)
    x = x[0][0]                                                             # [T, C] before the norm
    normed = x / (x.square().mean(1, keepdim=True) + config.rms_norm_eps).sqrt()
    values = model.model.layers[-1].self_attn.v_proj.weight             # [K D, C], orthonormal rows
    torch.testing.assert_close(values @ values.T, torch.eye(len(values)), atol=1e-5, rtol=0)
    state = x[-1] + 7.0 * normed.mean(0) @ values.T @ values
    state = state / (state.square().mean() + config.rms_norm_eps).sqrt()
    assert score == pytest.approx((state @ model.score.weight[0]).item(), abs=1e-4)


def test_06_head_starts_with_std_one_over_sqrt_d_plus_1_and_no_bias(config):
    """At d = 2 it is 0.577; 1/sqrt(d) would be 0.707. 2000 heads give it to 1 %."""
    tiny = replace(config, hidden_size=2, num_attention_heads=1, num_key_value_heads=1,
                   num_hidden_layers=0)
    torch.manual_seed(0)
    heads = [RewardModel(tiny).score for _ in range(2000)]
    weights = torch.cat([head.weight.detach().flatten() for head in heads])
    assert float(weights.std()) == pytest.approx(1 / math.sqrt(2 + 1), rel=0.05)
    assert float(weights.mean()) == pytest.approx(0, abs=0.05)
    assert all(head.bias is None for head in heads)


def test_scores_are_not_rounded_under_autocast(reward_model):
    """In bf16 there are 64 numbers between 2 and 3: more states than that would have to share a
    score."""
    torch.manual_seed(0)
    states = torch.randn(500, 32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward_model.head(states)
    assert scores.dtype == torch.float32 and torch.equal(scores, reward_model.head(states))
    assert len(scores.unique()) > 490


def test_07_scale_is_folded_into_the_head_and_centre_kept_in_the_config(reward_model, tmp_path):
    draw = generator(0, "rows")
    rows = [torch.randint(2, 14, (n,), generator=draw).tolist() for n in range(4, 44)]
    reward_model.center = -2.0                              # also a model that already has a centre
    before = reward.score_rows(reward_model, rows)
    # Else the test would show nothing.
    assert abs(before.mean()) > 0.1 and abs(before.std() - 1) > 0.1

    reward.standardize(reward_model, before)
    after = reward.score_rows(reward_model, rows)
    assert after.mean() == pytest.approx(0, abs=1e-4)
    # Either of the two standard deviations, n or n - 1.
    assert after.std() == pytest.approx(1, abs=0.02)
    assert (after.argsort() == before.argsort()).all()

    save_model(tmp_path, reward_model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["center"] == reward_model.center != 0
    loaded = load_model(tmp_path, RewardModel)
    assert list(reward.score_rows(loaded, rows)) == pytest.approx(list(after), abs=1e-5)


def test_07_the_samples_are_of_different_cvs_drawn_from_the_full_distribution(
        policy, codec, stage, monkeypatch):
    asked, sample = set(), model.sample

    def noted(logits, temperature, top_p, draw):
        asked.add((temperature, top_p))
        return sample(logits, temperature, top_p, draw)
    monkeypatch.setattr(model, "sample", noted)
    rows = reward.sample_rows(policy, codec, CVS, 5, 0, stage, CPU, batch_size=2)
    prompts = [codec.prompt(cv) for cv in CVS]
    found = {k for k, p in enumerate(prompts) for row in rows if row[:len(p)] == p and row[len(p):]}
    assert len(found) == len(rows) == 5 and asked == {(1.0, 1.0)}
    same = reward.sample_rows(policy, codec, CVS[:1] * 6, 6, 0, stage, CPU, batch_size=2)
    assert same[:2] != same[2:4] != same[4:]                # each part has draws of its own


# --------------------------------------------------------------------------------- groups and pairs
def test_08_pairs_identical_after_truncation_are_dropped_and_counted(codec):
    """The codec keeps 8 tokens of a JD; these two differ in the ninth word."""
    long = "cook night day now full part wanted driver"
    same = [Record("nurse", long + " day", True), Record("nurse", long + " night", False)]
    assert codec.jd(same[0].jd) == codec.jd(same[1].jd)
    assert make_groups(same, codec) == ([], 1)

    groups, dropped = make_groups(same + [Record("nurse", "cook", False)], codec)
    assert dropped == 1 and len(groups) == 1
    assert groups[0].accepted == [True, False]          # the comparison with the third JD remains
    assert groups[0].rows == [(codec.prompt("nurse"), codec.jd(long)),
                              (codec.prompt("nurse"), codec.jd("cook"))]


def test_08_no_identical_pair_is_left_whatever_the_group(codec):
    """Every way to accept or reject six JDs, of which the first three are the same after
    truncation."""
    long = "cook night day now full part wanted driver"
    jds = [long + " day", long + " now", long + " night", "cook", "day", "cook day"]
    for answers in itertools.product([True, False], repeat=6):
        groups, dropped = make_groups([Record("nurse", jd, yes)
                                       for jd, yes in zip(jds, answers)], codec)
        assert all(g.rows[i] != g.rows[j]
                   for g in groups for i, j in reward.comparisons(g.accepted))
        assert all(reward.comparisons(g.accepted) for g in groups)  # no group without a comparison
        assert (dropped > 0) == (any(answers[:3]) and not all(answers[:3]))


def test_08_pairs_that_differ_are_all_kept(codec):
    records = [Record("nurse", "night", True), Record("nurse", "day", False),
               Record("cook", "day", True)]
    groups, dropped = make_groups(records, codec)
    row = {r: (codec.prompt(r.cv), codec.jd(r.jd)) for r in records}
    assert dropped == 0
    assert [g.accepted for g in groups] == [[True, False], [False, True]]   # of CV nurse; of JD day
    assert [g.rows for g in groups] == [[row[records[0]], row[records[1]]],
                                        [row[records[1]], row[records[2]]]]


def test_decision_groups_are_those_of_a_cv_or_a_jd_with_both_answers():
    records = [Record("a", "1", True), Record("a", "2", False), Record("b", "2", True),
               Record("b", "3", True)]
    # CV a: 0, 1. CV b: accepted only. JD 1 and 3: a single decision. JD 2: 1, 2.
    assert reward.decision_groups(records) == [[0, 1], [1, 2]]
    # A text that is a CV here and a JD there binds nothing.
    assert reward.decision_groups([Record("a", "b", True), Record("b", "a", False)]) == []


def test_comparisons_are_all_accepted_rejected_pairs():
    assert reward.comparisons([True, False, True, False]) == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert reward.comparisons([True, True]) == []


def test_subsample_keeps_both_answers_and_no_row_twice():
    # One accepted among twenty.
    group = reward.Group([[i] for i in range(20)], [i == 13 for i in range(20)])
    for seed in range(20):
        part = reward.subsample(group, 4, generator(seed))
        assert len(part.rows) == len({row[0] for row in part.rows}) == 4
        assert part.accepted == [row[0] == 13 for row in part.rows] and sum(part.accepted) == 1
    assert reward.subsample(group, 20, generator(0)) is group
