"""The sample of every training step: its length, task and content follow from the seed and the step, so a run resumes.

Gates that only ever see passkeys learn what passkeys need, so other lookups may take turns with them: word lists short
and long, codes by key, quotations by their beginning, in the texts of `quiz`, which are not those of the evaluation.
Use `training_samples(tokenizer, ids, options, longest)[step]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from duohead.identify.assembly import Sample
from duohead.identify.options import PASSKEYS, IdentifyOptions
from duohead.identify.passkeys import passkey_sample
from duohead.identify.scorers.quiz import quiz

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Questions of each kind in a text: as many as let all kinds fit into the paper's shortest context.
_EACH = 3
# Samples of each task that are made before a run.
_PROBED = 16


class Make(Protocol):
    """Makes a sample of exactly `context_length` tokens."""

    def __call__(self, *, context_length: int, generator: torch.Generator) -> Sample:
        """A sample that depends on nothing but the length and the generator."""
        ...


class StepSamples:
    """The sample of each training step: `samples[step]` depends on `seed` and `step` alone, so that a run can resume.

    Context lengths are `intervals` evenly spaced ones from `context_min` to `context_max`, each once per epoch of
    `intervals` steps, in an order shuffled anew every epoch. The `makes` take turns, step by step.
    """

    def __init__(
        self,
        makes: Sequence[Make],
        *,
        context_min: int,
        context_max: int,
        intervals: int = 50,
        seed: int = 0,
    ) -> None:
        if not 1 <= context_min <= context_max:
            raise ValueError(
                f"context_min must be 1 to context_max={context_max}, got {context_min}"
            )
        if intervals < 1:
            raise ValueError(
                f"intervals must be at least 1, got {intervals}; it is the number of context lengths"
            )
        self.context_lengths = [
            int(n) for n in torch.linspace(context_min, context_max, intervals).tolist()
        ]
        self._makes, self._seed = makes, seed

    def context_length(self, step: int) -> int:
        """Length in tokens of the sample of `step` (steps count from 0)."""
        epoch, place = divmod(step, len(self.context_lengths))
        order = torch.randperm(len(self.context_lengths), generator=self._generator(epoch, 0))
        return self.context_lengths[int(order[place])]

    def __getitem__(self, step: int) -> Sample:
        if step < 0:
            raise IndexError(f"step must not be negative, got {step}")
        make = self._makes[step % len(self._makes)]
        return make(context_length=self.context_length(step), generator=self._generator(step, 1))

    def probe(self, count: int) -> None:
        """Make those of the first ``count`` samples that have the shortest contexts, of every task.

        Raises ValueError if needles do not fit, which must not be found out in the middle of a run.
        """
        turns = len(self._makes)
        for turn in range(turns):
            for step in sorted(range(turn, count, turns), key=self.context_length)[:_PROBED]:
                _ = self[step]

    def _generator(self, number: int, stream: int) -> torch.Generator:
        # Two streams (order of an epoch, content of a step) of one seed, never the same: odd and even seeds.
        return torch.Generator().manual_seed((self._seed * 1_000_003 + number) * 2 + stream)


def training_samples(
    tokenizer: PreTrainedTokenizerBase,
    haystack_ids: torch.Tensor,
    options: IdentifyOptions,
    longest: int,
    *,
    samples_per_step: int = 1,
) -> StepSamples:
    """The samples of a run with these options, whose longest context has `longest` tokens.

    A run of processes in rows takes ``samples_per_step`` of them, one after another. Raises ValueError if what a task
    asks for does not fit into the shortest contexts.
    """
    passkeys = partial(
        passkey_sample,
        tokenizer,
        haystack_ids,
        num_passkeys=options.num_passkeys,
        passkey_words=options.passkey_words,
        depths=(options.depth_min, options.depth_max),
        depth_steps=options.depth_steps,
        wording=options.wording,
        chat=options.chat,
    )
    makes: list[Make] = [
        passkeys if task == PASSKEYS else partial(lookup_sample, tokenizer, haystack_ids, kind=task)
        for task in options.tasks
    ]
    samples = StepSamples(
        makes,
        context_min=options.context_min,
        context_max=longest,
        intervals=options.context_lengths,
        seed=options.seed,
    )
    samples.probe(options.steps * samples_per_step)
    return samples


def lookup_sample(
    tokenizer: PreTrainedTokenizerBase,
    haystack_ids: torch.Tensor,
    *,
    kind: str,
    context_length: int,
    generator: torch.Generator,
) -> Sample:
    """A text of exactly `context_length` tokens with questions of several kinds, of which the answers of one count.

    All kinds lie in every text, so that what is asked for has rivals. ``kind`` is one of `quiz.KINDS` but prose. Raises
    ValueError if the questions do not fit into the context, or if it is too short for any of that kind.
    """
    text = quiz(
        tokenizer,
        haystack_ids,
        context_length=context_length,
        each=_EACH,
        prose=0,
        first=0,
        generator=generator,
    )
    answers = [
        place for place, asked in zip(text.answers, text.kinds, strict=True) if asked == kind
    ]
    if not answers:
        raise ValueError(
            f"context_length={context_length} is too short for questions of task {kind!r}; "
            "raise context_min, or leave that task out"
        )
    return Sample(text.input_ids, tuple(answers))
