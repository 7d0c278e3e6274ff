"""The pocket model: 15 million parameters that find facts in long texts; its model card is `README.md` beside this."""

from pathlib import Path


def path() -> Path:
    """The folder to give to `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."""
    return Path(__file__).parent
