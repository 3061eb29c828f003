"""What every text goes through: the same text wherever it was read, and contacts, but nothing else,
replaced."""
import json
import random
import re
import shutil
import unicodedata
from collections import Counter

import pytest

import girl
from conftest import argv, refused, tiny
from data import Codec, load_codec
from plumbing.tokenizer import save_tokenizer
from measure.recommend import read_pool
from plumbing.texts import hide_contacts, is_utf16, normalize
from plumbing.weights import load_model, read_config, save_model

# The number stands between < and >; the text around it must stay.
NUMBERS = """
call <(415) 555-2019> now
<(212) 555-0199> x 12
(<+49 30 1234567>)
call me (<0301234567>)
<415-555-0199>
<415.555.0199>, Oakland
Reach me: <1-800-555-0199>.
<+1 (604) 555-0134>
<+1 415 555 0199> 12 years of sales
<+1.416.555.0188> 2015 - 2018
Cell <4155550199>
<+44 20 7946 0958>
<+44 (0)161 496 0000>
<020 7946 0958>
<0161 496 0000> Manchester
<07911 123456>
<(01632) 960 001>
Mobile: <07700900123>
<+49 30 1234567>
Berlin, <+49 (0)30 1234-567>, Kurt
<030 1234567>
<030/1234567> Berlin
Tel. <030 / 12 34 56 78>
<0170 1234567> since 2015
Tel. <0170 1234567> 2015-2018 cook
<01701234567>
Handy: <0151 23456789>
<(030) 1234567>
<0049 30 1234567>
<+33 1 42 68 53 00>
<06 12 34 56 78>
<01.42.68.53.00>
Tél. : <06-12-34-56-78>
Portable : <0612345678>
<+39 06 1234 5678>
Cellulare <347 123 4567>
<+34 612 345 678>
Tel.: <612 345 678>
Móvil <612 345 678>
<91 123 45 67> Madrid
<+31 6 12345678>
<06-12345678>
<020 123 4567> Amsterdam
<+46 70 123 45 67>
<08-123 456 78>
<070-123 45 67>
<+48 601 234 567>
telefon: <601-234-567>
<22 123 45 67>
<+41 44 123 45 67>
<044 123 45 67>
Natel <079 123 45 67>
<+43 660 1234567>
<+91 98765 43210>
Mobile No: <98765 43210>
Mobile - no, phone: <9876543210>
<080 2345 6789>
<+86 138 0013 8000>
<138 0013 8000>
电话：<13800138000>
手机 <138-0013-8000>
<+81 3-1234-5678>
<03-1234-5678>
<090-1234-5678> Tokyo
<+82 10-1234-5678>
<02-123-4567> Seoul
<+61 2 9876 5432>
<(02) 9876 5432>
<0412 345 678>
<+55 11 91234-5678>
<(11) 91234-5678>
Celular <11 3456-7890>
<+52 55 1234 5678>
<(55) 1234 5678>
<+27 82 123 4567>
<082 123 4567>
<+7 (495) 123-45-67>
<8 (495) 123-45-67>
тел. <495 123 45 67>
<0532 123 45 67> Ankara
<+353 1 234 5678>
<+358 40 123 4567>
<+65 6123 4567>
<+971 50 123 4567>
<+49 30 1234567> 2015 - 2018
<+49 30 1234567> 2015
Phone <030 1234567> 05/2014 - 06/2016
Fax: <+32 2 555 12 12>
Mob: <9876543210>
Mob. No. <98765 43210>
Contact: <9876543210>
Contact no. <9876543210>
Ph: <9876543210>
Telemóvel: <912 345 678>
<(0049) 170 1234567>
<8-912-345-67-89>
<8 912 345 67 89>
<0(532) 123 45 67>
<0812-3456-7890>
📞 <415 555 2671>
📱<9876543210>
☎️ <415 555 2671>
Cell <415 555 2671>
Phone <347 123 4567>
Mobile <98765 43210>
Mobielnummer <06-12345678>
Mobil <40 12 34 56>
Tel.-Nr.: <030 1234567>
Rufnummer: <030 1234567>
Telefonnummer <0301234567>
Handynummer: <0151 23456789>
Phonenumber: <0301234567>
WhatsApp <+234 803 123 4567>
""".strip().split("\n")

