"""Puts the project's folder on the path (it is no package) and keeps hypothesis light."""
import os
import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

settings.register_profile("light", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("light")
