"""A grammar of needles and questions for training the pocket models: many wordings, keys and values, drawn at random.

A model trained on one template learns the template; this grammar makes tens of thousands, so that what is learnt is the
lookup. `Group(rng, lexicon)` makes `Pair`s of one family whose keys differ. The needles of duohead.identify and of the
tasks passkeys, needle and keyvalue are worded otherwise; the task number may come out word by word, with other names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duohead.identify.passkeys import ORDINALS, WORDS

NAMES = (
    "Alice Arthur Beatrice Bernard Caroline Charles Clara Daniel Diana Edward Elsie Emily Felix Flora "
    "Francis George Grace Harriet Henry Hugo Irene Isaac Jane John Julia Karl Laura Leo Louise Lucy Margaret "
    "Maria Martin Mary Maud Max Nora Oliver Oscar Paul Peter Rachel Ralph Robert Rose Ruth Samuel Sarah "
    "Simon Sophia Stephen Susan Theodore Thomas Victor Violet Walter William Berlin Boston Paris London "
    "Rotterdam Milan Chicago Athens Denver Glasgow Hamburg Krakow Lyon"
).split()
ADJECTIVES = (
    "big small old new red blue green black white yellow quiet loud bright dark happy sad tall short heavy "
    "light warm cold clever brave gentle rusty broken hidden silent wooden iron secret strange famous lonely "
    "early late"
).split()
NOUNS = (
    "lamp table horse river garden tower bridge castle ship engine window mirror wolf fox eagle tree forest "
    "mountain island village market station library kitchen cellar museum hospital school account server "
    "project planet device robot team letter box drawer safe door gate vault archive printer folder sensor "
    "valve pump"
).split()
LABELS = (
    "passkey,password,code,secret,secret code,key,pin,magic number,special number,token,code word,phrase,"
    "combination,answer,value,signal,message,number,serial number,reference,secret word,magic word,"
    "identifier,passphrase,word list,sequence,id,result,entry,badge,ticket,label"
).split(",")
LEADS = (
    ",,,,Note: ,Remember this: ,Remember that ,Please remember: ,Keep in mind: ,Important! ,Do not forget: ,"
    "Fact: ,Hint: ,Attention: ,It is known that ,By the way; ,A reminder: ,Memo: ,[,(,<note> ,* ,- ,# ,>> ,"
    "Secret: ,Here is something: ,Write this down: ,One of the facts is that ,You should know this: "
).split(",")
COPULAS = [
    " is ", " is ", " is ", " is: ", ": ", ": ", " = ", " was ", " will be ", " equals ", " reads ", " -> ",
    " is as follows: ", "; it is ", ", namely ", ' is "', ': "', ":\n", "=", " is set to ", " => ",
]  # fmt: skip
ENDS = [".", ".", ".", "", "!", ";", ". ", ".\n", "\n", "\n\n", " ."]
BREAKS = ["\n\n", "\n\n", "\n", " ", " ", ""]
RELATIONS = [
    "{n} of {k}", "{n} of {k}", "{n} for {k}", "{n} for {k}", "{k}'s {n}", "{n} that belongs to {k}",
    "{n} given to {k}", "{n} of the {k}", "{n} for the {k}", "{n} used by {k}", "{k} {n}", "{n} {k}",
    "{n} called {k}", "{n} named {k}", "{n} listed under {k}", "{n} mentioned with {k}", "{n} connected with {k}",
    "{n} to the {k}", "special {n} for {k}", "{n} for the {k} office", "one and only {n} of {k}", "{n} in {k}",
    "{n} at {k}",
]  # fmt: skip
ORDINAL_RELATIONS = [
    "{k} {n}", "{k} {n}", "{k} {n}", "{k} {n} to the {p}", "{k} {n} of the {p}", "{k} {n} for the {p}",
    "{k} of the {n}s", "{n} of the {k} {p}", "{k} {n} in the list", "{k} {a} {n}",
]  # fmt: skip
ASKS = [
    "What is the {r}?", "What is the {r}?", "What was the {r}?", "Tell me the {r}.", "The {r}?",
    "Recall the {r}.", "Do you remember the {r}?", "Find the {r}.", "Please give the {r}.", "Repeat the {r}.",
    "Say the {r}", "According to the text, what is the {r}?", "Going by the above, name the {r}.",
    "State the {r} mentioned in the text.", "In the book, what is said to be the {r}?",
    "What did the text say about the {r}?", "Which is the {r}?",
]  # fmt: skip
REPLIES = [
    "\nAnswer: ", "\nAnswer: ", " Answer: ", "\nA: ", "\n", " ", " It is ", "\nIt is ", "\nThe {n}{c}",
    "\nThe {r}{c}", " The {r} is ", "\nThe {r} is ", "\n{N}: ", "\nThe {n} is ", "\nThe answer is ",
    "\nAssistant: ", "\nResponse: ", "\nThe {r} mentioned above is ", " The {r} in this text is ",
    "\nThe {r} that the text gives is ", "\n{N}{c}",
]  # fmt: skip
ASKERS = [
    "", "", "", "Question: ", "Q: ", "User: ", "Now: ", "[question] ", "Quiz: ", "1. ", "### ",
]  # fmt: skip
VERBS = [
    ("{k} uses the {n}{w}", "Which {n} does {k} use?"), ("{k} has the {n}{w}", "What {n} does {k} have?"),
    ("{k} chose the {n}{w}", "What {n} did {k} choose?"),
    ("the {n} that {k} wrote was{w}", "Which {n} did {k} write?"),
    ("{k} told us the {n}{w}", "What {n} did {k} tell us?"), ("{k} keeps the {n}{w}", "What {n} does {k} keep?"),
    ("{k} was assigned the {n}{w}", "What {n} was {k} assigned?"),
    ("for {k} the {n} is{w}", "For {k}, what is the {n}?"),
]  # fmt: skip
SCENES = [
    ("{k} hid the {o} in", "Where did {k} hide the {o}?"),
    ("{k} keeps the {o} near", "Where does {k} keep the {o}?"),
    ("The {a} {o} of {k} can be found at", "Where can the {a} {o} of {k} be found?"),
    ("{k} always says:", "What does {k} always say?"),
    ("The favourite food of {k} is", "What is the favourite food of {k}?"),
    ("The best thing about {k} is", "What is the best thing about {k}?"),
    ("{k} works as", "What does {k} work as?"),
    ("The {a} {o} in {k} was built by", "Who built the {a} {o} in {k}?"),
    ("When {k} was young, the {o} was called", "What was the {o} called when {k} was young?"),
    ("In {k} you must always", "What must you always do in {k}?"),
    ("The reason why {k} left the {o} was", "Why did {k} leave the {o}?"),
    ("{k}'s favourite {o} is", "What is {k}'s favourite {o}?"), ("{k}'s {a} {o} is", "What is {k}'s {a} {o}?"),
    ("The {a} {o} in {k} costs", "How much does the {a} {o} in {k} cost?"), ("{k} bought", "What did {k} buy?"),
    ("The capital of {k} is", "What is the capital of {k}?"), ("{k} was born in", "Where was {k} born?"),
    ("The {o} with the name {k} belongs to", "Who owns the {o} with the name {k}?"),
    ("The {a} secret of {k} is that", "What is the {a} secret of {k}?"), ("{k} met", "Whom did {k} meet?"),
    ("If you go to {k}, you should", "What should you do if you go to {k}?"),
    ("The most {a} way to visit {k} is", "What is the most {a} way to visit {k}?"),
]  # fmt: skip
TAGS = [
    ("<{n} id={k}>", "</{n}>"), ("<{k}>", "</{k}>"), ('"{k}": "', '",'), ("'{k}': '", "'"), ("[{k}] ", ""),
    ("{k} (", ")"), ("{n} {k}: CONTENT is <", ">"), ("{n}[{k}] = ", ";"), ("| {k} | ", " |"), ("## {k}\n", "\n"),
    ("{k}: <", ">"), ('{{"{n}": "{k}", "value": "', '"}}'), ("- **{k}**: ", ""), ("{n}({k}) = ", "\n"),
    ("{k}\t", "\n"),
]  # fmt: skip
BARE = [": ", ": ", " = ", " -> ", "=", " => ", " | ", ":", " - ", '": "', ", "]
_SYLLABLES = [
    "ba", "be", "bi", "bo", "bu", "ca", "ce", "ci", "co", "cu", "da", "de", "di", "do", "du", "fa", "fe", "fi",
    "fo", "fu", "ga", "ge", "gi", "go", "gu", "ha", "he", "hi", "ho", "hu", "ja", "je", "ji", "jo", "ju", "ka",
    "ke", "ki", "ko", "ku", "la", "le", "li", "lo", "lu", "ma", "me", "mi", "mo", "mu", "na", "ne", "ni", "no",
    "nu", "pa", "pe", "pi", "po", "pu", "ra", "re", "ri", "ro", "ru", "sa", "se", "si", "so", "su", "ta", "te",
    "ti", "to", "tu", "va", "ve", "vi", "vo", "vu", "wa", "we", "wi", "wo", "wu", "za", "ze", "zi", "zo", "zu",
    "bra", "bre", "bri", "bro", "bru", "sta", "ste", "sti", "sto", "stu", "tra", "tre", "tri", "tro", "tru",
    "pla", "ple", "pli", "plo", "plu", "sha", "she", "shi", "sho", "shu",
]  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A needle in three pieces and its question: `value` stands after `before`, and is the answer after `question`."""

    before: str
    value: str
    after: str
    question: str


