"""The command line of pretrain.py: every option with its default, what goes together, what a preset sets.

`read` makes a run's options of what is given, a preset and a checkpoint to go on from; complete_options and complete_from_data
fill in the defaults that depend on the rest, and refuse what cannot work, in one line each. run_command, at the end, is how
every script of the project ends.
"""

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import torch
from click.core import ParameterSource

from images import DATASETS, POLICIES, SMALL, Refused
from recipes import LOSSES, PRESETS, describe
from run_folder import newest_checkpoint, say

# ---------------------------------------------------------------- every option


class Finite(click.FloatRange):
    """A number that float32 holds with room to spare: optimisers multiply it by others."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        return number if abs(number) <= 1e30 else self.fail(f"{value} is not a finite number up to 1e30.", param, ctx)


POSITIVE, NOT_NEGATIVE = Finite(min=0, min_open=True), Finite(min=0)
COUNT = click.IntRange(1, 2**31 - 1)
ARCHS = ("small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet200")

OPTIONS = [
    click.argument("runs", nargs=-1, metavar=""),
    click.option("--recipe", type=click.Choice([*PRESETS, "list"]), help="A published setting, number by number; other options override it. list prints all."),
    click.option("--figure", is_flag=True, help="Draw the learning curves of run folders as PNG instead: --figure RUN... (needs matplotlib)."),
    click.option("--dataset", type=click.Choice(DATASETS), default="shapes", help="shapes is generated, folder reads DATA/train/CLASS/*.jpg."),
    click.option("--data", default="data", help="Folder of the data sets."),
    click.option("--download/--no-download", default=True, help="Fetch what is missing."),
    click.option("--size", type=click.IntRange(8, 8192), show_default="the data set's own; 32 for folder and shapes", help="Image side in pixels."),
    click.option("--limit", type=COUNT, help="Train on the first N images (a folder is shuffled, by a fixed seed)."),
    click.option("--subset", type=Finite(0, 1, min_open=True), default=1.0, help="Train on this part of every class."),
    click.option("--label-noise", type=Finite(0, 1), default=0.0, help="Part of the labels that are exchanged for another (symmetric)."),
    click.option("--balanced", is_flag=True, help="Batches with equally many images of every class; small classes recur."),
    click.option("--augment", type=click.Choice(["sim", "crop", "none", *POLICIES]), default="sim", help="sim: crop, flip, colours, blur; crop: crop and flip; AutoAugment, RandAugment, and that with sim's colours."),
    click.option("--crop-min", type=Finite(0, 1, min_open=True), default=0.2, help="Least part of the area that a crop keeps."),
    click.option("--jitter", type=Finite(0, 2), default=0.5, help="Strength of sim's colours: 0.8, 0.8, 0.8, 0.2 times this."),
    click.option("--mix", type=click.Choice(["mixup", "cutmix"]), help="Mix neighbours of a part of the batch; SupCon then takes soft labels."),
    click.option("--mix-alpha", type=POSITIVE, default=1.0, help="Of the Beta distribution that mixing weights are drawn from."),
    click.option("--stream/--no-stream", default=False, help="Read a folder's files anew for every view: for folders larger than memory."),
    click.option("--workers", type=click.IntRange(0, 1024), default=2, help="Processes that read a streamed folder, and make the views of auto, rand, stacked-rand."),
    click.option("--views", type=COUNT, show_default="2; 1 for ce and n-pair", help="Views of each image."),
    click.option("--loss", type=click.Choice(list(LOSSES)), default="supcon", help="The training objective."),
    click.option("--tau", type=POSITIVE, show_default="0.1; 0.5 for simclr", help="Temperature."),
    click.option("--loss-scale", type=POSITIVE, show_default="tau/0.07 for supcon, supcon-in, simclr, as in the reference code; else 1", help="Factor of the contrastive loss."),
    click.option("--margin", type=NOT_NEGATIVE, show_default="0.2 for triplet, 1 for max-margin", help="Margin of triplet and max-margin."),
    click.option("--mining", type=click.Choice(["semihard", "hard", "all"]), default="semihard", help="Which triplets."),
    click.option("--npair-l2", type=NOT_NEGATIVE, default=0.02, help="Weight of the mean squared norm in n-pair."),
    click.option("--ce-weight", type=Finite(0, 1, max_open=True), default=0.0, help="w of (1 - w) contrastive + w cross-entropy, trained jointly."),
    click.option("--ce-detach", is_flag=True, help="Stop the classifier's gradient at the encoder."),
    click.option("--label-smoothing", type=Finite(0, 1, max_open=True), default=0.0, help="Of cross-entropy."),
    click.option("--queue", type=click.IntRange(0, 2**31 - 1), default=0, help="Contrasts kept from earlier batches, for supcon, supcon-in, simclr."),
    click.option("--momentum-encoder", type=Finite(0, 1), default=0.999, help="Momentum of the encoder that fills the queue."),
    click.option("--arch", type=click.Choice(ARCHS), show_default="small for shapes, else resnet50", help="Encoder; small has 0.34 M weights."),
    click.option("--stem", type=click.Choice(["3x3", "7x7"]), show_default="3x3 up to 64 pixels", help="First layers of a ResNet."),
    click.option("--normalize-encoder/--no-normalize-encoder", default=False, help="Bring r to norm 1 before the heads, as in the paper's text and its ImageNet code."),
    click.option("--proj-depth", type=click.IntRange(1, 4), default=2, help="Layers of the projection head."),
    click.option("--proj-hidden", type=COUNT, show_default="the encoder's", help="Width of its hidden layers."),
    click.option("--proj-dim", type=COUNT, default=128, help="Width of z."),
    click.option("--batch", type=click.IntRange(2, 2**31 - 1), show_default="64 for shapes, else 1024", help="Images in a step, over all ranks."),
    click.option("--micro-batch", type=COUNT, help="Images encoded at a time, on a rank; gradients as of the whole batch."),
    click.option("--epochs", type=COUNT, show_default="12 for shapes, else 1000", help="Passes over the data."),
    click.option("--lr", type=POSITIVE, show_default="0.5 per 1024 images; ce 0.8, n-pair 0.1", help="Peak learning rate, absolute."),
    click.option("--lr-per-256", type=POSITIVE, help="Peak learning rate per 256 images of the batch, instead of --lr."),
    click.option("--optimizer", type=click.Choice(["sgd", "lars", "rmsprop"]), default="sgd", help="LARS leaves vectors without decay and adaptation."),
    click.option("--schedule", type=click.Choice(["cosine", "step", "exponential", "constant"]), default="cosine", help="cosine to lr/1000; step: x0.1 at 70, 80, 90 %; exponential: x0.97 every half epoch."),
    click.option("--warmup", type=NOT_NEGATIVE, show_default="10, at most a tenth of --epochs", help="Epochs of linear warm-up."),
    click.option("--warmup-from", type=NOT_NEGATIVE, show_default="0.01, at most --lr", help="Learning rate at step 0."),
    click.option("--weight-decay", type=NOT_NEGATIVE, default=1e-4, help="On all weights (LARS: not on vectors)."),
    click.option("--momentum", type=Finite(0, 1, max_open=True), default=0.9, help="The optimiser's."),
    click.option("--nesterov/--no-nesterov", default=False, help="Nesterov's momentum."),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of weights, order and views."),
    click.option("--run-dir", "run", show_default="runs/DATASET-ARCH-LOSS-sSEED", help="Folder for log and checkpoint."),
    click.option("--resume", metavar="RUN", help="Go on with the run in this folder; --epochs may extend it, and its schedule."),
    click.option("--device", show_default="cuda if there is one, else cpu", help="torch device."),
    click.option("--precision", type=click.Choice(["auto", "bfloat16", "float32", "float64"]), default="auto", help="auto: bfloat16 autocast where the hardware has it; float32: without TF32."),
    click.option("--sync-bn/--no-sync-bn", default=False, help="Batch norm over all ranks (on GPUs)."),
    click.option("--compile", is_flag=True, help="torch.compile the encoder."),
    click.option("--save-minutes", type=NOT_NEGATIVE, default=10, help="Checkpoint at least this often, and after every epoch."),
    click.option("--log-every", type=COUNT, default=10, help="Steps between log entries."),
]  # fmt: skip


def pretraining_options(command):
    """Gives a click command the options above."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


