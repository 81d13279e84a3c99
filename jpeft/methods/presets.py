"""Hyperparameters with which methods are planned and compared, where these are not the defaults.

The lean side networks were chosen by what XLA for TPU v5e keeps of them (docs/memory.md): taps
pooled before they are stored, and side blocks recomputed in the backward pass.
"""

from collections.abc import Iterable

_PACKED = {'saved_bits': 4}
_LEAN = {'downsample': 'pool', 'block': 'attention'}

# {name: (method, hyperparameters)}; the name of a method is its default preset.
PRESETS: dict[str, tuple[str, dict]] = {
  'bitfit_packed': ('bitfit', _PACKED),
  'lora_packed': ('lora', _PACKED),
  'lora_all': ('lora', {'targets': '{linear}'}),
  'lora_all_packed': ('lora', {'targets': '{linear}', **_PACKED}),
  'paca': ('paca', {'rank': 16}),  # as many numbers as `lora_all` of rank 8
  'qlora': ('qlora', {'rank': 8, 'alpha': 8}),
  'lst': ('lst', _LEAN),
  'lst_mlp': ('lst', {**_LEAN, 'block': 'mlp'}),
  'lst_linear': ('lst', {**_LEAN, 'downsample': 'linear'}),
  'lst_paper': ('lst', {'block': 'own'}),
  'meft_inverse': ('meft', {'every': None}),
  'qst': ('qst', {'downsample': 'avg'}),
  'qst_kept': ('qst', {'downsample': 'avg', 'block': 'attention', 'remat': False}),
  'qst_adapter': ('qst', {}),
  'sherl_lean': ('sherl', {'remat': True}),
  'unipt_lean': ('unipt', {'remat': True}),
  'vqt_lean': ('vqt', {'remat': True}),
}


def preset(name: str) -> tuple[str, dict]:
  """(method, hyperparameters) of a preset, or of a method that has none."""
  method, values = PRESETS.get(name, (name, {}))
  return method, dict(values)


def names(methods: Iterable[str]) -> list[str]:
  """What can be compared: each method, and behind it its presets that have a name of their own."""
  found = []
  for method in methods:
    found.append(method)
    for name, (of, _) in PRESETS.items():
      if of == method and name != method:
        found.append(name)
  return found
