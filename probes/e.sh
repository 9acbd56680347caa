mkdir -p /tmp/new; tar xJf .carry/new.tar.xz -C /tmp/new
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
cd /tmp/new
unset XLA_PYTHON_CLIENT_PREALLOCATE
cat > /tmp/lat.py <<'P'
import sys, time, statistics
from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.tools.shapes import SHAPES, write_config
import tempfile, pathlib, random
def main():
    d = pathlib.Path(tempfile.mkdtemp()); write_config(SHAPES["0.6B"], d)
    out = {}
    for backend in ("auto", "triton"):
        llm = LLM(str(d), load_format="dummy", max_model_len=4096, max_num_seqs=16, max_num_batched_tokens=4096, num_kvcache_blocks=400, attention_backend=backend)
        r = random.Random(0)
        for b in (1, 2, 4, 8, 16):
            ts = []
            for run in range(3):
                ps = [[r.randrange(1000, 90000) for _ in range(270)] for _ in range(b)]
                def go(n):
                    t = time.perf_counter(); o = llm.generate(ps, SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False), use_tqdm=False); return time.perf_counter() - t, o
                llm.reset_prefix_cache(); short, _ = go(16); llm.reset_prefix_cache(); long, o = go(272)
                ts.append((long - short) / 256 * 1e3)
                if run == 0: out[b, backend] = [x["token_ids"] if isinstance(x, dict) else x.token_ids for x in o]
            print(backend, "batch", b, "ms a token", [round(t, 3) for t in ts], flush=True)
        llm.exit()
        del llm
    for b in (1, 2, 4, 8, 16):
        same = [next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), len(x)) for x, y in zip(out[b, "auto"], out[b, "triton"])]
        print("batch", b, "first different token", same)
if __name__ == "__main__": main()
P
PYTHONPATH=/tmp/new timeout 120 python3 /tmp/lat.py 2>&1 | tail -20 | cut -c1-300
export XLA_PYTHON_CLIENT_PREALLOCATE=false
PYTHONPATH=/tmp/new timeout 66 python3 scripts/bench_decode_layers.py --batch 1 8 16 --budget 60 --rounds 4 2>&1 | tail -60 | cut -c1-220
