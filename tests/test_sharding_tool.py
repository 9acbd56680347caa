"""The sharding tool: what it reads from compiled programs, and what it predicts from it."""

import json
from dataclasses import replace

import helpers
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanovllm_jax import cli
from nanovllm_jax.tools import hlo
from nanovllm_jax.tools.roofline import HARDWARE

MESH = {"data": 2, "tensor": 4}
H100 = HARDWARE["H100"]


# --- collectives in HLO text ---


def program(*instructions, computations=""):
    """A compiled program's text around some instructions."""
    lines = "".join(f"  {i}\n" for i in instructions)
    return f"HloModule test\n\n{computations}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}}}\n"


def one(*instructions, mesh=MESH, **more):
    (found,) = hlo.collectives(program(*instructions, **more), mesh)
    return found


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("tensor",), 4),
        ("{{4,5,6,7},{3,2,1,0}}", ("tensor",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "tensor"), 8),
        ("{}", ("data", "tensor"), 8),
        ("{{0,1},{2,3},{4,5},{6,7}}", None, 2),  # half of an axis
        ("[2,4]<=[8]", ("tensor",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "tensor"), 8),
        ("[4,2]<=[8]", None, 2),
        ("mesh['a'=2,'b'=4] {'b'}", ("tensor",), 4),
        ("mesh['a'=2,'b'=4] {'a'}", ("data",), 2),
        ("mesh['a'=2,'b'=4] {'a','b'}", ("data", "tensor"), 8),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ("tensor",), 4),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ("data",), 2),
        ("mesh['a'=8] {'a':(1)2}", ("data",), 2),  # the major part of an axis
        ("mesh['a'=8] {'a':(2)4}", ("tensor",), 4),  # and the minor one
    ],
)
def test_groups_of_devices_are_mesh_axes(groups, axes, size):
    line = f"%x = f32[16]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    found = one(line)
    assert (found.axes, found.group_size) == (axes, size)


def test_an_axis_of_one_device_is_never_named():
    line = "%x = f32[16]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add"
    assert one(line, mesh={"data": 1, "tensor": 4}).axes == ("tensor",)


def test_a_collective_of_each_device_with_itself_is_none():
    line = "%x = f32[16]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add"
    assert hlo.collectives(program(line), {"tensor": 2}) == []


def test_groups_in_an_unknown_form_are_an_error():
    line = "%x = f32[16]{0} all-reduce(%p), replica_groups=<some new form>, to_apply=%add"
    with pytest.raises(ValueError, match="some new form"):
        hlo.collectives(program(line), MESH)


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", ("tensor",)),
        ("{{0,4},{4,0}}", ("data",)),
        ("{{0,5}}", ("data", "tensor")),
    ],
)
def test_a_permutation_moves_along_axes(pairs, axes):
    line = f"%x = bf16[4,8]{{1,0}} collective-permute(%p), source_target_pairs={pairs}"
    found = one(line)
    assert (found.axes, found.num_bytes) == (axes, 64)


@pytest.mark.parametrize(
    ("kind", "result", "num_bytes"),
    [
        ("all-reduce", "bf16[16,1024]{1,0:T(8,128)(2,1)}", 32768),
        ("all-gather", "f8e4m3fn[16,64]{1,0}", 1024),
        ("reduce-scatter", "f32[4,8]{1,0}", 4 * 128),  # what goes in: four times the result
        ("all-to-all", "s32[]", 4),
        ("collective-broadcast", "pred[7]{0}", 7),
        ("all-reduce", "(f32[4]{0}, /*index=1*/s8[4]{0})", 20),
    ],
)
def test_bytes_of_the_larger_buffer(kind, result, num_bytes):
    line = f"ROOT %x.1 = {result} {kind}(%p, %q), replica_groups=[2,4]<=[8], dimensions={{0}}"
    assert (found := one(line)).num_bytes == num_bytes
    assert found.kind == kind


