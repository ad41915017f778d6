"""What rank 0 writes of a run: the log, the progress line, the checkpoints."""

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import torch

from common.cli import NotFinite, Refused, on_terminal, say, say_in_place
from common.objectives import collapse_and_floor
from common.optim import learning_rate
from common.run_folder import RunFolder, describe_run
from common.views import are_made_in_workers


def open_journal(run, data, test, ranks, resumed):
    """Rank 0's Journal, and the first lines of the run; None on the other ranks."""
    if ranks.rank > 0:
        return None
    collapse, floor = collapse_and_floor(run.config, data.labels)
    journal = Journal(run, ranks.world, resumed, collapse, floor)
    announce(run, data, test, ranks.world)
    if collapse:
        say(f"the loss is {collapse:.4f} when all features collapse to one; its floor is about {floor:.4f}")
    if resumed:
        lr = learning_rate(run.config, run.step, run.steps_per_epoch)
        say(f"going on from step {run.step} of {run.total_steps} at a learning rate of {lr:.4g}")
        if resumed["config"] != dataclasses.asdict(run.config):
            journal.save_changes(run, lr)
    return journal


def announce(run, data, test, world):
    config = run.config
    size = data.images.shape[-1]
    weights = sum(p.numel() for p in run.model.encoder.parameters()) / 1e6
    stem = f"{config.stem} stem, " if config.stem else ""
    precision = f"{str(run.autocast).removeprefix('torch.')} autocast" if run.autocast else "no autocast"
    say(f"{config.dataset}: {len(data.labels)} images of {size} x {size}, {len(data.classes)} classes; {config.arch}, "
        f"{stem}{weights:.2f} M weights, {run.device} x {world}, {precision}")
    tau = "" if config.tau is None else f", tau {config.tau}, loss scale {config.loss_scale:.4f}"
    say(f"{config.loss}{tau}; batch {config.batch} x {config.views} views, {config.epochs} epochs, lr {config.lr:.4g} "
        f"after {config.warmup:g} epochs of warm-up; {config.run}")
    if test is None:
        lacking = "no test set" if data.classes else "no class folders"
        say(f"{lacking} in {config.data}: no k-NN accuracy after the epochs")


