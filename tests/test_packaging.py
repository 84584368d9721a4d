import ast
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dmoe_compile

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    name: [req for req in map(Requirement, lines) if req.name != "dmoe-compile"]  # the tests take the other extras
    for name, lines in PROJECT["optional-dependencies"].items()
}
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
SOURCES = {"dmoe_compile": "dmoe_compile", "passes": "dmoe_compile/passes", "kernels": "dmoe_compile/kernels"}
README_COMMANDS = [
    "pip install -c constraints.txt . && dmoe demo",
    "pip install -c constraints.txt -e '.[test]' && pytest",
]


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*SOURCES, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # setuptools is here already, torch needs it: the build is the real one, less the download.
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    env = os.environ | {"SETUPTOOLS_SCM_PRETEND_VERSION": "1.2.3"}  # as if v1.2.3 were the commit's tag
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, "-w", out, source], check=True, env=env)
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_sources_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert "dmoe_compile/py.typed" in files
    # An empty folder would be left out, and its name then looked up beside the package, where the real `kernels` is.
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in files}
    assert folders >= {*PYPROJECT["tool"]["setuptools"]["packages"]}


def test_wheel_says_what_it_is(wheel):
    info = "dmoe_compile-1.2.3.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "\nVersion: 1.2.3\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


# The installed package


@pytest.mark.parametrize("group", ["torch_dynamo_backends", "console_scripts"])
def test_entry_point_resolves(group):
    (entry,) = entry_points(group=group, name="dmoe")
    assert callable(entry.load())


def test_torch_lists_the_backend():
    assert "dmoe" in torch._dynamo.list_backends(exclude_tags=())


def test_installed_version_is_the_package_s_own():
    """It comes from a tag; without one, as in a checkout that has none, it is a development version."""
    assert distribution("dmoe-compile").version == dmoe_compile.__version__
    assert Version(dmoe_compile.__version__) >= Version("0.1.0.dev0")


def test_importing_the_package_does_not_import_torch():
    check = "import dmoe_compile, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", check]).returncode == 0


# The name `kernels`


@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_our_folders_are_not_top_level_packages(name):
    assert str(ROOT) not in sys.path
    spec = importlib.util.find_spec(name)  # None, or the package of that name that somebody installed
    assert spec is None or not any(Path(p).is_relative_to(ROOT) for p in spec.submodule_search_locations or ())


def test_nor_under_python_m_pytest():
    this = f"{__file__}::{test_our_folders_are_not_top_level_packages.__name__}"
    run = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", this]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# Dependencies


def _imports(folder: str) -> set[str]:
    """Every module that the sources in this folder import, anywhere in a file."""
    nodes = [node for path in (ROOT / folder).rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}


def test_every_package_we_import_is_declared():
    imported = {name.partition(".")[0] for folder in SOURCES for name in _imports(folder)}
    ours_or_torch_s = {"dmoe_compile", "triton"}  # CUDA builds of torch bring the one triton that fits them
    if_there = {"vllm"}  # which `dmoe bench gpu` then measures too
    found = map(canonicalize_name, imported - sys.stdlib_module_names - ours_or_torch_s - if_there)
    extras = [req for name, extra in EXTRAS.items() if name != "test" for req in extra]
    assert set(found) <= {canonicalize_name(req.name) for req in [*RUNTIME, *extras]}


@pytest.mark.parametrize(("folder", "below"), [("passes", ["passes", "kernels"]), ("kernels", ["kernels"])])
def test_imports_go_one_way(folder, below):
    ours = {name for name in _imports(folder) if name.partition(".")[0] == "dmoe_compile"}
    assert {name for name in ours if name.split(".")[1:2] not in [[allowed] for allowed in below]} == set()


def test_constraints_are_exact_sorted_and_say_a_thing_once():
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in PINS)
    assert sorted(set(PINS)) == PINS
    assert len({pin.partition("==")[0] for pin in PINS}) == len(PINS)


def test_whoever_walks_the_modules_comes_to_an_end():
    names = [each.name for each in pkgutil.walk_packages(dmoe_compile.__path__, "dmoe_compile.")]
    assert "dmoe_compile.backend" in names
    assert len(names) < 1000


def test_constraints_pin_whatever_the_project_installs_and_no_more():
    pins = dict(pin.split("==") for pin in PINS)
    needed = _closure([*RUNTIME, *(req for extra in EXTRAS.values() for req in extra)])
    assert needed == {name: pins.get(name) for name in needed}
    assert pins.keys() - needed.keys() <= {"triton"}  # CPU builds of torch do not bring it


def _closure(requirements: list[Requirement]) -> dict[str, str]:
    """The installed version of everything these ask for in this environment, and of what that asks for in turn."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(req, extra) for req in requirements for extra in ("", *req.extras)]
    while todo:
        req, extra = todo.pop()
        name = canonicalize_name(req.name)
        if (name, extra) in seen or name.startswith(("cuda-", "nvidia-")):  # torch's CUDA builds pin those themselves
            continue
        seen.add((name, extra))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
            continue
        versions[name] = Version(installed.version).public  # torch's is 2.13.0+cpu
        for line in installed.requires or []:
            needs = Requirement(line)
            if needs.marker is None or needs.marker.evaluate({"extra": extra}):
                todo += [(needs, wanted) for wanted in ("", *needs.extras)]
    return versions


# README


@pytest.mark.parametrize("command", README_COMMANDS)
def test_readme_has_each_command_once_in_a_bash_block(command):
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines()].count(command) == 1
    assert readme.count(command) == 1
