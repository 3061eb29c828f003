"""The transformer, its key-value cache and sampling, its heads and its adapters.

A decoder-only transformer as in Llama (Touvron et al. 2023, arXiv 2302.13971): pre-norm RMSNorm,
rotary positions, grouped-query attention, SwiGLU, tied or untied embeddings. The switches of
`Config` also make it Mistral, Qwen2 or Qwen3. Parameters have the names of the Hugging Face layout,
so other tools read our folders, and we read theirs.

Shapes: B rows of a batch, T tokens, S tokens with those of the cache before them, P tokens of the
longest prompt, N tokens whose states are asked for, C hidden size, H query heads, K key-value
heads, D size of a head, F feed-forward size, V vocabulary.

Left out: dropout (PPO compares log-probabilities of two passes, which must agree), sliding windows
(a Mistral with a window is used within it), mixtures of experts, quantised weights.
"""
import copy
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from plumbing.files import BadInput, NotFinite


@dataclass
class Config:
    """The sizes of a model, by the names of a Hugging Face `config.json`, and the switches of its
    family."""
    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 344
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int | None = None         # D; None: C / H
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # Llama 3.1's, see rotary_table
    qkv_bias: bool = False              # Qwen2: queries, keys and values have a bias
    qk_norm: bool = False               # Qwen3: queries and keys are normed, each head by itself
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    pad_token_id: int = 0
    eos_token_id: int | None = 1        # None: a pretrained model whose config names none
    max_cv_tokens: int = 96             # ours: the longest CV and JD in tokens, see data.Codec
    max_jd_tokens: int = 96
    keep_contacts: bool = False         # ours: True if contacts were left in its training texts

    def __post_init__(self):
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if min(C, H, K) < 1 or H % K or (self.head_dim is None and C % H):
            raise BadInput(f"num_attention_heads {H} must divide hidden_size {C}, and "
                           f"num_key_value_heads {K} must divide num_attention_heads")
        self.head_dim = self.head_dim or C // H
        if self.head_dim % 2:
            raise BadInput(f"the size of a head, {self.head_dim} (hidden_size / "
                           "num_attention_heads), must be even")


# ------------------------------------------------------------------------------ the transformer
class RMSNorm(nn.Module):
    """x / root mean square of x, times a learned gain (Zhang and Sennrich 2019, arXiv
    1910.07467)."""

    def __init__(self, C, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(positions, D, theta, scaling=None):
    """Cosines and sines of the angles position / theta^(2i/D), i = 0..D/2-1: two tensors
    [*positions.shape, D].

    Rotary embedding (Su et al. 2021, arXiv 2104.09864), in the Hugging Face order: coordinate i is
    paired with coordinate i + D/2, not with its neighbour i + 1. `scaling` is Llama 3.1's, from its
    published code. Pairs that turn fewer than low_freq_factor times within the original context
    turn `factor` times slower. Pairs that turn more than high_freq_factor times stay as they are.
    Between the two there is a ramp."""
    exponents = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D     # [D/2]
    frequencies = theta ** -exponents                                               # [D/2]
    if scaling:
        context = scaling["original_max_position_embeddings"]
        turns = context * frequencies / (2 * math.pi)                               # [D/2]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)                           # [D/2]
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    angles = positions[..., None].float() * frequencies                             # [..., D/2]
    angles = torch.cat((angles, angles), dim=-1)                                    # [..., D]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each coordinate pair of x [B, H, T, D] by its angle; cos, sin [T, D] or [B, 1, T, D]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.K, self.D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.D, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.K * self.D, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.K * self.D, bias=c.qkv_bias)
        self.o_proj = nn.Linear(self.H * self.D, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.D, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.D, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, visible, cache, asked=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.H, self.D))                  # [B, T, H, D]
        k = self.k_norm(self.k_proj(x).view(B, T, self.K, self.D))                  # [B, T, K, D]
        v = self.v_proj(x).view(B, T, self.K, self.D).transpose(1, 2)               # [B, K, T, D]
        q = rotate(q.transpose(1, 2), cos, sin)                                     # [B, H, T, D]
        k = rotate(k.transpose(1, 2), cos, sin)                                     # [B, K, T, D]
        if cache is not None:
            k, v = cache.append(k, v)                                               # [B, K, S, D]
        if T == 1 and visible is not None and x.device.type == "cpu":
            y = attend_once(q, k, v, visible)                                       # [B, H, 1, D]
        else:
            y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None,
                                               enable_gqa=self.H != self.K)         # [B, H, T, D]
        y = y.transpose(1, 2).reshape(B, T, self.H * self.D)                        # [B, T, H D]
        return self.o_proj(y if asked is None else y[asked])            # [B, T, C], asked: [N, C]


