"""Pack arrays for the page: one JSON object with their names, dtypes and shapes, and their bytes, compressed, in base64.

Also the quantisation of activations, which need few bits: they are coloured, counted in histograms, and correlated.
"""

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# A gate of a logistic function has the values k / 15. Exactly those below 2 / 15 are less than 0.1, and exactly those above
# 13 / 15 are greater than 0.9, so the saturation of gates is counted without error.
GATE_STEPS = 15
# A signed value of a unit has the values k / 31 of the unit's largest magnitude, for k from -31 to 31.
SIGNED_STEPS = 31

DTYPES = ("float32", "float16", "uint8")


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return {"arrays": [{"name", "dtype", "shape"}, ...], "blob": base64 of the zlib stream of all bytes in this order}.

    Numbers are little-endian, and the last axis is contiguous.

    Args:
        arrays: arrays of one of `DTYPES`.
    """
    described, data = [], []
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise TypeError(f"{name} is of dtype {array.dtype}; the page reads {', '.join(DTYPES)}")
        described.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape)})
        data.append(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes())
    return {"arrays": described, "blob": base64.b64encode(zlib.compress(b"".join(data), 9)).decode()}


def quantise_gate(values_NH: np.ndarray) -> np.ndarray:
    """Return values from 0 to 1 as multiples of 1 / GATE_STEPS, uint8, shape (H, N): unit after unit."""
    return np.ascontiguousarray(np.rint(values_NH * GATE_STEPS).astype(np.uint8).T)


def quantise_signed(values_NH: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return signed values as (steps, scale).

    Returns:
        steps: uint8, shape (H, N). A value is (step - SIGNED_STEPS) / SIGNED_STEPS * scale of its unit.
        scale: the largest magnitude of each unit, float32, shape (H,).
    """
    scale_H = np.abs(values_NH).max(axis=0).astype(np.float32)
    unit_NH = values_NH / np.where(scale_H > 0, scale_H, 1)
    return np.ascontiguousarray((np.rint(unit_NH * SIGNED_STEPS) + SIGNED_STEPS).astype(np.uint8).T), scale_H
