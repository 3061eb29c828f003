"""A simulated job market: the default data, and the true match, which only a simulation knows.

    python girl.py data --out DIR --seed 0

People and jobs are small records. Each is written as text in one of several layouts. The same
layouts, turned into regular expressions, parse the text. So every measurement can be computed
again from the texts alone. The steps:

1. `OCCUPATIONS` (edit it!) holds 24 occupations from 8 fields of work. Titles and skills follow
   O*NET and ESCO.
2. People and jobs are drawn. Within an occupation they differ in skills, years, degree and place.
3. Each person applies for a few jobs by taste (skills, place, degree, and an ambition that aims
   too high or too low), and for two or three at random.
4. The recruiter accepts with the probability `match(person, job)`, the **true match**.
5. `write_market` writes every decision as one line {"cv", "jd", "accepted"}.

Left out on purpose: names, age, gender, origin, family. No text mentions them, so a model cannot
learn anything about them. Also left out: pay does not affect the match (it follows the job's
level), an acceptance ends neither the search nor the posting, and nobody changes over time.

Two options make worse data, for experiments. `--prejudice P`: half of the people have a gap in
their CV, which the true match does not know. Where they would be accepted, the recruiter turns them
down with probability P. `--no-overqualified`: no decisions on the overqualified in train.
"""
import random
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from data import Record
from plumbing.records import clear_data, write_records
from plumbing.files import BadInput, write_json
from plumbing.stage import code_checksum, progress

# --------------------------------------------------------------------------- the tables: edit these
# The order of DEGREES is the order of levels 0..3.
DEGREES = ("a school certificate", "a vocational certificate", "a bachelor's degree",
           "a master's degree")
# Relative numbers of jobs. People are spread evenly over the cities, so many must look elsewhere.
CITIES = {"London": 6, "Glasgow": 4, "Leeds": 3, "Bristol": 3, "Cardiff": 2, "Belfast": 2,
          "Norwich": 1, "Exeter": 1}
REMOTE = "remote"
MAX_YEARS_HELD, MAX_YEARS_ASKED = 16, 12
SKILLS_HELD, SKILLS_ASKED = (6, 7, 8), (4, 5)   # number of skills that a CV lists, a job asks for

