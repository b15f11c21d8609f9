"""Bytes of the KV cache as allocated, ours and that of the model alone with its native windows.

A claim about memory is worth what it is compared with, so the rival is transformers' `DynamicCache(config=...)`, in the
model's dtype and in FP8. A prompt and decoded tokens of random keys and values go through the real cache classes, layer
by layer, so that 128K tokens of a large model need few GiB and no weights: `for each in run(asked): print(line(each))`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from duohead.bench import laguna_card
from duohead.bench.footprint_cases import Asked, Kept, Range, Text
from duohead.bench.models import any_config
from duohead.policy import HeadPolicy
from duohead.shapes import LayerShape, layer_shapes
from duohead.storage import capacity

CHUNK = 8192
FP8 = torch.float8_e4m3fn
SHOWN = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes of one text under "transformers", "duo", or by the adapter's "card", and of the model's own cache."""

    impl: str
    text: Text
    dtype: torch.dtype
    kv_bytes: int
    own_bytes: int
    own_fp8_bytes: int
    kept: Kept | None = None
    policy: HeadPolicy | None = None


@dataclass(frozen=True)
class Least:
    """The least saving of a policy over a range of lengths, and the lengths at which the target is missed."""

    kept: Kept
    policy: HeadPolicy
    range: Range
    saving: float
    tokens: int
    missed: tuple[tuple[int, int], ...]


def run(asked: Asked) -> Iterator[Footprint | Least]:
    """Every number asked for, text by text, then range by range.

    Raises:
        ValueError: an unknown model or one without KV heads, a number out of range, or an unknown storage name.
    """
    made = any_config(asked.model)
    if not any(shape.num_kv_heads for shape in layer_shapes(made)):
        raise ValueError(f"--model must have layers with KV heads, got {asked.model!r} without any")
    policies = {kept: kept.policy(made, asked.dtype) for kept in asked.kept}
    for text in asked.texts:
        yield from _text(asked, text, made, policies)
    for kept, policy in policies.items():
        for lengths in asked.ranges:
            yield least_saving(kept, policy, lengths)


def _text(
    asked: Asked, text: Text, made: Any, policies: dict[Kept, HeadPolicy]
) -> Iterator[Footprint]:
    place: dict[str, Any] = {"batch": asked.batch, "device": asked.device}
    own, fp8 = (
        transformers_bytes(made, text, dtype=dtype, **place) for dtype in (asked.dtype, FP8)
    )
    yield Footprint("transformers", text, asked.dtype, own, own, fp8)
    yield Footprint("transformers", text, FP8, fp8, own, fp8)
    if asked.card:
        yield Footprint("card", text, FP8, laguna_card.mixed_bytes(text.tokens), own, fp8)
    for kept, policy in policies.items():
        size = duo_bytes(policy, made, text, **place)
        predicted = policy.kv_bytes(text.tokens, asked.batch)
        assert size == predicted, f"{size} bytes are allocated where the policy says {predicted}"
        yield Footprint("duo", text, asked.dtype, size, own, fp8, kept, policy)


def duo_bytes(
    policy: HeadPolicy,
    made: Any,
    text: Text,
    *,
    batch: int = 1,
    device: str | torch.device = "cpu",
) -> int:
    """Bytes that a growing `DuoCache` has allocated for keys, values and scales once it holds a text.

    Args:
        policy: bound to the model.
        made: the model's transformers config.
        text: what goes through it.
        batch: rows.
        device: where.
    """
    from duohead.cache import DuoCache
    from duohead.codec import parse_dtype

    cache = DuoCache(policy, made)
    dtype = parse_dtype(policy.native_dtype or torch.bfloat16)

    def held(index: int) -> int:
        layer = cache.layers[index]
        for keys, values in _tokens(policy.shapes[index], text, batch, dtype, device):
            handle, _ = layer.update(keys, values)
            handle.open(None)
            handle.commit()
        segments = [part for kind in layer.kinds for part in kind.store.segments()]
        size = _storage_bytes(x for part in segments for x in (*part.keys, *part.values))
        layer.reset()
        return size

    return _over_layers(policy.shapes, policy.layers, held)


def transformers_bytes(
    made: Any,
    text: Text,
    *,
    dtype: torch.dtype,
    batch: int = 1,
    device: str | torch.device = "cpu",
) -> int:
    """Bytes of the keys and values that transformers' `DynamicCache(config=made)` holds of a text, stored as ``dtype``.

    Its tensors are counted as they are seen, not the storage behind them, which after a prompt alone is all of it in a
    windowed layer too; that is in its favour.
    """
    from transformers import DynamicCache

    shapes = layer_shapes(made)
    cache = DynamicCache(config=made)

    def held(index: int) -> int:
        layer = cache.layers[index]
        drawn = torch.bfloat16 if dtype.itemsize == 1 else dtype
        for keys, values in _tokens(shapes[index], text, batch, drawn, device):
            layer.update(keys.to(dtype), values.to(dtype))
        size = int(layer.keys.nbytes + layer.values.nbytes)
        layer.keys = layer.values = None
        return size

    return _over_layers(shapes, shapes, held)


