"""Builds Horovod 0.28.1, its last release, into the current environment, against the installed PyTorch.

Run ``python -m dcl_lightning.tools.install_horovod``. Horovod asks for C++14, but today's PyTorch needs C++17 or later,
so two lines of Horovod's build files are changed. The wheel is kept in the user's cache.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

__all__ = ["Build", "main", "missing_tools", "modernize"]

VERSION = "0.28.1"
_BUILD_PACKAGES = {name: name for name in ("setuptools", "wheel", "packaging", "cffi", "cloudpickle", "psutil")} | {
    "yaml": "pyyaml"
}
_STAMP = "horovod_build.json"
_OLDEST_CMAKE = (3, 13)
_CHECK_S = 180.0
_HEADERS = ("string", "cstdint", "functional", "memory", "stdexcept")


class InstallError(RuntimeError):
    """Horovod cannot be built or does not work; the message says what to do."""


@dataclass(frozen=True)
class Build:
    """Everything that a build depends on.

    Args:
        torch: version of PyTorch with its local part, such as 2.14.1+cu130.
        python: version of Python, such as cp311.
        machine: processor, such as x86_64.
        gpu: ``cpu`` or ``cuda``.
        mpi: whether MPI is built in addition to Gloo.
        horovod: version of Horovod.
    """

    torch: str
    python: str
    machine: str
    gpu: str
    mpi: bool
    horovod: str = VERSION

    @property
    def key(self) -> str:
        """Name of the build in the cache."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.horovod}-{self.python}-torch{self.torch}-{self.gpu}-{digest}"


def missing_tools(gpu: str, path: str | None = None) -> list[str]:
    """Return, in words, what a build needs that is not installed, and how to get it.

    Args:
        gpu: ``cpu`` or ``cuda``.
        path: where to look for programs; the PATH if None.
    """
    wanted = {
        "g++": "a C++ compiler (g++): `apt-get install g++`",
        "cmake": "CMake: `apt-get install cmake`, or `pip install cmake`",
        "make": "make: `apt-get install make`",
    }
    programs = _search_path() if path is None else path
    missing = [text for program, text in wanted.items() if shutil.which(program, path=programs) is None]
    cmake = shutil.which("cmake", path=programs)
    if cmake is not None and _cmake_version(cmake) < _OLDEST_CMAKE:
        missing.append(f"CMake 3.13 or newer ({cmake} is older): `pip install cmake`")
    if gpu == "cuda" and toolkit(path) is None:
        missing.append("NVIDIA's CUDA toolkit of PyTorch's CUDA version (or set CUDA_HOME); or build with --gpu cpu")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python's headers: `apt-get install python3-dev`")
    return missing


def toolkit(path: str | None = None) -> Path | None:
    """Return the folder of the CUDA toolkit, or None.

    A folder counts only if it has CUDA's headers, because an ``nvcc`` on the PATH may be a script that calls another.

    Args:
        path: where to look for ``nvcc``; if None, the PATH, the variables for CUDA's folder, and ``/usr/local/cuda``.
    """
    nvcc = shutil.which("nvcc", path=path)
    homes = [Path(nvcc).resolve().parent.parent] if nvcc is not None else []
    if path is None:
        given = [Path(os.environ[name]) for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME") if os.environ.get(name)]
        homes = [*given, *homes, Path("/usr/local/cuda")]
    for home in homes:
        headers = (home / "include", *home.glob("targets/*/include"))
        if (home / "bin" / "nvcc").exists() and any((folder / "cuda_runtime.h").exists() for folder in headers):
            return home.resolve()
    return None


def _search_path() -> str:
    """Return the PATH with this environment's programs first, such as a ``cmake`` from pip."""
    return os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))


def _cmake_version(cmake: str) -> tuple[int, int]:
    text = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def modernize(source: Path, gpu: str) -> None:
    """Change Horovod's build files to C++20, and for a CPU build make them ignore CUDA."""
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        file = source / name
        text, count = re.subn(r"set\(CMAKE_CXX_STANDARD 1\d\)", "set(CMAKE_CXX_STANDARD 20)", file.read_text())
        if not count:
            raise InstallError(f"{name} of Horovod {VERSION} is not as expected: no C++ standard in it")
        file.write_text(text)
    if gpu == "cpu":
        file = source / "cmake/Modules/FindPytorch.cmake"
        old = 'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)'
        text = file.read_text()
        if old not in text:
            raise InstallError("FindPytorch.cmake of Horovod is not as expected: no Pytorch_CUDA in it")
        file.write_text(text.replace(old, "set(Pytorch_CUDA FALSE)"))


