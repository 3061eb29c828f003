"""Stage 1, SFT: the generator G learns to write the JD J of a job that the person with the CV C was
accepted for.

    python girl.py sft --run RUN

    L = -(1/|J|) sum_i log P(v_i | v_<i, C, T; G)       over the tokens v of the JD J and its
                                                        end-of-text; the CV C is in the prompt
                                                        template T; the mean is over all tokens
                                                        of a batch, so long JDs weigh more

(Zheng et al. 2023, arXiv 2307.02157.) Algorithm:
1. Train the tokenizer on half A of the train split, and start a small model from random weights.
   Or take both from `--init`.
2. Epochs over the accepted pairs: L + `--reading` times the reading loss. A small model is slow to
   learn to compare two texts, and the reward model starts from its weights. So a second head
   predicts for each token of the JD whether the CV holds it, too, and at the last token which share
   of the earlier ones it holds.

Left out: packing several pairs into one row (rows are sorted into batches by length instead),
weight decay, dropout.

Shapes: B rows, T tokens, "tokens" the JD tokens of all rows, N these and the last token of each
prompt, C hidden size, V vocabulary.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from aids import Optimizer, reading_loss, start_small
from data import Codec, bucketed, pad_right, read_half, read_records, train_tokenizer
from model import Config, LanguageModel, generate, logits_size, rows_that_fit
from plumbing.files import BadInput, save_tensors
from plumbing.records import check_splits, keeps_contacts
from plumbing.stage import autocast, flag, generator
from plumbing.tokenizer import load_tokenizer, save_tokenizer
from plumbing.weights import StartFlags, load_pretrained, read_config, save_model


@dataclass
class SFTFlags(StartFlags):
    epochs: float = flag(1.4, "passes over the accepted pairs (of half A: the half of the train "
                              "CVs that the generator learns from)", least=0.01)
    batch: int = flag(16, "pairs in an optimizer step")
    accumulate: int = flag(1, "micro-batches that a batch is split into, to save memory")
    lr: float = flag(4e-3, "peak learning rate of AdamW, for embeddings, norms and heads (cosine "
                           "to 0)")
    matrix_lr: float = flag(0.006, "peak learning rate of Muon, for the matrices of the blocks; 0: "
                                   "AdamW for these, too")
    warmup: int = flag(100, "steps of linear warm-up", least=0)
    max_grad_norm: float = flag(1.0, "largest norm of the gradient")
    reading: float = flag(0.5, "weight of the reading loss: does the CV hold this token of the JD?")
    hidden: int = flag(96, "C, the hidden size")
    layers: int = flag(3, "transformer blocks", most=256)
    heads: int = flag(3, "H, query heads")
    kv_heads: int = flag(3, "K, key-value heads; H must be a multiple of K")
    vocab: int = flag(3072, "largest size of the tokenizer's vocabulary", most=2 ** 20)
    max_cv: int = flag(512, "longest CV in tokens; longer ones are truncated, and counted")
    max_jd: int = flag(512, "longest JD in tokens")


# ------------------------------------------------------------------------------------- the loss
class Example(NamedTuple):
    """An accepted pair, as token rows."""
    prompt: list
    jd: list            # with end-of-text


def sft_loss(model, reader, examples, device):
    """The sum of -log P over the JDs' tokens (with end-of-text), their number, and the mean reading
    loss (0 without a reader)."""
    ids, lengths = pad_right([e.prompt + e.jd for e in examples])                   # [B, T], [B]
    ids, lengths = ids.to(device), lengths.to(device)
    starts = torch.tensor([len(e.prompt) for e in examples], device=device)         # [B]
    at = torch.arange(ids.shape[1], device=device)                                  # [T]
    in_jd = (at >= starts[:, None]) & (at < lengths[:, None])                       # [B, T]
    # The state before a token predicts it.
    is_target = in_jd[:, 1:]                                                        # [B, T-1]
    before_target = F.pad(is_target, (0, 1))                                        # [B, T]
    # The head is a small model's most expensive layer, so it is applied only at the states before
    # JD tokens. The last block's output is computed only there, and at the JD tokens for the
    # reader.
    asked = before_target | in_jd                                                   # [B, T]
    with autocast(device):
        hidden = model.model(ids, asked=asked)                                      # [N, C]
        logits = model.lm_head(hidden[before_target[asked]]).float()                # [tokens, V]
        loss = F.cross_entropy(logits, ids[:, 1:][is_target], reduction="sum")
        reading = reading_loss(reader, hidden[in_jd[asked]], examples)
    return loss, int(is_target.sum()), reading


@torch.no_grad()
def mean_nll(model, pairs, codec, device):
    """Mean -log P of a JD token, in nats, over (cv, jd) texts."""
    total, count, batch = 0.0, 0, rows_that_fit(64, logits_size(model.config))
    for k in range(0, len(pairs), batch):
        part = [Example(codec.prompt(cv), codec.jd(jd)) for cv, jd in pairs[k:k + batch]]
        loss, n, _ = sft_loss(model, None, part, device)
        total, count = total + float(loss), count + n
    return total / count


# ------------------------------------------------------------------------------------- training
def sft_step(model, reader, batch, flags, device):
    """Gradients of the objective. Returns the mean loss of a token, and the reading loss."""
    tokens, total, total_reading = sum(len(e.jd) for e in batch), 0.0, 0.0
    for k in range(min(flags.accumulate, len(batch))):
        part = batch[k::flags.accumulate]
        share = len(part) / len(batch)
        loss, _, reading = sft_loss(model, reader if flags.reading else None, part, device)
        # Divided by all tokens, and by all rows: micro-batches add up to the gradient of the batch.
        (loss / tokens + flags.reading * share * reading).backward()
        total += float(loss.detach())
        total_reading += share * float(reading.detach())
    return total / tokens, total_reading


def schedule(lengths, batch, steps, seed):
    """The examples of each step, as lists of indices: one epoch after the other, each in an order
    of its own."""
    batches = []
    while len(batches) < steps:
        batches += bucketed(lengths, batch, generator(seed, "sft", len(batches)))
    return batches[:steps]


def train(model, reader, codec, pairs, valid, flags, seed, stage, device):
    """Train on these Examples. After each epoch: validate, and show one sample. `valid`: (cv, jd)
    texts. Returns the last valid NLL."""
    model.model.checkpointing = flags.checkpointing
    steps_per_epoch = math.ceil(len(pairs) / flags.batch)
    steps = max(1, round(flags.epochs * steps_per_epoch))
    optimizer = Optimizer(nn.ModuleList([model, reader]), flags, stage.total(steps))
    stage.resume({"model": model, "reader": reader}, optimizer.optimizers)
    batches = schedule([len(e.prompt) + len(e.jd) for e in pairs], flags.batch, steps, seed)
    for step in range(stage.step, steps):
        batch = [pairs[i] for i in batches[step]]
        loss, reading = sft_step(model, reader, batch, flags, device)
        norm = optimizer.clip()
        if not math.isfinite(loss + reading + norm):
            cvs = [codec.cv(e.prompt) for e in batch]
            stage.not_finite(step + 1, cvs, "lower --lr and --matrix-lr")
        optimizer.step(step)
        stage.log(step=step + 1, loss=loss, reading=reading)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        if not rest and step + 1 < steps:
            validate(model, codec, valid, epoch, step + 1, seed, stage, device)
        stage.checkpoint(step + 1)
    epochs = math.ceil(steps / steps_per_epoch)
    return validate(model, codec, valid, epochs, steps, seed, stage, device)


def validate(model, codec, valid, epoch, step, seed, stage, device):
    """Valid NLL, and one sample to look at. Returns the NLL."""
    nll = mean_nll(model, valid, codec, device)
    if not nll < 700:                       # its perplexity would be NaN or overflow
        stage.not_finite(step, [cv for cv, _ in valid], "lower --lr and --matrix-lr")
    cv, rng = valid[0][0], generator(seed, "sft-look", epoch - 1, device=device)
    with torch.no_grad(), autocast(device):
        sample, = generate(model, [codec.prompt(cv)], codec.max_jd, generator=rng)
    stage.say(f"sft epoch {epoch}: train loss {stage.mean('loss', 100):.4f}, valid NLL {nll:.4f}, "
              f"perplexity {math.exp(nll):.3f}\n"
              f"--- a sample\n{cv}\n->\n{codec.text(sample)}\n---")
    if codec.eos not in sample:
        stage.say(f"sft: this sample did not end within {codec.max_jd} tokens")
    return nll


# ------------------------------------------------------------------------------ the whole stage
def new_codec(records, flags):
    """The pretrained model's tokenizer, or one that is trained on these records."""
    if not flags.init:
        texts = sorted({t for r in records for t in (r.cv, r.jd)})
        return Codec(train_tokenizer(texts, flags.vocab), flags.max_cv, flags.max_jd)
    config, _ = read_config(flags.init)
    codec = Codec(load_tokenizer(flags.init), flags.max_cv, flags.max_jd, config.eos_token_id)
    if codec.eos is None:
        raise BadInput(f"{flags.init}: nothing says which token ends a text; name it as "
                       "eos_token_id in its config.json")
    if codec.pad is None:
        raise BadInput(f"{flags.init}: its tokenizer has no special token that is free for "
                       "padding; add one, such as <|pad|>, to the added_tokens of its "
                       "tokenizer.json")
    return codec


