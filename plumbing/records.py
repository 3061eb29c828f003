"""The files of a data set: reads lines of JSON, refuses bad ones, and writes lines of JSON.

A data set is a folder with `train.jsonl`, `valid.jsonl` and `test.jsonl`. If `data` made it, it
also has a `market.json` or an `import.json`, and a `summary.json`.
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
MADE_HERE = ("market.json", "import.json")      # a data set that `data` made has one of them
KEYS = {"cv", "jd", "accepted"}


# ------------------------------------------------------------------------------------------ reading
def no_key_twice(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key appears twice in {sorted(key for key, _ in pairs)}")
    return value


read_line = json.JSONDecoder(object_pairs_hook=no_key_twice).decode


def json_lines(path, remedy):
    """(where, object) of each line of a .jsonl file that is not blank; `where` names file and line.
    Refuse a line that is not UTF-8 or not JSON. `remedy`: the advice if the file does not open."""
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if number == 1:                 # some editors begin a UTF-8 file with this mark
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    where = f"{path}:{number}"
                    try:
                        yield where, read_line(line.decode("utf-8"))
                    except UnicodeDecodeError as e:
                        raise BadInput(f"{where}: not UTF-8 text (byte {e.start} of the line); "
                                       "save the file as UTF-8")
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
        raise BadInput(f"{where}: {key} holds half of a surrogate pair, which is not a character")
    return raw[key]


def decisions(path):
    """(where, cv, jd, accepted) of each line of a .jsonl file. A bad line is refused: the error
    gives its number and the reason."""
    # Most texts come many times: each is cleaned, and kept, once.
    where, clean = None, lru_cache(maxsize=None)(normalize)
    remedy = f"a data folder holds {', '.join(split + '.jsonl' for split in SPLITS)}"
    for where, raw in json_lines(path, remedy):
        yield where, *decision(raw, where, clean)
    if not where:
        raise BadInput(f"{path}: no records; expected lines like "
                       '{"cv": "...", "jd": "...", "accepted": true}')


def decision(raw, where, clean):
    """cv, jd and accepted of one line's object. `clean` is texts.normalize; contacts are kept."""
    if not isinstance(raw, dict) or set(raw) != KEYS:
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise BadInput(f"{where}: expected the keys cv, jd, accepted; found {found}")
    cv, jd = (clean(text_of(raw, key, where), False) for key in ("cv", "jd"))
    if not cv:
        raise BadInput(f"{where}: cv is empty")
    if not isinstance(raw["accepted"], bool):
        found = repr(raw["accepted"])[:40]
        raise BadInput(f"{where}: accepted must be true or false, found {found}")
    if raw["accepted"] and not jd:
        raise BadInput(f"{where}: jd is empty, and accepted; only a rejected JD may be empty")
    return cv, jd, raw["accepted"]


def check_splits(folder):
    """Refuse a data set if two splits share a text: measurements on it would be too good."""
    earlier_splits = {}
    for split in SPLITS:
        this_split = {}
        for where, cv, jd, _ in decisions(Path(folder) / f"{split}.jsonl"):
            for name, text in (("CV", cv), ("JD", jd)):
                if (name, text) in earlier_splits:
                    other = earlier_splits[name, text]
                    raise BadInput(f"{where}: its {name} is in {other}.jsonl too; remove it from "
                                   "one of them, or make the data set with  "
                                   "python girl.py data --from FILE")
                if text:
                    this_split[name, text] = split
        earlier_splits |= this_split


def clear_data(folder):
    """Delete the old data set before a new one is written, so that two never mix. Refuse if `data`
    did not make it."""
    files = files_of(folder)
    if files and not any(path.name in MADE_HERE for path in files):
        raise BadInput(f"{files[0]}: was not made by `data`, and is not overwritten; "
                       f"choose another --out, or use it as it is with  --data {folder}")
    for path in files:
        try:
            path.unlink()
        except OSError as e:
            raise BadInput(f"{path}: cannot be overwritten ({e.strerror}); choose another --out")


def files_of(folder):
    """The files of a data set; last those that show that `data` made it."""
    names = (*(f"{split}.jsonl" for split in SPLITS), "probes.jsonl", "summary.json", *MADE_HERE)
    return [Path(folder) / name for name in names if (Path(folder) / name).exists()]


def write_records(path, records):
    lines = (json.dumps(r._asdict(), ensure_ascii=False).encode() + b"\n" for r in records)
    write_bytes(path, b"".join(lines))


def made_of_table(folder):
    return (Path(folder) / "import.json").exists()


def read_import(folder):
    """The import.json of `data --from`. In earlier versions some of its keys are missing."""
    return read_json(Path(folder) / "import.json",
                     "make the data set again with  python girl.py data --from FILE")


def keeps_contacts(folder):
    """True if these texts keep their contacts: with `--keep-contacts`, or in a data set written by
    hand. The simulated market has none."""
    if (Path(folder) / "market.json").exists():
        return False
    return not made_of_table(folder) or read_import(folder).get("contacts_replaced") is None


# -------------------------------------------------------------------------------- halves and groups
def half(text):
    """'A' or 'B', by a hash of the text."""
    return "AB"[hashlib.sha256(text.encode()).digest()[0] % 2]


def connected_components(records):
    """The connected components of records, as lists of indices: a CV or JD links the records that
    share it."""
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
    """CV -> half, for an imported table. Often each JD has one accepted CV and one rejected CV.
    These two must share a half, or there is nothing to compare. So CVs linked by acceptances share
    a half, and a CV that was never accepted joins the first JD that it was rejected for."""
    accepted = [r for r in records if r.accepted]
    half_of_cv, half_of_jd = {}, {}
    for group in connected_components(accepted):
        name = half(min(accepted[i].cv for i in group))
        for i in group:
            half_of_cv[accepted[i].cv] = half_of_jd[accepted[i].jd] = name
    for r in records:
        if r.cv not in half_of_cv:
            half_of_cv[r.cv] = half_of_jd.get(r.jd, half(r.cv))
    return half_of_cv
