"""The weights that an encoder starts from: those of a run, of a file of torchvision's names, or published ones."""

from pathlib import Path
from typing import NamedTuple

import torch
import torchvision

from common.cli import Refused, say
from common.models import OURS, has_stem, with_versions
from common.run_folder import CHECKPOINT, FORMAT, checkpoint_of, is_there, load_undamaged, require_entries

PUBLISHED = "torchvision"  # as the value of --init: the weights that torchvision publishes
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of the images that those are trained on
BEHIND_R = "fc", "classifier", "head", "heads", "aux1", "aux2", "AuxLogits"  # what torchvision's models make of r
PREFIXES = "", "module.", "encoder.", "module.encoder."  # that training code puts before the names
NESTED = "state_dict", "model"  # where it keeps the weights in a file that holds more


class Weights(NamedTuple):
    entries: dict  # name: tensor
    mean: torch.Tensor  # (3,) and standard deviation (3,) of the images that the weights were trained on
    std: torch.Tensor


def refuse_without_weights(init, arch):
    """Raises Refused, before any long work, where there are no weights of the name --init."""
    if init != PUBLISHED:
        if not (is_there(Path(init)) and is_there(checkpoint_of(init))):
            raise Refused(f"--init {init} is not there: name a run, a file of weights, or the word {PUBLISHED}")
    elif arch in OURS:
        raise Refused(f"--init {PUBLISHED}: torchvision publishes no weights of {arch}: name another --arch, or a run")


def start_from(encoder, config):
    """Gives the encoder the weights that config.init names, and says what it took. Returns their Weights' (mean, std).

    The first layer of a ResNet with another stem starts fresh. Raises Refused where anything else does not fit.
    """
    entries, mean, std = read_weights(config.init, config.arch)
    own = encoder.state_dict()
    entries = without_prefix(entries, own)
    taken = {name: entry for name, entry in entries.items() if name in own and entry.shape == own[name].shape}
    behind_r = [name for name in entries if name not in own and name.split(".")[0] in BEHIND_R]
    missing = [name for name in own if name not in entries and not name.endswith("num_batches_tracked")]
    extra = [name for name in entries if name not in own and name not in behind_r]
    mismatched = [name for name in own if name in entries and name not in taken]
    fresh = ["conv1.weight"] if has_stem(config.arch) and mismatched == ["conv1.weight"] else []
    differ = [
        missing and f"it lacks {first_of(missing)}",
        extra and f"it has {first_of(extra)}",
        mismatched != fresh and "; ".join(both_shapes(name, own, entries) for name in mismatched[:3]),
    ]
    if any(differ):
        raise Refused(f"--init {config.init} is not of the encoder {config.arch}: {'; '.join(filter(None, differ))}. "
                      "Name its weights, or their --arch")
    wrong = [name for name, entry in taken.items() if not entry.isfinite().all()]
    if wrong:
        raise Refused(f"--init {config.init} holds numbers that are not finite, in {first_of(wrong)}: name another")
    encoder.load_state_dict(with_versions(own | taken, encoder))
    words = [f"encoder from {config.init}: {len(taken)} of {len(own)} entries"]
    words += [f"the stem starts fresh, for {both_shapes(name, own, entries)}" for name in fresh]
    words += [f"not taken is what comes after r, {first_of(behind_r)}"] if behind_r else []
    say("; ".join(words))
    return mean, std


def first_of(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def both_shapes(name, own, entries):
    return f"{name} is {tuple(entries[name].shape)} there and {tuple(own[name].shape)} here"


def without_prefix(entries, own):
    """The entries under the prefix that makes most of their names those of `own`."""
    prefix = max(PREFIXES, key=lambda prefix: sum(prefix + name in entries for name in own))
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def read_weights(init, arch):
    """The Weights of that name."""
    if init == PUBLISHED:
        return published(arch)
    try:
        contents = load_undamaged(checkpoint_of(init))
    except Exception as e:  # of a zip archive, of pickle, of the file system
        raise Refused(f"--init {init} cannot be read as weights ({type(e).__name__}): name a run, or a state dict that "
                      "torch.save wrote") from e
    contents = contents if isinstance(contents, dict) else {}
    if contents.get("format") == FORMAT:
        require_entries(contents, checkpoint_of(init), *CHECKPOINT)
        return weights_of_run(contents, init, arch)
    for name in NESTED:
        contents = contents[name] if isinstance(contents.get(name), dict) else contents
    tensors = {name: entry for name, entry in contents.items()
               if isinstance(name, str) and isinstance(entry, torch.Tensor)}
    return Weights(tensors, *map(torch.tensor, IMAGENET))


def weights_of_run(contents, init, arch):
    """The Weights in the contents of a checkpoint of pretrain.py."""
    theirs = contents["config"].get("arch")
    if theirs != arch:
        raise Refused(f"--init {init} holds the encoder {theirs}, and this run has {arch}: give --arch {theirs}")
    return Weights(contents["encoder"], contents["mean"], contents["std"])


def published(arch):
    """The Weights that torchvision publishes for a model of its own. It keeps what it downloads."""
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    try:
        model = torchvision.models.get_model(arch, weights=weights)
    except (OSError, RuntimeError) as e:  # no way to the file, or a wrong checksum
        raise Refused(f"--init {PUBLISHED}: {weights.url} cannot be fetched ({e}): "
                      "fetch it elsewhere, and name the file") from e
    images = weights.transforms()
    mean, std = images.mean, images.std
    if getattr(model, "transform_input", False):  # googlenet and inception_v3 bring ImageNet's scale to this one
        mean, std = [0.5] * 3, [0.5] * 3
    return Weights(model.state_dict(), torch.tensor(mean), torch.tensor(std))
