"""A decision, the prompt, the tokenizer, a batch.

A data set is a folder of `train.jsonl`, `valid.jsonl`, `test.jsonl`. One line is one decision of a
recruiter:

    {"cv": "...", "jd": "...", "accepted": true}

Everything else is derived from these (a `probes.jsonl` may add hard negatives for stage 2). Text
from users is data: `<|endoftext|>` in a CV is encoded as plain characters.
"""
import math
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from plumbing.records import decisions, half, halves_by_group, made_of_table, read_import
from plumbing.tokenizer import (END_OF_TURN, EOS, PAD, TURN, checked_ids, find_specials,
                                plain_text_only, template_ids, tokenizer_of)


# ------------------------------------------------------------------------------------ decisions
class Record(NamedTuple):
    cv: str
    jd: str
    accepted: bool


def read_records(path):
    """All decisions of a .jsonl file."""
    return [Record(*decision) for _, *decision in decisions(path)]


def read_half(folder, part, *files):
    """The decisions on half A or B of the train CVs. Generator and reward model learn from A; the
    judge and the recommender learn from B, so that they measure on people that A does not have."""
    records = []
    for name in files or ("train.jsonl",):
        records += read_records(Path(folder) / name)
    by = read_import(folder).get("split_by", "group") if made_of_table(folder) else "cv"
    half_of = halves(records, by)
    return [r for r in records if half_of[r.cv] == part]


def halves(records, split_by):
    """CV -> half. "group", for most imported tables: CVs linked by accepted JDs share a half. "cv",
    for the market, and for tables whose decisions are all linked: a hash of the CV decides, and a
    JD can be in both halves."""
    if split_by == "group":
        return halves_by_group(records)
    return {r.cv: half(r.cv) for r in records}


# ------------------------------------------------------------------------- tokenizer and prompt
def train_tokenizer(texts, vocab_size):
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2): it can encode any
    text.

    Merges may cross spaces but not punctuation or line ends, so that a phrase like " wound care"
    can become one token (as in SuperBPE, Liu et al. 2025, arXiv 2503.13423). Texts get shorter by a
    quarter, and to find a skill of the JD in the CV is to find one token again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[,.:;!?()\n]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    spaced = (" " + text for text in texts)             # Codec puts this space before each text
    tokenizer.train_from_iterator(spaced, trainer)
    return plain_text_only(tokenizer)


# T, the prompt template: pieces before the CV and pieces after it, each encoded by itself. Then
# comes the JD, then end-of-text.
PROMPT = ["CV:"], ["\nJD:"]
# For a pretrained chat model, CV and JD are a user's turn and its answer.
ASK = "Write the job description of a job that fits this CV."
CHAT_PROMPT = [TURN, f"user\n{ASK}\n\n"], [END_OF_TURN, "\n", TURN, "assistant\n"]


class Codec:
    """Texts to token ids and back, within a budget of tokens. Counts the texts that it truncates.

    CV, template and JD are encoded separately, so a CV cannot change the tokens of the rest. `eos`
    is the token that ends a JD; see find_specials."""

    def __init__(self, tokenizer, max_cv, max_jd, eos=None):
        self.tokenizer, self.max_cv, self.max_jd = tokenizer, max_cv, max_jd
        special = find_specials(tokenizer, PROMPT, CHAT_PROMPT, eos)
        self.chatml, self.eos, self.pad, self.begin, self.space, self.control = special
        self.template = CHAT_PROMPT if self.chatml else PROMPT
        before, after = self.template
        self.before = self.begin + template_ids(tokenizer, before)
        self.after = template_ids(tokenizer, after)
        self.cut_cvs, self.cut_jds = set(), set()       # truncated texts
        self.ids_of_text = {}               # most texts occur many times: each is encoded once

    def encode(self, text):
        if text not in self.ids_of_text:
            ids = checked_ids(self.tokenizer, self.space + text)
            # Some tokenizers find special tokens even in plain text.
            self.ids_of_text[text] = [t for t in ids if t not in self.control]
        return self.ids_of_text[text]

    def prompt(self, cv):
        ids = self.encode(cv)
        if len(ids) > self.max_cv:
            self.cut_cvs.add(cv)
        return self.before + ids[:self.max_cv] + self.after

    def cv(self, prompt):
        """The CV of a prompt, as far as it was not truncated."""
        return self.text(prompt[len(self.before):-len(self.after)])

    def jd(self, jd):
        """The JD's tokens and end-of-text. A truncated JD gets no end-of-text: it does not end
        there."""
        ids = self.encode(jd) + [self.eos]
        if len(ids) > self.max_jd:
            self.cut_jds.add(jd)
        return ids[:self.max_jd]

    def text(self, ids):
        """The text of generated tokens, up to the first end-of-text."""
        ids = ids[:ids.index(self.eos)] if self.eos in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=False).removeprefix(self.space)

    def shrink(self, longest_prompt, longest_jd):
        """Lower the budgets to the size of the training data, plus a tenth for held-out texts."""
        longest_cv = longest_prompt - len(self.before) - len(self.after)
        self.max_cv = min(self.max_cv, math.ceil(1.1 * longest_cv))
        self.max_jd = min(self.max_jd, math.ceil(1.1 * longest_jd))

    def context(self):
        return len(self.before) + self.max_cv + len(self.after) + self.max_jd


def load_codec(folder, config):
    """The codec of a model's folder, within the budgets of its config."""
    tokenizer = tokenizer_of(folder, config)
    return Codec(tokenizer, config.max_cv_tokens, config.max_jd_tokens, config.eos_token_id)


# -------------------------------------------------------------------------------------- batches
def pad_right(rows, pad=0):
    """Token lists -> ids [B, T] and lengths [B]. Everything else (masks, last positions) follows
    from the lengths."""
    lengths = torch.tensor([len(r) for r in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad)
    for b, row in enumerate(rows):
        ids[b, :len(row)] = torch.tensor(row)
    return ids, lengths


def bucketed(lengths, batch_size, generator, pool=32):
    """One epoch of batches (lists of indices), each index once. Rows of similar length share a
    batch, so that few pads are computed: shuffle the epoch, sort by length within pools of 32
    batches, shuffle the batches."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), batch_size * pool):
        part = sorted(order[start:start + batch_size * pool], key=lambda i: lengths[i])
        batches += [part[k:k + batch_size] for k in range(0, len(part), batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]
