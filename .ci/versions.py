"""Print which installed packages differ from constraints.txt: ``python .ci/versions.py``."""

import importlib.metadata
from pathlib import Path


def main() -> None:
    """Print one line for each difference, in the order of the file; packages that are not installed are left out."""
    lines = (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8").split()
    found = {package.name.lower().replace("_", "-"): package.version for package in importlib.metadata.distributions()}
    print("Installed versions that differ from constraints.txt:")
    for name, pinned in (line.split("==") for line in lines):
        version = found.get(name.lower().replace("_", "-"), pinned)
        if version.partition("+")[0] != pinned:
            print(f"  {name}: {pinned} -> {version}")


if __name__ == "__main__":
    main()
