"""
Start LoRA adapters where the gradient of the full weights points.

Letters, used in every signature, docstring and test:
`W` frozen base weight `(out, in)`; `G = dL/dW` `(out, in)`; `A` `(r, in)`, `B` `(out, r)` LoRA factors; `s` PEFT's
scaling of the layer (`alpha / r`, with rsLoRA `alpha / sqrt(r)`); adapted weight `W + s B A`. `G = U S V^T`; `[G]_k`
its best rank-k approximation; `N` tokens of one pass; `k` columns of a sketch.
"""

from .callback import LoRAGACallback
from .config import LoRAGAConfig
from .gradients.estimate import GradientEstimate
from .gradients.probe import estimate_gradients
from .maths.factors import lora_ga_factors, lora_one_factors
from .maths.lora_pro import correct_gradients
from .optimizers.adamw import LoRAProAdamW
from .optimizers.wrapper import LoRAProOptimizer
from .saving.export import export_adapter
from .saving.load import load_adapter
from .starts.report import GradientReport
from .trainer import LoRAGAMixin, LoRAGATrainer, Seq2SeqLoRAGATrainer


__version__ = "0.1.0"

__all__ = [
    "GradientEstimate",
    "GradientReport",
    "LoRAGACallback",
    "LoRAGAConfig",
    "LoRAGAMixin",
    "LoRAGATrainer",
    "LoRAProAdamW",
    "LoRAProOptimizer",
    "Seq2SeqLoRAGATrainer",
    "correct_gradients",
    "estimate_gradients",
    "export_adapter",
    "load_adapter",
    "lora_ga_factors",
    "lora_one_factors",
]
