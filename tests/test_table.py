"""A table of one's own into a data set: every cell is accounted for, and no text is on two
sides."""
import csv
import json
import random
import time
import unicodedata
from collections import Counter

import pytest

import girl
from plumbing import table
from plumbing.texts import hide_contacts
from conftest import refused
from data import Record, read_half, read_records
from plumbing.records import check_splits, connected_components, half


def people(n):
    return [{"cv": f"Cook number {i}", "jd": f"Wanted: cook {i}",
             "other": f"Cook {i} without knives", "no": f"Driver {i}"} for i in range(n)]


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as f:
        writer = csv.DictWriter(f, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(path, out, *flags):
    return girl.main(["data", "--from", str(path), "--cv", "cv", "--jd", "jd", "--out", str(out),
                      *flags])


def result(out):
    return ({s: read_records(out / f"{s}.jsonl") for s in ("train", "valid", "test")},
            json.loads((out / "import.json").read_text()))


def everything(splits):
    return [r for records in splits.values() for r in records]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_and_delimiters_are_found_out(encoding, delimiter, tmp_path):
    rows = [p | {"cv": p["cv"] + " from Köln, né; café|bar"} for p in people(20)]
    assert run(write_csv(tmp_path / "t.csv", rows, delimiter, encoding), tmp_path / "out") == 0
    splits, report = result(tmp_path / "out")
    assert {r.cv for r in everything(splits)} == {p["cv"] for p in rows}
    assert report["encoding"] == encoding and report["rows"] == 20


def test_each_rejection_goes_with_the_acceptance_of_its_row(tmp_path):
    rows = people(30)
    with open(tmp_path / "t.jsonl", "w") as f:
        f.writelines(json.dumps(p) + "\n\n" for p in rows)
    accepted = {Record(p["cv"], p["jd"], True) for p in rows}
    for flag, rejected in (("--rejected-cv=other",
                            {Record(p["other"], p["jd"], False) for p in rows}),
                           ("--rejected-jd=no", {Record(p["cv"], p["no"], False) for p in rows})):
        assert run(tmp_path / "t.jsonl", tmp_path / flag, flag) == 0
        splits, report = result(tmp_path / flag)
        assert set(everything(splits)) == accepted | rejected
        assert report["rejections"] == "from the table"
        assert report["decisions"] == {"train": 48, "valid": 6, "test": 6}
        assert report["groups"] == 30


def test_a_column_of_answers(tmp_path):
    words = ["yes", "No", "TRUE", "false", "1", "0", "accepted", "rejected", " y ", "n"]
    rows = ([p | {"hired": words[i % 10]} for i, p in enumerate(people(40))]
            + [people(41)[40] | {"hired": " "}])
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out", "--accepted", "hired") == 0
    splits, report = result(tmp_path / "out")
    assert ({r.cv: r.accepted for r in everything(splits)}
            == {p["cv"]: i % 2 == 0 for i, p in enumerate(rows[:40])})
    assert report["rows_with_an_empty_cell"] == 1


def test_without_rejections_the_jds_of_others_stand_for_them_and_it_says_so(tmp_path, capsys):
    rows = people(40)
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out") == 0
    assert "says nothing about rejections" in capsys.readouterr().out
    splits, report = result(tmp_path / "out")
    for records in splits.values():
        yes, no = ({r[:2] for r in records if r.accepted == a} for a in (True, False))
        assert len(yes) == len(no) and not yes & no
        assert {jd for _, jd in no} <= {jd for _, jd in yes}
        assert {cv for cv, _ in no} == {cv for cv, _ in yes}
    assert report["rejections"] == "JDs of other candidates"


def test_no_text_is_on_two_sides_and_groups_are_whole(tmp_path):
    """Rows that hang together in chains: A and B share a CV, B and C a JD."""
    rows = [{"cv": f"cv {i // 2 * 2}", "jd": f"jd {(i + 1) // 2 if i % 6 else i}",
             "no": f"no {i % 20}"} for i in range(0, 300)]
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out") == 0
    splits, report = result(tmp_path / "out")
    texts = [{t for r in records for t in (("cv", r.cv), ("jd", r.jd))}
             for records in splits.values()]
    assert all(texts)
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert report["groups"] > 20
    sizes = Counter({s: n / sum(report["accepted"].values())
                     for s, n in report["accepted"].items()})
    assert sizes["train"] == pytest.approx(0.8, abs=0.05)
    assert sizes["valid"] == pytest.approx(0.1, abs=0.05)


def test_connected_by_hand():
    records = [Record(*x, True)
               for x in (("a", "1"), ("b", "2"), ("a", "2"), ("c", "3"), ("1", "a"), ("d", "3"))]
    assert sorted(map(sorted, connected_components(records))) == [[0, 1, 2], [3, 5], [4]]


def test_the_halves_of_an_imported_table_keep_groups_together(tmp_path):
    rows = people(200)
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out", "--rejected-cv", "other") == 0
    parts = {p: read_half(tmp_path / "out", p) for p in "AB"}
    assert len(parts["A"]) + len(parts["B"]) == len(read_records(tmp_path / "out" / "train.jsonl"))
    assert not {r.jd for r in parts["A"]} & {r.jd for r in parts["B"]}
    assert all(len(p) > 100 for p in parts.values())
    (tmp_path / "out" / "import.json").unlink()
    assert all(half(r.cv) == "A" for r in read_half(tmp_path / "out", "A"))


def test_both_halves_have_acceptances_and_rejections_whatever_the_rejections_are(tmp_path):
    """Each half must feed a stage: invented rejections tie all CVs together, and must not decide
    where these go."""
    path = write_csv(tmp_path / "t.csv", people(200))
    for name, flags in (("none", []), ("cv", ["--rejected-cv", "other"]),
                        ("jd", ["--rejected-jd", "no"])):
        assert run(path, tmp_path / name, *flags) == 0
        parts = [read_half(tmp_path / name, part) for part in "AB"]
        for records in parts:
            assert 50 < sum(r.accepted for r in records) < 110
            assert len(records) == 2 * sum(r.accepted for r in records)
        assert not {r.cv for r in parts[0]} & {r.cv for r in parts[1]}


def test_a_folder_holds_one_kind_of_data(tmp_path):
    path = write_csv(tmp_path / "t.csv", people(40))
    market = ["data", "--smoke", "--out", str(tmp_path / "out")]
    assert girl.main(market) == 0 and run(path, tmp_path / "out") == 0
    assert ({p.name for p in (tmp_path / "out").iterdir()}
            == {"train.jsonl", "valid.jsonl", "test.jsonl", "import.json", "summary.json"})
    assert girl.main(market) == 0
    assert not (tmp_path / "out" / "import.json").exists()
    assert (tmp_path / "out" / "market.json").exists()


def test_a_data_set_that_was_not_made_here_is_not_written_over(tmp_path, capsys):
    """Whatever of it there is: also a finished stage has a summary.json."""
    path = write_csv(tmp_path / "t.csv", people(40))
    for files in (["valid.jsonl"], ["train.jsonl", "probes.jsonl"], ["valid.jsonl", "summary.json"],
                  ["summary.json", "model.safetensors"]):
        mine = tmp_path / files[-1]
        mine.mkdir()
        for name in files:
            (mine / name).write_text("mine")
        for command in (["data", "--smoke", "--out", str(mine)],
                        ["data", "--from", str(path), "--cv", "cv", "--jd", "jd",
                         "--out", str(mine)]):
            refused(capsys, command, f"{mine}/{files[0]}: was not made by `data`, and is not "
                                     "overwritten; choose another --out")
        assert {p.name: p.read_text() for p in mine.iterdir()} == dict.fromkeys(files, "mine")


def test_a_folder_that_was_there_stays_and_one_that_was_made_in_vain_does_not(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        assert girl.main(["data", "--out", str(tmp_path / name), "--cv", "text"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_column_that_nobody_asked_for_may_stand_twice(tmp_path):
    path = write_csv(tmp_path / "t.csv", people(40))
    path.write_text("".join(line + (",notes,notes" if i == 0 else ",a,b") + "\n"
                            for i, line in enumerate(path.read_text().splitlines())))
    assert run(path, tmp_path / "out") == 0


def test_data_that_cannot_be_made_leave_the_data_set_that_was_there(tmp_path, monkeypatch):
    assert run(write_csv(tmp_path / "t.csv", people(40)), tmp_path / "out") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for bad in (tmp_path / "none.csv", write_csv(tmp_path / "short.csv", people(1))):
        assert run(bad, tmp_path / "out") == 2
    real, calls = girl.market.draw_split, []

    def draw_split(*args):                  # what is refused in the last split
        calls.append(args)
        if len(calls) == 3:
            raise table.BadInput("data: among 60 jobs there is none for a cook; raise --jobs")
        return real(*args)
    monkeypatch.setattr(girl.market, "draw_split", draw_split)
    assert girl.main(["data", "--smoke", "--out", str(tmp_path / "out")]) == 2 and len(calls) == 3
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_long_words_take_no_time():
    """50,000 characters without a blank: an expression that starts again at each of them would take
    a minute."""
    start = time.process_time()
    for word in ("_" * 50000, "a.b-" * 12500, "+(" * 25000, "12 " * 17000, "www." * 12500,
                 "x@y." * 12500):
        hide_contacts(word, Counter())
    assert time.process_time() - start < 10


def test_odd_cells_are_handled_and_counted(tmp_path):
    rows = people(40)
    rows[0]["cv"], rows[1]["jd"], rows[2]["other"] = "  ", "", " "
    rows[3]["cv"] = "first line\r\nsecond, \"quoted\" line\n\nlast line  "
    rows[4]["jd"] = "long " * 10000
    rows += [dict(rows[5]), rows[6] | {"other": rows[6]["cv"]}]
    path = write_csv(tmp_path / "t.csv", rows)
    with open(path, "a") as f:
        f.write("too,few\r\n,,,\r\na,b,c,d,e,f\r\n")
    assert run(path, tmp_path / "out", "--rejected-cv", "other") == 0
    splits, report = result(tmp_path / "out")
    found = everything(splits)
    assert "first line\nsecond, \"quoted\" line\n\nlast line" in {r.cv for r in found}
    assert max(len(r.jd) for r in found) == 49999 and report["texts_over_10000_characters"] == 1
    # Empty are row 0, row 1 and the line of commas; the copy of row 5 repeats two decisions, that
    # of row 6 one.
    assert (report["rows"], report["rows_with_other_number_of_cells"],
            report["rows_with_an_empty_cell"]) == (43, 2, 3)
    assert ((report["rows_without_a_rejection"], report["duplicates"], report["contradictions"])
            == (1, 3, 1))
    assert len(found) == 2 * 38 - 1


@pytest.mark.parametrize("text, hidden", [
    ("Write to ann.lee+jobs@mail.example.co.uk, please", "Write to [EMAIL], please"),
    ("see https://example.org/me?x=1#y. Or www.me.dev/cv", "see [LINK]. Or [LINK]"),
    ("linkedin.com/in/ann-lee,", "[LINK],"),
    ("+49 (0)30 1234-567", "[PHONE]"), ("call (415) 555-2019 now", "call [PHONE] now"),
    ("415.555.0199", "[PHONE]"), ("0301234567", "[PHONE]"),
    ("Berlin, +49 30 1234567, Kurt", "Berlin, [PHONE], Kurt"),
    ("(415) 555-2019, San Francisco", "[PHONE], San Francisco"),
    ("+49\u00a030\u00a01234567", "[PHONE]"), ("0301-234-567x12", "[PHONE]x12"),
    ("mail: a@b.org,0301234567", "mail: [EMAIL],[PHONE]"),
    ("jane.dev/work and t.me/jane", "[LINK] and [LINK]"),
    ("and/or, TCP/IP, C/C++, 24/7, Node.js/React", None), ("version 2.0/3.1", None),
    ("(2014 - 2019)", None), ("2014-2019", None), ("03/2014 - 05/2019", None), ("12.05.2019", None),
    ("2019-05-12", None),
    ("5 years, 10,000 users, $120,000.00, 3.14159265", None),
    ("ISO 9001:2015 and Python 3.11.4", None), ("me@home", None), ("C++ / C# (2010)", None),
    ("job 16-05885", None), ("(555-2019)", None)])
def test_contacts_become_placeholders_and_dates_stay(text, hidden):
    assert hide_contacts(text, Counter()) == (hidden or text)


def test_contacts_are_counted_or_kept(tmp_path):
    rows = people(20)
    rows[0]["cv"] += " ann@example.org +1 415 555 0199"
    rows[1]["jd"] += " www.example.org"
    path = write_csv(tmp_path / "t.csv", rows)
    assert run(path, tmp_path / "hidden") == 0
    assert run(path, tmp_path / "kept", "--keep-contacts") == 0
    (hidden, report), (kept, quiet) = result(tmp_path / "hidden"), result(tmp_path / "kept")
    assert report["contacts_replaced"] == {"EMAIL": 1, "PHONE": 1, "LINK": 1}
    assert quiet["contacts_replaced"] is None
    assert "Cook number 0 [EMAIL] [PHONE]" in {r.cv for r in everything(hidden)}
    assert rows[0]["cv"] in {r.cv for r in everything(kept)}
    assert rows[1]["jd"] in {r.jd for r in everything(kept)}


def test_one_seed_gives_one_data_set(tmp_path):
    path = write_csv(tmp_path / "t.csv", people(50))
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(path, tmp_path / name, "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "test.jsonl").read_bytes() for name in "abc")
    assert a == b != c


CSV = b"cv,jd,hired\n" + b"".join(b"cook %d,kitchen %d,yes\n" % (i, i) for i in range(20))
BAD = [
    (CSV, ["--cv", "CV", "--jd", "jd"], "t.csv:1: no column 'CV'; there are 'cv', 'jd', 'hired'"),
    (CSV, ["--cv", "cv", "--jd", "jd", "--accepted", "no"], "t.csv:1: no column 'no'"),
    (CSV + b"cook,\"pan,yes\n" + CSV, ["--cv", "cv", "--jd", "jd"],
     "not a table of comma-separated values (unexpected end of data)"),
    (CSV + b"cook,pan,maybe\n", ["--cv", "cv", "--jd", "jd", "--accepted", "hired"],
     "t.csv:22: hired must be yes or no"),
    (b"", ["--cv", "cv", "--jd", "jd"], "no accepted pair of a CV and a JD in 0 rows"),
    (b"cv,jd\n,\n", ["--cv", "cv", "--jd", "jd"], "in 1 rows (1 with an empty cell)"),
    (b"cv,jd\na,1\na,2\nb,2\nb,3\nc,3\n", ["--cv", "cv", "--jd", "jd"],
     "form 1 groups connected by shared CVs or JDs; that is too few for an accepted pair in each "
     "of train, valid and test and no text in two of them; give --split-by cv,"),
    (b"cv,jd\na,1\nb,2\nc,3\n", ["--cv", "cv", "--jd", "jd"],
     "form 3 groups connected by shared CVs or JDs; that is too few for an accepted pair in each "
     "of train, valid and test and no text in two of them; give more rows"),
    *((b"cv,jd,ok\n" + b"".join(b"%s,%s,%s\n" % (cv or b"cook %d" % i, jd or b"kitchen %d" % i,
                                                 ok[i]) for i in range(40)),
       ["--cv", "cv", "--jd", "jd", "--accepted", "ok", "--split-by", by],
       f"too few different {kind} were accepted ({n})")
      for by in ("group", "cv") for cv, jd, ok, kind, n in (
          (b"", b"pots", [b"yes"] * 40, "JDs", 1), (b"Ann", b"", [b"yes"] * 40, "CVs", 1),
          (b"", b"", [b"yes"] * 2 + [b"no"] * 38, "CVs", 2))),
    (CSV.replace(b"yes", b"no"), ["--cv", "cv", "--jd", "jd", "--accepted", "hired"],
     "t.csv: the column 'hired' never says yes"),
    (CSV, ["--cv", "cv", "--jd", "cv "], "--cv, --jd and the others must name different columns"),
    (b"cv,jd\n" + b"".join(b"%d,cook %d,kitchen %d\n" % (i, i, i)
                           for i in range(20)) + b"20,cook 20,\n", ["--cv", "cv", "--jd", "jd"],
     "t.csv:1: each row has one cell more than the header"),
    (CSV, ["--cv", "cv"], "--from needs --cv and --jd"),
    (CSV, ["--cv", "cv", "--jd", "jd", "--accepted", "a", "--rejected-cv", "b"], "at most one"),
]


@pytest.mark.parametrize("content, flags, says", BAD)
def test_a_table_that_cannot_be_used_is_refused(content, flags, says, tmp_path, capsys):
    (tmp_path / "t.csv").write_bytes(content)
    assert girl.main(["data", "--from", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"),
                      *flags]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, says", [
    ("t.jsonl", b'{"cv": "a", "jd": 3}\n', "t.jsonl:1: jd must be a text, found int"),
    ("t.jsonl", b"[1]\n", "t.jsonl:1: expected an object"),
    ("t.jsonl", b'[\n{"cv": "a"},',
     "t.jsonl:1: not JSON (Expecting value: line 1 column 2 (char 1)); write one object a line"),
    ("t.jsonl", b'[{"cv": "a"}]', "t.jsonl:1: expected an object with a key for each column, found "
                                  "list; write one object a line"),
    ("t.jsonl", b'{"cv": "a", "cv ": "b", "jd": "c"}\n',
     "t.jsonl:1: the column 'cv' appears twice"),
    ("t.jsonl", b'{"cv": "a"}\n{"cv": "a"}', "t.jsonl:1: no column 'jd'; there are 'cv'"),
    ("t.jsonl", b'{}\n{"cv', "t.jsonl:2: not JSON"),
    ("t.xlsx", b"PK", "give a .csv, .tsv or .jsonl file"), ("none.csv", None, "No such file")])
def test_other_files_are_refused(name, content, says, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, tmp_path / "out") == 2
    assert says in capsys.readouterr().err


def test_columns_without_a_table_are_refused(tmp_path, capsys):
    assert girl.main(["data", "--out", str(tmp_path), "--cv", "x"]) == 2
    assert "give the table with --from FILE" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- encodings
GERMAN = "cv,jd\r\n" + "".join(f"Köchin {i} für Cafés,Gesucht: Köchin {i}\r\n" for i in range(40))
CHINESE = "cv,jd\r\n" + "".join(f"厨师{i}号,招聘厨师{i}\r\n" for i in range(40))
JAPANESE = "cv,jd\r\n" + "".join(f"コック{i}人、東京,シェフ募集{i}\r\n" for i in range(40))
RUSSIAN = "cv,jd\r\n" + "".join(f"Повар {i} из Москвы,Нужен повар {i}\r\n" for i in range(40))
POLISH = "cv,jd\r\n" + "".join(f"Główny kucharz {i} z Łodzi,Pracownik kuchni {i} w Łodzi\r\n"
                               for i in range(40))


def data_command(path, out, *flags):
    return ["data", "--from", str(path), "--cv", "cv", "--jd", "jd", "--out", str(out), *flags]


def written(path, content):
    path.write_bytes(content)
    return path


STRAY = GERMAN.encode().replace("Köchin 7 für".encode(),
                                "Köchin 7".encode() + b"\x92s " + "für".encode())


@pytest.mark.parametrize("content, line, says", [
    (STRAY, 9, "byte 92 is not UTF-8, and 160 other characters are"),
    (STRAY.replace(b"\r\n", b"\n"), 9, "byte 92"), (STRAY.replace(b"\r\n", b"\r"), 9, "byte 92"),
    (b"\xef\xbb\xbf" + STRAY, 9, "byte 92 is not utf-8-sig text"),
    (b"\xef\xbb\xbfcv,jd\n\x92,b\n", 2, "byte 92"),
    (GERMAN.encode() + "Köln,Bär\r\n".encode("cp1252") * 3, 42, "byte f6 is not UTF-8, and 160"),
    ("Köln,Bär\r\n".encode("cp1252") * 99 + GERMAN.encode(), 1, "cannot be guessed"),
    ("Köln,Bär\r\n".encode("cp1252") * 400 + "Köln,Bär\r\n".encode(), 1, "cannot be guessed"),
    (CHINESE.encode("gbk"), 2, "cannot be guessed"), (CHINESE.encode("big5", "replace"), 2, "byte"),
    (JAPANESE.encode("shift_jis"), 2, "cannot be guessed"),
    (JAPANESE.encode("euc_jp"), 2, "cannot be guessed"),
    (RUSSIAN.encode("cp1251"), 2, "cannot be guessed"),
    (RUSSIAN.encode("koi8-r"), 2, "cannot be guessed"),
    (POLISH.encode("cp1250"), 2, "cannot be guessed"),
    (GERMAN.encode("mac_roman"), 2, "cannot be guessed"),
    (GERMAN.encode("cp850"), 2, "cannot be guessed"),
    (GERMAN.encode("utf-32-le"), 1, "as in UTF-32"),
    (CHINESE.encode("utf-32-be"), 1, "(utf-32-le, utf-32-be)"),
    (GERMAN.encode("utf-16-le"), 1, "at least every other byte is 0, as in UTF-16"),
    (GERMAN.encode("utf-16-be"), 1, "every other byte is 0"),
    ((GERMAN + "a\0b,c\r\n").encode(), 42, "a NUL character"),
    (JAPANESE.encode("iso2022_jp"), 2,
     "an escape character, as in a file of another encoding (iso2022_jp"),
    (GERMAN.encode() + b"\x1b$)C,d", 42, "an escape character"),
    (GERMAN.encode("utf-16")[:-1], 42, "is not utf-16 text"),
    (("cv,jd\n" + "don’t cook,x\n" * 40).encode("cp1252") + b"\x81,b\n", 42,
     "byte 81 is neither UTF-8 nor cp1252")])
def test_a_file_in_another_encoding_is_refused_with_its_line(content, line, says, tmp_path, capsys):
    """A guess would change rows that are right."""
    for name in ("t.csv", "t.jsonl"):
        path = written(tmp_path / name, content)
        refused(capsys, data_command(path, tmp_path / "out"), f"{name}:{line}: ", says,
                "--encoding")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, encoding", [
    (CHINESE, "gbk"), (JAPANESE, "shift_jis"), (RUSSIAN, "koi8-r"), (POLISH, "cp1250"),
    (GERMAN, "mac_roman"), (GERMAN, "utf-16-le"), (GERMAN, "utf-32")])
def test_an_encoding_can_be_named(content, encoding, tmp_path):
    assert run(written(tmp_path / "t.csv", content.encode(encoding)), tmp_path / "out",
               "--encoding", encoding) == 0
    splits, report = result(tmp_path / "out")
    assert ({r.cv for r in everything(splits)}
            == {line.split(",")[0] for line in content.splitlines()[1:]})
    assert report["encoding"] == report["asked"]["encoding"] == encoding


@pytest.mark.parametrize("content, encoding, line",
                         [(GERMAN.encode(), "ascii", 2),
                          (CHINESE.encode("gbk") + b"ok,ok\n\xff,b\n", "gbk", 43),
                          (GERMAN.encode(), "utf-16-le", 1)])
def test_a_named_encoding_that_is_not_the_files_is_refused_with_its_line(
        content, encoding, line, tmp_path, capsys):
    refused(capsys, data_command(written(tmp_path / "t.csv", content), tmp_path / "out",
                                 "--encoding", encoding), f"t.csv:{line}: ")


@pytest.mark.parametrize("name",
                         ["rot13", "base64", "hex", "no-such", "utf-8\0x", "idna", "undefined"])
def test_what_is_no_encoding_of_text_is_refused(name, tmp_path, capsys):
    command = data_command(written(tmp_path / "t.csv", GERMAN.encode()), tmp_path / "out",
                           "--encoding", name)
    refused(capsys, command, "--encoding")


def test_a_guess_shows_a_word(tmp_path, capsys):
    assert run(written(tmp_path / "t.csv", GERMAN.encode("cp1252")), tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert ("The encoding is a guess: in cp1252 words of the file are 'für', 'Cafés', 'Köchin'. "
            "If that is wrong, give --encoding NAME." in said)
    assert result(tmp_path / "out")[1]["encoding_guessed_from"] == ["für", "Cafés", "Köchin"]
    assert run(written(tmp_path / "t.csv", GERMAN.encode()), tmp_path / "out") == 0
    assert "guess:" not in capsys.readouterr().out


def test_a_guess_shows_the_rarest_signs_first(tmp_path):
    text = ("cv,jd\n" + "".join(f"Szakács {i},Kávéház {i}\n" for i in range(40))
            + "hűtő,ín\nöt,ú\nó,x\n")
    assert run(written(tmp_path / "t.csv", text.encode("cp1250")), tmp_path / "out") == 0
    assert result(tmp_path / "out")[1]["encoding_guessed_from"] == ["hûtõ", "ín", "öt", "ú", "ó"]


def test_english_with_typographic_signs_is_western(tmp_path):
    rows = [p | {"cv": p["cv"] + " – “best” chef’s résumé, £45,000 · 20 °C… naïve café"}
            for p in people(20)]
    assert run(write_csv(tmp_path / "t.csv", rows, encoding="cp1252"), tmp_path / "out") == 0
    assert {r.cv for r in everything(result(tmp_path / "out")[0])} == {r["cv"] for r in rows}


def test_what_was_garbled_before_is_said(tmp_path, capsys):
    rows = people(40)
    rows[0]["cv"], rows[1]["jd"] = "K\ufffdchin f\ufffdr alle", "GemÃ¼se putzen"
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out") == 0
    said, report = capsys.readouterr().out, result(tmp_path / "out")[1]
    assert (report["lost_characters_(U+FFFD)"], report["garbled_texts"]) == (2, 1)
    assert "2 characters are U+FFFD" in said
    assert "1 texts look like UTF-8 that was read in another encoding before" in said


# ------------------------------------------------------------------------- delimiters and headers
BODY = [(f"Cook {i}", f"Wanted: cook {i}") for i in range(40)]


def lines(head, row, end="\r\n"):
    return head + "".join(row.format(cv=cv, jd=jd) + end for cv, jd in BODY)


@pytest.mark.parametrize("text", [
    lines('cv;jd;"hired (yes, no, or empty)"\r\n', "{cv};{jd};yes"),
    lines('"note\n(by hand)";cv;jd\r\n', "x;{cv};{jd}"),
    lines("sep=;\r\ncv;jd\r\n", "{cv};{jd}"), lines('"sep=|"\r\ncv|jd|a;b;c;d\r\n', "{cv}|{jd}|x"),
    lines("SEP=\t\r\ncv\tjd\r\n", "{cv}\t{jd}"), lines("sep=~\r\ncv~jd\r\n", "{cv}~{jd}"),
    lines("cv, jd\n", '"{cv}", "{jd}"', "\n"),
    lines('"cv" ,"jd"\n'.replace('" ', '"'), ' "{cv}",   "{jd}"'),
    lines('\ufeff"cv","jd"\r\n', '"{cv}","{jd}"'),
    lines("cv;jd;\r\n", "{cv};{jd};"), lines("cv;jd;\r\n", "{cv};{jd}"),
    lines("cv;jd\r\n", "{cv};{jd};;"), lines("cv;jd;;\r\n", "{cv};{jd};;"),
    lines("\r\n  \r\n;;\r\ncv;jd\r\n", "{cv};{jd}"), lines("cv,jd,a;b;c;d;e\r\n", "{cv},{jd},x"),
    lines("cv|jd\r", "{cv}|{jd}", "\r"),
    "\ufeff".join([lines("cv,jd\n", "{cv},{jd}", "\n"), ""]),
    lines('cv,jd\n', '"{cv}\ufeff",\ufeff"{jd}"')])
def test_a_header_is_read_as_csv(text, tmp_path):
    assert run(written(tmp_path / "t.csv", text.encode()), tmp_path / "out") == 0
    splits, report = result(tmp_path / "out")
    assert {r[:2] for r in everything(splits) if r.accepted} == set(BODY)
    assert report["rows"] == 40 and report["rows_with_other_number_of_cells"] == 0


@pytest.mark.parametrize("name, delimiter",
                         [(":", ":"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t"), ("~", "~")])
def test_a_delimiter_can_be_named(name, delimiter, tmp_path):
    text = lines(f"cv{delimiter}jd{delimiter}a,b,c,d\r\n",
                 "{cv}" + delimiter + "{jd}" + delimiter + "x").replace("Wanted: ", "Wanted ")
    assert run(written(tmp_path / "t.csv", text.encode()), tmp_path / "out",
               "--delimiter", name) == 0
    assert result(tmp_path / "out")[1]["delimiter"] == delimiter


@pytest.mark.parametrize("name, flags, text, says", [
    ("t.csv", ["--delimiter", ";;"], "cv;jd\n", "--delimiter ';;' must be one character, or tab"),
    ("t.csv", ["--delimiter", '"'], "cv;jd\n", "must be one character"),
    ("t.csv", ["--delimiter", " "], "cv;jd\n", "must be one character"),
    ("t.csv", ["--delimiter", ""], "cv;jd\n", "--delimiter must name something"),
    ("t.jsonl", ["--delimiter", ";"], "{}\n", "t.jsonl: a .jsonl file has no delimiter"),
    ("t.csv", ["--delimiter", ";"], lines("cv,jd\n", "{cv},{jd}"),
     "t.csv:1: no column 'cv'; there are 'cv,jd'"),
    ("t.csv", [], lines("CV;Jd\n", "{cv};{jd}"), "t.csv:1: no column 'cv'; there are 'CV', 'Jd'"),
    ("t.csv", [], lines("text\n", "{cv}"), "no column 'cv'; there are 'text'"),
    ("t.csv", [], lines("'cv','jd'\n", "'{cv}','{jd}'"), "there are \"'cv'\", \"'jd'\""),
    ("t.csv", [], lines("a,b,c\n", "{cv},{jd}"),
     "t.csv:1: no column 'cv'; there are 'a', 'b', 'c'"),
    ("t.csv", [], lines("cv,jd\n", "{cv},{jd}") + '"a \\"b\\" c",d\n' + "e,f\n",
     "t.csv:42: the row that begins here is not a table"),
    ("t.csv", [], lines("cv,jd\n", "{cv},{jd}") + '"a \\"b\\" c",d\n',
     "double a quote within a cell, instead of a backslash"),
    ("t.csv", [], lines("sep=,\r\ncv,jd\n", "{cv},{jd}") + '"a\nb"x,d\n',
     "t.csv:43: the row that begins here"),
    ("t.csv", ["--delimiter", "^"], lines('"cv","jd"\n', '"{cv}","{jd}"'),
     "or give --delimiter C, other than '^'"),
    ("t.csv", ["--delimiter", ","], lines("cv;jd\n", '"{cv}";"{jd}"'),
     "t.csv:1: no column 'cv'; there are 'cv;jd'; name others, or give --delimiter C"),
    ("t.csv", [], lines("\n\nsep=,\ncv;jd\n", '"{cv}";"{jd}"'),
     "t.csv:4: no column 'cv'; there are 'cv;jd'"),
    ("t.tsv", [], lines("cv\tjd\n", "{cv}\t{jd}") + 'Cook\t"Big" pan\n',
     "expected after '\"'); correct its quotes (double a quote within a cell), or"),
    ("t.tsv", [], lines("cv\tjd\n", "{cv}\t{jd}", "\n") + 'Cook\t"Big pan\nCook\tknife of 5"\n',
     "t.tsv:42: a quote makes these 2 lines one row"),
    ("t.tsv", [],
     lines("cv\tjd\n", "{cv}\t{jd}", "\n") + '"Cook\tpan\nCook\tpan\nknife of 5"\tpan\n',
     "t.tsv:42: a quote makes these 3 lines one row"),
    ("t.csv", [], 2 * lines("cv,jd\n", "{cv},{jd}"),
     "t.csv:42: the header again, as if two files were joined"),
    ("t.csv", [], lines("cv,jd\n", "{cv},{jd}") + "jd , cv\na,b\n", "t.csv:42: the header again"),
    ("t.csv", [], lines("id;cv;jd\n", "1;{cv};{jd}") + "number;cv;jd\n",
     "t.csv:42: the header again")])
def test_a_table_that_can_be_read_in_two_ways_is_refused(name, flags, text, says, tmp_path, capsys):
    refused(capsys, data_command(written(tmp_path / name, text.encode()), tmp_path / "out", *flags),
            says)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_that_look_the_same_are_the_same_column(form, tmp_path):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    for ending, text in (("csv", lines("résumé \u200b,jd\n", "{cv},{jd}")),
                         ("jsonl", lines("", '{{"résumé ": "{cv}", "jd": "{jd}"}}'))):
        path = written(tmp_path / f"t.{ending}", unicodedata.normalize(form, text).encode())
        assert girl.main(["data", "--from", str(path),
                          "--cv", unicodedata.normalize(other, "résumé"), "--jd", " jd",
                          "--out", str(tmp_path / "out")]) == 0
        assert {r[:2] for r in everything(result(tmp_path / "out")[0]) if r.accepted} == set(BODY)


def test_lines_and_tabs_within_a_quoted_cell_stay(tmp_path):
    text = lines("cv\tjd\n", "{cv}\t{jd}", "\n") + '"Cook\npots\tpans\n"\tkitchen\n'
    assert run(written(tmp_path / "t.tsv", text.encode()), tmp_path / "out") == 0
    assert "Cook\npots\tpans" in {r.cv for r in everything(result(tmp_path / "out")[0])}


@pytest.mark.parametrize("flags",
                         [["--encoding", "gbk"], ["--delimiter", ";"], ["--split-by", "cv"],
                          ["--split-by", "group"], ["--keep-contacts"]])
def test_how_a_table_is_read_goes_with_a_table(flags, tmp_path, capsys):
    refused(capsys, ["data", "--smoke", "--out", str(tmp_path / "out"), *flags],
            f"{flags[0]} says how a table is read; give the table with --from FILE")


# ---------------------------------------------------------------------------------- missing cells
@pytest.mark.parametrize("word", ["NULL", "null", "nan", "NaN", "N/A", "NA", "n/a", "None", "none",
                                  "#N/A", "\\N", "<NA>", " null ", "-", "#N/A N/A",
                                  "#NAME?", "#REF!", "#VALUE!", "#DIV/0!", "#NULL!", "#NUM!",
                                  "#BEZUG!", "nil", "undefined", "<null>", "\u200b", "\u2060 "])
def test_a_cell_that_says_missing_is_missing(word, tmp_path):
    rows = [p | {"hired": "yes"} for p in people(40)]
    rows[0]["cv"], rows[1]["jd"], rows[2]["hired"], rows[3]["other"] = [word] * 4
    path = write_csv(tmp_path / "t.csv", rows)
    for flags, empty in (([], 2), (["--accepted", "hired"], 3), (["--rejected-cv", "other"], 2)):
        assert run(path, tmp_path / "out", *flags) == 0
        splits, report = result(tmp_path / "out")
        assert report["rows_with_an_empty_cell"] == empty
        assert report["rows_without_a_rejection"] == ("other" in flags)
        says = word.strip(" \u200b\u2060")
        assert (report["cells_that_say_missing"]
                == ({says: empty + ("other" in flags)} if says else {}))
        assert not any(says in r[:2] for r in everything(splits))


def test_a_text_that_holds_such_a_word_is_a_text(tmp_path):
    rows = people(20)
    rows[0]["cv"], rows[1]["cv"], rows[2]["cv"] = ("NULL pointers debugged", "Nan Miller, cook #1!",
                                                   "none / - /")
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out") == 0
    splits, report = result(tmp_path / "out")
    assert {r["cv"] for r in rows} == {r.cv for r in everything(splits)}
    assert report["cells_that_say_missing"] == {}


def test_answers_as_numbers(tmp_path):
    words = ["1.0", "0.0", "1", "0", "1.00", "0.", "", "nan"]
    rows = [p | {"hired": words[i % 8]} for i, p in enumerate(people(80))]
    path = tmp_path / "t.jsonl"
    as_json = {"1.0": 1.0, "0.0": 0.0, "1": 1, "0": False, "1.00": True, "0.": "0.0", "": None,
               "nan": float("nan")}
    path.write_text("".join(json.dumps(r | {"hired": as_json[r["hired"]]}) + "\n" for r in rows))
    for table_path in (write_csv(tmp_path / "t.csv", rows), path):
        assert run(table_path, tmp_path / "out", "--accepted", "hired") == 0
        splits, report = result(tmp_path / "out")
        assert ({r.cv: r.accepted for r in everything(splits)}
                == {r["cv"]: r["hired"][0] == "1" for i, r in enumerate(rows) if i % 8 < 6})
        assert report["rows_with_an_empty_cell"] == 20
    for bad in ("0.5", "2.0", "10"):
        assert run(write_csv(tmp_path / "t.csv", [p | {"hired": bad} for p in people(9)]),
                   tmp_path / "out", "--accepted", "hired") == 2


def test_a_key_that_some_rows_leave_out_is_a_missing_cell(tmp_path):
    rows = [p | {"ok": "yes"} for p in people(40)]
    del rows[0]["ok"], rows[1]["jd"], rows[39]["cv"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path / "t.jsonl", tmp_path / "out", "--accepted", "ok") == 0
    assert result(tmp_path / "out")[1]["rows_with_an_empty_cell"] == 3


def test_json_has_its_own_missing_cells(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    good = "".join(json.dumps({"cv": f"Cook {i}", "jd": f"Wanted: cook {i}"}) + "\n"
                   for i in range(30))
    path.write_text(good + '{"cv": NaN, "jd": "x"}\n{"cv": "y", "jd": null}\n'
                           '{"cv": "NaN", "jd": "z"}\n')
    assert run(path, tmp_path / "out") == 0
    report = result(tmp_path / "out")[1]
    assert report["rows_with_an_empty_cell"] == 3 and report["cells_that_say_missing"] == {"NaN": 2}
    for odd, says in (("Infinity", "t.jsonl:31: cv is inf"), ("-Infinity", "cv is -inf"),
                      ("7", "cv must be a text, found int"),
                      ('"x\\ud800"', "t.jsonl:31: cv holds half of a surrogate pair")):
        path.write_text(good + '{"cv": %s, "jd": "x"}\n' % odd)
        refused(capsys, data_command(path, tmp_path / "out"), says)


# ------------------------------------------------------------------------------------ split by CV
def dense(tmp_path, cvs=640, jds=280, decisions=6240):
    """As in public data sets: each CV was judged for many JDs, and all hangs together."""
    draw = random.Random(1)
    rows = [{"cv": f"Candidate {p // jds}: cook", "jd": f"Job {p % jds}: kitchen",
             "fit": draw.choice(["yes", "no"])} for p in draw.sample(range(cvs * jds), decisions)]
    return write_csv(tmp_path / "dense.csv", rows), rows


def test_a_dense_table_is_split_by_cv_and_the_decisions_between_are_counted(tmp_path, capsys):
    path, rows = dense(tmp_path)
    refused(capsys, data_command(path, tmp_path / "no", "--accepted", "fit"), "form 1 groups",
            "give --split-by cv")
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(path, tmp_path / name, "--accepted", "fit", "--split-by", "cv",
                   "--seed", seed) == 0
    splits, report = result(tmp_path / "a")
    kept = everything(splits)
    assert set(kept) <= {Record(r["cv"], r["jd"], r["fit"] == "yes") for r in rows}
    assert len(set(kept)) == len(kept)
    assert report["dropped_between_splits"] == 6240 - len(kept)
    assert report["split_by"] == report["asked"]["split_by"] == "cv"
    assert "dropped between splits            " + str(6240 - len(kept)) in capsys.readouterr().out
    assert all(100 < n for n in report["decisions"].values())
    assert report["decisions"]["train"] > 2800
    for k in (0, 1):
        texts = [{r[k] for r in splits[s]} for s in splits]
        assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert ((tmp_path / "a/test.jsonl").read_bytes() == (tmp_path / "b/test.jsonl").read_bytes()
            != (tmp_path / "c/test.jsonl").read_bytes())
    check_splits(tmp_path / "a")


def test_the_halves_of_a_dense_table_both_have_acceptances_and_rejections(tmp_path):
    assert run(dense(tmp_path)[0], tmp_path / "out", "--accepted", "fit", "--split-by", "cv") == 0
    parts = [read_half(tmp_path / "out", part) for part in "AB"]
    for records in parts:
        assert 500 < sum(r.accepted for r in records) < len(records) - 500
    assert not {r.cv for r in parts[0]} & {r.cv for r in parts[1]}


def test_a_data_set_of_an_earlier_version_has_the_halves_that_it_had(tmp_path):
    assert run(write_csv(tmp_path / "t.csv", people(100)), tmp_path / "out",
               "--rejected-cv", "other") == 0
    before = read_half(tmp_path / "out", "A")
    report = result(tmp_path / "out")[1]
    new = ("asked", "split_by", "delimiter", "cells_that_say_missing", "dropped_between_splits",
           "encoding_guessed_from")
    (tmp_path / "out" / "import.json").write_text(json.dumps({k: v for k, v in report.items()
                                                              if k not in new}))
    assert read_half(tmp_path / "out", "A") == before and 60 < len(before) < 100
    (tmp_path / "out" / "import.json").write_text(json.dumps(report | {"split_by": "cv"}))
    assert read_half(tmp_path / "out", "A") != before


def test_a_jd_of_one_cv_costs_no_decision(tmp_path):
    assert run(write_csv(tmp_path / "t.csv", people(200)), tmp_path / "out", "--rejected-jd", "no",
               "--split-by", "cv") == 0
    report = result(tmp_path / "out")[1]
    assert report["dropped_between_splits"] == 0
    assert report["decisions"] == {"train": 280, "valid": 60, "test": 60}


def test_a_half_without_acceptances_is_said_with_the_remedy(tmp_path, capsys):
    """Three groups, one for each split: all of train is in one half."""
    rows = [{"cv": f"Cook {i} of {g}", "jd": f"Job {(i + k) % n} of {g}",
             "fit": "no" if k == 2 else "yes"}
            for g, n in enumerate((40, 5, 5)) for i in range(n) for k in range(3)]
    path = write_csv(tmp_path / "t.csv", rows)
    assert run(path, tmp_path / "out", "--accepted", "fit") == 0
    assert "of train has no accepted decision" in (said := capsys.readouterr().out)
    assert "give more rows, or --split-by cv." in said
    assert run(write_csv(tmp_path / "t.csv", people(200)), tmp_path / "out") == 0
    assert "of train has no" not in capsys.readouterr().out


def test_a_table_too_small_to_split_by_cv_is_refused(tmp_path, capsys):
    refused(capsys, data_command(written(tmp_path / "t.csv", b"cv,jd\na,1\nb,2\nc,3\n"),
                                 tmp_path / "out", "--split-by", "cv"),
            "of 3 decisions 3 have CV and JD in one split", "give more rows")
