"""Folders of images, and one image as a person sees it who opens the file."""

import collections
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from common.cli import Refused, say

ENDINGS = tuple(
    ending for ending in (".jpg .jpeg .jpe .jfif .png .apng .gif .webp .avif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm "
                          ".jp2 .j2k .tga").split()
    if ending in Image.registered_extensions()
)
SMALL = 64  # pixels; larger images are blurred, resized and augmented as ImageNet's are
ORIENTATION = 0x0112  # the tag of EXIF and TIFF
LONG = 8  # times its short side: what is longer is cut before it is resized

# ---------------------------------------------------------------- folders


class Folder(NamedTuple):
    files: list  # paths, class by class
    labels: list  # places in `classes`
    classes: list  # names of the folders, in order


def list_folder(root):
    """The images in root/CLASS and the folders below, as torchvision's ImageFolder orders them.

    Names that begin with a dot, __MACOSX and Thumbs.db are no classes and no images. Files whose ending is not an
    image's are left out, and counted in one line. A folder that links lead to twice is read once. Raises Refused where
    there is no class, or a class has no image.
    """
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    if not classes:
        raise Refused(f"--data: {root} has no folder in it: --dataset folder wants DIR/train/CLASS/*.jpg")
    files, labels, left_out = [], [], collections.Counter()
    for label, name in enumerate(classes):
        found = list_images(Path(root, name), left_out)
        if not found:
            raise Refused(f"--data: {root} has no image in the class {name}: fill the folder or remove it")
        files += found
        labels += [label] * len(found)
    if left_out:
        counts = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in left_out.most_common())
        say(f"{root}: left out what is no image by its ending ({counts})")
    return Folder(files, labels, classes)


def list_images(root, left_out):
    """The paths of the images below a folder; counts the endings of all other files in `left_out`."""
    seen, found = set(), []
    for place, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(place) in seen:  # links in a circle would lead here for ever
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        names = sorted(name for name in names if not is_hidden(name))
        images = [name for name in names if name.lower().endswith(ENDINGS)]
        found.append((place, images))
        left_out.update(Path(name).suffix for name in sorted(set(names) - set(images)))
    return [os.path.join(place, name) for place, names in sorted(found) for name in names]


def is_hidden(name):
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


# ---------------------------------------------------------------- files


def read_image(path):
    """(3, H, W) uint8: the image upright, on white where it is transparent, its first frame if it moves.

    16-bit grey is scaled to 8 bits. Raises Refused where the file holds no image, or values of an unknown range.
    """
    try:
        with Image.open(path) as file:
            return TF.pil_to_tensor(as_seen(file, path))
    except Refused:
        raise
    except Image.DecompressionBombError as e:
        raise Refused(f"{path} is larger than Pillow reads ({e}): make it smaller") from e
    except Exception as e:  # Pillow's errors have no common class
        raise Refused(f"{path} is not a readable image: replace it by a readable one of the same name") from e


def as_seen(picture, path):
    """An opened file as RGB of 8 bits."""
    if picture.getexif().get(ORIENTATION, 1) != 1:
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16") or picture.mode == "I" and picture.format == "PPM":
        values = np.asarray(picture).astype(np.int64) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise Refused(f"{path} holds values of 32 bits, whose range is unknown: save it with 8 or 16 bits")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def resize_and_crop(image, size):
    """The middle of an image, `size` pixels square; an image of that size stays as it is.

    The shorter side is resized to 8/7 of `size` first (256 for 224, as for ImageNet), or, up to 64 pixels, to `size`.
    """
    if image.shape[-2:] == (size, size):
        return image
    height, width = image.shape[-2:]
    longest = LONG * min(height, width)
    if max(height, width) > longest:  # resized as a whole it might fill the memory
        image = TF.center_crop(image, [min(height, longest), min(width, longest)])
    return TF.center_crop(TF.resize(image, size * 8 // 7 if size > SMALL else size, antialias=True), size)
