"""Numbers as they are printed: a value and its standard error to one and the same decimal place."""

from __future__ import annotations

import math
from typing import Any

DIGITS = 4
"""Significant digits of a value without an error."""
MOST = 8
"""Significant digits of a value that is known better than that."""
FIXED = range(-4, 6)
"""Powers of ten that are written out."""
EXTREME = 290
"""Powers of ten from which on a number and its error may be out of each other's reach."""


def number(value: Any) -> str:
    """A value as it is printed; arrays, as in compiled functions, as they are.

    >>> number(7356.0), number(0.00200912), number(2.5e-7), number(0.0)
    ('7356', '0.002009', '2.5e-07', '0')
    """
    return f"{value:.{DIGITS}g}" if isinstance(value, int | float) else str(value)


def rounded(value: Any, stderr: Any = None) -> tuple[str, str]:
    """A value and its standard error as texts, both to the error's last digit; "" where there is no error, or it is 0.

    The error has one digit, or two where the first one is a 1, of which one digit alone may be off by a half.

    >>> rounded(7356.2, 104.0), rounded(76.79, 0.31), rounded(0.0012364, 0.00034), rounded(-0.0002, 0.001)
    (('7360', '100'), ('76.8', '0.3'), ('0.0012', '0.0003'), ('-0.0002', '0.0010'))
    >>> rounded(1.2345e-9, 2e-11), rounded(1.0, 0.0), rounded(1.0, float("nan"))
    (('1.23e-09', '0.02e-09'), ('1', ''), ('1', 'nan'))
    >>> rounded(9.8e-9, 3e-9)
    ('1.0e-08', '0.3e-08')
    """
    if stderr is None or (isinstance(stderr, int | float) and stderr == 0):
        return number(value), ""
    if not all(isinstance(part, int | float) and math.isfinite(part) for part in (value, stderr)):
        return number(value), number(stderr)
    last = _exponent(stderr, 2) - 1 if f"{stderr:.0e}".startswith("1") else _exponent(stderr, 1)
    shown = round(value, -last)  # which may have a digit more: 9.8 to 10
    top = max(_exponent(shown, DIGITS) if shown else last, last)
    if top - last >= MOST or abs(top) > EXTREME:
        return f"{value:.{MOST}g}", f"{stderr:.1g}"
    if top in FIXED and top >= last:
        return _fixed(value, last), _fixed(stderr, last)
    scale = 10.0**top
    return f"{_fixed(value / scale, last - top)}e{top:+03d}", f"{_fixed(stderr / scale, last - top)}e{top:+03d}"


def with_error(value: Any, stderr: Any = None) -> str:
    """The value, and behind it its standard error where there is one.

    >>> with_error(7356.2, 104.0), with_error(0.5)
    ('7360 ± 100', '0.5')
    """
    return " ± ".join(filter(None, rounded(value, stderr)))


def _exponent(value: float, digits: int) -> int:
    """The power of ten of a number's first digit, once it is rounded to so many digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _fixed(value: float, last: int) -> str:
    """A number rounded to 10^last, written out."""
    return f"{round(value, -last) + 0.0:.{max(0, -last)}f}"
