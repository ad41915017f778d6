"""Steps of pretrain.py on the imitated device: the losses of the CPU, and a bound on how often the CPU waits.

Before the draws of a step were sent once, there were 22 waits in a step of two views, and 166 with --micro-batch 8.
"""

import pytest
import torch

from children import call

CONFIGURATIONS = ["", "--micro-batch 8", "--loss simclr --views 3", "--optimizer lars --ce-weight 0.5"]
MOST = 2  # synchronisations of a step


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_a_step_waits_twice_at_most_and_has_the_losses_of_the_cpu(options, tmp_path):
    call(compare_step, options.split(), tmp_path)


def compare_step(options, folder):
    import json

    import imitated_gpu
    import pretrain

    losses, waits = imitated_gpu.pretrain_there(["--log-every", "1", *options], folder / "there")
    pretrain.choose_device = torch.device
    pretrain.main([*imitated_gpu.SMALL, "--log-every", "1", *options, "--device", "cpu", "--run-dir",
                   str(folder / "here")], standalone_mode=False)
    lines = [json.loads(line) for line in (folder / "here" / "log.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if "loss" in line]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert waits.total() <= MOST, waits


def test_devices_that_mix_are_refused_and_waits_are_counted():
    call(plant_faults)


def plant_faults():
    import imitated_gpu
    from imitated_gpu import DEVICE

    with imitated_gpu.imitated():
        x = torch.ones(3).to(DEVICE)
        with pytest.raises(RuntimeError, match="on cpu"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator of the CPU"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
        assert imitated_gpu.waits.total() == 1
        assert x.sum().item() == 3 and imitated_gpu.waits.total() == 2