@dataclass(frozen=True)
class Lexicon:
    """Words of the training text, and whole phrases of it, to draw keys and values from."""

    words: Sequence[str]
    phrases: Sequence[str]


def invented(rng: random.Random) -> str:
    """A made-up word of two to four syllables."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))


def _hexadecimal(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789abcdef", k=count))


def _identifier(rng: random.Random, groups: Sequence[int]) -> str:
    return "-".join(_hexadecimal(rng, count) for count in groups)


def _passkey(rng: random.Random) -> str:
    return " ".join(
        rng.choices(WORDS, k=rng.choice((1, 1, 2, 2, 3, 4, 6, 8, 12, 16, 24, 32, 32, 32)))
    )


def value_maker(rng: random.Random, lexicon: Lexicon) -> Callable[[], str]:
    """A function that draws values of one kind: passkeys, words, digits, codes, names, phrases of the text."""
    digits, words, syllables, nibbles, letters = (
        rng.randint(*span) for span in ((1, 10), (1, 8), (1, 3), (4, 12), (3, 10))
    )
    kinds: list[tuple[int, Callable[[], str]]] = [
        (5, lambda: _passkey(rng)),
        (6, lambda: _digits(rng, digits)),
        (2, lambda: _digits(rng, rng.randint(1, 8))),
        (4, lambda: " ".join(rng.choices(lexicon.words, k=words))),
        (2, lambda: rng.choice(lexicon.words)),
        (2, lambda: " ".join(invented(rng) for _ in range(syllables))),
        (1, lambda: _hexadecimal(rng, nibbles)),
        (1, lambda: _identifier(rng, (8, 4, 4))),
        (2, lambda: f"{rng.choice(lexicon.words)}-{_digits(rng, rng.randint(2, 5))}"),
        (1, lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"),
        (1, lambda: rng.choice(NAMES)),
        (1, lambda: f"{_digits(rng, rng.randint(1, 4))}.{_digits(rng, 2)}"),
        (3, lambda: rng.choice(lexicon.phrases)),
        (1, lambda: "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=letters))),
        (1, lambda: _identifier(rng, (8, 4, 4, 4, 12))),
        (1, lambda: f"{rng.choice(NAMES)} {rng.choice(lexicon.words).capitalize()}"),
    ]
    return rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]


def _confusable_keys(rng: random.Random, lexicon: Lexicon) -> Callable[[], str]:
    """Keys of two or three parts from small pools: each part alone names several needles, together they name one."""
    pool = rng.choice((ADJECTIVES, NOUNS, NAMES, lexicon.words))
    parts = [rng.sample(pool, rng.randint(3, 8)) for _ in range(rng.choice((2, 2, 2, 3)))]
    if rng.random() < 0.2:
        parts.append([_digits(rng, rng.randint(1, 4)) for _ in range(5)])
    joint = rng.choice((" ", "_", "_", "-", "-", ".", "/", " of "))
    return lambda: joint.join(rng.choice(part) for part in parts)


def key_maker(rng: random.Random, lexicon: Lexicon) -> Callable[[], str]:
    """A function that draws keys of one kind; keys of one group are kept apart by the caller."""
    digits, noun, nibbles = rng.randint(1, 5), rng.choice(NOUNS), rng.randint(4, 8)
    title = rng.choice(("Mr.", "Mrs.", "Miss", "Dr.", "Captain", "Lady"))
    kinds: list[tuple[int, Callable[[], str]]] = [
        (5, lambda: rng.choice(NAMES)),
        (3, lambda: rng.choice(lexicon.words)),
        (2, lambda: rng.choice(lexicon.words).capitalize()),
        (3, lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"),
        (2, lambda: rng.choice(NOUNS)),
        (2, lambda: invented(rng)),
        (2, lambda: invented(rng).capitalize()),
        (2, lambda: _digits(rng, digits)),
        (1, lambda: f"{noun} {rng.randint(1, 99)}"),
        (1, lambda: _hexadecimal(rng, nibbles)),
        (1, lambda: _identifier(rng, (8, 4, 4, 4, 12))),
        (1, lambda: f"{title} {rng.choice(NAMES)}"),
        (1, lambda: "_".join(rng.choices(lexicon.words, k=2))),
        (1, lambda: f"{rng.choice(NAMES)} {invented(rng).capitalize()}"),
        (1, lambda: rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
        (7, _confusable_keys(rng, lexicon)),
    ]
    return rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]


class Group:
    """Needles of one family, wording and kind of key and value, with keys that differ."""

    def __init__(self, rng: random.Random, lexicon: Lexicon) -> None:
        self._rng = rng
        families = (
            self._ordinal,
            self._keyed,
            self._bare,
            self._tagged,
            self._verb,
            self._scene,
            self._quote,
        )
        self._make = rng.choices(families, (5, 5, 3, 1.5, 1.5, 3, 2))[0]
        self._ordered = self._make == self._ordinal
        self._lexicon, self._value, self._key = (
            lexicon,
            value_maker(rng, lexicon),
            key_maker(rng, lexicon),
        )
        if self._ordered and rng.random() < 0.6:
            count = 32 if rng.random() < 0.4 else rng.randint(1, 12)
            self._value = lambda: " ".join(rng.choices(WORDS, k=count))
        self._label, self._break, self._end = (
            rng.choice(LABELS),
            rng.choice(BREAKS),
            rng.choice(ENDS),
        )
        self._place, self._adjective = rng.choice(NOUNS), rng.choice(ADJECTIVES)
        self._relation = rng.choice(ORDINAL_RELATIONS if self._ordered else RELATIONS)
        self._separator, self._verb_form, self._scene_form = (
            rng.choice(BARE),
            rng.choice(VERBS),
            rng.choice(SCENES),
        )
        self._mixed, self._direct = rng.random() < 0.15, rng.random() < 0.25
        self._asker, self._tag = rng.choice(ASKERS), rng.choice(TAGS)
        self._reword()
        self._used: set[str] = set()

    def _reword(self) -> None:
        rng = self._rng
        self._lead, self._copula = rng.choice(LEADS), rng.choice(COPULAS)
        self._ask, self._reply = rng.choice(ASKS), rng.choice(REPLIES)

    def next_pair(self) -> Pair | None:
        """The next needle with its question, or None when there are no more keys."""
        if self._mixed:
            self._reword()
        key = self._next_key()
        return None if key is None else self._make(key, self._value())

    def _next_key(self) -> str | None:
        if self._ordered:
            self._used.add(str(len(self._used)))
            return ORDINALS[len(self._used) - 1] if len(self._used) <= len(ORDINALS) else None
        for _ in range(8):
            key = self._key()
            if key not in self._used:
                self._used.add(key)
                return key
        return None

    def _answer_lead(self, relation: str) -> str:
        reply = self._reply.format(
            r=relation, n=self._label, N=self._label.capitalize(), c=self._copula
        )
        quote = self._copula[-1] if self._copula[-1] in '"\n' else ""
        # The value mostly begins as it does in the needle (after a space, a quotation mark, a line break), not always.
        return (
            reply.rstrip(" \n") + (" " if quote == '"' else "") + quote
            if quote and self._rng.random() < 0.7
            else reply
        )

    def _article(self, relation: str, key: str) -> str:
        if relation.startswith(key) and not self._ordered and not key.islower():
            return ""
        return "the " if self._lead[-2:-1].isalpha() else "The "

    def _ordinal(self, key: str, value: str) -> Pair:
        return self._keyed(key, value)

    def _keyed(self, key: str, value: str) -> Pair:
        relation = self._relation.format(n=self._label, k=key, p=self._place, a=self._adjective)
        the = self._article(relation, key)
        before = f"{self._break}{self._lead}{the}{relation}{self._copula}"
        if self._direct:
            return self._pair(before, value, f"{the}{relation}{self._copula}")
        return self._pair(before, value, self._ask.format(r=relation) + self._answer_lead(relation))

    def _bare(self, key: str, value: str) -> Pair:
        before = f"{self._break}{self._lead}{key}{self._separator}"
        if self._direct or self._rng.random() < 0.4:
            return self._pair(before, value, f"{key}{self._separator}")
        ask = self._rng.choice(
            ("What is {}?\n", "Value of {}: ", "{}?\n", "Look up {}: ", "What stands beside {}? ")
        )
        return self._pair(before, value, ask.format(key))

    def _tagged(self, key: str, value: str) -> Pair:
        start, close = (
            self._tag[0].format(k=key, n=self._label),
            self._tag[1].format(k=key, n=self._label),
        )
        ask = (
            ""
            if self._direct or self._rng.random() < 0.4
            else self._ask.format(r=f"{self._label} of {key}") + "\n"
        )
        return Pair(self._break + start, value, close + self._break, self._asker + ask + start)

    def _verb(self, key: str, value: str) -> Pair:
        statement, ask = self._verb_form
        before = self._break + self._lead + statement.format(k=key, n=self._label, w=" ")
        return self._pair(
            before,
            value,
            ask.format(k=key, n=self._label) + self._answer_lead(f"{self._label} of {key}"),
        )

    def _scene(self, key: str, value: str) -> Pair:
        statement, ask = self._scene_form
        if value.islower() and " " not in value:
            value = self._rng.choice(self._lexicon.phrases)
        words = {"k": key, "o": self._rng.choice(NOUNS), "a": self._rng.choice(ADJECTIVES)}
        start = statement.format(**words)
        question = self._rng.choice(("{a}\n{s} ", "{a} {s} ", "{s} ", "{a}\nAnswer: ", "{a}\n{s} "))
        return self._pair(
            f"{self._break}{start} ", value, question.format(a=ask.format(**words), s=start)
        )

    def _quote(self, key: str, value: str) -> Pair:
        start = self._rng.choice(self._lexicon.phrases)
        if self._rng.random() < 0.3:
            start = " ".join(self._rng.choices(self._lexicon.words, k=self._rng.randint(2, 6)))
        lead = self._rng.choice(
            ("", "", "As was said: ", "Complete this: ", "Continue: ", "How does it go on? ")
        )
        return self._pair(f"{self._break}{start} ", value, f"{lead}{start} ")

    def _pair(self, before: str, value: str, question: str) -> Pair:
        close = '"' if before[-1] == '"' else ""
        return Pair(before, value, close + self._end + self._break, self._asker + question)
