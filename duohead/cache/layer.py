"""One layer of the cache: a store per kind of head, and the handle through which attention reads and commits it.

`update` cannot attend: it never sees the padding mask, which decides where a row's sinks are. So it returns a handle in
place of keys and values; the registered attention function opens it with the mask, attends, and commits the new tokens.
Eviction therefore happens after attention, and what a query sees does not depend on the chunk it came in.

Shape letters: B rows, G KV heads, K new tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from duohead import codec
from duohead.cache import stored
from duohead.cache.handle import DuoHandle
from duohead.cache.ring import RingStore
from duohead.cache.store import GrowingStore, StaticStore
from duohead.cache.view import StoredView, left_padding, pick_heads
from duohead.codec import Pair
from duohead.policy import HeadPolicy
from duohead.storage import Store

DEFAULT_ROLLBACK = 128
# Mask functions see only two integers of a cache; no other cache returns this offset, so it tells ours apart.
DUO_KV_OFFSET = -1


@dataclass
class Kind:
    """The heads of one kind in this layer (``heads`` None: all of them), and where and how their tokens live."""

    spec: Store
    heads: Tensor | None
    codec: Pair
    store: GrowingStore | StaticStore | RingStore


def no_waiting(device: torch.device) -> bool:
    """Whether the host must not wait for the device now: a graph is being compiled or captured."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DuoLayer(CacheLayerMixin):
    """Keys and values of one layer under a policy (see module docstring).

    Args:
        policy: the policy of the whole model.
        index: which layer of it this is.
        max_length: None for a cache that grows, else the tokens it is allocated for, with fixed addresses.
        rollback: tokens that `crop` can undo exactly once streaming heads have evicted.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = True

    def __init__(
        self, policy: HeadPolicy, index: int, *, max_length: int | None = None, rollback: int = 0
    ) -> None:
        super().__init__()
        self.policy = policy
        self.index = index
        self.max_length = max_length
        self.rollback = rollback
        self.is_compileable = max_length is not None
        self.record_past = False
        # Whether graphs may rely on the addresses: a static layer that was allocated outside of any.
        self.addressed = False
        self.length: int | Tensor = 0
        # The length on the host, while `DuoCache.counted` knows it: reading the device's would wait for all its work.
        self.counted: int | None = None
        self.padding: Tensor | None = None
        self.kinds: list[Kind] = []
        self._stored: dict[tuple[int | None, ...], tuple[StoredView, ...]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has addresses of its own."""
        self.__dict__.update(state)
        self._mark_static() if self.addressed else self._stored.clear()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create the stores for the rows, device and dtype of the first keys and values [B, G, K, D]."""
        heads = self.policy.layers[self.index].num_kv_heads
        if key_states.shape[1] != heads:
            raise ValueError(
                f"layer {self.index} got {key_states.shape[1]} KV heads but its policy has {heads}; "
                f"use a policy made for this model"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.kinds = [
            self._kind(spec, key_states, value_states) for spec in self.policy.stores(self.index)
        ]
        if self.max_length is not None:
            self.length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.is_initialized = True
        self._mark_static()

    def allocate(self, keys: Tensor, values: Tensor, *, padded: bool) -> None:
        """`lazy_initialization` ahead of the first tokens; ``padded`` rows get a place for their padding too."""
        self.lazy_initialization(keys, values)
        if padded:
            self.padding = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
            self._mark_static()

    def _kind(self, spec: Store, keys: Tensor, values: Tensor) -> Kind:
        heads = (
            torch.tensor(spec.heads, device=keys.device)
            if len(spec.heads) < keys.shape[1]
            else None
        )
        like = (pick_heads(keys[:, :, :0], heads), pick_heads(values[:, :, :0], heads))
        storage = codec.pair(spec.dtype, native=keys.dtype)
        store: GrowingStore | StaticStore | RingStore
        if spec.ring is not None:
            ring = spec.ring + self.rollback
            store = RingStore(storage, like, sink=spec.sink, ring=ring, max_length=self.max_length)
        elif self.max_length is not None:
            store = StaticStore(storage, like, max_length=self.max_length)
        else:
            store = GrowingStore(storage, like)
        return Kind(spec, heads, storage, store)

    def _mark_static(self) -> None:
        """Tell dynamo that the addresses are fixed, which CUDA graphs need; not possible while tracing."""
        self._stored.clear()
        if self.max_length is None or torch.compiler.is_compiling():
            return
        stored.register(self)
        self.addressed = True
        for tensor in (self.length, *self.tensors()):
            torch._dynamo.mark_static_address(tensor)

    def tensors(self) -> list[Tensor]:
        """Every tensor of a static layer whose address a graph relies on, but its length."""
        found: list[Any] = [self.padding]
        for kind in self.kinds:
            for segment in kind.store.segments():
                found += [*segment.keys, *segment.values]
            found += [getattr(kind.store, "floor", None), kind.heads]
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hand new keys and values [B, G, K, D] to the attention function; returns the same handle twice."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"this cache holds {self.batch_size} rows, got a batch of {key_states.shape[0]}; use a new cache, "
                f"or batch_repeat_interleave / batch_select_indices"
            )
        self._check_room(key_states.shape[2])
        handle = DuoHandle(self, key_states, value_states)
        return handle, handle

    def _check_room(self, count: int) -> None:
        """Refuse tokens beyond ``max_length`` where that needs no wait for the device."""
        if self.max_length is None or no_waiting(self.device):
            return
        if count > 1 or self.device.type == "cpu":
            needed = int(self.now()) + count
            if needed > self.max_length:
                raise ValueError(
                    f"max_length of this static cache is {self.max_length} tokens but {needed} are needed; "
                    f"make it with DuoCache(..., max_length={needed}) or more"
                )

    def now(self) -> int | Tensor:
        """The length: on the host where that is allowed, on the device inside a graph."""
        if no_waiting(self.device):
            return self.length
        return int(self.length) if self.counted is None else self.counted

    def stored_views(self, reaches: tuple[int | None, ...]) -> tuple[StoredView, ...]:
        """What each kind of head holds, for queries that see ``reaches`` back; a static layer keeps the answer."""
        if self.max_length is None:
            return tuple(stored.view(self, *both) for both in zip(self.kinds, reaches, strict=True))
        if reaches not in self._stored:
            self._stored[reaches] = tuple(
                stored.view(self, *both) for both in zip(self.kinds, reaches, strict=True)
            )
        return self._stored[reaches]

    def set_padding(self, mask: Tensor | None, count: int) -> None:
        """Left padding of the rows. It is settled by the prefill, so compiled decode steps do not look again."""
        if mask is None or (count == 1 and no_waiting(self.device)):
            return
        padding = left_padding(mask)
        self._check_padding(padding, count)
        if self.padding is None:
            self.padding = padding
            self._mark_static()
        else:
            self.padding.copy_(padding)

    def _check_padding(self, padding: Tensor, count: int) -> None:
        """Refuse padding that changes once tokens are stored, where that needs no wait for the device."""
        if no_waiting(self.device) or (count == 1 and self.device.type != "cpu"):
            return
        length = int(self.now())
        before = torch.zeros_like(padding) if self.padding is None else self.padding
        # A row that was nothing but padding so far may go on being padded.
        if length and not bool(((padding == before) | (before >= length)).all()):
            raise ValueError(
                f"attention_mask says that the rows have {padding.tolist()} padding tokens, but the {length} tokens in "
                f"this cache were stored with {before.tolist()}; pass the same padding mask from the first call on"
            )

    def recent_tokens(self, count: int, length: int | Tensor) -> int:
        """Local window of this call. While past is recorded, a few tokens on top of others are drafts: decoding."""
        drafting = (
            self.record_past and isinstance(length, int) and length > 0 and count <= self.rollback
        )
        return self.policy.window_tokens if count > 1 and not drafting else self.policy.recent

    def advance(self, count: int) -> None:
        """Count ``count`` more tokens."""
        if isinstance(self.length, Tensor):
            self.length.add_(count)
        else:
            self.length += count
        if not no_waiting(self.device) and self.counted is not None:
            self.counted += count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and an offset that marks this cache for our mask function."""
        if self.max_length is not None:
            return self.max_length, DUO_KV_OFFSET
        return int(self.length) + query_length, DUO_KV_OFFSET

    def get_seq_length(self) -> int:
        """Tokens so far, padding included (a tensor for the static form, as in transformers)."""
        return self.length  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Tokens that fit, or -1 when the cache grows."""
        return -1 if self.max_length is None else self.max_length

    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(kind.store.nbytes for kind in self.kinds)

    def reset(self) -> None:
        """Forget every token. The growing form gives its memory back, the static form keeps its addresses."""
        if self.max_length is None:
            self.length, self.padding, self.kinds, self.is_initialized = 0, None, [], False
            return
        for tensor in (
            self.length,
            self.padding,
            *(getattr(kind.store, "floor", None) for kind in self.kinds),
        ):
            if isinstance(tensor, Tensor):
                tensor.zero_()
        for kind in self.kinds:
            assert not isinstance(kind.store, GrowingStore), "a static layer has no growing store"
            # An overflow in one text must not reach the next: a masked NaN still spreads.
            kind.store.slots.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; ``tokens_to_remove`` is negative or zero, as in transformers.

        Raises:
            ValueError: a positive number, more tokens than there are, or one that needs evicted tokens back.
        """
        length = self.check_crop(tokens_to_remove)
        if tokens_to_remove == 0:
            return
        for kind in self.kinds:
            if isinstance(kind.store, RingStore):
                kind.store.crop(length)
        if isinstance(self.length, Tensor):
            self.length.fill_(length)
        else:
            self.length = length

    def check_crop(self, tokens_to_remove: int) -> int:
        """The length after `crop`, or the error that it would raise."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove must be zero or negative (minus the number of tokens), got {tokens_to_remove}"
            )
        length = int(self.length) + tokens_to_remove
        if length < 0:
            raise ValueError(
                f"tokens_to_remove must be at least {-int(self.length)}, the tokens there are, got {tokens_to_remove}"
            )
        for kind in self.kinds:
            if isinstance(kind.store, RingStore) and tokens_to_remove:
                self._check_crop(kind.spec, kind.store, length, -tokens_to_remove)
        return length

    def _check_crop(self, spec: Store, store: RingStore, length: int, removed: int) -> None:
        assert spec.ring is not None, "a ring store has a ring"
        window = self.policy.layers[self.index].window
        chunked = self.policy.visibility == "chunk" and not spec.sees_all
        seen = spec.ring if chunked and (window is None or spec.ring < window) else spec.ring - 1
        if store.lost(length - seen, length, self.padding):
            raise ValueError(
                f"cannot crop {removed} tokens: {spec.kind} heads of layer {self.index} have evicted tokens that the "
                f"next token would see; make the cache with DuoCache(..., rollback={removed}) or more"
            )

    def activate_past_recording(self) -> None:
        """Keep enough evicted tokens that later crops (speculative decoding) are exact; see ``rollback``."""
        self.record_past = True
        if self.rollback:
            return
        if self.max_length is not None:
            raise ValueError(
                "a static cache cannot start to record its past; make it with DuoCache(..., max_length=, rollback=), "
                "where rollback is the largest number of tokens to undo"
            )
        self.rollback = DEFAULT_ROLLBACK
        for kind in self.kinds:
            if isinstance(kind.store, RingStore) and kind.spec.ring is not None:
                kind.store.enlarge(kind.spec.ring + self.rollback, int(self.length), self.padding)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times in a row."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (integers, or a boolean mask of rows), in that order."""
        if not self.is_initialized:
            return
        index = torch.as_tensor(indices, device=self.device)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        for kind in self.kinds:
            kind.store.select_rows(index)
        if self.padding is not None:
            padding = self.padding.index_select(0, index)
            self.padding = self.padding.copy_(padding) if len(index) == self.batch_size else padding
        if len(index) != self.batch_size:
            self.batch_size = len(index)
            self._mark_static()

    def offload(self) -> NoReturn:
        """Not supported: a cache this small is meant to stay on its device."""
        raise ValueError(
            "DuoCache does not offload; lower retrieval_ratio or the storage precision instead"
        )

    prefetch = offload