def test_what_a_cpu_sums_in_32_bits_counts_as_16():
    line = "%x = f32[8]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add.2_promoted"
    assert (one(line).num_bytes, one(line).dtype) == (16, "bf16")


@pytest.mark.parametrize(
    ("kind", "started", "result", "num_bytes"),
    [
        ("all-gather", "(bf16[2,8]{1,0}, bf16[8,8]{1,0})", "bf16[8,8]{1,0}", 128),
        ("all-gather", "((bf16[2,8]{1,0}), bf16[8,8]{1,0})", "bf16[8,8]{1,0}", 128),
        ("all-reduce", "bf16[8,8]{1,0}", "bf16[8,8]{1,0}", 128),
        ("all-reduce", "((bf16[8,8]{1,0}), bf16[8,8]{1,0})", "bf16[8,8]{1,0}", 128),
        ("reduce-scatter", "((f32[8]{0}), f32[2]{0})", "f32[2]{0}", 32),
        ("collective-permute", "(f32[8]{0}, f32[8]{0}, u32[], u32[])", "f32[8]{0}", 32),
    ],
)
def test_an_asynchronous_pair_is_one(kind, started, result, num_bytes):
    where = "source_target_pairs={{0,1}}" if "permute" in kind else "replica_groups=[2,4]<=[8]"
    start = f"%a.1 = {started} {kind}-start(%p), channel_id=1, {where}"
    found = one(start, f"%b = {result} {kind}-done(%a.1)")
    assert (found.kind, found.count, found.num_bytes) == (kind, 1, num_bytes)


def test_equal_ones_are_counted_and_called_ones_found():
    line = "%{} = f32[8]{{0}} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add"
    body = "%body (p: f32[8]) -> f32[8] {\n  " + line.format("b") + "\n}\n"
    loop = "%w = f32[8]{0} while(%p), condition=%cond, body=%body"
    known = ', backend_config={"known_trip_count":{"n":"5"},"x":1}'
    calls = (
        "%c = f32[8]{0} call(%p), to_apply=%body",
        "%f = f32[8]{0} fusion(%p), kind=kLoop, calls=%body",
        "%g = ((f32[8]{0}), f32[8]{0}) fusion-start(%p), kind=kCustom, calls=%body",
        "%h = f32[8]{0} fusion-done(%g)",
        "%s = ((f32[8]{0}), f32[8]{0}) async-start(%p), calls=%body",
        "%d = f32[8]{0} async-done(%s), calls=%body",
        loop + known,
    )
    found = one(line.format("x"), line.format("y"), *calls, computations=body)
    assert (found.count, found.note) == (2 + 4 + 5, "")

    unknown = one(loop, computations=body)
    assert unknown.count == 1 and "unknown length" in unknown.note
    branch = "%i = f32[8]{0} conditional(%p, %q), branch_computations={%none, %body}"
    assert "one branch" in one(branch, computations=body).note


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.collectives("", MESH)


def compiled(function, in_spec, out_spec, shape=(16, 64), *, manual=False):
    """The text of a function that was really compiled for eight devices."""
    mesh = jax.make_mesh(
        tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()
    )
    if manual:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False
        )
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, in_spec))
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, out_spec))
    return jitted.lower(x).compile().as_text()


P = PartitionSpec


