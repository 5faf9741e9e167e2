"""What a backend supplies to be tested, and how the tests compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import lnp
from lnp.contract.linearization import Linearization
from lnp.testing.oracle import Loss, Truth
from lnp.testing.scenarios import Scenario

FACTORS = ("rate", "chi_loss", "chi_net", "chi_pos")


@dataclass(frozen=True)
class Kit:
    """How a framework builds the scenarios' models.

    Attributes
    ----------
    name:
        What a failing test calls it.
    framework:
        Import name of the framework, for `lnp.load`.
    build:
        Scenario -> (model, batch). The arrays have the dtype to use. Parameters keep their names: either as they are,
        or nested at the dots (`nested`).
    loss:
        Loss -> what the backend takes as `loss=`.
    snapshot:
        (model, batch) -> {what: value} of everything that a measurement must leave alone: parameters, gradients,
        buffers, modes, hooks, random state, global flags. Values are compared by `==`; `frozen` makes one of an array.
    update:
        {parameter: array} -> what the backend takes as `update=`.
    moved:
        (model, {parameter: array}) -> the same model at other parameters: the very object, where it holds them.
    bend:
        (cotangent -> cotangent) -> the identity with this backward pass, or None where the framework has none.
    dtypes:
        Of parameters and inputs.
    decompose:
        `lnp.decompose`, or the same inside a compiled function.
    compiled:
        Whether `decompose` is compiled: checks of values cannot raise then, and numbers that cannot be had are nan.
    to_numpy:
        The framework's array -> NumPy.
    """

    name: str
    framework: str
    build: Callable[[Scenario], tuple[Any, Any]]
    loss: Callable[[Loss], Any]
    snapshot: Callable[[Any, Any], Mapping[str, Any]]
    update: Callable[[Mapping[str, np.ndarray]], Any] = dict
    moved: Callable[[Any, Mapping[str, np.ndarray]], Any] | None = None
    bend: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] | None = None
    dtypes: tuple[str, ...] = ("float64", "float32")
    decompose: Callable[..., lnp.Decomposition] = lnp.decompose
    compiled: bool = False
    to_numpy: Callable[[Any], np.ndarray] = np.asarray

    def record(self, scenario: Scenario, **options: Any) -> Linearization:
        """The backend's record of a scenario."""
        options = {"loss": scenario.loss, **options}
        return lnp.load(self.framework).linearize(*self.build(scenario), lnp.Options(**options))

    def measure(self, scenario: Scenario, **options: Any) -> Any:
        """The decomposition of a scenario."""
        options = {"loss": scenario.loss, **options}
        return self.decompose(*self.build(scenario), **options)

    def cases(self, *scenarios: Scenario, dtypes: int | None = None) -> list[Case]:
        """Each scenario in each dtype, or in the first few."""
        return [
            Case(self, scenario.cast(dtype), Truth(scenario.cast(dtype)), dtype)
            for scenario in scenarios
            for dtype in self.dtypes[:dtypes]
        ]


@dataclass(frozen=True)
class Case:
    """A scenario in one dtype, with the truth about it."""

    kit: Kit
    scenario: Scenario
    truth: Truth
    dtype: str

    @property
    def tolerance(self) -> float:
        """4 sqrt(eps)."""
        return 4 * float(np.finfo(self.dtype).eps) ** 0.5

    @property
    def rounding(self) -> float:
        """What a few hundred operations may lose."""
        return 500 * float(np.finfo(self.dtype).eps)

    def equal(self, what: str, actual: Any, expected: Any, tolerance: float | None = None) -> None:
        """Raise AssertionError unless shapes are equal and values agree relative to the largest expected one."""
        actual = np.asarray(self.kit.to_numpy(actual), dtype="float64")
        expected = np.asarray(expected, dtype="float64")
        self.true(actual.shape == expected.shape, f"{what} has shape {actual.shape}, expected {expected.shape}")
        scale = np.max(np.abs(expected[np.isfinite(expected)]), initial=0) or 1.0
        tolerance = self.rounding if tolerance is None else tolerance
        with np.errstate(invalid="ignore"):
            same = (np.abs(actual - expected) <= tolerance * scale) | (np.isnan(actual) & np.isnan(expected))
        same |= actual == expected
        self.true(
            bool(np.all(same)), f"{what} is\n{actual}\nexpected\n{expected}\nwithin {tolerance:.1e} x {scale:.3g}"
        )

    def factors(self, what: str, actual: Any, expected: Mapping[str, float], names: Iterable[str] = FACTORS) -> None:
        """Raise AssertionError unless these attributes have the expected values."""
        for name in names:
            self.equal(what + name, getattr(actual, name), expected[name])

    def true(self, condition: bool, message: str) -> None:
        """Raise AssertionError with the kit, scenario and dtype unless the condition holds."""
        if not condition:
            raise AssertionError(f"{self.kit.name}, {self.scenario.name}, {self.dtype}: {message}")

    def raises(self, what: str, error: type[Exception], call: Callable[[], Any]) -> None:
        """Raise AssertionError unless the call raises this type of error."""
        try:
            call()
        except error:
            return
        self.true(False, f"{what} did not raise {error.__name__}")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary of dictionaries, split at the dots of the names.

    >>> nested({"body.weight": 1, "scale": 2})
    {'body': {'weight': 1}, 'scale': 2}
    """
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`.

    >>> flat({"body": {"weight": 1}, "scale": 2})
    {'body.weight': 1, 'scale': 2}
    """
    items: dict[str, Any] = {}
    for key, value in tree.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return items


def frozen(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and bytes of an array: equal only if bit-identical."""
    array = np.asarray(array)
    return str(array.dtype), array.shape, array.tobytes()
