"""Records, prompt, tokenizer, batches.

A data set is a folder of `train.jsonl`, `valid.jsonl`, `test.jsonl`. One line is one decision of a recruiter:

    {"cv": "...", "jd": "...", "accepted": true}

All else is derived from these. Text from users is data: `<|endoftext|>` inside a CV is encoded as plain characters.
"""
import codecs
import hashlib
import json
import math
from collections import defaultdict
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from run import BadInput, read_json, write_bytes, write_json
from texts import UNSEEN, normalize

PAD, EOS = "<|pad|>", "<|endoftext|>"      # ids 0 and 1 of our own tokenizer
TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"        # ChatML, where a pretrained model's vocabulary has it
SPLITS = ("train", "valid", "test")
MADE_HERE = ("market.json", "import.json")              # one of them stands in a data set that `data` made


# ------------------------------------------------------------------------------------------------------- records
class Record(NamedTuple):
    cv: str
    jd: str
    accepted: bool


def no_key_twice(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice in {sorted(key for key, _ in pairs)}")
    return found


read_line = json.JSONDecoder(object_pairs_hook=no_key_twice).decode


def json_lines(path, remedy):
    """(where, object) of each line of a .jsonl file that is not blank; `where` names file and line. What cannot be read is
    refused; `remedy` says what to give instead of a file that cannot be opened."""
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)       # some editors put it before any UTF-8 text
                if line.strip():
                    where = f"{path}:{number}"
                    try:
                        yield where, read_line(line.decode("utf-8"))
                    except UnicodeDecodeError as e:
                        raise BadInput(f"{where}: not UTF-8 text (byte {e.start} of the line); save the file as UTF-8")
                    except (ValueError, RecursionError) as e:
                        raise BadInput(f"{where}: not JSON ({e})")
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}; {remedy}")


def text_of(raw, key, where):
    """The text under a key of a line's object."""
    if not isinstance(raw[key], str):
        raise BadInput(f"{where}: {key} must be a text, found {type(raw[key]).__name__}")
    try:
        raw[key].encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where}: {key} holds half of a surrogate pair, which is no character")
    return raw[key]


def numbered_records(path):
    """(where, Record) of each line of a .jsonl file; a bad line is refused with its number and what is wrong."""
    where, clean = None, lru_cache(maxsize=None)(normalize)     # most texts come many times: each is cleaned, and kept, once
    for where, raw in json_lines(path, f"a data folder holds {', '.join(s + '.jsonl' for s in SPLITS)}"):
        yield where, parse_record(raw, where, clean)
    if not where:
        raise BadInput(f"{path}: no records; expected lines like " + '{"cv": "...", "jd": "...", "accepted": true}')


def read_records(path):
    """All decisions of a .jsonl file."""
    return [r for _, r in numbered_records(path)]


def parse_record(raw, where, clean):
    """The object of one line as a Record. `clean` is texts.normalize; contacts stay as they are written."""
    if not isinstance(raw, dict) or set(raw) != set(Record._fields):
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise BadInput(f"{where}: expected the keys cv, jd, accepted; found {found}")
    cv, jd = (clean(text_of(raw, key, where), False) for key in ("cv", "jd"))
    if not cv:
        raise BadInput(f"{where}: cv is empty")
    if not isinstance(raw["accepted"], bool):
        raise BadInput(f"{where}: accepted must be true or false, found {repr(raw['accepted'])[:40]}")
    if raw["accepted"] and not jd:
        raise BadInput(f"{where}: jd is empty, and accepted; only what was turned down may be empty")
    return Record(cv, jd, raw["accepted"])


def check_splits(folder):
    """Refuse a data set in which a text of one split stands in another too: what is measured on it would be too good."""
    seen = {}
    for split in SPLITS:
        mine = {}
        for where, r in numbered_records(Path(folder) / f"{split}.jsonl"):
            for name, text in (("CV", r.cv), ("JD", r.jd)):
                if (name, text) in seen:
                    raise BadInput(f"{where}: its {name} stands in {seen[name, text]}.jsonl too; take it out of one of them, or "
                                   "make the data set with  python girl.py data --from FILE")
                if text:
                    mine[name, text] = split
        seen |= mine