NO_NUMBERS = """
Salary: 60000 - 80000 per year
45000-55000 GBP
48.000 - 56.000 EUR
48,000 - 56,000 EUR
500000-800000 INR
1 200 000 - 1 500 000 RUB
CHF 120'000 - 140'000
$120,000.00 - $140,000.00
£45000-£55000
€ 1.234.567,89
up to 100 000 000 a year
+100 000 000 users
+20 000 customers
Rs. 12,00,000 - 18,00,000
(10) 45000-55000
(12) 4000-5000 EUR
(12) 1500 2500
(415) 2015 1234
(2014) 555 12345
mobile 120 450 300 clicks
mobile 3.11.4 3.12.1
phone 192.168.10.200
phone 250 000 12 34
phone 192.168.10.200 8080
mobile 1200000 - 1500000
(50) 120 450 300
(10) 45000-55550
Budget 250 000 000 SEK
200 300 400 500
2014 - 2019
2019-2021
2015 2016 2017 2018
1998-2004 2004-2010 2010-2019
(2014 - 2019)
03/2014 - 05/2019
201401 - 201912
01.02.2015 - 31.12.2019
01-02-2015 - 31-12-2019
12.05.2019 14.06.2020
2019-05-12
2019-05-12 10:30:00
20190512 - 20200614
05/12/2019 10:30
2020-01-01 2021-12-31
Mon 08 00 - 17 00, Sat 09 00 - 12 00
0800-1200 1300-1700
C++2011 2014 2017 2020
ISO 9001/14001/27001
ISO 9001:2015, DIN EN 60204-1
IEC 61508-1 61508-2
Python 3.11.4 3.12.1 3.13.0
version 2.0/3.1
Windows 7/8/10/11 2000 2003 2008
10 000 - 15 000 users
192.168.100.200
10.0.0.1 - 10.0.0.254
010.020.030.040
ISBN 978-3-16-148410-0
ISBN 0306406152
ISBN 0-306-40615-2
ISSN 1234-5679
DE89 3704 0044 0532 0130 00
GB29 NWBK 6016 1331 9268 19
VAT DE123456789
VAT no. 0412 345 678
SIREN 012 345 678
4111 1111 1111 1111
10115 Berlin, 80331 Munich
01067 01069 Dresden
00118 00119 Roma
90210 94105
52.520008, 13.404954
40.7128 -74.0060
Order 0123456789 2015-2018
Ref. 0123 456789
Job 1234567 2015 - 2018
job 16-05885
234-567-2019
No. 415-555-0199
12345678 2012 - 2016
0123 456789 2015 - 2018
415-555-0199 2015 - 2018
000123456 2012-2016
402-1234567-1234567
a1b2-0301234567f
99.999 % to 99.9999 %
12 500 000 kWh
1500-2000 kWh
SAP 0010012345
SAP S/4HANA 1909 2020 2021
material 0400123456
GPA 3.85/4.00, 1350/1600
telephone sales 2015 - 2018 12 000 customers
mobile 2.0 2015-2020
mobile 120 000 000 users
mobile 8000000 users
phone 1234567 EUR
WhatsApp 2 000 000 000 users
phone 2015-2018
Fax 2012-05-14
Tel Aviv 2015 - 2018 12 000 000
cell 10 000 - 15 000 plants
mobile: 60000 - 80000 EUR
hotline 24/7 365
call centre 1500 2000 2500
mobile 192.168.100.200
1-2 3-4 5-6 7-8
3.14159265
100000000
1234567890
Matrikelnummer: 0212345678
Personalnummer 0123456789
Kundennummer: 0123 456789
Steuernummer 0123456789
Sozialversicherungsnr.: 0123456789
Passport 0212345678
Certificate: 0212345678
Student: 0212345678
Étudiant : 06 12 34 56 78
Matricola 0212345678
PESEL 02123456789
Número 0212345678
Führerschein 0212345678
Model 0212-345678
Lot 0212 345678
0030 0040 0050
0044 0045 0046
001 002 003 004
0030 0630 1200
GSM 900/1800/1900
gsm 900 1800 1900
GSM 850 900 1800 1900
cell 18650 21700 26650
cell 65000 70000
call 0800 1200 1630
phone 1234567 calls
mobile 9000000 MHz
flash mob 1200 1500 2000
contact 1200 1500 1800 customers
Mobilfunk 900 1800 1900
cell 10000000 mAh
Wage group 03 1200 1400
01 02 03 04 05
0830-1230-1630
0800-1200-1600
""".strip().split("\n")


def test_the_tables_are_large():
    assert len(set(NUMBERS)) >= 60 and len(set(NO_NUMBERS)) >= 60


@pytest.mark.parametrize("text", NUMBERS)
def test_a_telephone_number_is_replaced_and_the_text_around_it_stays(text):
    before, rest = text.split("<")
    number, after = rest.split(">")
    count = Counter()
    assert hide_contacts(before + number + after, count) == f"{before}[PHONE]{after}"
    assert +count == {"PHONE": 1}


