"""What the Triton prefill and its backward pass share: loading tiles, and how the work is cut into them.

Tile sizes are a small table with reasons instead of a tuner at run time, so that the same call always runs the same
code. Keys and values are loaded through Hopper's tensor memory accelerator where it exists, else through pointers.
Import this only where kernels are wanted: it imports Triton.

Shape letters: B rows, G KV heads, T tokens, D head size.
"""

# Kernels are written in Triton, which has types of its own.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Stands for "no limit" where a kernel compares distances between tokens.
UNLIMITED = 1 << 30
LOG2E = 1.4426950408889634
MAX_HEAD_SIZE = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What every GPU that Triton serves has for one program, in bytes; more is asked of the device.
_LEAST_SHARED = 48 << 10
# Bytes of a line of shared memory as the accelerator swizzles it, at most.
_LINE = 128


@triton.jit
def tile_of(source, row, head, row_step, head_step, step, first, low, high,
            WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows [first, first + BLOCK_N) of one head of [B, G, T, WIDTH], with zeros outside the tensor.

    By pointers, zeros also outside [low, high), so that what is masked later is at least finite.
    """
    if TMA:
        return source.load([row, head, first, 0]).reshape(BLOCK_N, BLOCK_W)
    else:
        n = tl.arange(0, BLOCK_N)
        w = tl.arange(0, BLOCK_W)
        inside = ((first + n >= low) & (first + n < high))[:, None]
        if WIDTH != BLOCK_W:
            inside = inside & (w < WIDTH)[None, :]
        # 64 bits for the start alone: a million tokens of 32 heads are beyond 2^31 elements.
        start = tl.cast(row, tl.int64) * row_step + tl.cast(head, tl.int64) * head_step
        source += start + tl.cast(first, tl.int64) * step
        return tl.load(source + n[:, None] * step + w[None, :], mask=inside, other=0.0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent without libdevice, which AMD and the interpreter name differently."""
    return 1 - 2 / (1 + tl.exp2(x * 2.885390081777927))


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work.

    Attributes:
        queries: queries of a tile.
        pack: query heads of one group in a tile; queries x pack rows in all.
        keys: keys of a tile.
        warps: warps of a program.
        stages: depth of the load pipeline.
        registers: limit for a thread, so that more programs fit on a multiprocessor; None for none; NVIDIA only.
    """

    queries: int
    pack: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """The compiler's options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None and torch.version.cuda is not None:
            options["maxnreg"] = self.registers
        return options

    def within(self, shared: int, row_bytes: int) -> Tiles:
        """These tiles, made smaller until a tile of queries and the pipeline of keys and values fit into ``shared``."""
        tiles = self
        while tiles._shared(row_bytes) > shared:
            if tiles.stages > 1:
                tiles = replace(tiles, stages=tiles.stages - 1)
            elif tiles.keys > 16:
                tiles = replace(tiles, keys=tiles.keys // 2)
            elif tiles.queries > 16:
                tiles = replace(tiles, queries=tiles.queries // 2)
            elif tiles.pack > 1:
                tiles = replace(tiles, pack=tiles.pack // 2)
            else:
                break
        return tiles

    def _shared(self, row_bytes: int) -> int:
        return (self.queries * self.pack + 2 * self.keys * self.stages) * row_bytes


def forward_tiles(
    dim: int, dtype: torch.dtype, *, group: int, queries: int, banded: bool, tma: bool, shared: int
) -> Tiles:
    """Tile sizes of the forward pass.

    Measured on an H100 and an H200, B1 H32 KV8. A tile of q queries visits recent + q keys of a band, so a band wants
    few queries of several heads. What the accelerator loads needs no registers for addresses, which leaves them to four
    warps with twice the rows each; with pointers, eight warps of at most 128 registers let two programs run at a time.

    Args:
        dim: the larger head size.
        dtype: of the tensors.
        group: query heads per KV head.
        queries: query tokens of the call.
        banded: whether queries see a band instead of everything.
        tma: whether the tensor memory accelerator loads.
        shared: shared memory of a program in bytes.
    """
    pack = pack_of(group, 4)
    two = min(pack, 2)
    if dtype == torch.float32:
        tiles = Tiles(32, two, 32, 4 * two, two)
    elif dim > 128:
        tiles = Tiles(128 // two, two, 64, 8, 2) if banded else Tiles(128, 1, 64, 8, 2)
    elif banded and pack == 1:
        # Without heads to pack, a wide tile would visit a wider band in vain.
        tiles = Tiles(64, 1, 64, 4, 2 if tma and (dim <= 64 or queries < 64) else 3)
    elif dim <= 64:
        tiles = (
            Tiles(64, 2, 64, 4, 3) if banded else Tiles(128, 1, 64, *((8, 4) if tma else (4, 3)))
        )
    elif banded:
        tiles = Tiles(64, 2, 64, 4, 2) if tma else Tiles(128 // pack, pack, 32, 8, 3, 128)
    else:
        tiles = Tiles(128 // two, two, 64, 8, 3)
    count = max(16, triton.next_power_of_2(queries))
    if count < tiles.queries:
        # What few queries leave empty, more heads of the group may fill.
        rows = tiles.queries * tiles.pack
        pack = min(rows // count, triton.next_power_of_2(group))
        warps = tiles.warps if count * pack == rows else 4
        tiles = replace(tiles, queries=count, pack=pack, warps=warps)
    return tiles.within(shared, dtype.itemsize * block_width(dim))


def pack_of(group: int, most: int) -> int:
    """The largest power of two up to ``most`` that wastes at most an eighth when it cuts a group of heads."""
    while triton.cdiv(group, most) * most * 7 > group * 8:
        most //= 2
    return most


def block_width(dim: int) -> int:
    """Columns of a tile for a head size: a power of two, and enough for the matrix units."""
    return max(16, triton.next_power_of_2(dim))


def refusal(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, softcap: float | None
) -> str | None:
    """Why the prefill kernels and their backward pass cannot take these tensors, or None if they can."""
    if query.device.type != "cuda" and not interpreted():
        return f"query is on {query.device.type}; the Triton kernels need a GPU"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing; the kernels are launched from Python"
    if query.dtype not in DTYPES:
        return f"dtype is {query.dtype}; the kernels take fp16, bf16 and fp32"
    if keys.dtype != query.dtype or values.dtype != query.dtype:
        return f"keys are {keys.dtype} and values {values.dtype}, but queries {query.dtype}"
    if max(keys.shape[-1], values.shape[-1]) > MAX_HEAD_SIZE:
        return f"head size is {max(keys.shape[-1], values.shape[-1])}; at most {MAX_HEAD_SIZE}"
    if scale <= 0 or (softcap is not None and softcap <= 0):
        return f"scale is {scale} and softcap {softcap}; both must be positive"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU."""
    return not isinstance(tile_of, triton.JITFunction)


def score_factors(scale: float, softcap: float | None) -> tuple[float, float, float]:
    """Factors on scores: to base 2 at last, into tanh, and out of it."""
    if softcap is None:
        return scale * LOG2E, 1.0, 1.0
    return LOG2E, scale / softcap, softcap


def accelerated(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator shall load all of [B, G, T, D].

    It needs Hopper or newer and everything in units of 16 bytes. It does not pay for fp32, which has no matrix units to
    feed (H200, backward pass: 13 ms by pointers, 32 ms by descriptors), nor for rows shorter than its lines.
    """
    if torch.version.hip or any(not x.is_cuda or x.itemsize > 2 for x in tensors):
        return False
    if torch.cuda.get_device_capability(tensors[0].device)[0] < 9:
        return False
    return all(
        x.data_ptr() % 16 == 0
        and x.numel() > 0
        and x.shape[-1] * x.itemsize >= _LINE
        and all(step > 0 and step * x.itemsize % 16 == 0 for step in x.stride()[:3])
        for x in tensors
    )


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """What the accelerator needs to load tiles of ``rows`` tokens from [B, G, T, D]."""
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), [1, 1, rows, block_width(x.shape[-1])]
    )


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program may have on the device of ``x``."""
    return _shared_memory(x.device.index or 0) if x.is_cuda else 1 << 30


@functools.cache
def _shared_memory(device: int) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED))