@pytest.mark.parametrize(
    ("function", "specs", "expected"),
    [  # shards of P("data", "tensor") are [8, 16] in float32
        (lambda x: jax.lax.psum(x, "tensor"), (P("data", "tensor"), P("data")),
         ("all-reduce", 512, ("tensor",))),
        (lambda x: jax.lax.psum(x, "data"), (P("data", "tensor"), P(None, "tensor")),
         ("all-reduce", 512, ("data",))),
        (lambda x: jax.lax.psum(x, ("data", "tensor")), (P("data", "tensor"), P()),
         ("all-reduce", 512, ("data", "tensor"))),
        (lambda x: jax.lax.all_gather(x, "tensor", axis=1, tiled=True),
         (P("data", "tensor"), P("data")), ("all-gather", 2048, ("tensor",))),
        (lambda x: jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True),
         (P("data"), P("data", "tensor")), ("reduce-scatter", 2048, ("tensor",))),
        (lambda x: jax.lax.all_to_all(x, "tensor", 0, 1, tiled=True),
         (P("data", "tensor"), P(("data", "tensor"))), ("all-to-all", 512, ("tensor",))),
        (lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]),
         (P("data", "tensor"), P("data", "tensor")), ("collective-permute", 512, ("tensor",))),
    ],
)  # fmt: skip
def test_collectives_of_really_compiled_programs(function, specs, expected):
    (found,) = hlo.collectives(compiled(function, *specs, manual=True), MESH)
    assert (found.kind, found.num_bytes, found.axes) == expected


def test_a_collective_that_the_partitioner_makes():
    text = compiled(lambda x: x.sum(axis=1), P("data", "tensor"), P("data"))
    (found,) = hlo.collectives(text, MESH)
    assert (found.kind, found.num_bytes, found.axes) == ("all-reduce", 8 * 4, ("tensor",))


def test_a_loop_that_is_really_compiled():
    def loop(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jax.lax.psum(jnp.sin(y), "tensor"), x)

    (found,) = hlo.collectives(compiled(loop, P("data"), P("data"), manual=True), MESH)
    assert (found.count, found.note) == (7, "")


@pytest.mark.parametrize(
    ("kind", "size", "sent"),
    [
        ("all-reduce", 4, 1.5e6),
        ("all-gather", 4, 0.75e6),
        ("reduce-scatter", 2, 0.5e6),
        ("all-to-all", 8, 0.875e6),
        ("collective-permute", 4, 1e6),
    ],
)
def test_time_of_a_collective(kind, size, sent):
    one = hlo.Collective(kind, "bf16", 1_000_000, ("tensor",), size)
    hardware = replace(H100, link=1e9, latency=2e-5, one_shot_latency=1.0)
    assert one.seconds(hardware) == pytest.approx(2e-5 + sent / 1e9)


def test_the_engines_own_kernel_is_a_collective():
    """To XLA it is a call; each device sends all of its array to each other device."""
    line = ('%pallas_call.7 = s32[8192]{0} custom-call(%x, %y), '
            'custom_call_target="__gpu$xla.gpu.triton", '
            'metadata={op_name="jit(run)/shard_map/one_shot_all_reduce/pallas_call"}')  # fmt: skip
    other = line.replace("one_shot_all_reduce", "paged_decode")
    found = one(line, line.replace(".7", ".8"), other)
    assert (found.kind, found.count, found.axes) == (hlo.ONE_SHOT, 2, ("tensor",))
    assert (found.num_bytes, found.group_size) == (32768, 4)
    normed = line.replace("reduce/", "reduce_norm/")
    both = one(normed.replace("s32[8192]{0} custom", "(s32[8192]{0}, s32[8192]{0}) custom"))
    assert (both.kind, both.num_bytes) == (hlo.ONE_SHOT, 32768), "the norm is not sent"
    hardware = replace(H100, link=1e9, latency=1.0, one_shot_latency=6e-6)
    assert found.seconds(hardware) == pytest.approx(6e-6 + 3 * 32768 / 1e9)
    twice = one(line.replace("one_shot", "two_shot"))
    assert (twice.kind, twice.num_bytes) == (hlo.TWO_SHOT, 32768)
    assert twice.seconds(hardware) == pytest.approx(12e-6 + 2 * 3 / 4 * 32768 / 1e9)


