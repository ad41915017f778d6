"""Every option of pretrain.py, declared once: its default, what it may be, and its help.

`read` makes a Config of the command line, a preset and a checkpoint. `complete` fills in the defaults that depend on
other options, and refuses what contradicts itself. `fit_to_data` does the same once the data are there.
"""

import dataclasses
import difflib
import math
import os
import re
from pathlib import Path

import click
import torch
from click.core import ParameterSource

import losses
from common.cli import Refused, is_first, say
from common.data import DATASETS, STREAMS
from common.images import SMALL_SIZE
from common.initial import refuse_without_weights
from common.journal import summary_writer
from common.models import ARCHS, has_stem
from common.objectives import OBJECTIVES
from common.presets import PRESETS, describe
from common.run_folder import CHECKPOINTS, is_there, newest_checkpoint
from common.views import AUGMENTATIONS


def require(condition, message):
    """Raises Refused with the message unless the condition holds."""
    if not condition:
        raise Refused(message)


# ---------------------------------------------------------------- kinds of values


class Finite(click.FloatRange):
    """A number that float32 holds with room to spare: optimisers multiply it by others."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        return number if abs(number) <= 1e30 else self.fail(f"{value} is not a finite number up to 1e30.", param, ctx)


class Widths(click.ParamType):
    """Widths of up to four layers, as in 2048-128; "r" stands for the width of the encoder's output r."""

    name = "widths"

    def convert(self, value, param, ctx):
        good = re.fullmatch(r"((r|[1-9]\d{0,6})-){0,3}[1-9]\d{0,6}", value)
        return value if good else self.fail(f"{value!r} is not of the form 128, r-128 or 2048-128.", param, ctx)


class Arch(click.ParamType):
    """The name of an encoder."""

    name = "name"

    def convert(self, value, param, ctx):
        if value in ARCHS:
            return value
        near = ", ".join(difflib.get_close_matches(value, ARCHS)) or "resnet50, convnext_tiny, vit_b_16"
        self.fail(f"{value!r} is no encoder: name small, resnet200 or a classification model of torchvision.models, "
                  f"such as {near}.", param, ctx)


LARGEST = 2**31 - 1
COUNT = click.IntRange(1, LARGEST)
POSITIVE, NOT_NEGATIVE = Finite(min=0, min_open=True), Finite(min=0)
SHARE, BELOW_1 = Finite(0, 1, min_open=True), Finite(0, 1, max_open=True)


