"""The gates of the paper's identification: one fp32 number per KV head that blends full and streaming attention.

A head whose gate can fall to 0 without changing the model's answers does not need the long context, so the gates are
trained to be small while the blended model keeps the hidden states of the untouched one (arXiv 2410.10819, 2.3).
Use `with installed(model, gates) as backbone:` and inside it `distillation(backbone, gates, sample)`.

Shape letters: B batch, T tokens, H query heads, G KV heads, D head size, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duohead.identify.banded import Scores, full_attention, streaming_attention
from duohead.identify.borrow import borrowed
from duohead.identify.parallel import Ranks
from duohead.shapes import LayerShape, layer_shapes

if TYPE_CHECKING:
    from duohead.identify.assembly import Sample

IMPLEMENTATION = "duohead_gates"
_OWNER = "duohead_gates"
# What models pass along that does not change attention over one whole, unpadded sequence.
_IRRELEVANT = frozenset(
    "cache_position layer_idx logits_to_keep num_items_in_batch output_attentions output_hidden_states "
    "output_router_logits position_embeddings position_ids return_dict use_cache".split()
)


class Gates:
    """One trainable gate per KV head of every gated layer; layers with a native window or without KV have none.

    Args:
        shapes: the model's layers, from `duohead.shapes.layer_shapes`.
        sink, recent: what a streaming head sees, in tokens.
        initial: value that every gate starts from.
        teacher_full: take the full-attention term from the untouched model, without gradient, as the reference
            implementation does, instead of from the student's own keys, as the paper writes it.
        deterministic: on a GPU, take the kernels whose gradients are the same bits every time, which are slower.
        ranks: the processes that share the work; alone by default.
        device: where the gates live.

    ``values`` holds the gates of all layers in one fp32 parameter, so that an optimiser sees a single tensor.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        sink: int,
        recent: int,
        initial: float = 1.0,
        teacher_full: bool = False,
        deterministic: bool = True,
        ranks: Ranks | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not any(shape.gated for shape in shapes):
            raise ValueError(
                "model must have at least one layer with global attention, got none; a model whose layers all have a "
                "native sliding window or no KV cache has no retrieval heads to find"
            )
        self.shapes, self.sink, self.recent = tuple(shapes), sink, recent
        self.teacher_full, self.deterministic = teacher_full, deterministic
        self.ranks = ranks or Ranks()
        self._slices: dict[int, slice] = {}
        count = 0
        for layer, shape in enumerate(self.shapes):
            if shape.gated:
                self._slices[layer] = slice(count, count + shape.num_kv_heads)
                count += shape.num_kv_heads
        self.values = nn.Parameter(torch.full((count,), initial, device=device))
        self._teaching = False
        self._taught: dict[int, Tensor] = {}
        self._attended: set[int] = set()

    @classmethod
    def of(cls, model: Any, **options: Any) -> Gates:
        """Gates for every gated layer of a transformers model, on its device."""
        return cls(layer_shapes(model), device=model.device, **options)

    @property
    def alpha(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The gates as fp32 [layers, most KV heads of a layer]; NaN where there is no gate."""
        heads = max(shape.num_kv_heads for shape in self.shapes)
        alpha = np.full((len(self.shapes), heads), np.nan, dtype=np.float32)
        values = self.values.detach().float().cpu().numpy()
        for layer, place in self._slices.items():
            alpha[layer, : self.shapes[layer].num_kv_heads] = values[place]
        return alpha

    def penalty(self) -> Tensor:
        """The L1 regulariser: mean of the absolute gates, a scalar."""
        return self.values.abs().mean()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring every gate back into [0, 1]."""
        self.values.clamp_(0, 1)

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """While inside, the gates count as 1 and nothing is differentiated: the model is its untouched self.

        The block runs the model once. Raises ValueError if a gated layer did not come by: its gates would have no
        effect and all fall to 0 unnoticed.
        """
        self._teaching = True
        self._taught.clear()
        self._attended.clear()
        try:
            with torch.no_grad():
                yield
        finally:
            self._teaching = False
        missing = sorted(self._slices.keys() - self._attended)
        if missing:
            raise ValueError(
                f"layers {missing} of the model do not take their attention function from transformers' "
                "AttentionInterface, so their heads cannot be gated; identify the heads of another model"
            )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scores: Scores) -> Tensor:
        """Attention of one layer: ``q`` [B, H, T, D], ``k`` and ``v`` [B, G, T, D]; returns [B, H, T, D].

        Where processes share a sample, T counts our tokens; attention itself is over all tokens, of our heads.
        """
        kv_heads = self.shapes[layer].num_kv_heads
        if k.shape[1] != kv_heads:
            raise ValueError(
                f"layer {layer} attends with {k.shape[1]} KV heads but its config says {kv_heads}; "
                "only models that attend with the KV heads they cache can be identified"
            )
        self._attended.add(layer)
        groups = q.shape[1] // kv_heads
        if scores.sinks is not None:
            scores = replace(scores, sinks=self.ranks.heads(scores.sinks))
        out = self._blend(layer, *self.ranks.to_heads(q, k, v), scores=scores, groups=groups)
        return self.ranks.to_tokens(out)

    def _blend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scores: Scores, groups: int
    ) -> Tensor:
        window = self.shapes[layer].window
        if window is not None:
            return streaming_attention(q, k, v, sink=0, recent=window, scores=scores)
        if self.teacher_full and not self._teaching:
            full = self._taught[layer]
        else:
            full = full_attention(q, k, v, scores=scores, deterministic=self.deterministic)
        if self._teaching:
            if self.teacher_full:
                self._taught[layer] = full
            return full
        stream = streaming_attention(q, k, v, sink=self.sink, recent=self.recent, scores=scores)
        values = self.values[self._slices[layer]].to(q.device).repeat_interleave(groups)
        alpha = self.ranks.heads(values)[:, None, None]
        # The fp32 gate promotes half precision: near 1, bf16 could not tell neighbouring gates apart.
        return (alpha * full + (1 - alpha) * stream).to(q.dtype)