def new_model(codec, examples, flags, seed):
    """A generator with random weights, whose context fits the codec's budgets. `examples` show
    which tokens occur, see start_small."""
    torch.manual_seed(seed)
    model = LanguageModel(Config(
        vocab_size=codec.tokenizer.get_vocab_size(),
        hidden_size=flags.hidden,
        intermediate_size=8 * round(flags.hidden / 3),
        num_hidden_layers=flags.layers,
        num_attention_heads=flags.heads,
        num_key_value_heads=flags.kv_heads,
        max_position_embeddings=codec.context(),
        # 1/sqrt(C) instead of the usual 0.02: with 0.02 a small model takes long to copy anything.
        # (start_small sets the embeddings.)
        initializer_range=flags.hidden ** -0.5,
        max_cv_tokens=codec.max_cv,
        max_jd_tokens=codec.max_jd))
    start_small(model, {t for e in examples for t in e.prompt + e.jd})
    return model


def run(stage, folder, data, flags, seed, device):
    """Load the data, make a tokenizer and a model, or take both from --init; train, save."""
    check_splits(data)
    records = read_half(data, "A")
    valid = [(r.cv, r.jd) for r in read_records(data / "valid.jsonl") if r.accepted]
    if not valid or not any(r.accepted for r in records):
        raise BadInput(f"{data}: stage 1 learns from accepted pairs, and there are none in "
                       f"{'half A of train.jsonl' if valid else 'valid.jsonl'}")
    codec = new_codec(records, flags)
    pairs = [Example(codec.prompt(r.cv), codec.jd(r.jd)) for r in records if r.accepted]
    tokens = sum(len(e.prompt) + len(e.jd) for e in pairs)
    stage.say(f"sft: {len(pairs)} accepted pairs, {tokens / len(pairs):.0f} tokens each; "
              f"truncated: {len(codec.cut_cvs)} CVs at {codec.max_cv} tokens, "
              f"{len(codec.cut_jds)} JDs at {codec.max_jd}")
    codec.shrink(max(len(e.prompt) for e in pairs), max(len(e.jd) for e in pairs))
    init_seed = generator(seed, "sft-init").initial_seed()
    nll_before = {}                         # of a pretrained model
    if flags.init:
        model = load_pretrained(flags, codec, init_seed, device)
        nll_before = {"valid_nll_before": mean_nll(model, valid, codec, device)}
        stage.say(f"sft: valid NLL of the pretrained model {nll_before['valid_nll_before']:.4f}")
    else:
        model = new_model(codec, pairs, flags, init_seed).to(device)
    model.config.keep_contacts = keeps_contacts(data)
    reader = nn.Linear(model.config.hidden_size, 1).to(device)
    nll = train(model, reader, codec, pairs, valid, flags, seed, stage, device)
    stage.check_lock()
    save_model(stage.folder, model)
    save_tokenizer(stage.folder, codec)
    if flags.reading and not flags.init:
        save_tensors(stage.folder / "reader.safetensors", reader.cpu().state_dict())
    stage.finish(valid_nll=nll, perplexity=math.exp(nll), pairs=len(pairs), steps=len(stage.rows),
                 **nll_before)