def option(default, kind, help, shown=True, flag=None):
    """A field of Config that is an option as well.

    kind: a click type, or bool for a pair --x/--no-x. shown: the default in words, where it depends on other options.
    flag: the option's name, where it is not the field's.
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help, "shown": shown, "flag": flag})


def one_of(names):
    return click.Choice(list(names))


@dataclasses.dataclass
class Config:
    """The options of a run. None stands for a default that depends on others, until `complete` has filled it in."""

    # Data
    recipe: str = option(None, one_of([*PRESETS, "list"]),
                        "A published setting, number by number; other options override it. list prints them all.")
    dataset: str = option("shapes", one_of(DATASETS), "shapes is generated; folder reads DATA/train/CLASS/*.jpg.")
    data: str = option("data", str, "Folder of the data sets.")
    labels: str = option(None, str,
                        "CSV file of path, label and, if you like, split (train, test, val), for images of DATA that "
                        "do not lie in class folders.", "the folders' names")
    download: bool = option(True, bool, "Fetch what is missing.")
    size: int = option(None, click.IntRange(8, 8192), "Side of an image in pixels.",
                        "the data set's own; 32 for folder and shapes")
    limit: int = option(None, COUNT, "Train on the first N images. (A folder is shuffled first, by a fixed seed.)",
                        "all")
    subset: float = option(1.0, SHARE, "Train on this part of every class.")
    label_noise: float = option(0.0, Finite(0, 1),
                        "Part of the labels that are exchanged for another one (symmetric noise).")
    balanced: bool = option(False, bool, "Batches with equally many images of every class; small classes recur.")
    stream: bool = option(False, bool,
                        "Read a folder's files anew for every view: for folders that are larger than memory.")
    workers: int = option(2, click.IntRange(0, 1024),
                        "Processes that read a streamed folder, and that make the views of auto, rand and "
                        "stacked-rand.")

    # Views
    views: int = option(None, COUNT, "Views of each image.", "2; 1 for ce and n-pair")
    augment: str = option("sim", one_of(AUGMENTATIONS),
                        "sim: crop, flip, colours, blur; crop: crop and flip; auto, rand: AutoAugment, RandAugment; "
                        "stacked-rand: RandAugment and the colours of sim.")
    crop_min: float = option(0.2, SHARE, "Least part of the area that a crop keeps.")
    jitter: float = option(0.5, Finite(0, 2), "Strength of the colours of sim: 0.8, 0.8, 0.8, 0.2 times this.")
    mix: str = option(None, one_of(["mixup", "cutmix"]), "Mix neighbours in the batch; SupCon then takes soft labels.",
                        "none")
    mix_alpha: float = option(1.0, POSITIVE, "Parameter of the Beta distribution of the mixing weights.")

    # Loss
    loss: str = option("supcon", one_of(OBJECTIVES), "The training objective.")
    tau: float = option(None, POSITIVE, "Temperature.", "0.1; 0.5 for simclr and hard-contrastive")
    loss_scale: float = option(None, POSITIVE, "Factor of the contrastive loss.",
                        "tau/0.07 for supcon, supcon-in, simclr and hard-contrastive, as in the reference code; else 1")
    denominator: str = option("all", one_of(losses.DENOMINATORS),
                        "What the softmax of supcon and supcon-in sums over: all other rows (the paper), the negatives "
                        "and the one positive, or only the negatives.")
    positives_cap: int = option(None, click.IntRange(0, LARGEST),
                        "Positives that an anchor of supcon and supcon-in keeps beside its own image's views.", "all")
    nearest: int = option(None, COUNT, "Negatives that an anchor of hard-contrastive and simple-contrastive keeps.",
                        "8.19 % of them for hard-contrastive, as in the paper; all for simple-contrastive")
    lam: float = option(None, NOT_NEGATIVE, "Weight of each negative in simple-contrastive.", "1 / --nearest")
    margin: float = option(None, NOT_NEGATIVE, "Margin of triplet and max-margin.", "0.2 for triplet, 1 for max-margin")
    mining: str = option("semihard", one_of(["semihard", "hard", "all"]), "Which triplets count.")
    npair_l2: float = option(0.02, NOT_NEGATIVE, "Weight of the mean squared norm in n-pair.")
    ce_weight: float = option(0.0, BELOW_1, "w of (1 - w) contrastive + w cross-entropy, trained jointly.")
    ce_detach: bool = option(False, bool, "Keep the classifier's gradient from the encoder.")
    label_smoothing: float = option(0.0, BELOW_1, "Label smoothing of cross-entropy.")
    queue: int = option(0, click.IntRange(0, LARGEST),
                        "Contrasts kept from earlier batches, for supcon, supcon-in and simclr.")
    momentum_encoder: float = option(0.999, Finite(0, 1), "Momentum of the encoder that fills the queue.")

    # Encoder
    arch: str = option(None, Arch(),
                        "Encoder: small (0.34 M weights), resnet200, or any classification model of torchvision.",
                        "small for shapes, else resnet50")
    stem: str = option(None, one_of(["3x3", "7x7"]), "First layers of a ResNet.", "3x3 up to 64 pixels, else 7x7")
    normalize_encoder: bool = option(False, bool,
                        "Bring r to norm 1 before the heads, as in the paper's text and its ImageNet code.")
    projection: str = option("r-128", Widths(), "Widths of the projection head's layers; r is the encoder's width.")
    init: str = option(None, str,
                        "Weights that the encoder starts from: a run, a state dict of torchvision's model of that "
                        "name, or the word torchvision for the published ones.", "random")
    freeze_epochs: int = option(0, click.IntRange(0, LARGEST),
                        "Epochs in which the heads train alone, before the encoder of --init joins them.")

    # Optimiser
    batch: int = option(None, click.IntRange(2, LARGEST), "Images in a step, over all ranks.",
                        "64 for shapes, else 1024")
    micro_batch: int = option(None, COUNT,
                        "Images that a rank encodes at a time; the gradients are those of the whole batch.",
                        "all of a rank's")
    epochs: int = option(None, COUNT, "Passes over the data.", "12 for shapes, else 1000")
    lr: float = option(None, POSITIVE, "Peak learning rate, absolute.", "0.5 per 1024 images; ce 0.8, n-pair 0.1")
    lr_per_256: float = option(None, POSITIVE, "Peak learning rate per 256 images of the batch, instead of --lr.",
                        "unset")
    optimizer: str = option("sgd", one_of(["sgd", "lars", "rmsprop"]),
                        "LARS leaves vectors without decay and adaptation.")
    schedule: str = option("cosine", one_of(["cosine", "step", "exponential", "constant"]),
                        "cosine: to lr/1000; step: x0.1 at 70, 80 and 90 %; exponential: x0.97 every half epoch.")
    warmup: float = option(None, NOT_NEGATIVE, "Epochs of linear warm-up.", "10, at most a tenth of --epochs")
    warmup_from: float = option(None, NOT_NEGATIVE, "Learning rate at step 0.", "0.01, at most --lr")
    weight_decay: float = option(1e-4, NOT_NEGATIVE, "Decay of all weights (with LARS, not of vectors).")
    momentum: float = option(0.9, BELOW_1, "Momentum of the optimiser.")
    nesterov: bool = option(False, bool, "Nesterov's momentum.")

    # Run
    seed: int = option(0, click.IntRange(0, 2**63 - 1), "Seed of weights, order and views.")
    run: str = option(None, str, "Folder for log and checkpoints.", "runs/DATASET-ARCH-LOSS-sSEED", flag="--run-dir")
    device: str = option(None, str, "torch device.", "cuda if there is one, else cpu")
    precision: str = option("auto", one_of(["auto", "bfloat16", "float16", "float32", "float64"]),
                        "auto: bfloat16 autocast where the hardware has it; float16: for GPUs without it; "
                        "float32: without TF32.")
    sync_bn: bool = option(False, bool, "Batch norm over all ranks (on GPUs).")
    compile: bool = option(False, bool, "torch.compile the encoder.")
    save_minutes: float = option(10.0, NOT_NEGATIVE,
                                 "Save a checkpoint at least this often, and after epochs where it is cheap.")
    keep_every: int = option(None, COUNT, "Keep the weights of every so many epochs too, as epoch-0003.pt.", "none")
    log_every: int = option(10, COUNT, "Steps between two entries of the log.")
    tensorboard: bool = option(False, bool, "Write the entries for TensorBoard, too (pip install tensorboard).")

    # Known once the run is there
    streams: int = None  # how its random streams are made; None up to version 0.3
    num_classes: int = None
    noisy_labels: int = None  # how many labels --label-noise has exchanged


GROUPS = {"Data": "recipe", "Views": "views", "Loss": "loss", "Encoder": "arch", "Optimiser": "batch",
        "Run": "seed"}  # first options
OPTIONS = [field for field in dataclasses.fields(Config) if field.metadata]


class GroupedCommand(click.Command):
    """A click command whose help shows the options in the groups of Config."""

    def format_options(self, context, formatter):
        starts = {field: group for group, field in GROUPS.items()}
        sections = {}
        group = None
        for parameter in self.get_params(context):
            group = starts.get(parameter.name, group)
            record = parameter.get_help_record(context)
            if record:
                sections.setdefault("Run" if parameter.name in ("resume", "help") else group, []).append(record)
        for group, records in sections.items():
            with formatter.section(group):
                formatter.write_dl(records)


def config_options(command):
    """Gives a click command the options of Config."""
    for field in reversed(OPTIONS):
        command = click_option(field)(command)
    return command


def click_option(field):
    name = field.metadata["flag"] or "--" + field.name.replace("_", "-")
    shared = {"default": field.default, "show_default": field.metadata["shown"], "help": field.metadata["help"]}
    if field.metadata["kind"] is bool:
        return click.option(f"{name}/--no-{name[2:]}", field.name, **shared)
    return click.option(name, field.name, type=field.metadata["kind"], **shared)


# ---------------------------------------------------------------- given, from a preset, from a checkpoint


def read(context, resume, options):
    """(Config, contents of the checkpoint that the run goes on from, or None), of a command line."""
    given = {k for k in options if context.get_parameter_source(k) is not ParameterSource.DEFAULT}
    require(resume != "", "--resume takes the folder of a run: name one")
    require(options["run"] != "", "--run-dir takes a folder: name one")
    if resume not in (None, "auto"):
        return read_resumed(context, Path(resume), options, given)
    if options["recipe"]:
        options = options | options_of_preset(options, given)
        say("\n".join(describe(options["recipe"])))
    refuse_two_rates(given)
    config = Config(**options, streams=STREAMS)
    fill_in_defaults(config)
    refuse_idle(context, config, given)
    if resume == "auto" and any(is_there(Path(config.run, name)) for name in CHECKPOINTS):
        return read_same(context, Path(config.run), options, given)
    if config.init is not None:
        refuse_without_weights(config.init, config.arch)
    return config, None


MEANT_FOR = [  # (options, whether they have a meaning in a config, where they have one)
    (["nearest"], lambda c: OBJECTIVES[c.loss].nearest, "--loss hard-contrastive and simple-contrastive"),
    (["lam"], lambda c: OBJECTIVES[c.loss].has_lam, "--loss simple-contrastive"),
    (["margin"], lambda c: OBJECTIVES[c.loss].margin is not None, "--loss triplet and max-margin"),
    (["mining"], lambda c: c.loss == "triplet", "--loss triplet"),
    (["npair_l2"], lambda c: OBJECTIVES[c.loss].pairs, "--loss n-pair"),
    (["loss_scale", "projection"], lambda c: OBJECTIVES[c.loss].contrastive_loss, "a contrastive --loss"),
    (["denominator", "positives_cap"], lambda c: c.loss in ("supcon", "supcon-in"), "--loss supcon and supcon-in"),
    (["momentum_encoder"], lambda c: c.queue, "--queue"),
    (["labels"], lambda c: c.dataset == "folder", "--dataset folder"),
    (["mix_alpha"], lambda c: c.mix, "--mix"),
    (["jitter"], lambda c: c.augment in ("sim", "stacked-rand"), "--augment sim and stacked-rand"),
    (["crop_min"], lambda c: c.augment != "none", "views that are cropped"),
    (["label_noise"], lambda c: OBJECTIVES[c.loss].labels or c.ce_weight, "losses that read labels"),
    (["sync_bn"], lambda c: not c.sync_bn or several_gpus(), "several GPUs"),
    (["stem"], lambda c: has_stem(c.arch), "the ResNets"),
    (["freeze_epochs"], lambda c: c.init, "--init"),
]


def refuse_idle(context, config, given):
    """Raises Refused for an option that is given and has no meaning beside the others."""
    for names, has_meaning, where in MEANT_FOR:
        idle = given & set(names)
        require(not idle or has_meaning(config),
            f"{flags(context, idle)} has a meaning only for {where}: leave it out")


def several_gpus():
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available()


DROPPED_WITH = {  # what of a preset is dropped when the user overrides an option
    "loss": {"tau", "loss_scale", "projection", "queue", "momentum_encoder", "label_smoothing"},
    "dataset": {"stream"},
    "arch": {"stem"},
    "lr": {"lr_per_256"},
    "lr_per_256": {"lr"},
    "epochs": {"warmup"},
    "optimizer": {"nesterov"},
    "momentum": {"nesterov"},
}


def options_of_preset(options, given):
    """What the preset options["recipe"] sets, without what is given and what is dropped with a changed option."""
    preset = PRESETS[options["recipe"]].pretrain
    changed = {name for name in given if options[name] != preset.get(name)}
    dropped = given | set().union(*(DROPPED_WITH[name] for name in changed if name in DROPPED_WITH))
    return {name: value for name, value in preset.items() if name not in dropped}


def flags(context, names):
    return ", ".join(sorted(next(p.opts[0] for p in context.command.params if p.name == name) for name in names))


def refuse_two_rates(given):
    require(not {"lr", "lr_per_256"} <= given, "--lr and --lr-per-256 both set the learning rate: leave one out")


MAY_CHANGE = {"epochs", "data", "labels", "download", "device", "log_every", "tensorboard", "save_minutes",
        "keep_every", "micro_batch", "compile", "workers"}  # on --resume
DEFAULTS_MAY_CHANGE = {"size", "stem", "warmup"}  # they depend on the data, or on --epochs


def read_resumed(context, run, options, given):
    """As read, for the run in the folder `run`: its own options, but for those that may change."""
    config, contents = read_newest(run)
    changed = {k for k in given - MAY_CHANGE if options[k] != getattr(config, k)}
    require(not changed, f"--resume keeps the run's recipe: leave out {flags(context, changed)}, or start a new run")
    refuse_idle(context, config, given)
    changes = {k: options[k] for k in given & MAY_CHANGE} | {"run": str(run)}
    return dataclasses.replace(config, **changes), contents


def read_same(context, run, options, given):
    """As read, for --resume auto and the run in the folder `run`, which must be the one that the options ask for."""
    config, contents = read_newest(run)
    asked = Config(**options)
    fill_in_defaults(config)
    fill_in_defaults(asked)
    kept = [field.name for field in OPTIONS if field.name not in MAY_CHANGE | {"run"}]
    known = [name for name in kept if name not in DEFAULTS_MAY_CHANGE or options[name] is not None]
    unlike = {name for name in known if getattr(asked, name) != getattr(config, name)}
    require(not unlike, f"--run-dir {run} holds a run with another {flags(context, unlike)}: "
            "give that run's options, or name another --run-dir")
    changes = {k: options[k] for k in given & MAY_CHANGE} | {"run": str(run)}
    return dataclasses.replace(config, **changes), contents


def read_newest(run):
    """(Config, contents) of the newest readable checkpoint in the folder `run`."""
    contents, warning = newest_checkpoint(run)
    if warning:
        say(warning, err=True)
    return config_of_checkpoint(contents), contents


def config_of_checkpoint(contents):
    """The Config of a checkpoint's run. Runs of earlier versions lack the newer options and name some differently."""
    old = dict(contents["config"])
    if "proj_dim" in old:  # up to version 0.3: depth, hidden width and last width of the projection head
        hidden = [str(old.get("proj_hidden") or "r")] * (old.get("proj_depth", 2) - 1)
        old["projection"] = "-".join([*hidden, str(old["proj_dim"])])
    known = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in old.items() if name in known})


