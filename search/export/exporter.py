"""Exports winners of a search: choose candidates, audit each, and write those that pass."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch import nn

from attacks.attack import AttackError
from attacks.audit.audit import Audit, audit
from attacks.audit.gate import SLACK
from attacks.verdicts import Robustness
from defenses.base import Defended, Defense
from search.console import ProgressBars
from search.exceptions import AlarmError, TrialError
from search.export import provenance
from search.export.aside import Aside, compare
from search.export.attack_progress import AttackProgress, audit_passes, suite_passes
from search.export.checks import FIGURES, audited
from search.export.confirm import confirm
from search.export.evidence import evidence
from search.export.figures import with_gates
from search.export.model_card import card
from search.formatting import counted
from search.optimizer.history import SearchHistory
from search.storage.atomic import folder_atomic, write_atomic
from search.storage.seal import SEAL, opened, seal
from search.storage.store import Store, to_bytes
from search.study import ranking, sync
from search.study.candidate import Candidate
from search.study.study import Study
from search.study.verdict import verdict_of_audit, verdict_of_search
from search.study.winner import audits, keep
from search.tracking.wandb_tracker import log_exports
from search.trial.baseline import ADVERSARIAL
from search.trial.runner import TrialRunner
from search.trial.training import silent
from spaces.exceptions import InputError

TRIES = 2
"""Number of further candidates that may be audited if the audit rejects some."""
ALIKE = "the training and every figure of one above"
AGAIN = "another --threat, --eps or --defense, or with more training (--epochs, --trials)"


def export_all(
    study: Study, candidates: Sequence[Candidate], wanted: int, out: Path, console: Console, *, despite_alarms: bool
) -> list[dict[str, Any]]:
    """Audit and export candidates in order until `wanted` are written, or `wanted` + `TRIES` were tried.

    Returns:
        For each candidate that was tried: its `folder` (None if the audit refused it), and its `verdict` and figures
        (`audited`), or the reason (`refused`).

    Raises:
        InputError: `out` is not writable, or contains exports of another search or an export that was changed.
    """
    _writable(out)
    say: Callable[[str], None] = partial(console.print, highlight=False, soft_wrap=True)
    undefended = None if despite_alarms else SearchHistory(study).undefended()
    if worthless := _worthless(candidates[0], undefended):
        law = f"an export must err on {100 * SLACK:.0f} points fewer attacked images than no defense"
        raise InputError(f"{law}, but {worthless}. Search again with {AGAIN}; --despite-alarms exports it all the same")
    ranked, told, made = ranking.distinct(candidates, _alike(study)), list[dict[str, Any]](), list[Path]()
    for nth, candidate in enumerate(ranked[: wanted + TRIES]):
        refused = sum(one["folder"] is None for one in told)
        if len(told) - refused == wanted:
            break
        if nth and (alike := candidates.index(candidate) - candidates.index(ranked[nth - 1]) - 1):
            say(f"skipped    {counted(alike, 'candidate')} with {ALIKE}")
        folder = out / candidate.candidate
        if (other := provenance.search_of(folder)) not in (None, study.name):
            law = "a folder of exports must be of one search"
            raise InputError(f"{law}, but {folder} is of {other}: choose another --out")
        try:
            if not folder.exists():
                if worthless := _worthless(candidate, undefended):
                    raise AlarmError(f"{worthless}; not audited")
                how: dict[str, Any] = {"refused": refused, "despite_alarms": despite_alarms, "console": console}
                with suppress(FileExistsError):  # another process has exported it meanwhile
                    made.append(export(study, candidate, study.store, out, **how))
            sync.deliver(study, *folder.iterdir())
            told.append(_said(folder, say, despite_alarms))
        except AlarmError as error:
            say(f"refused: {error} (--despite-alarms writes it all the same)")
            told.append({"candidate": candidate.candidate, "folder": None, "refused": str(error)})
    refused = sum(one["folder"] is None for one in told)
    left, alike = ranked[len(told) :], len(candidates) - candidates.index(ranked[-1]) - 1
    if len(told) - refused < wanted and (left or alike):
        say(_stopped(study, refused, left, alike))
    if made or refused:
        with ProgressBars(console) as bars:
            bars.add_task("logging exports to W&B", total=None)
            log_exports(study, made, say)
    return told


def _alike(study: Study) -> Callable[[Candidate, Candidate], bool]:
    """Return what says whether two settings of a fit have the same verdict on each image, as far as the store knows."""
    known = dict[str, bytes | None]()

    def verdicts(candidate: Candidate) -> bytes | None:
        if candidate.candidate not in known:
            found = TrialRunner.of(study, study.store).verdicts(candidate.fit, candidate.params)
            known[candidate.candidate] = found
        return known[candidate.candidate]

    return lambda one, other: None in (verdicts(one), verdicts(other)) or verdicts(one) == verdicts(other)


def _said(folder: Path, say: Callable[[str], None], despite_alarms: bool) -> dict[str, Any]:
    """Say what the audit of an export found, and return it; one may have been written despite its alarms before."""
    found = json.loads(opened(folder)["evidence.json"])
    _refuse(found, despite_alarms)
    worth, figures = verdict_of_audit(found), {name: found[name] for name in FIGURES}
    say(f"{audited(found)}\nverdict    {worth}\nexported   {folder}")
    return {"candidate": found["candidate"], "folder": str(folder), "verdict": worth, "audited": figures}


def _stopped(study: Study, refused: int, left: Sequence[Candidate], alike: int) -> str:
    """Return why no further candidate is audited, and how to go on."""
    if not left:
        return f"stopped    after all candidates that differ; {alike} more below have {ALIKE}"
    return (
        f"stopped    after {counted(refused, 'refused candidate')}, though {len(left)} more rank below, which did no "
        f"better in the search. Search again with {AGAIN}; or try the next: "
        f"{provenance.export(study, left[0].candidate)}"
    )


def _worthless(candidate: Candidate, undefended: Candidate | None) -> str:
    """Return why the audit would refuse a candidate by the search's own figures: its check `baseline`; else nothing."""
    if undefended is None or undefended.score.attacked_error - candidate.score.attacked_error >= SLACK:
        return ""
    return f"the search found {candidate.candidate} {verdict_of_search(candidate, undefended)}"


