"""A table of one's own into a data set: every cell is accounted for, and no text is on two sides."""
import csv
import json
import time
from collections import Counter

import pytest

import girl
import table
from conftest import refused
from data import Record, connected, half, read_half, read_records


def people(n):
    return [{"cv": f"Cook number {i}", "jd": f"Wanted: cook {i}", "other": f"Cook {i} without knives", "no": f"Driver {i}"} for i in range(n)]


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as f:
        writer = csv.DictWriter(f, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(path, out, *flags):
    return girl.main(["data", "--from", str(path), "--cv", "cv", "--jd", "jd", "--out", str(out), *flags])


def result(out):
    return {s: read_records(out / f"{s}.jsonl") for s in ("train", "valid", "test")}, json.loads((out / "import.json").read_text())


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
    for flag, rejected in (("--rejected-cv=other", {Record(p["other"], p["jd"], False) for p in rows}),
                           ("--rejected-jd=no", {Record(p["cv"], p["no"], False) for p in rows})):
        assert run(tmp_path / "t.jsonl", tmp_path / flag, flag) == 0
        splits, report = result(tmp_path / flag)
        assert set(everything(splits)) == accepted | rejected and report["rejections"] == "from the table"
        assert report["decisions"] == {"train": 48, "valid": 6, "test": 6} and report["groups"] == 30


def test_a_column_of_answers(tmp_path):
    words = ["yes", "No", "TRUE", "false", "1", "0", "accepted", "rejected", " y ", "n"]
    rows = [p | {"hired": words[i % 10]} for i, p in enumerate(people(40))] + [people(41)[40] | {"hired": " "}]
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out", "--accepted", "hired") == 0
    splits, report = result(tmp_path / "out")
    assert {r.cv: r.accepted for r in everything(splits)} == {p["cv"]: i % 2 == 0 for i, p in enumerate(rows[:40])}
    assert report["rows_with_an_empty_cell"] == 1


def test_without_rejections_the_jds_of_others_stand_for_them_and_it_says_so(tmp_path, capsys):
    rows = people(40)
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out") == 0
    assert "says nothing about rejections" in capsys.readouterr().out
    splits, report = result(tmp_path / "out")
    for records in splits.values():
        yes, no = ({r[:2] for r in records if r.accepted == a} for a in (True, False))
        assert len(yes) == len(no) and not yes & no
        assert {jd for _, jd in no} <= {jd for _, jd in yes} and {cv for cv, _ in no} == {cv for cv, _ in yes}
    assert report["rejections"] == "JDs of other candidates"


def test_no_text_is_on_two_sides_and_groups_are_whole(tmp_path):
    """Rows that hang together in chains: A and B share a CV, B and C a JD."""
    rows = [{"cv": f"cv {i // 2 * 2}", "jd": f"jd {(i + 1) // 2 if i % 6 else i}", "no": f"no {i % 20}"} for i in range(0, 300)]
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out") == 0
    splits, report = result(tmp_path / "out")
    texts = [{t for r in records for t in (("cv", r.cv), ("jd", r.jd))} for records in splits.values()]
    assert all(texts) and not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert report["groups"] > 20
    sizes = Counter({s: n / sum(report["accepted"].values()) for s, n in report["accepted"].items()})
    assert sizes["train"] == pytest.approx(0.8, abs=0.05) and sizes["valid"] == pytest.approx(0.1, abs=0.05)


def test_connected_by_hand():
    records = [Record(*x, True) for x in (("a", "1"), ("b", "2"), ("a", "2"), ("c", "3"), ("1", "a"), ("d", "3"))]
    assert sorted(map(sorted, connected(records))) == [[0, 1, 2], [3, 5], [4]]


def test_the_halves_of_an_imported_table_keep_groups_together(tmp_path):
    rows = people(200)
    assert run(write_csv(tmp_path / "t.csv", rows), tmp_path / "out", "--rejected-cv", "other") == 0
    parts = {p: read_half(tmp_path / "out", p) for p in "AB"}
    assert len(parts["A"]) + len(parts["B"]) == len(read_records(tmp_path / "out" / "train.jsonl"))
    assert not {r.jd for r in parts["A"]} & {r.jd for r in parts["B"]} and all(len(p) > 100 for p in parts.values())
    (tmp_path / "out" / "import.json").unlink()
    assert all(half(r.cv) == "A" for r in read_half(tmp_path / "out", "A"))


def test_both_halves_have_acceptances_and_rejections_whatever_the_rejections_are(tmp_path):
    """Each half must feed a stage: invented rejections tie all CVs together, and must not decide where these go."""
    path = write_csv(tmp_path / "t.csv", people(200))
    for name, flags in (("none", []), ("cv", ["--rejected-cv", "other"]), ("jd", ["--rejected-jd", "no"])):
        assert run(path, tmp_path / name, *flags) == 0
        parts = [read_half(tmp_path / name, part) for part in "AB"]
        for records in parts:
            assert 50 < sum(r.accepted for r in records) < 110 and len(records) == 2 * sum(r.accepted for r in records)
        assert not {r.cv for r in parts[0]} & {r.cv for r in parts[1]}


def test_a_folder_holds_one_kind_of_data(tmp_path):
    path, market = write_csv(tmp_path / "t.csv", people(40)), ["data", "--smoke", "--out", str(tmp_path / "out")]
    assert girl.main(market) == 0 and run(path, tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"train.jsonl", "valid.jsonl", "test.jsonl", "import.json", "summary.json"}
    assert girl.main(market) == 0
    assert not (tmp_path / "out" / "import.json").exists() and (tmp_path / "out" / "market.json").exists()


def test_a_data_set_that_was_not_made_here_is_not_written_over(tmp_path, capsys):
    """Whatever of it there is: also a finished stage has a summary.json."""
    path = write_csv(tmp_path / "t.csv", people(40))
    for files in (["valid.jsonl"], ["train.jsonl", "probes.jsonl"], ["valid.jsonl", "summary.json"], ["summary.json", "model.safetensors"]):
        mine = tmp_path / files[-1]
        mine.mkdir()
        for name in files:
            (mine / name).write_text("mine")
        for command in (["data", "--smoke", "--out", str(mine)], ["data", "--from", str(path), "--cv", "cv", "--jd", "jd", "--out", str(mine)]):
            refused(capsys, command, f"{mine}/{files[0]}: was not made by `data`, and is not written over; choose another --out")
        assert {p.name: p.read_text() for p in mine.iterdir()} == dict.fromkeys(files, "mine")


def test_a_folder_that_was_there_stays_and_one_that_was_made_in_vain_does_not(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        assert girl.main(["data", "--out", str(tmp_path / name), "--cv", "text"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_column_that_nobody_asked_for_may_stand_twice(tmp_path):
    path = write_csv(tmp_path / "t.csv", people(40))
    path.write_text("".join(line + (",notes,notes" if i == 0 else ",a,b") + "\n" for i, line in enumerate(path.read_text().splitlines())))
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
    """50,000 characters without a blank: an expression that starts again at each of them would take a minute."""
    start = time.process_time()
    for word in ("_" * 50000, "a.b-" * 12500, "+(" * 25000, "12 " * 17000, "www." * 12500, "x@y." * 12500):
        table.hide_contacts(word, Counter())
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
    # Empty are row 0, row 1 and the line of commas; the copy of row 5 repeats two decisions, that of row 6 one.
    assert (report["rows"], report["rows_with_other_number_of_cells"], report["rows_with_an_empty_cell"]) == (43, 2, 3)
    assert (report["rows_without_a_rejection"], report["duplicates"], report["contradictions"]) == (1, 3, 1)
    assert len(found) == 2 * 38 - 1


@pytest.mark.parametrize("text, hidden", [
    ("Write to ann.lee+jobs@mail.example.co.uk, please", "Write to [EMAIL], please"),
    ("see https://example.org/me?x=1#y. Or www.me.dev/cv", "see [LINK]. Or [LINK]"), ("linkedin.com/in/ann-lee,", "[LINK],"),
    ("+49 (0)30 1234-567", "[PHONE]"), ("call (415) 555-2019 now", "call [PHONE] now"), ("415.555.0199", "[PHONE]"), ("0301234567", "[PHONE]"),
    ("Berlin, +49 30 1234567, Kurt", "Berlin, [PHONE], Kurt"), ("(415) 555-2019, San Francisco", "[PHONE], San Francisco"),
    ("+49\u00a030\u00a01234567", "[PHONE]"), ("0301-234-567x12", "[PHONE]x12"), ("mail: a@b.org,0301234567", "mail: [EMAIL],[PHONE]"),
    ("jane.dev/work and t.me/jane", "[LINK] and [LINK]"), ("and/or, TCP/IP, C/C++, 24/7, Node.js/React", None), ("version 2.0/3.1", None),
    ("(2014 - 2019)", None), ("2014-2019", None), ("03/2014 - 05/2019", None), ("12.05.2019", None), ("2019-05-12", None),
    ("5 years, 10,000 users, $120,000.00, 3.14159265", None), ("ISO 9001:2015 and Python 3.11.4", None), ("me@home", None), ("C++ / C# (2010)", None), ("job 16-05885", None), ("(555-2019)", None)])
def test_contacts_become_placeholders_and_dates_stay(text, hidden):
    assert table.hide_contacts(text, Counter()) == (hidden or text)


def test_contacts_are_counted_or_kept(tmp_path):
    rows = people(20)
    rows[0]["cv"] += " ann@example.org +1 415 555 0199"
    rows[1]["jd"] += " www.example.org"
    path = write_csv(tmp_path / "t.csv", rows)
    assert run(path, tmp_path / "hidden") == 0 and run(path, tmp_path / "kept", "--keep-contacts") == 0
    (hidden, report), (kept, quiet) = result(tmp_path / "hidden"), result(tmp_path / "kept")
    assert report["contacts_replaced"] == {"EMAIL": 1, "PHONE": 1, "LINK": 1} and quiet["contacts_replaced"] is None
    assert "Cook number 0 [EMAIL] [PHONE]" in {r.cv for r in everything(hidden)}
    assert rows[0]["cv"] in {r.cv for r in everything(kept)} and rows[1]["jd"] in {r.jd for r in everything(kept)}


def test_one_seed_gives_one_data_set(tmp_path):
    path = write_csv(tmp_path / "t.csv", people(50))
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(path, tmp_path / name, "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "test.jsonl").read_bytes() for name in "abc")
    assert a == b != c


CSV = b"cv,jd,hired\n" + b"".join(b"cook %d,kitchen %d,yes\n" % (i, i) for i in range(20))
BAD = [
    (CSV, ["--cv", "CV", "--jd", "jd"], "t.csv:2: no column 'CV'; there are 'cv', 'jd', 'hired'"),
    (CSV, ["--cv", "cv", "--jd", "jd", "--accepted", "no"], "t.csv:2: no column 'no'"),
    (CSV + b"cook,\"pan,yes\n" + CSV, ["--cv", "cv", "--jd", "jd"], "not a table of comma-separated values (unexpected end of data)"),
    (CSV + b"cook,pan,maybe\n", ["--cv", "cv", "--jd", "jd", "--accepted", "hired"], "t.csv:22: hired must be yes or no"),
    (b"", ["--cv", "cv", "--jd", "jd"], "no accepted pair of a CV and a JD in 0 rows"),
    (b"cv,jd\n,\n", ["--cv", "cv", "--jd", "jd"], "in 1 rows (1 with an empty cell)"),
    (b"cv,jd\n" + b"a,b\n" * 5, ["--cv", "cv", "--jd", "jd"], "hang together in 1 groups"),
    (CSV, ["--cv", "cv"], "--from needs --cv and --jd"), (CSV, ["--cv", "cv", "--jd", "jd", "--accepted", "a", "--rejected-cv", "b"], "at most one"),
]


@pytest.mark.parametrize("content, flags, says", BAD)
def test_a_table_that_cannot_be_used_is_refused(content, flags, says, tmp_path, capsys):
    (tmp_path / "t.csv").write_bytes(content)
    assert girl.main(["data", "--from", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, says", [
    ("t.jsonl", b'{"cv": "a", "jd": 3}\n', "t.jsonl:1: jd must be a text, found int"), ("t.jsonl", b"[1]\n", "t.jsonl:1: expected an object"),
    ("t.jsonl", b'{"cv": "a"}\n', "t.jsonl:1: no column 'jd'"), ("t.jsonl", b'{}\n{"cv', "t.jsonl:2: not JSON"),
    ("t.xlsx", b"PK", "give a .csv, .tsv or .jsonl file"), ("none.csv", None, "No such file")])
def test_other_files_are_refused(name, content, says, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, tmp_path / "out") == 2
    assert says in capsys.readouterr().err


def test_columns_without_a_table_are_refused(tmp_path, capsys):
    assert girl.main(["data", "--out", str(tmp_path), "--cv", "x"]) == 2
    assert "give the table with --from FILE" in capsys.readouterr().err
