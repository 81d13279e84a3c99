"""MAM adapters: a prefix in every attention and a scaled adapter beside every FFN.

He et al., 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv
2110.04366); official code jxhe/unify-parameter-efficient-tuning. The paper writes prefix tuning,
adapters and LoRA as one change h <- h + s f(x W_down) W_up that differs in f, in what x is, in the
place and in s, and "mix and match" is its best choice of them: few prefix rows in attention, a wide
parallel adapter with s above 1 at the FFN. The other rows of its table are methods here as they
are: `prefix`, `lora`, `houlsby` and `pfeiffer` (sequential), `parallel`, of which `targets` choose
the place. A prefix made by maps (`hidden`) is chained with `parallel` by hand.
"""

from jpeft.core import Method, chain, factory

from ..prompt.prefix import prefix
from .bottleneck import parallel


@factory
def mam(
  tokens: int = 30,
  bottleneck: int = 512,
  scale: float | str = 4.0,
  attention: str = '{attention}',
  targets: str = '{mlp}',
  dropout: float = 0.0,
  name: str = 'mam',
) -> Method:
  """Mix-and-match adapters.

  Args:
    tokens: rows of the prefix: 30 for summaries, 16 for GLUE in the paper.
    bottleneck: of the adapter: 512 and 16.
    scale: s of the adapter: 4 and 2; 'learned' trains it, from 1.
    attention: pattern of the modules with a prefix.
    targets: pattern of the modules with an adapter beside them.
    dropout: rate on the entries of the prefix and on the bottleneck.
    name: of both in theta.

  Raises:
    ValueError: what `prefix` and `parallel` refuse.
  """
  return chain(
    prefix(tokens, dropout, targets=attention, name=name),
    parallel(bottleneck, scale, targets, dropout=dropout, name=name),
  )
