"""Hook of mkdocs: puts the code of an example, and the outputs that a notebook holds, where a page asks for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["content_of", "on_page_markdown"]

_ASKED = re.compile(r"<!-- content of (\S+) -->")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with the examples that it asks for; mkdocs calls this.

    Args:
        markdown: of the page; a line ``<!-- content of NAME -->`` names a script or a notebook beside it.
        page: where it lies.
        **_: what mkdocs knows besides.
    """
    folder = Path(page.file.abs_src_path).parent
    return _ASKED.sub(lambda found: content_of(folder / found[1]), markdown)


def content_of(path: Path) -> str:
    """Return an example in Markdown: a script's code; a notebook's text, code, and of its outputs text and pictures.

    Args:
        path: of the script or notebook.
    """
    text = path.read_text(encoding="utf-8")
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
