"""Deliberate faults in critical lines, and the tests that must see them.

python -m tests.mutants [--jobs 2] [--only NAME ...]

Copies the checkout, runs the named tests on the copy (all must pass), then with one fault after another. A fault is
killed if a named test fails, and has survived if all pass; anything else (no import, no such test) is an error.

Ends with ``mutants applied=N killed=N survived=N``; exit status 1 unless every fault was applied and killed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """A fault."""

    name: str
    file: str
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    tests: str
    """What must turn red: files or ``file::test`` below tests/, separated by blanks."""

    def apply(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError unless the old text occurs exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has its text {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)


BUILDERS, VALIDATE = "src/train/builders.py", "src/train/validate.py"
CALLBACKS, MONITORS, MASKING = "src/train/callbacks.py", "src/train/monitors.py", "src/data/masking.py"
MODEL, ENCODER, ATTENTION = "src/bert_layers.py", "src/bert_encoder.py", "src/attention.py"
LOSS = "src/masked_lm_loss.py"
CROSS_ENTROPY = "src/cross_entropy_triton.py"
FILES, CHECKPOINT, RESUME = "src/common/files.py", "src/train/checkpoint.py", "src/train/resume.py"
BATCHES, WEIGHTS, METRICS = "src/data/microbatches.py", "src/train/weights.py", "src/mosaic_bert.py"
ORDER, DATA, OPTIM = "src/data/order.py", "src/train/data.py", "src/train/optim.py"
STREAMING_C4, INDEX_FILE = "src/data_c4.py", "src/data/index.py"
SHARDS, ENDING, STOPPERS = "src/data/shards.py", "src/train/ending.py", "src/train/stoppers.py"
TEXTS = "src/finetune/kinds/texts.py"
AOT, ROOFLINE, PUBLISH = "benchmarks/kernels/aot.py", "benchmarks/speed/roofline.py", "benchmarks/publish.py"
SCHEMA, YAML = "src/train/schema.py", "src/train/yaml12.py"

RESEEDING = "train/test_callbacks.py::test_reseeding_depends_on_seed_step_and_rank"
ONE_CAST = "train/test_callbacks.py::test_weights_are_cast_once_per_step"
STEP = "train/test_monitors.py::test_step_monitor_averages_over_its_window"
DEFINITION = "data/test_masking.py::test_each_position_follows_from_the_definition"
CHANGES = "data/test_masking.py::test_masks_change_with_seed_epoch_and_sample"
PADDED = "model/test_bert_layers.py::test_equals_the_padded_model"
PLACES = "model/test_bert_layers.py::test_dropout_acts_in_three_places_and_nowhere_else"
ON_DISK = "test_files.py::test_file_is_on_the_disk_before_its_name_and_then_the_name"
REFUSES = "train/test_resume.py::test_resume_refuses_changed_settings_with_both_values"
ONCE = "data/test_data_c4.py::test_evaluation_sees_each_sample_once"
WINDOWS = "data/test_data_c4.py::test_windows_and_the_order_in_them_change_with_epoch_and_seed"
GROUPED = "data/test_data_c4.py::test_grouped_batches_are_the_same_for_any_number_of_processes"
INDEX = "data/test_index.py::test_each_fault_is_named"
OPENED = "data/test_index.py::test_shard_is_compared_with_the_index_when_it_is_opened"
SECRETS = "train/test_environment_values.py"
OVERRIDES = "train/test_config.py::test_what_an_override_changes"
CLASSES = "finetune/test_classifier.py::test_metrics_of_three_classes"

MUTANTS = [
    # Model
    Mutant(
        "attention-scale",
        ATTENTION,
        "k_BNSH.transpose(-1, -2) * q_BNSH.shape[-1] ** -0.5",
        "k_BNSH.transpose(-1, -2) / q_BNSH.shape[-1]",
        "model/test_attention.py::test_reference_is_the_formula",
    ),
    Mutant(
        "alibi-slopes",
        ATTENTION,
        "range(0, 2 * (num_heads - power), 2)",
        "range(num_heads - power)",
        "model/test_attention.py::test_slopes_of_a_power_of_two_and_of_twelve",
    ),
    Mutant(
        "alibi-bias-bf16",
        ATTENTION,
        "(row[:, None] - column).abs()  #",
        "(row[:, None] - column).abs().to(torch.bfloat16).to(dtype)  #",
        "model/test_attention.py::test_bias_is_exact_at_long_distances",
    ),
    Mutant(
        "alibi-of-flash-attn-4",
        ATTENTION,
        "head[0]] * abs(q_idx - kv_idx)",
        "head[0]] * (q_idx - kv_idx)",
        "model/test_attention.py::test_flash_attn_4_is_given_alibi",
    ),
    Mutant(
        "keys-beyond-the-end",
        "src/flash_attn_triton.py",
        "first, *args, H, COLS, UPCAST, True)",
        "first, *args, H, COLS, UPCAST, False)",
        "model/test_flash_attn_triton.py::test_equals_reference",
    ),
    Mutant(
        "compiled-for-a-number-of-tiles",
        "src/layer_norm_triton.py",
        'do_not_specialize=["key_ptr", "T", "tiles"]',
        'do_not_specialize=["key_ptr", "T"]',
        "benchmarks/test_launches.py::test_no_batch_compiles_a_kernel_again",
    ),
    Mutant(
        "no-key-of-its-own",
        ENCODER,
        "key = draw_key(input) if p and key is None else key",
        "pass",
        "model/test_kernels.py::test_a_layer_alone_draws_its_keys",
    ),
    Mutant(
        "compiled-for-a-number-of-tokens",
        "src/flash_attn_triton.py",
        'do_not_specialize=["stride_delta", "num_tokens"]',
        'do_not_specialize=["stride_delta"]',
        "benchmarks/test_launches.py::test_no_batch_compiles_a_kernel_again",
    ),
    Mutant(
        "keys-beyond-a-whole-sequence",
        "src/flash_attn_triton.py",
        'scores = tl.where((rows < length)[:, None], scores, float("-inf"))',
        "scores = scores",
        "model/test_flash_attn_triton.py::test_scores_far_below_zero",
    ),
    Mutant(
        "alibi-slopes-cast",
        ATTENTION,
        "super()._apply(fn, recurse)\n        self.fill(self.slopes.device)",
        "super()._apply(fn, recurse)",
        "model/test_bert_layers.py::test_slopes_stay_fp32_and_out_of_the_state_dict",
    ),
    Mutant(
        "autocast-scores",
        ATTENTION,
        "with torch.autocast(q.device.type, enabled=False):",
        "with torch.autocast(q.device.type, enabled=torch.is_autocast_enabled(q.device.type)):",
        "model/test_attention.py::test_autocast_does_not_lower_the_scores",
    ),
    Mutant(
        "glu-halves",
        "src/torch_ops.py",
        "gate, up = gate_and_up.chunk(2, dim=-1)\n        out =",
        "up, gate = gate_and_up.chunk(2, dim=-1)\n        out =",
        PADDED,
    ),
    Mutant(
        "gelu-tanh", "src/torch_ops.py", "F.gelu(gate).mul_(up)", 'F.gelu(gate, approximate="tanh").mul_(up)', PADDED
    ),
    Mutant(
        "dropout-key-shared",
        ENCODER,
        "keys[2 * i : 2 * i + 2]",
        "keys[:2]",
        "benchmarks/test_launches.py::test_each_dropout_has_its_own_key",
    ),
    Mutant(
        "tokens-specialised",
        "src/geglu_triton.py",
        '(do_not_specialize=["key_ptr", "T"])\n    def geglu_forward',
        "\n    def geglu_forward",
        "benchmarks/test_launches.py::test_no_batch_compiles_a_kernel_again",
    ),
    Mutant("layer-norm-eps", ENCODER, "eps=config.layer_norm_eps", "eps=1e-5", PADDED),
    Mutant("dropout-mlp", ENCODER, "(self.wo(hidden), residual=x)", "(self.wo(hidden), x, self.dropout_p)", PLACES),
    Mutant(
        "dropout-embeddings",
        ENCODER,
        "dropout(self.LayerNorm(x), self.dropout_p, self.training)",
        "self.LayerNorm(x)",
        PLACES,
    ),
    Mutant(
        "last-layer-rows",
        ENCODER,
        "rows if i == len(self.layer) - 1 else None",
        "None",
        "model/test_bert_layers.py::test_last_layer_computes_only_masked_rows",
    ),
    Mutant(
        "unpad-indices",
        "src/bert_padding.py",
        "mask, positions = mask[order], positions[order]",
        "mask = mask[order]",
        "model/test_bert_padding.py::test_pad_inverts_unpad",
    ),
    Mutant(
        "head-past-its-module",
        MODEL,
        "logits = self.cls(states[-1])",
        "logits = F.linear(self.cls.predictions.transform(states[-1]),"
        " self.get_input_embeddings().weight, self.cls.predictions.decoder.bias)",
        "model/test_bert_layers.py::test_every_weight_goes_through_its_module",
    ),
    Mutant(
        "graph-of-one-mask",
        MODEL,
        "PaddedLayout(mask) if in_exported_graph() else self.layout(mask)",
        "self.layout(mask)",
        "model/test_bert_layers.py::test_a_traced_model_is_right_for_other_masks_and_shapes",
    ),
    Mutant(
        "distances-over-padding",
        ATTENTION,
        "mask_BS.long().cumsum(1)",
        "torch.ones_like(mask_BS, dtype=torch.int64).cumsum(1)",
        "model/test_bert_layers.py::test_a_traced_model_is_right_for_other_masks_and_shapes",
    ),
    Mutant(
        "attention-weights-in-bf16",
        ENCODER,
        "with torch.autocast(x.device.type, enabled=False):  # scores",
        "with torch.no_grad():  # scores",
        "model/test_bert_layers.py::test_attention_weights_are_those_of_the_definition",
    ),
    Mutant(
        "items-in-batch",
        MODEL,
        "mean_loss(out.loss_sum, out.count, num_items_in_batch)",
        "out.loss",
        "model/test_bert_layers.py::test_microbatches_add_up_to_the_batch_by_the_number_of_items",
    ),
    Mutant(
        "mask-values",
        MODEL,
        "if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):",
        "if False:",
        "model/test_bert_layers.py::test_inputs_that_do_not_fit_are_refused_with_their_shapes",
    ),
    # Loss and metrics
    Mutant(
        "label-off-by-one",
        LOSS,
        "block.gather(1, labels[rows, None].clamp(min=0))",
        "block.gather(1, (labels[rows, None] - 1).clamp(min=0))",
        "model/test_masked_lm_loss.py",
    ),
    Mutant(
        "label-zero",
        LOSS,
        "[best == labels, labels >= 0]",
        "[best == labels, labels > 0]",
        "model/test_masked_lm_loss.py",
    ),
    Mutant(
        "sum-not-rescaled",
        CROSS_ENTROPY,
        "tl.where(higher, total * ratio + 1.0, total + ratio)",
        "tl.where(higher, total + 1.0, total + ratio)",
        "model/test_cross_entropy_triton.py::test_loss_and_gradient",
    ),
    Mutant(
        "last-of-equal-logits",
        CROSS_ENTROPY,
        "tl.min(tl.where(top == row_top, best, V), axis=0)",
        "tl.max(tl.where(top == row_top, best, -1), axis=0)",
        "model/test_cross_entropy_triton.py::test_the_highest_logits_are_counted_as_torch_does",
    ),
    Mutant(
        "kernel-writes-in-silence",
        CROSS_ENTROPY,
        "torch.autograd.graph.increment_version(logits)",
        "pass",
        "model/test_masked_lm_loss.py::test_logits_that_something_else_saved_are_not_overwritten_in_silence",
    ),
    Mutant(
        "count-clamp",
        LOSS,
        "count.clamp(min=1)",
        "count",
        "model/test_masked_lm_loss.py::test_without_labels_loss_and_gradients_are_zero",
    ),
    Mutant(
        "no-items-in-batch",
        LOSS,
        "items.clamp(min=1) if isinstance",
        "items if isinstance",
        "model/test_bert_layers.py::test_no_item_in_all_microbatches_of_a_step_is_a_loss_of_zero",
    ),
    Mutant(
        "hooked-logits-overwritten",
        LOSS,
        "type(module) not in ours or module._forward_hooks for",
        "type(module) not in ours for",
        "model/test_bert_layers.py::test_hooks_may_keep_and_change_the_logits",
    ),
    Mutant(
        "loss-mean-of-microbatches",
        "src/train/builders.py",
        "accumulate_train_batch_on_tokens=True",
        "accumulate_train_batch_on_tokens=False",
        "train/test_main.py::test_loss_and_gradients_do_not_depend_on_the_microbatch",
    ),
    Mutant(
        "metrics-averaged-over-ranks",
        METRICS,
        'dist_reduce_fx="sum"',
        'dist_reduce_fx="mean"',
        "model/test_mosaic_bert.py::test_metrics_are_summed_over_ranks",
    ),
    Mutant(
        "perplexity",
        METRICS,
        "super().compute().exp()",
        "super().compute()",
        "model/test_mosaic_bert.py::test_metrics_are_sums_in_fp64",
    ),
    Mutant(
        "flops",
        METRICS,
        "return 6 * (layers",
        "return 12 * (layers",
        "model/test_mosaic_bert.py::test_flops_equal_those_of_the_matrix_products",
    ),
    # Batches
    Mutant(
        "padding-counted",
        BATCHES,
        '_counted(batch, batch["attention_mask"].numpy().sum(axis=1))',
        '_counted(batch, np.full(len(batch["input_ids"]), batch["input_ids"].shape[1]))',
        "data/test_microbatches.py::test_tokens_of_a_padded_batch_do_not_count_padding",
    ),
    Mutant(
        "label-zero-not-counted",
        BATCHES,
        '(batch["labels"].numpy() >= 0)',
        '(batch["labels"].numpy() > 0)',
        "data/test_microbatches.py::test_tokens_of_a_padded_batch_do_not_count_padding",
    ),
    Mutant(
        "split-order", BATCHES, "np.argsort(-lengths_B[part]", "np.argsort(lengths_B[part]", "data/test_microbatches.py"
    ),
    Mutant(
        "masked-index-of-the-batch", BATCHES, "masked_M[m:m_end] - t", "masked_M[m:m_end]", "data/test_microbatches.py"
    ),
    Mutant("tables-of-the-batch", BATCHES, "whole[:, 0] -= ", "whole[:, 0] -= 0 * ", "data/test_microbatches.py"),
    Mutant("views-not-aligned", "src/data/packing.py", "ALIGNMENT = 4", "ALIGNMENT = 2", "data/test_microbatches.py"),
    Mutant(
        "nothing-masked",
        BATCHES,
        "int(self) / total if self else 0.0",
        "int(self) / total",
        "data/test_microbatches.py",
    ),
    Mutant("epoch-gaps", ORDER, "last[last < starts[1:]]", "last", "data/test_order.py"),
    Mutant("fillers-counted", BATCHES, "np.where(batch[", "np.where(~batch[", "data/test_microbatches.py"),
    # Masking
    Mutant("hash-without-epoch", MASKING, "_mix(key ^ epochs.astype(np.uint64))", "_mix(key)", CHANGES),
    Mutant("hash-without-sample", MASKING, " ^ sample_ids.astype(np.uint64))", ")", CHANGES),
    Mutant("hash-without-seed", MASKING, "np.full(len(lengths), seed)", "np.full(len(lengths), 0)", CHANGES),
    Mutant(
        "masking-rate", MASKING, "np.flatnonzero(u < self.rate)", "np.flatnonzero(u < 0.99 * self.rate)", DEFINITION
    ),
    Mutant("mask-share", MASKING, "choice < 0.8,", "choice < 0.81,", DEFINITION),
    Mutant("random-share", MASKING, "choice < 0.9,", "choice < 0.89,", DEFINITION),
    Mutant(
        "last-word",
        MASKING,
        "np.uint64(len(self.words))",
        "np.uint64(len(self.words) - 1)",
        "data/test_masking.py::test_random_words_are_of_the_whole_vocabulary",
    ),
    Mutant("label", MASKING, "labels[masked] = ids[masked]", "labels[masked] = ids[masked - 1]", DEFINITION),
    Mutant(
        "special-tokens-masked",
        MASKING,
        "self.is_special[special_ids(tokenizer)] = True",
        "self.is_special[tokenizer.pad_token_id] = True",
        "data/test_masking.py::test_special_tokens_inside_a_text_are_never_masked",
    ),
    Mutant(
        "masking-late",
        CALLBACKS,
        "* elapsed.value",
        "* max(0.0, elapsed.value - 0.25)",
        "train/test_callbacks.py::test_scheduled_rate_follows_the_elapsed_share_of_the_run",
    ),
    # Order, mixtures, evaluation
    Mutant("length-grouping", ORDER, ".reshape(count, batch)[permuted]", ".reshape(batch, count).T[permuted]", GROUPED),
    Mutant(
        "length-grouping-in-order",
        ORDER,
        "permuted = rng.permutation(count)",
        "permuted = np.arange(count)",
        "data/test_data_c4.py::test_batches_of_a_window_are_permuted",
    ),
    Mutant(
        "windows-without-epoch",
        STREAMING_C4,
        "nodes, seed, epoch, self.shuffle",
        "nodes, seed, 0, self.shuffle",
        WINDOWS,
    ),
    Mutant(
        "windows-without-seed",
        STREAMING_C4,
        "nodes, seed, epoch, self.shuffle",
        "nodes, 0, epoch, self.shuffle",
        WINDOWS,
    ),
    Mutant("batches-without-epoch", STREAMING_C4, "default_rng([seed, epoch])", "default_rng([seed, 0])", WINDOWS),
    Mutant("batches-without-seed", STREAMING_C4, "default_rng([seed, epoch])", "default_rng([0, epoch])", WINDOWS),
    Mutant(
        "draws-masked-alike",
        STREAMING_C4,
        "ids = ids + occurrences(ids) * self.size",
        "ids = ids + 0 * occurrences(ids)",
        "data/test_data_c4.py::test_each_draw_of_a_sample_is_masked_differently",
    ),
    Mutant("evaluation-repeats", STREAMING_C4, "if index < self.dataset.size:", "if index >= 0:", ONCE),
    Mutant(
        "evaluation-loses",
        STREAMING_C4,
        "return -(-self.dataset.size // self.world_size)",
        "return self.dataset.size // self.world_size",
        ONCE,
    ),
    Mutant(
        "evaluation-epoch",
        STREAMING_C4,
        "sample_id=index, epoch=0)",
        "sample_id=index, epoch=self.dataset.next_epoch)",
        "data/test_data_c4.py::test_random_crop_moves_with_sample_and_epoch_except_in_evaluation",
    ),
    Mutant(
        "evaluation-rate",
        DATA,
        "loader.mlm_probability, EVALUATION_SEED,",
        "highest_rate(config), EVALUATION_SEED,",
        "train/test_main.py::test_evaluation_is_exact",
    ),
    Mutant(
        "evaluation-seed",
        DATA,
        "loader.mlm_probability, EVALUATION_SEED,",
        "loader.mlm_probability, config.seed,",
        "train/test_main.py::test_evaluations_masks_do_not_depend_on_the_seed",
    ),
    Mutant(
        "locator",
        "src/data/shards.py",
        "bisect.bisect_right",
        "bisect.bisect_left",
        "data/test_streaming.py::test_locator_equals_streamings_spanner",
    ),
    # Optimizer and schedule
    Mutant(
        "decay-groups",
        OPTIM,
        '"params": others, "weight_decay": 0.0',
        '"params": others, "weight_decay": weight_decay',
        "train/test_builders.py::test_decay_of_matrices_only",
    ),
    Mutant(
        "decoupled-decay",
        OPTIM,
        "weight_decay / lr, decay",
        "weight_decay, decay",
        "train/test_builders.py::test_decoupled_adamw_is_composers",
    ),
    Mutant(
        "muon-parts",
        OPTIM,
        "return PARTS.get(modules[-1], 1)",
        "return 1",
        "train/test_muon.py::test_step_is_the_papers train/test_muon.py::test_groups",
    ),
    Mutant(
        "muon-scale",
        "src/train/muon.py",
        "UPDATE_RMS * math.sqrt(max(rows // parts, columns))",
        "UPDATE_RMS * math.sqrt(max(rows, columns))",
        "train/test_muon.py::test_step_is_the_papers",
    ),
    Mutant(
        "muon-share-of-others",
        "src/train/muon.py",
        "at = dist.get_rank() * share",
        "at = 0",
        "train/test_muon.py::test_processes_share_the_matrices",
    ),
    Mutant(
        "muon-without-nesterov",
        "src/train/muon.py",
        'return p.grad.lerp(state["momentum"], momentum)',
        'return state["momentum"]',
        "train/test_muon.py::test_step_is_the_papers",
    ),
    Mutant(
        "state-of-another-optimizer",
        CHECKPOINT,
        "    if name not in states:",
        "    if not states:",
        "train/test_muon.py::test_state_of_adamw_is_refused",
    ),
    Mutant(
        "warmup",
        OPTIM,
        "return now / warmup.value",
        "return (now + 1) / warmup.value",
        "train/test_builders.py::test_schedules",
    ),
    Mutant("final-rate", OPTIM, "(1.0 - self.alpha_f) *", "1.0 *", "train/test_builders.py::test_schedules"),
    # Callbacks and monitors
    Mutant("reseed-without-seed", CALLBACKS, "SeedSequence([self.seed, ", "SeedSequence([0, ", RESEEDING),
    Mutant("reseed-without-step", CALLBACKS, "state.timestamp.batch.value, dist.get", "0, dist.get", RESEEDING),
    Mutant("reseed-without-rank", CALLBACKS, "batch.value, dist.get_global_rank()]", "batch.value, 0]", RESEEDING),
    Mutant(
        "infinite-loss",
        CALLBACKS,
        "if math.isfinite(loss):",
        "if not math.isnan(loss):",
        "train/test_callbacks.py::test_loss_that_is_not_finite_is_an_error",
    ),
    Mutant(
        "lost-batch",
        CALLBACKS,
        "if done < want:",
        "if done < want - 1:",
        "train/test_callbacks.py::test_lost_batch_is_an_error",
    ),
    Mutant(
        "shares-of-samples",
        MONITORS,
        "self.tokens[stream] += tokens",
        "self.tokens[stream] += 1",
        "train/test_monitors.py::test_stream_shares_count_tokens_since_the_last_log",
    ),
    Mutant("mfu-doubled", MONITORS, "flops / self.gpu_flops_available", "2 * flops / self.gpu_flops_available", STEP),
    Mutant(
        "step-time",
        MONITORS,
        "seconds = time.perf_counter() - self",
        "seconds = 1.5 * (time.perf_counter()) - self",
        STEP,
    ),
    Mutant("data-wait", MONITORS, '"data_wait_share": waited', '"data_wait_share": self.waited', STEP),
    Mutant(
        "metrics-lines",
        MONITORS,
        '["batch"] <= done',
        '["batch"] < done',
        "train/test_resume.py::test_kill_before_the_first_step_keeps_the_metrics_file",
    ),
    Mutant(
        "metrics-lines-of-text",
        MONITORS,
        'if type(values["batch"]) is not int:',
        'if values["batch"] is None:',
        "train/test_run_end.py::test_metrics_file_is_json_and_drops_damaged_lines_at_a_restart",
    ),
    # Files, checkpoints, resuming
    Mutant(
        "no-fsync-of-file", FILES, "        sync(partial)\n        partial.replace", "        partial.replace", ON_DISK
    ),
    Mutant("no-fsync-of-name", FILES, "        raise\n    sync(path.parent)", "        raise", ON_DISK),
    Mutant(
        "no-fsync-of-folder",
        FILES,
        "new.rename(folder)\n        sync(folder.parent)",
        "new.rename(folder)",
        "test_files.py::test_name_of_a_replaced_folder_is_flushed_to_the_disk",
    ),
    Mutant(
        "no-rename",
        FILES,
        'partial = path.with_name(f"{path.name}{PARTIAL}")',
        "partial = path",
        "test_files.py::test_atomic_write_is_complete_or_changes_nothing",
    ),
    Mutant(
        "lock-of-conversions",
        FILES,
        'f".{folder.name}.lock"',
        'f".{os.getpid()}.lock"',
        "test_files.py::test_lock_is_held_by_one_process",
    ),
    Mutant(
        "lock-of-runs",
        CHECKPOINT,
        'FileLock(self.path / ".lock")',
        'FileLock(self.path / f".lock{id(self)}")',
        "train/test_resume.py::test_second_run_in_the_folder_is_refused",
    ),
    Mutant(
        "rotation",
        CHECKPOINT,
        "[: -self.num_checkpoints_to_keep]",
        "[: 1 - self.num_checkpoints_to_keep]",
        "train/test_resume.py::test_rotation_includes_checkpoints_of_earlier_starts",
    ),
    Mutant(
        "no-fallback",
        CHECKPOINT,
        "reason = damage(path)",
        "reason = None",
        "train/test_resume.py::test_resume_falls_back_from_a_damaged_checkpoint",
    ),
    Mutant(
        "no-crc",
        CHECKPOINT,
        "bad = archive.testzip()",
        "bad = None",
        "train/test_resume.py::test_damage_is_found_anywhere",
    ),
    Mutant(
        "pickled-code",
        CHECKPOINT,
        'os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"',
        'os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "0"',
        "train/test_main.py::test_checkpoint_cannot_run_commands",
    ),
    Mutant("resume-compares-nothing", RESUME, "or is_same(old, new) or", "or True or", REFUSES),
    Mutant("resume-allows-all", RESUME, "any(is_within(name, section) for section in self.allow):", "True:", REFUSES),
    Mutant(
        "resume-shuffle-seed",
        RESUME,
        "if name not in RESTORED_BY_STREAMING and",
        "if",
        "train/test_resume.py::test_settings_restored_by_streaming_cannot_be_allowed",
    ),
    Mutant(
        "resume-learning-rate",
        RESUME,
        "group.update(fresh)",
        "group.update({})",
        "train/test_resume.py::test_accepted_settings_change_the_learning_rate",
    ),
    # What a run resumes from, and how it ends
    Mutant(
        "weights-not-finite",
        CHECKPOINT,
        "return state, not_finite({name: state[name] for name in numbers if name in state})",
        "return state, None",
        "train/test_checkpoint.py::test_unsound_checkpoint_is_refused_by_each_key",
    ),
    Mutant(
        "averages-not-finite",
        CHECKPOINT,
        'numbers = ("model", "algorithms", ',
        'numbers = ("model", ',
        "train/test_checkpoint.py::test_numbers_of_a_checkpoint_are_checked",
    ),
    Mutant(
        "folder-not-finite",
        WEIGHTS,
        "reason = reason or checkpoint.not_finite(weights)",
        "reason = reason or None",
        "train/test_weights.py::test_folder_with_weights_that_are_not_finite_is_refused",
    ),
    Mutant(
        "resumes-without-optimizer",
        CHECKPOINT,
        "{**FIELDS, **(TO_RESUME if to_resume else {})}",
        "FIELDS",
        "train/test_checkpoint.py::test_each_field_of_a_checkpoint_is_checked",
    ),
    Mutant(
        "resumes-weights-only",
        BUILDERS,
        "load_weights_only=config.load_weights_only and found is None",
        "load_weights_only=config.load_weights_only",
        "train/test_resume.py::test_run_that_began_with_other_weights_resumes_with_its_own_state",
    ),
    Mutant(
        "archive-unpacked",
        BUILDERS,
        "checkpoint.check_name(start, start)",
        "pass",
        "train/test_checkpoint.py::test_no_archive_is_unpacked_and_no_other_file_is_written",
    ),
    Mutant(
        "epochs-count-whole",
        CALLBACKS,
        "done += state.timestamp.sample_in_epoch.value / epoch_size(state)",
        "pass",
        "train/test_callbacks.py::test_epochs_count_in_parts",
    ),
    Mutant(
        "a-stop-ends-swa",
        ENDING,
        "Time(elapsed(state, whole), TimeUnit.DURATION)",
        "Time(elapsed(state, state.max_duration), TimeUnit.DURATION)",
        "train/test_run_end.py::test_swa_averages_in_a_run_of_epochs_whether_paused_or_not",
    ),
    Mutant(
        "pauses-evaluate",
        ENDING,
        "if every.unit == TimeUnit.DURATION:",
        "if False:",
        "train/test_run_end.py::test_pauses_add_no_evaluation",
    ),
    Mutant(
        "stopper-forgotten",
        ENDING,
        """ or (self._stopped["options"] is None and options is not None)""",
        "",
        "train/test_run_end.py::test_stopper_that_fires_with_the_time_limit_ends_the_run",
    ),
    Mutant(
        "epoch-too-short",
        RESUME,
        "loader.added = steps - len(loader)",
        "loader.added = 0",
        "train/test_run_end.py::test_accepted_batch_size_makes_the_epoch_longer",
    ),
    Mutant(
        "metrics-cut",
        MONITORS,
        " or (len(kept) < len(lines) and not self.resumes)",
        "",
        "train/test_run_end.py::test_start_from_a_checkpoint_keeps_the_lines_of_a_finished_run",
    ),
    Mutant(
        "export-length",
        "src/export/sentences.py",
        "length = trained_length(source) or (own",
        "length = (own",
        "export/test_export_hf.py::test_the_length_of_the_tokenizer",
    ),
    Mutant(
        "logger-start",
        "src/train/loggers.py",
        "logger.init = one_message(path)(logger.init)",
        "pass",
        "train/test_loggers.py::test_a_service_that_does_not_start_ends_in_one_message",
    ),
    Mutant(
        "budget-exceeded",
        "src/data/balance.py",
        "if total + length > tokens:",
        "if False:",
        "data/test_balance.py::test_each_sequence_is_in_one_microbatch_within_both_limits",
    ),
    Mutant(
        "train-metrics-seen",
        "src/train/callbacks.py",
        "state.train_metrics, self.outputs = {}, []",
        "self.outputs = []",
        "train/test_callbacks.py::test_train_metrics_are_those_that_composer_computes",
    ),
    Mutant(
        "train-metrics-of-one-process",
        "src/train/callbacks.py",
        'dist.all_reduce(sums, reduce_operation="SUM")',
        "pass",
        "train/test_world_size.py::test_loss_gradient_and_samples_do_not_depend_on_the_number_of_processes",
    ),
    Mutant(
        "copies-of-old-weights",
        CALLBACKS,
        "def after_train_batch(self, state: State, logger: Logger) -> None:\n        self._end()",
        "def after_train_batch(self, state: State, logger: Logger) -> None:\n        pass",
        ONE_CAST,
    ),
    Mutant(
        "copies-of-a-failed-run",
        CALLBACKS,
        "torch.clear_autocast_cache()  #",
        "pass  #",
        f"{ONE_CAST}_after_a_run_that_failed",
    ),
    Mutant("copies-of-a-failed-step", CALLBACKS, "self._end()  # still open if auto", "pass  #", ONE_CAST),
    Mutant(
        "copies-after-an-exception",
        CALLBACKS,
        "self._end()  # after an exception",
        "pass  #",
        "train/test_callbacks.py::test_no_context_stays_open_after_an_exception",
    ),
    Mutant(
        "copies-of-gathered-weights",
        BUILDERS,
        'elif config.precision != "fp32" and not',
        'if config.precision != "fp32" and not',
        "train/test_builders.py::test_weights_are_cast_in_each_microbatch",
    ),
    Mutant(
        "budget-not-in-training",
        "src/train/data.py",
        "batch_size, known, tokens)",
        "batch_size, known, None)",
        "train/test_builders.py::test_workers_split_unless_only_the_main_process_knows_how",
    ),
    Mutant(
        "auto-in-workers",
        "src/train/data.py",
        'known = None if rate is None or size == "auto" else size',
        "known = None if rate is None else size",
        "train/test_builders.py::test_auto_splits_in_the_main_process",
    ),
    Mutant(
        "not-pinned",
        "src/train/data.py",
        "return parts.pin_memory() if torch.cuda.is_available() else parts",
        "return parts",
        "train/test_builders.py::test_batches_reach_a_gpu_from_pinned_memory",
    ),
    Mutant(
        "recomputed-layer",
        VALIDATE,
        "held += layers //",
        "held += 0 * layers //",
        "train/test_validate.py::test_gradient_checkpointing_holds_a_recomputed_layer",
    ),
    Mutant(
        "memory-of-gradients",
        CALLBACKS,
        "for p in parameters if self.accumulates else ():",
        "for p in ():",
        "train/test_callbacks.py::test_memory_probe_has_gradients_beside_all_microbatches_but_the_first",
    ),
    Mutant(
        "validate-tokens",
        VALIDATE,
        '"tok": 1 / tokens_per_sample',
        '"tok": 1',
        "train/test_main.py::test_steps_of_epochs_with_a_smaller_last_batch",
    ),
    Mutant(
        "downloads-not-read",
        CHECKPOINT,
        "check(read(found[0], to_resume))",
        'check({"model": {}}) if False else None',
        "train/test_checkpoint.py::test_checkpoint_of_an_object_store_is_checked",
    ),
    Mutant(
        "nan-saved",
        CALLBACKS,
        "if not any(saver.save_interval(state, event) for saver in savers_of(state)):",
        "if True:",
        "train/test_run_end.py::test_weights_that_are_not_finite_are_not_saved",
    ),
    Mutant(
        "exit-code-75-unsaved",
        CALLBACKS,
        'nothing is saved", unsaved)',
        'nothing is saved", EXIT_INTERRUPTED)',
        "train/test_run_end.py::test_signal_exit_code_says_whether_it_is_saved",
    ),
    Mutant(
        "evaluated-twice",
        ENDING,
        "due = is_end(state, event) and not again",
        "due = is_end(state, event)",
        "train/test_run_end.py::test_last_step_is_evaluated_once",
    ),
    Mutant(
        "finished-run",
        ENDING,
        "step = timestamp.batch.value\n        if timestamp >= Time",
        "step = timestamp.batch.value\n        if timestamp > Time",
        "train/test_run_end.py::test_finished_run_is_known_by_any_unit",
    ),
    Mutant(
        "stopper-direction",
        STOPPERS,
        'return "less" if falls else "greater"',
        'return "greater" if falls else "less"',
        "train/test_stoppers.py::test_losses_fall_and_accuracies_rise",
    ),
    Mutant(
        "stopper-forgets",
        STOPPERS,
        'self.best = torch.tensor(state["best"], dtype=torch.float64)',
        "self.best = None",
        "train/test_stoppers.py::test_a_resumed_run_counts_the_patience_on",
    ),
    Mutant(
        "secret-in-config",
        "src/train/run.py",
        "dump(unresolved(to_dict(config), config.interpolations))",
        "dump(to_dict(config))",
        f"{SECRETS}::test_checkpoints_config_and_terminal_have_no_value",
    ),
    Mutant(
        "secret-in-checkpoint",
        "src/train/config.py",
        "flat(stored(to_dict(config), hidden))",
        "flat(to_dict(config))",
        f"{SECRETS}::test_checkpoints_config_and_terminal_have_no_value",
    ),
    Mutant(
        "secret-in-message",
        "main.py",
        "with hiding(config.interpolations):",
        "with hiding({}):",
        f"{SECRETS}::test_messages_of_a_run_show_the_interpolation",
    ),
    Mutant(
        "text-as-interpolation",
        YAML,
        'if reads or "${" in str(value)',
        "if reads",
        f"{SECRETS}::test_a_text_that_is_no_interpolation_stays_one",
    ),
    # Overrides
    Mutant(
        "shuffle-seed",
        "src/train/config.py",
        "config.seed if seed is None else seed",
        "config.seed",
        "train/test_config.py::test_a_given_seed_of_the_order_is_not_the_runs",
    ),
    Mutant("override-merged", SCHEMA, "None if is_whole else _nulls(value)", "_nulls(value)", OVERRIDES),
    Mutant(
        "override-empty",
        SCHEMA,
        "isinstance(value, dict) and value else None",
        "isinstance(value, dict) else None",
        OVERRIDES,
    ),
    # Index, cache, identity of data
    Mutant("names-outside", INDEX_FILE, 'part[:1] not in ("", ".") and ', "", INDEX),
    Mutant(
        "names-of-compressed", INDEX_FILE, 'for kind in ("raw_data", "zip_data"):', 'for kind in ("raw_data",):', INDEX
    ),
    Mutant("pickled-columns", INDEX_FILE, " or not all(map(is_mds_encoding_safe, encodings))", "", INDEX),
    Mutant(
        "files-of-others-in-shared-memory",
        "src/data/streaming.py",
        "shm_prefix._each_prefix_int = _prefixes",
        "_prefixes",
        "data/test_shared_memory.py::test_prefix_with_files_that_are_not_streamings_is_skipped",
    ),
    Mutant(
        "foreign-ids",
        "src/data/columns.py",
        "ids.max() < vocab_size",
        "ids.max() <= vocab_size",
        "data/test_foreign_shards.py::test_sample_that_does_not_fit_is_named",
    ),
    Mutant(
        "hidden-shard",
        INDEX_FILE,
        'part[:1] not in ("", ".")',
        'part not in ("", "..")',
        "data/test_index.py::test_each_fault_is_named",
    ),
    Mutant("header", SHARDS, "if count != samples or offsets[0]", "if offsets[0]", OPENED),
    Mutant("ids-outside-the-vocabulary", STREAMING_C4, ">= self.vocab_size:", "> self.vocab_size:", OPENED),
    Mutant(
        "length-of-a-sample",
        STREAMING_C4,
        "        if not 0 < len(ids) <= self.max_seq_len:\n            raise ValueError",
        "        if not len(ids):\n            raise ValueError",
        OPENED,
    ),
    Mutant("repeated-columns", INDEX_FILE, "if len({*names}) < len(names):", "if not names:", INDEX),
    Mutant("type-of-ids", INDEX_FILE, "if found != token_dtype(entries):", "if found is None:", INDEX),
    Mutant("shard-size", SHARDS, "    if found != size:", "    if found < size:", OPENED),
    Mutant(
        "fingerprint-without-hashes",
        SHARDS,
        ', shard["raw_data"]["hashes"]]',
        "]",
        "data/test_identity.py::test_fingerprint_depends_on_the_samples_only",
    ),
    Mutant(
        "fingerprint-without-borders",
        SHARDS,
        "datasets if len(datasets) > 1 else flat, flat",
        "flat, flat",
        "data/test_identity.py::test_fingerprint_of_a_mixture_depends_on_its_borders",
    ),
    Mutant(
        "cache-of-another-dataset",
        "src/data/cache.py",
        "if read_index(self.folder) != index:",
        "if not index:",
        "data/test_identity.py::test_cache_of_another_dataset_is_refused",
    ),
    # The last batch
    Mutant("partition", ORDER, "ids = ids[drop_first:num_samples]", "ids = ids[drop_first:]", "data/test_order.py"),
    Mutant("filler", ORDER, "if 0 < left % num_ranks <= rank", "if 0 < left % num_ranks < rank", "data/test_order.py"),
    Mutant(
        "samples-repeated",
        "src/data/streaming.py",
        'partition_algo="exact"',
        'partition_algo="relaxed"',
        "train/test_world_size.py::test_loss_gradient_and_samples_do_not_depend_on_the_number_of_processes",
    ),
    # Pretrained weights
    Mutant(
        "eps-not-compared",
        WEIGHTS,
        '("num_attention_heads", "layer_norm_eps")',
        '("num_attention_heads",)',
        "train/test_weights.py::test_settings_that_change_no_shape_are_compared",
    ),
    Mutant(
        "tied-not-compared",
        WEIGHTS,
        "elif len(given) > 1 and not",
        "elif len(given) > 2 and not",
        "train/test_weights.py::test_weights_that_do_not_fit",
    ),
    Mutant(
        "head-not-dropped",
        WEIGHTS,
        '(*NEWLY_INITIALISED, "cls.", ',
        "(*NEWLY_INITIALISED, ",
        "train/test_weights.py::test_checkpoint_loads_into_each_class",
    ),
    # Conversion, tokenizer
    Mutant(
        "blank-documents",
        "src/convert/forms.py",
        'if document["text"].strip():\n                stats',
        'if document["text"]:\n                stats',
        "convert/test_sources.py::test_folder_is_read_in_sorted_order_with_its_subfolders",
    ),
    Mutant(
        "second-names-are-read",
        "src/convert/walk.py",
        "if key in self.seen or (link",
        "if (link",
        "convert/test_walk.py",
    ),
    Mutant(
        "faults-are-skipped",
        "src/convert/walk.py",
        "if reason[1] and not",
        "if not reason[1] and not",
        "convert/test_walk.py",
    ),
    Mutant(
        "hidden-files-are-read",
        "src/convert/reasons.py",
        'if name.startswith(".")',
        'if name == "."',
        "convert/test_walk.py",
    ),
    Mutant(
        "only-copy-is-evicted",
        "src/data/cache.py",
        "if self.source.complete or not (self.folder / MARKER).exists():",
        "if self.source.complete:",
        "data/test_cache.py::test_only_shards_of_a_marked_cache_are_evicted",
    ),
    Mutant(
        "complete-sources-are-evicted",
        "src/data/streaming.py",
        "np.flatnonzero(self._cached & (",
        "np.flatnonzero((",
        "data/test_cache.py::test_a_limit_deletes_shards_of_caches_only",
    ),
    Mutant(
        "downloads-are-not-compared",
        "src/data/cache.py",
        "if get_hash(algorithm, path.read_bytes()) != expected:",
        "if not expected:",
        "data/test_cache.py::test_remote_replaced_while_a_run_streams_is_noticed",
    ),
    Mutant(
        "special-words-are-tokens",
        "src/data/tokenizer.py",
        'if special_tokens == "tokens":',
        "if special_tokens:",
        "data/test_foreign_tokenizers.py",
    ),
    Mutant(
        "whole-words-by-piece",
        "src/data/masking.py",
        "bits if self.continues is None else",
        "bits if self.rate is not None else",
        "data/test_whole_words.py",
    ),
    Mutant(
        "truncated-zstd-is-whole",
        "src/common/streams.py",
        "if self.frame is None or not self.frame.eof:\n                    raise",
        "if self.frame is None:\n                    raise",
        "convert/test_forms.py::test_damaged_streams_are_named",
    ),
    Mutant(
        "disk-errors-are-bad-text",
        "src/common/streams.py",
        "and not plain and not isinstance",
        "and plain and not isinstance",
        "convert/test_forms.py::test_errors_of_the_disk_are_no_bad_text",
    ),
    Mutant(
        "documents-without-tokens",
        "src/convert/samples.py",
        "for ids in found if ids)",
        "for ids in found)",
        "convert/test_convert_c4.py",
    ),
    Mutant(
        "chunks-overlap",
        "src/convert/samples.py",
        "min(start + room, end)",
        "min(start + room + 1, end)",
        "convert/test_convert_c4.py::test_chunk_loses_nothing",
    ),
    Mutant(
        "chunks-lose-rests",
        "src/convert/samples.py",
        "left = ids[end:]",
        "left = []",
        "convert/test_convert_c4.py::test_long_documents_are_tokenized_in_pieces",
    ),
    Mutant(
        "dtype-too-small",
        INDEX_FILE,
        "vocab_size <= 2**16",
        "vocab_size <= 2**17",
        "data/test_foreign_tokenizers.py::test_ids_with_gaps_are_converted_loaded_and_masked",
    ),
    Mutant(
        "duplicates-kept",
        "src/convert/unit.py",
        "duplicate is not None and duplicate[number - 1]",
        "duplicate is not None and not duplicate[number - 1]",
        "convert/test_conversion.py::test_dedup_keeps_the_first_of_equal_documents",
    ),
    Mutant(
        "duplicates-by-case",
        "src/convert/filters.py",
        '"NFKC", text).lower()',
        '"NFKC", text)',
        "convert/test_filters.py::test_equal_texts_have_equal_hashes",
    ),
    Mutant(
        "fingerprint-without-normalizer",
        "src/data/tokenizer.py",
        'backend["truncation"] = backend["padding"] = None',
        'backend["truncation"] = backend["padding"] = backend["normalizer"] = None',
        "data/test_tokenizer.py::test_fingerprint_changes_with_whatever_changes_ids",
    ),
    # Fine-tuning, export
    Mutant("accuracy-of-classes", TEXTS, 'average="micro", ignore', 'average="macro", ignore', CLASSES),
    Mutant(
        "class-weights-mean",
        "src/finetune/kinds/base.py",
        "loss_sum / max(self.count(batch), 1)",
        "loss_sum / class_weights[labels[labels != IGNORED]].sum()",
        "finetune/test_kinds.py::test_class_weights",
    ),
    Mutant("f1-of-rows", TEXTS, 'average="macro", ignore', 'average="micro", ignore', CLASSES),
    Mutant(
        "padding-in-loss-of-answers",
        "src/finetune/kinds/questions.py",
        ".float().masked_fill(padding, -torch.inf)",
        ".float()",
        "finetune/test_kinds.py::test_the_loss_does_not_depend_on_the_microbatch",
    ),
    Mutant(
        "null-of-one-window",
        "src/finetune/kinds/questions.py",
        "min(one.null, other.null)",
        "better.null",
        "finetune/test_kinds.py::test_the_best_window_and_no_answer",
    ),
    Mutant(
        "class-held-out-altogether",
        "src/finetune/holdout.py",
        "left[other] > 1",
        "left[other] > 0",
        "finetune/test_holdout.py::test_no_class_is_held_out_altogether",
    ),
    Mutant(
        "entity-continues-another",
        "src/finetune/tags.py",
        'before in "BI" and its_kind == kind',
        'before in "BI"',
        "finetune/test_tags.py::test_entities",
    ),
    Mutant(
        "cut-table-is-whole",
        "src/finetune/files.py",
        "if source.read() != END_OF_STREAM:",
        "if not source:",
        "finetune/test_labelled_files.py::test_a_truncated_arrow_file_is_refused",
    ),
    Mutant(
        "order-without-seed",
        "src/finetune/run.py",
        "manual_seed(seed)",
        "manual_seed(0)",
        "finetune/test_finetune.py::test_the_order_of_rows_follows_seed_and_epoch",
    ),
    Mutant(
        "head-without-seed",
        "src/finetune/run.py",
        "reproducibility.seed_all(spec.seed)",
        "reproducibility.seed_all(0)",
        "finetune/test_finetune.py::test_each_seed_has_its_own_head",
    ),
    Mutant(
        "decay-of-task",
        "src/finetune/run.py",
        "{**config.optimizer.options, **decay}",
        "{**decay, **config.optimizer.options}",
        "finetune/test_finetune.py::test_a_tasks_weight_decay_is_in_place_of_the_optimizers",
    ),
    Mutant(
        "key-without-seed",
        "src/finetune/plan.py",
        '{**settings, "seed": seed}',
        "{**settings}",
        "finetune/test_finetune.py::test_a_runs_key_hashes_what_decides_its_result",
    ),
    Mutant(
        "last-weights-reported",
        "src/finetune/run.py",
        "        self.network.load_state_dict(self.weights)\n",
        "",
        "finetune/test_finetune.py::test_the_best_step_is_kept_by_rows_that_are_not_reported",
    ),
    Mutant(
        "balanced-by-number",
        "src/finetune/run.py",
        "len(labels) * max(labels[name], 1)",
        "len(labels)",
        "finetune/test_finetune.py::test_values_of_class_weights",
    ),
    Mutant(
        "nan-is-best",
        "src/finetune/run.py",
        ".nan_to_num(nan=-math.inf)",
        "",
        "finetune/test_finetune.py::test_a_metric_without_a_value_is_never_the_best",
    ),
    Mutant(
        "hub-asked-again",
        "src/finetune/run.py",
        "    hub.FOUND.update(spec.hub_files)\n",
        "",
        "finetune/test_finetune.py::test_a_run_reads_the_files_of_the_hub_that_its_key_was_made_of",
    ),
    Mutant(
        "predictions-shuffled",
        "src/finetune/predict.py",
        "config.batch_size, None)",
        "config.batch_size, 0)",
        "finetune/test_finetune.py::test_each_kind_of_task_is_learnt",
    ),
    Mutant(
        "lists-of-numpy",
        "src/finetune/cells.py",
        "[ast.literal_eval(item) for item in re.findall(ITEM, cell[1:-1], re.DOTALL)]",
        "list(ast.literal_eval(cell))",
        "finetune/test_labelled_files.py::test_lists_in_a_cell",
    ),
    Mutant(
        "column-twice",
        "src/finetune/files.py",
        "if known.count(name) > 1:",
        "if known.count(name) > 2:",
        "finetune/test_labelled_data.py::test_a_fault_names_file_and_row",
    ),
    Mutant(
        "interval",
        "src/finetune/table.py",
        "t_quantile(n - 1)",
        "t_quantile(n)",
        "finetune/test_table.py::test_summary",
    ),
    Mutant(
        "export-tolerance",
        "src/export/hf.py",
        "max(8 * rounding, 1e-5 * largest)",
        "max(80 * rounding, 1e-3 * largest)",
        "export/test_export_hf.py::test_only_rounding_is_accepted",
    ),
    Mutant(
        "export-int8-error-not-checked",
        "src/export/onnx.py",
        "if not errors[name] <= INT8_ERROR:",
        "if errors[name] > 10:",
        "export/test_deployment.py::test_graphs_of_another_model_are_not_accepted",
    ),
    Mutant(
        "export-int8-decoder-stays-fp32",
        "src/export/onnx.py",
        "quant_pre_process(str(path), str(out), skip_symbolic_shape=True)",
        "quant_pre_process(str(path), str(out), skip_symbolic_shape=True, skip_optimization=True)",
        "export/test_deployment.py::test_an_int8_graph_has_int8_products_only",
    ),
    # Benchmarks
    Mutant(
        "aot-repeated-scores",
        AOT,
        "return math.prod(warps) // math.prod(distinct)",
        "return 1",
        "model/test_kernels_compile.py::test_a_bad_tile_is_caught",
    ),
    Mutant(
        "roofline-one-tile-backward",
        ROOFLINE,
        "lengths.max()) <= kernels.one_tile",
        "lengths.max()) < kernels.one_tile",
        "benchmarks/test_benchmarks.py::test_roofline_counts_the_products_of_the_model",
    ),
    Mutant(
        "calculated-as-measured",
        PUBLISH,
        'if kind != CALCULATED.get(block, "measured"):',
        "if kind not in CALCULATED.values() and kind != 'measured':",
        "benchmarks/test_quality.py::test_pages_match_the_results",
    ),
]


def copy_checkout(folder: Path) -> None:
    """Copy the checkout to ``folder``: files that git tracks, and new ones that it does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest on the copy, up to the first failure."""
    options = ["-x", "--tb=short", "--show-capture=no", "--timeout", "300", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
    # Without compiled files: one of a fault could be taken for the file as it was.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def tried(mutant: Mutant, folder: Path) -> str:
    """``killed``, ``survived`` or ``error``, after the tests of one fault; the copy is then as before."""
    started, file = time.monotonic(), folder / mutant.file
    text = file.read_text()
    file.write_text(mutant.apply(text))
    try:
        code, output = run_tests(folder, mutant.tests.split())
    finally:
        file.write_text(text)
    failed = re.search(r"^\d+ failed", output, re.M) is not None
    found = "survived" if code == 0 else "killed" if code == 1 and failed else "error"
    print(f"{found:8} {mutant.name}  {time.monotonic() - started:.0f} s", flush=True)
    if found == "error":
        print(output[-3000:], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[mutant.name for mutant in MUTANTS])
    args = parser.parse_args()
    if unknown := set(args.only) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in MUTANTS if mutant.name in args.only]
    for mutant in mutants:
        mutant.apply((ROOT / mutant.file).read_text())  # before the tests, which take minutes
    tests = sorted({test for mutant in mutants for test in mutant.tests.split()})
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for job in range(args.jobs):
            copy_checkout(Path(scratch, str(job)))
            free.put(Path(scratch, str(job)))

        @contextmanager
        def copy() -> Iterator[Path]:
            folder = free.get()
            yield folder
            free.put(folder)

        def unchanged(part: list[str]) -> tuple[int, str]:
            with copy() as folder:
                return run_tests(folder, part)

        def changed(mutant: Mutant) -> str:
            with copy() as folder:
                return tried(mutant, folder)

        size = -(-len(tests) // args.jobs)
        parts = [tests[i : i + size] for i in range(0, len(tests), size)]
        for code, output in pool.map(unchanged, parts):
            if code:
                sys.exit(f"{output[-3000:]}\nmutants: tests fail without any fault")
        found = list(pool.map(changed, mutants))
    print(f"mutants applied={len(found)} killed={found.count('killed')} survived={found.count('survived')}")
    sys.exit(found.count("killed") != len(found))


if __name__ == "__main__":
    main()
