"""Images per second of a training step, beside the usual loop and beside the encoder alone, in turn in one run.

    python benchmarks/pretrain.py                              ResNet-18, 32 x 32, batch 256, two views
    python benchmarks/pretrain.py --device cuda --arch resnet50 --batch 1024

"ours"     uint8 images on the device, views of the whole batch at once, bfloat16 where it is fast, channels_last
"usual"    torchvision's transforms on PIL images in DataLoader workers, float32, NCHW, the mask-matrix loss
"encoder"  forward, backward and optimizer step on ready tensors, as ours: the limit

All train the same encoder and head with SGD. Views per second are those of one core, SimAugment: ours for a batch, and
torchvision's on PIL images one by one.
"""

import itertools
import platform
import statistics
import sys
import time
from pathlib import Path

import click
import torch
import torchvision
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import losses
import pretrain
from benchmarks.losses import device_name, textbook_out
from common.config import Config
from common.data import mean_and_std, shapes
from common.models import bfloat16_is_fast
from common.views import draw_view, make_view


def sim_augment(size, mean, std):
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize(mean.tolist(), std.tolist()),
        ]
    )


class TwoViews(torch.utils.data.Dataset):
    def __init__(self, data, transform):
        self.pictures, self.labels, self.transform = [to_pil_image(x) for x in data.images], data.labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.pictures[i]), self.transform(self.pictures[i]), self.labels[i]


def endless(loader):
    while True:
        yield from loader


def steps_of(config, data, workers):
    """Functions that take one training step each, by name."""
    device = torch.device(config.device)
    mean, std = (v.to(device) for v in mean_and_std("shapes", data.images))
    autocast = torch.bfloat16 if bfloat16_is_fast(device) else None
    pixels, labels = data.images.to(device), data.labels.to(device)
    g = torch.Generator().manual_seed(0)

    def trained(autocast, layout):
        model = pretrain.build_model(config, autocast).to(device, memory_format=layout)
        return model, torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)

    def descend(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    ours, ours_sgd = trained(autocast, torch.channels_last)
    steps = itertools.count()

    def our_step():
        rows = torch.randperm(len(labels), generator=g)[: config.batch].to(device)
        step = next(steps)
        draws = [draw_view(config.batch, config.size, "sim", (step, v)) for v in range(2)]
        views = [make_view(pixels[rows], draw.to(device), mean, std) for draw in draws]
        z, _ = ours(torch.cat(views).contiguous(memory_format=torch.channels_last))
        descend(ours_sgd, losses.supcon_out(z, labels[rows].repeat(2), 0.1))

    usual, usual_sgd = trained(None, torch.contiguous_format)
    pairs = TwoViews(data, sim_augment(config.size, mean.cpu(), std.cpu()))
    how = {"shuffle": True, "drop_last": True, "num_workers": workers, "persistent_workers": True}
    batches = endless(torch.utils.data.DataLoader(pairs, config.batch, **how))

    def usual_step():
        first, second, y = next(batches)
        z, _ = usual(torch.cat([first, second]).to(device))
        descend(usual_sgd, textbook_out(z, y.to(device).repeat(2)))

    alone, alone_sgd = trained(autocast, torch.channels_last)
    ready = torch.randn(2 * config.batch, 3, config.size, config.size, device=device)
    ready = ready.contiguous(memory_format=torch.channels_last)

    def encoder_step():
        z, _ = alone(ready)
        descend(alone_sgd, z.square().mean())

    return {"ours": our_step, "usual": usual_step, "encoder": encoder_step}


def views_on_one_core(data, size):
    """Functions that make views of 256 images, on one thread."""
    mean, std = mean_and_std("shapes", data.images)
    transform = sim_augment(size, mean, std)
    pictures = [to_pil_image(x) for x in data.images[:256]]
    steps = itertools.count()

    def ours():
        draw = draw_view(256, size, "sim", (next(steps),))
        return make_view(data.images[:256], draw, mean, std)

    return {"views, ours": ours, "views, torchvision": lambda: torch.stack([transform(x) for x in pictures])}


def rounds(runs, count):
    """The median seconds of each, all of them in turn, `count` times."""
    taken = {name: [] for name in runs}
    for i in range(count + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name] += [time.perf_counter() - start] if i else []  # the first of each warms up
    return {name: statistics.median(values) for name, values in taken.items()}


@click.command(context_settings={"show_default": True})
@click.option("--arch", default="resnet18", help="Encoder.")
@click.option("--size", default=32, help="Image side.")
@click.option("--batch", default=256, help="Images, of two views each.")
@click.option("--device", default="cpu", help="torch device.")
@click.option("--workers", default=2, help="DataLoader workers of the usual loop.")
@click.option("--rounds", "count", default=5, help="Rounds, of which the median counts.")
def main(arch, size, batch, device, workers, count):
    """Print images per second and their ratios."""
    stem = "3x3" if size <= 64 else "7x7"
    config = Config(arch=arch, size=size, batch=batch, device=device, stem=stem, num_classes=10)
    data = shapes(max(1024, batch), size, 0)
    click.echo(
        f"{device_name(device)}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"python {platform.python_version()}; {arch}, {size} x {size}, batch {batch} x 2 views\n"
    )
    click.echo("| step | images/s | of ours |\n| --- | --- | --- |")
    show(rounds(steps_of(config, data, workers), count), batch, "ours")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    show(rounds(views_on_one_core(data, size), 2 * count), 256, "views, ours")
    torch.set_num_threads(threads)


def show(seconds, batch, ours):
    for name, value in seconds.items():
        click.echo(f"| {name} | {batch / value:.1f} | {seconds[ours] / value:.2f} |")


if __name__ == "__main__":
    main()
