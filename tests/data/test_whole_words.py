"""Whole-word masking: which pieces are words, how often words are masked, and what their masks depend on."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from src.common.errors import ConfigError, DataError
from src.data.masking import MaskingCollator, mask_batch
from src.data.tokenizer import continues_word
from src.masked_lm_loss import IGNORED
from src.train import config
from src.train.data import build_evaluators, build_train_data
from src.train.resume import ResumeCheck

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "mask", "pad", "unk")}
TEXT = "unbelievable masking of unbelievably long words, unmasked words: believe, masks, wording"


def byte_level():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*SPECIAL.values()], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([TEXT] * 9, trainer)
    return raw


def metaspace():
    """As ALBERT, XLM-R and DeBERTa."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=[*SPECIAL.values()], unk_token="[UNK]")
    raw.train_from_iterator([TEXT] * 9, trainer)
    return raw


def replaced_blanks():
    """SentencePiece's BPE as Llama's and Gemma's: no pre-tokenizer, the normalizer writes the mark."""
    raw = Tokenizer(models.BPE(unk_token="[UNK]"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = pre_tokenizers.Metaspace(prepend_scheme="never")
    pieces = [piece for word, _ in words.pre_tokenize_str("▁" + TEXT.replace(" ", "▁")) for piece in (word, *word)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*SPECIAL.values(), *pieces]))}
    raw.model = models.BPE(vocabulary, [], unk_token="[UNK]")
    return raw


def word_piece():
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=[*SPECIAL.values()])
    raw.train_from_iterator([TEXT] * 9, trainer)
    return raw


def loaded(raw):
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


def samples_of(rng, tokenizer, lengths, specials=0.05):
    """Any ids, special ones among them: words may begin or end anywhere."""
    special = np.array(tokenizer.all_special_ids)
    rows = []
    for n in lengths:
        ids = rng.integers(0, len(tokenizer), n)
        inside = rng.random(n) < specials
        rows.append(np.where(inside, rng.choice(special, n), ids))
    return [{"input_ids": ids, "sample_id": 50 + i, "epoch": 2} for i, ids in enumerate(rows)]


@pytest.mark.parametrize("make", [word_piece, byte_level, metaspace, replaced_blanks])
def test_pieces_of_a_text_are_the_words_between_its_blanks(make):
    """WordPiece also splits punctuation off. The first word has no mark in a byte-level tokenizer."""
    tokenizer = loaded(make())
    tokenizer.add_tokens(["added"])
    continues = continues_word(tokenizer)
    assert continues.shape == (len(tokenizer),) and not continues[tokenizer.all_special_ids].any() and not continues[-1]
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    words = []
    for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        text = piece.removeprefix("##").removeprefix("Ġ").removeprefix("▁")
        words[len(words) - bool(words and continues[i]) :] = [(words[-1] if words and continues[i] else "") + text]
    words = [word for word in words if word]
    expected = TEXT.replace(",", " ,").replace(":", " :") if make is word_piece else TEXT
    assert words == expected.split() and continues[ids].sum() > 3


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_each_word_follows_from_the_definition(rate, tokenizer):
    """All pieces of a word are masked where the u of its first piece says so; each is then replaced on its own."""
    rng = np.random.default_rng(0)
    samples = samples_of(rng, tokenizer, [1, 2, 37, 300, 200])
    # Of single tokens: 1.0 shows the replacement of every token, small rates which token has a small u.
    single = {r: MaskingCollator(tokenizer, r, seed=5)(samples) for r in (rate, 1.0)}
    batch = MaskingCollator(tokenizer, rate, seed=5, whole_words=True)(samples)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    masked_words = 0
    for row, sample in enumerate(samples):
        first, after_special = 0, True
        for at, i in enumerate(sample["input_ids"].tolist()):
            if not pieces[i].startswith("##") or after_special:
                first = at
            after_special = i in tokenizer.all_special_ids
            masked = bool(single[rate]["labels"][row, first] >= 0) and not after_special
            assert batch["labels"][row, at] == (i if masked else IGNORED)
            assert batch["input_ids"][row, at] == (single[1.0]["input_ids"][row, at] if masked else i)
            masked_words += masked and first != at
    assert masked_words > 20


