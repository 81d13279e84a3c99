"""What a user says of a model of their own, beyond the roles that the fixtures name."""

import contextlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jpeft import ANATOMIES, Anatomy, register_anatomy
from tests.fixtures import Backbone, linen_text
from tests.fixtures.linen_text import BertOutput
from tests.fixtures.nnx_models import rope


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


class BertSelf(nn.Module):
  """The fixture's BertSelfAttention, with an attention function."""

  heads: int
  attention_fn: Any
  dtype: Any

  @nn.compact
  def __call__(self, x, attention_mask, deterministic):
    heads = (*x.shape[:2], self.heads, -1)
    dense = [nn.Dense(x.shape[-1], name=n, dtype=self.dtype) for n in ('query', 'key', 'value')]
    query, key, value = (project(x).reshape(heads) for project in dense)
    bias = jnp.where(attention_mask[:, None, None, :] > 0, 0.0, -1e9).astype(query.dtype)
    rng = None if deterministic else self.make_rng('dropout')
    y = self.attention_fn(
      query,
      key,
      value,
      bias=bias,
      dropout_rng=rng,
      dropout_rate=0.1,
      deterministic=deterministic,
    )
    return y.reshape(x.shape), None


def bert(module, attention_fn, x, attention_mask, deterministic):
  inner = BertSelf(module.heads, attention_fn, module.dtype, name='self')
  y, _ = inner(x, attention_mask, deterministic)
  return (BertOutput(module.dtype, name='output')(y, x, deterministic),)


def gemma(module, attention_fn, x, positions, mask):
  q = linen_text.rope(module.q_einsum('BND,HDK->BNHK', x), positions)
  k, v = module.kv_einsum('BMD,CGDK->CBMGK', x)
  k = linen_text.rope(k, positions)
  y = attention_fn(q, k, v, mask=mask[:, None], force_fp32_for_softmax=True)
  return module.attn_vec_einsum('BNHK,HKD->BND', y.astype(x.dtype))


def fused(module, attention_fn, x, train):
  q, k, v = jnp.moveaxis(module.qkv(x).reshape(*x.shape[:2], 3, module.heads, -1), 2, 0)
  y = attention_fn(q, k, v).reshape(x.shape)
  return module.drop(module.proj(y), deterministic=not train)


def causal(x):
  return jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))


def llama(module, attention_fn, x):
  q, k, v = rope(module.q_proj(x)), rope(module.k_proj(x)), module.v_proj(x)
  return module.o_proj(attention_fn(q, k, v, mask=causal(x)).reshape(x.shape))


def raw(module, attention_fn, x):
  q = rope(jnp.einsum('BND,HDK->BNHK', x, module.q_einsum[...].astype(x.dtype)))
  k, v = jnp.einsum('BMD,CGDK->CBMGK', x, module.kv_einsum[...].astype(x.dtype))
  y = attention_fn(q, rope(k), v, mask=causal(x))
  return jnp.einsum('BNHK,HKD->BND', y, module.attn_vec_einsum[...].astype(x.dtype))


# The {attention} of the models that attend inline, written against an attention function.
INLINE = {
  'linen_bert': bert,
  'linen_gemma': gemma,
  'linen_fused': fused,
  'nnx_llama': llama,
  'nnx_raw': raw,
}


@contextlib.contextmanager
def described(b: Backbone):
  """The backbone's names as an anatomy."""
  roles = {**b.roles, **PARTS.get(b.name, {})}
  attention = INLINE.get(b.name)
  register_anatomy(Anatomy(b.name, roles, b.causal, b.lead, b.exit, attention))
  try:
    yield
  finally:
    del ANATOMIES[b.name]
