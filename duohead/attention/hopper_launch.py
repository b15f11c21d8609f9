"""Compilation and launch of the own prefill kernel for Hopper, the `hopper_*.cu` beside this file.

NVRTC compiles it when a shape is first needed, which takes about a second; `cuda-bindings`, which CUDA builds of torch
bring, calls the driver. Tensors are described to the copy engine by tensor maps, which are kept for the addresses seen
last. Use `launch(shape, query, reads, out, ...)`; `duohead.attention.hopper_prefill` decides what a call reads.

Shape letters: B rows, H query heads, G KV heads of one kind, R query heads per KV head, Q query tokens, K new keys,
T keys of a tensor, S sink slots, P past tokens, D head size.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duohead.cache.view import KeysAndValues

LOG2E = 1.4426950408889634
# Keys that are fetched together at least; the band of a tile begins at a multiple of it.
UNIT = 16
WARP_GROUP_ROWS = 64
SLOTS = 4
# A reach that no text has, far from overflow.
EVERYTHING = 1 << 28
# A band this wide is treated as one that grows with the text.
LONG = 8192
THREADS = 384
# Keys and values of the heads that are worked on together, in bytes: what may stay in the L2 cache meanwhile.
SECTION_BYTES = 24 << 20
# The source, in the order in which its parts build on one another.
PARTS = ("hopper_instructions.cu", "hopper_tiles.cu", "hopper_prefill.cu")
_SMEM_ATTRIBUTE = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"


@dataclass(frozen=True)
class Shape:
    """What one compiled kernel is for: head size, query heads per KV head, keys in a block, fp16 instead of bf16."""

    dim: int
    group: int
    block: int
    half: bool

    @property
    def tokens(self) -> int:
        """Query tokens of a tile."""
        return 2 * (WARP_GROUP_ROWS // self.group)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of threads: keys and values in flight, queries, barriers, tiles, alignment."""
        keys = SLOTS * self.block * self.dim * 2
        return keys + 2 * 2 * WARP_GROUP_ROWS * self.dim * 2 + 1024 + 256


@dataclass(frozen=True)
class Reads:
    """What a view's heads read, in the order of tokens.

    Attributes:
        new: the new keys and values [B, G, K, D].
        ring: those of the past [B, G, P, D], P a multiple of UNIT, the newest last; None without.
        sinks: the sinks [B, G, S, D], or None.
        last: int64 [B or 1], position of the last new key, to which the last query belongs; negative for padding.
        skipped: int64 [B or 1], how many slots of the ring come before its first token that is no sink, or None.
        bound: positions below it are read as sinks; 0 without sinks.
        reach: tokens back that a query sees outside the sinks, its own included; `EVERYTHING` for no limit.
    """

    new: KeysAndValues
    ring: KeysAndValues | None
    sinks: KeysAndValues | None
    last: Tensor
    skipped: Tensor | None
    bound: int
    reach: int


def missing(index: int) -> str | None:
    """What CUDA device ``index`` lacks to compile and load a kernel, with the remedy; None if nothing.

    One empty kernel is compiled and loaded, once: NVRTC may not be there, or be newer than the driver. A full device
    says nothing about either, so that answer is not kept and the next call tries again.
    """
    try:
        return _lacking(index)
    except _FullError as error:
        return f"there was no memory left to load a trial kernel ({error}); free some, or use impl='triton'"


class _FullError(RuntimeError):
    """A trial that ended for want of memory."""


@functools.cache
def _lacking(index: int) -> str | None:
    """`missing`, as far as it stays so."""
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:  # its parent is not there
        found = None
    if found is None:
        return "cuda-bindings is not installed; pip install cuda-bindings, or use impl='triton'"
    try:
        _load(_compile('extern "C" __global__ void trial() {}'), b"trial", index)
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "OUT_OF_MEMORY" in str(error):
            raise _FullError(" ".join(str(error).split())) from error
        return (
            f"a trial kernel cannot be compiled and loaded ({' '.join(str(error).split())}); install an "
            f"nvidia-cuda-nvrtc that the driver supports, or use impl='triton'"
        )
    return None


