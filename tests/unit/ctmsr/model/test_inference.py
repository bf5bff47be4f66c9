"""One-step inference: any size, the seed's noise belongs to the picture, and tiles leave no trace."""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctmsr.errors import ConfigError
from ctmsr.image.ranges import to_tensor, to_u8, upsample
from ctmsr.model.inference import InferenceConfig, _warn_once, tile_spans, upscale
from ctmsr.model.network import ConsistencyModel, NetworkConfig, bf16_copy
from ctmsr.model.noise import position_noise
from tests.support.repository import ROOT
from tests.support.tiny import filled_model

TINY = NetworkConfig(
    lq_size=16, model_channels=32, channel_mult=(1, 2), num_blocks=1, embed_dim=32, num_heads=2
)


class Pointwise(nn.Module):
    """Stands for a network that sees one pixel: what it makes of one cannot depend on where a tile ends."""

    def __init__(self, noise_gain: float = 0.5) -> None:
        super().__init__()
        self.config = TINY
        self.gain = nn.Parameter(torch.tensor(noise_gain))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, sigma: Tensor, lq: Tensor) -> Tensor:
        self.seen.append(tuple(lq.shape[2:]))
        return x * self.gain + 0.1 * lq.repeat_interleave(4, 2).repeat_interleave(4, 3)


