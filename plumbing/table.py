"""Turn a table of your own CVs and JDs into a data set.

    python girl.py data --from FILE.csv --cv COLUMN --jd COLUMN [--rejected-jd COLUMN] --out DIR

Each row holds a CV and a JD that go together, and maybe a rejection. `--accepted` names a column of
yes and no, `--rejected-cv` a column with the CV of somebody who did not get this job,
`--rejected-jd` a column with a job that this person did not get. Without any of them all rows count
as accepted, and JDs of other candidates are drawn as rejected ones.

1. Read the rows: as UTF-8, or as `--encoding` says. The delimiter is the one with which the header
   has the columns, or `--delimiter`. Rows with a missing cell are skipped and counted.
2. Replace e-mail addresses, phone numbers and links (texts.py). Names stay: no pattern finds them.
3. Drop duplicates, and rejections of accepted pairs.
4. Split by groups: decisions that share a CV or a JD stay together, so two splits share no text.
   If all form one group, `--split-by cv` splits CVs and JDs separately, and drops the decisions
   whose CV and JD are in different splits.

A file that can be read in two ways is refused. Left out: near duplicates (only equal texts count as
the same), Excel files, any judgement of a CV's content.
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
from plumbing.files import BadInput, write_json
from plumbing.records import (SPLITS, clear_data, connected_components, read_line, text_of,
                              write_records)
from plumbing.texts import is_utf16, normalize

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
SHARES_BY_CV = {"train": 0.7, "valid": 0.15, "test": 0.15}      # of the CVs, and of the JDs
ANSWERS = (dict.fromkeys(("true", "yes", "y", "1", "accepted"), True)
           | dict.fromkeys(("false", "no", "n", "0", "rejected"), False))
# The words that pandas, databases, spreadsheets and people use for a missing cell.
MISSING = {"null", "(null)", "\\n", "none", "nan", "-nan", "nat", "na", "<na>", "n/a", "n.a.",
           "#n/a", "#n/a n/a", "#na", "#nv", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan",
           "nil", "undefined", "<null>", "-", "--", "\u2013", "\u2014"}
ERROR = re.compile(r"#[^\W_][\w/]{0,20}[!?]")       # of a spreadsheet: #NAME? #DIV/0! #BEZUG!
LONG = 10000                # characters; longer texts are kept, and counted
GARBLED = re.compile(r"[ÃÂ][\u0080-\u00bf]|â€")      # UTF-8 read as cp1252: ü becomes Ã¼

MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"),
         (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
LINE_END = re.compile(r"\r\n?|\n")
# A word that is not all ASCII. And patterns that no word of a Western language has: three accented
# letters in a row, an accented capital after a small letter, a sign within a word (apostrophes and
# dashes do not count), two different signs in a row. Other encodings, read as cp1252, are full of
# them.
NON_ASCII = re.compile(r"[^\s!-/:-@\[-`{-~]*[^\x00-\x7f\xa0][^\s!-/:-@\[-`{-~]*")
CAPITAL, SMALL = "À-ÖØ-ÞŒŠŸŽ", "ß-öø-ÿœšž"
LETTER, SIGN = f"[A-Za-z{CAPITAL}{SMALL}]", rf"[^\x00-\x7f\xa0\xad{CAPITAL}{SMALL}‘’–—´·]"
NOT_WESTERN = re.compile(rf"[{CAPITAL}{SMALL}]{{3}}|[a-z{SMALL}][{CAPITAL}]|"
                         rf"{LETTER}{SIGN}+{LETTER}|([¡-¿])(?!\1)[¡-¿]")
SAVE_AS = "save the file as UTF-8, or give its encoding with --encoding NAME"


# ------------------------------------------------------------------------------------- reading rows
def check_encoding(name):
    """Refuse a name that is not a text encoding in Python."""
    try:
        b"a".decode(name, "ignore")         # as `where` does; idna and the like cannot do this
    except (LookupError, ValueError):
        raise BadInput(f"data: --encoding {name!r} is not a text encoding that Python knows; give "
                       "one such as cp1252, gbk, shift_jis, utf-16-le")


def decode(path, content, asked=None):
    """(text, encoding, sample) of a file's bytes. If the encoding was guessed, the sample is some
    words by which a person can check the guess: those with the rarest signs, as all others may look
    right. Else it is None."""
    encoding = asked or next((name for mark, name in MARKS if content.startswith(mark)), None)
    if not encoding and is_utf16(content):
        bits = 32 if content.count(0) > len(content) / 2 else 16
        raise BadInput(f"{path}:1: at least every other byte is 0, as in UTF-{bits}; {SAVE_AS} "
                       f"(utf-{bits}-le, utf-{bits}-be)")
    sample = None
    try:
        text = content.decode(encoding or "utf-8")
    except UnicodeDecodeError as e:
        if encoding:
            raise BadInput(f"{where(path, e, encoding)} is not {encoding} text; {SAVE_AS}")
        text, encoding, sample = guess(path, content, e)
    except UnicodeError as e:           # of a codec that does not say where
        raise BadInput(f"{path}: not {encoding} text ({e}); {SAVE_AS}")
    if control := re.search("[\0\x1b]", text):
        name = "an escape" if control[0] == "\x1b" else "a NUL"    # iso2022_jp is full of escapes
        raise BadInput(f"{path}:{line_of(text[:control.start()])}: {name} character, as in a file "
                       f"of another encoding (iso2022_jp, utf-16-le); remove it, {SAVE_AS}")
    # Byte-order marks can also stand within the file, if it was joined from several.
    return text.replace("\ufeff", ""), encoding or "utf-8", sample


def line_of(text_before):
    """The number of the line on which the text after this one begins."""
    return len(LINE_END.findall(text_before)) + 1


def where(path, error, encoding):
    """File, line and bytes of a UnicodeDecodeError."""
    text_before = error.object[:error.start].decode(encoding, "ignore")
    bad_bytes = error.object[error.start:error.end]
    return f"{path}:{line_of(text_before)}: byte {bad_bytes.hex(' ')}"


def guess(path, content, error):
    """(text, encoding, sample) of a file that is not all UTF-8: cp1252, if it has no UTF-8
    character beyond ASCII and its words look Western. A stray byte in a UTF-8 file must not change
    how its other rows are read."""
    place, as_utf8 = where(path, error, "utf-8"), content.decode("utf-8", "surrogateescape")
    n_utf8 = len(re.findall("[^\x00-\x7f\udc80-\udcff]", as_utf8))
    if n_utf8 and n_utf8 >= len(re.findall("[\udc80-\udcff]", as_utf8)):
        raise BadInput(f"{place} is not UTF-8, and {n_utf8} other characters are; correct it, "
                       + SAVE_AS)
    words = [] if n_utf8 else NON_ASCII.findall(content.decode("cp1252", "replace"))
    n_bad = sum("\ufffd" in word or NOT_WESTERN.search(word) is not None for word in words)
    if not words or 10 * n_bad > len(words):
        raise BadInput(f"{place} is not UTF-8, and the file's encoding cannot be guessed; "
                       f"{SAVE_AS} (gbk, shift_jis, cp1251, mac_roman, ...)")
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError as e:
        raise BadInput(f"{where(path, e, 'cp1252')} is neither UTF-8 nor cp1252; {SAVE_AS}")
    sample, frequency = [], Counter("".join(words))
    for sign in sorted(filter(NON_ASCII.fullmatch, frequency), key=frequency.get):
        if len(sample) < 5 and sign not in "".join(sample):
            sample.append(next(word for word in words if sign in word))
    return text, "cp1252", sample


def check_delimiter(name):
    """The character that `--delimiter` names."""
    delimiter = "\t" if name.lower() in ("tab", "\\t") else name
    if len(delimiter) != 1 or delimiter in "\r\n\" \0":
        raise BadInput(f"data: --delimiter {name[:40]!r} must be one character, or tab; no quote, "
                       "no blank, no line end")
    return delimiter


def read_table(path, wanted, encoding=None, delimiter=None):
    """(rows, report): each row is (place, {column: cell}); the report says how they were read."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".jsonl"):
        raise BadInput(f"{path}: give a .csv, .tsv or .jsonl file")
    if delimiter and ending == ".jsonl":
        raise BadInput(f"{path}: a .jsonl file has no delimiter; leave --delimiter out")
    try:
        content = path.read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror or e}); "
                       "give a .csv, .tsv or .jsonl file")
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
    columns = wanted & {key for _, row in rows for key in row}
    return [(place, row | dict.fromkeys(columns - row.keys())) for place, row in rows]


