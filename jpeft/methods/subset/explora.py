"""ExPLoRA: some blocks trained whole, low-rank products in the others, all norms.

Khanna et al., "ExPLoRA: Parameter-Efficient Extended Pre-Training to Adapt Vision Transformers
under Domain Shifts", 2024 (arXiv 2406.10973). Pre-training goes on, on images of another domain and
without labels (tasks 'mae' and 'dino'), with few trained numbers:

  block l in U       W_l              every array of the block, starts as the checkpoint's
  another block      W_l + s A_l B_l  kernels of queries and values, s = alpha / r; B starts at 0
  every norm         scale, shift     those of the blocks in U are in U already

Weight decay acts on these arrays as on any theta: it pulls the blocks of U towards 0, as in full
pre-training. What has no name of a norm, such as a LayerScale, is frozen outside of U. Arrays that
a new kind of input needs (positions, patch embeddings of further channels) are trained by a
`tune('{embed}')` in the chain.

The result is merged, and a second method learns the labels on the merged weights: it never goes on
with A and B.

Of scanned blocks theta, gradients of it and the optimizer's state have the blocks of U alone. While
a step runs, it holds the arrays of U once a layer of the stack, as any rule with `layers=` does.

Deviations. The authors published no code: alpha = r is chosen, and learning rate and schedule are
left to the run. Their name D-[L]-r64 is `explora(layers=-1, rank=64)`, M-[1,L]-r32
`explora(layers=(0, -1), rank=32)`.
"""

from jpeft.core import Layers, Method, all_but, chain, factory, in_layers

from ..check import whole
from ..weight.lora import lora
from .tune import norm, tune


@factory
def explora(
  layers: Layers | None = -1,
  rank: int = 64,
  alpha: float | None = None,
  targets: str = '{q}|{v}',
  norms: bool = True,
  dropout: float = 0.0,
  name: str = 'explora',
) -> Method:
  """Blocks trained whole, LoRA in the others, all norms.

  Args:
    layers: U, the blocks that are trained whole, as in `at`: numbers from 0 on, negative from the
      end; None for none.
    rank: r of LoRA in the blocks outside of U; 0 for none.
    alpha: the products are scaled by alpha / rank; rank if left out.
    targets: pattern of the sites with a low-rank product.
    norms: whether the norms outside of U are trained.
    dropout: rate on what enters the low-rank products.
    name: in theta, of the blocks; the products are '{name}_lora', the norms '{name}_norm'.

  Raises:
    ValueError: a hyperparameter outside its range, or nothing to train; at `attach`, U has all
      blocks and `rank` is not 0.
  """
  whole('explora', 'rank', rank, 0)
  parts = []
  if layers is not None:
    parts.append(in_layers(tune('{block}(?:/.*)?', name=name), layers))
  if rank:
    scaled = rank if alpha is None else alpha
    parts.append(lora(rank, scaled, targets, dropout, name=f'{name}_lora'))
  if norms:
    parts.append(norm(name=f'{name}_norm'))
  if not parts:
    raise ValueError('explora: layers=None, rank=0, norms=False leave nothing to train')
  if layers is None:
    return chain(*parts)
  first, *others = parts
  return chain(first, *(in_layers(other, all_but(layers)) for other in others))
