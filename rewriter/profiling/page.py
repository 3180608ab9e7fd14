"""One HTML page of a profile: everything inside the file, light and dark, readable on a phone.

Source     ours
Raises     UnsupportedError without jinja2 or matplotlib, with the command that installs them
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from kvsink.errors import UnsupportedError
from kvsink.profiling.figures import draw_figures

__all__ = ["render_page"]


def render_page(record: dict[str, Any], arrays: dict[str, Any]) -> str:
    """The page as text; opens without a network."""
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise UnsupportedError("the page needs jinja2; pip install 'kvsink[plot]', or pass --no-page for the JSON alone") from error
    text = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    figures = [
        (t, c, markupsafe.Markup(_scoped(a, f"l{i}")), markupsafe.Markup(_scoped(b, f"d{i}")))
        for i, (t, c, a, b) in enumerate(draw_figures(record, arrays))
    ]
    return str(env.from_string(text).render(r=record, figures=figures))


def _scoped(svg: str, prefix: str) -> str:
    """Names inside one SVG made its own, since the page holds many."""
    return svg.replace('id="', f'id="{prefix}-').replace('"#', f'"#{prefix}-').replace("url(#", f"url(#{prefix}-")
