"""What the paper does not have and a small model needs. RESULTS.md says what each of these buys.

    Optimizer               Muon for the matrices of the blocks
    start_small             the weights that a model of stage 1 starts with
    reading_loss            which tokens of the JD does the CV hold? A second loss for stage 1
    add_averaging_block     one more block for the reward model
    jd_states               stage 2 reads each prompt once: its step takes 0.85 of the time

Two more stand where they work: merges across spaces in data.train_tokenizer, and JDs that nobody would post in market.spoil.

Shapes: B rows, N different prompts, P tokens of the longest prompt, R of the longest JD, C hidden size, H query heads, K key-value heads, D size of a head, V vocabulary.
"""
import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import pad_right
from model import Block


class Optimizer:
    """Muon for the matrices of the transformer's layers, AdamW for the rest (embeddings, norms, heads), or for all where
    `matrix_lr` is 0; with one schedule over both: linear warm-up, then a half cosine down to 0.

    Muon (Jordan 2024, kellerjordan.github.io/posts/muon) makes each update of a matrix orthogonal, so that all its
    directions are learned at the same pace. In our trials its loss fell a little sooner than that of AdamW alone.
    Three Newton-Schulz steps instead of the usual five: 5% faster, and a valid NLL of 0.383 instead of 0.379 (one
    short run each)."""

    def __init__(self, model, flags, steps):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for n, p in trained.items() if p.dim() == 2 and ".layers." in n and flags.matrix_lr]
        chosen = set(map(id, matrices))
        rest = [p for p in trained.values() if id(p) not in chosen]
        self.parameters, self.flags, self.steps = matrices + rest, flags, steps
        self.parts = [(torch.optim.AdamW(rest, lr=flags.lr, betas=(0.9, 0.95), weight_decay=0.0), flags.lr)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=flags.matrix_lr, weight_decay=0.0, ns_steps=3)
            self.parts.insert(0, (muon, flags.matrix_lr))

    def clip(self):
        """Shorten the gradients to the largest norm that the flags allow; returns the norm that they had."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.flags.max_grad_norm))

    def step(self, step):
        """Set the learning rates of step 0..steps-1, update, and clear the gradients."""
        factor = cosine(step, self.steps, self.flags.warmup)
        for part, peak in self.parts:
            part.param_groups[0]["lr"] = peak * factor
            part.step()
            part.zero_grad()


def cosine(step, steps, warmup):
    """Factor on the learning rate: linear warm-up, then a half cosine down to 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@torch.no_grad()
