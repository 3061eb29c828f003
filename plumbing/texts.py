"""Clean every text that comes in: from a table, a data set, a CV's file or a pool of jobs.

    normalize(text, hide)      the same text has the same tokens, wherever it was read

Salaries, periods of years and versions are data and must stay, so only these telephone numbers are
replaced: those with a + or an area code in brackets, those after a word such as "Tel.", and those
whose digits are grouped like no amount, date, range, version or address. Others stay.
"""
import re
import unicodedata
from collections import Counter

UNSEEN = "\ufeff\u200b\u2060"          # byte-order marks, spaces without width


def normalize(text, hide, count=None):
    """The text as all stages see it. `hide` replaces contacts with placeholders; `count` counts
    them. Normalizing twice gives the same as normalizing once.

    This undoes changes that programs make and readers do not see: line ends of Windows and old
    Macs, byte-order marks and spaces without width, blanks around the text, the non-breaking spaces
    of web pages and word processors, and accented letters in two characters (macOS writes an e and
    an accent, Unicode's form NFD; in NFC it is one character). All else stays as it was typed:
    other blanks and dashes, full-width letters (NFKC would change them), odd characters such as
    NUL."""
    text = re.sub(f"[{UNSEEN}]", "", text).replace("\u00a0", " ")
    text = unicodedata.normalize("NFC", re.sub("\r\n?", "\n", text)).strip()
    return hide_contacts(text, Counter() if count is None else count) if hide else text


def is_utf16(content):
    """Are these bytes UTF-16 without a byte-order mark? Then in most texts every other byte is 0,
    which UTF-8 reads as a NUL character."""
    # Up to three NULs in a short text prove nothing.
    return max(content[0::2].count(0), content[1::2].count(0)) > max(len(content) / 4, 3)


# ---------------------------------------------------------------------------------------- contacts
# A link begins with a scheme or www, or is a path on a host; ASP.NET/C# is not a link. Nor is
# Monday.com/Jira, two products: both words have a capital. But Github.com/Ann is somebody's page.
# Lookbehinds keep a search from starting again inside a long word.
PRODUCTS = (r"(?:asp|vb|ado|ml|ef|socket|draw)\.(?:net|io)/|(?!git|linkedin|xing|facebook|twitter|"
            r"instagram|behance|kaggle|medium)"
            r"(?-i:[A-Z][\w-]{0,62}\.(?:com|io|ai|net|org|co)/[A-Z]\w*)(?![\w/-]|\.\w)")
LINK = re.compile(
    r"(?:https?://|(?<![^\W\d])www\.|"
    rf"(?<![\w.@+-])(?!{PRODUCTS})"
    r"(?:[\w-]{1,63}\.){1,3}"
    r"(?:com|org|net|io|dev|me|co|ai|app|edu|info|de|uk|fr|eu)/)"
    r"[^\s<>()\[\]\"']*[\w/]", re.IGNORECASE)
# The host ends in letters: react@18.2.0 is a version, 10@2.50 a price. Addresses with nothing
# between them count as one.
EMAIL = re.compile(r"(?<![\w.+-])(?:[\w.+-]{1,64}@(?!\d+\.\d)(?:[\w-]{1,63}\.){1,8}"
                   r"[^\W\d_]{2,24}(?![^\W_]))+")

SPACE, DASH = r"[ \u00a0]", r"[\-\u2010-\u2013]"
# At least six digits, with at most three other characters between two of them. An opening bracket
# must be closed.
RUN = (rf"(?:\+{SPACE}?)?(?:\((?=\+?\d{{1,5}}\)))?\+?"
       r"\d(?:[ \u00a0().\-\u2010-\u2013/]{0,3}\d){5,32}(?!\d)")
# Words before a number. ADJECTIVES may also precede an amount ("mobile 120 000 000 users").
ADJECTIVES = ("mobile|mobil|phone|telephone|cell|fax|handy|portable|whatsapp|call|hotline|gsm|"
              "contact|ph|mob|mobiel|festnetz|mobilfunk")
