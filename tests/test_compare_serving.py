"""Comparing servers: equal loads, figures without flattery, failures named, nothing left behind."""

import asyncio
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import fake_server
import pytest

from nanovllm_jax import cli
from nanovllm_jax.tools.compare import results
from nanovllm_jax.tools.compare.results import Machine
from nanovllm_jax.tools.compare.serving import (
    client,
    clients,
    figures,
    load,
    main,
    records,
    report,
    servers,
    sweep,
)
from nanovllm_jax.tools.compare.serving.figures import Slo
from nanovllm_jax.tools.compare.serving.load import Request
from nanovllm_jax.tools.compare.serving.messages import Answer, ClientJob, ClientResult
from nanovllm_jax.tools.compare.serving.records import Point, ServerFailure, Started, SweepSettings
from nanovllm_jax.tools.compare.serving.servers import Server, ServerError
from nanovllm_jax.tools.options import UsageError

pytest.importorskip("aiohttp")  # whose import takes longer than a request

FAKE = f"{{python}} {fake_server.__file__} {{port}}"

# --- the command line ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--engines", "sglang"], "--engines 'sglang' is not known"),
        (["--server", "a"], "'a' is not NAME=..."),
        (["--server", "a=x", "--url", "a=http://h"], "two servers have the name 'a'"),
        (["--server", "a=x", "--python-path", "b=/tmp"], "there is no server 'b'"),
        (["--python-path", "vllm=/no/such/folder"], "there is no such folder"),
        (["--rates", "1,x"], "'1,x' is no list of numbers"),
        (["--rates", "1,inf"], "'1,inf' is no list of numbers"),
        (["--rates", "0,1"], "--rates must be positive, got 0"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--prompt-tokens", "9:3"], "'9:3' has its larger number first"),
        (["--output-tokens", "1:3"], "--output-tokens must be at least 2"),
        (["--prompt-tokens", "500:510"], "prompt and output have up to 542 tokens"),
        (["--slo", "ttft=200"], "'ttft=200' is no limit"),
        (["--slo", "p99=2s"], "'p99=2s' is no limit"),
        (["--from", "no-such.jsonl"], "--from no-such.jsonl is not there"),
        (["--add"], "serving.jsonl is not there"),
    ],
)
def test_bad_usage_is_one_line_and_names_the_value(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "serving", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_servers_of_ones_own_replace_the_known_ones():
    assert [s.name for s in main.parse([]).servers] == [*servers.KNOWN]
    dummy = main.parse(["--random-weights", "8B"])
    assert [s.name for s in dummy.servers] == ["nanovllm_jax", "vllm"]
    argv = ["--server", "a=run {port}", "--url", "b=http://localhost:1/v1"]
    assert [s.name for s in main.parse(argv).servers] == ["a", "b"]
    assert [s.name for s in main.parse([*argv, "--engines", "vllm"]).servers] == ["vllm", "a", "b"]


# --- loads ---


def made(rate=50.0, seconds=2.0, seed=0):
    return load.make(rate, seconds, (4, 9), (2, 5), 300, seed)


def test_equal_arguments_give_equal_loads_and_others_share_no_prompt():
    assert made() == made()
    for other in (made(seed=1), made(rate=49.0)):
        prompts = [{tuple(r.prompt) for r in each} for each in (made(), other)]
        assert not prompts[0] & prompts[1]
        assert load.digest(other) != load.digest(made())


def test_lengths_and_tokens_are_within_their_bounds():
    requests = made(seconds=20.0)
    assert {len(r.prompt) for r in requests} == set(range(4, 10))
    assert {r.output for r in requests} == set(range(2, 6))
    assert {t for r in requests for t in r.prompt} <= set(range(300))


def test_arrivals_are_those_of_a_poisson_process_at_the_rate():
    requests = made(rate=100.0, seconds=50.0)
    dues = [r.due for r in requests]
    assert len(dues) == 5000
    assert dues == sorted(dues)
    assert 0 <= dues[0] <= dues[-1] < 50
    gaps = [b - a for a, b in itertools.pairwise(dues)]
    assert stdev(gaps) / mean(gaps) == pytest.approx(1, abs=0.06)  # exponential gaps
    counts = [sum(second <= due < second + 1 for due in dues) for second in range(50)]
    assert stdev(counts) ** 2 / mean(counts) == pytest.approx(1, abs=0.5)  # and their counts


# --- figures ---


def test_a_percentile_is_one_of_the_values():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [figures.percentile(values, p) for p in (0, 20, 50, 80, 81, 100)] == [1, 1, 3, 4, 5, 5]
    assert figures.percentile([], 50) is None


def test_a_request_that_failed_makes_percentiles_worse():
    values = [1.0] * 97 + [None] * 3
    assert figures.percentile(values, 97) == 1.0
    assert figures.percentile(values, 99) is None


def test_limits_are_read_with_their_units():
    assert Slo.parse("ttft=200ms, itl=0.05s") == Slo(ttft=200.0, itl=50.0)
    assert str(Slo.parse("e2e=2s,tpot=12.5ms")) == "TPOT ≤ 12.5 ms, E2E ≤ 2000 ms"


POINT = Point(
    "a", 4.0, "d", {}, arrived=100, completed=100, queued=[10, 10], output_tok_s=1.0,
    total_tok_s=1.0, tokens_a_chunk=1.0, prompt_tokens=5.0,
    itl_ms={"p50": 1.0, "p90": 2.0, "p99": 3.0, "max": 4.0},
    lag_ms={"p50": 0.1, "p90": 0.2, "p99": 0.3, "max": 0.4},
    beat_ms={"p50": 0.1, "p90": 0.2, "p99": 0.3, "max": 0.4}, cpu_share=0.1,
    ttft_ms=[100.0, 300.0, 100.0, None], tpot_ms=[10.0, 10.0, 20.0, None],
    worst_itl_ms=[15.0, 15.0, 60.0, None], e2e_ms=[500.0, 700.0, 900.0, None],
)  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        (Slo(), 3),  # all that ended well
        (Slo(ttft=300.0), 3),
        (Slo(ttft=200.0), 2),
        (Slo(itl=50.0), 2),
        (Slo(tpot=10.0, e2e=600.0), 1),
        (Slo(ttft=99.0), 0),
    ],
)
def test_goodput_counts_the_requests_within_every_limit(limits, good):
    assert figures.goodput(POINT, limits, seconds=2.0) == good / 2


