"""What validation says about settings that cannot work."""

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.command_line import config_from_dict, config_to_dict
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.validation.run import problems, validate

GOOD = replace(config_from_dict({"data": {"mock": True}, "model": {"vocab_size": 100}}))
FILES = {"data.mock": False, "data.data_path": ["a"]}


def run_with(changes: dict[str, object]) -> RunConfig:
    """GOOD with other values, by dotted key."""
    tree = config_to_dict(GOOD)
    for key, value in changes.items():
        *path, name = key.split(".")
        section = tree
        for part in path:
            section = section[part]
        section[name] = value
    return config_from_dict(tree)


def test_a_run_that_works_has_no_problems():
    assert problems(GOOD, 1) == []
    validate(GOOD, 8)


PP2 = {"parallel.pipeline_model_parallel_size": 2}


def p(size):
    return {"parallel.tensor_model_parallel_size": size}


def cp(size):
    return {"parallel.context_parallel_size": size}


def ring():
    return cp(2) | {"parallel.context_parallel_communication": "ring"}


def dmc(**settings):
    return {"compression.policy": {"name": "dmc", **settings}}


# (settings, processes, what the one problem says)
CASES = [
    ({"model.num_layers": 0}, 1, "model.num_layers is 0; it must be at least 1."),
    ({"model.num_query_groups": -1}, 1, "model.num_query_groups is -1; it must be at least 1."),
    ({"model.vocab_size": 0}, 1, "model.vocab_size is 0; it must be at least 1."),
    (
        {"model.hidden_size": 255},
        1,
        "model.hidden_size is 255 and model.num_attention_heads is 4; the former must be a multiple",
    ),
    ({"model.hidden_size": 60}, 1, "model.hidden_size / model.num_attention_heads is 15; it must be even"),
    ({"model.hidden_size": 255, "model.kv_channels": 31}, 1, "model.kv_channels is 31; it must be even"),
    (
        {"model.num_query_groups": 3},
        1,
        "model.num_attention_heads is 4 and model.num_query_groups is 3; the former must be",
    ),
    (
        {"model.cross_entropy_chunk_size": -1},
        1,
        "model.cross_entropy_chunk_size is -1; it must be at least 0.",
    ),
    (
        {"model.cross_entropy_z_loss": -0.5},
        1,
        "model.cross_entropy_z_loss is -0.5; it must be at least 0.",
    ),
    (
        {"model.cross_entropy_backend": "liger"},
        1,
        (
            "model.cross_entropy_backend is liger, but liger-kernel needs CUDA tensors, the model is on cpu. "
            "Set model.cross_entropy_backend to auto or chunked."
        ),
    ),
    (
        {"model.cross_entropy_backend": "liger", "model.cross_entropy_z_loss": 1e-4},
        1,
        "model.cross_entropy_backend is liger, but the vocabulary-parallel loss of liger-kernel has neither",
    ),
    (
        {"model.cross_entropy_backend": "cut", "parallel.tensor_model_parallel_size": 2},
        2,
        "model.cross_entropy_backend is cut, but cut-cross-entropy needs the whole vocabulary on a rank",
    ),
    (
        {"model.cross_entropy_backend": "cut_filtered", "train.precision": "fp32"},
        1,
        "model.cross_entropy_backend is cut_filtered, but cut-cross-entropy takes float16 and bfloat16",
    ),
    (
        {"model.cross_entropy_backend": "cut", "model.cross_entropy_chunk_size": 64},
        1,
        "cut-cross-entropy makes tiles of its own, and chunks of 64 tokens are asked for",
    ),
    (
        {"model.attention_dropout": 1.0},
        1,
        "model.attention_dropout is 1.0; it must be at least 0 and less than 1.",
    ),
    (
        {"model.hidden_dropout": math.nan},
        1,
        "model.hidden_dropout is nan; it must be at least 0 and less than 1.",
    ),
    (
        {"model.layernorm_epsilon": 0},
        1,
        "model.layernorm_epsilon is 0.0; it must be a number greater than 0.",
    ),
    ({"model.rotary_base": math.inf}, 1, "model.rotary_base is inf; it must be a number greater than 0."),
    (
        {"model.rope_scaling.type": "linear", "model.rope_scaling.factor": 0.5},
        1,
        "model.rope_scaling.factor is 0.5; it must be a number of at least 1.",
    ),
    (
        {"model.rope_scaling.type": "llama3", "model.rope_scaling.high_freq_factor": 1},
        1,
        ("model.rope_scaling.high_freq_factor is 1.0; it must be greater than low_freq_factor, which is 1.0"),
    ),
    (
        {"model.rope_scaling.type": "llama3", "model.rope_scaling.original_max_position_embeddings": 0},
        1,
        "model.rope_scaling.original_max_position_embeddings is 0; it must be a number greater than 0.",
    ),
    (
        {"model.rope_scaling.type": "yarn", "model.rope_scaling.beta_fast": 0},
        1,
        "model.rope_scaling.beta_fast is 0.0; it must be a number greater than 0.",
    ),
    (
        {"model.rope_scaling.type": "longrope", "model.rope_scaling.short_factor": [1.0] * 32},
        1,
        "model.rope_scaling.long_factor is a list of 0 numbers; it must have one for each pair of a head's",
    ),
    (
        {"optimizer.lr_wsd_decay_iters": 50},
        1,
        "optimizer.lr_wsd_decay_iters is 50 and optimizer.lr_decay_style is cosine, which does not read it",
    ),
    (
        {"optimizer.lr_decay_style": "linear", "optimizer.lr_wsd_decay_style": "cosine"},
        1,
        "optimizer.lr_wsd_decay_style is cosine and optimizer.lr_decay_style is linear, which does not read",
    ),
    (
        {"model.rope_scaling.factor": 4},
        1,
        "model.rope_scaling.factor is 4.0; the type none does not have it: leave it out, or set",
    ),
    (
        {"model.rope_scaling.type": "yarn", "model.rope_scaling.high_freq_factor": 5},
        1,
        "model.rope_scaling.high_freq_factor is 5.0; the type yarn does not have it: leave it out, or set",
    ),
    (
        {"model.rope_scaling.type": "linear", "model.rope_scaling.mscale": 1},
        1,
        "model.rope_scaling.mscale is 1.0; the type linear does not have it: leave it out, or set",
    ),
    (
        {
            "model.rope_scaling.type": "dynamic",
            "model.rope_scaling.factor": 2,
            "model.max_position_embeddings": 511,
        },
        1,
        "model.max_position_embeddings x model.rope_scaling.factor is 1022 and train.seq_length is 1024; the",
    ),
    (
        {"model.max_position_embeddings": 8},
        1,
        "model.max_position_embeddings is 8 and train.seq_length is 1024; the former must",
    ),
    (
        {"compression.layer_types": "0_1"},
        1,
        "compression.layer_types is '0_1'; it has 2 entries but the model has 8 layers",
    ),
    ({"compression.backward_passes": 0}, 1, "compression.backward_passes is 0; it must be at least 1."),
    (dmc(temperature=0), 1, "compression.policy.temperature is 0.0; it must be greater than 0, and finite."),
    (
        dmc() | {"model.kv_channels": 2},
        1,
        (
            "model.kv_channels is 2 and compression.policy.name is dmc; under this policy it must be at "
            "least 4."
        ),
    ),
    (
        dmc(stage="finetune") | {"model.hidden_size": 8},
        1,
        (
            "model.hidden_size / model.num_attention_heads is 2 and compression.policy.name is dmc; under "
            "this "
            "policy it must be at least 4"
        ),
    ),
    (dmc() | {"model.kv_channels": 3}, 1, "model.kv_channels is 3; it must be even"),
    (dmc() | {"model.num_attention_heads": 0}, 1, "model.num_attention_heads is 0; it must be at least 1."),
    (
        dmc(stage="retrofit") | {"model.attention_dropout": 0.1},
        1,
        (
            "model.attention_dropout is 0.1, compression.policy.name is dmc and compression.policy.stage is "
            "retrofit; attention under this policy has no dropout"
        ),
    ),
    (
        dmc(stage="finetune")
        | {"compression.layer_types": "0s_1_2_3_4_5_6_7", "compression.sliding_window": 4},
        1,
        ("compression.sliding_window is 4; the policy dmc cannot live with sliding windows"),
    ),
    (
        p(0) | {"model.num_query_groups": 2},
        1,
        "parallel.tensor_model_parallel_size is 0; it must be at least 1.",
    ),
    (
        p(8) | {"model.num_query_groups": 2},
        8,
        (
            "model.num_attention_heads is 4 and parallel.tensor_model_parallel_size is 8; the former must "
            "be a "
            "multiple"
        ),
    ),
    (
        p(6)
        | {
            "model.num_attention_heads": 12,
            "model.num_query_groups": 4,
            "model.hidden_size": 384,
            "model.ffn_hidden_size": 768,
        },
        6,
        (
            "model.num_query_groups is 4 and parallel.tensor_model_parallel_size is 6; one must be a "
            "multiple of "
            "the other"
        ),
    ),
    (
        p(2) | {"model.ffn_hidden_size": 33},
        2,
        "model.ffn_hidden_size is 33 and parallel.tensor_model_parallel_size is 2;",
    ),
    (
        {"parallel.sequence_parallel": True},
        1,
        "parallel.sequence_parallel is true and parallel.tensor_model_parallel_size is 1; raise the latter",
    ),
    (
        p(2) | {"parallel.sequence_parallel": True, "train.seq_length": 33},
        2,
        "train.seq_length is 33 and parallel.tensor_model_parallel_size is 2; the former must be a multiple",
    ),
    (
        {"parallel.pipeline_model_parallel_size": 3},
        3,
        (
            "model.num_layers is 8 and parallel.pipeline_model_parallel_size is 3; the former must be a "
            "multiple "
            "of the latter"
        ),
    ),
    (
        {"parallel.pipeline_model_parallel_size": 16},
        16,
        "model.num_layers is 8 and parallel.pipeline_model_parallel_size is 16; every stage needs a layer",
    ),
    (
        {"parallel.virtual_pipeline_model_parallel_size": 2},
        1,
        (
            "parallel.virtual_pipeline_model_parallel_size is 2 and parallel.pipeline_model_parallel_size is "
            "1; the former must be at least 1, the latter at least 2"
        ),
    ),
    (
        PP2 | {"parallel.virtual_pipeline_model_parallel_size": 3},
        2,
        (
            "model.num_layers is 8 and parallel.pipeline_model_parallel_size x "
            "virtual_pipeline_model_parallel_size is 6; the former must be a multiple"
        ),
    ),
    (
        {"parallel.pipeline_model_parallel_layout": "auto"},
        1,
        "parallel.pipeline_model_parallel_layout is 'auto' and parallel.pipeline_model_parallel_size is 1;",
    ),
    (
        PP2 | {"parallel.pipeline_model_parallel_layout": "Et*4|x"},
        2,
        "parallel.pipeline_model_parallel_layout is 'Et*4|x'; it has E, t, L, |, * and brackets",
    ),
    (
        PP2 | {"parallel.pipeline_model_parallel_layout": "Et*4|tt|ttL"},
        2,
        "is 'Et*4|tt|ttL', which has 3 parts between |; it needs 2: ",
    ),
    (
        PP2 | {"parallel.pipeline_model_parallel_layout": "Et*4|tttL"},
        2,
        "which is 1 E, 7 t and 1 L; it needs one E at the beginning, 8 t (model.num_layers) and one L",
    ),
    (
        PP2 | {"parallel.pipeline_model_parallel_layout": "Et*8|L"},
        2,
        "is 'Et*8|L'; part 1 has no layer (t), and every part needs one.",
    ),
    (
        PP2 | {"parallel.pipeline_in_flight": 3},
        2,
        "parallel.pipeline_in_flight is 3, but each micro-batch comes to a stage once, and Megatron's",
    ),
    (
        PP2 | {"parallel.pipeline_in_flight": 0, "compression.layer_types": "0_6_6_6_6_6_6_7"},
        2,
        "parallel.pipeline_in_flight is 0; it must be at least 1, or left out.",
    ),
    (
        {"parallel.overlap_param_gather": True},
        1,
        (
            "parallel.use_distributed_optimizer is true and parallel.overlap_grad_reduce is false; the first "
            "needs the other two"
        ),
    ),
    (
        {"parallel.distributed_timeout_minutes": 0},
        1,
        "parallel.distributed_timeout_minutes is 0.0; it must be a number greater",
    ),
    (
        {"parallel.context_parallel_size": 0},
        1,
        "parallel.context_parallel_size is 0; it must be at least 1.",
    ),
    (
        cp(2) | p(2),
        6,
        (
            "6 processes were started, parallel.tensor_model_parallel_size is 2, "
            "parallel.pipeline_model_parallel_size is 1 and parallel.context_parallel_size is 2; the number "
            "of processes must be a multiple of their product 4: change one of these numbers"
        ),
    ),
    (
        cp(3) | {"train.global_batch_size": 8},
        3,
        (
            "train.seq_length is 1024 and 2 * parallel.context_parallel_size is 6; the former must be a "
            "multiple of the latter: every rank holds two chunks"
        ),
    ),
    (
        cp(2) | p(4) | {"parallel.sequence_parallel": True, "train.seq_length": 1020},
        8,
        (
            "train.seq_length / parallel.context_parallel_size is 510 and "
            "parallel.tensor_model_parallel_size is 4; the former must be a multiple of the latter"
        ),
    ),
    (
        cp(2) | {"model.attention_dropout": 0.1},
        2,
        (
            "parallel.context_parallel_size is 2 and model.attention_dropout is 0.1; attention of a chunk to "
            "what comes before it has no dropout: set the former to 1, or the latter to 0."
        ),
    ),
    (
        ring() | {"compression.layer_types": "0_1_2_2_2_2_2_2"},
        2,
        (
            "parallel.context_parallel_communication is ring and in compression.layer_types layer 3 reads "
            "the keys and values of layer 2; a layer that others read gathers once for all of them: use "
            "gather."
        ),
    ),
    (
        ring() | {"compression.layer_types": "0_1s_2_3_4_5_6_7", "compression.sliding_window": 64},
        2,
        (
            "parallel.context_parallel_communication is ring and layer 1 has a sliding window "
            "(compression.sliding_window is 64); windows end inside of the parts that go round"
        ),
    ),
    (
        ring() | dmc(stage="finetune") | {"compression.force_nodiag": True},
        2,
        (
            "parallel.context_parallel_communication is ring, compression.policy.name is dmc and "
            "compression.force_nodiag is true; a query then sees keys of other parts without the bias"
        ),
    ),
    (
        ring() | {"model.attention_backend": "reference"},
        2,
        (
            "parallel.context_parallel_communication is ring and model.attention_backend is reference, which "
            "attends to whole sequences only: use gather, or set the latter to auto or sdpa."
        ),
    ),
    (
        p(2) | {"parallel.pipeline_model_parallel_size": 2},
        6,
        (
            "parallel.pipeline_model_parallel_size is 2; the number of processes must be a multiple of their "
            "product 4: change one"
        ),
    ),
    (
        {"train.global_batch_size": 10, "train.micro_batch_size": 2},
        2,
        "data-parallel size is 2; the first must be a multiple of the others' product 4, for instance 12.",
    ),
    ({"train.train_iters": 0}, 1, "train.train_iters is 0; it must be at least 1."),
    ({"train.eval_interval": -1}, 1, "train.eval_interval is -1; it must be at least 0."),
    ({"train.eval_interval": 5, "train.eval_iters": 0}, 1, "train.eval_iters is 0; it must be at least 1."),
    ({"train.seed": -1}, 1, "train.seed is -1; it must be from 0 to 2147483647."),
    (
        {"train.exit_duration_minutes": 0, "checkpoint.save": "x"},
        1,
        "train.exit_duration_minutes is 0.0; it must be a number",
    ),
    (
        {"train.recompute_modules": ["core_attn", "moe"]},
        1,
        "train.recompute_modules has moe; the modules that can be recomputed",
    ),
    (
        {"train.recompute_granularity": "selective", "train.recompute_modules": []},
        1,
        "train.recompute_granularity is selective and train.recompute_modules is empty; name some",
    ),
    (
        {"train.recompute_num_layers": 2},
        1,
        "train.recompute_num_layers is 2 and train.recompute_granularity is none; the former",
    ),
    (
        {
            "train.recompute_num_layers": 5,
            "train.recompute_granularity": "full",
            "parallel.pipeline_model_parallel_size": 2,
        },
        2,
        "train.recompute_num_layers is 5; a pipeline stage has at most 4 layers",
    ),
    ({"optimizer.lr": 0}, 1, "optimizer.lr is 0.0; it must be a number greater than 0."),
    (
        {"optimizer.min_lr": 1},
        1,
        "optimizer.min_lr is 1.0 and optimizer.lr is 0.0003; the former must be at most the latter.",
    ),
    ({"optimizer.min_lr": -1}, 1, "optimizer.min_lr is -1.0; it must be at least 0."),
    ({"optimizer.adam_beta2": 1}, 1, "optimizer.adam_beta2 is 1.0; it must be at least 0 and less than 1."),
    ({"optimizer.clip_grad": -1}, 1, "optimizer.clip_grad is -1.0; it must be at least 0."),
    ({"optimizer.lr_decay_iters": 0}, 1, "optimizer.lr_decay_iters is 0; it must be at least 1."),
    (
        {"optimizer.lr_warmup_iters": 1000},
        1,
        (
            "optimizer.lr_warmup_iters is 1000 and train.train_iters (the default of "
            "optimizer.lr_decay_iters) "
            "is 1000; the former"
        ),
    ),
    (
        {"optimizer.lr_warmup_iters": 5, "optimizer.lr_decay_iters": 5},
        1,
        (
            "optimizer.lr_warmup_iters is 5 and optimizer.lr_decay_iters is 5; the former must be less than "
            "the "
            "latter."
        ),
    ),
    (
        {
            "optimizer.lr_decay_style": "WSD",
            "optimizer.lr_warmup_iters": 900,
            "optimizer.lr_wsd_decay_iters": 101,
        },
        1,
        "optimizer.lr_wsd_decay_iters is 101; between optimizer.lr_warmup_iters 900 and train.train_iters",
    ),
    ({"data.format": "chat"}, 1, "data.format is chat and data.mock is true; random documents are no"),
    (
        FILES | {"data.format": "chat", "data.eod_mask_loss": True},
        1,
        "data.eod_mask_loss is true and data.format is chat; a conversation has no token after its end",
    ),
    (
        FILES | {"data.chat_overlong": "drop"},
        1,
        "data.chat_overlong is drop and data.format is pretraining; only conversations can be too long",
    ),
    ({"data.mock": False}, 1, "data.data_path, data.train_data_path and data.mock are all unset."),
    (
        {"data.data_path": ["a"]},
        1,
        "data.mock is true and data.data_path is given; use random documents or files, not both.",
    ),
    (FILES | {"data.train_data_path": ["a"]}, 1, "data.data_path and data.train_data_path are both given."),
    (
        FILES | {"data.data_path": ["1", "a", "b"]},
        1,
        "data.data_path: entry 3 is 'b', but a weight belongs there.",
    ),
    (FILES | {"data.split": "a,b,c"}, 1, "data.split='a,b,c' must be one to three shares"),
    (
        FILES | {"data.split": "9,0,1", "train.eval_interval": 5},
        1,
        "train.eval_interval is 5 and there is no validation data",
    ),
    (
        {"data.mock": False, "data.train_data_path": ["a"], "train.eval_interval": 5},
        1,
        "train.eval_interval is 5 and there is no validation data; give data.valid_data_path",
    ),
    ({"data.num_workers": -1}, 1, "data.num_workers is -1; it must be at least 0."),
    (
        {"data.index_timeout_minutes": 0},
        1,
        "data.index_timeout_minutes is 0.0; it must be a number greater than 0.",
    ),
    (
        {"data.tokenizer_type": "tiktoken"},
        1,
        "data.tokenizer_type is tiktoken and data.tokenizer_model is not set",
    ),
    (
        {"data.tokenizer_model": "t"},
        1,
        "data.tokenizer_model is t and data.tokenizer_type is none; set the latter",
    ),
    ({"model.vocab_size": None}, 1, "data.mock is true and the vocabulary is unknown; set model.vocab_size"),
    (
        {"checkpoint.save_interval": 5},
        1,
        "checkpoint.save_interval is 5 and checkpoint.save is not set; give the directory",
    ),
    ({"checkpoint.save_interval": -5}, 1, "checkpoint.save_interval is -5; it must be at least 0."),
    ({"checkpoint.keep_last": 0}, 1, "checkpoint.keep_last is 0; it must be at least 1."),
    ({"checkpoint.resume": "must"}, 1, "checkpoint.resume is must and checkpoint.save is not set; give the"),
    ({"checkpoint.save": ""}, 1, "checkpoint.save is empty; give a directory, or null."),
    ({"checkpoint.load": ""}, 1, "checkpoint.load is empty; give a directory, or null."),
    ({"checkpoint.save_timeout_minutes": 0}, 1, "checkpoint.save_timeout_minutes is 0"),
    ({"checkpoint.load_timeout_minutes": -1}, 1, "checkpoint.load_timeout_minutes is -1"),
    (
        {"train.exit_duration_minutes": 5},
        1,
        "train.exit_duration_minutes is 5.0 and checkpoint.save is not set; give the directory",
    ),
    ({"checkpoint.async_save": True}, 1, "checkpoint.async_save is true and checkpoint.save is not set"),
    (
        {"checkpoint.optimizer_sharding": "dp_reshardable", "parallel.use_distributed_optimizer": False},
        1,
        "checkpoint.optimizer_sharding is dp_reshardable and parallel.use_distributed_optimizer is false",
    ),
    ({"checkpoint.finetune": True}, 1, "checkpoint.finetune is true and checkpoint.load is not set"),
    ({"logging.log_interval": 0}, 1, "logging.log_interval is 0; it must be at least 1."),
    ({"logging.peak_tflops": 0}, 1, "logging.peak_tflops is 0.0; it must be a number greater than 0."),
    (
        {"logging.wandb_name": "x"},
        1,
        "logging.wandb_name is x and logging.wandb_project is not set; give the project.",
    ),
    (
        {"model.transformer_impl": "transformer_engine"},
        1,
        "model.transformer_impl is transformer_engine, but Transformer Engine",
    ),
    (
        {"model.operator_backend": "triton"},
        1,
        (
            "model.operator_backend is triton, but Triton's kernels need CUDA tensors, the model is on cpu. "
            "Set model.operator_backend to auto or torch."
        ),
    ),
    (
        {"model.attention_backend": "flash"},
        1,
        "model.attention_backend is flash, but flash-attn needs CUDA tensors",
    ),
    (
        {"model.attention_backend": "flash3"},
        1,
        "model.attention_backend is flash3, but FlashAttention 3 needs CUDA tensors",
    ),
]


