"""Roles such as {q} or {block}: what each model family calls its parts."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jpeft.messages import nearest

from .dot_product import dot_product_attention


@dataclasses.dataclass(frozen=True)
class Part:
  """What a role names where that is less than a module: some of its arrays, or a slice of them.

  Attributes:
    path: regex over whole paths of modules.
    array: regex of the names of the arrays; all by default.
    take: which entries of an output axis of these arrays: (index, count) for one of `count` equal
      pieces, or a function (site, size) -> a slice or indices, where `site` is the module and
      `size` the length of the axis. None for all of them.
    axis: the axis that is cut, counted among the output axes of an array: 0 is the first one that
      is neither contracted with the input nor batched.
  """

  path: str
  array: str = '.*'
  take: tuple[int, int] | Callable[..., Any] | None = None
  axis: int = 0

  def __post_init__(self):
    if self.take is None or callable(self.take):
      return
    index, count = self.take
    if not 0 <= index < count:
      raise ValueError(
        f'the part of {self.path!r} has take={self.take!r}: (index, count) is one of count equal '
        'pieces, numbered from 0'
      )


# What a role is: a regex over whole paths, a part of a module, or several of these.
Role = str | Part | tuple[str | Part, ...]


@dataclasses.dataclass(frozen=True)
class Anatomy:
  """The names of one model family.

  Attributes:
    name: of the family.
    roles: {role: regex over whole paths}, or a `Part` where a module or an array serves several
      roles, or a tuple of both for models that differ. Roles that methods use by default: block (a
      residual block), q, k, v, o (projections), attention (the module that calls them), mlp, fc1,
      fc2, norm (inside blocks), final_norm, embed (makes the tokens), encoder (runs the blocks),
      head, linear (every linear map of a block), patch (the layer that makes tokens of pixels);
      norm1 and norm2 (what attention and MLP read, where a norm comes first), block_end (the block,
      or the norm that ends it: what the stream leaves through), stack (what the finished token
      sequence runs through, in order: a module that runs the blocks, or the blocks themselves, with
      the module before and after them where the blocks are one scanned stack).
    causal: whether a token sees only the tokens before it.
    lead: how many special tokens (class, distillation) stand before the others.
    exit: the role whose output is the last hidden state: 'final_norm', or 'encoder' where blocks
      end with a norm.
    attention: the forward pass of an {attention} module that computes attention inline, written
      against an attention function: (module, attention_fn, *args, **kwargs) -> what the module
      returns. It uses the submodules and params of the bound module under their own names, and
      calls attention_fn(query, key, value, bias=None, mask=None, ...) with a query
      [B, N, heads, head size] and key and value [B, M, kv heads, head size], which gives
      [B, N, heads, head size]. It runs in place of the module while a rule wraps attention.
    attention_fn: what `attention` is given where no rule changes it; by default
      `flax.linen.dot_product_attention`, also for fewer kv heads than heads.
    side: how a side block is called: {keyword of the block: role whose own output it is}, such as
      {'bias': 'position_bias', 'context': 'context'}.
  """

  name: str
  roles: Mapping[str, Role]
  causal: bool = False
  lead: int = 0
  exit: str = 'final_norm'
  attention: Callable[..., Any] | None = None
  attention_fn: Callable[..., Any] = dot_product_attention
  side: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.attention is not None and 'attention' not in self.roles:
      raise ValueError(
        f'the anatomy {self.name!r} has `attention` and no role {{attention}}: name the modules '
        'whose forward pass it is'
      )

  def role(self, name: str) -> str:
    """The pattern of the modules of a role, or that it is a part of.

    Raises:
      ValueError: this family has no such part.
    """
    return _either(one.path if isinstance(one, Part) else one for one in self.named_by(name))

  def modules(self, name: str) -> str:
    """The pattern of the modules that a role names as a whole."""
    return _either(one for one in self.named_by(name) if isinstance(one, str))

  def parts(self, name: str) -> list[Part]:
    """What a role names of modules that serve other roles too."""
    return [one for one in self.named_by(name) if isinstance(one, Part)]

  def named_by(self, name: str) -> tuple[str | Part, ...]:
    """What a role stands for.

    Raises:
      ValueError: this family has no such part.
    """
    if name == 'exit':
      name = self.exit
    if name not in self.roles and (
      name == 'stack' or name == 'block_end' and self.exit == 'final_norm'
    ):
      name = 'block'
    if name not in self.roles and name in _NOT_EVERYWHERE:
      return (NOTHING,)
    if name not in self.roles:
      near = nearest(name, self.roles)
      hint = '' if near is None else f'; did you mean {{{near}}}?'
      raise ValueError(
        f'the anatomy {self.name!r} has no role {{{name}}}, only {", ".join(self.roles)}{hint}'
      )
    found = self.roles[name]
    return found if isinstance(found, tuple) else (found,)


# The pattern that matches nothing.
NOTHING = '(?!)'
# The linear maps of a block: each of them has arrays, or a part of arrays, of its own.
MAPS = ('q', 'k', 'v', 'o', 'fc1', 'fc2')
# Parts that methods name beside others, and that a family may lack: nothing matches there.
_NOT_EVERYWHERE = ('patch', 'final_norm')


def _either(patterns) -> str:
  """A regex for any of several."""
  return '|'.join(patterns) or NOTHING


_VIT_BLOCK = r'(?:.*/)?encoderblock(?:_\d+)?'
_MHA = r'(?:.*/)?MultiHeadDotProductAttention_\d+'
_LAYER = r'(?:.*/)?layers(?:/\d+)?'
_ATTN = rf'{_LAYER}/(?:self_)?attn'

# The first of the families that fit best is chosen, so the order matters only between equals. Here
# are those of other projects; jpeft.models puts its own before them.
ANATOMIES: dict[str, Anatomy] = {
  a.name: a
  for a in (
    Anatomy(
      'vision_transformer',
      {
        'block': _VIT_BLOCK,
        'attention': rf'{_VIT_BLOCK}/MultiHeadDotProductAttention_\d+',
        'q': rf'{_MHA}/query',
        'k': rf'{_MHA}/key',
        'v': rf'{_MHA}/value',
        'o': rf'{_MHA}/out',
        'mlp': rf'{_VIT_BLOCK}/Ml[pP](?:Block)?_\d+',
        'fc1': rf'{_VIT_BLOCK}/Ml[pP](?:Block)?_\d+/Dense_0',
        'fc2': rf'{_VIT_BLOCK}/Ml[pP](?:Block)?_\d+/Dense_1',
        'linear': rf'{_MHA}/(?:query|key|value|out)|{_VIT_BLOCK}/Ml[pP](?:Block)?_\d+/Dense_\d+',
        'norm': rf'{_VIT_BLOCK}/LayerNorm_\d+',
        'norm1': rf'{_VIT_BLOCK}/LayerNorm_0',
        'norm2': rf'{_VIT_BLOCK}/LayerNorm_[12]',
        'final_norm': r'(?:.*/)?encoder_norm',
        'stack': rf'Transformer/posembed_input|{_VIT_BLOCK}|Transformer/encoder_norm',
        'patch': r'embedding',
        'embed': r'embedding',
        'encoder': r'Transformer',
        'head': r'head',
      },
      lead=1,
    ),
    Anatomy(
      'decoder',
      {
        'block': _LAYER,
        'attention': _ATTN,
        'mlp': rf'{_LAYER}/mlp',
        # kv_einsum is [2, heads, d, size], and qkv_einsum [3, heads, d, size].
        'q': (rf'{_ATTN}/q_(?:proj|einsum)', Part(rf'{_ATTN}/qkv_einsum', take=(0, 3))),
        'k': (
          rf'{_ATTN}/k_proj',
          Part(rf'{_ATTN}/kv_einsum', take=(0, 2)),
          Part(rf'{_ATTN}/qkv_einsum', take=(1, 3)),
        ),
        'v': (
          rf'{_ATTN}/v_proj',
          Part(rf'{_ATTN}/kv_einsum', take=(1, 2)),
          Part(rf'{_ATTN}/qkv_einsum', take=(2, 3)),
        ),
        'o': rf'{_ATTN}/(?:o_proj|attn_vec_einsum)',
        'fc1': rf'{_LAYER}/mlp/(?:gate|up)_proj',
        'fc2': rf'{_LAYER}/mlp/down_proj',
        'linear': rf'{_ATTN}/(?:[qkvo]_proj|\w*einsum)|{_LAYER}/mlp(?:/\w+_proj)?',
        'norm': rf'{_LAYER}/\w*norm\w*',
        'norm1': rf'{_LAYER}/(?:input_layernorm|pre_attention_norm)',
        'norm2': rf'{_LAYER}/(?:post_attention_layernorm|pre_ffw_norm|pre_feedforward_layernorm)',
        'final_norm': r'final_norm|norm',
        'embed': r'(?:embedder|embed_tokens)',
        'head': r'lm_head',
      },
      causal=True,
    ),
  )
}


def register_anatomy(anatomy: Anatomy) -> None:
  """Makes roles known for a model family; an own family wins over those of jpeft where it fits as
  well.
  """
  rest = {k: v for k, v in ANATOMIES.items() if k != anatomy.name}
  ANATOMIES.clear()
  ANATOMIES.update({anatomy.name: anatomy, **rest})


# A family fits if this share of its roles names something. Below the second share it is no more
# than likely, and families that fit nearly as well have a say.
_LEAST_SHARE = 1 / 3
_CERTAIN_SHARE = 0.75
_NEARLY = 0.1


def families_of(sites) -> list[Anatomy]:
  """The families that a model may be of, the likeliest first; none if none fits.

  They agree on the names of its parts as far as they have them. A causal family is none for a model
  that is given no tokens (integers), unless it is certain.
  """
  reads_tokens = any(jnp.issubdtype(x.dtype, jnp.integer) for x in sites[''].inputs.values())
  shares = {}
  for anatomy in ANATOMIES.values():
    found = share(anatomy, sites)
    if found >= _CERTAIN_SHARE or (found >= _LEAST_SHARE and (reads_tokens or not anatomy.causal)):
      shares[anatomy.name] = found
  if not shares:
    return []
  order = sorted(shares, key=lambda name: -shares[name])  # the first of equals
  most = shares[order[0]]
  if most >= _CERTAIN_SHARE:
    return [ANATOMIES[order[0]]]
  return [ANATOMIES[name] for name in order if shares[name] > most - _NEARLY]


def share(anatomy: Anatomy, sites) -> float:
  """The share of a family's roles that name something; 0 if its blocks are not among them."""
  named = [role for role in anatomy.roles if _names(anatomy.role(role), sites)]
  if 'block' not in named:
    return 0.0
  return len(named) / len(anatomy.roles)


def _names(pattern: str, sites) -> bool:
  return any(re.fullmatch(pattern, path) for path in sites)
