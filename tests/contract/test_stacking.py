"""A theta of unrolled layers, stacked, is the theta of the scanned model."""

import re

import jax
import jax.numpy as jnp

from tests.contract.pair import far, pair_of
from tests.contract.table import DEFAULT, SERVED, over
from tests.fixtures import leaf_paths

UNROLLED = {'linen_vit_scan': ('linen_vit', 'encoderblock', r'encoderblock_{}'),
            'nnx_vit_scan': ('nnx_vit', 'blocks', r'blocks/{}')}
CHOSEN = [p for p in SERVED if p[1] in UNROLLED and (p[0], UNROLLED[p[1]][0]) in SERVED]
ALWAYS = [p for p in CHOSEN if p in DEFAULT and (p[0], UNROLLED[p[1]][0]) in DEFAULT]


@over(CHOSEN, always=ALWAYS)
def test_scanned_layers_are_unrolled_layers(pair):
  unrolled, stack, layer = UNROLLED[pair.b.name]
  other = pair_of(pair.method, unrolled)

  def stacked(tree, like):
    held = leaf_paths(tree)
    def of(path):
      name = lambda i: re.sub(rf'(^|/){stack}(/|$)', lambda m: m[1] + layer.format(i) + m[2], path)
      if name(0) == path:
        return held[path]
      return jnp.stack([held[name(i)] for i in range(pair.b.depth)])
    return jax.tree.unflatten(jax.tree.structure(like), [of(p) for p in leaf_paths(like)])

  theta, want, grads = other.moved
  floats = jax.tree.leaves(stacked(other.b.backbone, pair.b.backbone))
  floats = [x for x in floats if jnp.issubdtype(x.dtype, jnp.inexact)]
  tree = {'theta': stacked(theta, pair.theta), 'backbone': floats}
  out, scanned, _, _ = pair.step(tree, pair.optimizer, pair.b.args)
  assert far(out, want) < 1e-5
  assert far(scanned['theta'], stacked(grads['theta'], pair.theta)) < 1e-4
