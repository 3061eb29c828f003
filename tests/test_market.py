"""The simulated market: its tables, texts and back, the true match by hand, what is drawn, the
options, the yardsticks."""
import hashlib
import os
import random
import re
import string
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import market
from data import Record, read_records
from market import (ALL_SKILLS, BY_TITLE, CITIES, CV_LAYOUTS, DEGREES, FIELDS, JD_LAYOUTS,
                    MAX_YEARS_ASKED, OCCUPATIONS, REMOTE, Job, Person, applications, best_constants,
                    coverage, degree_factor, draw_job, draw_person, draw_split, echo, field_factor,
                    fits_title, in_pools, match, one_changes, oracle, overqualified, parse_cv,
                    parse_jd, place_factor, rules, same_occupation, seniority, sibling,
                    skills_factor, spoil, true_match, with_gap, without_gap, worsen, write_cv,
                    write_jd, write_market, years_factor)
from plumbing.files import BadInput

CHEF = Person("chef", 6, 1, "Leeds", False,
              ("butchery", "grilling", "pastry", "plating", "sauces", "staff rotas"))
KITCHEN = Job("chef", 4, 1, "Leeds", ("grilling", "pastry", "plating", "sauces"),
              "Cook fresh dishes for lunch and dinner.", (32, 36))
ANALYST = Person("data analyst", 3, 2, "Leeds", True,
                 ("dashboards", "forecasting", "Python", "SQL", "statistics", "Tableau"))


@pytest.fixture(scope="module")
def split():
    return draw_split(random.Random(1), people=300, jobs=3000, n_applications=8)


# --------------------------------------------------------------------------------------- the tables
def test_the_market_is_large_enough():
    assert len(OCCUPATIONS) >= 8 and sum(map(len, OCCUPATIONS.values())) >= 24
    assert len(BY_TITLE) == sum(map(len, OCCUPATIONS.values()))     # no title twice


@pytest.mark.parametrize("title", BY_TITLE)
def test_an_occupation_is_well_formed(title):
    o = BY_TITLE[title]
    assert len(o.skills) >= 14 and len(set(o.skills)) == len(o.skills)
    assert all(s == s.strip() and s and "," not in s for s in o.skills)
    assert o.degree in range(len(DEGREES)) and 15 <= o.pay <= 60
    assert o.duties and all(re.fullmatch(r"[A-Z][^.]+\.", d) for d in o.duties)


@pytest.mark.parametrize("field", OCCUPATIONS)
def test_neighbours_in_a_field_share_some_skills_but_not_most(field):
    titles = list(OCCUPATIONS[field])
    for title in titles:
        mine = set(BY_TITLE[title].skills)
        theirs = set().union(*(BY_TITLE[t].skills for t in titles if t != title))
        assert 1 <= len(mine & theirs) and len(mine - theirs) >= 3


def test_a_duty_tells_its_occupation():
    duties = [d for o in BY_TITLE.values() for d in o.duties]
    assert len(set(duties)) == len(duties)


def test_nothing_about_age_gender_origin_or_family_is_in_any_text(split):
    banned = """age aged old elderly youth born birth he she him her his hers himself herself male
        female man men woman women boy boys girl girls mr mrs ms miss sir madam gender sex name
        names called family married single mother father son daughter pregnant husband wife race
        ethnic origin nationality citizen native foreign religion church christian muslim jewish
        white black asian disabled""".split()
    texts = [*CV_LAYOUTS, *JD_LAYOUTS, *DEGREES, *CITIES, *ALL_SKILLS, *BY_TITLE]
    texts += [duty for o in BY_TITLE.values() for duty in o.duties]
    texts += [text for r in split[0] + split[1] for text in (r.cv, r.jd)]
    words = set(re.findall("[a-z]+", " ".join(texts).lower()))
    assert not words & set(banned)


# ----------------------------------------------------------------------------------- texts and back
@pytest.mark.parametrize("layout", range(len(CV_LAYOUTS)))
def test_cvs_round_trip(layout):
    rng = random.Random(layout)
    for _ in range(500):
        person = draw_person(rng)
        gap = replace(person, gap=True)
        cv, longer = write_cv(person, layout), write_cv(gap, layout)
        assert parse_cv(cv) == person and parse_cv(longer) == gap
        assert with_gap(cv) == with_gap(longer) == longer
        assert without_gap(cv) == without_gap(longer) == cv


@pytest.mark.parametrize("layout", range(len(JD_LAYOUTS)))
def test_jds_round_trip(layout):
    rng = random.Random(layout)
    for _ in range(300):
        job = draw_job(rng)
        for j in (job, sibling(rng, job)):
            assert parse_jd(write_jd(j, layout)) == j


