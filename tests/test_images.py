"""Images as people have them: each kind of file with the pixels that a person sees, or the line that refuses it."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import common.config
import common.data
import common.images
import common.run_folder
import common.views
import linear_probe
import pretrain
from common.cli import Refused
from runs import FOLDER, folder_of, log_of, probe, refusal, train

pytestmark = pytest.mark.seeds_torch
SIZE = 16
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.uint8)
GREY = X + 16 * Y  # all of 0 to 255
COLOUR = np.stack([16 * X, 16 * Y, 8 * X + 8 * Y], 2)  # no two pixels alike, and no symmetry
ALPHA = np.choose(X % 3, [0, 128, 255]).astype(np.uint8)
INDEX, PALETTE = GREY, COLOUR.reshape(-1)


# ---------------------------------------------------------------- what a person sees


def grey(values):
    return np.repeat(values[:, :, None], 3, 2)


def on_white(colours, alpha):
    a = alpha[:, :, None] / 255
    return np.floor(colours * a + 255 * (1 - a) + 0.5).astype(np.uint8)


TURNS = {  # where EXIF says that the stored first row and first column are seen
    1: lambda p: p,  # top, left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.swapaxes(0, 1),  # left, top
    6: lambda p: p.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda p: p.swapaxes(0, 1)[::-1],  # left, bottom
}


# ---------------------------------------------------------------- how the files are made


def saved(pixels, mode=None, **options):
    """What writes an array, or an image of Pillow's, as the path's ending says."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    return lambda path: (image.convert(mode) if mode else image).save(path, **options)


def bytes_of(contents):
    return lambda path: path.write_bytes(contents)


def turned(orientation, pixels=COLOUR):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"pixels": pixels, "exif": exif}


def palette(**options):
    image = Image.frombytes("P", (SIZE, SIZE), INDEX.tobytes())
    image.putpalette(PALETTE.tobytes())
    return saved(image, **options)


def png(values, depth, kind, *chunks, size=(SIZE, SIZE)):
    """A PNG file by the letter of its standard. values: its rows; kind: 0 grey, 2 RGB, 4 and 6 with alpha."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def wide(values):
    """Values of 16 bits that lie in the middle of those with these upper 8 bits, high byte first."""
    return (values.astype(np.uint16) * 256 + 77).astype(">u2")


def tiff(data, bits, photometric=1, order="<"):
    """A grey TIFF file of one strip by the letter of its standard."""
    tags = [(256, SIZE), (257, SIZE), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, SIZE)]
    tags += [(279, len(data))]
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(data))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    return head + data + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)


def packed_12(values):
    """Two values of 12 bits in three bytes."""
    a, b = values.reshape(-1, 2).astype(int).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def pnm(kind, maxval, values):
    head = f"{kind} {SIZE} {SIZE} {maxval}\n".encode()
    if kind in ("P2", "P3"):
        return bytes_of(head + " ".join(map(str, values.reshape(-1))).encode())
    return bytes_of(head + values.astype(">u2" if maxval > 255 else np.uint8).tobytes())


def frames(**options):
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    return lambda path: first.save(path, save_all=True, append_images=[second], **options)


def whole_jpeg():
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, "jpeg", quality=95)
    return file.getvalue()


def with_broken_exif(path):
    data = b"Exif\0\0no such thing"
    path.write_bytes(whole_jpeg()[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + whole_jpeg()[2:])


def damaged_exif(orientation):
    """Exif data of which one entry is of a wrong type."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    return exif.tobytes().replace(b"\x01\x0f", b"\x01\x52")  # ExtraSamples, which are numbers


def lab():
    neutral = Image.new("L", (SIZE, SIZE), 128)
    return saved(Image.merge("LAB", [Image.fromarray(GREY), neutral, neutral]))


class Kind(NamedTuple):
    name: str  # with the file's ending
    make: object  # make(path) writes it
    seen: object  # the pixels (H, W, 3), or words of the refusal
    within: int = 0  # grey levels that lossy formats may be off