def test_the_share_of_masked_tokens_stays_the_rate(tokenizer):
    """Within 5 standard deviations: pieces of one word are masked together, so a word of k tokens counts k squared."""
    samples = samples_of(np.random.default_rng(1), tokenizer, [200] * 400, specials=0)
    batch = MaskingCollator(tokenizer, 0.3, seed=3, whole_words=True)(samples)
    ids = np.stack([sample["input_ids"] for sample in samples])
    special, continues = np.isin(ids, tokenizer.all_special_ids), continues_word(tokenizer)[ids]
    continues[:, 0] = False
    continues[:, 1:] &= ~special[:, :-1]
    words = np.bincount(np.cumsum(~continues.ravel()) - 1, weights=~special.ravel())
    masked = (batch["labels"] >= 0).numpy()
    assert words.max() > 5 and not masked[special].any()
    assert abs(masked.sum() - 0.3 * (~special).sum()) < 5 * (0.3 * 0.7 * (words**2).sum()) ** 0.5
    together = masked.ravel()[1:][continues.ravel()[1:]] == masked.ravel()[:-1][continues.ravel()[1:]]
    assert together.all()


@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_scheduled_rates_and_batches_of_any_size_mask_alike(rate, tokenizer):
    samples = samples_of(np.random.default_rng(2), tokenizer, [5, 60, 12, 60])
    want = MaskingCollator(tokenizer, rate, seed=17, whole_words=True)(samples)
    got = mask_batch(MaskingCollator(tokenizer, None, seed=17, whole_words=True)(samples), rate)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    alone = MaskingCollator(tokenizer, rate, seed=17, whole_words=True)([samples[2]])
    assert torch.equal(alone["labels"][0], want["labels"][2, :12])


def test_a_lower_rate_masks_a_subset(tokenizer):
    samples = samples_of(np.random.default_rng(3), tokenizer, [60] * 8)
    low, high = (MaskingCollator(tokenizer, r, seed=17, whole_words=True)(samples)["labels"] >= 0 for r in (0.15, 0.4))
    assert (high | ~low).all() and high.sum() > low.sum()


def words_only():
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL.values(), "Ġa", "##b"])}, "[UNK]"))


def ends_marked():
    pieces = [*SPECIAL.values(), "a", "b</w>"]
    return Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], end_of_word_suffix="</w>"))


def whole_word_pieces():
    return Tokenizer(models.WordPiece({p: i for i, p in enumerate([*SPECIAL.values(), "a"])}, unk_token="[UNK]"))


@pytest.mark.parametrize("make", [words_only, ends_marked, whole_word_pieces])
def test_tokenizers_without_marks_are_refused(make):
    tokenizer = loaded(make())
    with pytest.raises(DataError, match="does not mark which pieces continue a word .* mlm_whole_words cannot be true"):
        MaskingCollator(tokenizer, 0.3, seed=17, whole_words=True)
    MaskingCollator(tokenizer, 0.3, seed=17)


@pytest.mark.parametrize("key", [None, "mlm_whole_words", "eval_loader.mlm_whole_words"])
def test_the_settings_reach_training_and_evaluation(key, overrides, tokenizer):
    run = config.load("yamls/quickstart.yaml", [*overrides, *([f"{key}=true"] if key else [])])
    train = build_train_data(run, tokenizer)
    (evaluator,) = build_evaluators(run, tokenizer, train)
    collators = [loader.collate_fn for loader in (train.dataloader, evaluator.dataloader.dataloader)]
    marked = [collator.mask.continues is not None for collator in collators]
    assert marked == [key == "mlm_whole_words", key == "eval_loader.mlm_whole_words"]


def test_a_run_cannot_switch_whole_words(overrides):
    """Checkpoints of earlier versions do not have the setting: those runs masked single tokens."""
    off, on = (
        config.settings(config.load("yamls/quickstart.yaml", [*overrides, *more]))
        for more in ([], ["mlm_whole_words=true"])
    )
    earlier = {name: value for name, value in off.items() if name != "mlm_whole_words"}
    for there in (off, earlier):
        assert ResumeCheck(off, []).compare(there, "x.pt") == []
        with pytest.raises(ConfigError, match="mlm_whole_words: False there, True here"):
            ResumeCheck(on, []).compare(there, "x.pt")
    assert ResumeCheck(on, ["mlm_whole_words"]).compare(off, "x.pt") == ["mlm_whole_words"]
