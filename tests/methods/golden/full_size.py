"""Models of the papers' sizes, as shapes: nothing is computed or allocated."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.models import from_config


class FullSize(NamedTuple):
  """A model and what `attach` takes after the method: (backbone, *example inputs)."""

  model: nn.Module
  shapes: tuple[Any, ...]


def of(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> FullSize:
  return FullSize(model, (jax.eval_shape(model.init, jax.random.key(0), *inputs), *inputs))


def tokens(n: int = 4) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, n), jnp.int32)


class Maps(nn.Module):
  """Linear maps side by side: (name, fan_in, fan_out)."""

  maps: tuple[tuple[str, int, int], ...]

  @nn.compact
  def __call__(self):
    for name, fan_in, fan_out in self.maps:
      nn.Dense(fan_out, use_bias=False, name=name)(jnp.zeros((1, fan_in)))


class LlamaLayer(nn.Module):
  width: int
  hidden: int

  @nn.compact
  def __call__(self, x, _):
    d, f = self.width, self.hidden
    Maps(tuple((f'{n}_proj', d, d) for n in 'qkvo'), name='self_attn')()
    Maps((('gate_proj', d, f), ('up_proj', d, f), ('down_proj', f, d)), name='mlp')()
    return x, None


class Llama(nn.Module):
  """The linear maps of a LLaMA, its layers one stack."""

  layers: int
  width: int
  hidden: int

  @nn.compact
  def __call__(self, tokens):
    stack = nn.scan(
      LlamaLayer, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.layers
    )
    return stack(self.width, self.hidden, name='layers')(tokens, None)[0]


def llama(layers: int, width: int, hidden: int) -> FullSize:
  return of(Llama(layers, width, hidden), tokens())


def roberta_base() -> FullSize:
  config = {
    'model_type': 'roberta',
    'vocab_size': 50265,
    'hidden_size': 768,
    'num_hidden_layers': 12,
    'num_attention_heads': 12,
    'intermediate_size': 3072,
    'max_position_embeddings': 514,
    'type_vocab_size': 1,
    'pad_token_id': 1,
  }
  return of(from_config(config, num_classes=2, scan=True), tokens())


def t0(width: int, hidden: int, heads: int) -> FullSize:
  """T0, of the architecture of T5 v1.1: 24 layers of encoder and decoder, heads of 64 (3B) or 128
  (11B).
  """
  config = {
    'model_type': 't5',
    'vocab_size': 32128,
    'd_model': width,
    'd_kv': 64,
    'd_ff': hidden,
    'num_layers': 24,
    'num_decoder_layers': 24,
    'num_heads': heads,
    'feed_forward_proj': 'gated-gelu',
    'tie_word_embeddings': False,
    'relative_attention_num_buckets': 32,
  }
  return of(from_config(config, scan=True), tokens(), tokens())
