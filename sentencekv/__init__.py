"""Long-context decoding for Hugging Face causal language models.

Read a text once, keep every sentence's KV in host memory, and fetch for each generated token only the sentences that
matter to it: `LongContextLM.from_pretrained(...).read(text).ask(question)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentencekv.attention import UnsupportedModelError
    from sentencekv.config import Config
    from sentencekv.disk import SavedFileError
    from sentencekv.document import Conversation, Document, GenerationStream
    from sentencekv.generation import Generation, LogLikelihood, Perplexity, Source, Stats
    from sentencekv.lm import LongContextLM
    from sentencekv.sampling import SamplingOptions

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Conversation",
    "Document",
    "Generation",
    "GenerationStream",
    "LogLikelihood",
    "LongContextLM",
    "Perplexity",
    "SamplingOptions",
    "SavedFileError",
    "Source",
    "Stats",
    "UnsupportedModelError",
]

_HOMES = {
    "Config": "config",
    "Conversation": "document",
    "Document": "document",
    "Generation": "generation",
    "GenerationStream": "document",
    "LogLikelihood": "generation",
    "LongContextLM": "lm",
    "Perplexity": "generation",
    "SamplingOptions": "sampling",
    "SavedFileError": "disk",
    "Source": "generation",
    "Stats": "generation",
    "UnsupportedModelError": "attention",
}


def __getattr__(name: str) -> object:
    # Importing the package costs little: torch and transformers, seconds, come when a name that needs them is used.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