# field of work -> title -> (usual degree, starting pay in thousands, can it be done remotely?,
#                            skills, duties)
# Employers ask most often for the first skills of a list. Occupations of one field share some.
OCCUPATIONS = {
    "health": {
        "registered nurse": (2, 31, False,
            "medication, wound care, vital signs, triage, infection control, patient records, "
            "resuscitation, care planning, blood sampling, catheter care, pain assessment, "
            "discharge planning, first aid, infusion therapy",
            ("Care for patients on a busy ward.",
             "Give treatments and watch how patients respond.")),
        "nursing assistant": (1, 22, False,
            "patient hygiene, vital signs, meal support, patient lifting, infection control, "
            "first aid, patient records, mobility support, dementia care, catheter care, "
            "palliative care, fall prevention, linen changes, specimen collection",
            ("Help residents wash, eat and move.", "Support nurses on the ward.")),
        "physiotherapist": (3, 33, False,
            "exercise plans, manual therapy, gait training, patient records, pain assessment, "
            "rehabilitation, electrotherapy, mobility support, fall prevention, sports injuries, "
            "respiratory therapy, hydrotherapy, anatomy, first aid",
            ("Help people move again after an injury.", "Plan and guide therapy sessions.")),
    },
    "trades": {
        "electrician": (1, 28, False,
            "wiring, circuit testing, fault finding, cable laying, site safety, fuse boards, "
            "drawing reading, socket fitting, lighting, solar panels, earthing, conduit bending, "
            "power tools, soldering",
            ("Install and repair wiring in homes.", "Keep the power running on building sites.")),
        "plumber": (1, 28, False,
            "pipe fitting, leak detection, boiler repair, drain clearing, site safety, soldering, "
            "bathroom fitting, pressure testing, drawing reading, gas fitting, "
            "underfloor heating, pump repair, power tools, water treatment",
            ("Fit and mend pipes, baths and boilers.", "Answer calls about leaks and cold homes.")),
        "carpenter": (1, 27, False,
            "joinery, roof framing, door hanging, site safety, power tools, drawing reading, "
            "cabinet making, wood finishing, floor laying, stair building, timber selection, "
            "formwork, drywall, measuring",
            ("Build and fit wooden parts of houses.",
             "Make doors, stairs and cabinets to measure.")),
    },
    "education": {
        "primary teacher": (2, 30, False,
            "lesson planning, classroom management, phonics, reading lessons, arithmetic, "
            "pupil assessment, safeguarding, parent meetings, art projects, special needs, "
            "homework design, storytelling, play supervision, report writing",
            ("Teach a class of young pupils.", "Make every child read and count.")),
        "secondary teacher": (3, 32, False,
            "lesson planning, classroom management, exam preparation, pupil assessment, "
            "curriculum design, safeguarding, parent meetings, laboratory lessons, essay marking, "
            "career guidance, school trips, report writing, algebra, debate coaching",
            ("Teach teenagers and prepare them for exams.",
             "Run lessons for five classes a week.")),
        "nursery teacher": (1, 23, False,
            "play supervision, storytelling, safeguarding, first aid, art projects, "
            "parent meetings, music games, outdoor play, nap routines, toilet training, "
            "language games, child observation, healthy snacks, special needs",
            ("Look after a group of small children.", "Let toddlers learn through play.")),
    },
    "office": {
        "accountant": (2, 34, True,
            "financial statements, tax returns, bookkeeping, auditing, budgeting, general ledger, "
            "spreadsheets, cost analysis, payroll, fraud detection, invoicing, cash flow, "
            "depreciation, commercial law",
            ("Close the books at the end of each month.",
             "Prepare the yearly accounts of our clients.")),
        "payroll clerk": (1, 25, True,
            "payroll, timesheets, spreadsheets, wage calculation, tax deductions, data entry, "
            "bookkeeping, pension records, absence tracking, invoicing, staff queries, filing, "
            "bank transfers, overtime rules",
            ("See that all staff are paid on time.", "Check hours and pay for every team.")),
        "executive assistant": (2, 29, True,
            "calendar planning, travel booking, minute taking, data entry, filing, "
            "event planning, spreadsheets, email handling, invoicing, word processing, "
            "phone reception, expense reports, slide design, shorthand",
            ("Run the diary of two directors.", "Keep the office of our managers in order.")),
    },
    "technology": {
        "software developer": (2, 40, True,
            "Python, SQL, Git, Java, unit testing, debugging, code review, Docker, Linux, "
            "REST services, design patterns, C++, continuous integration, cloud deployment",
            ("Write and ship code for our web shop.",
             "Build services that our customers use daily.")),
        "data analyst": (2, 35, True,
            "SQL, Python, spreadsheets, statistics, dashboards, Tableau, data cleaning, "
            "report writing, R programming, forecasting, data mining, survey design, Power BI, "
            "data modelling",
            ("Answer business questions with data.", "Turn raw numbers into clear reports.")),
        "network technician": (1, 29, False,
            "routing, switching, firewalls, Linux, cable laying, fault finding, VPN setup, "
            "backups, help desk, Cisco equipment, server racks, virus protection, "
            "bandwidth monitoring, radio surveys",
            ("Keep office networks fast and safe.", "Set up and mend networks at our sites.")),
    },
    "hospitality": {
        "chef": (1, 27, False,
            "menu planning, food safety, knife skills, kitchen hygiene, sauces, grilling, "
            "stock control, pastry, cost control, plating, staff rotas, butchery, vegan cooking, "
            "allergen control",
            ("Cook fresh dishes for lunch and dinner.",
             "Lead the kitchen of our small restaurant.")),
        "waiter": (0, 21, False,
            "table service, order taking, food safety, wine service, cash handling, "
            "table setting, menu advice, complaint handling, banquets, cocktail mixing, "
            "allergen control, reservations, barista coffee, upselling",
            ("Serve guests in our dining room.", "Bring food and drinks with a smile.")),
        "hotel receptionist": (1, 23, False,
            "guest registration, reservations, phone reception, cash handling, room allocation, "
            "complaint handling, concierge advice, night audit, key control, invoicing, "
            "event planning, upselling, email handling, booking software",
            ("Welcome guests at the front desk.", "Give rooms, keys and advice to guests.")),
    },
    "logistics": {
        "truck driver": (0, 27, False,
            "load securing, vehicle checks, route planning, delivery notes, map reading, "
            "tachograph records, trailer coupling, night driving, hazardous goods, "
            "parcel scanning, fuel economy, customs papers, tail lifts, pallet handling",
            ("Bring goods to shops across the region.", "Drive long routes with care.")),
        "warehouse worker": (0, 22, False,
            "order picking, forklift driving, packing, pallet handling, stock counting, "
            "goods receipt, parcel scanning, stock control, shelf labelling, hazardous goods, "
            "delivery notes, returns handling, cold storage, load securing",
            ("Pick and pack orders for dispatch.", "Keep the shelves full and in order.")),
        "freight forwarder": (2, 30, True,
            "customs papers, shipment tracking, freight rates, route planning, sea freight, "
            "air freight, delivery notes, cargo insurance, carrier contracts, spreadsheets, "
            "hazardous goods, trade law, container booking, invoicing",
            ("Arrange transport by sea and air.", "Bring our customers' cargo over borders.")),
    },
    "sales": {
        "shop assistant": (0, 21, False,
            "cash handling, shelf stocking, customer advice, shop displays, complaint handling, "
            "stock counting, gift wrapping, refunds, price tagging, upselling, returns handling, "
            "fitting rooms, store cleaning, loyalty cards",
            ("Serve customers and keep the shop tidy.", "Help people find what they need.")),
        "sales representative": (1, 30, True,
            "customer advice, cold calling, contract negotiation, product demos, "
            "customer databases, market research, sales forecasts, trade fairs, "
            "territory planning, price quotes, upselling, slide design, lead generation, "
            "after-sales service",
            ("Visit clients and win new ones.", "Sell our machines to small firms.")),
        "marketing specialist": (2, 32, True,
            "social media, market research, content writing, search optimisation, brand strategy, "
            "email campaigns, web analytics, event planning, graphic design, press releases, "
            "trade fairs, advertising budgets, photo editing, lead generation",
            ("Make our brand known online.", "Plan campaigns and measure what they bring.")),
    },
}


