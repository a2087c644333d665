"""Plays a scene: a phrase per kind, in the order of the caption.

colour -> pitch, shape -> timbre, count -> notes, size -> loudness and length, place -> how a note moves,
background -> what sounds beneath, language -> who plays (straight, with vibrato, with a breathy tremolo).
"""

import numpy as np

from data.scenes.scene import COLOURS
from data.writing import SAMPLE_RATE

LOWEST = 220.0  # Hz; each colour lies three semitones above the one before
LOUDNESS = {"small": 0.25, "large": 0.7}
NOTE_SECONDS = {"small": 0.14, "large": 0.26}
GAP_SECONDS, PAUSE_SECONDS = 0.08, 0.25  # after a note, and more after a kind
# Strength of each partial, by its multiple of the pitch.
TIMBRES = {
    "circle": {1: 1},
    "square": {n: 1 / n for n in (1, 3, 5, 7, 9, 11)},
    "triangle": {n: 1 / n**2 for n in (1, 2, 3, 4)} | {8: 0.15},
    "star": {n: 1 / n**0.5 for n in range(1, 11)},
    "heart": {1: 0.6, 2: 1, 3: 0.25},
    "cross": {1: 0.7, 2.76: 0.7, 5.4: 0.5, 8.93: 0.3},
    "ring": {1: 0.4, 5: 0.9, 6: 0.6},
    "diamond": {1: 0.7, 4: 0.7, 8: 0.5},
}


def pitch(colour):
    """Hz."""
    return LOWEST * 2 ** (3 * COLOURS.index(colour) / 12)


def play(scene, rng):
    """Samples in [-1, 1] at SAMPLE_RATE; `rng` varies tempo, tuning and loudness a little."""
    tempo, tuning, gain = rng.uniform(0.9, 1.1), 2 ** rng.uniform(-0.02, 0.02), rng.uniform(0.8, 1.0)
    parts = [silence(GAP_SECONDS)]
    for kind in scene.kinds:
        for _ in range(kind.count):
            parts += [note(kind, scene.language, tempo, tuning, rng), silence(GAP_SECONDS * tempo)]
        parts.append(silence(PAUSE_SECONDS * tempo))
    samples = np.concatenate(parts)
    return (gain * (samples + beneath(scene.background, len(samples), rng))).astype(np.float32)


def silence(seconds):
    return np.zeros(round(seconds * SAMPLE_RATE))


def note(kind, language, tempo, tuning, rng):
    """One note of a kind, played by a language."""
    length = round(NOTE_SECONDS[kind.size] * tempo * SAMPLE_RATE)
    seconds, part = np.arange(length) / SAMPLE_RATE, np.linspace(0, 1, length)
    semitones = {"top": 2.0, "bottom": -2.0}.get(kind.place, 0.0) * (part - 0.5)
    if language == "fr":
        semitones = semitones + 0.4 * np.sin(2 * np.pi * 9 * seconds)
    phase = 2 * np.pi * np.cumsum(pitch(kind.colour) * tuning * 2 ** (semitones / 12)) / SAMPLE_RATE
    audible = 0.45 * SAMPLE_RATE / pitch(kind.colour)  # partials above would fold back
    timbre = {multiple: strength for multiple, strength in TIMBRES[kind.shape].items() if multiple < audible}
    wave = sum(strength * np.sin(multiple * phase) for multiple, strength in timbre.items())
    wave = wave / np.sqrt(sum(strength**2 for strength in timbre.values()))
    if language == "es":
        tremolo = 0.7 + 0.3 * np.sin(2 * np.pi * 22 * seconds)
        wave = tremolo * (wave + 0.12 * rng.standard_normal(length))
    return LOUDNESS[kind.size] * 0.7 * envelope(kind.place, part) * edges(length) * wave


def envelope(place, part):
    """Loudness over a note: plucked on the left, swelling on the right, else even."""
    return {"left": np.exp(-3.5 * part), "right": np.exp(-3.5 * (1 - part))}.get(place, np.ones_like(part))


def edges(length):
    """Short ramps up and down that avoid clicks."""
    ramp = np.minimum(np.arange(length), np.arange(length)[::-1]) / (0.008 * SAMPLE_RATE)
    return np.minimum(1, ramp)


def beneath(background, length, rng):
    """Nothing (white), soft noise (grey), a low hum (black) or a slow beat of two tones (sky)."""
    seconds = np.arange(length) / SAMPLE_RATE
    if background == "grey":
        return 0.01 * rng.standard_normal(length)
    if background == "black":
        return 0.02 * np.sin(2 * np.pi * 70 * seconds)
    if background == "sky":
        return 0.01 * (np.sin(2 * np.pi * 3000 * seconds) + np.sin(2 * np.pi * 3005 * seconds))
    return np.zeros(length)
