#!/usr/bin/env bash
# tensorflow-datasets 4.9.10: of processes that prepare the same data set for the first time at the
# same moment, each generates all of it in a directory of its own, then renames that; all but the
# first raise FileExistsError there, after all the work, though a good copy of the data is in place.
# Expected: a lock, or that the others use the copy that is there, as every later call does.
# Seen:
#   three at once, sorted:
#   all examples generated; FileExistsError: Cannot rename data/numbers/incomplete.*_1.0.0. Destination data/numbers/1.0.0 already exists.
#   all examples generated; FileExistsError: Cannot rename data/numbers/incomplete.*_1.0.0. Destination data/numbers/1.0.0 already exists.
#   all examples generated; prepared
#   a later call:
#   prepared
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
unset PYTHONPATH
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check tensorflow-datasets==4.9.10 \
    tensorflow-cpu==2.21.0 importlib_resources==7.1.0 numpy==2.4.6

cat > prepare.py <<'EOF'
import pathlib
import re
import sys
import time

import numpy as np
import tensorflow_datasets as tfds

name, processes, result = sys.argv[1], 3, []


def wait_for_all(where):
    pathlib.Path(f"{where}.{name}").touch()
    end = time.monotonic() + 120
    while len(list(pathlib.Path().glob(f"{where}.*"))) < processes:
        assert time.monotonic() < end, "the processes did not meet"
        time.sleep(0.05)


class Numbers(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        wait_for_all("begin")
        for i in range(100):
            yield i, {"label": i}
        wait_for_all("end")
        result.append("all examples generated")


tfds.disable_progress_bar()
try:
    Numbers(data_dir="data").download_and_prepare()
    result.append("prepared")
except OSError as error:  # without the part of a directory's name that is random
    message = re.sub(r"incomplete\.\w{6}_", "incomplete.*_", str(error))
    result.append(f"{type(error).__name__}: {message}")
pathlib.Path(f"out.{name}").write_text("; ".join(result) + "\n")
EOF
export TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=''
fail() {
    tail -qn 5 log.* >&2
    echo "FAILED: $1" >&2
    exit 1
}
for i in 1 2 3; do
    venv/bin/python prepare.py $i &> log.$i &
done
wait
[ -e out.1 ] && [ -e out.2 ] && [ -e out.3 ] || fail "not all three ran to their end"
venv/bin/python prepare.py later &> log.later || fail "the later call failed"
echo "three at once, sorted:"
sort out.1 out.2 out.3
echo "a later call:"
cat out.later
count() { cat out.[123] | grep -c "^all examples generated; $1"; }
[ "$(count prepared)" = 1 ] || fail "not exactly one of three succeeded"
[ "$(count '[A-Za-z]*Error: ')" = 2 ] || fail "not exactly two of three did all the work and raised"
[ "$(cat out.later)" = prepared ] || fail "the later call did not find the data prepared"
