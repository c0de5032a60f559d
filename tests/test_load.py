"""Loading: .npz files, the digits, and tfds data sets that the tests write with tfds's own writer."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    SMALL,
    TFDS,
    contents,
    copy_runs,
    error_here,
    files,
    messages,
    needs_mnist,
    run_file,
    run_here,
    run_script,
    runs_dir,
    same_results,
    same_runs,
    script_error,
)

import mnist

ROOT = Path(mnist.__file__).parent
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
SCORES = "cscores.npy", "cscores-orig-order.npz"


# --- .npz ---
@pytest.fixture(scope="module")
def digits():
    images, labels, _ = mnist.load("digits")
    return images, labels


@pytest.fixture(scope="module")
def digits_job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    run_here(*SMALL, "--runs", 4, "--output-dir", folder)
    return folder


@pytest.mark.parametrize(
    "names", [("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels")]
)
def test_an_npz_of_the_digits_gives_the_scores_of_the_digits(digits, digits_job, tmp_path, names):
    images, labels = digits
    arrays = dict(zip(names, (images[..., 0], labels[:, None])))  # as MedMNIST and Keras's CIFAR have them
    np.savez_compressed(tmp_path / "own.npz", **arrays, x_test=np.zeros(3), names=np.array(["a", None]))
    run_here(*SMALL, "--runs", 4, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz")
    assert same_results(tmp_path, digits_job, SCORES)
    assert (tmp_path / "own-examples.pdf").exists()
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "own.npz").rename(tmp_path / "moved" / "own.npz")
    run_here(*SMALL, "--runs", 4, "--output-dir", tmp_path, "--dataset", moved)
    assert same_results(tmp_path, digits_job, SCORES)


def test_one_changed_label_is_other_data(digits, tmp_path):
    images, labels = digits
    args = [*SMALL, "--runs", 1, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz"]
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    run_here(*args)
    before = contents(runs_dir(tmp_path))
    np.savez(tmp_path / "own.npz", images=images, labels=np.append(labels[:-1], (labels[-1] + 1) % 10))
    assert "made with content " in error_here(*args)
    np.savez(tmp_path / "own.npz", images=np.append(images[:-1], images[-1:] ^ 1, axis=0), labels=labels)
    assert "made with content " in error_here(*args)
    assert contents(runs_dir(tmp_path)) == before


def test_labels_may_be_any_integers(digits, digits_job, tmp_path):
    images, labels = digits
    given = np.array([-9, -2, 7, 50, 51, 52, 53, 54, 1000, 2**40])[labels]  # they number the same classes
    np.savez(tmp_path / "own.npz", images=images, labels=given)
    run_here(*SMALL, "--runs", 4, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz")
    assert same_results(tmp_path, digits_job, SCORES[:1])
    with np.load(tmp_path / "cscores-orig-order.npz") as results:
        assert np.array_equal(results["labels"], given) and results["labels"].dtype == given.dtype


def test_colour_and_two_classes(tmp_path, monkeypatch, capsys):
    random = np.random.RandomState(0)
    labels = random.choice(np.array([3, 7], np.uint8), 60)
    images = random.randint(0, 200, (60, 6, 5, 3)).astype(np.uint8)
    images[labels == 7, :, :, 1] += 50
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels)
    monkeypatch.chdir(tmp_path)
    sizes = ["--ratios", 0.5, "--runs", 8, "--epochs", 20, "--batch-size", 30]
    run_here("--dataset", "own.npz", *sizes, "--output-dir", "out")
    with np.load(tmp_path / "out" / "cscores-orig-order.npz") as results:
        assert results["labels"].tolist() == labels.tolist()
        assert np.nanmean(results["scores"]) > 0.8, "green tells the classes apart"
    assert "tensorflow" not in capsys.readouterr().out.lower()


PIXELS = np.zeros((6, 4, 4), np.uint8)
CLASSES = np.arange(6)


@pytest.mark.parametrize(
    "arrays, says",
    [
        (dict(x=PIXELS, y=CLASSES), "images is not a file in the archive"),
        (dict(x_train=PIXELS, labels=CLASSES), "y_train is not a file in the archive"),
        (dict(arr_0=PIXELS, arr_1=CLASSES), "images is not a file in the archive"),  # without names
        ({}, "images is not a file in the archive"),
        (dict(x_train=PIXELS / 255, y_train=CLASSES), "0 to 255, not float64 "),
        (dict(images=PIXELS > 0, labels=CLASSES), "0 to 255, not bool "),
        (dict(images=PIXELS[0], labels=np.arange(4)), "not uint8 (4, 4)"),
        (dict(images=np.uint8(3), labels=np.arange(4)), "unsized"),
        (dict(images=PIXELS[:, :0], labels=CLASSES), "not uint8 (6, 0, 4)"),
        (
            dict(images=np.zeros((6, 3, 8, 8), np.uint8), labels=CLASSES),
            "channels last, not uint8 (6, 3, 8, 8)",
        ),
        (dict(images=PIXELS, labels=np.arange(5)), "6 whole numbers, not int64 (5,)"),
        (
            dict(images=PIXELS, labels=np.eye(6, dtype=int)),
            "6 whole numbers, not int64 (6, 6)",
        ),
        (dict(images=PIXELS, labels=np.arange(6) / 2), "whole numbers, not float64 (6,)"),
        (dict(images=PIXELS, labels=np.array([*"abcdef"])), "whole numbers, not <U1 (6,)"),
        (dict(images=PIXELS, labels=np.array([*"abcdef"], object)), "allow_pickle=False"),
        (dict(images=PIXELS.astype(object), labels=CLASSES), "allow_pickle=False"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_do_not_suit(tmp_path, arrays, says):
    assert says in load_error(tmp_path, **arrays)


def load_own(folder, **arrays):
    """Load the arrays from a file of the user's."""
    np.savez(folder / "own.npz", **arrays)
    return mnist.load(str(folder / "own.npz"))