def test_layouts_cannot_be_confused():
    assert len({write_cv(CHEF, i) for i in range(len(CV_LAYOUTS))}) == len(CV_LAYOUTS) >= 3
    assert len({write_jd(KITCHEN, i) for i in range(len(JD_LAYOUTS))}) == len(JD_LAYOUTS) >= 3
    assert not any(parse_jd(write_cv(CHEF, i)) for i in range(len(CV_LAYOUTS)))
    assert not any(parse_cv(write_jd(KITCHEN, i)) for i in range(len(JD_LAYOUTS)))


def test_a_jd_by_hand():
    text = (f"Job: chef\nPlace: Leeds\nPay: 32k to 36k\nExperience: {seniority(4)}, 4+ years\n"
            "Education: a vocational certificate\nSkills: grilling, pastry, plating, sauces\n"
            "Task: Cook fresh dishes for lunch and dinner.")
    assert parse_jd(text) == KITCHEN
    assert text in [write_jd(KITCHEN, i) for i in range(len(JD_LAYOUTS))]


def test_a_cv_by_hand():
    text = ("Work: data analyst\nExperience: skilled, 3 years\nPlace: Leeds or remote\n"
            "Skills: dashboards, forecasting, Python, SQL, statistics, Tableau\n"
            "Education: a bachelor's degree")
    assert parse_cv(text) == ANALYST
    assert text in [write_cv(ANALYST, i) for i in range(len(CV_LAYOUTS))]


@pytest.mark.parametrize("years, held, asked",
                         [(0, "no experience", "no experience"), (1, "1 year", "1+ year"),
                          (2, "2 years", "2+ years"), (12, "12 years", "12+ years")])
def test_years_in_words(years, held, asked):
    assert held in write_cv(replace(CHEF, years=years), 0)
    assert asked in write_jd(replace(KITCHEN, years=years), 0)


def test_seniority_rises_with_the_years():
    words = [seniority(y) for y in range(MAX_YEARS_ASKED + 1)]
    levels = list(dict.fromkeys(words))
    # No level comes back later.
    assert len(levels) >= 4 and words == sorted(words, key=levels.index)


SPOILED = {
    "unknown skill": ("grilling", "juggling"),
    "empty skill": ("grilling", ""),
    "no skills": ("grilling, pastry, plating, sauces", ""),
    "level that contradicts the years": (seniority(4), seniority(11)),
    "unknown level": (seniority(4), "able"),
    "no level": (f"{seniority(4)}, ", ""),
    "level twice": (seniority(4), f"{seniority(4)}, {seniority(4)}"),
    "reversed pay": ("32k to 36k", "36k to 32k"),
    "equal pay": ("32k to 36k", "32k to 32k"),
    "duty of another occupation": ("Cook fresh dishes for lunch and dinner.",
                                   "Serve guests in our dining room."),
    "unknown duty": ("Cook fresh dishes", "Cook stale dishes"),
    "no duty": ("Cook fresh dishes for lunch and dinner.", ""),
    "unknown title": ("chef", "chief"),
    "upper case": ("chef", "Chef"),
    "unknown city": ("Leeds", "Paris"),
    "two places": ("Leeds", "Leeds or remote"),
    "unknown degree": ("a vocational certificate", "a doctorate"),
    "trailing space": ("^(.*)$", r"\1 "),
    "trailing line": ("^(.*)$", "\\1\n"),
    "leading space": ("^(.*)$", r" \1"),
    "twice": ("^(.*)$", r"\1 \1"),
    "empty": ("^(.*)$", ""),
    "double space": (" years", "  years"),
}


@pytest.mark.parametrize("layout", range(len(JD_LAYOUTS)))
@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_jd_does_not_parse(kind, layout):
    pattern, new = SPOILED[kind]
    good = write_jd(KITCHEN, layout)
    bad = re.sub(pattern if pattern[0] == "^" else re.escape(pattern), new, good, flags=re.DOTALL)
    assert bad != good and parse_jd(bad) is None and true_match(write_cv(CHEF, 0), bad) == 0.0


@pytest.mark.parametrize("layout", range(len(JD_LAYOUTS)))
@pytest.mark.parametrize("wrong", ["1+ years", "0+ years", "04+ years", "4 years", "4+ year",
                                   "1 year", "+ years", "years", "-1+ years"])
def test_years_are_written_in_one_way_only(wrong, layout):
    # From three jobs, so that the seniority before the title fits the years and is not what betrays
    # the text.
    for years, right in ((0, "no experience"), (1, "1+ year"), (4, "4+ years")):
        good = write_jd(replace(KITCHEN, years=years), layout)
        assert right in good and parse_jd(good) and parse_jd(good.replace(right, wrong)) is None


@pytest.mark.parametrize("layout", range(len(JD_LAYOUTS)))
def test_a_cut_jd_does_not_parse(layout):
    text = write_jd(KITCHEN, layout)
    assert not any(parse_jd(text[:n]) or parse_jd(text[n + 1:]) for n in range(len(text)))


