"""A device "gpu" made of CPU tensors, for machines without one.

    python tests/tools/imitated_gpu.py --loss simclr --views 4       the synchronisations of one step of pretrain.py

Its tensors hold the values of CPU tensors. As on a real device, tensors of two devices do not mix, a generator of the
CPU cannot fill a tensor of the device, and where the CPU would wait for the device a synchronisation is counted, with
the lines of the project that asked for it. The mechanism is PyTorch's PrivateUse1 key with a backend in Python.

The backend is registered for the whole process, so a test calls these functions in a process of their own.
"""

import contextlib
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

PROJECT = Path(__file__).resolve().parents[2]
DATA_DEPENDENT = {"_local_scalar_dense", "_unique", "_unique2", "unique_dim", "unique_consecutive", "nonzero",
    "masked_select", "bincount", "is_nonzero", "equal"}  # what they return, or its shape, the CPU has to know
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
IN_AUTOCAST = "mm", "matmul", "addmm", "bmm", "linear", "conv2d"


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *device):
        return torch.get_rng_state()

    def set_rng_state(self, state, *device):
        pass

    def set_device(self, *device):
        pass

    def manual_seed_all(self, seed):
        pass


_setup_privateuseone_for_python_backend("gpu", Backend())
DEVICE = torch.device("gpu:0")
waits = Counter()  # synchronisations by (kind, the project's lines that asked for it)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on the device; its values are those of `held`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout, device=DEVICE)
        tensor.held = held.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})

    def resize_(self, *shape):  # which cannot change the shape of a wrapper
        return OnGpu(self.held.resize_(*shape))

    def new_tensor(self, data, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype).to(DEVICE)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        if other.shape != self.shape or other.dtype != self.dtype:
            raise RuntimeError("data of another shape or type cannot take the place of a wrapper's")
        self.held = other.held

    def __reduce_ex__(self, protocol):  # a checkpoint is read to the CPU, whatever device wrote it
        return self.held.__reduce_ex__(protocol)

    def tolist(self):
        wait("tolist")
        return self.held.tolist()


class Imitation(TorchDispatchMode):
    """While it is entered, the device has tensors."""

    held_on = "cpu"

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def on_gpu(x):
    return isinstance(x, OnGpu)


def is_gpu(device):
    return device is not None and torch.device(device).type == "gpu"


