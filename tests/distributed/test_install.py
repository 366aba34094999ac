"""The install command up to the build; no compiler is started here."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dcl_lightning.tools import install_horovod as install
from dcl_lightning.tools.install_horovod import Build, InstallError, build_variables, missing_tools, modernize, toolkit

BUILD = Build("2.14.1+cu130", "cp311", "x86_64", "cpu", False)


def program(folder: Path, name: str, text: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def cuda(home: Path) -> Path:
    program(home / "bin", "nvcc")
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    return home


def horovod_source(folder: Path) -> Path:
    (folder / "horovod" / "torch").mkdir(parents=True)
    (folder / "cmake" / "Modules").mkdir(parents=True)
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        (folder / name).write_text("project(horovod)\nset(CMAKE_CXX_STANDARD 14)\nset(CMAKE_CXX_EXTENSIONS OFF)\n")
    (folder / "cmake/Modules/FindPytorch.cmake").write_text(
        'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\nif (Pytorch_CUDA OR Pytorch_ROCM)\nendif()\n'
    )
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "2.14.1+cpu"},
        {"python": "cp312"},
        {"machine": "aarch64"},
        {"gpu": "cuda"},
        {"mpi": True},
        {"horovod": "0.28.2"},
    ],
)
def test_whatever_changes_the_build_changes_the_key(change):
    assert replace(BUILD, **change).key != BUILD.key


def test_the_key_is_stable_and_names_a_folder():
    assert BUILD.key == replace(BUILD).key
    assert BUILD.key.startswith("0.28.1-cp311-torch2.14.1+cu130-cpu-")
    assert os.sep not in BUILD.key


@pytest.mark.parametrize("gpu", ["cpu", "cuda"])
def test_build_files_ask_for_cxx20_and_only_a_cuda_build_looks_for_cuda(tmp_path, gpu):
    source = horovod_source(tmp_path)
    modernize(source, gpu)
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        assert (source / name).read_text() == (
            "project(horovod)\nset(CMAKE_CXX_STANDARD 20)\nset(CMAKE_CXX_EXTENSIONS OFF)\n"
        )
    find = (source / "cmake/Modules/FindPytorch.cmake").read_text()
    assert ("set(Pytorch_CUDA FALSE)" in find) == (gpu == "cpu")
    assert "if (Pytorch_CUDA OR Pytorch_ROCM)" in find


@pytest.mark.parametrize("name", ["CMakeLists.txt", "horovod/torch/CMakeLists.txt", "cmake/Modules/FindPytorch.cmake"])
def test_unexpected_build_files_are_an_error_not_a_silent_miss(tmp_path, name):
    source = horovod_source(tmp_path)
    (source / name).write_text("")
    with pytest.raises(InstallError, match=Path(name).name):
        modernize(source, "cpu")


def test_each_missing_program_is_named_with_the_way_to_get_it(tmp_path):
    text = "; ".join(missing_tools("cpu", str(tmp_path)))
    for expected in ("apt-get install g++", "pip install cmake", "apt-get install make"):
        assert expected in text
    assert "CUDA" not in text
    assert "--gpu cpu" in "; ".join(missing_tools("cuda", str(tmp_path)))


@pytest.mark.parametrize(("version", "complains"), [("3.10.2", True), ("3.13.0", False), ("4.1.0", False)])
def test_an_old_cmake_is_as_good_as_none(tmp_path, version, complains):
    program(tmp_path, "cmake", f"echo cmake version {version}")
    assert any("3.13" in text for text in missing_tools("cpu", str(tmp_path))) == complains


def test_a_script_called_nvcc_is_no_toolkit(tmp_path):
    program(tmp_path / "bin", "nvcc", "exec elsewhere/nvcc")
    assert toolkit(str(tmp_path / "bin")) is None
    home = cuda(tmp_path / "cuda-13")
    assert toolkit(str(home / "bin")) == home
    assert any("CUDA" in text for text in missing_tools("cuda", str(tmp_path / "bin")))
    assert not any("CUDA" in text for text in missing_tools("cuda", str(home / "bin")))


def test_the_variables_of_a_cpu_build(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-O2")
    variables = build_variables(BUILD, None)
    assert variables["CXXFLAGS"].startswith("-O2 -include string ")
    assert variables["HOROVOD_WITHOUT_MPI"] == variables["HOROVOD_WITH_GLOO"] == "1"
    assert variables["CMAKE_POLICY_VERSION_MINIMUM"] == "3.5"
    assert "HOROVOD_GPU_OPERATIONS" not in variables
    assert "HOROVOD_WITH_MPI" in build_variables(replace(BUILD, mpi=True), None)


def test_the_variables_of_a_cuda_build_name_the_toolkit_twice(tmp_path, monkeypatch):
    home = cuda(tmp_path / "cuda-13")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.delenv("HOROVOD_CUDA_HOME", raising=False)
    monkeypatch.delenv("HOROVOD_NCCL_HOME", raising=False)
    variables = build_variables(replace(BUILD, gpu="cuda"), tmp_path / "nccl")
    assert variables["CUDA_HOME"] == variables["HOROVOD_CUDA_HOME"] == str(home)
    assert variables["HOROVOD_NCCL_HOME"] == str(tmp_path / "nccl")
    assert variables["PATH"].startswith(str(home / "bin"))


def test_a_stamp_counts_only_with_the_horovod_it_speaks_of(tmp_path, monkeypatch):
    stamp = tmp_path / "horovod" / "horovod_build.json"
    (stamp.parent / "torch").mkdir(parents=True)
    monkeypatch.setattr(install.importlib.metadata, "version", lambda name: "0.28.1")
    assert not install._is_installed(BUILD, stamp)
    (tmp_path / "horovod-0.28.1.dist-info").mkdir()
    install._write_stamp(BUILD, stamp)
    # As pip leaves it behind where it does not know of the stamp: a folder with nothing else in it.
    assert not install._is_installed(BUILD, stamp)
    (stamp.parent / "torch" / "mpi_lib_v2.cpython-311.so").touch()
    assert install._is_installed(BUILD, stamp)
    assert not install._is_installed(replace(BUILD, torch="2.15.0"), stamp)
    assert (tmp_path / "horovod-0.28.1.dist-info" / "RECORD").read_text() == "horovod/horovod_build.json,,\n"
    assert json.loads(stamp.read_text())["torch"] == "2.14.1+cu130"


def test_a_missing_tool_ends_with_code_1_and_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install, "_plan", lambda gpu, mpi: BUILD)
    monkeypatch.setattr(install, "_is_installed", lambda build, stamp: False)
    monkeypatch.setattr(install, "missing_tools", lambda gpu: ["make: `apt-get install make`"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert install.main([]) == 1
    assert "apt-get install make" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_itself_starts_with_the_standard_library_only():
    tree = ast.parse(Path(install.__file__).read_text())
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert names
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_no_compiler_outlives_a_stopped_build(sig: signal.Signals, tmp_path: Path) -> None:
    """The command stands for pip, and its child for a compiler."""
    code = (
        "import os, signal, sys\n"
        "from dcl_lightning.tools import install_horovod as install\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "install._run_in_group(['sh', '-c', 'sleep 600 & echo $!; wait'], dict(os.environ), open(sys.argv[1], 'w'))\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (out.exists() and out.read_text().strip()):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(sig)
    assert process.wait(timeout=30) != 0
    compiler = Path("/proc") / out.read_text().strip()
    while compiler.exists() and "\nState:\tZ" not in (compiler / "status").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
