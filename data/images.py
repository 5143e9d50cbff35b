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
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow reads more; EPS would start Ghostscript
MACS_OWN = "._"  # how a file begins that macOS puts beside another, of the same suffix but other content
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
TURNS = {2: Flip.FLIP_LEFT_RIGHT, 3: Flip.ROTATE_180, 4: Flip.FLIP_TOP_BOTTOM}  # what makes a picture upright
LYING = {5: Flip.TRANSPOSE, 6: Flip.ROTATE_270, 7: Flip.TRANSVERSE, 8: Flip.ROTATE_90}  # the same of one on its side
TURNS |= LYING
WIDTH, HEIGHT, BITS, PHOTOMETRIC = 0x0100, 0x0101, 0x0102, 0x0106  # the tags of a TIFF
WHITE_IS_ZERO = 0  # of the last
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is above our own bound


class ImageError(ValueError):
    """The bytes are no picture we can read. The message is the reason, short enough for a list of skipped files."""


def raise_if_failing(error: Exception, path: Path | str) -> None:
    """Raise a `UserError` where a disk or a network failed: that is no property of the picture."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in FAILING:
        raise UserError(f"{path}: {cause.strerror}; start again") from error


@contextlib.contextmanager
def _damage_is(reason: str) -> Iterator[None]:
    """Raise as an `ImageError` what damage raises, nearly anything: OSError, SyntaxError, struct.error, ..."""
    try:
        yield
    except MemoryError:
        raise  # says nothing of the picture
    except Image.DecompressionBombError as error:  # Pillow's own bound, above ours
        raise ImageError(f"more than {MAX_PIXELS // 10**6} megapixels") from error
    except Exception as error:
        raise ImageError(getattr(error, "strerror", None) or reason) from error  # the file's own failure, if it is one


def _open(source: bytes | Path) -> Image.Image:
    """Read the header only. Raises `ImageError` for what is no image or too big."""
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
    return image


def _is_heif(source: bytes | Path) -> bool:
    """As phones name such a picture .jpg when it is sent on. Its first box says of which kinds it is."""
    head = source[:32] if isinstance(source, bytes) else source.open("rb").read(32)
    return head[4:8] == b"ftyp" and any(kind in head for kind in (b"heic", b"heix", b"mif1", b"avif"))


def decode(source: bytes | Path) -> Image.Image:
    """A picture file, or its bytes, as an upright RGB image at native size; of an animation, the first frame.

    Raises:
        ImageError: not an image, truncated or damaged, or more than `MAX_PIXELS` (known before decoding).
        MemoryError: the picture may be a good one.
    """
    image = _open(source)
    if image.mode in ("I", "F"):  # 32 bits a pixel, and nothing says which number is white
        raise ImageError("32 bits a pixel, of no known scale; save it with 8 or 16")
    with _damage_is("truncated or damaged image"):  # decoders raise nearly anything too
        image.load()  # by which a TIFF is turned already
        lies = orientation(image)
        if image.mode.startswith("I;16"):  # 16 bits a pixel: convert("RGB") would clip at 255 where it should scale
            image = in_8_bits(image)
        if lies in TURNS:  # Pillow's `exif_transpose` writes all EXIF anew, and fails at some
            image = image.transpose(TURNS[lies])
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def in_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits a pixel, or a TIFF of 12, with its transparent level, if it has one, white."""
    tags, levels = getattr(image, "tag_v2", {}), np.asarray(image).astype(np.int64)
    grey = (levels * 255 // (2 ** tags.get(BITS, (16,))[0] - 1)).clip(0, 255)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow sees to in 8 bits alone
        grey = 255 - grey
    grey[levels == image.info.get("transparency")] = 255
    return Image.fromarray(grey.astype(np.uint8))


def orientation(image: Image.Image) -> int:
    """How the picture lies, by its EXIF; upright where that cannot be read: its pixels may be whole all the same."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # damage raises nearly anything; of a PNG also what is cut off before its EXIF
        return 1


def no_image(cell: Mapping) -> str:
    """The reason, of a cell in the hub's schema without bytes. A file that it names is not opened: whoever wrote the
    table may have named any."""
    return "no image in this row" + ", only a file's name" * bool(cell.get("path"))


def native_size(source: bytes | Path) -> tuple[int, int]:
    """(height, width) that `decode` would give, read from no more than the format makes us. Raises `ImageError`."""
    image = _open(source)
    turned = orientation(image) in LYING
    width, height = image.size
    if image.format == "TIFF":  # whose `size` some versions of Pillow have turned already
        width, height = image.tag_v2[WIDTH], image.tag_v2[HEIGHT]
    return (width, height) if turned else (height, width)


def to_canvas(image: Image.Image, canvas: tuple[int, int]) -> np.ndarray:
    """RGB image -> uint8 (H, W, 3) of the canvas (H, W): bicubic, antialiased; untouched where it already fits."""
    height, width = canvas
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def pixel_hash(image: Image.Image) -> int:
    """64 bits that name an RGB picture by size and pixels: equal for two files of the same picture."""
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little")
