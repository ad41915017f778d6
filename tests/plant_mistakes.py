"""Plants one mistake at a time in a copy of losses.py and shows which test catches it.

    python tests/plant_mistakes.py          a few minutes; exits 1 if a mistake is not caught or its text is not found

One line a mistake: the first test that fails of test_losses.py, of test_theory.py and of test_tiles.py.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SUITES = ("tests/test_losses.py", "tests/test_theory.py", "tests/test_tiles.py")

MISTAKES = [
    ("drop the 1/|P|", "w = _rows_to_one(w, s.dtype)", "w = w.to(s.dtype)"),
    ("keep self in A(i)", "_Dense.apply(variant, a, b, _fill(w, own, 0), own, scale)", "_Dense.apply(variant, a, b, _fill(w, own, 0), None, scale)"),
    (
        "0/1 mask after the maximum",
        "        log_p = _fill(s, excluded, -torch.inf).log_softmax(1)",
        "        s = s - s.amax(1, keepdim=True)\n"
        "        log_p = _fill(s - _fill(s.exp(), excluded, 0).sum(1, keepdim=True).log(), excluded, -torch.inf)",
    ),
    ("wrong sign of the contrasts' gradient", "_product(G + G.T, a)", "_product(G - G.T, a)"),
    ("swap L_in and L_out", "def nt_xent(z,", "supcon_out, supcon_in = supcon_in, supcon_out\n\n\ndef nt_xent(z,"),
    (
        "forget log|P| in L_in",
        "return -weighed.logsumexp(1)",
        "return -log_ratio.masked_fill(w == 0, -torch.inf).logsumexp(1)",
    ),
    ("detach the contrasts", "_product(G + G.T, a)", "_product(G, a)"),
    (
        "last view off by one image",
        "return torch.arange(len(z) // views, device=z.device).repeat(views)",
        "image = torch.arange(len(z) // views, device=z.device)\n"
        "    return torch.cat([image.repeat(views - 1), image.roll(1)])",
    ),
    ("mean over all anchors", "loss.sum() / valid.sum().clamp_(min=1)", "loss.sum() / max(len(loss), 1)"),
    ("tau missing where it is a number", "else (z, 1 / tau)", "else (z, 1.0)"),
    ("tiles: self in A(i)", "None if own is None else own + i - j", "None"),
    ("tiles: self in the sums of the classes", ".sub_(mine)", ".sub_(0 * mine)"),
    ("tiles: the mirror's columns forgotten", "if mirror and I != J:", "if False:"),
    ("tiles: the mirror's role forgotten", "c[k, I, None] + c[k, J] if twice else c[k, I, None]", "c[k, I, None]"),
    ("tiles: the same at large scores", "part = part.addcmul_(s.sub_(lse[k, J]).exp_(), g[k, J]) if twice else part", "pass"),
    ("tiles: no maximum at large scores", "amax() < 40**2)", "amax() < 40**9)"),
    ("tiles: a lone anchor's gradient", "g = g.masked_fill(alone, 0)", "pass"),
    ("tiles: the mean's contrasts detached", "grad_b -= _positive_sums(", "_ = (a @ a[:1].T, "),
    ("another set: its gradient in tiles", "grad_b[J].addmm_(w.T, a[I])", "grad_b[J].addmm_(w.T, a[I] if mirror else -a[I])"),
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
    print("mistake | caught by, in test_losses.py | in test_theory.py | in test_tiles.py")
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
