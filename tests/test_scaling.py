"""benchmarks/scaling.py counts what a step costs: its FLOPs against the formulas, its table against the page."""

import contextlib
import io
from types import SimpleNamespace

import pytest

from children import PROJECT, call

PAGE = PROJECT / "docs" / "scaling.md"


def test_a_row_of_the_page_is_counted_again():
    """By its size, bytes and FLOPs, which no version of torch decides."""
    call(count_again)


def count_again():
    import benchmarks.scaling as scaling

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        scaling.main("--size 32 --batch 1024 --gpus 8".split(), standalone_mode=False)
    head, _, row = [line for line in printed.getvalue().splitlines() if line.startswith("|")]
    page = PAGE.read_text()
    assert page.count(head) == 2
    assert "\n" + "|".join(row.split("|")[:8]) + "|" in page


def test_flops_are_those_of_the_formulas():
    call(compare_flops)


def compare_flops():
    from benchmarks.scaling import D, encoding, loss, step

    rates = {"tflops": 1.0, "tflops_float32": 1.0, "bandwidth": 1.0, "nvlink": 1.0, "network": 8.0, "launch": 0.0}
    gpu = SimpleNamespace(memory=1.0, **rates)
    M, N, few = 2048, 8192, 64  # the scores of a few anchors; all scores, and from them two gradients: they are kept
    assert loss(gpu, N, M).flops == 2 * few * N * D + 3 * 2 * M * N * D
    assert loss(gpu, 2 * N, M).flops == 2 * few * (2 * N) * D + 4 * 2 * M * (2 * N) * D  # too many to be kept: twice
    views, (there, weights) = 8, encoding(gpu, 8, 224)
    first, _ = encoding(gpu, 8, 224, graph=False)
    assert first.flops == pytest.approx(2 * 4.09e9 * views, rel=0.01)  # torchvision says 4.09 billion products
    assert there.flops == pytest.approx(3 * first.flops, rel=0.03)  # the first layer has no gradient in x
    assert weights == 23_508_032 + 2048 * (2048 + 1) + D * (2048 + 1)
    assert first.bytes_kept == 0 < there.bytes_kept
    row = step(gpu, 32, 1024, 64)
    assert row["views at a time"] < 32 and row["first pass, ms"] > 0  # little memory asks for gradient caching
    ring, rows = 2 * 63 / 64, 2048
    assert row["sent, MB"] == pytest.approx(ring * 4 * (2 * rows * D + weights) / 1e6, rel=0.01)
    assert row["loss, %"] < 100