@pytest.mark.parametrize("layout", range(len(CV_LAYOUTS)))
@pytest.mark.parametrize("right, wrong", [
    ("6 years", "06 years"), ("6 years", "6+ years"), ("6 years", "1 years"),
    ("6 years", "0 years"), ("6 years", "senior, 6 years"), ("6 years", "\u0666 years"),
    ("Leeds", "Paris"), ("Leeds", "remote"),
    ("chef", "senior chef"), ("grilling", "juggling"), ("vocational", "special"), ("chef", "")])
def test_a_spoiled_cv_does_not_parse(right, wrong, layout):
    good = write_cv(CHEF, layout)
    assert right in good and parse_cv(good) == CHEF and parse_cv(good.replace(right, wrong)) is None
    assert parse_cv(good + " ") is None and parse_cv("") is None


@pytest.mark.parametrize("layout, sentence", [(0, " Career break: one year."),
                                              (1, " Career break: one year."),
                                              (2, "\nCareer break: one year")])
def test_a_gap_is_the_last_sentence_of_a_cv_once_and_in_its_own_form(layout, sentence):
    cv = write_cv(CHEF, layout)
    assert with_gap(cv) == cv + sentence and parse_cv(cv + sentence) == replace(CHEF, gap=True)
    other, = {" Career break: one year.", "\nCareer break: one year"} - {sentence}
    for wrong in (cv + other, cv + sentence * 2, cv + sentence + other, cv + other + sentence,
                  sentence + cv, sentence, cv + sentence.replace("one", "two"),
                  cv + sentence[:-1], cv + sentence + "."):
        assert parse_cv(wrong) is None


def test_no_single_character_can_be_changed_unnoticed():
    """Whatever text parses is exactly what its job writes: so a changed character is another job,
    or none."""
    rng = random.Random(0)
    for layout in range(len(JD_LAYOUTS)):
        text = write_jd(KITCHEN, layout)
        for n in range(len(text)):
            changed = (text[:n] + rng.choice(string.ascii_lowercase + " ,.\n+\u0663\u00a0")
                       + text[n + 1:])
            job = parse_jd(changed)
            assert (job is None
                    or (changed == write_jd(job, layout) and (job != KITCHEN or changed == text)))


# ----------------------------------------------------------------------------------- the true match
def test_skills_count_by_squared_coverage():
    asked = lambda *skills: replace(KITCHEN, skills=skills)
    assert coverage(CHEF, asked("grilling", "pastry", "food safety", "knife skills")) == 0.5
    assert skills_factor(CHEF, KITCHEN) == 1.0
    assert (skills_factor(CHEF, asked("grilling", "pastry", "sauces", "food safety"))
            == pytest.approx(9 / 16))
    assert (skills_factor(CHEF, asked("grilling", "pastry", "sauces", "plating", "food safety"))
            == pytest.approx(0.64))
    assert skills_factor(CHEF, asked("food safety", "knife skills", "cost control")) == 0.0
    assert coverage(CHEF, asked()) == 0.0


@pytest.mark.parametrize("skills", [(), ("grilling",), ("grilling", "pastry"),
                                    ("grilling", "pastry", "pastry", "sauces"),
                                    ("grilling",) * 4, CHEF.skills + ("butchery",)])
def test_a_list_that_is_short_repeated_or_padded_is_worth_a_tenth_at_most(skills):
    assert skills_factor(CHEF, replace(KITCHEN, skills=skills)) <= 0.1


def test_three_to_six_different_skills_are_an_honest_list():
    assert all(skills_factor(CHEF, replace(KITCHEN, skills=CHEF.skills[:n])) == 1.0
               for n in (3, 4, 5, 6))


def test_years():
    def factor(held, asked):
        return years_factor(replace(CHEF, years=held), replace(KITCHEN, years=asked))

    assert [factor(held, 4) for held in (5, 6, 7, 8)] == [1.0] * 4          # 1 to 4 to spare
    assert factor(0, 0) == 1.0                                              # a beginner's job
    assert 0.5 < factor(4, 4) < 1.0  # just enough is a little thin
    for held in (3, 2, 1, 0):  # underqualified: each year halves it
        assert factor(held, 4) == pytest.approx(factor(held + 1, 4) / 2)
    for held in (9, 10, 15):  # overqualified: each year costs the same share
        assert factor(held, 4) < 1.0
        assert factor(held, 4) / factor(held - 1, 4) == pytest.approx(factor(9, 4))
    assert factor(6, 1) == factor(9, 4) == factor(5, 0)  # only the difference counts


def test_degree():
    def factor(held, asked):
        return degree_factor(replace(CHEF, degree=held), replace(KITCHEN, degree=asked))

    assert all(factor(d, d) == 1.0 for d in range(4))
    assert 1.0 > factor(1, 0) > factor(2, 0) > factor(3, 0) > 0  # ever more overqualified
    assert 1.0 > factor(2, 3) > factor(1, 3) >= factor(0, 3) > 0            # ever less qualified
    assert factor(1, 2) < factor(2, 1)  # a degree too few is worse than one too many
    assert factor(3, 1) == factor(2, 0) and factor(0, 1) == factor(2, 3)