def load_error(folder, **arrays):
    """The line with which a file with these arrays is refused."""
    with pytest.raises(mnist.Problem) as caught:
        load_own(folder, **arrays)
    line = str(caught.value)
    assert "\n" not in line
    return line


def follow(line, **arrays):
    """What the expression that a line advises makes of the arrays."""
    advice = line.rpartition(": try ")[2].replace("images.view(np.uint8), if bytes, or ", "")
    advice = re.split(", without | if ", advice)[0]
    return eval(advice, dict(np=np, N=600, height=8, width=8), arrays)


# --- .npz: images ---
@pytest.fixture(scope="module")
def im(digits):
    return digits[0][:600, :, :, 0].copy()


@pytest.fixture(scope="module")
def y(digits):
    return digits[1][:600].copy()


@pytest.fixture(scope="module")
def job_600(im, y, tmp_path_factory):
    folder = tmp_path_factory.mktemp("600")
    np.savez(folder / "own.npz", images=im, labels=y)
    run_here(*SMALL, "--runs", 2, "--output-dir", folder, "--dataset", folder / "own.npz")
    return folder


@pytest.mark.parametrize("dtype", ["int64", "int16", "uint16", "float16", "float32", "float64", ">i4", ">f8"])
def test_images_of_whole_numbers_are_taken_as_their_bytes(im, y, job_600, tmp_path, dtype):
    given = im.astype(dtype)
    images, _, _ = load_own(tmp_path, images=given, labels=y)
    assert images.dtype == np.uint8 and np.array_equal(images, im[..., None])
    run_here(*SMALL, "--runs", 2, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz")
    assert same_results(tmp_path, job_600) and same_runs(tmp_path, job_600), "with their hash of the images"


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "part of an array": lambda im: np.dstack([im, im])[:, :, : im.shape[2]],
    "every second": lambda im: np.repeat(im, 2, axis=2)[:, :, ::2],
    "backwards": lambda im: im[::-1, :, ::-1].copy()[::-1, :, ::-1],
    "read-only": lambda im: np.broadcast_to(im, im.shape),
}


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_in_any_layout(im, y, tmp_path, layout, dtype):
    given = LAYOUTS[layout](im.astype(dtype))
    images, _, _ = load_own(tmp_path, images=given, labels=y)
    for taken in images, mnist.check_images(given):
        assert taken.dtype == np.uint8 and np.array_equal(taken, im[..., None])