@pytest.mark.parametrize(
    ("changes", "world_size", "message"), CASES, ids=[" ".join(case[0]) for case in CASES]
)
def test_one_problem_is_found_and_nothing_else(changes, world_size, message):
    found = problems(run_with(changes), world_size)
    assert len(found) == 1, found
    assert message in found[0]


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        (p(4) | {"model.num_query_groups": 2}, 4),
        ({"parallel.pipeline_model_parallel_size": 2, "compression.layer_types": "0_0_2_2_4_4_6_6"}, 2),
        (PP2 | {"compression.layer_types": "0_6_6_6_6_6_6_7", "parallel.pipeline_in_flight": 1}, 2),
        (PP2 | {"parallel.pipeline_model_parallel_layout": "E(t)*3,|,t*5L"}, 2),
        (PP2 | {"parallel.virtual_pipeline_model_parallel_size": 4, "parallel.pipeline_in_flight": 9}, 2),
        ({"compression.layer_types": "0_6_6_6_6_6_6_7"} | p(2) | {"parallel.sequence_parallel": True}, 4),
        ({"parallel.overlap_param_gather": True, "parallel.overlap_grad_reduce": True}, 2),
        ({"train.recompute_granularity": "full", "train.recompute_num_layers": 8}, 1),
        ({"train.recompute_granularity": "selective", "train.recompute_modules": ["core_attn", "mlp"]}, 1),
        (FILES | {"data.data_path": ["0.3", "a", "7e-1", "b"], "train.eval_interval": 5}, 1),
        (
            {
                "data.mock": False,
                "data.train_data_path": ["a"],
                "data.valid_data_path": ["b"],
                "train.eval_interval": 5,
            },
            1,
        ),
        ({"model.vocab_size": None, "data.tokenizer_type": "tiktoken", "data.tokenizer_model": "t"}, 1),
        ({"checkpoint.save": "x", "checkpoint.save_interval": 5, "train.exit_duration_minutes": 5}, 1),
        (
            {
                "optimizer.lr_decay_style": "WSD",
                "optimizer.lr_warmup_iters": 900,
                "optimizer.lr_wsd_decay_iters": 100,
            },
            1,
        ),
        ({"logging.wandb_project": "x", "logging.wandb_mode": "disabled"}, 1),
        (dmc() | {"model.attention_dropout": 0.1, "model.kv_channels": 4}, 1),
        (dmc(stage="retrofit") | {"compression.layer_types": "0_6_6_6_6_6_6_7"}, 1),
        (
            dmc(stage="finetune")
            | {"compression.force_nodiag": True, "model.attention_backend": "reference"},
            1,
        ),
        (p(4) | dmc(stage="retrofit") | {"model.num_query_groups": 2}, 4),
    ],
)
def test_what_works_is_let_through(changes, world_size):
    assert problems(run_with(changes), world_size) == []