def clear_data(folder):
    """Take away the data set that is to be written anew, so that never two are mixed; refuse one that was not made here."""
    found = files_of(folder)
    if found and not any(path.name in MADE_HERE for path in found):
        raise BadInput(f"{found[0]}: was not made by `data`, and is not written over; choose another --out, or use it as it is "
                       f"with  --data {folder}")
    for path in found:
        try:
            path.unlink()
        except OSError as e:
            raise BadInput(f"{path}: cannot be written over ({e.strerror}); choose another --out")


def files_of(folder):
    """The files of a data set; last those that say that it was made here."""
    names = (*(f"{split}.jsonl" for split in SPLITS), "probes.jsonl", "summary.json", *MADE_HERE)
    return [Path(folder) / name for name in names if (Path(folder) / name).exists()]


def write_records(path, records):
    write_bytes(path, b"".join(json.dumps(r._asdict(), ensure_ascii=False).encode() + b"\n" for r in records))


def half(text):
    """'A' or 'B', by a hash of the text."""
    return "AB"[hashlib.sha256(text.encode()).digest()[0] % 2]


def connected(records):
    """Groups of records, as lists of indices, that hang together: who shares a CV or a JD with one of a group is in it."""
    parent = {}

    def root(x):
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]           # path halving: the next search is shorter
            x = parent[x]
        return x
    for r in records:
        parent[root(("cv", r.cv))] = root(("jd", r.jd))
    groups = defaultdict(list)
    for i, r in enumerate(records):
        groups[root(("cv", r.cv))].append(i)
    return list(groups.values())


def read_half(folder, part, *files):
    """The decisions on half A or B of the train CVs. Generator and reward model learn from A, the judge and the recommender
    from B, so that nothing is measured on what it was taught."""
    records = [r for name in files or ("train.jsonl",) for r in read_records(Path(folder) / name)]
    by = read_import(folder).get("split_by", "group") if made_of_table(folder) else "cv"
    side = halves(records, by)
    return [r for r in records if side[r.cv] == part]


def made_of_table(folder):
    return (Path(folder) / "import.json").exists()


def read_import(folder):
    """What `data --from` noted about its table. Earlier versions did not note all of it."""
    return read_json(Path(folder) / "import.json",
                     "make the data set again with  python girl.py data --from FILE")


def keeps_contacts(folder):
    """True if contacts were left in these texts: with `--keep-contacts`, or in a data set written by
    hand. The simulated market has none."""
    if (Path(folder) / "market.json").exists():
        return False
    return not made_of_table(folder) or read_import(folder).get("contacts_replaced") is None


def halves(records, split_by):
    """CV -> half. By "cv" a hash of the CV decides alone: in the market, and in a table whose CVs
    were each judged for many JDs, all of which would be in one half by "group". A JD can then be
    in both halves."""
    return halves_by_group(records) if split_by == "group" else {r.cv: half(r.cv) for r in records}


def halves_by_group(records):
    """CV -> half, for an imported table. Often each of its JDs has one accepted CV and one that was turned down: these two
    must stay together, or there is nothing to compare. So what hangs together by acceptances goes to one half, and a CV
    without any goes with the JD that it was first turned down for."""
    accepted, side, side_of_jd = [r for r in records if r.accepted], {}, {}
    for group in connected(accepted):
        name = half(min(accepted[i].cv for i in group))
        for i in group:
            side[accepted[i].cv] = side_of_jd[accepted[i].jd] = name
    for r in records:
        if r.cv not in side:
            side[r.cv] = side_of_jd.get(r.jd, half(r.cv))
    return side


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


def plain_text_only(tokenizer):
    tokenizer.encode_special_tokens = True      # what looks like a special token in a text is text
    return tokenizer


def save_tokenizer(folder, codec):
    """`tokenizer.json` and `tokenizer_config.json`, from which other tools make the token ids that were trained on. Returns the
    chat template, empty if there is none."""
    tokenizer, template = codec.for_text()
    write_bytes(Path(folder) / "tokenizer.json", tokenizer.to_str().encode())
    write_json(Path(folder) / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": codec.tokenizer.id_to_token(codec.pad),
        "eos_token": codec.tokenizer.id_to_token(codec.eos), "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # What looks like a special token in a text is text, unless the prompt itself is written with special tokens.
        "split_special_tokens": not codec.writes_specials()} | ({"chat_template": template} if template else {}))
    return template


