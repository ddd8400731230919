"""Tokenizers as they come: gaps between ids, large ids, tokenizer.json alone, byte-level BPE, SentencePiece; and the
words in a text that look like special tokens."""

import json
import pickle
import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import convert_c4
from src import data_c4
from src.common.errors import DataError
from src.convert.samples import Tokens
from src.convert.stats import Stats
from src.data import cutting
from src.data.cutting import TextEncoder, encode_crop, encode_prefix
from src.data.masking import MaskingCollator, Sample
from src.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint, vocab_size, word_ids
from src.data.unigram import unigram_loss
from src.data_c4 import StreamingC4, build_dataloader
from src.train.models import padded_vocab_size
from tests.convert.splits import bytes_of, convert, json_of

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

RANDOM = random.Random(17)
WORDS = ["".join(RANDOM.choices("abcdefgh", k=RANDOM.randint(1, 9))) for _ in range(200)]
HAN = [chr(0x4E00 + i) for i in range(200)]


def chinese(sentences):
    ends = RANDOM.choices("，。", k=sentences)
    return "".join("".join(RANDOM.choices(HAN, k=RANDOM.randint(3, 14))) + end for end in ends)


def english(sentences):
    ends = [". ", ",\n", "!  ", "\n\n", "\t \t"]
    return "".join(" ".join(RANDOM.choices(WORDS, k=12)) + RANDOM.choice(ends) for _ in range(sentences))


TEXTS = {
    "English": english(40),
    "Chinese": chinese(200),
    "Chinese without punctuation": "".join(RANDOM.choices(HAN, k=1500)),
    "both": "".join(english(1) + chinese(10) for _ in range(15)),
    "runs of blanks": "".join(word + " " * RANDOM.randint(1, 30) for word in WORDS),
    "lines": "\n".join(WORDS * 2),
    "Chinese lines": "\n".join(chinese(8) for _ in range(20)),
    "a long word": "a" * 1500 + " b " * 300,
}
"""Longer than the pieces of the tests."""


