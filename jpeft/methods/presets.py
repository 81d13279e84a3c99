"""Hyperparameters by which methods are planned and compared, where they are not the method's own
defaults.

The lean side networks were chosen by what XLA for TPU v5e keeps of them (docs/memory.md): taps
pooled before they are stored, and side blocks recomputed in the backward pass.
"""

_PACKED = {'saved_bits': 4}
_LEAN = {'downsample': 'pool', 'block': 'attention'}

# {name: (method, hyperparameters)}; a name that is a method's stands for its default preset.
PRESETS: dict[str, tuple[str, dict]] = {
  'bitfit_packed': ('bitfit', _PACKED),
  'lora_packed': ('lora', _PACKED),
  'lora_all': ('lora', {'targets': '{linear}'}),
  'lora_all_packed': ('lora', {'targets': '{linear}', **_PACKED}),
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


def names(methods) -> list[str]:
  """All there is to compare: the methods, and behind each the presets of it that have a name of
  their own.
  """
  return [
    n for m in methods for n in (m, *(p for p, (of, _) in PRESETS.items() if of == m and p != m))
  ]
