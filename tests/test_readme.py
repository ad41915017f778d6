"""README.md says what is there: the lines of losses.py that it quotes, and the options of the commands that it shows."""
import importlib.util
import re
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text()
EQUATIONS = README.split("| equation | line of losses.py |")[1].split("\n\n")[0]
COMMANDS = re.findall(r"\b(?:python|torchrun)\b.*?((?:\w+/)*\w+\.py) ([^#&`\n]*)", README)


@pytest.mark.parametrize("line", [code.replace(r"\|", "|") for code in re.findall("`(.*?)`", EQUATIONS)])
def test_quoted_lines_are_in_losses(line):
    assert line in (PROJECT / "losses.py").read_text()


@pytest.mark.parametrize("script, arguments", sorted(set(COMMANDS)))
def test_shown_options_exist(script, arguments):
    sys.path[:0] = [str(PROJECT), str((PROJECT / script).parent)]
    try:
        spec = importlib.util.spec_from_file_location(f"shown_{Path(script).stem}", PROJECT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.path[:2]
    known = {name for parameter in module.main.params for name in parameter.opts + parameter.secondary_opts}
    assert set(re.findall(r"--[a-z][a-z0-9-]*", arguments)) <= known | {"--help"}
