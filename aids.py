"""What the paper does not have: what a small model needs, and one saving of time. RESULTS.md shows
what each of these buys.

    Optimizer               stages 1 and 2: Muon for the matrices of the blocks
    start_small             stage 1: the weights that a small model starts with
    reading_loss            stages 1 and 2: does the CV hold this token of the JD, too?
    add_averaging_block     stage 2: one more block for the reward model
    mean_states             stage 2: what the pooled loss scores
    jd_states               stage 2 reads each prompt once: a step takes 0.85 times as long

Two more are where they work: merges across spaces in data.train_tokenizer, and hard negatives, JDs
that nobody would post, in market.spoil.

Shapes: B rows, N different prompts, P tokens of the longest prompt, R of the longest JD, C hidden
size, H query heads, K key-value heads, D size of a head, V vocabulary.
"""
import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import pad_right
from model import Block


# ------------------------------------------------------------------------------- stages 1 and 2
class Muon(torch.optim.Optimizer):
    """For matrices (Jordan 2024, kellerjordan.github.io/posts/muon): makes each update orthogonal,
    so that all directions of a matrix are learned at the same pace.

    torch.optim.Muon does the same in bf16. A CPU without instructions for bf16 must imitate it: on
    one, a step of stage 1 took 0.26 s with that, and takes 0.09 s in float32."""

    MOMENTUM, STEPS = 0.95, 3

    def __init__(self, matrices, lr):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        for p in (p for p in group["params"] if p.grad is not None):
            rows, columns = p.shape
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = state["momentum_buffer"].lerp_(p.grad, 1 - self.MOMENTUM)
            update = orthogonal(p.grad.lerp(momentum, self.MOMENTUM), self.STEPS)   # Nesterov's
            p -= group["lr"] * max(1, rows / columns) ** 0.5 * update


def orthogonal(matrix, steps):
    """Newton-Schulz: moves all singular values towards 1 and keeps the singular vectors. Jordan's
    coefficients are fast rather than exact. (With torch's own, three steps instead of the usual
    five were 5% faster, at the cost of a valid NLL of 0.383 instead of 0.379, one short run each.)
    """
    rows, columns = matrix.shape
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.T if rows > columns else x            # so that x x' is the smaller of the two squares
    for _ in range(steps):
        xx = x @ x.T
        change = torch.addmm(xx, xx, xx, beta=-4.7750, alpha=2.0315)    # -4.775 xx + 2.0315 xx xx
        x = torch.addmm(x, change, x, beta=3.4445)                      # 3.4445 x + change x
    return x.T if rows > columns else x


