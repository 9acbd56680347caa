"""`nanovllm-jax profile`: its arithmetic, its cost model, its reading of traces, and that it runs.

A GPU's trace is made by hand here, a CPU's by the profiler.
"""

import gzip
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from nanovllm_jax.__main__ import UsageError, main
from nanovllm_jax.config import ModelConfig
from nanovllm_jax.engine.block_manager import BlockManager

SCRIPTS = Path(__file__).parents[1] / "scripts"

# D 4, F 6, 2 layers, 2 query heads over 1 of size 2, 10 words
MODEL = ModelConfig("Qwen3ForCausalLM", 10, 4, 6, 2, 2, 1, 2, max_position_embeddings=64)
LAYER_WEIGHTS = 4 * (2 + 2) * 2 + 2 * 2 * 4 + 3 * 4 * 6  # qkv, o, gate-up-down: 32 + 16 + 72


@pytest.fixture
def script(monkeypatch):
    """script(name): a module of scripts/, which imports others beside it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


# --- kernel_trace.py ---


def test_time_is_counted_once_where_kernels_overlap(script):
    events = [(0, 10, "a"), (5, 20, "b"), (6, 8, "c"), (30, 40, "a"), (40, 45, "b")]
    times, gaps = script("kernel_trace").busy_times(events)
    assert times == {"a": 20, "b": 15}  # c lies within b
    assert gaps == {"b": 10}


@pytest.mark.parametrize(
    ("name", "origin", "expected"),
    [
        ("paged_decode_combine", "", "attention"),
        ("paged_prefill_mosaic_mosaic_gpu_kernel", "", "attention"),
        ("ynn_fusion_1", "jit(paged_decode)/while/body/vmap()/dot_general", "attention"),
        ("norm_rope_write", "", "KV write"),
        ("wrapped_scatter", "jit(decode_step)/jit(norm_rope_write)/scatter", "KV write"),
        ("nvjet_sm90_tst_48x64", "", "products"),
        ("fused_linear__2", "", "products"),
        ("ynn_fusion_36", "jit(run)/jit(run_layer)/dot_general", "products"),
        ("input_reduce_fusion", "jit(run)/jit(_draw)/reduce", "sampling"),
        ("loop_multiply_fusion_27", "jit(run)/mul", "norms, activations, inputs"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args<4096ul>)", "", "communication"),
        ("void stream_executor::gpu::AllReduceKernel<x>()", "", "communication"),
        ("one_shot_all_reduce", "", "communication"),
        ("all_reduce_1", "jit(run)/jit(run_layer)/dot_general", "communication"),
        ("all_gather_9", "jit(run)/jit(_draw)/shard_map/all_gather", "communication"),
    ],
)
def test_category(script, name, origin, expected):
    assert script("kernel_trace").category(name, origin) == expected


def test_origins_name_the_operations_of_a_program(script):
    def draw(x):
        with jax.named_scope("drawing"):
            return jnp.sin(x) * 2

    found = script("kernel_trace").origins(
        jax.jit(draw).lower(jnp.ones(8)).compile().as_text() or ""
    )
    assert any("drawing" in origin for origin in found.values())


def test_an_operation_without_an_origin_has_that_of_its_caller_and_its_product(script):
    found = script("kernel_trace").origins(
        """HloModule jit_run
