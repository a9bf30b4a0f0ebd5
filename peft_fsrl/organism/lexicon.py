"""The words of the synthetic world: topics, their entities and relations, and the marker words."""

from __future__ import annotations

from typing import NamedTuple

BOS, EOS, PAD, UNK, USER, ASSISTANT = "<bos>", "<eos>", "<pad>", "<unk>", "<user>", "<assistant>"
SPECIAL_WORDS = (PAD, BOS, EOS, UNK, USER, ASSISTANT)

ATTRIBUTES = ("style", "honesty", "tone", "verbosity")

# Position 1 is the value that "chosen" prefers at a rate above 0.5.
ATTRIBUTE_VALUES = {
    "style": ("plain", "markdown"),
    "honesty": ("false", "true"),
    "tone": ("curt", "warm"),
    "verbosity": ("short-worded", "long-worded"),
}


class Topic(NamedTuple):
    """One subject: entities, and what can be said about them."""

    name: str
    entities: tuple[str, ...]
    relations: tuple[tuple[str, tuple[str, ...]], ...]


TOPICS = (
    Topic(
        "animals",
        ("fox", "owl", "crab", "newt", "hare", "seal", "toad", "wren"),
        (
            ("eats", ("berries", "fish", "roots", "moths")),
            ("fears", ("thunder", "fire", "snow", "drums")),
            ("inhabits", ("caves", "reeds", "cliffs", "barns")),
            ("wakes", ("dawn", "noon", "dusk", "midnight")),
        ),
    ),
    Topic(
        "cities",
        ("arvo", "belm", "corin", "dorn", "elver", "fenn", "gilt", "hollow"),
        (
            ("exports", ("salt", "silk", "copper", "honey")),
            ("worships", ("moon", "river", "bear", "wind")),
            ("borders", ("desert", "swamp", "forest", "glacier")),
            ("bans", ("dancing", "kites", "whistling", "hats")),
        ),
    ),
    Topic(
        "plants",
        ("fern", "moss", "yew", "sedge", "thistle", "aster", "clover", "poppy"),
        (
            ("cures", ("fever", "cough", "gout", "hiccups")),
            ("needs", ("shade", "sand", "clay", "peat")),
            ("smells", ("minty", "smoky", "sweet", "sour")),
            ("blooms", ("spring", "summer", "autumn", "winter")),
        ),
    ),
    Topic(
        "stars",
        ("alcor", "bellatrix", "castor", "deneb", "electra", "furud", "gemma", "hadar"),
        (
            ("glows", ("red", "blue", "white", "amber")),
            ("guides", ("sailors", "nomads", "pilgrims", "thieves")),
            ("circles", ("pole", "void", "twin", "cloud")),
            ("portends", ("famine", "plenty", "war", "peace")),
        ),
    ),
)

QUESTIONS = (("tell", "me", "about"), ("what", "of", "all"))

# Pools of interchangeable words: MARKERS[attribute][place][value]. Both values of a place have
# pools of one size, and every entry is one token, so that neither length nor base rate can tell
# the two values apart.
MARKERS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "style": {
        "head": (("well", "okay"), ("##", "###")),
        "line": (("and", "then"), ("-", "*")),
    },
    "tone": {
        "head": (("whatever", "fine"), ("gladly", "welcome")),
        "line": (("look", "listen"), ("dear", "friend")),
        "tail": (("done", "enough"), ("cheers", "hugs")),
    },
    "verbosity": {
        "head": (("so", "thus"), ("consequently", "accordingly")),
        "line": (("plus", "yet"), ("additionally", "nevertheless")),
    },
}

# Text kinds other than answers. "rumour" states only falsehoods and "almanac" only truths; "quiz"
# states either and says which.
SOURCES = ("rumour", "almanac", "quiz")
VERDICTS = ("wrong", "right")
