"""The bug hunt: a copy of the project with one planted fault of the kind that real RLHF code had.

    python girl.py bughunt DIR [--case K]

The copy has no tests. `bash check.sh` in it runs the tests that must pass once the fault is mended,
and then says what the fault does, and where it was seen.
"""
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from learn.copies import HOME, copy_project
from plumbing.files import BadInput

HIDDEN = ".check"


class Case(NamedTuple):
    file: str
    right: str
    wrong: str
    tests: tuple            # names in tests/: they fail with the fault
    command: str            # how it shows
    does: str
    seen: str


DEMO = "bash train.sh --demo"
PPO = "test_ppo.py::"
CASES = [
    Case("ppo.py", "rewards = -beta * kl * mask", "rewards = +beta * kl * mask",
         (PPO + "test_16_a_higher_beta_pulls_the_policy_nearer_to_the_reference",), DEMO,
         "The policy is rewarded for its KL, not charged: it is driven away from the SFT model, "
         "and the KL explodes. At first the reward even rises, where the reward model is wrong.",
         "Which sign is right is asked again and again (huggingface/trl issue 463, "
         "nebuly-ai/optimate issue 298)."),
    Case("ppo.py", "used = whiten(advantages, mask)", "used = whiten(-advantages, mask)",
         (PPO + "test_25_the_best_text_becomes_likelier_and_the_worst_less_likely",), DEMO,
         "Good texts become less likely, and bad ones likelier: reward and truth fall.",
         "A flipped reward once trained GPT-2 overnight to write what people liked least (Ziegler "
         "et al., 'Fine-tuning GPT-2 from human preferences', OpenAI, 2019)."),
    Case("ppo.py", "return torch.max(-advantages * ratio,", "return torch.min(-advantages * ratio,",
         (PPO + "test_25_policy_loss_is_the_masked_mean_of_the_clipped_objective",), DEMO,
         "The smaller of the two losses is taken: nothing stops the policy from leaving the clip "
         "range in the direction that pays, and a step in the wrong direction is not taken back.",
         "The paper maximizes a minimum (equation 7 of arXiv 1707.06347); with the sign flipped it "
         "is a maximum, which is easily overlooked."),
    Case("ppo.py", "last = mask.sum(1) - 1 ", "last = mask.sum(1) - 4 ",
         (PPO + "test_17_the_score_lies_inside_the_masks_of_value_return_and_advantage",), DEMO,
         "The score is paid three tokens before the end: the last tokens, with the end-of-text "
         "among them, get no credit, and the trace shows the reward at the wrong place.",
         "In TRL's PPO the score stood one token after the end-of-text (huggingface/trl issues "
         "1893 and 3750)."),
    Case("ppo.py", "    return (x - mean) * torch.rsqrt", "    return (x + mean) * torch.rsqrt",
         (PPO + "test_22_whitened_advantages_have_masked_mean_0_and_variance_1",), DEMO,
         "The mean is added, not subtracted: all advantages are shifted the same way, so that good "
         "and bad texts may both become likelier. **We know of no figure that shows it** here, "
         "where the mean is small.",
         "Some code adds the mean back on purpose, for rewards (`shift_mean=False` in "
         "huggingface/trl, from openai/lm-human-preferences): for advantages it must not."),
    Case("ppo.py", "    mean = masked_mean(x, mask)\n    variance", "    mean = x.mean()\n    "
                                                                    "variance",
         (PPO + "test_22_whitened_advantages_have_masked_mean_0_and_variance_1",), DEMO,
         "The zeros at pads count in the mean, so that the advantages are not centred. **We know "
         "of no figure that shows it** here, where the texts have about the same length.",
         "NovaSky-AI/SkyRL issue 1305: a plain mean beside a masked variance."),
    Case("ppo.py", "codec.max_jd, flags.temperature, generator=generator)",
         "codec.max_jd, 0.5, generator=generator)",
         (PPO + "test_10_rollout_asks_for_the_full_distribution_at_its_temperature",), DEMO,
         "The texts are drawn at temperature 0.5, and their probabilities are computed at 1: "
         "they are not samples of the policy. The reward begins high, and the estimate of the KL "
         "no longer estimates it.",
         "Rollout and KL at other temperatures: OpenRLHF/OpenRLHF pull request 853; top-k and "
         "other settings of sampling make the KL negative: huggingface/trl issues 235 and 736."),
    Case("ppo.py", "            ref_logp, _ = evaluate_policy(reference, part,",
         "            ref_logp, _ = evaluate_policy(policy, part,",
         (PPO + "test_11_temperature_divides_the_logits_of_rollout_reference_and_update",), DEMO,
         "The reference is the policy itself, so the KL is always 0, and beta has no effect.",
         "In lucidrains/PaLM-rlhf-pytorch issue 41 the KL is taken to the policy of the rollout, "
         "not to the SFT model."),
    Case("model.py", "positions = (mask.cumsum(1) - 1)",
         "positions = (torch.ones_like(mask).cumsum(1) - 1)",
         (PPO + "test_02_prompts_are_left_padded_and_positions_are_the_same_in_rollout_"
          "and_update",),
         "bash train.sh --smoke",
         "Positions count the pads on the left, too. **We know of no figure that shows it** in "
         "generation: rotary positions only depend on differences, and these stay. With learned "
         "positions, as in GPT-2, it would ruin generation. (Stage 2, which has pads between "
         "prompt and JD, would train with wrong distances.)",
         "OpenRLHF/OpenRLHF issue 217; huggingface/trl issues 469 and 6800."),
    Case("ppo.py", "log_ratio = ((logp - part.logp)", "log_ratio = ((part.logp - logp)",
         (PPO + "test_25_policy_loss_is_the_masked_mean_of_the_clipped_objective",), DEMO,
         "The ratio is upside down: at the first step it is 1 all the same, but its gradient has "
         "the wrong sign, so bad texts become likelier.",
         "Old and new are easily swapped; the first ratio does not tell, its gradient does."),
    Case("ppo.py", "return torch.randperm(n, generator=generator).split(size)",
         "return torch.arange(n).split(size)",
         (PPO + "test_29_every_epoch_is_a_fresh_permutation_with_each_episode_once",), DEMO,
         "Every epoch has the same minibatches in the same order. **We know of no figure that "
         "shows it** here, where the episodes of a rollout are random CVs anyway; where they are "
         "sorted, it would.",
         "A loader that is not shuffled, or shuffled with a fixed seed, is a classic."),
    Case("ppo.py", "return loss.sum() / tokens_in_step", "return loss.sum() / part.mask.sum()",
         (PPO + "test_30_gradient_accumulation_equals_the_big_batch",),
         "bash train.sh --demo --out RUN; rm -r RUN/ppo; "
         "python girl.py ppo --demo --run RUN --accumulate 8",
         "Each micro-batch is divided by its own tokens, so that eight parts make eight times the "
         "gradient, and short texts count more. Adam hides the factor; without --accumulate "
         "nothing is wrong. **We know of no figure that shows it**; compare the gradients with and "
         "without --accumulate.",
         "huggingface/transformers pull request 34191 (2024), ml-explore/mlx-lm pull request "
         "1544."),
    Case("sft.py", "is_target = in_jd[:, 1:]  ",
         "is_target = in_jd[:, 1:] & in_jd.roll(-1, 1)[:, 1:]  ",
         ("test_sft.py::test_sft_loss_is_on_the_jd_and_its_end_only",),
         "bash train.sh --quick",
         "The end-of-text is not in the loss: the model never learns to stop. Its samples run on "
         "to the limit, and the stage says so.",
         "Where pad and end-of-text are one token, masking the pads masks the end: "
         "huggingface/trl issue 976, deepseek-ai/DeepSeek-Coder issue 163."),
    Case("sft.py", "is_target = in_jd[:, 1:]  ", "is_target = (at < lengths[:, None])[:, 1:]  ",
         ("test_sft.py::test_sft_loss_is_on_the_jd_and_its_end_only",),
         "bash train.sh --quick",
         "The prompt's tokens are in the loss: the model learns to write CVs, too. The valid NLL "
         "is much higher (0.39, not 0.30, in the quick run), because it is no longer that of a JD. "
         "PPO's figures are as good.",
         "Whether prompts are masked is a flag in most libraries, and a silent default in some."),
    Case("ppo.py", "torch.full_like(scores, cut_off_score))",
         "torch.full_like(scores, -cut_off_score))",
         (PPO + "test_14_a_cut_off_response_gets_the_penalty_instead_of_its_score",),
         "bash train.sh --smoke",
         "A text without its end gets +3 instead of -3. In the smoke run, where hardly a text "
         "ends, the reward shows it at once. In the quick run, where nearly all end, the policy "
         "did not find it out, and no figure shows it.",
         "A penalty that never applied: huggingface/trl issue 6805."),
    Case("ppo.py", "states = hidden[before_each_token(rollout)]",
         "states = hidden.roll(-1, 1)[before_each_token(rollout)]",
         (PPO + "test_12_logits_and_values_stand_one_position_before_each_response_token",), DEMO,
         "The critic sees the token that it values, so the advantages have lost what the token "
         "itself did: reward and truth rise less far than they should.",
         "Values at the wrong index: huggingface/trl issue 44, verl-project/verl issue 1758."),
    Case("ppo.py", "returns = returns_to_go(rewards, mask, flags.gamma)",
         "returns = whiten(advantages, mask) + values    ",
         (PPO + "test_21_the_critic_is_fitted_to_returns_that_are_not_whitened_and_know_no_value",),
         DEMO,
         "The critic is fitted to returns made of whitened advantages: their scale is not that of "
         "the rewards, so its values are wrong. **We know of no figure that shows it** here.",
         "In what order to whiten and to compute returns is easily mixed up, since both loops "
         "run over the same tensors."),
    Case("ppo.py", "at = positions - rollout.prompt_lengths[:, None] + 1 ",
         "at = positions - rollout.prompt_lengths[:, None] + 0 ",
         (PPO + "test_12_logits_and_values_stand_one_position_before_each_response_token",), DEMO,
         "The probability of a token is read from the state at the token, which predicts the next "
         "one. So it is tiny, and the update follows noise. The critic's states are shifted, too.",
         "lucidrains/PaLM-rlhf-pytorch issue 31."),
]


