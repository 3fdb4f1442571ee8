"""What was measured on this machine, kept in one SQLite file in the user's data folder."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from mxn.config.environment import data_dir
from mxn.engine.messages import Load, ReplicaInfo
from mxn.errors import ConfigError, MxnError
from mxn.fleet.calibration.memory import MemoryObservation, observe, read_observation
from mxn.fleet.calibration.profile import Profile, profile_json, read_profiles

log = logging.getLogger(__name__)

BUSY_S = 5.0
"""How long another process that writes is waited for."""
_OBSERVATIONS_KEPT = 50
"""Of one cell: older ones say nothing that newer ones do not."""

_TABLES = """
create table if not exists profiles (key text primary key, json text not null) strict;
create table if not exists loads (id integer primary key, cell text not null, json text not null) strict;
create index if not exists loads_by_cell on loads (cell, id);
"""


def remember_load(load: Load, info: ReplicaInfo | None) -> None:
    """Keeps what a load took, for later estimates. A store that cannot be written is a warning: serving goes on."""
    try:
        observation = observe(load, info) if info is not None else None
        if observation is not None:
            MeasurementStore().keep_memory(observation)
    except MxnError as error:
        log.warning("the memory of a load is not remembered: %s", error)


class MeasurementStore:
    """Profiles and memory observations. A file that is not there reads as empty and is made when something is kept.

    Raises (all methods): ConfigError with the path when the file is damaged, locked for long, or may not be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or data_dir() / "measurements.sqlite"

    def profiles(self) -> tuple[Profile, ...]:
        """All profiles, in the order of their keys."""
        with self._reading() as connection:
            rows = connection.execute("select key, json from profiles order by key").fetchall() if connection else []
        return tuple(profile for key, text in rows for profile in read_profiles(text, f"{self.path}, {key}"))

    def keep_profiles(self, profiles: Sequence[Profile]) -> None:
        """Adds profiles; each replaces an older one of the same cell and versions."""
        rows = [("|".join(profile.key), json.dumps(profile_json(profile))) for profile in profiles]
        with self._writing() as connection:
            connection.executemany("insert or replace into profiles values (?, ?)", rows)

    def remove_profiles(self, profiles: Sequence[Profile]) -> None:
        """Forgets profiles."""
        with self._writing() as connection:
            connection.executemany("delete from profiles where key = ?", [("|".join(p.key),) for p in profiles])

    def memory(self) -> tuple[MemoryObservation, ...]:
        """What loads were seen to take, oldest first."""
        with self._reading() as connection:
            rows = connection.execute("select id, json from loads order by id").fetchall() if connection else []
        return tuple(read_observation(text, f"{self.path}, load {number}") for number, text in rows)

    def keep_memory(self, observation: MemoryObservation) -> None:
        """Adds what one load took, and drops the oldest of many of the same cell."""
        with self._writing() as connection:
            connection.execute("insert into loads (cell, json) values (?, ?)", (observation.cell, observation.json()))
            connection.execute(
                "delete from loads where cell = ? and id not in (select id from loads where cell = ? order by id desc "
                "limit ?)",
                (observation.cell, observation.cell, _OBSERVATIONS_KEPT),
            )

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        if not self.path.exists():
            yield None
            return
        with self._translated("read"):
            address = f"{self.path.absolute().as_uri()}?mode=ro"
            with closing(sqlite3.connect(address, uri=True, timeout=BUSY_S)) as connection:
                known = {name for (name,) in connection.execute("select name from sqlite_master")}
                yield connection if {"profiles", "loads"} <= known else None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._translated("written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=BUSY_S)) as connection:
                connection.executescript(_TABLES)
                with connection:
                    yield connection

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"the measurements in {self.path} cannot be {what}: {error}") from error
        except sqlite3.DatabaseError as error:  # OperationalError is one: locked, read-only, no space
            advice = (
                "another process holds it; try again"
                if "locked" in str(error)
                else "set MXN_DATA_DIR to a folder that may be written"
                if "readonly" in str(error) or "unable to open" in str(error)
                else "move it away to begin anew"
            )
            raise ConfigError(f"the measurements in {self.path} cannot be {what}: {error}; {advice}") from error