def wait(kind):
    """Notes that the CPU waits for the device here."""
    frame, lines = sys._getframe(1), []
    while frame:
        file = Path(frame.f_code.co_filename)
        if PROJECT in file.parents and "site-packages" not in file.parts and file != Path(__file__):
            lines.append(f"{file.name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    waits[kind, " < ".join(lines[:3])] += 1


def run(op, args, kwargs):
    """The op on the held tensors. Its results are on the device where an argument is, or where `device` says so."""
    name, device = op.overloadpacket.__name__, kwargs.get("device")
    flat, spec = tree_flatten((args, kwargs))
    there = [x for x in flat if on_gpu(x)]
    result_there = is_gpu(device) or bool(there) and device is None and name != "_local_scalar_dense"
    if name == "copy_":
        result_there = on_gpu(args[0])
        if on_gpu(args[0]) != on_gpu(args[1]) and not (len(args) > 2 and args[2]):
            wait("copy_")
    elif name == "_to_copy":
        note_copy(args[0], device, kwargs.get("non_blocking"))
    else:
        require_one_device(name, args, flat, there, device)
    if there and name in DATA_DEPENDENT:
        wait(name)
    args, kwargs = tree_unflatten([x.held if on_gpu(x) else x for x in flat], spec)
    if is_gpu(device):
        kwargs["device"] = Imitation.held_on
    kwargs.pop("pin_memory", None)
    same = {id(x.held): x for x in there}  # what an op changes in place stays the same tensor

    def wrapped(x):
        if not (result_there and isinstance(x, torch.Tensor)) or on_gpu(x):
            return x
        return same[id(x)] if id(x) in same else OnGpu(x)

    return tree_map(wrapped, op(*args, **kwargs))


def note_copy(source, device, non_blocking):
    if is_gpu(device) and not on_gpu(source) and not non_blocking:
        wait("copy to the device")
    elif device is not None and not is_gpu(device) and on_gpu(source):
        wait("copy to the CPU")


def require_one_device(name, args, flat, there, device):
    """Raises RuntimeError, as torch does, where tensors or generators of two devices meet in an op."""
    elsewhere = [x for x in flat if isinstance(x, torch.Tensor) and not on_gpu(x) and x.ndim]
    if name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        for x in indices:
            if on_gpu(args[0]) and not on_gpu(x):
                wait("an index from the CPU")
            elif on_gpu(x) and x.dtype in (torch.bool, torch.uint8):
                wait("a mask as an index")
        elsewhere = [x for x in elsewhere if all(x is not index for index in indices)]
    if there and elsewhere:
        raise RuntimeError(f"{name}: tensors on gpu:0 and on cpu, {[tuple(x.shape) for x in elsewhere]}")
    if (there or is_gpu(device)) and any(isinstance(x, torch.Generator) for x in flat):
        raise RuntimeError(f"{name}: a generator of the CPU, a tensor on gpu:0")


def in_autocast(op):
    def cast(*args, **kwargs):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            dtype = torch.get_autocast_dtype("gpu")
            floating = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point()
            return op(*(x.to(dtype) if floating(x) else x for x in args), **kwargs)

    return cast


everything = torch.library.Library("_", "IMPL")
everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
aten = torch.library.Library("aten", "IMPL")
for name in IN_AUTOCAST:
    aten.impl(name, in_autocast(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")


@contextlib.contextmanager
def imitated(held_on="cpu"):
    """In this block tensors can be made on DEVICE; the counts begin anew. On "meta" they have shapes and no values."""
    tensor, pin_memory = torch.tensor, torch.Tensor.pin_memory

    def tensor_there(data, *args, device=None, **kwargs):
        if is_gpu(device):
            return tensor(data, *args, **kwargs).to(DEVICE)
        return tensor(data, *args, device=device, **kwargs)

    def pinned(x, *device):
        if on_gpu(x):
            raise RuntimeError("pin_memory: a tensor on gpu:0")
        return x

    torch.tensor, torch.Tensor.pin_memory = tensor_there, pinned
    Imitation.held_on = held_on
    waits.clear()
    try:
        with Imitation():
            yield
    finally:
        torch.tensor, torch.Tensor.pin_memory = tensor, pin_memory
        Imitation.held_on = "cpu"


# ---------------------------------------------------------------- the project's scripts

SMALL = "--dataset shapes --size 16 --limit 80 --batch 40 --epochs 1 --precision float32 --log-every 1".split()


def run_there(script, options):
    """main of a script of the project, an imported module, on the device."""
    choose_device, script.choose_device = script.choose_device, lambda name: DEVICE
    try:
        with imitated():
            return script.main(list(map(str, options)), standalone_mode=False)
    finally:
        script.choose_device = choose_device


def pretrain_there(options, run):
    """(the losses of the steps, the synchronisations of the second step) of pretrain.py on the device.

    What is logged and saved after a step does not count.
    """
    import pretrain
    from common.journal import Journal

    losses, counts, note_step, save = [], [], Journal.note_step, Journal.save_now_and_then

    def noted(self, run, loss, lr):
        losses.append(loss.held.item())
        counts.append(Counter(waits))
        note_step(self, run, loss, lr)

    def saved(self, *arguments):
        save(self, *arguments)
        waits.clear()

    Journal.note_step, Journal.save_now_and_then = noted, saved
    try:
        run_there(pretrain, [*SMALL, *options, "--run-dir", run])
    finally:
        Journal.note_step, Journal.save_now_and_then = note_step, save
    return losses, counts[1]


if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT))
    import losses

    losses.MATRIX = 16  # strips already at these sizes
    with tempfile.TemporaryDirectory() as folder:
        values, counted = pretrain_there(sys.argv[1:], Path(folder, "run"))
    print(f"losses {values}; {counted.total()} synchronisations in the second step")
    for (kind, lines), count in counted.most_common():
        print(f"{count:5d}  {kind}  {lines}")
