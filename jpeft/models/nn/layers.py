"""The layers that all backbones share: attention, MLP, layer scale, and the base of their blocks.

Axes: B batch, N tokens, M context tokens, H heads, K head size, D width of the residual stream.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import dot_product_attention

from .rope import GridRope, RowRope

default_init = nn.initializers.normal(0.02)

gelu = functools.partial(nn.gelu, approximate=False)
gelu_tanh = functools.partial(nn.gelu, approximate=True)


def quick_gelu(x):
  """x * sigmoid(1.702 x): the approximation of GELU that CLIP was trained with."""
  return x * nn.sigmoid(1.702 * x)


# By the names in Hugging Face configs, where plain 'gelu' is the exact form.
ACTIVATIONS = {
  'gelu': gelu,
  'gelu_new': gelu_tanh,
  'gelu_pytorch_tanh': gelu_tanh,
  'quick_gelu': quick_gelu,
  'relu': nn.relu,
  'silu': nn.silu,
  'swish': nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """The function of an activation's name in Hugging Face configs.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in ACTIVATIONS:
    raise ValueError(f'the activation {name!r} is none of {", ".join(ACTIVATIONS)}')
  return ACTIVATIONS[name]


class Attention(nn.Module):
  """Multi-head attention whose four projections are plain 2-D Dense layers.

  Attributes:
    heads: number of heads.
    head_dim: size of a head; heads * head_dim may differ from the width of the input.
    qkv_bias: whether query, key and value have a bias; three of them where they differ.
    out_bias: whether the output projection has a bias.
    scaled: whether the logits are divided by sqrt(head_dim).
    rope: how queries and keys turn with their places; None for not at all.
    dropout: rate on the attention probabilities.
    attention_fn: called as `nn.dot_product_attention`, which divides by sqrt(head_dim) itself.
    kernel_init: initialiser of the four kernels.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  heads: int
  head_dim: int
  qkv_bias: bool | tuple[bool, bool, bool] = True
  out_bias: bool = True
  scaled: bool = True
  rope: GridRope | RowRope | None = None
  dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  kernel_init: Callable[..., jax.Array] = default_init
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, context=None, mask=None, bias=None, deterministic=True):
    """Attends from x [B, N, D] to context [B, M, _], or to x itself.

    Args:
      x: where the queries come from.
      context: where the keys and values come from; None for self-attention.
      mask: boolean, broadcastable to [B, H, N, M], or a `TokenMask`; False hides a key.
      bias: added to the logits, broadcastable to [B, H, N, M].
      deterministic: no dropout.

    Returns:
      An array [B, N, D].
    """
    if context is None:
      context = x
    dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
    query_init = self.kernel_init
    if not self.scaled:
      # Small queries, so that logits which are not divided by sqrt(head_dim) start of order one.
      query_init = nn.initializers.variance_scaling(1 / self.head_dim, 'fan_in', 'normal')

    biases = self.qkv_bias
    if not isinstance(biases, tuple):
      biases = (biases, biases, biases)
    query_bias, key_bias, value_bias = biases

    def heads(name, y, use_bias, kernel_init=self.kernel_init):
      layer = dense(
        self.heads * self.head_dim, use_bias=use_bias, kernel_init=kernel_init, name=name
      )
      return rearrange(layer(y), '... n (h k) -> ... n h k', h=self.heads)

    query = heads('query', x, query_bias, query_init)  # [B, N, H, K]
    key = heads('key', context, key_bias)  # [B, M, H, K]
    value = heads('value', context, value_bias)  # [B, M, H, K]
    if self.rope is not None:
      query = self.rope.rotate(query)
      key = self.rope.rotate(key)
    if not self.scaled:
      # Undo beforehand the division by sqrt(head_dim) in attention_fn.
      query = query * jnp.sqrt(self.head_dim).astype(query.dtype)
    joined = attend(self, query, key, value, mask=mask, bias=bias, deterministic=deterministic)
    out = dense(x.shape[-1], use_bias=self.out_bias, kernel_init=self.kernel_init, name='out')
    return out(joined)


def attend(module, query, key, value, *, mask, bias, deterministic, logit_cap=None):
  """Calls the `attention_fn` of an attention module, with the module's dropout, and joins heads.

  Args:
    module: has the fields attention_fn, dropout (the rate on the probabilities) and dtype.
    query: [B, N, H, K].
    key: [B, M, J, K]; J is H, or fewer heads if attention_fn takes them.
    value: as key.
    mask: see `Attention`.
    bias: see `Attention`.
    deterministic: no dropout.
    logit_cap: the `soft_cap` of the logits; None for none, of which attention_fn is not told.

  Returns:
    An array [B, N, H * K].
  """
  options = {} if logit_cap is None else {'logit_cap': logit_cap}
  dropping = module.dropout > 0 and not deterministic
  dropout = {'dropout_rng': None, 'dropout_rate': 0.0}
  if dropping:
    dropout = {'dropout_rng': module.make_rng('dropout'), 'dropout_rate': module.dropout}
  # [B, N, H, K]
  out = module.attention_fn(
    query,
    key,
    value,
    bias=bias,
    mask=mask,
    broadcast_dropout=False,  # each example and head drops its own probabilities
    deterministic=not dropping,
    dtype=module.dtype,
    **dropout,
    **options,
  )
  return rearrange(out, '... h k -> ... (h k)')


class MLP(nn.Module):
  """Two Dense layers around an activation; gated: fc2(activation(gate(x)) * fc1(x)).

  Attributes:
    mlp_dim: width of the hidden layer.
    activation: the nonlinearity.
    gated: whether a third layer, `gate`, carries the activation.
    use_bias: whether the layers have biases.
    dropout: rate on the hidden layer.
    hidden_norm: makes a norm of the hidden layer: hidden_norm(name=...); None for none.
    kernel_init: initialiser of the kernels.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  mlp_dim: int
  activation: Callable[[jax.Array], jax.Array] = gelu
  gated: bool = False
  use_bias: bool = True
  dropout: float = 0.0
  hidden_norm: Callable[..., nn.Module] | None = None
  kernel_init: Callable[..., jax.Array] = default_init
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, deterministic=True):
    dense = functools.partial(
      nn.Dense,
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    y = dense(self.mlp_dim, name='fc1')(x)  # [B, N, mlp_dim]
    if self.gated:
      y = self.activation(dense(self.mlp_dim, name='gate')(x)) * y
    else:
      y = self.activation(y)
    if self.hidden_norm is not None:
      y = self.hidden_norm(name='hidden_norm')(y)
    y = nn.Dropout(self.dropout, name='dropout')(y, deterministic=deterministic)
    return dense(x.shape[-1], name='fc2')(y)


class LayerScale(nn.Module):
  """x * scale, one number per channel: LayerScale of CaiT (arXiv:2103.17239)."""

  init: float = 1.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.constant(self.init)
    scale = self.param('scale', init, (x.shape[-1],), self.param_dtype)
    return x * scale.astype(self.dtype)


class Block(nn.Module):
  """The fields that the blocks of all families share. The width D is that of the input.

  Attributes:
    heads: number of attention heads.
    head_dim: size of a head.
    mlp_dim: hidden width of the MLP.
    eps: of the norms.
    activation: of the MLP.
    dropout: rate on what each branch adds to the stream.
    attention_dropout: rate on the attention probabilities.
    attention_fn: see `Attention`.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  heads: int
  head_dim: int
  mlp_dim: int
  eps: float = 1e-6
  activation: Callable[[jax.Array], jax.Array] = gelu
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = dot_product_attention
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32


def layer_norm(module, name=None):
  """A LayerNorm of a module that has the fields eps, dtype and param_dtype.

  Where the module has `norm_bias` and it is false, the norm has no bias. It has no name of its own
  in `setup`, where attributes give names.
  """
  # The fast variance, mean(x^2) - mean(x)^2, loses digits that published checkpoints need.
  return nn.LayerNorm(
    module.eps,
    dtype=module.dtype,
    param_dtype=module.param_dtype,
    use_bias=getattr(module, 'norm_bias', True),
    use_fast_variance=False,
    name=name,
  )


def rms_norm(module, name):
  """An RMSNorm of a module that has the fields eps, dtype and param_dtype.

  Where the module has `unit_norms` and it is true, the norm is a `UnitRMSNorm`.
  """
  kind = UnitRMSNorm if getattr(module, 'unit_norms', False) else nn.RMSNorm
  return kind(module.eps, dtype=module.dtype, param_dtype=module.param_dtype, name=name)


class UnitRMSNorm(nn.Module):
  """RMSNorm that multiplies by 1 + scale, so that a scale of 0 changes nothing (Gemma).

  Attributes:
    epsilon: added to the mean square.
    dtype: of the result; the norm and the product with 1 + scale are computed in float32.
    param_dtype: of the scale.
  """

  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
    x = x.astype(jnp.float32)
    mean_square = jnp.square(x).mean(-1, keepdims=True)
    normal = x * jax.lax.rsqrt(mean_square + self.epsilon)
    return (normal * (1 + scale.astype(jnp.float32))).astype(self.dtype)


def check_pool(pool: str, known: tuple[str, ...], num_classes: int | None = None) -> None:
  """Checks a pooling.

  Raises:
    ValueError: it is not among the known ones, or there is a head that cannot read its output.
  """
  if pool not in known:
    raise ValueError(f'pool {pool!r} is none of {", ".join(known)}')
  if pool == 'tokens' and num_classes is not None:
    raise ValueError(
      f"pool 'tokens' has no single feature for a head of {num_classes} classes; "
      f'choose one of {", ".join(known[:-1])}'
    )
