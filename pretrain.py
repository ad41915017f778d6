"""Stage 1: contrastive pretraining. x -> r = Enc(x) -> z = Proj(r) -> loss (Khosla et al. 2020, section 3.1).

    python pretrain.py --dataset shapes --augment crop --lr 0.1                 # minutes on two CPU cores, no download
    python pretrain.py --dataset cifar10 --batch 1024                           # the reference code's CIFAR-10 recipe
    torchrun --nproc_per_node=8 pretrain.py --dataset cifar10 --batch 1024      # the same batch on eight GPUs
    python pretrain.py --resume runs/cifar10-resnet50-supcon-s0                 # go on where a run stopped
    python pretrain.py --dataset cifar10 --batch 1024 --resume auto             # start it, or go on (docs/clusters.md)
    python linear_probe.py runs/cifar10-resnet50-supcon-s0                      # stage 2
    python pretrain.py --recipe list                                            # the papers' settings, each one word

A run folder holds config.json, log.jsonl and checkpoints (common/run_folder.py). `--batch` is the number of images over
all ranks. Order and views depend on (seed, epoch, place in the global batch) alone: not on the number of ranks, and not
on whether the run was interrupted. SIGTERM and Ctrl-C save a checkpoint and end the run, with status 143 or 130.
SIGUSR1 and SIGUSR2 save one, and the run goes on. docs/weights.md says how to take the encoder alone.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import losses
from common.cli import ENDING, SAVING, Asked, Refused, Stopped, run_command, say, signals_noted
from common.config import GroupedCommand, complete, config_options, fit_to_data, read, require_same_data
from common.data import describe_data, load_on_every_rank, mean_and_std
from common.initial import start_from
from common.journal import open_journal
from common.metrics import knn_top1
from common.models import Queue, build_model, features, load_state, still_statistics, type_of_autocast
from common.objectives import OBJECTIVES, total_loss
from common.optim import learning_rate, make_optimizer, set_learning_rate
from common.presets import PRESETS, describe
from common.ranks import Ranks, choose_device, fast_convolutions, gather_views
from common.run_folder import FORMAT, is_finished, refuse_unusable
from common.views import make_batches

# ---------------------------------------------------------------- the loop


def train(config, ranks, resumed=None):
    """Trains as the Config says and returns the log entry of the last epoch, on rank 0.

    resumed: the contents of a checkpoint to go on from. Every rank calls this with the same arguments. Rank 0 alone
    reads and writes the run's folder, so that no other node needs it.
    """
    asked = Asked()
    with fast_convolutions(config.precision != "float32"), signals_noted(asked, SAVING):
        with ranks.refusing_together():
            complete(config, ranks.world)
            if ranks.rank == 0:
                refuse_unusable(Path(config.run), resuming=resumed is not None)
        data, test = load_on_every_rank(config, ranks)
        with ranks.refusing_together():
            about = describe_data(data, config.data)
            if resumed:
                require_same_data(config, about, resumed)
            fit_to_data(config, data)
            run = Run(config, data, about, ranks, resumed)
        with ranks.refusing_together():
            journal = open_journal(run, data, test, ranks, resumed)
        run.distribute(ranks)
        with signals_noted(asked, ENDING):
            train_steps(run, data, test, ranks, journal, asked)
        with ranks.refusing_together():
            if journal:
                journal.close(run)
        say_how_it_ended(run)
        if run.step < run.total_steps:
            raise Stopped(asked.end or signal.SIGTERM)  # the signal may have come to another rank
        return journal and journal.entry


def train_steps(run, data, test, ranks, journal, asked):
    """Takes steps until the last one, or until a rank is asked to stop or refuses something."""
    config = run.config
    batches = make_batches(config, data, ranks, run.mean, run.std, run.step)
    while run.step < run.total_steps:
        with ranks.hold_refusals():
            batch = next(batches)
        end, save = ranks.largest(bool(asked.end or ranks.refusal), asked.save)
        if end:
            break
        if save:
            asked.save = False  # a signal that comes from now on asks again
        if config.freeze_epochs:
            run.model.freeze(run.step < config.freeze_epochs * run.steps_per_epoch)
        lr = set_learning_rate(run.optimizer, learning_rate(config, run.step, run.steps_per_epoch))
        run.optimizer.zero_grad()
        loss, z = interruptible_step(run, batch, asked)
        skipped = run.descend()
        diagnosed = is_diagnosed(run, ranks.world)
        if diagnosed:
            z = gather_views(z, config.views)  # for the diagnosis, which is rank 0's
        if journal:
            with ranks.hold_refusals(), journal.writing():
                journal.note_step(run, loss, lr)
                if skipped:
                    journal.note_skipped(run)
                if run.ends_epoch:
                    journal.note_epoch(run, diagnose(run, z, data, test) if diagnosed else {})
                journal.save_now_and_then(run, save)


def interruptible_step(run, batch, asked):
    """As training_step. A signal that ends the compiler's processes, and was meant for the run, is no error."""
    try:
        return training_step(run, batch)
    except Exception as e:
        if not (asked.end and run.config.compile):
            raise
        say(f"stopped while step {run.step + 1} was compiled; this goes on:\n{resume_command(run.config.run)}")
        raise Stopped(asked.end) from e