class TileNumber(nn.Module):
    """Paints each tile in one colour, the next one for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.config = TINY
        self.unused = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor, sigma: Tensor, lq: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(x, -1.0 if self.calls == 1 else 1.0)


@pytest.fixture(scope="module")
def network() -> ConsistencyModel:
    torch.manual_seed(0)
    return ConsistencyModel(TINY).eval()


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (17, 5), (2, 3), (33, 16)])
def test_any_size_gives_exactly_scale_times_it(network: ConsistencyModel, height: int, width: int) -> None:
    sr_u8 = upscale(network, picture(height, width), sigma_max=1.0)
    assert sr_u8.shape == (4 * height, 4 * width, 3)
    assert sr_u8.dtype == np.uint8


def test_one_step_from_the_noisy_upscaled_picture(network: ConsistencyModel) -> None:
    lq_u8 = picture(16, 32)
    lq = to_tensor(lq_u8[None])
    noise = position_noise(7, slice(0, 64), slice(0, 128))
    with torch.no_grad():
        expected = network(upsample(lq, 4) + 0.8 * noise, torch.tensor([0.8]), lq)
    assert np.array_equal(upscale(network, lq_u8, sigma_max=0.8, seed=7), to_u8(expected)[0])


def test_sixteen_bits_are_nowhere_rounded_to_eight(network: ConsistencyModel) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (16, 32, 3), dtype=np.uint16)
    lq = torch.from_numpy(deep.astype(np.float32)).permute(2, 0, 1)[None] / 32767.5 - 1
    bicubic = F.interpolate(lq, scale_factor=4, mode="bicubic", align_corners=False).clamp(-1, 1)
    noise = position_noise(7, slice(0, 64), slice(0, 128))
    with torch.no_grad():
        expected = network(bicubic + 0.8 * noise, torch.tensor([0.8]), lq)
    sr = upscale(network, deep, sigma_max=0.8, seed=7)
    assert sr.dtype == np.uint16
    levels = expected.clamp(-1, 1).add(1).mul(32767.5)[0].permute(1, 2, 0).numpy()
    assert np.abs(sr - levels).max() < 4  # of 65535


def test_padding_is_by_reflection_and_cut_off(network: ConsistencyModel) -> None:
    lq_u8 = picture(13, 30)
    padded = np.pad(lq_u8, ((0, 3), (0, 2), (0, 0)), mode="reflect")
    expected = upscale(network, padded, sigma_max=1.0)[: 4 * 13, : 4 * 30]
    assert np.array_equal(upscale(network, lq_u8, sigma_max=1.0), expected)


def test_the_seed_decides(network: ConsistencyModel) -> None:
    first, again, other = (upscale(network, picture(9, 9), sigma_max=1.0, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (32, 16), (48, 16), (48, 5), (64, 32), (80, 64)])
def test_the_cut_leaves_no_trace(tile: int, overlap: int) -> None:
    lq_u8 = picture(90, 131)
    whole, cut = Pointwise().eval(), Pointwise().eval()
    expected = upscale(whole, lq_u8, sigma_max=1.0, seed=3)  # type: ignore[arg-type]
    config = InferenceConfig(tile=tile, overlap=overlap)
    tiled = upscale(cut, lq_u8, sigma_max=1.0, seed=3, config=config)  # type: ignore[arg-type]
    assert whole.seen == [(96, 144)]
    assert len(cut.seen) > 1
    assert max(max(shape) for shape in cut.seen) <= tile
    assert np.array_equal(tiled, expected)


def test_neighbours_fade_linearly_over_the_overlap() -> None:
    config = InferenceConfig(tile=32, overlap=16)
    sr_u8 = upscale(TileNumber().eval(), picture(16, 48), sigma_max=1.0, config=config)  # type: ignore[arg-type]
    row = sr_u8[0, :, 0].astype(int)
    assert np.array_equal(row[:64], np.zeros(64))
    assert np.array_equal(row[128:], np.full(64, 255))
    assert np.abs(row[64:128] - 255 * (np.arange(64) + 0.5) / 64).max() <= 0.5


def test_tiles_start_at_multiples_and_cover_the_side() -> None:
    assert tile_spans(1024, tile=512, overlap=64, multiple=64) == [(0, 512), (448, 960), (512, 1024)]
    assert tile_spans(512, tile=512, overlap=64, multiple=64) == [(0, 512)]
    for multiple in (16, 48, 64):
        for side in range(multiple, 40 * multiple, multiple):
            spans = tile_spans(side, tile=512, overlap=60, multiple=multiple)
            assert spans[0][0] == 0
            assert spans[-1][1] == side
            assert all(start % multiple == 0 and stop - start <= 512 for start, stop in spans)
            assert all(a[1] - b[0] >= 60 for a, b in pairwise(spans))


def test_noise_stays_where_it_is_when_a_picture_grows() -> None:
    small, large = Pointwise().eval(), Pointwise().eval()
    grey = np.full((70, 70, 3), 128, np.uint8)
    a = upscale(small, grey[:40, :50], sigma_max=1.0)  # type: ignore[arg-type]
    b = upscale(large, grey, sigma_max=1.0)  # type: ignore[arg-type]
    assert np.array_equal(a, b[:160, :200])


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_refuses_what_is_no_picture(network: ConsistencyModel, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 or uint16 of shape \(h, w, 3\)"):
        upscale(network, bad, sigma_max=1.0)


def test_refuses_a_model_with_dropout_on() -> None:
    with pytest.raises(ValueError, match="training mode"):
        upscale(ConsistencyModel(TINY), picture(4, 4), sigma_max=1.0)


class Tinted(nn.Module):
    """The bicubic picture, brighter, of less contrast, under a checkerboard of one-pixel squares."""

    def __init__(self) -> None:
        super().__init__()
        self.config = TINY
        self.contrast = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor, sigma: Tensor, lq: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")
        return self.contrast * upsample(lq, 4) + 0.15 + 0.1 * (1 - 2 * ((rows + columns) % 2))


@pytest.mark.parametrize(("height", "width"), [(60, 44), (1, 1), (1, 30)])
def test_colour_is_held_to_the_inputs_and_detail_to_the_networks(height: int, width: int) -> None:
    rows, columns = np.ogrid[:height, :width]
    smooth = 128 + 60 * np.sin(rows / 9)[..., None] * np.cos(columns / 8)[..., None] * np.array([1, 0.5, -1])
    lq_u8 = smooth.round().astype(np.uint8)
    free, held = (
        upscale(Tinted().eval(), lq_u8, sigma_max=0.0, config=config).astype(float)  # type: ignore[arg-type]
        for config in (InferenceConfig(), InferenceConfig(colour_hold_px=2.0))
    )
    bicubic = to_u8(upsample(to_tensor(lq_u8[None]), 4))[0].astype(float)
    shift = np.abs((held - bicubic).reshape(height * 2, 2, width * 2, 2, 3).mean((1, 3)))
    assert np.abs(free - bicubic).mean() > 15
    assert shift.mean() < 3
    square = (
        held[::2, ::2] - held[::2, 1::2]
    )  # a white square less its black neighbour: 0.2 of the range of 2
    assert abs(square.mean() - 0.2 * 127.5) < 1


def test_bf16_moves_pixels_by_little() -> None:
    lq_u8 = picture(20, 24)
    exact, rounded = (
        upscale(filled_model().eval(), lq_u8, sigma_max=1.0, config=config).astype(float)
        for config in (InferenceConfig(), InferenceConfig(precision="bf16"))
    )
    assert 0 < np.abs(exact - rounded).mean() < 1.5


def test_a_bf16_copy_computes_what_casting_does_but_for_rounding() -> None:
    lq_u8, model = picture(20, 24), filled_model().eval()
    config = InferenceConfig(precision="bf16")
    cast, copied = (
        upscale(each, lq_u8, sigma_max=1.0, config=config).astype(float) for each in (model, bf16_copy(model))
    )
    assert 0 < np.abs(cast - copied).mean() < 1.5


@pytest.mark.parametrize("batch_tiles", [2, 3, 100])
def test_tiles_of_one_call_are_those_of_many(batch_tiles: int) -> None:
    lq_u8, model = picture(50, 70), filled_model().eval()
    one, many = (
        upscale(model, lq_u8, sigma_max=1.0, config=InferenceConfig(tile=32, overlap=16, batch_tiles=size))
        for size in (1, batch_tiles)
    )
    assert np.abs(one.astype(int) - many).max() <= 1  # sums of another batch size may round otherwise


class Small(Pointwise):
    """A network for which memory suffices up to so many pixels of one call."""

    def __init__(self, num_pixels: int, error: Exception) -> None:
        super().__init__()
        self.num_pixels, self.error = num_pixels, error

    def forward(self, x: Tensor, sigma: Tensor, lq: Tensor) -> Tensor:
        if lq[:, 0].numel() > self.num_pixels:
            raise self.error
        return super().forward(x, sigma, lq)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without what threads of other tests may still log."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("ctmsr")]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    ("num_pixels", "fitting"),
    [(2 * 64 * 64, "tile=64, inference.batch_tiles=2"), (32 * 32, "tile=32, inference.batch_tiles=1")],
)
def test_too_little_memory_is_met_by_less_at_once(
    num_pixels: int, fitting: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    lq_u8, config = picture(90, 131), InferenceConfig(tile=64, overlap=16, batch_tiles=4)
    expected = upscale(Pointwise().eval(), lq_u8, sigma_max=1.0, config=config)  # type: ignore[arg-type]
    assert said(caplog) == []
    for _ in range(2):
        found = upscale(Small(num_pixels, error).eval(), lq_u8, sigma_max=1.0, config=config)  # type: ignore[arg-type]
        assert np.array_equal(found, expected)
    assert len(said(caplog)) == 1
    assert f"inference.tile=64, inference.batch_tiles=4, but not with inference.{fitting}" in caplog.text


@pytest.mark.parametrize("tile", [64, 1024])
def test_where_the_smallest_tile_is_too_much_the_error_is_told(tile: int) -> None:
    config = InferenceConfig(tile=tile, overlap=16)
    error = torch.OutOfMemoryError("too many pixels")
    with pytest.raises(torch.OutOfMemoryError, match="too many pixels"):
        upscale(Small(32 * 32 - 1, error).eval(), picture(90, 131), sigma_max=1.0, config=config)  # type: ignore[arg-type]


def test_another_error_is_not_retried() -> None:
    network = Small(0, RuntimeError("sizes do not match")).eval()
    with pytest.raises(RuntimeError, match="sizes do not match"):
        upscale(network, picture(90, 131), sigma_max=1.0)  # type: ignore[arg-type]
    assert network.seen == []


HOST = """
import itertools, resource
from pathlib import Path
import numpy as np, skimage.data, torch
from ctmsr.config import from_dict
from ctmsr.model import checkpoint, inference

