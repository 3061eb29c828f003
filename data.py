"""A decision, the prompt, the tokenizer, a batch.

A data set is a folder of `train.jsonl`, `valid.jsonl`, `test.jsonl`. One line is one decision of a recruiter:

    {"cv": "...", "jd": "...", "accepted": true}

All else is derived from these. Text from users is data: `<|endoftext|>` inside a CV is encoded as plain characters.
"""
import math
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from plumbing.records import decisions, half, halves_by_group, made_of_table, read_import
from plumbing.tokenizer import (END_OF_TURN, EOS, PAD, TURN, encode, find_specials, ids_of, plain_text_only,
                                tokenizer_of)


# ----------------------------------------------------------------------------------------------------- decisions
class Record(NamedTuple):
    cv: str
    jd: str
    accepted: bool


def read_records(path):
    """All decisions of a .jsonl file."""
    return [Record(*decision) for _, *decision in decisions(path)]


def read_half(folder, part, *files):
    """The decisions on half A or B of the train CVs. Generator and reward model learn from A, the judge and the recommender
    from B, so that nothing is measured on what it was taught."""
    records = [r for name in files or ("train.jsonl",) for r in read_records(Path(folder) / name)]
    by = read_import(folder).get("split_by", "group") if made_of_table(folder) else "cv"
    side = halves(records, by)
    return [r for r in records if side[r.cv] == part]


def halves(records, split_by):
    """CV -> half. By "cv" a hash of the CV decides alone: in the market, and in a table whose CVs
    were each judged for many JDs, all of which would be in one half by "group". A JD can then be
    in both halves."""
    return halves_by_group(records) if split_by == "group" else {r.cv: half(r.cv) for r in records}


# --------------------------------------------------------------------------------------------- tokenizer and prompt
def train_tokenizer(texts, vocab_size):
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2): any text can be encoded.

    Merges may cross spaces but not punctuation or line ends, so that a phrase like " wound care" can become one token
    (as in SuperBPE, Liu et al. 2025, arXiv 2503.13423). Texts get shorter by a quarter, and to find a skill of the JD
    again in the CV is to find one token again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[,.:;!?()\n]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, EOS], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((" " + text for text in texts), trainer)     # with the space that Codec puts before
    return plain_text_only(tokenizer)


# T, the prompt template: what stands before a CV and after it. Then comes the JD, then end-of-text.
PROMPT = ["CV:"], ["\nJD:"]
ASK = "Write the job description of a job that fits this CV."
CHAT_PROMPT = [TURN, f"user\n{ASK}\n\n"], [END_OF_TURN, "\n", TURN, "assistant\n"]       # a pretrained chat model's


class Codec:
    """Texts to token ids and back, within a budget of tokens. Counts what it had to cut.

    CV, template and JD are encoded each by itself, so that a CV cannot change how the rest is cut into tokens. `eos` is the
    token that ends a JD; see find_specials."""

    def __init__(self, tokenizer, max_cv, max_jd, eos=None):
        self.tokenizer, self.max_cv, self.max_jd = tokenizer, max_cv, max_jd
        self.chatml, self.eos, self.pad, self.begin, self.space, self.control = find_specials(tokenizer, PROMPT, eos)
        self.template = CHAT_PROMPT if self.chatml else PROMPT
        before, after = ([i for piece in pieces for i in self.piece(piece)] for pieces in self.template)
        self.before, self.after = self.begin + before, after
        self.cut_cvs, self.cut_jds = set(), set()       # texts that were too long
        self.ids = {}                           # most texts come many times: each is encoded once

    def piece(self, text):
        """Token ids of a piece of the template, which may be a special token."""
        return [self.tokenizer.token_to_id(text)] if text in (TURN, END_OF_TURN) else ids_of(self.tokenizer, text)

    def encode(self, text):
        if text not in self.ids:
            self.ids[text] = [t for t in encode(self.tokenizer, self.space + text) if t not in self.control]
        return self.ids[text]

    def prompt(self, cv):
        ids = self.encode(cv)
        if len(ids) > self.max_cv:
            self.cut_cvs.add(cv)
        return self.before + ids[:self.max_cv] + self.after

    def cv(self, prompt):
        """The CV of a prompt, as far as it was not cut."""
        return self.text(prompt[len(self.before):-len(self.after)])

    def jd(self, jd):
        """The JD's tokens and end-of-text; a JD that was cut has none, for it does not end there."""
        ids = self.encode(jd) + [self.eos]
        if len(ids) > self.max_jd:
            self.cut_jds.add(jd)
        return ids[:self.max_jd]

    def text(self, ids):
        """The text of generated tokens, up to the first end-of-text."""
        ids = ids[:ids.index(self.eos)] if self.eos in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=False).removeprefix(self.space)

    def shrink(self, longest_prompt, longest_jd):
        """Lower the budgets to what the training data needs (a tenth more, for held-out texts)."""
        around = len(self.before) + len(self.after)
        self.max_cv = min(self.max_cv, math.ceil(1.1 * (longest_prompt - around)))
        self.max_jd = min(self.max_jd, math.ceil(1.1 * longest_jd))

    def context(self):
        return len(self.before) + self.max_cv + len(self.after) + self.max_jd


def load_codec(folder, config):
    """The codec of a model's folder, within the budgets that its config keeps."""
    return Codec(tokenizer_of(folder, config), config.max_cv_tokens, config.max_jd_tokens, config.eos_token_id)


# ------------------------------------------------------------------------------------------------------- batches
def pad_right(rows, pad=0):
    """Token lists -> ids [B, T] and lengths [B]. Everything else (masks, last positions) follows from the lengths."""
    lengths = torch.tensor([len(r) for r in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad)
    for b, row in enumerate(rows):
        ids[b, :len(row)] = torch.tensor(row)
    return ids, lengths


def bucketed(lengths, batch_size, generator, pool=32):
    """One epoch of batches (lists of indices), each index once. Rows of similar length go together, so that few pads
    are computed: the epoch is shuffled, sorted by length within pools of batches, and the batches are shuffled."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), batch_size * pool):
        part = sorted(order[start:start + batch_size * pool], key=lambda i: lengths[i])
        batches += [part[k:k + batch_size] for k in range(0, len(part), batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]
