"""A table of one's own CVs and JDs into a data set.

    python girl.py data --from FILE.csv --cv COLUMN --jd COLUMN [--rejected-jd COLUMN] --out DIR

Each row holds a CV and a JD that go together, and maybe what was turned down: `--accepted` names a column of yes and no,
`--rejected-cv` one with the CV of somebody who did not get this job, `--rejected-jd` one with a job that this person did not
get. Without any of them all rows count as accepted, and the JDs of other candidates stand for rejected ones.

1. Read the rows: as UTF-8, or as `--encoding` says. The delimiter is the one under which the header
   has the columns, or `--delimiter`. Rows with a missing cell are skipped and counted.
2. Replace e-mail addresses, phone numbers and links (texts.py). Names stay: no pattern finds those.
3. Drop decisions that came before, and rejections of what was accepted.
4. Split by groups: decisions that share a CV or a JD stay together, so that no text is on two sides.
   If all form one group, `--split-by cv` splits CVs and JDs separately, and drops the decisions
   whose CV and JD are in different splits.

A file that could be read in two ways is refused. Left out: near duplicates (only equal texts are
known as the same), Excel files, any judgement of what a CV says.
"""
import csv
import io
import json
import math
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

from data import Record, halves
from plumbing.records import SPLITS, clear_data, connected, read_line, text_of, write_records
from plumbing.files import BadInput, write_json
from plumbing.texts import is_utf16, normalize

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
SHARES_BY_CV = {"train": 0.7, "valid": 0.15, "test": 0.15}      # of the CVs, and of the JDs
ANSWERS = (dict.fromkeys(("true", "yes", "y", "1", "accepted"), True)
           | dict.fromkeys(("false", "no", "n", "0", "rejected"), False))
# What pandas takes for a missing cell, and what databases, spreadsheets and people write for one.
MISSING = {"null", "(null)", "\\n", "none", "nan", "-nan", "nat", "na", "<na>", "n/a", "n.a.",
           "#n/a", "#n/a n/a", "#na", "#nv", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan",
           "nil", "undefined", "<null>", "-", "--", "\u2013", "\u2014"}
ERROR = re.compile(r"#[^\W_][\w/]{0,20}[!?]")       # of a spreadsheet: #NAME? #DIV/0! #BEZUG!
LONG = 10000                # characters; so long a text is kept, and counted
GARBLED = re.compile(r"[ÃÂ][\u0080-\u00bf]|â€")      # UTF-8 read as cp1252: ü becomes Ã¼

MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"),
         (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
LINE_END = re.compile(r"\r\n?|\n")
# A word that is not all ASCII, and what no word of a Western language has: three accented letters
# in a row, an accented capital after a small letter, a sign within a word (apostrophes and dashes
# are none), two different signs in a row. Other encodings, read as cp1252, are full of these.
FOREIGN = re.compile(r"[^\s!-/:-@\[-`{-~]*[^\x00-\x7f\xa0][^\s!-/:-@\[-`{-~]*")
CAPITAL, SMALL = "À-ÖØ-ÞŒŠŸŽ", "ß-öø-ÿœšž"
LETTER, SIGN = f"[A-Za-z{CAPITAL}{SMALL}]", rf"[^\x00-\x7f\xa0\xad{CAPITAL}{SMALL}‘’–—´·]"
ODD = re.compile(rf"[{CAPITAL}{SMALL}]{{3}}|[a-z{SMALL}][{CAPITAL}]|{LETTER}{SIGN}+{LETTER}|"
                 r"([¡-¿])(?!\1)[¡-¿]")
SAVE_AS = "save the file as UTF-8, or give its encoding with --encoding NAME"


# ---------------------------------------------------------------------------------------------------- reading rows
def check_encoding(name):
    """Refuse a name that is no encoding of text in Python."""
    try:
        b"a".decode(name, "ignore")         # as `where` does; idna and the like cannot
    except (LookupError, ValueError):
        raise BadInput(f"data: --encoding {name!r} is no encoding of text that Python knows; give "
                       "one such as cp1252, gbk, shift_jis, utf-16-le")


def decode(path, content, asked=None):
    """(text, encoding, sample) of a file's bytes. If the encoding was guessed, the sample is some
    words of the text, so that a person can see whether the guess is right: those with the rarest
    signs, as all else may look right. Else it is None."""
    known = asked or next((name for mark, name in MARKS if content.startswith(mark)), None)
    if not known and is_utf16(content):
        bits = 32 if content.count(0) > len(content) / 2 else 16
        raise BadInput(f"{path}:1: every other byte is 0, or more, as in UTF-{bits}; {SAVE_AS} "
                       f"(utf-{bits}-le, utf-{bits}-be)")
    sample = None
    try:
        text = content.decode(known or "utf-8")
    except UnicodeDecodeError as e:
        if known:
            raise BadInput(f"{where(path, e, known)} is no {known} text; {SAVE_AS}")
        text, known, sample = guess(path, content, e)
    except UnicodeError as e:           # of a codec that does not say where
        raise BadInput(f"{path}: no {known} text ({e}); {SAVE_AS}")
    if found := re.search("[\0\x1b]", text):
        name = "an escape" if found[0] == "\x1b" else "a NUL"      # iso2022_jp is full of those
        raise BadInput(f"{path}:{line_of(text[:found.start()])}: {name} character, as in a file of "
                       f"another encoding (iso2022_jp, utf-16-le); take it out, {SAVE_AS}")
    return text.replace("\ufeff", ""), known or "utf-8", sample      # marks also within the file


def line_of(before):
    """The number of the line in which the text after this one begins."""
    return len(LINE_END.findall(before)) + 1


def where(path, error, encoding):
    """File, line and bytes of a UnicodeDecodeError."""
    before = error.object[:error.start].decode(encoding, "ignore")
    return f"{path}:{line_of(before)}: byte {error.object[error.start:error.end].hex(' ')}"


def guess(path, content, error):
    """(text, encoding, sample) of a file that is not all UTF-8: cp1252, if it has no character of
    UTF-8 beyond ASCII, and its words look Western. A stray byte in a file of UTF-8 must not change
    how its other rows are read."""
    place, marked = where(path, error, "utf-8"), content.decode("utf-8", "surrogateescape")
    good = len(re.findall("[^\x00-\x7f\udc80-\udcff]", marked))
    if good and good >= len(re.findall("[\udc80-\udcff]", marked)):
        raise BadInput(f"{place} is not UTF-8, and {good} other characters are; correct it, "
                       + SAVE_AS)
    words = [] if good else FOREIGN.findall(content.decode("cp1252", "replace"))
    odd = sum("\ufffd" in word or ODD.search(word) is not None for word in words)
    if not words or 10 * odd > len(words):
        raise BadInput(f"{place} is not UTF-8, and the file's encoding cannot be told; {SAVE_AS} "
                       "(gbk, shift_jis, cp1251, mac_roman, ...)")
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError as e:
        raise BadInput(f"{where(path, e, 'cp1252')} is neither UTF-8 nor cp1252; {SAVE_AS}")
    shown, often = [], Counter("".join(words))
    for sign in sorted(filter(FOREIGN.fullmatch, often), key=often.get):
        if len(shown) < 5 and sign not in "".join(shown):
            shown.append(next(word for word in words if sign in word))
    return text, "cp1252", shown


def check_delimiter(name):
    """The character that `--delimiter` names."""
    found = "\t" if name.lower() in ("tab", "\\t") else name
    if len(found) != 1 or found in "\r\n\" \0":
        raise BadInput(f"data: --delimiter {name[:40]!r} must be one character, or tab; no quote, "
                       "no blank, no line end")
    return found


def read_table(path, wanted, encoding=None, delimiter=None):
    """(rows, report): rows are (where, {column: cell}), and the report says how they were read."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".jsonl"):
        raise BadInput(f"{path}: give a .csv, .tsv or .jsonl file")
    if delimiter and ending == ".jsonl":
        raise BadInput(f"{path}: a .jsonl file has no delimiter; leave --delimiter out")
    try:
        content = path.read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror or e}); give a .csv, .tsv or .jsonl "
                       "file")
    text, encoding, sample = decode(path, content, encoding)
    report = {"encoding": encoding, "encoding_guessed_from": sample}
    if ending == ".jsonl":
        rows = read_json_lines(path, text, set(wanted))
        return rows, report | {"rows_with_other_number_of_cells": 0}
    rows, delimiter, broken = read_csv(path, text, set(wanted), delimiter)
    return rows, report | {"delimiter": delimiter, "rows_with_other_number_of_cells": broken}


def read_json_lines(path, text, wanted):
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = read_line(line)
            except (ValueError, RecursionError) as e:
                raise BadInput(f"{path}:{number}: not JSON ({e}); write one object a line")
            if not isinstance(row, dict):
                raise BadInput(f"{path}:{number}: expected an object with a key for each column, "
                               f"found {type(row).__name__}; write one object a line")
            check_once(list(map(name_of, row)), wanted, f"{path}:{number}")
            rows.append((f"{path}:{number}", {name_of(key): row[key] for key in row}))
    # Some databases leave out a key whose value is missing.
    known = wanted & {key for _, row in rows for key in row}
    return [(place, row | dict.fromkeys(known - row.keys())) for place, row in rows]


@cache
def name_of(column):
    """A column's name as a person sees it."""
    return normalize(column, False)


def check_once(names, wanted, place):
    if twice := [name for name in names if name in wanted and names.count(name) > 1]:
        raise BadInput(f"{place}: the column {twice[0][:40]!r} stands twice; rename one of them")


def read_csv(path, text, wanted, delimiter):
    """(rows, delimiter, broken); `broken` counts the rows with too many or too few cells."""
    csv.field_size_limit(2 ** 31 - 1)
    # A line such as sep=; before the header is Excel's.
    says = re.match(r'\s*"?sep=([^\r\n" ])"?(?:\r\n?|\n)', text, re.IGNORECASE)
    skipped = len(LINE_END.findall(says[0])) if says else 0
    text = text[says.end():] if says else text
    delimiter = delimiter or (says[1] if says else find_delimiter(path, text, wanted))
    other = f"give --delimiter C, other than {delimiter!r}"
    reader, rows, broken, begin = csv_reader(text, delimiter), [], 0, skipped + 1
    sizes = set()
    try:
        header = header_of(reader)
        place = f"{path}:{skipped + reader.line_num}"
        check_once(header, wanted, place)
        if header and (lacks := sorted(wanted - set(header))):
            raise BadInput(f"{place}: no column {lacks[0]!r}; there are "
                           f"{', '.join(map(repr, header))}; name others, or {other}")
        # A delimiter at the end of a line makes a cell without a name: it may be missing or empty.
        named = max((i for i, name in enumerate(header, 1) if name), default=0)
        begin = skipped + reader.line_num + 1
        for cells in reader:
            lines = LINE_END.split("\t".join(cells)) if delimiter == "\t" else ""
            if len(lines) > 1 and {line.count("\t") for line in lines} == {len(header) - 1}:
                raise BadInput(f"{path}:{begin}: a quote makes these {len(lines)} lines one row, "
                               "and each could be a row; double the quotes, or save it as .csv")
            sizes |= {len(cells)} if any(cells) else set()
            if cells and len(cells) >= named and not any(cells[len(header):]):
                row = dict(zip(header, cells))
                if wanted == {row.get(name, "").strip() for name in wanted}:
                    raise BadInput(f"{path}:{begin}: the header again, as where two files were put "
                                   "together; take this line out, or import one of them")
                rows.append((f"{path}:{skipped + reader.line_num}", row))
            elif any(cells):
                broken += 1
            begin = skipped + reader.line_num + 1
    except csv.Error as e:
        hint = ", instead of a backslash" if '\\"' in text else ""
        raise BadInput(f"{path}:{begin}: the row that begins here is not a table of "
                       f"comma-separated values ({e}); correct its quotes (double a quote "
                       f"within a cell{hint}), or {other}")
    if broken and sizes == {len(header) + 1}:
        raise BadInput(f"{place}: each row has one cell more than the header; if the first is its "
                       f"number, name that column too; quote cells that hold {delimiter!r}")
    return rows, delimiter, broken


def csv_reader(text, delimiter):
    """Strict: what is no table is refused. A blank between a delimiter and a quote is skipped."""
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True,
                      strict=True)


