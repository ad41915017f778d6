"""Plants one mistake at a time in a copy of losses.py and shows which test catches it.

    python tests/tools/plant_mistakes.py          a few minutes; exits 1 if a mistake is not caught or its text is not found

One line a mistake: the first test that fails of test_losses.py, of test_theory.py and of test_tiles.py.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SUITES = ("tests/test_losses.py", "tests/test_theory.py", "tests/test_tiles.py")

MISTAKES = [
    ("drop the 1/|P|", "factor = w / -weight[:, None]", "factor = -w"),
    ("keep self in A(i)", "_Scores.apply(a, b, own), _fill(", "_Scores.apply(a, b, None), _fill("),
    ("no maximum before exp", "log_ratio = s.log_softmax(1)", "log_ratio = s - s.exp().sum(1, keepdim=True).log()"),
    ("wrong sign of the contrasts' gradient", "_product(g + g.T, a)", "_product(g - g.T, a)"),
    ("swap L_in and L_out", "def nt_xent(z,", "supcon_out, supcon_in = supcon_in, supcon_out\n\n\ndef nt_xent(z,"),
    ("forget log|P| in L_in", "log_X - weight.log()[:, None]", "log_X"),
    ("L_in: X of all rows, not of P(i)", "log_X = log_e.where(p, ABSENT)", "log_X = log_e"),
    ("detach the contrasts", "_product(g + g.T, a)", "_product(g, a)"),
    ("another set: its gradient", "return _product(g, b), _product(g.T, a) if", "return _product(g, b), 0 * b if"),
    (
        "last view off by one image",
        "return torch.arange(len(z) // views, device=z.device).repeat(views)",
        "image = torch.arange(len(z) // views, device=z.device)\n"
        "    return torch.cat([image.repeat(views - 1), image.roll(1)])",
    ),
    ("mean over all anchors", "loss.sum() / valid.count_nonzero().clamp(min=1)", "loss.sum() / max(len(loss), 1)"),
    ("tiles: a lone anchor counts", "return loss.where(valid, 0), valid", "return loss, valid"),
    ("max_margin: a lone anchor counts", "p.any(1)\n    return _reduce(loss.where(valid, 0), valid, reduction)\n\n\n# ", "p.any(1)\n    return _reduce(loss, valid, reduction)\n\n\n# "),
    ("an anchor without negatives counts", "w = w & n.any(1, keepdim=True) if", "w = w if"),
    ("tau missing where it is a number", "else float(tau)) ** -0.5", "else 1.0) ** -0.5"),
    ("tiles: self in A(i)", "None if own is None else own + i - j", "None"),
    ("tiles: self in the sums of the classes", "own : last + own], value=-1)", "own : last + own], value=0)"),
    ("tiles: another row for self in these sums", "y_b[first + own : last + own]\n        itself", "y_a[first:last]\n        itself"),
    ("tiles: a weight that is not a number is none", "variant)\n    valid = weight != 0", "variant)\n    valid = weight > 0"),
    ("tiles: self in the gradient of these sums", "None if own is None else -own", "None"),
    ("tiles: the roles of these sums in the gradient", "_positive_sums(g_sums, y_b, y_a,", "_positive_sums(g_sums, y_a, y_b,"),
    ("tiles: exp2 for exp", "a[I] / math.log(2) if mild", "a[I] if mild"),
    ("tiles: the mirror's columns forgotten", "((I, 1), (J, 0)) if both else ((I, 1),)", "((I, 1),)"),
    ("tiles: the mirror's role forgotten", "c[k, I, None] + c[k, J] if both else c[k, I, None]", "c[k, I, None]"),
    ("tiles: the same at large scores", "part = part.addcmul_(s.sub_(lse[k, J]).exp_(), g[k, J]) if both else part", "pass"),
    ("tiles: no maximum at large scores", "bool(longest < 40)", "bool(longest < 40**9)"),
    ("tiles: an anchor that is left out weighs", "masked_fill(g == 0, torch.inf)", "masked_fill(lse == -torch.inf, torch.inf)"),
    ("triplet: an absent negative is near", "d.masked_fill(~n, torch.inf)", "d.masked_fill(~n, 0)"),
    ("triplet: semihard takes a negative as far as the positive", "right=True)", "right=False)"),
    ("distances of rows as they lie", "_scores(z - z.mean(0))", "_scores(z)"),
    ("tiles: the mean's contrasts detached", "grads[-1] += _positive_sums(", "grads[-1] += 0 * _positive_sums("),
    ("tiles: which side wants a gradient", "if b is None or of_b:", "if b is None:"),
    ("tiles: another set's gradient", "grads[-1][J].addmm_(w.T, a[I])", "grads[-1][J].addmm_(w.T, a[I] if b is None else -a[I])"),
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
