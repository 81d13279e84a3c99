"""PEQA: trains the scales of kernels that are stored as integers, and nothing else.

Kim et al., 2023, "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit
Integer Quantization" (arXiv 2305.14152). A kernel [in, out] is stored as integers q with a scale s
and a zero point z for every output channel, or group of inputs of it:

  w = s (q - z)                   theta has s, in float32; q and z stay

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
  """PEQA (arXiv 2305.14152): trains the scales of a quantized backbone.

  `train` and `plan` store the backbone as `affine`. Weight decay must be off: it would pull every
  kernel to zero.

  Args:
    targets: pattern of sites; the scales of every quantized kernel that they own are trained.
    name: in theta.

  Raises:
    ValueError: at `attach`, a kernel that is not quantized.
  """

  def init(key, site, arrays):
    theta = {}
    for kernel in site.matrices:
      if kernel in site.slices:
        raise ValueError(
          f'{name}: {{{site.part}}} is a slice of {kernel!r} at {site.owner!r}, and scales '
          'belong to a whole kernel: name the module'
        )
      box = arrays.stored(kernel)
      if not isinstance(box, Quantized):
        raise ValueError(
          f'{name}: {kernel!r} at {site.path!r} has no scales: store the backbone in integers '
          'first, by jpeft.quantize(model, jpeft.affine(), backbone, *example)'
        )
      theta[kernel] = box.scales()
    return theta

  def apply(theta, site, arrays):
    return {kernel: arrays.stored(kernel).rescaled(scales) for kernel, scales in theta.items()}

  return at(targets, Weight(name, init, apply))
