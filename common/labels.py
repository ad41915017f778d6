"""Labels from a CSV file, for images that do not lie in folders of their classes."""

import csv
import os

from common.cli import Refused
from common.images import Folder

COLUMNS = ["path", "label"], ["path", "label", "split"]
SPLITS = {True: ["train"], False: ["test", "val"]}  # of the training set, and of the test set


def find_labelled(root, table, train):
    """The Folder of the training or test images that the CSV file `table` names, their paths relative to `root`.

    Its first line is path,label or path,label,split, with train, test or val as the split; without one all images are
    for training. Where a file has the splits test and val, val is left out. The order of the lines means nothing.
    Raises Refused, naming the line, where the file cannot mean what it says.
    """
    rows = read_table(table)
    missing = [line for line, path, *_ in rows if not os.path.isfile(os.path.join(root, path))]
    if missing:
        path = next(path for line, path, *_ in rows if line == missing[0])
        more = f" ({len(missing)} such lines)" if len(missing) > 1 else ""
        raise Refused(f"--labels {table}, line {missing[0]}: there is no file {path} in --data {root}{more}: "
                      "mend the line, or --data")
    present = {split for *_, split in rows}
    wanted = next((split for split in SPLITS[train] if split in present), None)
    chosen = sorted((path, label) for _, path, label, split in rows if split == wanted)
    classes = sorted({label for _, label in chosen})
    files, labels = [os.path.join(root, path) for path, _ in chosen], [classes.index(label) for _, label in chosen]
    return Folder(files, labels, classes)


def read_table(table):
    """[(line, path, label, split)] of the CSV file."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            head = [name.strip() for name in next(reader, [])]
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise Refused(f"--labels {str(table)[:80]} cannot be read ({getattr(e, 'strerror', None) or e}): "
                      "name a CSV file in UTF-8; of a run whose files have moved, pretrain.py --resume RUN "
                      "--data DIR --labels FILE notes their new place") from e
    if head not in COLUMNS:
        raise Refused(f"--labels {table} begins with {','.join(head)[:60]!r}: its first line must be path,label or "
                      "path,label,split")
    rows = []
    first = {}
    for line, cells in lines:
        if len(cells) != len(head) or not all(cells):
            raise Refused(f"--labels {table}, line {line}: it must hold {', '.join(head)}, each of them once")
        path = os.path.normpath(cells[0])
        label = cells[1]
        split = cells[2] if len(cells) > 2 else "train"
        if split not in SPLITS[True] + SPLITS[False]:
            raise Refused(f"--labels {table}, line {line}: the split {split!r} is not train, test or val: name one")
        if path in first:
            raise Refused(f"--labels {table}, line {line}: {path} is in line {first[path]} already: take one away")
        first[path] = line
        rows.append((line, path, label, split))
    if not any(split == "train" for *_, split in rows):
        raise Refused(f"--labels {table} has no image of the split train: add some")
    return rows