def test_numbers_in_a_row_are_all_replaced():
    for text, hidden in (("Tel. 030 1234567 / 0170 1234567", "Tel. [PHONE] / [PHONE]"),
                         ("Phone: 415-555-0199, Fax: 415-555-0200", "Phone: [PHONE], Fax: [PHONE]"),
                         ("Tel +49 30 1234567 or +49 170 1234567.", "Tel [PHONE] or [PHONE].")):
        assert hide_contacts(text, Counter()) == hidden


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_may_be_anything_else_stays(text):
    count = Counter()
    assert hide_contacts(text, count) == text and not +count


@pytest.mark.parametrize("text, hidden", [
    ("Write to ann.lee+jobs@mail.example.co.uk, please", "Write to [EMAIL], please"),
    ("ann@example.org, bob@example.org", "[EMAIL], [EMAIL]"),
    ("see https://example.org/me?x=1#y. Or www.me.dev/cv", "see [LINK]. Or [LINK]"),
    ("(github.com/ann)", "([LINK])"), ("ann@example.org/path", "[EMAIL]/path"),
    ("linkedin.com/in/x, LinkedIn.com/in/x", "[LINK], [LINK]"),
    ("github.com/Name, GitHub.com/Ann", "[LINK], [LINK]"),
    ("Ann-Lee.dev/Work/cv, Ann.com/Cv.pdf, Me.dev/cv, T.me/Ann", "[LINK], [LINK], [LINK], [LINK]"),
    ("Monday.com/Jira, Salesforce.com/CRM. Crates.io/Rust or Open.ai/GPT", None),
    ("react@18.2.0, @types/node@18.0.0-beta.next, 10@2.50", None),
    ("ASP.net/C#, VB.NET/SQL, Node.js/React, C/C++.net/", None),
    ("and/or, TCP/IP, 24/7, Socket.io/Express, me@home", None), ("3.5/4.0, 60.000/70.000", None)])
def test_links_and_addresses_are_replaced_and_versions_stay(text, hidden):
    assert hide_contacts(text, Counter()) == (hidden or text)


def test_what_programs_do_to_a_text_is_undone():
    text = "Café cook\n\nSkills: crème brûlée"
    for other in (text.replace("\n", "\r\n"), text.replace("\n", "\r"), "\ufeff" + text,
                  f" \n{text}\t\r\n", f"\u200b \u2060{text} \u200b\n",
                  text.replace("c", "\u200bc\u2060"), text.replace(" ", "\u00a0"),
                  unicodedata.normalize("NFD", text),
                  " \ufeff " + unicodedata.normalize("NFD", text).replace("\n", "\r\n")):
        assert other != text and normalize(other, False) == text


def test_what_somebody_typed_stays():
    for text in ("x\u2003y  z", "a\tb \n c", "５ ｙｅａｒｓ", "ﬁne ½ ²", "a\0b", "“so” – ‘so’",
                 "ann@example.org +49 30 1234567"):
        assert normalize(text, False) == text


def test_contacts_are_replaced_where_it_is_asked_for_and_counted():
    text, count = ("Ann, ann@example.org, +49 30 1234567,\r\nwww.example.org and www.example.org/b",
                   Counter())
    assert (normalize(text, True, count) == normalize(text, True)
            == "Ann, [EMAIL], [PHONE],\n[LINK] and [LINK]")
    assert count == {"EMAIL": 1, "PHONE": 1, "LINK": 2}


def test_twice_gives_the_same_as_once():
    assert normalize("+49.030.1234567a.com/x", True) == "[PHONE][LINK]"
    assert normalize("tel 030\u200b123\u200b4567", True) == "tel [PHONE]"
    draw = random.Random(0)
    pieces = ["tel ", "Phone: ", "[PHONE]", "(", "+49 ", "030", "1234567", " ", "/", "-", ".",
              "2015", "ann@x.org", "www.a.de/x", "\r", "\n", "\ufeff", "\u200b",
              "e", "\u0301", "\u00a0", "(415)", "555-0199", "a.com/", "@", ",", "x"]
    for _ in range(5000):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        for hide in (False, True):
            once = normalize(text, hide)
            assert normalize(once, hide) == once, text


def test_utf_16_is_known_by_its_zeros():
    for text in ("a cook", "Köchin für Cafés\n" * 10, "cook, " + "厨师 " * 3):
        assert is_utf16(text.encode("utf-16-le"))
        assert is_utf16(text.encode("utf-16-be")) and not is_utf16(text.encode())
    assert not is_utf16(b"a\0cook\0") and not is_utf16(b"")