def header_of(reader):
    """The names in the first row that is not blank."""
    rows = ([name_of(name) for name in cells] for cells in reader)
    return next((names for names in rows if any(names)), [])


def find_delimiter(path, text, wanted):
    """The delimiter under which the header has most of the wanted columns; then the one that makes
    most columns; then the tab in a .tsv file, the comma in others. The header is read as CSV,
    since a quoted name may hold delimiters and line ends."""
    headers = {}
    for delimiter in "\t,;|" if path.suffix.lower() == ".tsv" else ",;\t|":
        try:
            headers[delimiter] = header_of(csv_reader(text, delimiter))
        except csv.Error:
            continue
    return max(headers, key=lambda d: (len(wanted & set(headers[d])), len(headers[d])), default=",")


def value(row, column, place, count):
    """What a cell holds; None if it is missing. Counts the words that say so."""
    if column not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise BadInput(f"{place}: no column {column!r}; there are {there}")
    found = row[column]
    if isinstance(found, float) and not math.isfinite(found):
        if not math.isnan(found):
            raise BadInput(f"{place}: {column} is {found}; give a text, or null if it is missing")
        found = "NaN"
    seen = normalize(found, False) if isinstance(found, str) else ""
    if seen.casefold() in MISSING or ERROR.fullmatch(seen):
        count["missing", seen] += 1
        return None
    return found