OTHER_SCALES = {
    "k / 255": lambda im: im / 255,
    "k / 255, float32": lambda im: np.float32(im) / 255,
    "k / 255, float16": lambda im: (im / 255).astype(np.float16),
    "k / 255, dark": lambda im: np.minimum(im, 100) / 255,
    "k / 255, up to 1.0000002": lambda im: np.float32(im) * np.float32(0.00392157),  # as with OpenCV
    "up to 1.02": lambda im: im / 250,  # as resampling leaves it
    "bool": lambda im: im > 127,
    "0 and 1": lambda im: np.int64(im > 127),
    "-1 to 1": lambda im: im / 127.5 - 1,
    "std": lambda im: im / im.std(),
    "mean and std": lambda im: (im - im.mean()) / im.std(),
    "mean and std, float32": lambda im: np.float32((im - im.mean()) / im.std()),
    "16 bits": lambda im: np.uint16(im) * 257,
    "12 bits": lambda im: np.uint16(im) * 16,
    "fractions": lambda im: im * 0.9 + 0.3,
    "int8": lambda im: (np.int16(im) - 128).astype(np.int8),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", OTHER_SCALES)
def test_the_advice_for_images_on_another_scale_keeps_the_pictures(im, y, tmp_path, scale):
    given = OTHER_SCALES[scale](im)
    made = follow(load_error(tmp_path, images=given, labels=y), images=given)
    assert np.array_equal(load_own(tmp_path, images=made, labels=y)[0], made[..., None])
    assert made.dtype == np.uint8 and made.shape == im.shape
    if scale.startswith("k / 255"):
        assert np.array_equal(made, np.minimum(im, 100) if "dark" in scale else im)
    else:
        given = given.astype(float).ravel()
        slope, offset = np.polyfit(given, made.ravel(), 1)
        assert slope > 0 and np.abs(slope * given + offset - made.ravel()).max() < 0.75, (
            "linear, but for rounding"
        )
        assert len(np.unique(made)) == len(np.unique(given)), "no gray level is lost"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("divisor", [1, 255])
def test_images_that_are_not_all_numbers(im, y, tmp_path, value, divisor):
    given = im / divisor
    given[5, 4, 3] = value
    line = load_error(tmp_path, images=given, labels=y)
    assert "images must be finite numbers" in line and "np." not in line


@pytest.mark.parametrize("dtype", [complex, str, bytes])
def test_images_of_no_numbers(im, y, tmp_path, dtype):
    given = im.astype(dtype)
    line = load_error(tmp_path, images=given, labels=y)
    assert f"images must be finite numbers, not {given.dtype} " in line
    assert "reshape" not in line, "their shape is right"


FORMS = {
    "flat": (lambda im: im.reshape(600, 64), ["reshape"]),
    "flat, 0 to 1": (lambda im: im.reshape(600, 64) / 255, ["reshape", "interp"]),
    "gray, channel first": (lambda im: im[:, None], ["transpose"]),
    "colour, channel first": (lambda im: np.stack([im, im // 2, 255 - im], axis=1), ["transpose"]),
    "PyTorch": (lambda im: np.float32(np.stack([im, im // 2, 255 - im], 1)) / 255, ["transpose", "interp"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_advice_for_images_in_another_shape(im, y, tmp_path, form):
    make, steps = FORMS[form]
    images = make(im)
    for step in steps:
        line = load_error(tmp_path, images=images, labels=y)
        assert step in line
        images = follow(line, images=images)
    right = np.stack([im, im // 2, 255 - im], axis=-1) if form in ("colour, channel first", "PyTorch") else im
    loaded, _, _ = load_own(tmp_path, images=images, labels=y)
    assert loaded.dtype == np.uint8 and np.array_equal(loaded, right.reshape(600, 8, 8, -1))


def test_equal_bytes_in_another_shape_are_other_data(im, y, tmp_path):
    args = [*SMALL, "--runs", 2, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz"]
    np.savez(tmp_path / "own.npz", images=im, labels=y)
    run_here(*args)
    before = contents(runs_dir(tmp_path))
    for shape in (600, 4, 16), (600, 4, 4, 4):
        np.savez(tmp_path / "own.npz", images=im.reshape(shape), labels=y)
        assert "made with algorithm " in error_here(*args), "the program has their shape"
    assert contents(runs_dir(tmp_path)) == before


# --- .npz: labels ---
LABELS = {
    "uint8": lambda y: y.astype(np.uint8),
    "int64": lambda y: y.astype(np.int64),
    "big-endian": lambda y: y.astype(">i4"),
    "float32": lambda y: y.astype(np.float32),
    "float64 (N, 1)": lambda y: y[:, None].astype(float),
    "float64 (1, N)": lambda y: y[None].astype(float),
    "int32 (N, 1)": lambda y: y[:, None],
    "uint8 (1, N)": lambda y: y[None].astype(np.uint8),
    "big float64 (N, 1)": lambda y: y[:, None].astype(">f8"),
}


@pytest.mark.parametrize("form", LABELS)
def test_labels_of_whole_numbers_are_taken_and_the_job_goes_on(im, y, job_600, tmp_path, form):
    given = LABELS[form](y)
    _, labels, original = load_own(tmp_path, images=im, labels=given)
    assert labels.shape == (600,) and np.array_equal(labels, y) and np.array_equal(original, np.arange(600))
    assert labels.dtype == (given.dtype if given.dtype.kind in "iu" else np.int64)
    copy_runs(job_600, tmp_path)
    run = run_file(tmp_path, 1, 1)
    before = run.stat().st_mtime_ns
    run_here(*SMALL, "--runs", 2, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz")
    assert run.stat().st_mtime_ns == before, "it trained nothing"
    assert same_results(tmp_path, job_600, ["cscores.npy"]) and same_runs(tmp_path, job_600)
    with np.load(tmp_path / "cscores-orig-order.npz") as results:
        assert np.array_equal(results["labels"], y) and results["labels"].dtype == labels.dtype


def test_labels_true_and_false(im, y, tmp_path):
    _, labels, _ = load_own(tmp_path, images=im, labels=y > 4)
    assert labels.dtype.kind == "i" and labels.tolist() == [int(label > 4) for label in y]
    run_here(*SMALL, "--runs", 2, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz")
    before = (tmp_path / "cscores.npy").read_bytes()
    load_own(tmp_path, images=im, labels=(y > 4).astype(np.uint8))
    run_here(*SMALL, "--runs", 2, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz")
    assert (tmp_path / "cscores.npy").read_bytes() == before


def test_labels_beyond_int64(im, y, job_600, tmp_path):
    given = y.astype(np.uint64) + np.uint64(2**63 + 2**60)
    _, labels, _ = load_own(tmp_path, images=im, labels=given)
    assert labels.dtype == np.uint64 and labels.tolist() == [int(label) + 2**63 + 2**60 for label in y]
    run_here(*SMALL, "--runs", 2, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz")
    assert same_results(tmp_path, job_600, SCORES[:1])
    with np.load(tmp_path / "cscores-orig-order.npz") as results:
        assert results["labels"].dtype == np.uint64 and np.array_equal(results["labels"], given)


OTHER_LABELS = {
    "fractions": (lambda y: y + 0.5, "np.unique("),
    "fractions (N, 1)": (lambda y: y[:, None] / 10, "np.unique("),
    "text": (lambda y: np.array([f"class {label}" for label in y]), "np.unique("),
    "text (1, N)": (lambda y: np.array([[f"class {label}" for label in y]]), "np.unique("),
    "bytes": (lambda y: y.astype("S"), "np.unique("),
    "beyond float64": (lambda y: (y + 1) * 1e300, "np.unique("),
    "one-hot": (lambda y: np.eye(10, dtype=int)[y], "argmax(axis=1)"),
    "one-hot, float32": (lambda y: np.eye(10, dtype=np.float32)[y], "argmax(axis=1)"),
    "one-hot, bool": (lambda y: np.eye(10, dtype=bool)[y], "argmax(axis=1)"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", OTHER_LABELS)
def test_the_advice_for_other_labels_gives_the_right_ones(im, y, tmp_path, form):
    make, advice = OTHER_LABELS[form]
    line = load_error(tmp_path, images=im, labels=make(y))
    assert "600 whole numbers" in line and advice in line
    assert ("np.unique(" in line) != ("argmax" in line), "an advice for this shape, no other"
    made = follow(line, labels=make(y))
    assert np.array_equal(load_own(tmp_path, images=im, labels=made)[1], y)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_some_of_which_are_missing(im, y, tmp_path, dtype):
    given = np.where(y == 3, np.nan, y).astype(dtype)
    line = load_error(tmp_path, images=im, labels=given)
    assert "without unlabeled examples" in line, "np.unique makes a class of them"
    known = ~np.isnan(given)
    _, labels, _ = load_own(tmp_path, images=im[known], labels=follow(line, labels=given[known]))
    assert np.array_equal(labels, np.unique(y[known], return_inverse=True)[1])


@pytest.mark.parametrize("n_classes", [2, 14])
def test_several_labels_an_image(im, tmp_path, n_classes):
    given = np.random.RandomState(0).randint(0, 2, (600, n_classes))  # as in ChestMNIST
    line = load_error(tmp_path, images=im, labels=given)
    assert f"(600, {n_classes})" in line and "np.unique" not in line
    assert "argmax" not in line or "if each row has one 1" in line


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, float, bool])
def test_labels_of_one_class(im, tmp_path, dtype):
    line = load_error(tmp_path, images=im, labels=np.ones(600, dtype))
    assert "several classes" in line and "every score" in line
    assert "unique" not in line and "argmax" not in line


@pytest.mark.parametrize("shape", [(599,), (599, 1), (1200,), ()], ids=str)
def test_another_number_of_labels_than_images(im, tmp_path, shape):
    line = load_error(tmp_path, images=im, labels=np.arange(np.prod(shape, dtype=int)).reshape(shape) % 10)
    assert "600" in line and str(shape) in line
    assert "argmax" not in line and "unique" not in line, "no expression gives the missing labels"


# --- .npz: what other tools write ---
def test_lists_of_arrays(im, y, tmp_path):
    images, labels, _ = load_own(tmp_path, images=[*im], labels=[int(label) for label in y])
    assert images.dtype == np.uint8 and np.array_equal(images, im[..., None]) and np.array_equal(labels, y)


def test_arrays_of_matlab(im, y, tmp_path):
    io = pytest.importorskip("scipy.io")
    io.savemat(tmp_path / "own.mat", dict(images=im.astype(float), row=y.astype(float), column=y[:, None]))
    mat = io.loadmat(tmp_path / "own.mat")
    assert mat["images"].flags.f_contiguous and mat["row"].shape == (1, 600)
    for name in "row", "column":
        images, labels, _ = load_own(tmp_path, images=mat["images"], labels=mat[name])
        assert images.dtype == np.uint8 and np.array_equal(images, im[..., None])
        assert labels.shape == (600,) and np.array_equal(labels, y)


def test_arrays_of_openml(im, y, tmp_path):
    images, labels = im.reshape(600, 64).astype(float), y.astype(str)  # by scikit-learn's fetch_openml
    images = follow(load_error(tmp_path, images=images, labels=labels), images=images)
    labels = follow(load_error(tmp_path, images=images, labels=labels), labels=labels)
    loaded, found, _ = load_own(tmp_path, images=images, labels=labels)
    assert np.array_equal(loaded, im[..., None]) and np.array_equal(found, y)


def test_a_thousand_classes(tmp_path, monkeypatch):
    random = np.random.RandomState(0)
    labels = random.permutation(np.repeat(np.arange(1000), 3))
    images = random.randint(0, 256, (3000, 4, 4)).astype(np.uint8)
    images[:, 0, 0], images[:, 0, 1] = labels // 256, labels % 256
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    figures = []
    monkeypatch.setattr("matplotlib.image.imsave", lambda file, arr, **_: figures.append(arr))
    sizes = ["--ratios", 0.5, "--runs", 8, "--epochs", 1]
    run_here("--dataset", tmp_path / "own.npz", *sizes, "--output-dir", tmp_path / "out")
    (figure,) = figures
    assert figure.shape == (50 * 6, 21 * 6, 3)
    rows = figure.reshape(50, 6, 21, 6, 3)[:, 1:-1, 0, 1:-1, 0]  # the highest-scored example of each class
    assert rows[:, 0, :2].tolist() == [[0, label] for label in range(50)], "the first 50 classes"
    with np.load(tmp_path / "out" / "cscores-orig-order.npz") as results:
        assert np.array_equal(results["labels"], labels) and np.isfinite(results["scores"]).sum() > 2900


# --- .npz: files ---
@pytest.mark.parametrize("content", [None, b"", b"not an archive", b"PK\x03\x04 cut off"], ids=str)
def test_files_that_are_no_npz(tmp_path, content):
    if content is not None:
        (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(mnist.Problem) as caught:
        mnist.load(str(tmp_path / "own.npz"))
    assert f"cannot load --dataset {tmp_path / 'own.npz'} (" in str(caught.value)


def test_an_npz_in_capitals(tmp_path):
    np.savez(tmp_path / "own.npz", images=PIXELS, labels=np.arange(6))
    (tmp_path / "own.npz").rename(tmp_path / "OWN.NPZ")
    assert mnist.load(str(tmp_path / "OWN.NPZ"))[0].shape == (6, 4, 4, 1)


@pytest.mark.parametrize(
    "dataset, name",
    [("mnist:3.0.1", "mnist"), ("a/own.npz", "own"), ("FILE.NPZ", "FILE"), ("emnist/letters", "letters")],
)
def test_results_are_named_after_the_data_set(dataset, name):
    assert mnist.parse_args(["--dataset", dataset]).dataset_name == name


def test_npz_and_digits_need_no_tfds(digits, tmp_path):
    for module in "tensorflow", "tensorflow_datasets", "sklearn":
        (tmp_path / f"{module}.py").write_text("raise ModuleNotFoundError(f'No module named {__name__!r}')")
    np.savez(tmp_path / "own.npz", images=digits[0], labels=digits[1])
    env = {"PYTHONPATH": str(tmp_path)}
    run_script(*SMALL, "--runs", 1, "--output-dir", tmp_path, "--dataset", tmp_path / "own.npz", env=env)
    line = script_error("--output-dir", tmp_path / "out", env=env)
    assert "No module named 'tensorflow_datasets'" in line
    for way_out in "Python < 3.14", "FILE.npz", "digits":
        assert way_out in line


def test_digits(digits):
    images, labels = digits
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and images.max() == 255
    assert labels[:10].tolist() == list(range(10)) and labels.dtype == np.int32
    assert mnist.load("digits")[2].tolist() == list(range(1797))


# --- tfds ---
@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets")


def write_tfds(tfds, folder, name, shape=(6, 5, 3), split="train", label=True, file_format="tfrecord"):
    """40 pictures, each filled with its index, as the tfds data set `name`."""
    features = {"image": tfds.features.Image(shape=shape)}
    features |= {"label": tfds.features.ClassLabel(num_classes=4)} if label else {}

    def examples():
        for i in range(40):
            picture = {"image": np.full([size or 4 + i % 2 for size in shape], i, np.uint8)}
            yield i, picture | ({"label": i % 4} if label else {})

    body = dict(
        VERSION=tfds.core.Version("1.0.0"),
        _info=lambda self: tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label") if label else None,
        ),
        _split_generators=lambda self, _: {split: self._generate_examples()},
        _generate_examples=lambda self: examples(),
    )
    builder = type(name.title().replace("_", ""), (tfds.core.GeneratorBasedBuilder,), body)
    builder(data_dir=folder, file_format=file_format).download_and_prepare()


def mnist_examples(n):
    """n examples in the layout of tfds's MNIST; image and label tell an example's original index."""
    for i in range(n):
        image = np.zeros((28, 28, 1), np.uint8)
        image[0, :2, 0] = divmod(i, 256)
        yield i, {"image": image, "label": i % 10}


def write_mnist(tfds, folder, builder="MNIST", n=300, **kwargs):
    """n examples by tfds's own builder."""
    with pytest.MonkeyPatch.context() as patch:
        builder = getattr(tfds.image_classification, builder)
        patch.setattr(builder, "_split_generators", lambda self, _: {"train": mnist_examples(n)})
        builder(data_dir=folder).download_and_prepare(**kwargs)


def write_originals(tfds, folder, name, n=300):
    """A small tfds set, read by tfds's own generator from files in the set's original format."""
    builder = tfds.builder(name, data_dir=folder)
    height, width, channels = builder.info.features["image"].shape
    images = np.zeros((n, height, width, channels), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(n), 256)
    labels = np.arange(n) % builder.info.features["label"].num_classes
    folder.mkdir(exist_ok=True)
    if builder.name.startswith("cifar"):
        coarse = [labels % 7] if builder.name == "cifar100" else []
        planes = images.transpose(0, 3, 1, 2).reshape(n, -1)
        records = np.column_stack([*coarse, labels, planes]).astype(np.uint8)
        paths = [folder / f"{i}.bin" for i in range(5)]
        for path, part in zip(paths, np.array_split(records, 5)):
            part.tofile(path)
        args = "train_", [str(path) for path in paths]
    elif builder.name == "cmaterdb":
        np.savez(folder / "raw.npz", images=images, labels=labels)
        args = (str(folder / "raw.npz"),)
    else:
        (folder / "images").write_bytes(bytes(16) + images.tobytes())
        (folder / "labels").write_bytes(bytes(8) + labels.astype(np.uint8).tobytes())
        args = n, str(folder / "images"), str(folder / "labels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(builder), "_split_generators", lambda self, _: {"train": self._generate_examples(*args)}
        )
        builder.download_and_prepare()
    return builder.info.features["label"].num_classes


@pytest.mark.parametrize(
    "builder, dataset",
    [("MNIST", "mnist"), ("FashionMNIST", "fashion_mnist"), ("KMNIST", "kmnist"), ("MNIST", "mnist:3.0.1")],
)
def test_tfds_mnist_and_its_original_order(tfds, tmp_path, builder, dataset):
    write_mnist(tfds, tmp_path, builder)
    images, labels, original = mnist.load(dataset, str(tmp_path))
    assert images.shape == (300, 28, 28, 1) and images.dtype == np.uint8
    assert labels.shape == (300,) and labels.dtype == np.int32
    assert sorted(original) == list(range(300)) and original.tolist() != list(range(300))
    assert np.array_equal(images[:, 0, :2, 0] @ np.array([256, 1]), original)
    assert np.array_equal(labels, original % 10)


@pytest.mark.parametrize("dataset", ["mnist", "emnist/letters", "emnist", "cifar10", "cifar100", "cmaterdb"])
def test_tfds_sets_whose_original_order_is_known(tfds, tmp_path, dataset):
    n_classes = write_originals(tfds, tmp_path, dataset)
    images, labels, original = mnist.load(dataset, str(tmp_path))
    assert sorted(original) == list(range(300)) and original.tolist() != list(range(300))
    assert np.array_equal(images[:, 0, :2, 0] @ np.array([256, 1]), original)
    assert np.array_equal(labels, original % n_classes)


def test_the_original_order_of_emnist_in_a_job(tfds, tmp_path):
    n_classes = write_originals(tfds, tmp_path / "data", "emnist/letters")
    args = ["--dataset", "emnist/letters", "--ratios", 0.5, "--runs", 2, "--epochs", 1]
    run_here(*args, "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    assert files(tmp_path / "out") == [
        "cscores-orig-order.npz",
        "cscores.npy",
        "letters-examples.pdf",
    ]
    scores = np.load(tmp_path / "out" / "cscores.npy")
    _, _, original = mnist.load("emnist/letters", tmp_path / "data")
    with np.load(tmp_path / "out" / "cscores-orig-order.npz") as results:
        assert np.array_equal(results["labels"], np.arange(300) % n_classes)
        assert np.array_equal(results["scores"][original], scores, equal_nan=True)


@pytest.mark.parametrize("n_shards", [1, 8])
def test_tfds_sets_in_several_files(tfds, tmp_path, n_shards):
    config = tfds.download.DownloadConfig(num_shards=n_shards)
    write_mnist(tfds, tmp_path, n=600, download_config=config)
    assert len(list(tmp_path.glob("mnist/*/*-train.tfrecord-*"))) == n_shards
    images, labels, original = mnist.load("mnist", str(tmp_path))
    assert sorted(original) == list(range(600)) and original.tolist() != list(range(600))
    assert np.array_equal(images[:, 0, :2, 0] @ np.array([256, 1]), original)
    assert np.array_equal(labels, original % 10)
    write_mnist(tfds, tmp_path / "other", n=600)
    assert np.array_equal(images, mnist.load("mnist", tmp_path / "other")[0]), "in however many files"


@needs_mnist
def test_real_mnist_in_several_files(tfds, tmp_path, monkeypatch):
    """The first 2,000 digits of the official files; for all, tfds needs more than a minute."""
    manual = Path(TFDS) / "downloads" / "manual"
    if not manual.is_dir():
        pytest.skip("the official files are not there")
    (tmp_path / "downloads" / "manual").mkdir(parents=True)
    for file in manual.iterdir():
        shutil.copyfile(file, tmp_path / "downloads" / "manual" / file.name)
    module = sys.modules[tfds.image_classification.MNIST.__module__]
    monkeypatch.setattr(module, "_TRAIN_EXAMPLES", 2000)
    monkeypatch.setattr(module, "_TEST_EXAMPLES", 10)
    config = tfds.download.DownloadConfig(num_shards=8)
    tfds.builder("mnist", data_dir=tmp_path).download_and_prepare(download_config=config)
    assert len(list(tmp_path.glob("mnist/*/*-train.tfrecord-*"))) == 8
    images, labels, original = mnist.load("mnist", str(tmp_path))
    all_images, all_labels, all_original = mnist.load("mnist")
    in_order = np.argsort(all_original)[:2000]
    assert np.array_equal(images[np.argsort(original)], all_images[in_order])
    assert np.array_equal(labels[np.argsort(original)], all_labels[in_order])


def test_a_job_whose_order_is_not_the_original_one(tfds, tmp_path, monkeypatch):
    write_mnist(tfds, tmp_path / "data")
    figures = []
    monkeypatch.setattr("matplotlib.image.imsave", lambda file, arr, **_: figures.append(arr))
    args = ["--ratios", 0.5, "--runs", 3, "--epochs", 1, "--data-dir", tmp_path / "data"]
    run_here(*args, "--output-dir", tmp_path / "out")
    scores = np.load(tmp_path / "out" / "cscores.npy")
    in_order = np.load(tmp_path / "out" / "cscores-orig-order.npz")
    images, labels, original = mnist.load("mnist", tmp_path / "data")
    assert np.array_equal(in_order["labels"], np.arange(300) % 10)
    assert np.array_equal(in_order["scores"][original], scores, equal_nan=True)
    assert np.array_equal(in_order["profile"][0], in_order["scores"], equal_nan=True)
    assert np.array_equal(in_order["n_heldout"][0] == 0, np.isnan(in_order["scores"]))
    (figure,) = figures
    assert np.array_equal(figure, mnist.draw_figure(images, labels, scores, range(10)))


def test_tensorflow_is_silent_and_gets_no_gpu(tfds, tmp_path, monkeypatch):
    write_mnist(tfds, tmp_path / "data")
    args = ["--ratios", 0.5, "--runs", 1, "--epochs", 1, "--data-dir", tmp_path / "data"]
    _, err = run_script(*args, "--output-dir", tmp_path / "out")
    assert messages(err) == []
    calls = []
    monkeypatch.setattr("tensorflow.config.set_visible_devices", lambda *args: calls.append(args))

    def fail(*args, **kwargs):
        calls.append("builder")
        raise ConnectionError

    monkeypatch.setattr(tfds, "load", fail)
    with pytest.raises(mnist.Problem):
        mnist.load("mnist", tmp_path)
    assert calls == [([], "GPU"), "builder"]


def test_a_tfds_set_whose_original_order_is_unknown(tfds, tmp_path):
    write_tfds(tfds, tmp_path, "colour_pictures")
    args = ["--dataset", "colour_pictures", "--ratios", 0.5, "--runs", 6, "--epochs", 1]
    run_here(*args, "--data-dir", tmp_path, "--output-dir", tmp_path / "out")
    images, labels, original = mnist.load("colour_pictures", tmp_path)
    assert images.shape == (40, 6, 5, 3) and original is None and images[:, 0, 0, 0].max() == 39
    written = files(tmp_path / "out")
    assert written == [
        "colour_pictures-examples.pdf",
        "cscores-tfds-order.npz",
        "cscores.npy",
    ]
    results = np.load(tmp_path / "out" / "cscores-tfds-order.npz")
    assert np.array_equal(results["labels"], labels)
    assert np.array_equal(results["scores"], np.load(tmp_path / "out" / "cscores.npy"), equal_nan=True)


@pytest.mark.parametrize(
    "dataset, settings, says",
    [
        ("uneven_pictures", dict(shape=(None, None, 3)), "shape"),
        ("unlabeled_pictures", dict(label=False), "supervised"),
        ("test_pictures", dict(split="test"), "train"),
        ("no_such_data", None, "not found"),
    ],
)
def test_unsuitable_tfds_sets(tfds, tmp_path, dataset, settings, says):
    if settings:
        write_tfds(tfds, tmp_path, dataset, **settings)
    with pytest.raises(mnist.Problem) as caught:
        mnist.load(dataset, tmp_path)
    line = str(caught.value)
    assert line.startswith(f"cannot load --dataset {dataset} (") and says in line.partition("): ")[0]
    assert "a labeled tfds set" in line


def test_no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("HTTPSConnectionPool(host='storage.googleapis.com', port=443)")

    builder = SimpleNamespace(is_prepared=lambda: False)
    tfds = SimpleNamespace(builder=lambda *_, **__: builder, load=fail, ReadConfig=lambda **_: None)
    config = SimpleNamespace(set_visible_devices=lambda *_: None)
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(config=config))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.core", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.core.hashing", SimpleNamespace(Hasher=None))
    with pytest.raises(mnist.Problem) as caught:
        mnist.load("mnist")
    for part in "storage.googleapis.com", "internet once", "FILE.npz":
        assert part in str(caught.value)


@pytest.mark.parametrize("n_written", [None, 0, 7])
def test_a_preparation_that_fails_is_tried_once(tfds, tmp_path, monkeypatch, n_written):
    tried = []

    def fail(self, _):
        def examples():
            yield from mnist_examples(n_written)
            raise ConnectionError("no route to storage.googleapis.com")

        tried.append(self.name)
        if n_written is None:
            raise ConnectionError("no route to storage.googleapis.com")
        return {"train": examples()}

    monkeypatch.setattr(tfds.image_classification.MNIST, "_split_generators", fail)
    with pytest.raises(mnist.Problem) as caught:
        mnist.load("mnist", tmp_path)
    line = str(caught.value)
    assert line.startswith("cannot load --dataset mnist (") and "no route to storage.googleapis.com" in line
    assert "internet once" in line and tried == ["mnist"]
    monkeypatch.undo()
    write_mnist(tfds, tmp_path)
    assert len(mnist.load("mnist", tmp_path)[0]) == 300, "the next job prepares it"


def prepare_with_others(folder, own, n=3):
    """Load MNIST in one of n processes, none of which ends its preparation before all have begun theirs."""
    import tensorflow_datasets as tfds

    folder = Path(folder)

    def wait_for_all_to(stage):
        (folder / f"{stage}-{own}").touch()
        deadline = time.monotonic() + 90
        while len(list(folder.glob(f"{stage}-*"))) < n:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def examples():
        wait_for_all_to("begin")
        yield from mnist_examples(300)
        wait_for_all_to("end")

    tfds.image_classification.MNIST._split_generators = lambda self, _: {"train": examples()}
    images, labels, original = mnist.load("mnist", folder / "data")
    np.savez(folder / f"loaded-{own}.npz", images=images, labels=labels, original=original)


def test_three_jobs_that_prepare_a_set_at_once(tfds, tmp_path):
    code = "import sys, test_load; test_load.prepare_with_others(*sys.argv[1:])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    commands = [[sys.executable, "-c", code, str(tmp_path), str(own)] for own in range(3)]
    processes = [subprocess.Popen(command, env=env, **pipes) for command in commands]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert len(list(tmp_path.glob("end-*"))) == 3, "all have prepared it"
    assert [path.name for path in (tmp_path / "data" / "mnist").iterdir()] == ["3.0.1"], (
        "nothing is left over"
    )
    for own in range(3):
        with np.load(tmp_path / f"loaded-{own}.npz") as loaded:
            original = loaded["original"]
            assert sorted(original) == list(range(300))
            assert np.array_equal(loaded["images"][:, 0, :2, 0] @ np.array([256, 1]), original)
            assert np.array_equal(loaded["labels"], original % 10)


@needs_mnist
def test_real_mnist(tmp_path):
    run_script("--runs", 2, "--ratios", 0.1, "--output-dir", tmp_path)
    results = np.load(tmp_path / "cscores-orig-order.npz")
    assert results["labels"][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert results["n_heldout"].sum() == 2 * 54000
    accuracy = np.average(np.nan_to_num(results["profile"][0]), weights=results["n_heldout"][0])
    assert accuracy == pytest.approx(0.953, abs=0.004)


def test_dark_pictures_are_warned_of(im, y, tmp_path, capsys):
    def warnings(images):
        load_own(tmp_path, images=images, labels=y)
        return capsys.readouterr().err

    assert warnings(im) == ""
    dark = np.round(im / 255 * 16)  # as scikit-learn has its digits
    assert "no pixel is above 16: scale them so that white is 255" in warnings(dark)
    assert warnings(np.round(dark * (255 / 16))) == ""
    assert "no pixel is above 1: " in warnings(np.uint8(im > 128))


def test_bytes_without_their_sign(im, y, tmp_path):
    line = load_error(tmp_path, images=im.view(np.int8), labels=y)
    advice = re.search(r"try (images\.view\(np\.uint8\)), if bytes, or ", line)[1]
    assert np.array_equal(eval(advice, dict(np=np, images=im.view(np.int8))), im)
