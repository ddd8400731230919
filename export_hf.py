"""A checkpoint -> a Hugging Face folder, which loads where only torch and transformers are.

python export_hf.py runs/mine/checkpoints OUT [--tokenizer NAME] [--onnx] [--overwrite]

OUT holds the config, the tokenizer, the weights (safetensors), the model's source, which trust_remote_code reads, and a
model card. It appears only when another process has loaded it and computed the checkpoint's own outputs with it.
"""

import argparse
import shutil
import sys
from pathlib import Path

from src.common.errors import CheckpointError, ConfigError
from src.common.files import replace_folder
from src.configuration_bert import MosaicBertConfig
from src.export import card, onnx
from src.export.hf import CLASSES, TEXT, check_free, load, load_elsewhere, outputs_of, write
from src.train import weights
from src.train.weights import Pretrained


def card_of(source: Pretrained, auto_class: str, out: Path) -> str:
    """The model card; a folder that is exported again in its place keeps its own, which may have been edited."""
    own = out / "README.md"
    if own.exists() and source.path.resolve() == out.resolve():
        return own.read_text()
    return card.describe(source, auto_class, CLASSES[auto_class][1], out.name)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of main.py, its folder, or a Hugging Face folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--tokenizer", help="folder or hub name, where nothing beside the checkpoint says which it is")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too, for any batch size and length")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported folder")
    args = parser.parse_args(argv)
    check_free(args.out, args.overwrite)
    source = weights.read(args.checkpoint)
    if args.onnx:
        missing = onnx.missing_packages()
        if missing:
            raise ConfigError(f"--onnx needs {', '.join(missing)}: pip install -r requirements-onnx.txt")
        if not isinstance(source.config, MosaicBertConfig):
            raise ConfigError("--onnx is for MosaicBERT; Hugging Face's BERT is exported by optimum")
    try:
        tokenizer = weights.load_tokenizer(source, args.tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: --tokenizer FOLDER") from None
    auto_class, model = load(source)

    partial = args.out.with_name(f"{args.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(model, tokenizer, card_of(source, auto_class, args.out), partial)
        want = outputs_of(model)
        got, text_ids = load_elsewhere(partial, auto_class, want.ids, want.mask)
        if text_ids != tokenizer(TEXT)["input_ids"]:
            raise ConfigError(
                "the exported tokenizer makes other ids of a text; nothing was exported; please report it"
            )
        differs = want.difference(got, "the exported model")
        if args.onnx:
            onnx.export(model, partial / "model.onnx")  # pyright: ignore[reportArgumentType]
            got = onnx.run(partial / "model.onnx", want.ids, want.mask)
            print(f"onnx max_abs_logit_diff={want.difference(got, 'model.onnx'):.3g}")
        replace_folder(partial, args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"export max_abs_logit_diff={differs:.3g} parameters={model.num_parameters()}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"export_hf.py: {error}")
    except KeyboardInterrupt:
        sys.exit("export_hf.py: interrupted; nothing is exported")
