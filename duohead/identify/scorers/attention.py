"""Statistics of a model's own attention: what its heads look at, taken inside its attention function, a block at a
time.

Queries and keys are seen where the model attends with them, after q/k norms and positions, so every architecture that
the gates can be installed in can be looked at, and nothing quadratic in the length is ever held for all heads at once.
Use `observe(model, samples, statistic)`; the statistic takes what it needs from `weights(q, k, rows, scores=scores)`.

Shape letters: B batch, T tokens, G KV heads, P query heads per KV head, D head size, R query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from duohead.identify import haystack
from duohead.identify.banded import Scores
from duohead.identify.gates import Gates, installed
from duohead.mask import visible
from duohead.shapes import layer_shapes, text_config

# Numbers in the largest tensor that `weights` makes: 256 MiB in fp32.
BLOCK = 1 << 26

Statistic = Callable[[Tensor, Tensor, Scores], Tensor]


class _Observer(Gates):
    """The untouched model, with an eye on the queries and keys of its gated layers."""

    def __init__(self, model: Any, statistic: Statistic) -> None:
        super().__init__(layer_shapes(model), sink=0, recent=1, device=model.device)
        self._statistic = statistic
        self.seen: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scores: Scores) -> Tensor:
        out = super().attend(layer, q, k, v, scores=scores)
        if self.shapes[layer].gated:
            self.seen[layer] = self._statistic(q, k, scores)
        return out


def observe(
    model: Any, samples: Iterable[Tensor], statistic: Statistic, *, progress: bool
) -> dict[int, Tensor]:
    """Mean over ``samples`` of a statistic of every gated layer, as fp64 on the CPU, by layer.

    Args:
        model: a transformers causal language model, left as it was found.
        samples: token ids [B, T] each, without padding; every one is one forward pass.
        statistic: of ``q`` [B, G * P, T, D], ``k`` [B, G, T, D] and their `Scores`, to a tensor of any fixed shape.
        progress: show a bar, one step per sample.

    Raises:
        ValueError: the model cannot be gated; the message says why.
    """
    from tqdm import tqdm

    observer = _Observer(model, statistic)
    total: dict[int, Tensor] = {}
    count = 0
    with installed(model, observer) as backbone:
        for ids in tqdm(samples, desc="observe", unit="pass", disable=not progress):
            with observer.teaching():
                backbone(input_ids=ids.to(model.device), use_cache=False)
            for layer, seen in observer.seen.items():
                seen = seen.cpu().double()
                total[layer] = total[layer] + seen if layer in total else seen
            count += 1
    return {layer: value / count for layer, value in total.items()}


def weights(
    q: Tensor, k: Tensor, rows: Tensor, *, scores: Scores
) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention weights of some queries of one sequence, a block of rows at a time.

    ``q`` [1, G * P, T, D], ``k`` [1, G, T, D], ``rows`` int64 [R] ascending positions. Yields parts of ``rows`` [r]
    with their causal weights [G, P, r, K] in at least fp32, K being the last of the rows + 1. No tensor made here has
    more than `BLOCK` numbers, or one row's if those are more.
    """
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    size = max(1, BLOCK // (q.shape[1] * k.shape[2]))
    dtype = torch.promote_types(q.dtype, torch.float32)
    scaling = q.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    keys = k[0].to(dtype)
    for part in rows.to(q.device).split(size):
        reach = int(part[-1]) + 1
        # Query heads of a group side by side, so that the product needs no copy of the keys for each.
        queries = q[0, :, part].to(dtype).unflatten(0, (kv_heads, groups)).flatten(1, 2)
        logits = queries @ keys[:, :reach].mT
        logits = logits.mul_(scaling).unflatten(1, (groups, len(part)))
        if scores.softcap is not None:
            logits = logits.div_(scores.softcap).tanh_().mul_(scores.softcap)
        logits.masked_fill_(torch.arange(reach, device=q.device) > part[:, None], -torch.inf)
        yield part, _softmax(logits, scores.sinks)


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax in place over the last dimension of [G, P, r, K], with a logit [G * P] that carries no value."""
    top = logits.amax(-1, keepdim=True)
    if sinks is None:
        return logits.sub_(top).exp_().div_(logits.sum(-1, keepdim=True))
    extra = sinks.to(logits).reshape(*logits.shape[:2], 1, 1)
    top = torch.maximum(top, extra)
    logits.sub_(top).exp_()
    return logits.div_(logits.sum(-1, keepdim=True) + (extra - top).exp())


def out_of_window(rows: Tensor, keys: Tensor, *, sink: int, recent: int) -> Tensor:
    """Which keys a streaming head does not see although they came before: bool [R, K] of positions [R] and [K]."""
    i, j = rows[:, None], keys[None]
    seen = visible(i, j, retrieval=False, sink=sink, recent=recent)
    return (j <= i) & ~seen


def by_kv_head(values: Tensor) -> Tensor:
    """[G, P, ...] to [G, ...]: the largest of a group's query heads.

    They share one cache entry, so it has to be kept as soon as one of them needs it, however little the others do.
    """
    return values.amax(1)


def score_matrix(model: Any, values: Mapping[int, Tensor]) -> Tensor:
    """Raw scores fp32 [layers, most KV heads of a layer] from scores [G] by gated layer; NaN elsewhere."""
    shapes = layer_shapes(model)
    matrix = torch.full((len(shapes), max(shape.num_kv_heads for shape in shapes)), torch.nan)
    for layer, row in values.items():
        matrix[layer, : len(row)] = row.float()
    return matrix


def context_length(
    model: Any,
    asked: int | None,
    *,
    default: int,
    window: int = 0,
    passes: int = 1,
    more: int = 0,
    name: str = "context",
) -> int:
    """Tokens of context: what was ``asked`` for, or else ``default``, fewer if the model has too few positions.

    ``passes`` times as many tokens and ``more`` must fit into the positions, and more than ``window`` tokens are
    needed, or every head sees everything.

    Raises:
        ValueError: what was asked for, or what the model has room for, is out of these bounds; it calls it ``name``.
    """
    positions = getattr(text_config(model), "max_position_embeddings", None)
    limit = None if positions is None else (positions - more) // passes
    if asked is not None and limit is not None and asked > limit:
        raise ValueError(
            f"{name} must not exceed {limit} for a model of {positions} positions, got {asked}; ask for fewer tokens"
        )
    length = asked if asked is not None else default if limit is None else min(default, limit)
    if length <= window:
        raise ValueError(
            f"sink and recent must leave something of {length} tokens out of sight, but {name} must be above {window} "
            f"for that; lower sink or recent, or ask for more tokens"
        )
    return length


def excerpts(
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    length: int,
    count: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """``count`` random passages of ``text``, int64 [length] each, without special tokens.

    Raises ValueError if the text is shorter than one passage.
    """
    ids = haystack.tokens(text, tokenizer, at_least=length, at_most=haystack.PER_CONTEXT * length)
    places = torch.randint(len(ids) - length + 1, (count,), generator=generator).tolist()
    return [ids[place : place + length] for place in places]


def first_token(tokenizer: Any) -> Tensor:
    """What the tokenizer itself puts before a text: its start token, int64 [1], or nothing, [0]."""
    bos = tokenizer.bos_token_id
    given = tokenizer("a")["input_ids"][:1]
    return torch.tensor(given if bos is not None and given == [bos] else [], dtype=torch.long)
