"""scripts/bench.py: its workload is nano-vLLM's, its arithmetic is right, and it runs."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from nanovllm_jax.config import ModelConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"
SMALL = ["--requests", "8", "--max-len", "64", "--runs", "2", "--latency-tokens", "4"]
ENGINE = ["--load-format", "dummy", "--max-model-len", "256", "--max-num-batched-tokens", "256",
          "--max-num-seqs", "16", "--num-kvcache-blocks", "20"]  # fmt: skip


def load_script():
    spec = importlib.util.spec_from_file_location("bench", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = load_script()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny model's directory: a config.json is all that random weights need."""
    path = tmp_path_factory.mktemp("tiny")
    shape = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    (path / "config.json").write_text(
        json.dumps(bench.qwen3_config("0.6B") | shape | {"torch_dtype": "float32"})
    )
    return path


def test_the_workload_is_nano_vllms():
    work = bench.random_workload(0, 256, 1024, 151936)
    assert (work.prompt_tokens, work.output_tokens) == (142_827, 133_966)
    random.seed(0)  # as nano-vLLM's bench.py draws it
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in "ab"]
    assert work.prompts[:2] == prompts


def test_token_ids_stay_inside_a_small_vocabulary():
    work = bench.random_workload(0, 8, 64, 300)
    assert max(map(max, work.prompts)) < 300


def test_context_tokens_counts_what_each_decode_step_attends_to():
    work = bench.Workload([[0] * 10, [0] * 3], [1, 4])
    assert work.context_tokens == 4 + 5 + 6  # the first token of each comes from its prefill


@pytest.mark.parametrize(
    ("size", "billions", "kv_bytes"),
    [("0.6B", 0.596, 114688), ("8B", 7.57, 147456), ("32B", 31.98, 262144)],
)
def test_traffic_of_the_published_sizes(tmp_path, size, billions, kv_bytes):
    (tmp_path / "config.json").write_text(json.dumps(bench.qwen3_config(size)))
    traffic = bench.Traffic.of(ModelConfig.from_directory(tmp_path), "auto")
    assert traffic.weights_per_step == pytest.approx(2e9 * billions, rel=2e-3)
    assert traffic.kv_per_token == kv_bytes


def test_all_measurements_run_and_are_written_as_one_json_line(model_dir, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    argv = [str(model_dir), "--all", "--bandwidth", "0.01", "--json", str(out), *SMALL, *ENGINE]
    assert bench.main(argv) == 0
    (line,) = out.read_text().splitlines()
    result = json.loads(line)
    work = bench.random_workload(0, 8, 64, 300)
    assert result["throughput"]["output_tokens"] == work.output_tokens
    assert result["throughput"]["prefill_tokens"] == work.prompt_tokens
    assert result["throughput"]["output_tok_s"] > 0
    assert result["throughput"]["share_of_limit"] > 0
    assert set(result["latency"]) == {"output_tokens", "batch_1", "batch_16", "batch_64"}
    assert result["prefill"]["input_tok_s"] > 0
    assert "at 0.01 TB/s is the limit" in capsys.readouterr().out


def test_without_a_known_bandwidth_no_share_is_printed(model_dir, capsys):
    assert bench.main([str(model_dir), *SMALL, *ENGINE]) == 0
    assert "memory" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [[], [str(SCRIPT.parent)], ["dir", "--random-weights", "8B"], ["--random-weights", "9B"],
     ["--random-weights", "8B", "--runs", "0"], ["--random-weights", "8B", "--detokenize"]],
)  # fmt: skip
def test_a_bad_command_line_is_refused(argv):
    with pytest.raises(SystemExit) as ended:
        bench.main(argv)
    assert ended.value.code == 2
