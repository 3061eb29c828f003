"""A table of one's own CVs and JDs into a data set.

    python girl.py data --from FILE.csv --cv COLUMN --jd COLUMN [--rejected-jd COLUMN] --out DIR

Each row holds a CV and a JD that go together, and maybe what was turned down: `--accepted` names a column of yes and no,
`--rejected-cv` one with the CV of somebody who did not get this job, `--rejected-jd` one with a job that this person did not
get. Without any of them all rows count as accepted, and the JDs of other candidates stand for rejected ones.

1. Read the rows: UTF-8, or what `--encoding` says; the delimiter under which the header has the columns, or `--delimiter`. Skip
   and count rows with an empty cell, or with a word such as NULL that means one.
2. Replace e-mail addresses, phone numbers and links (see texts.py). Names stay: no pattern finds those.
3. Drop decisions that came before, and rejections of what was accepted.
4. Split by groups: decisions that share a CV or a JD stay together, so that no text is on two sides. Where all hang together,
   `--split-by cv` splits CVs and JDs each by themselves, and drops the decisions between two splits.

A file that can be read in two ways is refused, with its line. Left out: near duplicates (only equal texts are known as the same),
Excel files, any judgement of what a CV says.
"""
import csv
import io
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

from data import SPLITS, Record, clear_data, connected, halves, read_line, write_records
from run import BadInput, write_json
from texts import hide_contacts, is_utf16, normalize

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
SHARES_BY_CV = {"train": 0.7, "valid": 0.15, "test": 0.15}      # of the CVs and of the JDs: of the decisions it leaves 49%, 2%, 2%
ANSWERS = (dict.fromkeys(("true", "yes", "y", "1", "accepted"), True)
           | dict.fromkeys(("false", "no", "n", "0", "rejected"), False))
# What pandas takes for a missing cell, and what databases, spreadsheets and people write for one; in any case.
MISSING = {"null", "(null)", "\\n", "none", "nan", "-nan", "nat", "na", "<na>", "n/a", "n.a.", "#n/a", "#n/a n/a", "#na", "1.#ind",
           "-1.#ind", "1.#qnan", "-1.#qnan", "-", "--", "\u2013", "\u2014"}
LONG = 10000                # characters; so long a text is kept, and counted
GARBLED = re.compile(r"[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac")        # UTF-8 that was read as cp1252: Ã¼ for ü


# ---------------------------------------------------------------------------------------------------- reading rows
MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"),
         (b"\xfe\xff", "utf-16"))
LINE_END = re.compile(r"\r\n?|\n")


# A word with what is not ASCII, and what no word of a Western language has: three letters with accents in a row, a capital with one
# after a small letter, a sign within a word (but for apostrophes, dashes, hyphens), two different signs in a row. Other
# encodings, read as cp1252, are full of these.
FOREIGN = re.compile(r"[^\s!-/:-@\[-`{-~]*[^\x00-\x7f\xa0][^\s!-/:-@\[-`{-~]*")
CAPITALS, SMALL = "À-ÖØ-ÞŒŠŸŽ", "ß-öø-ÿœšž"
SIGNS = rf"[^\x00-\x7f\xa0\xad{CAPITALS}{SMALL}‘’–—´·]"
ODD = re.compile(rf"[{CAPITALS}{SMALL}]{{3}}|[a-z{SMALL}][{CAPITALS}]|[A-Za-z{CAPITALS}{SMALL}]{SIGNS}+[A-Za-z{CAPITALS}{SMALL}]|"
                 r"([¡-¿])(?!\1)[¡-¿]")


def check_encoding(name):
    """Refuse what is none of Python's encodings of text."""
    try:
        b"a".decode(name)
    except UnicodeError:
        pass                        # it knows what is a text, and this is none
    except (LookupError, ValueError):
        raise BadInput(f"data: --encoding {name!r} is no encoding of text that Python knows; give one such as cp1252, gbk, shift_jis "
                       "or utf-16-le")


