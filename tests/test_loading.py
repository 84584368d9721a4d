"""Models for the command line: tiny ones of a type, checkpoint folders, and what is not loaded."""

import json
import pickle

import pytest
import torch

from dmoe_compile import loading

ROUTING = {
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8},
    "deepseek_v3": {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
    "gpt_oss": {"num_local_experts": 128, "num_experts_per_tok": 4},
    "diffusion_gemma": {"num_experts": 128, "top_k_experts": 8},
}


@pytest.mark.parametrize("model_type", ROUTING)
def test_tiny_models_keep_the_routing_of_their_type(model_type):
    loaded = loading.load(model_type, batch=2, tokens=8)
    config = loaded.model.config.get_text_config(decoder=True)
    assert {name: getattr(config, name) for name in ROUTING[model_type]} == ROUTING[model_type]
    assert config.num_hidden_layers == 2
    assert loaded.inputs["input_ids"].shape == (2, 8)
    assert model_type in loaded.note
    assert loaded.block_length == (256 if model_type == "diffusion_gemma" else None)
    with torch.no_grad():
        assert loaded.model(**loaded.inputs).logits.isfinite().all()


FILLED = {"deepseek_v2": "num_experts_per_tok=4", "dots1": "n_routed_experts=16", "hunyuan_v1_moe": "num_experts=16"}


@pytest.mark.parametrize("model_type", FILLED)
def test_what_a_default_config_lacks_of_its_routing_is_filled_and_said(model_type):
    _, note = loading.load_model(model_type)
    assert "routing as in the default config, but " in note
    assert FILLED[model_type] in note


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe"], ids=["too large when shrunk"])
def test_a_type_that_can_not_be_shrunk_says_why(model_type):
    with pytest.raises(ValueError, match=rf"{model_type} cannot be built tiny \(.+\); give a checkpoint folder"):
        loading.load(model_type)


@pytest.fixture
def checkpoint(tmp_path):
    loading.load("mixtral", seed=4).model.to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_folder_loads_as_it_is(checkpoint):
    loaded = loading.load(str(checkpoint), tokens=5)
    original = loading.load("mixtral", seed=4).model.to(torch.bfloat16)
    assert type(loaded.model) is type(original)
    assert not loaded.model.training
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], weight, rtol=0, atol=0)
    assert str(checkpoint) in loaded.note


def test_only_safetensors_are_loaded(checkpoint):
    class Evil:
        def __reduce__(self):
            return (checkpoint.joinpath("opened").touch, ())

    checkpoint.joinpath("model.safetensors").unlink()
    checkpoint.joinpath("pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        loading.load(str(checkpoint))
    assert not checkpoint.joinpath("opened").exists()


def test_code_in_a_folder_is_not_run_unless_trusted(checkpoint):
    config = json.loads(checkpoint.joinpath("config.json").read_text())
    config |= {"model_type": "of_my_own", "auto_map": {"AutoConfig": "code.MyConfig", "AutoModel": "code.MyModel"}}
    checkpoint.joinpath("config.json").write_text(json.dumps(config))
    checkpoint.joinpath("code.py").write_text(f"open({str(checkpoint / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="does not load"):
        loading.load(str(checkpoint))
    assert not checkpoint.joinpath("ran").exists()


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        loading.load(str(tmp_path))


def test_half_a_file_is_no_checkpoint(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"does not load: .*incomplete metadata, file not fully covered"):
        loading.load(str(checkpoint))


def test_a_missing_shard_is_said(checkpoint):
    loading.load("mixtral").model.save_pretrained(checkpoint, max_shard_size="100KB")
    checkpoint.joinpath("model.safetensors").unlink()
    first = sorted(checkpoint.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=f"does not load: .*{first.name}"):
        loading.load(str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 3},
            r"holds no weights for model\.layers\.2\..* and \d+ more; a file is missing, or con",
        ),
        ({"num_local_experts": 4}, "does not load: .*mismatched_sizes"),
        ({"hidden_size": 32, "head_dim": 8}, "does not load: .*mismatched_sizes"),
    ],
    ids=str,
)
def test_weights_are_never_made_up(checkpoint, changes, message):
    """Of what config.json asks for and the files don't have, transformers makes weights up, and says so in a table."""
    config = json.loads(checkpoint.joinpath("config.json").read_text())
    checkpoint.joinpath("config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        loading.load(str(checkpoint))


def test_weights_that_the_config_does_not_speak_of_are_said(checkpoint, caplog):
    config = json.loads(checkpoint.joinpath("config.json").read_text())
    checkpoint.joinpath("config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    loading.load(str(checkpoint))
    assert "weights that its config.json does not speak of, such as model.layers.1." in caplog.text
