"""config.pbtxt files are Triton's, and say what the code reads and writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from rtp_llm.export.bundle import read
from rtp_llm.runtime.tritonserver import repository

ROOT = Path(__file__).parents[2]
MODELS = ("vlm", "vlm_complete")


@pytest.fixture(scope="module")
def configs(qwen_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository") / "models"
    settings = {"served_model_name": 'a "quoted" name\\', "max_images": "4"}
    repository.assemble(read(qwen_bundle), folder, settings=settings)
    return {
        name: text_format.Parse((folder / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        for name in MODELS
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_named_as_its_folder_and_keeps_the_settings(configs, name, qwen_bundle):
    config = configs[name]
    assert config.name == name and config.backend == "python" and config.max_batch_size == 0
    settings = json.loads(config.parameters["settings"].string_value)
    assert settings == {"served_model_name": 'a "quoted" name\\', "max_images": "4"}
    assert Path(config.parameters["bundle"].string_value) == qwen_bundle


def test_the_language_model_is_one_decoupled_instance_that_is_warmed_up(configs):
    vlm = configs["vlm"]
    assert [configs[name].model_transaction_policy.decoupled for name in MODELS] == [True, False]
    [group] = vlm.instance_group
    assert group.count == 1 and group.rate_limiter.resources[0].count == 1
    assert vlm.version_policy.latest.num_versions == 1
    [warmup] = vlm.model_warmup
    for name, value in warmup.inputs.items():
        data = (ROOT / "model_repository" / "vlm" / "warmup" / value.input_data_file).read_bytes()
        text = data[4:]
        assert int.from_bytes(data[:4], "little") == len(text) >= 16, name


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_of_the_code_is_declared_and_none_besides(configs, name):
    code = (ROOT / "runtime" / "tritonserver" / "tensors.py").read_text()
    code += (ROOT / "runtime" / "tritonserver" / "vlm.py").read_text()
    read_by_code = set(re.findall(r'(?:flag|_text|_json|_items)\(tensors, "(\w+)"', code))
    read_by_code |= set(re.findall(r'tensors(?:\.get\(|\[)"(\w+)"[)\]]', code))
    if name == "vlm_complete":
        read_by_code -= {"stream", "stop"}
    assert {i.name for i in configs[name].input} == read_by_code
    assert all(i.optional for i in configs[name].input)
    found = re.search(r"OUTPUTS = \((.*?)\)", code)
    assert found and [o.name for o in configs[name].output] == re.findall(r'"(\w+)"', found[1])
