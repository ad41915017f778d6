"""Plants one mistake at a time in a copy of losses.py and shows which test catches it.

    python tests/plant_mistakes.py          a few minutes; exits 1 if a mistake is not caught or its text is not found

One line a mistake: the first test of test_losses.py and the first of test_theory.py that fails.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SUITES = ("tests/test_losses.py", "tests/test_theory.py")

MISTAKES = [
    (
        "drop the 1/|P|",
        "    w = _rows_to_one(p.to(s.dtype))\n    return w, torch.where(p, s - log_d, 0)",
        "    w = p.to(s.dtype)\n    return w, torch.where(p, s - log_d, 0)",
    ),
    (
        "keep self in A(i)",
        "log_d = _log_sum_exp(s, p | n)",
        "log_d = _log_sum_exp(s, p | n | ~_others(z))",
    ),
    (
        "0/1 mask after the maximum",
        "    return s.masked_fill(~members & some, -torch.inf).logsumexp(1, keepdim=True)",
        "    top = s.detach().amax(1, keepdim=True)\n"
        "    total = ((s - top).exp() * members).sum(1, keepdim=True).masked_fill(~some, 1)\n"
        "    return (total.log() + top)",
    ),
    (
        "wrong sign of the contrasts' gradient",
        "return z @ (z if other is None else _widen(other)).T",
        "return z @ (2 * z.detach() - z if other is None else _widen(other)).T",
    ),
    (
        "swap L_in and L_out",
        "def nt_xent(z,",
        "supcon_out, supcon_in = supcon_in, supcon_out\n\n\ndef nt_xent(z,",
    ),
    (
        "forget log|P| in L_in",
        "_log_sum_exp(log_ratio + torch.where(w > 0, w, 1).log(), w > 0)",
        "_log_sum_exp(log_ratio, w > 0)",
    ),
    (
        "detach the contrasts",
        "return z @ (z if other is None else _widen(other)).T",
        "return z @ (z.detach() if other is None else _widen(other)).T",
    ),
    (
        "last view off by one image",
        "return torch.arange(len(z) // views, device=z.device).repeat(views)",
        "image = torch.arange(len(z) // views, device=z.device)\n"
        "    return torch.cat([image.repeat(views - 1), image.roll(1)])",
    ),
    (
        "mean over all anchors",
        "loss.sum() / valid.sum().clamp(min=1)",
        "loss.sum() / max(len(loss), 1)",
    ),
    (
        "tau missing in the numerator",
        "torch.where(p, s - log_d, 0)",
        "torch.where(p, s * tau - log_d, 0)",
    ),
]


def first_failure(losses_text, suite):
    """The first failing test of the suite against this losses.py, "" if all pass, None if they did not run."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(PROJECT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copy(PROJECT / "reference_numpy.py", folder)
        (folder / "losses.py").write_text(losses_text)
        with (folder / "tests" / "conftest.py").open("a") as conftest:  # same examples every time, failures not shrunk
            conftest.write(
                "\nfrom hypothesis import Phase\n"
                "settings.register_profile('plant', settings(), derandomize=True, database=None,\n"
                "                          phases=[Phase.explicit, Phase.generate])\n"
                "settings.load_profile('plant')\n"
            )
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", suite]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    failed = re.search(r"^FAILED \S+::(.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
    return failed[1] if failed else "" if run.returncode == 0 else None


def main():
    right = (PROJECT / "losses.py").read_text()
    for suite in SUITES:
        failure = first_failure(right, suite)
        if failure != "":
            sys.exit(f"{suite} fails without any mistake: {failure or 'it does not run'}")
    missed = 0
    print("mistake | caught by, in test_losses.py | in test_theory.py")
    for name, old, new in MISTAKES:
        if right.count(old) != 1:
            caught = [f"TEXT FOUND {right.count(old)} TIMES"]
            missed += 1
        else:
            caught = [first_failure(right.replace(old, new), suite) for suite in SUITES]
            missed += not any(caught)
        print(name, *(c or ("-" if c == "" else "did not run") for c in caught), sep=" | ", flush=True)
    print(f"{len(MISTAKES) - missed} of {len(MISTAKES)} caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
