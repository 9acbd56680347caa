"""fused_linear with several rows against float32 products: on a GPU, or interpreted on a CPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fused_linear import fused_linear

small = jax.default_backend() == "cpu"
shapes = ((64, 1024), (128, 2048), (64, 3072)) if small else ((4096, 1024), (1024, 2048), (1024, 3072))
for rows in (1, 2, 3, 4, 8):
    for n, k in shapes:
        for gated in (False, True):
            key = jax.random.split(jax.random.key(rows), 5)
            x, w = (jax.random.normal(key[i], s, jnp.bfloat16) for i, s in
                    enumerate(((rows, k), (2, n, k))))  # fmt: skip
            norm = 1 + 0.3 * jax.random.normal(key[2], (2, k), jnp.bfloat16)
            residual = None if gated else jax.random.normal(key[3], (rows, n), jnp.bfloat16)
            w = w * jnp.bfloat16(k**-0.5)
            got = fused_linear(x, w, jnp.int32(1), norm, residual, eps=1e-6, gated=gated,
                               dtype=jnp.float32)  # fmt: skip
            x32, w32 = np.asarray(x, np.float32), np.asarray(w[1], np.float32)
            y = x32 / np.sqrt((x32**2).mean(1, keepdims=True) + 1e-6) * np.asarray(norm[1], np.float32)
            want = y @ w32.T
            if gated:
                a, b = np.split(want, 2, axis=1)
                want = a / (1 + np.exp(-a)) * b
            else:
                want = want + np.asarray(residual, np.float32)
            error = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
            assert error < 1e-5, (rows, n, k, gated, error)
print("fused_linear with 1 to 8 rows: right")
