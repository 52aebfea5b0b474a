"""Pixels become files that others can read."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from serve.image.media import FORMATS, encode_image


def gradient(width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 127 // (width + height)], -1).astype(np.uint8)


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_format_is_read_back_in_size_and_colour(output_format):
    pixels = gradient(48, 32)
    data = encode_image(pixels.tobytes(), 48, 32, output_format, 100)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size, image.mode) == (output_format.upper(), (48, 32), "RGB")
    largest = np.abs(np.asarray(image).astype(int) - pixels).max()
    assert largest == 0 if output_format == "png" else largest < 24


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_less_quality_makes_smaller_files(output_format):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8).tobytes()
    sizes = [len(encode_image(pixels, 32, 32, output_format, quality)) for quality in (0, 50, 100)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] / 2
