"""What transformers computes for a sequence: log-probabilities, router logits, and the rows the contract asks for."""
import torch
from transformers import AutoModelForCausalLM

ROUTERS = (".mlp.gate", ".block_sparse_moe.gate")


class Reference:
    """A checkpoint loaded by transformers (eager attention), with the router logits of each forward in reach, on the CPU."""

    def __init__(self, folder, dtype=torch.float32, device="cpu"):
        self.model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
        bad = {k: v for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if bad:
            raise SystemExit(f"{folder}: {bad}")
        self.model.eval().to(device)
        if device != "cpu":
            # The grouped products of GPUs know no f32.
            self.model.set_experts_implementation("eager")
        c = self.model.config
        self.num_layers, self.top_k = c.num_hidden_layers, c.num_experts_per_tok
        self.num_experts = getattr(c, "num_experts", None) or c.num_local_experts
        self.logits, self.given = {}, None
        for name, module in self.model.named_modules():
            if name.endswith(ROUTERS) and hasattr(module, "top_k"):
                module.register_forward_hook(self._keep(int(name.split(".")[2])))
        self.moe_layers = None

    def _keep(self, layer):
        def hook(module, args, out):
            # The contract's score: the f32 logit of the router's input, whatever the dtype the model runs in.
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            self.logits[layer] = (x @ module.weight.float().T).cpu()
            if self.given is None:
                return None
            # Given experts: their weights are gathered from the live scores, then normalised as the family does.
            logits, scores, chosen = out
            chosen, scores = chosen.clone(), scores.clone()
            given = self.given[:, layer].to(chosen.device)
            weights = torch.softmax(logits[:len(given)].float(), -1).gather(-1, given)
            if getattr(module, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
            chosen[:len(given)], scores[:len(given)] = given, weights.to(scores.dtype)
            return logits, scores, chosen
        return hook

    @torch.no_grad()
    def forward(self, ids, given=None):
        """f32 log-softmax [T, V]; router logits stay in `self.logits` ({layer: [T, E]}).

        `given` [rows, L, K] takes the place of the routers' choice for the first rows; cells of dense layers mean nothing.
        """
        self.logits.clear()
        self.given = None if given is None else torch.as_tensor(given, dtype=torch.long)
        out = self.model(torch.tensor([ids], device=self.model.device), use_cache=False).logits[0].cpu()
        self.moe_layers = sorted(self.logits)
        return torch.log_softmax(out.double(), -1).float()

    def greedy(self, prompt, n, stop=(2,)):
        """Up to n greedy ids; a stop id ends the text and is part of it. Every step is a whole forward: no cache to err."""
        ids = list(prompt)
        while len(ids) < len(prompt) + n:
            ids.append(self.forward(ids)[-1].argmax().item())
            if ids[-1] in stop:
                break
        return ids[len(prompt):]

    def rows(self, count):
        """(ids [count, L, K] descending with ties to the lower id, gaps [count, L]) of the last forward.

        A gap is the smallest relative difference |a-b| / max(|a|, |b|, 1e-6) of neighbours among the K+1 largest
        logits: below it, rounding may change the cell. Dense layers hold ids 0 and gap 1.
        """
        ids = torch.zeros(count, self.num_layers, self.top_k, dtype=torch.long)
        gaps = torch.ones(count, self.num_layers)
        for layer, logits in self.logits.items():
            value, order = logits[:count].sort(dim=-1, descending=True, stable=True)
            ids[:, layer] = order[:, :self.top_k]
            a, b = value[:, :-1][:, :self.top_k], value[:, 1:][:, :self.top_k]
            if b.shape[1]:
                scale = torch.maximum(a.abs(), b.abs()).clamp_min(1e-6)
                gaps[:, layer] = ((a - b).abs() / scale).min(-1).values
        return ids, gaps
