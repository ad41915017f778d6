"""Data sets: from the disk to uint8 tensors in memory.

To add one, give it a name in DATASETS, a branch in load_data, and a line in FILES.
"""

import contextlib
import functools
import hashlib
import math
import os
import socket
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms.v2 import functional as TF

from common.cli import Refused, say
from common.images import find_images, read_image, resize_and_crop
from common.labels import find_labelled


class Missing(Refused):
    """A data set that is not there."""


class Data(NamedTuple):
    images: torch.Tensor  # (n, 3, H, H) uint8; of a streamed folder the first SAMPLE images alone
    labels: torch.Tensor  # (n,) int64
    classes: list  # names; none where a folder's images lie without class folders
    files: list | None = None  # the path of every image of a streamed folder
    paths: list | None = None  # the path of every image of a folder, streamed or not


SAMPLE = 10_000  # images that mean and standard deviation are measured on
DATASETS = ("cifar10", "cifar100", "svhn", "fashionmnist", "folder", "shapes")
MEAN_STD = {  # the reference code's; every other data set is measured
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
FILES = {  # what torchvision looks for, or unpacks, in the folder of the data sets
    "cifar10": "cifar-10-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html)",
    "cifar100": "cifar-100-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html)",
    "svhn": "train_32x32.mat and test_32x32.mat (ufldl.stanford.edu/housenumbers)",
    "fashionmnist": "FashionMNIST/raw/ with the four *-ubyte files, unzipped "
        "(github.com/zalandoresearch/fashion-mnist)",
}


def load_on_every_rank(config, ranks):
    """(training set, test set or None). On each machine one rank loads, and downloads, before the others."""
    loads_first = os.environ.get("LOCAL_RANK", "0") == "0"
    for turn in (True, False):
        if turn == loads_first:
            with ranks.hold_refusals():
                loaded = load(config, config.download and loads_first, ranks.rank == 0)
        ranks.meet()  # here the other ranks wait
    if ranks.world > 1:
        require_same_on_every_rank(loaded[0], config.data, ranks)
    return loaded


def require_same_on_every_rank(data, root, ranks):
    """Raises Refused on every rank where one of them has other classes, labels or images than rank 0.

    Files are known by their names, because one file may be decoded in two ways, and other images by their checksums.
    """
    names = names_of_files(data, root)
    names = names or [f"image {row} ({zlib.crc32(image):08x})" for row, image in enumerate(data.images.numpy())]
    if data.classes:
        names = [f"{name} of the class {data.classes[label]}" for name, label in zip(names, data.labels.tolist())]
    mine = sorted([*(f"the class {name}" for name in data.classes), *names])
    digest = hashlib.sha256("\0".join(mine).encode(errors="surrogateescape")).digest()
    (unlike,) = ranks.largest(digest != ranks.from_first(digest))
    if not unlike:
        return
    theirs = ranks.from_first(mine)
    with ranks.refusing_together():
        if mine != theirs:
            raise Refused(f"--data {root} on {socket.gethostname()} is not what rank 0 holds, "
                          f"{first_difference(mine, theirs)}: copy the data there again")


def names_of_files(data, root):
    """The paths of a folder's images below its root, which may differ from node to node. Empty for other data sets."""
    below = functools.cache(lambda folder: os.path.relpath(folder, root))  # too slow for each of a million files
    return [os.path.join(below(folder), name) for folder, name in map(os.path.split, data.paths or ())]


def describe_data(data, root):
    """What tells a training set from others: its classes, its size, and a number of all labels and names of files."""
    names = "\0".join(names_of_files(data, root)).encode(errors="surrogateescape")
    checksum = zlib.crc32(names, zlib.crc32(data.labels.numpy()))
    return {"classes": list(data.classes), "images": len(data.labels), "checksum": checksum}


def first_difference(mine, theirs):
    """In words, of two lists that are not alike."""
    lacking, more = sorted(set(theirs) - set(mine)), sorted(set(mine) - set(theirs))
    return f"it lacks {lacking[0]}" if lacking else f"it has {more[0]} as well"


def load(config, download, with_test):
    """(training set, test set or None) as the options want them. Only rank 0 needs the test set, for its diagnosis."""
    source = {"size": config.size, "download": download, "stream": config.stream, "table": config.labels}
    data = load_data(config.dataset, config.data, train=True, limit=config.limit, **source)
    test = None
    if with_test and data.classes:
        with contextlib.suppress(Missing):
            test = load_data(config.dataset, config.data, train=False, **source)
            test = with_classes_of(data, test, config.data)
    if config.subset < 1:
        data = take(data, stratified(data.labels, config.subset, generator("subset", config.seed)))
        if config.stream:  # fewer images of its sample are left, and they are the first ones
            more = read_square(data.files[len(data.images) : SAMPLE], data.images.shape[-1])
            data = data._replace(images=torch.cat([data.images, more]))
    if config.label_noise:
        noisy = with_label_noise(data.labels, config.label_noise, len(data.classes), generator("noise", config.seed))
        config.noisy_labels = int((noisy != data.labels).sum())
        data = data._replace(labels=noisy)
    return data, test


def load_data(dataset, root, train, *, size=None, download=True, limit=None, stream=False, table=None):
    """The first `limit` images of the training or test set as Data, resized to `size` where it is given.

    stream: hold the names of a folder's files and the pixels of a sample alone, for a folder larger than memory.
    table: a CSV file with the labels of a folder's images, which then lie anywhere in it.
    Raises Missing where a folder has no such set, and Refused where a set cannot be read.
    """
    if dataset == "shapes":
        return shapes(min(10_000 if train else 2_000, limit or 10_000), size or 32, seed=int(train))
    if dataset == "folder":
        folder = folder_from_table(root, train, table) if table else folder_from_classes(root, train)
        return load_folder(folder, size or 32, limit, stream)
    sets = torchvision.datasets
    try:
        if dataset == "svhn":
            d = sets.SVHN(root, split="train" if train else "test", download=download)
            images, labels, classes = torch.from_numpy(d.data), d.labels, [str(c) for c in range(10)]
        elif dataset == "fashionmnist":
            d = sets.FashionMNIST(root, train=train, download=download)
            images, labels, classes = d.data[:, None].expand(-1, 3, -1, -1), d.targets, d.classes
        else:
            cifar = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[dataset]
            d = cifar(root, train=train, download=download)
            images, labels, classes = torch.from_numpy(d.data).permute(0, 3, 1, 2), d.targets, d.classes
    except ModuleNotFoundError as e:
        raise Refused(f"--dataset {dataset} needs the package {e.name}: pip install {e.name}") from e
    except Exception as e:  # a download, a wrong checksum, a damaged file: torchvision's readers have no common error
        way = f"put {FILES[dataset]} there by hand" + ("" if download else ", or let --download fetch it")
        reason = str(e).strip().splitlines()[0] if str(e) else type(e).__name__
        raise Refused(f"--dataset {dataset} cannot be read from --data {root} ({reason}): {way}") from e
    images, labels = images[:limit].contiguous(), torch.as_tensor(np.asarray(labels)[:limit], dtype=torch.long)
    return Data(resize_square(images, size) if size else images, labels, list(classes))


def with_classes_of(train, test, root):
    """The test set with its labels as places in the training set's list of classes, of which it may lack some."""
    if not test.classes:
        raise Refused(f"--data {root}: the images of the test set have no classes: it wants DIR/test/CLASS/*.jpg")
    if test.classes == train.classes:
        return test
    unknown = [name for name in test.classes if name not in train.classes]
    if unknown:
        raise Refused(f"--data {root}: the test set has a class {unknown[0]}, and the training set has none of that "
                      "name: give them the same folders")
    missing = [name for name in train.classes if name not in test.classes]
    say(f"{root}: the test set lacks {len(missing)} of the {len(train.classes)} classes, {missing[0]} for one")
    places = torch.tensor([train.classes.index(name) for name in test.classes])
    return test._replace(labels=places[test.labels], classes=train.classes)


def folder_from_table(root, train, table):
    """The Folder of the training or test images that a CSV file names."""
    folder = find_labelled(root, table, train)
    if not folder.files:
        raise Missing(f"--labels {table} has no image of the split test or val: add some")
    return folder


def folder_from_classes(root, train):
    """The Folder of the images in root/train, or in root/test or root/val."""
    names = ["train"] if train else ["test", "val"]
    try:
        found = [Path(root, name) for name in names if Path(root, name).is_dir()]
    except OSError as e:  # a name too long, a folder that may not be read
        raise Refused(f"--data {str(root)[:80]} cannot be read ({e.strerror}): name another folder") from e
    if not found:
        raise Missing(f"--data {root} has no folder {' or '.join(names)}: "
                      f"--dataset folder wants DIR/{names[0]}/CLASS/*.jpg")
    return find_images(found[0])


def load_folder(folder, size, limit=None, stream=False):
    """The images of a Folder, shuffled by a fixed seed."""
    order = torch.randperm(len(folder.files), generator=generator("folder"))[:limit].tolist()
    files, labels = [folder.files[i] for i in order], [folder.labels[i] for i in order]
    images = read_square(files[:SAMPLE] if stream else files, size)
    return Data(images, torch.tensor(labels), folder.classes, files if stream else None, files)


def read_square(files, size):
    """The images of the files, resized and cropped: (n, 3, size, size) uint8."""
    try:
        images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    except RuntimeError as e:
        raise Refused(f"{len(files)} images at --size {size} do not fit into memory: "
                      "lower --size or --limit, or try --stream") from e
    with ThreadPoolExecutor() as pool:
        for row, image in enumerate(pool.map(lambda path: resize_and_crop(read_image(path), size), files)):
            images[row] = image
    return images


def take(data, rows):
    """The images at `rows`, which must be in ascending order, so that a streamed folder's sample stays in front."""
    files, paths = (names and [names[row] for row in rows.tolist()] for names in (data.files, data.paths))
    images, labels = data.images[rows[rows < len(data.images)]], data.labels[rows]
    return data._replace(images=images, labels=labels, files=files, paths=paths)


def stratified(labels, fraction, g):
    """The rows of a `fraction` of every class, at least one of each, in ascending order."""
    members = (m[torch.randperm(len(m), generator=g)] for m in images_of_classes(labels))
    return torch.cat([m[: max(1, round(fraction * len(m)))] for m in members]).sort().values


def hold_out(labels, seed):
    """(kept, held): `held` has the rows of a tenth of every class of two or more images, and `kept` all others."""
    labels = labels.cpu()
    several = torch.nonzero(torch.bincount(labels)[labels] > 1).squeeze(1)
    held = several[stratified(labels[several], 0.1, generator("held out", seed))] if len(several) else several
    return all_but(held, len(labels)), held


def with_label_noise(labels, share, num_classes, g):
    """Labels of which each has been exchanged with probability `share`, for any other with equal chance."""
    other = (labels + torch.randint(1, max(num_classes, 2), labels.shape, generator=g)) % num_classes
    return torch.where(torch.rand(labels.shape, generator=g) < share, other, labels)


def all_but(rows, n):
    """The numbers from 0 to n - 1 that are not among `rows`, in ascending order."""
    return torch.ones(n, dtype=torch.bool).index_fill(0, rows, False).nonzero().squeeze(1)


def images_of_classes(labels):
    return [torch.nonzero(labels == c).squeeze(1) for c in labels.unique()]


def mean_and_std(dataset, images):
    """The mean and the standard deviation of each channel, for images in [0, 1]."""
    if dataset in MEAN_STD:
        return [torch.tensor(v) for v in MEAN_STD[dataset]]
    value = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(images[:SAMPLE, c].flatten(), minlength=256) for c in range(3)])
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = share @ value
    std = (share * (value - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), std.clamp(min=1e-3).float()


def resize_square(images, size):
    """Square images (n, 3, H, H) at another size."""
    if images.shape[-1] == size:
        return images
    return torch.cat([TF.resize(part, [size, size], antialias=True) for part in images.split(1000)])


MT19937 = slice(24, 24 + 624 * 8)  # the bytes of a generator's state that hold the Mersenne Twister's 624 words
STREAMS = 3  # counts the ways to make random numbers of a key: 2 since version 0.4, and 3 has other views


def generator(*key):
    """A torch generator for a key such as ("views", seed, epoch, step): equal keys give equal streams.

    A key holds words, which keep the uses of a seed apart, and whole numbers below 2^64. The whole state of the
    generator is drawn here. torch would fill it from 32 bits, which two among a hundred thousand keys may share.
    """
    drawn = seed_sequence(key)
    g = torch.Generator().manual_seed(int(drawn.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    state = g.get_state()
    state[MT19937].view(torch.int64)[:] = torch.from_numpy(drawn.generate_state(624).astype(np.int64))
    return g.set_state(state)


def seed_sequence(key):
    numbers = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in key]
    halves = [number >> shift & 0xFFFFFFFF for number in numbers for shift in (0, 32)]
    return np.random.SeedSequence([len(key), *halves])  # which fills a short key up with zeros


def uniforms(n, count, *key, first=0):
    """(n, count) numbers in [0, 1), float32: `count`, a multiple of 4, for each of the images first ... first + n - 1.

    An image's numbers belong to the key and to its place, whoever draws them: Philox computes any of its numbers from
    their place in the stream, four at a time, so that nobody draws the numbers of others (Salmon et al. 2011).
    """
    stream = np.random.Philox(key=seed_sequence(key).generate_state(2, np.uint64)).advance(first * count // 4)
    bits = stream.random_raw(n * count) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32)).view(n, count) / 2**24


def uniform_from(g, n):
    """A function uniform(low, high, *shape) that draws (n, *shape) numbers from g."""
    return lambda low, high, *shape: torch.rand(n, *shape, generator=g) * (high - low) + low


SHAPES = ("disc", "square", "triangle", "cross", "star")
TEXTURES = ("plain", "striped")
BLOCK = 200  # images of shapes that are drawn together


def shapes(n, size, seed):
    """The first n images of ten classes that are drawn: five shapes, plain or striped.

    Each block of images has a generator of its own, so that n images cost what n images cost, and are always the same.
    """
    blocks = [draw_shapes(BLOCK, size, generator("shapes", seed, k)) for k in range(math.ceil(n / BLOCK))]
    images, labels = (torch.cat(parts)[:n] for parts in zip(*blocks))
    return Data(images, labels, [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES])


def draw_shapes(n, size, g):
    """(images, labels) with random place, scale, angle, colours, background and noise."""
    uniform = uniform_from(g, n)
    labels = torch.randint(10, (n,), generator=g)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1  # pixel centres in (-1, 1)
    angle, scale = uniform(-0.5, 0.5, 1, 1), uniform(0.5, 0.85, 1, 1)
    x, y = axis[None, None] - uniform(-0.25, 0.25, 1, 1), axis[None, :, None] - uniform(-0.25, 0.25, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / scale
    v = (y * angle.cos() - x * angle.sin()) / scale
    radius, turn = (u**2 + v**2).sqrt(), torch.atan2(v, u)
    edges = {  # below zero inside the shape
        "disc": radius - 0.9,
        "square": torch.maximum(u.abs(), v.abs()) - 0.8,
        "triangle": torch.maximum(v - 0.5, u.abs() * 0.866 - v * 0.5 - 0.5),
        "cross": torch.minimum(torch.maximum(u.abs() - 1, v.abs() - 0.3), torch.maximum(u.abs() - 0.3, v.abs() - 1)),
        "star": radius - 0.65 - 0.35 * (5 * turn).cos(),
    }
    edge = torch.stack(list(edges.values()), 1)[torch.arange(n), labels // 2]
    inside = torch.sigmoid(-edge * scale * size / 1.5)[:, None]
    stripes = torch.sigmoid(8 * (uniform(7, 11, 1, 1) * u + uniform(0, 6.28, 1, 1)).sin())
    stripes = (stripes * (labels % 2)[:, None, None])[:, None]

    background, other, second = (uniform(0, 0.5, 3, 1, 1) for _ in range(3))  # dark, the ink light, or all inverted
    ink = uniform(0.5, 1, 3, 1, 1)
    clouds = F.interpolate(uniform(0, 1, 1, 4, 4), size=(size, size), mode="bicubic").clamp(0, 1)
    picture = background + 0.5 * clouds * (other - background)
    picture = picture + inside * (ink + stripes * (second - ink) - picture)
    picture = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, picture, 1 - picture)
    picture = picture + uniform(0.02, 0.1, 1, 1, 1) * torch.randn(n, 3, size, size, generator=g)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8), labels
