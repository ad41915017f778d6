"""Images and their views: data sets as uint8 tensors in memory, views of a whole batch at once, the order of an epoch.

Everything random is drawn from a generator that belongs to a key such as (seed, epoch, step, view): data order and views
do not depend on how a batch falls to ranks, nor on whether a run was interrupted.
"""

import functools
import math
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as TF


class Refused(click.ClickException):
    """Something the user can put right: one line, exit status 2."""

    exit_code = 2

    def __init__(self, message):
        if message.startswith("Caught Refused in DataLoader"):  # torch puts the worker's traceback before it
            message = message.rstrip().splitlines()[-1].split("Refused: ", 1)[-1]
        super().__init__(message)


class Missing(Refused):
    """A data set that is not there."""


# ---------------------------------------------------------------- data: uint8 images, square, in memory


class Data(NamedTuple):
    images: torch.Tensor  # (n, 3, H, W) uint8; of a streamed folder the first SAMPLE alone
    labels: torch.Tensor  # (n,) int64
    classes: list  # names
    files: list | None = None  # of a streamed folder, the path of every image


SMALL = 64  # pixels; what is larger is blurred, and resized and given policies as ImageNet is
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
    "fashionmnist": "FashionMNIST/raw/ with the four *-ubyte files, unzipped (github.com/zalandoresearch/fashion-mnist)",
}


def load_data(dataset, root, train, *, size=None, download=True, limit=None, stream=False):
    """The first `limit` images of the training or test set as Data, resized to `size` where given.

    Raises Refused where it cannot be had, Missing where it is not there.
    stream: of a folder too large for memory, hold the files' names, and the pixels of a sample.
    """
    if dataset == "shapes":
        return shapes(min(10_000 if train else 2_000, limit or 10_000), size or 32, seed=int(train))
    if dataset == "folder":
        return load_folder(root, train, size or 32, limit, stream)
    sets = torchvision.datasets
    try:
        if dataset == "svhn":
            d = sets.SVHN(root, split="train" if train else "test", download=download)
            images, labels, classes = torch.from_numpy(d.data), d.labels, [str(c) for c in range(10)]
        elif dataset == "fashionmnist":
            d = sets.FashionMNIST(root, train=train, download=download)
            images, labels, classes = d.data[:, None].expand(-1, 3, -1, -1), d.targets, d.classes
        else:
            d = (sets.CIFAR10 if dataset == "cifar10" else sets.CIFAR100)(root, train=train, download=download)
            images, labels, classes = torch.from_numpy(d.data).permute(0, 3, 1, 2), d.targets, d.classes
    except ModuleNotFoundError as e:
        raise Refused(f"--dataset {dataset} needs the package {e.name}: pip install {e.name}") from e
    except Exception as e:  # a download, a wrong checksum, a damaged file: torchvision's readers have no common error
        way = f"put {FILES[dataset]} there by hand" + ("" if download else ", or let --download fetch it")
        reason = str(e).strip().splitlines()[0] if str(e) else type(e).__name__
        raise Missing(f"--dataset {dataset} is not in --data {root} ({reason}): {way}") from e
    images, labels = images[:limit].contiguous(), torch.as_tensor(np.asarray(labels)[:limit], dtype=torch.long)
    return Data(resize(images, size) if size else images, labels, list(classes))


def require_same_classes(train, test, root):
    """Labels are places in the list of classes: of two sets they mean the same only if the lists do."""
    if train.classes != test.classes:
        raise Refused(f"--data {root}: the training and the test set differ in their classes: give them the same folders")


def load_folder(root, train, size, limit=None, stream=False):
    """torchvision's ImageFolder over root/train, or root/test or root/val; shuffled once, by a fixed seed."""
    names = ["train"] if train else ["test", "val"]
    try:
        found = [Path(root, name) for name in names if Path(root, name).is_dir()]
    except OSError as e:  # a name too long, a folder that may not be read
        raise Refused(f"--data {str(root)[:80]} cannot be read ({e.strerror}): name another folder") from e
    if not found:
        raise Missing(f"--data {root} has no folder {' or '.join(names)}: --dataset folder wants DIR/train/CLASS/*.jpg")
    try:
        folder = torchvision.datasets.ImageFolder(found[0])
    except FileNotFoundError as e:
        raise Refused(f"--data {found[0]}: {str(e).splitlines()[0]}") from e

    def load(sample):
        return to_size(read_image(sample[0]), size)

    samples = [folder.samples[i] for i in torch.randperm(len(folder.samples), generator=generator(0)).tolist()][:limit]
    n = min(SAMPLE, len(samples)) if stream else len(samples)
    try:
        images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    except RuntimeError as e:
        raise Refused(f"{n} images at --size {size} do not fit into memory: lower --size or --limit, or try --stream") from e
    with ThreadPoolExecutor() as pool:
        for row, image in enumerate(pool.map(load, samples[:n])):
            images[row] = image
    files, labels = zip(*samples)
    return Data(images, torch.tensor(labels), folder.classes, list(files) if stream else None)


