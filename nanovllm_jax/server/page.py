"""The chat page at `/`, with headers that let it run its own script and no other."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

PAGE = Path(__file__).with_name("page.html")


def page_response() -> Response:
    """The page as it is on disk."""
    text = PAGE.read_text(encoding="utf-8")
    return Response(text, media_type="text/html", headers=security_headers(text))


def security_headers(page: str) -> dict[str, str]:
    """Headers that allow a page's inline script and style by their hashes, and its own server.

    Nothing else is loaded, the page is in no frame, and the browser refuses to make HTML of a
    string, so that a model's answer cannot become code even by a mistake in the script.
    """
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of("script", page),
        "style-src": _hash_of("style", page),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # a new version of the server has a new page
    }


def _hash_of(tag: str, page: str) -> str:
    """The source expression of the page's one inline element with this tag (CSP level 2)."""
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
