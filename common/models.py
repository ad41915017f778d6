"""Encoders, heads, and the model that trains: x -> r = Enc(x) -> z = Proj(r)."""

import contextlib
import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.cli import Refused
from common.objectives import OBJECTIVES
from common.views import normalize, send

# ---------------------------------------------------------------- encoders


OURS = ("small", "resnet200")  # encoders that torchvision lacks
ARCHS = (*OURS, *torchvision.models.list_models(module=torchvision.models))
ONE_OUTPUT = {"aux_logits": False, "init_weights": True, "transform_input": True}  # of the two Inceptions


def build_encoder(arch, stem):
    """(encoder, width of r). What torchvision has bears torchvision's names; the stem "3x3" makes a ResNet suit small
    images, and means nothing to the others."""
    if arch == "small":
        return small_encoder(), 144
    if arch == "resnet200":
        net = ResNet(Bottleneck, [3, 24, 36, 3])
    else:
        net = torchvision.models.get_model(arch, **(ONE_OUTPUT if arch in ("googlenet", "inception_v3") else {}))
    width = take_last_layer_off(net)
    if stem == "3x3" and has_stem(arch):
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net, width


def has_stem(arch):
    """Whether this is a ResNet, whose first layers come in two kinds."""
    return arch.removeprefix("wide_").startswith(("resnet", "resnext"))


def take_last_layer_off(net):
    """Takes the layer of the class scores off a model of torchvision's, and returns the width of what it was given."""
    name, layer = [(n, m) for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    holder, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(holder), attribute, nn.Identity())
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def refuse_size(encoder, arch, size):
    """Raises Refused where the encoder cannot take images of this size: a forward on "meta" computes shapes alone."""
    on_meta = {name: entry.to("meta") for name, entry in encoder.state_dict().items()}
    try:
        functional_call(encoder.eval(), on_meta, torch.empty(1, 3, size, size, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise Refused(f"--arch {arch} cannot take images of --size {size} ({reason}): "
                      "choose another --size, as 224, or another --arch") from e
    encoder.train()


def small_encoder():
    """A stem and two of torchvision's blocks, then centred r: 0.34 M weights, which two CPU cores train in minutes."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(144)
    return nn.Sequential(stem, halving_block(32, 64), halving_block(64, 144), *pooled)


def halving_block(cin, cout):
    shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, 2, bias=False), nn.BatchNorm2d(cout))
    return BasicBlock(cin, cout, 2, shortcut)


# ---------------------------------------------------------------- heads, and the model that trains


def build_projection(widths):
    """Linear layers from widths[0] over widths[1], ... to widths[-1], with a ReLU between two of them."""
    layers = []
    for cin, cout in zip(widths, widths[1:]):
        layers += [nn.Linear(cin, cout), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def widths_of(projection, r):
    """The widths of the projection head's layers, the width of r first."""
    return [r] + [r if width == "r" else int(width) for width in projection.split("-")]


class Model(nn.Module):
    """x (N, 3, H, H) -> z = Proj(Enc(x)), (N, D), and class scores of r, (N, C) or None.

    The encoder alone runs under autocast, in the type `autocast` if that is not None: the heads are small and stay in
    float32. `unit` brings z to norm 1. `unit_r` brings r to norm 1 before the heads, as the paper does and its code for
    CIFAR does not. `detach` keeps the classifier's gradient from the encoder. While the model is frozen, its encoder is
    as in evaluation and gets no gradient, so that the heads train alone.
    """

    def __init__(self, encoder, projection=None, classifier=None, *,
                 unit=True, unit_r=False, detach=False, autocast=None):
        super().__init__()
        self.encoder, self.projection, self.classifier = encoder, projection, classifier
        self.unit, self.unit_r, self.detach, self.autocast = unit, unit_r, detach, autocast
        self.is_frozen = False

    def freeze(self, is_frozen):
        self.is_frozen = is_frozen
        self.encoder.train(not is_frozen)

    def forward(self, x):
        with torch.no_grad() if self.is_frozen else contextlib.nullcontext():
            r = encode(self.encoder, x, self.autocast)  # (N, width)
        r = F.normalize(r) if self.unit_r else r
        z = r if self.projection is None else self.projection(r)
        z = F.normalize(z) if self.unit else z
        logits = None if self.classifier is None else self.classifier(r.detach() if self.detach else r)
        return z, logits


def build_model(config, autocast):
    """The model that the options describe, with the weights that belong to the seed."""
    torch.manual_seed(config.seed)
    encoder, width = build_encoder(config.arch, config.stem)
    refuse_size(encoder, config.arch, config.size)
    objective = OBJECTIVES[config.loss]
    projection = build_projection(widths_of(config.projection, width)) if objective.contrastive_loss else None
    has_classifier = objective.contrastive_loss is None or config.ce_weight
    classifier = nn.Linear(width, config.num_classes) if has_classifier else None
    return Model(encoder, projection, classifier, unit=objective.unit, unit_r=config.normalize_encoder,
                 detach=config.ce_detach, autocast=autocast)


def encode(encoder, x, autocast):
    """r = Enc(x) in the type of x; inside the encoder autocast has the type `autocast`, if that is not None."""
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        return encoder(x).to(x.dtype)


def encode_images(encoder, images, mean, std, autocast):
    """r (n, width) of images (n, 3, H, H), uint8 or float in [0, 1], on the device of mean and std."""
    x = send(images, mean.device)
    x = normalize(x if x.is_floating_point() else x.float() / 255, mean, std)
    return encode(encoder, x.to(memory_format=torch.channels_last), autocast)


@torch.no_grad()
def features(encoder, images, mean, std, autocast=None, batch=500):
    """r = Enc(x), (n, width), of un-augmented images, in evaluation mode."""
    was_training = encoder.training
    encoder.eval()
    parts = [encode_images(encoder, part, mean, std, autocast) for part in images.split(batch)]
    encoder.train(was_training)
    return torch.cat(parts)


def type_of_autocast(precision, device):
    """The torch type that encoders compute in by --precision, where it is not that of their weights; or None."""
    if precision == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device) else None
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)


