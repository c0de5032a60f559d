#!/usr/bin/env bash
# jaxlib 0.10.2 on a CPU: whether a product of bfloat16 arrays with preferred_element_type=float32
# stays one of bfloat16, or both operands are first copied to float32, depends on how a transpose is
# written: jnp.inner(x, w) stays, x @ w.T does not. The gradient of weights, g.T @ x, never does, not
# even with g.T behind an optimization_barrier; it does if a gather transposes g.
# The same with --xla_cpu_max_isa=SSE4_2, AVX2 or AVX512; not tried on CPUs with units for bfloat16.
# Expected: the same product of bfloat16, without copies, however the transpose is written.
# Seen, operands of the dot in the compiled programs:
#   g @ w                          bf16 bf16, in a ynn_fusion
#   inner(x, w)                    bf16 bf16, in a ynn_fusion
#   x @ w.T                        f32 f32, in a ynn_fusion
#   g.T @ x                        f32 f32
#   optimization_barrier(g.T) @ x  f32 f32, in a ynn_fusion
#   g.T @ x, g.T by a gather       bf16 bf16, in a ynn_fusion
set -euo pipefail
case $(uname -sm) in
"Linux x86_64") ;;
*) echo "skipped: verified only on Linux x86_64" && exit 0 ;;
esac
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
unset PYTHONPATH XLA_FLAGS
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6

cat > operands.py <<'EOF'
import re

import jax
import jax.numpy as jnp


def matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def gathered(g, x):
    transposed = jnp.arange(g.size).reshape(g.shape).T
    return matmul(g.reshape(-1)[transposed], x)


products = {  # of x [128, 784], w [512, 784] and g [128, 512], all bfloat16; and what is expected
    "g @ w": (lambda x, w, g: matmul(g, w), "bf16 bf16"),
    "inner(x, w)": (lambda x, w, g: jnp.inner(x, w, preferred_element_type=jnp.float32), "bf16 bf16"),
    "x @ w.T": (lambda x, w, g: matmul(x, w.T), "f32 f32"),
    "g.T @ x": (lambda x, w, g: matmul(g.T, x), "f32 f32"),
    "optimization_barrier(g.T) @ x": (
        lambda x, w, g: matmul(jax.lax.optimization_barrier(g.T), x),
        "f32 f32",
    ),
    "g.T @ x, g.T by a gather": (lambda x, w, g: gathered(g, x), "bf16 bf16"),
}
shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((128, 784), (512, 784), (128, 512))]
changed = []
for name, (product, expected) in products.items():
    text = jax.jit(product).lower(*shapes).compile().as_text()
    types = dict(re.findall(r"(%\S+) = (\w+)\[", text))
    ((a, b),) = re.findall(r" dot\((%[^,\s]+), (%[^)\s]+)\)", text)
    seen = f"{types[a]} {types[b]}"
    print(f"{name:30} {seen}{', in a ynn_fusion' if 'ynn_fusion' in text else ''}")
    if seen != expected:
        changed.append(name)
assert not changed, changed
EOF
JAX_PLATFORMS=cpu venv/bin/python operands.py 2> log || {
    tail -n 5 log >&2
    echo "FAILED: the behaviour changed, or the packages do not run here" >&2
    exit 1
}