def load_tokenizer(folder):
    path = Path(folder) / "tokenizer.json"
    adapters = Path(folder) / "adapter_config.json"
    if not path.exists() and adapters.exists():         # as peft saves them: the tokenizer is their base's
        path = Path(str(read_json(adapters).get("base_model_name_or_path"))) / "tokenizer.json"
    raw = read_json(path)
    if '"Precompiled"' in json.dumps(raw.get("normalizer")):        # a broken one ends the process; our families have none
        raise BadInput(f"{path}: a Precompiled normalizer is not supported")
    try:
        for token in raw.get("added_tokens") or []:
            token["special"] = True             # so that no text makes one, whatever it is for
        tokenizer = Tokenizer.from_str(json.dumps(raw))
        tokenizer.no_truncation()               # both are done here, and counted
        tokenizer.no_padding()
        if not all(tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "CV: 7 🙂\n\0")):
            raise ValueError("it makes no tokens of a text")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:                  # tokenizers raises plain Exception, and PanicException, which is none
        raise BadInput(f"{path}: cannot be used as a tokenizer ({e}); give the one that belongs to the model")
    return plain_text_only(tokenizer)


def chat_template(begin, before, after, space, end):
    """In Jinja, as Hugging Face has them: each user's message is a CV, each answer its JD."""
    begin, before, after, space, end = (json.dumps(text, ensure_ascii=False) for text in (begin, before, after, space, end))
    # As texts.normalize, but for letters in pieces (Unicode's NFD), which Jinja cannot join.
    undo = (*((mark, "") for mark in UNSEEN), ("\u00a0", " "), ("\r\n", "\n"), ("\r", "\n"))
    content = "(m['content']" + "".join(f" | replace({json.dumps(a)}, {json.dumps(b)})" for a, b in undo) + " | trim)"
    return (f"{{{{ {begin} }}}}{{% for m in messages %}}"
            f"{{% if m['role'] == 'user' %}}{{{{ {before} + {content} + {after} }}}}"
            f"{{% elif m['role'] == 'assistant' %}}{{{{ {space} + {content} + {end} }}}}"
            "{% else %}{{ raise_exception('the roles are user, for a CV, and assistant, for a JD') }}{% endif %}{% endfor %}")


# CVs whose first or last characters a tokenizer might merge with the template.
EXAMPLES = ("cook", "Cook, 9 years (part time).", "- 3 knives\n- Köln!", "2019: chef\n\nBath;", "«a» 厨师 🙂")
ASK = "Write the job description of a job that fits this CV."


