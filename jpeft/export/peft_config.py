"""adapter_config.json of peft: the fields that are understood, and what peft makes of them.

A field that is not understood is refused by its name unless its value says that it is not used, so
that a folder never computes less here than it does in peft.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.messages import did_you_mean
from jpeft.models import read_json

CONFIG = 'adapter_config.json'

# What `load_adapter` acts on.
READ = (
  'peft_type',
  'r',
  'lora_alpha',
  'rank_pattern',
  'alpha_pattern',
  'use_rslora',
  'use_dora',
  'init_lora_weights',
  'bias',
  'lora_bias',
  'modules_to_save',
  'ensure_weight_tying',
  'trainable_token_indices',
  'token_indices',
  'num_virtual_tokens',
  'alpha',
  'init_r',
  'decompose_both',
  'decompose_factor',
)
# What makes no difference to what is computed from the tensors: who made them, how they were
# trained, and which modules were picked (the tensors have their names).
WITHOUT_EFFECT = (
  'task_type',
  'auto_mapping',
  'peft_version',
  'base_model_name_or_path',
  'revision',
  'inference_mode',
  'target_modules',
  'exclude_modules',
  'layers_to_transform',
  'layers_pattern',
  'modules_to_tie',
  'target_modules_to_tie',
  'lora_dropout',
  'loftq_config',
  'eva_config',
  'corda_config',
  'lora_ga_config',
  'velora_config',
  'runtime_config',
  'megatron_core',
  'qalora_group_size',
  'hira_dropout',
  'rank_dropout',
  'rank_dropout_scale',
  'module_dropout',
  'use_effective_conv2d',  # of convolutions, whose tensors tell it by their shapes
)
# What has to be unused, and why.
UNUSED = {
  'fan_in_fan_out': 'kernels [in, out], as GPT-2 stores them, are not read',
  'megatron_config': 'its layers are split over devices',
  'alora_invocation_tokens': 'an aLoRA acts only behind the tokens that invoke it',
  'use_qalora': 'QA-LoRA pools what enters a',
  'monteclora_config': 'MonteCLoRA draws what it adds',
  'layer_replication': 'it repeats layers of the model',
  'target_parameters': 'it adapts arrays that are no modules',
  'use_bdlora': 'BD-LoRA stores the blocks of block-diagonal factors',
  'arrow_config': 'Arrow picks an adapter for each token',
  'coft': 'its rotations are made smaller in each call',
  'boft_block_num': 'blocks are read by their size, boft_block_size',
  'kasa_config': 'KaSA changes the base model and has a diagonal between the factors',
}
# The fields of other kinds are among these and the following.
_OF_IA3 = ('feedforward_modules', 'init_ia3_weights')  # what the shapes of the tensors tell
# Of VeRA, whose tensors tell what these would draw.
_OF_VERA = ('projection_prng_key', 'save_projection', 'vera_dropout', 'd_initial', 'init_weights')
_OF_ROTATIONS = (
  'oft_block_size',
  'block_share',
  'use_cayley_neumann',
  'num_cayley_neumann_terms',
  'boft_block_size',
  'boft_n_butterfly_factor',
  'boft_dropout',
  'n_frequency',
  'n_frequency_pattern',
  'scaling',
  'random_loc_seed',
  'eps',
)
# Of VB-LoRA and RandLoRA; how what they share was drawn makes no difference to what is in the file.
_OF_SHARED = (
  'num_vectors',
  'vector_length',
  'topk',
  'save_only_topk_weights',
  'vblora_dropout',
  'init_vector_bank_bound',
  'init_logits_std',
  'randlora_alpha',
  'randlora_dropout',
  'sparse',
  'very_sparse',
)
_OF_ADALORA = (  # how its budget fell in training
  'target_r',
  'tinit',
  'tfinal',
  'deltaT',
  'beta1',
  'beta2',
  'orth_reg_weight',
  'total_step',
)
# Of prompts, prefixes and P-tuning, whose rows are in the file as their encoders made them.
_OF_PROMPTS = (
  'token_dim',
  'num_transformer_submodules',
  'num_attention_heads',
  'num_layers',
  'prompt_tuning_init',
  'prompt_tuning_init_text',
  'tokenizer_name_or_path',
  'tokenizer_kwargs',
  'prefix_projection',
  'encoder_hidden_size',
  'encoder_reparameterization_type',
  'encoder_num_layers',
  'encoder_dropout',
)
KNOWN = (
  *READ,
  *WITHOUT_EFFECT,
  *UNUSED,
  *_OF_IA3,
  *_OF_VERA,
  *_OF_ADALORA,
  *_OF_ROTATIONS,
  *_OF_SHARED,
  *_OF_PROMPTS,
)
LORA, IA3, LN_TUNING, VERA, TOKENS = 'LORA', 'IA3', 'LN_TUNING', 'VERA', 'TRAINABLE_TOKENS'
LOHA, LOKR, HIRA, ADALORA = 'LOHA', 'LOKR', 'HIRA', 'ADALORA'
OFT, BOFT, FOURIERFT = 'OFT', 'BOFT', 'FOURIERFT'
VBLORA, RANDLORA = 'VBLORA', 'RANDLORA'
PROMPT_TUNING, P_TUNING, PREFIX_TUNING = 'PROMPT_TUNING', 'P_TUNING', 'PREFIX_TUNING'
PROMPTS = (PROMPT_TUNING, P_TUNING, PREFIX_TUNING)
KINDS = (
  LORA,
  IA3,
  LN_TUNING,
  VERA,
  TOKENS,
  LOHA,
  LOKR,
  HIRA,
  ADALORA,
  OFT,
  BOFT,
  FOURIERFT,
  VBLORA,
  RANDLORA,
  *PROMPTS,
)
# What a config of each kind must have.
_NEEDED = {
  LORA: {'r', 'lora_alpha'},
  VERA: {'r'},
  LOHA: {'r', 'alpha'},
  LOKR: {'r', 'alpha'},
  HIRA: {'r'},
  VBLORA: {'r', 'num_vectors', 'vector_length', 'topk'},
  RANDLORA: {'r', 'randlora_alpha'},
  ADALORA: {'init_r', 'lora_alpha'},
  TOKENS: {'token_indices'},
  **dict.fromkeys(PROMPTS, {'num_virtual_tokens'}),
}

_ROWS = ([int], {str: [int]}, None)
_SCHEMA = {
  'peft_type?': str,
  'r?': (int, None),
  'lora_alpha?': (float, None),
  'alpha?': (float, None),
  'decompose_both?': (bool, None),
  'decompose_factor?': int,
  'rank_pattern?': ({str: (int, [bool])}, None),
  'init_r?': int,
  'num_vectors?': int,
  'vector_length?': int,
  'topk?': int,
  'save_only_topk_weights?': bool,
  'randlora_alpha?': float,
  'n_frequency?': int,
  'n_frequency_pattern?': ({str: int}, None),
  'scaling?': float,
  'random_loc_seed?': int,
  'oft_block_size?': int,
  'num_cayley_neumann_terms?': int,
  'boft_block_size?': int,
  'boft_n_butterfly_factor?': int,
  'alpha_pattern?': ({str: float}, None),
  'bias?': str,
  'use_rslora?': (bool, None),
  'use_dora?': (bool, None),
  'lora_bias?': (bool, None),
  'init_lora_weights?': (bool, str, None),
  'modules_to_save?': ([str], None),
  'token_indices?': ([int], None),
  'trainable_token_indices?': _ROWS,
  'num_virtual_tokens?': (int, None),
}
# Starts that leave the base model as it is.
_PLAIN_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica')
# Those that take a part out of the matrix that can be found again from the matrix.
DECOMPOSITIONS = ('pissa', 'olora')
_BIASES = ('none', 'all', 'lora_only')


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """adapter_config.json.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it describes an adapter that cannot be read; the field is named.
  """
  file = folder / CONFIG
  if not file.exists():
    raise FileNotFoundError(f'{folder} holds no {CONFIG}, so it is no adapter of peft')
  config = read_json(file, _SCHEMA)
  kind = config.get('peft_type', LORA)
  if kind not in KINDS:
    raise ValueError(f'{file}: peft_type={kind!r} is not supported, only {", ".join(KINDS)}')
  for field, reason in UNUSED.items():
    if _is_used(config.get(field)):
      raise ValueError(f'{file}: {field}={config[field]!r} is not supported: {reason}')
  for field, value in config.items():
    if field not in KNOWN and _is_used(value):
      hint = did_you_mean(field, KNOWN)
      raise ValueError(
        f'{file}: {field}={value!r} is not known here, so what it changes is not either{hint}'
      )
  if config.get('bias', 'none') not in _BIASES:
    raise ValueError(f'{file}: bias={config["bias"]!r} is none of {", ".join(_BIASES)}')
  start = config.get('init_lora_weights', True)
  _check_start(file, start)
  if config.get('use_dora') and start_of(config) is not None:
    raise ValueError(f'{file}: use_dora with init_lora_weights={start!r} is not supported')
  missing = _NEEDED.get(kind, set()) - config.keys()
  if missing:
    raise ValueError(f'{file} lacks {" and ".join(sorted(missing))}')
  return config


def _is_used(value: Any) -> bool:
  """Whether the value of a field does not say that the field is unused."""
  return value not in (None, False, '', [], {})


def _check_start(file: pathlib.Path, start: Any) -> None:
  if isinstance(start, str):
    start = start.lower()
  if start in _PLAIN_STARTS or start in DECOMPOSITIONS:
    return
  raise ValueError(
    f'{file}: init_lora_weights={start!r} adapts what is left of matrices once peft has taken '
    'them apart; have peft convert it to plain LoRA (path_initial_model_for_weight_conversion)'
  )


def start_of(config: Mapping) -> str | None:
  """How peft took the matrices apart before training, one of DECOMPOSITIONS; None if it did not."""
  start = str(config.get('init_lora_weights')).lower()
  return start if start in DECOMPOSITIONS else None


def rows_trained(config: Mapping, module: str) -> Sequence[int]:
  """The rows of a table that are trained, by a config."""
  if config.get('peft_type') == TOKENS:
    return config['token_indices']
  given = config.get('trainable_token_indices') or ()
  if not isinstance(given, Mapping):
    return given
  for name, rows in given.items():
    if f'.{module}'.endswith(f'.{name}'):
      return rows
  return ()


def rank_of(config: Mapping, module: str) -> int:
  """The rank that a config has for a module."""
  return _of(config.get('rank_pattern'), module, config['r'])


def alpha_of(config: Mapping, module: str, field: str = 'lora_alpha') -> float:
  """The alpha that a config has for a module, in a field that some kinds call otherwise."""
  return _of(config.get('alpha_pattern'), module, config[field])


def count_of(config: Mapping, module: str) -> int:
  """The number of frequencies that a config has for a module."""
  return _of(config.get('n_frequency_pattern'), module, config.get('n_frequency', 1000))


def scaled(rank: int, alpha: float, rslora: bool) -> float:
  """s of w + s a b."""
  if rslora:
    return alpha / rank**0.5
  return alpha / rank


def _of(pattern: Mapping | None, module: str, default):
  """The entry of a rank_pattern or alpha_pattern for a module.

  Its keys are ends of names, or regexes of them.
  """
  for key, value in (pattern or {}).items():
    if _matches(key, module):
      return value
  return default


def _matches(key: str, module: str) -> bool:
  """Whether a module has an end of a name, or a regex of it.

  Raises:
    ValueError: no regex, or one with a repeated group, which may be tried for ever.
  """
  if re.search(r'\)[*+{]', key):
    raise ValueError(f'the pattern {key!r:.100} of {CONFIG} repeats a group: name the modules')
  try:
    return re.fullmatch(rf'(?:.*\.)?(?:{key})', module) is not None
  except (re.error, RecursionError, OverflowError) as error:
    raise ValueError(f'the pattern {key!r:.100} of {CONFIG} is no regex ({error})') from error