def source(shape: Shape) -> str:
    """The kernel for one shape: constants, the parts, and in them the matrix instructions of these sizes."""
    folder = Path(__file__).parent
    text = "".join((folder / name).read_text(encoding="utf-8") for name in PARTS)
    constants = (
        f"#define D {shape.dim}\n#define R {shape.group}\n#define BN {shape.block}\n"
        f"#define HALF16 {int(shape.half)}\n#define INFINITY __int_as_float(0x7f800000)\n"
    )
    dtype = "f16" if shape.half else "bf16"
    instructions = _qk_step(shape.block, dtype) + _pv_step(shape.dim, dtype)
    return constants + text.replace("// @instructions@\n", instructions)


def _operands(count: int) -> str:
    return ", ".join(f"%{index}" for index in range(count))


def _registers(name: str, count: int) -> str:
    return ", ".join(f'"+f"({name}[{index}])' for index in range(count))


def _qk_step(block: int, dtype: str) -> str:
    """S (+)= Q K for 16 values of the head size, both from shared memory."""
    count = block // 2
    return f"""
__device__ __forceinline__ void qk_step(float (&s)[BN / 2], u64 q, u64 k, int more) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{block}k16.f32.{dtype}.{dtype} "
    "{{{_operands(count)}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}"
    : {_registers("s", count)} : "l"(q), "l"(k), "r"(more));
}}
"""


def _pv_step(dim: int, dtype: str) -> str:
    """O (+)= P V for 16 keys, P from registers and V from shared memory."""
    count = dim // 2
    weights = ", ".join(f"%{count + index}" for index in range(4))
    return f"""
__device__ __forceinline__ void pv_step(float (&o)[D / 2], const u32* p, u64 v, int more) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{dim}k16.f32.{dtype}.{dtype} "
    "{{{_operands(count)}}}, {{{weights}}}, %{count + 4}, p, 1, 1, 1;\\n}}"
    : {_registers("o", count)} : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(more));
}}
"""


def compiled(shape: Shape) -> bytes:
    """The machine code of one shape.

    Raises:
        RuntimeError: NVRTC refuses the source; the message holds its log.
    """
    return _compile(source(shape))


def _compile(text: str) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"hopper_prefill.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", b"--use_fast_math"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(result):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC cannot compile the kernel: {log.decode()}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value of a call into CUDA.

    Raises:
        RuntimeError: the call failed.
    """
    if int(answer[0]):
        raise RuntimeError(f"CUDA: {answer[0]!r}")
    return answer[1] if len(answer) > 1 else None


@functools.cache
def _function(shape: Shape, device: int) -> Any:
    """The loaded kernel; device is part of the key, since a module belongs to one context."""
    from cuda.bindings import driver

    function = _load(compiled(shape), b"attend", device)
    attribute = getattr(driver.CUfunction_attribute, _SMEM_ATTRIBUTE)
    _checked(driver.cuFuncSetAttribute(function, attribute, shape.shared_bytes))
    return function


def _load(code: bytes, name: bytes, device: int) -> Any:
    """A kernel of machine code, for one device.

    Raises:
        RuntimeError: the driver refuses it, for instance because it is older than the compiler.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.empty(1, device=device)  # makes the context, where nothing has run yet
        module = _checked(driver.cuModuleLoadData(code))
        return _checked(driver.cuModuleGetFunction(module, name))