def training_step(run, batch):
    """Puts the gradient of the global batch's loss into the parameters. Returns (loss, z of this rank's views)."""
    config = run.config
    parts = batch.parts(config.micro_batch or len(batch))
    if len(parts) > 1:
        return cached_gradients(run, batch, parts)
    x, y = batch.views()
    z, logits = run.parallel(x)  # (V n_r, D)
    loss = total_loss(config, z, logits, y, batch.index, run.contrasts())
    run.scaler.scale(loss).backward()
    enqueue(run, [(x, y)])
    return loss.detach(), z.detach()


# ---------------------------------------------------------------- batches larger than memory


def cached_gradients(run, batch, parts):
    """As training_step, for a batch that is encoded in parts: gradient caching (Gao et al. 2021).

    1. Encode the parts without a graph. 2. Take the loss of all rows, and its gradient with respect to them. 3. Encode
    the parts again, with a graph, and push each one's gradient through. Batch norm sees a part at a time.
    """
    config = run.config
    views = run.config.views
    encoded, y = encode_without_graph(run, parts)
    z, *logits = outputs = [join_parts(rows, views).requires_grad_() for rows in encoded]
    loss = total_loss(config, z, logits[0] if logits else None, y, batch.index, run.contrasts())
    gradients = torch.autograd.grad(run.scaler.scale(loss), outputs, allow_unused=True)
    encode_with_graph(run, parts, [None if g is None else cut_into_parts(g, views, len(parts[0])) for g in gradients])
    enqueue(run, (part.views() for part in parts))
    return loss.detach(), z.detach()


@torch.no_grad()
def encode_without_graph(run, parts):
    """([z of the parts] and, with a classifier, [logits of the parts]; y of all parts)."""
    encoded, labels = [], []
    with still_statistics(run.model):
        for part in parts:
            x, y = part.views()
            encoded.append([rows for rows in run.model(x) if rows is not None])
            labels.append(y)
    return list(zip(*encoded)), join_parts(labels, run.config.views)


def encode_with_graph(run, parts, gradients):
    """Encodes each part and pushes its gradients through; gradients[o][k] belongs to output o of part k."""
    for k, part in enumerate(parts):
        with run.without_reduction() if k < len(parts) - 1 else contextlib.nullcontext():
            x, _ = part.views()
            outputs = [rows for rows in run.parallel(x) if rows is not None]
            used = [(rows, g[k]) for rows, g in zip(outputs, gradients) if g is not None]
            torch.autograd.backward(*zip(*used))


def join_parts(parts, views):
    """The parts' rows (V m, ...), view by view, as the rows of all images (V n_r, ...), view by view."""
    return torch.cat([part.unflatten(0, (views, -1)) for part in parts], 1).flatten(0, 1)


def cut_into_parts(rows, views, size):
    """The rows of all images (V n_r, ...), view by view, as parts of `size` images: the inverse of join_parts."""
    return [part.flatten(0, 1) for part in rows.unflatten(0, (views, -1)).split(size, 1)]


