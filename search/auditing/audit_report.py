"""What an audit found: evidence, verdict, and the folder with evidence.json, the card and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.threat import ThreatModel
from search import report
from search.auditing.words import CUMULATIVE, KNOWS, UNSEEN, failed, page, problems, rows, threat, verdict
from search.export.checks import checks, passed, sizes
from search.storage.atomic import folder_atomic, write_atomic
from search.templates import render
from spaces.exceptions import InputError

CARD = Path(__file__).parent / "templates" / "audit_card.md.j2"
PAGE = Path(report.__path__[0]) / "templates" / "audit.html.j2"
"""It lies beside the report of a search, whose style it includes."""


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. In a notebook it shows itself as text.

    Attributes:
        evidence: the fields of docs/audit.schema.json.
    """

    evidence: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """Two sentences: the figure, and whether it can be believed."""
        return verdict(self.evidence)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed, those that say most about the figure first."""
        return [one.name for one in failed(self.evidence)]

    def __str__(self) -> str:
        return page(self.evidence)

    def _repr_markdown_(self) -> str:
        return page(self.evidence)

    def write(self, folder: str | Path) -> Path:
        """Write evidence.json, card.md and report.html into a new folder: all of them, or none.

        Raises:
            InputError: the folder exists, or cannot be made.
        """
        folder = Path(folder)
        unused(folder)
        files = {
            "evidence.json": json.dumps(self.evidence, indent=1),
            "card.md": self._rendered(CARD),
            "report.html": self._rendered(PAGE),
        }
        try:
            with folder_atomic(folder) as temporary:
                for name, content in files.items():
                    write_atomic(temporary / name, content.encode())
        except FileExistsError:  # by another audit
            unused(folder)
        return folder

    def _rendered(self, template: Path) -> str:
        found, bound = checks(self.evidence["gates"]), ThreatModel(**self.evidence["threat"])
        return render(
            template,
            e=self.evidence,
            m=self.evidence["model"],
            verdict=self.verdict,
            threat=threat(self.evidence),
            bound=bound,
            knows=KNOWS[bound.knowledge],
            rows=list(rows(self.evidence)),
            failed=failed(self.evidence),
            problems=problems(self.evidence),
            checked=[area.removesuffix(" and images kept aside") for area in found["checked"]],  # an export's alone
            passed=passed(found),
            sizes=sizes(found),
            unseen=UNSEEN,
            cumulative=CUMULATIVE,
        )


def unused(folder: Path) -> None:
    """Raise an InputError if a folder cannot be made; it is asked before an audit takes its time."""
    if folder.exists():
        raise InputError(f"the folder of an audit must be new, but {folder} exists: choose another --out")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"the folder of an audit must lie in one that exists, but {folder.parent} does not")
