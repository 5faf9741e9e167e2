r"""One record of a history as a line of JSON, and the schema that each line is held against when it is read.

    {"step": 3, "chi_pos": 0.25, "crc32": "2d6677c2"}

JSON has no numbers for what is not finite: nan and the infinities are written as the strings "NaN", "Infinity" and
"-Infinity", and become numbers again when they are read. The last field seals the line: it is the CRC-32 of the record
without it, so that a digit that has changed on a disk is found. Lines without a seal are read as well.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lnp.tracking.names import RESUMED, SEAL, STEP, holds_numbers

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
MARK = b', "crc32": "'
"""What stands before the seal's eight digits, of which the line's end is `"}`."""
START = b'{"step": '
"""What a tracker's lines begin with."""
LARGEST = 2**63
"""Steps are below."""
NUMBERS = {int, float, type(None)}
VALUES = NUMBERS | {str, bool}

Record = dict[str, Any]


def encode(record: Mapping[str, Any]) -> bytes:
    r"""A record as one line of JSON.

    >>> encode({"step": 3, "chi_pos": float("nan")})
    b'{"step": 3, "chi_pos": "NaN", "crc32": "e2e2955c"}\n'
    """
    if SEAL in record:
        raise ValueError(f"A record holds a value named {SEAL!r}, which is the line's checksum. Choose another name.")
    line = _json(record)
    mark = MARK if record else MARK.removeprefix(b", ")
    return line[:-1] + mark + _digits(zlib.crc32(line)) + b'"}\n'


def _json(record: Mapping[str, Any]) -> bytes:
    values = {_text(name): _json_value(value) for name, value in record.items()}
    return json.dumps(values).encode()


def _json_value(value: Any) -> str | bool | float | None:
    """The value, or the name of a number that is not finite. Numbers of other libraries become Python's."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return int(value)
    try:
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, int):
            return number
        number = float(number)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"A record holds a value of type {type(value).__name__}. Expected numbers, texts, booleans or None. "
            "Turn it into one of these."
        ) from error
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _text(text: str) -> str:
    """The text, of which all can be encoded: names of files may hold bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def _digits(checksum: int) -> bytes:
    return b"%08x" % checksum


def decode(line: bytes) -> Record | None:
    """The record of one line, None for a line that holds none: no JSON object, one that changed, or not by the schema.

    Numbers that are not finite are still texts.
    """
    record = _parsed(line)
    if not isinstance(record, dict):
        return None
    seal = record.pop(SEAL, None)
    # by its meaning, since other programs write numbers and spaces in other ways
    if seal is not None and not is_sealed(line.strip()) and not _has_meaning(record, seal):
        return None
    for name in (STEP, RESUMED):
        value = record.get(name)
        if isinstance(value, float) and value.is_integer():
            record[name] = int(value)
    if RESUMED in record and record[RESUMED] is None:
        del record[RESUMED]
    return record if fits([record]) else None


def decode_all(lines: Sequence[bytes], sealed: bool) -> tuple[list[Record | None], bool]:
    """(The records of lines, None for each that holds none; whether a line was sealed).

    `sealed` says that one before them was: a line without a seal has lost it then. Sound lines are read by one call,
    which is several times faster.
    """
    seals = list(map(is_sealed, lines))
    if all(seals) or not (sealed or any(SEAL.encode() in line for line in lines)):
        try:
            records = parser()("[" + b",".join(lines).decode() + "]")
        except (ValueError, RecursionError):
            records = []
        if len(records) == len(lines) and all(type(record) is dict for record in records):
            for record in records:
                record.pop(SEAL, None)
            if fits(records):
                return records, any(seals)
    found: list[Record | None] = []
    for line, own in zip(lines, seals, strict=True):
        found.append(decode(line) if not sealed or SEAL.encode() in line else None)
        sealed = sealed or own
    return found, sealed


def is_sealed(line: bytes) -> bool:
    """Whether the line ends with its own checksum."""
    if line[-22:-10] != MARK or line[-2:] != b'"}':
        return False
    return line[-10:-2] == _digits(zlib.crc32(b"}", zlib.crc32(line[:-22])))


def _has_meaning(record: Record, seal: Any) -> bool:
    """Whether this is the record that was sealed."""
    try:
        return _digits(zlib.crc32(_json(record))).decode() == seal
    except (TypeError, ValueError):  # nested values
        return False


def fits(records: Sequence[Record]) -> bool:
    """Whether all records are by the schema: steps, numbers where numbers belong, and no nested values."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record), []).append(record)
    return all(
        STEP in names
        and _encodable(names)
        and all(map(_column_fits, names, zip(*(record.values() for record in group), strict=True)))
        for names, group in groups.items()
    )


def _column_fits(name: str, values: tuple) -> bool:
    """Whether these values may be in this column."""
    kinds = set(map(type, values))
    if name in (STEP, RESUMED):
        return kinds == {int} and min(values) >= 0 and max(values) < LARGEST
    if not kinds <= VALUES:
        return False
    if int in kinds:
        integers = values if len(kinds) == 1 else [value for value in values if type(value) is int]
        if min(integers) < -1e308 or max(integers) > 1e308:
            return False
    texts = {value for value in values if type(value) is str} if str in kinds else ()
    if holds_numbers(name):
        return bool not in kinds and NONFINITE.keys() >= set(texts)
    return _encodable(texts)


def _encodable(texts: Iterable[str]) -> bool:
    """Whether these are texts of characters, as tables and files take them."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_tracker_line(line: bytes) -> bool:
    """Whether a tracker wrote this line, also where it has been damaged since."""
    if line.startswith(START) and b'"chi_pos": ' in line:
        return True
    record = decode(line)
    return record is not None and ("chi_pos" in record or SEAL.encode() in line)


def is_torn(line: bytes) -> bool:
    """Whether this may be the beginning of a line that a killed process, or a power failure, has left.

    >>> is_torn(b'{"step": 12, "lo'), is_torn(b'{"learning_rate": 0.1}')
    (True, False)
    """
    begun = line.startswith(START) or START.startswith(line)
    return not line.strip(b"\x00") or (begun and _parsed(line) is None)


def _parsed(line: bytes) -> Any:
    """What a line of JSON holds, None for one that is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def parser() -> Callable[[str], Any]:
    """Python's JSON parser, or orjson where it is installed: a million records open in half the time."""
    try:
        import orjson
    except ImportError:
        return json.loads
    return orjson.loads
