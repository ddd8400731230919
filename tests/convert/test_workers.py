from functools import partial
from itertools import count

import pytest

from src.convert import workers


def touch(folder, task, beat):
    (folder / f"{task}").touch(exist_ok=False)
    beat(task)


def fail(task, beat):
    class Local(Exception):
        """Cannot be sent to another process."""

    raise Local("no good")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_each_task_is_done_once_and_drawn_when_somebody_is_free(num_workers, tmp_path):
    beats, most = [], 0

    def tasks():
        nonlocal most
        for task in range(40):
            most = max(most, task - len(list(tmp_path.iterdir())))
            yield task

    workers.run(partial(touch, tmp_path), tasks(), num_workers, beats.append)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == sorted(beats) == list(range(40))
    assert most <= 2  # however many tasks there are, so many wait


def test_an_error_ends_it_and_is_told_even_if_it_cannot_travel():
    with pytest.raises(RuntimeError, match="Local: no good"):
        workers.run(fail, count(), 2, print)
