import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # several devices on any machine, the same numbers on all

import jax

jax.config.update("jax_num_cpu_devices", 4)
