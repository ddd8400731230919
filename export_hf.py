"""A checkpoint -> a Hugging Face folder, which needs only torch and transformers to load.

python export_hf.py runs/mine/checkpoints OUT [--tokenizer NAME] [--max_length N] [--onnx [--int8]] [--overwrite]

OUT holds the config, the tokenizer, the weights (safetensors), the model's source, which trust_remote_code loads, and a
model card. It appears only after another process has loaded it and computed the checkpoint's outputs with it.
"""

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from src.common.errors import CheckpointError, ConfigError, ExportError
from src.common.files import PARTIAL, replace_folder
from src.configuration_bert import MosaicBertConfig
from src.export import hf, onnx, sentences
from src.export.card import model_card
from src.train import weights

FILES = {
    *("config.json", "model.safetensors", "model.onnx", "model.int8.onnx", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
    *sentences.FILES,
}
"""Files that an exported folder may hold, besides the source and the folders of sentence-transformers' modules."""


def is_exported(path: Path) -> bool:
    """Whether an exported folder may hold this file, by its path in the folder."""
    if len(path.parts) == 1:
        return path.suffix == ".py" or path.name in FILES
    return sentences.is_module_file(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of main.py, its folder, or a Hugging Face folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--tokenizer", help="folder or hub name; required if none is known for the checkpoint")
    parser.add_argument(
        "--max_length", type=int, help="tokens at which the tokenizer truncates (default: the run's max_seq_len)"
    )
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx, for any batch size and length")
    parser.add_argument("--int8", action="store_true", help="with --onnx: also write model.int8.onnx, quantised")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported folder")
    args = parser.parse_args(argv)
    out: Path = args.out
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists; replace it with --overwrite, or choose another OUT")
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    others = [str(path) for path in files if not is_exported(path)]
    if others:
        raise ConfigError(f"{out} holds more than an exported model ({min(others)}), so it is not replaced; change OUT")
    if args.int8 and not args.onnx:
        raise ConfigError("--int8 quantises the graph of --onnx: give both")
    source = weights.read(args.checkpoint)
    if args.onnx:
        missing = [name for name in onnx.PACKAGES if find_spec(name) is None]
        if missing:
            raise ConfigError(f"--onnx needs {', '.join(missing)}: pip install -r requirements-onnx.txt")
        if not isinstance(source.config, MosaicBertConfig):
            raise ConfigError("--onnx is for MosaicBERT; export Hugging Face's BERT with optimum")
    try:
        tokenizer = weights.load_tokenizer(source, args.tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: --tokenizer FOLDER") from None
    tokenizer.model_max_length = sentences.max_length(source, tokenizer, args.max_length)
    auto_class, model = hf.load_model(source)

    partial = out.with_name(f"{out.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        card = model_card(source, auto_class, hf.AUTO_CLASSES[auto_class][1], tokenizer.model_max_length, out)
        hf.write_folder(model, tokenizer, card, partial)
        if auto_class in sentences.AUTO_CLASSES:
            hidden_size: int = model.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue]
            sentences.write_pooling(source.path, hidden_size, tokenizer.model_max_length, partial)
        want = hf.reference_outputs(model)
        got, text_ids = hf.outputs_elsewhere(partial, auto_class, want.ids, want.mask)
        if text_ids != tokenizer(hf.TEXT)["input_ids"]:
            raise ExportError("the exported tokenizer returns other token ids; nothing was exported; please report it")
        difference = want.difference(got, "the exported model")
        if args.onnx:
            onnx.write(model, partial, args.int8)  # pyright: ignore[reportArgumentType]
        replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"export max_abs_logit_diff={difference:.3g} parameters={model.num_parameters()}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"export_hf.py: {error}")
    except KeyboardInterrupt:
        sys.exit("export_hf.py: interrupted; nothing was exported")
