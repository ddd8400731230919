import pytest


@pytest.fixture
def source(tmp_path):
    from tests.convert.splits import TEXTS  # needs streaming, which tests of the model do without

    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join([*TEXTS, ""]))
    return str(folder)