def start_small(model, used):
    """Weights from which a small language model soon learns to copy. `used`: the tokens that its texts have."""
    c = model.config
    # The largest logit is |final state| |embedding|. Whatever cannot come next must stay far below it, or samples slip now
    # and then; and norms grow slowly, so they start large. Embeddings grow fast, so they start small: else the first logits
    # would be large too, and the first two hundred steps would do nothing but make them smaller.
    model.model.norm.weight *= 8
    nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    # Tokens that no text has (the halves of merges, mostly) start at zero: random ones would be drawn now and then, and spoil
    # a JD.
    unused = torch.ones(c.vocab_size, dtype=torch.bool)
    unused[sorted(used)] = False
    model.model.embed_tokens.weight[unused] = 0
    # Up to half of the heads start with equal queries and keys: a token then looks for its like, which is how one text is
    # found in another (Trockman and Kolter 2023, arXiv 2305.09828).
    for attention in (layer.self_attn for layer in model.model.layers):
        rows = max(1, attention.K // 2) * attention.D
        queries = attention.q_proj.weight.view(attention.K, -1, attention.D, c.hidden_size)[:, 0]       # first of each group
        attention.k_proj.weight[:rows] = queries.reshape(-1, c.hidden_size)[:rows]


def reading_loss(reader, states, rows):
    """Cross-entropy of "the CV holds this token too", mean over the JD tokens of a row, then over
    the rows. The last of a JD's n tokens is asked something else instead, with the weight 1 + 1/n:
    which share of the tokens before it does the CV hold?

    states [tokens, C]: the hidden states of all JD tokens, row after row."""
    held = [torch.isin(torch.tensor(jd), torch.tensor(prompt)).float() for prompt, jd in rows]
    weights = [torch.full((len(row),), 1 / len(row)) for row in held]
    for row, weight in zip(held, weights):
        row[-1], weight[-1] = row[:-1].sum() / max(len(row) - 1, 1), 1 + weight[-1]
    held, weights = torch.cat(held).to(states.device), torch.cat(weights).to(states.device)  # [tokens], [tokens]
    logits = reader(states).squeeze(-1).float()                                              # [tokens]
    return F.binary_cross_entropy_with_logits(logits, held, weights, reduction="sum") / len(rows)


@torch.no_grad()
def add_averaging_block(model, gain=10.0):
    """One more block for a reward model whose body comes from a language model: there end-of-text was hardly ever asked for
    anything, and its state holds little of what the tokens before it know.

    The block starts as an average, and training makes a better one of it. Zero queries look at all tokens alike, orthogonal
    values and their transposed outputs hand their states on unchanged, and `gain` outweighs what the last token itself brings.
    The MLP starts at zero."""
    c = model.config = model.model.config = replace(model.config, num_hidden_layers=model.config.num_hidden_layers + 1)
    block = Block(c)
    a = block.self_attn
    nn.init.zeros_(a.q_proj.weight)
    nn.init.normal_(a.k_proj.weight, std=c.hidden_size ** -0.5)
    nn.init.orthogonal_(a.v_proj.weight)                                                     # [K D, C]
    values = a.v_proj.weight.view(a.K, a.D, -1).repeat_interleave(a.H // a.K, dim=0)         # [H, D, C]
    a.o_proj.weight.copy_(gain * a.K / a.H * values.reshape(a.H * a.D, -1).T)                # [C, H D]
    for up in (block.mlp.gate_proj, block.mlp.up_proj):
        nn.init.normal_(up.weight, std=c.hidden_size ** -0.5)
    nn.init.zeros_(block.mlp.down_proj.weight)
    model.model.layers.append(block)


# ------------------------------------------------------------------------------------ prompts that are read once
class SharedPrompts:
    """Keys and values of one layer for prompts that are read once and continued by several rows each; gradients pass."""

    def __init__(self):
        self.kept = None

    def append(self, k, v):
        self.kept = k, v
        return k, v


class Continued:
    """One layer's cache for the rows that continue such prompts: row b continues prompt owner[b]."""

    def __init__(self, prompts, owner):
        self.prompts, self.owner = prompts, owner

    def append(self, k, v):
        # Not past[owner]: its backward adds with atomics in whatever order the threads arrive, so that two runs would differ
        # in their last bits.
        return tuple(torch.cat((past.index_select(0, self.owner), now), dim=2) for past, now in zip(self.prompts.kept, (k, v)))


def jd_states(body, rows, device):
    """(prompt, JD) rows -> the hidden states of the JDs' last tokens [B, C].

    Each different prompt is read once, however many JDs go with it."""
    numbers = {}
    owner = torch.tensor([numbers.setdefault(tuple(prompt), len(numbers)) for prompt, _ in rows], device=device)     # [B]
    prompts, prompt_lengths = (x.to(device) for x in pad_right([list(p) for p in numbers]))  # [N, P], [N]
    jds, jd_lengths = (x.to(device) for x in pad_right([jd for _, jd in rows]))              # [B, R], [B]
    in_prompt = torch.arange(prompts.shape[1], device=device) < prompt_lengths[:, None]      # [N, P]
    in_jd = torch.arange(jds.shape[1], device=device) < jd_lengths[:, None]                  # [B, R]
    shared = [SharedPrompts() for _ in body.layers]
    # Of a prompt the last block computes keys and values only.
    body(prompts, caches=shared, asked=torch.zeros_like(in_prompt))
    continued = [Continued(layer, owner) for layer in shared]
    last = torch.arange(jds.shape[1], device=device) == jd_lengths[:, None] - 1             # [B, R]
    visible = torch.cat((in_prompt[owner], in_jd), dim=1)                    # [B, P + R]
    return body(jds, visible, continued, last)                               # [B, C]