def enqueue(run, parts):
    """Adds the batch to the queue, if there is one, as the momentum encoder sees it. parts: (x, y) of each part."""
    if not run.queue:
        return
    run.queue.follow(run.model)
    views = run.config.views
    z, y = zip(*[(run.queue.encode(x), y) for x, y in parts])
    z, y = gather_views(join_parts(z, views), views), gather_views(join_parts(y, views), views)
    if not OBJECTIVES[run.config.loss].labels:  # then nothing in the queue is anybody's positive
        y = torch.full_like(y, -1)
    run.queue.add(z, y)


# ---------------------------------------------------------------- what trains


class Run:
    """The model, the optimizer and the queue, and the step at which they are."""

    def __init__(self, config, data, about, ranks, resumed=None):
        """about: what describe_data says of the data. resumed: the contents of a checkpoint, whose state this run takes
        over."""
        self.config = config
        self.device = ranks.device
        self.step = 0
        self.about_data = about
        self.steps_per_epoch = len(data.labels) // config.batch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.autocast = type_of_autocast(config.precision, ranks.device)
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        model = build_model(config, self.autocast)
        if resumed:
            statistics = resumed["mean"], resumed["std"]
        else:
            statistics = start_from(model.encoder, config) if config.init else mean_and_std(config.dataset, data.images)
        self.mean, self.std = (v.to(ranks.device, dtype) for v in statistics)
        model.to(ranks.device, dtype, memory_format=torch.channels_last)
        if config.sync_bn and ranks.world > 1 and ranks.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model
        self.queue = Queue(model, config.queue, config.momentum_encoder) if config.queue else None
        parameters = {"params": model.parameters(), "weight_decay": config.weight_decay}
        self.optimizer = make_optimizer(config, [parameters], config.lr)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "float16")
        if resumed:
            self.restore(resumed)
        self.optimizer.register_step_post_hook(self.note_taken)
        if config.compile:
            model.encoder.compile()
        self.parallel = model  # see `distribute`

    def distribute(self, ranks):
        """From now on the ranks add up their gradients. They all have to call this."""
        if ranks.world > 1:
            # A frozen encoder gets no gradient for a while. Looking for such parameters also keeps the order in which
            # gradients travel. Otherwise it changes after the first step, and from three numbers on the order decides
            # the last bits of a sum, so that a resumed run would part from one that never stopped.
            look = self.config.freeze_epochs > 0 or ranks.device.type == "cpu" and ranks.world > 2
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=look)

    @property
    def ends_epoch(self):
        return self.step % self.steps_per_epoch == 0

    def descend(self):
        """Takes a step of the optimizer. Returns whether the scaler has skipped it.

        The scaler skips a step whose gradients overflow in float16, and halves the factor that it multiplies them by.
        """
        self.was_taken = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return not self.was_taken

    def note_taken(self, *optimizer_and_arguments):
        self.was_taken = True

    def contrasts(self):
        return self.queue.contrasts() if self.queue else None

    def without_reduction(self):
        """A context in which a backward pass leaves the ranks' gradients apart."""
        return contextlib.nullcontext() if self.parallel is self.model else self.parallel.no_sync()

    def checkpoint(self, losses_of_epoch, seconds):
        """What a checkpoint holds: plain tensors and types."""
        parts = dict(self.model.named_children()) | ({"queue": self.queue} if self.queue else {})
        return {name: part.state_dict() for name, part in parts.items()} | {  # encoder, projection, classifier, queue
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "seconds": seconds,
            "losses_of_epoch": losses_of_epoch,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),  # empty but in float16
            "mean": self.mean.cpu().float(),
            "std": self.std.cpu().float(),
        } | self.about_data

    def restore(self, contents):
        """Takes over the state of a checkpoint. Raises Refused where it is not one of such a run."""
        path = self.config.run
        for name, module in self.model.named_children():
            load_state(module, contents.get(name), path)
        if self.queue:
            load_state(self.queue, contents.get("queue"), path)
        load_state(self.optimizer, contents["optimizer"], path)
        if self.scaler.is_enabled():
            load_state(self.scaler, contents.get("scaler"), path)
        self.step = contents["step"]
        if self.step > self.total_steps:
            raise Refused(f"--epochs {self.config.epochs} ends before step {self.step}, where the run stands: "
                          "raise --epochs")


