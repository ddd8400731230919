"""The recipe's code.

The model lies flat in this folder, as Hugging Face's trust_remote_code loader needs it: files that import their
siblings, torch and transformers only, and that an export copies byte for byte.

    configuration_bert     shape of a model                     bert_layers      the model and its heads
    bert_padding           between (B, S) and (T) tokens        bert_encoder     embeddings, layers
    graphs                 whether torch records a graph        attention        ALiBi attention, five implementations
    masked_lm_loss         loss of the masked tokens            attention_tiles  sizes and tables of its kernels' tiles
    torch_ops              the kernels' work in plain PyTorch   triton_common    what the kernels share
    flash_attn_triton, layer_norm_triton, geglu_triton, cross_entropy_triton     the kernels

    mosaic_bert, hf_bert   both models as ComposerModels        data_c4          StreamingC4 and its loader

    common/  errors, files, hub     data/    shards -> batches       convert/   text -> shards
    train/   YAML -> trained model  finetune/  labelled files        export/    checkpoint -> Hugging Face folder

Who may import whom: tests/test_imports.py.
"""
