"""What MkDocs does beside rendering docs/: mathematics, and links to files elsewhere in the repository. See mkdocs.yml.

* Formulas become MathML, which browsers lay out themselves: no script, no font and no network on the reader's side.
* Pages are written for the repository, where links lead to any file. Those of OUTSIDE become a part of the site; a link
  to any other file keeps its text alone.
"""

from __future__ import annotations

import functools
import html
import posixpath
import re
from pathlib import Path

from math_core import LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/*.md", "benchmarks/plots/**/*.svg"),
    *("examples/*.py", "examples/*.ipynb", "examples/launch/*"),
)
FENCED = re.compile(r"^([ ]*)(```+|~~~+).*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s:]+?)(?P<anchor>#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
TO_MATHML = LatexToMathML()  # raises for a command that it does not know
CELL_CODE = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in outside():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


@functools.cache
def outside() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in OUTSIDE for path in ROOT.glob(pattern))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    kept = iter([match.group() for match in FENCED.finditer(markdown)])
    placed = LINK.sub(lambda match: link_in_site(match, page.file.src_uri, files), FENCED.sub("\0", markdown))
    return re.sub("\0", lambda _: next(kept), placed)


def link_in_site(match: re.Match[str], page: str, files: Files) -> str:
    """A link of the repository as the site has it: docs/ is the site's root."""
    in_repository = page if page in outside() else f"docs/{page}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), match["target"]))
    in_site = target.removeprefix("docs/")
    if target.startswith("docs/") or files.get_file_from_path(in_site) is not None:
        relative = posixpath.relpath(in_site, posixpath.dirname(page) or ".")
        return f"{match['image']}[{match['text']}]({relative}{match['anchor'] or ''})"
    return match["text"] if (ROOT / target).exists() else match.group()


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    content = FORMULA.sub(lambda match: mathml(match[2], block=match[1] == "div"), content)
    # In a table GitHub wants \| for a bar, in code too; Python-Markdown keeps the backslash there.
    return CELL_CODE.sub(lambda match: match.group().replace(r"\|", "|"), content)


def mathml(formula: str, *, block: bool) -> str:
    element = TO_MATHML.convert_with_local_state(html.unescape(formula).strip(), displaystyle=block)
    return f'<div class="formula">{element}</div>' if block else element