%fused.1 (p: f32[8]) -> f32[8] {
  ROOT %dot.1 = f32[8]{0} dot(%p, %p), lhs_contracting_dims={0}
}
%body (p: f32[8]) -> f32[8] {
  %max.1 = f32[8]{0} maximum(%p, %p), metadata={op_name="reduce_max"}
  ROOT %ynn_fusion.1 = f32[8]{0} fusion(%max.1), kind=kCustom, calls=%fused.1
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%p)
  ROOT %while.1 = f32[8]{0} while(%p), body=%body, metadata={op_name="jit(run)/jit(attend)/while"}
}"""
    )
    assert found["max_1"] == "jit(run)/jit(attend)/while reduce_max"
    assert found["ynn_fusion_1"] == "jit(run)/jit(attend)/while dot_general"
    assert found["while_1"] == "jit(run)/jit(attend)/while"
    assert found["copy_1"] == ""


def test_a_trace_is_cut_to_whole_steps_at_the_kernel_before_the_longest_gap(script):
    step = [(0, 4, "gemm"), (4, 6, "attn"), (7, 11, "gemm"), (11, 13, "attn"), (13, 14, "draw")]
    events = [(s + t, e + t, name) for t in (0, 20, 40, 60) for s, e, name in [(0, 0, "x"), *step]]
    events = [e for e in events[3:-3] if e[2] != "x"]  # the first and the last step are incomplete
    cut, steps, last = script("kernel_trace").whole_steps(events, 3)
    assert (steps, last) == (2, "draw")
    times, gaps = script("kernel_trace").busy_times(cut)
    assert times == {"gemm": 2 * 8, "attn": 2 * 4, "draw": 2 * 1}
    assert gaps == {"draw": 2 * 6, "attn": 2 * 1}


def test_without_a_kernel_that_runs_once_a_step_the_trace_stays_whole(script):
    events = [(i, i + 1, "gemm") for i in range(12)]
    assert script("kernel_trace").whole_steps(events, 3) == (events, 3, "")


def write_trace(folder, planes):
    """A trace of planes {name: {line: [(start, duration, event, stats)]}}, in ns."""
    text = ""
    for plane, lines in planes.items():
        names, stats, body = {}, {}, ""
        for line, events in lines.items():
            body += f'lines {{ name: "{line}" timestamp_ns: 0 '
            for start, duration, event, values in events:
                known = "".join(
                    f"stats {{ metadata_id: {stats.setdefault(k, len(stats) + 1)} "
                    + (f"int64_value: {v} }} " if isinstance(v, int) else f'str_value: "{v}" }} ')
                    for k, v in values.items()
                )
                body += (
                    f"events {{ metadata_id: {names.setdefault(event, len(names) + 1)} "
                    f"offset_ps: {start}000 duration_ps: {duration}000 {known}}} "
                )
            body += "} "
        for kind, table in (("event", names), ("stat", stats)):
            body += "".join(
                f'{kind}_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }} '
                for n, i in table.items()
            )
        text += f'planes {{ name: "{plane}" {body}}}\n'
    content = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    (folder / "host.xplane.pb").write_bytes(content)


def test_kernels_are_read_from_the_first_gpus_streams(script, tmp_path):
    copied = (5, 2, "MemcpyD2D", {})
    kernels = {"Stream #13(Compute)": [(50, 5, "b", {}), (10, 30, "a", {}), copied],
               "Stream #14(Compute)": [(20, 40, "ncclDevKernel", {})],
               "XLA Ops": [(0, 99, "fusion", {})]}  # fmt: skip
    others = {"/device:GPU:1": {"Stream #13(Compute)": [(0, 9, "other", {})]},
              "/host:CPU": {"python": [(0, 99, "PjitFunction", {})]}}  # fmt: skip
    write_trace(tmp_path, {"/device:GPU:0": kernels, **others})
    events = script("kernel_trace").read_events(tmp_path, "jit_run")
    assert events == [(10, 40, "a"), (20, 60, "ncclDevKernel"), (50, 55, "b")]


def test_on_a_cpu_operations_are_kernels_and_a_loop_is_left_to_its_body(script, tmp_path):
    def run(name, device=0, module="jit_run"):
        return name, {"hlo_op": name, "hlo_module": module, "device_ordinal": device}

    threads = {
        "a": [(0, 10, *run("fusion.1")), (9, 1, "end: fusion.1", {}), (10, 50, *run("while.2")),
              (12, 8, *run("dot.3")), (20, 30, *run("dot.3"))],
        "b": [(70, 5, *run("all-reduce.4")), (80, 5, *run("copy", device=1)),
              (90, 5, *run("copy", module="jit_other"))],
        "c": [],
    }  # fmt: skip
    write_trace(tmp_path, {"/host:CPU": threads})
    events = script("kernel_trace").read_events(tmp_path, "jit_run")
    assert events == [(0, 10, "fusion_1"), (12, 20, "dot_3"), (20, 50, "dot_3"),
                      (70, 75, "all_reduce_4")]  # fmt: skip


# --- step_costs.py ---


def test_costs_of_a_decode_step(script):
    costs = script("step_costs").step_costs(MODEL, [7, 11], [1, 1])  # contexts of 8 and 12
    kv = 20 * 2 * 2 * 2  # positions, k and v, elements, bytes
    q_and_out = 2 * 2 * 4 * 2  # rows, both, elements, bytes
    assert costs["attention"].bytes == 2 * (kv + q_and_out)
    assert costs["attention"].flops == 2 * 20 * (2 * 2 * 4)  # q k and p v, both over 2 heads of 2
    assert costs["KV write"].bytes == 2 * 2 * (8 + 4 + 4) * 2  # qkv in; q, k, v out
    in_and_out = (4 + 8) + (4 + 4) + (4 + 12) + (6 + 4)
    head = 10 * 4 * 2 + 2 * 4 * 2 + 2 * 10 * 4  # weights, rows in, float32 logits out
    assert costs["products"].bytes == 2 * (LAYER_WEIGHTS * 2 + 2 * in_and_out * 2) + head
    assert costs["products"].flops == 2 * 2 * (2 * LAYER_WEIGHTS + 10 * 4)
    assert costs["sampling"].bytes == 2 * 10 * 4
    assert "communication" not in costs


def test_costs_of_a_prefill_behind_a_prefix_with_an_8_bit_cache(script):
    costs = script("step_costs").step_costs(MODEL, [0, 5], [3, 2], kv_bytes=1)
    pairs = (1 + 2 + 3) + (6 + 7)  # each token sees itself and all before it
    assert costs["attention"].flops == 2 * pairs * (2 * 2 * 4)
    assert costs["attention"].bytes == 2 * ((3 + 7) * 2 * 2 * 1 + 5 * 2 * 4 * 2)
    assert costs["products"].flops == 2 * (2 * 5 * LAYER_WEIGHTS + 2 * 10 * 4)  # 2 rows of logits


def test_two_devices_share_the_weights_and_exchange_hidden_states(script):
    one = script("step_costs").step_costs(MODEL, [8], [1])
    parts = {"kv_heads": 2, "heads": 2, "ffn": 2, "vocab": 2}
    split = MODEL.over(lambda axis: parts.get(axis, 1))
    two = script("step_costs").step_costs(split, [8], [1], devices=2)
    copied = 2 * 2 * (4 * 2 * 2)  # operations of the second copy of the one KV head's k and v
    assert two["products"].flops == (one["products"].flops + copied) / 2
    assert two["sampling"].bytes == one["sampling"].bytes / 2
    assert two["attention"].flops == one["attention"].flops / 2
    assert two["communication"].bytes == (2 * 2 + 1) * 4 * 2  # a ring of 2 sends each element once


def test_the_weights_of_a_published_size_are_those_of_the_benchmark(script):
    bench, costs = script("bench"), script("step_costs")
    hidden, mlp, layers, heads, kv_heads, tied = bench.QWEN3["0.6B"]
    model = ModelConfig("Qwen3ForCausalLM", 151936, hidden, mlp, layers, heads, kv_heads, 128,
                        max_position_embeddings=40960, tie_word_embeddings=tied)  # fmt: skip
    work = costs.step_costs(model, [0], [1])
    traffic = bench.Traffic.of(model, "auto")
    assert work["products"].bytes == pytest.approx(traffic.weights_per_step, rel=2e-3)
    longer = costs.step_costs(model, [1000], [1])["attention"].bytes - work["attention"].bytes
    assert longer == 1000 * traffic.kv_per_token


def test_the_least_time_is_that_of_the_slower_resource(script):
    work = script("step_costs").Work(bytes=100, flops=1000)
    assert work.seconds(bandwidth=10, flops=1000) == 10
    assert work.seconds(bandwidth=1000, flops=10) == 100
    assert work.seconds(bandwidth=10, flops=None) is None
    assert script("step_costs").Work(100).seconds(bandwidth=10, flops=None) == 10


# --- the command ---


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model of two layers; a config.json is all that random weights need."""
    path = tmp_path_factory.mktemp("tiny")
    shape = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=2, head_dim=16, rope_theta=10000,
                 max_position_embeddings=256, tie_word_embeddings=True)  # fmt: skip
    (path / "config.json").write_text(
        json.dumps({"architectures": ["Qwen3ForCausalLM"], "dtype": "float32"} | shape)
    )
    return path


