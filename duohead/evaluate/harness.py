"""lm-evaluation-harness with a head policy: any of its tasks, side by side with full attention, one record per task.

Language ability is a library's job; ours is that every score comes from the small cache, whose bytes stand in the same
row. `evaluate_harness(model, tokenizer, policies={"full": None, "duo": policy}, options=HarnessOptions(("mmlu",)))`
returns the rows, `harness_recorder` makes records of them; `duohead evaluate lm-eval` is the command.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from duohead.evaluate.needle import policy_facts
from duohead.evaluate.recording import AsRecord, recorder
from duohead.evaluate.scoring import using
from duohead.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.evaluate.harness_model import PolicyLM, Use
    from duohead.policy import HeadPolicy

logger = logging.getLogger(__name__)
OP = "evaluate.lm_eval"
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")
_TAKEN = ("kv_bytes", "kv_bytes_largest", "ttft_ms", "tpot_ms")


@dataclass(frozen=True)
class HarnessOptions:
    """What to ask lm-eval for; names and meanings are those of its own command line.

    Attributes:
        tasks: names of tasks, groups or tags.
        num_fewshot: examples in the prompt; a task's own number by default.
        limit: documents per task, all by default. A score under a limit is for trying things out.
        batch_size: prompts at a time, padded on the left.
        max_length: tokens of prompt and answer, longer prompts lose their start; the model's positions by default.
        chunk: tokens per prefill forward; whole prompts by default.
        include_path: folder with further task files.
        metadata: for tasks that take some, such as {"max_seq_lengths": [4096, 8192]} for RULER.
        apply_chat_template: use the tokenizer's template, or the one of that name.
        fewshot_as_multiturn: with a template, examples are turns of the conversation.
        system_instruction: goes before every prompt.
        gen_kwargs: added to the generation settings of the tasks.
        confirm_run_unsafe_code: allow tasks that run what the model wrote, such as MBPP.
        bootstrap_iters: of the standard errors that have no formula.
        seed: of few-shot examples and of everything else random.
        own_tasks_only: know the tasks of `include_path` and no others, which saves the seconds of reading lm-eval's.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 1
    max_length: int | None = None
    chunk: int | None = None
    include_path: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    confirm_run_unsafe_code: bool = False
    bootstrap_iters: int = 100_000
    seed: int = 1234
    own_tasks_only: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks must name at least one task of lm-eval, got none")
        for name in ("limit", "batch_size", "max_length", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("num_fewshot", "bootstrap_iters", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if self.own_tasks_only and self.include_path is None:
            raise ValueError("own_tasks_only needs include_path, the folder with your task files")


@dataclass(frozen=True)
class HarnessRow:
    """What one method scored in one task, or in a group of tasks whose scores lm-eval averages.

    `scores` are lm-eval's metrics by name (a filter's name after a comma), standard errors among them; `kv_bytes` is
    the mean of allocated bytes per sequence, padding of its batch included, `kv_bytes_largest` the largest cache of a
    batch. Times are means over batches: `tpot_ms` of a decode step, None where nothing was generated, `ttft_ms` until
    the first new token (or until a likelihood is known); a method's first batch compiles kernels, too, so compare times
    of many. `part_of` is the largest group in whose score the task's own is contained. `retrieval_ratio` counts gated
    heads; windows and storage are None for full attention, windows also where
    streaming heads keep every token (`evict` False). A score that is no finite number is None.
    """

    task: str
    task_version: str
    method: str
    policy: str | None
    retrieval_ratio: float
    sink: int | None
    recent: int | None
    prefill_recent: int | None
    retrieval_dtype: str | None
    streaming_dtype: str | None
    window_dtype: str | None
    evict: bool | None
    num_fewshot: int | None
    samples: int
    part_of: str | None
    scores: Mapping[str, float | None]
    kv_bytes: int
    kv_bytes_largest: int
    ttft_ms: float
    tpot_ms: float | None


def require_lm_eval() -> str:
    """Version of lm-eval; ValueError with the remedy if it is missing."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"lm-eval tasks need lm-eval, which cannot be imported ({error}); install it with: "
            "pip install 'duohead[eval]'"
        ) from error
    from importlib.metadata import version

    return version("lm_eval")


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policies: Mapping[str, HeadPolicy | None],
    options: HarnessOptions,
    on_row: Callable[[HarnessRow], None] | None = None,
) -> tuple[HarnessRow, ...]:
    """Run lm-eval's tasks with every method of `policies`; rows in the order of methods, then as they are finished.

    Tasks run one by one, groups being scored with their last member, so that a long run leaves what it has done.
    lm-eval seeds the generators of Python, NumPy and torch with `options.seed` before each task, which makes a task's
    score independent of those asked for beside it.

    Args:
        model: a causal language model in evaluation mode; left as it was found.
        tokenizer: the model's; one without a padding token is fine.
        policies: method name -> policy; None stands for the model as it is (full attention).
        options: tasks and settings.
        on_row: called with each row as soon as its task, or the last one of its group, is finished.

    Raises:
        ValueError: lm-eval is missing, a task is unknown, or it runs what the model wrote and that was not confirmed.
    """
    if not policies:
        raise ValueError("policies must not be empty; give at least one method")
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    from duohead.evaluate.harness_model import PolicyLM

    manager = TaskManager(
        include_path=options.include_path,
        include_defaults=not options.own_tasks_only,
        metadata={"tokenizer": tokenizer.name_or_path, **options.metadata},
    )
    _check_tasks(options.tasks, manager.all_tasks)
    rows: list[HarnessRow] = []
    for name, policy in policies.items():
        # Tasks hold the answers of the method that they were asked with.
        loaded = manager.load(list(options.tasks))
        _check_code(loaded["tasks"].values(), confirmed=options.confirm_run_unsafe_code)
        with using(model, policy) as bound:
            lm = PolicyLM(
                model,
                tokenizer,
                policy=bound,
                batch_size=options.batch_size,
                max_length=options.max_length,
                chunk=options.chunk,
            )
            run = _Run(name, bound, lm, loaded.get("groups", {}))
            for task in loaded["tasks"].values():
                for row in run.rows(_asked(lm, task, manager, options)):
                    rows.append(row)
                    if on_row is not None:
                        on_row(row)
    return tuple(rows)


def _asked(lm: PolicyLM, task: Any, manager: Any, options: HarnessOptions) -> Mapping[str, Any]:
    """What lm-eval says of one task, as it is loaded."""
    from lm_eval import simple_evaluate

    results: Mapping[str, Any] = simple_evaluate(
        lm,
        tasks=[task],
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        limit=options.limit,
        bootstrap_iters=options.bootstrap_iters,
        log_samples=False,
        system_instruction=options.system_instruction,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.fewshot_as_multiturn,
        gen_kwargs=dict(options.gen_kwargs) or None,
        task_manager=manager,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
    )
    return results


def _check_tasks(wanted: Sequence[str], known: Sequence[str]) -> None:
    for task in wanted:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"tasks must be names that lm-eval knows, got {task!r}{hint} (list them with: lm-eval ls tasks)"
            )


def _check_code(tasks: Iterable[Any], *, confirmed: bool) -> None:
    """lm-eval asks before each task; a run of hours must not end there."""
    unsafe = [task.task_name for task in tasks if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not confirmed:
        raise ValueError(
            f"tasks run code that the model wrote ({', '.join(unsafe)}), which is unsafe; allow it with "
            "confirm_run_unsafe_code on a machine that may be lost, or leave them out"
        )


@dataclass
class _Run:
    """One method over its tasks: what they scored so far, and the groups (lm-eval's) that wait for more."""

    method: str
    policy: HeadPolicy | None
    lm: PolicyLM
    groups: Mapping[str, Any]
    metrics: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    fewshot: dict[str, int | None] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    took: dict[str, Use] = field(default_factory=dict)

    def rows(self, results: Mapping[str, Any]) -> Iterator[HarnessRow]:
        """The row of a task, given what lm-eval says of it, and those of groups that it completes."""
        from duohead.evaluate.harness_model import total

        ((task, metrics),) = results["results"].items()
        self.metrics[task] = metrics
        self.fewshot[task] = results["n-shot"].get(task)
        self.samples[task] = results["n-samples"][task]["effective"]
        self.took[task] = total(list(self.lm.use.values()))
        self.lm.use.clear()
        yield self._row(task, metrics, results["versions"].get(task), [task])
        for name, group in self.groups.items():
            leaves = _leaves(group)
            # A group without a score is a heading.
            if group.has_aggregation and task in leaves and self.metrics.keys() >= set(leaves):
                yield self._row(name, group.aggregate(self.metrics), group.version, leaves)

    def _row(
        self, task: str, metrics: Mapping[str, Any], version: Any, leaves: Sequence[str]
    ) -> HarnessRow:
        from duohead.evaluate.harness_model import total

        took = total([self.took[leaf] for leaf in leaves])
        shots = {self.fewshot[leaf] for leaf in leaves}
        return HarnessRow(
            task=task,
            task_version=str(version),
            method=self.method,
            **policy_facts(self.policy),
            num_fewshot=shots.pop() if len(shots) == 1 else None,
            samples=sum(self.samples[leaf] for leaf in leaves),
            part_of=self._part_of(task, leaves),
            scores=_scores(task, metrics),
            kv_bytes=round(took.bytes_of_all / took.sequences),
            kv_bytes_largest=took.largest,
            ttft_ms=took.ttft_ms,
            tpot_ms=took.tpot_ms,
        )

    def _part_of(self, task: str, leaves: Sequence[str]) -> str | None:
        """The largest group with a score that contains all of this and more."""
        around = {
            name: len(_leaves(group))
            for name, group in self.groups.items()
            if name != task and group.has_aggregation and set(leaves) < set(_leaves(group))
        }
        return max(around, key=lambda name: around[name], default=None)


def _leaves(group: Any) -> list[str]:
    """Names of the tasks that a group of lm-eval comes down to."""
    return list(dict.fromkeys(task.task_name for task in group.get_all_tasks()))


def _scores(task: str, metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """lm-eval's metrics as numbers that a record can carry; what is none is None, and NaN and infinity are told."""
    found: dict[str, float | None] = {}
    for key, value in metrics.items():
        # RULER writes -1 for lengths that were not asked for.
        if key in _NOT_METRICS or value == -1:
            continue
        name = key.removesuffix(",none")
        number = isinstance(value, int | float)
        if number and not math.isfinite(value):
            logger.warning("%s of task %s is %s and is written as null", name, task, value)
        found[name] = value if number and math.isfinite(value) else None
    return found


def harness_recorder(*, model: str, dtype: Any, options: HarnessOptions) -> AsRecord:
    """Makes records of rows: `impl` is the method; settings of the run and lm-eval's version are in each."""
    plain = recorder(op=OP, numbers=("scores", *_TAKEN), model=model, dtype=dtype)
    lm_eval = require_lm_eval()
    settings = {
        item.name: getattr(options, item.name)
        for item in fields(HarnessOptions)
        if item.name not in ("tasks", "num_fewshot", "own_tasks_only")
    }

    def as_record(row: HarnessRow) -> Record:
        made = plain(row)
        taken = {name: made.numbers[name] for name in _TAKEN}
        return replace(
            made,
            shape={**made.shape, **settings},
            numbers={**made.numbers["scores"], **taken},
            versions={**made.versions, "lm_eval": lm_eval},
        )

    return as_record
