"""Several processes, one identification: which part of a sample is whose, and what goes between them.

Long contexts are split over the processes in equal runs of tokens. Everything in a model but attention works token by
token, and for attention an all-to-all trades tokens for heads and back (Ulysses, arXiv 2309.14509), so every process
attends with a few heads over the whole sequence. Use `torchrun --nproc-per-node 2 -m duohead identify ...`, or
`with joined() as ranks:` in a program that torchrun started.

Shape letters: B batch, H heads, T tokens, t tokens of one process, h heads of one process, D head size, P processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from duohead.shapes import LayerShape

Shared = TypeVar("Shared")
_LENGTH_BOUND = frozenset({"dynamic", "longrope"})
# Compiling kernels and reading a large model both happen while others wait.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among ``world``, of which ``sequence`` share each sample; ``group`` is those that share ours."""

    rank: int = 0
    world: int = 1
    sequence: int = 1
    group: Any = None

    @classmethod
    def of(cls, sequence: int | None = None, *, device: torch.device | None = None) -> Ranks:
        """The processes of the initialised process group, or this one alone.

        ``sequence`` is how many share a sample (None: all). Raises ValueError if that does not divide their number.
        """
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        shared = world if sequence is None else sequence
        if world % shared:
            raise ValueError(
                f"sequence_parallel must divide the number of processes, {world}, got {shared}; "
                "start more with torchrun --nproc-per-node N -m duohead identify ..., or leave it out"
            )
        if world == 1:
            return cls()
        kind = "cpu" if device is None else device.type
        mesh = init_device_mesh(
            kind, (world // shared, shared), mesh_dim_names=("sample", "sequence")
        )
        return cls(dist.get_rank(), world, shared, mesh.get_group("sequence"))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, logs and shows."""
        return self.rank == 0

    @property
    def samples(self) -> int:
        """Samples of one step."""
        return self.world // self.sequence

    @property
    def row(self) -> int:
        """Which sample of a step is ours."""
        return self.rank // self.sequence

    @property
    def place(self) -> int:
        """Which part of the sample is ours."""
        return self.rank % self.sequence

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block fails in one process it fails in all; the others raise ValueError with the first reason.

        The block must not wait for other processes itself.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        reasons: list[str | None] = [None] * self.world
        if self.world > 1:
            said = None if failure is None else f"{type(failure).__name__}: {failure}"
            dist.all_gather_object(reasons, said)
        if failure is not None:
            raise failure
        first = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if first is not None:
            raise ValueError(f"process {first} failed ({reasons[first]})")

    def share(self, given: Shared) -> Shared:
        """What the first process gives, in every process; it is pickled on the way, between processes of one job."""
        if self.world == 1:
            return given
        held: list[Any] = [given]
        dist.broadcast_object_list(held, src=0)
        result: Shared = held[0]
        return result

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor`` with every process's added up, in place, the same bits everywhere."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def part(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Our run of the token ids [T], and its positions: both [t].

        Ids are filled up at the end with copies of the last one, which no earlier token sees.
        """
        if self.sequence == 1:
            return ids, torch.arange(len(ids))
        tokens = -(-len(ids) // self.sequence)
        filled = torch.cat([ids, ids[-1:].expand(tokens * self.sequence - len(ids))])
        start = self.place * tokens
        return filled[start : start + tokens], torch.arange(start, start + tokens)

    def check(self, shapes: Sequence[LayerShape], config: Any) -> None:
        """Raise ValueError unless every layer's heads can be dealt out, and tokens meet in attention alone.

        ``config`` is the decoder's.
        """
        moving = _rope_types(config) & _LENGTH_BOUND
        if self.sequence > 1 and moving:
            raise ValueError(
                f"rotary positions of type {', '.join(sorted(moving))} follow the length of what a process sees, which "
                f"is not that of the sample; use sequence_parallel=1 (one sample for each process)"
            )
        for layer, shape in enumerate(shapes if self.sequence > 1 else ()):
            if not shape.num_kv_heads:
                raise ValueError(
                    f"layer {layer} mixes tokens without KV heads, which {self.sequence} processes cannot share; "
                    "use sequence_parallel=1 (one sample for each process)"
                )
            kv_heads, parts = shape.num_kv_heads, self.sequence
            heads = config.num_attention_heads
            if heads % parts or (kv_heads % parts and parts % kv_heads):
                raise ValueError(
                    f"layer {layer} has {heads} query heads and {kv_heads} KV heads, which {parts} processes cannot "
                    "share evenly; use a sequence_parallel that divides both"
                )

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From our tokens of all heads [B, H, t, D] to all tokens of our heads [B, h, T, D].

        Where there are fewer KV heads than processes, several get the same one.
        """
        if self.sequence == 1:
            return q, k, v
        copies = max(1, self.sequence // k.shape[1])
        k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
        dealt = [x.unflatten(1, (self.sequence, -1)).movedim(1, 0).flatten(1) for x in (q, k, v)]
        sizes = [part.shape[1] for part in dealt]
        received = _Exchange.apply(torch.cat(dealt, 1), self.group).split(sizes, 1)
        out = []
        for x, part in zip((q, k, v), received, strict=True):
            batch, heads, tokens, dim = x.shape
            shape = (batch, heads // self.sequence, tokens, dim)
            out.append(part.unflatten(1, shape).permute(1, 2, 0, 3, 4).flatten(2, 3))
        return out[0], out[1], out[2]

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back: from all tokens of our heads [B, h, T, D] to our tokens of all heads [B, H, t, D]."""
        if self.sequence == 1:
            return x
        dealt = x.unflatten(2, (self.sequence, -1)).movedim(2, 0)
        received: Tensor = _Exchange.apply(dealt.contiguous(), self.group)
        return received.movedim(0, 1).flatten(1, 2)

    def heads(self, per_head: Tensor) -> Tensor:
        """Our query heads' part of one number per query head [H]."""
        return per_head.chunk(self.sequence)[self.place] if self.sequence > 1 else per_head


class _Exchange(torch.autograd.Function):
    """Block p of what we hold goes to process p, and theirs come to us; [P, ...], and gradients the same way."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, blocks.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grads[0], ctx.group), None


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary positions in a config; models with several kinds of layers have one for each."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *rope.values()]
    return {kind["rope_type"] for kind in kinds if isinstance(kind, dict) and "rope_type" in kind}


@contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, on this process's GPU if there is one; nothing without torchrun.

    ``device`` is what the user asked for: a type alone, since torchrun says which one is whose.
    Raises ValueError for a device with a number, and for more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield Ranks.of()
        return
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda under torchrun, got {device!r}")
    place = None
    if kind == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if place.index >= torch.cuda.device_count():
            raise ValueError(
                f"each process needs a GPU of its own, and process {place.index} of this machine has none "
                f"({torch.cuda.device_count()} in all); lower --nproc-per-node"
            )
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place else "gloo", timeout=_PATIENCE, device_id=place)
    try:
        yield Ranks.of(device=place)
    finally:
        dist.destroy_process_group()


def refuse_tensor_parallel(model: Any) -> None:
    """Raise ValueError for a model whose heads are split over processes (``tp_plan``): gates are for all heads."""
    size = getattr(model, "tp_size", None) or 1
    if size > 1:
        raise ValueError(
            f"model must have all of its heads in every process, but {type(model).__name__} is split over {size} by "
            f"tensor parallelism; load it without tp_plan (processes then share a sample, and with --shard the weights)"
        )


def shard(model: Any, *, device: torch.device) -> None:
    """Freeze the model and spread the weights below its output layer over all processes (FSDP2), layer by layer.

    The model may be on the CPU: each layer moves to ``device`` just before it is spread. It stays frozen and sharded.
    Raises ValueError without several processes, or for a model without layers that can be told apart.
    """
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not (dist.is_initialized() and dist.get_world_size() > 1):
        raise ValueError("shard needs several processes; start them with torchrun, or leave it out")
    backbone: nn.Module = model.base_model
    layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"shard needs a model of layers, and {type(model).__name__} has none")
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(backbone, mesh=mesh)
