"""A qwen3_moe checkpoint folder as one GGUF file for llama.cpp, without a vocabulary.

    python to_gguf.py FOLDER OUT.gguf bf16|q8_0

Names and metadata as in llama.cpp's own converter; a file without a vocabulary is fed token ids.
"""
import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

BF16 = gguf.GGMLQuantizationType.BF16
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def tensors(folder):
    """Every tensor of the folder as (name, array); bf16 comes as uint16."""
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, mode="r", dtype=np.uint8)
        (size,) = struct.unpack("<Q", data[:8].tobytes())
        for name, entry in json.loads(data[8:8 + size].tobytes()).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                dtype = {"BF16": np.uint16, "F32": np.float32, "F16": np.float16}[entry["dtype"]]
                yield name, data[8 + size + begin:8 + size + end].view(dtype).reshape(entry["shape"])


def f32(array):
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array.astype(np.float32)


class Writer:
    def __init__(self, out, config, kind):
        self.kind = kind
        self.gguf = writer = gguf.GGUFWriter(out, "qwen3moe")
        writer.add_name("bench")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_tokenizer_model("no_vocab")

    def put(self, name, array):
        # Norms and routers stay in f32, as llama.cpp's converter leaves them.
        if array.ndim == 1 or "ffn_gate_inp" in name:
            self.gguf.add_tensor(name, f32(array))
        elif self.kind == "bf16" and array.dtype == np.uint16:
            self.gguf.add_tensor(name, np.ascontiguousarray(array).view(np.uint8), raw_dtype=BF16)
        else:
            kind = {"bf16": BF16, "q8_0": Q8_0}[self.kind]
            self.gguf.add_tensor(name, gguf.quants.quantize(f32(array), kind), raw_dtype=kind)

    def close(self):
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
LAYER = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
         "mlp.gate": "ffn_gate_inp"}


def main():
    folder, out, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((folder / "config.json").read_text())
    stored = dict(tensors(folder))
    writer = Writer(out, config, kind)
    for name, target in TOP.items():
        writer.put(target, stored[name])
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, target in LAYER.items():
            writer.put(f"blk.{layer}.{target}.weight", stored[f"{prefix}{name}.weight"])
        for which in ["gate", "up", "down"]:
            each = [stored[f"{prefix}mlp.experts.{expert}.{which}_proj.weight"] for expert in range(config["num_experts"])]
            writer.put(f"blk.{layer}.ffn_{which}_exps.weight", np.stack(each))
    writer.close()


if __name__ == "__main__":
    main()