def bfloat16_is_fast(device):
    """Whether the device has units for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@contextlib.contextmanager
def still_statistics(model):
    """In this block batch norm leaves its running statistics alone.

    Gradient caching encodes a batch twice, and only the second pass may change them. The momentum encoder never reads
    its own.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class Queue:
    """The z and labels of the latest `size` views, as a momentum encoder saw them: contrasts beside the batch's own.

    The momentum encoder's weights are a running mean of the model's (He et al. 2020). With labels this is the memory of
    Khosla et al. 2020, section 4. Every rank holds the same queue.
    """

    def __init__(self, model, size, momentum):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.size, self.momentum, self.z, self.y = size, momentum, None, None

    @torch.no_grad()
    def follow(self, model):
        """Moves the momentum encoder towards the model."""
        self.model.freeze(model.is_frozen)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - self.momentum)

    @torch.no_grad()
    def encode(self, views):
        """z (N, D) as the momentum encoder sees the views."""
        with still_statistics(self.model):
            return self.model(views)[0]

    def add(self, z, y):
        """Appends the views of all ranks, (V n, D) and (V n,), and drops the oldest."""
        self.z = z[-self.size :] if self.z is None else torch.cat([self.z, z])[-self.size :]
        self.y = y[-self.size :] if self.y is None else torch.cat([self.y, y])[-self.size :]

    def contrasts(self):
        """(z, labels), or None before the first batch."""
        return None if self.z is None else (self.z, self.y)

    def state_dict(self):
        return {"model": self.model.state_dict(), "z": self.z, "y": self.y}

    def load_state_dict(self, state):
        self.model.load_state_dict(with_versions(state["model"], self.model))
        device = next(self.model.parameters()).device
        self.z, self.y = (None if v is None else v.to(device) for v in (state["z"], state["y"]))


# ---------------------------------------------------------------- the states of checkpoints


def load_state(module, state, path):
    """Loads the state of a module or optimizer from the checkpoint at `path`. It must have exactly its entries."""
    try:
        state = with_versions(state, module) if isinstance(module, nn.Module) else state
        module.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as e:
        raise Refused(f"{path} does not hold the weights that its own options name: "
                      "it is damaged or changed by hand, name another") from e


def with_versions(entries, module):
    """The entries of a module with the versions of their layouts, which a checkpoint does not hold: some of
    torchvision's models cannot be loaded without them."""
    state = OrderedDict(entries)
    state._metadata = module.state_dict()._metadata
    return state
