"""What a checkpoint's weights cost: bytes that a step must read, products that a token must compute."""
import json
import math
import struct
from pathlib import Path


def tensors(folder):
    """(name, shape, bytes) of every tensor, from the headers of the safetensors files."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, entry["shape"], end - begin


class Weights:
    """Sizes of one mixture-of-experts checkpoint. The embedding is left out unless it is the head too: a step reads single rows of it."""

    def __init__(self, folder):
        self.name = Path(folder).resolve().name
        self.config = config = json.loads(Path(folder, "config.json").read_text())
        self.experts = config.get("num_experts") or config["num_local_experts"]
        self.top_k = config["num_experts_per_tok"]
        self.layers = config["num_hidden_layers"]
        self.expert_bytes = self.expert_params = self.other_bytes = self.other_params = self.head_params = 0
        names = [name for name, _, _ in tensors(folder)]
        tied = "lm_head.weight" not in names
        for name, shape, size in tensors(folder):
            params = math.prod(shape)
            if ".experts." in name:
                self.expert_bytes += size
                self.expert_params += params
            elif "embed_tokens" not in name or tied:
                self.other_bytes += size
                self.other_params += params
                self.head_params += params if "lm_head" in name or "embed_tokens" in name else 0

    def summary(self):
        """The sizes, for a report."""
        return dict(name=self.name, model_type=self.config["model_type"], layers=self.layers, experts=self.experts, top_k=self.top_k,
                    expert_bytes=self.expert_bytes, other_bytes=self.other_bytes)

    def distinct(self, batch):
        """Experts that a layer uses for `batch` tokens, if every choice were equally likely."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** batch)

    def step_bytes(self, distinct):
        """Bytes of weights that one decode step reads when a layer uses `distinct` experts. KV is left out."""
        return self.other_bytes + self.expert_bytes * distinct / self.experts

    def kv_bytes(self, positions):
        """Bytes of keys and values in bf16 of one sequence."""
        heads = self.config["num_attention_heads"]
        head_dim = self.config.get("head_dim") or self.config["hidden_size"] // heads
        return 2 * 2 * self.layers * (self.config.get("num_key_value_heads") or heads) * head_dim * positions

    def prefill_flops(self, tokens):
        """Operations of one prompt: two per weight of the active path, causal attention, the head once."""
        active = self.other_params - self.head_params + self.expert_params * self.top_k / self.experts
        heads = self.config["num_attention_heads"]
        width = heads * (self.config.get("head_dim") or self.config["hidden_size"] // heads)
        attention = 4 * self.layers * width * tokens * (tokens + 1) / 2
        return 2 * active * tokens + attention + 2 * self.head_params