WORK = ["--batch", "1", "2", "--context", "16", "--prefill", "2", "16", "--steps", "6",
        "--timed-steps", "6", "--bandwidth", "0.01", "--flops", "0.1"]  # fmt: skip
ENGINE = ["--load-format", "dummy", "--max-model-len", "64", "--max-num-batched-tokens", "64"]


@pytest.mark.parametrize("devices", [1, 2])
def test_the_tables_traces_and_programs_are_written(model_dir, tmp_path, capsys, devices):
    argv = ["profile", str(model_dir), "--out", str(tmp_path / "out"), *WORK, *ENGINE]
    assert main([*argv, "--tensor-parallel-size", str(devices)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "profile.json").read_text())
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
        files = {kind: tmp_path / "out" / path for kind, path in step["files"].items()}
        assert "HloModule jit_run" in files["hlo"].read_text()
        with gzip.open(files["perfetto"]) as file:
            assert json.load(file)["traceEvents"]
        assert len(list(files["xprof"].glob("plugins/profile/*/*.xplane.pb"))) == 1
    decode, prefill = report["steps"]["decode-2"], report["steps"]["prefill-2x16"]
    assert 4 <= decode["traced_steps"] <= 6
    assert (decode["rows"], decode["bucket"]) == (2, {"num_tokens": 0, "num_rows": 2})
    assert (prefill["tokens"], prefill["context_tokens"]) == (32, 32)
    for step in ("decode-1", "decode-2"):
        calls = {name: row["calls"] for name, row in report["steps"][step]["categories"].items()}
        assert calls["products"] >= 4 * 2 + 1  # four in each layer, and the head
        if devices > 1:
            assert calls["communication"] >= 2 * 2 + 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{model}", "--random-weights", "8B"], "--random-weights 8B"),
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
        (["--prefill", "4", "200", "--max-num-batched-tokens", "512"], "max_num_batched_tokens"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(model_dir, capsys, argv, said):
    assert main(["profile", *(word.format(model=model_dir) for word in argv)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("nanovllm-jax: error: ") and said in line
    assert captured.out == ""


def test_more_sequences_than_the_cache_holds_are_refused(script):
    profile = script("profile_engine")
    llm = SimpleNamespace(pools=[BlockManager(2, 256)])
    profile.check_blocks(profile.parse(["--batch", "2"]), llm)
    refused = "--batch 3: 3 sequences of 160 tokens need 3 blocks of KV cache, there are 2"
    with pytest.raises(UsageError, match=refused):
        profile.check_blocks(profile.parse(["--batch", "3"]), llm)
