"""transformers on the same device and shapes: random weights made there, bf16, its attention by torch's own kernels, and the
fastest of the ways in which it computes experts. Its forward is called directly, as in benches/peers.
"""
import gc
import statistics
import time

import rig as rigs
import shapes

IMPLEMENTATIONS = ["grouped_mm", "batched_mm", "eager"]
REPS = 3
STEPS = 16
ENOUGH_SECONDS = 12  # for the trials of one measure


def run(rig):
    if missing := rigs.why_no_transformers():
        raise rigs.Skip(missing)
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    rig.note(torch=torch.__version__, transformers=transformers.__version__, cuda=torch.version.cuda, **limits(rig, torch), models={})
    for name, shape in shapes.of(rig.dry).items():
        with torch.inference_mode():
            rig.note(models={**rig.found["models"], name: measure(rig, torch, transformers, shape)})
        gc.collect()
        if not rig.dry:
            torch.cuda.empty_cache()


def seconds(rig, torch, call):
    """Seconds until the device is done with it."""
    began = time.perf_counter()
    call()
    if not rig.dry:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def limits(rig, torch):
    """What torch itself reaches: a product of large matrices, and a copy, bytes read and written."""
    n, count = rig.size((256, 1 << 20), (8192, 2 << 30))
    a, b = (torch.randn(n, n, device=rig.device, dtype=torch.bfloat16) for _ in range(2))
    many = lambda call: statistics.median(seconds(rig, torch, lambda: [call() for _ in range(10)]) / 10 for _ in range(5))
    [a @ b for _ in range(3)]
    product = many(lambda: a @ b)
    source = torch.zeros(count, device=rig.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = many(lambda: target.copy_(source))
    return dict(matmul=f"{n} x {n} x {n}, bf16", matmul_tflop_s=2 * n**3 / product / 1e12, copy_gb_s=2 * count / copy / 1e9)


def measure(rig, torch, transformers, shape):
    config = transformers.AutoConfig.for_model(**shapes.config(shape))
    began = time.perf_counter()
    with torch.device(rig.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    found = dict(load_seconds=time.perf_counter() - began, attention="sdpa", results=[], trials=[])

    def tokens(batch, length):
        return torch.randint(3, config.vocab_size, (batch, length), device=rig.device)

    def forward(ids, past=None):
        return model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)

    def prefill(length):
        ids = tokens(1, length)
        return seconds(rig, torch, lambda: forward(ids).logits[:, -1].argmax(-1).tolist())

    def decode(batch, steps):
        out = forward(tokens(batch, shapes.CONTEXT))

        def run():
            ids, past = out.logits[:, -1:].argmax(-1), out.past_key_values
            for _ in range(steps):
                ids = forward(ids, past).logits[:, -1:].argmax(-1)
            ids.tolist()
        return seconds(rig, torch, run)

    def fastest(label, trial):
        """Chooses the form of experts with the shortest trial; forms that this version or this device has not are left out."""
        best, began = None, time.perf_counter()
        for name in IMPLEMENTATIONS:
            if best and time.perf_counter() - began > ENOUGH_SECONDS:
                break
            try:
                model.set_experts_implementation(name)
                trial()
                took = trial()
            except Exception as error:
                found["trials"].append(dict(measure=label, experts=name, error=f"{type(error).__name__}: {error}"[:200]))
                if not rig.dry:
                    torch.cuda.empty_cache()
                continue
            found["trials"].append(dict(measure=label, experts=name, seconds=took))
            best = min(best or (took, name), (took, name))
        if best is None:
            raise RuntimeError(f"{label}: no form of experts runs: {found['trials'][-1]['error']}")
        model.set_experts_implementation(best[1])
        return best[1]

    steps = rig.size(2, STEPS)
    for length in rig.size([16], shapes.PREFILLS):
        chosen = fastest(f"prefill {length}", lambda: prefill(length))
        rates = [length / prefill(length) for _ in range(rig.size(1, REPS))]
        found["results"].append(dict(measure="prefill", tokens=length, tokens_per_second=rates, experts=chosen))
    for batch in rig.size([1], [1, 8]):
        chosen = fastest(f"decode {batch}", lambda: decode(batch, 2))
        rates = [batch * steps / decode(batch, steps) for _ in range(rig.size(1, REPS))]
        found["results"].append(dict(measure="decode", batch=batch, context=shapes.CONTEXT, tokens=steps, tokens_per_second=rates, experts=chosen))
    return found
