"""DyT: a gate in every block says which tokens go through its MLP; an adapter serves them all.

Zhao et al., 2024, "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation"
(arXiv 2403.11808); official code NUS-HPC-AI-Lab/Dynamic-Tuning. The letters:

  u [B, n + N, D]  the stream between attention and MLP: n leading special tokens, N others
  l [B, N, 1]      logits of the gate, u W_g + b_g of the N tokens
  p                sigmoid((l + G1 - G2) / tau), G of Gumbel's distribution in training, else 0
  M                1 where l + G1 - G2 > 0, else 0; of leading tokens always 1
  A(u)             s (drop(ReLU(u W_down + b)) W_up + b'), the adapter of AdaptFormer

  y = u + M MLP(LN u) + A(u)

The gradient takes M for p (straight through), also where M is 0. Training makes two passes over one
theta, y and the complete one y', with M = 1 and no gate, and minimises, L being the task's loss,

  L(y) + L(y') + KL(y' without gradient, y) + 2 (mean(M) - r)^2

The mean is over images, the N tokens and all layers. Where the head reads the class token alone,
this last term is all that moves the gate of the last block. y' is the backbone at the start; y is
not, since about half of the tokens skip the MLP. Evaluation is y without noise.

Served, M is a mask, and no arithmetic is saved. With a budget b the MLP runs on n + ceil(b N)
tokens of each image alone, those of the highest logits, and the others get 0. That is the same
function as long as no image has more active tokens than that in a layer; where one has, those of
the lowest logits are left out. `tuned.apply(..., aux=True)` gives 'dyt_rate' [layers, B], the share
of active tokens, which shows what budget suffices. The MLP has to compute each token by itself.

With E experts, A has the mean of E pairs of matrices and biases, weighed for each image by the
softmax of mean(u) W_r over experts, W_r [D, E]; it is applied once.

W_down ~ U(-1, 1) / sqrt(D), W_up = 0, biases 0; W_g and W_r normal of std 0.02, cut at two of them.
Not mergeable: M depends on the token.

Deviations. Where the task is not one of classes, KL is the distance that the task knows
(`TaskLoss.between`). Both passes draw the same dropout. Of the official code: the gate has a bias,
and l = 0 is inactive. Of neither: s = 0.1, as AdaptFormer has it; the router's start, and that
biases are mixed as matrices are, which gives the paper's 4.80 M for E = 4.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import Bound, Call, Method, Site, TaskLoss, at, chain, factory

from ..arguments import first_array, on_first
from ..check import at_least, require, whole, within
from ..nn import dense, linear, truncated_normal
from .bottleneck import Adapter, beside_norm_and_mlp

_STD = 0.02


@factory
def dyt(
  bottleneck: int = 64,
  rate: float = 0.5,
  scale: float = 0.1,
  dropout: float = 0.1,
  temperature: float = 5.0,
  experts: int = 1,
  complete: float = 1.0,
  distill: float = 1.0,
  balance: float = 2.0,
  budget: float | None = None,
  blocks: str = '{block}',
  stream: str = '{norm2}',
  mlp: str = '{mlp}',
  name: str = 'dyt',
) -> Method:
  """Gates on the tokens of every MLP, beside an adapter (arXiv 2403.11808).

  Args:
    bottleneck: width of the adapter; 8 on VTAB.
    rate: r, the share of tokens that is to go through the MLPs.
    scale: s.
    dropout: rate on the bottleneck.
    temperature: tau.
    experts: E; 1 for a plain adapter.
    complete: factor of the loss of the complete pass.
    distill: factor of KL. With this and `complete` 0, training makes one pass.
    balance: factor of (mean(M) - r)^2.
    budget: b, the share of the tokens for which there is room in an evaluation, see above; None for
      all. Take it from the shares that the data have: tokens beyond it lose their MLP.
    blocks: pattern of the blocks, to whose output the adapter is added.
    stream: pattern of the modules, one in each block, whose input is u.
    mlp: pattern of the MLPs, one in each block, called behind that.
    name: in theta: of a block its adapter, of an MLP the gate {'kernel': [D, 1], 'bias': [1]}.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a budget or experts in a decoder,
      which would look ahead; at the call, as `adaptformer`, or an MLP that does not read u's tokens
      [B, n + N, D].
  """
  within('dyt', 'rate', rate, 0, 1)
  require(not isinstance(scale, str), 'dyt', 'scale', scale, 'must be a number')
  require(temperature > 0, 'dyt', 'temperature', temperature, 'must be greater than 0')
  whole('dyt', 'experts', experts, 1)
  for factor, value in (('complete', complete), ('distill', distill), ('balance', balance)):
    at_least('dyt', factor, value, 0)
  has_room = budget is None or 0 < budget <= 1
  require(has_room, 'dyt', 'budget', budget, 'must lie in (0, 1], or be None for all tokens')
  adapter: Any = Adapter('dyt', 'relu', 'lora', dropout, scale, bottleneck)
  if experts > 1:
    adapter = Experts(adapter, experts)
  objective = _Objective(name, rate, complete, distill, balance)
  gate = _Gate(name, temperature, budget, experts, stream)
  root = Call(name, _tell_passes_apart, takes=('complete',), loss=objective)
  dispatch = Call(name, gate.apply, gate.init, exact=('kernel', 'bias'))
  return chain(at('', root), beside_norm_and_mlp(name, blocks, stream, adapter), at(mlp, dispatch))


def _tell_passes_apart(t, call: Bound, *args, complete: bool = False, **kwargs):
  """At the model: whether this pass is the complete one."""
  call.local['complete'] = complete
  return call(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Objective:
  """What training minimises; the fields are arguments of `dyt`."""

  name: str
  rate: float
  complete: float
  distill: float
  balance: float

  def __call__(self, loss: TaskLoss, run) -> tuple[jax.Array, Any]:
    out, aux = run()
    active = aux[rate_of(self.name)].mean()
    value = loss(out) + self.balance * jnp.square(active - self.rate)
    if self.complete or self.distill:
      whole_out, _ = run(complete=True)
      told = jax.lax.stop_gradient(whole_out)
      value = value + self.complete * loss(whole_out) + self.distill * loss.between(out, told)
    return value, out


def rate_of(name: str) -> str:
  """What the share of active tokens [layers, B] of a method is called beside the output."""
  return f'{name}_rate'


@dataclasses.dataclass(frozen=True, eq=False)
class _Gate:
  """The gate of an MLP; the fields are arguments of `dyt`."""

  name: str
  temperature: float
  budget: float | None
  experts: int
  stream: str

  def init(self, key, site: Site, arrays) -> dict:
    if site.model.causal:
      rule = 'reads later tokens of the text too, which a decoder must not: leave it out'
      require(self.budget is None, 'dyt', 'budget', self.budget, rule)
      require(self.experts == 1, 'dyt', 'experts', self.experts, rule)
    return dense(key, site.input.shape[-1], 1, std=_STD, draw=truncated_normal)

  def apply(self, t, call: Bound, *args, **kwargs):
    """Runs the MLP on the tokens that the gate lets through."""
    u = self.stream_of(call, first_array(call, args, kwargs))
    if call.root.get('complete', False):
      return call(*args, **kwargs)
    lead = call.site.model.lead
    logits = linear(t, u[:, lead:].astype(jnp.float32))[..., 0]  # [B, N]
    if call.training:
      # The difference of two numbers of Gumbel's distribution is one of the logistic one.
      logits = logits + jax.random.logistic(call.rng(f'{self.name} gate'), logits.shape)
    mask = activated(logits, self.temperature)
    call.aux(**{rate_of(self.name): mask.mean(-1)})
    if self.budget is None or call.training:
      mask = _with_lead(mask, lead, 1)
      out = call(*args, **kwargs)
      return call.site.map_stream(out, lambda h: h * mask[..., None].astype(h.dtype))
    chosen = chosen_tokens(logits, self.budget)
    rows = _with_lead(lead + chosen, lead, jnp.arange(lead))
    kept = _with_lead(jnp.take_along_axis(mask, chosen, -1), lead, 1)
    return self.gathered(call, args, kwargs, rows, kept)

  @staticmethod
  def gathered(call: Bound, args, kwargs, rows: jax.Array, kept: jax.Array):
    """The MLP on some tokens, and 0 for the others.

    Args:
      call, args, kwargs: of the MLP.
      rows: [B, K] numbers of tokens, each once.
      kept: [B, K] what their outputs are multiplied by.
    """

    def taken(x):
      return jnp.take_along_axis(x, rows[..., None], 1)

    def put_back(h):
      image = jnp.arange(len(h))[:, None]
      none = jnp.zeros((len(h), length, h.shape[-1]), h.dtype)
      return none.at[image, rows].set(h * kept[..., None].astype(h.dtype), unique_indices=True)

    length = first_array(call, args, kwargs).shape[1]
    args, kwargs = on_first(call, args, kwargs, taken)
    return call.site.map_stream(call(*args, **kwargs), put_back)

  def stream_of(self, call: Bound, x: jax.Array) -> jax.Array:
    """u, as the norm has recorded it.

    Raises:
      ValueError: nothing was recorded before the MLP, or it reads other tokens.
    """
    path = call.site.path
    u = (call.outer or {}).get('u')
    if u is None:
      raise ValueError(
        f'{self.name}: {path!r} is called before anything that stream={self.stream!r} names, or in '
        'no block around both: name the module whose input the gates read'
      )
    if x.ndim != 3 or u.shape[:2] != x.shape[:2]:
      raise ValueError(
        f'{self.name}: gates need an MLP on the tokens of the stream {list(u.shape)}, and {path!r} '
        f'reads {list(x.shape)}'
      )
    return u


def activated(logits: jax.Array, temperature: float) -> jax.Array:
  """M [B, N]: 1 where a logit is above 0, else 0, with the gradient of sigmoid(logits / tau)."""
  p = jax.nn.sigmoid(logits / temperature)
  hard = (logits > 0).astype(p.dtype)
  return hard + (p - jax.lax.stop_gradient(p))  # the second part is 0


def chosen_tokens(logits: jax.Array, budget: float) -> jax.Array:
  """The numbers [B, ceil(budget N)] of the tokens with the highest logits [B, N]."""
  room = math.ceil(budget * logits.shape[-1] - 1e-6)  # 0.07 of 100 are 7
  return jax.lax.top_k(logits, max(room, 1))[1]


def _with_lead(x: jax.Array, lead: int, value) -> jax.Array:
  """x [B, N] behind `lead` columns of a value."""
  first = jnp.broadcast_to(jnp.asarray(value, x.dtype), (len(x), lead))
  return jnp.concatenate([first, x], -1)


@dataclasses.dataclass(frozen=True)
class Experts:
  """An adapter whose matrices and biases are means of several, weighed for each image.

  Attributes:
    adapter: which each expert is.
    count: E.
  """

  adapter: Adapter
  count: int

  def init(self, key, input, output) -> dict:
    """theta of one adapter, each array led by E, and the router [D, E]."""
    key_router, *keys = jax.random.split(key, self.count + 1)
    drawn = [self.adapter.init(one, input, output) for one in keys]
    router = _STD * truncated_normal(key_router, (input.shape[-1], self.count))
    return {**jax.tree.map(lambda *x: jnp.stack(x), *drawn), 'router': router}

  def branch(self, theta, call: Bound, x: jax.Array) -> jax.Array:
    """What is added to the stream x [B, N, D]."""
    experts = {part: theta[part] for part in ('down', 'up')}
    shares = jax.nn.softmax(x.mean(1) @ theta['router'], -1)  # [B, E]

    def mixed(entry):
      entry = entry.reshape(self.count, -1, entry.shape[-1])  # a bias as one row
      return jnp.einsum('be,eij->bij', shares, entry)

    return self.adapter.branch(jax.tree.map(mixed, experts), call, x)