@pytest.mark.parametrize(
    ("change", "is_saturated"),
    [
        ({}, False),
        ({"queued": [10, 30]}, True),  # 20 of the 100 that arrived came on top
        ({"queued": [10, 25]}, False),  # 10 for the share, and chance: 2 * sqrt(11)
        ({"queued": [0, 3], "arrived": 8}, True),
        ({"queued": [3, 5], "arrived": 8}, False),  # few requests: it may be chance
        ({"queued": [200, 150]}, False),  # the queue shrinks
        ({"ttft_ms": [100.0] * 98 + [2001.0] * 2}, True),
        ({"ttft_ms": [100.0] * 99 + [2001.0]}, False),
        ({"ttft_ms": [None] + [1.0] * 9}, True),
        ({"ttft_ms": [1.0] * 200, "failures": {"HTTP 429": 21}}, True),
        ({"ttft_ms": [1.0] * 200, "failures": {"HTTP 429": 20}}, False),
    ],
)
def test_a_server_is_saturated_when_it_falls_behind(change, is_saturated):
    point = replace(POINT, ttft_ms=[100.0] * 4)
    assert figures.is_saturated(replace(point, **change), 0.9, 2000.0) is is_saturated


def answered(due, *times, output=None, **options):
    """A request and an answer with a chunk at each time."""
    count = len(times) if output is None else output
    options = {"ended_s": times[-1], "prompt_tokens": 3, "completion_tokens": count} | options
    return Request(due, [1, 2, 3], count), Answer(times=[*times], **options)


def computed(*pairs, seconds=4.0, **options):
    requests, answers = map(list, zip(*pairs, strict=True))
    told = [ClientResult(answers, [0.001] * 99 + [0.5], 0.25), ClientResult([], [], 0.5)]
    return figures.point("a", 1.0, seconds, requests, answers, told, **options)


def test_times_count_from_the_moment_that_a_request_was_due():
    point = computed(answered(1.0, 0.2, 0.3, 0.5, late_s=0.05), answered(2.5, 0.1, 0.2, 0.3))
    assert point.ttft_ms == [200.0, 100.0]
    assert point.tpot_ms == [150.0, 100.0]  # over two tokens after the first
    assert point.worst_itl_ms == [200.0, 100.0]
    assert point.e2e_ms == [500.0, 300.0]
    assert point.itl_ms["max"] == 200.0
    assert point.itl_ms["p50"] == 100.0
    assert point.lag_ms["max"] == 50.0
    assert (point.beat_ms["p50"], point.beat_ms["max"]) == (1.0, 500.0)
    assert point.cpu_share == 0.5
    assert point.failures == {}