@dataclass(frozen=True)
class Occupation:
    title: str
    field: str
    degree: int                 # the usual one, a level 0..3
    pay: int                    # thousands a year at entry
    remote: bool                # can the work be done from home?
    skills: tuple[str, ...]     # most asked for first
    duties: tuple[str, ...]


BY_TITLE = {title: Occupation(title, field, degree, pay, remote, tuple(skills.split(", ")), duties)
            for field, rows in OCCUPATIONS.items()
            for title, (degree, pay, remote, skills, duties) in rows.items()}
ALL_SKILLS = {s for o in BY_TITLE.values() for s in o.skills}


# ---------------------------------------------------------------------------------- people and jobs
@dataclass(frozen=True)
class Person:
    title: str
    years: int                  # of experience
    degree: int                 # level 0..3
    city: str
    remote: bool                # would this person also work from home?
    skills: tuple[str, ...]     # alphabetical
    gap: bool = False           # in the career; it does not enter the match


@dataclass(frozen=True)
class Job:
    title: str
    years: int                  # at least this many
    degree: int                 # at least this level
    place: str                  # a city, or REMOTE
    skills: tuple[str, ...]     # alphabetical in the market's own jobs; a policy may use any order
    duty: str
    pay: tuple[int, int]        # thousands a year


def seniority(years):
    """The level that goes with these years of experience."""
    return ("entry level" if years < 1 else "junior" if years < 3 else "skilled" if years < 6
            else "senior" if years < 10 else "lead")


# ----------------------------------------------------------------------------------- the true match
def coverage(person, job):
    """Share of the job's skills that the CV lists."""
    return sum(s in person.skills for s in job.skills) / max(len(job.skills), 1)


def skills_factor(person, job):
    """Coverage squared: if a job asks for 5 skills, one missing gives 0.64, two give 0.36.

    A list that is padded (more than 6 skills), too short (under 3) or repeats a skill tells the
    recruiter nothing: it gets a tenth of that."""
    honest = 3 <= len(job.skills) <= 6 and len(set(job.skills)) == len(job.skills)
    return coverage(person, job) ** 2 * (1.0 if honest else 0.1)


def years_factor(person, job):
    """1 to 4 years more than asked are best. Exactly the years asked give 0.8, and each missing
    year halves that. Each year beyond 4 costs 15%: the overqualified leave soon. A job that asks
    for no experience takes beginners."""
    spare = person.years - job.years
    if spare <= 0 and not (spare == 0 and job.years == 0):
        return 0.8 * 0.5 ** -spare
    return 0.85 ** max(spare - 4, 0)


def degree_factor(person, job):
    """The degree asked for is best. One level more is fine, two or more are overqualified. A lower
    degree is rarely accepted."""
    return {0: 1.0, 1: 0.85, 2: 0.55, 3: 0.4, -1: 0.35}.get(person.degree - job.degree, 0.1)


def overqualified(person, job):
    """At least 5 years, or two levels of degree, more than the job asks for."""
    return person.years > job.years + 4 or person.degree >= job.degree + 2


