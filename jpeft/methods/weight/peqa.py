"""PEQA: trains the scales of kernels that are stored as integers, and nothing else.

Kim et al., 2023, "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit
Integer Quantization" (arXiv 2305.14152). A kernel [in, out] is stored as integers q with a scale s
and a zero point z for every output channel, or group of inputs of it:

  w = s (q - z)                   theta holds s, in float32; q and z stay

It starts as the quantized model. Other tasks are other scales on the same integers, and `merge`
gives such a backbone.

The published storage is `jpeft.affine()`, whose scale and zero point are those of the least and
largest weight (the paper searches them for the smallest error, which is left out). Any other format
of `jpeft.quantize` has scales as well; those that are stored in 8 bits (`double`) become float32 in
theta. The gradient of a scale is taken through w.
"""

from jpeft.core import Method, Weight, at, factory
from jpeft.quant import Quantized


@factory
def peqa(targets: str = '{linear}', name: str = 'peqa') -> Method:
  """PEQA (arXiv 2305.14152). `train` and `plan` store the backbone as `affine`; do not decay the
  scales.

  Args:
    targets: pattern of sites; the scales of every quantized kernel that they own are trained.
    name: in theta.

  Raises:
    ValueError: at `attach`, a kernel that is not quantized.
  """

  def init(key, site, arrays):
    boxes = {n: arrays.stored(n) for n in site.matrices}
    for n, box in boxes.items():
      if not isinstance(box, Quantized):
        raise ValueError(
          f'{name}: {n!r} at {site.path!r} has no scales: store the backbone in integers first, by '
          'jpeft.quantize(model, jpeft.affine(), backbone, *example)'
        )
    return {n: box.scales() for n, box in boxes.items()}

  def apply(t, site, arrays):
    return {n: arrays.stored(n).rescaled(s) for n, s in t.items()}

  return at(targets, Weight(name, init, apply))
