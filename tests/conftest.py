"""What all tests share: hypothesis kept light, no state left behind, and the small runs that many tests look at."""

import os
import random
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

settings.register_profile("light", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("light")
torch.set_num_threads(1)  # as the processes that tests start: the number of threads decides the last bits


# ---------------------------------------------------------------- no test leaves anything behind


SETS_THEMSELVES = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR", "_TORCHINDUCTOR")  # variables of pytest and of torch.compile


def reading(read):
    """What read() returns; where torch refuses to be asked, its refusal."""
    try:
        return read()
    except RuntimeError as e:
        return str(e)


def state_of_the_process():
    """Whatever one test could leave behind for the next, by name."""
    backends = torch.backends
    places = {
        "all": backends,
        "CUDA": backends.cuda.matmul,
        "cuDNN": backends.cudnn,
        "cuDNN conv": getattr(backends.cudnn, "conv", None),  # from torch 2.9 on, as the next two
        "oneDNN": backends.mkldnn,
        "oneDNN matmul": getattr(backends.mkldnn, "matmul", None),
        "oneDNN conv": getattr(backends.mkldnn, "conv", None),
    }
    state = {f"fp32_precision ({name})": getattr(place, "fp32_precision", None) for name, place in places.items()}
    state |= {
        "torch.get_float32_matmul_precision()": reading(torch.get_float32_matmul_precision),
        "torch.backends.cudnn.allow_tf32": reading(lambda: backends.cudnn.allow_tf32),
        "torch.backends.cudnn.benchmark": backends.cudnn.benchmark,
        "torch.backends.cuda.matmul.allow_tf32": reading(lambda: backends.cuda.matmul.allow_tf32),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "autocast": [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
        ],
        "whether gradients are taken": torch.is_grad_enabled(),
        "Python's random state": random.getstate(),
        "numpy's random state": np.random.get_state()[1].tobytes(),
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "the process group": dist.is_available() and dist.is_initialized(),
        "the working directory": os.getcwd(),
        "the environment": {name: value for name, value in os.environ.items() if not name.startswith(SETS_THEMSELVES)},
    }
    return state | {
        f"the handler of {number.name}": signal.getsignal(number)
        for number in signal.valid_signals()
        if isinstance(number, signal.Signals)
    }


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """Names the test that moved a state of the process. Runs seed torch: their tests are marked `seeds_torch`."""
    torch.manual_seed(0)
    before = state_of_the_process()
    yield
    after = state_of_the_process()
    moved = [name for name in before if before[name] != after[name]]
    if request.node.get_closest_marker("seeds_torch"):
        moved = [name for name in moved if name != "torch's random state"]
    assert not moved, f"{request.node.nodeid} leaves behind: {', '.join(moved)}"


# ---------------------------------------------------------------- runs that several tests look at


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a small run, for tests that do not change it."""
    import pretrain
    from runs import SMALL

    run = tmp_path_factory.mktemp("runs") / "whole"
    pretrain.main([*SMALL, "--run-dir", str(run)], standalone_mode=False)
    return run


@pytest.fixture(scope="session")
def probed(trained):
    """A classifier that was probed in the folder of `trained`, for tests that do not change it."""
    import linear_probe

    linear_probe.main([str(trained), "--limit", "400", "--epochs", "3"], standalone_mode=False)
    return trained / "classifier-first400.pt"
