"""What all tests share: hypothesis kept light, and the small runs that many tests look at."""
import os

import pytest
from hypothesis import settings

settings.register_profile("light", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("light")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a small run, for tests that do not change it."""
    from runs import SMALL, python

    run = tmp_path_factory.mktemp("runs") / "whole"
    done = python("pretrain.py", *SMALL, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def probed(trained):
    """A classifier that was probed in the folder of `trained`, for tests that do not change it."""
    import linear_probe

    linear_probe.main([str(trained), "--limit", "400", "--epochs", "3"], standalone_mode=False)
    return trained / "classifier-first400.pt"
