"""What a training step of the side methods asks of a TPU v5e: compiled ahead of time, no device needed.

Work: a 12-layer encoder, d = 768, batch 32, 196 tokens, bfloat16, AdamW, a mean and 100 classes; of HST, which reads
images, a ViT-B/16 at 224 pixels. total = arguments + output + temp - alias, the state donated. Run as a script it
prints the table: `python -m tests.methods.test_side_memory`.
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jpeft
from jpeft.models import ViT
from jpeft.models.blocks import Encoder, PreNormBlock, block_of
from jpeft.models.layers import layer_norm

MIB = 2**20
SIZES = dict(width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, image_size=224, dtype=jnp.bfloat16,
             param_dtype=jnp.bfloat16)


class Tokens(ViT):
  """A ViT without its embedding: tokens [B, N, d] to logits."""

  @nn.compact
  def __call__(self, x):
    x = Encoder(block_of(self, PreNormBlock), self.depth, self.scan, self.remat, name='encoder')(x.astype(self.dtype))
    return nn.Dense(100, name='head')(layer_norm(self, 'final_norm')(x).mean(1).astype(jnp.float32))


def probed(method):
  return jpeft.chain(method, jpeft.tune('{head}', name='head', memory='no backbone backprop'))


# {name: (method, highest total in MiB, highest share of the forward pass's FLOPs)}
WORK = {
  'linear': (jpeft.linear, 280, 1.1),
  'unipt': (lambda: probed(jpeft.unipt()), 0, 0),
  'unipt, pooled': (lambda: probed(jpeft.unipt(4, downsample='pool', remat=True)), 0, 0),
  'sherl': (lambda: probed(jpeft.sherl()), 0, 0),
  'sherl, remat': (lambda: probed(jpeft.sherl(remat=True)), 0, 0),
  'vqt': (lambda: jpeft.vqt(1, 0.0), 0, 0),
  'vqt, remat': (lambda: jpeft.vqt(1, 0.0, remat=True), 0, 0),
  'hst': (jpeft.hst, 0, 0),
  'hst, remat': (lambda: jpeft.hst(remat=True), 0, 0),
}


def compiled(name: str, scan: bool = False):
  """(total MiB, GFLOP of a step, GFLOP of a forward pass)."""
  for key, value in (('TPU_SKIP_MDS_QUERY', '1'), ('TPU_ACCELERATOR_TYPE', 'v5litepod-4'),
                     ('TPU_WORKER_HOSTNAMES', 'localhost'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')):
    os.environ.setdefault(key, value)
  from jax.experimental import topologies
  from jax.sharding import SingleDeviceSharding
  device = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices[0]
  on = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree)
  images = name.startswith('hst')
  remat = name == 'hst, remat'
  model = ViT(**SIZES, num_classes=100, remat=remat, scan=scan) if images else Tokens(**SIZES, scan=scan)
  x = jax.ShapeDtypeStruct((32, 224, 224, 3) if images else (32, 196, 768), jnp.float32)
  held = jax.eval_shape(model.init, jax.random.key(0), x)
  tuned, tx = jpeft.attach(model, WORK[name][0](), held, x), optax.adamw(1e-3)

  def step(state, held, x, labels):
    theta, opt = state
    def loss(theta):
      logits = tuned.apply(theta, held, x).astype(jnp.float32)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    value, grads = jax.value_and_grad(loss)(theta)
    updates, opt = tx.update(grads, opt, theta)
    return (optax.apply_updates(theta, updates), opt), value

  state = (tuned.shapes, jax.eval_shape(tx.init, tuned.shapes))
  labels = jax.ShapeDtypeStruct((32,), jnp.int32)
  program = jax.jit(step, donate_argnums=0).lower(*map(on, (state, held, x, labels))).compile()
  forward = jax.jit(model.apply).lower(on(held), on(x)).compile()
  m = program.memory_analysis()
  total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
  return total / MIB, program.cost_analysis()['flops'] / 1e9, forward.cost_analysis()['flops'] / 1e9


@pytest.mark.aot
@pytest.mark.parametrize('name', WORK)
def test_a_step_fits(name):
  pytest.importorskip('libtpu')
  _, most, share = WORK[name]
  total, flops, forward = compiled(name)
  assert total <= most and flops <= share * forward


if __name__ == '__main__':
  for each in WORK:
    total, flops, forward = compiled(each)
    print(f'{each:16s} {total:8.1f} MiB {flops:8.1f} GFLOP  {flops / forward:5.2f} x forward', flush=True)