@contextmanager
def installed(
    model: Any, gates: Gates, *, gradient_checkpointing: bool = False
) -> Iterator[nn.Module]:
    """Route the attention of ``model`` through ``gates``; yields the backbone (the model without its output layer).

    Inside, the model is frozen, in evaluation mode and reads private copies of its configs. On exit configs, training
    flags and `requires_grad` are what they were; the state dict and the forward functions are never touched.

    Raises:
        ValueError: gradient checkpointing is asked for and the model has no layers that support it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, gated_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    with borrowed(model, gradient_checkpointing=gradient_checkpointing) as config:
        config._attn_implementation = IMPLEMENTATION
        setattr(config, _OWNER, gates)
        yield _backbone(model)


def _backbone(model: Any) -> nn.Module:
    """The model below its output layer, which distillation has no use for; also below a PEFT wrapper."""
    unwrap = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    backbone: nn.Module = inner.base_model
    return backbone


def gated_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    is_causal: bool | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention contract: ``query`` [B, H, T, D] to ([B, T, H, D], None)."""
    gates: Gates = getattr(module.config, _OWNER)
    layer: int = module.layer_idx
    unknown = {
        name: given
        for name, given in unknown.items()
        if given is not None and name not in _IRRELEVANT
    }
    if unknown or dropout or is_causal is False:
        names = [
            *sorted(unknown),
            *["dropout"] * bool(dropout),
            *["is_causal=False"] * (is_causal is False),
        ]
        raise ValueError(
            f"layer {layer} asks attention for {', '.join(names)}, which gate training does not support; "
            f"identify the heads of another model, or make a pattern with HeadPattern.from_alpha"
        )
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"gate training attends over one whole, unpadded sequence, got {query.shape[2]} queries, "
            f"{key.shape[2]} keys and {'no' if attention_mask is None else 'a'} mask; "
            "pass input_ids alone, with use_cache=False"
        )
    window = gates.shapes[layer].window
    tokens = query.shape[2] * gates.ranks.sequence
    if sliding_window is not None and sliding_window < tokens and window is None:
        raise ValueError(
            f"layer {layer} attends within {sliding_window} tokens but its config calls it global; "
            "identification cannot tell which of them is right"
        )
    scores = Scores(scaling=scaling, softcap=softcap, sinks=s_aux if s_aux is not None else sinks)
    out = gates.attend(layer, query, key, value, scores=scores)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """Transformers' mask contract: sequences are causal, whole and unpadded, so there is no mask to make."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask must be all ones, got padding; gate training takes one sequence at a time"
        )


def answer_positions(sample: Sample) -> Tensor:
    """The positions whose hidden states predict the answer tokens: int64 [A], each one before its token."""
    return torch.cat([torch.arange(start - 1, end - 1) for start, end in sample.answers])


def distillation(backbone: nn.Module, gates: Gates, sample: Sample) -> Tensor:
    """How far the gated model is from the untouched one on the sample's answers, a scalar in at least fp32.

    With student and teacher hidden states s and t after the last norm, and A answer tokens, it is
    ``sum over answer tokens of mean over hidden size of (s - t) ** 2, divided by A``. The paper's equation sums over
    the hidden size and all tokens; upstream's code takes the mean over the hidden size as here, but counts every token
    of question and answer and reads the hidden state at the token itself. Here only passkey tokens count, as in the
    paper, at the position that predicts them: the lookup of an answer's first word happens there and nowhere else.
    Where processes share the sample, each gets its tokens' part of the sum, and the gradients of these parts add up.
    """
    ids, places = gates.ranks.part(sample.input_ids)
    positions = answer_positions(sample)
    ours = positions[(positions >= places[0]) & (positions <= places[-1])] - places[0]
    inputs = {"input_ids": ids[None].to(gates.values.device)}
    if gates.ranks.sequence > 1:
        inputs["position_ids"] = places[None].to(gates.values.device)
    with gates.teaching():
        teacher = _hidden(backbone, inputs, ours)
    student = _hidden(backbone, inputs, ours)
    if gates.ranks.sequence == 1:
        loss = F.mse_loss(student, teacher)
    else:
        # Every process takes part in the backward pass of all, also one without an answer among its tokens.
        loss = F.mse_loss(student, teacher, reduction="sum") / (len(positions) * student.shape[1])
    return loss.to(gates.values.device)


def _hidden(backbone: nn.Module, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
    hidden = backbone(**inputs, use_cache=False).last_hidden_state[0]
    hidden = hidden[positions.to(hidden.device)]
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
