"""Does each test notice the fault that it is there for? RLHF code goes wrong in small ways, and
trains on all the same. Here is a list of such ways, and the test that must fail for each.

    python tests/mutants.py            all of them, some minutes; ends in  killed N of M
    python tests/mutants.py 24 31      those of these statements (test_NN_... decides statement NN;
                                       0: the recommender, 34: the faults of the bug hunt)

It works in a copy of the project, and is not part of test.sh. To add one: break a line by hand, see
which test fails, and write it down. If none does, there is a test to write first.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from learn.bughunt import CASES

# test: [(statement, file, as it stands, as it is broken, the fault in words)]
MUTANTS = {
    # ------------------------------------------------------------------- tokens and reward model
    "test_ppo.py::test_01_masks_come_from_lengths_not_ids": [
        (1, "ppo.py", "torch.arange(tokens.shape[1]) < lengths[:, None]", "tokens.ne(0)",
         "a pad id in a text is taken for a pad")],
    "test_ppo.py::test_01_generate_hides_no_end_of_text_where_pad_is_end_of_text": [
        (1, "model.py", "ids, mask = ids.to(device), mask.to(device)",
         "mask[:, :P] &= ids != c.pad_token_id; ids, mask = ids.to(device), mask.to(device)",
         "the prompt's own pad ids are hidden in generation")],
    "test_ppo.py::"
    "test_02_prompts_are_left_padded_and_positions_are_the_same_in_rollout_and_update": [
        (2, "model.py", "positions = (mask.cumsum(1) - 1)",
         "positions = (torch.ones_like(mask).cumsum(1) - 1)", "positions count pads on the left"),
        (2, "model.py", "ids[b, P - len(prompt):] =", "ids[b, :len(prompt)] =",
         "prompts stand on the left, their mask on the right")],
    "test_ppo.py::test_03_more_padding_on_either_side_changes_no_logits": [
        (3, "model.py", "(causal & mask[:, None, None, :]) | itself", "causal | itself",
         "pads on the left are looked at")],
    "test_reward.py::test_03_more_padding_changes_no_reward_score": [
        (3, "model.py", "asked=at == lengths[:, None] - 1",
         "asked=at == lengths[:, None].clamp(min=ids.shape[1]) - 1",
         "the score is read at a pad")],
    "test_reward.py::test_04_score_is_read_at_the_last_real_token": [
        (4, "model.py", "asked=at == lengths[:, None] - 1",
         "asked=at == ids.ne(0).cumsum(1).argmax(1)[:, None]",
         "the last token that is no pad id is taken for the last real one")],
    "test_reward.py::test_04_scores_come_back_in_the_order_of_the_rows": [
        (4, "reward.py", "scores[part] = model(", "scores[sorted(part)] = model(",
         "scores come back in another order than their texts")],
    "test_reward.py::test_05_ranking_loss_is_minus_log_sigmoid_of_the_difference": [
        (5, "reward.py", "F.logsigmoid(chosen - rejected)", "F.logsigmoid(rejected - chosen)",
         "what was rejected is preferred")],
    "test_reward.py::test_05_equal_scores_are_not_right": [
        (5, "reward.py", "(chosen > rejected)", "(chosen >= rejected)",
         "a model that says the same of everything is right everywhere")],
    "test_reward.py::test_05_the_gradient_is_that_of_the_objective_by_hand": [
        (5, "reward.py", "((loss + pooled_loss) / n +", "((loss + pooled_loss) / n_rows +",
         "comparisons are averaged over rows"),
        (5, "reward.py", "(loss + pooled_loss)", "(loss + pooled_loss.detach())",
         "the pooled loss is computed, and not learned from")],
    "test_reward.py::test_06_head_starts_with_std_one_over_sqrt_d_plus_1_and_no_bias": [
        (6, "model.py", "math.sqrt(c.hidden_size + 1)", "math.sqrt(c.hidden_size)", "1/sqrt(d)"),
        (6, "model.py", "self.score = nn.Linear(c.hidden_size, 1, bias=False)",
         "self.score = nn.Linear(c.hidden_size, 1)", "the head has a bias, which no export keeps")],
    "test_reward.py::test_07_scale_is_folded_into_the_head_and_centre_kept_in_the_config": [
        (7, "reward.py", "model.score.weight /= std", "pass", "the scale is not folded in"),
        (7, "reward.py", "float(raw.mean()) / std", "float(raw.mean())",
         "the centre is in units of the old scale")],
    "test_reward.py::test_08_pairs_identical_after_truncation_are_dropped_and_counted": [
        (8, "reward.py", "accepted[k] or row not in chosen]", "accepted[k] or row]",
         "identical pairs are kept")],
    # ------------------------------------------------------------------------------------ rollout
    "test_ppo.py::test_09_no_dropout_anywhere": [
        (9, "model.py", "return x + self.mlp(self.post_attention_layernorm(x))",
         "return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), 0.1, self.training)",
         "dropout: two passes disagree")],
    "test_ppo.py::test_10_rollout_asks_for_the_full_distribution_at_its_temperature": [
        (10, "ppo.py", "codec.max_jd, flags.temperature, generator=generator)",
         "codec.max_jd, flags.temperature, 0.95, generator=generator)", "top-p in the rollout")],
    "test_ppo.py::test_11_temperature_divides_the_logits_of_rollout_reference_and_update": [
        (11, "ppo.py", "logp, entropy = evaluate_policy(policy, part, flags.temperature)",
         "logp, entropy = evaluate_policy(policy, part, 1.0)",
         "the update forgets the temperature"),
        (11, "ppo.py", "evaluate_policy(reference, part, flags.temperature)",
         "evaluate_policy(reference, part, 1.0)", "the reference forgets the temperature")],
    "test_ppo.py::test_12_logits_and_values_stand_one_position_before_each_response_token": [
        (12, "ppo.py", "rollout.prompt_lengths[:, None] + 1 ", "rollout.prompt_lengths[:, None] ",
         "logits are read where the token itself can be seen"),
        (12, "ppo.py", "states = hidden[before_each_token(rollout)].float()",
         "states = hidden.roll(-1, 1)[before_each_token(rollout)].float()",
         "values are read where the token itself can be seen"),
        (12, "ppo.py", "to_rows(states, rollout).cumsum(1)",
         "to_rows(states, rollout).roll(-1, 1).cumsum(1)",
         "a value knows the token that it is the baseline for"),
        (12, "ppo.py", "parts.append((logp, ref_logp, *scored))",
         "parts.append((logp, ref_logp, *scored[:2], "
         "to_rows(response_states(policy.model, part), part)))",
         "the critic reads the policy's states, which move")],
    "test_ppo.py::test_12_a_value_depends_on_no_later_token": [
        (12, "ppo.py", "states = hidden[before_each_token(rollout)].float()",
         "states = (hidden + hidden.mean(1, keepdim=True))[before_each_token(rollout)].float()",
         "a value knows the whole text"),
        (12, "ppo.py", "to_rows(states, rollout).cumsum(1)",
         "to_rows(states, rollout).flip(1).cumsum(1).flip(1)",
         "a value knows the tokens that come")],
    "test_ppo.py::test_13_after_the_first_end_of_text_all_is_pad_and_masked": [
        (13, "ppo.py", "torch.arange(tokens.shape[1]) < lengths[:, None]",
         "torch.arange(tokens.shape[1]) < lengths[:, None] - 1", "end-of-text is masked out")],
    "test_ppo.py::test_13_what_stands_in_pads_changes_no_loss_and_no_mean": [
        (13, "ppo.py", 'part.advantages, flags.clip) * part.mask', 'part.advantages, flags.clip)',
         "pads are learned from")],
    "test_ppo.py::test_14_a_cut_off_response_gets_the_penalty_instead_of_its_score": [
        (14, "ppo.py", "torch.full_like(scores, cut_off_score))", "scores + cut_off_score)",
         "the penalty comes on top of the score")],
    "test_ppo.py::test_14_the_penalty_is_the_one_that_the_flags_name": [
        (14, "ppo.py", "codec.eos, flags.cut_off_score)", "codec.eos, -3.0)", "a fixed penalty")],
    "test_ppo.py::test_15_reference_and_reward_model_are_bit_identical_before_and_after": [
        (15, "ppo.py", "reference = copy_trainable(policy).eval().requires_grad_(False)",
         "reference = policy", "the reference moves with the policy")],
    # --------------------------------------------------------------------- rewards and advantages
    "test_ppo.py::test_16_token_rewards_add_up_to_score_minus_beta_kl": [
        (16, "ppo.py", "last] += scores", "last] = scores", "the last token's KL is lost")],
    "test_ppo.py::test_16_a_higher_beta_pulls_the_policy_nearer_to_the_reference": [
        (16, "ppo.py", "token_rewards(scores, kl, mask, price)",
         "token_rewards(scores, -kl, mask, price)",
         "beta drives the policy away from the reference")],
    "test_ppo.py::test_17_the_score_lies_inside_the_masks_of_value_return_and_advantage": [
        (17, "ppo.py", "last = mask.sum(1) - 1", "last = mask.sum(1).clamp(max=mask.shape[1] - 1)",
         "the score stands on the first pad")],
    "test_ppo.py::test_17_the_critic_is_fitted_also_where_the_score_stands": [
        (17, "ppo.py", "x = F.pad(sums[mask],",
         "mask = mask & (mask.cumsum(1) < mask.sum(1, keepdim=True)); x = F.pad(sums[mask],",
         "the fit leaves out the last token, which has the score")],
    "test_ppo.py::test_18_k1_and_k3_average_to_the_exact_kl": [
        (18, "ppo.py", "return torch.exp(-d) - 1 + d", "return d ** 2 / 2", "k2, which is biased")],
    "test_ppo.py::test_19_a_persistently_negative_kl_is_a_fault": [
        (19, "ppo.py", "mean < -2 * error", 'all(x["kl"] < -2 * x["kl_error"] for x in last)',
         "a small negative KL is never reported"),
        (19, "ppo.py", "mean < -2 * error", "mean < 0", "noise is reported")],
    "test_ppo.py::test_19_kl_error_is_the_standard_error_of_the_mean_of_the_texts": [
        (19, "ppo.py", "unbiased=False) / math.sqrt(len(prompts))", "unbiased=False)",
         "the spread of the texts is taken for the error of their mean")],
    "test_ppo.py::test_20_gae_equals_brute_force_double_sum": [
        (20, "ppo.py", "gamma * lam * next_advantage", "gamma * next_advantage",
         "lambda is left out"),
        (20, "ppo.py", "torch.zeros_like(rewards), 0.0, 0.0",
         "torch.zeros_like(rewards), 0.0, values[:, -1]", "a value after the end")],
    "test_ppo.py::test_20_the_rollout_discounts_as_the_flags_say": [
        (20, "ppo.py", "flags.gamma, flags.lam)", "flags.lam, flags.gamma)", "swapped")],
    "test_ppo.py::test_21_returns_are_the_discounted_sums_of_the_rewards_to_come": [
        (21, "ppo.py", "mask, gamma, 1.0)", "mask, gamma, 0.95)", "what comes late counts less"),
        (21, "ppo.py", "mask, gamma, 1.0)", "mask, 1.0, 1.0)", "the discount is left out")],
    "test_ppo.py::"
    "test_21_the_critic_is_fitted_to_returns_that_are_not_whitened_and_know_no_value": [
        (21, "ppo.py", "returns = returns_to_go(rewards, mask, flags.gamma)",
         "returns = whiten(advantages, mask) + values", "the critic learns whitened numbers"),
        (21, "ppo.py", "returns = returns_to_go(rewards, mask, flags.gamma)",
         "returns = advantages + values",
         "the critic learns its own values, where lambda is not 1")],
    "test_ppo.py::test_22_whitened_advantages_have_masked_mean_0_and_variance_1": [
        (22, "ppo.py", "    mean = masked_mean(x, mask)\n", "    mean = x.mean()\n",
         "pads pull at the mean")],
    "test_ppo.py::test_23_rewards_are_not_whitened": [
        (23, "ppo.py", "gae(rewards, values, mask, flags.gamma, flags.lam)",
         "gae(whiten(rewards, mask), values, mask, flags.gamma, flags.lam)",
         "rewards are whitened"),
        (23, "ppo.py", "token_rewards(scores, kl, mask, price)",
         "token_rewards(scores, kl, mask, flags.kl_coef)", "beta stays the first")],
    "test_ppo.py::test_23_advantages_are_whitened_over_the_rollout_not_the_minibatch": [
        (23, "ppo.py", "policy_loss(log_ratio, part.advantages,",
         "policy_loss(log_ratio, whiten(part.advantages, part.mask),", "whitened per minibatch")],
    # ------------------------------------------------------------------------------------- update
    "test_ppo.py::test_24_cached_rollout_and_uncached_update_give_the_same_log_probabilities": [
        (24, "model.py", "scores.masked_fill(~visible, -torch.inf).softmax(-1)",
         "scores.softmax(-1)", "a new token looks at pads"),
        (24, "model.py", "self.k[rows], self.v[rows]", "self.k[:len(rows)], self.v[:len(rows)]",
         "rows that go on read the cache of others")],
    "test_ppo.py::test_24_first_minibatch_has_ratio_1_with_learning_rate_0_every_one": [
        (24, "ppo.py", "scores=scores, logp=logp,", "scores=scores, logp=ref_logp,",
         "the ratio is against the reference")],
    "test_ppo.py::test_25_policy_loss_is_the_masked_mean_of_the_clipped_objective": [
        (25, "ppo.py", "return torch.max(-adv", "return torch.min(-adv", "min for max"),
        (25, "ppo.py", "part.advantages, flags.clip)", "part.advantages, 0.2)", "a fixed clip")],
    "test_ppo.py::test_25_the_best_text_becomes_likelier_and_the_worst_less_likely": [
        (25, "ppo.py", "used = whiten(", "used = -whiten(", "the sign is turned")],
    "test_ppo.py::test_26_the_critic_is_the_least_squares_fit_over_the_real_tokens": [
        (26, "ppo.py", "(0, 1), value=1.0)", "(0, 1), value=0.0)", "a critic without a bias")],
    "test_ppo.py::test_26_what_stands_in_pads_changes_nothing_in_the_fit": [
        (26, "ppo.py", "x = F.pad(sums[mask],",
         "mask = torch.ones_like(mask); x = F.pad(sums[mask],", "pads are fitted, too")],
    "test_ppo.py::test_26_a_rollout_counts_0_7_of_the_one_after_it": [
        (26, "ppo.py", "self.xy = self.KEPT * self.xy", "self.xy = self.xy",
         "of the two sums only one forgets"),
        (26, "ppo.py", "KEPT, RIDGE = 0.7,", "KEPT, RIDGE = 0.0,",
         "all rollouts but the last are forgotten")],
    "test_ppo.py::test_26_the_ridge_keeps_the_solution_finite_and_is_small": [
        (26, "ppo.py", "KEPT, RIDGE = 0.7, 1e-2", "KEPT, RIDGE = 0.7, 0.0", "no ridge"),
        (26, "ppo.py", "ridge[-1] = 0", "pass", "the bias is shrunk, too"),
        (26, "ppo.py", "KEPT, RIDGE = 0.7, 1e-2", "KEPT, RIDGE = 0.7, 1.0",
         "values shrink toward 0")],
    "test_ppo.py::test_26_the_critic_predicts_the_returns_of_new_rollouts_better_than_their_mean": [
        (26, "ppo.py", "@ weight[:-1] + weight[-1]", "@ -weight[:-1] + weight[-1]",
         "the sign is turned")],
    "test_ppo.py::test_27_the_values_of_a_rollout_come_from_the_fit_before_it": [
        (27, "ppo.py", "values = critic.values(sums) * mask",
         "critic.fit(sums, returns_to_go(rewards, mask, flags.gamma), mask); "
         "values = critic.values(sums) * mask", "a value knows its own return"),
        (27, "ppo.py", "explained_variance(values, advantages + values, mask)",
         "explained_variance(critic.values(sums), advantages + values, mask)",
         "the variance that is explained is that of the fit's own data")],
    "test_ppo.py::test_27_before_iteration_1_"
    "the_critic_reads_a_rollout_of_the_sft_model_that_is_not_trained_on": [
        (27, "ppo.py",
         'new_rollout(draw_cvs(cvs, flags, generator(seed, "ppo", "critic")), "critic")',
         "pass",
         "iteration 1 has no critic")],
    "test_ppo.py::test_27_the_critic_moves_no_state_and_no_weight_of_the_reward_model": [
        (27, "ppo.py", "reward_model.eval().requires_grad_(False)", "reward_model.eval()",
         "the reward model could be trained")],
    "test_ppo.py::test_27_the_reward_model_may_be_of_another_size": [
        (27, "ppo.py", "Critic(reward_model.config", "Critic(policy.config", "the policy's size")],
    "test_weights.py::"
    "test_the_critic_reads_the_states_of_the_reward_model_s_adapters_not_of_the_policy_s": [
        (27, "ppo.py", "parts.append((logp, ref_logp, *scored))",
         "parts.append((logp, ref_logp, *scored[:2], "
         "to_rows(response_states(policy.model, part), part)))",
         "the policy's adapters for the critic")],
    "test_trace.py::test_a_kept_iteration_equals_its_row_of_metrics_bit_for_bit": [
        (0, "ppo.py", "stage.keep(i + 1, beta=controller.beta)", "stage.keep(i + 1, "
                                                                 "beta=flags.kl_coef)",
         "the beta that is kept is that of iteration 1"),
        (0, "plumbing/stage.py", "self.modules, self.optimizers, self.saved_at = modules, "
                                 "optimizers,",
         "self.modules, self.optimizers, self.saved_at = modules, optimizers[:0],",
         "the optimizer is not kept")],
    "test_trace.py::test_what_is_shown_of_a_text_adds_up": [
        (0, "measure/trace.py", "mask, flags.gamma, 0.0)", "mask, flags.gamma, flags.lam)",
         "delta is the advantage"),
        (0, "measure/trace.py", '"whitened": one.advantages', '"whitened": advantages',
         "the advantages shown as whitened are not")],
    "test_trace.py::test_the_ratio_is_1_before_the_update_and_moves_with_each_step": [
        (0, "measure/trace.py", "ratios = [self.ratios(rollout, episode)]", "ratios = []",
         "the ratio before the update is not shown")],
    "test_resume.py::"
    "test_an_iteration_of_ppo_that_was_cut_short_is_done_again_from_the_state_before_it": [
        (27, "ppo.py", '{"policy": policy, "critic": critic}',
         '{"policy": policy, "critic": Critic(critic.xx.shape[0] - 1)}',
         "the critic forgets all that it knew when a run goes on"),
        (0, "girl.py", '0 if name == "ppo" else args.save_seconds', "args.save_seconds",
         "PPO's iterations are not saved"),
        (27, "ppo.py", '"bias": weight[-1:].contiguous()', '"bias": 0 * weight[-1:]',
         "another head is saved than was fitted")],
    "test_ppo.py::test_28_adam_eps_is_1e_5_and_the_learning_rate_falls_linearly_to_0": [
        (28, "ppo.py", "lr=flags.lr, eps=1e-5)", "lr=flags.lr)", "Adam's own eps"),
        (28, "ppo.py", "torch.optim.Adam(", "torch.optim.AdamW(", "weight decay toward 0"),
        (28, "ppo.py", "(1 - i / flags.iterations)", "1", "the rate does not fall")],
    "test_ppo.py::test_29_every_epoch_is_a_fresh_permutation_with_each_episode_once": [
        (29, "ppo.py", "torch.randperm(n, generator=generator).split(size)",
         "torch.randperm(n, generator=generator)[:n - n % size].split(size)", "the rest is lost")],
    "test_ppo.py::test_29_every_iteration_draws_anew": [
        (29, "ppo.py", 'generator(seed, "ppo", i)', 'generator(seed, "ppo")', "the same CVs again"),
        (29, "ppo.py", 'generator(seed, "ppo-sample", when,', 'generator(seed, "ppo-sample",',
         "the same noise in every rollout")],
    "test_ppo.py::test_30_no_gradient_is_left_from_the_step_before": [
        (30, "ppo.py", "        optimizer.zero_grad()\n", "", "gradients pile up")],
    "test_ppo.py::test_30_each_step_counts_its_own_real_tokens": [
        (30, "ppo.py", "rollout.mask[minibatch].sum()", "len(minibatch)", "long texts count more")],
    "test_ppo.py::test_30_gradient_accumulation_equals_the_big_batch": [
        (30, "ppo.py", "loss.sum() / tokens_in_step",
         "loss.sum() / part.mask.sum() / flags.accumulate", "a mean of means")],
    "test_sft.py::test_the_gradient_is_that_of_the_objective_by_hand": [
        (30, "sft.py", "(loss / tokens", "(loss / len(batch)", "by text, not by token")],
    "test_ppo.py::test_31_adaptive_kl_controller_by_hand": [
        (31, "ppo.py", "min(max(kl / self.target - 1, -0.2), 0.2)", "kl / self.target - 1",
         "the error is not clipped")],
    "test_ppo.py::test_31_the_controller_is_told_the_kl_of_a_text_and_the_number_of_texts": [
        (31, "ppo.py", 'update(log["kl"], len', 'update(log["approx_kl"], len', "the update's KL"),
        (31, "ppo.py", 'log["kl"], len(chosen))', 'log["kl"], flags.episodes)', "another n")],
    "test_ppo.py::test_32_log_softmax_is_in_float32": [
        (32, "ppo.py", "lm.lm_head(states).float()", "lm.lm_head(states)", "in bf16")],
    "test_ppo.py::test_32_log_ratio_is_bounded": [
        (32, "ppo.py", "* part.mask).clamp(-20, 20)", "* part.mask)", "exp overflows")],
    "test_ppo.py::test_32_gradients_are_clipped": [
        (32, "ppo.py", "flags.max_grad_norm)", "1.0)", "a fixed largest norm")],
    "test_ppo.py::test_32_a_gradient_that_is_not_finite_is_not_silently_skipped": [
        (32, "ppo.py", 'raise NotFinite("the gradient is not finite")', "continue",
         "a bad step is skipped")],
    "test_ppo.py::test_33_means_of_the_update_are_those_of_the_real_tokens": [
        (33, "ppo.py", '(means["ratio_mean"] - 1) ** 2', "0", "the variance is around 1")],
    "test_ppo.py::test_33_means_of_the_rollout_are_those_of_the_texts": [
        (33, "ppo.py", "variance(targets - values) /", "variance(values) /",
         "the critic's own variance")],
    "test_ppo.py::test_33_the_true_match_is_that_of_each_cv_and_its_own_jd": [
        (33, "ppo.py", "sum(map(true_match, chosen, texts))",
         "sum(map(true_match, sorted(chosen), texts))", "the JDs of other CVs are judged")],
    # --------------------------------------------------- 0, no statement on PPO: the recommender
    "test_recommend.py::test_logistic_regression_finds_its_minimum_and_is_held_by_few_labels": [
        (0, "measure/recommend.py", "(hold * (weights - start) ** 2).sum() / 2", "0",
         "nothing is held"),
        (0, "measure/recommend.py", 'labels.double(), reduction="sum")', "labels.double())",
         "the start counts as much with many labels as with few")],
    "test_recommend.py::test_the_gate_is_learned_from_labels_kept_apart": [
        (0, "measure/recommend.py", "logistic(both[val], labels[val],", "logistic(both, labels,",
         "labels that were fitted decide the gate")],
    "test_recommend.py::test_the_gate_follows_what_the_written_jd_is_worth": [
        (0, "measure/recommend.py", "(0.1, 3.0, 3.0))", "(0.1, 3.0, 3000.0))",
         "the gate cannot fall")],
    "test_recommend.py::test_the_gate_of_few_labels_kept_apart_is_near_what_all_labels_say": [
        (0, "measure/recommend.py", "(0.0, 1.0, float(alone[1]))", "(0.0, 1.0, 0.0)",
         "a few labels alone decide the gate")],
    "test_recommend.py::"
    "test_a_jd_is_compared_with_the_mean_of_the_first_k_written_jds_or_with_nothing": [
        (0, "measure/recommend.py", "[:, :k].mean(1)[cv]", ".mean(1)[cv]",
         "all written JDs, for any k"),
        (0, "measure/recommend.py", 'if mode == "none":', 'if mode == "nobody":',
         "`none` is not told apart")],
    "test_recommend.py::test_features_that_carry_the_label_help_and_noise_does_not": [
        (0, "measure/recommend.py", "a * on_test + g * similar[mode] + b",
         "a * on_test - g * similar[mode] + b", "the gate is turned around"),
        (0, "measure/recommend.py", "similarity(encoded, sample, *mode), labels, val)",
         "similarity(encoded, sample, *mode), labels.flip(0), val)",
         "the gate learns from other labels")],
}
for number, case in enumerate(CASES, 1):
    for test in case.tests:
        MUTANTS.setdefault(test, []).append(
            (34, case.file, case.right, case.wrong, f"bug hunt, case {number}"))


def stale():
    """What no longer fits the project: tests that are not there, lines that do not stand once."""
    for test, mutants in MUTANTS.items():
        file, name = test.split("::")
        if f"\ndef {name}(" not in (HERE / "tests" / file).read_text():
            yield f"no such test: {test}"
        for _, file, old, new, _ in mutants:
            if (n := (HERE / file).read_text().count(old)) != 1 or old == new:
                yield f"{file}: stands there {n} times: {old!r}"


def pytest(folder, *tests):
    """(exit code, output): 0 all passed, 1 some failed, 2 and more: they could not run."""
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *(f"tests/{test}" for test in tests)], cwd=folder, env=env,
                          capture_output=True, text=True)
    return done.returncode, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("statements", nargs="*", type=int, help="only the mutants of these")
    asked = parser.parse_args().statements
    if found := list(stale()):
        sys.exit("\n".join(found))
    chosen = [(test, *mutant) for test, mutants in MUTANTS.items() for mutant in mutants
              if not asked or mutant[0] in asked]
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in ("tests", "measure", "plumbing"):
            shutil.copytree(HERE / part, f"{folder}/{part}",
                            ignore=shutil.ignore_patterns("__pycache__"))
        for path in HERE.glob("*.py"):
            shutil.copy(path, folder)
        code, said = pytest(folder, *{test for test, *_ in chosen})
        if code:
            sys.exit(f"{said}\nthe tests fail before anything is broken")
        for test, statement, file, old, new, fault in chosen:
            path = Path(folder, file)
            whole = path.read_text()
            path.write_text(whole.replace(old, new))
            code, _ = pytest(folder, test)
            path.write_text(whole)
            verdict = {0: f"SURVIVED {test}", 1: "killed"}.get(code, f"DOES NOT RUN {test}")
            killed += code == 1
            print(f"{statement:2d}  {file:20s}  {fault}: {verdict}", flush=True)
    print(f"killed {killed} of {len(chosen)}")
    sys.exit(killed < len(chosen))


if __name__ == "__main__":
    main()
