"""Traces and kernels' categories. A GPU's trace is made by hand here."""

import jax
import jax.numpy as jnp
import pytest

from nanovllm_jax.tools import trace


def test_time_is_counted_once_where_kernels_overlap():
    events = [(0, 10, "a"), (5, 20, "b"), (6, 8, "c"), (30, 40, "a"), (40, 45, "b")]
    times, gaps = trace.busy_times(events)
    assert times == {"a": 20, "b": 15}  # c lies within b
    assert gaps == {"b": 10}


@pytest.mark.parametrize(
    ("name", "origin", "expected"),
    [
        ("MemcpyD2H", "", "copies"),
        ("reshape_and_cache_flash_kernel", "", "KV write"),  # of vLLM, as are the next four
        ("flash_fwd_splitkv_kernel", "", "attention"),
        ("_topk_topp_sampler_kernel", "", "sampling"),
        ("void cutlass::Kernel2<bf16_gemm>", "", "products"),
        ("aten::mm", "", "products"),
        ("ynn_fusion_9", "jit(sample)/dot_general", "products"),
        ("paged_decode_combine", "", "attention"),
        ("paged_prefill_mosaic_mosaic_gpu_kernel", "", "attention"),
        ("ynn_fusion_1", "jit(paged_decode)/while/body/vmap()/dot_general", "attention"),
        ("norm_rope_write", "", "KV write"),
        ("wrapped_scatter", "jit(decode_step)/jit(norm_rope_write)/scatter", "KV write"),
        ("nvjet_sm90_tst_48x64", "", "products"),
        ("fused_linear__2", "", "products"),
        ("decode_layers", "", "all layers at once"),
        ("gated_linear_mosaic_gpu_kernel", "", "products"),
        ("expert_gate_up__2", "", "products"),
        ("triton_softmax_18", "jit(run)/jit(run_layer)/router/div", "products"),
        ("fused_moe_kernel", "", "products"),  # of vLLM
        ("ynn_fusion_36", "jit(run)/jit(run_layer)/dot_general", "products"),
        ("input_reduce_fusion", "jit(run)/jit(_draw)/reduce", "sampling"),
        ("loop_multiply_fusion_27", "jit(run)/mul", "norms, activations, inputs"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args<4096ul>)", "", "communication"),
        ("void stream_executor::gpu::AllReduceKernel<x>()", "", "communication"),
        ("one_shot_all_reduce", "", "communication"),
        ("two_shot_all_reduce_norm", "", "communication"),
        ("all_reduce_1", "jit(run)/jit(run_layer)/dot_general", "communication"),
        ("all_gather_9", "jit(run)/jit(_draw)/shard_map/all_gather", "communication"),
    ],
)
def test_category(name, origin, expected):
    assert trace.category(name, origin) == expected


def test_origins_name_the_operations_of_a_program():
    def draw(x):
        with jax.named_scope("drawing"):
            return jnp.sin(x) * 2

    hlo = jax.jit(draw).lower(jnp.ones(8)).compile().as_text() or ""
    assert any("drawing" in origin for origin in trace.origins(hlo).values())
    assert trace.module_name(hlo) == "jit_draw"


def test_an_operation_without_an_origin_has_that_of_its_caller_and_its_product():
    found = trace.origins(
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


def test_a_trace_is_cut_to_whole_steps_at_the_kernel_before_the_longest_gap():
    step = [(0, 4, "gemm"), (4, 6, "attn"), (7, 11, "gemm"), (11, 13, "attn"), (13, 14, "draw")]
    events = [(s + t, e + t, name) for t in (0, 20, 40, 60) for s, e, name in [(0, 0, "x"), *step]]
    events = [e for e in events[3:-3] if e[2] != "x"]  # the first and the last step are incomplete
    cut, steps, last = trace.whole_steps(events, 3)
    assert (steps, last) == (2, "draw")
    times, gaps = trace.busy_times(cut)
    assert times == {"gemm": 2 * 8, "attn": 2 * 4, "draw": 2 * 1}
    assert gaps == {"draw": 2 * 6, "attn": 2 * 1}


def test_without_a_kernel_that_runs_once_a_step_the_trace_stays_whole():
    events = [(i, i + 1, "gemm") for i in range(12)]
    assert trace.whole_steps(events, 3) == (events, 3, "")


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


def test_kernels_are_read_from_the_first_gpus_streams(tmp_path):
    kernels = {"Stream #13(Compute)": [(50, 5, "b", {}), (10, 30, "a", {})],
               "Stream #14(Compute)": [(20, 40, "ncclDevKernel", {})],
               "XLA Ops": [(0, 99, "fusion", {})]}  # fmt: skip
    others = {"/device:GPU:1": {"Stream #13(Compute)": [(0, 9, "other", {})]},
              "/host:CPU": {"python": [(0, 99, "PjitFunction", {})]}}  # fmt: skip
    write_trace(tmp_path, {"/device:GPU:0": kernels, **others})
    events = trace.read_events(tmp_path, "jit_run")
    assert events == [(10, 40, "a"), (20, 60, "ncclDevKernel"), (50, 55, "b")]


def test_on_a_cpu_operations_are_kernels_and_a_loop_is_left_to_its_body(tmp_path):
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
    ours = [(0, 10, "fusion_1"), (12, 20, "dot_3"), (20, 50, "dot_3"), (70, 75, "all_reduce_4")]
    assert trace.read_events(tmp_path, "jit_run") == ours
    assert trace.read_events(tmp_path) == [*ours, (90, 95, "copy")]