def cell(row, column, place, hide, count):
    """A text as the stages see it; empty if the cell is missing."""
    if value(row, column, place, count) is None:
        return ""
    return normalize(text_of(row, column, place), hide, count)


def answer(row, column, place, count):
    """True, False, or None for a missing cell. Yes and no as numbers may be 1.0 and 0.0: so pandas
    writes a column that has a gap."""
    found = value(row, column, place, count)
    found = "" if found is None else normalize(str(found), False).lower()
    found = re.sub(r"^([01])\.0*$", r"\1", found)
    if found and found not in ANSWERS:
        raise BadInput(f"{place}: {column} must be yes or no (or true, false, 1, 0), found "
                       f"{found[:40]!r}")
    return ANSWERS.get(found)


# ------------------------------------------------------------------------------------------------------ the data set
def decisions(rows, columns, hide, count):
    """Records of all rows. columns: {"cv", "jd", and one of "accepted", "rejected_cv", "rejected_jd" or none}."""
    def text(row, name, place):
        found = cell(row, columns[name], place, hide, count)
        count["long"] += len(found) > LONG
        count["lost"] += found.count("\ufffd")
        count["garbled"] += bool(GARBLED.search(found))
        return found

    records = []
    for place, row in rows:
        cv, jd = text(row, "cv", place), text(row, "jd", place)
        accepted = True
        if "accepted" in columns:
            accepted = answer(row, columns["accepted"], place, count)
        if not cv or not jd or accepted is None:
            count["empty"] += 1
            continue
        records.append(Record(cv, jd, accepted))
        for name in ("rejected_cv", "rejected_jd"):
            if name in columns:
                other = text(row, name, place)
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
    """{split: records}: the CVs are split, and the JDs; a decision between two splits is dropped.
    A JD that only CVs of one split were judged for goes there; the other JDs are drawn."""
    cvs = sorted({r.cv for r in records})
    draw.shuffle(cvs)
    side, sides_of_jd = drawn(cvs), {}
    for r in records:
        sides_of_jd.setdefault(r.jd, set()).add(side[r.cv])
    shared = sorted(jd for jd, sides in sides_of_jd.items() if len(sides) > 1)
    draw.shuffle(shared)
    side_of_jd = {jd: min(sides) for jd, sides in sides_of_jd.items()} | drawn(shared)
    return {s: [r for r in records if side[r.cv] == side_of_jd[r.jd] == s] for s in SPLITS}


def drawn(texts):
    """Text -> split, in the shares of SHARES_BY_CV, for texts in random order."""
    valid, test = (round(SHARES_BY_CV[s] * len(texts)) for s in ("valid", "test"))
    names = ["valid"] * valid + ["test"] * test + ["train"] * (len(texts) - valid - test)
    return dict(zip(texts, names))


