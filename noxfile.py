"""The checks of lnp: one session each, most of them by default. `nox -s torch -- -k resnet` passes options on.

Every session but `lint` and `types` installs the distribution as users get it, not the checkout: what is tested is what
the wheel contains. A session installs the framework that it is for; its absence is an error there, never a skip.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True

PARALLEL = ("-n", "2")
"""Where tests spend their time compiling, which one process does on one core."""

ROOT = Path(__file__).parent
# Pinned, because a new release of either finds new things in unchanged code.
RUFF, MYPY, PYRIGHT = "ruff==0.17.6", "mypy==2.4.1", "basedpyright==1.40.2"
TENSORFLOW = "tensorflow-cpu"
FORMATS = "pandas,polars,pyarrow,orjson"
OF_TORCH = (f".[torch,transformers,lightning,tensorboard,{FORMATS},demo,report,test]", "pytest-xdist", "peft>=0.14")
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
"""Compiles small programs in half of the time."""
AS_USERS_COMPILE = "tests/integrations/test_jax_undisturbed.py"
"""Compares compiled steps bit by bit, which the ways of compiling that are only fast may round differently."""
WHERE_COMPILED = tuple(f"test_keras{name}" for name in (".py", "_fit", "_undisturbed", "_hosts", "_replicas"))
"""Tests of Keras that TensorFlow's session has, where all of them take ten minutes to compile; JAX's has the kit.
PyTorch's has all, and so has `nox -s keras`.
"""
FRAMEWORKS = ("numpy", "torch", "jax", "tensorflow", "keras")
JAX_LIBRARIES = ("flax", "equinox", "dm-haiku", "optax")
EXTRAS = ("scipy", "pandas", "orjson")
OF_EXTRAS = [f"tests/core/test_{name}.py" for name in ("power_law", "foreign", "report", "damage")]
"""Tests of the core, some of which are skipped without those libraries: PyTorch's environment has them."""


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(RUFF)
    session.run("ruff", "check", *session.posargs, ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, without the frameworks: their own annotations change from release to release. README.md's examples as a
    user's own code, and mistakes that a checker has to see.
    """
    session.install(MYPY, "numpy>=2.1", "array-api-compat>=1.12")
    session.run("mypy", *session.posargs)
    session.install(PYRIGHT, ".")  # brings a Node of its own from the package index
    examples = Path(session.create_tmp()) / "examples"
    session.run("python", "tests/packaging/typed_examples.py", str(examples))


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The documentation site, whose warnings are errors."""
    install(session, ".[docs]")
    built = empty(Path(session.create_tmp()) / "site")
    session.run("sphinx-build", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html", "docs", str(built))


@nox.session(default=False)
def extension(session: nox.Session) -> None:
    """A backend in a distribution of its own, as docs/backends.md has it, passes the conformance kit."""
    example = ROOT / "docs" / "examples" / "lnp_autograd"
    install(session, ".[test]", str(example))
    refuse(session, "torch", "jax", "tensorflow", "keras")
    session.run("pytest", "-c", "pyproject.toml", str(example), *session.posargs)


@nox.session
def core(session: nox.Session) -> None:
    """The core and its NumPy backend where no framework is installed."""
    install(session, ".[test]", "pytest-xdist")
    found = ("matplotlib", "pandas", "polars", "pyarrow", "orjson", "sklearn", "rich", "tqdm")
    refuse(session, "torch", "jax", "tensorflow", "keras", "transformers", *found)
    pytest(session, "numpy", *PARALLEL, "--pyargs", "lnp", "lnp_numpy", "tests/core", *suite("numpy"))


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Branches of the core that its own tests run: fails under the share that pyproject.toml has."""
    install(session, ".[test]", "pytest-cov", "pytest-xdist")
    tests = ("tests/core", "tests/contract/test_numpy.py", "tests/properties/test_numpy.py")
    pytest(session, "numpy", *PARALLEL, "--cov", "--cov-config=pyproject.toml", "--pyargs", "lnp", *tests)


@nox.session(default=False)
def mutations(session: nox.Session) -> None:
    """Each formula broken in turn: fails if no test notices. Hours for all; options name files, as in
    `nox -s mutations -- lnp/estimators --every 10`.
    """
    # editable: coverage and doctests name files of the checkout
    session.install("--constraint", str(ROOT / "constraints.txt"), "--editable", ".[spectrum,pandas,test]", "coverage")
    session.run("python", "tests/mutations.py", *session.posargs)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Thousands of models, batches, losses, options, files and command lines: a right answer, or an error of lnp's."""
    install(session, *OF_TORCH)
    cases = os.environ.get("LNP_FUZZ", "3000")
    session.run("pytest", "-c", "pyproject.toml", "tests/fuzzing.py", *session.posargs, env={"LNP_FUZZ": cases})


@nox.session
def torch(session: nox.Session) -> None:
    """PyTorch and Hugging Face models, hosts of training loops, tables and figures, and the demo on PyTorch."""
    install(session, *OF_TORCH)
    whole_of_torch(session)
    if not session.posargs:
        show(session)
        keras_on(session, "torch")


def whole_of_torch(session: nox.Session) -> None:
    """All tests of the PyTorch backend."""
    refuse(session, "jax", "tensorflow", "keras")
    session.run("python", "-c", f"import {', '.join(EXTRAS)}")
    session.env["OMP_NUM_THREADS"] = "1"  # small products wait for each other on more threads than there are cores
    pytest(session, "torch", *PARALLEL, "--pyargs", "lnp_torch", *suite("torch"), *OF_EXTRAS)


@nox.session(default=False)
def processes(session: nox.Session) -> None:
    """Models that PyTorch's processes share: sharded, split, in hosts; ones that fail, are killed or do not come."""
    install(session, *OF_TORCH)
    session.env["OMP_NUM_THREADS"] = "1"
    tests = [f"tests/integrations/test_torch_{name}.py" for name in ("groups", "host_groups", "distributed")]
    pytest(session, "torch", "-m", "", *tests)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """PyTorch on a GPU: the conformance kit, the properties, and what only a GPU can get wrong."""
    install(session, *OF_TORCH)
    session.env["LNP_TEST_DEVICE"] = "cuda"
    pytest(session, "torch", "tests/contract/test_torch.py", "tests/properties/test_torch.py", "tests/gpu")


@nox.session
def jax(session: nox.Session) -> None:
    """JAX with the libraries whose models lnp takes."""
    install(session, ".[jax,demo,test]", *JAX_LIBRARIES, "pytest-xdist")
    refuse(session, "torch", "tensorflow", "keras")
    compile_fast(session, OLD_EMITTERS)
    tests = [path for path in suite("jax") if path != AS_USERS_COMPILE]
    pytest(session, "jax", *PARALLEL, "--pyargs", "lnp_jax", *tests)
    session.env["XLA_FLAGS"] = ""
    pytest(session, "jax", *PARALLEL, AS_USERS_COMPILE)
    if not session.posargs:
        keras_on(session, "jax", ("contract/test_keras",))


@nox.session
def tensorflow(session: nox.Session) -> None:
    """TensorFlow's modules and functions; then the same numbers from all frameworks in one process."""
    install(session, ".[demo,test]", TENSORFLOW, "pytest-xdist")
    refuse(session, "torch", "jax")
    compile_fast(session)
    pytest(session, "tensorflow", *PARALLEL, "--pyargs", "lnp_tensorflow", *suite("tensorflow"))
    if not session.posargs:
        keras_on(session, "tensorflow", WHERE_COMPILED)
        same_numbers(session)


@nox.session(default=False)
@nox.parametrize("framework", ["tensorflow", "jax", "torch"])
def keras(session: nox.Session, framework: str) -> None:
    """Keras models on each framework that can train them; that framework's session has these tests too, JAX's some."""
    install(session, ".[demo,test]", TENSORFLOW if framework == "tensorflow" else framework, "pytest-xdist")
    keras_on(session, framework)


def keras_on(session: nox.Session, framework: str, only: tuple[str, ...] = ("",)) -> None:
    """The tests of Keras, all or some, where one framework is installed: an environment of its own would take a minute
    to make.
    """
    session.install("--no-compile", "--constraint", str(ROOT / "constraints.txt"), ".[keras]")
    refuse(session, *{"tensorflow", "jax", "torch"} - {framework})
    compile_fast(session, *([OLD_EMITTERS] if framework == "jax" else []))
    session.env["KERAS_BACKEND"] = framework
    # PyTorch's session has the properties; the others' have them without Keras
    properties = () if framework == "torch" else ("properties/test_keras.py",)
    tests = [path for path in suite("keras") if not path.endswith(properties)]
    tests = [path for path in tests if any(part in path for part in only)]
    pytest(session, "keras", *PARALLEL, "--pyargs", "lnp_keras", *tests)


def same_numbers(session: nox.Session) -> None:
    """From all frameworks in one process, where TensorFlow is installed."""
    # with TensorFlow once more, whose own bounds are kept then
    session.install("--no-compile", "--constraint", str(ROOT / "constraints.txt"), ".[torch,jax,keras]", TENSORFLOW)
    session.env["KERAS_BACKEND"] = "tensorflow"
    pytest(session, None, *PARALLEL, "tests/properties/test_parity.py", "tests/properties/test_parity_layers.py")


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """The demo on JAX, from what a user installs for it."""
    install(session, ".[demo,jax]")
    refuse(session, "torch")
    show(session, *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """The built files: the wheel that the sdist builds, tested by the sdist's tests in a folder that holds no lnp."""
    session.install("build")
    elsewhere = empty(Path(session.create_tmp()) / "wheel")
    if session.run("python", "-m", "build", "--outdir", str(elsewhere), str(ROOT), silent=True) is None:
        return  # nox --install-only runs nothing.
    (built,), (source,) = elsewhere.glob("*.whl"), elsewhere.glob("*.tar.gz")
    shutil.unpack_archive(source, elsewhere)
    unpacked = elsewhere / source.name.removesuffix(".tar.gz")
    for code in ("lnp", "backends"):
        shutil.rmtree(unpacked / code)
    # Otherwise a second run would keep what it has installed, for its version is the same.
    session.run_install("pip", "uninstall", "--yes", "lnp", silent=True)
    install(session, f"{built}[test]")
    session.chdir(unpacked)
    # what reads the files of the checkout is the same in every session
    packaging = [f"tests/packaging/test_{name}.py" for name in ("import", "readme", "typed")]
    pytest(session, "numpy", "--pyargs", "lnp", "lnp_numpy", "tests/contract/test_numpy.py", *packaging)


@nox.session(default=False)
@nox.parametrize("framework", FRAMEWORKS)
def oldest(session: nox.Session, framework: str) -> None:
    """The lower bounds of pyproject.toml, with the conformance kit and the properties: what is claimed is what was run.

    Old builds of PyTorch may be those for GPUs, of gigabytes.
    """
    session.install("--upgrade", ".[test]", *lower_bounds(framework))
    for_one_framework(session, framework)


@nox.session(default=False)
@nox.parametrize("framework", FRAMEWORKS)
def newest(session: nox.Session, framework: str) -> None:
    """The newest releases, with the same tests. Of PyTorch it may be a build for GPUs, of gigabytes."""
    names = [re.split("[>=]", bound)[0] for bound in lower_bounds(framework)]
    session.install("--upgrade", ".[test]", *names)
    for_one_framework(session, framework)


def for_one_framework(session: nox.Session, framework: str) -> None:
    """The conformance kit and the property tests of one backend, with the releases that are installed."""
    session.run("pip", "list", silent=False)
    session.env["KERAS_BACKEND"] = "tensorflow"
    session.env["PYTHONSAFEPATH"] = "1"
    compile_fast(session, *([OLD_EMITTERS] if framework == "jax" else []))
    tests = [f"tests/{folder}/test_{framework}.py" for folder in ("contract", "properties")]
    quiet = ("-W", "default")  # other releases warn of other things, which are no failures of lnp's
    pytest(session, framework, *quiet, *(["tests/core"] if framework == "numpy" else []), *tests)


def lower_bounds(framework: str) -> list[str]:
    """What pyproject.toml claims to work with for one framework, as exact versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"numpy": [], "keras": ["keras", "tensorflow"]}.get(framework, [framework])
    claimed = [requirement for extra in extras for requirement in project["optional-dependencies"][extra]]
    # the small build, which has another name
    builds = {"tensorflow": TENSORFLOW}
    pairs = [requirement.split(">=") for requirement in [*project["dependencies"], *claimed]]
    return [f"{builds.get(name, name)}=={version}" for name, version in pairs]


def compile_fast(session: nox.Session, *more: str) -> None:
    """Tests compile many small programs once each: optimising them costs more than it saves. Of `more`, what this
    release of JAX does not know is left out: it would end the process.
    """
    session.env["TF_CPP_MIN_LOG_LEVEL"] = "3"
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    start = "import subprocess as s, sys; print(s.run([sys.executable, '-c', 'import jax; jax.devices()']).returncode)"
    for flag in more:
        code = session.run("python", "-c", start, env={"XLA_FLAGS": flag}, silent=True)
        flags += [flag] if str(code).strip().endswith("0") else []
    session.env["XLA_FLAGS"] = " ".join(flags)


def install(session: nox.Session, *requirements: str) -> None:
    """Install under the constraints, and keep the current folder off the path: it must not stand in for the package."""
    if "LNP_ONE_ENVIRONMENT" in os.environ:  # all of them together take 13 GB of the disk
        discard_others(session)
    # of a framework's modules few are imported, and those are compiled then: once, whatever the user's own setting is
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    session.install("--no-compile", "--constraint", str(ROOT / "constraints.txt"), *requirements)
    session.env["PYTHONSAFEPATH"] = "1"
    check = "import lnp, sysconfig; assert lnp.__file__.startswith(sysconfig.get_path('purelib')), lnp.__file__"
    session.run("python", "-c", check, silent=True)


def discard_others(session: nox.Session) -> None:
    """Delete the environments of all other sessions."""
    own = Path(session.virtualenv.location)
    for other in own.parent.iterdir():
        if other.is_dir() and other != own:
            shutil.rmtree(other)


def refuse(session: nox.Session, *modules: str) -> None:
    """Fail if one of the modules is installed: the session then proves less than it says."""
    check = f"import importlib.util as u; found = [m for m in {modules} if u.find_spec(m)]; assert not found, found"
    session.run("python", "-c", check, silent=True)


def suite(framework: str) -> list[str]:
    """The tests of one backend: contract and properties, which it must have, and all others that bear its name."""
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob(f"*/test_{framework}*.py")}
    required = {f"tests/{folder}/test_{framework}.py" for folder in ("contract", "properties")}
    if framework == "numpy":
        return [*sorted(found | required), "tests/packaging"]
    # the other tests of the packaging read the same files in every session
    return [*sorted(found | required), "tests/packaging/test_import.py", "tests/packaging/test_readme.py"]


def pytest(session: nox.Session, framework: str | None, *arguments: str) -> None:
    """Run tests and doctests; the framework is the one whose README examples are run. No test at all is a failure."""
    env = {"LNP_TEST_FRAMEWORK": framework} if framework else {}
    chosen = ("-m", "not thorough")  # -m among the options that are passed on replaces it
    session.run(
        "pytest",
        "-c",
        "pyproject.toml",
        "--doctest-modules",
        "--durations=12",
        *chosen,
        *arguments,
        *session.posargs,
        env=env,
    )


def show(session: nox.Session, *options: str) -> None:
    """Run the demo as its reader would, with the framework that is there, and look for its figure and its table."""
    folder = empty(Path(session.create_tmp()) / "demo")
    with session.chdir(folder):
        ran = session.run("lnp", "demo", *options, env={"MPLBACKEND": "Agg"})
    for pattern in ("*.png", "*.csv"):
        # nox --install-only runs nothing, and answers None.
        if ran is not None and not any(path.stat().st_size for path in folder.rglob(pattern)):
            session.error(f"lnp demo wrote no {pattern} under {folder}")


def empty(folder: Path) -> Path:
    """The folder, without what an earlier run left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
