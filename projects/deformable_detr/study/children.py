"""Processes that a study starts, which run side by side and end with it."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

_TOLD = 15  # lines of a process that has failed


class Children:
    """Runs commands from several threads; :meth:`stop`, from any of them, ends all.

    Args:
        threads: of each process; None leaves their number to PyTorch.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        self.threads = threads
        self._running: set[subprocess.Popen] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], told: Path, *, keep_open: int) -> None:
        """Run a command to its end.

        Args:
            told: what it says is put behind what is in this file.
            keep_open: file descriptor that it inherits.

        Raises:
            RuntimeError: it has failed, or :meth:`stop` has ended it; has the end of what it told.
        """
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        with told.open("ab") as stream:
            with self._guard:
                if self._stopped:
                    raise RuntimeError("the study ends: nothing is started any more")
                # In a session of its own, so that a signal to the study's group does not count as a failure.
                child = subprocess.Popen(
                    command,
                    stdout=stream,
                    stderr=stream,
                    pass_fds=[keep_open],
                    start_new_session=True,
                    env={**os.environ, **threads},
                )
                self._running.add(child)
            status = child.wait()
            with self._guard:
                self._running.remove(child)
        if status:
            lines = told.read_text(encoding="utf-8", errors="replace").splitlines()[-_TOLD:]
            raise RuntimeError(f"a training has failed with status {status}, see {told}:\n" + "\n".join(lines))

    def stop(self) -> None:
        """End all processes with those that they have started, and start none any more."""
        with self._guard:
            self._stopped = True
            for child in self._running:
                # It may have ended by itself meanwhile.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
