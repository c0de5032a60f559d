#!/usr/bin/env bash
# JAX 0.10.2 on a CPU: device_put shares a NumPy array's memory only if its address is a multiple
# of 64. NumPy 2.4.6 does not see to that; a large array from it lies at 16 mod 64 (glibc's malloc
# maps pages and puts 16 bytes before it). Replicated on 16 CPU devices it is copied 16 times, with
# may_alias=True too; copied once by hand to such an address, it is shared by all, without a copy.
# Expected: at most one copy, as all CPU devices have the same memory.
# Seen:
#   address 0 mod 64: 0 copies, peak memory + 0 x 48 MiB
#   fresh, 16 mod 64: 16 copies, peak memory + 16 x 48 MiB
#   fresh, may_alias=True: 16 copies
#   address 32 mod 64: 16 copies
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
unset PYTHONPATH XLA_FLAGS
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6

cat > copies.py <<'EOF'
import platform
import resource

import jax
import numpy as np

MIB = 2**20
size = 48 * MIB  # more than malloc ever takes from its heap, 32 MiB
fresh = np.ones(size, np.uint8)
room = np.ones(size + 64, np.uint8)
aligned = room[-room.ctypes.data % 64 :][:size]
in_32 = room[(32 - room.ctypes.data) % 64 :][: size - 64]

jax.config.update("jax_num_cpu_devices", 16)
on_all = jax.NamedSharding(jax.make_mesh((16,), ("device",)), jax.P())


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def copies(array, **options):
    shards = jax.block_until_ready(jax.device_put(array, on_all, **options)).addressable_shards
    buffers = {shard.data.unsafe_buffer_pointer() for shard in shards}
    assert len(shards) == 16
    return 0 if buffers == {array.ctypes.data} else len(buffers)


copies(np.ones(8, np.uint8))  # what JAX takes when it starts is not counted below
peaks = [peak()]
copies_aligned = copies(aligned)
peaks.append(peak())
copies_fresh = copies(fresh)
peaks.append(peak())
more = [round((b - a) / 48) for a, b in zip(peaks, peaks[1:])]
copies_aliased = copies(fresh, may_alias=True)
copies_32 = copies(in_32)
print(f"address {aligned.ctypes.data % 64} mod 64: {copies_aligned} copies, peak memory + {more[0]} x 48 MiB")
print(f"fresh, {fresh.ctypes.data % 64} mod 64: {copies_fresh} copies, peak memory + {more[1]} x 48 MiB")
print(f"fresh, may_alias=True: {copies_aliased} copies")
print(f"address {in_32.ctypes.data % 64} mod 64: {copies_32} copies")
assert copies_aligned == 0, "the aligned array is copied"
assert copies_32 == 16, "32 mod 64 suffices now, or there are fewer copies"
if platform.libc_ver()[0] == "glibc":  # others place arrays elsewhere
    assert fresh.ctypes.data % 64 == 16, "NumPy or malloc places large arrays elsewhere"
    assert copies_fresh == copies_aliased == 16, "fewer copies of a fresh array"
    assert more == [0, 16], "peak memory does not show the copies"
EOF
JAX_PLATFORMS=cpu venv/bin/python copies.py 2> log || {
    tail -n 5 log >&2
    echo "FAILED: the behaviour changed, or the packages do not run here" >&2
    exit 1
}
