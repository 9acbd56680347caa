"""`nanovllm-jax profile`: its tables, and that it runs."""

import gzip
import json
from dataclasses import replace

import pytest

from nanovllm_jax.cli import main
from nanovllm_jax.tools import profile
from nanovllm_jax.tools.roofline import Work
from nanovllm_jax.tools.shapes import SHAPES, write_config


def test_a_table_has_times_a_step_and_shares_of_the_limit(capsys):
    events = [(0, 4_000, "gemm"), (4_000, 6_000, "gemm"), (7_000, 9_000, "argmax")] * 2
    events = [(s + 20_000 * (i > 2), e + 20_000 * (i > 2), n) for i, (s, e, n) in enumerate(events)]
    costs = {"products": Work(bytes=6, flops=3), "sampling": Work(bytes=1)}
    table = profile.tabulate(events, 2, "argmax", {}, costs, (2e6, None), layers=2)
    products, sampling = table["categories"]["products"], table["categories"]["sampling"]
    assert (products["calls"], products["us"], products["us_layer"]) == (2, 6, 3)
    assert products["limit_us"] is None  # the rate of products is unknown
    assert (sampling["us"], sampling["us_layer"]) == (2, 0)
    assert (sampling["limit_us"], sampling["share_of_limit"]) == (0.5, 0.25)
    assert table["busy_us"] == 8
    assert (table["total"]["us"], table["total"]["bytes"], table["total"]["limit_us"]) == (
        8,
        7,
        None,
    )
    assert (table["gaps_within_us"], table["gaps_between_us"]) == (1, 5.5)
    table |= {"rows": 2, "tokens": 2, "context_tokens": 18, "loop_us": 12, "alone_us": 10}
    profile.show("decode-2", table, layers=2, top=1)
    printed = capsys.readouterr().out
    assert "device idle 33.3%" in printed and "25%" in printed and "3.00 us  gemm" in printed


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model of two layers; a config.json is all that random weights need."""
    path = tmp_path_factory.mktemp("tiny")
    tiny = replace(
        SHAPES["0.6B"], vocab_size=300, eos_token_ids=(2,), hidden_size=32, intermediate_size=64,
        num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, max_position_embeddings=256,
        dtype="float32",
    )  # fmt: skip
    write_config(tiny, path)
    return path


WORK = ["--batch", "1", "2", "--context", "16", "--prefill", "2", "16", "--steps", "6",
        "--timed-steps", "6", "--bandwidth", "0.01", "--flops", "0.1"]  # fmt: skip
ENGINE = ["--load-format", "dummy", "--max-model-len", "96", "--max-num-batched-tokens", "96"]


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_tables_traces_and_programs_are_written(model_dir, tmp_path, capsys, devices):
    argv = ["profile", str(model_dir), "--out", str(tmp_path / "out"), *WORK, *ENGINE]
    assert main([*argv, "--tensor-parallel-size", str(devices)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "profile.json").read_text("utf-8"))
    assert list(report["steps"]) == ["decode-1", "decode-2", "prefill-2x16"]
    for name, step in report["steps"].items():
        assert f"\n{name}: " in printed
        assert step["loop_us"] > 0 and step["alone_us"] > 0
        assert step["busy_us"] == pytest.approx(sum(k["us"] for k in step["kernels"]))
        rows = step["categories"]
        assert step["busy_us"] == pytest.approx(sum(row["us"] for row in rows.values()))
        for label in ("attention", "products", "KV write", "sampling"):
            assert rows[label]["us"] > 0
            share = rows[label]["limit_us"] / rows[label]["us"]
            assert rows[label]["share_of_limit"] == pytest.approx(share)
        assert rows["attention"]["us_layer"] > 0 and rows["sampling"]["us_layer"] == 0
        files = tmp_path / "out" / name
        assert "HloModule jit_" in (files / "hlo.txt").read_text("utf-8")
        with gzip.open(files / "perfetto.json.gz") as file:
            assert json.load(file)["traceEvents"]
        assert len(list(files.glob("plugins/profile/*/*.xplane.pb"))) == 1
    decode, prefill = report["steps"]["decode-2"], report["steps"]["prefill-2x16"]
    assert 4 <= decode["traced_steps"] <= 6
    bucket = {"num_tokens": 0, "num_rows": 2, "is_mixed": False}
    assert (decode["rows"], decode["bucket"]) == (2, bucket)
    assert (prefill["tokens"], prefill["context_tokens"]) == (32, 32)
    for step in ("decode-1", "decode-2"):
        calls = {name: row["calls"] for name, row in report["steps"][step]["categories"].items()}
        assert calls["products"] >= 4 * 2 + 1  # four in each layer, and the head
        if devices > 1:
            assert calls["communication"] >= 2 * 2 + 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{model}", "--random-weights", "8B"], "--random-weights"),
        (["--random-weights", "9B"], "9B"),
        (["--no-such-option"], "--no-such-option"),
        (["/no/such/model"], "/no/such/model"),
        (["--batch", "0"], "--batch must be positive, got 0"),
        (["--steps", "1"], "--steps must be at least 2, got 1"),
        (["--bandwidth", "-1"], "--bandwidth must be positive, got -1"),
        (["--enforce-eager"], "--enforce-eager"),
        (["--out", "{model}/config.json"], "config.json"),
        (["--batch", "8", "--max-num-seqs", "4"], "--max-num-seqs"),
        (["{model}", "--context", "300"], "max_model_len"),
        (["{model}", "--prefill", "2", "300"], "max_model_len"),
        (["--prefill", "4", "200", "--max-num-batched-tokens", "512"],
         "max_num_batched_tokens of 800, it is 512"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_and_status_2(model_dir, capsys, argv, said):
    assert main(["profile", *(word.format(model=model_dir) for word in argv)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("nanovllm-jax: error: ") and said in line
    assert captured.out == ""


@pytest.mark.slow
def test_more_sequences_than_the_cache_holds_are_refused(model_dir, capsys):
    argv = ["--batch", "3", *WORK[3:], *ENGINE, "--num-kvcache-blocks", "2"]
    assert main(["profile", str(model_dir), *argv]) == 2
    assert "decode-3 needs 3 blocks of KV cache, there are 2" in capsys.readouterr().err