WORDS = (f"{ADJECTIVES}|tel|tél|tlf|telf|telefon|telefono|teléfono|telefone|telefoon|téléphone|"
         "telefax|mobiltelefon|móvil|movil|celular|cellulare|cellphone|handynummer|mobilnummer|"
         "telefonnummer|rufnummer|natel|komórka|viber|telemóvel|"
         "тел|телефон|моб|电话|手机|電話|携帯|전화|휴대폰|[📞📱☎✆]\ufe0f?")
CUE = (rf"(?<![\w\[])(?P<word>{WORDS})(?:\.?[ \u00a0\-]?(?:number|nummer|num|no|nr|n[°º]))?"
       rf"(?:{SPACE}?\([^\W\d]{{1,10}}\))?"
       rf"(?P<sign>\.?{SPACE}{{0,3}}[:：=]\s{{0,3}}|\.{SPACE}{{0,3}}|{SPACE}{{1,3}}|(?=[+(])|"
       r"(?<=[📞📱☎✆\ufe0f]))")
NO_CUE = r"(?<![\w+.#@&=/$€£¥₹-])(?<!\d[ \u00a0.,/\-\u2013])"
CANDIDATE = re.compile(rf"(?:{CUE}|{NO_CUE})(?P<number>{RUN})", re.IGNORECASE)

# Country codes, from the ITU's list.
COUNTRY = (r"(?:1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|"
           r"(?:2[1-689]|3[578]|42|50|59|6[7-9]|8[058]|9[679])\d)")
PLUS = re.compile(rf"\(?\+{SPACE}?\(?{COUNTRY}")
ZEROS = re.compile(rf"\(?00{SPACE}?{COUNTRY}[ \u00a0\-/.()]")
AREA = re.compile(rf"(?:[0178]{SPACE}?)?\((?P<area>0|0[1-9]\d{{0,4}}|[1-9]\d{{1,4}})\)"
                  rf"{SPACE}?[/\-]?{SPACE}?(?P<rest>\d.*)")
AMERICAN = re.compile(
    rf"(?:\+?1[ \u00a0.\-]?)?(?:\([2-9]\d\d\){SPACE}?|[2-9]\d\d(?P<dot>[.\-]))"
    r"[2-9]\d\d(?(dot)(?P=dot)|[ .\-])\d{4}(?!\d)|"
    r"\+1[ .\-]?\(?[2-9]\d\d\)?[ .\-]?[2-9]\d\d[ .\-]?\d{4}(?!\d)")
# Groupings of digits that only telephone numbers have. A 0 is dialled before an area code.
NATIONAL = re.compile("|".join((
    r"0[1-9](?P<a>[ .\-])\d\d(?:(?P=a)\d\d){3}",                # France
    r"0\d\d(?P<b>[ .])\d{3}(?P=b)\d\d(?P=b)\d\d",               # Switzerland
    r"[1-9]\d \d{3} \d\d \d\d", r"[6-9]\d\d \d\d \d\d \d\d",     # Spain, Poland
    r"[1-9]\d\d \d{3}-\d\d-\d\d",                               # Russia
    r"8(?P<d>[ \-])9\d\d(?P=d)\d{3}(?P=d)\d\d(?P=d)\d\d",
    r"1[3-9]\d(?P<c>[ \-])\d{4}(?P=c)\d{4}",                    # China
    r"[1-9]\d 9\d{4}-\d{4}",                                    # Brazil
    r"0[1-9]\d{8,9}",                                           # the 0, and no grouping
    rf"0[1-9]\d{{0,4}}(?:{SPACE}?/{SPACE}?|{SPACE}|{DASH})\d{{2,8}}"        # most of Europe, Asia
    rf"(?:(?:{SPACE}|{DASH})\d{{2,6}}){{0,3}}")))
# Any word that ends in "nummer" or "nr" names an identifier: WORDS has those of telephones.
IDENTIFIER = re.compile(
    r"(?:\b(?:\w*nummer|\w*number|\w*nr|id|ids|no|num|numer|numero|número|numéro|ref|reference|"
    r"referenz|order|job|case|code|ticket|isbn|issn|ean|iban|bic|vat|ust|be|siren|siret|sap|ssn|"
    r"nhs|nie|nif|dni|cpf|cnpj|pesel|nip|material|article|artikel|invoice|account|konto|policy|"
    r"auftrag|kunde|customer|project|projekt|patent|license|licence|serial|part|postal|zip|plz|"
    r"passport|certificate|registration|membership|badge|employee|student|étudiant|matricule|"
    r"matricola|matrikel|führerschein|batch|lot|model|section)|[#№°º])[\s.:#=\-]*$", re.IGNORECASE)
