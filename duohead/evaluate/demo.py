"""The demo: find the heads of the pocket model on this machine, then measure what the others are needed for.

It exists so that anyone can see the claim tested live in minutes, on a CPU, without a download; nothing in the report
is stored beforehand. `run_demo(model, tokenizer, text, name="pocket")` returns a `Report`; `duohead demo` writes it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from duohead.evaluate.methods import Method, comparison, share_name
from duohead.evaluate.needle import check_positions, evaluate_needle
from duohead.evaluate.progress import bar
from duohead.evaluate.report import Example, Report
from duohead.evaluate.results import NeedleResult
from duohead.evaluate.scoring import using
from duohead.evaluate.tasks import TASKS
from duohead.record import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.identify import IdentifyOptions
    from duohead.pattern import HeadPattern
    from duohead.policy import HeadPolicy

DEMO_OPTIONS: dict[str, Any] = {
    "steps": 40,
    "learning_rate": 0.05,
    "sink": 64,
    "recent": 256,
    "context_min": 1280,
    "context_max": 1280,
}
"""Fields of `IdentifyOptions` that find the pocket model's heads in well under a minute on two cores."""


@dataclass(frozen=True)
class DemoPlan:
    """What is measured; the defaults fit two CPU cores and two minutes.

    Attributes:
        ratios: shares of retrieval heads, the first two against random heads.
        draws: random choices for each of these two.
        task, length, samples: of the accuracy figures; the samples spread over all depths.
        grid_tasks, grid_lengths, grid_depths, grid_samples: of the needle heat maps; the first task gives the example.
    """

    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    draws: int = 3
    task: str = "passkeys"
    length: int = 2048
    samples: int = 10
    grid_tasks: tuple[str, ...] = ("needle", "number")
    grid_lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    grid_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    grid_samples: int = 1

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return max(self.length, *self.grid_lengths)


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str,
    seed: int = 0,
    plan: DemoPlan | None = None,
    options: IdentifyOptions | None = None,
    provenance: Mapping[str, str] | None = None,
    started: float | None = None,
    progress: bool = False,
) -> Report:
    """Identify the heads of `model` on the first half of `text`, evaluate them on the second.

    Args:
        model: in evaluation mode; left as it was found.
        tokenizer: the model's.
        text: prose, long enough for the longest context in each half.
        name: of the model, for the report.
        seed: of everything random.
        plan: what to measure.
        options: for `identify`; DEMO_OPTIONS with `seed` by default.
        provenance: further lines for the report.
        started: `time.perf_counter()` from which to count the seconds; by default the time of the call.
        progress: show progress bars on standard error.

    Raises:
        ValueError: the text is too short, or a context exceeds the model's positions.
    """
    from duohead.identify import IdentifyOptions, haystack, identify

    begin = time.perf_counter() if started is None else started
    plan = plan or DemoPlan()
    check_positions(model, plan.longest)
    seen, unseen = halves(text)
    text_ids = haystack.tokens(unseen, tokenizer, at_least=1)
    if len(text_ids) < plan.longest:
        raise ValueError(
            f"text is too short: one half of it finds the heads and the other tests them, so each half needs "
            f"{plan.longest} tokens, and the second has {len(text_ids)}; give a longer text or more files"
        )
    before = time.perf_counter()
    options = options or IdentifyOptions(**DEMO_OPTIONS, seed=seed)
    pattern = identify(model, tokenizer, seen, options=options, progress=progress)
    identify_seconds = time.perf_counter() - before
    methods = comparison(
        pattern, ratios=plan.ratios, random_ratios=plan.ratios[:2], draws=plan.draws, seed=seed
    )
    chosen = f"duo_{share_name(plan.ratios[1])}"
    stage = _Stage(model, tokenizer, text_ids, methods, seed, progress)
    accuracy = stage.accuracy(plan)
    grid = stage.grid(plan, ("full", chosen))
    sizes = stage.sizes(plan, grid, (f"duo_{share_name(plan.ratios[0])}", chosen))
    example = stage.example(plan, ("full", chosen, f"random_{share_name(plan.ratios[1])}_0"))
    seconds = time.perf_counter() - begin
    facts = _facts(pattern, seed, identify_seconds, seconds)
    return Report(
        model=name,
        alpha=pattern.alpha.tolist(),
        methods=methods,
        accuracy=accuracy,
        grid=grid,
        sizes=sizes,
        example=example,
        chosen=chosen,
        figures=figures(plan, accuracy, seconds),
        provenance={**(provenance or {}), **facts},
    )


