import pytest

from tests.report.shared import small_study


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """(study, root): a study that has been through all stages of its runs. Copy it to change it."""
    return small_study(tmp_path_factory.getbasetemp() / "evaluated")
