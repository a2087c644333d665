"""Pretrain one Transformer on text, images and audio; search across the three; tune it.

*Tokenizers* turn raw text, images and audio into tokens; one shared *backbone* reads them; *objectives* train it on
*shards*; *heads* adapt it to retrieval, vision and language.
"""

__version__ = "0.1.0"


def load(run, ema: bool = True, device: str = "auto"):
    """The model of a run's newest whole checkpoint; see `multimodal_fm.model.load`."""
    from .model import load

    return load(run, ema, device)
