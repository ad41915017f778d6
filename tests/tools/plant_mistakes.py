"""Plants one mistake at a time in a copy of losses.py and shows which test catches it.

    python tests/plant_mistakes.py          a few minutes; exits 1 if a mistake is not caught or its text is not found

One line a mistake: the first test that fails of test_losses.py, of test_theory.py and of test_strips.py.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SUITES = ("tests/test_losses.py", "tests/test_theory.py", "tests/test_strips.py")

MISTAKES = [
    ("drop the 1/|P|", "(w * log_P).sum(1) / -total, valid", "-(w * log_P).sum(1), valid"),
    ("keep self in A(i)", "_Scores.apply(a, b, own), _fill(", "_Scores.apply(a, b, None), _fill("),
    ("no maximum before exp", "log_P = s.log_softmax(1)", "log_P = s - s.exp().sum(1, keepdim=True).log()"),
    ("wrong sign of the contrasts' gradient", "_product(g + g.T, a)", "_product(g - g.T, a)"),
    ("swap L_in and L_out", "def nt_xent(z: Tensor", "supcon_out, supcon_in = supcon_in, supcon_out\n\ndef nt_xent(z: Tensor"),
    ("forget log|P| in L_in", "/ -total + total.log(), valid", "/ -total, valid"),
    ("L_in: X of all rows, not of P(i)", "log_X = log_P.where(p, ABSENT)", "log_X = log_P"),
    ("detach the contrasts", "_product(g + g.T, a)", "_product(g, a)"),
    ("another set: its gradient", "return _product(g, b), _product(g.T, a) if", "return _product(g, b), 0 * b if"),
    (
        "last view off by one image",
        "return torch.arange(len(z) // views, device=z.device).repeat(views)",
        "image = torch.arange(len(z) // views, device=z.device)\n"
        "    return torch.cat([image.repeat(views - 1), image.roll(1)])",
    ),
    ("mean over all anchors", "loss.sum() / valid.count_nonzero().clamp(min=1)", "loss.sum() / max(len(loss), 1)"),
    ("strips: a lone anchor counts", "(log_sum[0] - of_positives).where(valid, 0), valid", "(log_sum[0] - of_positives), valid"),
    ("max_margin: a lone anchor counts", "# Hadsell\n    valid = p.any(1)\n    return _reduce(loss.where(valid, 0)", "# Hadsell\n    valid = p.any(1)\n    return _reduce(loss"),
    ("an anchor without negatives counts", "w = w & n.any(1, keepdim=True) if", "w = w if"),
    ("tau missing where it is a number", "else float(tau)) ** -0.5", "else 1.0) ** -0.5"),
    ("strips: self in A(i)", "None if own is None else own + i - J.start", "None"),
    ("strips: self in the sums of the classes", "sums = sums - itself * rows_1[mine]", "sums = sums - 0 * itself * rows_1[mine]"),
    ("strips: another row for self in these sums", "mine = slice(own, own + len(y_a))", "mine = slice(0, len(y_a))"),
    ("strips: a weight that is not a number is none", "own)\n    valid = weight != 0", "own)\n    valid = weight > 0"),
    ("strips: the roles of these sums", "index_add(0, y_b, rows_1.to(wide))", "index_add(0, y_a, rows_1.to(wide))"),
    ("strips: what rounding leaves is a weight", "sums[:, -1:] <= remains", "sums[:, -1:] < 0"),
    ("strips: exp for exp2", "yield I, J, s.exp2_() if mild", "yield I, J, s.exp_() if mild"),
    ("strips: a result in base 2", "return math.log(2) * (log_sum", "return (log_sum"),
    ("strips: the mirror's columns forgotten", "if b is None:\n                log_sum_k[", "if False:\n                log_sum_k["),
    ("strips: the diagonal block mirrored", "_log_sum(part[:, len(s) :], 0, mild)", "_log_sum(part, 0, mild)[: len(a) - I.stop]"),
    ("strips: the mirror's role forgotten", "for K in ((I, None), J) if b is None else ((I, None),):", "for K in ((I, None),):"),
    ("strips: the mirror's gradient forgotten", "if b is None:\n            grads[0][I.stop :].addmm_(", "if b is None:\n            torch.zeros_like(grads[0][I.stop :]).addmm_("),
    ("strips: kept strips out of order", "kept[i // rows]", "kept[-1 - i // rows] if i == 0 and kept[-1].shape == kept[0].shape else kept[0]"),
    ("strips: kept strips overwrite one another", "a.new_empty(0) if keep else room\n", "room\n"),
    ("strips: kept strips are changed", "softmax = part  #", "softmax = part.mul_(2) / 2  #"),
    ("strips: no maximum at large scores", "bool(longest < 60)", "bool(longest < 60**9)"),
    ("strips: a maximum of the first column", "top = s.amax(axis, keepdim=True)", "top = s.narrow(axis, 0, 1)"),
    ("strips: an anchor that is left out weighs", "log_sum.masked_fill(g == 0, torch.inf)", "log_sum.clone()"),
    ("strips: L_in over A(i) twice", "s.where(w, 0 if mild else -torch.inf) if", "s if"),
    ("strips: nan is a class", "numbers = F.pad((y[1:] != y[:-1])", "numbers = F.pad(((y[1:] != y[:-1]) & y[1:].isfinite())"),
    ("triplet: an absent negative is near", "d.masked_fill(~n, torch.inf)", "d.masked_fill(~n, 0)"),
    ("triplet: semihard takes a negative as far as the positive", "right=True)", "right=False)"),
    ("distances of rows as they lie", "_scores(z - z.mean(0))", "_scores(z)"),
    ("strips: the mean's contrasts detached", "rows if variant == \"out\" else rows[:, :0], y_a", "(rows if variant == \"out\" else rows[:, :0]).detach(), y_a"),
    ("strips: which side wants a gradient", "elif of_b:", "elif False:"),
    ("strips: another set's gradient", "grads[1].addmm_(G.T, a[I])", "grads[1].addmm_(G.T, -a[I])"),
    ("the precision of another thread lowered", "if self.inside == 0 and self.found not in", "if self.found not in"),
    ("the precision's switch not locked", "threading.Lock()", "__import__('contextlib').nullcontext()"),
    ("the precision left behind", "if self.backend.fp32_precision != self.found:", "if False:"),
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
    print("mistake | caught by, in test_losses.py | in test_theory.py | in test_strips.py")
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
