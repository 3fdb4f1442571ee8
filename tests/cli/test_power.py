from mxn.cli.power import local_readers
from mxn.energy.reader import NullReader


def test_server_whose_backend_is_known_is_priced_by_the_chip_that_this_takes() -> None:
    (reader,) = local_readers("http://127.0.0.1:8000/v1", "fake")
    assert reader.name == "scripted"


def test_other_machine_has_no_power_here() -> None:
    (reader,) = local_readers("http://chips.example:8000/v1", "fake")
    assert isinstance(reader, NullReader)
    assert "another machine" in reader.detail