# ---------------------------------------------------------------- given, from a preset, from a checkpoint

MAY_CHANGE = {"epochs", "data", "download", "device", "log_every", "save_minutes", "micro_batch", "compile", "workers"}  # on --resume
MEANT_FOR = [  # (options, where they mean something, in words); what --resume takes over needs no check
    (["margin"], lambda o: o["loss"] in ("triplet", "max-margin"), "--loss triplet and max-margin"),
    (["mining"], lambda o: o["loss"] == "triplet", "--loss triplet"),
    (["npair_l2"], lambda o: o["loss"] == "n-pair", "--loss n-pair"),
    (["loss_scale", "proj_depth", "proj_hidden", "proj_dim"], lambda o: o["loss"] != "ce", "a contrastive --loss"),
    (["momentum_encoder"], lambda o: o["queue"], "--queue"),
    (["mix_alpha"], lambda o: o["mix"], "--mix"),
    (["proj_hidden"], lambda o: o["proj_depth"] > 1, "--proj-depth 2 or more"),
    (["jitter"], lambda o: o["augment"] in ("sim", "stacked-rand"), "--augment sim and stacked-rand"),
    (["crop_min"], lambda o: o["augment"] != "none", "views that are cropped"),
    (["label_noise"], lambda o: o["loss"] != "simclr" or o["ce_weight"], "losses that read labels"),
    (["sync_bn"], lambda o: not o["sync_bn"] or (int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available()), "several GPUs"),
    (["stem"], lambda o: (o["arch"] or ("small" if o["dataset"] == "shapes" else "")) != "small", "the ResNets"),
]


