"""Several chips as one source: what a replica that runs on all of them is metered by."""

from __future__ import annotations

from collections.abc import Sequence

from mxn.energy.reader import NullReader, PowerReader, Reading


def together(readers: Sequence[PowerReader]) -> PowerReader:
    """The sum of the readers; one that reads nothing, if there is such a one, since a part is not the whole."""
    absent = next((reader for reader in readers if isinstance(reader, NullReader)), None)
    if len(readers) == 1 or absent is not None:
        for reader in readers:
            if absent is not None and reader is not absent:
                reader.close()
        return absent or readers[0]
    return _Together(readers)


class _Together:
    """Readers of the same kind, added up; unavailable as soon as one of them is."""

    def __init__(self, readers: Sequence[PowerReader]) -> None:
        first = readers[0]
        limits = [reader.power_limit_w for reader in readers]
        errors = [reader.relative_error for reader in readers if reader.relative_error is not None]
        self.name, self.kind, self.scope = first.name, first.kind, first.scope
        self.detail = f"{len(readers)} chips together: {first.detail}"
        self.relative_error = max(errors, default=None)
        self.update_period_s = max(reader.update_period_s for reader in readers)
        self.power_limit_w = None if None in limits else sum(limit for limit in limits if limit is not None)
        self._readers = tuple(readers)

    def read(self) -> Reading:
        readings = [reader.read() for reader in self._readers]
        lost = next((reading for reading in readings if reading.energy_j is None), None)
        return Reading(
            energy_j=None if lost else sum(reading.energy_j or 0.0 for reading in readings),
            time_s=readings[-1].time_s,
            reason=lost.reason if lost else None,
            loss=lost.loss if lost else None,
            num_breaks=sum(reading.num_breaks for reading in readings),
            last_break=next((reading.last_break for reading in readings if reading.last_break), None),
        )

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
