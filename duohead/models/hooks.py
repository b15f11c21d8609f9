"""The two functions that transformers calls: attention by name, and the mask that goes with it.

Both are registered once under the name "duo". The policy comes from the attention module
(`duohead.models.interface` puts it there), the storage from the cache handle, the padding from the
mask. What they cannot honour they refuse, because every one of those cases runs without an error and
gives wrong tokens otherwise.

Shape letters: B rows, H query heads, G KV heads, Q query tokens, K key tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from duohead import attention
from duohead.cache import DUO_KV_OFFSET, DuoHandle
from duohead.cache.direct import direct_views
from duohead.models import opaque
from duohead.policy import HeadPolicy

NAME = "duo"
PLAN = "_duohead_plan"
# Arguments that models hand through and that do not change what attention computes here.
HARMLESS = frozenset(
    "cache_position output_attentions output_hidden_states output_router_logits position_ids return_dict use_cache "
    "logits_to_keep num_items_in_batch cache".split()
)


@dataclass(frozen=True)
class LayerPlan:
    """What the attention function finds on its module: the bound policy, its layer, and the implementation to use."""

    policy: HeadPolicy
    index: int
    impl: str


def duo_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "duo".

    Args:
        module: the attention module; carries the plan.
        query: [B, H, Q, D].
        key: a `DuoHandle` from our cache, or keys [B, G, K, D].
        value: the same handle, or values [B, G, K, Dv].
        attention_mask: 2-D padding mask or None, as `duo_mask` returns it.
        scaling: factor on the scores, by default D ** -0.5.
        dropout: must be 0.
        sliding_window: the layer's native window; must be the one that the policy was bound to.
        softcap: soft cap of the scores.
        s_aux: learned sink logits [H].
        is_causal: must not be False.
        kwargs: harmless arguments; anything else that is not None is an error.

    Returns:
        Outputs [B, Q, H, Dv] and None in place of weights.

    Raises:
        ValueError: something that the policy cannot honour; the message names it.
    """
    plan: LayerPlan | None = getattr(module, PLAN, None)
    if plan is None:
        raise ValueError(
            "attn_implementation='duo' needs a policy; use duohead.duo(model, policy) or duohead.enable(model, policy) "
            "instead of setting it by name"
        )
    _refuse(module, plan, dropout, sliding_window, is_causal, kwargs)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be 2-D (rows, tokens) with duohead, got {attention_mask.ndim}-D; the policy decides "
            f"who sees whom, so pass the tokenizer's padding mask"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "sink_logits": s_aux, "impl": plan.impl
    }  # fmt: skip
    if isinstance(key, DuoHandle):
        device = query.device
        name = attention.choose(plan.impl, device.type, index=device.index)
        kernels = name in attention.KERNELS
        in_graph = kernels and key.layer.addressed and torch.compiler.is_compiling()
        attend = opaque.attend_in_graph if in_graph else opaque.attend
        out = attend(query, key, attention_mask, **options)
    else:
        views = direct_views(
            plan.policy, plan.index, key, value, queries=query.shape[2], mask=attention_mask
        )
        out = attention.prefill(query, views, **options)
    return out.contiguous(), None  # some models take a view of it


def _refuse(
    module: nn.Module,
    plan: LayerPlan,
    dropout: float,
    sliding_window: int | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    if dropout and module.training:
        raise ValueError(
            f"attention dropout must be 0 with duohead, got {dropout}; call model.eval() or set it to 0"
        )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(
            "duohead needs causal attention, got is_causal=False; encoders are not supported"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False with duohead, whose attention forms no weights to return; "
            "run the model without it to see them"
        )
    unknown = sorted(
        name for name, given in kwargs.items() if given is not None and name not in HARMLESS
    )
    if unknown:
        raise ValueError(
            f"the model passes arguments to attention that duohead does not know: {', '.join(unknown)}; "
            f"run this model without duohead"
        )
    window = plan.policy.layers[plan.index].window
    positions = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    beyond = sliding_window is not None and positions is not None and sliding_window >= positions
    if sliding_window != window and not (window is None and beyond):
        raise ValueError(
            f"layer {plan.index} attends with sliding_window={sliding_window} but the policy was bound to a window of "
            f"{window}; bind the policy to this model (duo and enable do)"
        )


def duo_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function registered as "duo": the checked 2-D padding mask [B, tokens], or None without padding.

    Raises:
        ValueError: a mask that is more than causal (packed sequences, custom overlays), a cache that cannot be used, or
            padding between real tokens.
    """
    ours = kv_offset == DUO_KV_OFFSET
    if not ours:
        _check_foreign_cache(q_length, kv_length, q_offset, kv_offset)
    if not _is_plain(mask_function, windowed=local_size is not None):
        raise ValueError(
            "duohead supports causal masks with padding only, got a mask with an overlay (packed sequences with "
            "restarting position_ids, bidirectional blocks, prefix tuning or a custom mask); pass one sequence a row"
        )
    if attention_mask is None:
        return None
    if torch.compiler.is_compiling():
        return attention_mask
    return _checked(
        attention_mask, q_length, kv_length, q_offset, static=ours and isinstance(q_offset, Tensor)
    )


def _check_foreign_cache(
    q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int
) -> None:
    if isinstance(q_offset, Tensor) or kv_length != q_offset + q_length:
        if kv_offset:
            raise ValueError(
                "the cache has dropped tokens of native sliding windows, so sinks cannot be told; pass "
                "past_key_values=DuoCache(policy, model), or none and let duohead make it"
            )
        raise ValueError(
            f"keys of length {kv_length} do not end at the last query, as with a StaticCache or a prefix; pass "
            f"past_key_values=DuoCache(policy, model, max_length=...) for a static cache"
        )


def _is_plain(mask_function: Callable[..., Any], *, windowed: bool) -> bool:
    """Whether a mask function is transformers' own causal or sliding-window one, without overlays."""
    if mask_function is causal_mask_function:
        return True
    if not windowed:
        return False
    if torch.compiler.is_compiling():
        return True
    cells = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    parts = next((cell for cell in cells if isinstance(cell, tuple)), ())
    names = {getattr(part, "__qualname__", "").split(".")[0] for part in parts}
    return names == {"sliding_window_overlay", "causal_mask_function"}


def _checked(
    mask: Tensor, q_length: int, kv_length: int, q_offset: int | Tensor, *, static: bool
) -> Tensor | None:
    """The padding mask if it says anything; padded to the full length for a static cache, so that its shape stays."""
    tokens = int(q_offset) + q_length
    if mask.shape[1] < tokens or (mask.shape[1] > tokens and bool(mask[:, tokens:].any())):
        raise ValueError(
            f"attention_mask must cover the {tokens} tokens seen so far (past and new), got {mask.shape[1]} columns"
        )
    real = mask[:, :tokens].bool()
    if bool(real.all()):
        return None
    starts = (real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0]
    if bool((starts > 1).any()):
        raise ValueError(
            "attention_mask must have one run of real tokens per row (padding only at the ends), got a row with a gap; "
            "pad on the left and leave no padding between turns"
        )
    return F.pad(real, (0, kv_length - tokens)) if static else real


AttentionInterface.register(NAME, duo_attention)
AttentionMaskInterface.register(NAME, duo_mask)
