"""Tokenizers in and out, our own and those of pretrained models: which of their tokens are special, and what other tools need
to make the token ids that were trained on."""
import json
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, pre_tokenizers

from plumbing.files import BadInput, read_json, write_bytes, write_json
from plumbing.texts import UNSEEN

PAD, EOS = "<|pad|>", "<|endoftext|>"      # ids 0 and 1 of our own tokenizer
TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"        # ChatML, where a pretrained model's vocabulary has it


# ------------------------------------------------------------------------------------------------- special tokens
class Specials(NamedTuple):
    """The special tokens of a tokenizer, and how it begins a text."""
    chatml: bool        # are CV and JD a user's turn and its answer?
    eos: int | None     # ends a JD
    pad: int | None     # fills rows up
    begin: list         # what the tokenizer puts before every text: begin-of-text, or nothing
    space: str          # what we put before every text
    control: set        # tokens that no text may make


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def find_specials(tokenizer, template, eos=None):
    """`eos`: the token that ends a JD. Where that is ChatML's end of turn (or no `eos` is given, and the vocabulary has it), CV
    and JD are a user's turn and the answer. A vocabulary may have ChatML's tokens though its model never learned them: what
    the model's own texts end in decides. `template`: the pieces of the prompt for a model without ChatML."""
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    begin = list(takewhile(set(special.values()).__contains__, tokenizer.encode("a").ids))
    chatml = TURN in special and END_OF_TURN in special and eos in (None, special[END_OF_TURN])
    if chatml:
        eos, space, used = special[END_OF_TURN], "", {special[TURN], *begin}
    else:
        # A word is the same token at the beginning as it is elsewhere: with a space before it, which some tokenizers
        # (SentencePiece's) put there themselves.
        eos = tokenizer.token_to_id(EOS) if eos is None else eos
        space = "" if (tokenizer.id_to_token(ids_of(tokenizer, "a")[0]) or "").startswith("\u2581") else " "
        used = {*begin, *(i for pieces in template for piece in pieces for i in ids_of(tokenizer, piece))}
    # To fill rows up: a token that no text has. Not end-of-text, or what reads a padded row would not find its end.
    unknown = {"<unk>", getattr(tokenizer.model, "unk_token", None)} - {TURN, END_OF_TURN}
    spare = [i for t, i in special.items() if i not in {eos, *used} and t not in unknown]
    spare += [special[t] for t in unknown if t in special and special[t] != eos]             # better than none
    pad = special.get(PAD, spare[0] if spare else tokenizer.token_to_id(PAD))
    # Some tokenizers find these in a plain text all the same (of the kinds Unigram and WordLevel): they are taken out of it.
    control = {eos} | {i for t, i in special.items() if t not in unknown}
    return Specials(chatml, eos, pad, begin, space, control)


def encode(tokenizer, text):
    """Token ids of a text, without special tokens."""
    try:
        return ids_of(tokenizer, text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:              # see load_tokenizer
        raise BadInput(f"the tokenizer cannot read the text {text.strip()[:40]!r} ({e}); give the one that belongs to the model")


def plain_text_only(tokenizer):
    tokenizer.encode_special_tokens = True      # what looks like a special token in a text is text
    return tokenizer


# --------------------------------------------------------------------------------------------------- in and out
def save_tokenizer(folder, codec):
    """`tokenizer.json` and `tokenizer_config.json`, from which other tools make the token ids that were trained on. Returns the
    chat template, empty if there is none."""
    tokenizer, template = for_text(codec)
    write_bytes(Path(folder) / "tokenizer.json", tokenizer.to_str().encode())
    write_json(Path(folder) / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": codec.tokenizer.id_to_token(codec.pad),
        "eos_token": codec.tokenizer.id_to_token(codec.eos), "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # What looks like a special token in a text is text, unless the prompt itself is written with special tokens.
        "split_special_tokens": not writes_specials(codec)} | ({"chat_template": template} if template else {}))
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


def tokenizer_of(folder, config):
    """The tokenizer of a model's folder, where it goes with the model's config."""
    tokenizer = load_tokenizer(folder)
    if config.eos_token_id is None:
        raise BadInput(f"{folder}: its config.json has no eos_token_id; name there the token that ends a text")
    if max(config.eos_token_id, config.pad_token_id) >= config.vocab_size:
        raise BadInput(f"{folder}: eos_token_id and pad_token_id in its config must be below vocab_size")
    if number_of_ids(tokenizer) > config.vocab_size:
        raise BadInput(f"{Path(folder) / 'tokenizer.json'}: has {number_of_ids(tokenizer)} tokens, but its model "
                       f"{config.vocab_size}; give the one that belongs to the model")
    return tokenizer


def number_of_ids(tokenizer):
    return max(tokenizer.get_vocab().values(), default=-1) + 1


# CVs whose first or last characters a tokenizer might merge with the template.
EXAMPLES = ("cook", "Cook, 9 years (part time).", "- 3 knives\n- Köln!", "2019: chef\n\nBath;", "«a» 厨师 🙂")


def for_text(codec):
    """The tokenizer for other tools, which are given a prompt as one text, and a chat template that writes this text: from
    `[{"role": "user", "content": CV}]` they get the ids of `prompt(CV)`. A tokenizer that would join the template and the CV
    is made to cut between them. If that does not give the same ids, there is no template (an empty string)."""
    begin = "".join(map(codec.tokenizer.id_to_token, codec.begin))
    before, after = ("".join(pieces) for pieces in codec.template)
    if codec.chatml:
        own = codec.template[0][-1]
    else:
        before, own = before + " ", r"\A{}|{}\z".format(before, after.replace("\n", r"\n"))
    plain, cutting = (Tokenizer.from_str(codec.tokenizer.to_str()) for _ in range(2))
    first = pre_tokenizers.Split(Regex(own), "isolated")
    cutting.pre_tokenizer = pre_tokenizers.Sequence([first] + [plain.pre_tokenizer] * (plain.pre_tokenizer is not None))
    for tokenizer in (plain, cutting):
        if all(tokenizer.encode(begin + before + cv + after, add_special_tokens=False).ids
               == codec.before + codec.encode(cv) + codec.after for cv in EXAMPLES):
            end = codec.tokenizer.id_to_token(codec.eos) if writes_specials(codec) else ""
            return tokenizer, chat_template(begin, before, after, "" if codec.chatml else " ", end)
    return plain, ""


def same_tokenizer(codec, other):
    """Do two codecs have one tokenizer, but for the cut that for_text may have added?"""
    return for_text(codec)[0].to_str() == for_text(other)[0].to_str()


def writes_specials(codec):
    """Does the prompt, as one text, hold special tokens?"""
    return codec.chatml or bool(codec.begin)


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