def decode(path, content, asked=None):
    """(text, its encoding, a word of it). The word is there where the encoding was guessed: somebody has to look at it."""
    known = asked or next((name for mark, name in MARKS if content.startswith(mark)), None)
    if not known and is_utf16(content):
        raise BadInput(f"{path}:1: every other byte is 0, as in UTF-16 without a byte-order mark; save the file as UTF-8, or give its "
                       "encoding, --encoding utf-16-le or utf-16-be")
    try:
        text, sample = content.decode(known or "utf-8"), None
    except UnicodeDecodeError as e:
        if known:
            raise BadInput(f"{path}:{line_of(e, known)}: not {known} text (bytes {e.object[e.start:e.end].hex(' ')}); save the file as "
                           "UTF-8, or give its encoding with --encoding NAME")
        text, sample = guess(path, content, e)
        known = "cp1252"
    except UnicodeError as e:           # of codecs that do not say where
        raise BadInput(f"{path}: not {known} text ({e}); save the file as UTF-8, or give its encoding with --encoding NAME")
    if (at := text.find("\0")) >= 0 and not str(path).lower().endswith(".jsonl"):
        raise BadInput(f"{path}:{len(LINE_END.findall(text, 0, at)) + 1}: a character NUL, which no text has; take it out, or give the "
                       "file's encoding with --encoding NAME (utf-16-le has many of them)")
    return text.replace("\ufeff", ""), known or "utf-8", sample     # several files in one have byte-order marks inside


def line_of(error, encoding):
    """The number of the line with the byte at which decoding failed."""
    return len(LINE_END.findall(error.object[:error.start].decode(encoding, "ignore"))) + 1


def guess(path, content, error):
    """(text, a word of it) of a file that is no UTF-8, as cp1252, where nothing speaks against that. One stray byte in a file
    of UTF-8 must not change how the other rows are read: whatever has one letter of UTF-8 is UTF-8."""
    where = f"{path}:{line_of(error, 'utf-8')}: bytes {content[error.start:error.end].hex(' ')} are not UTF-8"
    remedy = "save the file as UTF-8, or give its encoding with --encoding NAME"
    if re.search(r"[^\x00-\x7f\udc80-\udcff]", content.decode("utf-8", "surrogateescape")):
        raise BadInput(f"{where}, and other characters of the file are; correct them, {remedy}")
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        text = ""
    words = FOREIGN.findall(text)
    if not text or 10 * sum(map(bool, map(ODD.search, words))) > len(words):
        raise BadInput(f"{where}, and as cp1252 they make no Western text; {remedy} (gbk, shift_jis, cp1251, mac_roman, ...)")
    return text, next((w for w in words if re.search(r"[^\W\x00-\x7f]", w)), words[0])


def check_delimiter(name):
    """The character that `--delimiter` names."""
    found = "\t" if name.lower() in ("tab", "\\t") else name
    if len(found) != 1 or found in "\r\n\" \0":
        raise BadInput(f"data: --delimiter {name[:40]!r} must be one character, or tab; no quote, no blank")
    return found


