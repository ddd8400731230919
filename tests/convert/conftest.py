import pytest

from tests.convert.splits import TEXTS


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join([*TEXTS, ""]))
    return str(folder)