def build_variables(build: Build, nccl: Path | None) -> dict[str, str]:
    """Return the environment variables that steer Horovod's build."""
    variables = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI" if build.mpi else "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        # CMake 4 refuses the old minimum version of third-party parts.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",
        # Horovod relies on headers that GCC 13 and later no longer include indirectly.
        "CXXFLAGS": " ".join([*os.environ.get("CXXFLAGS", "").split(), *(f"-include {h}" for h in _HEADERS)]),
        "PATH": _search_path(),
    }
    if build.gpu == "cuda":
        home = toolkit()
        assert home is not None  # or missing_tools() would have reported it
        variables |= {
            "CUDA_HOME": str(home),
            "HOROVOD_CUDA_HOME": str(home),
            "PATH": os.pathsep.join((str(home / "bin"), variables["PATH"])),
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_BUILD_CUDA_CC_LIST": os.environ.get("HOROVOD_BUILD_CUDA_CC_LIST", "80,90"),
            "HOROVOD_NCCL_LINK": "SHARED",
        }
        if nccl is not None and not os.environ.get("HOROVOD_NCCL_HOME"):
            variables["HOROVOD_NCCL_HOME"] = str(nccl)
    return variables


def main(args: list[str] | None = None) -> int:
    """Build, install and check Horovod; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dcl_lightning.tools.install_horovod", description=__doc__)
    parser.add_argument("--gpu", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if a GPU is visible")
    parser.add_argument("--mpi", choices=("auto", "on", "off"), default="auto", help="auto: on if mpicxx is installed")
    parser.add_argument("--force", action="store_true", help="rebuild even if a wheel is in the cache")
    parser.add_argument("--check-only", action="store_true", help="only run the check on two workers")
    options = parser.parse_args(args)
    if args is None:  # a process of its own, which leaves nothing behind when it is stopped
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if options.check_only:
            _check()
        else:
            _install_and_check(_plan(options.gpu, options.mpi), options.force)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("Horovod works: allreduce and alltoall on two workers are right")
    return 0


def _plan(gpu: str, mpi: str) -> Build:
    if platform.system() != "Linux":
        raise InstallError("Horovod is for Linux; everything but strategy=horovod works without it")
    if importlib.util.find_spec("torch") is None:
        raise InstallError("PyTorch is not installed: install it first, because Horovod is built against it")
    import torch

    if gpu == "auto":
        gpu = "cuda" if torch.version.cuda and torch.cuda.is_available() and toolkit() else "cpu"
    if mpi == "on" and shutil.which("mpicxx") is None:
        raise InstallError("--mpi on needs an MPI with its compiler: `apt-get install libopenmpi-dev openmpi-bin`")
    with_mpi = mpi == "on" or (mpi == "auto" and shutil.which("mpicxx") is not None)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return Build(torch.__version__, python, platform.machine(), gpu, with_mpi)


def _install_and_check(build: Build, force: bool) -> None:
    stamp = Path(sysconfig.get_paths()["purelib"]) / "horovod" / _STAMP
    if not force and _is_installed(build, stamp):
        try:
            _check()
        except InstallError as error:
            stamp.unlink()
            raise InstallError(f"{error}\nIt stays installed; the next run of this command reinstalls it") from None
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = base / "dcl_lightning" / "horovod" / build.key
    wheels = list(cache.glob("horovod-*.whl"))
    wheel = wheels[0] if wheels and not force else _build_wheel(build, cache)
    # A stamp that pip left behind would describe a Horovod that is gone.
    stamp.unlink(missing_ok=True)
    _pip("install", "--no-deps", "--force-reinstall", str(wheel))
    _pip("install", "cloudpickle", "psutil", "pyyaml", "packaging", "cffi")
    importlib.invalidate_caches()
    try:
        _check()
    except InstallError as error:
        _pip("uninstall", "-y", "horovod")
        raise InstallError(f"{error}\nHorovod was removed again; --force rebuilds it") from None
    _write_stamp(build, stamp)


def _is_installed(build: Build, stamp: Path) -> bool:
    try:
        if importlib.metadata.version("horovod") != build.horovod or json.loads(stamp.read_text()) != asdict(build):
            return False
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return False
    return any(stamp.parent.glob("torch/mpi_lib_v2*.so"))


def _write_stamp(build: Build, stamp: Path) -> None:
    """Write the build into Horovod's folder, and list that file in RECORD so that pip removes it with the rest."""
    stamp.write_text(json.dumps(asdict(build)))
    record = stamp.parent.parent / f"horovod-{build.horovod}.dist-info" / "RECORD"
    with record.open("a") as lines:
        lines.write(f"horovod/{_STAMP},,\n")


