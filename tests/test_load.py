"""Loading: .npz files, the digits, and tfds data sets that the tests write with tfds's own writer."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    SMALL,
    error_here,
    files,
    messages,
    needs_mnist,
    run_here,
    run_script,
    same_results,
    script_error,
)

import mnist

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
    before = (tmp_path / "cscores-checkpoint.npz").read_bytes()
    np.savez(tmp_path / "own.npz", images=images, labels=np.append(labels[:-1], (labels[-1] + 1) % 10))
    assert "made with content " in error_here(*args)
    np.savez(tmp_path / "own.npz", images=np.append(images[:-1], images[-1:] ^ 1, axis=0), labels=labels)
    assert "made with content " in error_here(*args)
    assert (tmp_path / "cscores-checkpoint.npz").read_bytes() == before


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


@pytest.mark.parametrize(
    "arrays, says",
    [
        (dict(x=PIXELS, y=np.arange(6)), "it has x, y, not images and labels"),
        (dict(x_train=PIXELS, labels=np.arange(6)), "it has x_train, labels"),
        (
            dict(x_train=PIXELS / 255, y_train=np.arange(6)),
            "not float64 (6, 4, 4): try np.uint8(images * 255)",
        ),
        (dict(images=PIXELS[0], labels=np.arange(4)), "not uint8 (4, 4)"),
        (dict(images=np.uint8(3), labels=np.arange(4)), "not uint8 ()"),
        (dict(images=PIXELS[:, :0], labels=np.arange(6)), "not uint8 (6, 0, 4)"),
        (dict(images=PIXELS, labels=np.arange(5)), "integers (6,), not int64 (5,)"),
        (dict(images=PIXELS, labels=np.eye(6, dtype=int)), "not int64 (6, 6): try labels.argmax(axis=1)"),
        (dict(images=PIXELS > 0, labels=np.arange(6)), "not bool (6, 4, 4): try np.uint8(images * 255)"),
        (dict(images=np.zeros((6, 3, 8, 8), np.uint8), labels=np.arange(6)), "images.transpose(0, 2, 3, 1)"),
        (
            dict(images=PIXELS, labels=np.arange(6.0)),
            "not float64 (6,): try labels.argmax(axis=1) or np.unique(labels, return_inverse=True)[1]",
        ),
        (
            dict(images=PIXELS, labels=np.array([*"abcdef"])),
            "not <U1 (6,): try labels.argmax(axis=1) or np.unique(labels, return_inverse=True)[1]",
        ),
        (dict(images=PIXELS, labels=np.array([*"abcdef"], object)), "allow_pickle=False"),
        ({}, "it has nothing"),
    ],
    ids=str,
)
def test_arrays_that_do_not_suit(tmp_path, arrays, says):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    with pytest.raises(mnist.Problem) as caught:
        mnist.load(str(path))
    line = str(caught.value)
    assert says in line and "\n" not in line


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


def write_mnist(tfds, folder, builder="MNIST", n=300):
    """n examples in the layout of tfds's own builder; image and label tell an example's original index."""

    def generate(self, count):
        for i in range(count):
            image = np.zeros((28, 28, 1), np.uint8)
            image[0, :2, 0] = divmod(i, 256)
            yield i, {"image": image, "label": i % 10}

    with pytest.MonkeyPatch.context() as patch:
        builder = getattr(tfds.image_classification, builder)
        patch.setattr(builder, "_split_generators", lambda self, _: {"train": generate(self, n)})
        patch.setattr(builder, "_generate_examples", generate)
        builder(data_dir=folder).download_and_prepare()


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


def test_a_job_whose_order_is_not_the_original_one(tfds, tmp_path, monkeypatch):
    write_mnist(tfds, tmp_path / "data")
    figures = []
    monkeypatch.setattr("matplotlib.image.imsave", lambda file, figure, **_: figures.append(figure))
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
    assert np.array_equal(figure, mnist.draw_figure(images, labels, scores))


def test_tensorflow_is_silent_and_gets_no_gpu(tfds, tmp_path, monkeypatch):
    write_mnist(tfds, tmp_path / "data")
    args = ["--ratios", 0.5, "--runs", 1, "--epochs", 1, "--data-dir", tmp_path / "data"]
    _, err = run_script(*args, "--output-dir", tmp_path / "out")
    assert messages(err) == []
    calls = []
    monkeypatch.setattr("tensorflow.config.set_visible_devices", lambda *args: calls.append(args))
    monkeypatch.setattr(tfds, "load", lambda *args, **kwargs: calls.append("load"))
    with pytest.raises(mnist.Problem):
        mnist.load("mnist")
    assert calls == [([], "GPU"), "load"]


def test_a_tfds_set_whose_original_order_is_unknown(tfds, tmp_path):
    write_tfds(tfds, tmp_path, "colour_pictures")
    args = ["--dataset", "colour_pictures", "--ratios", 0.5, "--runs", 6, "--epochs", 1]
    run_here(*args, "--data-dir", tmp_path, "--output-dir", tmp_path / "out")
    images, labels, original = mnist.load("colour_pictures", tmp_path)
    assert images.shape == (40, 6, 5, 3) and original is None and images[:, 0, 0, 0].max() == 39
    written = files(tmp_path / "out")
    assert written == [
        "colour_pictures-examples.pdf",
        "cscores-checkpoint.npz",
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

    tfds = SimpleNamespace(load=fail, core=SimpleNamespace())
    config = SimpleNamespace(set_visible_devices=lambda *_: None)
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(config=config))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.core", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.core.hashing", SimpleNamespace(Hasher=None))
    with pytest.raises(mnist.Problem) as caught:
        mnist.load("mnist")
    for part in "storage.googleapis.com", "internet once", "FILE.npz":
        assert part in str(caught.value)


@needs_mnist
def test_real_mnist(tmp_path):
    run_script("--runs", 2, "--ratios", 0.1, "--output-dir", tmp_path)
    results = np.load(tmp_path / "cscores-orig-order.npz")
    assert results["labels"][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert results["n_heldout"].sum() == 2 * 54000
    accuracy = np.average(np.nan_to_num(results["profile"][0]), weights=results["n_heldout"][0])
    assert accuracy == pytest.approx(0.953, abs=0.004)
