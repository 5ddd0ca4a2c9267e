"""
Start LoRA adapters where the gradient of the full weights points.

Letters, used in every signature, docstring and test:
`W` frozen base weight `(out, in)`; `G = dL/dW` `(out, in)`; `A` `(r, in)`, `B` `(out, r)` LoRA factors; `s` PEFT's
scaling of the layer (`alpha / r`, with rsLoRA `alpha / sqrt(r)`); adapted weight `W + s B A`. `G = U S V^T`; `[G]_k`
its best rank-k approximation; `N` tokens of one pass; `k` columns of a sketch.
"""

from .adapted_layer import AdaptedLayer
from .anchor import anchored_parameter_names, load_adapter
from .callback import LoRAGACallback
from .complete import newest_complete_checkpoint
from .config import LoRAGAConfig
from .estimate import GradientEstimate
from .export import export_adapter
from .factors import lora_ga_factors, lora_one_factors
from .layers import find_adapted_layers
from .lora_pro import correct_gradients
from .lora_pro_adamw import LoRAProAdamW
from .lora_pro_wrapper import LoRAProOptimizer
from .probe import estimate_gradients
from .report import GradientReport
from .trainer import LoRAGAMixin, LoRAGATrainer, Seq2SeqLoRAGATrainer
from .write import write_start


__all__ = [
    "AdaptedLayer",
    "GradientEstimate",
    "GradientReport",
    "LoRAGACallback",
    "LoRAGAConfig",
    "LoRAGAMixin",
    "LoRAGATrainer",
    "LoRAProAdamW",
    "LoRAProOptimizer",
    "Seq2SeqLoRAGATrainer",
    "anchored_parameter_names",
    "correct_gradients",
    "estimate_gradients",
    "export_adapter",
    "find_adapted_layers",
    "load_adapter",
    "lora_ga_factors",
    "lora_one_factors",
    "newest_complete_checkpoint",
    "write_start",
]
