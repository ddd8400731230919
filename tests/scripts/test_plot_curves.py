import json

import pytest

from scripts import plot_curves


def write(path, steps=5, evaluate=True):
    lines = [
        {"batch": i, "token": 100 * i, "seconds": i / 10, plot_curves.TRAIN_LOSS: 9.0 - i} for i in range(1, steps + 1)
    ]
    if evaluate:
        lines.append({"batch": steps, "token": 100 * steps, "seconds": 1.0, plot_curves.EVAL_LOSS: 4.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"batch": 6, "cut o')


def test_several_runs_over_steps_tokens_and_time(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "metrics.jsonl")
    write(tmp_path / "b.jsonl", steps=3, evaluate=False)
    plot_curves.main([str(tmp_path / "a"), str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "a: 5 steps, 500 tokens, last evaluation 4.5000" in printed
    assert "b.jsonl: 3 steps, 300 tokens, last evaluation none" in printed


def test_missing_and_empty_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        plot_curves.main([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training step"):
        plot_curves.main([str(tmp_path)])
