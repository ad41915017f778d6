"""The pages say what is there: their commands, tables, links and code."""

import dataclasses
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import common.config
import losses
import pretrain

PROJECT = Path(__file__).resolve().parent.parent
PAGES = {path: (PROJECT / path).read_text() for path in ("README.md", "results/README.md", "benchmarks/README.md")}
PAGES |= {f"docs/{path.name}": path.read_text() for path in sorted((PROJECT / "docs").glob("*.md"))}


def blocks(page, language):
    """The blocks of code of that language, "" for those without one."""
    return [code for found, code in re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S) if found == language]


def commands(page):
    """(the script's file, the words after it) of each command that starts one of our scripts."""
    for line in re.findall(r"\b(?:python|torchrun) ([^#&`\n]*)", PAGES[page].replace("\\\n", " ")):
        words = line.split()
        if words[:1] == ["-m"]:
            words = [words[1].replace(".", "/") + ".py", *words[2:]] if words[1].startswith("common.") else []
        while words and not words[0].endswith(".py"):  # torchrun's own options
            del words[0]
        if words:
            yield words[0], words[1:]


@functools.cache
def script(path):
    """The module in a file of the project."""
    spec = importlib.util.spec_from_file_location(f"shown_{Path(path).stem}", PROJECT / path)
    module = importlib.util.module_from_spec(spec)
    searched = list(sys.path)
    sys.path[:0] = [str(PROJECT), str((PROJECT / path).parent)]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = searched
    return module


def printed(path, *words):
    """What a script prints, with the patterns of its command line expanded as a shell does."""
    names = [sorted(map(str, PROJECT.glob(word))) if "*" in word else [word] for word in words]
    result = CliRunner().invoke(script(path).main, sum(names, []))
    assert result.exit_code == 0, result.output
    return result.output.rstrip("\n")


def marked(page, mark):
    """The text between <!-- mark --> and <!-- end -->."""
    (text,) = re.findall(rf"<!-- {re.escape(mark)} -->\n\n(.*?)\n\n<!-- end -->", PAGES[page], re.S)
    return text


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES)
def test_shown_options_exist(page):
    for path, words in commands(page):
        known = {name for parameter in script(path).main.params for name in parameter.opts + parameter.secondary_opts}
        assert {word for word in words if re.match("--?[a-z]", word)} <= known | {"--help"}, path


def test_readme_shows_the_commands_that_matter():
    shown = [" ".join([path, *words]) for path, words in commands("README.md")]
    for command in (
        "pretrain.py --dataset cifar10 --batch 1024",
        "linear_probe.py runs/cifar10-resnet50-supcon-s0",
        "pretrain.py --dataset shapes --augment crop --lr 0.1 --resume auto",
        "common/figures.py runs/*",
    ):
        assert command in shown


@pytest.mark.parametrize("page", PAGES)
def test_commands_fit_the_page(page):
    assert [line for block in blocks(page, "bash") for line in block.splitlines() if len(line) > 120] == []


def test_commands_of_the_results_are_those_of_the_runs():
    """Each makes the options that the run has recorded, but for what the data, the machine and the folder decide."""
    found = set()
    for path, words in commands("results/README.md"):
        if "--run-dir" not in words:
            continue
        name = Path(words[words.index("--run-dir") + 1]).name
        recorded = json.loads((PROJECT / "results" / name / "config.json").read_text())["options"]
        expected = dataclasses.asdict(common.config.config_of_checkpoint({"config": recorded}))
        context = pretrain.main.make_context(path, list(words))
        given = {k: v for k, v in context.params.items() if k != "resume"}
        config, _ = common.config.read(context, None, given)
        common.config.complete(config, 1)
        config = dataclasses.asdict(config)
        decided_elsewhere = {"run", "size", "stem", "device", "download", "num_classes", "streams"}
        assert {k: v for k, v in config.items() if v != expected[k] and k not in decided_elsewhere} == {}, name
        found.add(name)
    assert found == {path.parent.name for path in PROJECT.glob("results/*/config.json")}


@pytest.mark.seeds_torch
@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_examples_of_the_pages_run(page):
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), {})


# ---------------------------------------------------------------- tables and picture


@pytest.mark.parametrize(
    "page, words",
    [("README.md", ("--short", "results/cifar*", "results/fashion*")), ("results/README.md", ("--long", "results/*"))],
)
def test_tables_are_what_the_command_prints(page, words):
    mark = " ".join(["python experiments/results_table.py", *words])
    assert marked(page, mark) == printed("experiments/results_table.py", *words)


def test_readme_shows_rows_of_the_benchmark():
    rows = marked("README.md", "benchmarks/losses.py").splitlines()
    assert len(rows) == 7 and set(rows) <= set(marked("benchmarks/README.md", "benchmarks/losses.py").splitlines())


def test_picture_of_the_results_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "results.png"
    printed("experiments/results_table.py", "results/*", "--picture", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = [str(PROJECT / "results/shapes-supcon"), "--picture", str(tmp_path / "results.png")]
    result = CliRunner().invoke(script("experiments/results_table.py").main, words)
    assert result.exit_code == 2 and result.output.count("\n") == 1 and "pip install matplotlib" in result.output


# ---------------------------------------------------------------- files, links, code


def test_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 8200


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)", PAGES[page]) if not link.startswith("http")]
    assert [link for link in links if not (PROJECT / page).parent.joinpath(link).exists()] == []


def test_map_of_the_files_is_complete():
    (shown,) = blocks("README.md", "")
    files = [path for folder in ("", "common") for path in (PROJECT / folder).glob("*.py")]
    expected = {str(path.relative_to(PROJECT)) for path in files if path.name != "__init__.py"}
    assert set(re.findall(r"^\S+\.py", shown, re.M)) == expected


def test_code_of_the_readme_runs():
    """With a linear map as the model; and SupConLoss is L_out times temperature/0.07."""
    (code,) = blocks("README.md", "python")
    g = torch.Generator().manual_seed(0)
    weight, images = torch.randn(12, 5, generator=g), torch.randn(2, 6, 3, 2, 2, generator=g)
    weight.requires_grad_()
    names = {
        "model": lambda x: x.flatten(1) @ weight,
        "view0": images[0],
        "view1": images[1],
        "labels": torch.tensor([0, 1, 2, 0, 1, 2]),
    }
    exec(code, names)
    assert weight.grad.norm() > 0
    z = F.normalize(names["model"](images.flatten(0, 1)))
    expected = losses.supcon_out(z, names["labels"].repeat(2), 0.1) * 0.1 / 0.07
    torch.testing.assert_close(names["loss"], expected)
