"""config.json of nemotron_h: every published spelling, and every refusal by name."""

import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.models.nemotron.config import NemotronConfig

PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
NANO = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 2688,
    "num_hidden_layers": 52, "hybrid_override_pattern": PATTERN, "num_attention_heads": 32, "num_key_value_heads": 2,
    "head_dim": 128, "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 262144,
    "sliding_window": None, "rope_theta": 10000, "partial_rotary_factor": 1.0, "tie_word_embeddings": False,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
    "use_conv_bias": True, "chunk_size": 128, "expand": 2, "mamba_hidden_act": "silu", "mamba_proj_bias": False,
    "use_bias": False, "mlp_bias": False, "mamba_ssm_cache_dtype": "float32", "time_step_min": 0.001,
    "time_step_max": 0.1, "time_step_floor": 1e-4, "n_routed_experts": 128, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_shared_experts": 1,
    "intermediate_size": 1856, "mlp_hidden_act": "relu2", "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "n_group": 1, "topk_group": 1, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5, "residual_in_fp32": False,
    "rescale_prenorm_residual": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_logits_to_keep": 1, "torch_dtype": "bfloat16", "transformers_version": "4.55.4",
}  # fmt: skip
WANT = NemotronConfig.from_json(NANO)
NEW = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
OLD = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}


def nano(*drop, **more):
    return {k: v for k, v in NANO.items() if k not in drop} | more


def test_published_values():
    assert (WANT.pattern, WANT.vocab_size, WANT.hidden_size) == (PATTERN, 131072, 2688)
    assert (WANT.mamba_inner, WANT.conv_dim, WANT.shared_width) == (4096, 6144, 3712)
    assert WANT.routed_scaling_factor == 2.5 and WANT.norm_topk_prob is True
    assert WANT.time_step_limit == (0.0, math.inf) and WANT.torch_dtype == "bfloat16"
    assert (WANT.bos_token_id, WANT.eos_token_ids, WANT.pad_token_id) == (1, (2,), 0)
    assert WANT.extra["expand"] == 2 and "hidden_size" not in WANT.extra


@pytest.mark.parametrize(
    "raw",
    [
        nano("hybrid_override_pattern", layers_block_type=[NEW[k] for k in PATTERN]),
        nano("hybrid_override_pattern", "num_hidden_layers", layers_block_type=[OLD[k] for k in PATTERN]),
        nano("hybrid_override_pattern", layer_types=[OLD[k] for k in PATTERN]),
        nano(layers_block_type=[NEW[k] for k in PATTERN], layer_types=[NEW[k] for k in PATTERN]),
        nano("num_hidden_layers"),
        nano(time_step_limit=[0.0, {"__float__": "Infinity"}]),
        nano(time_step_limit=[0, math.inf]),
        nano(time_step_limit=None),
        nano("torch_dtype", dtype="bfloat16"),
        nano("torch_dtype", dtype="torch.bfloat16"),
        nano("torch_dtype", dtype=None),
        nano("n_groups", "conv_kernel", "use_conv_bias", "chunk_size", "expand", mamba_n_groups=8, mamba_d_conv=4,
             mamba_conv_bias=True, mamba_chunk_size=128, mamba_expand=2, mamba_dt_min=0.001, mamba_dt_max=0.1,
             mamba_dt_limit=[0.0, math.inf], mamba_dt_init_floor=1e-4),
        nano(mamba_n_groups=8),
        nano("n_routed_experts", num_local_experts=128),
        {"llm_config": NANO, "model_type": "nemotron_vl", "vision_config": {}},
        {"text_config": nano("torch_dtype", "eos_token_id"), "dtype": "bfloat16", "eos_token_id": [2]},
        {"text_config": NANO, "model_type": "x", "dtype": "float16", "torch_dtype": "float32"},
        nano(moe_latent_size=None, num_nextn_predict_layers=0),
        nano(pad_token_id=0, quantization_config={"quant_method": "modelopt"}),
    ],
)  # fmt: skip
def test_every_spelling_gives_the_same(raw):
    before = copy.deepcopy(raw)
    assert NemotronConfig.from_json(raw) == WANT
    assert raw == before