@functools.lru_cache(maxsize=1024)
def _map(
    address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], half: bool
) -> bytes:
    """A tensor map: sizes and box from the innermost dimension on, strides in bytes of all but that one."""
    from cuda.bindings import driver

    kind = driver.CUtensorMapDataType
    rank = len(sizes)
    found = _checked(
        driver.cuTensorMapEncodeTiled(
            kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            rank,
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(side) for side in box],
            [driver.cuuint32_t(1)] * rank,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(found.getPtr(), 128)


def _head_map(x: Tensor, shape: Shape) -> bytes:
    """The map of queries or outputs [B, H, Q, D], a box holding the rows of one warp group."""
    rows, heads, tokens, dim = x.shape
    b, h, t, _ = (stride * x.element_size() for stride in x.stride())
    sizes = (dim, shape.group, tokens, heads // shape.group, rows)
    box = (64, shape.group, WARP_GROUP_ROWS // shape.group, 1, 1)
    return _map(x.data_ptr(), sizes, (h, t, shape.group * h, b), box, shape.half)


def _key_maps(x: Tensor, shape: Shape) -> bytes:
    """The maps of keys or values [B, G, T, D], with boxes of a block and of a unit: columns of 64 values lie apart."""
    rows, heads, tokens, dim = x.shape
    b, h, t, _ = (stride * x.element_size() for stride in x.stride())
    sizes, strides = (64, tokens, dim // 64, heads, rows), (t, 128, h, b)
    boxes = (64, shape.block, dim // 64, 1, 1), (64, UNIT, 1, 1, 1)
    return b"".join(_map(x.data_ptr(), sizes, strides, box, shape.half) for box in boxes)


def _aligned(x: Tensor) -> Tensor:
    """The tensor itself if the copy engine can read it, else a copy: 16 bytes, the last dimension contiguous."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    steps = (
        n * x.element_size() for n, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1
    )
    return x if fits and all(step % 16 == 0 and step > 0 for step in steps) else x.contiguous()


class Numbers(ctypes.Structure):
    """The kernel's `Numbers`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("last", "skipped", "heads")),
        *((name, ctypes.c_int) for name in ("last_step", "skipped_step")),
        *((name, ctypes.c_int) for name in ("queries", "keys", "sinks", "bound", "reach", "ring")),
        *((name, ctypes.c_int) for name in ("kv_heads", "rows", "tiles", "section")),
        ("scale_log2", ctypes.c_float),
    ]


def numbers(
    shape: Shape, reads: Reads, *, queries: int, heads: Tensor | None, scale: float
) -> Numbers:
    """What the kernel is told of a call, tensors by address, so that they must outlive it."""
    rows, kv_heads, tokens, dim = reads.new[0].shape
    # A band of the same width everywhere is walked along; a growing one starts with its longest tiles, so that none is
    # left over at the end, with as many heads at a time as the cache holds.
    token_bytes = 2 * dim * reads.new[0].element_size()
    section = max(1, SECTION_BYTES // (tokens * token_bytes)) if reads.reach >= LONG else 0
    held, sinks = (0 if pair is None else pair[0].shape[2] for pair in (reads.ring, reads.sinks))
    return Numbers(
        reads.last.data_ptr(),
        None if reads.skipped is None else reads.skipped.data_ptr(),
        None if heads is None else heads.data_ptr(),
        _row_step(reads.last),
        _row_step(reads.skipped),
        queries, tokens, sinks, reads.bound, reads.reach, held,
        kv_heads, rows, -(-queries // shape.tokens), section, scale * LOG2E,
    )  # fmt: skip


def _row_step(x: Tensor | None) -> int:
    """Elements from one batch row of [B or 1] to the next: none where one is for all."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def launch(
    shape: Shape,
    query: Tensor,
    reads: Reads,
    out: Tensor,
    *,
    heads: Tensor | None,
    scale: float,
    sink_logits: Tensor | None,
) -> None:
    """Attention of query [B, H, Q, D] into out [B, Q, H, D]; ``heads`` are the KV heads [G] that ``reads`` is about."""
    from cuda.bindings import driver

    query = _aligned(query)
    pairs = (reads.new, reads.ring or reads.new, reads.sinks or reads.new)
    keys, values = ([_aligned(pair[side]) for pair in pairs] for side in (0, 1))
    maps = [_head_map(query, shape), _head_map(out.transpose(1, 2), shape)]
    maps += [b"".join(_key_maps(x, shape) for x in side) for side in (keys, values)]
    heads = None if heads is None else heads.long()
    logits = None if sink_logits is None else sink_logits.float().contiguous()
    told = numbers(shape, reads, queries=query.shape[2], heads=heads, scale=scale)
    buffers = [ctypes.create_string_buffer(content, len(content)) for content in maps]
    arguments = [ctypes.addressof(buffer) for buffer in buffers]
    logits_at = ctypes.c_void_p(None if logits is None else logits.data_ptr())
    arguments += [ctypes.addressof(logits_at), ctypes.addressof(told)]
    packed = (ctypes.c_void_p * len(arguments))(*arguments)
    index = query.device.index
    blocks = min(
        told.tiles * told.kv_heads * told.rows,
        torch.cuda.get_device_properties(index).multi_processor_count,
    )
    _checked(
        driver.cuLaunchKernel(
            _function(shape, index),
            blocks, 1, 1, THREADS, 1, 1,
            shape.shared_bytes,
            torch.cuda.current_stream(query.device).cuda_stream,
            ctypes.addressof(packed),
            0,
        )
    )  # fmt: skip
