"""Let pages link to files of the repository: the site gets copies of these.

A link such as ../examples/detector.py works on the page in the repository and in the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)([\w./-]+)(#[\w-]+)?\)")


def copied(path: str) -> str:
    """Return the place of a file in the site. Markdown would become a page of it."""
    return f"files/{path}.txt" if path.endswith(".md") else f"files/{path}"


def on_files(files: Files, config: Any) -> Files:
    """Add each file to which a page links and which is not in docs."""
    linked = {
        path
        for page in files.documentation_pages()
        for _, path, _ in OUTSIDE.findall(Path(page.abs_src_path).read_text("utf-8"))
        if (ROOT / path).is_file()
    }
    for path in sorted(linked):
        files.append(File.generated(config, copied(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links to these copies."""
    up = "../" * page.file.src_uri.count("/")

    def lead(match: re.Match[str]) -> str:
        path = match[2]
        return f"]({up}{copied(path)})" if (ROOT / path).is_file() else match[0]

    return OUTSIDE.sub(lead, markdown)