# ------------------------------------------------------------------------- wherever a text comes in
CV = ("Profile: cook, senior, 9 years.\nPlace: Bath, Café 9.\n"
      "Write to x@example.org or +49 30 1234567")
JD = "Wanted: cook, Bath.\nCafé. Mail y@example.org"
OTHERS = [lambda t: t.replace("\n", "\r\n"), lambda t: t.replace("\n", "\r"),
          lambda t: "\ufeff" + t, lambda t: f"\n {t}\r\n\t", lambda t: t.replace(" ", "\u00a0"),
          lambda t: unicodedata.normalize("NFD", t), lambda t: normalize(t, True)]


def score(reward, folder, capsys, cv=CV, jd=JD):
    for name, text in (("cv", cv), ("jd", jd)):
        (folder / f"{name}.txt").write_bytes(text.encode())
    capsys.readouterr()
    assert girl.main(["score", "--reward", str(reward), "--cv", str(folder / "cv.txt"),
                      "--jd", str(folder / "jd.txt")]) == 0
    return capsys.readouterr().out


def test_one_text_has_one_score_however_it_was_saved(whole, tmp_path, capsys):
    reward = whole / "run" / "reward"
    first = score(reward, tmp_path, capsys)
    for other in OTHERS:
        assert other(CV) != CV
        assert (score(reward, tmp_path, capsys, cv=other(CV))
                == score(reward, tmp_path, capsys, jd=other(JD)) == first)
    assert score(reward, tmp_path, capsys, cv=CV.replace("cook", "nurse")) != first


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "cp1252"])
def test_a_cv_in_another_encoding_is_refused(whole, tmp_path, capsys, encoding):
    (tmp_path / "cv.txt").write_bytes((CV if encoding == "cp1252"
                                       else "A cook, 9 years, Bath.").encode(encoding))
    refused(capsys, ["generate", "--model", str(whole / "run" / "ppo"),
                     "--cv", str(tmp_path / "cv.txt")], "cv.txt: ", "save the file as UTF-8")


def test_a_pool_holds_each_text_once(tmp_path):
    (tmp_path / "pool.jsonl").write_text("".join(
        json.dumps({"jd": text}) + "\n" for text in [JD, " "] + [other(JD) for other in OTHERS]))
    assert read_pool(tmp_path / "pool.jsonl", True) == [normalize(JD, True)]
    assert read_pool(tmp_path / "pool.jsonl", False) == [JD, normalize(JD, True)]


@pytest.fixture(scope="module")
def by_hand(whole, tmp_path_factory):
    """A run on a data set that nobody made here: its contacts are as they are written."""
    folder = tmp_path_factory.mktemp("by-hand")
    shutil.copytree(whole / "data", folder / "data")
    for name in ("market.json", "summary.json"):
        (folder / "data" / name).unlink()
    for stage in ("sft", "reward", "judge", "ppo"):
        assert girl.main(argv(stage, folder / "run", folder / "data")) == 0
    return folder / "run"


def test_all_models_of_a_run_keep_contacts_or_hide_them_as_its_data_do(
        whole, by_hand, tmp_path, capsys):
    for stage in ("sft", "reward", "judge", "ppo"):
        assert read_config(by_hand / stage)[0].keep_contacts is True
        assert read_config(whole / "run" / stage)[0].keep_contacts is False
    hidden = normalize(CV, True)
    assert (score(by_hand / "reward", tmp_path, capsys, cv=hidden)
            != score(by_hand / "reward", tmp_path, capsys))
    assert (score(by_hand / "reward", tmp_path, capsys)
            == score(by_hand / "reward", tmp_path, capsys, cv=CV.replace("\n", "\r\n")))


