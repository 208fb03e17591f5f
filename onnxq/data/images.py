"""Images into arrays, by a preprocessing that is written as one line of text.

``resize=256,crop=224,mean=127,std=128,layout=nchw`` means: the shorter side to 256 pixels, the
middle 224 x 224, ``(pixel - 127) / 128`` per channel, channels first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import DataError, SpecError, UnsupportedError

FloatArray = npt.NDArray[np.float32]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp"})

_CHOICES = {
    "layout": ("nchw", "nhwc"),
    "color": ("rgb", "bgr"),
    "interpolation": ("bilinear", "bicubic", "nearest"),
}


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes a float32 array: ``(scale * pixel - mean) / std``, pixel in 0..255.

    Attributes:
        resize: length of the shorter side after resizing, aspect kept; 0: not resized.
        crop: side of the centred square; 0: not cropped.
        mean: one number, or one a channel in the order of ``color``.
        std: likewise, not zero.
        scale: what pixels are multiplied with first, ``1/255`` for instance.
        layout: ``nchw`` or ``nhwc``.
        color: ``rgb`` or ``bgr``.
        interpolation: ``bilinear``, ``bicubic`` or ``nearest``.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = (127.0,)
    std: tuple[float, ...] = (128.0,)
    scale: float = 1.0
    layout: str = "nchw"
    color: str = "rgb"
    interpolation: str = "bilinear"

    @classmethod
    def parse(cls, text: str) -> ImageSpec:
        """Read ``key=value,...``; lists are written ``0.485:0.456:0.406``, fractions ``1/255``.

        Raises:
            SpecError: ``SPEC-IMAGE`` names the key and what it may be.
        """
        given: dict[str, Any] = {}
        for part in (piece.strip() for piece in text.split(",") if piece.strip()):
            key, equals, value = part.partition("=")
            key = key.strip()
            if not equals or key not in _READERS:
                raise _spec_error(f"cannot read {part!r}", f"keys are {', '.join(_READERS)}")
            if key in given:
                raise _spec_error(f"{key} is given twice", f"leave one {key}=... in the text")
            try:
                given[key] = _READERS[key](value.strip())
            except (ValueError, ZeroDivisionError) as error:
                raise _spec_error(f"cannot read {part!r}", _HINTS[key]) from error
        return cls(**given)

    def __post_init__(self) -> None:
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise _spec_error(f"{key}={getattr(self, key)!r}", f"one of {', '.join(allowed)}")
        if self.resize < 0 or self.crop < 0:
            raise _spec_error(
                f"resize={self.resize}, crop={self.crop}", "sizes in pixels; 0 for none"
            )
        for key in ("mean", "std"):
            if len(getattr(self, key)) not in (1, 3):
                raise _spec_error(f"{key} has {len(getattr(self, key))} numbers", "one or three")
        if 0.0 in self.std:
            raise _spec_error("std is zero", "the divisor of a channel cannot be zero")

    def __str__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            text = ":".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)
            parts.append(f"{field.name}={text}")
        return ",".join(parts)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(":"))


def _number(text: str) -> float:
    return float(Fraction(text))


_READERS: dict[str, Callable[[str], Any]] = {
    "resize": int,
    "crop": int,
    "mean": _numbers,
    "std": _numbers,
    "scale": _number,
    "layout": str.lower,
    "color": str.lower,
    "interpolation": str.lower,
}
_HINTS = {
    "resize": "a number of pixels",
    "crop": "a number of pixels",
    "mean": "a number, or three as r:g:b",
    "std": "a number, or three as r:g:b",
    "scale": "a number or a fraction such as 1/255",
}


def _spec_error(cause: str, hint: str) -> SpecError:
    return SpecError("SPEC-IMAGE", f"image preprocessing: {cause}", hint)


def load_image(path: str | Path, spec: ImageSpec) -> FloatArray:
    """One image as ``[3, H, W]`` (``nchw``) or ``[H, W, 3]`` (``nhwc``) f32, no batch dimension.

    Raises:
        DataError: ``DATA-IMAGE`` when the file is no image or is smaller than the crop.
        UnsupportedError: ``UNSUPPORTED-NO-PILLOW``.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UnsupportedError(
            "UNSUPPORTED-NO-PILLOW",
            "reading images needs the package pillow",
            "pip install 'onnxq[images]'",
        ) from error
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(
            "DATA-IMAGE", f"{path} cannot be read as an image: {error}", "remove or replace it"
        ) from error
    if spec.resize and min(image.size) != spec.resize:
        factor = spec.resize / min(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        method = Image.Resampling[spec.interpolation.upper()]
        image = image.resize(size, method)
    if spec.crop:
        if min(image.size) < spec.crop:
            raise DataError(
                "DATA-IMAGE",
                f"{path} has {image.width} x {image.height} pixels, the crop needs {spec.crop}",
                "choose resize >= crop",
            )
        left, top = (image.width - spec.crop) // 2, (image.height - spec.crop) // 2
        image = image.crop((left, top, left + spec.crop, top + spec.crop))
    pixels = np.asarray(image, dtype=np.float32)
    if spec.color == "bgr":
        pixels = pixels[:, :, ::-1]
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    scaled = (pixels * np.float32(spec.scale) - mean) / std
    return np.ascontiguousarray(scaled.transpose(2, 0, 1) if spec.layout == "nchw" else scaled)


def load_images(paths: Sequence[str | Path], spec: ImageSpec) -> FloatArray:
    """N images of one size as ``[N, ...]`` f32.

    Raises:
        DataError: ``DATA-IMAGE``; also when the sizes differ, which needs ``crop``.
    """
    images = [load_image(path, spec) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                "DATA-IMAGE",
                f"{path} becomes {list(image.shape)} and {paths[0]} {list(images[0].shape)}",
                "add crop=SIZE so that all images have one size",
            )
    return np.stack(images)


def list_images(folder: str | Path) -> list[Path]:
    """All image files directly in ``folder``, by name.

    Raises:
        DataError: ``DATA-EMPTY`` when there is no folder or no image in it.
    """
    root = Path(folder)
    found = sorted(root.iterdir()) if root.is_dir() else []
    images = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise DataError(
            "DATA-EMPTY",
            f"{folder} is not a folder with images",
            f"known endings: {', '.join(sorted(IMAGE_SUFFIXES))}",
        )
    return images