torch.set_num_threads(1)
model, manifest = checkpoint.load_model(Path("pipelines/starter"))
config = from_dict(inference.InferenceConfig, manifest.config["inference"], "inference")
lq_u8 = np.ascontiguousarray(skimage.data.astronaut()[100:196, 64:352])

def upscaled(lq_u8):
    return inference.upscale(model, lq_u8, sigma_max=manifest.config["schedule"]["sigma_max"], config=config)

expected = upscaled(lq_u8)
tiles = []
whole = inference._upscaled
inference._upscaled = lambda *args: (tiles.append(args[-1].tile), whole(*args))[1]
pages = int(Path("/proc/self/statm").read_text().split()[0])
for spare in itertools.count(300, -20):
    limit = pages * resource.getpagesize() + (spare << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    found = upscaled(lq_u8)
    if len(tiles) > 1:
        break
    tiles.clear()
print(np.abs(expected.astype(int) - found).mean(), *tiles)
"""
"""Upscales with less and less memory to spare, in MiB, until a tile has to be halved."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_host_out_of_memory_gives_the_same_picture() -> None:
    returned = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}  # all that is freed
    ended = subprocess.run(
        [sys.executable, "-c", HOST],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=os.environ | returned,
        check=True,
    )
    difference, *tiles = ended.stdout.split()
    assert 0 < float(difference) < 1
    assert tiles == ["288", "128"]
    (warning,) = ended.stderr.splitlines()
    assert warning.startswith("memory ran out with inference.tile=288, inference.batch_tiles=1, but not with")


def test_refuses_no_tiles_at_once() -> None:
    with pytest.raises(ConfigError, match=r"inference.batch_tiles must be at least 1, got 0\."):
        InferenceConfig(batch_tiles=0)


@pytest.mark.parametrize(("tile", "overlap"), [(15, 0), (32, 32), (32, 17), (32, -1)])
def test_refuses_a_tile_that_does_not_exceed_its_overlap(
    network: ConsistencyModel, tile: int, overlap: int
) -> None:
    with pytest.raises(ConfigError, match=r"tile must exceed inference\.overlap"):
        upscale(network, picture(4, 4), sigma_max=1.0, config=InferenceConfig(tile=tile, overlap=overlap))
