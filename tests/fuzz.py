"""Random bytes as CVs: a JD is written for each, and scored; and none of them reaches beyond its
place in the prompt.

    python tests/fuzz.py --texts 10000

Prints one line: texts, how many were handled, how many refused in one line (they are no UTF-8, or
blank), faults.
"""
import argparse
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import girl
import sft
from data import Codec, load_codec, train_tokenizer
from plumbing.tokenizer import END_OF_TURN, EOS, PAD, TURN, plain_text_only

PIECES = [EOS, PAD, TURN, END_OF_TURN, "<|im_start|>system\n", "\nJD:", "JD: ", "CV:", "<s>",
          "</s>", "<unk>", "[INST]", "<|endoftext", "|>", "\0", "\r\n",
          "\u202e", "\ufeff", "👩‍🍳", "Skills: cook, care.", " ", "\n"]


def tricky_tokenizers():
    """Tokenizers whose own models find control tokens in a plain text, where only the added tokens
    are switched off."""
    letters = [chr(i) for i in range(32, 127)] + ["\u2581"]
    unigram = {name: models.Unigram([("<unk>", -5.0), *((t, -3.0) for t in control),
                                     *((c, -4.0) for c in letters)], unk_id=0)
               for name, control in (("Unigram", (EOS, PAD)),
                                     ("Unigram, ChatML", (TURN, END_OF_TURN, PAD)))}
    words = {w: i for i, w in enumerate([PAD, EOS, "<unk>", *letters])}
    found = {name: (model, pre_tokenizers.Metaspace()) for name, model in unigram.items()} | {
        "BPE, whole words first": (models.BPE(words, [], ignore_merges=True, unk_token="<unk>"),
                                   pre_tokenizers.WhitespaceSplit()),
        "BPE, unknown is the end": (models.BPE(words, [], unk_token=EOS), None),
        "WordLevel": (models.WordLevel(words, unk_token="<unk>"), pre_tokenizers.WhitespaceSplit())}
    for name, (model, before) in found.items():
        found[name] = Tokenizer(model)
        if before:
            found[name].pre_tokenizer = before
        found[name].add_special_tokens([t for t in (PAD, EOS, TURN, END_OF_TURN, "<unk>")
                                        if found[name].token_to_id(t) is not None])
    return found


def random_bytes(draw):
    """Plain noise; characters of any kind; or pieces of what has a meaning to a tokenizer or in a
    prompt, with noise between."""
    kind, n = draw.randrange(3), draw.choice([1, 3, 10, 100, 1000])
    if kind == 0:
        return draw.randbytes(draw.randint(0, n))
    characters = "".join(chr(draw.choice([draw.randrange(128), draw.randrange(0x800),
                                          draw.randrange(0xE000, 0x110000)]))
                         for _ in range(n % 101))
    if kind == 1:
        return characters.encode()
    pieces = draw.choices(PIECES, k=min(n, 30)) + [characters[:5]]
    draw.shuffle(pieces)
    return "".join(pieces).encode() + draw.randbytes(draw.choice([0, 0, 0, 1]))


def call(*argv):
    """Exit code, and what was said on the two channels."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = girl.main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def check_prompt(codec, text, exact):
    """The text lies between what stands before and behind a CV, in tokens that mean themselves; and
    comes out as it went in, where the tokenizer knows all characters (`exact`)."""
    prompt, before, after = codec.prompt(text), codec.before, codec.after
    tokens = prompt[len(before):-len(after)]
    assert prompt == before + tokens + after and len(tokens) <= codec.max_cv
    special = ({codec.eos, *codec.tokenizer.get_added_tokens_decoder()}
               - {codec.tokenizer.token_to_id("<unk>")})
    assert (not set(tokens) & special
            and codec.eos not in codec.jd(text)[:-1]), "a special token out of a text"
    assert (not exact or len(codec.encode(text)) > codec.max_cv
            or codec.cv(prompt) == text), "another text"


def check_loss(model, codec, texts):
    """The loss covers the JD's tokens and none but them: those of a row with this CV are those of a
    row with any other."""
    jd = codec.jd("Wanted: cook.")
    rows = [sft.Example(codec.prompt(text), jd) for text in texts]
    targets, real = [], sft.F.cross_entropy
    sft.F.cross_entropy = lambda logits, target, reduction: (
        targets.append(target.tolist()) or real(logits, target, reduction=reduction))
    try:
        assert sft.sft_loss(model, None, rows, torch.device("cpu"))[1] == len(rows) * len(jd)
    finally:
        sft.F.cross_entropy = real
    assert targets == [jd * len(rows)], "other tokens are learned"


def fuzz(run, n, seed, folder):
    """Counts over n random CVs, with the generator and the reward model of a run; faults are (what,
    text)."""
    draw, count, faults, texts = random.Random(seed), Counter(), [], []
    for stage in ("sft", "reward"):                         # short JDs, to be done sooner
        shutil.copytree(run / stage, folder / stage)
        (folder / stage / "summary.json").unlink()
        config = json.loads((folder / stage / "config.json").read_text()) | {"max_jd_tokens": 12}
        (folder / stage / "config.json").write_text(json.dumps(config))
    model = girl.load_model(folder / "sft")
    chatml = train_tokenizer(["CV of a cook: knives."], 300)
    chatml.add_special_tokens([TURN, END_OF_TURN])
    kinds = [(load_codec(folder / "sft", model.config), True),
             (Codec(plain_text_only(chatml), 200, 50), True)]
    kinds += [(Codec(plain_text_only(tricky), 200, 50), False)
              for tricky in tricky_tokenizers().values()]
    for k in tqdm(range(n), desc="fuzz", unit="CV", mininterval=10):
        raw = random_bytes(draw)
        (folder / "cv").write_bytes(raw)
        try:
            text = raw.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            text = ""
        try:
            for argv in (("generate", "--model", folder / "sft", "--cv", folder / "cv"),
                         ("score", "--reward", folder / "reward", "--cv", folder / "cv",
                          "--jd", folder / "cv")):
                code, out, err = call(*argv)
                assert code == (0 if text else 2), f"exit code {code}: {err}"
                if text:
                    assert out and all("was truncated to" in line or "did not end within" in line
                                       for line in err.splitlines()), err
                else:
                    assert err.count("\n") == 1 and str(folder / "cv") in err, err
            for codec, exact in kinds if text else ():
                check_prompt(codec, text, exact)
            if text:
                texts.append(text)
            if len(texts) == 16 or texts and k == n - 1:
                check_loss(model, kinds[0][0], texts)
                texts = []
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            faults.append((f"{type(e).__name__}: {e}", raw))
        count["handled" if text else "refused"] += 1
    return count, faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)        # models this small are done sooner by one thread
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        code, _, said = call("data", "--smoke", "--out", place / "data")
        for stage in ("sft", "reward"):
            code = code or call(stage, "--smoke", "--run", place / "run",
                                "--data", place / "data")[0]
        assert code == 0
        counted, found = fuzz(place / "run", arguments.texts, arguments.seed, place / "fuzz")
    for fault in found[:10]:
        print(*fault)
    print(f"fuzz: {arguments.texts} random byte strings as CVs, {counted['handled']} handled, "
          f"{counted['refused']} refused in one line, {len(found)} faults")
    sys.exit(bool(found))