def attend_once(q, k, v, visible):
    """softmax(q k' / sqrt(D)) v for one query in each row, as in generation: q [B, H, 1, D], k and
    v [B, K, S, D], visible [B, 1, 1, S]. The query heads of a group are computed together.

    PyTorch's own attention is made for many queries. This one, with values stored in long rows (see
    Cache), writes 128 rows 1.08 to 1.19 times as fast on a CPU, with a model of C 128 and 4 blocks.
    Elsewhere autocast would round its scores to bf16, and double the error."""
    B, H, _, D = q.shape
    grouped = q.reshape(B, k.shape[1], -1, D)                                       # [B, K, H/K, D]
    scores = grouped @ k.transpose(2, 3) / math.sqrt(D)                             # [B, K, H/K, S]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)                  # [B, K, H/K, S]
    y = v.transpose(2, 3) @ weights.transpose(2, 3)                                 # [B, K, D, H/K]
    return y.transpose(2, 3).reshape(B, H, 1, D)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)                        # [B, T, F]
        return self.down_proj(hidden)                                               # [B, T, C]


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, visible, cache, asked=None):
        attended = self.self_attn(self.input_layernorm(x), cos, sin, visible, cache, asked)
        x = (x if asked is None else x[asked]) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Token ids to hidden states: the body of the language model and of the reward model."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.lora = None            # the LoRA of its layers, if they have one
        self.checkpointing = False  # in training keep the inputs of each block, recompute the rest
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # The matrices that write into the residual stream start smaller, so that its
                # variance does not grow with depth.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = c.initializer_range / (math.sqrt(2 * c.num_hidden_layers) if writes else 1)
                nn.init.normal_(p, std=std)

    def forward(self, ids, mask=None, caches=None, asked=None):
        """ids [B, T] -> hidden states [B, T, C], or [N, C] with `asked`.

        mask [B, T], True at real tokens: needed if rows are padded on the left, or if caches hold
        tokens before these (then [B, S]). Without it rows may be padded on the right only: real
        tokens come before the pads, so they never see them.

        caches: one for each block; `append(k, v)` takes the keys and values of these tokens and
        returns those of all tokens so far (Cache; PromptCache and BranchCache in aids.py).

        asked [B, T], True at the N tokens whose states are needed. They come as [N, C], row after
        row; for the others the last block stops after attention, without output projection and MLP.
        (With 6 blocks, stage 1 is 1.08 times as fast, stage 2 1.09.)"""
        positions, visible = positions_and_visible(ids, mask)
        cos, sin = rotary_table(positions, self.config.head_dim, self.config.rope_theta,
                                self.config.rope_scaling)
        x = self.embed_tokens(ids)                                                  # [B, T, C]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for i, layer in enumerate(self.layers):
            cache = caches[i] if caches else None
            inputs = x, cos, sin, visible, cache, asked if i == len(self.layers) - 1 else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return self.norm(x)                                             # [B, T, C], asked: [N, C]


def positions_and_visible(ids, mask):
    """The position of each token, and the tokens that it sees: [B, 1, T] and [B, 1, T, S]; without
    a mask [T] and None, which means itself and all before it. See Transformer.forward."""
    T = ids.shape[1]
    if mask is None:
        return torch.arange(T, device=ids.device), None
    S = mask.shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, None, -T:]                     # [B, 1, T]
    causal = torch.ones(T, S, dtype=torch.bool, device=ids.device).tril(S - T)      # [T, S]
    # A pad at the very left would see nothing, and give 0/0. So every token sees itself.
    itself = torch.eye(S, dtype=torch.bool, device=ids.device)[-T:]                 # [T, S]
    return positions, (causal & mask[:, None, None, :]) | itself


# ------------------------------------------------------------------------------------ two heads
class LanguageModel(nn.Module):
    """The generator G: a transformer and a head that gives the logits of the next token."""

    architecture = "ForCausalLM"

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = Transformer(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=c.initializer_range)

    def forward(self, ids, mask=None, caches=None):
        return self.lm_head(self.model(ids, mask, caches))                          # [B, T, V]


