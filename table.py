"""A table of one's own CVs and JDs into a data set.

    python girl.py data --from FILE.csv --cv COLUMN --jd COLUMN [--rejected-jd COLUMN] --out DIR

Each row holds a CV and a JD that go together, and maybe what was turned down: `--accepted` names a column of yes and no,
`--rejected-cv` one with the CV of somebody who did not get this job, `--rejected-jd` one with a job that this person did not
get. Without any of them all rows count as accepted, and the JDs of other candidates stand for rejected ones.

1. Read the rows, whatever their encoding and delimiter; skip and count those with an empty or missing cell.
2. Replace e-mail addresses, phone numbers and links. (Names stay: no pattern finds those.)
3. Drop decisions that came before, and rejections of what was accepted.
4. Split by groups: decisions that share a CV or a JD stay together, so that no text is on two sides.

Left out: near duplicates (only equal texts are known as the same), Excel files, any judgement of what a CV says.
"""
import csv
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

from data import SPLITS, Record, clear_data, connected, read_line, write_records
from run import BadInput, write_json

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
ANSWERS = dict.fromkeys(("true", "yes", "y", "1", "accepted"), True) | dict.fromkeys(("false", "no", "n", "0", "rejected"), False)
LONG = 10000                # characters; so long a text is kept, and counted

# A link begins with a scheme or www, or is a path on a host. Lookbehinds keep a search from starting again inside a long word.
LINK = re.compile(r"(?:https?://|\bwww\.|(?<![\w.-])(?:[\w-]{1,63}\.){1,3}(?:com|org|net|io|dev|me|co|ai|app|edu|info|de|uk|fr|eu)/)"
                  r"[^\s<>()\[\]\"']*[\w/]", re.IGNORECASE)
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
PHONE = re.compile(r"(?<![\d+(])(?<!\d[.,])(?<![a-zA-Z])[+(]{0,2}\d[\d \u00a0().\-\u2010-\u2013/]{5,30}\d(?!\d|[.,]\d)")


