"""What mkdocs does not do by itself: pages from outside docs/, Markdown as repositories show it, formulas as MathML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = {"benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changelog.md"}
log = get_plugin_logger("site")
_CELL = re.compile(r"(?<=<td>).*?(?=</td>)|(?<=<code>)tests/[^<]*", re.DOTALL)  # where names are too long for a line
_JOINT = re.compile(r"(<[^>]*>)|(_|::|/)(?=\w)")  # tags, and where a name may break
_LINK = re.compile(r"(?P<image>!?)\[(?P<words>[^\]]*)\]\((?![a-z]+:|#)(?P<path>[^)#\s]+)(?P<anchor>[^)\s]*)\)")
_FENCE = re.compile(r"^\s*(```|~~~)")
_FORMULA = re.compile(r"^```math\n(?P<block>.*?)^```$|\$`(?P<inline>[^`]+)`\$", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r"(<p>)?xxmath(?P<number>\d+)xx(?(1)</p>)")
_ITEM = re.compile(r"^([-*+]|\d+\.) ")


def on_files(files: Any, config: Any) -> Any:
    """Files of the repository that are pages of the site."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    page.formulas = []

    def aside(found: re.Match[str]) -> str:
        """Markdown must not read MathML: a word stands for it until the page is HTML."""
        source, display = (found["inline"], "inline") if found["inline"] else (found["block"], "block")
        page.formulas.append(latex2mathml.converter.convert(source, display=display))
        return f"xxmath{len(page.formulas) - 1}xx"

    return _FORMULA.sub(aside, _separate_lists(_relink(markdown, page.file)))


def on_page_content(html: str, page: Any, **_: Any) -> str:
    return _PLACE.sub(lambda place: page.formulas[int(place["number"])], html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    for address in re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=.(https?://[^\"' >]+)", output):
        log.warning("%s would load %s when it is read", page.file.src_uri, address)
    return _CELL.sub(lambda cell: _JOINT.sub(lambda found: found[1] or f"{found[2]}<wbr>", cell[0]), output)


def _relink(markdown: str, file: Any) -> str:
    """Links between docs/ and the rest of the repository: between pages, or the words alone where there is no page."""
    outside = {page: source for source, page in OUTSIDE.items()}
    here = (ROOT / outside.get(file.src_uri, f"docs/{file.src_uri}")).parent
    up = "../" * file.src_uri.count("/")

    def changed(link: re.Match[str]) -> str:
        path = (here / link["path"]).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            return link[0]  # mkdocs says what is wrong
        source = path.relative_to(ROOT).as_posix()
        page = OUTSIDE.get(source) or (source.removeprefix("docs/") if source.startswith("docs/") else "")
        if page:
            return f"{link['image']}[{link['words']}]({up}{page}{link['anchor']})"
        return link[0] if link["image"] else link["words"]

    return _LINK.sub(changed, markdown)


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
