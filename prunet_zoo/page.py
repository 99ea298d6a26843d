"""Self-contained HTML pages with pictures and tables, as every report of this package is written."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_png(fig: Figure) -> bytes:
    """PNG bytes of a figure, which is closed."""
    import matplotlib.pyplot as plt  # takes a while to import

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110)
    plt.close(fig)
    return buffer.getvalue()


def html_page(title: str, body: str) -> str:
    """A self-contained page with a heading."""
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title><style>"
        "body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1000px;color:#222}"
        "table{border-collapse:collapse;margin:.6em 0}"
        "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
        f"img{{max-width:100%}}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def html_picture(png: bytes) -> str:
    """A picture inside of the page."""
    return f'<p><img alt="figure" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def html_table(head: list[str], rows: list[list[Any]]) -> str:
    """A table of texts; an empty head is left out."""

    def line(cells: list[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + (line(head, "th") if any(head) else "") + "".join(line(r, "td") for r in rows) + "</table>"
