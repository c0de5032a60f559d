"""mnist-cscores-orig-order.npz, the published scores, and what the README says of them."""

from pathlib import Path

import numpy as np
import pytest
from helpers import needs_mnist

import mnist

ROOT = Path(mnist.__file__).parent
README = " ".join((ROOT / "README.md").read_text().split())


@pytest.fixture(scope="module")
def published():
    with np.load(ROOT / "mnist-cscores-orig-order.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def n_correct(published):
    return np.rint(published["profile"] * published["n_heldout"]).astype(int)


def test_the_file_is_that_of_a_whole_job(published):
    assert set(published) == {"scores", "labels", "profile", "n_heldout", "subset_ratios"}
    scores, labels = published["scores"], published["labels"]
    assert scores.shape == labels.shape == (60000,)
    assert scores.dtype == np.float64 and labels.dtype.kind == "i"
    assert np.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert published["profile"].shape == published["n_heldout"].shape == (9, 60000)
    assert published["subset_ratios"].tolist() == mnist.parse_args([]).ratios


def test_the_scores_are_those_of_its_own_profile_and_of_200_runs(published, n_correct):
    # NumPy's sums depend on the layout of an array, and indexing has changed that of the file's.
    scores, profile = mnist.cscores(*map(np.ascontiguousarray, (published["n_heldout"], n_correct)))
    assert np.array_equal(scores, published["scores"]) and np.array_equal(profile, published["profile"])
    heldout = [200 * (60000 - round(60000 * ratio)) for ratio in published["subset_ratios"]]
    assert published["n_heldout"].sum(axis=1).tolist() == heldout


def test_the_subsets_are_those_of_run_0_to_199(published):
    """At one ratio, all examples; subsets are drawn in the order of tfds."""
    hashing = pytest.importorskip("tensorflow_datasets.core.hashing")
    original = np.array(sorted(range(60000), key=hashing.Hasher("train").hash_key))
    training, n_heldout = mnist.Training(epochs=1), np.zeros(60000, int)
    for run in range(200):
        _, heldout_batches = mnist.draw_batches(run, 60000, 48000, training)
        n_heldout[original[heldout_batches[heldout_batches < 60000]]] += 1
    assert np.array_equal(n_heldout, published["n_heldout"][7])


def test_the_readme_counts_right(published, n_correct):
    scores, profile = published["scores"], published["profile"]
    for count, where in (
        (scores < 0.5, "below 0.5"),
        (scores == 1, "at exactly 1"),
        (scores == 0, "at exactly 0"),
    ):
        assert f"{where} are {count.sum():,}" in README.lower()
    at_zero = np.flatnonzero(scores == 0)
    assert f"The first of these {len(at_zero)} are {', '.join(map(str, at_zero[:5]))}." in README
    assert f"{np.mean(scores == 1):.0%} of the scores are exactly 1" in README
    accuracies = n_correct.sum(axis=1) / published["n_heldout"].sum(axis=1)
    assert ", ".join(f"{accuracy:.4f}"[1:] for accuracy in accuracies) in README
    assert f"the mean C-score is {scores.mean():.4f}" in README
    low = np.flatnonzero(scores < 0.5)
    gain = profile[8, low] - profile[0, low]
    assert f"of the {len(low):,} examples with a score below 0.5, {(gain > 0.5).sum()} gain" in README
    assert f"{(profile[8, low] < 0.1).sum()} are below 0.1" in README
    rare, wrong = [14756, 25800, 51988], [1604, 39184, 4476]
    assert f"examples {rare[0]}, {rare[1]}" in README and f"({rare[2]})" in README
    assert (profile[8, rare] - profile[0, rare] > 0.5).all() and (profile[8, wrong] < 0.1).all()
    assert all(f"({example}, " in README for example in wrong)


@needs_mnist
def test_the_order_is_that_of_the_official_files(published):
    _, labels, original = mnist.load("mnist")
    assert np.array_equal(published["labels"][original], labels)
    # Mislabeled or illegible, as anyone can see: a shift by one example would not find them.
    assert published["scores"][[80, 132, 494, 635, 1244, 1604, 2676, 2720, 4476, 5821]].max() < 0.05
