"""Plain facts for the demo's preference set, in families that are asked about in one way.

`SHORT_FAMILIES` have an answer of a word or two; the open questions are in `questions`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Fact = tuple[str, str]
Facts = tuple[Fact, ...]

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Family:
    """Facts of one kind, and the words around them.

    Every template may hold {key}, {value} and, with the first letter in upper case, {Key} and {Value}.
    """

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]  # the concise ones; the last is a whole sentence
    more: tuple[str, ...]  # true, and not asked for
    facts: Facts

    @property
    def stands_alone(self) -> bool:
        """Whether the whole sentence says what it is about, so that it makes sense without the question."""
        return "{key}" in self.answers[-1].lower()

    def sentence(self, fact: Fact) -> str:
        return fill(self.answers[-1], fact)

    def clause(self, fact: Fact) -> str:
        """The sentence as it reads in the middle of another one."""
        template = self.answers[-1].replace("{Key}", "{key}").replace("{Value}", "{value}")
        return fill(template[0].lower() + template[1:], fact)


def fill(template: str, fact: Fact) -> str:
    key, value = fact
    return template.format(key=key, value=value, Key=key[0].upper() + key[1:], Value=value[0].upper() + value[1:])


def table(text: str) -> Facts:
    """Read the entries of a table: `key: value`, one a line or with semicolons between them."""
    entries = (entry.partition(": ") for entry in re.split(r"[;\n]", text) if entry.strip())
    return tuple((key.strip(), value.strip()) for key, _, value in entries)


def _sums() -> Facts:
    signs = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    pairs = [(first, second) for first in (3, 6, 8, 14, 25) for second in (2, 4, 7) if first > second]
    return tuple((f"{a} {sign} {b}", str(apply(a, b))) for a, b in pairs for sign, apply in signs.items())


def _neighbours() -> Facts:
    following = [(f"the day after {first}", second) for first, second in zip(DAYS, DAYS[1:], strict=False)]
    for first, second in zip(MONTHS, MONTHS[1:], strict=False):
        following += [(f"the month after {first}", second), (f"the month before {second}", first)]
    return tuple(following)


SHORT_FAMILIES = (
    Family(
        "capitals",
        ("What is the capital of {key}?", "Which city is the capital of {key}?", "Name the capital of {key}."),
        ("{value}.", "The capital of {key} is {value}."),
        (
            "{value} is a well-known city, and as the capital it plays a central part in the life of {key}.",
            "A capital is usually the place where the government of a country has its seat.",
        ),
        table("""
            Peru: Lima; Norway: Oslo; Japan: Tokyo; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Greece: Athens
            Austria: Vienna; Poland: Warsaw; Hungary: Budapest; Sweden: Stockholm; Finland: Helsinki; Ireland: Dublin
            Egypt: Cairo; Kenya: Nairobi; Ghana: Accra; Cuba: Havana; Chile: Santiago; Canada: Ottawa
            India: New Delhi; China: Beijing; Thailand: Bangkok; Vietnam: Hanoi; Denmark: Copenhagen
            Belgium: Brussels; Turkey: Ankara; Argentina: Buenos Aires; Colombia: Bogotá; Iceland: Reykjavík
            Mongolia: Ulaanbaatar; Nepal: Kathmandu; Romania: Bucharest; Bulgaria: Sofia; Croatia: Zagreb
            Morocco: Rabat; Australia: Canberra
        """),
    ),
    Family(
        "symbols",
        ("What is the chemical symbol of {key}?", "Which chemical symbol stands for {key}?"),
        ("{value}", "The chemical symbol of {key} is {value}."),
        (
            "Chemical symbols are used by scientists all over the world to write the elements in a short form.",
            "You can find {key} in the periodic table, together with all the other elements.",
        ),
        table("""
            gold: Au; silver: Ag; iron: Fe; copper: Cu; oxygen: O; hydrogen: H; carbon: C; nitrogen: N; helium: He
            sodium: Na; potassium: K; calcium: Ca; zinc: Zn; tin: Sn; lead: Pb; neon: Ne; sulphur: S; mercury: Hg
        """),
    ),
    Family(
        "babies",
        ("What do you call a young {key}?", "What is a baby {key} called?"),
        ("A {value}.", "A young {key} is called a {value}."),
        ("Many young animals have a name of their own, and the {key} is one of them.",),
        table("""
            cow: calf; dog: puppy; cat: kitten; sheep: lamb; goat: kid; horse: foal; duck: duckling; goose: gosling
            pig: piglet; frog: tadpole; bear: cub; deer: fawn; swan: cygnet; kangaroo: joey; hare: leveret
        """),
    ),
    Family(
        "opposites",
        ("What is the opposite of {key}?", "Give me the opposite of the word {key}."),
        ("{Value}.", "The opposite of {key} is {value}."),
        (
            "Words with opposite meanings are also called antonyms, and there are a great many of them.",
            "Both {key} and {value} are words that people use very often in everyday speech.",
        ),
        table("""
            hot: cold; big: small; tall: short; fast: slow; early: late; full: empty; open: closed; light: dark
            heavy: light; wet: dry; hard: soft; loud: quiet; rich: poor; young: old; happy: sad; near: far; up: down
            inside: outside; strong: weak; clean: dirty; thick: thin; deep: shallow; wide: narrow; rough: smooth
            sharp: blunt; cheap: expensive; brave: cowardly; polite: rude; ancient: modern; arrive: depart
        """),
    ),
    Family(
        "plurals",
        ("What is the plural of {key}?", "How do you write the plural of {key}?"),
        ("{Value}.", "The plural of {key} is {value}."),
        ("Many English words simply take the letter s in the plural, while others follow rules of their own.",),
        table("""
            mouse: mice; child: children; tooth: teeth; foot: feet; goose: geese; knife: knives; leaf: leaves
            wolf: wolves; city: cities; box: boxes; baby: babies; shelf: shelves; potato: potatoes; ox: oxen
            person: people
        """),
    ),
    Family(
        "past",
        ("What is the past tense of {key}?", "Put the verb {key} into the past tense."),
        ("{Value}.", "The past tense of {key} is {value}."),
        ("English has regular verbs and irregular verbs, and it takes some practice to learn all of them.",),
        table("""
            go: went; eat: ate; see: saw; take: took; give: gave; write: wrote; run: ran; sing: sang; buy: bought
            think: thought; find: found; fly: flew; know: knew; sleep: slept; break: broke; swim: swam; teach: taught
        """),
    ),
    Family(
        "money",
        ("What is the currency of {key}?", "Which money do people use in {key}?"),
        ("The {value}.", "The currency of {key} is the {value}."),
        ("When you travel to {key}, it is a good idea to look up the exchange rate before you leave.",),
        table("""
            Japan: yen; India: rupee; Mexico: peso; China: yuan; Russia: rouble; Germany: euro
            Switzerland: Swiss franc; Thailand: baht; South Korea: won; Brazil: real; South Africa: rand
            Israel: shekel; Norway: Norwegian krone
        """),
    ),
    Family(
        "makers",
        ("Who {key}?", "Can you tell me who {key}?"),
        ("{Value}.", "{Value} {key}."),
        ("People all over the world have heard of {value}, and many books tell the whole story.",),
        table("""
            invented dynamite: Alfred Nobel; wrote Hamlet: William Shakespeare
            painted the Mona Lisa: Leonardo da Vinci; discovered penicillin: Alexander Fleming
            wrote Don Quixote: Miguel de Cervantes; discovered radium: Marie Curie
            painted The Starry Night: Vincent van Gogh; wrote The Odyssey: Homer; wrote War and Peace: Leo Tolstoy
            composed The Four Seasons: Antonio Vivaldi; wrote Oliver Twist: Charles Dickens; wrote Faust: Goethe
            built the first successful aeroplane: the Wright brothers; wrote Emma: Jane Austen
        """),
    ),
    Family(
        "units",
        ("How many {key}?", "Quick question: how many {key}?"),
        ("{Value}.", "The answer is {value}."),
        ("Numbers like this one come up again and again when people measure and count things.",),
        table("""
            centimetres are in a metre: 100; minutes are in an hour: 60; hours are in a day: 24
            days are in a week: seven; months are in a year: 12; grams are in a kilogram: 1000
            seconds are in a minute: 60; years are in a century: 100; legs does a spider have: eight
            legs does an insect have: six; sides does a triangle have: three; sides does a hexagon have: six
            wheels does a bicycle have: two; strings does a violin have: four; letters are in the English alphabet: 26
            players are in a football team: 11; cards are in a full suit: 13
        """),
    ),
    Family(
        "sums",
        ("What is {key}?", "Please work out {key}."),
        ("{value}.", "{Key} is {value}."),
        ("You can check such a result by hand, with a calculator, or by counting things one by one.",),
        _sums(),
    ),
    Family(
        "calendar",
        ("What is {key}?", "Name {key}."),
        ("{value}.", "{Key} is {value}."),
        ("The calendar puts the days and months in a fixed order, which most people learn as children.",),
        _neighbours(),
    ),
    Family(
        "colours",
        ("What colour is {key}?", "Which colour does {key} have?"),
        ("{Value}.", "{Key} is {value}."),
        ("Colours can look a little different depending on the light, so there is some room for variety.",),
        table("""
            a ripe banana: yellow; fresh grass: green; fresh snow: white; a ripe strawberry: red; coal: black
            a carrot: orange; a ruby: red; an emerald: green; milk: white; chocolate: brown; a sapphire: blue
            the yolk of an egg: yellow; a polar bear: white; a lime: green
        """),
    ),
)
