"""Memory and FLOPs of one PPO iteration, from a model's sizes and the flags (`ppo --plan`)."""
import math

from model import cache_size, logits_size, rows_that_fit

TEMPLATE = 32               # about so many tokens of the prompt surround the CV


def plan(c, flags, rank=0, targets=(), frozen_bytes=4):
    """Parameters, memory in bytes by part, and FLOPs of an iteration, from a Config and PPOFlags
    alone. rank 0: all weights are trained. Else adapters are trained beside these layers, and each
    number of the one frozen base takes `frozen_bytes`.

    Every text is counted at its budget: T tokens of prompt and JD, R of JD. The reward model is
    counted with as many blocks as the policy. Autocast keeps some activations in float32 beside a
    bf16 base. These are counted at `frozen_bytes` too, so activations come out a little too small.
    """
    C, L, V = c.hidden_size, c.num_hidden_layers, c.vocab_size
    HD, KD = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    F = c.intermediate_size
    shapes = {"q_proj": (C, HD), "k_proj": (C, KD), "v_proj": (C, KD), "o_proj": (HD, C),
              "gate_proj": (C, F), "up_proj": (C, F), "down_proj": (F, C)}
    blocks, head = L * sum(i * o for i, o in shapes.values()), V * C
    gains = (2 * L + 1) * C + L * (c.qkv_bias * (HD + 2 * KD) + c.qk_norm * 2 * c.head_dim)
    total = blocks + gains + head * (1 if c.tie_word_embeddings else 2)
    adapters = L * sum(rank * sum(shapes[t]) for t in targets)
    trained = adapters if rank else total

    # 1. Memory.
    R, T = c.max_jd_tokens, c.max_cv_tokens + c.max_jd_tokens + TEMPLATE
    rows = math.ceil(flags.minibatch / flags.accumulate)
    kept = kept_per_token(c, rank, targets)
    numbers = L * C + kept if flags.checkpointing else L * kept
    if rank:
        weights = frozen_bytes * total + 4 * 3 * adapters
    else:                   # the reward model has no head over the vocabulary
        weights = 4 * (3 * total - (0 if c.tie_word_embeddings else head))
    caches = rows_that_fit(flags.episodes, cache_size(c, T)) * cache_size(c, T)
    # The critic's inputs. While it turns them into float64, they take five times this memory.
    states = flags.episodes * R * C
    memory = {"weights": weights, "gradients": 4 * trained, "Adam": 8 * trained,
              "activations": frozen_bytes * rows * T * numbers, "logits": 4 * rows * logits_size(c),
              "rollout": 4 * max(caches + states, 5 * states)}
    update = memory["gradients"] + memory["activations"] + memory["logits"]
    memory["peak"] = memory["weights"] + memory["Adam"] + max(update, memory["rollout"])

    # 2. FLOPs: forward, 2 for each weight and token; backward, as many for the inputs, and again as
    # many for the weights if they are trained.
    B, attention = flags.episodes, 2 * T * HD * L           # attention: of a token, on average
    forward, scores = T * (2 * blocks + attention), R * 2 * head
    backward = (1 if rank else 2) * (forward + scores) + (forward if flags.checkpointing else 0)
    flops = {"rollout": B * (forward + scores), "scoring": B * (3 * forward + 2 * scores),
             "update": flags.ppo_epochs * B * (forward + scores + backward)}
    flops["iteration"] = sum(flops.values())
    return {"tokens": T, "micro-batch": rows, "parameters": total, "trained": trained,
            "memory": memory, "flops": flops}


def kept_per_token(c, rank, targets):
    """The numbers that autograd keeps of one block for each token, as counted on the CPU in
    float32. Frozen gains and layers without an adapter do not keep their inputs."""
    C, F, heads = c.hidden_size, c.intermediate_size, c.num_attention_heads + c.num_key_value_heads
    if rank:
        inputs = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv",
                  "gate_proj": "mlp", "up_proj": "mlp"}
        kept_inputs = {inputs[t] for t in targets if t in inputs}
        kept = (2 + len(kept_inputs)) * C + (3 + ("down_proj" in targets)) * F
        kept += rank * len(targets)
    else:
        kept = 6 * C + 4 * F
    return kept + (2 + c.qk_norm * (1 if rank else 2)) * heads * c.head_dim


def print_plan(c, flags, rank, targets):
    """Full fine-tuning and LoRA side by side, for one model."""
    columns = {"all weights": plan(c, flags), f"LoRA, rank {rank}": plan(c, flags, rank, targets),
               "base in bf16 (CUDA)": plan(c, flags, rank, targets, frozen_bytes=2)}
    first = columns["all weights"]
    print(f"{flags.episodes} episodes of {first['tokens']} tokens, {c.max_jd_tokens} of them "
          f"generated; micro-batches of {first['micro-batch']}; "
          f"checkpointing {'on' if flags.checkpointing else 'off'}")
    print(f"{'':<28}" + "".join(f"{name:>20}" for name in columns))
    for name in ("parameters", "trained"):
        cells = [f"{column[name] / 1e6:.1f} M" for column in columns.values()]
        print(f"{name:<28}" + "".join(f"{text:>20}" for text in cells))
    for part, unit, size in (("memory", "GB", 1e9), ("flops", "TFLOP", 1e12)):
        for name in first[part]:
            cells = [f"{column[part][name] / size:.2f} {unit}" for column in columns.values()]
            print(f"{part + ', ' + name:<28}" + "".join(f"{text:>20}" for text in cells))