def test_place():
    here, away, home = (replace(KITCHEN, place=p) for p in ("Leeds", "Exeter", REMOTE))
    flexible = replace(CHEF, remote=True)
    assert (place_factor(CHEF, here) == place_factor(flexible, here)
            == place_factor(flexible, home) == 1.0)
    assert place_factor(CHEF, away) == place_factor(flexible, away) < 0.5
    assert 0 < place_factor(CHEF, home) < 1.0


def test_field():
    same, neighbour, other = (field_factor(CHEF, replace(KITCHEN, title=t))
                              for t in ("chef", "waiter", "plumber"))
    assert same == 1.0 > neighbour > other > 0 and other <= 0.1


def test_match_is_the_product():
    assert match(CHEF, KITCHEN) == pytest.approx(0.95)
    worse = Job("chef", 8, 2, "Exeter", ("cost control", "grilling", "pastry", "plating", "sauces"),
                KITCHEN.duty, (38, 42))
    factors = [f(CHEF, worse)
               for f in (skills_factor, years_factor, degree_factor, place_factor, field_factor)]
    product = 0.95
    for f in factors:
        product *= f
    assert all(0 < f <= 1 for f in factors) and match(CHEF, worse) == pytest.approx(product)
    waiter = replace(CHEF, title="waiter")
    assert match(waiter, KITCHEN) == pytest.approx(0.95 * field_factor(waiter, KITCHEN))


def test_pay_and_duty_do_not_enter_the_match():
    other = replace(KITCHEN, pay=(90, 99), duty="Lead the kitchen of our small restaurant.")
    assert match(CHEF, other) == match(CHEF, KITCHEN)


def test_true_match_is_the_match_of_the_texts():
    rng = random.Random(0)
    for _ in range(500):
        person, job = draw_person(rng), draw_job(rng)
        found = true_match(write_cv(person, rng.randrange(len(CV_LAYOUTS))),
                           write_jd(job, rng.randrange(len(JD_LAYOUTS))))
        assert found == match(person, job) and 0 <= found <= 0.95
        assert match(replace(person, gap=True), job) == found


def test_a_cv_of_another_market_is_refused_in_one_line():
    for ask in (true_match, fits_title, lambda cv, jd: same_occupation(Record(cv, jd, True))):
        with pytest.raises(BadInput, match="make the data again"):
            ask("Profile: alchemist", write_jd(KITCHEN, 0))


def test_fits_title():
    cv = write_cv(CHEF, 1)
    waiter, plumber = (replace(KITCHEN, title=t, duty=BY_TITLE[t].duties[0])
                       for t in ("waiter", "plumber"))
    assert fits_title(cv, write_jd(KITCHEN, 0)) and fits_title(cv, write_jd(waiter, 2))
    assert not fits_title(cv, write_jd(plumber, 1)) and not fits_title(cv, "Wanted: chef")


# ------------------------------------------------------------------------------------ what is drawn
def decisions_of(split):
    return [(parse_cv(r.cv), parse_jd(r.jd), r.accepted) for r in split[0]]


def test_every_decision_parses(split):
    assert all(person and job for person, job, _ in decisions_of(split))
    assert len({r.cv for r in split[0]}) >= 295 and len(split[0]) >= 295 * 5


def test_acceptance_follows_the_true_match(split):
    rows = [(match(person, job), accepted) for person, job, accepted in decisions_of(split)]
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.96)):
        part = [(p, accepted) for p, accepted in rows if low <= p < high]
        expected, accepted = sum(p for p, _ in part), sum(a for _, a in part)
        sigma = sum(p * (1 - p) for p, _ in part) ** 0.5
        assert len(part) >= 50 and abs(accepted - expected) < 4 * sigma


KINDS = {
    "underqualified in years": lambda p, j: p.years < j.years,
    "overqualified in years": lambda p, j: p.years > j.years + 4,
    "underqualified in degree": lambda p, j: p.degree < j.degree,
    "overqualified in degree": lambda p, j: p.degree >= j.degree + 2,
    "the wrong city": lambda p, j: j.place != REMOTE and j.place != p.city,
    "remote against the wish": lambda p, j: j.place == REMOTE and not p.remote,
    "the wrong skills": lambda p, j: p.title == j.title and coverage(p, j) <= 0.5,
    "a neighbour's job": lambda p, j: p.title != j.title
    and BY_TITLE[p.title].field == BY_TITLE[j.title].field,
    "the wrong field": lambda p, j: BY_TITLE[p.title].field != BY_TITLE[j.title].field,
}


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_shows_rejections_of_each_kind(split, kind):
    assert sum(KINDS[kind](p, j) and not accepted for p, j, accepted in decisions_of(split)) >= 5