def test_throughput_is_of_the_second_half_of_the_arrivals():
    # Tokens at 1.5 | 2.5 3.5 | 4.5, of four that the server counts as eight.
    point = computed(answered(0.5, 1.0, 2.0, 3.0, 4.0, output=8))
    assert point.output_tok_s == 2 * 2 / 2
    assert point.total_tok_s == round(8 / 4.5, 1)
    assert point.tokens_a_chunk == 2.0


def test_the_queue_is_counted_at_the_middle_and_at_the_end():
    point = computed(
        answered(0.0, 0.1), answered(1.0, 0.2, 1.5), answered(2.1, 0.5), answered(3.0, 0.5, 2.0)
    )
    assert point.queued == [1, 1]
    assert (point.arrived, point.completed) == (2, 2)


def test_what_failed_is_named_and_has_no_end():
    pairs = [
        answered(0.0, 0.1, 0.2, error="not finished in time", ended_s=3.0),
        (Request(0.0, [1, 2, 3], 2), Answer(error="HTTP 429: full")),
        (Request(0.0, [1, 2, 3], 2), Answer(error="HTTP 429: full")),
        answered(0.0, 0.1, 0.2),
    ]
    point = computed(*pairs)
    assert point.failures == {"HTTP 429: full": 2, "not finished in time": 1}
    assert point.ttft_ms == [100.0, None, None, 100.0]
    assert point.e2e_ms == [None, None, None, 200.0]
    assert point.tpot_ms == [None, None, None, 100.0]
    assert point.itl_ms["max"] == 2800.0  # the stream that stalled


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"completion_tokens": 1}, "another number of output tokens"),
        ({"completion_tokens": None}, "no usage"),
        ({"prompt_tokens": 4}, "the prompt was counted as another number"),
        ({"times": []}, "an answer without tokens"),
    ],
)
def test_other_work_than_was_asked_for_is_a_failure(change, reason):
    request, answer = answered(0.0, 0.1, 0.2)
    assert figures.failure(request, answer, takes_ids=True) is None
    found = figures.failure(request, replace(answer, **change), takes_ids=True)
    assert reason in found
    if reason.startswith("an"):
        return
    assert figures.failure(request, replace(answer, **change), takes_ids=False) is None


# --- the client ---

STREAM = (
    b': hello\n\ndata: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
    b'data: {"choices": [{"text": "\xc3\xa4", "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
    b"data: [DONE]\n\n"
)


def read(*blocks):
    answer = Answer()
    client.read_stream([(float(i), block) for i, block in enumerate(blocks)], answer)
    return answer


def test_a_chunk_has_the_time_at_which_its_end_came():
    ends = [m + 2 for m in range(len(STREAM)) if STREAM[m : m + 2] == b"\n\n"]
    for cut in range(1, len(STREAM)):
        answer = read(STREAM[:cut], STREAM[cut:])
        assert answer.times == [float(ends[1] > cut), float(ends[2] > cut)]
        assert (answer.prompt_tokens, answer.completion_tokens) == (3, 2)
        assert answer.error is None