def trained(model, trainer, special, pre_tokenizer, normalizer=None, **options):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    options |= {"vocab_size": 800, "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator([english(1) + chinese(2) for _ in range(200)], trainer(**options))
    return tokenizer


def word_piece(lowercase=True):
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    model = models.WordPiece(unk_token="[UNK]")
    return trained(model, trainers.WordPieceTrainer, BERT, pre_tokenizers.BertPreTokenizer(), normalizer)


def byte_level(pre_tokenizer=None, prefix=False):
    pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = trained(models.BPE(), trainers.BpeTrainer, ROBERTA, pre_tokenizer, initial_alphabet=alphabet)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece(pre_tokenizer, *normalizer):
    normalizer = normalizers.Sequence([*normalizer, normalizers.NFKC()])
    model = models.Unigram()
    return trained(model, trainers.UnigramTrainer, ROBERTA, pre_tokenizer, normalizer, unk_token="<unk>")


def llama():
    """No pre-tokenizer; the normalizer puts a blank before every text."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    split = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, ROBERTA, split, normalizer)
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "pre_tokenizer": None}))


CL100K = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

KINDS = {
    "WordPiece": word_piece,
    "cased": lambda: word_piece(lowercase=False),
    "byte-level": byte_level,
    "byte-level, prefix": lambda: byte_level(prefix=True),
    "byte-level, GPT-4": lambda: byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(CL100K), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    ),
    "Metaspace": lambda: sentence_piece(pre_tokenizers.Metaspace()),
    "XLM-R": lambda: sentence_piece(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    ),
    "CamemBERT": lambda: sentence_piece(
        pre_tokenizers.Metaspace(), normalizers.Replace(Regex(r"[\n\t]"), " "), normalizers.Replace(Regex(" {2,}"), " ")
    ),
    "Strip": lambda: sentence_piece(pre_tokenizers.Metaspace(), normalizers.Strip()),
    "Llama": llama,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by kind, with tokenizer.json alone."""
    root = tmp_path_factory.mktemp("foreign")
    for name, make in KINDS.items():
        (root / name).mkdir()
        make().save(str(root / name / "tokenizer.json"))
    return root


def whole_words(vocabulary, folder):
    """A word-piece tokenizer of whole words, with the vocabulary as it is given."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = {f"{name[1:-1].lower()}_token": name for name in BERT}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


PLAIN = {word: i for i, word in enumerate([*BERT, "a", "river", "runs", "past", "mill"])}


# Ids


@pytest.mark.parametrize(("last", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_ids_with_gaps_are_converted_loaded_and_masked(last, dtype, tmp_path):
    name = whole_words({**PLAIN, "mill": last}, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(name)
    assert vocab_size(tokenizer) == last + 1 and padded_vocab_size(tokenizer) == last // 64 * 64 + 64
    assert word_ids(tokenizer).tolist() == [5, 6, 7, 8, last]
    (tmp_path / "texts.txt").write_text("a river runs past a mill\n" * 400)
    folder = convert(tmp_path, tmp_path / "texts.txt", "--tokenizer", name, "--max_seq_len", "16")
    description = json_of(folder / "index.json")["mosaic_bert_tokens"]
    assert (description["dtype"], description["vocab_size"]) == (dtype, last + 1)
    dataset = StreamingC4(tokenizer, 16, str(tmp_path), split="mine", batch_size=8)
    batches = list(build_dataloader(dataset, MaskingCollator(tokenizer, 0.9, seed=1), 8))
    seen = {i for batch in batches for i in batch["input_ids"].flatten().tolist()}
    assert seen == {0, 2, 3, 4, 5, 6, 7, 8, last} - {0}  # of the same length: nothing is padded
    samples = [np.array(dataset[i]["input_ids"]) for i in range(8)]
    share = {5: 2, 6: 1, 7: 1, 8: 1, last: 1}
    labels = np.concatenate([batch["labels"][batch["labels"] >= 0].numpy() for batch in batches])
    want = -np.mean([np.log((8 * share[i] + 1) / (8 * 6 + 5)) for i in labels.tolist()])
    assert unigram_loss(samples, batches, tokenizer) == pytest.approx(want)


def test_repeated_lines_of_a_vocabulary_are_gaps(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT, "a", "river", "a", "runs"]))
    with pytest.raises(DataError, match=r'vocab.txt alone do not say .*"BertTokenizer", "do_lower_case": true or'):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert (len(tokenizer), vocab_size(tokenizer)) == (8, 9) and tokenizer("A river").input_ids == [2, 7, 6, 3]


def test_added_tokens_are_after_the_vocabulary(tokenizer):
    """Their ids are kept when special words are taken as text."""
    before = vocab_size(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[E1]"]})
    tokenizer.add_tokens(["naloxone"])
    assert vocab_size(tokenizer) == before + 2 and word_ids(tokenizer)[-2:].tolist() == [before - 1, before + 1]
    encoder = TextEncoder.of(tokenizer)
    assert encoder.ids("naloxone") == [before + 1] and before not in encoder.ids("[E1]")


# Folders


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json_alone(kind, folders, tmp_path):
    """Special tokens are found by their names, and the tokenizer is kept in saving, as in checkpoints and exports."""
    tokenizer = load_tokenizer(str(folders / kind))
    saved = Tokenizer.from_file(str(folders / kind / "tokenizer.json"))
    special = BERT if kind in ("WordPiece", "cased") else ROBERTA
    assert sorted(tokenizer.all_special_tokens) == sorted(special)
    cls, sep = ("[CLS]", "[SEP]") if special is BERT else ("<s>", "</s>")
    text = f"{WORDS[0]} {WORDS[1]}\n{HAN[0]}"
    want = [saved.token_to_id(cls), *saved.encode(text).ids, saved.token_to_id(sep)]
    assert tokenizer(text).input_ids == want
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == want


def test_tokenizer_json_alone_without_a_mask_is_refused(folders, tmp_path):
    content = json.loads((folders / "byte-level" / "tokenizer.json").read_text().replace("<mask>", "<hole>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="has no mask token, which BERT needs"):
        load_tokenizer(str(tmp_path))


def test_vocabulary_and_merges(folders, tmp_path):
    """As RoBERTa's; alone they do not say so."""
    saved = Tokenizer.from_file(str(folders / "byte-level" / "tokenizer.json"))
    saved.model.save(str(tmp_path))
    with pytest.raises(DataError, match=r'vocab.json and merges.txt alone .*"RobertaTokenizer"}'):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    assert load_tokenizer(str(tmp_path))("a b").input_ids == [0, *saved.encode("a b").ids, 2]
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"nor vocab\.json with merges\.txt"):
        load_tokenizer(str(tmp_path))


# Cutting