@cache
def name_of(column):
    """A column's name as a person sees it."""
    return normalize(column, False)


def check_once(names, wanted, place):
    if twice := [name for name in names if name in wanted and names.count(name) > 1]:
        raise BadInput(f"{place}: the column {twice[0][:40]!r} appears twice; rename one of them")


def read_csv(path, text, wanted, delimiter):
    """(rows, delimiter, broken); `broken` counts the rows with too many or too few cells."""
    csv.field_size_limit(2 ** 31 - 1)
    text, sep, skipped = without_sep_line(text)
    delimiter = delimiter or sep or find_delimiter(path, text, wanted)
    other_delimiter = f"give --delimiter C, other than {delimiter!r}"
    reader, rows, broken, row_begin = csv_reader(text, delimiter), [], 0, skipped + 1
    sizes = set()
    try:
        header = header_of(reader)
        place = f"{path}:{skipped + reader.line_num}"
        check_once(header, wanted, place)
        if header and (missing := sorted(wanted - set(header))):
            raise BadInput(f"{place}: no column {missing[0]!r}; there are "
                           f"{', '.join(map(repr, header))}; name others, or {other_delimiter}")
        # A delimiter at the end of a line makes a cell without a name: it may be missing or empty.
        n_named = max((i for i, name in enumerate(header, 1) if name), default=0)
        row_begin = skipped + reader.line_num + 1
        for cells in reader:
            lines = LINE_END.split("\t".join(cells)) if delimiter == "\t" else ""
            if len(lines) > 1 and {line.count("\t") for line in lines} == {len(header) - 1}:
                raise BadInput(f"{path}:{row_begin}: a quote makes these {len(lines)} lines one "
                               "row, and each could be a row; double the quotes, "
                               "or save it as .csv")
            sizes |= {len(cells)} if any(cells) else set()
            if cells and len(cells) >= n_named and not any(cells[len(header):]):
                row = dict(zip(header, cells))
                if wanted == {row.get(name, "").strip() for name in wanted}:
                    raise BadInput(f"{path}:{row_begin}: the header again, as if two files were "
                                   "joined; remove this line, or import one of them")
                rows.append((f"{path}:{skipped + reader.line_num}", row))
            elif any(cells):
                broken += 1
            row_begin = skipped + reader.line_num + 1
    except csv.Error as e:
        hint = ", instead of a backslash" if '\\"' in text else ""
        raise BadInput(f"{path}:{row_begin}: the row that begins here is not a table of "
                       f"comma-separated values ({e}); correct its quotes (double a quote "
                       f"within a cell{hint}), or {other_delimiter}")
    if broken and sizes == {len(header) + 1}:
        raise BadInput(f"{place}: each row has one cell more than the header; if the first is the "
                       "row's number, name that column too; else quote cells that contain "
                       f"{delimiter!r}")
    return rows, delimiter, broken