def test_lines_may_end_as_in_http():
    assert read(STREAM.replace(b"\n", b"\r\n")) == read(STREAM)


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (STREAM[:50], "the stream broke off"),
        (b"", "the stream broke off"),
        (b'data: {"error": {"message": "gone"}}\n\ndata: [DONE]\n\n', "error in the stream: gone"),
        (b'data: {"error": "gone"}\n\n', "error in the stream: gone"),
        (b"data: {\n\ndata: [DONE]\n\n", "no JSON in the stream"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(stream, error):
    assert read(stream).error.startswith(error)


def offered(way, requests, wait_s=5.0, behind_s=0.0):
    """The client's result with a fake server in the same process."""

    async def run():
        fake = fake_server.FakeServer(way)
        server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        job = ClientJob(address, requests, {"model": "fake"}, wait_s)
        bodies = [client.body(request, job.fields) for request in requests]
        result = await client.run(job, bodies, time.monotonic() + 0.02 - behind_s)
        server.close()
        return result

    return asyncio.run(run())


def requests(count=12, gap=0.01, output=4):
    return [Request(i * gap, [1, 2, 3], output) for i in range(count)]


def test_every_request_is_sent_at_its_time_and_its_tokens_are_timed():
    result = offered("", requests())
    assert [a.error for a in result.answers] == [None] * 12
    assert all(len(a.times) == a.completion_tokens == 4 for a in result.answers)
    assert all(0 <= a.late_s <= a.times[0] <= a.times[-1] <= a.ended_s for a in result.answers)
    assert min(a.late_s for a in result.answers) < 0.1  # by a timer, on a machine that may be busy
    assert len(result.beats_s) > 5


def test_a_late_client_says_so_and_its_lateness_is_part_of_every_time():
    [answer] = offered("", requests(count=1), behind_s=1.0).answers
    assert 0.9 < answer.late_s < answer.times[0]


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("refuses", "HTTP 429: the queue is full"),
        ("breaks", "ClientPayloadError"),
        ("complains", "error in the stream: the engine has failed"),
    ],
)
def test_a_request_that_fails_says_why_and_fails_alone(way, reason):
    result = offered(way, requests())
    found = [a.error for a in result.answers]
    assert sum(error is None for error in found) == 9, found
    assert sum(bool(error) and error.startswith(reason) for error in found) == 3, found


def test_a_stalling_server_is_sent_as_much_as_any_and_given_up_in_time():
    begin = time.monotonic()
    answers = offered("stalls", requests(count=40), wait_s=2.0).answers
    assert 2.0 <= time.monotonic() - begin < 10
    unfinished = [a for a in answers if a.error]
    assert [a.error for a in unfinished] == [client.UNFINISHED] * 10
    assert all(len(a.times) == 2 for a in unfinished)  # what came before counts
    assert max(a.late_s for a in answers) < 1  # none waits for those that stall


def test_a_server_that_is_not_there_is_named():
    job = ClientJob("http://127.0.0.1:9", requests(count=1), {}, 2.0)
    result = asyncio.run(client.run(job, [b"{}"], time.monotonic()))
    assert result.answers[0].error.startswith("ClientConnectorError")