class Codec:
    """Texts to token ids and back, within a budget of tokens. Counts what it had to cut.

    T, the prompt template, stands around the CV:  `CV: ... \\nJD: `, then the JD's tokens, then end-of-text `eos`. Where that is
    ChatML's end of turn (or no `eos` is given, and the vocabulary has it), CV and JD are a user's turn and the answer. A vocabulary
    may have ChatML's tokens though its model never learned them: what the model's own texts end in decides.
    CV, template and JD are encoded each by itself, so that a CV cannot change how the rest is cut into tokens."""

    def __init__(self, tokenizer, max_cv, max_jd, eos=None):
        def ids(text):
            return tokenizer.encode(text, add_special_tokens=False).ids
        self.tokenizer, self.max_cv, self.max_jd = tokenizer, max_cv, max_jd
        special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        # What the tokenizer puts before every text: begin-of-text, or nothing.
        self.begin = begin = list(takewhile(set(special.values()).__contains__, tokenizer.encode("a").ids))
        self.chatml = TURN in special and END_OF_TURN in special and eos in (None, special[END_OF_TURN])
        if self.chatml:
            turn, self.eos, self.space = special[TURN], special[END_OF_TURN], ""
            self.before = begin + [turn] + ids(f"user\n{ASK}\n\n")
            self.after = [self.eos] + ids("\n") + [turn] + ids("assistant\n")
        else:
            # A word is the same token at the beginning as it is elsewhere: with a space before it, which some
            # tokenizers (SentencePiece's) put there themselves.
            self.eos = tokenizer.token_to_id(EOS) if eos is None else eos
            self.space = "" if (tokenizer.id_to_token(ids("a")[0]) or "").startswith("\u2581") else " "
            self.before, self.after = begin + ids("CV:"), ids("\nJD:")
        # To fill rows up: a token that no text has. Not end-of-text, or what reads a padded row would not find its end.
        unknown = {"<unk>", getattr(tokenizer.model, "unk_token", None)} - {TURN, END_OF_TURN}
        spare = [i for t, i in special.items() if i not in {self.eos, *self.before, *self.after} and t not in unknown]
        spare += [special[t] for t in unknown if t in special and special[t] != self.eos]        # better than none
        self.pad = special.get(PAD, spare[0] if spare else tokenizer.token_to_id(PAD))
        # Some tokenizers find these in a plain text all the same (of the kinds Unigram and WordLevel): they are taken out of it.
        self.control = {self.eos} | {i for t, i in special.items() if t not in unknown}
        self.cut_cvs, self.cut_jds = set(), set()       # texts that were too long
        self.ids = {}                           # most texts come many times: each is encoded once

    def encode(self, text):
        if text not in self.ids:
            try:
                ids = self.tokenizer.encode(self.space + text, add_special_tokens=False).ids
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as e:              # see load_tokenizer
                raise BadInput(f"the tokenizer cannot read the text {text[:40]!r} ({e}); give the one that belongs to the model")
            self.ids[text] = [t for t in ids if t not in self.control]
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

    def for_text(self):
        """The tokenizer for other tools, which are given a prompt as one text, and a chat template that writes this text: from
        `[{"role": "user", "content": CV}]` they get the ids of `prompt(CV)`. A tokenizer that would join the template and the CV
        is made to cut between them. If that does not give the same ids, there is no template (an empty string)."""
        begin = "".join(map(self.tokenizer.id_to_token, self.begin))
        if self.chatml:
            before, after, own = f"{TURN}user\n{ASK}\n\n", f"{END_OF_TURN}\n{TURN}assistant\n", f"user\n{ASK}\n\n"
        else:
            before, after, own = "CV: ", "\nJD:", r"\ACV:|\nJD:\z"
        plain, cutting = (Tokenizer.from_str(self.tokenizer.to_str()) for _ in range(2))
        first = pre_tokenizers.Split(Regex(own), "isolated")
        cutting.pre_tokenizer = pre_tokenizers.Sequence([first] + [plain.pre_tokenizer] * (plain.pre_tokenizer is not None))
        for tokenizer in (plain, cutting):
            if all(tokenizer.encode(begin + before + cv + after, add_special_tokens=False).ids
                   == self.before + self.encode(cv) + self.after for cv in EXAMPLES):
                end = self.tokenizer.id_to_token(self.eos) if self.writes_specials() else ""
                return tokenizer, chat_template(begin, before, after, "" if self.chatml else " ", end)
        return plain, ""

    def writes_specials(self):
        """Does the prompt, as one text, hold special tokens?"""
        return self.chatml or bool(self.begin)

    def shrink(self, longest_prompt, longest_jd):
        """Lower the budgets to what the training data needs (a tenth more, for held-out texts)."""
        around = len(self.before) + len(self.after)
        self.max_cv = min(self.max_cv, math.ceil(1.1 * (longest_prompt - around)))
        self.max_jd = min(self.max_jd, math.ceil(1.1 * longest_jd))

    def context(self):
        return len(self.before) + self.max_cv + len(self.after) + self.max_jd


def load_codec(folder, config):
    """The codec of a model's folder, within the budgets that its config keeps."""
    tokenizer = load_tokenizer(folder)
    if config.eos_token_id is None:
        raise BadInput(f"{folder}: its config.json has no eos_token_id; name there the token that ends a text")
    if max(config.eos_token_id, config.pad_token_id) >= config.vocab_size:
        raise BadInput(f"{folder}: eos_token_id and pad_token_id in its config must be below vocab_size")
    if number_of_ids(tokenizer) > config.vocab_size:
        raise BadInput(f"{Path(folder) / 'tokenizer.json'}: has {number_of_ids(tokenizer)} tokens, but its model "
                       f"{config.vocab_size}; give the one that belongs to the model")
    return Codec(tokenizer, config.max_cv_tokens, config.max_jd_tokens, config.eos_token_id)


def number_of_ids(tokenizer):
    return max(tokenizer.get_vocab().values(), default=-1) + 1


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