def _build_wheel(build: Build, cache: Path) -> Path:
    missing = missing_tools(build.gpu)
    if missing:
        raise InstallError("building Horovod needs: " + "; ".join(missing))
    absent = [name for module, name in _BUILD_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if absent:
        _pip("install", *absent)
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / "build.log"
    print(f"building Horovod {VERSION} for PyTorch {build.torch} ({build.gpu}, MPI {'on' if build.mpi else 'off'}): ")
    print(f"about five minutes on two cores; log: {log}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _pip("download", "--no-deps", "--no-binary", ":all:", "-d", folder, f"horovod=={VERSION}")
        with tarfile.open(next(work.glob("horovod-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = work / f"horovod-{VERSION}"
        modernize(source, build.gpu)
        nccl = _nccl_folder(work) if build.gpu == "cuda" else None
        variables = {**os.environ, **build_variables(build, nccl)}
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, str(source)]
        with log.open("w") as output:
            code = _run_in_group(command, variables, output)
        if code:
            lines = log.read_text().splitlines()
            # The log ends with setuptools' traceback; the cause is further up.
            causes = [line for line in lines if re.search(r"\berror: |CMake Error", line)][:5]
            print(*causes, "...", *lines[-20:], sep="\n", file=sys.stderr)
            raise InstallError(f"Horovod could not be built; nothing was installed; see {log}")
        wheel = next(work.glob("horovod-*.whl"))
        # Renamed when complete, because another process may look for it.
        partial = cache / f".{os.getpid()}.part"
        shutil.copyfile(wheel, partial)
        return partial.replace(cache / wheel.name)


def _run_in_group(command: list[str], env: dict[str, str], output: TextIO) -> int:
    """Return the code with which a command ends; its compilers end with this process, unless that is killed."""
    with subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _nccl_folder(work: Path) -> Path | None:
    """Return a folder with links to PyTorch's NCCL, whose library lacks the name that the linker looks for."""
    spec = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nccl")
    if spec is None or not spec.submodule_search_locations:
        return None
    home = Path(next(iter(spec.submodule_search_locations)))
    folder = work / "nccl"
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(home / "include")
    for name in ("libnccl.so", "libnccl.so.2"):
        (folder / "lib" / name).symlink_to(home / "lib" / "libnccl.so.2")
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", arguments[0], "-q", *arguments[1:]]
    if subprocess.run(command).returncode:
        raise InstallError(f"`pip {' '.join(arguments)}` failed, see above")


_SELF_CHECK = """
import sys, torch, horovod.torch as hvd
hvd.init()
k = hvd.rank()
total = hvd.allreduce(torch.tensor([1.0 + k]), op=hvd.Sum, name="check.sum")
rows, counts = hvd.alltoall(torch.arange(3.0) + 10 * k, splits=[1, 2], name="check.rows")
right = [[0.0, 10.0], [1.0, 2.0, 11.0, 12.0]][k]
sys.exit(0 if total.item() == 3.0 and rows.tolist() == right else 3)
"""


def _check() -> None:
    """Run an allreduce and an alltoall on two workers."""
    try:
        importlib.import_module("horovod.runner.http.http_server")
    except ImportError as error:
        raise InstallError(
            f"Horovod is not installed ({error}): run `python -m dcl_lightning.tools.install_horovod`"
        ) from None

    from dcl_lightning.distributed.horovod.rendezvous import started_workers

    def start(rank: int, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        env = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "120", **os.environ, **variables}
        command = [sys.executable, "-c", _SELF_CHECK]
        return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)

    # Written to a file, because a pipe's content is lost when a worker is killed.
    with tempfile.TemporaryFile("w+") as output:
        late = ""
        with started_workers(2, 1, start) as workers:
            end = time.monotonic() + _CHECK_S
            try:
                for worker in workers:
                    worker.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = f": no answer within {_CHECK_S:.0f} s"
        output.seek(0)
        text = output.read()[-2000:]
    if any(worker.returncode for worker in workers):
        raise InstallError(f"the check on two workers failed{late}\n{text}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