def test_the_client_starts_without_jax():
    code = (
        "import sys, nanovllm_jax.tools.compare.serving.client as c, aiohttp; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_client_that_ends_early_is_an_error_not_a_hang():
    job = ClientJob("http://127.0.0.1:9", [], {}, 1.0)  # nothing to wait for is refused
    with pytest.raises(clients.ClientError, match="ended early"):
        clients.send([job])


# --- servers ---


def test_a_command_is_filled_in_word_by_word():
    values = {"model": Path("/a b"), "port": 5, "load_format": "--load-format dummy"}
    command = "run --model {model} {load_format} --port={port} --json '{\"x\": {}}'"
    assert servers.filled(command, values) == [
        "run", "--model", "/a b", "--load-format", "dummy", "--port=5", "--json", '{"x": {}}',
    ]  # fmt: skip
    assert servers.filled("run {load_format} a", values | {"load_format": ""}) == ["run", "a"]


def test_modules_are_also_looked_for_in_a_servers_own_folder(tmp_path):
    (tmp_path / "no_such_engine").mkdir()
    needs = ("json", "no_such_engine")
    assert servers.missing_modules(needs, None) == ["no_such_engine"]
    assert servers.missing_modules(needs, str(tmp_path)) == []


def start(command, tmp_path, **options):
    values = {"python": sys.executable}
    return servers.running(Server("a", command), values, tmp_path / "a.log", **options)


def test_a_server_that_dies_is_an_error_with_the_end_of_its_log(tmp_path):
    command = "{python} -c 'print(\"no GPU here\"); exit(7)'"
    with (
        pytest.raises(ServerError, match="ended with 7: no GPU here"),
        start(command, tmp_path),
    ):
        pass


def test_a_program_that_is_not_there_is_an_error(tmp_path):
    with (
        pytest.raises(ServerError, match=r"127: .*no-such-program"),
        start("no-such-program", tmp_path),
    ):
        pass


def test_a_server_that_never_answers_is_ended(tmp_path):
    begin = time.monotonic()
    with (
        pytest.raises(ServerError, match=r"no model from .* after 0 s .*refused"),
        start("{python} -c 'import time; time.sleep(60)'", tmp_path, start_limit=0.5),
    ):
        pass
    assert time.monotonic() - begin < 20


def test_an_address_without_a_server_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "URL_S", 0.1)
    server = Server("a", url="http://127.0.0.1:9/v1")
    there = servers.running(server, {}, tmp_path / "a.log")
    with pytest.raises(ServerError, match=r"no model from http://127.0.0.1:9/v1/.*refused"), there:
        pass


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def test_a_server_is_stopped_with_its_children(tmp_path):
    """The child ignores SIGTERM, as an engine's process may."""
    code = (
        "import subprocess, sys, runpy; p = subprocess.Popen([sys.executable, '-c', "
        "'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)']); "
        f"print('child', p.pid, flush=True); sys.argv = ['', sys.argv[1]]; "
        f"runpy.run_path({fake_server.__file__!r}, run_name='__main__')"
    )
    with start(f'{{python}} -c "{code}" {{port}}', tmp_path) as there:
        assert there.model == "fake"
        child = int((tmp_path / "a.log").read_text("utf-8").split("child ")[1].split()[0])
        assert is_running(child)
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_ends_with_the_comparison(tmp_path):
    """However that ends: here it is killed."""
    code = f"""if 1:
        import sys, time
        from pathlib import Path
        from nanovllm_jax.tools.compare.serving import servers
        command = "{sys.executable} {fake_server.__file__} {{port}}"
        with servers.running(servers.Server("a", command), {{}}, Path("{tmp_path}/a.log")) as there:
            print(there.process.pid, flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    guard = int(process.stdout.readline())
    assert is_running(guard)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while is_running(guard):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- from end to end ---


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The options of a short sweep to out.jsonl, in which a slow machine is not saturated."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sweep, "WARM_UP", 8)
    return ["--output", str(tmp_path / "out"), "--seconds", "0.5", "--drain", "20",
            "--output-tokens", "3:6", "--min-share", "0.001", "--max-ttft", "60"]  # fmt: skip


def found(tmp_path, kind):
    return [r for r in results.read(tmp_path / "out.jsonl", records.KINDS) if type(r) is kind]


def test_a_sweep_gives_all_servers_the_same_and_reports_them(quick, tmp_path):
    logs = {name: tmp_path / f"{name}.requests" for name in ("one", "two")}
    given = [f"--server={name}={FAKE} '' {log}" for name, log in logs.items()]
    assert main.main([*quick, *given, "--rates", "40,20"]) == 0
    points = found(tmp_path, Point)
    assert [(p.server, p.rate) for p in points] == [
        ("one", 20.0), ("one", 40.0), ("two", 20.0), ("two", 40.0)
    ]  # fmt: skip
    for p in points:
        assert not p.failures
        assert len(p.ttft_ms) == p.rate / 2
        assert figures.percentile(p.ttft_ms, 50) >= 1000 * fake_server.GAP_S
    sent = {name: sorted(log.read_text("utf-8").splitlines()) for name, log in logs.items()}
    assert len(sent["one"]) == 8 + 10 + 20
    assert sent["one"] == sent["two"]
    body = json.loads(sent["one"][0])
    assert body["ignore_eos"] is body["stream"] is body["stream_options"]["include_usage"] is True
    page = (tmp_path / "out.md").read_text("utf-8")
    for words in ("# Serving the demo model", "## one", "## two", "| 40 | 20 | 0 |", "goodput"):
        assert words in page, words
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_dies_is_reported_and_the_next_one_measured(quick, tmp_path, capsys):
    argv = ["compare", "serving", *quick, f"--server=mortal={FAKE} dies", f"--server=b={FAKE}",
            "--rates", "20,60"]  # fmt: skip
    assert cli.main(argv) == 1
    output = capsys.readouterr()
    assert "the fake server has had enough" in output.out  # the end of its log
    told = "the server ended with 3: the fake server has had enough"
    assert f"mortal failed: {told}" in output.err
    points = {(p.server, p.rate): p for p in found(tmp_path, Point)}
    assert [*points] == [("mortal", 20.0), ("mortal", 60.0), ("b", 20.0), ("b", 60.0)]
    failed = [sum(p.failures.values()) for p in points.values()]
    assert failed[0] == failed[2] == failed[3] == 0
    assert failed[1] >= 28  # it dies at the third of the thirty
    assert f"mortal: {told}" in (tmp_path / "out.md").read_text("utf-8")


def test_a_server_that_fails_the_warm_up_is_not_measured(quick, tmp_path):
    assert main.main([*quick, f"--server=a={FAKE} refuses", "--rates", "30"]) == 1
    [failure] = found(tmp_path, ServerFailure)
    assert failure.reason == "2 of 8 requests of the warm-up: HTTP 429: the queue is full"
    assert not found(tmp_path, Point)


def test_a_running_server_is_added_to_a_report_until_it_is_saturated(quick, tmp_path):
    rates, log = ["--rates", "20,30,40"], tmp_path / "x.log"
    results.append(
        tmp_path / "out.jsonl", *main.prepare(main.parse([*quick, *rates]))[:2], kinds=records.KINDS
    )
    with servers.running(Server("x", FAKE), {"python": sys.executable}, log) as there:
        added = [*quick, f"--url=b={there.address}/v1", *rates, "--add"]
        with pytest.raises(UsageError, match=r"the options of .* differ"):
            main.main([*added, "--seconds", "2"])
        tight = [*added, "--max-ttft", "0.0001", "--clients", "2"]
        results.append(
            tmp_path / "tight.jsonl",
            *main.prepare(main.parse(tight))[:2],
            kinds=records.KINDS,
        )
        assert main.main([*tight, "--output", str(tmp_path / "tight")]) == 0
        (tmp_path / "tight.jsonl").replace(tmp_path / "out.jsonl")
        with pytest.raises(UsageError, match="has results of b already"):
            main.main(tight)
    points = found(tmp_path, Point)
    assert [point.rate for point in points] == [20.0, 30.0]  # the second confirms the first
    assert all(point.is_saturated for point in points)
    assert not points[0].failures  # each process has had its share of the requests
    [started] = found(tmp_path, Started)
    assert started.start_s is None
    assert "ran already at http://127.0.0.1" in (tmp_path / "tight.md").read_text("utf-8")


def sample(**change):
    settings = SweepSettings(
        "2026-01-01", "a model", "cpu", 300, [4.0, 8.0], 2.0, 1.0, [3, 5], [2, 4], 0.6, 0, 0.9,
        10.0, 1, 512, 16,
    )  # fmt: skip
    machine = Machine("Linux", "3.11", "a CPU", 2, None, 0.5, None)
    late = {"p50": 1.0, "p90": 2.0, "p99": 30.0, "max": 40.0}
    return [
        settings, machine, Started("a", "run", None, True, 1.0, "1.2"),
        Started("b", None, "http://h", True, None, None), POINT,
        replace(POINT, server="b", lag_ms=late, failures={"HTTP 500: broken": 1}, **change),
        records.ServerAbsent("vllm", ["vllm"], "vllm"), ServerFailure("c", "it died"),
    ]  # fmt: skip


def test_the_report_tells_failures_and_a_late_client(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.jsonl"
    results.append(file, *sample(), kinds=records.KINDS)
    assert main.main(["--from", str(file), "--slo", "e2e=600ms"]) == 0
    page = (tmp_path / "out.md").read_text("utf-8")
    for words in (
        "100 / ∞ / ∞", "E2E ≤ 600 ms", "4 req/s: 1 failed: HTTP 500: broken", "pip install vllm",
        "the client itself was late by up to 30.0 ms (p99) at 4 req/s", "- c: it died", "vLLM",
    ):  # fmt: skip
        assert words in page, words
    assert "| 0.500 |" in page or "| 0.5 |" in page  # one request of four in two seconds


def test_results_of_unequal_loads_are_refused():
    with pytest.raises(UsageError, match="given different loads"):
        report.Sweep(sample(digest="another"))


@pytest.mark.slow
def test_this_engines_server_is_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(sweep, "WARM_UP", 8)
    command = "{python} -m nanovllm_jax serve --port {port} --max-num-seqs 4 --max-model-len 256"
    argv = ["--output", str(tmp_path / "out"), f"--server=ours={command}", "--rates", "4",
            "--seconds", "4"]  # fmt: skip
    assert main.main(argv) == 0
    [point] = found(tmp_path, Point)
    assert not point.failures
    assert all(t is not None and math.isfinite(t) for t in point.e2e_ms)
    assert point.tokens_a_chunk >= 1
