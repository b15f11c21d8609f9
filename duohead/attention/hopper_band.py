"""Streaming prefill on Hopper: the own kernel of `hopper_band.cu`, its compilation and its launch.

A tile of queries reads nothing but its sinks and its band, a block of keys at a time, so
the time is linear in the length and close to what the tensor cores allow. NVRTC compiles the kernel for a head size, a
group and a block size when it is first needed (about a second); `cuda-bindings`, which CUDA builds of torch bring,
launches it.
Use `attend(query, view, out, scale=..., kv_heads=...)` after `supports` has said that it can.

Shape letters: B rows, H query heads, G KV heads of one kind, R query heads per KV head, Q query tokens, K new keys,
S sink slots, P ring slots, D head size.
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

from duohead.cache.view import HeadView, KeysAndValues

LOG2E = 1.4426950408889634
UNIT = 16
WARP_GROUP_ROWS = 64
SLOTS = 4
THREADS = 384
# Largest block of keys for a head size: registers and shared memory end there.
BLOCKS = {64: (96, 112, 128, 144, 160, 176, 192), 128: (96, 112, 128, 144, 160)}
# Tiles of a band that grows with the text this far are started longest first, so that none is left over at the end.
LONG = 4096
# What the start of one more block costs, in keys.
BLOCK_COST = 16
_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_SMEM_ATTRIBUTE = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"


def supports(
    query: Tensor,
    view: HeadView,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> str | None:
    """None if `attend` can do this, else why not.

    Args:
        query: [B, H, Q, D], all heads.
        view: what the heads of one kind see.
        softcap: cap on the scores, or None.
        sink_logits: learned logits [H], or None.
    """
    device = query.device
    if (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) != (9, 0)
    ):
        return "the kernel is for Hopper GPUs; use impl='triton'"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace the kernel; compile decode only"
    return _missing() or unfit(query, view, softcap=softcap, sink_logits=sink_logits)


def unfit(
    query: Tensor, view: HeadView, *, softcap: float | None, sink_logits: Tensor | None
) -> str | None:
    """What of the call itself the kernel does not do, on any machine; None if nothing."""
    if view.chunk_start is not None:
        return "visibility='chunk' is for reproducing published numbers; use impl='tiled'"
    if view.reach is None:
        return "the kernel is for heads with a band, and these see everything"
    if view.window is not None and view.sinks is not None:
        return "the kernel does not limit sinks by a native window; use impl='triton'"
    if softcap is not None:
        return "the kernel does not cap scores; use impl='triton'"
    sizes = {x.shape[-1] for x in (query, view.keys, view.values)}
    if len(sizes) > 1 or not sizes <= BLOCKS.keys():
        return f"head sizes must be equal and one of {list(BLOCKS)}, got {sorted(sizes)}"
    if query.dtype not in _DTYPES or {view.keys.dtype, view.values.dtype} != {query.dtype}:
        return f"the kernel takes fp16 and bf16, got queries of {query.dtype} and keys of {view.keys.dtype}"
    inputs = (query, view.keys, view.values, sink_logits)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return "gradients are asked for; use impl='tiled' or torch.no_grad()"
    return None


def attend(
    query: Tensor,
    view: HeadView,
    out: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    kv_heads: int | None = None,
) -> None:
    """Write the outputs of a view's heads into ``out`` at their original places; the other heads stay as they were.

    Args:
        query: [B, H, Q, D], all heads; query head h belongs to KV head h // (H / kv_heads).
        view: what its heads see.
        out: [B, Q, H, D], all heads.
        scale: factor on the scores.
        softcap: None; `supports` refuses others.
        sink_logits: learned logit per query head [H] in the softmax, without a value, or None.
        kv_heads: KV heads of the layer, of all kinds; needed if ``view.heads`` is given.

    Raises:
        ValueError: ``kv_heads`` is missing, or the call is one that `supports` refuses.
    """
    reason = unfit(query, view, softcap=softcap, sink_logits=sink_logits)
    if reason is not None:
        raise ValueError(f"the Hopper kernel cannot do this call: {reason}")
    if kv_heads is None:
        if view.heads is not None:
            raise ValueError("kv_heads must be given for a view of some of the heads, got None")
        kv_heads = view.keys.shape[1]
    if query.shape[2] == 0:
        return
    group = query.shape[1] // kv_heads
    reads = gather(view, query.shape[2])
    dim = query.shape[-1]
    shape = Shape(dim, group, block_for(reads, group, dim), query.dtype == torch.float16)
    with torch.cuda.device(query.device):
        _launch(shape, query, reads, out, view, scale=scale, sink_logits=sink_logits)


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
        """Shared memory of a block of threads: keys and values in flight, two tiles of queries, barriers, alignment."""
        keys = SLOTS * self.block * self.dim * 2
        return keys + 2 * 2 * WARP_GROUP_ROWS * self.dim * 2 + 1024 + 256


@dataclass(frozen=True)
class Reads:
    """What a view's heads read, in the order of tokens.

    Attributes:
        new: the new keys and values [B, G, K, D].
        ring: those of the past [B, G, P, D], P a multiple of UNIT, the newest last; None without.
        sinks: the sinks [B, G, S, D], or None.
        facts: int32 [B, 2]: index of the first key that is a real token and no sink, counted from the first new key
            (negative in the ring); position of query 0.
        reach: tokens back that a query sees outside the sinks, its own included.
    """

    new: KeysAndValues
    ring: KeysAndValues | None
    sinks: KeysAndValues | None
    facts: Tensor
    reach: int


def gather(view: HeadView, queries: int) -> Reads:
    """Sort the ring of a view whose ``queries`` belong to its last keys, without waiting for the device."""
    reach = view.reach
    assert reach is not None, "a view without a band is not for this kernel"
    ring, ring_position = _in_order(view)
    # Positions ascend, so what is no token or is read as a sink comes first, in the ring and in the new keys.
    bound = 0 if view.sinks is None else view.sink
    new, held = view.keys.shape[2], ring_position.shape[-1]
    last = view.key_position[:, -1]
    low = (bound + new - 1 - last).clamp(0, new)
    if held:
        low = low + (ring_position < bound).sum(-1) - held
    start = last - (queries - 1)
    facts = torch.stack([low, start], dim=-1).int().expand(view.keys.shape[0], 2).contiguous()
    sinks = None
    if view.sinks is not None and view.sinks.position.shape[-1]:
        sinks = view.sinks.read()
    return Reads((view.keys, view.values), ring, sinks, facts, reach)


def _in_order(view: HeadView) -> tuple[KeysAndValues | None, Tensor]:
    """The past in the order of its positions, empty slots first, and these positions [B or 1, P]."""
    if not view.past:
        return None, view.key_position[:, :0]
    position = torch.cat([piece.position for piece in view.past], dim=-1)
    missing = -position.shape[-1] % UNIT
    position, order = torch.nn.functional.pad(position, (0, missing), value=-1).sort(dim=-1)
    read = [piece.read() for piece in view.past]
    found = []
    for parts in zip(*read, strict=True):
        x = torch.cat(parts, dim=2)
        # A slot that was added, or was empty, is hidden, so any finite keys will do.
        index = order.clamp(max=x.shape[2] - 1)
        if index.shape[0] == 1:
            found.append(x.index_select(2, index[0]))
        else:
            found.append(
                x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
            )
    return (found[0], found[1]), position


def block_for(reads: Reads, group: int, dim: int) -> int:
    """The block size with the least waste for tiles in the middle of a long text."""
    tokens = 2 * (WARP_GROUP_ROWS // group)
    band = -(-(tokens + reads.reach - 1) // UNIT)
    sinks = 0 if reads.sinks is None else -(-reads.sinks[0].shape[2] // UNIT)
    keys = (band + sinks) * UNIT
    return min(BLOCKS[dim], key=lambda block: (-(-keys // block) * (block + BLOCK_COST), block))


@functools.cache
def _missing() -> str | None:
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:  # its parent is not there
        found = None
    if found is None:
        return "cuda-bindings is not installed; pip install cuda-bindings, or use impl='triton'"
    return None


def source(shape: Shape) -> str:
    """The kernel for one shape: constants, the matrix instructions of these sizes, and `hopper_band.cu`."""
    text = (Path(__file__).parent / "hopper_band.cu").read_text(encoding="utf-8")
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
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source(shape).encode(), b"band.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", b"--use_fast_math"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(result):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC cannot compile the kernel for {shape}: {log.decode()}")
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

    module = _checked(driver.cuModuleLoadData(compiled(shape)))
    function = _checked(driver.cuModuleGetFunction(module, b"attend"))
    attribute = getattr(driver.CUfunction_attribute, _SMEM_ATTRIBUTE)
    _checked(driver.cuFuncSetAttribute(function, attribute, shape.shared_bytes))
    return function


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


class _Numbers(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("queries", "keys", "sinks", "reach", "ring")),
        *((name, ctypes.c_int) for name in ("kv_heads", "rows", "tiles", "longest_first")),
        ("scale_log2", ctypes.c_float),
    ]


def _launch(
    shape: Shape,
    query: Tensor,
    reads: Reads,
    out: Tensor,
    view: HeadView,
    *,
    scale: float,
    sink_logits: Tensor | None,
) -> None:
    from cuda.bindings import driver

    query = _aligned(query)
    pairs = (reads.new, reads.ring or reads.new, reads.sinks or reads.new)
    keys, values = ([_aligned(pair[side]) for pair in pairs] for side in (0, 1))
    maps = [_head_map(query, shape), _head_map(out.transpose(1, 2), shape)]
    maps += [b"".join(_key_maps(x, shape) for x in side) for side in (keys, values)]
    rows, kv_heads, tokens, _ = keys[0].shape
    tiles = -(-query.shape[2] // shape.tokens)
    held, sinks = (0 if pair is None else pair[0].shape[2] for pair in (reads.ring, reads.sinks))
    numbers = _Numbers(
        query.shape[2], tokens, sinks, reads.reach, held, kv_heads, rows, tiles,
        int(reads.reach > LONG), scale * LOG2E,
    )  # fmt: skip
    logits = None if sink_logits is None else sink_logits.float().contiguous()
    heads = None if view.heads is None else view.heads.long()
    pointers = [
        ctypes.c_void_p(0 if x is None else x.data_ptr()) for x in (reads.facts, heads, logits)
    ]
    buffers = [ctypes.create_string_buffer(content, len(content)) for content in maps]
    arguments = [ctypes.addressof(buffer) for buffer in buffers]
    arguments += [ctypes.addressof(x) for x in (*pointers, numbers)]
    packed = (ctypes.c_void_p * len(arguments))(*arguments)
    index = query.device.index
    blocks = min(
        tiles * kv_heads * rows, torch.cuda.get_device_properties(index).multi_processor_count
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