class RewardModel(nn.Module):
    """The reward model U: a transformer and a scalar head, read at the last real token of a row."""

    architecture = "ForSequenceClassification"

    def __init__(self, c, center=0.0, body=None):
        super().__init__()
        self.config = c
        self.model = body or Transformer(c)
        self.score = nn.Linear(c.hidden_size, 1, bias=False)
        # Stiennon et al. 2020, arXiv 2009.01325: std 1/sqrt(d + 1). No bias: it cancels in the
        # pairwise loss.
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(c.hidden_size + 1))
        self.center = center        # subtracted from every score; kept in config.json

    def forward(self, ids, lengths):
        """ids [B, T] padded on the right, lengths [B] -> scores [B]."""
        at = torch.arange(ids.shape[1], device=ids.device)                          # [T]
        return self.head(self.model(ids, asked=at == lengths[:, None] - 1))         # [B]

    def head(self, states):
        """States [..., C] -> scores [...]. In float32 also under autocast: bf16 has steps of 0.016
        between 2 and 4, so different JDs would get the same score."""
        with torch.autocast(states.device.type, enabled=False):
            return self.score(states.float()).squeeze(-1) - self.center


# ----------------------------------------------------------------------------------- generation
class Cache:
    """Keys and values of one layer for all tokens so far, in buffers that are allocated once. The
    values are stored transposed, [B, K, D, tokens]: a token then reads them in long rows, see
    attend_once."""

    def __init__(self, B, c, capacity, device, dtype):
        K, D = c.num_key_value_heads, c.head_dim
        self.k = torch.empty(B, K, capacity, D, device=device, dtype=dtype)
        self.v = torch.empty(B, K, D, capacity, device=device, dtype=dtype)
        self.used = 0

    def append(self, k, v):
        start, self.used = self.used, self.used + k.shape[2]
        self.k[:, :, start:self.used] = k
        self.v[..., start:self.used] = v.transpose(2, 3)
        if start == 0:
            return k, v                     # a prompt's, in the layout of PyTorch's attention
        return self.k[:, :, :self.used], self.v[..., :self.used].transpose(2, 3)

    def keep(self, rows):
        """Drop all rows but these."""
        self.k, self.v = self.k[rows], self.v[rows]


def rows_that_fit(most, floats_per_row):
    """Rows per batch, from 1 to `most`, so that together they need at most 1 GiB."""
    return max(1, min(most, 2 ** 28 // floats_per_row))


def cache_size(c, T):
    """Keys and values of T tokens, in numbers."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * T


def logits_size(c):
    """The logits of a JD, their log-softmax, and one more tensor of this size, in numbers."""
    return 3 * c.vocab_size * c.max_jd_tokens


def sample(logits, temperature=1.0, top_p=1.0, generator=None):
    """Draw one token per row from logits [B, V]: temperature 0 is greedy; `top_p` < 1 keeps the
    fewest tokens whose probabilities reach it (Holtzman et al. 2019, arXiv 1904.09751). Returns ids
    [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)                              # [B, V]
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)                         # [B, V] both
        # A token stays if the tokens before it have not reached top_p, so the first always stays.
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)                  # [B, V]
    # The inverse of the distribution function: the first token at which the sum reaches u, for u in
    # (0, sum]. So no token of probability 0 is drawn, and none past the end. (torch.multinomial
    # does the same, but on 128 rows of 2,600 it took 30 times as long on our CPU.)
    sums = probs.cumsum(-1)                                                         # [B, V]
    u = 1 - torch.rand(len(probs), 1, generator=generator, device=probs.device)     # [B, 1]
    return torch.searchsorted(sums, u * sums[:, -1:]).squeeze(-1)


