"""Puts the project's folder on the path (it is no package) and keeps hypothesis light."""
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
