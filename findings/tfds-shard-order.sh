#!/usr/bin/env bash
# tensorflow-datasets 4.9.10: shuffle_files=False reads a split of several files in blocks of 16
# examples from up to 16 files in turn. The order is the same each time, but is neither that of
# generation nor that in the files, by hash of the key: ReadConfig(interleave_cycle_length=1) is.
# With at most 16 examples a file nothing shows. The guide to determinism tells of this; what
# as_dataset says of shuffle_files does not.
# Expected: unshuffled, the files one after the other, and first what train[:100] holds.
# Seen, with 400 examples in 8 files:
#   shards: 8
#   keys 16 to 19 by hash:            253 64 261 282
#   read 16 to 19, default:           124 163 326 209
#   read 16 to 19, cycle_length=1:    253 64 261 282
#   common to the first 100 read of train and to train[:100]: 32
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
unset PYTHONPATH
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check tensorflow-datasets==4.9.10 \
    tensorflow-cpu==2.21.0 importlib_resources==7.1.0 numpy==2.4.6

cat > order.py <<'EOF'
import contextlib
import sys

import numpy as np
import tensorflow_datasets as tfds


class Numbers(tfds.core.GeneratorBasedBuilder):  # the example with the key i has the label i
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(400):
            yield i, {"label": i}


tfds.disable_progress_bar()
builder = Numbers(data_dir="data")
with contextlib.redirect_stdout(sys.stderr):  # it reports what it does
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=8))


def read(split="train", **config):
    dataset = builder.as_dataset(
        split=split, shuffle_files=False, read_config=tfds.ReadConfig(**config)
    )
    return [int(example["label"]) for example in tfds.as_numpy(dataset)]


shards = builder.info.splits["train"].num_shards
default, one_by_one = read(), read(interleave_cycle_length=1)
of_hashes = sorted(range(400), key=tfds.core.hashing.Hasher("train").hash_key)
common = len(set(default[:100]) & set(read("train[:100]")))
print("shards:", shards)
print("keys 16 to 19 by hash:           ", *of_hashes[16:20])
print("read 16 to 19, default:          ", *default[16:20])
print("read 16 to 19, cycle_length=1:   ", *one_by_one[16:20])
print("common to the first 100 read of train and to train[:100]:", common)
assert shards == 8, "not 8 shards"
assert default == read(), "the default order varies from call to call"
assert default not in (of_hashes, list(range(400))), "the default no longer interleaves the files"
assert one_by_one == of_hashes, "interleave_cycle_length=1 no longer gives the order of the hashes"
assert one_by_one[:100] == read("train[:100]", interleave_cycle_length=1), "slices changed"
assert common < 100, "train[:100] is now the first 100 of train"
EOF
TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES='' venv/bin/python order.py 2> log || {
    tail -n 5 log >&2
    echo "FAILED: the behaviour changed, or the packages do not run here" >&2
    exit 1
}