class Optimizer:
    """Muon for the matrices of the transformer's blocks, AdamW for the rest (embeddings, norms,
    heads), or for all if `matrix_lr` is 0. Both follow one schedule."""

    def __init__(self, model, flags, steps):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for name, p in trained.items()
                    if p.dim() == 2 and ".layers." in name and flags.matrix_lr]
        is_matrix = set(map(id, matrices))
        rest = [p for p in trained.values() if id(p) not in is_matrix]
        self.parameters, self.flags, self.steps = matrices + rest, flags, steps
        adamw = torch.optim.AdamW(rest, lr=flags.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers, self.peak_lrs = [adamw], [flags.lr]
        if matrices:
            self.optimizers = [Muon(matrices, flags.matrix_lr), adamw]
            self.peak_lrs = [flags.matrix_lr, flags.lr]

    def clip(self):
        """Scale the gradients down to the largest norm that the flags allow. Returns the norm that
        they had."""
        return float(nn.utils.clip_grad_norm_(self.parameters, self.flags.max_grad_norm))

    def step(self, step):
        """Set the learning rates of this step (0 to steps - 1), update, and clear the gradients."""
        factor = lr_factor(step, self.steps, self.flags.warmup)
        for optimizer, peak_lr in zip(self.optimizers, self.peak_lrs):
            optimizer.param_groups[0]["lr"] = peak_lr * factor
            optimizer.step()
            optimizer.zero_grad()


def lr_factor(step, steps, warmup):
    """Factor on the learning rate: linear warm-up, then half a cosine, which is 0 after the last
    step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


# -------------------------------------------------------------------------------------- stage 1
@torch.no_grad()
def start_small(model, used):
    """Set the weights from which a small language model soon learns to copy. `used`: the tokens
    that occur in its texts."""
    c = model.config
    # A logit is at most |final state| |embedding|, and impossible tokens need far lower ones, or
    # they get sampled now and then. The final norm's gain learns slowly, so it starts large.
    # Embeddings learn fast, so they start small: otherwise the first logits would be large, and the
    # first two hundred steps would only make them smaller.
    model.model.norm.weight *= 8
    nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    # Tokens that no text has (mostly halves of merges) start at zero: random ones would be sampled
    # now and then, and spoil a JD.
    unused = torch.ones(c.vocab_size, dtype=torch.bool)
    unused[sorted(used)] = False
    model.model.embed_tokens.weight[unused] = 0
    # Half of the key heads (rounded down, but at least one) start equal to the first query head of
    # their group: a token then attends to tokens like itself, which is how one text is found in
    # another (Trockman and Kolter 2023, arXiv 2305.09828).
    for attention in (layer.self_attn for layer in model.model.layers):
        rows = max(1, attention.K // 2) * attention.D
        queries = attention.q_proj.weight.view(attention.K, -1, attention.D, c.hidden_size)
        first_of_group = queries[:, 0].reshape(-1, c.hidden_size)                   # [K D, C]
        attention.k_proj.weight[:rows] = first_of_group[:rows]


def reading_loss(reader, states, rows):
    """Cross-entropy of "the prompt holds this token, too" (the CV and a few template tokens),
    averaged over the JD tokens of a row, then over the rows. The last of a JD's n tokens has
    another target, with weight 1 + 1/n: the share of the earlier tokens that the prompt holds.
    0 without a reader.

    states [tokens, C]: the hidden states of all JD tokens, row after row."""
    if reader is None:
        return torch.zeros(())
    held = [torch.isin(torch.tensor(jd), torch.tensor(prompt)).float() for prompt, jd in rows]
    weights = [torch.full((len(row),), 1 / len(row)) for row in held]
    for row, weight in zip(held, weights):
        row[-1] = row[:-1].sum() / max(len(row) - 1, 1)
        weight[-1] += 1
    held = torch.cat(held).to(states.device)                                        # [tokens]
    weights = torch.cat(weights).to(states.device)                                  # [tokens]
    logits = reader(states).squeeze(-1).float()                                     # [tokens]
    loss = F.binary_cross_entropy_with_logits(logits, held, weights, reduction="sum")
    return loss / len(rows)


# -------------------------------------------------------------------------------------- stage 2
@torch.no_grad()
def add_averaging_block(model, gain=10.0):
    """Add a block to a reward model whose body is a language model's. The language model is
    never trained to predict a token from end-of-text, so its state there summarizes the text
    poorly.

    The block starts as an average, and training improves it. Zero queries attend to all tokens
    equally, orthogonal values and their transposed outputs pass the states on unchanged (if there
    are fewer key than query heads, a projection of them), and `gain` outweighs the last token's own
    state. The MLP starts at zero."""
    layers = model.config.num_hidden_layers + 1
    c = model.config = model.model.config = replace(model.config, num_hidden_layers=layers)
    block = Block(c)
    a = block.self_attn
    nn.init.zeros_(a.q_proj.weight)
    nn.init.normal_(a.k_proj.weight, std=c.hidden_size ** -0.5)
    nn.init.orthogonal_(a.v_proj.weight)                                            # [K D, C]
    values = a.v_proj.weight.view(a.K, a.D, -1)                                     # [K, D, C]
    values = values.repeat_interleave(a.H // a.K, dim=0).reshape(a.H * a.D, -1)     # [H D, C]
    a.o_proj.weight.copy_(gain * a.K / a.H * values.T)                              # [C, H D]
    for up in (block.mlp.gate_proj, block.mlp.up_proj):
        nn.init.normal_(up.weight, std=c.hidden_size ** -0.5)
    nn.init.zeros_(block.mlp.down_proj.weight)
    model.model.layers.append(block)


def mean_states(states, mask):
    """The mean over the real tokens of each row. The pooled loss scores it, so that each token's
    state learns what the token adds to the score. states [B, R, C], mask [B, R] -> [B, C]."""
    return (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]


class PromptCache:
    """One layer's keys and values of prompts that are read once and continued by several rows each.
    Gradients pass."""

    def append(self, k, v):
        self.k, self.v = k, v
        return k, v


class BranchCache:
    """One layer's cache for rows that continue such prompts: row b continues prompt owner[b]."""

    def __init__(self, prompts, owner):
        self.prompts, self.owner = prompts, owner

    def append(self, k, v):
        # Not prompts.k[owner]: on a CPU its backward adds with atomics in the order in which
        # threads arrive, so two runs would differ in their last bits.
        k = torch.cat((self.prompts.k.index_select(0, self.owner), k), dim=2)       # [B, K, P+R, D]
        v = torch.cat((self.prompts.v.index_select(0, self.owner), v), dim=2)
        return k, v


def jd_states(body, rows, device):
    """(prompt, JD) rows -> the final state of each JD's last token [B, C]; for all JD tokens the
    normed state that enters the last block [B, R, C]; and which of these are real tokens [B, R].

    Each different prompt is read once, however many JDs follow it."""
    index_of = {}
    owner = [index_of.setdefault(tuple(prompt), len(index_of)) for prompt, _ in rows]
    owner = torch.tensor(owner, device=device)                                      # [B]
    prompts, prompt_lengths = (x.to(device) for x in pad_right(list(index_of)))     # [N, P], [N]
    jds, jd_lengths = (x.to(device) for x in pad_right([jd for _, jd in rows]))     # [B, R], [B]
    at_prompt = torch.arange(prompts.shape[1], device=device)                       # [P]
    at_jd = torch.arange(jds.shape[1], device=device)                               # [R]
    in_prompt = at_prompt < prompt_lengths[:, None]                                 # [N, P]
    in_jd = at_jd < jd_lengths[:, None]                                             # [B, R]

    prompt_caches = [PromptCache() for _ in body.layers]
    # No state of a prompt is needed, only keys and values: the last block skips its MLP.
    body(prompts, caches=prompt_caches, asked=torch.zeros_like(in_prompt))
    caches = [BranchCache(cache, owner) for cache in prompt_caches]
    caught = []                             # the states that enter the last block
    hook = body.layers[-1].register_forward_pre_hook(lambda block, args: caught.append(args[0]))
    mask = torch.cat((in_prompt[owner], in_jd), dim=1)                              # [B, P + R]
    last = body(jds, mask, caches, asked=at_jd == jd_lengths[:, None] - 1)       # [B, C]
    hook.remove()
    return last, body.norm(caught[0]), in_jd
