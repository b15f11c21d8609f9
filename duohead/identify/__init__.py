"""Finding the retrieval heads of a model: gates trained on passkeys, and other ways to rank heads under one roof.

The product is a `HeadPattern`, a file that any later run starts from. Use `identify(model, tokenizer, text)` for the
paper's way, or `score("kvzip", model, tokenizer, text)` for any of `duohead.identify.scorers.NAMES`.
"""

from duohead.identify.options import IdentifyOptions
from duohead.identify.scorers import score
from duohead.identify.train import Step, identify

__all__ = ["IdentifyOptions", "Step", "identify", "score"]