def place_factor(person, job):
    """The job should be in the person's city. Remote jobs suit those who would work from home."""
    if job.place == REMOTE:
        return 1.0 if person.remote else 0.4
    return 1.0 if job.place == person.city else 0.2


def field_factor(person, job):
    """1 for the same occupation, 0.5 for another of the same field of work, 0.05 for all others."""
    if person.title == job.title:
        return 1.0
    return 0.5 if BY_TITLE[person.title].field == BY_TITLE[job.title].field else 0.05


def match(person, job):
    """The true match: the probability, 0..0.95, that the recruiter accepts this person for this
    job."""
    return (0.95 * skills_factor(person, job) * years_factor(person, job)
            * degree_factor(person, job) * place_factor(person, job) * field_factor(person, job))


# -------------------------------------------------------------------------------- records <-> texts
# A layout is a format string that writes a text. With a pattern for each {name}, it is a regular
# expression that parses the text.
CV_LAYOUTS = (
    "Profile: {title}, {years}. Place: {place}. Skills: {skills}. Education: {degree}.",
    "Education: {degree}. Last post: {title}, {place}, {years}. Good at: {skills}.",
    "Work: {title}\nExperience: {years}\nPlace: {place}\nSkills: {skills}\nEducation: {degree}",
)
# The last sentence of a CV with a gap; or its last line, if the CV has lines.
GAPS = (" Career break: one year.", "\nCareer break: one year")
JD_LAYOUTS = (
    "Wanted: {title}, {place}. {duty} You have: {years}, {degree}. Skills: {skills}. Pay: {pay}.",
    "Job: {title}\nPlace: {place}\nPay: {pay}\nExperience: {years}\nEducation: {degree}\n"
    "Skills: {skills}\nTask: {duty}",
    "We are hiring: {title}, {place}, {pay}. {duty} You bring: {degree}, {years}. "
    "You know: {skills}.",
)
PATTERNS = {"title": r"[a-z -]+",
            "years": r"[a-z ]+, (?:no experience|\d{1,2}\+? years?)",
            "place": r"[A-Za-z]+(?: or remote)?",
            "skills": r"[^.\n]+",
            "degree": r"a [a-z' ]+",
            "duty": r"[A-Z][^.\n]+\.",
            "pay": r"\d{1,3}k to \d{1,3}k"}


def layout_regex(layout):
    parts = re.split(r"\{(\w+)\}", layout)     # plain text, name, plain text, name, ...
    return re.compile("".join(f"(?P<{p}>{PATTERNS[p]})" if i % 2 else re.escape(p)
                              for i, p in enumerate(parts)))


CV_REGEXES = [layout_regex(layout) for layout in CV_LAYOUTS]
JD_REGEXES = [layout_regex(layout) for layout in JD_LAYOUTS]


def years_text(years, plus=""):
    """Level and years: "skilled, 4 years" in a CV, "skilled, 4+ years" in a JD."""
    return f"{seniority(years)}, " + ("no experience" if years == 0
                                      else f"{years}{plus} year" + "s" * (years != 1))


def years_from(text):
    return int((re.findall(r"\d+", text) or [0])[0])


def without_gap(cv):
    return cv.removesuffix(GAPS[0]).removesuffix(GAPS[1])


def with_gap(cv):
    """The same CV with a gap. (If it has one, it gets no second.)"""
    bare = without_gap(cv)
    return bare + GAPS["\n" in bare]


def write_cv(person, layout):
    place = person.city + (f" or {REMOTE}" if person.remote else "")
    cv = CV_LAYOUTS[layout].format(title=person.title, years=years_text(person.years),
                                   place=place, skills=", ".join(person.skills),
                                   degree=DEGREES[person.degree])
    return with_gap(cv) if person.gap else cv


def write_jd(job, layout):
    return JD_LAYOUTS[layout].format(title=job.title, years=years_text(job.years, "+"),
                                     place=job.place, duty=job.duty,
                                     skills=", ".join(job.skills), degree=DEGREES[job.degree],
                                     pay=f"{job.pay[0]}k to {job.pay[1]}k")


@lru_cache(maxsize=2 ** 17)
def parse_cv(text):
    """The person that a CV describes, or None. A text counts as parsed only if `write_cv` turns the
    person into the same text."""
    bare = without_gap(text)
    for layout, regex in enumerate(CV_REGEXES):
        if m := regex.fullmatch(bare):
            city, _, remote = m["place"].partition(" or ")
            skills = tuple(m["skills"].split(", "))
            if (m["title"] in BY_TITLE and city in CITIES and m["degree"] in DEGREES
                    and ALL_SKILLS.issuperset(skills)):
                person = Person(m["title"], years_from(m["years"]), DEGREES.index(m["degree"]),
                                city, bool(remote), skills, gap=bare != text)
                if write_cv(person, layout) == text:
                    return person
    return None