BOUND = {  # what of a preset goes with an option that the user overrides
    "loss": {"tau", "loss_scale", "proj_depth", "proj_hidden", "proj_dim", "queue", "momentum_encoder", "label_smoothing"},
    "dataset": {"stream"},
    "arch": {"stem"},
    "lr": {"lr_per_256"},
    "lr_per_256": {"lr"},
    "epochs": {"warmup"},
    "optimizer": {"nesterov"},
    "momentum": {"nesterov"},
}


def of_preset(options, given):
    """The options that the preset options["recipe"] sets: those that are not given, nor bound to one that is set otherwise."""
    preset = PRESETS[options["recipe"]].pretrain
    changed = {name for name in given if options[name] != preset.get(name)}
    dropped = given | set().union(*(BOUND[name] for name in changed if name in BOUND))
    return {name: value for name, value in preset.items() if name not in dropped}


def names_of(context, options):
    return ", ".join(sorted(next(p.opts[0] for p in context.command.params if p.name == k) for k in options))


def read(context, resume, options):
    """(the options of a run, the contents of the checkpoint that it goes on from or None)."""
    given = {k for k in options if context.get_parameter_source(k) is not ParameterSource.DEFAULT}
    if resume is not None:
        return resumed(context, Path(resume), options, given)
    if options["recipe"]:
        options = options | of_preset(options, given)
        say("\n".join(describe(options["recipe"])))
    refuse_two_rates(given)
    for names, fits, where in MEANT_FOR:
        if given & set(names) and not fits(options):
            raise Refused(f"{names_of(context, given & set(names))} has a meaning for {where} alone: leave it out")
    config = SimpleNamespace(**options)
    light = config.dataset == "shapes"
    fill_in(config, {"arch": "small" if light else "resnet50", "batch": 64 if light else 1024, "epochs": 12 if light else 1000})
    return config, None


def refuse_two_rates(given):
    if {"lr", "lr_per_256"} <= given:
        raise Refused("--lr and --lr-per-256 both set the learning rate: leave one out")


def resumed(context, run, options, given):
    """The options that the run in the folder began with, but for those that it may change."""
    if not str(run).strip("."):
        raise Refused("--resume takes the folder of a run: name one")
    contents, warning = newest_checkpoint(run)
    if warning:
        say(warning, err=True)
    defaults = context.command.make_context("pretrain", []).params  # older runs lack the newer options
    old = {k: contents["config"].get(k, defaults[k]) for k in options}
    changed = [k for k in options if k in given - MAY_CHANGE and options[k] != old[k]]
    if changed:
        raise Refused(f"--resume keeps the run's recipe: leave out {names_of(context, changed)}, or start a new run")
    return SimpleNamespace(**old | {k: options[k] for k in given & MAY_CHANGE} | {"run": str(run)}), contents


# ---------------------------------------------------------------- completed and checked


