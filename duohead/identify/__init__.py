"""Finding the retrieval heads of a model: passkey samples, trainable gates, and the loop that trains them.

The product is a `HeadPattern`, a file that any later run starts from. Use `identify(model, tokenizer, text)`.
"""

from duohead.identify.options import IdentifyOptions
from duohead.identify.train import Step, identify

__all__ = ["IdentifyOptions", "Step", "identify"]
