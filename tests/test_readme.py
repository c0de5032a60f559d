"""What stands in README.md, run as it stands there."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import DIGITS, SCRIPT, run_script
from PIL import Image

ROOT = Path(SCRIPT).parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block(text):
    """The one block of Python that holds a text."""
    (found,) = [each for each in PYTHON if text in each]
    return found


def published():
    with np.load(ROOT / "mnist-cscores-orig-order.npz") as file:
        return dict(file)


def test_the_network_for_photographs_replaces_the_mlp(tmp_path):
    network, script = block("def init("), SCRIPT.read_text()
    assert len(network.splitlines()) <= 25
    start, end = script.index("def init("), script.index("def loss(")
    (tmp_path / "mnist.py").write_text(script[:start] + network + "\n\n" + script[end:])
    args = [*DIGITS, "--ratios", 0.5, "--runs", 2, "--batch-size", 100, "--output-dir", tmp_path]
    out, _ = run_script(*args, script=tmp_path / "mnist.py")
    assert float(re.search(r"held-out accuracy +(\S+)", out)[1]) > 0.93, "measured: 0.963 with four runs"


def test_a_folder_of_pictures_of_all_kinds(tmp_path):
    """Black ink on white, whatever the file; hidden and stray files are none."""
    ink = np.full((40, 40), 255, np.uint8)
    ink[10:30, 15:25] = 0
    transparent = np.zeros((40, 40, 4), np.uint8)
    transparent[..., 3] = 255 - ink
    files = {
        "a/gray.png": Image.fromarray(ink),
        "a/sixteen.png": Image.fromarray(ink.astype(np.uint16) * 257),
        "a/transparent.png": Image.fromarray(transparent),
        "b/colour.PNG": Image.fromarray(np.stack([ink] * 3, axis=-1)),
        "b/palette.gif": Image.fromarray(ink).convert("P"),
        "b/.ipynb_checkpoints.png": Image.fromarray(ink),
        ".ipynb_checkpoints/gray.png": Image.fromarray(ink),
    }
    for name, image in files.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    turned = Image.fromarray(ink.T)
    turned.getexif()[0x0112] = 6  # a camera held upright
    turned.save(tmp_path / "pictures" / "b" / "turned.png", exif=turned.getexif())
    for stray in "a/.DS_Store", "a/notes.txt", "list.csv":
        (tmp_path / "pictures" / stray).write_text("no picture")
    subprocess.run([sys.executable, "-c", block("Image.open(")], cwd=tmp_path, check=True)
    with np.load(tmp_path / "pictures.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (6, 28, 28) and images.dtype == np.uint8 and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (np.abs(images.astype(int) - images[0]) <= 1).all(), "the same picture six times"
    assert images[0].min() < 10 and images[0].max() > 245


def test_the_checksum_is_that_of_the_published_file():
    digest = hashlib.sha256((ROOT / "mnist-cscores-orig-order.npz").read_bytes()).hexdigest()
    assert digest in README


def test_the_examples_that_lose_are_counted_right():
    names = published() | dict(np=np)
    exec(block("losers"), names)
    losers = names["losers"]
    assert f"{len(losers)} examples lose" in README.replace("\n", " ")
    for example in 26622, 5084:
        first, last = names["profile"][[0, 8], example]
        assert example in losers[:10] and f"{example}: from {first:.2f} to {last:.2f}" in README.replace(
            "\n", " "
        )


def test_the_standard_error_is_that_of_the_formula():
    names = published() | dict(np=np)
    (formula,) = re.findall(r"`(np\.sqrt\(np\.sum\(profile.*?)`", README)
    errors = eval(formula, names)
    near = np.abs(names["scores"] - 0.5) < 0.05
    assert f"/ 9`: {1.25 * np.median(errors[near]):.2f} for a score near 0.5" in " ".join(README.split())


def test_readme_is_short():
    assert len(README.splitlines()) <= 250