def read_image(path):
    """(3, H, W) uint8, RGB whatever the file holds."""
    try:
        return TF.pil_to_tensor(torchvision.datasets.folder.default_loader(path))
    except Exception as e:  # Pillow's errors have no common class
        raise Refused(f"{path} is not a readable image: mend or remove it") from e


def take(data, rows):
    """The images at `rows`, which are in the order of the data: of a streamed folder its sample's stay the first ones."""
    files = None if data.files is None else [data.files[row] for row in rows.tolist()]
    return data._replace(images=data.images[rows[rows < len(data.images)]], labels=data.labels[rows], files=files)


def stratified(labels, fraction, g):
    """Rows of a `fraction` of every class, at least one image of each, in the order of the data."""
    members = (m[torch.randperm(len(m), generator=g)] for m in images_of_classes(labels))
    return torch.cat([m[: max(1, round(fraction * len(m)))] for m in members]).sort().values


def with_label_noise(labels, share, num_classes, g):
    """Labels of which each is, with probability `share`, another one, all others equally likely (symmetric noise)."""
    other = (labels + torch.randint(1, max(num_classes, 2), labels.shape, generator=g)) % num_classes
    return torch.where(torch.rand(labels.shape, generator=g) < share, other, labels)


def mean_and_std(dataset, images):
    """Of each channel, for images in [0, 1]."""
    if dataset in MEAN_STD:
        return [torch.tensor(v) for v in MEAN_STD[dataset]]
    value = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(images[:SAMPLE, c].flatten(), minlength=256) for c in range(3)])
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = share @ value
    std = (share * (value - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), std.clamp(min=1e-3).float()


def to_size(image, size):
    """The middle, `size` pixels square, of an image whose shorter side is brought to 8/7 of it (256 to 224, as for ImageNet),
    or up to 64 pixels to `size` itself. An image of that size stays as it is."""
    if image.shape[-2:] == (size, size):
        return image
    return TF.center_crop(TF.resize(image, size * 8 // 7 if size > SMALL else size, antialias=True), size)


def resize(images, size):
    if images.shape[-1] == size:
        return images
    return torch.cat([TF.resize(part, [size, size], antialias=True) for part in images.split(1000)])


SHAPES = [f"{texture} {shape}" for shape in ("disc", "square", "triangle", "cross", "star") for texture in ("plain", "striped")]
BLOCK = 200  # images of shapes that are drawn together


def shapes(n, size, seed):
    """The first n images of ten classes that are drawn: five shapes, plain or striped.

    Each block of images has a generator of its own, so that n images cost what n images cost, and are always the same.
    """
    blocks = [draw_shapes(BLOCK, size, generator(seed, 10, k)) for k in range(math.ceil(n / BLOCK))]
    images, labels = (torch.cat(parts)[:n] for parts in zip(*blocks))
    return Data(images, labels, SHAPES)


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


# ---------------------------------------------------------------- views: a whole batch at once, parameters per image


class ViewParameters(NamedTuple):
    box: torch.Tensor  # (n, 4) top, left, height, width of the crop, in pixels
    flip: torch.Tensor  # (n,) bool
    jitter: torch.Tensor  # (n, 4) brightness, contrast, saturation factors and hue shift; (1, 1, 1, 0) does nothing
    gray: torch.Tensor  # (n,) bool
    sigma: torch.Tensor  # (n,) of the blur in pixels; 0 for none, as for all images of up to 64 pixels
    order: list  # of the four jitters, one for the batch


def draw_view(n, size, augment, g, crop=True, crop_min=0.2, jitter=0.5):
    """Parameters of one view of n images: SimCLR's distributions, by default at the reference code's strengths.

    Crop of (crop_min, 1) of the area at aspect (3/4, 4/3), flip; "sim" adds colour jitter (0.8, 0.8, 0.8, 0.2) * jitter
    with probability 0.8 and grey with 0.2, and, above 64 pixels, a Gaussian blur of sigma (0.1, 2) with 0.5. "none" leaves
    the images as they are. crop=False goes with images that WorkerViews has cropped; "stacked-rand" adds sim's colours.
    """
    uniform = uniform_from(g, n)
    area = uniform(crop_min, 1, 10) * size**2  # ten tries, as in torchvision; then the whole image
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2).round()  # (n, 10, 2) height, width
    fits = ((sides > 0) & (sides <= size)).all(2)
    sides = sides[torch.arange(n), fits.int().argmax(1)]
    sides = torch.where(fits.any(1, keepdim=True), sides, size)
    corner = (uniform(0, 1, 2) * (size - sides + 1)).floor().clamp(max=size - sides)
    box = torch.cat([corner, sides], 1)
    flip = uniform(0, 1) < 0.5
    colours = torch.cat([uniform(max(0.0, 1 - 0.8 * jitter), 1 + 0.8 * jitter, 3), uniform(-0.2 * jitter, 0.2 * jitter, 1)], 1)
    colours[uniform(0, 1) >= 0.8] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    gray = uniform(0, 1) < 0.2
    order = torch.randperm(4, generator=g).tolist()
    sigma = uniform(0.1, 2) * (uniform(0, 1) < 0.5) * (size > SMALL)
    if augment == "none" or not crop:
        box, flip = torch.tensor([0.0, 0.0, size, size]).expand(n, 4), torch.zeros(n, dtype=torch.bool)
    if augment not in ("sim", "stacked-rand"):
        order, gray, sigma = [], torch.zeros(n, dtype=torch.bool), torch.zeros(n)
    return ViewParameters(box, flip, colours, gray, sigma, order)


def make_view(images, view, mean, std):
    """images (n, 3, H, H) uint8 -> (n, 3, H, H) float32: cropped, flipped, jittered, greyed, blurred, normalised."""
    x = crop_and_flip(images.float() / 255, view.box, view.flip)
    jitters = (brightness, contrast, saturation, hue)
    for j in view.order:
        x = jitters[j](x, view.jitter[:, j, None, None, None])
    if view.order:
        x = torch.where(view.gray[:, None, None, None], luma(x), x)
    if view.order and x.shape[-1] > SMALL:  # a look at sigma would wait for the device
        x = torch.where(view.sigma[:, None, None, None] > 0, blur(x, view.sigma), x)
    return normalize(x, mean, std)


def normalize(x, mean, std):
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def crop_and_flip(x, box, flip):
    """Each image's box, resized back to the image's size: a matrix for the rows and one for the columns."""
    top, left, height, width = box.T
    rows = resize_matrix(top, height, x.shape[2])
    columns = resize_matrix(left, width, x.shape[3])
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ (x @ columns[:, None].mT)


def resize_matrix(start, length, size):
    """(n, size, size): output pixel o of image i as weights of the pixels in [start_i, start_i + length_i).

    The triangle filter of torchvision's antialiased bilinear resize, cut off at the edges of the crop.
    """
    pixel = torch.arange(size, device=start.device, dtype=start.dtype)
    start, length = start[:, None, None], length[:, None, None]
    step = length / size
    centre = start + (pixel[:, None] + 0.5) * step - 0.5
    w = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    w = w * ((pixel >= start) & (pixel < start + length))
    return w / w.sum(2, keepdim=True)


def blur(x, sigma):
    """Gaussian blur of sigma_i pixels, (n,), its kernel a tenth of the image wide, as torchvision's gaussian_blur."""
    size, reach = x.shape[-1], x.shape[-1] // 20
    offset = torch.arange(-reach, reach + 1, device=x.device)
    kernel = (-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = (torch.arange(size, device=x.device)[:, None] + offset).abs()
    source = size - 1 - (size - 1 - source).abs()  # reflected at the edges
    weights = x.new_zeros(len(x), size, size)
    weights.scatter_add_(2, source.expand(len(x), -1, -1), kernel[:, None].to(x.dtype).expand(-1, size, -1))
    return weights[:, None] @ (x @ weights[:, None].mT)


def luma(x):
    """Rec. 601 grey, as torchvision's rgb_to_grayscale: (n, 1, H, W)."""
    return (x * x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def blend(x, other, factor):
    return torch.lerp(other.expand_as(x), x, factor).clamp(0, 1)


def brightness(x, factor):
    return (x * factor).clamp(0, 1)


def contrast(x, factor):
    return blend(x, luma(x).mean((2, 3), keepdim=True), factor)


def saturation(x, factor):
    return blend(x, luma(x), factor)


def hue(x, shift):
    """Turns the hue by `shift` of a full circle (RGB to HSV and back, Smith 1978)."""
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    r, g, b = x.unbind(1)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    sector = sector + 6 * shift.squeeze(1)
    k = (torch.stack([sector + 5, sector + 3, sector + 1], 1)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


# ---------------------------------------------------------------- views of single images, in workers


POLICIES = ("auto", "rand", "stacked-rand")


class WorkerViews(torch.utils.data.Dataset):
    """What is done to single images in the workers of a DataLoader: reading a streamed folder's files, and with them, or
    for torchvision's AutoAugment and RandAugment, crop and flip.

    An item is asked for by (row, *key) and is a (3, H, H) uint8 image, drawn from the key alone.
    """

    def __init__(self, data, augment, crop_min=0.2):
        size = data.images.shape[-1]
        policies = transforms.AutoAugmentPolicy.CIFAR10 if size <= SMALL else transforms.AutoAugmentPolicy.IMAGENET
        crop = [transforms.RandomResizedCrop(size, scale=(crop_min, 1), antialias=True), transforms.RandomHorizontalFlip()]
        steps = {
            "none": [transforms.Lambda(functools.partial(to_size, size=size))],
            "auto": [*crop, transforms.AutoAugment(policies)],
            "rand": [*crop, transforms.RandAugment()],
            "stacked-rand": [*crop, transforms.RandAugment(magnitude=30)],  # the official code's 10 of 10
        }
        self.data, self.transform = data, transforms.Compose(steps.get(augment, crop))

    def __getitem__(self, item):
        row, *key = item
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(*key).initial_seed())
            return self.transform(self.data.images[row] if self.data.files is None else read_image(self.data.files[row]))


def worker_batches(views, batches, workers):
    """Yields the uint8 batches of WorkerViews, one for each list of items (row, *key) in `batches`.

    Raises Refused where a worker is killed. Torch's own handler would raise wherever the process is, amid a step as well.
    """
    context = {"generator": torch.Generator()} | ({"multiprocessing_context": "fork", "prefetch_factor": 4} if workers else {})
    handled = workers and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if handled else None
    source = iter(torch.utils.data.DataLoader(views, batch_sampler=batches, num_workers=workers, **context))
    if handled:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    try:
        yield from source
    except (RuntimeError, OSError, EOFError) as e:
        gone = isinstance(e, (ConnectionError, EOFError, FileNotFoundError)) or str(e).startswith("DataLoader worker")
        if not gone or str(e).startswith("Caught "):  # which a worker says that is still there
            raise
        raise Refused("a process that reads images is gone, for want of memory perhaps: lower --workers, or give /dev/shm more room") from e
    finally:  # else an error's traceback keeps the workers, and waits ten seconds for them when it is thrown away
        getattr(source, "_shutdown_workers", lambda: None)()


def mixed(x, labels, num_classes, how, alpha, g):
    """(views, soft labels (n, C)) of torchvision's MixUp or CutMix, drawn from g; each image is mixed with its neighbour."""
    mix = {"mixup": transforms.MixUp, "cutmix": transforms.CutMix}[how](alpha=alpha, num_classes=num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(g.initial_seed())
        return mix(x, labels)


# ---------------------------------------------------------------- order of the images


def generator(*key):
    """A torch generator whose stream belongs to the key (seed, epoch, step, ...) alone."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def uniform_from(g, n):
    """A function uniform(low, high, *shape) that draws (n, *shape) numbers from g."""
    return lambda low, high, *shape: torch.rand(n, *shape, generator=g) * (high - low) + low


def shuffled(labels, g):
    return torch.randperm(len(labels), generator=g)


def shuffled_pairs(labels, g):
    """Rows 2j and 2j + 1 show two images of one class; the pairs go round the classes, so that any C pairs in a row
    show C classes, as Sohn's batches do. Small classes recur."""
    members = [m[torch.randperm(len(m), generator=g)] for m in images_of_classes(labels)]
    return round_the_classes([m[: len(m) // 2 * 2].view(-1, 2) for m in members], len(labels), g)


def shuffled_balanced(labels, g):
    """An order in which any C images in a row, C from the beginning, show C classes. Small classes recur."""
    members = [m[torch.randperm(len(m), generator=g)] for m in images_of_classes(labels)]
    return round_the_classes([m.view(-1, 1) for m in members], len(labels), g)


def round_the_classes(groups, n, g):
    """n rows: a group of every class, then the next of every class, ...; groups[c] (k_c, images of a group)."""
    count = math.ceil(n / (len(groups) * groups[0].shape[1]))
    rounds = torch.stack([part[torch.arange(count) % len(part)] for part in groups], 1)  # (count, C, images)
    return rounds[:, torch.randperm(len(groups), generator=g)].flatten()[:n]


def images_of_classes(labels):
    return [torch.nonzero(labels == c).squeeze(1) for c in labels.unique()]
