"""HTML pages from the templates that are shipped."""

from __future__ import annotations

from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A page, with everything escaped that is not the template's own; a value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("storm_vlm"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)