def without_sep_line(text):
    """Excel may write a line such as "sep=;" before the header. Return the text after it, its
    delimiter, and the number of lines skipped; without such a line, (text, None, 0)."""
    line = re.match(r'\s*"?sep=([^\r\n" ])"?(?:\r\n?|\n)', text, re.IGNORECASE)
    if not line:
        return text, None, 0
    return text[line.end():], line[1], len(LINE_END.findall(line[0]))


def csv_reader(text, delimiter):
    """A strict reader: malformed CSV is refused. A blank between delimiter and quote is skipped."""
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True,
                      strict=True)


def header_of(reader):
    """The names in the first row that is not blank."""
    rows = ([name_of(name) for name in cells] for cells in reader)
    return next((names for names in rows if any(names)), [])


def find_delimiter(path, text, wanted):
    """The delimiter with which the header has most of the wanted columns. Ties go to the most
    columns, then to the tab in a .tsv file, to the comma in others. The header is read as CSV,
    since a quoted name may contain delimiters and line ends."""
    headers = {}
    for delimiter in "\t,;|" if path.suffix.lower() == ".tsv" else ",;\t|":
        try:
            headers[delimiter] = header_of(csv_reader(text, delimiter))
        except csv.Error:
            continue
    return max(headers, key=lambda d: (len(wanted & set(headers[d])), len(headers[d])), default=",")


def value(row, column, place, count):
    """The content of a cell, or None if it is missing. Counts the words that say "missing"."""
    if column not in row:
        names = ", ".join(map(repr, row)) or "none"
        raise BadInput(f"{place}: no column {column!r}; there are {names}")
    content = row[column]
    if isinstance(content, float) and not math.isfinite(content):
        if not math.isnan(content):
            raise BadInput(f"{place}: {column} is {content}; give a text, or null if it is missing")
        content = "NaN"
    text = normalize(content, False) if isinstance(content, str) else ""
    if text.casefold() in MISSING or ERROR.fullmatch(text):
        count["missing", text] += 1
        return None
    return content