def test_after_a_stage_1_that_did_not_note_it_the_data_say_whether_contacts_are_kept(
        by_hand, tmp_path, monkeypatch):
    """As an earlier version of stage 1 did not."""
    def without_the_note(*args, **more):
        model = load_model(*args, **more)
        model.config.keep_contacts = False
        return model
    shutil.copytree(by_hand, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ppo")
    monkeypatch.setattr(girl, "load_model", without_the_note)
    assert girl.main(argv("ppo", tmp_path / "run", by_hand.parent / "data")) == 0
    assert read_config(tmp_path / "run" / "ppo")[0].keep_contacts is True


def test_each_model_reads_the_cv_as_its_own_data_were(whole, by_hand, tmp_path, monkeypatch):
    real, seen = Codec.prompt, []
    monkeypatch.setattr(Codec, "prompt", lambda self, cv: seen.append(cv) or real(self, cv))
    (tmp_path / "cv.txt").write_text(CV)
    for generator, reward, texts in ((by_hand, whole / "run", [CV, normalize(CV, True)]),
                                     (whole / "run", by_hand, [normalize(CV, True), CV])):
        seen.clear()
        assert girl.main(["generate", "--model", str(generator / "ppo"),
                          "--reward", str(reward / "reward"),
                          "--cv", str(tmp_path / "cv.txt")]) == 0
        assert seen == texts


def test_recommend_reads_cv_and_pool_as_the_data_were(whole, by_hand, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(girl.recommend, "find_jobs",
                        lambda models, cv, pool, *rest: found.append((cv, pool)))
    (tmp_path / "cv.txt").write_text(CV)
    (tmp_path / "pool.jsonl").write_text(json.dumps({"jd": JD}))
    for run in (whole / "run", by_hand):
        data = whole / "data" if run != by_hand else by_hand.parent / "data"
        assert girl.main(["recommend", "--run", str(run), "--data", str(data),
                          "--cv", str(tmp_path / "cv.txt"),
                          "--pool", str(tmp_path / "pool.jsonl")]) == 0
    assert found == [(normalize(CV, True), [normalize(JD, True)]), (CV, [JD])]


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2"]])
def test_a_pretrained_model_keeps_contacts_as_its_data_do(whole, by_hand, tmp_path, flags):
    codec, lm = tiny()
    save_model(tmp_path / "base", lm)
    save_tokenizer(tmp_path / "base", codec)
    start = ["--init", str(tmp_path / "base"), *flags]
    assert girl.main(argv("sft", tmp_path / "run", by_hand.parent / "data", "--max-cv", "40",
                          "--max-jd", "40", *start)) == 0
    assert girl.main(argv("reward", tmp_path / "run", by_hand.parent / "data", *start)) == 0
    for stage in ("sft", "reward"):
        assert read_config(tmp_path / "run" / stage)[0].keep_contacts is True


def test_a_model_without_the_field_hides_contacts(whole, tmp_path):
    shutil.copytree(whole / "run" / "ppo", tmp_path / "ppo")
    path = tmp_path / "ppo" / "config.json"
    raw = json.loads(path.read_text())
    del raw["keep_contacts"]
    path.write_text(json.dumps(raw))
    assert read_config(tmp_path / "ppo")[0].keep_contacts is False


def test_a_dense_table_feeds_all_stages(tmp_path):
    """Split by CV, both halves have what stages 1 and 2 learn from."""
    draw = random.Random(0)
    rows = [json.dumps({"cv": f"Cook {p // 40}", "jd": f"Kitchen {p % 40}",
                        "fit": draw.choice(["yes", "no"])})
            for p in draw.sample(range(60 * 40), 900)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    assert girl.main(["data", "--from", str(tmp_path / "t.jsonl"), "--cv", "cv", "--jd", "jd",
                      "--accepted", "fit", "--split-by", "cv",
                      "--out", str(tmp_path / "data")]) == 0
    for stage in ("sft", "reward", "judge"):
        assert girl.main(argv(stage, tmp_path / "run", tmp_path / "data")) == 0


def test_generate_scores_a_jd_as_score_does(whole, tmp_path, capsys, monkeypatch):
    """Also one that the reward model would not have met like this: with blanks around it."""
    model, scorer = str(whole / "run" / "sft"), str(whole / "run" / "reward")
    (tmp_path / "cv").write_text("A cook")
    (tmp_path / "jd").write_text("Wanted:\u00a0cook \n")
    codec = load_codec(whole / "run" / "sft", read_config(whole / "run" / "sft")[0])
    monkeypatch.setattr(girl, "generate", lambda *rest: [codec.jd("Wanted:\u00a0cook \n")])
    assert girl.main(["generate", "--model", model, "--reward", scorer,
                      "--cv", str(tmp_path / "cv")]) == 0
    shown = re.match(r"\[([+-][\d.]+)\]\n", capsys.readouterr().out)[1]
    assert girl.main(["score", "--reward", scorer, "--cv", str(tmp_path / "cv"),
                      "--jd", str(tmp_path / "jd")]) == 0
    assert float(capsys.readouterr().out) == pytest.approx(float(shown), abs=6e-4)


@pytest.mark.parametrize("content",
                         [b"\x00", b"\x18\x00", b"\x00Sf", b"\xdd\x96\x00", b"A cook\x00\x00\x00"])
def test_a_nul_or_three_in_a_short_text_are_no_utf16(content):
    assert not is_utf16(content)
    assert is_utf16("A cook".encode("utf-16-le")) and is_utf16("A cook".encode("utf-16-be"))
