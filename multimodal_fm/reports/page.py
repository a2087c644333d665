"""What the HTML pages share: one file without network access, with media as data URIs and figures as SVG."""

from __future__ import annotations

import base64
import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape


def template(name: str) -> jinja2.Template:
    """A page's template; it escapes all values. `style` is the style sheet that all pages begin with."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((folder / "page.css").read_text(encoding="utf-8").strip())
    return environment.get_template(name)


class Media:
    """Pictures and sounds as data URIs that browsers show; those of more bytes than `max_image` and `max_audio` are
    reduced."""

    IMAGE_FORMATS, AUDIO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF"), ("FLAC", "OGG", "MP3", "WAV")
    AUDIO_SUBTYPES = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "VORBIS", "OPUS")  # or any MPEG layer
    SIDE, SECONDS = 256, 5  # of reduced media
    MAX_RATE = 192_000  # Hz: above 200,000 libsndfile's Vorbis encoder crashes

    def __init__(self, max_image: int, max_audio: int):
        self.max_image, self.max_audio, self.known = max_image, max_audio, {}

    def uri(self, modality: str, extensions: tuple, raw: dict) -> str:
        """The data URI of the first of a sample's members that has one of the extensions; modality: image or audio."""
        data = next(raw[ending] for ending in extensions if ending in raw)
        if (modality, data) not in self.known:
            mime, small = self._image(data) if modality == "image" else self._audio(data)
            self.known[modality, data] = f"data:{mime};base64,{base64.b64encode(small).decode()}"
        return self.known[modality, data]

    def _image(self, data: bytes) -> tuple[str, bytes]:
        from PIL import Image

        from ..tokenizers.image import Config, Tokenizer

        with Image.open(io.BytesIO(data)) as picture:
            if len(data) <= self.max_image and picture.format in self.IMAGE_FORMATS and max(picture.size) <= 1024:
                return f"image/{picture.format.lower()}", data
        settings = Config(patch=1, max_tokens=self.SIDE**2, max_pixels=10**9, max_bytes=10**9)
        small, out = Image.fromarray(Tokenizer(settings).view(data)), io.BytesIO()
        small.thumbnail((self.SIDE, self.SIDE))
        small.save(out, "JPEG", quality=80)
        return "image/jpeg", out.getvalue()

    def _audio(self, data: bytes) -> tuple[str, bytes]:
        import soundfile

        out = io.BytesIO()
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            playable = sound.subtype in self.AUDIO_SUBTYPES or sound.subtype.startswith("MPEG")
            if len(data) <= self.max_audio and sound.format in self.AUDIO_FORMATS and playable:
                return f"audio/{sound.format.lower().replace('mp3', 'mpeg')}", data
            step = -(-sound.samplerate // self.MAX_RATE)
            with soundfile.SoundFile(out, "w", sound.samplerate // step, 1, format="OGG", subtype="VORBIS") as short:
                for _ in range(self.SECONDS):  # libsndfile's Vorbis encoder crashes on long blocks
                    short.write(sound.read(sound.samplerate, always_2d=True).mean(1)[::step])
        return "audio/ogg", out.getvalue()


INK = "#010101"  # placeholders, replaced with the colors of the page's style sheet, which differ in light and dark mode
LINES = ("#020202", "#030303", "#040404")
DASHES = ("-", "--", ":")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
"""matplotlib's settings for figures that `inline` puts into a page."""


def plot(prefix: str, title: str, paint: Callable[..., None], size=(3.7, 2.1), rows=(1,)) -> Markup:
    """What `paint(*axes)` draws, as an SVG element of a page; `rows` are the heights of the axes below each other."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        every = figure.subplots(len(rows), squeeze=False, sharex=True, gridspec_kw={"height_ratios": list(rows)})[:, 0]
        for axes in every:
            axes.spines[["top", "right"]].set_visible(False)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
        paint(*every)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    return inline(out.getvalue(), prefix, title)


def mark_steps(axes) -> None:
    """The axis of a curve over steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean (N,) of the finite values (N,) over a twentieth of the run around each step."""
    window = np.ones(max(1, len(values) // 20))
    if len(window) % 2 == 0:
        window = window[1:]
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    with np.errstate(invalid="ignore"):
        return sums / np.convolve(finite.astype(float), window, "same")


def format_number(value: float) -> str:
    """Three digits of it, or all before the point: 0.0123, 12.3, 12,345."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_time(seconds: float) -> str:
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{hours} h {minutes - 60 * hours} min"


def program() -> str:
    """How the command line is called from here: by its name where that finds it, else by its path."""
    called = Path(sys.argv[0])
    script = called if called.name == "mmfm" else Path(sys.executable).with_name("mmfm")
    installed = shutil.which("mmfm")
    if installed and script.exists() and Path(installed).resolve() == script.resolve():
        return "mmfm"
    if script.exists():
        return shlex.quote(relative(script))
    return f"{shlex.quote(relative(sys.executable))} -m multimodal_fm"


def relative(path: str | Path) -> str:
    """The path from the working directory where it lies below."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def inline(svg: str, prefix: str, title: str) -> Markup:
    """matplotlib's SVG as an element of a page: ids begin with `prefix`, colors and width are the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    tag: Any = re.match(r"<svg[^>]*>", svg)
    found: Any = re.search(r'viewBox="[^"]*"', tag[0])
    box = found[0]
    start = f'<svg {box} role="img" aria-labelledby="{prefix}-title"><title id="{prefix}-title">{escape(title)}</title>'
    svg = start + svg[tag.end() :]
    for placeholder, color in ((INK, "currentColor"), *((c, f"var(--line{i})") for i, c in enumerate(LINES))):
        svg = svg.replace(placeholder, color)
    return Markup(svg)  # matplotlib has escaped its texts