def test_all_problems_are_said_at_once_and_numbered():
    run = run_with({"train.train_iters": 0, "optimizer.lr": -1.0, "logging.log_interval": 0})
    with pytest.raises(ConfigError) as raised:
        validate(run, 1)
    lines = str(raised.value).splitlines()
    assert lines[0] == "3 settings cannot work:"
    assert lines[1] == "  1. train.train_iters is 0; it must be at least 1."
    assert [line[:4] for line in lines[1:]] == ["  1.", "  2.", "  3."]
    with pytest.raises(ConfigError, match=r"^1 setting cannot work:\n  1\. train.seed is -1"):
        validate(run_with({"train.seed": -1}), 1)


def test_several_problems_of_the_data_are_several():
    found = problems(run_with(FILES | {"data.data_path": ["1", "a", "b"], "data.split": "x"}), 1)
    assert len(found) == 2


def test_wandb_that_is_not_installed(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    found = problems(run_with({"logging.wandb_project": "x"}), 1)
    assert len(found) == 1
    assert "logging.wandb_project is x, but the package wandb is not installed; pip install" in found[0]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"model.kv_channels": 12}, True),
        ({"model.kv_channels": 264}, True),
        ({"model.kv_channels": 264, "train.precision": "fp32"}, False),
        ({"model.kv_channels": 12, "model.attention_backend": "reference"}, False),
        ({"model.kv_channels": 64}, False),
        ({"model.kv_channels": 12, "compression.policy": {"name": "dense"}}, False),
        ({"model.kv_channels": 12, "compression.policy": {"name": "dmc", "stage": "zero_out"}}, False),
    ],
)
def test_sizes_of_heads_that_cannot_merge_on_cuda(changes, refused, monkeypatch):
    run = run_with(dmc(stage="retrofit") | changes)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert problems(run, 1) == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = problems(run, 1)
    assert len(found) == refused
    if refused:
        assert found[0].startswith(
            f"model.kv_channels is {run.model.kv_channels}, compression.policy.name is dmc and "
            "compression.policy.stage is "
            "retrofit; on CUDA it must be a multiple of 8 and, in 16 bits, at most 256: choose another size"
        )


