"""Pictures as people have them, through index, stream, upscale, server and registered model: same colours."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from ctmsr.degradation.config import DegradationConfig
from ctmsr.image import Picture, read
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel
from pipelines.data.pictures import find_pictures
from pipelines.data.stream import train_stream
from pipelines.index.run import build_index
from pipelines.index.scan import Settings as IndexSettings
from pipelines.tracking.models import load_model
from pipelines.upscale.__main__ import main
from tests.support import serving
from tests.support.picture_files import (
    P3,
    PROPHOTO,
    SRGB,
    gamma,
    gamma_curve,
    grey_profile,
    iccp,
    in_srgb,
    png,
    rgb_profile,
    srgb_curve,
    srgb_levels,
    srgb_parametric,
    table_profile,
)
from tests.support.registering import register_model, tiny_model

SIDE = 48
BLOCKS = np.random.default_rng(0).choice([51, 102, 153, 204], (3, 3, 4)).astype(np.uint8)
"""Colours with alpha, none of which is out of gamut in sRGB."""
PIXELS = BLOCKS.repeat(16, axis=0).repeat(16, axis=1)
RGB = PIXELS[..., :3]
DEEP = RGB.astype(np.uint16) * 257
ALPHA = PIXELS[..., 3:] / 255


def written(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(RGB)).save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind: str, **options: Any) -> bytes:
    frames = [Image.fromarray(np.rot90(RGB, turns)) for turns in (1, 2)]
    return written(kind, save_all=True, append_images=frames, **options)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[Base.Orientation], exif[Base.Make] = orientation, "Phone"
    stored = Image.fromarray(np.rot90(RGB) if orientation == 6 else RGB[:, ::-1])
    return written("PNG", stored, exif=exif, dpi=(300, 300))


def in_ink(levels: np.ndarray) -> np.ndarray:
    return np.asarray((1 - levels[..., :3]) * (1 - levels[..., 3:]))


P3_ICC = rgb_profile(P3, srgb_parametric())
GREY = RGB[..., :1]
FILES: dict[str, tuple[bytes, np.ndarray]] = {
    "p3.png": (written("PNG", icc_profile=P3_ICC), in_srgb(RGB / 255, P3, srgb_curve)),
    "P3.JPG": (
        written("JPEG", icc_profile=P3_ICC, quality=100, subsampling=0, progressive=True),
        in_srgb(RGB / 255, P3, srgb_curve),
    ),
    "prophoto16.png": (
        png(DEEP, iccp(rgb_profile(PROPHOTO, gamma_curve(1.80078125)))),
        in_srgb(DEEP / 65535, PROPHOTO, gamma(1.8)),
    ),
    "linear.tif": (
        written("TIFF", icc_profile=rgb_profile(SRGB, gamma_curve(1))),
        in_srgb(RGB / 255, SRGB, gamma(1)),
    ),
    "grey.png": (
        png(GREY, iccp(grey_profile(gamma_curve(1.8)))),
        srgb_levels((GREY / 255) ** 1.8).repeat(3, axis=2),
    ),
    "ink.tif": (
        written(
            "TIFF",
            Image.frombytes("CMYK", (SIDE, SIDE), PIXELS.tobytes()),
            icc_profile=table_profile("CMYK", in_ink),
        ),
        in_ink(PIXELS / 255),
    ),
    "logo.webp": (written("WEBP", Image.fromarray(PIXELS), lossless=True), RGB / 255),
    "la16.png": (
        png(np.concatenate([DEEP[..., :1], PIXELS[..., 3:].astype(np.uint16) * 257], axis=2)),
        GREY.repeat(3, axis=2) / 255,
    ),
    "turned.png": (turned(6), RGB / 255),
    "mirrored.png": (turned(2), RGB / 255),
    "phone.mpo": (animated("MPO", quality=100, subsampling=0), RGB / 255),
    "dance.webp": (animated("WEBP", lossless=True), RGB / 255),
    "dance.apng": (animated("PNG"), RGB / 255),
    "dance.GIF": (animated("GIF"), RGB / 255),
    "saved.jfif": (written("JPEG", quality=100, subsampling=0), RGB / 255),
}
"""By name: the file, and what viewers show, in 0..1, without alpha."""
WITH_ALPHA = {"logo.webp", "la16.png"}


def on_white(name: str) -> np.ndarray:
    """0..255."""
    shown = FILES[name][1]
    return np.asarray(255 * (shown * ALPHA + 1 - ALPHA if name in WITH_ALPHA else shown))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, (data, _) in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def model() -> ConsistencyModel:
    return tiny_model()


@pytest.fixture(scope="module")
def registry(model: ConsistencyModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a registry with `model` as version 1 of toy."""
    return register_model(model, tmp_path_factory.mktemp("registry"), sigma_max=0.3)