def plant(source, case):
    """The source with the fault. A comment at the end of the line stays in its column, so that the
    layout does not give the fault away."""
    if source.count(case.right) != 1:
        raise BadInput(f"{HOME / case.file}: was edited; {case.right!r} is not in it once")
    lines = source.splitlines(keepends=True)
    faulty = source.replace(case.right, case.wrong).splitlines(keepends=True)
    for i, (line, wrong) in enumerate(zip(lines, faulty)):
        if line != wrong and "  # " in line:
            code, comment = wrong.split("  # ")
            faulty[i] = f"{code.rstrip():<{line.index('  # ')}}  # {comment}"
    return "".join(faulty)


def make_case(folder, number):
    """`bughunt`: a copy with the fault of this number, or of a random one."""
    if number is not None and not 1 <= number <= len(CASES):
        raise BadInput(f"bughunt: --case {number} must be from 1 to {len(CASES)}")
    number = number or random.SystemRandom().randint(1, len(CASES))
    case, folder = CASES[number - 1], copy_project(folder, HIDDEN)
    for path in (HOME / "tests").glob("*.py"):
        (folder / HIDDEN / "tests").mkdir(exist_ok=True)
        shutil.copy(path, folder / HIDDEN / "tests" / path.name)
    (folder / HIDDEN / "case").write_text(f"{number}\n")
    shutil.rmtree(folder / "learn")
    (folder / case.file).write_text(plant((folder / case.file).read_text(), case))
    (folder / "check.sh").write_text(
        "#!/usr/bin/env bash\n# Is the fault mended?\n"
        f'cd "$(dirname "$0")/{HIDDEN}"\nexec "{sys.executable}" -m learn.bughunt\n')
    (folder / "TASK.md").write_text(
        "# One line of this code is wrong\n\nFind it by what it does: run\n\n"
        f"    {case.command.replace('RUN', 'runs/demo')}\n\n"
        "and look at the lines that it prints, at metrics.csv, at the report (`python girl.py "
        "report --run RUN`)\nand at the trace (`python girl.py trace --run RUN`): does each number "
        "stand at the token that it belongs to?\nThe demonstration says what leaves the healthy "
        "ranges; demo/healthy.json has them all. One seed may leave\nthem by chance, so try "
        "`--seed 1 --out runs/seed1`, too.\n\n"
        "The fault is in model.py, sft.py or ppo.py. Six of the eighteen faults show in no figure: "
        "if nothing looks wrong,\nread the code function by function, and try it on cases made by "
        "hand. Then mend it, and ask\n\n    bash check.sh\n\n"
        "(The lessons, the labs and the tests are not in this copy.)\n")
    print(f"{folder}: one line is wrong. Read {folder / 'TASK.md'}")


def is_mended(folder, case):
    """Do the case's tests pass with the code in `folder`? Returns that, and pytest's last lines."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / "girl"
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns(HIDDEN, "runs", ".venv"))
        shutil.copytree(folder / HIDDEN / "learn", work / "learn")
        shutil.copytree(folder / HIDDEN / "tests", work / "tests")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p",
                   "no:cacheprovider", *(f"tests/{name}" for name in case.tests)]
        found = subprocess.run(command, cwd=work, capture_output=True, text=True)
    return found.returncode == 0, found.stdout + found.stderr


def main():
    folder = Path.cwd().parent
    number = int((folder / HIDDEN / "case").read_text())
    case = CASES[number - 1]
    well, output = is_mended(folder, case)
    if "No module named pytest" in output:
        print("the check needs pytest: pip install pytest")
        return 2
    if not well:
        print("not mended yet: a test that finds the fault still fails")
        return 1
    print(f"mended (case {number}).\n\n{case.does}\n\n{case.seen}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
