"""Tokenizers: loading, saving, fingerprints. Ids are the same under transformers 4 and 5."""

import hashlib
import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from src.common.errors import DataError, first_line

log = logging.getLogger(__name__)


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer with BERT's special tokens: from a folder, else the local cache, else the Hugging Face Hub.

    Raises:
        DataError: it is not there, cannot be read or is not fast; it lacks one of [CLS], [SEP], [MASK], [PAD], or two
            of them are the same; it has no words, one id for two words, or no entry for unknown words.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        tokenizer = _from_folder(folder, name_or_folder)
    elif name_or_folder.startswith((".", "/", "~")) or name_or_folder.count("/") > 1:
        raise DataError(f"tokenizer {name_or_folder!r}: there is no such folder")
    else:
        tokenizer = _from_cache_or_hub(name_or_folder)
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {name_or_folder!r} has no fast version (tokenizer.json), which is required")
    _restore_saved_parts(tokenizer, name_or_folder)
    _find_special_tokens(tokenizer)
    if fault := _fault(tokenizer):
        raise DataError(f"tokenizer {name_or_folder!r} {fault}")
    _frame(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json set truncation and padding
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


FILES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
"""Files that hold a vocabulary. The first is enough alone; the others need one that names the class."""


def _from_folder(folder: Path, name: str) -> Any:
    """The tokenizer of a folder; raises DataError for what transformers would take as missing or guess."""
    described = ("tokenizer_config.json", "config.json")
    present = {file for files in (*FILES, described) for file in files if os.path.lexists(folder / file)}
    for file in sorted(present):
        if not (folder / file).is_file():
            raise DataError(f"tokenizer {name!r}: {file} is a broken link, or not a regular file")
    found = next((files for files in FILES if present.issuperset(files)), None)
    if found is None:  # transformers 5 would make one that knows no word
        raise DataError(
            f"tokenizer {name!r}: this folder holds no tokenizer.json and no vocab.txt, nor vocab.json with merges.txt"
        )
    if present.intersection(described):
        return _from_pretrained(name, local_files_only=True)
    if found != FILES[0]:
        kind = "BertTokenizer" if found == FILES[1] else "RobertaTokenizer"
        options = ', "do_lower_case": true or false' if found == FILES[1] else ""
        raise DataError(
            f"tokenizer {name!r}: {' and '.join(found)} alone do not say how to tokenize; add a tokenizer_config.json: "
            f'{{"tokenizer_class": "{kind}"{options}}}'
        )
    try:
        saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library has no class of its own
        raise DataError(f"tokenizer {name!r}: tokenizer.json cannot be read ({first_line(error)[:200]})") from None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=saved, name_or_path=name)
    tokenizer.backend_tokenizer.pre_tokenizer = saved.pre_tokenizer  # transformers 4 clears its add_prefix_space
    return tokenizer


def _find_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Take [CLS] or <s>, [SEP] or </s>, ... of the vocabulary where the files do not say which token it is."""
    names = {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>")}
    names |= {name: (f"[{name.upper()}]", f"<{name}>") for name in ("mask", "pad", "unk")}
    vocabulary, found = tokenizer.get_vocab(), dict[str, Any]()
    for name, words in names.items():
        if getattr(tokenizer, f"{name}_token") is None and (known := [word for word in words if word in vocabulary]):
            found[f"{name}_token"] = known[0]
    if found:
        log.info("tokenizer %r: %s by their names", tokenizer.name_or_path, ", ".join(found.values()))
        tokenizer.add_special_tokens(found)


def _frame(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make a tokenizer that adds no special tokens to a text return [CLS] A [SEP], as in pretraining."""
    backend = tokenizer.backend_tokenizer
    if backend.num_special_tokens_to_add(is_pair=False):
        return
    cls, sep = str(tokenizer.cls_token), str(tokenizer.sep_token)
    special = [(word, tokenizer.convert_tokens_to_ids(word)) for word in (cls, sep)]
    frame = TemplateProcessing(single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=special)
    own = backend.post_processor  # such as ByteLevel, which trims offsets
    backend.post_processor = frame if own is None else Sequence([own, frame])
    log.info("tokenizer %r: it frames no text; texts become %s A %s", tokenizer.name_or_path, cls, sep)


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest id + 1: the number of entries, unless ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def word_ids(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64]:
    """Ids, in order, that exist and are no special token's."""
    return np.array(sorted({*tokenizer.get_vocab().values()}.difference(special_ids(tokenizer))), np.int64)