def export(
    study: Study,
    candidate: Candidate,
    store: Store,
    out: Path,
    *,
    refused: int = 0,
    despite_alarms: bool = False,
    console: Console | None = None,
) -> Path:
    """Audit a candidate and write its export.

    Args:
        out: the folder of exports; the export is its subfolder with the name of the candidate.
        refused: number of higher-ranked candidates that the audit rejected, for the evidence.
        despite_alarms: write the export even with alarms; the evidence lists them first.
        console: where progress is shown; default: nowhere.

    Raises:
        InputError: the export exists, or the fit that was scored can no longer be reproduced.
        AlarmError: the audit raised alarms, or a new process that loads the export does not confirm its verdicts.
    """
    folder = out / candidate.candidate
    if folder.exists():
        raise InputError(f"an export must be a new folder, but {folder} exists")
    runner = _runner(study, candidate, store)
    _, defense = runner.trainer.fit(candidate.params, silent)
    console = console or Console(quiet=True)
    if known := _refused_before(study, candidate):
        console.print(f"{candidate.candidate} was audited {known['written']} by this very code", highlight=False)
        _refuse(known, despite_alarms)
        with _new(folder) as temporary:
            picture = runner.picture(candidate.params, temporary / "pictures.png").read_bytes()
            _write(temporary, runner, defense, known | {"refused_before_it": refused}, picture)
        return folder
    with _progress(runner, candidate, defense, console).running():
        beside = {} if study.defense == ADVERSARIAL else runner.trainer.adversarially_trained()
        found, again, aside = _examined(runner, candidate, defense, beside)
        known = with_gates(evidence(runner, candidate, found, again, beside), [aside.gate])
        known |= {"aside": aside.figures(), "refused_before_it": refused}
        with _new(folder) as temporary:
            picture = runner.picture(candidate.params, temporary / "pictures.png").read_bytes()
            _write(temporary, runner, defense, known, picture)
            with runner.assets.device_lock.working():
                y_N, seed = runner.assets.evaluator.y_N, runner.study.seed + 1
                known = with_gates(known, confirm(temporary, found.versions, found.right, y_N, seed=seed))
            keep(study, known)
            _refuse(known, despite_alarms)
            _write(temporary, runner, defense, known, picture)
    return folder


