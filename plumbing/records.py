"""The files of a data set: lines of JSON in, what is wrong with them, and lines of JSON out.

A data set is a folder of `train.jsonl`, `valid.jsonl`, `test.jsonl`; one that `data` made also has a `market.json` or an
`import.json`, and a `summary.json`.
"""
import codecs
import hashlib
import json
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from plumbing.files import BadInput, read_json, write_bytes
from plumbing.texts import normalize

SPLITS = ("train", "valid", "test")
MADE_HERE = ("market.json", "import.json")              # one of them stands in a data set that `data` made
KEYS = {"cv", "jd", "accepted"}


# ------------------------------------------------------------------------------------------------------- reading
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


def decisions(path):
    """(where, cv, jd, accepted) of each line of a .jsonl file; a bad line is refused with its number and what is wrong."""
    where, clean = None, lru_cache(maxsize=None)(normalize)     # most texts come many times: each is cleaned, and kept, once
    for where, raw in json_lines(path, f"a data folder holds {', '.join(s + '.jsonl' for s in SPLITS)}"):
        yield where, *decision(raw, where, clean)
    if not where:
        raise BadInput(f"{path}: no records; expected lines like " + '{"cv": "...", "jd": "...", "accepted": true}')


def decision(raw, where, clean):
    """cv, jd and accepted of the object of one line. `clean` is texts.normalize; contacts stay as they are written."""
    if not isinstance(raw, dict) or set(raw) != KEYS:
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise BadInput(f"{where}: expected the keys cv, jd, accepted; found {found}")
    cv, jd = (clean(text_of(raw, key, where), False) for key in ("cv", "jd"))
    if not cv:
        raise BadInput(f"{where}: cv is empty")
    if not isinstance(raw["accepted"], bool):
        raise BadInput(f"{where}: accepted must be true or false, found {repr(raw['accepted'])[:40]}")
    if raw["accepted"] and not jd:
        raise BadInput(f"{where}: jd is empty, and accepted; only what was turned down may be empty")
    return cv, jd, raw["accepted"]


def check_splits(folder):
    """Refuse a data set in which a text of one split stands in another too: what is measured on it would be too good."""
    seen = {}
    for split in SPLITS:
        mine = {}
        for where, cv, jd, _ in decisions(Path(folder) / f"{split}.jsonl"):
            for name, text in (("CV", cv), ("JD", jd)):
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


# ------------------------------------------------------------------------------------------------- halves and groups
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
