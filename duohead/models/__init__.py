"""Policies on transformers models: `duo`, `enable`, `disable`, and generation with chunked prefill."""

from duohead.models.interface import disable, duo, enable, policy_of, unwrap

__all__ = ["disable", "duo", "enable", "policy_of", "unwrap"]
