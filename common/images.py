"""Image files as a person sees them, the folders that hold them, and the square in the middle of an image.

Order and classes of a folder are those of torchvision's ImageFolder. docs/differences.md lists what differs.
"""

import contextlib
import os
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from common.cli import Refused, say

Image.preinit()  # the common formats come first: a file is offered to one format after the other
ENDINGS = Image.registered_extensions()
NO_PICTURES = {"BUFR", "FITS", "GRIB", "HDF5", "MPEG", "EPS", "WMF"}  # measurements, films, drawing programs
FORMATS = tuple(name for name in Image.ID if name in Image.OPEN and name not in NO_PICTURES)
READ = {ending for ending, name in ENDINGS.items() if name in FORMATS} | {".jfif", ".mpo"}
SMALL_SIZE = 64  # pixels; larger images are blurred, resized and augmented as ImageNet's are
THIN = 64  # times as long as wide: longer images lose their ends before they are resized
NO_NAMES = {"__MACOSX", "Thumbs.db"}  # what systems leave in folders
TURNS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # what may hold an orientation
BITS, WHITE_IS_ZERO = 258, 262  # TIFF's tags BitsPerSample and PhotometricInterpretation
UNPACKED = {  # Pillow's names for the depth of a PNG file
    "L;2": lambda grey: 85 * grey, "L;4": lambda grey: 17 * grey, "RGB;16B": lambda rgb: tuple(v >> 8 for v in rgb),
}

# ---------------------------------------------------------------- a file


def read_image(path):
    """(3, H, W) uint8: the image in a file, RGB, as a person sees it. Of an animation it is the first frame."""
    remedy = "of the same name"
    try:
        with open(path, "rb") as file:
            image = Image.open(file, formats=FORMATS)
            if image.format == "PNG" and "transparency" in image.info:
                unpack_transparency(image)
            image.load()
            return TF.pil_to_tensor(as_seen(image))
    except RangeUnknown as e:
        raise Refused(f"{path} holds {e}, whose range is unknown: replace it by a file of 8 or 16 bits {remedy}") from e
    except Image.DecompressionBombError as e:
        reason = str(e).split(", could be")[0]
        raise Refused(f"{path} is too large ({reason}): replace it by a smaller image {remedy}") from e
    except MemoryError:
        raise
    except Exception as e:  # Pillow's errors have no common class
        raise Refused(f"{path} is not a readable image: replace it by a readable image {remedy}") from e


def unpack_transparency(image):
    """Brings the transparent colour of a PNG file, not loaded yet, to the 8 bits that Pillow brings its pixels to."""
    unpack = UNPACKED.get(image.tile[0][3], lambda colour: colour)
    image.info["transparency"] = unpack(image.info["transparency"])


class RangeUnknown(Exception):
    """Numbers of which nothing says which are black and white."""


