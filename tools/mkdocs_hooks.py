"""Lets the documentation show the benchmarks' pictures, which lie outside of docs/.

Pages name them as GitHub needs it (`../../benchmarks/results/x.png`); in the built site they lie beside the pages.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures to the site's files."""
    for picture in sorted(RESULTS.glob("*.png")):
        uri = f"benchmarks/results/{picture.name}"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point pages at the copies."""
    return markdown.replace("](../../benchmarks/results/", "](results/")
