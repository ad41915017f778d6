"""Stage 1: contrastive pretraining. x -> Enc(x) = r -> Proj(r) = z -> loss (Khosla et al. 2020, section 3.1).

    python pretrain.py --dataset shapes --augment crop --lr 0.1                 # minutes on two CPU cores, no download
    python pretrain.py --dataset cifar10 --batch 1024                           # the reference code's CIFAR-10 recipe, on a GPU
    torchrun --nproc_per_node=8 pretrain.py --dataset cifar10 --batch 1024      # the same batch on eight GPUs
    python pretrain.py --resume runs/cifar10-resnet50-supcon-s0                 # go on where a run stopped
    python pretrain.py --figure runs/cifar10-resnet50-supcon-s0                 # its learning curves
    python linear_probe.py runs/cifar10-resnet50-supcon-s0/ckpt.pt              # stage 2
    python pretrain.py --recipe list                                            # the papers' settings, each one word

A run folder holds config.json, log.jsonl and checkpoints (run_folder.py). `--batch` is the number of images over all
ranks; every image gives `--views` rows of the batch. Data order and views depend on (seed, epoch, position in the global
batch) alone: not on the number of ranks, and not on whether the run was interrupted. SIGTERM and Ctrl-C save a checkpoint
and end the run.
"""

import contextlib
import copy
import datetime
import gc
import math
import os
import shlex
import time
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import losses
from figures import learning_curves
from images import (
    POLICIES, Missing, Refused, ViewParameters, WorkerViews, draw_view, generator, load_data, make_view, mean_and_std,
    mixed, normalize, require_same_classes, shuffled, shuffled_balanced, shuffled_pairs, stratified, take, with_label_noise,
    worker_batches,
)  # fmt: skip
from metrics import knn_top1
from options import complete_from_data, complete_options, pretraining_options, read, require_same_data, run_command
from recipes import PRESETS, describe, learning_rate, make_optimizer
from run_folder import Journal, checkpoint_of, describe_run, is_first, load_state, refusal_of, refuse_unusable, say, signals_noted

# ---------------------------------------------------------------- encoder, projection head, classifier head


def build_encoder(arch, stem):
    """(encoder, width of r). The entries of a ResNet bear torchvision's names; stem "3x3" suits small images."""
    if arch == "small":
        return small_encoder(), 144
    if arch == "resnet200":
        net = ResNet(Bottleneck, [3, 24, 36, 3])
    else:
        net = getattr(torchvision.models, arch)()
    width, net.fc = net.fc.in_features, nn.Identity()
    if stem == "3x3":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net, width


def small_encoder():
    """0.34 M weights that two CPU cores train in minutes: a stem, two of torchvision's basic blocks, centred r."""

    def block(cin, cout):
        shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, 2, bias=False), nn.BatchNorm2d(cout))
        return BasicBlock(cin, cout, 2, shortcut)

    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
    return nn.Sequential(stem, block(32, 64), block(64, 144), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(144))


