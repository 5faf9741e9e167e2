"""Finding the backend of a model, and what is said where there is none."""

import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.contract import registry

MODEL = lnp_numpy.LinearModel(weight=np.zeros((2, 1)))


def model_of(module):
    return type("Net", (), {"__module__": module})()


def test_numpy_models_are_found():
    assert registry.find(MODEL) is lnp_numpy


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_framework_that_is_not_loaded(framework, monkeypatch):
    """The message names the model's type, the import and the extra."""
    monkeypatch.delitem(sys.modules, framework, raising=False)
    with pytest.raises(TypeError) as error:
        lnp.decompose(model_of(f"{framework}.nn"), (1, 2))
    for words in (f"{framework}.nn.Net", "Expected", f"import {framework}", f"pip install 'lnp[{framework}]'", "numpy"):
        assert words in str(error.value)


def test_an_unknown_object():
    with pytest.raises(TypeError, match=r"tests\.made_up.Net, which no backend accepts.*numpy.*pip install"):
        lnp.decompose(model_of("tests.made_up"), (1, 2))


def test_an_unknown_pair():
    with pytest.raises(TypeError, match="items of types function, str, which no backend accepts"):
        lnp.decompose((lambda p, x: x, "parameters"), (1, 2))


def test_load():
    assert lnp.load("numpy") is lnp_numpy
    with pytest.raises(ValueError, match=r"No lnp backend for .*Expected one of jax, keras, numpy, tensorflow, torch"):
        lnp.load("cupy")


def test_only_loaded_frameworks_are_asked(monkeypatch):
    """And NumPy last: other frameworks' models may hold its arrays."""
    asked = []

    def backend(name, accepted):
        return SimpleNamespace(accepts=lambda model: asked.append(name) or accepted)

    found = {"numpy": backend("numpy", True), "torch": backend("torch", False), "absent": backend("absent", True)}
    entries = [SimpleNamespace(name=name, load=lambda name=name: found[name]) for name in found]
    monkeypatch.setattr(registry, "_entries", lambda: entries)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert registry.find(object()) is found["numpy"]
    assert asked == ["torch", "numpy"]


GOOD = "def accepts(model): return False\ndef evaluate(*a, **k): return None\ndef linearize(*a): return None\n"
FAILING = {
    "a missing dependency": ("import no_such_module_anywhere", "ModuleNotFoundError"),
    "a syntax error": ("def accepts(model) return", "SyntaxError"),
    "an error at import": ("raise RuntimeError('no licence')", "no licence"),
    "an exit at import": ("import sys; sys.exit('no licence')", "SystemExit"),
    "accepts() that raises": (GOOD + "def accepts(model): raise KeyError('weight')", "KeyError"),
    "accepts() of another signature": (GOOD + "def accepts(): return True", "TypeError"),
    "accepts() that returns an array": (GOOD + "import numpy\ndef accepts(model): return numpy.ones(2)", "ambiguous"),
    "no accepts()": ("def evaluate(*a): pass\ndef linearize(*a): pass", "it has no accepts"),
    "no evaluate()": ("def accepts(model): return True\ndef linearize(*a): pass", "it has no evaluate"),
    "no linearize()": ("def accepts(model): return True\ndef evaluate(*a): pass", "it has no linearize"),
    "accepts that is no function": (GOOD + "accepts = True", "it has no accepts"),
    "an empty module": ("", "it has no accepts, evaluate, linearize"),
}
MALFORMED = {
    "a module that is not there": ("[lnp.backends]\nnumpy = no_such_backend\n", "no_such_backend"),
    "no module's name": ("[lnp.backends]\nnumpy = 1 2 : 3\n", "'1 2 : 3'"),
    "an attribute that is not there": ("[lnp.backends]\nnumpy = others_backend:nothing\n", "nothing"),
    "a line that is no entry": ("[lnp.backends]\nnumpy\n", "others"),
}


def distribution(folder, source, entries="[lnp.backends]\nnumpy = others_backend\n"):
    """An installed distribution of somebody else's, with a backend."""
    (folder / "others_backend.py").write_text(source)
    info = folder / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_TOLD", set())
    yield tmp_path
    sys.modules.pop("others_backend", None)


@pytest.mark.parametrize("kind", [*FAILING, *MALFORMED])
def test_a_backend_of_others_that_fails_is_named_once_and_passed_over(kind, others):
    source, entries = (FAILING[kind][0], None) if kind in FAILING else (GOOD, MALFORMED[kind][0])
    distribution(others, source, *([entries] if entries else []))
    assert registry.find(MODEL) is lnp_numpy  # whose own backend comes first
    reason = FAILING[kind][1] if kind in FAILING else MALFORMED[kind][1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry._TOLD.clear()
        registry._entries_on.cache_clear()
        for _ in range(2):
            with pytest.raises(TypeError, match="which no backend accepts"):
                registry.find(object())
    (told,) = [str(warning.message) for warning in caught]
    assert "others" in told or "no_such_backend" in told or "1 2" in told
    assert reason in told
    assert "Update or uninstall" in told


def test_a_greedy_backend_of_others_is_asked_last(others):
    distribution(others, GOOD + "def accepts(model): return True")
    assert registry.find(MODEL) is lnp_numpy
    assert lnp.load("numpy") is lnp_numpy
    assert registry.find(object()).__name__ == "others_backend"
    assert lnp.decompose(MODEL, (np.eye(2), np.ones((2, 1)))).samples == 2


def test_keras_is_asked_first_and_numpy_last(monkeypatch):
    """Models of Keras are those of another framework, too, and others may hold NumPy's arrays."""
    entries = [SimpleNamespace(name=name) for name in ("numpy", "torch", "keras", "jax")]
    monkeypatch.setattr(registry, "_is_own", lambda entry: entry.name != "others")
    assert [entry.name for entry in sorted(entries, key=registry._turn)] == ["keras", "torch", "jax", "numpy"]
    others = SimpleNamespace(name="others")
    assert [entry.name for entry in sorted([others, *entries], key=registry._turn)][-1] == "others"


def test_a_backend_of_others_takes_no_place_of_lnps_own(monkeypatch):
    own, others = (SimpleNamespace(name="numpy", load=lambda who=who: who) for who in ("own", "others"))
    monkeypatch.setattr(registry, "_is_own", lambda entry: entry is own)
    for entries in ([own, others], [others, own]):
        monkeypatch.setattr(registry, "_entries", lambda entries=entries: entries)
        assert lnp.load("numpy") == "own"