def test_some_people_have_both_an_accepted_and_a_rejected_job(split):
    seen = {}
    for r in split[0]:
        seen.setdefault(r.cv, set()).add(r.accepted)
    assert sum(len(s) == 2 for s in seen.values()) > 0.4 * len(seen)


def test_probes_are_jds_that_nobody_would_accept(split):
    decisions, probes = split
    people = {r.cv for r in decisions if r.accepted}
    assert sorted(r.cv for r in probes) == sorted([*people, *people])
    assert all(not r.accepted and true_match(r.cv, r.jd) <= 0.1 for r in probes)


def test_a_probe_has_the_layout_of_the_accepted_jd_that_it_spoils(monkeypatch):
    monkeypatch.setattr(market, "SPOILT", ("duty",))
    decisions, probes = draw_split(random.Random(0), people=60, jobs=2000, n_applications=6)
    accepted = {}
    for r in decisions:
        if r.accepted:
            accepted.setdefault(r.cv, []).append(r.jd)
    duties = [duty for o in BY_TITLE.values() for duty in o.duties]
    assert len(probes) > 30
    for r in probes:
        wrong = next(duty for duty in duties if duty in r.jd)
        assert any(r.jd.replace(wrong, parse_jd(jd).duty) == jd for jd in accepted[r.cv])


@pytest.mark.parametrize("layout", range(len(JD_LAYOUTS)))
def test_any_skill_may_stand_twice_in_a_probe(layout, monkeypatch):
    monkeypatch.setattr(market, "SPOILT", ("repeated",))
    rng, twice = random.Random(0), set()
    for _ in range(200):
        job = parse_jd(spoil(rng, KITCHEN, layout))
        assert len(set(job.skills)) < len(job.skills) == len(KITCHEN.skills)
        twice |= {s for s in job.skills if job.skills.count(s) > 1}
    assert twice == set(KITCHEN.skills)


@pytest.mark.parametrize("title", BY_TITLE)
def test_a_spoiled_copy_of_a_perfect_job_is_worth_nothing(title):
    rng = random.Random(title)
    for _ in range(300):
        person = draw_person(rng)
        skills = tuple(rng.sample(BY_TITLE[title].skills, 8))
        person = replace(person, title=title, skills=skills)
        job = replace(oracle(person), skills=skills[:rng.choice((4, 5))])
        layout = rng.randrange(len(JD_LAYOUTS))
        assert match(person, job) > 0.9
        assert true_match(write_cv(person, 0), spoil(rng, job, layout)) <= 0.1


def test_a_sibling_differs_in_at_most_one_field():
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        job = draw_job(rng)
        other = sibling(rng, job)
        names = ("title", "years", "degree", "place", "skills", "duty")
        changed = {name for name in names if getattr(job, name) != getattr(other, name)}
        assert len(changed) <= 1 and len(other.skills) == len(set(other.skills)) == len(job.skills)
        seen |= changed
    assert seen == {"years", "degree", "place", "skills"}


def test_the_same_seed_draws_the_same_market():
    small = dict(people=20, jobs=600, n_applications=5)
    one, again, other = (draw_split(random.Random(seed), **small) for seed in (1, 1, 2))
    assert one == again
    assert not {r.cv for r in one[0]} >= {r.cv for r in other[0]} and one != other


def test_the_same_seed_draws_the_same_market_in_another_process():
    """The order of a set of texts differs between processes: a market drawn from one would too."""
    script = ("import random, hashlib; from market import draw_split;"
              "print(hashlib.sha256(repr(draw_split(random.Random(1), 20, 600, 5)).encode())"
              ".hexdigest())")
    root = str(Path(market.__file__).parent)
    found = {subprocess.run([sys.executable, "-c", script], cwd=root,
                            env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True,
                            text=True, check=True).stdout for seed in ("1", "2")}
    assert len(found) == 1


def test_a_smaller_market_has_the_first_fields_of_work_alone():
    """Decisions and probes: no word of another field stands in them."""
    decisions, probes = draw_split(random.Random(1), people=200, jobs=1000, n_applications=6,
                                   fields=2)
    mine = {title for field in list(OCCUPATIONS)[:2] for title in OCCUPATIONS[field]}
    assert {parse_cv(r.cv).title for r in decisions} == mine
    assert {parse_jd(r.jd).title for r in decisions} == mine
    others = ([t for t in BY_TITLE if t not in mine]
              + [d for t in BY_TITLE if t not in mine for d in BY_TITLE[t].duties])
    assert len(probes) > 20 and not [r for r in probes for text in others if text in r.jd]


@pytest.mark.parametrize("kind", ["cv", "jd"])
def test_taken_texts_are_not_used_again(split, kind):
    """The same draw, were some of its texts in another split already: none of them may come
    back."""
    taken = {getattr(r, kind) for r in split[0][:400]}
    again, _ = draw_split(random.Random(1), people=300, jobs=3000, n_applications=8,
                          taken=set(taken))
    assert again and not taken & {text for r in again for text in (r.cv, r.jd)}


