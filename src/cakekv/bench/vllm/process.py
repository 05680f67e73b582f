"""A server as a process that `with` starts and leaves nothing of behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self


class ServerProcess(ABC):
    """Started by `with`, which waits until it serves; stopped at the end of the block."""

    log: Path
    """Where its output goes."""
    stop_signal: ClassVar[signal.Signals]
    """What ends it in an orderly way."""
    stop_s: ClassVar[float]
    """Seconds that this may take."""

    def __enter__(self) -> Self:
        command, environment = self._command()
        if setpriv := shutil.which("setpriv"):  # Linux: it ends with this process, even if that is killed
            command = [setpriv, "--pdeathsig", self.stop_signal.name.removeprefix("SIG"), *command]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server as an operator would, and whatever is left of it by force."""
        self._process.send_signal(self.stop_signal)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self.stop_s)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @abstractmethod
    def _command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        """What is run, and in which environment."""

    @abstractmethod
    def _wait_until_healthy(self) -> None:
        """Return when it serves; raise `CakeError` if it ended, or does not in time."""
