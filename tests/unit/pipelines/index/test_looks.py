"""How much of a picture has detail, and what hash it has, on photographs."""

import cv2
import numpy as np
import pytest
import skimage.data

from pipelines.index.looks import detail, look_hash

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")


def grey(name: str) -> np.ndarray:
    return cv2.cvtColor(getattr(skimage.data, name)(), cv2.COLOR_RGB2GRAY)


def test_the_part_that_is_neither_flat_nor_blurred() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (320, 640), np.uint8)
    assert detail(noise) == 1
    assert detail(np.full((320, 640), 200, np.uint8)) == 0
    assert detail(np.tile(np.arange(256, dtype=np.uint8), (100, 1))) == 0  # a smooth sky
    noise[:, 320:] = 90
    assert detail(noise) == pytest.approx(0.5, abs=0.06)
    assert detail(noise[:20, :20]) == 1  # smaller than a block


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_a_photograph_out_of_focus_has_none(name: str) -> None:
    assert detail(grey(name)) > 0.4
    assert detail(cv2.GaussianBlur(grey(name), (0, 0), 4)) < 0.02


def test_a_hash_tells_photographs_apart_but_not_sizes_or_files() -> None:
    hashes = {name: look_hash(grey(name)) for name in PHOTOS}
    for name, hash_ in hashes.items():
        small = cv2.resize(grey(name), None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA)
        file = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
        again = np.asarray(cv2.imdecode(file, cv2.IMREAD_GRAYSCALE))
        assert (look_hash(again) ^ hash_).bit_count() <= 3
        others = [(hash_ ^ other).bit_count() for key, other in hashes.items() if key != name]
        assert min(others) > 12