def least_saving(kept: Kept, policy: HeadPolicy, lengths: Range) -> Least:
    """The least saving against the model's own cache over every length of a range, by the byte formulas.

    Between two steps of our capacity our bytes stay while the others' grow, so what is least and what misses the target
    lies at the start of a step.
    """
    least: tuple[float, int] = (1.0, lengths.first)
    missed: list[tuple[int, int]] = []
    for first, last in _steps(lengths.first, lengths.last):
        ours = policy.kv_bytes(first)

        def saving(tokens: int, ours: int = ours) -> float:
            own = fp8_bytes(policy, tokens) if lengths.fp8 else policy.dense_kv_bytes(tokens)
            return 1 - ours / own

        least = min(least, (saving(first), first))
        enough = bisect_left(range(first, last + 1), lengths.target, key=saving) + first
        if enough > first and missed and missed[-1][1] == first - 1:
            missed[-1] = (missed[-1][0], enough - 1)
        elif enough > first:
            missed.append((first, enough - 1))
    return Least(kept, policy, lengths, *least, tuple(missed))


def fp8_bytes(policy: HeadPolicy, tokens: int) -> int:
    """Bytes of the model's own cache of one text, native windows respected, at one byte a number without scales."""
    return policy.dense_kv_bytes(tokens, dtype=torch.bfloat16) // 2


def line(found: Footprint | Least) -> str:
    """A number for people."""
    if isinstance(found, Least):
        first, last, target, fp8 = found.range
        than = "the model's own cache in fp8" if fp8 else "the model's own cache"
        share = (
            f"at least {found.saving:.1%} less"
            if found.saving >= 0
            else f"up to {-found.saving:.1%} more"
        )
        told = f"{found.kept}: from {first:,} to {last:,} tokens {share} than {than} (at {found.tokens:,})"
        if not found.missed:
            return told
        where = ", ".join(f"{low:,} to {high:,}" for low, high in found.missed[:SHOWN])
        more = f" and {rest} more ranges" if (rest := len(found.missed) - SHOWN) > 0 else ""
        return f"{told}; {f'not {target:.0%} less' if target else 'larger'} at {where}{more}"
    dtype = str(found.dtype).removeprefix("torch.")
    names = {
        "transformers": f"transformers {dtype}",
        "card": "the adapter's card",
        "duo": f"duo {found.kept}",
    }
    of_own, of_fp8 = found.kv_bytes / found.own_bytes, found.kv_bytes / found.own_fp8_bytes
    return (
        f"{found.text.prompt:7,} + {found.text.decode:<4,} {names[found.impl]:<60} {found.kv_bytes / 2**20:9.2f} MiB, "
        f"{of_own:6.1%} of the model's own, {of_fp8:6.1%} of it in fp8"
    )


def record_fields(found: Footprint | Least, asked: Asked) -> dict[str, Any]:
    """A number for `duohead.record.write_record`."""
    kept = {} if found.kept is None else asdict(found.kept)
    shape: dict[str, Any] = {"model": asked.model, "batch": asked.batch}
    if isinstance(found, Least):
        return {
            "op": "footprint.lengths",
            "impl": "duo",
            "shape": shape | kept | found.range._asdict(),
            "dtype": asked.dtype,
            "policy": found.policy,
            "numbers": {
                "least_saving": found.saving,
                "least_saving_tokens": found.tokens,
                "missed_tokens": found.missed,
            },
        }
    names = ("kv_bytes", "own_bytes", "own_fp8_bytes")
    numbers: dict[str, Any] = {name: getattr(found, name) for name in names}
    if found.impl == "card":
        numbers["base_kv_bytes"] = laguna_card.dense_bytes(found.text.tokens)
        base, mixed = laguna_card.PUBLISHED.get(found.text, (None, None))
        numbers |= {"published_base_mib": base, "published_mib": mixed}
    return {
        "op": "footprint",
        "impl": found.impl,
        "shape": shape | kept | found.text._asdict(),
        "dtype": found.dtype,
        "policy": found.policy,
        "numbers": numbers,
    }


def _steps(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The lengths of a range in runs for which our stores have the same number of slots."""
    while first <= last:
        end = min(capacity(first), last)
        yield first, end
        first = end + 1


def _tokens(
    shape: LayerShape, text: Text, batch: int, dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random keys and values of a text in the pieces that a model would hand to its cache."""
    generator = torch.Generator(device=device).manual_seed(0)
    count = min(CHUNK, text.prompt)
    keys, values = (
        torch.randn(
            batch, shape.num_kv_heads, count, width, generator=generator, device=device, dtype=dtype
        )
        for width in (shape.head_dim, shape.value_dim)
    )
    for start in range(0, text.prompt, CHUNK):
        new = slice(0, min(CHUNK, text.prompt - start))
        yield keys[:, :, new], values[:, :, new]
    for _ in range(text.decode):
        yield keys[:, :, :1], values[:, :, :1]


def _over_layers(
    shapes: Sequence[LayerShape], alike: Sequence[Hashable], held: Callable[[int], int]
) -> int:
    """The sum over layers with KV heads; of those equal in shape and in ``alike`` one is measured for all."""
    known: dict[Hashable, int] = {}
    total = 0
    for index, key in enumerate(zip(shapes, alike, strict=True)):
        if shapes[index].num_kv_heads:
            if key not in known:
                known[key] = held(index)
            total += known[key]
    return total


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece of memory once."""
    behind = {(x := tensor.untyped_storage()).data_ptr(): x.nbytes() for tensor in tensors}
    return sum(behind.values())
