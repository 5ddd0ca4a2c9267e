"""Models of transformers, tiny and random, each with rows of its own kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from clients.client import Client, adapted, arguments


WORDS = 97
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TEXT | {"num_key_value_heads": 2}
# The same sizes as GPT-2 and its kin spell them.
GPT = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WITHOUT_DROPOUT = dict.fromkeys(
    (
        "hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "dropout",
        "activation_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate",
        "embedding_dropout", "seq_classif_dropout", "qa_dropout", "layerdrop", "feat_proj_dropout", "final_dropout",
        "encoder_layerdrop", "decoder_layerdrop", "mask_time_prob", "hidden_dropout_rate", "drop_path_rate",
        "pooler_dropout", "classifier_dropout_prob",
    ),
    0.0,
)  # fmt: skip


def numbers(*shape: int, high: int = WORDS, low: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def split(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Make rows of a batch: all entries have as many."""
    return [{key: value[row] for key, value in batch.items()} for row in range(len(next(iter(batch.values()))))]


def text(labels: Tensor, length: int = 10) -> list[dict[str, Tensor]]:
    ids = numbers(len(labels), length)
    return split({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


def causal() -> list[dict[str, Tensor]]:
    return text(numbers(12, 10))  # the labels are as many as the inputs, and need not be they


def seq2seq() -> list[dict[str, Tensor]]:
    return text(numbers(12, 7, seed=2))


def masked() -> list[dict[str, Tensor]]:
    return text(numbers(12, 10).where(numbers(12, 10, low=0, high=4, seed=2) == 0, torch.tensor(-100)))


def classes() -> list[dict[str, Tensor]]:
    return text(torch.arange(12) % 3)


def tags() -> list[dict[str, Tensor]]:
    return text(numbers(12, 10, low=0, high=3))


def spans() -> list[dict[str, Tensor]]:
    ids = numbers(12, 10)
    starts = numbers(12, low=0, high=5)
    return split({"input_ids": ids, "start_positions": starts, "end_positions": starts + 2})


def choices() -> list[dict[str, Tensor]]:
    return split({"input_ids": numbers(12, 3, 10), "labels": torch.arange(12) % 3})


def measures() -> list[dict[str, Tensor]]:
    return text(torch.randn(12, generator=torch.Generator().manual_seed(2)))


def several_labels() -> list[dict[str, Tensor]]:
    return text(numbers(12, 3, low=0, high=2).float())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def images(size: int = 32) -> list[dict[str, Tensor]]:
    return split({"pixel_values": noise(12, 3, size, size), "labels": torch.arange(12) % 3})


def pairs(size: int = 32) -> list[dict[str, Any]]:
    ids = numbers(12, 10)
    return split({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(12, 3, size, size)})


def sounds() -> list[dict[str, Tensor]]:
    return split({"input_values": noise(12, 1200), "labels": torch.arange(12) % 3})


def transcripts() -> list[dict[str, Tensor]]:
    return split({"input_values": noise(12, 1200), "labels": numbers(12, 2, high=30)})


def spectra() -> list[dict[str, Tensor]]:
    return split({"input_features": noise(12, 8, 40), "labels": numbers(12, 6)})


def collate_returning_loss(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    batch: dict[str, Any] = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return batch | {"return_loss": True}


def from_config(head: str, kind: str, sizes: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(kind, **(WITHOUT_DROPOUT | sizes))
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel").from_config(config)


def model_client(
    name: str,
    head: str,
    kind: str,
    sizes: dict[str, Any],
    rows: Callable[[], list[dict[str, Tensor]]],
    lora: dict[str, Any] | None = None,
    collator: Any = None,
    **more: Any,
) -> Client:
    def make(folder: Path) -> dict[str, Any]:
        model = adapted(from_config(head, kind, sizes), **(lora or {}))
        passed = {"model": model, "args": arguments(folder), "train_dataset": rows()}
        return passed | ({} if collator is None else {"data_collator": collator})

    return Client(name, make, **more)


language = partial(model_client, head="CausalLM", rows=causal)
LANGUAGE_MODELS = [
    language("Llama", kind="llama", sizes=GROUPED),
    language("Llama, tied head adapted", kind="llama", sizes=GROUPED | {"tie_word_embeddings": True},
             lora={"target_modules": ["q_proj", "lm_head"]}),
    language("Mistral", kind="mistral", sizes=GROUPED),
    language("Qwen2", kind="qwen2", sizes=GROUPED),
    language("Qwen3", kind="qwen3", sizes=GROUPED | {"head_dim": 8}),
    language("Gemma", kind="gemma", sizes=GROUPED | {"head_dim": 8}),
    language("Gemma 2", kind="gemma2", sizes=GROUPED | {"head_dim": 8, "sliding_window": 8}),
    language("Gemma 3, its scaled embedding adapted", kind="gemma3_text", sizes=GROUPED | {"head_dim": 8},
             lora={"target_modules": ["q_proj", "embed_tokens"]}),
    language("Phi", kind="phi", sizes=TEXT),
    language("Phi-3", kind="phi3", sizes=GROUPED),
    language("OLMo 2", kind="olmo2", sizes=GROUPED),
    language("SmolLM3", kind="smollm3", sizes=GROUPED),
    language("StableLM", kind="stablelm", sizes=GROUPED),
    language("GPT-2 (Conv1D layers)", kind="gpt2", sizes=GPT),
    language("GPT-J", kind="gptj", sizes=GPT | {"rotary_dim": 8}),
    language("GPT-NeoX", kind="gpt_neox", sizes=TEXT),
    language("OPT", kind="opt", sizes=TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    language("BLOOM", kind="bloom", sizes={"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    language("Falcon", kind="falcon", sizes=TEXT | {"ffn_hidden_size": 48}),
    language("Mamba", kind="mamba", sizes={"vocab_size": WORDS, "hidden_size": 32, "state_size": 4,
             "num_hidden_layers": 2, "time_step_rank": 2},
             lora={"target_modules": ["in_proj", "x_proj", "dt_proj"]}, unreached=2),
    language("Qwen3-MoE, experts adapted", kind="qwen3_moe", sizes=GROUPED | {"head_dim": 8, "num_experts": 4,
             "num_experts_per_tok": 2, "moe_intermediate_size": 24},
             lora={"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
]  # fmt: skip

BERT = TEXT | {"num_labels": 3}
text_model = partial(model_client, kind="bert", sizes=BERT)
TEXT_MODELS = [
    text_model("BERT, classes", head="SequenceClassification", rows=classes,
               lora={"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    text_model("BERT, a number", head="SequenceClassification", rows=measures, sizes=TEXT | {"num_labels": 1}),
    text_model("BERT, several labels", head="SequenceClassification", rows=several_labels,
               sizes=BERT | {"problem_type": "multi_label_classification"}),
    text_model("BERT, masked words", head="MaskedLM", rows=masked),
    text_model("BERT, tags", head="TokenClassification", rows=tags),
    text_model("BERT, spans", head="QuestionAnswering", rows=spans, sizes=TEXT),
    text_model("BERT, choices", head="MultipleChoice", rows=choices),
    text_model("BERT, its embeddings adapted", head="SequenceClassification", rows=classes,
               lora={"target_modules": ["query", "word_embeddings", "position_embeddings", "token_type_embeddings"]}),
    text_model("RoBERTa, masked words", head="MaskedLM", kind="roberta", sizes=TEXT, rows=masked),
    text_model("DistilBERT, classes", head="SequenceClassification", kind="distilbert", rows=classes,
               sizes={"vocab_size": WORDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": 3,
                      "max_position_embeddings": 64}),
    text_model("ALBERT, one layer used twice", head="SequenceClassification", kind="albert", rows=classes,
               sizes=BERT | {"embedding_size": 16}),
    text_model("ELECTRA, tags", head="TokenClassification", kind="electra", rows=tags,
               sizes=BERT | {"embedding_size": 16}),
    text_model("DeBERTa-v2, classes", head="SequenceClassification", kind="deberta-v2", rows=classes, sizes=BERT),
    text_model("ModernBERT, masked words", head="MaskedLM", kind="modernbert", sizes=TEXT, rows=masked),
    text_model("T5", head="Seq2SeqLM", kind="t5", rows=seq2seq, sizes={"vocab_size": WORDS, "d_model": 32, "d_ff": 48,
               "d_kv": 8, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}),
    text_model("BART", head="Seq2SeqLM", kind="bart", rows=seq2seq, sizes={"vocab_size": WORDS, "d_model": 32,
               "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
               "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}),
    text_model("Marian", head="Seq2SeqLM", kind="marian", rows=seq2seq, sizes={"vocab_size": WORDS, "d_model": 32,
               "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
               "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0,
               "decoder_start_token_id": 0}),
]  # fmt: skip

SEEING = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 8, "num_labels": 3}  # fmt: skip
TOWERS = {
    "text_config": TEXT | WITHOUT_DROPOUT,
    "vision_config": {k: v for k, v in SEEING.items() if k != "num_labels"} | WITHOUT_DROPOUT,
    "projection_dim": 16,
}
CONVOLUTIONAL = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 3}
picture = partial(model_client, head="ImageClassification", rows=images, sizes=SEEING)
OTHER_SENSES = [
    picture("ViT", kind="vit"),
    picture("DINOv2", kind="dinov2"),
    picture("BEiT", kind="beit"),
    picture("Swin", kind="swin", sizes={"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
            "image_size": 32, "patch_size": 4, "num_labels": 3}),
    picture("ConvNeXt, its Linear layers", kind="convnext", sizes={"hidden_sizes": [16, 32], "depths": [1, 1],
            "num_stages": 2, "patch_size": 4, "num_labels": 3}),
    picture("ConvNeXt, its depthwise convolutions", kind="convnext", sizes={"hidden_sizes": [16, 32], "depths": [1, 1],
            "num_stages": 2, "patch_size": 4, "num_labels": 3}, lora={"r": 32, "target_modules": ["dwconv"]},
            refused=r"dwconv: Conv2d has groups=16.*target_modules"),
    picture("ResNet, its convolutions", kind="resnet", sizes=CONVOLUTIONAL, lora={"target_modules": ["convolution"]},
            same_loss=False),
    picture("ResNet, its convolutions and a head in `modules_to_save`", kind="resnet", sizes=CONVOLUTIONAL,
            lora={"target_modules": ["convolution"], "modules_to_save": ["classifier"]}, same_loss=False,
            config={"head_warmup_steps": 1}, same_first_step=False),
    picture("CLIP, in-batch negatives", head="ZeroShotImageClassification", kind="clip", sizes=TOWERS, rows=pairs,
            collator=collate_returning_loss),
    picture("SigLIP, in-batch negatives", head="ZeroShotImageClassification", kind="siglip", sizes=TOWERS, rows=pairs,
            collator=collate_returning_loss, unreached=1),
    picture("SigLIP, its pooling head's `nn.MultiheadAttention`, too", head="ZeroShotImageClassification",
            kind="siglip", sizes=TOWERS, rows=pairs, collator=collate_returning_loss,
            lora={"target_modules": ["q_proj", "v_proj", "head.attention"]}),
    picture("wav2vec 2.0, classes", head="AudioClassification", kind="wav2vec2", rows=sounds,
            sizes=TEXT | {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_labels": 3,
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}),
    picture("HuBERT, transcripts (CTC)", head="CTC", kind="hubert", rows=transcripts,
            sizes=TEXT | {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "vocab_size": 32,
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}),
    picture("Whisper", head="SpeechSeq2Seq", kind="whisper", rows=spectra, sizes={"vocab_size": WORDS, "d_model": 32,
            "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20,
            "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}),
]  # fmt: skip

CLIENTS = {
    "Language models": LANGUAGE_MODELS,
    "Text models": TEXT_MODELS,
    "Images and sound": OTHER_SENSES,
}
