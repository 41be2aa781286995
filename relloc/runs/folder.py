"""A run's folder while the run lives: its record, its mirror in MLflow, and the words at the end."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from relloc import checkpoints
from relloc.pretext.stopping import Stopped
from relloc.results import RESULTS_FILE, read_results
from relloc.runs import console
from relloc.tracking import Mirror, RunRecord, add_artifact, read_note, ui_command, ui_link, write_status

CONFIG_FILE = "config.yaml"
STATES = "evaluations"  # of those that were stopped: what they go on from
UNREADABLE_FILE = "unreadable.txt"
_WORDS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}


class RunFolder:
    """The folder, whether its run came to its end, and why images could not be used, by name."""

    def __init__(self, path: Path, uri: str | None) -> None:
        self.path = path
        self.uri = uri
        self.status = "FAILED"
        self.unreadable: dict[str, str] = {}

    def keep(self, name: str) -> None:
        """Have the tracker hold a copy of a file of this folder."""
        add_artifact(self.path, name)

    def stopped(self) -> None:
        """The run was asked to stop, and can go on."""
        self.status = "KILLED"

    def note_unreadable(self, reasons: dict[str, str]) -> None:
        """Remember images that could not be used."""
        self.unreadable |= reasons

    def summarize(self, marks: Collection[str] | None = None) -> None:
        """The run is finished: say what came out, and where it is. `marks` are the fingerprints of the rows to show."""
        self.status = "FINISHED"
        rows = [row for row in read_results(self.path) if marks is None or row.fingerprint in marks]
        for row in rows:
            if row.eval == "pretext":
                console.say(console.pretext_line(row))
        if any(row.eval != "pretext" for row in rows):
            console.show_results(rows)
        if rows:
            self.keep(RESULTS_FILE)

    def tell_unreadable(self) -> None:
        """Name the images that could not be used, together with those of earlier parts of the run."""
        if not self.unreadable:
            return
        lines = [f"{name}: {reason}" for name, reason in sorted(self.unreadable.items())]
        known = self.path / UNREADABLE_FILE
        if known.exists():
            lines = sorted({*lines, *known.read_text(encoding="utf-8", errors="surrogateescape").splitlines()})
        known.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
        self.keep(UNREADABLE_FILE)
        console.say(
            f"{len(lines)} images could not be used, such as {lines[0]}; all are named in {self.path / UNREADABLE_FILE}"
        )


@contextlib.contextmanager
def open_folder(config: DictConfig, record: RunRecord, path: Path) -> Iterator[RunFolder]:
    """Write the record and config, follow the run in MLflow, and say at the end where everything is."""
    folder = RunFolder(path, config.tracking.uri)
    console.say(f"run     {path}")
    record.write(path)
    (path / CONFIG_FILE).write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    folder.keep(CONFIG_FILE)
    mirror = Mirror(path, folder.uri, warn=console.say) if folder.uri else None
    try:
        write_status(path, "RUNNING")
        if mirror:
            mirror.start()
        yield folder
    except (KeyboardInterrupt, Stopped):
        folder.stopped()
        console.say("interrupted; what was saved and evaluated before stays")
        raise
    finally:
        folder.tell_unreadable()
        write_status(path, folder.status)
        if mirror:
            _say_where(folder, mirror.close(folder.status))
        console.say(f"run     {path}: {_WORDS[folder.status]}")
        kept = checkpoints.saved_trainings(path) or (path / STATES).exists() or (path / RESULTS_FILE).exists()
        if folder.status != "FINISHED" and kept:
            console.say(f"        the same command with hydra.run.dir={path} goes on from there")


def _say_where(folder: RunFolder, trouble: str | None) -> None:
    note = read_note(folder.path)
    if trouble:
        console.say(trouble)
    if note and folder.uri:
        link = ui_link(folder.uri, note.experiment_id)
        console.say("compare runs in MLflow:", f"  {ui_command(folder.uri)}", f"  {link}")