# ---------------------------------------------------------------- completed and checked


def fill_in(config, **defaults):
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def fill_in_defaults(config):
    """Fills in every default that depends on other options alone."""
    objective = OBJECTIVES[config.loss]
    light = config.dataset == "shapes"
    fill_in(config, arch="small" if light else "resnet50", batch=64 if light else 1024, epochs=12 if light else 1000)
    fill_in(config, tau=objective.tau, margin=objective.margin, views=objective.views)
    if objective.nearest:
        fill_in(config, nearest=math.ceil(objective.nearest * negatives_of_an_image(config)))
    if objective.has_lam:
        fill_in(config, lam=1 / config.nearest)
    fill_in(config, warmup=min(10.0, config.epochs / 10))
    if config.lr_per_256:
        fill_in(config, lr=config.lr_per_256 * config.batch / 256)
    fill_in(config, lr=objective.lr * config.batch / 1024,
        run=f"runs/{config.dataset}-{config.arch}-{config.loss}-s{config.seed}")
    fill_in(config, warmup_from=min(0.01, config.lr), loss_scale=config.tau / 0.07 if objective.scaled else 1.0)


def negatives_of_an_image(config):
    """How many rows of a batch show another image."""
    return config.views * (config.batch - 1)


def complete(config, world):
    """Fills in the defaults, and refuses what cannot work on `world` ranks, whatever the data."""
    fill_in_defaults(config)
    loss = config.loss
    objective = OBJECTIVES[config.loss]
    if config.tensorboard and is_first():
        summary_writer()  # whose package may be lacking
    require(config.warmup < config.epochs, f"--warmup {config.warmup} must be shorter than --epochs {config.epochs}")
    require(config.freeze_epochs <= config.epochs,
            f"--freeze-epochs {config.freeze_epochs} is more than --epochs {config.epochs}: lower it")
    require(not config.stream or config.dataset == "folder", "--stream reads --dataset folder: leave it out")
    require(objective.tau or not config.tau, f"--tau has no meaning for --loss {loss}: leave it out")
    require(not config.nesterov or config.momentum, "--nesterov needs a --momentum above 0")
    require(not config.nesterov or config.optimizer == "sgd", "--nesterov is SGD's: leave it out, or --optimizer")

    require(config.views >= objective.views_min, f"--loss {loss} needs a second view of each image: --views 2")
    require(not objective.pairs or config.views == 1, f"--loss {loss} takes one view of each of two images: --views 1")
    require(not objective.pairs or config.batch % 2 == 0,
        f"--loss {loss} takes pairs of images: choose an even --batch")
    require(not objective.pairs or not config.balanced,
        f"--loss {loss} balances its pairs itself: leave --balanced out")

    has_classifier = objective.contrastive_loss is None or config.ce_weight
    require(objective.contrastive_loss or not config.ce_weight,
            "--ce-weight joins cross-entropy to another --loss than ce: leave it out")
    require(config.ce_weight or not config.ce_detach, "--ce-detach needs a classifier: give --ce-weight as well")
    require(has_classifier or not config.label_smoothing,
        "--label-smoothing is cross-entropy's: --loss ce, or --ce-weight")
    require(objective.queue or not config.queue, f"--queue has no meaning for --loss {loss}: leave it out")
    require(objective.soft or not config.mix,
        f"--mix has no meaning for --loss {loss}, whose labels are not shared: leave it out")
    require(not config.mix or not config.queue, "--mix gives soft labels and --queue keeps hard ones: leave one out")

    require(config.denominator == "all" or not config.mix, "--denominator goes with hard labels: leave --mix out")
    require(config.positives_cap is None or not (config.queue or config.mix),
            "--positives-cap goes with hard labels of one batch: leave --queue and --mix out")
    require((config.positives_cap or 0) % config.views == 0,
            f"--positives-cap {config.positives_cap} is not a multiple of --views {config.views}: choose one that is")

    negatives = negatives_of_an_image(config)
    require((config.nearest or 0) <= negatives,
            f"--nearest {config.nearest} is more than the {negatives} negatives of an anchor: lower it")
    refuse_uneven_batches(config, world)