def test_pools_hold_the_jobs_of_a_title_and_place():
    jobs = [draw_job(random.Random(i)) for i in range(300)] + [KITCHEN]
    pools = in_pools(jobs)
    for title in BY_TITLE:
        assert pools[title, None] == [i for i, job in enumerate(jobs) if job.title == title]
        for place in [*CITIES, REMOTE]:
            assert pools[title, place] == [i for i, job in enumerate(jobs)
                                           if (job.title, job.place) == (title, place)]


def test_who_would_work_from_home_looks_at_remote_jobs_too():
    """Three fitting remote jobs among 3,000 elsewhere, of which only 20 are looked at: the others
    miss them nearly always."""
    away = replace(draw_job(random.Random(0), "data analyst"), place="Exeter")
    jobs = [away] * 3000 + [replace(away, place=REMOTE, skills=ANALYST.skills[:4], years=2,
                                    degree=ANALYST.degree)] * 3
    pools, seen = in_pools(jobs), {}
    for remote in (True, False):
        person = replace(ANALYST, remote=remote)
        seen[remote] = sum(j >= 3000 for i in range(20)
                           for j in applications(random.Random(i), person, jobs, pools, 6))
    assert seen[True] >= 40 and seen[False] <= 3


@pytest.mark.parametrize("kind", dict.fromkeys(market.SPOILT))
def test_every_kind_of_probe_spoils(kind, monkeypatch):
    """A kind that spoil() does not know would give an empty JD, which is a kind of its own."""
    monkeypatch.setattr(market, "SPOILT", (kind,))
    spoilt = spoil(random.Random(0), KITCHEN, 0)
    assert spoilt != write_jd(KITCHEN, 0) and (spoilt == "") == (kind == "empty")


def test_a_slip_has_one_value_in_the_place_of_another(monkeypatch):
    monkeypatch.setattr(market, "SPOILT", ("slip",))
    rng = random.Random(0)
    for _ in range(200):
        job, layout = draw_job(rng), rng.randrange(len(JD_LAYOUTS))
        good, slipped = write_jd(job, layout), spoil(rng, job, layout)
        values = [job.title, job.place, DEGREES[job.degree], job.duty, f"{job.pay[0]}k",
                  market.years_text(job.years, "+"), *job.skills]
        assert slipped in {good.replace(a, b, 1) for a in values for b in values if a != b}


def test_people_apply_by_taste_and_now_and_then_at_random():
    away = replace(KITCHEN, place="Exeter",
                   skills=("allergen control", "cost control", "food safety", "menu planning"))
    jobs = [KITCHEN] * 200 + [away] * 200
    chosen = [j for seed in range(100)
              for j in applications(random.Random(seed), CHEF, jobs, in_pools(jobs), 6)]
    assert 60 < sum(j >= 200 for j in chosen) < 0.5 * len(chosen)


def test_who_applies_for_a_favourite_applies_for_the_posting_next_to_it():
    """Of one title: that is the other posting of the same employer. A neighbour of another title is
    not."""
    far = replace(KITCHEN, place="Exeter", skills=draw_job(random.Random(0), "electrician").skills)
    jobs = [far] * 300
    jobs[100], jobs[200] = KITCHEN, draw_job(random.Random(0), "electrician")
    for favourite, beside in ((100, {99, 101}), (199, {198})):
        jobs[100], jobs[favourite] = far, KITCHEN
        for seed in range(20):
            assert {favourite} | beside <= set(applications(random.Random(seed), CHEF, jobs,
                                                            in_pools(jobs), 6))
    asked = [200 in applications(random.Random(seed), CHEF, jobs, in_pools(jobs), 6)
             for seed in range(200)]
    assert sum(asked) < 10  # only as the one random job of any occupation


# -------------------------------------------------------------------------------------- the options
SMALL = dict(people=300, jobs=3000, n_applications=8)       # as `split`


@pytest.fixture(scope="module")
def prejudiced():
    return draw_split(random.Random(1), **SMALL, prejudice=0.5)


def bare(records):
    return [(without_gap(r.cv), r.jd) for r in records]


def test_without_options_the_data_are_those_of_the_versions_before_them(tmp_path):
    write_market(tmp_path, 60, 20, 400, 6, 0)
    names = ("train", "valid", "test", "probes")
    raw = b"".join((tmp_path / f"{name}.jsonl").read_bytes() for name in names)
    assert (hashlib.sha256(raw).hexdigest()
            == "f5033fe55615ac653f8592664658f325cb4908577ebd541bc218713fd7746da3")


def test_half_of_the_people_have_a_gap_and_all_else_is_as_without(split, prejudiced):
    assert not any(parse_cv(r.cv).gap for r in split[0] + split[1])
    assert bare(prejudiced[0]) == bare(split[0])
    cvs = {r.cv for r in prejudiced[0]}
    assert len({without_gap(cv) for cv in cvs}) == len(cvs)         # a person has a gap or has none
    assert abs(sum(parse_cv(cv).gap for cv in cvs) - len(cvs) / 2) < 2 * len(cvs) ** 0.5


