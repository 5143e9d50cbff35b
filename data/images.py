"""Image bytes in, one kind of picture out: upright RGB, alpha composited on white."""

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import FAILING, UserError

Flip = Image.Transpose

MAX_PIXELS = 64_000_000  # a 64-megapixel photo decodes to 192 MB; whatever claims more is refused before it is decoded
MAX_SIDE = 65_535  # JPEG's own bound; resizing a longer side would take gigabytes
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow reads more; EPS would start Ghostscript
MACS_OWN = "._"  # beginning of the name of a metadata file that macOS puts beside another, with its suffix
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
TURNS = {2: Flip.FLIP_LEFT_RIGHT, 3: Flip.ROTATE_180, 4: Flip.FLIP_TOP_BOTTOM}  # what makes a picture upright
LYING = {5: Flip.TRANSPOSE, 6: Flip.ROTATE_270, 7: Flip.TRANSVERSE, 8: Flip.ROTATE_90}  # the same if on its side
TURNS |= LYING
WIDTH, HEIGHT, BITS, PHOTOMETRIC = 0x0100, 0x0101, 0x0102, 0x0106  # TIFF tags
WHITE_IS_ZERO = 0  # a value of PHOTOMETRIC
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it warns only above our own bound


class ImageError(ValueError):
    """The bytes are no readable picture. The message is the reason, short enough for a list of skipped files."""


def raise_if_failing(error: Exception, path: Path | str) -> None:
    """Raise a `UserError` if a disk or a network failed, which says nothing about the picture."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in FAILING:
        raise UserError(f"{path}: {cause.strerror}; start again") from error


@contextlib.contextmanager
def _damage_is(reason: str) -> Iterator[None]:
    """Turn the errors of damaged pictures, nearly any (OSError, SyntaxError, struct.error, ...), into `ImageError`."""
    try:
        yield
    except MemoryError:
        raise  # says nothing about the picture
    except Image.DecompressionBombError as error:  # Pillow's own bound, above ours
        raise ImageError(f"more than {MAX_PIXELS // 10**6} megapixels") from error
    except Exception as error:
        raise ImageError(getattr(error, "strerror", None) or reason) from error  # an OSError has its own reason


def _open(source: bytes | Path) -> Image.Image:
    """Read only the header. Raises `ImageError` if it is not an image or too large."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with _damage_is("not an image"):
            image = Image.open(file, formats=FORMATS)
    except ImageError as error:
        if isinstance(error.__cause__, UnidentifiedImageError) and _is_heif(source):
            raise ImageError("a HEIC or AVIF picture, which is not read: convert it to JPEG") from error
        raise
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{image.width}x{image.height} is more than {MAX_PIXELS // 10**6} megapixels")
    if max(image.size) > MAX_SIDE:
        raise ImageError(f"{image.width}x{image.height} has a side of more than {MAX_SIDE:,} pixels")
    return image


def _is_heif(source: bytes | Path) -> bool:
    """Whether it is a HEIC or AVIF picture, which phones may name .jpg; the first box of the file lists its brands."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        head = file.read(32)
    return head[4:8] == b"ftyp" and any(kind in head for kind in (b"heic", b"heix", b"mif1", b"avif"))


def decode(source: bytes | Path) -> Image.Image:
    """A picture file, or its bytes, as an upright RGB image at native size; of an animation, the first frame.

    Raises:
        ImageError: not an image, truncated or damaged, or more than `MAX_PIXELS` (known before decoding).
        MemoryError: memory ran out; the picture may be fine.
    """
    image = _open(source)
    if image.mode in ("I", "F"):  # 32 bits a pixel, and nothing says which number is white
        raise ImageError("32 bits a pixel, of no known scale; save it with 8 or 16")
    with _damage_is("truncated or damaged image"):  # decoders raise nearly anything too
        image.load()  # this turns a TIFF upright already
        lies = orientation(image)
        if image.mode.startswith("I;16"):  # 16 bits a pixel: convert("RGB") would clip at 255 where it should scale
            image = in_8_bits(image)
        if lies in TURNS:  # Pillow's `exif_transpose` rewrites all EXIF, and fails on some
            image = image.transpose(TURNS[lies])
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def in_8_bits(image: Image.Image) -> Image.Image:
    """An 8-bit copy of a grey picture with 16 bits a pixel, or a TIFF with 12; a transparent level becomes white."""
    tags, levels = getattr(image, "tag_v2", {}), np.asarray(image).astype(np.int32)
    grey = (levels * 255 // (2 ** tags.get(BITS, (16,))[0] - 1)).clip(0, 255)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts such pictures only if they have 8 bits
        grey = 255 - grey
    if (key := image.info.get("transparency")) is not None:
        grey[levels == key] = 255
    return Image.fromarray(grey.astype(np.uint8))


def orientation(image: Image.Image) -> int:
    """The orientation in the picture's EXIF; upright if that cannot be read, as the pixels may still be intact."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # damage raises nearly anything, and so does a PNG that is cut off before its EXIF
        return 1


def no_image(cell: Mapping) -> str:
    """The reason for a cell in the hub's schema without bytes. A file that the cell names is not opened: whoever wrote
    the table may have named any file."""
    return "no image in this row" + ", only a file's name" * bool(cell.get("path"))


def native_size(source: bytes | Path) -> tuple[int, int]:
    """(height, width) that `decode` would give, reading as little as the format allows. Raises `ImageError`."""
    image = _open(source)
    turned = orientation(image) in LYING
    width, height = image.size
    if image.format == "TIFF":  # some versions of Pillow have turned its `size` already
        width, height = image.tag_v2[WIDTH], image.tag_v2[HEIGHT]
    return (width, height) if turned else (height, width)


def to_canvas(image: Image.Image, canvas: tuple[int, int]) -> np.ndarray:
    """RGB image -> uint8 (H, W, 3) of the canvas (H, W): bicubic, antialiased; untouched where it already fits."""
    height, width = canvas
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def pixel_hash(image: Image.Image) -> int:
    """A 64-bit hash of an RGB picture's size and pixels: equal for two files of the same picture."""
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little")