# ---------------------------------------------------------------------------------------------------- reading rows
def decode(content):
    """Text of a file's bytes, and what its encoding was taken for."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if content.startswith(mark):
            return content.decode(encoding), encoding
    for encoding in ("utf-8", "cp1252"):
        try:
            return content.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1"), "latin-1"


def read_table(path, wanted):
    """(rows, encoding, broken): rows are (where, {column: cell}); `broken` counts those with too many or too few cells. A wanted
    column must not stand twice."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
        raise BadInput(f"{path}: give a .csv, .tsv or .jsonl file")
    try:
        text, encoding = decode(path.read_bytes())
    except (OSError, UnicodeError) as e:
        raise BadInput(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); give a .csv, .tsv or .jsonl file")
    rows, broken = [], 0
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    row = read_line(line)
                except (ValueError, RecursionError) as e:
                    raise BadInput(f"{path}:{number}: not JSON ({e})")
                if not isinstance(row, dict):
                    raise BadInput(f"{path}:{number}: expected an object with a key for each column, found {type(row).__name__}")
                rows.append((f"{path}:{number}", row))
        return rows, encoding, broken
    csv.field_size_limit(2 ** 31 - 1)
    # The delimiter is the tab in a .tsv file that has one, else what the header has most of; cells may hold line ends.
    header_line = text.split("\n", 1)[0]
    tabs = path.suffix.lower() == ".tsv" and "\t" in header_line
    delimiter = "\t" if tabs else max(",;\t|", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := [name for name in header if name in wanted and header.count(name) > 1]:
            raise BadInput(f"{path}:1: the column {twice[0][:40]!r} stands twice; rename one of them")
        for cells in reader:
            if len(cells) == len(header):
                rows.append((f"{path}:{reader.line_num}", dict(zip(header, cells))))
            elif any(cells):
                broken += 1
    except csv.Error as e:
        raise BadInput(f"{path}:{reader.line_num}: not a table of comma-separated values ({e})")
    return rows, encoding, broken


def value(row, column, where):
    if column not in row:
        raise BadInput(f"{where}: no column {column!r}; there are {', '.join(map(repr, row)) or 'none'}")
    return "" if row[column] is None else row[column]


def cell(row, column, where):
    """A text without blanks around it and with plain line ends; empty where there is none."""
    found = value(row, column, where)
    if not isinstance(found, str):
        raise BadInput(f"{where}: {column} must be a text, found {type(found).__name__}")
    return found.encode("utf-8", "replace").decode().replace("\r\n", "\n").strip()


def answer(row, column, where):
    """True, False, or None for an empty cell."""
    found = str(value(row, column, where)).strip().lower()
    if found and found not in ANSWERS:
        raise BadInput(f"{where}: {column} must be yes or no (or true, false, 1, 0), found {found[:40]!r}")
    return ANSWERS.get(found)


# -------------------------------------------------------------------------------------------------------- contacts
def hide_contacts(text, count):
    """The text with e-mail addresses, phone numbers and links replaced; adds to `count` what it replaced."""
    for name, pattern in (("LINK", LINK), ("EMAIL", EMAIL), ("PHONE", PHONE)):
        def placeholder(found):
            if name == "PHONE" and not is_phone(found[0]):
                return found[0]
            count[name] += 1
            return f"[{name}]"
        text = pattern.sub(placeholder, text)
    return text


def is_phone(text):
    """Nine to fifteen digits (seven after a + or in brackets: else job numbers look like that) that are neither a decimal
    fraction nor dates, which have a year of four digits and else no group of more than two."""
    groups, marked = re.findall(r"\d+", text), text.startswith(("+", "("))
    years = [g for g in groups if len(g) == 4 and g[:2] in ("19", "20")]
    dates = years and all(len(g) < 3 or g in years for g in groups) and "+" not in text
    fraction = re.fullmatch(r"\d+\.\d+", text)
    return (7 if marked else 9) <= sum(map(len, groups)) <= 15 and not dates and not fraction


# ------------------------------------------------------------------------------------------------------ the data set
def decisions(rows, columns, hide, count):
    """Records of all rows. columns: {"cv", "jd", and one of "accepted", "rejected_cv", "rejected_jd" or none}."""
    def text(row, name, where):
        found = cell(row, columns[name], where)
        count["long"] += len(found) > LONG
        return hide_contacts(found, count) if hide else found

    records = []
    for where, row in rows:
        cv, jd = text(row, "cv", where), text(row, "jd", where)
        accepted = answer(row, columns["accepted"], where) if "accepted" in columns else True
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


def import_table(path, out, columns, keep_contacts, seed):
    """Write train.jsonl, valid.jsonl, test.jsonl and import.json (what was found, and what became of it)."""
    rows, encoding, broken = read_table(path, columns.values())
    draw, count = random.Random(seed), Counter()
    found = decisions(rows, columns, not keep_contacts, count)
    records = without_duplicates(found, count)
    if not any(r.accepted for r in records):
        raise BadInput(f"{path}: no accepted pair of a CV and a JD in {len(rows)} rows ({count['empty']} with an empty cell), "
                       f"beside {broken} with another number of cells than the header; look at the file's delimiter and columns")
    splits, groups = split_by_group(records, draw)
    if not all(any(r.accepted for r in splits[s]) for s in SPLITS):
        raise BadInput(f"{path}: {len(records)} decisions hang together in {groups} groups that share a CV or a JD; that is too "
                       "few to have an accepted pair in train, valid and test and no text in two of them; give more rows")
    if all(r.accepted for r in records):
        for s in SPLITS:
            splits[s] += others_jds(splits[s], draw)
    report = {"from": str(path), "encoding": encoding, "columns": columns, "seed": seed, "rows": len(rows),
              "rows_with_other_number_of_cells": broken, "rows_with_an_empty_cell": count["empty"],
              "rows_without_a_rejection": count["no rejection"], "duplicates": count["duplicates"],
              "contradictions": count["contradictions"], "texts_over_10000_characters": count["long"],
              "contacts_replaced": {k: count[k] for k in ("EMAIL", "PHONE", "LINK")} if not keep_contacts else None,
              "rejections": "JDs of other candidates" if all(r.accepted for r in records) else "from the table",
              "groups": groups, "decisions": {s: len(splits[s]) for s in SPLITS},
              "accepted": {s: sum(r.accepted for r in splits[s]) for s in SPLITS}}
    clear_data(out)
    write_json(Path(out) / "import.json", report)
    for s in SPLITS:
        write_records(Path(out) / f"{s}.jsonl", splits[s])
    for name, value in report.items():
        print(f"{name.replace('_', ' '):<34}{json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value}")
    if report["rejections"] != "from the table":
        print("This table says nothing about rejections: for each accepted pair, the JD of another candidate was drawn at random "
              "and taken for rejected.")
