"""A work of seconds, in place of those of the memory benchmark."""

import jax
import jax.numpy as jnp

from jpeft.bench import works


def _model(scan, remat):
  return works.TokenEncoder(
    width=16, depth=2, heads=2, mlp_dim=32, num_classes=3, scan=scan, remat=remat
  )


def _batch(size):
  return {
    'image': jax.ShapeDtypeStruct((size, 4, 16), jnp.float32),
    'label': jax.ShapeDtypeStruct((size,), jnp.int32),
  }


WORK = works.Work('a toy', _model, _batch, 4, ('unroll', 'scan'))