def test_a_gap_costs_acceptances_but_no_true_match(split, prejudiced):
    with_one = [(old.accepted, new.accepted) for old, new in zip(split[0], prejudiced[0])
                if new.cv != old.cv]
    assert all(new == old for old, new in zip(split[0], prejudiced[0]) if new.cv == old.cv)
    assert not any(new > old for old, new in with_one)              # nobody gains by a gap
    n, kept = (sum(column) for column in zip(*with_one))
    assert n > 100 and abs(kept - n / 2) < 2 * n ** 0.5
    assert ([true_match(r.cv, r.jd) for r in prejudiced[0]]
            == [true_match(r.cv, r.jd) for r in split[0]])


def test_the_same_people_have_a_gap_at_any_prejudice_and_lose_all_at_1(prejudiced):
    worst = draw_split(random.Random(1), **SMALL, prejudice=1.0)
    assert [r[:2] for r in worst[0]] == [r[:2] for r in prejudiced[0]]
    assert ([r.accepted for r in worst[0]]
            == [r.accepted and not parse_cv(r.cv).gap for r in prejudiced[0]])
    # Probes are copies of accepted JDs.
    assert worst[1] == [r for r in prejudiced[1] if not parse_cv(r.cv).gap]


@pytest.mark.parametrize("options", [dict(prejudice=0.5), dict(no_overqualified=True),
                                     dict(prejudice=0.5, no_overqualified=True)])
def test_probes_are_those_of_the_decisions_that_stay_accepted(split, monkeypatch, options):
    """With a spoiler that leaves the JDs as they are, to tell of which decision a probe is. (If a
    person saw the same JD twice, nobody can tell.)"""
    monkeypatch.setattr(market, "spoil", lambda rng, job, layout, titles: write_jd(job, layout))
    before, (decisions, probes) = (draw_split(random.Random(1), **SMALL, **more)
                                   for more in ({}, options))
    times, kept = Counter(bare(before[0])), set(bare(r for r in decisions if r.accepted))
    assert ([pair for pair in bare(probes) if times[pair] == 1]
            == [pair for pair in bare(before[1]) if times[pair] == 1 and pair in kept])
    assert {r.cv for r in probes} <= {r.cv for r in decisions if r.accepted}
    assert len(before[1]) > len(probes) > 50


def test_overqualified():
    for years, degree, is_so in ((8, 2, False), (9, 1, True), (0, 3, True), (0, 0, False)):
        assert overqualified(replace(CHEF, years=years, degree=degree), KITCHEN) == is_so


def test_only_decisions_on_the_overqualified_are_left_out(split):
    found, _ = draw_split(random.Random(1), **SMALL, no_overqualified=True)
    kinds = [KINDS["overqualified in years"], KINDS["overqualified in degree"]]
    assert found == [r for r in split[0]
                     if not any(kind(parse_cv(r.cv), parse_jd(r.jd)) for kind in kinds)]
    assert 0.5 * len(split[0]) < len(found) < 0.9 * len(split[0])


def test_options_leave_the_other_splits_the_same_people_and_jobs(tmp_path, monkeypatch):
    """With few jobs and people, so that train often draws what another split would draw too."""
    few = market.draw_job, market.draw_person
    monkeypatch.setattr(market, "draw_job", lambda rng, title=None: few[0](
        random.Random(rng.randrange(300)), title))
    monkeypatch.setattr(market, "draw_person", lambda rng, titles: few[1](
        random.Random(rng.randrange(300)), titles))
    found = []
    for options in ((), (0.5,), (0.0, True), (0.5, True)):
        write_market(tmp_path, 200, 100, 800, 6, 0, 2, *options)
        found.append({split: read_records(tmp_path / f"{split}.jsonl")
                      for split in ("train", "valid", "test")})
    plain, gaps, fewer, both = found
    for split in ("valid", "test"):
        assert fewer[split] == plain[split] and both[split] == gaps[split]
        assert bare(gaps[split]) == bare(plain[split]) != [r[:2] for r in gaps[split]]
        assert len({r.cv for r in plain[split]}) < 90       # some were taken
        assert any(old.accepted and not new.accepted
                   for old, new in zip(plain[split], gaps[split]))
    assert bare(both["train"]) == bare(fewer["train"]) != bare(plain["train"])
    assert set(both["train"]) < set(gaps["train"])


# --------------------------------------------------------------------------------------- yardsticks
def same_but(job, other, *names):
    return replace(job, **{n: getattr(other, n) for n in names}) == other


@pytest.mark.parametrize("field, may_change", [("skills", ["skills"]), ("years", ["years", "pay"]),
                                               ("degree", ["degree"]),
                                               ("city", ["place"]), ("field", ["title", "duty"])])
