#!/usr/bin/env python3
"""Train the bundled toy checkpoint and write it as a Hugging Face folder.

    python train.py [--out DIR] [--steps N] [--minutes M] [--seed S] [--init DIR]

The text is drawn by grammar.py, fresh for every step; the tokenizer is a byte-level BPE trained on the
same grammar. The learning rate warms up, stays for --hold of the steps, and falls linearly over the rest.
--minutes caps the CPU time: the fall then begins when --hold of it is used, and metrics.json names the
steps that were really made, so that `--steps` with that number repeats the run without the cap.
--init goes on from a checkpoint of this script (its weights and tokenizer, a fresh optimizer).
"""
import argparse
import json
import os
import shutil
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import grammar
from model import Toy

HERE = os.path.dirname(os.path.abspath(__file__))
SPECIALS = [grammar.END, grammar.OPEN, grammar.CLOSE]
CHAT = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TOKENS_PER_STEP = 2048
# Words split as in Qwen's tokenizer; every digit stands alone, so that sums are made of columns.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def config(a):
    return dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", torch_dtype="bfloat16", vocab_size=a.vocab,
        hidden_size=a.hidden, num_hidden_layers=a.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=16, num_experts_per_tok=4, moe_intermediate_size=a.width, intermediate_size=4 * a.width,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], attention_bias=False, attention_dropout=0.0,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, max_position_embeddings=2048,
        tie_word_embeddings=False, router_aux_loss_coef=0.01, output_router_logits=False, sliding_window=None,
        use_sliding_window=False, max_window_layers=a.layers, initializer_range=0.02, use_cache=True,
        bos_token_id=None, eos_token_id=2, pad_token_id=0)


def make_tokenizer(vocab, out):
    docs = grammar.documents("tokenizer")
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator((next(docs)[1] for _ in range(20000)), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.save(os.path.join(out, "tokenizer.json"))
    return t


def batches(tok, seed):
    """Endless id tensors [B, T+1]. Each row begins at a document, as prompts do; one step in four has long rows."""
    docs, step = grammar.documents(seed), 0
    while True:
        t = 512 if step % 4 == 3 else 256
        rows = []
        for _ in range(TOKENS_PER_STEP // t):
            row = []
            while len(row) <= t:
                row += tok.encode(next(docs)[1]).ids
            rows.append(row[:t + 1])
        yield torch.tensor(rows)
        step += 1


def export(m, c, out):
    save_file({k: v.detach().to(torch.bfloat16).contiguous().clone() for k, v in m.named_hf()},
              os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    special = {str(i): dict(content=s, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
               for i, s in enumerate(SPECIALS)}
    for name, value in (
            ("config.json", c),
            ("generation_config.json", dict(do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[2, 0], pad_token_id=0)),
            ("tokenizer_config.json", dict(
                tokenizer_class="PreTrainedTokenizerFast", bos_token=None, eos_token=grammar.CLOSE, pad_token=grammar.END,
                unk_token=None, add_bos_token=False, clean_up_tokenization_spaces=False, model_max_length=2048,
                added_tokens_decoder=special, chat_template=CHAT))):
        with open(os.path.join(out, name), "w") as f:
            json.dump(value, f, indent=1)
            f.write("\n")


def rate(step, fall, end, peak):
    """Warm up over 100 steps, stay, fall linearly from `fall` to `end`."""
    if step < 100:
        return peak * (step + 1) / 100
    return peak if step < fall else peak * max(0.02, (end - step) / (end - fall))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", default=HERE)
    ap.add_argument("--steps", type=int, default=4800)
    ap.add_argument("--minutes", type=float, default=40.0)
    ap.add_argument("--hold", type=float, default=0.7)
    ap.add_argument("--init", help="folder of an earlier run")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--vocab", type=int, default=1536)
    ap.add_argument("--hidden", type=int, default=128)
    ap.add_argument("--layers", type=int, default=6)
    ap.add_argument("--width", type=int, default=64, help="intermediate size of one expert")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    os.makedirs(a.out, exist_ok=True)
    start = time.time()
    earlier = []
    if a.init:
        with open(os.path.join(a.init, "metrics.json")) as f:
            earlier = json.load(f)["training"]["runs"]
        shutil.copy(os.path.join(a.init, "tokenizer.json"), a.out)
        tok = Tokenizer.from_file(os.path.join(a.out, "tokenizer.json"))
    else:
        tok = make_tokenizer(a.vocab, a.out)
    a.vocab = tok.get_vocab_size()
    c = config(a)
    m = Toy(c)
    if a.init:
        m.load_hf(load_file(os.path.join(a.init, "model.safetensors")))
    params = sum(p.numel() for p in m.parameters())
    print(f"{params} parameters, vocabulary {a.vocab}", flush=True)
    decay = [p for p in m.parameters() if p.dim() > 1]
    rest = [p for p in m.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=0.05), dict(params=rest, weight_decay=0.0)],
                            betas=(0.9, 0.98), fused=True)
    fall, end, step, seen = int(a.hold * a.steps), a.steps, 0, 0.0
    for x in batches(tok, a.seed):
        if step >= end:
            break
        used = time.process_time() / 60
        if step < fall and used > a.hold * a.minutes:
            fall, end = step, max(step + 1, round(step / a.hold))
        for g in opt.param_groups:
            g["lr"] = rate(step, fall, end, a.lr)
        logits, balance, _ = m(x[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        (loss + c["router_aux_loss_coef"] * balance).backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        step += 1
        seen = loss.item() if step == 1 else 0.98 * seen + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step}/{end} loss {seen:.4f} balance {balance.item():.3f} "
                  f"cpu {used:.1f} min wall {(time.time() - start) / 60:.1f} min", flush=True)
        if step % 500 == 0:
            export(m, c, a.out)
    export(m, c, a.out)
    run = dict(seed=a.seed, steps=end, hold=a.hold, lr=a.lr, cpu_minutes=round(time.process_time() / 60, 1),
               wall_minutes=round((time.time() - start) / 60, 1))
    runs = earlier + [run]
    facts = dict(parameters=params, vocabulary=a.vocab, steps=sum(r["steps"] for r in runs), tokens=sum(r["steps"] for r in runs) * TOKENS_PER_STEP,
                 threads=a.threads, cpu_minutes=round(sum(r["cpu_minutes"] for r in runs), 1), torch=torch.__version__.split("+")[0], runs=runs)
    with open(os.path.join(a.out, "metrics.json"), "w") as f:
        json.dump(dict(training=facts), f, indent=1)
        f.write("\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