def complete_options(config, world):
    """Fills in the defaults that depend on the loss, and refuses what cannot work whatever the data."""
    defaults = LOSSES[config.loss]
    fill = {
        "tau": defaults.tau,
        "views": defaults.views,
        "lr": config.lr_per_256 * config.batch / 256 if config.lr_per_256 else defaults.lr * config.batch / 1024,
        "warmup": min(10.0, config.epochs / 10),
        "run": f"runs/{config.dataset}-{config.arch}-{config.loss}-s{config.seed}",
    }
    fill_in(config, fill)
    fill_in(config, {"warmup_from": min(0.01, config.lr), "loss_scale": config.tau / 0.07 if defaults.scaled else 1.0})

    loss, pairs, share = config.loss, config.loss == "n-pair", config.batch // world
    sharded = loss in ("supcon", "supcon-in", "simclr")
    refuse([
        (config.warmup >= config.epochs, f"--warmup {config.warmup} must be shorter than --epochs {config.epochs}"),
        (config.stream and config.dataset != "folder", "--stream reads --dataset folder: leave it out"),
        (defaults.tau is None and config.tau is not None, f"--tau has no meaning for --loss {loss}: leave it out"),
        (loss == "simclr" and config.views < 2, "--loss simclr needs a second view of each image: --views 2"),
        (pairs and config.views != 1, "--loss n-pair takes one view of each of two images: --views 1"),
        (pairs and config.batch % 2, "--loss n-pair takes pairs of images: choose an even --batch"),
        (loss == "ce" and config.ce_weight, "--ce-weight joins cross-entropy to another --loss than ce: leave it out"),
        (config.ce_detach and not config.ce_weight, "--ce-detach needs a classifier: give --ce-weight as well"),
        (config.nesterov and not config.momentum, "--nesterov needs a --momentum above 0"),
        (config.batch % world, f"--batch {config.batch} is not a multiple of the {world} ranks: choose one that is"),
        (share % (config.micro_batch or 1), f"--micro-batch {config.micro_batch} does not divide the {share} images of a rank: choose one that does"),
        ((config.micro_batch or share) * config.views < 2, "batch norm needs two rows at a time: raise --batch, --micro-batch or --views"),
        (config.nesterov and config.optimizer != "sgd", "--nesterov is SGD's: leave it out, or --optimizer"),
        (config.queue and not sharded, f"--queue has no meaning for --loss {loss}: leave it out"),
        (config.mix and loss not in ("ce", "supcon", "supcon-in"), f"--mix has no meaning for --loss {loss}, whose labels are not shared: leave it out"),
        (config.mix and config.queue, "--mix gives soft labels and --queue keeps hard ones: leave one out"),
        (config.mix and (config.micro_batch or share) < 2, "--mix needs two images at a time: raise --batch or --micro-batch"),
        (config.balanced and pairs, "--loss n-pair balances its pairs itself: leave --balanced out"),
        (config.label_smoothing and loss != "ce" and not config.ce_weight, "--label-smoothing is cross-entropy's: --loss ce, or --ce-weight"),
    ])  # fmt: skip


def complete_from_data(config, data):
    """Fills in the defaults that depend on the data, and refuses data that the options do not fit."""
    n, size, C = len(data.labels), data.images.shape[-1], len(data.classes)
    fill_in(config, {"size": size, "stem": "3x3" if size <= SMALL else "7x7", "num_classes": C})
    lone = config.loss == "n-pair" and torch.bincount(data.labels, minlength=C).min() < 2
    labelled = config.loss != "simclr" or config.ce_weight
    refuse([
        (n < config.batch, f"--batch {config.batch} is larger than the {n} training images: lower --batch"),
        (C < 2 and labelled, f"--data {config.data} has one class alone: --loss {config.loss} needs two, --loss simclr none"),
        (lone, "--loss n-pair needs two images of every class: raise --limit or mend the data"),
    ])


def fill_in(config, defaults):
    for name, value in defaults.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)


def refuse(refusals):
    for wrong, why in refusals:
        if wrong:
            raise Refused(why)


def require_same_data(config, data, contents):
    """A step is a place in the epochs of the data that the run began with."""
    if list(data.classes) != contents["classes"]:
        raise Refused(f"--data {config.data} holds other classes than the run began with: name the run's own data")
    if len(data.labels) != contents.get("images", len(data.labels)):
        raise Refused(f"--data {config.data} holds {len(data.labels)} images, the run began with {contents['images']}: name the run's own data")


# ---------------------------------------------------------------- how every script ends


def run_command(command, lower="--micro-batch, --batch, --size or --limit"):
    """Runs a click command; what the user can put right ends in one line and exit status 2.

    lower: the options that lower its need of memory.
    """
    try:
        command(standalone_mode=False)
    except click.ClickException as e:
        line = e.format_message()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        line = f"not enough memory ({str(e).splitlines()[0] if str(e) else 'MemoryError'}): lower {lower}"
    except OSError as e:
        if e.errno != errno.ENAMETOOLONG:
            raise
        line = f"{str(e.filename)[:80]} ... is too long a name: name another"
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    else:
        return
    click.echo(f"error: {' '.join(line.split())}", err=True)
    sys.exit(2)


def is_out_of_memory(e):
    allocation = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed", "invalid for storage size")
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(words in str(e) for words in allocation)