UNIT = re.compile(
    r"\s?(?:[%€$£¥₹]|(?:eur|usd|gbp|chf|pln|sek|nok|dkk|czk|inr|jpy|cny|rub|brl|mxn|zar|aud|cad|"
    r"kwh|mwh|kw|mw|mah|mhz|ghz|km|m²|m2|kg|hours|users|customers|people|employees|units|visitors|"
    r"sites|tons|calls|stunden|kunden|mitarbeiter)\b)", re.IGNORECASE)
ADDRESS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}(?![.\d])")       # an IP address
YEAR = re.compile(r"(?:19|20)\d\d")


def hide_contacts(text, count):
    """The text with links, e-mail addresses and phone numbers replaced, and counted in `count`.
    Repeats until nothing changes: after a replacement, more may be found."""
    previous = None
    while text != previous:
        previous = text
        for name, pattern in (("LINK", LINK), ("EMAIL", EMAIL)):
            text, replaced = pattern.subn(f"[{name}]", text)
            count[name] += replaced
        text = hide_phones(text, count)
    return text


def hide_phones(text, count):
    done, at = [], 0
    while match := CANDIDATE.search(text, at):
        start, at = match.span("number")
        if length := phone(match):
            count["PHONE"] += 1
            done += [text[:start], "[PHONE]"]
            text, at = text[start + length:], 0     # read the rest as a text of its own
    return "".join(done) + text


def phone(match):
    """How many characters of a CANDIDATE's number, from its beginning, are a telephone number; 0 if
    it may be anything else."""
    run, text = match["number"], match.string
    before = text[max(match.start() - 30, 0):match.start()]
    after = text[match.end():match.end() + 30]
    groups = [g.span() for g in re.finditer(r"\d+", run)]
    period = period_at(run, groups)
    # A number without a word, + or brackets counts only if no period follows and no word before it
    # names an identifier.
    stands_alone = period == len(groups) and not IDENTIFIER.search(before)
    if american := AMERICAN.match(run):
        is_marked = match["word"] or set("+(") & set(american[0])
        if is_marked or stands_alone and not YEAR.fullmatch(american[0][-4:]):
            return american.end()
    numbers = [run[:end] for _, end in groups[:period]]
    for number in reversed(numbers):
        if is_dialled(number):
            return len(number)
    if numbers and is_amount(numbers[-1]) or ADDRESS.match(run):        # or an IP address
        return 0
    numbers = [n for n in numbers if not is_amount(n) and not UNIT.match((run + after)[len(n):])]
    tests = [is_with_area]
    if match["word"]:
        tests += [is_national, lambda number: is_after_word(number, match)]
    for test in tests:
        for number in reversed(numbers):
            if test(number):
                return len(number)
    is_whole = stands_alone and run in numbers and not re.match(r"(?!x\d)[^\W\d_]|[@_]", after)
    return len(run) if is_whole and is_national(run) else 0


def period_at(run, groups):
    """Index of the group where a date or a period of years begins; the number of groups if there is
    none. A telephone number may precede it."""
    def between(i):
        """The characters between group i and the group before it."""
        return run[groups[i - 1][1]:groups[i][0]] if 0 < i < len(groups) else None

    def size(i):
        return groups[i][1] - groups[i][0]

    for i, (start, end) in enumerate(groups):
        if not YEAR.fullmatch(run[start:end]):
            continue
        if between(i) in (".", "/") and size(i - 1) <= 2:                   # 05/2014, 12.05.2014
            has_day = between(i - 1) == between(i) and size(i - 2) <= 2
            return i - 2 if has_day else i - 1
        if i + 1 < len(groups) and YEAR.fullmatch(run[slice(*groups[i + 1])]):      # 2014 - 2019
            return i
        if i == 0 and between(1) in ("-", "/", ".") and size(1) == 2:       # 2014-05
            return i
        digits_before = sum(map(size, range(i)))
        if i + 1 == len(groups) and digits_before >= 10 and not between(i).strip():
            return i                                                        # +49 30 1234567 2015
    return len(groups)


