"""Load and save tokenizers, our own and those of pretrained models: find their special tokens, and
tell other tools how to make the token ids of training."""
import json
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, pre_tokenizers

from plumbing.files import BadInput, read_json, write_bytes, write_json
from plumbing.texts import UNSEEN

PAD, EOS = "<|pad|>", "<|endoftext|>"               # ids 0 and 1 of our own tokenizer
TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"    # ChatML, if a pretrained vocabulary has it


# ---------------------------------------------------------------------------------- special tokens
class Specials(NamedTuple):
    """The special tokens of a tokenizer, and how it begins a text."""
    chatml: bool        # are CV and JD a user's turn and its answer?
    eos: int | None     # ends a JD
    pad: int | None     # fills rows up
    begin: list         # token ids that the tokenizer puts before every text: begin-of-text or none
    space: str          # what we put before every text: a space or nothing
    control: set        # token ids that no text may contain


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def template_ids(tokenizer, pieces):
    """Token ids of pieces of a prompt template, each of which may be one of ChatML's tokens."""
    ids = []
    for piece in pieces:
        special = piece in (TURN, END_OF_TURN)
        ids += [tokenizer.token_to_id(piece)] if special else ids_of(tokenizer, piece)
    return ids


def find_specials(tokenizer, template, chat_template, eos=None):
    """The Specials of a tokenizer. `eos`: the token that ends a JD. The two templates: the pieces
    of the prompt without ChatML, and with it.

    CV and JD become a user's turn and the answer if `eos` is ChatML's end of turn, or if no `eos`
    is given and the vocabulary has ChatML. A vocabulary may have ChatML's tokens though its model
    never learned them: so the token that ends the model's own texts decides."""
    added_tokens = tokenizer.get_added_tokens_decoder().items()
    special = {token.content: i for i, token in added_tokens if token.special}
    begin = list(takewhile(set(special.values()).__contains__, tokenizer.encode("a").ids))
    chatml = TURN in special and END_OF_TURN in special and eos in (None, special[END_OF_TURN])
    if chatml:
        eos, space, template = special[END_OF_TURN], "", chat_template
    else:
        eos = tokenizer.token_to_id(EOS) if eos is None else eos
        # With a space before it, a first word has the same token as anywhere else. Some tokenizers
        # (SentencePiece's) put this space there themselves.
        first_token = tokenizer.id_to_token(ids_of(tokenizer, "a")[0]) or ""
        space = "" if first_token.startswith("\u2581") else " "
    used = {*begin, *(i for part in template for i in template_ids(tokenizer, part))}
    # Pad with a token that no text contains. End-of-text would hide where a padded row ends.
    unknown = {"<unk>", getattr(tokenizer.model, "unk_token", None)} - {TURN, END_OF_TURN}
    spare = [i for t, i in special.items() if i not in {eos, *used} and t not in unknown]
    spare += [special[t] for t in unknown if t in special and special[t] != eos]    # last resort
    pad = special.get(PAD, spare[0] if spare else tokenizer.token_to_id(PAD))
    # Unigram and WordLevel tokenizers find these even in a plain text: Codec removes them from it.
    control = {eos} | {i for t, i in special.items() if t not in unknown}
    return Specials(chatml, eos, pad, begin, space, control)


