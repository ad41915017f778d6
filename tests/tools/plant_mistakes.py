"""Plants one mistake at a time in a copy of the project and shows the first test that catches it.

    python tests/tools/plant_mistakes.py                      all; exits 1 if one is not caught or its text not found
    python tests/tools/plant_mistakes.py --only queue         those whose name or file contains the word
    python tests/tools/plant_mistakes.py --file losses.py     those of one file

The copy holds the files that git tracks, as they stand. Only the tests that a mistake names run on it, so that it is
noticed when they catch it no more; first these run once without any mistake.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import hypothesis  # noqa: F401  for the tests, which begin in copies of this process, as torchvision is
import pytest
import torch
import torchvision  # noqa: F401

PROJECT = Path(__file__).resolve().parents[2]
AT_A_TIME = 2
SAME_EXAMPLES = """
from hypothesis import Phase
settings.register_profile("plant", settings(), derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
settings.load_profile("plant")
"""  # failures are not shrunk

# Of each file, its mistakes: (what is wrong, a text that the file holds once, what stands there instead, the tests that
# see it). "views moves" are tests/test_views.py and tests/test_moves.py.
MISTAKES = {
    "losses.py": [
        ("drop the 1/|P|", "(w * log_P).sum(1) / -total, valid", "-(w * log_P).sum(1), valid", "losses theory strips"),
        ("keep self in A(i)",
         "_Scores.apply(a, b, own), _fill(", "_Scores.apply(a, b, None), _fill(", "losses theory strips"),
        ("no maximum before exp",
         "log_P = s.log_softmax(1)", "log_P = s - s.exp().sum(1, keepdim=True).log()", "losses theory strips"),
        ("wrong sign of the contrasts' gradient",
         "_product(G + G.T, a)", "_product(G - G.T, a)", "losses theory strips"),
        ("swap L_in and L_out",
         "def nt_xent(z: Tensor", "supcon_out, supcon_in = supcon_in, supcon_out\n"
         "\n"
         "def nt_xent(z: Tensor", "losses theory strips"),
        ("forget log|P| in L_in", "/ -total + total.log(), valid", "/ -total, valid", "losses theory strips"),
        ("L_in: X of all rows, not of P(i)", "log_X = log_P.where(p, ABSENT)", "log_X = log_P", "losses theory strips"),
        ("detach the contrasts", "_product(G + G.T, a)", "_product(G, a)", "losses theory strips"),
        ("another set: its gradient",
         "return _product(G, b), _product(G.T, a) if", "return _product(G, b), 0 * b if", "losses theory strips"),
        ("last view off by one image",
         "return torch.arange(len(z) // views, device=z.device).repeat(views)",
         "image = torch.arange(len(z) // views, device=z.device)\n"
         "    return torch.cat([image.repeat(views - 1), image.roll(1)])", "losses theory strips"),
        ("mean over all anchors",
         "loss.sum() / valid.count_nonzero().clamp(min=1)", "loss.sum() / max(len(loss), 1)", "losses theory strips"),
        ("another denominator in strips", 'if denominator == "all" and len(y_a)', "if len(y_a)", "ranks"),
        ("ranks: the paper's denominator whatever is asked",
         "global_mean(*_from_rows(variant, z, y, tau, contrast, y_contrast, own, denominator))",
         "global_mean(*_from_rows(variant, z, y, tau, contrast, y_contrast, own))", "ranks"),
        ("another set: the paper's denominator whatever is asked",
         "_reduce(*_from_rows(variant, z, y, tau, contrast, y_contrast, own, denominator), reduction)",
         "_reduce(*_from_rows(variant, z, y, tau, contrast, y_contrast, own), reduction)", "strips"),
        ("strips: a lone anchor counts",
         "(log_sum[0] - of_positives).where(valid, 0), valid",
         "(log_sum[0] - of_positives), valid", "losses theory strips"),
        ("max_margin: a lone anchor counts",
         "# Hadsell\n"
         "    valid = p.any(1)\n"
         "    return _reduce(loss.where(valid, 0)",
         "# Hadsell\n    valid = p.any(1)\n    return _reduce(loss", "losses theory strips"),
        ("an anchor without negatives counts", "w = w & n.any(1, keepdim=True) if", "w = w if", "losses theory strips"),
        ("tau missing where it is a number", "else float(tau)) ** -0.5", "else 1.0) ** -0.5", "losses theory strips"),
        ("strips: self in A(i)", "None if own is None else own + i - J.start", "None", "losses theory strips"),
        ("strips: self in the sums of the classes",
         "sums = sums - itself * rows[mine]", "sums = sums - 0 * itself * rows[mine]", "losses theory strips"),
        ("strips: another row for self in these sums",
         "mine = slice(own, own + len(y_a))", "mine = slice(0, len(y_a))", "losses theory strips"),
        ("strips: a weight that is not a number is none",
         "own)\n    valid = weight != 0", "own)\n    valid = weight > 0", "losses theory strips"),
        ("strips: the roles of these sums",
         "index_add(0, y_b, rows.to(wide))", "index_add(0, y_a, rows.to(wide))", "losses theory strips"),
        ("strips: what rounding leaves is a weight",
         "sums[:, -1:] <= remains", "sums[:, -1:] < 0", "losses theory strips"),
        ("strips: exp for exp2",
         "yield I, J, s.exp2_() if small", "yield I, J, s.exp_() if small", "losses theory strips"),
        ("strips: a result in base 2", "return math.log(2) * (log_sum", "return (log_sum", "losses theory strips"),
        ("strips: the mirror's columns forgotten",
         "if b is None:\n                total[", "if False:\n                total[", "losses theory strips"),
        ("strips: the diagonal block mirrored",
         "_log_sum(part[:, len(s) :], 0, small)",
         "_log_sum(part, 0, small)[: len(a) - I.stop]", "losses theory strips"),
        ("strips: the mirror's role forgotten",
         "for K in ((I, None), J) if b is None else ((I, None),):", "for K in ((I, None),):", "losses theory strips"),
        ("strips: the mirror's gradient forgotten",
         "if b is None:\n            grads[0][I.stop :].addmm_(", "if b is None:\n"
         "            torch.zeros_like(grads[0][I.stop :]).addmm_(", "losses theory strips"),
        ("strips: kept strips out of order",
         "kept[i // rows]",
         "kept[-1 - i // rows] if i == 0 and kept[-1].shape == kept[0].shape else kept[0]", "losses theory strips"),
        ("strips: kept strips overwrite one another",
         "out=None if keep else room", "out=room", "losses theory strips"),
        ("strips: kept strips are changed",
         "softmax = part  #", "softmax = part.mul_(2) / 2  #", "losses theory strips"),
        ("strips: no maximum at large scores", "bool(longest < 60)", "bool(longest < 60**9)", "losses theory strips"),
        ("strips: a maximum of the first column",
         "top = s.amax(axis, keepdim=True)", "top = s.narrow(axis, 0, 1)", "losses theory strips"),
        ("strips: an anchor that is left out weighs",
         "log_sum.masked_fill(slope == 0, torch.inf)", "log_sum.clone()", "losses theory strips"),
        ("strips: L_in over A(i) twice", "s.where(w, 0 if small else -torch.inf) if", "s if", "losses theory strips"),
        ("strips: nan is a class",
         "numbers = F.pad((y[1:] != y[:-1])",
         "numbers = F.pad(((y[1:] != y[:-1]) & y[1:].isfinite())", "losses theory strips"),
        ("triplet: an absent negative is near",
         "d.masked_fill(~n, torch.inf)", "d.masked_fill(~n, 0)", "losses theory strips"),
        ("triplet: semihard takes a negative as far as the positive",
         "right=True)", "right=False)", "losses theory strips"),
        ("distances of rows as they lie", "_scores(z - z.mean(0))", "_scores(z)", "losses theory strips"),
        ("strips: the mean's contrasts detached",
         'rows if variant == "out" else rows[:, :0], y_a',
         '(rows if variant == "out" else rows[:, :0]).detach(), y_a', "losses theory strips"),
        ("strips: which side wants a gradient", "elif of_b:", "elif False:", "losses theory strips"),
        ("strips: another set's gradient",
         "grads[1].addmm_(G.T, a[I])", "grads[1].addmm_(G.T, -a[I])", "losses theory strips"),
        ("older torch: the user's precision is not put back",
         '.replace("highest", "none"),', '.replace("highest", "none").replace("high", "none"),', "strips"),
        ("the precision of another thread lowered",
         "found = self.found.pop()", "found = self.found.pop(0)", "losses theory strips"),
        ("the precision's switch not locked",
         "threading.Lock()", "__import__('contextlib').nullcontext()", "losses theory strips"),
        ("the precision left behind",
         "if self.backend.fp32_precision != found:", "if False:", "losses theory strips"),
    ],
    "reference_numpy.py": [
        ("oracle: the anchor is among its contrasts", "if a != i]\ndef _positives", "]\ndef _positives", "reference"),
        ("oracle: L_in without 1/|P|",
         "log_mean = _lse([np.log(w[p]) + log_ratio[p] for p in w])",
         "log_mean = _lse([log_ratio[p] for p in w])", "reference"),
        ("oracle: the gradient of the anchor's role alone",
         "        grad[a] += g_ia * slope(z[a], z[i])\n", "", "reference"),
        ("oracle: another set's other positives in the denominator",
         "N = [a for a in A if a not in w]", "N = A", "reference"),
        ("oracle: the mean over all rows", "sum(L.values()) / max(1, len(L))", "sum(L.values()) / len(z)", "reference"),
    ],
    "pretrain.py": [
        ("a diagnosis with a bank of one image", "bank = max(1, min(", "bank = min(1, min(", "log"),
        ("a diagnosis of one query", "query = max(1, min(", "query = min(1, min(", "log"),
        ("alignment of rows image by image",
         "losses.alignment(z, views=views).item()",
         "losses.alignment(z.unflatten(0, (views, -1)).transpose(0, 1).flatten(0, 1), views=views).item()", "log"),
        ("uniformity of raw features", "z = F.normalize(z).unflatten", "z = z.unflatten", "log"),
        ("the rate of the next step",
         "learning_rate(config, run.step, run.steps_per_epoch))",
         "learning_rate(config, run.step + 1, run.steps_per_epoch))", "log"),
        ("caching: parts joined as they come",
         "return torch.cat([part.unflatten(0, (views, -1)) for part in parts], 1).flatten(0, 1)",
         "return torch.cat(list(parts))", "objectives"),
        ("caching: gradients cut by rows",
         "rows.unflatten(0, (views, -1)).split(size, 1)",
         "rows.unflatten(0, (-1, views)).split(size, 0)", "objectives"),
        ("caching: the first part pushes twice",
         "            x, _ = part.views()", "            x, _ = parts[0].views()", "objectives"),
        ("the queue's NT-Xent has positives there", "        y = torch.full_like(y, -1)\n", "        pass\n", "queue"),
        ("a run that goes on begins with an empty queue",
         'load_state(self.queue, contents.get("queue"), path)', "pass", "queue"),
        ("a run that goes on forgets its momentum",
         '        load_state(self.optimizer, contents["optimizer"], path)\n', "", "log"),
        ("a run that goes on begins its schedule anew", 'self.step = contents["step"]', "self.step = 0", "log"),
        ("a run that goes on keeps its first weights",
         "            load_state(module, contents.get(name), path)\n", "            pass\n", "log"),
        ("the encoder stays frozen", "run.step < config.freeze_epochs * run.steps_per_epoch)", "True)", "initial"),
        ("the encoder joins a step late", "(run.step < config.freeze", "(run.step <= config.freeze", "initial"),
        ("a run that goes on has the statistics of its data, not of its weights",
         "if config.init and resumed:", "if False:", "initial"),
        ("the gradients of the last step stay", "        run.optimizer.zero_grad()\n", "", "runs log"),
        ("one rank alone ends, the others wait",
         "        with ranks.hold_refusals():\n            complete(config, ranks.world)\n"
         "            if ranks.rank == 0:\n"
         "                refuse_unusable(Path(config.run), resuming=resumed is not None)\n        ranks.meet()\n",
         "        complete(config, ranks.world)\n        if ranks.rank == 0:\n"
         "            refuse_unusable(Path(config.run), resuming=resumed is not None)\n", "nothing_lost"),
        ("a run goes on from the checkpoint of its own node",
         "    if ranks.rank == 0:\n            found = read(", "    if True:\n            found = read(", "clusters"),
    ],
    "linear_probe.py": [
        ("what is held out is trained on too",
         'return take(train, kept), take(train, held),', 'return train, take(train, held),', "images"),
        ("the probe: gradients add up over the steps", "            optimizer.zero_grad()\n", "", "probe"),
        ("every epoch of the probe shows the same views",
         'key=("probe", fit.seed, epoch)', 'key=("probe", fit.seed)', "moves"),
        ("the probe's views do not move with the seed",
         'key=("probe", fit.seed, epoch)', 'key=("probe", epoch)', "moves"),
        ("the step schedule of pretraining", ", marks=(0.6, 0.75, 0.9), factor=0.2)", ")", "probe"),
        ("one rate for all cells", 'group["lr"] = lr * rate', 'group["lr"] = cells[0][0] * rate', "probe"),
        ("the mean over the cells", "(K * F.cross_entropy(", "(F.cross_entropy(", "probe"),
        ("the grid is fitted to what it is chosen on",
         "x_kept = x[kept]\n"
         "        fitted = fit_cells(lambda epoch: x_kept, labels[kept], ",
         "fitted = fit_cells(lambda epoch: x, labels, ", "probe"),
        ("the worst cell is chosen", "(top1, -nll) > best)", "(top1, -nll) < best)", "probe"),
        ("of cells that are as accurate the worst calibrated",
         "(top1, -nll) > best)", "(top1, nll) > best)", "probe_parts"),
        ("the classifier of standardised features", "biases[0] - (weight * centre).sum(1)", "biases[0]", "probe"),
        ("deviation of a feature that never moves",
         "torch.where(spread > 1e-6, spread, 1)", "spread.clamp(min=1e-6)", "probe"),
        ("augmented features are not standardised",
         "(augmented(epoch) - centre) / spread", "augmented(epoch)", "probe_parts"),
        ("a rate per 256 images per 1024",
         'per_256 * options["batch"] / 256', 'per_256 * options["batch"] / 1024', "defaults"),
        ("a recipe's probe is standardised",
         '{"nesterov": False, "standardize": False, "warmup": 0.0}', '{"nesterov": False, "warmup": 0.0}', "defaults"),
        ("a recipe overrides what is given", "if k not in given | bound}", "if k not in bound}", "defaults"),
        ("both views of the alignment alike", 'key=("geometry", seed, v)', 'key=("geometry", seed)', "probe"),
        ("the held-out test set is fitted to",
         "return take(train, kept), take(train, held)", "return train, take(train, held)", "images"),
    ],
    "robustness.py": [
        ("the noise of every severity alike", "NAMES.index(name), severity, k)", "NAMES.index(name), k)", "moves"),
        ("every five hundred images have the same noise",
         "NAMES.index(name), severity, k)", "NAMES.index(name), severity)", "moves"),
        ("every corruption draws the same noise",
         'generator("corrupt", self.seed, NAMES.index(name), severity, k)',
         'generator("corrupt", self.seed, severity, k)', "moves"),
        ("severities of CIFAR-10-C one off", "first = (severity - 1) * n", "first = severity % 5 * n", "robustness"),
        ("mCE is the ratio of the means",
         "sum(np.mean(e) / ALEXNET[name] for name, e in errors.items()) / len(errors)",
         "np.mean(list(errors.values())) / np.mean([ALEXNET[name] for name in errors])", "robustness"),
        ("relative mCE without AlexNet's clean error",
         "(ALEXNET[name] - ALEXNET_CLEAN)", "ALEXNET[name]", "robustness"),
        ("mCE of some corruptions",
         'if kind == "ImageNet-C" and len(errors) == len(NAMES):', 'if kind == "ImageNet-C":', "robustness"),
        ("accuracy by corruption, not by severity",
         "np.mean([e[s] for e in errors.values()])) for s",
         "np.mean(list(errors.values())[s % len(errors)])) for s", "robustness"),
        ("an interrupted test of other images is taken up",
         "if found | about == found:", "if found.keys() >= about.keys():", "robustness"),
        ("error is accuracy", "(scores.argmax(1) != labels)", "(scores.argmax(1) == labels)", "robustness"),
    ],
    "common/config.py": [
        ("an anchor's own views count as negatives",
         "return config.views * (config.batch - 1)", "return config.views * config.batch - 1", "defaults"),
        ("the rate per 256 images per 1024",
         "config.lr_per_256 * config.batch / 256", "config.lr_per_256 * config.batch / 1024", "defaults"),
        ("the ImageNet stem at 64 pixels", '"3x3" if size <= SMALL', '"3x3" if size < SMALL', "defaults"),
        ("batches of 256", "64 if light else 1024", "64 if light else 256", "defaults"),
        ("a resumed run may change its temperature",
         'MAY_CHANGE = {"epochs", ', 'MAY_CHANGE = {"epochs", "tau", ', "defaults"),
        ("the scale of a preset's loss goes with another loss",
         '"loss": {"tau", "loss_scale", ', '"loss": {"tau", ', "defaults"),
        ("a preset's rate beats one that is given per 256 images", '    "lr_per_256": {"lr"},\n', "", "defaults"),
        ("the default rate at any batch", "lr=objective.lr * config.batch / 1024", "lr=objective.lr", "defaults"),
        ("the loss is scaled by tau",
         "config.tau / 0.07 if objective.scaled", "config.tau if objective.scaled", "defaults"),
        ("ten epochs of warm-up in any run", "warmup=min(10.0, config.epochs / 10)", "warmup=10.0", "defaults"),
        ("warm-up from above the peak", "warmup_from=min(0.01, config.lr)", "warmup_from=0.01", "defaults"),
        ("decay of 1e-3", "option(1e-4, NOT_NEGATIVE", "option(1e-3, NOT_NEGATIVE", "defaults"),
        ("a run goes on with fewer images",
         "require(len(data.labels) == images,", "require(len(data.labels) <= images,", "defaults"),
        ("images without classes in equal numbers of each",
         '"--balanced" if config.balanced else ""', '""', "images"),
    ],
    "common/corruptions.py": [
        ("zooms that are not arange's", "1 + k * ((1 + step) - 1)", "1 + k * step", "corruptions"),
        ("no JPEG files above 64 pixels", "if as_files and not is_small", "if False", "corruptions"),
        ("severities from 0", "[name][severity - 1]", "[name][severity % 5]", "corruptions"),
        ("rounded, not cut off",
         "(x.clamp(0, 1) * 255).to(torch.uint8)", "(x.clamp(0, 1) * 255).round().to(torch.uint8)", "corruptions"),
        ("variance for deviation", "x + c * torch.randn", "x + c**2 * torch.randn", "corruptions"),
        ("impulses all white", "torch.where(hit, white.float(), x)", "torch.where(hit, 1.0, x)", "corruptions"),
        ("contrast about the mean of the batch",
         "mean = x.mean((2, 3), keepdim=True)", "mean = x.mean()", "corruptions"),
        ("brightness added to every channel",
         "torch.where(value > 0, x * raised / value.clamp(min=1e-6), raised)", "(x + c).clamp(max=1)", "corruptions"),
        ("zoom blur without the image itself", "total / (count + 1)", "total / count", "corruptions"),
        ("shot noise of another exposure",
         "torch.poisson(x * c, generator=g) / c",
         "torch.poisson(x * c, generator=g) / c + x - x.mean()", "corruptions"),
        ("pixelated by the default filter", '{"interpolation": InterpolationMode.BOX}', "{}", "corruptions"),
        ("ImageNet-C's displacements at 224 pixels", "H * 244 / 224", "H", "corruptions"),
        ("64 pixels are large",
         "is_small = images.shape[-1] <= PIXELS_OF_SMALL",
         "is_small = images.shape[-1] < PIXELS_OF_SMALL", "corruptions"),
    ],
    "common/data.py": [
        ("other data on another node are trained on", "    if not unlike:\n", "    if True:\n", "clusters"),
        ("the labels of another node may be others",
         'f"{name} of the class {data.classes[label]}"', 'f"{name}"', "clusters"),
        ("keys of one sum share a stream",
         "SeedSequence([len(key), *halves])", "SeedSequence([len(key), sum(halves)])", "moves"),
        ("short keys are filled up with zeros", "SeedSequence([len(key), *halves])", "SeedSequence(halves)", "moves"),
        ("streams of 32 bits",
         "    state[MT19937].view(torch.int64)[:] = torch.from_numpy(drawn.generate_state(624).astype(np.int64))\n", "",
         "moves"),
        ("a small class loses its last image in a part",
         "m[: max(1, round(fraction * len(m)))]", "m[: round(fraction * len(m))]", "labels"),
        ("noise may leave the label",
         "torch.randint(1, max(num_classes, 2)", "torch.randint(0, max(num_classes, 2)", "labels"),
        ("the first images of a folder are of its first class",
         'torch.randperm(len(folder.files), generator=generator("folder"))[:limit]',
         "torch.arange(len(folder.files))[:limit]", "data"),
        ("labels of a smaller test set by its own list", "labels=places[test.labels]", "labels=test.labels", "images"),
        ("rows and columns of CIFAR exchanged",
         "torch.from_numpy(d.data).permute(0, 3, 1, 2)", "torch.from_numpy(d.data).permute(0, 3, 2, 1)", "data"),
        ("the test set of SVHN is its training set", 'split="train" if train else "test"', 'split="train"', "data"),
        ("deviation of CIFAR-100 for CIFAR-10", "(0.2023, 0.1994, 0.2010)", "(0.2675, 0.2565, 0.2761)", "data"),
        ("deviation is the variance", ".sum(1).sqrt()", ".sum(1)", "data"),
        ("a part of a stream keeps the sample of the whole",
         "data.images[rows[rows < len(data.images)]]", "data.images[: len(rows)]", "labels"),
        ("the test images are training images",
         "shapes(min(10_000 if train else 2_000, limit or 10_000), size or 32, seed=int(train))",
         "shapes(min(10_000 if train else 2_000, limit or 10_000), size or 32, seed=1)", "data"),
        ("every block of shapes alike", 'generator("shapes", seed, k)', 'generator("shapes", seed)', "data"),
    ],
    "common/frozen.py": [
        ("a classifier of bytes in floats", "if not 0 <= low <= high <= 1:", "if False:", "probe"),
        ("a classifier of images of any size", "x.shape[-3:] != (3, H, H)", "x.shape[-3] != 3", "probe"),
        ("every five hundred images have the same views",
         "generator(*key, k), crop_min", "generator(*key), crop_min", "moves"),
        ("every image of a stream has the same view", "(row, *key, row) if key", "(row, *key) if key", "probe_parts"),
        ("the probe crops by the default", 'frozen.config.get("crop_min", 0.2)', "0.2", "probe_parts"),
        ("the encoder's batch norm in training",
         "self.eval().requires_grad_(False)", "self.requires_grad_(False)", "probe_parts"),
        ("saved z is as the head leaves it", "return lambda r: F.normalize(projection(r)) if",
         "return lambda r: projection(r) if", "probe"),
        ("saved labels are those of the other set", '"test", test, r_test.cpu())', '"test", train, r_test.cpu())',
         "probe"),
        ("the untrained encoder is the trained one",
         "return Frozen(encoder, frozen.mean", "return Frozen(frozen.encoder, frozen.mean", "probe_parts"),
        ("r is not brought to norm 1", "return F.normalize(r) if self.unit else r", "return r", "probe_parts"),
    ],
    "common/images.py": [
        ("all of a large image, not its middle", "size * 8 // 7 if size > SMALL else size", "size", "data"),
        ("one end of a thin image goes", "== long else 2, end, long", "== long else 2, 0, long", "images"),
        ("a thin image moves by a pixel", "// 4 * 2 * short", "// 2 * short", "images"),
        ("nothing is thin", "THIN = 64 ", "THIN = 10**6 ", "images"),
        ("every image is thin", "THIN = 64 ", "THIN = 1 ", "images"),
        ("16 bits are clipped", "return in_8_bits(image).convert(", "return image.convert(", "images"),
        ("12 bits are darkened", "values >> tags.get(BITS, (16,))[0] - 8", "values >> 8", "images"),
        ("white is 0 and is seen black", "tags.get(WHITE_IS_ZERO) == 0", "tags.get(WHITE_IS_ZERO) == 2", "images"),
        ("the transparent grey of 16 bits is seen", 'image.info.get("transparency", -1)', "-1", "images"),
        ("the transparent colour of other depths is seen",
         "unpack = UNPACKED.get(image.tile[0][3], lambda colour: colour)", "unpack = lambda colour: colour", "images"),
        ("numbers of no known range are clipped", 'if image.mode in ("I", "F"):', 'if image.mode == "F":', "images"),
        ("transparency is dropped",
         'Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")', 'image.convert("RGB")', "images"),
        ("transparency on black", 'Image.new("RGBA", image.size, "white")',
         'Image.new("RGBA", image.size, "black")', "images"),
        ("orientation is ignored", "if not TURNS.isdisjoint(image.info):", "if False:", "images"),
        ("orientation of JPEGs alone", 'TURNS = {"exif", ', 'TURNS = {"photoshop", ', "images"),
        ("damaged EXIF data are refused", "contextlib.suppress(Exception)", "contextlib.nullcontext()", "images"),
        ("a huge image is to be mended",
         "except Image.DecompressionBombError as e:", "except ZeroDivisionError as e:", "images"),
        ("a drawing runs a program", '"MPEG", "EPS", "WMF"}', '"MPEG", "WMF"}', "images"),
        ("hidden names are classes", 'not name.startswith(".") and name', "name", "images"),
        ("what a system leaves is a class", ' and name not in NO_NAMES', "", "images"),
        ("endings in capitals are left out",
         "os.path.splitext(path)[1].lower()", "os.path.splitext(path)[1]", "images"),
        ("a folder is visited by every name",
         "visited = {identity(root), *map(identity, places)}", "visited = set()", "images"),
        ("folders in the order of the visit", "in sorted(walk(place, visited)):", "in walk(place, visited):", "images"),
        ("the last file first",
         "in sorted(filter(is_meant, names)))", "in sorted(filter(is_meant, names), reverse=True))", "images"),
        ("what is left out is not said", "    if left_out:\n        say(", "    if False:\n        say(", "images"),
        ("a class may be empty", "    if empty:\n", "    if empty and not files:\n", "images bad_input"),
        ("two classes of one folder", "        if other != name:\n", "        if False:\n", "images"),
    ],
    "common/initial.py": [
        ("weights of other shapes start fresh", "unlike != fresh and", "False and", "initial"),
        ("what the weights have besides is passed over", 'besides and f"it has', 'False and f"it has', "initial"),
        ("what the weights lack starts fresh", 'lacking and f"it lacks', 'False and f"it lacks', "initial"),
        ("a prefix is not looked for", 'PREFIXES = "", "module.", ', 'PREFIXES = "", ', "initial"),
        ("images are normalised by another deviation", "(0.229, 0.224, 0.225)", "(0.247, 0.244, 0.262)", "initial"),
        ("the weights are read and not taken",
         "encoder.load_state_dict(own | taken)", "encoder.load_state_dict(own)", "initial"),
    ],
    "common/journal.py": [
        ("saves after seconds, not minutes", "> 60 * self.config.save_minutes", "> self.config.save_minutes", "log"),
        ("weights that are not finite are saved",
         "if not all(entry.isfinite().all()", "if not all(not entry.isnan().all()", "keeping"),
        ("the mean loss is the last one", "math.fsum(losses) / len(losses)", "losses[-1]", "log"),
        ("the mean loss of all epochs", "        self.losses = Losses(())\n", "", "log"),
        ("the seconds before a break are forgotten", 'resumed["seconds"] if resumed else 0.0', "0.0", "log"),
        ("saves after every step once its minutes have passed",
         "self.clock = self.saved_at = time.perf_counter()\n"
         "\n"
         "    def close", "self.clock = time.perf_counter()\n\n    def close", "log"),
        ("TensorBoard shows what a break undid", "purge_step=run.step + 1", "purge_step=None", "progress"),
        ("steps counted as epochs from 0",
         "math.ceil(run.step / run.steps_per_epoch)", "run.step // run.steps_per_epoch", "log"),
        ("images a second of all steps", "/ (self.seconds - self.seconds_before)", "/ self.seconds", "log"),
        ("only the last step of an epoch is logged",
         "if ends_epoch or run.step % self.config.log_every == 0:", "if ends_epoch:", "log"),
        ("a loss that is not finite is logged", "if not math.isfinite(value)]", "if math.isnan(value)]", "keeping"),
        ("the losses before a break are forgotten",
         'Losses(resumed.get("losses_of_epoch", ()) if resumed else ())', "Losses(())", "log"),
    ],
    "common/labels.py": [
        ("val is mixed into the test set", "if split == wanted]", "if split in SPLITS[train]]", "label_files"),
        ("a path twice counts twice", "if path in first:", "if False:", "label_files"),
        ("paths are compared as they are written", "os.path.normpath(cells[0])", "cells[0]", "label_files"),
        ("the mark of UTF-8 belongs to the first name", '"utf-8-sig"', '"utf-8"', "label_files"),
        ("any split is one", "if split not in SPLITS[True] + SPLITS[False]:", "if False:", "label_files"),
    ],
    "common/metrics.py": [
        ("bins [a, b)",
         "(confidence * bins).ceil().long().clamp(1, bins) - 1",
         "(confidence * bins).long().clamp(max=bins - 1)", "metrics"),
        ("calibration error is the mean over the bins",
         "(count * (table[:, 2] - table[:, 1]).abs()).sum() / len(labels)",
         "(table[:, 2] - table[:, 1]).abs().mean()", "metrics"),
        ("overconfident bins cancel underconfident ones",
         "(table[:, 2] - table[:, 1]).abs()", "(table[:, 2] - table[:, 1])", "metrics"),
        ("accuracy of a class over what is taken for it",
         "(100 * table.diagonal() / images.clamp(min=1))",
         "(100 * table.diagonal() / table.sum(0).clamp(min=1))", "metrics"),
        ("retrieval: a row finds itself",
         "        s[torch.arange(len(rows), device=s.device), rows] = -torch.inf\n", "", "metrics"),
        ("retrieval: precision beyond the R nearest", " & (rank <= R[rows, None])", "", "metrics"),
        ("retrieval: precision of what is wrong too", "(hits * precision).sum(1)", "precision.sum(1)", "metrics"),
        ("retrieval: raw rows", "z, R = F.normalize(features),", "z, R = features,", "metrics"),
        ("retrieval: rows alone in their class are asked for", "asked, found = torch.nonzero(R).squeeze(1), []",
         "asked, found = torch.arange(len(R)), []", "metrics"),
        ("confusions transposed", "labels * n + scores.argmax(1)", "scores.argmax(1) * n + labels", "metrics"),
        ("neighbours without normalisation", "bank, right = F.normalize(bank), 0", "right = 0", "metrics"),
        ("every neighbour has one vote", "((s - 1) / tau).exp())", "torch.ones_like(s))", "metrics"),
        ("the temperature multiplies",
         "scores / log_t.clamp(-7, 7).exp()", "scores * log_t.clamp(-7, 7).exp()", "metrics"),
        ("one class less is looked at",
         "scores.topk(min(k, scores.shape[1])", "scores.topk(min(k, scores.shape[1] - 1)", "metrics"),
        ("twenty neighbours", "query_labels, k=200, tau=0.07", "query_labels, k=20, tau=0.07", "metrics"),
        ("a class without images has an accuracy",
         "for name, share, count in shares if count}", "for name, share, count in shares}", "metrics"),
    ],
    "common/models.py": [
        ("the same first weights at every seed", "torch.manual_seed(config.seed)", "torch.manual_seed(0)", "moves"),
        ("--normalize-encoder does nothing", "unit_r=config.normalize_encoder", "unit_r=False", "objectives"),
        ("--ce-detach does nothing", "detach=config.ce_detach", "detach=False", "objectives"),
        ("z of n-pair on the sphere", "unit=objective.unit", "unit=True", "objectives"),
        ("hidden layers as wide as z",
         '[r if width == "r" else int(width)', '[128 if width == "r" else int(width)', "objectives published"),
        ("neighbours under the batch's statistics", "    encoder.eval()\n    parts", "    parts", "log"),
        ("the encoder stays in evaluation after a diagnosis", "encoder.train(was_training)", "encoder.eval()", "log"),
        ("the head ends with a ReLU", "nn.Sequential(*layers[:-1])", "nn.Sequential(*layers)", "objectives published"),
        ("z is not normalised", "z = F.normalize(z) if self.unit else z", "pass", "objectives"),
        ("the classifier scores z",
         "self.classifier(r.detach() if self.detach else r)",
         "self.classifier(F.normalize(r).detach() if self.detach else F.normalize(r))", "objectives"),
        ("ResNet-200 in torchvision's other depths", "[3, 24, 36, 3]", "[3, 8, 36, 3]", "model"),
        ("the momentum encoder follows at once",
         "mine.lerp_(theirs, 1 - self.momentum)", "mine.lerp_(theirs, self.momentum)", "queue"),
        ("the queue keeps the oldest",
         "torch.cat([self.z, z])[-self.size :]", "torch.cat([self.z, z])[: self.size]", "queue"),
        ("the momentum encoder is the model itself",
         "self.model = copy.deepcopy(model).requires_grad_(False)", "self.model = model", "queue"),
        ("a frozen encoder's statistics move", "self.encoder.train(not is_frozen)", "pass", "initial"),
        ("a frozen encoder gets a gradient", "torch.no_grad() if self.is_frozen else", "", "initial"),
        ("the first layer is taken off, not the last",
         "isinstance(m, (nn.Linear, nn.Conv2d))][-1]", "isinstance(m, (nn.Linear, nn.Conv2d))][0]", "model"),
        ("any size is taken", "encoder.eval(), on_meta, torch.empty(1, 3, size, size,",
         "encoder.eval(), on_meta, torch.empty(1, 3, 32, 32,", "encoders"),
        ("the 3x3 stem keeps its pooling", "        net.maxpool = nn.Identity()\n", "", "model"),
        ("both passes move the running statistics",
         "        norm.track_running_stats = False\n", "        pass\n", "objectives"),
    ],
    "common/objectives.py": [
        ("every triplet is semi-hard", ", mining=config.mining)", ")", "objectives"),
        ("N-pair: halves for pairs", "grouped_n_pair(z[0::2], z[1::2]", "grouped_n_pair(*z.chunk(2)", "objectives"),
        ("N-pair: the norm's mean over the columns too", "z.square().sum(1).mean()", "z.square().mean()", "objectives"),
        ("cross-entropy alone is not smoothed",
         "        return cross_entropy(logits, y, config.label_smoothing)\n"
         "    loss =", "        return cross_entropy(logits, y)\n    loss =", "objectives"),
        ("the weights of both losses exchanged",
         "(1 - config.ce_weight) * loss + config.ce_weight *",
         "config.ce_weight * loss + (1 - config.ce_weight) *", "model objectives"),
        ("collapse among N, not N - 1",
         "config.loss_scale * math.log(rows - 1)", "config.loss_scale * math.log(rows)", "model"),
        ("the floor of balanced batches is that of the data",
         "if config.balanced else share", "if not config.balanced else share", "objectives"),
        ("NT-Xent numbers images row by row",
         "images.repeat(config.views), config.tau", "images.repeat_interleave(config.views), config.tau", "objectives"),
        ("supcon-in is supcon", 'queue=queue, variant="in", denom', 'queue=queue, denom', "objectives"),
        ("the margin of max-margin is triplet's",
         "Objective(max_margin, margin=1.0)", "Objective(max_margin, margin=0.2)", "objectives"),
        ("the loss is not scaled", "loss = config.loss_scale * contrast(", "loss = contrast(", "model objectives"),
        ("the floor counts images, not rows", "p = (rows * share - 1)", "p = (config.batch * share - 1)", "model"),
        ("corners at right angles", "-(1 + 1 / max(len(share) - 1, 1))", "-(1 + 0)", "model"),
        ("the floor without the weights of the classes",
         "least = share @ (p + others).log()", "least = (p + others).log().mean()", "objectives"),
        ("SimCLR's tau is SupCon's", "Objective(nt_xent, tau=0.5", "Objective(nt_xent, tau=0.1", "published defaults"),
        ("the hard loss keeps all negatives",
         "losses.hard_contrastive(z, config.tau, config.nearest,",
         "losses.hard_contrastive(z, config.tau, 10**6,", "objectives"),
        ("the simple loss keeps all negatives", ", k=config.nearest)", ")", "objectives"),
        ("triplets are scaled by tau",
         "Objective(triplet, margin=0.2)", "Objective(triplet, margin=0.2, lr=0.1)", "published defaults"),
    ],
    "common/optim.py": [
        ("logistic regression: the decay of V", "(V @ whiten).square()", "V.square()", "optimisers"),
        ("logistic regression without its whitening's inverse",
         "return (V @ whiten).detach()", "return V.detach()", "optimisers"),
        ("logistic regression stops after three steps", "ITERATIONS = 100", "ITERATIONS = 3", "optimisers"),
        ("cosine to 0",
         "1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * t)) / 2", "(1 + math.cos(math.pi * t)) / 2", "optimisers"),
        ("half a period of the cosine", "math.cos(math.pi * t)", "math.cos(math.pi * t / 2)", "optimisers"),
        ("steps after their marks",
         "sum(t >= mark for mark in marks)", "sum(t > mark for mark in marks)", "optimisers"),
        ("the exponential decays every epoch",
         "math.floor(2 * max(epoch, 0))", "math.floor(max(epoch, 0))", "optimisers"),
        ("the exponential decays during the warm-up",
         "step / steps_per_epoch - config.warmup", "step / steps_per_epoch", "optimisers"),
        ("LARS: the ratio upside down", 'group["eta"] * a / b', 'group["eta"] * b / a', "optimisers"),
        ("LARS: the decay outside the ratio's norm",
         "a, b = w.norm(), g.norm()", "a, b = w.norm(), w.grad.norm()", "optimisers"),
        ("LARS: the rate outside the momentum",
         'v.mul_(group["momentum"]).add_(group["lr"] * ratio * g)\n'
         "                w.sub_(v)", 'v.mul_(group["momentum"]).add_(ratio * g)\n'
         '                w.sub_(group["lr"] * v)', "optimisers"),
        ("RMSProp: epsilon outside the root", '(s + group["eps"]).sqrt()', '(s.sqrt() + group["eps"])', "optimisers"),
        ("RMSProp: the mean square from 0",
         '"square": torch.ones_like(w)', '"square": torch.zeros_like(w)', "optimisers"),
        ("LARS of the default momentum",
         "return LARS(groups, lr, config.momentum)", "return LARS(groups, lr)", "optimisers"),
        ("no Nesterov", ", nesterov=config.nesterov)", ")", "optimisers"),
        ("the rate is logged but not taken", '        group["lr"] = lr\n', "        pass\n", "log"),
        ("warm-up to the peak, not to the schedule's value",
         "(planned - config.warmup_from) * step / warm",
         "(config.lr - config.warmup_from) * step / warm", "optimisers"),
    ],
    "common/presets.py": [
        ("cifar10-supcon: crops of 0.08",
         'SIM = {"augment": "sim", "crop_min": 0.2', 'SIM = {"augment": "sim", "crop_min": 0.08', "published"),
        ("half the colours",
         '"crop_min": 0.2, "jitter": 0.5}  # colour', '"crop_min": 0.2, "jitter": 0.25}  # colour', "published"),
        ("imagenet: crops of 0.2", '"stream": True, "crop_min": 0.08', '"stream": True, "crop_min": 0.2', "published"),
        ("cifar: the stem of ImageNet",
         '"arch": "resnet50", "stem": "3x3"', '"arch": "resnet50", "stem": "7x7"', "published"),
        ("queue: a momentum of 0.99", '"momentum_encoder": 0.999', '"momentum_encoder": 0.99', "published"),
        ("SimCLR scaled as SupCon", '"loss_scale": 0.5 / 0.07', '"loss_scale": 0.1 / 0.07', "published"),
        ("the probe decays",
         '"batch": 512, "weight_decay": (0.0,)', '"batch": 512, "weight_decay": (1e-4,)', "published"),
        ("one momentum for all",
         "PROBE_IMAGENET = {\n"
         '    "optimizer": "rmsprop", "momentum": 0.9', "PROBE_IMAGENET = {\n"
         '    "optimizer": "rmsprop", "momentum": 0.99', "published"),
        ("z of 64 numbers", '\nHEAD = {"projection": "r-128"}', '\nHEAD = {"projection": "r-64"}', "published"),
        ("solo-learn's head as wide as its encoder", '"projection": "2048-256"', '"projection": "r-256"', "published"),
    ],
    "common/run_folder.py": [
        ("a report of other data is overwritten",
         "isinstance(found, dict) and found | about == found", "isinstance(found, dict)", "images"),
        ("the log loses the checkpoint's own step", "if step_of(line) > step:", "if step_of(line) >= step:", "log"),
        ("half a line stays in the log",
         'if line.endswith(b"\\n") else math.inf', 'if line.endswith(b"}\\n") else 0', "keeping"),
        ("no checkpoint before this one is kept", ", contents, previous)", ", contents)", "log"),
        ("a checkpoint is written in place", 'aside = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")', "aside = path", "keeping"),
        ("two writers share a file aside", "{uuid.uuid4().hex}", "", "keeping"),
        ("a second writer is let in where there are no locks",
         "if holder and holder != me:", "if False:", "keeping"),
        ("a dead process keeps its folder", 
         'return holder if runs(holder["process"]) else None', "return holder", "keeping"),
        ("a file that could not be written stays beside",
         "        aside.unlink(missing_ok=True)\n", "        pass\n", "keeping"),
        ("a checkpoint may run code",
         'map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)', "keeping"),
        ("any file of torch's is a checkpoint",
         'contents.get("format") != form', 'contents.get("format") is None', "keeping"),
        ("a checkpoint may lack what is needed",
         'if wrong:\n        raise Refused(f"{path} is not a', "if len(wrong) == len(entries):\n"
         '        raise Refused(f"{path} is not a', "keeping"),
        ("a folder with steps is begun anew", '["step"] > 0 for path', '["step"] > 99 for path', "keeping"),
        ("the damaged checkpoint takes the good one's place",
         'os.replace(newest, self.path / "ckpt-damaged.pt")', "pass", "keeping"),
        ("the earlier parts of a run are forgotten", 'return before.get("earlier", []) + [', "return [", "keeping"),
    ],
    "common/views.py": [
        ("the row and the column of a crop from one number",
         "uniform(0, 1, 2) * (size - sides + 1)", "uniform(0, 1, 1) * (size - sides + 1)", "views"),
        ("a crop never reaches the last row or column",
         "(size - sides + 1)).floor()", "(size - sides)).floor()", "views"),
        ("aspect ratios uniform, not log-uniform",
         "uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()", "uniform(3 / 4, 4 / 3, 10)", "views"),
        ("crops of at least a fifth whatever is asked",
         "area = uniform(crop_min, 1, 10)", "area = uniform(0.2, 1, 10)", "views"),
        ("one flip for all images",
         "flip = uniform(0, 1) < 0.5", "flip = (uniform(0, 1) < 0.5)[:1].expand(n)", "views"),
        ("flipped before the crop, not after", "columns.flip(1), columns)", "columns.flip(2), columns)", "views"),
        ("the flip and grey from one number",
         "gray = uniform(0, 1) < 0.2", "gray = flip & (uniform(0, 1) < 0.4)", "views"),
        ("colours left alone in 2 of 10 images, not changed in 8",
         "colours[uniform(0, 1) >= 0.8]", "colours[uniform(0, 1) >= 0.2]", "views"),
        ("all colours by the first factor",
         "view.jitter[:, j, None, None, None]", "view.jitter[:, 0, None, None, None]", "views"),
        ("no image turns grey", "x = torch.where(view.gray[:, None, None, None], luma(x), x)", "pass", "views"),
        ("small images are blurred", "* (uniform(0, 1) < 0.5) * (size > SMALL)", "* (uniform(0, 1) < 0.5)", "views"),
        ("blur by one sigma for all images",
         "x = torch.where(view.sigma[:, None, None, None] > 0, blur(x, view.sigma), x)",
         "x = blur(x, view.sigma[:1].expand(len(x)))", "views"),
        ("saturation against the mean of the image",
         "return blend(x, luma(x), factor)", "return blend(x, luma(x).mean((2, 3), keepdim=True), factor)", "views"),
        ("divided by the variance", "/ std.view(3, 1, 1)", "/ std.view(3, 1, 1) ** 2", "views"),
        ("workers crop by their default", "scale=(crop_min, 1)", "scale=(0.2, 1)", "views"),
        ("stacked RandAugment at the usual strength",
         "transforms.RandAugment(magnitude=30)", "transforms.RandAugment()", "views"),
        ("a worker's view from its row alone",
         "torch.set_rng_state(generator(*key).get_state())", "torch.manual_seed(row)", "views"),
        ("mixing drawn from the global generator",
         "        torch.set_rng_state(g.get_state())\n"
         "        return mix", "        return mix", "moves"),
        ("the classes go round in one order",
         "return rounds[:, torch.randperm(len(groups), generator=g)].flatten()[:n]",
         "return rounds.flatten()[:n]", "moves"),
        ("pairs of two classes",
         "m[: len(m) // 2 * 2].view(-1, 2)", "m[: len(m) // 2 * 2].view(2, -1).T.roll(1, 0)[:, [0, 0]]", "labels"),
        ("every epoch shows the same views",
         '("views", config.seed, epoch, position, v) for', '("views", config.seed, position, v) for', "moves"),
        ("every step of an epoch draws the same views",
         '("views", config.seed, epoch, position, v) for', '("views", config.seed, epoch, v) for', "moves"),
        ("both views of an image alike",
         '("views", config.seed, epoch, position, v) for', '("views", config.seed, epoch, position) for', "moves"),
        ("views do not move with the seed",
         '("views", config.seed, epoch, position, v) for', '("views", epoch, position, v) for', "moves"),
        ("workers crop by the default",
         "WorkerViews(data, config.augment, config.crop_min)", "WorkerViews(data, config.augment)", "moves"),
        ("crops by the default", '"crop_min": config.crop_min, "jitter"', '"crop_min": 0.2, "jitter"', "moves"),
        ("colours by the default", '"jitter": config.jitter}', '"jitter": 0.5}', "moves"),
        ("hue as strong at any jitter", "uniform(-0.2 * jitter, 0.2 * jitter, 1)", "uniform(-0.2, 0.2, 1)", "views"),
        ("workers: every epoch shows the same views",
         'config.seed, epoch, position, v, place) for', 'config.seed, position, v, place) for', "moves"),
        ("workers: both views of an image alike",
         'config.seed, epoch, position, v, place) for', 'config.seed, epoch, position, place) for', "moves"),
        ("workers: a view by its place in the part",
         "for row, place in part]", "for place, (row, _) in enumerate(part)]", "moves"),
        ("workers: a run that goes on reads from the epoch's beginning",
         "enumerate(rows_of_steps.tolist(), first)", "enumerate(rows_of_steps.tolist())", "moves"),
        ("images cropped in workers are cropped again", "crop=not in_workers)", "crop=True)", "moves"),
        ("every epoch in the same order",
         'generator("order", config.seed, epoch)', 'generator("order", config.seed)', "moves"),
        ("order by the seed of all runs",
         'generator("order", config.seed, epoch)', 'generator("order", epoch)', "moves"),
        ("every epoch mixes alike",
         'generator("mix", seed, *step, v, ', 'generator("mix", seed, step[1], v, ', "moves"),
        ("two passes over a part drop other paths", "        self.seed_layers()\n        sources", "        sources",
         "encoders"),
        ("every part drops the same paths", 'generator("layers", *self.key, self.start)',
         'generator("layers", *self.key)', "encoders"),
        ("both views are mixed alike",
         'generator("mix", seed, *step, v, ', 'generator("mix", seed, *step, ', "moves"),
        ("a run that goes on shows the first steps of its epoch again",
         "rows = order[first:, mine]", "rows = order[: steps - first, mine]", "moves"),
        ("a rank shows the first rank's images",
         "mine = slice(ranks.rank * share, (ranks.rank + 1) * share)", "mine = slice(0, share)", "moves runs"),
    ],
    "experiments/cells.py": [
        ("a cell that has its result runs again", "if done or only not in name", "if only not in name", "experiments"),
        ("a line that was cut off is a result", ' for line in lines if line.endswith("\\n")]', " for line in lines]",
         "experiments"),
        ("the next result is glued to such a line", "    drop_cut_off_line(path)\n    for", "    for", "experiments"),
        ("one that is trained and not probed is stuck", "        elif not is_trained(folder):\n",
         "        else:\n", "experiments"),
        ("a training that was stopped is probed", "if not (diverged or is_trained(folder)):", "if False:",
         "experiments"),
        ("one standard error decides", "STUDENT.get(len(a) + len(b) - 2, 2.571) * error", "error", "experiments"),
        ("the deviation for the standard error",
         "statistics.variance(first) / len(first) +", "statistics.variance(first) +", "experiments"),
        ("views are not counted", "round(2 * times * scale.epochs / views)", "round(2 * times * scale.epochs)",
         "experiments"),
        ("the untrained model is trained", "model.named_children() if trained else ()", "model.named_children()",
         "experiments"),
    ],
    "experiments/temperature.py": [
        ("an image is its own negative", ".fill_diagonal_(-torch.inf).topk", ".topk", "experiments"),
    ],
    "experiments/gradient_anatomy.py": [
        ("X of L_out for L_in", '1 / count if variant == "out" else (s / tau - log_positives).exp()', "1 / count",
         "experiments"),
        ("a negative has an X", "(P - p * X)", "(P - X)", "experiments"),
    ],
    "tests/oracles.py": [
        ("oracle: bins [a, b)",
         "(m - 1) / bins < max(p[i]) <= m / bins", "(m - 1) / bins <= max(p[i]) < m / bins", "metrics"),
        ("oracle: neighbours of raw rows", "q @ b / np.linalg.norm(q) / np.linalg.norm(b)", "q @ b", "metrics"),
        ("oracle: the clean error once for all severities",
         "{c: [e - clean for e in errors[c]] for c in errors}",
         "{c: [e - clean / 5 for e in errors[c]] for c in errors}", "robustness"),
    ],
    "common/ranks.py": [
        ("a refusal is not agreed on",
         "        if speaker:\n", "        if self.refusal:\n", "nothing_lost"),
        ("what one rank is asked, the others do not hear",
         "dist.all_reduce(held, dist.ReduceOp.MAX)", "pass", "nothing_lost"),
        ("views of two ranks one rank after the other",
         "return losses.all_gather_rows(by_image).transpose(0, 1).flatten(0, 1)",
         "return losses.all_gather_rows(rows)", "runs"),
    ],
    "common/cli.py": [
        ("a second signal ends the run at once",
         "self.end = self.end or number", "self.end = number if not self.end else sys.exit(1)", "keeping"),
        ("a stopped run ends with status 0", "super().__init__(128 + number)", "super().__init__(0)", "nothing_lost"),
        ("words are glued to the terminal's line", "    if is_first():\n        clear_line()\n        write(words, ",
         "    if is_first():\n        write(words, ", "progress"),
        ("a shorter line leaves the end of a longer one", '" " * len(standing) + "\\r"', '"\\r"', "progress"),
        ("what a user can put right ends with status 1", "    sys.exit(2)\n", "    sys.exit(1)\n", "bad_input"),
    ],
}


def first_failure(tests, file=None, old=None, new=None):
    """The first test to fail with `new` for `old` in the file, "" if all pass, None if they did not run."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (PROJECT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / name, folder / name)
        if file:
            (folder / file).write_text((folder / file).read_text().replace(old, new))
        with (folder / "tests" / "conftest.py").open("a") as conftest:
            conftest.write(SAME_EXAMPLES)
        process = os.fork()
        if process == 0:
            run_pytest(folder, tests)
        _, status = os.waitpid(process, 0)
        output = (folder / "output").read_text()
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?::.*?)(?: - .*)?$", output, re.MULTILINE)
    return failed[1] if failed else "" if status == 0 else None


