"""What the pages share: a file that needs no network, pictures and sounds in it as data URIs, figures as SVG."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import jinja2
from markupsafe import Markup, escape


def template(name: str) -> jinja2.Template:
    """A page's template, which takes all that it is given for text; `style` is what every page's style begins with."""
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, **blocks)
    environment.globals["style"] = Markup(_own("page.css").strip())
    return environment.from_string(_own(name))


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


class Media:
    """Pictures and sounds as data URIs that a browser shows, none of many more bytes than allowed."""

    PICTURES, SOUNDS = ("JPEG", "PNG", "WEBP", "GIF"), ("FLAC", "OGG", "MP3", "WAV")
    PLAYED = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "VORBIS", "OPUS")  # or any MPEG layer
    SIDE, SECONDS = 256, 5  # of what is made anew

    def __init__(self, picture: int, sound: int):
        self.picture, self.sound, self.known = picture, sound, {}

    def uri(self, modality: str, extensions: tuple, raw: dict) -> str:
        data = next(raw[ending] for ending in extensions if ending in raw)
        if (modality, data) not in self.known:
            mime, small = self._image(data) if modality == "image" else self._audio(data)
            self.known[modality, data] = f"data:{mime};base64,{base64.b64encode(small).decode()}"
        return self.known[modality, data]

    def _image(self, data: bytes) -> tuple[str, bytes]:
        from PIL import Image

        from ..tokenizers.image import Config, decode

        with Image.open(io.BytesIO(data)) as picture:
            if len(data) <= self.picture and picture.format in self.PICTURES and max(picture.size) <= 1024:
                return f"image/{picture.format.lower()}", data
        small, out = decode(Config(max_pixels=10**9, max_bytes=10**9), data, self.SIDE), io.BytesIO()
        small.thumbnail((self.SIDE, self.SIDE))
        small.save(out, "JPEG", quality=80)
        return "image/jpeg", out.getvalue()

    def _audio(self, data: bytes) -> tuple[str, bytes]:
        import soundfile

        out = io.BytesIO()
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            played = sound.subtype in self.PLAYED or sound.subtype.startswith("MPEG")
            if len(data) <= self.sound and sound.format in self.SOUNDS and played:
                return f"audio/{sound.format.lower().replace('mp3', 'mpeg')}", data
            with soundfile.SoundFile(out, "w", sound.samplerate, 1, format="OGG", subtype="VORBIS") as short:
                for _ in range(self.SECONDS):  # libsndfile's Vorbis encoder crashes on long blocks
                    short.write(sound.read(sound.samplerate, always_2d=True).mean(1))
        return "audio/ogg", out.getvalue()


INK = "#010101"  # stand in for what the page's style sheet says, light or dark
LINES = ("#020202", "#030303", "#040404")
DASHES = ("-", "--", ":")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
"""matplotlib's, for a figure that `inline` puts into a page."""


def inline(svg: str, prefix: str, said: str) -> Markup:
    """matplotlib's SVG as a part of a page: ids of its own, the page's colors, a title, as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    head = re.match(r"<svg[^>]*>", svg)
    box = re.search(r'viewBox="[^"]*"', head[0])[0]
    start = f'<svg {box} role="img" aria-labelledby="{prefix}-title"><title id="{prefix}-title">{escape(said)}</title>'
    svg = start + svg[head.end() :]
    for stands, color in ((INK, "currentColor"), *((c, f"var(--line{i})") for i, c in enumerate(LINES))):
        svg = svg.replace(stands, color)
    return Markup(svg)  # matplotlib has escaped its texts
