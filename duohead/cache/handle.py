"""What `DuoLayer.update` returns in place of keys and values.

A transformers cache hands keys and values to attention without ever seeing the padding mask. This stands in for both,
so that attention can ask the layer what each head sees once it knows the mask, and store the new tokens in time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from duohead.cache import opened, stored
from duohead.cache.view import HeadView, StoredView
from duohead.codec import Encoded

if TYPE_CHECKING:
    from duohead.cache.layer import DuoLayer


class DuoHandle:
    """Stands in for keys and values between `DuoLayer.update` and attention; used once, in one of two ways.

    Either `open` gives views of the past beside the new tokens and `commit` stores those afterwards, or `append` stores
    them first and gives views of storage, which a few tokens at a time allow (`duohead.cache.stored.can_append`).
    """

    def __init__(self, layer: DuoLayer, keys: Tensor, values: Tensor) -> None:
        self.layer = layer
        self.keys = keys
        self.values = values
        # What `open` encoded for `commit` to store, one entry per kind; empty where a kernel does both.
        self.encoded: list[Encoded] = []
        self.opened = False

    def open(self, mask: Tensor | None) -> list[HeadView]:
        """The views to attend to, given the 2-D padding mask [B, tokens] or None."""
        self._use()
        return opened.open_handle(self, mask)

    def append(self, mask: Tensor | None) -> tuple[StoredView, ...]:
        """Store the new tokens and view what is stored then, given the 2-D padding mask [B, tokens] or None."""
        self._use()
        return stored.append(self.layer, self.keys, self.values, mask)

    def _use(self) -> None:
        if self.opened:
            raise ValueError(
                f"layer {self.layer.index} attends twice to the same keys and values, as models do that share KV "
                f"between layers; duohead does not support this model"
            )
        self.opened = True

    def commit(self) -> None:
        """Store the new tokens."""
        opened.commit(self)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{name!r}: a DuoCache was used with an attention implementation other than 'duo'; "
            f"run the model inside duohead.duo(model, policy) or after duohead.enable(model, policy)",
            name=name,
            obj=self,
        )
