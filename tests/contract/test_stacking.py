"""A theta of unrolled layers, stacked, is the theta of the scanned model."""

import re

import jax
import jax.numpy as jnp

from tests.contract.pair import far, pair_of
from tests.contract.table import DEFAULT, SERVED, over
from tests.fixtures import leaf_paths

UNROLLED = {
  'linen_vit_scan': ('linen_vit', 'encoderblock', r'encoderblock_{}'),
  'nnx_vit_scan': ('nnx_vit', 'blocks', r'blocks/{}'),
}
CHOSEN = [p for p in SERVED if p[1] in UNROLLED and (p[0], UNROLLED[p[1]][0]) in SERVED]
# Prompts of vpt_shallow are held by another module there. What spt, lt_sft, lamda_pp and
# light_peft train depends on the backbone, and of a stack they have what is trained alone; their
# tests compare it.
CHOSEN = [
  p for p in CHOSEN if p[0] not in ('vpt_shallow', 'spt', 'lt_sft', 'lamda_pp', 'light_peft')
]
ALWAYS = [p for p in CHOSEN if p in DEFAULT][::5]


@over(CHOSEN, always=ALWAYS)
def test_scanned_layers_are_unrolled_layers(pair):
  unrolled, stack, layer = UNROLLED[pair.b.name]
  other = pair_of(pair.method, unrolled)

  def stacked(held: dict, path: str):
    name = lambda i: re.sub(rf'(^|/){stack}(/|$)', lambda m: m[1] + layer.format(i) + m[2], path)
    if name(0) == path:
      return held[path]
    layers = [held[name(i)] for i in range(pair.b.depth) if name(i) in held]  # those with an entry
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)

  def scanned(theta):
    return {n: {site: stacked(theta[n], site) for site in sites} for n, sites in pair.theta.items()}

  theta, want, grads = other.moved
  held = leaf_paths(other.b.backbone)
  held = [stacked(held, path) for path in leaf_paths(pair.b.backbone)]
  tree = {
    'theta': scanned(theta),
    'backbone': [x for x in held if jnp.issubdtype(x.dtype, jnp.inexact)],
  }
  integers = [x for x in held if not jnp.issubdtype(x.dtype, jnp.inexact)]
  if integers:  # codes of 4 bits, which are not among the float arrays that a step takes
    out, got = jax.jit(lambda tree: pair.gradient(tree, pair.b.args, others=integers))(tree)
  else:
    out, got, _, _ = pair.step(tree, pair.optimizer, pair.b.args)
  assert far(out, want) < 1e-5
  assert far(got['theta'], scanned(grads['theta'])) < 1e-4
