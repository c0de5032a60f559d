"""Find changed labels among scikit-learn's digits, with mnist.py and with cleanlab: the table of the README.

    pip install cleanlab==2.9.0
    python tests/label_noise.py

54 of the 1,797 labels (3%) are changed to another class. A row says how many of them are among the lowest 54
and the lowest 108 of a ranking, for the random states 0 and 1, and how long a ranking takes. Cleanlab ranks
by the probability that cross-validated models give to the label: shuffled, stratified folds, averaged over
repeats, of scikit-learn's MLP with the layers, the batches and the SGD of mnist.py.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for products this small, threads only collide

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neural_network import MLPClassifier

sys.path.insert(0, str(Path(__file__).parents[1]))
import mnist

SGD = dict(solver="sgd", learning_rate_init=0.1, momentum=0.9, nesterovs_momentum=False, alpha=0, max_iter=10)


def change_labels(random_state):
    """Images uint8 [N, 8, 8], labels int [N] with wrong ones among them, and the indices of these [54]."""
    digits, random = load_digits(), np.random.RandomState(random_state)
    images, labels = np.uint8(digits.images * (255 / 16)), digits.target.copy()
    changed = random.choice(len(labels), 54, replace=False)
    labels[changed] = (labels[changed] + random.randint(1, 10, 54)) % 10
    return images, labels, changed


def cscores(images, labels, options):
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/own.npz", images=images, labels=labels)
        args = f"--dataset {folder}/own.npz --output-dir {folder} --batch-size 100 {options}"
        with contextlib.redirect_stdout(io.StringIO()):
            mnist.main(args.split())
        return np.load(f"{folder}/cscores.npy")


def self_confidence(images, labels, repeats):
    from cleanlab.rank import get_label_quality_scores

    flat, total = images.reshape(len(images), -1) / 255, 0
    for repeat in range(repeats):
        mlp = MLPClassifier((512, 256), batch_size=100, random_state=repeat, **SGD)
        folds = StratifiedKFold(5, shuffle=True, random_state=repeat)
        total = total + cross_val_predict(mlp, flat, labels, cv=folds, method="predict_proba")
    return get_label_quality_scores(labels, total / repeats, method="self_confidence")


def main():
    argparse.ArgumentParser(description="Find changed labels with mnist.py and with cleanlab.").parse_args()
    try:
        import cleanlab
    except ImportError:
        sys.exit("label_noise.py: cleanlab is missing: pip install cleanlab==2.9.0")
    warnings.simplefilter("ignore", ConvergenceWarning)  # ten epochs are what is compared
    jobs = (180, "--runs 20"), (20, "--runs 20 --ratios 0.5")
    rows = [(f"mnist.py {options}, {models} models", cscores, options) for models, options in jobs]
    rows += [(f"cleanlab, {5 * repeats} models", self_confidence, repeats) for repeats in (1, 4, 36)]
    table = []
    for name, rank, how in rows:
        found, seconds = [], []
        for random_state in range(2):
            images, labels, changed = change_labels(random_state)
            start = time.perf_counter()
            suspects = np.argsort(rank(images, labels, how), kind="stable")
            seconds.append(time.perf_counter() - start)
            found.append([np.isin(suspects[:n], changed).sum() for n in (54, 108)])
        lowest = [", ".join(map(str, column)) for column in zip(*found)]
        table.append(f"| {name} | {' | '.join(lowest)} | {np.mean(seconds):.0f} s |")
    print(f"cleanlab {cleanlab.__version__}")
    print("| | in the lowest 54 | in the lowest 108 | time |\n|---|---|---|---|", *table, sep="\n")


if __name__ == "__main__":
    main()
