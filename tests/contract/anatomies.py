"""What a user says of a model of their own, beyond the roles that the fixtures name."""

import contextlib

import jax.numpy as jnp

from jpeft import ANATOMIES, Anatomy, register_anatomy
from tests.fixtures import Backbone
from tests.fixtures.nnx_models import causal_attention, rope


def _norms(block: str, first: str, second: str) -> dict[str, str]:
  return {'norm1': f'{block}/{first}', 'norm2': f'{block}/{second}'}


_VIT, _LAYER = r'Transformer/encoderblock(?:_\d+)?', r'layers(?:/\d+)?'
_NORMS = _norms(_VIT, 'LayerNorm_0', 'LayerNorm_1')

# The finer parts of a block; of scanned blocks also what comes before and after them.
PARTS: dict[str, dict[str, str]] = {
  'linen_vit': _NORMS,
  'linen_vit_remat': _NORMS,
  'linen_vit_scan': {
    **_NORMS,
    'stack': f'Transformer/posembed_input|{_VIT}|Transformer/encoder_norm',
  },
  'linen_bert': {'block_end': r'encoder/layer/\d+/output/LayerNorm'},
  'linen_gemma': _norms(_LAYER, 'pre_attention_norm', 'pre_ffw_norm'),
  'linen_fused': _norms(r'blocks_\d+', 'norm1', 'norm2'),
  'nnx_vit': _norms(r'blocks/\d+', 'norm1', 'norm2'),
  'nnx_vit_remat': _norms(r'blocks/\d+', 'norm1', 'norm2'),
  'nnx_vit_scan': {**_norms('blocks', 'norm1', 'norm2'), 'stack': 'dropout|blocks|norm'},
  'nnx_llama': _norms(_LAYER, 'input_layernorm', 'post_attention_layernorm'),
  'nnx_raw': _norms(_LAYER, 'pre_attention_norm', 'pre_ffw_norm'),
}


def llama_attend(call, keys, values, x):
  """The attention of `nnx_llama` with rows of keys and values that every query sees.

  Empty queries in front of the others give the rows positions of their own in the causal mask.
  """
  m, rows = call.module, keys.shape[0]
  in_front = lambda r, y: jnp.concatenate(
    [jnp.broadcast_to(r, (len(x), *r.shape)).astype(y.dtype), y], 1
  )
  q, k, v = rope(m.q_proj(x)), rope(m.k_proj(x)), m.v_proj(x)
  q = in_front(jnp.zeros((rows, *q.shape[2:])), q)
  y = causal_attention(q, in_front(keys, k), in_front(values, v))[:, rows:]
  return m.o_proj(y.reshape(x.shape))


def llama_heads(site):
  """(key and value heads, head size)."""
  return site.model[f'{site.path}/k_proj'].leaves['kernel'].shape[1:]


INLINE = {'nnx_llama': {'attend': llama_attend, 'heads': llama_heads}}


@contextlib.contextmanager
def described(b: Backbone):
  """The backbone's names as an anatomy."""
  roles = {**b.roles, **PARTS.get(b.name, {})}
  register_anatomy(Anatomy(b.name, roles, b.causal, b.lead, b.exit, **INLINE.get(b.name, {})))
  try:
    yield
  finally:
    del ANATOMIES[b.name]