def split(path, records, by, draw):
    """({split: records}, number of groups); each split has an accepted pair."""
    accepted = [r for r in records if r.accepted]
    for kind, texts in (("CVs", {r.cv for r in accepted}), ("JDs", {r.jd for r in accepted})):
        if len(texts) < len(SPLITS):
            raise BadInput(f"{path}: different {kind} that were accepted: {len(texts)}; that is "
                           "too few, as train, valid and test share none; give rows with at least "
                           f"{len(SPLITS)}")
    splits, groups = split_by_group(records, draw)
    if by == "cv":
        splits = split_by_cv(records, draw)
    if all(any(r.accepted for r in splits[s]) for s in SPLITS):
        return splits, groups
    if by == "cv":
        raise BadInput(f"{path}: of {len(records)} decisions {sum(map(len, splits.values()))} have "
                       "CV and JD in one split; that is too few to have an accepted pair in train, "
                       "valid and test; give more rows, or another --seed")
    remedy = ("--split-by cv, which drops the decisions between two splits, or rows with other CVs "
              "and JDs" if groups < len(accepted) else "more rows")
    raise BadInput(f"{path}: {len(records)} decisions hang together in {groups} groups that share "
                   "a CV or a JD; that is too few to have an accepted pair in train, valid and "
                   f"test and no text in two of them; give {remedy}")


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


def import_table(path, out, columns, keep_contacts, seed, encoding=None, delimiter=None,
                 split_by="group"):
    """Write train.jsonl, valid.jsonl, test.jsonl and import.json (what was found, and what became of it)."""
    columns = {name: name_of(column) for name, column in columns.items()}
    if len(set(columns.values())) < len(columns):
        raise BadInput("data: --cv, --jd and the others must name different columns")
    rows, how = read_table(path, columns.values(), encoding, delimiter)
    draw, count = random.Random(seed), Counter()
    found = decisions(rows, columns, not keep_contacts, count)
    records = without_duplicates(found, count)
    if records and not any(r.accepted for r in records):
        raise BadInput(f"{path}: the column {columns['accepted']!r} never says yes beside a CV and "
                       "a JD; give rows that were accepted, or another column with --accepted")
    if not records:
        raise BadInput(f"{path}: no accepted pair of a CV and a JD in {len(rows)} rows ({count['empty']} with an empty cell), "
                       f"beside {how['rows_with_other_number_of_cells']} with another number of "
                       "cells than the header; look at the file's delimiter (--delimiter C) and "
                       "columns")
    splits, groups = split(path, records, split_by, draw)
    dropped = len(records) - sum(map(len, splits.values()))
    if all(r.accepted for r in records):
        for s in SPLITS:
            splits[s] += others_jds(splits[s], draw)
    report = {"from": str(path)} | how | {
              "columns": columns, "seed": seed,
              "asked": {"encoding": encoding, "delimiter": delimiter, "split_by": split_by},
              "rows": len(rows), "rows_with_an_empty_cell": count["empty"],
              "cells_that_say_missing": {k[1]: n for k, n in count.items() if k[0] == "missing"},
              "rows_without_a_rejection": count["no rejection"], "duplicates": count["duplicates"],
              "contradictions": count["contradictions"], "texts_over_10000_characters": count["long"],
              "lost_characters_(U+FFFD)": count["lost"], "garbled_texts": count["garbled"],
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
        print(f"{name.replace('_', ' '):<34}{json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value}")
    for remark in remarks(report, splits["train"]):
        print(remark)


def remarks(report, train):
    """What a person has to know about this data set, as sentences."""
    if words := report["encoding_guessed_from"]:
        words = ", ".join(repr(word[:40]) for word in words)
        yield (f"The encoding is a guess: in {report['encoding']} words of the file are {words}. "
               "If that is wrong, give --encoding NAME.")
    if n := report["lost_characters_(U+FFFD)"]:
        yield (f"{n} characters are U+FFFD, which stands for a lost one: the file was garbled "
               "before. Export it again if you can.")
    if n := report["garbled_texts"]:
        yield (f"{n} texts look like UTF-8 that was read in another encoding before (Ã¼ for ü). "
               "They are used as they are.")
    if report["rejections"] != "from the table":
        yield ("This table says nothing about rejections: for each accepted pair, the JD of "
               "another candidate was drawn at random and taken for rejected.")
    side = halves(train, report["split_by"])
    remedy = "--split-by cv" if report["split_by"] == "group" else "another --seed"
    for part, stages in (("A", "sft, reward and ppo"), ("B", "reward --judge and recommend")):
        for accepted, kind in ((True, "accepted"), (False, "rejected")):
            if not any(side[r.cv] == part and r.accepted == accepted for r in train):
                yield (f"Half {part} of train has no {kind} decision, and {stages} need some: give "
                       f"more rows, or {remedy}.")
