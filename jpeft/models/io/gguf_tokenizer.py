"""Encoders of text from the metadata of GGUF files: byte pairs by merges, or pieces by scores.

How a text is split before pairs are merged is known of some models by name. The patterns are those
of their tokenizer.json.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jpeft.lazy import extra

from .gguf import Gguf

# Types of tokens. Control tokens are special, that is, found in a text before it is split and left
# out of decoded text; those of the user are only found.
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER = 4

_SPACE = '\u2581'  # stands for a space in pieces

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r'[^\r\n\p{L}\p{N}]?\p{L}+'
_REST = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_UPPER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
_LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_CASED = rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*'

_LLAMA3 = rf'{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}'
_QWEN2 = rf'{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}'
_TEKKEN = rf'{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
# Letters with a case in the scripts that DeepSeek knew, and its Chinese, Japanese and Korean.
_CASED_SCRIPTS = (
  r'[[\p{Lu}\p{Ll}\p{Lt}]&&[\x{41}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13fd}\x{1c90}-\x{2cf3}'
  r'\x{a640}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{ff5a}\x{10400}-\x{1044f}\x{104b0}-\x{104fb}'
  r'\x{10c80}-\x{10cf2}\x{118a0}-\x{118df}\x{1e900}-\x{1e943}]]'
)
_ASIAN = r'[\x{800}-\x{9fa5}\x{ac00}-\x{d7ff}]+'


class Splitting(NamedTuple):
  """What happens to a text before byte pairs are merged.

  Attributes:
    patterns: each cuts what it finds out of the pieces that those before it left; None for the
      pattern of GPT-2.
    digits: whether each digit is a piece, before that.
    composed: whether characters are composed first (NFC).
    whole: whether a piece that is a token needs no merges.
    begins: whether a text begins with the token `bos`, where the file does not say.
  """

  patterns: tuple[str, ...] | None = None
  digits: bool = False
  composed: bool = False
  whole: bool = False
  begins: bool = False


_LLAMA3_SPLITTING = Splitting((_LLAMA3,), whole=True, begins=True)
_DIGITS = Splitting(digits=True)
SPLITTINGS = {
  'default': Splitting(),
  'gpt-2': Splitting(),
  'smollm': _DIGITS,
  'starcoder': _DIGITS,
  'refact': _DIGITS,
  'llama-bpe': _LLAMA3_SPLITTING,
  'llama3': _LLAMA3_SPLITTING,
  'llama-v3': _LLAMA3_SPLITTING,
  'qwen2': Splitting((_QWEN2,), composed=True),
  'tekken': Splitting((_TEKKEN,), whole=True, begins=True),
  'deepseek-llm': Splitting(
    (
      r'[\r\n]',
      rf'\s?{_CASED_SCRIPTS}+',
      r'\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+',
      r'\s+$',
      _ASIAN,
      r'\p{N}+',
    )
  ),
  'deepseek-coder': Splitting(
    (
      r'[\r\n]',
      r'\s?\p{L}+',
      r'\s?\p{P}+',
      _ASIAN,
      r'\p{N}',
    )
  ),
}


def encoder_of(file: Gguf):
  """(a `tokenizers.Tokenizer`, whether a text begins with `bos`) of a file.

  Raises:
    ValueError: a kind of tokenizer that is not supported, or one that lacks or contradicts parts.
  """
  values = {key.removeprefix('tokenizer.ggml.'): value for key, value in file.metadata.items()}
  kind = values.get('model')
  split = values.get('pre', 'default')
  if kind not in ('gpt2', 'llama') or kind == 'gpt2' and split not in SPLITTINGS:
    raise ValueError(
      f'{file.folder}: the tokenizer {kind!r} with the splitting {values.get("pre")!r} is not '
      f"supported, only 'llama', and 'gpt2' with {', '.join(SPLITTINGS)}"
    )
  needed = {'gpt2': ('tokens', 'merges'), 'llama': ('tokens', 'scores', 'token_type')}
  for name in needed[kind]:
    if name not in values:
      raise ValueError(f'{file.folder}: its tokenizer {kind!r} has no tokenizer.ggml.{name}')
  tokens = values['tokens']
  types = values.get('token_type', [_NORMAL] * len(tokens))
  for name, held in (('scores', values.get('scores', tokens)), ('token_type', types)):
    if len(held) != len(tokens):
      raise ValueError(
        f'{file.folder}: tokenizer.ggml.{name} has {len(held)} entries for {len(tokens)} tokens'
      )
  if kind == 'llama':
    encoder = _by_scores(file, values, types)
    begins = True
  else:
    encoder = _by_merges(file, values, SPLITTINGS[split])
    begins = SPLITTINGS[split].begins
  _add(encoder, tokens, types)
  return encoder, values.get('add_bos_token', begins)


def _add(encoder, tokens: Sequence[str], types: Sequence[int]) -> None:
  """Makes an encoder find control tokens, and those of the user, before it splits a text."""
  from tokenizers import AddedToken

  def added(kind: int) -> list[AddedToken]:
    pairs = zip(tokens, types, strict=True)
    return [AddedToken(token, normalized=False) for token, other in pairs if other == kind]

  encoder.add_special_tokens(added(_CONTROL))
  encoder.add_tokens(added(_USER))


def _by_merges(file: Gguf, values: Mapping[str, Any], splitting: Splitting):
  """An encoder of bytes, of which pairs are merged in the order of a list."""
  with extra('llm'):
    from tokenizers import Tokenizer, decoders, models, normalizers

  vocabulary = {token: i for i, token in enumerate(values['tokens'])}
  merges = [tuple(merge.split(' ')) for merge in values['merges']]
  for merge in merges:
    if len(merge) != 2 or not {*merge, ''.join(merge)} <= vocabulary.keys():
      raise ValueError(
        f'{file.folder}: the merge {" ".join(merge)!r} of its tokenizer is none of two tokens into '
        'a third'
      )
  encoder = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.whole))
  if splitting.composed:
    encoder.normalizer = normalizers.NFC()
  encoder.pre_tokenizer = _split(splitting)
  encoder.decoder = decoders.ByteLevel()
  return encoder


@functools.cache
def _split(splitting: Splitting):
  """A pre-tokenizer, which also writes bytes as the characters that tokens are written in."""
  from tokenizers import Regex
  from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

  steps = []
  if splitting.digits:
    steps.append(Digits(individual_digits=True))
  for pattern in splitting.patterns or ():
    steps.append(Split(Regex(pattern), 'isolated'))
  steps.append(ByteLevel(add_prefix_space=False, use_regex=splitting.patterns is None))
  return Sequence(steps)


def _by_scores(file: Gguf, values: Mapping[str, Any], types: Sequence[int]):
  """An encoder of pieces as of SentencePiece: of all neighbours those merge first whose piece has
  the highest score; a character without a piece becomes its bytes.

  A space is written before the text, and behind each special token, as in the tokenizer.json of
  Llama 2 and Mistral, unless the file says otherwise.
  """
  with extra('llm'):
    from tokenizers import Tokenizer, decoders, models, normalizers

  tokens = values['tokens']
  vocabulary = {token: i for i, token in enumerate(tokens)}
  unknown = values.get('unknown_token_id')
  if unknown is None and _UNKNOWN in types:
    unknown = types.index(_UNKNOWN)
  if unknown is None and not all(f'<0x{byte:02X}>' in vocabulary for byte in range(256)):
    raise ValueError(
      f'{file.folder}: its tokenizer has neither a token for what is unknown nor all bytes, so '
      'that characters would be left out'
    )
  model = models.BPE(
    vocabulary,
    _merges(tokens, values['scores'], types),
    unk_token=None if unknown is None else tokens[unknown],
    fuse_unk=True,
    byte_fallback=True,
  )
  encoder = Tokenizer(model)
  begins_with_space = values.get('add_space_prefix', True)
  spaces = normalizers.Replace(' ', _SPACE)
  steps = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  if begins_with_space:
    spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
    steps.append(decoders.Strip(' ', left=1))
  encoder.normalizer = spaces
  encoder.decoder = decoders.Sequence(steps)
  return encoder


def _merges(
  tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
  """All pairs of pieces that are a piece together, those with the highest score of it first."""
  pieces = {}
  for token, score, kind in zip(tokens, scores, types, strict=True):
    if kind in (_NORMAL, _USER):
      pieces[token] = score
  found = []
  for token, score in pieces.items():
    for i in range(1, len(token)):
      left, right = token[:i], token[i:]
      if left in pieces and right in pieces:
        found.append((-score, -pieces[left], -pieces[right], left, right))
  return [(left, right) for *_, left, right in sorted(found)]
