"""Policies on transformers models: `duo`, `enable`, `disable`, reordered heads, and generation with chunked prefill."""

from duohead.models.interface import disable, duo, enable, policy_of, unwrap
from duohead.models.reorder import reorder_heads, restore_heads

__all__ = ["disable", "duo", "enable", "policy_of", "reorder_heads", "restore_heads", "unwrap"]
