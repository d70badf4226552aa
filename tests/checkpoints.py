"""Random Qwen3 checkpoints, as transformers writes them, with a small byte-level tokenizer and a chat template."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NUM_BYTES = 256
THETA = 10_000.0


def write_checkpoint(
    directory: Path,
    *,
    num_layers: int = 2,
    hidden: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    intermediate: int = 96,
    vocab: int = 320,
    tied: bool = True,
    sharded: bool = False,
    rope_style: str = "rope_parameters",
    seed: int = 0,
    max_positions: int = 1024,
    dtype: torch.dtype = torch.float32,
) -> Qwen3ForCausalLM:
    """Write a model directory and return the model it holds, in eval mode."""
    config = Qwen3Config(
        num_hidden_layers=num_layers,
        hidden_size=hidden,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        max_position_embeddings=max_positions,
        eos_token_id=NUM_BYTES + SPECIAL_TOKENS.index("<|im_end|>"),
        bos_token_id=None,
        initializer_range=0.1,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # transformers starts them at one, which would hide a forgotten weight
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model = model.to(dtype)
    total_bytes = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=total_bytes // 3 if sharded else total_bytes + 1)
    _spell_rope(directory / "config.json", rope_style)
    write_tokenizer(directory)
    return model


def _spell_rope(path: Path, rope_style: str) -> None:
    config = json.loads(path.read_text())
    if rope_style == "rope_theta":
        del config["rope_parameters"]
        config["rope_theta"] = THETA
    path.write_text(json.dumps(config))


def write_tokenizer(directory: Path) -> None:
    """One token per byte, then the special ones: the ids are 0..258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    chat = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(chat))
