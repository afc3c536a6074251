"""Shows a search live in optuna-dashboard, read-only.

A second writer would corrupt the journal of a running search, so the web server and the storage both reject writes. The
storage adds what the dashboard cannot know: the threat model, the constraints, which trials are candidates, and the
Pareto front.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
import webbrowser
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from tempfile import TemporaryDirectory
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import optuna_dashboard._app  # type: ignore[import-untyped]
from optuna.storages import JournalStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from search.console import terminable
from search.exceptions import StorageError
from search.formatting import spoken_threat
from search.optimizer.history import REMEASURED, UNDEFENDED, SearchHistory, journal_path
from search.optimizer.journal import Journal
from search.study.candidate import Candidate, Latency, quieter
from search.study.ranking import front
from search.study.study import Study
from search.study.sync import JOURNAL
from spaces.exceptions import InputError

HOST = "127.0.0.1"
PORT = 8080
REFRESH_S = 5.0
"""Minimum time between two fetches of the journal from a remote storage, in seconds."""
SHARE = 10.0
"""Minimum time between two fetches, as a multiple of the duration of the last fetch."""
TOLD = ("trial", "of", "refines", "from", "reason", "seconds", "duplicate", "interrupted")
"""Attributes of a trial in the journal that are shown."""
FIGURES = (
    "candidate",
    "attacked_accuracy",
    "oblivious_accuracy",
    "black_box_accuracy",
    "white_box_accuracy",
    "worst_draw_accuracy",
    "known_noise_accuracy",
    "clean_accuracy",
    "clean_rejection",
    "latency_ms_p95",
    "alarms",
    "device",
)
"""Columns of candidates.csv that are shown besides the objectives and the searched knobs."""


def serve(study: Study, port: int | None, console: Console, *, open_browser: bool = False) -> int:
    """Serve a search on this machine's loopback until Ctrl-C, and return the exit code.

    Args:
        port: None is 8080, or a free port if 8080 is taken.

    Raises:
        InputError: the search has not begun, or the port is not available.
    """
    warnings.filterwarnings("ignore", module="optuna")  # about small samples; the page shows the sizes
    with TemporaryDirectory(prefix="crucible-dashboard-") as folder, server(study, port, Path(folder)) as site:
        url = f"http://{HOST}:{site.server_port}/dashboard/studies/0"
        console.print(f"{study.name}: {url} (read-only; Ctrl-C ends it)", highlight=False, soft_wrap=True)
        if open_browser:
            webbrowser.open(url)
        with suppress(KeyboardInterrupt), terminable():
            site.serve_forever()
    return 0


def server(study: Study, port: int | None, folder: Path) -> WSGIServer:
    """Return the server of a search's dashboard, bound to its port; it raises the same errors as `serve`.

    Args:
        folder: where the journal of a remote storage is copied to.
    """
    SearchHistory(study)
    shown = Shown(study, Followed(study, folder / JOURNAL))
    # The dashboard's own front ignores constraints, and there is no option to replace it.
    optuna_dashboard._app.get_pareto_front_trials = shown.front
    site = read_only(optuna_dashboard._app.create_app(shown))
    last: OSError | OverflowError | None = None
    for each in (PORT, 0) if port is None else (port,):
        try:
            return make_server(HOST, each, site, server_class=_Server, handler_class=_Silent)
        except (OSError, OverflowError) as error:
            last = error
    raise InputError(f"port must be a free one from 1 to 65535, but {port} is not to be had: {last}") from None


def read_only(site: WSGIApplication) -> WSGIApplication:
    """Return a site that rejects all requests except GET and HEAD."""

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return site(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # otherwise the answer may be lost
        start_response("405 Method Not Allowed", [("Content-Type", "application/json"), ("Allow", "GET, HEAD")])
        return [b'{"reason": "this dashboard only reads: a search belongs to its driver"}']

    return guarded


class Followed(Journal):
    """A read-only journal of a search that may run elsewhere; it is fetched again when it is read.

    Args:
        fetched: the path of the fetched copy; a driver on this machine may be writing the local journal.
    """

    def __init__(self, study: Study, fetched: Path) -> None:
        super().__init__(journal_path(study), None)
        self._mirror = study.mirror
        self._here, self._fetched = journal_path(study), fetched
        self._due = 0.0

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        if self._mirror is not None and time.monotonic() >= self._due:
            began = time.monotonic()
            with suppress(OSError):  # keep the present copy
                self._mirror.fetch(JOURNAL, to=self._fetched)
                self._file_path = str(max(self._here, self._fetched, key=lambda path: path.stat().st_size))
            self._due = time.monotonic() + max(REFRESH_S, SHARE * (time.monotonic() - began))
        return super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise StorageError("a dashboard only reads")


class Shown(JournalStorage):
    """A storage that presents a search to the dashboard."""

    def __init__(self, study: Study, backend: Followed) -> None:
        super().__init__(backend)
        self.study = study
        self._ended: dict[int, FrozenTrial] = {}
        self._candidates: dict[int, Candidate] = {}
        self._quieter: dict[int, Candidate] = {}

    def get_all_studies(self) -> list[FrozenStudy]:
        threat = spoken_threat(self.study.resolved.threat)
        found: list[FrozenStudy] = super().get_all_studies()
        for each in found:
            bare = each.user_attrs.get(UNDEFENDED)
            each.user_attrs = {"defense": self.study.defense, "task": self.study.label, "threat": threat}
            if bare:
                each.user_attrs["attacked_error of no defense"] = bare["score"]["attacked_error"]
            each.system_attrs["study:metric_names"] = [f"attacked error ({threat})", "latency, p50 in ms"]
        return found

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        shown = [self._shown(trial) for trial in super().get_all_trials(study_id, deepcopy=False, states=states)]
        notes = self.get_study_user_attrs(study_id).get(REMEASURED, {})
        again = {name: Latency(**latency) for name, latency in notes.items()}
        self._quieter = dict(zip(self._candidates, quieter(self._candidates.values(), again), strict=True))
        return [self._timed(trial) for trial in shown]

    def _timed(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a trial with the latency that counts, where the first measurement was not quiet."""
        counts = self._quieter.get(trial.number)
        if counts is None or counts.score.latency_ms_p50 == trial.values[1]:
            return trial
        timed = copy.copy(trial)
        timed.values = [trial.values[0], counts.score.latency_ms_p50]
        timed.user_attrs = {**trial.user_attrs, "latency_ms_p95": counts.score.latency_ms_p95}
        return timed

    def front(self, trials: Sequence[FrozenTrial], directions: object) -> list[FrozenTrial]:
        """Return the trials of the search's own front: within the constraints, separately for each device."""
        named = {candidate.candidate: trial for trial in trials if (candidate := self._quieter.get(trial.number))}
        known = [self._quieter[trial.number] for trial in named.values()]
        return sorted((named[c.candidate] for c in front(self.study, known)), key=lambda trial: trial.number)

    def _shown(self, trial: FrozenTrial) -> FrozenTrial:
        if (known := self._ended.get(trial.number)) is not None:
            return known
        told, limits = trial.user_attrs, list(trial.constraints.values())
        shown = copy.copy(trial)
        shown.user_attrs = {key: told[key] for key in TOLD if key in told}
        if trial.state == TrialState.COMPLETE:
            if "candidate" in told:
                candidate = self._candidates[trial.number] = Candidate.from_json(json.loads(told["candidate"]))
                row = candidate.row()
                shown.user_attrs |= {key: row[key] for key in FIGURES if row[key] not in (None, "")}
            else:
                limits.append(1.0)  # from another search: not a candidate here
        shown.system_attrs = {**trial.system_attrs, "constraints": limits}
        shown.intermediate_values = {epoch: accuracy for epoch, accuracy in told.get("curve", ())}
        if trial.state.is_finished():
            self._ended[trial.number] = shown
        return shown


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing, because a search may use the terminal."""