def summary_writer():
    """torch's SummaryWriter. Raises Refused where its package is not there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise Refused("--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out") from e
    return SummaryWriter


class Losses:
    """The losses of an epoch. They stay on their device until they are read, so that no step waits for it."""

    def __init__(self, numbers):
        self.numbers = list(numbers)  # those that have been read
        self.fresh, self.lrs = [], []  # those that have not, and their learning rates

    def __len__(self):
        return len(self.numbers) + len(self.fresh)

    def add(self, loss, lr):
        self.fresh.append(loss)
        self.lrs.append(lr)

    def read(self):
        """Reads the fresh ones, all at once. Returns (how many steps ago, loss, learning rate) of the first that is not
        finite, or None."""
        values = torch.stack(self.fresh).tolist() if self.fresh else []
        wrong = [(len(values) - 1 - k, value, lr) for k, (value, lr) in enumerate(zip(values, self.lrs))
                 if not math.isfinite(value)]
        self.numbers += values
        self.fresh, self.lrs = [], []
        return wrong[0] if wrong else None


class Journal:
    """Notes steps and epochs of a `run` and saves its checkpoints. Its methods raise Refused where the run must end.

    run: an object with config, device, step, steps_per_epoch, total_steps, ends_epoch, scaler, and
    checkpoint(losses, seconds).
    resumed: the contents of the checkpoint that the run goes on from, or None. collapse, floor: see collapse_and_floor.
    """

    def __init__(self, run, world, resumed, collapse, floor):
        self.config = run.config
        self.collapse = collapse
        self.saved = run.step
        self.losses = Losses(resumed.get("losses_of_epoch", ()) if resumed else ())
        self.entry = None
        self.lr = None
        self.shown = 0.0
        self.sound = True  # see `writing`
        first = None if resumed else run.checkpoint([], 0.0)
        about = describe_run(run.config, run.device, world) | {"collapse": collapse, "floor": floor}
        self.folder = RunFolder(Path(run.config.run), about, first, run.step)
        wanted = run.config.tensorboard  # its reader passes over what an earlier part wrote after this step
        self.board = summary_writer()(run.config.run, purge_step=run.step + 1) if wanted else None
        self.seconds = resumed["seconds"] if resumed else 0.0  # of training: diagnoses and saving do not count
        self.clock = self.saved_at = self.began = time.perf_counter()
        self.start_epoch()

    def start_epoch(self):
        self.steps_before, self.seconds_before = len(self.losses), self.seconds

    def log(self, entry):
        """Writes an entry of the log, and its numbers for TensorBoard."""
        self.folder.log(entry)
        if self.board:
            try:
                for name in entry.keys() - {"step"}:
                    self.board.add_scalar(name, entry[name], entry["step"])
                self.board.flush()
            except OSError as e:
                raise Refused(f"the file for TensorBoard in {self.folder.path} cannot be written ({e.strerror}): free "
                              f"space, then go on with --resume {self.folder.path}") from e

    def count_seconds(self):
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now

    @contextlib.contextmanager
    def writing(self):
        """After a refusal in this block nothing more is saved: the last checkpoint is the last good one."""
        try:
            yield
        except Refused:
            self.sound = False
            raise

    def note_step(self, run, loss, lr):
        """After every step: its loss, a tensor, and its learning rate. Every --log-every steps an entry is written."""
        self.folder.look_after()
        self.losses.add(loss, lr)
        self.lr = lr
        if run.ends_epoch or run.step % self.config.log_every == 0:
            self.write_step(run)

    def note_skipped(self, run):
        """After a step that the gradient scaler has skipped."""
        scale = run.scaler.get_scale()
        self.log({"step": run.step, "skipped": True, "gradient_scale": scale})
        if scale < 1:
            raise self.not_finite("the gradient is beyond float16 even unscaled", run.step, self.lr)

    def write_step(self, run):
        self.refuse_non_finite(run)
        self.count_seconds()
        config = self.config
        loss = self.losses.numbers[-1]
        rate = (len(self.losses) - self.steps_before) * config.batch / (self.seconds - self.seconds_before)
        epoch = math.ceil(run.step / run.steps_per_epoch)
        self.log({"step": run.step, "epoch": epoch, "loss": loss, "lr": self.lr, "images_per_s": round(rate, 1)})
        if run.ends_epoch or time.perf_counter() - self.shown > (0.5 if on_terminal() else 10):
            self.shown = time.perf_counter()
            left = (run.total_steps - run.step) * config.batch / rate / 60
            tell = say if run.ends_epoch else say_in_place
            tell(f"epoch {epoch}/{config.epochs} step {run.step}/{run.total_steps}  loss {loss:.4f}  lr {self.lr:.4g}  "
                f"{rate:.0f} images/s  {left:.1f} min left")

    def note_epoch(self, run, diagnosis):
        """At the end of an epoch: its mean loss and the numbers of the diagnosis, a dict. Saves where time allows."""
        self.clock = time.perf_counter()  # the diagnosis was no training
        losses = self.losses.numbers
        mean_loss = math.fsum(losses) / len(losses)
        entry = {"step": run.step, "epoch": run.step // run.steps_per_epoch, "mean_loss": mean_loss}
        self.entry = entry | {"seconds": round(self.seconds, 2)} | diagnosis
        self.log(self.entry)
        say("  " + "  ".join(f"{k} {v:.4g}" for k, v in self.entry.items() if isinstance(v, float)))
        if self.collapse and abs(mean_loss - self.collapse) < 0.01 * self.collapse:
            say(f"  warning: the loss sits at its collapse value {self.collapse:.4f}: all features are alike. "
                "Lower --lr, lengthen --warmup or raise --tau", err=True)
        self.losses = Losses(())
        if self.may_save():  # the last one is saved by `close`
            self.save(run)
        if self.config.keep_every and self.entry["epoch"] % self.config.keep_every == 0:
            weights = {k: v for k, v in self.finite_checkpoint(run).items() if k != "queue"} | {"optimizer": {}}
            self.folder.keep(f"epoch-{self.entry['epoch']:04d}.pt", weights)
        if self.config.workers and are_made_in_workers(self.config):
            self.folder.wait()  # the next epoch forks its workers, and a fork wants no other thread at work
        self.clock = time.perf_counter()
        self.start_epoch()

    def may_save(self):
        """Whether the saves of this process have taken under 2 % of its time, and the last one is on the disk.

        The first epoch is always saved, and short ones seldom. A kill can then cost 50 times what a save does.
        """
        return not self.folder.is_writing() and self.folder.seconds_saving < 0.02 * (time.perf_counter() - self.began)

    def save_now_and_then(self, run, asked):
        """Saves where the last checkpoint is --save-minutes old, or where a signal has `asked` for it."""
        old = time.perf_counter() - self.saved_at > 60 * self.config.save_minutes
        if run.step != self.saved and (old or asked):
            self.save(run)
        if asked:
            self.folder.wait()
            say(f"saved step {run.step}, as a signal asked; the run goes on")

    def save(self, run):
        """Saves this step's checkpoint. The run may go on before it is on the disk."""
        self.folder.save(self.finite_checkpoint(run))
        self.saved = run.step
        self.clock = self.saved_at = time.perf_counter()

    def save_changes(self, run, lr):
        """Saves a resumed run with changed options. Else it would forget them if it ended before its first save."""
        self.lr = lr
        self.save(run)
        self.folder.wait()  # workers may be forked next, see note_epoch
        self.folder.seconds_saving = 0.0  # may_save counts from here on

    def finite_checkpoint(self, run):
        """This step's checkpoint. Nothing is saved that is not finite: the last checkpoint stays good."""
        self.refuse_non_finite(run)
        self.count_seconds()
        contents = run.checkpoint(self.losses.numbers, self.seconds)
        parts = [contents[name] for name in ("encoder", "projection", "classifier") if name in contents]
        if not all_finite([entry for part in parts for entry in part.values()]):
            raise self.not_finite("a weight is not finite", run.step, self.lr)
        return contents

    def close(self, run):
        """Saves the last step, if it is sound and not saved yet, and waits until it is on the disk."""
        try:
            if self.sound and run.step != self.saved:
                self.save(run)
        finally:
            self.folder.close()
            if self.board:
                self.board.close()

    def refuse_non_finite(self, run):
        wrong = self.losses.read()
        if wrong:
            ago, loss, lr = wrong
            raise self.not_finite(f"the loss is {loss}", run.step - ago, lr)

    def not_finite(self, what, step, lr):
        self.folder.wait()
        last = f"the last good checkpoint is {self.folder.path}/ckpt.pt of step {self.saved}"
        return NotFinite(f"{what} at step {step} (learning rate {lr:.4g}): "
                         f"start again with a lower --lr or a longer --warmup; {last}")


def all_finite(tensors):
    """Whether every number is finite. A GPU is waited for once."""
    return not tensors or bool(torch.stack([entry.isfinite().all() for entry in tensors]).all())