def test_files_and_stop_ids(tmp_path):
    text = json.dumps(nano(time_step_limit=[0.0, math.inf]))
    assert "Infinity" in text
    (tmp_path / "config.json").write_text(text)
    assert NemotronConfig.from_folder(tmp_path) == WANT
    for given_ids, want in (([2, 11], (2, 11)), (11, (2, 11)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given_ids}))
        assert NemotronConfig.from_folder(tmp_path).eos_token_ids == want
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [131072]}')
    with pytest.raises(
        ConfigError, match=r"generation_config.json: eos_token_id = 131072; an integer from 0 to 131071"
    ):
        NemotronConfig.from_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        NemotronConfig.from_folder(tmp_path)


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"a":' * 9000, "\x00", '{"vocab_size": ' + "9" * 5000 + "}"])
def test_missing_and_damaged_files(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        NemotronConfig.from_folder(tmp_path)
    with pytest.raises(ConfigError, match="not a folder"):
        NemotronConfig.from_folder(tmp_path / "none")


def test_config_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "real.json").write_text(json.dumps(NANO))
    (tmp_path / "x" / "config.json").symlink_to(tmp_path / "real.json")
    with pytest.raises(ConfigError, match="outside"):
        NemotronConfig.from_folder(tmp_path / "x")


@pytest.mark.parametrize(
    "raw",
    [
        NANO,
        nano(eos_token_id=[2, 11], tie_word_embeddings=True, time_step_limit=[0.001, 5.0], torch_dtype="float32"),
        nano("num_hidden_layers", hybrid_override_pattern="M-*E", num_nextn_predict_layers=1, eos_token_id=None),
        {"vocab_size": 100, "hidden_size": 8, "hybrid_override_pattern": "--", "intermediate_size": 12},
        {"vocab_size": 100, "hidden_size": 8, "hybrid_override_pattern": "*", "num_attention_heads": 2,
         "num_key_value_heads": None, "head_dim": None},
    ],
)  # fmt: skip
def test_to_json_round_trip(raw):
    config = NemotronConfig.from_json(raw)
    text = json.dumps(config.to_json(), allow_nan=False)  # strict JSON
    again = NemotronConfig.from_json(json.loads(text))
    assert again == config and again.extra.items() >= config.extra.items()


def test_null_heads_follow_the_published_meaning():
    config = NemotronConfig.from_json(nano(num_key_value_heads=None, head_dim=None))
    assert (config.num_key_value_heads, config.head_dim) == (32, 84)


def test_keys_of_absent_layer_kinds_are_not_needed():
    raw = {"vocab_size": 10, "hidden_size": 8, "hybrid_override_pattern": "-", "intermediate_size": 4}
    config = NemotronConfig.from_json(raw | {"n_groups": 3, "conv_kernel": "four", "n_routed_experts": 10**9})
    assert (config.n_groups, config.conv_kernel, config.head_dim, config.n_routed_experts) == (3, 1, 1, 0)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"hybrid_override_pattern": PATTERN[:-1] + "X"}, "layer 51 is of unknown kind 'X'"),
        ({"hybrid_override_pattern": ""}, "names 0 layers"),
        ({"hybrid_override_pattern": "M" * 2000}, "1 to 1024"),
        ({"hybrid_override_pattern": 7}, "a string of M, E"),
        ({"hybrid_override_pattern": None}, "neither"),
        ({"layers_block_type": ["mamba"] * 52}, "describe different layers"),
        ({"layers_block_type": "mamba"}, "a list of layer kinds"),
        ({"layers_block_type": [["mamba"]] * 52}, "unknown kind"),
        ({"layer_types": ["sliding_attention"] * 52}, "unknown kind 'sliding_attention'"),
        ({"num_hidden_layers": 51}, "num_hidden_layers = 51, but"),
        ({"num_hidden_layers": "52"}, "num_hidden_layers = '52'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"moe_latent_size": 1024}, "moe_latent_size = 1024: latent mixture of experts"),
        ({"moe_latent_size": 0}, "moe_latent_size"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu'.*'relu2'"),
        ({"mamba_hidden_act": "relu2"}, "mamba_hidden_act = 'relu2'.*'silu'"),
        ({"vocab_size": 0}, "vocab_size = 0; an integer from 1 to"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"hidden_size": 2688.0}, "hidden_size = 2688.0"),
        ({"hidden_size": -1}, "hidden_size = -1"),
        ({"hidden_size": 10**4000}, "hidden_size = "),
        ({"n_routed_experts": 2**62}, "n_routed_experts = 4611686018427387904; an integer from 1 to"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 3"),
        ({"n_groups": 7}, "mamba_num_heads = 64 is not a multiple of n_groups = 7"),
        ({"n_group": 3}, "n_routed_experts = 128 is not a multiple of n_group = 3"),
        ({"topk_group": 2}, "topk_group = 2 is more than n_group = 1"),
        ({"n_group": 128}, "group scores need 2"),
        ({"n_group": 64, "topk_group": 2}, "num_experts_per_tok = 6 is more than the 4 experts"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok = 129"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0"),
        ({"mamba_num_heads": 4096, "mamba_head_dim": 4096}, "at most 1048576"),
        ({"head_dim": 4096, "num_attention_heads": 4096}, "at most 1048576"),
        ({"hidden_size": 131072, "moe_intermediate_size": 262144, "n_routed_experts": 16384}, "parameters"),
        ({"conv_kernel": 1000}, "conv_kernel = 1000"),
        ({"time_step_limit": [0.1]}, "time_step_limit"),
        ({"time_step_limit": [0.1, 0.01]}, r"time_step_limit\[1\] = 0.01; a number above 0.1"),
        ({"time_step_limit": [math.nan, 1]}, "time_step_limit"),
        ({"time_step_limit": [False, 1]}, "time_step_limit"),
        ({"time_step_limit": [math.inf, math.inf]}, "time_step_limit"),
        ({"routed_scaling_factor": math.nan}, "routed_scaling_factor = nan"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon = 0"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
        ({"norm_topk_prob": 1}, "norm_topk_prob = 1; true or false"),
        ({"torch_dtype": "int8"}, "torch_dtype = 'int8'; one of bfloat16"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype"),
        ({"dtype": "float16"}, "dtype = 'float16' and torch_dtype = 'bfloat16' disagree"),
        ({"mamba_n_groups": 4}, "mamba_n_groups = 4 and n_groups = 8 disagree"),
        ({"eos_token_id": [2, 131072]}, "eos_token_id = 131072; an integer from 0 to 131071"),
        ({"eos_token_id": list(range(2000))}, "at most 1024"),
        ({"bos_token_id": "1"}, "bos_token_id = '1'"),
    ],
)
def test_refused_by_name(more, says):
    with pytest.raises(ConfigError, match=says):
        NemotronConfig.from_json(nano(**more))


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "hybrid_override_pattern", "num_attention_heads", "num_key_value_heads", "head_dim",
     "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "n_routed_experts",
     "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size"],
)  # fmt: skip
def test_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=key):
        NemotronConfig.from_json(nano(key))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=6,
)
KEYS = [*NANO, "layers_block_type", "layer_types", "time_step_limit", "dtype", "mamba_n_groups", "llm_config"]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3), st.sets(st.sampled_from(KEYS), max_size=2))
def test_fuzz_config(more, drop):
    try:
        config = NemotronConfig.from_json(nano(*drop, **more))
    except ConfigError:
        return
    assert NemotronConfig.from_json(config.to_json()) == config


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_fuzz_whole_document(value):
    with pytest.raises(ConfigError):
        NemotronConfig.from_json(value)