@lru_cache(maxsize=2 ** 17)
def parse_jd(text):
    """The job that a JD describes, or None if this market has no such job: it has an unknown skill,
    city or degree, a duty of another occupation, a seniority that contradicts the years asked for,
    or a pay band that does not end above its start."""
    for layout, regex in enumerate(JD_REGEXES):
        if m := regex.fullmatch(text):
            title = m["title"]
            skills = tuple(m["skills"].split(", "))
            low, high = (int(n) for n in re.findall(r"\d+", m["pay"]))
            if (title in BY_TITLE and m["duty"] in BY_TITLE[title].duties
                    and m["degree"] in DEGREES and low < high
                    and (m["place"] in CITIES or m["place"] == REMOTE)
                    and ALL_SKILLS.issuperset(skills)):
                job = Job(title, years_from(m["years"]), DEGREES.index(m["degree"]), m["place"],
                          skills, m["duty"], (low, high))
                if write_jd(job, layout) == text:
                    return job
    return None


def of_market(cv):
    """The person that a CV describes. Refuses a CV that is not of this market."""
    if person := parse_cv(cv):
        return person
    raise BadInput("market.py: was it edited since the data were made? "
                   f"It cannot read this CV (make the data again): {cv[:60]!r}")


def true_match(cv, jd):
    """`match` from the texts alone; 0 for a JD that does not parse."""
    person, job = of_market(cv), parse_jd(jd)
    return match(person, job) if job else 0.0


def fits_title(cv, jd):
    """Is the JD's occupation that of the CV, or another of the same field of work?"""
    person, job = of_market(cv), parse_jd(jd)
    return job is not None and field_factor(person, job) >= 0.5


# -------------------------------------------------------------------------- drawing people and jobs
def alphabetical(skills):
    return tuple(sorted(skills, key=str.lower))


def draw_person(rng, titles=tuple(BY_TITLE)):
    o = BY_TITLE[rng.choice(titles)]
    return Person(o.title, years=min(int(rng.expovariate(1 / 6)), MAX_YEARS_HELD),
                  degree=min(max(o.degree + rng.choice((-1, 0, 0, 1)), 0), 3),
                  city=rng.choice(list(CITIES)), remote=o.remote and rng.random() < 0.5,
                  skills=alphabetical(rng.sample(o.skills, rng.choice(SKILLS_HELD))))


def draw_skills(rng, occupation, n):
    """n skills, drawn without replacement. The first skill of the occupation's list has three times
    the weight of the last."""
    last = len(occupation.skills) - 1
    keys = {s: rng.random() ** (1 / (3 - 2 * i / last)) for i, s in enumerate(occupation.skills)}
    return alphabetical(sorted(keys, key=keys.get)[-n:])


def draw_job(rng, title=None):
    o = BY_TITLE[title or rng.choice(tuple(BY_TITLE))]
    years = min(int(rng.expovariate(1 / 6)), MAX_YEARS_ASKED)
    place = (REMOTE if o.remote and rng.random() < 0.25
             else rng.choices(list(CITIES), CITIES.values())[0])
    return Job(o.title, years, min(max(o.degree + rng.choice((-1, 0, 0, 0, 1)), 0), 3), place,
               draw_skills(rng, o, rng.choice(SKILLS_ASKED)), rng.choice(o.duties),
               draw_pay(rng, o, years))


def draw_pay(rng, occupation, years):
    low = round(occupation.pay * (1 + 0.05 * years)) + rng.choice((0, 0, 1))
    return low, low + 4


