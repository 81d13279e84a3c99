"""Roles of the naming schemes: the names of modules that all families of this package share."""

BLOCK = r'(?:.*/)?(?:block_\d+|blocks)'

ROLES = {
  'block': BLOCK,
  'encoder_block': r'encoder/(?:block_\d+|blocks)',
  'decoder_block': r'decoder/(?:block_\d+|blocks)',
  'attention': rf'{BLOCK}/(?:cross_)?attention',
  'mlp': rf'{BLOCK}/mlp',
  'q': rf'{BLOCK}/(?:cross_)?attention/query',
  'k': rf'{BLOCK}/(?:cross_)?attention/key',
  'v': rf'{BLOCK}/(?:cross_)?attention/value',
  'o': rf'{BLOCK}/(?:cross_)?attention/out',
  'fc1': rf'{BLOCK}/mlp/(?:fc1|gate)',
  'fc2': rf'{BLOCK}/mlp/fc2',
  'linear': rf'{BLOCK}/(?:(?:cross_)?attention/(?:query|key|value|out)|mlp/(?:fc1|gate|fc2))',
  'norm': rf'{BLOCK}/norm(?:1|2|_cross)',
  'head': r'head(?:_\w+)?',
  'stack': r'encoder',
}

# Of families whose blocks begin with a norm, so that the stream leaves through the block itself.
PRE_NORM_ROLES = {
  'norm1': rf'{BLOCK}/norm1',
  'norm2': rf'{BLOCK}/norm2',
  'block_end': BLOCK,
}
