"""What mkdocs does not do by itself: pages from outside docs/, and Markdown as repositories show it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = {"benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changelog.md"}
log = get_plugin_logger("site")
_CELL = re.compile(r"(?<=<td>).*?(?=</td>)|(?<=<code>)tests/[^<]*", re.DOTALL)  # names too long for a line
_FENCE = re.compile(r"^\s*(```|~~~)")
_ITEM = re.compile(r"^([-*+]|\d+\.) ")


def on_files(files: Any, config: Any) -> Any:
    """Files of the repository that are pages of the site."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_content(html: str, page: Any, **_: Any) -> str:
    for address in re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=.(https?://[^\"' >]+)", html):
        log.warning("%s would load %s when it is read", page.file.src_uri, address)
    return _CELL.sub(lambda cell: re.sub(r"(_|::|(?<!<)/)(?=\w)", r"\1<wbr>", cell[0]), html)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return _separate_lists(_relink(markdown, page.file))


def _relink(markdown: str, file: Any) -> str:
    """Links between docs/ and the rest of the repository, as links between pages."""
    outside = {page: source for source, page in OUTSIDE.items()}
    here = (ROOT / outside.get(file.src_uri, f"docs/{file.src_uri}")).parent
    depth = file.src_uri.count("/")

    def page_of(link: re.Match[str]) -> str:
        path = (here / link[2]).resolve()
        if path.is_relative_to(ROOT / "docs"):
            target = path.relative_to(ROOT / "docs").as_posix()
        else:
            target = OUTSIDE.get(path.relative_to(ROOT).as_posix(), "") if path.is_relative_to(ROOT) else ""
        return f"{link[1]}{'../' * depth}{target}" if target else link[0]

    return re.sub(r"(\]\()(?![a-z]+:|#)([^)#\s]+)", page_of, markdown)


def _separate_lists(markdown: str) -> str:
    """A blank line between a paragraph and a list, which Python-Markdown needs and others do not."""
    lines: list[str] = []
    fenced = listed = False
    for line in markdown.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        if not fenced and _ITEM.match(line) and lines and lines[-1].strip() and not listed:
            lines.append("")
        listed = bool(line.strip()) and (listed or bool(_ITEM.match(line)))
        lines.append(line)
    return "\n".join(lines)