def test_worsen_makes_one_field_worse(field, may_change):
    rng, done = random.Random(0), 0
    for _ in range(400):
        person = draw_person(rng)
        job = oracle(person)
        if field == "skills":       # also jobs that the person covers in part
            job = replace(job, skills=tuple(rng.sample(BY_TITLE[person.title].skills,
                                                       rng.choice((4, 5)))))
        worse = worsen(rng, person, job, field)
        if worse is None or match(person, job) == 0:
            continue
        done += 1
        assert match(person, worse) <= 0.6 * match(person, job)
        assert same_but(job, worse, *may_change) and worse != job
        assert parse_jd(write_jd(worse, 0)) == worse  # still a job of this market
        assert len(worse.skills) == len(set(worse.skills)) == len(job.skills)
    assert done > 200
    assert field in FIELDS and len(FIELDS) == 5


def test_worsen_swaps_half_of_the_covered_skills():
    for seed in range(50):
        worse = worsen(random.Random(seed), CHEF, KITCHEN, "skills")
        assert coverage(CHEF, KITCHEN) == 1.0 and coverage(CHEF, worse) == 0.5


def test_worsen_gives_up_where_nothing_is_worse():
    hopeless = replace(KITCHEN,
                       skills=("allergen control", "cost control", "food safety", "menu planning"))
    assert match(CHEF, hopeless) == 0
    assert [worsen(random.Random(0), CHEF, hopeless, field) for field in FIELDS] == [None] * 5


def test_oracle_is_the_best_and_no_worse_than_the_echo():
    rng = random.Random(0)
    for _ in range(300):
        person = draw_person(rng)
        best = match(person, oracle(person))
        assert best == pytest.approx(0.95) and best >= match(person, echo(person))
        assert all(parse_jd(write_jd(job(person), 0)) == job(person) for job in (echo, oracle))


def test_echo_by_hand():
    job = echo(ANALYST)
    assert (job.title, job.years, job.degree, job.place) == ("data analyst", 3, 2, "Leeds")
    assert job.skills == ANALYST.skills[:4] and job.duty in BY_TITLE["data analyst"].duties
    assert (match(ANALYST, job)
            == pytest.approx(0.95 * years_factor(ANALYST, replace(KITCHEN, years=3))))


def test_best_constants_by_brute_force():
    rng = random.Random(0)
    people, jobs = [draw_person(rng) for _ in range(150)], [draw_job(rng) for _ in range(300)]
    # Few enough that all of them are looked at.
    best = best_constants(random.Random(0), people, jobs)
    assert set(best) == {p.title for p in people} & {j.title for j in jobs} and len(best) > 12
    for title, job in best.items():
        mine = [p for p in people if p.title == title]
        mean = {j: sum(match(p, j) for p in mine) / len(mine) for j in jobs if j.title == title}
        assert mean[job] == pytest.approx(max(mean.values()))


def test_same_occupation():
    cv = write_cv(CHEF, 0)
    plumber = replace(KITCHEN, title="plumber", duty=BY_TITLE["plumber"].duties[0])
    waiter = replace(KITCHEN, title="waiter", duty=BY_TITLE["waiter"].duties[0])
    assert ([same_occupation(Record(cv, write_jd(j, 0), True)) for j in (KITCHEN, waiter, plumber)]
            == [True, False, False])


@pytest.mark.parametrize("field", FIELDS)
def test_one_changes_come_from_accepted_decisions_and_keep_the_layout(split, field):
    changes = one_changes(random.Random(0), split[0], field, 30)
    accepted = {(r.cv, r.jd) for r in split[0] if r.accepted}
    assert len(changes) == 30
    for cv, jd, worse in changes:
        assert (cv, jd) in accepted and 0 <= true_match(cv, worse) <= 0.6 * true_match(cv, jd)
        frame, new_frame = (re.sub(r"[^:\n]*(: |\n|$)", r"\1", text) for text in (jd, worse))
        assert parse_jd(worse) and frame == new_frame  # the same punctuation around other words


def test_rules_write_what_they_stand_for_and_are_ordered(split):
    cvs, jds = sorted({r.cv for r in split[0]}), sorted({r.jd for r in split[0]})
    found = rules(random.Random(0), cvs, jds, cvs)
    mean = {name: sum(map(true_match, cvs, theirs)) / len(cvs) for name, theirs in found.items()}
    assert mean["oracle"] == pytest.approx(0.95)
    assert 0 < mean["constant"] < mean["echo"] < mean["oracle"]
    assert (mean["echo"]
            == pytest.approx(sum(match(p, echo(p)) for p in map(parse_cv, cvs)) / len(cvs)))
    assert len(set(found["constant"])) <= len(BY_TITLE)                     # one job for each title
    assert rules(random.Random(0), cvs[:5], [], cvs[:5])["constant"] == [""] * 5
