"""What CUDA changes: the device, and bf16 autocast. Where there is no GPU, bf16 is tried on the
CPU."""
import pytest
import torch

import ppo
import reward
import sft
from data import pad_right
from model import LoRA, add_lora, copy_trainable, generate
from plumbing.stage import generator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICE = CUDA if torch.cuda.is_available() else CPU


def bf16(device):
    """stage.autocast on CUDA; the same on a CPU."""
    return torch.autocast(device.type, torch.bfloat16)


def test_bf16_is_used_and_keeps_its_precision(policy, prompts):
    ids, _ = pad_right(prompts)
    expected = policy(ids)                                                          # [B, T, V]
    policy.to(DEVICE)
    with bf16(DEVICE):
        rounded = policy(ids.to(DEVICE)).float().cpu()
    assert 1e-4 < (rounded - expected).std() / expected.std() < 0.03


@pytest.mark.skipif(DEVICE == CPU, reason="no CUDA here: it was not compared with the CPU")
def test_cuda_computes_and_writes_what_the_cpu_does(policy, prompts):
    """In float32."""
    ids, _ = pad_right(prompts)
    expected, written = policy(ids), generate(policy, prompts, 6, temperature=0)    # [B, T, V]
    policy.to(CUDA)
    torch.testing.assert_close(policy(ids.to(CUDA)).cpu(), expected, atol=1e-4, rtol=1e-3)
    assert generate(policy, prompts, 6, temperature=0) == written


@pytest.mark.parametrize("lora", [False, True])
def test_the_first_ratio_is_1(policy, reference, reward_model, critic, prompts, codec, lora,
                              monkeypatch):
    """Under autocast, and with a base in bf16 beside adapters in float32."""
    monkeypatch.setattr(ppo, "autocast", bf16)
    if lora:
        policy.to(torch.bfloat16)
        add_lora(policy, LoRA("base", 4, 8, "all-linear"))
        for name, p in policy.named_parameters():
            if name.endswith("lora_B.weight"):
                torch.nn.init.normal_(p, std=0.1)
        reference = copy_trainable(policy)
    for model in (policy, reference, reward_model):
        model.to(DEVICE)
    flags = ppo.PPOFlags(episodes=12, minibatch=4)
    rollout, log = ppo.roll_out(policy, reference, reward_model, critic, prompts, codec, flags,
                                0.05, generator(0, "bf16", device=DEVICE), DEVICE)
    tokens = float(rollout.mask.sum())
    with bf16(DEVICE):
        part = rollout.rows(torch.arange(4))
        loss, sums = ppo.minibatch_loss(policy, part, flags, tokens)
    loss.backward()
    assert sums["ratio_mean"] / float(part.mask.sum()) == pytest.approx(1, abs=1e-3)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    assert not lora or abs(log["kl"]) < 1e-3        # the reference is a copy


def test_the_gradients_of_stages_1_and_2_are_nearly_those_of_float32(
        policy, reward_model, prompts, codec, monkeypatch):
    jds = [codec.jd("wanted nurse night"), codec.jd("wanted cook now")]
    examples = [sft.Example(prompt, jds[i % 2]) for i, prompt in enumerate(prompts)]
    groups = [reward.Group([(prompt, jd) for jd in jds], [True, False]) for prompt in prompts]

    def gradients(device):
        for model in (policy, reward_model):
            model.zero_grad()
            model.to(device)
        loss, tokens, _ = sft.sft_loss(policy, None, examples, device)
        (loss / tokens).backward()
        ranking, pooled, _, _ = reward.batch_loss(reward_model, None, groups, device)
        (ranking + pooled).backward()
        return [torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])
                for model in (policy, reward_model)]
    expected = gradients(CPU)
    for module in (sft, reward):
        monkeypatch.setattr(module, "autocast", bf16)
    for exact, rounded in zip(expected, gradients(DEVICE)):
        assert 0.99 < torch.cosine_similarity(exact, rounded, dim=0)
        assert not torch.equal(exact, rounded)
