"""The naming scheme of ConvNeXt."""

from jpeft.core import Anatomy

from ..roles import BLOCK

_MERGE = r'encoder/stage_\d+/merge'

CONVNEXT_NAMING = Anatomy(
  'convnext',
  {
    'block': BLOCK,
    'mlp': rf'{BLOCK}/mlp',
    'fc1': rf'{BLOCK}/mlp/fc1',
    'fc2': rf'{BLOCK}/mlp/fc2',
    'linear': rf'{BLOCK}/mlp/fc[12]',
    'depthwise': rf'{BLOCK}/depthwise',
    'conv': rf'{BLOCK}/depthwise|embed/patch|{_MERGE}/reduction',
    'norm': rf'{BLOCK}/norm|embed/norm|{_MERGE}/norm',
    'merge': _MERGE,
    'embed': r'embed',
    'patch': r'embed/patch',
    'encoder': r'encoder',
    'stack': r'encoder',
    'final_norm': r'final_norm',
    'head': r'head',
  },
)