# --- the report ---


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """run(*options) -> the JSON and the printed text of a report on a tiny model."""

    made_with, file = checkpoint, tmp_path / "report.json"

    def run(*options, shape="eight_heads", checkpoint=None, status=0):
        path = made_with(shape, **(checkpoint or {}))
        argv = ["sharding", "--model", str(path), "--out", str(file), "--context", "60",
                "--prefill", "120", "--batch", "8", *options]  # fmt: skip
        assert cli.main(argv) == status
        printed = capsys.readouterr()
        return printed.err if status else (json.loads(file.read_text("utf-8")), printed.out)

    return run


def rules_file(tmp_path, rules):
    file = tmp_path / "rules.json"
    file.write_text(rules if isinstance(rules, str) else json.dumps(rules), "utf-8")
    return ["--rules", str(file)]


def summary(step):
    """(kind, axes) -> how many, without the draw's few bytes."""
    counts = {}
    for c in step["collectives"]:
        if "_draw" not in c["origin"] and c["num_bytes"] > 300:
            key = (c["kind"], "+".join(c["axes"]))
            counts[key] = counts.get(key, 0) + c["count"]
    return counts


def test_layouts_and_bytes_of_the_default_sharding(run):
    result, printed = run("--mesh", "data=2,tensor=4")
    assert result["mesh"] == {"data": 2, "tensor": 4}
    arrays = {a["name"]: a for a in result["arrays"]}
    qkv = arrays["layers.self_attn.qkv_proj.weight"]  # each of two KV heads twice, 2 layers
    assert qkv["shape"] == [2, 4, 4, 16, 48]
    assert qkv["spec"] == [[], ["tensor"], [], [], []]
    assert (qkv["bytes"], qkv["bytes_per_device"], qkv["copies"]) == (98304, 24576, 2)
    down = arrays["layers.mlp.down_proj.weight"]
    assert (down["axes"], down["bytes_per_device"]) == (
        ["layers", "embed", "ffn"],
        2 * 48 * 16 * 4,
    )
    norm = arrays["norm.weight"]
    assert (norm["bytes_per_device"], norm["copies"]) == (48 * 4, 8)
    head = arrays["lm_head.weight"]
    assert head["shape"] == [helpers.VOCAB + 1, 48]  # padded to a multiple of four
    # 8 sequences over 2 shards, a page of 256 positions each; one of four KV heads a device.
    cache = arrays["cache.k"]
    assert cache["spec"] == [[], ["data"], [], ["tensor"], []]
    assert (cache["bytes_per_device"], cache["copies"]) == (2 * 4 * 256 * 1 * 16 * 4, 1)
    assert "[layers 2, embed 48, ffn 64 / tensor]" in printed


def test_two_collectives_a_layer_and_one_for_the_embedding(run):
    result, printed = run("--mesh", "data=2,tensor=4")
    prefill, decode = result["steps"]
    for step, tokens in ((prefill, 60), (decode, 4)):  # of each shard of the batch
        assert summary(step) == {("all-reduce", "tensor"): 1 + 2 * 2}
        assert {c["num_bytes"] for c in step["collectives"] if c["kind"] == "all-reduce"} == {
            tokens * 48 * 4
        }
    assert "predicted on H100s" in printed


def test_data_parallel_layers_say_nothing_to_each_other(run):
    result, _ = run("--mesh", "data=8")
    assert [summary(step) for step in result["steps"]] == [{}, {}]


def test_rules_change_the_collectives(run, tmp_path):
    """On a CPU a reduce-scatter is an all-reduce, of which each device keeps its part."""
    rules = rules_file(tmp_path, {"activation_tokens": ["data", "tensor"]})
    result, _ = run("--mesh", "data=2,tensor=2", *rules)
    assert result["rules"]["activation_tokens"] == ["data", "tensor"]
    prefill, _ = result["steps"]
    assert summary(prefill)["all-gather", "tensor"] >= 2 * 2


