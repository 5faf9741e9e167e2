"""What comparing a batch with its single samples has shown, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass

NAMED = 4
"""Parameters that a note names."""


BENT = (
    "The backward pass of this network is not linear (a custom gradient that clips, normalises or adds something does "
    "that): what it returns is no J^T v, and chi_net and chi_pos are about the Jacobian J. Expected a backward pass "
    "that is linear in what comes in. Clip the parameters' gradients after the backward pass instead, or pass "
    "forward=, a function (model, inputs) -> outputs without the custom gradient."
)


NOT_FINITE = (
    "single samples give numbers in this network that are not finite, although the batch's are: they are not taken "
    "apart"
)


FROZEN_DIFFERS = (
    "with the statistics of this batch held fixed the network computes other outputs than by itself: nothing is held "
    "fixed, and samples that share statistics interact"
)


@dataclass(frozen=True)
class Verdict:
    """What comparing the batch with single samples has shown. Equal verdicts are equal, and have one hash.

    Attributes
    ----------
    reason:
        Why the samples are not taken apart, or "".
    general:
        (parameter whose single samples are run on their own, why) pairs.
    bent:
        Whether the backward pass is not linear.
    sure:
        Whether it is to be remembered: what is not finite shows nothing.
    """

    reason: str = ""
    general: tuple[tuple[str, str], ...] = ()
    bent: bool = False
    sure: bool = True

    def joined(self, other: Verdict) -> Verdict:
        """Both: of the same samples at other parameters."""
        general = {**dict(other.general), **dict(self.general)}
        return Verdict(
            self.reason or other.reason, tuple(general.items()), self.bent or other.bent, self.sure and other.sure
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: which parameters take the general way, and why."""
        if not self.general:
            return ()
        named = [f"{name} ({why})" for name, why in self.general]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        return (f"single samples run on their own, which is slower, for {', '.join(named[:NAMED])}{more}",)


def interacting(difference: float) -> str:
    """Why samples are not taken apart that differ by so much, relative, when the others are left out."""
    return (
        "the samples interact in this network (a sample's output or gradient changes by "
        f"{difference:.1g} (relative) when the others are left out; batch statistics and a dropout mask that is drawn "
        "for the whole batch do that too): they are not taken apart"
    )


def found_interacting() -> str:
    """Why samples are not taken apart that were found to interact by a look."""
    return (
        "the samples interact in this network (in this measurement or one before, a sample's output or gradient was "
        "not the same when others were left out): they are not taken apart"
    )


def failing(error: BaseException) -> str:
    """Why samples are not taken apart that cannot be run on their own, whatever the network raised."""
    try:
        first = (str(error).splitlines() or [""])[0][:120]
    except Exception:  # an exception of the user's that has no text
        first = "without a text"
    return f"single samples cannot be run in this network ({type(error).__name__}: {first}): they are not taken apart"
