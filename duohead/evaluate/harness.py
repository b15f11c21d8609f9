"""lm-evaluation-harness with a head policy: any of its tasks, side by side with full attention, one record per task.

Language ability is a library's job; ours is that every score comes from the small cache, whose bytes stand in the same
row. `evaluate_harness(model, tokenizer, policies={"full": None, "duo": policy}, options=HarnessOptions(("mmlu",)))`
returns the rows, `write_rows` makes the records; `duohead evaluate lm-eval` is the command.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from duohead.evaluate.needle import policy_facts
from duohead.evaluate.scoring import using
from duohead.files import write_text
from duohead.record import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.evaluate.harness_model import Use
    from duohead.policy import HeadPolicy

OP = "evaluate.lm_eval"
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


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
    batch. Times are means over batches: `tpot_ms` of a decode step, None where nothing was generated, `ttft_ms` of
    prefill and one such step; a method's first batch compiles kernels, too, so compare times of many. `part_of` is the
    largest group in whose score the task's own is contained. `retrieval_ratio` counts gated heads; windows are None for
    full attention.
    """

    task: str
    task_version: str
    method: str
    policy: str | None
    retrieval_ratio: float
    sink: int | None
    recent: int | None
    prefill_recent: int | None
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
) -> tuple[HarnessRow, ...]:
    """Run lm-eval's tasks with every method of `policies`; rows in the order of methods, then of tasks.

    lm-eval seeds the generators of Python, NumPy and torch with `options.seed` before each method.

    Args:
        model: a causal language model in evaluation mode; left as it was found.
        tokenizer: the model's; one without a padding token is fine.
        policies: method name -> policy; None stands for the model as it is (full attention).
        options: tasks and settings.

    Raises:
        ValueError: lm-eval is missing, a task is unknown, or it runs what the model wrote and that was not confirmed.
    """
    if not policies:
        raise ValueError("policies must not be empty; give at least one method")
    require_lm_eval()
    from lm_eval import simple_evaluate
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
        with using(model, policy) as bound:
            lm = PolicyLM(
                model,
                tokenizer,
                policy=bound,
                batch_size=options.batch_size,
                max_length=options.max_length,
                chunk=options.chunk,
            )
            results = simple_evaluate(
                lm,
                tasks=list(options.tasks),
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
        rows += _rows(name, bound, results, lm.use)
    return tuple(rows)


def _check_tasks(wanted: Sequence[str], known: Sequence[str]) -> None:
    for task in wanted:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"tasks must be names that lm-eval knows, got {task!r}{hint} (list them with: lm-eval ls tasks)"
            )


def _rows(
    method: str, policy: HeadPolicy | None, results: Mapping[str, Any], use: Mapping[str, Use]
) -> list[HarnessRow]:
    rows = []
    members = results.get("group_subtasks", {})
    for task, metrics in results["results"].items():
        # RULER writes -1 for lengths that were not asked for.
        scores = {
            key.removesuffix(",none"): value if isinstance(value, int | float) else None
            for key, value in metrics.items()
            if key not in _NOT_METRICS and value != -1
        }
        leaves = _leaves(task, members)
        took = [use[leaf] for leaf in leaves if leaf in use]
        if not any(value is not None for value in scores.values()) or not took:
            continue  # the heading of a group that is not averaged
        sequences = sum(part.sequences for part in took)
        steps = sum(part.decode_steps for part in took)
        prefill = 1000 * sum(p.prefill_seconds for p in took) / sum(p.prefills for p in took)
        step = 1000 * sum(p.decode_seconds for p in took) / steps if steps else None
        rows.append(
            HarnessRow(
                task=task,
                task_version=str(results["versions"].get(task)),
                method=method,
                **policy_facts(policy),
                num_fewshot=results["n-shot"].get(task),
                samples=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                part_of=_part_of(task, results["results"], members),
                scores=scores,
                kv_bytes=round(sum(part.bytes_of_all for part in took) / sequences),
                kv_bytes_largest=max(part.largest for part in took),
                ttft_ms=prefill + (step or 0.0),
                tpot_ms=step,
            )
        )
    return rows


def _leaves(task: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a group comes down to; a task is its own."""
    inner = members.get(task)
    if not inner:
        return [task]
    return list(dict.fromkeys(leaf for name in inner for leaf in _leaves(name, members)))


def _part_of(
    task: str, scored: Mapping[str, Mapping[str, Any]], members: Mapping[str, Sequence[str]]
) -> str | None:
    own = set(_leaves(task, members))
    groups = {
        name: _leaves(name, members) for name in scored if name != task and _averaged(scored[name])
    }
    around = [name for name, leaves in groups.items() if own < set(leaves)]
    return max(around, key=lambda name: len(groups[name]), default=None)


def _averaged(metrics: Mapping[str, Any]) -> bool:
    """Whether lm-eval gives scores; a group without an average only has a name."""
    return any(isinstance(v, int | float) for k, v in metrics.items() if k not in _NOT_METRICS)


def write_rows(
    path: str | os.PathLike[str],
    rows: Sequence[HarnessRow],
    *,
    model: str,
    dtype: Any,
    options: HarnessOptions,
) -> None:
    """Write one record per row to `path`, replacing it; settings of the run and lm-eval's version are in each."""
    made = record(op=OP, impl="", numbers={}, dtype=dtype)
    versions = {**made.versions, "lm_eval": require_lm_eval()}
    settings = {
        item.name: getattr(options, item.name)
        for item in fields(HarnessOptions)
        if item.name not in ("tasks", "num_fewshot", "own_tasks_only")
    }
    lines = []
    for row in rows:
        values = asdict(row)
        method, policy, scores = (values.pop(name) for name in ("method", "policy", "scores"))
        taken = {
            name: values.pop(name)
            for name in ("kv_bytes", "kv_bytes_largest", "ttft_ms", "tpot_ms")
        }
        entry = replace(
            made,
            impl=method,
            policy=policy,
            shape={"model": model, **values, **settings},
            numbers={**scores, **taken},
            versions=versions,
        )
        lines.append(entry.to_json() + "\n")
    write_text(path, "".join(lines))