LOSSLESS = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}
KINDS = [
    *(Kind(f"colour.{ending}", saved(COLOUR, **LOSSLESS.get(ending, {})), COLOUR)
      for ending in "png bmp dib ppm tif tiff webp jp2 tga pcx sgi qoi apng".split()),
    *(Kind(f"lossy.{ending}", saved(COLOUR, quality=95), COLOUR, 15)
      for ending in "jpg JPEG jpe mpo webp avif".split()),
    Kind("lossy.jfif", saved(COLOUR, format="JPEG", quality=95), COLOUR, 12),
    Kind("a-jpeg.png", bytes_of(whole_jpeg()), COLOUR, 12),
    Kind("packed-lzw.tif", saved(COLOUR, compression="tiff_lzw"), COLOUR),
    *(Kind(f"grey.{ending}", saved(GREY), grey(GREY)) for ending in "png bmp pgm tif tga sgi".split()),
    Kind("grey.jpg", saved(GREY, quality=100), grey(GREY), 4),
    *(Kind(f"one-bit.{ending}", saved(Image.fromarray(GREY).point(lambda v: 255 * (v > 99), "1")),
           grey(np.where(GREY > 99, 255, 0).astype(np.uint8))) for ending in "png bmp pbm tif pcx".split()),
    Kind("two-bits.png", bytes_of(png(np.full((SIZE, 4), 0b00011011, np.uint8), 2, 0)),
         grey(np.tile(np.array([0, 85, 170, 255], np.uint8), (SIZE, 4)))),
    *(Kind(f"palette.{ending}", palette(), COLOUR) for ending in "png gif bmp tif pcx".split()),
    # 16 bits and other depths
    Kind("grey-16.png", saved(wide(GREY).astype("<u2")), grey(GREY)),
    Kind("grey-16-by-hand.png", bytes_of(png(wide(GREY), 16, 0)), grey(GREY)),
    Kind("ramp-16.png", saved((GREY.astype(np.uint16) * 257)), grey(GREY)),
    Kind("grey-16.tif", saved(wide(GREY).astype("<u2")), grey(GREY)),
    Kind("grey-16-big-endian.tif", bytes_of(tiff(wide(GREY).tobytes(), 16, order=">")), grey(GREY)),
    Kind("grey-16-white-is-0.tif", bytes_of(tiff(wide(255 - GREY).astype("<u2").tobytes(), 16, 0)), grey(GREY)),
    Kind("grey-12.tif", bytes_of(tiff(packed_12(GREY.astype(int) * 16 + 5), 12)), grey(GREY)),
    Kind("grey-16.pgm", pnm("P5", 65535, wide(GREY)), grey(GREY)),
    Kind("grey-16-plain.pgm", pnm("P2", 65535, wide(GREY)), grey(GREY)),
    Kind("grey-10.pgm", pnm("P5", 1023, GREY.astype(int) * 4 + 2), grey(GREY), 1),
    Kind("grey-4.pgm", pnm("P5", 15, GREY >> 4), grey((GREY >> 4) * 17)),
    Kind("colour-16.ppm", pnm("P6", 65535, COLOUR.astype(int) * 257), COLOUR),
    Kind("grey-16.jp2", saved(wide(GREY).astype("<u2"), irreversible=False), grey(GREY)),
    Kind("colour-16.png", bytes_of(png(wide(COLOUR).reshape(SIZE, -1), 16, 2)), COLOUR),
    Kind("rgba-16.png", bytes_of(png(wide(np.dstack([COLOUR, ALPHA])).reshape(SIZE, -1), 16, 6)),
         on_white(COLOUR, ALPHA), 1),
    Kind("grey-alpha-16.png", bytes_of(png(wide(np.dstack([GREY, ALPHA])).reshape(SIZE, -1), 16, 4)),
         on_white(grey(GREY), ALPHA), 1),
    Kind("grey-16-transparent.png",
         bytes_of(png(wide(GREY // 8), 16, 0, (b"tRNS", struct.pack(">H", 2 * 256 + 77)))),
         np.where(grey(GREY // 8) == 2, 255, grey(GREY // 8))),
    Kind("signed-16.tif", saved(Image.fromarray(GREY.astype(np.int32)), format="TIFF"), "whole numbers of 32 bits"),
    Kind("grey-32.tif", saved(GREY.astype(np.int32)), "whose range is unknown: replace it by a file of 8 or 16 bits"),
    Kind("float.tif", saved(GREY.astype(np.float32)), "holds floating-point numbers, whose range is unknown"),
    Kind("float.pfm", saved(GREY.astype(np.float32)), "holds floating-point numbers, whose range is unknown"),
    # transparency
    *(Kind(f"rgba.{ending}", saved(np.dstack([COLOUR, ALPHA]), **LOSSLESS.get(ending, {}) | exact),
           on_white(COLOUR, ALPHA), 1)
      for ending, exact in (("png", {}), ("tif", {}), ("tga", {}), ("webp", {"exact": True}), ("sgi", {}), ("qoi", {}),
                            ("ico", {}))),
    Kind("grey-alpha.png", saved(np.dstack([GREY, ALPHA])), on_white(grey(GREY), ALPHA), 1),
    Kind("ink.png", saved(np.dstack([0 * COLOUR, ALPHA])), on_white(0 * COLOUR, ALPHA), 1),
    *(Kind(f"palette-transparent.{ending}", palette(transparency=37),
           np.where(grey(INDEX) == 37, 255, COLOUR)) for ending in ("png", "gif")),
    Kind("palette-alpha.png", palette(transparency=bytes(ALPHA.reshape(-1))), on_white(COLOUR, ALPHA), 1),
    Kind("colour-transparent.png", saved(COLOUR, transparency=(32, 48, 40)),
         np.where((COLOUR == (32, 48, 40)).all(2, keepdims=True), 255, COLOUR)),
    Kind("grey-transparent.png", saved(GREY, transparency=99), np.where(grey(GREY) == 99, 255, grey(GREY))),
    Kind("two-bits-transparent.png", bytes_of(png(np.full((SIZE, 4), 0b00011011, np.uint8), 2, 0,
                                                  (b"tRNS", struct.pack(">H", 2)))),
         grey(np.tile(np.array([0, 85, 255, 255], np.uint8), (SIZE, 4)))),
    Kind("four-bits-transparent.png", bytes_of(png(np.tile(np.arange(8, dtype=np.uint8) * 34 + 1, (SIZE, 1)), 4, 0,
                                                   (b"tRNS", struct.pack(">H", 3)))),
         grey(np.tile(np.array([17 * v if v != 3 else 255 for v in range(16)], np.uint8), (SIZE, 1)))),
    Kind("one-bit-transparent.png", bytes_of(png(np.full((SIZE, 2), 0b00011011, np.uint8), 1, 0,
                                                 (b"tRNS", struct.pack(">H", 0)))), 0 * COLOUR + 255),
    Kind("colour-16-transparent.png",
         bytes_of(png(wide(COLOUR).reshape(SIZE, -1), 16, 2,
                      (b"tRNS", struct.pack(">HHH", *(256 * v + 77 for v in (32, 48, 40)))))),
         np.where((COLOUR == (32, 48, 40)).all(2, keepdims=True), 255, COLOUR)),
    # other colours
    Kind("cmyk.tif", saved(Image.merge("CMYK", [*Image.fromarray(255 - COLOUR).split(),
                                                Image.new("L", (SIZE, SIZE))])), COLOUR),
    Kind("cmyk.jpg", saved(COLOUR, "CMYK", quality=95), COLOUR, 12),
    Kind("ycbcr.tif", saved(COLOUR, "YCbCr"), COLOUR, 3),
    Kind("lab.tif", lab(), grey(GREY), 30),
    # orientation
    *(Kind(f"turned-{o}.{ending}", saved(**turned(o), **LOSSLESS.get(ending, {})), turn(COLOUR))
      for ending in ("png", "webp", "tif") for o, turn in TURNS.items()),
    *(Kind(f"turned-{o}.jpg", saved(**turned(o), quality=95), turn(COLOUR), 12) for o, turn in TURNS.items()),
    Kind("turned-16.png", saved(**turned(6, wide(GREY).astype("<u2"))), TURNS[6](grey(GREY))),
    Kind("turned-alpha.png", saved(**turned(8, np.dstack([COLOUR, ALPHA]))), TURNS[8](on_white(COLOUR, ALPHA)), 1),
    Kind("turned-9.png", saved(**turned(9)), COLOUR),
    Kind("broken-exif.jpg", with_broken_exif, COLOUR, 12),
    Kind("damaged-exif.jpg", saved(COLOUR, exif=damaged_exif(6), quality=95), TURNS[6](COLOUR), 12),
    # animations
    Kind("frames.gif", frames(), COLOUR, 40),
    Kind("frames.webp", frames(lossless=True), COLOUR),
    Kind("frames.apng", frames(), COLOUR),
    Kind("pages.tif", frames(), COLOUR),
    # no images
    Kind("empty.png", bytes_of(b""), "is not a readable image: replace it by a readable image of the same name"),
    Kind("text.jpg", bytes_of(b"no picture"), "is not a readable image"),
    Kind("half.jpg", bytes_of(whole_jpeg()[: len(whole_jpeg()) // 2]), "is not a readable image"),
    Kind("program.png", bytes_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
         "is not a readable image"),
    Kind("huge.png", bytes_of(png(GREY, 8, 0, size=(14000, 13000))),
         "is too large (Image size (182000000 pixels) exceeds limit of 178956970 pixels): replace it by a smaller"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_file_is_read_as_a_person_sees_it(kind, tmp_path):
    path = tmp_path / kind.name
    kind.make(path)
    assert common.images.is_image(path)
    if isinstance(kind.seen, str):
        with pytest.raises(Refused) as refused:
            common.images.read_image(path)
        assert refused.value.message.startswith(f"{path} ") and kind.seen in refused.value.message
        return
    read = common.images.read_image(path)
    assert read.dtype == torch.uint8
    off = np.abs(read.permute(1, 2, 0).numpy().astype(int) - kind.seen)
    assert off.max() <= kind.within


def test_a_palette_with_an_alpha_channel_is_composited_on_white():
    image = Image.frombytes("P", (SIZE, SIZE), INDEX.tobytes())
    image.putpalette(PALETTE.tobytes())
    image = image.convert("PA")
    image.putalpha(Image.fromarray(ALPHA))
    assert image.mode == "PA"
    off = np.asarray(common.images.as_seen(image)).astype(int) - on_white(COLOUR, ALPHA)
    assert np.abs(off).max() <= 1


def test_a_turned_photograph_has_the_shape_that_a_person_sees(tmp_path):
    photograph = np.zeros((24, 48, 3), np.uint8)
    photograph[:, :24] = 255  # what lies on the left is seen above
    saved(**turned(6, photograph))(tmp_path / "photograph.jpg")
    seen = common.images.read_image(tmp_path / "photograph.jpg")
    assert seen.shape == (3, 48, 24) and seen[:, :20].min() > 240 and seen[:, 28:].max() < 15


def test_the_cases_that_were_read_wrongly_have_their_right_values(tmp_path):
    saved(GREY.astype(np.uint16) * 257)(tmp_path / "ramp.png")
    ramp = common.images.read_image(tmp_path / "ramp.png")
    assert ramp.double().mean() == 127.5 and len(ramp.unique()) == 256
    ink = np.zeros((SIZE, SIZE, 4), np.uint8)
    ink[4:12, 4:12, 3] = 255
    saved(ink)(tmp_path / "ink.png")
    assert common.images.read_image(tmp_path / "ink.png").double().mean() == 191.25


def test_files_in_memory_and_streamed_give_the_same_views(tmp_path):
    readable = [kind for kind in KINDS if not isinstance(kind.seen, str)]
    for k, kind in enumerate(readable):
        folder = tmp_path / "train" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        kind.make(folder / kind.name)
    memory, stream = (common.data.load_data("folder", tmp_path, True, size=SIZE, stream=s) for s in (False, True))
    assert len(memory.labels) == len(readable) > 100 and torch.equal(memory.labels, stream.labels)
    assert torch.equal(memory.images, stream.images)
    seen = {kind.name: kind for kind in readable}
    for file, image in zip(stream.files, memory.images):
        kind = seen[Path(file).name]
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - kind.seen).max() <= kind.within
    for augment in ("none", "crop", "rand"):
        views = [common.views.WorkerViews(data, augment) for data in (memory, stream)]
        for row in range(len(readable)):
            assert torch.equal(views[0][row, 5, row], views[1][row, 5, row])


# ---------------------------------------------------------------- folders


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOUR).save(path)


def names_in(folder):
    """{class: the paths of its images below its folder} of what is found."""
    found = common.images.find_images(folder)
    paths = [Path(file).relative_to(folder).parts for file in found.files]
    of = lambda k: ["/".join(parts[1:]) for parts, label in zip(paths, found.labels) if label == k]
    return {name: of(k) for k, name in enumerate(found.classes)}


def test_order_and_labels_are_those_of_torchvisions_folder(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/x/1.png", "a/x-y/1.png", "a/x/z/1.png", "a/0.png", "a/Z.JPG", "C/1.jpeg",
                 "é/1.bmp", "a b/1.webp"):
        picture(tmp_path / "train" / name)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    folder, found = torchvision.datasets.ImageFolder(tmp_path / "train"), common.images.find_images(tmp_path / "train")
    assert found.classes == folder.classes and list(zip(found.files, found.labels)) == folder.samples
    data = common.data.load_data("folder", tmp_path, True, size=8, stream=True)
    order = torch.randperm(len(folder), generator=common.data.generator("folder")).tolist()
    assert list(zip(data.files, data.labels.tolist())) == [folder.samples[row] for row in order]
    for file, image in zip(data.files, data.images):
        former = TF.pil_to_tensor(torchvision.datasets.folder.default_loader(file))
        assert torch.equal(image, TF.center_crop(TF.resize(former, 8, antialias=True), 8))


def test_hidden_names_are_no_classes_and_no_images(tmp_path, capsys):
    for name in ("a/0.png", "b/0.png", ".ipynb_checkpoints/0.png", "a/.ipynb_checkpoints/0.png", "a/._0.png",
                 "__MACOSX/a/0.png", "b/__MACOSX/0.png", "a/.hidden.png"):
        picture(tmp_path / name)
    for name in ("Thumbs.db", "a/Thumbs.db", ".DS_Store", "b/.DS_Store"):
        (tmp_path / name).write_bytes(b"of a system")
    assert names_in(tmp_path) == {"a": ["0.png"], "b": ["0.png"]} and capsys.readouterr().out == ""


def test_what_is_left_out_is_counted_by_its_ending(tmp_path, capsys):
    for name in ("a/0.gif", "a/1.jfif.gif", "b/0.png", "loose.png", "b/2.PNG"):
        picture(tmp_path / name)
    for name in ("a/x.txt", "b/y.TXT", "b/z.tar.gz", "a/README", "labels.csv", "a/film.mpg", "a/drawing.eps", "a/n.h5"):
        (tmp_path / name).write_text("no image")
    assert names_in(tmp_path) == {"a": ["0.gif", "1.jfif.gif"], "b": ["0.png", "2.PNG"]}
    assert capsys.readouterr().out == (f"{tmp_path}: left out 1 .csv, 1 .eps, 1 .gz, 1 .h5, 1 .mpg, 2 .txt, "
                                       "1 beside the class folders, 1 without an ending\n")


def test_one_rank_alone_says_what_is_left_out(tmp_path, capsys, monkeypatch):
    picture(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "0.txt").write_text("no image")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    names_in(tmp_path)
    assert capsys.readouterr().out == ""


def test_every_real_folder_is_visited_once(tmp_path):
    for name in ("ant/0.png", "ant/1.png", "ant/more/2.png", "bee/0.png"):
        picture(tmp_path / "elsewhere" / name)
    root = tmp_path / "train"
    root.mkdir()
    (root / "ant").symlink_to(tmp_path / "elsewhere" / "ant")
    (root / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    (root / "ant" / "ant").symlink_to(tmp_path / "elsewhere" / "ant")  # what ln -s does when it is given twice
    (root / "bee" / "up").symlink_to(root)
    (root / "bee" / "other").symlink_to(root / "ant")
    (root / "bee" / "itself").symlink_to("itself")
    assert names_in(root) == {"ant": ["0.png", "1.png", "more/2.png"], "bee": ["0.png"]}


@pytest.mark.parametrize(
    "links, words",
    [
        (["b -> a"], "the classes a and b are one folder: take one of them away"),
        (["b"], "the class b has no images: add some, or take its folder away"),
        (["b", "b/x.txt"], "the class b has no images (left out: 1 .txt)"),
    ],
)
def test_classes_that_cannot_be_meant_are_refused(links, words, tmp_path):
    picture(tmp_path / "a" / "0.png")
    for link in links:
        name, _, target = link.partition(" -> ")
        if target:
            (tmp_path / name).symlink_to(target)
        elif "." in name:
            (tmp_path / name).write_text("no image")
        else:
            (tmp_path / name).mkdir()
    with pytest.raises(Refused) as refused:
        common.images.find_images(tmp_path)
    assert refused.value.message.startswith(f"--data {tmp_path}: ") and words in refused.value.message


# ---------------------------------------------------------------- thin images


def resized_whole(image, size):
    """As resize_and_crop did it before it cut anything off."""
    return TF.center_crop(TF.resize(image, size * 8 // 7 if size > 64 else size, antialias=True), size)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (3, 200), (5, 339), (1, 67), (67, 1), (9, 9), (2, 128)])
@pytest.mark.parametrize("size", [8, 72])
def test_ordinary_images_keep_every_bit(shape, size):
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    assert torch.equal(common.images.resize_and_crop(image, size), resized_whole(image, size))


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (3, 1001), (7, 2000), (2003, 12), (40, 9999), (3, 999)])
@pytest.mark.parametrize("size", [8, 9, 11, 72])
def test_a_thin_image_gives_what_it_gave(shape, size):
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    ours, former = common.images.resize_and_crop(image, size), resized_whole(image, size)
    assert (ours.int() - former.int()).abs().max() <= 2  # noise from pixel to pixel; a photograph moves less


def test_a_thin_image_makes_no_large_one(monkeypatch):
    resize = TF.resize

    def resize_a_little(image, side, **options):
        assert max(image.shape) < 100
        return resize(image, side, **options)

    monkeypatch.setattr(TF, "resize", resize_a_little)
    image = torch.arange(30_000).view(1, 1, -1).expand(3, 1, -1).to(torch.uint8)
    for thin in (image, image.mT):
        assert common.images.resize_and_crop(thin, 224).shape == (3, 224, 224)


# ---------------------------------------------------------------- runs


def test_the_advice_for_a_broken_image_of_a_stream_lets_the_run_go_on(tmp_path, monkeypatch, capsys):
    folder_of(tmp_path, ["train"], ["a", "b"])
    broken, run = tmp_path / "train" / "b" / "2.png", tmp_path / "run"
    broken.write_bytes(b"no picture")
    monkeypatch.setattr(common.data, "SAMPLE", 1)
    options = [*FOLDER, "--data", tmp_path, "--stream", "--workers", "0", "--run-dir", run, "--epochs", "3"]
    line = refusal(pretrain, options, monkeypatch, capsys)
    assert f"{broken} is not a readable image: replace it by a readable image of the same name" in line
    broken.write_bytes(broken.with_name("3.png").read_bytes())
    train("--resume", run)
    assert log_of(run)[-1]["epoch"] == 3


def lone_images(root, count=8):
    for i in range(count):
        picture(root / "train" / f"{i}.png")


def test_images_without_classes_train_simclr_alone(tmp_path, monkeypatch, capsys):
    lone_images(tmp_path)
    folder_of(tmp_path, ["test"], ["a", "b"])
    run = tmp_path / "run"
    for stream in ([], ["--stream", "--workers", "0"]):
        where = run.with_name(f"run{len(stream)}")
        entry = train(*FOLDER, "--data", tmp_path, "--loss", "simclr", "--run-dir", where, *stream)
        assert "knn_top1" not in entry and "no class folders in" in capsys.readouterr().out
        train("--resume", where, "--epochs", "2")
    for others in (["--loss", "supcon"], ["--loss", "simclr", "--balanced"], ["--loss", "ce"]):
        line = refusal(pretrain, [*FOLDER, "--data", tmp_path, "--run-dir", run, *others], monkeypatch, capsys)
        assert "without class folders" in line and "DIR/train/CLASS/*.jpg" in line
    line = refusal(linear_probe, [tmp_path / "run0"], monkeypatch, capsys)
    assert "has images without class folders: a classifier wants train/CLASS/*.jpg" in line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint of a folder's run, of 16 x 16 pixels."""
    root = tmp_path_factory.mktemp("checkpoint")
    folder_of(root, ["train"], ["a", "b"])
    train(*FOLDER, "--data", root, "--run-dir", root / "run")
    return (root / "run" / "ckpt.pt").read_bytes()


@pytest.fixture
def probed_in(checkpoint, tmp_path):
    """probed_in(folder, *options) probes the checkpoint on a folder; the files lie in tmp_path / "run"."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(checkpoint)
    one = ["--lr", "0.3", "--weight-decay", "0", "--epochs", "20"]
    return lambda folder, *options: probe(tmp_path / "run", "--data", folder, *one, *options)


def test_a_test_set_may_have_fewer_classes(probed_in, tmp_path, capsys):
    folder_of(tmp_path / "d", ["train"], ["a", "b", "c"], count=20)
    folder_of(tmp_path / "d", ["test"], ["c"], count=3)
    test = common.data.load_data("folder", tmp_path / "d", False, size=SIZE)
    named = common.data.with_classes_of(test._replace(classes=["a", "b", "c"]), test, "d")
    assert named.labels.tolist() == [2] * 3 and named.classes == ["a", "b", "c"]
    folder_of(tmp_path / "e", ["train"], ["a", "b", "c"], count=20)  # the test set's only class is train's third
    (tmp_path / "e" / "test").mkdir()
    (tmp_path / "e" / "test" / "c").symlink_to(tmp_path / "e" / "train" / "c")
    result = probed_in(tmp_path / "e")
    assert result["top1"] == 100 and result["per_class_top1"] == {"c": 100} and result["tested_on"] == "the test set"
    assert "the test set lacks 2 of the 3 classes, a for one\n" in capsys.readouterr().out


def test_the_test_sets_new_classes_and_lone_images_are_refused(tmp_path):
    folder_of(tmp_path, ["test"], ["a", "c", "d"])
    test = common.data.load_data("folder", tmp_path, False, size=8)
    training = test._replace(classes=["a", "b"])
    with pytest.raises(Refused, match="the test set has a class c, and the training set has none of that name"):
        common.data.with_classes_of(training, test, tmp_path)
    with pytest.raises(Refused, match="the images of the test set have no classes"):
        common.data.with_classes_of(training, test._replace(classes=[]), tmp_path)


def test_without_a_test_set_the_probe_holds_out_a_tenth_and_says_so(probed_in, tmp_path, capsys):
    folder_of(tmp_path / "d", ["train"], ["a", "b"], count=20)
    result = probed_in(tmp_path / "d")
    assert (result["train_images"], result["test_images"], result["top1"]) == (36, 4, 100)
    assert "the probe is tested on a tenth of the training images" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "probe-d.json").read_text())["tested_on"] == "a tenth of the training set"
    data = common.data.load_data("folder", tmp_path / "d", True, size=SIZE)
    fitted, tested, _ = linear_probe.load_both("folder", tmp_path / "d", None, {"size": SIZE}, 0)
    rows = [{image.numpy().tobytes() for image in part.images} for part in (fitted, tested, data)]
    assert not rows[0] & rows[1] and rows[0] | rows[1] == rows[2]
    assert torch.bincount(tested.labels).tolist() == [2, 2]


def test_two_data_sets_of_one_name_leave_two_reports(probed_in, tmp_path, capsys):
    reports = [tmp_path / "run" / f"probe-images{end}.json" for end in ("", "-2")]
    for k, where in enumerate(("one", "two", "one", "two")):
        if k < 2:
            folder_of(tmp_path / where / "images", ["train", "test"], ["a", "b"], count=4 + 2 * k)
        probed_in(tmp_path / where / "images", "--seed", str(k))
        found = [json.loads(report.read_text()) for report in reports[: k + 1]]
        said = "is of other data of the same name: this report is probe-images-2.json"
        assert (said in capsys.readouterr().out) == (where == "two")
        assert [f["data"] for f in found] == [str(tmp_path / name / "images") for name in ("one", "two")][: k + 1]
        assert found[k % 2]["fit"]["seed"] == k and found[k % 2]["test_images"] == (8, 12)[k % 2]
    assert len(list((tmp_path / "run").glob("classifier-images*.pt"))) == 2


def test_a_run_whose_own_data_has_moved_writes_the_same_file(tmp_path, monkeypatch):
    folder_of(tmp_path / "here" / "images", ["train", "test"], ["a", "b"])
    monkeypatch.chdir(tmp_path / "here")
    train(*FOLDER, "--data", "images", "--run-dir", tmp_path / "run")
    probe(tmp_path / "run", "--device", "cpu")
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    probe(tmp_path / "run", "--device", "cpu")
    assert [path.name for path in (tmp_path / "run").glob("probe*.json")] == ["probe.json"]


def test_a_report_of_an_unknown_data_set_is_not_overwritten(tmp_path):
    kind = lambda **about: common.run_folder.kind_of_its_own("-x", lambda kind: tmp_path / f"probe{kind}.json", about)
    assert kind(data="A") == "-x"
    for contents, name in (("{}", "-x-2"), ("cut sho", "-x-2"), ("[1]", "-x-2"), ('{"data": "A", "k": 1}', "-x")):
        (tmp_path / "probe-x.json").write_text(contents)
        assert kind(data="A") == name


# ---------------------------------------------------------------- what a wrong reader costs


def stripes(upright, k):
    """Stripes two pixels wide, at one of four places: all classes have the same mean."""
    ink = ((np.arange(SIZE) + k) // 2 % 2).astype(np.uint8)
    return np.tile(ink, (SIZE, 1)) if upright else np.tile(ink[:, None], (1, SIZE))


def half_turned(ink, k, path):
    shown = np.ascontiguousarray(TURNS[8](ink)) if k % 2 else ink  # stored so that orientation 6 turns it back
    saved(**turned(6 if k % 2 else 1, grey(shown * 200)))(path)


WAYS = {  # (ending, what writes the stripes of image k)
    "8 bits": ("png", lambda ink, k, path: saved(ink * 200)(path)),
    "16 bits": ("png", lambda ink, k, path: saved(ink.astype(np.uint16) * 40_000 + 2000)(path)),
    "transparency": ("png", lambda ink, k, path: saved(np.dstack([grey(ink * 0), ink * 255]))(path)),
    "turned": ("png", half_turned),
    "gif": ("gif", lambda ink, k, path: saved(ink * 200)(path)),
}


@pytest.mark.parametrize("way", WAYS)
def test_striped_classes_are_told_apart_however_they_are_saved(way, probed_in, tmp_path):
    ending, save = WAYS[way]
    for split, count in (("train", 16), ("test", 8)):
        for name in ("upright", "level"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for k in range(count):
                save(stripes(name == "upright", k // 2 % 4), k, tmp_path / "d" / split / name / f"{k}.{ending}")
    result = probed_in(tmp_path / "d")
    assert result["top1"] == 100 and result["train_images"] == 32 and result["test_images"] == 16