def special_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """How the special tokens are written: [CLS], [MASK], ... and others that the tokenizer treats as such."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of ``special_words``, which masking neither masks nor draws."""
    return tokenizer.convert_tokens_to_ids(special_words(tokenizer))  # pyright: ignore[reportReturnType]


def text_backend(tokenizer: PreTrainedTokenizerFast, special_tokens: str = "text") -> Tokenizer:
    """The tokenizer of texts. Ids of texts without special words do not depend on ``special_tokens``.

    Args:
        special_tokens: what a word such as [MASK] in a text becomes: with ``text`` ordinary word pieces, with
            ``tokens`` the special token.
    """
    backend = tokenizer.backend_tokenizer
    if special_tokens == "tokens":
        return backend
    # The library's encode_special_tokens is lost in pickling, and SentencePiece's model knows the words all the same.
    content = json.loads(backend.to_str())
    names = {word: f"\uffff{word}\uffff" for word in special_words(tokenizer)}  # no text holds this code point
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): i for word, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not names.keys() & {*pair, "".join(pair)}]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(content))


def _fault(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Why BERT cannot be trained with this tokenizer."""
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "mask", "pad")}
    if lacking := [name for name, i in special.items() if i is None]:
        return f"has no {', '.join(lacking)} token, which BERT needs"
    special |= {} if tokenizer.unk_token_id is None else {"unk": tokenizer.unk_token_id}
    for (one, i), (other, j) in itertools.combinations(special.items(), 2):
        if i == j:
            return f"has one token, {tokenizer.convert_ids_to_tokens(i)!r}, as its {one} token and its {other} token"
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) <= len(set(tokenizer.all_special_ids)):
        return f"has {len(vocabulary)} entries, and all of them are special tokens"
    if len({*vocabulary.values()}) < len(vocabulary):
        ordered = sorted(vocabulary.items(), key=lambda entry: entry[1])
        one, other, i = next((a, b, i) for (a, i), (b, j) in itertools.pairwise(ordered) if i == j)
        return f"has one id, {i:,}, for two words, {one!r} and {other!r}"
    try:
        tokenizer.backend_tokenizer.model.tokenize("\U0010ffff")  # no character, and in no vocabulary
    except Exception as error:  # the library has no class of its own
        return f"cannot tokenize unknown words ({first_line(error)})"
    return None


def _from_pretrained(name: str, **options: Any) -> Any:
    """Call AutoTokenizer; raises DataError. Never runs a tokenizer's own code, nor asks the user about it."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # OSError, AttributeError, TypeError and others, depending on the file
        hint = "A tokenizer saved by transformers 5 may need transformers 5 (the current stack)"
        if isinstance(error, OSError):
            hint = "Are all of its files there?"
        reason = f"transformers {transformers.__version__} cannot read it ({first_line(error)[:200]})"
        raise DataError(f"tokenizer {name!r}: {reason}. {hint}") from None


def _from_cache_or_hub(name: str) -> Any:
    try:
        return _from_pretrained(name, local_files_only=True)
    except DataError:
        log.warning("tokenizer %r is neither a folder nor cached: asking the Hugging Face Hub", name)
    try:
        huggingface_hub.model_info(name, timeout=10)  # offline it fails at once; from_pretrained retries for a minute
    except Exception as error:  # OSError, ValueError, httpx.HTTPError and others, depending on the client's version
        raise DataError(
            f"tokenizer {name!r} is neither a folder nor cached, and the Hugging Face Hub does not provide it "
            f"({first_line(error)}). Give the path of a tokenizer folder (train_tokenizer.py makes one), or go online"
        ) from None
    return _from_pretrained(name)


def _restore_saved_parts(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Restore what tokenizer.json says, as transformers 4 does.

    transformers 5 builds BERT's tokenizers from the vocabulary, with the model type's normalizer, pre-tokenizer and
    post-processor in place of the saved ones.
    """
    path = cached_file(name, "tokenizer.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    if int(transformers.__version__.split(".")[0]) < 5 or path is None:
        return
    backend, saved = tokenizer.backend_tokenizer, Tokenizer.from_file(path)
    if type(saved.model) is type(backend.model) and saved.get_vocab() == backend.get_vocab():
        backend.model = saved.model
    if not (type(saved.normalizer) is type(backend.normalizer) is BertNormalizer):  # else tokenizer_config.json decides
        backend.normalizer = saved.normalizer
    backend.pre_tokenizer, backend.post_processor = saved.pre_tokenizer, saved.post_processor
    backend.decoder = saved.decoder


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer that AutoTokenizer of transformers 4 and 5 loads with the same ids.

    transformers 5 writes what 4 cannot read: the class TokenizersBackend, a list of extra special tokens.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    except OSError:
        raise
    except Exception as error:  # the library has no class of its own
        raise OSError(f"{folder / 'tokenizer.json'} cannot be written ({first_line(error)})") from None
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        config["additional_special_tokens"] = extra
    for name in ("backend", "is_local", "local_files_only", "model_specific_special_tokens"):
        config.pop(name, None)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer = parts["normalizer"] or {}
    bert_normalizer = normalizer.get("type") == "BertNormalizer"
    if bert_normalizer:  # under both versions these options override tokenizer.json
        config["do_lower_case"], config["strip_accents"] = normalizer["lowercase"], normalizer["strip_accents"]
        config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
    if (prefix := (parts["pre_tokenizer"] or {}).get("add_prefix_space")) is not None:
        config["add_prefix_space"] = prefix  # transformers 4 takes its absence as false
    word_piece = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    word_piece["unk_token"] = str(tokenizer.unk_token)
    is_bert = (
        word_piece.items() <= parts["model"].items()
        and bert_normalizer
        and normalizer["clean_text"]
        and parts["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and parts["post_processor"] in _bert_post_processors(tokenizer)
    )
    if not is_bert or config["tokenizer_class"] == "TokenizersBackend":
        # transformers 5 rebuilds any other class from the vocabulary; this one it reads from tokenizer.json.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256, in hex, of everything that decides which ids a text becomes; the same under transformers 4 and 5."""
    return tokenizer_fingerprints(tokenizer)[0]


def tokenizer_fingerprints(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Today's fingerprint, and those of older shards and checkpoints.

    Their post-processor was as transformers 5 writes it, or lacked the frame that ``load_tokenizer`` adds.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id]
    frames, own = _bert_post_processors(tokenizer), backend["post_processor"]
    forms = [*frames, None] if own in frames else [own]
    if own is not None and own["type"] == "Sequence" and own["processors"][1:] == frames[1:]:
        forms += own["processors"][:1]
    contents = ([{**backend, "post_processor": form}, special] for form in forms)
    return [hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() for content in contents]


def _bert_post_processors(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """[CLS] A [SEP] B [SEP] in tokenizer.json: the form that transformers 4 writes, and the form that 5 writes."""
    cls = str(tokenizer.cls_token), tokenizer.cls_token_id
    sep = str(tokenizer.sep_token), tokenizer.sep_token_id

    def piece(kind: str, name: str, segment: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": segment}}

    single = [piece("SpecialToken", cls[0], 0), piece("Sequence", "A", 0), piece("SpecialToken", sep[0], 0)]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, piece("Sequence", "B", 1), piece("SpecialToken", sep[0], 1)],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (cls, sep)},
    }
    return [{"type": "BertProcessing", "sep": list(sep), "cls": list(cls)}, template]


def continues_word(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.bool_]:
    """Which ids are pieces that continue a word, (V,).

    WordPiece: those with "##". Byte-level: those without "Ġ" or another white space. SentencePiece: those without "▁".
    Special and added tokens never continue a word.

    Raises:
        DataError: the tokenizer marks words in none of these ways.
    """
    parts, vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    rules = json.dumps([parts[name] for name in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    prefix = parts["model"].get("continuing_subword_prefix")
    begins = ("Ġ", "Ċ", "ĉ", "č") if '"ByteLevel"' in rules else ("▁",) if "▁" in rules else ()
    continues = np.zeros(vocab_size(tokenizer), dtype=bool)
    if prefix or begins:
        pieces = vocabulary.keys() - tokenizer.get_added_vocab().keys() - {*tokenizer.all_special_tokens}
        inner = [piece for piece in pieces if (piece.startswith(prefix) if prefix else not piece.startswith(begins))]
        continues[[vocabulary[piece] for piece in inner]] = True
    if not continues.any():
        raise DataError(
            "the tokenizer does not mark which pieces continue a word (as WordPiece does by ##, byte-level BPE by Ġ, "
            "SentencePiece by ▁), so mlm_whole_words cannot be true"
        )
    return continues