# ---------------------------------------------------------------- what is said and measured beside


def is_diagnosed(run, world):
    """Whether this step ends an epoch to be diagnosed. With W ranks these are every W-th epoch and the last one.

    The other ranks wait for rank 0 while it diagnoses, and its share of an epoch's training is a W-th. No clock
    decides, so all ranks agree, and a run that goes on to the same last epoch has the log of one that never stopped.
    """
    return run.ends_epoch and (run.step // run.steps_per_epoch % world == 0 or run.step == run.total_steps)


def diagnose(run, z, data, test):
    """What a representation is worth at a glance: the entries of a dict, in under 2 % of an epoch's time on one rank.

    It holds the k-NN top-1 on a part of the test set, and alignment and uniformity of the first 512 images of the last
    batch, whose z (V n, D) is that of all ranks. Encoding without a gradient costs a third of a training step, so a
    twentieth of the views of an epoch costs 1.7 %.
    """
    start = time.perf_counter()
    found = {}
    views = run.config.views
    z = F.normalize(z).unflatten(0, (views, -1))[:, :512].flatten(0, 1)
    if views > 1:
        found["alignment"] = losses.alignment(z, views=views).item()
    found["uniformity"] = losses.uniformity(z).item()
    if test is not None:
        n = views * len(data.labels)
        bank = max(1, min(n // 30, 10_000, len(data.images)))
        query = max(1, min(n // 60, 2_500, len(test.images)))
        images = torch.cat([data.images[:bank], test.images[:query]])
        r = features(run.model.encoder, images, run.mean, run.std, run.autocast)
        y_bank, y_query = data.labels[:bank].to(r.device), test.labels[:query].to(r.device)
        found["knn_top1"] = knn_top1(r[:bank], y_bank, r[bank:], y_query)
    found["diagnosis_seconds"] = round(time.perf_counter() - start, 2)
    return found


def say_how_it_ended(run):
    if run.step < run.total_steps:
        say(f"stopped after step {run.step} of {run.total_steps}; this goes on:\n{resume_command(run.config.run)}")
    else:
        say(f"done: {probe_command(run.config.run)}")


def probe_command(run):
    return shlex.join(["python", "linear_probe.py", f"{run}/ckpt.pt"])


def resume_command(run):
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    several = f"--nnodes={nodes} " if nodes > 1 else ""
    start = f"torchrun {several}--nproc_per_node={ranks}" if ranks else "python"
    return f"{start} {shlex.quote(os.path.relpath(__file__))} --resume {shlex.quote(str(run))}"


# ---------------------------------------------------------------- the command line


@click.command(cls=GroupedCommand, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@config_options
@click.option("--resume", metavar="RUN", help="Go on with the run in this folder; --epochs may extend it. "
              "auto: go on with the run in --run-dir if there is one, else start it.")
@click.pass_context
def main(context, resume, **options):
    """Contrastive pretraining: an encoder and a projection head, one loss, one loop."""
    if options["recipe"] == "list":
        return click.echo("\n".join(line for name in PRESETS for line in describe(name)))
    with Ranks() as ranks:
        config, contents = read_on_first(context, resume, options, ranks)
        moved = contents and any(contents["config"].get(name) != getattr(config, name) for name in ("data", "labels"))
        if resume == "auto" and contents and is_finished(contents, config.epochs) and not moved:
            return say(f"{config.run} is finished: {probe_command(config.run)}")
        return train(config, ranks, contents)


def read_on_first(context, resume, options, ranks):
    """(Config, contents of the checkpoint to go on from, or None), as rank 0 reads them. Sets this rank's device."""
    found = None
    with ranks.refusing_together():
        if ranks.rank == 0:
            found = read(context, resume, options)
    config, contents = ranks.from_first(found)
    with ranks.refusing_together():
        ranks.use(choose_device(config.device))
    return config, contents


if __name__ == "__main__":
    run_command(main)
