"""A checkpoint folder holds its tokenizer, so a moved one can be evaluated, exported, fine-tuned and resumed."""

import json
import shutil

import pytest

import export_hf
import finetune
import main
from src.common.errors import ConfigError
from src.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from src.train import checkpoint
from src.train.checkpoint import TOKENIZER
from src.train.weights import read
from tests.runs import QUICKSTART, UNSAVED, losses_of

NULL = "tokenizer_name=null"


@pytest.fixture
def moved(overrides, tokenizer_folder, tmp_path):
    """Checkpoints that were moved after the run, and whose original tokenizer is deleted; the options of the run."""
    shutil.copytree(tokenizer_folder, tmp_path / "original")
    options = [*overrides, f"tokenizer_name={tmp_path}/original"]
    main.main([QUICKSTART, *options])
    shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "original")
    return tmp_path / "elsewhere", options


def test_moved_checkpoint_is_evaluated_and_resumed(capsys, moved):
    folder, options = moved
    want = capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match="original': there is no such folder"):
        main.main([QUICKSTART, "--eval", *options, f"load_path={folder}/latest-rank0.pt"])
    for path, tokenizer in (("latest-rank0.pt", "null"), ("latest-rank{rank}.pt", f"{folder}/{TOKENIZER}")):
        main.main([QUICKSTART, "--eval", *options, f"tokenizer_name={tokenizer}", f"load_path={folder}/{path}"])
        assert capsys.readouterr().out.splitlines()[-1] == want
    main.main([QUICKSTART, "--validate", *options, NULL, f"pretrained={folder}"])
    losses, _ = losses_of([*options, NULL, *UNSAVED, f"pretrained={folder}"])
    assert len(losses) == 4
    resumed = [f"save_folder={folder}", "autoresume=true", "save_overwrite=false", "max_duration=6ba"]
    losses, _ = losses_of([*options, NULL, *resumed, "resume.allow=[max_duration]"])
    assert list(losses) == [5, 6]
    with pytest.raises(ConfigError, match="tokenizer_name: null takes the tokenizer of a checkpoint"):
        losses_of([*options, NULL, *UNSAVED])


@pytest.mark.slow
def test_moved_checkpoint_is_exported_and_fine_tuned(moved, tmp_path, monkeypatch):
    folder, _ = moved
    export_hf.main([str(folder), str(tmp_path / "exported")])
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "exported"))) == read(folder).settings["tokenizer"]
    rows = ({"text": f"{word} {i}", "label": word} for i in range(8) for word in ("river", "war"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"pretrained={folder}", f"folder={tmp_path}/tuned", f"tasks.mine.data.train={tmp_path}/rows.jsonl"]
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # set by the run
    finetune.main(["yamls/finetune_own.yaml", *options, "tasks.mine.seeds=[17]", "tasks.mine.epochs=1"])
    assert list((tmp_path / "tuned").rglob("result.json"))


def test_tokenizer_is_written_before_the_first_step(overrides, tokenizer, tmp_path):
    """Also next to checkpoints of earlier versions, which have none, and in place of a damaged one."""
    options = [*overrides, "autoresume=true", "save_overwrite=false", "eval_interval=0", "save_interval=3ba"]
    folder = tmp_path / "checkpoints" / TOKENIZER
    losses_of(options, kill_at=1)
    assert not list(folder.parent.glob("ep*")) and tokenizer_fingerprint(load_tokenizer(str(folder)))
    for damage in (lambda: shutil.rmtree(folder), lambda: (folder / "tokenizer.json").write_text("{")):
        damage()
        losses_of(options, kill_at=4)
        assert tokenizer_fingerprint(load_tokenizer(str(folder))) == tokenizer_fingerprint(tokenizer)
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    losses_of(options)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    assert {path.name for path in folder.parent.iterdir() if TOKENIZER in path.name} == {TOKENIZER}


def test_tokenizer_that_cannot_be_read_back_is_not_kept(tokenizer, tmp_path, monkeypatch, caplog):
    def save(tokenizer, folder):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{")

    monkeypatch.setattr(checkpoint, "save_tokenizer", save)
    folder = checkpoint.RunFolder(str(tmp_path))
    folder.keep_tokenizer(tokenizer)
    folder.close()
    assert "not kept, because once saved" in caplog.text
    assert not [path for path in tmp_path.iterdir() if TOKENIZER in path.name]
