"""Qwen3-MoE in plain torch, written for fast training on a CPU: tokens are sorted by expert, once per layer."""
import torch
import torch.nn.functional as F
from torch import nn


class Permute(torch.autograd.Function):
    """Rows of x in another order; the backward pass is a gather too, not a slow scatter."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, g):
        return g.index_select(0, ctx.saved_tensors[0]), None, None


class Dispatch(torch.autograd.Function):
    """[N, H] -> [N*K, H] sorted by expert; backward sums the K copies of each token."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, g):
        return g.index_select(0, ctx.saved_tensors[0]).view(-1, ctx.k, g.shape[-1]).sum(1), None, None, None


class Moe(nn.Module):
    def __init__(self, c):
        super().__init__()
        e, h, i = c["num_experts"], c["hidden_size"], c["moe_intermediate_size"]
        self.k = c["num_experts_per_tok"]
        self.gate = nn.Parameter(torch.randn(e, h) * 0.02)
        self.gate_up = nn.Parameter(torch.randn(e, 2 * i, h) * h ** -0.5)
        self.down = nn.Parameter(torch.randn(e, h, i) * (i * 2 * c["num_hidden_layers"]) ** -0.5)

    def forward(self, x):  # [N, H]
        n, e = x.shape[0], self.gate.shape[0]
        probs = F.linear(x, self.gate).softmax(-1)  # [N, E]
        w, ids = probs.topk(self.k, -1)  # [N, K]
        w = w / w.sum(-1, keepdim=True)
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        counts = torch.bincount(flat, minlength=e)
        sizes = counts.tolist()
        xs = Dispatch.apply(x, order, inverse, self.k).split(sizes)
        gu = torch.cat([F.linear(t, m) for t, m in zip(xs, self.gate_up.unbind(0))])
        g, u = gu.chunk(2, -1)
        mid = (F.silu(g) * u).split(sizes)
        y = torch.cat([F.linear(t, m) for t, m in zip(mid, self.down.unbind(0))])
        y = Permute.apply(y, inverse, order).view(n, self.k, -1)
        # The load-balancing loss of the Switch and Mixtral papers: 1 when the load is even.
        balance = e * (counts / (n * self.k) * probs.mean(0)).sum()
        return torch.bmm(w.unsqueeze(1), y).squeeze(1), balance, ids


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, self.d = c["hidden_size"], c["head_dim"]
        self.nh, self.nkv = c["num_attention_heads"], c["num_key_value_heads"]
        self.q = nn.Parameter(torch.randn(self.nh * self.d, h) * h ** -0.5)
        self.kk = nn.Parameter(torch.randn(self.nkv * self.d, h) * h ** -0.5)
        self.v = nn.Parameter(torch.randn(self.nkv * self.d, h) * h ** -0.5)
        self.o = nn.Parameter(torch.randn(h, self.nh * self.d) * (self.nh * self.d * 2 * c["num_hidden_layers"]) ** -0.5)
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(self.d)), nn.Parameter(torch.ones(self.d))
        self.eps = c["rms_norm_eps"]

    def forward(self, x, rope):  # x [B, T, H]
        b, t, _ = x.shape
        heads = lambda w, n: F.linear(x, w).view(b, t, n, self.d)
        q = F.rms_norm(heads(self.q, self.nh), (self.d,), self.q_norm, self.eps)
        k = F.rms_norm(heads(self.kk, self.nkv), (self.d,), self.k_norm, self.eps)
        v = heads(self.v, self.nkv).transpose(1, 2)
        g = self.nh // self.nkv
        q, k = (turn(z.transpose(1, 2), rope) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k.repeat_interleave(g, 1), v.repeat_interleave(g, 1), is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(b, t, -1), self.o)


def turn(x, rope):
    cos, sin = rope
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn, self.moe = Attention(c), Moe(c)
        self.norm1, self.norm2 = nn.Parameter(torch.ones(c["hidden_size"])), nn.Parameter(torch.ones(c["hidden_size"]))
        self.eps = c["rms_norm_eps"]

    def forward(self, x, rope):
        h = x.shape[-1]
        x = x + self.attn(F.rms_norm(x, (h,), self.norm1, self.eps), rope)
        y, balance, ids = self.moe(F.rms_norm(x, (h,), self.norm2, self.eps).view(-1, h))
        return x + y.view_as(x), balance, ids


class Toy(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        h, v = c["hidden_size"], c["vocab_size"]
        self.embed = nn.Parameter(torch.randn(v, h) * 0.5)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(h))
        self.head = nn.Parameter(torch.randn(v, h) * 0.02)

    def forward(self, ids):  # [B, T] -> logits [B, T, V], mean balance loss, [L][N, K] expert ids
        d = self.c["head_dim"]
        inv = self.c["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
        ang = torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * inv
        rope = (ang.cos(), ang.sin())
        x, total, routes = F.embedding(ids, self.embed), 0.0, []
        for layer in self.layers:
            x, balance, r = layer(x, rope)
            total = total + balance
            routes.append(r)
        x = F.rms_norm(x, (x.shape[-1],), self.norm, self.c["rms_norm_eps"])
        return F.linear(x, self.head), total / len(self.layers), routes

    @torch.no_grad()
    def load_hf(self, w):
        """Take the weights of a checkpoint; every tensor must be used."""
        w = dict(w)
        for name, t in self.named_hf():
            t.copy_(w.pop(name))
        assert not w, f"left over: {list(w)[:3]}"

    def named_hf(self):
        """Yield (published Qwen3-MoE name, tensor): one matrix per expert."""
        i = self.c["moe_intermediate_size"]
        yield "model.embed_tokens.weight", self.embed
        for n, l in enumerate(self.layers):
            p, a, m = f"model.layers.{n}.", l.attn, l.moe
            yield p + "input_layernorm.weight", l.norm1
            yield p + "post_attention_layernorm.weight", l.norm2
            for name, t in (("q_proj", a.q), ("k_proj", a.kk), ("v_proj", a.v), ("o_proj", a.o), ("q_norm", a.q_norm), ("k_norm", a.k_norm)):
                yield f"{p}self_attn.{name}.weight", t
            yield p + "mlp.gate.weight", m.gate
            for e in range(m.gate.shape[0]):
                q = f"{p}mlp.experts.{e}."
                yield q + "gate_proj.weight", m.gate_up[e, :i]
                yield q + "up_proj.weight", m.gate_up[e, i:]
                yield q + "down_proj.weight", m.down[e]
        yield "model.norm.weight", self.norm
        yield "lm_head.weight", self.head
