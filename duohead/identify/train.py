"""Gate training: from a model and any long text to the `HeadPattern` that says which heads retrieve.

Two thousand AdamW steps on a few hundred numbers need no training framework; what they need is to be reproducible
and to survive a kill, so a step depends on nothing but the seed and its number (arXiv 2410.10819, section 2.3).
Use `identify(model, tokenizer, text, out="heads")`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

from duohead.identify import haystack
from duohead.identify.checkpoint import RunFolder, fingerprint, token_digest
from duohead.identify.descent import Descent, follow
from duohead.identify.gates import Gates, distillation, installed
from duohead.identify.loggers import check, loggers
from duohead.identify.options import IdentifyOptions
from duohead.identify.parallel import Ranks, refuse_tensor_parallel, shard
from duohead.identify.samples import training_samples
from duohead.identify.stability import Stability
from duohead.shapes import layer_shapes, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.identify.assembly import Sample
    from duohead.pattern import HeadPattern

# About as many columns as a picture of the gates over time has.
_LOGGED_GATES = 200


class Step(NamedTuple):
    """One step of training, as it is logged: losses before the update, gates after it."""

    step: int
    loss: float
    distill: float
    reg: float
    lr: float
    mean_gate: float
    share_above_half: float


def identify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    out: str | Path | None = None,
    options: IdentifyOptions | None = None,
    restart: bool = False,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
    log: Sequence[str] = (),
) -> HeadPattern:
    """Find the retrieval heads of a model by training one gate per KV head (arXiv 2410.10819, section 2.3).

    The model is used as it is, on its device and in its dtype, and left as it was found, unless ``options.shard``
    spreads it. ``text`` is any long prose, or several texts that give equal shares; it must have at least as many
    tokens as the longest sample. In a process group (torchrun), all processes work on the same gates, and the first one
    alone writes, logs and shows.

    Args:
        out: folder for the pattern, the checkpoint and the log (one JSON line a step). A run that was interrupted there
            continues from its last checkpoint, bit for bit on the same device. None keeps everything in memory.
        options: every constant; the default is the paper's.
        restart: begin anew; the run found in ``out`` is replaced when this one saves its first checkpoint.
        progress: show a progress bar.
        on_step: called with every `Step`.
        log: "wandb" or "tensorboard" or both, besides the log in ``out``.

    Raises:
        ValueError: text or model too short for the contexts, ``out`` holds a run of other options, model or text, or
            the model cannot be gated. All but the last are found before any work.
    """
    options = options or IdentifyOptions()
    refuse_tensor_parallel(model)
    ranks = Ranks.of(options.sequence_parallel, device=_device(model, options))
    with ranks.together():
        check(log, out)
        ranks.check(layer_shapes(model), text_config(model))
        longest = options.longest(getattr(text_config(model), "max_position_embeddings", None))
        ids = haystack.tokens(
            text, tokenizer, at_least=longest, at_most=haystack.PER_CONTEXT * longest
        )
        dataset = training_samples(tokenizer, ids, options, longest, samples_per_step=ranks.samples)
        folder = None
        if out is not None and ranks.first:
            folder = RunFolder(out, _identity(model, ids, options, ranks), restart=restart)
    if options.shard:
        shard(model, device=_device(model, options))
    gates = _gates(model, options, ranks)
    # One small tensor: the fused and multi-tensor forms only add kernels to choose between.
    optimizer = torch.optim.AdamW([gates.values], weight_decay=0.0, foreach=False)
    stability = follow(options)
    start = _resume(folder, gates, optimizer, stability)
    names = log if ranks.first else ()
    logged = loggers(names, out, config=options.that_matter(), start=start)
    with (
        logged as log_step,
        _deterministic(gates.values.device) if options.deterministic else nullcontext(),
        installed(model, gates, gradient_checkpointing=options.gradient_checkpointing) as backbone,
    ):
        steps = train_gates(backbone, gates, optimizer, dataset, options, stability, start=start)
        for record in _with_bar(steps, stability, start) if progress and ranks.first else steps:
            done = record.step + 1
            if folder is not None:
                folder.log(_line(record, gates, options))
                if done % options.save_every == 0 or done == stability.steps:
                    folder.save(gates, optimizer, stability, step=done)
            log_step(
                record.step, {name: x for name, x in record._asdict().items() if name != "step"}
            )
            if on_step is not None:
                on_step(record)
    if isinstance(stability, Descent):
        with torch.no_grad():
            gates.values.copy_(torch.tensor(stability.means))
    pattern = _pattern(model, gates, options, longest, stability.steps)
    if out is not None and ranks.first:
        pattern.save(out)
    return pattern


def _device(model: PreTrainedModel, options: IdentifyOptions) -> torch.device:
    """Where the gates are trained: with the model, or where a model that waits on the CPU will be spread."""
    if options.shard and torch.distributed.is_initialized():
        return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    return model.device


def _resume(
    folder: RunFolder | None, gates: Gates, optimizer: torch.optim.Optimizer, stability: Stability
) -> int:
    """Steps done; the first process reads the checkpoint, and the others get what it found."""
    start = 0
    with gates.ranks.together():
        if folder is not None:
            start = folder.resume(gates, optimizer, stability)
    start = gates.ranks.share(start)
    if start and gates.ranks.world > 1:
        state = {name: tensor.cpu() for name, tensor in optimizer.state[gates.values].items()}
        held = (gates.values.detach().cpu(), state, stability.state())
        values, state, standing = gates.ranks.share(held)
        with torch.no_grad():
            gates.values.copy_(values)
        # Adam counts its steps on the CPU, wherever the gates are.
        count = state.pop("step")
        moments = {name: tensor.to(gates.values.device) for name, tensor in state.items()}
        optimizer.state[gates.values] = {"step": count, **moments}
        stability.restore(standing)
    return start


def _line(record: Step, gates: Gates, options: IdentifyOptions) -> dict[str, Any]:
    """What the folder's log says of a step, every so often with all gates, layer by layer."""
    line: dict[str, Any] = record._asdict()
    if record.step % max(1, options.steps // _LOGGED_GATES) == 0:
        line["gates"] = [round(value, 4) for value in gates.values.tolist()]
    return line


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA, ask every kernel that has a reproducible form for it; on CPU they all are."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=lenient)


class Samples(Protocol):
    """What gates are trained on: a sample for every step of every row of processes."""

    def __getitem__(self, step: int) -> Sample: ...


def train_gates(
    backbone: nn.Module,
    gates: Gates,
    optimizer: torch.optim.Optimizer,
    dataset: Samples,
    options: IdentifyOptions,
    stability: Stability,
    *,
    start: int,
) -> Iterator[Step]:
    """Train gates that are installed, from step ``start`` until ``stability`` ends it; yields every `Step` after it.

    Raises:
        ValueError: the loss is not finite.
    """
    ranks, step = gates.ranks, start
    while step < stability.steps:
        rate = options.learning_rate_at(step, ends=stability.ends)
        optimizer.param_groups[0]["lr"] = rate
        sample = dataset[step * ranks.samples + ranks.row]
        part = distillation(backbone, gates, sample) / ranks.samples
        mean = gates.penalty()
        penalty = stability.penalty(mean, step=step)
        optimizer.zero_grad()
        # Every process adds its share of the regulariser, so that the sum of their gradients is that of the loss.
        (part + penalty / ranks.world).backward()
        gradient = gates.values.grad
        assert gradient is not None, "the regulariser alone gives every gate a gradient"
        ranks.sum_(gradient)
        distill = ranks.sum_(part.detach().clone())
        loss = (distill + penalty).item()
        if not math.isfinite(loss):
            raise ValueError(
                f"loss must be finite, got {loss} at step {step}: training diverged, and the last checkpoint is "
                f"as it was; use dtype bfloat16 or float32, or a lower learning_rate"
            )
        optimizer.step()
        gates.clamp_()
        stability.watch(step, gates.values)
        yield Step(
            step=step,
            loss=loss,
            distill=distill.item(),
            reg=mean.item(),
            lr=rate,
            mean_gate=gates.values.mean().item(),
            share_above_half=(gates.values > 0.5).float().mean().item(),
        )
        step += 1


def _with_bar(steps: Iterator[Step], stability: Stability, start: int) -> Iterator[Step]:
    from tqdm import tqdm

    with tqdm(total=stability.steps, initial=start, desc="identify", unit="step") as bar:
        for record in steps:
            bar.total = stability.steps
            bar.set_postfix_str(
                f"loss {record.loss:.4f}, mean gate {record.mean_gate:.2f}, "
                f"{record.share_above_half:.0%} above 0.5",
                refresh=False,
            )
            bar.update()
            yield record


def _gates(model: PreTrainedModel, options: IdentifyOptions, ranks: Ranks) -> Gates:
    return Gates.of(
        model,
        sink=options.sink,
        recent=options.recent,
        initial=options.initial,
        teacher_full=options.teacher_full,
        deterministic=options.deterministic,
        ranks=ranks,
    )


def _identity(
    model: PreTrainedModel, ids: torch.Tensor, options: IdentifyOptions, ranks: Ranks
) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    return {
        "options": {**options.that_matter(), "samples_per_step": ranks.samples},
        "model": fingerprint(model),
        "text": token_digest(ids),
    }


def _pattern(
    model: PreTrainedModel, gates: Gates, options: IdentifyOptions, longest: int, steps: int
) -> HeadPattern:
    from duohead.pattern import HeadPattern

    training = {
        **asdict(options),
        "context_max": longest,
        "steps_done": steps,
        "samples_per_step": gates.ranks.samples,
        "method": "duoattention gates",
    }
    return HeadPattern.from_alpha(
        gates.alpha,
        model=model,
        sink=options.sink,
        recent=options.recent,
        base_revision=getattr(model.config, "_commit_hash", None),
        training=training,
    )