def build_projection(width, hidden, depth, dim):
    """depth 1: a linear map; depth 2, the paper's: one hidden layer of `hidden` units and a ReLU."""
    widths = [width] + [hidden] * (depth - 1) + [dim]
    layers = []
    for cin, cout in zip(widths, widths[1:]):
        layers += [nn.Linear(cin, cout), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Model(nn.Module):
    """x -> z = Proj(Enc(x)), on the unit sphere if `unit`, and the class scores of r if there is a classifier.

    The encoder alone runs under autocast; the heads are small and stay in float32. unit_r brings r to norm 1 before them,
    as the paper does and its code for CIFAR does not.
    """

    def __init__(self, encoder, projection=None, classifier=None, *, unit=True, unit_r=False, detach=False, autocast=None):
        super().__init__()
        self.encoder, self.projection, self.classifier = encoder, projection, classifier
        self.unit, self.unit_r, self.detach, self.autocast = unit, unit_r, detach, autocast

    def forward(self, x):
        r = encode(self.encoder, x, self.autocast)  # (N, width)
        r = F.normalize(r) if self.unit_r else r
        z = r if self.projection is None else self.projection(r)
        z = F.normalize(z) if self.unit else z
        logits = None if self.classifier is None else self.classifier(r.detach() if self.detach else r)
        return z, logits


def encode(encoder, x, autocast):
    """r = Enc(x) in x's type, its inside in the type `autocast` if that is not None."""
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        return encoder(x).to(x.dtype)


def encode_images(encoder, images, mean, std, autocast):
    """r of images (n, 3, H, H), uint8 or float in [0, 1], on the device of mean and std."""
    x = images.to(mean.device)
    x = normalize(x if x.is_floating_point() else x.float() / 255, mean, std)
    return encode(encoder, x.to(memory_format=torch.channels_last), autocast)


def bfloat16_is_fast(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


# ---------------------------------------------------------------- the losses by name


def contrastive_loss(config, z, y, images, queue):
    """The loss `config.loss` of the global batch, from this rank's z (V n_r, D) and labels y (V n_r,), or class
    probabilities (V n_r, C), view by view.

    images (n_r,) numbers the images of the global batch; queue (features, labels) or None joins the contrasts.
    """
    V = config.views
    if config.loss in ("supcon", "supcon-in"):
        return losses.supcon_sharded(z, y, config.tau, queue=queue, variant="in" if config.loss == "supcon-in" else "out")
    if config.loss == "simclr":  # NT-Xent: an image is its own class
        return losses.supcon_sharded(z, images.repeat(V), config.tau, queue=queue)
    z, y = gather_views(z, V), gather_views(y, V)  # these look at all rows on every rank
    if config.loss == "triplet":
        return losses.triplet(z, y, 0.2 if config.margin is None else config.margin, mining=config.mining)
    if config.loss == "max-margin":
        return losses.max_margin(z, y, 1.0 if config.margin is None else config.margin)
    return grouped_n_pair(z[0::2], z[1::2], config.num_classes) + config.npair_l2 * z.square().sum(1).mean()


def grouped_n_pair(anchor, positive, num_classes):
    """Sohn's N-pair loss takes one pair of each class: so do the groups that shuffled_pairs lines up."""
    groups = zip(anchor.split(num_classes), positive.split(num_classes))
    return torch.cat([losses.n_pair(a, p, reduction="none") for a, p in groups]).mean()


def total_loss(config, z, logits, y, images, queue=None):
    """loss-scale * contrastive, or cross-entropy, or (1 - w) of the one and w of the other (Gunel et al. 2021)."""
    if config.loss == "ce":
        return cross_entropy(logits, y, config.label_smoothing)
    loss = config.loss_scale * contrastive_loss(config, z, y, images, queue)
    if logits is None:
        return loss
    return (1 - config.ce_weight) * loss + config.ce_weight * cross_entropy(logits, y, config.label_smoothing)


def cross_entropy(logits, y, smoothing=0.0):
    """The mean over the rows of all ranks; y (N,) labels or (N, C) class probabilities."""
    y = y.to(logits.dtype) if y.ndim == 2 else y
    values = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
    return losses.global_mean(values, torch.ones_like(values, dtype=torch.bool))


def collapse_and_floor(config, labels):
    """(loss for collapsed features, lower bound); (None, None) where the loss has no such mark to watch.

    All features alike give log|A(i)| = log(N - 1); L_out >= L_in >= log|P(i)|, the mean over the classes' shares.
    """
    rows = config.batch * config.views
    if config.ce_weight or config.mix or config.queue or config.loss not in ("supcon", "supcon-in", "simclr"):
        return None, None
    share = torch.bincount(labels).double() / len(labels)
    share = (share > 0).double() / (share > 0).sum() if config.balanced else share
    positives = config.views - 1 if config.loss == "simclr" else rows * share - 1
    floor = share @ torch.as_tensor(positives).double().clamp(min=1).log().expand_as(share)
    return config.loss_scale * math.log(rows - 1), config.loss_scale * floor.item()


# ---------------------------------------------------------------- device, ranks, gathering


def choose_device(name):
    """The torch device of that name; under torchrun the GPU of this rank. Raises Refused where it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        x = torch.zeros(1, device=name)
        x.item()  # "meta" has no values
        return x.device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise Refused(f"--device {name} cannot be used here: leave it out, or try --device cpu") from e


def setup_ranks(device):
    """(rank, world, device). torchrun's environment makes a process group; without it there is none."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, device
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:  # ranks wait for one that downloads or reads, for longer than the usual minutes; torchrun notices one that is gone
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    except (ValueError, RuntimeError) as e:
        raise Refused("LOCAL_RANK is set, but torchrun's other variables make no process group: start with torchrun, or unset it") from e
    return dist.get_rank(), dist.get_world_size(), device


def anywhere(*flags):
    """Which of the flags hold on any rank. On the CPU: no rank waits for its GPU to say so."""
    if not dist.is_initialized():
        return flags
    held = torch.tensor([bool(flag) for flag in flags], dtype=torch.int32)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return held.bool().tolist()


def gather_views(rows, views):
    """The ranks' rows (V n_r, ...), view by view, as the global batch (V n, ...), view by view."""
    by_image = rows.unflatten(0, (views, -1)).transpose(0, 1)  # (n_r, V, ...)
    return losses.all_gather_rows(by_image).transpose(0, 1).flatten(0, 1)


# ---------------------------------------------------------------- what a representation is worth, at a glance


@torch.no_grad()
def features(encoder, images, mean, std, autocast=None, batch=500):
    """r = Enc(x), (n, width), of un-augmented images, in evaluation mode."""
    was_training = encoder.training
    encoder.eval()
    parts = [encode_images(encoder, part, mean, std, autocast) for part in images.split(batch)]
    encoder.train(was_training)
    return torch.cat(parts)


# ---------------------------------------------------------------- training


def load_on_every_rank(config):
    """(training set, test set or None); on each machine one rank loads, and downloads, before the others."""
    loaded, trouble = [], None
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for turn in (True, False):
        if turn == first:
            trouble = refusal_of(lambda: loaded.append(load(config, config.download and first)))
        if anywhere(trouble)[0]:  # here the other ranks wait
            raise trouble or SystemExit(2)
    return loaded[0]


def load(config, download):
    """(training set, test set or None) as the options want them; the test set on rank 0 alone, which takes the k-NN accuracy."""
    source, test = {"size": config.size, "download": download, "stream": config.stream}, None
    data = load_data(config.dataset, config.data, True, limit=config.limit, **source)
    if is_first():
        with contextlib.suppress(Missing):
            test = load_data(config.dataset, config.data, False, **source)
    if test is not None:
        require_same_classes(data, test, config.data)
    if config.subset < 1:
        data = take(data, stratified(data.labels, config.subset, generator(config.seed, 4)))
    if config.label_noise:
        noisy = with_label_noise(data.labels, config.label_noise, len(data.classes), generator(config.seed, 5))
        config.noisy_labels = int((noisy != data.labels).sum())
        data = data._replace(labels=noisy)
    return data, test


def build_model(config, autocast):
    torch.manual_seed(config.seed)
    encoder, width = build_encoder(config.arch, config.stem)
    projection = classifier = None
    if config.loss != "ce":
        projection = build_projection(width, config.proj_hidden or width, config.proj_depth, config.proj_dim)
    if config.loss == "ce" or config.ce_weight:
        classifier = nn.Linear(width, config.num_classes)
    unit = config.loss != "n-pair"
    return Model(encoder, projection, classifier, unit=unit, unit_r=config.normalize_encoder, detach=config.ce_detach, autocast=autocast)


class Queue:
    """z and labels of the latest `size` views as a momentum encoder saw them: contrasts beside the batch's own.

    He et al. 2020; with labels, the memory of Khosla et al. 2020, section 4. The momentum encoder follows the model before
    every step: its weights are a running mean of the model's. Every rank holds the same queue.
    """

    def __init__(self, model, size, momentum):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.size, self.momentum, self.z, self.y = size, momentum, None, None

    @torch.no_grad()
    def follow(self, model):
        for mine, theirs in zip(self.model.parameters(), model.parameters()):
            mine.lerp_(theirs, 1 - self.momentum)

    @torch.no_grad()
    def encode(self, views):
        with still_statistics(self.model):
            return self.model(views)[0]

    def add(self, z, y):
        """The views of all ranks, (V n, D) and (V n,)."""
        self.z = z[-self.size :] if self.z is None else torch.cat([self.z, z])[-self.size :]
        self.y = y[-self.size :] if self.y is None else torch.cat([self.y, y])[-self.size :]

    def contrasts(self):
        return None if self.z is None else (self.z, self.y)

    def state_dict(self):
        return {"model": self.model.state_dict(), "z": self.z, "y": self.y}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        device = next(self.model.parameters()).device
        self.z, self.y = (None if v is None else v.to(device) for v in (state["z"], state["y"]))


def train(config, resume=None):
    """Trains as the options in `config` say and returns the last epoch's log entry.

    resume: the contents of a checkpoint to go on from. Every rank of a torchrun calls this with the same arguments.
    """
    rank, world, device = setup_ranks(torch.device(config.device))
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, config.precision != "float32"
    try:
        entry, trouble = train_on_rank(config, resume, rank, world, device)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    if world > 1:  # gloo aborts at exit unless the ranks meet after DistributedDataParallel, which holds itself, is gone
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
    if trouble:
        raise trouble
    return entry


def train_on_rank(config, resume, rank, world, device):
    """(last log entry, None), or (None, what the user is to be told) where the ranks agreed to end."""
    complete_options(config, world)
    run, share, V = Path(config.run), config.batch // world, config.views
    refuse_unusable(run, resuming=resume is not None)
    data, test = load_on_every_rank(config)
    complete_from_data(config, data)
    if resume:
        require_same_data(config, data, resume)
    mine = slice(rank * share, (rank + 1) * share)  # of the global batch
    size = config.micro_batch or share
    parts = [slice(i, i + size) for i in range(mine.start, mine.stop, size)]
    steps_per_epoch = len(data.labels) // config.batch
    total = config.epochs * steps_per_epoch

    fast = config.precision == "bfloat16" or (config.precision == "auto" and bfloat16_is_fast(device))
    autocast = torch.bfloat16 if fast else None
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    model = build_model(config, autocast).to(device, dtype, memory_format=torch.channels_last)
    if config.sync_bn and world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    queue = Queue(model, config.queue, config.momentum_encoder) if config.queue else None
    optimizer = make_optimizer(config, [{"params": model.parameters(), "weight_decay": config.weight_decay}], config.lr)
    mean, std = (v.to(device, dtype) for v in mean_and_std(config.dataset, data.images))
    step = 0
    if resume:
        step = resume["step"]
        restore(model, optimizer, queue, resume, run)
        if step > total:
            raise Refused(f"--epochs {config.epochs} ends before step {step}, where the run stands: raise --epochs")
    if config.compile:
        model.encoder.compile()
    parallel = DistributedDataParallel(model) if world > 1 else model

    def contents(losses_of_epoch, seconds):
        return checkpoint_of(config, model, optimizer, queue, step, seconds, losses_of_epoch, mean, std, data)

    collapse, floor = collapse_and_floor(config, data.labels)
    journal = Journal(config, contents, resume, steps_per_epoch, collapse) if rank == 0 else None
    trouble = refusal_of(journal.open, run, describe_run(config, world)) if journal else None
    if anywhere(trouble)[0]:
        return None, trouble or SystemExit(2)
    announce(config, data, test, model, autocast, collapse, floor, world)
    if resume:
        say(f"going on from step {step} of {total} at a learning rate of {learning_rate(config, step, steps_per_epoch):.4g}")

    refused, stop = None, False
    source = batches(config, data, parts, mean, std, range(step, total), steps_per_epoch)
    with signals_noted() as asked:
        while step < total:
            try:
                views_of = next(source)
            except Refused as e:  # an image that cannot be read: the steps until here are good
                refused = e
            stop, failed = anywhere(asked, refused or trouble)
            if stop or failed:
                break

            def loss_of(z, logits, y):
                images = torch.arange(mine.start, mine.stop, device=device)
                return total_loss(config, z, logits, y, images, queue and queue.contrasts())

            lr = learning_rate(config, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            if len(parts) == 1:
                x, y = views_of(mine)
                z, logits = parallel(x)
                loss = loss_of(z, logits, y)
                loss.backward()
            else:
                loss, z = cached_gradients(model, parallel, parts, views_of, loss_of, V)
            if queue:
                enqueue(config, queue, model, [(x, y)] if len(parts) == 1 else map(views_of, parts))
            optimizer.step()
            step += 1
            z = gather_views(z.detach(), V) if step % steps_per_epoch == 0 else None
            if journal:
                trouble = refusal_of(journal.note, step, loss.detach(), lr, lambda: diagnose(model, z, V, data, test, mean, std))
    if journal and not trouble:
        trouble = refusal_of(journal.close, step)
    trouble = trouble or refused
    if anywhere(trouble)[0]:
        return None, trouble or SystemExit(2)
    if stop:
        say(f"stopped after step {step} of {total}; this goes on:\n{resume_command(run)}")
    else:
        say(f"done: python linear_probe.py {run}/ckpt.pt")
    return journal and journal.entry, None


def restore(model, optimizer, queue, contents, run):
    """The state of a checkpoint."""
    if queue:
        load_state(queue, contents.get("queue"), run)
    for name, module in model.named_children():  # encoder, projection, classifier
        load_state(module, contents.get(name), run)
    load_state(optimizer, contents["optimizer"], run)


def batches(config, data, parts, mean, std, steps, steps_per_epoch):
    """Of each step a function of a part of the global batch: to its views (V m, 3, H, W) and their labels (V m,) or (V m, C)."""
    in_workers, device, V = config.stream or config.augment in POLICIES, mean.device, config.views
    images, labels, order = None if in_workers else data.images.to(device), data.labels.to(device), None
    ordered = shuffled_pairs if config.loss == "n-pair" else shuffled_balanced if config.balanced else shuffled
    for step in steps:
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or order is None:
            order = ordered(data.labels, generator(config.seed, 0, epoch))
            if in_workers:
                items = worker_items(config, order, epoch, range(position, steps_per_epoch), parts)
                ready = worker_batches(WorkerViews(data, config.augment, config.crop_min), items, config.workers)
        rows = order[position * config.batch : (position + 1) * config.batch].to(device)
        keys = [(config.seed, 1, epoch, position, v) for v in range(V)]
        strength = {"crop": not in_workers, "crop_min": config.crop_min, "jitter": config.jitter}
        draws = [draw_view(config.batch, config.size, config.augment, generator(*key), **strength) for key in keys]
        if in_workers:
            cropped = {part.start: [next(ready).to(device) for v in range(V)] for part in parts}

        def views_of(part):
            pixels = cropped[part.start] if in_workers else [images[rows[part]]] * V
            made = [make_view(x, part_of(draw, part, device), mean, std) for x, draw in zip(pixels, draws)]
            y = [labels[rows[part]]] * V
            if config.mix:
                keys = [(config.seed, 3, epoch, position, v, part.start) for v in range(V)]
                how = config.num_classes, config.mix, config.mix_alpha
                made, y = zip(*(mixed(x, t, *how, generator(*key)) for x, t, key in zip(made, y, keys)))
            return torch.cat(made).contiguous(memory_format=torch.channels_last), torch.cat(y)

        yield views_of


def worker_items(config, order, epoch, steps, parts):
    """The items of WorkerViews for each step, part and view: (row, seed, ..., place in the global batch)."""
    for step in steps:
        rows = order[step * config.batch : (step + 1) * config.batch].tolist()
        for part in parts:
            for v in range(config.views):
                yield [(rows[i], config.seed, 2, epoch, step, v, i) for i in range(part.start, part.stop)]


def part_of(view, part, device):
    """A part of the global batch's view parameters."""
    return ViewParameters(*(p[part].to(device) for p in view[:-1]), view.order)


def cut(rows, views, parts):
    """Rows (V n_r, ...), view by view, as the parts (V m, ...), view by view, that they are joined from."""
    return [part.flatten(0, 1) for part in rows.unflatten(0, (views, -1)).split(parts[0].stop - parts[0].start, 1)]


def join(rows, views):
    return torch.cat([part.unflatten(0, (views, -1)) for part in rows], 1).flatten(0, 1)


def cached_gradients(model, parallel, parts, views_of, loss_of, views):
    """(loss, z) of a batch that does not fit into memory at once, with the gradients of its parameters.

    Gradient caching (Gao et al. 2021): encode all parts without a graph; take the loss and dL/dz on all rows; encode
    each part again, with a graph, and push its dL/dz through. Batch norm sees a part at a time.
    """
    encoded, labels = [], []
    with torch.no_grad(), still_statistics(model):
        for part in parts:
            x, y = views_of(part)
            encoded.append(model(x))
            labels.append(y)
    z, logits = zip(*encoded)
    outputs = [join(rows, views).requires_grad_() for rows in (z, logits) if rows[0] is not None]
    loss = loss_of(outputs[0], outputs[1] if len(outputs) > 1 else None, join(labels, views))
    grads = [grad if grad is None else cut(grad, views, parts) for grad in torch.autograd.grad(loss, outputs, allow_unused=True)]
    for k, part in enumerate(parts):
        with contextlib.nullcontext() if part is parts[-1] or parallel is model else parallel.no_sync():
            again = [(rows, grad[k]) for rows, grad in zip(parallel(views_of(part)[0]), grads) if grad is not None]
            torch.autograd.backward(*zip(*again))
    return loss.detach(), outputs[0].detach()


def enqueue(config, queue, model, batches):
    """The batch joins the queue, as the momentum encoder sees it; for NT-Xent under no label, so that it is nobody's positive."""
    queue.follow(model)
    seen = [(queue.encode(x), y) for x, y in batches]
    z, y = (gather_views(join(rows, config.views), config.views) for rows in zip(*seen))
    queue.add(z, torch.full_like(y, -1) if config.loss == "simclr" else y)


@contextlib.contextmanager
def still_statistics(model):
    """Batch norm's running statistics stay as they are: of two passes over a batch only one may move them."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def diagnose(model, z, views, data, test, mean, std):
    """k-NN top-1 on a part of the test set, alignment and uniformity of the last batch; under 5 % of an epoch.

    Encoding without a gradient costs a third of a training step, so a tenth of the images cost about 2 %.
    """
    start, found = time.perf_counter(), {}
    z = F.normalize(z.detach()).unflatten(0, (views, -1))[:, :512].flatten(0, 1)
    if views > 1:
        found["alignment"] = losses.alignment(z, views=views).item()
    found["uniformity"] = losses.uniformity(z).item()
    if test is not None:
        n = len(data.labels)
        bank = max(1, min(views * n // 20, 10_000, len(data.images)))
        query = max(1, min(views * n // 50, 2_500, len(test.images)))
        r = features(model.encoder, torch.cat([data.images[:bank], test.images[:query]]), mean, std, model.autocast)
        found["knn_top1"] = knn_top1(r[:bank], data.labels[:bank].to(r.device), r[bank:], test.labels[:query].to(r.device))
    found["diagnosis_seconds"] = round(time.perf_counter() - start, 2)
    return found


def resume_command(run):
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    start = f"torchrun --nproc_per_node={ranks}" if ranks else "python"
    return f"{start} {shlex.quote(os.path.relpath(__file__))} --resume {shlex.quote(str(run))}"


def announce(config, data, test, model, autocast, collapse, floor, world):
    n, weights = len(data.labels), sum(p.numel() for p in model.encoder.parameters())
    say(f"{config.dataset}: {n} images of {data.images.shape[-1]} x {data.images.shape[-1]}, {len(data.classes)} classes; "
        f"{config.arch}, {config.stem} stem, {weights / 1e6:.2f} M weights, {config.device} x {world}, "
        f"{'bfloat16 autocast' if autocast else 'no autocast'}")
    tau = "" if config.tau is None else f", tau {config.tau}, loss scale {config.loss_scale:.4f}"
    say(f"{config.loss}{tau}; batch {config.batch} x {config.views} views, {config.epochs} epochs, lr {config.lr:.4g} "
        f"after {config.warmup:g} epochs of warm-up; {config.run}")
    if test is None:
        say(f"no test set in {config.data}: no k-NN accuracy after the epochs")
    if collapse:
        say(f"the loss is {collapse:.4f} when all features collapse to one; its floor is about {floor:.4f}")


# ---------------------------------------------------------------- the command line


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@pretraining_options
@click.pass_context
def main(context, runs, figure, resume, **options):
    """Contrastive pretraining: an encoder and a projection head, one loss, one loop."""
    if figure:
        return click.echo(learning_curves([Path(run) for run in runs]))
    if runs:
        raise Refused(f"{runs[0]}: only --figure takes run folders; options begin with --")
    if options["recipe"] == "list":
        return click.echo("\n".join(line for name in PRESETS for line in describe(name)))
    config, contents = read(context, resume, options)
    config.device = str(choose_device(config.device))
    return train(config, contents)


if __name__ == "__main__":
    run_command(main)
