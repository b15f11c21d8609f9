"""Gate training: from a model and any long text to the `HeadPattern` that says which heads retrieve.

Two thousand AdamW steps on a few hundred numbers need no training framework; what they need is to be reproducible
and to survive a kill, so a step depends on nothing but the seed and its number (arXiv 2410.10819, section 2.3).
Use `identify(model, tokenizer, text, out="heads")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from duohead.identify import haystack
from duohead.identify.checkpoint import RunFolder, fingerprint, token_digest
from duohead.identify.gates import Gates, distillation, installed
from duohead.identify.options import IdentifyOptions
from duohead.identify.passkeys import PasskeyDataset
from duohead.shapes import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.pattern import HeadPattern

# Enough text that samples differ, little enough that a library of books need not be tokenised whole.
_TEXT_PER_CONTEXT = 16
_PROBED_SAMPLES = 16


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
    text: str,
    *,
    out: str | Path | None = None,
    options: IdentifyOptions | None = None,
    restart: bool = False,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> HeadPattern:
    """Find the retrieval heads of a model by training one gate per KV head (arXiv 2410.10819, section 2.3).

    The model is used as it is, on its device and in its dtype, and left as it was found. ``text`` is any long prose; it
    must have at least as many tokens as the longest sample.

    Args:
        out: folder for the pattern, the checkpoint and the log (one JSON line a step). A run that was interrupted there
            continues from its last checkpoint, bit for bit on the same device. None keeps everything in memory.
        options: every constant; the default is the paper's.
        restart: discard a run found in ``out`` instead of continuing it.
        progress: show a progress bar.
        on_step: called with every `Step`.

    Raises:
        ValueError: text or model too short for the contexts, ``out`` holds a run of other options, model or text, or
            the model cannot be gated. All but the last are found before any work.
    """
    options = options or IdentifyOptions()
    gates = _gates(model, options)
    longest = options.longest(getattr(text_config(model), "max_position_embeddings", None))
    ids = haystack.tokens(text, tokenizer, at_least=longest, at_most=_TEXT_PER_CONTEXT * longest)
    dataset = _dataset(tokenizer, ids, options, longest)
    # One small tensor: the fused and multi-tensor forms only add kernels to choose between.
    optimizer = torch.optim.AdamW([gates.values], weight_decay=0.0, foreach=False)
    folder, start = None, 0
    if out is not None:
        folder = RunFolder(out, _identity(model, ids, options), restart=restart)
        start = folder.resume(gates, optimizer)
    frugal = options.gradient_checkpointing
    with (
        _deterministic(model.device),
        installed(model, gates, gradient_checkpointing=frugal) as backbone,
    ):
        steps = _train(backbone, gates, optimizer, dataset, options, start=start)
        for record in _with_bar(steps, options.steps, start) if progress else steps:
            done = record.step + 1
            if folder is not None:
                folder.log(record._asdict())
                if done % options.save_every == 0 or done == options.steps:
                    folder.save(gates, optimizer, step=done)
            if on_step is not None:
                on_step(record)
    pattern = _pattern(model, gates, options, longest)
    if out is not None:
        pattern.save(out)
    return pattern


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


def _train(
    backbone: nn.Module,
    gates: Gates,
    optimizer: torch.optim.Optimizer,
    dataset: PasskeyDataset,
    options: IdentifyOptions,
    *,
    start: int,
) -> Iterator[Step]:
    for step in range(start, options.steps):
        rate = options.learning_rate_at(step)
        optimizer.param_groups[0]["lr"] = rate
        distill = distillation(backbone, gates, dataset[step])
        penalty = gates.penalty()
        loss = distill + options.reg_weight * penalty
        if not torch.isfinite(loss):
            raise ValueError(
                f"loss must be finite, got {loss.item()} at step {step}: training diverged, and the last checkpoint is "
                f"as it was; use dtype bfloat16 or float32, or a lower learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.clamp_()
        yield Step(
            step=step,
            loss=loss.item(),
            distill=distill.item(),
            reg=penalty.item(),
            lr=rate,
            mean_gate=gates.values.mean().item(),
            share_above_half=(gates.values > 0.5).float().mean().item(),
        )


def _with_bar(steps: Iterator[Step], total: int, start: int) -> Iterator[Step]:
    from tqdm import tqdm

    with tqdm(total=total, initial=start, desc="identify", unit="step") as bar:
        for record in steps:
            bar.set_postfix_str(
                f"loss {record.loss:.4f}, mean gate {record.mean_gate:.2f}, "
                f"{record.share_above_half:.0%} above 0.5",
                refresh=False,
            )
            bar.update()
            yield record


def _gates(model: PreTrainedModel, options: IdentifyOptions) -> Gates:
    return Gates.of(
        model,
        sink=options.sink,
        recent=options.recent,
        initial=options.initial,
        teacher_full=options.teacher_full,
    )


def _identity(
    model: PreTrainedModel, ids: torch.Tensor, options: IdentifyOptions
) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    return {
        "options": options.that_matter(),
        "model": fingerprint(model),
        "text": token_digest(ids),
    }


def _dataset(
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    options: IdentifyOptions,
    longest: int,
) -> PasskeyDataset:
    dataset = PasskeyDataset(
        tokenizer,
        ids,
        context_min=options.context_min,
        context_max=longest,
        intervals=options.context_lengths,
        seed=options.seed,
        num_passkeys=options.num_passkeys,
        passkey_words=options.passkey_words,
        depths=(options.depth_min, options.depth_max),
        depth_steps=options.depth_steps,
    )
    # Needles may not fit into the shortest contexts, which must not be found out in the middle of a run.
    shortest = sorted(range(options.steps), key=dataset.context_length)[:_PROBED_SAMPLES]
    for step in shortest:
        _ = dataset[step]
    return dataset


def _pattern(
    model: PreTrainedModel, gates: Gates, options: IdentifyOptions, longest: int
) -> HeadPattern:
    from duohead.pattern import HeadPattern

    training = {**asdict(options), "context_max": longest, "method": "duoattention gates"}
    return HeadPattern.from_alpha(
        gates.alpha,
        model=model,
        sink=options.sink,
        recent=options.recent,
        base_revision=getattr(model.config, "_commit_hash", None),
        training=training,
    )
