"""Views of a batch, the order of an epoch, the batches of a run.

Everything random belongs to a key such as (seed, epoch, step, view), and to an image's place in the batch. So order and
views do not depend on how a batch falls to ranks, nor on whether a run was interrupted.

To add an augmentation of whole batches, give it a name in AUGMENTATIONS, draw its parameters at the end of draw_view
and apply them in make_view. To add one of single images, give it a name in POLICIES and a row in WorkerViews.
"""

import functools
import math
import signal
import sys
import threading
from typing import NamedTuple

import torch
import torch.utils.data
from torchvision.transforms import v2 as transforms

from common.cli import Refused
from common.data import generator, images_of_classes, uniforms
from common.images import SMALL_SIZE, read_image, resize_and_crop
from common.objectives import OBJECTIVES

# ---------------------------------------------------------------- views: a whole batch at once, parameters per image


class ViewParameters(NamedTuple):
    box: torch.Tensor  # (n, 4) top, left, height, width of the crop, in pixels
    flip: torch.Tensor  # (n,) bool
    jitter: torch.Tensor  # (n, 4) brightness, contrast, saturation factors and hue shift; (1, 1, 1, 0) does nothing
    gray: torch.Tensor  # (n,) bool
    sigma: torch.Tensor  # (n,) of the blur in pixels; 0 for none, as for all images of up to 64 pixels
    order: list  # of the four jitters, one for the batch

    def of(self, rows):
        """The parameters of some of the images."""
        return ViewParameters(*(parameter[rows] for parameter in self[:-1]), self.order)

    def to(self, device):
        return ViewParameters(*(send(parameter, device) for parameter in self[:-1]), self.order)


def send(x, device):
    """x on the device. A GPU fetches it by itself, and the CPU does not wait."""
    if x.device.type != "cpu" or device.type in ("cpu", "mps"):
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def draw_view(n, size, augment, key, first=0, crop=True, crop_min=0.2, jitter=0.5):
    """Parameters of one view of n images from SimCLR's distributions, by default at the reference code's strengths.

    They belong to the key of the view and to the places first ... first + n - 1 of the images in their batch.

    A crop takes (crop_min, 1) of the area at an aspect of (3/4, 4/3) and is flipped half of the time. "sim" also draws
    colour jitter of (0.8, 0.8, 0.8, 0.2) * jitter with probability 0.8, grey with 0.2 and, above 64 pixels, a Gaussian
    blur of sigma (0.1, 2) with 0.5. "stacked-rand" draws the same colours. "none" leaves the images as they are.
    crop=False is for images that WorkerViews has cropped already.
    """
    u = uniforms(n, 32, *key, first=first)
    area = between(crop_min, 1, u[:, :10]) * size**2  # ten tries, as in torchvision; then the whole image
    ratio = between(math.log(3 / 4), math.log(4 / 3), u[:, 10:20]).exp()
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2).round()  # (n, 10, 2) height, width
    fits = ((sides > 0) & (sides <= size)).all(2)
    sides = sides[torch.arange(n), fits.int().argmax(1)]
    sides = torch.where(fits.any(1, keepdim=True), sides, size)
    corner = (u[:, 20:22] * (size - sides + 1)).floor().clamp(max=size - sides)
    box = torch.cat([corner, sides], 1)
    flip = u[:, 22] < 0.5
    factors = between(max(0.0, 1 - 0.8 * jitter), 1 + 0.8 * jitter, u[:, 23:26])
    shift = between(-0.2 * jitter, 0.2 * jitter, u[:, 26:27])
    colours = torch.cat([factors, shift], 1)
    colours[u[:, 27] >= 0.8] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    gray = u[:, 28] < 0.2
    sigma = between(0.1, 2, u[:, 29]) * (u[:, 30] < 0.5) * (size > SMALL_SIZE)
    order = uniforms(1, 4, *key, "order").squeeze(0).argsort().tolist()
    if augment == "none" or not crop:
        box, flip = torch.tensor([0.0, 0.0, size, size]).expand(n, 4), torch.zeros(n, dtype=torch.bool)
    if augment not in ("sim", "stacked-rand"):
        order, gray, sigma = [], torch.zeros(n, dtype=torch.bool), torch.zeros(n)
    return ViewParameters(box, flip, colours, gray, sigma, order)


