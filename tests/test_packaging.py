"""What the containers and the conda environment name is there; none of them is built here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dcl_lightning import __version__

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "packaging").iterdir())
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_extras_files_and_modules_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    (extras,) = set(re.findall(r"\.\[([\w,]+)\]", text))
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE), extra
    assert (ROOT / "constraints.txt").is_file()
    assert "constraints.txt" in text
    for module in set(re.findall(r"python -m (dcl_lightning\S+)", text)):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for path in set(re.findall(r"(?:packaging|configs)/[\w./]+", text)):
        assert (ROOT / path).is_file(), path


def test_the_container_files_install_the_same() -> None:
    def commands(file: str) -> list[str]:
        text = (ROOT / "packaging" / file).read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [line.removeprefix("RUN").strip() for line in text.splitlines() if not line.startswith("#")]
        return [
            " ".join(sorted(c.split())) for line in lines for c in line.split("&&") if re.search("pip |apt-|-m ", c)
        ]

    docker, apptainer = commands("Dockerfile"), commands("dcl_lightning.def")
    assert docker
    assert [command for command in apptainer if "import" not in command] == docker


def test_the_environment_is_one_of_a_python_that_the_project_takes() -> None:
    environment = yaml.safe_load((ROOT / "packaging" / "environment.yml").read_text(encoding="utf-8"))
    (python,) = [str(part) for part in environment["dependencies"] if str(part).startswith("python ")]
    assert int(python.rpartition(".")[2]) in range(10, 14)


def test_one_version() -> None:
    assert f'version = "{__version__}"' in PROJECT
    for file in ("CITATION.cff", "CHANGELOG.md", "dcl_lightning/report/references.bib"):
        assert re.search(rf"(version: |## |Version ){re.escape(__version__)}\b", (ROOT / file).read_text("utf-8")), file
