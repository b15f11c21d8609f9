"""Training sequences for the pocket models: prose with needles woven in and questions after them, made by CPU workers.

Lookup is learnt only under dense supervision, so a sequence holds many needles and questions, and every token has a
class (`IGNORE`, `PROSE`, `FIRST`, `REST`) by which the loss weighs it. `Batches` is a torch dataset whose item is a
whole batch; it depends on the seed, the step and the progress of training (its curriculum) alone.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from duohead.identify.passkeys import ORDINALS, WORDS
from tools.pocket_formats import LABELS, NAMES, Group, Lexicon, Pair

IGNORE, PROSE, FIRST, REST = range(4)
INTROS = (
    "", "", "", "Here is a book. Read it with care.\n\n",
    "This is a very long story. Pay attention to the details.\n\n",
    "Read the following text and answer the questions about it.\n\nText: ", "<text>\n", "Document:\n", "User: ",
    "Somewhere below are facts that will be asked for; the rest does not matter.\n\n", "[INST] ",
)  # fmt: skip
OUTROS = (
    "\n\n", "\n\n", "\n", " ", "\n\nThat was the book.\n\n", "</text>\n\n", "\n\nQuestions:\n\n", "\n\n---\n\n",
    "...\n\n", "\n\nNow answer the questions.\n\n",
    "\n\nEnd of document.\n\n", " [/INST] ", "\n\nBased on the above, answer:\n",
)  # fmt: skip
STOPS = (".\n\n", ".\n\n", "\n", "\n\n", ". ", " ", ".\n", "; ", "<end>\n")
# Tokens, and the class of each
Labelled = tuple[list[int], list[int]]
# The pre-tokeniser's own boundaries, or coarser: no token crosses them.
_CHUNKS = re.compile(r"\d| ?[^\s\d]+|\s+(?![^\s\d])|\s+")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE whose digits are tokens of their own and whose passkey words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    common = [f"{word} {word}" for word in (*WORDS, *ORDINALS, *LABELS)] * 2000
    tokenizer.train_from_iterator([*texts, *common, *(f" {name}" for name in NAMES * 500)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def lexicon_of(text: str) -> Lexicon:
    """Words that occur at least five times in `text`, and phrases of three to fifteen words."""
    counts = Counter(re.findall(r"\b[a-z]{3,}\b", text))
    words = [word for word, count in counts.most_common(6000) if count >= 5] or ["word", "other"]
    runs = re.findall(r"\b[A-Za-z][a-z]*(?: [a-z]+,?){2,14}", text[:4_000_000])
    return Lexicon(words, [run.rstrip(",") for run in runs[:60000]] or ["a phrase of words"])


class Weaver:
    """Makes single training sequences from the tokens of the text, the lexicon and the grammar of formats."""

    def __init__(self, tokenizer: Tokenizer, corpora: list[np.ndarray], lexicon: Lexicon) -> None:
        self._tokenizer, self._corpora, self._lexicon = tokenizer, corpora, lexicon
        self._sizes = [len(corpus) for corpus in corpora]
        self._bos = tokenizer.encode("").ids[0]
        self._blank = tokenizer.encode(" ", add_special_tokens=False).ids[0]
        self._chunk = lru_cache(maxsize=200_000)(self._encode_chunk)

    def _encode_chunk(self, chunk: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(chunk, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, the same as the tokenizer's, from a cache of its words."""
        return [token for chunk in _CHUNKS.findall(text) for token in self._chunk(chunk)]

    def _joined(self, before: str, value: str, apart: bool) -> tuple[list[int], list[int]]:
        """Tokens of both parts as if tokenised together: a space between them belongs to the value, unless `apart`."""
        if before.endswith(" ") and not apart:
            before, value = before[:-1], " " + value
        return self.encode(before), self.encode(value)

    def _needle(self, pair: Pair, apart: bool) -> list[int]:
        before, value = self._joined(pair.before, pair.value, apart)
        return before + value + self.encode(pair.after)

    def _question(self, pair: Pair, stop: list[int], apart: bool) -> Labelled:
        before, value = self._joined(pair.question, pair.value, apart)
        # A space that is a token of its own (before digits) says nothing about the value.
        blank = int(len(value) > 1 and value[0] == self._blank)
        classes = [IGNORE] * len(before) + [REST] * len(value)
        classes[len(before) + blank] = FIRST
        return before + value + stop, classes + [REST] + [IGNORE] * (len(stop) - 1)

    def _tokens_pair(self, rng: random.Random) -> tuple[list[int], Labelled]:
        """A run of random tokens and its repetition, of which all but the first few are to be predicted."""
        size, shown = rng.randint(4, 40), rng.randint(2, 3)
        run = [rng.randrange(2, self._tokenizer.get_vocab_size()) for _ in range(size)]
        return run, (run, [IGNORE] * shown + [FIRST] + [REST] * (size - shown - 1))

    def _needles(
        self, rng: random.Random, room: int, most: int
    ) -> list[tuple[list[int], Labelled]]:
        """Needles and their questions, at most `most`, that fit into `room` tokens together."""
        found: list[tuple[list[int], Labelled]] = []
        apart, stop = rng.random() < 0.08, self.encode(rng.choice(STOPS))
        while room > 0 and len(found) < most:
            group = Group(rng, self._lexicon)
            plain = rng.random() < 0.05
            for _ in range(rng.randint(1, most)):
                pair = None if plain else group.next_pair()
                if pair is None and not plain:
                    break
                if pair is None:
                    entry = self._tokens_pair(rng)
                else:
                    entry = self._needle(pair, apart), self._question(pair, stop, apart)
                room -= len(entry[0]) + len(entry[1][0])
                if room < 0 or len(found) >= most:
                    return found
                found.append(entry)
        return found

    def _prose(self, rng: random.Random, size: int) -> np.ndarray:
        corpus = rng.choices(self._corpora, self._sizes)[0]
        start = rng.randrange(max(1, len(corpus) - size))
        return corpus[start : start + size]

    def sequence(
        self, rng: random.Random, length: int, *, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and classes, `length` each, with at most `most` needles; a twentieth of them is prose alone."""
        head = [self._bos, *self.encode(rng.choice(INTROS))]
        tail = self.encode(rng.choice(OUTROS))
        share = rng.uniform(0.2, 0.95) if length <= 1024 else rng.uniform(0.05, 0.6)
        room = int(share * (length - len(head) - len(tail)))
        needles = [] if rng.random() < 0.05 else self._needles(rng, room, most)
        size = length - len(head) - len(tail) - sum(len(n) + len(q[0]) for n, q in needles)
        prose = self._prose(rng, size)
        size = len(prose)
        places = sorted(rng.randint(0, size) for _ in needles)
        events = [
            (place, needle, [IGNORE] * len(needle))
            for place, (needle, _) in zip(places, needles, strict=True)
        ]
        scattered = rng.random() < 0.3
        events.append((size, tail, [IGNORE] * len(tail)))
        asked = list(range(len(needles)))
        if rng.random() < 0.6:
            rng.shuffle(asked)
        for i in asked:
            place = rng.randint(places[i], size) if scattered else size
            events.append((place, *needles[i][1]))
        events.sort(key=lambda event: event[0])
        return self._join(head, prose, events, length)

    def _join(
        self,
        head: list[int],
        prose: np.ndarray,
        events: list[tuple[int, list[int], list[int]]],
        length: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full(length, self._bos, dtype=np.int32)
        classes = np.zeros(length, dtype=np.uint8)
        at, done = len(head), 0
        ids[:at] = head
        for place, tokens, kinds in [*events, (len(prose), [], [])]:
            ids[at : at + place - done] = prose[done:place]
            classes[at : at + place - done] = PROSE
            at, done = at + place - done, place
            ids[at : at + len(tokens)] = tokens
            classes[at : at + len(tokens)] = kinds
            at += len(tokens)
        return ids, classes


# (until this share of the training, {sequences per batch: weight}, most needles in a sequence)
CURRICULUM: tuple[tuple[float, dict[int, float], int], ...] = (
    (0.03, {512: 1}, 4),
    (0.08, {512: 3, 256: 1}, 8),
    (0.20, {512: 1, 256: 3, 128: 1}, 12),
    (0.36, {512: 1, 256: 2, 128: 3, 64: 1}, 24),
    (0.56, {256: 2, 128: 2, 64: 3, 32: 1}, 32),
    (0.76, {256: 2, 64: 2, 32: 2, 16: 2}, 48),
    (1.01, {256: 2, 64: 1, 32: 1, 16: 2, 8: 2, 6: 1}, 64),
)


class Batches(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Item `step`: ids int64 and classes uint8, both (sequences, tokens // sequences), at the current `progress`."""

    def __init__(
        self, weaver: Weaver, *, tokens: int, seed: int, progress: Synchronized[float]
    ) -> None:
        self._weaver, self._tokens, self._seed, self._progress = weaver, tokens, seed, progress

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(self._seed * 1_000_003 + step)
        progress = self._progress.value
        mix, most = next((mix, most) for until, mix, most in CURRICULUM if progress < until)
        rows = rng.choices(list(mix), list(mix.values()))[0]
        rows = max(1, rows * self._tokens // 131072)
        made = [self._weaver.sequence(rng, self._tokens // rows, most=most) for _ in range(rows)]
        ids, classes = (np.stack(part) for part in zip(*made, strict=True))
        return torch.from_numpy(ids.astype(np.int16)), torch.from_numpy(classes)


def standard_library() -> str:
    """Source text of CPython's standard library: prose of another kind. (Its documentation topics stay unseen.)"""
    import sysconfig

    root = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join(
        path.read_text("utf-8", errors="ignore") for path in sorted(root.glob("*.py"))
    )


class Steps(torch.utils.data.Sampler[int]):
    """Steps 0, 1, 2 and so on without end."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()