def between(low, high, u):
    return low + (high - low) * u


def make_view(images, view, mean, std):
    """images (n, 3, H, H) uint8 -> views of mean's type: cropped, flipped, jittered, greyed, blurred, normalised."""
    x = crop_and_flip(images.float() / 255, view.box, view.flip)
    jitters = (brightness, contrast, saturation, hue)
    for j in view.order:
        x = jitters[j](x, view.jitter[:, j, None, None, None])
    if view.order:
        x = torch.where(view.gray[:, None, None, None], luma(x), x)
    if view.order and x.shape[-1] > SMALL_SIZE:  # a look at sigma would wait for the device
        x = torch.where(view.sigma[:, None, None, None] > 0, blur(x, view.sigma), x)
    return normalize(x, mean, std)


def normalize(x, mean, std):
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def crop_and_flip(x, box, flip):
    """Resizes each image's box back to the image's size, by a matrix for the rows and one for the columns."""
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
    """Gaussian blur of sigma (n,) pixels, as torchvision's gaussian_blur; the kernel is a tenth of the image wide."""
    size = x.shape[-1]
    reach = x.shape[-1] // 20
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
    red, green, blue = x.split(1, 1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


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


# macOS advises against forks and Windows has none: there a worker starts anew and imports torch, in some seconds.
START_METHOD = "fork" if sys.platform.startswith("linux") else "spawn"
SIGCHLD = getattr(signal, "SIGCHLD", None)  # which Windows lacks

POLICIES = ("auto", "rand", "stacked-rand")
AUGMENTATIONS = ("sim", "crop", "none", *POLICIES)


def are_made_in_workers(config):
    """Whether images come from WorkerViews, one by one, as those of streamed folders and of policies do."""
    return config.stream or config.augment in POLICIES


class WorkerViews(torch.utils.data.Dataset):
    """What the workers of a DataLoader do to single images.

    They read the files of a streamed folder, or apply torchvision's AutoAugment or RandAugment, and crop and flip.
    An item is asked for by (row, *key). It is a (3, H, H) uint8 image that depends on the key alone.
    """

    def __init__(self, data, augment, crop_min=0.2):
        size = data.images.shape[-1]
        policies = transforms.AutoAugmentPolicy.CIFAR10 if size <= SMALL_SIZE else transforms.AutoAugmentPolicy.IMAGENET
        crop = [transforms.RandomResizedCrop(size, scale=(crop_min, 1), antialias=True),
            transforms.RandomHorizontalFlip()]
        steps = {
            "none": [transforms.Lambda(functools.partial(resize_and_crop, size=size))],
            "auto": [*crop, transforms.AutoAugment(policies)],
            "rand": [*crop, transforms.RandAugment()],
            "stacked-rand": [*crop, transforms.RandAugment(magnitude=30)],  # the official code's 10 of 10
        }
        self.data = data
        self.transform = transforms.Compose(steps.get(augment, crop))

    def __getitem__(self, item):
        row, *key = item
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator(*key).get_state())
            image = self.data.images[row] if self.data.files is None else read_image(self.data.files[row])
            return self.transform(image)