@torch.no_grad()
def generate(model, prompts, max_new, temperature=1.0, top_p=1.0, generator=None):
    """Continue each prompt (a list of token ids) until end-of-text or `max_new` tokens.

    Returns a list of token lists, with their end-of-text if they reached it. A finished row leaves
    the batch: it costs nothing more."""
    c, device = model.config, model.lm_head.weight.device
    P = max(map(len, prompts))
    B = rows_that_fit(len(prompts), cache_size(c, P + max_new))
    if B < len(prompts):
        outputs = []
        for k in range(0, len(prompts), B):
            part = prompts[k:k + B]
            outputs += generate(model, part, max_new, temperature, top_p, generator)
        return outputs
    ids = torch.full((B, P), c.pad_token_id)                                        # [B, P]
    mask = torch.zeros(B, P + max_new, dtype=torch.bool)                            # [B, P+max_new]
    for b, prompt in enumerate(prompts):    # padded on the left: all last tokens are at P - 1
        ids[b, P - len(prompt):] = torch.tensor(prompt)
        mask[b, P - len(prompt):] = True    # by length, not by id: a pad id in a text is real
    ids, mask = ids.to(device), mask.to(device)
    dtype = model.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):      # keys and values as attention computes them
        dtype = torch.get_autocast_dtype(device.type)
    caches = [Cache(B, c, P + max_new, device, dtype) for _ in range(c.num_hidden_layers)]

    outputs = [[] for _ in range(B)]
    alive = torch.arange(B, device=device)  # the index in `outputs` of each row of the batch
    for t in range(max_new):
        last = torch.zeros_like(ids, dtype=torch.bool)                              # [alive, T]
        last[:, -1] = True
        hidden = model.model(ids, mask[:, :P + t], caches, asked=last)              # [alive, C]
        logits = model.lm_head(hidden)                                              # [alive, V]
        token = sample(logits, temperature, top_p, generator)                       # [alive]
        if not logits.max().isfinite():     # NaN is larger than any number
            raise NotFinite("the model's logits are not finite: its training diverged (lower its "
                            "--lr), or its weights are damaged")
        for index, token_id in zip(alive.tolist(), token.tolist()):
            outputs[index].append(token_id)
        unfinished = (token != c.eos_token_id).nonzero().squeeze(1)
        if len(unfinished) == 0:
            break
        if len(unfinished) < len(alive):
            alive, token, mask = alive[unfinished], token[unfinished], mask[unfinished]
            for cache in caches:
                cache.keep(unfinished)
        ids = token[:, None]                                                        # [alive, 1]
    return outputs


# ------------------------------------------------------------------------------------- adapters
LINEAR = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
          "mlp": ("gate_proj", "up_proj", "down_proj")}


@dataclass
class LoRA:
    """The adapters of a model, by the names of PEFT's `adapter_config.json`."""
    base_model_name_or_path: str        # the folder of the frozen weights
    r: int                              # the rank
    lora_alpha: float
    target_modules: list | str          # which layers of the blocks, see is_target


class LoRALinear(nn.Module):
    """A frozen linear layer W plus a trained product of rank r: W x + alpha / r * B A x (Hu et al.
    2021, arXiv 2106.09685, section 4.1). B starts at zero, so the model starts unchanged."""

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base_layer, self.scale = base, alpha / r
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))


def linear_layers(body):
    """(full name, parent module, name in it, layer) of each linear layer in the blocks. A layer
    with an adapter counts as one."""
    found = []
    for i, block in enumerate(body.layers):
        for kind, names in LINEAR.items():
            parent = getattr(block, kind)
            for name in names:
                found.append((f"model.layers.{i}.{kind}.{name}", parent, name,
                              getattr(parent, name)))
    return found


def is_target(name, targets):
    """Does the layer of this full name get an adapter? As PEFT reads target_modules: a list of
    names, or of ends of names (`q_proj`, `layers.1.mlp.up_proj`); or one regular expression for the
    whole name; or all-linear."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def add_lora(model, lora):
    """Freeze a model, except for a reward model's head, and give it fresh adapters. They replace
    any that it had."""
    names, targets = [full for full, *_ in linear_layers(model.model)], lora.target_modules
    patterns = [targets] if isinstance(targets, str) else [[target] for target in targets]
    unmatched = [p for p in patterns if not any(is_target(name, p) for name in names)]
    if lora.r < 1 or not patterns or unmatched:
        given = ", ".join(targets) if isinstance(targets, list) else targets
        known = ", ".join(sorted(name for part in LINEAR.values() for name in part))
        raise BadInput(f"LoRA of rank {lora.r} on {given}: the rank must be at least 1, and the "
                       f"layers some of {known}")
    model.model.lora = lora
    for _, parent, name, layer in linear_layers(model.model):
        setattr(parent, name, getattr(layer, "base_layer", layer))
    for name, p in model.named_parameters():
        p.requires_grad = name == "score.weight"
    for full, parent, name, layer in linear_layers(model.model):
        if is_target(full, targets):
            setattr(parent, name, LoRALinear(layer, lora.r, lora.lora_alpha))


@torch.no_grad()
def merge_lora(model):
    """Add the adapters to their layers' weights: the same function, in plain weights."""
    for _, parent, name, layer in linear_layers(model.model):
        if isinstance(layer, LoRALinear):
            product = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
            # A new matrix, because other models may share the base.
            weight = layer.base_layer.weight + product
            layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
            setattr(parent, name, layer.base_layer)
    model.model.lora = None


def copy_trainable(model):
    """A copy with trained parameters of its own, which shares the frozen ones: policy, reference
    and reward model have one base in memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
