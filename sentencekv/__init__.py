"""Long-context decoding for Hugging Face causal language models.

Read a text once, keep every sentence's KV in host memory, and fetch for each generated token only the sentences that
matter to it: `LongContextLM.from_pretrained(...).read(text).ask(question)`.
"""

from sentencekv.attention import UnsupportedModelError
from sentencekv.config import Config
from sentencekv.generation import Generation, LogLikelihood, Perplexity, Source, Stats
from sentencekv.lm import Document, GenerationStream, LongContextLM
from sentencekv.sampling import SamplingOptions

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Document",
    "Generation",
    "GenerationStream",
    "LogLikelihood",
    "LongContextLM",
    "Perplexity",
    "SamplingOptions",
    "Source",
    "Stats",
    "UnsupportedModelError",
]
