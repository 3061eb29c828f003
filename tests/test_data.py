"""Records good and bad, the halves, the tokenizer and the codec, batches."""
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models

from data import Codec, Record, bucketed, load_codec, pad_right, read_records, train_tokenizer
from plumbing.records import check_splits, half, keeps_contacts, write_records
from plumbing.tokenizer import END_OF_TURN, EOS, PAD, TURN, load_tokenizer, save_tokenizer
from fuzz import tricky_tokenizers
from plumbing.files import BadInput

GOOD = b'{"cv": "a nurse", "jd": "a ward", "accepted": true}\n'


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Profile: registered nurse, 5 years.",
                            "Wanted: nurse, London. Skills: triage, SQL."] * 5, 320)


# ------------------------------------------------------------------------------------------ records
def test_reading_good_records(tmp_path):
    path = tmp_path / "train.jsonl"
    # Blank lines, no last newline.
    path.write_bytes(GOOD + b'\n  \n{"accepted": false, "jd": "", "cv": "caf\\u00e9"}')
    assert read_records(path) == [Record("a nurse", "a ward", True), Record("café", "", False)]


def test_line_ends_blanks_and_letters_in_pieces_make_no_other_text(tmp_path):
    other = (b'{"cv": " caf\\u00e9\\r\\ncook\\t", "jd": "\\ufeffcafe\\u0301\\rx@y.org \\u00a0b", '
             b'"accepted": true}')
    (tmp_path / "train.jsonl").write_bytes(other)
    assert read_records(tmp_path / "train.jsonl") == [
        Record("café\ncook", "café\nx@y.org  b", True)]
    for split, text in (("train", "caf\u00e9 cook"), ("valid", "x"),
                        ("test", " cafe\u0301\u00a0cook\r\n")):
        write_records(tmp_path / f"{split}.jsonl", [Record(f"cv {split}", text, True)])
    with pytest.raises(BadInput, match="test.jsonl:1: its JD is in train.jsonl too"):
        check_splits(tmp_path)


def test_contacts_are_kept_where_nothing_says_that_they_were_replaced(tmp_path):
    assert keeps_contacts(tmp_path)
    for name, content, kept in (("import.json", {"contacts_replaced": {"EMAIL": 0}}, False),
                                ("import.json", {"contacts_replaced": None}, True),
                                ("market.json", {}, False)):
        (tmp_path / name).write_text(json.dumps(content))
        assert keeps_contacts(tmp_path) == kept


def test_written_records_are_read_again(tmp_path):
    records = [Record("line\nbreak \u2028 \x85 \t tab", 'quote " and \\', True),
               Record("日本 🙂", "", False)]
    write_records(tmp_path / "new" / "x.jsonl", records)
    assert read_records(tmp_path / "new" / "x.jsonl") == records


@pytest.mark.parametrize("line, says", [
    (b"cv,jd,accepted", "not JSON"),
    (b'{"cv": "a", "jd": "b", "accepted": tr', "not JSON"),
    (b'["a", "b", true]', "list"),
    (b"null", "NoneType"),
    (b'{"cv": "a", "accepted": true}', r"\['accepted', 'cv'\]"),
    (b'{"cv": "a", "jd": "b", "accepted": true, "age": 5}', "age"),
    (b'{"cv": 7, "jd": "b", "accepted": true}', "cv must be a text"),
    (b'{"cv": "a", "jd": null, "accepted": true}', "jd must be a text"),
    (b'{"cv": "a", "jd": "b", "accepted": 1}', "true or false"),
    (b'{"cv": "a", "jd": "b", "accepted": "true"}', "true or false"),
    (b'{"cv": "", "jd": "b", "accepted": true}', "cv is empty"),
    (b'{"cv": " \\n ", "jd": "b", "accepted": true}', "cv is empty"),
    (b'{"cv": "\\ud800", "jd": "b", "accepted": true}', "half of a surrogate pair"),
    (b'{"cv": "caf\xe9", "jd": "b", "accepted": true}', "UTF-8"),
])
def test_a_bad_line_is_refused_with_its_file_and_number(tmp_path, line, says):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    with pytest.raises(BadInput, match=f"train.jsonl:4: .*{says}"):
        read_records(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="valid.jsonl: No such file"):
        read_records(tmp_path / "valid.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "test.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match="test.jsonl: no records"):
        read_records(tmp_path / "test.jsonl")


def test_halves_are_stable_and_roughly_even():
    cvs = [f"cv number {i}" for i in range(2000)]
    halves = [half(cv) for cv in cvs]
    assert halves == [half(cv) for cv in cvs]
    assert set(halves) == {"A", "B"} and 900 < halves.count("A") < 1100
    # SHA-256 of "abc" starts with byte ba (even), that of "" with e3 (odd). Python's own hash would
    # differ between processes, and so mix the halves of two stages.
    assert half("abc") == "A" and half("") == "B"


