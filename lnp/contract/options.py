"""How a model is to be linearised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

BatchStatistics = Literal["frozen", "coupled"]
BATCH_STATISTICS: tuple[str, ...] = get_args(BatchStatistics)


@dataclass(frozen=True)
class Options:
    """How a model is linearised; what `lnp.decompose` was told, for the backend.

    Attributes
    ----------
    loss:
        Callable, name, or None to infer it.
    forward:
        (model, inputs) -> outputs, or None to call the model itself.
    parameters:
        Which parameters to differentiate: a predicate on names, a glob, names, or None for all trainable ones.
    seed:
        Of the random signs; in JAX also a PRNG key.
    loss_terms:
        The user's own n, or None.
    microbatch:
        Samples that are in memory at a time, or None for the whole batch.
    batch_statistics:
        "frozen" (batch normalisation in training mode keeps this batch's statistics) or "coupled".
    split:
        Whether the samples may be taken one at a time.
    population:
        Whether population values are asked for; None for where they are cheap. False spares the trial whether the loss
        is a mean over samples.

    Raises
    ------
    ValueError
        For other batch statistics, and for a micro-batch, a number of terms or a seed that cannot be.
    TypeError
        For a loss's class, a forward that is no function, parameters that are no names, a seed that is no integer.
    """

    loss: str | Callable | None = None
    forward: Callable | None = None
    parameters: Any = None
    seed: Any = 0
    loss_terms: int | None = None
    microbatch: int | None = None
    batch_statistics: str = "frozen"
    split: bool = True
    population: bool | None = None

    def __post_init__(self) -> None:
        if self.batch_statistics not in BATCH_STATISTICS:
            known = ", ".join(map(repr, BATCH_STATISTICS))
            raise ValueError(f"batch_statistics is {self.batch_statistics!r}. Expected one of {known}.")
        if self.microbatch is not None and not (_is_integer(self.microbatch) and self.microbatch >= 1):
            raise ValueError(f"microbatch is {self.microbatch!r}. Expected a number of samples >= 1, or None.")
        if self.loss_terms is not None:
            _check_terms(self.loss_terms)
        if isinstance(self.seed, int) and self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}. Expected an integer >= 0.")
        if isinstance(self.seed, bool | float | str):
            raise TypeError(f"seed is {self.seed!r}. Expected an integer >= 0, or a key of the framework.")
        if isinstance(self.loss, type):
            raise TypeError(
                f"loss is the class {self.loss.__name__}. Expected a function loss(outputs, targets) -> scalar, or "
                f"a name. Make one of the class: loss={self.loss.__name__}()."
            )
        if self.forward is not None and not callable(self.forward):
            raise TypeError(
                f"forward is {self.forward!r}. Expected a function forward(model, inputs) -> outputs, or None."
            )
        if not isinstance(self.population, bool | None):
            raise TypeError(f"population is {self.population!r}. Expected True, False or None.")
        object.__setattr__(self, "parameters", _names(self.parameters))


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_terms(terms: Any) -> None:
    """Raise an error for a number of terms that cannot be one; an array inside of a compiled function passes."""
    text = f"loss_terms is {terms!r}. Expected the number of terms that the loss averages, above 0."
    number = isinstance(terms, int | float) and not isinstance(terms, bool)
    if not number and not (hasattr(terms, "dtype") and getattr(terms, "shape", None) == ()):
        raise TypeError(text)
    if number and not 0 < terms < math.inf:
        raise ValueError(text)


def _names(parameters: Any) -> Any:
    """A selection of parameters as it was given, what can be gone through only once as a tuple."""
    if parameters is None or isinstance(parameters, str) or callable(parameters):
        return parameters
    what = type(parameters).__name__
    if isinstance(parameters, Iterable):
        parameters = tuple(parameters) if isinstance(parameters, Iterator) else parameters
        others = [item for item in parameters if not isinstance(item, str)]
        if not others:
            return parameters
        what = f"{what} of {type(others[0]).__name__}"
    raise TypeError(
        f"parameters= is of type {what}. Expected names, a glob such as 'head.*', or a function name -> bool, and "
        "without it every trainable parameter is measured. Pass the names of those that you mean."
    )