def halves(text: str) -> tuple[str, str]:
    """Cut a text in two at the line break nearest after its middle."""
    middle = text.find("\n", len(text) // 2)
    middle = len(text) // 2 if middle < 0 else middle
    return text[:middle], text[middle:]


def figures(plan: DemoPlan, accuracy: NeedleResult, seconds: float) -> dict[str, Any]:
    """The figures of `duohead demo --json`: exact match as fractions, bytes of allocated caches, seconds in all."""
    shares = [share_name(ratio) for ratio in plan.ratios[:2]]
    deterministic = ["full", *(f"duo_{share}" for share in shares)]

    def exact(name: str) -> float:
        # Means of counts: six digits hold all that they say.
        return round(accuracy.mean(method=name), 6)

    scores: dict[str, Any] = {name: exact(name) for name in deterministic}
    for share in shares:
        scores[f"random_{share}"] = [exact(f"random_{share}_{draw}") for draw in range(plan.draws)]
    scores["streaming"] = exact("streaming")
    sizes = {name: accuracy.kv_bytes(method=name, length=plan.length) for name in deterministic}
    return {"accuracy": scores, "kv_bytes": sizes, "seconds": round(seconds, 1)}


@dataclass(frozen=True)
class _Stage:
    """What every measurement of the demo shares."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text_ids: torch.Tensor
    methods: Mapping[str, Method]
    seed: int
    progress: bool

    def accuracy(self, plan: DemoPlan) -> NeedleResult:
        """All methods at one length; one sample at each of evenly spread depths."""
        depths = [(i + 0.5) / plan.samples for i in range(plan.samples)]
        return self._needle("accuracy", tuple(self.methods), [plan.task], [plan.length], depths, 1)

    def grid(self, plan: DemoPlan, names: Sequence[str]) -> NeedleResult:
        """Lengths x depths."""
        return self._needle(
            "needles",
            names,
            plan.grid_tasks,
            plan.grid_lengths,
            plan.grid_depths,
            plan.grid_samples,
        )

    def sizes(
        self, plan: DemoPlan, grid: NeedleResult, names: Sequence[str]
    ) -> dict[str, dict[int, int]]:
        """Cache bytes of full attention and of `names` at every length of the grid; what `grid` lacks is run."""
        missing = [name for name in names if name not in grid.methods]
        extra = self._needle(
            "cache bytes", missing, plan.grid_tasks[:1], plan.grid_lengths, [0.5], 1
        )
        measured = NeedleResult((*grid.rows, *extra.rows))
        return {
            name: {
                length: measured.kv_bytes(method=name, length=length)
                for length in plan.grid_lengths
            }
            for name in ("full", *names)
        }

    def _needle(
        self,
        title: str,
        names: Sequence[str],
        tasks: Sequence[str],
        lengths: Sequence[int],
        depths: Sequence[float],
        samples: int,
    ) -> NeedleResult:
        total = len(names) * len(tasks) * len(lengths) * len(depths) * samples
        with bar(title, total, shown=self.progress) as advance:
            return evaluate_needle(
                self.model,
                self.tokenizer,
                self.text_ids,
                policies={name: self.methods[name].policy for name in names},
                tasks=tasks,
                lengths=lengths,
                depths=depths,
                samples=samples,
                seed=self.seed,
                progress=advance,
            )

    def example(self, plan: DemoPlan, names: Sequence[str]) -> Example:
        """One question of the grid's first task, in the middle of a text, answered with `model.generate`."""
        generator = torch.Generator().manual_seed(self.seed)
        sample = TASKS[plan.grid_tasks[0]].make(
            self.tokenizer,
            self.text_ids,
            context_length=plan.length,
            depth=0.5,
            generator=generator,
        )
        start, end = sample.answers[0]
        ids = sample.input_ids.tolist()
        replies = {}
        with bar("sample answer", len(names), shown=self.progress) as advance:
            for name in names:
                made = generate_greedy(
                    self.model, ids[:start], self.methods[name].policy, tokens=end - start
                )
                replies[name] = self.tokenizer.decode(made)
                advance(name)
        tail = self.tokenizer.decode(ids[max(0, start - 120) : start]).strip()
        question = "\n".join(tail.splitlines()[-2:])
        return Example(question, self.tokenizer.decode(ids[start:end]), replies)


@torch.inference_mode()
def generate_greedy(
    model: PreTrainedModel, prompt: Sequence[int], policy: HeadPolicy | None, *, tokens: int
) -> list[int]:
    """At most `tokens` ids that `model.generate` chooses greedily after `prompt`, under a policy (None: as is)."""
    ids = torch.tensor([list(prompt)], device=model.device)
    with using(model, policy):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,  # one row is never padded, and unset it warns
        )
    made: list[int] = out[0, len(prompt) :].tolist()
    return made


def _facts(
    pattern: HeadPattern, seed: int, identify_seconds: float, seconds: float
) -> dict[str, str]:
    made = record(op="demo", impl="duohead", numbers={})
    versions = {name: version for name, version in made.versions.items() if version is not None}
    return {
        "time": made.time,
        "duration": f"{seconds:.0f} s, of which {identify_seconds:.0f} s for finding the heads",
        "hardware": _listed(made.hardware),
        "versions": _listed(versions),
        "commit": made.commit or "not a checkout",
        "seed": str(seed),
        "identification": _listed(pattern.training),
    }


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value is not None
    )
