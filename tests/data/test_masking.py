"""Masking: shares, independence, and what it depends on."""

import numpy as np
import pytest
import torch

from src.data.masking import MaskingCollator, mask_batch
from src.masked_lm_loss import IGNORED


def samples_of(lengths, tokenizer, first_id=0, epoch=0):
    rng = np.random.default_rng(0)
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    texts = [np.array([cls, *rng.choice(words, n - 2), sep]) for n in lengths]
    return [{"input_ids": ids, "sample_id": first_id + i, "epoch": epoch} for i, ids in enumerate(texts)]


def test_masks_do_not_depend_on_the_batch(tokenizer):
    """Nor on its order or padding: only on seed, epoch, sample id and position."""
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
    assert not masked[:, [0, -1]].any()
    inner = masked[:, 1:-1]
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
    random = now[shares[2]].numpy()
    assert not np.isin(random, tokenizer.all_special_ids).any() and random.max() < len(tokenizer)
    counts = np.delete(np.bincount(random, minlength=len(tokenizer)), tokenizer.all_special_ids)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi2 - len(counts)) < 6 * (2 * len(counts)) ** 0.5


def mixed(x):
    """SplitMix64 with Python's integers, which do not overflow."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_each_position_follows_from_the_definition(rate, tokenizer):
    """Masked where u < rate; then [MASK], a random word or kept: one position after another."""
    seed, epoch, first = 23, 4, 1000
    samples = samples_of([60, 3, *[500] * 10], tokenizer, first, epoch)
    batch = MaskingCollator(tokenizer, rate, seed)(samples)
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    ids, labels, drawn = batch["input_ids"].tolist(), batch["labels"].tolist(), 0
    for i, sample in enumerate(samples):
        for position, word in enumerate(sample["input_ids"].tolist()):
            bits = mixed(mixed(mixed(mixed(seed) ^ epoch) ^ (first + i)) + position * 0x9E3779B97F4A7C15)
            want, label = word, IGNORED
            if (bits >> 11) / 2**53 < rate and word not in tokenizer.all_special_ids:
                second, label = mixed(bits ^ (2**64 - 1)), word
                choice, at = (second >> 32) / 2**32, (second % 2**32) * len(words) >> 32
                want = tokenizer.mask_token_id if choice < 0.8 else words[at] if choice < 0.9 else word
                drawn += 1
            assert (ids[i][position], labels[i][position]) == (want, label)
    assert drawn > 600


def test_random_words_are_of_the_whole_vocabulary(tokenizer):
    """The first and the last one too: 20,000 draws of 995."""
    collate = MaskingCollator(tokenizer, 1.0, seed=17)
    batch = collate(samples_of([2000] * 110, tokenizer))
    replaced = (batch["labels"] >= 0) & (batch["input_ids"] != tokenizer.mask_token_id)
    random = batch["input_ids"][replaced & (batch["input_ids"] != batch["labels"])]
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    assert np.array_equal(np.unique(random), words)


def test_special_tokens_inside_a_text_are_never_masked(tokenizer):
    ids = np.array([tokenizer.cls_token_id, *[tokenizer.unk_token_id, tokenizer.sep_token_id, 50] * 20])
    batch = MaskingCollator(tokenizer, 0.9, seed=1)([{"input_ids": ids, "sample_id": 0, "epoch": 0}])
    assert (ids[(batch["labels"][0] >= 0).numpy()] == 50).all() and (batch["labels"] >= 0).any()


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.9])
def test_scheduled_rate_masks_as_a_constant_one(rate, tokenizer):
    samples = samples_of([5, 60, 12], tokenizer)
    want = MaskingCollator(tokenizer, rate, seed=17)(samples)
    got = mask_batch(MaskingCollator(tokenizer, None, seed=17)(samples), rate)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_lower_rate_masks_a_subset(tokenizer):
    low, high = (MaskingCollator(tokenizer, r, seed=17)(samples_of([60] * 4, tokenizer)) for r in (0.15, 0.4))
    was, now = low["labels"] >= 0, high["labels"] >= 0
    assert (now | ~was).all() and now.sum() > was.sum()
    assert torch.equal(low["input_ids"][was], high["input_ids"][was])