# ------------------------------------------------------------------------------ tokenizer and codec
def random_text(rng, n):
    """Any characters but surrogates, which no UTF-8 text holds."""
    blocks = (range(128), range(0xD800), range(0xE000, 0x110000))
    return "".join(chr(rng.choice(rng.choice(blocks))) for _ in range(n))


def round_trip(tokenizer, text):
    codec = Codec(tokenizer, 10_000, 10_000)
    return codec.text(codec.jd(text))


def test_any_unicode_round_trips(tokenizer):
    rng = random.Random(0)
    texts = [random_text(rng, rng.randrange(1, 30)) for _ in range(300)]
    for text in texts + ["", " ", "  two spaces", "\n", "don't , stop .", "I 'm", "e\u0301 é",
                         "👩‍⚕️", "x" * 500]:
        assert round_trip(tokenizer, text) == text


@pytest.mark.parametrize("text", [EOS, PAD, f"before{EOS}after", f"a {PAD} {EOS} b", EOS * 3,
                                  "<|pad", "<unk>"])
def test_what_looks_like_a_special_token_is_plain_text(tokenizer, tmp_path, text):
    save_tokenizer(tmp_path, Codec(tokenizer, 50, 50))
    for t in (tokenizer, load_tokenizer(tmp_path)):
        codec = Codec(t, 100, 100)
        assert not {t.token_to_id(EOS), t.token_to_id(PAD)} & set(
            codec.prompt(text) + codec.jd(text)[:-1])
        assert round_trip(t, text) == text


def test_pad_is_0_and_eos_is_1(tokenizer):
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(EOS)) == (0, 1)


def test_tokenizer_is_saved_and_loaded(tokenizer, tmp_path):
    save_tokenizer(tmp_path, Codec(tokenizer, 50, 50))
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "Wanted: nurse, Łódź. Skills: triage."
    assert again.encode(text).ids == tokenizer.encode(text).ids


def test_a_loaded_codec_keeps_the_budgets_of_its_config(tokenizer, tmp_path):
    save_tokenizer(tmp_path, Codec(tokenizer, 50, 50))
    codec = load_codec(tmp_path, SimpleNamespace(vocab_size=320, max_cv_tokens=3, max_jd_tokens=5,
                                                 eos_token_id=1, pad_token_id=0))
    many = "a b c d e f g h"
    assert len(codec.prompt(many)) == len(codec.before) + 3 + len(codec.after)
    assert len(codec.jd(many)) == 5


def test_transformers_reads_the_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer
    save_tokenizer(tmp_path, Codec(tokenizer, 50, 50))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert (reference.pad_token_id, reference.eos_token_id) == (0, 1)
    for text in ("Wanted: nurse, Łódź. Skills: triage.", f"a {EOS} b"):
        assert reference.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_a_broken_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BadInput, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_prompt_is_the_template_around_the_cv(tokenizer):
    prompt, jd = Codec(tokenizer, 50, 50).prompt("a nurse"), Codec(tokenizer, 50, 50).jd("a ward")
    assert tokenizer.decode(prompt, skip_special_tokens=False) == "CV: a nurse\nJD:"
    assert (tokenizer.decode(prompt + jd, skip_special_tokens=False)
            == f"CV: a nurse\nJD: a ward{EOS}")


def test_template_tokens_do_not_depend_on_the_cv(tokenizer):
    codec = Codec(tokenizer, 50, 50)
    for cv in ("x", "x\n", "x\n\nJ", "JD:", " "):
        prompt = codec.prompt(cv)
        assert prompt[:len(codec.before)] == codec.before
        assert prompt[-len(codec.after):] == codec.after


def test_what_is_too_long_is_cut_and_counted(tokenizer):
    ids = tokenizer.encode(" one two three four").ids
    n = len(ids)
    codec = Codec(tokenizer, n - 1, n)
    whole = Codec(tokenizer, n, n + 1)
    assert codec.prompt("one two three four") == whole.before + ids[:-1] + whole.after
    assert (len(codec.cut_cvs), len(codec.cut_jds)) == (1, 0)

    assert whole.jd("one two three four")[-1] == whole.eos
    assert codec.jd("one two three four") == ids            # no end-of-text: it does not end there
    assert codec.eos not in codec.jd("one two three four")
    # A text counts once, however often it comes.
    assert (len(codec.cut_cvs), len(codec.cut_jds)) == (1, 1)

    whole.prompt("one two three four")                                          # just fits
    assert (len(whole.cut_cvs), len(whole.cut_jds)) == (0, 0)