def cell(row, column, place, hide, count):
    """A text as the stages see it; empty if the cell is missing."""
    if value(row, column, place, count) is None:
        return ""
    return normalize(text_of(row, column, place), hide, count)


def answer(row, column, place, count):
    """True, False, or None for a missing cell. Yes and no as numbers may be 1.0 and 0.0: pandas
    writes them so if the column has a gap."""
    content = value(row, column, place, count)
    text = "" if content is None else normalize(str(content), False).lower()
    text = re.sub(r"^([01])\.0*$", r"\1", text)
    if text and text not in ANSWERS:
        raise BadInput(f"{place}: {column} must be yes or no (or true, false, 1, 0), found "
                       f"{text[:40]!r}")
    return ANSWERS.get(text)


# ------------------------------------------------------------------------------------- the data set
def decisions(rows, columns, hide, count):
    """Records of all rows. The keys of `columns` are "cv", "jd" and at most one of "accepted",
    "rejected_cv", "rejected_jd"."""
    def text(row, name, place):
        content = cell(row, columns[name], place, hide, count)
        count["long"] += len(content) > LONG
        count["lost"] += content.count("\ufffd")
        count["garbled"] += bool(GARBLED.search(content))
        return content

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
                    pair = (other, jd) if name == "rejected_cv" else (cv, other)
                    records.append(Record(*pair, False))
    return records


def without_duplicates(records, count):
    """Each decision once; of a pair that was both accepted and rejected, the acceptance."""
    accepted, kept = {(r.cv, r.jd) for r in records if r.accepted}, {}
    for r in records:
        if not r.accepted and (r.cv, r.jd) in accepted:
            count["contradictions"] += 1
        elif r in kept:
            count["duplicates"] += 1
        else:
            kept[r] = True
    return list(kept)


def split_by_group(records, draw):
    """({split: records}, number of groups), with sizes about as in SHARES. The largest groups come
    first; each goes to the split that lacks most records."""
    groups = connected_components(records)
    draw.shuffle(groups)
    splits = {split: [] for split in SPLITS}
    for group in sorted(groups, key=len, reverse=True):
        lacking = {s: SHARES[s] * len(records) - len(splits[s]) for s in SPLITS}
        splits[max(SPLITS, key=lacking.get)] += [records[i] for i in sorted(group)]
    return splits, len(groups)


def split_by_cv(records, draw):
    """{split: records}. Both the CVs and the JDs are split; a decision between two splits is
    dropped. A JD whose CVs are all in one split goes there; the other JDs are drawn."""
    cvs = sorted({r.cv for r in records})
    draw.shuffle(cvs)
    split_of_cv, splits_of_jd = drawn(cvs), {}
    for r in records:
        splits_of_jd.setdefault(r.jd, set()).add(split_of_cv[r.cv])
    shared = sorted(jd for jd, splits in splits_of_jd.items() if len(splits) > 1)
    draw.shuffle(shared)
    split_of_jd = {jd: min(splits) for jd, splits in splits_of_jd.items()} | drawn(shared)
    return {s: [r for r in records if split_of_cv[r.cv] == split_of_jd[r.jd] == s] for s in SPLITS}


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
            raise BadInput(f"{path}: too few different {kind} were accepted ({len(texts)}), as "
                           "train, valid and test share none; give rows with at least "
                           f"{len(SPLITS)}")
    splits, groups = split_by_group(records, draw)
    if by == "cv":
        splits = split_by_cv(records, draw)
    if all(any(r.accepted for r in splits[s]) for s in SPLITS):
        return splits, groups
    if by == "cv":
        raise BadInput(f"{path}: of {len(records)} decisions {sum(map(len, splits.values()))} have "
                       "CV and JD in one split; that is too few for an accepted pair in each of "
                       "train, valid and test; give more rows, or another --seed")
    remedy = "more rows"
    if groups < len(accepted):
        remedy = ("--split-by cv, which drops the decisions between two splits, or rows with other "
                  "CVs and JDs")
    raise BadInput(f"{path}: {len(records)} decisions form {groups} groups connected by shared CVs "
                   "or JDs; that is too few for an accepted pair in each of train, valid and test "
                   f"and no text in two of them; give {remedy}")