def run_pytest(folder, tests):
    """And end. In a process that has torch already: importing it takes longer than most of the tests."""
    code = 1
    try:
        os.chdir(folder)
        with open("output", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        paths = [f"tests/test_{name}.py" for name in tests.split()]
        code = int(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *paths]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def caught_by(file, name, old, new, tests):
    """(caught, what is said of it)."""
    count = (PROJECT / file).read_text().count(old)
    if count != 1:
        return False, f"TEXT FOUND {count} TIMES"
    failure = first_failure(tests, file, old, new)
    return bool(failure), failure or ("NOT CAUGHT" if failure == "" else "TESTS DID NOT RUN")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="WORD", default="", help="Mistakes whose name or file contains the word.")
@click.option("--file", "one_file", metavar="FILE", help="Mistakes of this file.")
def main(only, one_file):
    """Plants mistakes and shows which test catches each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    chosen = [(file, *mistake) for file, mistakes in MISTAKES.items() if one_file in (None, file)
              for mistake in mistakes if only in file or only in mistake[0]]
    if not chosen:
        sys.exit("no mistake is so called")
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        needed = sorted({name for *_, tests in chosen for name in tests.split()})
        for name, failure in zip(needed, pool.map(first_failure, needed)):
            if failure != "":
                pool.shutdown(cancel_futures=True)
                sys.exit(f"tests/test_{name}.py fails without any mistake: {failure or 'it does not run'}")
        caught = 0
        for (file, name, *_), (found, words) in zip(chosen, pool.map(lambda mistake: caught_by(*mistake), chosen)):
            print(file, name, words, sep=" | ", flush=True)
            caught += found
    print(f"{caught} of {len(chosen)} caught")
    sys.exit(caught < len(chosen))


if __name__ == "__main__":
    main()
