"""Images are what a person sees who opens the file; a folder's classes and files are those that `ls` shows."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common.cli
import common.data
import common.images
import common.views
from runs import folder_of, probe, train

pytestmark = pytest.mark.seeds_torch
RAMP = np.arange(0, 256, 8, dtype=np.uint8).reshape(4, 8)  # 32 levels, brighter to the right and downwards
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T.reshape(4, 8)], 2)
GREY = np.repeat(RAMP[:, :, None], 3, 2)
ALPHA = np.tile(np.array([0, 64, 128, 255], np.uint8), (4, 2))


def on_white(colours, alpha):
    share = alpha[:, :, None] / 255
    return colours * share + 255 * (1 - share)


def deep(kind):
    """The ramp in 16 bits: v 257, of which the upper byte is v."""
    return RAMP.astype(kind) * 257


def with_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def upright(pixels, orientation):
    """What the EXIF standard says to do with pixels so tagged: where its row 0 and column 0 are."""
    pixels = pixels.transpose(1, 0, 2) if orientation > 4 else pixels
    right, down = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    pixels = pixels[:, ::-1] if right else pixels
    return pixels[::-1] if down else pixels


def png_of_16_bits(path):
    """A PNG of 16-bit RGB, which Pillow does not write."""
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in COLOURS)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 8, 4, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def pgm(maximum):
    """A writer of a binary PGM whose brightest value is `maximum`."""

    def write(path):
        values = np.round(RAMP / 255 * maximum).astype(np.uint8 if maximum < 256 else ">u2")
        path.write_bytes(b"P5\n8 4\n%d\n" % maximum + values.tobytes())

    return write


def saved(pixels, **options):
    return lambda path: Image.fromarray(pixels).save(path, **options)


def converted(mode, **options):
    return lambda path: Image.fromarray(COLOURS).convert(mode).save(path, **options)


def transparent_palette(path):
    picture = Image.fromarray(np.array([[0, 1, 2, 1]] * 4, np.uint8), "P")
    picture.putpalette([0, 0, 0, 200, 100, 50, 9, 9, 9])
    picture.save(path, transparency=0)


def transparent_colour(path):
    Image.fromarray(GREY).save(path, transparency=tuple(int(v) for v in GREY[0, 0]))


def big_endian(path):
    Image.frombytes("I;16B", (8, 4), deep(">u2").tobytes()).save(path)


def moving(path):
    first, second = Image.fromarray(RAMP), Image.fromarray(255 - RAMP)
    first.save(path, save_all=True, append_images=[second])


LEVELS_OF_PALETTE = np.array([[[255, 255, 255], [200, 100, 50], [9, 9, 9], [200, 100, 50]]] * 4)
FIRST_IS_WHITE = np.where((GREY == GREY[0, 0]).all(2, keepdims=True), 255, GREY)
RGBA, LA = np.dstack([COLOURS, ALPHA]), np.dstack([RAMP, ALPHA])
KINDS = {  # ending or name: (writer, pixels that a person sees, how much a value may differ)
    **{f"rgb{end}": (saved(COLOURS), COLOURS, 0) for end in (".png", ".bmp", ".tif", ".tiff", ".ppm", ".PNG", ".tga")},
    **{f"grey{end}": (saved(RAMP), GREY, 0) for end in (".png", ".bmp", ".tif", ".pgm", ".gif", ".Tif")},
    "lossless.webp": (saved(COLOURS, lossless=True), COLOURS, 0),
    "cmyk.tif": (converted("CMYK"), COLOURS, 1),
    "palette.png": (converted("P"), np.asarray(Image.fromarray(COLOURS).convert("P").convert("RGB")), 0),
    "bits.png": (converted("1"), np.asarray(Image.fromarray(COLOURS).convert("1").convert("RGB")), 0),
    **{f"grey{end}": (saved(RAMP, quality=100), GREY, 4) for end in (".jpg", ".jpeg", ".jfif", ".JPG")},
    "deep.png": (saved(deep(np.uint16)), GREY, 0),
    "deep.tif": (saved(deep(np.uint16)), GREY, 0),
    "deep-big-endian.tif": (big_endian, GREY, 0),
    "deep-rgb.png": (png_of_16_bits, COLOURS, 0),
    "deep.pgm": (pgm(65535), GREY, 0),
    "of-1000.pgm": (pgm(1000), GREY, 1),
    "of-100.pgm": (pgm(100), GREY, 2),
    "rgba.png": (saved(RGBA), on_white(COLOURS, ALPHA), 1),
    "rgba.tif": (saved(RGBA), on_white(COLOURS, ALPHA), 1),
    "rgba.webp": (saved(RGBA, lossless=True, exact=True), on_white(COLOURS, ALPHA), 1),
    "la.png": (saved(LA), on_white(GREY, ALPHA), 1),
    "clear-palette.png": (transparent_palette, LEVELS_OF_PALETTE, 0),
    "clear-palette.gif": (transparent_palette, LEVELS_OF_PALETTE, 0),
    "clear-colour.png": (transparent_colour, FIRST_IS_WHITE, 0),
    "moving.gif": (moving, GREY, 0),
    "moving.webp": (lambda path: Image.fromarray(COLOURS).save(path, save_all=True, lossless=True), COLOURS, 0),
    **{f"turned-{o}.png": (saved(COLOURS, exif=with_exif(o)), upright(COLOURS, o), 0) for o in range(1, 9)},
    "turned-6.webp": (saved(COLOURS, exif=with_exif(6), lossless=True), upright(COLOURS, 6), 0),
    "turned-8.tif": (saved(COLOURS, exif=with_exif(8)), upright(COLOURS, 8), 0),
    **{f"turned-{o}.jpg": (saved(RAMP, exif=with_exif(o), quality=100), upright(GREY, o), 4) for o in (3, 6)},
    "turned-and-clear.png": (saved(RGBA, exif=with_exif(6)), upright(on_white(COLOURS, ALPHA), 6), 1),
    "turned-and-deep.png": (saved(deep(np.uint16), exif=with_exif(5)), upright(GREY, 5), 0),
}
REFUSED = {
    "floats.tif": (saved(RAMP.astype(np.float32)), "holds values of 32 bits, whose range is unknown"),
    "whole-numbers.tif": (saved(RAMP.astype(np.int32)), "holds values of 32 bits, whose range is unknown"),
    "cut-off.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n1234"), "replace it by a readable one"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "replace it by a readable one of the same name"),
    "text.gif": (lambda path: path.write_text("no image"), "is not a readable image"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", KINDS)
def test_an_image_is_what_a_person_sees(name, tmp_path):
    write, seen, tolerance = KINDS[name]
    write(tmp_path / name)
    read = common.images.read_image(tmp_path / name)
    expected = torch.from_numpy(np.ascontiguousarray(seen).astype(np.float64)).permute(2, 0, 1)
    assert read.dtype == torch.uint8 and read.shape == expected.shape
    assert (read - expected).abs().max() <= tolerance


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_seen_is_refused_in_a_line(name, tmp_path):
    write, words = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(common.cli.Refused, match=words):
        common.images.read_image(tmp_path / name)


def test_an_image_that_is_too_large_is_refused_with_pillows_reason(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(common.cli.Refused, match="exceeds limit of 2000 pixels.*make it smaller"):
        common.images.read_image(tmp_path / "large.png")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_kinds_are_the_same_in_memory_and_streamed(tmp_path):
    for k, (name, (write, *_)) in enumerate(KINDS.items()):
        folder = tmp_path / "train" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{k}-{name}")
    held = common.data.load_folder(tmp_path, True, 8)
    streamed = common.data.load_folder(tmp_path, True, 8, stream=True)
    assert len(held.labels) == len(KINDS) and torch.equal(held.labels, streamed.labels)
    assert torch.equal(held.images, streamed.images)
    views = common.views.WorkerViews(streamed, "none")
    assert all(torch.equal(views[row, 0], image) for row, image in enumerate(held.images))


# ---------------------------------------------------------------- folders


def test_an_ordinary_folder_is_listed_as_torchvision_lists_it(tmp_path):
    folder_of(tmp_path, ["train"], ["b", "a", "B"], count=3)
    for name in ("z", "A"):
        (tmp_path / "train" / "a" / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / "train" / "a" / name / "1.png")
    theirs = torchvision.datasets.ImageFolder(tmp_path / "train")
    ours = common.images.list_folder(tmp_path / "train")
    assert (list(zip(ours.files, ours.labels)), ours.classes) == (theirs.samples, theirs.classes)


def test_hidden_names_are_no_classes_and_no_images(tmp_path, capsys):
    folder_of(tmp_path, ["train"], ["a", "b", ".ipynb_checkpoints", "__MACOSX"], count=2)
    for name in ("._0.png", "Thumbs.db", ".DS_Store"):
        (tmp_path / "train" / "a" / name).write_bytes(b"")
    (tmp_path / "train" / "b" / ".trash").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "train" / "b" / ".trash" / "x.png")
    found = common.images.list_folder(tmp_path / "train")
    assert found.classes == ["a", "b"] and found.labels == [0, 0, 1, 1] and not capsys.readouterr().out


def test_what_is_left_out_is_counted_by_its_ending(tmp_path, capsys):
    folder_of(tmp_path, ["train"], ["a"], count=2)
    for name in ("labels.txt", "notes.txt", "raw.NEF", "README"):
        (tmp_path / "train" / "a" / name).write_text("x")
    assert len(common.images.list_folder(tmp_path / "train").files) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "(2 .txt, 1 " in said and "1 .NEF" in said and "1 without an ending" in said


def test_links_in_circles_are_followed_once(tmp_path):
    folder_of(tmp_path, ["train"], ["ant"], count=16, size=(4, 4))
    os.symlink(tmp_path / "train" / "ant", tmp_path / "train" / "ant" / "ant")
    assert len(common.images.list_folder(tmp_path / "train").files) == 16


def test_a_thin_image_takes_no_more_memory_than_others():
    """Resized as a whole it would have 256 x 7,680,000 pixels."""
    thin = torch.zeros(3, 1, 30_000, dtype=torch.uint8)
    thin[:, :, 15_000:] = 200
    small = common.images.resize_and_crop(thin, 224)
    assert small.shape == (3, 224, 224) and small[0, 0, 0] < 30 and small[0, 0, -1] > 170


def test_a_test_set_may_lack_classes_and_its_labels_are_those_of_the_training_sets_names(tmp_path, capsys):
    folder_of(tmp_path, ["train"], ["a", "b", "c"])
    folder_of(tmp_path, ["test"], ["c"])
    train_set, test = (common.data.load_folder(tmp_path, is_train, 8) for is_train in (True, False))
    test = common.data.with_classes_of(train_set, test, tmp_path)
    assert test.labels.tolist() == [2] * 4 and test.classes == ["a", "b", "c"]
    assert "lacks 2 of the 3 classes, a for one" in capsys.readouterr().out
    folder_of(tmp_path, ["val"], ["d"])
    with pytest.raises(common.cli.Refused, match="the test set has a class d, and the training set has none"):
        common.data.with_classes_of(train_set, test._replace(classes=["d"]), tmp_path)


def striped(label, k):
    """Stripes across or along, of another width and place each time: 24 x 16 pixels of grey."""
    place = np.arange(24)[None, :] if label else np.arange(16)[:, None]
    return np.broadcast_to(((place + k) // (2 + k % 2) % 2 * 200 + 20).astype(np.uint8), (16, 24))


def turned_on_its_side(pixels, path):
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(path, exif=with_exif(6))


WAYS = {  # of saving the same picture
    "8 bits": (".png", lambda pixels, path: Image.fromarray(pixels).save(path)),
    "16 bits": (".png", lambda pixels, path: Image.fromarray(pixels.astype(np.uint16) * 257).save(path)),
    "ink": (".png", lambda pixels, path: Image.fromarray(np.dstack([0 * pixels, 255 - pixels])).save(path)),
    "turned": (".jpg", turned_on_its_side),
    "gif": (".gif", lambda pixels, path: Image.fromarray(pixels).save(path)),
}


@pytest.mark.parametrize("way", WAYS)
def test_striped_classes_are_told_apart_however_they_are_saved(way, tmp_path):
    ending, save = WAYS[way]
    for split, count in (("train", 24), ("test", 12)):
        for label in (0, 1):
            folder = tmp_path / split / "ab"[label]
            folder.mkdir(parents=True)
            for k in range(0, count, 2):
                save(striped(label, k), folder / f"{k}{ending}")
                Image.fromarray(striped(label, k + 1)).save(folder / f"{k + 1}.png")
    words = ["--dataset", "folder", "--data", tmp_path, "--size", "12", "--arch", "small", "--batch", "16"]
    words += ["--epochs", "4", "--device", "cpu", "--augment", "none", "--loss", "ce", "--lr", "0.05"]
    train(*words, "--run-dir", tmp_path / "run")
    assert probe(tmp_path / "run", "--device", "cpu")["top1"] == 100


def test_without_a_test_set_the_probe_holds_out_a_tenth_and_says_so(tmp_path, capsys):
    folder_of(tmp_path, ["train"], ["a", "b"], count=20)
    words = ["--dataset", "folder", "--data", tmp_path, "--size", "16", "--arch", "small", "--batch", "8"]
    train(*words, "--epochs", "1", "--device", "cpu", "--loss", "ce", "--run-dir", tmp_path / "run")
    result = probe(tmp_path / "run", "--device", "cpu")
    assert (result["train_images"], result["test_images"]) == (36, 4)
    assert result["tested_on"] == "a tenth of the training set"
    assert "no test set" in capsys.readouterr().out


def test_two_data_sets_of_one_name_keep_their_results_apart(tmp_path, capsys):
    for place in ("one", "other"):
        folder_of(tmp_path / place / "images", ["train", "test"], ["a", "b"])
    words = ["--dataset", "folder", "--size", "16", "--arch", "small", "--batch", "4", "--epochs", "1", "--loss", "ce"]
    train(*words, "--device", "cpu", "--data", tmp_path / "one" / "images", "--run-dir", tmp_path / "run")
    folder_of(tmp_path / "third" / "images", ["train", "test"], ["a", "b"])
    for place in ("other", "third", "other"):
        probe(tmp_path / "run", "--device", "cpu", "--data", tmp_path / place / "images")
    found = {path.name: json.loads(path.read_text())["data"] for path in (tmp_path / "run").glob("probe*.json")}
    assert found == {"probe-images.json": str(tmp_path / "other" / "images"),
                     "probe-images-2.json": str(tmp_path / "third" / "images")}
    assert "this probe writes probe-images-2.json" in capsys.readouterr().out


def test_a_run_whose_own_data_has_moved_writes_the_same_file(tmp_path, monkeypatch):
    folder_of(tmp_path / "here" / "images", ["train", "test"], ["a", "b"])
    words = ["--dataset", "folder", "--size", "16", "--arch", "small", "--batch", "4", "--epochs", "1", "--loss", "ce"]
    monkeypatch.chdir(tmp_path / "here")
    train(*words, "--device", "cpu", "--data", "images", "--run-dir", tmp_path / "run")
    probe(tmp_path / "run", "--device", "cpu")
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    probe(tmp_path / "run", "--device", "cpu")
    assert [path.name for path in (tmp_path / "run").glob("probe*.json")] == ["probe.json"]
