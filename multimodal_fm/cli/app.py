"""The application that the commands belong to."""

from __future__ import annotations

from cyclopts import App

from .. import __version__
from ..errors import UserError

app = App(
    name="mmfm",
    help="Pretrain one Transformer on text, images and audio; search across the three; tune and evaluate it.",
    version=__version__,
)


def pairs(given: list[str] | None) -> dict[str, str]:
    """FIELD=VALUE texts as a map."""
    pairs = {}
    for one in given or []:
        field, equals, value = one.partition("=")
        if not equals or not field:
            raise UserError(f"--where {one!r} is not FIELD=VALUE")
        pairs[field] = value
    return pairs
