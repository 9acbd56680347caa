#!/usr/bin/env python3
"""Completes a file of prompts with many engines: Ray Data maps batches over actors, an LLM in each.

    python scripts/ray_generate.py prompts.jsonl --output DIR --actors 8 --model MODEL_DIR

Each line of the input is {"id": 7, "prompt": "text, or token ids"}. DIR/completions.jsonl has a
line for each in the same order: {"id", "prompt", "text", "token_ids"}, and "error" if the request
was refused or outgrew the KV cache. Every finished batch is a file DIR/part-*.jsonl, which is
written whole or not at all. Ray restarts a killed actor and gives it its batches again. After the
driver was killed, the same command goes on with the prompts that are in no part. On several
machines DIR must be a folder that all of them see.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.config import EngineConfig
from nanovllm_jax.tools.options import (
    DEMO_MODEL,
    Parser,
    UsageError,
    add_engine_options,
    check_positive,
    engine_options,
    flag,
    refusals,
)

SAMPLING = ("temperature", "max_tokens", "top_k", "top_p", "min_p")
# Engine options that change the tokens of a completion.
CHANGE_TOKENS = ("max_model_len", "dtype", "kv_cache_dtype", "load_format")


class Generate:
    """The engine of one actor; Ray calls it with batches of prompts."""

    def __init__(self, output: Path, model: str, engine: dict, sampling: dict, seed: int):
        self.output, self.sampling, self.seed = output, sampling, seed
        self.llm = LLM(model, **engine)
        print(f"actor {os.getpid()}: engine ready", flush=True)

    def __call__(self, batches: dict[str, Any]) -> dict[str, Any]:
        for name, rows in zip(batches["name"], batches["rows"], strict=True):
            if not (self.output / name).exists():  # else its actor died before saying so
                write(self.output / name, self.complete(json.loads(rows)))
        return {"name": batches["name"]}

    def complete(self, rows: list[dict]) -> list[dict]:
        """Returns the rows with their completions, or with the reason if a prompt is refused."""
        # Each prompt has a seed of its own, so that actors, batches and restarts do not change its
        # tokens.
        seeds = [hashlib.sha256(f"{self.seed} {row['id']!r}".encode()).digest() for row in rows]
        params = [SamplingParams(**self.sampling, seed=int.from_bytes(s[:8])) for s in seeds]
        try:
            outputs = self.llm.generate([row["prompt"] for row in rows], params, use_tqdm=False)
        except (TypeError, ValueError) as error:  # nothing has run yet: look for the bad prompt
            if len(rows) == 1:
                return [rows[0] | {"text": "", "token_ids": [], "error": str(error)}]
            half = len(rows) // 2
            return self.complete(rows[:half]) + self.complete(rows[half:])
        return [row | output for row, output in zip(rows, outputs, strict=True)]


def write(path: Path, rows: list[dict]) -> None:
    """Writes a file of JSON lines, of which readers see all or nothing."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".", delete=False
    ) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def read_prompts(path: Path) -> list[dict]:
    """Reads the input's rows, {"id", "prompt"} each.

    Raises:
        UsageError: the file cannot be read, or a line, which the message names, is no such row.
    """
    rows: dict[Any, dict] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            number, prompt = row["id"], row["prompt"]
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f'{path}:{n} is not like {{"id": 7, "prompt": "Hello"}}: {line:.60}'
            ) from None
        if type(number) not in (int, str):
            raise UsageError(f"{path}:{n}: an id is an integer or a string, not {number!r:.60}")
        if number in rows:
            raise UsageError(f"{path}:{n}: the id {number!r} has been used above; make ids unique")
        rows[number] = {"id": number, "prompt": prompt}
    if not rows:
        raise UsageError(f"{path} has no prompts")
    return list(rows.values())


def key(row: dict) -> str:
    """Identifies a row by its id and prompt, so that a changed prompt is run again."""
    return json.dumps([row["id"], row["prompt"]])


def read_parts(output: Path) -> dict[str, dict]:
    """Reads the finished rows, by key."""
    lines = (line for path in output.glob("part-*.jsonl") for line in path.open(encoding="utf-8"))
    return {key(row): row for row in map(json.loads, lines)}