def test_an_odd_size_of_heads_is_said_once_on_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (found,) = problems(run_with(dmc(stage="retrofit") | {"model.kv_channels": 13}), 1)
    assert "it must be even" in found


SMALL = st.sampled_from([-7, -1, 0, 1, 2, 3, 4, 6, 8, 12])
SIZES = (
    "model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.num_query_groups",
    "model.kv_channels", "model.ffn_hidden_size", "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size", "train.micro_batch_size", "train.global_batch_size",
    "train.seq_length", "train.train_iters", "train.recompute_num_layers",
    "optimizer.lr_warmup_iters", "optimizer.lr_decay_iters", "optimizer.lr_wsd_decay_iters",
)  # fmt: skip


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(SIZES, SMALL)),
    st.sampled_from([{}, dmc(), dmc(stage="retrofit")]),
    st.booleans(),
    st.integers(1, 16),
)
def test_no_sizes_break_the_checks_and_what_they_let_through_divides(
    sizes, policy, sequence_parallel, world_size
):
    fixed = {"train.recompute_granularity": "full", "parallel.sequence_parallel": sequence_parallel}
    run = run_with(fixed | policy | sizes)
    if problems(run, world_size):
        return
    model, tensor = run.model, run.parallel.tensor_model_parallel_size
    replicas, left = divmod(world_size, tensor * run.parallel.pipeline_model_parallel_size)
    assert left == 0
    assert (
        model.num_attention_heads % tensor
        == model.num_attention_heads % model.query_groups
        == model.ffn_size % tensor
        == 0
    )
    assert model.num_layers % run.parallel.pipeline_model_parallel_size == 0
    assert run.train.global_batch_size % (run.train.micro_batch_size * replicas) == 0
    assert model.head_dim % 2 == 0


def test_validation_needs_no_torch():
    program = (
        "import sys; from megatron_ext.validation.run import problems; from megatron_ext.config import "
        "RunConfig;"
        "problems(RunConfig(), 8); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_settings_that_earlier_versions_saved_are_right() -> None:
    """They have the usual factor where there is no scaling."""
    assert problems(run_with({"model.rope_scaling.factor": 8}), 1) == []
