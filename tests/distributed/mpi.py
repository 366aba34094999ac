"""An environment like this one, with a Horovod that has MPI."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.distributed.workers import ROOT, environment

needs_mpi = pytest.mark.skipif(
    shutil.which("mpicxx") is None or shutil.which("mpirun") is None,
    reason="no MPI on this machine: `apt-get install libopenmpi-dev openmpi-bin`",
)


def run(*command: str | Path, cwd: Path, timeout: float = 300) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install_with_mpi(folder: Path) -> Path:
    """Return the interpreter of an environment with all packages of this one but its Horovod, and with one for MPI."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    links = folder / "packages"
    links.mkdir()
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not package.name.startswith(("horovod", "pip", "__pycache__")):
            (links / package.name).symlink_to(package)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "packages.pth").write_text(f"{links}\n")
    interpreter = folder / "venv" / "bin" / "python"
    run(interpreter, "-m", "dcl_lightning.tools.install_horovod", "--mpi", "on", "--gpu", "cpu", cwd=ROOT, timeout=1500)
    return interpreter