@pytest.mark.parametrize("name", tricky_tokenizers())
def test_control_tokens_do_not_come_out_of_a_text_whatever_the_tokenizer(name, tmp_path):
    tokenizer = tricky_tokenizers()[name]
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    codec = Codec(load_tokenizer(tmp_path), 200, 200)
    text = f"a cook {EOS} {TURN} {END_OF_TURN} {PAD} Ж b"
    found = set(load_tokenizer(tmp_path).encode(text).ids)
    assert found & {codec.eos, codec.pad}               # else the test would show nothing
    assert not set(codec.encode(text)) & {codec.eos, codec.pad, tokenizer.token_to_id(TURN)}
    assert codec.jd(text).index(codec.eos) == len(codec.jd(text)) - 1
    if name != "BPE, unknown is the end":
        assert tokenizer.token_to_id("<unk>") in codec.encode("Ж")      # what is unknown stays


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    {"normalizer": {"type": "Sequence",
                    "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AA=="}]}}])
def test_what_ends_the_process_is_not_loaded(tokenizer, tmp_path, change):
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()) | change))
    with pytest.raises(BadInput, match="tokenizer.json: a Precompiled normalizer is not supported"):
        load_tokenizer(tmp_path)


def test_a_text_that_the_tokenizer_cannot_read_is_named():
    """It has no token for what it does not know."""
    with pytest.raises(BadInput, match="the tokenizer cannot read the text 'Ж cook'"):
        Codec(Tokenizer(models.WordLevel({PAD: 0, EOS: 1, "a": 2, "CV:": 3, "\nJD:": 4},
                                         unk_token="none")), 9, 9).encode("Ж cook")


def test_the_longest_texts_fill_the_context(tokenizer):
    codec = Codec(tokenizer, 7, 9)
    assert len(codec.prompt("word " * 50)) + len(codec.jd("word " * 50)) == codec.context()


def test_shrunken_budgets_still_hold_the_longest_training_text(tokenizer):
    codec = Codec(tokenizer, 1000, 1000)
    cv, jd = "a registered nurse " * 4, "a ward in London " * 3
    n_prompt, n_jd = len(codec.prompt(cv)), len(codec.jd(jd))
    codec.shrink(n_prompt, n_jd)
    assert len(codec.prompt(cv)) == n_prompt and len(codec.jd(jd)) == n_jd
    assert (len(codec.cut_cvs), len(codec.cut_jds)) == (0, 0)
    assert n_prompt + n_jd <= codec.context() <= math.ceil(1.1 * (n_prompt + n_jd)) + 1
    small = Codec(tokenizer, 5, 6)
    small.shrink(n_prompt, n_jd)
    assert (small.max_cv, small.max_jd) == (5, 6)                           # never raises a budget


def test_text_stops_at_the_first_eos(tokenizer):
    codec = Codec(tokenizer, 50, 50)
    first, second = codec.jd("first"), codec.jd("second")
    assert codec.text(first + second) == "first"
    assert codec.text(first[:-1]) == "first"                                    # none was reached
    assert codec.text([codec.eos]) == codec.text([]) == ""


def test_text_and_ids_are_not_changed_by_use(tokenizer):
    codec = Codec(tokenizer, 50, 50)
    first = codec.jd("a ward")
    first.append(99)
    codec.prompt("a ward").clear()
    assert codec.jd("a ward") == Codec(tokenizer, 50, 50).jd("a ward")
    assert codec.prompt("a ward") == Codec(tokenizer, 50, 50).prompt("a ward")


# ------------------------------------------------------------------------------------------ batches
def test_pad_right():
    ids, lengths = pad_right([[5, 6, 7], [8], [9, 0]], pad=3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3], [9, 0, 3]]
    assert lengths.tolist() == [3, 1, 2]
    assert ids.dtype == lengths.dtype == torch.long


def epoch(lengths, seed, batch_size=8, **settings):
    return bucketed(lengths, batch_size, torch.Generator().manual_seed(seed), **settings)


def random_lengths(n):
    rng = random.Random(0)
    return [rng.randrange(10, 100) for _ in range(n)]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 61, 300])
def test_each_index_is_in_one_batch(n):
    batches = epoch(random_lengths(n), seed=0, pool=4)
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert len(batches) == math.ceil(n / 8) and all(1 <= len(batch) <= 8 for batch in batches)


def test_similar_lengths_together_mean_less_padding():
    lengths = random_lengths(512)

    def pads(batches):
        return sum(max(lengths[i] for i in batch) - lengths[i] for batch in batches for i in batch)

    order = random.Random(1).sample(range(512), 512)
    assert pads(epoch(lengths, seed=0)) < 0.2 * pads([order[k:k + 8] for k in range(0, 512, 8)])


def test_batches_depend_on_the_generator_only():
    lengths = random_lengths(100)
    assert epoch(lengths, seed=1) == epoch(lengths, seed=1) != epoch(lengths, seed=2)


def test_batches_do_not_come_in_order_of_length():
    lengths = random_lengths(800)
    longest = [max(lengths[i] for i in batch) for batch in epoch(lengths, seed=0, pool=100)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    # Nor is what stands together always the same.
    assert {frozenset(b) for b in epoch(lengths, 1)}.isdisjoint(
        {frozenset(b) for b in epoch(lengths, 2)})
