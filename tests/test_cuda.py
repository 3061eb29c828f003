"""On a GPU: the same numbers as on the CPU, to the precision of float32 or of bf16."""
import pytest
import torch

import ppo
import sft
from data import pad_right
from model import LoRA, add_lora, copy_trainable, generate
from plumbing.stage import autocast, generator
from reward import Group, batch_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
CUDA = torch.device("cuda")


def test_cuda_computes_what_the_cpu_computes(policy, prompts):
    ids, _ = pad_right(prompts)
    expected = policy(ids)                                                          # [B, T, V]
    policy.to(CUDA)
    torch.testing.assert_close(policy(ids.to(CUDA)).cpu(), expected, atol=1e-4, rtol=1e-3)
    with autocast(CUDA):
        rounded = policy(ids.to(CUDA)).float().cpu()
    error = (rounded - expected).std() / expected.std()
    assert 1e-4 < error < 0.03                      # bf16: it is used, and its precision is kept


def test_greedy_jds_on_cuda_are_those_of_the_cpu(policy, prompts):
    policy.to(CUDA)
    written = generate(policy, prompts, 6, temperature=0)
    policy.cpu()
    assert written == generate(policy, prompts, 6, temperature=0)


@pytest.mark.parametrize("lora", [False, True])
def test_the_first_ratio_is_1_on_cuda(policy, reference, reward_model, critic, prompts, codec,
                                      lora):
    """Under autocast, and with a base in bf16 beside adapters in float32."""
    if lora:
        policy.to(torch.bfloat16)
        add_lora(policy, LoRA("base", 4, 8, "all-linear"))
        for name, p in policy.named_parameters():
            if name.endswith("lora_B.weight"):
                torch.nn.init.normal_(p, std=0.1)
        reference = copy_trainable(policy)
    for model in (policy, reference, reward_model):
        model.to(CUDA)
    flags = ppo.PPOFlags(episodes=12, minibatch=4)
    rollout, log = ppo.roll_out(policy, reference, reward_model, critic, prompts, codec, flags,
                                0.05, generator(0, "cuda", device=CUDA), CUDA)
    tokens = float(rollout.mask.sum())
    with autocast(CUDA):
        part = rollout.rows(torch.arange(4))
        loss, sums = ppo.minibatch_loss(policy, part, flags, tokens)
    loss.backward()
    assert sums["ratio_mean"] / float(part.mask.sum()) == pytest.approx(1, abs=1e-3)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    assert not lora or abs(log["kl"]) < 1e-3        # the reference is a copy


def test_the_gradients_of_stages_1_and_2_on_cuda(policy, reward_model, prompts, codec):
    jds = [codec.jd("wanted nurse night"), codec.jd("wanted cook now")]
    examples = [sft.Example(prompt, jds[i % 2]) for i, prompt in enumerate(prompts)]
    groups = [Group([(prompt, jd) for jd in jds], [True, False]) for prompt in prompts]

    def gradients(device):
        for model in (policy, reward_model):
            model.zero_grad()
            model.to(device)
        loss, tokens, _ = sft.sft_loss(policy, None, examples, device)
        (loss / tokens).backward()
        ranking, pooled, _, _ = batch_loss(reward_model, None, groups, device)
        (ranking + pooled).backward()
        return [torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])
                for model in (policy, reward_model)]
    for on_cpu, on_cuda in zip(gradients(torch.device("cpu")), gradients(CUDA)):
        assert torch.cosine_similarity(on_cpu, on_cuda, dim=0) > 0.99