def worker_batches(dataset, batches, workers):
    """Yields a batch of a data set such as WorkerViews for each list of items in `batches`, read by worker processes.

    Raises Refused where a worker is killed. (Torch's own handler would raise anywhere, even within a step.)
    """
    context = {"generator": torch.Generator()}  # torch's own generator stays where it is
    if workers:
        context |= {"multiprocessing_context": START_METHOD, "prefetch_factor": 4}
    handled = workers and SIGCHLD and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(SIGCHLD) if handled else None
    source = iter(torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, **context))
    if handled:
        signal.signal(SIGCHLD, before or signal.SIG_DFL)
    try:
        yield from source
    except (RuntimeError, OSError, EOFError) as e:
        gone = isinstance(e, (ConnectionError, EOFError, FileNotFoundError)) or str(e).startswith("DataLoader worker")
        if not gone or str(e).startswith("Caught "):  # such a message comes from a worker that is alive
            raise
        raise Refused("a process that reads images is gone, for want of memory perhaps: "
                      "lower --workers, or give /dev/shm more room") from e
    finally:  # else an error's traceback keeps the workers, and waits ten seconds for them when it is thrown away
        getattr(source, "_shutdown_workers", lambda: None)()


def mixed(x, labels, num_classes, how, alpha, g):
    """(views, soft labels (n, C)) of torchvision's MixUp or CutMix, drawn from g: each image with its neighbour."""
    mix = {"mixup": transforms.MixUp, "cutmix": transforms.CutMix}[how](alpha=alpha, num_classes=num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(g.get_state())
        return mix(x, labels)


# ---------------------------------------------------------------- order of the images


def shuffled_pairs(labels, g):
    """An order in which rows 2j and 2j + 1 show two images of one class.

    The pairs go round the classes, so that any C pairs in a row show C classes, as in Sohn's batches. Small classes
    recur.
    """
    members = [m[torch.randperm(len(m), generator=g)] for m in images_of_classes(labels)]
    return round_the_classes([m[: len(m) // 2 * 2].view(-1, 2) for m in members], len(labels), g)


def shuffled_balanced(labels, g):
    """An order that goes round the classes: each block of C images shows C classes. Small classes recur."""
    members = [m[torch.randperm(len(m), generator=g)] for m in images_of_classes(labels)]
    return round_the_classes([m.view(-1, 1) for m in members], len(labels), g)


def round_the_classes(groups, n, g):
    """n rows: a group of every class, then the next group of every class, and so on.

    groups[c] (k_c, images of a group) holds the rows of class c.
    """
    count = math.ceil(n / (len(groups) * groups[0].shape[1]))
    rounds = torch.stack([part[torch.arange(count) % len(part)] for part in groups], 1)  # (count, C, images)
    return rounds[:, torch.randperm(len(groups), generator=g)].flatten()[:n]


# ---------------------------------------------------------------- the batches of a run


class Batch:
    """Some images of a step, and what their views are drawn from. The views are made when they are asked for.

    pixels: a list with one (m, 3, H, H) uint8 tensor for each view; labels (m,); index (m,), the images' places in the
    global batch, of which `start` is the first; draws: a list with the ViewParameters of these images for each view;
    key: (seed, epoch, step). All tensors are on the device.
    """

    def __init__(self, config, pixels, labels, index, start, draws, key, mean, std):
        self.config, self.pixels, self.labels, self.index, self.start = config, pixels, labels, index, start
        self.draws, self.key, self.mean, self.std = draws, key, mean, std

    def __len__(self):
        return len(self.labels)

    def parts(self, size):
        """The same images as batches of `size`."""
        return [self.part(slice(i, i + size)) for i in range(0, len(self), size)]

    def part(self, rows):
        pixels, draws = [p[rows] for p in self.pixels], [draw.of(rows) for draw in self.draws]
        place = self.index[rows], self.start + rows.start
        return Batch(self.config, pixels, self.labels[rows], *place, draws, self.key, self.mean, self.std)

    def views(self):
        """(x, y): the views (V m, 3, H, H), view by view, and their labels (V m,), or (V m, C) of mixed images.

        What the layers of an encoder draw next, by dropout and the like, belongs to this part of this step.
        """
        self.seed_layers()
        sources = zip(self.pixels, self.draws)
        made = [make_view(pixels, draw, self.mean, self.std) for pixels, draw in sources]
        labels = [self.labels] * len(made)
        if self.config.mix:
            made, labels = zip(*(self.mixed(view, v) for v, view in enumerate(made)))
        return torch.cat(made).contiguous(memory_format=torch.channels_last), torch.cat(labels)

    def seed_layers(self):
        """Makes dropout draw the same in both passes over a part, and in a run that goes on."""
        torch.manual_seed(generator("layers", *self.key, self.start).initial_seed())

    def mixed(self, view, v):
        seed, *step = self.key
        g = generator("mix", seed, *step, v, self.start)
        return mixed(view, self.labels, self.config.num_classes, self.config.mix, self.config.mix_alpha, g)


def make_batches(config, data, ranks, mean, std, first_step):
    """Yields this rank's Batch of every step from `first_step` on. Raises Refused where an image cannot be read."""
    device = ranks.device
    share = config.batch // ranks.world
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)  # of the global batch
    index = torch.arange(mine.start, mine.stop)
    labels = data.labels.to(device)
    on_device = index.to(device)
    in_workers = are_made_in_workers(config)
    images = None if in_workers else data.images.to(device)
    steps = len(labels) // config.batch  # of an epoch
    for epoch in range(first_step // steps, config.epochs):
        first = max(first_step - epoch * steps, 0)
        order = order_of(config, data.labels, epoch)[: steps * config.batch].view(steps, config.batch)
        rows = order[first:, mine]  # (steps, n_r)
        if in_workers:
            source = pixels_from_workers(config, data, rows, index, epoch, first, device)
        else:
            source = ([images[send(r, device)]] * config.views for r in rows)
        for position, (r, pixels) in enumerate(zip(rows, source), first):
            draws = [draw.to(device) for draw in draw_views(config, epoch, position, mine, crop=not in_workers)]
            key = config.seed, epoch, position
            yield Batch(config, pixels, labels[send(r, device)], on_device, mine.start, draws, key, mean, std)


def order_of(config, labels, epoch):
    """The rows of the data in the order of an epoch."""
    g = generator("order", config.seed, epoch)
    if OBJECTIVES[config.loss].pairs:
        return shuffled_pairs(labels, g)
    return shuffled_balanced(labels, g) if config.balanced else torch.randperm(len(labels), generator=g)


def draw_views(config, epoch, position, mine, crop):
    """The ViewParameters, for each view of a step, of the images `mine`, a slice of the global batch."""
    keys = [("views", config.seed, epoch, position, v) for v in range(config.views)]
    strength = {"crop": crop, "crop_min": config.crop_min, "jitter": config.jitter}
    n = mine.stop - mine.start
    return [draw_view(n, config.size, config.augment, key, mine.start, **strength) for key in keys]


def pixels_from_workers(config, data, rows_of_steps, index, epoch, first, device):
    """Yields for each step a list with the workers' (n_r, 3, H, H) for each view."""
    size = config.micro_batch or len(index)
    items = worker_items(config, rows_of_steps, index, size, epoch, first)
    ready = worker_batches(WorkerViews(data, config.augment, config.crop_min), items, config.workers)
    for _ in rows_of_steps:
        parts = [[send(next(ready), device) for v in range(config.views)] for _ in range(0, len(index), size)]
        yield [torch.cat(of_view) for of_view in zip(*parts)]


def worker_items(config, rows_of_steps, index, size, epoch, first):
    """The items of WorkerViews, (row, key), by step, part of `size` images, and view."""
    for position, rows in enumerate(rows_of_steps.tolist(), first):
        for start in range(0, len(rows), size):
            part = list(zip(rows, index.tolist()))[start : start + size]
            for v in range(config.views):
                yield [(row, "workers", config.seed, epoch, position, v, place) for row, place in part]