def checked_ids(tokenizer, text):
    """Token ids of a text, without special tokens."""
    try:
        return ids_of(tokenizer, text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:                          # see load_tokenizer
        raise BadInput(f"the tokenizer cannot read the text {text.strip()[:40]!r} ({e}); give the "
                       "one that belongs to the model")


def plain_text_only(tokenizer):
    tokenizer.encode_special_tokens = True      # "<|endoftext|>" in a text is plain characters
    return tokenizer


# ----------------------------------------------------------------------------------- load and save
def save_tokenizer(folder, codec):
    """Write `tokenizer.json` and `tokenizer_config.json`, from which other tools make the token ids
    of training. Returns the chat template, or an empty string if there is none."""
    tokenizer, template = for_text(codec)
    write_bytes(Path(folder) / "tokenizer.json", tokenizer.to_str().encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": codec.tokenizer.id_to_token(codec.pad),
        "eos_token": codec.tokenizer.id_to_token(codec.eos),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # Special tokens in a text are plain characters, unless the prompt itself has some.
        "split_special_tokens": not writes_specials(codec)}
    if template:
        config["chat_template"] = template
    write_json(Path(folder) / "tokenizer_config.json", config)
    return template


def load_tokenizer(folder):
    path = Path(folder) / "tokenizer.json"
    adapters = Path(folder) / "adapter_config.json"
    if not path.exists() and adapters.exists():     # peft saves none: use the one of the base
        path = Path(str(read_json(adapters).get("base_model_name_or_path"))) / "tokenizer.json"
    raw = read_json(path)
    # A broken Precompiled normalizer ends the process; our model families have none.
    if '"Precompiled"' in json.dumps(raw.get("normalizer")):
        raise BadInput(f"{path}: a Precompiled normalizer is not supported")
    try:
        for token in raw.get("added_tokens") or []:
            token["special"] = True                 # so that no text contains it
        tokenizer = Tokenizer.from_str(json.dumps(raw))
        tokenizer.no_truncation()                   # we truncate (and count) and pad ourselves
        tokenizer.no_padding()
        if not all(ids_of(tokenizer, text) for text in ("a", "CV: 7 🙂\n\0")):
            raise ValueError("it makes no tokens from a text")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:          # tokenizers' PanicException is not an Exception
        raise BadInput(f"{path}: cannot be used as a tokenizer ({e}); give the one that belongs to "
                       "the model")
    return plain_text_only(tokenizer)


def tokenizer_of(folder, config):
    """The tokenizer of a model's folder, if it fits the model's config."""
    tokenizer = load_tokenizer(folder)
    if config.eos_token_id is None:
        raise BadInput(f"{folder}: its config.json has no eos_token_id; set it to the token that "
                       "ends a text")
    if max(config.eos_token_id, config.pad_token_id) >= config.vocab_size:
        raise BadInput(f"{folder}: eos_token_id and pad_token_id in its config must be below "
                       "vocab_size")
    if number_of_ids(tokenizer) > config.vocab_size:
        raise BadInput(f"{Path(folder) / 'tokenizer.json'}: has {number_of_ids(tokenizer)} tokens, "
                       f"but its model {config.vocab_size}; give the one that belongs to the model")
    return tokenizer


def number_of_ids(tokenizer):
    return max(tokenizer.get_vocab().values(), default=-1) + 1


# CVs whose first or last characters a tokenizer might merge with the template.
EXAMPLES = ("cook", "Cook, 9 years (part time).", "- 3 knives\n- Köln!", "2019: chef\n\nBath;",
            "«a» 厨师 🙂")


def for_text(codec):
    """The tokenizer for other tools, which read a prompt as one text, and a chat template that
    writes this text: from `[{"role": "user", "content": CV}]` they get the ids of `prompt(CV)`.

    If the tokenizer would merge the template with the CV, a pre-tokenizer is added that splits
    them. If the ids still differ, there is no template (an empty string)."""
    begin = "".join(map(codec.tokenizer.id_to_token, codec.begin))
    before, after = ("".join(pieces) for pieces in codec.template)
    if codec.chatml:
        boundary = codec.template[0][-1]
    else:
        boundary = r"\A{}|{}\z".format(before, after.replace("\n", r"\n"))
        before += " "                                   # belongs to the CV's first token
    plain, splitting = (Tokenizer.from_str(codec.tokenizer.to_str()) for _ in range(2))
    steps = [pre_tokenizers.Split(Regex(boundary), "isolated")]
    if plain.pre_tokenizer is not None:
        steps.append(plain.pre_tokenizer)
    splitting.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def gives_same_ids(tokenizer, cv):
        one_text = begin + before + cv + after
        return ids_of(tokenizer, one_text) == codec.before + codec.encode(cv) + codec.after

    for tokenizer in (plain, splitting):
        if all(gives_same_ids(tokenizer, cv) for cv in EXAMPLES):
            space = "" if codec.chatml else " "
            end = codec.tokenizer.id_to_token(codec.eos) if writes_specials(codec) else ""
            return tokenizer, chat_template(begin, before, after, space, end)
    return plain, ""


def same_tokenizer(codec, other):
    """Do two codecs have the same tokenizer, apart from a pre-tokenizer that for_text added?"""
    return for_text(codec)[0].to_str() == for_text(other)[0].to_str()


def writes_specials(codec):
    """Does the prompt, as one text, contain special tokens?"""
    return codec.chatml or bool(codec.begin)


def chat_template(begin, before, after, space, end):
    """A chat template in Jinja, as Hugging Face uses it: each user's message is a CV, each answer
    its JD."""
    begin, before, after, space, end = (json.dumps(text, ensure_ascii=False)
                                        for text in (begin, before, after, space, end))
    # As texts.normalize, but Jinja cannot join a letter and its accent (Unicode's NFD to NFC).
    replacements = [*((mark, "") for mark in UNSEEN),
                    ("\u00a0", " "), ("\r\n", "\n"), ("\r", "\n")]
    replace = "".join(f" | replace({json.dumps(old)}, {json.dumps(new)})"
                      for old, new in replacements)
    content = f"(m['content']{replace} | trim)"
    return (f"{{{{ {begin} }}}}{{% for m in messages %}}"
            "{% if m['role'] == 'user' %}"
            f"{{{{ {before} + {content} + {after} }}}}"
            "{% elif m['role'] == 'assistant' %}"
            f"{{{{ {space} + {content} + {end} }}}}"
            "{% else %}"
            "{{ raise_exception('the roles are user, for a CV, and assistant, for a JD') }}"
            "{% endif %}{% endfor %}")
