"""InCA (Dukler et al., arXiv 2303.04105): heads that read the activations of a frozen model by cross-attention."""

from typing import Any

import torch
from peft import LoraConfig, TaskType
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from comparison.starts import Samples


ATTENTION_HEADS = 4


class ReadingHead(nn.Module):
    """
    One learned query attends to the activations of one layer. What it reads is classified.

    Args:
        features: of the activations `(batch, tokens, features)`.
        width: of query, keys and values; a multiple of 4.
        classes: number of logits.
    """

    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.read = nn.MultiheadAttention(width, ATTENTION_HEADS, kdim=features, vdim=features, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
        self.norm_of_read = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def forward(self, h: Tensor, padding: Tensor | None) -> Tensor:  # (batch, tokens, features) -> (batch, classes)
        h = self.norm(h)
        read, _ = self.read(self.query.expand(len(h), -1, -1), h, h, key_padding_mask=padding, need_weights=False)
        return self.classify(self.norm_of_read(read[:, 0]))


class ReadByHeads(nn.Module):
    """
    A frozen classifier's backbone, and a head for the embeddings and for each block.

    No backward pass goes through the backbone. Heads learn apart: the loss is the sum of theirs, and they share
    nothing. The logits are the mean of theirs.
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.config = model.config
        self.base = model.base_model.requires_grad_(False)
        config = model.config.get_text_config()
        heads = (ReadingHead(config.hidden_size, width, model.config.num_labels) for _ in range(_activations(config)))
        self.heads = nn.ModuleList(heads).to(next(model.parameters()).device)

    def train(self, mode: bool = True) -> "ReadByHeads":
        super().train(mode)
        self.base.eval()  # it does not learn, so nothing in it is dropped
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        given: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        with torch.no_grad():
            read = self.base(input_ids, attention_mask=attention_mask, output_hidden_states=True, **given)
        padding = None if attention_mask is None else attention_mask == 0
        all_logits = [head(h.float(), padding) for head, h in zip(self.heads, read.hidden_states, strict=True)]
        loss = None if labels is None else sum(cross_entropy(logits, labels) for logits in all_logits)
        logits = torch.stack(all_logits).mean(dim=0)
        if loss is not None and not self.training:  # what is judged is what would be used: the mean of the logits
            loss = cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _activations(config: Any) -> int:
    return config.num_hidden_layers + 1


def add_reading_heads(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
    """Replace a classifier's head by heads of width 16 r, on all layers."""
    if config.task_type != TaskType.SEQ_CLS:
        raise ValueError(
            "arm 'inca': its heads classify whole rows. Use task: sequence-classification, or leave it out."
        )
    return ReadByHeads(model, 16 * config.r)