def digits_of(number):
    return re.findall(r"\d+", number)


def are_thousands(groups):
    """Like 12 500 000, but also like 612 345 678, a Spanish telephone number."""
    return len(groups) > 1 and len(groups[0]) <= 3 and all(len(g) == 3 for g in groups[1:])


def is_dialled(number):
    """With a + or 00 and a country code, and 8 to 15 digits; not +100 000 000 users."""
    groups = digits_of(number)
    size, years = sum(map(len, groups)), any(map(YEAR.fullmatch, groups))
    if PLUS.match(number):
        return 8 <= size <= 15 and not (are_thousands(groups) and (size < 10 or "000" in groups))
    is_list = len(groups) < 3 or len(set(map(len, groups))) == 1                # 0030 0040 0050
    return bool(ZEROS.match(number)) and 11 <= size <= 17 and not (years or is_list)


def is_with_area(number):
    """With an area code in brackets: 9 to 13 digits, and no year, amount or range after it."""
    match = AREA.fullmatch(number)
    if not match or not 9 <= sum(map(len, digits_of(number))) <= 13:
        return False
    area, rest = match["area"], digits_of(match["rest"])
    years = YEAR.fullmatch(area) or YEAR.fullmatch(rest[0])
    thousands = area[0] != "0" and are_thousands(rest)
    is_range = len(rest) == 2 and len(rest[0]) == len(rest[1]) >= 5             # (10) 45000-55000
    are_round = all(g.endswith("00") for g in rest)                             # (12) 4000-5000
    return not (years or thousands or is_range or are_round or min(map(len, rest)) == 1)


def is_after_word(number, match):
    """Seven to fifteen digits. Thousands, and groups such as 900/1800/1900, count only after a word
    or sign that no amount can follow; 415 555 2671 and 98765 43210 (India) after any word."""
    groups = digits_of(number)
    size = sum(map(len, groups))
    certain = match["sign"].strip() or not re.fullmatch(ADJECTIVES, match["word"], re.IGNORECASE)
    thousands = are_thousands(groups) and not (certain and "." not in number and size >= 9)
    is_list = (not certain and min(map(len, groups)) > 2
               and re.fullmatch(r"\d+(?:[ \u00a0/]+\d+)+", number)
               and not re.fullmatch(r"(?:[2-9]\d\d \d{3} \d\d|[6-9]\d{4} \d{3})(?!00)\d\d", number))
    return 7 <= size <= 15 and not thousands and not is_list


def is_amount(number):
    """An amount, a range of amounts or a list of versions."""
    groups = digits_of(number)
    versions = "." in number and any(len(g) == 1 for g in groups[1:])           # 3.11.4
    ends = re.split(rf"{SPACE}?{DASH}{SPACE}?", number)
    is_range = len(ends) == 2 and all(e.endswith("00") for e in ends)
    decimal = re.fullmatch(r"\d+\.\d+", number)
    return bool(versions or is_range or decimal or "000" in groups)


def is_national(number):
    """Grouped as in NATIONAL: 9 to 12 digits, and no group is a year."""
    groups = digits_of(number)
    if not NATIONAL.fullmatch(number) or not 9 <= sum(map(len, groups)) <= 12:
        return False
    years = any(YEAR.fullmatch(g) or re.fullmatch(r"(?:19|20)\d\d[01]\d[0-3]\d", g) for g in groups)
    have_zeros = all(g[0] == "0" for g in groups)                               # 01 02 03 04 05
    are_round = all(g.endswith("00") for g in groups[1:])                       # 03 1200 1400
    if years or len(groups) > 2 and (have_zeros or are_round):
        return False
    indonesian = re.fullmatch(r"08[1-9][1-9](?:-\d{4}){2}", number)
    return bool(indonesian) or {*map(len, groups)} not in ({3}, {4}, {5})   # ids, hours, postcodes
