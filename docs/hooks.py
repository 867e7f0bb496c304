"""MkDocs hooks: the READMEs of the experiments become pages of the site, and links between the repository's files keep working.

The Markdown files use links that work in the repository. On the site, a link to a file that is not a page points to the
repository (`repo_url` in mkdocs.yml); without `repo_url` only the text of the link remains.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# The text of a link and its target, if the target is a relative path.
LINK = re.compile(r"(?<!`)(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README and the pictures of every experiment."""
    for path in sorted([*ROOT.glob("experiments/*/README.md"), *ROOT.glob("experiments/*/*.png")]):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point relative links to the pages of the site, or to the repository."""
    source = page.file.src_uri
    folder = os.path.dirname(source if source.startswith("experiments/") else f"docs/{source}")

    def target_on_site(match: re.Match) -> str:
        picture, text, target, anchor = match.groups(default="")
        in_repository = os.path.normpath(os.path.join(folder, target))
        uri = in_repository.removeprefix("docs/")
        if files.get_file_from_path(uri):
            return f"{picture}[{text}]({os.path.relpath(uri, os.path.dirname(source) or '.')}{anchor})"
        return f"[{text}]({config.repo_url}/blob/HEAD/{in_repository})" if config.repo_url else text

    return LINK.sub(target_on_site, markdown)