def _runner(study: Study, candidate: Candidate, store: Store) -> TrialRunner:
    """Return what makes the fit of a candidate; an InputError where that would be another one by now."""
    runner = TrialRunner.of(study, store)
    if runner.trainer.key(candidate.params) != candidate.fit:
        raise InputError(
            f"an export needs the fit that was scored, {candidate.fit}, but the code, the data or the study's settings "
            f"have changed since; search again under another name"
        )
    return runner


def _refused_before(study: Study, candidate: Candidate) -> dict[str, Any] | None:
    """Return the evidence of an audit by this code and these libraries that refused a candidate, if there is one."""
    known = dict(audits(study, [candidate]).get(candidate.candidate, {"refused": False}))
    if not known.pop("refused") or known["code"]["sha256"] != provenance.code()["sha256"]:
        return None
    return known if provenance.libraries().items() <= known["versions"].items() else None


def _refuse(known: Mapping[str, Any], despite_alarms: bool) -> None:
    """Raise an AlarmError where an audit raised alarms."""
    if (alarms := known["alarms"]) and not despite_alarms:
        failed = f"{counted(len(alarms), 'audit check')}: {'; '.join(alarms)}"
        raise AlarmError(f"{known['candidate']} failed {failed}; verdict: {verdict_of_audit(known)}")


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder`; after an error no new folder of exports is left."""
    there = folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with folder_atomic(folder) as temporary:
            yield temporary
    except BaseException:
        if not there:
            with suppress(OSError):  # another process may have exported into it meanwhile
                folder.parent.rmdir()
        raise


def _progress(runner: TrialRunner, candidate: Candidate, defense: Defense, console: Console) -> AttackProgress:
    """Return the progress display of an export, with the passes that it takes, about."""
    doing = f"auditing {candidate.candidate} by heavier attacks than it was chosen by"
    progress = AttackProgress(console, doing, runner.assets.target)
    target, stand = Defended(defense, runner.assets.target), candidate.score.white_box_accuracy
    again = 2 * suite_passes(runner.study.suite, target, stand)  # the search's attacks, and those on images kept aside
    progress.expected = len(runner.assets.evaluator.y_N) * (audit_passes(target, stand) + again)
    return progress


def _examined(
    runner: TrialRunner, candidate: Candidate, defense: Defense, beside: Mapping[str, tuple[str, nn.Module]]
) -> tuple[Audit, Robustness, Aside]:
    """Return a candidate's audit, the result of the search's attacks, run again, and that on images kept aside."""
    evaluator, bare = runner.assets.evaluator, runner.assets.target
    try:
        with runner.assets.device_lock.working("audited"):
            found = audit(
                Defended(defense, bare),
                evaluator.x_NCHW,
                evaluator.y_N,
                evaluator.threat,
                seed=runner.study.seed + 1,
                attacker=evaluator.attacker,
                baselines={name: model for name, (_, model) in beside.items()},
            )
        aimed = Defended(defense.at(runner.scorer.aimed(candidate.params).inference), bare)
        with runner.assets.device_lock.working():
            again = evaluator.observe(aimed).judge(defense.at(candidate.params.inference).limits())
        return found, again, compare(runner, candidate, defense, again)
    except (AttackError, InputError, TrialError) as error:
        raise AlarmError(f"{candidate.candidate} cannot be audited: {error}") from None


def _write(folder: Path, runner: TrialRunner, defense: Defense, known: Mapping[str, Any], picture: bytes) -> None:
    """Write the files of an export, and their seal."""
    study = runner.study.model_dump(exclude={"storage", "data_dir", "address"})
    config = {**known["model"], "threat": known["threat"], "study": study}
    files = {
        "weights.safetensors": to_bytes(defense),
        "classifier.safetensors": to_bytes(runner.assets.target),
        "config.yaml": yaml.safe_dump(config, sort_keys=False).encode(),
        "card.md": card(known).encode(),
        "evidence.json": json.dumps(known, indent=1).encode(),
        "pictures.png": picture,
    }
    for role in known["model"]["own"]:
        added = runner.assets.resolved.task.added(known["model"][role])
        assert added is not None
        files[f"{role}.py"] = added.code.encode()
    for name, content in {**files, SEAL: seal(files)}.items():
        write_atomic(folder / name, content)


def _writable(out: Path) -> None:
    """Check that exports can be written, before the audit takes its time; no file remains."""
    there = next(path for path in (out, *out.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"a folder of exports must be one that can be written, but {out}: {error.strerror}") from None
