"""The models whose speed is measured, as configurations for random weights; their bytes and operations."""
import json

from rig import SCRATCH

# L layers, H hidden, nh/nkv heads, hd head dim, E experts, K top-k, I expert width, V vocabulary
SHAPES = {
    "1b": dict(L=20, H=1024, nh=8, nkv=2, hd=128, E=64, K=8, I=256, V=32768),
    "30b-a3b": dict(L=48, H=2048, nh=32, nkv=4, hd=128, E=128, K=8, I=768, V=151936),
}
DRY = {"nano": dict(L=2, H=64, nh=4, nkv=2, hd=16, E=8, K=2, I=32, V=512)}
PREFILLS, BATCHES, CONTEXT, GENERATED = [512, 2048, 8192], [1, 8, 64, 256], 32, 33


def of(dry):
    return DRY if dry else SHAPES


def config(d):
    """config.json of Qwen3-MoE."""
    return dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", torch_dtype="bfloat16", hidden_size=d["H"], num_hidden_layers=d["L"],
                num_attention_heads=d["nh"], num_key_value_heads=d["nkv"], head_dim=d["hd"], vocab_size=d["V"], max_position_embeddings=40960,
                num_experts=d["E"], num_experts_per_tok=d["K"], moe_intermediate_size=d["I"], intermediate_size=3 * d["H"], norm_topk_prob=True,
                decoder_sparse_step=1, mlp_only_layers=[], hidden_act="silu", attention_bias=False, attention_dropout=0.0, rms_norm_eps=1e-6,
                rope_theta=1e6, tie_word_embeddings=False, use_cache=True, initializer_range=0.02, router_aux_loss_coef=0.001,
                output_router_logits=False, sliding_window=None, use_sliding_window=False, max_window_layers=d["L"], bos_token_id=0,
                eos_token_id=2, pad_token_id=0)


def write(name, d):
    folder = SCRATCH / f"shape-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(d)))
    return folder


def dense(d):
    """Weights that every token is multiplied by in the layers."""
    return d["L"] * (d["H"] * (d["nh"] + 2 * d["nkv"]) * d["hd"] + d["nh"] * d["hd"] * d["H"] + d["E"] * d["H"])


def expert(d):
    return 3 * d["H"] * d["I"]


def touched(d, batch):
    """Experts of a layer that a step of single rows reads: the expected number, if every set is as likely as any other."""
    return d["E"] * (1 - (1 - d["K"] / d["E"]) ** batch)


def decode_bytes(d, batch, context):
    """Of weights and KV in a step, two bytes each."""
    weights = dense(d) + d["H"] * d["V"] + d["L"] * touched(d, batch) * expert(d)
    return 2 * (weights + batch * context * 2 * d["L"] * d["nkv"] * d["hd"])


def prefill_flops(d, tokens):
    """Products with weights, the head for one row, and attention over what each token sees."""
    weights = tokens * (dense(d) + d["L"] * d["K"] * expert(d)) + d["H"] * d["V"]
    return 2 * weights + d["L"] * 2 * tokens * (tokens + 1) * d["nh"] * d["hd"]
