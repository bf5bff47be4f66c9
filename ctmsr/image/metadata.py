"""EXIF, XMP and resolution of a picture file, made true of an enlarged, upright sRGB picture."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD, Base

MAX_BYTES = 65_000
"""Most EXIF, or XMP, that is carried over: what fits into a segment of a JPEG, when numbers have grown."""

# What describes the picture. Other tags describe the file: where its pixels, thumbnail and profile are.
_KEPT = (
    *(Base.ImageWidth, Base.ImageLength, Base.Orientation, Base.XResolution, Base.YResolution),
    *(Base.ResolutionUnit, Base.ImageDescription, Base.Make, Base.Model, Base.Software, Base.DateTime),
    *(Base.Artist, Base.HostComputer, Base.Copyright, Base.Rating, Base.RatingPercent),
    *(Base.XPTitle, Base.XPComment, Base.XPAuthor, Base.XPKeywords, Base.XPSubject),
)
_LEFT_OUT = (0x9214, 0xA214, IFD.Interop)  # SubjectArea, SubjectLocation
"""Of the details: places in the picture as it was stored, and how its colours were."""
_INCHES, _CENTIMETRES = 2, 3
_MOST_DPI = 100_000
_SRGB = 1
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)
"""What Pillow raises on damaged tags."""
_LONG_EXIF = "ctmsr:long-exif"


@dataclass(frozen=True)
class Metadata:
    """What a picture file says besides its pixels; each is empty if the file does not say it."""

    exif: Mapping[int, Any] = field(default_factory=dict)
    """Values by tag; details and GPS are mappings of their own."""
    xmp: str = ""
    dpi: tuple[float, float] | None = None
    """Pixels per inch, horizontally and vertically."""

    def exif_bytes(self, *, with_dpi: bool = False) -> bytes:
        """EXIF as files contain it; with the resolution for files that have no other place for it."""
        exif = Image.Exif()
        exif.endian = "<"
        exif.update(self.exif)
        if with_dpi and self.dpi:
            exif[Base.XResolution], exif[Base.YResolution] = self.dpi
            exif[Base.ResolutionUnit] = _INCHES
        return exif.tobytes() if exif else b""

    def enlarged(self, scale: int, width: int, height: int) -> "Metadata":
        """For a picture enlarged `scale` times, to `width` x `height`: the same size on paper."""
        dpi = (self.dpi[0] * scale, self.dpi[1] * scale) if self.dpi else None
        resolution: dict[int, Any] = {Base.XResolution: dpi[0], Base.YResolution: dpi[1]} if dpi else {}
        sides: dict[int, Any] = {Base.ImageWidth: width, Base.ImageLength: height}
        exif = _with(self.exif, sides | resolution)
        if resolution and Base.XResolution in exif:
            exif[Base.ResolutionUnit] = _INCHES
        if IFD.Exif in exif:
            sides = {Base.ExifImageWidth: width, Base.ExifImageHeight: height}
            exif[IFD.Exif] = _with(exif[IFD.Exif], sides)
        names: dict[str, object] = {"tiff:ImageWidth": width, "tiff:ImageLength": height}
        names |= {"exif:PixelXDimension": width, "exif:PixelYDimension": height}
        if dpi:
            names |= {"tiff:XResolution": f"{round(dpi[0])}/1", "tiff:YResolution": f"{round(dpi[1])}/1"}
            names |= {"tiff:ResolutionUnit": _INCHES}
        return replace(self, exif=exif, xmp=_with_xmp(self.xmp, names), dpi=dpi)


def read_metadata(image: Image.Image) -> tuple[Metadata, list[str]]:
    """The metadata that is kept, for an upright sRGB picture without a thumbnail; and why some is not.

    Args:
        image: Loaded, so that chunks behind the pixels have been read.
    """
    problems, info = [], image.info
    try:
        if _LONG_EXIF in info:
            raise ValueError(f"{info[_LONG_EXIF]} bytes, more than {MAX_BYTES}")
        exif = image.getexif()
        if image.format == "TIFF":  # these are of the file
            for tag in (Base.ImageWidth, Base.ImageLength):
                exif.pop(tag, None)
        kept = _kept_exif(exif)
        dpi = _dpi(exif, info)
    except _DAMAGE as error:
        kept, dpi = {}, None
        problems.append(f"its EXIF is left out ({type(error).__name__}: {error})")
    xmp = ""
    try:
        xmp = _kept_xmp(info.get("xmp") or info.get("XML:com.adobe.xmp") or "")
    except _DAMAGE as error:
        problems.append(f"its XMP is left out ({error})")
    return Metadata(kept, xmp, dpi), problems


def drop_long_exif(image: Image.Image) -> None:
    """Keeps Pillow from parsing long EXIF: its tags may all name the same bytes, and so fill the memory."""
    if (size := len(image.info.get("exif") or b"")) > MAX_BYTES:
        image.info["exif"] = b""
        image.info[_LONG_EXIF] = size


def _kept_exif(exif: Image.Exif) -> dict[int, Any]:
    kept: dict[int, Any] = {tag: exif[tag] for tag in _KEPT if tag in exif}
    details, gps = exif.get_ifd(IFD.Exif), exif.get_ifd(IFD.GPSInfo)
    details = {tag: value for tag, value in details.items() if tag not in _LEFT_OUT}
    kept = _with(kept, {Base.Orientation: 1})
    details = _with(details, {Base.ColorSpace: _SRGB})
    kept |= {tag: values for tag, values in ((IFD.Exif, details), (IFD.GPSInfo, gps)) if values}
    if (size := len(Metadata(kept).exif_bytes())) > MAX_BYTES:
        raise ValueError(f"{size} bytes, more than {MAX_BYTES}")
    return kept


def _kept_xmp(xmp: bytes | str) -> str:
    if len(xmp) > MAX_BYTES:
        raise ValueError(f"{len(xmp)} bytes, more than {MAX_BYTES}")
    text = xmp if isinstance(xmp, str) else xmp.rstrip(b"\0").decode("utf-8")
    text = re.sub(r"<xmp:Thumbnails>.*?</xmp:Thumbnails>", "", text, flags=re.DOTALL)
    names = {"tiff:Orientation": 1, "exif:ColorSpace": _SRGB, "photoshop:ICCProfile": "sRGB IEC61966-2.1"}
    # A motion photo's video is not in the result.
    return _with_xmp(text, names | {"GCamera:MotionPhoto": 0, "GCamera:MicroVideo": 0})


def _with(values: Mapping[int, Any], changes: Mapping[int, Any]) -> dict[int, Any]:
    """The values, those changed that are there."""
    return {tag: changes.get(tag, value) for tag, value in values.items()}


def _with_xmp(xmp: str, changes: Mapping[str, object]) -> str:
    """The same for XMP, where a value is an attribute or an element."""
    for name, value in changes.items():
        for start, end in ((rf"\b{name}\s*=\s*[\"']", r"[^\"'<>]*"), (rf"<{name}>", r"[^<>]*")):
            xmp = re.sub(f"({start}){end}", rf"\g<1>{value}", xmp)
    return xmp


def _dpi(exif: Image.Exif, info: Mapping[Any, Any]) -> tuple[float, float] | None:
    dpi = info.get("dpi")
    if info.get("jfif_unit") in (0, None) and "jfif" in info:
        dpi = None  # Pillow then says 72, or repeats the EXIF
    if dpi is None and Base.XResolution in exif:
        per_unit = {_INCHES: 1.0, _CENTIMETRES: 2.54}.get(exif.get(Base.ResolutionUnit, _INCHES), 0.0)
        dpi = tuple(exif.get(tag, 0) * per_unit for tag in (Base.XResolution, Base.YResolution))
    if not dpi or not all(1 < value < _MOST_DPI for value in dpi):
        return None  # a ratio, or none at all
    return float(dpi[0]), float(dpi[1])