def batches(prompts: list[dict], done: dict[str, dict], size: int) -> list[dict[str, str]]:
    """Cuts the prompts that are not done into parts, {"name": file name, "rows": JSON} each.

    Prompts are cut before those that are done are left out, so that a rerun gives the same work the
    same names.
    """
    parts = []
    for i in range(0, len(prompts), size):
        if rows := [row for row in prompts[i : i + size] if key(row) not in done]:
            text = json.dumps(rows)
            name = f"part-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
            parts.append({"name": name, "rows": text})
    return parts


def check_settings(output: Path, settings: dict) -> None:
    """Records the settings of a run beside its parts, and refuses to mix them with others."""
    path = output / "settings.json"
    if not path.exists():
        write(path, [settings])
    before = json.loads(path.read_text("utf-8"))
    for name, value in settings.items():
        if before[name] != value:
            raise UsageError(
                f"{output} was begun with {name}={before[name]!r}, not {value!r}: "
                "repeat the first command, or choose another --output"
            )


def run(args: argparse.Namespace) -> int:
    """Completes what is left and writes completions.jsonl; returns 1 if a request failed."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError('Ray is not installed: pip install "nanovllm-jax[ray]"') from None
    engine = engine_options(args)
    sampling = {name: getattr(args, name) for name in SAMPLING}
    check_positive(args, "actors", "batch_size")
    with refusals(AssertionError, TypeError, ValueError):
        config = EngineConfig.resolve(args.model, **engine)
        SamplingParams(**sampling)
    prompts, output = read_prompts(args.input), args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    model, seed = str(args.model.resolve()), args.seed
    chosen = {name: engine.get(name) for name in CHANGE_TOKENS}
    check_settings(output, {"model": model, "seed": seed} | sampling | chosen)
    done = read_parts(output)
    todo, left = batches(prompts, done, args.batch_size), sum(key(p) not in done for p in prompts)
    print(f"{len(prompts)} prompts, {left} to do in {len(todo)} batches", flush=True)

    if todo:
        ray.init(include_dashboard=False)
        gpus = config.num_devices if ray.cluster_resources().get("GPU") else 0
        for kind, each in (("CPU", 1), ("GPU", gpus)):
            if each * args.actors > (there := ray.cluster_resources().get(kind, 0)):
                raise UsageError(f"--actors {args.actors} at {each} {kind} each: there are {there}")
        ray.data.DataContext.get_current().enable_progress_bars = False
        finished = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            Generate,
            fn_constructor_args=(output, model, engine, sampling, seed),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=args.actors),
            num_cpus=1,
            num_gpus=gpus,
        )
        try:
            for count, _ in enumerate(finished.iter_rows(), 1):
                print(f"{count} of {len(todo)} batches", flush=True)
        except ray.exceptions.RayError as error:  # the last line is the actor's own exception
            raise UsageError(f"an actor failed: {str(error).splitlines()[-1]}") from None

    done = read_parts(output)
    write(output / "completions.jsonl", [done[key(row)] for row in prompts])
    failed = sum("error" in done[key(row)] for row in prompts)
    print(f"{output / 'completions.jsonl'}: {len(prompts)} prompts, {failed} failed", flush=True)
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all is done, 1 if some requests failed, 2 for bad usage."""
    parser = Parser(description="Complete a file of prompts with many engines.")
    add = parser.add_argument
    add("input", type=Path, help="JSON lines with an id and a prompt")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of this run, new or unfinished",
    )
    add("--model", type=Path, default=DEMO_MODEL, metavar="DIR", help="default: the demo model")
    add("--actors", type=int, default=1, help="engines, each with its own GPUs")
    add("--batch-size", type=int, default=1024, help="prompts given to an engine, and written, "
        "together: several times --max-num-seqs keeps the engine full")  # fmt: skip
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    for name in SAMPLING:
        add(flag(name), type=type(defaults[name]), default=defaults[name])
    add("--seed", type=int, default=0, help="with a prompt's id, what its own seed is made from")
    add_engine_options(parser)
    try:
        return run(parser.parse_args(argv))
    except UsageError as error:
        print(f"ray_generate: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
