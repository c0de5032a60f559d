import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # several devices on any machine, the same numbers on all

import jax

jax.config.update("jax_num_cpu_devices", 4)
cache = tempfile.TemporaryDirectory()  # what one test has compiled, the next need not
jax.config.update("jax_compilation_cache_dir", cache.name)