def enlarged(model: ConsistencyModel, shown: np.ndarray) -> np.ndarray:
    """What the model makes of right colours, 0..255, in 16 bits."""
    deep = np.rint(shown * 257).astype(np.uint16)
    return upscale(model, deep, sigma_max=0.3) / 257


@pytest.mark.usefixtures("ray_session")
def test_index_and_stream(folder: Path, tmp_path: Path) -> None:
    index = str(tmp_path / "all.index")
    summary = build_index(IndexSettings(str(folder), "", SIDE), index)
    pictures = find_pictures(index)
    assert (len(pictures), summary["quarantined"]) == (len(FILES), {})
    stream = train_stream(
        pictures,
        hr_crop_size=SIDE,
        scale=4,
        degradation=DegradationConfig(),
        seed=0,
        skip=0,
        total=len(FILES),
        global_batch_size=len(FILES),
        num_workers=1,
    )
    (rows,) = stream.iter_batches(batch_size=len(FILES), batch_format="numpy")
    assert sorted(rows["key"]) == sorted(FILES)
    for key, hr in zip(rows["key"], rows["hr"], strict=True):
        assert np.abs(hr - on_white(key)).max() <= 2.5, key


@pytest.fixture(scope="module")
def results(folder: Path, registry: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of all of them."""
    out = tmp_path_factory.mktemp("results")
    common = ["--output", str(out), "--model", "models:/toy/1", "--tracking-uri", registry]
    names = sorted(FILES)
    alike = {"P3.JPG", "dance.webp", "dance.apng"}  # of one stem, so they would get one name
    assert main([*(str(folder / name) for name in names if name not in alike), *common]) == 0
    for name in alike:
        assert main([str(folder / name), *common[:1], f"{out}/{name}", *common[2:]]) == 0
    return out


def result(results: Path, name: str) -> Path:
    folder = results / name if (results / name).exists() else results
    return folder / f"{Path(name).stem}_x4.png"


def check(picture: Picture, name: str, model: ConsistencyModel) -> None:
    """That an upscaled picture has the right colours, channels, depth and metadata."""
    source = read(FILES[name][0], name=name)
    assert picture.pixels.shape == (4 * SIDE, 4 * SIDE, source.pixels.shape[2])
    assert picture.pixels.dtype == source.pixels.dtype
    most = np.iinfo(picture.pixels.dtype).max
    expected = enlarged(model, 255 * FILES[name][1])
    if source.is_grey:
        expected = expected.mean(axis=2, keepdims=True).repeat(3, axis=2)
    difference = np.abs(picture.rgb / most * 255 - expected)
    assert difference.max() <= 4, name  # two of the input's, as the model sharpens them, and rounding
    assert difference.mean() <= 1, name
    if name in WITH_ALPHA:
        assert picture.alpha is not None
        inner = picture.alpha.reshape(SIDE, 4, SIDE, 4)[8::16, 1:3, 8::16, 1:3] / most
        np.testing.assert_allclose(inner, ALPHA[8::16, None, 8::16, None, 0] + 0 * inner, atol=0.01)
    if name in ("turned.png", "mirrored.png"):
        assert picture.metadata.exif[Base.Orientation] == 1
        assert picture.metadata.exif[Base.Make] == "Phone"
        assert picture.metadata.dpi == pytest.approx((1200, 1200), rel=1e-3)


@pytest.mark.parametrize("name", FILES)
def test_upscale(name: str, results: Path, model: ConsistencyModel) -> None:
    path = result(results, name)
    check(read(path.read_bytes(), name=name), name, model)
    with Image.open(path) as image:
        assert image.info["srgb"] == 0


@pytest.fixture(scope="module")
def ask(registry: str) -> Callable[..., tuple[bytes, dict[str, str]]]:
    server = serving.front(serving.upscaler(registry, "models:/toy/1"))

    def ask(body: bytes, accept: str = "*/*") -> tuple[bytes, dict[str, str]]:
        response = serving.ask(server, body, accept=accept)
        assert response.status_code == 200, response.body
        return bytes(response.body), dict(response.headers)

    return ask


@pytest.mark.parametrize("name", FILES)
def test_serve(name: str, ask: Callable[..., tuple[bytes, dict[str, str]]], model: ConsistencyModel) -> None:
    body, headers = ask(FILES[name][0])
    assert headers["content-type"] == "image/png"
    check(read(body, name=name), name, model)
    assert headers.get("x-warning", "").startswith("The picture: it is animated" if "dance" in name else "")
    assert ("x-warning" in headers) == ("dance" in name)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_serve_in_other_formats(kind: str, ask: Callable[..., tuple[bytes, dict[str, str]]]) -> None:
    body, headers = ask(FILES["logo.webp"][0], f"image/{kind}")
    made = read(body, name=kind)
    assert (headers["content-type"], made.format) == (f"image/{kind}", kind.upper())
    assert made.pixels.shape == (4 * SIDE, 4 * SIDE, 3 if kind == "jpeg" else 4)
    assert ("no transparency" in headers.get("x-warning", "")) == (kind == "jpeg")


@pytest.mark.parametrize("name", ["p3.png", "prophoto16.png", "la16.png", "ink.tif", "turned.png"])
def test_registered_model(name: str, registry: str, model: ConsistencyModel) -> None:
    sr_u8 = load_model(registry, "models:/toy/1").predict(FILES[name][0])
    difference = np.abs(sr_u8 - enlarged(model, on_white(name)))
    assert difference.max() <= 4
    assert difference.mean() <= 1


def test_the_command_warns_and_takes_formats(
    folder: Path, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--output", str(tmp_path), "--model", "models:/toy/1", "--tracking-uri", registry]
    command = [str(folder / "logo.webp"), str(folder / "dance.GIF"), str(folder / "turned.png"), *common]
    assert main([*command, "--format", "jpeg", "--quality", "80", "--strip-metadata"]) == 0
    printed = capsys.readouterr()
    warnings = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert warnings[0].startswith(f"warning: {folder}/logo.webp: JPEG has no transparency")
    assert warnings[1] == f"warning: {folder}/dance.GIF: it is animated; only the first frame is read."
    made = read((tmp_path / "turned_x4.jpg").read_bytes(), name="x")
    assert (made.format, made.metadata.exif, made.metadata.dpi) == ("JPEG", {}, None)
    assert main([*command, "--format", "jpeg", "--quality", "80", "--strip-metadata"]) == 0
    assert capsys.readouterr().out.count("(done before)") == 3
    assert main([*command, "--format", "webp"]) == 0
    assert main([*command, "--format", "webp"]) == 0
    assert capsys.readouterr().out.count("(done before)") == 3
    assert main([*command, "--format", "webp", "--quality", "50"]) == 0
    assert "(done before)" not in capsys.readouterr().out
