"""Print which installed packages differ from constraints.txt: ``python .ci/versions.py``."""

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement


def main() -> None:
    """Print one line for each difference, in the order of the file; packages that are not installed are left out."""
    lines = (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {package.name.lower().replace("_", "-"): package.version for package in importlib.metadata.distributions()}
    print("Installed versions that differ from constraints.txt:")
    for pin in map(Requirement, lines):
        version = found.get(pin.name.lower().replace("_", "-"))
        if version is not None and (pin.marker is None or pin.marker.evaluate()) and version not in pin.specifier:
            print(f"  {pin.name}: {str(pin.specifier).removeprefix('==')} -> {version}")


if __name__ == "__main__":
    main()