def sibling(rng, job):
    """The same employer posts the job again: in another town, at another level, or for another
    degree or other skills."""
    o, other = BY_TITLE[job.title], draw_job(rng, job.title)
    change = rng.choice(("place", "years", "degree", "skills"))
    if change == "years":
        return replace(job, years=other.years, pay=draw_pay(rng, o, other.years))
    if change == "skills":      # keep about half of them
        kept = rng.sample(job.skills, len(job.skills) // 2)
        new = [s for s in draw_skills(rng, o, len(o.skills)) if s not in kept]
        return replace(job, skills=alphabetical(
            kept + rng.sample(new, len(job.skills) - len(kept))))
    return replace(job, **{change: getattr(other, change)})


def near(person, job):
    return person.remote if job.place == REMOTE else job.place == person.city


def taste(person, ambition, job):
    """How much a person wants a job. Pay rises with the level, so the ambitious look for pay."""
    reach = abs(job.years - (person.years + ambition))
    return (16 * coverage(person, job) + 3 * near(person, job) - 0.5 * reach
            - abs(job.degree - person.degree))


def in_pools(jobs):
    """Where people look: {(title, place): indices into `jobs`}; (title, None) holds all places."""
    pools = defaultdict(list)
    for i, job in enumerate(jobs):
        pools[job.title, job.place].append(i)
        pools[job.title, None].append(i)
    return pools


def applications(rng, person, jobs, pools, n):
    """Indices of the jobs that one person applies for.

    - n - 3 jobs by taste. The same employer's other posting stands next to the favourite and is
      added: two jobs that differ in one field show best how much that field is worth.
    - Two random jobs of the occupation: one nearby and one anywhere.
    - For every second person, one random job of any occupation."""
    ambition = rng.gauss(1.5, 2.0)
    mine = pools[person.title, None]
    local = (pools[person.title, person.city]
             + (pools[person.title, REMOTE] if person.remote else []))
    seen = list(dict.fromkeys(rng.sample(local, min(120, len(local)))
                              + rng.sample(mine, min(20, len(mine)))))
    liking = {j: taste(person, ambition, jobs[j]) + rng.gauss(0, 1) for j in seen}
    chosen = sorted(seen, key=liking.get, reverse=True)[:max(n - 3, 1)]
    chosen += [j for j in (chosen[0] - 1, chosen[0] + 1)
               if 0 <= j < len(jobs) and jobs[j].title == person.title]
    chosen += [rng.choice(local or mine), rng.choice(mine)]
    if rng.random() < 0.5:
        chosen.append(rng.randrange(len(jobs)))
    return list(dict.fromkeys(chosen))


# ------------------------------------------------------------------------------------------- probes
def blend(rng, skills):
    """Replace a skill by one that does not exist: its first word and the last word of another."""
    fake = ""
    while not fake or fake in ALL_SKILLS:
        a, b = rng.sample(skills, 2)
        fake = f"{a.split()[0]} {b.split()[-1]}"
    return alphabetical([fake if s == a else s for s in skills])


PROBES = 2              # for each person who was accepted for a job

# The faults that spoil() makes. The first ones are drawn more often. Samples of a language model
# have them, and no other decision shows that the right skills under a wrong title are worthless.
SPOILT = (("slip", "repeated") * 5 + ("duty",) * 4 + ("title",) * 3
          + ("padded", "short", "blended", "seniority", "pay", "cut", "twice", "shuffled", "empty"))


def spoil(rng, job, layout, titles=tuple(BY_TITLE)):
    """A JD that nobody would post, made from a good one in the same layout. A policy tries such JDs
    when it exploits a reward model. The true match of each is at most 0.1."""
    o, text = BY_TITLE[job.title], write_jd(job, layout)
    words, other = (text.split(" "),
                    BY_TITLE[rng.choice([t for t in titles if BY_TITLE[t].field != o.field])])
    kind = rng.choice(SPOILT)
    if kind == "padded":
        more = [s for s in o.skills if s not in job.skills]
        return write_jd(replace(job, skills=alphabetical(
            job.skills + tuple(rng.sample(more, rng.randint(3, 6))))), layout)
    if kind == "repeated":
        skills = list(job.skills)
        for _ in range(rng.randint(1, 2)):
            old, again = rng.sample(range(len(skills)), 2)
            skills[old] = skills[again]
        return write_jd(replace(job, skills=alphabetical(skills)), layout)
    if kind == "short":
        return write_jd(replace(job, skills=job.skills[:rng.randint(1, 2)]), layout)
    if kind == "blended":
        return write_jd(replace(job, skills=blend(rng, job.skills)), layout)
    if kind == "title":         # of another field of work: a "plumber" with the skills of a nurse
        return write_jd(replace(job, title=other.title, duty=rng.choice(other.duties)), layout)
    if kind == "duty":
        return write_jd(replace(job, duty=rng.choice(
            BY_TITLE[rng.choice([t for t in titles if t != o.title])].duties)), layout)
    if kind == "slip":          # a value in the place of another: "Place: 24k"
        values = [job.title, job.place, years_text(job.years, "+"), DEGREES[job.degree], job.duty,
                  f"{job.pay[0]}k", *job.skills]
        old, new = rng.sample(values, 2)
        return text.replace(old, new, 1)
    if kind == "seniority":
        wrong = {seniority(years) for years in range(MAX_YEARS_ASKED)} - {seniority(job.years)}
        return text.replace(f"{seniority(job.years)}, ", rng.choice(sorted(wrong)) + ", ")
    if kind == "pay":
        return write_jd(replace(job, pay=job.pay[::-1]), layout)
    if kind == "cut":
        return " ".join(words[:rng.randint(1, len(words) - 1)])
    if kind == "twice":
        return f"{text} {text}"
    if kind == "shuffled":
        return " ".join(rng.sample(words, len(words)))
    return ""


# ------------------------------------------------------------------- yardsticks for what is learned
FIELDS = ("skills", "years", "degree", "city", "field")


def worsen(rng, person, job, field):
    """The same job with one field made clearly worse for this person; None if none is worse."""
    o = BY_TITLE[job.title]
    if field == "skills":       # swap half of the covered skills for others that the CV lacks
        covered = [s for s in job.skills if s in person.skills]
        lacking = [s for s in o.skills if s not in person.skills and s not in job.skills]
        dropped = rng.sample(covered, min((len(covered) + 1) // 2, len(lacking)))
        kept = [s for s in job.skills if s not in dropped]
        options = [replace(job, skills=alphabetical(kept + rng.sample(lacking, len(dropped))))]
    elif field == "years":
        options = [replace(job, years=y, pay=draw_pay(rng, o, y))
                   for y in range(MAX_YEARS_ASKED + 1)]
    elif field == "degree":
        options = [replace(job, degree=d) for d in range(len(DEGREES))]
    elif field == "city":
        options = [replace(job, place=c) for c in CITIES]
    else:
        options = [replace(job, title=t, duty=rng.choice(BY_TITLE[t].duties))
                   for t in BY_TITLE if BY_TITLE[t].field != o.field]
    worse = [j for j in options if match(person, j) < 0.61 * match(person, job)]
    return rng.choice(worse) if worse else None


def echo(person):
    """A rule: the job repeats the CV's own fields."""
    o, years = BY_TITLE[person.title], min(person.years, MAX_YEARS_ASKED)
    return Job(o.title, years, person.degree, person.city, person.skills[:4], o.duties[0],
               draw_pay(random.Random(0), o, years))


def oracle(person):
    """A best job that this market can express: the echo, with two years less than the CV has."""
    years = min(max(person.years - 2, 0), MAX_YEARS_ASKED)
    return replace(echo(person), years=years)


def best_constants(rng, people, jobs):
    """For each title, the job with the highest mean match for people of this title (of at most 150
    people and 300 jobs, drawn at random). A policy that reads only the title can do no better."""
    best = {}
    for title in BY_TITLE:
        mine, theirs = ([p for p in people if p.title == title],
                        [j for j in jobs if j.title == title])
        mine, theirs = (rng.sample(mine, min(150, len(mine))),
                        rng.sample(theirs, min(300, len(theirs))))
        if mine and theirs:
            best[title] = max(theirs, key=lambda job: sum(match(p, job) for p in mine))
    return best


def titles(record):
    """The titles of CV and JD; None for a JD that does not parse."""
    job = parse_jd(record.jd)
    return of_market(record.cv).title, job and job.title


def same_occupation(record):
    """Is this a decision within one occupation? (The others are too easy to count: the title alone
    decides them.)"""
    mine, asked = titles(record)
    return mine == asked


def agreement(a, b):
    """The fields in which two jobs agree, as short texts."""
    fields = {"occupation": (a.title, b.title),
              "place": (a.place, b.place),
              "level": (seniority(a.years), seniority(b.years)),
              "education": (DEGREES[a.degree], DEGREES[b.degree])}
    return ([f"{name} ({mine})" for name, (mine, other) in fields.items() if mine == other]
            + [s for s in a.skills if s in b.skills])


def one_changes(rng, records, field, n):
    """Up to n triples of texts (cv, jd, worse jd): an accepted JD of a CV, and the same JD with one
    field made worse for this CV."""
    found = []
    for r in records:
        person, job = parse_cv(r.cv), parse_jd(r.jd)
        if r.accepted and len(found) < n and (worse := worsen(rng, person, job, field)):
            layout = next(i for i in range(len(JD_LAYOUTS)) if write_jd(job, i) == r.jd)
            found.append((r.cv, r.jd, write_jd(worse, layout)))
    return found


def rules(rng, train_cvs, train_jds, cvs):
    """JD texts for `cvs` by three rules, without a model: the best single job of each title, the
    echo, and a best job."""
    best = best_constants(rng, [of_market(cv) for cv in train_cvs],
                          [job for jd in train_jds if (job := parse_jd(jd))])
    people = [of_market(cv) for cv in cvs]
    jobs = {"constant": [best.get(p.title) for p in people],
            "echo": map(echo, people),
            "oracle": map(oracle, people)}
    return {name: [write_jd(job, 0) if job else "" for job in theirs]
            for name, theirs in jobs.items()}


# ------------------------------------------------------------------------------------- the data set
def draw_split(rng, people, jobs, n_applications, taken=None, fields=len(OCCUPATIONS),
               prejudice=0.0, no_overqualified=False):
    """All decisions of one split, and its probes: spoiled copies of accepted JDs, for every person
    who has one. A copy has the layout of its JD, so the two differ only in the fault.

    Texts in `taken` are not used: no CV and no JD may be in two splits. Those of this split are
    added to it. People and jobs are of the first `fields` fields of work.

    The options move no draw of `rng`: people, jobs, applications and the decisions on people
    without a gap stay the same. (But a hash of the CV picks its half, A or B: a gap may change
    it.)"""
    taken = set() if taken is None else taken
    own = random.Random(repr(rng.getstate()))       # for the gaps and what they cost
    all_jobs, layouts, texts, titles = [], [], [], [
        title for field in list(OCCUPATIONS)[:fields] for title in OCCUPATIONS[field]]
    while len(all_jobs) < jobs:
        # Half of the jobs are posted a second time with one field changed.
        job = (sibling(rng, all_jobs[-1]) if all_jobs and rng.random() < 0.5
               else draw_job(rng, rng.choice(titles)))
        layout = rng.randrange(len(JD_LAYOUTS))
        text = write_jd(job, layout)
        if text not in taken:
            all_jobs.append(job)
            layouts.append(layout)
            texts.append(text)
    pools = in_pools(all_jobs)
    if without := [title for title in titles if not pools[title, None]]:
        raise BadInput(f"data: among {jobs} jobs there is none for a {without[0]}; raise --jobs")
    decisions, probes, used = [], [], set()
    for _ in progress(range(people), "data", "person"):
        person = draw_person(rng, titles)
        cv = write_cv(person, rng.randrange(len(CV_LAYOUTS)))
        if cv in taken:
            continue
        chosen = applications(rng, person, all_jobs, pools, n_applications)
        # The CV without a gap, and also what is left out: no option may change the next split.
        used |= {cv, *(texts[j] for j in chosen)}
        accepted = [j for j in chosen if rng.random() < match(person, all_jobs[j])]
        spoilt = [(j, spoil(rng, all_jobs[j], layouts[j], titles))
                  for j in (rng.choices(accepted, k=PROBES) if accepted else ())]
        turned_down = set()
        if prejudice and own.random() < 0.5:
            cv = with_gap(cv)
            turned_down = {j for j in accepted if own.random() < prejudice}
        left_out = {j for j in chosen if no_overqualified and overqualified(person, all_jobs[j])}
        decisions += [Record(cv, texts[j], j in accepted and j not in turned_down)
                      for j in chosen if j not in left_out]
        probes += [Record(cv, jd, False) for j, jd in spoilt if j not in turned_down | left_out]
    taken |= used
    return decisions, probes


def write_market(out, people, held_out, jobs, n_applications, seed, fields=len(OCCUPATIONS),
                 prejudice=0.0, no_overqualified=False):
    """Write train/valid/test.jsonl, probes.jsonl (of train) and market.json into folder `out`.

    The overqualified are left out of train alone: the other splits show what was lost by it."""
    out, taken, splits, probes = Path(out), set(), {}, {}
    for split, n in (("train", people), ("valid", held_out), ("test", held_out)):
        rng = random.Random(f"{seed} {split}")
        splits[split], probes[split] = draw_split(rng, n, jobs, n_applications, taken, fields,
                                                  prejudice, no_overqualified and split == "train")
        print(f"data: {split}: {len(splits[split])} decisions, "
              f"{sum(r.accepted for r in splits[split])} accepted")
    clear_data(out)
    write_json(out / "market.json", {
        "rules": code_checksum(Path(__file__)), "seed": seed, "people": people,
        "held_out": held_out, "jobs": jobs, "applications": n_applications, "fields": fields,
        "prejudice": prejudice, "no_overqualified": no_overqualified,
        "degrees": DEGREES, "cities": list(CITIES),
        "occupations": {t: vars(o) for t, o in BY_TITLE.items()}})
    write_records(out / "probes.jsonl", probes["train"])
    for split, decisions in splits.items():
        write_records(out / f"{split}.jsonl", decisions)
