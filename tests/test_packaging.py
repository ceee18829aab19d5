"""What a person gets who installs the package."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ast_dist", "data_prep")
OTHER_VERSION = "9.8.7"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, in which nothing but `__version__` was changed."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, sources)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, sources / package, ignore=shutil.ignore_patterns("__pycache__"))
    init = sources / "ast_dist" / "__init__.py"
    init.write_text(re.sub(r'^__version__ = ".*"$', f'__version__ = "{OTHER_VERSION}"', init.read_text(), flags=re.M))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(sources)], check=True, capture_output=True)
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def about(unpacked: Path) -> Message:
    return message_from_string((unpacked / f"ast_dist-{OTHER_VERSION}.dist-info" / "METADATA").read_text())


def run_unpacked(unpacked: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=unpacked, check=True, capture_output=True, text=True
    ).stdout


def test_the_version_comes_from_one_place(wheel, unpacked, about):
    assert wheel.name == f"ast_dist-{OTHER_VERSION}-py3-none-any.whl"
    assert about["Version"] == OTHER_VERSION
    assert run_unpacked(unpacked, "-m", "ast_dist", "--version") == f"ast-dist {OTHER_VERSION}\n"


def test_the_wheel_holds_both_packages_with_presets_and_types_and_nothing_else(unpacked):
    inside = {
        str(path.relative_to(unpacked))
        for path in unpacked.rglob("*")
        if path.is_file() and ".dist-info" not in str(path) and "__pycache__" not in str(path)
    }
    sources = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in str(path)
    }
    assert inside == sources
    assert {"ast_dist/presets/digits.yaml", "ast_dist/py.typed", "data_prep/py.typed"} <= inside


def test_presets_are_found_in_the_installed_package(unpacked):
    program = "import ast_dist.command_line as c; print(c.__file__); print(*c.preset_names())"
    file, names = run_unpacked(unpacked, "-c", program).splitlines()
    assert Path(file).is_relative_to(unpacked)
    assert names.split() == sorted(path.stem for path in (ROOT / "ast_dist" / "presets").glob("*.yaml"))


def test_the_entry_point_is_the_cli(unpacked):
    entry_points = configparser.ConfigParser()
    entry_points.read(unpacked / f"ast_dist-{OTHER_VERSION}.dist-info" / "entry_points.txt")
    (value,) = entry_points["console_scripts"].values()
    entry_point = metadata.EntryPoint("ast-dist", value, "console_scripts")
    assert entry_point.load()(["--version"]) == 0


def test_metadata_names_licence_python_and_readme(about, unpacked):
    assert about["Name"] == "ast-dist"
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert about.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    licence = unpacked / f"ast_dist-{OTHER_VERSION}.dist-info" / "licenses" / "LICENSE"
    assert licence.read_text() == (ROOT / "LICENSE").read_text()


def test_every_library_that_is_imported_is_declared(about):
    distribution_of = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "sklearn": "scikit-learn",
        "nvidia": "nvidia-dali-cuda130",
        "pynvml": "nvidia-ml-py",
    }
    declared = {re.split(r"[ ><=;\[]", requirement)[0].lower() for requirement in about.get_all("Requires-Dist")}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{file}: relative import"
                    names = [node.module]
                for name in (name.split(".")[0] for name in names):
                    if name not in sys.stdlib_module_names and name not in PACKAGES:
                        assert distribution_of.get(name, name) in declared, f"{file}: {name} is not declared"
