"""What mkdocs runs on every page: links to files outside docs/ go to the public repository, or become plain code."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrites `[text](../path)` where path is no page of the site."""
    repository = (config.get("repo_url") or "").rstrip("/")
    pages = {file.src_uri for file in files.documentation_pages()}

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        if path in pages:
            return match[0]
        return f"[{text}]({repository}/blob/main/{path}{anchor})" if repository else text

    return _OUTSIDE.sub(link, markdown)
