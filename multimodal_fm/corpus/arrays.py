"""Arrays in NumPy's format, which samples hold as members."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from ..errors import SampleError

MAX_HEADER = 4096  # bytes of an array's header


def parse_header(data: bytes) -> tuple[tuple[int, ...], Any, np.dtype, int]:
    """Shape, order, type and first byte of an array of numbers. Raises SampleError."""
    file = io.BytesIO(data[: MAX_HEADER + 16])
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, kind = read(file, max_header_size=MAX_HEADER)
    except Exception as error:  # NumPy parses the header as a Python literal: whatever that raises
        raise SampleError("decode", f"no array of NumPy's: {error}"[:100]) from None
    if kind.kind not in "iufb":
        raise SampleError("decode", f"no array of numbers, but of {kind}"[:100])
    return shape, "F" if fortran else "C", kind, file.tell()


def parse(data: bytes) -> np.ndarray:
    """The array of numbers in `data`, of which nothing is allocated but what is there. Raises SampleError."""
    shape, order, kind, start = parse_header(data)
    count = math.prod(shape)
    if min(shape, default=0) < 0 or len(data) - start != count * kind.itemsize:
        raise SampleError("decode", f"{len(data) - start} bytes are no array {shape} of {kind}")
    return np.frombuffer(data, kind, count, start).reshape(shape, order=order)
