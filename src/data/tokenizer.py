"""Tokenizers: loading, saving, fingerprints, and exact ids of a part of a text."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from src.common.errors import first_line

log = logging.getLogger(__name__)


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer with BERT's special tokens, from a folder, the local cache, or the hub, in that order.

    Raises:
        ValueError: there is none, or it is not fast, or it lacks one of [CLS], [SEP], [MASK], [PAD].
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        if not any((folder / file).exists() for file in ("tokenizer.json", "vocab.txt", "tokenizer_config.json")):
            raise ValueError(f"tokenizer {name_or_folder!r}: this folder holds no tokenizer")
        tokenizer = _from_pretrained(name_or_folder, local_files_only=True)
    elif name_or_folder.startswith((".", "/", "~")) or name_or_folder.count("/") > 1:
        raise ValueError(f"tokenizer {name_or_folder!r}: there is no such folder")
    else:
        tokenizer = _hub_tokenizer(name_or_folder)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name_or_folder!r} has no fast version (no tokenizer.json); it is too slow to use")
    lacking = [name for name in ("cls", "sep", "mask", "pad") if getattr(tokenizer, f"{name}_token_id") is None]
    if lacking:
        raise ValueError(f"tokenizer {name_or_folder!r} has no {', '.join(lacking)} token; BERT's training needs them")
    _restore_saved_parts(tokenizer, name_or_folder)
    # Some folders carry truncation and padding of their own; lengths are ours to decide.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _from_pretrained(name: str, **options: Any) -> Any:
    """transformers' tokenizer; code that comes with one is never run, and nobody is asked whether it may be.

    Raises:
        OSError: it is not there.
        ValueError: this version of transformers cannot read it.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except OSError:
        raise
    except Exception as error:  # whatever a file that it does not understand makes of it
        raise ValueError(
            f"tokenizer {name!r}: transformers {transformers.__version__} cannot read it ({first_line(error)}); what "
            "transformers 5 saved may need 5, the current stack"
        ) from None


def _hub_tokenizer(name: str) -> Any:
    """From the local cache, else from the hub, which is said."""
    try:
        return _from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        log.warning("tokenizer %r is neither a folder nor cached: asking the Hugging Face hub", name)
    try:
        huggingface_hub.model_info(name, timeout=10)  # offline this fails at once; from_pretrained tries for a minute
        return _from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"tokenizer {name!r} is neither a folder, nor cached, nor to be had from the hub ({reason}). "
            "Give the path of a tokenizer folder (train_tokenizer.py makes one), or go online."
        ) from None