def read_table(path, wanted, encoding=None, delimiter=None):
    """(rows, report): rows are (where, {column: cell}); the report says how the file was read. A wanted column must not stand
    twice."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".jsonl"):
        raise BadInput(f"{path}: give a .csv, .tsv or .jsonl file")
    if delimiter and ending == ".jsonl":
        raise BadInput(f"{path}: a .jsonl file has no delimiter; leave --delimiter out")
    try:
        content = path.read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror or e}); give a .csv, .tsv or .jsonl file")
    text, encoding, sample = decode(path, content, encoding)
    rows, how = read_json_lines(path, text) if ending == ".jsonl" else read_csv(path, text, set(wanted), delimiter)
    return rows, {"encoding": encoding, "encoding_guessed_from": sample} | how


def read_json_lines(path, text):
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = read_line(line)
            except (ValueError, RecursionError) as e:
                raise BadInput(f"{path}:{number}: not JSON ({e})")
            if not isinstance(row, dict):
                raise BadInput(f"{path}:{number}: expected an object with a key for each column, found {type(row).__name__}")
            rows.append((f"{path}:{number}", row))
    return rows, {"rows_with_other_number_of_cells": 0}


def read_csv(path, text, wanted, delimiter):
    """Rows of comma-separated values, and what was found: the delimiter, and how many rows have too many or too few cells."""
    csv.field_size_limit(2 ** 31 - 1)
    says = re.match(r'\s*"?sep=([^\r\n" ])"?(?:\r\n?|\n)', text, re.IGNORECASE)       # Excel's line before the header
    first = len(LINE_END.findall(says[0])) if says else 0
    text = text[says.end():] if says else text
    delimiter = delimiter or (says[1] if says else find_delimiter(path, text, wanted))
    rows, broken, begin = [], 0, first + 1
    # A blank after the delimiter may stand before a quote; blanks around a cell are taken away anyway.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        header = header_of(reader)
        begin = first + reader.line_num
        if twice := [name for name in header if name in wanted and header.count(name) > 1]:
            raise BadInput(f"{path}:{begin}: the column {twice[0][:40]!r} stands twice; rename one of them")
        # Where header or row end in a delimiter, there are cells without a name: they may be missing, or must be empty.
        least = max((i for i, name in enumerate(header, 1) if name), default=0)
        for cells in reader:
            where, begin = f"{path}:{first + reader.line_num}", first + reader.line_num + 1
            if least <= len(cells) and not any(cells[len(header):]) and cells:
                rows.append((where, dict(zip(header, cells))))
            elif any(cells):
                broken += 1
    except csv.Error as e:
        escaped = "; write a quote within a cell twice, not with a backslash" if '\\"' in text else ""
        raise BadInput(f"{path}:{first + max(reader.line_num, 1)}: not a table of comma-separated values ({e}) in the row that begins in "
                       f"line {begin}; correct its quotes, or give another --delimiter{escaped}")
    if header and not rows and (lacks := sorted(wanted - set(header))):
        raise BadInput(f"{path}:{first + 1}: no column {lacks[0]!r}; there are {', '.join(map(repr, header))}; name others, or give "
                       "the delimiter with --delimiter C")
    return rows, {"delimiter": delimiter, "rows_with_other_number_of_cells": broken}


def header_of(reader):
    """The names in the first row that is not blank."""
    return next(([name.strip() for name in cells] for cells in reader if any(c.strip() for c in cells)), [])


def find_delimiter(path, text, wanted):
    """The one under which the header has the wanted columns, or most of them; then the one that makes most columns. (The tab comes
    first in a .tsv file.) The header is read as csv: a delimiter or a line end within quotes is part of a name."""
    found = {}
    for delimiter in "\t,;|" if path.suffix.lower() == ".tsv" else ",;\t|":
        try:
            found[delimiter] = header_of(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True,
                                                    strict=True))
        except csv.Error:
            continue
    return max(found, key=lambda d: (len(wanted & set(found[d])), len(found[d])), default=",")


def value(row, column, where, count):
    """What stands in a cell: a text, a number or an answer; None where it is empty, or says that it is."""
    if column not in row:
        raise BadInput(f"{where}: no column {column!r}; there are {', '.join(map(repr, row)) or 'none'}")
    found = row[column]
    if isinstance(found, str) and (word := found.strip()).casefold() in MISSING:
        count["missing", word] += 1
        return None
    if isinstance(found, float) and not math.isfinite(found):
        if not math.isnan(found):
            raise BadInput(f"{where}: {column} holds {found}, which is neither a text nor a missing cell; correct it")
        count["missing", "NaN"] += 1
        return None
    return found


def cell(row, column, where, hide, count):
    """A text as all stages see it; empty where there is none."""
    found = value(row, column, where, count)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise BadInput(f"{where}: {column} must be a text, found {type(found).__name__}")
    return normalize(found.encode("utf-8", "replace").decode(), hide, count)


def answer(row, column, where, count):
    """True, False, or None for an empty cell. A column of numbers with a gap comes as 1.0 and 0.0."""
    found = value(row, column, where, count)
    if found is None:
        return None
    found = re.sub(r"^([01])\.0*$", r"\1", str(found).strip().lower())
    if found and found not in ANSWERS:
        raise BadInput(f"{where}: {column} must be yes or no (or true, false, 1, 0), found {found[:40]!r}")
    return ANSWERS.get(found)


# ------------------------------------------------------------------------------------------------------ the data set
def decisions(rows, columns, hide, count):
    """Records of all rows. columns: {"cv", "jd", and one of "accepted", "rejected_cv", "rejected_jd" or none}."""
    def text(row, name, where):
        found = cell(row, columns[name], where, hide, count)
        count["long"] += len(found) > LONG
        count["lost"] += found.count("\ufffd")
        count["garbled"] += bool(GARBLED.search(found))
        return found

    records = []
    for where, row in rows:
        cv, jd = text(row, "cv", where), text(row, "jd", where)
        accepted = answer(row, columns["accepted"], where, count) if "accepted" in columns else True
        if not cv or not jd or accepted is None:
            count["empty"] += 1
            continue
        records.append(Record(cv, jd, accepted))
        for name in ("rejected_cv", "rejected_jd"):
            if name in columns:
                other = text(row, name, where)
                count["no rejection"] += not other
                if other:
                    records.append(Record(other, jd, False) if name == "rejected_cv" else Record(cv, other, False))
    return records


def without_duplicates(records, count):
    """Each decision once; of a pair that was both accepted and rejected, the acceptance."""
    yes, kept = {(r.cv, r.jd) for r in records if r.accepted}, {}
    for r in records:
        if not r.accepted and (r.cv, r.jd) in yes:
            count["contradictions"] += 1
        elif r in kept:
            count["duplicates"] += 1
        else:
            kept[r] = True
    return list(kept)


def split_by_group(records, draw):
    """{split: records}, about in the shares of SHARES: the largest group first, each to the split that lacks most."""
    groups = connected(records)
    draw.shuffle(groups)
    found = {split: [] for split in SPLITS}
    for group in sorted(groups, key=len, reverse=True):
        lacks = {s: SHARES[s] * len(records) - len(found[s]) for s in SPLITS}
        found[max(SPLITS, key=lacks.get)] += [records[i] for i in sorted(group)]
    return found, len(groups)


def split_by_cv(records, draw):
    """{split: records}, where the CVs are split, and the JDs: a decision with its CV in one split and its JD in another is dropped.
    A JD whose decisions are all on CVs of one split goes there, the others are drawn."""
    cvs = sorted({r.cv for r in records})
    draw.shuffle(cvs)
    side, of_jd = drawn(cvs), {}
    for r in records:
        of_jd.setdefault(r.jd, set()).add(side[r.cv])
    shared = sorted(jd for jd, sides in of_jd.items() if len(sides) > 1)
    draw.shuffle(shared)
    side_of_jd = {jd: min(sides) for jd, sides in of_jd.items()} | drawn(shared)
    return {s: [r for r in records if side[r.cv] == side_of_jd[r.jd] == s] for s in SPLITS}


def drawn(texts):
    """Text -> split, in the shares of SHARES_BY_CV; `texts` are in random order."""
    valid, test = (round(SHARES_BY_CV[s] * len(texts)) for s in ("valid", "test"))
    return {t: "valid" if i < valid else "test" if i < valid + test else "train" for i, t in enumerate(texts)}


def others_jds(records, draw):
    """One rejection for each accepted pair: the JD of another candidate, where there is one that this one was not accepted for."""
    jds, mine = sorted({r.jd for r in records}), {}
    for r in records:
        mine.setdefault(r.cv, set()).add(r.jd)
    rejected = []
    for r in records:
        if len(mine[r.cv]) < len(jds):
            jd = draw.choice(jds)
            while jd in mine[r.cv]:
                jd = draw.choice(jds)
            mine[r.cv].add(jd)
            rejected.append(Record(r.cv, jd, False))
    return rejected


def split(path, records, by, draw):
    """({split: records}, the number of groups). Each split must have an accepted pair."""
    splits, groups = split_by_group(records, draw)
    if by == "cv":
        splits = split_by_cv(records, draw)
    if all(any(r.accepted for r in splits[s]) for s in SPLITS):
        return splits, groups
    if by == "cv":
        raise BadInput(f"{path}: of {len(records)} decisions {sum(map(len, splits.values()))} have their CV and their JD in one split; "
                       "that is too few to have an accepted pair in train, valid and test; give more rows, or another --seed")
    raise BadInput(f"{path}: {len(records)} decisions hang together in {groups} groups that share a CV or a JD; that is too few to have "
                   "an accepted pair in train, valid and test and no text in two of them; give --split-by cv, which drops the decisions "
                   "between two splits, or rows of other CVs and JDs")


def import_table(path, out, columns, keep_contacts, seed, encoding=None, delimiter=None, split_by="group"):
    """Write train.jsonl, valid.jsonl, test.jsonl and import.json (what was found, and what became of it)."""
    asked = {"encoding": encoding, "delimiter": delimiter, "keep_contacts": keep_contacts}
    rows, how = read_table(path, columns.values(), encoding, delimiter)
    draw, count = random.Random(seed), Counter()
    found = decisions(rows, columns, not keep_contacts, count)
    records = without_duplicates(found, count)
    if not any(r.accepted for r in records):
        raise BadInput(f"{path}: no accepted pair of a CV and a JD in {len(rows)} rows ({count['empty']} with an empty cell), "
                       f"beside {how['rows_with_other_number_of_cells']} with another number of cells than the header; look at the file's "
                       "columns, and at its delimiter, which --delimiter C names")
    splits, groups = split(path, records, split_by, draw)
    dropped = len(records) - sum(map(len, splits.values()))
    if all(r.accepted for r in records):
        for s in SPLITS:
            splits[s] += others_jds(splits[s], draw)
    report = {"from": str(path), **how, "asked": asked, "columns": columns, "seed": seed, "rows": len(rows),
              "rows_with_an_empty_cell": count["empty"],
              "cells_that_say_missing": {k[1]: n for k, n in sorted(count.items(), key=str) if k[0] == "missing"},
              "rows_without_a_rejection": count["no rejection"], "duplicates": count["duplicates"],
              "contradictions": count["contradictions"], "texts_over_10000_characters": count["long"],
              "characters_lost_before_(U+FFFD)": count["lost"], "texts_garbled_before": count["garbled"],
              "contacts_replaced": {k: count[k] for k in ("EMAIL", "PHONE", "LINK")} if not keep_contacts else None,
              "rejections": "JDs of other candidates" if all(r.accepted for r in records) else "from the table",
              "groups": groups, "split_by": split_by, "dropped_between_splits": dropped,
              "decisions": {s: len(splits[s]) for s in SPLITS},
              "accepted": {s: sum(r.accepted for r in splits[s]) for s in SPLITS}}
    clear_data(out)
    write_json(Path(out) / "import.json", report)
    for s in SPLITS:
        write_records(Path(out) / f"{s}.jsonl", splits[s])
    for name, value in report.items():
        print(f"{name.replace('_', ' '):<34}{json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value!s}")
    for line in remarks(report, splits["train"]):
        print(line)


def remarks(report, train):
    """What somebody should know of this table, a sentence each."""
    if word := report["encoding_guessed_from"]:
        yield f"The encoding is a guess: as {report['encoding']}, a word of it reads {word[:40]!r}. If that is wrong, give --encoding NAME."
    if n := report["characters_lost_before_(U+FFFD)"]:
        yield f"{n} characters are U+FFFD: they were lost before, when the file was written from another encoding. Write it anew, if you can."
    if n := report["texts_garbled_before"]:
        yield f"{n} texts look like UTF-8 that was read in another encoding before (Ã¼ for ü). They are used as they are."
    if report["rejections"] != "from the table":
        yield ("This table says nothing about rejections: for each accepted pair, the JD of another candidate was drawn at random and "
               "taken for rejected.")
    side = halves(train, report["split_by"])
    for part, stages in (("A", "sft, reward and ppo"), ("B", "reward --judge and recommend")):
        for accepted, kind in ((True, "accepted"), (False, "rejected")):
            if not any(side[r.cv] == part and r.accepted == accepted for r in train):
                yield (f"Half {part} of train has no {kind} decision, and {stages} learn from it: give more rows"
                       + (", or --split-by cv." if report["split_by"] == "group" else ", or another --seed."))