def refuse_uneven_batches(config, world):
    """Raises Refused where the batch cannot be cut into whole parts, one or more for each of `world` ranks."""
    share = config.batch // world  # of a rank
    at_a_time = config.micro_batch or share
    require(config.batch % world == 0,
        f"--batch {config.batch} is not a multiple of the {world} ranks: choose one that is")
    require(share % at_a_time == 0,
            f"--micro-batch {at_a_time} does not divide the {share} images of a rank: choose one that does")
    require(at_a_time * config.views > 1,
        "batch norm needs two rows at a time: raise --batch, --micro-batch or --views")
    require(not config.mix or at_a_time > 1, "--mix needs two images at a time: raise --batch or --micro-batch")


def fit_to_data(config, data):
    """Fills in what depends on the data, and refuses data that do not fit the options."""
    n, size, classes = len(data.labels), data.images.shape[-1], len(data.classes)
    source = source_of(config)
    fill_in(config, size=size, num_classes=classes)
    if has_stem(config.arch):
        fill_in(config, stem="3x3" if size <= SMALL_SIZE else "7x7")
    objective = OBJECTIVES[config.loss]
    reads_labels = objective.labels or config.ce_weight
    require(n >= config.batch, f"--batch {config.batch} is larger than the {n} training images: lower --batch")
    wants_classes = f"--loss {config.loss}" if reads_labels else "--balanced" if config.balanced else ""
    require(classes or not wants_classes,
            f"{source} has images without class folders: {wants_classes} wants DIR/train/CLASS/*.jpg, "
            "and --loss simclr takes them as they are")
    require(classes > 1 or not reads_labels,
            f"{source} has one class alone: --loss {config.loss} needs two, --loss simclr none")
    alone = torch.bincount(data.labels, minlength=classes).min() < 2
    require(not objective.pairs or not alone,
            f"--loss {config.loss} needs two images of every class: raise --limit or --subset, lower --label-noise "
            "or mend the data")


def source_of(config):
    """The option that says what the training images are."""
    return f"--labels {config.labels}" if config.labels else f"--data {config.data}"


def require_same_data(config, found, contents):
    """Refuses other data than the run began with: a step is a place in the epochs of those.

    found: what describe_data says of them. contents: the run's checkpoint; up to version 0.3 it holds only the classes.
    """
    source = source_of(config)
    remedy = "name the run's own data"
    began = found | contents
    require(found["classes"] == began["classes"],
        f"{source} holds other classes than the run began with: {remedy}")
    require(found["images"] == began["images"],
            f"{source} holds {found['images']} images, the run began with {began['images']}: {remedy}")
    require(found["checksum"] == began["checksum"],
            f"{source} gives the images other names or labels than the run began with: {remedy}")
    if config.streams != STREAMS:
        chosen = config.subset < 1 or config.label_noise or config.limit and config.dataset == "folder"
        require(config.streams or not chosen,
                "since this run of an earlier version began, other images belong to its --limit, --subset "
                "or --label-noise: end it with that version, or start a new run")
        changed = "views" if config.streams else "order and its views"
        say(f"this run is of an earlier version: from here on its {changed} are drawn differently")
