"""Damage: bytes and JSON values changed at random, each change from one random generator."""

import json
import random
import re
import zlib
from typing import Any

NUMBERS = (0, -1, 1, 7, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
FLOATS = (0.0, -0.5, 1e-320, 1e308, float('nan'), float('inf'), -float('inf'))
TEXTS = ('', 'x', '\0', '\ud800', 'a' * 5000, '../../x', '/dev/zero', '%n%s', '\u202e', 'ä', '[')
DEEP = 3000


def damaged(data: bytes, random: random.Random) -> bytes:
  """The bytes of a file after one to four changes of any kind."""
  for _ in range(random.choice((1, 1, 2, 4))):
    data = random.choice(_OF_BYTES)(data, random)
  return data


def damaged_json(data: bytes, random: random.Random) -> bytes:
  """A JSON text whose values are changed, or its bytes."""
  if random.random() < 0.25:
    return damaged(data, random)
  value = json.loads(data)
  for _ in range(random.choice((1, 1, 2, 4))):
    value = _in_value(value, random)
  return _text_of(value, random)


def damaged_lines(data: bytes, random: random.Random) -> bytes:
  """JSON lines, one of them changed as JSON, or the bytes."""
  if random.random() < 0.3:
    return damaged(data, random)
  lines = data.splitlines()
  at = random.randrange(len(lines))
  lines[at] = damaged_json(lines[at], random)
  return b'\n'.join(lines) + b'\n'


def damaged_tar(data: bytes, random: random.Random) -> bytes:
  """The bytes of a tar after changes of headers, whose checksums are right again most often."""
  changed = bytearray(data)
  for _ in range(random.choice((1, 2, 4))):
    block = 512 * random.randrange(len(data) // 512)
    field, size = random.choice(((0, 100), (124, 12), (124, 12), (156, 1), (257, 8), (345, 155)))
    kind = random.random()
    if kind < 0.4:
      number = random.choice(NUMBERS)
      text = bytes([random.choice(_KINDS)])
      if size > 1:
        text = (number % 2 ** (8 * size)).to_bytes(size, 'big')
    elif kind < 0.7:
      text = random.choice((b'%o' % abs(random.choice(NUMBERS)), b'-1', b'x', b'', b'\xff' * size))
    else:
      text = damaged(bytes(changed[block + field : block + field + size]), random)
    changed[block + field : block + field + size] = text[:size].ljust(size, b'\0')
  if random.random() < 0.3:
    return damaged(bytes(changed), random)
  for block in range(0, len(changed) - 511, 512):
    if changed[block + 257 : block + 262] == b'ustar':
      changed[block + 148 : block + 156] = b' ' * 8
      changed[block + 148 : block + 156] = b'%06o\0 ' % sum(changed[block : block + 512])
  return bytes(changed)


_KINDS = b'0125xgLKS7\0'  # of members of a tar


def damaged_image(data: bytes, random: random.Random) -> bytes:
  """The bytes of an image after some changes; of a PNG the checksums are right most often."""
  changed = damaged(data, random)
  if not changed.startswith(b'\x89PNG') or random.random() < 0.3:
    return changed
  whole = bytearray(changed)
  at = 8
  while at + 12 <= len(whole):
    end = at + 8 + int.from_bytes(whole[at : at + 4], 'big')
    if end + 4 > len(whole):
      break
    whole[end : end + 4] = zlib.crc32(whole[at + 4 : end]).to_bytes(4, 'big')
    at = end + 4
  return bytes(whole)


# Templates that do or make as much as they can: each must end soon, and none above 2 GB.
TEMPLATES = (
  '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',
  '{% for a in range(99999) if false %}{% endfor %}' * 50,
  '{% for a in range(99999) %}{% for b in range(99999) if a is eq(-1) %}x{% endfor %}{% endfor %}',
  "{{ 'x' * 10 ** 10 }}",
  '{{ 10 ** 10 ** 10 }}',
  '{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}',
  "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
  "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
  "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
  '{{ n.s }}',
  "{% set n = namespace(s=['x']) %}{% for i in range(99) %}{% set n.s = {'a': n.s, 'b': n.s} %}"
  '{% endfor %}{{ n.s | tojson }}',
  "{% set n = namespace(s='aa') %}{% for i in range(99) %}{% set n.s = n.s.replace('a', 'aaa') %}"
  '{% endfor %}',
  "{{ 'x'.ljust(10 ** 10) }}",
  "{{ 'x' | center(10 ** 10) }}",
  "{{ '%9999999999d' % 1 }}",
  "{{ '{:9999999999}'.format(1) }}",
  "{{ '{:{}}'.format(1, 10 ** 10) }}",
  "{{ ('%s' * 9999) % 3 }}",
  "{{ ','.join(['x' * 9999] * 99999) }}",
  "{{ (['x' * 9999] * 99999) | join }}",
  "{{ ['x' * 9999] * 99999 }}",
  '{{ [[1] * 9999] * 99999 }}',
  '{{ messages | tojson(indent=10 ** 9) }}',
  "{{ 'x\n' * 9999 | indent(10 ** 9) }}",
  '{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}',
  '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}',
  '{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}',
  '{% block a %}{{ self.a() }}{% endblock %}',
  '{% set n = namespace() %}{% set n.n = n %}{{ n }}{{ [n] | tojson }}',
  '{{ range(99999) | map("string") | join("x" * 99999) }}',
  '{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}',
  '{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}',
  '{% for i in range(99999) %}{% if i in range(99999) | list %}{% endif %}{% endfor %}',
  '{% for i in range(99999) %}' + 'long text ' * 999 + '{% endfor %}',
  '{% set x %}{% for i in range(99999) %}' + 'long text ' * 999 + '{% endfor %}{% endset %}',
  '{% call(x) f() %}{% endcall %}',
  '{{ messages.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}',
  "{{ ''.__class__.__base__.__subclasses__() }}",
  '{{ 1 / 0 }}',
  '{{ messages[0].x.y.z }}',
  '{{ raise_exception("no") }}',
  "{{ strftime_now('%' * 9999) }}",
  "{% include 'x' %}",
  "{% import 'x' as y %}",
  '{' * 5000,
  '{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}',
  '{{ ' + '-' * 5000 + '1 }}',
  '{% if x %}' * 500 + '{% endif %}' * 500,
  '{% for x in y %}' * 50 + '{% endfor %}' * 50,
  "{{ ('x ' * 999999).split() }}",
  "{% for i in range(999) %}{{ ('x ' * 99999).split() | length }}{% endfor %}",
  "{{ 'x' * 99999 | urlize }}",
  "{{ ('<' * 99999) | striptags }}",
  '{{ lipsum(n=10 ** 9) }}',
  '{{ 1.5 | round(10 ** 9) }}',
  '{{ messages | batch(10 ** 9, 0) | list }}',
  '{{ messages | slice(10 ** 9) | list }}',
  '{{ dict(messages=messages * 9999) }}',
)
_PIECES = tuple(
  word
  for template in TEMPLATES
  for word in re.findall(r'\{%.*?%\}|\{\{.*?\}\}|\w+\(.*?\)|[^{}]+', template)
)


def damaged_template(data: bytes, random: random.Random) -> bytes:
  """A chat template with pieces of hostile ones in it, or its bytes changed."""
  if random.random() < 0.3:
    return damaged(data, random)
  pieces = re.split(r'(?=\{[{%])', data.decode('utf-8', 'replace'))
  for _ in range(random.choice((1, 2, 4))):
    at = random.randrange(len(pieces) + 1)
    kind = random.random()
    if kind < 0.6:
      pieces.insert(at, random.choice(_PIECES))
    elif kind < 0.8 and pieces:
      del pieces[random.randrange(len(pieces))]
    else:
      pieces.insert(at, random.choice(TEMPLATES))
  return ''.join(pieces).encode()


# ---- Bytes.


def _flip(data, random):
  changed = bytearray(data)
  for _ in range(random.choice((1, 1, 3, 16))):
    if changed:
      changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
  return bytes(changed)


def _cut(data, random):
  return data[: random.randrange(len(data) + 1)]


def _splice(data, random):
  """A piece of the file put in, or over, another place of it."""
  start, end = _span(data, random)
  piece = data[start:end]
  at = random.randrange(len(data) + 1)
  over = random.choice((0, len(piece)))
  return data[:at] + piece + data[at + over :]


def _drop(data, random):
  start, end = _span(data, random)
  return data[:start] + data[end:]


def _fill(data, random):
  start, end = _span(data, random)
  byte = random.choice((b'\0', b'\xff', b'\x80', b'[', b'"'))
  return data[:start] + byte * (end - start) + data[end:]


def _number(data, random):
  """A huge or odd number over some bytes, in one of the layouts of files."""
  size = random.choice((1, 2, 4, 8))
  number = random.choice(NUMBERS) % 2 ** (8 * size)
  at = random.randrange(len(data) + 1)
  return data[:at] + number.to_bytes(size, random.choice(('little', 'big'))) + data[at + size :]


def _digits(data, random):
  """Other digits in place of the first ones behind some place."""
  at = random.randrange(len(data) + 1)
  for start in range(at, len(data)):
    if data[start : start + 1].isdigit():
      return data[:start] + str(random.choice(NUMBERS)).encode() + data[start + 1 :]
  return data


def _foreign(data, random):
  """Bytes that are no UTF-8, or a byte-order mark."""
  piece = random.choice((b'\xff\xfe', b'\xfe\xff', b'\xef\xbb\xbf', b'\xc3', b'\xe2\x80', b'\0'))
  at = random.choice((0, random.randrange(len(data) + 1)))
  return data[:at] + piece + data[at:]


def _repeat(data, random):
  start, end = _span(data, random)
  return data[:start] + data[start:end] * random.choice((2, 100)) + data[end:]


def _span(data, random):
  start = random.randrange(len(data) + 1)
  return start, min(len(data), start + random.choice((1, 4, 16, 200)))


_OF_BYTES = (_flip, _flip, _cut, _splice, _drop, _fill, _number, _digits, _foreign, _repeat)

# ---- Values.


def _in_value(value: Any, random: random.Random) -> Any:
  """The value with one change, somewhere in it."""
  if isinstance(value, dict) and value and random.random() < 0.85:
    key = random.choice(list(value))
    kind = random.random()
    changed = dict(value)
    if kind < 0.12:
      del changed[key]
    elif kind < 0.2:
      changed[random.choice(TEXTS)] = changed.pop(key)
    elif kind < 0.28:
      other = random.choice(list(value))
      changed[key], changed[other] = changed[other], changed[key]
    else:
      changed[key] = _in_value(value[key], random)
    return changed
  if isinstance(value, list) and value and random.random() < 0.8:
    at = random.randrange(len(value))
    kind = random.random()
    if kind < 0.15:
      return value[:at] + value[at + 1 :]
    if kind < 0.3:
      return value[:at] + [value[at]] * random.choice((2, 50)) + value[at:]
    return value[:at] + [_in_value(value[at], random)] + value[at + 1 :]
  return _other(value, random)


def _other(value: Any, random: random.Random) -> Any:
  """Something else in place of a value."""
  kind = random.randrange(8)
  if kind == 0:
    return random.choice(NUMBERS)
  if kind == 1:
    return random.choice(FLOATS)
  if kind == 2:
    return random.choice(TEXTS)
  if kind == 3:
    return random.choice((None, True, False))
  if kind == 4:
    return random.choice(([], {}, [value], {'x': value}, [None], [[]]))
  if kind == 5 and isinstance(value, str):
    return value[: random.randrange(len(value) + 1)] + random.choice(TEXTS)
  if kind == 6 and isinstance(value, (int, float)):
    return random.choice((-value, value + 1, value * 1000, str(value)))
  return {'@deep': random.choice('[{')}


def _text_of(value: Any, random: random.Random) -> bytes:
  """The JSON text of a value; deep nesting in place of its marks, and sometimes a key twice."""
  text = json.dumps(value, ensure_ascii=random.random() < 0.9)
  text = text.replace('{"@deep": "["}', '[' * DEEP + ']' * DEEP)
  text = text.replace('{"@deep": "{"}', '{"a":' * DEEP + '1' + '}' * DEEP)
  if random.random() < 0.05 and text.startswith('{') and len(text) > 2:
    text = text[:-1] + ', ' + text[1:]  # every key twice
  return text.encode('utf-8', 'surrogatepass')