def test_predicted_times_by_hand(run):
    result, _ = run("--mesh", "tensor=2", shape="gqa")
    _, decode = result["steps"]
    heads, width, inner, layers, vocab = 6, 48, 96, 2, helpers.VOCAB + 1
    layer = width * (heads * 16 * 2 + 2 * 2 * 16) + 3 * width * inner
    norms = layers * (2 * width + 2 * 16) + width  # on both devices whole
    weights = (layers * layer + vocab * width) / 2 + norms  # the embedding is only looked up
    cache = 8 * 60 * layers * 2 * 16  # one of two KV heads
    assert decode["predicted"]["memory_s"] == pytest.approx((weights + cache) * 4 / H100.memory)
    sums = (1 + 2 * layers) * (H100.latency + 8 * width * 4 / H100.link)
    draws = [c for c in decode["collectives"] if c["kind"] == "all-gather"]
    gathers = sum(c["count"] * (H100.latency + c["num_bytes"] / 2 / H100.link) for c in draws)
    assert decode["predicted"]["collectives_s"] == pytest.approx(sums + gathers)


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "rows"),
    [
        ("data=2,tensor=4", 4, 16),  # heads with copies
        pytest.param("tensor=8", 8, 8, marks=pytest.mark.slow),
        pytest.param("data=8", 2, 64, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_share_the_products_however_they_are_named(run, mesh, kv_heads, rows):
    """They hold other weights or other tokens. `rows`: eight a shard, padding included."""
    result, _ = run("--mesh", mesh, "--prefill", "480", checkpoint={"vocab_size": 128})
    qkv, o, mlp = (8 + 2 * kv_heads) * 16 * 48, 8 * 16 * 48, 3 * 48 * 64
    layers = 2 * (qkv + o + mlp) * 480 * 2
    attention = 4 * 8 * (60 * 61 / 2) * 8 * 16 * 2  # eight sequences of 60, causal
    total = layers + attention + 2 * 128 * 48 * rows
    predicted = result["steps"][0]["predicted"]["compute_s"]
    assert predicted == pytest.approx(total / 8 / H100.flops)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mesh", "model=2"], "no axis 'model'"),
        (["--mesh", "tensor=2,tensor=2"], "twice"),
        (["--mesh", "tensor=two"], "'tensor=two' is not as in data=2,tensor=4"),
        (["--mesh", "tensor=0"], "positive integer"),
        (["--mesh", "data=64,tensor=8"], "512 devices; at most 64"),
        (["--mesh", "data=16"], "needs 16 devices, and JAX was started with 8"),
        (["--mesh", "tensor=3"], "valid tensor parallel sizes"),
        (["--mesh", "tensor=2", "--random-weights", "0.6B"], "either --model DIR or"),
        (["--mesh", "tensor=2", "--batch", "0"], "--batch must be positive, got 0"),
        (["--mesh", "tensor=2", "--prefill", "-1"], "--prefill must be at least 0"),
        (["--mesh", "tensor=2", "--context", "4096"], "--context 4096 is too long"),
        (["--mesh", "tensor=2", "--dtype", "int3"], "int3"),
        (["--mesh", "tensor=2", "--rules", "/no/such/file"], "/no/such/file"),
        (["--mesh", "tensor=2", "--prefill", "4000"], "rows"),
    ],
)
def test_bad_usage_is_one_line(run, options, said):
    error = run(*options, status=2)
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("{not json", "is not valid JSON"),
        ("[1, 2]", "holds no JSON object"),
        ({"fnn": "tensor"}, "did you mean 'ffn'"),
        ({"ffn": "model"}, "'model', which is no mesh axis"),
        ({"ffn": 3}, "'ffn' is 3; give a mesh axis"),
        ({"embed": "tensor"}, "twice over the same mesh axis"),
        ({"batch": "tensor"}, "twice over the same mesh axis"),
    ],
)
def test_bad_rules_are_one_line(run, tmp_path, rules, said):
    error = run("--mesh", "tensor=2", *rules_file(tmp_path, rules), status=2)
    assert said in error and error.count("\n") == 1