def _restore_saved_parts(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Make a tokenizer what its tokenizer.json says, as transformers 4 does.

    transformers 5 builds the tokenizers of a model type from the vocabulary and puts that type's own normalizer,
    pre-tokenizer and post-processor in the place of the saved ones.
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
    """Write a tokenizer that AutoTokenizer of transformers 4 and 5 loads, and that gives the same ids under both.

    What transformers 5 writes is not always read by 4: the class TokenizersBackend, a list of extra special tokens.
    """
    tokenizer.save_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        config["additional_special_tokens"] = extra
    for name in ("backend", "is_local", "local_files_only", "model_specific_special_tokens"):
        config.pop(name, None)
    parts = json.loads(backend.to_str())
    normalizer = parts["normalizer"] or {}
    if normalizer.get("type") == "BertNormalizer":  # both versions let these options win over tokenizer.json
        config["do_lower_case"], config["strip_accents"] = normalizer["lowercase"], normalizer["strip_accents"]
        config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
    word_piece = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    word_piece["unk_token"] = str(tokenizer.unk_token)
    is_bert = (
        word_piece.items() <= parts["model"].items()
        and normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and parts["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and parts["post_processor"] in _bert_post_processors(tokenizer)
    )
    if not is_bert or config["tokenizer_class"] == "TokenizersBackend":
        # transformers 5 builds any other class anew from the vocabulary; this one is what tokenizer.json says.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256, in hex, of all that decides which ids a text becomes.

    [CLS] A [SEP] B [SEP] has two forms in a tokenizer.json, the one that transformers 4 writes and the one that 5
    writes; they have one fingerprint.
    """
    return _fingerprint(tokenizer, 0)


def earlier_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """What shards and checkpoints may hold in its place that were made when the two forms had a fingerprint each."""
    return _fingerprint(tokenizer, 1)


def _fingerprint(tokenizer: PreTrainedTokenizerFast, form: int) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None
    forms = _bert_post_processors(tokenizer)
    if backend["post_processor"] in forms:
        backend["post_processor"] = forms[form]
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([backend, special], sort_keys=True).encode()).hexdigest()


def _bert_post_processors(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], dict[str, Any]]:
    """[CLS] A [SEP] B [SEP] as transformers 4 writes it, and as 5 does."""
    cls = str(tokenizer.cls_token), tokenizer.cls_token_id
    sep = str(tokenizer.sep_token), tokenizer.sep_token_id

    def special(name: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    single = [special(cls[0], 0), {"Sequence": {"id": "A", "type_id": 0}}, special(sep[0], 0)]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}, special(sep[0], 1)],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (cls, sep)},
    }
    return {"type": "BertProcessing", "sep": list(sep), "cls": list(cls)}, template


def encode_prefix(tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int) -> list[int]:
    """The first ``max_tokens`` ids of ``text``, no special tokens, without tokenizing all that is cut off.

    The text is cut between words, where WordPiece and byte-level BPE cut too, so the ids are exact.
    """
    characters = 6 * max_tokens  # English has 4 to 5 characters a word piece
    while True:
        end = len(text)
        if characters < end:
            end = _last_blank(text, 0, characters)
            end = len(text) if end <= 0 else end
        ids = tokenizer.backend_tokenizer.encode(text[:end], add_special_tokens=False).ids
        if len(ids) >= max_tokens or end == len(text):
            return ids[:max_tokens]
        characters *= 2


def encode_crop(tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int, turn: int) -> list[int]:
    """At most ``max_tokens`` ids of ``text``, no special tokens, from another place each turn: in time, all of them.

    The text is cut between words into stretches, of which only the turn's is tokenized, and its ids into windows. So
    the work does not grow with the text, and the ids are exact. The last stretch reaches back to be as long as the
    others, and so does the last window.
    """
    size = 8 * max_tokens  # characters: the ids of one or two windows

    def between_words(at: int) -> int:
        blank = _last_blank(text, max(at - size, 0), at)
        return at if blank < 0 else blank

    stretches = max(1, -(-len(text) // size))
    stop = min((turn % stretches + 1) * size, len(text))
    start = between_words(max(stop - size, 0))
    stop = between_words(stop) if stop < len(text) else stop
    ids = tokenizer.backend_tokenizer.encode(text[start:stop], add_special_tokens=False).ids
    windows = max(1, -(-len(ids) // max_tokens))
    end = min((turn // stretches % windows + 1) * max_tokens, len(ids))
    return ids[max(end - max_tokens, 0) : end]


def _last_blank(text: str, start: int, stop: int) -> int:
    """Position of the last blank or line break in ``text[start:stop]``, or -1."""
    return max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))


PIECE = 1 << 14
"""Characters. Longer documents are tokenized in pieces, which end at white space where there is any."""


def end_of_prefix(text: str, characters: int) -> int:
    """Where the first ``characters`` of ``text`` end if no word may be cut: at white space, where tokenizers cut too.

    White space is looked for backwards, then forwards up to ``PIECE``; without any the cut is there.
    """
    if characters >= len(text):
        return len(text)
    end = max(text.rfind(" ", 0, characters), text.rfind("\n", 0, characters))
    if end > 0:
        return end
    ahead = max(characters, PIECE)
    found = [at for at in (text.find(" ", characters, ahead), text.find("\n", characters, ahead)) if at > 0]
    return min([*found, ahead, len(text)])


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Consecutive parts of at most ``PIECE`` characters, each with whether it is the last."""
    start = 0
    while len(text) - start > PIECE:
        end = start + end_of_prefix(text[start : start + PIECE + 1], PIECE)
        yield text[start:end], False
        start = end
    yield text[start:], True
