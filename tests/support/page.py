"""What an HTML parser makes of a report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """What an HTML parser makes of the page: its tags, its words, the data of its charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.json, self.inside = "", "", ""
        self.feed(text)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("type") or tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "application/json":
            self.json += data
        elif self.inside not in ("script", "style"):
            self.words += " " + data

    @property
    def data(self) -> Any:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.json, parse_constant=refuse)

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """The rows whose columns are in the data of the charts."""
        columns: dict[str, list[Any]] = self.data["candidates"]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
