"""Print which installed packages differ from constraints.txt: ``python .ci/versions.py [FILE]``."""

import importlib.metadata
import sys
from pathlib import Path


def installed(name: str) -> str:
    """Return the installed version of a package, or that it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Print one line for each difference, in the order of the file."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "constraints.txt")
    pins = [line.split("==") for line in path.read_text(encoding="utf-8").split()]
    changed = [f"  {name}: {pin} -> {found}" for name, pin in pins if (found := installed(name).split("+")[0]) != pin]
    print(f"Versions that differ from {path.name}:", *changed or ["  none"], sep="\n", flush=True)


if __name__ == "__main__":
    main()
