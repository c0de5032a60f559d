"""Loading: scikit-learn's digits, and tfds data sets that the tests write with tfds's own writer."""

import os

import numpy as np
import pytest

import mnist

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
tfds = pytest.importorskip("tensorflow_datasets")


class SmallPictures(tfds.core.GeneratorBasedBuilder):
    """A base for data sets of 40 pictures, each filled with its index."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE, SPLIT, LABEL = (6, 5, 3), "train", tfds.features.ClassLabel(num_classes=4)

    def _info(self):
        features = {"image": tfds.features.Image(shape=self.SHAPE)}
        features |= {"label": self.LABEL} if self.LABEL else {}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {self.SPLIT: self._generate_examples()}

    def _generate_examples(self):
        for i in range(40):
            picture = {"image": np.full([size or 4 + i % 2 for size in self.SHAPE], i, np.uint8)}
            yield i, picture | ({"label": i % 4} if self.LABEL else {})


class ColourPictures(SmallPictures):
    pass


class UnevenPictures(SmallPictures):
    SHAPE = (None, None, 3)


class UnlabeledPictures(SmallPictures):
    LABEL = None


class TestPictures(SmallPictures):
    __test__ = False
    SPLIT = "test"


def write_mnist(folder, file_format, n=300):
    """n examples in the layout of tfds's own `mnist`; image and label tell an example's original index."""

    def generate(self, count):
        for i in range(count):
            image = np.zeros((28, 28, 1), np.uint8)
            image[0, :2, 0] = divmod(i, 256)
            yield i, {"image": image, "label": i % 10}

    with pytest.MonkeyPatch.context() as patch:
        builder = tfds.image_classification.MNIST
        patch.setattr(builder, "_split_generators", lambda self, _: {"train": generate(self, n)})
        patch.setattr(builder, "_generate_examples", generate)
        builder(data_dir=folder, file_format=file_format).download_and_prepare()
    assert (folder / "mnist" / "3.0.1" / "dataset_info.json").exists()


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds_mnist_and_its_original_order(tmp_path, file_format):
    write_mnist(tmp_path, file_format)
    images, labels, original = mnist.load("mnist", str(tmp_path))
    assert images.shape == (300, 28, 28, 1) and images.dtype == np.uint8
    assert labels.shape == (300,) and labels.dtype == np.int32
    assert sorted(original) == list(range(300)) and original.tolist() != list(range(300))
    assert np.array_equal(images[:, 0, :2, 0] @ np.array([256, 1]), original)
    assert np.array_equal(labels, original % 10)


def test_the_order_is_that_of_tfds_load(tmp_path):
    write_mnist(tmp_path, "tfrecord")
    data = tfds.as_numpy(tfds.load("mnist", split="train", batch_size=-1, data_dir=tmp_path))
    assert np.array_equal(mnist.load("mnist", tmp_path)[0], data["image"])


def test_the_whole_job_on_tfds_mnist(tmp_path):
    write_mnist(tmp_path / "data", "tfrecord")
    args = ["--ratios", "0.5", "--runs", "3", "--epochs", "1", "--data-dir", str(tmp_path / "data")]
    assert mnist.main([*args, "--output-dir", str(tmp_path / "out")]) == 0
    scores = np.load(tmp_path / "out" / "cscores.npy")
    in_order = np.load(tmp_path / "out" / "cscores-orig-order.npz")
    original = mnist.load("mnist", tmp_path / "data")[2]
    assert np.array_equal(in_order["labels"], np.arange(300) % 10)
    assert np.array_equal(in_order["scores"][original], scores, equal_nan=True)
    assert np.array_equal(in_order["profile"][0], in_order["scores"], equal_nan=True)


def test_colour_pictures_whose_original_order_is_unknown(tmp_path):
    args = ["--dataset", "colour_pictures", "--data-dir", str(tmp_path), "--ratios", "0.5", "--runs", "6"]
    assert mnist.main([*args, "--output-dir", str(tmp_path / "out"), "--epochs", "1"]) == 0
    images, labels, original = mnist.load("colour_pictures", tmp_path)
    assert images.shape == (40, 6, 5, 3) and original is None
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
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
    "dataset, says",
    [
        ("uneven_pictures", "(None, None, 3)"),
        ("unlabeled_pictures", "'label'"),
        ("test_pictures", "train"),
        ("no_such_data", "not found"),
    ],
)
def test_unsuitable_data_sets(tmp_path, capsys, dataset, says):
    args = ["--dataset", dataset, "--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    assert mnist.main(args) == 2
    error = capsys.readouterr().err  # tfds shows progress there while it writes test_pictures
    assert f"--dataset {dataset} (" in error.splitlines()[-1] and says in error.splitlines()[-1]
    assert "Traceback" not in error
    assert list((tmp_path / "out").iterdir()) == []


def test_no_network(tmp_path, capsys, monkeypatch):
    from requests.exceptions import ConnectionError

    def fail(self, **_):
        raise ConnectionError("HTTPSConnectionPool(host='storage.googleapis.com', port=443)")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    assert mnist.main(["--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--dataset digits" in error
    assert f"{tmp_path}/downloads/manual" in error
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert f"{part}-ubyte.gz" in error


def test_digits():
    images, labels, original = mnist.load("digits")
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and images.max() == 255
    assert labels[:10].tolist() == list(range(10)) and original.tolist() == list(range(1797))


def test_real_mnist(tmp_path):
    folder = os.environ.get("TFDS_DATA_DIR", "")
    if not os.path.isdir(os.path.join(folder, "mnist")):
        pytest.skip("TFDS_DATA_DIR does not hold the real MNIST")
    assert mnist.main(["--runs", "2", "--ratios", "0.1", "--output-dir", str(tmp_path)]) == 0
    results = np.load(tmp_path / "cscores-orig-order.npz")
    assert results["labels"][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert results["n_heldout"].sum() == 2 * 54000
    accuracy = np.average(np.nan_to_num(results["profile"][0]), weights=results["n_heldout"][0])
    assert accuracy == pytest.approx(0.953, abs=0.004)