def random_negatives(records, draw):
    """A rejection for each accepted pair: the same CV with a JD of another candidate that it has
    not been paired with yet. Left out if there is no such JD."""
    jds, used = sorted({r.jd for r in records}), {}
    for r in records:
        used.setdefault(r.cv, set()).add(r.jd)
    rejected = []
    for r in records:
        if len(used[r.cv]) < len(jds):
            jd = draw.choice(jds)
            while jd in used[r.cv]:
                jd = draw.choice(jds)
            used[r.cv].add(jd)
            rejected.append(Record(r.cv, jd, False))
    return rejected


def import_table(path, out, columns, keep_contacts, seed, encoding=None, delimiter=None,
                 split_by="group"):
    """Write train.jsonl, valid.jsonl, test.jsonl, and import.json: a report on the table."""
    columns = {name: name_of(column) for name, column in columns.items()}
    if len(set(columns.values())) < len(columns):
        raise BadInput("data: --cv, --jd and the others must name different columns")
    rows, how = read_table(path, columns.values(), encoding, delimiter)
    draw, count = random.Random(seed), Counter()
    records = without_duplicates(decisions(rows, columns, not keep_contacts, count), count)
    if records and not any(r.accepted for r in records):
        raise BadInput(f"{path}: the column {columns['accepted']!r} never says yes beside a CV and "
                       "a JD; give rows that were accepted, or another column with --accepted")
    if not records:
        broken = how["rows_with_other_number_of_cells"]
        raise BadInput(f"{path}: no accepted pair of a CV and a JD in {len(rows)} rows "
                       f"({count['empty']} with an empty cell); {broken} more rows have another "
                       "number of cells than the header; check the file's delimiter "
                       "(--delimiter C) and columns")
    splits, groups = split(path, records, split_by, draw)
    dropped = len(records) - sum(map(len, splits.values()))
    no_rejections = all(r.accepted for r in records)
    if no_rejections:
        for s in SPLITS:
            splits[s] += random_negatives(splits[s], draw)
    report = {"from": str(path)} | how
    report |= {"columns": columns, "seed": seed,
               "asked": {"encoding": encoding, "delimiter": delimiter, "split_by": split_by},
               "rows": len(rows)}
    report |= reported_counts(count, keep_contacts)
    report |= {"rejections": "JDs of other candidates" if no_rejections else "from the table",
               "groups": groups, "split_by": split_by, "dropped_between_splits": dropped,
               "decisions": {s: len(splits[s]) for s in SPLITS},
               "accepted": {s: sum(r.accepted for r in splits[s]) for s in SPLITS}}
    clear_data(out)
    write_json(Path(out) / "import.json", report)
    for s in SPLITS:
        write_records(Path(out) / f"{s}.jsonl", splits[s])
    for name, entry in report.items():
        if isinstance(entry, dict):
            entry = json.dumps(entry, ensure_ascii=False)
        print(f"{name.replace('_', ' '):<34}{entry}")
    for remark in remarks(report, splits["train"]):
        print(remark)


def reported_counts(count, keep_contacts):
    """The part of import.json that was counted while the rows were read."""
    contacts = {kind: count[kind] for kind in ("EMAIL", "PHONE", "LINK")}
    return {"rows_with_an_empty_cell": count["empty"],
            "cells_that_say_missing": {k[1]: n for k, n in count.items() if k[0] == "missing"},
            "rows_without_a_rejection": count["no rejection"], "duplicates": count["duplicates"],
            "contradictions": count["contradictions"],
            "texts_over_10000_characters": count["long"],
            "lost_characters_(U+FFFD)": count["lost"], "garbled_texts": count["garbled"],
            "contacts_replaced": None if keep_contacts else contacts}


def remarks(report, train):
    """Sentences that the user must know about this data set."""
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
               "another candidate was drawn at random and counts as rejected.")
    half_of_cv = halves(train, report["split_by"])
    remedy = "--split-by cv" if report["split_by"] == "group" else "another --seed"
    for half, stages in (("A", "sft, reward and ppo"), ("B", "reward --judge and recommend")):
        for accepted, kind in ((True, "accepted"), (False, "rejected")):
            if not any(half_of_cv[r.cv] == half and r.accepted == accepted for r in train):
                yield (f"Half {half} of train has no {kind} decision, and {stages} need some: give "
                       f"more rows, or {remedy}.")
