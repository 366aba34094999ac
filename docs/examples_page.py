"""A mkdocs hook that inserts a file into a page: an example's code, a notebook with its outputs, or Markdown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["content_of", "on_page_markdown"]

_ASKED = re.compile(r"<!-- content of (\S+) -->")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with its examples inserted; mkdocs calls this hook.

    Args:
        markdown: the page; a line ``<!-- content of PATH -->`` names a file, from the page's folder.
        page: the page's location.
        **_: other arguments of mkdocs.
    """
    folder = Path(page.file.abs_src_path).parent
    return _ASKED.sub(lambda found: content_of(folder / found[1]), markdown)


def content_of(path: Path) -> str:
    """Return a file as Markdown: a script's code, a notebook's text, code, and text and image outputs, or Markdown.

    Args:
        path: the script, notebook or page.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix != ".ipynb":
        return f"```python\n{text}```"
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}```")
            if "image/png" in output.get("data", {}):
                picture = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f"![output of the cell above](data:image/png;base64,{picture})")
    return "\n\n".join(parts)
