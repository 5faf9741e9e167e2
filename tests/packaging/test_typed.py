"""What a type checker is told: the options of `lnp.decompose` and `lnp.Tracker`, and that every package has types."""

import importlib.util
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import lnp
from lnp.arguments import LossName
from lnp.losses.kinds import NAMES
from lnp.typed_options import DecomposeOptions, TrackerOptions

OF_DECOMPOSE = inspect.signature(lnp.decompose).parameters
OF_TRACKER = inspect.signature(lnp.Tracker).parameters


def options(kind):
    return {name: str(hint) for name, hint in typing.get_type_hints(kind).items()}


def test_the_options_are_those_of_decompose():
    hints = typing.get_type_hints(lnp.decompose)
    wanted = {name: str(hints[name]) for name in OF_DECOMPOSE if name not in ("model", "batch")}
    assert options(DecomposeOptions) == wanted


def test_the_options_are_those_of_the_tracker():
    given = {name for name in OF_TRACKER if name not in ("path", "schedule", "options")}
    assert set(options(TrackerOptions)) - set(options(DecomposeOptions)) == given


def test_names_of_losses_are_those_of_the_core():
    assert typing.get_args(LossName) == NAMES


def test_values_are_floats_to_a_checker():
    for kind in (lnp.Decomposition, lnp.Layer, lnp.Population, lnp.CrossResponse):
        hints = typing.get_type_hints(kind)
        assert {hints[name] for name in ("rate", "chi_pos", "chi_pos_stderr")} == {float}


def test_every_package_says_that_it_has_types():
    for name in ("lnp", "lnp_numpy", "lnp_torch", "lnp_jax", "lnp_tensorflow", "lnp_keras"):
        spec = importlib.util.find_spec(name)
        assert (Path(spec.submodule_search_locations[0]) / "py.typed").is_file(), name


def test_figures_are_there_without_an_import_of_their_own():
    code = "import lnp, sys; before = set(sys.modules); lnp.plot.chi_pos; after = set(sys.modules)"
    code += "; assert 'lnp.plot' in after - before and 'matplotlib' not in after"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert "plot" in lnp.__all__
    assert not hasattr(lnp, "plots")
