"""`nanovllm-jax bench`: its workload is nano-vLLM's, its arithmetic is right, and it runs."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import quick_start

from nanovllm_jax.cli import main
from nanovllm_jax.tools import bench
from nanovllm_jax.tools.shapes import SHAPES, write_config
from scripts import bench_arrivals

SMALL = ["--requests", "8", "--max-len", "64", "--runs", "2", "--latency-tokens", "4"]
ENGINE = ["--load-format", "dummy", "--max-model-len", "256", "--max-num-batched-tokens", "256",
          "--max-num-seqs", "16", "--num-kvcache-blocks", "20"]  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny model's directory: a config.json is all that random weights need."""
    path = tmp_path_factory.mktemp("tiny")
    tiny = replace(
        SHAPES["0.6B"], vocab_size=300, eos_token_ids=(2,), hidden_size=32, intermediate_size=64,
        num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, dtype="float32",
    )  # fmt: skip
    write_config(tiny, path)
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


def test_all_measurements_run_and_are_written_as_one_json_line(model_dir, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    argv = [str(model_dir), "--all", "--bandwidth", "0.01", "--json", str(out), *SMALL, *ENGINE]
    # Requests that decode for many more rounds than the 20 to 100 after which others arrive.
    argv += ["--max-model-len", "1024", "--max-num-batched-tokens", "1024"]
    argv += ["--num-kvcache-blocks", "80", "--num-scheduler-steps", "2"]
    assert main(["bench", *argv]) == 0
    (line,) = out.read_text("utf-8").splitlines()
    result = json.loads(line)
    work = bench.random_workload(0, 8, 64, 300)
    assert result["throughput"]["output_tokens"] == work.output_tokens
    assert result["throughput"]["prefill_tokens"] == work.prompt_tokens
    assert result["throughput"]["output_tok_s"] > 0
    assert result["throughput"]["share_of_limit"] > 0
    names = {"output_tokens", "batch_1", "batch_16", "batch_64", "newcomer"}
    assert set(result["latency"]) == names and result["latency"]["newcomer"]["ttft_ms"] > 0
    assert result["prefill"]["input_tok_s"] > 0
    assert "at 0.01 TB/s is the limit" in capsys.readouterr().out


def test_without_a_known_bandwidth_no_share_is_printed(model_dir, capsys):
    assert main(["bench", str(model_dir), *SMALL, *ENGINE]) == 0
    assert "memory" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "either MODEL_DIR or --random-weights"),
        (["/no/such/model"], "/no/such/model"),
        (["dir", "--random-weights", "8B"], "either MODEL_DIR or --random-weights"),
        (["--random-weights", "9B"], "9B"),
        (["--random-weights", "8B", "--runs", "0"], "--runs must be positive, got 0"),
        (["--random-weights", "8B", "--max-len", "1"], "--max-len must be at least 2, got 1"),
        (["--random-weights", "8B", "--detokenize"], "tokenizer"),
        (["--random-weights", "8B", "--json", "/no/such/folder/file"], "/no/such/folder/file"),
    ],
)
def test_a_bad_command_line_is_one_line_and_status_2(capsys, argv, message):
    assert main(["bench", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nanovllm-jax: error: ") and message in line


def test_the_script_that_people_know_runs_the_command():
    script = Path(__file__).parents[1] / "scripts" / "bench.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0 and "usage: nanovllm-jax bench" in done.stdout


def test_arrivals_are_measured_under_each_setting(model_dir, capsys):
    argv = [str(model_dir), *ENGINE, "--prompt", "2", "200", "--output", "3", "9"]
    argv += ["--rates", "20", "--seconds", "2", "--warm", "0.5", "--repeats", "1"]
    with quick_start():
        assert bench_arrivals.main([*argv, "--chunks", "0", "64", "--mixed", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "rate 20/s, turn 1"
    rates = {line[:11].strip(): float(line[11:21]) for line in lines[3:]}
    assert list(rates) == ["none", "64", "mixed 32"]
    assert min(rates.values()) > 60


def test_stalls_and_first_tokens_are_counted_from_what_readers_see():
    streams = [
        bench_arrivals.Stream(due=1.0, times=[1.5, 1.6, 1.7]),
        bench_arrivals.Stream(due=2.0, times=[2.1, 2.9, 3.2]),
    ]
    args = bench_arrivals.parse(["--random-weights", "8B", "--seconds", "3", "--warm", "1.2"])
    row = bench_arrivals.report(0.0, streams, args)
    assert row["tok/s"] == pytest.approx(5 / 1.8) and row["drain"] == pytest.approx(200)
    assert row["TTFT p50"] == pytest.approx(100), "the first one arrived while it was not counted"
    assert row["ITL max"] == pytest.approx(800) and row["ITL p50"] == pytest.approx(200)
    assert row["stalls"] == 100.0