@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_ids_of_the_whole_text(kind, folders, monkeypatch):
    monkeypatch.setattr(cutting, "PIECE", 400)
    encoder = pickle.loads(pickle.dumps(TextEncoder.of(load_tokenizer(str(folders / kind)))))
    for name, text in TEXTS.items():
        whole, parts = encoder.ids(text), [*encoder.pieces(text)]
        assert [i for part, _ in parts for i in encoder.ids(part)] == whole, name
        assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
        for n in (1, 7, 100):
            assert encode_prefix(encoder, text, n) == whole[:n], name
        if (kind, name) == ("CamemBERT", "runs of blanks"):  # the library loses the places of blanks that it joins
            continue
        for turn in range(0, 90, 3):
            ids = encode_crop(encoder, text, 30, turn)
            assert ids and any(whole[i : i + len(ids)] == ids for i in range(len(whole))), name


@pytest.mark.parametrize("model", [models.BPE, models.Unigram])
def test_runs_of_one_character_are_not_cut_inside_a_token(model, monkeypatch):
    """A window that holds whole tokens of 2, 4, 8, ... such characters does not show where they begin."""
    monkeypatch.setattr(cutting, "PIECE", 400)
    tokenizer = Tokenizer(model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer if model is models.BPE else trainers.UnigramTrainer
    options = {"special_tokens": ["<unk>"], "unk_token": "<unk>"} if model is models.Unigram else {}
    tokenizer.train_from_iterator(["=" * 64] * 50 + HAN, trainer(vocab_size=230, show_progress=False, **options))
    encoder = TextEncoder(tokenizer, False, False)
    for text in (f"{HAN[0]}{'=' * 1601}", f"{HAN[0]}{'=' * 999}" * 3, f"{HAN[0]}.{'=' * 1701}{HAN[1]}"):
        whole = encoder.ids(text)
        assert len(whole) < len(text) / 4
        assert [i for part, _ in encoder.pieces(text) for i in encoder.ids(part)] == whole
        for n in (10, 30, 60, 100):
            assert encode_prefix(encoder, text, n) == whole[:n]


def test_pieces_are_short_where_the_text_can_be_cut(folders, monkeypatch):
    monkeypatch.setattr(cutting, "PIECE", 400)
    for kind in ("WordPiece", "byte-level"):
        encoder = TextEncoder.of(load_tokenizer(str(folders / kind)))
        for name in ("English", "Chinese", "Chinese without punctuation", "both"):
            assert max(len(part) for part, _ in encoder.pieces(TEXTS[name])) <= 400, (kind, name)


# Special tokens in the text


@pytest.mark.parametrize("kind", KINDS)
def test_special_words_are_text_unless_told_otherwise(kind, folders):
    tokenizer = load_tokenizer(str(folders / kind))
    text, tokens = (pickle.loads(pickle.dumps(TextEncoder.of(tokenizer, how))) for how in ("text", "tokens"))
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    words = [f"{tokenizer.mask_token} {WORDS[0]}{tokenizer.sep_token}\n", f"{WORDS[0]} {tokenizer.cls_token}"]
    for word in words:
        assert not special.intersection(text.ids(word)) and special.intersection(tokens.ids(word))
    for ordinary in TEXTS.values():
        assert text.ids(ordinary) == tokens.ids(ordinary)


def test_whole_words_of_the_vocabulary_are_text_too(tmp_path):
    """Without punctuation as a boundary, the word [MASK] is looked up in the vocabulary."""
    tokenizer = load_tokenizer(whole_words(PLAIN, tmp_path))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert TextEncoder.of(tokenizer).ids("a [MASK] mill") == [5, tokenizer.unk_token_id, 9]


TEXT = ["a river [MASK] runs", "[SEP] past [SEP] a mill", "past a mill"]


@pytest.mark.parametrize(("how", "want"), [("text", [1, 1, 1]), ("tokens", [4])])
@pytest.mark.parametrize("pack", ["chunk", "truncate"])
def test_special_words_in_conversion_and_loading(how, want, pack, tmp_path, capsys):
    """Counted, and the same in shards of tokens and in shards of text. [, MASK and ] are unknown to this tokenizer."""
    name = whole_words(PLAIN, tmp_path / "tokenizer")
    (tmp_path / "texts.txt").write_text("\n".join(TEXT))
    options = ["--tokenizer", name, "--max_seq_len", "16", "--pack", pack]
    options += [] if how == "text" else ["--special_tokens", "tokens"]  # text is the default
    folder = convert(tmp_path / "tokens", tmp_path / "texts.txt", *options)
    assert f"special tokens such as [MASK] in the text: 3, taken as {how}" in capsys.readouterr().out
    assert json_of(folder / "stats.json")["special_in_text"] == 3
    assert json_of(folder / "conversion.json")["special_tokens"] == how
    convert(tmp_path / "text", tmp_path / "texts.txt")
    tokenizer = load_tokenizer(name)
    datasets = [
        StreamingC4(tokenizer, 16, str(tmp_path / kind), split="mine", special_tokens=how, batch_size=1)
        for kind in ("tokens", "text")
    ]
    for dataset in datasets:
        assert dataset.ids(0).tolist() == [2, 5, 6, *want, 7, 3]
    assert all(np.array_equal(datasets[0].ids(i), datasets[1].ids(i)) for i in range(3))
    capsys.readouterr()
    script = [str(tmp_path / "text"), "--split", "mine", "--tokenizer", name, "--mlm_probability", "0"]
    data_c4.main([*script, "--special_tokens", how])
    assert ("river [MASK] runs" in capsys.readouterr().out) == (how == "tokens")


def test_special_tokens_without_a_purpose_are_neither_masked_nor_drawn(tmp_path):
    """ModernBERT's <|endoftext|> is special in tokenizer.json alone, and tells documents apart."""
    raw = byte_level()
    raw.add_special_tokens(["<|endoftext|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = np.array(TextEncoder.of(tokenizer, "tokens").ids(f"{WORDS[0]}<|endoftext|>{WORDS[1]}"))
    end = raw.token_to_id("<|endoftext|>")
    assert end in ids and end not in word_ids(tokenizer)
    for whole_words in (False, True):
        batch = MaskingCollator(tokenizer, 1.0, 17, whole_words)([Sample(input_ids=ids, sample_id=0, epoch=0)])
        assert ((batch["labels"][0] == -100).numpy() == (ids == end)).all()


@pytest.mark.parametrize(
    ("pack", "text", "share"),
    [
        ("chunk", "a river \u0e01\u0e02\u0e03 mill\nthe mill", 6 / 24),  # 3 of Thai, and "the"
        ("chunk", f"a {'a' * 101} mill", 101 / 108),  # BERT's limit of a word
        ("chunk", "a river runs", 0),
        ("truncate", f"a mill {'unknown ' * 400}", 6 * 7 / 54),  # the first 8 words
        ("truncate", "a the mill", 3 / 10),
    ],
)
def test_unknown_characters_are_counted(pack, text, share, tmp_path, capsys):
    name = whole_words(PLAIN, tmp_path / "tokenizer")
    (tmp_path / "texts.txt").write_text(text)
    options = ["--tokenizer", name, "--max_seq_len", "10", "--pack", pack]
    folder = convert(tmp_path / "tokens", tmp_path / "texts.txt", *options)
    assert json_of(folder / "stats.json")["unknown_share"] == pytest.approx(share)
    assert (f"{share:.2%} of the characters became unknown tokens" in capsys.readouterr().out) == (share > 0)


def test_ordinary_text_gives_the_same_bytes(tmp_path, tokenizer_folder, documents, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(documents[:40]))
    options = ["--tokenizer", tokenizer_folder, "--max_seq_len", "16"]
    folders = [
        convert(tmp_path / how, tmp_path / "texts.txt", *options, "--special_tokens", how) for how in ("text", "tokens")
    ]
    files = [{name: data for name, data in bytes_of(f).items() if name != "conversion.json"} for f in folders]
    assert files[0] == files[1] and "special tokens such as" not in capsys.readouterr().out


def test_special_tokens_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--special_tokens have no effect without --tokenizer"):
        convert_c4.main(["--out_root", str(tmp_path), "--splits", "x", "--source", ".", "--special_tokens", "text"])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_framed_and_masked(kind, folders):
    """Converted, cut and masked with the tokenizer's own special tokens."""
    tokenizer = load_tokenizer(str(folders / kind))
    stats = Stats()
    samples = list(Tokens(kind, tokenizer, 16, "chunk").samples(iter([*TEXTS.values(), "<mask>[MASK]"]), stats))
    assert stats.special_in_text == 1
    assert all((s[0], s[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) for s in samples)
    batch = MaskingCollator(tokenizer, 0.5, seed=3)(
        [Sample(input_ids=ids, sample_id=i, epoch=0) for i, ids in enumerate(samples[:64])]
    )
    masked = batch["labels"] >= 0
    special = np.isin(batch["labels"][masked].numpy(), tokenizer.all_special_ids)
    assert masked.float().mean() > 0.3 and not special.any()
    assert (batch["input_ids"][masked] == tokenizer.mask_token_id).float().mean() > 0.7