def as_seen(image):
    """An image of Pillow's in RGB: turned upright, in 8 bits, transparency composited on white."""
    if not TURNS.isdisjoint(image.info):
        with contextlib.suppress(Exception):  # damaged EXIF data: such an image is seen as it lies
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        return in_8_bits(image).convert("RGB")
    if image.mode in ("I", "F"):
        raise RangeUnknown("whole numbers of 32 bits" if image.mode == "I" else "floating-point numbers")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def in_8_bits(image):
    """The upper 8 bits of a grey image of 16, or as many as its TIFF tags say."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    grey = values >> tags.get(BITS, (16,))[0] - 8
    if tags.get(WHITE_IS_ZERO) == 0:
        grey = 255 - grey
    grey = np.where(values == image.info.get("transparency", -1), 255, grey)  # PNG's transparent grey, on white
    return Image.fromarray(grey.astype(np.uint8))


def resize_and_crop(image, size):
    """The middle of an image, `size` pixels square; an image of that size stays as it is.

    The shorter side is resized to 8/7 of `size` first (256 for 224, as for ImageNet), or, up to 64 pixels, to `size`.
    """
    if image.shape[-2:] == (size, size):
        return image
    side = size * 8 // 7 if size > SMALL_SIZE else size
    return TF.center_crop(TF.resize(without_far_ends(image), side, antialias=True), size)


def without_far_ends(image):
    """The middle of an image that is more than THIN times as long as wide; any other one stays as it is.

    Resized as a whole, such an image might fill the memory. An even number of widths goes at either end, so that the
    pixels of the middle, resized, lie where they lay.
    """
    short, long = sorted(image.shape[-2:])
    end = max(long // short - THIN, 0) // 4 * 2 * short
    return image.narrow(1 if image.shape[1] == long else 2, end, long - 2 * end) if end else image


# ---------------------------------------------------------------- a folder


class Folder(NamedTuple):
    files: list  # paths
    labels: list  # a place in `classes` for each file; zeros where there are no classes
    classes: list  # names


def find_images(root, option="--data"):
    """The Folder of the images in root/CLASS and below, or in `root` itself where it has no class folders.

    It says what it leaves out. It raises Refused, naming the option, where there is nothing to find.
    """
    try:
        classes = class_folders(root, option)
        files, labels, others = [], [], []
        for path, label in files_below(root, classes):
            if label is None or not is_image(path):
                others.append(path)
            else:
                files.append(path)
                labels.append(label)
    except OSError as e:
        raise Refused(f"{option} {str(root)[:80]} cannot be read ({e.strerror}): name another folder") from e
    left_out = counted(
        "beside the class folders" if is_image(path) else ending(path) or "without an ending" for path in others)
    empty = sorted(set(range(len(classes) or 1)).difference(labels))
    if empty:
        name = f"the class {classes[empty[0]]}" if classes else "the folder"
        beside = f" (left out: {left_out})" if left_out else ""
        remedy = "add some, or take its folder away" if classes else "it wants CLASS/*.jpg"
        raise Refused(f"{option} {root}: {name} has no images{beside}: {remedy}")
    if left_out:
        say(f"{root}: left out {left_out}")
    return Folder(files, labels, classes)


def class_folders(root, option):
    """The names of the folders in `root`, in order. Raises Refused where two of them are links to one."""
    names = [name for name in sorted(os.listdir(root)) if is_meant(name) and os.path.isdir(os.path.join(root, name))]
    first = {}
    for name in names:
        other = first.setdefault(identity(os.path.join(root, name)), name)
        if other != name:
            raise Refused(f"{option} {root}: the classes {other} and {name} are one folder: take one of them away")
    return names


def files_below(root, classes):
    """Yields (path, label) of every file, in ImageFolder's order; its label is None beside the class folders.

    Every real folder is visited once: links may run in circles.
    """
    here = [name for name in sorted(os.listdir(root)) if is_meant(name) and name not in classes]
    yield from ((os.path.join(root, name), None if classes else 0) for name in here)
    places = [os.path.join(root, name) for name in classes]
    visited = {identity(root), *map(identity, places)}
    for label, place in enumerate(places):
        for folder, names in sorted(walk(place, visited)):
            yield from ((os.path.join(folder, name), label) for name in sorted(filter(is_meant, names)))


def walk(place, visited):
    """Yields (folder, names of its files) of a folder and of those below it that are not in `visited`, a set."""
    for folder, below, names in os.walk(place, followlinks=True, onerror=stop):
        yield folder, names
        meant = sorted(filter(is_meant, below))
        below[:] = [name for name in meant if mark_visited(os.path.join(folder, name), visited)]


def stop(error):
    raise error


def mark_visited(folder, visited):
    """Adds the folder to `visited`. Returns whether it is new there."""
    before = len(visited)
    visited.add(identity(folder))
    return len(visited) > before


def identity(folder):
    """What is the same for all names of a folder."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def is_meant(name):
    """Whether a name is one that people give, and not one that a system leaves behind."""
    return not name.startswith(".") and name not in NO_NAMES


def is_image(path):
    return ending(path) in READ


def ending(path):
    return os.path.splitext(path)[1].lower()


def counted(kinds):
    """How many there are of each kind, in words."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(kinds).items()))
